//! What all of the transport's tasks share.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use api::limits::ETCD_CLUSTER_VERSION;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, Semaphore, watch};

use super::MemberId;
use super::address::PeerUrl;
use super::call_out::CallDesk;
use super::counters::{Counters, PeerStats};
use super::handler::{Handler, Introduction, Purpose, Refusal};
use super::incoming::Incoming;
use super::queue::SendQueue;
use super::settings::{Identity, Settings, Tls};
use super::snapshot_in::SnapshotDesk;
use super::tasks::Tasks;
use super::wire::Hello;

/// Everything.
pub(super) struct Shared {
    pub(super) identity: Identity,
    pub(super) settings: Settings,
    pub(super) tls: Tls,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) tasks: Tasks,
    pub(super) peers: RwLock<HashMap<MemberId, Arc<PeerState>>>,
    pub(super) incoming: Incoming,
    pub(super) snapshots: SnapshotDesk,
    /// Room for connections that are not accepted yet.
    pub(super) handshakes: Arc<Semaphore>,
    /// Counters outlive a peer's connections, and there are some of members that are not in the list yet.
    counters: Mutex<HashMap<MemberId, Arc<Counters>>>,
    incarnation: u64,
    sequence: AtomicU64,
    /// What the times in pings count from.
    pub(super) epoch: Instant,
}

/// One peer in the list.
pub(super) struct PeerState {
    pub(super) id: MemberId,
    pub(super) target: watch::Sender<Target>,
    pub(super) queue: SendQueue,
    pub(super) calls: CallDesk,
    pub(super) counters: Arc<Counters>,
    /// Woken when the peer has just reached us: then we most likely reach it, too.
    pub(super) awake: Notify,
    pub(super) standing: Mutex<Standing>,
    pub(super) snapshot_runs: AtomicBool,
    /// Which URL to try first.
    pub(super) url_turn: AtomicUsize,
}

/// Where a peer is.
#[derive(Debug, Clone, Default)]
pub(super) struct Target {
    pub(super) urls: Vec<PeerUrl>,
    /// It is not in the list any more.
    pub(super) gone: bool,
}

/// How it stands with the RAFT connection to a peer.
#[derive(Debug, Default)]
pub(super) struct Standing {
    pub(super) active_since: Option<Instant>,
    pub(super) url: Option<PeerUrl>,
    pub(super) last_error: Option<String>,
}

impl Shared {
    pub(super) fn new(
        identity: Identity,
        settings: Settings,
        tls: Tls,
        handler: Arc<dyn Handler>,
        tasks: Tasks,
    ) -> Self {
        Shared {
            incoming: Incoming::new(settings.connections_max),
            handshakes: Arc::new(Semaphore::new(settings.handshakes_max.max(1))),
            identity,
            settings,
            tls,
            handler,
            tasks,
            peers: RwLock::default(),
            snapshots: SnapshotDesk::default(),
            counters: Mutex::default(),
            incarnation: random(),
            sequence: AtomicU64::new(0),
            epoch: Instant::now(),
        }
    }

