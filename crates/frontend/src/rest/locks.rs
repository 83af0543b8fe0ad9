//! Locks: `/api/v1/locks/{name}`, with the keys and the rules of etcd's lock service, so that whoever locks by etcd's
//! clients and whoever locks by HTTP wait for each other.
//!
//! Whoever wants a lock puts a key `name/<lease in hexadecimal>`; the one that was created first holds it. Each watches
//! the youngest of those before it, so that a key that goes wakes one, not all.

use std::future::poll_fn;
use std::pin::pin;
use std::time::Duration;

use api::kv::{
    Compare, CompareResult, CompareTarget, DeleteRangeRequest, EventType, KeyValue, LeaseGrantRequest,
    LeaseRevokeRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, RequestOpKind, ResponseOp, ResponseOpKind,
    SortOrder, SortTarget, TargetUnion, TxnRequest,
};
use api::store::{WatchCreate, WatchError, WatchOutput, WatchStream};
use api::{Error, LeaseId, Revision, Store};
use axum::response::Response;
use bytes::Bytes;

use super::json::{AcquiredBody, DoneBody, HolderBody, KeyBody, LockBody, hex};
use super::parameters::prefix_end;
use super::problem::{INVALID_PARAMETER, INVALID_REQUEST, LEASE_NOT_FOUND, LOCK_NOT_HELD, Problem};
use super::{Call, body, json_response};

/// How long the lease of a lock lives whose client brought none and said nothing, in seconds (etcd's
/// `defaultSessionTTL`).
const TTL_S: i64 = 60;

/// How many of those who wait are named.
const WAITERS_MAX: i64 = 100;

/// The line that waits for a lock.
struct Line<'a, S> {
    store: &'a S,
    prefix: Bytes,
}

impl<'a, S: Store> Line<'a, S> {
    fn new(store: &'a S, name: &[u8]) -> Self {
        Line {
            store,
            prefix: [name, b"/"].concat().into(),
        }
    }

    /// The key of whoever has this lease. Go writes negative numbers with a sign, in hexadecimal too.
    fn key(&self, lease: LeaseId) -> Bytes {
        let sign = if lease < 0 { "-" } else { "" };
        let lease = format!("{sign}{:x}", lease.unsigned_abs());
        [&self.prefix[..], lease.as_bytes()].concat().into()
    }

    /// Asks for the first in line.
    fn first(&self) -> RangeRequest {
        RangeRequest {
            key: self.prefix.clone(),
            range_end: prefix_end(&self.prefix),
            limit: 1,
            sort_order: SortOrder::Ascend.into(),
            sort_target: SortTarget::Create.into(),
            ..Default::default()
        }
    }

    /// Who holds the lock.
    async fn holder(&self) -> Result<Option<HolderBody>, Error> {
        let first = self.store.range(self.first()).await?;
        Ok(first.kvs.first().map(HolderBody::new))
    }

    /// Takes a place in line, unless the lease has one. Returns the revision that created it, whether it is new, and
    /// whether it is the first.
    async fn join(&self, key: &Bytes, lease: LeaseId) -> Result<(Revision, bool, bool), Problem> {
        let op = |kind| RequestOp { request: Some(kind) };
        let put = PutRequest {
            key: key.clone(),
            lease,
            ..Default::default()
        };
        let first = op(RequestOpKind::Range(self.first()));
        let request = TxnRequest {
            compare: vec![created_at(key, 0)],
            success: vec![op(RequestOpKind::Put(put)), first.clone()],
            failure: vec![op(RequestOpKind::Range(get(key))), first],
        };
        request.validate(self.store.limits().txn_ops_max)?;
        let joined = self.store.txn(request).await?;
        let revision = match joined.succeeded {
            true => joined.header.map_or(0, |header| header.revision),
            false => created(joined.responses.first()),
        };
        Ok((revision, joined.succeeded, created(joined.responses.get(1)) == revision))
    }

