//! [`api::Store`] over a running node.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use api::codec::{
    Action, LeaseCheckpoint, LeaseCheckpointRequest, MemberAttributes, MemberAttributesRequest, MemberChange,
    MemberChangeKind, MemberUpdate, Operation, encode_operation,
};
use api::kv::{
    AlarmAction, AlarmRequest, AlarmResponse, AlarmType, CompactionRequest, CompactionResponse, DeleteRangeRequest,
    DeleteRangeResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseLeasesResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveResponse, Member, PutRequest, PutResponse,
    RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse,
};
use api::store::{Alarm, HashKv, MemberList, ScanPage, ScanRequest, Status};
use api::{Credentials, Error, LeaseId, Limits, MemberId, Result, Revision, Span, Store};
use mvcc::{Failure, Membership, Outcome, Stream};
use replica::{Input, Proposal};
use storage::Engine;

use crate::calls::{Answer, Ask, Lease, LeaseTime};
use crate::identity;
use crate::node::Shared;

/// Ranges that may return more keys than this leave the async thread to others while they run.
const INLINE_KEYS_MAX: i64 = 500;

/// The store that a node serves. A cheap handle.
pub struct NodeStore<E: Engine> {
    shared: Arc<Shared<E>>,
    credentials: Credentials,
}

impl<E: Engine> Clone for NodeStore<E> {
    fn clone(&self) -> Self {
        NodeStore {
            shared: self.shared.clone(),
            credentials: self.credentials.clone(),
        }
    }
}

/// Takes the one kind of outcome that the action can come to.
macro_rules! outcome {
    ($outcome:expr, $kind:ident) => {
        match $outcome {
            Outcome::$kind(response) => response,
            other => unreachable!("the machine answered {other:?}"),
        }
    };
}

impl<E: Engine> NodeStore<E> {
    pub(crate) fn new(shared: Arc<Shared<E>>) -> Self {
        NodeStore {
            shared,
            credentials: Credentials::default(),
        }
    }

    /// What the metrics want to know.
    pub(crate) fn shared(&self) -> &Arc<Shared<E>> {
        &self.shared
    }

    /// Completes a header that says the revision.
    fn complete(&self, header: &mut Option<ResponseHeader>) {
        let header = header.get_or_insert_default();
        header.cluster_id = self.shared.config.cluster_id;
        header.member_id = self.shared.member_id();
        header.raft_term = self.shared.term.load(Ordering::Acquire);
    }

    fn header_at(&self, revision: i64) -> Option<ResponseHeader> {
        let mut header = ResponseHeader::at(revision);
        self.complete(&mut header);
        header
    }

    /// A member whose state is known to be wrong answers nobody.
    fn check_trust(&self) -> Result<()> {
        if self.shared.quarantined.load(Ordering::Acquire) {
            Err(Error::Corrupt)
        } else {
            Ok(())
        }
    }

    /// Refuses what would fill the disk further.
    fn check_space(&self) -> Result<()> {
        self.check_trust()?;
        if self.shared.disk_full.load(Ordering::Acquire) {
            Err(Error::NoSpace)
        } else {
            Ok(())
        }
    }

    /// Puts an operation into the log and waits for what it comes to.
    async fn propose(&self, action: Action) -> Result<Outcome> {
        self.check_trust()?;
        self.propose_as(action, Input::Propose).await
    }

    async fn propose_as(&self, action: Action, input: impl FnOnce(Proposal) -> Input) -> Result<Outcome> {
        let shared = &*self.shared;
        let id = shared.pending.next_id();
        let operation = encode_operation(&Operation::new(id, action));
        if operation.len() > shared.config.limits.request_bytes_max {
            return Err(Error::RequestTooLarge);
        }
        let mut place = shared.pending.enter(id, operation.len())?;
        shared.inputs.push(input(Proposal {
            id,
            operation,
            leader_term: 0,
        }));
        let outcome = tokio::time::timeout(shared.config.limits.request_timeout, place.outcome()).await;
        outcome.unwrap_or_else(|_| {
            shared.metrics.proposals_failed.fetch_add(1, Ordering::Relaxed);
            Err(if shared.leader.load(Ordering::Acquire) == 0 {
                Error::TimeoutLeaderFail
            } else {
                Error::Timeout
            })
        })
    }

    /// Proposes a change of members, as the leader, and waits until it is applied.
    pub(crate) async fn propose_member_change(&self, change: MemberChange) -> Result<Arc<Membership>> {
        let action = Action::MemberChange(change.clone());
        let outcome = self
            .propose_as(action, |proposal| Input::ProposeMemberChange(proposal, change))
            .await?;
        Ok(outcome!(outcome, Members))
    }

