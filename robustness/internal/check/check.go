// Package check judges a recorded history. Every check gives its violations as text; an empty list is a pass.
package check

import (
	"fmt"
	"sort"
	"time"

	"metastore/robustness/internal/history"
)

// Violation is one broken promise.
type Violation struct {
	Check string `json:"check"`
	Text  string `json:"text"`
}

func (v Violation) String() string { return v.Check + ": " + v.Text }

// Config bounds what the checks tolerate.
type Config struct {
	// VisualizeTo is where the HTML of a history that is not linearizable is written; empty: nowhere.
	VisualizeTo string
	// LinearizabilityTimeout bounds the search. Running out of it is reported, but is no violation.
	LinearizabilityTimeout time.Duration
	// LeaseLate is how long after its time, or after the cluster became healthy, a lease may still exist.
	LeaseLate time.Duration
}

// Report is the outcome of all checks.
type Report struct {
	Violations []Violation
	Notes      []string
	Revisions  int64 // the last revision
	Resolved   int   // unknown writes that turned out to have been done
	Dropped    int   // unknown writes that turned out not to have been done
}

// each check stops after this many findings: the first ones tell.
const perCheckMax = 10

type reporter struct {
	check  string
	report *Report
	count  int
}

func (r *reporter) add(format string, args ...any) {
	r.count++
	if r.count <= perCheckMax {
		r.report.Violations = append(r.report.Violations, Violation{r.check, fmt.Sprintf(format, args...)})
	} else if r.count == perCheckMax+1 {
		r.report.Violations = append(r.report.Violations, Violation{r.check, "and more of the same"})
	}
}

// All runs every check.
func All(h *history.History, cfg Config) *Report {
	report := &Report{}
	on := func(name string) *reporter { return &reporter{check: name, report: report} }
	log := buildLog(h, on("events"))
	report.Revisions = log.last
	checkWatches(h, log, on("watch"))
	resolved := resolve(h, log, on("outcome"), report)
	checkRevisions(h, resolved, log, on("revision"))
	checkSerializable(h, log, on("serializable"))
	checkLeases(h, log, cfg, on("lease"))
	checkFinals(h, log, on("final"))
	checkLinearizable(resolved, cfg, on("linearizability"), report)
	return report
}

// entry is one change of one key, as the watches told it and the replay completed it.
type entry struct {
	event history.Event
	rev   int64
	seen  int64 // when it was first known to have happened
}

// eventLog is the one history that all members are to agree on: every change of every key, by revision.
type eventLog struct {
	revs      map[int64]map[string]*entry
	keys      map[string][]*entry // by revision
	values    map[string][]*entry // puts by their value, which is unique to a client's write
	order     []int64             // all revisions with events
	last      int64
	firstSeen []seenAt // ascending in rev: the first time by which the revision had happened
}

type seenAt struct{ rev, time int64 }

// at gives what a key was at a revision; nil if it did not exist.
func (l *eventLog) at(key string, rev int64) *history.KV {
	e := l.change(key, rev)
	if e == nil || e.event.Deleted {
		return nil
	}
	return &e.event.KV
}

// change gives the last change of a key up to a revision.
func (l *eventLog) change(key string, rev int64) *entry {
	changes := l.keys[key]
	i := sort.Search(len(changes), func(i int) bool { return changes[i].rev > rev })
	if i == 0 {
		return nil
	}
	return changes[i-1]
}

// seen gives the first time at which somebody knew of the revision or a later one.
func (l *eventLog) seenBy(rev int64) int64 {
	i := sort.Search(len(l.firstSeen), func(i int) bool { return l.firstSeen[i].rev >= rev })
	if i == len(l.firstSeen) {
		return history.Never
	}
	return l.firstSeen[i].time
}

// buildLog merges what all watches told. Watches that contradict each other, revisions that nobody saw, and versions that
// do not follow from the changes before are violations already.
func buildLog(h *history.History, out *reporter) *eventLog {
	log := &eventLog{revs: map[int64]map[string]*entry{}, keys: map[string][]*entry{}, values: map[string][]*entry{}}
	known := map[int64]int64{} // revision -> when it was first heard of
	hear := func(rev, time int64) {
		if t, ok := known[rev]; !ok || time < t {
			known[rev] = time
		}
	}
	for _, w := range h.Watches {
		for i := range w.Responses {
			r := &w.Responses[i]
			for j := range r.Events {
				e := &r.Events[j]
				hear(e.KV.Mod, r.Time)
				at := log.revs[e.KV.Mod]
				if at == nil {
					at = map[string]*entry{}
					log.revs[e.KV.Mod] = at
				}
				if old := at[e.KV.Key]; old == nil {
					at[e.KV.Key] = &entry{event: history.Event{Deleted: e.Deleted, KV: e.KV}, rev: e.KV.Mod}
				} else if old.event.Deleted != e.Deleted || old.event.KV != e.KV {
					out.add("watch %s of %s got %s (deleted %v) at revision %d, where another watch got %s (deleted %v)",
						w.Name, w.Member, &e.KV, e.Deleted, e.KV.Mod, &old.event.KV, old.event.Deleted)
				}
			}
		}
	}
	for _, o := range h.Ops {
		if o.Outcome == history.OK {
			hear(o.Rev, o.Return)
		}
	}
	for rev := range log.revs {
		log.order = append(log.order, rev)
	}
	sort.Slice(log.order, func(i, j int) bool { return log.order[i] < log.order[j] })
	next := int64(2)
	for _, rev := range log.order {
		// What was compacted before a watch could see it is not known, but the harness compacts behind its watches.
		if rev != next {
			out.add("no watch got any event of revisions %d to %d", next, rev-1)
		}
		next = rev + 1
		var keys []string
		for key := range log.revs[rev] {
			keys = append(keys, key)
		}
		sort.Strings(keys)
		for _, key := range keys {
			e := log.revs[rev][key]
			var before *history.KV
			if c := log.keys[key]; len(c) > 0 && !c[len(c)-1].event.Deleted {
				before = &c[len(c)-1].event.KV
			}
			switch {
			case e.event.Deleted && before == nil:
				out.add("revision %d deletes %s, which did not exist", rev, key)
			case e.event.Deleted:
				if e.event.KV.Create != 0 || e.event.KV.Version != 0 || e.event.KV.Value != "" {
					out.add("the delete event of %s at %d carries more than key and revision: %s", key, rev, &e.event.KV)
				}
			case before == nil:
				if e.event.KV.Create != rev || e.event.KV.Version != 1 {
					out.add("revision %d creates %s as %s", rev, key, &e.event.KV)
				}
			default:
				if e.event.KV.Create != before.Create || e.event.KV.Version != before.Version+1 {
					out.add("revision %d makes %s of %s", rev, &e.event.KV, before)
				}
			}
			log.keys[key] = append(log.keys[key], e)
			if !e.event.Deleted {
				log.values[e.event.KV.Value] = append(log.values[e.event.KV.Value], e)
			}
		}
	}
	log.last = next - 1
	var revs []int64
	for rev := range known {
		revs = append(revs, rev)
	}
	sort.Slice(revs, func(i, j int) bool { return revs[i] > revs[j] })
	best := history.Never
	for _, rev := range revs {
		best = min(best, known[rev])
		log.firstSeen = append(log.firstSeen, seenAt{rev, best})
	}
	sort.Slice(log.firstSeen, func(i, j int) bool { return log.firstSeen[i].rev < log.firstSeen[j].rev })
	for rev, keys := range log.revs {
		for _, e := range keys {
			e.seen = log.seenBy(rev)
		}
	}
	return log
}
