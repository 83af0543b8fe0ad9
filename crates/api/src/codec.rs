//! What a Raft log entry holds, and how it is read back.
//!
//! An entry's data is one of three things, told apart by its first byte:
//!
//! | First byte | Layer | Content |
//! |---|---|---|
//! | [`MAGIC`] | envelope | format version, then a protobuf [`RaftMessage`]: one operation, or a batch of them |
//! | a protobuf tag | bare operation | one protobuf [`Operation`], without an envelope |
//! | a gob length | oldest form | a Go `encoding/gob` stream of `struct{ Key, Val string }`: a put |
//!
//! [`Operation`] has the field numbers of etcd's `InternalRaftRequest`, so an etcd log entry reads as a bare operation.
//! No protobuf message can begin with [`MAGIC`] (its low three bits, 7, are no wire type), and no gob stream can either
//! (it would announce a 113-byte length, which Go never writes). Empty data is Raft's own: a new leader's first entry.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::RequestId;
use crate::auth::{
    AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleDeleteRequest, AuthRoleGetRequest,
    AuthRoleGrantPermissionRequest, AuthRoleListRequest, AuthRoleRevokePermissionRequest, AuthStatusRequest,
    AuthUserAddRequest, AuthUserChangePasswordRequest, AuthUserDeleteRequest, AuthUserGetRequest,
    AuthUserGrantRoleRequest, AuthUserListRequest, AuthUserRevokeRoleRequest, InternalAuthenticateRequest,
};
use crate::kv::{
    AlarmRequest, CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, Member, PutRequest,
    TxnRequest,
};

mod gob;

/// The first byte of an envelope.
pub const MAGIC: u8 = 0x8f;

/// The envelope version that we write, and the newest that we read.
pub const VERSION: u8 = 1;

/// One operation of the replicated state machine, as its client asked for it.
#[derive(Clone, PartialEq, Message)]
pub struct Operation {
    /// Who asked.
    #[prost(message, optional, tag = "100")]
    pub header: Option<OperationHeader>,
    /// What was asked.
    #[prost(
        oneof = "Action",
        tags = "4, 5, 6, 7, 8, 9, 10, 11, 1000, 1011, 1012, 1013, 1100, 1101, 1102, 1103, 1104, 1105, 1106, 1107, 1200, 1201, 1202, 1203, 1204, 1301, 1302, 2001, 2002"
    )]
    pub action: Option<Action>,
}

/// Who asked for an operation.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct OperationHeader {
    /// Names the proposal, so that its node can answer its client.
    #[prost(uint64, tag = "1")]
    pub id: RequestId,
    /// The user on whose behalf it runs; empty when auth is off.
    #[prost(string, tag = "2")]
    pub username: String,
    /// The auth revision against which the user was checked.
    #[prost(uint64, tag = "3")]
    pub auth_revision: u64,
}

/// What the state machine can be asked to do.
#[derive(Clone, PartialEq, prost::Oneof)]
#[allow(missing_docs, reason = "each is the request of that name")]
pub enum Action {
    #[prost(message, tag = "4")]
    Put(PutRequest),
    #[prost(message, tag = "5")]
    DeleteRange(DeleteRangeRequest),
    #[prost(message, tag = "6")]
    Txn(TxnRequest),
    #[prost(message, tag = "7")]
    Compact(CompactionRequest),
    #[prost(message, tag = "8")]
    LeaseGrant(LeaseGrantRequest),
    #[prost(message, tag = "9")]
    LeaseRevoke(LeaseRevokeRequest),
    #[prost(message, tag = "10")]
    Alarm(AlarmRequest),
    #[prost(message, tag = "11")]
    LeaseCheckpoint(LeaseCheckpointRequest),
    #[prost(message, tag = "1000")]
    AuthEnable(AuthEnableRequest),
    #[prost(message, tag = "1011")]
    AuthDisable(AuthDisableRequest),
    #[prost(message, tag = "1012")]
    Authenticate(InternalAuthenticateRequest),
    #[prost(message, tag = "1013")]
    AuthStatus(AuthStatusRequest),
    #[prost(message, tag = "1100")]
    AuthUserAdd(AuthUserAddRequest),
    #[prost(message, tag = "1101")]
    AuthUserDelete(AuthUserDeleteRequest),
    #[prost(message, tag = "1102")]
    AuthUserGet(AuthUserGetRequest),
    #[prost(message, tag = "1103")]
    AuthUserChangePassword(AuthUserChangePasswordRequest),
    #[prost(message, tag = "1104")]
    AuthUserGrantRole(AuthUserGrantRoleRequest),
    #[prost(message, tag = "1105")]
    AuthUserRevokeRole(AuthUserRevokeRoleRequest),
    #[prost(message, tag = "1106")]
    AuthUserList(AuthUserListRequest),
    #[prost(message, tag = "1107")]
    AuthRoleList(AuthRoleListRequest),
    #[prost(message, tag = "1200")]
    AuthRoleAdd(AuthRoleAddRequest),
    #[prost(message, tag = "1201")]
    AuthRoleDelete(AuthRoleDeleteRequest),
    #[prost(message, tag = "1202")]
    AuthRoleGet(AuthRoleGetRequest),
    #[prost(message, tag = "1203")]
    AuthRoleGrantPermission(AuthRoleGrantPermissionRequest),
    #[prost(message, tag = "1204")]
    AuthRoleRevokePermission(AuthRoleRevokePermissionRequest),
    #[prost(message, tag = "1301")]
    MemberAttributes(MemberAttributesRequest),
    #[prost(message, tag = "1302")]
    Downgrade(DowngradeInfo),
    #[prost(message, tag = "2001")]
    MemberChange(MemberChange),
    #[prost(message, tag = "2002")]
    MemberUpdate(MemberUpdate),
}

