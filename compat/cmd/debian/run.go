package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	page          = 1000
	pointReads    = 10_000
	packageLists  = 5_000
	readers       = 4
	hotWrites     = 8_000
	hotWriters    = 8
	connections   = 8
	beforeCompact = 500 * time.Millisecond
	afterCompact  = 1500 * time.Millisecond
	crashAfter    = 1500 * time.Millisecond
	// So many reads made during writes are kept, to be checked once all writes are known.
	readsKept = 20_000
)

// run is everything against one server.
type run struct {
	ctx      context.Context
	s        *server
	clients  []*clientv3.Client
	m        *model
	stanzas  []stanza
	packages []string
	workers  int
	random   *rand.Rand
	report   *report
	out      io.Writer
	acked    atomic.Int64
	// marks are revisions worth reading at: each is of another time.
	loadMiddle, loadEnd, updateMiddle, updateEnd int64
	restarts                                     int
}

func (r *run) say(format string, args ...any) {
	fmt.Fprintf(r.out, "%-16s %s\n", r.s.name, fmt.Sprintf(format, args...))
}

// note prints a line of progress and keeps it for the table.
func (r *run) note(name, format string, args ...any) {
	value := fmt.Sprintf(format, args...)
	r.report.add(r.s.name, name, value)
	r.say("%s: %s", name, value)
}

func (r *run) client(i int) *clientv3.Client { return r.clients[i%len(r.clients)] }

// everything is the key range of all keys.
const everything = "\x00"

func prefixEnd(p string) string { return clientv3.GetPrefixRangeEnd(p) }

