//! Keys, values, leases: requests and replies.
//!
//! Hand-derived protobuf messages with etcd's field numbers (`rpc.proto`, `kv.proto`); a test of the front end holds
//! them against the .proto files. Enumerations stay `i32` so that values from newer clients survive.

use bytes::Bytes;

/// Says who answered and at which revision. `revision` comes from the state machine; the rest is the node's.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ResponseHeader {
    /// The cluster's identity.
    #[prost(uint64, tag = "1")]
    pub cluster_id: u64,
    /// The member that answered.
    #[prost(uint64, tag = "2")]
    pub member_id: u64,
    /// The store's revision when the request was carried out.
    #[prost(int64, tag = "3")]
    pub revision: i64,
    /// The Raft term when the request was carried out.
    #[prost(uint64, tag = "4")]
    pub raft_term: u64,
}

impl ResponseHeader {
    /// A header that says only the revision; the node fills in the rest.
    pub fn at(revision: i64) -> Option<Self> {
        Some(ResponseHeader {
            revision,
            ..Default::default()
        })
    }
}

/// A key with its newest (or, in history, then newest) value.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct KeyValue {
    /// The key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The revision at which the key was last created.
    #[prost(int64, tag = "2")]
    pub create_revision: i64,
    /// The revision of this value.
    #[prost(int64, tag = "3")]
    pub mod_revision: i64,
    /// How often the key was written since it was created; 1 at creation.
    #[prost(int64, tag = "4")]
    pub version: i64,
    /// The value.
    #[prost(bytes = "bytes", tag = "5")]
    pub value: Bytes,
    /// The lease that the key is attached to; 0 for none.
    #[prost(int64, tag = "6")]
    pub lease: i64,
}

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum EventType {
    /// It was written.
    Put = 0,
    /// It was deleted, or its lease ended.
    Delete = 1,
}

/// One change of one key.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Event {
    /// An [`EventType`].
    #[prost(enumeration = "EventType", tag = "1")]
    pub r#type: i32,
    /// The key after the change. For a deletion only key and mod revision are set.
    #[prost(message, optional, tag = "2")]
    pub kv: Option<KeyValue>,
    /// The key before the change, if asked for, if it existed and if it is not compacted.
    #[prost(message, optional, tag = "3")]
    pub prev_kv: Option<KeyValue>,
}

/// The order of a range's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum SortOrder {
    /// By key, or ascending when a target other than the key is given.
    None = 0,
    /// Lowest first.
    Ascend = 1,
    /// Highest first.
    Descend = 2,
}

/// What a range's answer is sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
#[allow(missing_docs, reason = "each names a field of KeyValue")]
pub enum SortTarget {
    Key = 0,
    Version = 1,
    Create = 2,
    Mod = 3,
    Value = 4,
}

/// Reads keys, now or at a past revision.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RangeRequest {
    /// The first key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The end of the range, exclusive; empty for the one key, `\0` for all keys at or after `key`.
    #[prost(bytes = "bytes", tag = "2")]
    pub range_end: Bytes,
    /// Most keys to return; 0 for all.
    #[prost(int64, tag = "3")]
    pub limit: i64,
    /// The revision to read at; 0 or less for the newest.
    #[prost(int64, tag = "4")]
    pub revision: i64,
    /// A [`SortOrder`].
    #[prost(int32, tag = "5")]
    pub sort_order: i32,
    /// A [`SortTarget`].
    #[prost(int32, tag = "6")]
    pub sort_target: i32,
    /// Answer from this member's state at once, however old, instead of linearizably.
    #[prost(bool, tag = "7")]
    pub serializable: bool,
    /// Leave the values out.
    #[prost(bool, tag = "8")]
    pub keys_only: bool,
    /// Return the count alone.
    #[prost(bool, tag = "9")]
    pub count_only: bool,
    /// Only keys modified at or after this revision; 0 for no bound.
    #[prost(int64, tag = "10")]
    pub min_mod_revision: i64,
    /// Only keys modified at or before this revision; 0 for no bound.
    #[prost(int64, tag = "11")]
    pub max_mod_revision: i64,
    /// Only keys created at or after this revision; 0 for no bound.
    #[prost(int64, tag = "12")]
    pub min_create_revision: i64,
    /// Only keys created at or before this revision; 0 for no bound.
    #[prost(int64, tag = "13")]
    pub max_create_revision: i64,
}

/// Answers a [`RangeRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RangeResponse {
    /// Who answered, and the store's revision then (not the one asked for).
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// The keys.
    #[prost(message, repeated, tag = "2")]
    pub kvs: Vec<KeyValue>,
    /// Whether `limit` cut the answer off.
    #[prost(bool, tag = "3")]
    pub more: bool,
    /// How many keys the range holds, before `limit` and filters.
    #[prost(int64, tag = "4")]
    pub count: i64,
}

