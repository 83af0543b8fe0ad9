package workload

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"metastore/robustness/internal/history"
)

const (
	leasesAtOnce = 4 // of one client
	ttlMin       = 2
	ttlMax       = 5
)

// leaseLoop keeps several leases going until ops is done. Some are kept alive until kept is done, some are given up after a
// while, some are revoked.
func (s *session) leaseLoop(ops, kept context.Context) {
	var wait sync.WaitGroup
	slots := make(chan struct{}, leasesAtOnce)
	for i := 0; ; i++ {
		select {
		case <-ops.Done():
			wait.Wait()
			return
		case slots <- struct{}{}:
		}
		rng := rand.New(rand.NewPCG(s.rng.Uint64(), s.rng.Uint64()))
		wait.Go(func() {
			defer func() { <-slots }()
			if !s.oneLease(rng, ops, kept) {
				pause(ops, 200*time.Millisecond)
			}
		})
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// oneLease lives through one lease; false if it could not be granted.
func (s *session) oneLease(rng *rand.Rand, ops, kept context.Context) bool {
	w := s.w
	l := &history.Lease{ID: rng.Int64N(1<<62) + 1, TTL: int64(ttlMin + rng.IntN(ttlMax-ttlMin+1)), GrantCall: w.clock.Now()}
	ctx, cancel := context.WithTimeout(context.Background(), w.cfg.OpTimeout)
	// The library's Grant repeats a call that failed; the chosen id would then be taken.
	reply, err := pb.NewLeaseClient(s.cli.ActiveConnection()).LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: l.ID, TTL: l.TTL})
	cancel()
	l.GrantReturn = w.clock.Now()
	l.GrantOutcome, _ = Classify(err)
	if err != nil {
		return false
	}
	l.TTL = reply.TTL
	w.rec.AddLease(l)
	for i := range 1 + rng.IntN(2) {
		key := fmt.Sprintf("l/%x/%d", l.ID, i)
		o := s.do(ops, &history.Op{Kind: history.Put, Key: key, Value: s.value(), Lease: l.ID})
		if o.Outcome != history.Refused {
			l.Keys = append(l.Keys, key)
		}
	}
	ttl := time.Duration(l.TTL) * time.Second
	switch how := rng.IntN(10); {
	case how < 4: // given up
		s.keepAlive(rng, l, ops, time.Duration(rng.Int64N(int64(3*ttl))))
		// Its slot stays taken for a while, so that expiring leases do not pile up.
		pause(ops, ttl)
	case how < 7: // revoked
		s.keepAlive(rng, l, ops, time.Duration(rng.Int64N(int64(2*ttl))))
		s.revoke(l)
	default: // kept, most of them for a long time
		if rng.IntN(3) == 0 {
			for _, key := range l.Keys {
				w.kept.Store(key, true)
			}
			if !s.keepAlive(rng, l, kept, time.Hour) {
				for _, key := range l.Keys {
					w.kept.Delete(key)
				}
				return true
			}
			l.Kept = kept.Err() != nil
		} else {
			s.keepAlive(rng, l, ops, 20*time.Second)
		}
		s.revoke(l)
	}
	return true
}

// keepAlive keeps a lease alive for a time; false if the server says that it is gone.
func (s *session) keepAlive(rng *rand.Rand, l *history.Lease, ctx context.Context, during time.Duration) bool {
	end := time.Now().Add(during)
	for time.Now().Before(end) && ctx.Err() == nil {
		pause(ctx, min(time.Until(end), time.Duration(l.TTL)*time.Second/4+time.Duration(rng.IntN(200))*time.Millisecond))
		k := history.KeepAlive{Send: s.w.clock.Now(), Member: s.member.Name}
		call, cancel := context.WithTimeout(context.Background(), s.w.cfg.OpTimeout)
		reply, err := s.cli.KeepAliveOnce(call, clientv3.LeaseID(l.ID))
		cancel()
		k.Return = s.w.clock.Now()
		k.Outcome, _ = Classify(err)
		if err != nil {
			k.Err = err.Error()
		} else {
			k.TTL = reply.TTL
		}
		l.KeepAlives = append(l.KeepAlives, k)
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return false
		}
	}
	return true
}

func (s *session) revoke(l *history.Lease) {
	l.RevokeCall = s.w.clock.Now()
	// Until it is known to be gone; a lease that is revoked twice is an error the second time, which is fine.
	for range 20 {
		ctx, cancel := context.WithTimeout(context.Background(), s.w.cfg.OpTimeout)
		_, err := s.cli.Revoke(ctx, clientv3.LeaseID(l.ID))
		cancel()
		if err == nil || errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
}
