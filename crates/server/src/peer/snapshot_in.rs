//! Receiving a snapshot. There is one at a time; it outlives its connection for a while, so that it can go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use bytes::{Buf as _, Bytes};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot, watch};

use super::MemberId;
use super::accept::Ended;
use super::counters::Counters;
use super::frame::take_u64;
use super::handler::{Handler, Introduction, Refusal, RefuseReason};
use super::shared::Shared;
use super::snapshot::{
    CHUNKS_WAITING_MAX, ID_BYTES_MAX, META_BYTES_MAX, SnapshotHeader, SnapshotSummary, TOKEN_BYTES_MAX,
};
use super::stream::{Reader, Writer};
use super::wire::{SnapshotOpen, decode_close, kind};

/// The one snapshot that is being received, or was received last.
#[derive(Default)]
pub(super) struct SnapshotDesk {
    slot: Mutex<Slot>,
    /// Held while one takes the place of another.
    opening: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Slot {
    intake: Option<Arc<Intake>>,
    /// The one whose place was taken last: should its sender not know, it must not take it back.
    superseded: Option<(MemberId, Bytes)>,
}

/// A snapshot that is being received. Its thread ends, and drops the sink, when this is dropped.
struct Intake {
    from: MemberId,
    id: Bytes,
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<State>,
    superseded: watch::Sender<bool>,
    /// How many connections have begun to serve it.
    attachments: AtomicU32,
    /// All chunks are there: the thread has been told to finish.
    finishing: AtomicBool,
}

/// What the sink's thread is to do, one after the other.
enum Command {
    Write(Bytes),
    Token(oneshot::Sender<Bytes>),
    /// All chunks are there, over so many connections after the first.
    Finish(u32),
}

/// How far the sink's thread has got.
#[derive(Debug, Clone)]
struct State {
    phase: Phase,
    /// Chunks that the sink has taken.
    written: u64,
}

#[derive(Debug, Clone)]
enum Phase {
    Opening,
    Open,
    Finished,
    Failed(Refusal),
}

/// The work of a sink's thread.
fn run_sink(
    handler: &dyn Handler,
    from: MemberId,
    header: &SnapshotHeader,
    mut commands: mpsc::Receiver<Command>,
    state: &watch::Sender<State>,
) {
    let enter = |phase| state.send_modify(|state| state.phase = phase);
    let failed = |fault: super::SnapshotFault| Phase::Failed(Refusal::new(RefuseReason::Failed, fault.to_string()));
    let mut sink = match handler.open_snapshot(from, header) {
        Ok(sink) => sink,
        Err(refusal) => return enter(Phase::Failed(refusal)),
    };
    enter(Phase::Open);
    let mut summary = SnapshotSummary::default();
    while let Some(command) = commands.blocking_recv() {
        match command {
            Command::Write(chunk) => {
                summary.chunks += 1;
                summary.bytes += chunk.len() as u64;
                match sink.write(chunk) {
                    Ok(()) => state.send_modify(|state| state.written += 1),
                    Err(fault) => return enter(failed(fault)),
                }
            }
            Command::Token(reply) => {
                // The connection may be gone.
                let _ = reply.send(sink.resume_token());
            }
            Command::Finish(resumes) => {
                summary.resumes = resumes;
                return enter(match sink.finish(&summary) {
                    Ok(()) => Phase::Finished,
                    Err(fault) => failed(fault),
                });
            }
        }
    }
}

impl Intake {
    fn start(shared: &Shared, from: MemberId, header: SnapshotHeader) -> std::io::Result<Self> {
        let (commands, received) = mpsc::channel(CHUNKS_WAITING_MAX);
        let (state, observed) = watch::channel(State {
            phase: Phase::Opening,
            written: 0,
        });
        let id = header.id.clone();
        let handler = shared.handler.clone();
        shared.tasks.spawn_thread("snapshot-sink", move || {
            run_sink(handler.as_ref(), from, &header, received, &state);
        })?;
        Ok(Intake {
            from,
            id,
            commands,
            state: observed,
            superseded: watch::Sender::new(false),
            attachments: AtomicU32::new(0),
            finishing: AtomicBool::new(false),
        })
    }

    fn is(&self, from: MemberId, id: &Bytes) -> bool {
        self.from == from && self.id == id
    }

    /// Waits until the sink is there, or cannot be had; whether the thread still ran by then.
    async fn opened(&self) -> bool {
        let opened = |state: &State| !matches!(state.phase, Phase::Opening);
        self.state.clone().wait_for(opened).await.is_ok()
    }

