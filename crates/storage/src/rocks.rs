//! [`RocksEngine`]: the [`Engine`] over RocksDB, and the default one.
//!
//! How the promises of [`Engine`] are kept:
//!
//! - **Atomic, in order.** RocksDB applies a write batch whole and in order of sequence numbers. Its own log is off by
//!   default, since the Raft log already holds every write; then *atomic flush* makes all families durable together, so
//!   that a crash leaves a prefix of the batches in all of them at the same point.
//! - **Durable reads.** Without its log, what is durable is exactly what lies in flushed files: such a read skips the
//!   memtables ([`ReadTier::Persisted`]). With its log on, every write waits for an fsync, so the newest value is the
//!   durable one.
//! - **Failure is final.** The first failed write or flush, also one in RocksDB's background, latches; RocksDB's habit
//!   to recover from a full disk by itself is switched off, as it would hide that a flush was lost.

mod options;
mod stats;

use std::path::Path;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use rocksdb::event_listener::{DBBackgroundErrorReason, EventListener, MutableStatus};
use rocksdb::ffi_raw::rocksdb_column_family_handle_t;
use rocksdb::{
    AsColumnFamilyRef, Cache, ColumnFamilyDescriptor, CompactOptions, DB, DBRawIterator, FlushOptions, Options,
    ReadOptions, ReadTier, Snapshot, WriteBatch, WriteBufferManager, WriteOptions, properties,
};

use crate::engine::{Batch, Cursor, Engine, EngineError, EngineStat, Family, FamilySpec, KeyRange, View, WriteStats};

pub use options::{Compression, RocksOptions};

/// Hints of [`Engine::compact_hint`] that may wait; further ones are dropped, as the trait allows.
const COMPACT_HINTS_MAX: usize = 64;

/// The [`Engine`] over RocksDB.
///
/// Its directory belongs to one process at a time. A batch that outlives the engine keeps the directory open.
pub struct RocksEngine {
    shared: Arc<Shared>,
    write_options: WriteOptions,
    /// Reads what a crash at this moment would leave.
    durable: ReadOptions,
    newest: ReadOptions,
    wal: bool,
    /// Kept for RocksDB's own counters, which live in it.
    options: Options,
    cache: Cache,
    write_buffers: WriteBufferManager,
    compactor: Option<Compactor>,
}

/// What batches and the background thread need of the engine.
struct Shared {
    db: DB,
    families: Vec<FamilyHandle>,
    failure: Arc<Failure>,
    /// The last batch that was written, for the sake of its memory.
    spare: Mutex<Option<WriteBatch>>,
}

/// A larger batch is not kept.
const SPARE_BYTES_MAX: usize = 1 << 20;

/// The address of a column family's handle. The handle itself belongs to the `DB` that lies beside it in [`Shared`]
/// and lives exactly as long; keeping its address saves a hash and a lookup by name for every operation. An atomic
/// pointer, because it can be shared between threads without a promise of our own; it never changes.
struct FamilyHandle(AtomicPtr<rocksdb_column_family_handle_t>);

