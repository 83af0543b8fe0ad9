//! Sending a snapshot: over as many connections as it takes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};

use super::accept::bounds;
use super::dial::{Connection, DialError, dial_peer};
use super::handler::{Purpose, Refusal, RefuseReason};
use super::shared::{Backoff, PeerState, Shared};
use super::snapshot::{
    CHUNKS_WAITING_MAX, ID_BYTES_MAX, META_BYTES_MAX, SnapshotError, SnapshotHeader, SnapshotSource, SnapshotSummary,
    SnapshotTransfer,
};
use super::stream::{Reader, Writer};
use super::wire::{SnapshotOpen, decode_close, kind};

/// Begins a transfer.
pub(super) fn start(
    shared: &Arc<Shared>,
    peer: Arc<PeerState>,
    header: SnapshotHeader,
    source: Box<dyn SnapshotSource>,
) -> SnapshotTransfer {
    if header.id.len() > ID_BYTES_MAX || header.meta.len() > META_BYTES_MAX {
        return SnapshotTransfer::failed(SnapshotError::Source(
            "its id or what is said of it is too long".to_owned(),
        ));
    }
    let Some(turn) = Turn::take(peer) else {
        return SnapshotTransfer::failed(SnapshotError::Busy);
    };
    let chunks = match SourceThread::start(shared, source) {
        Ok(chunks) => chunks,
        Err(error) => return SnapshotTransfer::failed(SnapshotError::Source(error.to_string())),
    };
    let (sender, outcome) = oneshot::channel();
    let shared_by_task = shared.clone();
    let task = shared.tasks.spawn(async move {
        let shared = shared_by_task;
        let mut stop = shared.tasks.stop_signal();
        let result = tokio::select! {
            result = transfer(&shared, &turn.0, header, chunks) => result,
            () = stop.wait() => Err(SnapshotError::Stopped),
            () = turn.0.gone() => Err(SnapshotError::Stopped),
        };
        // The next one may begin once the outcome is known.
        drop(turn);
        // Nobody may want to know.
        let _ = sender.send(result);
    });
    SnapshotTransfer { outcome, task }
}

/// Held by the one transfer to a peer.
struct Turn(Arc<PeerState>);

impl Turn {
    fn take(peer: Arc<PeerState>) -> Option<Self> {
        let free = !peer.snapshot_runs.swap(true, Ordering::AcqRel);
        free.then_some(Turn(peer))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.snapshot_runs.store(false, Ordering::Release);
    }
}

/// The thread of a source. It ends, and drops the source, with this handle.
struct SourceThread {
    seeks: std::sync::mpsc::Sender<Seek>,
}

/// From where on chunks are wanted, and where they go.
struct Seek {
    resume: Bytes,
    chunks: mpsc::Sender<Result<Option<Bytes>, String>>,
}

impl SourceThread {
    fn start(shared: &Shared, mut source: Box<dyn SnapshotSource>) -> std::io::Result<Self> {
        let (seeks, wanted) = std::sync::mpsc::channel::<Seek>();
        let chunk_bytes_max = shared.settings.frame_bytes_max;
        shared.tasks.spawn_thread("snapshot-source", move || {
            crate::snapshot::let_others_go_first();
            while let Ok(Seek { resume, chunks }) = wanted.recv() {
                give_chunks(source.as_mut(), chunk_bytes_max, &resume, &chunks);
            }
        })?;
        Ok(SourceThread { seeks })
    }

    fn seek(&self, resume: Bytes) -> mpsc::Receiver<Result<Option<Bytes>, String>> {
        let (chunks, given) = mpsc::channel(CHUNKS_WAITING_MAX);
        // If the thread is gone, no chunk comes, which is noticed there.
        let _ = self.seeks.send(Seek { resume, chunks });
        given
    }
}

/// Gives chunks until they are not wanted any more, the end, or a failure.
fn give_chunks(
    source: &mut dyn SnapshotSource,
    chunk_bytes_max: usize,
    resume: &[u8],
    chunks: &mpsc::Sender<Result<Option<Bytes>, String>>,
) {
    if let Err(fault) = source.seek(resume) {
        let _ = chunks.blocking_send(Err(fault.to_string()));
        return;
    }
    loop {
        let next = match source.next() {
            Ok(Some(chunk)) if chunk.is_empty() || chunk.len() > chunk_bytes_max => {
                Err(format!("a chunk of {} bytes", chunk.len()))
            }
            Ok(next) => Ok(next),
            Err(fault) => Err(fault.to_string()),
        };
        let last = !matches!(next, Ok(Some(_)));
        if chunks.blocking_send(next).is_err() || last {
            return;
        }
    }
}

