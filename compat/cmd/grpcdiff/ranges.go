package main

import (
	"context"
	"fmt"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

func init() {
	register(group{name: "range-keys", about: "every form of key and range end", run: rangeKeys})
	register(group{name: "range-sort", about: "every order and target, unknown ones too, with limits, keys and count only", run: rangeSort})
	register(group{name: "range-limit", about: "limits, revisions, more and count", run: rangeLimit})
	register(group{name: "range-filters", about: "minimal and maximal revisions", run: rangeFilters})
	register(group{name: "range-compacted", about: "reads around a compacted revision", run: rangeCompacted})
	register(group{name: "range-stream", about: "RangeStream: chunks, limits, refusals", run: rangeStream})
	register(group{name: "range-stream-small", about: "RangeStream with a small request limit", flags: []string{"--max-request-bytes=65536"}, run: rangeStreamSmall})
	register(group{name: "put", about: "what Put takes and refuses", run: puts})
	register(group{name: "delete", about: "every form of key and range end", run: deletes})
	register(group{name: "compact", about: "compaction and its errors", run: compactions})
	register(group{name: "sizes", about: "requests around the size limits", run: sizes})
}

var someKeys = []string{"a", "a\x00", "aa", "ab", "b", "b\xff", "b\xff\xff", "c", "\x00", "\x00\x00", "\xff", "\xff\xff", "z"}

var someRanges = [][2]string{
	{"", ""}, {"", "\x00"}, {"", "b"}, {"\x00", ""}, {"\x00", "\x00"}, {"\x00", "\x00\x00"}, {"\x00\x00", "\x00"},
	{"a", ""}, {"a", "\x00"}, {"a", "a"}, {"a", "a\x00"}, {"a", "b"}, {"a", "aa"}, {"b", "a"}, {"b", "c"}, {"b\xff", "c"},
	{"b\xff", "\x00"}, {"c", "\x00"}, {"c", "\x00\x00"}, {"zz", "\x00"}, {"\xff", "\x00"}, {"\xff", ""}, {"\xff\xff", "\x00"},
	{"missing", ""}, {"m", "n"}, {"\x01", "\xff"},
}

func rangeKeys(t *session) {
	t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero})
	for i, k := range someKeys {
		t.put(&pb.PutRequest{Key: b(k), Value: fmt.Appendf(nil, "%d", i)})
	}
	for _, serializable := range []bool{false, true} {
		for _, r := range someRanges {
			t.get(&pb.RangeRequest{Key: b(r[0]), RangeEnd: b(r[1]), Serializable: serializable})
		}
	}
	for _, r := range someRanges {
		t.get(&pb.RangeRequest{Key: b(r[0]), RangeEnd: b(r[1]), CountOnly: true})
		t.get(&pb.RangeRequest{Key: b(r[0]), RangeEnd: b(r[1]), KeysOnly: true, Limit: 2})
	}
	t.get(&pb.RangeRequest{Key: b("a"), RangeEnd: []byte{}})
	t.get(&pb.RangeRequest{Key: make([]byte, 70000), RangeEnd: zero})
}

func rangeSort(t *session) {
	t.grant(77, 600)
	t.set("b=3", "a=5", "d=1", "c=4", "e=2", "a=0", "c=9", "c=8")
	t.put(&pb.PutRequest{Key: b("e"), Value: b("2"), Lease: 77})
	for order := int32(-1); order <= 3; order++ {
		for target := int32(-1); target <= 5; target++ {
			for _, limit := range []int64{0, 2} {
				for mode := range 3 {
					t.get(&pb.RangeRequest{
						Key: zero, RangeEnd: zero, Limit: limit,
						SortOrder: pb.RangeRequest_SortOrder(order), SortTarget: pb.RangeRequest_SortTarget(target),
						KeysOnly: mode == 1, CountOnly: mode == 2,
					})
				}
			}
		}
	}
	// One key, and none, with unknown enums: is it checked at all?
	t.get(&pb.RangeRequest{Key: b("a"), SortTarget: 7})
	t.get(&pb.RangeRequest{Key: b("none"), SortTarget: 7})
	t.get(&pb.RangeRequest{Key: b("a"), SortOrder: 7, SortTarget: 2})
	t.get(&pb.RangeRequest{Key: b("a"), SortOrder: 7, Serializable: true})
	t.txn(success(opGetRequest(&pb.RangeRequest{Key: b("a"), RangeEnd: zero, SortOrder: 7})))
	t.txn(success(opGetRequest(&pb.RangeRequest{Key: b("a"), RangeEnd: zero, SortTarget: 7, SortOrder: 1})))
	t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, KeysOnly: true, CountOnly: true, SortOrder: 2, Limit: 1})
}

