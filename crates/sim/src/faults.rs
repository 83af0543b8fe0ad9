//! What breaks, and whether everything is well again afterwards.

use api::MemberId;
use api::kv::RangeRequest;
use bytes::Bytes;
use mvcc::Machine;
use mvcc::keys::{self, Position, SizesRecord};
use prost::Message as _;
use replica::{Input, Role};

use crate::bugs::Bug;
use crate::engine::SimEngine;
use crate::history::violation;
use crate::log::Damage;
use crate::node::Harm;
use crate::scenario::{Scenario, Theme};
use crate::world::{Event, World};
use crate::{MS, Micros, SECOND};

/// What may break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Crash,
    CrashAll,
    CrashLeader,
    Partition,
    Pause,
    /// A leader is paused, and cut off when it goes on.
    PauseLeader,
    StallLog,
    /// The disk of a leader takes no writes for so long that others take over, with entries in the place of its own.
    StallLeader,
    StallApply,
    /// A member applies nothing for a while, and misses what is committed meanwhile.
    FallBehind,
    Transfer,
    /// A leader hands over and is cut off before it can hear of the new one.
    TransferAndCutOff,
    /// A leader that applies nothing hands leadership over and gets it back, while someone waits for its snapshot.
    TwoReigns,
    Stop,
    ClockJumps,
    Quarantine,
    WritesFail,
    ReadFails,
    /// A bit flips, or an old block comes back.
    Damage,
    Wipe,
}

/// How far a leader is that leads twice.
#[derive(Debug, Clone, Copy)]
pub struct Reigns {
    /// Who leads twice.
    pub leader: usize,
    /// Who needs a snapshot.
    pub behind: usize,
    /// What is next.
    pub stage: u64,
}

impl Fault {
    /// How often, compared with the others.
    fn weights(scenario: &Scenario) -> Vec<(Fault, u32)> {
        let theme = scenario.theme;
        let is = |of: Theme, much: u32, else_: u32| if theme == of { much } else { else_ };
        let disk = |weight: u32| if scenario.disks_fail { weight } else { 0 };
        let loss = |weight: u32| if scenario.changes_members { disk(weight) } else { 0 };
        vec![
            (Fault::Crash, is(Theme::Small, 45, 28)),
            (Fault::CrashAll, 3),
            (Fault::CrashLeader, is(Theme::Elections, 14, 7)),
            (Fault::Partition, is(Theme::Snapshots, 34, 24)),
            (Fault::Pause, 8),
            (Fault::PauseLeader, is(Theme::Leases, 25, 4)),
            (Fault::StallLog, is(Theme::Elections, 16, 9)),
            (Fault::StallLeader, is(Theme::Elections, 12, 2)),
            (Fault::StallApply, is(Theme::Snapshots, 9, 4)),
            (Fault::FallBehind, is(Theme::Snapshots, 25, 2)),
            (Fault::Transfer, is(Theme::Elections, 12, 5)),
            (Fault::TransferAndCutOff, is(Theme::Leases, 12, 3)),
            (Fault::TwoReigns, is(Theme::Snapshots, 8, 1)),
            (Fault::Stop, 3),
            (Fault::ClockJumps, if scenario.jumps { 6 } else { 0 }),
            (Fault::Quarantine, 2),
            (Fault::WritesFail, disk(3)),
            (Fault::ReadFails, disk(4)),
            (Fault::Damage, loss(3)),
            (Fault::Wipe, loss(2)),
        ]
    }
}

impl World {
    /// Breaks the next thing, unless it is left out.
    pub(crate) fn fault(&mut self) {
        if self.calm_since.is_some() {
            return;
        }
        // Each has chance of its own, so that leaving one out does not make another of the next.
        let own = self.rng_faults.fork();
        let number = self.next_fault;
        self.next_fault += 1;
        if !self.scenario.faults_left_out.contains(&number) {
            let others = std::mem::replace(&mut self.rng_faults, own);
            self.break_something(number);
            self.rng_faults = others;
        }
        let next = self.rng_faults.u64(self.scenario.fault_every.clone());
        self.at(self.now + next, Event::Fault);
    }