/// How far a transfer has got.
struct Progress {
    state: Mutex<ProgressState>,
}

struct ProgressState {
    since: Instant,
    /// All is sent; the receiver finishes.
    finishing: bool,
    /// Since when, whatever happened to the connection meanwhile.
    finishing_since: Option<Instant>,
    summary: SnapshotSummary,
    last_break: String,
}

impl Progress {
    /// The receiver has taken a chunk.
    fn note(&self) {
        let mut state = self.state.lock();
        state.since = Instant::now();
        state.finishing_since = state.finishing.then_some(state.since);
    }

    /// The receiver finishes.
    fn finish(&self) {
        let mut state = self.state.lock();
        state.finishing = true;
        state.finishing_since.get_or_insert_with(Instant::now);
    }

    /// The connection broke. Whether the receiver finishes will be seen.
    fn interrupt(&self, reason: String) {
        let mut state = self.state.lock();
        state.last_break = reason;
        if std::mem::take(&mut state.finishing) {
            state.since = Instant::now();
        }
    }

    /// Waits until there was none for too long.
    async fn stalled(&self, shared: &Shared) -> SnapshotError {
        loop {
            let (since, after, last) = {
                let state = self.state.lock();
                let (since, after) = match state.finishing_since {
                    Some(since) if state.finishing => (since, shared.settings.snapshot_finish_timeout),
                    _ => (state.since, shared.settings.snapshot_stall_timeout),
                };
                (since, after, state.last_break.clone())
            };
            if since.elapsed() >= after {
                return SnapshotError::Stalled { after, last };
            }
            tokio::time::sleep_until((since + after).into()).await;
        }
    }
}

/// Why an attempt ended without success.
enum Failure {
    /// It can go on over another connection.
    Broken(String),
    /// It cannot.
    Final(SnapshotError),
}

impl From<super::frame::ReadError> for Failure {
    fn from(error: super::frame::ReadError) -> Self {
        Failure::Broken(error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Broken(error.to_string())
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        match refusal.reason {
            RefuseReason::Failed => Failure::Final(SnapshotError::Sink(refusal.text)),
            RefuseReason::Busy | RefuseReason::Stopping => Failure::Broken(refusal.to_string()),
            _ => Failure::Final(SnapshotError::Refused(refusal)),
        }
    }
}

async fn transfer(
    shared: &Shared,
    peer: &PeerState,
    header: SnapshotHeader,
    source: SourceThread,
) -> Result<SnapshotSummary, SnapshotError> {
    let progress = Progress {
        state: Mutex::new(ProgressState {
            since: Instant::now(),
            finishing: false,
            finishing_since: None,
            summary: SnapshotSummary::default(),
            last_break: "nothing happened".to_owned(),
        }),
    };
    let attempts = async {
        let mut backoff = Backoff::new(shared.settings.backoff_min, shared.settings.backoff_max);
        loop {
            let before = progress.state.lock().since;
            let reason = match attempt(shared, peer, &header, &source, &progress).await {
                Ok(()) => return Ok(progress.state.lock().summary),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Broken(reason)) => reason,
            };
            tracing::info!(peer = format!("{:x}", peer.id), reason, "a snapshot was interrupted");
            let advanced = progress.state.lock().since > before;
            progress.interrupt(reason);
            if advanced {
                backoff.reset();
            }
            tokio::time::sleep(backoff.next()).await;
        }
    };
    tokio::select! {
        result = attempts => result,
        stalled = progress.stalled(shared) => Err(stalled),
    }
}

/// Sends what the receiver does not have yet, over one connection.
async fn attempt(
    shared: &Shared,
    peer: &PeerState,
    header: &SnapshotHeader,
    source: &SourceThread,
    progress: &Progress,
) -> Result<(), Failure> {
    let Connection {
        mut reader, mut writer, ..
    } = match dial_peer(shared, peer, Purpose::Snapshot, bounds(shared, Purpose::Snapshot)).await {
        Ok(connection) => connection,
        Err(DialError::Unreachable(reason)) => return Err(Failure::Broken(reason)),
        Err(DialError::Refused(refusal)) => return Err(refusal.into()),
    };
    let open = SnapshotOpen {
        id: header.id.clone(),
        meta: header.meta.clone(),
    };
    writer.send(kind::OPEN, &open.encode_to_vec()).await?;
    let Some(resume) = writer
        .alive_while(shared.keepalive_interval(), ready(shared, &mut reader, progress))
        .await??
    else {
        return Ok(());
    };
    let chunks = source.seek(resume);
    tokio::select! {
        outcome = listen(shared, &mut reader, progress) => outcome,
        failure = send_chunks(shared, peer, &mut writer, chunks, progress) => Err(failure),
    }
}

