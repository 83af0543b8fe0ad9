package scenario

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"metastore/robustness/internal/cluster"
	"metastore/robustness/internal/history"
	"metastore/robustness/internal/workload"
)

// leaderProbe asks every member all the time whom it follows, which bounds the time without a leader. A leader counts if a
// member names it in the highest term known, and its process lives. What the leader itself says is not enough: one that
// stops may lead still and answer clients no more.
type leaderProbe struct {
	r    *run
	stop context.CancelFunc
	wait sync.WaitGroup

	mu   sync.Mutex
	term uint64
	ids  map[uint64]*cluster.Member
	seen []sighting
}

type sighting struct {
	at   int64
	term uint64
}

// Asking takes time itself, most of all on a busy machine: a gap may be that much shorter than it seems.
const probeEvery = 10 * time.Millisecond

func (r *run) probeLeader(ctx context.Context) *leaderProbe {
	ctx, stop := context.WithCancel(ctx)
	p := &leaderProbe{r: r, stop: stop, ids: map[uint64]*cluster.Member{}}
	for _, m := range r.c.Members {
		p.wait.Go(func() {
			for ctx.Err() == nil {
				time.Sleep(probeEvery)
				if !m.Running() {
					continue
				}
				call, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
				asked := r.clock.Now()
				s, err := r.c.Admin(m).Status(call, m.ClientURL)
				cancel()
				if err != nil {
					continue
				}
				p.mu.Lock()
				p.ids[s.Header.MemberId] = m
				leader := p.ids[s.Leader]
				if leader != nil && leader.Running() && s.RaftTerm >= p.term {
					p.term = s.RaftTerm
					// It was so at some time between the question and the answer.
					p.seen = append(p.seen, sighting{asked, s.RaftTerm}, sighting{r.clock.Now(), s.RaftTerm})
				}
				p.mu.Unlock()
			}
		})
	}
	return p
}

// longestGap is the longest time in which no member knew a leader that lived, between two times. A leader that is seen twice
// in one term led all the time in between, however long nobody looked.
func (p *leaderProbe) longestGap(from, to int64) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	slices.SortFunc(p.seen, func(a, b sighting) int { return cmp.Compare(a.at, b.at) })
	longest := int64(0)
	var last *sighting
	for i := range p.seen {
		s := &p.seen[i]
		if s.at > to {
			break
		}
		if last != nil && s.at >= from && s.term != last.term {
			longest = max(longest, s.at-max(last.at, from))
		}
		last = s
	}
	if last == nil {
		return time.Duration(to - from)
	}
	return time.Duration(longest)
}

func (p *leaderProbe) close() {
	p.stop()
	p.wait.Wait()
}

// RollingRestart restarts the members in turn by SIGTERM under load. No request may fail but by Unavailable, and the cluster
// may not be without a leader for longer than an election timeout.
func RollingRestart(ctx context.Context, cfg Config) (*Outcome, error) {
	// Long enough that only a server that does not answer makes it end.
	cfg.OpTimeout = max(cfg.OpTimeout, 5*time.Second+2*cfg.Cluster.Election)
	r, watchers, stop, err := begin(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer stop()
	probe := r.probeLeader(ctx)
	defer probe.close()
	var windows []window
	alive := true
	end := time.Now().Add(cfg.Duration)
	for round := 1; alive && ctx.Err() == nil && (round == 1 || time.Now().Before(end)); round++ {
		for _, m := range r.c.Members {
			wasLeader := r.leaderName(ctx) == m.Name
			win := window{begin: r.clock.Now()}
			r.setCurrent("restart of " + m.Name)
			took, err := m.Terminate(20 * time.Second)
			if err != nil {
				r.violation("process", "%s did not stop on SIGTERM: %v", m.Name, err)
			}
			if err := m.Start(); err != nil {
				return nil, err
			}
			if win.recovery, err = r.recovered(ctx); err != nil {
				r.violation("liveness", "after the restart of %s: %v", m.Name, err)
				alive = false
				break
			}
			win.end = r.clock.Now()
			gap := probe.longestGap(win.begin, win.end)
			win.what = fmt.Sprintf("SIGTERM %s%s: stopped within %.3fs, no leader for %.3fs", m.Name,
				map[bool]string{true: " (leader)"}[wasLeader], took.Seconds(), gap.Seconds())
			r.log("%s", win.what)
			if gap > cfg.Cluster.Election {
				r.violation("rolling-restart", "no leader for %v when %s was restarted; the election timeout is %v", gap, m.Name, cfg.Cluster.Election)
			}
			windows = append(windows, win)
			time.Sleep(500 * time.Millisecond)
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return r.conclude(ctx, watchers, windows, alive)
}

// conclude checks everything; besides, no operation may have failed but by a code that clients retry.
func (r *run) conclude(ctx context.Context, watchers *workload.Watchers, windows []window, alive bool) (*Outcome, error) {
	h, err := r.finish(ctx, watchers, 0, alive)
	if err != nil {
		return nil, err
	}
	told := 0
	for _, o := range h.Ops {
		if o.Outcome == history.OK || slices.Contains(r.Retryable, o.Code) || o.Lease != 0 && o.Code == "NotFound" {
			continue // a lease may have ended meanwhile
		}
		if told++; told <= 5 {
			r.violation("retryable", "failed otherwise than by %v (%s): %s", r.Retryable, o.Code, o)
		}
	}
	if told > 5 {
		r.violation("retryable", "%d such failures in all", told)
	}
	r.report(h, windows)
	return &r.outcome, nil
}

// MoveLeader hands leadership from member to member under load.
func MoveLeader(ctx context.Context, cfg Config) (*Outcome, error) {
	cfg.OpTimeout = max(cfg.OpTimeout, 5*time.Second+2*cfg.Cluster.Election)
	r, watchers, stop, err := begin(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer stop()
	probe := r.probeLeader(ctx)
	defer probe.close()
	var windows []window
	end := time.Now().Add(cfg.Duration)
	for i := 0; time.Now().Before(end) && ctx.Err() == nil; i++ {
		find, cancel := context.WithTimeout(ctx, 10*time.Second)
		leader, err := r.c.Leader(find)
		cancel()
		if err != nil {
			r.violation("liveness", "%v", err)
			break
		}
		to := r.c.Members[(leader.Index+1+i%(len(r.c.Members)-1))%len(r.c.Members)]
		win := window{begin: r.clock.Now(), what: fmt.Sprintf("move the leader from %s to %s", leader.Name, to.Name)}
		r.setCurrent(win.what)
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		s, err := r.c.Admin(to).Status(call, to.ClientURL)
		if err == nil {
			_, err = r.c.Admin(leader).MoveLeader(call, s.Header.MemberId)
		}
		cancel()
		took := time.Duration(r.clock.Now() - win.begin)
		if err != nil {
			r.violation("move-leader", "%s: %v", win.what, err)
		} else if now := r.leaderName(ctx); now != to.Name {
			r.violation("move-leader", "%s: answered with success, but the leader is %s", win.what, now)
		}
		time.Sleep(500 * time.Millisecond)
		win.end = r.clock.Now()
		win.what += fmt.Sprintf(": answered in %.3fs, no leader for %.3fs", took.Seconds(), probe.longestGap(win.begin, win.end).Seconds())
		windows = append(windows, win)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return r.conclude(ctx, watchers, windows, true)
}