impl AsColumnFamilyRef for FamilyHandle {
    fn inner(&self) -> *mut rocksdb_column_family_handle_t {
        self.0.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn family(&self, family: Family) -> &FamilyHandle {
        &self.families[family.0]
    }

    /// The sum of an integer property over all families; families that do not know it count as 0.
    fn property_sum(&self, name: &rocksdb::properties::PropName) -> u64 {
        let of = |family| self.db.property_int_value_cf(family, name).ok().flatten().unwrap_or(0);
        self.families.iter().map(of).sum()
    }
}

/// The first failed write or flush. Never cleared.
#[derive(Default)]
struct Failure(OnceLock<EngineError>);

impl Failure {
    fn check(&self) -> Result<(), EngineError> {
        self.0.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    fn latch(&self, action: &'static str, error: rocksdb::Error) -> EngineError {
        let error = engine_error(action, error);
        self.0.get_or_init(|| error.clone());
        error
    }
}

/// Hears of flushes that fail in the background, where no caller would see them.
struct BackgroundErrors(Arc<Failure>);

impl EventListener for BackgroundErrors {
    fn on_background_error(&self, reason: DBBackgroundErrorReason, status: MutableStatus) {
        let Err(error) = status.result() else { return };
        tracing::error!(?reason, %error, "RocksDB reports a background error");
        match reason {
            // Nothing is lost when a compaction fails: its input files stay, and RocksDB tries again.
            DBBackgroundErrorReason::KCompaction | DBBackgroundErrorReason::KAsyncFileOpen => {}
            _ => drop(self.0.latch("write to disk in the background", error.clone())),
        }
    }
}

fn engine_error(action: &'static str, error: rocksdb::Error) -> EngineError {
    let cause = error.to_string();
    match error.kind() {
        rocksdb::ErrorKind::Corruption => EngineError::Corrupt {
            place: "RocksDB".to_owned(),
            cause,
        },
        _ => EngineError::Io { action, cause },
    }
}

impl RocksEngine {
    /// Opens the engine in `dir`, which is created if it is missing, as are families that it does not hold yet.
    ///
    /// # Errors
    /// [`EngineError::Io`] when another process holds the directory, when it holds a family that `families` does not
    /// name (written by a newer release), or when the file system fails; [`EngineError::Corrupt`] when RocksDB finds its
    /// files damaged.
    pub fn open(dir: &Path, families: &[FamilySpec], options: &RocksOptions) -> Result<RocksEngine, EngineError> {
        let failed = |cause: String| EngineError::Io {
            action: "open RocksDB",
            cause,
        };
        std::fs::create_dir_all(dir).map_err(|error| failed(format!("{}: {error}", dir.display())))?;

        let cache = Cache::new_hyper_clock_cache(options.block_cache_bytes, 0);
        let write_buffers = WriteBufferManager::new_write_buffer_manager_with_cache(
            options.write_buffers_total_bytes,
            false,
            cache.clone(),
        );
        let failure = Arc::new(Failure::default());
        let mut db_options = options.database(&write_buffers);
        db_options.add_event_listener(BackgroundErrors(Arc::clone(&failure)));

        let descriptors = families
            .iter()
            .map(|family| ColumnFamilyDescriptor::new(family.name, options.family(family.access, &cache)));
        let db = DB::open_cf_descriptors(&db_options, dir, descriptors).map_err(|error| {
            let text = error.to_string();
            if text.contains("/LOCK") {
                failed(format!(
                    "{} is in use by another process (or by this one, twice): {text}",
                    dir.display()
                ))
            } else if text.contains("Column families not opened") {
                failed(format!("{} was written by a newer release: {text}", dir.display()))
            } else {
                engine_error("open RocksDB", error)
            }
        })?;

        let handle = |family: &FamilySpec| {
            let handle = db.cf_handle(family.name).expect("a family that was just opened");
            FamilyHandle(AtomicPtr::new(handle.inner()))
        };
        let handles = families.iter().map(handle).collect();
        let shared = Arc::new(Shared {
            db,
            families: handles,
            failure,
            spare: Mutex::default(),
        });

        let mut write_options = WriteOptions::default();
        write_options.set_sync(options.wal);
        write_options.disable_wal(!options.wal);
        let mut durable = ReadOptions::default();
        durable.set_read_tier(ReadTier::Persisted);
        let compactor = Compactor::start(Arc::clone(&shared)).map_err(|error| failed(error.to_string()))?;

        Ok(RocksEngine {
            shared,
            write_options,
            durable,
            newest: ReadOptions::default(),
            wal: options.wal,
            options: db_options,
            cache,
            write_buffers,
            compactor: Some(compactor),
        })
    }
}

impl Shared {
    fn get(&self, family: Family, key: &[u8], options: &ReadOptions) -> Result<Option<Bytes>, EngineError> {
        // A pinned slice is copied once, straight out of the memtable or the cached block.
        match self.db.get_pinned_cf_opt(self.family(family), key, options) {
            Ok(value) => Ok(value.map(|value| Bytes::copy_from_slice(&value))),
            Err(error) => Err(engine_error("read", error)),
        }
    }
}

impl Drop for RocksEngine {
    fn drop(&mut self) {
        if let Some(compactor) = self.compactor.take() {
            compactor.stop(&self.shared.db);
        }
    }
}

impl Engine for RocksEngine {
    type View<'a> = RocksView<'a>;
    type Batch = RocksBatch;

