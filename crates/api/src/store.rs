//! The handle through which every front end reaches the store.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use crate::auth::{self, AuthenticateRequest, AuthenticateResponse};
use crate::kv::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, CompactionRequest, CompactionResponse, DeleteRangeRequest,
    DeleteRangeResponse, Event, KeyValue, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveResponse,
    LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveResponse, Member, PutRequest,
    PutResponse, RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse,
};
use crate::{Credentials, Error, LeaseId, Limits, MemberId, Result, Revision};

/// One copy of the data, one order of revisions, whatever the protocol.
///
/// Requests must have passed their own `validate`. Every method may answer any error of Unavailable kind. Replies carry
/// complete headers. Dropping a future gives its result up, not the operation: a proposal may still be carried out.
pub trait Store: Clone + Send + Sync + 'static {
    /// A stream of watchers.
    type Watch: WatchStream;
    /// A backup on its way.
    type Backup: BackupStream;

    /// The same store, for one client: every request is then held against what that client may do, and refused with
    /// [`crate::Error::InvalidAuthToken`], [`crate::Error::UserEmpty`] or [`crate::Error::PermissionDenied`]. Cheap. A
    /// handle that no front end has put a client behind acts for nobody.
    fn on_behalf_of(&self, credentials: Credentials) -> Self;

    /// The same store, for a user who shows its password: as [`Store::on_behalf_of`], without a token. Meant for one
    /// request, and cheap once the password was checked; it is checked anew if users or roles change before the request is
    /// done. Where auth is off it is not looked at.
    ///
    /// # Errors
    /// As [`Store::authenticate`].
    fn on_behalf_of_user(&self, user: AuthenticateRequest) -> impl Future<Output = Result<Self>> + Send;

    /// The same store, for the member itself, which may do everything: to look after, or take back, what it did for a client
    /// whose own rights may have changed meanwhile, and to find out what any client may know.
    fn on_behalf_of_member(&self) -> Self;

    /// Whether the client is anybody, where auth is on: for what only needs that, such as [`Store::status`].
    fn check_user(&self) -> impl Future<Output = Result<()>> + Send;

    /// Whether the client is an administrator, where auth is on: for whoever wants to know before looking at a request.
    /// What only administrators may do is checked by itself.
    fn check_admin(&self) -> impl Future<Output = Result<()>> + Send;

    /// Gives a user a token.
    ///
    /// # Errors
    /// [`crate::Error::AuthNotEnabled`], [`crate::Error::AuthFailed`], [`crate::Error::NoPasswordUser`]; and
    /// [`crate::Error::TooManyRequests`] while too many passwords wait to be checked.
    fn authenticate(&self, user: AuthenticateRequest) -> impl Future<Output = Result<AuthenticateResponse>> + Send;

    /// Carries out a request about users and roles.
    fn auth<R: auth::Request>(&self, request: R) -> impl Future<Output = Result<R::Response>> + Send;

    /// Reads keys: linearizably, unless the request says serializable.
    fn range(&self, request: RangeRequest) -> impl Future<Output = Result<RangeResponse>> + Send;

    /// As [`Store::range`], for whoever sends the answer on in etcd's form.
    fn range_encoded(&self, request: RangeRequest) -> impl Future<Output = Result<EncodedRange>> + Send {
        async move { Ok(self.range(request).await?.into()) }
    }

    /// Reads one page of a range in key order, without counting what lies beyond it: the building block of streams.
    fn scan(&self, request: ScanRequest) -> impl Future<Output = Result<ScanPage>> + Send;

    /// Writes a key.
    fn put(&self, request: PutRequest) -> impl Future<Output = Result<PutResponse>> + Send;

    /// Deletes keys.
    fn delete_range(&self, request: DeleteRangeRequest) -> impl Future<Output = Result<DeleteRangeResponse>> + Send;

    /// Carries out a transaction.
    fn txn(&self, request: TxnRequest) -> impl Future<Output = Result<TxnResponse>> + Send;

    /// Forgets history.
    fn compact(&self, request: CompactionRequest) -> impl Future<Output = Result<CompactionResponse>> + Send;

    /// Creates a lease.
    fn lease_grant(&self, request: LeaseGrantRequest) -> impl Future<Output = Result<LeaseGrantResponse>> + Send;

    /// Ends a lease.
    fn lease_revoke(&self, request: LeaseRevokeRequest) -> impl Future<Output = Result<LeaseRevokeResponse>> + Send;

    /// Lets a lease live for its whole time again; a TTL of 0 in the reply says that there is no such lease.
    fn lease_keep_alive(&self, id: LeaseId) -> impl Future<Output = Result<LeaseKeepAliveResponse>> + Send;

    /// How long a lease has left; a TTL of -1 in the reply says that there is no such lease.
    fn lease_time_to_live(
        &self,
        id: LeaseId,
        keys: bool,
    ) -> impl Future<Output = Result<LeaseTimeToLiveResponse>> + Send;

    /// All leases.
    fn lease_leases(&self) -> impl Future<Output = Result<LeaseLeasesResponse>> + Send;

    /// A new stream without watchers, once this member knows the client's token, if any member does.
    fn watch(&self) -> impl Future<Output = Self::Watch> + Send;

    /// The members, after a read index when `linearizable`.
    fn members(&self, linearizable: bool) -> impl Future<Output = Result<MemberList>> + Send;

    /// Adds a member, which is then to be started. The reply's first value is the new member.
    fn member_add(
        &self,
        peer_urls: Vec<String>,
        is_learner: bool,
    ) -> impl Future<Output = Result<(Member, MemberList)>> + Send;

    /// Removes a member, which then stops by itself.
    fn member_remove(&self, id: MemberId) -> impl Future<Output = Result<MemberList>> + Send;

    /// Says where peers reach a member from now on.
    fn member_update(&self, id: MemberId, peer_urls: Vec<String>) -> impl Future<Output = Result<MemberList>> + Send;

    /// Gives a learner that has caught up a vote.
    fn member_promote(&self, id: MemberId) -> impl Future<Output = Result<MemberList>> + Send;

    /// Hands leadership to a voter; only the leader does it. Returns once the new leader is known here.
    fn move_leader(&self, to: MemberId) -> impl Future<Output = Result<()>> + Send;

    /// Lists alarms, raises one, or ends some. Replies with the alarms that were asked for, or changed.
    fn alarm(&self, request: AlarmRequest) -> impl Future<Output = Result<AlarmResponse>> + Send;

    /// The hash of the whole history up to `revision` (0 for the newest) that compaction has left, by etcd's formula,
    /// so that any two members, etcd's included, can be compared.
    fn hash_kv(&self, revision: Revision) -> impl Future<Output = Result<HashKv>> + Send;

    /// The hash of this member's whole database, by etcd's formula. It is for comparing a member with itself: members of
    /// one cluster differ in what is not the data.
    fn hash(&self) -> impl Future<Output = Result<DatabaseHash>> + Send;

    /// The state of this member as it is now, as a database file of etcd.
    fn backup(&self) -> impl Future<Output = Result<Self::Backup>> + Send;

    /// Lets this member give back space that deleted data takes. It holds nobody up.
    fn defragment(&self) -> impl Future<Output = Result<()>> + Send;

    /// Checks, notes or ends the intention to go back to an older release. Replies with the cluster's version.
    fn downgrade(&self, step: DowngradeStep) -> impl Future<Output = Result<Downgrade>> + Send;

    /// How this member is.
    fn status(&self) -> Status;

    /// What of its status every call is held against. Cheap.
    fn standing(&self) -> Standing;

    /// A header that carries the current revision.
    fn header(&self) -> ResponseHeader;

    /// The limits that requests are held against.
    fn limits(&self) -> &Limits;
}