    /// Raises or ends an alarm.
    pub(crate) async fn propose_alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        let outcome = self.propose_as(Action::Alarm(request), Input::Propose).await?;
        Ok(outcome!(outcome, Alarm))
    }

    /// Takes back what the log says of how little time a lease has left.
    pub(crate) async fn take_checkpoint_back(&self, id: LeaseId) -> Result<()> {
        let checkpoint = LeaseCheckpoint { id, remaining_ttl: 0 };
        let request = LeaseCheckpointRequest {
            checkpoints: vec![checkpoint],
        };
        self.propose_as(Action::LeaseCheckpoint(request), Input::Propose)
            .await?;
        Ok(())
    }

    /// Tells the cluster this member's name and where clients reach it.
    ///
    /// # Errors
    /// Those of any write; to be tried again.
    pub(crate) async fn publish(&self) -> Result<()> {
        let config = &self.shared.config;
        let attributes = MemberAttributes {
            name: config.name.clone(),
            client_urls: config.client_urls.clone(),
        };
        let request = MemberAttributesRequest {
            member_id: self.shared.member_id(),
            attributes: Some(attributes),
        };
        self.propose_as(Action::MemberAttributes(request), Input::Propose)
            .await?;
        Ok(())
    }

    /// Changes the members, wherever the leader is.
    async fn change_members(&self, kind: MemberChangeKind, member: Member) -> Result<MemberList> {
        self.check_trust()?;
        let change = MemberChange {
            kind: kind.into(),
            member: Some(member),
        };
        self.may_change(&change)?;
        match self.ask_leader(Ask::ChangeMembers(change)).await? {
            Answer::Members(members) => Ok(self.member_list(members.members)),
            other => unreachable!("members were asked for, not {other:?}"),
        }
    }

    /// etcd's cluster replies say no revision.
    fn member_list(&self, members: Vec<Member>) -> MemberList {
        MemberList {
            header: self.header_at(0).unwrap_or_default(),
            members,
        }
    }

    /// Asks the leader for what it alone knows of a lease.
    async fn ask_lease(&self, ask: Ask) -> Result<LeaseTime> {
        self.check_trust()?;
        match self.ask_leader(ask).await? {
            Answer::Lease(time) => Ok(time),
            other => unreachable!("a lease was asked for, not {other:?}"),
        }
    }

    /// Returns once the state here is at least as new as everything acknowledged before the call.
    pub(crate) async fn linearize(&self) -> Result<()> {
        self.check_trust()?;
        let shared = &*self.shared;
        // See `Standing::reads_locally`: whatever was acknowledged is applied here.
        if shared.reads_locally.load(Ordering::Acquire) {
            return Ok(());
        }
        let wait = async {
            let id = shared.pending.next_id();
            let ready = shared.pending.enter_read(id)?;
            shared.inputs.push(Input::ReadIndex(id));
            let index = ready.await.unwrap_or(Err(Error::Stopped))?;
            let mut applied = shared.applied.subscribe();
            applied
                .wait_for(|applied| *applied >= index)
                .await
                .map_err(|_| Error::Stopped)?;
            Ok(())
        };
        tokio::time::timeout(shared.config.limits.request_timeout, wait)
            .await
            .unwrap_or(Err(Error::TimeoutWaitAppliedIndex))
    }

    /// Runs a read here and now; if it may take long, other tasks of this thread are taken over by another one.
    fn read<T>(&self, may_take_long: bool, read: impl FnOnce() -> std::result::Result<T, Failure>) -> Result<T> {
        self.check_trust()?;
        let multi_threaded = || {
            tokio::runtime::Handle::try_current()
                .is_ok_and(|handle| handle.runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread)
        };
        let result = if may_take_long && multi_threaded() {
            tokio::task::block_in_place(read)
        } else {
            read()
        };
        result.map_err(|failure| match failure {
            Failure::Refused(error) => error,
            Failure::Engine(error) => {
                tracing::error!(%error, "a read failed");
                Error::Corrupt
            }
        })
    }
}

fn log_stalled_text(stalled: Duration) -> String {
    format!(
        "metastore: the disk of the Raft log has not finished a write for {}s",
        stalled.as_secs()
    )
}

/// Even a range with a small limit walks over all its keys, to count them.
fn may_take_long(request: &RangeRequest) -> bool {
    !matches!(request.span(), Span::Key(_))
}

impl<E: Engine> Store for NodeStore<E> {
    type Watch = Stream<E>;

