// Package faults does harm to a running cluster and takes it back. What it does is drawn from a seeded generator before
// anything that depends on time, so that a seed gives the same sequence of faults.
package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sort"
	"strings"
	"time"

	"metastore/robustness/internal/cluster"
	"metastore/robustness/internal/netfault"
)

type Env struct {
	Cluster *cluster.Cluster
	Rng     *rand.Rand
	// Say tells what is being done.
	Say func(format string, args ...any)
	// Violation reports something that must not be, found while doing harm.
	Violation func(format string, args ...any)
	// SafeToCompact is a revision that all watches have behind them; Compacted is told where the history was cut.
	SafeToCompact func() int64
	Compacted     func(rev int64)
}

type fault struct {
	name string
	what string
	run  func(context.Context, *Env) error
}

var all = []fault{
	{"kill", "kill -9 of one member, the leader, a majority or all", kill},
	{"pause", "SIGSTOP of the leader or another for 0.5 to 4 election timeouts", pauseOne},
	{"partition", "a member, the leader or a pair cut off, both ways or one way", partition},
	{"delay", "delay with jitter between all members, or from one of them", delay},
	{"slow-link", "few bytes a second to one member", slowLink},
	{"drop", "connections reset at random", drop},
	{"stall", "a black hole: connections are accepted and nothing is delivered", stall},
	{"reorder", "connections broken while what they carried arrives late", reorder},
	{"term", "SIGTERM and restart of one member, or of all in turn", term},
	{"move-leader", "MoveLeader", moveLeader},
	{"replace", "a member removed, its data wiped, and added anew", replace},
	{"slow-disk", "delayed log syncs through the fault hook", slowDisk},
	{"compact", "compaction of what all watches have seen", compact},
}

// Names lists all faults with what they do.
func Names() []string {
	var names []string
	for _, f := range all {
		names = append(names, fmt.Sprintf("%-12s %s", f.name, f.what))
	}
	return names
}

// Parse reads a list of names; "all" is all of them, "none" none, and "-name" takes one away.
func Parse(text string) ([]string, error) {
	chosen := map[string]bool{}
	known := map[string]bool{}
	for _, f := range all {
		known[f.name] = true
	}
	for part := range strings.SplitSeq(text, ",") {
		name := strings.TrimPrefix(part, "-")
		switch {
		case part == "all":
			for n := range known {
				chosen[n] = true
			}
		case part == "none", part == "":
		case !known[name]:
			return nil, fmt.Errorf("unknown fault %q; there are:\n%s", name, strings.Join(Names(), "\n"))
		default:
			chosen[name] = name == part
		}
	}
	var names []string
	for n, on := range chosen {
		if on {
			names = append(names, n)
		}
	}
	sort.Strings(names)
	return names, nil
}

// Deck deals the faults so that each comes before any comes again.
type Deck struct {
	names []string
	left  []string
}

func NewDeck(names []string) *Deck { return &Deck{names: names} }

func (d *Deck) Next(rng *rand.Rand) string {
	if len(d.left) == 0 {
		d.left = append([]string(nil), d.names...)
		rng.Shuffle(len(d.left), func(i, j int) { d.left[i], d.left[j] = d.left[j], d.left[i] })
	}
	name := d.left[0]
	d.left = d.left[1:]
	return name
}

// Run does one fault from begin to end. The caller heals whatever is left.
func Run(ctx context.Context, name string, env *Env) error {
	for _, f := range all {
		if f.name == name {
			return f.run(ctx, env)
		}
	}
	return fmt.Errorf("unknown fault %q", name)
}

func (e *Env) elections(low, high float64) time.Duration {
	return time.Duration((low + e.Rng.Float64()*(high-low)) * float64(e.Cluster.Election))
}

func (e *Env) member() *cluster.Member {
	return e.Cluster.Members[e.Rng.IntN(len(e.Cluster.Members))]
}

