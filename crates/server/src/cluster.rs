//! A member among its peers: what comes in from them, and what members ask each other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use api::codec::{MemberChange, MemberChangeKind};
use api::kv::Member;
use api::limits::ETCD_CLUSTER_VERSION;
use api::{Error, LeaseId, MemberId};
use bytes::Bytes;
use mvcc::Membership;
use parking_lot::Mutex;
use prost::Message as _;
use raft::eraftpb::Message;
use replica::{Input, PeerMessage};
use storage::{Engine, RaftLog};

use crate::calls::{Answer, Ask, DigestAt, Digests, LeaseTime, Members, Request, decode_answer, encode_answer};
use crate::node::{Node, NodeConfig, Shared};
use crate::peer::{
    BoxFuture, CallError, Caller, Handler, Introduction, Peer, PeerUrl, Refusal, RefuseReason, SnapshotFault,
    SnapshotHeader, SnapshotSink, SnapshotSummary, Transport,
};
use crate::snapshot::Building;
use crate::store::NodeStore;

/// Inputs that may wait for the replica before nothing more is read from the peers.
const INPUTS_MAX: usize = 20_000;
/// Bytes of peers' messages that may wait for the replica before nothing more is read from the peers. Beside them there is
/// what every connection had read by then, a few frames, and what the replica has taken and is at work on.
const INPUT_BYTES_MAX: usize = 64 << 20;
/// Most peers that are remembered without being known to be members.
const STRANGERS_MAX: usize = 64;
/// How long no snapshot is taken after one that the disk had no room for: by then it had come over the network and was
/// written for nothing.
const RAN_OUT_PAUSE: Duration = Duration::from_secs(60);
/// How long a whole snapshot may take to be put in use.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a peer must have been connected to count as healthy (etcd's `HealthInterval`).
const HEALTHY_AFTER: Duration = Duration::from_secs(5);
/// How long to wait before a question is asked again.
const ASK_PAUSE: Duration = Duration::from_millis(50);
/// Ticks that the promotion of a learner waits for it to catch up, before it is refused.
const PROMOTE_TICKS_MAX: usize = 3;
/// A learner becomes a voter once it has this share of the leader's log, in percent (etcd).
const LEARNER_READY_PERCENT: u64 = 90;

/// What the transport hands on.
pub(crate) struct PeerHandler<E: Engine> {
    shared: Arc<Shared<E>>,
    store: NodeStore<E>,
    /// Peers that are not among the members that this member knows of, and what they say where they are reached: those
    /// that a joiner was told of, and those that joined while this member was away.
    strangers: Mutex<BTreeMap<MemberId, Vec<String>>>,
    /// Whether a snapshot is coming in: one at a time.
    receiving: Arc<AtomicBool>,
    room: Arc<Mutex<Room>>,
}

/// What is known of the disk's room for snapshots.
#[derive(Default)]
struct Room {
    /// Whether it was said that there is too little, and none was begun since.
    is_told: bool,
    /// When one that had begun ran out of it.
    ran_out: Option<Instant>,
}

impl Room {
    /// Whether a snapshot may begin where `short` says what is missing, if anything is. Says so once if it may not.
    fn begin(&mut self, short: Option<String>, now: Instant) -> Result<(), String> {
        let waits = self
            .ran_out
            .is_some_and(|since| now.duration_since(since) < RAN_OUT_PAUSE);
        let text = match short {
            Some(text) => text,
            None if waits => "the disk had too little room for a snapshot a moment ago".to_owned(),
            None => {
                *self = Room::default();
                return Ok(());
            }
        };
        if !std::mem::replace(&mut self.is_told, true) {
            tracing::warn!(
                reason = text,
                "no snapshot of the database is received until the disk has room for it"
            );
        }
        Err(text)
    }

    /// One that had begun ran out of room.
    fn run_out(&mut self, text: &str, now: Instant) {
        self.ran_out = Some(now);
        self.is_told = true;
        tracing::warn!(
            reason = text,
            retry_s = RAN_OUT_PAUSE.as_secs(),
            "a database snapshot was given up: the disk has no room for it"
        );
    }
}

