//! The thread that applies what is committed, as the server has it.

use std::sync::Arc;

use api::{Error, RequestId};
use bytes::Bytes;
use mvcc::machine::Command;
use mvcc::{Committed, CompactionProgress, Machine};
use replica::{Input, Lessor};

use crate::bugs::Bug;
use crate::clients::mark_refusal;
use crate::engine::{SimEngine, SimView};
use crate::history::{Request, Results, violation};
use crate::node::ApplyJob;
use crate::world::{Event, World, sorted};

impl World {
    pub(crate) fn apply_job(&mut self, n: usize, job: ApplyJob) {
        let reorders = self.has(Bug::ApplyReordered, 10);
        let process = self.nodes[n].process.as_mut().expect("it just stepped");
        if reorders {
            process.apply_jobs.push_front(job);
        } else {
            process.apply_jobs.push_back(job);
        }
        self.apply_next(n);
    }

    /// The apply thread takes its next job, if it is idle.
    pub(crate) fn apply_next(&mut self, n: usize) {
        let Some(process) = &mut self.nodes[n].process else {
            return;
        };
        if process.apply_doing.is_some() {
            return;
        }
        let Some(mut job) = process.apply_jobs.pop_front() else {
            if process.compaction_due {
                process.apply_doing = Some(ApplyJob::Compact);
                let (life, took) = (process.life, self.rng.u64(self.scenario.compact.clone()));
                self.at(self.now + took, Event::ApplyDone(n, life));
            }
            return;
        };
        if let ApplyJob::Entries(entries) = &mut job {
            while let Some(ApplyJob::Entries(_)) = process.apply_jobs.front()
                && let Some(ApplyJob::Entries(more)) = process.apply_jobs.pop_front()
            {
                entries.extend(more);
            }
        }
        process.apply_doing = Some(job);
        let (life, took) = (process.life, self.rng.u64(self.scenario.apply.clone()));
        self.at(self.now + took, Event::ApplyDone(n, life));
    }

    pub(crate) fn apply_done(&mut self, n: usize, life: u64) {
        if self.nodes[n].apply_stalled_until > self.now {
            let later = self.nodes[n].apply_stalled_until;
            return self.at(later, Event::ApplyDone(n, life));
        }
        let Some(process) = self.nodes[n].alive(life) else {
            return;
        };
        match process.apply_doing.take().expect("an apply step was begun") {
            ApplyJob::Entries(entries) => self.apply(n, &entries),
            ApplyJob::Compact => {}
            ApplyJob::Install {
                index,
                engine,
                report,
                sender,
            } => {
                if let Err(error) = process.machine.install(engine.clone()) {
                    // It need be neither the one that is used nor the one on disk: the next snapshot may be there already.
                    if engine.is_broken() || self.engine_failed(n) {
                        // The job is out of the queue that a crash looks through. Its sender learns of it by the connection.
                        self.report_snapshot(n, sender, false);
                        return self.stop_on_disk_error(n);
                    }
                    violation!("member {} cannot go over to a snapshot: {error}", n + 1);
                }
                if process.machine.applied().0 != index {
                    violation!(
                        "member {} installs a snapshot of another index than Raft accepted",
                        n + 1
                    );
                }
                process.lessor = Lessor::default();
                process.lessor_leads = false;
                let mut changes = sorted(process.machine.leases());
                if self.bug == Some(Bug::InstallForgetsLessor) {
                    changes.clear();
                }
                let now_ms = self.nodes[n].now_ms(self.now);
                let process = self.nodes[n].process.as_mut().expect("it runs");
                for change in changes {
                    process.lessor.apply(change, now_ms);
                }
                process.compaction_due = true;
                if let Some(number) = report {
                    self.input(n, Input::Persisted(number));
                }
                self.report_snapshot(n, sender, true);
                self.serve_reads(n);
            }
            ApplyJob::Snapshot(to) => {
                let engine = process.machine.reader().engine();
                if engine.is_damaged() {
                    // Whoever reads everything meets it.
                    return self.stop_on_disk_error(n);
                }
                let image = engine.image();
                let found = Machine::<SimEngine>::state_in(&SimView::of(image.clone()));
                let (index, term, membership) = found.expect("what was written can be read");
                process.made.insert(to, (index, image));
                let made = Input::SnapshotMade {
                    to,
                    index,
                    term,
                    membership: Arc::new(membership),
                };
                // Another thread has it, and tells of it when it gets to that.
                let later = self.now + self.rng.u64(self.scenario.apply.clone());
                self.at(later, Event::Hear(n, life, made));
            }
        }
        self.compact(n);
        self.stop_if_a_watcher_failed(n);
        self.apply_next(n);
    }

