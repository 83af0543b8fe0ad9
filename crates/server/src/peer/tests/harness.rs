//! Members of a cluster whose handler notes what it is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::peer::{
    BoxFuture, Caller, Handler, Identity, Introduction, Listener, MemberId, Peer, PeerUrl, Purpose, Refusal,
    RefuseReason, Settings, SnapshotHeader, SnapshotSink, SocketOptions, Tls, Transport,
};

pub(super) const CLUSTER: u64 = 0xc1;

type MakeSink = Box<dyn Fn(&SnapshotHeader) -> Result<Box<dyn SnapshotSink>, Refusal> + Send + Sync>;

/// A node that only watches.
pub(super) struct Watcher {
    pub(super) received: Mutex<Vec<(MemberId, Bytes)>>,
    pub(super) deliveries: AtomicUsize,
    /// `receive` waits while it is false.
    pub(super) takes: watch::Sender<bool>,
    pub(super) unreachable: AtomicUsize,
    pub(super) refusals: Mutex<Vec<(MemberId, Refusal)>>,
    pub(super) removed: Mutex<Vec<MemberId>>,
    pub(super) callers: Mutex<Vec<Caller>>,
    /// Calls that wait for ever, and that nobody has given up yet.
    pub(super) hanging: AtomicUsize,
    pub(super) make_sink: Mutex<Option<MakeSink>>,
}

impl Default for Watcher {
    fn default() -> Self {
        Watcher {
            received: Mutex::default(),
            deliveries: AtomicUsize::new(0),
            takes: watch::Sender::new(true),
            unreachable: AtomicUsize::new(0),
            refusals: Mutex::default(),
            removed: Mutex::default(),
            callers: Mutex::default(),
            hanging: AtomicUsize::new(0),
            make_sink: Mutex::default(),
        }
    }
}

/// Counts for as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Handler for Watcher {
    fn admit(&self, who: &Introduction) -> Result<(), Refusal> {
        if self.removed.lock().contains(&who.from) {
            return Err(Refusal::new(RefuseReason::Removed, "it was removed"));
        }
        if who.from > 100 {
            return Err(Refusal::new(RefuseReason::Stranger, "never heard of it"));
        }
        assert!(who.from != 0 || who.purpose == Purpose::Call);
        Ok(())
    }

    fn receive(&self, from: MemberId, messages: Vec<Bytes>) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let _ = self.takes.subscribe().wait_for(|takes| *takes).await;
            self.deliveries.fetch_add(1, Ordering::SeqCst);
            self.received
                .lock()
                .extend(messages.into_iter().map(|message| (from, message)));
        })
    }

    /// The first byte says how to answer.
    fn call(&self, from: Caller, request: Bytes) -> BoxFuture<'_, Bytes> {
        Box::pin(async move {
            self.callers.lock().push(from);
            match request.first() {
                Some(b'e') => request,
                Some(b'l') => Bytes::from(vec![0; 32 << 20]),
                // Slow: so many seconds.
                Some(b's') => {
                    tokio::time::sleep(Duration::from_secs(request[1].into())).await;
                    request
                }
                Some(b'p') => panic!("as asked"),
                _ => {
                    let _hangs = Counted::new(&self.hanging);
                    std::future::pending().await
                }
            }
        })
    }

    fn open_snapshot(&self, _from: MemberId, header: &SnapshotHeader) -> Result<Box<dyn SnapshotSink>, Refusal> {
        match &*self.make_sink.lock() {
            Some(make) => make(header),
            None => Err(Refusal::new(RefuseReason::Busy, "no snapshots here")),
        }
    }

    fn unreachable(&self, _to: MemberId) {
        self.unreachable.fetch_add(1, Ordering::SeqCst);
    }

    fn refused(&self, peer: MemberId, refusal: &Refusal) {
        self.refusals.lock().push((peer, refusal.clone()));
    }
}

/// A running member.
pub(super) struct Member {
    pub(super) id: MemberId,
    pub(super) transport: Transport,
    pub(super) watcher: Arc<Watcher>,
    pub(super) url: PeerUrl,
}

/// Quick to act and slow to give up, so that no pause of a busy machine looks like a failure. What a test wants to see
/// given up has a shorter limit there, and there only.
pub(super) fn quick() -> Settings {
    Settings {
        connect_timeout: Duration::from_secs(30),
        handshake_timeout: Duration::from_secs(30),
        raft_write_timeout: Duration::from_secs(60),
        raft_read_timeout: Duration::from_secs(60),
        keepalive_interval: Duration::from_millis(100),
        backoff_max: Duration::from_millis(200),
        snapshot_stall_timeout: Duration::from_secs(60),
        ..Settings::default()
    }
}

pub(super) fn identity(id: MemberId) -> Identity {
    Identity {
        cluster_id: CLUSTER,
        member_id: id,
        version: "test".to_owned(),
        peer_urls: vec![format!("http://member-{id}:1")],
    }
}

pub(super) fn url(text: &str) -> PeerUrl {
    text.parse().expect("a URL")
}

pub(super) async fn member(id: MemberId) -> Member {
    member_with(identity(id), quick(), Tls::default(), "http://127.0.0.1:0").await
}

pub(super) async fn member_with(identity: Identity, settings: Settings, tls: Tls, at: &str) -> Member {
    let listener = Listener::bind(&url(at), &SocketOptions::default())
        .await
        .expect("a port");
    let at = url(&listener.local_url());
    let watcher = Arc::new(Watcher::default());
    let id = identity.member_id;
    let transport = Transport::start(
        Handle::current(),
        identity,
        settings,
        tls,
        vec![listener],
        watcher.clone(),
    );
    Member {
        id,
        transport,
        watcher,
        url: at,
    }
}

impl Member {
    pub(super) fn knows(&self, peers: &[(MemberId, &PeerUrl)]) {
        let peers = peers.iter().map(|(id, url)| Peer {
            id: *id,
            urls: vec![(*url).clone()],
        });
        self.transport.set_peers(peers.collect());
    }

    pub(super) async fn connected(&self, to: MemberId) {
        until("connected", || self.transport.active(to).is_some()).await;
    }

    pub(super) fn received(&self) -> Vec<Bytes> {
        let received = self.watcher.received.lock();
        received.iter().map(|(_, message)| message.clone()).collect()
    }

    pub(super) fn received_count(&self) -> usize {
        self.watcher.received.lock().len()
    }

    pub(super) fn unreachable(&self) -> usize {
        self.watcher.unreachable.load(Ordering::SeqCst)
    }

    pub(super) fn hanging(&self) -> usize {
        self.watcher.hanging.load(Ordering::SeqCst)
    }
}

/// Long enough for anything that is not stuck, on any machine.
pub(super) const LONG: Duration = Duration::from_secs(60);

/// Waits until something holds.
pub(super) async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LONG, "not {what} in time");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
