//! [`AnyEngine`]: the engine that the configuration names, as one type, so that the code above is compiled once.

use std::path::Path;

use bytes::Bytes;

use crate::engine::{Batch, Cursor, Engine, EngineError, EngineStat, Family, FamilySpec, KeyRange, View, WriteStats};
use crate::memory::{MemoryBatch, MemoryCursor, MemoryEngine, MemoryView};
use crate::rocks::{RocksBatch, RocksCursor, RocksEngine, RocksOptions, RocksView};

/// One of the engines of this crate.
pub enum AnyEngine {
    /// On disk.
    Rocks(RocksEngine),
    /// In memory.
    Memory(MemoryEngine),
}

/// A batch of [`AnyEngine`].
pub enum AnyBatch {
    /// For [`AnyEngine::Rocks`].
    Rocks(RocksBatch),
    /// For [`AnyEngine::Memory`].
    Memory(MemoryBatch),
}

/// A view of [`AnyEngine`].
pub enum AnyView<'a> {
    /// Of [`AnyEngine::Rocks`].
    Rocks(RocksView<'a>),
    /// Of [`AnyEngine::Memory`].
    Memory(MemoryView<'a>),
}

/// A cursor of [`AnyView`].
pub enum AnyCursor<'a> {
    /// Of [`AnyView::Rocks`].
    Rocks(RocksCursor<'a>),
    /// Of [`AnyView::Memory`].
    Memory(MemoryCursor<'a>),
}

impl AnyEngine {
    /// Opens RocksDB in `dir`.
    ///
    /// # Errors
    /// As [`RocksEngine::open`].
    pub fn open_rocks(dir: &Path, families: &[FamilySpec], options: &RocksOptions) -> Result<AnyEngine, EngineError> {
        RocksEngine::open(dir, families, options).map(AnyEngine::Rocks)
    }

    /// Opens the engine in memory, whose snapshots lie in `dir`.
    ///
    /// # Errors
    /// As [`MemoryEngine::open`].
    pub fn open_memory(dir: &Path, families: &[FamilySpec]) -> Result<AnyEngine, EngineError> {
        MemoryEngine::open(dir, families).map(AnyEngine::Memory)
    }
}

/// Calls the same method of whichever it is.
macro_rules! dispatch {
    ($kind:ident, $value:expr, $inner:ident => $call:expr) => {
        match $value {
            $kind::Rocks($inner) => $call,
            $kind::Memory($inner) => $call,
        }
    };
}

impl Engine for AnyEngine {
    type View<'a> = AnyView<'a>;
    type Batch = AnyBatch;

    fn view(&self) -> AnyView<'_> {
        match self {
            AnyEngine::Rocks(engine) => AnyView::Rocks(engine.view()),
            AnyEngine::Memory(engine) => AnyView::Memory(engine.view()),
        }
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        dispatch!(AnyEngine, self, engine => engine.get(family, key))
    }

    fn batch(&self) -> AnyBatch {
        match self {
            AnyEngine::Rocks(engine) => AnyBatch::Rocks(engine.batch()),
            AnyEngine::Memory(engine) => AnyBatch::Memory(engine.batch()),
        }
    }

    fn write(&self, batch: AnyBatch) -> Result<WriteStats, EngineError> {
        match (self, batch) {
            (AnyEngine::Rocks(engine), AnyBatch::Rocks(batch)) => engine.write(batch),
            (AnyEngine::Memory(engine), AnyBatch::Memory(batch)) => engine.write(batch),
            _ => panic!("a batch goes to the engine that made it"),
        }
    }

    fn flush(&self) -> Result<(), EngineError> {
        dispatch!(AnyEngine, self, engine => engine.flush())
    }

    fn get_durable(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        dispatch!(AnyEngine, self, engine => engine.get_durable(family, key))
    }

    fn disk_bytes(&self) -> u64 {
        dispatch!(AnyEngine, self, engine => engine.disk_bytes())
    }

    fn live_bytes(&self) -> u64 {
        dispatch!(AnyEngine, self, engine => engine.live_bytes())
    }

    fn compact_hint(&self, family: Family, range: KeyRange<'_>) {
        dispatch!(AnyEngine, self, engine => engine.compact_hint(family, range));
    }

    fn stats(&self) -> Vec<EngineStat> {
        dispatch!(AnyEngine, self, engine => engine.stats())
    }
}

impl Batch for AnyBatch {
    fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        dispatch!(AnyBatch, self, batch => batch.put(family, key, value));
    }

    fn delete(&mut self, family: Family, key: &[u8]) {
        dispatch!(AnyBatch, self, batch => batch.delete(family, key));
    }

    fn delete_range(&mut self, family: Family, start: &[u8], end: &[u8]) {
        dispatch!(AnyBatch, self, batch => batch.delete_range(family, start, end));
    }

    fn len(&self) -> usize {
        dispatch!(AnyBatch, self, batch => batch.len())
    }

    fn size_bytes(&self) -> usize {
        dispatch!(AnyBatch, self, batch => batch.size_bytes())
    }
}

impl<'v> View for AnyView<'v> {
    type Cursor<'a>
        = AnyCursor<'a>
    where
        Self: 'a;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        dispatch!(AnyView, self, view => view.get(family, key))
    }

    fn cursor<'a>(&'a self, family: Family, range: KeyRange<'_>) -> Result<AnyCursor<'a>, EngineError> {
        match self {
            AnyView::Rocks(view) => view.cursor(family, range).map(AnyCursor::Rocks),
            AnyView::Memory(view) => view.cursor(family, range).map(AnyCursor::Memory),
        }
    }
}

impl Cursor for AnyCursor<'_> {
    fn seek(&mut self, key: &[u8]) -> Result<(), EngineError> {
        dispatch!(AnyCursor, self, cursor => cursor.seek(key))
    }

    fn seek_for_prev(&mut self, key: &[u8]) -> Result<(), EngineError> {
        dispatch!(AnyCursor, self, cursor => cursor.seek_for_prev(key))
    }

    fn seek_first(&mut self) -> Result<(), EngineError> {
        dispatch!(AnyCursor, self, cursor => cursor.seek_first())
    }

    fn seek_last(&mut self) -> Result<(), EngineError> {
        dispatch!(AnyCursor, self, cursor => cursor.seek_last())
    }

    fn next(&mut self) -> Result<(), EngineError> {
        dispatch!(AnyCursor, self, cursor => cursor.next())
    }

    fn prev(&mut self) -> Result<(), EngineError> {
        dispatch!(AnyCursor, self, cursor => cursor.prev())
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        dispatch!(AnyCursor, self, cursor => cursor.entry())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{FAMILIES, engine};

    #[test]
    fn either_passes_the_conformance_suite() {
        let dir = tempfile::tempdir().unwrap();
        let options = RocksOptions::default();
        engine(|name| AnyEngine::open_rocks(&dir.path().join("rocksdb").join(name), FAMILIES, &options).unwrap());
        engine(|name| AnyEngine::open_memory(&dir.path().join("memory").join(name), FAMILIES).unwrap());
    }
}
