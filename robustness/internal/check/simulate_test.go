package check

import (
	"fmt"
	"math/rand/v2"
	"sort"

	"metastore/robustness/internal/history"
)

const ms = int64(1e6)

// simulation is a correct store with clients whose calls overlap: a history without fault, into which the tests plant them.
type simulation struct {
	rng  *rand.Rand
	now  int64
	rev  int64
	keys map[string]history.KV
	log  []simEvent
	h    history.History
}

type simEvent struct {
	event history.Event
	at    int64
}

func simulate(seed uint64, count int) *history.History {
	s := &simulation{rng: rand.New(rand.NewPCG(seed, 0)), rev: 1, now: 1000 * ms, keys: map[string]history.KV{}}
	s.lease(0x11, 2, "l/11/0")
	s.lease(0x22, 3, "l/22/0")
	for i := range count {
		s.now += 10 * ms
		s.op(i)
	}
	s.now += 5000 * ms
	s.expire("l/11/0")
	s.revoke("l/22/0")
	s.now += 100 * ms
	s.one(&history.Op{Kind: history.Put, Key: "end", Value: "end"}, history.OK)
	for _, member := range []string{"m1", "m2", "m3"} {
		s.watch(member, 1, "\x00", "\x00", true)
		s.watch(member, s.rev/2, "h/", "h0", false)
		f := history.Final{Member: member, Rev: s.rev, Hash: 42, HashRev: s.rev, CompactRev: -1}
		for _, kv := range s.keys {
			f.KVs = append(f.KVs, kv)
		}
		sort.Slice(f.KVs, func(i, j int) bool { return f.KVs[i].Key < f.KVs[j].Key })
		s.h.Finals = append(s.h.Finals, f)
	}
	s.h.HealthyAt, s.h.EndedAt = s.now, s.now
	return &s.h
}

func (s *simulation) op(i int) {
	key := fmt.Sprintf("h/%d", s.rng.IntN(3))
	o := &history.Op{Key: key}
	switch s.rng.IntN(9) {
	case 0, 1:
		o.Kind, o.Value, o.AskPrev = history.Put, fmt.Sprintf("v%d", i), s.rng.IntN(2) == 0
	case 2:
		o.Kind = history.Get
	case 3:
		o.Kind = history.Serializable
	case 4:
		o.Kind, o.AskPrev = history.Delete, s.rng.IntN(2) == 0
	case 5:
		o.Kind, o.Key = history.Range, "h/"
	case 6:
		o.Kind, o.Key, o.Key2, o.Value = history.MultiPut, "t/a", "t/b", fmt.Sprintf("v%d", i)
		o.Value2 = o.Value + "'"
	case 7:
		o.Kind, o.Value, o.ExpectMod = history.CAS, fmt.Sprintf("v%d", i), s.keys[key].Mod
		if s.rng.IntN(3) == 0 {
			o.ExpectMod++
		}
	case 8:
		o.Kind, o.Value, o.ExpectValue = history.CASValue, fmt.Sprintf("v%d", i), s.keys[key].Value
	}
	outcome := history.OK
	if n := s.rng.IntN(20); n == 0 {
		outcome = history.Unknown
	} else if n == 1 {
		outcome = history.Refused
	}
	s.one(o, outcome)
}

