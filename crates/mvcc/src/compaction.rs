//! Forgets history, in small steps.
//!
//! A compaction is logical first: applying it moves one number, and from then on readers are refused what lies before
//! it, whatever is still on disk. The physical part follows in steps of bounded work between apply steps, so it never
//! holds a writer up for long, and its cost grows with what changed after the compaction, not with the store:
//!
//! 1. *Keep*: a change after the compacted revision may point back to one before it, which reads at or after the
//!    compacted revision still need. Scan the log after the compacted revision and move each such change to its
//!    successor ([`keys::kept_key`]). Changes that are applied from now on do that for themselves.
//! 2. *Bury*: drop tombstones up to the compacted revision from the newest records, found by their index.
//! 3. *Drop*: three range deletions: the log before the compacted revision, what earlier compactions kept for changes
//!    that now are history themselves, and the index of tombstones.
//!
//! The log at exactly the compacted revision stays: a watcher may begin there. A crash at any point is harmless: every
//! step can be done again.

use prost::Message;
use storage::{Batch, Cursor, Engine, EngineError, KeyRange, View};

use crate::keys::{self, Position, SizesRecord, StateRecord};
use crate::machine::Machine;

/// Most bytes that one step moves, exceeded by one record at most: large values must not make long steps.
const STEP_BYTES_MAX: usize = 1 << 20;

/// A physical compaction that is under way.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// The compacted revision.
    target: i64,
    /// The newest revision when the compaction was applied; later changes keep for themselves what they point to.
    head: i64,
    /// Bytes of the log when the compaction was applied, and those of it that stay, as far as they were looked at.
    log_bytes: u64,
    kept_bytes: u64,
    phase: Phase,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Keep { next: Position },
    Bury { next: Position },
    Drop,
}

/// What a step of compaction did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompactionProgress {
    /// There was nothing to do.
    Idle,
    /// There is more to do.
    Going {
        /// Keys looked at.
        scanned: usize,
    },
    /// Everything up to this revision is done.
    Done {
        /// The compacted revision.
        revision: i64,
    },
}

impl Job {
    fn new(state: &StateRecord, log_bytes: u64) -> Self {
        let next = Position::start_of(state.compacted + 1);
        Job {
            target: state.compacted,
            head: state.revision,
            log_bytes,
            kept_bytes: 0,
            phase: Phase::Keep { next },
        }
    }

    /// What is left to do when the machine starts.
    pub(crate) fn resume(done: i64, state: &StateRecord, log_bytes: u64) -> Option<Self> {
        (state.compacted > done).then(|| Job::new(state, log_bytes))
    }

    /// Begins again if the compacted revision moved on.
    pub(crate) fn renew(job: &mut Option<Self>, state: &StateRecord, log_bytes: u64) {
        if job.as_ref().is_none_or(|job| job.target < state.compacted) {
            *job = Some(Job::new(state, log_bytes));
        }
    }
}

