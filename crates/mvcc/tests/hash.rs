//! The hash of the history: against hashes that an etcd gave for the same operations, and against a small imitation of
//! what etcd stores and leaves out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::codec::{Action, Operation, encode_entry, encode_operation};
use api::kv::*;
use api::store::HashKv;
use api::{Error, Revision};
use metastore_mvcc::hash::hash_of_compaction;
use metastore_mvcc::keys::FAMILIES;
use metastore_mvcc::machine::Command;
use metastore_mvcc::{Committed, CompactionProgress, Failure, Machine, Options};
use prost::Message;
use storage::{Engine, MemoryEngine, RocksEngine, RocksOptions};

struct Store<E: Engine> {
    engine: Arc<E>,
    machine: Machine<E>,
}

impl<E: Engine> Store<E> {
    fn new(engine: E) -> Self {
        let engine = Arc::new(engine);
        Store {
            machine: Machine::open(engine.clone(), &Options::default()).expect("opens"),
            engine,
        }
    }

    fn reopen(&mut self) {
        self.machine = Machine::open(self.engine.clone(), &Options::default()).expect("opens");
    }

    fn apply(&mut self, action: Action) {
        let (index, term) = self.machine.applied();
        let operation = encode_operation(&Operation::new(1, action));
        let data = encode_entry([&operation[..]].into_iter()).into();
        let entry = Committed {
            index: index + 1,
            term: term.max(1),
            command: Command::Operations(data),
        };
        let applied = self.machine.apply(&[entry]).expect("applies");
        applied.replies[0].result.as_ref().expect("is carried out");
    }

    /// Does some of what compaction has to do; says whether any is left.
    fn compact_some(&mut self, steps: usize) -> bool {
        (0..steps).all(|_| matches!(self.machine.compact_step(2), Ok(CompactionProgress::Going { .. })))
    }

    fn hash(&self, revision: Revision) -> Result<HashKv, Error> {
        match self.machine.reader().hash_kv(revision) {
            Ok(hash) => Ok(hash),
            Err(Failure::Refused(error)) => Err(error),
            Err(Failure::Engine(error)) => panic!("the engine failed: {error}"),
        }
    }
}

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..Default::default()
    }
}

fn delete(key: &str, range_end: &[u8]) -> DeleteRangeRequest {
    DeleteRangeRequest {
        key: key.to_owned().into(),
        range_end: range_end.to_vec().into(),
        prev_kv: false,
    }
}

fn compact(revision: Revision) -> Action {
    Action::Compact(CompactionRequest {
        revision,
        physical: false,
    })
}

fn op(kind: RequestOpKind) -> RequestOp {
    RequestOp { request: Some(kind) }
}

fn txn(success: Vec<RequestOp>) -> TxnRequest {
    TxnRequest {
        success,
        ..Default::default()
    }
}

/// What an etcd 3.7.3 answered for the story below. Where it had finished a compaction, asking for just that revision
/// came after a restart, since it remembers what it hashed while it compacted (see [`COMPACTION_HASHES`]).
type Golden = (Revision, u32);
const AT_FIRST: [Golden; 9] = [
    (1, 0x40a4_756d),
    (2, 0x9a39_6dd7),
    (3, 0x6cee_d8d6),
    (4, 0x7b5c_bf9c),
    (5, 0x4318_8ed4),
    (6, 0x6e2e_0626),
    (7, 0xe0ae_53ed),
    (8, 0xe3df_241b),
    (9, 0x1d6a_864c),
];
const COMPACTED_5: [Golden; 4] = [(6, 0x743f_e9ee), (7, 0xf210_5735), (8, 0xb369_a6f6), (9, 0xe6ec_c11e)];
/// At 12 nothing is alive.
const COMPACTED_9: [Golden; 5] = [
    (9, 0x90b9_8129),
    (10, 0xa1c7_819a),
    (11, 0x25e2_5a97),
    (12, 0xc9f6_59ff),
    (13, 0x9d3a_1edb),
];
const COMPACTED_12: [Golden; 2] = [(12, 0x40a4_756d), (13, 0xd639_adbf)];
/// The previous compaction, this one, and what etcd then answers for its revision.
const COMPACTION_HASHES: [(Revision, Revision, u32); 3] =
    [(-1, 5, 0x4318_8ed4), (5, 9, 0xe6ec_c11e), (9, 12, 0xf5e8_a687)];

