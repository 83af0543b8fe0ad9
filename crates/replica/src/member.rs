//! Drives raft-rs: many operations into one entry, one write for what waits, and reads that share a round.
//!
//! Batches form by themselves. Proposals wait in a queue while as many log writes are under way as the configuration
//! allows; whenever one finishes, all that wait (up to a count and a byte limit) go into the next entry. There is no
//! timer, so a lone proposal never waits for company.

use std::collections::VecDeque;
use std::sync::Arc;

use api::codec::encode_entry;
use api::{Error, MemberId, RaftIndex, RequestId};
use bytes::Bytes;
use mvcc::Committed;
use mvcc::machine::Command;
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, ConfState, Entry, EntryType, HardState, Message};
use raft::{RawNode, ReadOnlyOption, Ready, StateRole, Storage};
use storage::{LogError, RaftLog};

use crate::log_view::LogView;

/// How a member behaves.
#[derive(Debug, Clone)]
pub struct Config {
    /// This member.
    pub id: MemberId,
    /// The Raft configuration to begin with when the state machine has none yet: all first voters.
    pub first_voters: Vec<MemberId>,
    /// Ticks without a leader after which a follower campaigns (a random number up to twice as many).
    pub election_ticks: usize,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// Most operations in one entry; 1 turns batching off.
    pub batch_ops_max: usize,
    /// Most bytes of operations in one entry; a larger operation goes alone.
    pub batch_bytes_max: usize,
    /// Most log writes under way at once. While they are, proposals gather.
    pub appends_inflight_max: usize,
    /// Most bytes of entries in one message.
    pub message_bytes_max: u64,
    /// Most messages under way to one follower.
    pub messages_inflight_max: usize,
    /// Most bytes of entries that are proposed and not committed; beyond, proposals wait.
    pub uncommitted_bytes_max: u64,
    /// Most bytes of entries that are handed to apply at once.
    pub committed_bytes_max: u64,
    /// Bytes of recent entries that stay in memory.
    pub tail_bytes_max: usize,
    /// Whether a candidate asks first whether it could win, so that a member that was cut off disturbs nobody.
    pub pre_vote: bool,
    /// Seeds the choice of election timeouts.
    pub seed: u64,
}

impl Config {
    /// The defaults for a member: etcd's timing at a tick of 100 ms.
    pub fn new(id: MemberId) -> Self {
        Config {
            id,
            first_voters: vec![id],
            election_ticks: 10,
            heartbeat_ticks: 1,
            batch_ops_max: 1024,
            batch_bytes_max: 4 << 20,
            appends_inflight_max: 2,
            message_bytes_max: 1 << 20,
            messages_inflight_max: 512,
            uncommitted_bytes_max: 256 << 20,
            committed_bytes_max: 16 << 20,
            tail_bytes_max: 16 << 20,
            pre_vote: true,
            seed: id,
        }
    }
}

/// An operation on its way into the log.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// Names it.
    pub id: RequestId,
    /// The operation, encoded.
    pub operation: Bytes,
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// A tick of the clock passed.
    Tick,
    /// Someone wants an operation in the log.
    Propose(Proposal),
    /// Someone wants to know from which applied index on a read is linearizable.
    ReadIndex(RequestId),
    /// A message of a peer arrived.
    Receive(Box<Message>),
    /// The write of this number, and all before it, is on disk.
    Persisted(u64),
    /// Entries up to here are applied.
    Applied(RaftIndex),
    /// Do not wait for an election timeout: there is nobody else to vote.
    Campaign,
}

/// What to do. Effects of one step are to be begun in order; [`Effect::Append`]s also finish in order.
#[derive(Debug)]
pub enum Effect {
    /// Write to the log, then report [`Input::Persisted`].
    Append {
        /// Names the write.
        number: u64,
        /// New entries; they replace the log from the first one's index on.
        entries: Vec<Entry>,
        /// The new hard state, if it changed.
        hard_state: Option<HardState>,
        /// Whether it must be on disk before it is reported.
        sync: bool,
    },
    /// Send to peers at once.
    Send(Vec<Message>),
    /// Apply, then report [`Input::Applied`].
    Apply(Vec<Committed>),
    /// The read of this name may be served once `index` is applied.
    ReadReady {
        /// The read.
        id: RequestId,
        /// From where on.
        index: RaftIndex,
    },
    /// The proposal or read of this name will not happen.
    Reject {
        /// The proposal or read.
        id: RequestId,
        /// Why.
        error: Error,
    },
    /// This member's standing changed.
    Standing(Standing),
}

