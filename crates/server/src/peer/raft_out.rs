//! The RAFT connection to a peer: it is kept open, and carries what is queued.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Buf as _;

use super::accept::{Ended, LINGER, bounds};
use super::dial::{Connection, DialError, dial_peer};
use super::handler::{Purpose, Refusal};
use super::queue::Amount;
use super::raft_frame;
use super::shared::{Backoff, PeerState, Shared};
use super::stream::{Reader, Writer};
use super::tasks::Stop;
use super::wire::{decode_close, kind};

/// Bytes of messages that go into one write. More than that frees no time, and its room in the queue comes late.
const WRITE_BYTES: usize = 4 << 20;
/// A connection that lasted so long shows that the next attempt need not wait.
const STABLE: Duration = Duration::from_secs(5);

/// Keeps a peer connected until it is not in the list any more or the transport stops.
pub(super) async fn run(shared: Arc<Shared>, peer: Arc<PeerState>) {
    let mut backoff = Backoff::new(shared.settings.backoff_min, shared.settings.backoff_max);
    let mut stop = shared.tasks.stop_signal();
    let mut target = peer.target.subscribe();
    loop {
        target.mark_unchanged();
        let begun = Instant::now();
        let dialled = tokio::select! {
            dialled = dial_peer(&shared, &peer, Purpose::Raft, bounds(&shared, Purpose::Raft)) => dialled,
            () = stop.wait() => return,
            () = peer.gone() => return,
        };
        let reason = match dialled {
            Ok(connection) => {
                let url = connection.url.clone();
                tracing::info!(peer = format!("{:x}", peer.id), %url, "connected to a peer");
                let ended = carry(&shared, &peer, connection, stop.clone()).await;
                peer.standing.lock().active_since = None;
                if let Ended::Closed(refusal) = &ended {
                    shared.refused(peer.id, refusal);
                }
                if stop.is_set() || target.borrow().gone {
                    return;
                }
                tracing::warn!(peer = format!("{:x}", peer.id), %url, reason = %ended, "lost a peer");
                if begun.elapsed() > STABLE {
                    backoff.reset();
                }
                ended.to_string()
            }
            Err(DialError::Refused(refusal)) => refused(&peer, refusal),
            Err(DialError::Unreachable(reason)) => {
                // Once for each new reason, since attempts go on for as long as it lasts.
                if peer.standing.lock().last_error.as_ref() != Some(&reason) {
                    tracing::warn!(peer = format!("{:x}", peer.id), reason, "cannot reach a peer");
                }
                reason
            }
        };
        peer.standing.lock().last_error = Some(reason);
        // Raft says again what is still worth saying, and says it better once it knows.
        let dropped = peer.queue.clear();
        peer.counters.dropped_messages.add(dropped.messages as u64);
        peer.counters.dropped_bytes.add(dropped.bytes as u64);
        peer.counters.send_failures.add(1);
        shared.handler.unreachable(peer.id);
        tokio::select! {
            () = tokio::time::sleep(backoff.next()) => {}
            () = peer.awake.notified() => {}
            // A failure says that no sender is left, which cannot be: the peer's state is ours.
            _ = target.changed() => backoff.reset(),
            () = stop.wait() => return,
        }
        if target.borrow().gone {
            return;
        }
    }
}

fn refused(peer: &PeerState, refusal: Refusal) -> String {
    let reason = refusal.to_string();
    // Once is enough for the same refusal, which comes every two seconds.
    if peer.standing.lock().last_error.as_ref() != Some(&reason) {
        tracing::warn!(peer = format!("{:x}", peer.id), reason, "a peer refuses us");
    }
    reason
}

/// Uses a connection until it ends.
async fn carry(shared: &Shared, peer: &PeerState, connection: Connection, stop: Stop) -> Ended {
    let Connection {
        mut reader,
        mut writer,
        url,
    } = connection;
    {
        let mut standing = peer.standing.lock();
        standing.active_since = Some(Instant::now());
        standing.url = Some(url.clone());
    }
    let ended = tokio::select! {
        ended = listen(shared, peer, &mut reader) => ended,
        result = write(shared, peer, &mut writer, stop) => match result {
            Ok(()) => Ended::Done,
            Err(error) => Ended::Write(error),
        },
        () = peer.moved_from(&url) => Ended::Protocol("its address was changed"),
    };
    if matches!(ended, Ended::Done) {
        reader.drain(LINGER).await;
    }
    ended
}

/// Hears signs of life, until there are none.
async fn listen(shared: &Shared, peer: &PeerState, reader: &mut Reader) -> Ended {
    loop {
        let frame = match reader.next(shared.settings.raft_read_timeout).await {
            Ok(frame) => frame,
            Err(error) => return error.into(),
        };
        peer.counters.received_bytes.add(reader.take_read_bytes());
        match frame.split() {
            (kind::PONG, mut body) if body.len() == 8 => {
                let sent = Duration::from_nanos(body.get_u64_le());
                let round_trip = shared.epoch.elapsed().saturating_sub(sent);
                peer.counters.round_trip.set((round_trip.as_nanos() as u64).max(1));
                peer.counters.round_trips.observe(round_trip, 1);
            }
            (kind::ALIVE, _) => {}
            (kind::CLOSE, body) => return Ended::Closed(decode_close(body)),
            _ => return Ended::Protocol("an unexpected frame on a RAFT connection's way back"),
        }
    }
}

/// Writes what is queued as it comes, and a ping from time to time. Ends well when the transport stops, once all that
/// was queued is written.
async fn write(shared: &Shared, peer: &PeerState, writer: &mut Writer, mut stop: Stop) -> std::io::Result<()> {
    let mut messages = Vec::new();
    let mut next_ping = Instant::now();
    loop {
        let stopping = stop.is_set();
        peer.queue.take(WRITE_BYTES, &mut messages);
        let now = Instant::now();
        if now >= next_ping {
            next_ping = now + shared.keepalive_interval();
            let time = shared.epoch.elapsed().as_nanos() as u64;
            writer.batch.frame(kind::PING, &time.to_le_bytes());
        }
        raft_frame::encode(&messages, &mut writer.batch);
        if writer.batch.bytes() > 0 {
            let amount = Amount {
                messages: messages.len(),
                bytes: messages.iter().map(bytes::Bytes::len).sum(),
            };
            messages.clear();
            peer.counters.sent_bytes.add(writer.flush().await?);
            peer.counters.sent_messages.add(amount.messages as u64);
            peer.queue.written(amount);
            continue;
        }
        if stopping {
            return writer.shutdown().await;
        }
        tokio::select! {
            () = peer.queue.filled() => {}
            () = tokio::time::sleep_until(next_ping.into()) => {}
            () = stop.wait() => {}
        }
    }
}