// leader gives the leader, or some member if there is none for long.
func (e *Env) leader(ctx context.Context) *cluster.Member {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if m, err := e.Cluster.Leader(ctx); err == nil {
		return m
	}
	return e.Cluster.Members[0]
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func names(members []*cluster.Member) string {
	var n []string
	for _, m := range members {
		n = append(n, m.Name)
	}
	return strings.Join(n, " ")
}

func kill(ctx context.Context, e *Env) error {
	how, down := e.Rng.IntN(10), e.elections(0.2, 4)
	shuffled := append([]*cluster.Member(nil), e.Cluster.Members...)
	e.Rng.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	var victims []*cluster.Member
	switch {
	case how < 3:
		victims = shuffled[:1]
	case how < 6:
		victims = []*cluster.Member{e.leader(ctx)}
	case how < 8:
		victims = shuffled[:len(shuffled)/2+1]
	default:
		victims = shuffled
	}
	what := map[bool]string{true: " (leader)"}[how >= 3 && how < 6]
	e.Say("kill -9 %s%s for %v", names(victims), what, down.Round(time.Millisecond))
	for _, v := range victims {
		// Quick ones first, then the waiting: they are to die together.
		go func() { _ = v.Kill() }()
	}
	for _, v := range victims {
		if err := v.Kill(); err != nil {
			return err
		}
	}
	sleep(ctx, down)
	for _, v := range victims {
		if err := v.Start(); err != nil {
			return err
		}
	}
	return nil
}

func pauseOne(ctx context.Context, e *Env) error {
	leader, long, other := e.Rng.IntN(4) > 0, e.elections(0.5, 4), e.member()
	v := other
	if leader {
		v = e.leader(ctx)
	}
	e.Say("SIGSTOP %s%s for %v", v.Name, map[bool]string{true: " (leader)"}[leader], long.Round(time.Millisecond))
	if err := v.Pause(); err != nil {
		return err
	}
	sleep(ctx, long)
	return v.Resume()
}

func partition(ctx context.Context, e *Env) error {
	mode := []netfault.Mode{netfault.Hold, netfault.Discard, netfault.Reset}[e.Rng.IntN(3)]
	how, long := e.Rng.IntN(6), e.elections(1, 6)
	if e.Rng.IntN(3) == 0 {
		long = e.elections(0.3, 1)
	}
	v, n := e.member(), e.Cluster.Net
	peer := e.Cluster.Members[(v.Index+1+e.Rng.IntN(len(e.Cluster.Members)-1))%len(e.Cluster.Members)]
	cut := netfault.Rule{Mode: mode}
	what := ""
	switch how {
	case 0:
		what = v.Name + " from all"
		e.around(v, cut, true, true)
	case 1:
		v = e.leader(ctx)
		what = v.Name + " (leader) from all"
		e.around(v, cut, true, true)
	case 2:
		what = fmt.Sprintf("%s and %s from each other", v.Name, peer.Name)
		n.Both(v.Index, peer.Index, cut)
	case 3:
		if e.Rng.IntN(2) == 0 {
			v = e.leader(ctx)
		}
		what = "what " + v.Name + " sends"
		e.around(v, cut, true, false)
	case 4:
		if e.Rng.IntN(2) == 0 {
			v = e.leader(ctx)
		}
		what = "what " + v.Name + " would receive"
		e.around(v, cut, false, true)
	case 5:
		what = fmt.Sprintf("one way from %s to %s", v.Name, peer.Name)
		n.Set(v.Index, peer.Index, cut)
	}
	e.Say("cut (%v) %s for %v", mode, what, long.Round(time.Millisecond))
	sleep(ctx, long)
	n.Heal()
	return nil
}

// around sets the rules from and to one member.
func (e *Env) around(v *cluster.Member, r netfault.Rule, out, in bool) {
	for _, o := range e.Cluster.Members {
		if o == v {
			continue
		}
		if out {
			e.Cluster.Net.Set(v.Index, o.Index, r)
		}
		if in {
			e.Cluster.Net.Set(o.Index, v.Index, r)
		}
	}
}

func (e *Env) everywhere(r netfault.Rule) {
	for _, m := range e.Cluster.Members {
		e.around(m, r, true, false)
	}
}

func delay(ctx context.Context, e *Env) error {
	r := netfault.Rule{Delay: e.elections(0.01, 0.4), Jitter: e.elections(0.01, 0.4)}
	v, whole, long := e.member(), e.Rng.IntN(2) == 0, e.elections(3, 8)
	what := "everywhere"
	if whole {
		e.everywhere(r)
	} else {
		e.around(v, r, true, false)
		what = "from " + v.Name
	}
	e.Say("delay %v + up to %v %s for %v", r.Delay.Round(time.Millisecond), r.Jitter.Round(time.Millisecond), what, long.Round(time.Millisecond))
	sleep(ctx, long)
	e.Cluster.Net.Heal()
	return nil
}

func slowLink(ctx context.Context, e *Env) error {
	r := netfault.Rule{BytesPerSecond: 2000 << e.Rng.IntN(6)}
	v, long := e.member(), e.elections(3, 8)
	e.Say("%d bytes/s to %s for %v", r.BytesPerSecond, v.Name, long.Round(time.Millisecond))
	e.around(v, r, false, true)
	sleep(ctx, long)
	e.Cluster.Net.Heal()
	return nil
}

func drop(ctx context.Context, e *Env) error {
	r := netfault.Rule{ResetEvery: e.elections(0.1, 2)}
	long := e.elections(3, 8)
	e.Say("reset each connection every %v or so, for %v", r.ResetEvery.Round(time.Millisecond), long.Round(time.Millisecond))
	e.everywhere(r)
	sleep(ctx, long)
	e.Cluster.Net.Heal()
	return nil
}

func stall(ctx context.Context, e *Env) error {
	mode := []netfault.Mode{netfault.Hold, netfault.Discard}[e.Rng.IntN(2)]
	v, whole, long := e.member(), e.Rng.IntN(2) == 0, e.elections(0.3, 4)
	what := "between all members"
	if whole {
		e.everywhere(netfault.Rule{Mode: mode})
	} else {
		what = "to " + v.Name
		e.around(v, netfault.Rule{Mode: mode}, false, true)
	}
	e.Say("black hole (%v) %s for %v", mode, what, long.Round(time.Millisecond))
	sleep(ctx, long)
	e.Cluster.Net.Heal()
	return nil
}

func reorder(ctx context.Context, e *Env) error {
	r := netfault.Rule{OvertakeEvery: e.elections(0.2, 2), Jitter: e.elections(0.02, 0.3)}
	long := e.elections(3, 8)
	e.Say("reorder: connections overtaken every %v or so, jitter %v, for %v", r.OvertakeEvery.Round(time.Millisecond),
		r.Jitter.Round(time.Millisecond), long.Round(time.Millisecond))
	e.everywhere(r)
	sleep(ctx, long)
	e.Cluster.Net.Heal()
	return nil
}

func term(ctx context.Context, e *Env) error {
	rolling, v := e.Rng.IntN(2) == 0, e.member()
	victims := []*cluster.Member{v}
	if rolling {
		victims = e.Cluster.Members
	}
	e.Say("SIGTERM and restart of %s", names(victims))
	for _, v := range victims {
		took, err := v.Terminate(20 * time.Second)
		if err != nil {
			e.Violation("%s did not stop on SIGTERM: %v", v.Name, err)
		}
		_ = took
		if err := v.Start(); err != nil {
			return err
		}
		wait, cancel := context.WithTimeout(ctx, 20*time.Second)
		err = e.Cluster.WaitHealthy(wait)
		cancel()
		if err != nil {
			return err
		}
	}
	return nil
}

func moveLeader(ctx context.Context, e *Env) error {
	step := e.Rng.IntN(8)
	leader := e.leader(ctx)
	to := e.Cluster.Members[(leader.Index+1+step%(len(e.Cluster.Members)-1))%len(e.Cluster.Members)]
	e.Say("move the leader from %s to %s", leader.Name, to.Name)
	call, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s, err := e.Cluster.Admin(to).Status(call, to.ClientURL)
	if err != nil {
		return err
	}
	if _, err := e.Cluster.Admin(leader).MoveLeader(call, s.Header.MemberId); err != nil {
		// The leader may have changed by itself.
		e.Say("move the leader from %s to %s: %v", leader.Name, to.Name, err)
	}
	sleep(ctx, e.Cluster.Election)
	return nil
}

func replace(ctx context.Context, e *Env) error {
	v := e.member()
	e.Say("remove %s, wipe its data, add it anew", v.Name)
	call, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	byItself, err := e.Cluster.Remove(call, v, 5*time.Second)
	if err != nil {
		return err
	}
	if !byItself {
		e.Say("remove %s: its process did not stop by itself within 5 s", v.Name)
	}
	return e.Cluster.Add(call, v)
}

func slowDisk(ctx context.Context, e *Env) error {
	d := []time.Duration{20 * time.Millisecond, 100 * time.Millisecond, e.Cluster.Election / 2, 2 * e.Cluster.Election}[e.Rng.IntN(4)]
	leader, whole, long, v := e.Rng.IntN(2) == 0, e.Rng.IntN(4) == 0, e.elections(3, 8), e.member()
	victims := []*cluster.Member{v}
	if leader {
		victims = []*cluster.Member{e.leader(ctx)}
	}
	if whole {
		victims = e.Cluster.Members
	}
	e.Say("each log sync takes %v longer on %s for %v", d, names(victims), long.Round(time.Millisecond))
	for _, v := range victims {
		if err := v.SlowDisk(d); err != nil {
			return err
		}
	}
	sleep(ctx, long)
	for _, v := range victims {
		if err := v.SlowDisk(0); err != nil {
			return err
		}
	}
	return nil
}

func compact(ctx context.Context, e *Env) error {
	via, margin := e.member(), e.Rng.Int64N(200)
	rev := e.SafeToCompact() - margin
	if rev < 2 {
		return nil
	}
	e.Say("compact at revision %d through %s", rev, via.Name)
	call, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	// Told first: a call that fails may have compacted.
	e.Compacted(rev)
	if _, err := e.Cluster.Admin(via).Compact(call, rev); err != nil {
		e.Say("compact at revision %d through %s: %v", rev, via.Name, err)
	}
	return nil
}
