//! Watchers over long histories, and under threads: what the model test, which is short and single-threaded, cannot
//! reach.

#![allow(
    clippy::disallowed_methods,
    reason = "threads and time are what some of these tests are about"
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use api::codec::Action;
use api::kv::*;
use api::store::{WatchCreate, WatchOutput, WatchStream};
use bytes::Bytes;
use metastore_mvcc::{CompactionProgress, Machine, Options, Stream};
use prost::Message;
use storage::Engine;

use support::{Flag, MapEngine, TestEngine, entry, next_output};

fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> RequestOp {
    let put = PutRequest {
        key: key.into(),
        value: value.into(),
        ..Default::default()
    };
    RequestOp {
        request: Some(RequestOpKind::Put(put)),
    }
}

/// A transaction without conditions.
fn txn(ops: Vec<RequestOp>) -> Action {
    Action::Txn(TxnRequest {
        success: ops,
        ..Default::default()
    })
}

fn everything(start_revision: i64) -> WatchCreate {
    WatchCreate {
        range_end: Bytes::from_static(&[0]),
        start_revision,
        ..Default::default()
    }
}

fn revisions(events: &[Event]) -> Vec<i64> {
    let mut revisions: Vec<i64> = events
        .iter()
        .map(|event| event.kv.as_ref().unwrap().mod_revision)
        .collect();
    revisions.dedup();
    revisions
}

/// Everything that a stream has to say until it waits: the events' revisions and number, output by output.
fn drain<E: Engine>(stream: &mut Stream<E>) -> Vec<(Vec<i64>, usize)> {
    let flag = Arc::new(Flag::default());
    let mut outputs = Vec::new();
    while let Some(output) = next_output(stream, &flag) {
        let WatchOutput::Events { events, .. } = output else {
            panic!("{output:?}")
        };
        outputs.push((revisions(&events), events.len()));
    }
    outputs
}

/// A long history comes in bounded pieces, none of which begins or ends within a revision.
#[test]
fn history_comes_in_pieces() {
    let (engine, ()) = MapEngine::fresh();
    let mut machine = Machine::open(engine, &Options::default()).unwrap();
    let all: Vec<_> = (0..2500)
        .map(|at| (at, txn(vec![put("a", ""), put("b", "")])))
        .collect();
    machine.apply(&[entry(1, 1, &all)]).unwrap();

    let mut stream = machine.hub().stream();
    stream.create(everything(1)).unwrap();
    let outputs = drain(&mut stream);
    assert_eq!(
        outputs.iter().map(|(_, events)| *events).collect::<Vec<_>>(),
        [2000, 2000, 1000]
    );
    let seen: Vec<i64> = outputs.into_iter().flat_map(|(revisions, _)| revisions).collect();
    assert_eq!(seen, (2..2502).collect::<Vec<_>>());

    // A watcher whose key did not change for longer than one piece of reading takes is not forgotten.
    let rare = [(0, txn(vec![put("rare", "")]))];
    let often: Vec<_> = (0..12_000).map(|at| (at, txn(vec![put("often", "")]))).collect();
    machine.apply(&[entry(2, 1, &often), entry(3, 1, &rare)]).unwrap();
    let create = WatchCreate {
        key: "rare".into(),
        start_revision: 1,
        ..Default::default()
    };
    let mut stream = machine.hub().stream();
    stream.create(create).unwrap();
    assert_eq!(drain(&mut stream), [(vec![14_502], 1)]);
}

/// Bytes are bounded too: a piece of 256 KiB ends with the revision that exceeds the bound.
#[test]
fn pieces_are_bounded_in_bytes() {
    let (engine, ()) = MapEngine::fresh();
    let mut machine = Machine::open(engine, &Options::default()).unwrap();
    let large = Bytes::from(vec![b'x'; 64 << 10]);
    let ops = || (0..3).map(|at| put(format!("{at}"), large.clone())).collect();
    let all: Vec<_> = (0..5).map(|at| (at, txn(ops()))).collect();
    machine.apply(&[entry(1, 1, &all)]).unwrap();
    let mut stream = machine.hub().stream();
    stream.create(everything(1)).unwrap();
    let outputs = drain(&mut stream);
    assert_eq!(outputs, [(vec![2, 3], 6), (vec![4, 5], 6), (vec![6], 3)]);
}

