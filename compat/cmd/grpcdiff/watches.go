package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sort"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func init() {
	register(group{name: "watch-create", about: "ids, ranges and start revisions", run: watchCreate})
	register(group{name: "watch-history", about: "replay from any revision", run: watchHistory})
	register(group{name: "watch-compacted", about: "start revisions around the compacted one", run: watchCompacted})
	register(group{name: "watch-filters", about: "filters and previous values", run: watchFilters})
	register(group{name: "watch-progress", about: "progress requests", run: watchProgress})
	register(group{name: "watch-notify", about: "periodic progress", flags: []string{"--watch-progress-notify-interval=1s"}, run: watchNotify})
	register(group{name: "watch-cancel", about: "cancelling, ids afterwards", run: watchCancel})
	register(group{name: "watch-long", about: "more history than one response holds", run: watchLong})
	register(group{name: "watch-fragment", about: "fragments", flags: []string{"--max-request-bytes=20000"}, run: watchFragment})
	register(group{name: "watch-live", about: "transactions and deletions as they happen", run: watchLive})
	register(group{name: "watch-stream", about: "the stream itself: empty requests, ends", run: watchStream})
}

const (
	collectMax  = 6 * time.Second
	settleMax   = 3 * time.Second
	pingEvery   = 150 * time.Millisecond
	aloneAtOnce = 16
)

// watchStreamOf is one Watch stream, with its responses gathered in the background.
type watchStreamOf struct {
	t      *session
	name   string
	stream pb.Watch_WatchClient
	cancel context.CancelFunc
	in     chan any
	// unasked is true while progress replies are those to settle's requests, which are not recorded.
	unasked bool
	// sink is where the stream's records go: the session's, or its own while several streams run at once.
	sink *[]record
}

func (w *watchStreamOf) record(request, answer string) {
	*w.sink = append(*w.sink, record{request, answer, w.t.meant})
}

func (t *session) openWatch(name string, md map[string]string) *watchStreamOf {
	return t.openWatchInto(&t.records, name, md)
}

func (t *session) openWatchInto(sink *[]record, name string, md map[string]string) *watchStreamOf {
	ctx, cancel := context.WithTimeout(context.Background(), groupMax)
	if md != nil {
		ctx = metadata.NewOutgoingContext(ctx, metadata.New(md))
	}
	stream, err := t.watch.Watch(ctx)
	w := &watchStreamOf{t: t, name: name, stream: stream, cancel: cancel, in: make(chan any, 10000), sink: sink}
	if err != nil {
		w.record("open watch stream "+name, t.errorText(err))
		w.stream = nil
		return w
	}
	go func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				w.in <- err
				return
			}
			w.in <- resp
		}
	}()
	return w
}

func (w *watchStreamOf) send(r *pb.WatchRequest) {
	if w.stream == nil {
		return
	}
	if err := w.stream.Send(r); err != nil {
		w.record(fmt.Sprintf("watch %s: send %s", w.name, w.t.clean.text(r)), w.t.errorText(err))
		return
	}
	w.record(fmt.Sprintf("watch %s: send %s", w.name, w.t.clean.text(r)), "sent")
}

func (w *watchStreamOf) create(r *pb.WatchCreateRequest) {
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: r}})
}

func (w *watchStreamOf) drop(id int64) {
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
}

func (w *watchStreamOf) progress() {
	w.unasked = false
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
}

// collect waits for that many responses, and then until the stream is quiet, and records them: in order for each
// watcher, the watchers one after another, for etcd serves the watchers of a stream in no order.
func (w *watchStreamOf) collect(want int) []*pb.WatchResponse {
	if w.stream == nil {
		return nil
	}
	var got []*pb.WatchResponse
	var end error
	deadline := time.After(collectMax)
	quiet := time.NewTimer(quietFor)
	defer quiet.Stop()
loop:
	for {
		select {
		case m := <-w.in:
			switch m := m.(type) {
			case error:
				end = m
				break loop
			case *pb.WatchResponse:
				if !w.unasked || !isProgress(m) {
					got = append(got, m)
				}
			}
			quiet.Reset(quietFor)
		case <-quiet.C:
			if len(got) >= want {
				break loop
			}
			quiet.Reset(quietFor)
		case <-deadline:
			break loop
		}
	}
	w.note(got, end)
	return got
}

