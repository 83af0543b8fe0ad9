// Package history holds what a run recorded: every client operation, every watch response, every lease, and the final
// state of every member. The checks read nothing else.
package history

import (
	"fmt"
	"math"
	"sync"
	"time"
)

// Never stands for the return time of an operation whose outcome nobody learned.
const Never int64 = math.MaxInt64

// Clock gives nanoseconds since the run began, by one monotonic clock for all clients.
type Clock struct{ start time.Time }

func NewClock() *Clock { return &Clock{start: time.Now()} }

func (c *Clock) Now() int64 { return int64(time.Since(c.start)) }

type Kind string

const (
	Put          Kind = "put"
	Get          Kind = "get"          // linearizable, one key
	Serializable Kind = "serializable" // one key, from the member itself
	Range        Kind = "range"        // linearizable, a prefix
	Delete       Kind = "delete"
	CAS          Kind = "cas"      // if mod(key) == ExpectMod then put, else get
	CASValue     Kind = "casvalue" // if value(key) == ExpectValue then put, else get
	MultiPut     Kind = "multiput" // one transaction that puts Key and Key2
)

type Outcome string

const (
	OK      Outcome = "ok"
	Refused Outcome = "refused" // certainly not done
	Unknown Outcome = "unknown" // perhaps done, perhaps later
)

type KV struct {
	Key     string `json:"key"`
	Value   string `json:"value"`
	Create  int64  `json:"create"`
	Mod     int64  `json:"mod"`
	Version int64  `json:"version"`
	Lease   int64  `json:"lease,omitempty"`
}

func (k *KV) String() string {
	if k == nil {
		return "nothing"
	}
	return fmt.Sprintf("%s=%q mod %d create %d version %d lease %x", k.Key, k.Value, k.Mod, k.Create, k.Version, k.Lease)
}

// Life names one process of one member: reads promise more within a life than across lives.
type Life struct {
	Member string `json:"member"`
	Number int    `json:"number"`
}

// Op is one client call.
type Op struct {
	ID          int     `json:"id"`
	Client      int     `json:"client"`
	Kind        Kind    `json:"kind"`
	Key         string  `json:"key"`
	Key2        string  `json:"key2,omitempty"`
	Value       string  `json:"value,omitempty"`
	Value2      string  `json:"value2,omitempty"`
	ExpectMod   int64   `json:"expect_mod,omitempty"`
	ExpectValue string  `json:"expect_value,omitempty"`
	Lease       int64   `json:"lease,omitempty"`
	AskPrev     bool    `json:"ask_prev,omitempty"`
	Life        Life    `json:"life"`
	LifeEnd     int     `json:"life_end"` // the member's life when the reply came
	Call        int64   `json:"call"`
	Return      int64   `json:"return"`
	Outcome     Outcome `json:"outcome"`
	Err         string  `json:"err,omitempty"`
	Code        string  `json:"code,omitempty"`
	Rev         int64   `json:"rev,omitempty"` // header revision
	Term        uint64  `json:"term,omitempty"`
	ClusterID   uint64  `json:"cluster_id,omitempty"`
	Succeeded   bool    `json:"succeeded,omitempty"` // of a compare
	Deleted     int64   `json:"deleted,omitempty"`
	KVs         []KV    `json:"kvs,omitempty"` // read, or by the failure branch
	Prev        *KV     `json:"prev,omitempty"`
}

// Writes tells whether the operation can change anything.
func (o *Op) Writes() bool {
	switch o.Kind {
	case Get, Serializable, Range:
		return false
	}
	return true
}

// Changed tells whether an operation that succeeded changed something, so that its header revision is its own.
func (o *Op) Changed() bool {
	switch o.Kind {
	case Put, MultiPut:
		return true
	case Delete:
		return o.Deleted > 0
	case CAS, CASValue:
		return o.Succeeded
	}
	return false
}

func (o *Op) String() string {
	text := fmt.Sprintf("op %d (client %d at %s life %d, %s..%s) %s %s", o.ID, o.Client, o.Life.Member, o.Life.Number,
		Seconds(o.Call), Seconds(o.Return), o.Kind, o.Key)
	if o.Key2 != "" {
		text += "+" + o.Key2
	}
	if o.Value != "" {
		text += " value " + o.Value
	}
	text += " -> " + string(o.Outcome)
	if o.Outcome == OK {
		text += fmt.Sprintf(" rev %d", o.Rev)
		if o.Kind == CAS || o.Kind == CASValue {
			text += fmt.Sprintf(" succeeded %v", o.Succeeded)
		}
		if o.Kind == Delete {
			text += fmt.Sprintf(" deleted %d", o.Deleted)
		}
		for i := range o.KVs {
			text += " [" + o.KVs[i].String() + "]"
		}
	} else {
		text += " " + o.Err
	}
	return text
}

// Seconds writes a time of the run for people.
func Seconds(t int64) string {
	if t == Never {
		return "never"
	}
	return fmt.Sprintf("%.3fs", float64(t)/1e9)
}

