//! The accepted connections: how many there are, and which replaces which.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::handler::{Introduction, Refusal, RefuseReason};

/// Most connections of callers without an id. They must not take the room of members.
const JOINERS_MAX: usize = 64;

/// All accepted connections.
pub(super) struct Incoming {
    state: Arc<Mutex<State>>,
    connections_max: usize,
}

#[derive(Default)]
struct State {
    next_id: u64,
    connections: HashMap<u64, Entry>,
}

struct Entry {
    who: Introduction,
    sequence: u64,
    close: watch::Sender<Option<Refusal>>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// An accepted connection's place among them. Dropping it frees the place.
pub(super) struct Registered {
    id: u64,
    state: Arc<Mutex<State>>,
    close: watch::Receiver<Option<Refusal>>,
    /// Held by the connection that is being served: one that takes another's place waits until that one has ended, so
    /// that nothing is received twice at once.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
}

impl Incoming {
    pub(super) fn new(connections_max: usize) -> Self {
        Incoming {
            state: Arc::default(),
            connections_max,
        }
    }

    /// Takes a connection in. One of the same member for the same purpose is told to end, unless it is the newer one.
    /// Callers without an id do not replace each other.
    pub(super) fn register(&self, who: &Introduction, sequence: u64) -> Result<Registered, Refusal> {
        let mut state = self.state.lock();
        let mut turn = None;
        if who.from != 0 {
            for entry in state.connections.values() {
                if entry.who.from != who.from || entry.who.purpose != who.purpose {
                    continue;
                }
                if entry.who.incarnation == who.incarnation && entry.sequence > sequence {
                    return Err(Refusal::new(RefuseReason::Superseded, "there is a newer connection"));
                }
                let refusal = Refusal::new(RefuseReason::Superseded, "there is a newer connection");
                entry.close.send_replace(Some(refusal));
                turn = Some(entry.turn.clone());
            }
        }
        let joiners = || state.connections.values().filter(|entry| entry.who.from == 0).count();
        if state.connections.len() >= self.connections_max || (who.from == 0 && joiners() >= JOINERS_MAX) {
            return Err(Refusal::new(RefuseReason::Busy, "too many connections"));
        }
        let turn = turn.unwrap_or_default();
        let id = state.next_id;
        state.next_id += 1;
        let (close, closed) = watch::channel(None);
        let entry = Entry {
            who: who.clone(),
            sequence,
            close,
            turn: turn.clone(),
        };
        state.connections.insert(id, entry);
        Ok(Registered {
            id,
            state: self.state.clone(),
            close: closed,
            turn,
        })
    }

    /// Asks again whether each connection may stay.
    pub(super) fn review(&self, admit: impl Fn(&Introduction) -> Result<(), Refusal>) {
        // The node is asked without the lock: it may take locks of its own.
        let all: Vec<_> = {
            let state = self.state.lock();
            let each = |(id, entry): (&u64, &Entry)| (*id, entry.who.clone());
            state.connections.iter().map(each).collect()
        };
        for (id, who) in all {
            if let Err(refusal) = admit(&who)
                && let Some(entry) = self.state.lock().connections.get(&id)
            {
                entry.close.send_replace(Some(refusal));
            }
        }
    }

    /// How many there are for a purpose.
    #[cfg(test)]
    pub(super) fn count(&self, purpose: super::Purpose) -> usize {
        let state = self.state.lock();
        state
            .connections
            .values()
            .filter(|entry| entry.who.purpose == purpose)
            .count()
    }
}

impl Registered {
    /// Waits until the connection is to end.
    pub(super) async fn closed(&mut self) -> Refusal {
        match self.close.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(refusal)) => refusal.clone(),
            // The entry is removed only by our own drop.
            _ => Refusal::new(RefuseReason::Stopping, "shutting down"),
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.state.lock().connections.remove(&self.id);
    }
}
