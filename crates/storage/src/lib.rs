//! All file I/O of MetaStore: the [`Engine`] and [`RaftLog`] traits and their adapters, and the data directory.
//!
//! Nothing here knows what is stored. The traits are small enough that a simulator can stand in for the disk, and
//! [`conformance`] is the suite that every adapter passes.

pub mod any_engine;
pub mod bbolt;
pub mod conformance;
pub mod data_dir;
pub mod disk;
pub mod engine;
pub mod memory;
pub mod raft_engine_log;
pub mod raft_log;
pub mod rocks;
pub mod sorter;

pub use any_engine::AnyEngine;
pub use data_dir::{DataDir, DataDirError, EngineDir, Identity, StorageKind};
pub use engine::{
    Access, Batch, Cursor, Engine, EngineError, EngineStat, Family, FamilySpec, KeyRange, View, WriteStats,
};
pub use memory::MemoryEngine;
pub use raft_engine_log::{RaftEngineLog, RaftLogOptions, TornTail};
pub use raft_log::{AppendStats, LogError, RaftLog};
pub use rocks::{Compression, RocksEngine, RocksOptions};
pub use sorter::{SortError, Sorted, Sorter};
