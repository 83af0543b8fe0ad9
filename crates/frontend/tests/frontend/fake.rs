//! A store that keeps its whole history in a list: enough of one for the front ends.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use api::auth::{self, AuthenticateRequest, AuthenticateResponse};
use api::codec::Action;
use api::kv::*;
use api::store::{
    BackupChunk, BackupStream, DatabaseHash, Downgrade, DowngradeStep, Events, HashKv, MemberList, ScanPage,
    ScanRequest, Standing, Status, WatchCreate, WatchCreated, WatchError, WatchOutput, WatchStream,
};
use api::{Credentials, Error, LeaseId, Limits, MemberId, Result, Revision, Span, Store};
use bytes::Bytes;

#[derive(Clone)]
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    /// What puts of keys that begin with "wait" wait for.
    pub(crate) release: Arc<tokio::sync::Notify>,
    /// What transactions wait for that are carried out late.
    pub(crate) release_late: Arc<tokio::sync::Notify>,
    limits: Arc<Limits>,
}

pub(crate) struct State {
    pub(crate) status: Status,
    pub(crate) compacted: Revision,
    /// What the next reads and writes fail with.
    pub(crate) failure: Option<Error>,
    /// What linearizable reads fail with.
    pub(crate) linearizable_failure: Option<Error>,
    /// Member 12, this one, and whoever was added.
    pub(crate) members: Vec<Member>,
    /// The member that was asked to lead.
    pub(crate) moved_to: Option<MemberId>,
    /// The tasks that put last, and that kept a lease alive last.
    pub(crate) put_by: Option<tokio::task::Id>,
    pub(crate) kept_alive_by: Option<tokio::task::Id>,
    /// The alarms that were asked for.
    pub(crate) alarm_requests: Vec<AlarmRequest>,
    /// Writes a key after each page of a scan.
    pub(crate) write_after_scan: bool,
    /// The pages that were asked for.
    pub(crate) scans: Vec<ScanRequest>,
    /// For whom calls were made.
    pub(crate) acted_for: Vec<Credentials>,
    /// Whether somebody who shows nothing is nobody.
    pub(crate) auth_is_on: bool,
    /// The leases that were granted.
    pub(crate) leases: Vec<LeaseId>,
    /// How many outputs watch streams have given away.
    pub(crate) outputs: usize,
    /// So many requests for progress fall on watchers that are still being caught up, and are dropped.
    pub(crate) progress_dropped: usize,
    /// Which transactions are carried out late.
    pub(crate) is_late: fn(&TxnRequest) -> bool,
    revision: Revision,
    log: Vec<(Revision, Arc<Events>)>,
    watchers: Vec<Waker>,
}

