//! The part of a run that is measured, as all threads see it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What the threads of a run share. Moments are those of [`crate::clock::now`].
#[derive(Debug)]
pub(crate) struct Window {
    /// When operations begin.
    start: AtomicU64,
    /// When measuring begins, after the warm-up.
    from: AtomicU64,
    /// When measuring ends and no more operations begin; `u64::MAX` when a number of operations ends the run.
    until: AtomicU64,
    /// Operations that may still begin after the warm-up.
    tickets: AtomicU64,
    /// Whether anything runs out before `until`: tickets, or keys to delete.
    exhausted: AtomicBool,
    /// Operations that were measured so far, for the progress bar.
    pub(crate) done: AtomicU64,
    /// Operations that failed so far, for the progress bar.
    pub(crate) failed: AtomicU64,
}

impl Window {
    /// A run that has not begun; `total` operations at most.
    pub(crate) fn new(total: Option<u64>) -> Self {
        Window {
            start: AtomicU64::new(u64::MAX),
            from: AtomicU64::new(u64::MAX),
            until: AtomicU64::new(u64::MAX),
            tickets: AtomicU64::new(total.unwrap_or(u64::MAX)),
            exhausted: AtomicBool::new(false),
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// Says when. Called once, before the threads are let go.
    pub(crate) fn set(&self, start: u64, from: u64, until: u64) {
        self.start.store(start, Ordering::Relaxed);
        self.from.store(from, Ordering::Relaxed);
        self.until.store(until, Ordering::Relaxed);
    }

    /// Ends the run early.
    pub(crate) fn end(&self, at: u64) {
        self.until.fetch_min(at, Ordering::Relaxed);
    }

    pub(crate) fn start(&self) -> u64 {
        self.start.load(Ordering::Relaxed)
    }

    pub(crate) fn from(&self) -> u64 {
        self.from.load(Ordering::Relaxed)
    }

    pub(crate) fn until(&self) -> u64 {
        self.until.load(Ordering::Relaxed)
    }

    /// Whether an operation meant for this moment is measured.
    pub(crate) fn contains(&self, at: u64) -> bool {
        self.from() <= at && at < self.until()
    }

    /// Takes leave to begin an operation meant for `at`; none is left when `--total` have begun. The warm-up is free.
    pub(crate) fn take_ticket(&self, at: u64) -> bool {
        if at < self.from() {
            return true;
        }
        let taken = self
            .tickets
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .is_ok();
        if !taken {
            self.exhaust();
        }
        taken
    }

    /// Notes that nothing is left to do, before the time is over.
    pub(crate) fn exhaust(&self) {
        self.exhausted.store(true, Ordering::Relaxed);
    }

    /// Whether something ran out before the time was over.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.exhausted.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_count_from_the_warm_up_on() {
        let window = Window::new(Some(2));
        window.set(0, 100, u64::MAX);
        assert!((0..10).all(|at| window.take_ticket(at)));
        assert!(window.take_ticket(100) && window.take_ticket(101) && !window.is_exhausted());
        assert!(!window.take_ticket(102) && window.is_exhausted());
    }

    #[test]
    fn the_end_only_moves_forward_in_time() {
        let window = Window::new(None);
        window.set(0, 10, 20);
        assert!(!window.contains(9) && window.contains(10) && window.contains(19) && !window.contains(20));
        window.end(30);
        assert_eq!(window.until(), 20);
        window.end(15);
        assert_eq!(window.until(), 15);
    }
}
