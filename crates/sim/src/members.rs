//! Who belongs to the cluster changes while everything else goes on.

use api::codec::{Action, MemberChange, MemberChangeKind};
use api::kv::Member;
use api::{MemberId, RequestId};
use replica::Input;

use crate::engine::SimEngine;
use crate::history::{End, Request};
use crate::log::SimLog;
use crate::node::Disk;
use crate::world::{Event, World, member_of};
use crate::{MS, SECOND};

/// Most members, those that left not counted.
const MEMBERS_MAX: usize = 7;

impl World {
    /// The operator changes something.
    pub(crate) fn operate(&mut self) {
        if self.change_is_under_way() {
            return;
        }
        let members = self.history.model.members.members.clone();
        let running: Vec<usize> = (0..self.nodes.len())
            .filter(|&n| self.nodes[n].process.is_some())
            .collect();
        let leader = running.iter().copied().find(|&n| self.leads(n));
        let Some(&any) = self.rng_faults.choice(&running) else {
            return;
        };
        let node = leader.filter(|_| self.rng_faults.u8(..5) > 0).unwrap_or(any);
        let learner = members.iter().find(|member| member.is_learner).map(|member| member.id);
        let (kind, member) = match (self.rng_faults.u8(..100), learner) {
            // A member whose disk is gone leaves before anything else changes.
            _ if self
                .wiped
                .is_some_and(|id| members.iter().any(|member| member.id == id)) =>
            {
                (
                    MemberChangeKind::Remove,
                    member_of(self.wiped.expect("it was asked for")),
                )
            }
            (0..40, _) if members.len() < MEMBERS_MAX => {
                let joiner = self.add_node(SimLog::default());
                let id = self.nodes[joiner].id;
                let at = self.now + self.rng_faults.u64(..3 * SECOND);
                self.at(at, Event::Start(joiner));
                let is_learner = self.rng_faults.u8(..3) > 0;
                let member = Member {
                    is_learner,
                    ..member_of(id)
                };
                (MemberChangeKind::Add, member)
            }
            (40..75, Some(learner)) => (MemberChangeKind::Promote, member_of(learner)),
            // Changes that are refused: Raft must not follow them.
            (75..80, _) => {
                let known = self.rng_faults.usize(..members.len().max(1));
                let kind = [MemberChangeKind::Add, MemberChangeKind::Promote][self.rng_faults.usize(..2)];
                (kind, members.get(known).cloned().unwrap_or_default())
            }
            (_, _) if !members.is_empty() => {
                let gone = self.rng_faults.usize(..members.len());
                if leader.is_some_and(|leader| self.nodes[leader].id == members[gone].id) {
                    self.trace.mark("leader removes itself");
                    if self.rng_faults.bool() {
                        self.input(node, Input::Transfer(0));
                    }
                }
                (MemberChangeKind::Remove, members[gone].clone())
            }
            _ => return,
        };
        let change = MemberChange {
            kind: kind.into(),
            member: Some(member),
        };
        let id = self.ask(node, Request::Write(Box::new(Action::MemberChange(change))));
        self.changes.push(id);
    }

    /// A disk is lost for good, and the member with it.
    pub(crate) fn wipe(&mut self, n: usize) {
        let settled = |id: &RequestId| {
            let op = self.history.op(*id);
            op.committed.is_some() || matches!(op.end, End::Refused(_))
        };
        // Only members that have applied the newest change know whose votes they need. With fewer of them the cluster is
        // still the one before, which may not be able to lose this disk.
        let knows = |voter: &MemberId| {
            let process = self.nodes[*voter as usize - 1].process.as_ref();
            process.is_some_and(|process| **process.machine.membership() == self.history.model.members)
        };
        let voters: Vec<MemberId> = self.history.model.members.voters().collect();
        let id = self.nodes[n].id;
        let others = voters.iter().filter(|voter| **voter != id && knows(voter)).count();
        if self.wiped.is_some()
            || voters.len() < 3
            || !voters.contains(&id)
            || !self.changes.iter().all(settled)
            || 2 * others <= voters.len()
        {
            return;
        }
        self.trace.mark("disk lost");
        self.trace
            .line(self.now, || format!("the disk of {id} is lost for good"));
        self.crash(n);
        self.wiped = Some(id);
        self.retire(n);
    }

    fn retire(&mut self, n: usize) {
        self.crash(n);
        self.nodes[n].retired = true;
        self.nodes[n].disk = Disk {
            log: SimLog::default().into(),
            engine: SimEngine::empty().into(),
        };
    }

    /// A member that was removed stops, some time after the others know.
    pub(crate) fn retire_if_removed(&mut self, n: usize) {
        let id = self.nodes[n].id;
        let members = &self.history.model.members;
        if !members.is_removed(id) {
            return;
        }
        let knows = |voter: MemberId| {
            let process = self.nodes[voter as usize - 1].process.as_ref();
            process.is_some_and(|process| process.machine.membership().is_removed(id))
        };
        let (know, voters) = (
            members.voters().filter(|&voter| knows(voter)).count(),
            members.voters().count(),
        );
        if 2 * know > voters && self.rng_faults.u8(..8) == 0 {
            self.trace.mark("removed member stopped");
            self.trace.line(self.now, || format!("{id} was removed and stops"));
            self.retire(n);
        }
    }

    /// Whether the operator waits for a change of members.
    pub(crate) fn change_is_under_way(&self) -> bool {
        let waits = |id: &RequestId| self.history.op(*id).end == End::Waiting;
        self.changes.last().is_some_and(waits)
    }

    /// Whether a node must keep up with the others.
    pub(crate) fn belongs(&self, n: usize) -> bool {
        let node = &self.nodes[n];
        !node.retired && self.history.model.members.get(node.id).is_some()
    }
}

/// How long after the last fault the operator still mends what is half done.
pub const OPERATOR_MENDS: u64 = 20 * SECOND;

/// Time between what the operator does.
pub const OPERATOR_PAUSE: std::ops::Range<u64> = 500 * MS..6 * SECOND;