/// While one watcher is caught up over a long history, a live one on the same stream is not kept waiting for its end.
#[test]
fn history_does_not_hold_up_news() {
    let (engine, ()) = MapEngine::fresh();
    let mut machine = Machine::open(engine, &Options::default()).unwrap();
    let old: Vec<_> = (0..10_000).map(|at| (at, txn(vec![put("old", "")]))).collect();
    machine.apply(&[entry(1, 1, &old)]).unwrap();
    let mut stream = machine.hub().stream();
    let create = WatchCreate {
        key: "news".into(),
        ..Default::default()
    };
    let news = stream.create(create).unwrap().watch_id;
    stream.create(everything(1)).unwrap();
    machine
        .apply(&[entry(2, 1, &[(0, txn(vec![put("news", "")]))])])
        .unwrap();

    let flag = Arc::new(Flag::default());
    let first_two = [next_output(&mut stream, &flag), next_output(&mut stream, &flag)];
    let of_news = |output: &Option<WatchOutput>| matches!(output, Some(WatchOutput::Events { watch_id, .. }) if *watch_id == news);
    assert!(first_two.iter().any(of_news));
    assert_eq!(
        drain(&mut stream).last().unwrap().0.last(),
        Some(&10_002),
        "and the history comes to its end"
    );
}

/// What one commit brings a watcher comes as one answer, also if it begins in the middle; and what several watchers of a
/// stream wait for counts once.
#[test]
fn one_commit_is_one_answer() {
    let (engine, ()) = MapEngine::fresh();
    let options = Options {
        watch_buffer_events_max: 8,
        ..Default::default()
    };
    let mut machine = Machine::open(engine, &options).unwrap();
    let hub = machine.hub().clone();
    let mut stream = hub.stream();
    for start in [0, 0, 4, 6] {
        stream.create(everything(start)).unwrap();
    }
    let puts = |count: u64| -> Vec<_> { (0..count).map(|at| (at, txn(vec![put("a", "")]))).collect() };
    machine.apply(&[entry(1, 1, &puts(2)), entry(2, 1, &puts(2))]).unwrap();
    assert_eq!(hub.stats().pending_events, 4 + 4 + 2);
    machine.apply(&[entry(3, 1, &puts(3))]).unwrap();
    assert_eq!(
        hub.stats().behind,
        0,
        "six events wait, however many wait for them, so there is room"
    );
    let mut outputs = drain(&mut stream);
    outputs.sort();
    let expected = [
        (vec![2, 3, 4, 5], 4),
        (vec![2, 3, 4, 5], 4),
        (vec![4, 5], 2),
        (vec![6, 7, 8], 3),
        (vec![6, 7, 8], 3),
        (vec![6, 7, 8], 3),
        (vec![6, 7, 8], 3),
    ];
    assert_eq!(outputs, expected);
    assert_eq!(hub.stats().pending_events, 0);

    // No more at once than half of the buffer.
    machine.apply(&[entry(4, 1, &puts(6))]).unwrap();
    let outputs = drain(&mut stream);
    assert_eq!(outputs.len(), 8);
    assert!(
        outputs
            .iter()
            .all(|(revisions, _)| revisions[..] == [9, 10, 11, 12] || revisions[..] == [13, 14])
    );

    // Whoever goes takes what waits for him along, and nothing of anybody else's.
    machine.apply(&[entry(5, 1, &puts(2))]).unwrap();
    assert!(stream.cancel(1));
    assert_eq!(hub.stats().pending_events, 3 * 2);
    assert_eq!(drain(&mut stream), vec![(vec![15, 16], 2); 3]);
    machine.apply(&[entry(6, 1, &puts(2))]).unwrap();
    drop(stream);
    assert_eq!(hub.stats().pending_events, 0);
}

