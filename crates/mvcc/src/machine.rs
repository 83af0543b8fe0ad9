//! Applies committed log entries: prepare, batch, notify.
//!
//! All entries that wait are prepared into one [`storage::Batch`] through an [`Overlay`], so that each operation sees
//! those before it; then one engine write; then the events go to the watchers, in order; then the replies go back. The
//! batch carries the applied index, so a crash leaves the engine with a whole number of entries.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::auth::{Answer, AuthenticateResponse, InternalAuthenticateRequest};
use api::codec::{
    Action, DecodeError, DowngradeInfo, LeaseCheckpointRequest, MemberChange, Operation, OperationHeader, decode_entry,
};
use api::kv::{
    AlarmAction, AlarmMember, AlarmRequest, AlarmResponse, AlarmType, CompactionRequest, CompactionResponse, Compare,
    DeleteRangeRequest, DeleteRangeResponse, Event, EventType, KeyValue, LeaseGrantRequest, LeaseGrantResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, PutRequest, PutResponse, RequestOpKind, ResponseHeader, ResponseOp,
    ResponseOpKind, TxnRequest, TxnResponse,
};
use api::limits::LEASE_TTL_MAX_S;
use api::{Error, LeaseId, RaftIndex, RequestId, Revision, Span};
use bytes::Bytes;
use hashbrown::HashMap;
use prost::Message;
use storage::{Batch, Cursor, Engine, EngineError, KeyRange, View, WriteStats};

use crate::auth::{self, Auth, AuthChange, Caller, Changing, Limits, Need, Right};
use crate::compaction::Job;
use crate::keys::{self, AlarmsRecord, LeaseRecord, Position, Record, SizesRecord, StateRecord};
use crate::membership::Membership;
use crate::overlay::{Change, Overlay};
use crate::pages::Pages;
use crate::read::{Published, PublishedAuth, Rare, Reader, Snapshot, attached_keys};
use crate::watch::Hub;
use crate::{Failure, answer, txn};

/// What the operator may set.
#[derive(Debug, Clone)]
pub struct Options {
    /// Most bytes of newest records kept in memory, so that a put or a compare on a hot key reads nothing from the
    /// engine.
    pub record_cache_bytes: u64,
    /// Most bytes of keys and values kept in memory, encoded, for ranges that are listed again and again.
    pub list_cache_bytes: usize,
    /// Parts of such ranges with fewer keys are read from the engine each time.
    pub list_cache_keys_min: usize,
    /// Most events, and most bytes of them, that one watch stream may have waiting in memory.
    pub watch_buffer_events_max: usize,
    /// See above.
    pub watch_buffer_bytes_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        let limits = api::Limits::default();
        Options {
            record_cache_bytes: 32 << 20,
            list_cache_bytes: 64 << 20,
            list_cache_keys_min: 16,
            watch_buffer_events_max: limits.watch_buffer_events_max,
            watch_buffer_bytes_max: limits.watch_buffer_bytes_max,
        }
    }
}

/// A committed log entry.
#[derive(Debug, Clone)]
pub struct Committed {
    /// Its index; they come without gaps.
    pub index: RaftIndex,
    /// Its term.
    pub term: u64,
    /// What it holds.
    pub command: Command,
}

/// What a committed log entry holds.
#[derive(Debug, Clone)]
pub enum Command {
    /// Operations, in one of the forms that [`decode_entry`] reads; nothing at all for a new leader's first entry.
    Operations(Bytes),
    /// A change of the Raft configuration: one encoded [`Operation`] with a [`MemberChange`]. Whether Raft may follow it
    /// says [`Applied::member_changes`].
    MemberChange(Bytes),
}

/// Why entries could not be applied. The node stops.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// An entry cannot be read.
    #[error("log entry {index} cannot be applied: {cause}")]
    Entry {
        /// Which one.
        index: RaftIndex,
        /// Why.
        cause: DecodeError,
    },
}

/// What an operation came to.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "each is the response of that name")]
pub enum Outcome {
    Put(PutResponse),
    DeleteRange(DeleteRangeResponse),
    Txn(TxnResponse),
    Compact(CompactionResponse),
    LeaseGrant(LeaseGrantResponse),
    LeaseRevoke(LeaseRevokeResponse),
    LeaseCheckpoint,
    Alarm(AlarmResponse),
    Authenticate(AuthenticateResponse),
    Auth(Answer),
    /// All members after a change.
    Members(Arc<Membership>),
    Downgrade,
}

/// What to tell whoever proposed an operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// The proposal.
    pub id: RequestId,
    /// What it came to.
    pub result: Result<Outcome, Error>,
}

/// What became of a lease, for whoever watches the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    /// It exists now.
    Granted {
        /// The lease.
        id: LeaseId,
        /// Seconds to live.
        ttl: i64,
        /// Seconds that were left at the last checkpoint; 0 when there was none.
        remaining_ttl: i64,
    },
    /// It is gone.
    Revoked {
        /// The lease.
        id: LeaseId,
    },
}

/// What applying some entries came to.
#[derive(Debug, Default)]
pub struct Applied {
    /// One per operation, in order.
    pub replies: Vec<Reply>,
    /// In order.
    pub lease_changes: Vec<LeaseChange>,
    /// In order.
    pub auth_changes: Vec<AuthChange>,
    /// The index of each [`Command::MemberChange`], in order, and whether it was carried out: Raft must follow those
    /// that were, and no others.
    pub member_changes: Vec<(RaftIndex, bool)>,
    /// The digest as of each entry, for comparing members: see [`Digest`].
    pub digests: Vec<Digest>,
    /// The compactions, in order: the compacted revision before each, -1 if it was the first, and its own.
    pub compactions: Vec<(Revision, Revision)>,
    /// What was done, as etcd counts it.
    pub counts: Counts,
    /// What the one engine write cost.
    pub write: WriteStats,
    /// Whether there is compaction to do: see [`Machine::compact_step`].
    pub compaction_due: bool,
}

/// What a member's state comes to at an index. Members that applied the same index must have the same (design
/// invariant 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    /// The index.
    pub index: RaftIndex,
    /// The newest revision then.
    pub revision: Revision,
    /// See [`StateRecord::digest`].
    pub digest: u64,
}

