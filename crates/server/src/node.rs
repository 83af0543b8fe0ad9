//! A running member: the threads around [`Replica`] and [`Machine`], and what they share.
//!
//! | Work | Waits for | Does |
//! |---|---|---|
//! | a step | proposals, ticks, finished writes | steps Raft, hands its effects to the other two |
//! | a write | entries to write | one write and one fdatasync for all that wait |
//! | an apply | committed entries | one engine write for all that wait; then events; then replies; compaction between |
//!
//! These are done by the threads `member-0` to `member-2`, each kind by one at a time: see `work.rs`.
//!
//! | Thread | Waits for | Does |
//! |---|---|---|
//! | `clock` | time | ticks, lease expiry |
//! | `upkeep` | time | flushes the engine, trims the log, watches the disk |
//! | `snapshot` | whoever sends it | holds an engine view, reads it in chunks |
//!
//! The peers' connections, and what members ask each other beside Raft, are in `cluster.rs`.
//!
//! What bounds the queues: proposals are bounded when they enter `Pending`, and stay there until they are applied, so
//! entries to write and to apply are bounded with them; everything else on the way is one item per finished piece of
//! work.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use api::codec::{Action, LeaseCheckpointRequest, Operation, encode_operation};
use api::kv::{AlarmAction, AlarmMember, AlarmRequest, AlarmType, LeaseRevokeRequest};
use api::{Limits, MemberId, RaftIndex, RequestId};
use bytes::Bytes;
use mvcc::machine::{Command, Digest};
use mvcc::{Caller, Committed, CompactionProgress, Hub, LeaseChange, Machine, Membership, Reader};
use parking_lot::Mutex;
use raft::eraftpb::{Entry, HardState, Message};
use replica::{Effect, Input, Lessor, PeerMessage, PeerProgress, Proposal, Replica, ReplicaError, Role, Standing};
use storage::{Engine, EngineError, RaftLog};
use tokio::sync::{Semaphore, watch};

use crate::auth::{AuthConfig, Gate};
use crate::auto_compaction::AutoCompaction;
use crate::backup;
use crate::faults::Faults;
use crate::kept_hashes::{self, KeptHashes, Views};
use crate::metrics::Metrics;
use crate::peer::{SnapshotHeader, Transport};
use crate::pending::Pending;
use crate::quota;
use crate::snapshot::{self, Source, Staged};
use crate::work::{Again, Hands, Kind, Work};

/// Most bytes of entries that go into one engine write. An entry is never split.
const APPLY_BYTES_MAX: usize = 8 << 20;
/// How often leases are looked at (etcd: 500 ms).
const LEASE_INTERVAL: Duration = Duration::from_millis(500);
/// Most revocations of leases under way at once; with two looks a second, etcd's 1000 a second.
const LEASE_REVOKES_MAX: usize = 500;
/// Most leases that are checkpointed in one look.
const LEASE_CHECKPOINTS_MAX: usize = 1000;
/// How often the disk and the log are looked at.
const UPKEEP_INTERVAL: Duration = Duration::from_millis(250);
/// Bytes of log that are kept at least for peers that are up and behind, or are being sent a snapshot.
const LOG_KEEP_BYTES_MIN: u64 = 2 << 30;
/// The most that are kept for them, however large the store is: each entry takes memory as well, in the log's index.
const LOG_KEEP_BYTES_MAX: u64 = 16 << 30;
/// Digests that are remembered for comparing members.
const DIGESTS_MAX: usize = 8192;
/// How long to wait before it is looked again whether a thread that hashes has its view.
const VIEW_PAUSE: Duration = Duration::from_millis(1);
/// How long a member that stops waits for another to lead: two round trips, and time to spare.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);
/// How much more than the reserve must be free before writes are taken again, as a divisor of the reserve.
const RESERVE_HYSTERESIS: u64 = 8;

/// As many as there are kinds of work, so that none waits for another.
const MEMBER_THREADS: [&str; 3] = ["member-0", "member-1", "member-2"];

/// How a node runs.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Raft.
    pub replica: replica::Config,
    /// The cluster's identity.
    pub cluster_id: u64,
    /// This member's name.
    pub name: String,
    /// Where clients are told to reach it.
    pub client_urls: Vec<String>,
    /// Most learners at a time (`--max-learners`).
    pub learners_max: usize,
    /// Whether changes of members that endanger the quorum are refused (`--strict-reconfig-check`).
    pub strict_reconfig_check: bool,
    /// Limits.
    pub limits: Limits,
    /// How users log in.
    pub auth: AuthConfig,
    /// A tick of Raft's clock (`--heartbeat-interval`).
    pub tick: Duration,
    /// Raft's election timeout (`--election-timeout`).
    pub election_timeout: Duration,
    /// Bytes of log since the last flush at which the engine is flushed, so that a restart replays little.
    pub flush_log_bytes: u64,
    /// Entries since the last flush at which the engine is flushed, if that is to be sooner (`--snapshot-count`).
    pub flush_entries: Option<u64>,
    /// Longest time between flushes while there is anything to flush.
    pub flush_interval: Duration,
    /// Whether flushing costs as much as all data (the memory engine's snapshots), so that it waits for more log.
    pub flush_writes_all: bool,
    /// Entries to keep in the log below what could be trimmed (`--snapshot-catchup-entries`).
    pub catchup_entries: u64,
    /// Where the data lies, for watching its disk.
    pub data_dir: PathBuf,
    /// Where the log lies, likewise.
    pub log_dir: PathBuf,
    /// Free bytes on the disk below which writes are refused (`--disk-reserve-bytes`).
    pub disk_reserve_bytes: u64,
    /// Bytes that the store may occupy (`--quota-backend-bytes`); 0 for as many as the disk has room for.
    pub quota_bytes: u64,
    /// What to compact without being asked.
    pub auto_compaction: AutoCompaction,
    /// Most keys that one step of compaction looks at (`--compaction-batch-limit`): with 1000 a step takes about a
    /// millisecond.
    pub compaction_batch_keys: usize,
    /// Pause between two steps of compaction (`--compaction-sleep-interval`).
    pub compaction_pause: Duration,
    /// The revision of applies that take longer is logged (`--warning-apply-duration`).
    pub warn_apply: Duration,
    /// A file that says which faults to simulate, for tests: see `faults.rs`.
    pub fault_file: Option<PathBuf>,
}

