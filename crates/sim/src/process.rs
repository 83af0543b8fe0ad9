//! A process around a member, from its start to its end: what it takes up, what a crash leaves, and who looks after
//! the disk meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;

use mvcc::Machine;
use replica::{Input, Lessor, Replica, ReplicaError};
use storage::RaftLog;

use crate::bugs::Bug;
use crate::engine::{Kind, SimEngine};
use crate::history::violation;
use crate::log::SimLog;
use crate::node::{ApplyJob, Disk, Harm, LogJob, Process, Writing};
use crate::world::{Event, World, sorted};
use crate::{MS, Micros, SECOND};

impl World {
    /// A node starts, or starts again.
    pub(crate) fn start(&mut self, n: usize) {
        let now = self.now;
        let forgets = self.has(Bug::ForgetOnRestart, 4);
        let bug = self.bug;
        let node = &mut self.nodes[n];
        if node.process.is_some() || node.retired {
            return;
        }
        node.starts += 1;
        let life = node.starts;
        if life > 1 && forgets {
            node.disk = Disk {
                log: SimLog::default().into(),
                engine: SimEngine::empty(node.disk.engine.kind()).into(),
            };
        }
        if let Some(harm) = node.harm.take()
            && !self.suffer(n, harm)
        {
            return self.retire(n);
        }
        let node = &mut self.nodes[n];
        if life > 1 && bug == Some(Bug::HardStateLost) {
            node.disk.log.lose_hard_state();
        }
        let options = mvcc::Options {
            record_cache_bytes: 64 << 10,
            list_cache_bytes: 16 << 10,
            list_cache_keys_min: 1,
            watch_buffer_events_max: 16,
            watch_buffer_bytes_max: 1 << 10,
        };
        let machine = match Machine::open(node.disk.engine.clone(), &options) {
            Ok(machine) => machine,
            Err(_) if node.disk.engine.is_broken() => return self.refuse_to_start(n),
            Err(error) => violation!("member {} does not start: {error}", node.id),
        };
        let mut config = self.scenario.replica.clone();
        config.id = node.id;
        config.incarnation = node.id << 32 | life;
        if bug == Some(Bug::SameIncarnation) {
            config.incarnation = node.id;
        }
        config.seed = self.rng.u64(..);
        let (applied, _) = machine.applied();
        let (first, last) = (node.disk.log.first_index(), node.disk.log.last_index());
        self.trace.line(now, || {
            format!(
                "start {} with life {life}: log {first}..={last}, applied {applied}",
                node.id
            )
        });
        let log = node.disk.log.clone();
        let replica = match Replica::open(config, log, applied, machine.membership(), &self.logger) {
            Ok(replica) => replica,
            // The state is from before the log was trimmed: a disk that came back with old blocks.
            Err(ReplicaError::StateBehindLog { .. }) if node.was_harmed => {
                self.trace.mark("old blocks refused");
                return self.retire(n);
            }
            Err(error) => violation!("member {} does not start: {error}", node.id),
        };
        let mut lessor = Lessor::default();
        let now_ms = node.now_ms(now);
        for change in sorted(machine.leases()) {
            lessor.apply(change, now_ms);
        }
        let standing = replica.standing();
        node.process = Some(Process {
            life,
            replica,
            machine,
            lessor,
            inbox: Vec::new(),
            step_due: false,
            log_jobs: Default::default(),
            log_doing: None,
            apply_jobs: Default::default(),
            apply_doing: None,
            pending: BTreeMap::new(),
            ticks: 0,
            leaderless_since: Some(0),
            reads_ready: BTreeMap::new(),
            last_read_index: None,
            made: BTreeMap::new(),
            staged: Default::default(),
            standing,
            lessor_leads: false,
            ever_led: false,
            keep_alives: BTreeMap::new(),
            compaction_due: true,
        });
        self.input(n, Input::Campaign);
        self.apply_next(n);
        if self.nodes[n].is_quarantined {
            self.input(n, Input::Quarantine(true));
        }
        let tick = self.rng.u64(..self.scenario.tick);
        self.at(now + tick, Event::Tick(n, life));
        let upkeep = self.rng.u64(self.scenario.upkeep.clone());
        self.at(now + upkeep, Event::Upkeep(n, life));
        let leases = self.rng.u64(..500 * MS);
        self.at(now + leases, Event::Leases(n, life));
    }

