//! A member that is alone, driven by hand: what it writes, when it applies, how proposals share entries.

mod support;

use std::sync::Arc;

use api::codec::{Action, Operation, decode_entry, encode_operation};
use api::kv::{Member, PutRequest};
use api::{Error, RequestId};
use metastore_replica::wire::{Forward, ForwardBatch};
use metastore_replica::{Config, Effect, Input, PeerMessage, Proposal, Replica, ReplicaError, Role};
use mvcc::machine::Command;
use mvcc::{Committed, Membership};
use proptest::prelude::*;
use raft::eraftpb::{Entry, HardState};
use storage::RaftLog;
use support::{TestLog, propose};

type Append = (u64, Vec<Entry>, Option<HardState>, bool);

/// A replica and everything that came out of it and was not dealt with yet.
struct Bench {
    replica: Replica<TestLog>,
    log: Arc<TestLog>,
    appends: std::collections::VecDeque<Append>,
    committed: Vec<Committed>,
    reads: Vec<(RequestId, u64)>,
    rejected: Vec<(RequestId, Error)>,
}

fn open(config: Config, log: &Arc<TestLog>, applied: u64) -> Result<Replica<TestLog>, ReplicaError> {
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    let member = Member {
        id: config.id,
        ..Default::default()
    };
    let alone = Membership {
        members: vec![member],
        removed: Vec::new(),
    };
    Replica::open(config, log.clone(), applied, &alone, &logger)
}

impl Bench {
    fn new(config: Config) -> Self {
        Bench::at(config, Arc::default(), 0)
    }

    fn at(config: Config, log: Arc<TestLog>, applied: u64) -> Self {
        let replica = open(config, &log, applied).unwrap();
        Bench {
            replica,
            log,
            appends: Default::default(),
            committed: Vec::new(),
            reads: Vec::new(),
            rejected: Vec::new(),
        }
    }

    /// A leader whose first entry is applied.
    fn leader(config: Config) -> Self {
        let mut bench = Bench::new(config);
        bench.step([Input::Campaign]);
        bench.settle();
        bench.committed.clear();
        assert!(bench.replica.standing().reads_locally);
        bench
    }

    fn step(&mut self, inputs: impl IntoIterator<Item = Input>) {
        let mut effects = Vec::new();
        self.replica.step(inputs, &mut effects).unwrap();
        for effect in effects {
            match effect {
                Effect::Append {
                    number,
                    entries,
                    hard_state,
                    sync,
                } => {
                    self.appends.push_back((number, entries, hard_state, sync));
                }
                Effect::Apply(committed) => self.committed.extend(committed),
                Effect::ReadReady { id, index } => self.reads.push((id, index)),
                Effect::Reject { id, error } => self.rejected.push((id, error)),
                Effect::Send(messages) => assert!(messages.is_empty()),
                Effect::Standing(_) => {}
                other => panic!("a member that is alone was told to {other:?}"),
            }
        }
    }

    /// Finishes the oldest log write.
    fn persist(&mut self) {
        let (number, entries, hard_state, sync) = self.appends.pop_front().unwrap();
        self.log.append(&entries, hard_state.as_ref(), sync).unwrap();
        self.step([Input::Persisted(number)]);
    }

    /// Reports everything committed as applied.
    fn apply(&mut self) {
        if let Some(index) = self.committed.last().map(|entry| entry.index) {
            self.step([Input::Applied {
                index,
                member_changes: Vec::new(),
            }]);
        }
    }

    fn settle(&mut self) {
        while !self.appends.is_empty() {
            self.persist();
        }
        self.apply();
    }

    /// The ids of the operations in each committed entry.
    fn committed_ids(&self) -> Vec<Vec<RequestId>> {
        self.committed.iter().map(ids).collect()
    }
}

fn ids(entry: &Committed) -> Vec<RequestId> {
    match &entry.command {
        Command::Operations(data) => decode_entry(data).unwrap().iter().map(Operation::id).collect(),
        Command::MemberChange(_) => panic!("no configuration changes here"),
    }
}

fn config() -> Config {
    Config::new(7)
}