/// What part a member plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It follows a leader, or waits for one.
    Follower,
    /// It wants to lead.
    Candidate,
    /// It leads.
    Leader,
}

/// Where a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// The leader it knows of; 0 for none.
    pub leader: MemberId,
    /// Its part.
    pub role: Role,
    /// The term.
    pub term: u64,
    /// Whether it has no vote.
    pub is_learner: bool,
    /// Whether everything that was ever acknowledged is applied here before it is acknowledged, so that a read of the
    /// applied state is linearizable as it is: this member leads, its term has begun, and nobody else has a vote.
    pub reads_locally: bool,
}

/// Why a replica cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The log failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// raft-rs refused its input or its configuration.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
    /// The log and the state do not fit together.
    #[error(
        "the Raft log ends at index {last}, but the state machine has already applied index {applied}: the log was damaged or removed; restore this member from a snapshot or replace it"
    )]
    LogBehindState {
        /// The log's last index.
        last: u64,
        /// The state machine's applied index.
        applied: u64,
    },
    /// The log was trimmed beyond the state.
    #[error(
        "the Raft log begins at index {first}, but the state machine has only applied index {applied}: the state was damaged or removed; restore this member from a snapshot or replace it"
    )]
    StateBehindLog {
        /// The log's first index.
        first: u64,
        /// The state machine's applied index.
        applied: u64,
    },
    /// A configuration that does not decode.
    #[error("the Raft configuration does not decode: {0}")]
    ConfState(protobuf::ProtobufError),
}

/// A read index round is repeated after so many ticks without an answer (etcd: 500 ms).
const READ_RETRY_TICKS: u64 = 5;

/// A Raft member.
pub struct Replica<L: RaftLog> {
    node: RawNode<LogView<L>>,
    config: Config,
    /// Waiting to be batched.
    proposals: VecDeque<Proposal>,
    proposals_bytes: usize,
    /// Waiting for a read index round to begin.
    reads: Vec<RequestId>,
    /// The round that is under way.
    round: Option<ReadRound>,
    rounds: u64,
    /// Numbers of Readys that raft-rs was not told to be persisted, in order.
    unpersisted: VecDeque<Unpersisted>,
    /// Log writes under way.
    appends_inflight: usize,
    /// A commit index that is worth writing with the next entries but not by itself: losing it loses nothing.
    commit_unwritten: Option<HardState>,
    persisted_index: RaftIndex,
    applied: RaftIndex,
    ticks: u64,
    standing: Standing,
    membership: Membership,
    rng: SplitMix64,
    /// Whose election timeout was chosen by us: term and role.
    timeout_chosen_for: (u64, StateRole),
}

/// What the Raft configuration says about this member.
#[derive(Clone, Copy)]
struct Membership {
    /// Whether nobody else has a vote.
    is_alone: bool,
    is_learner: bool,
}

impl Membership {
    fn of(id: MemberId, conf_state: &ConfState) -> Self {
        Membership {
            is_alone: conf_state.voters == [id] && conf_state.voters_outgoing.is_empty(),
            is_learner: conf_state.learners.contains(&id),
        }
    }
}

struct ReadRound {
    context: u64,
    reads: Vec<RequestId>,
    begun_ticks: u64,
}

struct Unpersisted {
    number: u64,
    /// Whether a log write stands behind it.
    writes: bool,
    last_index: Option<RaftIndex>,
    /// What may be sent only once it is persisted: votes and acknowledgements.
    messages: Vec<Message>,
}

/// The generator of Steele et al., "Fast splittable pseudorandom number generators" (2014): enough to keep members from
/// campaigning at the same time, and the same on every machine for the same seed.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

