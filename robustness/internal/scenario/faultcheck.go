package scenario

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"metastore/robustness/internal/cluster"
	"metastore/robustness/internal/netfault"
)

// triesMax is how often a kind of harm may fail to show.
const triesMax = 3

// FaultCheck does each kind of harm once, on purpose where it shows, and looks from outside whether it happened: a harness
// whose faults do nothing would find nothing.
func FaultCheck(ctx context.Context, cfg Config) (*Outcome, error) {
	cfg.Cluster.Direct = false
	r, err := start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer r.c.Close()
	checks := []struct {
		name  string
		check func(context.Context) (string, error)
	}{
		{"kill", r.killHappens}, {"pause", r.pauseHappens}, {"partition", r.partitionHappens}, {"delay", r.delayHappens},
		{"slow-link", r.slowLinkHappens}, {"drop", r.dropHappens}, {"stall", r.stallHappens}, {"reorder", r.reorderHappens},
		{"term", r.termHappens}, {"move-leader", r.moveLeaderHappens}, {"replace", r.replaceHappens},
		{"slow-disk", r.slowDiskHappens}, {"compact", r.compactHappens},
	}
checks:
	for _, c := range checks {
		if !slices.Contains(r.Faults, c.name) {
			continue
		}
		// On a busy machine leadership may move by itself in the middle, so that nothing is seen: then once more.
		for try := 1; ; try++ {
			seen, err := c.check(ctx)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if healed := r.c.HealAll(); healed != nil {
				return nil, healed
			}
			if _, err := r.recovered(ctx); err != nil {
				r.violation("liveness", "after %s: %v", c.name, err)
				break checks
			}
			if err == nil {
				r.log("%s: %s", c.name, seen)
				r.line("%-12s %s", c.name, seen)
				break
			}
			r.log("%s did not happen (try %d of %d): %v", c.name, try, triesMax, err)
			if try == triesMax {
				r.violation("fault-check", "%s did not happen: %v", c.name, err)
				break
			}
		}
	}
	for _, d := range r.c.UnexpectedDeaths() {
		r.violation("process", "%s", d)
	}
	return &r.outcome, nil
}

func (r *run) leader(ctx context.Context) (*cluster.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return r.c.Leader(ctx)
}

// follower gives the leader and another member.
func (r *run) follower(ctx context.Context) (leader, follower *cluster.Member, err error) {
	leader, err = r.leader(ctx)
	if err != nil {
		return nil, nil, err
	}
	return leader, r.c.Members[(leader.Index+1)%len(r.c.Members)], nil
}

// putTime is how long one put through a member takes.
func (r *run) putTime(ctx context.Context, m *cluster.Member, bytes int, limit time.Duration) (time.Duration, error) {
	call, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	_, err := r.c.Admin(m).Put(call, "fault-check", strings.Repeat("v", bytes))
	return time.Since(began), err
}

func (r *run) everywhere(rule netfault.Rule) {
	for _, a := range r.c.Members {
		for _, b := range r.c.Members {
			if a != b {
				r.c.Net.Set(a.Index, b.Index, rule)
			}
		}
	}
}

func (r *run) around(m *cluster.Member, rule netfault.Rule, out, in bool) {
	for _, o := range r.c.Members {
		if o == m {
			continue
		}
		if out {
			r.c.Net.Set(m.Index, o.Index, rule)
		}
		if in {
			r.c.Net.Set(o.Index, m.Index, rule)
		}
	}
}

func (r *run) killHappens(ctx context.Context) (string, error) {
	leader, err := r.leader(ctx)
	if err != nil {
		return "", err
	}
	pid := leader.Pid()
	if err := leader.Kill(); err != nil {
		return "", err
	}
	if conn, err := net.DialTimeout("tcp", strings.TrimPrefix(leader.ClientURL, "http://"), time.Second); err == nil {
		conn.Close()
		return "", errors.New("it still takes connections")
	}
	if err := leader.Start(); err != nil {
		return "", err
	}
	return fmt.Sprintf("the leader's process %d is gone, its port refuses", pid), nil
}

func (r *run) pauseHappens(ctx context.Context) (string, error) {
	leader, follower, err := r.follower(ctx)
	if err != nil {
		return "", err
	}
	if err := leader.Pause(); err != nil {
		return "", err
	}
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", leader.Pid()))
		if err != nil {
			return "", err
		}
		if _, rest, _ := strings.Cut(string(stat), ") "); strings.HasPrefix(rest, "T") {
			break
		}
		if time.Since(began) > 10*time.Second {
			return "", fmt.Errorf("the process is not stopped: %s", stat)
		}
	}
	if _, err := r.putTime(ctx, leader, 1, 300*time.Millisecond); err == nil {
		return "", errors.New("it answers")
	}
	took, err := r.successor(ctx, leader, follower)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("the leader's process is stopped and silent, another led after %v", took), leader.Resume()
}