/// How many of what was applied, for the metrics. But for the first, as etcd counts: per call to its store, and of those
/// of operations that were refused as many as it makes before it refuses.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Counts {
    pub operations: u64,
    pub puts: u64,
    /// Bytes of the keys and values put.
    pub put_bytes: u64,
    /// Of keys or ranges, whether or not there was anything to delete.
    pub deletes: u64,
    /// Ranges read: by transactions, for each compare that is looked at, for what a put or a deletion wants to know of the
    /// time before it (a put of a transaction twice: etcd checks it first), and one by a compaction.
    pub ranges: u64,
    /// Transactions of etcd's store of more than one of the three above: operations and leases that end, if they come to
    /// so many, and likewise the compares and checks before a transaction that writes.
    pub txns: u64,
}

impl Counts {
    fn calls(&self) -> u64 {
        self.puts + self.deletes + self.ranges
    }
}

/// Records with larger values are not cached: they would push out many small ones to save one read.
const CACHED_VALUE_BYTES_MAX: usize = 4096;

/// Weighs cached records by what they hold in memory.
#[derive(Clone)]
pub(crate) struct ByBytes;

impl quick_cache::Weighter<Bytes, Record> for ByBytes {
    fn weight(&self, key: &Bytes, record: &Record) -> u64 {
        // Two heap blocks and the cache's own entry, about.
        (key.len() + record.value.len() + 200) as u64
    }
}

type RecordCache = quick_cache::unsync::Cache<Bytes, Record, ByBytes>;

/// The state machine. One thread owns it; [`Machine::reader`] and [`Machine::hub`] are for all others.
pub struct Machine<E: Engine> {
    pub(crate) engine: Arc<E>,
    pub(crate) state: StateRecord,
    pub(crate) cache: RecordCache,
    published: Arc<Published>,
    options: Options,
    hub: Arc<Hub<E>>,
    leases: HashMap<LeaseId, LeaseRecord>,
    auth: Arc<Auth>,
    /// Members; alarms, in order, each once; and whether to go back to an older release.
    rare: Rare,
    /// See [`SizesRecord::log_bytes`].
    pub(crate) log_bytes: u64,
    pub(crate) job: Option<Job>,
    step: Step<E>,
}

/// What [`Machine::open`] and [`Machine::install`] find in an engine.
struct Found {
    state: StateRecord,
    compacted_physically: i64,
    leases: HashMap<LeaseId, LeaseRecord>,
    log_bytes: u64,
    rare: Rare,
    auth: Arc<Auth>,
}

impl Found {
    fn in_engine<E: Engine>(engine: &E) -> Result<Self, EngineError> {
        let meta = |key| engine.get(keys::META, key);
        let state = match meta(keys::STATE)? {
            Some(data) => StateRecord::decode(data).map_err(|error| keys::corrupt("meta", error))?,
            None => StateRecord::initial(),
        };
        let compacted_physically = match meta(keys::COMPACTED)? {
            Some(data) => {
                let bytes = data[..]
                    .try_into()
                    .map_err(|_| keys::corrupt("meta", "a revision of the wrong length"))?;
                i64::from_be_bytes(bytes)
            }
            None => -1,
        };
        let membership = meta(keys::MEMBERSHIP)?.unwrap_or_default();
        let membership = Membership::decode(membership).map_err(|error| keys::corrupt("meta", error))?;
        let alarms = meta(keys::ALARMS)?.unwrap_or_default();
        let alarms = AlarmsRecord::decode(alarms).map_err(|error| keys::corrupt("meta", error))?;
        let downgrade = meta(keys::DOWNGRADE)?.unwrap_or_default();
        let downgrade = DowngradeInfo::decode(downgrade).map_err(|error| keys::corrupt("meta", error))?;
        let sizes = meta(keys::SIZES)?.unwrap_or_default();
        let sizes = SizesRecord::decode(sizes).map_err(|error| keys::corrupt("meta", error))?;
        Ok(Found {
            state,
            compacted_physically,
            leases: load_leases(engine)?,
            log_bytes: sizes.log_bytes,
            rare: Rare {
                membership: Arc::new(membership),
                alarms: alarms.alarms.into(),
                downgrade: Arc::new(downgrade),
            },
            auth: Arc::new(Auth::load(engine)?),
        })
    }

    fn published(&self, options: &Options) -> Arc<Published> {
        Arc::new(Published::new(
            &self.state,
            self.compacted_physically,
            self.log_bytes,
            self.leases.len(),
            self.rare.clone(),
            Pages::new(
                options.list_cache_bytes,
                options.list_cache_keys_min,
                self.state.revision,
            ),
        ))
    }
}

/// The apply step that is being prepared.
struct Step<E: Engine> {
    overlay: Overlay,
    batch: E::Batch,
    events: Vec<Event>,
    /// Whether events are gathered: nobody watches in most stores most of the time.
    watched: bool,
    lease_changes: Vec<LeaseChange>,
    auth_changes: Vec<AuthChange>,
    compactions: Vec<(Revision, Revision)>,
    counts: Counts,
    /// The entry whose operations are prepared.
    index: RaftIndex,
    /// Changes so far of the revision that is being written.
    sub: u32,
    firsts: Firsts,
    scratch: Vec<u8>,
}

/// Where the open revision first changed each key; known up to the last time that it was asked for.
#[derive(Default)]
struct Firsts {
    by_key: BTreeMap<Bytes, usize>,
    /// Events of the revision that were gone through.
    seen: usize,
}

impl<E: Engine> Machine<E> {
    /// Takes up the state that the engine holds; an empty engine is an empty store.
    pub fn open(engine: Arc<E>, options: &Options) -> Result<Self, EngineError> {
        let found = Found::in_engine(&*engine)?;
        let published = found.published(options);
        let Found {
            state,
            compacted_physically,
            leases,
            log_bytes,
            rare,
            auth,
        } = found;
        let published_auth = Arc::new(PublishedAuth::new(auth.clone()));
        let reader = Reader::new(engine.clone(), published.clone(), published_auth);
        let hub = Arc::new(Hub::new(reader, options));
        let job = Job::resume(compacted_physically, &state, log_bytes);
        let estimated_items = (options.record_cache_bytes / 512).max(64) as usize;
        Ok(Machine {
            cache: RecordCache::with_weighter(estimated_items, options.record_cache_bytes, ByBytes),
            step: Step {
                overlay: Overlay::default(),
                batch: engine.batch(),
                events: Vec::new(),
                firsts: Firsts::default(),
                watched: false,
                lease_changes: Vec::new(),
                auth_changes: Vec::new(),
                compactions: Vec::new(),
                counts: Counts::default(),
                index: 0,
                sub: 0,
                scratch: Vec::new(),
            },
            engine,
            state,
            published,
            options: options.clone(),
            hub,
            leases,
            auth,
            rare,
            log_bytes,
            job,
        })
    }

