//! What each idea of the write path is worth: the tiers of the report that MetaStore started from, on RocksDB, in one
//! run: `cargo bench --workspace --bench tiers`. docs/benchmarks.md has a run beside that report's claims.
//!
//! Tier 3 runs in virtual time, where a message takes a millisecond and a log write another; all else is measured.

#![allow(clippy::print_stdout, reason = "a benchmark prints")]
#![allow(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
#![allow(
    unsafe_code,
    reason = "an allocator that counts is unsafe to implement; it only passes on to the system's"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use api::codec::{Action, Operation, decode_entry, encode_entry, encode_operation};
use api::kv::{Member, PutRequest};
use bytes::Bytes;
use metastore_sim::log::SimLog;
use mvcc::machine::Command;
use mvcc::{Committed, Machine, Membership, keys};
use prost::Message;
use raft::eraftpb::{Entry, EntryType};
use replica::{Config, Effect, Input, Proposal, Replica, Role};
use serde::{Deserialize, Serialize};
use storage::{
    Batch, Cursor, Engine, Family, KeyRange, RaftEngineLog, RaftLog, RaftLogOptions, RocksEngine, RocksOptions, View,
};

/// Counts what the code under test allocates.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static ALLOCATED_BYTES: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        ALLOCATED_BYTES.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller's promises are the system's conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        ALLOCATED_BYTES.fetch_add(size.saturating_sub(layout.size()) as u64, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const VALUE_BYTES: usize = 256;
/// How long each figure is measured.
const MEASURED: Duration = Duration::from_millis(700);

fn main() {
    // Cargo passes `--bench`, which says nothing here.
    encodings();
    replication();
    batches();
    writes();
    families();
}

/// Nanoseconds that one call takes: the least of five rounds, since whatever disturbs makes it more.
fn time(mut once: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let (begun, mut calls) = (Instant::now(), 0_u32);
        while begun.elapsed() < MEASURED / 5 {
            for _ in 0..16 {
                once();
            }
            calls += 16;
        }
        best = best.min(begun.elapsed().as_nanos() as f64 / f64::from(calls));
    }
    best
}

fn random_text(random: &mut fastrand::Rng, length: usize) -> String {
    std::iter::repeat_with(|| random.alphanumeric()).take(length).collect()
}

fn put_of(random: &mut fastrand::Rng, key: u64) -> PutRequest {
    PutRequest {
        key: format!("/registry/things/default/thing-{key:08}").into(),
        value: random_text(random, VALUE_BYTES).into(),
        ..Default::default()
    }
}

/// What the oldest log held.
#[derive(Serialize, Deserialize)]
struct KeyAndVal {
    #[serde(rename = "Key")]
    key: String,
    #[serde(rename = "Val")]
    val: String,
}

/// The definition of `struct{ Key, Val string }` that Go's gob writes before the first value of a stream; an entry is a
/// stream of its own.
const GOB_DEFINITION: &[u8] =
    b"\x23\xff\x81\x03\x01\x01\x05kvMsg\x01\xff\x82\x00\x01\x02\x01\x03Key\x01\x0c\x00\x01\x03Val\x01\x0c\x00\x00\x00";

fn gob_unsigned(out: &mut Vec<u8>, number: usize) {
    match u8::try_from(number) {
        Ok(small @ 0..128) => out.push(small),
        _ => {
            let bytes = number.to_be_bytes();
            let skip = number.leading_zeros() as usize / 8;
            out.push((bytes.len() - skip) as u8);
            let count = out.last_mut().expect("it was pushed");
            *count = count.wrapping_neg();
            out.extend_from_slice(&bytes[skip..]);
        }
    }
}

fn gob(key: &str, val: &str) -> Vec<u8> {
    let mut value = vec![0xff, 0x82];
    for field in [key, val] {
        value.push(1);
        gob_unsigned(&mut value, field.len());
        value.extend_from_slice(field.as_bytes());
    }
    value.push(0);
    let mut out = GOB_DEFINITION.to_vec();
    gob_unsigned(&mut out, value.len());
    out.extend_from_slice(&value);
    out
}

