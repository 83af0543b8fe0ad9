package main

import (
	"fmt"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func init() {
	register(group{name: "txn-compare", about: "every target and result, missing keys, unknown enums, absent values", run: txnCompare})
	register(group{name: "txn-compare-range", about: "compares over ranges", run: txnCompareRange})
	register(group{name: "txn-nested", about: "transactions inside transactions", run: txnNested})
	register(group{name: "txn-duplicates", about: "what counts as the same key twice", run: txnDuplicates})
	register(group{name: "txn-visibility", about: "what later operations see of earlier ones, and at which revision", run: txnVisibility})
	register(group{name: "txn-checks", about: "what fails a whole transaction, on the path taken and on the other", run: txnChecks})
	register(group{name: "txn-limits", about: "the number of operations", run: txnLimits})
	register(group{name: "txn-limits-small", about: "the number of operations, four at most", flags: []string{"--max-txn-ops=4"}, run: txnLimitsSmall})
}

// ask runs a transaction whose only answer is which branch was taken.
func (t *session) ask(compare ...*pb.Compare) { t.txn(&pb.TxnRequest{Compare: compare}) }

func txnCompare(t *session) {
	t.grant(9, 600)
	t.set("k=1", "k=m")
	t.put(&pb.PutRequest{Key: b("leased"), Value: b("v"), Lease: 9})
	t.set("empty=")
	for _, key := range []string{"k", "leased", "empty", "missing"} {
		for result := int32(-1); result <= 5; result++ {
			r := pb.Compare_CompareResult(result)
			for _, n := range []int64{math.MinInt64, 0, 1, 2, 3, 4, 9} {
				t.ask(cmpVersion(key, r, n))
				t.ask(&pb.Compare{Key: b(key), Result: r, Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: n}})
				t.ask(&pb.Compare{Key: b(key), Result: r, Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: n}})
				t.ask(&pb.Compare{Key: b(key), Result: r, Target: pb.Compare_LEASE, TargetUnion: &pb.Compare_Lease{Lease: n}})
			}
			for _, value := range []string{"", "1", "m", "ma", "l", "v", "\xff"} {
				t.ask(cmpValue(key, r, value))
			}
			// The target without its value: it counts as zero or empty.
			for target := int32(-1); target <= 6; target++ {
				t.ask(&pb.Compare{Key: b(key), Result: r, Target: pb.Compare_CompareTarget(target)})
			}
		}
	}
	// The target says one thing, the value another.
	t.ask(&pb.Compare{Key: b("k"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Version{Version: 2}})
	t.ask(&pb.Compare{Key: b("k"), Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Value{Value: b("m")}})
	t.ask(&pb.Compare{Key: b("k"), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 3}})
	t.ask(&pb.Compare{Key: b("k"), Target: 9, TargetUnion: &pb.Compare_Version{Version: 7}})
	// No key.
	t.ask(&pb.Compare{Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 0}})
	t.ask(&pb.Compare{RangeEnd: zero, Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 0}})
	t.ask(&pb.Compare{})
	// Several: all must hold.
	t.ask(cmpVersion("k", 0, 2), cmpValue("k", 0, "m"), cmpVersion("missing", 0, 0))
	t.ask(cmpVersion("k", 0, 2), cmpValue("k", 0, "x"), cmpVersion("missing", 0, 0))
	t.ask()
}

func txnCompareRange(t *session) {
	t.set("a=1", "b=1", "c=2", "c=3", "d=1")
	ranges := [][2]string{{"a", "c"}, {"a", "\x00"}, {"\x00", "\x00"}, {"b", "a"}, {"b", "b"}, {"x", "z"}, {"c", "c\x00"}, {"x", "\x00"}}
	for _, r := range ranges {
		for result := int32(0); result <= 4; result++ {
			for _, c := range []*pb.Compare{
				{Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 1}},
				{Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 0}},
				{Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: 3}},
				{Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 2}},
				{Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: b("1")}},
				{Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: b("")}},
				{Target: pb.Compare_LEASE, TargetUnion: &pb.Compare_Lease{Lease: 0}},
			} {
				c.Key, c.RangeEnd, c.Result = b(r[0]), b(r[1]), pb.Compare_CompareResult(result)
				t.ask(c)
			}
		}
	}
}

