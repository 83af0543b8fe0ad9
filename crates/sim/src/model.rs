//! etcd's semantics once more, as simply as they can be written down: it replays the committed log, and every member's
//! answers, reads and watches are held against it.
//!
//! It knows nothing of engines, batches or compaction: nothing is ever dropped here, so a read of any member, however
//! far behind, can be answered. Sorting and filters of ranges are left to the tests of `mvcc`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::codec::{Action, MemberChange, MemberChangeKind, OperationHeader};
use api::kv::*;
use api::limits::LEASE_TTL_MAX_S;
use api::{Error, MemberId, RaftIndex, Revision};
use bytes::Bytes;
use mvcc::{Membership, Outcome};

use crate::auth::Auth;

/// One change: what the key became, or that it was deleted.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// In which revision.
    pub revision: Revision,
    /// Which key.
    pub key: Bytes,
    /// What it became.
    pub kv: Option<KeyValue>,
}

/// From where a read looks at the history: the newest revision that it may see, and what is compacted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The newest revision.
    pub revision: Revision,
    /// Before it, history is hidden.
    pub compacted: Revision,
}

/// The state after all entries so far, and all that was before.
pub struct Model {
    /// Every change there ever was, in order.
    pub history: Vec<Change>,
    /// The live keys.
    now: BTreeMap<Bytes, KeyValue>,
    /// Where in the history each key changed.
    by_key: BTreeMap<Bytes, Vec<usize>>,
    /// The newest revision and the compacted one.
    pub seen: Seen,
    /// Time to live of each lease, in seconds.
    pub leases: BTreeMap<i64, i64>,
    /// Who belongs to the cluster.
    pub members: Membership,
    /// Alarms that are on.
    pub alarms: BTreeSet<AlarmMember>,
    /// Users and roles; shared with whoever remembers what they were.
    pub auth: Arc<Auth>,
    /// Whether the revision that is being written has changes.
    open: bool,
}

/// Whether a key is in a range as etcd writes ranges.
pub fn in_range(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == start,
        [0] => key >= start,
        end => key >= start && key < end,
    }
}

impl Default for Model {
    fn default() -> Self {
        Model {
            history: Vec::new(),
            now: BTreeMap::new(),
            by_key: BTreeMap::new(),
            seen: Seen {
                revision: 1,
                compacted: -1,
            },
            leases: BTreeMap::new(),
            members: Membership::default(),
            alarms: BTreeSet::new(),
            auth: Arc::default(),
            open: false,
        }
    }
}

impl Model {
    /// A key as it was when a revision was whole.
    pub fn key_at(&self, key: &[u8], at: Revision) -> Option<&KeyValue> {
        let changes = self.by_key.get(key)?;
        let before = changes.partition_point(|&change| self.history[change].revision <= at);
        self.history[changes[before.checked_sub(1)?]].kv.as_ref()
    }

    /// The keys of a range as they were when a revision was whole.
    pub fn keys_at(&self, start: &[u8], end: &[u8], at: Revision) -> Vec<KeyValue> {
        let from = self
            .by_key
            .range::<[u8], _>((std::ops::Bound::Included(start), std::ops::Bound::Unbounded));
        from.take_while(|(key, _)| in_range(key, start, end))
            .filter_map(|(key, _)| self.key_at(key, at))
            .cloned()
            .collect()
    }

    fn live(&self, start: &[u8], end: &[u8]) -> Vec<KeyValue> {
        let from = self
            .now
            .range::<[u8], _>((std::ops::Bound::Included(start), std::ops::Bound::Unbounded));
        from.take_while(|(key, _)| in_range(key, start, end))
            .map(|(_, kv)| kv.clone())
            .collect()
    }

    /// How many keys there are.
    pub fn live_keys(&self) -> usize {
        self.now.len()
    }

    /// Bytes of the live keys and their values.
    pub fn live_bytes(&self) -> usize {
        self.now.values().map(|kv| kv.key.len() + kv.value.len()).sum()
    }

    /// The revision as someone in the middle of a transaction sees it.
    fn current(&self) -> Revision {
        self.seen.revision + i64::from(self.open)
    }

