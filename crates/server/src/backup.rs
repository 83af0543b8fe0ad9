//! Backups for clients: an engine view on its way out as a database file of etcd.
//!
//! A thread of its own, at a low priority, takes a view and writes the file into a short queue, from where the client
//! takes it; nobody else waits for either. Whoever takes nothing for too long loses the backup, since the view holds up
//! the space of what is deleted.

use std::io::{self, Write};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use api::store::{BackupChunk, BackupStream};
use api::{Error, Result};
use bytes::{Bytes, BytesMut};
use mvcc::backup::{Export, ExportError, Scratch};
use sha2::{Digest, Sha256};
use storage::{Engine, SortError};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::node::Shared;
use crate::snapshot::let_others_go_first;

/// The size of chunks, in bytes: that of etcd.
const CHUNK_BYTES: usize = 32 << 10;
/// Chunks that wait for the client.
const QUEUE_CHUNKS_MAX: usize = 32;
/// How long the client may take for a chunk.
const STALL_MAX: Duration = Duration::from_secs(120);
/// How long to wait before the queue is looked at again.
const QUEUE_PAUSE: Duration = Duration::from_millis(1);
/// Backups, and hashes of everything, at a time.
pub(crate) const BACKUPS_MAX: usize = 2;

/// A backup on its way.
pub struct Backup {
    chunks: mpsc::Receiver<Result<BackupChunk>>,
}

impl BackupStream for Backup {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<BackupChunk>>> {
        self.chunks.poll_recv(context)
    }
}

/// Begins a backup of the state as it is now. The permit is held to its end.
pub(crate) fn start<E: Engine>(shared: &Arc<Shared<E>>, permit: OwnedSemaphorePermit) -> Result<Backup> {
    let (sender, chunks) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let shared = shared.clone();
    let run = move || {
        let _permit = permit;
        let_others_go_first();
        if let Err(error) = send(&shared, &sender) {
            // Whoever went away need not be told why.
            let _ = sender.try_send(Err(error));
        }
    };
    spawn("backup", run)?;
    Ok(Backup { chunks })
}

/// The hash of the whole database as it would be backed up now, and its newest revision.
pub(crate) async fn hash<E: Engine>(shared: &Arc<Shared<E>>, permit: OwnedSemaphorePermit) -> Result<(u32, i64)> {
    let (sender, hash) = tokio::sync::oneshot::channel();
    let shared = shared.clone();
    let run = move || {
        let _permit = permit;
        let begun = Instant::now();
        let_others_go_first();
        let engine = shared.reader.engine();
        let hash = Export::hash(&engine.view(), &scratch(&shared));
        shared.metrics.hashed(begun.elapsed());
        let _ = sender.send(hash.map_err(|error| refusal(&error)));
    };
    spawn("hash", run)?;
    hash.await.unwrap_or(Err(Error::Stopped))
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    if let Err(error) = thread {
        tracing::warn!(%error, name, "a thread was not started");
        return Err(Error::TooManyRequests);
    }
    Ok(())
}

/// Sorting may take half of what is left above the disk's reserve.
fn scratch<E: Engine>(shared: &Shared<E>) -> Scratch {
    let config = &shared.config;
    let free = storage::disk::free_bytes(&config.data_dir).unwrap_or(0);
    Scratch {
        dir: config.data_dir.clone(),
        bytes_max: free.saturating_sub(config.disk_reserve_bytes) / 2,
        // An engine that writes all its data when it flushes has them in memory.
        with_values: !config.flush_writes_all,
    }
}

/// What the client is told; the log says why.
fn refusal(error: &ExportError) -> Error {
    tracing::error!(%error, "a backup failed");
    match error {
        ExportError::Sort(SortError::Space { .. }) => Error::NoSpace,
        ExportError::Engine(_) => Error::Corrupt,
        ExportError::Sort(SortError::Io { .. }) | ExportError::Write(_) => Error::Stopped,
    }
}

fn send<E: Engine>(shared: &Shared<E>, sender: &mpsc::Sender<Result<BackupChunk>>) -> Result<()> {
    let begun = Instant::now();
    let engine = shared.reader.engine();
    let view = engine.view();
    let export = Export::prepare(&view, &scratch(shared)).map_err(|error| refusal(&error))?;
    let bytes = export.bytes();
    tracing::info!(
        total_bytes = bytes,
        revision = export.revision(),
        took_ms = begun.elapsed().as_millis() as u64,
        "sending database snapshot to client"
    );
    let mut out = Out {
        shared,
        sender,
        chunk: BytesMut::with_capacity(CHUNK_BYTES),
        remaining_bytes: bytes,
        sha256: Sha256::new(),
    };
    if let Err(error) = export.write(&mut out) {
        if sender.is_closed() || shared.stopping() {
            tracing::info!("a backup was broken off");
            return Err(Error::Stopped);
        }
        return Err(refusal(&error));
    }
    let hash = out.sha256.clone().finalize();
    if let Err(error) = out.send(Bytes::copy_from_slice(&hash), 0) {
        tracing::info!(%error, "a backup was broken off");
        return Err(Error::Stopped);
    }
    shared.metrics.backed_up(begun.elapsed());
    tracing::info!(
        total_bytes = bytes,
        took_ms = begun.elapsed().as_millis() as u64,
        "successfully sent database snapshot to client"
    );
    Ok(())
}

/// Cuts what is written into chunks.
struct Out<'a, E: Engine> {
    shared: &'a Shared<E>,
    sender: &'a mpsc::Sender<Result<BackupChunk>>,
    chunk: BytesMut,
    /// Of the file, after the chunks that were sent.
    remaining_bytes: u64,
    sha256: Sha256,
}

impl<E: Engine> Out<'_, E> {
    fn send(&self, bytes: Bytes, remaining_bytes: u64) -> io::Result<()> {
        let mut next = Ok(BackupChunk { bytes, remaining_bytes });
        let begun = Instant::now();
        loop {
            next = match self.sender.try_send(next) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Closed(_)) => return Err(io::ErrorKind::BrokenPipe.into()),
                Err(mpsc::error::TrySendError::Full(next)) => next,
            };
            if self.shared.stopping() {
                return Err(io::Error::other("the server stops"));
            }
            if begun.elapsed() > STALL_MAX {
                return Err(io::Error::other("the client takes nothing any more"));
            }
            std::thread::sleep(QUEUE_PAUSE);
        }
    }

    fn send_chunk(&mut self) -> io::Result<()> {
        let bytes = std::mem::replace(&mut self.chunk, BytesMut::with_capacity(CHUNK_BYTES)).freeze();
        self.sha256.update(&bytes);
        self.remaining_bytes -= bytes.len() as u64;
        self.send(bytes, self.remaining_bytes)
    }
}

impl<E: Engine> Write for Out<'_, E> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fits = bytes.len().min(CHUNK_BYTES - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..fits]);
        if self.chunk.len() == CHUNK_BYTES {
            self.send_chunk()?;
        }
        Ok(fits)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.chunk.is_empty() {
            true => Ok(()),
            false => self.send_chunk(),
        }
    }
}
