//! Who belongs to the cluster changes while everything else goes on.

use api::codec::{Action, MemberChange, MemberChangeKind};
use api::kv::Member;
use api::{MemberId, RequestId};
use replica::Input;

use crate::SECOND;
use crate::auth::Who;
use crate::engine::SimEngine;
use crate::history::{End, Request};
use crate::log::SimLog;
use crate::node::Disk;
use crate::world::{Event, World, member_of};

/// Most members, those that left not counted.
const MEMBERS_MAX: usize = 7;

impl World {
    /// The operator changes something.
    pub(crate) fn operate(&mut self) {
        if self.change_is_under_way() {
            return;
        }
        // One that was replaced is nobody's concern any more.
        self.wiped.take_if(|id| self.history.model.members.is_removed(*id));
        let members = self.history.model.members.members.clone();
        let running: Vec<usize> = (0..self.nodes.len())
            .filter(|&n| self.nodes[n].process.is_some())
            .collect();
        let leader = running.iter().copied().find(|&n| self.leads(n));
        let Some(&any) = self.rng_operator.choice(&running) else {
            return;
        };
        let node = leader.filter(|_| self.rng_operator.u8(..5) > 0).unwrap_or(any);
        let learner = members.iter().find(|member| member.is_learner).map(|member| member.id);
        let (kind, member) = match (self.rng_operator.u8(..100), learner) {
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
                let at = self.now + self.rng_operator.u64(..3 * SECOND);
                self.at(at, Event::Start(joiner));
                let is_learner = self.rng_operator.u8(..3) > 0;
                let member = Member {
                    is_learner,
                    ..member_of(id)
                };
                (MemberChangeKind::Add, member)
            }
            (40..75, Some(learner)) => (MemberChangeKind::Promote, member_of(learner)),
            // Changes that are refused: Raft must not follow them.
            (75..80, _) => {
                let known = self.rng_operator.usize(..members.len().max(1));
                let kind = [MemberChangeKind::Add, MemberChangeKind::Promote][self.rng_operator.usize(..2)];
                (kind, members.get(known).cloned().unwrap_or_default())
            }
            (_, _) if !members.is_empty() => {
                let gone = self.rng_operator.usize(..members.len());
                if leader.is_some_and(|leader| self.nodes[leader].id == members[gone].id) {
                    self.trace.mark("leader removes itself");
                    if self.rng_operator.bool() {
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
        let id = self.ask(
            node,
            Request::Write(Box::new(Action::MemberChange(change))),
            Who::default(),
        );
        self.changes.push(id);
    }

    /// Whether the cluster can bear the loss of a disk: it has others, they know whose votes they need, and none of
    /// theirs is lost or damaged.
    pub(crate) fn can_be_lost(&self, n: usize) -> bool {
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
        self.wiped.is_none()
            && voters.len() >= 3
            && voters.contains(&id)
            && self.changes.iter().all(settled)
            && 2 * others > voters.len()
    }

    /// A disk is lost for good, and the member with it.
    pub(crate) fn wipe(&mut self, n: usize) {
        if !self.can_be_lost(n) {
            return;
        }
        let id = self.nodes[n].id;
        self.trace.mark("disk lost");
        self.trace
            .line(self.now, || format!("the disk of {id} is lost for good"));
        self.wiped = Some(id);
        self.retire(n);
    }

    pub(crate) fn retire(&mut self, n: usize) {
        self.crash(n);
        let node = &mut self.nodes[n];
        node.retired = true;
        node.disk = Disk {
            log: SimLog::default().into(),
            engine: SimEngine::empty(node.disk.engine.kind()).into(),
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
        if 2 * know > voters && self.rng_operator.u8(..8) == 0 {
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
