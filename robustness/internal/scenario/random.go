package scenario

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"metastore/robustness/internal/check"
	"metastore/robustness/internal/faults"
	"metastore/robustness/internal/history"
	"metastore/robustness/internal/workload"
)

// window is one fault, from its beginning until the cluster served again.
type window struct {
	what       string
	begin, end int64
	recovery   time.Duration
}

// Random runs the workload under faults drawn from the seed, then heals everything and checks all that was recorded.
func Random(ctx context.Context, cfg Config) (*Outcome, error) {
	r, watchers, stop, err := begin(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer stop()
	windows, compacted, alive := r.faults(ctx, watchers)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	h, err := r.finish(ctx, watchers, compacted, alive)
	if err != nil {
		return nil, err
	}
	r.report(h, windows)
	return &r.outcome, nil
}

// begin starts a cluster with watches and the whole workload. The function it gives ends all of it.
func begin(ctx context.Context, cfg Config) (*run, *workload.Watchers, func(), error) {
	r, err := start(ctx, cfg)
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := func() {
		cancel()
		r.c.Close()
	}
	watchers, err := workload.StartWatchers(ctx, r.c, r.rec, r.clock, cfg.Seed)
	if err == nil {
		r.w, err = workload.Start(ctx, r.c, r.rec, r.clock, workload.Config{ClientsPerMember: cfg.ClientsPerMember,
			Rate: cfg.Rate, OpTimeout: cfg.OpTimeout, Leases: true, Seed: cfg.Seed, ValueBytes: cfg.ValueBytes})
	}
	if err != nil {
		stop()
		return nil, nil, nil, err
	}
	go r.progress(ctx)
	return r, watchers, stop, nil
}

// faults does harm until the time is over. It gives the windows, where the history was compacted, and whether the cluster
// still serves.
func (r *run) faults(ctx context.Context, watchers *workload.Watchers) ([]window, int64, bool) {
	rng := rand.New(rand.NewPCG(r.Seed, 0xfa017))
	deck := faults.NewDeck(r.Faults)
	var windows []window
	var mu sync.Mutex
	compacted := int64(0)
	env := &faults.Env{Cluster: r.c, Rng: rng,
		Say: func(format string, args ...any) {
			text := fmt.Sprintf(format, args...)
			r.setCurrent(text)
			r.log("fault %d: %s", len(windows)+1, text)
		},
		Violation:     func(format string, args ...any) { r.violation("process", format, args...) },
		SafeToCompact: watchers.SafeToCompact,
		Compacted: func(rev int64) {
			mu.Lock()
			defer mu.Unlock()
			compacted = max(compacted, rev)
		},
	}
	end := time.Now().Add(r.Duration)
	rest := func() {
		r.setCurrent("none")
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(300+rng.IntN(1200)) * time.Millisecond):
		}
	}
	alive := true
	for rest(); time.Now().Before(end) && ctx.Err() == nil && alive; rest() {
		if len(r.Faults) == 0 {
			continue
		}
		win := window{begin: r.clock.Now()}
		name := deck.Next(rng)
		win.what = name
		if err := faults.Run(ctx, name, env); err != nil {
			if ctx.Err() != nil {
				break
			}
			r.violation("liveness", "fault %s: %v", name, err)
		}
		r.mu.Lock()
		if r.current != "none" {
			win.what = r.current
		}
		r.mu.Unlock()
		r.setCurrent("none, recovering")
		if err := r.c.HealAll(); err != nil {
			r.violation("process", "healing: %v", err)
		}
		took, err := r.recovered(ctx)
		if err != nil && ctx.Err() == nil {
			r.violation("liveness", "after %q the cluster does not serve within %v: %v", win.what, r.RecoverBound, err)
			alive = false
		}
		win.recovery = took
		win.end = r.clock.Now()
		windows = append(windows, win)
	}
	if deaths := r.c.UnexpectedDeaths(); len(deaths) > 0 {
		alive = false
	}
	return windows, compacted, alive
}

