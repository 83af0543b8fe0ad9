//! When operations begin: as soon as a client is free (closed loop), or at given moments (open loop).
//!
//! In the open loop an operation's latency counts from the moment it was meant for, whether or not a client was free
//! then. A server that stalls thus shows in the latency of all that it held up, not in one operation per client.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use hdrhistogram::Histogram;
use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;

use crate::clock::{SECOND, now};
use crate::record::new_histogram;
use crate::window::Window;

/// Shortest sleep of the one who deals out moments, in nanoseconds: bounds the wake-ups a second to 25,000.
const SLEEP_MIN: u64 = 40_000;

/// The moments for which one of `threads` threads is to begin operations, at `rate` a second over all threads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Schedule {
    pub(crate) rate: u64,
    pub(crate) thread: u64,
    pub(crate) threads: u64,
}

impl Schedule {
    /// The moment of this thread's operation number `index`, in nanoseconds after the start.
    pub(crate) fn at(&self, index: u64) -> u64 {
        let global = u128::from(index) * u128::from(self.threads) + u128::from(self.thread);
        u64::try_from(global * u128::from(SECOND) / u128::from(self.rate)).unwrap_or(u64::MAX)
    }

    /// How many of this thread's operations are due by `elapsed` nanoseconds after the start, that moment included.
    pub(crate) fn due(&self, elapsed: u64) -> u64 {
        // The last global index whose rounded-down moment is not after `elapsed`.
        let product = (u128::from(elapsed) + 1) * u128::from(self.rate) - 1;
        let last = (product / u128::from(SECOND)) as u64;
        if last < self.thread {
            0
        } else {
            (last - self.thread) / self.threads + 1
        }
    }
}

/// Lets the clients of one thread begin operations.
#[derive(Debug)]
pub(crate) struct Pacer {
    window: Arc<Window>,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    schedule: Schedule,
    /// One permit per operation that is due and not begun.
    permits: Semaphore,
    begun: Cell<u64>,
    due: Cell<u64>,
    /// How late the dealer itself was, in nanoseconds.
    lag: RefCell<Histogram<u64>>,
}

/// What an open loop has to tell at its end.
#[derive(Debug, Clone, Default)]
pub(crate) struct PaceReport {
    /// Operations that were due and never begun, as no client was free.
    pub(crate) unsent: u64,
    /// How late the generator was in dealing out moments, in nanoseconds.
    pub(crate) lag: Option<Histogram<u64>>,
}

impl Pacer {
    /// Without a schedule the loop is closed.
    pub(crate) fn new(window: Arc<Window>, schedule: Option<Schedule>) -> Self {
        let open = schedule.map(|schedule| Open {
            schedule,
            permits: Semaphore::new(0),
            begun: Cell::new(0),
            due: Cell::new(0),
            lag: RefCell::new(new_histogram()),
        });
        Pacer { window, open }
    }

    /// Whether latency counts from moments that were set beforehand.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Waits until the caller is to begin its next operation and returns the moment it was meant for; none at the end.
    pub(crate) async fn next(&self) -> Option<u64> {
        let at = match &self.open {
            None => now(),
            Some(open) => {
                open.permits.acquire().await.ok()?.forget();
                let index = open.begun.get();
                open.begun.set(index + 1);
                if now() >= self.window.until() {
                    open.begun.set(index);
                    return None;
                }
                self.window.start() + open.schedule.at(index)
            }
        };
        (at < self.window.until() && self.window.take_ticket(at)).then_some(at)
    }

    /// Deals out the moments of an open loop, until the end of the run; returns at once if the loop is closed.
    pub(crate) async fn deal(&self) -> std::io::Result<()> {
        let Some(open) = &self.open else { return Ok(()) };
        let timer = new_timer()?;
        let start = self.window.start();
        loop {
            let mut moment = now();
            let end = self.window.until();
            if moment >= end || self.window.is_exhausted() {
                // Nobody begins these any more, however late we are to say so.
                open.due.set(open.schedule.due(end.saturating_sub(start + 1)));
                break;
            }
            let next = start + open.schedule.at(open.due.get());
            if next > moment {
                // A tenth of a second at most, so that an early end is noticed.
                let sleep = (next.min(end) - moment).clamp(SLEEP_MIN, SECOND / 10);
                sleep_for(&timer, sleep).await?;
                moment = now().min(end - 1);
            }
            if moment < next {
                continue;
            }
            let due = open.schedule.due(moment - start);
            open.lag.borrow_mut().saturating_record(moment - next);
            open.permits.add_permits((due - open.due.get()) as usize);
            open.due.set(due);
        }
        // What waited for a permit is let go; what was due and not begun stays counted in `due`.
        open.permits.close();
        Ok(())
    }

    /// What there is to tell, once all clients have ended.
    pub(crate) fn report(&self) -> PaceReport {
        match &self.open {
            None => PaceReport::default(),
            Some(open) => PaceReport {
                unsent: if self.window.is_exhausted() {
                    0
                } else {
                    open.due.get().saturating_sub(open.begun.get())
                },
                lag: Some(open.lag.borrow().clone()),
            },
        }
    }
}

#[allow(
    unsafe_code,
    reason = "tokio has no safe way to wait for a file descriptor of another kind"
)]
fn new_timer() -> std::io::Result<AsyncFd<OwnedFd>> {
    let timer = timerfd_create(
        TimerfdClockId::Monotonic,
        TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
    )?;
    // SAFETY: an `OwnedFd` is its descriptor's only owner, always returns the same one, and closes it only when dropped.
    Ok(unsafe { AsyncFd::register(timer) }?)
}

/// Sleeps with the kernel's precision; tokio's own timers round to a millisecond, many times a fast answer.
async fn sleep_for(timer: &AsyncFd<OwnedFd>, nanos: u64) -> std::io::Result<()> {
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let setting = Itimerspec {
        it_interval: zero,
        it_value: Timespec {
            tv_sec: (nanos / SECOND) as i64,
            tv_nsec: (nanos % SECOND) as i64,
        },
    };
    timerfd_settime(timer.get_ref(), TimerfdTimerFlags::empty(), &setting)?;
    loop {
        let mut ready = timer.readable().await?;
        let mut expirations = [0; 8];
        if let Ok(read) = ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut expirations)?)) {
            return read.map(|_| ());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_even_and_threads_interleave() {
        let schedule = |thread| Schedule {
            rate: 4,
            thread,
            threads: 2,
        };
        let moments: Vec<_> = (0..3).map(|index| schedule(0).at(index)).collect();
        assert_eq!(moments, [0, SECOND / 2, SECOND]);
        assert_eq!(schedule(1).at(0), SECOND / 4);
    }

    #[test]
    fn due_is_the_inverse_of_at() {
        for rate in [1, 3, 7, 1_000, 33_333, 3_000_000] {
            for threads in 1..4 {
                for thread in 0..threads {
                    let schedule = Schedule { rate, thread, threads };
                    for index in 0..200 {
                        let at = schedule.at(index);
                        assert!(schedule.due(at) > index, "{schedule:?} {index}");
                        if at > 0 && schedule.at(index.saturating_sub(1)) < at {
                            assert!(schedule.due(at - 1) <= index, "{schedule:?} {index}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn no_drift_in_an_hour() {
        let schedule = Schedule {
            rate: 33_333,
            thread: 0,
            threads: 1,
        };
        assert_eq!(schedule.at(33_333 * 3_600), 3_600 * SECOND);
        assert_eq!(schedule.due(3_600 * SECOND - 1), 33_333 * 3_600);
    }
}
