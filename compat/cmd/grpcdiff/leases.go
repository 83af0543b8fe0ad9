package main

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func init() {
	register(group{name: "lease", about: "ids, times, unknown leases", run: leases})
	register(group{name: "lease-keep-alive", about: "keep-alive streams", run: leaseKeepAlive})
	register(group{name: "lease-revoke", about: "revocation: one revision, sorted events", run: leaseRevoke})
	register(group{name: "lease-expiry", about: "expiry: one revision, sorted events, what is left", run: leaseExpiry})
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

func leases(t *session) {
	list := func() { call(t, t.lease.LeaseLeases, "LeaseLeases", &pb.LeaseLeasesRequest{}) }
	list()
	for _, ttl := range []int64{math.MinInt64, -1, 0, 1, 2, 3, 8_999_999_999, 9_000_000_000, 9_000_000_001, math.MaxInt64} {
		if r := t.grant(0, ttl); r != nil {
			t.clean.alias(r.ID)
			// The answer was recorded with the id; record it again without.
			t.records = t.records[:len(t.records)-1]
			t.record(fmt.Sprintf("LeaseGrant of %d s", ttl), t.clean.text(r))
			t.ttl(r.ID, true)
			if r.ID <= 0 {
				t.record("a lease id chosen by the server", "is not positive")
			}
			t.revoke(r.ID)
		}
	}
	for _, id := range []int64{1, 1, 2, -1, -1, math.MaxInt64, math.MinInt64, math.MaxInt64} {
		t.grant(id, 600+id%7)
	}
	t.grant(1, math.MaxInt64)
	t.grant(3, 0)
	t.grant(3, -7)
	for _, id := range []int64{0, 1, 2, 3, -1, 5, math.MaxInt64, math.MinInt64} {
		t.ttl(id, false)
		t.ttl(id, true)
	}
	t.grant(10, 5000)
	t.grant(11, 7000)
	t.grant(12, 6000)
	for _, id := range []int64{3, 1, 2, -1, math.MaxInt64, math.MinInt64} {
		t.revoke(id)
		t.revoke(id)
	}
	list()
	t.revoke(0)
	t.put(&pb.PutRequest{Key: b("b"), Lease: 10})
	t.put(&pb.PutRequest{Key: b("a"), Lease: 10})
	t.put(&pb.PutRequest{Key: b("c"), Lease: 11})
	t.ttl(10, true)
	t.ttl(10, false)
	t.put(&pb.PutRequest{Key: b("a"), Lease: 11})
	t.put(&pb.PutRequest{Key: b("c")})
	t.ttl(10, true)
	t.ttl(11, true)
	t.del(&pb.DeleteRangeRequest{Key: zero, RangeEnd: zero})
	t.ttl(10, true)
	t.ttl(11, true)
	t.grant(10, 5)
	t.revoke(10)
	t.grant(10, 50)
	t.ttl(10, true)
	list()
}

func leaseKeepAlive(t *session) {
	t.grant(1, 600)
	t.grant(2, 60)
	for _, ids := range [][]int64{{1}, {1, 2, 1}, {99}, {0}, {-1}, {99, 1}, {1, 99, 2, 98}} {
		ctx, cancel := context.WithTimeout(context.Background(), callMax)
		s, err := t.lease.LeaseKeepAlive(ctx)
		if err != nil {
			t.record("LeaseKeepAlive", t.errorText(err))
			cancel()
			continue
		}
		for _, id := range ids {
			err := s.Send(&pb.LeaseKeepAliveRequest{ID: id})
			var resp *pb.LeaseKeepAliveResponse
			if err == nil {
				resp, err = s.Recv()
			}
			t.record(fmt.Sprintf("LeaseKeepAlive %v: %d", ids, id), t.answer(resp, err))
			if err != nil {
				break
			}
		}
		s.CloseSend()
		_, err = s.Recv()
		t.record(fmt.Sprintf("LeaseKeepAlive %v: after the last", ids), t.errorText(err))
		cancel()
	}
	t.put(&pb.PutRequest{Key: b("k"), Lease: 2})
	t.revoke(2)
	t.ttl(1, true)
}

func leaseRevoke(t *session) {
	t.grant(1, 600)
	for _, k := range []string{"z", "b", "a", "m", "b\x00", "aa"} {
		t.put(&pb.PutRequest{Key: b(k), Value: b("v"), Lease: 1})
	}
	t.set("other=1", "m2=1")
	s := t.openWatch("live", nil)
	s.create(&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, PrevKv: true})
	s.collect(1)
	t.revoke(1)
	s.collect(1)
	t.all()
	t.set("a=2")
	s.collect(1)
	t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: 9})
	s.end()
	h := t.openWatch("history", nil)
	h.create(&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: 9})
	h.collect(2)
	h.end()
	// A lease whose keys are gone or moved deletes nothing and moves no revision.
	t.grant(2, 600)
	t.put(&pb.PutRequest{Key: b("k"), Lease: 2})
	t.put(&pb.PutRequest{Key: b("k")})
	t.put(&pb.PutRequest{Key: b("l"), Lease: 2})
	t.del(&pb.DeleteRangeRequest{Key: b("l")})
	t.revoke(2)
	t.all()
	// Attached and revoked through transactions.
	t.grant(3, 600)
	t.txn(success(opPutRequest(&pb.PutRequest{Key: b("t1"), Lease: 3}), opPutRequest(&pb.PutRequest{Key: b("t2"), Lease: 3})))
	t.txn(success(opPutRequest(&pb.PutRequest{Key: b("t1"), Value: b("x"), IgnoreLease: true}), opPutRequest(&pb.PutRequest{Key: b("t2"), IgnoreValue: true})))
	t.ttl(3, true)
	t.revoke(3)
	t.all()
}

func leaseExpiry(t *session) {
	t.grant(1, 2)
	t.grant(2, 600)
	for _, k := range []string{"b", "a", "c"} {
		t.put(&pb.PutRequest{Key: b(k), Value: b("v"), Lease: 1})
	}
	t.put(&pb.PutRequest{Key: b("d"), Lease: 2})
	s := t.openWatch("live", nil)
	s.create(&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, PrevKv: true})
	s.collect(1)
	time.Sleep(4 * time.Second)
	s.collect(1)
	s.end()
	t.all()
	t.ttl(1, true)
	call(t, t.lease.LeaseLeases, "LeaseLeases", &pb.LeaseLeasesRequest{})
	t.revoke(1)
	t.put(&pb.PutRequest{Key: b("e"), Lease: 1})
	t.grant(1, 600)
	t.ttl(1, true)
}
