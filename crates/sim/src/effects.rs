//! A member takes a step, and what it wants done is begun, as the server does.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use api::{Error, RequestId};
use replica::{Effect, Input, Role, Standing};

use crate::bugs::Bug;
use crate::history::{Request, violation};
use crate::node::{ApplyJob, Install, LogJob};
use crate::world::{Event, World};

impl World {
    /// Hands an input to a member's replica.
    pub(crate) fn input(&mut self, n: usize, input: Input) {
        let Some(process) = &mut self.nodes[n].process else {
            return;
        };
        process.inbox.push(input);
        if !process.step_due {
            process.step_due = true;
            let (life, delay) = (process.life, self.rng.u64(self.scenario.step.clone()));
            self.at(self.now + delay, Event::Step(n, life));
        }
    }

    pub(crate) fn step(&mut self, n: usize, life: u64) {
        let Some(process) = self.nodes[n].alive(life) else {
            return;
        };
        process.step_due = false;
        let inputs = std::mem::take(&mut process.inbox);
        process.ticks += inputs.iter().filter(|input| matches!(input, Input::Tick)).count() as u64;
        let mut effects = Vec::new();
        let replica = &mut process.replica;
        // raft-rs panics when the log cannot be read in the middle of something, which ends a server as well.
        let failure = match catch_unwind(AssertUnwindSafe(|| replica.step(inputs, &mut effects))) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) if !self.nodes[n].disk.log.is_broken() => resume_unwind(panic),
            Err(_) => Some(String::new()),
        };
        if let Some(failure) = failure {
            if self.nodes[n].disk.log.is_broken() {
                crate::run::forget_panic();
                return self.stop_on_disk_error(n);
            }
            violation!("member {} fails: {failure}", self.nodes[n].id);
        }
        for effect in effects {
            // A failing disk may have ended it in between.
            if self.nodes[n].alive(life).is_some() {
                self.carry_out(n, effect);
            }
        }
        self.check_waiting(n);
    }

    pub(crate) fn carry_out(&mut self, n: usize, effect: Effect) {
        let now = self.now;
        let id = self.nodes[n].id;
        match effect {
            Effect::Append {
                number,
                entries,
                hard_state,
                sync,
            } => {
                self.trace.mix(&[20, number, entries.len() as u64]);
                self.trace.line(now, || {
                    let range = entries
                        .first()
                        .map(|first| first.index..first.index + entries.len() as u64);
                    format!("{id} write {number}: entries {range:?}, {hard_state:?}, sync {sync}")
                });
                self.log_job(
                    n,
                    LogJob::Append {
                        number,
                        entries,
                        hard_state,
                        sync,
                    },
                );
            }
            Effect::Send(messages) => {
                for (to, message) in messages {
                    self.check_promise(n, &message);
                    self.send(n, to, &message);
                }
            }
            Effect::Apply(entries) => {
                for entry in &entries {
                    if self.history.model.is_corrupt() {
                        self.doubted_until = now;
                    }
                    if self.history.committed(id, entry) {
                        self.lease_news(entry.index);
                    }
                }
                self.aim_at_the_last_one(n, &entries);
                self.trace.mix(&[21, entries.len() as u64]);
                self.apply_job(n, ApplyJob::Entries(entries));
            }
            Effect::MakeSnapshot(to) => {
                self.trace.line(now, || format!("{id} makes a snapshot for {to}"));
                self.apply_job(n, ApplyJob::Snapshot(to));
            }
            Effect::SendSnapshot(to, message) => self.send_snapshot(n, to, &message),
            Effect::Install {
                number,
                index,
                term,
                hard_state,
            } => {
                self.trace
                    .line(now, || format!("{id} installs a snapshot of index {index}"));
                let process = self.nodes[n].process.as_mut().expect("it just stepped");
                let staged = process.staged.pop_front().expect("a snapshot came");
                let install = Install {
                    number,
                    index,
                    term,
                    hard_state,
                    staged,
                };
                self.log_job(n, LogJob::Install(Box::new(install)));
            }
            Effect::DropSnapshot => {
                self.trace.mark("snapshot of no use");
                self.trace.line(now, || format!("{id} has no use for a snapshot"));
                let process = self.nodes[n].process.as_mut().expect("it just stepped");
                let staged = process.staged.pop_front().expect("a snapshot came");
                self.report_snapshot(n, staged.sender, false);
            }
            Effect::ReadReady { id: read, index } => {
                if self.history.op(read).invoked < self.leader_since {
                    self.trace.mark("read index across leaders");
                }
                let process = self.nodes[n].process.as_mut().expect("it just stepped");
                if !process.pending.contains_key(&read) || process.reads_ready.insert(read, index).is_some() {
                    violation!("member {id} answers read {read}, which does not wait");
                }
                let process = self.nodes[n].process.as_mut().expect("it runs");
                process.last_read_index = Some(index);
                self.serve_reads(n);
            }
            Effect::Reject { .. } if self.bug == Some(Bug::RejectLost) => {}
            Effect::Reject { id: request, error } => {
                self.trace.line(now, || format!("{id} rejects {request}: {error}"));
                self.reject(n, request, error);
            }
            Effect::Standing(standing) => self.take_standing(n, standing),
        }
    }

    /// A request ends without having been carried out, as far as its node knows.
    pub(crate) fn reject(&mut self, n: usize, request: RequestId, error: Error) {
        let process = self.nodes[n].process.as_mut().expect("it just stepped");
        if let Request::Expire(..) | Request::Checkpoint(..) = self.history.op(request).request {
            self.came_to_nothing(n, request);
            return self.history.refuse(request, error);
        }
        process.keep_alives.remove(&request);
        let waited = process.pending.remove(&request).is_some();
        let waited = process.reads_ready.remove(&request).is_some() || waited;
        if !waited {
            violation!(
                "member {} ends request {request}, which does not wait there",
                self.nodes[n].id
            );
        }
        self.history.refuse(request, error);
        self.client_done(request);
    }

    pub(crate) fn take_standing(&mut self, n: usize, standing: Standing) {
        let id = self.nodes[n].id;
        self.trace.mix(&[22, standing.term, standing.leader]);
        self.trace.line(self.now, || format!("{id}: {standing:?}"));
        if standing.role == Role::Leader {
            self.history.leads(id, standing.term);
        }
        self.mark_standing(n, &standing);
        if standing.is_stalled {
            self.trace.mark("stalled log");
        }
        let now_ms = self.nodes[n].now_ms(self.now);
        let timeout_ms = self.scenario.tick * self.scenario.replica.election_ticks as u64 / 1000;
        let process = self.nodes[n].process.as_mut().expect("it just stepped");
        process.standing = standing;
        if standing.leader != 0 {
            process.leaderless_since = None;
        } else {
            process.leaderless_since.get_or_insert(process.ticks);
        }
        let leads = match self.bug {
            Some(Bug::LeadTooEarly) => standing.role == Role::Leader,
            _ => standing.has_begun,
        };
        if leads != process.lessor_leads {
            process.lessor_leads = leads;
            let led_before = std::mem::replace(&mut process.ever_led, true);
            match (leads, self.bug) {
                (_, Some(Bug::LeaseTimeNotReset)) if led_before => {}
                (true, _) => process.lessor.lead(now_ms, timeout_ms),
                (false, _) => process.lessor.follow(),
            }
        }
    }

    pub(crate) fn mark_standing(&mut self, n: usize, standing: &Standing) {
        let processes = || self.nodes.iter().filter_map(|node| node.process.as_ref());
        let before = self.nodes[n].process.as_ref().expect("it just stepped").standing;
        let mut marks = Vec::new();
        if standing.role == Role::Leader && before.role != Role::Leader {
            self.leader_since = self.now;
            if processes().any(|process| process.compaction_due) {
                marks.push("leader change during compaction");
            }
            if processes().any(|process| !process.pending.is_empty()) {
                marks.push("leader change with requests under way");
            }
            if self.invited.take() == Some(self.nodes[n].id) {
                marks.push("leadership handed over");
                self.handed_over_at = Some(self.now);
            }
            if !self.leases.is_empty() {
                marks.push("leader change with leases");
            }
            if self.change_is_under_way() {
                marks.push("leader change during a change of members");
            }
        }
        if standing.has_begun && !before.has_begun {
            self.begun_since = self.now;
        }
        if before.role == Role::Leader && standing.role != Role::Leader && standing.term == before.term {
            marks.push("leader steps down in its own term");
        }
        if standing.is_learner != before.is_learner {
            marks.push("learner promoted");
        }
        if standing.reads_locally {
            marks.push("reads without asking anybody");
        }
        for mark in marks {
            self.trace.mark(mark);
        }
    }
}