impl<L: RaftLog> Replica<L> {
    /// Takes up where the log and the state machine are. `applied` is the state machine's index, `conf_state` its Raft
    /// configuration as it was encoded in [`Command::ConfState`]; empty if it has none.
    pub fn open(
        config: Config,
        log: Arc<L>,
        applied: RaftIndex,
        conf_state: &[u8],
        logger: &slog::Logger,
    ) -> Result<Self, ReplicaError> {
        let mut hard_state = log.hard_state()?;
        let (first, last) = (log.first_index(), log.last_index());
        if last < applied {
            return Err(ReplicaError::LogBehindState { last, applied });
        }
        if first > applied + 1 {
            return Err(ReplicaError::StateBehindLog { first, applied });
        }
        // The commit index is written with entries only, so what was applied may be ahead of it.
        hard_state.commit = hard_state.commit.max(applied);
        let conf_state = if conf_state.is_empty() {
            ConfState {
                voters: config.first_voters.clone(),
                ..Default::default()
            }
        } else {
            ConfState::parse_from_bytes(conf_state).map_err(ReplicaError::ConfState)?
        };
        let raft_config = raft::Config {
            id: config.id,
            election_tick: config.election_ticks,
            heartbeat_tick: config.heartbeat_ticks,
            min_election_tick: config.election_ticks,
            max_election_tick: 2 * config.election_ticks,
            applied,
            max_size_per_msg: config.message_bytes_max,
            max_inflight_msgs: config.messages_inflight_max,
            max_uncommitted_size: config.uncommitted_bytes_max,
            max_committed_size_per_ready: config.committed_bytes_max,
            check_quorum: true,
            pre_vote: config.pre_vote,
            read_only_option: ReadOnlyOption::Safe,
            batch_append: true,
            ..Default::default()
        };
        let membership = Membership::of(config.id, &conf_state);
        let view = LogView::new(log, hard_state, conf_state, config.tail_bytes_max);
        let node = RawNode::new(&raft_config, view, logger)?;
        let rng = SplitMix64(config.seed);
        let standing = Standing {
            leader: 0,
            role: Role::Follower,
            term: 0,
            is_learner: false,
            reads_locally: false,
        };
        let mut replica = Replica {
            node,
            config,
            proposals: VecDeque::new(),
            proposals_bytes: 0,
            reads: Vec::new(),
            round: None,
            rounds: 0,
            unpersisted: VecDeque::new(),
            appends_inflight: 0,
            commit_unwritten: None,
            persisted_index: last,
            applied,
            ticks: 0,
            standing,
            membership,
            rng,
            timeout_chosen_for: (u64::MAX, StateRole::Follower),
        };
        replica.choose_timeout();
        Ok(replica)
    }

    /// Where this member stands.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// The newest committed index that this member knows of.
    pub fn committed(&self) -> RaftIndex {
        self.node.raft.raft_log.committed
    }

    /// Proposals that wait to be batched, and their bytes.
    pub fn waiting(&self) -> (usize, usize) {
        (self.proposals.len(), self.proposals_bytes)
    }

    /// Takes what happened and adds what to do to `effects`. Give it everything that waits at once: proposals that come
    /// together go into one entry together.
    ///
    /// # Errors
    /// Any error is final: the node stops.
    pub fn step(
        &mut self,
        inputs: impl IntoIterator<Item = Input>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), ReplicaError> {
        for input in inputs {
            self.take(input, effects)?;
        }
        self.choose_timeout();
        loop {
            self.propose(effects)?;
            self.begin_read_round(effects);
            if !self.node.has_ready() {
                break;
            }
            let ready = self.node.ready();
            self.handle(ready, effects)?;
        }
        self.update_standing(effects);
        Ok(())
    }