// note records the responses.
func (w *watchStreamOf) note(got []*pb.WatchResponse, end error) {
	sort.SliceStable(got, func(i, j int) bool { return got[i].WatchId < got[j].WatchId })
	for i, r := range got {
		w.record(fmt.Sprintf("watch %s: response %d", w.name, i), w.describe(r))
	}
	if end != nil {
		w.record(fmt.Sprintf("watch %s: end", w.name), w.t.errorText(end))
		w.stream = nil
	}
	w.record(fmt.Sprintf("watch %s: responses", w.name), fmt.Sprint(len(got)))
}

func isProgress(r *pb.WatchResponse) bool {
	return r.WatchId == -1 && !r.Created && !r.Canceled && len(r.Events) == 0
}

// settle records all that a new watcher gets. It asks for progress, which the server tells once the watcher has its
// history; a watcher that was cancelled, or that starts in the future, is told of none, and has until settleMax.
func (w *watchStreamOf) settle() {
	if w.stream == nil {
		return
	}
	var got []*pb.WatchResponse
	var end error
	w.unasked = true
	synced, canceled := false, false
	last := time.Now()
	deadline := last.Add(settleMax)
	ping := time.NewTicker(pingEvery)
	defer ping.Stop()
	for end == nil && time.Now().Before(deadline) {
		if quiet := time.Since(last); synced && quiet > pingEvery || canceled && quiet > quietFor {
			break
		}
		select {
		case m := <-w.in:
			last = time.Now()
			switch m := m.(type) {
			case error:
				end = m
			case *pb.WatchResponse:
				canceled = canceled || m.Canceled
				if isProgress(m) {
					synced = true
				} else {
					got = append(got, m)
				}
			}
		case <-ping.C:
			if !synced && len(got) > 0 {
				// An error shows itself at the receiving end.
				_ = w.stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
			}
		}
	}
	w.note(got, end)
}

// describe is a response as text, its events by number, ends and hash when they are many.
func (w *watchStreamOf) describe(r *pb.WatchResponse) string {
	if n := len(r.Events); n > 20 {
		c := proto.Clone(r).(*pb.WatchResponse)
		first, last, hash := c.Events[0], c.Events[n-1], hashOf(w.t.clean.text(c))
		c.Events = nil
		return fmt.Sprintf("%d events, %s revision %d to %s revision %d, hash %s: %s",
			n, first.Kv.Key, first.Kv.ModRevision, last.Kv.Key, last.Kv.ModRevision, hash, w.t.clean.text(c))
	}
	return w.t.clean.text(r)
}

func (w *watchStreamOf) end() { w.cancel() }

// alone opens a stream for each of the requests, all at once, with that one watcher on it, and records what each
// gets, one after another.
func (t *session) alone(requests ...*pb.WatchCreateRequest) {
	sinks := make([][]record, len(requests))
	turns := make(chan struct{}, aloneAtOnce)
	var wait sync.WaitGroup
	for i, r := range requests {
		wait.Add(1)
		turns <- struct{}{}
		go func() {
			defer func() { <-turns; wait.Done() }()
			w := t.openWatchInto(&sinks[i], t.clean.text(r), nil)
			w.create(r)
			w.settle()
			w.end()
		}()
	}
	wait.Wait()
	t.records = append(t.records, slices.Concat(sinks...)...)
}

