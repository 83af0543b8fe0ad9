package scenario

import (
	"context"
	"os"
	"strings"
	"time"

	"metastore/robustness/internal/cluster"
	"metastore/robustness/internal/netfault"
)

// SnapshotInterrupted has a follower catch up by snapshot while its connections with the leader break again and again, and
// then while its own process is killed in the middle: it must have everything in the end, and the leader serve on
// meanwhile. It reads MetaStore's log to see that something was interrupted at all.
func SnapshotInterrupted(ctx context.Context, cfg Config) (*Outcome, error) {
	cfg.Cluster.Direct = false
	if cfg.ValueBytes == 0 {
		cfg.ValueBytes = 16 << 10
	}
	r, err := start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer r.c.Close()
	leader, follower, err := r.follower(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.fill(ctx, leader); err != nil {
		return nil, err
	}
	if _, err := r.recovered(ctx); err != nil {
		return nil, err
	}
	p, err := r.startPuts(ctx, leader)
	if err != nil {
		return nil, err
	}
	defer p.close()
	time.Sleep(5 * time.Second)
	before := p.take()

	replace := func() error {
		call, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if _, err := r.c.Remove(call, follower, 5*time.Second); err != nil {
			return err
		}
		return r.c.Add(call, follower)
	}
	const receiving, interrupted, applied = "receiving database snapshot", "a snapshot was interrupted", "applied snapshot"

	breaks := said(leader, interrupted)
	began := said(follower, receiving)
	if err := replace(); err != nil {
		return nil, err
	}
	if !r.waitSaid(ctx, follower, receiving, began+1) {
		r.violation("snapshot-interrupted", "%s is sent no snapshot", follower.Name)
	}
	r.log("the connections between %s and %s break all the time", leader.Name, follower.Name)
	r.c.Net.Both(leader.Index, follower.Index, netfault.Rule{ResetEvery: 400 * time.Millisecond})
	select {
	case <-ctx.Done():
	case <-time.After(3 * time.Second):
	}
	r.c.Net.Heal()
	if err := r.caughtUp(ctx, leader, follower); err != nil {
		r.violation("snapshot-interrupted", "%v", err)
	}
	breaks = said(leader, interrupted) - breaks
	if breaks == 0 {
		r.violation("snapshot-interrupted", "nothing was interrupted: give it more data or a slower link")
	}
	r.line("connections broken: interrupted %d times, begun %d times, caught up", breaks, said(follower, receiving)-began)

	began = said(follower, receiving)
	ready := said(follower, applied)
	if err := replace(); err != nil {
		return nil, err
	}
	if !r.waitSaid(ctx, follower, receiving, began+1) {
		r.violation("snapshot-interrupted", "%s is sent no snapshot", follower.Name)
	}
	time.Sleep(500 * time.Millisecond)
	if said(follower, applied) > ready {
		r.violation("snapshot-interrupted", "the snapshot was there before the kill: give it more data or a slower link")
	}
	r.log("kill -9 %s in the middle", follower.Name)
	if err := follower.Kill(); err != nil {
		return nil, err
	}
	if err := follower.Start(); err != nil {
		return nil, err
	}
	if err := r.caughtUp(ctx, leader, follower); err != nil {
		r.violation("snapshot-interrupted", "%v", err)
	}
	r.line("receiver killed in the middle: begun %d times, caught up", said(follower, receiving)-began)
	during := p.take()
	p.close()
	r.line("puts of 256 bytes through the leader %s: before %s; meanwhile %s", leader.Name, before, during)
	if during.failed > 0 {
		r.violation("snapshot-interrupted", "%d puts through the leader failed", during.failed)
	}
	for _, d := range r.c.UnexpectedDeaths() {
		r.violation("process", "%s", d)
	}
	r.compareHashes(ctx, leader)
	return &r.outcome, nil
}

// said counts how often a member's log says something, over all its lives.
func said(m *cluster.Member, text string) int {
	log, err := os.ReadFile(m.LogPath)
	if err != nil {
		return 0
	}
	return strings.Count(string(log), text)
}

func (r *run) waitSaid(ctx context.Context, m *cluster.Member, text string, times int) bool {
	for range 3000 {
		if said(m, text) >= times {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(20 * time.Millisecond):
		}
	}
	return false
}
