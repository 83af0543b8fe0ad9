//! Holds what a node says after a restart against what it acknowledged before.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Client, GetOptions, KvClient, LeaseTimeToLiveOptions, WatchOptions};
use fastrand::Rng;

use crate::model::{Action, Event, Record, State, key_of, lease_end};
use crate::support::{self, Node, code};
use crate::workload::{Acknowledged, Journal, LONG_TTL, Lease, LeaseState, Watched, events_of};

/// Reading the history takes milliseconds; this is for a node that does not answer.
const HISTORY_TIMEOUT: Duration = Duration::from_secs(60);
/// Revisions at which single keys are read, and revisions at which everything is.
const POINT_READS: usize = 150;
const WHOLE_READS: usize = 5;
/// Leases of which the time to live and the keys are asked for.
const LEASES_ASKED: usize = 20;

/// What a store holds, as far as it was verified, over all restarts.
pub(crate) struct Store {
    /// What lies before is forgotten, as a compaction made it; 0 before the first.
    compacted: i64,
    /// The state at `compacted`.
    base: State,
    /// What every revision from `compacted` on did.
    history: BTreeMap<i64, Vec<Event>>,
    pub(crate) leases: Arc<Mutex<BTreeMap<i64, Lease>>>,
    pub(crate) totals: Totals,
}

/// What was done and verified, for the report.
#[derive(Debug, Default)]
#[allow(dead_code, reason = "it is printed")]
pub(crate) struct Totals {
    pub(crate) answers: u64,
    pub(crate) writes_acknowledged: usize,
    /// Writes that were under way when the node went, by whether they were done.
    pub(crate) unanswered_done: usize,
    pub(crate) unanswered_not_done: usize,
    pub(crate) leases_expired: usize,
    pub(crate) compactions: usize,
    pub(crate) compactions_unanswered_done: usize,
    pub(crate) revisions_watched_live: usize,
    pub(crate) reads_under_load: usize,
    pub(crate) reads_back: usize,
    pub(crate) revision: i64,
}

impl Store {
    pub(crate) fn new() -> Store {
        Store {
            compacted: 0,
            base: State::new(),
            history: BTreeMap::new(),
            leases: Arc::default(),
            totals: Totals::default(),
        }
    }

    /// The newest revision that was verified.
    pub(crate) fn verified(&self) -> i64 {
        self.history.keys().next_back().copied().unwrap_or(1)
    }

    pub(crate) fn compacted(&self) -> i64 {
        self.compacted
    }

    fn leases(&self) -> MutexGuard<'_, BTreeMap<i64, Lease>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks that `node` holds everything from before, what `journal` says was acknowledged since, and nothing else
    /// but what was under way; then takes that for the truth.
    pub(crate) async fn check(&mut self, node: &Node, journal: Journal, random: &mut Rng) {
        let mut client = node.client().await;
        let mut kv = client.kv_client().max_decoding_message_size(usize::MAX);
        // Before the history, so that whatever expires between the two is told by the history.
        let listed: BTreeSet<i64> = {
            let answer = client.leases().await.expect("leases are listed");
            answer.leases().iter().map(|lease| lease.id()).collect()
        };
        let compacted = self.find_compacted(&mut kv, &journal).await;
        let found = history(node, compacted, current_revision(&mut kv).await).await;
        let last = found.keys().next_back().copied().unwrap_or(1);
        let mentioned = journal.revision_max;
        assert!(
            last >= mentioned,
            "revision {mentioned} was mentioned, but the history ends at {last}"
        );

        let known_to = self.verified();
        self.compare_known(compacted, &found);
        let mut state = self.state_at(known_to);
        let ended = self.explain(
            &mut state,
            known_to,
            found,
            journal.acknowledged,
            &journal.unanswered,
            &{
                let mut checks: BTreeMap<i64, Checks<'_>> = BTreeMap::new();
                for (revision, write) in &journal.without_effect {
                    checks.entry(*revision).or_default().without_effect.push(write);
                }
                for (revision, read) in &journal.reads {
                    checks.entry(*revision).or_default().reads.push(read);
                }
                for (revision, lease) in &journal.revoked {
                    checks.entry(*revision).or_default().revoked.push(*lease);
                }
                checks
            },
        );
        for watched in &journal.watched {
            self.check_watched(watched);
        }

        self.base = self.state_at(compacted);
        self.compacted = compacted;
        self.history = self.history.split_off(&compacted);
        self.read_back(&mut kv, known_to, random).await;
        self.check_leases(&mut client, &listed, &ended, &state).await;

        let totals = &mut self.totals;
        totals.answers += journal.answers;
        totals.compactions += journal.compacted.len();
        totals.reads_under_load += journal.reads.len();
        totals.revision = last;
    }