func (r *run) all() error {
	steps := []struct {
		name string
		peak bool
		f    func() error
	}{
		{"start", false, r.start},
		{"writes", false, r.writes},
		{"lists", true, r.lists},
		{"old revisions", true, r.oldRevisions},
		{"history", true, r.history},
		{"compactions", true, r.compactions},
		{"kill -9 when idle", false, func() error { return r.restart("kill -9, idle", syscall.SIGKILL, false) }},
		{"kill -9 under load", false, func() error { return r.restart("kill -9, under load", syscall.SIGKILL, true) }},
		{"SIGTERM under load", false, func() error { return r.restart("SIGTERM, under load", syscall.SIGTERM, true) }},
		{"SIGTERM when idle", false, func() error { return r.restart("SIGTERM, idle", syscall.SIGTERM, false) }},
		{"end", false, r.finish},
	}
	for _, s := range steps {
		if err := s.f(); err != nil {
			if r.s.cmd != nil {
				if gone := r.s.alive(); gone != nil {
					err = fmt.Errorf("%w; %w", err, gone)
				}
			}
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if s.peak {
			r.note("peak RSS, "+s.name, "%.1f MiB", float64(r.s.measure())/1024)
			r.s.forgetPeak()
		}
	}
	return nil
}

func (r *run) connect() (err error) {
	r.clients, err = r.s.dialMany(connections)
	return err
}

func (r *run) start() error {
	took, err := r.s.start(r.ctx)
	if err != nil {
		return err
	}
	r.note("first start until ready", "%.3f s", took.Seconds())
	if err := r.connect(); err != nil {
		return err
	}
	resp, err := r.clients[0].Get(r.ctx, everything, clientv3.WithFromKey())
	if err != nil {
		return err
	}
	if resp.Header.Revision != 1 || resp.Count != 0 {
		return fmt.Errorf("an empty store is at revision %d with %d keys", resp.Header.Revision, resp.Count)
	}
	r.m = newModel(universe(r.stanzas), 1)
	return nil
}

// perform sends sequences of writes, each in its order, from all workers; half is called when half of them are done.
func (r *run) perform(tasks [][]*write, half func() error) (timings, error) {
	took := make([][]time.Duration, r.workers)
	began := time.Now()
	var halfErr error
	err := parallel(len(tasks), r.workers, func(worker, i int) error {
		if i == len(tasks)/2 && half != nil {
			if halfErr = half(); halfErr != nil {
				return halfErr
			}
		}
		for _, w := range tasks[i] {
			t := time.Now()
			if err := do(r.ctx, r.client(worker), w, &r.acked); err != nil {
				return fmt.Errorf("%s: %w", w, err)
			}
			took[worker] = append(took[worker], time.Since(t))
		}
		return nil
	})
	t := timings{wall: time.Since(began)}
	t.merge(took)
	return t, err
}

func (r *run) writes() error {
	live, err := r.s.dial()
	if err != nil {
		return err
	}
	defer live.Close()
	catchUp, err := r.s.dial()
	if err != nil {
		return err
	}
	defer catchUp.Close()
	var watches []*watch
	watching := func(c *clientv3.Client, specs ...watchSpec) error {
		for _, spec := range specs {
			w, err := open(r.ctx, c, spec)
			if err != nil {
				return err
			}
			watches = append(watches, w)
		}
		return nil
	}
	middle := r.stanzas[len(r.stanzas)/2].pkg
	if err := watching(live,
		watchSpec{name: "of everything, live", key: everything, end: everything},
		watchSpec{name: "of the prefix with previous pairs, live", key: prefix, end: prefixEnd(prefix), prevs: true, fragment: true},
		watchSpec{name: "of deletions, live", key: everything, end: everything, noPut: true, prevs: true},
		watchSpec{name: "of puts of the hot keys, live", key: "/hot/", end: prefixEnd("/hot/"), noDel: true, prevs: true},
		watchSpec{name: "of one package, live", key: prefix + middle + "/", end: prefixEnd(prefix + middle + "/")},
		watchSpec{name: "of one key from a future revision", key: r.stanzas[0].key, rev: 5, prevs: true},
	); err != nil {
		return err
	}

	// First every stanza.
	var load [][]*write
	for _, k := range neighbours {
		load = append(load, []*write{{parts: []part{{key: k, val: []byte("neighbour of " + prefix)}}}})
	}
	bytes := 0
	for _, s := range r.stanzas {
		load = append(load, []*write{{parts: []part{{key: s.key, val: s.text}}}})
		bytes += len(s.key) + len(s.text)
	}
	r.note("stanzas", "%d, %.1f MiB with keys", len(r.stanzas), float64(bytes)/(1<<20))
	r.loadMiddle = r.m.rev + int64(len(load)/2)
	middleWatches := func() error {
		return watching(catchUp, watchSpec{name: "from the first revision, begun in the middle of the load", key: everything, end: everything, rev: 1, prevs: true})
	}
	cpu := r.s.cpu()
	t, err := r.perform(load, middleWatches)
	if err != nil {
		return err
	}
	if err := r.m.absorb(slices.Concat(load...)); err != nil {
		return err
	}
	r.loadEnd = r.m.rev
	r.note("load", "%s", &t)
	r.note("load, server's CPU", "%.1f us a put", float64((r.s.cpu()-cpu).Microseconds())/float64(len(load)))
	r.note("disk after load", "%.1f MiB", float64(r.s.onDisk())/(1<<20))
	r.note("peak RSS, load", "%.1f MiB", float64(r.s.measure())/1024)
	r.s.forgetPeak()

	// Then the updates, while others read and watch.
	updates := r.updates()
	n := 0
	for _, u := range updates {
		n += len(u)
	}
	r.updateMiddle = r.loadEnd + int64(n/3)
	reading, stopReading := context.WithCancel(r.ctx)
	defer stopReading()
	reads := make(chan []*read, readers)
	readErr := make(chan error, readers)
	for i := range readers {
		seed := r.random.Uint64()
		go func() {
			kept, err := r.readMeanwhile(reading, r.client(i), rand.New(rand.NewPCG(seed, uint64(i))))
			reads <- kept
			readErr <- err
		}()
	}
	cpu = r.s.cpu()
	t, err = r.perform(updates, func() error {
		return watching(catchUp,
			watchSpec{name: "from the first revision, begun in the middle of the updates", key: everything, end: everything, rev: 1},
			watchSpec{name: "from the middle of the load, begun in the middle of the updates", key: prefix, end: prefixEnd(prefix), rev: r.loadMiddle, prevs: true},
			watchSpec{name: "of deletions from the end of the load", key: everything, end: everything, rev: r.loadEnd, noPut: true})
	})
	stopReading()
	if err != nil {
		return err
	}
	var kept []*read
	for range readers {
		kept = append(kept, <-reads...)
		if err := <-readErr; err != nil {
			return fmt.Errorf("reading while others write: %w", err)
		}
	}
	written := slices.Concat(updates...)
	if err := r.m.absorb(written); err != nil {
		return err
	}
	r.updateEnd = r.m.rev
	r.note("updates", "%s", &t)
	r.note("updates, server's CPU", "%.1f us a write", float64((r.s.cpu()-cpu).Microseconds())/float64(len(written)))
	for _, k := range kept {
		if err := r.m.matches(*k); err != nil {
			return fmt.Errorf("read while others wrote: %w", err)
		}
	}
	var failed, idle int
	for _, w := range written {
		switch {
		case w.failed:
			failed++
		case !w.effective():
			idle++
		}
	}
	r.note("checked meanwhile", "%d reads, %d failed transactions, %d empty deletions", len(kept), failed, idle)
	r.note("revisions, events", "%d, %d", r.m.rev, len(r.m.events))
	events := 0
	for _, w := range watches {
		n, _, err := r.m.verify(w)
		if err != nil {
			return err
		}
		events += n
	}
	r.note("watched meanwhile", "%d events by %d watchers", events, len(watches))
	if err := r.progress(live, watches[0]); err != nil {
		return err
	}
	for _, w := range watches {
		w.stop()
	}
	if n := r.s.watchStreams.Load(); n != 2 {
		return fmt.Errorf("%d watch streams were opened instead of 2: the server broke some", n)
	}
	r.note("disk after updates", "%.1f MiB", float64(r.s.onDisk())/(1<<20))
	r.note("peak RSS, updates", "%.1f MiB", float64(r.s.measure())/1024)
	r.s.forgetPeak()
	return nil
}

// progress asks for a progress notice until one comes: the server drops requests while a watcher is behind.
func (r *run) progress(c *clientv3.Client, w *watch) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		if err := c.RequestProgress(r.ctx); err != nil {
			return fmt.Errorf("asking for progress: %w", err)
		}
		time.Sleep(quiet)
		_, progress, _, err := w.state()
		switch {
		case err != nil:
			return err
		case progress == r.m.rev:
			return nil
		case progress != 0 || time.Now().After(deadline):
			return fmt.Errorf("the progress notice says revision %d (0: none came), and %d is the newest", progress, r.m.rev)
		}
	}
}

