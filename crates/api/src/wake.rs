//! Waking whoever waits for many answers once, instead of once for each.
//!
//! A store answers everything that one commit decided together. Many of those answers go to the same connections; were
//! each connection woken at its first answer, it would send that one while the others are still on their way. So whoever
//! hands out answers does it within [`together`], and whoever gathers answers wakes itself through [`wake`].

use std::cell::{Cell, RefCell};
use std::task::Waker;

thread_local! {
    /// How many calls of [`together`] are under way on this thread.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    static WAITING: RefCell<Vec<Waker>> = const { RefCell::new(Vec::new()) };
}

/// Runs `answer`, and when it is done (or has panicked) wakes everybody whom it woke by [`wake`].
pub fn together<T>(answer: impl FnOnce() -> T) -> T {
    struct Woken;
    impl Drop for Woken {
        fn drop(&mut self) {
            let depth = DEPTH.get() - 1;
            DEPTH.set(depth);
            if depth == 0 {
                // Not while the list is borrowed: a waker may run anything.
                for waker in WAITING.take() {
                    waker.wake();
                }
            }
        }
    }
    DEPTH.set(DEPTH.get() + 1);
    let _woken = Woken;
    answer()
}

/// Wakes, now or at the end of the [`together`] that this thread is in. Does not look for doubles.
pub fn wake(waker: Waker) {
    if DEPTH.get() == 0 {
        waker.wake();
    } else {
        WAITING.with_borrow_mut(|waiting| waiting.push(waker));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn waking_waits_for_the_outermost_end() {
        let count = Arc::new(Count::default());
        let woken = || count.0.load(Ordering::Relaxed);
        let waker = Waker::from(count.clone());
        wake(waker.clone());
        assert_eq!(woken(), 1);
        together(|| {
            together(|| wake(waker.clone()));
            wake(waker.clone());
            assert_eq!(woken(), 1);
        });
        assert_eq!(woken(), 3);
        let panicked = std::panic::catch_unwind(|| {
            together(|| {
                wake(waker.clone());
                panic!("of the test's own making");
            })
        });
        assert!(panicked.is_err());
        assert_eq!(woken(), 4, "a panic holds nobody up");
        wake(waker);
        assert_eq!(woken(), 5, "and leaves nothing behind");
    }
}
