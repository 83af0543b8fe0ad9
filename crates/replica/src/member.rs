//! Drives raft-rs: many operations into one entry, one write for what waits, and reads that share a round.
//!
//! Batches form by themselves. Proposals wait in a queue while as many log writes are under way as the configuration
//! allows; whenever one finishes, all that wait (up to a count and a byte limit) go into the next entry. There is no
//! timer, so a lone proposal never waits for company. A follower's proposals go to the leader in batches of their own,
//! see [`crate::forward`]; whatever happens to leaders meanwhile, each goes into the log at most once.
//!
//! Changes of members are Raft entries of their own kind. The state machine decides whether one is carried out, and Raft
//! follows it once it is applied.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use api::codec::{MemberChange, MemberChangeKind, encode_entry};
use api::{Error, MemberId, RaftIndex, RequestId};
use bytes::Bytes;
use mvcc::machine::Command;
use mvcc::{Committed, Membership};
use protobuf::Message as _;
use raft::eraftpb::{
    ConfChange, ConfChangeType, ConfState, Entry, EntryType, HardState, Message, MessageType, Snapshot,
};
use raft::{ProgressState, RawNode, ReadOnlyOption, Ready, SnapshotStatus, StateRole, Storage};
use storage::{LogError, RaftLog};

use crate::forward::{Incoming, Outgoing, Proposal, Waiting};
use crate::log_view::LogView;
use crate::wire::{Origin, Origins, PeerMessage};

/// How a member behaves.
#[derive(Debug, Clone)]
pub struct Config {
    /// This member.
    pub id: MemberId,
    /// Which start of this member it is: any number that it did not have before.
    pub incarnation: u64,
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
    /// Most messages with entries under way to one follower.
    pub messages_inflight_max: usize,
    /// Most batches that are handed to the leader and not committed; beyond, proposals gather.
    pub forwards_inflight_max: usize,
    /// Most bytes of entries that are proposed and not committed; beyond, proposals wait.
    pub uncommitted_bytes_max: u64,
    /// Most bytes of entries that are handed to apply at once.
    pub committed_bytes_max: u64,
    /// Bytes of entries that are handed out and not applied beyond which a leader takes no proposals and a follower no
    /// entries.
    pub unapplied_bytes_max: usize,
    /// Bytes of entries that are handed out to be written and not on disk beyond which a follower takes no entries.
    pub unpersisted_bytes_max: usize,
    /// Ticks after which a proposal or read that could not even begin is refused.
    pub wait_ticks_max: u64,
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
            incarnation: 1,
            election_ticks: 10,
            heartbeat_ticks: 1,
            batch_ops_max: 1024,
            batch_bytes_max: 4 << 20,
            appends_inflight_max: 2,
            message_bytes_max: 1 << 20,
            messages_inflight_max: 128,
            forwards_inflight_max: 8,
            uncommitted_bytes_max: 256 << 20,
            committed_bytes_max: 16 << 20,
            unapplied_bytes_max: 64 << 20,
            unpersisted_bytes_max: 64 << 20,
            wait_ticks_max: 70,
            tail_bytes_max: 16 << 20,
            pre_vote: true,
            seed: id,
        }
    }
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// A tick of the clock passed.
    Tick,
    /// Someone wants an operation in the log.
    Propose(Proposal),
    /// Someone wants to change the members. Only the leader takes it.
    ProposeMemberChange(Proposal, MemberChange),
    /// Someone wants to know from which applied index on a read is linearizable.
    ReadIndex(RequestId),
    /// A message of a peer arrived.
    Receive(MemberId, PeerMessage),
    /// A snapshot of a peer is here, whole and on disk, and this is Raft's message that came with it.
    ReceiveSnapshot(Box<Message>),
    /// See [`Effect::MakeSnapshot`]: a snapshot of this index is there to be sent.
    SnapshotMade {
        /// For whom.
        to: MemberId,
        /// What it includes.
        index: RaftIndex,
        /// The term of that.
        term: u64,
        /// The members as of that index.
        membership: Arc<Membership>,
    },
    /// A snapshot was sent and installed, or could not be.
    SnapshotSent {
        /// To whom.
        to: MemberId,
        /// Whether it is installed.
        done: bool,
    },
    /// A peer could not be reached.
    Unreachable(MemberId),
    /// The write of this number, and all before it, is on disk.
    Persisted(u64),
    /// Entries up to here are applied.
    Applied {
        /// Up to here.
        index: RaftIndex,
        /// The changes of members among them, and whether they were carried out: see [`mvcc::Applied`].
        member_changes: Vec<(RaftIndex, bool)>,
    },
    /// Do not wait for an election timeout if there is nobody else to vote. As soon as what is committed is applied,
    /// which may show that there is.
    Campaign,
    /// Hand leadership to a voter, or to the one that is furthest along if 0. Nothing happens unless this member leads.
    Transfer(MemberId),
    /// Whether this member's state is not to be trusted, so that it must not lead.
    Quarantine(bool),
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
    /// Send to peers at once. What cannot be sent is lost: it is repeated where it matters.
    Send(Vec<(MemberId, PeerMessage)>),
    /// Apply, then report [`Input::Applied`].
    Apply(Vec<Committed>),
    /// Make a snapshot of the applied state for a member, and report [`Input::SnapshotMade`] or
    /// [`Input::SnapshotSent`] with a failure.
    MakeSnapshot(MemberId),
    /// Send the snapshot that was made for a member, together with Raft's message, and report [`Input::SnapshotSent`].
    SendSnapshot(MemberId, Box<Message>),
    /// Put the state of the snapshot that was received in place of this member's, and begin the log anew, both durably;
    /// then report [`Input::Persisted`]. Entries that were to be applied before are applied first, or never.
    Install {
        /// Names the write.
        number: u64,
        /// The snapshot's index.
        index: RaftIndex,
        /// Its term.
        term: u64,
        /// The hard state.
        hard_state: HardState,
    },
    /// The snapshot that was received is of no use.
    DropSnapshot,
    /// The read of this name may be served once `index` is applied.
    ReadReady {
        /// The read.
        id: RequestId,
        /// From where on.
        index: RaftIndex,
    },
    /// The proposal or read of this name will not happen; or, if the error is [`Error::TimeoutLeaderFail`], nobody knows
    /// whether it did or will.
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
    /// applied state is linearizable as it is: this member leads, its term has begun, and it is the cluster's only one.
    pub reads_locally: bool,
    /// Whether this member leads and the first entry of its term is applied: from then on it may end leases.
    pub has_begun: bool,
    /// Whether a log write takes longer than an election timeout.
    pub is_stalled: bool,
    /// The member that leadership is being handed to; 0 for none.
    pub transferring_to: MemberId,
}

