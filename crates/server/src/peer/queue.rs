//! Messages that wait to be sent to one peer.

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// A queue between a thread that must not block and the task that writes. Bounded in bytes and number; what is being
/// written counts until it is written.
pub(super) struct SendQueue {
    state: Mutex<State>,
    filled: Notify,
    bytes_max: usize,
    messages_max: usize,
}

#[derive(Default)]
struct State {
    /// Oldest first.
    waiting: std::collections::VecDeque<Bytes>,
    /// Of those that wait and those that are being written.
    bytes: usize,
    messages: usize,
}

/// How much is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) messages: usize,
    pub(super) bytes: usize,
}

impl SendQueue {
    pub(super) fn new(bytes_max: usize, messages_max: usize) -> Self {
        SendQueue {
            state: Mutex::new(State::default()),
            filled: Notify::new(),
            bytes_max,
            messages_max,
        }
    }

    /// Adds all messages or, if they do not fit, none.
    pub(super) fn push(&self, messages: Vec<Bytes>) -> bool {
        let bytes: usize = messages.iter().map(Bytes::len).sum();
        let mut state = self.state.lock();
        if state.bytes + bytes > self.bytes_max || state.messages + messages.len() > self.messages_max {
            return false;
        }
        state.bytes += bytes;
        state.messages += messages.len();
        state.waiting.extend(messages);
        drop(state);
        self.filled.notify_one();
        true
    }

    /// Moves messages to the end of `out` until they are `bytes` or more, or none are left.
    pub(super) fn take(&self, bytes: usize, out: &mut Vec<Bytes>) {
        let mut state = self.state.lock();
        let mut taken = 0;
        while taken < bytes
            && let Some(message) = state.waiting.pop_front()
        {
            taken += message.len();
            out.push(message);
        }
    }

    /// Makes room: so much of what was taken is written.
    pub(super) fn written(&self, amount: Amount) {
        let mut state = self.state.lock();
        state.bytes -= amount.bytes;
        state.messages -= amount.messages;
    }

    /// Waits until something may be there.
    pub(super) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Drops all that waits, and all that was taken and not written.
    pub(super) fn clear(&self) -> Amount {
        let mut state = self.state.lock();
        state.waiting.clear();
        Amount {
            messages: std::mem::take(&mut state.messages),
            bytes: std::mem::take(&mut state.bytes),
        }
    }

    /// How much waits or is being written.
    pub(super) fn amount(&self) -> Amount {
        let state = self.state.lock();
        Amount {
            messages: state.messages,
            bytes: state.bytes,
        }
    }
}
