//! The durable Raft log: entries and hard state, one write and one fdatasync a batch.

use raft::eraftpb::{Entry, HardState};

/// What the log could not do. Every one of them stops the node (design invariant 8).
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// Reading, writing or syncing failed.
    #[error("the Raft log failed to {action}: {cause}")]
    Io {
        /// What was being done, as a verb phrase.
        action: &'static str,
        /// The cause in the words of the layer below.
        cause: String,
    },
    /// Damage that a torn write at the tail does not explain.
    #[error("the Raft log is damaged at {place}: {cause}; restore this member from a snapshot or replace it")]
    Corrupt {
        /// File and offset, or index.
        place: String,
        /// What is wrong.
        cause: String,
    },
    /// The entries asked for were trimmed already.
    #[error("the Raft log begins at index {first}, index {asked} was trimmed")]
    Trimmed {
        /// The first index that is still there.
        first: u64,
        /// The index asked for.
        asked: u64,
    },
    /// The entries asked for were never written.
    #[error("the Raft log ends at index {last}, index {asked} is not there")]
    Missing {
        /// The last index.
        last: u64,
        /// The index asked for.
        asked: u64,
    },
}

/// What one append cost, for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AppendStats {
    /// Bytes written.
    pub bytes: usize,
    /// fsyncs waited for.
    pub fsyncs: usize,
    /// How long the write and its fsync took, in nanoseconds.
    pub duration_ns: u64,
}

/// A durable Raft log of one group. One writer at a time, any number of readers.
pub trait RaftLog: Send + Sync + 'static {
    /// Appends `entries` (contiguous; a first index at or below the last one replaces the tail from there) and
    /// replaces the hard state if given, in one write; returns once both are on disk when `sync`, together with
    /// everything before. Neither is half there after a crash.
    ///
    /// Without `sync`, entries are written but may be lost when the machine fails, and a hard state alone may wait in
    /// memory for the next write, so that even a killed process loses it. So after a restart the commit index may lie
    /// behind the applied index of the engine, which is then the better one.
    ///
    /// # Errors
    /// [`LogError::Trimmed`] or [`LogError::Missing`] when `entries` do not follow the log, which is then unchanged. Any
    /// other error is final.
    ///
    /// # Panics
    /// When `entries` do not follow each other.
    fn append(&self, entries: &[Entry], hard_state: Option<&HardState>, sync: bool) -> Result<AppendStats, LogError>;

    /// The newest hard state; the default one if none was ever written.
    fn hard_state(&self) -> Result<HardState, LogError>;

    /// The entries in `low..high`, fewer if they exceed `bytes_max` together (but always at least one).
    ///
    /// # Errors
    /// [`LogError::Trimmed`] or [`LogError::Missing`] when a bound is outside the log.
    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, LogError>;

    /// The term of the entry at `index`; also known for the index right before the first one.
    fn term(&self, index: u64) -> Result<u64, LogError>;

    /// The first index that is there, or would be: 1 for a log that was never trimmed.
    fn first_index(&self) -> u64;

    /// The last index; `first_index() - 1` when empty.
    fn last_index(&self) -> u64;

    /// Forgets the entries below `index` (which must be at most `last_index() + 1`) and remembers the term of the
    /// entry right before it. Cheap; whole files are recycled. A no-op when `index <= first_index()`.
    /// Becomes durable with the next synced append.
    fn trim(&self, index: u64) -> Result<(), LogError>;

    /// Forgets everything and begins again right after `index` of `term`, as after a received snapshot. Durable on
    /// return, together with `hard_state`.
    fn reset(&self, index: u64, term: u64, hard_state: &HardState) -> Result<(), LogError>;

    /// Bytes that the log occupies on disk.
    fn disk_bytes(&self) -> u64;
}
