//! Snapshots, as the node gives and takes them.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::handler::Refusal;

/// Most bytes of a snapshot's id.
pub(super) const ID_BYTES_MAX: usize = 256;
/// Most bytes of what is said about it.
pub(super) const META_BYTES_MAX: usize = 1 << 20;
/// Most bytes of a resume token: it holds a key, which may be as long as a request.
pub(super) const TOKEN_BYTES_MAX: usize = 4 << 20;
/// Chunks that wait between the connection and the thread of the source or the sink.
pub(super) const CHUNKS_WAITING_MAX: usize = 2;

/// Which snapshot it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotHeader {
    /// Tells it from every other snapshot of its sender. At most 256 bytes.
    pub(crate) id: Bytes,
    /// What the receiver needs to begin. At most 1 MiB.
    pub(crate) meta: Bytes,
}

/// Why a source or a sink failed.
pub(crate) type SnapshotFault = Box<dyn std::error::Error + Send + Sync>;

/// Gives the chunks of a snapshot. All calls come from one thread of its own, where it may block and where it is
/// dropped.
pub(crate) trait SnapshotSource: Send {
    /// Goes to where the receiver has got, as its sink said; to the beginning if `resume` is empty. Called before the
    /// first `next`, and again after each break.
    ///
    /// # Errors
    /// The transfer fails.
    fn seek(&mut self, resume: &[u8]) -> Result<(), SnapshotFault>;

    /// The next chunk, of 1 byte to 4 MiB; `None` at the end.
    ///
    /// # Errors
    /// The transfer fails.
    fn next(&mut self) -> Result<Option<Bytes>, SnapshotFault>;
}

/// Takes the chunks of a snapshot. All calls come from one thread of its own, where it may block and where it is
/// dropped if it is not finished.
pub(crate) trait SnapshotSink: Send {
    /// Where to go on after what was written so far. At most 64 KiB; empty for the beginning.
    fn resume_token(&self) -> Bytes;

    /// Takes the next chunk.
    ///
    /// # Errors
    /// The transfer fails; the sink is dropped.
    fn write(&mut self, chunk: Bytes) -> Result<(), SnapshotFault>;

    /// All chunks are there, and their checksums are right. The sender is told once this returned.
    ///
    /// # Errors
    /// The transfer fails.
    fn finish(self: Box<Self>, summary: &SnapshotSummary) -> Result<(), SnapshotFault>;
}

/// What was transferred, over all connections that it took. The sender counts repeated chunks, too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SnapshotSummary {
    /// Chunks.
    pub(crate) chunks: u64,
    /// Their bytes.
    pub(crate) bytes: u64,
    /// How often it went on after a break.
    pub(crate) resumes: u32,
}

/// Why a snapshot did not arrive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SnapshotError {
    /// It is for no peer.
    #[error("not a peer")]
    NotPeer,
    /// Another one to the same peer is under way.
    #[error("another snapshot to this peer is under way")]
    Busy,
    /// The peer does not take us, or not this snapshot.
    #[error(transparent)]
    Refused(Refusal),
    /// Our source failed.
    #[error("reading the snapshot: {0}")]
    Source(String),
    /// The peer's sink failed.
    #[error("the peer could not take the snapshot: {0}")]
    Sink(String),
    /// Nothing got through for too long.
    #[error("no progress for {after:?}: {last}")]
    Stalled {
        /// How long.
        after: Duration,
        /// What happened last.
        last: String,
    },
    /// The transport stopped, or the peer was taken from the list.
    #[error("stopped")]
    Stopped,
}

/// A snapshot under way. It runs by itself; dropping this cancels it.
#[derive(Debug)]
pub(crate) struct SnapshotTransfer {
    pub(super) outcome: oneshot::Receiver<Result<SnapshotSummary, SnapshotError>>,
    pub(super) task: Option<AbortHandle>,
}

impl SnapshotTransfer {
    /// One that failed before it began.
    pub(super) fn failed(error: SnapshotError) -> Self {
        let (sender, outcome) = oneshot::channel();
        // The receiver is right here.
        let _ = sender.send(Err(error));
        SnapshotTransfer { outcome, task: None }
    }
}

impl Future for SnapshotTransfer {
    type Output = Result<SnapshotSummary, SnapshotError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.outcome)
            .poll(context)
            // Nobody answers if the task was cut.
            .map(|outcome| outcome.unwrap_or(Err(SnapshotError::Stopped)))
    }
}

impl Drop for SnapshotTransfer {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}
