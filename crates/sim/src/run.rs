//! Runs a seed from its beginning to its end, or to what it finds.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fastrand::Rng;

use crate::Micros;
use crate::bugs::Bug;
use crate::scenario::Scenario;
use crate::trace::Detail;
use crate::world::World;

/// How a seed ended.
#[derive(Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What is wrong, if anything is.
    pub failure: Option<String>,
    /// The hash over everything that happened.
    pub hash: u64,
    /// Virtual time that passed.
    pub time: Micros,
    /// How long it took to be well again after the last fault.
    pub settled: Micros,
    /// Events.
    pub events: u64,
    /// Things that broke, and how many things were to break, left out or not.
    pub faults: (u64, u64),
    /// First members.
    pub members: usize,
    /// Requests that were answered, and all.
    pub answered: (u64, u64),
    /// Terms that had a leader.
    pub terms: usize,
    /// The marks reached.
    pub marks: BTreeMap<&'static str, u64>,
    /// The timeline, if it was asked for.
    pub lines: Vec<String>,
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Has panics remembered instead of printed. Call it once.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("a panic");
        let place = info.location().map_or_else(String::new, |place| {
            let file = place.file();
            let short = file
                .rfind("crates/")
                .or_else(|| file.rfind("raft-"))
                .map_or(file, |at| &file[at..]);
            format!(" ({short}:{})", place.line())
        });
        PANIC.with(|panic| panic.borrow_mut().get_or_insert(format!("{text}{place}")).len());
    }));
}

/// Forgets a panic that was part of the play.
pub fn forget_panic() {
    PANIC.with(|panic| panic.borrow_mut().take());
}

/// Runs a seed, maybe with a deliberate bug.
pub fn run(seed: u64, detail: Detail, bug: Option<Bug>) -> Report {
    let scenario = Scenario::draw(&mut Rng::with_seed(seed));
    run_scenario(seed, scenario, detail, bug)
}

/// Runs a seed in a world that is not the one it stands for.
pub fn run_scenario(seed: u64, scenario: Scenario, detail: Detail, bug: Option<Bug>) -> Report {
    forget_panic();
    let mut world = World::new(seed, scenario, detail, bug);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    let failure = ended
        .err()
        .map(|_| PANIC.with(|panic| panic.borrow_mut().take()).unwrap_or_default());
    let report = Report {
        seed,
        failure,
        hash: world.trace.hash(),
        time: world.now,
        settled: world.calm_since.map_or(0, |since| world.now - since),
        events: world.trace.events(),
        faults: (world.faults, world.next_fault),
        members: world.scenario.voters + world.scenario.learners,
        answered: (world.history.answered, world.history.requests() as u64),
        terms: world.history.terms_led(),
        marks: world.trace.marks().clone(),
        lines: world.trace.take_lines(),
    };
    if report.failure.is_some() {
        // A panic may have come in the middle of anything; what it left is not to be touched, not even to be dropped.
        std::mem::forget(world);
    }
    report
}
