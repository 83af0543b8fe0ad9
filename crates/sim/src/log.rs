//! A [`RaftLog`] on a virtual disk that tells what is written from what is synced.
//!
//! On disk it is bytes: records with a length and a checksum, as in raft-engine. A crash keeps what was synced and cuts
//! what was written since at some byte, in the middle of a record if chance wants it so. A start reads the bytes by the
//! rules of `storage`: damage at the very end is a torn tail, and is cut off; damage with a whole record behind it is a
//! flipped bit or a block of an earlier life, and such a log is refused.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use bytes::{Buf, BufMut};
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

/// Begins every record, so that whole ones are found behind damage.
const MAGIC: u32 = 0x5eed_10c5;
/// Magic, length and checksum.
const HEADER_BYTES: usize = 12;

fn put_message(out: &mut Vec<u8>, message: &impl protobuf::Message) {
    let bytes = message.write_to_bytes().expect("it encodes");
    out.put_u32(bytes.len() as u32);
    out.put_slice(&bytes);
}

fn get_message<M: protobuf::Message>(from: &mut &[u8]) -> Option<M> {
    let len = from.try_get_u32().ok()? as usize;
    let (bytes, rest) = from.split_at_checked(len)?;
    *from = rest;
    M::parse_from_bytes(bytes).ok()
}

/// Bytes of an encoded entry.
fn bytes_of(entry: &Entry) -> u64 {
    u64::from(protobuf::Message::compute_size(entry))
}

/// FNV-1a: enough for bits that chance flips.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| {
        (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

impl Record {
    fn encode(&self, out: &mut Vec<u8>) {
        let mut body = Vec::new();
        match self {
            Record::Append(entries, hard_state) => {
                body.put_u8(0);
                body.put_u8(u8::from(hard_state.is_some()));
                if let Some(hard_state) = hard_state {
                    put_message(&mut body, hard_state);
                }
                entries.iter().for_each(|entry| put_message(&mut body, entry));
            }
            Record::Trim(index) => {
                body.put_u8(1);
                body.put_u64(*index);
            }
        }
        out.put_u32(MAGIC);
        out.put_u32(body.len() as u32);
        out.put_u32(checksum(&body));
        out.put_slice(&body);
    }

    /// The record at the beginning of `bytes`, and its length; nothing if there is no whole one.
    fn decode(bytes: &[u8]) -> Option<(Record, usize)> {
        let mut rest = bytes;
        let magic = rest.try_get_u32().ok()?;
        let len = rest.try_get_u32().ok()? as usize;
        let sum = rest.try_get_u32().ok()?;
        let mut body = rest.get(..len).filter(|body| magic == MAGIC && checksum(body) == sum)?;
        let record = match body.try_get_u8().ok()? {
            0 => {
                let hard_state = match body.try_get_u8().ok()? {
                    0 => None,
                    _ => Some(get_message(&mut body)?),
                };
                let mut entries = Vec::new();
                while !body.is_empty() {
                    entries.push(get_message(&mut body)?);
                }
                Record::Append(entries, hard_state)
            }
            _ => Record::Trim(body.try_get_u64().ok()?),
        };
        Some((record, HEADER_BYTES + len))
    }
}

/// Reads records one after the other up to damage at the end.
fn decode_all(bytes: &[u8]) -> Result<Vec<Record>, LogError> {
    let mut records = Vec::new();
    let mut at = 0;
    while let Some((record, len)) = Record::decode(&bytes[at..]) {
        records.push(record);
        at += len;
    }
    if (at + 1..bytes.len()).any(|later| Record::decode(&bytes[later..]).is_some()) {
        return Err(LogError::Corrupt {
            place: format!("offset {at}"),
            cause: "a record is damaged, and there are whole ones behind it".to_owned(),
        });
    }
    Ok(records)
}

/// What a disk does to bytes that it holds for long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// A bit flips.
    Flip,
    /// A block comes back with what was in it in an earlier life.
    OldBlock,
}

/// Blocks of a disk.
const BLOCK_BYTES: usize = 512;

#[derive(Default)]
struct Inner {
    written: State,
    synced: State,
    unsynced: Vec<Record>,
    broken: bool,
    /// Reads until one fails; 0 for never.
    fails_in: u32,
    /// Whether a read failed.
    failed: bool,
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

