//! [`api::Store`] over a running node.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use api::codec::{Action, Operation, encode_operation};
use api::kv::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest,
    LeaseGrantResponse, LeaseKeepAliveResponse, LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse,
    LeaseStatus, LeaseTimeToLiveResponse, Member, PutRequest, PutResponse, RangeRequest, RangeResponse, ResponseHeader,
    TxnRequest, TxnResponse,
};
use api::store::{Alarm, ScanPage, ScanRequest, Status};
use api::{Error, LeaseId, Limits, Result, Span, Store};
use mvcc::{Failure, Outcome, Stream};
use replica::{Input, Proposal};
use storage::Engine;

use crate::node::Shared;

/// Ranges that may return more keys than this leave the async thread to others while they run.
const INLINE_KEYS_MAX: i64 = 500;

/// The store that a node serves. A cheap handle.
pub struct NodeStore<E: Engine> {
    shared: Arc<Shared<E>>,
}

impl<E: Engine> Clone for NodeStore<E> {
    fn clone(&self) -> Self {
        NodeStore {
            shared: self.shared.clone(),
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
        NodeStore { shared }
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

    /// Refuses what would fill the disk further.
    fn check_space(&self) -> Result<()> {
        if self.shared.disk_full.load(Ordering::Acquire) {
            Err(Error::NoSpace)
        } else {
            Ok(())
        }
    }

    /// Puts an operation into the log and waits for what it comes to.
    async fn propose(&self, action: Action) -> Result<Outcome> {
        let shared = &*self.shared;
        let id = shared.pending.next_id();
        let operation = encode_operation(&Operation::new(id, action));
        if operation.len() > shared.config.limits.request_bytes_max {
            return Err(Error::RequestTooLarge);
        }
        let mut place = shared.pending.enter(id, operation.len())?;
        shared.inputs.push(Input::Propose(Proposal { id, operation }));
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

    /// Returns once the state here is at least as new as everything acknowledged before the call.
    async fn linearize(&self) -> Result<()> {
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

/// Even a range with a small limit walks over all its keys, to count them.
fn may_take_long(request: &RangeRequest) -> bool {
    !matches!(request.span(), Span::Key(_))
}

impl<E: Engine> Store for NodeStore<E> {
    type Watch = Stream<E>;

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
        if self.shared.leader.load(Ordering::Acquire) != self.shared.member_id() {
            return Err(Error::NoLeader);
        }
        let header = self.header_at(self.shared.reader.revision());
        let ttl = self.shared.lessor.lock().keep_alive(id, self.shared.now_ms());
        if ttl.is_some() {
            self.shared.metrics.leases_renewed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(LeaseKeepAliveResponse {
            header,
            id,
            ttl: ttl.unwrap_or(0),
        })
    }

    async fn lease_time_to_live(&self, id: LeaseId, keys: bool) -> Result<LeaseTimeToLiveResponse> {
        self.linearize().await?;
        let header = self.header_at(self.shared.reader.revision());
        let left = self.shared.lessor.lock().time_to_live(id, self.shared.now_ms());
        let Some((granted_ttl, ttl)) = left else {
            return Ok(LeaseTimeToLiveResponse {
                header,
                id,
                ttl: -1,
                ..Default::default()
            });
        };
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

    async fn members(&self, linearizable: bool) -> Result<(ResponseHeader, Vec<Member>)> {
        if linearizable {
            self.linearize().await?;
        }
        // etcd's cluster replies say no revision.
        let header = self.header_at(0).unwrap_or_default();
        Ok((header, vec![self.shared.config.member.clone()]))
    }

    fn status(&self) -> Status {
        let shared = &*self.shared;
        let standing = *shared.standing.lock();
        let alarms: Vec<_> = shared
            .disk_full
            .load(Ordering::Acquire)
            .then(|| Alarm::NoSpace(shared.member_id()))
            .into_iter()
            .collect();
        let mut errors = Vec::new();
        if standing.leader == 0 {
            errors.push(Error::NoLeader.message().to_owned());
        }
        for alarm in &alarms {
            if let Alarm::NoSpace(member) = alarm {
                errors.push(format!("memberID:{member} alarm:NOSPACE "));
            }
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
        }
    }

    fn header(&self) -> ResponseHeader {
        self.header_at(self.shared.reader.revision()).unwrap_or_default()
    }

    fn limits(&self) -> &Limits {
        &self.shared.config.limits
    }
}
