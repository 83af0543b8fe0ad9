//! [`MemoryEngine`]: the [`Engine`] that holds everything in memory, with snapshots on disk.
//!
//! What a crash leaves is the last snapshot that [`Engine::flush`] finished; the Raft log replays the rest. A snapshot
//! is taken from a view while writes go on, and durable reads are answered from its file, so that they say exactly what
//! a restart would find.

mod snapshot;
mod tree;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::engine::{Batch, Cursor, Engine, EngineError, EngineStat, Family, FamilySpec, KeyRange, View, WriteStats};
use snapshot::SnapshotFile;
use tree::{Entry, Garbage, Readers, Totals, Tree, Writing};

/// Leaves cleaned in one write beyond those that it touches: spreads the garbage of a long view over many writes.
const CLEAN_EXTRA: usize = 64;
/// Values longer than this are handed out by reference: a copy would cost more than the counter.
const COPY_BYTES_MAX: usize = 1 << 10;
/// Entries that a cursor reads ahead when it begins, and at most.
const READ_AHEAD_MIN: usize = 4;
const READ_AHEAD_MAX: usize = 128;

/// The [`Engine`] in memory. Its directory belongs to one process at a time.
pub struct MemoryEngine {
    families: Vec<FamilySpec>,
    trees: Vec<Tree>,
    /// The newest batch that readers may see; changes only under `views`.
    committed: AtomicU64,
    /// How many views are open at each batch.
    views: Mutex<BTreeMap<u64, usize>>,
    writer: Mutex<Writer>,
    keys: AtomicU64,
    live_bytes: AtomicU64,
    dir: PathBuf,
    /// The last snapshot, and the batch that it holds.
    durable: Mutex<Option<(u64, Arc<SnapshotFile>)>>,
    /// Held while a snapshot is written.
    flushing: Mutex<()>,
    flushes: AtomicU64,
    failure: OnceLock<EngineError>,
    _lock: File,
}

#[derive(Default)]
struct Writer {
    garbage: Garbage,
    totals: Totals,
}

impl MemoryEngine {
    /// Opens the engine in `dir`, which is created if it is missing, and loads the newest snapshot in it.
    ///
    /// # Errors
    /// [`EngineError::Corrupt`], naming the file, when the snapshot is damaged or holds a family that `families` does not
    /// name; [`EngineError::Io`] when another process holds the directory or the file system fails.
    pub fn open(dir: &Path, families: &[FamilySpec]) -> Result<MemoryEngine, EngineError> {
        let failed = |cause: String| EngineError::Io {
            action: "open",
            cause: format!("{}: {cause}", dir.display()),
        };
        std::fs::create_dir_all(dir).map_err(|error| failed(error.to_string()))?;
        let lock = File::create(dir.join("LOCK")).map_err(|error| failed(error.to_string()))?;
        lock.try_lock()
            .map_err(|_| failed("it is in use by another process".to_owned()))?;
        snapshot::remove_drafts(dir)?;

        let trees: Vec<_> = (0..families.len()).map(Tree::new).collect();
        let mut writer = Writer::default();
        let Writer { garbage, totals } = &mut writer;
        let readers = Readers::new(vec![0]);
        let mut writing = Writing {
            batch: 0,
            readers: &readers,
            garbage,
            totals,
        };
        let mut scratch = Vec::new();
        let loaded = snapshot::load(dir, |name, key, value| {
            let family = families.iter().position(|family| family.name == name);
            let family = family.ok_or_else(|| format!("it holds the family {name}, written by a newer release"))?;
            trees[family].put(Entry::new(&mut scratch, key, value), &mut writing);
            Ok(())
        })?;
        let number = loaded.as_ref().map_or(0, |snapshot| snapshot.number);
        Ok(MemoryEngine {
            families: families.to_vec(),
            trees,
            // Numbers go on from the snapshot's, so that the next one gets a later name.
            committed: AtomicU64::new(number),
            views: Mutex::default(),
            keys: AtomicU64::new(writer.totals.keys),
            live_bytes: AtomicU64::new(writer.totals.bytes),
            writer: Mutex::new(writer),
            dir: dir.to_owned(),
            durable: Mutex::new(loaded.map(|snapshot| (number, Arc::new(snapshot)))),
            flushing: Mutex::default(),
            flushes: AtomicU64::new(0),
            failure: OnceLock::new(),
            _lock: lock,
        })
    }

