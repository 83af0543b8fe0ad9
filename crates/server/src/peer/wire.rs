//! What goes over a peer connection, besides the contents of frames.
//!
//! ```text
//! connection = preface frame(Hello)            -> frame(Answer)
//! preface    = 0x89 "MSPEER" version(u8)
//! frame      = length(u32) crc32c(u32) payload      payload = kind(u8) body
//! ```
//!
//! Numbers are little-endian; the checksum is that of the payload. The payloads of `Hello` and `Answer` are these
//! messages alone. Preface, frames, `Hello` and `Answer` stay as they are in later versions, but for fields that are
//! added, so that one can tell another that they do not fit.

use bytes::Bytes;
use prost::Message as _;

use super::handler::{Purpose, Refusal, RefuseReason};

/// The first bytes of a connection. The very first is no letter, so that no text begins like that.
pub(super) const MAGIC: [u8; 7] = *b"\x89MSPEER";
/// The version of the protocol.
pub(super) const VERSION: u8 = 1;
/// Most bytes of a frame before a connection is accepted.
pub(super) const HANDSHAKE_BYTES_MAX: usize = 64 << 10;
/// Most URLs that a member may have.
pub(super) const PEER_URLS_MAX: usize = 64;

/// The first byte of each frame's payload.
pub(super) mod kind {
    /// `(length(u32) message)*`, on RAFT.
    pub(in crate::peer) const MESSAGES: u8 = 1;
    /// `time(u64)`, to be sent back.
    pub(in crate::peer) const PING: u8 = 2;
    /// `time(u64)`, sent back.
    pub(in crate::peer) const PONG: u8 = 3;
    /// Nothing: the sender lives.
    pub(in crate::peer) const ALIVE: u8 = 4;
    /// `Refused`: why the connection ends.
    pub(in crate::peer) const CLOSE: u8 = 5;
    /// `id(u64) request`, on CALL.
    pub(in crate::peer) const REQUEST: u8 = 6;
    /// `id(u64) status(u8) answer`, on CALL.
    pub(in crate::peer) const RESPONSE: u8 = 7;
    /// `id(u64)`: the answer is not wanted any more.
    pub(in crate::peer) const CANCEL: u8 = 8;
    /// `SnapshotOpen`, on SNAPSHOT, and so on below.
    pub(in crate::peer) const OPEN: u8 = 9;
    /// The resume token.
    pub(in crate::peer) const READY: u8 = 10;
    /// `sequence(u64) chunk`.
    pub(in crate::peer) const CHUNK: u8 = 11;
    /// `chunks(u64) bytes(u64) checksum(u32)`.
    pub(in crate::peer) const END: u8 = 12;
    /// `chunks(u64)` of this connection that the sink has taken.
    pub(in crate::peer) const ACK: u8 = 13;
    /// Nothing: the snapshot is finished.
    pub(in crate::peer) const DONE: u8 = 14;
    /// Nothing: all chunks came over an earlier connection, and the sink finishes.
    pub(in crate::peer) const FINISHING: u8 = 15;
}

/// How a member introduces itself.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Hello {
    #[prost(uint32, tag = "1")]
    pub(super) purpose: u32,
    /// 0: not known yet.
    #[prost(fixed64, tag = "2")]
    pub(super) cluster_id: u64,
    /// 0: none yet.
    #[prost(fixed64, tag = "3")]
    pub(super) from: u64,
    /// 0: whoever is there.
    #[prost(fixed64, tag = "4")]
    pub(super) to: u64,
    #[prost(string, tag = "5")]
    pub(super) version: String,
    #[prost(string, repeated, tag = "6")]
    pub(super) peer_urls: Vec<String>,
    #[prost(fixed64, tag = "7")]
    pub(super) incarnation: u64,
    /// Rises with each connection of an incarnation.
    #[prost(uint64, tag = "8")]
    pub(super) sequence: u64,
    /// The cluster version of its release; empty from a release that does not say it.
    #[prost(string, tag = "9")]
    pub(super) cluster_version: String,
}

/// What it is told.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Answer {
    /// Not there: accepted.
    #[prost(message, optional, tag = "1")]
    pub(super) refused: Option<Refused>,
    #[prost(fixed64, tag = "2")]
    pub(super) cluster_id: u64,
    #[prost(fixed64, tag = "3")]
    pub(super) member_id: u64,
    #[prost(string, tag = "4")]
    pub(super) version: String,
    /// As in [`Hello`].
    #[prost(string, tag = "5")]
    pub(super) cluster_version: String,
}

/// A refusal.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Refused {
    #[prost(uint32, tag = "1")]
    pub(super) reason: u32,
    #[prost(string, tag = "2")]
    pub(super) text: String,
}

/// What a snapshot begins with.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SnapshotOpen {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) meta: Bytes,
}

impl From<&Refusal> for Refused {
    fn from(refusal: &Refusal) -> Self {
        Refused {
            reason: refusal.reason.code(),
            text: refusal.text.clone(),
        }
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        Refusal {
            reason: RefuseReason::from_code(refused.reason),
            text: refused.text,
        }
    }
}

/// The refusal in the body of a `CLOSE` frame. One that cannot be read is still a refusal.
pub(super) fn decode_close(body: Bytes) -> Refusal {
    match Refused::decode(body) {
        Ok(refused) => refused.into(),
        Err(_) => Refusal::new(RefuseReason::Other(0), "for a reason that cannot be read"),
    }
}

impl Purpose {
    pub(super) fn code(self) -> u32 {
        match self {
            Purpose::Raft => 1,
            Purpose::Call => 2,
            Purpose::Snapshot => 3,
        }
    }

    pub(super) fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Purpose::Raft),
            2 => Some(Purpose::Call),
            3 => Some(Purpose::Snapshot),
            _ => None,
        }
    }
}
