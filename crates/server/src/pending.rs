//! Proposals and reads that wait for their answer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use api::{Error, RaftIndex, RequestId};
use hashbrown::HashMap;
use mvcc::{Outcome, Reply};
use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Who waits for what. Bounded by count and by the bytes of the proposals.
pub(crate) struct Pending {
    next_id: AtomicU64,
    count_max: usize,
    bytes_max: usize,
    state: Mutex<State>,
    /// Where answers are gathered: kept for its memory, which as much would be taken anew for every commit.
    answers: Mutex<Vec<(oneshot::Sender<Answer>, Answer)>>,
}

/// More places than this are not kept.
const ANSWERS_KEPT_MAX: usize = 4096;

#[derive(Default)]
struct State {
    proposals: HashMap<RequestId, Waiter>,
    bytes: usize,
    reads: HashMap<RequestId, oneshot::Sender<Result<RaftIndex, Error>>>,
    /// Set once the node stops: nobody is let in any more.
    stopped: bool,
}

struct Waiter {
    /// `None` once its client was told that it takes too long.
    reply: Option<oneshot::Sender<Result<Outcome, Error>>>,
    bytes: usize,
    /// When its client is told so.
    due: Instant,
}

/// A proposal's place among the waiting. It is given up when the proposal is applied or refused, and not before: an
/// operation whose client went away is still on its way, and still counts.
pub(crate) struct Place {
    reply: oneshot::Receiver<Result<Outcome, Error>>,
}

impl Place {
    pub(crate) async fn outcome(&mut self) -> Result<Outcome, Error> {
        (&mut self.reply).await.unwrap_or(Err(Error::Stopped))
    }
}

impl State {
    fn remove(&mut self, id: RequestId) -> Option<Waiter> {
        let waiter = self.proposals.remove(&id)?;
        self.bytes -= waiter.bytes;
        Some(waiter)
    }
}

type Answer = Result<Outcome, Error>;

/// Sends answers, and wakes each connection that they are for once.
fn send_together(answers: impl IntoIterator<Item = (oneshot::Sender<Answer>, Answer)>) {
    api::wake::together(|| {
        for (reply, result) in answers {
            // Whoever does not wait any more does not want it.
            let _ = reply.send(result);
        }
    });
}

impl Pending {
    /// Ids begin at `first_id`: distinct for each member and each start of it.
    pub(crate) fn new(first_id: RequestId, count_max: usize, bytes_max: usize) -> Self {
        Pending {
            next_id: AtomicU64::new(first_id),
            count_max,
            bytes_max,
            state: Mutex::default(),
            answers: Mutex::default(),
        }
    }

    pub(crate) fn next_id(&self) -> RequestId {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a place for a proposal, whose client waits until `due`: see [`Pending::expire`].
    pub(crate) fn enter(&self, id: RequestId, bytes: usize, due: Instant) -> Result<Place, Error> {
        let (sender, reply) = oneshot::channel();
        let mut state = self.state.lock();
        if state.stopped {
            return Err(Error::Stopped);
        }
        if state.proposals.len() >= self.count_max || state.bytes + bytes > self.bytes_max {
            return Err(Error::TooManyRequests);
        }
        state.bytes += bytes;
        let waiter = Waiter {
            reply: Some(sender),
            bytes,
            due,
        };
        state.proposals.insert(id, waiter);
        drop(state);
        Ok(Place { reply })
    }

    /// Takes a place for a read.
    pub(crate) fn enter_read(&self, id: RequestId) -> Result<oneshot::Receiver<Result<RaftIndex, Error>>, Error> {
        let (sender, reply) = oneshot::channel();
        let mut state = self.state.lock();
        if state.stopped {
            return Err(Error::Stopped);
        }
        // Reads whose clients are gone leave nothing behind but their place.
        if state.reads.len() >= self.count_max {
            state.reads.retain(|_, reply| !reply.is_closed());
            if state.reads.len() >= self.count_max {
                return Err(Error::TooManyRequests);
            }
        }
        state.reads.insert(id, sender);
        Ok(reply)
    }

    /// Answers proposals that were applied. Those of other members, or from before a restart, have no place here.
    pub(crate) fn answer_all(&self, replies: Vec<Reply>) {
        let mut waiting = std::mem::take(&mut *self.answers.lock());
        {
            let mut state = self.state.lock();
            for Reply { id, result } in replies {
                if let Some(waiter) = state.remove(id)
                    && let Some(reply) = waiter.reply
                {
                    waiting.push((reply, result));
                }
            }
        }
        // Waking is not done under the lock, where the woken would meet us.
        send_together(waiting.drain(..));
        if waiting.capacity() <= ANSWERS_KEPT_MAX {
            *self.answers.lock() = waiting;
        }
    }

    /// Tells clients that have waited until `now` that it takes too long. Their proposals keep their places. One look at
    /// each proposal in place; a timer for each of them would cost more than this whenever there are few enough to be
    /// in time, that is, nearly always.
    pub(crate) fn expire(&self, now: Instant, error: Error) -> usize {
        let mut expired = Vec::new();
        for waiter in self.state.lock().proposals.values_mut() {
            if waiter.due <= now
                && let Some(reply) = waiter.reply.take()
            {
                expired.push((reply, Err(error)));
            }
        }
        let count = expired.len();
        send_together(expired);
        count
    }

    pub(crate) fn answer_read(&self, id: RequestId, result: Result<RaftIndex, Error>) {
        let reply = self.state.lock().reads.remove(&id);
        if let Some(reply) = reply {
            let _ = reply.send(result);
        }
    }

    /// Refuses a proposal or read.
    pub(crate) fn refuse(&self, id: RequestId, error: Error) {
        let waiter = self.state.lock().remove(id);
        match waiter {
            Some(Waiter { reply: Some(reply), .. }) => drop(reply.send(Err(error))),
            Some(_) => {}
            None => self.answer_read(id, Err(error)),
        }
    }

    /// Lets nobody in any more.
    pub(crate) fn stop(&self) {
        self.state.lock().stopped = true;
    }

    /// Proposals that wait, and their bytes.
    pub(crate) fn len(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.proposals.len(), state.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn clients_are_told_in_time_and_places_are_kept() {
        let pending = Pending::new(1, 2, 100);
        let now = Instant::now();
        let later = now + Duration::from_secs(7);
        let mut early = pending.enter(1, 10, now).expect("room");
        let mut late = pending.enter(2, 10, later).expect("room");
        assert_eq!(pending.expire(now, Error::Timeout), 1);
        assert_eq!(early.reply.try_recv(), Ok(Err(Error::Timeout)));
        assert!(late.reply.try_recv().is_err(), "its time has not come");
        assert_eq!(pending.len(), (2, 20), "it is still on its way");
        assert_eq!(pending.enter(3, 10, later).map(drop), Err(Error::TooManyRequests));
        assert_eq!(pending.expire(now, Error::Timeout), 0, "it was told");
        let reply = |id| Reply {
            id,
            result: Err(Error::KeyNotFound),
        };
        pending.answer_all(vec![reply(1), reply(2)]);
        assert_eq!(late.reply.try_recv(), Ok(Err(Error::KeyNotFound)));
        assert_eq!(pending.len(), (0, 0));
    }
}