/// What a member's disks lack for a snapshot of which `received` bytes have come in. The reserve is for the engine in use
/// and the log: a snapshot must not take it, or the member would stop instead of lagging behind.
fn short_of_room(config: &NodeConfig, received: u64) -> Option<String> {
    // An engine that writes all its data at once has written none of it yet.
    let unwritten = if config.flush_writes_all { received } else { 0 };
    let needed = config.disk_reserve_bytes.saturating_add(unwritten);
    short_of([&config.data_dir, &config.log_dir], needed)
}

/// What the disks of these directories lack, where all of them must have `needed` bytes free.
fn short_of(dirs: [&Path; 2], needed: u64) -> Option<String> {
    // A disk that does not say is left to those that write to it.
    let free = dirs
        .into_iter()
        .filter_map(|dir| storage::disk::free_bytes(dir).ok())
        .min()?;
    (free < needed).then(|| {
        format!("the disk has too little room for a snapshot: {free} bytes are free, {needed} are needed (see --disk-reserve-bytes)")
    })
}

/// Whether a caller is answered what it asks. Whoever wants to join may learn who the members are; everything else is
/// between members that know themselves to be in the cluster.
fn may_ask(from: Caller, ask: &Ask, membership: &Membership) -> Result<(), Error> {
    if matches!(ask, Ask::Members(_)) {
        return Ok(());
    }
    if !from.cluster_checked || from.member == 0 || membership.is_removed(from.member) {
        return Err(Error::NotCapable);
    }
    match membership.get(from.member) {
        Some(_) => Ok(()),
        // It may have joined without this member knowing it yet. Then this one lags and does not lead, and what it is
        // asked as a leader is to be asked again: nothing was done.
        None => Err(Error::NotLeader),
    }
}

/// Ends with the snapshot that comes in.
struct Receiving(Arc<AtomicBool>);

impl Drop for Receiving {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl<E: Engine> PeerHandler<E> {
    pub(crate) fn new(store: NodeStore<E>, known: &[Member]) -> Self {
        let known = known.iter().map(|member| (member.id, member.peer_urls.clone()));
        PeerHandler {
            shared: store.shared().clone(),
            store,
            strangers: Mutex::new(known.collect()),
            receiving: Arc::default(),
            room: Arc::default(),
        }
    }

    /// Everyone that this member should be connected to.
    pub(crate) fn peers(&self) -> Vec<Peer> {
        let membership = self.shared.membership.borrow().clone();
        let mut urls: BTreeMap<MemberId, Vec<String>> = self.strangers.lock().clone();
        for member in &membership.members {
            urls.insert(member.id, member.peer_urls.clone());
        }
        urls.retain(|&id, _| id != self.shared.member_id() && !membership.is_removed(id));
        let parse = |urls: Vec<String>| urls.iter().filter_map(|url| url.parse::<PeerUrl>().ok()).collect();
        urls.into_iter()
            .map(|(id, urls)| Peer { id, urls: parse(urls) })
            .collect()
    }
}

impl<E: Engine> Handler for PeerHandler<E> {
    fn admit(&self, who: &Introduction) -> Result<(), Refusal> {
        let membership = self.shared.membership.borrow().clone();
        if membership.is_removed(who.from) {
            let text = "the member has been permanently removed from the cluster";
            return Err(Refusal::new(RefuseReason::Removed, text));
        }
        // One that is not known may have joined while this member was away: it knows the cluster's id, and what it
        // sends is believed by Raft alone.
        let is_stranger = who.from != 0 && membership.get(who.from).is_none();
        if is_stranger && !who.peer_urls.is_empty() {
            let known = {
                let mut strangers = self.strangers.lock();
                // Those that are known by now one way or the other.
                strangers.retain(|&id, _| membership.get(id).is_none() && !membership.is_removed(id));
                if strangers.len() >= STRANGERS_MAX && !strangers.contains_key(&who.from) {
                    let text = "too many members that this one does not know";
                    return Err(Refusal::new(RefuseReason::Stranger, text));
                }
                strangers.insert(who.from, who.peer_urls.clone())
            };
            if known.as_ref() != Some(&who.peer_urls)
                && let Some((_, transport)) = self.shared.transport.get()
            {
                transport.set_peers(self.peers());
            }
        }
        Ok(())
    }