    /// What a crash leaves, and how many unsynced records survive; `chance` (between 0 and 1) says where the tail is cut.
    pub fn after_crash(&self, chance: f64) -> (Self, usize) {
        let inner = self.inner();
        let mut state = inner.synced.clone();
        let mut tail = Vec::new();
        inner.unsynced.iter().for_each(|record| record.encode(&mut tail));
        tail.truncate(((tail.len() + 1) as f64 * chance) as usize);
        let survivors = decode_all(&tail).expect("a cut tail has nothing whole behind the cut");
        survivors.iter().for_each(|record| state.apply(record));
        (SimLog::holding(state), survivors.len())
    }

    /// What a start finds on a disk that damaged something old: the log's newest record is never touched, since damage
    /// there cannot be told from a torn tail.
    pub fn after_damage(&self, damage: Damage, chance: f64) -> Result<Self, LogError> {
        let inner = self.inner();
        let state = &inner.synced;
        let mut bytes = Vec::new();
        for entry in &state.entries {
            Record::Append(vec![entry.clone()], None).encode(&mut bytes);
        }
        let harmed = bytes.len();
        Record::Append(Vec::new(), Some(state.hard_state.clone())).encode(&mut bytes);
        if harmed > 0 {
            let at = (harmed as f64 * chance) as usize;
            match damage {
                Damage::Flip => bytes[at] ^= 1 << (at % 8),
                Damage::OldBlock => {
                    let block = at / BLOCK_BYTES * BLOCK_BYTES;
                    // What an earlier life left: the same kind of bytes from somewhere else.
                    let end = (block + BLOCK_BYTES).min(harmed);
                    bytes[block..end].rotate_left(1);
                }
            }
        }
        let mut found = State {
            entries: VecDeque::new(),
            ..state.clone()
        };
        decode_all(&bytes)?.iter().for_each(|record| found.apply(record));
        Ok(SimLog::holding(found))
    }

    /// One read of entries fails, `reads` reads from now.
    pub fn fail_a_read(&self, reads: u32) {
        self.inner().fails_in = reads.max(1);
    }

    /// No read fails any more that has not failed yet.
    pub fn mend_reads(&self) {
        self.inner().fails_in = 0;
    }

    /// The hard state as a crash would leave it at least.
    pub fn synced_hard_state(&self) -> HardState {
        self.inner().synced.hard_state.clone()
    }

    /// The last index that a crash would leave at least.
    pub fn synced_last(&self) -> u64 {
        self.inner().synced.last()
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

    /// Whether anything went wrong with it that was not its users' fault.
    pub fn is_broken(&self) -> bool {
        let inner = self.inner();
        inner.broken || inner.failed
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
        Ok(AppendStats {
            bytes: HEADER_BYTES + entries.iter().map(|entry| bytes_of(entry) as usize).sum::<usize>(),
            fsyncs: usize::from(sync),
            // Virtual time passes elsewhere.
            duration_ns: 1,
        })
    }

    fn hard_state(&self) -> Result<HardState, LogError> {
        Ok(self.inner().written.hard_state.clone())
    }

    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, LogError> {
        let inner = &mut *self.inner();
        if inner.fails_in > 0 {
            inner.fails_in -= 1;
            if inner.fails_in == 0 {
                inner.failed = true;
                return Err(LogError::Io {
                    action: "read entries",
                    cause: "the virtual disk failed".to_owned(),
                });
            }
        }
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
            bytes += bytes_of(entry);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> SimLog {
        let log = SimLog::default();
        for index in 1..=40 {
            let entry = Entry {
                index,
                term: 1,
                data: vec![index as u8; 60].into(),
                ..Default::default()
            };
            log.append(&[entry], None, index <= 30).unwrap();
        }
        log
    }

    #[test]
    fn a_crash_cuts_the_tail_anywhere_and_keeps_what_was_synced() {
        let log = log();
        assert_eq!(log.unsynced(), 10);
        let mut left = Vec::new();
        for step in 0..1000 {
            let (after, survivors) = log.after_crash(f64::from(step) / 1000.0);
            assert_eq!(after.last_index(), 30 + survivors as u64);
            left.push(survivors);
        }
        assert!(left.is_sorted());
        assert_eq!((left[0], left[500], log.after_crash(1.0).1), (0, 5, 10));
    }

    #[test]
    fn old_damage_is_refused_and_never_taken_for_a_torn_tail() {
        let log = log();
        log.sync();
        for step in 0..1000 {
            let chance = f64::from(step) / 1000.0;
            for damage in [Damage::Flip, Damage::OldBlock] {
                match log.after_damage(damage, chance) {
                    Err(LogError::Corrupt { .. }) => {}
                    Ok(_) => panic!("{damage:?} at {chance} goes unnoticed"),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
}
