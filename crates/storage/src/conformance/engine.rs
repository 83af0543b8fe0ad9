//! The suite for [`Engine`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::engine::{Access, Batch, Cursor, Engine, Family, FamilySpec, KeyRange, View};

/// The families that [`engine`] wants the adapter to be opened with.
pub const FAMILIES: &[FamilySpec] = &[
    FamilySpec {
        name: "point",
        access: Access::Point,
    },
    FamilySpec {
        name: "sequential",
        access: Access::Sequential,
    },
    FamilySpec {
        name: "small",
        access: Access::Point,
    },
];

const A: Family = Family(0);
const B: Family = Family(1);
const SMALL: Family = Family(2);
const WHOLE: KeyRange<'_> = KeyRange { start: b"", end: None };

/// Runs every check against the engine that `open` opens with [`FAMILIES`].
pub fn engine<E: Engine>(mut open: impl FnMut(&str) -> E) {
    the_last_operation_of_a_batch_wins(&open("last-wins"));
    range_deletes_cover_their_range_only(&open("range-deletes"));
    views_never_change(&open("views"));
    cursors_agree_with_a_model(&open("cursors"));
    odd_sizes_are_kept(&open("sizes"));
    durable_reads_never_lead(&mut open);
    what_was_flushed_is_there_again(&mut open);
    a_reopened_engine_holds_a_prefix(&mut open);
    readers_see_whole_batches(&open("readers"));
    numbers_are_well_formed(&open("numbers"));
}

fn put<E: Engine>(engine: &E, family: Family, key: &[u8], value: &[u8]) {
    let mut batch = engine.batch();
    batch.put(family, key, value);
    engine.write(batch).unwrap();
}

fn contents<V: View>(view: &V, family: Family, range: KeyRange<'_>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut cursor = view.cursor(family, range).unwrap();
    cursor.seek_first().unwrap();
    let mut entries = Vec::new();
    while let Some((key, value)) = cursor.entry() {
        entries.push((key.to_vec(), value.to_vec()));
        cursor.next().unwrap();
    }
    entries
}

fn keys<E: Engine>(engine: &E, family: Family) -> Vec<Vec<u8>> {
    contents(&engine.view(), family, WHOLE)
        .into_iter()
        .map(|(key, _)| key)
        .collect()
}

fn the_last_operation_of_a_batch_wins<E: Engine>(engine: &E) {
    let mut batch = engine.batch();
    assert!(batch.is_empty());
    batch.put(A, b"put twice", b"1");
    batch.put(A, b"put twice", b"2");
    batch.put(A, b"deleted", b"1");
    batch.delete(A, b"deleted");
    batch.delete(A, b"put after delete");
    batch.put(A, b"put after delete", b"3");
    batch.delete(A, b"never there");
    batch.put(A, b"range 1", b"1");
    batch.delete_range(A, b"range", b"range 9");
    batch.put(A, b"range 2", b"4");
    assert_eq!(batch.len(), 10);
    assert!(batch.size_bytes() > 60);
    let stats = engine.write(batch).unwrap();
    assert_eq!(stats.operations, 10);

    let expected: [(&[u8], &[u8]); 3] = [(b"put after delete", b"3"), (b"put twice", b"2"), (b"range 2", b"4")];
    let expected = expected.map(|(key, value)| (key.to_vec(), value.to_vec()));
    assert_eq!(contents(&engine.view(), A, WHOLE), expected);
    assert_eq!(engine.get(A, b"deleted").unwrap(), None);
    assert_eq!(engine.get(A, b"range 2").unwrap().unwrap(), "4");
    assert_eq!(engine.get(B, b"range 2").unwrap(), None, "families are apart");
    engine.write(engine.batch()).unwrap();
}