/// Writes a key.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PutRequest {
    /// The key; not empty.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The value.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
    /// The lease to attach the key to; 0 for none.
    #[prost(int64, tag = "3")]
    pub lease: i64,
    /// Return what was there before.
    #[prost(bool, tag = "4")]
    pub prev_kv: bool,
    /// Keep the present value; the key must exist.
    #[prost(bool, tag = "5")]
    pub ignore_value: bool,
    /// Keep the present lease; the key must exist.
    #[prost(bool, tag = "6")]
    pub ignore_lease: bool,
}

/// Answers a [`PutRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PutResponse {
    /// Who answered; its revision is that of the put.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// What was there before, if asked for.
    #[prost(message, optional, tag = "2")]
    pub prev_kv: Option<KeyValue>,
}

/// Deletes keys.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeleteRangeRequest {
    /// The first key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The end of the range, as in [`RangeRequest::range_end`].
    #[prost(bytes = "bytes", tag = "2")]
    pub range_end: Bytes,
    /// Return what was deleted.
    #[prost(bool, tag = "3")]
    pub prev_kv: bool,
}

/// Answers a [`DeleteRangeRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeleteRangeResponse {
    /// Who answered; its revision is that of the deletion, or the current one when nothing was deleted.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// How many keys were deleted.
    #[prost(int64, tag = "2")]
    pub deleted: i64,
    /// What was deleted, if asked for, in key order.
    #[prost(message, repeated, tag = "3")]
    pub prev_kvs: Vec<KeyValue>,
}

/// One operation of a transaction's branch.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RequestOp {
    /// The operation.
    #[prost(oneof = "RequestOpKind", tags = "1, 2, 3, 4")]
    pub request: Option<RequestOpKind>,
}

/// The operations that a transaction may hold.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
#[allow(missing_docs, reason = "each is the request of that name")]
pub enum RequestOpKind {
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    #[prost(message, tag = "2")]
    Put(PutRequest),
    #[prost(message, tag = "3")]
    DeleteRange(DeleteRangeRequest),
    #[prost(message, tag = "4")]
    Txn(TxnRequest),
}

/// The answer of one operation of a transaction.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ResponseOp {
    /// The answer.
    #[prost(oneof = "ResponseOpKind", tags = "1, 2, 3, 4")]
    pub response: Option<ResponseOpKind>,
}

/// The answers to the operations that a transaction may hold.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
#[allow(missing_docs, reason = "each is the response of that name")]
pub enum ResponseOpKind {
    #[prost(message, tag = "1")]
    Range(RangeResponse),
    #[prost(message, tag = "2")]
    Put(PutResponse),
    #[prost(message, tag = "3")]
    DeleteRange(DeleteRangeResponse),
    #[prost(message, tag = "4")]
    Txn(TxnResponse),
}

/// How a compare relates the key's field to the given value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
#[allow(missing_docs, reason = "the names say it")]
pub enum CompareResult {
    Equal = 0,
    Greater = 1,
    Less = 2,
    NotEqual = 3,
}

/// Which field of a key a compare looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
#[allow(missing_docs, reason = "each names a field of KeyValue")]
pub enum CompareTarget {
    Version = 0,
    Create = 1,
    Mod = 2,
    Value = 3,
    Lease = 4,
}

/// One condition of a transaction.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Compare {
    /// A [`CompareResult`]; an unknown one holds always, as in etcd.
    #[prost(int32, tag = "1")]
    pub result: i32,
    /// A [`CompareTarget`].
    #[prost(int32, tag = "2")]
    pub target: i32,
    /// The first key.
    #[prost(bytes = "bytes", tag = "3")]
    pub key: Bytes,
    /// The value to compare with.
    #[prost(oneof = "TargetUnion", tags = "4, 5, 6, 7, 8")]
    pub target_union: Option<TargetUnion>,
    /// The end of the range, as in [`RangeRequest::range_end`]; every key in it must satisfy the condition.
    #[prost(bytes = "bytes", tag = "64")]
    pub range_end: Bytes,
}

/// The value that a compare compares with.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
#[allow(missing_docs, reason = "each names a field of KeyValue")]
pub enum TargetUnion {
    #[prost(int64, tag = "4")]
    Version(i64),
    #[prost(int64, tag = "5")]
    CreateRevision(i64),
    #[prost(int64, tag = "6")]
    ModRevision(i64),
    #[prost(bytes = "bytes", tag = "7")]
    Value(Bytes),
    #[prost(int64, tag = "8")]
    Lease(i64),
}

/// If all compares hold then `success`, else `failure`, as one atomic step at one revision.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TxnRequest {
    /// The conditions; none means success.
    #[prost(message, repeated, tag = "1")]
    pub compare: Vec<Compare>,
    /// What to do if all hold.
    #[prost(message, repeated, tag = "2")]
    pub success: Vec<RequestOp>,
    /// What to do otherwise.
    #[prost(message, repeated, tag = "3")]
    pub failure: Vec<RequestOp>,
}

