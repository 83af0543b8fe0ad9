//! An [`Engine`] on a virtual disk: ordered maps, of which a crash leaves what was flushed.
//!
//! Batches are visible at once, and durable by the rules of the engine that it stands for (see [`Kind`]). A flush takes
//! time: it covers what was visible when it began, and a crash in its middle leaves all of that or nothing. Reads may
//! fail, once, as when a cable was loose; or meet damage: a flipped bit or a block of an earlier life fails its checksum,
//! so whoever reads it gets an error, never a wrong value.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use storage::{Batch, Cursor, Engine, EngineError, EngineStat, Family, KeyRange, View, WriteStats};

type Map = BTreeMap<Bytes, Bytes>;

/// All families at one moment.
pub type Image = Vec<Arc<Map>>;

/// Which engine it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// RocksDB without a log of its own: memory tables are flushed on request, and any time by itself.
    Rocks,
    /// RocksDB with its log, which is not synced: a crash may leave more than what is known to be durable.
    RocksWal,
    /// The engine in memory: durable is the last whole snapshot, and nothing else ever is.
    Memory,
}

/// What is wrong with the disk below an engine, for all who read it.
#[derive(Default)]
struct Health {
    /// Reads until one fails; 0 for never.
    fails_in: AtomicU32,
    /// Whether a read failed or met damage.
    failed: AtomicBool,
    has_damage: AtomicBool,
    damaged: Mutex<BTreeSet<(usize, Bytes)>>,
}

impl Health {
    fn read(&self, family: Family, key: &[u8]) -> Result<(), EngineError> {
        let left = self.fails_in.load(Ordering::Relaxed);
        if left > 0 {
            self.fails_in.store(left - 1, Ordering::Relaxed);
            if left == 1 {
                self.failed.store(true, Ordering::Relaxed);
                return Err(broken("read"));
            }
        }
        if self.has_damage.load(Ordering::Relaxed) {
            let damaged = self.damaged.lock().expect("there is one thread");
            if damaged.contains(&(family.0, Bytes::copy_from_slice(key))) {
                self.failed.store(true, Ordering::Relaxed);
                return Err(EngineError::Corrupt {
                    place: format!("family {}", family.0),
                    cause: "a checksum does not match".to_owned(),
                });
            }
        }
        Ok(())
    }

    fn damage(&self, damaged: BTreeSet<(usize, Bytes)>) {
        self.has_damage.store(!damaged.is_empty(), Ordering::Relaxed);
        *self.damaged.lock().expect("there is one thread") = damaged;
    }

    /// What is written anew is whole again.
    fn overwritten(&self, writes: &[Write]) {
        if self.has_damage.load(Ordering::Relaxed) {
            let mut damaged = self.damaged.lock().expect("there is one thread");
            for write in writes {
                if let Write::Put(family, key, _) | Write::Delete(family, key) = write {
                    damaged.remove(&(family.0, key.clone()));
                }
            }
        }
    }
}

/// The engine. What is durable of it belongs to the virtual disk and outlives the process.
pub struct SimEngine {
    kind: Kind,
    inner: Mutex<Inner>,
    health: Arc<Health>,
}

struct Inner {
    visible: Image,
    durable: Image,
    /// What was durable some time ago.
    older: Option<Image>,
    /// Batches that are visible and not durable, in order.
    unflushed: VecDeque<Vec<Write>>,
    /// How many of them the flush under way covers.
    flushing: Option<usize>,
    /// Where the durable image is damaged.
    damaged: BTreeSet<(usize, Bytes)>,
    /// What the next write or flush fails with.
    broken: bool,
}

#[derive(Clone)]
enum Write {
    Put(Family, Bytes, Bytes),
    Delete(Family, Bytes),
    DeleteRange(Family, Bytes, Bytes),
}

impl Write {
    fn apply(&self, image: &mut Image) {
        match self {
            Write::Put(family, key, value) => {
                Arc::make_mut(&mut image[family.0]).insert(key.clone(), value.clone());
            }
            Write::Delete(family, key) => {
                Arc::make_mut(&mut image[family.0]).remove(key);
            }
            Write::DeleteRange(family, start, end) if start < end => {
                let map = Arc::make_mut(&mut image[family.0]);
                let doomed: Vec<Bytes> = map.range::<Bytes, _>(start..end).map(|(key, _)| key.clone()).collect();
                for key in doomed {
                    map.remove(&key);
                }
            }
            Write::DeleteRange(..) => {}
        }
    }
}