/// Goes through operations that an etcd was given, checking all hashes before every step of compaction.
fn story<E: Engine>(mut store: Store<E>) {
    let check = |store: &Store<E>, compacted: Revision, golden: &[Golden]| {
        let newest = store.machine.reader().revision();
        for &(revision, hash) in golden.iter().filter(|(revision, _)| *revision <= newest) {
            let expected = HashKv {
                header: ResponseHeader {
                    revision: newest,
                    ..Default::default()
                },
                hash,
                compact_revision: compacted,
                hash_revision: revision,
            };
            assert_eq!(store.hash(revision), Ok(expected.clone()));
            if revision == newest {
                assert_eq!(store.hash(0), Ok(expected));
            }
        }
        assert_eq!(store.hash(newest + 1), Err(Error::FutureRevision));
        if compacted > 1 {
            assert_eq!(store.hash(compacted - 1), Err(Error::Compacted));
        }
        // etcd's answer, too.
        assert_eq!(
            store.hash(-1).map(|hash| (hash.hash, hash.hash_revision)),
            Ok((0x40a4_756d, -1))
        );
    };
    let compact_and_check = |store: &mut Store<E>, previous: Revision, compacted: Revision, golden: &[Golden]| {
        let (.., kept) = COMPACTION_HASHES[usize::from(previous >= 0) + usize::from(previous > 5)];
        let kept_hash = |store: &Store<E>| hash_of_compaction(&store.engine.view(), previous, compacted);
        let engine = store.engine.clone();
        let before = engine.view();
        store.apply(compact(compacted));
        check(store, compacted, golden);
        let mut steps = 0;
        loop {
            assert_eq!(kept_hash(store).expect("hashes"), kept, "before its last step");
            if !store.compact_some(1) {
                break;
            }
            steps += 1;
            check(store, compacted, golden);
        }
        assert!(steps >= 2, "there are moments to look at: {steps}");
        assert_eq!(hash_of_compaction(&before, previous, compacted).expect("hashes"), kept);
        check(store, compacted, golden);
        store.reopen();
        check(store, compacted, golden);
    };

    check(&store, -1, &AT_FIRST);
    store.apply(Action::Put(put("a", "1")));
    store.apply(Action::Put(put("b", "2")));
    check(&store, -1, &AT_FIRST);
    store.apply(Action::Put(put("a", "3")));
    store.apply(Action::DeleteRange(delete("b", b"")));
    let both = [put("c", "x"), put("d", "y")];
    store.apply(Action::Txn(txn(both.map(|put| op(RequestOpKind::Put(put))).into())));
    store.apply(Action::DeleteRange(delete("c", b"e")));
    store.apply(Action::LeaseGrant(LeaseGrantRequest { ttl: 6000, id: 4660 }));
    let lease = 4660;
    store.apply(Action::Put(PutRequest { lease, ..put("e", "v") }));
    store.apply(Action::Put(put("f", "")));
    check(&store, -1, &AT_FIRST);
    compact_and_check(&mut store, -1, 5, &COMPACTED_5);

    store.apply(Action::Put(put("a", "10")));
    store.apply(Action::DeleteRange(delete("f", b"")));
    compact_and_check(&mut store, 5, 9, &COMPACTED_9);

    store.apply(Action::DeleteRange(delete("\0", b"\0")));
    check(&store, 9, &COMPACTED_9);
    store.apply(Action::Put(put("g", "z")));
    check(&store, 9, &COMPACTED_9);
    compact_and_check(&mut store, 9, 12, &COMPACTED_12);
}