    fn take(&mut self, input: Input, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        match input {
            Input::Tick => {
                self.ticks += 1;
                self.node.tick();
                if self
                    .round
                    .as_ref()
                    .is_some_and(|round| self.ticks - round.begun_ticks >= READ_RETRY_TICKS)
                {
                    // The round's messages were lost, or it was asked before the term began: ask again for all.
                    let round = self.round.take().expect("it is some");
                    self.reads.splice(0..0, round.reads);
                }
            }
            Input::Propose(proposal) => {
                self.proposals_bytes += proposal.operation.len();
                self.proposals.push_back(proposal);
            }
            Input::ReadIndex(id) => self.reads.push(id),
            Input::Receive(message) => match self.node.step(*message) {
                // Messages from members that left, or from an older configuration, are no reason to stop.
                Ok(()) | Err(raft::Error::StepPeerNotFound | raft::Error::StepLocalMsg) => {}
                Err(raft::Error::ProposalDropped) => {}
                Err(error) => return Err(error.into()),
            },
            Input::Persisted(number) => self.persisted(number, effects),
            Input::Applied(index) => {
                assert!(index >= self.applied, "the applied index never goes back");
                self.applied = index;
                self.node.advance_apply_to(index);
                let durable_and_applied = index.min(self.persisted_index);
                self.node.mut_store().evict(durable_and_applied);
            }
            Input::Campaign => self.node.campaign()?,
        }
        Ok(())
    }

    /// A write and all before it are on disk. Readys that had nothing to write count as persisted with the one before.
    fn persisted(&mut self, number: u64, effects: &mut Vec<Effect>) {
        let mut done = None;
        let mut messages = Vec::new();
        while let Some(front) = self.unpersisted.front() {
            if front.number > number && front.writes {
                break;
            }
            let front = self.unpersisted.pop_front().expect("there is a front");
            if front.writes {
                assert!(self.appends_inflight > 0, "a write finishes once");
                self.appends_inflight -= 1;
            }
            if let Some(index) = front.last_index {
                self.persisted_index = index;
            }
            messages.extend(front.messages);
            done = Some(front.number);
        }
        if let Some(done) = done {
            self.node.on_persist_ready(done);
        }
        if !messages.is_empty() {
            effects.push(Effect::Send(messages));
        }
    }