    /// Waits until another snapshot has begun.
    async fn superseded(&self) {
        // The sender is ours.
        let _ = self.superseded.subscribe().wait_for(|superseded| *superseded).await;
    }

    /// Whether it came to an end that is none.
    fn is_lost(&self) -> bool {
        let ended = self.state.has_changed().is_err();
        match self.state.borrow().phase {
            Phase::Finished => false,
            Phase::Failed(_) => true,
            Phase::Opening | Phase::Open => ended,
        }
    }
}

/// A connection that serves an intake. When it is dropped, the intake is kept for a while.
struct Attached<'a> {
    shared: &'a Arc<Shared>,
    intake: Arc<Intake>,
    attachment: u32,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        let (shared, intake) = (self.shared.clone(), Arc::downgrade(&self.intake));
        let attachment = self.attachment;
        self.shared.tasks.spawn(async move {
            let mut stop = shared.tasks.stop_signal();
            tokio::select! {
                () = tokio::time::sleep(shared.settings.snapshot_keep) => {}
                () = stop.wait() => {}
            }
            let mut slot = shared.snapshots.slot.lock();
            let Some(intake) = intake.upgrade() else { return };
            let is_current = slot
                .intake
                .as_ref()
                .is_some_and(|current| Arc::ptr_eq(current, &intake));
            if is_current && intake.attachments.load(Ordering::Relaxed) == attachment {
                slot.intake = None;
            }
        });
    }
}

impl SnapshotDesk {
    /// Forgets the snapshot, so that its thread ends.
    pub(super) fn clear(&self) {
        self.slot.lock().intake = None;
    }
}

/// Receives a snapshot, as far as this connection goes.
pub(super) async fn serve(shared: &Arc<Shared>, who: &Introduction, reader: &mut Reader, writer: &mut Writer) -> Ended {
    match receive(shared, who, reader, writer).await {
        Ok(ended) | Err(ended) => ended,
    }
}

async fn receive(
    shared: &Arc<Shared>,
    who: &Introduction,
    reader: &mut Reader,
    writer: &mut Writer,
) -> Result<Ended, Ended> {
    let (kind::OPEN, body) = reader.next(shared.settings.raft_read_timeout).await?.split() else {
        return Err(Ended::Protocol("a snapshot must begin with its header"));
    };
    let open = SnapshotOpen::decode(body).map_err(|_| Ended::Protocol("a snapshot's header cannot be read"))?;
    if open.id.len() > ID_BYTES_MAX || open.meta.len() > META_BYTES_MAX {
        return Err(Ended::Protocol("a snapshot's header is too long"));
    }
    // It would keep the whole frame alive.
    let header = SnapshotHeader {
        id: Bytes::copy_from_slice(&open.id),
        meta: Bytes::copy_from_slice(&open.meta),
    };
    let attached = writer
        .alive_while(shared.keepalive_interval(), attach(shared, who.from, header))
        .await?
        .map_err(Ended::Refused)?;
    let intake = &attached.intake;
    tokio::select! {
        ended = go_on(shared, who, intake, reader, writer) => ended,
        () = intake.superseded() => Err(Ended::Refused(superseded_refusal())),
    }
}

fn superseded_refusal() -> Refusal {
    Refusal::new(RefuseReason::Superseded, "another snapshot has begun")
}

/// Finds the intake of a snapshot, or begins one, once the one before is gone.
async fn attach(shared: &Arc<Shared>, from: MemberId, header: SnapshotHeader) -> Result<Attached<'_>, Refusal> {
    let desk = &shared.snapshots;
    let _opening = desk.opening.lock().await;
    let attach = |intake: Arc<Intake>| {
        let attachment = intake.attachments.fetch_add(1, Ordering::Relaxed) + 1;
        Attached {
            shared,
            intake,
            attachment,
        }
    };
    let before = {
        let mut slot = desk.slot.lock();
        if let Some(current) = &slot.intake
            && current.is(from, &header.id)
            && !current.is_lost()
        {
            return Ok(attach(current.clone()));
        }
        if slot.superseded.as_ref() == Some(&(from, header.id.clone())) {
            return Err(superseded_refusal());
        }
        slot.intake.take().map(|before| {
            if !before.is(from, &header.id) {
                slot.superseded = Some((before.from, before.id.clone()));
            }
            before.superseded.send_replace(true);
            before.state.clone()
        })
    };
    if let Some(mut before) = before {
        // Until its sender is gone, which is when its thread has ended.
        while before.changed().await.is_ok() {}
    }
    let intake =
        Intake::start(shared, from, header).map_err(|error| Refusal::new(RefuseReason::Failed, error.to_string()))?;
    let intake = Arc::new(intake);
    desk.slot.lock().intake = Some(intake.clone());
    Ok(attach(intake))
}