func txnNested(t *session) {
	t.set("k=0")
	t.txn(success(opTxn(&pb.TxnRequest{})))
	t.txn(success(opTxn(success(opGet("k", "")))))
	t.txn(success(opTxn(success(opPut("a", "1"), opGet("a", ""), opGet("\x00", "\x00"))), opGet("a", ""), opPut("b", "1"), opGet("\x00", "\x00")))
	t.txn(&pb.TxnRequest{
		Compare: []*pb.Compare{cmpValue("k", 0, "0")},
		Success: ops(
			opPut("k", "1"),
			// Compares of every depth see the store as it was before the outermost transaction.
			opTxn(&pb.TxnRequest{Compare: []*pb.Compare{cmpValue("k", 0, "1")}, Success: ops(opPut("new", "seen")), Failure: ops(opPut("old", "seen"))}),
			opTxn(&pb.TxnRequest{Compare: []*pb.Compare{cmpValue("k", 0, "0")}, Success: ops(opPut("old2", "seen")), Failure: ops(opPut("new2", "seen"))}),
			opGet("\x00", "\x00"),
		),
	})
	t.all()
	// Three deep, writes at each depth; one revision for all.
	t.txn(success(
		opPut("d0", "x"),
		opTxn(success(opPut("d1", "x"), opTxn(success(opPut("d2", "x"), opTxn(success(opPut("d3", "x"), opDel("d0", ""))))), opGet("d", "e"))),
		opDel("d1", ""),
	))
	t.txn(success(
		opPut("d0", "x"),
		opTxn(success(opPut("d1", "x"), opTxn(success(opPut("d2", "x"), opTxn(success(opPut("d3", "x"), opDel("none", ""))))), opGet("d", "e"))),
		opDel("a", ""),
		opGet("d", "e"),
	))
	t.all()
	// The branch not taken, nested.
	t.txn(&pb.TxnRequest{Compare: never(), Success: ops(opTxn(success(opPut("no", "1")))), Failure: ops(opTxn(&pb.TxnRequest{Compare: never(), Success: ops(opPut("no", "1")), Failure: ops(opPut("yes", "1"), opGet("yes", ""))}))})
	// A nested transaction that only reads, or does nothing, moves no revision.
	t.txn(success(opTxn(success(opTxn(success(opGet("k", "")))))))
	t.txn(success(opTxn(success(opDel("none", "")))))
	t.txn(success(opTxn(nil)))
	t.txn(success(opTxn(success(opTxn(nil), opPut("q", "1")))))
	// Errors at depth.
	t.txn(success(opPut("e", "1"), opTxn(success(opPut("", "1")))))
	t.txn(success(opPut("e", "1"), opTxn(success(opGet("", "")))))
	t.txn(success(opPut("e", "1"), opTxn(success(&pb.RequestOp{}))))
	t.txn(success(opPut("e", "1"), opTxn(&pb.TxnRequest{Compare: []*pb.Compare{{}}})))
	t.txn(success(opPut("e", "1"), opTxn(success(opGetRequest(&pb.RangeRequest{Key: b("k"), Revision: 100})))))
	t.txn(success(opPut("e", "1"), opTxn(success(opPutRequest(&pb.PutRequest{Key: b("f"), Lease: 5})))))
	t.txn(success(opPut("e", "1"), opTxn(success(opPutRequest(&pb.PutRequest{Key: b("none"), IgnoreValue: true})))))
	t.txn(success(opPut("e", "1"), opTxn(&pb.TxnRequest{Compare: never(), Success: ops(opPutRequest(&pb.PutRequest{Key: b("f"), Lease: 5}))})))
	t.txn(success(opPut("e", "2"), opTxn(&pb.TxnRequest{Compare: never(), Success: ops(opGetRequest(&pb.RangeRequest{Key: b("k"), Revision: 100}))})))
	t.all()
}

