//! The Raft log as raft-rs sees it: what is on disk, and before it the tail that may not be there yet.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use api::MemberId;
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
    /// Index and term of a snapshot that replaces all that is on disk, which does not know of it yet.
    base: Option<(u64, u64)>,
    /// Whom Raft wants to send a snapshot. Raft asks through a shared reference.
    wanted: RefCell<BTreeSet<MemberId>>,
    /// Snapshots to send, without their data.
    made: BTreeMap<MemberId, Snapshot>,
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
            base: None,
            wanted: RefCell::default(),
            made: BTreeMap::new(),
        }
    }

    /// The log begins anew after a snapshot that Raft accepted.
    pub(crate) fn install(&mut self, index: u64, term: u64) {
        self.tail.clear();
        self.tail_bytes = 0;
        self.base = Some((index, term));
        self.made.clear();
    }

    /// The log on disk begins anew as well.
    pub(crate) fn installed(&mut self) {
        self.base = None;
    }

    /// A snapshot is there to be sent to a member.
    pub(crate) fn snapshot_made(&mut self, to: MemberId, snapshot: Snapshot) {
        self.made.insert(to, snapshot);
    }

    /// The snapshot for a member was taken over, or is of no use any more. Whether there was one.
    pub(crate) fn drop_snapshot(&mut self, to: MemberId) -> bool {
        self.made.remove(&to).is_some()
    }

    /// None of the snapshots that were made is of use any more.
    pub(crate) fn drop_snapshots(&mut self) {
        self.made.clear();
    }

    /// Whom Raft wanted to send a snapshot since the last call.
    pub(crate) fn take_wanted(&mut self) -> BTreeSet<MemberId> {
        self.wanted.take()
    }

    fn first(&self) -> u64 {
        self.base.map_or_else(|| self.log.first_index(), |(index, _)| index + 1)
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
        match (self.tail.back(), self.base) {
            (Some(entry), _) => entry.index,
            (None, Some((index, _))) => index,
            (None, None) => self.log.last_index(),
        }
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
        if low < self.first() {
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
        match (self.tail_at(index), self.base) {
            (Some(entry), _) => Ok(entry.term),
            (None, Some((base, term))) if index == base => Ok(term),
            (None, Some((base, _))) if index < base => Err(StorageError::Compacted.into()),
            (None, Some(_)) => Err(StorageError::Unavailable.into()),
            (None, None) => self.log.term(index).map_err(storage_error),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        match self.made.get(&to) {
            // One that was made before the log was trimmed further would have the follower ask for another.
            Some(made) if made.get_metadata().index >= request_index.max(self.first() - 1) => Ok(made.clone()),
            _ => {
                self.wanted.borrow_mut().insert(to);
                Err(StorageError::SnapshotTemporarilyUnavailable.into())
            }
        }
    }
}
