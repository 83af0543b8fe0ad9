//! What goes out, and comes in, as JSON.
//!
//! A key or value that is UTF-8 text stands under its name (`key`, `value`); any other under the same name with
//! `_base64` behind it. So one never has to guess which it is, and never both are there. Ids of leases and members are
//! in hexadecimal, as etcdctl writes them: as numbers, many languages would round them.

use api::kv::{Event, EventType, KeyValue, Member, RangeResponse, ResponseOp, ResponseOpKind, TxnResponse};
use api::{LeaseId, Revision};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How bytes are to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As text where they are UTF-8 text.
    Auto,
    /// In base64, always.
    Base64,
}

impl Encoding {
    /// Text or base64.
    pub(super) fn write(self, bytes: &[u8]) -> (Option<&str>, Option<String>) {
        match std::str::from_utf8(bytes) {
            Ok(text) if self == Encoding::Auto => (Some(text), None),
            _ => (None, Some(STANDARD.encode(bytes))),
        }
    }
}

/// An id as etcdctl writes it.
pub(super) fn hex(id: u64) -> String {
    format!("{id:x}")
}

pub(super) fn lease_hex(id: LeaseId) -> Option<String> {
    (id != 0).then(|| hex(id.cast_unsigned()))
}

/// A key with its value.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = KeyValue)]
pub(super) struct KeyValueBody<'a> {
    /// The key, if it is text.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    /// The key in base64, if it is not text.
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    /// The value, if it is text.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    /// The value in base64, if it is not text.
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    /// The revision at which the key was created.
    create_revision: Revision,
    /// The revision at which it was last written: its ETag.
    mod_revision: Revision,
    /// How often it was written since it was created.
    version: i64,
    /// The lease that it is attached to.
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<String>,
}

impl<'a> KeyValueBody<'a> {
    pub(super) fn new(kv: &'a KeyValue, encoding: Encoding, with_value: bool) -> Self {
        let (key, key_base64) = encoding.write(&kv.key);
        let (value, value_base64) = if with_value {
            encoding.write(&kv.value)
        } else {
            (None, None)
        };
        KeyValueBody {
            key,
            key_base64,
            value,
            value_base64,
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            version: kv.version,
            lease: lease_hex(kv.lease),
        }
    }

    pub(super) fn all(kvs: &'a [KeyValue], encoding: Encoding, with_value: bool) -> Vec<Self> {
        kvs.iter()
            .map(|kv| KeyValueBody::new(kv, encoding, with_value))
            .collect()
    }
}

/// A key was written.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Written)]
pub(super) struct WrittenBody<'a> {
    /// The revision of the write: the key's new ETag.
    pub(super) revision: Revision,
    /// What was there before, if it was asked for and there was something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prev: Option<KeyValueBody<'a>>,
}

/// Keys were deleted.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Deleted)]
pub(super) struct DeletedBody<'a> {
    /// The revision of the deletion; the store's current one if nothing was deleted.
    pub(super) revision: Revision,
    /// How many keys were deleted.
    pub(super) deleted: i64,
    /// What was deleted, in key order, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prevs: Option<Vec<KeyValueBody<'a>>>,
}

/// A page of keys. It is written piece by piece (see `list.rs`), which a test holds against this description.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = List)]
#[allow(dead_code, reason = "its schema is used; what is sent is written in pieces")]
pub(super) struct ListBody<'a> {
    /// The revision that was read: all keys are as they were then.
    revision: Revision,
    /// The keys.
    kvs: Vec<KeyValueBody<'a>>,
    /// Whether there are more keys than `limit` let through.
    more: bool,
    /// Where the following page is, at the same revision. Not there after the last page, nor with a `sort` that is not
    /// by key, nor behind a key that is too long for a URL.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// How many keys there are.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Count)]
pub(super) struct CountBody {
    /// The revision that was read.
    pub(super) revision: Revision,
    /// How many keys there are.
    pub(super) count: i64,
}

