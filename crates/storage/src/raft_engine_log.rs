//! [`RaftEngineLog`]: the [`RaftLog`] over raft-engine, TiKV's log store: files set aside in advance and recycled, an
//! index in memory, one write and one fdatasync for each append.
//!
//! What this adapter adds:
//!
//! - **One record, whole.** Entries, hard state and what was trimmed go into one record. Every record carries the newest
//!   hard state, so none can be lost with an older file.
//! - **Damage is told from a torn tail** before raft-engine reads a file (module `verify`).
//! - **Writes that need not be durable cost nothing.** A hard state without entries that need not be synced (the commit
//!   index moved on) and a trim wait in memory for the next record.
//! - **Recent entries and all terms are held in memory**, so that in normal operation no read goes to disk.
//! - **raft-engine panics when an fsync fails.** The panic is caught here, and the log answers only errors from then on.
//! - **Reads and purges run on threads of their own.** raft-engine keeps the block read last in a thread-local that does
//!   not say which log it came from, so a thread must never read two logs.

mod terms;
mod verify;

use std::collections::VecDeque;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::{Mutex, RwLock};
use protobuf::Message;
use raft::eraftpb::{Entry, HardState};
use raft_engine::{Command, Config, Engine, LogBatch, MessageExt, ReadableSize, RecoveryMode, Version};

use crate::raft_log::{AppendStats, LogError, RaftLog};
use terms::TermRuns;

pub use verify::TornTail;

/// raft-engine can hold many groups; here there is one.
const GROUP: u64 = 1;
const META_KEY: &[u8] = b"meta";
const META_VERSION: u8 = 1;

/// Settings of [`RaftEngineLog`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftLogOptions {
    /// Bytes of one file. Default 32 MiB: every open reads the last few files whole, and readiness must not wait for it.
    pub segment_bytes: u64,
    /// Bytes of files above which those that hold only trimmed entries are recycled. Default 96 MiB. Entries that are
    /// kept for longer than this are never deleted, but raft-engine may copy them; so trim before.
    pub purge_threshold_bytes: u64,
    /// Bytes of recent entries held in memory. Default 16 MiB: what followers that keep up, and applying, ask for.
    pub cache_bytes_max: usize,
}

impl Default for RaftLogOptions {
    fn default() -> RaftLogOptions {
        RaftLogOptions {
            segment_bytes: 32 << 20,
            purge_threshold_bytes: 96 << 20,
            cache_bytes_max: 16 << 20,
        }
    }
}

/// The [`RaftLog`] over raft-engine. Its directory belongs to one process at a time.
pub struct RaftEngineLog {
    core: Arc<Core>,
    torn_tail: Option<TornTail>,
    reads: Option<Sender<Read>>,
    purges: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

struct Core {
    engine: Engine,
    dir: PathBuf,
    options: RaftLogOptions,
    state: RwLock<State>,
    /// Held while a record is written and synced: the next one begins only then, which [`verify`] relies on.
    writer: Mutex<Writer>,
    /// The first failed write. Never cleared.
    failure: OnceLock<LogError>,
}

struct State {
    last: u64,
    /// Knows the terms from `first - 1` on, and so where the log begins.
    terms: TermRuns,
    hard_state: HardState,
    /// The newest entries, up to `last`.
    recent: VecDeque<Entry>,
    recent_bytes: usize,
}

struct Writer {
    batch: LogBatch,
    /// The next record must say where the log begins.
    trimmed: bool,
    /// `state` holds more than the last record says.
    pending: bool,
    /// Records were written that no fdatasync followed.
    unsynced: bool,
}

/// A request to the thread that reads from disk.
struct Read {
    low: u64,
    high: u64,
    bytes_max: usize,
    reply: Sender<Result<Vec<Entry>, LogError>>,
}

struct RaftEntries;

impl MessageExt for RaftEntries {
    type Entry = Entry;