    fn check(&self) -> Result<(), EngineError> {
        self.failure.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    fn write_snapshot(&self) -> Result<(), EngineError> {
        let view = self.view();
        let unchanged = match &*self.durable.lock() {
            Some((batch, _)) => *batch == view.batch,
            None => false,
        };
        if unchanged {
            return Ok(());
        }
        let mut file = snapshot::Writer::create(&self.dir, view.batch)?;
        for (number, family) in self.families.iter().enumerate() {
            file.begin_family(family.name)?;
            let mut cursor = view.cursor(Family(number), KeyRange { start: b"", end: None })?;
            cursor.seek_first()?;
            while let Some((key, value)) = cursor.entry() {
                file.add(key, value)?;
                cursor.next()?;
            }
        }
        let finished = file.finish(&self.dir)?;
        *self.durable.lock() = Some((view.batch, Arc::new(finished)));
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Engine for MemoryEngine {
    type View<'a> = MemoryView<'a>;
    type Batch = MemoryBatch;

    fn view(&self) -> MemoryView<'_> {
        let mut views = self.views.lock();
        let batch = self.committed.load(Ordering::Acquire);
        *views.entry(batch).or_default() += 1;
        MemoryView { engine: self, batch }
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.trees[family.0]
            .get(key, || self.committed.load(Ordering::Acquire))
            .map(value_of))
    }

    fn batch(&self) -> MemoryBatch {
        MemoryBatch::default()
    }

    fn write(&self, batch: MemoryBatch) -> Result<WriteStats, EngineError> {
        self.check()?;
        let stats = WriteStats {
            operations: batch.len(),
            bytes: batch.size_bytes(),
            fsyncs: 0,
        };
        if batch.is_empty() {
            return Ok(stats);
        }
        let mut writer = self.writer.lock();
        let Writer { garbage, totals } = &mut *writer;
        let committed = self.committed.load(Ordering::Acquire);
        let readers = {
            let views = self.views.lock();
            let mut batches: Vec<_> = views.keys().copied().collect();
            // Views that begin while this batch is written.
            if batches.last() != Some(&committed) {
                batches.push(committed);
            }
            Readers::new(batches)
        };
        garbage.collect(&self.trees, &readers, committed, batch.len() + CLEAN_EXTRA);

        let mut writing = Writing {
            batch: committed + 1,
            readers: &readers,
            garbage,
            totals,
        };
        for operation in batch.operations {
            match operation {
                Operation::Put(family, entry) => self.trees[family.0].put(entry, &mut writing),
                Operation::Delete(family, key) => self.trees[family.0].delete(&key, &mut writing),
                Operation::DeleteRange(family, start, end) => {
                    self.trees[family.0].delete_range(&start, &end, &mut writing);
                }
            }
        }
        self.keys.store(totals.keys, Ordering::Relaxed);
        self.live_bytes.store(totals.bytes, Ordering::Relaxed);
        let _views = self.views.lock();
        self.committed.store(committed + 1, Ordering::Release);
        Ok(stats)
    }

    fn flush(&self) -> Result<(), EngineError> {
        let _flushing = self.flushing.lock();
        self.check()?;
        self.write_snapshot()
            .map_err(|error| self.failure.get_or_init(|| error).clone())
    }

    fn get_durable(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let snapshot = self.durable.lock().as_ref().map(|(_, snapshot)| Arc::clone(snapshot));
        snapshot.map_or(Ok(None), |snapshot| snapshot.get(self.families[family.0].name, key))
    }

    fn disk_bytes(&self) -> u64 {
        self.durable.lock().as_ref().map_or(0, |(_, snapshot)| snapshot.bytes)
    }

    fn live_bytes(&self) -> u64 {
        self.live_bytes.load(Ordering::Relaxed)
    }

    /// Nothing to do: space is given back as soon as nobody reads it.
    fn compact_hint(&self, _: Family, _: KeyRange<'_>) {}

    fn stats(&self) -> Vec<EngineStat> {
        let garbage = self.writer.lock().garbage.leaves();
        let views: usize = self.views.lock().values().sum();
        let gauge = |name, help, value| EngineStat {
            name,
            help,
            counter: false,
            value,
        };
        vec![
            gauge(
                "memory_engine_keys",
                "Keys in all families.",
                self.keys.load(Ordering::Relaxed) as f64,
            ),
            gauge(
                "memory_engine_live_bytes",
                "Bytes of keys and values.",
                self.live_bytes() as f64,
            ),
            gauge(
                "memory_engine_unclean_leaves",
                "Leaves that hold versions for views, or wait to be cleaned.",
                garbage as f64,
            ),
            gauge("memory_engine_views", "Views in use.", views as f64),
            gauge(
                "memory_engine_snapshot_bytes",
                "Size of the last snapshot on disk.",
                self.disk_bytes() as f64,
            ),
            EngineStat {
                name: "memory_engine_snapshots_total",
                help: "Snapshots written.",
                counter: true,
                value: self.flushes.load(Ordering::Relaxed) as f64,
            },
        ]
    }
}

fn value_of(entry: Entry) -> Bytes {
    if entry.value().len() <= COPY_BYTES_MAX {
        return Bytes::copy_from_slice(entry.value());
    }
    struct Value(Entry);
    impl AsRef<[u8]> for Value {
        fn as_ref(&self) -> &[u8] {
            self.0.value()
        }
    }
    Bytes::from_owner(Value(entry))
}

enum Operation {
    Put(Family, Entry),
    Delete(Family, Box<[u8]>),
    DeleteRange(Family, Box<[u8]>, Box<[u8]>),
}

/// A [`Batch`] whose entries are the ones that the engine will hold.
#[derive(Default)]
pub struct MemoryBatch {
    operations: Vec<Operation>,
    bytes: usize,
    scratch: Vec<u8>,
}

impl Batch for MemoryBatch {
    fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        let entry = Entry::new(&mut self.scratch, key, value);
        self.bytes += entry.bytes();
        self.operations.push(Operation::Put(family, entry));
    }

    fn delete(&mut self, family: Family, key: &[u8]) {
        self.bytes += key.len();
        self.operations.push(Operation::Delete(family, key.into()));
    }

    fn delete_range(&mut self, family: Family, start: &[u8], end: &[u8]) {
        if start < end {
            self.bytes += start.len() + end.len();
            self.operations
                .push(Operation::DeleteRange(family, start.into(), end.into()));
        }
    }

    fn len(&self) -> usize {
        self.operations.len()
    }

    fn size_bytes(&self) -> usize {
        self.bytes + self.operations.len() * size_of::<Operation>()
    }
}

/// A [`View`] of one batch of the engine.
pub struct MemoryView<'a> {
    engine: &'a MemoryEngine,
    batch: u64,
}