impl Fake {
    pub(crate) fn new(limits: Limits) -> Self {
        let header = ResponseHeader {
            cluster_id: 11,
            member_id: 12,
            revision: 1,
            raft_term: 13,
        };
        Fake {
            state: Arc::new(Mutex::new(State {
                put_by: None,
                kept_alive_by: None,
                status: Status {
                    header,
                    leader: 12,
                    db_bytes: 100,
                    db_in_use_bytes: 50,
                    db_quota_bytes: 1000,
                    raft_index: 20,
                    raft_applied_index: 19,
                    ..Default::default()
                },
                compacted: 0,
                failure: None,
                linearizable_failure: None,
                members: vec![Member {
                    id: 12,
                    name: "fake".to_owned(),
                    peer_urls: vec!["http://fake:2380".to_owned()],
                    client_urls: vec!["http://fake:2379".to_owned()],
                    is_learner: false,
                }],
                moved_to: None,
                alarm_requests: Vec::new(),
                write_after_scan: false,
                scans: Vec::new(),
                acted_for: Vec::new(),
                auth_is_on: false,
                leases: Vec::new(),
                outputs: 0,
                progress_dropped: 0,
                is_late: |_| false,
                revision: 1,
                log: Vec::new(),
                watchers: Vec::new(),
            })),
            release: Arc::default(),
            release_late: Arc::default(),
            limits: Arc::new(limits),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics while it holds this")
    }

    /// Puts keys at one revision.
    pub(crate) fn put_all(&self, pairs: impl IntoIterator<Item = (String, Vec<u8>)>) -> Revision {
        self.state().put_all(pairs)
    }

    pub(crate) fn put_one(&self, key: &str, value: &str) -> Revision {
        self.put_all([(key.to_owned(), value.as_bytes().to_vec())])
    }

    /// Knows what the services here send: compares of revisions for equality, and at most one write, in either branch.
    async fn carry_out(&self, request: TxnRequest) -> Result<TxnResponse> {
        let mut responses = Vec::new();
        let now = self.state().check(0)?;
        let holds = |compare: &Compare| {
            let found = self.state().read(Span::Key(&compare.key), now);
            let (created, modified) = found.first().map_or((0, 0), |kv| (kv.create_revision, kv.mod_revision));
            match compare.target_union {
                Some(TargetUnion::CreateRevision(revision)) => revision == created,
                Some(TargetUnion::ModRevision(revision)) => revision == modified,
                _ => false,
            }
        };
        let succeeded = request.compare.iter().all(holds);
        for op in if succeeded { request.success } else { request.failure } {
            let response = match op.request.expect("no operation is empty") {
                RequestOpKind::Put(put) if put.lease != 0 && !self.state().leases.contains(&put.lease) => {
                    return Err(Error::LeaseNotFound);
                }
                RequestOpKind::Put(put) => ResponseOpKind::Put(self.put(put).await?),
                RequestOpKind::DeleteRange(delete) => ResponseOpKind::DeleteRange(self.delete_range(delete).await?),
                RequestOpKind::Range(range) => {
                    let state = self.state();
                    ResponseOpKind::Range(state.range(&range, state.revision))
                }
                RequestOpKind::Txn(_) => unreachable!("no service nests them"),
            };
            responses.push(ResponseOp {
                response: Some(response),
            });
        }
        Ok(TxnResponse {
            header: Some(self.header()),
            succeeded,
            responses,
        })
    }

    pub(crate) fn delete(&self, key: &str) -> Revision {
        let mut state = self.state();
        let mod_revision = state.revision + 1;
        let event = Event {
            r#type: EventType::Delete.into(),
            kv: Some(KeyValue {
                key: key.to_owned().into(),
                mod_revision,
                ..Default::default()
            }),
            prev_kv: None,
        };
        state.append(vec![event])
    }
}

/// Whether a transaction is to delete something.
pub(crate) fn deletes(request: &TxnRequest) -> bool {
    let deletes = |op: &RequestOp| matches!(op.request, Some(RequestOpKind::DeleteRange(_)));
    request.success.iter().any(deletes)
}

impl State {
    fn append(&mut self, events: Vec<Event>) -> Revision {
        self.revision += 1;
        self.log.push((self.revision, Events::new(events)));
        for waker in self.watchers.drain(..) {
            waker.wake();
        }
        self.revision
    }

    fn put_all(&mut self, pairs: impl IntoIterator<Item = (String, Vec<u8>)>) -> Revision {
        let revision = self.revision + 1;
        let event = |(key, value): (String, Vec<u8>)| {
            let before = self.read(Span::Key(key.as_bytes()), self.revision).pop();
            Event {
                r#type: EventType::Put.into(),
                kv: Some(KeyValue {
                    key: key.into(),
                    create_revision: before.as_ref().map_or(revision, |kv| kv.create_revision),
                    mod_revision: revision,
                    version: before.as_ref().map_or(1, |kv| kv.version + 1),
                    value: value.into(),
                    lease: 0,
                }),
                prev_kv: None,
            }
        };
        let events = pairs.into_iter().map(event).collect();
        self.append(events)
    }