    fn index(entry: &Entry) -> u64 {
        entry.index
    }
}

impl RaftEngineLog {
    /// Opens the log in `dir`, which is created if it is missing. A record that a crash left unfinished is dropped and
    /// told by [`RaftEngineLog::torn_tail`].
    ///
    /// # Errors
    /// [`LogError::Corrupt`] when anything else is damaged or missing, [`LogError::Io`] when another process holds the
    /// directory or the file system fails.
    pub fn open(dir: &Path, options: &RaftLogOptions) -> Result<RaftEngineLog, LogError> {
        let failed = |cause: String| LogError::Io { action: "open", cause };
        let in_dir = |error: std::io::Error| failed(format!("{}: {error}", dir.display()));
        let path = dir
            .to_str()
            .ok_or_else(|| failed(format!("{} is not UTF-8", dir.display())))?;
        fs::create_dir_all(dir).map_err(in_dir)?;

        // The lock that raft-engine takes when it opens: without it, a log that is being written would look torn.
        let lock = fs::File::create(dir.join("LOCK")).map_err(in_dir)?;
        lock.try_lock()
            .map_err(|_| failed(format!("{} is in use by another process", dir.display())))?;
        let torn_tail = verify::verify(dir)?;
        drop(lock);

        let engine = Engine::open(Config {
            dir: path.to_owned(),
            recovery_mode: RecoveryMode::AbsoluteConsistency,
            recovery_threads: 2,
            // Compression would cost more CPU than the disk writes that it saves.
            batch_compression_threshold: ReadableSize(0),
            format_version: Version::V2,
            target_file_size: ReadableSize(options.segment_bytes),
            purge_threshold: ReadableSize(options.purge_threshold_bytes.max(options.segment_bytes)),
            enable_log_recycle: true,
            // One file is set aside at the start, so that the first change of files needs no new one, and files recycled
            // earlier are kept over a restart.
            prefill_for_recycle: true,
            prefill_limit: Some(ReadableSize(options.segment_bytes)),
            ..Config::default()
        })
        .map_err(|error| match error {
            raft_engine::Error::Corruption(cause) => LogError::Corrupt {
                place: dir.display().to_string(),
                cause,
            },
            error => failed(format!("{}: {error}", dir.display())),
        })?;

        // raft-engine syncs its directory only when it changes files: until then, a crash could take the first file away,
        // with everything that was synced into it.
        crate::disk::sync_dir(dir).map_err(in_dir)?;

        // A thread of its own: see the module's last point.
        let recovered = std::thread::scope(|scope| scope.spawn(|| recover(&engine, dir)).join());
        let (state, trimmed) = recovered.unwrap_or_else(|_| Err(panicked(dir)))?;
        let writer = Writer {
            batch: LogBatch::default(),
            trimmed,
            pending: trimmed,
            unsynced: false,
        };
        let core = Arc::new(Core {
            engine,
            dir: dir.to_owned(),
            options: options.clone(),
            state: RwLock::new(state),
            writer: Mutex::new(writer),
            failure: OnceLock::new(),
        });

        let (reads, to_read) = bounded(16);
        let (purges, to_purge) = bounded(1);
        let threads = vec![
            spawn("raft-log-read", &core, move |core| core.serve_reads(&to_read)).map_err(in_dir)?,
            spawn("raft-log-purge", &core, move |core| core.serve_purges(&to_purge)).map_err(in_dir)?,
        ];
        Ok(RaftEngineLog {
            core,
            torn_tail,
            reads: Some(reads),
            purges: Some(purges),
            threads,
        })
    }

    /// The record that was dropped on opening because a crash had left it unfinished.
    pub fn torn_tail(&self) -> Option<&TornTail> {
        self.torn_tail.as_ref()
    }
}

fn spawn(name: &str, core: &Arc<Core>, work: impl FnOnce(&Core) + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    let core = Arc::clone(core);
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || work(&core))
}

fn panicked(dir: &Path) -> LogError {
    LogError::Corrupt {
        place: dir.display().to_string(),
        cause: "raft-engine stopped at an inconsistency".to_owned(),
    }
}

