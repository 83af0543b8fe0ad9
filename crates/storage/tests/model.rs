//! Random batches, views and cursors: both engines against plain ordered maps.

use std::collections::BTreeMap;
use std::path::Path;

use metastore_storage::conformance::FAMILIES;
use metastore_storage::{Batch, Cursor, Engine, Family, KeyRange, MemoryEngine, RocksEngine, RocksOptions, View};
use proptest::prelude::*;

type Map = BTreeMap<Vec<u8>, Vec<u8>>;
type Maps = [Map; 3];

#[derive(Debug, Clone)]
enum Write {
    Put(usize, Vec<u8>, Vec<u8>),
    Delete(usize, Vec<u8>),
    DeleteRange(usize, Vec<u8>, Vec<u8>),
}

#[derive(Debug, Clone)]
enum Move {
    Seek(Vec<u8>),
    SeekForPrev(Vec<u8>),
    First,
    Last,
    Next,
    Prev,
}

#[derive(Debug, Clone)]
enum Step {
    Batch(Vec<Write>),
    /// Many keys at once, so that there is more than one leaf, block and file.
    Fill {
        family: usize,
        first: u16,
        count: u16,
    },
    View,
    DropView(usize),
    Flush,
    Reopen,
    Get {
        view: usize,
        family: usize,
        key: Vec<u8>,
    },
    Walk {
        view: usize,
        family: usize,
        start: Vec<u8>,
        end: Option<Vec<u8>>,
        moves: Vec<Move>,
    },
}

fn key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => prop::collection::vec(prop::sample::select(vec![0u8, 1, 7, 255]), 0..4),
        3 => any::<u16>().prop_map(|number| filled_key(number % 1000)),
    ]
}

fn filled_key(number: u16) -> Vec<u8> {
    format!("/registry/{number:04}").into_bytes()
}

fn write() -> impl Strategy<Value = Write> {
    let value = prop::collection::vec(any::<u8>(), 0..20);
    prop_oneof![
        4 => (0..3usize, key(), value).prop_map(|(family, key, value)| Write::Put(family, key, value)),
        2 => (0..3usize, key()).prop_map(|(family, key)| Write::Delete(family, key)),
        1 => (0..3usize, key(), key()).prop_map(|(family, start, end)| Write::DeleteRange(family, start, end)),
    ]
}