    fn range(&self, request: &RangeRequest, revision: Revision) -> RangeResponse {
        let mut kvs = self.read(request.span(), revision);
        let count = i64::try_from(kvs.len()).expect("few");
        if request.max_create_revision > 0 {
            kvs.retain(|kv| kv.create_revision <= request.max_create_revision);
        }
        if request.sort_target == SortTarget::Create as i32 {
            kvs.sort_by_key(|kv| kv.create_revision);
        }
        if request.sort_order == SortOrder::Descend as i32 {
            kvs.reverse();
        }
        if request.limit > 0 {
            kvs.truncate(usize::try_from(request.limit).expect("few"));
        }
        if request.count_only {
            kvs.clear();
        }
        RangeResponse {
            header: Some(self.header()),
            kvs,
            more: false,
            count,
        }
    }

    pub(crate) fn header(&self) -> ResponseHeader {
        ResponseHeader {
            revision: self.revision,
            ..self.status.header
        }
    }

    fn member_list(&self) -> Result<MemberList> {
        self.check(0)?;
        Ok(MemberList {
            header: self.header(),
            members: self.members.clone(),
        })
    }

    fn member(&mut self, id: MemberId) -> Result<&mut Member> {
        self.check(0)?;
        let found = self.members.iter_mut().find(|member| member.id == id);
        found.ok_or(Error::MemberNotFound)
    }

    fn check(&self, revision: Revision) -> Result<Revision> {
        match self.failure {
            Some(error) => Err(error),
            None if revision > self.revision => Err(Error::FutureRevision),
            None if revision <= 0 => Ok(self.revision),
            None if revision < self.compacted => Err(Error::Compacted),
            None => Ok(revision),
        }
    }

    fn read(&self, span: Span<'_>, revision: Revision) -> Vec<KeyValue> {
        let mut keys = BTreeMap::new();
        for event in self
            .log
            .iter()
            .filter(|(at, _)| *at <= revision)
            .flat_map(|(_, events)| events.iter())
        {
            let kv = event.kv.clone().expect("every event has one");
            if event.r#type() == EventType::Put {
                keys.insert(kv.key.clone(), kv);
            } else {
                keys.remove(&kv.key);
            }
        }
        keys.into_values().filter(|kv| span.contains(&kv.key)).collect()
    }
}

impl Store for Fake {
    type Watch = FakeWatch;
    type Backup = FakeBackup;

    fn on_behalf_of(&self, credentials: Credentials) -> Self {
        self.state().acted_for.push(credentials);
        self.clone()
    }

    async fn on_behalf_of_user(&self, _: AuthenticateRequest) -> Result<Self> {
        Ok(self.clone())
    }

    fn on_behalf_of_member(&self) -> Self {
        self.clone()
    }

    async fn check_user(&self) -> Result<()> {
        match self.state().auth_is_on {
            true => Err(Error::UserEmpty),
            false => Ok(()),
        }
    }

    async fn check_admin(&self) -> Result<()> {
        Ok(())
    }

    async fn authenticate(&self, _: AuthenticateRequest) -> Result<AuthenticateResponse> {
        Err(Error::AuthNotEnabled)
    }

    /// Knows no users or roles.
    async fn auth<R: auth::Request>(&self, request: R) -> Result<R::Response> {
        match request.into_action() {
            Action::AuthStatus(_) => {
                let response = auth::AuthStatusResponse {
                    header: Some(self.header()),
                    enabled: false,
                    auth_revision: auth::FIRST_AUTH_REVISION,
                };
                Ok(R::response(auth::Answer::AuthStatus(response)).expect("it was asked for"))
            }
            _ => Err(Error::UserNotFound),
        }
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        if &*request.key == b"panic" {
            panic!("asked for");
        }
        let state = self.state();
        let revision = state.check(request.revision)?;
        if let Some(error) = state.linearizable_failure.filter(|_| !request.serializable) {
            return Err(error);
        }
        Ok(state.range(&request, revision))
    }