    /// Waits until nobody is before the one that joined at `revision`.
    async fn wait(&self, revision: Revision) -> Result<(), Error> {
        loop {
            let before = RangeRequest {
                max_create_revision: revision - 1,
                sort_order: SortOrder::Descend.into(),
                ..self.first()
            };
            let RangeResponse { kvs, header, .. } = self.store.range(before).await?;
            let Some(last) = kvs.into_iter().next() else {
                return Ok(());
            };
            self.wait_for_end(last, header.map_or(0, |header| header.revision))
                .await?;
        }
    }

    /// Waits until a key is deleted, or until its history is compacted away, after which a new read tells.
    async fn wait_for_end(&self, kv: KeyValue, read_at: Revision) -> Result<(), Error> {
        let mut watcher = self.store.watch().await;
        let wanted = WatchCreate {
            key: kv.key,
            start_revision: read_at,
            no_put: true,
            ..Default::default()
        };
        match watcher.create(wanted) {
            Ok(_) => {}
            Err(WatchError::Refused(error)) => return Err(error),
            // The range is one key, and nobody else is on this stream.
            Err(error) => unreachable!("a watch of a key was refused: {error}"),
        }
        loop {
            match poll_fn(|context| watcher.poll_next(context)).await {
                WatchOutput::Events { events, .. } => {
                    if events.iter().any(|event| event.r#type() == EventType::Delete) {
                        return Ok(());
                    }
                }
                WatchOutput::Compacted { .. } => return Ok(()),
                WatchOutput::Progress { .. } => {}
            }
        }
    }
}

fn get(key: &Bytes) -> RangeRequest {
    RangeRequest {
        key: key.clone(),
        ..Default::default()
    }
}

fn created_at(key: &Bytes, revision: Revision) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
        range_end: Bytes::new(),
    }
}

/// The revision that created the key that a transaction's range found; 0 if it found none.
fn created(response: Option<&ResponseOp>) -> Revision {
    match response.and_then(|response| response.response.as_ref()) {
        Some(ResponseOpKind::Range(range)) => range.kvs.first().map_or(0, |kv| kv.create_revision),
        _ => 0,
    }
}

/// What is to be undone if a lock is not acquired: a place in line, a lease. Dropped with something left to undo, which
/// means that the client has gone, it does so on its own.
struct Attempt<S: Store> {
    store: S,
    place: Option<(Bytes, Revision)>,
    granted: Option<LeaseId>,
}

impl<S: Store> Attempt<S> {
    async fn undo(&mut self) -> Result<(), Error> {
        let (place, granted) = (self.place.take(), self.granted.take());
        undo(&self.store, place, granted).await
    }

    fn keep(mut self) {
        self.place = None;
        self.granted = None;
    }
}

async fn undo<S: Store>(store: &S, place: Option<(Bytes, Revision)>, granted: Option<LeaseId>) -> Result<(), Error> {
    if let Some(id) = granted {
        // The place goes with it.
        return match store.lease_revoke(LeaseRevokeRequest { id }).await {
            Ok(_) | Err(Error::LeaseNotFound) => Ok(()),
            Err(error) => Err(error),
        };
    }
    if let Some((key, revision)) = place {
        let delete = DeleteRangeRequest {
            key: key.clone(),
            ..Default::default()
        };
        // Unless it is another's by now.
        let request = TxnRequest {
            compare: vec![created_at(&key, revision)],
            success: vec![RequestOp {
                request: Some(RequestOpKind::DeleteRange(delete)),
            }],
            failure: Vec::new(),
        };
        store.txn(request).await?;
    }
    Ok(())
}

impl<S: Store> Drop for Attempt<S> {
    fn drop(&mut self) {
        let (place, granted) = (self.place.take(), self.granted.take());
        if place.is_none() && granted.is_none() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let store = self.store.clone();
        // One write for each attempt that was given up; the store bounds how long it takes. Should it fail, the lease's
        // end does the same.
        runtime.spawn(async move {
            if let Err(error) = undo(&store, place, granted).await {
                tracing::debug!(%error, "whoever gave a lock up stays in line until its lease ends");
            }
        });
    }
}

