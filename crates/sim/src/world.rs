//! The world: a queue of events in virtual time, and what members want done.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::codec::{Action, MemberChange, MemberChangeKind, Operation, decode_entry, encode_operation};
use api::kv::Member;
use api::{Error, LeaseId, MemberId, RequestId};
use bytes::Bytes;
use fastrand::Rng;
use mvcc::machine::Command;
use mvcc::{Committed, CompactionProgress, LeaseChange, Machine};
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeType, Entry, EntryType, HardState, Message, MessageType};
use replica::{Effect, Input, Lessor, PeerMessage, Replica, Role, Standing};
use storage::RaftLog;

use crate::bugs::Bug;
use crate::clients::Client;
use crate::engine::{Image, SimEngine, SimView};
use crate::history::{History, Request, Results, violation};
use crate::leases::Promise;
use crate::log::SimLog;
use crate::members::{OPERATOR_MENDS, OPERATOR_PAUSE};
use crate::network::Network;
use crate::node::{ApplyJob, Disk, Install, LogJob, Node, Process, Staged, Writing};
use crate::scenario::Scenario;
use crate::trace::Trace;
use crate::watchers::Watcher;
use crate::{MS, Micros, SECOND};

/// Something that happens at a time.
pub enum Event {
    /// A member's clock ticks.
    Tick(usize, u64),
    /// A member's replica takes what waits.
    Step(usize, u64),
    /// A log write finishes.
    LogDone(usize, u64),
    /// An apply step finishes.
    ApplyDone(usize, u64),
    /// A member looks after its disk.
    Upkeep(usize, u64),
    /// A message arrives.
    Deliver {
        /// From whom.
        from: usize,
        /// At whom.
        to: usize,
        /// What.
        data: Bytes,
    },
    /// A snapshot has crossed the network, or has not.
    Transferred {
        /// The sender, and its life.
        from: (usize, u64),
        /// The receiver.
        to: usize,
        /// Raft's message.
        message: Bytes,
        /// The content; nothing if the transfer broke off.
        image: Option<Image>,
    },
    /// The sender of a snapshot hears how it ended.
    SnapshotReport {
        /// The sender, and its life.
        from: (usize, u64),
        /// The receiver.
        to: MemberId,
        /// How.
        done: bool,
    },
    /// A node starts.
    Start(usize),
    /// A client does something next.
    Client(usize),
    /// A client has waited long enough.
    GiveUp(usize, RequestId),
    /// A process ends at a moment that was chosen to hurt.
    Crash(usize, u64),
    /// A member is cut off.
    CutOff(usize),
    /// Something breaks.
    Fault,
    /// The network is whole again.
    HealNetwork,
    /// The operator changes the members, maybe.
    Operate,
    /// A member looks for leases that end.
    Leases(usize, u64),
    /// A watcher takes what there is.
    Watch(usize),
    /// No more faults.
    Calm,
    /// Whether all is well is looked at.
    Inspect,
}

/// Everything there is.
pub struct World {
    /// What kind of world it is.
    pub scenario: Scenario,
    /// The time.
    pub now: Micros,
    /// When faults ended, once they have.
    pub calm_since: Option<Micros>,
    /// The members.
    pub nodes: Vec<Node>,
    /// The network.
    pub network: Network,
    /// The clients.
    pub clients: Vec<Client>,
    /// Those who watch.
    pub watchers: Vec<Watcher>,
    /// What was promised about leases.
    pub leases: BTreeMap<LeaseId, Promise>,
    /// The operator's changes of members.
    pub changes: Vec<RequestId>,
    /// The member whose disk was lost.
    pub wiped: Option<MemberId>,
    /// When the newest leader became one.
    pub leader_since: Micros,
    /// Whether all was well once, and everything was restarted to see whether it is well again.
    pub restarted: bool,
    /// A deliberate bug.
    pub bug: Option<Bug>,
    /// What happened so far.
    pub history: History,
    /// The trace.
    pub trace: Trace,
    /// Chance, one stream for each purpose, so that one does not shift the others.
    pub rng: Rng,
    /// Chance of faults.
    pub rng_faults: Rng,
    /// Chance of clients.
    pub rng_clients: Rng,
    queue: BTreeMap<(Micros, u64), Event>,
    scheduled: u64,
    logger: slog::Logger,
    done: bool,
}

