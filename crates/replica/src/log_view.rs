//! The Raft log as raft-rs sees it: what is on disk, and before it the tail that may not be there yet.

use std::collections::VecDeque;
use std::sync::Arc;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use storage::{LogError, RaftLog};

/// A log on disk with a tail in memory. raft-rs counts an entry as stored once it is here; whether it is durable is told
/// to it apart.
pub struct LogView<L> {
    log: Arc<L>,
    hard_state: HardState,
    conf_state: ConfState,
    /// The newest entries, without gaps.
    tail: VecDeque<Entry>,
    tail_bytes: usize,
    tail_bytes_max: usize,
}

impl<L: RaftLog> LogView<L> {
    /// A view of `log`; up to `tail_bytes_max` bytes of entries that are no longer needed stay in memory for followers
    /// that lag a little.
    pub(crate) fn new(log: Arc<L>, hard_state: HardState, conf_state: ConfState, tail_bytes_max: usize) -> Self {
        LogView {
            log,
            hard_state,
            conf_state,
            tail: VecDeque::new(),
            tail_bytes: 0,
            tail_bytes_max,
        }
    }

    /// Adds entries that raft-rs decided on; they replace what was there from the first one's index on.
    pub(crate) fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        while let Some(last) = self.tail.back() {
            if last.index < first.index {
                assert_eq!(last.index + 1, first.index, "the log has no gaps");
                break;
            }
            let last = self.tail.pop_back().expect("there is a last one");
            self.tail_bytes -= entry_bytes(&last);
        }
        for entry in entries {
            self.tail_bytes += entry_bytes(entry);
            self.tail.push_back(entry.clone());
        }
    }

    /// Drops entries from memory that are on disk and applied, while there are more than the bound allows.
    pub(crate) fn evict(&mut self, durable_and_applied: u64) {
        while self.tail_bytes > self.tail_bytes_max
            && let Some(first) = self.tail.front()
            && first.index <= durable_and_applied
            && self.tail.len() > 1
        {
            let first = self.tail.pop_front().expect("there is a first one");
            self.tail_bytes -= entry_bytes(&first);
        }
    }

    fn tail_at(&self, index: u64) -> Option<&Entry> {
        let first = self.tail.front()?.index;
        self.tail.get(usize::try_from(index.checked_sub(first)?).ok()?)
    }

    fn last(&self) -> u64 {
        self.tail
            .back()
            .map_or_else(|| self.log.last_index(), |entry| entry.index)
    }
}

fn entry_bytes(entry: &Entry) -> usize {
    entry.data.len() + entry.context.len() + 48
}

fn storage_error(error: LogError) -> raft::Error {
    match error {
        LogError::Trimmed { .. } => StorageError::Compacted.into(),
        LogError::Missing { .. } => StorageError::Unavailable.into(),
        other => StorageError::Other(Box::new(other)).into(),
    }
}

impl<L: RaftLog> Storage for LogView<L> {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        let bytes_max = max_size.into().unwrap_or(u64::MAX);
        if high > self.last() + 1 {
            return Err(StorageError::Unavailable.into());
        }
        if low < self.log.first_index() {
            return Err(StorageError::Compacted.into());
        }
        let in_tail_from = self.tail.front().map_or(high, |entry| entry.index.min(high));
        let mut entries = Vec::new();
        let mut bytes = 0;
        if low < in_tail_from {
            entries = self.log.entries(low, in_tail_from, bytes_max).map_err(storage_error)?;
            bytes = entries.iter().map(|entry| entry_bytes(entry) as u64).sum();
            if (entries.len() as u64) < in_tail_from - low {
                return Ok(entries);
            }
        }
        for index in low.max(in_tail_from)..high {
            let entry = self.tail_at(index).expect("the tail has no gaps");
            bytes += entry_bytes(entry) as u64;
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(entry.clone());
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        match self.tail_at(index) {
            Some(entry) => Ok(entry.term),
            None => self.log.term(index).map_err(storage_error),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.log.first_index())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, _request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        // Asked for by a leader whose follower is behind the trimmed log. A single voter has no followers.
        Err(StorageError::SnapshotTemporarilyUnavailable.into())
    }
}