    fn receive(&self, from: MemberId, messages: Vec<Bytes>) -> BoxFuture<'_, ()> {
        let decoded = messages.into_iter().filter_map(|message| {
            let bytes = message.len();
            match PeerMessage::decode(message) {
                Ok(message) => Some((Input::Receive(from, message), bytes)),
                Err(error) => {
                    tracing::warn!(from = format!("{from:x}"), %error, "a peer's message was dropped");
                    None
                }
            }
        });
        let decoded: Vec<_> = decoded.collect();
        self.shared.work.inputs(decoded);
        Box::pin(async {
            let is_full = || {
                let (inputs, bytes) = self.shared.work.inputs_waiting();
                inputs > INPUTS_MAX || bytes > INPUT_BYTES_MAX
            };
            while is_full() && !self.shared.stopping() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
    }

    fn call(&self, from: Caller, request: Bytes) -> BoxFuture<'_, Bytes> {
        Box::pin(async move {
            let asked = Request::decode(request).ok().and_then(|request| request.ask);
            let answer = match asked {
                Some(ask) => {
                    let membership = self.shared.membership.borrow().clone();
                    match may_ask(from, &ask, &membership) {
                        Ok(()) => self.store.answer(ask).await,
                        Err(error) => {
                            tracing::debug!(from = format!("{:x}", from.member), %error, "a peer's question was refused");
                            Err(error)
                        }
                    }
                }
                // What a later release asks.
                None => Err(Error::NotCapable),
            };
            encode_answer(answer)
        })
    }

    fn open_snapshot(&self, from: MemberId, header: &SnapshotHeader) -> Result<Box<dyn SnapshotSink>, Refusal> {
        let message = match PeerMessage::decode(header.meta.clone()) {
            Ok(PeerMessage::Raft(message)) => message,
            _ => {
                return Err(Refusal::new(
                    RefuseReason::Incompatible,
                    "the snapshot has no Raft message",
                ));
            }
        };
        if self.receiving.swap(true, Ordering::AcqRel) {
            return Err(Refusal::new(RefuseReason::Busy, "another snapshot is coming in"));
        }
        let receiving = Receiving(self.receiving.clone());
        // One whose sender gave up, because this member's disk takes so long: it must not be exchanged for another one
        // behind Raft's back.
        if self.shared.staged.lock().is_some() {
            return Err(Refusal::new(RefuseReason::Busy, "another snapshot is being put in use"));
        }
        // As busy: the sender tries again, less and less often, and need not begin anew for it.
        self.room
            .lock()
            .begin(short_of_room(&self.shared.config, 0), Instant::now())
            .map_err(|text| Refusal::new(RefuseReason::Busy, text))?;
        let failed = |error: String| Refusal::new(RefuseReason::Failed, error);
        let (engine, dir) = self.shared.place.stage().map_err(failed)?;
        let metadata = message.get_snapshot().get_metadata();
        tracing::info!(
            from = format!("{from:x}"),
            snapshot_index = metadata.index,
            "receiving database snapshot"
        );
        Ok(Box::new(Sink {
            shared: self.shared.clone(),
            building: Some(Building::new(engine, dir.clone())),
            dir,
            message,
            begun: Instant::now(),
            received: 0,
            room: self.room.clone(),
            _receiving: receiving,
        }))
    }

    fn unreachable(&self, to: MemberId) {
        self.shared.work.input(Input::Unreachable(to));
    }

    fn refused(&self, peer: MemberId, refusal: &Refusal) {
        if refusal.reason == RefuseReason::Removed {
            tracing::warn!(peer = format!("{peer:x}"), "a peer says that this member was removed");
            self.shared.note_removed();
        }
    }
}

/// Builds an engine from a peer's snapshot.
struct Sink<E: Engine> {
    shared: Arc<Shared<E>>,
    /// `None` once it is finished.
    building: Option<Building<E>>,
    dir: PathBuf,
    message: Box<Message>,
    begun: Instant,
    /// Bytes of chunks.
    received: u64,
    room: Arc<Mutex<Room>>,
    _receiving: Receiving,
}

impl<E: Engine> SnapshotSink for Sink<E> {
    fn resume_token(&self) -> Bytes {
        self.building.as_ref().map(Building::resume_token).unwrap_or_default()
    }