/// Waits for the receiver to say from where on; `None` if it has all of it.
async fn ready(shared: &Shared, reader: &mut Reader, progress: &Progress) -> Result<Option<Bytes>, Failure> {
    loop {
        match reader.next(shared.settings.raft_read_timeout).await?.split() {
            (kind::READY, resume) => return Ok(Some(resume)),
            (kind::DONE, _) => return Ok(None),
            (kind::FINISHING, _) => progress.finish(),
            (kind::ALIVE, _) => {}
            (kind::CLOSE, body) => return Err(decode_close(body).into()),
            _ => return Err(Failure::Broken("an unexpected frame".to_owned())),
        }
    }
}

async fn listen(shared: &Shared, reader: &mut Reader, progress: &Progress) -> Result<(), Failure> {
    let mut acknowledged = 0;
    loop {
        match reader.next(shared.settings.raft_read_timeout).await?.split() {
            (kind::ACK, mut body) if body.len() == 8 => {
                let chunks = body.get_u64_le();
                if chunks > acknowledged {
                    acknowledged = chunks;
                    progress.note();
                }
            }
            (kind::DONE, _) => return Ok(()),
            (kind::ALIVE, _) => {}
            (kind::CLOSE, body) => return Err(decode_close(body).into()),
            _ => return Err(Failure::Broken("an unexpected frame".to_owned())),
        }
    }
}

/// Sends chunks to the end, and then waits: it is for the receiver to say that it is done.
async fn send_chunks(
    shared: &Shared,
    peer: &PeerState,
    writer: &mut Writer,
    chunks: mpsc::Receiver<Result<Option<Bytes>, String>>,
    progress: &Progress,
) -> Failure {
    let sent = send_all(shared, peer, writer, chunks, progress).await;
    if let Err(failure) = sent {
        return failure;
    }
    match writer
        .alive_while(shared.keepalive_interval(), std::future::pending::<Failure>())
        .await
    {
        Ok(failure) => failure,
        Err(error) => error.into(),
    }
}

async fn send_all(
    shared: &Shared,
    peer: &PeerState,
    writer: &mut Writer,
    mut chunks: mpsc::Receiver<Result<Option<Bytes>, String>>,
    progress: &Progress,
) -> Result<(), Failure> {
    let interval = shared.keepalive_interval();
    let mut pace = Pace::new(shared);
    let (mut sequence, mut bytes, mut running) = (0_u64, 0_u64, 0);
    loop {
        let chunk = match writer.alive_while(interval, chunks.recv()).await? {
            Some(Ok(Some(chunk))) => chunk,
            Some(Ok(None)) => break,
            Some(Err(reason)) => return Err(Failure::Final(SnapshotError::Source(reason))),
            None => {
                let reason = "its thread ended".to_owned();
                return Err(Failure::Final(SnapshotError::Source(reason)));
            }
        };
        writer
            .alive_while(interval, tokio::time::sleep_until(pace.next(chunk.len()).into()))
            .await?;
        writer.batch.begin(kind::CHUNK);
        writer.batch.put_u64(sequence);
        writer.batch.put(&chunk);
        running = crc32c::crc32c_append(running, &writer.batch.end().to_le_bytes());
        writer.flush().await?;
        sequence += 1;
        bytes += chunk.len() as u64;
        peer.counters.snapshot_sent_bytes.add(chunk.len() as u64);
        let summary = &mut progress.state.lock().summary;
        summary.chunks += 1;
        summary.bytes += chunk.len() as u64;
        if sequence == 1 && summary.chunks > 1 {
            summary.resumes += 1;
        }
    }
    writer.batch.begin(kind::END);
    writer.batch.put_u64(sequence);
    writer.batch.put_u64(bytes);
    writer.batch.put_u32(running);
    writer.batch.end();
    writer.flush().await?;
    progress.finish();
    Ok(())
}

/// Spreads chunks over time.
struct Pace {
    bytes_per_second: u64,
    pause_max: Duration,
    next: Instant,
}

impl Pace {
    fn new(shared: &Shared) -> Self {
        Pace {
            bytes_per_second: shared.settings.snapshot_bytes_per_second,
            // However slow it is to be, it must not look stalled.
            pause_max: shared.settings.snapshot_stall_timeout / 2,
            next: Instant::now(),
        }
    }

    /// When a chunk of so many bytes may go out.
    fn next(&mut self, bytes: usize) -> Instant {
        let now = self.next.max(Instant::now());
        if self.bytes_per_second > 0 {
            let pause = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
            self.next = now + pause.min(self.pause_max);
        }
        now
    }
}
