//! Damage to real files, and what the adapter adds to the contract of the log.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::conformance::entry;

/// A segment size for tests that open a log many times: every open sets one file aside.
const SMALL: u64 = 16 << 10;

fn options(segment_bytes: u64) -> RaftLogOptions {
    RaftLogOptions {
        segment_bytes,
        purge_threshold_bytes: 4 * segment_bytes,
        cache_bytes_max: 4096,
    }
}

/// Every file of the log but its lock, by name.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.file_name().unwrap() != "LOCK")
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

fn restore(dir: &Path, files: &[(PathBuf, Vec<u8>)]) {
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir).unwrap();
    for (path, bytes) in files {
        fs::write(path, bytes).unwrap();
    }
}

fn open(dir: &Path, segment_bytes: u64) -> Result<RaftEngineLog, LogError> {
    RaftEngineLog::open(dir, &options(segment_bytes))
}

fn hard_state(term: u64) -> HardState {
    HardState {
        term,
        ..HardState::default()
    }
}

/// Writes records of three entries each and returns the offset where each begins in the only file, and the file's end.
fn write_records(dir: &Path, records: u64) -> Vec<u64> {
    let log = open(dir, SMALL).unwrap();
    let mut offsets = Vec::new();
    let mut offset = 69;
    for record in 0..records {
        offsets.push(offset);
        let entries: Vec<_> = (1..=3).map(|at| entry(record * 3 + at, 1, 50)).collect();
        offset += log.append(&entries, Some(&hard_state(record + 1)), true).unwrap().bytes as u64;
    }
    offsets.push(offset);
    offsets
}

fn append_file(files: &mut [(PathBuf, Vec<u8>)]) -> &mut Vec<u8> {
    let is_append = |(path, _): &&mut (PathBuf, Vec<u8>)| path.extension().unwrap() == "raftlog";
    &mut files.iter_mut().rfind(is_append).unwrap().1
}

fn check_entries(log: &RaftEngineLog, last: u64) {
    assert_eq!((log.first_index(), log.last_index()), (1, last));
    if last > 0 {
        let expected: Vec<_> = (1..=last).map(|index| entry(index, 1, 50)).collect();
        assert_eq!(log.entries(1, last + 1, u64::MAX).unwrap(), expected);
    }
    assert_eq!(log.hard_state().unwrap().term, last / 3);
}

#[test]
fn passes_the_conformance_suite() {
    let dir = tempfile::tempdir().unwrap();
    crate::conformance::raft_log(|name| open(&dir.path().join(name), 1 << 20).unwrap());
}

#[test]
fn a_last_record_cut_anywhere_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let offsets = write_records(dir.path(), 3);
    let whole = files(dir.path());
    for kept in offsets[2]..offsets[3] {
        // Cut short, or followed by the zeros of space that was set aside.
        for zeros in [0, 1000] {
            let mut cut = whole.clone();
            let file = append_file(&mut cut);
            assert_eq!(file.len() as u64, offsets[3]);
            file.truncate(kept as usize);
            file.resize(file.len() + zeros, 0);
            restore(dir.path(), &cut);

            let log = open(dir.path(), SMALL).unwrap();
            check_entries(&log, 6);
            let torn = log.torn_tail().map(|torn| torn.offset);
            // Zeros alone look like space that was set aside.
            let begun = append_file(&mut cut)[offsets[2] as usize..]
                .iter()
                .any(|&byte| byte != 0);
            assert_eq!(torn, begun.then_some(offsets[2]), "cut at {kept}");
            log.append(
                &[entry(7, 1, 50), entry(8, 1, 50), entry(9, 1, 50)],
                Some(&hard_state(3)),
                true,
            )
            .unwrap();
            drop(log);
            let log = open(dir.path(), SMALL).unwrap();
            check_entries(&log, 9);
            assert_eq!(log.torn_tail(), None);
        }
    }
}

#[test]
fn a_flipped_bit_is_a_torn_tail_only_in_the_last_record() {
    let dir = tempfile::tempdir().unwrap();
    let offsets = write_records(dir.path(), 4);
    let whole = files(dir.path());
    for at in 0..offsets[4] {
        let mut flipped = whole.clone();
        append_file(&mut flipped)[at as usize] ^= 0x10;
        restore(dir.path(), &flipped);
        let opened = open(dir.path(), SMALL);
        // The alignment in the file header is 0 and means nothing otherwise.
        let ignored = 61..69;
        if at >= offsets[3] {
            check_entries(&opened.unwrap(), 9);
        } else if !ignored.contains(&at) {
            let record = offsets.iter().rev().find(|&&offset| offset <= at).copied().unwrap_or(0);
            match opened.map(|_| ()) {
                Err(LogError::Corrupt { place, .. }) => {
                    assert!(place.contains("0000000000000001.raftlog"), "{place}");
                    assert!(place.ends_with(&format!("offset {record}")), "{place}, flipped at {at}");
                }
                other => panic!("flipped at {at}: {other:?}"),
            }
            let mut after = files(dir.path());
            assert!(
                append_file(&mut after) == append_file(&mut flipped),
                "a refused log is left as it is"
            );
        }
    }
}