func rangeLimit(t *session) {
	t.set("a=1", "b=1", "c=1", "d=1", "e=1", "c=2")
	t.del(&pb.DeleteRangeRequest{Key: b("d")})
	for _, revision := range []int64{math.MinInt64, -5, -1, 0, 1, 2, 4, 6, 7, 8, 9, 100, math.MaxInt64} {
		for _, limit := range []int64{math.MinInt64, -1, 0, 1, 3, 4, 5, 6, math.MaxInt64} {
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, Limit: limit, KeysOnly: limit == 3})
		}
		t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, CountOnly: true})
		t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, CountOnly: true, Limit: 2})
		t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, CountOnly: true, KeysOnly: true})
		t.get(&pb.RangeRequest{Key: b("c"), Revision: revision})
		t.get(&pb.RangeRequest{Key: b("c"), Revision: revision, Limit: 1, Serializable: true})
		t.get(&pb.RangeRequest{Key: b("d"), Revision: revision, CountOnly: true})
		// A range which is empty, and a key which is missing, at a revision that may be wrong.
		t.get(&pb.RangeRequest{Key: b("z"), RangeEnd: b("y"), Revision: revision})
		t.get(&pb.RangeRequest{Key: b("z"), Revision: revision, CountOnly: true})
	}
}

func rangeFilters(t *session) {
	t.set("a=1", "b=1", "c=1", "a=2", "b=2", "a=3", "d=1")
	bounds := []int64{math.MinInt64, -1, 0, 2, 4, 6, 100}
	for _, low := range bounds {
		for _, high := range bounds {
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, MinModRevision: low, MaxModRevision: high, KeysOnly: true})
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, MinCreateRevision: low, MaxCreateRevision: high, KeysOnly: true})
		}
	}
	for _, limit := range []int64{0, 1, 2, 3, 10} {
		for _, order := range []pb.RangeRequest_SortOrder{0, 1, 2} {
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, MinModRevision: 5, Limit: limit, SortOrder: order})
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, MaxModRevision: 6, Limit: limit, SortOrder: order, SortTarget: pb.RangeRequest_MOD})
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, MinCreateRevision: 3, MaxModRevision: 7, Limit: limit, SortOrder: order, SortTarget: pb.RangeRequest_VERSION})
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, MinCreateRevision: 3, Limit: limit, SortOrder: order, Revision: 5})
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, MinModRevision: 5, Limit: limit, SortOrder: order, CountOnly: true})
		}
	}
	t.get(&pb.RangeRequest{Key: b("a"), MinModRevision: 8})
	t.get(&pb.RangeRequest{Key: b("a"), MaxModRevision: 6})
	t.get(&pb.RangeRequest{Key: b("a"), MaxCreateRevision: 2})
}