#[test]
fn what_waits_goes_into_one_entry() {
    let mut bench = Bench::leader(config());
    bench.step((1..=5).map(|id| propose(id, 10)));
    assert_eq!(bench.appends.len(), 1);
    assert!(bench.appends[0].3, "entries are synced");
    bench.settle();
    assert_eq!(bench.committed_ids(), [[1, 2, 3, 4, 5]]);
}

#[test]
fn batches_are_bounded_by_count_and_bytes_and_1_turns_them_off() {
    let count = Config {
        batch_ops_max: 2,
        appends_inflight_max: 9,
        ..config()
    };
    let mut bench = Bench::leader(count);
    bench.step((1..=5).map(|id| propose(id, 10)));
    bench.settle();
    assert_eq!(bench.committed_ids(), [vec![1, 2], vec![3, 4], vec![5]]);

    let bytes = Config {
        batch_bytes_max: 250,
        appends_inflight_max: 9,
        ..config()
    };
    let mut bench = Bench::leader(bytes);
    bench.step([propose(1, 100), propose(2, 100), propose(3, 1000), propose(4, 10)]);
    bench.settle();
    assert_eq!(
        bench.committed_ids(),
        [vec![1, 2], vec![3], vec![4]],
        "an operation over the limit goes alone"
    );

    let off = Config {
        batch_ops_max: 1,
        appends_inflight_max: 9,
        ..config()
    };
    let mut bench = Bench::leader(off);
    bench.step((1..=3).map(|id| propose(id, 10)));
    bench.settle();
    assert_eq!(bench.committed_ids(), [[1], [2], [3]]);
}

#[test]
fn proposals_gather_while_writes_are_under_way() {
    let mut bench = Bench::leader(Config {
        appends_inflight_max: 1,
        ..config()
    });
    bench.step([propose(1, 10)]);
    for id in 2..=4 {
        bench.step([propose(id, 10)]);
    }
    assert_eq!(bench.appends.len(), 1);
    assert_eq!(bench.replica.waiting().0, 3);
    bench.persist();
    assert_eq!(bench.appends.len(), 1, "the end of one write begins the next");
    bench.settle();
    assert_eq!(bench.committed_ids(), [vec![1], vec![2, 3, 4]]);
    assert_eq!(bench.replica.waiting(), (0, 0));
}

/// Design invariant 1: nothing is applied, and so nothing acknowledged, before it is on disk.
#[test]
fn nothing_is_applied_before_it_is_on_disk() {
    let mut bench = Bench::leader(Config {
        appends_inflight_max: 3,
        ..config()
    });
    for id in 1..=3 {
        bench.step([propose(id, 10)]);
    }
    assert_eq!(bench.appends.len(), 3);
    assert!(bench.committed.is_empty());
    bench.persist();
    assert_eq!(bench.committed_ids(), [[1]]);
    // One report for two writes: all before the number are on disk too.
    let (_, entries, hard_state, _) = bench.appends.pop_front().unwrap();
    bench.log.append(&entries, hard_state.as_ref(), true).unwrap();
    assert_eq!(bench.committed_ids(), [[1]]);
    bench.persist();
    assert_eq!(bench.committed_ids(), [[1], [2], [3]]);
}