    /// The keys attached to a lease.
    pub fn attached(&self, lease: i64) -> Vec<Bytes> {
        let of_lease = self.now.values().filter(|kv| kv.lease == lease);
        of_lease.map(|kv| kv.key.clone()).collect()
    }

    /// Answers a range in key order for one who sees up to `seen`.
    pub fn range(&self, request: &RangeRequest, seen: Seen) -> Result<RangeResponse, Error> {
        if request.revision > seen.revision {
            return Err(Error::FutureRevision);
        }
        let at = if request.revision <= 0 {
            seen.revision
        } else {
            request.revision
        };
        if at < seen.compacted {
            return Err(Error::Compacted);
        }
        let all = self.keys_at(&request.key, &request.range_end, at);
        let mut response = RangeResponse {
            header: ResponseHeader::at(seen.revision),
            count: all.len() as i64,
            ..Default::default()
        };
        if !request.count_only {
            let most = if request.limit > 0 {
                request.limit as usize
            } else {
                usize::MAX
            };
            response.more = all.len() > most;
            response.kvs = all.into_iter().take(most).collect();
            if request.keys_only {
                for kv in &mut response.kvs {
                    (kv.value, kv.lease) = (Bytes::new(), 0);
                }
            }
        }
        Ok(response)
    }

    /// Events of the keys in a range from revision `from` up to `to`, with the value before each revision.
    pub fn events(&self, start: &[u8], end: &[u8], from: Revision, to: Revision) -> Vec<Event> {
        let first = self.history.partition_point(|change| change.revision < from);
        let changes = self.history[first..].iter().take_while(|change| change.revision <= to);
        changes
            .filter(|change| in_range(&change.key, start, end))
            .map(|change| {
                let deleted = KeyValue {
                    key: change.key.clone(),
                    mod_revision: change.revision,
                    ..Default::default()
                };
                let created = change
                    .kv
                    .as_ref()
                    .is_some_and(|kv| kv.create_revision == change.revision);
                let before = self.key_at(&change.key, change.revision - 1);
                let kind = if change.kv.is_some() {
                    EventType::Put
                } else {
                    EventType::Delete
                };
                Event {
                    r#type: kind as i32,
                    kv: Some(change.kv.clone().unwrap_or(deleted)),
                    prev_kv: before.filter(|_| !created).cloned(),
                }
            })
            .collect()
    }

