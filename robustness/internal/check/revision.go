package check

import (
	"sort"
	"strings"

	"metastore/robustness/internal/history"
)

// checkRevisions holds every acknowledged operation against the event history. A reply carries the revision it speaks of,
// so the whole history has one order only, and being linearizable comes down to: each reply fits the state at its revision,
// and no operation has a revision below that of one that ended before it began, on any key, through any member.
func checkRevisions(h *history.History, ops []*resolved, log *eventLog, out *reporter) {
	for _, o := range ops {
		if o.Outcome != history.OK || o.byServer {
			continue
		}
		checkReply(o, log, out)
	}
	checkOrder(ops, out)
	checkFuture(h, ops, out)
	checkHeaders(h, out)
}

// checkReply holds one reply against the state at its revision.
func checkReply(o *resolved, log *eventLog, out *reporter) {
	before := log.at(o.Key, o.rev-1)
	if o.rev > log.last {
		out.add("its revision is above the last one, %d: %s", log.last, o.Op)
		return
	}
	switch o.Kind {
	case history.Get:
		if want := log.at(o.Key, o.rev); !same(o.KVs, want) {
			out.add("at revision %d the key is %s: %s", o.rev, want, o.Op)
		}
	case history.Range:
		if want := log.prefix(o.Key, o.rev); !sameAll(o.KVs, want) {
			out.add("at revision %d the range has %d keys (%v): %s", o.rev, len(want), want, o.Op)
		}
	case history.Put:
		if o.AskPrev && !samePointer(o.Prev, before) {
			out.add("its previous value is given as %s, but is %s: %s", o.Prev, before, o.Op)
		}
	case history.Delete:
		if o.Deleted == 0 {
			if now := log.at(o.Key, o.rev); now != nil {
				out.add("it found nothing, but there is %s: %s", now, o.Op)
			}
			return
		}
		if o.AskPrev && !samePointer(o.Prev, before) {
			out.add("its previous value is given as %s, but is %s: %s", o.Prev, before, o.Op)
		}
	case history.CAS, history.CASValue:
		state := before
		if !o.Succeeded {
			state = log.at(o.Key, o.rev)
			if !same(o.KVs, state) {
				out.add("at revision %d the key is %s: %s", o.rev, state, o.Op)
			}
		}
		if fits(o.Op, state) != o.Succeeded {
			out.add("it compared with %s (expected mod %d, value %q): %s", state, o.ExpectMod, o.ExpectValue, o.Op)
		}
	}
}

// fits tells whether the compare of a transaction holds in a state of its key.
func fits(o *history.Op, state *history.KV) bool {
	if o.Kind == history.CASValue {
		return state != nil && state.Value == o.ExpectValue
	}
	if state == nil {
		return o.ExpectMod == 0
	}
	return state.Mod == o.ExpectMod
}

func same(got []history.KV, want *history.KV) bool {
	if want == nil {
		return len(got) == 0
	}
	return len(got) == 1 && got[0] == *want
}

func samePointer(a, b *history.KV) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

func sameAll(got, want []history.KV) bool {
	if len(got) != len(want) {
		return false
	}
	for i := range got {
		if got[i] != want[i] {
			return false
		}
	}
	return true
}

// prefix gives what a prefix holds at a revision, in the order of keys.
func (l *eventLog) prefix(prefix string, rev int64) []history.KV {
	var found []history.KV
	for key := range l.keys {
		if strings.HasPrefix(key, prefix) {
			if kv := l.at(key, rev); kv != nil {
				found = append(found, *kv)
			}
		}
	}
	sort.Slice(found, func(i, j int) bool { return found[i].Key < found[j].Key })
	return found
}

// checkOrder sweeps over time: whatever begins must have at least the highest revision of what has ended, and more than
// that if it made a revision of its own.
func checkOrder(ops []*resolved, out *reporter) {
	byCall := append([]*resolved(nil), ops...)
	byReturn := append([]*resolved(nil), ops...)
	sort.Slice(byCall, func(i, j int) bool { return byCall[i].Call < byCall[j].Call })
	sort.Slice(byReturn, func(i, j int) bool { return byReturn[i].ret < byReturn[j].ret })
	next := 0
	var top *resolved
	for _, o := range byCall {
		for next < len(byReturn) && byReturn[next].ret < o.Call {
			if r := byReturn[next]; r.done && (top == nil || r.rev > top.rev) {
				top = r
			}
			next++
		}
		if top == nil || !o.done {
			continue
		}
		if o.byServer {
			continue // when it was called is only a lower bound
		}
		makes := o.Outcome == history.Unknown || o.Changed()
		if o.rev < top.rev || makes && o.rev == top.rev {
			out.add("it began after revision %d was there already: %s; there by %s", top.rev, describe(o), describe(top))
		}
	}
}

func describe(o *resolved) string {
	if o.byServer {
		return "deletion of " + o.Key + " by an unknown call or a lease"
	}
	text := o.Op.String()
	if o.Outcome == history.Unknown {
		text += " (done, as watches show)"
	}
	return text
}

// checkFuture finds replies that speak of a revision whose write had not even been called.
func checkFuture(h *history.History, ops []*resolved, out *reporter) {
	called := map[int64]*resolved{}
	for _, o := range ops {
		if o.done && (o.Outcome == history.Unknown || o.Changed()) && !o.byServer {
			called[o.rev] = o
		}
	}
	for _, o := range h.Ops {
		if o.Outcome != history.OK {
			continue
		}
		if w := called[o.Rev]; w != nil && w.Call > o.Return {
			out.add("it speaks of a revision that was written later: %s; by %s", o, describe(w))
		}
	}
}

// checkHeaders finds replies of another cluster and terms that fall within one life of a member.
func checkHeaders(h *history.History, out *reporter) {
	var cluster uint64
	lives := map[history.Life][]*history.Op{}
	for _, o := range h.Ops {
		if o.Outcome != history.OK {
			continue
		}
		if cluster == 0 {
			cluster = o.ClusterID
		}
		if o.ClusterID != cluster {
			out.add("cluster id %x, others say %x: %s", o.ClusterID, cluster, o)
		}
		if o.Life.Number == o.LifeEnd {
			lives[o.Life] = append(lives[o.Life], o)
		}
	}
	for _, ops := range lives {
		overtaken(ops, func(o *history.Op) int64 { return int64(o.Term) }, func(o, top *history.Op) {
			out.add("term %d after term %d of the same process: %s; and %s", o.Term, top.Term, o, top)
		})
	}
}

// overtaken finds operations whose measure is below that of one that had ended before they began.
func overtaken(ops []*history.Op, measure func(*history.Op) int64, found func(o, top *history.Op)) {
	byCall := append([]*history.Op(nil), ops...)
	byReturn := append([]*history.Op(nil), ops...)
	sort.Slice(byCall, func(i, j int) bool { return byCall[i].Call < byCall[j].Call })
	sort.Slice(byReturn, func(i, j int) bool { return byReturn[i].Return < byReturn[j].Return })
	next := 0
	var top *history.Op
	for _, o := range byCall {
		for next < len(byReturn) && byReturn[next].Return < o.Call {
			if r := byReturn[next]; top == nil || measure(r) > measure(top) {
				top = r
			}
			next++
		}
		if top != nil && measure(o) < measure(top) {
			found(o, top)
		}
	}
}