// updates makes the second revisions: of every kind of write, in a random order.
func (r *run) updates() [][]*write {
	var tasks [][]*write
	one := func(w ...*write) { tasks = append(tasks, w) }
	for i, s := range r.stanzas {
		changed := func(what string) []byte {
			return []byte(strings.Replace(string(s.text), "Package: ", "X-Change: "+what+"\nPackage: ", 1))
		}
		if i%3 == 0 {
			one(&write{parts: []part{{key: s.key, val: changed("second revision")}}, prev: i%9 == 0})
		}
		if i%7 == 1 {
			gone := []*write{{parts: []part{{del: true, key: s.key}}, prev: i%2 == 0}}
			if i%21 == 1 {
				gone = append(gone, &write{parts: []part{{key: s.key, val: changed("created again")}}})
			}
			one(gone...)
		}
		if i%11 == 2 {
			// A race with the others for this key; both outcomes are checked.
			one(&write{condKey: s.key, condRev: r.m.modRevision(s.key, r.loadEnd), parts: []part{
				{key: s.key, val: changed("compared and swapped")},
				{key: indexOf + s.pkg, val: []byte(s.key)},
				{del: true, key: neighbours[i%len(neighbours)]},
			}})
		}
		if i%13 == 3 {
			p := prefix + s.pkg + "/"
			one(&write{parts: []part{{del: true, key: p, end: prefixEnd(p)}}, prev: i%2 == 0})
		}
		if i%29 == 4 {
			p := prefix + s.pkg + "/"
			one(&write{txn: true, prev: true, parts: []part{
				{del: true, key: p, end: prefixEnd(p)},
				{key: indexOf + s.pkg, val: []byte("removed")},
				{del: true, key: "/hot/", end: "/hot/0\xff"},
			}})
		}
		if i%500 == 7 {
			// Many events in one revision.
			one(&write{parts: []part{{del: true, key: indexOf, end: prefixEnd(indexOf)}}, prev: true})
		}
	}
	for i := range min(hotWrites, len(r.stanzas)) {
		one(&write{parts: []part{{key: hotKey(i % hotKeys), val: fmt.Appendf(nil, "hot %d", i)}}, prev: i%5 == 0})
	}
	r.random.Shuffle(len(tasks), func(i, j int) { tasks[i], tasks[j] = tasks[j], tasks[i] })
	return tasks
}

// readMeanwhile reads the newest state and old revisions until it is stopped.
func (r *run) readMeanwhile(ctx context.Context, c *clientv3.Client, random *rand.Rand) ([]*read, error) {
	var kept []*read
	for ctx.Err() == nil {
		s := r.stanzas[random.IntN(len(r.stanzas))]
		var err error
		var got *read
		switch random.IntN(4) {
		case 0:
			got, err = newest(ctx, c, s.key, "", &r.acked)
		case 1:
			got, err = newest(ctx, c, hotKey(random.IntN(hotKeys)), "", &r.acked)
		case 2:
			p := prefix + s.pkg
			got, err = newest(ctx, c, p, prefixEnd(p), &r.acked)
		default:
			err = r.pointRead(ctx, c, r.m.index[s.key], 1+random.Int64N(r.loadEnd))
		}
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return kept, err
		}
		if got != nil && len(kept) < readsKept/readers {
			kept = append(kept, got)
		}
	}
	return kept, nil
}

// pointRead reads one key as it was and compares it.
func (r *run) pointRead(ctx context.Context, c *clientv3.Client, key int, rev int64) error {
	ctx, cancel := context.WithTimeout(ctx, callMax)
	defer cancel()
	resp, err := c.Get(ctx, r.m.keys[key], clientv3.WithRev(rev))
	if err != nil {
		return fmt.Errorf("reading %q at revision %d: %w", r.m.keys[key], rev, err)
	}
	v := r.m.at(key, rev)
	switch {
	case v == nil && len(resp.Kvs) > 0:
		return fmt.Errorf("%q at revision %d came with mod revision %d, and it was not there", r.m.keys[key], rev, resp.Kvs[0].ModRevision)
	case v != nil && len(resp.Kvs) != 1:
		return fmt.Errorf("%q is missing at revision %d", r.m.keys[key], rev)
	case v != nil:
		if err := samePair(resp.Kvs[0], r.m.keys[key], v); err != nil {
			return fmt.Errorf("at revision %d: %w", rev, err)
		}
	}
	return nil
}

