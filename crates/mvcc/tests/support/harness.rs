//! Drives a machine and the model side by side, and compares everything that can be seen of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::codec::{Action, MemberChange, MemberChangeKind, Operation, encode_operation};
use api::kv::*;
use api::store::{ScanRequest, WatchCreate, WatchError, WatchOutput, WatchStream};
use api::{Error, RequestId, Revision};
use bytes::Bytes;
use metastore_mvcc::keys::{self, Position, RecordRef};
use metastore_mvcc::machine::{Command, Counts};
use metastore_mvcc::{
    Committed, CompactionProgress, Failure, LeaseChange, Machine, Membership, Options, Outcome, Stream,
};
use prost::Message;
use storage::{Cursor, Engine, KeyRange, View};

use super::model::{Model, Seen};
use super::{Flag, TestEngine, entry, next_output};

/// How many watch streams there are.
pub const STREAMS: usize = 3;

/// What the model knows of a watcher.
struct Watcher {
    create: WatchCreate,
    /// The first revision that it has not been given, as far as outputs say.
    next: Revision,
    /// Whether it was seen to be up to date, or was given anything, since it was created.
    started: bool,
}

struct TestStream<E: Engine> {
    stream: Stream<E>,
    flag: Arc<Flag>,
    /// Whether the last poll found nothing, so that the stream must call when there is something.
    waiting: bool,
    watchers: BTreeMap<i64, Watcher>,
    next_id: i64,
    /// A progress request that must be answered next, and by what.
    progress_due: Option<Revision>,
}

pub struct Harness<E: TestEngine> {
    machine: Option<Machine<E>>,
    engine: Arc<E>,
    _guard: E::Guard,
    options: Options,
    pub model: Model,
    /// What the machine has applied of it.
    pub published: Seen,
    /// Operations of the log entry that is being filled, then finished entries.
    operations: Vec<(RequestId, Action)>,
    entries: Vec<Committed>,
    index: u64,
    term: u64,
    membership: Membership,
    member_changes: Vec<(u64, bool)>,
    expected: Vec<(RequestId, Result<Outcome, Error>)>,
    /// Operations since the last step.
    proposed: u64,
    streams: Vec<TestStream<E>>,
    /// Events that watchers were told since the start, each as often as it was told.
    told: u64,
    next_request: RequestId,
}

fn refused<T>(result: Result<T, Failure>) -> Result<T, Error> {
    match result {
        Ok(value) => Ok(value),
        Err(Failure::Refused(error)) => Err(error),
        Err(Failure::Engine(error)) => panic!("the engine failed: {error}"),
    }
}

impl<E: TestEngine> Harness<E> {
    pub fn new(watch_buffer_events_max: usize, watch_buffer_bytes_max: usize, record_cache_bytes: u64) -> Self {
        let (engine, guard) = E::fresh();
        let options = Options {
            record_cache_bytes,
            // As tight now and then as the other cache.
            list_cache_bytes: record_cache_bytes as usize,
            list_cache_keys_min: 1,
            watch_buffer_events_max,
            watch_buffer_bytes_max,
        };
        let mut harness = Harness {
            machine: None,
            engine,
            _guard: guard,
            options,
            model: Model::default(),
            published: Model::default().seen,
            operations: Vec::new(),
            entries: Vec::new(),
            index: 0,
            term: 1,
            membership: Membership::default(),
            member_changes: Vec::new(),
            expected: Vec::new(),
            proposed: 0,
            streams: Vec::new(),
            told: 0,
            next_request: 1,
        };
        harness.open();
        harness
    }

    fn machine(&mut self) -> &mut Machine<E> {
        self.machine.as_mut().expect("it is open")
    }

    fn open(&mut self) {
        let machine = Machine::open(self.engine.clone(), &self.options).expect("it opens");
        self.streams = (0..STREAMS)
            .map(|_| TestStream {
                stream: machine.hub().stream(),
                flag: Arc::default(),
                waiting: false,
                watchers: BTreeMap::new(),
                next_id: 0,
                progress_due: None,
            })
            .collect();
        self.machine = Some(machine);
        self.told = 0;
    }

