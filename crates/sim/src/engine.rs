//! An [`Engine`] on a virtual disk: ordered maps, of which a crash leaves what was flushed.
//!
//! As RocksDB without its own log: batches are visible at once and durable only once they are flushed. A flush may also
//! come by itself, and then makes any prefix of the batches durable.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use storage::{Batch, Cursor, Engine, EngineError, EngineStat, Family, KeyRange, View, WriteStats};

type Map = BTreeMap<Bytes, Bytes>;

/// All families at one moment.
pub type Image = Vec<Arc<Map>>;

/// The engine. What is durable of it belongs to the virtual disk and outlives the process.
pub struct SimEngine(Mutex<Inner>);

struct Inner {
    visible: Image,
    durable: Image,
    /// Batches that are visible and not durable, in order.
    unflushed: VecDeque<Vec<Write>>,
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
    pub fn empty() -> Self {
        SimEngine::holding(vec![Arc::default(); mvcc::keys::FAMILIES.len()])
    }

    /// An engine that durably holds an image.
    pub fn holding(image: Image) -> Self {
        SimEngine(Mutex::new(Inner {
            visible: image.clone(),
            durable: image,
            unflushed: VecDeque::new(),
            broken: false,
        }))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("there is one thread")
    }

    /// What is visible now.
    pub fn image(&self) -> Image {
        self.inner().visible.clone()
    }

    /// What a crash leaves.
    pub fn after_crash(&self) -> Self {
        SimEngine::holding(self.inner().durable.clone())
    }

    /// Makes the oldest `count` unflushed batches durable.
    pub fn flush_some(&self, count: usize) {
        let inner = &mut *self.inner();
        let count = count.min(inner.unflushed.len());
        for batch in inner.unflushed.drain(..count) {
            for write in batch {
                write.apply(&mut inner.durable);
            }
        }
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

    /// Whether it fails.
    pub fn is_broken(&self) -> bool {
        self.inner().broken
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
pub struct SimView(Image);

impl SimView {
    /// A view of an image.
    pub fn of(image: Image) -> Self {
        SimView(image)
    }
}

impl View for SimView {
    type Cursor<'a> = SimCursor<'a>;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.0[family.0].get(key).cloned())
    }

    fn cursor<'a>(&'a self, family: Family, range: KeyRange<'_>) -> Result<SimCursor<'a>, EngineError> {
        Ok(SimCursor {
            map: &self.0[family.0],
            start: Bytes::copy_from_slice(range.start),
            end: range.end.map(Bytes::copy_from_slice),
            at: None,
        })
    }
}

/// A [`Cursor`] of [`SimView`].
pub struct SimCursor<'a> {
    map: &'a Map,
    start: Bytes,
    end: Option<Bytes>,
    at: Option<(&'a Bytes, &'a Bytes)>,
}

impl<'a> SimCursor<'a> {
    fn in_range(&self, found: Option<(&'a Bytes, &'a Bytes)>) -> Option<(&'a Bytes, &'a Bytes)> {
        found.filter(|(key, _)| **key >= self.start && self.end.as_ref().is_none_or(|end| *key < end))
    }

    fn forward(&mut self, from: Bound<&[u8]>) {
        let found = self.map.range::<[u8], _>((from, Bound::Unbounded)).next();
        self.at = self.in_range(found);
    }

    fn backward(&mut self, to: Bound<&[u8]>) {
        let found = self.map.range::<[u8], _>((Bound::Unbounded, to)).next_back();
        self.at = self.in_range(found);
    }
}

impl Cursor for SimCursor<'_> {
    fn seek(&mut self, key: &[u8]) -> Result<(), EngineError> {
        let key = Bytes::copy_from_slice(key.max(&self.start));
        self.forward(Bound::Included(&key));
        Ok(())
    }

    fn seek_for_prev(&mut self, key: &[u8]) -> Result<(), EngineError> {
        match self.end.clone() {
            Some(end) if end <= key => self.backward(Bound::Excluded(&end)),
            _ => self.backward(Bound::Included(key)),
        }
        Ok(())
    }

    fn seek_first(&mut self) -> Result<(), EngineError> {
        let start = self.start.clone();
        self.forward(Bound::Included(&start));
        Ok(())
    }

    fn seek_last(&mut self) -> Result<(), EngineError> {
        match self.end.clone() {
            Some(end) => self.backward(Bound::Excluded(&end)),
            None => self.backward(Bound::Unbounded),
        }
        Ok(())
    }

    fn next(&mut self) -> Result<(), EngineError> {
        let (key, _) = self.at.expect("the cursor stands on a key");
        self.forward(Bound::Excluded(key));
        Ok(())
    }

    fn prev(&mut self) -> Result<(), EngineError> {
        let (key, _) = self.at.expect("the cursor stands on a key");
        self.backward(Bound::Excluded(key));
        Ok(())
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
        SimView(self.image())
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
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
        Ok(self.inner().durable[family.0].get(key).cloned())
    }

    fn disk_bytes(&self) -> u64 {
        0
    }

    fn live_bytes(&self) -> u64 {
        0
    }

    fn compact_hint(&self, _: Family, _: KeyRange<'_>) {}

    fn stats(&self) -> Vec<EngineStat> {
        Vec::new()
    }
}