pub(super) async fn acquire<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let encoding = call.encoding();
    let wait = call.parameters.time("wait").unwrap_or_default();
    let ttl = call.parameters.integer("ttl");
    if ttl.is_some() && call.parameters.has("lease") {
        let detail = "ttl is for a new lease, and lease names one: give one of them";
        return Err(Problem::new(INVALID_REQUEST, detail));
    }
    body::none(&call.headers, call.body).await?;
    let store = &call.store;
    let mut attempt = Attempt {
        store: store.clone(),
        place: None,
        granted: None,
    };
    let (lease, ttl) = match call.parameters.lease() {
        0 => {
            let request = LeaseGrantRequest {
                ttl: ttl.unwrap_or(TTL_S),
                id: 0,
            };
            let granted = store.lease_grant(request).await?;
            attempt.granted = Some(granted.id);
            (granted.id, Some(granted.ttl))
        }
        lease => (lease, None),
    };
    let line = Line::new(store, &call.argument);
    let key = line.key(lease);
    let (revision, is_new, is_first) = line.join(&key, lease).await?;
    if is_new {
        attempt.place = Some((key.clone(), revision));
    }
    if !is_first {
        let mut stop = pin!(crate::service::stopped(call.shared.stopping.clone()));
        let waited = tokio::select! {
            waited = tokio::time::timeout(wait, line.wait(revision)) => waited,
            error = keep_alive(store, lease, ttl) => Ok(Err(error)),
            () = &mut stop => Ok(Err(Error::Stopped)),
        };
        match waited {
            Ok(waited) => waited?,
            Err(_) => {
                let holder = line.holder().await?;
                attempt.undo().await?;
                return Err(Problem::lock_held(holder));
            }
        }
        // The lease may have ended meanwhile, and the place with it.
        let own = store.range(get(&key)).await?;
        if own.kvs.first().is_none_or(|kv| kv.create_revision != revision) {
            return Err(Problem::new(
                LEASE_NOT_FOUND,
                "the lease ended while it waited for the lock",
            ));
        }
        if ttl.is_some() {
            // Whoever waited has its whole time from now on.
            store.lease_keep_alive(lease).await?;
        }
    }
    attempt.keep();
    Ok(json_response(&AcquiredBody {
        key: KeyBody::new(&key, encoding),
        lease: hex(lease.cast_unsigned()),
        ttl,
        revision,
    }))
}

/// Keeps the lease that was granted to somebody in line alive. Ends only with an error.
async fn keep_alive<S: Store>(store: &S, lease: LeaseId, ttl: Option<i64>) -> Error {
    let Some(ttl) = ttl else {
        return std::future::pending().await;
    };
    let pause = Duration::from_secs(ttl.max(1).cast_unsigned()) / 3;
    loop {
        tokio::time::sleep(pause).await;
        match store.lease_keep_alive(lease).await {
            Ok(kept) if kept.ttl <= 0 => return Error::LeaseNotFound,
            // Without a leader leases do not end: there is time to try again.
            Ok(_) | Err(_) => {}
        }
    }
}

pub(super) async fn get_lock<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let line = Line::new(&call.store, &call.argument);
    let in_line = RangeRequest {
        limit: WAITERS_MAX + 1,
        serializable: call.parameters.flag("serializable"),
        ..line.first()
    };
    let in_line = call.store.range(in_line).await?;
    let mut names = in_line.kvs.iter().map(HolderBody::new);
    let holder = names.next();
    Ok(json_response(&LockBody {
        revision: in_line.header.unwrap_or_default().revision,
        held: holder.is_some(),
        holder,
        waiters: names.collect(),
        waiting: (in_line.count - 1).max(0),
    }))
}

pub(super) async fn release<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    if !call.parameters.has("lease") {
        let detail = "lease says whose hold ends; POST returned it";
        return Err(Problem::parameter(INVALID_PARAMETER, "lease", detail));
    }
    body::none(&call.headers, call.body).await?;
    let request = DeleteRangeRequest {
        key: Line::new(&call.store, &call.argument).key(call.parameters.lease()),
        ..Default::default()
    };
    request.validate()?;
    let deleted = call.store.delete_range(request).await?;
    if deleted.deleted == 0 {
        return Err(Problem::new(
            LOCK_NOT_HELD,
            "there is no key of this lease under the lock's name",
        ));
    }
    let revision = deleted.header.unwrap_or_default().revision;
    Ok(json_response(&DoneBody { revision }))
}
