//! Snapshots on their way between members: an engine view in key order on one side, a new engine on the other.
//!
//! A chunk is a run of `family, key length, key, value length, value`, so what arrives does not depend on the engine
//! that it came from. Neither side ever holds more than a few chunks in memory. A transfer that broke off goes on after
//! the last key that arrived, as long as the sender still has the view.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use api::RaftIndex;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use mvcc::keys::FAMILIES;
use mvcc::{Machine, Membership};
use storage::{Batch, Cursor, Engine, EngineError, Family, KeyRange, View};

use crate::peer::{SnapshotFault, SnapshotSource};

/// About how large chunks are.
const CHUNK_BYTES: usize = 512 << 10;
/// How long a view is kept for a transfer that does not begin or go on. It holds up the space of what is deleted.
pub(crate) const UNUSED_MAX: Duration = Duration::from_secs(120);

/// Lets all other threads go first: a snapshot that is sent has time, and a client has not. As well as can be: it is no
/// reason to send none. Not for a thread that may start others, as one that writes to an engine does: they would inherit
/// it, and RocksDB's threads live on.
pub(crate) fn let_others_go_first() {
    // Linux keeps this for each thread, by the thread's own id.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 10) {
        tracing::debug!(%error, "a thread for snapshots keeps its priority");
    }
}

/// What a view includes.
pub(crate) struct Snapshot {
    pub(crate) index: RaftIndex,
    pub(crate) term: u64,
    pub(crate) membership: Membership,
    pub(crate) source: Source,
}

/// Reads a view, chunk by chunk. The view lives on a thread of its own.
pub(crate) struct Source {
    asks: SyncSender<Ask>,
}

enum Ask {
    Seek(Bytes, SyncSender<Result<(), EngineError>>),
    Next(SyncSender<Result<Option<Bytes>, EngineError>>),
}

impl Source {
    fn ask<T>(&self, ask: impl FnOnce(SyncSender<Result<T, EngineError>>) -> Ask) -> Result<T, SnapshotFault> {
        let (answer, answered) = sync_channel(1);
        let gone = || "the view is gone: it was not read for too long";
        self.asks.send(ask(answer)).map_err(|_| gone())?;
        Ok(answered.recv().map_err(|_| gone())??)
    }
}

impl SnapshotSource for Source {
    fn seek(&mut self, resume: &[u8]) -> Result<(), SnapshotFault> {
        let resume = Bytes::copy_from_slice(resume);
        self.ask(|answer| Ask::Seek(resume, answer))
    }

    fn next(&mut self) -> Result<Option<Bytes>, SnapshotFault> {
        self.ask(Ask::Next)
    }
}

/// Takes a view and hands what it includes to `ready`, from a thread that serves its reader until that is dropped.
///
/// # Errors
/// The thread cannot be started.
pub(crate) fn take<E: Engine>(
    engine: Arc<E>,
    ready: impl FnOnce(Result<Snapshot, EngineError>) + Send + 'static,
) -> std::io::Result<()> {
    let run = move || {
        let view = engine.view();
        let_others_go_first();
        let (asks, asked) = sync_channel(1);
        match Machine::<E>::state_in(&view) {
            Ok((index, term, membership)) => ready(Ok(Snapshot {
                index,
                term,
                membership,
                source: Source { asks },
            })),
            Err(error) => return ready(Err(error)),
        }
        serve(&view, &asked);
    };
    std::thread::Builder::new()
        .name("snapshot".to_owned())
        .spawn(run)
        .map(drop)
}

/// Where a reader of a view stands: everything up to this key of this family was read.
#[derive(Clone, Default)]
struct Position {
    family: u8,
    /// `None` before the first key of the family.
    key: Option<Bytes>,
}

impl Position {
    fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        if let Some(key) = &self.key {
            out.put_u8(self.family);
            out.put_slice(key);
        }
        out.freeze()
    }

    fn decode(mut token: Bytes) -> Self {
        if token.is_empty() {
            return Position::default();
        }
        Position {
            family: token.get_u8(),
            key: Some(token),
        }
    }
}

fn serve<V: View>(view: &V, asked: &Receiver<Ask>) {
    let mut position = Position::default();
    while let Ok(ask) = asked.recv_timeout(UNUSED_MAX) {
        match ask {
            Ask::Seek(token, answer) => {
                position = Position::decode(token);
                let _ = answer.send(Ok(()));
            }
            Ask::Next(answer) => {
                let _ = answer.send(read_chunk(view, &mut position));
            }
        }
    }
}

fn read_chunk<V: View>(view: &V, position: &mut Position) -> Result<Option<Bytes>, EngineError> {
    let mut chunk = BytesMut::new();
    while usize::from(position.family) < FAMILIES.len() {
        let family = Family(usize::from(position.family));
        // The first key after the last one that was read.
        let start = position
            .key
            .as_ref()
            .map_or_else(Vec::new, |key| [&key[..], &[0]].concat());
        let mut cursor = view.cursor(
            family,
            KeyRange {
                start: &start,
                end: None,
            },
        )?;
        cursor.seek_first()?;
        while let Some((key, value)) = cursor.entry() {
            let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("keys and values are bounded by requests");
            chunk.put_u8(position.family);
            chunk.put_u32(len(key));
            chunk.put_slice(key);
            chunk.put_u32(len(value));
            chunk.put_slice(value);
            if chunk.len() >= CHUNK_BYTES {
                position.key = Some(Bytes::copy_from_slice(key));
                return Ok(Some(chunk.freeze()));
            }
            cursor.next()?;
        }
        *position = Position {
            family: position.family + 1,
            key: None,
        };
    }
    Ok((!chunk.is_empty()).then(|| chunk.freeze()))
}