impl NodeConfig {
    /// The defaults around a replica. Ids, member and data directory are the server's to fill in.
    pub fn new(replica: replica::Config) -> Self {
        NodeConfig {
            replica,
            cluster_id: 0,
            name: String::new(),
            client_urls: Vec::new(),
            learners_max: 1,
            strict_reconfig_check: true,
            limits: Limits::default(),
            auth: AuthConfig::default(),
            tick: Duration::from_millis(100),
            election_timeout: Duration::from_secs(1),
            flush_log_bytes: 32 << 20,
            flush_entries: None,
            flush_interval: Duration::from_secs(600),
            flush_writes_all: false,
            catchup_entries: 5000,
            data_dir: PathBuf::new(),
            log_dir: PathBuf::new(),
            disk_reserve_bytes: 256 << 20,
            quota_bytes: 0,
            auto_compaction: AutoCompaction::Off,
            compaction_batch_keys: 1000,
            compaction_pause: Duration::ZERO,
            warn_apply: Duration::from_millis(100),
            fault_file: None,
        }
    }
}

/// What to do when the node cannot go on. It must not return to a world in which the node is thought to work: end the
/// process, or, in tests, note it.
pub type FailureHandler = Arc<dyn Fn(&str) + Send + Sync>;

/// Where engines live on disk, and which one is in use.
pub trait EnginePlace<E>: Send + Sync + 'static {
    /// Opens an empty engine in a directory of its own, beside the one in use.
    fn stage(&self) -> Result<(E, PathBuf), String>;

    /// Makes a staged engine the one in use after the next start, durably. It holds a snapshot of this index and term.
    fn switch(&self, dir: &Path, index: RaftIndex, term: u64) -> Result<(), String>;

    /// Removes an engine's directory.
    fn remove(&self, dir: &Path);

    /// The directory in use.
    fn used(&self) -> PathBuf;
}

/// A view that is kept to be sent to a member.
struct Held {
    index: RaftIndex,
    /// `None` once it is being sent.
    source: Option<Source>,
    since: Instant,
}

/// Tells whoever brought a snapshot whether it was put in use.
pub(crate) type InstallWaiter = SyncSender<bool>;

/// What all threads of a node share.
pub(crate) struct Shared<E: Engine> {
    pub(crate) config: NodeConfig,
    pub(crate) reader: Reader<E>,
    pub(crate) hub: Arc<Hub<E>>,
    pub(crate) gate: Gate,
    pub(crate) pending: Arc<Pending>,
    pub(crate) work: Work<Input, LogJob, ApplyJob<E>>,
    pub(crate) lessor: Mutex<Lessor>,
    pub(crate) standing: watch::Sender<Standing>,
    pub(crate) place: Arc<dyn EnginePlace<E>>,
    /// Set once peers can be reached.
    pub(crate) transport: OnceLock<(tokio::runtime::Handle, Transport)>,
    /// How far the peers are, as of the last tick; empty unless this member leads.
    pub(crate) progress: Mutex<Vec<PeerProgress>>,
    pub(crate) membership: watch::Sender<Arc<Membership>>,
    /// Views for snapshots, by the member that they are for.
    held: Mutex<BTreeMap<MemberId, Held>>,
    /// A snapshot that was received and is not in use yet, and who waits for that.
    pub(crate) staged: Mutex<Option<(Staged<E>, InstallWaiter)>>,
    /// Engines that were replaced, until their last reader is gone.
    retired: Mutex<Vec<(Arc<E>, PathBuf)>>,
    /// The newest ones, in order.
    pub(crate) digests: Mutex<VecDeque<Digest>>,
    pub(crate) kept_hashes: KeptHashes,
    /// Whether this member's state was found to differ from that of the others.
    pub(crate) quarantined: AtomicBool,
    /// Whether this member was removed from the cluster.
    pub(crate) removed: watch::Sender<bool>,
    pub(crate) reads_locally: AtomicBool,
    /// Since when the Raft log's disk has been stalled, by [`Shared::now_ms`]; 0 if it is not.
    stalled_since_ms: AtomicU64,
    pub(crate) leader: AtomicU64,
    pub(crate) term: AtomicU64,
    pub(crate) committed: AtomicU64,
    /// The newest index that the replica was told to be applied.
    known_applied: AtomicU64,
    pub(crate) disk_full: AtomicBool,
    pub(crate) db_bytes: AtomicU64,
    pub(crate) db_live_bytes: AtomicU64,
    pub(crate) db_quota_bytes: AtomicU64,
    pub(crate) log_bytes: AtomicU64,
    pub(crate) applied: watch::Sender<RaftIndex>,
    pub(crate) compacted: watch::Sender<i64>,
    pub(crate) metrics: Arc<Metrics>,
    /// Whether the alarm of a full store is being raised.
    pub(crate) raising_alarm: AtomicBool,
    /// Whether something that grows was carried out though the store was as large as it may be: by members that did
    /// not know yet.
    outgrown: AtomicBool,
    /// Whether the store was found to be nearly as large as it may be.
    pub(crate) nearly_full: AtomicBool,
    /// Room for backups on their way.
    pub(crate) backups: Arc<Semaphore>,
    started: Instant,
    stopping: AtomicBool,
    failed: AtomicBool,
    on_failure: FailureHandler,
}

impl<E: Engine> Shared<E> {
    /// Milliseconds of a clock that never goes back.
    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// For how long the Raft log's disk has not finished a write, if that is an election timeout or more.
    pub(crate) fn log_stalled(&self) -> Option<Duration> {
        let since_ms = self.stalled_since_ms.load(Ordering::Acquire);
        (since_ms > 0).then(|| Duration::from_millis(self.now_ms().saturating_sub(since_ms)))
    }

    pub(crate) fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// Notes that this member was removed from the cluster: the server stops.
    pub(crate) fn note_removed(&self) {
        if !self.removed.send_replace(true) {
            tracing::warn!(
                "the member has been permanently removed from the cluster; it stops, and its data is of no more use"
            );
        }
    }