/// What a member says of itself once it has started (etcd's `ClusterMemberAttrSetRequest`).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct MemberAttributesRequest {
    /// The member.
    #[prost(uint64, tag = "1")]
    pub member_id: u64,
    /// What it says.
    #[prost(message, optional, tag = "2")]
    pub attributes: Option<MemberAttributes>,
}

/// Whether the cluster is to go back to an older release, and to which (etcd's `DowngradeInfoSetRequest`).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DowngradeInfo {
    /// Whether it is.
    #[prost(bool, tag = "1")]
    pub enabled: bool,
    /// The version, such as `3.6.0`; empty if there is none.
    #[prost(string, tag = "2")]
    pub version: String,
}

/// See [`MemberAttributesRequest`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct MemberAttributes {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Where clients reach it.
    #[prost(string, repeated, tag = "2")]
    pub client_urls: Vec<String>,
}

/// A change of the Raft configuration. It is the context of a Raft entry of that kind, never an operation of a batch:
/// Raft must know of it as well.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct MemberChange {
    /// What changes.
    #[prost(enumeration = "MemberChangeKind", tag = "1")]
    pub kind: i32,
    /// The member to add, or the id of the member to promote or remove.
    #[prost(message, optional, tag = "2")]
    pub member: Option<Member>,
}

impl MemberChange {
    /// The member it is about; 0 if it names none, which no state machine carries out.
    pub fn member_id(&self) -> u64 {
        self.member.as_ref().map_or(0, |member| member.id)
    }
}

/// See [`MemberChange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum MemberChangeKind {
    /// A member joins, as a voter or a learner.
    Add = 0,
    /// A member leaves for good.
    Remove = 1,
    /// A learner gets a vote.
    Promote = 2,
}

/// Where peers reach a member from now on.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct MemberUpdate {
    /// The member.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Its new peer URLs.
    #[prost(string, repeated, tag = "2")]
    pub peer_urls: Vec<String>,
}

/// Replicates how much of their time leases have left.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct LeaseCheckpointRequest {
    /// The leases.
    #[prost(message, repeated, tag = "1")]
    pub checkpoints: Vec<LeaseCheckpoint>,
}

/// How much of its time a lease has left.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct LeaseCheckpoint {
    /// The lease.
    #[prost(int64, tag = "1")]
    pub id: i64,
    /// Seconds.
    #[prost(int64, tag = "2")]
    pub remaining_ttl: i64,
}

impl Operation {
    /// An operation on behalf of no user.
    pub fn new(id: RequestId, action: Action) -> Self {
        Operation {
            header: Some(OperationHeader {
                id,
                ..Default::default()
            }),
            action: Some(action),
        }
    }

    /// An operation on behalf of a user, who was checked against an auth revision.
    pub fn of_user(id: RequestId, username: String, auth_revision: u64, action: Action) -> Self {
        Operation {
            header: Some(OperationHeader {
                id,
                username,
                auth_revision,
            }),
            action: Some(action),
        }
    }

    /// The proposal's name; 0 when it has none, as in the oldest form.
    pub fn id(&self) -> RequestId {
        self.header.as_ref().map_or(0, |header| header.id)
    }
}

/// The content of an envelope.
#[derive(Clone, PartialEq, Message)]
pub struct RaftMessage {
    /// One operation or many.
    #[prost(oneof = "Payload", tags = "1, 2")]
    pub payload: Option<Payload>,
}

/// One operation or many.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Payload {
    /// One operation.
    #[prost(message, tag = "1")]
    Single(Operation),
    /// Many operations, each with its own result, applied in this order.
    #[prost(message, tag = "2")]
    Batch(Batch),
}