/// Puts chunks into an empty engine.
pub(crate) struct Building<E: Engine> {
    engine: E,
    dir: PathBuf,
    position: Position,
}

/// An engine that holds a whole snapshot, on disk, but is not in use yet.
pub(crate) struct Staged<E> {
    pub(crate) engine: E,
    pub(crate) dir: PathBuf,
    pub(crate) index: RaftIndex,
    pub(crate) term: u64,
}

impl<E: Engine> Building<E> {
    pub(crate) fn new(engine: E, dir: PathBuf) -> Self {
        Building {
            engine,
            dir,
            position: Position::default(),
        }
    }

    /// Where to go on after an interruption.
    pub(crate) fn resume_token(&self) -> Bytes {
        self.position.encode()
    }

    /// Adds a chunk.
    ///
    /// # Errors
    /// A chunk that is not one, or an engine that fails.
    pub(crate) fn write(&mut self, mut chunk: Bytes) -> Result<(), SnapshotFault> {
        let mut batch = self.engine.batch();
        while chunk.has_remaining() {
            let family = chunk.get_u8();
            if usize::from(family) >= FAMILIES.len() {
                return Err(format!("the snapshot has a family {family}, which this release does not know").into());
            }
            let key = take_field(&mut chunk)?;
            let value = take_field(&mut chunk)?;
            batch.put(Family(usize::from(family)), &key, &value);
            self.position = Position { family, key: Some(key) };
        }
        // A slice of the chunk, which would keep all of it in memory.
        self.position.key = self.position.key.as_deref().map(Bytes::copy_from_slice);
        self.engine.write(batch)?;
        Ok(())
    }

    /// Brings all of it to disk, after checking that it is the snapshot that was announced.
    ///
    /// # Errors
    /// Another snapshot, or an engine that fails.
    pub(crate) fn finish(self, index: RaftIndex, term: u64) -> Result<Staged<E>, SnapshotFault> {
        let found = {
            let view = self.engine.view();
            let (index, term, _) = Machine::<E>::state_in(&view)?;
            (index, term)
        };
        if found != (index, term) {
            let (found_index, found_term) = found;
            return Err(format!(
                "the snapshot holds index {found_index} of term {found_term} instead of {index} of {term}"
            )
            .into());
        }
        self.engine.flush()?;
        let Building { engine, dir, .. } = self;
        Ok(Staged {
            engine,
            dir,
            index,
            term,
        })
    }
}

fn take_field(chunk: &mut Bytes) -> Result<Bytes, SnapshotFault> {
    if chunk.remaining() < 4 {
        return Err("a chunk of the snapshot ends too early".into());
    }
    let len = chunk.get_u32() as usize;
    if chunk.remaining() < len {
        return Err("a chunk of the snapshot ends too early".into());
    }
    Ok(chunk.split_to(len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use storage::AnyEngine;

    fn fill(engine: &AnyEngine) {
        let mut batch = engine.batch();
        for (at, family) in (0..FAMILIES.len()).map(Family).enumerate() {
            for number in 0..2000_u32 {
                let value = vec![at as u8; number as usize % 700];
                batch.put(family, &number.to_be_bytes(), &value);
            }
        }
        engine.write(batch).unwrap();
    }

    fn everything(engine: &AnyEngine) -> Vec<(usize, Vec<u8>, Vec<u8>)> {
        let view = engine.view();
        let mut all = Vec::new();
        for family in 0..FAMILIES.len() {
            let mut cursor = view.cursor(Family(family), KeyRange { start: &[], end: None }).unwrap();
            cursor.seek_first().unwrap();
            while let Some((key, value)) = cursor.entry() {
                all.push((family, key.to_vec(), value.to_vec()));
                cursor.next().unwrap();
            }
        }
        all
    }

    #[test]
    fn a_snapshot_arrives_whole_whatever_interrupts_it() {
        let root = tempfile::tempdir().unwrap();
        let open = |name: &str| AnyEngine::open_memory(&root.path().join(name), FAMILIES).unwrap();
        let engine = open("from");
        fill(&engine);
        let view = engine.view();
        let (mut position, mut building) = (Position::default(), Building::new(open("to"), PathBuf::new()));
        let (mut chunks, mut broken) = (0, false);
        while let Some(chunk) = read_chunk(&view, &mut position).unwrap() {
            chunks += 1;
            if chunks == 3 && !broken {
                // This one is lost, and the reader begins again where the writer says.
                broken = true;
                position = Position::decode(building.resume_token());
                continue;
            }
            building.write(chunk).unwrap();
        }
        assert!(chunks > 4 && broken);
        assert!(everything(&building.engine) == everything(&engine));
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let engine = AnyEngine::open_memory(root.path(), FAMILIES).unwrap();
        let mut building = Building::new(engine, PathBuf::new());
        for wrong in [
            &[9_u8, 0, 0, 0, 0, 0, 0, 0, 0][..],
            &[0],
            &[0, 0, 0, 0, 5, 1],
            &[0, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert!(building.write(Bytes::from_static(wrong)).is_err(), "{wrong:?}");
        }
        assert!(building.finish(1, 1).is_err(), "an empty engine is no snapshot");
    }
}
