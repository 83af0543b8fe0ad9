//! Clients that keep a node busy and write down everything that it acknowledged.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, GetOptions, KeyValue, LeaseGrantOptions, PutOptions,
    ResponseHeader, Txn, TxnOp, TxnOpResponse, TxnResponse, WatchOptions,
};
use fastrand::Rng;

use crate::check::Store;
use crate::model::{Action, Branches, Event, Record, Step, Value, key_of};
use crate::support::{self, code};

/// A call that takes longer than this on a node that was not stopped is a finding.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Leases with this time to live, in seconds, expire while the test runs.
pub(crate) const SHORT_TTL: i64 = 2;
/// These do not.
pub(crate) const LONG_TTL: i64 = 3600;

/// A write with its answer.
#[derive(Debug)]
pub(crate) struct Acknowledged {
    pub(crate) action: Action,
    pub(crate) succeeded: bool,
    /// The pairs that it replaced or deleted, in order.
    pub(crate) previous: Vec<(String, Record)>,
}

/// What a range held at a revision.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) start: String,
    pub(crate) end: String,
    pub(crate) found: Vec<(String, Record)>,
}

/// What one watcher saw, by revision.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) from: i64,
    pub(crate) prefix: &'static str,
    pub(crate) with_previous: bool,
    pub(crate) seen: Vec<(i64, Vec<Event>)>,
}

/// What is known about a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeaseState {
    /// It was granted.
    Alive,
    /// A grant or a revocation was asked for and not answered.
    Unsure,
    /// It was revoked or has expired.
    Ended,
}

#[derive(Debug, Clone)]
pub(crate) struct Lease {
    pub(crate) ttl: i64,
    pub(crate) asked: Instant,
    pub(crate) state: LeaseState,
}

/// Everything that one round of load did.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    /// By revision.
    pub(crate) acknowledged: BTreeMap<i64, Acknowledged>,
    /// Answered writes that changed nothing, with the revision of the answer.
    pub(crate) without_effect: Vec<(i64, Acknowledged)>,
    /// Answered revocations of leases. The answer does not say whether keys went with it, so whether the revision is its
    /// own.
    pub(crate) revoked: Vec<(i64, i64)>,
    /// Writes that were under way when the node went.
    pub(crate) unanswered: Vec<Action>,
    /// Reads with their revision.
    pub(crate) reads: Vec<(i64, Read)>,
    pub(crate) watched: Vec<Watched>,
    pub(crate) compacted: Vec<i64>,
    pub(crate) compactions_unanswered: Vec<i64>,
    /// The highest revision that any answer mentioned.
    pub(crate) revision_max: i64,
    pub(crate) answers: u64,
}

/// What the clients of one round share.
pub(crate) struct Load {
    pub(crate) url: String,
    /// Everything up to here was verified before this round; only this is compacted, so that nothing is lost to sight.
    pub(crate) verified: i64,
    /// Whether workers compact. Where they do not, there is something left for the one that does so at the end.
    compacts: bool,
    /// Set before the node is stopped: from then on, calls may fail.
    pub(crate) stopping: AtomicBool,
    journal: Mutex<Journal>,
    leases: Arc<Mutex<BTreeMap<i64, Lease>>>,
    highest: AtomicI64,
}

impl Load {
    pub(crate) fn new(url: &str, store: &Store, compacts: bool) -> Arc<Load> {
        Arc::new(Load {
            url: url.to_owned(),
            verified: store.verified(),
            compacts,
            stopping: AtomicBool::new(false),
            journal: Mutex::default(),
            leases: store.leases.clone(),
            highest: AtomicI64::new(store.verified()),
        })
    }

