package workload

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"metastore/robustness/internal/cluster"
	"metastore/robustness/internal/history"
)

// Watchers watch through every member: over all keys through the official library and by hand, which shows each response
// as it was sent, and over the hot keys from past revisions, for a short time each.
type Watchers struct {
	cluster *cluster.Cluster
	rec     *history.Recorder
	clock   *history.Clock
	stop    context.CancelFunc
	wait    sync.WaitGroup
	all     []*follower
	top     atomic.Int64 // highest revision any watch has seen
}

// follower watches all keys through one member, resuming where it was.
type follower struct {
	ws     *Watchers
	name   string
	member *cluster.Member
	cli    *clientv3.Client
	last   atomic.Int64 // revision up to which it has all events
	// current is the watch being recorded; only the follower's goroutine uses it while it runs.
	current *history.Watch
}

// StartWatchers begins to watch from the first revision.
func StartWatchers(ctx context.Context, c *cluster.Cluster, rec *history.Recorder, clock *history.Clock, seed uint64) (*Watchers, error) {
	ctx, stop := context.WithCancel(ctx)
	ws := &Watchers{cluster: c, rec: rec, clock: clock, stop: stop}
	for i, m := range c.Members {
		for _, library := range []bool{true, false} {
			cli, err := c.NewClient(m)
			if err != nil {
				stop()
				return nil, err
			}
			f := &follower{ws: ws, member: m, cli: cli, name: fmt.Sprintf("raw-%s", m.Name)}
			if library {
				f.name = fmt.Sprintf("library-%s", m.Name)
			}
			ws.all = append(ws.all, f)
			ws.wait.Go(func() {
				defer cli.Close()
				for ctx.Err() == nil {
					if library {
						f.library(ctx)
					} else {
						f.raw(ctx)
					}
					pause(ctx, 50*time.Millisecond)
				}
			})
		}
		cli, err := c.NewClient(m)
		if err != nil {
			stop()
			return nil, err
		}
		rng := rand.New(rand.NewPCG(seed, uint64(2000+i)))
		ws.wait.Go(func() {
			defer cli.Close()
			for ctx.Err() == nil {
				ws.past(ctx, cli, m, rng)
				pause(ctx, 300*time.Millisecond)
			}
		})
	}
	return ws, nil
}

