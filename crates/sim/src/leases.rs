//! Leases: their owners keep some alive, leaders end the rest, none too early and none too late.

use std::collections::BTreeSet;

use api::codec::{Action, encode_operation};
use api::{Error, LeaseId, RaftIndex, RequestId};
use replica::{Input, Proposal};

use crate::auth::Who;
use crate::bugs::Bug;
use crate::history::{End, Request, violation};
use crate::world::{Event, World};
use crate::{MS, Micros, SECOND};

/// How long the end of a lease may take beyond its time: until someone looks, and the log has it. It counts from when the
/// lease before it ended: how many a log takes in that time depends on the world, but it takes them one after the other.
const LEASE_SLACK: Micros = 10 * SECOND;

/// Most ends of leases that a member proposes at once, as the server has it.
const REVOCATIONS_MAX: usize = 500;

/// Most owners of leases that ask at once.
const OWNERS_MAX: usize = 8;

/// What was promised about a lease.
pub struct Promise {
    /// How long it lives without a keep-alive.
    pub ttl: Micros,
    /// When whoever has it asked for that time.
    pub since: Micros,
    /// It is not ended by itself before that.
    pub until: Micros,
    /// Whose clocks said, for the log, what it has left.
    pub clocks: BTreeSet<usize>,
    /// Its end as it was last proposed: by which member, in which of its lives, in which term.
    pub ending: Option<(RequestId, (usize, u64, u64))>,
}

impl World {
    /// Real time that a member's clock may take for a lease's.
    fn shortest(&self, ttl: Micros) -> Micros {
        (ttl as f64 / (1.0 + self.scenario.skew)) as Micros
    }

    /// An entry is committed: what it says of leases.
    pub(crate) fn lease_news(&mut self, index: RaftIndex) {
        let results = self.history.results_of(index).iter();
        let done: Vec<RequestId> = results
            .filter(|(_, result)| result.is_ok())
            .map(|(id, _)| *id)
            .collect();
        for id in done.into_iter().filter(|id| *id != 0) {
            let op = self.history.op(id);
            match &op.request {
                Request::Write(action) => match &**action {
                    Action::LeaseGrant(grant) => {
                        let ttl = grant.ttl as u64 * SECOND;
                        let until = op.invoked + self.shortest(ttl);
                        let since = op.invoked;
                        let promise = Promise {
                            ttl,
                            since,
                            until,
                            clocks: BTreeSet::new(),
                            ending: None,
                        };
                        self.leases.insert(grant.id, promise);
                    }
                    Action::LeaseRevoke(revoke) => drop(self.leases.remove(&revoke.id)),
                    _ => {}
                },
                &Request::Expire(lease, term) => {
                    if self.history.term(index) != term {
                        violation!("lease {lease} is ended in another term than the leader of {term} wanted");
                    }
                    let promise = self.leases.remove(&lease).expect("it was there");
                    // Members count in whole milliseconds, and believe their clocks, and what others' clocks had to say.
                    let mut clocks = promise.clocks;
                    clocks.insert(op.node);
                    let jumped = clocks
                        .iter()
                        .map(|&n| self.nodes[n].jumped_ms_since(promise.since) * MS);
                    let jumped: Micros = jumped.sum();
                    if self.now + 2 * MS + jumped < promise.until {
                        violation!(
                            "lease {lease} is ended {} ms too early",
                            (promise.until - self.now) / MS
                        );
                    }
                    self.lease_ended_at = self.now;
                    self.trace.mark("lease ended");
                    if self.now < self.leader_since + promise.ttl + 3 * SECOND {
                        self.trace.mark("lease ended soon after a leader change");
                    }
                    if self
                        .handed_over_at
                        .is_some_and(|at| self.now < at + promise.ttl + 3 * SECOND)
                    {
                        self.trace.mark("lease ended at a hand-over");
                    }
                }
                Request::Checkpoint(lease, ..) => {
                    if let Some(promise) = self.leases.get_mut(lease) {
                        promise.clocks.insert(op.node);
                    }
                }
                _ => {}
            }
        }
    }

