//! [`api::Store`] over a running node.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use api::auth::{self, AuthenticateRequest, AuthenticateResponse, InternalAuthenticateRequest};
use api::codec::{
    Action, DowngradeInfo, LeaseCheckpoint, LeaseCheckpointRequest, MemberAttributes, MemberAttributesRequest,
    MemberChange, MemberChangeKind, MemberUpdate, Operation, encode_operation,
};
use api::kv::{
    AlarmAction, AlarmRequest, AlarmResponse, AlarmType, CompactionRequest, CompactionResponse, DeleteRangeRequest,
    DeleteRangeResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseLeasesResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveResponse, Member, PutRequest, PutResponse,
    RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse,
};
use api::limits::ETCD_CLUSTER_VERSION;
use api::store::{
    Alarm, DatabaseHash, Downgrade, DowngradeStep, EncodedRange, HashKv, MemberList, ScanPage, ScanRequest, Standing,
    Status, WatchCreate, WatchCreated, WatchError, WatchOutput, WatchStream,
};
use api::{Credentials, Error, LeaseId, Limits, MemberId, RaftIndex, Result, Revision, Span, Store};
use mvcc::auth::{Need, Right, txn_needs};
use mvcc::{Auth, Caller, Failure, Membership, Outcome, Stream};
use replica::{Input, Proposal};
use storage::{Engine, KeyRange};
use tokio::sync::OwnedSemaphorePermit;

use crate::auth::{Issuer, Who};
use crate::backup::{self, Backup};
use crate::calls::{Answer, Ask, Lease, LeaseTime};
use crate::identity;
use crate::node::Shared;
use crate::quota;

/// Ranges that may return more keys than this leave the async thread to others while they run.
const INLINE_KEYS_MAX: i64 = 500;

/// How often a password is checked again because users or roles changed meanwhile.
const AUTHENTICATIONS_MAX: usize = 16;

/// How often watchers of a member that is shut off look whether it still is.
const SHUT_OFF_PAUSE: Duration = Duration::from_secs(1);

/// The store that a node serves. A cheap handle.
pub struct NodeStore<E: Engine> {
    shared: Arc<Shared<E>>,
    client: Client,
}

/// On whose behalf a handle acts.
#[derive(Clone)]
enum Client {
    /// Whoever this shows, at each call anew.
    Shown(Credentials),
    /// A user whose password was checked; it is kept to be checked again when users or roles have changed.
    Verified(Arc<AuthenticateRequest>, Who),
    /// The member itself.
    Member,
}