    /// What was written down. To be called when all clients have ended.
    pub(crate) fn take_journal(&self) -> Journal {
        let mut journal = std::mem::take(&mut *self.journal());
        journal.revision_max = self.highest.load(Ordering::Acquire);
        journal
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leases(&self) -> MutexGuard<'_, BTreeMap<i64, Lease>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A revision below which no later answer may be.
    fn floor(&self) -> i64 {
        self.highest.load(Ordering::Acquire)
    }

    fn answered(&self, header: Option<&ResponseHeader>, floor: i64, changed: bool) -> i64 {
        let revision = header.expect("every answer has a header").revision();
        let in_order = if changed { revision > floor } else { revision >= floor };
        assert!(
            in_order,
            "an answer with revision {revision} came after one with {floor}"
        );
        self.highest.fetch_max(revision, Ordering::AcqRel);
        self.journal().answers += 1;
        revision
    }

    fn record(&self, revision: i64, changed: bool, write: Acknowledged) {
        let mut journal = self.journal();
        if !changed {
            journal.without_effect.push((revision, write));
        } else if let Some(other) = journal.acknowledged.insert(revision, write) {
            panic!("revision {revision} was acknowledged twice, also for {other:?}");
        }
    }
}

/// Why a client stops: the node went, while this call was under way.
struct Gone;

/// Runs one call. `Ok(Err(_))` is a refusal with this gRPC code, which changed nothing.
async fn call<T>(load: &Load, call: impl Future<Output = Result<T, Error>>) -> Result<Result<T, i32>, Gone> {
    let cause = match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(answer)) => return Ok(Ok(answer)),
        Ok(Err(error)) => match support::status(&error) {
            Some((code::NOT_FOUND | code::OUT_OF_RANGE | code::INVALID_ARGUMENT | code::FAILED_PRECONDITION, _)) => {
                return Ok(Err(support::status(&error).map_or(0, |(code, _)| code)));
            }
            _ => format!("{error:?}"),
        },
        Err(_) => format!("no answer within {CALL_TIMEOUT:?}"),
    };
    assert!(
        load.stopping.load(Ordering::Acquire),
        "a call failed while the node ran: {cause}"
    );
    Err(Gone)
}

fn end_of(key: &str) -> String {
    format!("{key}\0")
}

/// The first key after all that begin with `prefix`, which ends in an ASCII character.
fn prefix_end(prefix: &str) -> String {
    let mut bytes = prefix.as_bytes().to_vec();
    if let Some(last) = bytes.last_mut() {
        *last += 1;
    }
    String::from_utf8(bytes).expect("prefixes are ASCII")
}

fn pairs(kvs: &[KeyValue]) -> impl Iterator<Item = (String, Record)> {
    kvs.iter().map(|kv| (key_of(kv), Record::of(kv)))
}

/// One client: its calls follow from its seed, its answers do not.
pub(crate) struct Worker {
    load: Arc<Load>,
    client: Client,
    random: Rng,
    /// Makes values unique.
    name: String,
    count: u64,
}

impl Worker {
    pub(crate) async fn new(load: &Arc<Load>, name: String, seed: u64) -> Worker {
        Worker {
            client: support::client(&load.url).await,
            load: load.clone(),
            random: Rng::with_seed(seed),
            name,
            count: 0,
        }
    }

    /// Works until the node goes.
    pub(crate) async fn run(mut self) {
        while !self.load.stopping.load(Ordering::Acquire) {
            let done = match self.random.u8(..100) {
                0..28 => {
                    let key = self.hot_key();
                    self.put_one(key, 0).await
                }
                28..46 => {
                    let key = self.cold_key();
                    self.put_one(key, 0).await
                }
                46..48 => self.put_large().await,
                48..62 => self.transaction().await,
                62..65 => {
                    let key = self.cold_key();
                    self.delete(key).await
                }
                65..68 => {
                    let key = self.hot_key();
                    self.delete(key).await
                }
                68..71 => self.delete_some().await,
                71..83 => self.read().await,
                83..86 => self.grant().await,
                86..92 => self.put_leased().await,
                92..95 => self.revoke().await,
                95..97 if self.load.compacts => self.compact().await,
                _ => self.read_several().await,
            };
            if done.is_err() {
                return;
            }
        }
    }