fn cursor_move() -> impl Strategy<Value = Move> {
    prop_oneof![
        key().prop_map(Move::Seek),
        key().prop_map(Move::SeekForPrev),
        Just(Move::First),
        Just(Move::Last),
        Just(Move::Next),
        Just(Move::Next),
        Just(Move::Prev),
        Just(Move::Prev),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let walk = (
        any::<usize>(),
        0..3usize,
        key(),
        prop::option::of(key()),
        prop::collection::vec(cursor_move(), 1..30),
    );
    prop_oneof![
        8 => prop::collection::vec(write(), 1..8).prop_map(Step::Batch),
        2 => (0..3usize, 0..1000u16, 1..400u16).prop_map(|(family, first, count)| Step::Fill { family, first, count }),
        3 => Just(Step::View),
        2 => any::<usize>().prop_map(Step::DropView),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        4 => (any::<usize>(), 0..3usize, key()).prop_map(|(view, family, key)| Step::Get { view, family, key }),
        6 => walk.prop_map(|(view, family, start, end, moves)| Step::Walk { view, family, start, end, moves }),
    ]
}

fn apply(maps: &mut Maps, write: &Write) {
    match write {
        Write::Put(family, key, value) => drop(maps[*family].insert(key.clone(), value.clone())),
        Write::Delete(family, key) => drop(maps[*family].remove(key)),
        Write::DeleteRange(family, start, end) => maps[*family].retain(|key, _| key < start || key >= end),
    }
}

fn write_all<E: Engine>(engine: &E, maps: &mut Maps, writes: &[Write]) {
    let mut batch = engine.batch();
    for write in writes {
        apply(maps, write);
        match write {
            Write::Put(family, key, value) => batch.put(Family(*family), key, value),
            Write::Delete(family, key) => batch.delete(Family(*family), key),
            Write::DeleteRange(family, start, end) => batch.delete_range(Family(*family), start, end),
        }
    }
    engine.write(batch).unwrap();
}

fn walk<V: View>(view: &V, maps: &Maps, family: usize, start: &[u8], end: Option<&[u8]>, moves: &[Move]) {
    let in_range: Vec<_> = maps[family]
        .iter()
        .map(|(key, value)| (key.as_slice(), value.as_slice()))
        .filter(|(key, _)| *key >= start && end.is_none_or(|end| *key < end))
        .collect();
    let mut cursor = view.cursor(Family(family), KeyRange { start, end }).unwrap();
    let mut at: Option<usize> = None;
    for step in moves {
        match step {
            Move::Seek(key) => {
                cursor.seek(key).unwrap();
                at = Some(in_range.partition_point(|(other, _)| *other < key.as_slice()));
            }
            Move::SeekForPrev(key) => {
                cursor.seek_for_prev(key).unwrap();
                at = in_range
                    .partition_point(|(other, _)| *other <= key.as_slice())
                    .checked_sub(1);
            }
            Move::First => {
                cursor.seek_first().unwrap();
                at = Some(0);
            }
            Move::Last => {
                cursor.seek_last().unwrap();
                at = in_range.len().checked_sub(1);
            }
            Move::Next if at.is_some() => {
                cursor.next().unwrap();
                at = at.map(|at| at + 1);
            }
            Move::Prev if at.is_some() => {
                cursor.prev().unwrap();
                at = at.and_then(|at| at.checked_sub(1));
            }
            Move::Next | Move::Prev => {}
        }
        at = at.filter(|&at| at < in_range.len());
        assert_eq!(cursor.entry(), at.map(|at| in_range[at]), "after {step:?}");
    }
}

/// Runs the steps; the engine is opened again in between, so views end there.
fn run<E: Engine>(steps: &[Step], open: impl Fn() -> E) {
    let mut maps = Maps::default();
    let mut steps = steps.iter();
    loop {
        let engine = open();
        for (family, map) in maps.iter().enumerate() {
            let all: Vec<_> = std::iter::once(Move::First)
                .chain((0..map.len()).map(|_| Move::Next))
                .collect();
            walk(&engine.view(), &maps, family, b"", None, &all);
        }
        let mut views = vec![(engine.view(), maps.clone())];
        loop {
            let Some(step) = steps.next() else { return };
            match step {
                Step::Batch(writes) => write_all(&engine, &mut maps, writes),
                Step::Fill { family, first, count } => {
                    let put = |number| Write::Put(*family, filled_key(number), number.to_be_bytes().to_vec());
                    let writes: Vec<_> = (*first..first + count).map(put).collect();
                    write_all(&engine, &mut maps, &writes);
                }
                Step::View => views.push((engine.view(), maps.clone())),
                Step::DropView(number) => {
                    if views.len() > 1 {
                        views.swap_remove(number % views.len());
                    }
                }
                Step::Flush => engine.flush().unwrap(),
                Step::Reopen => {
                    engine.flush().unwrap();
                    break;
                }
                Step::Get { view, family, key } => {
                    let (view, seen) = &views[view % views.len()];
                    assert_eq!(
                        view.get(Family(*family), key).unwrap().as_deref(),
                        seen[*family].get(key).map(Vec::as_slice)
                    );
                    let newest = engine.get(Family(*family), key).unwrap();
                    assert_eq!(newest.as_deref(), maps[*family].get(key).map(Vec::as_slice));
                }
                Step::Walk {
                    view,
                    family,
                    start,
                    end,
                    moves,
                } => {
                    let (view, seen) = &views[view % views.len()];
                    walk(view, seen, *family, start, end.as_deref(), moves);
                }
            }
        }
    }
}

fn memory(dir: &Path) -> MemoryEngine {
    MemoryEngine::open(dir, FAMILIES).unwrap()
}

fn rocks(dir: &Path) -> RocksEngine {
    RocksEngine::open(dir, FAMILIES, &RocksOptions::default()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_memory_engine_is_an_ordered_map(steps in prop::collection::vec(step(), 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        run(&steps, || memory(dir.path()));
    }
}

proptest! {
    // Each opens RocksDB several times.
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn rocksdb_is_an_ordered_map(steps in prop::collection::vec(step(), 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        run(&steps, || rocks(dir.path()));
    }
}
