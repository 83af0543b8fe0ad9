//! Random operations on the state machine, its readers and its watchers, compared with a simple model of etcd.
//!
//! Few keys and few values, so that everything meets everything. How operations are grouped into log entries, and
//! those into apply steps, is random too, and must not show in any answer; nor must when compaction runs, or when the
//! machine is restarted. `PROPTEST_CASES` sets how many cases run.

mod support;

use api::codec::{Action, LeaseCheckpoint, LeaseCheckpointRequest, MemberChangeKind};
use api::kv::*;
use api::store::{ScanRequest, WatchCreate};
use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use support::harness::{Harness, STREAMS};
use support::model::Seen;
use support::{MapEngine, TestEngine};

/// One step of a test. Revisions in requests are picks, resolved against the state by [`revision`].
#[derive(Debug, Clone)]
enum Step {
    Propose(Action),
    EndEntry,
    Apply,
    Other(Option<(MemberChangeKind, u64)>),
    Range(RangeRequest),
    List(RangeRequest),
    ReadTxn(TxnRequest),
    Scan(ScanRequest),
    Attached(i64),
    Watch(usize, WatchCreate),
    Cancel(usize, usize),
    RequestProgress(usize),
    NotifyProgress(usize),
    Poll(usize, usize),
    Compact(usize),
    Restart,
}

/// Turns a pick into a revision that is worth asking for: around the newest and the compacted one, or any between.
fn revision(pick: i64, seen: Seen) -> i64 {
    match pick {
        0 => 0,
        1 => -1,
        2 => -9,
        3..=5 => seen.rev + pick - 4,
        6..=8 => seen.compacted + pick - 7,
        9 => i64::MAX,
        _ => {
            let first = seen.compacted.max(1);
            first + (pick - 10) % (seen.rev - first + 1)
        }
    }
}

fn resolve_range(range: &mut RangeRequest, seen: Seen) {
    range.revision = revision(range.revision, seen);
    for bound in [
        &mut range.min_mod_revision,
        &mut range.max_mod_revision,
        &mut range.min_create_revision,
        &mut range.max_create_revision,
    ] {
        *bound = revision(*bound, seen);
    }
}

fn resolve_txn(txn: &mut TxnRequest, seen: Seen) {
    for compare in &mut txn.compare {
        if let Some(TargetUnion::CreateRevision(pick) | TargetUnion::ModRevision(pick)) = &mut compare.target_union {
            *pick = revision(*pick, seen);
        }
    }
    for op in txn.success.iter_mut().chain(&mut txn.failure) {
        match &mut op.request {
            Some(RequestOpKind::Range(range)) => resolve_range(range, seen),
            Some(RequestOpKind::Txn(nested)) => resolve_txn(nested, seen),
            _ => {}
        }
    }
}

fn run<E: TestEngine>(harness: &mut Harness<E>, steps: Vec<Step>) {
    for step in steps {
        let seen = harness.published;
        match step {
            Step::Propose(mut action) => {
                let newest = harness.model.seen;
                let valid = match &mut action {
                    Action::Put(put) => put.validate().is_ok(),
                    Action::DeleteRange(delete) => delete.validate().is_ok(),
                    Action::Txn(txn) => {
                        resolve_txn(txn, newest);
                        txn.validate(128).is_ok()
                    }
                    Action::Compact(compact) => {
                        compact.revision = revision(compact.revision, newest);
                        true
                    }
                    _ => true,
                };
                if valid {
                    harness.propose(action);
                }
            }
            Step::EndEntry => harness.end_entry(),
            Step::Apply => harness.apply(),
            Step::Other(change) => harness.propose_other(change),
            Step::Range(mut range) => {
                resolve_range(&mut range, seen);
                harness.range(&range);
            }
            Step::List(mut range) => {
                resolve_range(&mut range, seen);
                if metastore_mvcc::read::is_list(&range) {
                    harness.list(&range);
                }
            }
            Step::ReadTxn(mut txn) => {
                resolve_txn(&mut txn, seen);
                if txn.validate(128).is_ok() {
                    harness.read_txn(&txn);
                }
            }
            Step::Scan(mut scan) => {
                scan.revision = revision(scan.revision, seen);
                harness.scan(&scan);
            }
            Step::Attached(lease) => harness.attached(lease),
            Step::Watch(stream, mut create) => {
                create.start_revision = revision(create.start_revision, seen);
                harness.watch(stream, create);
            }
            Step::Cancel(stream, pick) => harness.cancel(stream, pick),
            Step::RequestProgress(stream) => harness.request_progress(stream),
            Step::NotifyProgress(stream) => harness.notify_progress(stream),
            Step::Poll(stream, outputs_max) => harness.poll(stream, outputs_max),
            Step::Compact(keys_max) => drop(harness.compact_step(keys_max)),
            Step::Restart => harness.restart(),
        }
    }
    harness.finish();
}

