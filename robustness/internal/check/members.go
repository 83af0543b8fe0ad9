package check

import (
	"metastore/robustness/internal/history"
)

// checkSerializable: a serializable read may be old, but it shows a state that was, and a process never goes back behind
// what it has shown or acknowledged.
func checkSerializable(h *history.History, log *eventLog, out *reporter) {
	lives := map[history.Life][]*history.Op{}
	for _, o := range h.Ops {
		if o.Outcome != history.OK {
			continue
		}
		if o.Life.Number == o.LifeEnd {
			lives[o.Life] = append(lives[o.Life], o)
		}
		if o.Kind != history.Serializable {
			continue
		}
		if o.Rev > log.last {
			out.add("its revision is above the last one, %d: %s", log.last, o)
		} else if want := log.at(o.Key, o.Rev); !same(o.KVs, want) {
			out.add("at revision %d the key is %s: %s", o.Rev, want, o)
		}
	}
	for _, ops := range lives {
		overtaken(ops, func(o *history.Op) int64 { return o.Rev }, func(o, top *history.Op) {
			if o.Kind == history.Serializable {
				out.add("the process went back: %s; after %s", o, top)
			}
		})
	}
}

// checkFinals: after healing all members hold the same, and it is what the event history ends in.
func checkFinals(h *history.History, log *eventLog, out *reporter) {
	if len(h.Finals) == 0 {
		return
	}
	first := &h.Finals[0]
	var want []history.KV
	if h.Finals[0].Rev <= log.last {
		want = log.prefix("", h.Finals[0].Rev)
	}
	for i := range h.Finals {
		f := &h.Finals[i]
		if f.Rev != first.Rev {
			out.add("%s ends at revision %d, %s at %d", f.Member, f.Rev, first.Member, first.Rev)
		}
		if f.Rev != log.last {
			out.add("%s ends at revision %d, the watches at %d", f.Member, f.Rev, log.last)
		}
		if !f.HashSkipped && !first.HashSkipped && (f.Hash != first.Hash || f.CompactRev != first.CompactRev || f.HashRev != first.HashRev) {
			out.add("%s hashes to %08x at %d (compacted %d), %s to %08x at %d (compacted %d)", f.Member, f.Hash, f.HashRev,
				f.CompactRev, first.Member, first.Hash, first.HashRev, first.CompactRev)
		}
		for _, d := range differences(f.KVs, want) {
			out.add("%s at the end: %s", f.Member, d)
		}
	}
}

func differences(got, want []history.KV) []string {
	var found []string
	wants := map[string]*history.KV{}
	for i := range want {
		wants[want[i].Key] = &want[i]
	}
	for i := range got {
		w := wants[got[i].Key]
		if w == nil || *w != got[i] {
			found = append(found, "it has "+got[i].String()+", the event history "+w.String())
		}
		delete(wants, got[i].Key)
	}
	for _, w := range wants {
		found = append(found, "it lacks "+w.String())
	}
	return found
}
