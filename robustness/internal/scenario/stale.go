package scenario

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"metastore/robustness/internal/cluster"
	"metastore/robustness/internal/netfault"
)

// StaleRead takes the leader away, writes through its successor, lets the old leader come back, and reads from it at once: a
// linearizable read must show the new value or fail. Reads are sent before it comes back too, so that they wait in its
// sockets when it does.
func StaleRead(ctx context.Context, cfg Config) (*Outcome, error) {
	r, err := start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer r.c.Close()
	rng := rand.New(rand.NewPCG(cfg.Seed, 0x57a1e))
	var fresh, failed atomic.Int64
	rounds := map[string]int{}
	end := time.Now().Add(cfg.Duration)
	for round := 1; time.Now().Before(end) && ctx.Err() == nil; round++ {
		find, cancel := context.WithTimeout(ctx, 15*time.Second)
		old, err := r.c.Leader(find)
		cancel()
		if err != nil {
			r.violation("liveness", "round %d: %v", round, err)
			break
		}
		how := []string{"pause", "pause", "hold", "discard", "deaf", "mute"}[rng.IntN(6)]
		if r.c.Net == nil {
			how = "pause"
		}
		away := time.Duration((1.2 + 2*rng.Float64()) * float64(cfg.Cluster.Election))
		rounds[how]++
		r.log("round %d: %s %s", round, how, old.Name)
		before := fmt.Sprintf("before-%d", round)
		after := fmt.Sprintf("after-%d", round)
		if err := r.putUntil(ctx, r.c.Members, before); err != nil {
			r.violation("liveness", "round %d: %v", round, err)
			break
		}
		r.takeAway(old, how)
		var rest []*cluster.Member
		for _, m := range r.c.Members {
			if m != old {
				rest = append(rest, m)
			}
		}
		began := time.Now()
		if err := r.putUntil(ctx, rest, after); err != nil {
			r.violation("liveness", "round %d: %v", round, err)
			break
		}
		// From here on nobody may read anything older.
		if left := away - time.Since(began); left > 0 && rng.IntN(2) == 0 {
			time.Sleep(left)
		}
		var readers sync.WaitGroup
		stop := make(chan struct{})
		for range 8 {
			readers.Go(func() {
				for {
					call, cancel := context.WithTimeout(ctx, time.Second)
					reply, err := r.c.Admin(old).Get(call, "stale")
					cancel()
					switch {
					case err != nil:
						failed.Add(1)
					case len(reply.Kvs) != 1 || string(reply.Kvs[0].Value) != after:
						r.violation("stale-read", "round %d (%s %s): a linearizable read shows %v at revision %d after %q was acknowledged",
							round, how, old.Name, reply.Kvs, reply.Header.Revision, after)
					default:
						fresh.Add(1)
					}
					select {
					case <-stop:
						return
					default:
					}
				}
			})
		}
		time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
		if err := r.c.HealAll(); err != nil {
			return nil, err
		}
		time.Sleep(time.Duration(300+rng.IntN(500)) * time.Millisecond)
		close(stop)
		readers.Wait()
		if _, err := r.recovered(ctx); err != nil {
			r.violation("liveness", "round %d: %v", round, err)
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	for _, d := range r.c.UnexpectedDeaths() {
		r.violation("process", "%s", d)
	}
	if fresh.Load() == 0 {
		r.violation("stale-read", "no read succeeded, so nothing was shown")
	}
	r.line("rounds: %v; reads on the old leader: %d fresh, %d failed, none may be stale", rounds, fresh.Load(), failed.Load())
	return &r.outcome, nil
}

func (r *run) takeAway(m *cluster.Member, how string) {
	if how == "pause" {
		_ = m.Pause()
		return
	}
	for _, o := range r.c.Members {
		if o == m {
			continue
		}
		rule := netfault.Rule{Mode: netfault.Discard}
		if how == "hold" {
			rule.Mode = netfault.Hold
		}
		if how != "deaf" {
			r.c.Net.Set(m.Index, o.Index, rule)
		}
		if how != "mute" {
			r.c.Net.Set(o.Index, m.Index, rule)
		}
	}
}

// putUntil writes through one of the members until one write succeeds.
func (r *run) putUntil(ctx context.Context, members []*cluster.Member, value string) error {
	ctx, cancel := context.WithTimeout(ctx, r.RecoverBound)
	defer cancel()
	for i := 0; ; i++ {
		call, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		_, err := r.c.Admin(members[i%len(members)]).Put(call, "stale", value)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("no write succeeds within %v: %w", r.RecoverBound, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
