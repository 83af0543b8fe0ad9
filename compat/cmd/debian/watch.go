package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	watchMax = 120 * time.Second
	// quiet is how long a watch is listened to after its last due event, for one too many.
	quiet = 150 * time.Millisecond
)

// seenPair is what a watch delivered of a pair, its value as a checksum.
type seenPair struct {
	key                     string
	rev, create, ver, lease int64
	sum                     [sha256.Size]byte
	size                    int
}

type seenEvent struct {
	seenPair
	del  bool
	prev *seenPair
}

func pairOf(kv *mvccpb.KeyValue) seenPair {
	return seenPair{key: string(kv.Key), rev: kv.ModRevision, create: kv.CreateRevision, ver: kv.Version, lease: kv.Lease,
		sum: sha256.Sum256(kv.Value), size: len(kv.Value)}
}

// watch is one watcher and everything it has delivered.
type watch struct {
	name, key, end string
	// start is the first revision it has to deliver.
	start               int64
	noPut, noDel, prevs bool
	// compacted is the newest compaction when the watch began: what is older has no previous pair.
	compacted int64
	began     time.Time

	mu       sync.Mutex
	changed  chan struct{}
	events   []seenEvent
	progress int64
	wrong    error
	ended    bool
	stop     context.CancelFunc
}

type watchSpec struct {
	name, key, end                string
	rev, compacted                int64
	noPut, noDel, prevs, fragment bool
}

// open starts a watcher and returns when the server has confirmed it.
func open(ctx context.Context, c *clientv3.Client, spec watchSpec) (*watch, error) {
	opts := []clientv3.OpOption{clientv3.WithCreatedNotify(), clientv3.WithRev(spec.rev)}
	if spec.end != "" {
		opts = append(opts, clientv3.WithRange(spec.end))
	}
	if spec.noPut {
		opts = append(opts, clientv3.WithFilterPut())
	}
	if spec.noDel {
		opts = append(opts, clientv3.WithFilterDelete())
	}
	if spec.prevs {
		opts = append(opts, clientv3.WithPrevKV())
	}
	if spec.fragment {
		opts = append(opts, clientv3.WithFragment())
	}
	ctx, stop := context.WithCancel(ctx)
	w := &watch{name: spec.name, key: spec.key, end: spec.end, start: spec.rev, noPut: spec.noPut, noDel: spec.noDel,
		prevs: spec.prevs, compacted: spec.compacted, began: time.Now(), changed: make(chan struct{}, 1), stop: stop}
	responses := c.Watch(ctx, spec.key, opts...)
	select {
	case r, ok := <-responses:
		if !ok || !r.Created || r.Err() != nil {
			stop()
			return nil, fmt.Errorf("the watch %s was not created: %v", w.name, r.Err())
		}
		if spec.rev == 0 {
			w.start = r.Header.Revision + 1
		}
	case <-time.After(callMax):
		stop()
		return nil, fmt.Errorf("the watch %s was not created within %v", w.name, callMax)
	}
	go w.gather(responses)
	return w, nil
}

func (w *watch) gather(responses clientv3.WatchChan) {
	for r := range responses {
		w.mu.Lock()
		if err := w.take(r); err != nil && w.wrong == nil {
			w.wrong = err
		}
		w.mu.Unlock()
		w.notify()
	}
	w.mu.Lock()
	w.ended = true
	w.mu.Unlock()
	w.notify()
}

func (w *watch) notify() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

func (w *watch) take(r clientv3.WatchResponse) error {
	if err := r.Err(); err != nil {
		return fmt.Errorf("canceled: %w (compact revision %d)", err, r.CompactRevision)
	}
	if r.IsProgressNotify() {
		w.progress = r.Header.Revision
		return nil
	}
	if len(r.Events) == 0 {
		return fmt.Errorf("a response without events at revision %d", r.Header.Revision)
	}
	if n := len(w.events); n > 0 && w.events[n-1].rev == r.Events[0].Kv.ModRevision {
		return fmt.Errorf("revision %d is split over two responses", w.events[n-1].rev)
	}
	for _, e := range r.Events {
		s := seenEvent{seenPair: pairOf(e.Kv), del: e.Type == mvccpb.DELETE}
		if e.PrevKv != nil {
			p := pairOf(e.PrevKv)
			s.prev = &p
		}
		w.events = append(w.events, s)
	}
	if last := r.Events[len(r.Events)-1].Kv.ModRevision; r.Header.Revision < last {
		return fmt.Errorf("a response with events up to revision %d has revision %d in its header", last, r.Header.Revision)
	}
	return nil
}

func (w *watch) state() (n int, progress int64, ended bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.events), w.progress, w.ended, w.wrong
}