/// Rebuilds the state from what raft-engine found, and says whether entries that were trimmed came back with it.
fn recover(engine: &Engine, dir: &Path) -> Result<(State, bool), LogError> {
    let corrupt = |cause: String| LogError::Corrupt {
        place: dir.display().to_string(),
        cause,
    };
    let span = engine.first_index(GROUP).zip(engine.last_index(GROUP));
    let meta = match engine.get(GROUP, META_KEY) {
        Some(bytes) => Meta::decode(&bytes).ok_or_else(|| corrupt("its hard state has an unknown form".to_owned()))?,
        None if span.is_none() => Meta::default(),
        None => return Err(corrupt("it holds entries but no hard state".to_owned())),
    };
    let Meta {
        mut hard_state,
        trimmed_index,
        trimmed_term,
    } = meta;

    // Entries that were copied before they were trimmed come back when the record of the trim was purged.
    let mut returned = false;
    let mut last = trimmed_index;
    if let Some((first, last_held)) = span {
        returned = first <= trimmed_index;
        if last_held > trimmed_index {
            last = last_held;
            if first > trimmed_index + 1 {
                let gap = format!("entries {} to {} are missing", trimmed_index + 1, first - 1);
                return Err(corrupt(gap));
            }
        }
    }
    // What was trimmed was committed, though the hard state that said so may have been waiting for the next record.
    hard_state.commit = hard_state.commit.max(trimmed_index);
    if hard_state.commit > last {
        let cause = format!(
            "entries up to {} were committed, but it ends at {last}",
            hard_state.commit
        );
        return Err(corrupt(cause));
    }

    let term_of = |index| match engine.get_entry::<RaftEntries>(GROUP, index) {
        Ok(Some(entry)) => Ok(entry.term),
        Ok(None) => Err(corrupt(format!("entry {index} is missing"))),
        Err(error) => Err(corrupt(format!("entry {index}: {error}"))),
    };
    let terms = TermRuns::find(trimmed_index, trimmed_term, last, term_of)?;
    Ok((
        State {
            last,
            terms,
            hard_state,
            recent: VecDeque::new(),
            recent_bytes: 0,
        },
        returned,
    ))
}

/// What every record carries beside its entries.
#[derive(Default)]
struct Meta {
    hard_state: HardState,
    trimmed_index: u64,
    trimmed_term: u64,
}

impl Meta {
    fn encode(&self) -> Vec<u8> {
        let HardState { term, vote, commit, .. } = self.hard_state;
        let mut bytes = vec![META_VERSION];
        for number in [term, vote, commit, self.trimmed_index, self.trimmed_term] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Meta> {
        let (&version, numbers) = bytes.split_first()?;
        let (numbers, rest) = numbers.as_chunks::<8>();
        if version != META_VERSION || !rest.is_empty() {
            return None;
        }
        let numbers: [[u8; 8]; 5] = numbers.try_into().ok()?;
        let [term, vote, commit, trimmed_index, trimmed_term] = numbers.map(u64::from_le_bytes);
        let hard_state = HardState {
            term,
            vote,
            commit,
            ..HardState::default()
        };
        Some(Meta {
            hard_state,
            trimmed_index,
            trimmed_term,
        })
    }
}

impl State {
    fn first(&self) -> u64 {
        self.terms.base_index() + 1
    }

    fn meta(&self) -> Meta {
        let (trimmed_index, trimmed_term) = self.terms.base();
        Meta {
            hard_state: self.hard_state.clone(),
            trimmed_index,
            trimmed_term,
        }
    }