    /// A lease that lives on long after its time, though a leader was there to end it.
    pub(crate) fn lease_overdue(&self) -> Option<String> {
        // Until then clients may have kept it alive without knowing whether they did.
        let clients_left = self.calm_since? + 11 * SECOND;
        // How long the others may take to elect one, and that one to bring a quorum so far that its term can begin, is
        // looked at elsewhere: leases have their full time from there.
        let has_begun = |n: usize| {
            let process = self.nodes[n].process.as_ref();
            process.is_some_and(|process| process.standing.has_begun)
        };
        if !(0..self.nodes.len()).any(|n| has_begun(n) && self.belongs(n)) {
            return None;
        }
        if self.history.model.is_corrupt() {
            return None;
        }
        self.leases.iter().find_map(|(id, promise)| {
            let slowest = 1.0 - self.scenario.skew;
            let since = promise.since.max(self.begun_since).max(clients_left);
            let due = since + ((promise.ttl + SECOND) as f64 / slowest) as Micros;
            let due = due.max(self.doubted_until).max(self.lease_ended_at);
            (self.now > due + LEASE_SLACK).then(|| format!("lease {id} of {} s is alive still", promise.ttl / SECOND))
        })
    }

    /// A member looks for leases whose time is over.
    pub(crate) fn look_at_leases(&mut self, n: usize, life: u64) {
        let now_ms = self.nodes[n].now_ms(self.now);
        let Some(process) = self.nodes[n].alive(life) else {
            return;
        };
        let standing = process.standing;
        let mut names = self.history.requests() as RequestId + 1..;
        let next_name = || names.next().expect("there is no end of them");
        let expired = process.lessor.expired(now_ms, REVOCATIONS_MAX, next_name);
        let checkpoints = process.lessor.checkpoints(now_ms, 10);
        for &(id, lease) in &expired {
            self.check_is_first(n, life, id, lease);
        }
        let expired = expired
            .into_iter()
            .map(|(_, lease)| Request::Expire(lease, standing.term));
        let checkpoints = checkpoints
            .into_iter()
            .map(|checkpoint| Request::Checkpoint(checkpoint.id, checkpoint.remaining_ttl, standing.term));
        for request in expired.chain(checkpoints).collect::<Vec<_>>() {
            let id = self.history.invoke(request.clone(), Who::member(), n, self.now);
            let operation = self.history.operation(id).expect("it has one");
            self.trace
                .line(self.now, || format!("{} proposes {id}: {request:?}", n + 1));
            let leader_term = if self.bug == Some(Bug::RevokeInAnyTerm) {
                0
            } else {
                standing.term
            };
            let proposal = Proposal {
                id,
                operation: encode_operation(&operation),
                leader_term,
            };
            self.input(n, Input::Propose(proposal));
        }
        self.at(self.now + 500 * MS, Event::Leases(n, life));
    }

    /// A member is about to propose the end of a lease: no such proposal of its is under way, or they would pile up where
    /// commits are slow.
    fn check_is_first(&mut self, n: usize, life: u64, id: RequestId, lease: LeaseId) {
        let standing = self.nodes[n].process.as_ref().expect("it runs").standing;
        let reign = (n, life, standing.term);
        let Some(promise) = self.leases.get_mut(&lease) else {
            return;
        };
        if let Some((before, _)) = promise.ending.replace((id, reign)).filter(|(_, of)| *of == reign) {
            let op = self.history.op(before);
            if op.end == End::Waiting && op.committed.is_none() {
                violation!("the end of lease {lease} is proposed as {id}, while {before} is under way");
            }
            self.trace.mark("lease's end proposed again by the same leader");
        }
    }

    /// What a member proposed was refused, or had no effect.
    pub(crate) fn came_to_nothing(&mut self, n: usize, request: RequestId) {
        if self.bug == Some(Bug::RevocationsStayUnderWay) {
            return;
        }
        let now_ms = self.nodes[n].now_ms(self.now);
        let process = self.nodes[n].process.as_mut().expect("it runs");
        process.lessor.came_to_nothing(request, now_ms);
    }