impl Drop for MemoryView<'_> {
    fn drop(&mut self) {
        let mut views = self.engine.views.lock();
        if let Some(count) = views.get_mut(&self.batch) {
            *count -= 1;
            if *count == 0 {
                views.remove(&self.batch);
            }
        }
    }
}

impl<'v> View for MemoryView<'v> {
    type Cursor<'a>
        = MemoryCursor<'a>
    where
        Self: 'a;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.engine.trees[family.0].get(key, || self.batch).map(value_of))
    }

    fn cursor<'a>(&'a self, family: Family, range: KeyRange<'_>) -> Result<MemoryCursor<'a>, EngineError> {
        Ok(MemoryCursor {
            tree: &self.engine.trees[family.0],
            batch: self.batch,
            start: range.start.into(),
            end: range.end.map(Into::into),
            entries: Vec::new(),
            at: 0,
            forward: true,
            read_ahead: READ_AHEAD_MIN,
        })
    }
}

/// A [`Cursor`] that reads a few entries ahead, in the direction it last moved.
pub struct MemoryCursor<'a> {
    tree: &'a Tree,
    batch: u64,
    start: Box<[u8]>,
    end: Option<Box<[u8]>>,
    /// Neighbouring entries, in the direction of `forward`.
    entries: Vec<Entry>,
    /// Where it stands in `entries`; at or past their end when it stands nowhere.
    at: usize,
    forward: bool,
    /// How many entries to read next time: more and more as it moves on.
    read_ahead: usize,
}

