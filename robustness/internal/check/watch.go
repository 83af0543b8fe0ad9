package check

import (
	"metastore/robustness/internal/history"
)

// checkWatches holds every watch against the merged history: ordered, unique, whole revisions, complete between its start
// and the last revision it has told of, the right previous values, and no progress told ahead of the events.
func checkWatches(h *history.History, log *eventLog, out *reporter) {
	for _, w := range h.Watches {
		checkWatch(w, log, h.Compacted, out)
	}
}

func checkWatch(w *history.Watch, log *eventLog, compacted int64, out *reporter) {
	type place struct {
		rev int64
		key string
	}
	got := map[place]bool{}
	last := w.StartRev - 1 // highest revision of an event so far
	told := w.StartRev - 1 // everything up to here was delivered, as the watch itself says
	open := false          // the last response was a fragment that more follows
	for i := range w.Responses {
		r := &w.Responses[i]
		at := history.Seconds(r.Time)
		if r.Progress {
			if !w.Library && r.Rev < last {
				out.add("watch %s of %s at %s: progress says revision %d after events of %d", w.Name, w.Member, at, r.Rev, last)
			}
			told = max(told, r.Rev)
			continue
		}
		if len(r.Events) == 0 {
			continue
		}
		if r.Fragment && !w.Fragments {
			out.add("watch %s of %s at %s: a fragment nobody asked for", w.Name, w.Member, at)
		}
		before := last
		for j := range r.Events {
			e := &r.Events[j]
			rev := e.KV.Mod
			switch {
			case rev < w.StartRev:
				out.add("watch %s of %s at %s: event of revision %d before its start %d", w.Name, w.Member, at, rev, w.StartRev)
			case rev < last:
				out.add("watch %s of %s at %s: event of revision %d (%s) after one of %d", w.Name, w.Member, at, rev, e.KV.Key, last)
			case rev == before && !open && last == before && before >= w.StartRev:
				out.add("watch %s of %s at %s: revision %d is split over responses", w.Name, w.Member, at, rev)
			}
			if rev <= told {
				out.add("watch %s of %s at %s: event of revision %d after progress told of %d", w.Name, w.Member, at, rev, told)
			}
			if rev > r.Rev {
				out.add("watch %s of %s at %s: event of revision %d in a response whose header says %d", w.Name, w.Member, at, rev, r.Rev)
			}
			if !w.Covers(e.KV.Key) {
				out.add("watch %s of %s at %s: event of %s, which it does not watch", w.Name, w.Member, at, e.KV.Key)
			}
			if got[place{rev, e.KV.Key}] {
				out.add("watch %s of %s at %s: event of %s at %d came twice", w.Name, w.Member, at, e.KV.Key, rev)
			}
			got[place{rev, e.KV.Key}] = true
			last = max(last, rev)
			checkPrev(w, e, at, log, compacted, out)
		}
		open = r.Fragment
	}
	until := max(last, told)
	if w.Whole {
		until = log.last
	}
	missing := 0
	for _, rev := range log.order {
		if rev < w.StartRev {
			continue
		}
		if rev > until {
			break
		}
		for key := range log.revs[rev] {
			if w.Covers(key) && !got[place{rev, key}] {
				missing++
				if missing <= 3 {
					out.add("watch %s of %s (from revision %d, told of %d) never got the event of %s at %d",
						w.Name, w.Member, w.StartRev, until, key, rev)
				}
			}
		}
	}
	if missing > 3 {
		out.add("watch %s of %s missed %d events in all", w.Name, w.Member, missing)
	}
}

func checkPrev(w *history.Watch, e *history.Event, at string, log *eventLog, compacted int64, out *reporter) {
	want := log.at(e.KV.Key, e.KV.Mod-1)
	switch {
	case want == nil && e.Prev == nil:
	case want == nil || e.Prev == nil || *want != *e.Prev:
		if e.Prev == nil && e.KV.Mod <= compacted {
			return // compacted away
		}
		out.add("watch %s of %s at %s: event of %s at %d has previous %s, right is %s", w.Name, w.Member, at, e.KV.Key,
			e.KV.Mod, e.Prev, want)
	}
}
