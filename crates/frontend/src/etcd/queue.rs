//! The line that locks and elections wait in: keys under a prefix, first come, first served (etcd's package
//! `concurrency`).
//!
//! Each contender has a key of its own, bound to its lease, and its turn comes once no key under the prefix was created
//! before its own. It watches the youngest of those before it, so that a key that goes wakes one contender, not all.

use std::future::poll_fn;

use api::kv::{
    Compare, CompareResult, CompareTarget, DeleteRangeRequest, EventType, KeyValue, LeaseGrantRequest, PutRequest,
    RangeRequest, RequestOp, RequestOpKind, ResponseHeader, ResponseOp, ResponseOpKind, SortOrder, SortTarget,
    TargetUnion, TxnRequest, TxnResponse,
};
use api::store::{Events, WatchCreate, WatchError, WatchOutput, WatchStream};
use api::{LeaseId, Revision, Store};
use bytes::Bytes;
use tonic::Status;

/// How long the lease of a contender that brought none lives, in seconds (etcd's `defaultSessionTTL`).
const SESSION_TTL_S: i64 = 60;

/// The status of an error of the store. etcd's services for locks and elections are clients of their own server, and
/// the codes that it answers them with get lost on the way.
pub(super) fn status(error: api::Error) -> Status {
    Status::unknown(error.message())
}

/// The prefix of the keys of a lock or an election.
pub(super) fn prefix(name: &[u8]) -> Bytes {
    [name, b"/"].concat().into()
}

/// The key of the contender that has this lease.
pub(super) fn key(prefix: &[u8], lease: LeaseId) -> Bytes {
    let sign = if lease < 0 { "-" } else { "" };
    [prefix, format!("{sign}{:x}", lease.unsigned_abs()).as_bytes()]
        .concat()
        .into()
}

/// The end of the range of keys that begin with `prefix`, which ends in a slash.
fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    *end.last_mut().expect("a prefix ends in a slash") += 1;
    end.into()
}

/// The lease of a contender, or a new one if it brings none.
pub(super) async fn session<S: Store>(store: &S, lease: LeaseId) -> Result<LeaseId, Status> {
    if lease != 0 {
        return Ok(lease);
    }
    let request = LeaseGrantRequest {
        ttl: SESSION_TTL_S,
        id: 0,
    };
    store
        .lease_grant(request)
        .await
        .map(|granted| granted.id)
        .map_err(status)
}

/// Asks for the key under `prefix` that was created first.
pub(super) fn first_created(prefix: &Bytes) -> RangeRequest {
    RangeRequest {
        key: prefix.clone(),
        range_end: prefix_end(prefix),
        limit: 1,
        sort_order: SortOrder::Ascend.into(),
        sort_target: SortTarget::Create.into(),
        ..Default::default()
    }
}

pub(super) fn get(key: &Bytes) -> RangeRequest {
    RangeRequest {
        key: key.clone(),
        ..Default::default()
    }
}

pub(super) fn created_at(key: &Bytes, revision: Revision) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
        range_end: Bytes::new(),
    }
}

pub(super) fn range_op(request: RangeRequest) -> RequestOp {
    RequestOp {
        request: Some(RequestOpKind::Range(request)),
    }
}

