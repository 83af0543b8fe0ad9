//! Histograms of durations that cost two additions each, with several series under one name.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};

/// Bounds of buckets, in seconds: `start`, then each twice the one before.
pub(crate) fn doubling(start: f64, count: i32) -> Vec<f64> {
    (0..count).map(|power| start * f64::from(power).exp2()).collect()
}

/// The durations of one series.
#[derive(Debug)]
pub(crate) struct Durations {
    bounds: Arc<[f64]>,
    /// One for each bound, and one for what is longer.
    counts: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
}

impl Durations {
    pub(crate) fn new(bounds: Arc<[f64]>) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Durations {
            bounds,
            counts,
            sum_ns: AtomicU64::new(0),
        }
    }

    /// A series alone, with bounds of [`doubling`].
    pub(crate) fn doubling(start: f64, count: i32) -> Self {
        Durations::new(doubling(start, count).into())
    }

    /// Counts `times` things that took this long each.
    pub(crate) fn observe(&self, took: Duration, times: u64) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.partition_point(|&bound| bound < seconds);
        self.counts[bucket].fetch_add(times, Ordering::Relaxed);
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.sum_ns.fetch_add(ns.saturating_mul(times), Ordering::Relaxed);
    }

    /// As Prometheus' client library has it. The buckets are read one by one, so the sum may be a moment newer.
    pub(crate) fn metric(&self, labels: &[(&str, &str)]) -> Metric {
        let mut counted = 0;
        let mut buckets = Vec::with_capacity(self.bounds.len());
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            counted += count.load(Ordering::Relaxed);
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(counted);
            buckets.push(bucket);
        }
        counted += self.counts[self.bounds.len()].load(Ordering::Relaxed);
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets);
        histogram.set_sample_count(counted);
        histogram.set_sample_sum(self.sum_ns.load(Ordering::Relaxed) as f64 / 1e9);
        let mut metric = Metric::default();
        metric.set_histogram(histogram);
        let pairs = labels.iter().map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        });
        metric.set_label(pairs.collect());
        metric
    }

    fn is_empty(&self) -> bool {
        self.counts.iter().all(|count| count.load(Ordering::Relaxed) == 0)
    }
}

/// Several series of one name in Prometheus' form.
pub(crate) fn family(name: &str, help: &str, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(MetricType::HISTOGRAM);
    family.set_metric(metrics);
    family
}

/// Series whose labels are known from the start. A cheap handle; register it once.
#[derive(Clone)]
pub(crate) struct DurationVec(Arc<Series>);

struct Series {
    name: &'static str,
    help: &'static str,
    label_names: &'static [&'static str],
    /// By index, with the values of its labels.
    series: Vec<(Vec<&'static str>, Durations)>,
    /// Whether a series is shown before anything is in it.
    shows_empty: bool,
    desc: Desc,
}

impl DurationVec {
    pub(crate) fn new(
        name: &'static str,
        help: &'static str,
        bounds: Vec<f64>,
        label_names: &'static [&'static str],
        series: impl IntoIterator<Item = Vec<&'static str>>,
        shows_empty: bool,
    ) -> prometheus::Result<Self> {
        let names = label_names.iter().map(|&name| name.to_owned()).collect();
        let desc = Desc::new(name.to_owned(), help.to_owned(), names, Default::default())?;
        let bounds: Arc<[f64]> = bounds.into();
        let series = series
            .into_iter()
            .map(|labels| (labels, Durations::new(bounds.clone())))
            .collect();
        Ok(DurationVec(Arc::new(Series {
            name,
            help,
            label_names,
            series,
            shows_empty,
            desc,
        })))
    }

    /// Counts in the series of that index; `times` things that took this long each.
    pub(crate) fn observe(&self, series: usize, took: Duration, times: u64) {
        self.0.series[series].1.observe(took, times);
    }
}

impl Collector for DurationVec {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.0.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Series {
            series, label_names, ..
        } = &*self.0;
        let shown = series
            .iter()
            .filter(|(_, durations)| self.0.shows_empty || !durations.is_empty());
        let metrics = shown.map(|(values, durations)| {
            let labels: Vec<_> = label_names.iter().copied().zip(values.iter().copied()).collect();
            durations.metric(&labels)
        });
        vec![family(self.0.name, self.0.help, metrics.collect())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{Encoder as _, Registry, TextEncoder};

    fn text(registry: &Registry) -> String {
        let mut out = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn counts_into_the_bucket_whose_bound_is_not_below() {
        let registry = Registry::new();
        let series = [vec!["a"], vec!["b"]];
        let durations = DurationVec::new("x_seconds", "X.", doubling(0.001, 3), &["op"], series, false).unwrap();
        registry.register(Box::new(durations.clone())).unwrap();
        durations.observe(0, Duration::from_millis(1), 1);
        durations.observe(0, Duration::from_millis(3), 2);
        durations.observe(0, Duration::from_secs(1), 1);
        let text = text(&registry);
        for line in [
            "# TYPE x_seconds histogram",
            "x_seconds_bucket{op=\"a\",le=\"0.001\"} 1",
            "x_seconds_bucket{op=\"a\",le=\"0.002\"} 1",
            "x_seconds_bucket{op=\"a\",le=\"0.004\"} 3",
            "x_seconds_bucket{op=\"a\",le=\"+Inf\"} 4",
            "x_seconds_count{op=\"a\"} 4",
            "x_seconds_sum{op=\"a\"} 1.007",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert!(!text.contains("\"b\""), "an empty series is not shown: {text}");
    }
}