    /// Drops the machine, and with it what was proposed but not applied: here all of that is applied first.
    pub fn restart(&mut self) {
        self.apply();
        self.streams.clear();
        self.machine = None;
        self.open();
        let (index, term) = (self.index, self.term);
        let membership = self.membership.clone();
        let machine = self.machine();
        assert_eq!(machine.applied().0, index, "it resumes where it was");
        assert!(machine.applied().1 <= term);
        assert_eq!(**machine.membership(), membership);
        let mut leases: Vec<LeaseChange> = machine.leases().collect();
        leases.sort_by_key(|change| match *change {
            LeaseChange::Granted { id, .. } | LeaseChange::Revoked { id } => id,
        });
        let expected: Vec<LeaseChange> = self
            .model
            .leases
            .iter()
            .map(|(&id, &(ttl, remaining_ttl))| LeaseChange::Granted { id, ttl, remaining_ttl })
            .collect();
        assert_eq!(leases, expected, "leases survive");
        self.check_published();
    }

    /// Proposes an operation: the model carries it out now, the machine at the next [`Harness::apply`].
    pub fn propose(&mut self, action: Action) {
        let id = self.next_request;
        self.next_request += 1;
        let result = self.model.apply(&action);
        self.proposed += 1;
        self.operations.push((id, action));
        self.expected.push((id, result));
    }

    /// Ends the log entry that is being filled.
    pub fn end_entry(&mut self) {
        if !self.operations.is_empty() {
            let operations = std::mem::take(&mut self.operations);
            self.index += 1;
            self.entries.push(entry(self.index, self.term, &operations));
        }
    }

    /// A log entry that is no operation: a new leader's first one, or a change of the configuration.
    pub fn propose_other(&mut self, change: Option<(MemberChangeKind, u64)>) {
        self.end_entry();
        self.index += 1;
        self.term += 1;
        let command = match change {
            Some((kind, member_id)) => {
                let id = self.next_request;
                self.next_request += 1;
                let result = self.change_members(kind, member_id);
                let member = Member {
                    id: member_id,
                    peer_urls: vec![format!("http://{member_id}")],
                    is_learner: member_id.is_multiple_of(2),
                    ..Default::default()
                };
                let change = MemberChange {
                    kind: kind.into(),
                    member: Some(member),
                };
                self.member_changes.push((self.index, result.is_ok()));
                let result = result.map(|()| Outcome::Members(Arc::new(self.membership.clone())));
                self.expected.push((id, result));
                let operation = Operation::new(id, Action::MemberChange(change));
                Command::MemberChange(encode_operation(&operation))
            }
            None => Command::Operations(Bytes::new()),
        };
        self.entries.push(Committed {
            index: self.index,
            term: self.term,
            command,
        });
    }

    fn change_members(&mut self, kind: MemberChangeKind, id: u64) -> Result<(), Error> {
        let Membership { members, removed } = &mut self.membership;
        let at = members.iter().position(|member| member.id == id);
        let voters = members.iter().filter(|member| !member.is_learner).count();
        match (kind, at) {
            _ if removed.contains(&id) => return Err(Error::MemberNotFound),
            (MemberChangeKind::Add, Some(_)) => return Err(Error::MemberExists),
            (MemberChangeKind::Add, None) => {
                members.push(Member {
                    id,
                    peer_urls: vec![format!("http://{id}")],
                    is_learner: id.is_multiple_of(2),
                    ..Default::default()
                });
                members.sort_by_key(|member| member.id);
            }
            (_, None) => return Err(Error::MemberNotFound),
            (MemberChangeKind::Promote, Some(at)) if !members[at].is_learner => return Err(Error::MemberNotLearner),
            (MemberChangeKind::Promote, Some(at)) => members[at].is_learner = false,
            (MemberChangeKind::Remove, Some(at)) if !members[at].is_learner && voters == 1 => {
                return Err(Error::NotEnoughStarted);
            }
            (MemberChangeKind::Remove, Some(at)) => {
                members.remove(at);
                removed.push(id);
                removed.sort_unstable();
            }
        }
        Ok(())
    }