    fn break_something(&mut self, number: u64) {
        let weights = Fault::weights(&self.scenario);
        let total: u32 = weights.iter().map(|(_, weight)| weight).sum();
        let mut at = self.rng_faults.u32(..total);
        let drawn = weights.into_iter().find(|(_, weight)| match at.checked_sub(*weight) {
            Some(rest) => {
                at = rest;
                false
            }
            None => true,
        });
        let (fault, _) = drawn.expect("it is below the total");
        self.faults += 1;
        let count = self.nodes.len();
        let n = self.rng_faults.usize(..count);
        let leader = (0..count).find(|&n| self.leads(n));
        let id = self.nodes[n].id;
        let now = self.now;
        self.trace.line(now, || format!("fault {number}: {fault:?}"));
        match fault {
            Fault::Crash => {
                let down = [10 * MS, 500 * MS, 5 * SECOND][self.rng_faults.usize(..3)];
                self.crash_for(n, down);
            }
            Fault::CrashAll => {
                self.trace.mark("all crash at once");
                (0..count).for_each(|n| self.crash_for(n, SECOND));
            }
            Fault::CrashLeader => {
                if let Some(leader) = leader {
                    self.crash_for(leader, 3 * SECOND);
                }
            }
            Fault::Partition => self.partition(n),
            Fault::Pause => {
                let time = self.rng_faults.u64(50 * MS..4 * SECOND);
                self.trace.line(now, || format!("pause {id} for {time} us"));
                self.nodes[n].paused_until = now + time;
            }
            Fault::PauseLeader => {
                if let Some(leader) = leader {
                    let time = self.rng_faults.u64(SECOND..5 * SECOND);
                    self.trace.line(now, || {
                        format!("pause {} for {time} us, and cut it off then", leader + 1)
                    });
                    self.trace.mark("leader paused");
                    self.nodes[leader].paused_until = now + time;
                    self.at(now + time - MS, Event::CutOff(leader));
                    self.at(now + time, Event::Owners(leader));
                }
            }
            Fault::StallLog => {
                let time = self.rng_faults.u64(50 * MS..4 * SECOND);
                self.trace.line(now, || format!("stall the disk of {id} for {time} us"));
                self.nodes[n].stalled_until = now + time;
            }
            Fault::StallLeader => {
                if let Some(leader) = leader {
                    let time = self.rng_faults.u64(4 * SECOND..9 * SECOND);
                    let cut = self.rng_faults.u64(..300 * MS);
                    self.trace.line(now, || {
                        format!(
                            "stall the disk of {} for {time} us, and cut it off after {cut} us",
                            leader + 1
                        )
                    });
                    self.gather(leader);
                    self.nodes[leader].stalled_until = now + time;
                    self.at(now + cut, Event::CutOff(leader));
                }
            }
            Fault::StallApply => {
                let time = self.rng_faults.u64(50 * MS..8 * SECOND);
                self.trace
                    .line(now, || format!("stall the apply thread of {id} for {time} us"));
                self.nodes[n].apply_stalled_until = now + time;
            }
            Fault::FallBehind => {
                let time = self.rng_faults.u64(3 * SECOND..9 * SECOND);
                let cut = self.rng_faults.u64(50 * MS..SECOND);
                let behind = if leader == Some(n) { (n + 1) % count } else { n };
                self.trace.line(now, || {
                    format!(
                        "{} applies nothing for {time} us, and is cut off after {cut} us",
                        behind + 1
                    )
                });
                self.gather(behind);
                self.nodes[behind].apply_stalled_until = now + time;
                self.at(now + cut, Event::CutOff(behind));
            }
            Fault::Transfer => {
                let to = if self.rng_faults.bool() {
                    0
                } else {
                    self.rng_faults.u64(1..=count as u64)
                };
                let from = leader.filter(|_| self.rng_faults.u8(..4) > 0).unwrap_or(n);
                self.trace
                    .line(now, || format!("tell {} to hand leadership to {to}", from + 1));
                self.input(from, Input::Transfer(to));
            }
            Fault::TransferAndCutOff => {
                if let Some(leader) = leader {
                    self.trace
                        .line(now, || format!("tell {} to hand over, and cut it off", leader + 1));
                    self.input(leader, Input::Transfer(0));
                    let at = now + self.rng_faults.u64(..300 * MS);
                    self.at(at, Event::CutOff(leader));
                }
            }
            Fault::TwoReigns => {
                if let Some(leader) = leader.filter(|_| count >= 3) {
                    let behind = if leader == n { (n + 1) % count } else { n };
                    self.isolate(behind);
                    let reigns = Reigns {
                        leader,
                        behind,
                        stage: 0,
                    };
                    let at = now + self.rng_faults.u64(500 * MS..2500 * MS);
                    self.at(at, Event::Reigns(reigns));
                }
            }
            Fault::Stop => {
                self.trace.line(now, || format!("stop {id}"));
                self.input(n, Input::Transfer(0));
                if let Some(process) = &self.nodes[n].process {
                    let life = process.life;
                    let at = now + self.rng_faults.u64(MS..SECOND);
                    self.at(at, Event::Stop(n, life));
                }
            }
            Fault::ClockJumps => {
                let by_ms = self.rng_faults.u64(1..20_000);
                self.trace.mark("clock jumped");
                self.trace
                    .line(now, || format!("the clock of {id} jumps ahead by {by_ms} ms"));
                self.nodes[n].jumps.push((now, by_ms));
                self.input(n, Input::Tick);
            }
            Fault::Quarantine => {
                self.trace.mark("member in quarantine");
                self.quarantine(n, true);
                let at = now + self.rng_faults.u64(SECOND..8 * SECOND);
                self.at(at, Event::Trust(n));
            }
            Fault::WritesFail => {
                self.trace.mark("disk error");
                self.trace.line(now, || format!("the disk of {id} takes no writes"));
                if self.rng_faults.bool() {
                    self.nodes[n].disk.log.break_down();
                } else {
                    self.nodes[n].disk.engine.break_down();
                }
            }
            Fault::ReadFails => {
                self.trace.mark("read error");
                let reads = self.rng_faults.u32(1..50);
                self.trace.line(now, || {
                    format!("a read of the disk of {id} fails, {reads} reads from now")
                });
                if self.rng_faults.u8(..3) == 0 {
                    self.nodes[n].disk.log.fail_a_read(reads / 10);
                } else {
                    self.nodes[n].disk.engine.fail_a_read(reads);
                }
            }
            Fault::Damage => self.damage(n),
            Fault::Wipe => self.wipe(n),
        }
    }