    /// The state at a revision that was verified and not compacted.
    fn state_at(&self, revision: i64) -> State {
        let mut state = self.base.clone();
        for (_, events) in self
            .history
            .range((Bound::Excluded(self.compacted), Bound::Included(revision)))
        {
            events.iter().for_each(|event| event.apply(&mut state));
        }
        state
    }

    /// Which revision the store was compacted to: a compaction without an answer may have been done or not.
    async fn find_compacted(&mut self, kv: &mut KvClient, journal: &Journal) -> i64 {
        let answered = journal.compacted.iter().copied().max().unwrap_or(0).max(self.compacted);
        let mut compacted = answered;
        for revision in journal
            .compactions_unanswered
            .iter()
            .copied()
            .filter(|revision| *revision > answered)
        {
            if revision > compacted && is_compacted(kv, revision - 1).await {
                compacted = revision;
                self.totals.compactions_unanswered_done += 1;
            }
        }
        if compacted > 1 {
            assert!(is_compacted(kv, compacted - 1).await, "{} can be read", compacted - 1);
        }
        if compacted > 0 {
            assert!(!is_compacted(kv, compacted).await, "{compacted} cannot be read");
        }
        compacted
    }

    /// What was verified earlier is still there, and the same.
    fn compare_known(&self, compacted: i64, found: &BTreeMap<i64, Vec<Event>>) {
        for (revision, events) in self.history.range(compacted..) {
            let now = found.get(revision);
            if *revision == compacted {
                // What was before it is gone.
                let now: Vec<_> = now.into_iter().flatten().map(Event::alone).collect();
                assert_eq!(
                    now,
                    events.iter().map(Event::alone).collect::<Vec<_>>(),
                    "revision {revision} has changed"
                );
            } else {
                assert_eq!(now, Some(events), "revision {revision} has changed");
            }
        }
    }

    /// Finds for every new revision what was asked for and made it, and checks everything that depends on the state at
    /// each. Adds them to the history; returns the leases that ended.
    fn explain(
        &mut self,
        state: &mut State,
        known_to: i64,
        found: BTreeMap<i64, Vec<Event>>,
        mut acknowledged: BTreeMap<i64, Acknowledged>,
        unanswered: &[Action],
        checks: &BTreeMap<i64, Checks<'_>>,
    ) -> BTreeSet<i64> {
        let none = Checks::default();
        let mut ended = BTreeSet::new();
        let mut unanswered: Vec<&Action> = unanswered.iter().collect();
        checks.get(&known_to).unwrap_or(&none).run(known_to, state);
        let mut last = known_to;
        for (revision, events) in found.into_iter().filter(|(revision, _)| *revision > known_to) {
            assert_eq!(revision, last + 1, "revisions have a gap");
            last = revision;
            let here = checks.get(&revision).unwrap_or(&none);
            if let Some(write) = acknowledged.remove(&revision) {
                let expected = write.action.events(state, revision);
                assert_eq!(
                    events, expected,
                    "revision {revision} is not what was acknowledged: {write:?}"
                );
                assert_eq!(
                    write.succeeded,
                    write.action.succeeds(state),
                    "revision {revision}: {write:?}"
                );
                let previous = expected
                    .into_iter()
                    .filter_map(|event| Some((event.key, event.previous?)));
                assert_eq!(
                    write.previous,
                    previous.collect::<Vec<_>>(),
                    "revision {revision}: the answer was wrong"
                );
                self.totals.writes_acknowledged += 1;
            } else if let Some(lease) = here.revoked.iter().find(|lease| lease_end(state, **lease) == events) {
                ended.insert(*lease);
            } else if let Some(at) = unanswered
                .iter()
                .position(|action| action.events(state, revision) == events)
            {
                let action = unanswered.swap_remove(at);
                if let Action::Revoke(lease) = action {
                    ended.insert(*lease);
                }
                self.totals.unanswered_done += 1;
            } else if let Some(lease) = self.expired_lease(state, &events) {
                ended.insert(lease);
                self.totals.leases_expired += 1;
            } else {
                panic!("nobody asked for revision {revision}: {events:?}; under way were {unanswered:?}");
            }
            for event in &events {
                if let Some(lease) = event
                    .record
                    .as_ref()
                    .map(|record| record.lease)
                    .filter(|lease| *lease != 0)
                {
                    assert!(
                        !ended.contains(&lease),
                        "revision {revision} uses lease {lease:x}, which had ended"
                    );
                }
                event.apply(state);
            }
            here.run(revision, state);
            ended.extend(&here.revoked);
            self.history.insert(revision, events);
        }
        assert!(
            acknowledged.is_empty(),
            "acknowledged, but the history ends at {last}: {acknowledged:?}"
        );
        self.totals.unanswered_not_done += unanswered.len();
        ended
    }