/// A watcher that comes while entries are being applied, of which nobody gathered the events, misses nothing of what
/// comes after the revision that it was told.
#[test]
fn first_watcher_comes_while_applying() {
    let mut held_up = 0;
    for round in 0..300u64 {
        let (engine, ()) = MapEngine::fresh();
        let mut machine = Machine::open(engine, &Options::default()).unwrap();
        let hub = machine.hub().clone();
        let go = AtomicBool::new(false);
        let (created, mut stream) = std::thread::scope(|scope| {
            let go = &go;
            let watcher = scope.spawn(move || {
                while !go.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                for _ in 0..round * 20 {
                    std::hint::spin_loop();
                }
                let mut stream = hub.stream();
                let start = if round & 1 == 0 { 0 } else { 2 };
                (stream.create(everything(start)).unwrap(), stream)
            });
            go.store(true, Ordering::Release);
            for index in 1..=20 {
                let puts: Vec<_> = (0..5).map(|at| (at, txn(vec![put("a", "")]))).collect();
                machine.apply(&[entry(index, 1, &puts)]).unwrap();
            }
            watcher.join().expect("it watches")
        });
        held_up += u64::from((2..101).contains(&created.revision));
        let first = if round & 1 == 0 { created.revision + 1 } else { 2 };
        let seen: Vec<i64> = drain(&mut stream)
            .into_iter()
            .flat_map(|(revisions, _)| revisions)
            .collect();
        assert_eq!(
            seen,
            (first..=101).collect::<Vec<_>>(),
            "round {round}, created at {}",
            created.revision
        );
    }
    assert!(held_up > 0, "some came in the middle");
}