fn range_deletes_cover_their_range_only<E: Engine>(engine: &E) {
    let fill = || {
        let mut batch = engine.batch();
        for key in [b"a", b"b", b"c", b"d"] {
            batch.put(A, key, b"");
            batch.put(B, key, b"");
        }
        engine.write(batch).unwrap();
    };
    let delete = |start: &[u8], end: &[u8]| {
        let mut batch = engine.batch();
        batch.delete_range(A, start, end);
        engine.write(batch).unwrap();
        keys(engine, A).concat()
    };
    for flushed in [false, true] {
        let refill = || {
            fill();
            if flushed {
                engine.flush().unwrap();
            }
        };
        refill();
        assert_eq!(delete(b"b", b"b"), b"abcd", "an empty range");
        assert_eq!(delete(b"c", b"b"), b"abcd", "a range that ends before it begins");
        assert_eq!(delete(b"b", b"c"), b"acd", "the end is not in the range");
        refill();
        assert_eq!(delete(b"", b"c"), b"cd");
        refill();
        assert_eq!(delete(b"bb", b"zz"), b"ab");
        refill();
        assert_eq!(delete(b"", b"\xff"), b"");
        assert_eq!(keys(engine, B).concat(), b"abcd", "the other family");
        assert_eq!(engine.get(A, b"b").unwrap(), None);
        fill();
        assert_eq!(keys(engine, A).concat(), b"abcd", "written after the range was deleted");
    }
    engine.compact_hint(A, WHOLE);
}

fn views_never_change<E: Engine>(engine: &E) {
    let mut views = Vec::new();
    for round in 0..20u8 {
        let mut batch = engine.batch();
        batch.put(A, b"key", &[round]);
        batch.put(B, &[round], &[round]);
        if round % 5 == 4 {
            batch.delete_range(B, &[0], &[round - 1]);
        }
        engine.write(batch).unwrap();
        let view = engine.view();
        let seen = contents(&view, B, WHOLE);
        views.push((round, seen, view));
        if round % 7 == 0 {
            engine.flush().unwrap();
        }
    }
    for (round, seen, view) in &views {
        assert_eq!(view.get(A, b"key").unwrap().unwrap(), [*round].as_slice());
        assert_eq!(&contents(view, B, WHOLE), seen);
        assert_eq!(view.get(B, &[round + 1]).unwrap(), None);
    }
    assert_eq!(engine.get(A, b"key").unwrap().unwrap(), [19].as_slice());
}

fn cursors_agree_with_a_model<E: Engine>(engine: &E) {
    let mut model = BTreeMap::new();
    // Some on disk, some not, some deleted on either side.
    for (number, key) in ["a", "aa", "ab", "b", "c", "ca", "d", "e", "e\0", "f"]
        .iter()
        .enumerate()
    {
        put(engine, A, key.as_bytes(), &[number as u8]);
        model.insert(key.as_bytes().to_vec(), vec![number as u8]);
        if number == 5 {
            let mut batch = engine.batch();
            batch.delete(A, b"aa");
            engine.write(batch).unwrap();
            model.remove(&b"aa"[..]);
            engine.flush().unwrap();
        }
    }
    let mut batch = engine.batch();
    batch.delete_range(A, b"c", b"ca\0");
    engine.write(batch).unwrap();
    model.retain(|key, _| !(b"c".as_slice()..b"ca\0").contains(&key.as_slice()));

    let bounds: &[&[u8]] = &[b"", b"a", b"aa", b"ab", b"b", b"bb", b"ca", b"e", b"e\0", b"f", b"zz"];
    let view = engine.view();
    for &start in bounds {
        for end in bounds.iter().map(|end| Some(*end)).chain([None]) {
            let range = KeyRange { start, end };
            let expected: Vec<_> = model
                .iter()
                .filter(|(key, _)| key.as_slice() >= start && end.is_none_or(|end| key.as_slice() < end))
                .map(|(key, value)| (key.as_slice(), value.as_slice()))
                .collect();
            let mut cursor = view.cursor(A, range).unwrap();
            assert_eq!(cursor.entry(), None, "a new cursor stands nowhere");
            assert_eq!(
                contents(&view, A, range).len(),
                expected.len(),
                "forwards in {start:?}..{end:?}"
            );

            let mut backwards = Vec::new();
            cursor.seek_last().unwrap();
            while let Some((key, value)) = cursor.entry() {
                backwards.push((key.to_vec(), value.to_vec()));
                cursor.prev().unwrap();
            }
            backwards.reverse();
            let backwards: Vec<_> = backwards
                .iter()
                .map(|(key, value)| (key.as_slice(), value.as_slice()))
                .collect();
            assert_eq!(backwards, expected, "backwards in {start:?}..{end:?}");

            for &target in bounds {
                let at_or_after = expected.partition_point(|(key, _)| *key < target);
                cursor.seek(target).unwrap();
                assert_eq!(
                    cursor.entry(),
                    expected.get(at_or_after).copied(),
                    "seek {target:?} in {start:?}..{end:?}"
                );
                if cursor.entry().is_some() {
                    cursor.prev().unwrap();
                    assert_eq!(
                        cursor.entry(),
                        at_or_after.checked_sub(1).map(|before| expected[before])
                    );
                }
                let at_or_before = expected.partition_point(|(key, _)| *key <= target).checked_sub(1);
                cursor.seek_for_prev(target).unwrap();
                assert_eq!(
                    cursor.entry(),
                    at_or_before.map(|at| expected[at]),
                    "seek_for_prev {target:?} in {start:?}..{end:?}"
                );
                if let Some(at) = at_or_before {
                    cursor.next().unwrap();
                    assert_eq!(cursor.entry(), expected.get(at + 1).copied());
                }
            }
        }
    }
}