impl SimEngine {
    /// An empty engine.
    pub fn empty(kind: Kind) -> Self {
        SimEngine::holding(kind, vec![Arc::default(); mvcc::keys::FAMILIES.len()])
    }

    /// An engine that durably holds an image.
    pub fn holding(kind: Kind, image: Image) -> Self {
        SimEngine {
            kind,
            inner: Mutex::new(Inner {
                visible: image.clone(),
                durable: image,
                older: None,
                unflushed: VecDeque::new(),
                flushing: None,
                damaged: BTreeSet::new(),
                broken: false,
            }),
            health: Arc::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("there is one thread")
    }

    /// What it stands for.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What is visible now.
    pub fn image(&self) -> Image {
        self.inner().visible.clone()
    }

    /// What a crash leaves; `chance` is between 0 and 1.
    pub fn after_crash(&self, chance: f64) -> Self {
        let inner = self.inner();
        let survivors = match (self.kind, inner.flushing) {
            // What its own log had written out by itself.
            (Kind::RocksWal, _) => (inner.unflushed.len() as f64 * chance) as usize,
            // The flush was as good as done, or it was not.
            (_, Some(count)) if chance < 0.5 => count,
            _ => 0,
        };
        let mut image = inner.durable.clone();
        for batch in inner.unflushed.iter().take(survivors) {
            batch.iter().for_each(|write| write.apply(&mut image));
        }
        let older = inner.older.clone();
        let damaged = inner.damaged.clone();
        drop(inner);
        let engine = SimEngine::holding(self.kind, image);
        engine.inner().older = older;
        engine.damage(damaged);
        engine
    }

    /// Remembers what is durable now, for a disk that comes back with old blocks some day.
    pub fn remember(&self) {
        let inner = &mut *self.inner();
        inner.older = Some(inner.durable.clone());
    }

    /// What a crash leaves on a disk that comes back with old blocks: what was durable when it was told to remember.
    pub fn as_remembered(&self) -> Option<Self> {
        let older = self.inner().older.clone()?;
        Some(SimEngine::holding(self.kind, older))
    }

    /// Makes the oldest `count` unflushed batches durable.
    pub fn flush_some(&self, count: usize) {
        let inner = &mut *self.inner();
        let count = count.min(inner.unflushed.len());
        if count == 0 {
            return;
        }
        for batch in inner.unflushed.drain(..count) {
            for write in batch {
                write.apply(&mut inner.durable);
            }
        }
        inner.flushing = inner.flushing.map(|flushing| flushing.saturating_sub(count));
        if inner.unflushed.is_empty() && !inner.damaged.is_empty() {
            inner.damaged = self.health.damaged.lock().expect("there is one thread").clone();
        }
    }

    /// Begins to make durable what is visible now; `false` if that is under way already.
    pub fn begin_flush(&self) -> bool {
        let inner = &mut *self.inner();
        let begins = inner.flushing.is_none();
        inner.flushing.get_or_insert(inner.unflushed.len());
        begins
    }

    /// What was visible when the flush began is durable.
    pub fn finish_flush(&self) {
        let flushing = self.inner().flushing.take();
        self.flush_some(flushing.unwrap_or(0));
    }

    /// A broken flush: makes durable only what is in some families.
    pub fn flush_only(&self, wanted: impl Fn(Family) -> bool) {
        let inner = &mut *self.inner();
        for batch in &mut inner.unflushed {
            batch.retain(|write| {
                let (Write::Put(family, ..) | Write::Delete(family, _) | Write::DeleteRange(family, ..)) = write;
                let wanted = wanted(*family);
                if wanted {
                    write.apply(&mut inner.durable);
                }
                !wanted
            });
        }
    }

    /// A broken flush: makes everything durable but the first key that is written.
    pub fn flush_losing_a_write(&self) {
        let inner = &mut *self.inner();
        let lost = inner.unflushed.iter_mut().find_map(|batch| {
            batch
                .iter()
                .position(|write| matches!(write, Write::Put(mvcc::keys::CUR, ..)))
                .map(|at| batch.remove(at))
        });
        drop(lost);
        for batch in inner.unflushed.drain(..) {
            for write in batch {
                write.apply(&mut inner.durable);
            }
        }
    }

    /// Batches that are not durable.
    pub fn unflushed(&self) -> usize {
        self.inner().unflushed.len()
    }

    /// From now on every write fails.
    pub fn break_down(&self) {
        self.inner().broken = true;
    }

    /// One read fails, `reads` reads from now.
    pub fn fail_a_read(&self, reads: u32) {
        self.health.fails_in.store(reads.max(1), Ordering::Relaxed);
    }

    /// No read fails any more that has not failed yet.
    pub fn mend_reads(&self) {
        self.health.fails_in.store(0, Ordering::Relaxed);
    }

    /// Flips a bit of what is durable, at a place that `chance` (between 0 and 1) names. `false` if there is nothing.
    pub fn flip_a_bit(&self, chance: f64) -> bool {
        let inner = self.inner();
        // Every family alike, however much is in it.
        let families = inner.durable.iter().enumerate().filter(|(_, map)| !map.is_empty());
        let families: Vec<_> = families.collect();
        let place = families.len() as f64 * chance;
        let Some((family, map)) = families.get(place as usize) else {
            return false;
        };
        let at = (map.len() as f64 * place.fract()) as usize;
        let damaged = map.keys().nth(at).map(|key| (*family, key.clone()));
        drop(inner);
        self.damage(damaged.into_iter().collect());
        true
    }

    /// A broken engine: a flipped bit is not found out.
    pub fn flip_a_bit_unnoticed(&self, chance: f64) {
        let mut inner = self.inner();
        let newest = &inner.visible[mvcc::keys::CUR.0];
        let at = (newest.len() as f64 * chance) as usize;
        if let Some((key, value)) = newest.iter().nth(at) {
            let (key, mut value) = (key.clone(), value.to_vec());
            if let Some(last) = value.last_mut() {
                *last ^= 1;
            }
            Arc::make_mut(&mut inner.visible[mvcc::keys::CUR.0]).insert(key, value.into());
        }
    }

    fn damage(&self, damaged: BTreeSet<(usize, Bytes)>) {
        self.inner().damaged = damaged.clone();
        self.health.damage(damaged);
    }

    /// Whether anything that is durable is damaged.
    pub fn is_damaged(&self) -> bool {
        !self.inner().damaged.is_empty()
    }

    /// Whether anything went wrong with it that was not its users' fault.
    pub fn is_broken(&self) -> bool {
        self.inner().broken || self.health.failed.load(Ordering::Relaxed)
    }

    /// The value of a key as a crash would leave it, whatever the disk has to say.
    pub fn peek_durable(&self, family: Family, key: &[u8]) -> Option<Bytes> {
        self.inner().durable[family.0].get(key).cloned()
    }
}

/// A [`Batch`] of [`SimEngine`].
#[derive(Default)]
pub struct SimBatch(Vec<Write>);

impl Batch for SimBatch {
    fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        let (key, value) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        self.0.push(Write::Put(family, key, value));
    }

