//! What clients saw, and whether one store that does one thing at a time could have shown it to them.
//!
//! A second opinion on linearizability that knows neither the log nor the model: requests, answers and their times are all
//! there is. Revisions put everything in an order, so no search is needed. Held against it:
//!
//! - who was answered before another one asked comes before it in that order, and no two writes share a revision;
//! - a key has one value, one first revision and one version at each of its revisions, whoever tells of it;
//! - versions of a key count up while it lives;
//! - a read finds the newest of what is known to be there, and nobody finds a value that nobody put.

use std::collections::{BTreeMap, HashMap};

use api::codec::Action;
use api::kv::{
    KeyValue, PutRequest, RangeRequest, RangeResponse, RequestOp, RequestOpKind, ResponseOp, ResponseOpKind,
    TxnRequest, TxnResponse,
};
use api::{RequestId, Revision};
use bytes::Bytes;
use mvcc::Outcome;

use crate::Micros;

/// When a request was made, and when it was answered.
pub type Times = (Micros, Micros);

/// A key as it was when a revision was new, as far as anybody said.
#[derive(Debug, Default, Clone, PartialEq)]
struct Version {
    create_revision: Option<Revision>,
    version: Option<i64>,
    value: Option<Bytes>,
    lease: Option<i64>,
}

/// A read of one key: of which revision, and what it found.
struct Look {
    id: RequestId,
    key: Bytes,
    at: Revision,
    found: Option<Revision>,
}

/// What clients saw.
#[derive(Default)]
pub struct Visible {
    /// Revision of each answer, by its times; and whether it is a write that made the revision.
    answers: Vec<(Times, Revision, bool, RequestId)>,
    /// By key and revision.
    versions: HashMap<Bytes, BTreeMap<Revision, Version>>,
    looks: Vec<Look>,
    /// The first thing that does not fit.
    conflict: Option<String>,
}

impl Visible {
    /// A write was answered.
    pub fn wrote(&mut self, id: RequestId, times: Times, action: &Action, outcome: &Outcome) {
        match (action, outcome) {
            (Action::Put(put), Outcome::Put(response)) => {
                let at = revision(&response.header);
                self.answers.push((times, at, true, id));
                self.put(id, put, response.prev_kv.as_ref(), at);
            }
            (Action::DeleteRange(_), Outcome::DeleteRange(response)) => {
                let at = revision(&response.header);
                self.answers.push((times, at, response.deleted > 0, id));
                response.prev_kvs.iter().for_each(|kv| self.learn(id, kv, false));
            }
            (Action::Txn(txn), Outcome::Txn(response)) => {
                let at = revision(&response.header);
                let writes = self.ran(id, txn, response, at);
                self.answers.push((times, at, writes, id));
            }
            (Action::Compact(_), Outcome::Compact(response)) => {
                self.answers.push((times, revision(&response.header), false, id));
            }
            (Action::LeaseGrant(_), Outcome::LeaseGrant(response)) => {
                self.answers.push((times, revision(&response.header), false, id));
            }
            // Whether it deleted anything is not said.
            (Action::LeaseRevoke(_), Outcome::LeaseRevoke(response)) => {
                self.answers.push((times, revision(&response.header), false, id));
            }
            _ => {}
        }
    }

    /// A read was answered; a serializable one has no times that mean anything.
    pub fn read(&mut self, id: RequestId, times: Option<Times>, range: &RangeRequest, response: &RangeResponse) {
        let now = revision(&response.header);
        if let Some(times) = times {
            self.answers.push((times, now, false, id));
        }
        self.looked(id, range, response, now);
    }

    fn looked(&mut self, id: RequestId, range: &RangeRequest, response: &RangeResponse, now: Revision) {
        if range.count_only {
            return;
        }
        for kv in &response.kvs {
            self.learn(id, kv, range.keys_only);
        }
        let at = if range.revision > 0 { range.revision } else { now };
        if range.range_end.is_empty() {
            let found = response.kvs.first().map(|kv| kv.mod_revision);
            let key = range.key.clone();
            self.looks.push(Look { id, key, at, found });
        } else {
            for kv in &response.kvs {
                let (key, found) = (kv.key.clone(), Some(kv.mod_revision));
                self.looks.push(Look { id, key, at, found });
            }
        }
    }

    fn put(&mut self, id: RequestId, put: &PutRequest, before: Option<&KeyValue>, at: Revision) {
        let version = Version {
            value: (!put.ignore_value).then(|| put.value.clone()),
            lease: (!put.ignore_lease).then_some(put.lease),
            ..Default::default()
        };
        self.learn_version(id, &put.key, at, version);
        if let Some(before) = before {
            self.learn(id, before, false);
        }
    }