/// Asks for one page of a range.
#[derive(Debug, Clone, Default)]
pub struct ScanRequest {
    /// The first key.
    pub key: Bytes,
    /// The end of the range, in etcd's notation (see [`crate::Span::new`]).
    pub range_end: Bytes,
    /// The revision to read at; 0 for the newest, after a read index unless `serializable`.
    pub revision: Revision,
    /// Answer from this member's state at once.
    pub serializable: bool,
    /// Leave the values out.
    pub keys_only: bool,
    /// Most keys; at least 1.
    pub keys_max: usize,
    /// Most bytes of keys and values; exceeded by one key at most.
    pub bytes_max: usize,
}

/// One page of a range.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScanPage {
    /// The revision that was read at: pin it for the following pages.
    pub revision: Revision,
    /// The store's own revision, for the header.
    pub header: ResponseHeader,
    /// The keys, in order.
    pub kvs: Vec<KeyValue>,
    /// Whether keys are left; the next page begins right after the last key.
    pub more: bool,
}

/// The members after a change, and who says so.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemberList {
    /// Who answers.
    pub header: ResponseHeader,
    /// All members, in order of their ids.
    pub members: Vec<Member>,
}

/// What [`Store::hash_kv`] came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HashKv {
    /// Who answers, and the store's revision.
    pub header: ResponseHeader,
    /// CRC-32C, see [`Store::hash_kv`].
    pub hash: u32,
    /// The revision below which history was dropped; -1 if none ever was.
    pub compact_revision: Revision,
    /// The revision up to which was hashed.
    pub hash_revision: Revision,
}

/// What [`Store::hash`] came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DatabaseHash {
    /// Who answers, and the revision of what was hashed.
    pub header: ResponseHeader,
    /// CRC-32C.
    pub hash: u32,
}