func rangeCompacted(t *session) {
	t.set("a=1", "b=1", "a=2", "c=1")
	t.del(&pb.DeleteRangeRequest{Key: b("b")})
	t.set("a=3", "b=2")
	t.compact(6)
	for _, serializable := range []bool{false, true} {
		for _, revision := range []int64{-1, 0, 1, 2, 5, 6, 7, 8, 9} {
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, Serializable: serializable})
			t.get(&pb.RangeRequest{Key: b("b"), Revision: revision, Serializable: serializable})
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, CountOnly: true, Serializable: serializable})
			t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, KeysOnly: true, Serializable: serializable})
			t.get(&pb.RangeRequest{Key: b("none"), Revision: revision, Serializable: serializable})
			t.get(&pb.RangeRequest{Key: b("b"), RangeEnd: b("a"), Revision: revision, Serializable: serializable})
		}
	}
	t.compact(8)
	t.all()
	t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: 8})
	t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: 7})
}

// streamWhole does one RangeStream whose parts are cut in another way, and records what they come to together.
func (t *session) streamWhole(reason string, r *pb.RangeRequest) {
	all := &pb.RangeResponse{}
	t.differs(reason, func() { all.Kvs = t.stream(r) })
	t.record("RangeStream "+t.clean.text(r)+": together", fmt.Sprintf("%d kvs, hash %s", len(all.Kvs), hashOf(t.clean.text(all))))
}

// stream does one RangeStream and records every message of it, kvs beyond a few by their number, ends and hash. It
// returns all of them.
func (t *session) stream(r *pb.RangeRequest) (all []*mvccpb.KeyValue) {
	ctx, cancel := context.WithTimeout(context.Background(), callMax)
	defer cancel()
	name := "RangeStream " + t.clean.text(r)
	s, err := t.kv.RangeStream(ctx, r)
	if err != nil {
		t.record(name, t.errorText(err))
		return nil
	}
	for i := 0; ; i++ {
		m, err := s.Recv()
		if err != nil {
			t.record(fmt.Sprintf("%s: message %d", name, i), t.errorText(err))
			return all
		}
		all = append(all, m.GetRangeResponse().GetKvs()...)
		text := ""
		if kvs := m.GetRangeResponse().GetKvs(); len(kvs) > 3 {
			text = fmt.Sprintf("%d kvs, %s to %s, hash %s: ", len(kvs), kvs[0].Key, kvs[len(kvs)-1].Key, hashOf(t.clean.text(m)))
			m.RangeResponse.Kvs = nil
		}
		t.record(fmt.Sprintf("%s: message %d", name, i), text+t.clean.text(m))
	}
}

func rangeStream(t *session) {
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero})
	t.fill("k", 1000, b("value"))
	t.set("a=1", "b=2", "c=3")
	t.streamWhole("a negative limit", &pb.RangeRequest{Key: zero, RangeEnd: zero, Limit: -1})
	for _, limit := range []int64{0, 1, 2, 9, 10, 11, 29, 30, 31, 1003, 1004} {
		t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, Limit: limit})
	}
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, KeysOnly: true})
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, CountOnly: true})
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, CountOnly: true, Limit: 5})
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, CountOnly: true, KeysOnly: true})
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, Serializable: true})
	t.stream(&pb.RangeRequest{Key: b("a"), RangeEnd: b("c")})
	t.stream(&pb.RangeRequest{Key: b("a")})
	t.stream(&pb.RangeRequest{Key: b("none")})
	t.stream(&pb.RangeRequest{Key: b("c"), RangeEnd: b("a")})
	t.stream(&pb.RangeRequest{Key: b("k"), RangeEnd: b("l")})
	t.stream(&pb.RangeRequest{Key: b("k00990"), RangeEnd: zero})
	t.stream(&pb.RangeRequest{})
	t.stream(&pb.RangeRequest{RangeEnd: zero})
	for _, revision := range []int64{-1, 1, 5, 11, 12, 14, 15, math.MaxInt64} {
		t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision})
		t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, CountOnly: true})
	}
	for order := int32(-1); order <= 3; order++ {
		for target := int32(-1); target <= 5; target++ {
			t.stream(&pb.RangeRequest{Key: b("a"), RangeEnd: b("c"), SortOrder: pb.RangeRequest_SortOrder(order), SortTarget: pb.RangeRequest_SortTarget(target)})
		}
	}
	t.stream(&pb.RangeRequest{Key: b("a"), RangeEnd: b("c"), MinModRevision: 1})
	t.stream(&pb.RangeRequest{Key: b("a"), RangeEnd: b("c"), MaxModRevision: 1})
	t.stream(&pb.RangeRequest{Key: b("a"), RangeEnd: b("c"), MinCreateRevision: 1})
	t.stream(&pb.RangeRequest{Key: b("a"), RangeEnd: b("c"), MaxCreateRevision: 1})
	t.stream(&pb.RangeRequest{Key: b("a"), RangeEnd: b("c"), MinModRevision: 1, SortOrder: 2})
	t.stream(&pb.RangeRequest{MinModRevision: 1, SortOrder: 2})
	t.compact(13)
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: 12})
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: 13})
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: 12, CountOnly: true})
}