func watchCreate(t *session) {
	t.set("a=1", "b=1")
	w := t.openWatch("ids", nil)
	for _, id := range []int64{0, 0, 5, 5, 2, 0, 0, -1, -7, math.MaxInt64, 1, 0, 0} {
		w.create(&pb.WatchCreateRequest{Key: b("k"), WatchId: id})
		w.collect(1)
	}
	t.set("k=1")
	w.collect(8)
	w.end()
	var list []*pb.WatchCreateRequest
	for _, r := range someRanges {
		list = append(list, &pb.WatchCreateRequest{Key: b(r[0]), RangeEnd: b(r[1]), StartRevision: 1})
	}
	for _, start := range []int64{math.MinInt64, -1, 0, 1, 2, 3, 4, 5, 6, 100, math.MaxInt64} {
		list = append(list, &pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: start})
	}
	// An empty range, with a bad start, and with an id that is taken.
	list = append(list, &pb.WatchCreateRequest{Key: b("b"), RangeEnd: b("a"), StartRevision: -1})
	t.alone(list...)
	w = t.openWatch("errors", nil)
	w.create(&pb.WatchCreateRequest{Key: b("k"), WatchId: 3})
	w.create(&pb.WatchCreateRequest{Key: b("b"), RangeEnd: b("a"), WatchId: 3})
	w.create(&pb.WatchCreateRequest{Key: b("k"), WatchId: 3, StartRevision: -1})
	w.create(&pb.WatchCreateRequest{Key: b("k"), WatchId: 3})
	w.collect(4)
	// The ids of refused watchers are free.
	w.create(&pb.WatchCreateRequest{Key: b("b"), RangeEnd: b("a"), WatchId: 8})
	w.create(&pb.WatchCreateRequest{Key: b("k"), WatchId: 8})
	w.collect(2)
	w.end()
	// Two streams: ids are each stream's own.
	one, two := t.openWatch("one", nil), t.openWatch("two", nil)
	one.create(&pb.WatchCreateRequest{Key: b("s"), WatchId: 4})
	two.create(&pb.WatchCreateRequest{Key: b("s"), WatchId: 4})
	one.collect(1)
	two.collect(1)
	t.set("s=1")
	one.collect(1)
	two.collect(1)
	one.end()
	two.end()
	for _, leader := range []string{"true", "false", "x"} {
		w = t.openWatch("hasleader "+leader, map[string]string{"hasleader": leader})
		w.create(&pb.WatchCreateRequest{Key: b("k")})
		w.collect(1)
		w.end()
	}
}

func watchHistory(t *session) {
	t.set("a=1", "b=1", "a=2")
	t.del(&pb.DeleteRangeRequest{Key: b("a")})
	t.set("a=3", "c=1")
	t.txn(success(opPut("b", "2"), opPut("d", "1"), opDel("a", ""), opPut("aa", "1")))
	t.del(&pb.DeleteRangeRequest{Key: zero, RangeEnd: zero})
	var list []*pb.WatchCreateRequest
	for start := int64(1); start <= 10; start++ {
		list = append(list,
			&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: start},
			&pb.WatchCreateRequest{Key: b("a"), StartRevision: start, PrevKv: true},
			&pb.WatchCreateRequest{Key: b("b"), RangeEnd: b("d"), StartRevision: start, PrevKv: true})
	}
	t.alone(list...)
	// History, then live, on one stream.
	w := t.openWatch("on", nil)
	w.create(&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: 7})
	w.collect(2)
	t.set("x=1", "y=1")
	w.collect(2)
	// A start in the future passes over what comes before it.
	w.create(&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: 13, WatchId: 50})
	w.collect(1)
	t.set("x=12", "x=13", "x=14")
	w.collect(5)
	w.end()
}

func watchCompacted(t *session) {
	t.set("a=1", "b=1", "a=2")
	t.del(&pb.DeleteRangeRequest{Key: b("a")})
	t.set("b=2", "a=3")
	t.compact(5)
	var list []*pb.WatchCreateRequest
	for start := int64(0); start <= 8; start++ {
		list = append(list,
			&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: start, PrevKv: true},
			&pb.WatchCreateRequest{Key: b("a"), StartRevision: start},
			&pb.WatchCreateRequest{Key: b("none"), StartRevision: start})
	}
	t.alone(list...)
	// A watcher that the server cancels keeps its id; the stream lives on.
	w := t.openWatch("on", nil)
	w.create(&pb.WatchCreateRequest{Key: b("a"), StartRevision: 2, WatchId: 6})
	w.collect(2)
	t.differs("the id of a watcher that compaction cancelled", func() {
		w.create(&pb.WatchCreateRequest{Key: b("a"), WatchId: 6})
		w.collect(1)
	})
	w.drop(6)
	w.collect(0)
	w.create(&pb.WatchCreateRequest{Key: b("a"), WatchId: 6})
	w.create(&pb.WatchCreateRequest{Key: b("a"), WatchId: 7})
	w.collect(2)
	t.set("a=4")
	w.collect(1)
	// Compaction does not touch a watcher that has what was compacted.
	t.set("c=1", "c=2")
	t.compact(10)
	t.set("a=5")
	w.collect(1)
	w.end()
	t.alone(
		&pb.WatchCreateRequest{Key: b("a"), StartRevision: 9},
		&pb.WatchCreateRequest{Key: b("a"), StartRevision: 10, PrevKv: true},
		&pb.WatchCreateRequest{Key: b("c"), StartRevision: 10, PrevKv: true},
	)
}

