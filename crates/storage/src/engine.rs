//! The key-value engine under the state machine: column families, consistent views, one atomic batch.
//!
//! The trait is small on purpose. What an adapter must promise:
//!
//! - a batch becomes visible whole or not at all, and becomes durable whole or not at all, across all families;
//! - batches become durable in the order in which they were written: after a crash the engine holds a prefix of them;
//! - a [`View`] never changes once taken;
//! - a failed write or flush leaves the engine failed: every later write answers an error (see [`EngineError`]).
//!
//! There is one writer at a time (the apply thread) and any number of readers.

use bytes::Bytes;

/// A column family, by its position in the list that the engine was opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Family(pub usize);

/// How a family is read, so that an adapter can tune itself for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Point lookups and short scans over keys that come in any order: worth bloom filters.
    Point,
    /// Keys are mostly written in ascending order and read in long scans or at exact positions known to exist.
    Sequential,
}

/// Name and shape of one column family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FamilySpec {
    /// The name on disk; never changed once released.
    pub name: &'static str,
    /// How it is read.
    pub access: Access,
}

/// What an engine could not do. Every one of them is final for the node: design invariant 8, a failed engine write or
/// flush stops the node and is never retried or skipped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// Reading, writing or flushing failed in the engine or the file system below it.
    #[error("the storage engine failed to {action}: {cause}")]
    Io {
        /// What was being done, as a verb phrase.
        action: &'static str,
        /// The engine's own words.
        cause: String,
    },
    /// What was read does not have the form that was written.
    #[error("the storage engine holds damaged data in {place}: {cause}")]
    Corrupt {
        /// The file, family or key.
        place: String,
        /// What is wrong with it.
        cause: String,
    },
}

/// A half-open key range: from `start` (inclusive) to `end` (exclusive), or to the end of the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyRange<'a> {
    /// The first key in the range; empty means the first key of the family.
    pub start: &'a [u8],
    /// The first key past the range; `None` means no upper bound.
    pub end: Option<&'a [u8]>,
}

/// Collects the writes of one apply step.
pub trait Batch: Send {
    /// Sets `key` to `value`.
    fn put(&mut self, family: Family, key: &[u8], value: &[u8]);
    /// Removes `key`; no error if it is absent.
    fn delete(&mut self, family: Family, key: &[u8]);
    /// Removes every key in `start..end` (`start` inclusive, `end` exclusive). Later operations of the same batch on
    /// keys in the range win over it.
    fn delete_range(&mut self, family: Family, start: &[u8], end: &[u8]);
    /// How many operations were added.
    fn len(&self) -> usize;
    /// Whether no operation was added.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The bytes that the batch occupies, about.
    fn size_bytes(&self) -> usize;
}

/// An ordered walk over one family, within the range it was opened with. A new cursor stands nowhere: seek first.
///
/// Keys compare as unsigned bytes.
pub trait Cursor {
    /// Moves to the first key at or after `key` that is in range.
    fn seek(&mut self, key: &[u8]) -> Result<(), EngineError>;
    /// Moves to the last key at or before `key` that is in range.
    fn seek_for_prev(&mut self, key: &[u8]) -> Result<(), EngineError>;
    /// Moves to the first key of the range.
    fn seek_first(&mut self) -> Result<(), EngineError>;
    /// Moves to the last key of the range.
    fn seek_last(&mut self) -> Result<(), EngineError>;
    /// Moves on by one key. The cursor must stand on a key.
    fn next(&mut self) -> Result<(), EngineError>;
    /// Moves back by one key. The cursor must stand on a key.
    fn prev(&mut self) -> Result<(), EngineError>;
    /// The key and value it stands on; `None` when it stands nowhere.
    fn entry(&self) -> Option<(&[u8], &[u8])>;
}

/// An unchanging picture of the engine at one moment.
pub trait View {
    /// An ordered walk over a family.
    type Cursor<'a>: Cursor
    where
        Self: 'a;

    /// The value of `key`.
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// A cursor over `range`.
    fn cursor<'a>(&'a self, family: Family, range: KeyRange<'_>) -> Result<Self::Cursor<'a>, EngineError>;
}

/// What one write cost, for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteStats {
    /// Operations in the batch.
    pub operations: usize,
    /// Bytes of the batch.
    pub bytes: usize,
    /// Number of fsyncs that the write waited for (0 when the engine's own log is off).
    pub fsyncs: usize,
}

/// One named number about the engine, for `/metrics`.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineStat {
    /// A Prometheus name, such as `rocksdb_block_cache_usage_bytes`.
    pub name: &'static str,
    /// What it means, in one line.
    pub help: &'static str,
    /// Whether it only ever grows.
    pub counter: bool,
    /// Its value now.
    pub value: f64,
}

/// A key-value engine with column families.
pub trait Engine: Send + Sync + 'static {
    /// An unchanging picture of the engine.
    type View<'a>: View
    where
        Self: 'a;
    /// A batch for this engine.
    type Batch: Batch;

    /// Takes a picture of all families together, in constant time.
    fn view(&self) -> Self::View<'_>;

    /// The newest value of `key`, without taking a view.
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// An empty batch.
    fn batch(&self) -> Self::Batch;

    /// Makes the batch visible, whole. It is durable only after [`Engine::flush`] or whenever the engine writes it out
    /// by itself; the Raft log covers the time until then.
    fn write(&self, batch: Self::Batch) -> Result<WriteStats, EngineError>;

    /// Writes everything that is visible now to disk and waits for it. Safe to call from another thread than the
    /// writer's; writes go on meanwhile.
    fn flush(&self) -> Result<(), EngineError>;

    /// The value of `key` as a crash at this moment would leave it. At the key of the applied index this says up to
    /// where the Raft log may be trimmed (design invariant 6). May lag behind the truth, never lead it.
    fn get_durable(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// Bytes that the engine occupies on disk, about, all families.
    fn disk_bytes(&self) -> u64;

    /// Bytes of live data, about: what would be left on disk after all compaction.
    fn live_bytes(&self) -> u64;

    /// Gives space of deleted data back, in the background where possible. A hint: it never blocks readers or writers.
    fn compact_hint(&self, family: Family, range: KeyRange<'_>);

    /// Numbers for `/metrics`.
    fn stats(&self) -> Vec<EngineStat>;
}
