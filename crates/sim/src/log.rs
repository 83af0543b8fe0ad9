//! A [`RaftLog`] on a virtual disk that tells what is written from what is synced.
//!
//! Each append is a record that is whole or not there, as in raft-engine. A crash keeps all that was synced, and of what
//! was written since a prefix that chance chooses: the rest is lost or torn, which comes to the same.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use raft::eraftpb::{Entry, HardState};
use storage::{AppendStats, LogError, RaftLog};

/// What a log holds.
#[derive(Default, Clone)]
struct State {
    /// The index and term right before the first entry.
    trimmed: u64,
    trimmed_term: u64,
    entries: VecDeque<Entry>,
    hard_state: HardState,
}

impl State {
    fn first(&self) -> u64 {
        self.trimmed + 1
    }

    fn last(&self) -> u64 {
        self.trimmed + self.entries.len() as u64
    }

    fn entry(&self, index: u64) -> Option<&Entry> {
        self.entries
            .get(usize::try_from(index.checked_sub(self.first())?).ok()?)
    }

    fn term(&self, index: u64) -> Result<u64, LogError> {
        if index == self.trimmed {
            return Ok(self.trimmed_term);
        }
        if index < self.trimmed {
            return Err(LogError::Trimmed {
                first: self.first(),
                asked: index,
            });
        }
        self.entry(index).map(|entry| entry.term).ok_or(LogError::Missing {
            last: self.last(),
            asked: index,
        })
    }

    fn apply(&mut self, record: &Record) {
        match record {
            Record::Append(entries, hard_state) => {
                if let Some(first) = entries.first() {
                    self.entries.truncate((first.index - self.first()) as usize);
                    self.entries.extend(entries.iter().cloned());
                }
                if let Some(hard_state) = hard_state {
                    self.hard_state = hard_state.clone();
                }
            }
            Record::Trim(index) => {
                let (index, term) = (*index, self.term(index - 1).expect("it was there when it was trimmed"));
                self.entries.drain(..(index - self.first()) as usize);
                (self.trimmed, self.trimmed_term) = (index - 1, term);
            }
        }
    }
}

#[derive(Clone)]
enum Record {
    Append(Vec<Entry>, Option<HardState>),
    Trim(u64),
}

#[derive(Default)]
struct Inner {
    written: State,
    synced: State,
    unsynced: Vec<Record>,
    broken: bool,
}

/// The log. What is synced of it belongs to the virtual disk and outlives the process.
#[derive(Default)]
pub struct SimLog(Mutex<Inner>);

impl SimLog {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("there is one thread")
    }

    fn holding(state: State) -> Self {
        SimLog(Mutex::new(Inner {
            written: state.clone(),
            synced: state,
            ..Default::default()
        }))
    }

    /// What a log holds that begins a new cluster.
    pub fn bootstrapped(entries: Vec<Entry>, hard_state: HardState) -> Self {
        SimLog::holding(State {
            entries: entries.into(),
            hard_state,
            ..Default::default()
        })
    }

    /// Everything written is on disk.
    pub fn sync(&self) {
        let inner = &mut *self.inner();
        for record in inner.unsynced.drain(..) {
            inner.synced.apply(&record);
        }
    }

    /// How many records a crash may lose.
    pub fn unsynced(&self) -> usize {
        self.inner().unsynced.len()
    }

    /// What a crash leaves if so many of the unsynced records made it to the disk.
    pub fn after_crash(&self, survivors: usize) -> Self {
        let inner = self.inner();
        let mut state = inner.synced.clone();
        for record in &inner.unsynced[..survivors] {
            state.apply(record);
        }
        SimLog::holding(state)
    }

    /// A broken disk: the hard state is gone.
    pub fn lose_hard_state(&self) {
        let inner = &mut *self.inner();
        (inner.written.hard_state, inner.synced.hard_state) = Default::default();
    }

    /// From now on every append fails.
    pub fn break_down(&self) {
        self.inner().broken = true;
    }

    /// Whether it fails.
    pub fn is_broken(&self) -> bool {
        self.inner().broken
    }

    /// The term of the newest entry or of what lies before it, as written.
    pub fn last_term(&self) -> u64 {
        let inner = self.inner();
        inner.written.term(inner.written.last()).expect("the last one is there")
    }
}

impl RaftLog for SimLog {
    fn append(&self, entries: &[Entry], hard_state: Option<&HardState>, sync: bool) -> Result<AppendStats, LogError> {
        {
            let inner = &mut *self.inner();
            if inner.broken {
                return Err(LogError::Io {
                    action: "append",
                    cause: "the virtual disk failed".to_owned(),
                });
            }
            if let Some(first) = entries.first() {
                let (low, last) = (inner.written.first(), inner.written.last());
                if first.index < low {
                    return Err(LogError::Trimmed {
                        first: low,
                        asked: first.index,
                    });
                }
                if first.index > last + 1 {
                    return Err(LogError::Missing {
                        last,
                        asked: first.index,
                    });
                }
                let follow = entries.windows(2).all(|pair| pair[0].index + 1 == pair[1].index);
                assert!(follow, "entries follow each other");
            }
            let record = Record::Append(entries.to_vec(), hard_state.cloned());
            inner.written.apply(&record);
            inner.unsynced.push(record);
        }
        if sync {
            self.sync();
        }
        Ok(AppendStats::default())
    }

    fn hard_state(&self) -> Result<HardState, LogError> {
        Ok(self.inner().written.hard_state.clone())
    }

    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, LogError> {
        let inner = self.inner();
        let state = &inner.written;
        if low < state.first() {
            return Err(LogError::Trimmed {
                first: state.first(),
                asked: low,
            });
        }
        if high > state.last() + 1 {
            return Err(LogError::Missing {
                last: state.last(),
                asked: high - 1,
            });
        }
        let mut bytes = 0;
        let mut entries = Vec::new();
        for index in low..high {
            let entry = state.entry(index).expect("it is in bounds");
            bytes += entry.data.len() as u64 + entry.context.len() as u64 + 32;
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(entry.clone());
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> Result<u64, LogError> {
        self.inner().written.term(index)
    }

    fn first_index(&self) -> u64 {
        self.inner().written.first()
    }

    fn last_index(&self) -> u64 {
        self.inner().written.last()
    }

    fn trim(&self, index: u64) -> Result<(), LogError> {
        let inner = &mut *self.inner();
        if index <= inner.written.first() {
            return Ok(());
        }
        if index > inner.written.last() + 1 {
            return Err(LogError::Missing {
                last: inner.written.last(),
                asked: index,
            });
        }
        let record = Record::Trim(index);
        inner.written.apply(&record);
        inner.unsynced.push(record);
        Ok(())
    }

    fn reset(&self, index: u64, term: u64, hard_state: &HardState) -> Result<(), LogError> {
        let inner = &mut *self.inner();
        let state = State {
            trimmed: index,
            trimmed_term: term,
            entries: VecDeque::new(),
            hard_state: hard_state.clone(),
        };
        (inner.written, inner.synced) = (state.clone(), state);
        inner.unsynced.clear();
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        0
    }
}