    /// Applies all that is proposed, and compares the outcome.
    pub fn apply(&mut self) {
        self.end_entry();
        let entries = std::mem::take(&mut self.entries);
        let applied = self.machine().apply(&entries).expect("the engine works");
        let replies: Vec<_> = applied
            .replies
            .into_iter()
            .map(|reply| (reply.id, reply.result))
            .collect();
        let expected = std::mem::take(&mut self.expected);
        for (reply, expected) in replies.iter().zip(&expected) {
            assert_eq!(reply, expected, "a reply");
        }
        assert_eq!(replies.len(), expected.len(), "one reply for each operation");
        assert_eq!(applied.member_changes, std::mem::take(&mut self.member_changes));
        let digests: Vec<_> = applied.digests.iter().map(|digest| digest.index).collect();
        assert_eq!(digests, entries.iter().map(|entry| entry.index).collect::<Vec<_>>());
        assert_eq!(applied.lease_changes, std::mem::take(&mut self.model.lease_changes));
        let before = self.published.rev;
        let new = self.model.history.iter().filter(|change| change.rev > before);
        let puts = new.clone().filter(|change| change.kv.is_some()).count() as u64;
        let lengths = new.filter_map(|change| Some(change.key.len() + change.kv.as_ref()?.value.len()));
        let put_bytes = lengths.sum::<usize>() as u64;
        let proposed = std::mem::take(&mut self.proposed);
        let expected = Counts {
            operations: proposed,
            ..std::mem::take(&mut self.model.counts)
        };
        assert_eq!(applied.counts, expected);
        assert_eq!((applied.counts.puts, applied.counts.put_bytes), (puts, put_bytes));
        self.published = self.model.seen;
        self.check_published();
        self.check_wakers(before);
    }

    /// A stream that found nothing when it was polled must call when there is something.
    fn check_wakers(&self, before: Revision) {
        for stream in self.streams.iter().filter(|stream| stream.waiting) {
            let due = stream.watchers.values().any(|watcher| {
                !self
                    .expected_events(watcher, (before + 1).max(watcher.next), self.published.rev)
                    .is_empty()
            });
            assert!(!due || stream.flag.is_set(), "the stream has events and did not call");
        }
    }

    fn check_published(&mut self) {
        let published = self.published;
        let keys = self.model.keys_at(published.rev);
        let digest = self.digest(published.rev);
        let index = self.index;
        let reader = self.machine().reader();
        assert_eq!(reader.revision(), published.rev);
        assert_eq!(reader.compacted(), published.compacted);
        assert_eq!(reader.applied_index(), index);
        assert_eq!(reader.keys(), keys.len() as u64, "live keys");
        let bytes: usize = keys.values().map(|kv| kv.key.len() + kv.value.len()).sum();
        assert_eq!(reader.key_bytes(), bytes as u64, "bytes of live keys");
        assert_eq!(reader.digest(), digest, "digest");
    }

    fn digest(&self, at: Revision) -> u64 {
        let mut newest = BTreeMap::new();
        for change in self.model.history.iter().filter(|change| change.rev <= at) {
            let digest = change.kv.as_ref().map_or(0, |kv| {
                let at = Position {
                    main: change.rev,
                    sub: change.sub,
                };
                keys::Record::digest_of(&kv.key, at, kv.create_revision, kv.version, kv.lease, &kv.value)
            });
            newest.insert(&change.key, digest);
        }
        newest.values().fold(0, |sum: u64, digest| sum.wrapping_add(*digest))
    }

    pub fn range(&mut self, request: &RangeRequest) {
        let expected = self.model.range(request, self.published);
        let got = refused(self.machine().reader().range(request));
        assert_eq!(got, expected, "{request:?}");
    }