    /// Owners of leases whose connections hung ask all at once, before the member hears anything else.
    pub(crate) fn owners_ask(&mut self, n: usize) {
        if self.calm_since.is_some() || self.nodes[n].process.is_none() || self.nodes[n].paused_until > self.now {
            return;
        }
        let mut leases: Vec<LeaseId> = self.leases.keys().copied().collect();
        self.rng_aims.shuffle(&mut leases);
        for lease in leases.into_iter().take(OWNERS_MAX) {
            self.ask(n, Request::KeepAlive(lease), Who::member());
        }
    }

    /// A lease's owner asks a member for more time.
    pub(crate) fn keep_alive(&mut self, n: usize, id: RequestId, lease: LeaseId) {
        let now_ms = self.nodes[n].now_ms(self.now);
        let process = self.nodes[n].process.as_mut().expect("it runs");
        if !process.lessor_leads {
            return self.reject(n, id, Error::NotLeader);
        }
        if !process.lessor.postpone_checkpoint(lease, now_ms) || self.bug == Some(Bug::CheckpointStays) {
            return self.renew(n, id, lease);
        }
        // The next leader would otherwise begin with what the log says is left.
        self.trace.mark("checkpoint taken back");
        let operation = self.history.operation(id).expect("it has one");
        let leader_term = process.standing.term;
        let proposal = Proposal {
            id,
            operation: encode_operation(&operation),
            leader_term,
        };
        self.input(n, Input::Propose(proposal));
    }

    /// The log says nothing against the lease's full time any more.
    pub(crate) fn renew(&mut self, n: usize, id: RequestId, lease: LeaseId) {
        let now_ms = self.nodes[n].now_ms(self.now);
        let process = self.nodes[n].process.as_mut().expect("it runs");
        let stays = self.bug == Some(Bug::CheckpointStays);
        if !process.lessor_leads || (process.lessor.postpone_checkpoint(lease, now_ms) && !stays) {
            return self.give_no_answer(n, id);
        }
        if process.lessor.keep_alive(lease, now_ms).is_none() {
            return self.give_no_answer(n, id);
        }
        let term = process.standing.term;
        process.keep_alives.insert(id, term);
        if self.bug == Some(Bug::KeepAliveUnconfirmed) {
            return self.kept_alive(n, id, lease);
        }
        // Only if it still leads after that does the time count: a leader that was replaced does not know of it.
        self.input(n, Input::ReadIndex(id));
    }

    /// Leaders are often cut off when they have just promised more time to a lease of which the log said less: the next
    /// one has that in its log, and does not know yet that it is committed.
    fn aim_at_lease(&mut self, n: usize, id: RequestId) {
        let is_aim = self.scenario.aims && self.calm_since.is_none() && self.history.op(id).committed.is_some();
        if is_aim && self.now > self.leader_since + 3 * SECOND && self.rng_aims.u8(..3) > 0 {
            self.trace.mark("leader cut off right after a promise to a lease");
            self.faults += 1;
            let time = self.rng_aims.u64(SECOND..6 * SECOND);
            self.cut_off(n, time);
        }
    }

    fn give_no_answer(&mut self, n: usize, id: RequestId) {
        let process = self.nodes[n].process.as_mut().expect("it runs");
        process.pending.remove(&id);
        self.history.refuse(id, Error::TimeoutLeaderFail);
        self.client_done(id);
    }

    /// The others confirm that the member leads: the lease has its full time from when it was asked for.
    pub(crate) fn kept_alive(&mut self, n: usize, id: RequestId, lease: LeaseId) {
        let process = self.nodes[n].process.as_mut().expect("it runs");
        process.pending.remove(&id);
        let renewed = process.keep_alives.remove(&id);
        let standing = process.standing;
        if renewed != Some(standing.term) || !standing.has_begun {
            self.history.refuse(id, Error::TimeoutLeaderFail);
        } else {
            self.trace.mark("lease kept alive");
            self.history.answer_keep_alive(id);
            let invoked = self.history.op(id).invoked;
            let ttl = self.leases.get(&lease).map_or(0, |promise| promise.ttl);
            let until = invoked + self.shortest(ttl);
            if let Some(promise) = self.leases.get_mut(&lease) {
                promise.until = promise.until.max(until);
                promise.since = promise.since.max(invoked);
            }
            self.aim_at_lease(n, id);
        }
        self.client_done(id);
    }
}