fn key() -> impl Strategy<Value = Bytes> {
    const KEYS: &[&[u8]] = &[b"a", b"b", b"c", b"d", b"ab", b"b\0", b"\0", b"\xff"];
    // The first ones more often, so that keys get long histories.
    prop_oneof![
        3 => (0..3usize).prop_map(|at| Bytes::from_static(KEYS[at])),
        1 => (0..KEYS.len()).prop_map(|at| Bytes::from_static(KEYS[at])),
    ]
}

fn range_end() -> impl Strategy<Value = Bytes> {
    const ENDS: &[&[u8]] = &[
        b"", b"", b"", b"\0", b"\0", b"b", b"c", b"d", b"ab", b"b\0", b"\xff", b"e",
    ];
    (0..ENDS.len()).prop_map(|at| Bytes::from_static(ENDS[at]))
}

fn span() -> impl Strategy<Value = (Bytes, Bytes)> {
    prop_oneof![
        4 => (key(), range_end()),
        1 => Just((Bytes::from_static(b"\0"), Bytes::from_static(b"\0"))),
    ]
}

fn value() -> impl Strategy<Value = Bytes> {
    const VALUES: &[&[u8]] = &[b"", b"1", b"2", b"33"];
    prop_oneof![
        40 => (0..VALUES.len()).prop_map(|at| Bytes::from_static(VALUES[at])),
        // More than the record cache takes.
        1 => Just(Bytes::from_static(&[b'x'; 5000])),
    ]
}

fn lease() -> impl Strategy<Value = i64> {
    (0..5usize).prop_map(|at| [1, 2, -1, i64::MAX, i64::MIN][at])
}

fn pick() -> impl Strategy<Value = i64> {
    prop_oneof![2 => Just(0i64), 1 => 1..10i64, 2 => 10..60i64]
}

fn put() -> impl Strategy<Value = PutRequest> {
    let lease = prop_oneof![2 => Just(0), 1 => lease()];
    (key(), value(), lease, any::<bool>(), 0..8u8).prop_map(|(key, value, lease, prev_kv, ignore)| {
        let (ignore_value, ignore_lease) = (ignore & 3 == 1, ignore & 6 == 2);
        PutRequest {
            key,
            value: if ignore_value { Bytes::new() } else { value },
            lease: if ignore_lease { 0 } else { lease },
            prev_kv,
            ignore_value,
            ignore_lease,
        }
    })
}

fn delete() -> impl Strategy<Value = DeleteRangeRequest> {
    (span(), any::<bool>()).prop_map(|((key, range_end), prev_kv)| DeleteRangeRequest {
        key,
        range_end,
        prev_kv,
    })
}

fn range() -> impl Strategy<Value = RangeRequest> {
    let sort = (0..3i32, 0..5i32);
    let flags = (0..4u8, 0..4u8);
    let filter = || prop_oneof![6 => Just(0i64), 1 => pick()];
    let filters = (filter(), filter(), filter(), filter());
    (span(), -1..5i64, pick(), sort, flags, filters).prop_map(
        |((key, range_end), limit, revision, (sort_order, sort_target), flags, filters)| RangeRequest {
            key,
            range_end,
            limit,
            revision,
            sort_order,
            sort_target,
            serializable: false,
            keys_only: flags.0 == 0,
            count_only: flags.1 == 0,
            min_mod_revision: filters.0,
            max_mod_revision: filters.1,
            min_create_revision: filters.2,
            max_create_revision: filters.3,
        },
    )
}

fn list() -> impl Strategy<Value = RangeRequest> {
    (span(), -1..5i64, prop_oneof![2 => Just(0i64), 1 => pick()]).prop_map(|((key, range_end), limit, revision)| {
        RangeRequest {
            key,
            range_end,
            limit,
            revision,
            ..Default::default()
        }
    })
}

