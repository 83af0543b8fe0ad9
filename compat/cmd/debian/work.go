package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// parallel calls f for 0 to n-1 from that many workers and ends at the first error.
func parallel(n, workers int, f func(worker, i int) error) error {
	var next atomic.Int64
	var failed atomic.Bool
	var once sync.Once
	var first error
	var all sync.WaitGroup
	for worker := range workers {
		all.Go(func() {
			for !failed.Load() {
				i := int(next.Add(1) - 1)
				if i >= n {
					return
				}
				if err := f(worker, i); err != nil {
					once.Do(func() { first = err })
					failed.Store(true)
				}
			}
		})
	}
	all.Wait()
	return first
}

// raise makes the shared number at least n.
func raise(shared *atomic.Int64, n int64) {
	for {
		old := shared.Load()
		if n <= old || shared.CompareAndSwap(old, n) {
			return
		}
	}
}

// timings are the durations of the calls of one phase.
type timings struct {
	wall time.Duration
	each []time.Duration
}

func (t *timings) merge(parts [][]time.Duration) {
	t.each = slices.Concat(parts...)
	slices.Sort(t.each)
}

func (t *timings) percentile(p float64) time.Duration {
	if len(t.each) == 0 {
		return 0
	}
	return t.each[min(len(t.each)-1, int(p*float64(len(t.each))))]
}

func (t *timings) rate() float64 { return float64(len(t.each)) / t.wall.Seconds() }

func (t *timings) String() string {
	ms := func(p float64) float64 { return float64(t.percentile(p).Microseconds()) / 1000 }
	return fmt.Sprintf("%.2f s, %.0f/s, p50 %.1f p99 %.1f max %.1f ms", t.wall.Seconds(), t.rate(), ms(0.5), ms(0.99), ms(1))
}

// do sends one write. acked is the highest revision that any answer has shown so far: an answer to what begins
// afterwards may not be from before it.
func do(ctx context.Context, c *clientv3.Client, w *write, acked *atomic.Int64) error {
	ctx, cancel := context.WithTimeout(ctx, callMax)
	defer cancel()
	floor := acked.Load()
	w.deleted = make([]int64, len(w.parts))
	w.prevs = make([][]*mvccpb.KeyValue, len(w.parts))
	ops := make([]clientv3.Op, len(w.parts))
	for i, p := range w.parts {
		var opts []clientv3.OpOption
		if w.prev {
			opts = append(opts, clientv3.WithPrevKV())
		}
		if p.del {
			if p.end != "" {
				opts = append(opts, clientv3.WithRange(p.end))
			}
			ops[i] = clientv3.OpDelete(p.key, opts...)
		} else {
			ops[i] = clientv3.OpPut(p.key, string(p.val), opts...)
		}
	}
	take := func(i int, put *clientv3.PutResponse, del *clientv3.DeleteResponse) error {
		switch {
		case del != nil:
			w.deleted[i], w.prevs[i] = del.Deleted, del.PrevKvs
		case put == nil:
			return fmt.Errorf("%s: operation %d has no answer of its kind", w, i)
		case put.PrevKv != nil:
			w.prevs[i] = []*mvccpb.KeyValue{put.PrevKv}
		}
		return nil
	}
	if !w.isTxn() {
		resp, err := c.Do(ctx, ops[0])
		if err != nil {
			return err
		}
		put, del := resp.Put(), resp.Del()
		if put != nil {
			w.rev = put.Header.Revision
		} else if del != nil {
			w.rev = del.Header.Revision
		}
		if err := take(0, put, del); err != nil {
			return err
		}
	} else {
		txn := c.Txn(ctx)
		if w.condKey != "" {
			txn = txn.If(clientv3.Compare(clientv3.ModRevision(w.condKey), "=", w.condRev))
		}
		txn = txn.Then(ops...)
		if w.condKey != "" {
			txn = txn.Else(clientv3.OpGet(w.condKey))
		}
		resp, err := txn.Commit()
		if err != nil {
			return err
		}
		w.rev, w.failed = resp.Header.Revision, !resp.Succeeded
		if w.failed {
			if len(resp.Responses) != 1 || resp.Responses[0].GetResponseRange() == nil {
				return fmt.Errorf("%s: the other branch is one read, and its answer is not", w)
			}
			w.elseRead = resp.Responses[0].GetResponseRange().Kvs
		} else {
			if len(resp.Responses) != len(w.parts) {
				return fmt.Errorf("%s: %d answers", w, len(resp.Responses))
			}
			for i, r := range resp.Responses {
				if err := take(i, (*clientv3.PutResponse)(r.GetResponsePut()), (*clientv3.DeleteResponse)(r.GetResponseDeleteRange())); err != nil {
					return err
				}
			}
		}
	}
	if w.effective() {
		floor++
	}
	if w.rev < floor {
		return fmt.Errorf("%s: answered with revision %d; one of at least %d was due, for %d had been acknowledged before", w, w.rev, floor, acked.Load())
	}
	raise(acked, w.rev)
	return nil
}

// newest reads keys as they are now, while others write; whether it is right is seen afterwards.
func newest(ctx context.Context, c *clientv3.Client, key, end string, acked *atomic.Int64) (*read, error) {
	ctx, cancel := context.WithTimeout(ctx, callMax)
	defer cancel()
	var opts []clientv3.OpOption
	if end != "" {
		opts = append(opts, clientv3.WithRange(end))
	}
	floor := acked.Load()
	resp, err := c.Get(ctx, key, opts...)
	if err != nil {
		return nil, err
	}
	if resp.Header.Revision < floor {
		return nil, fmt.Errorf("stale read of %q: revision %d, though %d had been acknowledged before", key, resp.Header.Revision, floor)
	}
	return &read{key: key, end: end, rev: resp.Header.Revision, kvs: resp.Kvs, count: resp.Count}, nil
}
