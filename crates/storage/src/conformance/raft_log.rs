//! The suite for [`RaftLog`].

use raft::eraftpb::{Entry, HardState};

use crate::raft_log::{LogError, RaftLog};

/// An entry whose data can be told from its index, its term and `data_bytes`.
pub fn entry(index: u64, term: u64, data_bytes: usize) -> Entry {
    let data = (0..data_bytes)
        .map(|at| (index as usize * 31 + term as usize * 7 + at) as u8)
        .collect();
    Entry {
        index,
        term,
        data,
        ..Entry::default()
    }
}

fn entries(indexes: std::ops::RangeInclusive<u64>, term: u64) -> Vec<Entry> {
    indexes.map(|index| entry(index, term, 100)).collect()
}

fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
    HardState {
        term,
        vote,
        commit,
        ..HardState::default()
    }
}

/// Runs every check against the log that `open` opens.
pub fn raft_log<L: RaftLog>(mut open: impl FnMut(&str) -> L) {
    an_empty_log_begins_at_one(&open("empty"));
    entries_come_back(&open("append"));
    a_conflict_replaces_the_tail(&mut open);
    a_trim_forgets_the_front(&mut open);
    a_reset_begins_again(&mut open);
    what_was_synced_is_there_again(&mut open);
    old_files_go(&mut open);
}

/// Checks everything that can be asked against the entries that must be there.
fn check<L: RaftLog>(log: &L, first: u64, base_term: u64, expected: &[Entry]) {
    let last = first + expected.len() as u64 - 1;
    assert_eq!((log.first_index(), log.last_index()), (first, last));
    assert_eq!(log.term(first - 1).unwrap(), base_term);
    if first > 1 {
        assert!(matches!(log.term(first - 2), Err(LogError::Trimmed { .. })));
        assert!(matches!(
            log.entries(first - 1, first, u64::MAX),
            Err(LogError::Trimmed { .. })
        ));
    }
    assert!(matches!(log.term(last + 1), Err(LogError::Missing { .. })));
    assert!(matches!(
        log.entries(first, last + 2, u64::MAX),
        Err(LogError::Missing { .. })
    ));
    for entry in expected {
        assert_eq!(log.term(entry.index).unwrap(), entry.term);
    }
    assert_eq!(log.entries(first, first, u64::MAX).unwrap(), []);
    assert_eq!(log.entries(first, last + 1, u64::MAX).unwrap_or_default(), expected);
    for (at, entry) in expected.iter().enumerate().step_by(7) {
        assert_eq!(log.entries(entry.index, entry.index + 1, 0).unwrap(), expected[at..=at]);
    }
}

fn an_empty_log_begins_at_one<L: RaftLog>(log: &L) {
    assert_eq!((log.first_index(), log.last_index()), (1, 0));
    assert_eq!(log.hard_state().unwrap(), HardState::default());
    assert_eq!(log.term(0).unwrap(), 0);
    assert!(matches!(log.term(1), Err(LogError::Missing { last: 0, asked: 1 })));
    assert_eq!(log.entries(1, 1, u64::MAX).unwrap(), []);
    assert!(log.entries(1, 2, u64::MAX).is_err());
    log.trim(1).unwrap();
    assert_eq!((log.first_index(), log.last_index()), (1, 0));
}

fn entries_come_back<L: RaftLog>(log: &L) {
    let all = entries(1..=40, 1);
    let stats = log.append(&all[..1], Some(&hard_state(1, 2, 0)), true).unwrap();
    assert!(
        stats.bytes > 100 && stats.fsyncs == 1 && stats.duration_ns > 0,
        "{stats:?}"
    );
    log.append(&all[1..], None, true).unwrap();
    check(log, 1, 0, &all);
    assert_eq!(
        log.hard_state().unwrap(),
        hard_state(1, 2, 0),
        "kept when none is given"
    );
    log.append(&[], Some(&hard_state(1, 2, 30)), false).unwrap();
    assert_eq!(log.hard_state().unwrap(), hard_state(1, 2, 30));

    let one = u64::from(protobuf::Message::compute_size(&all[0]));
    assert_eq!(log.entries(1, 41, 0).unwrap(), all[..1], "at least one");
    assert_eq!(log.entries(1, 41, one * 3).unwrap(), all[..3]);
    assert_eq!(log.entries(1, 41, one * 4 - 1).unwrap(), all[..3]);
    assert!(
        matches!(
            log.append(&entries(42..=42, 1), None, true),
            Err(LogError::Missing { .. })
        ),
        "a gap"
    );
    check(log, 1, 0, &all);

    let large = entry(41, 2, 5 << 20);
    log.append(std::slice::from_ref(&large), None, true).unwrap();
    assert_eq!(log.entries(41, 42, 1).unwrap(), [large]);
}