/// How far a peer is, as the leader knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerProgress {
    /// The peer.
    pub id: MemberId,
    /// It has the log up to here.
    pub matched: RaftIndex,
    /// Whether it was heard of within the last election timeout.
    pub is_active: bool,
    /// Whether it has no vote.
    pub is_learner: bool,
    /// Whether it is being sent a snapshot.
    pub in_snapshot: bool,
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
    /// A change of the configuration that does not decode.
    #[error("a change of the Raft configuration does not decode: {0}")]
    ConfChange(protobuf::ProtobufError),
}

/// A read index round is repeated after so many ticks without an answer (etcd: 500 ms).
const READ_RETRY_TICKS: u64 = 5;
/// Batches that the leader does not confirm are sent again after so many ticks.
const FORWARD_RETRY_TICKS: u64 = 5;
/// A snapshot that neither arrived nor failed after so many ticks counts as failed. Long: a large one takes its time.
const SNAPSHOT_RETRY_TICKS: u64 = 36_000;

/// A Raft member.
pub struct Replica<L: RaftLog> {
    node: RawNode<LogView<L>>,
    config: Config,
    /// Waiting to be batched.
    proposals: VecDeque<Waiting>,
    proposals_bytes: usize,
    /// Waiting to be proposed, one after the other.
    changes: VecDeque<(Waiting, MemberChange)>,
    outgoing: Outgoing,
    incoming: Incoming,
    /// Whether followers' batches left no room in the last entry for this member's own proposals.
    own_left_out: bool,
    /// Waiting for a read index round to begin, and since when.
    reads: Vec<(RequestId, u64)>,
    /// The round that is under way.
    round: Option<ReadRound>,
    rounds: u64,
    /// Numbers of Readys that raft-rs was not told to be persisted, in order.
    unpersisted: VecDeque<Unpersisted>,
    unpersisted_bytes: usize,
    /// Log writes under way.
    appends_inflight: usize,
    /// A commit index that is worth writing with the next entries but not by itself: losing it loses nothing.
    commit_unwritten: Option<HardState>,
    persisted_index: RaftIndex,
    /// The snapshot that is being put in place: the number of the write, and its index. Until that is done, everything
    /// else can wait or get lost.
    installing: Option<(u64, RaftIndex)>,
    /// Snapshots that are being made or sent, and since when.
    snapshots: Vec<(MemberId, u64)>,
    /// Committed entries that are handed out only once the write of this number is done: a change of members among them
    /// may take effect only when a restart is sure to know of it.
    held: VecDeque<(u64, Vec<Entry>)>,
    /// Changes of members that are committed and not applied.
    unapplied_changes: VecDeque<(RaftIndex, ConfChange)>,
    /// The newest term that is on disk.
    persisted_term: u64,
    /// Last index and bytes of what is handed out and not applied.
    unapplied: VecDeque<(RaftIndex, usize)>,
    unapplied_bytes: usize,
    applied: RaftIndex,
    ticks: u64,
    /// Since when log writes are under way without any of them finishing.
    writing_since: Option<u64>,
    is_quarantined: bool,
    /// Who was asked to take leadership over, in which term.
    asked_to_lead: (u64, Vec<MemberId>),
    /// See [`Input::Campaign`].
    wants_to_lead: bool,
    /// What was committed when this member became the only one: until that is applied here, a member that left may have
    /// answered by what it had applied itself.
    alone_from: RaftIndex,
    standing: Standing,
    part: Part,
    rng: SplitMix64,
    /// The election timeout that was chosen by us, and for which term and role.
    timeout: (usize, u64, StateRole),
}

/// What the Raft configuration says about this member.
#[derive(Clone, Copy)]
struct Part {
    /// Whether nobody else belongs to the cluster. A learner counts: it answers its clients by what it has applied itself,
    /// which may be more than the voter has.
    is_alone: bool,
    /// Whether nobody else has a vote.
    is_only_voter: bool,
    is_learner: bool,
}

impl Part {
    fn of(id: MemberId, conf_state: &ConfState) -> Self {
        let is_only_voter = conf_state.voters == [id] && conf_state.voters_outgoing.is_empty();
        Part {
            is_alone: is_only_voter && conf_state.learners.is_empty() && conf_state.learners_next.is_empty(),
            is_only_voter,
            is_learner: conf_state.learners.contains(&id),
        }
    }
}

struct ReadRound {
    number: u64,
    reads: Vec<(RequestId, u64)>,
    begun_ticks: u64,
    /// Leader and term that were asked.
    asked: (MemberId, u64),
}

