//! The world: a queue of events in virtual time, and what is in it.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::codec::{Action, MemberChange, MemberChangeKind, Operation, encode_operation};
use api::kv::Member;
use api::{LeaseId, MemberId, RequestId};
use bytes::Bytes;
use fastrand::Rng;
use mvcc::LeaseChange;
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeType, Entry, EntryType, HardState};
use replica::Input;

use crate::bugs::Bug;
use crate::clients::Client;
use crate::engine::{Image, SimEngine};
use crate::faults::Reigns;
use crate::history::History;
use crate::leases::Promise;
use crate::log::SimLog;
use crate::network::Network;
use crate::node::{Disk, Node};
use crate::scenario::Scenario;
use crate::trace::{Detail, Trace};
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
    /// A member's replica is told something.
    Hear(usize, u64, Input),
    /// A member looks after its disk.
    Upkeep(usize, u64),
    /// A flush of an engine finishes.
    Flushed(usize, u64),
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
    /// Owners of leases have waited for a member that was paused, and ask it at once.
    Owners(usize),
    /// Someone reads from a member that has just become the only one.
    Reader(usize),
    /// A leader leads twice.
    Reigns(Reigns),
    /// A member is trusted again.
    Trust(usize),
    /// A member stops as its operator asked: it has handed leadership over, or has had time to.
    Stop(usize, u64),
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
    /// When a lease last ended because its time was over.
    pub lease_ended_at: Micros,
    /// Until when the state was in doubt, so that no lease could end.
    pub doubted_until: Micros,
    /// The operator's changes of members.
    pub changes: Vec<RequestId>,
    /// The member whose disk was lost, or is known to be damaged: it is to be replaced.
    pub wiped: Option<MemberId>,
    /// Things that broke.
    pub faults: u64,
    /// Number of the next thing to break.
    pub next_fault: u64,
    /// When the newest leader became one.
    pub leader_since: Micros,
    /// When a leader's term last began: its first entry was applied.
    pub begun_since: Micros,
    /// Whom a leader last asked to take over.
    pub invited: Option<MemberId>,
    /// When leadership was last handed over.
    pub handed_over_at: Option<Micros>,
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
    /// Chance of what hits members at moments that were chosen to hurt.
    pub rng_aims: Rng,
    /// Chance of what the operator does.
    pub rng_operator: Rng,
    /// Chance of clients.
    pub rng_clients: Rng,
    queue: BTreeMap<(Micros, u64), Event>,
    scheduled: u64,
    pub(crate) logger: slog::Logger,
    done: bool,
}