func txnDuplicates(t *session) {
	put := func(k string) *pb.RequestOp { return opPut(k, "v") }
	nested := func(o ...*pb.RequestOp) *pb.RequestOp { return opTxn(success(o...)) }
	either := func(yes, no *pb.RequestOp) *pb.RequestOp {
		return opTxn(&pb.TxnRequest{Compare: never(), Success: ops(yes), Failure: ops(no)})
	}
	for _, list := range [][]*pb.RequestOp{
		ops(put("a"), put("a")),
		ops(put("a"), put("b"), put("a")),
		ops(put("a"), opDel("a", "")),
		ops(opDel("a", ""), put("a")),
		ops(put("b"), opDel("a", "c")),
		ops(opDel("a", "c"), put("b")),
		ops(opDel("a", "c"), put("c")),
		ops(put("c"), opDel("a", "c")),
		ops(put("a"), opDel("a", "c")),
		ops(put("z"), opDel("a", "\x00")),
		ops(opDel("a", "\x00"), put("z")),
		ops(put("z"), opDel("\x00", "\x00")),
		ops(put("\x00"), opDel("\x00", "\x00")),
		ops(put("0"), opDel("a", "\x00")),
		ops(put("b"), opDel("c", "a")),
		ops(put("b"), opDel("b", "b")),
		ops(put("b"), opDel("b", "a")),
		ops(opDel("a", ""), opDel("a", "")),
		ops(opDel("a", "c"), opDel("b", "d")),
		ops(opDel("a", "\x00"), opDel("a", "\x00")),
		ops(put("a"), opGet("a", ""), opGet("a", "")),
		ops(put("a"), nested(put("a"))),
		ops(nested(put("a")), put("a")),
		ops(nested(put("a")), nested(put("a"))),
		ops(put("a"), nested(opDel("a", ""))),
		ops(nested(opDel("a", "")), put("a")),
		ops(nested(opDel("a", "c")), nested(put("b"))),
		ops(nested(put("b")), nested(opDel("a", "c"))),
		ops(opDel("a", "c"), nested(opDel("b", "d"))),
		ops(put("a"), nested(nested(put("a")))),
		ops(put("a"), nested(nested(put("b"))), put("c")),
		ops(either(put("a"), put("a"))),
		ops(either(put("a"), opDel("a", ""))),
		ops(either(put("a"), put("b")), put("a")),
		ops(either(put("a"), put("b")), put("b")),
		ops(either(put("a"), put("b")), opDel("a", "c")),
		ops(either(put("a"), put("b")), either(put("b"), put("a"))),
		ops(either(put("a"), put("b")), either(put("c"), put("d"))),
		ops(either(opDel("a", ""), opDel("b", "")), put("a")),
		ops(put("a"), either(opDel("a", ""), opDel("b", ""))),
		ops(nested(either(put("a"), put("b"))), either(put("c"), put("b"))),
	} {
		t.txn(success(list...))
		t.txn(&pb.TxnRequest{Compare: never(), Success: list})
		t.txn(&pb.TxnRequest{Compare: never(), Failure: list})
		t.txn(&pb.TxnRequest{Compare: never(), Success: ops(put("a"), put("b")), Failure: ops(put("b"), put("a"))})
	}
	t.all()
}

