//! A voter among three, driven by hand: what bounds a follower, and what a member does whose log takes no writes.

mod support;

use std::sync::Arc;

use api::MemberId;
use api::kv::Member;
use metastore_replica::wire::{Forward, ForwardBatch};
use metastore_replica::{Config, Effect, Input, PeerMessage, Replica, Role, Standing};
use mvcc::Membership;
use raft::eraftpb::{Entry, Message, MessageType};
use storage::RaftLog as _;
use support::{TestLog, propose};

const ELECTION_TICKS: usize = 10;

struct Bench {
    replica: Replica<TestLog>,
    log: Arc<TestLog>,
    appends: std::collections::VecDeque<(u64, Vec<Entry>)>,
    sent: Vec<(MemberId, Message)>,
    applied_to: u64,
}

impl Bench {
    /// Member 1 of the members 1, 2 and 3.
    fn new(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new(1);
        config.election_ticks = ELECTION_TICKS;
        change(&mut config);
        let log = Arc::new(TestLog::default());
        let members = (1..=3).map(|id| Member {
            id,
            ..Default::default()
        });
        let members = Membership {
            members: members.collect(),
            removed: Vec::new(),
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let replica = Replica::open(config, log.clone(), 0, &members, &logger).unwrap();
        Bench {
            replica,
            log,
            appends: Default::default(),
            sent: Vec::new(),
            applied_to: 0,
        }
    }

    /// The leader of its first term, whose entry is applied.
    fn leader(change: impl FnOnce(&mut Config)) -> Self {
        let mut bench = Bench::new(change);
        for _ in 0..=2 * ELECTION_TICKS {
            bench.step([Input::Tick]);
        }
        bench.settle();
        // First the others say that they would vote for it, then they do.
        for kind in [
            MessageType::MsgRequestPreVoteResponse,
            MessageType::MsgRequestVoteResponse,
        ] {
            let mut vote = message(2, kind, 1);
            vote.term = 1;
            bench.step([Input::Receive(2, PeerMessage::Raft(Box::new(vote)))]);
            bench.settle();
        }
        bench.acknowledge();
        assert_eq!(bench.standing().role, Role::Leader);
        assert!(bench.standing().has_begun);
        bench.sent.clear();
        bench
    }

    fn step(&mut self, inputs: impl IntoIterator<Item = Input>) {
        let mut effects = Vec::new();
        self.replica.step(inputs, &mut effects).unwrap();
        for effect in effects {
            match effect {
                Effect::Append { number, entries, .. } => self.appends.push_back((number, entries)),
                Effect::Apply(committed) => self.applied_to = committed.last().map_or(self.applied_to, |e| e.index),
                Effect::Send(messages) => {
                    for (to, message) in messages {
                        if let PeerMessage::Raft(message) = message {
                            self.sent.push((to, *message));
                        }
                    }
                }
                _ => {}
            }
        }
    }

    fn settle(&mut self) {
        while let Some((number, entries)) = self.appends.pop_front() {
            self.log.append(&entries, None, true).unwrap();
            self.step([Input::Persisted(number)]);
        }
        if self.applied_to > 0 {
            let index = self.applied_to;
            let member_changes = Vec::new();
            self.step([Input::Applied { index, member_changes }]);
        }
    }

    /// Member 2 has everything.
    fn acknowledge(&mut self) {
        let mut have = message(2, MessageType::MsgAppendResponse, self.standing().term);
        have.index = self.log.last_index();
        self.step([Input::Receive(2, PeerMessage::Raft(Box::new(have)))]);
        self.settle();
    }

    fn standing(&self) -> Standing {
        self.replica.standing()
    }

    fn sent_kinds(&self) -> Vec<MessageType> {
        self.sent.iter().map(|(_, message)| message.get_msg_type()).collect()
    }
}

fn message(from: MemberId, kind: MessageType, term: u64) -> Message {
    let mut message = Message {
        from,
        to: 1,
        term,
        ..Default::default()
    };
    message.set_msg_type(kind);
    message
}

/// One entry of so many bytes from the leader 2 of term 1, after the entry before it.
fn append(index: u64, bytes: usize) -> Input {
    let mut append = message(2, MessageType::MsgAppend, 1);
    append.index = index - 1;
    append.log_term = u64::from(index > 1);
    append.entries = vec![Entry {
        index,
        term: 1,
        data: vec![0; bytes].into(),
        ..Default::default()
    }]
    .into();
    Input::Receive(2, PeerMessage::Raft(Box::new(append)))
}

#[test]
fn a_follower_whose_disk_is_slow_takes_no_more_than_so_many_bytes() {
    let mut bench = Bench::new(|config| config.unpersisted_bytes_max = 1000);
    for index in 1..=100 {
        bench.step([append(index, 400)]);
    }
    let taken: usize = bench.appends.iter().flat_map(|(_, entries)| entries).count();
    assert_eq!(taken, 3, "two are within the bound, and one may go over it");
    bench.settle();
    // What was dropped is sent again, as to anybody who lost it.
    bench.step([append(4, 400)]);
    assert_eq!(bench.appends.len(), 1);
    bench.settle();
    assert_eq!(bench.log.last_index(), 4);
}

#[test]
fn what_is_committed_is_told_with_the_next_entries() {
    let mut bench = Bench::leader(|_| {});
    bench.step([propose(1, 10)]);
    bench.settle();
    bench.sent.clear();
    // The acknowledgement commits the first one, and here is the next.
    let mut have = message(2, MessageType::MsgAppendResponse, 1);
    have.index = bench.log.last_index();
    let committed = have.index;
    bench.step([Input::Receive(2, PeerMessage::Raft(Box::new(have))), propose(2, 10)]);
    let [(2, append)] = &bench.sent[..] else {
        panic!("one for the follower that answers: {:?}", bench.sent);
    };
    assert_eq!((append.entries.len(), append.commit), (1, committed));
    // Without a next one it is told at once.
    bench.sent.clear();
    bench.settle();
    bench.acknowledge();
    let told: Vec<_> = bench.sent.iter().map(|(to, append)| (*to, append.commit)).collect();
    assert_eq!(told, [(2, committed + 1)]);
}

#[test]
fn entries_that_came_apart_are_acknowledged_together() {
    let mut bench = Bench::new(|_| {});
    bench.step([append(1, 10)]);
    bench.step([append(2, 10)]);
    bench.step([append(3, 10)]);
    assert!(bench.sent.is_empty(), "nothing is on disk yet");
    let mut last = 0;
    for (number, entries) in std::mem::take(&mut bench.appends) {
        bench.log.append(&entries, None, true).unwrap();
        last = number;
    }
    bench.step([Input::Persisted(last)]);
    let [(2, acknowledged)] = &bench.sent[..] else {
        panic!("one answer to the leader: {:?}", bench.sent_kinds());
    };
    assert_eq!(acknowledged.get_msg_type(), MessageType::MsgAppendResponse);
    assert_eq!(acknowledged.index, 3);
}

/// However much followers have: entries are full with the batches of one of them.
#[test]
fn the_leaders_own_proposals_have_their_turn() {
    let mut bench = Bench::leader(|config| config.batch_ops_max = 2);
    let operation = |id| match propose(id, 10) {
        Input::Propose(proposal) => proposal.operation,
        _ => unreachable!(),
    };
    let forward = Forward {
        term: 1,
        incarnation: 7,
        window: 1,
        first: 1,
        batches: (0..6)
            .map(|batch| ForwardBatch {
                operations: vec![operation(10 + 2 * batch), operation(11 + 2 * batch)],
            })
            .collect(),
    };
    // Ours are told by their size.
    let ours = (1..=3).map(|id| propose(id, 1000));
    bench.step(ours.chain([Input::Receive(2, PeerMessage::Forward(forward))]));
    for _ in 0..10 {
        bench.settle();
        bench.acknowledge();
    }
    // After the one that begins the term.
    let entries = bench.log.0.lock().entries.split_off(1);
    let sizes: Vec<_> = entries.iter().map(|entry| entry.data.len() / 1000).collect();
    assert_eq!(
        sizes,
        [0, 2, 0, 1, 0, 0, 0, 0],
        "ours are two and one, theirs two in each of six"
    );
}

#[test]
fn a_leader_whose_log_is_stalled_hands_over_and_then_steps_down() {
    let mut bench = Bench::leader(|_| {});
    bench.step([propose(1, 10)]);
    assert!(!bench.appends.is_empty());
    let alive = || {
        Input::Receive(
            2,
            PeerMessage::Raft(Box::new(message(2, MessageType::MsgHeartbeatResponse, 1))),
        )
    };
    for _ in 0..ELECTION_TICKS - 1 {
        bench.step([Input::Tick, alive()]);
    }
    assert!(!bench.standing().is_stalled);
    bench.step([Input::Tick, alive()]);
    assert!(bench.standing().is_stalled);
    // At that very tick it looked whom it has heard of, and counts anew.
    bench.step([Input::Tick, alive()]);
    assert_eq!(bench.standing().transferring_to, 2, "the one that is active");
    for _ in 0..ELECTION_TICKS {
        bench.step([Input::Tick, alive()]);
    }
    assert_eq!(bench.standing().role, Role::Follower, "nobody took it over");

    // It could not even vote for itself: it asks nobody, however long that takes, whoever tells it to.
    bench.sent.clear();
    for _ in 0..10 * ELECTION_TICKS {
        bench.step([Input::Tick]);
    }
    let told = message(2, MessageType::MsgTimeoutNow, 1);
    bench.step([Input::Receive(2, PeerMessage::Raft(Box::new(told)))]);
    assert_eq!(bench.standing().role, Role::Follower);
    assert!(
        !bench.sent_kinds().contains(&MessageType::MsgRequestPreVote),
        "{:?}",
        bench.sent_kinds()
    );
    assert!(
        !bench.sent_kinds().contains(&MessageType::MsgRequestVote),
        "{:?}",
        bench.sent_kinds()
    );

    // With its disk back it is a member like any other.
    bench.settle();
    assert!(!bench.standing().is_stalled);
    for _ in 0..=2 * ELECTION_TICKS {
        bench.step([Input::Tick]);
    }
    assert!(
        bench.sent_kinds().contains(&MessageType::MsgRequestPreVote),
        "{:?}",
        bench.sent_kinds()
    );
}