    fn on_behalf_of(&self, credentials: Credentials) -> Self {
        NodeStore {
            shared: self.shared.clone(),
            credentials,
        }
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        if !request.serializable {
            self.linearize().await?;
        }
        self.shared.metrics.ranges.fetch_add(1, Ordering::Relaxed);
        let mut response = self.read(may_take_long(&request), || self.shared.reader.range(&request))?;
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn scan(&self, request: ScanRequest) -> Result<ScanPage> {
        if !request.serializable {
            self.linearize().await?;
        }
        let long = request.keys_max as i64 > INLINE_KEYS_MAX;
        let mut page = self.read(long, || self.shared.reader.scan(&request))?;
        let mut header = Some(page.header);
        self.complete(&mut header);
        page.header = header.unwrap_or_default();
        Ok(page)
    }

    async fn put(&self, request: PutRequest) -> Result<PutResponse> {
        self.check_space()?;
        let mut response = outcome!(self.propose(Action::Put(request)).await?, Put);
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn delete_range(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse> {
        let mut response = outcome!(self.propose(Action::DeleteRange(request)).await?, DeleteRange);
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn txn(&self, request: TxnRequest) -> Result<TxnResponse> {
        let mut response = if request.is_read_only() {
            if !request.is_serializable() {
                self.linearize().await?;
            }
            self.read(true, || self.shared.reader.txn(&request))?
        } else {
            if request.has_put() {
                self.check_space()?;
            }
            outcome!(self.propose(Action::Txn(request)).await?, Txn)
        };
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse> {
        let CompactionRequest { revision, physical } = request;
        let mut done = self.shared.compacted.subscribe();
        let mut response = outcome!(self.propose(Action::Compact(request)).await?, Compact);
        if physical {
            done.wait_for(|done| *done >= revision)
                .await
                .map_err(|_| Error::Stopped)?;
        }
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn lease_grant(&self, mut request: LeaseGrantRequest) -> Result<LeaseGrantResponse> {
        self.check_space()?;
        // What the log holds must not depend on who applies it, so choices are made here.
        if request.id == 0 {
            request.id = (self.shared.pending.next_id() & i64::MAX as u64) as i64;
        }
        request.ttl = request.ttl.max(self.shared.config.limits.lease_ttl_min_s);
        let mut response = outcome!(self.propose(Action::LeaseGrant(request)).await?, LeaseGrant);
        self.shared.metrics.lease_granted(response.ttl);
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn lease_revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse> {
        let mut response = outcome!(self.propose(Action::LeaseRevoke(request)).await?, LeaseRevoke);
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<LeaseKeepAliveResponse> {
        let header = self.header_at(self.shared.reader.revision());
        let time = self.ask_lease(Ask::KeepAlive(Lease { id })).await?;
        if time.left >= 0 {
            self.shared.metrics.leases_renewed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(LeaseKeepAliveResponse {
            header,
            id,
            ttl: time.left.max(0),
        })
    }

    async fn lease_time_to_live(&self, id: LeaseId, keys: bool) -> Result<LeaseTimeToLiveResponse> {
        let LeaseTime { granted, left } = self.ask_lease(Ask::TimeToLive(Lease { id })).await?;
        let header = self.header_at(self.shared.reader.revision());
        if left < 0 {
            return Ok(LeaseTimeToLiveResponse {
                header,
                id,
                ttl: -1,
                ..Default::default()
            });
        }
        let (granted_ttl, ttl) = (granted, left);
        if keys {
            // The leader has seen every key that was attached before; this member is to have seen them too.
            self.linearize().await?;
        }
        let keys = if keys {
            self.read(true, || self.shared.reader.attached_keys(id))?
        } else {
            Vec::new()
        };
        Ok(LeaseTimeToLiveResponse {
            header,
            id,
            ttl,
            granted_ttl,
            keys,
        })
    }

    async fn lease_leases(&self) -> Result<LeaseLeasesResponse> {
        let header = self.header_at(self.shared.reader.revision());
        let leases = self.shared.lessor.lock().list();
        let leases = leases.into_iter().map(|id| LeaseStatus { id }).collect();
        Ok(LeaseLeasesResponse { header, leases })
    }

    fn watch(&self) -> Stream<E> {
        self.shared.hub.stream()
    }

    async fn members(&self, linearizable: bool) -> Result<MemberList> {
        if linearizable {
            self.linearize().await?;
        }
        Ok(self.member_list(self.shared.reader.membership().members.clone()))
    }

    async fn member_add(&self, mut peer_urls: Vec<String>, is_learner: bool) -> Result<(Member, MemberList)> {
        peer_urls.sort();
        let now_s = std::time::SystemTime::now()
            .duration_since(std::time::SystemTime::UNIX_EPOCH)
            .map_or(0, |time| time.as_secs());
        let member = Member {
            id: identity::added_member_id(&peer_urls, now_s),
            peer_urls,
            is_learner,
            ..Default::default()
        };
        let list = self.change_members(MemberChangeKind::Add, member.clone()).await?;
        Ok((member, list))
    }

    async fn member_remove(&self, id: MemberId) -> Result<MemberList> {
        let member = Member {
            id,
            ..Default::default()
        };
        self.change_members(MemberChangeKind::Remove, member).await
    }

    async fn member_update(&self, id: MemberId, mut peer_urls: Vec<String>) -> Result<MemberList> {
        peer_urls.sort();
        let update = MemberUpdate { id, peer_urls };
        let membership = outcome!(self.propose(Action::MemberUpdate(update)).await?, Members);
        Ok(self.member_list(membership.members.clone()))
    }

    async fn member_promote(&self, id: MemberId) -> Result<MemberList> {
        let member = Member {
            id,
            ..Default::default()
        };
        self.change_members(MemberChangeKind::Promote, member).await
    }

    async fn move_leader(&self, to: MemberId) -> Result<()> {
        let shared = &*self.shared;
        let mut standing = shared.standing.subscribe();
        if standing.borrow().leader != shared.member_id() {
            return Err(Error::NotLeader);
        }
        let membership = shared.reader.membership();
        if membership.get(to).is_none_or(|member| member.is_learner) {
            return Err(Error::BadLeaderTransferee);
        }
        shared.inputs.push(Input::Transfer(to));
        let moved = standing.wait_for(|standing| standing.leader == to);
        match tokio::time::timeout(shared.config.limits.request_timeout, moved).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Stopped),
            Err(_) => Err(Error::TimeoutLeaderTransfer),
        }
    }

    async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        let mut response = if request.action() == AlarmAction::Get {
            let mut alarms = self.status().alarms;
            alarms.retain(|alarm| {
                let (member_id, kind) = match alarm {
                    Alarm::NoSpace(member) => (*member, AlarmType::Nospace),
                    Alarm::Corrupt(member) => (*member, AlarmType::Corrupt),
                };
                (request.member_id == 0 || request.member_id == member_id)
                    && (request.alarm() == AlarmType::None || request.alarm() == kind)
            });
            AlarmResponse {
                header: ResponseHeader::at(self.shared.reader.revision()),
                alarms: alarms.into_iter().map(Alarm::member).collect(),
            }
        } else {
            self.propose_alarm(request).await?
        };
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn hash_kv(&self, revision: Revision) -> Result<HashKv> {
        let hashed = self.read(true, || self.shared.reader.hash_kv(revision))?;
        let header = self.header_at(hashed.header.revision).unwrap_or_default();
        Ok(HashKv { header, ..hashed })
    }

    fn status(&self) -> Status {
        let shared = &*self.shared;
        let standing = shared.standing();
        let raised = shared.reader.alarms();
        let mut alarms: Vec<_> = raised.iter().filter_map(Alarm::of_member).collect();
        let full = Alarm::NoSpace(shared.member_id());
        if shared.disk_full.load(Ordering::Acquire) && !alarms.contains(&full) {
            alarms.push(full);
        }
        let mut errors = Vec::new();
        if standing.leader == 0 {
            errors.push(Error::NoLeader.message().to_owned());
        }
        let log_stalled = shared.log_stalled();
        if let Some(stalled) = log_stalled {
            errors.push(log_stalled_text(stalled));
        }
        for alarm in &alarms {
            errors.push(match alarm {
                Alarm::NoSpace(member) => format!("memberID:{member} alarm:NOSPACE "),
                Alarm::Corrupt(member) => format!("memberID:{member} alarm:CORRUPT "),
            });
        }
        Status {
            header: self.header(),
            db_bytes: shared.db_bytes.load(Ordering::Relaxed),
            db_in_use_bytes: shared.db_live_bytes.load(Ordering::Relaxed),
            db_quota_bytes: shared.db_quota_bytes.load(Ordering::Relaxed),
            leader: standing.leader,
            raft_index: shared.committed.load(Ordering::Relaxed),
            raft_applied_index: shared.reader.applied_index(),
            is_learner: standing.is_learner,
            errors,
            alarms,
            log_stalled,
        }
    }

    fn header(&self) -> ResponseHeader {
        self.header_at(self.shared.reader.revision()).unwrap_or_default()
    }

    fn limits(&self) -> &Limits {
        &self.shared.config.limits
    }
}
