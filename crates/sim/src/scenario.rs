//! What kind of world a seed stands for: its size, how its network and disks behave, how members are configured.

use std::collections::BTreeSet;
use std::ops::Range;

use fastrand::Rng;

use crate::engine::Kind;
use crate::{MS, Micros, SECOND};

/// What a world is mostly about, so that states which are rare elsewhere are common somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    /// A little of everything.
    Mixed,
    /// One or two voters, and members that come and go.
    Small,
    /// Followers that fall behind a short log.
    Snapshots,
    /// Leases, and leaders that lose touch.
    Leases,
    /// Elections over slow disks.
    Elections,
}

/// One world's parameters.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// What it is mostly about.
    pub theme: Theme,
    /// First members that vote.
    pub voters: usize,
    /// First members that do not.
    pub learners: usize,
    /// Which engine all members use.
    pub engine: Kind,
    /// Clients, each with one operation under way at most.
    pub clients: usize,
    /// How long a client thinks between operations.
    pub think: Range<Micros>,
    /// When faults end.
    pub chaos: Micros,
    /// How much longer everything may take to be well again.
    pub settle: Micros,
    /// Time between faults.
    pub fault_every: Range<Micros>,
    /// A tick of the members' clocks.
    pub tick: Micros,
    /// How far members' clocks run apart, as a share.
    pub skew: f64,
    /// Whether clocks jump ahead.
    pub jumps: bool,
    /// The network.
    pub delay: Range<Micros>,
    /// Share of messages that take much longer.
    pub slow: f64,
    /// Share of messages that are lost.
    pub loss: f64,
    /// Share of messages that come twice.
    pub duplicates: f64,
    /// Whether messages of one link stay in order.
    pub ordered: bool,
    /// How long a sync takes.
    pub sync: Range<Micros>,
    /// How long an apply step takes.
    pub apply: Range<Micros>,
    /// How long a step of compaction takes while there is nothing to apply.
    pub compact: Range<Micros>,
    /// How long inputs wait until the replica takes them.
    pub step: Range<Micros>,
    /// Whether the log's thread merges what waits.
    pub merge_appends: bool,
    /// How long a flush of the engine takes.
    pub flush_time: Range<Micros>,
    /// Whether an install drops entries that wait to be applied.
    pub install_drops: bool,
    /// Whether an install is reported before the state machine went over to it.
    pub install_reports_early: bool,
    /// Share of upkeeps that flush the engine.
    pub flush: f64,
    /// Time between upkeeps.
    pub upkeep: Range<Micros>,
    /// Entries that stay in the log for followers that lag.
    pub catchup_entries: u64,
    /// Keys that everybody writes.
    pub hot_keys: usize,
    /// Keys that are written now and then.
    pub cold_keys: usize,
    /// Share of requests that are about leases, beyond those among all others.
    pub leases: f64,
    /// Seconds that leases live.
    pub lease_ttl: Range<i64>,
    /// Those who watch.
    pub watchers: usize,
    /// Whether operators turn auth on, and clients are users.
    pub auth: bool,
    /// Whether members come and go.
    pub changes_members: bool,
    /// Time between what the operator does.
    pub operator_pause: Range<Micros>,
    /// Whether crashes are aimed at moments when members have just promised something.
    pub aims: bool,
    /// Whether disks fail, and one is lost.
    pub disks_fail: bool,
    /// Faults that are left out, by their numbers: to find out which ones a failure needs.
    pub faults_left_out: BTreeSet<u64>,
    /// How members are configured, but for id, incarnation and seed.
    pub replica: replica::Config,
}