    /// Carries out an operation of the log entry at an index.
    pub fn apply(&mut self, index: RaftIndex, header: &OperationHeader, action: &Action) -> Result<Outcome, Error> {
        if self.is_corrupt() && touches_keys_or_leases(action) {
            return Err(Error::Corrupt);
        }
        let mut kinds = self.alarms.iter().map(AlarmMember::alarm);
        if kinds.any(|kind| kind == AlarmType::Nospace) && takes_space(action) {
            return Err(Error::NoSpace);
        }
        self.auth.authorize(header, action, &|lease| self.attached(lease))?;
        match action {
            Action::Put(put) => {
                self.check_put(put)?;
                let response = self.put(put);
                self.close();
                Ok(Outcome::Put(response))
            }
            Action::DeleteRange(delete) => {
                let response = self.delete_range(delete);
                self.close();
                Ok(Outcome::DeleteRange(response))
            }
            Action::Txn(txn) => {
                let mut path = Vec::new();
                self.paths(txn, &mut path);
                self.check_txn(txn, &mut path.iter().copied())?;
                let mut response = self.txn(txn, &mut path.into_iter());
                self.close();
                response.header = ResponseHeader::at(self.seen.revision);
                Ok(Outcome::Txn(response))
            }
            Action::Compact(compact) => {
                if compact.revision <= self.seen.compacted {
                    return Err(Error::Compacted);
                }
                if compact.revision > self.seen.revision {
                    return Err(Error::FutureRevision);
                }
                self.seen.compacted = compact.revision;
                Ok(Outcome::Compact(CompactionResponse {
                    header: ResponseHeader::at(self.seen.revision),
                }))
            }
            Action::LeaseGrant(grant) => {
                if grant.id == 0 {
                    return Err(Error::LeaseNotFound);
                }
                if grant.ttl > LEASE_TTL_MAX_S {
                    return Err(Error::LeaseTtlTooLarge);
                }
                if self.leases.contains_key(&grant.id) {
                    return Err(Error::LeaseExists);
                }
                self.leases.insert(grant.id, grant.ttl);
                Ok(Outcome::LeaseGrant(LeaseGrantResponse {
                    header: ResponseHeader::at(self.seen.revision),
                    id: grant.id,
                    ttl: grant.ttl,
                    error: String::new(),
                }))
            }
            Action::LeaseRevoke(revoke) => {
                if self.leases.remove(&revoke.id).is_none() {
                    return Err(Error::LeaseNotFound);
                }
                for key in self.attached(revoke.id) {
                    self.change(key, None);
                }
                self.close();
                Ok(Outcome::LeaseRevoke(LeaseRevokeResponse {
                    header: ResponseHeader::at(self.seen.revision),
                }))
            }
            // Time is no matter of the model; the checker of leases knows it.
            Action::LeaseCheckpoint(_) => Ok(Outcome::LeaseCheckpoint),
            Action::MemberChange(change) => {
                self.change_members(change)?;
                Ok(Outcome::Members(self.members.clone().into()))
            }
            Action::MemberUpdate(update) => {
                let known = self.members.members.iter().position(|member| member.id == update.id);
                let at = known.ok_or(Error::MemberNotFound)?;
                if self.is_taken(&update.peer_urls, update.id) {
                    return Err(Error::PeerUrlExists);
                }
                self.members.members[at].peer_urls.clone_from(&update.peer_urls);
                Ok(Outcome::Members(self.members.clone().into()))
            }
            Action::MemberAttributes(said) => {
                let mut members = self.members.members.iter_mut();
                if let (Some(member), Some(said)) =
                    (members.find(|member| member.id == said.member_id), &said.attributes)
                {
                    member.name.clone_from(&said.name);
                    member.client_urls.clone_from(&said.client_urls);
                }
                Ok(Outcome::Members(self.members.clone().into()))
            }
            Action::Alarm(request) => {
                let alarm = AlarmMember {
                    member_id: request.member_id,
                    alarm: request.alarm,
                };
                let changed: Vec<AlarmMember> = match request.action() {
                    AlarmAction::Get => {
                        let of_kind = self.alarms.iter().filter(|other| other.alarm == alarm.alarm);
                        of_kind.copied().collect()
                    }
                    AlarmAction::Activate => {
                        self.alarms.insert(alarm);
                        vec![alarm]
                    }
                    AlarmAction::Deactivate => self.alarms.take(&alarm).into_iter().collect(),
                };
                Ok(Outcome::Alarm(AlarmResponse {
                    header: ResponseHeader::at(self.seen.revision),
                    alarms: changed,
                }))
            }
            about_users => Arc::make_mut(&mut self.auth).apply(index, about_users, self.seen.revision),
        }
    }

    /// Whether as many voters are said to hold something else than the others as make it unknown who is right, or all are.
    pub fn is_corrupt(&self) -> bool {
        let is_accused = |id: MemberId| {
            self.alarms.contains(&AlarmMember {
                member_id: id,
                alarm: AlarmType::Corrupt as i32,
            })
        };
        let voters: Vec<MemberId> = self.members.voters().collect();
        let accused = voters.iter().filter(|&&id| is_accused(id)).count();
        is_accused(0) || (!voters.is_empty() && 2 * (voters.len() - accused) <= voters.len())
    }

    fn is_taken(&self, urls: &[String], except: MemberId) -> bool {
        let others = self.members.members.iter().filter(|member| member.id != except);
        let taken: BTreeSet<&String> = others.flat_map(|member| &member.peer_urls).collect();
        urls.iter().any(|url| taken.contains(url))
    }

