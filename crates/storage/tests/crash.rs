//! Processes that are killed while they write: what they were told is durable must be there, and nothing in halves.
//!
//! Each test starts this test binary again as the process to kill; the environment tells it so.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use metastore_storage::conformance::{FAMILIES, entry};
use metastore_storage::{
    Batch, Cursor, Engine, Family, KeyRange, MemoryEngine, RaftEngineLog, RaftLog, RaftLogOptions, RocksEngine,
    RocksOptions, View,
};

const DIR: &str = "METASTORE_CRASH_TEST_DIR";
const ROUNDS: u64 = 6;

/// Runs `child` in a process of its own on the same directory several times, kills it each time, and calls `check`
/// with the last number that it reported.
fn kill_repeatedly(test: &str, child: impl Fn(&Path), check: impl Fn(&Path, u64)) {
    if let Some(dir) = std::env::var_os(DIR) {
        child(Path::new(&dir));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut reported = 0;
    for round in 0..ROUNDS {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture", "--test-threads=1"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let pid = process.id();
        let (reports, reported_now) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let lines = output.lines().map_while(Result::ok);
            lines
                .filter_map(|line| line.strip_prefix("durable ")?.parse::<u64>().ok())
                .inspect(|_| reports.send(()).unwrap_or_default())
                .last()
        });
        // A busy machine may take its time until the process writes anything, and then for each write.
        for _ in 0..5 {
            let _ = reported_now.recv_timeout(Duration::from_secs(30));
        }
        std::thread::sleep(Duration::from_millis(100 + round * 130));
        process.kill().unwrap();
        let status = process.wait().unwrap();
        assert!(!status.success(), "process {pid} ended before it was killed");
        let last = reader.join().unwrap();
        assert!(round > 0 || last.is_some(), "the process was killed before it began");
        reported = reported.max(last.unwrap_or(0));
        check(dir.path(), reported);
    }
    assert!(reported > 20, "only {reported} reported");
}

fn report(number: u64) {
    // In one write, so that a line is whole.
    std::io::stdout()
        .write_all(format!("durable {number}\n").as_bytes())
        .unwrap();
}

fn log_options() -> RaftLogOptions {
    RaftLogOptions {
        segment_bytes: 256 << 10,
        purge_threshold_bytes: 1 << 20,
        cache_bytes_max: 64 << 10,
    }
}

#[test]
fn a_killed_log_holds_what_was_synced() {
    let open = |dir: &Path| RaftEngineLog::open(dir, &log_options()).unwrap();
    let child = |dir: &Path| {
        let log = open(dir);
        loop {
            let next = log.last_index() + 1;
            let more: Vec<_> = (next..next + 1 + next % 7)
                .map(|index| entry(index, 3, (index % 5000) as usize))
                .collect();
            let mut state = log.hard_state().unwrap();
            state.term = 3;
            state.commit = next - 1;
            log.append(&more, Some(&state), true).unwrap();
            report(log.last_index());
            if next.is_multiple_of(64) && next > 300 {
                log.trim(next - 200).unwrap();
            }
        }
    };
    let check = |dir: &Path, reported: u64| {
        let log = open(dir);
        let (first, last) = (log.first_index(), log.last_index());
        assert!(last >= reported, "{last} {reported}");
        assert!(first < 1 + last.saturating_sub(190).max(1), "{first} {last}");
        let entries = log.entries(first, last + 1, u64::MAX).unwrap();
        assert_eq!(entries.len() as u64, last + 1 - first);
        for found in entries {
            assert_eq!(found, entry(found.index, 3, (found.index % 5000) as usize));
        }
        assert_eq!(log.hard_state().unwrap().term, 3);
    };
    kill_repeatedly("a_killed_log_holds_what_was_synced", child, check);
}

fn number_of(value: Option<bytes::Bytes>) -> u64 {
    value.map_or(0, |value| u64::from_be_bytes(value.as_ref().try_into().unwrap()))
}

const NUMBER: &[u8] = b"number";

/// Writes numbered batches over all families, with flushes in between.
fn write_batches<E: Engine>(engine: &E, every_write_is_durable: bool) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                let written = number_of(engine.get(Family(2), NUMBER).unwrap());
                engine.flush().unwrap();
                if written > 0 {
                    report(written);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let mut number = number_of(engine.get(Family(2), NUMBER).unwrap());
        loop {
            number += 1;
            let mut batch = engine.batch();
            for family in 0..3 {
                batch.put(Family(family), NUMBER, &number.to_be_bytes());
            }
            batch.put(Family(1), &number.to_be_bytes(), &[number as u8; 500]);
            if number.is_multiple_of(10) {
                let old = number.saturating_sub(1000);
                batch.delete_range(Family(1), &[0], &old.to_be_bytes());
            }
            engine.write(batch).unwrap();
            if every_write_is_durable {
                report(number);
            }
        }
    });
}

fn check_batches<E: Engine>(engine: &E, reported: u64) {
    let number = number_of(engine.get(Family(0), NUMBER).unwrap());
    assert!(number >= reported, "{number} {reported}");
    for family in 1..3 {
        assert_eq!(number_of(engine.get(Family(family), NUMBER).unwrap()), number);
    }
    assert_eq!(number_of(engine.get_durable(Family(2), NUMBER).unwrap()), number);
    let view = engine.view();
    let mut cursor = view
        .cursor(
            Family(1),
            KeyRange {
                start: &[0],
                end: Some(&[1]),
            },
        )
        .unwrap();
    cursor.seek_first().unwrap();
    let mut expected = (number - number % 10).saturating_sub(1000).max(1);
    while let Some((key, value)) = cursor.entry() {
        assert_eq!(key, expected.to_be_bytes());
        assert_eq!(value, [expected as u8; 500]);
        expected += 1;
        cursor.next().unwrap();
    }
    assert_eq!(expected, number + 1);
}

fn rocks(dir: &Path, wal: bool) -> RocksEngine {
    RocksEngine::open(
        dir,
        FAMILIES,
        &RocksOptions {
            wal,
            ..RocksOptions::default()
        },
    )
    .unwrap()
}

#[test]
fn a_killed_rocksdb_holds_a_prefix() {
    kill_repeatedly(
        "a_killed_rocksdb_holds_a_prefix",
        |dir| write_batches(&rocks(dir, false), false),
        |dir, reported| check_batches(&rocks(dir, false), reported),
    );
}

#[test]
fn a_killed_rocksdb_with_its_own_log_holds_everything() {
    kill_repeatedly(
        "a_killed_rocksdb_with_its_own_log_holds_everything",
        |dir| write_batches(&rocks(dir, true), true),
        |dir, reported| check_batches(&rocks(dir, true), reported),
    );
}

#[test]
fn a_killed_memory_engine_holds_a_prefix() {
    let open = |dir: &Path| MemoryEngine::open(dir, FAMILIES).unwrap();
    kill_repeatedly(
        "a_killed_memory_engine_holds_a_prefix",
        |dir| write_batches(&open(dir), false),
        |dir, reported| check_batches(&open(dir), reported),
    );
}