    fn push(&mut self, entries: &[Entry], cache_bytes_max: usize) {
        let Some(first) = entries.first() else { return };
        if first.index <= self.last {
            self.terms.truncate(first.index);
            while self.recent.back().is_some_and(|entry| entry.index >= first.index) {
                let entry = self.recent.pop_back();
                self.recent_bytes -= entry.map_or(0, |entry| memory_bytes(&entry));
            }
        }
        for entry in entries {
            self.terms.push(entry.index, entry.term);
            self.recent_bytes += memory_bytes(entry);
            self.recent.push_back(entry.clone());
            self.last = entry.index;
        }
        while self.recent_bytes > cache_bytes_max {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some(entry) = self.recent.pop_front() {
            self.recent_bytes -= memory_bytes(&entry);
        }
    }
}

/// What an entry in memory takes, about.
fn memory_bytes(entry: &Entry) -> usize {
    size_of::<Entry>() + entry.data.len() + entry.context.len()
}

impl Core {
    fn check(&self) -> Result<(), LogError> {
        self.failure.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Writes one record with `entries` and everything that waits. The state must hold the hard state and what was
    /// trimmed already, and not yet the entries.
    fn write(&self, writer: &mut Writer, entries: &[Entry], clean: bool, sync: bool) -> Result<AppendStats, LogError> {
        self.check()?;
        let start = Instant::now();
        let meta = self.state.read().meta();
        let batch = &mut writer.batch;
        if clean {
            batch.add_command(GROUP, Command::Clean);
        } else if writer.trimmed {
            batch.add_command(
                GROUP,
                Command::Compact {
                    index: meta.trimmed_index + 1,
                },
            );
        }
        let written = batch
            .add_entries::<RaftEntries>(GROUP, entries)
            .and_then(|()| batch.put(GROUP, META_KEY.to_vec(), meta.encode()))
            .map_err(|error| error.to_string())
            .and_then(
                |()| match catch_unwind(AssertUnwindSafe(|| self.engine.write(batch, sync))) {
                    Ok(written) => written.map_err(|error| error.to_string()),
                    Err(_) => Err("the write or its fsync failed; the panic message before this says more".to_owned()),
                },
            );
        let bytes = written.map_err(|cause| {
            let error = LogError::Io {
                action: "append",
                cause: format!("{}: {cause}", self.dir.display()),
            };
            self.failure.get_or_init(|| error.clone()).clone()
        })?;
        writer.trimmed = false;
        writer.pending = false;
        writer.unsynced = !sync;
        let duration_ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Ok(AppendStats {
            bytes,
            fsyncs: usize::from(sync),
            duration_ns,
        })
    }

    /// Reads entries from disk. Only for threads that never read another log.
    fn fetch(&self, low: u64, high: u64, bytes_max: usize) -> Result<Vec<Entry>, LogError> {
        let mut entries = Vec::new();
        let fetched = catch_unwind(AssertUnwindSafe(|| {
            self.engine
                .fetch_entries_to::<RaftEntries>(GROUP, low, high, Some(bytes_max), &mut entries)
        }));
        let corrupt = |cause| LogError::Corrupt {
            place: format!("{}, index {low}", self.dir.display()),
            cause,
        };
        match fetched {
            Ok(Ok(_)) if !entries.is_empty() => Ok(entries),
            Ok(Ok(_)) => Err(corrupt("the entries are missing".to_owned())),
            // Trimmed meanwhile.
            Ok(Err(raft_engine::Error::EntryCompacted)) => Err(LogError::Trimmed {
                first: self.state.read().first(),
                asked: low,
            }),
            Ok(Err(raft_engine::Error::Io(error))) => Err(LogError::Io {
                action: "read",
                cause: error.to_string(),
            }),
            Ok(Err(error)) => Err(corrupt(error.to_string())),
            Err(_) => Err(panicked(&self.dir)),
        }
    }

    fn serve_reads(&self, requests: &Receiver<Read>) {
        for Read {
            low,
            high,
            bytes_max,
            reply,
        } in requests
        {
            // A reader that gave up needs no answer.
            let _ = reply.send(self.fetch(low, high, bytes_max));
        }
    }

    fn serve_purges(&self, requests: &Receiver<()>) {
        for () in requests {
            if let Err(error) = self.purge() {
                tracing::error!(%error, "old files of the Raft log could not be removed");
            }
        }
    }

    fn purge(&self) -> Result<(), LogError> {
        let mut writer = self.writer.lock();
        if writer.unsynced || writer.trimmed {
            // Files may go only when it is durable that their entries are trimmed.
            self.write(&mut writer, &[], false, true)?;
        }
        drop(writer);
        match catch_unwind(AssertUnwindSafe(|| self.engine.purge_expired_files())) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(LogError::Io {
                action: "remove old files",
                cause: error.to_string(),
            }),
            Err(_) => {
                let cause = "raft-engine panicked while rewriting; the panic message before this says more".to_owned();
                let error = LogError::Io {
                    action: "remove old files",
                    cause,
                };
                Err(self.failure.get_or_init(|| error).clone())
            }
        }
    }
}

impl RaftLog for RaftEngineLog {
    fn append(&self, entries: &[Entry], hard_state: Option<&HardState>, sync: bool) -> Result<AppendStats, LogError> {
        let core = &*self.core;
        let mut writer = core.writer.lock();
        core.check()?;
        if let Some(entry) = entries.first() {
            let contiguous = entries.windows(2).all(|pair| pair[1].index == pair[0].index + 1);
            assert!(contiguous, "entries appended to the Raft log follow each other");
            let state = core.state.read();
            if entry.index < state.first() {
                return Err(LogError::Trimmed {
                    first: state.first(),
                    asked: entry.index,
                });
            }
            if entry.index > state.last + 1 {
                return Err(LogError::Missing {
                    last: state.last,
                    asked: entry.index - 1,
                });
            }
        }
        if let Some(hard_state) = hard_state {
            core.state.write().hard_state = hard_state.clone();
            writer.pending = true;
        }
        let owed = sync && (writer.pending || writer.unsynced);
        if entries.is_empty() && !owed {
            return Ok(AppendStats::default());
        }
        let trimmed = writer.trimmed;
        let stats = core.write(&mut writer, entries, false, sync)?;
        core.state.write().push(entries, core.options.cache_bytes_max);
        if trimmed && let Some(purges) = &self.purges {
            // Full means that a purge is waiting already.
            let _ = purges.try_send(());
        }
        Ok(stats)
    }

