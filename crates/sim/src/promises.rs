//! What a member promises by a message, by trimming its log and by taking a request, held against its disk and its time.
//!
//! The rules of the design, checked at the moment they could be broken: no vote and no acknowledgement before what it
//! promises is on disk; no entry forgotten that the engine would need after a crash; nobody waits longer than allowed.

use api::{MemberId, RaftIndex};
use mvcc::keys::{META, STATE, StateRecord};
use prost::Message as _;
use raft::eraftpb::MessageType;
use replica::PeerMessage;

use crate::history::{Request, violation};
use crate::node::Disk;
use crate::world::World;

/// A log is trimmed up to an index: the engine has everything below on its disk, and the replica knows that it is applied.
pub(crate) fn check_trim(member: MemberId, disk: &Disk, known_applied: RaftIndex, index: RaftIndex) {
    if index > known_applied + 1 {
        violation!(
            "member {member} trims its log below {index}, but its replica only knows that {known_applied} is applied"
        );
    }
    let durable = match disk.engine.peek_durable(META, STATE) {
        Some(state) => StateRecord::decode(state).expect("it was encoded").applied_index,
        None => 0,
    };
    if index > durable + 1 {
        violation!("member {member} trims its log below {index}, but its engine has only {durable} on disk");
    }
}

impl World {
    /// A member sends a message: what that promises is on its disk.
    pub(crate) fn check_promise(&self, n: usize, message: &PeerMessage) {
        let PeerMessage::Raft(message) = message else { return };
        if message.reject {
            return;
        }
        let log = &self.nodes[n].disk.log;
        let hard_state = log.synced_hard_state();
        let (term, index, to) = (message.term, message.index, message.to);
        let id = self.nodes[n].id;
        let kind = message.get_msg_type();
        let vote = match kind {
            MessageType::MsgRequestVoteResponse => to,
            // A candidate counts on its own vote.
            MessageType::MsgRequestVote => id,
            MessageType::MsgAppendResponse => 0,
            _ => return,
        };
        if hard_state.term > term {
            // It is about to say something of a term that it has left; nobody of a later one listens.
            return;
        }
        if hard_state.term < term {
            violation!(
                "member {id} sends {kind:?} of term {term}, but has only {} on disk",
                hard_state.term
            );
        }
        if vote != 0 && hard_state.vote != vote {
            violation!(
                "member {id} sends {kind:?} of term {term} for {vote}, but has a vote for {} on disk",
                hard_state.vote
            );
        }
        if kind == MessageType::MsgAppendResponse && index > log.synced_last() {
            violation!(
                "member {id} acknowledges index {index} in term {term}, but has only {} on disk",
                log.synced_last()
            );
        }
    }

    /// A member has taken a step: whoever waits for a leader has not waited too long.
    pub(crate) fn check_waiting(&self, n: usize) {
        let Some(process) = &self.nodes[n].process else { return };
        let Some(since) = process.leaderless_since else { return };
        // A few ticks may have waited with the request until the replica took them.
        let most = self.scenario.replica.wait_ticks_max + 4;
        if process.ticks <= since + most {
            return;
        }
        for (id, came) in &process.pending {
            // What came while there was a leader may be on its way; a keep-alive waits in several turns.
            let waits_for_a_leader = *came > since
                && !process.reads_ready.contains_key(id)
                && !matches!(self.history.op(*id).request, Request::KeepAlive(_));
            if waits_for_a_leader && process.ticks > came + most {
                violation!(
                    "request {id} waits at member {} for {} ticks without a leader",
                    self.nodes[n].id,
                    process.ticks - came
                );
            }
        }
    }
}