    fn view(&self) -> RocksView<'_> {
        let snapshot = self.shared.db.snapshot();
        let mut options = ReadOptions::default();
        options.set_snapshot(&snapshot);
        RocksView {
            shared: &self.shared,
            options,
            snapshot,
        }
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.shared.get(family, key, &self.newest)
    }

    fn batch(&self) -> RocksBatch {
        RocksBatch {
            batch: self.shared.spare.lock().take().unwrap_or_default(),
            shared: Arc::clone(&self.shared),
        }
    }

    fn write(&self, mut batch: RocksBatch) -> Result<WriteStats, EngineError> {
        assert!(
            Arc::ptr_eq(&batch.shared, &self.shared),
            "a batch goes to the engine that made it"
        );
        self.shared.failure.check()?;
        let stats = WriteStats {
            operations: batch.len(),
            bytes: batch.size_bytes(),
            fsyncs: usize::from(self.wal && !batch.is_empty()),
        };
        match self.shared.db.write_opt(&batch.batch, &self.write_options) {
            Ok(()) => {
                if stats.bytes <= SPARE_BYTES_MAX {
                    batch.batch.clear();
                    *self.shared.spare.lock() = Some(batch.batch);
                }
                // A background flush may have failed meanwhile.
                self.shared.failure.check().map(|()| stats)
            }
            Err(error) => Err(self.shared.failure.latch("write a batch", error)),
        }
    }

    fn flush(&self) -> Result<(), EngineError> {
        self.shared.failure.check()?;
        let mut options = FlushOptions::default();
        options.set_wait(true);
        let families: Vec<&FamilyHandle> = self.shared.families.iter().collect();
        match self.shared.db.flush_cfs_opt(&families, &options) {
            Ok(()) => self.shared.failure.check(),
            Err(error) => Err(self.shared.failure.latch("flush", error)),
        }
    }

    fn get_durable(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        // Whoever asks learns here that a background flush has failed. The writer may not: after one for want of space,
        // RocksDB holds writers up until there is space again, for as long as that takes.
        self.shared.failure.check()?;
        self.shared
            .get(family, key, if self.wal { &self.newest } else { &self.durable })
    }

    fn disk_bytes(&self) -> u64 {
        self.shared.property_sum(properties::TOTAL_SST_FILES_SIZE)
    }

    fn live_bytes(&self) -> u64 {
        self.shared.property_sum(properties::ESTIMATE_LIVE_DATA_SIZE)
            + self.shared.property_sum(properties::CUR_SIZE_ALL_MEM_TABLES)
    }

    fn compact_hint(&self, family: Family, range: KeyRange<'_>) {
        if let Some(compactor) = &self.compactor {
            let hint = CompactHint {
                family,
                start: range.start.to_vec(),
                end: range.end.map(<[u8]>::to_vec),
            };
            // Full means that hours of work wait already; the hint may be dropped.
            let _ = compactor.hints.try_send(hint);
        }
    }

    fn stats(&self) -> Vec<EngineStat> {
        stats::collect(self)
    }
}

/// A [`Batch`] that is RocksDB's own write batch.
pub struct RocksBatch {
    batch: WriteBatch,
    shared: Arc<Shared>,
}

impl Batch for RocksBatch {
    fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        self.batch.put_cf(self.shared.family(family), key, value);
    }

    fn delete(&mut self, family: Family, key: &[u8]) {
        self.batch.delete_cf(self.shared.family(family), key);
    }

    fn delete_range(&mut self, family: Family, start: &[u8], end: &[u8]) {
        // RocksDB refuses a batch with a range that ends before it begins; here it is merely empty.
        if start < end {
            self.batch.delete_range_cf(self.shared.family(family), start, end);
        }
    }

