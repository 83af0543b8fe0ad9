//! An engine of plain maps: the shortest thing that keeps the promises of the trait.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, RwLock};

use bytes::Bytes;
use storage::{Batch, Cursor, Engine, EngineError, EngineStat, Family, FamilySpec, KeyRange, View, WriteStats};

type Map = BTreeMap<Bytes, Bytes>;

/// Maps behind a lock; a write copies those that a view still looks at.
pub struct MapEngine(RwLock<Vec<Arc<Map>>>);

impl MapEngine {
    pub fn new(families: &[FamilySpec]) -> Self {
        MapEngine(RwLock::new(vec![Arc::default(); families.len()]))
    }
}

enum Write {
    Put(Family, Bytes, Bytes),
    Delete(Family, Bytes),
    DeleteRange(Family, Bytes, Bytes),
}

#[derive(Default)]
pub struct MapBatch(Vec<Write>);

impl Batch for MapBatch {
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

pub struct MapView(Vec<Arc<Map>>);

impl View for MapView {
    type Cursor<'a> = MapCursor<'a>;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.0[family.0].get(key).cloned())
    }

    fn cursor<'a>(&'a self, family: Family, range: KeyRange<'_>) -> Result<MapCursor<'a>, EngineError> {
        Ok(MapCursor {
            map: &self.0[family.0],
            start: Bytes::copy_from_slice(range.start),
            end: range.end.map(Bytes::copy_from_slice),
            at: None,
        })
    }
}

pub struct MapCursor<'a> {
    map: &'a Map,
    start: Bytes,
    end: Option<Bytes>,
    at: Option<(&'a Bytes, &'a Bytes)>,
}

impl<'a> MapCursor<'a> {
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

impl Cursor for MapCursor<'_> {
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

impl Engine for MapEngine {
    type View<'a> = MapView;
    type Batch = MapBatch;

    fn view(&self) -> MapView {
        MapView(self.0.read().expect("no writer panicked").clone())
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.view().get(family, key)
    }

    fn batch(&self) -> MapBatch {
        MapBatch::default()
    }

    fn write(&self, batch: MapBatch) -> Result<WriteStats, EngineError> {
        let stats = WriteStats {
            operations: batch.len(),
            bytes: batch.size_bytes(),
            fsyncs: 0,
        };
        let mut maps = self.0.write().expect("no writer panicked");
        for write in batch.0 {
            match write {
                Write::Put(family, key, value) => drop(Arc::make_mut(&mut maps[family.0]).insert(key, value)),
                Write::Delete(family, key) => drop(Arc::make_mut(&mut maps[family.0]).remove(&key)),
                Write::DeleteRange(family, start, end) => {
                    Arc::make_mut(&mut maps[family.0]).retain(|key, _| *key < start || *key >= end);
                }
            }
        }
        Ok(stats)
    }

    fn flush(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn get_durable(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.get(family, key)
    }

    fn disk_bytes(&self) -> u64 {
        0
    }

    fn live_bytes(&self) -> u64 {
        0
    }

    fn compact_hint(&self, _family: Family, _range: KeyRange<'_>) {}

    fn stats(&self) -> Vec<EngineStat> {
        Vec::new()
    }
}