    /// Clients that are about to ask for something ask a member that is in trouble.
    pub(crate) fn gather(&mut self, n: usize) {
        for client in self.clients.iter_mut().filter(|client| client.waits.is_none()) {
            client.node = n;
        }
    }

    /// What becomes of a leader that leads twice.
    pub(crate) fn reigns(&mut self, reigns: Reigns) {
        if self.calm_since.is_some() {
            return;
        }
        let Reigns { leader, behind, stage } = reigns;
        let now = self.now;
        self.trace.line(now, || {
            format!("two reigns of {}, {} is behind, stage {stage}", leader + 1, behind + 1)
        });
        let pause = match stage {
            // Who fell behind is back, and the leader is to make a snapshot for it, which has to wait.
            0 => {
                self.network.heal();
                self.nodes[leader].apply_stalled_until = now + self.rng_faults.u64(2 * SECOND..4 * SECOND);
                self.rng_faults.u64(100 * MS..700 * MS)
            }
            // Another one leads, and does not reach whoever fell behind.
            1 => {
                for other in (0..self.nodes.len()).filter(|&other| other != leader) {
                    self.network.cut(other, behind);
                    self.network.cut(behind, other);
                }
                self.input(leader, Input::Transfer(0));
                self.rng_faults.u64(300 * MS..SECOND)
            }
            2 => {
                if let Some(other) = (0..self.nodes.len()).find(|&other| other != leader && self.leads(other)) {
                    let back = self.nodes[leader].id;
                    self.input(other, Input::Transfer(back));
                }
                self.rng_faults.u64(2 * SECOND..4 * SECOND)
            }
            _ => return self.network.heal(),
        };
        let next = Reigns {
            stage: stage + 1,
            ..reigns
        };
        self.at(now + pause, Event::Reigns(next));
    }

    fn crash_for(&mut self, n: usize, most: Micros) {
        self.crash(n);
        let down = self.rng_faults.u64(MS..=most);
        self.at(self.now + down, Event::Start(n));
    }