func rangeStreamSmall(t *session) {
	// Chunks double while they are below half the limit of 64 KiB and halve above twice of it.
	for i := range 120 {
		value := make([]byte, 300)
		switch {
		case i >= 40 && i < 60:
			value = make([]byte, 30000)
		case i >= 100:
			value = make([]byte, 10)
		}
		t.put(&pb.PutRequest{Key: fmt.Appendf(nil, "k%03d", i), Value: value})
	}
	const parts = "parts of at most twice the limit of requests"
	t.streamWhole(parts, &pb.RangeRequest{Key: zero, RangeEnd: zero})
	t.streamWhole(parts, &pb.RangeRequest{Key: zero, RangeEnd: zero, Limit: 55})
	t.streamWhole(parts, &pb.RangeRequest{Key: b("k040"), RangeEnd: b("k060")})
	t.stream(&pb.RangeRequest{Key: zero, RangeEnd: zero, KeysOnly: true})
}

func puts(t *session) {
	t.put(&pb.PutRequest{})
	t.put(&pb.PutRequest{Value: b("v")})
	t.put(&pb.PutRequest{Key: b("k")})
	t.put(&pb.PutRequest{Key: b("k"), Value: b("v"), PrevKv: true})
	t.put(&pb.PutRequest{Key: zero, Value: zero, PrevKv: true})
	t.put(&pb.PutRequest{Key: b("k"), Value: b("v"), IgnoreValue: true})
	t.put(&pb.PutRequest{Key: b("k"), Value: b("v"), IgnoreLease: true, Lease: 5})
	t.put(&pb.PutRequest{Key: b("k"), Value: b("v"), IgnoreLease: true, IgnoreValue: true, Lease: 5})
	t.put(&pb.PutRequest{Value: b("v"), IgnoreLease: true, IgnoreValue: true, Lease: 5})
	t.put(&pb.PutRequest{Key: b("none"), IgnoreValue: true})
	t.put(&pb.PutRequest{Key: b("none"), Value: b("v"), IgnoreLease: true})
	t.put(&pb.PutRequest{Key: b("none"), IgnoreLease: true, IgnoreValue: true})
	t.put(&pb.PutRequest{Key: b("none"), IgnoreValue: true, Lease: 99})
	t.put(&pb.PutRequest{Key: b("k"), IgnoreValue: true, Lease: 99})
	t.put(&pb.PutRequest{Key: b("k"), IgnoreValue: true, PrevKv: true})
	t.put(&pb.PutRequest{Key: b("k"), IgnoreLease: true, IgnoreValue: true, PrevKv: true})
	for _, lease := range []int64{1, -1, math.MaxInt64, math.MinInt64} {
		t.put(&pb.PutRequest{Key: b("k"), Value: b("l"), Lease: lease})
	}
	t.grant(7, 600)
	t.grant(8, 600)
	t.put(&pb.PutRequest{Key: b("k"), Value: b("1"), Lease: 7, PrevKv: true})
	t.put(&pb.PutRequest{Key: b("k"), Value: b("2"), IgnoreLease: true, PrevKv: true})
	t.put(&pb.PutRequest{Key: b("k"), IgnoreValue: true, Lease: 8, PrevKv: true})
	t.put(&pb.PutRequest{Key: b("k"), IgnoreValue: true, PrevKv: true})
	t.put(&pb.PutRequest{Key: b("k"), Value: b("3"), IgnoreLease: true, PrevKv: true})
	t.put(&pb.PutRequest{Key: b("k"), Value: b("4"), Lease: 7})
	t.revoke(7)
	t.put(&pb.PutRequest{Key: b("k"), IgnoreValue: true})
	t.put(&pb.PutRequest{Key: b("k"), Value: b("5"), IgnoreLease: true})
	t.ttl(7, true)
	t.ttl(8, true)
	t.all()
}

