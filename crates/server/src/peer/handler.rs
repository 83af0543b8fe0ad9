//! What the transport asks of the node.

use std::fmt;
use std::pin::Pin;

use bytes::Bytes;

use super::MemberId;
use super::snapshot::{SnapshotHeader, SnapshotSink};

/// A future in a box, as a trait object's methods must return it.
pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    /// Raft's messages, one way.
    Raft,
    /// Requests and their answers.
    Call,
    /// One snapshot.
    Snapshot,
}

/// Why a connection or a snapshot is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum RefuseReason {
    /// It is for another cluster.
    WrongCluster,
    /// The sender was removed from the cluster.
    Removed,
    /// It is for another member.
    WrongMember,
    /// The protocol or the software is of a version that we do not get along with.
    Incompatible,
    /// The sender is no member.
    Stranger,
    /// Too many connections.
    Busy,
    /// A newer connection or snapshot took its place.
    Superseded,
    /// The member is shutting down.
    Stopping,
    /// The snapshot could not be taken.
    Failed,
    /// A reason that this version does not know.
    Other(u32),
}

impl RefuseReason {
    pub(super) fn code(self) -> u32 {
        match self {
            RefuseReason::WrongCluster => 1,
            RefuseReason::Removed => 2,
            RefuseReason::WrongMember => 3,
            RefuseReason::Incompatible => 4,
            RefuseReason::Stranger => 5,
            RefuseReason::Busy => 6,
            RefuseReason::Superseded => 7,
            RefuseReason::Stopping => 8,
            RefuseReason::Failed => 9,
            RefuseReason::Other(code) => code,
        }
    }

    pub(super) fn from_code(code: u32) -> Self {
        match code {
            1 => RefuseReason::WrongCluster,
            2 => RefuseReason::Removed,
            3 => RefuseReason::WrongMember,
            4 => RefuseReason::Incompatible,
            5 => RefuseReason::Stranger,
            6 => RefuseReason::Busy,
            7 => RefuseReason::Superseded,
            8 => RefuseReason::Stopping,
            9 => RefuseReason::Failed,
            code => RefuseReason::Other(code),
        }
    }

    /// Whether it may be otherwise in a moment, without anybody's doing.
    pub(super) fn is_passing(self) -> bool {
        matches!(
            self,
            RefuseReason::Busy | RefuseReason::Superseded | RefuseReason::Stopping
        )
    }
}

/// A reason, and what a person should know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Why.
    pub(crate) reason: RefuseReason,
    /// In words.
    pub(crate) text: String,
}

impl Refusal {
    /// A reason and its words.
    pub(crate) fn new(reason: RefuseReason, text: impl Into<String>) -> Self {
        Refusal {
            reason,
            text: text.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.reason {
            RefuseReason::WrongCluster => "wrong cluster",
            RefuseReason::Removed => "removed from the cluster",
            RefuseReason::WrongMember => "wrong member",
            RefuseReason::Incompatible => "incompatible version",
            RefuseReason::Stranger => "not a member",
            RefuseReason::Busy => "busy",
            RefuseReason::Superseded => "superseded",
            RefuseReason::Stopping => "shutting down",
            RefuseReason::Failed => "failed",
            RefuseReason::Other(code) => return write!(f, "refused ({code}): {}", self.text),
        };
        write!(f, "{reason}: {}", self.text)
    }
}

impl std::error::Error for Refusal {}

/// What the other side of a connection says of itself. Nothing but its certificate proves it.
#[derive(Debug, Clone)]
pub(crate) struct Introduction {
    /// Who it is; 0 for a joiner that has no id yet, whose purpose then is [`Purpose::Call`].
    pub(crate) from: MemberId,
    /// Our cluster's id, or 0 for a joiner that does not know it yet, whose purpose then is [`Purpose::Call`].
    pub(crate) cluster_id: u64,
    /// What it wants.
    pub(crate) purpose: Purpose,
    /// Where it can be reached.
    pub(crate) peer_urls: Vec<String>,
    /// Its software's version.
    pub(crate) version: String,
    /// A random number that it drew when it started.
    pub(crate) incarnation: u64,
}

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The member, 0 for a joiner.
    pub(crate) member: MemberId,
    /// Whether it named our cluster. If not, it may be told what a joiner needs, and nothing else.
    pub(crate) cluster_checked: bool,
}

/// What the node supplies. Its methods are called from the runtime's threads, many at once, and must not block unless
/// it says so.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Decides on a connection before it is accepted, and again on every accepted one whenever the peers are set. The
    /// transport has checked the cluster's id where one is given, whom it is for, and that only callers are nobody.
    ///
    /// # Errors
    /// Why it is refused. The other side is told.
    fn admit(&self, who: &Introduction) -> Result<(), Refusal>;

    /// Takes messages of a member, in the order in which they were sent; one call at a time for each member. Nothing
    /// more is read from that member while the future waits. It is dropped half way if the connection ends.
    ///
    /// The messages are slices of what was read: copy what is to live long.
    fn receive(&self, from: MemberId, messages: Vec<Bytes>) -> BoxFuture<'_, ()>;

    /// Answers a request; many at once. Dropped half way if the caller gives up or its connection breaks. An answer
    /// longer than a frame does not arrive, which the caller is told.
    fn call(&self, from: Caller, request: Bytes) -> BoxFuture<'_, Bytes>;

    /// Begins to take a snapshot. Called on a thread of the snapshot's own, where it may block. There is at most one
    /// sink at a time: the one before is dropped by then.
    ///
    /// # Errors
    /// Why it is refused. The sender is told and gives up.
    fn open_snapshot(&self, from: MemberId, header: &SnapshotHeader) -> Result<Box<dyn SnapshotSink>, Refusal>;

    /// A RAFT connection to a peer could not be made, or broke. What was queued for it is lost.
    fn unreachable(&self, to: MemberId);

    /// A peer does not take us, and it is not for being busy or stopping. The transport goes on trying.
    fn refused(&self, peer: MemberId, refusal: &Refusal);
}