impl<E: Engine> Machine<E> {
    /// Does a bounded piece of compaction: looks at no more than `keys_max` keys. Call it between apply steps for as
    /// long as it answers [`CompactionProgress::Going`].
    ///
    /// # Errors
    /// Any error is final: the caller stops the node.
    pub fn compact_step(&mut self, keys_max: usize) -> Result<CompactionProgress, EngineError> {
        let Some(mut job) = self.job.take() else {
            return Ok(CompactionProgress::Idle);
        };
        let mut batch = self.engine.batch();
        let mut scanned = 0;
        let next = match job.phase {
            Phase::Keep { next } => {
                let end = Position::start_of(job.head + 1);
                match self.keep(&mut batch, &mut job, next..end, keys_max, &mut scanned)? {
                    Some(next) => Phase::Keep { next },
                    None => Phase::Bury {
                        next: Position::start_of(0),
                    },
                }
            }
            Phase::Bury { next } => {
                let end = Position::start_of(job.target + 1);
                match self.bury(&mut batch, next..end, keys_max, &mut scanned)? {
                    Some(next) => Phase::Bury { next },
                    None => Phase::Drop,
                }
            }
            Phase::Drop => {
                let zero = Position::start_of(0);
                let past = Position::start_of(job.target + 1);
                let log_end = keys::log_key(Position::start_of(job.target));
                batch.delete_range(keys::REV, &keys::log_key(zero), &log_end);
                batch.delete_range(keys::REV, &keys::kept_key(zero), &keys::kept_key(past));
                batch.delete_range(keys::REV, &keys::tombstone_key(zero), &keys::tombstone_key(past));
                batch.put(keys::META, keys::COMPACTED, &job.target.to_be_bytes());
                self.log_bytes = self.log_bytes - job.log_bytes + job.kept_bytes;
                let sizes = SizesRecord {
                    log_bytes: self.log_bytes,
                };
                batch.put(keys::META, keys::SIZES, &sizes.encode_to_vec());
                self.engine.write(batch)?;
                let dropped = KeyRange {
                    start: &keys::log_key(zero),
                    end: Some(&log_end),
                };
                self.engine.compact_hint(keys::REV, dropped);
                let published = self.published();
                published
                    .log_bytes
                    .store(self.log_bytes, std::sync::atomic::Ordering::Relaxed);
                published
                    .compacted_physically
                    .store(job.target, std::sync::atomic::Ordering::Release);
                return Ok(CompactionProgress::Done { revision: job.target });
            }
        };
        if !batch.is_empty() {
            self.engine.write(batch)?;
        }
        self.job = Some(Job { phase: next, ..job });
        Ok(CompactionProgress::Going { scanned })
    }

    /// Moves what changes in `range` point to, before the job's target, to where it survives. Returns where to go on.
    fn keep(
        &mut self,
        batch: &mut E::Batch,
        job: &mut Job,
        range: std::ops::Range<Position>,
        keys_max: usize,
        scanned: &mut usize,
    ) -> Result<Option<Position>, EngineError> {
        let view = self.engine.view();
        let (start, end) = (keys::log_key(range.start), keys::log_key(range.end));
        let mut cursor = view.cursor(
            keys::REV,
            KeyRange {
                start: &start,
                end: Some(&end),
            },
        )?;
        cursor.seek_first()?;
        while let Some((key, data)) = cursor.entry() {
            let at = keys::position_of(key)?;
            if *scanned == keys_max || batch.size_bytes() >= STEP_BYTES_MAX {
                return Ok(Some(at));
            }
            *scanned += 1;
            job.kept_bytes += (key.len() + data.len()) as u64;
            let (_, record) = keys::decode_change(data)?;
            if let Some(prev) = record.prev
                && prev.main < job.target
            {
                let kept = keys::kept_key(at);
                // What is gone from the log was kept by an earlier compaction, or by the change itself.
                if let Some(data) = view.get(keys::REV, &keys::log_key(prev))? {
                    batch.put(keys::REV, &kept, &data);
                } else if view.get(keys::REV, &kept)?.is_none() {
                    let cause = format!("the change at {at:?} points to {prev:?}, which is neither logged nor kept");
                    return Err(keys::corrupt("rev", cause));
                }
            }
            cursor.next()?;
        }
        Ok(None)
    }

    /// Drops the tombstones in `range` that still are their keys' newest records. Returns where to go on.
    fn bury(
        &mut self,
        batch: &mut E::Batch,
        range: std::ops::Range<Position>,
        keys_max: usize,
        scanned: &mut usize,
    ) -> Result<Option<Position>, EngineError> {
        let view = self.engine.view();
        let (start, end) = (keys::tombstone_key(range.start), keys::tombstone_key(range.end));
        let mut cursor = view.cursor(
            keys::REV,
            KeyRange {
                start: &start,
                end: Some(&end),
            },
        )?;
        cursor.seek_first()?;
        while let Some((index_key, key)) = cursor.entry() {
            let at = keys::position_of(index_key)?;
            if *scanned == keys_max {
                return Ok(Some(at));
            }
            *scanned += 1;
            if let Some(data) = view.get(keys::CUR, key)?
                && keys::RecordRef::decode(&data)?.at == at
            {
                batch.delete(keys::CUR, key);
                self.cache.remove(key);
            }
            cursor.next()?;
        }
        Ok(None)
    }
}