type lister func(c *clientv3.Client, key, end string, rev int64) ([]*mvccpb.KeyValue, int64, error)

// atOnce lists a range with one request.
func (r *run) atOnce(c *clientv3.Client, key, end string, rev int64) ([]*mvccpb.KeyValue, int64, error) {
	ctx, cancel := context.WithTimeout(r.ctx, callMax)
	defer cancel()
	resp, err := c.Get(ctx, key, clientv3.WithRange(end), clientv3.WithRev(rev))
	if err != nil {
		return nil, 0, err
	}
	if resp.More {
		return nil, 0, errors.New("the whole list says that there is more")
	}
	return resp.Kvs, resp.Count, nil
}

// paged lists a range page by page, all of one revision.
func (r *run) paged(c *clientv3.Client, key, end string, rev int64) ([]*mvccpb.KeyValue, int64, error) {
	var all []*mvccpb.KeyValue
	var total int64
	for {
		ctx, cancel := context.WithTimeout(r.ctx, callMax)
		resp, err := c.Get(ctx, key, clientv3.WithRange(end), clientv3.WithRev(rev), clientv3.WithLimit(page))
		cancel()
		if err != nil {
			return nil, 0, err
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		if len(all) == 0 {
			total = resp.Count
		} else if left := total - int64(len(all)); resp.Count != left {
			return nil, 0, fmt.Errorf("a page after %d keys says that %d are left, not %d", len(all), resp.Count, left)
		}
		all = append(all, resp.Kvs...)
		if resp.More != (int64(len(all)) < total) || resp.More && len(resp.Kvs) != page {
			return nil, 0, fmt.Errorf("a page of %d keys says more=%v after %d of %d", len(resp.Kvs), resp.More, len(all), total)
		}
		if !resp.More {
			return all, total, nil
		}
		key = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

// streamed lists a range with RangeStream.
func (r *run) streamed(c *clientv3.Client, key, end string, rev int64) ([]*mvccpb.KeyValue, int64, error) {
	ctx, cancel := context.WithTimeout(r.ctx, callMax)
	defer cancel()
	chunks, err := c.GetStream(ctx, key, clientv3.WithRange(end), clientv3.WithRev(rev))
	if err != nil {
		return nil, 0, err
	}
	var all []*mvccpb.KeyValue
	var count int64
	last := false
	for chunk := range chunks {
		if err := chunk.Err(); err != nil {
			return nil, 0, err
		}
		if last {
			return nil, 0, errors.New("the stream goes on after its header")
		}
		all = append(all, chunk.Kvs...)
		if chunk.Header != nil {
			last, count = true, chunk.Count
		}
	}
	if !last {
		return nil, 0, errors.New("the stream ended without a header")
	}
	return all, count, nil
}

// list makes a list, compares it with the record and returns its checksum.
func (r *run) list(f lister, key, end string, rev int64) (string, time.Duration, error) {
	began := time.Now()
	kvs, count, err := f(r.clients[0], key, end, rev)
	took := time.Since(began)
	if err != nil {
		return "", 0, fmt.Errorf("listing %q at revision %d: %w", key, rev, err)
	}
	if rev == 0 {
		rev = r.m.rev
	}
	if err := r.m.matches(read{key: key, end: end, rev: rev, kvs: kvs, count: count}); err != nil {
		return "", 0, err
	}
	sum := sumOf(kvs)
	if want := r.m.sum(key, end, rev); sum != want {
		return "", 0, fmt.Errorf("the checksum of %q at revision %d is %s, not %s", key, rev, sum, want)
	}
	return sum, took, nil
}

func (r *run) lists() error {
	end := prefixEnd(prefix)
	n := r.m.count(prefix, end, r.m.rev)
	for _, l := range []struct {
		name string
		f    lister
	}{{"list at once", r.atOnce}, {"list paged by " + fmt.Sprint(page), r.paged}, {"list by RangeStream", r.streamed}} {
		_, took, err := r.list(l.f, prefix, end, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		r.note(l.name, "%d keys, %.3f s", n, took.Seconds())
	}
	if _, _, err := r.list(r.atOnce, everything, everything, 0); err != nil {
		return err
	}
	c := r.clients[0]
	count, err := c.Get(r.ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return err
	}
	if count.Count != n || len(count.Kvs) != 0 || count.More {
		return fmt.Errorf("counting: %d, with %d keys and more=%v, instead of %d", count.Count, len(count.Kvs), count.More, n)
	}
	down, err := c.Get(r.ctx, prefix, clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend))
	if err != nil {
		return err
	}
	slices.Reverse(down.Kvs)
	if err := r.m.matches(read{key: prefix, end: end, rev: r.m.rev, kvs: down.Kvs, count: down.Count}); err != nil {
		return fmt.Errorf("the list from the end: %w", err)
	}
	keys, err := c.Get(r.ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	i := 0
	for k, v := range r.m.state(prefix, end, r.m.rev) {
		if i == len(keys.Kvs) {
			return fmt.Errorf("the keys alone: %d came instead of %d", i, n)
		}
		g := keys.Kvs[i]
		if string(g.Key) != k || g.ModRevision != v.rev || g.CreateRevision != v.create || g.Version != v.ver || len(g.Value) != 0 {
			return fmt.Errorf("the keys alone: %v came for %q", g, k)
		}
		i++
	}

	t := timings{}
	took := make([][]time.Duration, readers)
	picks := make([]string, min(packageLists, len(r.packages)))
	for i := range picks {
		picks[i] = prefix + r.packages[r.random.IntN(len(r.packages))] + "/"
	}
	began := time.Now()
	err = parallel(len(picks), readers, func(worker, i int) error {
		p := picks[i]
		t := time.Now()
		resp, err := r.client(worker).Get(r.ctx, p, clientv3.WithPrefix())
		if err != nil {
			return err
		}
		took[worker] = append(took[worker], time.Since(t))
		return r.m.matches(read{key: p, end: prefixEnd(p), rev: r.m.rev, kvs: resp.Kvs, count: resp.Count})
	})
	t.wall = time.Since(began)
	t.merge(took)
	if err != nil {
		return err
	}
	r.note("lists of a package", "%s", &t)
	return nil
}

func (r *run) oldRevisions() error {
	end := prefixEnd(prefix)
	for _, at := range []struct {
		name string
		rev  int64
	}{{"the first", 1}, {"the second", 2}, {"the load's middle", r.loadMiddle}, {"the load's end", r.loadEnd}, {"the updates' middle", r.updateMiddle}, {"the last but one", r.updateEnd - 1}} {
		var took [3]time.Duration
		for i, f := range []lister{r.atOnce, r.paged, r.streamed} {
			var err error
			if _, took[i], err = r.list(f, prefix, end, at.rev); err != nil {
				return err
			}
		}
		r.note("lists at "+at.name+" revision", "%d keys, %.3f s at once, %.3f s paged, %.3f s by RangeStream",
			r.m.count(prefix, end, at.rev), took[0].Seconds(), took[1].Seconds(), took[2].Seconds())
	}
	if err := r.manyPointReads("reads at old revisions", 1, len(r.m.keys), func(i int) int { return i }); err != nil {
		return err
	}
	hot := func(i int) int { return r.m.index[hotKey(i)] }
	if err := r.manyPointReads("reads of hot keys at old revisions", 1, hotKeys, hot); err != nil {
		return err
	}
	c := r.clients[0]
	_, err := c.Get(r.ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(r.m.rev+1))
	return expect("a read in the future", err, rpctypes.ErrFutureRev)
}

func expect(what string, got, want error) error {
	if !errors.Is(got, want) {
		return fmt.Errorf("%s: %v instead of %v", what, got, want)
	}
	return nil
}

// manyPointReads reads random ones of n keys at random revisions from the given one on.
func (r *run) manyPointReads(name string, from int64, n int, key func(int) int) error {
	took := make([][]time.Duration, r.workers)
	keys, revs := make([]int, pointReads), make([]int64, pointReads)
	for i := range keys {
		keys[i], revs[i] = key(r.random.IntN(n)), from+r.random.Int64N(r.m.rev-from+1)
	}
	t := timings{}
	began := time.Now()
	err := parallel(len(keys), r.workers, func(worker, i int) error {
		t := time.Now()
		if err := r.pointRead(r.ctx, r.client(worker), keys[i], revs[i]); err != nil {
			return err
		}
		took[worker] = append(took[worker], time.Since(t))
		return nil
	})
	t.wall = time.Since(began)
	t.merge(took)
	if err == nil && name != "" {
		r.note(name, "%s", &t)
	}
	return err
}

// watchAlone watches with a client of its own and compares all that is due.
func (r *run) watchAlone(spec watchSpec) (int, time.Duration, error) {
	c, err := r.s.dial()
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	spec.compacted = r.m.compacted
	w, err := open(r.ctx, c, spec)
	if err != nil {
		return 0, 0, err
	}
	defer w.stop()
	return r.m.verify(w)
}

func (r *run) history() error {
	for _, h := range []struct {
		name string
		spec watchSpec
	}{
		{"whole history", watchSpec{key: everything, end: everything, rev: 1}},
		{"whole history, previous pairs", watchSpec{key: everything, end: everything, rev: 2, prevs: true}},
		{"history from the middle", watchSpec{key: everything, end: everything, rev: r.updateMiddle, fragment: true}},
		{"history of the prefix", watchSpec{key: prefix, end: prefixEnd(prefix), rev: r.loadMiddle}},
		{"history of one key", watchSpec{key: hotKey(3), rev: 1, prevs: true}},
		{"history of one package", watchSpec{key: prefix + r.packages[0] + "/", end: prefixEnd(prefix + r.packages[0] + "/"), rev: 1}},
	} {
		h.spec.name = h.name
		n, took, err := r.watchAlone(h.spec)
		if err != nil {
			return err
		}
		r.note(h.name, "%d events, %.3f s", n, took.Seconds())
	}
	return nil
}

func (r *run) compactions() error {
	// The second compaction is at a deletion: it keeps it.
	tombstone := r.updateMiddle
	for _, e := range r.m.events {
		if v := r.m.hist[e.key][e.at]; v.del && v.rev >= r.updateMiddle {
			tombstone = v.rev
			break
		}
	}
	for _, c := range []struct {
		name     string
		rev      int64
		physical bool
	}{{"compaction in the load", r.loadMiddle, false}, {"compaction in the updates", tombstone, true}} {
		if err := r.compact(c.name, c.rev, c.physical); err != nil {
			return fmt.Errorf("%s at %d: %w", c.name, c.rev, err)
		}
		if err := r.afterCompaction(); err != nil {
			return fmt.Errorf("after %s at %d: %w", c.name, c.rev, err)
		}
	}
	r.note("disk after compaction", "%.1f MiB", float64(r.s.onDisk())/(1<<20))
	return nil
}

// compact compacts while others write and read.
func (r *run) compact(name string, rev int64, physical bool) error {
	ctx, stop := context.WithCancel(r.ctx)
	defer stop()
	var all sync.WaitGroup
	var writes [hotWriters][]*write
	var took [hotWriters][2][]time.Duration
	errs := make(chan error, 2*hotWriters)
	var compacting atomic.Int32
	for i := range hotWriters {
		random := rand.New(rand.NewPCG(r.random.Uint64(), uint64(i)))
		all.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				w := &write{parts: []part{{key: hotKey(random.IntN(hotKeys)), val: fmt.Appendf(nil, "%s %d %d", name, i, n)}}}
				t := time.Now()
				phase := compacting.Load()
				if err := do(r.ctx, r.client(i), w, &r.acked); err != nil {
					errs <- fmt.Errorf("%s: %w", w, err)
					return
				}
				took[i][phase] = append(took[i][phase], time.Since(t))
				writes[i] = append(writes[i], w)
			}
		})
	}
	var reading [2][]time.Duration
	readRandom := rand.New(rand.NewPCG(r.random.Uint64(), 0))
	until := r.m.rev
	all.Go(func() {
		for ctx.Err() == nil {
			at := rev + readRandom.Int64N(until-rev+1)
			key := readRandom.IntN(len(r.m.keys))
			t := time.Now()
			phase := compacting.Load()
			if err := r.pointRead(r.ctx, r.client(0), key, at); err != nil {
				errs <- err
				return
			}
			reading[phase] = append(reading[phase], time.Since(t))
		}
	})
	time.Sleep(beforeCompact)
	compacting.Store(1)
	var opts []clientv3.CompactOption
	if physical {
		opts = append(opts, clientv3.WithCompactPhysical())
	}
	began := time.Now()
	resp, err := r.clients[0].Compact(r.ctx, rev, opts...)
	answered := time.Since(began)
	if err == nil && resp.Header.Revision < until {
		err = fmt.Errorf("the answer has revision %d, and %d was there before", resp.Header.Revision, until)
	}
	if err == nil {
		_, old := r.clients[1].Get(r.ctx, everything, clientv3.WithRev(rev-1))
		err = expect("a read below, right after the answer", old, rpctypes.ErrCompacted)
	}
	time.Sleep(afterCompact)
	stop()
	all.Wait()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	if err != nil {
		return err
	}
	if err := r.m.absorb(slices.Concat(writes[:]...)); err != nil {
		return err
	}
	r.m.compacted = rev
	worst := func(phase int) float64 {
		t := timings{}
		var parts [][]time.Duration
		for i := range took {
			parts = append(parts, took[i][phase])
		}
		t.merge(parts)
		return t.percentile(1).Seconds() * 1000
	}
	worstRead := func(phase int) float64 { return max(0, slices.Max(append(reading[phase], 0)).Seconds()*1000) }
	kind := "answered"
	if physical {
		kind = "done"
	}
	r.note(name, "%s after %.1f ms", kind, answered.Seconds()*1000)
	r.note(name+", slowest put", "%.1f ms before, %.1f ms while", worst(0), worst(1))
	r.note(name+", slowest read", "%.1f ms before, %.1f ms while", worstRead(0), worstRead(1))
	return nil
}

// afterCompaction checks that what is below is refused and that what is above is as it was.
func (r *run) afterCompaction() error {
	c, rev := r.clients[0], r.m.compacted
	end := prefixEnd(prefix)
	for _, below := range []int64{1, rev / 2, rev - 1} {
		_, err := c.Get(r.ctx, r.stanzas[0].key, clientv3.WithRev(below))
		if err := expect(fmt.Sprintf("a read at revision %d", below), err, rpctypes.ErrCompacted); err != nil {
			return err
		}
		_, err = c.Get(r.ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(below), clientv3.WithLimit(page))
		if err := expect(fmt.Sprintf("a list at revision %d", below), err, rpctypes.ErrCompacted); err != nil {
			return err
		}
		_, _, err = r.streamed(c, prefix, end, below)
		if err := expect(fmt.Sprintf("a RangeStream at revision %d", below), err, rpctypes.ErrCompacted); err != nil {
			return err
		}
		if err := r.canceled(below); err != nil {
			return err
		}
	}
	_, err := c.Compact(r.ctx, rev)
	if err := expect("compacting again", err, rpctypes.ErrCompacted); err != nil {
		return err
	}
	_, err = c.Compact(r.ctx, r.m.rev+1)
	if err := expect("compacting in the future", err, rpctypes.ErrFutureRev); err != nil {
		return err
	}
	lists := []int64{rev, rev + 1, 0}
	for _, mark := range []int64{r.loadMiddle, r.loadEnd, r.updateMiddle, r.updateEnd} {
		if mark > rev {
			lists = append(lists, mark)
		}
	}
	for i, at := range lists {
		f := []lister{r.paged, r.streamed, r.atOnce}[i%3]
		if _, _, err := r.list(f, everything, everything, at); err != nil {
			return err
		}
	}
	if err := r.manyPointReads("", rev, len(r.m.keys), func(i int) int { return i }); err != nil {
		return err
	}
	for _, spec := range []watchSpec{
		{name: "from the compacted revision", key: everything, end: everything, rev: rev, prevs: true},
		{name: "from after the compacted revision", key: prefix, end: end, rev: rev + 1, prevs: true},
	} {
		if _, _, err := r.watchAlone(spec); err != nil {
			return err
		}
	}
	return nil
}

// canceled watches from a compacted revision.
func (r *run) canceled(rev int64) error {
	ctx, cancel := context.WithTimeout(r.ctx, callMax)
	defer cancel()
	created := false
	for resp := range r.clients[0].Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(rev), clientv3.WithCreatedNotify()) {
		switch {
		case resp.Created && !resp.Canceled:
			created = true
		case !created:
			return fmt.Errorf("a watch from revision %d: the first answer is not that it was created", rev)
		case !resp.Canceled || resp.CompactRevision != r.m.compacted || resp.Header.Revision != 0:
			return fmt.Errorf("a watch from revision %d: canceled=%v, compact revision %d, header revision %d instead of true, %d, 0",
				rev, resp.Canceled, resp.CompactRevision, resp.Header.Revision, r.m.compacted)
		default:
			return expect(fmt.Sprintf("a watch from revision %d", rev), resp.Err(), rpctypes.ErrCompacted)
		}
	}
	return fmt.Errorf("a watch from revision %d ended without a word", rev)
}

