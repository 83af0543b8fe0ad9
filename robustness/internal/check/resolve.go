package check

import (
	"sort"

	"metastore/robustness/internal/history"
)

// resolved is an operation with what the event history adds to it.
type resolved struct {
	*history.Op
	rev  int64 // the revision it made or read
	ret  int64 // the latest time by which it had happened
	done bool  // it happened (known, or found in the event history)
	// byServer marks a deletion that no acknowledged operation explains: by an unknown delete, a revoke or an expiry.
	byServer bool
}

// resolve settles the operations whose outcome their client did not learn: values are unique, so one that appears in the
// event history was written by that operation, at that revision; one that never appears was not. It also holds what was
// acknowledged, or refused, against the event history.
func resolve(h *history.History, log *eventLog, out *reporter, report *Report) []*resolved {
	var all []*resolved
	claimed := map[int64]*history.Op{} // revisions by the acknowledged or resolved write that made them
	claim := func(rev int64, o *history.Op) {
		if other := claimed[rev]; other != nil && other != o {
			out.add("revision %d belongs to two operations: %s; and %s", rev, other, o)
		}
		claimed[rev] = o
	}
	unknownDeletes := map[string][]*history.Op{}
	writers := map[string]*history.Op{}
	for _, o := range h.Ops {
		if o.Kind == history.Serializable {
			continue
		}
		if o.Value != "" {
			writers[o.Value] = o
		}
		r := &resolved{Op: o, rev: o.Rev, ret: o.Return, done: o.Outcome == history.OK}
		made := log.values[o.Value]
		if o.Value == "" || !o.Writes() {
			made = nil
		}
		if len(made) > 1 {
			out.add("done %d times, at revisions %d and %d: %s", len(made), made[0].rev, made[1].rev, o)
		}
		for _, e := range made {
			if e.event.KV.Key != o.Key {
				out.add("wrote to %s: %s", e.event.KV.Key, o)
			}
			if e.seen < o.Call {
				out.add("its effect at revision %d was seen at %s, before it was called: %s", e.rev, history.Seconds(e.seen), o)
			}
			if o.Lease != e.event.KV.Lease {
				out.add("the key got lease %x: %s", e.event.KV.Lease, o)
			}
		}
		switch o.Outcome {
		case history.Refused:
			if len(made) > 0 {
				out.add("refused, and yet done at revision %d: %s", made[0].rev, o)
			}
			continue
		case history.OK:
			if o.Writes() && o.Changed() {
				if o.Kind != history.Delete {
					if len(made) == 0 {
						out.add("acknowledged, but in no watch: %s", o)
					} else if made[0].rev != o.Rev {
						out.add("acknowledged at %d, but watches have it at %d: %s", o.Rev, made[0].rev, o)
					}
				} else if e := log.revs[o.Rev][o.Key]; e == nil || !e.event.Deleted {
					out.add("acknowledged, but no watch has the deletion at that revision: %s", o)
				}
				claim(o.Rev, o)
			} else if len(made) > 0 {
				out.add("its compare failed, and yet it wrote at revision %d: %s", made[0].rev, o)
			}
		case history.Unknown:
			if !o.Writes() {
				continue
			}
			if o.Kind == history.Delete {
				unknownDeletes[o.Key] = append(unknownDeletes[o.Key], o)
				continue
			}
			if len(made) == 0 {
				report.Dropped++
				continue
			}
			report.Resolved++
			r.rev, r.ret, r.done = made[0].rev, made[0].seen, true
			r.ret = max(r.ret, o.Call)
			claim(r.rev, o)
		}
		if o.Kind == history.MultiPut && r.done {
			second := log.revs[r.rev][o.Key2]
			if second == nil || second.event.Deleted || second.event.KV.Value != o.Value2 {
				out.add("the second key was not written at revision %d: %s", r.rev, o)
			}
		}
		all = append(all, r)
	}
	leases := map[string]*history.Lease{}
	for _, l := range h.Leases {
		for _, k := range l.Keys {
			leases[k] = l
		}
	}
	// What is left: every put must have a writer, and every deletion a cause.
	for key, changes := range log.keys {
		var open []*entry
		for _, e := range changes {
			if !e.event.Deleted {
				w := writers[e.event.KV.Value]
				if w == nil && !secondValue(log, e) {
					out.add("nobody wrote %s", &e.event.KV)
				}
				continue
			}
			if o := claimed[e.rev]; o != nil && o.Kind == history.Delete && o.Key == key {
				continue
			}
			open = append(open, e)
		}
		causes := unknownDeletes[key]
		sort.Slice(causes, func(i, j int) bool { return causes[i].Call < causes[j].Call })
		sort.Slice(open, func(i, j int) bool { return open[i].seen < open[j].seen })
		next := 0
		for _, e := range open {
			call := int64(0)
			if lease := leases[key]; lease != nil {
				call = lease.GrantCall
			} else if next < len(causes) && causes[next].Call <= e.seen {
				call = causes[next].Call
				next++
				report.Resolved++
			} else {
				out.add("%s was deleted at revision %d, and nobody asked for it", key, e.rev)
				continue
			}
			// Which of several unknown deletes it was does not matter: the earliest call gives it the most room.
			if len(causes) > 0 && leases[key] == nil {
				call = causes[0].Call
			}
			all = append(all, &resolved{
				Op: &history.Op{Client: -1, Kind: history.Delete, Key: key, Call: call, Return: e.seen, Outcome: history.OK,
					Rev: e.rev, Deleted: 1},
				rev: e.rev, ret: max(e.seen, call), done: true, byServer: true,
			})
		}
		report.Dropped += len(causes) - next
	}
	return all
}

// secondValue tells whether a put is the second of a transaction that writes two keys.
func secondValue(log *eventLog, e *entry) bool {
	for _, other := range log.revs[e.rev] {
		if other != e && !other.event.Deleted && other.event.KV.Value+"'" == e.event.KV.Value {
			return true
		}
	}
	return false
}