/// Many operations in one log entry.
#[derive(Clone, PartialEq, Message)]
pub struct Batch {
    /// The operations.
    #[prost(message, repeated, tag = "1")]
    pub operations: Vec<Operation>,
}

/// Why a log entry cannot be read. It stops the node: a committed entry is neither skipped nor guessed at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Written by a newer release.
    #[error(
        "the log entry has format version {found}, this release reads up to {VERSION}: a newer release wrote it, start that one"
    )]
    NewerVersion {
        /// The version found.
        found: u8,
    },
    /// None of the known forms.
    #[error("the log entry is in no known form: {cause} (first bytes: {head})")]
    Unknown {
        /// What the last decoder said.
        cause: String,
        /// Up to 16 bytes in hexadecimal.
        head: String,
    },
}

fn unknown(data: &[u8], cause: impl ToString) -> DecodeError {
    let head = data.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    DecodeError::Unknown {
        cause: cause.to_string(),
        head,
    }
}

/// Encodes operations into one log entry: a single one or a batch.
///
/// Callers hand in operations that are encoded already, each by its own client's thread, so that the one thread that
/// builds entries only copies bytes.
pub fn encode_entry<'a>(encoded: impl ExactSizeIterator<Item = &'a [u8]> + Clone) -> Vec<u8> {
    // Tags of the fields used below: field number << 3 | 2 (length-delimited).
    const SINGLE: u8 = 1 << 3 | 2;
    const BATCH: u8 = 2 << 3 | 2;
    const OPERATION: u8 = 1 << 3 | 2;
    let framed = |bytes: &[u8]| 1 + prost::length_delimiter_len(bytes.len()) + bytes.len();
    let body: usize = encoded.clone().map(framed).sum();
    let mut out = Vec::with_capacity(2 + 1 + 10 + body);
    out.put_u8(MAGIC);
    out.put_u8(VERSION);
    if encoded.len() == 1 {
        for bytes in encoded {
            put_field(&mut out, SINGLE, bytes);
        }
    } else {
        out.put_u8(BATCH);
        prost::encode_length_delimiter(body, &mut out).expect("a Vec grows");
        for bytes in encoded {
            put_field(&mut out, OPERATION, bytes);
        }
    }
    out
}

fn put_field(out: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
    out.put_u8(tag);
    prost::encode_length_delimiter(bytes.len(), out).expect("a Vec grows");
    out.put_slice(bytes);
}

/// Encodes one operation, for [`encode_entry`].
pub fn encode_operation(operation: &Operation) -> Bytes {
    let mut out = BytesMut::with_capacity(operation.encoded_len());
    operation.encode(&mut out).expect("a BytesMut grows");
    out.freeze()
}

/// Decodes a log entry of any layer. Keys and values are slices of `data`, not copies.
pub fn decode_entry(data: &Bytes) -> Result<Vec<Operation>, DecodeError> {
    let operations = match data.first() {
        None => return Ok(Vec::new()),
        Some(&MAGIC) => decode_envelope(data)?,
        Some(_) => match Operation::decode(data.clone()) {
            Ok(operation) if operation.action.is_some() => vec![operation],
            bare => match gob::decode_put(data) {
                Ok((key, value)) => {
                    let put = PutRequest {
                        key,
                        value,
                        ..Default::default()
                    };
                    vec![Operation {
                        header: None,
                        action: Some(Action::Put(put)),
                    }]
                }
                Err(gob) => {
                    let bare = bare
                        .err()
                        .map_or_else(|| "no action set".to_owned(), |error| error.to_string());
                    return Err(unknown(
                        data,
                        format!("not an operation ({bare}) and not a gob ({gob})"),
                    ));
                }
            },
        },
    };
    if operations.iter().any(|operation| operation.action.is_none()) {
        return Err(unknown(
            data,
            "an operation has no action, or one that only a newer release knows",
        ));
    }
    Ok(operations)
}

fn decode_envelope(data: &Bytes) -> Result<Vec<Operation>, DecodeError> {
    let mut body = data.clone();
    body.advance(1);
    if body.is_empty() {
        return Err(unknown(data, "the envelope ends before its version"));
    }
    let version = body.get_u8();
    if version > VERSION {
        return Err(DecodeError::NewerVersion { found: version });
    }
    if version == 0 {
        return Err(unknown(data, "envelope version 0"));
    }
    match RaftMessage::decode(body).map_err(|error| unknown(data, error))?.payload {
        Some(Payload::Single(operation)) => Ok(vec![operation]),
        Some(Payload::Batch(batch)) => Ok(batch.operations),
        None => Err(unknown(data, "the envelope is empty")),
    }
}

#[cfg(test)]
mod tests;