    /// Goes on with the state in `engine`, which holds a snapshot of another member that is newer than what was applied
    /// here. Readers see the old state or the new one, never a mixture; watchers are caught up from storage.
    ///
    /// # Errors
    /// The engine's data cannot be read. Final: the caller stops the node.
    ///
    /// # Panics
    /// If the snapshot is older than what was applied.
    pub fn install(&mut self, engine: Arc<E>) -> Result<(), EngineError> {
        let found = Found::in_engine(&*engine)?;
        assert!(
            found.state.applied_index >= self.state.applied_index && found.state.revision >= self.state.revision,
            "a snapshot never takes the state back"
        );
        let published = found.published(&self.options);
        self.hub.reader().published_auth().publish(found.auth.clone());
        self.hub.reader().switch(engine.clone(), published.clone());
        self.step.batch = engine.batch();
        self.engine = engine;
        self.published = published;
        self.cache.clear();
        self.job = Job::resume(found.compacted_physically, &found.state, found.log_bytes);
        self.state = found.state;
        self.leases = found.leases;
        self.log_bytes = found.log_bytes;
        self.rare = found.rare;
        self.auth = found.auth;
        self.hub.publish(self.state.revision, None);
        Ok(())
    }

    /// For reads on any thread.
    pub fn reader(&self) -> Reader<E> {
        self.hub.reader().clone()
    }

    /// Who belongs to the cluster as of the applied index.
    pub fn membership(&self) -> &Arc<Membership> {
        &self.rare.membership
    }

    /// Users and roles as of the applied index.
    pub fn auth(&self) -> &Arc<Auth> {
        &self.auth
    }

    /// For watches on any thread.
    pub fn hub(&self) -> &Arc<Hub<E>> {
        &self.hub
    }

    /// The newest applied index and its term.
    pub fn applied(&self) -> (RaftIndex, u64) {
        (self.state.applied_index, self.state.applied_term)
    }