/// One change of one key.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Event)]
pub(super) struct EventBody<'a> {
    /// `put` or `delete`. A key whose lease ends is deleted.
    r#type: EventKind,
    #[serde(flatten)]
    #[schema(inline)]
    kv: EventKey<'a>,
    /// What was there before, if it was asked for and compaction has left it.
    #[serde(skip_serializing_if = "Option::is_none")]
    prev: Option<KeyValueBody<'a>>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum EventKind {
    Put,
    Delete,
}

#[derive(Debug, Serialize, ToSchema)]
struct EventKey<'a> {
    /// The key, if it is text.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    /// The key in base64, if it is not text.
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    /// The value, if the key was put and it is text.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    /// The value in base64, if the key was put and it is not text.
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    /// The revision at which a key that was put was created.
    #[serde(skip_serializing_if = "Option::is_none")]
    create_revision: Option<Revision>,
    /// The revision of the change.
    mod_revision: Revision,
    /// How often a key that was put was written since it was created.
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<i64>,
    /// The lease that a key that was put is attached to.
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<String>,
}

impl<'a> EventBody<'a> {
    /// `None` for an event that carries no key, which the store never sends.
    pub(super) fn new(event: &'a Event, encoding: Encoding) -> Option<Self> {
        let kv = event.kv.as_ref()?;
        let put = event.r#type() == EventType::Put;
        let (key, key_base64) = encoding.write(&kv.key);
        let (value, value_base64) = if put { encoding.write(&kv.value) } else { (None, None) };
        Some(EventBody {
            r#type: if put { EventKind::Put } else { EventKind::Delete },
            kv: EventKey {
                key,
                key_base64,
                value,
                value_base64,
                create_revision: put.then_some(kv.create_revision),
                mod_revision: kv.mod_revision,
                version: put.then_some(kv.version),
                lease: lease_hex(kv.lease),
            },
            prev: event
                .prev_kv
                .as_ref()
                .map(|prev| KeyValueBody::new(prev, encoding, true)),
        })
    }
}

/// All that changed at one revision, of what is watched: the data of one server-sent event.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Change)]
#[allow(dead_code, reason = "its schema is used; what is sent is written in pieces")]
pub(super) struct ChangeBody<'a> {
    /// The revision.
    revision: Revision,
    /// The changes.
    events: Vec<EventBody<'a>>,
}

/// What a long poll came to.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Changes)]
pub(super) struct ChangesBody<'a> {
    /// Everything up to this revision was told: the next `after_revision`.
    pub(super) revision: Revision,
    /// The changes, in order of revision; empty if nothing changed within the time to wait.
    pub(super) events: Vec<EventBody<'a>>,
    /// Where to ask for what comes next.
    pub(super) next: String,
}

/// Asks for a lease.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = LeaseGrant)]
pub(super) struct LeaseGrantBody {
    /// How long it lives without being kept alive, in seconds. Below the server's minimum (1.5 election timeouts) it is
    /// raised to that.
    #[schema(minimum = 1, maximum = 9_000_000_000_i64)]
    pub(super) ttl: i64,
    /// Its id, up to 16 hexadecimal digits; the server chooses one if it is left out.
    #[schema(pattern = "^[0-9a-fA-F]{1,16}$")]
    pub(super) id: Option<String>,
}

/// A lease.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Lease)]
pub(super) struct LeaseBody<'a> {
    /// Its id, in hexadecimal.
    pub(super) id: String,
    /// Whole seconds that it has left.
    pub(super) ttl: i64,
    /// What it was granted with, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) granted_ttl: Option<i64>,
    /// The keys that are attached to it, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) keys: Option<Vec<KeyBody<'a>>>,
}

/// A key alone.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Key)]
pub(super) struct KeyBody<'a> {
    /// The key, if it is text.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    /// The key in base64, if it is not text.
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
}

impl<'a> KeyBody<'a> {
    pub(super) fn new(key: &'a [u8], encoding: Encoding) -> Self {
        let (key, key_base64) = encoding.write(key);
        KeyBody { key, key_base64 }
    }
}

/// All leases.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Leases)]
pub(super) struct LeasesBody {
    /// Their ids, in hexadecimal, the soonest to end first.
    pub(super) leases: Vec<String>,
}