fn odd_sizes_are_kept<E: Engine>(engine: &E) {
    let large = vec![7; 3 << 20];
    let long_key = vec![9; 60 << 10];
    put(engine, A, b"empty", b"");
    put(engine, A, b"large", &large);
    put(engine, A, &long_key, b"long key");
    for _ in 0..2 {
        assert_eq!(engine.get(A, b"empty").unwrap().unwrap(), "");
        assert_eq!(engine.get(A, b"large").unwrap().unwrap(), large);
        assert_eq!(engine.view().get(A, &long_key).unwrap().unwrap(), "long key");
        engine.flush().unwrap();
    }
    assert!(engine.disk_bytes() > 0);
    assert!(engine.live_bytes() > 0);
}

fn durable_reads_never_lead<E: Engine>(open: &mut impl FnMut(&str) -> E) {
    let number = |value: Option<bytes::Bytes>| value.map_or(0, |value| value[0]);
    let mut engine = open("durable");
    let mut next = 1;
    for _ in 0..3 {
        let mut known = number(engine.get_durable(SMALL, b"number").unwrap());
        for step in 0..10 {
            put(&engine, SMALL, b"number", &[next]);
            let durable = number(engine.get_durable(SMALL, b"number").unwrap());
            assert!((known..=next).contains(&durable), "{known} {durable} {next}");
            known = durable;
            if step == 4 {
                engine.flush().unwrap();
                known = next;
                assert_eq!(number(engine.get_durable(SMALL, b"number").unwrap()), next);
            }
            next += 1;
        }
        drop(engine);
        engine = open("durable");
        let found = number(engine.get(SMALL, b"number").unwrap());
        assert!(
            (known..next).contains(&found),
            "said to be durable {known}, found {found}, written {}",
            next - 1
        );
        next = found + 1;
    }
    let mut batch = engine.batch();
    batch.delete(SMALL, b"number");
    engine.write(batch).unwrap();
    engine.flush().unwrap();
    assert_eq!(engine.get_durable(SMALL, b"number").unwrap(), None);
    assert_eq!(engine.get_durable(SMALL, b"never there").unwrap(), None);
    assert_eq!(engine.get_durable(B, b"never there").unwrap(), None);
}

