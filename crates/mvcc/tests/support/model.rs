//! etcd's semantics as simply as they can be written down, from its documentation and source: the whole history in one
//! list, every question answered by going through it.

use std::collections::BTreeMap;

use api::codec::Action;
use api::kv::*;
use api::limits::LEASE_TTL_MAX_S;
use api::store::{ScanPage, ScanRequest};
use api::{Error, Revision};
use bytes::Bytes;
use metastore_mvcc::machine::Counts;
use metastore_mvcc::{LeaseChange, Outcome};

/// One change: what the key became at that moment, or that it was deleted.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub rev: Revision,
    pub sub: u32,
    pub key: Bytes,
    pub kv: Option<KeyValue>,
}

/// From where a read looks at the history: the newest revision that it may see, and what is compacted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    pub rev: Revision,
    pub compacted: Revision,
}

/// A lease: its time to live, and what was left of it at the last checkpoint.
pub type Lease = (i64, i64);

#[derive(Debug, Clone)]
pub struct Model {
    pub history: Vec<Change>,
    /// The newest whole revision, and the compacted one.
    pub seen: Seen,
    pub leases: BTreeMap<i64, Lease>,
    /// Changes of the revision that is being written.
    subs: u32,
    pub lease_changes: Vec<LeaseChange>,
    /// What etcd counts (`storage/mvcc/metrics_txn.go`): every call that its code makes to a transaction of its store, and
    /// how many of these had more than one.
    pub counts: Counts,
    /// Calls in the one that is open.
    calls: u64,
}

pub type Keys = BTreeMap<Bytes, KeyValue>;

/// Whether a key is in a range as etcd writes ranges.
pub fn in_range(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == start,
        // The smallest key there can be is one zero byte, so `\0` as a start excludes nothing.
        [0] => key >= start,
        end => key >= start && key < end,
    }
}

impl Default for Model {
    fn default() -> Self {
        Model {
            history: Vec::new(),
            seen: Seen { rev: 1, compacted: -1 },
            leases: BTreeMap::new(),
            subs: 0,
            lease_changes: Vec::new(),
            counts: Counts::default(),
            calls: 0,
        }
    }
}

impl Model {
    /// All keys as they were when revision `at` was whole.
    pub fn keys_at(&self, at: Revision) -> Keys {
        let mut keys = Keys::new();
        for change in self.history.iter().filter(|change| change.rev <= at) {
            match &change.kv {
                Some(kv) => drop(keys.insert(change.key.clone(), kv.clone())),
                None => drop(keys.remove(&change.key)),
            }
        }
        keys
    }

    /// A key as it was when revision `at` was whole.
    pub fn key_at(&self, key: &[u8], at: Revision) -> Option<KeyValue> {
        let last = self
            .history
            .iter()
            .rev()
            .find(|change| change.key == key && change.rev <= at)?;
        last.kv.clone()
    }

    /// The revision as someone in the middle of a transaction sees it.
    fn current(&self) -> Revision {
        self.seen.rev + i64::from(self.subs > 0)
    }

    pub fn attached(&self, lease: i64, at: Revision) -> Vec<Bytes> {
        let keys = self.keys_at(at);
        keys.into_iter()
            .filter(|(_, kv)| kv.lease == lease)
            .map(|(key, _)| key)
            .collect()
    }