/// Something was done, at this revision.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Done)]
pub(super) struct DoneBody {
    /// The store's revision afterwards.
    pub(super) revision: Revision,
}

/// A lock that was acquired.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Acquired)]
pub(super) struct AcquiredBody<'a> {
    /// The key that stands for holding it: a write that compares its `create_revision` with this `revision` in a
    /// transaction is a write under the lock.
    #[serde(flatten)]
    #[schema(inline)]
    pub(super) key: KeyBody<'a>,
    /// The lease that holds it. Keep it alive, or the lock is lost when it ends.
    pub(super) lease: String,
    /// Seconds that the lease lives without being kept alive, if it was granted by this request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ttl: Option<i64>,
    /// The revision that created the key: it grows with every holder, so it can serve as a fencing token.
    pub(super) revision: Revision,
}

/// Who holds a lock, or waits for it.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = Holder)]
pub(super) struct HolderBody {
    /// The key, if it is text.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    /// The key in base64, if it is not text.
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    /// The lease that holds it, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) lease: Option<String>,
    /// The revision that created the key.
    revision: Revision,
}

impl HolderBody {
    pub(super) fn new(kv: &KeyValue) -> Self {
        let (key, key_base64) = Encoding::Auto.write(&kv.key);
        HolderBody {
            key: key.map(str::to_owned),
            key_base64,
            lease: lease_hex(kv.lease),
            revision: kv.create_revision,
        }
    }
}

/// How a lock stands.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Lock)]
pub(super) struct LockBody {
    /// The revision that was read.
    pub(super) revision: Revision,
    /// Whether somebody holds it.
    pub(super) held: bool,
    /// Who holds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) holder: Option<HolderBody>,
    /// Who waits for it, the first in line first; at most 100.
    pub(super) waiters: Vec<HolderBody>,
    /// How many wait for it.
    pub(super) waiting: i64,
}

/// A member of the cluster.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Member)]
pub(super) struct MemberBody {
    /// Its id, in hexadecimal.
    id: String,
    /// Its name; empty until it has started once.
    name: String,
    /// Where its peers reach it.
    peer_urls: Vec<String>,
    /// Where clients reach it; empty until it has started once.
    client_urls: Vec<String>,
    /// Whether it has no vote.
    is_learner: bool,
}

impl From<Member> for MemberBody {
    fn from(member: Member) -> Self {
        MemberBody {
            id: hex(member.id),
            name: member.name,
            peer_urls: member.peer_urls,
            client_urls: member.client_urls,
            is_learner: member.is_learner,
        }
    }
}

/// The members of the cluster.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Members)]
pub(super) struct MembersBody {
    /// The cluster's id, in hexadecimal.
    pub(super) cluster_id: String,
    /// The members, in order of their ids.
    pub(super) members: Vec<MemberBody>,
}

/// How a member is.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Status)]
pub(super) struct StatusBody {
    /// The cluster's id, in hexadecimal.
    pub(super) cluster_id: String,
    /// This member's id, in hexadecimal.
    pub(super) member_id: String,
    /// The leader's id, in hexadecimal; not there when none is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) leader_id: Option<String>,
    /// Whether this member has no vote.
    pub(super) is_learner: bool,
    /// The store's revision.
    pub(super) revision: Revision,
    /// The Raft term.
    pub(super) raft_term: u64,
    /// The last committed index that this member knows of.
    pub(super) raft_index: u64,
    /// The index that this member has applied.
    pub(super) raft_applied_index: u64,
    /// Bytes that the store occupies.
    pub(super) db_bytes: u64,
    /// Bytes of it that hold live data.
    pub(super) db_in_use_bytes: u64,
    /// Bytes that it may occupy; 0 when there is no such limit.
    pub(super) db_quota_bytes: u64,
    /// What is wrong, in etcd's words; empty when nothing is.
    pub(super) errors: Vec<String>,
    /// MetaStore's version.
    pub(super) version: &'static str,
    /// The etcd release whose API this is.
    pub(super) etcd_version: &'static str,
}

/// A token.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Token)]
pub(super) struct TokenBody {
    /// To be sent as `Authorization: Bearer <token>`.
    pub(super) token: String,
}

