//! Either engine behind one type, so that everything above is compiled once and the choice is a flag.

use std::path::Path;

use bytes::Bytes;

use crate::engine::{
    Batch, Cursor, Engine, EngineError, EngineStat, Family, FamilySpec, KeyRange, View, WriteStats,
};
use crate::memory::{MemoryBatch, MemoryCursor, MemoryEngine, MemoryView};
use crate::rocks::{RocksBatch, RocksCursor, RocksEngine, RocksOptions, RocksView};

/// RocksDB or memory.
pub enum AnyEngine {
    /// See [`RocksEngine`].
    Rocks(RocksEngine),
    /// See [`MemoryEngine`].
    Memory(MemoryEngine),
}

/// A view of either engine.
pub enum AnyView<'a> {
    /// See [`RocksView`].
    Rocks(RocksView<'a>),
    /// See [`MemoryView`].
    Memory(MemoryView<'a>),
}

/// A cursor over either engine.
pub enum AnyCursor<'a> {
    /// See [`RocksCursor`].
    Rocks(RocksCursor<'a>),
    /// See [`MemoryCursor`].
    Memory(MemoryCursor<'a>),
}

/// A batch for either engine.
pub enum AnyBatch {
    /// See [`RocksBatch`].
    Rocks(RocksBatch),
    /// See [`MemoryBatch`].
    Memory(MemoryBatch),
}

impl AnyEngine {
    /// See [`RocksEngine::open`].
    pub fn open_rocks(dir: &Path, families: &[FamilySpec], options: &RocksOptions) -> Result<Self, EngineError> {
        RocksEngine::open(dir, families, options).map(AnyEngine::Rocks)
    }

    /// See [`MemoryEngine::open`].
    pub fn open_memory(dir: &Path, families: &[FamilySpec]) -> Result<Self, EngineError> {
        MemoryEngine::open(dir, families).map(AnyEngine::Memory)
    }
}

/// Calls the same on whichever it is.
macro_rules! either {
    ($of:ident, $value:expr, $inner:ident => $call:expr) => {
        match $value {
            $of::Rocks($inner) => $call,
            $of::Memory($inner) => $call,
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
        either!(AnyEngine, self, engine => engine.get(family, key))
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
            _ => panic!("a batch is written to the engine that made it"),
        }
    }

    fn flush(&self) -> Result<(), EngineError> {
        either!(AnyEngine, self, engine => engine.flush())
    }

    fn get_durable(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        either!(AnyEngine, self, engine => engine.get_durable(family, key))
    }

    fn disk_bytes(&self) -> u64 {
        either!(AnyEngine, self, engine => engine.disk_bytes())
    }

    fn live_bytes(&self) -> u64 {
        either!(AnyEngine, self, engine => engine.live_bytes())
    }

    fn compact_hint(&self, family: Family, range: KeyRange<'_>) {
        either!(AnyEngine, self, engine => engine.compact_hint(family, range))
    }

    fn stats(&self) -> Vec<EngineStat> {
        either!(AnyEngine, self, engine => engine.stats())
    }
}

impl Batch for AnyBatch {
    fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        either!(AnyBatch, self, batch => batch.put(family, key, value))
    }

    fn delete(&mut self, family: Family, key: &[u8]) {
        either!(AnyBatch, self, batch => batch.delete(family, key))
    }

    fn delete_range(&mut self, family: Family, start: &[u8], end: &[u8]) {
        either!(AnyBatch, self, batch => batch.delete_range(family, start, end))
    }

    fn len(&self) -> usize {
        either!(AnyBatch, self, batch => batch.len())
    }

    fn size_bytes(&self) -> usize {
        either!(AnyBatch, self, batch => batch.size_bytes())
    }
}

impl<'v> View for AnyView<'v> {
    type Cursor<'a>
        = AnyCursor<'a>
    where
        Self: 'a;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        either!(AnyView, self, view => view.get(family, key))
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
        either!(AnyCursor, self, cursor => cursor.seek(key))
    }

    fn seek_for_prev(&mut self, key: &[u8]) -> Result<(), EngineError> {
        either!(AnyCursor, self, cursor => cursor.seek_for_prev(key))
    }

    fn seek_first(&mut self) -> Result<(), EngineError> {
        either!(AnyCursor, self, cursor => cursor.seek_first())
    }

    fn seek_last(&mut self) -> Result<(), EngineError> {
        either!(AnyCursor, self, cursor => cursor.seek_last())
    }

    fn next(&mut self) -> Result<(), EngineError> {
        either!(AnyCursor, self, cursor => cursor.next())
    }

    fn prev(&mut self) -> Result<(), EngineError> {
        either!(AnyCursor, self, cursor => cursor.prev())
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        either!(AnyCursor, self, cursor => cursor.entry())
    }
}
