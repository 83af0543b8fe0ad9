//! Who belongs to the cluster changes while everything else goes on.

use api::codec::{Action, MemberChange, MemberChangeKind};
use api::kv::Member;
use api::{MemberId, RequestId};
use mvcc::Committed;
use mvcc::machine::Command;
use replica::Input;

use crate::auth::Who;
use crate::engine::SimEngine;
use crate::history::{End, Request};
use crate::log::SimLog;
use crate::node::Disk;
use crate::world::{Event, World, member_of};
use crate::{MS, SECOND};

/// Most members, those that left not counted.
const MEMBERS_MAX: usize = 7;

/// How many read from a member that has just become the only one.
const READERS: usize = 4;

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
                let any = self.rng_operator.usize(..members.len());
                // Of two voters often the one that leads, since it leaves the other in a rare state.
                let leads = |member: &Member| leader.is_some_and(|leader| self.nodes[leader].id == member.id);
                let leads = members.iter().position(leads);
                let is_aim = self.aims() && self.history.model.members.voters().count() == 2 && self.rng_aims.bool();
                let gone = leads.filter(|_| is_aim).unwrap_or(any);
                if leader.is_some_and(|leader| self.nodes[leader].id == members[gone].id) {
                    self.trace.mark("leader removes itself");
                    if self.rng_operator.bool() {
                        self.input(node, Input::Transfer(0));
                    }
                    self.aim_at_who_is_left(members[gone].id);
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

    /// A leader is about to leave. If that leaves one voter, its disk is often slow just then, while clients ask it for
    /// much, and the leader goes on for a while before it applies that it has left, or is out of reach: so the other one is
    /// on its own with entries that it has not written yet.
    fn aim_at_who_is_left(&mut self, gone: MemberId) {
        let left: Vec<MemberId> = self.history.model.members.voters().filter(|&id| id != gone).collect();
        if let (&[left], true) = (&left[..], self.aims())
            && self.rng_aims.u8(..3) > 0
        {
            self.trace.mark("left as the only voter with a slow disk");
            self.faults += 1;
            let time = self.rng_aims.u64(3 * SECOND..8 * SECOND);
            self.trace
                .line(self.now, || format!("the disk of {left} is slow for {time} us"));
            let (left, gone) = (left as usize - 1, gone as usize - 1);
            self.nodes[left].slow_until = self.now + time;
            self.gather(left);
            let ends = self.now + self.rng_aims.u64(SECOND..5 * SECOND);
            if self.rng_aims.bool() {
                self.nodes[gone].apply_stalled_until = ends;
            } else {
                self.at(ends, Event::CutOff(gone));
            }
        }
    }

    /// A member is about to apply that it is the only one that is left. It often takes its time, while the one that
    /// leaves has already applied, and tells its clients, what comes after that.
    pub(crate) fn aim_at_the_last_one(&mut self, n: usize, entries: &[Committed]) {
        let is_change = |entry: &Committed| matches!(entry.command, Command::MemberChange(_));
        if self.aims() && self.is_left_alone(n) && entries.iter().any(is_change) && self.rng_aims.bool() {
            self.trace.mark("the last one applies nothing for a while");
            self.faults += 1;
            let time = self.rng_aims.u64(50 * MS..1500 * MS);
            self.trace
                .line(self.now, || format!("{} applies nothing for {time} us", n + 1));
            self.nodes[n].apply_stalled_until = self.now + time;
            if let Some(other) = (0..self.nodes.len()).rfind(|&other| other != n && self.nodes[other].process.is_some())
            {
                self.gather(other);
            }
        }
    }

    /// A member has applied that it is the only one that is left. It often takes its time with what comes after that, and
    /// clients ask it.
    pub(crate) fn aim_at_the_only_one(&mut self, n: usize) {
        if self.aims() && self.is_left_alone(n) && self.rng_aims.u8(..4) > 0 {
            let time = self.rng_aims.u64(50 * MS..SECOND);
            self.nodes[n].apply_stalled_until = self.now + time;
            self.gather(n);
            for _ in 0..READERS {
                let at = self.now + self.rng_aims.u64(MS..time);
                self.at(at, Event::Reader(n));
            }
        }
    }

    fn aims(&self) -> bool {
        self.scenario.aims && self.calm_since.is_none()
    }

    /// Whether a member is the only one, as far as is committed.
    fn is_left_alone(&self, n: usize) -> bool {
        let mut members = self.history.model.members.members.iter();
        members.next().is_some_and(|member| member.id == self.nodes[n].id) && members.next().is_none()
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
        let left = members.voters().next().filter(|_| voters == 1);
        let is_aim = left.is_some() && self.aims() && self.rng_aims.bool();
        if 2 * know > voters && (self.rng_operator.u8(..8) == 0 || is_aim) {
            self.trace.mark("removed member stopped");
            self.trace.line(self.now, || format!("{id} was removed and stops"));
            self.retire(n);
            // The only one that is left crashes before it writes anything else: it must know that it is.
            if let Some(left) = left.filter(|_| is_aim) {
                let left = left as usize - 1;
                let life = self.nodes[left].starts;
                let at = self.now + self.rng_aims.u64(..100 * MS);
                self.trace.mark("the last one crashes when the others have gone");
                self.at(at, Event::Crash(left, life));
            }
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