    /// The lease whose expiry these events are.
    fn expired_lease(&self, state: &State, events: &[Event]) -> Option<i64> {
        let lease = events.first()?.previous.as_ref()?.lease;
        let book = self.leases();
        let known = book.get(&lease)?;
        let due = known.ttl != LONG_TTL && known.asked.elapsed() >= Duration::from_secs(known.ttl.unsigned_abs());
        (due && lease_end(state, lease) == events).then_some(lease)
    }

    /// A live watcher saw exactly what the history holds, from where it began to where it was cut off.
    fn check_watched(&mut self, watched: &Watched) {
        let Some((last, _)) = watched.seen.last() else { return };
        let mut seen = watched.seen.iter();
        for (revision, events) in self.history.range(watched.from..=*last) {
            let within: Vec<_> = events
                .iter()
                .filter(|event| event.key.starts_with(watched.prefix))
                .collect();
            if within.is_empty() {
                continue;
            }
            let Some((at, events)) = seen.next() else {
                panic!("a watcher missed revision {revision}");
            };
            assert_eq!(
                at, revision,
                "a watcher of {:?} from {} missed a revision",
                watched.prefix, watched.from
            );
            let same = within.len() == events.len()
                && within.iter().zip(events).all(|(expected, event)| {
                    let previous = watched.with_previous.then_some(expected.previous.as_ref()).flatten();
                    expected.alone() == event.alone() && previous == event.previous.as_ref()
                });
            assert!(
                same,
                "a watcher saw {events:?} as revision {revision}, which is {within:?}"
            );
        }
        assert!(seen.next().is_none(), "a watcher saw a revision that is not there");
        self.totals.revisions_watched_live += watched.seen.len();
    }

    /// How many leases are left that are to expire.
    pub(crate) fn unexpired(&self) -> usize {
        self.leases().values().filter(|lease| lease.ttl != LONG_TTL).count()
    }

    /// Reads keys as they were at and before some revisions, above all new ones, and everything at a few.
    async fn read_back(&mut self, kv: &mut KvClient, known_to: i64, random: &mut Rng) {
        let last = self.verified();
        let first = self.compacted.max(1);
        let mut whole: BTreeSet<i64> = (0..WHOLE_READS).map(|_| random.i64(first..=last)).collect();
        whole.extend([first, last]);
        let newest = known_to.max(first);
        let mut points: BTreeSet<i64> = (0..POINT_READS).map(|_| random.i64(newest..=last)).collect();
        points.extend((0..POINT_READS / 3).map(|_| random.i64(first..=last)));

        let mut state = self.base.clone();
        for revision in first..=last {
            let events = self.history.get(&revision).map_or(&[][..], Vec::as_slice);
            let is_point = points.contains(&revision) && revision > first;
            // The state after `first` is where this begins.
            if is_point {
                for event in events {
                    let before = read(kv, &event.key, None, revision - 1).await;
                    assert_eq!(
                        before.get(&event.key),
                        state.get(&event.key),
                        "{} at {}",
                        event.key,
                        revision - 1
                    );
                }
            }
            if revision > first || self.compacted == 0 {
                events.iter().for_each(|event| event.apply(&mut state));
            }
            if is_point {
                for event in events {
                    let at = read(kv, &event.key, None, revision).await;
                    assert_eq!(at.get(&event.key), event.record.as_ref(), "{} at {revision}", event.key);
                }
                self.totals.reads_back += 2 * events.len();
            }
            if whole.contains(&revision) {
                let all = read(kv, "\0", Some("\0"), revision).await;
                assert_eq!(all, state, "the whole store at {revision}");
                self.totals.reads_back += 1;
            }
        }
    }