struct Unpersisted {
    number: u64,
    /// Whether a log write stands behind it.
    writes: bool,
    /// Of its entries.
    bytes: usize,
    /// The term, if that is new.
    term: Option<u64>,
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

/// Whether a message says all that an earlier one says that goes out with it. To leave that out is no more than to lose
/// it, and spares both sides work: what was committed is told with the next entries, entries that came apart are
/// acknowledged together.
fn makes_superfluous(later: &Message, earlier: &Message) -> bool {
    let kind = earlier.get_msg_type();
    if (later.get_msg_type(), later.to, later.term) != (kind, earlier.to, earlier.term) || later.commit < earlier.commit
    {
        return false;
    }
    match kind {
        MessageType::MsgAppend => earlier.entries.is_empty(),
        MessageType::MsgAppendResponse => {
            let asks = |message: &Message| message.reject || message.request_snapshot != 0;
            !asks(earlier) && !asks(later) && later.index >= earlier.index
        }
        _ => false,
    }
}

/// The Raft configuration that follows from who belongs to the cluster.
fn conf_state_of(membership: &Membership) -> ConfState {
    ConfState {
        voters: membership.voters().collect(),
        learners: membership.learners().collect(),
        ..Default::default()
    }
}

impl<L: RaftLog> Replica<L> {
    /// Takes up where the log and the state machine are. `applied` is the state machine's index, `membership` who
    /// belongs to the cluster as of that index.
    pub fn open(
        config: Config,
        log: Arc<L>,
        applied: RaftIndex,
        membership: &Membership,
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
        let persisted_term = hard_state.term;
        let conf_state = conf_state_of(membership);
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
            // raft-rs adds entries to a queued message that has none without comparing where that one begins, so that a
            // follower would acknowledge entries that it does not have (`try_batching`, raft-rs 0.7). Our entries are
            // batches already.
            batch_append: false,
            ..Default::default()
        };
        let part = Part::of(config.id, &conf_state);
        let view = LogView::new(log, hard_state, conf_state, config.tail_bytes_max);
        let node = RawNode::new(&raft_config, view, logger)?;
        let rng = SplitMix64(config.seed);
        let standing = Standing {
            leader: 0,
            role: Role::Follower,
            term: 0,
            is_learner: false,
            reads_locally: false,
            has_begun: false,
            is_stalled: false,
            transferring_to: 0,
        };
        let mut replica = Replica {
            node,
            proposals: VecDeque::new(),
            proposals_bytes: 0,
            changes: VecDeque::new(),
            outgoing: Outgoing::new(config.id, config.incarnation),
            incoming: Incoming::default(),
            own_left_out: false,
            reads: Vec::new(),
            round: None,
            rounds: 0,
            unpersisted: VecDeque::new(),
            unpersisted_bytes: 0,
            appends_inflight: 0,
            commit_unwritten: None,
            persisted_index: last,
            persisted_term,
            installing: None,
            snapshots: Vec::new(),
            held: VecDeque::new(),
            unapplied_changes: VecDeque::new(),
            unapplied: VecDeque::new(),
            unapplied_bytes: 0,
            applied,
            ticks: 0,
            writing_since: None,
            is_quarantined: false,
            asked_to_lead: (0, Vec::new()),
            wants_to_lead: false,
            alone_from: 0,
            standing,
            part,
            rng,
            timeout: (0, u64::MAX, StateRole::Follower),
            config,
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

    /// The newest index that it was told to be applied. The log must not be trimmed beyond that: a member that campaigns
    /// looks at all entries after it, whatever the state machine has by then.
    pub fn known_applied(&self) -> RaftIndex {
        self.applied
    }

    /// Proposals that wait to be batched, and their bytes.
    pub fn waiting(&self) -> (usize, usize) {
        (self.proposals.len(), self.proposals_bytes)
    }

    /// Whether nothing can be done with more proposals before another input comes: a write that finishes, a message or a
    /// tick. Until then they may as well wait outside.
    pub fn lets_proposals_wait(&self) -> bool {
        let raft = &self.node.raft;
        match raft.state {
            StateRole::Leader => self.appends_inflight >= self.config.appends_inflight_max,
            _ => raft.leader_id != 0 && self.outgoing.handed_to(raft.term).0 >= self.config.forwards_inflight_max,
        }
    }

    /// How far the peers are; empty unless this member leads.
    pub fn progress(&self) -> Vec<PeerProgress> {
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader {
            return Vec::new();
        }
        let learners = raft.prs().conf().learners();
        let mut peers: Vec<_> = raft
            .prs()
            .iter()
            .map(|(&id, progress)| PeerProgress {
                id,
                matched: progress.matched,
                is_active: progress.recent_active || id == self.config.id,
                is_learner: learners.contains(&id),
                in_snapshot: progress.state == ProgressState::Snapshot,
            })
            .collect();
        peers.sort_unstable_by_key(|peer| peer.id);
        peers
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
            self.choose_timeout();
        }
        if self.wants_to_lead && self.applied == self.node.raft.raft_log.committed && !self.has_unwritten() {
            self.wants_to_lead = false;
            if self.part.is_only_voter && self.node.raft.state != StateRole::Leader && !self.is_quarantined {
                self.node.campaign()?;
                self.choose_timeout();
            }
        }
        self.follow_leader();
        loop {
            self.propose(effects)?;
            self.begin_read_round();
            if self.installing.is_some() || !self.has_ready() {
                break;
            }
            let ready = self.node.ready();
            self.handle(ready, effects)?;
        }
        self.make_snapshots(effects);
        self.update_standing(effects);
        Ok(())
    }