func deletes(t *session) {
	for _, r := range someRanges {
		for i, k := range someKeys {
			if i == 0 || r[0] != "" {
				t.put(&pb.PutRequest{Key: b(k), Value: b("v")})
			}
		}
		t.del(&pb.DeleteRangeRequest{Key: b(r[0]), RangeEnd: b(r[1]), PrevKv: true})
		t.del(&pb.DeleteRangeRequest{Key: b(r[0]), RangeEnd: b(r[1])})
		t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, KeysOnly: true})
	}
}

func compactions(t *session) {
	for _, revision := range []int64{math.MinInt64, -1, 0, 2, math.MaxInt64, 1, 1} {
		t.compact(revision)
	}
	t.set("a=1", "a=2", "b=1")
	t.del(&pb.DeleteRangeRequest{Key: b("b")})
	t.set("a=3", "c=1")
	for _, physical := range []bool{false, true} {
		for _, revision := range []int64{3, 3, 2, 0, -1, 5, 8, 7} {
			call(t, t.kv.Compact, "Compact", &pb.CompactionRequest{Revision: revision, Physical: physical})
		}
		t.all()
		t.get(&pb.RangeRequest{Key: b("b"), Revision: 5})
	}
	t.txn(success(opPut("d", "1"), opPut("e", "1")))
	t.compact(8)
	t.compact(9)
	t.all()
	t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: 7})
}

func sizes(t *session) {
	const limit = 1572864
	value := make([]byte, 4*1024*1024)
	for _, n := range []int{limit - 1000, limit - 100, limit - 20, limit - 10, limit - 9, limit - 8, limit, limit + 1, 2000000, 2097152 - 10, 2097152 - 9, 2097152 - 8, 2097152, 3000000} {
		ctx, cancel := context.WithTimeout(context.Background(), callMax)
		resp, err := t.kv.Put(ctx, &pb.PutRequest{Key: b("key"), Value: value[:n]})
		cancel()
		t.record(fmt.Sprintf("Put of %d bytes", n), t.answer(resp, err))
	}
	for _, n := range []int{limit / 2, limit/2 - 20, limit/2 - 40, limit} {
		ctx, cancel := context.WithTimeout(context.Background(), callMax)
		resp, err := t.kv.Txn(ctx, success(opPut("a", string(value[:n])), opPut("b", string(value[:n]))))
		cancel()
		t.record(fmt.Sprintf("Txn with two puts of %d bytes", n), t.answer(resp, err))
	}
	// A read of one key alone may be larger than a write may.
	t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, KeysOnly: true})
	ctx, cancel := context.WithTimeout(context.Background(), callMax)
	defer cancel()
	resp, err := t.kv.Range(ctx, &pb.RangeRequest{Key: make([]byte, 1600000)})
	t.record("Range of a key of 1600000 bytes", t.answer(resp, err))
	resp, err = t.kv.Range(ctx, &pb.RangeRequest{Key: make([]byte, 2200000)})
	t.record("Range of a key of 2200000 bytes", t.answer(resp, err))
	del, err := t.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: make([]byte, 1600000)})
	t.record("DeleteRange of a key of 1600000 bytes", t.answer(del, err))
}
