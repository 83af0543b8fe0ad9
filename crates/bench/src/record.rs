//! What one thread measured: per kind of operation a histogram of latencies and counts, and a course over time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hdrhistogram::Histogram;

use crate::clock::SECOND;
use crate::net::failure::{Failure, Kind};
use crate::window::Window;

/// Longest latency a histogram tells from longer ones: an hour, in nanoseconds.
const LATENCY_MAX: u64 = 3_600 * SECOND;
/// Slots of a course over time; when they are full, two become one.
const SLOTS_MAX: usize = 240;
/// Width of a slot at first, in nanoseconds.
const SLOT_WIDTH: u64 = SECOND / 4;

/// A histogram of nanoseconds: three significant digits, half a microsecond at the low end; about 200 KiB.
pub(crate) fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1_000, LATENCY_MAX, 3).expect("the bounds are valid")
}

fn new_slot_histogram() -> Histogram<u32> {
    Histogram::new_with_bounds(1_000, LATENCY_MAX, 2).expect("the bounds are valid")
}

/// A kind of operation, as a row of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) name: &'static str,
    /// Whether it counts as one of the load's operations. What is not, such as one attempt of several or one event of
    /// a put, is reported beside them.
    pub(crate) primary: bool,
}

/// What was measured of one kind of operation.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// Latencies, in nanoseconds, of operations that were meant for the window and succeeded.
    pub(crate) latency: Histogram<u64>,
    /// Operations that succeeded within the window, whenever they began.
    pub(crate) done: u64,
    /// What those brought: keys of a range, attempts of a swap, watch events.
    pub(crate) items: u64,
    pub(crate) errors: Vec<ErrorCount>,
}

/// How often something failed.
#[derive(Debug, Clone)]
pub(crate) struct ErrorCount {
    pub(crate) kind: Kind,
    pub(crate) count: u64,
    /// The message of the first.
    pub(crate) example: String,
}

impl Row {
    pub(crate) fn new() -> Self {
        Row {
            latency: new_histogram(),
            done: 0,
            items: 0,
            errors: Vec::new(),
        }
    }

    /// How many failed.
    pub(crate) fn failed(&self) -> u64 {
        self.errors.iter().map(|error| error.count).sum()
    }

    fn fail(&mut self, kind: Kind, count: u64, example: &str) {
        match self.errors.iter_mut().find(|error| error.kind == kind) {
            Some(error) => error.count += count,
            None => self.errors.push(ErrorCount {
                kind,
                count,
                example: example.to_owned(),
            }),
        }
    }

    /// Adds what another thread, or another kind of operation, had.
    pub(crate) fn merge(&mut self, other: &Row) {
        self.latency.add(&other.latency).expect("all histograms have one shape");
        self.done += other.done;
        self.items += other.items;
        for error in &other.errors {
            self.fail(error.kind, error.count, &error.example);
        }
    }
}

/// Latencies over time, in slots of equal width from the start of the window.
#[derive(Debug, Clone)]
pub(crate) struct Course {
    /// In nanoseconds.
    pub(crate) width: u64,
    pub(crate) slots: Vec<Histogram<u32>>,
}

impl Course {
    pub(crate) fn new() -> Self {
        Course {
            width: SLOT_WIDTH,
            slots: Vec::new(),
        }
    }

    /// Adds an operation that ended `at` nanoseconds after the start of the window.
    pub(crate) fn add(&mut self, at: u64, latency: u64) {
        while at / self.width >= SLOTS_MAX as u64 {
            self.widen();
        }
        let slot = (at / self.width) as usize;
        while self.slots.len() <= slot {
            self.slots.push(new_slot_histogram());
        }
        self.slots[slot].saturating_record(latency);
    }

    fn widen(&mut self) {
        self.width *= 2;
        let halves = std::mem::take(&mut self.slots);
        for pair in halves.chunks(2) {
            let mut whole = pair[0].clone();
            for half in &pair[1..] {
                whole.add(half).expect("all slots have one shape");
            }
            self.slots.push(whole);
        }
    }

    /// Adds what another thread had.
    pub(crate) fn merge(&mut self, mut other: Course) {
        while self.width < other.width {
            self.widen();
        }
        while other.width < self.width {
            other.widen();
        }
        for (index, slot) in other.slots.into_iter().enumerate() {
            match self.slots.get_mut(index) {
                Some(mine) => mine.add(slot).expect("all slots have one shape"),
                None => self.slots.push(slot),
            }
        }
    }
}

