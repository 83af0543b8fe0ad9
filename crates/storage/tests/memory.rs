//! What RocksDB takes in memory at the default settings.

use metastore_storage::conformance::FAMILIES;
use metastore_storage::{Batch, Cursor, Engine, Family, KeyRange, RocksEngine, RocksOptions, View};

fn resident_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn key(number: u64) -> Vec<u8> {
    format!("/registry/pods/{:016x}", number.wrapping_mul(0x9E37_79B9_7F4A_7C15)).into_bytes()
}

/// 256 bytes that do not compress.
fn noise(seed: u64) -> Vec<u8> {
    let words = (1..=32).map(|at| (seed * 32 + at).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23));
    words
        .flat_map(|word| word.wrapping_mul(0xD6E8_FEB8_6659_FD93).to_le_bytes())
        .collect()
}

#[test]
#[ignore = "writes some GB to the disk, and its bounds are on the memory of the process: run it alone, with --ignored"]
fn a_million_keys_fit_and_more_take_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let engine = RocksEngine::open(dir.path(), FAMILIES, &RocksOptions::default()).unwrap();
    let mut peak = 0;
    let mut at_a_million = 0;
    for number in 0..2_500_000u64 {
        if number % 1000 == 0 {
            let mut batch = engine.batch();
            for number in number..number + 1000 {
                let value = noise(number);
                batch.put(Family(0), &key(number), &value);
                batch.put(Family(1), &number.to_be_bytes(), &value);
            }
            engine.write(batch).unwrap();
            for other in 0..200 {
                engine.get(Family(0), &key(number * other / 200)).unwrap();
            }
            peak = peak.max(resident_mb());
        }
        if number == 1_000_000 {
            at_a_million = peak;
        }
    }
    let view = engine.view();
    let mut cursor = view.cursor(Family(0), KeyRange { start: b"", end: None }).unwrap();
    cursor.seek_first().unwrap();
    let mut keys = 0;
    while cursor.entry().is_some() {
        keys += 1;
        cursor.next().unwrap();
    }
    assert_eq!(keys, 2_500_000);
    peak = peak.max(resident_mb());
    for stat in engine.stats() {
        eprintln(&format!("{} {}", stat.name, stat.value));
    }
    eprintln(&format!("peak {peak} MB, {at_a_million} MB at a million keys"));
    assert!(at_a_million < 450, "{at_a_million} MB");
    assert!(peak < 450, "{at_a_million} MB at a million keys, then {peak} MB");
}

fn eprintln(line: &str) {
    std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes()).unwrap();
}
