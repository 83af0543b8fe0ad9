package scenario

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"metastore/robustness/internal/cluster"
)

// SnapshotCatchup fills the cluster, then wipes a follower and adds it anew under load, and measures what that costs the
// leader: the latency of puts, and the memory of both.
func SnapshotCatchup(ctx context.Context, cfg Config) (*Outcome, error) {
	// The proxies would be part of what is measured.
	cfg.Cluster.Direct = true
	if cfg.ValueBytes == 0 {
		cfg.ValueBytes = 16 << 10
	}
	r, err := start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer r.c.Close()
	find, cancel := context.WithTimeout(ctx, 15*time.Second)
	leader, err := r.c.Leader(find)
	cancel()
	if err != nil {
		return nil, err
	}
	if err := r.fill(ctx, leader); err != nil {
		return nil, err
	}
	if _, err := r.recovered(ctx); err != nil {
		return nil, err
	}
	// A while for what the filling left to do.
	time.Sleep(3 * time.Second)
	p, err := r.startPuts(ctx, leader)
	if err != nil {
		return nil, err
	}
	defer p.close()
	const usual = 15 * time.Second
	r.setCurrent("measuring before")
	time.Sleep(usual)
	before := p.take()

	follower := r.c.Members[(leader.Index+1)%len(r.c.Members)]
	r.log("remove %s, wipe its data, add it anew", follower.Name)
	if err := leader.ResetPeakRss(); err != nil {
		r.log("the peak of the leader's memory counts from its start: %v", err)
	}
	leaderStart, _ := leader.Rss()
	call, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := r.c.Remove(call, follower, 5*time.Second); err != nil {
		return nil, err
	}
	p.take()
	began := time.Now()
	if err := r.c.Add(call, follower); err != nil {
		return nil, err
	}
	if err := r.caughtUp(ctx, leader, follower); err != nil {
		r.violation("snapshot-catchup", "%v", err)
	}
	took := time.Since(began)
	during := p.take()
	r.log("%s caught up in %v", follower.Name, took.Round(time.Millisecond))
	_, leaderPeak := leader.Rss()
	_, followerPeak := follower.Rss()
	time.Sleep(5 * time.Second)
	after := p.take()
	p.close()

	r.line("data: %d MiB in values of %d bytes", cfg.DataBytes>>20, cfg.ValueBytes)
	r.line("puts of 256 bytes through the leader %s: before %s; during catch-up %s; after %s", leader.Name, before, during, after)
	r.line("catch-up of %s: %.3fs from its being added until it had all that the leader had", follower.Name, took.Seconds())
	r.line("resident memory: leader %d MiB before, peak during %d MiB; follower's peak %d MiB", leaderStart>>20, leaderPeak>>20, followerPeak>>20)
	if now := r.leaderName(ctx); now != leader.Name {
		r.line("the leader changed to %s meanwhile", now)
	}
	if cfg.P99Factor > 0 && during.p99 > time.Duration(cfg.P99Factor*float64(before.p99)) {
		r.violation("snapshot-catchup", "p99 of puts %v during catch-up is above %g times the usual %v", during.p99, cfg.P99Factor, before.p99)
	}
	if during.failed > 0 {
		r.violation("snapshot-catchup", "%d puts failed during catch-up", during.failed)
	}
	for _, d := range r.c.UnexpectedDeaths() {
		r.violation("process", "%s", d)
	}
	r.compareHashes(ctx, leader)
	return &r.outcome, nil
}

func (r *run) fill(ctx context.Context, leader *cluster.Member) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Minute)
	defer cancel()
	count := r.DataBytes / int64(r.ValueBytes)
	var next atomic.Int64
	var wait sync.WaitGroup
	errs := make(chan error, 16)
	r.log("writing %d values of %d bytes", count, r.ValueBytes)
	began := time.Now()
	for i := range 16 {
		cli, err := r.c.NewClient(leader)
		if err != nil {
			return err
		}
		wait.Go(func() {
			defer cli.Close()
			rng := rand.NewChaCha8([32]byte{byte(i), byte(r.Seed)})
			value := make([]byte, r.ValueBytes) // random: compression shall not make it less
			for n := next.Add(1); n <= count; n = next.Add(1) {
				_, _ = rng.Read(value)
				for attempt := 0; ; attempt++ {
					call, cancel := context.WithTimeout(ctx, 20*time.Second)
					_, err := cli.Put(call, fmt.Sprintf("d/%08d", n), string(value))
					cancel()
					if err == nil {
						break
					}
					if attempt == 10 || ctx.Err() != nil {
						errs <- err
						return
					}
					time.Sleep(300 * time.Millisecond)
				}
				if n%(count/10+1) == 0 {
					r.log("%d of %d values written", n, count)
				}
			}
		})
	}
	wait.Wait()
	select {
	case err := <-errs:
		return fmt.Errorf("filling: %w", err)
	default:
	}
	r.log("written in %v", time.Since(began).Round(time.Millisecond))
	return nil
}