fn encodings() {
    println!("tiers 1 and 2: one put, key of 38 bytes, value of {VALUE_BYTES}");
    println!(
        "{:28} {:>6} {:>10} {:>10}",
        "encoding", "bytes", "encode ns", "decode ns"
    );
    let mut random = fastrand::Rng::with_seed(1);
    let put = put_of(&mut random, 7);
    let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).expect("alphanumeric");
    let pair = KeyAndVal {
        key: text(&put.key),
        val: text(&put.value),
    };
    let row = |name: &str, encoded: &[u8], encode: f64, decode: f64| {
        println!("{name:28} {:>6} {encode:>10.0} {decode:>10.0}", encoded.len());
    };
    let encoded = serde_json::to_vec(&pair).expect("it is plain");
    let encode = time(|| drop(black_box(serde_json::to_vec(black_box(&pair)))));
    let decode = time(|| drop(black_box(serde_json::from_slice::<KeyAndVal>(black_box(&encoded)))));
    row("JSON", &encoded, encode, decode);

    let encoded = Bytes::from(gob(&pair.key, &pair.val));
    assert_eq!(
        decode_entry(&encoded).map(|found| found.len()),
        Ok(1),
        "it reads as the oldest form"
    );
    let encode = time(|| drop(black_box(gob(black_box(&pair.key), black_box(&pair.val)))));
    let decode = time(|| drop(black_box(decode_entry(black_box(&encoded)))));
    row("gob (definition prepared)", &encoded, encode, decode);

    let encoded = Bytes::from(put.encode_to_vec());
    let encode = time(|| drop(black_box(black_box(&put).encode_to_vec())));
    let decode = time(|| drop(black_box(PutRequest::decode(black_box(encoded.clone())))));
    row("protobuf, the request", &encoded, encode, decode);

    let operation = Operation::new(1 << 60, Action::Put(put));
    let entry = |operation: &Operation| Bytes::from(encode_entry([&encode_operation(operation)[..]].into_iter()));
    let encoded = entry(&operation);
    let encode = time(|| drop(black_box(entry(black_box(&operation)))));
    let decode = time(|| drop(black_box(decode_entry(black_box(&encoded)))));
    row("protobuf, the whole entry", &encoded, encode, decode);
}

/// Microseconds of virtual time.
type Micros = u64;

const MESSAGE_TAKES: Micros = 1000;
const LOG_WRITE_TAKES: Micros = 1000;

/// Three members and what is under way between them.
struct Cluster {
    now: Micros,
    members: Vec<(Replica<SimLog>, Arc<SimLog>)>,
    /// What happens when, and in which order among what happens at the same time.
    coming: BinaryHeap<Reverse<(Micros, u64)>>,
    events: std::collections::HashMap<u64, (usize, Event)>,
    next: u64,
    committed: u64,
    entries: u64,
}

enum Event {
    Input(Input),
    Written(u64, Vec<Entry>, Option<raft::eraftpb::HardState>),
}

