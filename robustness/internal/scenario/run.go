package scenario

import (
	"context"
	"fmt"
	"sort"
)

var scenarios = map[string]func(context.Context, Config) (*Outcome, error){
	"random":               Random,
	"rolling-restart":      RollingRestart,
	"move-leader":          MoveLeader,
	"stale-read":           StaleRead,
	"snapshot-catchup":     SnapshotCatchup,
	"snapshot-interrupted": SnapshotInterrupted,
	"fault-check":          FaultCheck,
	"corruption":           Corruption,
}

// Names lists the scenarios.
func Names() []string {
	var names []string
	for n := range scenarios {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// Run runs one scenario by its name.
func Run(ctx context.Context, name string, cfg Config) (*Outcome, error) {
	f, ok := scenarios[name]
	if !ok {
		return nil, fmt.Errorf("unknown scenario %q", name)
	}
	return f(ctx, cfg)
}
