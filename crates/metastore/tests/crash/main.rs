//! Kills a node again and again while clients write, and checks after every restart that everything acknowledged is
//! there, nothing is half done, revisions have no gaps, and watchers saw the truth.
//!
//! `METASTORE_CRASH_ROUNDS` sets how often (10), `METASTORE_SEED` repeats the choice of operations, though not their
//! timing. On a failure the data directory is kept and named.

#![allow(
    clippy::print_stderr,
    reason = "the seed and the results are for whoever runs the test"
)]

mod check;
mod model;
#[path = "../support/mod.rs"]
mod support;
mod workload;

use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use check::Store;
use fastrand::Rng;
use support::{Node, Setup, Storage, temp_dir};
use tempfile::TempDir;
use workload::{Journal, Load, Worker, watch};

const ROUNDS: usize = 10;
/// Far longer than a round can take.
const ROUND_TIMEOUT: Duration = Duration::from_secs(300);
/// Every so many kills there is a SIGTERM too.
const KILLS_PER_SIGTERM: usize = 5;
/// A node that is told to stop has this long for the calls that are under way, at most.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// Long after the last lease that is to expire.
const EXPIRY_TIMEOUT: Duration = Duration::from_secs(60);
const SIGTERM: i32 = 15;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rocksdb_survives_crashes() {
    survives(Storage::RocksDb).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_survives_crashes() {
    survives(Storage::Memory).await;
}

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {value:?}")),
    )
}

/// Keeps the data for whoever looks into a failure.
struct Evidence {
    dir: Option<TempDir>,
    seed: u64,
    storage: Storage,
    round: usize,
}

impl Drop for Evidence {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            let Evidence {
                seed, storage, round, ..
            } = self;
            let path = dir.keep();
            eprintln!(
                "{} failed in round {round}, METASTORE_SEED={seed}, see {}",
                storage.name(),
                path.display()
            );
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Kill,
    Sigterm,
}

async fn survives(storage: Storage) {
    let kills = number("METASTORE_CRASH_ROUNDS").map_or(ROUNDS, |rounds| rounds as usize);
    let seed = number("METASTORE_SEED").unwrap_or_else(|| fastrand::u64(..));
    eprintln!("{}: {kills} kills, METASTORE_SEED={seed}", storage.name());
    let dir = temp_dir();
    let mut setup = Setup::new(dir.path(), storage);
    let mut evidence = Evidence {
        dir: Some(dir),
        seed,
        storage,
        round: 0,
    };

    let mut random = Rng::with_seed(seed);
    let mut store = Store::new();
    let mut journal = Journal::default();
    let (mut slowest_start, mut kills_at_start) = (Duration::ZERO, 0);
    let begun = Instant::now();
    for round in 0..kills + kills / KILLS_PER_SIGTERM {
        evidence.round = round;
        setup.set_args(flags(storage, &mut random));
        let one = async {
            if random.u8(..4) == 0 {
                kill_at_start(&setup, &mut random).await;
                kills_at_start += 1;
            }
            let mut node = setup.spawn();
            slowest_start = slowest_start.max(node.wait_ready());
            store.check(&node, std::mem::take(&mut journal), &mut random).await;
            let end = if round % (KILLS_PER_SIGTERM + 1) == KILLS_PER_SIGTERM {
                End::Sigterm
            } else {
                End::Kill
            };
            load(&mut node, &store, &mut random, end).await
        };
        let ended = tokio::time::timeout(ROUND_TIMEOUT, one).await;
        journal = ended.unwrap_or_else(|_| panic!("round {round} did not end within {ROUND_TIMEOUT:?}"));
    }

    // Whatever was to expire does, after all those restarts.
    let mut node = setup.start();
    store.check(&node, journal, &mut random).await;
    let waiting = Instant::now();
    while store.unexpired() > 0 {
        assert!(
            waiting.elapsed() < EXPIRY_TIMEOUT,
            "{} leases do not expire",
            store.unexpired()
        );
        tokio::time::sleep(Duration::from_secs(1)).await;
        store.check(&node, Journal::default(), &mut random).await;
    }
    assert_eq!(node.terminate().signal(), Some(SIGTERM));
    let node = setup.start();
    store.check(&node, Journal::default(), &mut random).await;
    eprintln!(
        "{}: {kills} kills under load, {kills_at_start} while starting, {} SIGTERMs in {:?}; slowest start \
         {slowest_start:?}; {:?}",
        storage.name(),
        kills / KILLS_PER_SIGTERM + 1,
        begun.elapsed(),
        store.totals
    );
}

/// Settings that make much happen in little time, and the defaults too.
fn flags(storage: Storage, random: &mut Rng) -> Vec<String> {
    let mut choose = |name: &str, values: &[&str]| {
        let value = values[random.usize(..values.len())];
        format!("--{name}={value}")
    };
    let mut flags = vec![
        choose("batch-ops-max", &["1", "16", "1024", "1024"]),
        choose("record-cache-bytes", &["0", "64KiB", "32MiB"]),
    ];
    match storage {
        Storage::RocksDb => flags.extend([
            choose("rocksdb-write-buffer-bytes", &["64KiB", "1MiB", "64MiB"]),
            choose("rocksdb-wal", &["false", "false", "false", "true"]),
        ]),
        Storage::Memory => flags.push(choose("memory-snapshot-interval", &["100ms", "1s", "5m"])),
    }
    flags
}

async fn kill_at_start(setup: &Setup, random: &mut Rng) {
    let mut node = setup.spawn();
    tokio::time::sleep(Duration::from_millis(random.u64(..250))).await;
    node.kill();
}

/// Lets clients work on the node for a random time, then ends it. Returns what they wrote down.
async fn load(node: &mut Node, store: &Store, random: &mut Rng, end: End) -> Journal {
    let load = Load::new(node.url(), store, random.bool());
    let mut tasks = Vec::new();
    for number in 0..random.usize(4..20) {
        let worker = Worker::new(&load, format!("{:x}-{number}", random.u32(..)), random.u64(..)).await;
        tasks.push(tokio::spawn(worker.run()));
    }
    // One sees all that is new, one begins somewhere in the past.
    tasks.push(tokio::spawn(watch(load.clone(), store.verified() + 1, "", true)));
    let past = random.i64(store.compacted().max(1)..=store.verified());
    tasks.push(tokio::spawn(watch(load.clone(), past, "hot/", false)));

    // Some rounds are long enough for leases to expire.
    let millis = if random.u8(..8) == 0 {
        4000
    } else {
        random.u64(20..1200)
    };
    tokio::time::sleep(Duration::from_millis(millis)).await;
    let last = Worker::new(&load, "last".to_owned(), random.u64(..)).await;
    load.stopping.store(true, Ordering::Release);
    if random.u8(..3) == 0 {
        tasks.push(tokio::spawn(last.compact_at_the_end()));
        tokio::time::sleep(Duration::from_micros(random.u64(..3000))).await;
    }
    match end {
        End::Kill => node.kill(),
        End::Sigterm => {
            let begun = Instant::now();
            let status = node.terminate();
            assert_eq!(status.signal(), Some(SIGTERM), "a node ends by the signal: {status}");
            assert!(begun.elapsed() < STOP_TIMEOUT, "it took {:?}", begun.elapsed());
        }
    }
    for task in tasks {
        if let Err(error) = task.await {
            std::panic::resume_unwind(error.into_panic());
        }
    }
    load.take_journal()
}