    fn delete(&mut self, family: Family, key: &[u8]) {
        self.0.push(Write::Delete(family, Bytes::copy_from_slice(key)));
    }

    fn delete_range(&mut self, family: Family, start: &[u8], end: &[u8]) {
        let (start, end) = (Bytes::copy_from_slice(start), Bytes::copy_from_slice(end));
        self.0.push(Write::DeleteRange(family, start, end));
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn size_bytes(&self) -> usize {
        let size = |write: &Write| match write {
            Write::Put(_, a, b) | Write::DeleteRange(_, a, b) => a.len() + b.len(),
            Write::Delete(_, key) => key.len(),
        };
        self.0.iter().map(size).sum()
    }
}

/// A [`View`] of [`SimEngine`].
pub struct SimView {
    image: Image,
    health: Arc<Health>,
}

impl SimView {
    /// A view of an image on a disk that works.
    pub fn of(image: Image) -> Self {
        SimView {
            image,
            health: Arc::default(),
        }
    }
}

impl View for SimView {
    type Cursor<'a> = SimCursor<'a>;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.health.read(family, key)?;
        Ok(self.image[family.0].get(key).cloned())
    }

    fn cursor<'a>(&'a self, family: Family, range: KeyRange<'_>) -> Result<SimCursor<'a>, EngineError> {
        Ok(SimCursor {
            map: &self.image[family.0],
            family,
            health: &self.health,
            start: Bytes::copy_from_slice(range.start),
            end: range.end.map(Bytes::copy_from_slice),
            at: None,
        })
    }
}

