//! How threads hand work to each other: one lock for a push, one for taking all that waits.

use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// A queue whose reader takes everything at once. It has no bound of its own: each use says what bounds it.
pub(crate) struct Inbox<T> {
    state: Mutex<State<T>>,
    bell: Arc<Bell>,
    /// Rings the bell.
    waker: Waker,
}

/// What the reader waits at.
#[derive(Default)]
struct Bell(Condvar);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

struct State<T> {
    items: Vec<T>,
    /// Of the items that were pushed with their bytes.
    bytes: usize,
    reader_waits: bool,
    closed: bool,
}

impl<T> Inbox<T> {
    pub(crate) fn new() -> Self {
        let state = State {
            items: Vec::new(),
            bytes: 0,
            reader_waits: false,
            closed: false,
        };
        let bell = Arc::new(Bell::default());
        Inbox {
            state: Mutex::new(state),
            waker: bell.clone().into(),
            bell,
        }
    }

    /// Adds an item and wakes the reader, which within [`api::wake::together`] happens at its end. Dropped if the inbox is
    /// closed.
    pub(crate) fn push(&self, item: T) {
        self.push_all([(item, 0)]);
    }

    /// Adds items, each with the bytes that it keeps in memory, and wakes the reader. Dropped if the inbox is closed.
    pub(crate) fn push_all(&self, items: impl IntoIterator<Item = (T, usize)>) {
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        for (item, bytes) in items {
            state.items.push(item);
            state.bytes += bytes;
        }
        if state.items.is_empty() {
            return;
        }
        if std::mem::take(&mut state.reader_waits) {
            drop(state);
            api::wake::wake(self.waker.clone());
        }
    }

    /// Adds an item that the reader may see whenever it wakes next.
    pub(crate) fn push_quietly(&self, item: T) {
        let mut state = self.state.lock();
        if !state.closed {
            state.items.push(item);
        }
    }

    /// Waits for items and moves them all to the end of `out`; `false` once the inbox is closed and empty.
    pub(crate) fn wait(&self, out: &mut Vec<T>) -> bool {
        let mut state = self.state.lock();
        while state.items.is_empty() {
            if state.closed {
                return false;
            }
            state.reader_waits = true;
            self.bell.0.wait(&mut state);
        }
        state.reader_waits = false;
        state.bytes = 0;
        out.append(&mut state.items);
        true
    }

    /// As [`Inbox::wait`], but waits no longer than this.
    pub(crate) fn wait_for(&self, timeout: Duration, out: &mut Vec<T>) -> bool {
        let mut state = self.state.lock();
        if state.items.is_empty() && !state.closed {
            state.reader_waits = true;
            self.bell.0.wait_for(&mut state, timeout);
        }
        state.reader_waits = false;
        state.bytes = 0;
        out.append(&mut state.items);
        !(state.closed && out.is_empty())
    }

    /// Moves what is there to the end of `out` without waiting; `false` once the inbox is closed and empty.
    pub(crate) fn take(&self, out: &mut Vec<T>) -> bool {
        let mut state = self.state.lock();
        state.bytes = 0;
        out.append(&mut state.items);
        !(state.closed && out.is_empty())
    }

    /// How many items wait, and their bytes, as far as they were pushed with them.
    pub(crate) fn waiting(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.items.len(), state.bytes)
    }

    /// Takes no more items; the reader gets what is there and then the end.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.bell.0.notify_all();
    }
}