    /// Whether raft-rs has something to do that can be done now. While much is handed out and not applied, more
    /// committed entries alone are no reason: they stay in the log until their turn.
    fn has_ready(&mut self) -> bool {
        let is_full = self.unapplied_bytes > self.config.unapplied_bytes_max;
        // Where something else is to be done, entries come along, one at a time.
        let bytes_max = if is_full { 0 } else { self.config.committed_bytes_max };
        self.node.raft.set_max_committed_size_per_ready(bytes_max);
        if !self.node.has_ready() {
            return false;
        }
        let raft = &self.node.raft;
        !is_full
            || !raft.msgs.is_empty()
            || !raft.read_states.is_empty()
            || !raft.raft_log.unstable_entries().is_empty()
            || self.node.snap().is_some_and(|snapshot| !snapshot.is_empty())
    }

    fn take(&mut self, input: Input, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        match input {
            Input::Tick => self.tick(effects)?,
            Input::Propose(proposal) => {
                self.proposals_bytes += proposal.operation.len();
                self.proposals.push_back(Waiting {
                    proposal,
                    since_tick: self.ticks,
                });
            }
            Input::ProposeMemberChange(proposal, change) => {
                let waiting = Waiting {
                    proposal,
                    since_tick: self.ticks,
                };
                self.changes.push_back((waiting, change));
            }
            Input::ReadIndex(id) => self.reads.push((id, self.ticks)),
            Input::Receive(from, message) => self.receive(from, message, effects)?,
            Input::ReceiveSnapshot(message) => {
                let before = self.installing.is_some();
                if !before {
                    self.step_raft(*message)?;
                }
                if before || self.node.snap().is_none_or(Snapshot::is_empty) {
                    effects.push(Effect::DropSnapshot);
                } else {
                    // At once: what comes after it must not meet half of it.
                    let ready = self.node.ready();
                    self.handle(ready, effects)?;
                }
            }
            Input::SnapshotMade {
                to,
                index,
                term,
                membership,
            } => {
                let mut snapshot = Snapshot::default();
                let metadata = snapshot.mut_metadata();
                (metadata.index, metadata.term) = (index, term);
                metadata.set_conf_state(conf_state_of(&membership));
                self.node.mut_store().snapshot_made(to, snapshot);
            }
            Input::SnapshotSent { to, done } => {
                self.snapshots.retain(|(member, _)| *member != to);
                self.node.mut_store().drop_snapshot(to);
                let status = if done {
                    SnapshotStatus::Finish
                } else {
                    SnapshotStatus::Failure
                };
                self.node.report_snapshot(to, status);
            }
            Input::Unreachable(id) => self.node.report_unreachable(id),
            Input::Persisted(number) => self.persisted(number, effects)?,
            Input::Applied { index, member_changes } => self.applied(index, &member_changes)?,
            Input::Campaign => self.wants_to_lead = true,
            Input::Transfer(to) => self.transfer(to),
            Input::Quarantine(is_quarantined) => self.is_quarantined = is_quarantined,
        }
        Ok(())
    }

    fn tick(&mut self, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        self.ticks += 1;
        let leads = self.node.raft.state == StateRole::Leader;
        // A member in quarantine never campaigns, nor does one whose log takes no writes: it could not even vote for
        // itself. Neither does a lone voter whose writes are under way: it would win at once, with entries that are not
        // on its disk, which raft-rs does not expect.
        let must_not_campaign =
            self.is_quarantined || self.is_stalled() || (self.part.is_only_voter && self.has_unwritten());
        if (leads || !must_not_campaign) && self.installing.is_none() {
            self.node.tick();
        }
        if self
            .round
            .as_ref()
            .is_some_and(|round| self.ticks - round.begun_ticks >= READ_RETRY_TICKS)
        {
            self.repeat_round();
        }
        self.refuse_late(effects);
        let again = self.outgoing.repeat(self.ticks, FORWARD_RETRY_TICKS).into_iter();
        let again = again.filter(|(to, _)| *to == self.node.raft.leader_id);
        let again: Vec<_> = again.map(|(to, forward)| (to, PeerMessage::Forward(forward))).collect();
        if !again.is_empty() {
            effects.push(Effect::Send(again));
        }
        if leads && self.is_quarantined && self.node.raft.lead_transferee.is_none() {
            self.transfer(0);
        }
        let now = self.ticks;
        let given_up = self
            .snapshots
            .extract_if(.., |(_, since)| now - *since >= SNAPSHOT_RETRY_TICKS)
            .collect::<Vec<_>>();
        for (to, _) in given_up {
            self.node.mut_store().drop_snapshot(to);
            self.node.report_snapshot(to, SnapshotStatus::Failure);
        }
        self.fence();
        Ok(())
    }

    /// The round's messages were lost, or whoever was asked leads no more: ask again for all.
    fn repeat_round(&mut self) {
        if let Some(round) = self.round.take() {
            self.reads.splice(0..0, round.reads);
        }
    }

    /// Refuses what has waited too long for a leader.
    fn refuse_late(&mut self, effects: &mut Vec<Effect>) {
        let (now, most) = (self.ticks, self.config.wait_ticks_max);
        let is_late = |since: u64| now - since > most;
        let error = Error::TimeoutLeaderFail;
        while let Some(waiting) = self.proposals.front()
            && is_late(waiting.since_tick)
        {
            let waiting = self.proposals.pop_front().expect("there is a front");
            self.proposals_bytes -= waiting.proposal.operation.len();
            let id = waiting.proposal.id;
            effects.push(Effect::Reject { id, error });
        }
        while let Some((waiting, _)) = self.changes.front()
            && is_late(waiting.since_tick)
        {
            let (waiting, _) = self.changes.pop_front().expect("there is a front");
            let id = waiting.proposal.id;
            effects.push(Effect::Reject { id, error });
        }
        let late = self.reads.iter().take_while(|(_, since)| is_late(*since)).count();
        for (id, _) in self.reads.drain(..late) {
            effects.push(Effect::Reject { id, error });
        }
    }

