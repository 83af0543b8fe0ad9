//! The virtual disks pass the suites that the real adapters pass, crashes included.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use fastrand::Rng;
use metastore_sim::engine::{Kind, SimBatch, SimEngine, SimView};
use metastore_sim::log::SimLog;
use raft::eraftpb::{Entry, HardState};
use storage::{AppendStats, Engine, EngineError, EngineStat, Family, KeyRange, LogError, RaftLog, WriteStats};

/// An engine that is on a disk somewhere else.
struct OnDisk<T>(Arc<T>);

impl Engine for OnDisk<SimEngine> {
    type View<'a> = SimView;
    type Batch = SimBatch;

    fn view(&self) -> SimView {
        self.0.view()
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.0.get(family, key)
    }

    fn batch(&self) -> SimBatch {
        self.0.batch()
    }

    fn write(&self, batch: SimBatch) -> Result<WriteStats, EngineError> {
        self.0.write(batch)
    }

    fn flush(&self) -> Result<(), EngineError> {
        self.0.flush()
    }

    fn get_durable(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.0.get_durable(family, key)
    }

    fn disk_bytes(&self) -> u64 {
        self.0.disk_bytes()
    }

    fn live_bytes(&self) -> u64 {
        self.0.live_bytes()
    }

    fn compact_hint(&self, family: Family, range: KeyRange<'_>) {
        self.0.compact_hint(family, range);
    }

    fn stats(&self) -> Vec<EngineStat> {
        self.0.stats()
    }
}

impl RaftLog for OnDisk<SimLog> {
    fn append(&self, entries: &[Entry], hard_state: Option<&HardState>, sync: bool) -> Result<AppendStats, LogError> {
        self.0.append(entries, hard_state, sync)
    }

    fn hard_state(&self) -> Result<HardState, LogError> {
        self.0.hard_state()
    }

    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, LogError> {
        self.0.entries(low, high, bytes_max)
    }

    fn term(&self, index: u64) -> Result<u64, LogError> {
        self.0.term(index)
    }

    fn first_index(&self) -> u64 {
        self.0.first_index()
    }

    fn last_index(&self) -> u64 {
        self.0.last_index()
    }

    fn trim(&self, index: u64) -> Result<(), LogError> {
        self.0.trim(index)
    }

    fn reset(&self, index: u64, term: u64, hard_state: &HardState) -> Result<(), LogError> {
        self.0.reset(index, term, hard_state)
    }

    fn disk_bytes(&self) -> u64 {
        self.0.disk_bytes()
    }
}

#[test]
fn every_kind_of_engine_passes_the_conformance_suite() {
    for kind in [Kind::Rocks, Kind::RocksWal, Kind::Memory] {
        let mut rng = Rng::with_seed(7);
        let mut disks: HashMap<String, Arc<SimEngine>> = HashMap::new();
        storage::conformance::engine(|name| {
            let disk = disks.get(name).map(|before| before.after_crash(rng.f64()));
            let disk = Arc::new(disk.unwrap_or_else(|| SimEngine::empty(kind)));
            disks.insert(name.to_owned(), disk.clone());
            OnDisk(disk)
        });
    }
}

#[test]
fn the_log_passes_the_conformance_suite() {
    let mut disks: HashMap<String, Arc<SimLog>> = HashMap::new();
    storage::conformance::raft_log(|name| {
        // A process that ends leaves what it has written.
        let disk = disks
            .get(name)
            .map_or_else(SimLog::default, |before| before.after_crash(1.0).0);
        let disk = Arc::new(disk);
        disks.insert(name.to_owned(), disk.clone());
        OnDisk(disk)
    });
}
