//! What a member has to do, and how its threads share it.
//!
//! There are three kinds of work: stepping Raft, writing the log, applying. Each is done by one thread at a time and in
//! the order in which it came, but by whichever thread is free. A thread that has done one piece goes on with what came of
//! it, so one thread takes a lone write all the way from its proposal to its answer, and nobody else is woken for it. Only
//! where more is to be done than the thread itself goes on with, another one is woken (the one that was at work last, whose
//! caches are warm): then a log write, a step and an apply run at the same time.
//!
//! The queues have no bounds of their own: whoever uses them says what bounds them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};

/// A kind of work. Of several that wait, the first one here is gone on with: the disk should be busy, and a step may give
/// it more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Writing the log.
    Write,
    /// Stepping Raft.
    Step,
    /// Applying.
    Apply,
}

const KINDS: [Kind; 3] = [Kind::Write, Kind::Step, Kind::Apply];

/// When a kind of work is to be done again though nothing more has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// Not before something comes.
    No,
    /// At once.
    Now,
    /// Then.
    At(Instant),
}

/// The work that waits. `I` are inputs of Raft, `W` writes to the log, `A` is what to apply.
pub(crate) struct Work<I, W, A> {
    state: Mutex<State<I, W, A>>,
}

/// Wakes a thread.
struct Parked(Thread);

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

struct State<I, W, A> {
    inputs: Vec<I>,
    /// Of the inputs that came with their bytes.
    input_bytes: usize,
    /// Whether there are inputs that are worth a step.
    is_step_due: bool,
    /// See [`Handed::let_proposals_wait`].
    proposals_wait: bool,
    writes: VecDeque<W>,
    applies: VecDeque<A>,
    /// By kind.
    again: [Again; 3],
    /// By kind: whether a thread is at it.
    is_busy: [bool; 3],
    /// Threads that wait. Whoever takes one out wakes it.
    idle: Vec<Waker>,
    closed: bool,
}

impl<I, W, A> State<I, W, A> {
    /// Whether there is such work and nobody is at it.
    fn is_open(&self, kind: Kind, now: Option<Instant>) -> bool {
        let has_some = match kind {
            Kind::Write => !self.writes.is_empty(),
            Kind::Step => self.is_step_due,
            Kind::Apply => !self.applies.is_empty(),
        };
        let is_due = match self.again[kind as usize] {
            Again::No => false,
            Again::Now => true,
            Again::At(when) => !self.closed && now.is_some_and(|now| now >= when),
        };
        !self.is_busy[kind as usize] && (has_some || is_due)
    }

    /// The earliest time at which there is something to do for which nobody is woken.
    fn next_due(&self) -> Option<Instant> {
        let due = |kind: &Kind| match self.again[*kind as usize] {
            Again::At(when) if !self.is_busy[*kind as usize] => Some(when),
            _ => None,
        };
        KINDS.iter().filter_map(due).min()
    }
}

/// What a thread takes at once. It belongs to the thread that made it.
pub(crate) struct Hands<I, W, A> {
    /// Wakes that thread.
    waker: Waker,
    pub(crate) inputs: Vec<I>,
    pub(crate) writes: VecDeque<W>,
    pub(crate) applies: VecDeque<A>,
}

impl<I, W, A> Default for Hands<I, W, A> {
    fn default() -> Self {
        Hands {
            waker: Arc::new(Parked(thread::current())).into(),
            inputs: Vec::new(),
            writes: VecDeque::new(),
            applies: VecDeque::new(),
        }
    }
}

impl<I, W, A> Work<I, W, A> {
    pub(crate) fn new() -> Self {
        Work {
            state: Mutex::new(State {
                inputs: Vec::new(),
                input_bytes: 0,
                is_step_due: false,
                proposals_wait: false,
                writes: VecDeque::new(),
                applies: VecDeque::new(),
                // What was left unfinished when the member stopped, if anything, is finished.
                again: [Again::No, Again::No, Again::Now],
                is_busy: [false; 3],
                idle: Vec::new(),
                closed: false,
            }),
        }
    }

    /// Changes what waits, and wakes a thread if there is work of this kind then and nobody at it. Within
    /// [`api::wake::together`] that happens at its end. Does nothing once it is closed.
    fn add(&self, kind: Kind, change: impl FnOnce(&mut State<I, W, A>)) {
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        let was_open = state.is_open(kind, None);
        change(&mut state);
        // Where it was open before, somebody has been woken for it or is about to look.
        if !was_open
            && state.is_open(kind, None)
            && let Some(idle) = state.idle.pop()
        {
            drop(state);
            api::wake::wake(idle);
        }
    }

    /// Adds an input. As all that adds, it is dropped once this is closed.
    pub(crate) fn input(&self, input: I) {
        self.inputs([(input, 0)]);
    }