    /// A disk does harm to what it holds. It counts as lost from then on, as far as anybody may rely on it, so only one
    /// whose loss the cluster can bear is chosen, and its member is to be replaced.
    fn damage(&mut self, n: usize) {
        if !self.can_be_lost(n) {
            return;
        }
        let id = self.nodes[n].id;
        let now = self.now;
        self.trace.mark("disk damaged");
        self.wiped = Some(id);
        self.nodes[n].was_harmed = true;
        match self.rng_faults.u8(..4) {
            0 => {
                let chance = self.rng_faults.f64();
                self.trace.line(now, || format!("a bit flips in the engine of {id}"));
                if self.bug == Some(Bug::NoChecksums) {
                    return self.nodes[n].disk.engine.flip_a_bit_unnoticed(chance);
                }
                self.nodes[n].disk.engine.flip_a_bit(chance);
            }
            1 => {
                self.trace
                    .line(now, || format!("{id} crashes, and its engine comes back as it was"));
                self.nodes[n].harm = Some(Harm::OldEngine);
                self.crash_for(n, SECOND);
            }
            what => {
                let damage = [Damage::Flip, Damage::OldBlock][usize::from(what == 3)];
                self.trace
                    .line(now, || format!("{id} crashes, and its log has a {damage:?}"));
                self.nodes[n].harm = Some(Harm::Log(damage));
                self.crash_for(n, SECOND);
            }
        }
    }

    pub(crate) fn leads(&self, n: usize) -> bool {
        let process = self.nodes[n].process.as_ref();
        process.is_some_and(|process| process.standing.role == Role::Leader)
    }

    /// Cuts the network in one way or another.
    fn partition(&mut self, n: usize) {
        let count = self.nodes.len();
        let now = self.now;
        self.network.heal();
        match self.rng_faults.u8(..7) {
            // One member, or the leader, alone.
            0 | 1 => {
                let leader = (0..count).find(|&n| self.leads(n)).filter(|_| self.rng_faults.bool());
                let alone = leader.unwrap_or(n);
                self.isolate(alone);
            }
            // Two halves.
            2 => {
                let sides: Vec<bool> = (0..count).map(|_| self.rng_faults.bool()).collect();
                self.trace.line(now, || format!("cut in two: {sides:?}"));
                for a in 0..count {
                    for b in (0..count).filter(|&b| sides[a] != sides[b]) {
                        self.network.cut(a, b);
                    }
                }
            }
            // Two halves that one member belongs to both of.
            6 => {
                let sides: Vec<bool> = (0..count).map(|_| self.rng_faults.bool()).collect();
                self.trace
                    .line(now, || format!("cut in two, but for {}: {sides:?}", n + 1));
                for a in (0..count).filter(|&a| a != n) {
                    for b in (0..count).filter(|&b| b != n && sides[a] != sides[b]) {
                        self.network.cut(a, b);
                    }
                }
            }
            // One way only.
            3 => {
                let inwards = self.rng_faults.bool();
                self.trace
                    .line(now, || format!("cut {} one way, inwards: {inwards}", n + 1));
                for other in 0..count {
                    if inwards {
                        self.network.cut(other, n);
                    } else {
                        self.network.cut(n, other);
                    }
                }
            }
            // Some links.
            4 => {
                self.trace.line(now, || "cut some links");
                for a in 0..count {
                    for b in 0..count {
                        if self.rng_faults.u8(..3) == 0 {
                            self.network.cut(a, b);
                        }
                    }
                }
            }
            // Slow links.
            _ => {
                self.trace.line(now, || "slow some links down");
                for a in 0..count {
                    for b in 0..count {
                        if self.rng_faults.bool() {
                            let by = self.rng_faults.u64(..2000) * MS;
                            self.network.slow_down(a, b, by);
                        }
                    }
                }
            }
        }
        let time = self.rng_faults.u64(100 * MS..8 * SECOND);
        self.at(now + time, Event::HealNetwork);
    }

    fn isolate(&mut self, alone: usize) {
        self.trace.line(self.now, || format!("cut off {}", alone + 1));
        for other in 0..self.nodes.len() {
            self.network.cut(alone, other);
            self.network.cut(other, alone);
        }
    }

    /// A member is cut off for some time.
    pub(crate) fn cut_off(&mut self, n: usize, time: Micros) {
        if self.calm_since.is_none() {
            self.isolate(n);
            self.at(self.now + time, Event::HealNetwork);
        }
    }