/// What a transaction came to.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TxnResult)]
pub(super) struct TxnResultBody<'a> {
    /// The revision of its writes; the store's current one if there were none.
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<Revision>,
    /// Whether all compares held, so that `then` was done.
    succeeded: bool,
    /// The answers of the branch that was taken, in its order.
    #[schema(no_recursion)]
    responses: Vec<OpResultBody<'a>>,
}

/// What one operation of a transaction came to.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = OpResult)]
pub(super) enum OpResultBody<'a> {
    Get(GetResult<'a>),
    Put(PutResult<'a>),
    Delete(DeleteResult<'a>),
    #[schema(no_recursion)]
    Txn(TxnResultBody<'a>),
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct GetResult<'a> {
    /// The keys.
    kvs: Vec<KeyValueBody<'a>>,
    /// Whether `limit` cut some off.
    more: bool,
    /// How many keys there are in all.
    count: i64,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PutResult<'a> {
    /// What was there before, if it was asked for and there was something.
    #[serde(skip_serializing_if = "Option::is_none")]
    prev: Option<KeyValueBody<'a>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeleteResult<'a> {
    /// How many keys were deleted.
    deleted: i64,
    /// What was deleted, if it was asked for.
    prevs: Vec<KeyValueBody<'a>>,
}

impl<'a> TxnResultBody<'a> {
    /// `keys_only` knows which answers carry no values, since an answer itself does not say.
    pub(super) fn new(response: &'a TxnResponse, encoding: Encoding, branch: &'a super::txn::Shapes) -> Self {
        let shapes = if response.succeeded {
            &branch.then
        } else {
            &branch.otherwise
        };
        let answers = response.responses.iter().zip(shapes);
        TxnResultBody {
            revision: response
                .header
                .as_ref()
                .map(|header| header.revision)
                .filter(|revision| *revision > 0),
            succeeded: response.succeeded,
            responses: answers
                .filter_map(|(response, shape)| OpResultBody::new(response, encoding, shape))
                .collect(),
        }
    }
}

impl<'a> OpResultBody<'a> {
    fn new(response: &'a ResponseOp, encoding: Encoding, shape: &'a super::txn::Shape) -> Option<Self> {
        use super::txn::Shape;
        Some(match (response.response.as_ref()?, shape) {
            (ResponseOpKind::Range(RangeResponse { kvs, more, count, .. }), shape) => OpResultBody::Get(GetResult {
                kvs: KeyValueBody::all(kvs, encoding, !matches!(shape, Shape::KeysOnly)),
                more: *more,
                count: *count,
            }),
            (ResponseOpKind::Put(put), _) => OpResultBody::Put(PutResult {
                prev: put.prev_kv.as_ref().map(|kv| KeyValueBody::new(kv, encoding, true)),
            }),
            (ResponseOpKind::DeleteRange(delete), _) => OpResultBody::Delete(DeleteResult {
                deleted: delete.deleted,
                prevs: KeyValueBody::all(&delete.prev_kvs, encoding, true),
            }),
            (ResponseOpKind::Txn(txn), Shape::Txn(shapes)) => {
                OpResultBody::Txn(TxnResultBody::new(txn, encoding, shapes))
            }
            (ResponseOpKind::Txn(_), _) => return None,
        })
    }
}

/// Reads bytes that came as text or in base64, but not both.
pub(super) fn read_bytes(
    name: &str,
    text: Option<String>,
    base64: Option<String>,
) -> Result<Option<Bytes>, super::problem::Problem> {
    use super::problem::{INVALID_BODY, Problem};
    match (text, base64) {
        (Some(_), Some(_)) => {
            let detail = format!("{name} and {name}_base64 exclude each other");
            Err(Problem::new(INVALID_BODY, detail))
        }
        (Some(text), None) => Ok(Some(text.into())),
        (None, Some(base64)) => STANDARD
            .decode(&base64)
            .map(|bytes| Some(bytes.into()))
            .map_err(|error| Problem::new(INVALID_BODY, format!("{name}_base64 is not base64: {error}"))),
        (None, None) => Ok(None),
    }
}