fn a_conflict_replaces_the_tail<L: RaftLog>(open: &mut impl FnMut(&str) -> L) {
    let log = open("conflict");
    log.append(&entries(1..=10, 1), Some(&hard_state(1, 1, 4)), true)
        .unwrap();
    log.append(&entries(8..=9, 3), Some(&hard_state(3, 1, 4)), true)
        .unwrap();
    let expected = [entries(1..=7, 1), entries(8..=9, 3)].concat();
    check(&log, 1, 0, &expected);
    drop(log);
    let log = open("conflict");
    check(&log, 1, 0, &expected);
    log.append(&entries(5..=5, 4), None, true).unwrap();
    check(&log, 1, 0, &[entries(1..=4, 1), entries(5..=5, 4)].concat());
}

fn a_trim_forgets_the_front<L: RaftLog>(open: &mut impl FnMut(&str) -> L) {
    let log = open("trim");
    let all = [entries(1..=5, 1), entries(6..=20, 2)].concat();
    log.append(&all, Some(&hard_state(2, 1, 20)), true).unwrap();
    log.trim(5).unwrap();
    check(&log, 5, 1, &all[4..]);
    log.trim(3).unwrap();
    check(&log, 5, 1, &all[4..]);
    assert!(matches!(
        log.append(&all[3..4], None, true),
        Err(LogError::Trimmed { first: 5, asked: 4 })
    ));
    assert!(matches!(log.trim(22), Err(LogError::Missing { .. })));
    log.trim(8).unwrap();
    log.append(&entries(21..=21, 2), None, true).unwrap();
    let expected = [&all[7..], &entries(21..=21, 2)].concat();
    check(&log, 8, 2, &expected);
    drop(log);

    let log = open("trim");
    check(&log, 8, 2, &expected);
    log.trim(22).unwrap();
    check(&log, 22, 2, &[]);
    drop(log);

    let log = open("trim");
    check(&log, 22, 2, &[]);
    log.append(&entries(22..=23, 6), None, true).unwrap();
    check(&log, 22, 2, &entries(22..=23, 6));
    drop(log);
    check(&open("trim"), 22, 2, &entries(22..=23, 6));
}

fn a_reset_begins_again<L: RaftLog>(open: &mut impl FnMut(&str) -> L) {
    for (name, index, follows) in [
        ("reset-ahead", 100, 3),
        ("reset-behind", 10, 30),
        ("reset-empty", 50, 0),
    ] {
        let log = open(name);
        log.append(&entries(1..=30, 1), Some(&hard_state(1, 1, 5)), true)
            .unwrap();
        log.reset(index, 4, &hard_state(4, 0, index)).unwrap();
        check(&log, index + 1, 4, &[]);
        drop(log);

        let log = open(name);
        check(&log, index + 1, 4, &[]);
        assert_eq!(log.hard_state().unwrap(), hard_state(4, 0, index));
        let later = entries(index + 1..=index + follows, 5);
        log.append(&later, Some(&hard_state(5, 3, index)), true).unwrap();
        check(&log, index + 1, 4, &later);
        drop(log);
        let log = open(name);
        check(&log, index + 1, 4, &later);
        assert_eq!(log.hard_state().unwrap(), hard_state(5, 3, index));
    }
}

fn what_was_synced_is_there_again<L: RaftLog>(open: &mut impl FnMut(&str) -> L) {
    let mut expected = Vec::new();
    for term in 1..=5 {
        let log = open("synced");
        check(&log, 1, 0, &expected);
        for _ in 0..20 {
            let next = expected.len() as u64 + 1;
            let more = entries(next..=next + 2, term);
            log.append(&more, Some(&hard_state(term, term % 3, next)), true)
                .unwrap();
            expected.extend(more);
        }
        check(&log, 1, 0, &expected);
        assert_eq!(
            log.hard_state().unwrap(),
            hard_state(term, term % 3, expected.len() as u64 - 2)
        );
    }
    let log = open("synced");
    assert_eq!(log.hard_state().unwrap(), hard_state(5, 2, expected.len() as u64 - 2));
}

/// Appends far more than it keeps, with restarts in between.
fn old_files_go<L: RaftLog>(open: &mut impl FnMut(&str) -> L) {
    const KEPT: u64 = 40;
    let mut next = 1;
    for term in 1..=4 {
        let log = open("files");
        for _ in 0..150 {
            let more: Vec<_> = (next..next + 4).map(|index| entry(index, term, 20_000)).collect();
            next += 4;
            log.append(&more, Some(&hard_state(term, 1, next - 1)), true).unwrap();
            if next > KEPT + 1 {
                log.trim(next - KEPT).unwrap();
            }
        }
        let first = next - KEPT;
        let expected: Vec<_> = (first..next).map(|index| entry(index, term, 20_000)).collect();
        check(&log, first, term, &expected);
        drop(log);
        check(&open("files"), first, term, &expected);
    }
}