// finish ends the workload, waits for the leases to end, and gathers the final state.
func (r *run) finish(ctx context.Context, watchers *workload.Watchers, compacted int64, alive bool) (*history.History, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	r.setCurrent("none, finishing")
	healthy := r.clock.Now()
	r.w.StopOps()
	ended := r.clock.Now()
	if alive {
		// Leases given up must go: wait for the longest TTL and the bound.
		ended = r.waitLeases(ctx, healthy)
	}
	r.w.Stop()
	// One write marks the end; nothing happens after it.
	last := int64(0)
	if alive {
		for last == 0 {
			o := &history.Op{Client: 0, Kind: history.Put, Key: "end", Value: fmt.Sprintf("end-%d", r.clock.Now()), Call: r.clock.Now(),
				Life: history.Life{Member: r.c.Members[0].Name, Number: r.c.Members[0].Life()}}
			call, cancel := context.WithTimeout(ctx, 5*time.Second)
			header, err := workload.Do(call, r.c.Admin(r.c.Members[0]), o)
			cancel()
			o.Return, o.LifeEnd = r.clock.Now(), r.c.Members[0].Life()
			if o.Outcome, o.Code = workload.Classify(err); err != nil {
				o.Err, o.Return = err.Error(), history.Never
			} else {
				o.Rev, o.Term, o.ClusterID = header.Revision, header.RaftTerm, header.ClusterId
				last = o.Rev
			}
			r.rec.Add(o)
			if ctx.Err() != nil {
				r.violation("liveness", "the last write does not succeed: %v", err)
				break
			}
		}
	}
	var finals []history.Final
	if last > 0 {
		for _, late := range watchers.CaughtUp(last, r.RecoverBound) {
			r.violation("watch", "a watch does not catch up within %v: %s", r.RecoverBound, late)
		}
		for _, m := range r.c.Members {
			call, cancel := context.WithTimeout(ctx, 60*time.Second)
			if err := watchers.Final(call, m, compacted+1, last); err != nil {
				r.violation("watch", "%v", err)
			}
			cancel()
		}
		call, cancel := context.WithTimeout(ctx, r.RecoverBound)
		finals = r.finals(call, last)
		cancel()
	}
	watchers.Stop(last)
	if ctx.Err() != nil && alive {
		r.violation("liveness", "the end could not be reached in time: %v", ctx.Err())
	}
	for _, d := range r.c.UnexpectedDeaths() {
		r.violation("process", "%s", d)
	}
	h := r.rec.History()
	h.Finals, h.Compacted, h.EndedAt, h.HealthyAt = finals, compacted, ended, healthy
	return h, nil
}

// waitLeases waits until the leases that were given up are gone, or the bound is over, and gives the time of the last look.
func (r *run) waitLeases(ctx context.Context, healthy int64) int64 {
	bound := r.LeaseLate + 8*time.Second
	for {
		at := r.clock.Now()
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		reply, err := r.c.Admin(r.c.Members[0]).Get(call, "l/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
		cancel()
		left := -1
		if err == nil {
			left = 0
			for _, k := range reply.Kvs {
				if !r.w.KeptKey(string(k.Key)) {
					left++
				}
			}
		}
		if left == 0 || time.Duration(at-healthy) > bound || ctx.Err() != nil {
			if left > 0 {
				r.log("%d keys of leases are still there", left)
			}
			return at
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// ports differ from member to member and would keep equal errors apart.
var ports = regexp.MustCompile(`:\d{4,5}\b`)

// report runs the checks and writes the summary.
func (r *run) report(h *history.History, windows []window) {
	began := time.Now()
	result := check.All(h, check.Config{VisualizeTo: filepath.Join(r.Out, "linearizability.html"),
		LinearizabilityTimeout: 2 * time.Minute, LeaseLate: r.LeaseLate})
	for _, v := range result.Violations {
		r.violation(v.Check, "%s", v.Text)
	}
	ok, refused, unknown := r.rec.Counts()
	kinds := map[history.Kind]int{}
	codes := map[string]int{}
	texts := map[string]int{}
	for _, o := range h.Ops {
		kinds[o.Kind]++
		if o.Outcome != history.OK {
			codes[string(o.Outcome)+" "+o.Code]++
			texts[o.Code+" "+ports.ReplaceAllString(o.Err, ":PORT")]++
		}
	}
	events, watches := 0, len(h.Watches)
	for _, w := range h.Watches {
		for i := range w.Responses {
			events += len(w.Responses[i].Events)
		}
	}
	alives, expired := 0, 0
	for _, l := range h.Leases {
		alives += len(l.KeepAlives)
		if l.RevokeCall == 0 {
			expired++
		}
	}
	r.line("operations: %d ok, %d refused, %d unknown (%d of them done, %d not); by kind %v; failures %v", ok, refused, unknown,
		result.Resolved, result.Dropped, kinds, codes)
	for _, t := range slices.Sorted(maps.Keys(texts)) {
		r.line("  %d times: %s", texts[t], t)
	}
	r.line("revisions: %d, compacted at %d; watches: %d, events received: %d; leases: %d (%d never revoked), keep-alives: %d",
		result.Revisions, h.Compacted, watches, events, len(h.Leases), expired, alives)
	if r.c.Net != nil {
		r.line("peer connections: %d, of unknown origin: %d; %s", r.c.Net.Opened.Load(), r.c.Net.Strangers.Load(), &r.c.Net.Done)
	}
	r.line("checked in %v: events, watch, outcome, revision, serializable, lease, final, linearizability", time.Since(began).Round(time.Millisecond))
	for _, n := range result.Notes {
		r.line("note: %s", n)
	}
	for i, w := range windows {
		r.line("fault %2d at %8s for %7.3fs: longest time without a write %7.3fs, serving again %6.3fs after healing: %s", i+1,
			history.Seconds(w.begin), float64(w.end-w.begin)/1e9, writeGap(h.Ops, w.begin, w.end).Seconds(), w.recovery.Seconds(), w.what)
	}
	if len(r.outcome.Violations) > 0 || r.KeepHistory {
		r.save(h)
	}
}