    pub(crate) fn fail(&self, what: &str) {
        if !self.failed.swap(true, Ordering::AcqRel) {
            tracing::error!(
                cause = what,
                "the node cannot go on and stops; nothing unwritten was acknowledged"
            );
            (self.on_failure)(what);
        }
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// A running member.
pub struct Node<E: Engine, L: RaftLog> {
    shared: Arc<Shared<E>>,
    log: Arc<L>,
    threads: Vec<(&'static str, JoinHandle<()>)>,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The engine's data cannot be read.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The log and the state do not fit, or the log cannot be read.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

pub(crate) enum LogJob {
    Append {
        number: u64,
        entries: Vec<Entry>,
        hard_state: Option<HardState>,
        sync: bool,
    },
    Trim(RaftIndex),
    Install {
        number: u64,
        index: RaftIndex,
        term: u64,
        hard_state: HardState,
    },
}

pub(crate) enum ApplyJob<E> {
    Entries(Vec<Committed>),
    /// Go on with a snapshot, in an engine that replaces the one in a directory.
    Install {
        engine: E,
        replaced: PathBuf,
        waiter: InstallWaiter,
    },
}

impl<E: Engine, L: RaftLog> Node<E, L> {
    /// Takes up the member's state and starts its threads. Serving may begin once [`Node::wait_ready`] returns.
    pub fn start(
        config: NodeConfig,
        engine: Arc<E>,
        place: Arc<dyn EnginePlace<E>>,
        log: Arc<L>,
        options: &mvcc::Options,
        metrics: Arc<Metrics>,
        on_failure: FailureHandler,
    ) -> Result<Self, StartError> {
        let machine = Machine::open(engine, options)?;
        let (applied, _) = machine.applied();
        let logger = crate::raft_log_bridge::logger();
        let membership = machine.membership().clone();
        let replica = Replica::open(config.replica.clone(), log.clone(), applied, &membership, &logger)?;
        let mut lessor = Lessor::default();
        for change in machine.leases() {
            lessor.apply(change, 0);
        }
        // As etcd does it: the member, the time, a counter; so that an id is not met twice, whatever is replayed.
        let unix_ms = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |time| time.as_millis() as u64);
        let first_id = config.replica.id << 48 | (unix_ms & 0xff_ffff_ffff) << 8;
        let pending = Pending::new(
            first_id,
            config.limits.pending_proposals_max,
            config.limits.pending_bytes_max,
        );
        let shared = Arc::new(Shared {
            reader: machine.reader(),
            hub: machine.hub().clone(),
            gate: Gate::new(&config.auth, log.last_index()),
            pending: Arc::new(pending),
            work: Work::new(),
            lessor: Mutex::new(lessor),
            standing: watch::Sender::new(replica.standing()),
            place,
            transport: OnceLock::new(),
            progress: Mutex::default(),
            membership: watch::Sender::new(membership),
            held: Mutex::default(),
            staged: Mutex::default(),
            retired: Mutex::default(),
            digests: Mutex::default(),
            kept_hashes: KeptHashes::default(),
            quarantined: AtomicBool::new(false),
            removed: watch::Sender::new(false),
            reads_locally: AtomicBool::new(false),
            stalled_since_ms: AtomicU64::new(0),
            leader: AtomicU64::new(0),
            term: AtomicU64::new(replica.standing().term),
            committed: AtomicU64::new(replica.committed()),
            known_applied: AtomicU64::new(replica.known_applied()),
            disk_full: AtomicBool::new(false),
            db_bytes: AtomicU64::new(0),
            db_live_bytes: AtomicU64::new(0),
            db_quota_bytes: AtomicU64::new(0),
            log_bytes: AtomicU64::new(0),
            applied: watch::Sender::new(applied),
            compacted: watch::Sender::new(machine.reader().compacted_physically()),
            metrics,
            raising_alarm: AtomicBool::new(false),
            outgrown: AtomicBool::new(false),
            nearly_full: AtomicBool::new(false),
            backups: Arc::new(Semaphore::new(backup::BACKUPS_MAX)),
            started: Instant::now(),
            stopping: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            on_failure,
            config,
        });
        let mut node = Node {
            shared: shared.clone(),
            log: log.clone(),
            threads: Vec::new(),
        };
        upkeep_measure(&shared, &*log);
        // Before anybody is answered: it may have been shut off before it stopped.
        check_quarantine(&shared);
        let member = Arc::new(Member {
            stepping: Mutex::new(Stepping {
                replica,
                effects: Vec::new(),
                readable: Vec::new(),
            }),
            writing: Mutex::new(Writing {
                log: log.clone(),
                jobs: VecDeque::new(),
                faults: Faults::new(shared.config.fault_file.clone()),
            }),
            applying: Mutex::new(Applying {
                machine,
                jobs: VecDeque::new(),
                entries: Vec::new(),
                faults: Faults::new(shared.config.fault_file.clone()),
                compaction_due: true,
                next_step: Instant::now(),
                compacting_since: None,
                views: Views::default(),
            }),
        });
        for name in MEMBER_THREADS {
            let (shared, member) = (shared.clone(), member.clone());
            node.spawn(name, move || {
                if let Err(error) = do_work(&shared, &member) {
                    shared.fail(&error);
                }
            })?;
        }
        node.spawn("clock", {
            let shared = shared.clone();
            move || run_clock(&shared)
        })?;
        node.spawn("upkeep", {
            let shared = shared.clone();
            move || run_upkeep(&shared, &*log)
        })?;
        // If there is nobody else to vote there is nothing to wait for.
        shared.work.input(Input::Campaign);
        Ok(node)
    }

    fn spawn(&mut self, name: &'static str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let run = move || {
            // A thread that panics has met a broken invariant: the node stops, as on any other failure.
            if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text
                    .or_else(|| panic.downcast_ref::<&str>().copied())
                    .unwrap_or("a panic");
                shared.fail(&format!("the {name} thread met a broken invariant: {text}"));
            }
        };
        let handle = std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
        self.threads.push((name, handle));
        Ok(())
    }

    /// How many members there were as of the applied index, the last time that changed.
    pub(crate) fn membership_at_start(&self) -> usize {
        self.shared.membership.borrow().members.len()
    }

    /// Says once that this member was removed from the cluster.
    pub(crate) fn removed(&self) -> watch::Receiver<bool> {
        self.shared.removed.subscribe()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared<E>> {
        &self.shared
    }

    /// The store that this node serves.
    pub fn store(&self) -> crate::NodeStore<E> {
        crate::NodeStore::new(self.shared.clone())
    }

    /// Waits until this member can answer linearizable reads; `false` if nothing is replayed from the log for `timeout`,
    /// or if it fails. As long as it gets on, a long log may take its time.
    pub fn wait_ready(&self, timeout: Duration) -> bool {
        let (mut moved, mut applied) = (Instant::now(), 0);
        while moved.elapsed() < timeout && !self.shared.failed.load(Ordering::Acquire) {
            if self.shared.reads_locally.load(Ordering::Acquire) {
                return true;
            }
            let now = *self.shared.applied.borrow();
            if now != applied {
                (moved, applied) = (Instant::now(), now);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    /// Hands leadership over, if this member leads and there is another voter, and waits for that, at most an election
    /// timeout, or [`HAND_OVER_TIMEOUT`] if that is shorter.
    fn hand_over(&self) {
        let shared = &self.shared;
        let leads = || shared.standing().role == Role::Leader;
        if !leads() || shared.reads_locally.load(Ordering::Acquire) || shared.transport.get().is_none() {
            return;
        }
        tracing::info!("handing leadership over before stopping");
        shared.work.input(Input::Transfer(0));
        let begun = Instant::now();
        while (leads() || shared.leader.load(Ordering::Acquire) == 0)
            && begun.elapsed() < shared.config.election_timeout.min(HAND_OVER_TIMEOUT)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops cleanly: hands leadership over, refuses new proposals, waits (at most `timeout`) for those that are under way, flushes the engine
    /// so that the next start replays nothing, ends all threads.
    pub fn stop(mut self, timeout: Duration) {
        self.hand_over();
        self.shared.pending.stop();
        let begun = Instant::now();
        while self.shared.pending.len().0 > 0
            && begun.elapsed() < timeout
            && !self.shared.failed.load(Ordering::Acquire)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.end_threads();
        if let Some((runtime, transport)) = self.shared.transport.get() {
            runtime.block_on(transport.shutdown(Duration::from_secs(1)));
        }
        if !self.shared.failed.load(Ordering::Acquire) {
            let engine = self.shared.reader.engine();
            let flushed = engine.flush().and_then(|()| Machine::durable_index(&*engine));
            match flushed {
                Ok(durable) => {
                    if let Err(error) = self.log.trim(trim_to(&self.shared, durable)) {
                        tracing::warn!(%error, "the log was not trimmed; the next start does it");
                    }
                }
                Err(error) => tracing::warn!(%error, "the engine was not flushed; the next start replays the log"),
            }
        }
    }

    fn end_threads(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.pending.stop();
        self.shared.work.close();
        for (name, thread) in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(name, "a thread ended by a panic");
            }
        }
    }
}

impl<E: Engine, L: RaftLog> Drop for Node<E, L> {
    fn drop(&mut self) {
        self.end_threads();
    }
}

/// What the member's threads share of its work.
struct Member<E: Engine, L: RaftLog> {
    // Each is locked by the one thread that does this kind of work.
    stepping: Mutex<Stepping<L>>,
    writing: Mutex<Writing<L>>,
    applying: Mutex<Applying<E>>,
}

struct Stepping<L: RaftLog> {
    replica: Replica<L>,
    // Kept for their memory.
    effects: Vec<Effect>,
    readable: Vec<(RequestId, RaftIndex)>,
}

struct Writing<L> {
    log: Arc<L>,
    /// What was taken up and is not done.
    jobs: VecDeque<LogJob>,
    faults: Faults,
}

struct Applying<E: Engine> {
    machine: Machine<E>,
    /// What was taken up and is not done.
    jobs: VecDeque<ApplyJob<E>>,
    // Kept for its memory.
    entries: Vec<Committed>,
    faults: Faults,
    compaction_due: bool,
    /// When the next step of it is due.
    next_step: Instant,
    /// When the compaction under way began.
    compacting_since: Option<Instant>,
    views: Views,
}

/// Does whatever work there is until the node stops. An error is final.
fn do_work<E: Engine, L: RaftLog>(shared: &Arc<Shared<E>>, member: &Member<E, L>) -> Result<(), String> {
    let mut hands = Hands::default();
    let mut done = None;
    while let Some(kind) = shared.work.next(done, &mut hands) {
        let again = match kind {
            Kind::Step => {
                step(shared, &mut member.stepping.lock(), &mut hands.inputs)?;
                Again::No
            }
            Kind::Write => {
                let mut writing = member.writing.lock();
                writing.jobs.append(&mut hands.writes);
                write_log(shared, &mut writing)?
            }
            Kind::Apply => {
                let mut applying = member.applying.lock();
                applying.jobs.append(&mut hands.applies);
                apply(shared, &mut applying)?
            }
        };
        done = Some((kind, again));
    }
    Ok(())
}

fn step<E: Engine, L: RaftLog>(
    shared: &Arc<Shared<E>>,
    stepping: &mut Stepping<L>,
    inputs: &mut Vec<Input>,
) -> Result<(), String> {
    let Stepping {
        replica,
        effects,
        readable,
    } = stepping;
    let ticks = inputs.iter().any(|input| matches!(input, Input::Tick));
    replica
        .step(inputs.drain(..), effects)
        .map_err(|error| error.to_string())?;
    shared.committed.store(replica.committed(), Ordering::Relaxed);
    shared.known_applied.store(replica.known_applied(), Ordering::Release);
    shared
        .metrics
        .proposals_waiting
        .store(replica.waiting().0 as u64, Ordering::Relaxed);
    if ticks {
        *shared.progress.lock() = replica.progress();
    }
    let (mut messages, mut writes, mut applies) = (Vec::new(), Vec::new(), Vec::new());
    for effect in effects.drain(..) {
        match effect {
            Effect::Append {
                number,
                entries,
                hard_state,
                sync,
            } => writes.push(LogJob::Append {
                number,
                entries,
                hard_state,
                sync,
            }),
            Effect::Apply(committed) => applies.push(ApplyJob::Entries(committed)),
            Effect::Send(more) => messages.extend(more),
            Effect::MakeSnapshot(to) => make_snapshot(shared, to),
            Effect::SendSnapshot(to, message) => send_snapshot(shared, to, &message),
            Effect::Install {
                number,
                index,
                term,
                hard_state,
            } => writes.push(LogJob::Install {
                number,
                index,
                term,
                hard_state,
            }),
            Effect::DropSnapshot => {
                if let Some((staged, waiter)) = shared.staged.lock().take() {
                    drop(staged.engine);
                    shared.place.remove(&staged.dir);
                    let _ = waiter.try_send(false);
                }
            }
            Effect::ReadReady { id, index } => readable.push((id, index)),
            Effect::Reject { id, error } => {
                shared.metrics.proposals_failed.fetch_add(1, Ordering::Relaxed);
                shared.lessor.lock().came_to_nothing(id, shared.now_ms());
                shared.pending.refuse(id, error);
            }
            Effect::Standing(standing) => take_standing(shared, standing),
        }
    }
    // Those that share a round are woken together.
    api::wake::together(|| {
        for (id, index) in readable.drain(..) {
            shared.pending.answer_read(id, Ok(index));
        }
    });
    // Before the log is written, and those to the same peer together: one wake-up of the connection and one frame.
    if !messages.is_empty() {
        send(shared, &messages);
    }
    shared.work.hand_on(|work| {
        writes.into_iter().for_each(|write| work.write(write));
        applies.into_iter().for_each(|apply| work.apply(apply));
        work.let_proposals_wait(replica.lets_proposals_wait());
    });
    Ok(())
}

fn take_standing<E: Engine>(shared: &Shared<E>, standing: Standing) {
    let before = shared.standing.send_replace(standing);
    shared.term.store(standing.term, Ordering::Release);
    shared.leader.store(standing.leader, Ordering::Release);
    if standing.leader != before.leader && standing.leader != 0 {
        shared.metrics.leader_changes.fetch_add(1, Ordering::Relaxed);
        tracing::info!(
            leader = format!("{:x}", standing.leader),
            term = standing.term,
            "the cluster has a leader"
        );
    }
    if standing.is_stalled != before.is_stalled {
        let timeout_ms = u64::try_from(shared.config.election_timeout.as_millis()).unwrap_or(u64::MAX);
        if standing.is_stalled {
            shared
                .stalled_since_ms
                .store(shared.now_ms().saturating_sub(timeout_ms).max(1), Ordering::Release);
            shared.metrics.log_stalls.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                "the Raft log's disk has not finished a write for an election timeout; this member must not lead"
            );
        } else {
            let stalled = shared.log_stalled().unwrap_or_default();
            shared.stalled_since_ms.store(0, Ordering::Release);
            tracing::info!(
                stalled_ms = stalled.as_millis() as u64,
                "the Raft log's disk takes writes again"
            );
        }
    }
    if before.role == Role::Leader && standing.role != Role::Leader && standing.is_stalled {
        shared.metrics.leaders_fenced.fetch_add(1, Ordering::Relaxed);
        tracing::error!(
            leader = format!("{:x}", standing.leader),
            term = standing.term,
            "this member has given leadership up, because its Raft log's disk is stalled"
        );
    }
    let mut lessor = shared.lessor.lock();
    // From the first entry of its own term on: by then it knows every lease that there is.
    match (before.has_begun, standing.has_begun) {
        (false, true) => {
            let extension_ms = u64::try_from(shared.config.election_timeout.as_millis()).unwrap_or(u64::MAX);
            lessor.lead(shared.now_ms(), extension_ms);
        }
        (true, false) => lessor.follow(),
        _ => {}
    }
    drop(lessor);
    shared.reads_locally.store(standing.reads_locally, Ordering::Release);
}

/// Hands messages to the transport, those to the same peer together.
fn send<E: Engine>(shared: &Shared<E>, messages: &[(MemberId, PeerMessage)]) {
    let Some((_, transport)) = shared.transport.get() else {
        return;
    };
    let mut by_peer: Vec<(MemberId, Vec<Bytes>)> = Vec::new();
    for (to, message) in messages {
        let encoded = message.encode();
        match by_peer.iter_mut().find(|(peer, _)| peer == to) {
            Some((_, waiting)) => waiting.push(encoded),
            None => by_peer.push((*to, vec![encoded])),
        }
    }
    for (to, messages) in by_peer {
        // What is dropped here is repeated by Raft.
        transport.send(to, messages);
    }
}

fn make_snapshot<E: Engine>(shared: &Arc<Shared<E>>, to: MemberId) {
    let ready = {
        let shared = shared.clone();
        move |snapshot: Result<snapshot::Snapshot, EngineError>| match snapshot {
            Ok(snapshot) => {
                let (index, term) = (snapshot.index, snapshot.term);
                let held = Held {
                    index,
                    source: Some(snapshot.source),
                    since: Instant::now(),
                };
                shared.held.lock().insert(to, held);
                tracing::info!(
                    to = format!("{to:x}"),
                    snapshot_index = index,
                    "a member needs a snapshot"
                );
                shared.work.input(Input::SnapshotMade {
                    to,
                    index,
                    term,
                    membership: Arc::new(snapshot.membership),
                });
            }
            Err(error) => shared.fail(&error.to_string()),
        }
    };
    if let Err(error) = snapshot::take(shared.reader.engine(), ready) {
        tracing::warn!(%error, "a snapshot cannot be made");
        shared.work.input(Input::SnapshotSent { to, done: false });
    }
}

fn send_snapshot<E: Engine>(shared: &Arc<Shared<E>>, to: MemberId, message: &Message) {
    let index = message.get_snapshot().get_metadata().index;
    let source = {
        let mut held = shared.held.lock();
        // Two may be under way for one member, from two times that this one led.
        let of_index = held.get_mut(&to).filter(|held| held.index == index);
        of_index.and_then(|held| held.source.take())
    };
    let (Some((runtime, transport)), Some(source)) = (shared.transport.get(), source) else {
        return shared.work.input(Input::SnapshotSent { to, done: false });
    };
    // The same snapshot to the same member from the same start of this one: what arrived of it stays of use.
    let id = [shared.config.replica.incarnation, shared.pending.next_id(), index].map(u64::to_be_bytes);
    let header = SnapshotHeader {
        id: id.concat().into(),
        meta: PeerMessage::Raft(Box::new(message.clone())).encode(),
    };
    let sending = transport.send_snapshot(to, header, Box::new(source));
    let shared = shared.clone();
    let begun = Instant::now();
    runtime.spawn(async move {
        let result = sending.await;
        let done = result.is_ok();
        let to_hex = format!("{to:x}");
        match result {
            Ok(summary) => tracing::info!(
                to = to_hex,
                snapshot_index = index,
                bytes = summary.bytes,
                took_ms = begun.elapsed().as_millis() as u64,
                "sent database snapshot"
            ),
            Err(error) => tracing::warn!(to = to_hex, %error, "a snapshot was not sent"),
        }
        shared.held.lock().remove(&to);
        shared.work.input(Input::SnapshotSent { to, done });
    });
}

/// Puts a received snapshot in place of the state and the log on disk.
fn install<E: Engine, L: RaftLog>(
    shared: &Shared<E>,
    log: &L,
    index: RaftIndex,
    term: u64,
    hard_state: &HardState,
) -> Result<ApplyJob<E>, String> {
    let (staged, waiter) = shared.staged.lock().take().ok_or("there is no snapshot to install")?;
    assert_eq!(
        (staged.index, staged.term),
        (index, term),
        "the snapshot that Raft accepted is the one that is here"
    );
    let replaced = shared.place.used();
    // In this order: an engine ahead of its log is mended at the next start, a log ahead of its engine is not.
    shared.place.switch(&staged.dir, index, term)?;
    log.reset(index, term, hard_state).map_err(|error| error.to_string())?;
    Ok(ApplyJob::Install {
        engine: staged.engine,
        replaced,
        waiter,
    })
}

/// Writes once, and says whether there is more to write.
fn write_log<E: Engine, L: RaftLog>(shared: &Shared<E>, writing: &mut Writing<L>) -> Result<Again, String> {
    let Writing { log, jobs, faults } = writing;
    while let Some(job) = jobs.pop_front() {
        match job {
            LogJob::Append {
                mut number,
                mut entries,
                mut hard_state,
                mut sync,
            } => {
                // One write and one fdatasync for all that wait, unless an entry replaces one of the same write.
                let fits = |job: &mut LogJob, last: Option<&Entry>| match (job, last) {
                    (LogJob::Append { entries: next, .. }, Some(last)) => {
                        next.first().is_none_or(|next| next.index == last.index + 1)
                    }
                    (LogJob::Append { .. }, None) => true,
                    _ => false,
                };
                while let Some(LogJob::Append {
                    number: n,
                    entries: e,
                    hard_state: h,
                    sync: s,
                }) = jobs.pop_front_if(|job| fits(job, entries.last()))
                {
                    number = n;
                    entries.extend(e);
                    hard_state = h.or(hard_state);
                    sync |= s;
                }
                faults.delay_log();
                let stats = log.append(&entries, hard_state.as_ref(), sync);
                shared
                    .metrics
                    .appended(entries.len(), stats.map_err(|error| error.to_string())?);
                shared.work.hand_on(|work| work.input(Input::Persisted(number)));
                break;
            }
            LogJob::Trim(index) => {
                // One that was asked for before a snapshot came has nothing to do any more.
                let index = index.min(log.last_index() + 1);
                if index > log.first_index() {
                    log.trim(index).map_err(|error| error.to_string())?;
                }
            }
            LogJob::Install {
                number,
                index,
                term,
                hard_state,
            } => {
                let job = install(shared, &**log, index, term, &hard_state)?;
                shared.work.hand_on(|work| {
                    work.apply(job);
                    work.input(Input::Persisted(number));
                });
                break;
            }
        }
    }
    Ok(if jobs.is_empty() { Again::No } else { Again::Now })
}

/// Applies what there is, takes a step of compaction if that is due, and says when the next one is.
fn apply<E: Engine>(shared: &Arc<Shared<E>>, applying: &mut Applying<E>) -> Result<Again, String> {
    let Applying {
        machine,
        jobs,
        entries,
        faults,
        compaction_due,
        next_step,
        compacting_since,
        views,
    } = applying;
    let mut replacement = None;
    while let Some(job) = jobs.pop_front() {
        match job {
            ApplyJob::Entries(mut committed) => entries.append(&mut committed),
            ApplyJob::Install {
                engine,
                replaced,
                waiter,
            } => {
                replacement = Some((engine, replaced, waiter));
                break;
            }
        }
    }
    faults.corrupt(entries);
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let (now, later) = rest.split_at(fitting(rest));
        let (input, due) = apply_some(shared, machine, now, views).map_err(|error| error.to_string())?;
        *compaction_due |= due;
        rest = later;
        if is_quiet(shared, &input) {
            shared.work.input_quietly(input);
        } else if rest.is_empty() && replacement.is_none() && !*compaction_due {
            shared.work.hand_on(|work| work.input(input));
        } else {
            // This thread has more to do first.
            shared.work.input(input);
        }
    }
    entries.clear();
    if let Some((engine, replaced, waiter)) = replacement {
        shared.metrics.snapshots_installing.store(1, Ordering::Relaxed);
        take_over(shared, machine, engine, replaced).map_err(|error| error.to_string())?;
        shared.metrics.snapshots_installing.store(0, Ordering::Relaxed);
        *compaction_due = true;
        let _ = waiter.try_send(true);
    }
    if *compaction_due && !views.are_taken() {
        *next_step = (*next_step).max(Instant::now() + VIEW_PAUSE);
    }
    if *compaction_due && *next_step <= Instant::now() {
        let step_begun = Instant::now();
        let since = *compacting_since.get_or_insert(step_begun);
        match machine.compact_step(shared.config.compaction_batch_keys) {
            Ok(CompactionProgress::Going { scanned }) => {
                shared.metrics.compaction_step(scanned, step_begun.elapsed());
                *next_step = Instant::now() + shared.config.compaction_pause;
            }
            Ok(CompactionProgress::Idle) => {
                *compaction_due = false;
                *compacting_since = None;
            }
            Ok(CompactionProgress::Done { revision }) => {
                *compaction_due = false;
                *compacting_since = None;
                shared.metrics.compacted(since.elapsed());
                tracing::info!(
                    compact_revision = revision,
                    took_ms = since.elapsed().as_millis() as u64,
                    "finished scheduled compaction"
                );
                shared.compacted.send_replace(revision);
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    if let Some(error) = shared.hub.failure() {
        return Err(error.to_string());
    }
    Ok(if !jobs.is_empty() {
        Again::Now
    } else if *compaction_due {
        Again::At(*next_step)
    } else {
        Again::No
    })
}

/// Whether the replica need not be stepped for this.
fn is_quiet<E: Engine>(shared: &Shared<E>, applied: &Input) -> bool {
    // A term may just have begun here, which makes reads possible; or others have a vote from now on.
    matches!(applied, Input::Applied { member_changes, .. } if member_changes.is_empty())
        && shared.reads_locally.load(Ordering::Acquire)
}

/// Goes on with the state of a snapshot.
fn take_over<E: Engine>(
    shared: &Shared<E>,
    machine: &mut Machine<E>,
    engine: E,
    replaced: PathBuf,
) -> Result<(), EngineError> {
    let old = shared.reader.engine();
    machine.install(Arc::new(engine))?;
    shared.gate.forget();
    shared.retired.lock().push((old, replaced));
    {
        let mut lessor = shared.lessor.lock();
        *lessor = Lessor::default();
        for change in machine.leases() {
            lessor.apply(change, shared.now_ms());
        }
    }
    let (index, _) = machine.applied();
    tracing::info!(
        applied_index = index,
        revision = shared.reader.revision(),
        "applied snapshot"
    );
    shared.digests.lock().clear();
    note_membership(shared, machine);
    check_quarantine(shared);
    shared.compacted.send_replace(shared.reader.compacted_physically());
    shared.applied.send_replace(index);
    Ok(())
}

fn note_membership<E: Engine>(shared: &Shared<E>, machine: &Machine<E>) {
    let changed = !Arc::ptr_eq(&shared.membership.borrow(), machine.membership());
    if changed {
        shared.membership.send_replace(machine.membership().clone());
        if machine.membership().is_removed(shared.member_id()) {
            shared.note_removed();
        }
    }
}

/// How many of these entries go into one engine write.
fn fitting(entries: &[Committed]) -> usize {
    let mut bytes = 0;
    let fits = entries.iter().take_while(|entry| {
        if let Command::Operations(data) = &entry.command {
            bytes += data.len();
        }
        bytes <= APPLY_BYTES_MAX
    });
    fits.count().max(1)
}

/// Applies entries. Returns what the replica is to be told, and whether there is compaction to do.
fn apply_some<E: Engine>(
    shared: &Arc<Shared<E>>,
    machine: &mut Machine<E>,
    entries: &[Committed],
    views: &mut Views,
) -> Result<(Input, bool), mvcc::machine::ApplyError> {
    let begun = Instant::now();
    // The lease's clock hears of it before anybody can see it: who watched a lease's key go finds no lease.
    let applied = machine.apply_telling(entries, |changes| {
        if changes.is_empty() {
            return;
        }
        let now_ms = shared.now_ms();
        let mut lessor = shared.lessor.lock();
        for change in changes {
            lessor.apply(*change, now_ms);
            if let LeaseChange::Revoked { .. } = change {
                shared.metrics.leases_revoked.fetch_add(1, Ordering::Relaxed);
            }
        }
    })?;
    let took = begun.elapsed();
    let is_slow = took > shared.config.warn_apply;
    shared.metrics.applied(&applied, took, is_slow);
    if is_slow {
        tracing::warn!(
            took_ms = took.as_millis() as u64,
            entries = entries.len(),
            operations = applied.counts.operations,
            expected_ms = shared.config.warn_apply.as_millis() as u64,
            "apply request took too long"
        );
    }
    let is_grant = |change: &LeaseChange| matches!(change, LeaseChange::Granted { .. });
    let grew = applied.counts.puts > 0 || applied.lease_changes.iter().any(is_grant);
    let quota = shared.config.quota_bytes;
    if grew && quota > 0 && shared.reader.data_bytes() >= quota {
        shared.outgrown.store(true, Ordering::Release);
    }
    shared.gate.follow(&applied.auth_changes);
    let index = entries.last().map_or(0, |entry| entry.index);
    {
        let mut digests = shared.digests.lock();
        digests.extend(applied.digests);
        let surplus = digests.len().saturating_sub(DIGESTS_MAX);
        digests.drain(..surplus);
    }
    note_membership(shared, machine);
    check_quarantine(shared);
    for reply in applied.replies.iter().filter(|reply| reply.result.is_err()) {
        shared.lessor.lock().came_to_nothing(reply.id, shared.now_ms());
    }
    // Before the replies: who has one finds the hash of a compaction, or waits for it.
    kept_hashes::begin(shared, applied.compactions, views);
    shared.pending.answer_all(applied.replies);
    shared.applied.send_replace(index);
    let input = Input::Applied {
        index,
        member_changes: applied.member_changes,
    };
    Ok((input, applied.compaction_due))
}

fn run_clock<E: Engine>(shared: &Shared<E>) {
    let mut next_tick = Instant::now() + shared.config.tick;
    let mut next_leases = Instant::now() + LEASE_INTERVAL;
    while !shared.stopping() {
        let next = next_tick.min(next_leases);
        std::thread::sleep(
            next.saturating_duration_since(Instant::now())
                .min(Duration::from_millis(50)),
        );
        let now = Instant::now();
        if now >= next_tick {
            let leads = || shared.leader.load(Ordering::Acquire) == shared.member_id();
            if now.saturating_duration_since(next_tick) >= shared.config.tick && leads() {
                shared.metrics.heartbeats_late.fetch_add(1, Ordering::Relaxed);
            }
            shared.work.input(Input::Tick);
            expire_proposals(shared, now);
            // After a pause, time that was missed is not made up for in a burst.
            next_tick = (next_tick + shared.config.tick).max(now);
        }
        if now >= next_leases {
            revoke_expired(shared);
            checkpoint_leases(shared);
            next_leases = (next_leases + LEASE_INTERVAL).max(now);
        }
    }
}

/// Tells the clients of proposals that take longer than they may.
fn expire_proposals<E: Engine>(shared: &Shared<E>, now: Instant) {
    let error = if shared.leader.load(Ordering::Acquire) == 0 {
        api::Error::TimeoutLeaderFail
    } else {
        api::Error::Timeout
    };
    let expired = shared.pending.expire(now, error);
    shared
        .metrics
        .proposals_failed
        .fetch_add(expired as u64, Ordering::Relaxed);
}

/// Replicates what leases have left, so that a change of leaders does not let them live for ever.
fn checkpoint_leases<E: Engine>(shared: &Shared<E>) {
    let standing = shared.standing();
    if !standing.has_begun || standing.reads_locally {
        return;
    }
    // The lessor stays locked until the proposal is queued: a keep-alive that takes a checkpoint back must come after it.
    let mut lessor = shared.lessor.lock();
    let checkpoints = lessor.checkpoints(shared.now_ms(), LEASE_CHECKPOINTS_MAX);
    if checkpoints.is_empty() {
        return;
    }
    let request = LeaseCheckpointRequest { checkpoints };
    let id = shared.pending.next_id();
    propose_unasked(shared, id, Action::LeaseCheckpoint(request), standing.term);
}

/// Proposes an operation that nobody waits for, and that makes sense for the leader of this term only unless that is 0. Should it get
/// lost, its reason remains and it is proposed again.
fn propose_unasked<E: Engine>(shared: &Shared<E>, id: RequestId, action: Action, leader_term: u64) {
    let member = Caller::MEMBER;
    let operation = Operation::of_user(id, member.name.to_owned(), member.revision, action);
    shared.work.input(Input::Propose(Proposal {
        id,
        operation: encode_operation(&operation),
        leader_term,
    }));
}

fn revoke_expired<E: Engine>(shared: &Shared<E>) {
    let standing = shared.standing();
    if !standing.has_begun {
        return;
    }
    let next_id = || shared.pending.next_id();
    let expired = shared
        .lessor
        .lock()
        .expired(shared.now_ms(), LEASE_REVOKES_MAX, next_id);
    for (request, id) in expired {
        shared.metrics.leases_expired.fetch_add(1, Ordering::Relaxed);
        let action = Action::LeaseRevoke(LeaseRevokeRequest { id });
        propose_unasked(shared, request, action, standing.term);
    }
}

/// Up to where the log may be trimmed, given what the engine has made durable.
fn trim_to<E: Engine>(shared: &Shared<E>, durable: RaftIndex) -> RaftIndex {
    // The engine may be ahead of what the replica was told: it still reads what it takes for unapplied.
    let durable = durable.min(shared.known_applied.load(Ordering::Acquire));
    // Nobody but followers needs entries that are durable in the engine.
    if shared.reads_locally.load(Ordering::Acquire) {
        return durable + 1;
    }
    let mut to = (durable + 1).saturating_sub(shared.config.catchup_entries);
    // Whoever is being sent a snapshot needs what comes after it, and whoever is up and behind is better served from the
    // log; up to a bound, since a peer may be behind for ever.
    let live = shared.db_live_bytes.load(Ordering::Relaxed);
    let keep = log_keep_bytes(live, shared.disk_full.load(Ordering::Acquire));
    if shared.log_bytes.load(Ordering::Relaxed) < keep {
        for held in shared.held.lock().values() {
            to = to.min(held.index + 1);
        }
        for peer in shared.progress.lock().iter().filter(|peer| peer.is_active) {
            to = to.min(peer.matched + 1);
        }
    }
    to
}

/// Bytes of log that are worth keeping for a peer that is behind, in a store with `live` bytes: as long as the log is smaller
/// than a snapshot would be. A snapshot of 100 GiB takes 27 minutes at 64 MiB/s; if less were kept than is written
/// meanwhile, it would be of no use when it arrives, and neither would the next. A full disk comes first.
fn log_keep_bytes(live: u64, is_disk_full: bool) -> u64 {
    if is_disk_full {
        LOG_KEEP_BYTES_MIN
    } else {
        live.clamp(LOG_KEEP_BYTES_MIN, LOG_KEEP_BYTES_MAX)
    }
}

fn upkeep_measure<E: Engine, L: RaftLog>(shared: &Shared<E>, log: &L) {
    let engine = shared.reader.engine();
    // What is not written out yet counts as well: it will be.
    let live = engine.live_bytes().max(shared.reader.key_bytes());
    shared.db_live_bytes.store(live, Ordering::Relaxed);
    // Never 0, which etcdctl divides by.
    shared
        .db_bytes
        .store(engine.disk_bytes().max(live).max(1), Ordering::Relaxed);
    shared.log_bytes.store(log.disk_bytes(), Ordering::Relaxed);
    let config = &shared.config;
    // The log may lie on another disk than the data; the fuller one counts.
    let free = [&config.data_dir, &config.log_dir]
        .into_iter()
        .map(|dir| storage::disk::free_bytes(dir));
    let free = match free.min_by_key(|free| *free.as_ref().unwrap_or(&0)) {
        Some(Ok(free)) => free,
        Some(Err(error)) => {
            tracing::warn!(%error, "the disk's free space is unknown");
            return;
        }
        None => unreachable!("two directories are looked at"),
    };
    // An engine that writes all its data anew needs room for it beside what is there.
    let reserve = config.disk_reserve_bytes + if config.flush_writes_all { live } else { 0 };
    // Without a quota of its own the store may grow until the disk's reserve is reached.
    let room = shared.reader.data_bytes() + free.saturating_sub(reserve);
    let quota = if config.quota_bytes > 0 {
        config.quota_bytes
    } else {
        room
    };
    shared.db_quota_bytes.store(quota, Ordering::Relaxed);
    if free < reserve && !shared.disk_full.swap(true, Ordering::AcqRel) {
        tracing::warn!(
            free_bytes = free,
            reserve_bytes = reserve,
            "the disk is nearly full: writes are refused"
        );
    } else if free >= reserve + reserve / RESERVE_HYSTERESIS && shared.disk_full.swap(false, Ordering::AcqRel) {
        tracing::info!(
            free_bytes = free,
            reserve_bytes = reserve,
            "the disk has space again: writes are taken"
        );
    }
}

/// Whether the store's quota, if it has one, is used up or nearly so.
fn upkeep_quota<E: Engine>(shared: &Shared<E>) {
    let quota = shared.config.quota_bytes;
    if quota == 0 {
        return;
    }
    let data = shared.reader.data_bytes();
    let nearly_full = data.saturating_mul(100) >= quota.saturating_mul(quota::WARNING_PERCENT);
    if shared.nearly_full.swap(nearly_full, Ordering::AcqRel) != nearly_full && nearly_full {
        tracing::warn!(
            data_bytes = data,
            quota_bytes = quota,
            "the store is nearly as large as it may be: compact it, delete keys, or raise --quota-backend-bytes"
        );
    }
    // What arrived elsewhere may have filled it. An alarm that was ended stays so until there is more.
    if shared.outgrown.swap(false, Ordering::AcqRel) && data >= quota && !shared.has_full_alarm() {
        let request = AlarmRequest {
            action: AlarmAction::Activate.into(),
            member_id: shared.member_id(),
            alarm: AlarmType::Nospace.into(),
        };
        propose_unasked(shared, shared.pending.next_id(), Action::Alarm(request), 0);
    }
}

fn run_upkeep<E: Engine, L: RaftLog>(shared: &Shared<E>, log: &L) {
    let mut written_at_flush = shared.metrics.log_bytes_written();
    let mut flushed = Instant::now();
    while !shared.stopping() {
        std::thread::sleep(UPKEEP_INTERVAL);
        upkeep_measure(shared, log);
        upkeep_quota(shared);
        remove_retired(shared);
        // A view that nobody came for, as when leadership was lost, must not keep the log from being trimmed.
        let is_wanted = |held: &Held| held.source.is_none() || held.since.elapsed() < snapshot::UNUSED_MAX;
        shared.held.lock().retain(|_, held| is_wanted(held));
        let engine = shared.reader.engine();
        // A watcher may have met a failure that no write meets.
        if let Some(error) = shared.hub.failure() {
            return shared.fail(&error.to_string());
        }
        let durable = match Machine::durable_index(&*engine) {
            Ok(durable) => durable,
            Err(error) => return shared.fail(&error.to_string()),
        };
        let to = trim_to(shared, durable);
        if to > log.first_index() {
            shared.work.write(LogJob::Trim(to));
        }
        let applied = *shared.applied.borrow();
        let unflushed = applied > durable;
        let many = shared
            .config
            .flush_entries
            .is_some_and(|entries| applied.saturating_sub(durable) >= entries);
        let written = shared.metrics.log_bytes_written() - written_at_flush;
        let mut enough = shared.config.flush_log_bytes;
        if shared.config.flush_writes_all {
            enough = enough.max(shared.db_live_bytes.load(Ordering::Relaxed) / 2);
        }
        if unflushed && (many || written >= enough || flushed.elapsed() >= shared.config.flush_interval) {
            written_at_flush = shared.metrics.log_bytes_written();
            let begun = Instant::now();
            if let Err(error) = engine.flush() {
                return shared.fail(&error.to_string());
            }
            flushed = Instant::now();
            shared.metrics.flushed(begun.elapsed());
            tracing::debug!(took_ms = begun.elapsed().as_millis() as u64, "flushed the engine");
        }
    }
}

/// Removes engines that a snapshot replaced and that nobody reads any more.
fn remove_retired<E: Engine>(shared: &Shared<E>) {
    let unused: Vec<_> = {
        let mut retired = shared.retired.lock();
        retired
            .extract_if(.., |(engine, _)| Arc::strong_count(engine) == 1)
            .collect()
    };
    for (engine, dir) in unused {
        drop(engine);
        shared.place.remove(&dir);
    }
}

/// A member whose state differs from that of the others neither leads nor answers.
fn check_quarantine<E: Engine>(shared: &Shared<E>) {
    let alarm = AlarmMember {
        member_id: shared.member_id(),
        alarm: AlarmType::Corrupt.into(),
    };
    let is_corrupt = shared.reader.alarms().contains(&alarm);
    if shared.quarantined.load(Ordering::Acquire) != is_corrupt {
        shared.quarantined.store(is_corrupt, Ordering::Release);
        if is_corrupt {
            tracing::error!("this member's state differs from that of the others: it answers nobody; replace it");
        }
        shared.work.input(Input::Quarantine(is_corrupt));
    }
}

impl<E: Engine> Shared<E> {
    /// Whether this member has said that it is full.
    pub(crate) fn has_full_alarm(&self) -> bool {
        let alarm = AlarmMember {
            member_id: self.member_id(),
            alarm: AlarmType::Nospace.into(),
        };
        self.reader.alarms().contains(&alarm)
    }

    /// This member's id.
    pub(crate) fn member_id(&self) -> MemberId {
        self.config.replica.id
    }
}