// pending is a write that was sent and never answered.
type pending struct {
	byValue map[string]*write
	byKey   map[string][]*write
}

func (p *pending) add(w *write) {
	if w.parts[0].del {
		p.byKey[w.parts[0].key] = append(p.byKey[w.parts[0].key], w)
	} else {
		p.byValue[string(w.parts[0].val)] = w
	}
}

// restart ends the server with the signal, idle or while all workers write, starts it again and checks everything.
func (r *run) restart(name string, sig syscall.Signal, load bool) error {
	r.restarts++
	before, _, err := r.list(r.atOnce, everything, everything, 0)
	if err != nil {
		return err
	}
	// A stop has to end open watches too.
	c, err := r.s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	w, err := open(r.ctx, c, watchSpec{name: "open across the stop", key: everything, end: everything})
	if err != nil {
		return err
	}
	defer w.stop()

	var stopped time.Duration
	var answered []*write
	unanswered := pending{map[string]*write{}, map[string][]*write{}}
	sent := 0
	if !load {
		stopped, err = r.s.end(sig)
	} else {
		stopped, err = r.endUnderLoad(sig, func(w *write) { answered = append(answered, w) }, func(w *write) { unanswered.add(w); sent++ })
	}
	if err != nil {
		return err
	}
	w.stop()
	if err := errors.Join(c.Close(), closeAll(r.clients)); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	ready, err := r.s.start(r.ctx)
	if err != nil {
		return err
	}
	started := r.s.measure()
	if err := r.connect(); err != nil {
		return err
	}
	r.note(name+": stop, start", "%.3f s, ready after %.3f s", stopped.Seconds(), ready.Seconds())
	if load {
		learnt, err := r.learn(answered, &unanswered)
		if err != nil {
			return err
		}
		r.note(name+": writes", "%d answered, %d unanswered, of them %d applied", len(answered), sent, learnt)
	}
	resp, err := r.clients[0].Get(r.ctx, everything)
	if err != nil {
		return err
	}
	if resp.Header.Revision != r.m.rev {
		return fmt.Errorf("the store is at revision %d instead of %d", resp.Header.Revision, r.m.rev)
	}
	after, _, err := r.list(r.atOnce, everything, everything, 0)
	if err != nil {
		return err
	}
	if !load {
		if before != after {
			return fmt.Errorf("checksum %s before and %s after", before, after)
		}
		r.note(name+": SHA-256", "%s before and after", after[:16])
	}
	if err := r.afterCompaction(); err != nil {
		return err
	}
	r.note(name+": peak RSS", "%.1f MiB after start, %.1f MiB after all was read", float64(started)/1024, float64(r.s.measure())/1024)
	return nil
}