impl Scenario {
    /// The world of a seed.
    pub fn draw(rng: &mut Rng) -> Self {
        let pick = |rng: &mut Rng, choices: &[u64]| choices[rng.usize(..choices.len())];
        let theme = match rng.u8(..20) {
            0..10 => Theme::Mixed,
            10..13 => Theme::Small,
            13..16 => Theme::Snapshots,
            16..18 => Theme::Leases,
            _ => Theme::Elections,
        };
        let voters = pick(rng, &[1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 5, 5, 5, 6, 7]) as usize;
        let learners = pick(rng, &[0, 0, 0, 1, 2]).min(7 - voters as u64) as usize;
        let mut replica = replica::Config::new(1);
        replica.batch_ops_max = pick(rng, &[1, 2, 8, 1024]) as usize;
        replica.batch_bytes_max = pick(rng, &[64, 1000, 4 << 20]) as usize;
        replica.appends_inflight_max = pick(rng, &[1, 2, 4]) as usize;
        replica.message_bytes_max = pick(rng, &[0, 200, 1 << 20]);
        replica.messages_inflight_max = pick(rng, &[1, 2, 16, 128]) as usize;
        replica.forwards_inflight_max = pick(rng, &[1, 2, 8]) as usize;
        replica.uncommitted_bytes_max = pick(rng, &[500, 256 << 20, 256 << 20]).max(replica.message_bytes_max);
        replica.committed_bytes_max = pick(rng, &[100, 1000, 16 << 20]);
        replica.unapplied_bytes_max = pick(rng, &[300, 64 << 20, 64 << 20]) as usize;
        replica.unpersisted_bytes_max = pick(rng, &[300, 64 << 20, 64 << 20]) as usize;
        replica.tail_bytes_max = pick(rng, &[0, 500, 5000, 16 << 20]) as usize;
        replica.pre_vote = rng.f64() < 0.8;
        let delay = match rng.u8(..3) {
            0 => 100..MS,
            1 => MS..20 * MS,
            _ => 10..200 * MS,
        };
        let sync = match rng.u8(..3) {
            0 => 50..500,
            1 => MS..10 * MS,
            _ => 100..150 * MS,
        };
        let apply = match rng.u8(..3) {
            0 => 20..200,
            1 => 100..5 * MS,
            _ => 100..100 * MS,
        };
        let mean = pick(rng, &[300, 1000, 3000]) * MS;
        let think = pick(rng, &[5, 50, 300]) * MS;
        let mut scenario = Scenario {
            theme,
            voters,
            learners,
            engine: [Kind::Rocks, Kind::Rocks, Kind::RocksWal, Kind::Memory][rng.usize(..4)],
            clients: rng.usize(1..6),
            think: think / 5..think * 2,
            chaos: rng.u64(10..40) * SECOND,
            settle: 120 * SECOND,
            fault_every: mean / 4..mean * 2,
            tick: 100 * MS,
            skew: if rng.bool() { 0.0 } else { rng.f64() * 0.1 },
            jumps: rng.u8(..4) == 0,
            delay,
            slow: if rng.bool() { 0.0 } else { rng.f64() * 0.05 },
            loss: if rng.bool() { 0.0 } else { rng.f64() * rng.f64() * 0.3 },
            duplicates: if rng.bool() { 0.0 } else { rng.f64() * 0.1 },
            ordered: rng.bool(),
            sync,
            apply,
            compact: [20..2 * MS, MS..50 * MS, 10 * MS..400 * MS][rng.usize(..3)].clone(),
            step: 1..pick(rng, &[50, 2000, 20_000]),
            merge_appends: rng.bool(),
            flush_time: 10..pick(rng, &[100, 50_000, 3_000_000]),
            install_drops: rng.bool(),
            install_reports_early: rng.bool(),
            flush: [0.02, 0.2, 0.8][rng.usize(..3)],
            upkeep: 100 * MS..pick(rng, &[200, 1000]) * MS,
            catchup_entries: pick(rng, &[0, 1, 5, 20, 100]),
            hot_keys: rng.usize(1..6),
            cold_keys: rng.usize(1..100),
            leases: [0.0, 0.0, 0.5][rng.usize(..3)],
            lease_ttl: 1..9,
            watchers: rng.usize(..4),
            auth: rng.u8(..4) == 0,
            changes_members: rng.bool(),
            operator_pause: 500 * MS..6 * SECOND,
            aims: rng.bool(),
            disks_fail: rng.bool(),
            faults_left_out: BTreeSet::new(),
            replica,
        };
        scenario.emphasize(rng);
        scenario
    }

    /// Makes what the theme is about common.
    fn emphasize(&mut self, rng: &mut Rng) {
        match self.theme {
            Theme::Mixed => {}
            Theme::Small => {
                self.voters = rng.usize(1..4);
                self.learners = rng.usize(..2);
                self.changes_members = true;
                self.operator_pause = 50 * MS..1500 * MS;
                self.sync = [100..150 * MS, 50 * MS..400 * MS][rng.usize(..2)].clone();
                self.think = MS..50 * MS;
                self.replica.appends_inflight_max = rng.usize(2..5);
                self.replica.pre_vote = rng.bool();
            }
            Theme::Snapshots => {
                self.catchup_entries = rng.u64(..3);
                self.upkeep = 50 * MS..200 * MS;
                self.flush = 0.8;
                self.flush_time = 10..20 * MS;
                self.think = MS..20 * MS;
                self.apply = [100..5 * MS, 100..100 * MS, 10 * MS..600 * MS][rng.usize(..3)].clone();
                self.replica.unapplied_bytes_max = [300, 1500, 64 << 20][rng.usize(..3)];
                self.install_drops = true;
                self.leases = self.leases.max(0.1);
            }
            Theme::Leases => {
                self.leases = 0.6;
                self.clients = rng.usize(3..7);
                self.think = 20 * MS..200 * MS;
                self.chaos = self.chaos.max(20 * SECOND);
                self.lease_ttl = 1..[9, 14, 20][rng.usize(..3)];
                self.aims = rng.u8(..4) > 0;
            }
            Theme::Elections => {
                self.sync = [50 * MS..400 * MS, 100..900 * MS][rng.usize(..2)].clone();
                self.merge_appends = rng.u8(..4) > 0;
                self.replica.appends_inflight_max = rng.usize(2..5);
                self.replica.pre_vote = rng.bool();
                self.aims = true;
            }
        }
    }
}