    async fn scan(&self, request: ScanRequest) -> Result<ScanPage> {
        let mut state = self.state();
        let revision = state.check(request.revision)?;
        let mut kvs = state.read(Span::new(&request.key, &request.range_end), revision);
        let mut bytes = 0;
        let fits = |kv: &&KeyValue| {
            let fits = bytes < request.bytes_max;
            bytes += kv.key.len() + kv.value.len();
            fits
        };
        let kept = kvs.iter().take(request.keys_max).take_while(fits).count();
        let more = kept < kvs.len();
        kvs.truncate(kept);
        if request.keys_only {
            for kv in &mut kvs {
                kv.value = Bytes::new();
            }
        }
        let header = state.header();
        state.scans.push(request);
        if state.write_after_scan {
            let revision = state.revision;
            state.put_all([(format!("key{revision}-new"), Vec::new())]);
        }
        Ok(ScanPage {
            revision,
            header,
            kvs,
            more,
        })
    }

    async fn put(&self, request: PutRequest) -> Result<PutResponse> {
        if request.key.starts_with(b"wait") {
            self.release.notified().await;
        }
        let mut state = self.state();
        let now = state.check(0)?;
        state.put_by = tokio::task::try_id();
        let value = match request.ignore_value {
            true => {
                state
                    .read(Span::Key(&request.key), now)
                    .pop()
                    .ok_or(Error::KeyNotFound)?
                    .value
            }
            false => request.value,
        };
        let key = String::from_utf8(request.key.to_vec()).expect("tests use text for keys");
        state.put_all([(key, value.to_vec())]);
        Ok(PutResponse {
            header: Some(state.header()),
            prev_kv: None,
        })
    }

    async fn delete_range(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse> {
        let mut state = self.state();
        let revision = state.check(0)?;
        let found = state.read(Span::new(&request.key, &request.range_end), revision);
        let deleted = i64::try_from(found.len()).expect("few");
        let mod_revision = revision + 1;
        let gone = |kv: KeyValue| Event {
            r#type: EventType::Delete.into(),
            kv: Some(KeyValue {
                key: kv.key,
                mod_revision,
                ..Default::default()
            }),
            prev_kv: None,
        };
        if deleted > 0 {
            state.append(found.into_iter().map(gone).collect());
        }
        Ok(DeleteRangeResponse {
            header: Some(state.header()),
            deleted,
            prev_kvs: Vec::new(),
        })
    }

    /// Others get their turn before it.
    async fn txn(&self, request: TxnRequest) -> Result<TxnResponse> {
        tokio::task::yield_now().await;
        let is_late = self.state().is_late;
        if !is_late(&request) {
            return self.carry_out(request).await;
        }
        // Whether or not somebody waits for what it comes to.
        let store = self.clone();
        let late = tokio::spawn(async move {
            store.release_late.notified().await;
            store.carry_out(request).await
        });
        late.await.expect("it does not panic")
    }

    async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse> {
        let mut state = self.state();
        state.compacted = state.check(request.revision)?;
        Ok(CompactionResponse {
            header: Some(state.header()),
        })
    }

    async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<LeaseGrantResponse> {
        let mut state = self.state();
        state.check(0)?;
        let chosen = 0xbeef + i64::try_from(state.leases.len()).expect("few");
        let id = if request.id == 0 { chosen } else { request.id };
        state.leases.push(id);
        Ok(LeaseGrantResponse {
            header: Some(state.header()),
            id,
            ttl: request.ttl,
            error: String::new(),
        })
    }

    /// Knows of no keys that go with it.
    async fn lease_revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse> {
        let mut state = self.state();
        state.check(0)?;
        let at = state.leases.iter().position(|lease| *lease == request.id);
        state.leases.remove(at.ok_or(Error::LeaseNotFound)?);
        Ok(LeaseRevokeResponse {
            header: Some(state.header()),
        })
    }

    /// Answers with an hour for even ids, after letting others run, but for ids from 1,000 on. Panics for 666.
    async fn lease_keep_alive(&self, id: LeaseId) -> Result<LeaseKeepAliveResponse> {
        assert_ne!(id, 666, "asked for");
        self.state().kept_alive_by = tokio::task::try_id();
        if id < 1000 {
            tokio::task::yield_now().await;
        }
        let state = self.state();
        state.check(0)?;
        Ok(LeaseKeepAliveResponse {
            header: Some(state.header()),
            id,
            ttl: if id % 2 == 0 { 3600 } else { 0 },
        })
    }

    async fn lease_time_to_live(&self, id: LeaseId, _: bool) -> Result<LeaseTimeToLiveResponse> {
        let state = self.state();
        Ok(LeaseTimeToLiveResponse {
            header: Some(state.header()),
            id,
            ttl: if state.leases.contains(&id) { 60 } else { -1 },
            ..Default::default()
        })
    }

    async fn lease_leases(&self) -> Result<LeaseLeasesResponse> {
        Ok(LeaseLeasesResponse {
            header: Some(self.header()),
            leases: vec![LeaseStatus { id: 5 }],
        })
    }

    async fn watch(&self) -> FakeWatch {
        FakeWatch {
            store: self.clone(),
            watchers: Vec::new(),
            progress: Vec::new(),
        }
    }

    async fn members(&self, _: bool) -> Result<MemberList> {
        self.state().member_list()
    }

    async fn member_add(&self, peer_urls: Vec<String>, is_learner: bool) -> Result<(Member, MemberList)> {
        let mut state = self.state();
        state.check(0)?;
        let member = Member {
            id: state.members.last().map_or(0, |last| last.id) + 1,
            name: "not to be told yet".to_owned(),
            peer_urls,
            is_learner,
            ..Default::default()
        };
        state.members.push(member.clone());
        Ok((member, state.member_list()?))
    }

    async fn member_remove(&self, id: MemberId) -> Result<MemberList> {
        let mut state = self.state();
        state.member(id)?;
        state.members.retain(|member| member.id != id);
        state.member_list()
    }

    async fn member_update(&self, id: MemberId, peer_urls: Vec<String>) -> Result<MemberList> {
        let mut state = self.state();
        state.member(id)?.peer_urls = peer_urls;
        state.member_list()
    }

    async fn member_promote(&self, id: MemberId) -> Result<MemberList> {
        let mut state = self.state();
        let member = state.member(id)?;
        if !member.is_learner {
            return Err(Error::MemberNotLearner);
        }
        member.is_learner = false;
        state.member_list()
    }

    async fn move_leader(&self, to: MemberId) -> Result<()> {
        let mut state = self.state();
        state.check(0)?;
        state.moved_to = Some(to);
        Ok(())
    }

    async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        let mut state = self.state();
        state.check(0)?;
        state.alarm_requests.push(request);
        Ok(AlarmResponse {
            header: Some(state.header()),
            alarms: vec![AlarmMember {
                member_id: request.member_id,
                alarm: request.alarm,
            }],
        })
    }