    /// Answers a range for one who sees up to `seen`.
    pub fn range(&self, request: &RangeRequest, seen: Seen) -> Result<RangeResponse, Error> {
        if request.revision > seen.rev {
            return Err(Error::FutureRevision);
        }
        let at = if request.revision <= 0 {
            seen.rev
        } else {
            request.revision
        };
        if at < seen.compacted {
            return Err(Error::Compacted);
        }
        let all: Vec<KeyValue> = self
            .keys_at(at)
            .into_values()
            .filter(|kv| in_range(&kv.key, &request.key, &request.range_end))
            .collect();
        let mut response = RangeResponse {
            header: ResponseHeader::at(seen.rev),
            kvs: Vec::new(),
            more: false,
            count: all.len() as i64,
        };
        if request.count_only {
            return Ok(response);
        }
        let none = SortOrder::None as i32;
        let ascend = SortOrder::Ascend as i32;
        let by_key = request.sort_target == SortTarget::Key as i32;
        let filtered = request.min_mod_revision != 0
            || request.max_mod_revision != 0
            || request.min_create_revision != 0
            || request.max_create_revision != 0;
        // etcd reads one key more than the limit to see whether there are more, and reads everything when it will sort
        // or filter. An order of NONE counts as "will not sort" here, whatever the target.
        let natural = request.sort_order == none || (by_key && request.sort_order == ascend);
        let fetch = match request.limit {
            limit if limit > 0 && natural && !filtered => limit as usize + 1,
            _ => usize::MAX,
        };
        let mut kvs: Vec<KeyValue> = all.into_iter().take(fetch).collect();
        kvs.retain(|kv| {
            !(request.max_mod_revision != 0 && kv.mod_revision > request.max_mod_revision
                || request.min_mod_revision != 0 && kv.mod_revision < request.min_mod_revision
                || request.max_create_revision != 0 && kv.create_revision > request.max_create_revision
                || request.min_create_revision != 0 && kv.create_revision < request.min_create_revision)
        });
        let number = |kv: &KeyValue| match SortTarget::try_from(request.sort_target).expect("validated") {
            SortTarget::Version => kv.version,
            SortTarget::Create => kv.create_revision,
            SortTarget::Mod => kv.mod_revision,
            SortTarget::Key | SortTarget::Value => 0,
        };
        let text = |kv: &KeyValue| match SortTarget::try_from(request.sort_target).expect("validated") {
            SortTarget::Key => kv.key.clone(),
            SortTarget::Value => kv.value.clone(),
            _ => Bytes::new(),
        };
        let compare = |a: &KeyValue, b: &KeyValue| number(a).cmp(&number(b)).then_with(|| text(a).cmp(&text(b)));
        if request.sort_order == SortOrder::Descend as i32 {
            kvs.sort_by(|a, b| compare(b, a));
        } else {
            kvs.sort_by(compare);
        }
        if request.limit > 0 && kvs.len() > request.limit as usize {
            kvs.truncate(request.limit as usize);
            response.more = true;
        }
        if request.keys_only {
            for kv in &mut kvs {
                kv.value = Bytes::new();
                if request.sort_target != SortTarget::Value as i32 {
                    kv.lease = 0;
                }
            }
        }
        response.kvs = kvs;
        Ok(response)
    }

    /// One page of a range in key order.
    pub fn scan(&self, request: &ScanRequest, seen: Seen) -> Result<ScanPage, Error> {
        let range = RangeRequest {
            key: request.key.clone(),
            range_end: request.range_end.clone(),
            revision: request.revision,
            keys_only: request.keys_only,
            ..Default::default()
        };
        let all = self.range(&range, seen)?.kvs;
        let mut page = ScanPage {
            revision: if request.revision <= 0 {
                seen.rev
            } else {
                request.revision
            },
            header: ResponseHeader::at(seen.rev).expect("it makes one"),
            ..Default::default()
        };
        let mut bytes = 0;
        for kv in all {
            let full = page.kvs.len() >= request.keys_max || bytes >= request.bytes_max;
            if full && !page.kvs.is_empty() {
                page.more = true;
                break;
            }
            bytes += kv.key.len() + kv.value.len();
            page.kvs.push(kv);
        }
        Ok(page)
    }

    /// A transaction that only reads, and how many ranges were read for it.
    pub fn read_txn(&self, request: &TxnRequest, seen: Seen) -> (Result<TxnResponse, Error>, u64) {
        let mut reads = 0;
        let result = self.read_txn_counting(request, seen, &mut reads);
        (result, reads)
    }