    /// The same as its encoding, from the engine, from pages, and from whichever there is.
    pub fn list(&mut self, request: &RangeRequest) {
        let expected = self.model.range(request, self.published);
        let reader = self.machine().reader();
        for cached_only in [true, false, true] {
            let list = match refused(reader.list(request, cached_only)) {
                Ok(None) if cached_only => continue,
                Ok(list) => Ok(list.expect("it is a list")),
                Err(error) => Err(error),
            };
            let got = list.map(|list| {
                let (before, after) = list.frame();
                let mut message = before.encode_to_vec();
                list.kvs.iter().for_each(|piece| message.extend_from_slice(piece));
                message.extend_from_slice(&after.encode_to_vec());
                RangeResponse::decode(&message[..]).expect("it decodes")
            });
            assert_eq!(got, expected, "{request:?}, cached: {cached_only}");
        }
    }

    pub fn read_txn(&mut self, request: &TxnRequest) {
        let (expected, ranges) = self.model.read_txn(request, self.published);
        let mut reads = u64::MAX;
        let got = refused(self.machine().reader().txn(request, &mut reads));
        assert_eq!((got, reads), (expected, ranges), "{request:?}");
    }

    /// Reads a range page by page, the revision pinned by the first page.
    pub fn scan(&mut self, request: &ScanRequest) {
        let mut request = request.clone();
        for _ in 0..100 {
            let expected = self.model.scan(&request, self.published);
            let got = refused(self.machine().reader().scan(&request));
            assert_eq!(got, expected, "{request:?}");
            let Ok(page) = got else { return };
            if !page.more || request.range_end.is_empty() {
                return;
            }
            request.revision = page.revision;
            let last = page.kvs.last().expect("more than nothing");
            request.key = [&last.key[..], &[0]].concat().into();
        }
        panic!("the scan does not end");
    }

    pub fn attached(&mut self, lease: i64) {
        let expected = self.model.attached(lease, self.published.rev);
        let got = refused(self.machine().reader().attached_keys(lease));
        assert_eq!(got, Ok(expected), "keys of lease {lease}");
    }

    pub fn watch(&mut self, stream: usize, create: WatchCreate) {
        let rev = self.published.rev;
        let stream = &mut self.streams[stream];
        let key = if create.key.is_empty() {
            Bytes::from_static(&[0])
        } else {
            create.key.clone()
        };
        let expected = if create.start_revision < 0 {
            Err(WatchError::NegativeRevision)
        } else if !matches!(&create.range_end[..], [] | [0]) && create.range_end <= key {
            Err(WatchError::EmptyRange)
        } else {
            match create.id {
                Some(id) if stream.watchers.contains_key(&id) => Err(WatchError::DuplicateId),
                Some(id) => Ok(id),
                None => {
                    while stream.watchers.contains_key(&stream.next_id) {
                        stream.next_id += 1;
                    }
                    stream.next_id += 1;
                    Ok(stream.next_id - 1)
                }
            }
        };
        let created = stream.stream.create(create.clone());
        assert_eq!(created.map(|created| created.watch_id), expected, "{create:?}");
        let Ok(created) = created else { return };
        assert_eq!(created.revision, rev);
        stream.waiting = false;
        stream.progress_due = None;
        let watcher = Watcher {
            next: if create.start_revision == 0 {
                rev + 1
            } else {
                create.start_revision
            },
            create: WatchCreate { key, ..create },
            started: false,
        };
        stream.watchers.insert(created.watch_id, watcher);
    }

    pub fn cancel(&mut self, stream: usize, pick: usize) {
        let stream = &mut self.streams[stream];
        let id = match stream.watchers.keys().nth(pick % (stream.watchers.len() + 1)) {
            Some(&id) => id,
            None => 999,
        };
        let there = stream.watchers.remove(&id).is_some();
        assert_eq!(stream.stream.cancel(id), there);
        stream.progress_due = None;
    }

    pub fn request_progress(&mut self, stream: usize) {
        let rev = self.published.rev;
        let stream = &mut self.streams[stream];
        let future = stream
            .watchers
            .values()
            .any(|watcher| watcher.create.start_revision > rev);
        // Certain only when the stream was seen to be up to date and nothing happened since.
        let up_to_date = stream.waiting && !stream.flag.is_set() && !stream.watchers.is_empty();
        stream.stream.request_progress();
        if up_to_date && !future {
            assert!(stream.flag.is_set(), "whoever waits is called");
            stream.progress_due = Some(rev);
        } else if up_to_date {
            assert!(
                !stream.flag.is_set(),
                "a watcher that has not begun has no progress, as in etcd"
            );
        }
    }