func txnVisibility(t *session) {
	t.grant(5, 600)
	t.set("k=0", "l=0")
	everything := opGet("\x00", "\x00")
	t.txn(success(everything, opPut("k", "1"), everything, opDel("l", ""), everything, opPut("m", "1"), everything))
	t.txn(success(opDel("\x00", "\x00"), everything))
	t.txn(success(opPut("a", "1"), opPut("b", "1"), opPut("c", "1"),
		opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, Limit: 2}),
		opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, CountOnly: true}),
		opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, KeysOnly: true}),
		opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, SortOrder: 2, SortTarget: 3, Limit: 1}),
		opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, MinModRevision: 6}),
		opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, MinModRevision: 7}),
		opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, Serializable: true})))
	// Reads at a revision inside a write transaction: the past, the present, and the one being written.
	for _, revision := range []int64{-1, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16} {
		t.txn(success(opPut("a", fmt.Sprint(revision)), opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, KeysOnly: true})))
		t.txn(success(opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, KeysOnly: true})))
		t.txn(success(opGetRequest(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision, CountOnly: true, Serializable: true})))
	}
	t.txn(success(opPut("n", "1"), opDel("a", "c"), opGetRequest(&pb.RangeRequest{Key: b("n"), Revision: 0})))
	// What a put replaces, and what a deletion deletes, inside the same transaction.
	t.txn(success(
		opPutRequest(&pb.PutRequest{Key: b("p"), Value: b("1"), PrevKv: true, Lease: 5}),
		opDelRequest(&pb.DeleteRangeRequest{Key: b("n"), RangeEnd: b("o"), PrevKv: true}),
		opDelRequest(&pb.DeleteRangeRequest{Key: b("n"), RangeEnd: b("o"), PrevKv: true}),
		opGet("p", ""),
	))
	t.txn(success(
		opPutRequest(&pb.PutRequest{Key: b("p"), IgnoreValue: true, PrevKv: true}),
		opPutRequest(&pb.PutRequest{Key: b("c"), IgnoreLease: true, Value: b("9"), PrevKv: true}),
	))
	t.ttl(5, true)
	// A delete range over keys put by this very transaction is refused, one over keys beside them is not.
	t.txn(success(opPut("s1", "1"), opDel("s2", "s9"), opPut("t", "1"), opDel("c", ""), opGet("s", "u")))
	t.all()
	// An open end does not count as covering a put: the key is put and deleted at one revision.
	t.txn(success(opPut("z", "1"), opDel("t", "\x00"), everything))
	t.txn(success(opDel("t", "\x00"), opPut("z", "2"), opPut("zz", "2"), everything))
	t.txn(success(opPut("z", "3"), opDel("t", "\x00"), opTxn(success(opPut("u", "3"))), everything))
	t.get(&pb.RangeRequest{Key: b("z")})
	t.set("z=4")
	t.all()
	for revision := int64(2); revision <= 8; revision++ {
		t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, Revision: revision})
	}
	s := t.openWatch("history", nil)
	s.create(&pb.WatchCreateRequest{Key: zero, RangeEnd: zero, StartRevision: 1, PrevKv: true})
	s.collect(2)
	s.end()
}

func txnChecks(t *session) {
	t.set("k=1", "k=2", "k=3")
	t.compact(3)
	bad := map[string]*pb.RequestOp{
		"empty operation":          {},
		"put without key":          opPut("", "v"),
		"get without key":          opGet("", ""),
		"get without key with end": opGet("", "\x00"),
		"delete without key":       opDel("", ""),
		"value and ignore":         opPutRequest(&pb.PutRequest{Key: b("k"), Value: b("v"), IgnoreValue: true}),
		"lease and ignore":         opPutRequest(&pb.PutRequest{Key: b("k"), Lease: 4, IgnoreLease: true}),
		"ignore value missing":     opPutRequest(&pb.PutRequest{Key: b("none"), IgnoreValue: true}),
		"ignore lease missing":     opPutRequest(&pb.PutRequest{Key: b("none"), IgnoreLease: true}),
		"unknown lease":            opPutRequest(&pb.PutRequest{Key: b("a"), Lease: 4}),
		"negative lease":           opPutRequest(&pb.PutRequest{Key: b("a"), Lease: -4}),
		"future revision":          opGetRequest(&pb.RangeRequest{Key: b("k"), Revision: 100}),
		"compacted revision":       opGetRequest(&pb.RangeRequest{Key: b("k"), Revision: 2}),
		"unknown sort order":       opGetRequest(&pb.RangeRequest{Key: b("k"), SortOrder: 8}),
		"nil put":                  opPutRequest(nil),
		"nil get":                  opGetRequest(nil),
		"nil delete":               opDelRequest(nil),
	}
	for _, name := range sorted(bad) {
		op := bad[name]
		t.txn(success(op))
		t.txn(success(opPut("w", "1"), op))
		t.txn(success(op, opPut("w", "2")))
		t.txn(&pb.TxnRequest{Compare: never(), Success: ops(op), Failure: ops(opPut("w", "3"))})
		t.txn(&pb.TxnRequest{Success: ops(opPut("w", "4")), Failure: ops(op)})
		t.txn(success(opPut("w", "5"), opTxn(&pb.TxnRequest{Compare: never(), Success: ops(op)})))
		t.txn(success(opPut("w", "6"), opTxn(success(op))))
		t.get(&pb.RangeRequest{Key: b("w")})
	}
	// A key that exists only thanks to the same transaction.
	t.txn(success(opPut("fresh", "1"), opTxn(success(opPutRequest(&pb.PutRequest{Key: b("fresh2"), IgnoreValue: true})))))
	t.txn(success(opDel("k", ""), opPutRequest(&pb.PutRequest{Key: b("l"), IgnoreValue: true})))
	t.txn(success(opDel("w", ""), opTxn(success(opGet("w", "")))))
	t.all()
}