    fn write(&mut self, chunk: Bytes) -> Result<(), SnapshotFault> {
        self.received += chunk.len() as u64;
        // Asked for each chunk: that costs microseconds, and the disk fills up from elsewhere as well. What was built is
        // removed when this is dropped.
        if let Some(text) = short_of_room(&self.shared.config, self.received) {
            self.room.lock().run_out(&text, Instant::now());
            return Err(text.into());
        }
        self.building.as_mut().expect("it is not finished").write(chunk)
    }

    fn finish(mut self: Box<Self>, _: &SnapshotSummary) -> Result<(), SnapshotFault> {
        let metadata = self.message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let building = self.building.take().expect("it is not finished");
        let whole = Instant::now();
        let staged = match building.finish(index, term) {
            Ok(staged) => staged,
            Err(fault) => {
                self.shared.place.remove(&self.dir);
                return Err(fault);
            }
        };
        self.shared
            .metrics
            .snapshot_received(self.begun.elapsed(), whole.elapsed());
        let (waiter, done) = sync_channel(1);
        *self.shared.staged.lock() = Some((staged, waiter));
        self.shared.work.input(Input::ReceiveSnapshot(self.message.clone()));
        let begun = Instant::now();
        while begun.elapsed() < INSTALL_TIMEOUT && !self.shared.stopping() {
            match done.recv_timeout(Duration::from_millis(100)) {
                // One that is not needed any more did what it could.
                Ok(_) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err("the snapshot was not installed".into()),
            }
        }
        Err("the snapshot was not installed in time".into())
    }
}

impl<E: Engine> Drop for Sink<E> {
    fn drop(&mut self) {
        if let Some(building) = self.building.take() {
            drop(building);
            self.shared.place.remove(&self.dir);
        }
    }
}

impl<E: Engine, L: RaftLog> Node<E, L> {
    /// Connects this member with its peers. `known` are the members that it was told of before its own log says so.
    pub(crate) fn connect(
        &self,
        runtime: &tokio::runtime::Handle,
        known: &[Member],
        start: impl FnOnce(Arc<dyn Handler>) -> Transport,
    ) {
        let shared = self.shared().clone();
        let handler = Arc::new(PeerHandler::new(self.store(), known));
        let transport = start(handler.clone());
        transport.set_peers(handler.peers());
        assert!(
            shared.transport.set((runtime.clone(), transport)).is_ok(),
            "a node is connected once"
        );
        let mut changed = shared.membership.subscribe();
        let follow = shared.clone();
        runtime.spawn(async move {
            loop {
                if let Some((_, transport)) = follow.transport.get() {
                    transport.set_peers(handler.peers());
                }
                if changed.changed().await.is_err() {
                    return;
                }
            }
        });
        runtime.spawn(crate::divergence::watch(shared));
    }
}

impl<E: Engine> NodeStore<E> {
    /// Asks the leader, whoever that is in the end, and as long as a request may take. What is asked must do no harm if
    /// it is done twice, unless it certainly did not arrive.
    pub(crate) async fn ask_leader(&self, ask: Ask) -> Result<Answer, Error> {
        let shared = self.shared();
        let deadline = Instant::now() + shared.config.limits.request_timeout;
        let repeatable = !matches!(ask, Ask::ChangeMembers(_));
        loop {
            let leader = shared.leader.load(Ordering::Acquire);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(if leader == 0 {
                    Error::TimeoutLeaderFail
                } else {
                    Error::Timeout
                });
            }
            let answer = if leader == shared.member_id() {
                // A member that leads but has not begun yet may take its time.
                tokio::time::timeout(left, Box::pin(self.answer(ask.clone())))
                    .await
                    .unwrap_or(Err(Error::Timeout))
            } else if let Some((_, transport)) = shared.transport.get().filter(|_| leader != 0) {
                match transport.call(leader, ask.clone().into_bytes(), left).await {
                    Ok(answer) => decode_answer(answer),
                    Err(CallError::Unknown(_)) if !repeatable => Err(Error::Timeout),
                    Err(_) => Err(Error::NotLeader),
                }
            } else {
                Err(Error::NotLeader)
            };
            match answer {
                // It leads no more, or not yet, or cannot be reached: there will be another one.
                Err(Error::NotLeader | Error::NoLeader) => tokio::time::sleep(ASK_PAUSE.min(left)).await,
                answer => return answer,
            }
        }
    }