    /// Compacts once, so that the node goes in the midst of it.
    pub(crate) async fn compact_at_the_end(mut self) {
        // Whether it is answered or not, it is written down.
        let _ = self.compact().await;
    }

    fn hot_key(&mut self) -> String {
        format!("hot/{}", self.random.u8(..5))
    }

    fn cold_key(&mut self) -> String {
        format!("cold/{:03}", self.random.u16(..400))
    }

    fn value(&mut self, bytes: usize) -> Vec<u8> {
        self.count += 1;
        let mut value = format!("{}-{}:", self.name, self.count).into_bytes();
        // Not compressible, so that sizes on disk are what they seem.
        let mut filler = Rng::with_seed(self.count);
        while value.len() < bytes {
            value.push(filler.u8(..));
        }
        value
    }

    async fn put_one(&mut self, key: String, lease: i64) -> Result<(), Gone> {
        let bytes = self.random.usize(..300);
        self.put(key, lease, bytes).await
    }

    async fn put_large(&mut self) -> Result<(), Gone> {
        let key = format!("big/{}", self.random.u8(..4));
        let bytes = self.random.usize(50_000..250_000);
        self.put(key, 0, bytes).await
    }

    async fn put(&mut self, key: String, lease: i64, bytes: usize) -> Result<(), Gone> {
        let value = self.value(bytes);
        let step = Step::Put {
            key: key.clone(),
            value: Value::of(&value),
            lease,
        };
        let action = Action::Write(Branches::always(vec![step]));
        let floor = self.load.floor();
        let options = PutOptions::new().with_prev_key().with_lease(lease);
        match call(&self.load, self.client.put(key, value, Some(options))).await {
            Ok(Ok(answer)) => {
                let revision = self.load.answered(answer.header(), floor, true);
                let previous = answer.prev_key().map(|kv| (key_of(kv), Record::of(kv)));
                let write = Acknowledged {
                    action,
                    succeeded: true,
                    previous: previous.into_iter().collect(),
                };
                self.load.record(revision, true, write);
                Ok(())
            }
            Ok(Err(refused)) => {
                assert_eq!((refused, lease != 0), (code::NOT_FOUND, true), "a put was refused");
                Ok(())
            }
            Err(gone) => {
                self.load.journal().unanswered.push(action);
                Err(gone)
            }
        }
    }

    async fn delete(&mut self, key: String) -> Result<(), Gone> {
        let end = end_of(&key);
        self.delete_range(key, end).await
    }

    async fn delete_some(&mut self) -> Result<(), Gone> {
        let start = format!("cold/{:02}", self.random.u8(..40));
        let end = prefix_end(&start);
        self.delete_range(start, end).await
    }

    async fn delete_range(&mut self, start: String, end: String) -> Result<(), Gone> {
        let action = Action::Write(Branches::always(vec![Step::Delete {
            start: start.clone(),
            end: end.clone(),
        }]));
        let floor = self.load.floor();
        let options = DeleteOptions::new().with_range(end).with_prev_key();
        match call(&self.load, self.client.delete(start, Some(options))).await {
            Ok(answer) => {
                let answer = answer.expect("a delete is never refused");
                let changed = answer.deleted() > 0;
                assert_eq!(answer.deleted() as usize, answer.prev_kvs().len());
                let revision = self.load.answered(answer.header(), floor, changed);
                let write = Acknowledged {
                    action,
                    succeeded: true,
                    previous: pairs(answer.prev_kvs()).collect(),
                };
                self.load.record(revision, changed, write);
                Ok(())
            }
            Err(gone) => {
                self.load.journal().unanswered.push(action);
                Err(gone)
            }
        }
    }

