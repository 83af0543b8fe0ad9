//! One member: the disk that outlives it, and the process while it runs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use api::{MemberId, RaftIndex, RequestId};
use mvcc::{Committed, Machine};
use raft::eraftpb::{Entry, HardState};
use replica::{Input, Lessor, Replica, Standing};

use crate::Micros;
use crate::engine::{Image, SimEngine};
use crate::log::{Damage, SimLog};

/// What survives a crash, once it is synced or flushed.
pub struct Disk {
    /// The Raft log.
    pub log: Arc<SimLog>,
    /// The engine.
    pub engine: Arc<SimEngine>,
}

/// A machine that runs a member, or does not at the moment.
pub struct Node {
    /// The member.
    pub id: MemberId,
    /// Its disk.
    pub disk: Disk,
    /// Its process.
    pub process: Option<Process>,
    /// How often it was started.
    pub starts: u64,
    /// Nothing of it runs until then.
    pub paused_until: Micros,
    /// Its disk takes no writes until then.
    pub stalled_until: Micros,
    /// Its disk takes nearly an election timeout for a write until then.
    pub slow_until: Micros,
    /// It applies nothing until then.
    pub apply_stalled_until: Micros,
    /// How long its clock takes for what others call a microsecond.
    pub clock_rate: f64,
    /// When its clock jumped ahead, and by how many milliseconds.
    pub jumps: Vec<(Micros, u64)>,
    /// Whether its state is said not to be trusted, so that it must not lead.
    pub is_quarantined: bool,
    /// Whether its disk did harm to what it holds.
    pub was_harmed: bool,
    /// What its disk will have done to what it holds, found when it starts next.
    pub harm: Option<Harm>,
    /// Whether it left the cluster for good.
    pub retired: bool,
}

/// What a disk comes back with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// A damaged Raft log.
    Log(Damage),
    /// The engine as it was some time ago.
    OldEngine,
}

/// Work for the thread that writes the log.
pub enum LogJob {
    /// See [`replica::Effect::Append`].
    Append {
        /// Names it.
        number: u64,
        /// New entries.
        entries: Vec<Entry>,
        /// New hard state.
        hard_state: Option<HardState>,
        /// Whether to sync.
        sync: bool,
    },
    /// Forget entries below.
    Trim(RaftIndex),
    /// See [`replica::Effect::Install`].
    Install(Box<Install>),
}

/// A snapshot to be put in place.
pub struct Install {
    /// Names the write.
    pub number: u64,
    /// Its index.
    pub index: RaftIndex,
    /// Its term.
    pub term: u64,
    /// The hard state to go with it.
    pub hard_state: HardState,
    /// What came.
    pub staged: Staged,
}

/// A snapshot that came from another member.
pub struct Staged {
    /// Its content.
    pub image: Image,
    /// Which node sent it, in which of its lives.
    pub sender: (usize, u64),
}

/// Work for the thread that applies.
pub enum ApplyJob {
    /// Committed entries.
    Entries(Vec<Committed>),
    /// Go over to another engine.
    Install {
        /// Its index.
        index: RaftIndex,
        /// The engine.
        engine: Arc<SimEngine>,
        /// What to report as persisted then.
        report: Option<u64>,
        /// Who is told that it is installed.
        sender: (usize, u64),
    },
    /// Take a snapshot for a member.
    Snapshot(MemberId),
    /// There is nothing to apply: compaction goes on.
    Compact,
}

/// What a running process keeps in memory.
pub struct Process {
    /// Which start of the node it is: events for earlier ones are void.
    pub life: u64,
    /// Raft.
    pub replica: Replica<SimLog>,
    /// The state machine.
    pub machine: Machine<SimEngine>,
    /// Leases.
    pub lessor: Lessor,
    /// What waits for the replica.
    pub inbox: Vec<Input>,
    /// Whether the replica is about to run.
    pub step_due: bool,
    /// What waits for the log's thread.
    pub log_jobs: VecDeque<LogJob>,
    /// What the log's thread is doing.
    pub log_doing: Option<Writing>,
    /// What waits for the apply thread.
    pub apply_jobs: VecDeque<ApplyJob>,
    /// What the apply thread is doing.
    pub apply_doing: Option<ApplyJob>,
    /// Operations and reads whose clients wait here, and how many ticks the replica had taken when they came.
    pub pending: BTreeMap<RequestId, u64>,
    /// Ticks that the replica has taken.
    pub ticks: u64,
    /// How many it had taken when it last knew a leader, if it knows none now.
    pub leaderless_since: Option<u64>,
    /// Reads that wait for an index to be applied.
    pub reads_ready: BTreeMap<RequestId, RaftIndex>,
    /// The index that the last read got, for a deliberate bug.
    pub last_read_index: Option<RaftIndex>,
    /// Snapshots that were made for members.
    pub made: BTreeMap<MemberId, (RaftIndex, Image)>,
    /// Snapshots that came and that the replica has not decided about.
    pub staged: VecDeque<Staged>,
    /// Where the member stands.
    pub standing: Standing,
    /// The lessor's part.
    pub lessor_leads: bool,
    /// Whether it ever led, for a deliberate bug.
    pub ever_led: bool,
    /// Keep-alives that wait until the others confirm who leads, and in which term the time was given.
    pub keep_alives: BTreeMap<RequestId, u64>,
    /// Whether the compaction has more to do.
    pub compaction_due: bool,
}

/// A log write under way.
pub enum Writing {
    /// Written, and maybe to be synced.
    Append {
        /// The last write that it includes.
        number: u64,
        /// Whether to sync.
        sync: bool,
    },
    /// A snapshot is put in place.
    Install(Box<Install>),
}

impl Node {
    /// The process, if it is in this life.
    pub fn alive(&mut self, life: u64) -> Option<&mut Process> {
        self.process.as_mut().filter(|process| process.life == life)
    }

    /// Whether the process is in this life.
    pub fn is_in(&self, life: u64) -> bool {
        self.process.as_ref().is_some_and(|process| process.life == life)
    }

    /// What its monotonic clock says, in milliseconds. It runs fast or slow, may jump ahead, and never goes back.
    pub fn now_ms(&self, now: Micros) -> u64 {
        (now as f64 * self.clock_rate) as u64 / 1000 + self.jumped_ms_since(0)
    }

    /// By how much its clock jumped ahead since then, in milliseconds.
    pub fn jumped_ms_since(&self, since: Micros) -> u64 {
        let jumps = self.jumps.iter().filter(|(at, _)| *at >= since);
        jumps.map(|(_, by_ms)| by_ms).sum()
    }
}