    /// Answers a question of a member.
    pub(crate) async fn answer(&self, ask: Ask) -> Result<Answer, Error> {
        let shared = self.shared();
        match ask {
            Ask::Members(_) => Ok(Answer::Members(Members {
                cluster_id: shared.config.cluster_id,
                members: shared.reader.membership().members.clone(),
                cluster_version: ETCD_CLUSTER_VERSION.to_owned(),
            })),
            Ask::KeepAlive(lease) => Ok(Answer::Lease(self.keep_alive_here(lease.id).await?)),
            Ask::TimeToLive(lease) => {
                self.check_leading()?;
                self.linearize().await?;
                let now_ms = shared.now_ms();
                let left = {
                    let lessor = shared.lessor.lock();
                    if !lessor.leads() {
                        return Err(Error::NotLeader);
                    }
                    lessor.time_to_live(lease.id, now_ms)
                };
                let (granted, left) = left.unwrap_or((0, -1));
                Ok(Answer::Lease(LeaseTime { granted, left }))
            }
            Ask::ChangeMembers(change) => {
                let promotes = change.kind() == MemberChangeKind::Promote;
                let membership = self.change_members_here(change).await?;
                if promotes {
                    shared.metrics.learners_promoted.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Answer::Members(Members {
                    cluster_id: shared.config.cluster_id,
                    members: membership.members.clone(),
                    cluster_version: ETCD_CLUSTER_VERSION.to_owned(),
                }))
            }
            Ask::Digests(_) => {
                let digests = shared.digests.lock();
                let digests = digests.iter().map(|digest| DigestAt {
                    index: digest.index,
                    revision: digest.revision,
                    digest: digest.digest,
                });
                Ok(Answer::Digests(Digests {
                    digests: digests.collect(),
                }))
            }
        }
    }

    fn check_leading(&self) -> Result<(), Error> {
        if self.shared().leader.load(Ordering::Acquire) == self.shared().member_id() {
            Ok(())
        } else {
            Err(Error::NotLeader)
        }
    }

    /// Lets a lease live on, as the leader. Leadership is confirmed after the time was given and before it is promised:
    /// a leader that was replaced unnoticed must promise nothing, since the new one counts from its own beginning.
    async fn keep_alive_here(&self, id: LeaseId) -> Result<LeaseTime, Error> {
        let shared = self.shared();
        let before = shared.standing();
        if !before.has_begun {
            return Err(Error::NotLeader);
        }
        let mut looks = 0;
        let granted = loop {
            let found = loop {
                {
                    let mut lessor = shared.lessor.lock();
                    let now_ms = shared.now_ms();
                    if !lessor.postpone_checkpoint(id, now_ms) {
                        break lessor.keep_alive(id, now_ms);
                    }
                }
                self.take_checkpoint_back(id).await?;
            };
            self.linearize().await?;
            looks += 1;
            // A lease may have been granted through a member that applied it, and acknowledged it, before this one did. By
            // now it is applied here, if it is there.
            if found.is_some() || looks == 2 {
                break found;
            }
        };
        let after = shared.standing();
        if !after.has_begun || after.term != before.term {
            return Err(Error::NotLeader);
        }
        Ok(match granted {
            Some(granted) => LeaseTime { granted, left: granted },
            None => LeaseTime { granted: 0, left: -1 },
        })
    }

