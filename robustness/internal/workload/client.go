// Package workload is what the clients do: operations on few hot keys and some cold ones, leases, and watches, each client
// bound to one member.
package workload

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"metastore/robustness/internal/cluster"
	"metastore/robustness/internal/history"
)

type Config struct {
	ClientsPerMember int
	Rate             int // operations a second of all clients together
	OpTimeout        time.Duration
	Leases           bool
	Seed             uint64
	// ValueBytes pads values; 0 leaves them short.
	ValueBytes int
	Only       []history.Kind
}

const (
	hotKeys    = 3
	coldKeys   = 20
	generation = 4 * time.Second // the hot keys get new names after this, which keeps each key's history short
)

// Workload runs clients against a cluster until it is stopped.
type Workload struct {
	cfg     Config
	cluster *cluster.Cluster
	rec     *history.Recorder
	clock   *history.Clock
	stop    context.CancelFunc
	wait    sync.WaitGroup
	leases  context.CancelFunc
	lwait   sync.WaitGroup
	values  atomic.Int64
	clients atomic.Int64
	lastOK  atomic.Int64 // return time of the last write that succeeded
	kept    sync.Map     // keys of leases that are kept alive until the end
}

// Start starts the clients.
func Start(ctx context.Context, c *cluster.Cluster, rec *history.Recorder, clock *history.Clock, cfg Config) (*Workload, error) {
	w := &Workload{cfg: cfg, cluster: c, rec: rec, clock: clock}
	ops, stop := context.WithCancel(ctx)
	w.stop = stop
	leases, stopLeases := context.WithCancel(ctx)
	w.leases = stopLeases
	total := cfg.ClientsPerMember * len(c.Members)
	for i := range total {
		m := c.Members[i%len(c.Members)]
		cli, err := c.NewClient(m)
		if err != nil {
			w.Stop()
			return nil, err
		}
		s := &session{w: w, cli: cli, member: m, id: int(w.clients.Add(1)), rng: rand.New(rand.NewPCG(cfg.Seed, uint64(i)))}
		w.wait.Go(func() {
			defer cli.Close()
			s.loop(ops, time.Second*time.Duration(total)/time.Duration(cfg.Rate))
		})
	}
	if cfg.Leases {
		for i, m := range c.Members {
			cli, err := c.NewClient(m)
			if err != nil {
				w.Stop()
				return nil, err
			}
			s := &session{w: w, cli: cli, member: m, id: int(w.clients.Add(1)), rng: rand.New(rand.NewPCG(cfg.Seed, uint64(1000+i)))}
			w.lwait.Go(func() {
				defer cli.Close()
				s.leaseLoop(ops, leases)
			})
		}
	}
	return w, nil
}

// StopOps ends the operations; leases that are kept alive stay so.
func (w *Workload) StopOps() {
	w.stop()
	w.wait.Wait()
}

// Stop ends everything; leases that were kept alive are revoked.
func (w *Workload) Stop() {
	w.StopOps()
	w.leases()
	w.lwait.Wait()
}

// LastWrite is when the last write succeeded.
func (w *Workload) LastWrite() int64 { return w.lastOK.Load() }

// KeptKey tells whether the key belongs to a lease that is kept alive until Stop.
func (w *Workload) KeptKey(key string) bool {
	_, kept := w.kept.Load(key)
	return kept
}

// session is one client.
type session struct {
	w      *Workload
	cli    *clientv3.Client
	member *cluster.Member
	id     int
	rng    *rand.Rand
}

func (s *session) value() string {
	v := fmt.Sprintf("v%d", s.w.values.Add(1))
	if pad := s.w.cfg.ValueBytes - len(v); pad > 0 {
		v += strings.Repeat(".", pad)
	}
	return v
}

func (s *session) loop(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.one(ctx)
	}
}

func (s *session) one(ctx context.Context) {
	gen := s.w.clock.Now() / int64(generation)
	key := fmt.Sprintf("h/%d/%d", gen, s.rng.IntN(hotKeys))
	if s.rng.IntN(20) == 0 {
		key = fmt.Sprintf("c/%d", s.rng.IntN(coldKeys))
	}
	o := &history.Op{Key: key}
	switch n := s.rng.IntN(100); {
	case n < 28:
		o.Kind, o.Value, o.AskPrev = history.Put, s.value(), s.rng.IntN(2) == 0
	case n < 48:
		o.Kind = history.Get
	case n < 60:
		o.Kind = history.Serializable
	case n < 68:
		o.Kind, o.AskPrev = history.Delete, s.rng.IntN(2) == 0
	case n < 74:
		o.Kind, o.Key = history.Range, fmt.Sprintf("h/%d/", gen)
	case n < 82:
		o.Kind, o.Value = history.MultiPut, s.value()
		o.Key, o.Key2 = fmt.Sprintf("t/%d/a", gen), fmt.Sprintf("t/%d/b", gen)
		o.Value2 = o.Value + "'"
	default:
		// What the compare expects comes from a linearizable read of its own.
		read := s.do(ctx, &history.Op{Kind: history.Get, Key: key})
		if read.Outcome != history.OK {
			return
		}
		o.Kind, o.Value = history.CAS, s.value()
		if len(read.KVs) == 1 {
			o.ExpectMod = read.KVs[0].Mod
			if s.rng.IntN(2) == 0 {
				o.Kind, o.ExpectMod, o.ExpectValue = history.CASValue, 0, read.KVs[0].Value
			}
		}
	}
	s.do(ctx, o)
}