    async fn hash_kv(&self, revision: Revision) -> Result<HashKv> {
        let state = self.state();
        Ok(HashKv {
            hash_revision: state.check(revision)?,
            header: state.header(),
            hash: 0xfeed_beef,
            compact_revision: -1,
        })
    }

    async fn hash(&self) -> Result<DatabaseHash> {
        let state = self.state();
        state.check(0)?;
        let header = state.header();
        Ok(DatabaseHash { header, hash: 77 })
    }

    async fn backup(&self) -> Result<FakeBackup> {
        self.state().check(0)?;
        Ok(FakeBackup { remaining: 3 })
    }

    async fn defragment(&self) -> Result<()> {
        self.state().check(0).map(drop)
    }

    async fn downgrade(&self, step: DowngradeStep) -> Result<Downgrade> {
        let mut state = self.state();
        state.check(0)?;
        match step {
            DowngradeStep::Validate(version) if version != "3.6.0" => return Err(Error::InvalidDowngradeTargetVersion),
            DowngradeStep::Validate(_) => {}
            DowngradeStep::Enable(version) => state.status.downgrade_target = Some(version),
            DowngradeStep::Cancel => state.status.downgrade_target = None,
        }
        Ok(Downgrade {
            header: state.header(),
            version: "3.7".to_owned(),
        })
    }

    fn status(&self) -> Status {
        self.state().status.clone()
    }

    fn standing(&self) -> Standing {
        let Status { leader, is_learner, .. } = self.state().status;
        Standing { leader, is_learner }
    }

    fn header(&self) -> ResponseHeader {
        self.state().header()
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }
}