    fn len(&self) -> usize {
        self.batch.len()
    }

    fn size_bytes(&self) -> usize {
        self.batch.size_in_bytes()
    }
}

/// A [`View`] that is a RocksDB snapshot.
pub struct RocksView<'a> {
    shared: &'a Shared,
    /// Carries the snapshot; declared before it, so dropped before it.
    options: ReadOptions,
    snapshot: Snapshot<'a>,
}

impl<'v> View for RocksView<'v> {
    type Cursor<'a>
        = RocksCursor<'a>
    where
        Self: 'a;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.shared.get(family, key, &self.options)
    }

    fn cursor<'a>(&'a self, family: Family, range: KeyRange<'_>) -> Result<RocksCursor<'a>, EngineError> {
        let mut options = ReadOptions::default();
        // Deleting files that only this cursor still held is left to the background.
        options.set_background_purge_on_iterator_cleanup(true);
        if !range.start.is_empty() {
            options.set_iterate_lower_bound(range.start);
        }
        if let Some(end) = range.end {
            // RocksDB leaves a range that ends before it begins undefined.
            options.set_iterate_upper_bound(end.max(range.start));
        }
        Ok(RocksCursor {
            iterator: self.snapshot.raw_iterator_cf_opt(self.shared.family(family), options),
        })
    }
}

/// A [`Cursor`] that is a RocksDB iterator; what it stands on is read in place.
pub struct RocksCursor<'a> {
    iterator: DBRawIterator<'a>,
}

impl RocksCursor<'_> {
    /// An iterator that stopped at damage looks like one at its end, so every move asks.
    fn moved(&self) -> Result<(), EngineError> {
        if self.iterator.valid() {
            return Ok(());
        }
        self.iterator.status().map_err(|error| engine_error("read", error))
    }
}

impl Cursor for RocksCursor<'_> {
    fn seek(&mut self, key: &[u8]) -> Result<(), EngineError> {
        self.iterator.seek(key);
        self.moved()
    }

    fn seek_for_prev(&mut self, key: &[u8]) -> Result<(), EngineError> {
        self.iterator.seek_for_prev(key);
        self.moved()
    }

    fn seek_first(&mut self) -> Result<(), EngineError> {
        self.iterator.seek_to_first();
        self.moved()
    }

    fn seek_last(&mut self) -> Result<(), EngineError> {
        self.iterator.seek_to_last();
        self.moved()
    }

    fn next(&mut self) -> Result<(), EngineError> {
        self.iterator.next();
        self.moved()
    }

    fn prev(&mut self) -> Result<(), EngineError> {
        self.iterator.prev();
        self.moved()
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.iterator.item()
    }
}

struct CompactHint {
    family: Family,
    start: Vec<u8>,
    end: Option<Vec<u8>>,
}

/// The thread that carries out compaction hints, one after the other.
struct Compactor {
    hints: Sender<CompactHint>,
    thread: JoinHandle<()>,
}

impl Compactor {
    fn start(shared: Arc<Shared>) -> std::io::Result<Compactor> {
        let (hints, waiting) = bounded(COMPACT_HINTS_MAX);
        let thread = std::thread::Builder::new()
            .name("engine-compact".to_owned())
            .spawn(move || Compactor::run(&shared, &waiting))?;
        Ok(Compactor { hints, thread })
    }

    fn run(shared: &Shared, waiting: &Receiver<CompactHint>) {
        let mut options = CompactOptions::default();
        // RocksDB's own compactions go on beside it.
        options.set_exclusive_manual_compaction(false);
        for hint in waiting {
            let start = (!hint.start.is_empty()).then_some(hint.start);
            shared
                .db
                .compact_range_cf_opt(shared.family(hint.family), start, hint.end, &options);
        }
    }

    /// Breaks off a running compaction, which loses nothing, and waits for the thread.
    fn stop(self, db: &DB) {
        db.disable_manual_compaction();
        drop(self.hints);
        if self.thread.join().is_err() {
            tracing::error!("the compaction thread panicked");
        }
    }
}

#[cfg(test)]
mod tests;