    /// A node's process is gone at once, and with it what its disk had not synced.
    pub(crate) fn crash(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        let Some(process) = node.process.take() else { return };
        let unsynced = node.disk.log.unsynced();
        let (mut log, survivors) = node.disk.log.after_crash(self.rng.f64());
        let mut engine = node.disk.engine.after_crash(self.rng.f64());
        if survivors < unsynced {
            self.trace.mark("torn log tail");
        }
        let mut senders: Vec<(usize, u64)> = process.staged.iter().map(|staged| staged.sender).collect();
        senders.extend(process.log_jobs.iter().filter_map(|job| match job {
            LogJob::Install(install) => Some(install.staged.sender),
            _ => None,
        }));
        senders.extend(
            process
                .apply_jobs
                .iter()
                .chain(&process.apply_doing)
                .filter_map(|job| match job {
                    ApplyJob::Install { sender, .. } => Some(*sender),
                    _ => None,
                }),
        );
        if let Some(Writing::Install(install)) = process.log_doing {
            senders.push(install.staged.sender);
            // Both are durable together or neither is: a restart finishes what was begun.
            if self.rng.bool() {
                self.trace.mark("crash in the middle of an install");
                log = SimLog::default();
                log.reset(install.index, install.term, &install.hard_state)
                    .expect("it is a new log");
                engine = SimEngine::holding(engine.kind(), install.staged.image);
            }
        }
        node.disk = Disk {
            log: Arc::new(log),
            engine: Arc::new(engine),
        };
        node.paused_until = 0;
        node.stalled_until = 0;
        node.slow_until = 0;
        node.apply_stalled_until = 0;
        self.trace.line(self.now, || {
            format!(
                "crash {}: {survivors} of {unsynced} unsynced log records survive",
                node.id
            )
        });
        for id in process.pending.into_keys().chain(process.reads_ready.into_keys()) {
            self.history.forget(id);
        }
        // Their connection breaks.
        for sender in senders {
            self.report_snapshot(n, sender, false);
        }
        self.clients_lost(n);
    }

    /// Its engine cannot be read. If that was a cable that was loose, the next try may do; damage stays.
    pub(crate) fn refuse_to_start(&mut self, n: usize) {
        self.trace.mark("refused to start");
        self.trace.line(self.now, || {
            format!("{} cannot read its engine and does not start", n + 1)
        });
        if self.nodes[n].disk.engine.is_damaged() {
            return self.retire(n);
        }
        let node = &mut self.nodes[n];
        node.disk.engine = Arc::new(node.disk.engine.after_crash(0.0));
        let down = self.rng.u64(MS..3 * SECOND);
        self.at(self.now + down, Event::Start(n));
    }

    /// The disk comes back with something else than what was written. `false` if the node finds out and does not start.
    pub(crate) fn suffer(&mut self, n: usize, harm: Harm) -> bool {
        let node = &mut self.nodes[n];
        match harm {
            Harm::Log(damage) => match node.disk.log.after_damage(damage, self.rng.f64()) {
                Ok(log) => {
                    node.disk.log = Arc::new(log);
                    true
                }
                Err(error) => {
                    self.trace.mark("damaged log refused");
                    self.trace
                        .line(self.now, || format!("{} does not start: {error}", n + 1));
                    false
                }
            },
            Harm::OldEngine => {
                if let Some(engine) = node.disk.engine.as_remembered() {
                    self.trace.mark("old blocks");
                    node.disk.engine = Arc::new(engine);
                }
                true
            }
        }
    }

    /// Whether an engine of a member failed: the one on its disk, or the one that it still uses while a snapshot takes its
    /// place.
    pub(crate) fn engine_failed(&self, n: usize) -> bool {
        let node = &self.nodes[n];
        let used = node.process.as_ref().map(|process| process.machine.reader().engine());
        node.disk.engine.is_broken() || used.is_some_and(|engine| engine.is_broken())
    }

    /// A node whose disk fails stops at once; someone mends the disk and starts it again.
    pub(crate) fn stop_on_disk_error(&mut self, n: usize) {
        self.trace.mark("stopped by a disk error");
        if self.nodes[n].disk.engine.is_damaged() {
            self.trace.mark("damage met while running");
        }
        self.crash(n);
        let down = self.rng.u64(MS..3 * SECOND);
        self.at(self.now + down, Event::Start(n));
    }