    /// Adds inputs, each with the bytes that it keeps in memory.
    pub(crate) fn inputs(&self, inputs: impl IntoIterator<Item = (I, usize)>) {
        self.add(Kind::Step, |state| {
            for (input, bytes) in inputs {
                state.inputs.push(input);
                state.input_bytes += bytes;
                state.is_step_due = true;
            }
        });
    }

    /// Adds a proposal: an input that waits for another one as long as the replica would only let it wait.
    pub(crate) fn proposal(&self, input: I) {
        self.add(Kind::Step, |state| {
            state.inputs.push(input);
            state.is_step_due |= !state.proposals_wait;
        });
    }

    /// Adds an input that is not worth a step by itself.
    pub(crate) fn input_quietly(&self, input: I) {
        self.add(Kind::Step, |state| state.inputs.push(input));
    }

    /// Adds a write to the log.
    pub(crate) fn write(&self, write: W) {
        self.add(Kind::Write, |state| state.writes.push_back(write));
    }

    /// Hands on, from a thread that asks for its next work at once: nobody else is woken here.
    pub(crate) fn hand_on(&self, change: impl FnOnce(&mut Handed<'_, I, W, A>)) {
        let state = self.state.lock();
        if !state.closed {
            change(&mut Handed(state));
        }
    }

    /// Waits for work, which is in the caller's hands then; `None` once this is closed and nothing is left. `done` is what
    /// the caller has just done, and when that is to be done again: until it asks here, nobody else does any of that kind.
    pub(crate) fn next(&self, done: Option<(Kind, Again)>, hands: &mut Hands<I, W, A>) -> Option<Kind> {
        let mut state = self.state.lock();
        if let Some((kind, again)) = done {
            state.is_busy[kind as usize] = false;
            state.again[kind as usize] = again;
        }
        loop {
            let due = state.next_due();
            let now = due.map(|_| Instant::now());
            let mut open = KINDS.into_iter().filter(|kind| state.is_open(*kind, now));
            if let Some(kind) = open.next() {
                let others = open.count().min(state.idle.len());
                let left = state.idle.len() - others;
                let others = state.idle.split_off(left);
                state.take(kind, hands);
                drop(state);
                others.into_iter().for_each(Waker::wake);
                return Some(kind);
            }
            if state.closed {
                return None;
            }
            state.idle.push(hands.waker.clone());
            loop {
                let rest = due.map(|due| due.saturating_duration_since(Instant::now()));
                MutexGuard::unlocked(&mut state, || match rest {
                    Some(rest) => thread::park_timeout(rest),
                    None => thread::park(),
                });
                let place = state.idle.iter().position(|idle| idle.will_wake(&hands.waker));
                // Without a place it was woken.
                let Some(place) = place else { break };
                if due.is_some_and(|due| due <= Instant::now()) {
                    state.idle.remove(place);
                    break;
                }
            }
        }
    }

    /// How many inputs wait, and their bytes, as far as they came with them.
    pub(crate) fn inputs_waiting(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.inputs.len(), state.input_bytes)
    }

    /// Takes nothing more; threads get what is there and then the end.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let idle = std::mem::take(&mut state.idle);
        drop(state);
        idle.into_iter().for_each(Waker::wake);
    }
}

impl<I, W, A> State<I, W, A> {
    /// All of a kind that is there.
    fn take(&mut self, kind: Kind, hands: &mut Hands<I, W, A>) {
        self.is_busy[kind as usize] = true;
        self.again[kind as usize] = Again::No;
        match kind {
            Kind::Write => hands.writes.append(&mut self.writes),
            Kind::Apply => hands.applies.append(&mut self.applies),
            Kind::Step => {
                hands.inputs.append(&mut self.inputs);
                self.input_bytes = 0;
                self.is_step_due = false;
            }
        }
    }
}

/// See [`Work::hand_on`].
pub(crate) struct Handed<'a, I, W, A>(MutexGuard<'a, State<I, W, A>>);