    /// What a transaction did; whether it wrote anything.
    fn ran(&mut self, id: RequestId, txn: &TxnRequest, response: &TxnResponse, at: Revision) -> bool {
        let branch = if response.succeeded { &txn.success } else { &txn.failure };
        let mut writes = false;
        for (RequestOp { request }, ResponseOp { response }) in branch.iter().zip(&response.responses) {
            match (request, response) {
                (Some(RequestOpKind::Put(put)), Some(ResponseOpKind::Put(response))) => {
                    writes = true;
                    self.put(id, put, response.prev_kv.as_ref(), at);
                }
                (Some(RequestOpKind::DeleteRange(_)), Some(ResponseOpKind::DeleteRange(response))) => {
                    writes |= response.deleted > 0;
                    response.prev_kvs.iter().for_each(|kv| self.learn(id, kv, false));
                }
                // What it sees may be in the middle of its own revision: only what it says of keys counts.
                (Some(RequestOpKind::Range(range)), Some(ResponseOpKind::Range(response))) => {
                    let of_before = response.kvs.iter().filter(|kv| kv.mod_revision < at);
                    of_before.for_each(|kv| self.learn(id, kv, range.keys_only));
                }
                (Some(RequestOpKind::Txn(nested)), Some(ResponseOpKind::Txn(response))) => {
                    writes |= self.ran(id, nested, response, at);
                }
                _ => {}
            }
        }
        writes
    }

    fn learn(&mut self, id: RequestId, kv: &KeyValue, keys_only: bool) {
        let version = Version {
            create_revision: Some(kv.create_revision),
            version: Some(kv.version),
            value: (!keys_only).then(|| kv.value.clone()),
            lease: (!keys_only).then_some(kv.lease),
        };
        self.learn_version(id, &kv.key, kv.mod_revision, version);
    }

    fn learn_version(&mut self, id: RequestId, key: &Bytes, at: Revision, new: Version) {
        let known = self.versions.entry(key.clone()).or_default().entry(at).or_default();
        let before = known.clone();
        let agree = merge(&mut known.create_revision, new.create_revision)
            & merge(&mut known.version, new.version)
            & merge(&mut known.value, new.value.clone())
            & merge(&mut known.lease, new.lease);
        if !agree {
            self.conflict.get_or_insert(format!(
                "request {id} tells {new:?} of {key:?} at {at}, others {before:?}"
            ));
        }
    }

    /// Whether it all fits together. What does not, in words.
    pub fn check(&self) -> Result<(), String> {
        if let Some(conflict) = &self.conflict {
            return Err(conflict.clone());
        }
        self.check_order()?;
        self.check_versions()?;
        self.looks.iter().try_for_each(|look| self.check_look(look))
    }

    fn check_order(&self) -> Result<(), String> {
        let mut made = HashMap::new();
        for (_, at, writes, id) in &self.answers {
            if *writes && let Some(other) = made.insert(*at, *id) {
                return Err(format!("requests {other} and {id} both made revision {at}"));
            }
        }
        let mut by_end: Vec<_> = self.answers.iter().collect();
        by_end.sort_by_key(|((_, end), ..)| *end);
        let mut by_begin: Vec<_> = self.answers.iter().collect();
        by_begin.sort_by_key(|((begin, _), ..)| *begin);
        let mut ended = by_end.into_iter().peekable();
        let mut newest: Option<(Revision, RequestId)> = None;
        for ((begin, _), at, writes, id) in by_begin {
            while let Some(((_, _), at, _, id)) = ended.next_if(|((_, end), ..)| end < begin) {
                newest = newest.max(Some((*at, *id)));
            }
            let Some((before, other)) = newest else { continue };
            if *at < before || (*writes && *at == before) {
                return Err(format!(
                    "request {id} is at revision {at}, though request {other} had ended at {before} before it began"
                ));
            }
        }
        Ok(())
    }

    fn check_versions(&self) -> Result<(), String> {
        for (key, versions) in &self.versions {
            let mut before: Option<(Revision, i64, Revision)> = None;
            for (&at, version) in versions {
                let (Some(create), Some(number)) = (version.create_revision, version.version) else {
                    continue;
                };
                let begins = create == at;
                if create > at || number < 1 || begins != (number == 1) {
                    return Err(format!(
                        "{key:?} is created at {create} and has version {number} at {at}"
                    ));
                }
                if let Some((then, count, created)) = before {
                    let same_life = created == create;
                    if (same_life && number <= count) || (!same_life && create <= then) {
                        return Err(format!(
                            "{key:?} has version {count} at {then}, created at {created}; and version {number} at {at}, created at {create}"
                        ));
                    }
                }
                before = Some((at, number, create));
            }
        }
        Ok(())
    }

