//! What makes a result worth less than it looks.

use crate::load::Load;
use crate::result::RunResult;
use crate::units::nanos;

/// A thread of the generator that runs for more of the time than this may be what limits the load.
const BUSY_MAX: f64 = 0.8;
/// A thread that waits for a processor for more of the time than this measures the machine's load, too.
const WAITING_MAX: f64 = 0.2;
/// Lateness of the generator's own threads that shows in latencies, in nanoseconds.
const LAG_MAX: f64 = 5e6;
/// The same for the moments of an open loop, which are kept more exactly.
const PACE_LAG_MAX: f64 = 1e6;

/// All that there is to say against a run.
pub(crate) fn warnings(load: &Load, run: &RunResult) -> Vec<String> {
    let mut warnings = Vec::new();
    let highest = |shares: &[f64]| shares.iter().copied().fold(0.0, f64::max);
    let (busy, waiting) = (highest(&run.generator.busy), highest(&run.generator.waiting));
    if busy > BUSY_MAX {
        warnings.push(format!(
            "the generator is the bottleneck: a thread of it was busy {:.0} % of the time; the server can do more \
             (--threads, or another machine)",
            busy * 100.0
        ));
    }
    if waiting > WAITING_MAX {
        warnings.push(format!(
            "the generator waited for a free processor {:.0} % of the time: it shares them with the server, and \
             latencies include that wait",
            waiting * 100.0
        ));
    }
    if run.generator.lag_p99 > LAG_MAX {
        warnings.push(format!(
            "the generator's loop was late by {} (p99): latencies include that",
            nanos(run.generator.lag_p99)
        ));
    }
    if let Some(lag) = run.generator.pace_lag_p99
        && lag > PACE_LAG_MAX
    {
        warnings.push(format!(
            "operations began late by {} (p99) because of the generator: latencies include that",
            nanos(lag)
        ));
    }
    if run.unsent > 0 {
        warnings.push(format!(
            "{} operations were due and never sent: {} clients were not enough for --rate {} (their latency, missing \
             here, would be the longest)",
            run.unsent,
            load.clients,
            load.rate.unwrap_or_default()
        ));
    }
    if run.reconnects > 0 {
        warnings.push(format!("connections were lost {} times", run.reconnects));
    }
    warnings
}
