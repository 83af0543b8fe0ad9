package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"iter"
	"slices"
	"sort"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// version is what one key became at one revision.
type version struct {
	rev, create, ver int64
	del              bool
	val              []byte
	sum              [sha256.Size]byte
}

// event is a version in the order of revisions: hist[key][at].
type event struct {
	key, at int32
}

// part is one operation: a put, or a deletion of one key or of a range.
type part struct {
	del      bool
	key, end string
	val      []byte
}

// write is one request that may change something, and its answer.
type write struct {
	parts []part
	// With condKey, the parts are applied if its mod revision is condRev; otherwise that key is read.
	condKey string
	condRev int64
	// txn sends the parts as a transaction, even if there is only one.
	txn, prev bool

	// learnt is set for a write that was never answered, but seen in the history afterwards.
	learnt   bool
	rev      int64
	failed   bool
	deleted  []int64
	prevs    [][]*mvccpb.KeyValue
	elseRead []*mvccpb.KeyValue
}

func (w *write) isTxn() bool { return w.txn || w.condKey != "" || len(w.parts) > 1 }

func (w *write) effective() bool {
	if w.failed || w.learnt {
		return w.learnt
	}
	for i, p := range w.parts {
		if !p.del || w.deleted[i] > 0 {
			return true
		}
	}
	return false
}

// read is the answer to a read of the newest state, made while others write.
type read struct {
	key, end string
	rev      int64
	kvs      []*mvccpb.KeyValue
	count    int64
}

// model is this program's own record: what every key was at every revision.
type model struct {
	keys   []string
	index  map[string]int
	hist   [][]version
	events []event
	rev    int64
	// compacted is the revision of the newest compaction. The model itself forgets nothing.
	compacted int64
}

func newModel(keys []string, rev int64) *model {
	m := &model{keys: keys, index: make(map[string]int, len(keys)), hist: make([][]version, len(keys)), rev: rev}
	for i, k := range keys {
		m.index[k] = i
	}
	return m
}

// within gives the bounds of a request's key range, with etcd's meaning of the end.
func (m *model) within(key, end string) (int, int) {
	from := sort.SearchStrings(m.keys, key)
	switch end {
	case "":
		if from < len(m.keys) && m.keys[from] == key {
			return from, from + 1
		}
		return from, from
	case "\x00":
		return from, len(m.keys)
	}
	return from, max(from, sort.SearchStrings(m.keys, end))
}

// last is the key's newest version at that revision, a deletion included.
func (m *model) last(i int, rev int64) *version {
	h := m.hist[i]
	n := sort.Search(len(h), func(n int) bool { return h[n].rev > rev })
	if n == 0 {
		return nil
	}
	return &h[n-1]
}

func (m *model) at(i int, rev int64) *version {
	if v := m.last(i, rev); v != nil && !v.del {
		return v
	}
	return nil
}

func (m *model) state(key, end string, rev int64) iter.Seq2[string, *version] {
	return func(yield func(string, *version) bool) {
		from, to := m.within(key, end)
		for i := from; i < to; i++ {
			if v := m.at(i, rev); v != nil && !yield(m.keys[i], v) {
				return
			}
		}
	}
}

func (m *model) count(key, end string, rev int64) (n int64) {
	for range m.state(key, end, rev) {
		n++
	}
	return n
}

func (m *model) modRevision(key string, rev int64) int64 {
	if v := m.at(m.index[key], rev); v != nil {
		return v.rev
	}
	return 0
}

// absorb takes in what was written since the last time. The acknowledged revisions have to be the next ones, each
// once; every answer has to be what the state before it says.
func (m *model) absorb(writes []*write) error {
	var applied []*write
	for _, w := range writes {
		if w.effective() {
			applied = append(applied, w)
		}
	}
	slices.SortFunc(applied, func(a, b *write) int { return int(a.rev - b.rev) })
	for _, w := range applied {
		if w.rev != m.rev+1 {
			return fmt.Errorf("revision %d was acknowledged after revision %d: one is missing, or one was given twice (%s)", w.rev, m.rev, w)
		}
		if err := m.apply(w); err != nil {
			return fmt.Errorf("revision %d, %s: %w", w.rev, w, err)
		}
	}
	for _, w := range writes {
		if err := m.idle(w); err != nil {
			return fmt.Errorf("a write without effect, answered at revision %d, %s: %w", w.rev, w, err)
		}
	}
	return nil
}

func (m *model) apply(w *write) error {
	if w.condKey != "" && !w.learnt {
		if mod := m.modRevision(w.condKey, m.rev); mod != w.condRev {
			return fmt.Errorf("the transaction succeeded if the mod revision of %q is %d, and it was %d", w.condKey, w.condRev, mod)
		}
	}
	before := m.rev
	m.rev = w.rev
	for n, p := range w.parts {
		from, to := m.within(p.key, p.end)
		var prevs []kv
		for i := from; i < to; i++ {
			old := m.at(i, w.rev)
			next := version{rev: w.rev, del: p.del}
			if old != nil {
				prevs = append(prevs, kv{m.keys[i], old})
			} else if p.del {
				continue
			}
			if !p.del {
				next.create, next.ver, next.val, next.sum = w.rev, 1, p.val, sha256.Sum256(p.val)
				if old != nil {
					next.create, next.ver = old.create, old.ver+1
				}
			}
			m.hist[i] = append(m.hist[i], next)
			m.events = append(m.events, event{int32(i), int32(len(m.hist[i]) - 1)})
		}
		if w.learnt {
			continue
		}
		if p.del && w.deleted[n] != int64(len(prevs)) {
			return fmt.Errorf("the deletion answered %d keys, and there were %d at revision %d", w.deleted[n], len(prevs), before)
		}
		if w.prev {
			if err := same(w.prevs[n], slices.Values(prevs)); err != nil {
				return fmt.Errorf("the previous pairs: %w", err)
			}
		}
	}
	return nil
}

