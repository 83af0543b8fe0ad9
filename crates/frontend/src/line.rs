//! The line that locks and elections wait in: keys under a prefix, first come, first served (etcd's package
//! `concurrency`). Whoever locks by etcd's clients and whoever locks by HTTP stand in the same one.
//!
//! Each contender has a key of its own, bound to its lease, and its turn comes once no key under the prefix was created
//! before its own. It watches the youngest of those before it, so that a key that goes wakes one contender, not all.

use std::future::{Future, poll_fn};
use std::time::Duration;

use api::error::ErrorKind;
use api::kv::{
    Compare, CompareResult, CompareTarget, DeleteRangeRequest, EventType, KeyValue, LeaseRevokeRequest, PutRequest,
    RangeRequest, RangeResponse, RequestOp, RequestOpKind, ResponseHeader, ResponseOp, ResponseOpKind, SortOrder,
    SortTarget, TargetUnion, TxnRequest, TxnResponse,
};
use api::store::{Events, WatchCreate, WatchError, WatchOutput, WatchStream};
use api::{Error, LeaseId, Revision, Store};
use bytes::Bytes;
use tokio::time::Instant;

/// How long the lease of a contender that brought none lives, in seconds (etcd's `defaultSessionTTL`).
pub(crate) const SESSION_TTL_S: i64 = 60;

/// How long to try to take back what a contender got that gave up.
const UNDO_TIMEOUT: Duration = Duration::from_secs(60);

/// How long whoever gives up waits for that.
const UNDO_PATIENCE: Duration = Duration::from_secs(5);

/// The first pause before it is tried again.
const UNDO_PAUSE_MIN: Duration = Duration::from_millis(50);

/// How often something is tried again because users or roles changed meanwhile.
pub(crate) const TRIES_MAX: usize = 5;

/// Why waiting came to nothing.
#[derive(Debug)]
pub(crate) enum WaitError {
    Store(Error),
    /// The keys may not be watched.
    Watch(WatchError),
}

impl From<Error> for WaitError {
    fn from(error: Error) -> Self {
        WaitError::Store(error)
    }
}

/// A line: the keys under the name of a lock or an election.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    /// The name and a slash.
    pub(crate) prefix: Bytes,
}

/// A contender's place.
#[derive(Debug)]
pub(crate) struct Joined {
    /// As of the transaction that looked, or put the key there.
    pub(crate) header: Option<ResponseHeader>,
    /// What created the contender's key.
    pub(crate) revision: Revision,
    /// The contender was not in line before.
    pub(crate) is_new: bool,
    /// Nobody is before it.
    pub(crate) is_first: bool,
}

impl Line {
    pub(crate) fn new(name: &[u8]) -> Self {
        Line {
            prefix: [name, b"/"].concat().into(),
        }
    }

    /// The key of the contender that has this lease. Go writes negative numbers with a sign, in hexadecimal too.
    pub(crate) fn key(&self, lease: LeaseId) -> Bytes {
        let sign = if lease < 0 { "-" } else { "" };
        let lease = format!("{sign}{:x}", lease.unsigned_abs());
        [&self.prefix[..], lease.as_bytes()].concat().into()
    }

    /// The end of the range of the line's keys.
    fn end(&self) -> Bytes {
        let mut end = self.prefix.to_vec();
        *end.last_mut().expect("a prefix ends in a slash") += 1;
        end.into()
    }

    /// Asks for the key that was created first.
    pub(crate) fn first(&self) -> RangeRequest {
        RangeRequest {
            key: self.prefix.clone(),
            range_end: self.end(),
            limit: 1,
            sort_order: SortOrder::Ascend.into(),
            sort_target: SortTarget::Create.into(),
            ..Default::default()
        }
    }

    /// Takes a place in line, unless the lease has one, and looks whether it is the first.
    pub(crate) async fn join<S: Store>(&self, store: &S, key: &Bytes, lease: LeaseId) -> Result<Joined, Error> {
        let first = range_op(self.first());
        let request = TxnRequest {
            compare: vec![created_at(key, 0)],
            success: vec![put_op(key, Bytes::new(), lease), first.clone()],
            failure: vec![range_op(get(key)), first],
        };
        let joined = txn(store, request).await?;
        let revision = match joined.succeeded {
            true => revision(joined.header.as_ref()),
            false => found(joined.responses.first())
                .first()
                .map_or(0, |kv| kv.create_revision),
        };
        let first = found(joined.responses.get(1)).first();
        Ok(Joined {
            revision,
            is_new: joined.succeeded,
            is_first: first.is_none_or(|first| first.create_revision == revision),
            header: joined.header,
        })
    }

