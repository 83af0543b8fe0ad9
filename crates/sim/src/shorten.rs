//! Shortens the way to a failure: leaves out whatever it does not need.
//!
//! Every attempt is a whole run of the same seed in a simpler world. Faults have chance of their own each, so leaving one
//! out does not make others of the rest; but what clients do shifts, so an attempt may meet another failure, or none, and
//! then it is not taken.

use std::time::{Duration, Instant};

use crate::bugs::Bug;
use crate::run::{Report, run_scenario};
use crate::scenario::Scenario;
use crate::trace::Detail;

/// A shorter way to a failure.
pub struct Shorter {
    /// The simpler world.
    pub scenario: Scenario,
    /// What happens in it.
    pub report: Report,
    /// What was left out, in words.
    pub without: Vec<&'static str>,
    /// How many runs it took to find.
    pub tries: u32,
}

/// A part of the world that a failure may not need: changes the scenario if that is there at all.
type Simplify = (&'static str, fn(&mut Scenario) -> bool);

const SIMPLIFY: &[Simplify] = &[
    ("watchers", |scenario| std::mem::take(&mut scenario.watchers) > 0),
    ("changes of members", |scenario| {
        std::mem::take(&mut scenario.changes_members)
    }),
    ("crashes at chosen moments", |scenario| {
        std::mem::take(&mut scenario.aims)
    }),
    ("loss", |scenario| std::mem::take(&mut scenario.loss) > 0.0),
    ("duplicates", |scenario| std::mem::take(&mut scenario.duplicates) > 0.0),
    ("slow messages", |scenario| std::mem::take(&mut scenario.slow) > 0.0),
    ("reordering", |scenario| !std::mem::replace(&mut scenario.ordered, true)),
    ("skewed clocks", |scenario| std::mem::take(&mut scenario.skew) > 0.0),
    ("leases beyond the usual", |scenario| {
        std::mem::take(&mut scenario.leases) > 0.0
    }),
    ("auth", |scenario| std::mem::take(&mut scenario.auth)),
    ("learners", |scenario| std::mem::take(&mut scenario.learners) > 0),
    ("merged log writes", |scenario| {
        std::mem::take(&mut scenario.merge_appends)
    }),
    ("all clients but one", |scenario| {
        std::mem::replace(&mut scenario.clients, 1) > 1
    }),
    ("half of the clients", |scenario| {
        scenario.clients /= 2;
        scenario.clients > 0
    }),
    ("two voters", |scenario| {
        let fewer = scenario.voters.saturating_sub(2);
        std::mem::replace(&mut scenario.voters, fewer.max(1)) > 2
    }),
];

/// What kind of failure it is: its words without the numbers.
fn kind(failure: &str) -> String {
    let words = failure.chars().filter(|char| !char.is_ascii_digit());
    words.take(48).collect()
}

/// Looks for a shorter way to the failure of a seed, for so long; `None` if the seed does not fail.
pub fn shorten(seed: u64, scenario: &Scenario, bug: Option<Bug>, time: Duration) -> Option<Shorter> {
    let begun = Instant::now();
    let report = run_scenario(seed, scenario.clone(), Detail::Nothing, bug);
    let wanted = kind(report.failure.as_deref()?);
    let mut best = Shorter {
        scenario: scenario.clone(),
        report,
        without: Vec::new(),
        tries: 1,
    };
    let attempt = |best: &mut Shorter, scenario: Scenario, must_be_shorter: bool| {
        if begun.elapsed() > time {
            return false;
        }
        best.tries += 1;
        let report = run_scenario(seed, scenario.clone(), Detail::Nothing, bug);
        let fails = report.failure.as_deref().is_some_and(|failure| kind(failure) == wanted);
        let taken = fails && (!must_be_shorter || report.events < best.report.events);
        if taken {
            (best.scenario, best.report) = (scenario, report);
        }
        taken
    };
    loop {
        let events = best.report.events;
        for (what, simplify) in SIMPLIFY {
            let mut simpler = best.scenario.clone();
            if simplify(&mut simpler) && attempt(&mut best, simpler, true) {
                best.without.push(what);
            }
        }
        // Ever smaller runs of faults, down to single ones.
        let mut size = best.report.faults.1.max(1) as usize;
        loop {
            let left: Vec<u64> = (0..best.report.faults.1)
                .filter(|number| !best.scenario.faults_left_out.contains(number))
                .collect();
            for some in left.chunks(size) {
                let mut simpler = best.scenario.clone();
                simpler.faults_left_out.extend(some);
                attempt(&mut best, simpler, false);
            }
            if size == 1 {
                break;
            }
            size /= 2;
        }
        if best.report.events >= events || begun.elapsed() > time {
            break;
        }
    }
    Some(best)
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;
    use crate::run::catch_panics;

    #[test]
    fn a_failure_gets_shorter_and_stays_the_same() {
        catch_panics();
        let bug = Some(Bug::WatchLosesEvents);
        let fails = (1..50).find_map(|seed| {
            let scenario = Scenario::draw(&mut Rng::with_seed(seed));
            let report = run_scenario(seed, scenario.clone(), Detail::Nothing, bug);
            report.failure.clone().map(|failure| (seed, scenario, report, failure))
        });
        let (seed, scenario, report, failure) = fails.expect("one of these fails");
        let shorter = shorten(seed, &scenario, bug, Duration::from_secs(10)).expect("it fails");
        assert!(shorter.report.events <= report.events);
        assert_eq!(kind(shorter.report.failure.as_deref().unwrap()), kind(&failure));
        // The shorter one is as repeatable as any.
        let again = run_scenario(seed, shorter.scenario, Detail::Nothing, bug);
        assert_eq!(again.hash, shorter.report.hash);
        assert!(
            shorten(seed, &scenario, None, Duration::from_secs(1)).is_none(),
            "nothing fails"
        );
    }
}