impl Cluster {
    fn new(config: impl Fn(Config) -> Config) -> Self {
        let membership = Membership {
            members: (1..=3)
                .map(|id| Member {
                    id,
                    ..Default::default()
                })
                .collect(),
            removed: Vec::new(),
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let member = |id| {
            let log = Arc::new(SimLog::bootstrapped(Vec::new(), Default::default()));
            let config = config(Config::new(id));
            let replica = Replica::open(config, log.clone(), 0, &membership, &logger).expect("it opens");
            (replica, log)
        };
        let mut cluster = Cluster {
            now: 0,
            members: (1..=3).map(member).collect(),
            coming: BinaryHeap::new(),
            events: Default::default(),
            next: 0,
            committed: 0,
            entries: 0,
        };
        while !cluster
            .members
            .iter()
            .any(|(replica, _)| replica.standing().role == Role::Leader)
        {
            cluster.step(0, [Input::Tick]);
            cluster.run_until(cluster.now + 20 * MESSAGE_TAKES);
        }
        cluster
    }

    fn at(&mut self, when: Micros, member: usize, event: Event) {
        self.coming.push(Reverse((when, self.next)));
        self.events.insert(self.next, (member, event));
        self.next += 1;
    }

    fn step(&mut self, member: usize, inputs: impl IntoIterator<Item = Input>) {
        let mut effects = Vec::new();
        self.members[member]
            .0
            .step(inputs, &mut effects)
            .expect("nothing is broken");
        for effect in effects {
            match effect {
                Effect::Append {
                    number,
                    entries,
                    hard_state,
                    sync,
                } => {
                    let takes = if sync { LOG_WRITE_TAKES } else { 0 };
                    self.at(self.now + takes, member, Event::Written(number, entries, hard_state));
                }
                Effect::Send(messages) => {
                    for (to, message) in messages {
                        let from = member as u64 + 1;
                        let event = Event::Input(Input::Receive(from, message));
                        self.at(self.now + MESSAGE_TAKES, to as usize - 1, event);
                    }
                }
                Effect::Apply(committed) => {
                    let index = committed.last().expect("there is one").index;
                    if self.members[member].0.standing().role == Role::Leader {
                        self.entries += committed.len() as u64;
                        for entry in &committed {
                            let Command::Operations(data) = &entry.command else {
                                continue;
                            };
                            self.committed += decode_entry(data).expect("ours").len() as u64;
                        }
                    }
                    let input = Input::Applied {
                        index,
                        member_changes: Vec::new(),
                    };
                    self.at(self.now, member, Event::Input(input));
                }
                Effect::Standing(_) => {}
                other => panic!("nothing like {other:?} should happen"),
            }
        }
    }

    fn run_until(&mut self, until: Micros) {
        while let Some(&Reverse((when, number))) = self.coming.peek()
            && when <= until
        {
            self.coming.pop();
            self.now = when;
            let (member, event) = self.events.remove(&number).expect("each happens once");
            match event {
                Event::Input(input) => self.step(member, [input]),
                Event::Written(number, entries, hard_state) => {
                    let log = &self.members[member].1;
                    log.append(&entries, hard_state.as_ref(), true).expect("room");
                    log.sync();
                    self.step(member, [Input::Persisted(number)]);
                }
            }
        }
        self.now = until;
    }

    /// Offers operations for a second and counts what is committed.
    fn run(&mut self) -> (u64, u64) {
        let leader = self
            .members
            .iter()
            .position(|(replica, _)| replica.standing().role == Role::Leader);
        let leader = leader.expect("there is one");
        let mut random = fastrand::Rng::with_seed(1);
        (self.committed, self.entries) = (0, 0);
        let mut proposed = 0;
        let end = self.now + 1_000_000;
        while self.now < end {
            // 256 clients, each with one operation under way.
            while proposed < self.committed + 256 {
                proposed += 1;
                let operation = Operation::new(proposed, Action::Put(put_of(&mut random, proposed)));
                let proposal = Proposal {
                    id: proposed,
                    operation: encode_operation(&operation),
                    leader_term: 0,
                };
                self.step(leader, [Input::Propose(proposal)]);
            }
            let next = self.coming.peek().map_or(end, |Reverse((when, _))| *when);
            self.run_until(next.min(end));
        }
        (self.committed, self.entries)
    }
}

fn replication() {
    println!();
    println!("tier 3: three members, 1 ms a message each way, 1 ms a log write, 256 clients, one virtual second");
    println!("{:44} {:>10} {:>10}", "", "puts/s", "entries/s");
    for (name, ops, appends, messages) in [
        ("one operation an entry, one in flight", 1, 1, 1),
        ("one operation an entry, many in flight", 1, 1024, 1024),
        ("batches, one in flight", 1024, 1, 1),
        ("batches, as shipped", 1024, 2, 128),
    ] {
        let mut cluster = Cluster::new(|config| Config {
            batch_ops_max: ops,
            appends_inflight_max: appends,
            messages_inflight_max: messages,
            ..config
        });
        let (committed, entries) = cluster.run();
        println!("{name:44} {committed:>10} {entries:>10}");
    }
}

fn open(dir: &Path, options: &RocksOptions) -> RocksEngine {
    RocksEngine::open(dir, keys::FAMILIES, options).expect("an empty engine")
}

fn operations(random: &mut fastrand::Rng, count: usize) -> Vec<Bytes> {
    (0..count)
        .map(|_| {
            let key = random.u64(..10_000);
            encode_operation(&Operation::new(1, Action::Put(put_of(random, key))))
        })
        .collect()
}

/// Operations in a commit, in tiers 4 and 5.
const COMMIT: usize = 100;

fn batches() {
    println!();
    println!("tier 4: applying {COMMIT} puts, one operation an entry and all in one (no log)");
    println!("{:44} {:>10} {:>10} {:>10}", "", "us a put", "allocs", "bytes");
    for (name, together) in [
        ("one entry and engine write each", false),
        ("one entry, one engine write", true),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let engine = Arc::new(open(dir.path(), &RocksOptions::default()));
        let mut machine = Machine::open(engine, &mvcc::Options::default()).expect("it opens");
        let mut random = fastrand::Rng::with_seed(1);
        let (mut index, mut took, mut puts) = (0, Duration::ZERO, 0);
        let (mut allocations, mut bytes) = (0, 0);
        while took < MEASURED {
            let operations = operations(&mut random, COMMIT);
            let before = (
                ALLOCATIONS.load(Ordering::Relaxed),
                ALLOCATED_BYTES.load(Ordering::Relaxed),
            );
            let begun = Instant::now();
            let chunk = if together { COMMIT } else { 1 };
            for some in operations.chunks(chunk) {
                index += 1;
                let entry = encode_entry(some.iter().map(|operation| &operation[..]));
                let committed = Committed {
                    index,
                    term: 1,
                    command: Command::Operations(entry.into()),
                };
                black_box(machine.apply(&[committed]).expect("the engine works"));
            }
            took += begun.elapsed();
            allocations += ALLOCATIONS.load(Ordering::Relaxed) - before.0;
            bytes += ALLOCATED_BYTES.load(Ordering::Relaxed) - before.1;
            puts += COMMIT;
        }
        let each = |sum: f64| sum / puts as f64;
        println!(
            "{name:44} {:>10.2} {:>10.1} {:>10.0}",
            each(took.as_secs_f64() * 1e6),
            each(allocations as f64),
            each(bytes as f64)
        );
    }
}

fn writes() {
    println!();
    println!("tier 5: commits of {COMMIT} puts of {VALUE_BYTES} bytes, made durable");
    println!("{:44} {:>10} {:>12}", "", "us a put", "fsyncs/put");
    let put = |batch: &mut <RocksEngine as Engine>::Batch, key: u64, value: &[u8]| {
        batch.put(keys::CUR, format!("/registry/things/{key:08}").as_bytes(), value);
    };
    let report = |name: &str, begun: Instant, puts: u64, fsyncs: u64| {
        let micros = begun.elapsed().as_secs_f64() * 1e6 / puts as f64;
        println!("{name:44} {micros:>10.2} {:>12.3}", fsyncs as f64 / puts as f64);
    };
    let value = [7; VALUE_BYTES];
    for (name, commit) in [
        ("one synced engine write an operation", 1),
        ("one synced WriteBatch a commit", COMMIT),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let options = RocksOptions {
            wal: true,
            ..RocksOptions::default()
        };
        let engine = open(dir.path(), &options);
        let (begun, mut puts, mut fsyncs) = (Instant::now(), 0, 0);
        while begun.elapsed() < 2 * MEASURED {
            let mut batch = engine.batch();
            for _ in 0..commit {
                put(&mut batch, puts % 10_000, &value);
                puts += 1;
            }
            fsyncs += engine.write(batch).expect("it works").fsyncs as u64;
        }
        report(name, begun, puts, fsyncs);
    }
    let dir = tempfile::tempdir().expect("a directory");
    let engine = open(&dir.path().join("engine"), &RocksOptions::default());
    let log = RaftEngineLog::open(&dir.path().join("log"), &RaftLogOptions::default()).expect("an empty log");
    let (begun, mut puts, mut fsyncs, mut index) = (Instant::now(), 0, 0, 0);
    let mut random = fastrand::Rng::with_seed(1);
    let operations = operations(&mut random, COMMIT);
    while begun.elapsed() < 2 * MEASURED {
        index += 1;
        let mut entry = Entry::default();
        (entry.index, entry.term) = (index, 1);
        entry.set_entry_type(EntryType::EntryNormal);
        entry.data = encode_entry(operations.iter().map(|operation| &operation[..])).into();
        let stats = log.append(&[entry], None, true).expect("it works");
        fsyncs += stats.fsyncs as u64;
        let mut batch = engine.batch();
        for _ in 0..COMMIT {
            put(&mut batch, puts % 10_000, &value);
            puts += 1;
        }
        fsyncs += engine.write(batch).expect("it works").fsyncs as u64;
    }
    report("one WriteBatch, unsynced, over the synced log", begun, puts, fsyncs);
}

fn families() {
    println!();
    println!("tier 6: commits of {COMMIT} puts (a record, a log row, a state row) and reads, us each");
    let value = [7; VALUE_BYTES];
    let key =
        |number: u64| format!("/registry/things/{:08}", number.wrapping_mul(2_654_435_761) % 100_000).into_bytes();
    let write = |engine: &RocksEngine, apart: bool, log: &mut u64| {
        let mut batch = engine.batch();
        for _ in 0..COMMIT {
            *log += 1;
            let prefixed = |prefix: u8, rest: &[u8]| [&[prefix], rest].concat();
            if apart {
                batch.put(keys::CUR, &key(*log), &value);
                batch.put(keys::REV, &log.to_be_bytes(), &value);
            } else {
                batch.put(keys::CUR, &prefixed(b'c', &key(*log)), &value);
                batch.put(keys::CUR, &prefixed(b'r', &log.to_be_bytes()), &value);
            }
        }
        batch.put(if apart { keys::META } else { keys::CUR }, b"state", &log.to_be_bytes());
        engine.write(batch).expect("it works");
    };
    println!("{:44} {:>10}", "", "us a put");
    for (name, apart, wal) in [
        ("all in one family", false, false),
        ("a family for each", true, false),
        ("a family for each, engine log on and synced", true, true),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let options = RocksOptions {
            wal,
            ..RocksOptions::default()
        };
        let engine = open(dir.path(), &options);
        let mut log = 0;
        let begun = Instant::now();
        while begun.elapsed() < 2 * MEASURED {
            write(&engine, apart, &mut log);
        }
        println!("{name:44} {:>10.2}", begun.elapsed().as_secs_f64() * 1e6 / log as f64);
    }
    println!(
        "{:44} {:>10} {:>10}",
        "100,000 keys on disk, block cache", "us a get", "us a key"
    );
    for mebibytes in [2, 8, 64, 256] {
        let dir = tempfile::tempdir().expect("a directory");
        let options = RocksOptions {
            block_cache_bytes: mebibytes << 20,
            write_buffers_total_bytes: 64 << 20,
            ..RocksOptions::default()
        };
        let engine = open(dir.path(), &options);
        let mut log = 0;
        while log < 100_000 {
            write(&engine, true, &mut log);
        }
        engine.flush().expect("room");
        let mut number = 0;
        let get = time(|| {
            number += 1;
            drop(black_box(engine.get(keys::CUR, &key(number)).expect("it reads")));
        });
        let scan = time_of_scan(&engine, keys::CUR, |value| {
            black_box(value.len());
        });
        println!("{:44} {:>10.2} {:>10.3}", format!("{mebibytes} MiB"), get / 1e3, scan);
        if mebibytes == 256 {
            let copied = time_of_scan(&engine, keys::CUR, |value| drop(black_box(value.to_vec())));
            println!("{:44} {:>10} {:>10.3}", "values read in place (as above)", "", scan);
            println!("{:44} {:>10} {:>10.3}", "each value copied out", "", copied);
        }
    }
}

/// Microseconds a key of reading a whole family in order: the least of five rounds.
fn time_of_scan(engine: &RocksEngine, family: Family, mut visit: impl FnMut(&[u8])) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let begun = Instant::now();
        let view = engine.view();
        let range = KeyRange { start: &[], end: None };
        let mut cursor = view.cursor(family, range).expect("it reads");
        cursor.seek_first().expect("it reads");
        let mut count = 0_u32;
        while let Some((_, value)) = cursor.entry() {
            visit(value);
            count += 1;
            cursor.next().expect("it reads");
        }
        best = best.min(begun.elapsed().as_secs_f64() * 1e6 / f64::from(count));
    }
    best
}