// CaughtUp waits until every watch over all keys has the events up to a revision, and gives those that do not get there.
func (ws *Watchers) CaughtUp(rev int64, limit time.Duration) []string {
	end := time.Now().Add(limit)
	for {
		var late []string
		for _, f := range ws.all {
			if f.last.Load() < rev {
				late = append(late, fmt.Sprintf("%s is at revision %d of %d", f.name, f.last.Load(), rev))
			}
		}
		if len(late) == 0 || time.Now().After(end) {
			return late
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// SafeToCompact is a revision that all watches over all keys have behind them.
func (ws *Watchers) SafeToCompact() int64 {
	rev := ws.top.Load()
	for _, f := range ws.all {
		rev = min(rev, f.last.Load())
	}
	return rev
}

// Stop ends all watches; those that have everything up to a revision are marked so.
func (ws *Watchers) Stop(rev int64) {
	ws.stop()
	ws.wait.Wait()
	for _, f := range ws.all {
		if f.current != nil && f.last.Load() >= rev {
			f.current.Whole = true
		}
	}
}

func (f *follower) begin(library bool) *history.Watch {
	w := &history.Watch{Name: f.name, Member: f.member.Name, Library: library, Key: "\x00", End: "\x00",
		StartRev: f.last.Load() + 1}
	f.current = w
	f.ws.rec.AddWatch(w)
	return w
}

func (f *follower) received(w *history.Watch, r history.WatchResponse) {
	w.Responses = append(w.Responses, r)
	f.ws.saw(&r)
	if n := len(r.Events); n > 0 {
		f.last.Store(max(f.last.Load(), r.Events[n-1].KV.Mod))
	}
}

func (ws *Watchers) saw(r *history.WatchResponse) {
	if n := len(r.Events); n > 0 {
		for {
			old := ws.top.Load()
			if rev := r.Events[n-1].KV.Mod; rev <= old || ws.top.CompareAndSwap(old, rev) {
				return
			}
		}
	}
}

func (f *follower) library(ctx context.Context) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	w := f.begin(true)
	for r := range f.cli.Watch(ctx, "\x00", clientv3.WithFromKey(), clientv3.WithRev(w.StartRev), clientv3.WithPrevKV(),
		clientv3.WithProgressNotify()) {
		if r.Err() != nil || r.Canceled {
			w.Compacted = r.CompactRevision
			return
		}
		f.received(w, history.WatchResponse{Time: f.ws.clock.Now(), Rev: r.Header.Revision, Progress: r.IsProgressNotify(),
			Events: clientEvents(r.Events)})
	}
}

func clientEvents(from []*clientv3.Event) []history.Event {
	var to []history.Event
	for _, e := range from {
		to = append(to, history.Event{Deleted: e.Type == mvccpb.Event_DELETE, KV: *kv(e.Kv), Prev: kv(e.PrevKv)})
	}
	return to
}

func (f *follower) raw(ctx context.Context) {
	w := f.begin(false)
	f.ws.stream(ctx, f.cli, w, func(r history.WatchResponse) bool {
		f.received(w, r)
		return true
	})
}

// past watches the hot keys from some revision of the past for a few seconds.
func (ws *Watchers) past(ctx context.Context, cli *clientv3.Client, m *cluster.Member, rng *rand.Rand) {
	top := ws.top.Load()
	if top < 2 {
		return
	}
	// Near past and far past alike.
	start := max(1, top-rng.Int64N(1<<(1+rng.IntN(14))))
	w := &history.Watch{Name: "past-" + m.Name, Member: m.Name, Key: "h/", End: "h0", StartRev: start, Fragments: rng.IntN(2) == 0}
	ws.rec.AddWatch(w)
	ctx, cancel := context.WithTimeout(ctx, time.Duration(500+rng.IntN(3000))*time.Millisecond)
	defer cancel()
	ws.stream(ctx, cli, w, func(r history.WatchResponse) bool {
		w.Responses = append(w.Responses, r)
		ws.saw(&r)
		return true
	})
}

// Final watches all keys through one member from a revision until another, after the run.
func (ws *Watchers) Final(ctx context.Context, m *cluster.Member, from, until int64) error {
	w := &history.Watch{Name: "final-" + m.Name, Member: m.Name, Key: "\x00", End: "\x00", StartRev: from, Whole: true}
	cli, err := ws.cluster.NewClient(m)
	if err != nil {
		return err
	}
	defer cli.Close()
	last := int64(0)
	ws.stream(ctx, cli, w, func(r history.WatchResponse) bool {
		w.Responses = append(w.Responses, r)
		if n := len(r.Events); n > 0 {
			last = r.Events[n-1].KV.Mod
		}
		return last < until
	})
	if last < until {
		w.Whole = false
		ws.rec.AddWatch(w)
		return fmt.Errorf("a new watch through %s from revision %d reached %d of %d (compacted %d)", m.Name, from, last, until, w.Compacted)
	}
	ws.rec.AddWatch(w)
	return nil
}

// stream is one watcher of one stream of its own, read as the server sends it.
func (ws *Watchers) stream(ctx context.Context, cli *clientv3.Client, w *history.Watch, got func(history.WatchResponse) bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewWatchClient(cli.ActiveConnection()).Watch(ctx)
	if err != nil {
		return
	}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(w.Key), RangeEnd: []byte(w.End), StartRevision: w.StartRev, PrevKv: true, ProgressNotify: true,
		Fragment: w.Fragments}}}); err != nil {
		return
	}
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() {
		for {
			pause(ctx, 700*time.Millisecond)
			if ctx.Err() != nil || stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{
				ProgressRequest: &pb.WatchProgressRequest{}}}) != nil {
				return
			}
		}
	})
	for {
		r, err := stream.Recv()
		if err != nil {
			return
		}
		if r.Canceled {
			w.Compacted = r.CompactRevision
			return
		}
		if r.Created {
			continue
		}
		events := make([]history.Event, 0, len(r.Events))
		for _, e := range r.Events {
			events = append(events, history.Event{Deleted: e.Type == mvccpb.Event_DELETE, KV: *kv(e.Kv), Prev: kv(e.PrevKv)})
		}
		if !got(history.WatchResponse{Time: ws.clock.Now(), Rev: r.Header.Revision, Progress: len(events) == 0,
			Fragment: r.Fragment, Events: events}) {
			return
		}
	}
}