func txnLimits(t *session) {
	puts := func(prefix string, n int) (o []*pb.RequestOp) {
		for i := range n {
			o = append(o, opPut(fmt.Sprintf("%s%d", prefix, i), "v"))
		}
		return o
	}
	gets := func(n int) (o []*pb.RequestOp) {
		for range n {
			o = append(o, opGet("a0", ""))
		}
		return o
	}
	compares := func(n int) (c []*pb.Compare) {
		for i := range n {
			c = append(c, cmpVersion(fmt.Sprintf("a%d", i), pb.Compare_GREATER, 0))
		}
		return c
	}
	count := func() { t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero, CountOnly: true}) }
	for _, n := range []int{127, 128, 129, 200} {
		t.txn(success(puts("a", n)...))
		count()
		t.txn(success(gets(n)...))
		t.txn(&pb.TxnRequest{Compare: compares(n), Success: puts("b", 1), Failure: puts("c", 1)})
		t.txn(&pb.TxnRequest{Compare: compares(n), Success: puts("b", 128), Failure: puts("c", n)})
		count()
		t.txn(&pb.TxnRequest{Success: puts("b", 1), Failure: puts("c", n)})
		// Nested: it takes its place from what the outer one leaves.
		t.txn(success(opTxn(success(puts("d", n-1)...))))
		t.txn(success(append(puts("e", n/2), opTxn(success(puts("f", n/2-1)...)))...))
		t.txn(success(append(puts("g", n/2), opTxn(success(puts("h", n/2)...)))...))
		t.txn(success(append(puts("i", n/2), opTxn(success(puts("j", n/2+1)...)))...))
		t.txn(success(opTxn(success(puts("m", n/2)...)), opTxn(success(puts("n", n/2)...))))
		count()
	}
}

func txnLimitsSmall(t *session) {
	leaf := func(n int) *pb.RequestOp {
		r := &pb.TxnRequest{}
		for i := range n {
			r.Success = append(r.Success, opGet(fmt.Sprint(i), ""))
		}
		return opTxn(r)
	}
	get := opGet("k", "")
	for n := range 6 {
		t.txn(success(leaf(n)))
		t.txn(success(get, leaf(n)))
		t.txn(success(get, get, leaf(n)))
		t.txn(success(get, get, get, leaf(n)))
		t.txn(success(leaf(n), leaf(n)))
		t.txn(success(opTxn(success(leaf(n)))))
		t.txn(success(opTxn(success(get, opTxn(success(leaf(n)))))))
		t.txn(success(leaf(n), leaf(5-n)))
		t.txn(&pb.TxnRequest{Failure: ops(leaf(n), get)})
	}
	t.put(&pb.PutRequest{Key: b("k"), Value: b("v")})
}
