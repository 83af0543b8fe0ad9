//! One run against one system: starts the generator's threads, lets them go together, and gathers what they saw.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::clock::{SECOND, instant, now};
use crate::interrupt::Interrupt;
use crate::load::Load;
use crate::net::endpoint::Endpoint;
use crate::net::security::Security;
use crate::progress::Progress;
use crate::record::{Course, Row, new_histogram};
use crate::result::{GeneratorUse, RunResult, ServerUse};
use crate::thread::{self, ThreadPlan, ThreadReport};
use crate::usage::Source;
use crate::window::Window;
use crate::workload::lease::LeaseIds;
use crate::workload::watch::Fanout;

/// Between the word and the first operation, in nanoseconds: long enough for all threads to hear it.
const RUN_UP: u64 = SECOND / 50;
/// How often progress is shown and memory looked at, in nanoseconds.
const TICK: u64 = SECOND / 10;

/// A system under load.
#[derive(Debug)]
pub(crate) struct System {
    pub(crate) name: String,
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) security: Security,
    pub(crate) pids: Vec<u32>,
}

/// Runs the load once. `ids` are those of the leases it makes.
pub(crate) async fn measure(
    load: &Arc<Load>,
    system: &System,
    ids: &Arc<LeaseIds>,
    progress: &Progress,
    interrupt: &Interrupt,
) -> Result<RunResult, String> {
    let source = Source::find(&system.pids, &system.endpoints, &system.security).await?;
    let window = Arc::new(Window::new(load.total));
    let mut threads = Threads::start(load, system, ids, &window)?;
    interrupt.or(threads.ready(load.threads)).await?;

    let start = now() + RUN_UP;
    let from = start + load.warmup.as_nanos() as u64;
    let until = load
        .duration
        .map_or(u64::MAX, |duration| from + duration.as_nanos() as u64);
    window.set(start, from, until);
    threads.go();
    progress.begin(
        &format!("{} {}", load.workload.name(), system.name),
        Some(match (load.total, load.duration) {
            (Some(total), _) => total,
            (None, duration) => (load.warmup + duration.unwrap_or_default()).as_millis() as u64,
        }),
    );

    wait(from, &window, interrupt, || progress.show(&window, load.total)).await;
    let before = source.read(&system.endpoints, &system.security).await;
    let mut peak: f64 = 0.0;
    wait(until, &window, interrupt, || {
        progress.show(&window, load.total);
        peak = peak.max(source.resident_bytes().unwrap_or(0.0));
    })
    .await;
    // When a number of operations ends the run, their end is when the threads have ended.
    let reports = if window.is_exhausted() {
        Some(threads.join().await?)
    } else {
        None
    };
    let after = source.read(&system.endpoints, &system.security).await;
    let reports = match reports {
        Some(reports) => reports,
        None => threads.join().await?,
    };
    progress.end();

    let last = reports.iter().map(|report| report.last).max().unwrap_or(from);
    let end = if window.is_exhausted() {
        last.min(window.until())
    } else {
        window.until()
    };
    let server = before.zip(after).map(|(before, after)| ServerUse {
        cpu_seconds: after.cpu_seconds - before.cpu_seconds,
        peak_resident_bytes: peak.max(before.resident_bytes).max(after.resident_bytes),
        source: source.name(),
    });
    // Never nothing, so that a rate is a number even if nothing was done.
    let seconds = end.saturating_sub(from).max(1_000) as f64 / SECOND as f64;
    Ok(merge(reports, load, seconds, server))
}

/// Waits for a moment, or until nothing is left to do or the user has had enough.
async fn wait(moment: u64, window: &Window, interrupt: &Interrupt, mut tick: impl FnMut()) {
    loop {
        tick();
        if interrupt.is_pressed() {
            window.end(now());
        }
        let moment = moment.min(window.until());
        if now() >= moment || window.is_exhausted() {
            return;
        }
        tokio::time::sleep_until(instant(moment.min(now() + TICK))).await;
    }
}