/// Where the clients of one thread write down what they saw.
#[derive(Debug)]
pub(crate) struct Recorder {
    window: Arc<Window>,
    labels: &'static [Label],
    pub(crate) rows: Vec<Row>,
    pub(crate) course: Course,
    /// When the last measured operation ended.
    pub(crate) last: u64,
}

impl Recorder {
    pub(crate) fn new(window: Arc<Window>, labels: &'static [Label]) -> Self {
        Recorder {
            window,
            labels,
            rows: labels.iter().map(|_| Row::new()).collect(),
            course: Course::new(),
            last: 0,
        }
    }

    /// An operation that was meant for `at` ended well at `ended`, with `items` of what it is about.
    pub(crate) fn succeed(&mut self, label: usize, at: u64, ended: u64, items: u64) {
        let row = &mut self.rows[label];
        let (from, until) = (self.window.from(), self.window.until());
        if from <= ended && ended < until {
            row.done += 1;
            row.items += items;
            if self.labels[label].primary {
                self.window.done.fetch_add(1, Ordering::Relaxed);
                self.course.add(ended - from, ended.saturating_sub(at));
            }
        }
        if from <= at && at < until {
            row.latency.saturating_record(ended.saturating_sub(at));
            self.last = self.last.max(ended);
        }
    }

    /// An operation that was meant for `at` failed.
    pub(crate) fn fail(&mut self, label: usize, at: u64, ended: u64, failure: &Failure) {
        if self.window.contains(at) {
            self.rows[label].fail(failure.kind, 1, &failure.message);
            self.window.failed.fetch_add(1, Ordering::Relaxed);
            self.last = self.last.max(ended);
        }
    }

    /// Counts items that have no latency, seen at `at`.
    pub(crate) fn count(&mut self, label: usize, at: u64, items: u64) {
        if self.window.contains(at) {
            self.rows[label].items += items;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABELS: &[Label] = &[Label {
        name: "put",
        primary: true,
    }];

    fn recorder(from: u64, until: u64) -> Recorder {
        let window = Arc::new(Window::new(None));
        window.set(0, from, until);
        Recorder::new(window, LABELS)
    }

    #[test]
    fn only_the_window_counts() {
        let mut recorder = recorder(1_000_000, 2_000_000);
        recorder.succeed(0, 900_000, 1_100_000, 1); // Began in the warm-up: done, but its latency is not of the window.
        recorder.succeed(0, 1_500_000, 1_700_000, 1);
        recorder.succeed(0, 1_900_000, 2_900_000, 1); // Ended late: its latency counts, the throughput not.
        recorder.succeed(0, 2_100_000, 2_900_000, 1);
        let row = &recorder.rows[0];
        assert_eq!((row.done, row.latency.len()), (2, 2));
        assert!(
            (999_000..1_001_000).contains(&row.latency.max()),
            "{}",
            row.latency.max()
        );
    }

    #[test]
    fn errors_count_by_kind() {
        let mut recorder = recorder(0, 100);
        for (at, kind) in [
            (1, Kind::Timeout),
            (2, Kind::Timeout),
            (3, Kind::Reset),
            (200, Kind::Reset),
        ] {
            recorder.fail(0, at, at, &Failure::new(kind, "x"));
        }
        let counts: Vec<_> = recorder.rows[0].errors.iter().map(|e| (e.kind, e.count)).collect();
        assert_eq!(counts, [(Kind::Timeout, 2), (Kind::Reset, 1)]);
    }

    #[test]
    fn percentiles_are_exact_to_three_digits() {
        let mut histogram = new_histogram();
        (1..=10_000u64).for_each(|n| histogram.record(n * 100_000).unwrap());
        for (quantile, expected) in [(0.5, 5e8), (0.99, 9.9e8), (0.999, 9.99e8)] {
            let found = histogram.value_at_quantile(quantile) as f64;
            assert!((found / expected - 1.0).abs() < 0.002, "{quantile}: {found}");
        }
    }

    #[test]
    fn a_course_stays_bounded_and_loses_nothing() {
        let (mut long, mut short) = (Course::new(), Course::new());
        (0..1_000).for_each(|second| long.add(second * SECOND, 5_000));
        (0..10).for_each(|second| short.add(second * SECOND, 5_000));
        assert!(long.slots.len() <= SLOTS_MAX && long.width > SLOT_WIDTH);
        short.merge(long);
        assert_eq!(short.slots.iter().map(Histogram::len).sum::<u64>(), 1_010);
    }
}