impl World {
    /// The world of a seed, maybe with a deliberate bug.
    pub fn new(seed: u64, scenario: Scenario, verbose: bool, bug: Option<Bug>) -> Self {
        // Not the stream that the scenario was drawn from, which has another length for every scenario.
        let mut rng = Rng::with_seed(!seed);
        let (rng_faults, rng_clients) = (rng.fork(), rng.fork());
        let mut world = World {
            now: 0,
            calm_since: None,
            nodes: Vec::new(),
            network: Network::default(),
            clients: Vec::new(),
            watchers: Vec::new(),
            leases: BTreeMap::new(),
            changes: Vec::new(),
            wiped: None,
            leader_since: 0,
            restarted: false,
            bug,
            history: History::default(),
            trace: Trace::new(verbose),
            rng,
            rng_faults,
            rng_clients,
            queue: BTreeMap::new(),
            scheduled: 0,
            logger: slog::Logger::root(slog::Discard, slog::o!()),
            done: false,
            scenario,
        };
        world.trace.line(0, || format!("{:#?}", world.scenario));
        world.bootstrap();
        world
    }

    /// Runs until all is well after the last fault.
    pub fn run(&mut self) {
        while !self.done {
            let ((time, _), event) = self.queue.pop_first().expect("inspections never end");
            self.now = time;
            self.happen(event);
        }
    }

    /// Lets something happen later.
    pub fn at(&mut self, time: Micros, event: Event) {
        self.scheduled += 1;
        self.queue.insert((time.max(self.now), self.scheduled), event);
    }

    /// The members' logs begin with one change of members for each first member.
    fn bootstrap(&mut self) {
        let count = self.scenario.voters;
        let members = (1..=count as u64).map(member_of);
        let entries: Vec<Entry> = members
            .zip(1..)
            .map(|(member, index)| {
                let change = MemberChange {
                    kind: MemberChangeKind::Add.into(),
                    member: Some(member),
                };
                let mut conf_change = ConfChange {
                    node_id: change.member_id(),
                    context: encode_operation(&Operation::new(0, Action::MemberChange(change))),
                    ..Default::default()
                };
                conf_change.set_change_type(ConfChangeType::AddNode);
                let mut entry = Entry {
                    index,
                    term: 1,
                    data: conf_change.write_to_bytes().expect("it encodes").into(),
                    ..Default::default()
                };
                entry.set_entry_type(EntryType::EntryConfChange);
                entry
            })
            .collect();
        let hard_state = HardState {
            term: 1,
            commit: count as u64,
            ..Default::default()
        };
        for _ in 0..count {
            let log = SimLog::bootstrapped(entries.clone(), hard_state.clone());
            let node = self.add_node(log);
            let at = self.rng.u64(..500 * MS);
            self.at(at, Event::Start(node));
        }
        for client in 0..self.scenario.clients {
            let node = self.rng_clients.usize(..count);
            self.clients.push(Client::at(node));
            self.at(0, Event::Client(client));
        }
        for _ in 0..self.scenario.watchers {
            self.add_watcher();
        }
        if self.scenario.changes_members {
            self.at(3 * SECOND, Event::Operate);
        }
        let first = self.rng_faults.u64(self.scenario.fault_every.clone());
        self.at(SECOND + first, Event::Fault);
        self.at(self.scenario.chaos, Event::Calm);
        self.at(self.scenario.chaos + SECOND, Event::Inspect);
    }

