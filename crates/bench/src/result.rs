//! What came out of a run, and the figures drawn from it.

use crate::clock::SECOND;
use crate::record::{Course, Label, Row};

/// What a system's processes used within the window.
#[derive(Debug, Clone)]
pub(crate) struct ServerUse {
    pub(crate) cpu_seconds: f64,
    /// The most that was seen: ten times a second from /proc, else at the start and the end.
    pub(crate) peak_resident_bytes: f64,
    /// Where that is from.
    pub(crate) source: &'static str,
}

/// What the generator itself used within the window.
#[derive(Debug, Clone, Default)]
pub(crate) struct GeneratorUse {
    pub(crate) cpu_seconds: f64,
    /// For each thread the share of the time that it was running, 0 to 1.
    pub(crate) busy: Vec<f64>,
    /// And the share in which it was ready to, but found no free processor.
    pub(crate) waiting: Vec<f64>,
    /// 99th percentile of how late a thread came to what it had set a time for, in nanoseconds.
    pub(crate) lag_p99: f64,
    /// The same for the moments of an open loop, which latency counts from.
    pub(crate) pace_lag_p99: Option<f64>,
}

/// One run against one system.
#[derive(Debug, Clone)]
pub(crate) struct RunResult {
    /// The window's length.
    pub(crate) seconds: f64,
    /// One per label of the workload.
    pub(crate) rows: Vec<Row>,
    pub(crate) course: Course,
    pub(crate) server: Option<ServerUse>,
    pub(crate) generator: GeneratorUse,
    /// Operations of an open loop that no client was free for before the end.
    pub(crate) unsent: u64,
    pub(crate) reconnects: u64,
}

/// The figures of one row of one run. Times are in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Figures {
    pub(crate) done: f64,
    pub(crate) per_second: f64,
    pub(crate) items_per_second: f64,
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
    pub(crate) errors: f64,
}

/// Names one figure and how to get it.
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) of: fn(&Figures) -> f64,
    /// Whether it is a time in nanoseconds.
    pub(crate) is_time: bool,
}

/// The figures that systems are compared by.
pub(crate) const COMPARED: [Figure; 6] = [
    Figure {
        name: "ops/s",
        of: |figures| figures.per_second,
        is_time: false,
    },
    Figure {
        name: "p50",
        of: |figures| figures.p50,
        is_time: true,
    },
    Figure {
        name: "p90",
        of: |figures| figures.p90,
        is_time: true,
    },
    Figure {
        name: "p99",
        of: |figures| figures.p99,
        is_time: true,
    },
    Figure {
        name: "p99.9",
        of: |figures| figures.p999,
        is_time: true,
    },
    Figure {
        name: "max",
        of: |figures| figures.max,
        is_time: true,
    },
];

impl Figures {
    fn of(row: &Row, seconds: f64) -> Self {
        let quantile = |quantile| row.latency.value_at_quantile(quantile) as f64;
        Figures {
            done: row.done as f64,
            per_second: row.done as f64 / seconds,
            items_per_second: row.items as f64 / seconds,
            mean: row.latency.mean(),
            p50: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: row.latency.max() as f64,
            errors: row.failed() as f64,
        }
    }
}

impl RunResult {
    /// The rows with something in them, by name; several operations also have a row for all of them, first.
    pub(crate) fn named_rows(&self, labels: &[Label]) -> Vec<(&'static str, Row)> {
        let mut named: Vec<_> = labels
            .iter()
            .zip(&self.rows)
            .map(|(label, row)| (label.name, row.clone()))
            .collect();
        if labels.iter().filter(|label| label.primary).count() > 1 {
            named.insert(0, ("all", self.primary(labels)));
        }
        named.retain(|(_, row)| row.done + row.items + row.failed() + row.latency.len() > 0);
        named
    }

    /// The figures of every row.
    pub(crate) fn figures(&self, labels: &[Label]) -> Vec<(&'static str, Figures)> {
        self.named_rows(labels)
            .iter()
            .map(|(name, row)| (*name, Figures::of(row, self.seconds)))
            .collect()
    }

    /// All primary operations as one row.
    pub(crate) fn primary(&self, labels: &[Label]) -> Row {
        let mut all = Row::new();
        for (label, row) in labels.iter().zip(&self.rows) {
            if label.primary {
                all.merge(row);
            }
        }
        all
    }

    /// The servers' processor time for one primary operation, in nanoseconds.
    pub(crate) fn server_cpu_per_op(&self, labels: &[Label]) -> Option<f64> {
        let done = self.primary(labels).done;
        let server = self.server.as_ref()?;
        (done > 0).then(|| server.cpu_seconds * SECOND as f64 / done as f64)
    }

    /// The generator's processor time for one primary operation, in nanoseconds.
    pub(crate) fn generator_cpu_per_op(&self, labels: &[Label]) -> Option<f64> {
        let done = self.primary(labels).done;
        (done > 0).then(|| self.generator.cpu_seconds * SECOND as f64 / done as f64)
    }
}

/// All runs of one workload.
pub(crate) struct Outcome {
    pub(crate) load: std::sync::Arc<crate::load::Load>,
    /// For each system its name, where it is, and its rounds.
    pub(crate) systems: Vec<SystemOutcome>,
}

/// All rounds of one system.
pub(crate) struct SystemOutcome {
    pub(crate) name: String,
    pub(crate) endpoints: String,
    pub(crate) rounds: Vec<RunResult>,
}