    fn change_members(&mut self, change: &MemberChange) -> Result<(), Error> {
        let member = change.member.clone().ok_or(Error::MemberNotFound)?;
        let id: MemberId = member.id;
        if self.members.removed.contains(&id) {
            return Err(Error::MemberNotFound);
        }
        let known = self.members.members.iter().position(|member| member.id == id);
        let voters = self.members.voters().count();
        match (change.kind(), known) {
            (MemberChangeKind::Add, Some(_)) => return Err(Error::MemberExists),
            (MemberChangeKind::Add, None) if self.is_taken(&member.peer_urls, id) => {
                return Err(Error::PeerUrlExists);
            }
            (MemberChangeKind::Add, None) => {
                self.members.members.push(member);
                self.members.members.sort_by_key(|member| member.id);
            }
            (_, None) => return Err(Error::MemberNotFound),
            (MemberChangeKind::Promote, Some(at)) => {
                if !std::mem::replace(&mut self.members.members[at].is_learner, false) {
                    return Err(Error::MemberNotLearner);
                }
            }
            (MemberChangeKind::Remove, Some(at)) => {
                if !self.members.members[at].is_learner && voters == 1 {
                    return Err(Error::NotEnoughStarted);
                }
                self.members.members.remove(at);
                self.members.removed.push(id);
                self.alarms.retain(|alarm| alarm.member_id != id);
                self.members.removed.sort_unstable();
            }
        }
        Ok(())
    }

    fn change(&mut self, key: Bytes, kv: Option<KeyValue>) {
        match &kv {
            Some(kv) => drop(self.now.insert(key.clone(), kv.clone())),
            None => drop(self.now.remove(&key)),
        }
        self.by_key.entry(key.clone()).or_default().push(self.history.len());
        self.history.push(Change {
            revision: self.seen.revision + 1,
            key,
            kv,
        });
        self.open = true;
    }

    fn close(&mut self) {
        self.seen.revision = self.current();
        self.open = false;
    }

    fn check_put(&self, put: &PutRequest) -> Result<(), Error> {
        if put.lease != 0 && !self.leases.contains_key(&put.lease) {
            return Err(Error::LeaseNotFound);
        }
        if (put.ignore_value || put.ignore_lease) && !self.now.contains_key(&put.key) {
            return Err(Error::KeyNotFound);
        }
        Ok(())
    }

    fn put(&mut self, put: &PutRequest) -> PutResponse {
        let before = self.now.get(&put.key).cloned();
        let revision = self.seen.revision + 1;
        let mut kv = KeyValue {
            key: put.key.clone(),
            create_revision: revision,
            mod_revision: revision,
            version: 1,
            value: put.value.clone(),
            lease: put.lease,
        };
        if let Some(before) = &before {
            kv.create_revision = before.create_revision;
            kv.version = before.version + 1;
            if put.ignore_value {
                kv.value = before.value.clone();
            }
            if put.ignore_lease {
                kv.lease = before.lease;
            }
        }
        self.change(put.key.clone(), Some(kv));
        PutResponse {
            header: ResponseHeader::at(revision),
            prev_kv: before.filter(|_| put.prev_kv),
        }
    }

    fn delete_range(&mut self, delete: &DeleteRangeRequest) -> DeleteRangeResponse {
        let doomed = self.live(&delete.key, &delete.range_end);
        for kv in &doomed {
            self.change(kv.key.clone(), None);
        }
        DeleteRangeResponse {
            header: ResponseHeader::at(self.current()),
            deleted: doomed.len() as i64,
            prev_kvs: if delete.prev_kv { doomed } else { Vec::new() },
        }
    }

    fn branch(txn: &TxnRequest, succeeded: bool) -> &[RequestOp] {
        if succeeded { &txn.success } else { &txn.failure }
    }

    fn paths(&self, txn: &TxnRequest, path: &mut Vec<bool>) {
        let holds = txn.compare.iter().all(|compare| self.holds(compare));
        path.push(holds);
        for op in Model::branch(txn, holds) {
            if let Some(RequestOpKind::Txn(nested)) = &op.request {
                self.paths(nested, path);
            }
        }
    }