    /// Writes several keys of a group, often more: under a condition, with an inner transaction, with deletions.
    async fn transaction(&mut self) -> Result<(), Gone> {
        let group = self.random.u8(..6);
        let (mut steps, mut operations) = (Vec::new(), Vec::new());
        let members = self.random.u8(2..6);
        self.put_group(group, members, &mut steps, &mut operations);
        if self.random.u8(..4) == 0 {
            let other = (group + 1) % 6;
            let (start, end) = (format!("txn/{other}/"), prefix_end(&format!("txn/{other}/")));
            push_delete(start, end, &mut steps, &mut operations);
        }
        if self.random.u8(..3) == 0 {
            let key = self.cold_key();
            let end = end_of(&key);
            push_delete(key, end, &mut steps, &mut operations);
        }
        if self.random.u8(..3) == 0 {
            let (branches, txn) = self.conditional((group + 2) % 6);
            steps.push(Step::Txn(branches));
            operations.push(TxnOp::txn(txn));
        }
        let (branches, txn) = if self.random.u8(..3) == 0 {
            let (mut branches, _) = self.conditional((group + 3) % 6);
            let mut other_operations = Vec::new();
            let mut other_steps = Vec::new();
            self.put_group((group + 4) % 6, 3, &mut other_steps, &mut other_operations);
            let condition = condition(&mut branches);
            branches.then = steps;
            branches.or_else = other_steps;
            let txn = Txn::new()
                .when([condition])
                .and_then(operations)
                .or_else(other_operations);
            (branches, txn)
        } else {
            (Branches::always(steps), Txn::new().and_then(operations))
        };

        let action = Action::Write(branches);
        let floor = self.load.floor();
        match call(&self.load, self.client.txn(txn)).await {
            Ok(answer) => {
                let answer = answer.expect("a transaction is never refused");
                let (mut previous, mut changed) = (Vec::new(), false);
                changes(&answer, &mut previous, &mut changed);
                let revision = self.load.answered(answer.header(), floor, changed);
                let write = Acknowledged {
                    action,
                    succeeded: answer.succeeded(),
                    previous,
                };
                self.load.record(revision, changed, write);
                Ok(())
            }
            Err(gone) => {
                self.load.journal().unanswered.push(action);
                Err(gone)
            }
        }
    }

    fn put_group(&mut self, group: u8, members: u8, steps: &mut Vec<Step>, operations: &mut Vec<TxnOp>) {
        for member in 0..members {
            let key = format!("txn/{group}/{member}");
            let bytes = self.random.usize(..200);
            let value = self.value(bytes);
            steps.push(Step::Put {
                key: key.clone(),
                value: Value::of(&value),
                lease: 0,
            });
            operations.push(TxnOp::put(key, value, Some(PutOptions::new().with_prev_key())));
        }
    }

    /// If a hot key exists, writes a part of the group, otherwise all of it.
    fn conditional(&mut self, group: u8) -> (Branches, Txn) {
        let mut branches = Branches::always(Vec::new());
        branches.if_exists = Some(self.hot_key());
        let (mut then, mut or_else) = (Vec::new(), Vec::new());
        self.put_group(group, 2, &mut branches.then, &mut then);
        self.put_group(group, 5, &mut branches.or_else, &mut or_else);
        let txn = Txn::new()
            .when([condition(&mut branches)])
            .and_then(then)
            .or_else(or_else);
        (branches, txn)
    }

    async fn read(&mut self) -> Result<(), Gone> {
        let (start, end) = self.range();
        let floor = self.load.floor();
        let options = GetOptions::new().with_range(end.clone());
        let answer = call(&self.load, self.client.get(start.clone(), Some(options))).await?;
        let answer = answer.expect("a read is never refused");
        let revision = self.load.answered(answer.header(), floor, false);
        let found = pairs(answer.kvs()).collect();
        self.load.journal().reads.push((revision, Read { start, end, found }));
        Ok(())
    }