    /// Waits until nobody is before the contender whose key was created at `own`.
    pub(crate) async fn wait<S: Store>(&self, store: &S, own: Revision) -> Result<(), WaitError> {
        let mut tries = 0;
        loop {
            let before = RangeRequest {
                max_create_revision: own - 1,
                sort_order: SortOrder::Descend.into(),
                ..self.first()
            };
            let before = read(store, &before).await?;
            let Some(last) = before.kvs.first() else {
                return Ok(());
            };
            let read_at = revision(before.header.as_ref());
            let mut watch = match Watch::of_key(store, &last.key, read_at).await {
                Err(WaitError::Watch(WatchError::Refused(Error::AuthOldRevision))) if tries < TRIES_MAX => {
                    tries += 1;
                    continue;
                }
                watch => watch?,
            };
            tries = 0;
            // Where history was compacted away meanwhile, a new read tells what has become of the key.
            while let Some(events) = watch.next().await {
                if events.iter().any(|event| event.r#type() == EventType::Delete) {
                    break;
                }
            }
        }
    }

    /// Watches all that happens in line, at and after `start_revision`.
    pub(crate) async fn watch<S: Store>(
        &self,
        store: &S,
        start_revision: Revision,
    ) -> Result<Watch<S::Watch>, WaitError> {
        Watch::new(store, self.prefix.clone(), self.end(), start_revision).await
    }
}

/// Reads, again if users or roles changed meanwhile: whoever is in line does not lose its place by that.
pub(crate) async fn read<S: Store>(store: &S, request: &RangeRequest) -> Result<RangeResponse, Error> {
    let mut tries = 0;
    loop {
        match store.range(request.clone()).await {
            Err(Error::AuthOldRevision) if tries < TRIES_MAX => tries += 1,
            response => return response,
        }
    }
}

pub(crate) fn get(key: &Bytes) -> RangeRequest {
    RangeRequest {
        key: key.clone(),
        ..Default::default()
    }
}

pub(crate) fn created_at(key: &Bytes, revision: Revision) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
        range_end: Bytes::new(),
    }
}

pub(crate) fn range_op(request: RangeRequest) -> RequestOp {
    RequestOp {
        request: Some(RequestOpKind::Range(request)),
    }
}

pub(crate) fn put_op(key: &Bytes, value: Bytes, lease: LeaseId) -> RequestOp {
    RequestOp {
        request: Some(RequestOpKind::Put(PutRequest {
            key: key.clone(),
            value,
            lease,
            ..Default::default()
        })),
    }
}

/// Deletes a contender's key, unless it is another's by now.
pub(crate) fn resignation(key: &Bytes, revision: Revision) -> TxnRequest {
    let delete = DeleteRangeRequest {
        key: key.clone(),
        ..Default::default()
    };
    TxnRequest {
        compare: vec![created_at(key, revision)],
        success: vec![RequestOp {
            request: Some(RequestOpKind::DeleteRange(delete)),
        }],
        failure: Vec::new(),
    }
}

/// Carries a transaction out, held against the same limits as a client's own.
pub(crate) async fn txn<S: Store>(store: &S, request: TxnRequest) -> Result<TxnResponse, Error> {
    request.validate(store.limits().txn_ops_max)?;
    store.txn(request).await
}

/// The revision that a reply was made at.
pub(crate) fn revision(header: Option<&ResponseHeader>) -> Revision {
    header.map_or(0, |header| header.revision)
}

/// The keys that a transaction's range found.
pub(crate) fn found(response: Option<&ResponseOp>) -> &[KeyValue] {
    match response.and_then(|response| response.response.as_ref()) {
        Some(ResponseOpKind::Range(range)) => &range.kvs,
        _ => &[],
    }
}

/// A watch of one key, or of a whole line.
pub(crate) struct Watch<W> {
    stream: W,
    /// The revision in the header of the last events.
    pub(crate) revision: Revision,
}

impl<W: WatchStream> Watch<W> {
    async fn new<S: Store<Watch = W>>(
        store: &S,
        key: Bytes,
        range_end: Bytes,
        start_revision: Revision,
    ) -> Result<Self, WaitError> {
        let mut stream = store.watch().await;
        let created = stream.create(WatchCreate {
            key,
            range_end,
            start_revision,
            ..Default::default()
        });
        created.map_err(WaitError::Watch)?;
        Ok(Watch { stream, revision: 0 })
    }

    /// Events of a key at and after `start_revision`.
    pub(crate) async fn of_key<S: Store<Watch = W>>(
        store: &S,
        key: &Bytes,
        start_revision: Revision,
    ) -> Result<Self, WaitError> {
        Watch::new(store, key.clone(), Bytes::new(), start_revision).await
    }