    /// Whether the log has anything that is not on disk: being written, or come in this step and not handed out yet.
    fn has_unwritten(&self) -> bool {
        self.appends_inflight > 0 || !self.node.raft.raft_log.unstable_entries().is_empty()
    }

    /// Whether a log write has been under way for an election timeout without any of them finishing.
    fn is_stalled(&self) -> bool {
        let timeout = self.config.election_ticks as u64;
        self.writing_since.is_some_and(|since| self.ticks - since >= timeout)
    }

    /// A leader whose log does not take writes any more gives leadership up.
    fn fence(&mut self) {
        let raft = &self.node.raft;
        let timeout = self.config.election_ticks as u64;
        let Some(since) = self.writing_since else { return };
        let stalled = self.ticks - since;
        if raft.state != StateRole::Leader || self.part.is_only_voter || stalled < timeout {
            return;
        }
        if stalled >= 2 * timeout {
            // Nobody took it over. Without a leader the others will elect one.
            let term = raft.term;
            self.node.raft.become_follower(term, 0);
        } else if raft.lead_transferee.is_none() {
            self.transfer(0);
        }
    }

    /// Who shall lead next: the voter that has most, among those that were not asked in vain in this term. One that is
    /// stalled or shut off does not take over, and would be chosen again and again.
    fn successor(&mut self) -> MemberId {
        let term = self.node.raft.term;
        if self.asked_to_lead.0 != term {
            self.asked_to_lead = (term, Vec::new());
        }
        let peers = self.progress();
        let others = peers
            .iter()
            .filter(|peer| peer.id != self.config.id && !peer.is_learner && peer.is_active);
        let asked = &self.asked_to_lead.1;
        let best = others.max_by_key(|peer| (!asked.contains(&peer.id), peer.matched));
        let Some(best) = best.map(|peer| peer.id) else { return 0 };
        let asked = &mut self.asked_to_lead.1;
        if asked.contains(&best) {
            // Everybody was: begin anew.
            asked.clear();
        }
        asked.push(best);
        best
    }

    fn transfer(&mut self, to: MemberId) {
        if self.node.raft.state != StateRole::Leader {
            return;
        }
        let to = if to == 0 {
            if self.node.raft.lead_transferee.is_some() {
                return;
            }
            self.successor()
        } else {
            to
        };
        if to != 0 && to != self.config.id {
            self.node.transfer_leader(to);
        }
    }

    fn receive(&mut self, from: MemberId, message: PeerMessage, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        match message {
            PeerMessage::Raft(message) => {
                if message.from != from || self.installing.is_some() {
                    // What is lost while the log begins anew is repeated.
                    return Ok(());
                }
                let kind = message.get_msg_type();
                match kind {
                    // A snapshot comes with its data, and proposals as batches, or not at all.
                    MessageType::MsgSnapshot | MessageType::MsgPropose => return Ok(()),
                    MessageType::MsgTimeoutNow if self.is_quarantined || self.is_stalled() => return Ok(()),
                    MessageType::MsgAppend if !message.entries.is_empty() && self.has_too_much() => return Ok(()),
                    _ => {}
                }
                self.step_raft(*message)
            }
            PeerMessage::Forward(forward) => {
                self.follow_leader();
                if let Some(accepted) = self.incoming.take(from, forward) {
                    effects.push(Effect::Send(vec![(from, PeerMessage::Accepted(accepted))]));
                }
                Ok(())
            }
            PeerMessage::Accepted(accepted) => {
                self.outgoing.accepted(from, &accepted);
                Ok(())
            }
        }
    }

    /// Whether so many entries are being written or applied that no more are taken: the leader sends them again.
    fn has_too_much(&self) -> bool {
        self.unapplied_bytes > self.config.unapplied_bytes_max
            || self.unpersisted_bytes > self.config.unpersisted_bytes_max
    }

    fn step_raft(&mut self, message: Message) -> Result<(), ReplicaError> {
        match self.node.step(message) {
            // Messages from members that left, or from an older configuration, are no reason to stop.
            Ok(()) | Err(raft::Error::StepPeerNotFound | raft::Error::StepLocalMsg) => Ok(()),
            Err(raft::Error::ProposalDropped) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Entries up to `index` are applied; Raft follows the changes of members among them that were carried out.
    fn applied(&mut self, index: RaftIndex, member_changes: &[(RaftIndex, bool)]) -> Result<(), ReplicaError> {
        while let Some((_, bytes)) = self.unapplied.pop_front_if(|(last, _)| *last <= index) {
            self.unapplied_bytes -= bytes;
        }
        if index <= self.applied {
            // From before a snapshot.
            return Ok(());
        }
        for &(at, carried_out) in member_changes {
            let Some((_, change)) = self.unapplied_changes.pop_front_if(|(front, _)| *front == at) else {
                continue;
            };
            if carried_out {
                let conf_state = self.node.apply_conf_change(&change)?;
                let was_alone = self.part.is_alone;
                self.part = Part::of(self.config.id, &conf_state);
                if self.part.is_alone && !was_alone {
                    self.alone_from = self.node.raft.raft_log.committed;
                }
                if self.node.raft.state == StateRole::Leader && self.node.raft.prs().get(self.config.id).is_none() {
                    // It removed itself. raft-rs would count on a progress of its own that is gone.
                    let term = self.node.raft.term;
                    self.node.raft.become_follower(term, 0);
                }
            }
        }
        self.applied = index;
        self.node.advance_apply_to(index);
        let durable_and_applied = index.min(self.persisted_index);
        self.node.mut_store().evict(durable_and_applied);
        Ok(())
    }

    /// A write and all before it are on disk. Readys that had nothing to write count as persisted with the one before.
    fn persisted(&mut self, number: u64, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
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
            self.unpersisted_bytes -= front.bytes;
            if let Some(index) = front.last_index {
                self.persisted_index = index;
            }
            self.persisted_term = front.term.unwrap_or(self.persisted_term);
            messages.extend(front.messages);
            done = Some(front.number);
        }
        self.writing_since = (self.appends_inflight > 0).then_some(self.ticks);
        if let Some(done) = done {
            self.node.on_persist_ready(done);
            if let Some((_, index)) = self.installing.take_if(|(number, _)| *number <= done) {
                self.node.mut_store().installed();
                // What comes after it is handed out after it. What came before may never be reported as applied.
                while let Some((_, bytes)) = self.unapplied.pop_front_if(|(last, _)| *last <= index) {
                    self.unapplied_bytes -= bytes;
                }
                self.applied = index;
                self.node.advance_apply_to(index);
            }
        }
        self.send(messages, effects);
        while let Some((_, entries)) = self.held.pop_front_if(|(of, _)| Some(*of) <= done) {
            self.apply(entries, effects)?;
        }
        Ok(())
    }

    fn send(&mut self, messages: Vec<Message>, effects: &mut Vec<Effect>) {
        if messages.is_empty() {
            return;
        }
        let mut out = Vec::with_capacity(messages.len());
        let mut messages = VecDeque::from(messages);
        while let Some(message) = messages.pop_front() {
            if messages.iter().any(|later| makes_superfluous(later, &message)) {
                continue;
            }
            let to = message.to;
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.node.mut_store().drop_snapshot(to);
                effects.push(Effect::SendSnapshot(to, Box::new(message)));
            } else {
                out.push((to, PeerMessage::Raft(Box::new(message))));
            }
        }
        if !out.is_empty() {
            effects.push(Effect::Send(out));
        }
    }