#[test]
fn hashes_are_those_of_an_etcd() {
    let dir = tempfile::tempdir().expect("a directory");
    story(Store::new(MemoryEngine::open(dir.path(), FAMILIES).expect("opens")));
    let dir = tempfile::tempdir().expect("a directory");
    let options = RocksOptions::default();
    story(Store::new(
        RocksEngine::open(dir.path(), FAMILIES, &options).expect("opens"),
    ));
}

type At = (Revision, i64);

/// What etcd stores, and its index: for each key its lives, each the changes from a creation to its deletion.
#[derive(Default)]
struct Etcd {
    bucket: BTreeMap<At, (bool, KeyValue)>,
    index: BTreeMap<String, Vec<Vec<At>>>,
    newest: Revision,
    compacted: Revision,
}

impl Etcd {
    fn put(&mut self, at: At, key: &str, value: &str) {
        let lives = self.index.entry(key.to_owned()).or_insert_with(|| vec![Vec::new()]);
        let life = lives.last_mut().expect("never empty");
        let before = life
            .last()
            .map(|before| self.bucket[before].1.clone())
            .unwrap_or_default();
        life.push(at);
        let kv = KeyValue {
            key: key.to_owned().into(),
            create_revision: if before.version == 0 {
                at.0
            } else {
                before.create_revision
            },
            mod_revision: at.0,
            version: before.version + 1,
            value: value.to_owned().into(),
            lease: 0,
        };
        self.bucket.insert(at, (false, kv));
    }

    fn delete(&mut self, at: At, key: &str) -> bool {
        let Some(lives) = self
            .index
            .get_mut(key)
            .filter(|lives| lives.last().is_some_and(|life| !life.is_empty()))
        else {
            return false;
        };
        lives.last_mut().expect("never empty").push(at);
        lives.push(Vec::new());
        let key = key.to_owned().into();
        self.bucket.insert(
            at,
            (
                true,
                KeyValue {
                    key,
                    ..Default::default()
                },
            ),
        );
        true
    }

    /// The change that a key is left with: its newest at or before `at`, a deletion only at exactly `at`. And in which
    /// life, and where in it.
    fn left(lives: &[Vec<At>], at: Revision) -> Option<(usize, usize)> {
        let ends_late = |life: &Vec<At>| life.last().is_some_and(|last| last.0 >= at);
        let number = lives[..lives.len() - 1]
            .iter()
            .position(ends_late)
            .unwrap_or(lives.len() - 1);
        let place = lives[number].iter().rposition(|change| change.0 <= at)?;
        Some((number, place))
    }

    /// Compacts and finishes at once.
    fn compact(&mut self, at: Revision) {
        self.compacted = at;
        let mut kept = BTreeSet::new();
        for lives in self.index.values_mut() {
            match Self::left(lives, at) {
                Some((number, place)) => {
                    kept.insert(lives[number][place]);
                    lives[number].drain(..place);
                    lives.drain(..number);
                }
                None => lives.retain(|life| life.last().is_none_or(|last| last.0 > at)),
            }
        }
        self.index.retain(|_, lives| lives.iter().any(|life| !life.is_empty()));
        self.bucket.retain(|change, _| change.0 > at || kept.contains(change));
    }

    fn hash(&self, revision: Revision) -> u32 {
        let keep: BTreeSet<At> = self
            .index
            .values()
            .filter_map(|lives| Self::left(lives, revision).map(|(number, place)| lives[number][place]))
            .filter(|change| !self.bucket[change].0)
            .collect();
        let mut bytes = b"key".to_vec();
        for (at, (tombstone, kv)) in self.bucket.range(..(revision + 1, 0)) {
            let old = at.0 <= self.compacted;
            if old && !keep.is_empty() && !keep.contains(at) || *tombstone && at.0 == self.compacted {
                continue;
            }
            bytes.extend(at.0.to_be_bytes());
            bytes.push(b'_');
            bytes.extend(at.1.to_be_bytes());
            bytes.extend(tombstone.then_some(b't'));
            bytes.extend(kv.encode_to_vec());
        }
        crc32c(&bytes)
    }
}

/// Bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes
        .iter()
        .fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), step))
}

/// Numbers that look random (Knuth's MMIX generator).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

#[test]
fn hashes_are_those_of_an_imitation() {
    let (mut nothing_alive, mut unfinished) = (0, 0);
    for seed in 0..150 {
        let mut random = Random(seed);
        let dir = tempfile::tempdir().expect("a directory");
        let mut store = Store::new(MemoryEngine::open(dir.path(), FAMILIES).expect("opens"));
        let mut etcd = Etcd {
            newest: 1,
            compacted: -1,
            ..Default::default()
        };
        let keys = &["a", "b", "c", "d", "e", "f"][..2 + random.below(5)];
        let mut going = false;
        for step in 0..60 {
            let next = etcd.newest + 1;
            let key = keys[random.below(keys.len())];
            let value = "v".repeat(random.below(40));
            match random.below(12) {
                0..4 => {
                    store.apply(Action::Put(put(key, &value)));
                    etcd.put((next, 0), key, &value);
                    etcd.newest = next;
                }
                4..6 => {
                    store.apply(Action::DeleteRange(delete(key, b"")));
                    etcd.newest += Revision::from(etcd.delete((next, 0), key));
                }
                6 => {
                    store.apply(Action::DeleteRange(delete("\0", b"\0")));
                    let mut sub = 0;
                    for key in keys {
                        sub += i64::from(etcd.delete((next, sub), key));
                    }
                    etcd.newest += Revision::from(sub > 0);
                }
                7 => {
                    let puts = keys
                        .iter()
                        .map(|key| op(RequestOpKind::Put(put(key, &value))))
                        .collect();
                    store.apply(Action::Txn(txn(puts)));
                    for (sub, key) in (0..).zip(keys) {
                        etcd.put((next, sub), key, &value);
                    }
                    etcd.newest = next;
                }
                8 => {
                    // The one way to change a key twice in a revision.
                    let nested = |kind| op(RequestOpKind::Txn(txn(vec![op(kind)])));
                    store.apply(Action::Txn(txn(vec![
                        nested(RequestOpKind::Put(put(key, &value))),
                        nested(RequestOpKind::DeleteRange(delete(key, b""))),
                    ])));
                    etcd.put((next, 0), key, &value);
                    assert!(etcd.delete((next, 1), key));
                    etcd.newest = next;
                }
                9 => {
                    let first = etcd.compacted.max(0) + 1;
                    if first <= etcd.newest {
                        let span = usize::try_from(etcd.newest - first + 1).expect("few");
                        let at = first + random.below(span) as Revision;
                        store.apply(compact(at));
                        etcd.compact(at);
                        going = true;
                    }
                }
                10 => going = store.compact_some(random.below(12)),
                _ => store.reopen(),
            }
            unfinished += u32::from(going);
            let first = etcd.compacted.max(1);
            for revision in first..=etcd.newest {
                let hash = store.hash(revision).expect("hashes");
                assert_eq!(hash.compact_revision, etcd.compacted);
                assert_eq!(
                    hash.hash,
                    etcd.hash(revision),
                    "seed {seed}, step {step}, revision {revision}"
                );
            }
            let alive = |lives: &Vec<Vec<At>>| lives.last().is_some_and(|life| !life.is_empty());
            nothing_alive += u32::from(etcd.compacted > 1 && !etcd.index.values().any(alive));
        }
    }
    assert!(
        nothing_alive > 100 && unfinished > 100,
        "{nothing_alive} {unfinished}: both happen"
    );
}