    /// The next events; `None` once their history was compacted away.
    pub(crate) async fn next(&mut self) -> Option<std::sync::Arc<Events>> {
        loop {
            match poll_fn(|context| self.stream.poll_next(context)).await {
                WatchOutput::Events { revision, events, .. } => {
                    self.revision = revision;
                    return Some(events);
                }
                WatchOutput::Progress { .. } => {}
                WatchOutput::Compacted { .. } => return None,
            }
        }
    }
}

/// Sees a step of a contender through, on a task of its own: a write that was begun may still be carried out when its
/// client goes away, and somebody must hear of it. What it comes to is dropped if nobody waits for it any more; an
/// [`Attempt`] in it then undoes itself.
pub(crate) async fn see_through<T: Send + 'static>(step: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(step).await.map_err(tokio::task::JoinError::try_into_panic) {
        Ok(done) => done,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime ends, and with it whoever waits.
        Err(Err(_)) => std::future::pending().await,
    }
}

/// What is to be undone if a contender's turn does not come: a place in line, a lease that was granted for it. Dropped
/// with something left to undo, because its client has gone or waiting has failed, it does so on its own. It does so as
/// the member: what the client may do can have changed since.
pub(crate) struct Attempt<S: Store> {
    store: S,
    place: Option<(Bytes, Revision)>,
    granted: Option<LeaseId>,
}

impl<S: Store> Attempt<S> {
    /// There is nothing to undo yet.
    pub(crate) fn new(store: &S) -> Self {
        Attempt {
            store: store.on_behalf_of_member(),
            place: None,
            granted: None,
        }
    }

    /// A lease was granted for the contender alone.
    pub(crate) fn has_granted(&mut self, lease: LeaseId) {
        self.granted = Some(lease);
    }

    /// The contender has a place in line: a key, and what created it.
    pub(crate) fn has_joined(&mut self, key: &Bytes, revision: Revision) {
        self.place = Some((key.clone(), revision));
    }

    /// Undoes it, whoever still waits for that. Returns once it is done; where a lease is to end, after [`UNDO_PATIENCE`] at
    /// the latest, after which that goes on.
    pub(crate) async fn undo(mut self) {
        let patience = match self.granted {
            Some(_) => UNDO_PATIENCE,
            // Its client may take the same place again as soon as it has its answer. The store bounds how long this takes.
            None => Duration::MAX,
        };
        if let Some(undoing) = self.begin_undo() {
            let _ = tokio::time::timeout(patience, undoing).await;
        }
    }

    /// Has what is left undone on a task of its own.
    fn begin_undo(&mut self) -> Option<tokio::task::JoinHandle<()>> {
        let (place, granted) = (self.place.take(), self.granted.take());
        if place.is_none() && granted.is_none() {
            return None;
        }
        let store = self.store.clone();
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        Some(runtime.spawn(async move { undo(&store, place, granted).await }))
    }

    /// The contender stays.
    pub(crate) fn keep(mut self) {
        self.place = None;
        self.granted = None;
    }
}

/// Ends a lease that nobody else knows, for [`UNDO_TIMEOUT`] if need be: when the cluster is busy or without a leader many
/// give up at once. A place of a client's own lease is given back at once or not at all: later the same client may hold the
/// lock by it.
async fn undo<S: Store>(store: &S, place: Option<(Bytes, Revision)>, granted: Option<LeaseId>) {
    let begun = Instant::now();
    let (mut pause, mut tries) = (UNDO_PAUSE_MIN, 0);
    loop {
        let undone = match (&place, granted) {
            // The place goes with it.
            (_, Some(id)) => store.lease_revoke(LeaseRevokeRequest { id }).await.map(drop),
            (Some((key, revision)), None) => store.txn(resignation(key, *revision)).await.map(drop),
            (None, None) => return,
        };
        match undone {
            Ok(()) | Err(Error::LeaseNotFound) => return,
            Err(Error::AuthOldRevision) if tries < TRIES_MAX => {
                tries += 1;
                continue;
            }
            Err(error) if granted.is_some() && error.kind() == ErrorKind::Retry && begun.elapsed() < UNDO_TIMEOUT => {}
            Err(error) => {
                tracing::warn!(%error, "a contender that gave up stays in line until its lease ends");
                return;
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(UNDO_PATIENCE);
    }
}

impl<S: Store> Drop for Attempt<S> {
    fn drop(&mut self) {
        drop(self.begin_undo());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_etcd() {
        let line = Line::new(b"my\xfflock");
        assert_eq!(&*line.prefix, b"my\xfflock/");
        assert_eq!(&*line.end(), b"my\xfflock0");
        assert_eq!(&*line.key(0x2040_a21e_5695_c509), b"my\xfflock/2040a21e5695c509");
        assert_eq!(&*line.key(-255), b"my\xfflock/-ff");
        assert_eq!(&*line.key(i64::MIN), b"my\xfflock/-8000000000000000");
    }
}