// one carries an operation out at the present moment; its call was a little earlier, its return is a little later.
func (s *simulation) one(o *history.Op, outcome history.Outcome) {
	o.ID = len(s.h.Ops) + 1
	o.Client = o.ID % 6
	member := fmt.Sprintf("m%d", o.ID%3+1)
	o.Life, o.LifeEnd = history.Life{Member: member, Number: 1}, 1
	o.Call, o.Return = s.now-1-s.rng.Int64N(25*ms), s.now+1+s.rng.Int64N(25*ms)
	o.Outcome, o.ClusterID, o.Term = outcome, 7, 2
	s.h.Ops = append(s.h.Ops, o)
	switch outcome {
	case history.Refused:
		o.Err = "refused"
		return
	case history.Unknown:
		o.Err, o.Return = "unknown", history.Never
		if s.rng.IntN(2) == 0 {
			return
		}
	}
	before, exists := s.keys[o.Key]
	var prev *history.KV
	if exists {
		prev = &before
	}
	reply := *o
	switch o.Kind {
	case history.Get, history.Serializable:
		if exists {
			reply.KVs = []history.KV{before}
		}
	case history.Range:
		for _, kv := range s.keys {
			if kv.Key >= "h/" && kv.Key < "h0" {
				reply.KVs = append(reply.KVs, kv)
			}
		}
		sort.Slice(reply.KVs, func(i, j int) bool { return reply.KVs[i].Key < reply.KVs[j].Key })
	case history.Put:
		s.rev++
		s.put(o.Key, o.Value, o.Lease)
		if o.AskPrev {
			reply.Prev = prev
		}
	case history.MultiPut:
		s.rev++
		s.put(o.Key, o.Value, 0)
		s.put(o.Key2, o.Value2, 0)
	case history.Delete:
		if exists {
			s.rev++
			s.del(o.Key)
			reply.Deleted = 1
			if o.AskPrev {
				reply.Prev = prev
			}
		}
	case history.CAS, history.CASValue:
		if fits(o, prev) {
			s.rev++
			s.put(o.Key, o.Value, 0)
			reply.Succeeded = true
		} else if exists {
			reply.KVs = []history.KV{before}
		}
	}
	if outcome == history.OK {
		*o = reply
		o.Rev = s.rev
	}
}

func (s *simulation) put(key, value string, lease int64) {
	before, exists := s.keys[key]
	kv := history.KV{Key: key, Value: value, Create: s.rev, Mod: s.rev, Version: 1, Lease: lease}
	e := history.Event{}
	if exists {
		kv.Create, kv.Version = before.Create, before.Version+1
		e.Prev = &before
	}
	e.KV = kv
	s.keys[key] = kv
	s.log = append(s.log, simEvent{e, s.now})
}

func (s *simulation) del(key string) {
	before := s.keys[key]
	delete(s.keys, key)
	s.log = append(s.log, simEvent{history.Event{Deleted: true, KV: history.KV{Key: key, Mod: s.rev}, Prev: &before}, s.now})
}

func (s *simulation) lease(id, ttl int64, key string) {
	s.now += 10 * ms
	l := &history.Lease{ID: id, TTL: ttl, Keys: []string{key}, GrantCall: s.now, GrantReturn: s.now + ms, GrantOutcome: history.OK}
	s.now += 10 * ms
	s.one(&history.Op{Kind: history.Put, Key: key, Value: "lv" + key, Lease: id}, history.OK)
	l.KeepAlives = []history.KeepAlive{{Send: s.now + 100*ms, Return: s.now + 101*ms, Outcome: history.OK, TTL: ttl}}
	s.h.Leases = append(s.h.Leases, l)
}

func (s *simulation) expire(key string) {
	s.now += 100 * ms
	s.rev++
	s.del(key)
}

func (s *simulation) revoke(key string) {
	s.now += 100 * ms
	s.h.Leases[1].RevokeCall = s.now - ms
	s.rev++
	s.del(key)
}

func (s *simulation) watch(member string, start int64, key, end string, whole bool) {
	w := &history.Watch{Name: fmt.Sprintf("sim-%s-%d", member, start), Member: member, Key: key, End: end, StartRev: start, Whole: whole}
	for i := 0; i < len(s.log); {
		rev, at := s.log[i].event.KV.Mod, s.log[i].at
		r := history.WatchResponse{Rev: rev}
		for ; i < len(s.log) && s.log[i].event.KV.Mod == rev; i++ {
			if rev >= start && w.Covers(s.log[i].event.KV.Key) {
				r.Events = append(r.Events, s.log[i].event)
			}
		}
		r.Time = at + 1 + s.rng.Int64N(5*ms)
		if len(r.Events) == 0 {
			continue
		}
		w.Responses = append(w.Responses, r)
		if s.rng.IntN(10) == 0 {
			w.Responses = append(w.Responses, history.WatchResponse{Time: r.Time, Rev: rev, Progress: true})
		}
	}
	s.h.Watches = append(s.h.Watches, w)
}