// caughtUp waits until the follower has applied what the leader had applied a moment before.
func (r *run) caughtUp(ctx context.Context, leader, follower *cluster.Member) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for {
		call, cancel := context.WithTimeout(ctx, 2*time.Second)
		want, err := r.c.Admin(leader).Get(call, "health", clientv3.WithSerializable())
		if err == nil {
			var got *clientv3.GetResponse
			if got, err = r.c.Admin(follower).Get(call, "health"); err == nil && got.Header.Revision >= want.Header.Revision {
				cancel()
				return nil
			}
		}
		cancel()
		if ctx.Err() != nil {
			return fmt.Errorf("%s does not catch up: %w", follower.Name, ctx.Err())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// compareHashes stops nothing, so it compares at one revision that all have.
func (r *run) compareHashes(ctx context.Context, leader *cluster.Member) {
	call, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	reply, err := r.c.Admin(leader).Get(call, "health")
	if err != nil {
		r.violation("final", "%v", err)
		return
	}
	rev := reply.Header.Revision
	var first uint32
	for i, m := range r.c.Members {
		if _, err := r.c.Admin(m).Get(call, "health"); err != nil {
			r.violation("final", "%s: %v", m.Name, err)
			return
		}
		hash, err := r.c.Admin(m).HashKV(call, m.ClientURL, rev)
		if err != nil {
			r.line("%s gives no hash: %v", m.Name, err)
			return
		}
		if i == 0 {
			first = hash.Hash
		} else if hash.Hash != first {
			r.violation("final", "%s hashes to %08x at revision %d, %s to %08x", m.Name, hash.Hash, rev, r.c.Members[0].Name, first)
		}
	}
	r.line("all members hash to %08x at revision %d", first, rev)
}

// puts is a steady load of small writes whose latencies are measured.
type puts struct {
	stop context.CancelFunc
	wait sync.WaitGroup
	mu   sync.Mutex
	took []time.Duration
	bad  int
}

type latencies struct {
	count, failed      int
	p50, p99, greatest time.Duration
}

func (l latencies) String() string {
	return fmt.Sprintf("%d puts (%d failed) p50 %.2fms p99 %.2fms max %.2fms", l.count, l.failed, ms(l.p50), ms(l.p99), ms(l.greatest))
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// startPuts sends puts at the configured rate, whether or not the earlier ones are answered: the latency of one counts from
// when it was due.
func (r *run) startPuts(ctx context.Context, leader *cluster.Member) (*puts, error) {
	ctx, stop := context.WithCancel(ctx)
	p := &puts{stop: stop}
	cli, err := r.c.NewClient(leader)
	if err != nil {
		stop()
		return nil, err
	}
	value := string(make([]byte, 256))
	p.wait.Go(func() {
		defer cli.Close()
		var calls sync.WaitGroup
		defer calls.Wait()
		slots := make(chan struct{}, 1000)
		for n, due := 0, time.Now(); ctx.Err() == nil; n++ {
			due = due.Add(time.Second / time.Duration(r.Rate))
			if left := time.Until(due); left > 0 {
				time.Sleep(left)
			}
			slots <- struct{}{}
			calls.Go(func() {
				defer func() { <-slots }()
				call, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
				defer cancel()
				_, err := cli.Put(call, fmt.Sprintf("p/%d", n%1000), value)
				p.mu.Lock()
				defer p.mu.Unlock()
				if err != nil {
					p.bad++
				} else {
					p.took = append(p.took, time.Since(due))
				}
			})
		}
	})
	return p, nil
}

// take gives the latencies since the last take.
func (p *puts) take() latencies {
	p.mu.Lock()
	defer p.mu.Unlock()
	took := p.took
	sort.Slice(took, func(i, j int) bool { return took[i] < took[j] })
	l := latencies{count: len(took), failed: p.bad, p50: percentile(took, 0.5), p99: percentile(took, 0.99), greatest: percentile(took, 1)}
	p.took, p.bad = nil, 0
	return l
}

func (p *puts) close() {
	p.stop()
	p.wait.Wait()
}