/// The generator's threads.
struct Threads {
    ready: mpsc::UnboundedReceiver<Result<(), crate::net::failure::Failure>>,
    go: Vec<oneshot::Sender<()>>,
    reports: Vec<oneshot::Receiver<Option<ThreadReport>>>,
}

impl Threads {
    fn start(load: &Arc<Load>, system: &System, ids: &Arc<LeaseIds>, window: &Arc<Window>) -> Result<Self, String> {
        let (ready_sender, ready) = mpsc::unbounded_channel();
        let fanout = Arc::new(Fanout::new(load.clients, load.watchers));
        let mut threads = Threads {
            ready,
            go: Vec::new(),
            reports: Vec::new(),
        };
        for index in 0..load.threads {
            let (go, is_go) = oneshot::channel();
            let (report_sender, report) = oneshot::channel();
            let plan = ThreadPlan {
                index,
                load: Arc::clone(load),
                endpoints: system.endpoints.clone(),
                security: system.security.clone(),
                window: Arc::clone(window),
                ids: Arc::clone(ids),
                fanout: Arc::clone(&fanout),
                ready: ready_sender.clone(),
                go: is_go,
            };
            std::thread::Builder::new()
                .name(format!("bench-{index}"))
                // Whoever does not wait for the report any more does not want it.
                .spawn(move || drop(report_sender.send(thread::run(plan))))
                .map_err(|error| format!("cannot start a thread: {error}"))?;
            threads.go.push(go);
            threads.reports.push(report);
        }
        Ok(threads)
    }

    /// Waits until all threads are connected and prepared.
    async fn ready(&mut self, count: usize) -> Result<(), String> {
        for _ in 0..count {
            let result = self.ready.recv().await.ok_or("a thread of the generator died")?;
            result.map_err(|failure| failure.to_string())?;
        }
        Ok(())
    }

    fn go(&mut self) {
        for go in self.go.drain(..) {
            // A thread that died shows when its report is missing.
            let _ = go.send(());
        }
    }

    async fn join(&mut self) -> Result<Vec<ThreadReport>, String> {
        let mut reports = Vec::new();
        for report in self.reports.drain(..) {
            let report = report.await.ok().flatten();
            reports.push(report.ok_or("a thread of the generator died")?);
        }
        Ok(reports)
    }
}

fn merge(reports: Vec<ThreadReport>, load: &Load, seconds: f64, server: Option<ServerUse>) -> RunResult {
    let mut result = RunResult {
        seconds,
        rows: load.workload.labels().iter().map(|_| Row::new()).collect(),
        course: Course::new(),
        server,
        generator: GeneratorUse::default(),
        unsent: 0,
        reconnects: 0,
    };
    let (mut lag, mut pace_lag) = (new_histogram(), None);
    for report in reports {
        for (row, other) in result.rows.iter_mut().zip(&report.rows) {
            row.merge(other);
        }
        result.course.merge(report.course);
        result.unsent += report.pace.unsent;
        result.reconnects += report.reconnects;
        let elapsed = report.elapsed.max(1) as f64;
        result.generator.cpu_seconds += report.time.cpu as f64 / SECOND as f64;
        result.generator.busy.push(report.time.cpu as f64 / elapsed);
        result.generator.waiting.push(report.time.wait as f64 / elapsed);
        lag.add(report.lag).expect("all histograms have one shape");
        if let Some(other) = report.pace.lag {
            pace_lag
                .get_or_insert_with(new_histogram)
                .add(other)
                .expect("all histograms have one shape");
        }
    }
    result.generator.lag_p99 = lag.value_at_quantile(0.99) as f64;
    result.generator.pace_lag_p99 = pace_lag.map(|lag| lag.value_at_quantile(0.99) as f64);
    result
}

/// A pause between two runs, unless the user has had enough.
pub(crate) async fn pause(length: Duration, interrupt: &Interrupt) -> Result<(), String> {
    interrupt
        .or(async {
            tokio::time::sleep(length).await;
            Ok(())
        })
        .await
}