    fn check_txn(&self, txn: &TxnRequest, path: &mut impl Iterator<Item = bool>) -> Result<(), Error> {
        let succeeded = path.next().expect("every transaction has its choice");
        for op in Model::branch(txn, succeeded) {
            match op.request.as_ref().expect("clients send whole requests") {
                RequestOpKind::Range(range) if range.revision > self.seen.revision => {
                    return Err(Error::FutureRevision);
                }
                RequestOpKind::Range(range) if range.revision > 0 && range.revision < self.seen.compacted => {
                    return Err(Error::Compacted);
                }
                RequestOpKind::Put(put) => self.check_put(put)?,
                RequestOpKind::Txn(nested) => self.check_txn(nested, path)?,
                RequestOpKind::Range(_) | RequestOpKind::DeleteRange(_) => {}
            }
        }
        Ok(())
    }

    fn txn(&mut self, txn: &TxnRequest, path: &mut impl Iterator<Item = bool>) -> TxnResponse {
        let succeeded = path.next().expect("every transaction has its choice");
        let mut responses = Vec::new();
        for op in Model::branch(txn, succeeded) {
            let response = match op.request.as_ref().expect("clients send whole requests") {
                RequestOpKind::Range(range) => {
                    let seen = Seen {
                        revision: self.current(),
                        compacted: self.seen.compacted,
                    };
                    ResponseOpKind::Range(self.range(range, seen).expect("it was checked"))
                }
                RequestOpKind::Put(put) => ResponseOpKind::Put(self.put(put)),
                RequestOpKind::DeleteRange(delete) => ResponseOpKind::DeleteRange(self.delete_range(delete)),
                RequestOpKind::Txn(nested) => ResponseOpKind::Txn(self.txn(nested, path)),
            };
            responses.push(ResponseOp {
                response: Some(response),
            });
        }
        TxnResponse {
            header: ResponseHeader::at(0),
            succeeded,
            responses,
        }
    }

    fn holds(&self, compare: &Compare) -> bool {
        let kvs = self.live(&compare.key, &compare.range_end);
        if kvs.is_empty() {
            return compare.target != CompareTarget::Value as i32 && satisfies(compare, &KeyValue::default());
        }
        kvs.iter().all(|kv| satisfies(compare, kv))
    }
}

/// Whether doubt about the state forbids an operation.
fn touches_keys_or_leases(action: &Action) -> bool {
    matches!(
        action,
        Action::Put(_)
            | Action::DeleteRange(_)
            | Action::Txn(_)
            | Action::Compact(_)
            | Action::LeaseGrant(_)
            | Action::LeaseRevoke(_)
    )
}

/// Whether a full disk forbids an operation.
fn takes_space(action: &Action) -> bool {
    fn puts(txn: &TxnRequest) -> bool {
        let ops = txn.success.iter().chain(&txn.failure);
        ops.filter_map(|op| op.request.as_ref()).any(|op| match op {
            RequestOpKind::Put(_) => true,
            RequestOpKind::Txn(nested) => puts(nested),
            _ => false,
        })
    }
    match action {
        Action::Put(_) | Action::LeaseGrant(_) => true,
        Action::Txn(txn) => puts(txn),
        _ => false,
    }
}

fn satisfies(compare: &Compare, kv: &KeyValue) -> bool {
    use std::cmp::Ordering;
    let order = match compare.target_union.clone() {
        Some(TargetUnion::Version(version)) => kv.version.cmp(&version),
        Some(TargetUnion::CreateRevision(revision)) => kv.create_revision.cmp(&revision),
        Some(TargetUnion::ModRevision(revision)) => kv.mod_revision.cmp(&revision),
        Some(TargetUnion::Value(value)) => kv.value.cmp(&value),
        Some(TargetUnion::Lease(lease)) => kv.lease.cmp(&lease),
        None => unreachable!("clients send whole requests"),
    };
    match compare.result {
        0 => order == Ordering::Equal,
        1 => order == Ordering::Greater,
        2 => order == Ordering::Less,
        _ => order != Ordering::Equal,
    }
}