// successor waits until a member other than the old leader leads, as another member sees it.
func (r *run) successor(ctx context.Context, old, other *cluster.Member) (time.Duration, error) {
	began := time.Now()
	limit := 10 * r.Config.Cluster.Election
	for time.Since(began) < limit {
		call, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		s, err := r.c.Admin(other).Status(call, other.ClientURL)
		cancel()
		if err == nil && s.Leader != 0 {
			for _, m := range r.c.Members {
				if m == old || !m.Running() {
					continue
				}
				call, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
				own, err := r.c.Admin(m).Status(call, m.ClientURL)
				cancel()
				if err == nil && own.Header.MemberId == s.Leader {
					return time.Since(began).Round(time.Millisecond), nil
				}
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	return 0, fmt.Errorf("nobody else leads within %v", limit)
}

func (r *run) partitionHappens(ctx context.Context) (string, error) {
	var seen []string
	done := &r.c.Net.Done
	for _, how := range []struct {
		mode    netfault.Mode
		in      bool
		counted func() int64
	}{
		{netfault.Hold, true, done.HeldBytes.Load},
		{netfault.Discard, true, done.DiscardedBytes.Load},
		{netfault.Reset, true, done.Resets.Load},
		{netfault.Discard, false, done.DiscardedBytes.Load},
	} {
		leader, follower, err := r.follower(ctx)
		if err != nil {
			return "", err
		}
		before := how.counted()
		r.around(leader, netfault.Rule{Mode: how.mode}, true, how.in)
		took, err := r.successor(ctx, leader, follower)
		if err != nil {
			return "", fmt.Errorf("%v: %w", how.mode, err)
		}
		call, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		_, err = r.c.Admin(leader).Get(call, "fault-check")
		cancel()
		if how.in && err == nil {
			return "", fmt.Errorf("%v: the leader that is cut off answers a linearizable read", how.mode)
		}
		if how.counted() == before {
			return "", fmt.Errorf("%v: no bytes or connections met it", how.mode)
		}
		way := map[bool]string{true: "both ways", false: "one way"}[how.in]
		seen = append(seen, fmt.Sprintf("%v %s: another led after %v", how.mode, way, took))
		r.c.Net.Heal()
		if _, err := r.recovered(ctx); err != nil {
			return "", err
		}
	}
	return strings.Join(seen, "; "), nil
}

func (r *run) delayHappens(ctx context.Context) (string, error) {
	leader, err := r.leader(ctx)
	if err != nil {
		return "", err
	}
	const d = 150 * time.Millisecond
	usual, err := r.putTime(ctx, leader, 1, 5*time.Second)
	if err != nil {
		return "", err
	}
	r.everywhere(netfault.Rule{Delay: d})
	took, err := r.putTime(ctx, leader, 1, 5*time.Second)
	if err != nil {
		return "", err
	}
	if took < 2*d {
		return "", fmt.Errorf("a put took %v, less than there and back", took)
	}
	return fmt.Sprintf("%v each way: a put took %v, before %v", d, took.Round(time.Millisecond), usual.Round(time.Millisecond)), nil
}

func (r *run) slowLinkHappens(ctx context.Context) (string, error) {
	leader, err := r.leader(ctx)
	if err != nil {
		return "", err
	}
	const perSecond, size = 20_000, 10_000
	r.around(leader, netfault.Rule{BytesPerSecond: perSecond}, true, false)
	took, err := r.putTime(ctx, leader, size, 10*time.Second)
	if err != nil {
		return "", err
	}
	if took < 350*time.Millisecond {
		return "", fmt.Errorf("a put of %d bytes took %v over links of %d bytes a second", size, took, perSecond)
	}
	return fmt.Sprintf("a put of %d bytes over links of %d bytes a second took %v", size, perSecond, took.Round(time.Millisecond)), nil
}

func (r *run) dropHappens(_ context.Context) (string, error) {
	opened, resets := r.c.Net.Opened.Load(), r.c.Net.Done.Resets.Load()
	r.everywhere(netfault.Rule{ResetEvery: 200 * time.Millisecond})
	time.Sleep(2 * time.Second)
	r.c.Net.Heal()
	opened, resets = r.c.Net.Opened.Load()-opened, r.c.Net.Done.Resets.Load()-resets
	if resets < 3 || opened < 3 {
		return "", fmt.Errorf("%d connections reset, %d opened anew", resets, opened)
	}
	return fmt.Sprintf("%d connections reset, %d opened anew within 2 s", resets, opened), nil
}

func (r *run) stallHappens(ctx context.Context) (string, error) {
	leader, err := r.leader(ctx)
	if err != nil {
		return "", err
	}
	r.everywhere(netfault.Rule{Mode: netfault.Discard})
	if _, err := r.putTime(ctx, leader, 1, time.Second); err == nil {
		return "", errors.New("a put succeeds without a quorum")
	}
	return "no put succeeds while nothing is delivered", nil
}

func (r *run) reorderHappens(_ context.Context) (string, error) {
	done := &r.c.Net.Done
	overtaken, late := done.Overtaken.Load(), done.LateBytes.Load()
	r.everywhere(netfault.Rule{OvertakeEvery: 200 * time.Millisecond, Delay: 20 * time.Millisecond, Jitter: 100 * time.Millisecond})
	time.Sleep(4 * time.Second)
	r.c.Net.Heal()
	overtaken, late = done.Overtaken.Load()-overtaken, done.LateBytes.Load()-late
	if overtaken < 3 || late == 0 {
		return "", fmt.Errorf("%d connections overtaken, %d bytes late", overtaken, late)
	}
	return fmt.Sprintf("%d connections overtaken, %d bytes arrived after their sender had gone on over another one", overtaken, late), nil
}

func (r *run) termHappens(ctx context.Context) (string, error) {
	leader, err := r.leader(ctx)
	if err != nil {
		return "", err
	}
	life := leader.Life()
	took, err := leader.Terminate(20 * time.Second)
	if err != nil {
		return "", err
	}
	if err := leader.Start(); err != nil {
		return "", err
	}
	if leader.Life() != life+1 {
		return "", errors.New("it is the same process")
	}
	return fmt.Sprintf("the leader's process ended %v after SIGTERM and another took its place", took.Round(time.Millisecond)), nil
}

func (r *run) moveLeaderHappens(ctx context.Context) (string, error) {
	leader, to, err := r.follower(ctx)
	if err != nil {
		return "", err
	}
	call, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s, err := r.c.Admin(to).Status(call, to.ClientURL)
	if err != nil {
		return "", err
	}
	if _, err := r.c.Admin(leader).MoveLeader(call, s.Header.MemberId); err != nil {
		return "", err
	}
	now, err := r.leader(ctx)
	if err != nil {
		return "", err
	}
	if now != to {
		return "", fmt.Errorf("%s leads, not %s", now.Name, to.Name)
	}
	return fmt.Sprintf("from %s to %s", leader.Name, to.Name), nil
}

func (r *run) replaceHappens(ctx context.Context) (string, error) {
	_, follower, err := r.follower(ctx)
	if err != nil {
		return "", err
	}
	call, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	before, err := r.c.Admin(follower).Status(call, follower.ClientURL)
	if err != nil {
		return "", err
	}
	if _, err := r.c.Remove(call, follower, 5*time.Second); err != nil {
		return "", err
	}
	if err := r.c.Add(call, follower); err != nil {
		return "", err
	}
	if _, err := r.recovered(ctx); err != nil {
		return "", err
	}
	after, err := r.c.Admin(follower).Status(call, follower.ClientURL)
	if err != nil {
		return "", err
	}
	if after.Header.MemberId == before.Header.MemberId {
		return "", errors.New("it has its old id")
	}
	return fmt.Sprintf("%s was member %x and is %x", follower.Name, before.Header.MemberId, after.Header.MemberId), nil
}

func (r *run) slowDiskHappens(ctx context.Context) (string, error) {
	leader, err := r.leader(ctx)
	if err != nil {
		return "", err
	}
	d := r.Config.Cluster.Election * 2 / 5
	for _, m := range r.c.Members {
		if err := m.SlowDisk(d); err != nil {
			return "", err
		}
	}
	time.Sleep(200 * time.Millisecond) // for them to look at the file
	took, err := r.putTime(ctx, leader, 1, 10*time.Second)
	if err != nil {
		return "", err
	}
	if took < d {
		return "", fmt.Errorf("a put took %v where each sync takes %v longer: the server does not know the fault hook", took, d)
	}
	return fmt.Sprintf("each sync %v longer: a put took %v", d, took.Round(time.Millisecond)), nil
}

func (r *run) compactHappens(ctx context.Context) (string, error) {
	leader, err := r.leader(ctx)
	if err != nil {
		return "", err
	}
	call, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	put, err := r.c.Admin(leader).Put(call, "fault-check", "compacted")
	if err != nil {
		return "", err
	}
	rev := put.Header.Revision
	if _, err := r.c.Admin(leader).Compact(call, rev); err != nil {
		return "", err
	}
	_, err = r.c.Admin(leader).Get(call, "fault-check", clientv3.WithRev(rev-1))
	if err == nil || !strings.Contains(err.Error(), "compacted") {
		return "", fmt.Errorf("revision %d can be read: %v", rev-1, err)
	}
	return fmt.Sprintf("revision %d cannot be read any more", rev-1), nil
}