// endUnderLoad lets all workers write until the signal ends the server.
func (r *run) endUnderLoad(sig syscall.Signal, answered, unanswered func(*write)) (time.Duration, error) {
	ctx, stop := context.WithCancel(r.ctx)
	defer stop()
	var mu sync.Mutex
	var wrong error
	var ending atomic.Bool
	var all sync.WaitGroup
	for worker := range r.workers {
		random := rand.New(rand.NewPCG(r.random.Uint64(), uint64(worker)))
		all.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				w := r.loadWrite(random, fmt.Sprintf("restart %d, worker %d, write %d\n", r.restarts, worker, n))
				err := do(ctx, r.client(worker), w, &r.acked)
				mu.Lock()
				if err == nil {
					answered(w)
				} else {
					unanswered(w)
					if !ending.Load() && wrong == nil {
						wrong = fmt.Errorf("%s: %w", w, err)
					}
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	time.Sleep(crashAfter)
	// A compaction that was answered holds, even if its work had hardly begun.
	rev := r.m.compacted + (r.m.rev-r.m.compacted)/4
	_, err := r.clients[0].Compact(r.ctx, rev)
	if err == nil {
		r.m.compacted = rev
		time.Sleep(10 * time.Millisecond)
	} else {
		err = fmt.Errorf("compacting at %d: %w", rev, err)
	}
	ending.Store(true)
	stopped, endErr := r.s.end(sig)
	stop()
	all.Wait()
	return stopped, errors.Join(err, wrong, endErr)
}

// loadWrite is one of several kinds of writes, recognizable by its value.
func (r *run) loadWrite(random *rand.Rand, value string) *write {
	s := r.stanzas[random.IntN(len(r.stanzas))]
	val := []byte(value + string(s.text))
	switch n := random.IntN(100); {
	case n < 10:
		return &write{parts: []part{{del: true, key: s.key}}}
	case n < 30:
		return &write{txn: true, parts: []part{{key: indexOf + s.pkg, val: val}, {key: s.key, val: val}, {key: hotKey(random.IntN(hotKeys)), val: val}}}
	}
	return &write{parts: []part{{key: s.key, val: val}}}
}

// learn finds out by watching which of the unanswered writes took place. The answered ones all have to be there.
func (r *run) learn(answered []*write, unanswered *pending) (int, error) {
	resp, err := r.clients[0].Get(r.ctx, everything)
	if err != nil {
		return 0, err
	}
	newest := resp.Header.Revision
	c, err := r.s.dial()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	w, err := open(r.ctx, c, watchSpec{name: "of what was written before the stop", key: everything, end: everything, rev: r.m.rev + 1})
	if err != nil {
		return 0, err
	}
	defer w.stop()
	known := map[int64]bool{}
	for _, a := range answered {
		if a.effective() {
			known[a.rev] = true
			if a.rev > newest {
				return 0, fmt.Errorf("lost: %s was acknowledged with revision %d, and the store is at %d", a, a.rev, newest)
			}
		}
	}
	deadline := time.Now().Add(watchMax)
	for newest > r.m.rev {
		if w.reached(newest) {
			break
		}
		if _, _, _, err := w.state(); err != nil {
			return 0, fmt.Errorf("the watch %s: %w", w.name, err)
		}
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("the watch %s from revision %d has not reached revision %d within %v%s", w.name, w.start, newest, watchMax, w.lastSeen())
		}
		time.Sleep(pollGap)
	}
	w.mu.Lock()
	events := slices.Clone(w.events)
	w.mu.Unlock()
	sums := map[[32]byte]*write{}
	for val, u := range unanswered.byValue {
		sums[checksumOf(val)] = u
	}
	learnt := 0
	for _, e := range events {
		if known[e.rev] {
			continue
		}
		known[e.rev] = true
		var u *write
		if e.del {
			if all := unanswered.byKey[e.key]; len(all) > 0 {
				u, unanswered.byKey[e.key] = all[0], all[1:]
			}
		} else if u = sums[e.sum]; u != nil {
			delete(sums, e.sum)
		}
		if u == nil {
			return 0, fmt.Errorf("revision %d of %q is none of the writes that were sent, or it took place twice", e.rev, e.key)
		}
		u.learnt, u.rev = true, e.rev
		answered = append(answered, u)
		learnt++
	}
	if err := r.m.absorb(answered); err != nil {
		return 0, err
	}
	if _, _, err := r.m.verify(w); err != nil {
		return 0, err
	}
	return learnt, nil
}

func (r *run) finish() error {
	if err := errors.Join(closeAll(r.clients)); err != nil {
		return err
	}
	r.s.measure()
	r.note("disk at the end", "%.1f MiB", float64(r.s.onDisk())/(1<<20))
	r.note("peak RSS of all", "%.1f MiB", float64(r.s.peakKiB)/1024)
	r.note("revisions in the end", "%d", r.m.rev)
	_, err := r.s.end(syscall.SIGTERM)
	return err
}
