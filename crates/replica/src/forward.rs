//! Batches of operations on their way into the log, each of them in it at most once.
//!
//! A member's batches are numbered. Whoever proposes a batch, this member as the leader or another leader for it, writes
//! into the log entry's context whose batch it is. So whoever reads the log knows what became of its batches:
//!
//! - An entry names the batch: it is committed, and its operations are answered when the entry is applied.
//! - An entry of a later term is committed before one named it: a batch goes into the log of one term only, the one that
//!   it was handed out in, and no entry of that term can follow. It is lost for certain, and may be proposed again.
//!
//! Between a follower and the leader of a term batches go in order and the leader says up to where it has them, so a
//! batch may be sent twice, or late, and still is accepted once.

use std::collections::VecDeque;

use api::{MemberId, RequestId};
use bytes::Bytes;
use hashbrown::HashMap;

use crate::wire::{Accepted, Forward, ForwardBatch, Origin, Origins};

/// An operation on its way into the log.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// Names it.
    pub id: RequestId,
    /// The operation, encoded.
    pub operation: Bytes,
    /// The term in which this member must lead for the operation to make sense; 0 if it is a client's, who does not
    /// care which leader writes it.
    pub leader_term: u64,
}

/// A proposal and when it came.
#[derive(Debug, Clone)]
pub(crate) struct Waiting {
    pub(crate) proposal: Proposal,
    pub(crate) since_tick: u64,
}

/// A batch of this member that was handed out and is not known to be committed or lost.
#[derive(Debug)]
struct InFlight {
    number: u64,
    /// The term of the leader that it was handed to.
    term: u64,
    proposals: Vec<Waiting>,
    bytes: usize,
    /// Whether it may be proposed again once it is lost. Changes of members are not: whether they still make sense is
    /// for whoever asked for them to say.
    again: bool,
}

/// This member's batches.
#[derive(Debug)]
pub(crate) struct Outgoing {
    member: MemberId,
    incarnation: u64,
    next: u64,
    in_flight: VecDeque<InFlight>,
    /// What is forwarded in the newest term that another member leads or led.
    window: Option<Window>,
}

#[derive(Debug)]
struct Window {
    term: u64,
    leader: MemberId,
    first: u64,
    /// The last batch that the leader has.
    accepted: u64,
    /// When the last batch was sent, or sent again.
    sent_tick: u64,
}

/// What became of batches that were in flight.
#[derive(Debug, Default)]
pub(crate) struct Lost {
    /// To be proposed again, in order.
    pub(crate) again: Vec<Waiting>,
    /// Not to be proposed again.
    pub(crate) never: Vec<RequestId>,
}

impl Outgoing {
    pub(crate) fn new(member: MemberId, incarnation: u64) -> Self {
        Outgoing {
            member,
            incarnation,
            next: 1,
            in_flight: VecDeque::new(),
            window: None,
        }
    }

    /// Notes a batch that this member proposes itself, as the leader of `term`.
    pub(crate) fn propose(&mut self, term: u64, proposals: Vec<Waiting>, again: bool) -> Origin {
        let number = self.next;
        self.next += 1;
        self.in_flight.push_back(InFlight {
            number,
            term,
            bytes: bytes_of(&proposals),
            proposals,
            again,
        });
        Origin {
            member: self.member,
            incarnation: self.incarnation,
            batch: number,
        }
    }

    /// The last batch was refused by Raft: as if it had not been proposed.
    pub(crate) fn take_back(&mut self) -> Vec<Waiting> {
        let last = self.in_flight.pop_back().expect("a batch was proposed");
        self.next = last.number;
        last.proposals
    }

    /// Batches that were handed to the leader of this term and are not known to be committed, and their bytes.
    pub(crate) fn handed_to(&self, term: u64) -> (usize, usize) {
        let of_term = self.in_flight.iter().filter(|batch| batch.term == term);
        of_term.fold((0, 0), |(count, bytes), batch| (count + 1, bytes + batch.bytes))
    }

    /// Another member leads in a term. It may be out of sight for a while and come back.
    pub(crate) fn follow(&mut self, term: u64, leader: MemberId, tick: u64) {
        if self.window.as_ref().is_none_or(|window| window.term != term) {
            self.window = Some(Window {
                term,
                leader,
                first: self.next,
                accepted: self.next - 1,
                sent_tick: tick,
            });
        }
    }

    /// Hands a batch to the leader, in a message that is to be sent.
    ///
    /// # Panics
    /// If no other member leads.
    pub(crate) fn forward(&mut self, proposals: Vec<Waiting>, tick: u64) -> (MemberId, Forward) {
        let window = self.window.as_mut().expect("there is a leader to forward to");
        window.sent_tick = tick;
        let (leader, term) = (window.leader, window.term);
        self.propose(term, proposals, true);
        let last = self.in_flight.back().expect("a batch was proposed");
        (leader, self.message(last))
    }

    /// A message with one of this window's batches. One at a time: a message has a bound, to which a batch is held.
    fn message(&self, batch: &InFlight) -> Forward {
        let window = self.window.as_ref().expect("there is a leader to forward to");
        let operations = batch.proposals.iter().map(|waiting| waiting.proposal.operation.clone());
        Forward {
            term: window.term,
            incarnation: self.incarnation,
            window: window.first,
            first: batch.number,
            batches: vec![ForwardBatch {
                operations: operations.collect(),
            }],
        }
    }