    /// Tells those who hand batches on who leads.
    fn follow_leader(&mut self) {
        let raft = &self.node.raft;
        let (term, leader) = (raft.term, raft.leader_id);
        if raft.state == StateRole::Leader {
            self.incoming.lead(if self.persisted_term == term { term } else { 0 });
        } else {
            self.incoming.lead(0);
            // Whoever does not lead has no snapshots on the way.
            if !self.snapshots.is_empty() {
                self.snapshots.clear();
                self.node.mut_store().drop_snapshots();
            }
            if leader != 0 {
                self.outgoing.follow(term, leader, self.ticks);
            }
        }
        if self.round.as_ref().is_some_and(|round| round.asked != (leader, term)) {
            self.repeat_round();
        }
    }

    /// Turns what waits into entries, or hands it to the leader, as long as they take more.
    fn propose(&mut self, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        if self.installing.is_some() {
            return Ok(());
        }
        if self.node.raft.state == StateRole::Leader {
            self.propose_change(effects)?;
            if self.appends_inflight < self.config.appends_inflight_max
                && self.unapplied_bytes <= self.config.unapplied_bytes_max
            {
                self.propose_batch(effects)?;
            }
            return Ok(());
        }
        for (waiting, _) in self.changes.drain(..) {
            effects.push(Effect::Reject {
                id: waiting.proposal.id,
                error: Error::NotLeader,
            });
        }
        let (leader, term) = (self.node.raft.leader_id, self.node.raft.term);
        while leader != 0 && self.outgoing.handed_to(term).0 < self.config.forwards_inflight_max {
            let batch = self.take_batch(0, 0, effects);
            if batch.is_empty() {
                break;
            }
            let (to, forward) = self.outgoing.forward(batch, self.ticks);
            effects.push(Effect::Send(vec![(to, PeerMessage::Forward(forward))]));
        }
        Ok(())
    }

    /// Takes as many of this member's own proposals as fit beside `count` operations of `bytes`. Those that make sense
    /// for another leader only are refused.
    fn take_batch(&mut self, mut count: usize, mut bytes: usize, effects: &mut Vec<Effect>) -> Vec<Waiting> {
        let leading = if self.node.raft.state == StateRole::Leader {
            self.node.raft.term
        } else {
            0
        };
        let mut batch = Vec::new();
        while let Some(Waiting { proposal, .. }) = self.proposals.front() {
            let len = proposal.operation.len();
            let wanted = proposal.leader_term == 0 || proposal.leader_term == leading;
            if wanted && count > 0 && (count >= self.config.batch_ops_max || bytes + len > self.config.batch_bytes_max)
            {
                break;
            }
            let waiting = self.proposals.pop_front().expect("there is a front");
            self.proposals_bytes -= len;
            if wanted {
                count += 1;
                bytes += len;
                batch.push(waiting);
            } else {
                effects.push(Effect::Reject {
                    id: waiting.proposal.id,
                    error: Error::LeaderChanged,
                });
            }
        }
        batch
    }