fn compare() -> impl Strategy<Value = Compare> {
    let target = prop_oneof![
        (0..3i64).prop_map(|version| (0, TargetUnion::Version(version))),
        pick().prop_map(|pick| (1, TargetUnion::CreateRevision(pick))),
        pick().prop_map(|pick| (2, TargetUnion::ModRevision(pick))),
        value().prop_map(|value| (3, TargetUnion::Value(value))),
        lease().prop_map(|lease| (4, TargetUnion::Lease(lease))),
    ];
    // One in twenty names a target that its value does not fit, or none that exists.
    (span(), target, 0..5i32, 0..120i32).prop_map(|((key, range_end), (target, union), result, odd)| Compare {
        result,
        target: if odd < 6 { odd } else { target },
        key,
        target_union: (odd != 6).then_some(union),
        range_end,
    })
}

fn op(depth: u32) -> BoxedStrategy<RequestOp> {
    let leaf = prop_oneof![
        2 => range().prop_map(RequestOpKind::Range),
        4 => put().prop_map(RequestOpKind::Put),
        2 => delete().prop_map(RequestOpKind::DeleteRange),
    ];
    let kind = if depth == 0 {
        leaf.boxed()
    } else {
        prop_oneof![4 => leaf, 1 => txn(depth - 1).prop_map(RequestOpKind::Txn)].boxed()
    };
    kind.prop_map(|kind| RequestOp { request: Some(kind) }).boxed()
}

fn txn(depth: u32) -> BoxedStrategy<TxnRequest> {
    (vec(compare(), 0..3), vec(op(depth), 0..4), vec(op(depth), 0..3))
        .prop_map(|(compare, success, failure)| TxnRequest {
            compare,
            success,
            failure,
        })
        .boxed()
}

/// Nested transactions that only write, so that many pass validation and change a key more than once.
fn nested_writes() -> impl Strategy<Value = TxnRequest> {
    let write = || {
        prop_oneof![
            put().prop_map(RequestOpKind::Put),
            delete().prop_map(RequestOpKind::DeleteRange),
        ]
        .prop_map(|kind| RequestOp { request: Some(kind) })
    };
    let inner = vec(write(), 1..3).prop_map(|success| RequestOp {
        request: Some(RequestOpKind::Txn(TxnRequest {
            success,
            ..Default::default()
        })),
    });
    vec(inner, 1..4).prop_map(|success| TxnRequest {
        success,
        ..Default::default()
    })
}

fn read_txn() -> impl Strategy<Value = TxnRequest> {
    let op = || {
        range().prop_map(|range| RequestOp {
            request: Some(RequestOpKind::Range(range)),
        })
    };
    (vec(compare(), 0..3), vec(op(), 0..3), vec(op(), 0..3)).prop_map(|(compare, success, failure)| TxnRequest {
        compare,
        success,
        failure,
    })
}

fn action() -> impl Strategy<Value = Action> {
    let compact = prop_oneof![1 => pick(), 2 => 10..60i64];
    let ttl = prop_oneof![10 => -1..100i64, 1 => Just(9_000_000_001i64)];
    let granted = prop_oneof![10 => lease(), 1 => Just(0i64)];
    let checkpoint = (lease(), 0..50i64).prop_map(|(id, remaining_ttl)| LeaseCheckpoint { id, remaining_ttl });
    prop_oneof![
        12 => put().prop_map(Action::Put),
        5 => delete().prop_map(Action::DeleteRange),
        5 => txn(2).prop_map(Action::Txn),
        2 => nested_writes().prop_map(Action::Txn),
        2 => compact.prop_map(|revision| Action::Compact(CompactionRequest { revision, physical: false })),
        3 => (granted, ttl).prop_map(|(id, ttl)| Action::LeaseGrant(LeaseGrantRequest { id, ttl })),
        1 => lease().prop_map(|id| Action::LeaseRevoke(LeaseRevokeRequest { id })),
        1 => vec(checkpoint, 0..3).prop_map(|checkpoints| Action::LeaseCheckpoint(LeaseCheckpointRequest { checkpoints })),
    ]
}

