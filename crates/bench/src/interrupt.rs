//! Ctrl-C: ends the run at hand early, with its result; a second one ends the process.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;
use tokio::task::spawn_local;

/// The exit code of a process that SIGINT ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Whether the user has had enough.
#[derive(Debug, Default)]
pub(crate) struct Interrupt {
    pressed: Cell<bool>,
    told: Notify,
}

impl Interrupt {
    /// Listens from now on. Must be called within a `LocalSet`.
    pub(crate) fn listen() -> Rc<Self> {
        let interrupt = Rc::new(Interrupt::default());
        spawn_local({
            let interrupt = Rc::clone(&interrupt);
            async move {
                while tokio::signal::ctrl_c().await.is_ok() {
                    if interrupt.pressed.replace(true) {
                        std::process::exit(EXIT_INTERRUPTED);
                    }
                    interrupt.told.notify_waiters();
                }
            }
        });
        interrupt
    }

    pub(crate) fn is_pressed(&self) -> bool {
        self.pressed.get()
    }

    /// Does something unless, and until, the user has had enough.
    pub(crate) async fn or<T>(&self, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        let told = self.told.notified();
        if self.pressed.get() {
            return Err("interrupted".to_owned());
        }
        tokio::select! {
            result = work => result,
            () = told => Err("interrupted".to_owned()),
        }
    }
}