impl<I, W, A> Handed<'_, I, W, A> {
    pub(crate) fn input(&mut self, input: I) {
        self.0.inputs.push(input);
        self.0.is_step_due = true;
    }

    pub(crate) fn write(&mut self, write: W) {
        self.0.writes.push_back(write);
    }

    pub(crate) fn apply(&mut self, apply: A) {
        self.0.applies.push_back(apply);
    }

    /// Says, at the end of a step, whether the replica can do nothing with more proposals before something else happens
    /// that comes as an input of its own.
    pub(crate) fn let_proposals_wait(&mut self, wait: bool) {
        let state = &mut *self.0;
        state.proposals_wait = wait;
        // Those that came during the step.
        state.is_step_due |= !wait && !state.inputs.is_empty();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    type Numbers = Work<usize, usize, usize>;

    /// Takes the first apply, which is due without anything to do.
    fn begun() -> (Numbers, Hands<usize, usize, usize>) {
        let (work, mut hands) = (Numbers::new(), Hands::default());
        assert_eq!(work.next(None, &mut hands), Some(Kind::Apply));
        (work, hands)
    }

    #[test]
    fn one_thread_goes_on_with_what_came_of_its_work() {
        let (work, mut hands) = begun();
        work.input(1);
        assert_eq!(work.next(Some((Kind::Apply, Again::No)), &mut hands), Some(Kind::Step));
        work.hand_on(|work| {
            work.write(2);
            work.apply(3);
        });
        assert_eq!(work.next(Some((Kind::Step, Again::No)), &mut hands), Some(Kind::Write));
        work.hand_on(|work| work.input(4));
        // As long as nobody says that the write is done there is none.
        work.write(5);
        assert_eq!(work.next(None, &mut hands), Some(Kind::Step));
        assert_eq!(work.next(None, &mut hands), Some(Kind::Apply));
        assert_eq!(work.next(Some((Kind::Write, Again::No)), &mut hands), Some(Kind::Write));
        assert_eq!(
            work.next(Some((Kind::Write, Again::Now)), &mut hands),
            Some(Kind::Write)
        );
        assert_eq!(
            (hands.inputs, hands.writes, hands.applies),
            (vec![1, 4], [2, 5].into(), [3].into())
        );
    }

    #[test]
    fn proposals_wait_for_another_input() {
        let (work, mut hands) = begun();
        work.hand_on(|work| work.let_proposals_wait(true));
        work.proposal(1);
        work.input_quietly(2);
        work.write(3);
        assert_eq!(
            work.next(None, &mut hands),
            Some(Kind::Write),
            "there is no step to take"
        );
        work.input(4);
        assert_eq!(work.next(None, &mut hands), Some(Kind::Step));
        assert_eq!(hands.inputs, [1, 2, 4]);
        // One that comes while a step is taken that ends the waiting.
        work.proposal(5);
        work.hand_on(|work| work.let_proposals_wait(false));
        assert_eq!(work.next(Some((Kind::Step, Again::No)), &mut hands), Some(Kind::Step));
        work.proposal(6);
        assert_eq!(work.next(Some((Kind::Step, Again::No)), &mut hands), Some(Kind::Step));
        assert_eq!(hands.inputs, [1, 2, 4, 5, 6]);
    }

    #[test]
    fn what_is_due_later_is_done_then() {
        let (work, mut hands) = begun();
        let begun = Instant::now();
        let later = begun + Duration::from_millis(20);
        assert_eq!(
            work.next(Some((Kind::Apply, Again::At(later))), &mut hands),
            Some(Kind::Apply)
        );
        assert!(begun.elapsed() >= Duration::from_millis(20));
        work.close();
        assert_eq!(
            work.next(
                Some((Kind::Apply, Again::At(later + Duration::from_secs(60)))),
                &mut hands
            ),
            None
        );
    }

    /// Inputs from many threads become writes, those become inputs again, those are applied: all of them, each kind by one
    /// thread at a time and in order.
    #[test]
    fn nothing_is_lost_between_threads() {
        const SENDERS: usize = 4;
        const EACH: usize = 20_000;
        const TICK: usize = usize::MAX;
        let work = Numbers::new();
        let applied = AtomicUsize::new(0);
        let at_it: [AtomicBool; 3] = Default::default();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let (mut hands, mut done) = (Hands::default(), None);
                    while let Some(kind) = work.next(done, &mut hands) {
                        let at_it = &at_it[kind as usize];
                        assert!(!at_it.swap(true, Ordering::AcqRel), "two threads at {kind:?}");
                        match kind {
                            Kind::Step => work.hand_on(|work| {
                                let held = hands.inputs.len() % 2 == 0;
                                for input in hands.inputs.drain(..).filter(|input| *input != TICK) {
                                    // What was written comes back odd.
                                    match input % 2 {
                                        0 => work.write(input),
                                        _ => work.apply(input),
                                    }
                                }
                                work.let_proposals_wait(held);
                            }),
                            Kind::Write => work.hand_on(|work| {
                                hands.writes.drain(..).for_each(|write| work.input(write + 1));
                            }),
                            Kind::Apply => {
                                applied.fetch_add(hands.applies.drain(..).count(), Ordering::AcqRel);
                            }
                        }
                        at_it.store(false, Ordering::Release);
                        done = Some((kind, Again::No));
                    }
                });
            }
            for sender in 0..SENDERS {
                let work = &work;
                scope.spawn(move || {
                    for number in 0..EACH {
                        match (sender + number) % 3 {
                            0 => api::wake::together(|| work.input(2 * number)),
                            1 => work.input(2 * number),
                            _ => work.proposal(2 * number),
                        }
                    }
                });
            }
            let begun = Instant::now();
            while applied.load(Ordering::Acquire) < SENDERS * EACH {
                assert!(begun.elapsed() < Duration::from_secs(60), "something is lost");
                std::thread::sleep(Duration::from_millis(1));
                work.input(TICK);
            }
            work.close();
        });
    }
}