/// A lone voter leads as soon as it campaigns. A crash before its term is on disk has it lead in the same term again, so
/// its learner must hear nothing before that, nor be told that it has a batch.
#[test]
fn a_lone_voter_tells_nobody_of_a_term_that_is_not_on_disk() {
    let log = Arc::new(TestLog::default());
    let member = |id, is_learner| Member {
        id,
        is_learner,
        ..Default::default()
    };
    let with_learner = Membership {
        members: vec![member(7, false), member(8, true)],
        removed: Vec::new(),
    };
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    let mut replica = Replica::open(config(), log.clone(), 0, &with_learner, &logger).unwrap();
    let sent = |replica: &mut Replica<TestLog>, inputs: Vec<Input>| {
        let mut effects = Vec::new();
        replica.step(inputs, &mut effects).unwrap();
        let mut appends = Vec::new();
        let mut messages = 0;
        for effect in effects {
            match effect {
                Effect::Append { number, hard_state, .. } => appends.push((number, hard_state)),
                Effect::Send(sent) => messages += sent.len(),
                _ => {}
            }
        }
        (appends, messages)
    };
    let (appends, messages) = sent(&mut replica, vec![Input::Campaign]);
    assert_eq!(replica.standing().role, Role::Leader);
    let (number, hard_state) = appends.into_iter().next().expect("it writes its term");
    assert_eq!(hard_state.expect("the term is new").term, 1);
    assert_eq!(messages, 0);
    let batch = ForwardBatch {
        operations: vec![encode_operation(&Operation::new(1, Action::Put(PutRequest::default())))],
    };
    let forward = PeerMessage::Forward(Forward {
        term: 1,
        incarnation: 1,
        window: 1,
        first: 1,
        batches: vec![batch],
    });
    let heartbeat = vec![Input::Tick, Input::Tick, Input::Receive(8, forward)];
    let (_, messages) = sent(&mut replica, heartbeat);
    assert_eq!(messages, 0, "neither a heartbeat nor that it has the batch");
    let (_, messages) = sent(&mut replica, vec![Input::Persisted(number)]);
    assert!(messages > 0, "now it may speak");
}

#[test]
fn a_new_commit_index_alone_is_not_written() {
    let mut bench = Bench::leader(config());
    bench.step([propose(1, 10)]);
    bench.settle();
    assert!(bench.appends.is_empty());
    let before = bench.log.hard_state().unwrap().commit;
    bench.step([propose(2, 10)]);
    bench.persist();
    assert!(
        bench.log.hard_state().unwrap().commit > before,
        "it goes with the next entries"
    );
}

#[test]
fn a_restart_applies_what_the_engine_had_lost() {
    let mut bench = Bench::leader(config());
    for id in 1..=4 {
        bench.step([propose(id, 10)]);
        bench.settle();
    }
    let log = bench.log.clone();
    // The engine came back with entry 3 as its last: the first is the leader's own, so operations 3 and 4 are missing.
    let restarted = Config {
        incarnation: 2,
        ..config()
    };
    let mut bench = Bench::at(restarted, log, 3);
    bench.step([Input::Campaign]);
    assert_eq!(bench.replica.standing().role, Role::Follower, "it replays first");
    bench.apply();
    assert_eq!(bench.replica.standing().role, Role::Leader);
    assert!(!bench.replica.standing().reads_locally, "its term has not begun");
    bench.settle();
    assert_eq!(bench.committed_ids(), [vec![3], vec![4], vec![]]);
    assert!(bench.replica.standing().reads_locally);
}

#[test]
fn a_log_and_a_state_that_do_not_fit_are_refused() {
    let mut bench = Bench::leader(config());
    for id in 1..=4 {
        bench.step([propose(id, 10)]);
        bench.settle();
    }
    let last = bench.log.last_index();
    let error = open(config(), &bench.log, last + 1).err().unwrap();
    assert!(matches!(error, ReplicaError::LogBehindState { .. }), "{error}");
    bench.log.trim(4).unwrap();
    assert!(open(config(), &bench.log, 3).is_ok());
    let error = open(config(), &bench.log, 2).err().unwrap();
    assert!(
        matches!(error, ReplicaError::StateBehindLog { first: 4, applied: 2 }),
        "{error}"
    );
}

#[test]
fn without_a_leader_proposals_and_reads_wait_for_a_while() {
    let mut bench = Bench::new(Config {
        wait_ticks_max: 3,
        ..config()
    });
    bench.step([propose(1, 10), Input::ReadIndex(2)]);
    for _ in 0..3 {
        bench.step([Input::Tick]);
    }
    assert_eq!(bench.rejected, []);
    bench.step([Input::Tick]);
    let error = Error::TimeoutLeaderFail;
    assert_eq!(bench.rejected, [(1, error), (2, error)]);
    assert_eq!(bench.replica.waiting(), (0, 0));
}