/// Goes on where the sink is.
async fn go_on(
    shared: &Shared,
    who: &Introduction,
    intake: &Intake,
    reader: &mut Reader,
    writer: &mut Writer,
) -> Result<Ended, Ended> {
    let opened = writer.alive_while(shared.keepalive_interval(), intake.opened()).await?;
    let counters = shared.counters(who.from);
    let takes_chunks = !intake.finishing.load(Ordering::Acquire);
    // Nothing is acknowledged twice.
    let mut acknowledged = intake.state.borrow().written;
    if !takes_chunks {
        writer.send(kind::FINISHING, &[]).await?;
    }
    if opened && takes_chunks && matches!(intake.state.borrow().phase, Phase::Open) {
        let (reply, token) = oneshot::channel();
        let asked = async {
            // Without a thread there is no answer either.
            let _ = intake.commands.send(Command::Token(reply)).await;
            token.await
        };
        let token = writer.alive_while(shared.keepalive_interval(), asked).await?;
        if let Ok(token) = token {
            if token.len() > TOKEN_BYTES_MAX {
                return Err(Ended::Refused(Refusal::new(
                    RefuseReason::Failed,
                    "the resume token is too long",
                )));
            }
            // The thread has done all that came before.
            acknowledged = intake.state.borrow().written;
            writer.send(kind::READY, &token).await?;
        }
    }
    tokio::select! {
        ended = report(shared, intake, writer, acknowledged) => ended,
        ended = take_chunks(shared, intake, &counters, reader, takes_chunks) => Err(ended),
    }
}

/// Tells the sender how far it has got, until the end.
async fn report(shared: &Shared, intake: &Intake, writer: &mut Writer, before: u64) -> Result<Ended, Ended> {
    let mut state = intake.state.clone();
    let mut acknowledged = before;
    loop {
        let State { phase, written } = state.borrow_and_update().clone();
        match phase {
            Phase::Opening | Phase::Open => {}
            Phase::Failed(refusal) => return Err(Ended::Refused(refusal)),
            Phase::Finished => {
                writer.send(kind::DONE, &[]).await?;
                return Ok(Ended::Done);
            }
        }
        if written > acknowledged {
            acknowledged = written;
            writer.send(kind::ACK, &(written - before).to_le_bytes()).await?;
        }
        let changed = writer.alive_while(shared.keepalive_interval(), state.changed()).await?;
        if changed.is_err() {
            return Err(Ended::Refused(Refusal::new(
                RefuseReason::Failed,
                "the sink's thread ended",
            )));
        }
    }
}

/// Hands chunks to the sink's thread, and the end. Goes on reading after that, to notice when the sender is gone.
async fn take_chunks(
    shared: &Shared,
    intake: &Intake,
    counters: &Counters,
    reader: &mut Reader,
    mut takes_chunks: bool,
) -> Ended {
    let (mut chunks, mut bytes, mut running) = (0_u64, 0_u64, 0);
    loop {
        let frame = match reader.next(shared.settings.raft_read_timeout).await {
            Ok(frame) => frame,
            Err(error) => return error.into(),
        };
        let checksum = frame.checksum;
        let command = match frame.split() {
            (kind::CHUNK, mut chunk) if takes_chunks => {
                if take_u64(&mut chunk) != Some(chunks) || chunk.is_empty() {
                    return Ended::Protocol("a chunk out of order");
                }
                running = crc32c::crc32c_append(running, &checksum.to_le_bytes());
                chunks += 1;
                bytes += chunk.len() as u64;
                counters.snapshot_received_bytes.add(chunk.len() as u64);
                Command::Write(chunk)
            }
            (kind::END, mut end) if takes_chunks && end.len() == 20 => {
                if (end.get_u64_le(), end.get_u64_le(), end.get_u32_le()) != (chunks, bytes, running) {
                    return Ended::Protocol("a snapshot does not add up");
                }
                takes_chunks = false;
                Command::Finish(intake.attachments.load(Ordering::Relaxed) - 1)
            }
            (kind::ALIVE, _) => continue,
            (kind::CLOSE, body) => return Ended::Closed(decode_close(body)),
            _ => return Ended::Protocol("an unexpected frame on a SNAPSHOT connection"),
        };
        if intake.commands.send(command).await.is_err() {
            // The thread has ended, and the other half of this connection says why.
            return std::future::pending().await;
        }
        // Not before the thread is sure to be told: this may end while it waits for room.
        if !takes_chunks {
            intake.finishing.store(true, Ordering::Release);
        }
    }
}
