package check

import (
	"fmt"
	"sort"

	"github.com/anishathalye/porcupine"

	"metastore/robustness/internal/history"
)

// keyState is one key as the model sees it. rev is the revision of its last change, a deletion included; -1 stands for one
// that only a write of unknown outcome could tell.
type keyState struct {
	exists  bool
	value   string
	rev     int64
	create  int64
	version int64
}

const unknownRev = -1

// input is an operation on one key. An operation on two keys becomes two inputs, one for each.
type input struct {
	op    *resolved
	kind  history.Kind
	key   string
	value string
}

// checkLinearizable gives each key's history to the checker. It does not take for granted that revisions are right, as
// checkRevisions does: it searches an order, and then demands that the revisions fit it.
func checkLinearizable(ops []*resolved, cfg Config, out *reporter, report *Report) {
	var settled []*resolved
	for _, o := range ops {
		if o.Kind != history.Range && (o.done || o.Outcome == history.OK) {
			settled = append(settled, o)
		}
	}
	search(settled, cfg, out, report)
}

// search looks for an order. Operations that are not done, as far as is known, may be among them.
func search(ops []*resolved, cfg Config, out *reporter, report *Report) {
	var all []porcupine.Operation
	add := func(o *resolved, key, value string) {
		ret := o.ret
		if ret == history.Never {
			// Something after every other time, which the picture can still show.
			ret = 1 << 60
		}
		all = append(all, porcupine.Operation{ClientId: o.Client + 1, Input: input{o, o.Kind, key, value}, Call: o.Call,
			Output: o.Outcome, Return: ret})
	}
	for _, o := range ops {
		add(o, o.Key, o.Value)
		if o.Kind == history.MultiPut {
			add(o, o.Key2, o.Value2)
		}
	}
	result, info := porcupine.CheckOperationsVerbose(model, all, cfg.LinearizabilityTimeout)
	switch result {
	case porcupine.Ok:
		return
	case porcupine.Unknown:
		report.Notes = append(report.Notes, fmt.Sprintf("linearizability: no answer within %v", cfg.LinearizabilityTimeout))
		return
	}
	var bad []string
	for _, part := range partition(all) {
		if porcupine.CheckOperationsTimeout(model, part, cfg.LinearizabilityTimeout) == porcupine.Illegal {
			bad = append(bad, part[0].Input.(input).key)
		}
	}
	where := ""
	if cfg.VisualizeTo != "" {
		if err := porcupine.VisualizePath(model, info, cfg.VisualizeTo); err != nil {
			where = fmt.Sprintf(" (the picture could not be written: %v)", err)
		} else {
			where = "; see " + cfg.VisualizeTo
		}
	}
	out.add("the histories of these keys have no order that explains them: %v%s", bad, where)
}

func partition(ops []porcupine.Operation) [][]porcupine.Operation {
	keys := map[string][]porcupine.Operation{}
	for _, o := range ops {
		key := o.Input.(input).key
		keys[key] = append(keys[key], o)
	}
	var names []string
	for k := range keys {
		names = append(names, k)
	}
	sort.Strings(names)
	var parts [][]porcupine.Operation
	for _, n := range names {
		parts = append(parts, keys[n])
	}
	return parts
}

var model = porcupine.Model{
	Partition: partition,
	Init:      func() any { return keyState{} },
	Step: func(s, in, _ any) (bool, any) {
		return step(s.(keyState), in.(input))
	},
	DescribeOperation: func(in, _ any) string { return describe(in.(input).op) },
	DescribeState:     func(s any) string { return fmt.Sprintf("%+v", s) },
}

// step is the model of one key. An operation of unknown outcome that the event history could not settle may take effect at
// any time after its call, the end of the run included, so that it counts as done: at the end it harms nobody.
func step(s keyState, in input) (bool, keyState) {
	o := in.op
	switch in.kind {
	case history.Get:
		return s.shows(o.KVs) && o.rev >= s.rev, s.learn(o.KVs)
	case history.Put, history.MultiPut:
		if !o.done {
			return true, s.put(in.value, unknownRev)
		}
		if o.rev <= s.rev || o.Outcome == history.OK && o.AskPrev && !s.was(o.Prev) {
			return false, s
		}
		return true, s.put(in.value, o.rev)
	case history.Delete:
		if !o.done {
			if !s.exists {
				return true, s
			}
			return true, keyState{rev: unknownRev}
		}
		if (o.Deleted > 0) != s.exists || o.AskPrev && !s.was(o.Prev) {
			return false, s
		}
		if o.Deleted == 0 {
			return o.rev >= s.rev, s
		}
		return o.rev > s.rev, keyState{rev: o.rev}
	case history.CAS, history.CASValue:
		holds := s.compare(o.Op)
		if !o.done {
			if holds == no {
				return true, s
			}
			return true, s.put(in.value, unknownRev)
		}
		if o.Outcome == history.OK && !o.Succeeded {
			return holds != yes && s.shows(o.KVs) && o.rev >= s.rev, s.learn(o.KVs)
		}
		return holds != no && o.rev > s.rev, s.put(in.value, o.rev)
	}
	return false, s
}

func (s keyState) put(value string, rev int64) keyState {
	next := keyState{exists: true, value: value, rev: rev, create: s.create, version: s.version + 1}
	if !s.exists {
		next.create, next.version = rev, 1
	}
	return next
}

// shows tells whether a read that gave this can have seen the state.
func (s keyState) shows(kvs []history.KV) bool {
	if len(kvs) == 0 {
		return !s.exists
	}
	return len(kvs) == 1 && s.was(&kvs[0])
}

func (s keyState) was(kv *history.KV) bool {
	if kv == nil || !s.exists {
		return kv == nil && !s.exists
	}
	return kv.Value == s.value && kv.Version == s.version && (s.rev == unknownRev || kv.Mod == s.rev) &&
		(s.create == unknownRev || kv.Create == s.create)
}

// learn fills in what a read told of a write of unknown outcome.
func (s keyState) learn(kvs []history.KV) keyState {
	if len(kvs) == 1 {
		s.rev, s.create = kvs[0].Mod, kvs[0].Create
	}
	return s
}

type answer int

const (
	no answer = iota
	yes
	perhaps
)

func (s keyState) compare(o *history.Op) answer {
	if o.Kind == history.CASValue {
		return map[bool]answer{true: yes, false: no}[s.exists && s.value == o.ExpectValue]
	}
	switch {
	case !s.exists:
		return map[bool]answer{true: yes, false: no}[o.ExpectMod == 0]
	case s.rev != unknownRev:
		return map[bool]answer{true: yes, false: no}[s.rev == o.ExpectMod]
	case o.Outcome == history.Unknown:
		// Its expectation came from a linearizable read, which would have told the model the revision.
		return no
	}
	return perhaps
}