// await waits until so many events have come, or one of that revision, and says after what time.
func (w *watch) await(due int, last int64) (time.Duration, error) {
	deadline := time.After(watchMax)
	for {
		n, _, ended, err := w.state()
		switch {
		case err != nil:
			return 0, fmt.Errorf("the watch %s: %w", w.name, err)
		case n >= due || w.reached(last):
			return time.Since(w.began), nil
		case ended:
			return 0, fmt.Errorf("the watch %s ended after %d events of %d", w.name, n, due)
		}
		select {
		case <-w.changed:
		case <-deadline:
			return 0, fmt.Errorf("the watch %s delivered %d events of %d within %v%s", w.name, n, due, watchMax, w.lastSeen())
		}
	}
}

func (w *watch) reached(rev int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.events) > 0 && w.events[len(w.events)-1].rev >= rev
}

func (w *watch) lastSeen() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.events) == 0 {
		return ""
	}
	return fmt.Sprintf("; the last one has revision %d", w.events[len(w.events)-1].rev)
}

// due are the events that the watch has to deliver, in order.
func (m *model) due(w *watch) []event {
	var due []event
	from, to := m.within(w.key, w.end)
	for _, e := range m.events {
		v := &m.hist[e.key][e.at]
		if int(e.key) < from || int(e.key) >= to || v.rev < w.start || v.del && w.noDel || !v.del && w.noPut {
			continue
		}
		due = append(due, e)
	}
	return due
}

// verify waits for everything that is due and compares it, event by event; it returns the number of events and the
// time the last one came after the watch began.
func (m *model) verify(w *watch) (int, time.Duration, error) {
	due := m.due(w)
	last := int64(math.MaxInt64)
	if len(due) > 0 {
		e := due[len(due)-1]
		last = m.hist[e.key][e.at].rev
	}
	took, err := w.await(len(due), last)
	if err != nil {
		// What did come may say more than that something did not.
		if wrong := m.compare(w, due); wrong != nil {
			err = fmt.Errorf("%w; %w", err, wrong)
		}
		return 0, 0, err
	}
	time.Sleep(quiet)
	if err := m.compare(w, due); err != nil {
		return 0, 0, err
	}
	n, _, _, err := w.state()
	if err == nil && n < len(due) {
		err = fmt.Errorf("the watch %s delivered %d events of %d%s", w.name, n, len(due), w.lastSeen())
	} else if err == nil && n > len(due) {
		err = fmt.Errorf("the watch %s delivered %d events too many; the first is %s", w.name, n-len(due), w.describe(len(due)))
	}
	return n, took, err
}

func (w *watch) describe(i int) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.events[i]
	return fmt.Sprintf("revision %d of %q", e.rev, e.key)
}

func (m *model) compare(w *watch, due []event) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range min(len(due), len(w.events)) {
		if err := m.compareEvent(w, w.events[i], due[i]); err != nil {
			return fmt.Errorf("the watch %s from revision %d, event %d: %w", w.name, w.start, i, err)
		}
	}
	return nil
}

func (m *model) compareEvent(w *watch, got seenEvent, want event) error {
	key, v := m.keys[want.key], &m.hist[want.key][want.at]
	if got.key != key || got.rev != v.rev {
		return fmt.Errorf("revision %d of %q came where revision %d of %q should be", got.rev, got.key, v.rev, key)
	}
	if got.del != v.del {
		return fmt.Errorf("revision %d of %q: whether it is a deletion came as %v", v.rev, key, got.del)
	}
	if v.del {
		if got.create != 0 || got.ver != 0 || got.lease != 0 || got.size != 0 {
			return fmt.Errorf("the deletion %d of %q carries more than key and revision", v.rev, key)
		}
	} else if err := got.seenPair.equal(key, v); err != nil {
		return err
	}
	var prev *version
	if w.prevs && want.at > 0 && v.rev > w.compacted {
		if p := &m.hist[want.key][want.at-1]; !p.del {
			prev = p
		}
	}
	switch {
	case prev == nil && got.prev != nil:
		return fmt.Errorf("revision %d of %q came with a previous pair of revision %d, and there should be none", v.rev, key, got.prev.rev)
	case prev != nil && got.prev == nil:
		return fmt.Errorf("revision %d of %q came without the previous pair, of revision %d", v.rev, key, prev.rev)
	case prev != nil:
		if err := got.prev.equal(key, prev); err != nil {
			return fmt.Errorf("the previous pair: %w", err)
		}
	}
	return nil
}

func (p seenPair) equal(key string, v *version) error {
	if p.key != key || p.rev != v.rev || p.create != v.create || p.ver != v.ver || p.lease != 0 {
		return fmt.Errorf("%q came with create revision %d, mod revision %d, version %d, lease %d instead of %q, %d, %d, %d, 0",
			p.key, p.create, p.rev, p.ver, p.lease, key, v.create, v.rev, v.ver)
	}
	if p.sum != v.sum {
		return fmt.Errorf("revision %d of %q came with a value of %d bytes that is not the one stored (%d bytes)", v.rev, key, p.size, len(v.val))
	}
	return nil
}