    /// Several ranges in one transaction, which must all be of one revision.
    async fn read_several(&mut self) -> Result<(), Gone> {
        let ranges: Vec<_> = (0..3).map(|_| self.range()).collect();
        let gets: Vec<_> = ranges
            .iter()
            .map(|(start, end)| TxnOp::get(start.clone(), Some(GetOptions::new().with_range(end.clone()))))
            .collect();
        let floor = self.load.floor();
        let answer = call(&self.load, self.client.txn(Txn::new().and_then(gets))).await?;
        let answer = answer.expect("a read is never refused");
        let revision = self.load.answered(answer.header(), floor, false);
        for ((start, end), part) in ranges.into_iter().zip(answer.op_responses()) {
            let TxnOpResponse::Get(part) = part else {
                panic!("a read was answered with {part:?}");
            };
            let found = pairs(part.kvs()).collect();
            self.load.journal().reads.push((revision, Read { start, end, found }));
        }
        Ok(())
    }

    fn range(&mut self) -> (String, String) {
        let key = match self.random.u8(..6) {
            0 => self.hot_key(),
            1 => self.cold_key(),
            other => {
                let prefix = match other {
                    2 => format!("txn/{}/", self.random.u8(..6)),
                    3 => "hot/".to_owned(),
                    4 => format!("cold/{}", self.random.u8(..4)),
                    _ => "lease/".to_owned(),
                };
                let end = prefix_end(&prefix);
                return (prefix, end);
            }
        };
        let end = end_of(&key);
        (key, end)
    }

    async fn grant(&mut self) -> Result<(), Gone> {
        let id = self.random.i64(1..i64::MAX);
        let ttl = if self.random.bool() { SHORT_TTL } else { LONG_TTL };
        let mut lease = Lease {
            ttl,
            asked: Instant::now(),
            state: LeaseState::Unsure,
        };
        let floor = self.load.floor();
        let options = LeaseGrantOptions::new().with_id(id);
        let answer = call(&self.load, self.client.lease_grant(ttl, Some(options))).await;
        if let Ok(answer) = &answer {
            let answer = answer.as_ref().expect("a lease with a new id is never refused");
            assert_eq!((answer.id(), answer.ttl()), (id, ttl));
            self.load.answered(answer.header(), floor, false);
            lease.state = LeaseState::Alive;
        }
        self.load.leases().insert(id, lease);
        answer.map(|_| ())
    }

    fn some_lease(&mut self) -> Option<i64> {
        let leases = self.load.leases();
        let alive: Vec<i64> = leases
            .iter()
            .filter(|(_, lease)| lease.state == LeaseState::Alive)
            .map(|(id, _)| *id)
            .collect();
        drop(leases);
        self.random.choice(alive)
    }

    async fn put_leased(&mut self) -> Result<(), Gone> {
        let Some(lease) = self.some_lease() else {
            return self.grant().await;
        };
        let key = format!("lease/{}", self.random.u8(..30));
        self.put_one(key, lease).await
    }

    async fn revoke(&mut self) -> Result<(), Gone> {
        let Some(id) = self.some_lease() else {
            return self.grant().await;
        };
        let set = |state| {
            if let Some(lease) = self.load.leases().get_mut(&id) {
                lease.state = state;
            }
        };
        let floor = self.load.floor();
        match call(&self.load, self.client.lease_revoke(id)).await {
            Ok(Ok(answer)) => {
                set(LeaseState::Ended);
                let revision = self.load.answered(answer.header(), floor, false);
                self.load.journal().revoked.push((revision, id));
                Ok(())
            }
            // Another client was faster, or it has expired.
            Ok(Err(refused)) => {
                assert_eq!(refused, code::NOT_FOUND);
                set(LeaseState::Ended);
                Ok(())
            }
            Err(gone) => {
                self.load.journal().unanswered.push(Action::Revoke(id));
                let mut leases = self.load.leases();
                // Another client may know by now that it has ended.
                if let Some(lease) = leases.get_mut(&id).filter(|lease| lease.state == LeaseState::Alive) {
                    lease.state = LeaseState::Unsure;
                }
                Err(gone)
            }
        }
    }