    /// No more faults: everything that is broken is mended.
    pub(crate) fn calm(&mut self) {
        self.trace.line(self.now, || "faults end");
        self.calm_since = Some(self.now);
        self.network.calm_down();
        for n in 0..self.nodes.len() {
            if std::mem::take(&mut self.nodes[n].is_quarantined) {
                self.quarantine(n, false);
            }
            self.nodes[n].paused_until = 0;
            self.nodes[n].stalled_until = 0;
            self.nodes[n].slow_until = 0;
            self.nodes[n].apply_stalled_until = 0;
            self.nodes[n].disk.log.mend_reads();
            self.nodes[n].disk.engine.mend_reads();
            // The machine may still use the engine that a snapshot is about to replace.
            if let Some(process) = &self.nodes[n].process {
                process.machine.reader().engine().mend_reads();
            }
            if self.nodes[n].disk.log.is_broken() || self.nodes[n].disk.engine.is_broken() {
                self.crash(n);
            }
            if !self.nodes[n].retired && self.nodes[n].process.is_none() {
                let at = self.now + self.rng_faults.u64(..SECOND);
                self.at(at, Event::Start(n));
            }
        }
    }

    /// Looks whether everything is well; says what is not once it should be.
    pub(crate) fn inspect(&mut self) {
        let since = self.calm_since.expect("inspections begin after the last fault");
        if self.clients_are_done() {
            self.end_doubts();
        }
        let wrong = self.wrong();
        if let Some(overdue) = self.lease_overdue() {
            violation!("{overdue}");
        }
        if let Some(wrong) = wrong {
            if self.now > since + self.scenario.settle {
                violation!("{} s after the last fault, {wrong}", (self.now - since) / SECOND);
            }
            return self.at(self.now + 500 * MS, Event::Inspect);
        }
        self.compare_contents();
        if let Err(wrong) = self.history.seen_by_clients.check() {
            violation!("{wrong}");
        }
        if std::mem::replace(&mut self.restarted, true) {
            return self.finish();
        }
        // The last test of durability: all lose power at once, and must come back with everything.
        self.trace.line(self.now, || "all is well; everything is restarted");
        for n in (0..self.nodes.len())
            .filter(|&n| !self.nodes[n].retired)
            .collect::<Vec<_>>()
        {
            self.crash(n);
            let at = self.now + self.rng_faults.u64(..SECOND);
            self.at(at, Event::Start(n));
        }
        self.calm_since = Some(self.now - 11 * SECOND);
        self.at(self.now + 2 * SECOND, Event::Inspect);
    }

    /// All members hold the same, which is what the model holds, now and at revisions before.
    fn compare_contents(&self) {
        let everything = RangeRequest {
            key: Bytes::from_static(&[0]),
            range_end: Bytes::from_static(&[0]),
            ..Default::default()
        };
        let seen = self.history.model.seen;
        let expected = self.history.model.range(&everything, seen);
        let first = seen.compacted.max(1);
        let step = ((seen.revision - first) / 5).max(1) as usize;
        let of_past = (first..=seen.revision).step_by(step).map(|revision| RangeRequest {
            revision,
            ..everything.clone()
        });
        let of_past: Vec<_> = of_past
            .map(|range| (self.history.model.range(&range, seen), range))
            .collect();
        for node in (0..self.nodes.len())
            .filter(|&n| self.belongs(n))
            .map(|n| &self.nodes[n])
        {
            let machine = &node.process.as_ref().expect("it was looked at").machine;
            if **machine.membership() != self.history.model.members {
                violation!("member {} knows other members than the model", node.id);
            }
            self.check_leftovers(node.id, machine);
            let (auth, known) = (machine.reader().auth(), &self.history.model.auth);
            let found = (auth.is_enabled(), auth.revision(), auth.len());
            if found != (known.is_enabled(), known.revision(), known.len()) {
                violation!(
                    "member {} knows other users and roles than the model: {found:?}",
                    node.id
                );
            }
            match machine.reader().range(&everything) {
                Ok(found) if Ok(&found) == expected.as_ref() => {}
                // Damage that nothing had read until now, on a disk that was to be replaced.
                Err(_) if node.disk.engine.is_damaged() => {}
                found => violation!("member {} holds {found:?}, the model {expected:?}", node.id),
            }
            for (expected, range) in of_past.iter().filter(|_| !node.disk.engine.is_damaged()) {
                match machine.reader().range(range) {
                    Ok(found) if Ok(&found) == expected.as_ref() => {}
                    found => violation!(
                        "member {} held {found:?} at {}, the model {expected:?}",
                        node.id,
                        range.revision
                    ),
                }
            }
        }
        let leader = (0..self.nodes.len()).find(|&n| self.belongs(n) && self.leads(n));
        let leader = leader
            .and_then(|n| self.nodes[n].process.as_ref())
            .expect("there is one");
        let progress = leader.replica.progress().into_iter();
        let followed: Vec<_> = progress.map(|peer| (peer.id, peer.is_learner)).collect();
        let members = self.history.model.members.members.iter();
        let known: Vec<_> = members.map(|member| (member.id, member.is_learner)).collect();
        if followed != known {
            violation!("the leader's Raft knows {followed:?}, the state machine {known:?}");
        }
    }