/// Answers a [`TxnRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TxnResponse {
    /// Who answered; its revision is that of the transaction's writes, or the current one when there were none.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// Whether the compares held.
    #[prost(bool, tag = "2")]
    pub succeeded: bool,
    /// The answers of the branch that was taken, in its order.
    #[prost(message, repeated, tag = "3")]
    pub responses: Vec<ResponseOp>,
}

/// Forgets history before a revision.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CompactionRequest {
    /// History before this revision goes.
    #[prost(int64, tag = "1")]
    pub revision: i64,
    /// Answer only when the space is given back.
    #[prost(bool, tag = "2")]
    pub physical: bool,
}

/// Answers a [`CompactionRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CompactionResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
}

/// Creates a lease.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseGrantRequest {
    /// How long it lives without a keep-alive, in seconds.
    #[prost(int64, tag = "1")]
    pub ttl: i64,
    /// Its id; 0 lets the server choose.
    #[prost(int64, tag = "2")]
    pub id: i64,
}

/// Answers a [`LeaseGrantRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseGrantResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// Its id.
    #[prost(int64, tag = "2")]
    pub id: i64,
    /// Its time to live, in seconds, as granted.
    #[prost(int64, tag = "3")]
    pub ttl: i64,
    /// Unused; etcd has it.
    #[prost(string, tag = "4")]
    pub error: String,
}

/// Ends a lease and deletes its keys.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseRevokeRequest {
    /// The lease.
    #[prost(int64, tag = "1")]
    pub id: i64,
}

/// Answers a [`LeaseRevokeRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseRevokeResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
}

/// Answers a keep-alive.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseKeepAliveResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// The lease.
    #[prost(int64, tag = "2")]
    pub id: i64,
    /// Its new time to live, in seconds; 0 when there is no such lease.
    #[prost(int64, tag = "3")]
    pub ttl: i64,
}

/// Answers how long a lease will live.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseTimeToLiveResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// The lease.
    #[prost(int64, tag = "2")]
    pub id: i64,
    /// Whole seconds that are left; -1 when there is no such lease.
    #[prost(int64, tag = "3")]
    pub ttl: i64,
    /// What it was granted with, in seconds.
    #[prost(int64, tag = "4")]
    pub granted_ttl: i64,
    /// The keys attached, if asked for, in key order.
    #[prost(bytes = "bytes", repeated, tag = "5")]
    pub keys: Vec<Bytes>,
}

/// One lease of a listing.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseStatus {
    /// The lease.
    #[prost(int64, tag = "1")]
    pub id: i64,
}

/// Lists the leases.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseLeasesResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// The leases, the soonest to end first.
    #[prost(message, repeated, tag = "2")]
    pub leases: Vec<LeaseStatus>,
}

/// What a client wrote about, or asked of, a whole node's state.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Member {
    /// The member.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Its name; empty until it has started once.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Where its peers reach it.
    #[prost(string, repeated, tag = "3")]
    pub peer_urls: Vec<String>,
    /// Where clients reach it; empty until it has started once.
    #[prost(string, repeated, tag = "4")]
    pub client_urls: Vec<String>,
    /// Whether it has no vote.
    #[prost(bool, tag = "5")]
    pub is_learner: bool,
}

/// What [`AlarmRequest`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum AlarmAction {
    /// List active alarms.
    Get = 0,
    /// Raise an alarm.
    Activate = 1,
    /// End an alarm.
    Deactivate = 2,
}

/// A condition that an operator must look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum AlarmType {
    /// In requests: any.
    None = 0,
    /// A member's store is full: writes are refused.
    Nospace = 1,
    /// A member's state differs from that of the others.
    Corrupt = 2,
}

/// Lists or changes alarms.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct AlarmRequest {
    /// What to do.
    #[prost(enumeration = "AlarmAction", tag = "1")]
    pub action: i32,
    /// Whose alarm; 0 for all members.
    #[prost(uint64, tag = "2")]
    pub member_id: u64,
    /// Which alarm.
    #[prost(enumeration = "AlarmType", tag = "3")]
    pub alarm: i32,
}

/// An active alarm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Message)]
pub struct AlarmMember {
    /// Whose.
    #[prost(uint64, tag = "1")]
    pub member_id: u64,
    /// Which.
    #[prost(enumeration = "AlarmType", tag = "2")]
    pub alarm: i32,
}

/// The alarms that were asked for, or changed.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AlarmResponse {
    /// Who answers, and the store's revision.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// The alarms.
    #[prost(message, repeated, tag = "2")]
    pub alarms: Vec<AlarmMember>,
}