    pub fn notify_progress(&mut self, stream: usize) {
        self.streams[stream].stream.notify_progress();
    }

    /// Takes up to `outputs_max` outputs from a stream.
    pub fn poll(&mut self, stream: usize, outputs_max: usize) {
        for _ in 0..outputs_max {
            let its = &mut self.streams[stream];
            match next_output(&mut its.stream, &its.flag) {
                Some(output) => {
                    its.waiting = false;
                    self.take_output(stream, output);
                }
                None => {
                    self.streams[stream].waiting = true;
                    self.check_up_to_date(stream);
                    return;
                }
            }
        }
    }

    fn expected_events(&self, watcher: &Watcher, from: Revision, to: Revision) -> Vec<Event> {
        let create = &watcher.create;
        let mut events = self.model.events(&create.key, &create.range_end, from, to);
        events.retain(|event| {
            let put = event.r#type == EventType::Put as i32;
            !(put && create.no_put || !put && create.no_delete)
        });
        if !create.prev_kv {
            events.iter_mut().for_each(|event| event.prev_kv = None);
        }
        events
    }

    fn take_output(&mut self, index: usize, output: WatchOutput) {
        let published = self.published;
        if let Some(revision) = self.streams[index].progress_due.take() {
            assert_eq!(output, WatchOutput::Progress { watch_id: -1, revision });
        }
        match output {
            WatchOutput::Events {
                watch_id,
                revision,
                events,
            } => {
                self.told += events.len() as u64;
                let stream = &self.streams[index];
                let watcher = stream
                    .watchers
                    .get(&watch_id)
                    .expect("events go to watchers that are there");
                let revisions: Vec<Revision> = events
                    .iter()
                    .map(|event| event.kv.as_ref().unwrap().mod_revision)
                    .collect();
                let (first, last) = (revisions[0], *revisions.last().expect("no output is empty"));
                assert!(
                    first >= watcher.next,
                    "revision {first} again, or before its start {}",
                    watcher.next
                );
                assert!(last <= published.rev);
                // What comes live says the last revision in it, what was caught up the newest one.
                let live = revision == last;
                assert!(live || revision == published.rev, "the header says {revision}");
                let expected = self.expected_events(watcher, watcher.next, last);
                assert_eq!(events.len(), expected.len(), "{events:#?} instead of {expected:#?}");
                for (got, expected) in events.iter().zip(expected) {
                    let compacted = expected.kv.as_ref().unwrap().mod_revision <= published.compacted;
                    if compacted && got.prev_kv.is_none() {
                        assert_eq!((got.r#type, &got.kv), (expected.r#type, &expected.kv));
                    } else {
                        assert_eq!(*got, expected);
                    }
                }
                let watcher = self.streams[index].watchers.get_mut(&watch_id).unwrap();
                watcher.next = last + 1;
                watcher.started = true;
            }
            WatchOutput::Progress { watch_id, revision } => {
                assert!(revision <= published.rev);
                let stream = &self.streams[index];
                let of_it = |id: i64| watch_id == -1 || watch_id == id;
                assert!(
                    watch_id == -1 || stream.watchers.contains_key(&watch_id),
                    "progress of nobody"
                );
                for (_, watcher) in stream.watchers.iter().filter(|&(&id, _)| of_it(id)) {
                    assert!(watch_id == -1 || watcher.create.progress_notify);
                    // One for all may have been asked for before this watcher was created; then it says nothing to it.
                    assert!(watch_id == -1 || revision >= watcher.create.start_revision);
                    let missing = self.expected_events(watcher, watcher.next, revision);
                    assert_eq!(missing, [], "progress {revision} before these events");
                }
            }
            WatchOutput::Compacted {
                watch_id,
                compact_revision,
            } => {
                assert_eq!(compact_revision, published.compacted);
                let watcher = self.streams[index].watchers.remove(&watch_id).expect("it is there");
                assert!(watcher.next < published.compacted);
                let lost = self.expected_events(&watcher, watcher.next, published.compacted - 1);
                assert!(
                    !watcher.started || !lost.is_empty(),
                    "it was up to date and lost nothing"
                );
            }
        }
    }

    /// A stream that has nothing to say has said everything.
    fn check_up_to_date(&mut self, index: usize) {
        let published = self.published;
        assert_eq!(
            self.streams[index].progress_due.take(),
            None,
            "the progress that was asked for"
        );
        for watcher in self.streams[index].watchers.values() {
            let missing = self.expected_events(watcher, watcher.next, published.rev);
            assert_eq!(missing, [], "events that the watcher from {} never got", watcher.next);
        }
        for watcher in self.streams[index].watchers.values_mut() {
            watcher.next = watcher.next.max(published.rev + 1);
            watcher.started = true;
        }
    }

    /// A bounded piece of compaction, while operations are proposed but not applied.
    pub fn compact_step(&mut self, keys_max: usize) -> CompactionProgress {
        let progress = self.machine().compact_step(keys_max).expect("the engine works");
        match progress {
            CompactionProgress::Idle => {}
            CompactionProgress::Going { scanned } => assert!(scanned <= keys_max),
            CompactionProgress::Done { revision } => {
                assert_eq!(revision, self.published.compacted);
                self.check_stored(true);
            }
        }
        progress
    }

    /// Ends everything that is under way, and compares all there is.
    pub fn finish(&mut self) {
        self.apply();
        for stream in 0..STREAMS {
            self.poll(stream, usize::MAX);
        }
        let stats = self.machine().hub().stats();
        assert_eq!(stats.events, self.told);
        let watchers: usize = self.streams.iter().map(|stream| stream.watchers.len()).sum();
        assert_eq!(
            (stats.watchers, stats.streams, stats.behind, stats.pending_events),
            (watchers, STREAMS, 0, 0)
        );
        self.check_stored(false);
        self.check_contents();
        let mut steps = 0;
        while self.compact_step(7) != CompactionProgress::Idle {
            steps += 1;
            assert!(steps < 10_000, "compaction does not end");
        }
        let compacted = self.published.compacted;
        assert_eq!(self.machine().reader().compacted_physically(), compacted);
        self.check_stored(true);
        self.check_contents();
        assert!(self.machine().hub().failure().is_none());
        self.streams.clear();
        let stats = self.machine().hub().stats();
        assert_eq!(
            (stats.watchers, stats.streams, stats.behind, stats.pending_events),
            (0, 0, 0, 0)
        );
    }

    /// Compares all keys at every revision that can be read, all leases, and the whole history as a watcher sees it.
    fn check_contents(&mut self) {
        for revision in self.published.compacted.max(1)..=self.published.rev {
            self.range(&RangeRequest {
                key: Bytes::from_static(&[0]),
                range_end: Bytes::from_static(&[0]),
                revision,
                ..Default::default()
            });
        }
        for lease in self.model.leases.keys().copied().collect::<Vec<_>>() {
            self.attached(lease);
        }
        let create = WatchCreate {
            id: Some(1_000_000),
            range_end: Bytes::from_static(&[0]),
            start_revision: self.published.compacted.max(1),
            prev_kv: true,
            ..Default::default()
        };
        self.watch(0, create);
        self.poll(0, usize::MAX);
        assert!(
            self.streams[0].watchers.remove(&1_000_000).is_some(),
            "nothing of it is compacted"
        );
        assert!(self.streams[0].stream.cancel(1_000_000));
    }

    fn dump(&self, family: storage::Family) -> Vec<(Bytes, Bytes)> {
        let view = self.engine.view();
        let mut cursor = view.cursor(family, KeyRange { start: &[], end: None }).unwrap();
        cursor.seek_first().unwrap();
        let mut all = Vec::new();
        while let Some((key, value)) = cursor.entry() {
            all.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
            cursor.next().unwrap();
        }
        all
    }

    /// Compares what lies in the engine with what must, and, once compaction is done, with what may.
    fn check_stored(&mut self, compaction_done: bool) {
        let Seen { rev, compacted } = self.published;
        let history: Vec<_> = self
            .model
            .history
            .iter()
            .filter(|change| change.rev <= rev)
            .cloned()
            .collect();
        let position = |change: &super::model::Change| Position {
            main: change.rev,
            sub: change.sub,
        };

        let mut live = self.model.keys_at(rev);
        let mut tombstones = 0;
        for (key, data) in self.dump(keys::CUR) {
            let record = RecordRef::decode(&data).unwrap();
            let newest = history
                .iter()
                .rev()
                .find(|change| change.key == key)
                .expect("a key of the history");
            assert_eq!(record.at, position(newest));
            if record.tombstone {
                assert_eq!(newest.kv, None);
                assert!(
                    !compaction_done || record.at.main > compacted,
                    "a tombstone that compaction passed"
                );
                tombstones += 1;
            } else {
                let kv = record.to_owned().to_key_value(key.clone());
                assert_eq!(live.remove(&key), Some(kv));
            }
        }
        assert!(live.is_empty(), "keys that are not stored");

        let mut log = BTreeMap::new();
        let mut kept = BTreeMap::new();
        let mut buried = Vec::new();
        for (key, data) in self.dump(keys::REV) {
            let at = keys::position_of(&key).unwrap();
            match key[0] {
                b'l' => drop(log.insert(at, data)),
                b'k' => drop(kept.insert(at, data)),
                b't' => buried.push((at, data)),
                other => panic!("family rev has a key that begins with {other}"),
            }
        }
        for change in &history {
            let at = position(change);
            let same = |data: &Bytes, change: &super::model::Change| {
                let (key, record) = keys::decode_change(data).unwrap();
                let kv = (!record.tombstone).then(|| record.to_owned().to_key_value(Bytes::copy_from_slice(key)));
                key == change.key && record.at == position(change) && kv == change.kv
            };
            let logged = log.remove(&at);
            if change.rev >= compacted {
                assert!(same(&logged.expect("it is logged"), change), "{change:?}");
            } else {
                assert!(
                    !compaction_done || logged.is_none(),
                    "the log before {compacted} is there"
                );
            }
            let previous = history
                .iter()
                .rev()
                .find(|other| other.key == change.key && position(other) < at);
            match (kept.remove(&at), previous) {
                (Some(data), Some(previous)) => {
                    assert!(same(&data, previous));
                    let needed = change.rev > compacted && previous.rev < compacted;
                    assert!(!compaction_done || needed, "{previous:?} is kept for {change:?}");
                }
                (Some(_), None) => panic!("{change:?} has no predecessor that could be kept"),
                (None, Some(previous)) => {
                    let needed = change.rev > compacted && previous.rev < compacted && previous.kv.is_some();
                    assert!(!compaction_done || !needed, "{previous:?} is not kept for {change:?}");
                }
                (None, None) => {}
            }
        }
        assert!(log.is_empty() && kept.is_empty(), "changes that never were");
        for (at, key) in &buried {
            assert!(
                history
                    .iter()
                    .any(|change| position(change) == *at && change.key == key && change.kv.is_none())
            );
            assert!(!compaction_done || at.main > compacted);
        }
        assert!(buried.len() >= tombstones, "every tombstone is in the index");
        if compaction_done {
            let expected = history
                .iter()
                .filter(|change| change.kv.is_none() && change.rev > compacted);
            assert_eq!(buried.len(), expected.count());
        }

        let mut expected: Vec<Vec<u8>> = self
            .model
            .keys_at(rev)
            .values()
            .filter(|kv| kv.lease != 0)
            .map(|kv| keys::attached_key(kv.lease, &kv.key))
            .collect();
        if self.operations.is_empty() && self.entries.is_empty() {
            // Leases have no history in the model, so they can be compared only when all of it is applied.
            expected.extend(self.model.leases.keys().map(|&id| keys::lease_key(id).to_vec()));
            expected.sort();
            let stored: Vec<_> = self
                .dump(keys::LEASE)
                .into_iter()
                .map(|(key, _)| key.to_vec())
                .collect();
            assert_eq!(stored, expected, "leases and what is attached to them");
        }
    }
}