struct Watcher {
    id: i64,
    wanted: WatchCreate,
    next: Revision,
    busy: bool,
}

pub(crate) struct FakeWatch {
    store: Fake,
    watchers: Vec<Watcher>,
    progress: Vec<i64>,
}

impl WatchStream for FakeWatch {
    fn create(&mut self, create: WatchCreate) -> std::result::Result<WatchCreated, WatchError> {
        let taken = |id| self.watchers.iter().any(|watcher| watcher.id == id);
        if create.start_revision < 0 {
            return Err(WatchError::NegativeRevision);
        }
        if matches!(Span::new(&create.key, &create.range_end), Span::Range(key, end) if key >= end) {
            return Err(WatchError::EmptyRange);
        }
        let id = match create.id {
            Some(id) if taken(id) => return Err(WatchError::DuplicateId),
            Some(id) => id,
            None => (0..).find(|&id| !taken(id)).expect("few"),
        };
        let revision = self.store.header().revision;
        let next = match create.start_revision {
            0 => revision + 1,
            start => start,
        };
        self.watchers.push(Watcher {
            id,
            wanted: create,
            next,
            busy: false,
        });
        Ok(WatchCreated { watch_id: id, revision })
    }

    fn cancel(&mut self, watch_id: i64) -> bool {
        let before = self.watchers.len();
        self.watchers.retain(|watcher| watcher.id != watch_id);
        self.watchers.len() < before
    }

    fn request_progress(&mut self) {
        let left = &mut self
            .store
            .state
            .lock()
            .expect("no test panics while it holds this")
            .progress_dropped;
        if *left > 0 {
            *left -= 1;
        } else if !self.watchers.is_empty() {
            self.progress.push(-1);
        }
    }

    fn notify_progress(&mut self) {
        for watcher in &mut self.watchers {
            if watcher.wanted.progress_notify && !watcher.busy {
                self.progress.push(watcher.id);
            }
            watcher.busy = false;
        }
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<WatchOutput> {
        let mut state = self.store.state.lock().expect("no test panics while it holds this");
        let compact_revision = state.compacted;
        if let Some(index) = self.watchers.iter().position(|watcher| watcher.next < compact_revision) {
            let watch_id = self.watchers.remove(index).id;
            return Poll::Ready(WatchOutput::Compacted {
                watch_id,
                compact_revision,
            });
        }
        for watcher in &mut self.watchers {
            let span = Span::new(&watcher.wanted.key, &watcher.wanted.range_end);
            let wanted = |event: &&Event| {
                let put = event.r#type() == EventType::Put;
                let filtered = if put {
                    watcher.wanted.no_put
                } else {
                    watcher.wanted.no_delete
                };
                !filtered && event.kv.as_ref().is_some_and(|kv| span.contains(&kv.key))
            };
            let next = watcher.next;
            let missed = state.log.iter().filter(|(at, _)| *at >= next);
            for (revision, events) in missed {
                watcher.next = revision + 1;
                let events: Vec<Event> = events.iter().filter(wanted).cloned().collect();
                if !events.is_empty() {
                    watcher.busy = true;
                    let output = WatchOutput::Events {
                        watch_id: watcher.id,
                        revision: *revision,
                        events: Events::new(events),
                    };
                    state.outputs += 1;
                    return Poll::Ready(output);
                }
            }
        }
        if let Some(watch_id) = self.progress.pop() {
            return Poll::Ready(WatchOutput::Progress {
                watch_id,
                revision: state.revision,
            });
        }
        state.watchers.push(context.waker().clone());
        Poll::Pending
    }
}

/// Three chunks of a file and its hash, and then an end.
pub(crate) struct FakeBackup {
    remaining: u64,
}

impl BackupStream for FakeBackup {
    fn poll_next(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<BackupChunk>>> {
        let Some(remaining_bytes) = self.remaining.checked_sub(1) else {
            return Poll::Ready(None);
        };
        self.remaining = remaining_bytes;
        let bytes = vec![remaining_bytes as u8; 2].into();
        Poll::Ready(Some(Ok(BackupChunk { bytes, remaining_bytes })))
    }
}
