//! What breaks, and whether everything is well again afterwards.

use api::kv::RangeRequest;
use bytes::Bytes;
use replica::{Input, Role};

use crate::history::violation;
use crate::world::{Event, World};
use crate::{MS, SECOND};

impl World {
    /// Breaks something.
    pub(crate) fn fault(&mut self) {
        if self.calm_since.is_some() {
            return;
        }
        let count = self.nodes.len();
        let n = self.rng_faults.usize(..count);
        let id = self.nodes[n].id;
        let now = self.now;
        match self.rng_faults.u8(..100) {
            0..30 => {
                self.crash(n);
                let down = [10 * MS, 500 * MS, 5 * SECOND][self.rng_faults.usize(..3)];
                let down = self.rng_faults.u64(MS..=down);
                self.at(now + down, Event::Start(n));
            }
            30..33 => {
                self.trace.mark("all crash at once");
                for n in 0..count {
                    self.crash(n);
                    let down = self.rng_faults.u64(MS..SECOND);
                    self.at(now + down, Event::Start(n));
                }
            }
            33..60 => self.partition(n),
            60..70 => {
                let time = self.rng_faults.u64(50 * MS..4 * SECOND);
                self.trace.line(now, || format!("pause {id} for {time} us"));
                self.nodes[n].paused_until = now + time;
            }
            70..80 => {
                let time = self.rng_faults.u64(50 * MS..4 * SECOND);
                self.trace.line(now, || format!("stall the disk of {id} for {time} us"));
                self.nodes[n].stalled_until = now + time;
            }
            // A leader hands over and is cut off before it can hear of the new one.
            80..83 => {
                if let Some(leader) = (0..count).find(|&n| self.leads(n)) {
                    self.trace
                        .line(now, || format!("tell {} to hand over, and cut it off", leader + 1));
                    self.input(leader, Input::Transfer(0));
                    let at = now + self.rng_faults.u64(..300 * MS);
                    self.at(at, Event::CutOff(leader));
                }
            }
            83..86 => {
                let time = self.rng_faults.u64(50 * MS..8 * SECOND);
                self.trace
                    .line(now, || format!("stall the apply thread of {id} for {time} us"));
                self.nodes[n].apply_stalled_until = now + time;
            }
            86..90 => {
                let to = if self.rng_faults.bool() {
                    0
                } else {
                    self.rng_faults.u64(1..=count as u64)
                };
                self.trace.line(now, || format!("tell {id} to hand leadership to {to}"));
                self.input(n, Input::Transfer(to));
            }
            90..93 if self.scenario.disks_fail => {
                self.trace.mark("disk error");
                self.trace.line(now, || format!("the disk of {id} fails"));
                if self.rng_faults.bool() {
                    self.nodes[n].disk.log.break_down();
                } else {
                    self.nodes[n].disk.engine.break_down();
                }
            }
            93 if self.scenario.disks_fail && self.scenario.changes_members => self.wipe(n),
            _ => {
                let leader = (0..count).find(|&n| self.leads(n));
                if let Some(leader) = leader {
                    self.crash(leader);
                    let down = self.rng_faults.u64(MS..3 * SECOND);
                    self.at(now + down, Event::Start(leader));
                }
            }
        }
        let next = self.rng_faults.u64(self.scenario.fault_every.clone());
        self.at(now + next, Event::Fault);
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
        match self.rng_faults.u8(..6) {
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
    pub(crate) fn cut_off(&mut self, n: usize) {
        if self.calm_since.is_none() {
            self.isolate(n);
            let time = self.rng_faults.u64(SECOND..6 * SECOND);
            self.at(self.now + time, Event::HealNetwork);
        }
    }

    /// No more faults: everything that is broken is mended.
    pub(crate) fn calm(&mut self) {
        self.trace.line(self.now, || "faults end");
        self.calm_since = Some(self.now);
        self.network.calm_down();
        for n in 0..self.nodes.len() {
            self.nodes[n].paused_until = 0;
            self.nodes[n].stalled_until = 0;
            self.nodes[n].apply_stalled_until = 0;
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
        let wrong = self.wrong();
        if let Some(wrong) = wrong {
            if self.now > since + self.scenario.settle {
                violation!("{} s after the last fault, {wrong}", (self.now - since) / SECOND);
            }
            return self.at(self.now + 500 * MS, Event::Inspect);
        }
        self.compare_contents();
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

    /// All members hold the same, which is what the model holds.
    fn compare_contents(&self) {
        let everything = RangeRequest {
            key: Bytes::from_static(&[0]),
            range_end: Bytes::from_static(&[0]),
            ..Default::default()
        };
        let expected = self.history.model.range(&everything, self.history.model.seen);
        for node in (0..self.nodes.len())
            .filter(|&n| self.belongs(n))
            .map(|n| &self.nodes[n])
        {
            let machine = &node.process.as_ref().expect("it was looked at").machine;
            if **machine.membership() != self.history.model.members {
                violation!("member {} knows other members than the model", node.id);
            }
            match machine.reader().range(&everything) {
                Ok(found) if Ok(&found) == expected.as_ref() => {}
                found => violation!("member {} holds {found:?}, the model {expected:?}", node.id),
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
            if process.standing.leader == 0 {
                return Some(format!("member {id} knows no leader"));
            }
        }
        None
    }
}