    /// All leases, as they stand in the log: for whoever watches the clock, at its start.
    pub fn leases(&self) -> impl Iterator<Item = LeaseChange> + '_ {
        self.leases.iter().map(|(&id, record)| LeaseChange::Granted {
            id,
            ttl: record.ttl,
            remaining_ttl: record.remaining_ttl,
        })
    }

    /// The applied index that the engine would come back with after a crash now: the Raft log may be trimmed up to it
    /// and no further (design invariant 6).
    pub fn durable_index(engine: &E) -> Result<RaftIndex, EngineError> {
        match engine.get_durable(keys::META, keys::STATE)? {
            Some(data) => Ok(StateRecord::decode(data)
                .map_err(|error| keys::corrupt("meta", error))?
                .applied_index),
            None => Ok(0),
        }
    }

    /// What a view holds: the applied index, its term, and the members. For whoever sends the view as a snapshot.
    pub fn state_in(view: &impl View) -> Result<(RaftIndex, u64, Membership), EngineError> {
        let state = view.get(keys::META, keys::STATE)?.unwrap_or_default();
        let state = StateRecord::decode(state).map_err(|error| keys::corrupt("meta", error))?;
        let membership = view.get(keys::META, keys::MEMBERSHIP)?.unwrap_or_default();
        let membership = Membership::decode(membership).map_err(|error| keys::corrupt("meta", error))?;
        Ok((state.applied_index, state.applied_term, membership))
    }

    /// Applies entries, as one batch and one engine write. On return their events are with the watchers; the replies
    /// are for the caller to hand out.
    ///
    /// # Errors
    /// Any error is final: the caller stops the node. Nothing was acknowledged.
    ///
    /// # Panics
    /// If the entries do not continue right after the applied index.
    pub fn apply(&mut self, entries: &[Committed]) -> Result<Applied, ApplyError> {
        self.apply_telling(entries, |_| ())
    }

    /// As [`Machine::apply`]; `written` is told what becomes of leases once it is written and before anybody can see it.
    pub fn apply_telling(
        &mut self,
        entries: &[Committed],
        written: impl FnOnce(&[LeaseChange]),
    ) -> Result<Applied, ApplyError> {
        self.step.watched = self.hub.is_watched();
        let mut replies = Vec::new();
        let mut member_changes = Vec::new();
        let mut digests = Vec::with_capacity(entries.len());
        for entry in entries {
            assert_eq!(
                entry.index,
                self.state.applied_index + 1,
                "committed entries are applied without gaps"
            );
            assert!(entry.term >= self.state.applied_term, "terms never go back");
            self.step.index = entry.index;
            match &entry.command {
                Command::Operations(data) => {
                    let operations = decode_entry(data).map_err(|cause| ApplyError::Entry {
                        index: entry.index,
                        cause,
                    })?;
                    replies.reserve(operations.len());
                    for operation in operations {
                        let id = operation.id();
                        let result = self.prepare(operation)?;
                        replies.push(Reply { id, result });
                    }
                }
                Command::MemberChange(data) => {
                    let (id, result) = self.member_change(data).map_err(|cause| ApplyError::Entry {
                        index: entry.index,
                        cause,
                    })?;
                    member_changes.push((entry.index, result.is_ok()));
                    replies.push(Reply { id, result });
                }
            }
            self.state.applied_index = entry.index;
            self.state.applied_term = entry.term;
            digests.push(Digest {
                index: entry.index,
                revision: self.state.revision,
                digest: self.state.digest,
            });
        }
        let write = self.commit(written)?;
        if self.state.compacted
            > self
                .published
                .compacted_physically
                .load(std::sync::atomic::Ordering::Relaxed)
        {
            Job::renew(&mut self.job, &self.state, self.log_bytes);
        }
        Ok(Applied {
            replies,
            lease_changes: std::mem::take(&mut self.step.lease_changes),
            auth_changes: std::mem::take(&mut self.step.auth_changes),
            member_changes,
            digests,
            compactions: std::mem::take(&mut self.step.compactions),
            counts: std::mem::take(&mut self.step.counts),
            write,
            compaction_due: self.job.is_some(),
        })
    }

    /// Writes what was prepared, then tells readers, then watchers.
    fn commit(&mut self, written: impl FnOnce(&[LeaseChange])) -> Result<WriteStats, EngineError> {
        let step = &mut self.step;
        // Keys in order, each once: a hot key that changed many times in this step is one write.
        for (key, record) in &step.overlay.cur {
            step.scratch.clear();
            record.encode(&mut step.scratch);
            step.batch.put(keys::CUR, key, &step.scratch);
        }
        for ((lease, key), attached) in &step.overlay.attached {
            let at = keys::attached_key(*lease, key);
            if *attached {
                step.batch.put(keys::LEASE, &at, &[]);
            } else {
                step.batch.delete(keys::LEASE, &at);
            }
        }
        step.scratch.clear();
        self.state.encode(&mut step.scratch).expect("a Vec grows");
        step.batch.put(keys::META, keys::STATE, &step.scratch);
        let sizes = SizesRecord {
            log_bytes: self.log_bytes,
        };
        step.scratch.clear();
        sizes.encode(&mut step.scratch).expect("a Vec grows");
        step.batch.put(keys::META, keys::SIZES, &step.scratch);

        let batch = std::mem::replace(&mut step.batch, self.engine.batch());
        // Before the write, so that whoever sees an effect of a compaction knows of it. Readers are refused a moment
        // early; should the write fail, the node stops.
        self.published
            .compacted
            .store(self.state.compacted, std::sync::atomic::Ordering::Release);
        let stats = self.engine.write(batch)?;

        for (key, record) in &step.overlay.cur {
            if record.value.len() <= CACHED_VALUE_BYTES_MAX {
                // Copies: the originals are slices of a log entry, which a cache must not keep alive.
                let value = Bytes::copy_from_slice(&record.value);
                self.cache.insert(
                    Bytes::copy_from_slice(key),
                    Record {
                        value,
                        ..record.clone()
                    },
                );
            } else {
                self.cache.remove(key);
            }
        }
        let since = self.published.revision.load(std::sync::atomic::Ordering::Relaxed) + 1;
        self.published
            .pages
            .tell(since, self.state.revision, step.overlay.cur.iter());
        step.overlay.clear();
        written(&step.lease_changes);
        let published_auth = self.hub.reader().published_auth();
        if !Arc::ptr_eq(&self.hub.reader().auth(), &self.auth) {
            published_auth.publish(self.auth.clone());
        }
        self.published
            .publish(&self.state, self.log_bytes, self.leases.len(), &self.rare);
        let events = std::mem::take(&mut step.events);
        self.hub.publish(self.state.revision, step.watched.then_some(events));
        Ok(stats)
    }

    fn prepare(&mut self, operation: Operation) -> Result<Result<Outcome, Error>, EngineError> {
        self.step.counts.operations += 1;
        assert_eq!(self.step.sub, 0, "no operation leaves a revision open");
        let header = operation.header.unwrap_or_default();
        let action = operation
            .action
            .expect("the decoder refuses operations without an action");
        if let Some(error) = self.alarmed(&action) {
            return Ok(Err(error));
        }
        if self.auth.is_enabled()
            && let Err(error) = answer(self.authorize(&header, &action))?
        {
            return Ok(Err(error));
        }
        let result = match action {
            Action::Put(put) => self.put(put).map(Outcome::Put),
            Action::DeleteRange(delete) => self.delete_range(&delete).map(Outcome::DeleteRange),
            Action::Txn(txn) => self.txn(&txn).map(Outcome::Txn),
            Action::Compact(compact) => self.compact(&compact).map(Outcome::Compact),
            Action::LeaseGrant(grant) => self.lease_grant(&grant).map(Outcome::LeaseGrant),
            Action::LeaseRevoke(revoke) => self.lease_revoke(&revoke).map(Outcome::LeaseRevoke),
            Action::LeaseCheckpoint(checkpoint) => {
                self.lease_checkpoint(&checkpoint);
                Ok(Outcome::LeaseCheckpoint)
            }
            Action::Alarm(request) => Ok(Outcome::Alarm(self.alarm(&request))),
            Action::MemberAttributes(request) => {
                Arc::make_mut(&mut self.rare.membership).set_attributes(&request);
                self.write_membership();
                Ok(Outcome::Members(self.rare.membership.clone()))
            }
            Action::MemberUpdate(update) => {
                let updated = Arc::make_mut(&mut self.rare.membership).update(&update);
                self.write_membership();
                updated
                    .map(|()| Outcome::Members(self.rare.membership.clone()))
                    .map_err(Failure::Refused)
            }
            Action::Authenticate(request) => self.authenticate(&request).map(Outcome::Authenticate),
            Action::AuthStatus(_)
            | Action::AuthUserGet(_)
            | Action::AuthUserList(_)
            | Action::AuthRoleGet(_)
            | Action::AuthRoleList(_) => {
                let answer = self.auth.answer(&action, &header.username);
                answer.map(|answer| self.auth_outcome(answer)).map_err(Failure::Refused)
            }
            Action::AuthEnable(_)
            | Action::AuthDisable(_)
            | Action::AuthUserAdd(_)
            | Action::AuthUserDelete(_)
            | Action::AuthUserChangePassword(_)
            | Action::AuthUserGrantRole(_)
            | Action::AuthUserRevokeRole(_)
            | Action::AuthRoleAdd(_)
            | Action::AuthRoleDelete(_)
            | Action::AuthRoleGrantPermission(_)
            | Action::AuthRoleRevokePermission(_) => {
                let mut changing = Changing {
                    auth: Arc::make_mut(&mut self.auth),
                    batch: &mut self.step.batch,
                    digest: &mut self.state.digest,
                    changes: &mut self.step.auth_changes,
                };
                let changed = changing.apply(action);
                changed
                    .map(|answer| self.auth_outcome(answer))
                    .map_err(Failure::Refused)
            }
            Action::Downgrade(info) => {
                self.step.batch.put(keys::META, keys::DOWNGRADE, &info.encode_to_vec());
                self.rare.downgrade = Arc::new(info);
                Ok(Outcome::Downgrade)
            }
            // Raft did not hear of it, so it cannot be. Nobody proposes one so.
            Action::MemberChange(_) => Err(Failure::Refused(Error::NotCapable)),
        };
        answer(result)
    }

    /// Holds an operation against what its user may do now: that was checked when it was proposed, but by the users and
    /// roles of then.
    fn authorize(&self, header: &OperationHeader, action: &Action) -> Result<(), Failure> {
        if auth::is_administrative(action) || (auth::was_administrative(action) && !header.username.is_empty()) {
            return Ok(self.auth.permit_admin(&header.username)?);
        }
        let caller = Caller {
            name: &header.username,
            revision: header.auth_revision,
        };
        auth::needs(action, &mut |need: Need<'_>| -> Result<(), Failure> {
            match need {
                Need::Read(span) => self.auth.permit_read(caller, span)?,
                Need::Write(span) => self.auth.permit_write(caller, span)?,
                Need::WriteAttached(lease) => {
                    let limits = self.auth.limits_of(caller, Right::Write);
                    if !matches!(limits, Limits::None) && self.leases.contains_key(&lease) {
                        let view = self.engine.view();
                        auth::permit_attached(&limits, &view, Some(&self.step.overlay), lease)??;
                    }
                }
            }
            Ok(())
        })
    }

    fn authenticate(&mut self, request: &InternalAuthenticateRequest) -> Result<AuthenticateResponse, Failure> {
        self.auth.authenticate(&request.name)?;
        let index = self.step.index;
        let token = format!("{}.{index}", request.simple_token);
        self.step.auth_changes.push(AuthChange::TokenGiven {
            user: request.name.clone(),
            token: token.clone(),
            index,
        });
        Ok(AuthenticateResponse {
            header: ResponseHeader::at(self.state.revision),
            token,
        })
    }

    fn auth_outcome(&self, mut answer: Answer) -> Outcome {
        *answer.header_mut() = ResponseHeader::at(self.state.revision);
        Outcome::Auth(answer)
    }

    /// Why alarms forbid an operation, if they do (etcd's `applierV3Capped` and `applierV3Corrupt`).
    fn alarmed(&self, action: &Action) -> Option<Error> {
        if self.rare.alarms.is_empty() {
            return None;
        }
        let writes = matches!(
            action,
            Action::Put(_)
                | Action::DeleteRange(_)
                | Action::Txn(_)
                | Action::Compact(_)
                | Action::LeaseGrant(_)
                | Action::LeaseRevoke(_)
        );
        if writes && self.is_corrupt() {
            return Some(Error::Corrupt);
        }
        let grows = match action {
            Action::Put(_) | Action::LeaseGrant(_) => true,
            Action::Txn(txn) => txn.has_put(),
            _ => false,
        };
        let is_full = self.rare.alarms.iter().any(|alarm| alarm.alarm() == AlarmType::Nospace);
        (grows && is_full).then_some(Error::NoSpace)
    }

    /// Whether there is no majority of members whose state is known to be good. One odd member among three is fenced
    /// off by itself and is no reason to refuse everyone; where nobody knows who is right, everyone is refused, as in
    /// etcd.
    fn is_corrupt(&self) -> bool {
        let corrupt = |id| {
            let alarm = AlarmMember {
                member_id: id,
                alarm: AlarmType::Corrupt.into(),
            };
            self.rare.alarms.contains(&alarm)
        };
        let voters = self.rare.membership.voters().count();
        let good = self.rare.membership.voters().filter(|&id| !corrupt(id)).count();
        corrupt(0) || (voters > 0 && good < voters / 2 + 1)
    }

    /// Alarms are activated and deactivated one by one, as in etcd: member 0 and type NONE stand for all only where alarms
    /// are asked for.
    fn alarm(&mut self, request: &AlarmRequest) -> AlarmResponse {
        let kind = request.alarm();
        let alarm = AlarmMember {
            member_id: request.member_id,
            alarm: request.alarm,
        };
        let mut alarms = self.rare.alarms.to_vec();
        let found = alarms.binary_search(&alarm);
        let changed = match (request.action(), found) {
            (AlarmAction::Get, _) => {
                alarms.retain(|alarm| kind == AlarmType::None || alarm.alarm() == kind);
                return AlarmResponse {
                    header: ResponseHeader::at(self.state.revision),
                    alarms,
                };
            }
            (AlarmAction::Activate, _) if kind == AlarmType::None => Vec::new(),
            (AlarmAction::Activate, Ok(_)) => vec![alarm],
            (AlarmAction::Activate, Err(at)) => {
                alarms.insert(at, alarm);
                vec![alarm]
            }
            (AlarmAction::Deactivate, Ok(at)) => vec![alarms.remove(at)],
            (AlarmAction::Deactivate, Err(_)) => Vec::new(),
        };
        self.set_alarms(alarms);
        AlarmResponse {
            header: ResponseHeader::at(self.state.revision),
            alarms: changed,
        }
    }

    fn set_alarms(&mut self, alarms: Vec<AlarmMember>) {
        if alarms[..] == self.rare.alarms[..] {
            return;
        }
        let record = AlarmsRecord { alarms };
        self.step.batch.put(keys::META, keys::ALARMS, &record.encode_to_vec());
        self.rare.alarms = record.alarms.into();
    }

    fn member_change(&mut self, data: &Bytes) -> Result<(RequestId, Result<Outcome, Error>), DecodeError> {
        let operation = decode_entry(data)?.pop().unwrap_or_default();
        let id = operation.id();
        let Some(Action::MemberChange(change)) = operation.action else {
            return Err(DecodeError::Unknown {
                cause: "a change of the Raft configuration without a change of members".to_owned(),
                head: String::new(),
            });
        };
        Ok((id, self.change_members(&change)))
    }

    fn change_members(&mut self, change: &MemberChange) -> Result<Outcome, Error> {
        Arc::make_mut(&mut self.rare.membership).change(change)?;
        // Alarms of a member that left concern nobody any more.
        if self.rare.membership.is_removed(change.member_id()) {
            let mut alarms = self.rare.alarms.to_vec();
            alarms.retain(|alarm| alarm.member_id != change.member_id());
            self.set_alarms(alarms);
        }
        self.write_membership();
        Ok(Outcome::Members(self.rare.membership.clone()))
    }

    fn write_membership(&mut self) {
        self.step
            .batch
            .put(keys::META, keys::MEMBERSHIP, &self.rare.membership.encode_to_vec());
    }

    /// Ends the revision that is being written, if anything was; returns the newest revision.
    fn close_revision(&mut self) -> Revision {
        if self.step.sub > 0 {
            self.state.revision += 1;
            self.step.sub = 0;
            self.step.firsts = Firsts::default();
        }
        self.state.revision
    }

    /// The newest revision as an operation in the middle of a revision sees it.
    fn revision_seen(&self) -> Revision {
        self.state.revision + i64::from(self.step.sub > 0)
    }

    fn next_position(&mut self) -> Position {
        let at = Position {
            main: self.state.revision + 1,
            sub: self.step.sub,
        };
        self.step.sub += 1;
        at
    }

    /// The newest record of a key. A tombstone that compaction has passed is as good as none.
    fn newest(&mut self, key: &[u8]) -> Result<Option<Record>, EngineError> {
        let record = if let Some(record) = self.step.overlay.cur.get(key) {
            Some(record.clone())
        } else if let Some(record) = self.cache.get(key) {
            Some(record.clone())
        } else {
            self.engine
                .get(keys::CUR, key)?
                .map(|data| Record::decode(&data))
                .transpose()?
        };
        Ok(record.filter(|record| !(record.tombstone && record.at.main <= self.state.compacted)))
    }

    /// Runs `read` on the state as prepared so far.
    fn with_snapshot<T>(&self, read: impl FnOnce(&Snapshot<'_, E::View<'_>>) -> T) -> T {
        let view = self.engine.view();
        read(&Snapshot {
            view: &view,
            overlay: Some(&self.step.overlay),
            revision: self.revision_seen(),
            compacted: self.state.compacted,
        })
    }

    fn put(&mut self, put: PutRequest) -> Result<PutResponse, Failure> {
        if put.lease != 0 && !self.leases.contains_key(&put.lease) {
            return Err(Error::LeaseNotFound.into());
        }
        let response = self.counting(|machine| {
            machine.step.counts.ranges += u64::from(txn::reads_before(&put));
            machine.put_unchecked(put)
        })?;
        self.close_revision();
        Ok(response)
    }

    /// Counts what happens within as one transaction of etcd's store, if it comes to more than one call.
    fn counting<T>(&mut self, operation: impl FnOnce(&mut Self) -> Result<T, Failure>) -> Result<T, Failure> {
        let before = self.step.counts.calls();
        let done = operation(self);
        self.step.counts.txns += u64::from(self.step.counts.calls() > before + 1);
        done
    }

    /// Puts without closing the revision. The lease was checked.
    fn put_unchecked(&mut self, put: PutRequest) -> Result<PutResponse, Failure> {
        let prev = self.newest(&put.key)?;
        let live = prev.as_ref().filter(|record| !record.tombstone);
        let (value, lease) = match live {
            Some(live) => (
                if put.ignore_value {
                    live.value.clone()
                } else {
                    put.value
                },
                if put.ignore_lease { live.lease } else { put.lease },
            ),
            None if put.ignore_value || put.ignore_lease => return Err(Error::KeyNotFound.into()),
            None => (put.value, put.lease),
        };
        let prev_kv = (put.prev_kv || self.step.watched)
            .then(|| live.map(|live| live.to_key_value(put.key.clone())))
            .flatten();
        let old_lease = live.map_or(0, |live| live.lease);
        if let Some(live) = live {
            self.state.digest = self.state.digest.wrapping_sub(live.digest);
            self.state.key_bytes -= (put.key.len() + live.value.len()) as u64;
        } else {
            self.state.keys += 1;
        }
        self.state.key_bytes += (put.key.len() + value.len()) as u64;

        let at = self.next_position();
        let create = live.map_or(at.main, |live| live.create);
        let version = live.map_or(0, |live| live.version) + 1;
        let digest = Record::digest_of(&put.key, at, create, version, lease, &value);
        self.state.digest = self.state.digest.wrapping_add(digest);
        let prev_at = prev.as_ref().map(|prev| prev.at);
        let (depth, anchors) = prev.as_ref().map_or_else(Default::default, Record::successor_links);
        let record = Record {
            at,
            prev: prev_at,
            depth,
            anchors,
            tombstone: false,
            create,
            version,
            lease,
            digest,
            value,
        };

        if old_lease != lease {
            if old_lease != 0 {
                self.step.overlay.attached.insert((old_lease, put.key.clone()), false);
            }
            if lease != 0 {
                self.step.overlay.attached.insert((lease, put.key.clone()), true);
            }
        }
        if self.step.watched {
            let kv = record.to_key_value(put.key.clone());
            self.push_event(EventType::Put, kv, prev_kv.clone());
        }
        self.step.counts.puts += 1;
        self.step.counts.put_bytes += (put.key.len() + record.value.len()) as u64;
        self.write_change(put.key, record, prev);
        let header = ResponseHeader::at(at.main);
        Ok(PutResponse {
            header,
            prev_kv: prev_kv.filter(|_| put.prev_kv),
        })
    }

    /// Adds one change to the step: to the log, and as the key's newest record.
    fn write_change(&mut self, key: Bytes, record: Record, prev: Option<Record>) {
        let step = &mut self.step;
        if let Some(prev) = prev
            && prev.at.main < self.state.compacted
        {
            // Physical compaction may have dropped, or may be about to drop, `prev` from the log, since until now the
            // key's newest record said all there was to know. Its successor keeps it.
            step.scratch.clear();
            keys::encode_change(&key, &prev, &mut step.scratch);
            step.batch.put(keys::REV, &keys::kept_key(record.at), &step.scratch);
            step.overlay.kept.push(Change {
                at: record.at,
                key: key.clone(),
                record: prev,
            });
        }
        step.scratch.clear();
        keys::encode_change(&key, &record, &mut step.scratch);
        step.batch.put(keys::REV, &keys::log_key(record.at), &step.scratch);
        self.log_bytes += (keys::REV_KEY_LEN + step.scratch.len()) as u64;
        if record.tombstone {
            step.batch.put(keys::REV, &keys::tombstone_key(record.at), &key);
        }
        step.overlay.log.push(Change {
            at: record.at,
            key: key.clone(),
            record: record.clone(),
        });
        step.overlay.cur.insert(key, record);
    }

    fn push_event(&mut self, kind: EventType, kv: KeyValue, mut prev_kv: Option<KeyValue>) {
        // "Before" means before the revision, and what the revision created had nothing before it, even if the same
        // revision deleted it first: etcd sees it so. Where a transaction changes a key more than once, the first change
        // knows. It is looked for only then: most transactions do not.
        if kv.create_revision == kv.mod_revision {
            prev_kv = None;
        } else if prev_kv
            .as_ref()
            .is_some_and(|prev_kv| prev_kv.mod_revision == kv.mod_revision)
        {
            prev_kv = self.first_event_of(&kv.key).and_then(|event| event.prev_kv.clone());
        }
        self.step.events.push(Event {
            r#type: kind as i32,
            kv: Some(kv),
            prev_kv,
        });
    }

    /// The first event of a key in the open revision. However many are looked for, each event is gone through once.
    fn first_event_of(&mut self, key: &Bytes) -> Option<&Event> {
        let Step {
            events, firsts, sub, ..
        } = &mut self.step;
        let open = &events[events.len() - (*sub as usize - 1)..];
        for (at, event) in open.iter().enumerate().skip(firsts.seen) {
            if let Some(kv) = &event.kv {
                firsts.by_key.entry(kv.key.clone()).or_insert(at);
            }
        }
        firsts.seen = open.len();
        firsts.by_key.get(key).map(|&at| &open[at])
    }

    fn delete_range(&mut self, delete: &DeleteRangeRequest) -> Result<DeleteRangeResponse, Failure> {
        let response = self.counting(|machine| machine.delete_range_open(delete))?;
        self.close_revision();
        Ok(response)
    }

    /// Deletes without closing the revision.
    fn delete_range_open(&mut self, delete: &DeleteRangeRequest) -> Result<DeleteRangeResponse, Failure> {
        let doomed = self.doomed(delete)?;
        self.step.counts.deletes += 1;
        self.step.counts.ranges += u64::from(delete.prev_kv);
        let mut response = DeleteRangeResponse {
            deleted: doomed.len() as i64,
            ..Default::default()
        };
        for Doomed { key, record, value_len } in doomed {
            if delete.prev_kv {
                response.prev_kvs.push(record.to_key_value(key.clone()));
            }
            self.delete_key(key, record, value_len);
        }
        response.header = ResponseHeader::at(self.revision_seen());
        Ok(response)
    }

    /// The live keys that a deletion hits, in order.
    fn doomed(&mut self, delete: &DeleteRangeRequest) -> Result<Vec<Doomed>, Failure> {
        if let Span::Key(key) = delete.span() {
            let live = self.newest(key)?.filter(|record| !record.tombstone);
            let doomed = live.map(|record| Doomed {
                key: delete.key.clone(),
                value_len: record.value.len(),
                record,
            });
            return Ok(doomed.into_iter().collect());
        }
        let with_values = delete.prev_kv || self.step.watched;
        let compacted = self.state.compacted;
        let mut doomed = Vec::new();
        self.with_snapshot(|snapshot| {
            snapshot.visit_newest(delete.span(), |key, mut record| {
                if !record.tombstone {
                    let value_len = record.value.len();
                    // A value is copied only where someone will want it.
                    if !with_values && record.at.main >= compacted {
                        record.value = &[];
                    }
                    doomed.push(Doomed {
                        key: Bytes::copy_from_slice(key),
                        record: record.to_owned(),
                        value_len,
                    });
                }
                Ok(true)
            })
        })?;
        Ok(doomed)
    }

    fn delete_key(&mut self, key: Bytes, live: Record, value_len: usize) {
        self.state.digest = self.state.digest.wrapping_sub(live.digest);
        self.state.keys -= 1;
        self.state.key_bytes -= (key.len() + value_len) as u64;
        let at = self.next_position();
        if live.lease != 0 {
            self.step.overlay.attached.insert((live.lease, key.clone()), false);
        }
        if self.step.watched {
            let kv = KeyValue {
                key: key.clone(),
                mod_revision: at.main,
                ..Default::default()
            };
            self.push_event(EventType::Delete, kv, Some(live.to_key_value(key.clone())));
        }
        let (depth, anchors) = live.successor_links();
        let record = Record {
            at,
            prev: Some(live.at),
            depth,
            anchors,
            tombstone: true,
            ..Default::default()
        };
        self.write_change(key, record, Some(live));
    }

    fn txn(&mut self, request: &TxnRequest) -> Result<TxnResponse, Failure> {
        let mut response = if request.is_read_only() {
            // It has come here with others' operations; one transaction of the store does all of it.
            self.counting(|machine| {
                let path = machine.txn_path(request)?;
                machine.txn_branch(request, &mut path.into_iter())
            })?
        } else {
            let path = self.counting(|machine| machine.txn_path(request))?;
            self.counting(|machine| machine.txn_branch(request, &mut path.into_iter()))?
        };
        response.header = ResponseHeader::at(self.close_revision());
        Ok(response)
    }

    /// Which branches are taken; nothing in them is refused any more.
    fn txn_path(&mut self, request: &TxnRequest) -> Result<Vec<bool>, Failure> {
        let (mut path, mut reads) = (Vec::new(), 0);
        let mut checked = txn::paths(self, request, &mut path, &mut reads);
        if checked.is_ok() {
            checked = txn::check(self, request, &mut path.iter().copied(), &mut reads);
        }
        self.step.counts.ranges += reads;
        checked.map(|()| path)
    }

    /// Carries out the branch taken. It was checked, so nothing in it is refused any more.
    fn txn_branch(
        &mut self,
        request: &TxnRequest,
        path: &mut impl Iterator<Item = bool>,
    ) -> Result<TxnResponse, Failure> {
        let succeeded = path.next().expect("a branch was chosen for every transaction");
        let mut responses = Vec::new();
        for op in txn::branch(request, succeeded) {
            let response = match &op.request {
                Some(RequestOpKind::Range(range)) => {
                    let at = if range.revision <= 0 {
                        self.revision_seen()
                    } else {
                        range.revision
                    };
                    self.step.counts.ranges += 1;
                    ResponseOpKind::Range(self.with_snapshot(|snapshot| snapshot.range(range, at, None))?)
                }
                Some(RequestOpKind::Put(put)) => ResponseOpKind::Put(self.put_in_txn(put)?),
                Some(RequestOpKind::DeleteRange(delete)) => {
                    ResponseOpKind::DeleteRange(self.delete_range_open(delete)?)
                }
                Some(RequestOpKind::Txn(nested)) => ResponseOpKind::Txn(self.txn_branch(nested, path)?),
                None => continue,
            };
            responses.push(ResponseOp {
                response: Some(response),
            });
        }
        // A nested transaction's header is there but says nothing, as in etcd; the outer one's is filled in later.
        Ok(TxnResponse {
            header: ResponseHeader::at(0),
            succeeded,
            responses,
        })
    }

    fn put_in_txn(&mut self, put: &PutRequest) -> Result<PutResponse, Failure> {
        self.step.counts.ranges += u64::from(txn::reads_before(put));
        match self.put_unchecked(put.clone()) {
            // The key was there when the transaction was checked, so an operation before this one in the same
            // transaction deleted it. Validation refuses that on every path but through nested transactions; etcd
            // panics here. Changes are already prepared, so we go on as if there were nothing to ignore.
            Err(Failure::Refused(Error::KeyNotFound)) => self.put_unchecked(PutRequest {
                ignore_value: false,
                ignore_lease: false,
                ..put.clone()
            }),
            result => result,
        }
    }

    fn compact(&mut self, request: &CompactionRequest) -> Result<CompactionResponse, Failure> {
        if request.revision <= self.state.compacted {
            return Err(Error::Compacted.into());
        }
        if request.revision > self.state.revision {
            return Err(Error::FutureRevision.into());
        }
        self.step.compactions.push((self.state.compacted, request.revision));
        // etcd reads a key to learn of the newest revision.
        self.step.counts.ranges += 1;
        self.state.compacted = request.revision;
        Ok(CompactionResponse {
            header: ResponseHeader::at(self.state.revision),
        })
    }

    fn lease_grant(&mut self, request: &LeaseGrantRequest) -> Result<LeaseGrantResponse, Failure> {
        let &LeaseGrantRequest { id, ttl } = request;
        if id == 0 {
            return Err(Error::LeaseNotFound.into());
        }
        if ttl > LEASE_TTL_MAX_S {
            return Err(Error::LeaseTtlTooLarge.into());
        }
        if self.leases.contains_key(&id) {
            return Err(Error::LeaseExists.into());
        }
        self.set_lease(id, LeaseRecord { ttl, remaining_ttl: 0 });
        Ok(LeaseGrantResponse {
            header: ResponseHeader::at(self.state.revision),
            id,
            ttl,
            error: String::new(),
        })
    }

    fn set_lease(&mut self, id: LeaseId, record: LeaseRecord) {
        let LeaseRecord { ttl, remaining_ttl } = record;
        self.step
            .batch
            .put(keys::LEASE, &keys::lease_key(id), &record.encode_to_vec());
        self.leases.insert(id, record);
        self.step
            .lease_changes
            .push(LeaseChange::Granted { id, ttl, remaining_ttl });
    }

    fn lease_revoke(&mut self, request: &LeaseRevokeRequest) -> Result<LeaseRevokeResponse, Failure> {
        let id = request.id;
        if !self.leases.contains_key(&id) {
            return Err(Error::LeaseNotFound.into());
        }
        let attached = {
            let view = self.engine.view();
            attached_keys(&view, Some(&self.step.overlay), id)?
        };
        self.step.counts.deletes += attached.len() as u64;
        self.step.counts.txns += u64::from(attached.len() > 1);
        for key in attached {
            let live = self
                .newest(&key)?
                .filter(|record| !record.tombstone && record.lease == id);
            let live = live.ok_or_else(|| {
                keys::corrupt(
                    "lease",
                    format!("lease {id:x} holds the key {key:?}, which does not hold it"),
                )
            })?;
            let value_len = live.value.len();
            self.delete_key(key, live, value_len);
        }
        self.leases.remove(&id);
        self.step.batch.delete(keys::LEASE, &keys::lease_key(id));
        self.step.lease_changes.push(LeaseChange::Revoked { id });
        Ok(LeaseRevokeResponse {
            header: ResponseHeader::at(self.close_revision()),
        })
    }

    fn lease_checkpoint(&mut self, request: &LeaseCheckpointRequest) {
        for checkpoint in &request.checkpoints {
            // A lease that ended meanwhile has nothing to remember.
            if let Some(record) = self.leases.get(&checkpoint.id) {
                let record = LeaseRecord {
                    ttl: record.ttl,
                    remaining_ttl: checkpoint.remaining_ttl,
                };
                self.set_lease(checkpoint.id, record);
            }
        }
    }

    pub(crate) fn published(&self) -> &Published {
        &self.published
    }
}