    /// A watcher may meet a failure that no write meets.
    pub(crate) fn stop_if_a_watcher_failed(&mut self, n: usize) {
        let process = self.nodes[n].process.as_ref();
        if process.is_some_and(|process| process.machine.hub().failure().is_some()) {
            if !self.engine_failed(n) {
                violation!("a watcher at {} meets a failure while the disk works", n + 1);
            }
            self.stop_on_disk_error(n);
        }
    }

    /// What an operator does to stop a node: it has handed leadership over; what is written is synced and flushed.
    pub(crate) fn stop(&mut self, n: usize, life: u64) {
        if !self.nodes[n].is_in(life) || self.calm_since.is_some() {
            return;
        }
        let node = &self.nodes[n];
        // The log's thread ends with what it is doing; what waits behind that was never promised.
        if !node.disk.log.is_broken() && !node.disk.engine.is_broken() {
            node.disk.log.sync();
            node.disk.engine.flush_some(usize::MAX);
        }
        self.trace.mark("stopped in good order");
        self.crash(n);
        let down = self.rng_aims.u64(MS..2 * SECOND);
        self.at(self.now + down, Event::Start(n));
    }

    /// The operator, or whoever compares states, says whether a member's state is to be trusted.
    pub(crate) fn quarantine(&mut self, n: usize, is_quarantined: bool) {
        self.trace.line(self.now, || {
            format!("{} is {} trusted", n + 1, if is_quarantined { "not" } else { "again" })
        });
        self.nodes[n].is_quarantined = is_quarantined;
        self.input(n, Input::Quarantine(is_quarantined));
    }

    pub(crate) fn tick(&mut self, n: usize, life: u64) {
        if self.nodes[n].alive(life).is_none() {
            return;
        }
        self.input(n, Input::Tick);
        if self.has(Bug::TicksStop, 500) {
            return;
        }
        let tick = self.scenario.tick as f64 / self.nodes[n].clock_rate;
        self.at(self.now + tick as Micros, Event::Tick(n, life));
    }

    pub(crate) fn upkeep(&mut self, n: usize, life: u64) {
        let catchup = self.scenario.catchup_entries;
        if self.nodes[n].alive(life).is_none() {
            return;
        }
        let engine = self.nodes[n].disk.engine.clone();
        if self.rng.f64() < self.scenario.flush {
            match self.bug {
                Some(Bug::FlushForgetsIndex) => engine.flush_only(|family| family != mvcc::keys::META),
                Some(Bug::FlushIndexFirst) => engine.flush_only(|family| family == mvcc::keys::META),
                Some(Bug::FlushLosesWrite) => engine.flush_losing_a_write(),
                _ => {
                    if engine.begin_flush() {
                        let took = self.rng.u64(self.scenario.flush_time.clone());
                        self.at(self.now + took, Event::Flushed(n, life));
                    }
                }
            }
        } else if self.rng.u8(..4) == 0 && engine.kind() != Kind::Memory {
            // The engine had enough in memory.
            let some = self.rng.usize(..=engine.unflushed());
            engine.flush_some(some);
        }
        self.stop_if_a_watcher_failed(n);
        let durable = match Machine::durable_index(&*engine) {
            Ok(durable) => durable,
            Err(_) if engine.is_broken() => return self.stop_on_disk_error(n),
            Err(error) => violation!("member {} cannot read what is durable: {error}", n + 1),
        };
        if self.nodes[n].alive(life).is_none() {
            return;
        }
        let process = self.nodes[n].process.as_ref().expect("it runs");
        let (applied, _) = process.machine.applied();
        let known = process.replica.known_applied();
        let to = match self.bug {
            Some(Bug::TrimApplied) => applied + 1,
            Some(Bug::TrimOneTooMany) => (durable + 2).min(self.nodes[n].disk.log.last_index() + 1),
            Some(Bug::TrimUnknown) => (durable + 1).saturating_sub(catchup),
            _ => (durable.min(known) + 1).saturating_sub(catchup),
        };
        if to > self.nodes[n].disk.log.first_index() {
            self.log_job(n, LogJob::Trim(to));
        }
        if self.scenario.disks_fail && self.rng.u8(..8) == 0 {
            engine.remember();
        }
        let upkeep = self.rng.u64(self.scenario.upkeep.clone());
        self.at(self.now + upkeep, Event::Upkeep(n, life));
        self.retire_if_removed(n);
    }
}
