//! What the tests of a replica share.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use api::RequestId;
use api::codec::{Action, Operation, encode_operation};
use api::kv::PutRequest;
use metastore_replica::{Input, Proposal};
use parking_lot::Mutex;
use raft::eraftpb::{Entry, HardState};
use storage::{AppendStats, LogError, RaftLog};

/// A log in memory whose writes are durable when the test says so: a crash loses the rest.
#[derive(Default)]
pub(crate) struct TestLog(pub(crate) Mutex<LogState>);

#[derive(Default, Clone)]
pub(crate) struct LogState {
    pub(crate) trimmed: u64,
    pub(crate) trimmed_term: u64,
    pub(crate) entries: Vec<Entry>,
    pub(crate) hard_state: HardState,
}

impl RaftLog for TestLog {
    fn append(&self, entries: &[Entry], hard_state: Option<&HardState>, _: bool) -> Result<AppendStats, LogError> {
        let mut state = self.0.lock();
        if let Some(first) = entries.first() {
            let keep = (first.index - 1 - state.trimmed) as usize;
            state.entries.truncate(keep);
            state.entries.extend_from_slice(entries);
        }
        if let Some(hard_state) = hard_state {
            state.hard_state = hard_state.clone();
        }
        Ok(AppendStats::default())
    }

    fn hard_state(&self) -> Result<HardState, LogError> {
        Ok(self.0.lock().hard_state.clone())
    }

    fn entries(&self, low: u64, high: u64, _: u64) -> Result<Vec<Entry>, LogError> {
        let state = self.0.lock();
        Ok(state.entries[(low - 1 - state.trimmed) as usize..(high - 1 - state.trimmed) as usize].to_vec())
    }

    fn term(&self, index: u64) -> Result<u64, LogError> {
        let state = self.0.lock();
        if index == state.trimmed {
            return Ok(state.trimmed_term);
        }
        let last = state.trimmed + state.entries.len() as u64;
        let at = index
            .checked_sub(state.trimmed + 1)
            .and_then(|at| state.entries.get(at as usize));
        at.map(|entry| entry.term)
            .ok_or(LogError::Missing { last, asked: index })
    }

    fn first_index(&self) -> u64 {
        self.0.lock().trimmed + 1
    }

    fn last_index(&self) -> u64 {
        let state = self.0.lock();
        state.trimmed + state.entries.len() as u64
    }

    fn trim(&self, index: u64) -> Result<(), LogError> {
        let term = self.term(index - 1)?;
        let mut state = self.0.lock();
        let count = (index - 1 - state.trimmed) as usize;
        state.entries.drain(..count);
        (state.trimmed, state.trimmed_term) = (index - 1, term);
        Ok(())
    }

    fn reset(&self, _: u64, _: u64, _: &HardState) -> Result<(), LogError> {
        unreachable!("no snapshots here")
    }

    fn disk_bytes(&self) -> u64 {
        0
    }
}

/// A put of so many bytes.
pub(crate) fn propose(id: RequestId, value_len: usize) -> Input {
    let put = PutRequest {
        key: "k".into(),
        value: vec![b'v'; value_len].into(),
        ..Default::default()
    };
    let operation = encode_operation(&Operation::new(id, Action::Put(put)));
    Input::Propose(Proposal {
        id,
        operation,
        leader_term: 0,
    })
}