func watchFilters(t *session) {
	t.set("a=1", "a=2")
	t.del(&pb.DeleteRangeRequest{Key: b("a")})
	t.set("b=1")
	t.txn(success(opPut("c", "1"), opDel("b", "")))
	for _, filters := range [][]pb.WatchCreateRequest_FilterType{{}, {0}, {1}, {0, 1}, {0, 0}, {7}, {-1, 1}} {
		for _, prev := range []bool{false, true} {
			w := t.openWatch("filter", nil)
			w.create(&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: 1, Filters: filters, PrevKv: prev})
			w.settle()
			t.set("l=1", "l=2")
			t.del(&pb.DeleteRangeRequest{Key: b("l")})
			t.txn(success(opPut("m", "1"), opPut("l", "3")))
			t.txn(success(opPut("n", "1"), opDel("l", "n")))
			w.collect(0)
			w.progress()
			w.collect(1)
			w.end()
		}
	}
}

func watchProgress(t *session) {
	t.set("a=1")
	w := t.openWatch("none", nil)
	w.progress()
	w.collect(0)
	w.create(&pb.WatchCreateRequest{Key: b("a")})
	w.collect(1)
	w.progress()
	w.collect(1)
	w.progress()
	w.progress()
	w.collect(2)
	w.create(&pb.WatchCreateRequest{Key: b("b")})
	w.collect(1)
	w.progress()
	w.collect(1)
	t.set("x=1", "a=2")
	w.collect(1)
	w.progress()
	w.collect(1)
	// A watcher that was refused does not count; one that starts in the future does, and is not in step.
	w.create(&pb.WatchCreateRequest{Key: b("d"), RangeEnd: b("c")})
	w.collect(1)
	w.progress()
	w.collect(1)
	w.create(&pb.WatchCreateRequest{Key: b("c"), StartRevision: 7})
	w.collect(1)
	w.progress()
	w.collect(0)
	for i := range 4 {
		t.set(fmt.Sprintf("y=%d", i))
		w.progress()
		w.collect(0)
	}
	w.drop(0)
	w.drop(1)
	w.drop(2)
	w.collect(3)
	w.progress()
	w.collect(0)
	w.end()
}

func watchNotify(t *session) {
	t.set("a=1")
	w := t.openWatch("notify", nil)
	w.create(&pb.WatchCreateRequest{Key: b("a"), ProgressNotify: true})
	w.collect(1)
	time.Sleep(2500 * time.Millisecond)
	// How many came depends on when the timer began; that some came, and what they say, does not.
	got := 0
	for {
		select {
		case m := <-w.in:
			if r, ok := m.(*pb.WatchResponse); ok {
				got++
				if got == 1 {
					t.record("first periodic progress", t.clean.text(r))
				}
				continue
			}
		default:
		}
		break
	}
	t.record("periodic progress within 2.5 s", fmt.Sprint(got == 2 || got == 3 || got == 1))
	w.end()
}

func watchCancel(t *session) {
	w := t.openWatch("cancel", nil)
	w.drop(0)
	w.drop(77)
	w.drop(-1)
	w.collect(0)
	w.create(&pb.WatchCreateRequest{Key: b("a")})
	w.create(&pb.WatchCreateRequest{Key: b("a"), WatchId: 9})
	w.collect(2)
	t.set("a=1")
	w.collect(2)
	w.drop(0)
	w.collect(1)
	t.set("a=2")
	w.collect(1)
	w.drop(0)
	w.drop(9)
	w.collect(1)
	t.set("a=3")
	w.collect(0)
	// Ids after cancellation: automatic ones go on, chosen ones are free again.
	w.create(&pb.WatchCreateRequest{Key: b("a")})
	w.create(&pb.WatchCreateRequest{Key: b("a"), WatchId: 9})
	w.collect(2)
	t.set("a=4")
	w.collect(2)
	// Cancelled before its history came.
	w.create(&pb.WatchCreateRequest{Key: b("none"), StartRevision: 1, WatchId: 20})
	w.drop(20)
	w.collect(2)
	w.end()
}