func (m *model) idle(w *write) error {
	switch {
	case w.effective():
		return nil
	case w.rev > m.rev:
		return fmt.Errorf("no write with effect got that revision; the last one has %d", m.rev)
	case w.failed:
		if mod := m.modRevision(w.condKey, w.rev); mod == w.condRev {
			return fmt.Errorf("the transaction failed though the mod revision of %q was %d, as it asked", w.condKey, mod)
		}
		return m.matches(read{key: w.condKey, rev: w.rev, kvs: w.elseRead, count: int64(len(w.elseRead))})
	}
	for _, p := range w.parts {
		if n := m.count(p.key, p.end, w.rev); n != 0 {
			return fmt.Errorf("it deleted nothing, and there were %d keys", n)
		}
	}
	return nil
}

func (w *write) String() string {
	if len(w.parts) == 0 {
		return "nothing"
	}
	p := w.parts[0]
	what := "put"
	if p.del {
		what = "delete"
	}
	if w.isTxn() {
		what = fmt.Sprintf("transaction of %d, first %s", len(w.parts), what)
	}
	if p.end != "" {
		return fmt.Sprintf("%s %q to %q", what, p.key, p.end)
	}
	return fmt.Sprintf("%s %q", what, p.key)
}

type kv struct {
	key string
	v   *version
}

func (m *model) pairs(key, end string, rev int64) iter.Seq[kv] {
	return func(yield func(kv) bool) {
		for k, v := range m.state(key, end, rev) {
			if !yield(kv{k, v}) {
				return
			}
		}
	}
}

func (m *model) matches(r read) error {
	if n := m.count(r.key, r.end, r.rev); r.count != n {
		return fmt.Errorf("%q to %q at revision %d: count is %d, not %d", r.key, r.end, r.rev, r.count, n)
	}
	if err := same(r.kvs, m.pairs(r.key, r.end, r.rev)); err != nil {
		return fmt.Errorf("%q to %q at revision %d: %w", r.key, r.end, r.rev, err)
	}
	return nil
}

// same compares what a server answered with what there has to be; the error names the first difference.
func same(got []*mvccpb.KeyValue, want iter.Seq[kv]) error {
	n := 0
	for w := range want {
		if n == len(got) {
			return fmt.Errorf("only %d keys came; %q (mod revision %d) should follow", n, w.key, w.v.rev)
		}
		if err := samePair(got[n], w.key, w.v); err != nil {
			return err
		}
		n++
	}
	if n < len(got) {
		return fmt.Errorf("%d keys came instead of %d; the first too many is %q (mod revision %d)", len(got), n, got[n].Key, got[n].ModRevision)
	}
	return nil
}

func samePair(g *mvccpb.KeyValue, key string, v *version) error {
	if string(g.Key) != key {
		return fmt.Errorf("key %q came where %q (mod revision %d) should be", g.Key, key, v.rev)
	}
	if g.CreateRevision != v.create || g.ModRevision != v.rev || g.Version != v.ver || g.Lease != 0 {
		return fmt.Errorf("key %q came with create revision %d, mod revision %d, version %d, lease %d instead of %d, %d, %d, 0",
			g.Key, g.CreateRevision, g.ModRevision, g.Version, g.Lease, v.create, v.rev, v.ver)
	}
	if !bytes.Equal(g.Value, v.val) {
		return fmt.Errorf("key %q at mod revision %d came with %d bytes %q instead of %d bytes %q", g.Key, g.ModRevision, len(g.Value), shorten(g.Value), len(v.val), shorten(v.val))
	}
	return nil
}

func shorten(b []byte) []byte {
	const most = 60
	return b[:min(most, len(b))]
}

// checksum is SHA-256 over key, value, create revision, mod revision and version of every pair, in the order given.
type checksum struct{ h hash.Hash }

func newChecksum() checksum { return checksum{sha256.New()} }

func (c checksum) add(key, val []byte, create, mod, ver int64) {
	var b [8]byte
	number := func(n int64) {
		binary.BigEndian.PutUint64(b[:], uint64(n))
		c.h.Write(b[:])
	}
	number(int64(len(key)))
	c.h.Write(key)
	number(int64(len(val)))
	c.h.Write(val)
	number(create)
	number(mod)
	number(ver)
}

func (c checksum) String() string { return fmt.Sprintf("%x", c.h.Sum(nil)) }

func sumOf(kvs []*mvccpb.KeyValue) string {
	c := newChecksum()
	for _, kv := range kvs {
		c.add(kv.Key, kv.Value, kv.CreateRevision, kv.ModRevision, kv.Version)
	}
	return c.String()
}

func (m *model) sum(key, end string, rev int64) string {
	c := newChecksum()
	for k, v := range m.state(key, end, rev) {
		c.add([]byte(k), v.val, v.create, v.rev, v.ver)
	}
	return c.String()
}