    /// Turns what waits into entries, as long as the log takes more writes.
    fn propose(&mut self, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        if self.proposals.is_empty() {
            return Ok(());
        }
        if self.node.raft.state != StateRole::Leader {
            let error = if self.node.raft.leader_id == 0 {
                Error::NoLeader
            } else {
                Error::NotLeader
            };
            for Proposal { id, .. } in self.proposals.drain(..) {
                effects.push(Effect::Reject { id, error });
            }
            self.proposals_bytes = 0;
            return Ok(());
        }
        if self.appends_inflight >= self.config.appends_inflight_max {
            return Ok(());
        }
        let (mut count, mut bytes) = (0, 0);
        for proposal in &self.proposals {
            let len = proposal.operation.len();
            if count > 0 && (count >= self.config.batch_ops_max || bytes + len > self.config.batch_bytes_max) {
                break;
            }
            count += 1;
            bytes += len;
        }
        let data = encode_entry(self.proposals.range(..count).map(|proposal| &proposal.operation[..]));
        match self.node.propose(Vec::new(), data) {
            Ok(()) => {
                self.proposals.drain(..count);
                self.proposals_bytes -= bytes;
                Ok(())
            }
            // Too much is uncommitted, or leadership is being handed over: they wait on.
            Err(raft::Error::ProposalDropped) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// All reads that wait share one round.
    fn begin_read_round(&mut self, effects: &mut Vec<Effect>) {
        if self.reads.is_empty() || self.round.is_some() {
            return;
        }
        if self.node.raft.leader_id == 0 {
            for id in self.reads.drain(..) {
                effects.push(Effect::Reject {
                    id,
                    error: Error::NoLeader,
                });
            }
            return;
        }
        self.rounds += 1;
        let context = self.rounds;
        self.node.read_index(context.to_be_bytes().to_vec());
        let reads = std::mem::take(&mut self.reads);
        self.round = Some(ReadRound {
            context,
            reads,
            begun_ticks: self.ticks,
        });
    }

    fn handle(&mut self, mut ready: Ready, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        let number = ready.number();
        let messages = ready.take_messages();
        if !messages.is_empty() {
            effects.push(Effect::Send(messages));
        }
        assert!(
            ready.snapshot().is_empty(),
            "a member without peers receives no snapshot"
        );
        for state in ready.take_read_states() {
            let context = u64::from_be_bytes(state.request_ctx[..].try_into().expect("contexts are ours"));
            if let Some(round) = self.round.take_if(|round| round.context == context) {
                for id in round.reads {
                    effects.push(Effect::ReadReady { id, index: state.index });
                }
            }
        }
        let entries = ready.take_entries();
        let mut hard_state = ready.hs().cloned();
        if entries.is_empty() && !ready.must_sync() {
            if hard_state.is_some() {
                self.commit_unwritten = hard_state.take();
            }
        } else {
            hard_state = hard_state.or(self.commit_unwritten.take());
            self.commit_unwritten = None;
        }
        let writes = !entries.is_empty() || hard_state.is_some();
        let sync = ready.must_sync();
        let last_index = entries.last().map(|entry| entry.index);
        self.node.mut_store().append(&entries);
        let committed = ready.take_committed_entries();
        let messages = ready.take_persisted_messages();
        self.node.advance_append_async(ready);
        self.unpersisted.push_back(Unpersisted {
            number,
            writes,
            last_index,
            messages,
        });
        if writes {
            self.appends_inflight += 1;
            effects.push(Effect::Append {
                number,
                entries,
                hard_state,
                sync,
            });
        } else if self.appends_inflight == 0 {
            self.persisted(number, effects);
        }
        self.apply(committed, effects)
    }

    fn apply(&mut self, entries: Vec<Entry>, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut committed = Vec::with_capacity(entries.len());
        for entry in entries {
            let Entry { index, term, data, .. } = entry;
            let command = match entry.entry_type {
                EntryType::EntryNormal => Command::Operations(data),
                EntryType::EntryConfChange => {
                    let change = ConfChange::parse_from_bytes(&data).map_err(ReplicaError::ConfState)?;
                    let conf_state = self.node.apply_conf_change(&change)?;
                    self.conf_changed(&conf_state)?
                }
                EntryType::EntryConfChangeV2 => {
                    let change = ConfChangeV2::parse_from_bytes(&data).map_err(ReplicaError::ConfState)?;
                    let conf_state = self.node.apply_conf_change(&change)?;
                    self.conf_changed(&conf_state)?
                }
            };
            committed.push(Committed { index, term, command });
        }
        effects.push(Effect::Apply(committed));
        Ok(())
    }

    /// Notes a new Raft configuration; the state machine keeps it with the entry that made it.
    fn conf_changed(&mut self, conf_state: &ConfState) -> Result<Command, ReplicaError> {
        self.membership = Membership::of(self.config.id, conf_state);
        let bytes = conf_state.write_to_bytes().map_err(ReplicaError::ConfState)?;
        Ok(Command::ConfState(bytes.into()))
    }

    /// raft-rs draws a new election timeout from a random number of its own whenever the term or the role changes.
    /// Ours replaces it, so that a run with the same seed is the same run.
    fn choose_timeout(&mut self) {
        let now = (self.node.raft.term, self.node.raft.state);
        if self.timeout_chosen_for != now {
            self.timeout_chosen_for = now;
            let ticks = self.config.election_ticks;
            let extra = (self.rng.next() % ticks as u64) as usize;
            self.node.raft.set_randomized_election_timeout(ticks + extra);
        }
    }

    fn update_standing(&mut self, effects: &mut Vec<Effect>) {
        let raft = &self.node.raft;
        let role = match raft.state {
            StateRole::Leader => Role::Leader,
            StateRole::Follower => Role::Follower,
            StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
        };
        // The term has begun here once its first entry is applied: then so is everything acknowledged before it.
        let begun = raft.commit_to_current_term()
            && raft
                .raft_log
                .store
                .term(self.applied)
                .is_ok_and(|term| term == raft.term);
        let standing = Standing {
            leader: raft.leader_id,
            role,
            term: raft.term,
            is_learner: self.membership.is_learner,
            reads_locally: self.membership.is_alone && role == Role::Leader && begun,
        };
        if standing != self.standing {
            self.standing = standing;
            effects.push(Effect::Standing(standing));
        }
    }
}