impl<E: Engine> Clone for NodeStore<E> {
    fn clone(&self) -> Self {
        NodeStore {
            shared: self.shared.clone(),
            client: self.client.clone(),
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
            client: Client::Shown(Credentials::default()),
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

    /// Refuses what would fill the disk or the quota further; `cost` is about what it adds, in bytes.
    async fn check_space(&self, cost: u64) -> Result<()> {
        self.check_trust()?;
        let shared = &*self.shared;
        if shared.disk_full.load(Ordering::Acquire) {
            return Err(Error::NoSpace);
        }
        let quota = shared.config.quota_bytes;
        // What is on its way counts as well, so that many clients at once do not fill it far beyond.
        if quota == 0 || shared.reader.data_bytes() + shared.pending.len().1 as u64 + cost < quota {
            return Ok(());
        }
        Box::pin(self.raise_full_alarm()).await;
        Err(Error::NoSpace)
    }

    /// Tells the cluster that this member is full, unless it knows.
    async fn raise_full_alarm(&self) {
        let shared = &self.shared;
        if shared.has_full_alarm() || shared.raising_alarm.swap(true, Ordering::AcqRel) {
            return;
        }
        let request = AlarmRequest {
            action: AlarmAction::Activate.into(),
            member_id: shared.member_id(),
            alarm: AlarmType::Nospace.into(),
        };
        tracing::warn!(
            data_bytes = shared.reader.data_bytes(),
            quota_bytes = shared.config.quota_bytes,
            "the store is as large as it may be: writes are refused until it is compacted and the alarm is ended"
        );
        // On a task of its own: the client may go away meanwhile.
        let store = self.clone();
        let raised = tokio::spawn(async move {
            if let Err(error) = store.propose_alarm(request).await {
                tracing::warn!(%error, "the alarm was not raised; the next write that does not fit tries again");
            }
            store.shared.raising_alarm.store(false, Ordering::Release);
        });
        let _ = raised.await;
    }

    /// A place among the few backups that there may be at a time.
    fn backup_permit(&self) -> Result<OwnedSemaphorePermit> {
        let backups = self.shared.backups.clone();
        backups.try_acquire_owned().map_err(|_| Error::TooManyRequests)
    }

    /// Who the client is, as far as this member knows; `None` where auth is off.
    fn who_now(&self) -> Result<Option<Who>> {
        let shared = &*self.shared;
        if matches!(self.client, Client::Member) {
            // Whether or not auth is on: it may be when this is carried out.
            return Ok(Some(Who {
                name: Caller::MEMBER.name.into(),
                revision: shared.reader.auth().revision(),
            }));
        }
        if !shared.reader.is_auth_enabled() {
            return Ok(None);
        }
        // Before the token is looked up: should it be lost then, what it was used for is seen to be old.
        let revision = shared.reader.auth().revision();
        match &self.client {
            Client::Verified(_, who) => Ok(Some(who.clone())),
            Client::Shown(Credentials { token: Some(token), .. }) => shared.gate.who(token, revision).map(Some),
            Client::Shown(Credentials {
                common_name: Some(name),
                ..
            }) if !name.is_empty() => Ok(Some(Who {
                name: name.clone(),
                revision,
            })),
            Client::Shown(_) | Client::Member => Ok(Some(Who::nobody())),
        }
    }

    /// Who the client is; `None` where auth is off.
    async fn who(&self) -> Result<Option<Who>> {
        if matches!(self.client, Client::Member) {
            return self.who_now();
        }
        if !self.shared.reader.is_auth_enabled() {
            return Ok(None);
        }
        if let Client::Verified(user, who) = &self.client
            && who.revision != self.shared.reader.auth().revision()
        {
            return match Box::pin(self.verified(user)).await {
                Err(Error::AuthNotEnabled) => Ok(None),
                who => who.map(Some),
            };
        }
        // Before the look: an entry that is applied between the two is one to look for again.
        let applied = *self.shared.applied.borrow();
        match self.who_now() {
            Err(Error::InvalidAuthToken) if self.may_know_after(applied) => {
                // Whoever gave the token out had applied its entry, and after this so has this member. Boxed, so that
                // every other call is smaller: its future is moved a few times before it is first looked at.
                Box::pin(self.linearize()).await?;
                self.who_now()
            }
            who => who,
        }
    }

    /// Whether the client's token may be from a log entry after this one.
    fn may_know_after(&self, applied: RaftIndex) -> bool {
        let Client::Shown(Credentials { token: Some(token), .. }) = &self.client else {
            return false;
        };
        self.shared.gate.entry_of(token).is_some_and(|entry| entry > applied)
    }

    /// Lets nobody in particular do what only needs somebody.
    async fn require_user(&self) -> Result<()> {
        if self.shared.reader.is_auth_enabled() {
            Store::check_user(self).await
        } else {
            Ok(())
        }
    }

    async fn require_admin(&self) -> Result<()> {
        if self.shared.reader.is_auth_enabled() {
            Store::check_admin(self).await
        } else {
            Ok(())
        }
    }

    /// Who a user is whose password is right. A member that is behind may not know the user, or the password, yet.
    async fn verified(&self, user: &AuthenticateRequest) -> Result<Who> {
        let seen = self.shared.reader.auth().revision();
        let revision = match self.check_password(user).await {
            Err(error @ (Error::AuthFailed | Error::NoPasswordUser)) => {
                let is_new = Box::pin(self.linearize()).await.is_ok() && self.shared.reader.auth().revision() != seen;
                if !is_new {
                    return Err(error);
                }
                self.check_password(user).await?
            }
            checked => checked?,
        };
        Ok(Who {
            name: user.name.as_str().into(),
            revision,
        })
    }

    /// Checks a user's password. Returns the auth revision of then.
    async fn check_password(&self, user: &AuthenticateRequest) -> Result<u64> {
        let (stored, revision) = {
            let auth = self.shared.reader.auth();
            if !auth.is_enabled() {
                return Err(Error::AuthNotEnabled);
            }
            let known = auth.user(&user.name).ok_or(Error::AuthFailed)?;
            if known.has_no_password() {
                return Err(Error::NoPasswordUser);
            }
            (known.password.clone(), auth.revision())
        };
        let passwords = &self.shared.gate.passwords;
        if passwords.is_right(&user.name, &stored, user.password.clone()).await? {
            Ok(revision)
        } else {
            tracing::warn!(user = user.name, "a login with a wrong password");
            Err(Error::AuthFailed)
        }
    }

    /// Puts the hash of a password in the place of the password.
    async fn with_hash(&self, mut action: Action) -> Result<Action> {
        match &mut action {
            Action::AuthUserAdd(request) => {
                // What is slow is not done for just anybody.
                self.require_admin().await?;
                let password = std::mem::take(&mut request.password);
                let needs_none = request.options.as_ref().is_some_and(|options| options.no_password);
                request.hashed_password = if needs_none {
                    String::new()
                } else {
                    self.shared.gate.passwords.hash(password).await?
                };
            }
            Action::AuthUserChangePassword(request) => {
                self.require_admin().await?;
                let password = std::mem::take(&mut request.password);
                if !password.is_empty() {
                    request.hashed_password = self.shared.gate.passwords.hash(password).await?;
                }
            }
            _ => {}
        }
        Ok(action)
    }

    /// Reads what the client may read. `permit` says whether it may, by the users and roles before the read; they must be
    /// the same after it, since what was read may be newer than a permission that was taken.
    async fn read_permitted<T>(
        &self,
        may_take_long: bool,
        permit: impl FnOnce(&Auth, Caller<'_>) -> std::result::Result<(), Failure>,
        read: impl FnOnce() -> std::result::Result<T, Failure>,
    ) -> Result<T> {
        let reader = &self.shared.reader;
        if !reader.is_auth_enabled() {
            let result = self.read(may_take_long, read)?;
            return match reader.is_auth_enabled() {
                true => Err(Error::AuthOldRevision),
                false => Ok(result),
            };
        }
        let who = self.who().await?;
        let mut revision = 0;
        if let Some(who) = &who {
            let auth = reader.auth();
            self.answered(permit(&auth, who.caller()))?;
            revision = who.revision;
        }
        let result = self.read(may_take_long, read)?;
        if revision != 0 && revision != reader.auth().revision() {
            return Err(Error::AuthOldRevision);
        }
        Ok(result)
    }

    /// Whether the client may read (or write) all keys attached to some leases. Returns the auth revision by which it may;
    /// `None` where auth is off.
    ///
    /// # Errors
    /// Also where users or roles change meanwhile.
    async fn permit_attached(&self, leases: impl IntoIterator<Item = LeaseId>, right: Right) -> Result<Option<u64>> {
        let Some(who) = self.who().await? else {
            return Ok(None);
        };
        if who.is_nobody() {
            return Err(Error::UserEmpty);
        }
        let reader = &self.shared.reader;
        let auth = Arc::clone(&reader.auth());
        // Such as root's is answered without a look at keys.
        let may_take_long = auth.has_limits(who.caller(), right);
        self.read(may_take_long, || {
            leases
                .into_iter()
                .try_for_each(|lease| reader.permit_attached(&auth, who.caller(), right, lease))
        })?;
        if reader.auth().revision() != auth.revision() {
            return Err(Error::AuthOldRevision);
        }
        Ok(Some(auth.revision()))
    }

    /// Puts a client's operation into the log and waits for what it comes to.
    async fn propose(&self, action: Action) -> Result<Outcome> {
        self.check_trust()?;
        let who = self.who().await?;
        self.propose_as(who, action, Input::Propose).await
    }

    /// Puts an operation into the log, on behalf of a user if it is a client's, and waits for what it comes to.
    async fn propose_as(
        &self,
        who: Option<Who>,
        action: Action,
        input: impl FnOnce(Proposal) -> Input,
    ) -> Result<Outcome> {
        let shared = &*self.shared;
        let id = shared.pending.next_id();
        let operation = match who {
            Some(who) if !who.is_nobody() => Operation::of_user(id, who.name.as_ref().to_owned(), who.revision, action),
            _ => Operation::new(id, action),
        };
        let operation = encode_operation(&operation);
        if operation.len() > shared.config.limits.request_bytes_max {
            return Err(Error::RequestTooLarge);
        }
        let due = Instant::now() + shared.config.limits.request_timeout;
        let mut place = shared.pending.enter(id, operation.len(), due)?;
        shared.work.proposal(input(Proposal {
            id,
            operation,
            leader_term: 0,
        }));
        place.outcome().await
    }

    /// Proposes a change of members, as the leader, and waits until it is applied.
    pub(crate) async fn propose_member_change(&self, change: MemberChange) -> Result<Arc<Membership>> {
        let action = Action::MemberChange(change.clone());
        let outcome = self
            .propose_as(None, action, |proposal| Input::ProposeMemberChange(proposal, change))
            .await?;
        Ok(outcome!(outcome, Members))
    }

    /// Raises or ends an alarm.
    pub(crate) async fn propose_alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        let outcome = self.propose_as(None, Action::Alarm(request), Input::Propose).await?;
        Ok(outcome!(outcome, Alarm))
    }

    /// Forgets history as the leader of this term sees fit.
    pub(crate) async fn compact_by_itself(&self, revision: Revision) -> Result<()> {
        let request = CompactionRequest {
            revision,
            physical: false,
        };
        match self.propose_as(None, Action::Compact(request), Input::Propose).await {
            Ok(_) | Err(Error::Compacted) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes back what the log says of how little time a lease has left.
    pub(crate) async fn take_checkpoint_back(&self, id: LeaseId) -> Result<()> {
        let checkpoint = LeaseCheckpoint { id, remaining_ttl: 0 };
        let request = LeaseCheckpointRequest {
            checkpoints: vec![checkpoint],
        };
        self.propose_as(None, Action::LeaseCheckpoint(request), Input::Propose)
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
        self.propose_as(None, Action::MemberAttributes(request), Input::Propose)
            .await?;
        Ok(())
    }

    /// Changes the members, wherever the leader is.
    async fn change_members(&self, kind: MemberChangeKind, member: Member) -> Result<MemberList> {
        self.check_trust()?;
        self.require_admin().await?;
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
        self.wait_until_applied().await
    }

    /// Waits until everything is applied here that was acknowledged before, whether or not this member's state is to be
    /// trusted.
    async fn wait_until_applied(&self) -> Result<()> {
        let shared = &*self.shared;
        // See `Standing::reads_locally`: whatever was acknowledged is applied here.
        if shared.reads_locally.load(Ordering::Acquire) {
            return Ok(());
        }
        let begun = Instant::now();
        let wait = async {
            let id = shared.pending.next_id();
            let ready = shared.pending.enter_read(id)?;
            shared.work.input(Input::ReadIndex(id));
            let index = ready.await.unwrap_or(Err(Error::Stopped));
            shared.metrics.read_indexed(index.is_ok(), begun.elapsed());
            let index = index?;
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
        let result = if may_take_long {
            self.shared.metrics.reads_open.fetch_add(1, Ordering::Relaxed);
            let result = if multi_threaded() {
                tokio::task::block_in_place(read)
            } else {
                read()
            };
            self.shared.metrics.reads_open.fetch_sub(1, Ordering::Relaxed);
            result
        } else {
            read()
        };
        self.answered(result)
    }

    fn answered<T>(&self, result: std::result::Result<T, Failure>) -> Result<T> {
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

/// Major and minor of a version that a client names: `3.6` and `3.6.4` alike.
fn cluster_version(text: &str) -> Result<(u64, u64)> {
    // As strict as the library that etcd reads versions with: numbers without zeros before them, and after the third one
    // maybe what kind of release it is.
    let (core, _) = text.split_at(text.find(['-', '+']).unwrap_or(text.len()));
    let numbers: Option<Vec<u64>> = core
        .split('.')
        .map(|number| {
            let plain = number.bytes().all(|byte| byte.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
            number.parse().ok().filter(|_| plain)
        })
        .collect();
    match numbers.as_deref() {
        Some([major, minor]) if core.len() == text.len() => Ok((*major, *minor)),
        Some([major, minor, _]) => Ok((*major, *minor)),
        _ => Err(Error::WrongDowngradeVersionFormat),
    }
}

/// Even a range with a small limit walks over all its keys, to count them.
fn may_take_long(request: &RangeRequest) -> bool {
    !matches!(request.span(), Span::Key(_))
}

impl<E: Engine> Store for NodeStore<E> {
    type Watch = ClientWatch<E>;
    type Backup = Backup;

    fn on_behalf_of(&self, credentials: Credentials) -> Self {
        NodeStore {
            shared: self.shared.clone(),
            client: Client::Shown(credentials),
        }
    }

    async fn on_behalf_of_user(&self, user: AuthenticateRequest) -> Result<Self> {
        // Where auth is off, as far as this member knows: the password is looked at once it is not.
        let unchecked = || Who {
            name: user.name.as_str().into(),
            revision: 0,
        };
        let who = match self.shared.reader.is_auth_enabled() {
            true => match self.verified(&user).await {
                Err(Error::AuthNotEnabled) => unchecked(),
                who => who?,
            },
            false => unchecked(),
        };
        Ok(NodeStore {
            shared: self.shared.clone(),
            client: Client::Verified(Arc::new(user), who),
        })
    }

    fn on_behalf_of_member(&self) -> Self {
        NodeStore {
            shared: self.shared.clone(),
            client: Client::Member,
        }
    }

    async fn check_user(&self) -> Result<()> {
        match self.who().await? {
            Some(who) if who.is_nobody() => Err(Error::UserEmpty),
            _ => Ok(()),
        }
    }

    async fn check_admin(&self) -> Result<()> {
        match self.who().await? {
            Some(who) => self.shared.reader.auth().permit_admin(&who.name),
            None => Ok(()),
        }
    }

    async fn authenticate(&self, user: AuthenticateRequest) -> Result<AuthenticateResponse> {
        self.linearize().await?;
        let shared = &*self.shared;
        for _ in 0..AUTHENTICATIONS_MAX {
            let revision = self.check_password(&user).await?;
            let mut response = match shared.gate.issuer() {
                Issuer::Log(simple_token) => {
                    let request = InternalAuthenticateRequest {
                        name: user.name.clone(),
                        password: String::new(),
                        simple_token,
                    };
                    let action = Action::Authenticate(request);
                    outcome!(self.propose_as(None, action, Input::Propose).await?, Authenticate)
                }
                Issuer::Sign(jwt) => AuthenticateResponse {
                    header: ResponseHeader::at(shared.reader.revision()),
                    token: jwt.sign(&user.name, revision).ok_or(Error::VerifyOnly)?,
                },
                Issuer::Nobody => return Err(Error::AuthFailed),
            };
            // The token must not be one that an old password got.
            if shared.reader.auth().revision() == revision {
                self.complete(&mut response.header);
                return Ok(response);
            }
        }
        Err(Error::AuthOldRevision)
    }

    async fn auth<R: auth::Request>(&self, request: R) -> Result<R::Response> {
        let mut answer = match request.into_action() {
            action @ (Action::AuthStatus(_)
            | Action::AuthUserGet(_)
            | Action::AuthUserList(_)
            | Action::AuthRoleGet(_)
            | Action::AuthRoleList(_)) => {
                self.linearize().await?;
                let who = self.who().await?.unwrap_or_else(Who::nobody);
                let mut answer = self.shared.reader.auth().answer(&action, &who.name)?;
                *answer.header_mut() = ResponseHeader::at(self.shared.reader.revision());
                answer
            }
            action => {
                let action = self.with_hash(action).await?;
                outcome!(self.propose(action).await?, Auth)
            }
        };
        self.complete(answer.header_mut());
        Ok(R::response(answer).expect("the machine answers what it was asked"))
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        if !request.serializable {
            self.linearize().await?;
        }
        self.shared.metrics.ranges.fetch_add(1, Ordering::Relaxed);
        let permit =
            |auth: &Auth, caller: Caller<'_>| auth.permit_read(caller, request.span()).map_err(Failure::Refused);
        let begun = Instant::now();
        let response = self
            .read_permitted(may_take_long(&request), permit, || self.shared.reader.range(&request))
            .await;
        self.shared.metrics.range_read(response.is_ok(), begun.elapsed());
        let mut response = response?;
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn range_encoded(&self, request: RangeRequest) -> Result<EncodedRange> {
        if !mvcc::read::is_list(&request) {
            return Ok(self.range(request).await?.into());
        }
        if !request.serializable {
            self.linearize().await?;
        }
        self.shared.metrics.ranges.fetch_add(1, Ordering::Relaxed);
        let permit =
            |auth: &Auth, caller: Caller<'_>| auth.permit_read(caller, request.span()).map_err(Failure::Refused);
        let begun = Instant::now();
        let reader = &self.shared.reader;
        let response = match self.read_permitted(false, permit, || reader.list(&request, true)).await {
            Ok(None) => self.read_permitted(true, permit, || reader.list(&request, false)).await,
            cached => cached,
        };
        self.shared.metrics.range_read(response.is_ok(), begun.elapsed());
        let mut response = response?.expect("it is a list, and may be read from the engine");
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn scan(&self, request: ScanRequest) -> Result<ScanPage> {
        if !request.serializable {
            self.linearize().await?;
        }
        let long = request.keys_max as i64 > INLINE_KEYS_MAX;
        let span = Span::new(&request.key, &request.range_end);
        let permit = |auth: &Auth, caller: Caller<'_>| auth.permit_read(caller, span).map_err(Failure::Refused);
        let mut page = self
            .read_permitted(long, permit, || self.shared.reader.scan(&request))
            .await?;
        let mut header = Some(page.header);
        self.complete(&mut header);
        page.header = header.unwrap_or_default();
        Ok(page)
    }

    async fn put(&self, request: PutRequest) -> Result<PutResponse> {
        self.check_space(quota::cost_of_put(&request)).await?;
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
            let permit = |auth: &Auth, caller: Caller<'_>| {
                txn_needs(&request, &mut |need| match need {
                    Need::Read(span) => auth.permit_read(caller, span).map_err(Failure::Refused),
                    Need::Write(_) | Need::WriteAttached(_) => unreachable!("it only reads"),
                })
            };
            let mut ranges = 0;
            let response = self
                .read_permitted(true, permit, || self.shared.reader.txn(&request, &mut ranges))
                .await;
            self.shared.metrics.txn_read(ranges);
            response?
        } else {
            if request.has_put() {
                self.check_space(quota::cost_of_txn(&request)).await?;
            }
            outcome!(self.propose(Action::Txn(request)).await?, Txn)
        };
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse> {
        self.require_admin().await?;
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
        self.require_user().await?;
        self.check_space(quota::LEASE_BYTES).await?;
        // What the log holds must not depend on who applies it, so choices are made here.
        if request.id == 0 {
            request.id = (self.shared.pending.next_id() & i64::MAX as u64) as i64;
        }
        request.ttl = request.ttl.max(self.shared.config.limits.lease_ttl_min_s);
        let mut response = outcome!(self.propose(Action::LeaseGrant(request)).await?, LeaseGrant);
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn lease_revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse> {
        self.require_user().await?;
        let mut response = outcome!(self.propose(Action::LeaseRevoke(request)).await?, LeaseRevoke);
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<LeaseKeepAliveResponse> {
        let header = self.header_at(self.shared.reader.revision());
        self.permit_attached([id], Right::Write).await?;
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
        self.require_user().await?;
        let permitted = match keys {
            true => self.permit_attached([id], Right::Read).await?,
            false => None,
        };
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
            let keys = self.read(true, || self.shared.reader.attached_keys(id))?;
            // Keys may have been attached since it was seen that the client may read them all.
            if self.permit_attached([id], Right::Read).await? != permitted {
                return Err(Error::AuthOldRevision);
            }
            keys
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
        self.check_trust()?;
        let header = self.header_at(self.shared.reader.revision());
        let leases = self.shared.lessor.lock().list();
        self.permit_attached(leases.iter().copied(), Right::Read).await?;
        let leases = leases.into_iter().map(|id| LeaseStatus { id }).collect();
        Ok(LeaseLeasesResponse { header, leases })
    }

    async fn watch(&self) -> ClientWatch<E> {
        // A token is waited for; who it stands for is asked for each watcher.
        let who = self.who().await;
        let mut store = self.clone();
        if let (Client::Verified(_, known), Ok(Some(who))) = (&mut store.client, who) {
            *known = who;
        }
        ClientWatch {
            stream: self.shared.hub.stream(),
            store,
            shut_off: None,
        }
    }

    async fn members(&self, linearizable: bool) -> Result<MemberList> {
        if linearizable {
            self.linearize().await?;
        }
        self.require_user().await?;
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
        self.require_admin().await?;
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
        self.require_admin().await?;
        let shared = &*self.shared;
        let mut standing = shared.standing.subscribe();
        if standing.borrow().leader != shared.member_id() {
            return Err(Error::NotLeader);
        }
        let membership = shared.reader.membership();
        if membership.get(to).is_none_or(|member| member.is_learner) {
            return Err(Error::BadLeaderTransferee);
        }
        shared.work.input(Input::Transfer(to));
        let moved = standing.wait_for(|standing| standing.leader == to);
        match tokio::time::timeout(shared.config.limits.request_timeout, moved).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Stopped),
            Err(_) => Err(Error::TimeoutLeaderTransfer),
        }
    }

    async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        let mut response = if request.action() == AlarmAction::Get {
            self.require_user().await?;
            // In etcd this goes through the log: whoever has no quorum must not say that all is well. Whoever is shut off
            // may say why.
            self.wait_until_applied().await?;
            let mut alarms: Vec<_> = self.status().alarms.into_iter().map(Alarm::member).collect();
            // By type alone, whichever member was named, as in etcd.
            alarms.retain(|alarm| request.alarm == AlarmType::None as i32 || alarm.alarm == request.alarm);
            AlarmResponse {
                header: ResponseHeader::at(self.shared.reader.revision()),
                alarms,
            }
        } else {
            self.require_admin().await?;
            let who = self.who().await?;
            let action = Action::Alarm(request);
            outcome!(self.propose_as(who, action, Input::Propose).await?, Alarm)
        };
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn hash_kv(&self, revision: Revision) -> Result<HashKv> {
        self.require_admin().await?;
        self.check_trust()?;
        if let Some(kept) = self.shared.kept_hashes.get(revision).await {
            return Ok(HashKv {
                header: self.header_at(self.shared.reader.revision()).unwrap_or_default(),
                hash: kept.hash,
                compact_revision: kept.previous,
                hash_revision: revision,
            });
        }
        let begun = Instant::now();
        let hashed = self.read(true, || self.shared.reader.hash_kv(revision))?;
        self.shared.metrics.hashed_revision(begun.elapsed());
        let header = self.header_at(hashed.header.revision).unwrap_or_default();
        Ok(HashKv { header, ..hashed })
    }

    async fn hash(&self) -> Result<DatabaseHash> {
        self.check_trust()?;
        self.require_admin().await?;
        let (hash, revision) = backup::hash(&self.shared, self.backup_permit()?).await?;
        Ok(DatabaseHash {
            header: self.header_at(revision).unwrap_or_default(),
            hash,
        })
    }

    async fn backup(&self) -> Result<Backup> {
        self.check_trust()?;
        self.require_admin().await?;
        backup::start(&self.shared, self.backup_permit()?)
    }

    async fn defragment(&self) -> Result<()> {
        self.require_admin().await?;
        let begun = Instant::now();
        let compacted = self.shared.reader.compacted_physically();
        tracing::info!("starting defragment");
        // What compaction dropped is given back in the background in any case; this is a reminder.
        let (start, end) = mvcc::keys::log_before(compacted);
        let dropped = KeyRange {
            start: &start,
            end: Some(&end),
        };
        self.shared.reader.engine().compact_hint(mvcc::keys::REV, dropped);
        self.shared.metrics.defragmented(begun.elapsed());
        tracing::info!("finished defragment");
        Ok(())
    }

    async fn downgrade(&self, step: DowngradeStep) -> Result<Downgrade> {
        self.require_admin().await?;
        let target = match &step {
            DowngradeStep::Validate(version) | DowngradeStep::Enable(version) => Some(cluster_version(version)?),
            DowngradeStep::Cancel => None,
        };
        self.linearize().await?;
        let under_way = self.shared.reader.downgrade().enabled;
        if let Some((major, minor)) = target {
            let (now_major, now_minor) = cluster_version(ETCD_CLUSTER_VERSION)?;
            if major != now_major || minor + 1 != now_minor {
                return Err(Error::InvalidDowngradeTargetVersion);
            }
            if under_way {
                return Err(Error::DowngradeInProcess);
            }
        }
        let info = match (&step, target) {
            (DowngradeStep::Enable(_), Some((major, minor))) => Some(DowngradeInfo {
                enabled: true,
                version: format!("{major}.{minor}.0"),
            }),
            // etcd notes an attempt to end what was never begun, and answers as if it had ended.
            (DowngradeStep::Cancel, _) if under_way => Some(DowngradeInfo::default()),
            _ => None,
        };
        if let Some(info) = info {
            self.propose(Action::Downgrade(info)).await?;
        }
        let (version, _) = ETCD_CLUSTER_VERSION.rsplit_once('.').unwrap_or_default();
        Ok(Downgrade {
            header: self.header(),
            version: version.to_owned(),
        })
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
            db_bytes: shared.reader.data_bytes(),
            // Nothing lies idle in it: what compaction drops is given back.
            db_in_use_bytes: shared.reader.data_bytes(),
            db_quota_bytes: shared.db_quota_bytes.load(Ordering::Relaxed),
            leader: standing.leader,
            raft_index: shared.committed.load(Ordering::Relaxed),
            raft_applied_index: shared.reader.applied_index(),
            is_learner: standing.is_learner,
            downgrade_target: {
                let downgrade = shared.reader.downgrade();
                downgrade.enabled.then(|| downgrade.version.clone())
            },
            errors,
            alarms,
            log_stalled,
        }
    }

    fn standing(&self) -> Standing {
        let standing = self.shared.standing();
        // Who is shut off follows nobody: clients that require a leader go elsewhere.
        let leader = if self.check_trust().is_ok() { standing.leader } else { 0 };
        Standing {
            leader,
            is_learner: standing.is_learner,
        }
    }

    fn header(&self) -> ResponseHeader {
        self.header_at(self.shared.reader.revision()).unwrap_or_default()
    }

    fn limits(&self) -> &Limits {
        &self.shared.config.limits
    }
}

/// A client's watchers: each is created only if the client may read its keys then, as in etcd.
pub struct ClientWatch<E: Engine> {
    stream: Stream<E>,
    store: NodeStore<E>,
    /// While this member's state is not to be trusted: when to look again whether it is.
    shut_off: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl<E: Engine> ClientWatch<E> {
    /// Waits while this member's state is not to be trusted: what it would tell may be wrong. Streams that require a leader
    /// end meanwhile, see [`NodeStore::standing`].
    fn poll_trust(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while self.store.check_trust().is_err() {
            let again = self
                .shut_off
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(SHUT_OFF_PAUSE)));
            std::task::ready!(again.as_mut().poll(context));
            self.shut_off = None;
        }
        Poll::Ready(())
    }
}

impl<E: Engine> WatchStream for ClientWatch<E> {
    fn create(&mut self, create: WatchCreate) -> std::result::Result<WatchCreated, WatchError> {
        self.store.check_trust().map_err(WatchError::Refused)?;
        // etcd looks at this first.
        if create.start_revision >= 0
            && let Some(who) = self.store.who_now().map_err(WatchError::Refused)?
        {
            let span = Span::new(&create.key, &create.range_end);
            let permitted = self.store.shared.reader.auth().permit_read(who.caller(), span);
            permitted.map_err(WatchError::Refused)?;
        }
        self.stream.create(create)
    }

    fn cancel(&mut self, watch_id: i64) -> bool {
        self.stream.cancel(watch_id)
    }

    fn request_progress(&mut self) {
        self.stream.request_progress();
    }

    fn notify_progress(&mut self) {
        self.stream.notify_progress();
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<WatchOutput> {
        std::task::ready!(self.poll_trust(context));
        self.stream.poll_next(context)
    }
}