/// What to do about going back to an older release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DowngradeStep {
    /// Say whether it is possible to go to this version.
    Validate(String),
    /// Note that the cluster is to go to this version.
    Enable(String),
    /// Forget about it.
    Cancel,
}

/// What [`Store::downgrade`] came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Downgrade {
    /// Who answers.
    pub header: ResponseHeader,
    /// The version of the cluster, such as `3.7`.
    pub version: String,
}

/// A piece of a backup.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackupChunk {
    /// What comes next of the file; and in the last chunk the SHA-256 of the file.
    pub bytes: Bytes,
    /// How many bytes of the file come after this chunk.
    pub remaining_bytes: u64,
}

/// A backup on its way. Dropping it ends it.
pub trait BackupStream: Send + 'static {
    /// The next chunk; `None` after the last one. An error is the end as well.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<BackupChunk>>>;
}

/// A [`RangeResponse`] whose keys are encoded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EncodedRange {
    /// See [`RangeResponse::header`].
    pub header: Option<ResponseHeader>,
    /// The encoding of [`RangeResponse::kvs`], in pieces.
    pub kvs: Vec<Bytes>,
    /// See [`RangeResponse::more`].
    pub more: bool,
    /// See [`RangeResponse::count`].
    pub count: i64,
}

/// The number of the field [`RangeResponse::kvs`].
const RANGE_RESPONSE_KVS: u32 = 2;

impl From<RangeResponse> for EncodedRange {
    fn from(response: RangeResponse) -> Self {
        let RangeResponse {
            header,
            kvs,
            more,
            count,
        } = response;
        let len = prost::encoding::message::encoded_len_repeated(RANGE_RESPONSE_KVS, &kvs);
        let mut encoded = BytesMut::with_capacity(len);
        prost::encoding::message::encode_repeated(RANGE_RESPONSE_KVS, &kvs, &mut encoded);
        EncodedRange {
            header,
            kvs: vec![encoded.freeze()],
            more,
            count,
        }
    }
}

impl EncodedRange {
    /// What comes before and after the keys in the encoding of the whole [`RangeResponse`].
    pub fn frame(&self) -> (RangeResponse, RangeResponse) {
        let before = RangeResponse {
            header: self.header.clone(),
            ..Default::default()
        };
        let after = RangeResponse {
            more: self.more,
            count: self.count,
            ..Default::default()
        };
        (before, after)
    }
}

/// How a member is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Status {
    /// Who answers, and the store's revision.
    pub header: ResponseHeader,
    /// Bytes that the data takes, with all history that is left: what a quota is held against.
    pub db_bytes: u64,
    /// Bytes of it that are in use.
    pub db_in_use_bytes: u64,
    /// Bytes that it may take; 0 when there is no such limit.
    pub db_quota_bytes: u64,
    /// The leader; 0 when none is known.
    pub leader: MemberId,
    /// The last committed index that this member knows of.
    pub raft_index: u64,
    /// The index that this member has applied.
    pub raft_applied_index: u64,
    /// Whether this member has no vote.
    pub is_learner: bool,
    /// The version that the cluster is to go back to, if it is.
    pub downgrade_target: Option<String>,
    /// What is wrong, in etcd's words; empty when nothing is.
    pub errors: Vec<String>,
    /// Active alarms.
    pub alarms: Vec<Alarm>,
    /// For how long the disk of the Raft log has not finished a write, if that is an election timeout or more: such a
    /// member acknowledges nothing, and gives leadership up.
    pub log_stalled: Option<Duration>,
}

/// What of a member's status every call is held against.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// The leader; 0 when none is known.
    pub leader: MemberId,
    /// Whether this member has no vote.
    pub is_learner: bool,
}

/// A condition that an operator must look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alarm {
    /// The disk of a member is full: writes are refused.
    NoSpace(MemberId),
    /// The data of a member is damaged.
    Corrupt(MemberId),
}

impl Alarm {
    /// The alarm as etcd's messages have it; `None` if it is neither of these.
    pub fn of_member(member: &AlarmMember) -> Option<Self> {
        match member.alarm() {
            AlarmType::None => None,
            AlarmType::Nospace => Some(Alarm::NoSpace(member.member_id)),
            AlarmType::Corrupt => Some(Alarm::Corrupt(member.member_id)),
        }
    }

    /// The alarm as etcd's messages have it.
    pub fn member(self) -> AlarmMember {
        let (member_id, alarm) = match self {
            Alarm::NoSpace(member) => (member, AlarmType::Nospace),
            Alarm::Corrupt(member) => (member, AlarmType::Corrupt),
        };
        AlarmMember {
            member_id,
            alarm: alarm.into(),
        }
    }
}

