//! What processes use: processor time and memory, from /proc, or as a server's metrics tell.

use std::fs;

use crate::net::endpoint::Endpoint;
use crate::net::metrics;
use crate::net::security::Security;

/// Processor time used so far and memory held now, summed over processes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Usage {
    pub(crate) cpu_seconds: f64,
    pub(crate) resident_bytes: f64,
}

impl std::ops::Add for Usage {
    type Output = Usage;

    fn add(self, other: Usage) -> Usage {
        Usage {
            cpu_seconds: self.cpu_seconds + other.cpu_seconds,
            resident_bytes: self.resident_bytes + other.resident_bytes,
        }
    }
}

/// Where a system's usage is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// The processes, on this machine.
    Pids(Vec<u32>),
    /// The servers' /metrics.
    Metrics,
    /// Nowhere.
    Unknown,
}

impl Source {
    /// The processes if any are named, else the metrics if all endpoints have them.
    pub(crate) async fn find(pids: &[u32], endpoints: &[Endpoint], security: &Security) -> Result<Self, String> {
        if !pids.is_empty() {
            of_processes(pids)?;
            return Ok(Source::Pids(pids.to_vec()));
        }
        Ok(match of_metrics(endpoints, security).await {
            Some(_) => Source::Metrics,
            None => Source::Unknown,
        })
    }

    /// What is used now; none if it cannot be learned (any more).
    pub(crate) async fn read(&self, endpoints: &[Endpoint], security: &Security) -> Option<Usage> {
        match self {
            Source::Pids(pids) => of_processes(pids).ok(),
            Source::Metrics => of_metrics(endpoints, security).await,
            Source::Unknown => None,
        }
    }

    /// Memory held now, if that costs the servers nothing to tell.
    pub(crate) fn resident_bytes(&self) -> Option<f64> {
        match self {
            Source::Pids(pids) => of_processes(pids).ok().map(|usage| usage.resident_bytes),
            _ => None,
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Source::Pids(_) => "/proc",
            Source::Metrics => "/metrics",
            Source::Unknown => "unknown",
        }
    }
}

async fn of_metrics(endpoints: &[Endpoint], security: &Security) -> Option<Usage> {
    let mut sum = Usage::default();
    for endpoint in endpoints {
        let metrics = metrics::fetch(endpoint, security).await?;
        sum = sum
            + Usage {
                cpu_seconds: metrics.cpu_seconds,
                resident_bytes: metrics.resident_bytes,
            };
    }
    Some(sum)
}

fn of_processes(pids: &[u32]) -> Result<Usage, String> {
    let mut sum = Usage::default();
    for pid in pids {
        let read = |file: &str| {
            fs::read_to_string(format!("/proc/{pid}/{file}")).map_err(|error| format!("process {pid}: {error}"))
        };
        let stat = read("stat")?;
        let ticks = cpu_ticks(&stat).ok_or_else(|| format!("process {pid}: cannot read its stat"))?;
        // None once a process has ended and waits to be collected.
        let resident = status_bytes(&read("status")?, "VmRSS:").unwrap_or(0.0);
        sum = sum
            + Usage {
                cpu_seconds: ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
                resident_bytes: resident,
            };
    }
    Ok(sum)
}

/// User and system time out of /proc/PID/stat.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The name, in parentheses, may itself hold blanks and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn status_bytes(status: &str, name: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024.0)
}

/// What the calling thread has had of the processors, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ThreadTime {
    /// Running.
    pub(crate) cpu: u64,
    /// Ready to run, while the processors were busy with others.
    pub(crate) wait: u64,
}

impl ThreadTime {
    /// Of this thread, so far.
    pub(crate) fn now() -> Self {
        let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        let mut numbers = text.split_ascii_whitespace().map(|number| number.parse().unwrap_or(0));
        // The clock is exact at any moment; schedstat's own time of running is only brought up to date at ticks.
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        numbers.next();
        ThreadTime {
            cpu: time.tv_sec as u64 * crate::clock::SECOND + time.tv_nsec as u64,
            wait: numbers.next().unwrap_or(0),
        }
    }

    /// What came since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        ThreadTime {
            cpu: self.cpu.saturating_sub(earlier.cpu),
            wait: self.wait.saturating_sub(earlier.wait),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stat_and_status() {
        let stat = "12 (a) b) c) S 1 2 3 4 5 6 7 8 9 10 70 30 0 0";
        assert_eq!(cpu_ticks(stat), Some(100));
        assert_eq!(status_bytes("VmHWM:\t  9 kB\nVmRSS:\t  2 kB\n", "VmRSS:"), Some(2048.0));
    }

    #[test]
    fn reads_this_process() {
        let usage = of_processes(&[std::process::id()]).unwrap();
        assert!(usage.resident_bytes > 0.0);
        assert!(of_processes(&[u32::MAX]).is_err());
        let before = ThreadTime::now();
        let sum = (0..3_000_000u64).fold(0u64, |sum, n| sum ^ std::hint::black_box(n));
        std::hint::black_box(sum);
        assert!(ThreadTime::now().since(before).cpu > 0);
    }
}
