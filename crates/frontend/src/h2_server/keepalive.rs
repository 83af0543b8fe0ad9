//! Asks a silent client whether it is still there.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

pub(super) struct KeepAlive {
    pings: PingPong,
    interval: Duration,
    timeout: Duration,
    /// When the client last asked for anything.
    active: Instant,
    /// Whether a ping waits for its answer.
    asked: bool,
    /// Ends when there is something to do.
    sleep: Pin<Box<Sleep>>,
}

impl KeepAlive {
    pub(super) fn new(pings: PingPong, interval: Duration, timeout: Duration) -> Self {
        let active = Instant::now();
        KeepAlive {
            pings,
            interval,
            timeout,
            active,
            asked: false,
            sleep: Box::pin(tokio::time::sleep_until(active + interval)),
        }
    }

    /// The client sent a request.
    pub(super) fn note_activity(&mut self) {
        self.active = Instant::now();
    }

    /// Completes when the client has left a ping unanswered.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            // It is ready with an error once the connection ends, which others report.
            if self.asked && self.pings.poll_pong(context).is_ready() {
                self.asked = false;
                self.note_activity();
                self.sleep.as_mut().reset(self.active + self.interval);
            }
            if self.sleep.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            if self.asked {
                return Poll::Ready(());
            }
            let due = self.active + self.interval;
            if due > Instant::now() {
                self.sleep.as_mut().reset(due);
            } else {
                // It fails only once the connection ends.
                self.asked = self.pings.send_ping(Ping::opaque()).is_ok();
                self.sleep.as_mut().reset(Instant::now() + self.timeout);
            }
        }
    }
}
