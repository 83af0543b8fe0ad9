//! What kind of world a seed stands for: its size, how its network and disks behave, how members are configured.

use std::ops::Range;

use fastrand::Rng;

use crate::{MS, Micros, SECOND};

/// One world's parameters.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// First members, all voters.
    pub voters: usize,
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
    /// How long inputs wait until the replica takes them.
    pub step: Range<Micros>,
    /// Whether the log's thread merges what waits.
    pub merge_appends: bool,
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
    /// Those who watch.
    pub watchers: usize,
    /// Whether members come and go.
    pub changes_members: bool,
    /// Whether crashes are aimed at moments when members have just promised something.
    pub aims: bool,
    /// Whether disks fail, and one is lost.
    pub disks_fail: bool,
    /// How members are configured, but for id, incarnation and seed.
    pub replica: replica::Config,
}

impl Scenario {
    /// The world of a seed.
    pub fn draw(rng: &mut Rng) -> Self {
        let pick = |rng: &mut Rng, choices: &[u64]| choices[rng.usize(..choices.len())];
        let voters = pick(rng, &[1, 2, 3, 3, 3, 3, 5, 5]) as usize;
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
        Scenario {
            voters,
            clients: rng.usize(1..6),
            think: think / 5..think * 2,
            chaos: rng.u64(10..40) * SECOND,
            settle: 120 * SECOND,
            fault_every: mean / 4..mean * 2,
            tick: 100 * MS,
            skew: if rng.bool() { 0.0 } else { rng.f64() * 0.1 },
            delay,
            slow: if rng.bool() { 0.0 } else { rng.f64() * 0.05 },
            loss: if rng.bool() { 0.0 } else { rng.f64() * rng.f64() * 0.3 },
            duplicates: if rng.bool() { 0.0 } else { rng.f64() * 0.1 },
            ordered: rng.bool(),
            sync,
            apply,
            step: 1..pick(rng, &[50, 2000, 20_000]),
            merge_appends: rng.bool(),
            install_drops: rng.bool(),
            install_reports_early: rng.bool(),
            flush: [0.02, 0.2, 0.8][rng.usize(..3)],
            upkeep: 100 * MS..pick(rng, &[200, 1000]) * MS,
            catchup_entries: pick(rng, &[0, 1, 5, 20, 100]),
            hot_keys: rng.usize(1..6),
            cold_keys: rng.usize(1..100),
            leases: [0.0, 0.0, 0.5][rng.usize(..3)],
            watchers: rng.usize(..4),
            changes_members: rng.bool(),
            aims: rng.bool(),
            disks_fail: rng.bool(),
            replica,
        }
    }
}