/// A [`Cursor`] of [`SimView`].
pub struct SimCursor<'a> {
    map: &'a Map,
    family: Family,
    health: &'a Health,
    start: Bytes,
    end: Option<Bytes>,
    at: Option<(&'a Bytes, &'a Bytes)>,
}

impl<'a> SimCursor<'a> {
    fn in_range(&self, found: Option<(&'a Bytes, &'a Bytes)>) -> Option<(&'a Bytes, &'a Bytes)> {
        found.filter(|(key, _)| **key >= self.start && self.end.as_ref().is_none_or(|end| *key < end))
    }

    fn stand_on(&mut self, found: Option<(&'a Bytes, &'a Bytes)>) -> Result<(), EngineError> {
        self.at = self.in_range(found);
        self.at.map_or(Ok(()), |(key, _)| self.health.read(self.family, key))
    }

    fn forward(&mut self, from: Bound<&[u8]>) -> Result<(), EngineError> {
        let found = self.map.range::<[u8], _>((from, Bound::Unbounded)).next();
        self.stand_on(found)
    }

    fn backward(&mut self, to: Bound<&[u8]>) -> Result<(), EngineError> {
        let found = self.map.range::<[u8], _>((Bound::Unbounded, to)).next_back();
        self.stand_on(found)
    }
}

impl Cursor for SimCursor<'_> {
    fn seek(&mut self, key: &[u8]) -> Result<(), EngineError> {
        let key = Bytes::copy_from_slice(key.max(&self.start));
        self.forward(Bound::Included(&key))
    }

    fn seek_for_prev(&mut self, key: &[u8]) -> Result<(), EngineError> {
        match self.end.clone() {
            Some(end) if end <= key => self.backward(Bound::Excluded(&end)),
            _ => self.backward(Bound::Included(key)),
        }
    }

    fn seek_first(&mut self) -> Result<(), EngineError> {
        let start = self.start.clone();
        self.forward(Bound::Included(&start))
    }

    fn seek_last(&mut self) -> Result<(), EngineError> {
        match self.end.clone() {
            Some(end) => self.backward(Bound::Excluded(&end)),
            None => self.backward(Bound::Unbounded),
        }
    }

    fn next(&mut self) -> Result<(), EngineError> {
        let (key, _) = self.at.expect("the cursor stands on a key");
        self.forward(Bound::Excluded(key))
    }

    fn prev(&mut self) -> Result<(), EngineError> {
        let (key, _) = self.at.expect("the cursor stands on a key");
        self.backward(Bound::Excluded(key))
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.at.map(|(key, value)| (&key[..], &value[..]))
    }
}

fn broken(action: &'static str) -> EngineError {
    EngineError::Io {
        action,
        cause: "the virtual disk failed".to_owned(),
    }
}

impl Engine for SimEngine {
    type View<'a> = SimView;
    type Batch = SimBatch;

    fn view(&self) -> SimView {
        SimView {
            image: self.image(),
            health: self.health.clone(),
        }
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.health.read(family, key)?;
        Ok(self.inner().visible[family.0].get(key).cloned())
    }

    fn batch(&self) -> SimBatch {
        SimBatch::default()
    }

    fn write(&self, batch: SimBatch) -> Result<WriteStats, EngineError> {
        let stats = WriteStats {
            operations: batch.len(),
            bytes: batch.size_bytes(),
            fsyncs: 0,
        };
        let inner = &mut *self.inner();
        if inner.broken {
            return Err(broken("write"));
        }
        for write in &batch.0 {
            write.apply(&mut inner.visible);
        }
        self.health.overwritten(&batch.0);
        inner.unflushed.push_back(batch.0);
        Ok(stats)
    }

    fn flush(&self) -> Result<(), EngineError> {
        if self.inner().broken {
            return Err(broken("flush"));
        }
        self.flush_some(usize::MAX);
        Ok(())
    }

    fn get_durable(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.health.read(family, key)?;
        Ok(self.inner().durable[family.0].get(key).cloned())
    }

    fn disk_bytes(&self) -> u64 {
        self.live_bytes()
    }

    fn live_bytes(&self) -> u64 {
        let inner = self.inner();
        let records = inner.visible.iter().flat_map(|map| map.iter());
        records.map(|(key, value)| (key.len() + value.len()) as u64).sum()
    }

    fn compact_hint(&self, _: Family, _: KeyRange<'_>) {}

    fn stats(&self) -> Vec<EngineStat> {
        Vec::new()
    }
}
