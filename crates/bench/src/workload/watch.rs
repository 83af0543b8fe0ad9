//! Watchers, and the writers whose events they get.
//!
//! Every value starts with the moment it was meant to be written, so an event tells its own latency.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::{Semaphore, oneshot};

use crate::client::Client;
use crate::clock::now;
use crate::keys::KeyDealer;
use crate::net::channel::{Channel, Stream};
use crate::net::failure::{Failure, Kind};
use crate::net::grpc::{Method, frame};
use crate::proto::{WatchCreateRequest, WatchRequest};
use crate::record::Recorder;
use crate::scan;
use crate::values::ValueKind;

/// The rows of the result.
pub(crate) const EVENT: usize = 0;
const PUT: usize = 1;
/// Pause before a stream that failed is opened again.
const REOPEN_PAUSE: Duration = Duration::from_millis(20);

/// Holds closed-loop writers back until their events are delivered. Else they would write as fast as puts are
/// acknowledged, and what is measured is how long a queue of events can get.
#[derive(Debug)]
pub(crate) struct Fanout {
    /// Puts whose events may be under way.
    window: Semaphore,
    watchers: u64,
    delivered: AtomicU64,
    acknowledged: AtomicU64,
}

impl Fanout {
    /// At most `window` puts are under way to `watchers` watchers.
    pub(crate) fn new(window: usize, watchers: usize) -> Self {
        Fanout {
            window: Semaphore::new(window),
            watchers: watchers as u64,
            delivered: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
        }
    }

    fn deliver(&self, events: u64) {
        if self.watchers > 0 && events > 0 {
            let before = self.delivered.fetch_add(events, Ordering::Relaxed);
            let puts = (before + events) / self.watchers - before / self.watchers;
            self.window.add_permits(puts as usize);
        }
    }

    /// Whether every watcher has the event of every put that was acknowledged.
    pub(crate) fn is_settled(&self) -> bool {
        let expected = self.acknowledged.load(Ordering::Relaxed) * self.watchers;
        self.delivered.load(Ordering::Relaxed) >= expected
    }
}

/// A client that writes what is watched.
pub(crate) struct WriterActor {
    pub(crate) client: Client,
    pub(crate) dealer: Rc<RefCell<KeyDealer>>,
    pub(crate) fanout: Arc<Fanout>,
    /// Whether latency counts from moments that were set beforehand; then nothing holds a writer back.
    pub(crate) open_loop: bool,
}

impl WriterActor {
    pub(crate) async fn operate(&mut self, mut at: u64) {
        let client = &mut self.client;
        if !self.open_loop {
            match tokio::time::timeout(client.load.timeout, self.fanout.window.acquire()).await {
                Ok(permit) => permit.expect("never closed").forget(),
                Err(_) => {
                    let failure = Failure::new(Kind::Timeout, "events did not come");
                    client.record(PUT, at, Err(&failure));
                    return;
                }
            }
            at = now();
        }
        let number = self.dealer.borrow_mut().deal(&mut client.rng);
        let key = client.key(number);
        let value = client.values.stamped(&mut client.rng, at);
        let result = client.put(key, value).await;
        if result.is_ok() {
            self.fanout.acknowledged.fetch_add(1, Ordering::Relaxed);
        } else if !self.open_loop {
            self.fanout.window.add_permits(1);
        }
        client.record(PUT, at, result.as_ref().map(|()| 1));
    }
}

/// Watchers that share a stream.
pub(crate) struct WatchStream {
    pub(crate) channel: Rc<Channel>,
    pub(crate) recorder: Rc<RefCell<Recorder>>,
    /// The row of events.
    pub(crate) label: usize,
    pub(crate) values: ValueKind,
    /// What each watches: key and range end.
    pub(crate) watches: Vec<(Bytes, Bytes)>,
    pub(crate) fanout: Option<Arc<Fanout>>,
}

impl WatchStream {
    /// Watches until it is dropped; a stream that fails is opened again where it was. Says on `ready` when all watchers
    /// are there, or why they are not.
    pub(crate) async fn run(self, ready: oneshot::Sender<Result<(), Failure>>) {
        // For each watcher the revision after the last it has seen; 0 for none.
        let mut next_revisions = vec![0; self.watches.len()];
        let mut ready = Some(ready);
        loop {
            let failure = match self.open(&next_revisions).await {
                Ok(stream) => self.follow(stream, &mut next_revisions, &mut ready).await,
                Err(failure) => failure,
            };
            if let Some(ready) = ready.take() {
                // The run is over before it began; nobody else is to be told.
                let _ = ready.send(Err(failure));
                return;
            }
            let at = now();
            self.recorder.borrow_mut().fail(self.label, at, at, &failure);
            tokio::time::sleep(REOPEN_PAUSE).await;
        }
    }

    async fn open(&self, next_revisions: &[i64]) -> Result<Stream, Failure> {
        let mut stream = self.channel.stream(Method::Watch).await?;
        let mut arena = BytesMut::new();
        for (index, ((key, range_end), start_revision)) in self.watches.iter().zip(next_revisions).enumerate() {
            let create = WatchCreateRequest {
                key: key.clone(),
                range_end: range_end.clone(),
                start_revision: *start_revision,
                watch_id: index as i64 + 1,
            };
            let request = WatchRequest {
                create_request: Some(create),
            };
            stream.send(frame(&request, &mut arena));
        }
        Ok(stream)
    }

    /// Takes events until the stream fails.
    async fn follow(
        &self,
        mut stream: Stream,
        next_revisions: &mut [i64],
        ready: &mut Option<oneshot::Sender<Result<(), Failure>>>,
    ) -> Failure {
        let mut missing = self.watches.len();
        loop {
            let message = match stream.next().await {
                Ok(message) => message,
                Err(failure) => return failure,
            };
            let summary = {
                let mut recorder = self.recorder.borrow_mut();
                let ended = now();
                scan::watch(&message, self.values, |stamp| match stamp {
                    Some(at) if at > 0 => recorder.succeed(self.label, at, ended, 1),
                    _ => recorder.count(self.label, ended, 1),
                })
            };
            let next = usize::try_from(summary.watch_id - 1)
                .ok()
                .and_then(|index| next_revisions.get_mut(index));
            let Some(next) = next else {
                return Failure::new(Kind::Protocol, format_args!("unknown watch id {}", summary.watch_id));
            };
            if summary.canceled {
                // Most likely its history is compacted; from now on it is, then.
                *next = 0;
                return Failure::new(
                    Kind::Status(1),
                    format_args!("watch cancelled: {}", summary.cancel_reason),
                );
            }
            if summary.created {
                *next = (*next).max(summary.revision + 1);
                missing = missing.saturating_sub(1);
                if missing == 0
                    && let Some(ready) = ready.take()
                {
                    let _ = ready.send(Ok(()));
                }
            }
            if summary.events > 0 {
                *next = summary.last_mod_revision + 1;
                if let Some(fanout) = &self.fanout {
                    fanout.deliver(summary.events);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_put_is_let_in_when_all_watchers_had_one() {
        let fanout = Fanout::new(1, 3);
        fanout.window.try_acquire().unwrap().forget();
        fanout.acknowledged.fetch_add(1, Ordering::Relaxed);
        fanout.deliver(2);
        assert!(fanout.window.try_acquire().is_err() && !fanout.is_settled());
        fanout.deliver(1);
        assert!(fanout.window.try_acquire().is_ok() && fanout.is_settled());
    }
}
