// Command robustness starts a cluster of real processes, does it harm under load, and checks what its clients saw.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"metastore/robustness/internal/cluster"
	"metastore/robustness/internal/faults"
	"metastore/robustness/internal/scenario"
)

func main() {
	code, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "robustness:", err)
	}
	os.Exit(code)
}

// Exit codes: 0 nothing found, 1 violations, 2 it could not run.
func run() (int, error) {
	var cfg scenario.Config
	bin := flag.String("bin", "", "the server's binary")
	binArgs := flag.String("bin-args", "", "more flags for every member, separated by spaces")
	name := flag.String("scenario", "random", "one of: "+strings.Join(scenario.Names(), ", "))
	list := flag.String("faults", "all", "faults of the random scenario, with commas; all, none, and -name to leave one out; there are:\n"+strings.Join(faults.Names(), "\n"))
	out := flag.String("out", "", "where logs and findings go (default: a new temporary directory)")
	keep := flag.Bool("keep", false, "keep data directories and the history even if nothing was found")
	repeat := flag.Int("repeat", 1, "run so many times, each with a fresh cluster and the next seed")
	flag.Uint64Var(&cfg.Seed, "seed", 0, "of the faults and the clients (default: of the time)")
	flag.DurationVar(&cfg.Duration, "duration", 2*time.Minute, "of the faults, or of a scenario's load")
	flag.IntVar(&cfg.Cluster.Members, "members", 3, "of the cluster")
	flag.DurationVar(&cfg.Cluster.Heartbeat, "heartbeat", 100*time.Millisecond, "--heartbeat-interval")
	flag.DurationVar(&cfg.Cluster.Election, "election", time.Second, "--election-timeout")
	flag.IntVar(&cfg.Cluster.SnapshotCount, "snapshot-count", 300, "--snapshot-count: low, so that members that lag need snapshots")
	flag.IntVar(&cfg.Cluster.CatchUp, "snapshot-catchup-entries", 100, "--snapshot-catchup-entries")
	flag.DurationVar(&cfg.Cluster.Progress, "progress-notify", time.Second, "--watch-progress-notify-interval; 0 leaves the flag out")
	flag.BoolVar(&cfg.Cluster.Direct, "direct", false, "no proxies between the peers (no network faults then)")
	flag.IntVar(&cfg.ClientsPerMember, "clients", 3, "clients of each member, besides those of leases and watches")
	flag.IntVar(&cfg.Rate, "rate", 300, "operations a second of all clients")
	flag.DurationVar(&cfg.OpTimeout, "op-timeout", 1500*time.Millisecond, "of one operation")
	flag.DurationVar(&cfg.RecoverBound, "recover-bound", 30*time.Second, "within which a healed cluster must serve through every member")
	flag.DurationVar(&cfg.LeaseLate, "lease-late", 10*time.Second, "how much later than its time a lease may end")
	flag.IntVar(&cfg.ValueBytes, "value-bytes", 0, "pad values to this size")
	retryable := flag.String("retryable", "Unavailable", "codes, with commas, by which requests may fail in the scenarios rolling-restart and move-leader")
	flag.Float64Var(&cfg.P99Factor, "p99-factor", 0, "of the scenario snapshot-catchup: how many times its usual value the p99 of puts may reach; 0: only report it")
	dataBytes := flag.String("data-bytes", "256MB", "of the scenario snapshot-catchup; units KB, MB, GB")
	flag.Parse()
	if *bin == "" || flag.NArg() > 0 {
		flag.Usage()
		return 2, errors.New("--bin is required, and there are no arguments besides flags")
	}
	var err error
	if cfg.DataBytes, err = parseBytes(*dataBytes); err != nil {
		return 2, err
	}
	if cfg.Faults, err = faults.Parse(*list); err != nil {
		return 2, err
	}
	if cfg.Cluster.Bin, err = filepath.Abs(*bin); err != nil {
		return 2, err
	}
	// A link may point to another build by the time a member is restarted.
	if cfg.Cluster.Bin, err = filepath.EvalSymlinks(cfg.Cluster.Bin); err != nil {
		return 2, err
	}
	if cfg.Cluster.Members < 3 || cfg.Rate < 1 || cfg.ClientsPerMember < 1 {
		return 2, errors.New("at least 3 members, 1 client of each, and a rate of 1")
	}
	cfg.Retryable = strings.Split(*retryable, ",")
	cfg.Cluster.Args = strings.Fields(*binArgs)
	cfg.KeepHistory = *keep
	if cfg.Seed == 0 {
		cfg.Seed = uint64(time.Now().UnixNano())
	}
	base := *out
	if base == "" {
		if base, err = os.MkdirTemp("", "robustness-"); err != nil {
			return 2, err
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	worst := 0
	for i := range *repeat {
		one := cfg
		one.Seed += uint64(i)
		one.Out = base
		if *repeat > 1 {
			one.Out = filepath.Join(base, fmt.Sprintf("run-%d", i+1))
		}
		one.Cluster.Dir = one.Out
		code, err := single(ctx, *name, one, *keep)
		worst = max(worst, code)
		if err != nil {
			return 2, err
		}
	}
	return worst, nil
}

func single(ctx context.Context, name string, cfg scenario.Config, keep bool) (int, error) {
	fmt.Printf("scenario %s, seed %d, members %d, binary %s %s, logs in %s\n", name, cfg.Seed, cfg.Cluster.Members,
		cfg.Cluster.Bin, strings.Join(cfg.Cluster.Args, " "), cfg.Out)
	// Whatever hangs, the harness ends, and with it every process it started.
	limit := cfg.Duration + 10*time.Minute
	if strings.HasPrefix(name, "snapshot-") {
		limit += 30 * time.Minute
	}
	dead := time.AfterFunc(limit, func() {
		fmt.Fprintf(os.Stderr, "robustness: not done after %v, giving up; logs in %s\n", limit, cfg.Out)
		os.Exit(2)
	})
	defer dead.Stop()
	outcome, err := scenario.Run(ctx, name, cfg)
	if err != nil {
		return 2, fmt.Errorf("scenario %s, seed %d: %w; logs in %s", name, cfg.Seed, err, cfg.Out)
	}
	fmt.Println("--- summary")
	for _, l := range outcome.Lines {
		fmt.Println(l)
	}
	for _, v := range outcome.Violations {
		fmt.Println("VIOLATION", v)
	}
	if text, err := json.MarshalIndent(map[string]any{"scenario": name, "seed": cfg.Seed, "bin": cfg.Cluster.Bin,
		"args": cfg.Cluster.Args, "report": outcome.Lines, "violations": outcome.Violations}, "", "  "); err == nil {
		_ = os.WriteFile(filepath.Join(cfg.Out, "report.json"), append(text, '\n'), 0o644)
	}
	if len(outcome.Violations) > 0 {
		fmt.Printf("FAILED: %d violations, scenario %s, seed %d; logs, data and history in %s\n", len(outcome.Violations), name, cfg.Seed, cfg.Out)
		return 1, nil
	}
	if !keep {
		cluster.RemoveData(cfg.Out)
	}
	fmt.Printf("PASSED: scenario %s, seed %d\n", name, cfg.Seed)
	return 0, nil
}

func parseBytes(text string) (int64, error) {
	var n int64
	var unit string
	if _, err := fmt.Sscanf(text, "%d%s", &n, &unit); err != nil {
		if _, err := fmt.Sscanf(text, "%d", &n); err != nil {
			return 0, fmt.Errorf("%q is no size", text)
		}
	}
	shift := map[string]int{"": 0, "B": 0, "KB": 10, "MB": 20, "GB": 30, "KiB": 10, "MiB": 20, "GiB": 30}
	s, ok := shift[unit]
	if !ok {
		return 0, fmt.Errorf("%q is no size: units are KB, MB, GB", text)
	}
	return n << s, nil
}