    async fn check_leases(&self, client: &mut Client, listed: &BTreeSet<i64>, ended: &BTreeSet<i64>, state: &State) {
        for id in listed {
            assert!(self.leases().contains_key(id), "nobody asked for lease {id:x}");
        }
        let mut to_ask = Vec::new();
        self.leases().retain(|id, lease| {
            let alive = match lease.state {
                LeaseState::Ended => {
                    assert!(!listed.contains(id), "lease {id:x} had ended and is there");
                    false
                }
                _ if ended.contains(id) => false,
                LeaseState::Unsure => listed.contains(id),
                LeaseState::Alive => {
                    let due = lease.asked.elapsed() >= Duration::from_secs(lease.ttl.unsigned_abs());
                    let there = listed.contains(id);
                    assert!(there || lease.ttl != LONG_TTL && due, "lease {id:x} is lost: {lease:?}");
                    there
                }
            };
            lease.state = LeaseState::Alive;
            if alive && lease.ttl == LONG_TTL {
                to_ask.push(*id);
            }
            alive
        });
        for (key, record) in state {
            assert!(
                record.lease == 0 || self.leases().contains_key(&record.lease),
                "{key} has a lease that had ended"
            );
        }
        for id in to_ask.into_iter().take(LEASES_ASKED) {
            let options = LeaseTimeToLiveOptions::new().with_keys();
            let answer = client
                .lease_time_to_live(id, Some(options))
                .await
                .expect("a lease can be asked for");
            assert_eq!(answer.granted_ttl(), LONG_TTL);
            let mut keys: Vec<_> = answer
                .keys()
                .iter()
                .map(|key| String::from_utf8_lossy(key).into_owned())
                .collect();
            keys.sort();
            let attached: Vec<_> = lease_end(state, id).into_iter().map(|event| event.key).collect();
            assert_eq!(keys, attached, "the keys of lease {id:x}");
        }
    }
}

/// What is to be checked against the state at one revision.
#[derive(Default)]
struct Checks<'a> {
    without_effect: Vec<&'a Acknowledged>,
    reads: Vec<&'a crate::workload::Read>,
    revoked: Vec<i64>,
}

impl Checks<'_> {
    fn run(&self, revision: i64, state: &State) {
        for write in &self.without_effect {
            let events = write.action.events(state, revision);
            assert!(
                events.is_empty(),
                "{write:?} had no effect at {revision}, but should have: {events:?}"
            );
            assert_eq!(write.succeeded, write.action.succeeds(state), "{write:?} at {revision}");
        }
        for read in &self.reads {
            let within = state.range(read.start.clone()..read.end.clone());
            let there: Vec<_> = within.map(|(key, record)| (key.clone(), record.clone())).collect();
            assert_eq!(
                read.found, there,
                "a read of {}..{} at {revision}",
                read.start, read.end
            );
        }
        for lease in &self.revoked {
            assert!(
                lease_end(state, *lease).is_empty(),
                "keys outlived lease {lease:x}, revoked at {revision}"
            );
        }
    }
}

async fn current_revision(kv: &mut KvClient) -> i64 {
    let answer = kv.get("none", None).await.expect("a read succeeds");
    answer.header().expect("every answer has a header").revision()
}

async fn is_compacted(kv: &mut KvClient, revision: i64) -> bool {
    match kv.get("none", Some(GetOptions::new().with_revision(revision))).await {
        Ok(_) => false,
        Err(error) => {
            let compacted = "etcdserver: mvcc: required revision has been compacted".to_owned();
            assert_eq!(
                support::status(&error),
                Some((code::OUT_OF_RANGE, compacted)),
                "{error:?}"
            );
            true
        }
    }
}

async fn read(kv: &mut KvClient, key: &str, end: Option<&str>, revision: i64) -> BTreeMap<String, Record> {
    let mut options = GetOptions::new().with_revision(revision);
    if let Some(end) = end {
        options = options.with_range(end);
    }
    let answer = kv.get(key, Some(options)).await.expect("a read of the past succeeds");
    answer.kvs().iter().map(|kv| (key_of(kv), Record::of(kv))).collect()
}

/// Everything that happened from `compacted` to `current`, or later, as a watcher sees it.
async fn history(node: &Node, compacted: i64, current: i64) -> BTreeMap<i64, Vec<Event>> {
    let mut found = BTreeMap::new();
    // The first revision that does anything is 2.
    let mut expected = compacted.max(2);
    if current < expected {
        return found;
    }
    let client = node.client().await;
    let mut watch = client.watch_client().max_decoding_message_size(usize::MAX);
    let options = WatchOptions::new()
        .with_all_keys()
        .with_prev_key()
        .with_start_revision(compacted.max(1));
    let read = async {
        let mut stream = watch.watch("", Some(options)).await.expect("a watch opens");
        while expected <= current {
            let response = stream
                .message()
                .await
                .expect("a watch goes on")
                .expect("a watch does not end");
            assert!(!response.canceled(), "{response:?}");
            for (revision, events) in events_of(&response) {
                assert_eq!(revision, expected, "a watcher sees every revision once and in order");
                found.insert(revision, events);
                expected += 1;
            }
        }
    };
    let ended = tokio::time::timeout(HISTORY_TIMEOUT, read).await;
    assert!(ended.is_ok(), "the history up to {current} ends at {expected}");
    found
}