/// What a watcher wants to see.
#[derive(Debug, Clone, Default)]
pub struct WatchCreate {
    /// Its id within the stream; `None` lets the stream choose.
    pub id: Option<i64>,
    /// The first key; empty means `\0`.
    pub key: Bytes,
    /// The end of the range, in etcd's notation.
    pub range_end: Bytes,
    /// The first revision of interest; 0 for whatever comes next.
    pub start_revision: Revision,
    /// Leave puts out.
    pub no_put: bool,
    /// Leave deletions out.
    pub no_delete: bool,
    /// Say what was there before.
    pub prev_kv: bool,
    /// Take part in [`WatchStream::notify_progress`].
    pub progress_notify: bool,
}

/// A watcher that was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchCreated {
    /// Its id within the stream.
    pub watch_id: i64,
    /// The store's revision when it was created, for the header of the reply: a watcher without a start revision sees
    /// what comes after this one.
    pub revision: Revision,
}

/// Why a watcher was not created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// The range holds no key.
    #[error("mvcc: watcher range is empty")]
    EmptyRange,
    /// The chosen id is in use on this stream.
    #[error("mvcc: duplicate watch ID provided on the WatchStream")]
    DuplicateId,
    /// A negative start revision.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    NegativeRevision,
    /// The client may not read these keys. The text is that of a whole gRPC status, as in etcd.
    #[error("rpc error: code = {:?} desc = {}", .0.code(), .0)]
    Refused(Error),
}

/// Changes for watchers. Those that see the same share them, and their encoding as well.
#[derive(Debug)]
pub struct Events {
    events: Box<[Event]>,
    encoded: OnceLock<Bytes>,
}

impl Events {
    /// These changes.
    pub fn new(events: Vec<Event>) -> Arc<Self> {
        Arc::new(Events {
            events: events.into(),
            encoded: OnceLock::new(),
        })
    }

    /// The changes as they stand in etcd's `WatchResponse`: its field 11, which is its last. Made once, whoever asks.
    pub fn encoded(&self) -> &Bytes {
        self.encoded.get_or_init(|| {
            let mut buffer = BytesMut::with_capacity(self.encoded_len());
            prost::encoding::message::encode_repeated(WATCH_RESPONSE_EVENTS, &self.events, &mut buffer);
            buffer.freeze()
        })
    }

    /// The length of [`Events::encoded`], in bytes.
    pub fn encoded_len(&self) -> usize {
        match self.encoded.get() {
            Some(encoded) => encoded.len(),
            None => prost::encoding::message::encoded_len_repeated(WATCH_RESPONSE_EVENTS, &self.events),
        }
    }
}

/// The number of the field `events` of etcd's `WatchResponse`.
const WATCH_RESPONSE_EVENTS: u32 = 11;

impl std::ops::Deref for Events {
    type Target = [Event];

    fn deref(&self) -> &[Event] {
        &self.events
    }
}

impl PartialEq for Events {
    fn eq(&self, other: &Self) -> bool {
        self.events == other.events
    }
}

/// What a watch stream has to say.
#[derive(Debug, Clone, PartialEq)]
pub enum WatchOutput {
    /// Changes, in order of revision; no revision is split over two outputs of one watcher.
    Events {
        /// The watcher.
        watch_id: i64,
        /// The header's revision.
        revision: Revision,
        /// The changes.
        events: Arc<Events>,
    },
    /// Everything up to `revision` was sent.
    Progress {
        /// The watcher, or -1 for all watchers of the stream.
        watch_id: i64,
        /// Up to where.
        revision: Revision,
    },
    /// The watcher's next revision was compacted away; it is gone.
    Compacted {
        /// The watcher.
        watch_id: i64,
        /// The revision up to which history is gone.
        compact_revision: Revision,
    },
}

/// Watchers that share one channel to their client.
///
/// Bounded: what the client does not take stays in storage, and is read from there once it does.
pub trait WatchStream: Send + 'static {
    /// Adds a watcher. Events of it come after this returns, from [`WatchStream::poll_next`].
    fn create(&mut self, create: WatchCreate) -> std::result::Result<WatchCreated, WatchError>;

    /// Removes a watcher; `false` if there is none of that id.
    fn cancel(&mut self, watch_id: i64) -> bool;

    /// Asks for one [`WatchOutput::Progress`] for all watchers; dropped unless every watcher is up to date.
    fn request_progress(&mut self);

    /// To be called at each progress interval: up-to-date watchers that asked for it and had no events since the last
    /// call get a [`WatchOutput::Progress`] each.
    fn notify_progress(&mut self);

    /// The next output. Never ends by itself. What it returned counts as taken by the client: call it only when there
    /// is room to send.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<WatchOutput>;
}