    fn propose_batch(&mut self, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        // Followers' batches first: they have waited longer. But if those left no room the last time, ours come first,
        // or else our own clients would wait for as long as followers have enough to fill each entry.
        let own_first = std::mem::take(&mut self.own_left_out);
        let mut own = match own_first {
            true => self.take_batch(0, 0, effects),
            false => Vec::new(),
        };
        let (mut batches, mut count) = (0, own.len());
        let mut bytes: usize = own.iter().map(|waiting| waiting.proposal.operation.len()).sum();
        for batch in &self.incoming.batches {
            if count > 0
                && (count + batch.operations.len() > self.config.batch_ops_max
                    || bytes + batch.bytes > self.config.batch_bytes_max)
            {
                break;
            }
            batches += 1;
            count += batch.operations.len();
            bytes += batch.bytes;
        }
        if !own_first {
            own = self.take_batch(count, bytes, effects);
            self.own_left_out = own.is_empty() && !self.proposals.is_empty();
        }
        if batches == 0 && own.is_empty() {
            return Ok(());
        }
        let term = self.node.raft.term;
        let forwarded = self.incoming.batches.range(..batches);
        let mut origins: Vec<Origin> = forwarded.clone().map(|batch| batch.origin).collect();
        let mut operations: Vec<Bytes> = forwarded.flat_map(|batch| &batch.operations).cloned().collect();
        operations.extend(own.iter().map(|waiting| waiting.proposal.operation.clone()));
        let has_own = !own.is_empty();
        if has_own {
            origins.push(self.outgoing.propose(term, own, true));
        }
        let data = encode_entry(operations.iter().map(|operation| &operation[..]));
        let context = prost::Message::encode_to_vec(&Origins { origins });
        match self.node.propose(context, data) {
            Ok(()) => {
                self.incoming.batches.drain(..batches);
                Ok(())
            }
            // Too much is uncommitted, or leadership is being handed over: they wait on.
            Err(raft::Error::ProposalDropped) => {
                if has_own {
                    let own = self.outgoing.take_back();
                    self.put_back(own);
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn put_back(&mut self, batch: Vec<Waiting>) {
        for waiting in batch.into_iter().rev() {
            self.proposals_bytes += waiting.proposal.operation.len();
            self.proposals.push_front(waiting);
        }
    }

    /// Proposes the next change of members, once the one before it is applied: raft-rs would turn it into nothing.
    fn propose_change(&mut self, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        if self.node.raft.has_pending_conf() {
            return Ok(());
        }
        let Some((waiting, change)) = self.changes.pop_front() else {
            return Ok(());
        };
        let kind = match change.kind() {
            MemberChangeKind::Add if change.member.as_ref().is_some_and(|member| member.is_learner) => {
                ConfChangeType::AddLearnerNode
            }
            MemberChangeKind::Add | MemberChangeKind::Promote => ConfChangeType::AddNode,
            MemberChangeKind::Remove => ConfChangeType::RemoveNode,
        };
        let mut conf_change = ConfChange {
            node_id: change.member_id(),
            context: waiting.proposal.operation.clone(),
            ..Default::default()
        };
        conf_change.set_change_type(kind);
        let id = waiting.proposal.id;
        let origin = self.outgoing.propose(self.node.raft.term, vec![waiting], false);
        let context = prost::Message::encode_to_vec(&Origins { origins: vec![origin] });
        match self.node.propose_conf_change(context, conf_change) {
            Ok(()) => Ok(()),
            Err(raft::Error::ProposalDropped) => {
                self.outgoing.take_back();
                effects.push(Effect::Reject {
                    id,
                    error: Error::LeaderChanged,
                });
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// All reads that wait share one round.
    fn begin_read_round(&mut self) {
        let raft = &self.node.raft;
        if self.reads.is_empty() || self.round.is_some() || raft.leader_id == 0 || self.installing.is_some() {
            return;
        }
        // A leader whose term has not begun would drop the question.
        if raft.state == StateRole::Leader && !raft.commit_to_current_term() {
            return;
        }
        let asked = (raft.leader_id, raft.term);
        self.rounds += 1;
        let number = self.rounds;
        // No two members, and no two starts of one, ever ask the same: an answer to an old question would be too low.
        let mut context = Vec::with_capacity(24);
        context.extend(self.config.id.to_be_bytes());
        context.extend(self.config.incarnation.to_be_bytes());
        context.extend(number.to_be_bytes());
        self.node.read_index(context);
        self.round = Some(ReadRound {
            number,
            reads: std::mem::take(&mut self.reads),
            begun_ticks: self.ticks,
            asked,
        });
    }

    /// The number of the round that a context names, if it is one of ours.
    fn round_of(&self, context: &[u8]) -> Option<u64> {
        let (whose, number) = context.split_at_checked(16)?;
        let ours = [self.config.id.to_be_bytes(), self.config.incarnation.to_be_bytes()].concat();
        (whose == ours).then_some(u64::from_be_bytes(number.try_into().ok()?))
    }

    fn handle(&mut self, mut ready: Ready, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        let number = ready.number();
        // A lone voter leads as soon as it campaigns, before its term is on its disk. Until then nobody hears of that: a
        // crash would have it lead in the same term once more, with other entries.
        let mut messages = Vec::new();
        if self.persisted_term == self.node.raft.term {
            self.send(ready.take_messages(), effects);
        } else {
            messages = ready.take_messages();
        }
        let term = ready
            .hs()
            .filter(|_| ready.must_sync())
            .map(|hard_state| hard_state.term);
        for state in ready.take_read_states() {
            let number = self.round_of(&state.request_ctx);
            if let Some(round) = self.round.take_if(|round| Some(round.number) == number) {
                for (id, _) in round.reads {
                    effects.push(Effect::ReadReady { id, index: state.index });
                }
            }
        }
        let entries = ready.take_entries();
        let installs = (!ready.snapshot().is_empty()).then(|| {
            let metadata = ready.snapshot().get_metadata();
            (metadata.index, metadata.term)
        });
        let mut hard_state = ready.hs().cloned();
        // The commit index is written now and then only; but what a change of members makes of the quorum must not be
        // forgotten, or those that are left could not go on without the one that is gone.
        let changes_members = ready
            .committed_entries()
            .iter()
            .any(|entry| entry.get_entry_type() != EntryType::EntryNormal);
        if changes_members {
            hard_state = Some(self.node.raft.hard_state());
            self.commit_unwritten = None;
        } else if entries.is_empty() && !ready.must_sync() {
            if hard_state.is_some() {
                self.commit_unwritten = hard_state.take();
            }
        } else {
            hard_state = hard_state.or(self.commit_unwritten.take());
            self.commit_unwritten = None;
        }
        let writes = !entries.is_empty() || hard_state.is_some() || installs.is_some();
        let sync = ready.must_sync() || changes_members;
        let mut last_index = entries.last().map(|entry| entry.index);
        if let Some((index, term)) = installs {
            assert!(
                entries.is_empty(),
                "a snapshot is handled before anything can follow it"
            );
            self.node.mut_store().install(index, term);
            last_index = Some(index);
        }
        self.node.mut_store().append(&entries);
        let committed = ready.take_committed_entries();
        messages.extend(ready.take_persisted_messages());
        self.node.advance_append_async(ready);
        let bytes = entries.iter().map(|entry| entry.data.len() + entry.context.len()).sum();
        self.unpersisted_bytes += bytes;
        self.unpersisted.push_back(Unpersisted {
            number,
            writes,
            bytes,
            term,
            last_index,
            messages,
        });
        if writes {
            self.appends_inflight += 1;
            self.writing_since.get_or_insert(self.ticks);
        }
        if let Some((index, term)) = installs {
            self.begin_install(number, index, term, effects);
        } else if writes {
            effects.push(Effect::Append {
                number,
                entries,
                hard_state,
                sync,
            });
        } else if self.appends_inflight == 0 {
            self.persisted(number, effects)?;
        }
        if changes_members {
            self.held.push_back((number, committed));
            return Ok(());
        }
        match self.held.back_mut() {
            // Behind those that wait.
            Some((_, waiting)) => waiting.extend(committed),
            None => self.apply(committed, effects)?,
        }
        Ok(())
    }

    fn begin_install(&mut self, number: u64, index: RaftIndex, term: u64, effects: &mut Vec<Effect>) {
        self.installing = Some((number, index));
        // The snapshot includes them; whoever waits for them is told below that nobody knows.
        self.held.clear();
        self.unapplied_changes.clear();
        let conf_state = self.node.raft.prs().conf().to_conf_state();
        self.part = Part::of(self.config.id, &conf_state);
        effects.push(Effect::Install {
            number,
            index,
            term,
            hard_state: self.node.raft.hard_state(),
        });
        for id in self.outgoing.forget() {
            effects.push(Effect::Reject {
                id,
                error: Error::TimeoutLeaderFail,
            });
        }
    }

    fn apply(&mut self, entries: Vec<Entry>, effects: &mut Vec<Effect>) -> Result<(), ReplicaError> {
        let Some(last) = entries.last().map(|entry| entry.index) else {
            return Ok(());
        };
        let mut committed = Vec::with_capacity(entries.len());
        let (mut bytes, mut again) = (0, Vec::new());
        for entry in entries {
            let kind = entry.get_entry_type();
            let Entry {
                index,
                term,
                data,
                context,
                ..
            } = entry;
            bytes += data.len();
            let lost = self.outgoing.committed(term, &context);
            again.extend(lost.again);
            for id in lost.never {
                effects.push(Effect::Reject {
                    id,
                    error: Error::LeaderChanged,
                });
            }
            let command = match kind {
                EntryType::EntryNormal => Command::Operations(data),
                EntryType::EntryConfChange => {
                    let change = ConfChange::parse_from_carllerche_bytes(&data).map_err(ReplicaError::ConfChange)?;
                    let operation = change.context.clone();
                    self.unapplied_changes.push_back((index, change));
                    Command::MemberChange(operation)
                }
                EntryType::EntryConfChangeV2 => {
                    let text = "changes of more than one member at once are not made by this release";
                    return Err(ReplicaError::ConfChange(protobuf::ProtobufError::IoError(
                        std::io::Error::other(text),
                    )));
                }
            };
            committed.push(Committed { index, term, command });
        }
        self.unapplied.push_back((last, bytes));
        self.unapplied_bytes += bytes;
        self.put_back(again);
        effects.push(Effect::Apply(committed));
        Ok(())
    }

    /// Has the snapshots made that raft-rs wants to send.
    fn make_snapshots(&mut self, effects: &mut Vec<Effect>) {
        let wanted: BTreeSet<MemberId> = self.node.mut_store().take_wanted();
        for to in wanted {
            // One that is there and yet not good enough is from before the log was trimmed.
            if self.node.mut_store().drop_snapshot(to) {
                self.snapshots.retain(|(member, _)| *member != to);
            }
            if self.snapshots.iter().all(|(member, _)| *member != to) {
                self.snapshots.push((to, self.ticks));
                effects.push(Effect::MakeSnapshot(to));
            }
        }
    }

    /// raft-rs draws a new election timeout from a random number of its own whenever it begins anew. Ours replaces it,
    /// so that a run with the same seed is the same run.
    fn choose_timeout(&mut self) {
        let (chosen, term, role) = self.timeout;
        let raft = &mut self.node.raft;
        if (term, role) != (raft.term, raft.state) {
            let ticks = self.config.election_ticks;
            let chosen = ticks + (self.rng.next() % ticks as u64) as usize;
            self.timeout = (chosen, raft.term, raft.state);
            raft.set_randomized_election_timeout(chosen);
        } else if raft.randomized_election_timeout() != chosen {
            raft.set_randomized_election_timeout(chosen);
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
        let has_begun = role == Role::Leader
            && raft.commit_to_current_term()
            && raft
                .raft_log
                .store
                .term(self.applied)
                .is_ok_and(|term| term == raft.term);
        let standing = Standing {
            leader: raft.leader_id,
            role,
            term: raft.term,
            is_learner: self.part.is_learner,
            reads_locally: self.part.is_alone && has_begun && self.applied >= self.alone_from,
            has_begun,
            is_stalled: self.is_stalled(),
            transferring_to: raft.lead_transferee.unwrap_or(0),
        };
        if standing != self.standing {
            self.standing = standing;
            effects.push(Effect::Standing(standing));
        }
    }
}
