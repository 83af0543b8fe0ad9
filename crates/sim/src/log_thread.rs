//! The thread that writes the Raft log and puts snapshots in place, as the server has it.

use std::ops::Range;
use std::sync::Arc;

use api::Error;
use api::codec::decode_entry;
use mvcc::Committed;
use mvcc::machine::Command;
use replica::Input;
use storage::RaftLog;

use crate::bugs::Bug;
use crate::engine::SimEngine;
use crate::history::violation;
use crate::node::{ApplyJob, Install, LogJob, Writing};
use crate::promises::check_trim;
use crate::world::{Event, World};
use crate::{MS, Micros};

/// How long a sync of a slow disk takes: less than an election timeout.
const SLOW_SYNC: Range<Micros> = 300 * MS..950 * MS;

impl World {
    pub(crate) fn log_job(&mut self, n: usize, job: LogJob) {
        let process = self.nodes[n].process.as_mut().expect("it just stepped");
        process.log_jobs.push_back(job);
        self.log_next(n);
    }

    /// The log's thread takes its next job, if it is idle.
    pub(crate) fn log_next(&mut self, n: usize) {
        let (merge, bug) = (self.scenario.merge_appends, self.bug);
        let node = &mut self.nodes[n];
        let log = &node.disk.log;
        let Some(process) = &mut node.process else { return };
        if process.log_doing.is_some() {
            return;
        }
        let mut early = None;
        while let Some(job) = process.log_jobs.pop_front() {
            match job {
                LogJob::Append {
                    mut number,
                    mut entries,
                    mut hard_state,
                    mut sync,
                } => {
                    // As the server does: one write for all that wait, unless an entry replaces one of the same write.
                    while merge
                        && process.log_jobs.front().is_some_and(|job| match (job, entries.last()) {
                            (LogJob::Append { entries: next, .. }, Some(last)) => {
                                next.first().is_none_or(|next| next.index == last.index + 1)
                                    || bug == Some(Bug::MergeOverlapping)
                            }
                            (LogJob::Append { .. }, None) => true,
                            _ => false,
                        })
                    {
                        if let Some(LogJob::Append {
                            number: n,
                            entries: e,
                            hard_state: h,
                            sync: s,
                        }) = process.log_jobs.pop_front()
                        {
                            number = n;
                            entries.extend(e);
                            hard_state = match bug {
                                Some(Bug::OldHardStateWins) => hard_state.or(h),
                                _ => h.or(hard_state),
                            };
                            sync |= s;
                        }
                    }
                    if let Err(error) = log.append(&entries, hard_state.as_ref(), false) {
                        if log.is_broken() {
                            return self.stop_on_disk_error(n);
                        }
                        violation!("member {} is told to write what the log refuses: {error}", node.id);
                    }
                    if bug == Some(Bug::ReportBeforeSync) {
                        early = Some(number);
                    }
                    if bug == Some(Bug::NoSync) || (bug == Some(Bug::VoteNotSynced) && entries.is_empty()) {
                        sync = false;
                    }
                    process.log_doing = Some(Writing::Append { number, sync });
                }
                LogJob::Trim(index) => {
                    // As the server does: one that was asked for before a snapshot came has nothing to do any more.
                    let index = match bug {
                        Some(Bug::TrimOneTooMany) => index,
                        _ => index.min(log.last_index() + 1),
                    };
                    check_trim(node.id, &node.disk, process.replica.known_applied(), index);
                    if let Err(error) = log.trim(index) {
                        violation!("member {} cannot trim its log: {error}", node.id);
                    }
                    continue;
                }
                LogJob::Install(install) => process.log_doing = Some(Writing::Install(install)),
            }
            break;
        }
        let took = match &process.log_doing {
            None => return,
            Some(Writing::Append { sync: false, .. }) => self.rng.u64(1..50),
            Some(_) if node.slow_until > self.now => self.rng.u64(SLOW_SYNC),
            Some(_) => self.rng.u64(self.scenario.sync.clone()),
        };
        let (life, stalled) = (process.life, node.stalled_until);
        let installs = matches!(process.log_doing, Some(Writing::Install(_)));
        if installs && self.scenario.aims && self.rng_aims.u8(..3) == 0 {
            let at = self.now + self.rng_aims.u64(..=took);
            self.at(at, Event::Crash(n, life));
        }
        self.at((self.now + took).max(stalled), Event::LogDone(n, life));
        if let Some(number) = early {
            self.input(n, Input::Persisted(number));
        }
    }

    pub(crate) fn log_done(&mut self, n: usize, life: u64) {
        if self.nodes[n].stalled_until > self.now {
            let later = self.nodes[n].stalled_until;
            return self.at(later, Event::LogDone(n, life));
        }
        let now = self.now;
        let node = &mut self.nodes[n];
        let Some(process) = node.process.as_mut().filter(|process| process.life == life) else {
            return;
        };
        match process.log_doing.take().expect("a write was begun") {
            Writing::Append { number, sync } => {
                if sync {
                    node.disk.log.sync();
                }
                self.trace.line(now, || format!("{} has written {number}", node.id));
                match self.bug {
                    Some(Bug::ReportBeforeSync) => {}
                    Some(Bug::ReportTooMuch) => self.input(n, Input::Persisted(number + 1)),
                    _ => self.input(n, Input::Persisted(number)),
                }
            }
            Writing::Install(install) => {
                let Install {
                    number,
                    index,
                    term,
                    mut hard_state,
                    staged,
                } = *install;
                let engine = Arc::new(SimEngine::holding(node.disk.engine.kind(), staged.image));
                if self.bug == Some(Bug::InstallLosesVote) {
                    (hard_state.term, hard_state.vote) = (term, 0);
                }
                if self.bug != Some(Bug::InstallKeepsLog) {
                    node.disk.log.reset(index, term, &hard_state).expect("the disk works");
                }
                if self.bug != Some(Bug::InstallNotDurable) {
                    node.disk.engine = engine.clone();
                }
                self.trace.mark("snapshot installed");
                if !process.pending.is_empty() {
                    self.trace.mark("snapshot installed with requests under way");
                }
                self.trace
                    .line(now, || format!("{} has installed index {index}", node.id));
                let mut dropped = Vec::new();
                if self.scenario.install_drops {
                    process.apply_jobs.retain(|job| match job {
                        ApplyJob::Entries(entries) => {
                            dropped.extend(entries.iter().cloned());
                            false
                        }
                        _ => true,
                    });
                }
                let early = self.scenario.install_reports_early;
                let report = (!early).then_some(number);
                process.apply_jobs.push_back(ApplyJob::Install {
                    index,
                    engine,
                    report,
                    sender: staged.sender,
                });
                if early {
                    self.input(n, Input::Persisted(number));
                }
                self.dropped(n, &dropped);
                self.apply_next(n);
            }
        }
        self.log_next(n);
    }

    /// Entries were not applied because a snapshot includes them: nobody knows the results of their operations.
    pub(crate) fn dropped(&mut self, n: usize, entries: &[Committed]) {
        if self.bug == Some(Bug::DroppedNotAnswered) {
            return;
        }
        for entry in entries {
            self.trace.mark("entries dropped by an install");
            let (Command::Operations(data) | Command::MemberChange(data)) = &entry.command;
            for operation in decode_entry(data).expect("it was committed") {
                let process = self.nodes[n].process.as_ref().expect("it runs");
                if process.pending.contains_key(&operation.id()) {
                    self.trace.mark("operation's entry dropped by an install");
                    self.reject(n, operation.id(), Error::TimeoutLeaderFail);
                }
            }
        }
    }
}