// Event is one watch event.
type Event struct {
	Deleted bool `json:"deleted,omitempty"`
	KV      KV   `json:"kv"`
	Prev    *KV  `json:"prev,omitempty"`
}

type WatchResponse struct {
	Time     int64   `json:"time"`
	Rev      int64   `json:"rev"` // header revision
	Progress bool    `json:"progress,omitempty"`
	Fragment bool    `json:"fragment,omitempty"`
	Events   []Event `json:"events,omitempty"`
}

// Watch is what one watcher received. A raw watch is one watcher of one stream; a library watch is one channel of the
// official client, which resumes over broken connections by itself.
type Watch struct {
	Name      string          `json:"name"`
	Member    string          `json:"member"`
	Library   bool            `json:"library,omitempty"`
	Key       string          `json:"key"`
	End       string          `json:"end,omitempty"`
	StartRev  int64           `json:"start_rev"`
	Fragments bool            `json:"fragments,omitempty"` // asked for
	Whole     bool            `json:"whole,omitempty"`     // it reached the last revision
	Compacted int64           `json:"compacted,omitempty"` // cancelled with this compact revision
	Responses []WatchResponse `json:"responses,omitempty"`
}

// Covers tells whether the watch is to receive the events of a key.
func (w *Watch) Covers(key string) bool {
	switch w.End {
	case "":
		return key == w.Key
	case "\x00":
		return key >= w.Key
	}
	return key >= w.Key && key < w.End
}

type KeepAlive struct {
	Send    int64   `json:"send"`
	Return  int64   `json:"return"`
	Outcome Outcome `json:"outcome"` // OK only if the server said that the lease lives
	TTL     int64   `json:"ttl"`
	Err     string  `json:"err,omitempty"`
	Member  string  `json:"member"`
}

// Lease is the life of a lease as its client saw it. Its keys are attached to no other lease.
type Lease struct {
	ID           int64       `json:"id"`
	TTL          int64       `json:"ttl"` // seconds, as the server granted
	Keys         []string    `json:"keys"`
	GrantCall    int64       `json:"grant_call"`
	GrantReturn  int64       `json:"grant_return"`
	GrantOutcome Outcome     `json:"grant_outcome"`
	KeepAlives   []KeepAlive `json:"keep_alives,omitempty"`
	RevokeCall   int64       `json:"revoke_call,omitempty"` // 0: not revoked by the client
	Kept         bool        `json:"kept,omitempty"`        // kept alive until the end
}

// LastAttempt is when the client last sent anything that can have prolonged the lease.
func (l *Lease) LastAttempt() int64 {
	last := l.GrantCall
	if l.GrantOutcome == OK {
		last = l.GrantReturn
	}
	for _, k := range l.KeepAlives {
		last = max(last, k.Send, k.Return)
	}
	return last
}

// Final is what one member said after the run.
type Final struct {
	Member      string `json:"member"`
	Rev         int64  `json:"rev"`
	KVs         []KV   `json:"kvs"`
	Hash        uint32 `json:"hash"`
	HashRev     int64  `json:"hash_rev"`
	CompactRev  int64  `json:"compact_rev"`
	HashSkipped bool   `json:"hash_skipped,omitempty"`
}

// History is everything a run recorded.
type History struct {
	Ops       []*Op    `json:"ops"`
	Watches   []*Watch `json:"watches"`
	Leases    []*Lease `json:"leases"`
	Finals    []Final  `json:"finals"`
	Compacted int64    `json:"compacted,omitempty"` // highest revision the run compacted at
	// EndedAt is when leases were last observed: a lease that expires later than this is none of the checks' business.
	EndedAt int64 `json:"ended_at"`
	// HealthyAt is when all faults were healed and every member served again.
	HealthyAt int64 `json:"healthy_at"`
}

// Recorder collects from many goroutines.
type Recorder struct {
	mu   sync.Mutex
	h    History
	next int
	ok   int
	bad  map[Outcome]int
}

func NewRecorder() *Recorder { return &Recorder{bad: map[Outcome]int{}} }

// Add takes a finished operation.
func (r *Recorder) Add(o *Op) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next++
	o.ID = r.next
	r.h.Ops = append(r.h.Ops, o)
	if o.Outcome == OK {
		r.ok++
	} else {
		r.bad[o.Outcome]++
	}
}

func (r *Recorder) AddWatch(w *Watch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.h.Watches = append(r.h.Watches, w)
}

func (r *Recorder) AddLease(l *Lease) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.h.Leases = append(r.h.Leases, l)
}

// Counts gives how many operations ended in which way so far.
func (r *Recorder) Counts() (ok, refused, unknown int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ok, r.bad[Refused], r.bad[Unknown]
}

// Ops gives the operations recorded so far. The operations themselves do not change any more.
func (r *Recorder) Ops() []*Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.h.Ops[:len(r.h.Ops):len(r.h.Ops)]
}

// History hands everything over; nothing may be recorded afterwards.
func (r *Recorder) History() *History {
	r.mu.Lock()
	defer r.mu.Unlock()
	return &r.h
}