    /// Changes the members, as the leader.
    async fn change_members_here(&self, mut change: MemberChange) -> Result<Arc<Membership>, Error> {
        let shared = self.shared();
        self.check_leading()?;
        self.linearize().await?;
        let membership = shared.reader.membership();
        // As in etcd, whether the cluster can take a change comes before whether the change makes sense.
        self.may_change(&change)?;
        membership.check(&change)?;
        let is_learner = change.member.as_ref().is_some_and(|member| member.is_learner);
        match change.kind() {
            MemberChangeKind::Add => {
                if is_learner && membership.learners().count() >= shared.config.learners_max {
                    return Err(Error::TooManyLearners);
                }
            }
            MemberChangeKind::Promote => {
                // What is known of the learner's progress may be a tick old, and it may have begun just now.
                let mut judged = self.may_promote(&membership, change.member_id());
                for _ in 0..PROMOTE_TICKS_MAX {
                    if judged != Err(Error::LearnerNotReady) {
                        break;
                    }
                    tokio::time::sleep(shared.config.tick).await;
                    judged = self.may_promote(&membership, change.member_id());
                }
                judged?;
            }
            MemberChangeKind::Remove => {
                if change.member_id() == shared.member_id() && membership.voters().count() > 1 {
                    // A leader that removes itself and stops may leave the others with an entry that they do not know to
                    // be committed. So another one leads first, and removes it.
                    shared.work.input(Input::Transfer(0));
                    return Err(Error::NotLeader);
                }
            }
        }
        if change.kind() != MemberChangeKind::Add {
            let id = change.member_id();
            change.member = Some(Member {
                id,
                ..Default::default()
            });
        }
        self.propose_member_change(change).await
    }

    /// Whether this member sees a cluster that can bear the change: asked of the member that a client asks, so that the
    /// answer does not wait for a quorum that may be gone, and again of the leader.
    pub(crate) fn may_change(&self, change: &MemberChange) -> Result<(), Error> {
        let membership = self.shared().reader.membership();
        match change.kind() {
            MemberChangeKind::Add => {
                let is_learner = change.member.as_ref().is_some_and(|member| member.is_learner);
                self.may_add(&membership, is_learner)
            }
            MemberChangeKind::Remove if membership.get(change.member_id()).is_some() => {
                self.may_remove(&membership, change.member_id())
            }
            MemberChangeKind::Remove | MemberChangeKind::Promote => Ok(()),
        }
    }

    /// Whether a voter is connected, and was for a while.
    fn is_healthy(&self, id: MemberId) -> bool {
        if id == self.shared().member_id() {
            return true;
        }
        let active = self
            .shared()
            .transport
            .get()
            .and_then(|(_, transport)| transport.active(id));
        active.is_some_and(|since| since.elapsed() >= HEALTHY_AFTER)
    }

    /// As etcd's `mayAddMember`.
    fn may_add(&self, membership: &Membership, is_learner: bool) -> Result<(), Error> {
        if !self.shared().config.strict_reconfig_check {
            return Ok(());
        }
        let voters: Vec<_> = membership.members.iter().filter(|member| !member.is_learner).collect();
        let started = voters.iter().filter(|member| !member.name.is_empty()).count();
        let after = voters.len() + 1;
        // A cluster of one may always grow to two.
        let from_one_to_two = started == 1 && after == 2;
        if !is_learner && !from_one_to_two && started < after / 2 + 1 {
            return Err(Error::NotEnoughStarted);
        }
        // The new member counts as down until it has started.
        let healthy = voters.iter().filter(|member| self.is_healthy(member.id)).count();
        if voters.len() > 1 && healthy < after / 2 + 1 {
            return Err(Error::Unhealthy);
        }
        Ok(())
    }

    /// As etcd's `mayRemoveMember`.
    fn may_remove(&self, membership: &Membership, id: MemberId) -> Result<(), Error> {
        let shared = self.shared();
        let is_learner = membership.get(id).is_some_and(|member| member.is_learner);
        if !shared.config.strict_reconfig_check || is_learner {
            return Ok(());
        }
        let voters: Vec<_> = membership.members.iter().filter(|member| !member.is_learner).collect();
        let others = voters.iter().filter(|member| member.id != id);
        let started = others.clone().filter(|member| !member.name.is_empty()).count();
        if started < others.count() / 2 + 1 {
            return Err(Error::NotEnoughStarted);
        }
        // One that is down is no part of the quorum that there is.
        let active = shared.transport.get().and_then(|(_, transport)| transport.active(id));
        if id != shared.member_id() && active.is_none() {
            return Ok(());
        }
        let healthy = voters.iter().filter(|member| self.is_healthy(member.id)).count();
        if healthy.saturating_sub(1) < 1 + (voters.len() - 1) / 2 {
            // Without the member, those that are healthy would be no quorum of those that were.
            return Err(Error::Unhealthy);
        }
        Ok(())
    }

