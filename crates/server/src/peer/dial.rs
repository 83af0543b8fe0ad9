//! Connections that we open.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use prost::Message as _;

use super::address::PeerUrl;
use super::frame::{FrameReader, FrameWriter, message_frame};
use super::handler::{Purpose, Refusal, RefuseReason};
use super::settings::{Settings, Tls};
use super::shared::{PeerState, Shared};
use super::stream::{self, Reader, Writer};
use super::version::check_peer;
use super::wire::{Answer, HANDSHAKE_BYTES_MAX, Hello, MAGIC, VERSION};

/// A connection that was accepted.
pub(super) struct Connection {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    pub(super) url: PeerUrl,
}

/// Why there is none.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum DialError {
    /// Nobody answers there, or not as a peer does.
    #[error("{0}")]
    Unreachable(String),
    /// The other side does not take us.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Limits of a connection once it is accepted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) payload_max: usize,
    pub(super) stall: Duration,
}

/// Connects and introduces us.
pub(super) async fn dial(
    url: &PeerUrl,
    tls: &Tls,
    settings: &Settings,
    hello: &Hello,
    bounds: Bounds,
) -> Result<Connection, DialError> {
    let limit = settings.connect_timeout;
    match tokio::time::timeout(limit, dial_unbounded(url, tls, settings, hello, bounds)).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(DialError::Unreachable(reason))) => Err(DialError::Unreachable(format!("{url}: {reason}"))),
        Ok(Err(refused)) => Err(refused),
        Err(_) => Err(DialError::Unreachable(format!("{url}: not connected within {limit:?}"))),
    }
}

async fn dial_unbounded(
    url: &PeerUrl,
    tls: &Tls,
    settings: &Settings,
    hello: &Hello,
    bounds: Bounds,
) -> Result<Connection, DialError> {
    let unreachable = |error: &dyn std::error::Error| DialError::Unreachable(error.to_string());
    let stream = stream::connect(url, tls, settings.local_address)
        .await
        .map_err(|error| unreachable(&error))?;
    let (read, write) = tokio::io::split(stream);
    let mut reader = FrameReader::new(read, HANDSHAKE_BYTES_MAX);
    let mut writer = FrameWriter::new(write, bounds.stall);

    let mut greeting = BytesMut::new();
    greeting.put_slice(&MAGIC);
    greeting.put_u8(VERSION);
    greeting.put(message_frame(hello));
    writer
        .write_raw(greeting.freeze())
        .await
        .map_err(|error| unreachable(&error))?;
    let frame = reader
        .next(settings.connect_timeout)
        .await
        .map_err(|error| unreachable(&error))?;
    let answer = Answer::decode(frame.payload).map_err(|error| unreachable(&error))?;
    if let Some(refused) = answer.refused {
        return Err(DialError::Refused(refused.into()));
    }
    if hello.to != 0 && answer.member_id != hello.to {
        let reason = format!("member {:x} answers there, not {:x}", answer.member_id, hello.to);
        return Err(DialError::Unreachable(reason));
    }
    // An older release may take us that we do not get along with.
    if let Err(text) = check_peer(&answer.cluster_version) {
        return Err(DialError::Refused(Refusal::new(RefuseReason::Incompatible, text)));
    }
    reader.set_payload_max(bounds.payload_max);
    Ok(Connection {
        reader,
        writer,
        url: url.clone(),
    })
}

/// Connects to a peer at the first of its URLs that works, beginning with the one that did last time. Tells the node if
/// the peer does not take us.
pub(super) async fn dial_peer(
    shared: &Shared,
    peer: &PeerState,
    purpose: Purpose,
    bounds: Bounds,
) -> Result<Connection, DialError> {
    let urls = peer.target.borrow().urls.clone();
    let mut failure = DialError::Unreachable("it has no URL".to_owned());
    for _ in 0..urls.len() {
        let turn = peer.url_turn.load(Ordering::Relaxed);
        let url = &urls[turn % urls.len()];
        let hello = shared.hello(peer.id, purpose);
        match dial(url, &shared.tls, &shared.settings, &hello, bounds).await {
            Ok(connection) => return Ok(connection),
            // A refusal says more than silence at another address.
            Err(error) if !matches!(failure, DialError::Refused(_)) => failure = error,
            Err(_) => {}
        }
        // Another task may have moved on already; one step is enough.
        let next = turn.wrapping_add(1);
        let _ = peer
            .url_turn
            .compare_exchange(turn, next, Ordering::Relaxed, Ordering::Relaxed);
    }
    if let DialError::Refused(refusal) = &failure {
        shared.refused(peer.id, refusal);
    }
    Err(failure)
}