func watchLong(t *session) {
	// 2,500 revisions: more than the 1,000 that one replayed response covers.
	for i := range 2500 {
		ctx, cancel := context.WithTimeout(context.Background(), callMax)
		var err error
		if i%7 == 6 {
			_, err = t.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: fmt.Appendf(nil, "k%d", (i-1)%50)})
		} else {
			_, err = t.kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "k%d", i%50), Value: b("v")})
		}
		cancel()
		if err != nil {
			t.record(fmt.Sprintf("write %d", i), t.errorText(err))
			return
		}
	}
	t.all()
	var list []*pb.WatchCreateRequest
	for _, start := range []int64{1, 2, 500, 1499, 1500, 1501, 1502, 1503, 2000, 2501} {
		list = append(list, &pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: start})
	}
	list = append(list,
		&pb.WatchCreateRequest{Key: b("k1"), StartRevision: 1},
		&pb.WatchCreateRequest{Key: b("k1"), RangeEnd: b("k2"), StartRevision: 1},
		&pb.WatchCreateRequest{Key: b("k1"), StartRevision: 1, Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}},
		&pb.WatchCreateRequest{Key: b("none"), StartRevision: 1})
	t.alone(list...)
}

func watchFragment(t *session) {
	// The gRPC limit is 512 KiB above the request limit, and fragments are cut by it: some 544,288 bytes.
	value := make([]byte, 15000)
	for i := range 120 {
		ctx, cancel := context.WithTimeout(context.Background(), callMax)
		_, err := t.kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "k%03d", i), Value: value})
		cancel()
		if err != nil {
			t.record(fmt.Sprintf("put %d", i), t.errorText(err))
			return
		}
	}
	t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, CountOnly: true})
	var list []*pb.WatchCreateRequest
	for _, fragment := range []bool{false, true} {
		for _, prev := range []bool{false, true} {
			list = append(list, &pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: 1, Fragment: fragment, PrevKv: prev})
		}
	}
	t.alone(append(list, &pb.WatchCreateRequest{Key: b("k000"), StartRevision: 1, Fragment: true})...)
	w := t.openWatch("live", nil)
	w.create(&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, Fragment: true, PrevKv: true})
	w.collect(1)
	t.del(&pb.DeleteRangeRequest{Key: zero, RangeEnd: zero})
	w.collect(3)
	t.set("k=1")
	w.collect(1)
	w.end()
}

func watchLive(t *session) {
	w := t.openWatch("live", nil)
	w.create(&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, PrevKv: true})
	w.create(&pb.WatchCreateRequest{Key: b("b"), WatchId: 5})
	w.create(&pb.WatchCreateRequest{Key: b("a"), RangeEnd: b("c"), WatchId: 6})
	w.collect(3)
	t.set("a=1", "b=1")
	w.collect(5)
	t.txn(success(opPut("z", "1"), opPut("b", "2"), opDel("a", ""), opPut("c", "1")))
	w.collect(3)
	t.txn(success(opTxn(success(opPut("b", "3"), opPut("a", "2"))), opPut("0", "1")))
	w.collect(3)
	t.txn(success(opGet("a", "")))
	t.txn(success(opDel("none", "")))
	t.del(&pb.DeleteRangeRequest{Key: b("none")})
	w.collect(0)
	t.del(&pb.DeleteRangeRequest{Key: zero, RangeEnd: zero})
	w.collect(3)
	t.put(&pb.PutRequest{Key: b("b"), Value: b("4")})
	t.put(&pb.PutRequest{Key: b("b"), IgnoreValue: true})
	w.collect(6)
	w.end()
}

func watchStream(t *session) {
	w := t.openWatch("empty request", nil)
	w.send(&pb.WatchRequest{})
	w.collect(0)
	w.create(nil)
	w.collect(1)
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{}})
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{}})
	w.collect(1)
	// Closing our side.
	w.stream.CloseSend()
	w.collect(0)
	w.end()
	w = t.openWatch("closed at once", nil)
	w.stream.CloseSend()
	w.collect(0)
	w.end()
	w = t.openWatch("closed with a watcher", nil)
	w.create(&pb.WatchCreateRequest{Key: b("k")})
	w.collect(1)
	w.stream.CloseSend()
	t.set("k=1")
	w.collect(0)
	w.end()
}