fn watch_create() -> impl Strategy<Value = WatchCreate> {
    let id = prop_oneof![3 => Just(None), 1 => (0..4i64).prop_map(Some)];
    let key = prop_oneof![8 => span(), 1 => range_end().prop_map(|end| (Bytes::new(), end))];
    let start = prop_oneof![2 => Just(0i64), 1 => 1..9i64, 3 => 10..60i64];
    (id, key, start, 0..6u8, any::<bool>(), any::<bool>()).prop_map(
        |(id, (key, range_end), start_revision, filters, prev_kv, progress_notify)| WatchCreate {
            id,
            key,
            range_end,
            start_revision,
            no_put: filters & 5 == 1,
            no_delete: filters == 4,
            prev_kv,
            progress_notify,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let page = (
        span(),
        pick(),
        any::<bool>(),
        0..4usize,
        prop_oneof![Just(0usize), 1..10usize, Just(usize::MAX)],
    );
    let scan = page.prop_map(
        |((key, range_end), revision, keys_only, keys_max, bytes_max)| ScanRequest {
            key,
            range_end,
            revision,
            serializable: false,
            keys_only,
            keys_max,
            bytes_max,
        },
    );
    let kind = prop_oneof![
        3 => Just(MemberChangeKind::Add),
        1 => Just(MemberChangeKind::Promote),
        1 => Just(MemberChangeKind::Remove)
    ];
    let change = prop_oneof![Just(None), (kind, 1_u64..6).prop_map(Some)];
    prop_oneof![
        30 => action().prop_map(Step::Propose),
        5 => Just(Step::EndEntry),
        10 => Just(Step::Apply),
        2 => change.prop_map(Step::Other),
        6 => range().prop_map(Step::Range),
        8 => list().prop_map(Step::List),
        2 => read_txn().prop_map(Step::ReadTxn),
        2 => scan.prop_map(Step::Scan),
        1 => lease().prop_map(Step::Attached),
        6 => (0..STREAMS, watch_create()).prop_map(|(stream, create)| Step::Watch(stream, create)),
        2 => (0..STREAMS, 0..4usize).prop_map(|(stream, pick)| Step::Cancel(stream, pick)),
        2 => (0..STREAMS).prop_map(Step::RequestProgress),
        1 => (0..STREAMS).prop_map(Step::NotifyProgress),
        8 => (0..STREAMS, prop_oneof![2 => 1..4usize, 1 => Just(usize::MAX)])
            .prop_map(|(stream, outputs_max)| Step::Poll(stream, outputs_max)),
        5 => (1..50usize).prop_map(Step::Compact),
        1 => Just(Step::Restart),
    ]
}

/// The bounds of watch buffers and of the record cache, then the steps.
fn case() -> impl Strategy<Value = (usize, usize, u64, Vec<Step>)> {
    let buffer_bytes = prop_oneof![Just(1usize), Just(200usize), Just(1 << 20)];
    let cache_bytes = prop_oneof![Just(1u64), Just(1000u64), Just(1 << 20)];
    // Mostly short ones, since most faults need little; some long ones, for compactions upon compactions.
    let steps = prop_oneof![7 => vec(step(), 1..120), 1 => vec(step(), 300..600)];
    (1..9usize, buffer_bytes, cache_bytes, steps)
}

fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() {
            default.cases
        } else {
            cases
        },
        max_shrink_iters: 20_000,
        failure_persistence: None,
        ..default
    }
}

proptest! {
    #![proptest_config(config(6000))]

    /// On an engine of plain maps, so that many cases run.
    #[test]
    fn behaves_like_the_model((events, bytes, cache, steps) in case()) {
        run(&mut Harness::<MapEngine>::new(events, bytes, cache), steps);
    }
}

proptest! {
    #![proptest_config(config(60))]

    /// On the engine in memory.
    #[test]
    fn behaves_like_the_model_in_memory((events, bytes, cache, steps) in case()) {
        run(&mut Harness::<storage::MemoryEngine>::new(events, bytes, cache), steps);
    }

    /// On RocksDB, where opening and closing the engine is most of the time.
    #[test]
    fn behaves_like_the_model_on_rocksdb((events, bytes, cache, steps) in case()) {
        run(&mut Harness::<storage::RocksEngine>::new(events, bytes, cache), steps);
    }
}