fn what_was_flushed_is_there_again<E: Engine>(open: &mut impl FnMut(&str) -> E) {
    let engine = open("flushed");
    for number in 0..2000u32 {
        let mut batch = engine.batch();
        batch.put(A, &number.wrapping_mul(0x9E37_79B9).to_be_bytes(), &[1; 100]);
        batch.put(B, &number.to_be_bytes(), &[2; 100]);
        if number % 3 == 0 {
            batch.delete(B, &(number / 2).to_be_bytes());
        }
        engine.write(batch).unwrap();
    }
    let mut batch = engine.batch();
    batch.delete_range(B, &100u32.to_be_bytes(), &200u32.to_be_bytes());
    engine.write(batch).unwrap();
    engine.flush().unwrap();
    let before = [A, B, SMALL].map(|family| contents(&engine.view(), family, WHOLE));
    drop(engine);
    for _ in 0..2 {
        let engine = open("flushed");
        let after = [A, B, SMALL].map(|family| contents(&engine.view(), family, WHOLE));
        assert!(before == after);
    }
}

fn a_reopened_engine_holds_a_prefix<E: Engine>(open: &mut impl FnMut(&str) -> E) {
    let engine = open("prefix");
    let mut flushed = 0;
    for number in 1..=500u32 {
        let mut batch = engine.batch();
        for family in [A, B, SMALL] {
            batch.put(family, b"number", &number.to_be_bytes());
        }
        batch.put(B, &number.to_be_bytes(), b"");
        engine.write(batch).unwrap();
        if number % 180 == 0 {
            engine.flush().unwrap();
            flushed = number;
        }
    }
    drop(engine);
    let engine = open("prefix");
    let number_in = |family| {
        let value = engine.get(family, b"number").unwrap();
        value.map_or(0, |value| u32::from_be_bytes(value.as_ref().try_into().unwrap()))
    };
    let number = number_in(A);
    assert!((flushed..=500).contains(&number), "{number}");
    assert_eq!((number_in(B), number_in(SMALL)), (number, number));
    assert_eq!(keys(&engine, B).len(), number as usize + 1);
}

fn readers_see_whole_batches<E: Engine>(engine: &E) {
    const BATCHES: u32 = 3000;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut newest = 0;
                while !done.load(Ordering::Relaxed) {
                    let view = engine.view();
                    let number = view.get(A, b"number").unwrap();
                    let number = number.map_or(0, |value| u32::from_be_bytes(value.as_ref().try_into().unwrap()));
                    assert!(number >= newest, "views move on");
                    newest = number;
                    let first = number.saturating_sub(50) / 10 * 10;
                    let range = KeyRange {
                        start: &first.to_be_bytes(),
                        end: None,
                    };
                    let seen = contents(&view, B, range);
                    assert_eq!(seen.len() as u32, number + 1 - first.max(1), "{first} to {number}");
                    assert!(seen.iter().all(|(_, value)| *value == number.to_be_bytes()));
                    assert_eq!(view.get(B, &(number + 1).to_be_bytes()).unwrap(), None);
                }
            });
        }
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                engine.flush().unwrap();
            }
        });
        for number in 1..=BATCHES {
            let mut batch = engine.batch();
            batch.put(A, b"number", &number.to_be_bytes());
            // Every key from 60 before on says which batch wrote it last; older ones go.
            let first = number.saturating_sub(60);
            batch.delete_range(B, &[0; 4], &(first / 10 * 10).to_be_bytes());
            for key in (first.max(1) / 10 * 10).max(1)..=number {
                batch.put(B, &key.to_be_bytes(), &number.to_be_bytes());
            }
            engine.write(batch).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
}

fn numbers_are_well_formed<E: Engine>(engine: &E) {
    put(engine, A, b"key", b"value");
    let stats = engine.stats();
    let mut names: Vec<_> = stats.iter().map(|stat| stat.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), stats.len(), "every name once");
    for stat in &stats {
        let fine = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        assert!(stat.name.bytes().all(fine), "{}", stat.name);
        assert_eq!(stat.counter, stat.name.ends_with("_total"), "{}", stat.name);
        assert!(
            stat.help.ends_with('.') && stat.value.is_finite() && stat.value >= 0.0,
            "{stat:?}"
        );
    }
}