    /// How we introduce ourselves to a peer.
    pub(super) fn hello(&self, to: MemberId, purpose: Purpose) -> Hello {
        Hello {
            purpose: purpose.code(),
            cluster_id: self.identity.cluster_id,
            from: self.identity.member_id,
            to,
            version: self.identity.version.clone(),
            peer_urls: self.identity.peer_urls.clone(),
            incarnation: self.incarnation,
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed),
            cluster_version: ETCD_CLUSTER_VERSION.to_owned(),
        }
    }

    /// A peer in the list.
    pub(super) fn peer(&self, id: MemberId) -> Option<Arc<PeerState>> {
        self.peers.read().get(&id).cloned()
    }

    /// The counters of a member.
    pub(super) fn counters(&self, id: MemberId) -> Arc<Counters> {
        self.counters.lock().entry(id).or_default().clone()
    }

    /// Forgets the counters of those that are neither in the list nor connected.
    pub(super) fn forget_counters(&self) {
        let peers = self.peers.read();
        self.counters
            .lock()
            .retain(|id, counters| peers.contains_key(id) || Arc::strong_count(counters) > 1);
    }

    /// Tells the node that a peer does not take us.
    pub(super) fn refused(&self, peer: MemberId, refusal: &Refusal) {
        if !refusal.reason.is_passing() {
            self.handler.refused(peer, refusal);
        }
    }

    /// Notes that a member has reached us.
    pub(super) fn reached_by(&self, who: &Introduction) {
        if let Some(peer) = self.peer(who.from) {
            peer.awake.notify_waiters();
            peer.calls.try_again();
        }
    }

    /// How often to show that we live. Twice before anybody gives up, whatever the settings.
    pub(super) fn keepalive_interval(&self) -> Duration {
        self.settings
            .keepalive_interval
            .min(self.settings.raft_read_timeout / 3)
    }
}

impl PeerState {
    pub(super) fn new(id: MemberId, urls: Vec<PeerUrl>, counters: Arc<Counters>, settings: &Settings) -> Self {
        PeerState {
            id,
            target: watch::Sender::new(Target { urls, gone: false }),
            queue: SendQueue::new(settings.queue_bytes_max, settings.queue_messages_max),
            calls: CallDesk::new(settings.calls_max, settings.call_bytes_max),
            counters,
            awake: Notify::new(),
            standing: Mutex::default(),
            snapshot_runs: AtomicBool::new(false),
            url_turn: AtomicUsize::new(0),
        }
    }

    /// How it stands with it.
    pub(super) fn stats(&self) -> PeerStats {
        let standing = self.standing.lock();
        let queued = self.queue.amount();
        let counters = &self.counters;
        PeerStats {
            id: self.id,
            active_since: standing.active_since,
            url: standing.url.as_ref().map(PeerUrl::to_string),
            sent_bytes: counters.sent_bytes.get(),
            sent_messages: counters.sent_messages.get(),
            received_bytes: counters.received_bytes.get(),
            received_messages: counters.received_messages.get(),
            dropped_messages: counters.dropped_messages.get(),
            dropped_bytes: counters.dropped_bytes.get(),
            send_failures: counters.send_failures.get(),
            queued_messages: queued.messages,
            queued_bytes: queued.bytes,
            round_trip: match counters.round_trip.get() {
                0 => None,
                nanos => Some(Duration::from_nanos(nanos)),
            },
            round_trips: counters.round_trips.clone(),
            last_error: standing.last_error.clone(),
            snapshot_sent_bytes: counters.snapshot_sent_bytes.get(),
            snapshot_received_bytes: counters.snapshot_received_bytes.get(),
        }
    }

    /// Waits until the peer is not in the list any more.
    pub(super) async fn gone(&self) {
        // An error means that no sender is left, which cannot be: it is ours.
        let _ = self.target.subscribe().wait_for(|target| target.gone).await;
    }

    /// Waits until the peer is not to be reached at this URL any more.
    pub(super) async fn moved_from(&self, url: &PeerUrl) {
        let moved = |target: &Target| target.gone || !target.urls.contains(url);
        let _ = self.target.subscribe().wait_for(moved).await;
    }
}

/// Pauses between attempts: they double, and jitter keeps members from trying in step.
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) fn new(min: Duration, max: Duration) -> Self {
        Backoff { min, max, next: min }
    }

    /// The next pause: half of it for sure, half by chance.
    pub(super) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (self.next * 2).min(self.max.max(self.min));
        pause / 2 + (pause / 2).mul_f64(f64::from(random() as u32) / f64::from(u32::MAX))
    }

    /// Begins anew.
    pub(super) fn reset(&mut self) {
        self.next = self.min;
    }
}

/// A random number, good enough to tell starts apart and to spread attempts: the standard library keys each hasher
/// differently.
pub(super) fn random() -> u64 {
    RandomState::new().hash_one(Instant::now())
}