    pub(crate) fn compact(&mut self, n: usize) {
        let Some(process) = &mut self.nodes[n].process else {
            return;
        };
        if process.compaction_due {
            let keys = self.rng.usize(1..20);
            match process.machine.compact_step(keys) {
                Ok(CompactionProgress::Going { .. }) => {}
                Ok(CompactionProgress::Idle | CompactionProgress::Done { .. }) => {
                    process.compaction_due = false;
                    let reader = process.machine.reader();
                    let (dropped, hidden) = (reader.compacted_physically(), reader.compacted());
                    if dropped != hidden {
                        violation!(
                            "member {} has nothing to compact, but dropped only what is before {dropped} of {hidden}",
                            n + 1
                        );
                    }
                }
                Err(_) if self.engine_failed(n) => self.stop_on_disk_error(n),
                Err(error) => violation!("member {} cannot compact: {error}", n + 1),
            }
        }
    }

    pub(crate) fn apply(&mut self, n: usize, entries: &[Committed]) {
        let now_ms = self.nodes[n].now_ms(self.now);
        let id = self.nodes[n].id;
        let skips = self.has(Bug::ApplySkips, 200);
        let process = self.nodes[n].process.as_mut().expect("it runs");
        let skipped: Vec<Committed>;
        let entries = if skips {
            let nothing = Command::Operations(Bytes::new());
            skipped = entries
                .iter()
                .map(|entry| Committed {
                    command: nothing.clone(),
                    ..entry.clone()
                })
                .collect();
            &skipped[..]
        } else {
            entries
        };
        let mut applied = match process.machine.apply(entries) {
            Ok(applied) => applied,
            Err(_) if self.engine_failed(n) => return self.stop_on_disk_error(n),
            Err(error) => violation!("member {id} cannot apply: {error}"),
        };
        process.compaction_due |= applied.compaction_due;
        for (_, carried_out) in &applied.member_changes {
            if !carried_out {
                self.trace.mark("change of members refused");
            }
        }
        for (_, carried_out) in &mut applied.member_changes {
            match self.bug {
                Some(Bug::FollowRefusedChanges) => *carried_out = true,
                Some(Bug::IgnoreChanges) => *carried_out = false,
                _ => {}
            }
        }
        for change in &applied.lease_changes {
            process.lessor.apply(*change, now_ms);
        }
        if applied.member_changes.iter().any(|(_, carried_out)| *carried_out) {
            self.aim_at_the_only_one(n);
        }
        for digest in &applied.digests {
            self.history.digest(id, digest);
        }
        let index = entries.last().expect("nothing is applied without entries").index;
        self.trace
            .mix(&[23, index, applied.digests.last().map_or(0, |digest| digest.digest)]);
        let mut replies = applied.replies.into_iter();
        for entry in entries {
            let count = self.history.operations_of(entry.index);
            let results: Results = replies
                .by_ref()
                .take(count)
                .map(|reply| (reply.id, reply.result))
                .collect();
            self.history.results(id, entry.index, &results);
            for (request, _) in results.iter().filter(|(_, result)| result.is_err()) {
                self.came_to_nothing(n, *request);
            }
            for (request, result) in &results {
                self.answer(n, *request, result);
            }
        }
        if replies.next().is_some() {
            violation!("member {id} has more answers than operations");
        }
        self.input(
            n,
            Input::Applied {
                index,
                member_changes: applied.member_changes,
            },
        );
        self.serve_reads(n);
    }

    pub(crate) fn answer(&mut self, n: usize, request: RequestId, result: &Result<mvcc::Outcome, Error>) {
        let process = self.nodes[n].process.as_mut().expect("it runs");
        if !process.pending.contains_key(&request) {
            return;
        }
        if let Request::KeepAlive(lease) = self.history.op(request).request {
            return self.renew(n, request, lease);
        }
        if process.pending.remove(&request).is_some() {
            mark_refusal(&mut self.trace, result.as_ref().err());
            self.history.answer_write(request, result, self.now);
            self.client_done(request);
        }
    }
}
