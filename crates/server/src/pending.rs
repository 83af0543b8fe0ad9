//! Proposals and reads that wait for their answer.

use std::sync::atomic::{AtomicU64, Ordering};

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
}

#[derive(Default)]
struct State {
    proposals: HashMap<RequestId, Waiter>,
    bytes: usize,
    reads: HashMap<RequestId, oneshot::Sender<Result<RaftIndex, Error>>>,
    /// Set once the node stops: nobody is let in any more.
    stopped: bool,
}

struct Waiter {
    reply: oneshot::Sender<Result<Outcome, Error>>,
    bytes: usize,
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

impl Pending {
    /// Ids begin at `first_id`: distinct for each member and each start of it.
    pub(crate) fn new(first_id: RequestId, count_max: usize, bytes_max: usize) -> Self {
        Pending {
            next_id: AtomicU64::new(first_id),
            count_max,
            bytes_max,
            state: Mutex::default(),
        }
    }

    pub(crate) fn next_id(&self) -> RequestId {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a place for a proposal.
    pub(crate) fn enter(&self, id: RequestId, bytes: usize) -> Result<Place, Error> {
        let (sender, reply) = oneshot::channel();
        let mut state = self.state.lock();
        if state.stopped {
            return Err(Error::Stopped);
        }
        if state.proposals.len() >= self.count_max || state.bytes + bytes > self.bytes_max {
            return Err(Error::TooManyRequests);
        }
        state.bytes += bytes;
        state.proposals.insert(id, Waiter { reply: sender, bytes });
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
        let mut waiting = Vec::with_capacity(replies.len());
        {
            let mut state = self.state.lock();
            for Reply { id, result } in replies {
                if let Some(waiter) = state.remove(id) {
                    waiting.push((waiter.reply, result));
                }
            }
        }
        // Waking is not done under the lock, where the woken would meet us.
        for (reply, result) in waiting {
            let _ = reply.send(result);
        }
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
            Some(waiter) => drop(waiter.reply.send(Err(error))),
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