#[test]
fn damage_in_an_older_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 4096).unwrap();
    for index in 1..=100 {
        log.append(&[entry(index, 1, 300)], None, true).unwrap();
    }
    drop(log);
    let whole = files(dir.path());
    let appends: Vec<_> = (0..whole.len())
        .filter(|&at| whole[at].0.extension().unwrap() == "raftlog")
        .collect();
    assert!(appends.len() > 5);
    for &file in &appends[..3] {
        for at in (0..whole[file].1.len()).step_by(97).filter(|at| !(61..69).contains(at)) {
            let mut flipped = whole.clone();
            flipped[file].1[at] ^= 1;
            restore(dir.path(), &flipped);
            let name = whole[file].0.file_name().unwrap().to_str().unwrap();
            match open(dir.path(), 4096).map(|_| ()) {
                Err(LogError::Corrupt { place, .. }) => assert!(place.contains(name), "{place}"),
                other => panic!("{name} flipped at {at}: {other:?}"),
            }
        }
        // A file that ends early, and one that is gone.
        let mut short = whole.clone();
        short[file].1.pop();
        restore(dir.path(), &short);
        assert!(matches!(open(dir.path(), 4096), Err(LogError::Corrupt { .. })));
        let mut gone = whole.clone();
        gone.remove(file);
        restore(dir.path(), &gone);
        assert!(matches!(open(dir.path(), 4096), Err(LogError::Corrupt { .. })));
    }
    restore(dir.path(), &whole);
    assert_eq!(open(dir.path(), 4096).unwrap().last_index(), 100);
}

#[test]
fn a_lost_commit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 1 << 20).unwrap();
    let mut committed = hard_state(1);
    committed.commit = 5;
    log.append(&[entry(1, 1, 10)], Some(&committed), true).unwrap();
    drop(log);
    match open(dir.path(), 1 << 20).map(|_| ()) {
        Err(LogError::Corrupt { cause, .. }) => assert!(cause.contains("up to 5"), "{cause}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn records_of_a_recycled_file_do_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    // Records of one size, so that those of the file's earlier life lie exactly where new ones would follow. That wants
    // files to be recycled at the same places, so it is done here and not by the log's own thread.
    let mut log = open(dir.path(), 4096).unwrap();
    log.purges.take();
    for index in 1000..1200 {
        if index == 1000 {
            log.reset(999, 1, &hard_state(1)).unwrap();
        }
        log.append(&[entry(index, 1, 300)], None, true).unwrap();
        if index > 1010 {
            log.trim(index - 5).unwrap();
        }
        log.core.purge().unwrap();
    }
    let files_now = files(dir.path());
    // As a killed process leaves it: the end of the last file is not cut off.
    std::mem::forget(log);
    let copy = tempfile::tempdir().unwrap();
    let copied: Vec<_> = files_now
        .iter()
        .map(|(path, bytes)| (copy.path().join(path.file_name().unwrap()), bytes.clone()))
        .collect();
    restore(copy.path(), &copied);
    let log = open(copy.path(), 4096).unwrap();
    assert_eq!(log.last_index(), 1199);
    assert!(log.first_index() >= 1100);
    let held = log.entries(log.first_index(), 1200, u64::MAX).unwrap();
    assert!(held.iter().all(|held| *held == entry(held.index, 1, 300)));
    assert_eq!(log.torn_tail(), None, "an earlier life is not a torn record");
}

#[test]
fn two_logs_read_by_one_thread_do_not_mix() {
    // raft-engine remembers the block read last by its place in the file, not by its log.
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let logs = [1, 2].map(|term| {
        let log = open(dirs[term as usize - 1].path(), 1 << 20).unwrap();
        for index in 1..=50 {
            log.append(&[entry(index, term, 200)], None, true).unwrap();
        }
        log
    });
    for index in 1..=20 {
        for (term, log) in (1..).zip(&logs) {
            assert_eq!(log.entries(index, index + 1, 0).unwrap(), [entry(index, term, 200)]);
        }
    }
}

#[test]
fn a_directory_is_opened_once() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 1 << 20).unwrap();
    match open(dir.path(), 1 << 20).map(|_| ()) {
        Err(LogError::Io { cause, .. }) => assert!(cause.contains("in use by another process"), "{cause}"),
        other => panic!("{other:?}"),
    }
    drop(log);
    open(dir.path(), 1 << 20).unwrap();
}

#[test]
fn disk_use_stays_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 1 << 20).unwrap();
    for index in 1..=2000 {
        log.append(&[entry(index, 1, 30_000)], None, false).unwrap();
        if index > 20 && index % 10 == 0 {
            log.trim(index - 10).unwrap();
        }
    }
    log.append(&[], None, true).unwrap();
    // A thread of the log's own removes files.
    let begun = std::time::Instant::now();
    while log.disk_bytes() >= 20 << 20 {
        assert!(begun.elapsed().as_secs() < 60, "{} bytes for 60 MB", log.disk_bytes());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn a_failed_append_is_final() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("raft");
    let log = open(&dir, 4096).unwrap();
    log.append(&[entry(1, 1, 100)], None, true).unwrap();
    // No file can be made any more, so the log fails when this one is full.
    fs::rename(&dir, root.path().join("gone")).unwrap();
    let failed = (2..100).find_map(|index| log.append(&[entry(index, 1, 1000)], None, true).err());
    assert!(
        matches!(failed, Some(LogError::Io { action: "append", .. })),
        "{failed:?}"
    );
    fs::rename(root.path().join("gone"), &dir).unwrap();
    let last = log.last_index();
    assert!(log.append(&[entry(last + 1, 1, 1000)], None, true).is_err());
    assert!(log.append(&[], Some(&hard_state(2)), false).is_err());
    assert!(log.trim(2).is_err() && log.reset(9, 9, &hard_state(9)).is_err());
    assert_eq!(log.entries(1, 2, 0).unwrap(), [entry(1, 1, 100)], "reads go on");
}