#[test]
fn what_is_meant_for_one_term_is_refused_in_another() {
    let mut bench = Bench::leader(config());
    let term = bench.replica.standing().term;
    let for_term = |id, leader_term| {
        let Input::Propose(proposal) = propose(id, 10) else {
            unreachable!()
        };
        Input::Propose(Proposal {
            leader_term,
            ..proposal
        })
    };
    bench.step([
        for_term(1, term),
        for_term(2, term + 1),
        for_term(3, term + 2),
        propose(4, 10),
    ]);
    bench.settle();
    assert_eq!(bench.committed_ids(), [[1, 4]]);
    assert_eq!(bench.rejected, [(2, Error::LeaderChanged), (3, Error::LeaderChanged)]);
}

#[test]
fn reads_wait_for_the_term_to_begin_and_share_a_round() {
    let mut bench = Bench::new(config());
    bench.step([Input::Campaign, Input::ReadIndex(1), Input::ReadIndex(2)]);
    assert!(bench.reads.is_empty());
    bench.settle();
    let index = bench.log.last_index();
    assert_eq!(bench.reads, [(1, index), (2, index)]);
    bench.step([Input::ReadIndex(3)]);
    assert_eq!(bench.reads.last(), Some(&(3, index)));
}

#[derive(Debug, Clone)]
enum Do {
    Propose(u8),
    Persist,
    Apply,
    Tick,
    Read,
    Crash,
}

fn anything() -> impl Strategy<Value = Do> {
    prop_oneof![
        4 => (1..6u8).prop_map(Do::Propose),
        4 => Just(Do::Persist),
        2 => Just(Do::Apply),
        1 => Just(Do::Tick),
        1 => Just(Do::Read),
        1 => Just(Do::Crash),
    ]
}

/// Runs a schedule and returns every operation that was applied, in order, after checking what was acknowledged.
fn run(config: &Config, schedule: &[Do]) -> Vec<RequestId> {
    let mut config = config.clone();
    let mut bench = Bench::new(config.clone());
    bench.step([Input::Campaign]);
    let mut next = 1;
    // What the state machine holds; its engine is as durable as the log here.
    let (mut state, mut state_index) = (Vec::new(), 0);
    for step in schedule {
        match step {
            Do::Propose(count) => {
                let proposals: Vec<_> = (next..next + u64::from(*count)).map(|id| propose(id, 10)).collect();
                next += u64::from(*count);
                bench.step(proposals);
            }
            Do::Persist if !bench.appends.is_empty() => bench.persist(),
            Do::Persist => {}
            Do::Apply => {
                bench.apply();
                for entry in bench.committed.drain(..) {
                    assert_eq!(entry.index, state_index + 1, "no gaps");
                    state_index = entry.index;
                    state.extend(ids(&entry));
                }
            }
            Do::Tick => bench.step([Input::Tick]),
            Do::Read => {
                bench.step([Input::ReadIndex(u64::MAX)]);
                bench.reads.clear();
            }
            Do::Crash => {
                // Appends that were not persisted are gone.
                let log = bench.log.clone();
                config.incarnation += 1;
                bench = Bench::at(config.clone(), log, state_index);
                bench.step([Input::Campaign]);
            }
        }
    }
    bench.settle();
    for entry in bench.committed.drain(..) {
        assert_eq!(entry.index, state_index + 1, "no gaps");
        state_index = entry.index;
        state.extend(ids(&entry));
    }
    state
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever the order of writes, applies and crashes: operations are applied in the order of their proposal, none
    /// twice; and the same schedule gives the same run.
    #[test]
    fn every_operation_is_applied_once_and_in_order(
        schedule in proptest::collection::vec(anything(), 0..80),
        batch_ops_max in 1..5usize,
        appends_inflight_max in 1..4usize,
        tail_bytes_max in 0..500usize,
    ) {
        let config = Config { batch_ops_max, appends_inflight_max, tail_bytes_max, ..config() };
        let applied = run(&config, &schedule);
        prop_assert!(applied.is_sorted_by(|a, b| a < b), "{:?}", applied);
        if !schedule.iter().any(|step| matches!(step, Do::Crash)) {
            let proposed: u64 = schedule.iter().map(|step| if let Do::Propose(n) = step { u64::from(*n) } else { 0 }).sum();
            prop_assert_eq!(applied.len() as u64, proposed, "without a crash nothing is lost");
        }
        prop_assert_eq!(run(&config, &schedule), applied);
    }
}