pub(super) fn put_op(key: &Bytes, value: Bytes, lease: LeaseId) -> RequestOp {
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
pub(super) fn resignation(key: &Bytes, revision: Revision) -> TxnRequest {
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
pub(super) async fn txn<S: Store>(store: &S, request: TxnRequest) -> Result<TxnResponse, Status> {
    request.validate(store.limits().txn_ops_max).map_err(status)?;
    store.txn(request).await.map_err(status)
}

/// The revision that a reply was made at.
pub(super) fn revision(header: Option<&ResponseHeader>) -> Revision {
    header.map_or(0, |header| header.revision)
}

/// The keys that a transaction's range found.
pub(super) fn found(response: Option<&ResponseOp>) -> &[KeyValue] {
    match response.and_then(|response| response.response.as_ref()) {
        Some(ResponseOpKind::Range(range)) => &range.kvs,
        _ => &[],
    }
}

/// Waits until no key under `prefix` was created at or before `revision_max`.
pub(super) async fn wait<S: Store>(store: &S, prefix: &Bytes, revision_max: Revision) -> Result<(), Status> {
    loop {
        let before = store
            .range(RangeRequest {
                max_create_revision: revision_max,
                sort_order: SortOrder::Descend.into(),
                ..first_created(prefix)
            })
            .await
            .map_err(status)?;
        let Some(last) = before.kvs.first() else {
            return Ok(());
        };
        let read_at = revision(before.header.as_ref());
        let mut watch = Watch::new(store, &last.key, None, read_at).await?;
        // Where history was compacted away meanwhile, a new read tells what has become of the key.
        while let Some(events) = watch.next().await {
            if events.iter().any(|event| event.r#type() == EventType::Delete) {
                break;
            }
        }
    }
}

/// A watch of one key, or of all under a prefix.
pub(super) struct Watch<W> {
    stream: W,
    /// The revision in the header of the last events.
    pub(super) revision: Revision,
}

impl<W: WatchStream> Watch<W> {
    /// Events at and after `start_revision`; of `key`, or of all keys that begin with it if it is a `prefix`.
    pub(super) async fn new<S: Store<Watch = W>>(
        store: &S,
        key: &Bytes,
        prefix: Option<&Bytes>,
        start_revision: Revision,
    ) -> Result<Self, Status> {
        let mut stream = store.watch().await;
        let created = stream.create(WatchCreate {
            key: key.clone(),
            range_end: prefix.map_or_else(Bytes::new, |prefix| prefix_end(prefix)),
            start_revision,
            ..Default::default()
        });
        created.map_err(|error: WatchError| Status::unknown(error.to_string()))?;
        Ok(Watch { stream, revision: 0 })
    }

    /// The next events; `None` once their history was compacted away.
    pub(super) async fn next(&mut self) -> Option<std::sync::Arc<Events>> {
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

/// Takes a contender out of the line when it is dropped: its client has gone, or waiting has failed.
pub(super) struct Leave<S: Store> {
    store: S,
    /// `None` once there is nothing to undo.
    undo: Option<TxnRequest>,
}

impl<S: Store> Leave<S> {
    /// Deletes `key` when dropped, if it is still the one that was created at `revision`.
    pub(super) fn new(store: &S, key: &Bytes, revision: Revision) -> Self {
        Leave {
            store: store.clone(),
            undo: Some(resignation(key, revision)),
        }
    }

    /// The contender stays.
    pub(super) fn forget(mut self) {
        self.undo = None;
    }
}

impl<S: Store> Drop for Leave<S> {
    fn drop(&mut self) {
        let (Some(undo), Ok(runtime)) = (self.undo.take(), tokio::runtime::Handle::try_current()) else {
            return;
        };
        let store = self.store.clone();
        // One write for each call that was given up, and the store bounds how long it takes. Should it fail, the key
        // goes with its lease.
        runtime.spawn(async move {
            if let Err(error) = store.txn(undo).await {
                tracing::debug!(%error, "a contender that gave up stays in line until its lease ends");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_etcd() {
        let prefix = prefix(b"my\xfflock");
        assert_eq!(&*prefix, b"my\xfflock/");
        assert_eq!(&*prefix_end(&prefix), b"my\xfflock0");
        assert_eq!(&*key(&prefix, 0x2040_a21e_5695_c509), b"my\xfflock/2040a21e5695c509");
        assert_eq!(&*key(&prefix, -255), b"my\xfflock/-ff");
        assert_eq!(&*key(&prefix, i64::MIN), b"my\xfflock/-8000000000000000");
    }
}
