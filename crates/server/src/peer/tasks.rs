//! The transport's tasks: started on its runtime, told to stop, and awaited.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};

/// All tasks.
pub(super) struct Tasks {
    runtime: Handle,
    stop: watch::Sender<bool>,
    /// `None` once all have been told to stop and are being awaited.
    running: Mutex<Option<JoinSet<()>>>,
    /// Each thread holds a clone: when the last one is gone, so are the threads.
    threads: Mutex<Option<mpsc::Sender<Infallible>>>,
    threads_ended: Mutex<Option<mpsc::Receiver<Infallible>>>,
}

impl Tasks {
    pub(super) fn new(runtime: Handle) -> Self {
        let (threads, threads_ended) = mpsc::channel(1);
        Tasks {
            runtime,
            threads: Mutex::new(Some(threads)),
            threads_ended: Mutex::new(Some(threads_ended)),
            stop: watch::Sender::new(false),
            running: Mutex::new(Some(JoinSet::new())),
        }
    }

    /// Starts a task, from any thread; `None` if it is too late for that.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> Option<AbortHandle> {
        let mut running = self.running.lock();
        let running = running.as_mut()?;
        // Ended tasks are collected as we go.
        while let Some(ended) = running.try_join_next() {
            report(ended);
        }
        Some(running.spawn_on(task, &self.runtime))
    }

    /// Starts a thread, for work that blocks. It is awaited like the tasks, but cannot be cut: it must end by itself once
    /// the tasks that it works for have ended.
    ///
    /// # Errors
    /// The system has no thread left, or it is too late.
    pub(super) fn spawn_thread(&self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let token = self.threads.lock().clone();
        let token = token.ok_or_else(|| io::Error::other("the transport stopped"))?;
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _token = token;
            work();
        })?;
        Ok(())
    }

    /// Becomes true when all are to stop.
    pub(super) fn stop_signal(&self) -> Stop {
        Stop(self.stop.subscribe())
    }

    /// Tells all tasks to stop.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Tells all tasks to stop, and waits; `false` if some had to be cut.
    pub(super) async fn shutdown(&self, timeout: Duration) -> bool {
        self.stop();
        let Some(mut running) = self.running.lock().take() else {
            return true;
        };
        let ended = tokio::time::timeout(timeout, async {
            while let Some(ended) = running.join_next().await {
                report(ended);
            }
        });
        let all_ended = ended.await.is_ok();
        running.shutdown().await;
        all_ended
    }

    /// Waits for all threads, and starts no more; `false` if some go on.
    pub(super) async fn join_threads(&self, timeout: Duration) -> bool {
        self.threads.lock().take();
        let Some(mut ended) = self.threads_ended.lock().take() else {
            return true;
        };
        tokio::time::timeout(timeout, ended.recv()).await.is_ok()
    }
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a task of the peer transport failed");
    }
}

/// Says when to stop.
#[derive(Clone)]
pub(super) struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Waits until it is time to stop.
    pub(super) async fn wait(&mut self) {
        // No sender is left only if the transport is gone, which is a reason to stop as well.
        let _ = self.0.wait_for(|stop| *stop).await;
    }

    /// Whether it is.
    pub(super) fn is_set(&self) -> bool {
        *self.0.borrow()
    }
}