    /// The leader said what it has.
    pub(crate) fn accepted(&mut self, from: MemberId, accepted: &Accepted) {
        if let Some(window) = &mut self.window
            && (window.leader, window.term) == (from, accepted.term)
            && accepted.incarnation == self.incarnation
        {
            window.accepted = window.accepted.max(accepted.last);
        }
    }

    /// What the leader should have had long ago: to be sent again.
    pub(crate) fn repeat(&mut self, tick: u64, after_ticks: u64) -> Vec<(MemberId, Forward)> {
        let Some(window) = &mut self.window else {
            return Vec::new();
        };
        if window.accepted + 1 == self.next || tick < window.sent_tick + after_ticks {
            return Vec::new();
        }
        window.sent_tick = tick;
        let (leader, term, accepted) = (window.leader, window.term, window.accepted);
        // The batches of this window before the first one that is left were committed, so the leader had them.
        let left = self.in_flight.iter();
        let left = left.filter(|batch| batch.term == term && batch.number > accepted);
        left.map(|batch| (leader, self.message(batch))).collect()
    }

    /// An entry of `term` was committed whose context is `context`.
    pub(crate) fn committed(&mut self, term: u64, context: &[u8]) -> Lost {
        let mut lost = Lost::default();
        if self.in_flight.is_empty() {
            return lost;
        }
        while let Some(batch) = self.in_flight.front()
            && batch.term < term
        {
            let batch = self.in_flight.pop_front().expect("there is a front");
            if batch.again {
                lost.again.extend(batch.proposals);
            } else {
                lost.never
                    .extend(batch.proposals.iter().map(|waiting| waiting.proposal.id));
            }
        }
        if context.is_empty() {
            return lost;
        }
        // Only members of ours write contexts; one that does not decode is from a later release and names none of ours.
        let origins = <Origins as prost::Message>::decode(context).unwrap_or_default().origins;
        for origin in origins {
            if origin.member == self.member && origin.incarnation == self.incarnation {
                let Some(front) = self.in_flight.front() else { break };
                if origin.batch < front.number {
                    // Forgotten when a snapshot came; see [`Outgoing::forget`].
                    continue;
                }
                assert_eq!(
                    (front.number, front.term),
                    (origin.batch, term),
                    "batches are committed in order and once"
                );
                self.in_flight.pop_front();
            }
        }
        lost
    }

    /// Entries were skipped by a snapshot: nobody knows what became of the batches in flight. The leader must not wait
    /// for those that it does not have.
    pub(crate) fn forget(&mut self) -> Vec<RequestId> {
        if let Some(window) = &mut self.window {
            (window.first, window.accepted) = (self.next, self.next - 1);
        }
        let ids = self.in_flight.drain(..).flat_map(|batch| batch.proposals);
        ids.map(|waiting| waiting.proposal.id).collect()
    }
}

fn bytes_of(proposals: &[Waiting]) -> usize {
    proposals.iter().map(|waiting| waiting.proposal.operation.len()).sum()
}

/// A follower's batch that waits to go into an entry.
#[derive(Debug)]
pub(crate) struct Accepting {
    pub(crate) origin: Origin,
    pub(crate) operations: Vec<Bytes>,
    pub(crate) bytes: usize,
}

/// What followers forward to this member while it leads.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    term: u64,
    /// The last batch taken, by member and incarnation, so that what is late or comes twice is seen to be, whichever
    /// incarnation it is from.
    taken: HashMap<(MemberId, u64), u64>,
    pub(crate) batches: VecDeque<Accepting>,
}

/// Most incarnations of all members in one term. Members that start more often than that wait for the next term.
const INCARNATIONS_MAX: usize = 4096;

impl Incoming {
    /// This member leads in `term` (0: it does not lead). What came for another term is dropped; its owner finds out
    /// from the log.
    pub(crate) fn lead(&mut self, term: u64) {
        if self.term != term {
            *self = Incoming {
                term,
                ..Default::default()
            };
        }
    }

    /// Takes batches of a follower, each once and in order; `None` if this member does not lead in their term.
    pub(crate) fn take(&mut self, from: MemberId, forward: Forward) -> Option<Accepted> {
        if self.term == 0 || forward.term != self.term {
            return None;
        }
        let key = (from, forward.incarnation);
        if self.taken.len() >= INCARNATIONS_MAX && !self.taken.contains_key(&key) {
            return None;
        }
        // What is before the window was given up, and will not come again.
        let last = self.taken.entry(key).or_insert(0);
        *last = (*last).max(forward.window.saturating_sub(1));
        for (batch, number) in forward.batches.into_iter().zip(forward.first..) {
            if number == *last + 1 {
                *last = number;
                self.batches.push_back(Accepting {
                    origin: Origin {
                        member: from,
                        incarnation: forward.incarnation,
                        batch: number,
                    },
                    bytes: batch.operations.iter().map(Bytes::len).sum(),
                    operations: batch.operations,
                });
            }
        }
        Some(Accepted {
            term: self.term,
            incarnation: forward.incarnation,
            last: *last,
        })
    }
}
