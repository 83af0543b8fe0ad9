//! What applying and reading cost, on both engines.
//!
//! `apply/…/1` writes to the engine once for each operation; the larger batches show what sharing one write saves.
//! Everything is given per element: an operation, or a key read.
//!
//! On a machine that has other things to do, `BENCH_CPU_TIME=1` measures the time that the thread was on a processor
//! instead of the time that went by. It leaves out what RocksDB does on its own threads, and waiting for them.

#![allow(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

use std::hint::black_box;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use api::codec::{Action, Operation, encode_entry, encode_operation};
use api::kv::{PutRequest, RangeRequest};
use api::store::WatchCreate;
use api::store::WatchStream;
use bytes::Bytes;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use metastore_mvcc::machine::Command;
use metastore_mvcc::{Committed, Machine, Options, Reader, keys};
use storage::{Engine, MemoryEngine, RocksEngine, RocksOptions};

const VALUE_BYTES: usize = 256;
const KEYS: u64 = 10_000;

/// The allocator of the binary: allocations are a good part of what is measured.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

trait Fresh: Engine + Sized {
    const NAME: &str;
    fn fresh(dir: &std::path::Path) -> Self;
}

impl Fresh for RocksEngine {
    const NAME: &str = "rocksdb";

    fn fresh(dir: &std::path::Path) -> Self {
        RocksEngine::open(dir, keys::FAMILIES, &RocksOptions::default()).expect("an empty engine")
    }
}

impl Fresh for MemoryEngine {
    const NAME: &str = "memory";

    fn fresh(dir: &std::path::Path) -> Self {
        MemoryEngine::open(dir, keys::FAMILIES).expect("an empty engine")
    }
}

/// Stands for the moment, in one of two kinds of time.
fn now() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    static CPU_TIME: LazyLock<bool> = LazyLock::new(|| std::env::var_os("BENCH_CPU_TIME").is_some());
    if *CPU_TIME {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
        let on_cpu = stat.split(' ').next().and_then(|word| word.parse().ok());
        Duration::from_nanos(on_cpu.expect("nanoseconds"))
    } else {
        START.elapsed()
    }
}

/// A machine, and the log entries for it.
struct Bench<E: Engine> {
    machine: Machine<E>,
    index: u64,
    random: u64,
    _dir: tempfile::TempDir,
}

impl<E: Fresh> Bench<E> {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let engine = Arc::new(E::fresh(dir.path()));
        Bench {
            machine: Machine::open(engine, &Options::default()).expect("it opens"),
            index: 0,
            random: 1,
            _dir: dir,
        }
    }

    fn entry(&mut self, keys: impl Iterator<Item = u64>) -> Committed {
        let encoded: Vec<Bytes> = keys
            .map(|key| {
                self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let mut value = vec![0; VALUE_BYTES];
                for (at, chunk) in value.chunks_mut(8).enumerate() {
                    let word = self.random.rotate_left(at as u32).to_le_bytes();
                    chunk.copy_from_slice(&word[..chunk.len()]);
                }
                let put = PutRequest {
                    key: key_of(key),
                    value: value.into(),
                    ..Default::default()
                };
                encode_operation(&Operation::new(1, Action::Put(put)))
            })
            .collect();
        self.index += 1;
        Committed {
            index: self.index,
            term: 1,
            command: Command::Operations(encode_entry(encoded.iter().map(|bytes| &bytes[..])).into()),
        }
    }

    fn random_key(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(3);
        (self.random >> 33) % KEYS
    }

    fn fill(&mut self, keys: u64, versions: u64) {
        for _ in 0..versions {
            for start in (0..keys).step_by(250) {
                let entry = self.entry(start..keys.min(start + 250));
                self.machine.apply(&[entry]).expect("the engine works");
            }
        }
    }
}

fn key_of(number: u64) -> Bytes {
    Bytes::from(format!("/registry/things/default/thing-{number:08}"))
}

fn apply<E: Fresh>(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group(format!("apply/{}", E::NAME));
    group.sample_size(20).measurement_time(Duration::from_secs(3));
    for (what, watched) in [("overwrite", false), ("insert", false), ("watched", true)] {
        for batch in [1, 16, 256] {
            group.throughput(Throughput::Elements(batch));
            group.bench_function(BenchmarkId::new(what, batch), |bencher| {
                let mut bench = Bench::<E>::new();
                bench.fill(KEYS, 1);
                // A watcher of which nothing is taken: it falls behind at once, and events are made all the same.
                let mut stream = bench.machine.hub().stream();
                if watched {
                    let create = WatchCreate {
                        key: key_of(7),
                        ..Default::default()
                    };
                    stream.create(create).expect("a watcher");
                }
                let mut next = KEYS;
                bencher.iter_custom(|times| {
                    let mut taken = Duration::ZERO;
                    // Entries are made in pieces, so that neither memory nor the clock counts.
                    let piece = (1024 / batch).max(1);
                    let mut left = times;
                    while left > 0 {
                        let entries: Vec<Committed> = (0..left.min(piece))
                            .map(|_| match what {
                                "insert" => {
                                    next += batch;
                                    bench.entry(next - batch..next)
                                }
                                _ => {
                                    let keys: Vec<u64> = (0..batch).map(|_| bench.random_key()).collect();
                                    bench.entry(keys.into_iter())
                                }
                            })
                            .collect();
                        left -= entries.len() as u64;
                        let start = now();
                        for entry in &entries {
                            let applied = bench.machine.apply(std::slice::from_ref(entry));
                            black_box(applied.expect("the engine works"));
                        }
                        taken += now() - start;
                    }
                    taken
                });
            });
        }
    }
    group.finish();
}

fn read<E: Fresh>(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group(format!("read/{}", E::NAME));
    group.sample_size(20).measurement_time(Duration::from_secs(2));
    let keys = 1000;
    for versions in [1, 10, 100] {
        let mut bench = Bench::<E>::new();
        bench.fill(keys, versions);
        let reader = bench.machine.reader();
        let middle = (reader.revision() / 2).max(2);
        for (when, revision) in [("newest", 0), ("middle", middle)] {
            group.throughput(Throughput::Elements(1));
            let mut number = 0;
            let point = || {
                number = (number + 617) % keys;
                RangeRequest {
                    key: key_of(number),
                    revision,
                    ..Default::default()
                }
            };
            time_reads(
                &mut group,
                BenchmarkId::new(format!("point-{when}"), versions),
                &reader,
                point,
            );
            group.throughput(Throughput::Elements(keys));
            let range = RangeRequest {
                key: "/registry/".into(),
                range_end: "/registry0".into(),
                revision,
                ..Default::default()
            };
            let count = RangeRequest {
                count_only: true,
                ..range.clone()
            };
            time_reads(
                &mut group,
                BenchmarkId::new(format!("range-{when}"), versions),
                &reader,
                || range.clone(),
            );
            time_reads(
                &mut group,
                BenchmarkId::new(format!("count-{when}"), versions),
                &reader,
                || count.clone(),
            );
        }
    }
    group.finish();
}

fn time_reads<E: Engine>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    reader: &Reader<E>,
    mut request: impl FnMut() -> RangeRequest,
) {
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|times| {
            let start = now();
            for _ in 0..times {
                black_box(reader.range(&request()).expect("it reads"));
            }
            now() - start
        });
    });
}

criterion_group!(
    benches,
    apply::<RocksEngine>,
    apply::<MemoryEngine>,
    read::<RocksEngine>,
    read::<MemoryEngine>
);
criterion_main!(benches);