    /// As etcd's `mayPromoteMember` and `isLearnerReady`.
    fn may_promote(&self, membership: &Membership, id: MemberId) -> Result<(), Error> {
        let shared = self.shared();
        let progress = shared.progress.lock().clone();
        let matched = |id| {
            progress
                .iter()
                .find(|peer| peer.id == id)
                .map_or(0, |peer| peer.matched)
        };
        if matched(id) * 100 < matched(shared.member_id()) * LEARNER_READY_PERCENT || matched(id) == 0 {
            return Err(Error::LearnerNotReady);
        }
        if shared.config.strict_reconfig_check {
            let voters: Vec<_> = membership.members.iter().filter(|member| !member.is_learner).collect();
            let started = 1 + voters.iter().filter(|member| !member.name.is_empty()).count();
            if started < voters.len().div_ceil(2) + 1 {
                return Err(Error::NotEnoughStarted);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calls::{Empty, Lease};

    #[test]
    fn only_members_are_answered_more_than_who_the_members_are() {
        let membership = Membership {
            members: vec![Member {
                id: 1,
                ..Default::default()
            }],
            removed: vec![3],
        };
        let asks = [
            Ask::KeepAlive(Lease { id: 5 }),
            Ask::TimeToLive(Lease { id: 5 }),
            Ask::ChangeMembers(MemberChange::default()),
            Ask::Digests(Empty {}),
        ];
        let cases = [
            (1, true, Ok(())),
            // Without the cluster's id it is nobody, whatever it says.
            (1, false, Err(Error::NotCapable)),
            (0, false, Err(Error::NotCapable)),
            (0, true, Err(Error::NotCapable)),
            (3, true, Err(Error::NotCapable)),
            // Not known yet.
            (2, true, Err(Error::NotLeader)),
            (2, false, Err(Error::NotCapable)),
        ];
        for (member, cluster_checked, expected) in cases {
            let from = Caller {
                member,
                cluster_checked,
            };
            for ask in &asks {
                assert_eq!(may_ask(from, ask, &membership), expected, "{from:?} {ask:?}");
            }
            assert_eq!(may_ask(from, &Ask::Members(Empty {}), &membership), Ok(()), "{from:?}");
        }
    }

    #[test]
    fn what_must_stay_free_is_looked_for_on_each_disk() {
        let root = tempfile::tempdir().unwrap();
        let (there, nowhere) = (root.path(), root.path().join("nowhere"));
        let much = storage::disk::free_bytes(there).unwrap().saturating_mul(2);
        assert_eq!(short_of([there, there], 1), None);
        assert!(short_of([there, there], much).is_some());
        // The one that is unknown does not count.
        assert!(short_of([there, &nowhere], much).is_some());
        assert!(short_of([&nowhere, there], much).is_some());
        assert_eq!(short_of([&nowhere, &nowhere], much), None);
    }

    #[test]
    fn after_one_that_had_no_room_the_next_snapshot_waits() {
        let (mut room, begun) = (Room::default(), Instant::now());
        assert_eq!(room.begin(Some("short".to_owned()), begun), Err("short".to_owned()));
        assert!(room.is_told);
        assert_eq!(room.begin(None, begun), Ok(()));
        assert!(!room.is_told);
        room.run_out("short", begun);
        assert!(room.begin(None, begun + RAN_OUT_PAUSE / 2).is_err());
        assert_eq!(room.begin(None, begun + RAN_OUT_PAUSE), Ok(()));
        assert_eq!(room.begin(None, begun + RAN_OUT_PAUSE), Ok(()));
    }
}