    fn read_txn_counting(&self, request: &TxnRequest, seen: Seen, reads: &mut u64) -> Result<TxnResponse, Error> {
        let holds = request.compare.iter().all(|compare| {
            *reads += 1;
            self.holds(compare, seen.rev)
        });
        let ops = if holds { &request.success } else { &request.failure };
        let range_of = |op: &RequestOp| match &op.request {
            Some(RequestOpKind::Range(range)) => range.clone(),
            other => panic!("not a range: {other:?}"),
        };
        for op in ops {
            check_range(&range_of(op), seen)?;
        }
        let mut responses = Vec::new();
        for op in ops {
            *reads += 1;
            let response = self.range(&range_of(op), seen)?;
            responses.push(ResponseOp {
                response: Some(ResponseOpKind::Range(response)),
            });
        }
        Ok(TxnResponse {
            header: ResponseHeader::at(seen.rev),
            succeeded: holds,
            responses,
        })
    }

    /// Events of the keys in a range from revision `from` up to `to`, with the value before each revision.
    pub fn events(&self, start: &[u8], end: &[u8], from: Revision, to: Revision) -> Vec<Event> {
        self.history
            .iter()
            .filter(|change| change.rev >= from && change.rev <= to && in_range(&change.key, start, end))
            .map(|change| {
                let deleted = KeyValue {
                    key: change.key.clone(),
                    mod_revision: change.rev,
                    ..Default::default()
                };
                // etcd does not even look for what was before an event that creates its key.
                let created = change.kv.as_ref().is_some_and(|kv| kv.create_revision == change.rev);
                let before = self.key_at(&change.key, change.rev - 1);
                let r#type = match change.kv {
                    Some(_) => EventType::Put,
                    None => EventType::Delete,
                };
                Event {
                    r#type: r#type as i32,
                    kv: Some(change.kv.clone().unwrap_or(deleted)),
                    prev_kv: before.filter(|_| !created),
                }
            })
            .collect()
    }

    /// Carries out an operation.
    pub fn apply(&mut self, action: &Action) -> Result<Outcome, Error> {
        match action {
            Action::Put(put) => {
                self.check_lease(put)?;
                self.read_before(put);
                let checked = self.check_key(put);
                let response = checked.map(|()| self.put(put));
                self.end();
                let response = response?;
                self.close();
                Ok(Outcome::Put(response))
            }
            Action::DeleteRange(delete) => {
                let response = self.delete_range(delete);
                self.end();
                self.close();
                Ok(Outcome::DeleteRange(response))
            }
            Action::Txn(txn) => {
                let mut path = Vec::new();
                self.paths(txn, &mut path);
                let checked = self.check_txn(txn, &mut path.iter().copied());
                let is_range = |op: &RequestOp| matches!(op.request, Some(RequestOpKind::Range(_)));
                let writes = !txn.success.iter().chain(&txn.failure).all(is_range);
                // Only what does not write goes on in the transaction that compares were read in.
                if writes || checked.is_err() {
                    self.end();
                }
                checked?;
                let mut response = self.txn(txn, &mut path.into_iter());
                self.end();
                self.close();
                response.header = ResponseHeader::at(self.seen.rev);
                Ok(Outcome::Txn(response))
            }
            Action::Compact(compact) => {
                if compact.revision <= self.seen.compacted {
                    return Err(Error::Compacted);
                }
                if compact.revision > self.seen.rev {
                    return Err(Error::FutureRevision);
                }
                self.seen.compacted = compact.revision;
                // Of a key named "compaction", for the revision that comes with it.
                self.read();
                self.end();
                Ok(Outcome::Compact(CompactionResponse {
                    header: ResponseHeader::at(self.seen.rev),
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
                self.set_lease(grant.id, grant.ttl, 0);
                Ok(Outcome::LeaseGrant(LeaseGrantResponse {
                    header: ResponseHeader::at(self.seen.rev),
                    id: grant.id,
                    ttl: grant.ttl,
                    error: String::new(),
                }))
            }
            Action::LeaseRevoke(revoke) => {
                if self.leases.remove(&revoke.id).is_none() {
                    return Err(Error::LeaseNotFound);
                }
                for key in self.attached(revoke.id, self.seen.rev) {
                    self.counts.deletes += 1;
                    self.calls += 1;
                    self.change(key, None);
                }
                self.end();
                self.close();
                self.lease_changes.push(LeaseChange::Revoked { id: revoke.id });
                Ok(Outcome::LeaseRevoke(LeaseRevokeResponse {
                    header: ResponseHeader::at(self.seen.rev),
                }))
            }
            Action::LeaseCheckpoint(request) => {
                for checkpoint in &request.checkpoints {
                    if let Some(&(ttl, _)) = self.leases.get(&checkpoint.id) {
                        self.set_lease(checkpoint.id, ttl, checkpoint.remaining_ttl);
                    }
                }
                Ok(Outcome::LeaseCheckpoint)
            }
            other => unreachable!("the model is not asked for {other:?}"),
        }
    }

    fn set_lease(&mut self, id: i64, ttl: i64, remaining_ttl: i64) {
        self.leases.insert(id, (ttl, remaining_ttl));
        self.lease_changes.push(LeaseChange::Granted { id, ttl, remaining_ttl });
    }

    fn change(&mut self, key: Bytes, kv: Option<KeyValue>) {
        self.history.push(Change {
            rev: self.seen.rev + 1,
            sub: self.subs,
            key,
            kv,
        });
        self.subs += 1;
    }

    fn close(&mut self) {
        self.seen.rev = self.current();
        self.subs = 0;
    }

    fn read(&mut self) {
        self.counts.ranges += 1;
        self.calls += 1;
    }

    fn read_before(&mut self, put: &PutRequest) {
        if put.ignore_value || put.ignore_lease || put.prev_kv {
            self.read();
        }
    }

    /// Ends a transaction of etcd's store.
    fn end(&mut self) {
        if std::mem::take(&mut self.calls) > 1 {
            self.counts.txns += 1;
        }
    }

    fn check_lease(&self, put: &PutRequest) -> Result<(), Error> {
        if put.lease != 0 && !self.leases.contains_key(&put.lease) {
            return Err(Error::LeaseNotFound);
        }
        Ok(())
    }

    fn check_key(&self, put: &PutRequest) -> Result<(), Error> {
        if (put.ignore_value || put.ignore_lease) && self.key_at(&put.key, self.seen.rev).is_none() {
            return Err(Error::KeyNotFound);
        }
        Ok(())
    }

    fn put(&mut self, put: &PutRequest) -> PutResponse {
        let before = self.key_at(&put.key, self.current());
        let rev = self.seen.rev + 1;
        let mut kv = KeyValue {
            key: put.key.clone(),
            create_revision: rev,
            mod_revision: rev,
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
        self.calls += 1;
        self.counts.puts += 1;
        self.counts.put_bytes += (kv.key.len() + kv.value.len()) as u64;
        self.change(put.key.clone(), Some(kv));
        PutResponse {
            header: ResponseHeader::at(rev),
            prev_kv: before.filter(|_| put.prev_kv),
        }
    }

    fn delete_range(&mut self, delete: &DeleteRangeRequest) -> DeleteRangeResponse {
        if delete.prev_kv {
            self.read();
        }
        self.calls += 1;
        self.counts.deletes += 1;
        let doomed: Vec<KeyValue> = self
            .keys_at(self.current())
            .into_values()
            .filter(|kv| in_range(&kv.key, &delete.key, &delete.range_end))
            .collect();
        for kv in &doomed {
            self.change(kv.key.clone(), None);
        }
        DeleteRangeResponse {
            header: ResponseHeader::at(self.current()),
            deleted: doomed.len() as i64,
            prev_kvs: if delete.prev_kv { doomed } else { Vec::new() },
        }
    }

    fn paths(&mut self, txn: &TxnRequest, path: &mut Vec<bool>) {
        let holds = txn.compare.iter().all(|compare| {
            self.read();
            self.holds(compare, self.seen.rev)
        });
        path.push(holds);
        for op in if holds { &txn.success } else { &txn.failure } {
            if let Some(RequestOpKind::Txn(nested)) = &op.request {
                self.paths(nested, path);
            }
        }
    }

    fn check_txn(&mut self, txn: &TxnRequest, path: &mut impl Iterator<Item = bool>) -> Result<(), Error> {
        for op in if path.next().unwrap() {
            &txn.success
        } else {
            &txn.failure
        } {
            match op.request.as_ref().expect("validated") {
                RequestOpKind::Range(range) => check_range(range, self.seen)?,
                RequestOpKind::Put(put) => {
                    self.check_lease(put)?;
                    self.read_before(put);
                    self.check_key(put)?;
                }
                RequestOpKind::DeleteRange(_) => {}
                RequestOpKind::Txn(nested) => self.check_txn(nested, path)?,
            }
        }
        Ok(())
    }

    fn txn(&mut self, txn: &TxnRequest, path: &mut impl Iterator<Item = bool>) -> TxnResponse {
        let succeeded = path.next().unwrap();
        let mut responses = Vec::new();
        for op in if succeeded { &txn.success } else { &txn.failure } {
            let response = match op.request.as_ref().expect("validated") {
                RequestOpKind::Range(range) => {
                    let seen = Seen {
                        rev: self.current(),
                        compacted: self.seen.compacted,
                    };
                    self.read();
                    ResponseOpKind::Range(self.range(range, seen).expect("it was checked"))
                }
                RequestOpKind::Put(put) => {
                    self.read_before(put);
                    ResponseOpKind::Put(self.put(put))
                }
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

    fn holds(&self, compare: &Compare, at: Revision) -> bool {
        let kvs: Vec<KeyValue> = self
            .keys_at(at)
            .into_values()
            .filter(|kv| in_range(&kv.key, &compare.key, &compare.range_end))
            .collect();
        if kvs.is_empty() {
            return compare.target != CompareTarget::Value as i32 && satisfies(compare, &KeyValue::default());
        }
        kvs.iter().all(|kv| satisfies(compare, kv))
    }
}

fn check_range(range: &RangeRequest, seen: Seen) -> Result<(), Error> {
    if range.revision == 0 {
        Ok(())
    } else if range.revision > seen.rev {
        Err(Error::FutureRevision)
    } else if range.revision < seen.compacted {
        Err(Error::Compacted)
    } else {
        Ok(())
    }
}

fn satisfies(compare: &Compare, kv: &KeyValue) -> bool {
    use std::cmp::Ordering;
    let number = |field: i64, wanted: Option<i64>| field.cmp(&wanted.unwrap_or(0));
    let wanted = compare.target_union.clone();
    // The value given counts only if it is of the kind that the target names.
    let order = match compare.target {
        0 => number(
            kv.version,
            wanted.and_then(|w| if let TargetUnion::Version(v) = w { Some(v) } else { None }),
        ),
        1 => number(
            kv.create_revision,
            wanted.and_then(|w| {
                if let TargetUnion::CreateRevision(v) = w {
                    Some(v)
                } else {
                    None
                }
            }),
        ),
        2 => number(
            kv.mod_revision,
            wanted.and_then(|w| {
                if let TargetUnion::ModRevision(v) = w {
                    Some(v)
                } else {
                    None
                }
            }),
        ),
        3 => kv.value.cmp(&match wanted {
            Some(TargetUnion::Value(value)) => value,
            _ => Bytes::new(),
        }),
        4 => number(
            kv.lease,
            wanted.and_then(|w| if let TargetUnion::Lease(v) = w { Some(v) } else { None }),
        ),
        _ => Ordering::Equal,
    };
    match compare.result {
        0 => order == Ordering::Equal,
        1 => order == Ordering::Greater,
        2 => order == Ordering::Less,
        3 => order != Ordering::Equal,
        _ => true,
    }
}
