//! Fixed seeds: every run of the tests runs the same worlds.

#![allow(clippy::print_stdout, reason = "what a seed found is for people to read")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metastore_sim::bugs::Bug;
use metastore_sim::run::{catch_panics, run};
use metastore_sim::trace::Detail;

/// Runs seeds on all cores; says what they found.
fn findings(seeds: impl IntoIterator<Item = u64>, bug: Option<Bug>) -> Vec<String> {
    let seeds: Vec<u64> = seeds.into_iter().collect();
    let (next, found) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    catch_panics();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    if let Some(failure) = run(seed, Detail::Nothing, bug).failure {
                        let mut found = found.lock().expect("nobody panics here");
                        found.push(format!("seed {seed}: {failure}"));
                    }
                }
            });
        }
    });
    found.into_inner().expect("nobody panics here")
}

/// Seeds that find a real bug if it comes back: those of the first list of `mutants.py`, and where the bugs were found
/// first. Any change of the simulator makes other worlds of them; then `mutants.py` says which seeds find them now.
const REGRESSIONS: &[u64] = &[
    2, 11, 15, 21, 24, 25, 37, 52, 69, 95, 138, 210, 603, 695, 788, 1607, 1955, 2765, 2956, 3511, 4113, 45012, 49090,
    61825, 63854, 68989, 69505, 72096, 1115902, 5029180, 6015645, 6015904, 6021826, 10018259, 10032795, 10040441,
];

#[test]
fn a_few_seeds_find_nothing() {
    let found = findings((1..=100).chain(REGRESSIONS.iter().copied()), None);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The two minutes of `make test`. Fewer seeds on a slow machine, never more, so that the time is bounded.
#[test]
fn many_seeds_find_nothing() {
    let begun = Instant::now();
    let mut next = 1_000_000;
    while begun.elapsed() < Duration::from_secs(80) && next < 1_005_000 {
        let found = findings(next..next + 100, None);
        assert!(found.is_empty(), "{}", found.join("\n"));
        next += 100;
    }
    println!("{} seeds in {:?}", next - 1_000_000, begun.elapsed());
}

#[test]
fn the_same_seed_is_the_same_run() {
    catch_panics();
    for seed in [2, 3, 5, 8, 13] {
        let (first, again) = (run(seed, Detail::Nothing, None), run(seed, Detail::Everything, None));
        assert_eq!((first.hash, first.events), (again.hash, again.events), "seed {seed}");
        let elsewhere = std::thread::spawn(move || {
            // Another thread has other thread-local randomness, which must not matter.
            run(seed, Detail::Nothing, None).hash
        });
        assert_eq!(elsewhere.join().expect("it does not panic"), first.hash, "seed {seed}");
    }
}

/// The checkers can fail: deliberate bugs of every kind are found within a few seeds. `metastore-sim --mutants` plants
/// all of them.
#[test]
fn deliberate_bugs_are_found() {
    let bugs = [
        Bug::NoSync,
        Bug::TrimApplied,
        Bug::TrimUnknown,
        Bug::FlushForgetsIndex,
        Bug::FollowRefusedChanges,
        Bug::ReadWithoutIndex,
        Bug::ReadBeforeApplied,
        Bug::SnapshotLosesKey,
        Bug::InstallNotDurable,
        Bug::SnapshotNotReported,
        Bug::SameIncarnation,
        Bug::ApplySkips,
        Bug::ResumeSkips,
        Bug::WatchLosesEvents,
        Bug::HardStateLost,
        Bug::ReadWhateverIsPermitted,
    ];
    for bug in bugs {
        let found = (1..=10).any(|batch| !findings(batch * 10..batch * 10 + 10, Some(bug)).is_empty());
        assert!(found, "{bug:?} goes unnoticed");
    }
}