    async fn compact(&mut self) -> Result<(), Gone> {
        if self.load.verified < 2 {
            return Ok(());
        }
        // Mostly all that may go, sometimes less.
        let less = if self.random.bool() { 0 } else { self.random.i64(0..200) };
        let revision = (self.load.verified - less).max(1);
        let floor = self.load.floor();
        match call(&self.load, self.client.compact(revision, None)).await {
            Ok(Ok(answer)) => {
                self.load.answered(answer.header(), floor, false);
                self.load.journal().compacted.push(revision);
                Ok(())
            }
            // It was compacted before.
            Ok(Err(refused)) => {
                assert_eq!(refused, code::OUT_OF_RANGE);
                Ok(())
            }
            Err(gone) => {
                self.load.journal().compactions_unanswered.push(revision);
                Err(gone)
            }
        }
    }
}

fn condition(branches: &mut Branches) -> Compare {
    let key = branches.if_exists.clone().expect("it has a condition");
    Compare::version(key, CompareOp::Greater, 0)
}

fn push_delete(start: String, end: String, steps: &mut Vec<Step>, operations: &mut Vec<TxnOp>) {
    let options = DeleteOptions::new().with_range(end.clone()).with_prev_key();
    operations.push(TxnOp::delete(start.clone(), Some(options)));
    steps.push(Step::Delete { start, end });
}

/// Collects what a transaction replaced and deleted, and whether it changed anything.
fn changes(answer: &TxnResponse, previous: &mut Vec<(String, Record)>, changed: &mut bool) {
    for part in answer.op_responses() {
        match part {
            TxnOpResponse::Put(put) => {
                *changed = true;
                previous.extend(put.prev_key().map(|kv| (key_of(kv), Record::of(kv))));
            }
            TxnOpResponse::Delete(delete) => {
                *changed |= delete.deleted() > 0;
                previous.extend(pairs(delete.prev_kvs()));
            }
            TxnOpResponse::Txn(inner) => changes(&inner, previous, changed),
            TxnOpResponse::Get(_) => {}
        }
    }
}

/// Turns one watch response into events by revision.
pub(crate) fn events_of(response: &etcd_client::WatchResponse) -> Vec<(i64, Vec<Event>)> {
    let mut revisions: Vec<(i64, Vec<Event>)> = Vec::new();
    for event in response.events() {
        let kv = event.kv().expect("every event has a key");
        let put = event.event_type() == etcd_client::EventType::Put;
        let seen = Event {
            key: key_of(kv),
            record: put.then(|| Record::of(kv)),
            previous: event.prev_kv().map(Record::of),
        };
        match revisions.last_mut() {
            Some((revision, events)) if *revision == kv.mod_revision() => events.push(seen),
            _ => revisions.push((kv.mod_revision(), vec![seen])),
        }
    }
    revisions
}

/// Watches a prefix until the node goes.
pub(crate) async fn watch(load: Arc<Load>, from: i64, prefix: &'static str, with_previous: bool) {
    let mut watched = Watched {
        from,
        prefix,
        with_previous,
        seen: Vec::new(),
    };
    let mut options = WatchOptions::new().with_start_revision(from);
    options = if prefix.is_empty() {
        options.with_all_keys()
    } else {
        options.with_prefix()
    };
    if with_previous {
        options = options.with_prev_key();
    }
    let client = support::client(&load.url).await;
    let mut client = client.watch_client().max_decoding_message_size(usize::MAX);
    // It may be too late already: the node may be gone.
    if let Ok(Ok(mut stream)) = tokio::time::timeout(CALL_TIMEOUT, client.watch(prefix, Some(options))).await {
        while let Ok(Some(response)) = stream.message().await {
            if response.canceled() {
                // A compaction may overtake a watcher that begins in the past.
                assert!(response.compact_revision() > from && !with_previous, "{response:?}");
                break;
            }
            let revisions = events_of(&response);
            if let Some((last, _)) = revisions.last() {
                load.highest.fetch_max(*last, Ordering::AcqRel);
            }
            watched.seen.extend(revisions);
        }
    }
    load.journal().watched.push(watched);
}