    fn hard_state(&self) -> Result<HardState, LogError> {
        Ok(self.core.state.read().hard_state.clone())
    }

    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, LogError> {
        {
            let state = self.core.state.read();
            if low < state.first() {
                return Err(LogError::Trimmed {
                    first: state.first(),
                    asked: low,
                });
            }
            if high > state.last + 1 {
                return Err(LogError::Missing {
                    last: state.last,
                    asked: high - 1,
                });
            }
            if low >= high {
                return Ok(Vec::new());
            }
            if let Some(oldest) = state.recent.front()
                && low >= oldest.index
            {
                let (from, to) = ((low - oldest.index) as usize, (high - oldest.index) as usize);
                let mut bytes = 0;
                let fits = |entry: &&Entry| {
                    let first = bytes == 0;
                    bytes += u64::from(entry.compute_size());
                    first || bytes <= bytes_max
                };
                return Ok(state.recent.range(from..to).take_while(fits).cloned().collect());
            }
        }
        let (reply, answer) = bounded(1);
        let request = Read {
            low,
            high,
            bytes_max: usize::try_from(bytes_max).unwrap_or(usize::MAX),
            reply,
        };
        let gone = || LogError::Io {
            action: "read",
            cause: "its reader thread is gone".to_owned(),
        };
        self.reads
            .as_ref()
            .ok_or_else(gone)?
            .send(request)
            .map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }

    fn term(&self, index: u64) -> Result<u64, LogError> {
        let state = self.core.state.read();
        if index > state.last {
            return Err(LogError::Missing {
                last: state.last,
                asked: index,
            });
        }
        state.terms.term(index).ok_or(LogError::Trimmed {
            first: state.first(),
            asked: index,
        })
    }

    fn first_index(&self) -> u64 {
        self.core.state.read().first()
    }

    fn last_index(&self) -> u64 {
        self.core.state.read().last
    }

    fn trim(&self, index: u64) -> Result<(), LogError> {
        let mut writer = self.core.writer.lock();
        self.core.check()?;
        let mut state = self.core.state.write();
        if index <= state.first() {
            return Ok(());
        }
        if index > state.last + 1 {
            return Err(LogError::Missing {
                last: state.last,
                asked: index - 1,
            });
        }
        state.terms.trim(index - 1);
        while state.recent.front().is_some_and(|entry| entry.index < index) {
            state.forget_oldest();
        }
        writer.trimmed = true;
        writer.pending = true;
        Ok(())
    }

    fn reset(&self, index: u64, term: u64, hard_state: &HardState) -> Result<(), LogError> {
        let core = &*self.core;
        let mut writer = core.writer.lock();
        core.check()?;
        {
            let mut state = core.state.write();
            state.terms = TermRuns::new(index, term);
            state.last = index;
            state.recent.clear();
            state.recent_bytes = 0;
            state.hard_state = hard_state.clone();
        }
        core.write(&mut writer, &[], true, true)?;
        if let Some(purges) = &self.purges {
            let _ = purges.try_send(());
        }
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        crate::disk::tree_bytes(&self.core.dir)
    }
}

impl Drop for RaftEngineLog {
    fn drop(&mut self) {
        {
            let mut writer = self.core.writer.lock();
            if writer.pending && self.core.check().is_ok() {
                // What waits is allowed to be lost, so an error costs nothing.
                let _ = self.core.write(&mut writer, &[], false, true);
            }
        }
        self.reads.take();
        self.purges.take();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the Raft log panicked");
            }
        }
        if self.core.failure.get().is_some() {
            // raft-engine syncs when it is closed, and panics when that fails. The process is about to stop anyway.
            std::mem::forget(Arc::clone(&self.core));
        }
    }
}

#[cfg(test)]
mod tests;