    /// A new node with an empty engine; it is not started.
    pub fn add_node(&mut self, log: SimLog) -> usize {
        let skew = self.scenario.skew;
        self.nodes.push(Node {
            id: self.nodes.len() as u64 + 1,
            disk: Disk {
                log: Arc::new(log),
                engine: Arc::new(SimEngine::empty()),
            },
            process: None,
            starts: 0,
            paused_until: 0,
            stalled_until: 0,
            apply_stalled_until: 0,
            clock_rate: 1.0 + skew * (self.rng.f64() * 2.0 - 1.0),
            retired: false,
        });
        self.nodes.len() - 1
    }

    fn happen(&mut self, event: Event) {
        let (kind, n, life) = match &event {
            Event::Tick(n, life) => (1, *n, *life),
            Event::Step(n, life) => (2, *n, *life),
            Event::LogDone(n, life) => (3, *n, *life),
            Event::ApplyDone(n, life) => (4, *n, *life),
            Event::Upkeep(n, life) => (5, *n, *life),
            Event::Deliver { from, to, data } => (6 + ((*from as u64) << 8), *to, data.len() as u64),
            Event::Transferred { from, to, image, .. } => (7, *to, from.0 as u64 * 2 + u64::from(image.is_some())),
            Event::SnapshotReport { from, done, .. } => (8, from.0, u64::from(*done)),
            Event::Start(n) => (9, *n, 0),
            Event::Client(client) => (10, *client, 0),
            Event::GiveUp(client, id) => (11, *client, *id),
            Event::Fault => (12, 0, 0),
            Event::HealNetwork => (13, 0, 0),
            Event::Calm => (14, 0, 0),
            Event::Inspect => (15, 0, 0),
            Event::Operate => (16, 0, 0),
            Event::Leases(n, life) => (17, *n, *life),
            Event::Watch(w) => (18, *w, 0),
            Event::Crash(n, life) => (19, *n, *life),
            Event::CutOff(n) => (20, *n, 0),
        };
        self.trace.mix(&[self.now, kind, n as u64, life]);
        if let Event::Tick(..)
        | Event::Step(..)
        | Event::LogDone(..)
        | Event::ApplyDone(..)
        | Event::Upkeep(..)
        | Event::Leases(..)
        | Event::Deliver { .. }
        | Event::SnapshotReport { .. }
        | Event::Transferred { .. } = event
            && self.nodes[n].paused_until > self.now
        {
            let later = self.nodes[n].paused_until;
            return self.at(later, event);
        }
        match event {
            Event::Tick(n, life) => self.tick(n, life),
            Event::Step(n, life) => self.step(n, life),
            Event::LogDone(n, life) => self.log_done(n, life),
            Event::ApplyDone(n, life) => self.apply_done(n, life),
            Event::Upkeep(n, life) => self.upkeep(n, life),
            Event::Deliver { from, to, data } => self.deliver(from, to, data),
            Event::Transferred {
                from,
                to,
                message,
                image,
            } => self.transferred(from, to, message, image),
            Event::SnapshotReport { from, to, done } => {
                if self.nodes[from.0].alive(from.1).is_some() {
                    self.input(from.0, Input::SnapshotSent { to, done });
                }
            }
            Event::Start(n) => self.start(n),
            Event::Client(client) => self.client(client),
            Event::GiveUp(client, id) => self.give_up(client, id),
            Event::Crash(n, life) => {
                if self.nodes[n].is_in(life) && self.calm_since.is_none() {
                    self.crash(n);
                    let down = self.rng_faults.u64(MS..300 * MS);
                    self.at(self.now + down, Event::Start(n));
                }
            }
            Event::CutOff(n) => self.cut_off(n),
            Event::Fault => self.fault(),
            Event::HealNetwork => {
                self.trace.line(self.now, || "the network is whole again");
                self.network.heal();
            }
            Event::Operate => {
                self.operate();
                let pause = self.rng_faults.u64(OPERATOR_PAUSE);
                if self
                    .calm_since
                    .is_none_or(|since| self.now < since + OPERATOR_MENDS && self.wiped_belongs())
                {
                    self.at(self.now + pause, Event::Operate);
                }
            }
            Event::Leases(n, life) => self.look_at_leases(n, life),
            Event::Watch(w) => self.watch(w),
            Event::Calm => self.calm(),
            Event::Inspect => self.inspect(),
        }
    }