    /// What a member's engine still holds when all is quiet: nothing of what was compacted, or of leases that ended.
    fn check_leftovers(&self, id: MemberId, machine: &Machine<SimEngine>) {
        let image = machine.reader().engine().image();
        let compacted = self.history.model.seen.compacted;
        let bounds = [0, compacted.max(0)].map(|main| Bytes::copy_from_slice(&keys::log_key(Position::start_of(main))));
        let [from, to] = bounds;
        if let Some((key, _)) = image[keys::REV.0].range(from..to).next() {
            let at = keys::position_of(key);
            violation!("member {id} still has the log entry {at:?}, though {compacted} is compacted");
        }
        if let Some((key, _)) = image[keys::LEASE.0].first_key_value() {
            violation!("member {id} still has {key:?} of a lease, though all are gone");
        }
        let live = self.history.model.live_keys() as u64;
        if machine.reader().keys() != live {
            violation!("member {id} counts {} keys, the model {live}", machine.reader().keys());
        }
        // What a quota is held against.
        let sizes = image[keys::META.0].get(keys::SIZES);
        let sizes = sizes.map(|sizes| SizesRecord::decode(&sizes[..]).expect("it was encoded"));
        let [from, to] = [compacted.max(0) + 1, i64::MAX]
            .map(|main| Bytes::copy_from_slice(&keys::log_key(Position::start_of(main))));
        let log = image[keys::REV.0].range(from..to);
        let log_bytes: usize = log.map(|(key, change)| key.len() + change.len()).sum();
        let bytes = (machine.reader().key_bytes(), sizes.unwrap_or_default().log_bytes);
        let expected = (self.history.model.live_bytes() as u64, log_bytes as u64);
        if bytes != expected {
            violation!("member {id} counts {bytes:?} bytes of keys and of their history, there are {expected:?}");
        }
        let newest = image[keys::CUR.0].iter();
        let buried = newest.filter(|(_, record)| {
            let record = keys::RecordRef::decode(record).expect("it was encoded");
            record.tombstone && record.at.main <= compacted
        });
        if let Some((key, _)) = buried.into_iter().next() {
            violation!("member {id} still has the tombstone of {key:?}, though {compacted} is compacted");
        }
    }

    /// What is not well.
    fn wrong(&self) -> Option<String> {
        let since = self.calm_since.expect("inspections begin after the last fault");
        if self.now < since + 12 * SECOND {
            return Some("clients are still at work".to_owned());
        }
        let last = self.history.last_index();
        let leaders = (0..self.nodes.len())
            .filter(|&n| self.belongs(n) && self.leads(n))
            .count();
        if leaders != 1 {
            return Some(format!("there are {leaders} leaders"));
        }
        if let Some(watcher) = self.watcher_behind() {
            return Some(watcher);
        }
        if !self.leases.is_empty() {
            return Some(format!("leases {:?} live on", self.leases.keys().collect::<Vec<_>>()));
        }
        for node in (0..self.nodes.len())
            .filter(|&n| self.belongs(n))
            .map(|n| &self.nodes[n])
        {
            let id = node.id;
            let Some(process) = &node.process else {
                return Some(format!("member {id} does not run"));
            };
            let (applied, _) = process.machine.applied();
            if applied != last {
                return Some(format!(
                    "member {id} has applied {applied} of {last}: {:?}",
                    process.standing
                ));
            }
            let waiting: Vec<_> = process.pending.keys().chain(process.reads_ready.keys()).collect();
            if !waiting.is_empty() {
                return Some(format!("requests {waiting:?} wait at member {id}"));
            }
            let compacted = process.machine.reader().compacted_physically();
            if compacted != self.history.model.seen.compacted {
                return Some(format!(
                    "member {id} has only dropped what is before {compacted}, though {} is compacted",
                    self.history.model.seen.compacted
                ));
            }
            if process.standing.leader == 0 {
                return Some(format!("member {id} knows no leader"));
            }
        }
        None
    }
}