    fn check_look(&self, look: &Look) -> Result<(), String> {
        let Look { id, key, at, found } = look;
        let Some(versions) = self.versions.get(key) else {
            return Ok(());
        };
        let newest = versions.range(..=*at).next_back().map(|(revision, _)| *revision);
        match found {
            // Someone knows of a newer one.
            Some(found) if Some(*found) != newest => Err(format!(
                "read {id} at {at} finds {key:?} of {found}, though there is one of {newest:?}"
            )),
            Some(_) => Ok(()),
            // Someone knows that it lived then.
            None => {
                let lives_on = versions.range(at + 1..).next();
                let created = lives_on.and_then(|(_, version)| version.create_revision);
                match created {
                    Some(created) if created <= *at => Err(format!(
                        "read {id} at {at} does not find {key:?}, though it lived from {created} on"
                    )),
                    _ => Ok(()),
                }
            }
        }
    }
}

fn merge<T: PartialEq>(known: &mut Option<T>, new: Option<T>) -> bool {
    match (&*known, new) {
        (Some(known), Some(new)) => *known == new,
        (None, Some(new)) => {
            *known = Some(new);
            true
        }
        (_, None) => true,
    }
}

fn revision(header: &Option<api::kv::ResponseHeader>) -> Revision {
    header.as_ref().map_or(0, |header| header.revision)
}

#[cfg(test)]
mod tests {
    use api::kv::{PutResponse, ResponseHeader};

    use super::*;

    fn put(visible: &mut Visible, id: RequestId, times: Times, key: &'static str, value: &'static str, at: Revision) {
        let request = PutRequest {
            key: key.into(),
            value: value.into(),
            ..Default::default()
        };
        let response = PutResponse {
            header: ResponseHeader::at(at),
            prev_kv: None,
        };
        visible.wrote(id, times, &Action::Put(request), &Outcome::Put(response));
    }

    fn get(visible: &mut Visible, id: RequestId, times: Times, key: &'static str, now: Revision, kv: Option<KeyValue>) {
        let request = RangeRequest {
            key: key.into(),
            ..Default::default()
        };
        let response = RangeResponse {
            header: ResponseHeader::at(now),
            kvs: kv.into_iter().collect(),
            ..Default::default()
        };
        visible.read(id, Some(times), &request, &response);
    }

    fn kv(key: &'static str, value: &'static str, create: Revision, at: Revision, version: i64) -> Option<KeyValue> {
        Some(KeyValue {
            key: key.into(),
            value: value.into(),
            create_revision: create,
            mod_revision: at,
            version,
            lease: 0,
        })
    }

    /// Two puts of a key, one after the other, and what else is added.
    fn after_two(add: impl FnOnce(&mut Visible)) -> Result<(), String> {
        let mut visible = Visible::default();
        put(&mut visible, 1, (0, 10), "a", "one", 2);
        put(&mut visible, 2, (20, 30), "a", "two", 3);
        add(&mut visible);
        visible.check()
    }

    #[test]
    fn what_one_store_could_have_shown_is_accepted() {
        after_two(|_| {}).unwrap();
        after_two(|visible| get(visible, 3, (40, 50), "a", 3, kv("a", "two", 2, 3, 2))).unwrap();
        // It overlaps with the second put, so either is right.
        after_two(|visible| get(visible, 3, (15, 50), "a", 2, kv("a", "one", 2, 2, 1))).unwrap();
        // Someone unknown deleted it.
        after_two(|visible| get(visible, 3, (40, 50), "a", 4, None)).unwrap();
    }

    #[test]
    fn what_no_store_could_have_shown_is_found() {
        let wrong = |add: fn(&mut Visible)| after_two(add).expect_err("it does not fit");
        let stale = wrong(|visible| get(visible, 3, (40, 50), "a", 2, kv("a", "one", 2, 2, 1)));
        assert!(stale.contains("before it began"), "{stale}");
        let old = wrong(|visible| get(visible, 3, (40, 50), "a", 3, kv("a", "one", 2, 2, 1)));
        assert!(old.contains("though there is one of"), "{old}");
        let value = wrong(|visible| get(visible, 3, (40, 50), "a", 3, kv("a", "three", 2, 3, 2)));
        assert!(value.contains("others"), "{value}");
        let version = wrong(|visible| {
            get(visible, 3, (40, 50), "a", 3, kv("a", "two", 2, 3, 2));
            get(visible, 4, (60, 70), "a", 9, kv("a", "x", 2, 9, 2));
        });
        assert!(version.contains("has version"), "{version}");
        let gone = wrong(|visible| {
            get(visible, 3, (40, 50), "a", 3, kv("a", "two", 2, 3, 2));
            get(visible, 4, (60, 70), "b", 5, None);
            get(visible, 5, (60, 70), "b", 7, kv("b", "x", 4, 6, 2));
        });
        assert!(gone.contains("does not find"), "{gone}");
        let shared = wrong(|visible| put(visible, 3, (0, 50), "b", "x", 3));
        assert!(shared.contains("both made"), "{shared}");
    }
}
