// Package scenario holds what the harness can do with a cluster: random faults under load, and a few fixed courses.
package scenario

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"metastore/robustness/internal/check"
	"metastore/robustness/internal/cluster"
	"metastore/robustness/internal/history"
	"metastore/robustness/internal/workload"
)

type Config struct {
	Cluster          cluster.Config
	Duration         time.Duration
	Seed             uint64
	Faults           []string
	ClientsPerMember int
	Rate             int
	OpTimeout        time.Duration
	RecoverBound     time.Duration // within which a healed cluster must serve again
	LeaseLate        time.Duration
	Retryable        []string // codes by which requests may fail in RollingRestart and MoveLeader
	DataBytes        int64
	ValueBytes       int
	P99Factor        float64 // of SnapshotCatchup; 0: no bound
	Out              string
	KeepHistory      bool
}

// Outcome is the summary of a scenario.
type Outcome struct {
	Lines      []string // the report
	Violations []check.Violation
}

// run is the state of one scenario.
type run struct {
	Config
	c     *cluster.Cluster
	rec   *history.Recorder
	clock *history.Clock
	w     *workload.Workload

	mu      sync.Mutex
	outcome Outcome
	current string // the fault that is on
}

func start(ctx context.Context, cfg Config) (*run, error) {
	r := &run{Config: cfg, rec: history.NewRecorder(), clock: history.NewClock()}
	r.Config.Cluster.Log = r.log
	c, err := cluster.New(r.Config.Cluster)
	if err != nil {
		return nil, err
	}
	r.c = c
	if err := c.Start(); err != nil {
		c.Close()
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	if err := c.WaitHealthy(wait); err != nil {
		c.Close()
		return nil, fmt.Errorf("the cluster did not come up: %w; logs: %s", err, cfg.Cluster.Dir)
	}
	r.log("%d members serve; leader %s", len(c.Members), r.leaderName(ctx))
	return r, nil
}

func (r *run) leaderName(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	m, err := r.c.Leader(ctx)
	if err != nil {
		return "unknown"
	}
	return m.Name
}

func (r *run) log(format string, args ...any) {
	at := 0.0
	if r.clock != nil {
		at = float64(r.clock.Now()) / 1e9
	}
	fmt.Printf("%8.3fs %s\n", at, fmt.Sprintf(format, args...))
}

func (r *run) line(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.outcome.Lines = append(r.outcome.Lines, fmt.Sprintf(format, args...))
}

func (r *run) violation(name, format string, args ...any) {
	v := check.Violation{Check: name, Text: fmt.Sprintf(format, args...)}
	r.log("VIOLATION %s", v)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.outcome.Violations = append(r.outcome.Violations, v)
}

func (r *run) setCurrent(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = text
}

// progress prints a line every few seconds until the context is done.
func (r *run) progress(ctx context.Context) {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		ok, refused, unknown := r.rec.Counts()
		r.mu.Lock()
		current := r.current
		r.mu.Unlock()
		r.log("ops: %d ok, %d refused, %d unknown; fault: %s", ok, refused, unknown, current)
	}
}

// recovered waits until every member serves and a write succeeds through each, and says how long that took.
func (r *run) recovered(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, r.RecoverBound)
	defer cancel()
	if err := r.c.WaitHealthy(ctx); err != nil {
		return time.Since(began), err
	}
	for _, m := range r.c.Members {
		for {
			// A delete of a key that never exists goes the way of a write and changes nothing.
			call, cancel := context.WithTimeout(ctx, time.Second)
			_, err := r.c.Admin(m).Delete(call, "probe")
			cancel()
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return time.Since(began), fmt.Errorf("no write through %s: %w", m.Name, err)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	return time.Since(began), nil
}

// writeGap is the longest time without a successful write between two times, and the errors of that time.
func writeGap(ops []*history.Op, from, to int64) time.Duration {
	var returns []int64
	for _, o := range ops {
		if o.Outcome == history.OK && o.Writes() && o.Return >= from && o.Return <= to {
			returns = append(returns, o.Return)
		}
	}
	sort.Slice(returns, func(i, j int) bool { return returns[i] < returns[j] })
	longest, last := int64(0), from
	for _, t := range append(returns, to) {
		longest = max(longest, t-last)
		last = t
	}
	return time.Duration(longest)
}

// finals asks every member for all it has, and for its hash, at the same revision.
func (r *run) finals(ctx context.Context, rev int64) []history.Final {
	var finals []history.Final
	for _, m := range r.c.Members {
		f := history.Final{Member: m.Name}
		admin := r.c.Admin(m)
		// A follower may be a little behind.
		for {
			call, cancel := context.WithTimeout(ctx, 20*time.Second)
			reply, err := admin.Get(call, "\x00", clientv3.WithFromKey(), clientv3.WithSerializable())
			cancel()
			if err == nil && (reply.Header.Revision >= rev) {
				f.Rev, f.KVs = reply.Header.Revision, workload.KVs(reply.Kvs)
				break
			}
			if ctx.Err() != nil {
				if err == nil {
					err = fmt.Errorf("it is at revision %d of %d", reply.Header.Revision, rev)
				}
				r.violation("final", "%s does not get to the last revision: %v", m.Name, err)
				return finals
			}
			time.Sleep(20 * time.Millisecond)
		}
		call, cancel := context.WithTimeout(ctx, 20*time.Second)
		hash, err := admin.HashKV(call, m.ClientURL, rev)
		cancel()
		switch _, code := workload.Classify(err); {
		case err == nil:
			f.Hash, f.HashRev, f.CompactRev = hash.Hash, hash.Header.Revision, hash.CompactRevision
			if hash.HashRevision != 0 {
				f.HashRev = hash.HashRevision
			}
		case code == "Unimplemented":
			r.log("%s does not implement HashKV: hashes are NOT compared", m.Name)
			f.HashSkipped = true
		default:
			r.violation("final", "%s gives no hash: %v", m.Name, err)
			f.HashSkipped = true
		}
		finals = append(finals, f)
	}
	return finals
}

// save writes the recorded history where it can be looked at.
func (r *run) save(h *history.History) {
	path := filepath.Join(r.Out, "history.json")
	text, err := json.Marshal(h)
	if err == nil {
		err = os.WriteFile(path, text, 0o644)
	}
	if err != nil {
		r.log("the history could not be written: %v", err)
		return
	}
	r.line("history: %s", path)
}

func percentile(sorted []time.Duration, p float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(p*float64(len(sorted))))]
}
