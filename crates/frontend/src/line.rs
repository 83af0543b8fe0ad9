//! The line that locks and elections wait in: keys under a prefix, first come, first served (etcd's package
//! `concurrency`). Whoever locks by etcd's clients and whoever locks by HTTP stand in the same one.
//!
//! Each contender has a key of its own, bound to its lease, and its turn comes once no key under the prefix was created
//! before its own. It watches the youngest of those before it, so that a key that goes wakes one contender, not all.

use std::future::{Future, poll_fn};
use std::sync::{Arc, Weak};
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

/// How long at least, and at most, to try to take back what a contender got that gave up: as long as it would stay by
/// itself. How many do so at a time is bounded by how many were in line while there was a quorum.
const UNDO_TIMEOUT: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(60 * 60));

/// How long whoever gives up waits for that.
pub(crate) const UNDO_PATIENCE: Duration = Duration::from_secs(5);

/// The first pause before it is tried again.
const UNDO_PAUSE_MIN: Duration = Duration::from_millis(50);

/// How often a change of a lease's key is tried when other calls with the lease come between.
const CHANGES_MAX: usize = 64;

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
    /// Of the transaction that wrote the contender's key for this call.
    pub(crate) header: Option<ResponseHeader>,
    /// What created the contender's key.
    pub(crate) revision: Revision,
    /// What wrote the contender's key for this call. Once another call with the lease writes it, the place is that one's.
    pub(crate) taken_at: Revision,
    /// The contender was not in line before.
    is_new: bool,
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

    /// Takes a place in line, or takes over the one that the lease has, and looks whether it is the first. `value` is what a
    /// contender says of itself; without one its key keeps what it says. Goes on if nobody waits for it any more, and then
    /// gives the place back.
    ///
    /// To take a place over the key is written anew, which etcd does only for another value of a campaign. An earlier call
    /// with the same lease may have been given up, and what it undoes may be carried out late, by another leader even: it
    /// then finds that the place is not its own any more.
    ///
    /// # Errors
    /// Those of a transaction, and [`Error::TooManyRequests`] if other calls with the lease come between each time.
    pub(crate) async fn join<S: Store>(
        &self,
        store: &S,
        mut attempt: Attempt<S>,
        key: &Bytes,
        lease: LeaseId,
        value: Option<Bytes>,
    ) -> Result<(Attempt<S>, Joined), Error> {
        let (line, store, key) = (self.clone(), store.clone(), key.clone());
        let has_granted = attempt.granted.is_some();
        // Lives as long as this future.
        let waiting = Arc::new(());
        let waits = Arc::downgrade(&waiting);
        let taking = async move {
            let joined = line.take_place(&store, &key, lease, value, &waits).await?;
            // Where its lease came first before this call, an earlier one may have told its client so.
            if joined.is_new || !joined.is_first {
                attempt.has_place(&key, joined.taken_at);
            }
            Ok((attempt, joined))
        };
        match has_granted {
            // Its lease ends at once, and no place is taken with it after that.
            true => taking.await,
            false => see_through(taking).await,
        }
    }

    async fn take_place<S: Store>(
        &self,
        store: &S,
        key: &Bytes,
        lease: LeaseId,
        value: Option<Bytes>,
        waits: &Weak<()>,
    ) -> Result<Joined, Error> {
        let again = PutRequest {
            key: key.clone(),
            lease,
            ignore_value: value.is_none(),
            value: value.unwrap_or_default(),
            ..Default::default()
        };
        let new = PutRequest {
            ignore_value: false,
            ..again.clone()
        };
        let take = |seen: Option<&KeyValue>| {
            let (compare, put) = match seen {
                None => (created_at(key, 0), &new),
                // Its client, which has gone, may have asked again since: that call's place stays.
                Some(_) if waits.strong_count() == 0 => return None,
                Some(kv) => (written_at(key, kv.mod_revision), &again),
            };
            Some(TxnRequest {
                compare: vec![compare],
                success: vec![put_op(put.clone()), range_op(self.first())],
                failure: vec![range_op(get(key))],
            })
        };
        let Some((done, before)) = change_as_seen(store, None, take).await? else {
            // Nobody hears of it.
            return Err(Error::Timeout);
        };
        let taken_at = revision(done.header.as_ref());
        let revision = before.as_ref().map_or(taken_at, |kv| kv.create_revision);
        let first = found(done.responses.get(1)).first();
        Ok(Joined {
            revision,
            taken_at,
            is_new: before.is_none(),
            is_first: first.is_none_or(|first| first.create_revision == revision),
            header: done.header,
        })
    }

    /// Takes a lease's key out of the line. Not one that a call with the lease takes after this is asked for, however late
    /// it is carried out. Returns the header of the write, `None` if there is no such key.
    ///
    /// # Errors
    /// Those of a read, and as [`Line::join`].
    pub(crate) async fn leave<S: Store>(store: &S, key: &Bytes) -> Result<Option<ResponseHeader>, Error> {
        let own = read(store, &get(key)).await?.kvs.pop();
        let resign = |own: Option<&KeyValue>| Some(resignation(key, written_at(key, own?.mod_revision)));
        let done = change_as_seen(store, own, resign).await?;
        Ok(done.and_then(|(done, _)| done.header))
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

    /// Looks whether a contender whose turn has come still has its place, and makes sure that no other call with its lease
    /// gives it up. Returns the header of a read or write that found it; `None` if the place is gone.
    pub(crate) async fn confirm<S: Store>(
        &self,
        store: &S,
        attempt: &mut Attempt<S>,
        key: &Bytes,
        lease: LeaseId,
        joined: &Joined,
    ) -> Result<Option<ResponseHeader>, Error> {
        let now = read(store, &get(key)).await?;
        // From now on it may be the turn of another call with the lease as well, which may tell its client so.
        attempt.place = None;
        let own = now.kvs.into_iter().next();
        if own.as_ref().is_some_and(|kv| kv.mod_revision == joined.taken_at) {
            return Ok(now.header);
        }
        let write = |own: Option<&KeyValue>| {
            let own = own.filter(|kv| kv.create_revision == joined.revision)?;
            let again = PutRequest {
                key: key.clone(),
                lease,
                ignore_value: true,
                ..Default::default()
            };
            Some(TxnRequest {
                compare: vec![written_at(key, own.mod_revision)],
                success: vec![put_op(again)],
                failure: vec![range_op(get(key))],
            })
        };
        let done = change_as_seen(store, own, write).await?;
        Ok(done.and_then(|(done, _)| done.header))
    }

    /// Waits until a contender's key is gone, which was created at `own` and is looked at after `seen_at`.
    pub(crate) async fn wait_for_end<S: Store>(
        &self,
        store: &S,
        key: &Bytes,
        own: Revision,
        mut seen_at: Revision,
    ) -> Result<(), WaitError> {
        let mut tries = 0;
        loop {
            match Watch::of_key(store, key, seen_at + 1).await {
                Ok(mut watch) => {
                    tries = 0;
                    while let Some(events) = watch.next().await {
                        if events.iter().any(|event| event.r#type() == EventType::Delete) {
                            return Ok(());
                        }
                    }
                }
                Err(WaitError::Watch(WatchError::Refused(Error::AuthOldRevision))) if tries < TRIES_MAX => tries += 1,
                Err(error) => return Err(error),
            }
            let now = read(store, &get(key)).await?;
            if now.kvs.first().is_none_or(|kv| kv.create_revision != own) {
                return Ok(());
            }
            seen_at = revision(now.header.as_ref());
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

/// Carries a change of a lease's key out that holds only if the key is as it was seen, and otherwise looks at it: again with
/// what it then sees, if other calls with the lease come between. So whatever is carried out late, when nobody waits for it
/// any more, ousts nobody but those who were there when it was asked for. Returns what the change came to and what the key was
/// before; `None` if `change` wants none.
async fn change_as_seen<S: Store>(
    store: &S,
    mut seen: Option<KeyValue>,
    change: impl Fn(Option<&KeyValue>) -> Option<TxnRequest>,
) -> Result<Option<(TxnResponse, Option<KeyValue>)>, Error> {
    let mut tries = 0;
    for _ in 0..CHANGES_MAX {
        let Some(request) = change(seen.as_ref()) else {
            return Ok(None);
        };
        match txn(store, request).await {
            Err(Error::AuthOldRevision) if tries < TRIES_MAX => tries += 1,
            Ok(done) if done.succeeded => return Ok(Some((done, seen))),
            done => seen = found(done?.responses.first()).first().cloned(),
        }
    }
    Err(Error::TooManyRequests)
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

fn written_at(key: &Bytes, revision: Revision) -> Compare {
    Compare {
        target: CompareTarget::Mod.into(),
        target_union: Some(TargetUnion::ModRevision(revision)),
        ..created_at(key, revision)
    }
}

pub(crate) fn range_op(request: RangeRequest) -> RequestOp {
    RequestOp {
        request: Some(RequestOpKind::Range(request)),
    }
}

pub(crate) fn put_op(request: PutRequest) -> RequestOp {
    RequestOp {
        request: Some(RequestOpKind::Put(request)),
    }
}

/// Deletes a contender's key if `compare` holds, and looks for it otherwise.
pub(crate) fn resignation(key: &Bytes, compare: Compare) -> TxnRequest {
    let delete = DeleteRangeRequest {
        key: key.clone(),
        ..Default::default()
    };
    TxnRequest {
        compare: vec![compare],
        success: vec![RequestOp {
            request: Some(RequestOpKind::DeleteRange(delete)),
        }],
        failure: vec![range_op(get(key))],
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
    pub(crate) async fn next(&mut self) -> Option<Arc<Events>> {
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
    /// A key, and what it was written at for this attempt.
    place: Option<(Bytes, Revision)>,
    granted: Option<Granted>,
}

/// A lease that nobody else knows.
#[derive(Debug, Clone, Copy)]
struct Granted {
    lease: LeaseId,
    ttl: Duration,
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

    /// A lease was granted for the contender alone, for so many seconds.
    pub(crate) fn has_granted(&mut self, lease: LeaseId, ttl_s: i64) {
        let ttl = Duration::from_secs(ttl_s.max(0).cast_unsigned());
        self.granted = Some(Granted { lease, ttl });
    }

    fn has_place(&mut self, key: &Bytes, taken_at: Revision) {
        self.place = Some((key.clone(), taken_at));
    }

    /// Undoes it, whoever still waits for that. Returns once it is done, or after `patience`, after which it goes on;
    /// `false` if the lease is still in line by then, be it by another call.
    pub(crate) async fn undo(mut self, patience: Duration) -> bool {
        let Some(undoing) = self.begin_undo() else {
            return true;
        };
        matches!(tokio::time::timeout(patience, undoing).await, Ok(Ok(true)))
    }

    /// Has what is left undone on a task of its own.
    fn begin_undo(&mut self) -> Option<tokio::task::JoinHandle<bool>> {
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

/// Ends the lease that nobody else knows, or gives the place back unless a later call has taken it over, for as long as
/// [`UNDO_TIMEOUT`] if need be: when the cluster is busy or without a leader many give up at once. `false` if the place is
/// still taken.
async fn undo<S: Store>(store: &S, place: Option<(Bytes, Revision)>, granted: Option<Granted>) -> bool {
    let begun = Instant::now();
    let (at_least, at_most) = UNDO_TIMEOUT;
    let due = granted.map_or(at_least, |granted| granted.ttl.clamp(at_least, at_most));
    let (mut pause, mut tries) = (UNDO_PAUSE_MIN, 0);
    loop {
        let undone = match (&place, granted) {
            // The place goes with it.
            (_, Some(Granted { lease: id, .. })) => store.lease_revoke(LeaseRevokeRequest { id }).await.map(|_| true),
            (Some((key, taken_at)), None) => {
                let resignation = resignation(key, written_at(key, *taken_at));
                let resigned = store.txn(resignation).await;
                resigned.map(|resigned| resigned.succeeded || found(resigned.responses.first()).is_empty())
            }
            (None, None) => return true,
        };
        match undone {
            Ok(is_gone) => return is_gone,
            Err(Error::LeaseNotFound) => return true,
            Err(Error::AuthOldRevision) if tries < TRIES_MAX => {
                tries += 1;
                continue;
            }
            Err(error) if error.kind() == ErrorKind::Retry && begun.elapsed() < due => {}
            Err(error) => {
                tracing::warn!(%error, "a contender that gave up stays in line until its lease ends");
                return false;
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