/// A key about to be deleted.
struct Doomed {
    key: Bytes,
    /// Its newest record, maybe without the value.
    record: Record,
    value_len: usize,
}

fn load_leases<E: Engine>(engine: &E) -> Result<HashMap<LeaseId, LeaseRecord>, EngineError> {
    let view = engine.view();
    let (start, end) = keys::lease_range();
    let mut cursor = view.cursor(
        keys::LEASE,
        KeyRange {
            start: &start,
            end: Some(&end),
        },
    )?;
    let mut leases = HashMap::new();
    cursor.seek_first()?;
    while let Some((key, value)) = cursor.entry() {
        let record = LeaseRecord::decode(value).map_err(|error| keys::corrupt("lease", error))?;
        leases.insert(keys::lease_id_of(key)?, record);
        cursor.next()?;
    }
    Ok(leases)
}

impl<E: Engine> txn::Newest for Machine<E> {
    fn key_value(&mut self, key: &Bytes) -> Result<Option<KeyValue>, Failure> {
        let live = self.newest(key)?.filter(|record| !record.tombstone);
        Ok(live.map(|record| record.to_key_value(key.clone())))
    }

    fn range_satisfies(&mut self, compare: &Compare) -> Result<bool, Failure> {
        self.with_snapshot(|snapshot| txn::range_satisfies(snapshot, compare))
    }

    fn has_lease(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    fn revisions(&self) -> (Revision, Revision) {
        (self.state.revision, self.state.compacted)
    }
}