impl MemoryCursor<'_> {
    fn load_forward(&mut self, from: &[u8]) {
        let from = from.max(&self.start);
        self.entries.clear();
        self.at = 0;
        self.forward = true;
        self.tree.read_forward(
            from,
            self.end.as_deref(),
            self.batch,
            self.read_ahead,
            &mut self.entries,
        );
    }

    /// Loads what comes before `end`.
    fn load_backward(&mut self, end: Option<&[u8]>) {
        let end = match (end, self.end.as_deref()) {
            (Some(end), Some(bound)) => Some(end.min(bound)),
            (end, bound) => end.or(bound),
        };
        self.entries.clear();
        self.at = 0;
        self.forward = false;
        self.tree
            .read_backward(&self.start, end, self.batch, self.read_ahead, &mut self.entries);
    }

    fn grow_read_ahead(&mut self) {
        self.read_ahead = (self.read_ahead * 4).min(READ_AHEAD_MAX);
    }

    fn assert_standing(&self) {
        assert!(self.at < self.entries.len(), "a cursor that moves on stands on a key");
    }
}

/// The first key after `key`.
fn successor(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

impl Cursor for MemoryCursor<'_> {
    fn seek(&mut self, key: &[u8]) -> Result<(), EngineError> {
        self.read_ahead = READ_AHEAD_MIN;
        self.load_forward(key);
        Ok(())
    }

    fn seek_for_prev(&mut self, key: &[u8]) -> Result<(), EngineError> {
        self.read_ahead = READ_AHEAD_MIN;
        self.load_backward(Some(&successor(key)));
        Ok(())
    }

    fn seek_first(&mut self) -> Result<(), EngineError> {
        self.seek(b"")
    }

    fn seek_last(&mut self) -> Result<(), EngineError> {
        self.read_ahead = READ_AHEAD_MIN;
        self.load_backward(None);
        Ok(())
    }

    fn next(&mut self) -> Result<(), EngineError> {
        self.assert_standing();
        if self.forward && self.at + 1 < self.entries.len() {
            self.at += 1;
        } else if !self.forward && self.at > 0 {
            self.at -= 1;
        } else {
            self.grow_read_ahead();
            let after = successor(self.entries[self.at].key());
            self.load_forward(&after);
        }
        Ok(())
    }

    fn prev(&mut self) -> Result<(), EngineError> {
        self.assert_standing();
        if !self.forward && self.at + 1 < self.entries.len() {
            self.at += 1;
        } else if self.forward && self.at > 0 {
            self.at -= 1;
        } else {
            self.grow_read_ahead();
            let before = self.entries[self.at].clone();
            self.load_backward(Some(before.key()));
        }
        Ok(())
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.entries.get(self.at).map(|entry| (entry.key(), entry.value()))
    }
}

#[cfg(test)]
mod tests;