// do carries one operation out and records it. It is not cut short when the clients are to stop: its own timeout bounds it.
func (s *session) do(_ context.Context, o *history.Op) *history.Op {
	ctx, cancel := context.WithTimeout(context.Background(), s.w.cfg.OpTimeout)
	defer cancel()
	o.Client = s.id
	o.Life = history.Life{Member: s.member.Name, Number: s.member.Life()}
	o.Call = s.w.clock.Now()
	header, err := Do(ctx, s.cli, o)
	o.Return = s.w.clock.Now()
	o.LifeEnd = s.member.Life()
	o.Outcome, o.Code = Classify(err)
	switch o.Outcome {
	case history.OK:
		o.Rev, o.Term, o.ClusterID = header.Revision, header.RaftTerm, header.ClusterId
		if o.Writes() {
			s.w.lastOK.Store(max(o.Return, s.w.lastOK.Load()))
		}
	case history.Unknown:
		o.Err, o.Return = err.Error(), history.Never
	default:
		o.Err = err.Error()
	}
	s.w.rec.Add(o)
	return o
}

// Do sends the operation and puts what the reply says into it.
func Do(ctx context.Context, cli *clientv3.Client, o *history.Op) (*pb.ResponseHeader, error) {
	switch o.Kind {
	case history.Get, history.Serializable, history.Range:
		var opts []clientv3.OpOption
		if o.Kind == history.Serializable {
			opts = append(opts, clientv3.WithSerializable())
		}
		if o.Kind == history.Range {
			opts = append(opts, clientv3.WithPrefix())
		}
		r, err := cli.Get(ctx, o.Key, opts...)
		if err != nil {
			return nil, err
		}
		o.KVs = KVs(r.Kvs)
		return r.Header, nil
	case history.Put:
		opts := []clientv3.OpOption{clientv3.WithLease(clientv3.LeaseID(o.Lease))}
		if o.AskPrev {
			opts = append(opts, clientv3.WithPrevKV())
		}
		r, err := cli.Put(ctx, o.Key, o.Value, opts...)
		if err != nil {
			return nil, err
		}
		o.Prev = kv(r.PrevKv)
		return r.Header, nil
	case history.Delete:
		var opts []clientv3.OpOption
		if o.AskPrev {
			opts = append(opts, clientv3.WithPrevKV())
		}
		r, err := cli.Delete(ctx, o.Key, opts...)
		if err != nil {
			return nil, err
		}
		o.Deleted = r.Deleted
		if len(r.PrevKvs) > 0 {
			o.Prev = kv(r.PrevKvs[0])
		}
		return r.Header, nil
	}
	txn := cli.Txn(ctx)
	switch o.Kind {
	case history.MultiPut:
		txn = txn.Then(clientv3.OpPut(o.Key, o.Value), clientv3.OpPut(o.Key2, o.Value2))
	case history.CAS:
		txn = txn.If(clientv3.Compare(clientv3.ModRevision(o.Key), "=", o.ExpectMod)).
			Then(clientv3.OpPut(o.Key, o.Value)).Else(clientv3.OpGet(o.Key))
	case history.CASValue:
		txn = txn.If(clientv3.Compare(clientv3.Value(o.Key), "=", o.ExpectValue)).
			Then(clientv3.OpPut(o.Key, o.Value)).Else(clientv3.OpGet(o.Key))
	default:
		return nil, fmt.Errorf("unknown kind of operation %q", o.Kind)
	}
	r, err := txn.Commit()
	if err != nil {
		return nil, err
	}
	o.Succeeded = r.Succeeded
	if !r.Succeeded && len(r.Responses) == 1 {
		o.KVs = KVs(r.Responses[0].GetResponseRange().GetKvs())
	}
	return r.Header, nil
}

func kv(k *mvccpb.KeyValue) *history.KV {
	if k == nil {
		return nil
	}
	return &history.KV{Key: string(k.Key), Value: string(k.Value), Create: k.CreateRevision, Mod: k.ModRevision,
		Version: k.Version, Lease: k.Lease}
}

// KVs takes a reply's pairs over.
func KVs(from []*mvccpb.KeyValue) []history.KV {
	var to []history.KV
	for _, k := range from {
		to = append(to, *kv(k))
	}
	return to
}

// Classify says what an error tells about the outcome: only what was certainly not done counts as refused.
func Classify(err error) (history.Outcome, string) {
	if err == nil {
		return history.OK, ""
	}
	code := Code(err)
	switch code {
	case codes.InvalidArgument, codes.FailedPrecondition, codes.NotFound, codes.OutOfRange, codes.PermissionDenied,
		codes.Unauthenticated, codes.Unimplemented:
		return history.Refused, code.String()
	case codes.Unavailable:
		// No connection: it never left.
		if strings.Contains(err.Error(), "Error while dialing") {
			return history.Refused, code.String()
		}
	}
	return history.Unknown, code.String()
}

// Code is the gRPC code behind an error of the client library.
func Code(err error) codes.Code {
	var etcd rpctypes.EtcdError
	switch {
	case errors.As(err, &etcd):
		return etcd.Code()
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	return status.Code(err)
}