/// One writer, readers, watchers that come and go, and compaction, all at once. Every revision writes the same number
/// to two keys, and it is the revision's own, so that every answer can be checked without knowing what went on.
fn under_threads<E: TestEngine>(how_long: Duration) {
    let (engine, _guard) = E::fresh();
    let options = Options {
        watch_buffer_events_max: 16,
        list_cache_keys_min: 1,
        ..Default::default()
    };
    let mut machine = Machine::open(engine, &options).unwrap();
    let hub = machine.hub().clone();
    let reader = machine.reader();
    let stop = AtomicBool::new(false);
    let compacted_by_writer = AtomicI64::new(0);
    let begun = Instant::now();

    std::thread::scope(|scope| {
        let stop = &stop;
        let compacted_by_writer = &compacted_by_writer;
        scope.spawn(move || {
            let (mut index, mut revision) = (0, 1);
            let mut random = 7u64;
            // A busy machine may take longer to do enough.
            let is_enough = || compacted_by_writer.load(Ordering::Relaxed) > 1;
            while begun.elapsed() < how_long || (begun.elapsed() < 30 * how_long && !(is_enough() && revision > 100)) {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let mut operations = Vec::new();
                for _ in 0..random >> 60 {
                    revision += 1;
                    let value = revision.to_string();
                    operations.push((0, txn(vec![put("x", value.clone()), put("y", value)])));
                }
                if random >> 40 & 15 == 0 && revision > 40 {
                    let at = revision - (random >> 50 & 31) as i64;
                    let compact = CompactionRequest {
                        revision: at,
                        physical: false,
                    };
                    compacted_by_writer.fetch_max(at, Ordering::Relaxed);
                    operations.push((0, Action::Compact(compact)));
                }
                index += 1;
                machine.apply(&[entry(index, 1, &operations)]).unwrap();
                if random >> 45 & 1 == 0 {
                    while let CompactionProgress::Going { .. } = machine.compact_step(20).unwrap() {}
                }
                // Watchers must have a chance to catch up, so that they are live at times.
                if random >> 55 & 7 == 0 {
                    std::thread::sleep(Duration::from_micros(300));
                }
            }
            stop.store(true, Ordering::Release);
        });

        for at in 0..2u64 {
            let reader = reader.clone();
            scope.spawn(move || {
                let mut random = at + 11;
                while !stop.load(Ordering::Acquire) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let newest = reader.revision();
                    let revision = if random >> 63 == 0 {
                        0
                    } else {
                        newest - (random >> 40 & 15) as i64
                    };
                    let range = RangeRequest {
                        key: "x".into(),
                        range_end: "z".into(),
                        revision: revision.max(0),
                        ..Default::default()
                    };
                    let read = if random >> 62 & 1 == 0 {
                        reader.range(&range)
                    } else {
                        reader.list(&range, false).map(|list| {
                            let list = list.expect("it is one");
                            RangeResponse {
                                header: list.header.clone(),
                                kvs: RangeResponse::decode(&list.kvs.concat()[..]).unwrap().kvs,
                                more: list.more,
                                count: list.count,
                            }
                        })
                    };
                    match read {
                        Ok(response) => {
                            let seen = response.header.unwrap().revision;
                            assert!(seen >= newest, "what was published is seen");
                            let at = if range.revision > 0 { range.revision } else { seen };
                            let expected = if at == 1 { vec![] } else { vec![at, at] };
                            let values: Vec<i64> = response.kvs.iter().map(number).collect();
                            assert_eq!(values, expected);
                        }
                        Err(metastore_mvcc::Failure::Refused(error)) => {
                            assert_eq!(error, api::Error::Compacted);
                            assert!(range.revision > 0 && range.revision < compacted_by_writer.load(Ordering::Relaxed));
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }

        for at in 0..2u64 {
            let hub = hub.clone();
            let reader = reader.clone();
            scope.spawn(move || {
                let mut random = at + 23;
                while !stop.load(Ordering::Acquire) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let start = match random >> 61 {
                        0..4 => 0,
                        4 => reader.revision() + 3,
                        _ => (reader.revision() - (random >> 40 & 63) as i64).max(1),
                    };
                    let mut stream = hub.stream();
                    let created = stream.create(everything(start)).unwrap();
                    let flag = Arc::new(Flag::default());
                    // What comes first is known but for a history that begins with the empty store.
                    let mut next = if start == 0 { created.revision + 1 } else { start.max(2) };
                    let mut left = random >> 50 & 1023;
                    while left > 0 && !stop.load(Ordering::Acquire) {
                        match next_output(&mut stream, &flag) {
                            None => std::thread::yield_now(),
                            Some(WatchOutput::Events { events, .. }) => {
                                left -= 1;
                                for pair in events.chunks(2) {
                                    let numbers: Vec<i64> =
                                        pair.iter().map(|event| number(event.kv.as_ref().unwrap())).collect();
                                    assert_eq!(numbers, [next, next], "each revision once, whole, in order");
                                    next += 1;
                                }
                            }
                            Some(WatchOutput::Compacted { compact_revision, .. }) => {
                                assert!(next < compact_revision);
                                break;
                            }
                            Some(output) => panic!("{output:?}"),
                        }
                        if left == 500 {
                            // Fall behind, or behind even what is compacted.
                            std::thread::sleep(Duration::from_millis(5));
                        }
                    }
                }
            });
        }
    });
    assert!(hub.failure().is_none());
    let stats = hub.stats();
    assert_eq!(
        (stats.watchers, stats.streams, stats.behind, stats.pending_events),
        (0, 0, 0, 0)
    );
    assert!(reader.compacted() > 1 && reader.revision() > 100, "enough went on");
}

fn number(kv: &KeyValue) -> i64 {
    let number = std::str::from_utf8(&kv.value).unwrap().parse().unwrap();
    assert_eq!(kv.mod_revision, number);
    number
}

#[test]
fn threads_on_plain_maps() {
    under_threads::<MapEngine>(Duration::from_secs(2));
}

#[test]
fn threads_in_memory() {
    under_threads::<storage::MemoryEngine>(Duration::from_secs(2));
}

#[test]
fn threads_on_rocksdb() {
    under_threads::<storage::RocksEngine>(Duration::from_secs(2));
}