impl World {
    /// The world of a seed, maybe with a deliberate bug.
    pub fn new(seed: u64, scenario: Scenario, detail: Detail, bug: Option<Bug>) -> Self {
        // Not the stream that the scenario was drawn from, which has another length for every scenario.
        let mut rng = Rng::with_seed(!seed);
        let (rng_faults, rng_clients) = (rng.fork(), rng.fork());
        let (rng_aims, rng_operator) = (rng.fork(), rng.fork());
        let mut world = World {
            now: 0,
            calm_since: None,
            nodes: Vec::new(),
            network: Network::default(),
            clients: Vec::new(),
            watchers: Vec::new(),
            leases: BTreeMap::new(),
            lease_ended_at: 0,
            doubted_until: 0,
            changes: Vec::new(),
            wiped: None,
            faults: 0,
            next_fault: 0,
            leader_since: 0,
            begun_since: 0,
            invited: None,
            handed_over_at: None,
            restarted: false,
            bug,
            history: History::default(),
            trace: Trace::new(detail),
            rng,
            rng_faults,
            rng_aims,
            rng_operator,
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
        let (voters, count) = (self.scenario.voters, self.scenario.voters + self.scenario.learners);
        let members = (1..=count as u64).map(|id| Member {
            is_learner: id > voters as u64,
            ..member_of(id)
        });
        let entries: Vec<Entry> = members
            .zip(1..)
            .map(|(member, index)| {
                let kind = if member.is_learner {
                    ConfChangeType::AddLearnerNode
                } else {
                    ConfChangeType::AddNode
                };
                let change = MemberChange {
                    kind: MemberChangeKind::Add.into(),
                    member: Some(member),
                };
                let mut conf_change = ConfChange {
                    node_id: change.member_id(),
                    context: encode_operation(&Operation::new(0, Action::MemberChange(change))),
                    ..Default::default()
                };
                conf_change.set_change_type(kind);
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
                engine: Arc::new(SimEngine::empty(self.scenario.engine)),
            },
            process: None,
            starts: 0,
            paused_until: 0,
            stalled_until: 0,
            slow_until: 0,
            apply_stalled_until: 0,
            clock_rate: 1.0 + skew * (self.rng.f64() * 2.0 - 1.0),
            jumps: Vec::new(),
            is_quarantined: false,
            was_harmed: false,
            harm: None,
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
            Event::Hear(n, life, _) => (26, *n, *life),
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
            Event::Owners(n) => (24, *n, 0),
            Event::Reader(n) => (27, *n, 0),
            Event::Reigns(reigns) => (25, reigns.leader, reigns.stage),
            Event::Flushed(n, life) => (21, *n, *life),
            Event::Trust(n) => (22, *n, 0),
            Event::Stop(n, life) => (23, *n, *life),
        };
        self.trace.mix(&[self.now, kind, n as u64, life]);
        if let Event::Tick(..)
        | Event::Step(..)
        | Event::LogDone(..)
        | Event::ApplyDone(..)
        | Event::Hear(..)
        | Event::Upkeep(..)
        | Event::Flushed(..)
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
            Event::Hear(n, life, input) => {
                if self.nodes[n].is_in(life) {
                    self.input(n, input);
                }
            }
            Event::Upkeep(n, life) => self.upkeep(n, life),
            Event::Flushed(n, life) => {
                if self.nodes[n].is_in(life) {
                    self.nodes[n].disk.engine.finish_flush();
                }
            }
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
                    self.faults += 1;
                    self.crash(n);
                    let down = self.rng_aims.u64(MS..300 * MS);
                    self.at(self.now + down, Event::Start(n));
                }
            }
            Event::CutOff(n) => {
                let time = self.rng_faults.u64(SECOND..6 * SECOND);
                self.cut_off(n, time);
            }
            Event::Owners(n) => self.owners_ask(n),
            Event::Reader(n) => self.someone_reads(n),
            Event::Reigns(reigns) => self.reigns(reigns),
            Event::Trust(n) => self.quarantine(n, false),
            Event::Stop(n, life) => self.stop(n, life),
            Event::Fault => self.fault(),
            Event::HealNetwork => {
                self.trace.line(self.now, || "the network is whole again");
                self.network.heal();
            }
            Event::Operate => {
                self.operate();
                let pause = self.rng_operator.u64(self.scenario.operator_pause.clone());
                if self.calm_since.is_none() || self.wiped_belongs() {
                    self.at(self.now + pause, Event::Operate);
                }
            }
            Event::Leases(n, life) => self.look_at_leases(n, life),
            Event::Watch(w) => self.watch(w),
            Event::Calm => self.calm(),
            Event::Inspect => self.inspect(),
        }
    }

    fn wiped_belongs(&self) -> bool {
        self.wiped
            .is_some_and(|id| self.history.model.members.get(id).is_some())
    }

    /// Whether a deliberate bug strikes, as it does once in `often` times.
    pub(crate) fn has(&mut self, bug: Bug, often: u32) -> bool {
        self.bug == Some(bug) && self.rng.u32(..often) == 0
    }

    /// Ends the run.
    pub fn finish(&mut self) {
        self.done = true;
    }
}

/// Leases in order of their ids: where the machine keeps them there is none.
pub(crate) fn sorted(changes: impl Iterator<Item = LeaseChange>) -> Vec<LeaseChange> {
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
