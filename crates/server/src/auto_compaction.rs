//! When history is forgotten without being asked (`--auto-compaction-mode`, `--auto-compaction-retention`): etcd's
//! schedule.
//!
//! By time: the revision is noted ten times a period, or ten times an hour if that is more often, and once a whole period
//! has been seen what lies before it is compacted, each period or each hour. By revision: every five minutes all but the
//! newest ones are compacted. Every member notes revisions, so that a new leader goes on where the last one stopped; only
//! the leader compacts. Time comes from outside.

use std::collections::VecDeque;
use std::time::Duration;

use api::Revision;

/// What to compact without being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AutoCompaction {
    /// Nothing.
    #[default]
    Off,
    /// What is older than this.
    Periodic(Duration),
    /// All but this many revisions.
    Revisions(u64),
}

const HOUR_MS: u64 = 3_600_000;
/// How often a period, or an hour, is looked at.
const LOOKS: u64 = 10;
/// How often revisions are counted.
const REVISIONS_INTERVAL_MS: u64 = 5 * 60_000;

/// Knows when to compact what.
#[derive(Debug)]
pub(crate) struct Compactor {
    policy: AutoCompaction,
    next_ms: u64,
    /// What was noted at each look, the oldest a period ago.
    noted: VecDeque<Revision>,
    /// What was compacted last, and when.
    last: Revision,
    last_ms: u64,
    /// How long to wait after that: at first a whole period.
    pause_ms: u64,
}

impl Compactor {
    /// Begins at `now_ms`, with the store at `revision`; `None` if there is nothing to do, ever.
    pub(crate) fn new(policy: AutoCompaction, now_ms: u64, revision: Revision) -> Option<Self> {
        let (interval_ms, pause_ms) = match policy {
            AutoCompaction::Off => return None,
            AutoCompaction::Periodic(period) => {
                let period_ms = u64::try_from(period.as_millis()).unwrap_or(u64::MAX);
                (period_ms.min(HOUR_MS) / LOOKS, period_ms)
            }
            AutoCompaction::Revisions(_) => (REVISIONS_INTERVAL_MS, 0),
        };
        Some(Compactor {
            policy,
            next_ms: now_ms + interval_ms.max(1),
            noted: [revision].into(),
            last: 0,
            last_ms: now_ms,
            pause_ms,
        })
    }

    /// When [`Compactor::look`] is to be called next.
    pub(crate) fn next_ms(&self) -> u64 {
        self.next_ms
    }

    /// What to compact now, if anything. Say with [`Compactor::compacted`] that it was done; otherwise it is tried again
    /// at the next look.
    pub(crate) fn look(&mut self, now_ms: u64, revision: Revision, leads: bool) -> Option<Revision> {
        if now_ms < self.next_ms {
            return None;
        }
        match self.policy {
            AutoCompaction::Off => None,
            AutoCompaction::Revisions(keep) => {
                self.next_ms = now_ms + REVISIONS_INTERVAL_MS;
                let keep = i64::try_from(keep).unwrap_or(i64::MAX);
                let target = revision.saturating_sub(keep);
                (leads && target > 0 && target != self.last).then_some(target)
            }
            AutoCompaction::Periodic(period) => {
                let period_ms = u64::try_from(period.as_millis()).unwrap_or(u64::MAX);
                let interval_ms = (period_ms.min(HOUR_MS) / LOOKS).max(1);
                self.next_ms = now_ms + interval_ms;
                let target = self.noted.front().copied().unwrap_or(0);
                let is_due = now_ms.saturating_sub(self.last_ms) >= self.pause_ms && target != self.last;
                self.noted.push_back(revision);
                let looks = usize::try_from(period_ms / interval_ms)
                    .unwrap_or(usize::MAX)
                    .saturating_add(1);
                if self.noted.len() > looks {
                    self.noted.pop_front();
                }
                if !(leads && is_due) {
                    return None;
                }
                self.pause_ms = period_ms.min(HOUR_MS);
                Some(target)
            }
        }
    }

    /// Notes that everything before `revision` is compacted.
    pub(crate) fn compacted(&mut self, now_ms: u64, revision: Revision) {
        self.last = revision;
        self.last_ms = now_ms;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE_MS: u64 = 60_000;

    /// Runs a policy for some minutes with a revision a minute. Says at which minutes what was compacted.
    fn run(policy: AutoCompaction, minutes: u64, leads: impl Fn(u64) -> bool) -> Vec<(u64, Revision)> {
        let mut compactor = Compactor::new(policy, 0, 1).unwrap();
        let mut compacted = Vec::new();
        for minute in 1..=minutes {
            let revision = 1 + minute as i64;
            let now_ms = minute * MINUTE_MS;
            if let Some(target) = compactor.look(now_ms, revision, leads(minute)) {
                compactor.compacted(now_ms, target);
                compacted.push((minute, target));
            }
        }
        compacted
    }

    #[test]
    fn a_period_is_seen_whole_and_then_each_period() {
        let policy = AutoCompaction::Periodic(Duration::from_secs(10 * 60));
        // What goes is what was there eleven looks before: etcd keeps one more than it needs.
        assert_eq!(run(policy, 35, |_| true), [(10, 1), (20, 10), (30, 20)]);
    }

    #[test]
    fn after_a_long_period_it_is_each_hour() {
        let policy = AutoCompaction::Periodic(Duration::from_secs(5 * 3600));
        let compacted = run(policy, 8 * 60, |_| true);
        assert_eq!(compacted, [(300, 1), (360, 55), (420, 115), (480, 175)]);
    }

    #[test]
    fn revisions_are_counted_every_five_minutes() {
        let compacted = run(AutoCompaction::Revisions(7), 22, |_| true);
        assert_eq!(compacted, [(10, 4), (15, 9), (20, 14)]);
    }

    #[test]
    fn only_the_leader_compacts_and_a_new_one_goes_on() {
        let policy = AutoCompaction::Periodic(Duration::from_secs(10 * 60));
        assert_eq!(run(policy, 60, |_| false), []);
        // By the time it leads it has seen everything it needs.
        assert_eq!(run(policy, 48, |minute| minute >= 25), [(25, 15), (35, 25), (45, 35)]);
    }

    #[test]
    fn what_failed_is_tried_again_and_nothing_new_is_nothing_to_do() {
        let policy = AutoCompaction::Periodic(Duration::from_secs(10 * 60));
        let mut compactor = Compactor::new(policy, 0, 5).unwrap();
        let looks: Vec<_> = (1..=12)
            .map(|minute| compactor.look(minute * MINUTE_MS, 5, true))
            .collect();
        assert_eq!(looks[..9], [None; 9]);
        assert_eq!(looks[9..], [Some(5); 3], "it did not work");
        compactor.compacted(12 * MINUTE_MS, 5);
        assert!((13..60).all(|minute| compactor.look(minute * MINUTE_MS, 5, true).is_none()));
    }

    #[test]
    fn off_is_off_and_short_periods_do_not_spin() {
        assert!(Compactor::new(AutoCompaction::Off, 0, 1).is_none());
        let compactor = Compactor::new(AutoCompaction::Periodic(Duration::from_nanos(1)), 7, 1).unwrap();
        assert_eq!(compactor.next_ms(), 8);
    }
}