    /// Hands an input to a member's replica.
    pub fn input(&mut self, n: usize, input: Input) {
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

    fn tick(&mut self, n: usize, life: u64) {
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

    fn deliver(&mut self, from: usize, to: usize, data: Bytes) {
        if self.nodes[to].process.is_none() {
            if self.rng.u8(..4) == 0 {
                let id = self.nodes[to].id;
                self.input(from, Input::Unreachable(id));
            }
            return;
        }
        let message = PeerMessage::decode(data).expect("what a member encodes decodes");
        let from = self.nodes[from].id;
        self.trace
            .line(self.now, || format!("{from} -> {}: {}", to + 1, describe(&message)));
        self.input(to, Input::Receive(from, message));
    }

    /// A node starts, or starts again.
    pub fn start(&mut self, n: usize) {
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
                engine: SimEngine::empty().into(),
            };
        }
        if life > 1 && bug == Some(Bug::HardStateLost) {
            node.disk.log.lose_hard_state();
        }
        let options = mvcc::Options {
            record_cache_bytes: 64 << 10,
            watch_buffer_events_max: 16,
            watch_buffer_bytes_max: 1 << 10,
        };
        let machine = Machine::open(node.disk.engine.clone(), &options).expect("what was written can be read");
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
            Err(error) => violation!("member {} does not start: {error}", node.id),
        };
        let mut lessor = Lessor::default();
        let now_ms = node.now_ms(now);
        for change in sorted(machine.leases()) {
            lessor.apply(change, now_ms);
        }
        let standing = replica.standing();
        let is_alone = machine.membership().voters().eq([node.id]);
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
        if is_alone || self.scenario.voters == 1 {
            self.input(n, Input::Campaign);
        }
        let tick = self.rng.u64(..self.scenario.tick);
        self.at(now + tick, Event::Tick(n, life));
        let upkeep = self.rng.u64(self.scenario.upkeep.clone());
        self.at(now + upkeep, Event::Upkeep(n, life));
        let leases = self.rng.u64(..500 * MS);
        self.at(now + leases, Event::Leases(n, life));
    }

    /// A node's process is gone at once, and with it what its disk had not synced.
    pub fn crash(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        let Some(process) = node.process.take() else { return };
        let unsynced = node.disk.log.unsynced();
        let survivors = self.rng.usize(..=unsynced);
        let mut log = node.disk.log.after_crash(survivors);
        let mut engine = node.disk.engine.after_crash();
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
                engine = SimEngine::holding(install.staged.image);
            }
        }
        node.disk = Disk {
            log: Arc::new(log),
            engine: Arc::new(engine),
        };
        node.paused_until = 0;
        node.stalled_until = 0;
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

    fn step(&mut self, n: usize, life: u64) {
        let Some(process) = self.nodes[n].alive(life) else {
            return;
        };
        process.step_due = false;
        let inputs = std::mem::take(&mut process.inbox);
        let mut effects = Vec::new();
        if let Err(error) = process.replica.step(inputs, &mut effects) {
            violation!("member {} fails: {error}", self.nodes[n].id);
        }
        for effect in effects {
            // A failing disk may have ended it in between.
            if self.nodes[n].alive(life).is_some() {
                self.carry_out(n, effect);
            }
        }
    }

    fn carry_out(&mut self, n: usize, effect: Effect) {
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
                    self.send(n, to, &message);
                }
            }
            Effect::Apply(entries) => {
                for entry in &entries {
                    if self.history.committed(id, entry) {
                        self.lease_news(entry.index);
                    }
                }
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
            Effect::Reject { id: request, error } => {
                self.trace.line(now, || format!("{id} rejects {request}: {error}"));
                self.reject(n, request, error);
            }
            Effect::Standing(standing) => self.take_standing(n, standing),
        }
    }

    /// A request ends without having been carried out, as far as its node knows.
    pub fn reject(&mut self, n: usize, request: RequestId, error: Error) {
        let process = self.nodes[n].process.as_mut().expect("it just stepped");
        if let Request::Expire(..) | Request::Checkpoint(..) = self.history.op(request).request {
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

    fn take_standing(&mut self, n: usize, standing: Standing) {
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

    fn mark_standing(&mut self, n: usize, standing: &Standing) {
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
            if processes().any(|process| process.standing.transferring_to == self.nodes[n].id) {
                marks.push("leadership handed over");
            }
            if !self.leases.is_empty() {
                marks.push("leader change with leases");
            }
            if self.change_is_under_way() {
                marks.push("leader change during a change of members");
            }
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

    /// Sends a message to a member.
    pub fn send(&mut self, n: usize, to: MemberId, message: &PeerMessage) {
        let to = to as usize - 1;
        if to >= self.nodes.len() {
            return;
        }
        let mut data = message.encode();
        if let PeerMessage::Raft(message) = message
            && message.entries.len() > 1
            && self.has(Bug::MessageLosesEntry, 20)
        {
            let mut message = message.clone();
            message.mut_entries().remove(0);
            data = PeerMessage::Raft(message).encode();
        }
        self.aim(n, message);
        let arrivals = self.network.arrivals(n, to, self.now, &self.scenario, &mut self.rng);
        for at in arrivals {
            let data = data.clone();
            self.at(at, Event::Deliver { from: n, to, data });
        }
    }

    /// Crashes often come when a member has just promised something.
    fn aim(&mut self, n: usize, message: &PeerMessage) {
        let PeerMessage::Raft(message) = message else { return };
        let promises = match message.get_msg_type() {
            MessageType::MsgRequestVoteResponse => !message.reject,
            MessageType::MsgAppendResponse => !message.reject && self.rng_faults.u8(..50) == 0,
            MessageType::MsgTimeoutNow => true,
            _ => false,
        };
        if promises && self.scenario.aims && self.rng_faults.u8(..6) == 0 {
            self.trace.mark("crash right after a promise");
            let life = self.nodes[n].starts;
            let at = self.now + self.rng_faults.u64(..20 * MS);
            self.at(at, Event::Crash(n, life));
        }
    }

    fn send_snapshot(&mut self, n: usize, to: MemberId, message: &Message) {
        let id = self.nodes[n].id;
        let process = self.nodes[n].process.as_mut().expect("it just stepped");
        let from = (n, process.life);
        let wanted = message.get_snapshot().get_metadata().index;
        let made = process.made.remove(&to);
        let Some((_, mut image)) = made.filter(|(index, _)| *index == wanted) else {
            // One that was asked for in a later reign has taken its place.
            self.trace.mark("snapshot replaced before it was sent");
            return self.input(n, Input::SnapshotSent { to, done: false });
        };
        self.trace.mark("snapshot sent");
        if self.change_is_under_way() {
            self.trace.mark("snapshot sent during a change of members");
        }
        if self.nodes[n]
            .process
            .as_ref()
            .is_some_and(|process| process.compaction_due)
        {
            self.trace.mark("snapshot sent during compaction");
        }
        self.trace
            .line(self.now, || format!("{id} sends {to} a snapshot of {wanted}"));
        let to = to as usize - 1;
        let took = self.rng.u64(MS..2 * SECOND);
        let breaks = self.calm_since.is_none() && self.rng.u8(..5) == 0;
        let message = PeerMessage::Raft(Box::new(message.clone())).encode();
        let lost = match self.bug {
            Some(Bug::SnapshotLosesKey) => Some(mvcc::keys::CUR),
            Some(Bug::SnapshotLosesHistory) => Some(mvcc::keys::REV),
            Some(Bug::SnapshotLosesLeases) => Some(mvcc::keys::LEASE),
            _ => None,
        };
        if let Some(family) = lost {
            let map = Arc::make_mut(&mut image[family.0]);
            map.pop_last();
            if family != mvcc::keys::CUR {
                map.clear();
            }
        }
        let image = (!breaks).then_some(image);
        self.at(
            self.now + took,
            Event::Transferred {
                from,
                to,
                message,
                image,
            },
        );
    }

    fn transferred(&mut self, from: (usize, u64), to: usize, message: Bytes, image: Option<Image>) {
        let open = self.network.is_open(from.0, to);
        let (Some(image), true, Some(process)) = (image, open, self.nodes[to].process.as_mut()) else {
            self.trace.mark("snapshot transfer broke off");
            return self.report_snapshot(to, from, false);
        };
        let Ok(PeerMessage::Raft(message)) = PeerMessage::decode(message) else {
            unreachable!("it was encoded by us")
        };
        process.staged.push_back(Staged { image, sender: from });
        self.input(to, Input::ReceiveSnapshot(message));
    }

    fn report_snapshot(&mut self, to: usize, from: (usize, u64), done: bool) {
        if self.bug == Some(Bug::SnapshotNotReported) {
            return;
        }
        let (id, delay) = (self.nodes[to].id, self.rng.u64(self.scenario.delay.clone()));
        // An answer that gets lost looks like a transfer that broke off.
        let done = done && self.network.is_open(to, from.0);
        self.at(self.now + delay, Event::SnapshotReport { from, to: id, done });
    }

    fn log_job(&mut self, n: usize, job: LogJob) {
        let process = self.nodes[n].process.as_mut().expect("it just stepped");
        process.log_jobs.push_back(job);
        self.log_next(n);
    }

    /// The log's thread takes its next job, if it is idle.
    fn log_next(&mut self, n: usize) {
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
            Some(_) => self.rng.u64(self.scenario.sync.clone()),
        };
        let (life, stalled) = (process.life, node.stalled_until);
        self.at((self.now + took).max(stalled), Event::LogDone(n, life));
        if let Some(number) = early {
            self.input(n, Input::Persisted(number));
        }
    }

    fn log_done(&mut self, n: usize, life: u64) {
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
                let engine = Arc::new(SimEngine::holding(staged.image));
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
    fn dropped(&mut self, n: usize, entries: &[Committed]) {
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

    fn apply_job(&mut self, n: usize, job: ApplyJob) {
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
    fn apply_next(&mut self, n: usize) {
        let Some(process) = &mut self.nodes[n].process else {
            return;
        };
        if process.apply_doing.is_some() {
            return;
        }
        let Some(mut job) = process.apply_jobs.pop_front() else {
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

    fn apply_done(&mut self, n: usize, life: u64) {
        if self.nodes[n].apply_stalled_until > self.now {
            let later = self.nodes[n].apply_stalled_until;
            return self.at(later, Event::ApplyDone(n, life));
        }
        let Some(process) = self.nodes[n].alive(life) else {
            return;
        };
        match process.apply_doing.take().expect("an apply step was begun") {
            ApplyJob::Entries(entries) => self.apply(n, &entries),
            ApplyJob::Install { engine, report, sender } => {
                process.machine.install(engine).expect("what was written can be read");
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
                let image = process.machine.reader().engine().image();
                let found = Machine::<SimEngine>::state_in(&SimView::of(image.clone()));
                let (index, term, membership) = found.expect("what was written can be read");
                process.made.insert(to, (index, image));
                self.input(
                    n,
                    Input::SnapshotMade {
                        to,
                        index,
                        term,
                        membership: Arc::new(membership),
                    },
                );
            }
        }
        self.compact(n);
        self.apply_next(n);
    }

    fn compact(&mut self, n: usize) {
        let Some(process) = &mut self.nodes[n].process else {
            return;
        };
        if process.compaction_due {
            let keys = self.rng.usize(1..20);
            match process.machine.compact_step(keys) {
                Ok(CompactionProgress::Going { .. }) => {}
                Ok(CompactionProgress::Idle | CompactionProgress::Done { .. }) => process.compaction_due = false,
                Err(_) if self.nodes[n].disk.engine.is_broken() => self.stop_on_disk_error(n),
                Err(error) => violation!("member {} cannot compact: {error}", n + 1),
            }
        }
    }

    /// A node whose disk fails stops at once; someone mends the disk and starts it again.
    fn stop_on_disk_error(&mut self, n: usize) {
        self.trace.mark("stopped by a disk error");
        self.crash(n);
        let down = self.rng.u64(MS..3 * SECOND);
        self.at(self.now + down, Event::Start(n));
    }

    fn apply(&mut self, n: usize, entries: &[Committed]) {
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
            Err(_) if self.nodes[n].disk.engine.is_broken() => return self.stop_on_disk_error(n),
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

    fn answer(&mut self, n: usize, request: RequestId, result: &Result<mvcc::Outcome, Error>) {
        let process = self.nodes[n].process.as_mut().expect("it runs");
        if !process.pending.contains_key(&request) {
            return;
        }
        if let Request::KeepAlive(lease) = self.history.op(request).request {
            return self.renew(n, request, lease);
        }
        if process.pending.remove(&request).is_some() {
            self.history.answer_write(request, result);
            self.client_done(request);
        }
    }

    fn upkeep(&mut self, n: usize, life: u64) {
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
                _ => engine.flush_some(usize::MAX),
            }
        } else if self.rng.u8(..4) == 0 {
            let some = self.rng.usize(..=engine.unflushed());
            engine.flush_some(some);
        }
        let durable = Machine::durable_index(&*engine).expect("what was written can be read");
        let (applied, _) = self.nodes[n].process.as_ref().expect("it runs").machine.applied();
        let to = match self.bug {
            Some(Bug::TrimApplied) => applied + 1,
            Some(Bug::TrimOneTooMany) => (durable + 2).min(self.nodes[n].disk.log.last_index() + 1),
            _ => (durable + 1).saturating_sub(catchup),
        };
        if to > self.nodes[n].disk.log.first_index() {
            self.log_job(n, LogJob::Trim(to));
        }
        let upkeep = self.rng.u64(self.scenario.upkeep.clone());
        self.at(self.now + upkeep, Event::Upkeep(n, life));
        self.retire_if_removed(n);
    }

    fn wiped_belongs(&self) -> bool {
        self.wiped
            .is_some_and(|id| self.history.model.members.get(id).is_some())
    }

    /// Whether a deliberate bug strikes, as it does once in `often` times.
    fn has(&mut self, bug: Bug, often: u32) -> bool {
        self.bug == Some(bug) && self.rng.u32(..often) == 0
    }

    /// Ends the run.
    pub fn finish(&mut self) {
        self.done = true;
    }
}

/// Leases in order of their ids: where the machine keeps them there is none.
fn sorted(changes: impl Iterator<Item = LeaseChange>) -> Vec<LeaseChange> {
    let mut changes: Vec<_> = changes.collect();
    changes.sort_by_key(|change| match change {
        LeaseChange::Granted { id, .. } | LeaseChange::Revoked { id } => *id,
    });
    changes
}

/// A member as the cluster knows it.
pub fn member_of(id: MemberId) -> Member {
    Member {
        id,
        peer_urls: vec![format!("http://member-{id}:2380")],
        ..Default::default()
    }
}

/// A message in few words.
fn describe(message: &PeerMessage) -> String {
    match message {
        PeerMessage::Raft(message) => {
            let entries = match (message.entries.first(), message.entries.last()) {
                (Some(first), Some(last)) => format!(", entries {}..={}", first.index, last.index),
                _ => String::new(),
            };
            let reject = if message.reject { ", reject" } else { "" };
            format!(
                "{:?} term {}, log {} of term {}, commit {}{entries}{reject}",
                message.get_msg_type(),
                message.term,
                message.index,
                message.log_term,
                message.commit
            )
        }
        PeerMessage::Forward(forward) => {
            format!(
                "forward term {}, batches {} + {}",
                forward.term,
                forward.first,
                forward.batches.len()
            )
        }
        PeerMessage::Accepted(accepted) => format!("accepted term {}, up to {}", accepted.term, accepted.last),
    }
}
