//! Snapshots, whole and in spite of everything.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use parking_lot::Mutex;

use super::harness::{LONG, Member, identity, member, member_with, quick, until};
use super::proxy::{Proxy, Way};
use crate::peer::{
    Refusal, RefuseReason, Settings, SnapshotError, SnapshotFault, SnapshotHeader, SnapshotSink, SnapshotSource,
    SnapshotSummary, Tls,
};

const CHUNK: usize = 256 << 10;
/// More chunks than any test waits for.
const MANY: u64 = 1 << 40;

/// Chunks of bytes that follow from their place.
struct Numbers {
    chunks: u64,
    next: u64,
    fails_at: u64,
    /// What must be on the shelf before it fails: what is under way then is lost.
    fails_after: Option<(Arc<Shelf>, usize)>,
    seeks: Arc<AtomicUsize>,
    dropped: Arc<AtomicUsize>,
}

fn numbers(chunks: u64) -> Numbers {
    Numbers {
        chunks,
        next: u64::MAX,
        fails_at: u64::MAX,
        fails_after: None,
        seeks: Arc::default(),
        dropped: Arc::default(),
    }
}

fn chunk(number: u64) -> Bytes {
    let mut bytes = vec![number as u8; CHUNK];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[CHUNK / 2] = (number >> 8) as u8;
    Bytes::from(bytes)
}

impl SnapshotSource for Numbers {
    fn seek(&mut self, mut resume: &[u8]) -> Result<(), SnapshotFault> {
        self.seeks.fetch_add(1, Ordering::SeqCst);
        self.next = if resume.is_empty() { 0 } else { resume.get_u64_le() };
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Bytes>, SnapshotFault> {
        if self.next == self.fails_at {
            let begun = Instant::now();
            while let Some((shelf, written)) = &self.fails_after
                && shelf.written.load(Ordering::SeqCst) < *written
                && begun.elapsed() < LONG
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            return Err("the disk is gone".into());
        }
        if self.next == self.chunks {
            return Ok(None);
        }
        self.next += 1;
        Ok(Some(chunk(self.next - 1)))
    }
}

impl Drop for Numbers {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

/// What became of sinks.
#[derive(Default)]
struct Shelf {
    opened: AtomicUsize,
    written: AtomicUsize,
    finishing: AtomicUsize,
    finished: Mutex<Vec<(Bytes, u64, SnapshotSummary)>>,
    dropped: AtomicUsize,
    fails_at: Mutex<Option<u64>>,
    fails_to_finish: Mutex<bool>,
    pause: Mutex<Duration>,
    pause_finish: Mutex<Duration>,
}

struct Sink {
    shelf: Arc<Shelf>,
    id: Bytes,
    next: u64,
}

impl SnapshotSink for Sink {
    fn resume_token(&self) -> Bytes {
        if self.next == 0 {
            Bytes::new()
        } else {
            Bytes::copy_from_slice(&self.next.to_le_bytes())
        }
    }

    fn write(&mut self, bytes: Bytes) -> Result<(), SnapshotFault> {
        if *self.shelf.fails_at.lock() == Some(self.next) {
            return Err("no space left".into());
        }
        assert!(bytes == chunk(self.next), "chunk {}", self.next);
        self.next += 1;
        self.shelf.written.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(*self.shelf.pause.lock());
        Ok(())
    }

    fn finish(self: Box<Self>, summary: &SnapshotSummary) -> Result<(), SnapshotFault> {
        self.shelf.finishing.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(*self.shelf.pause_finish.lock());
        if *self.shelf.fails_to_finish.lock() {
            return Err("the checksum of a file is wrong".into());
        }
        self.shelf.finished.lock().push((self.id.clone(), self.next, *summary));
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shelf.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

fn shelf(of: &Member) -> Arc<Shelf> {
    let shelf = Arc::new(Shelf::default());
    let by_sinks = shelf.clone();
    *of.watcher.make_sink.lock() = Some(Box::new(move |header| {
        assert_eq!(header.meta, "what it is");
        let opened = by_sinks.opened.fetch_add(1, Ordering::SeqCst) + 1;
        // Only one at a time.
        assert_eq!(by_sinks.dropped.load(Ordering::SeqCst), opened - 1);
        Ok(Box::new(Sink {
            shelf: by_sinks.clone(),
            id: header.id.clone(),
            next: 0,
        }))
    }));
    shelf
}

fn header(id: &'static str) -> SnapshotHeader {
    SnapshotHeader {
        id: Bytes::from_static(id.as_bytes()),
        meta: Bytes::from_static(b"what it is"),
    }
}

async fn pair(settings: Settings) -> (Member, Member, Proxy, Arc<Shelf>) {
    let one = member_with(identity(1), settings.clone(), Tls::default(), "http://127.0.0.1:0").await;
    let two = member_with(identity(2), settings, Tls::default(), "http://127.0.0.1:0").await;
    let proxy = Proxy::to(&two.url).await;
    one.knows(&[(2, &proxy.url)]);
    let shelf = shelf(&two);
    (one, two, proxy, shelf)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_arrives() {
    let (one, _two, _proxy, shelf) = pair(quick()).await;
    let source = numbers(40);
    let dropped = source.dropped.clone();
    let summary = one
        .transport
        .send_snapshot(2, header("a"), Box::new(source))
        .await
        .expect("sent");
    let expected = SnapshotSummary {
        chunks: 40,
        bytes: 40 * CHUNK as u64,
        resumes: 0,
    };
    assert_eq!(summary, expected);
    assert_eq!(*shelf.finished.lock(), [(Bytes::from_static(b"a"), 40, expected)]);
    until("dropped", || dropped.load(Ordering::SeqCst) == 1).await;
    // An empty one is one, too.
    let summary = one
        .transport
        .send_snapshot(2, header("b"), Box::new(numbers(0)))
        .await
        .expect("sent");
    assert_eq!(summary, SnapshotSummary::default());
    assert_eq!(shelf.finished.lock().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_arrives_through_a_connection_that_is_cut_again_and_again() {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let (one, _two, proxy, shelf) = pair(quick()).await;
    proxy.cut_after(random.u64(1..2 << 20));
    let source = numbers(200);
    let seeks = source.seeks.clone();
    let mut sending = one.transport.send_snapshot(2, header("a"), Box::new(source));
    let summary = loop {
        tokio::select! {
            outcome = &mut sending => break outcome.expect("sent"),
            () = tokio::time::sleep(Duration::from_millis(random.u64(1..100))) => {
                if random.u8(..) < 30 {
                    proxy.cut();
                }
                proxy.cut_after(random.u64(1..8 << 20));
            }
        }
    };
    let finished = shelf.finished.lock().clone();
    assert_eq!(finished.len(), 1);
    assert_eq!(finished[0].1, 200);
    assert_eq!(finished[0].2.chunks, 200, "each chunk is written once, seed {seed}");
    assert_eq!(finished[0].2.bytes, 200 * CHUNK as u64);
    assert_eq!(
        shelf.opened.load(Ordering::SeqCst),
        1,
        "it went on where it was, seed {seed}"
    );
    assert!(summary.resumes > 3 && seeks.load(Ordering::SeqCst) > 3, "{summary:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_of_either_side_are_told_and_final() {
    let (one, _two, _proxy, shelf) = pair(quick()).await;
    *shelf.fails_at.lock() = Some(5);
    let failed = one.transport.send_snapshot(2, header("a"), Box::new(numbers(40))).await;
    assert_eq!(failed, Err(SnapshotError::Sink("no space left".to_owned())));
    *shelf.fails_at.lock() = None;
    *shelf.fails_to_finish.lock() = true;
    let failed = one.transport.send_snapshot(2, header("a"), Box::new(numbers(40))).await;
    assert_eq!(
        failed,
        Err(SnapshotError::Sink("the checksum of a file is wrong".to_owned()))
    );
    *shelf.fails_to_finish.lock() = false;
    let mut source = numbers(40);
    source.fails_at = 20;
    source.fails_after = Some((shelf.clone(), shelf.written.load(Ordering::SeqCst) + 20));
    let failed = one.transport.send_snapshot(2, header("a"), Box::new(source)).await;
    assert_eq!(failed, Err(SnapshotError::Source("the disk is gone".to_owned())));
    // The same one may be tried again, and goes on.
    let opened = shelf.opened.load(Ordering::SeqCst);
    let sent = one.transport.send_snapshot(2, header("a"), Box::new(numbers(40))).await;
    assert_eq!(sent.expect("sent").chunks, 20);
    assert_eq!(shelf.opened.load(Ordering::SeqCst), opened);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_snapshot_is_final() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(2, &two.url)]);
    let refusal = Refusal::new(RefuseReason::Other(77), "not from you");
    let told = refusal.clone();
    *two.watcher.make_sink.lock() = Some(Box::new(move |_| Err(told.clone())));
    let refused = one.transport.send_snapshot(2, header("a"), Box::new(numbers(4))).await;
    assert_eq!(refused, Err(SnapshotError::Refused(refusal)));
    let stranger = one.transport.send_snapshot(3, header("a"), Box::new(numbers(4))).await;
    assert_eq!(stranger, Err(SnapshotError::NotPeer));
    two.watcher.removed.lock().push(1);
    let removed = one.transport.send_snapshot(2, header("a"), Box::new(numbers(4))).await;
    assert!(matches!(&removed, Err(SnapshotError::Refused(refusal)) if refusal.reason == RefuseReason::Removed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_at_a_time_and_the_newer_takes_the_place() {
    let (one, two, _proxy, shelf) = pair(quick()).await;
    let three = member(3).await;
    three.knows(&[(2, &two.url)]);
    *shelf.pause.lock() = Duration::from_millis(20);
    let first = one.transport.send_snapshot(2, header("a"), Box::new(numbers(MANY)));
    until("begun", || shelf.written.load(Ordering::SeqCst) > 3).await;
    let second = one.transport.send_snapshot(2, header("b"), Box::new(numbers(10))).await;
    assert_eq!(second, Err(SnapshotError::Busy));
    let other = three
        .transport
        .send_snapshot(2, header("c"), Box::new(numbers(10)))
        .await;
    assert_eq!(other.expect("sent").chunks, 10);
    let first = first.await;
    assert!(
        matches!(&first, Err(SnapshotError::Refused(refusal)) if refusal.reason == RefuseReason::Superseded),
        "{first:?}"
    );
    assert_eq!(shelf.opened.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_snapshot_lets_go_of_source_and_sink() {
    let settings = Settings {
        snapshot_keep: Duration::from_millis(300),
        ..quick()
    };
    let (one, _two, _proxy, shelf) = pair(settings).await;
    *shelf.pause.lock() = Duration::from_millis(20);
    let source = numbers(MANY);
    let dropped = source.dropped.clone();
    let sending = one.transport.send_snapshot(2, header("a"), Box::new(source));
    until("begun", || shelf.written.load(Ordering::SeqCst) > 3).await;
    let begun = Instant::now();
    drop(sending);
    until("dropped", || dropped.load(Ordering::SeqCst) == 1).await;
    until("dropped", || shelf.dropped.load(Ordering::SeqCst) == 1).await;
    assert!(begun.elapsed() > Duration::from_millis(250), "it was kept for a while");
    // There is room for another.
    *shelf.pause.lock() = Duration::ZERO;
    let sent = one.transport.send_snapshot(2, header("b"), Box::new(numbers(4))).await;
    assert!(sent.is_ok(), "{sent:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_is_a_failure_in_the_end() {
    let settings = Settings {
        snapshot_stall_timeout: Duration::from_millis(800),
        ..quick()
    };
    let (one, _two, proxy, _shelf) = pair(settings).await;
    proxy.set(Way::Shut);
    let sending = one.transport.send_snapshot(2, header("a"), Box::new(numbers(40)));
    let stalled = tokio::time::timeout(LONG, sending).await.expect("an end");
    assert!(matches!(stalled, Err(SnapshotError::Stalled { .. })), "{stalled:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_progress_is_a_failure_in_the_end() {
    let settings = Settings {
        snapshot_stall_timeout: Duration::from_secs(5),
        // Not that it says nothing.
        raft_read_timeout: 10 * LONG,
        ..quick()
    };
    let (one, _two, proxy, shelf) = pair(settings).await;
    *shelf.pause.lock() = Duration::from_millis(30);
    let sending = one.transport.send_snapshot(2, header("a"), Box::new(numbers(MANY)));
    until("begun", || shelf.written.load(Ordering::SeqCst) > 3).await;
    proxy.set(Way::Stuck);
    let stalled = tokio::time::timeout(LONG, sending).await.expect("an end");
    assert!(matches!(stalled, Err(SnapshotError::Stalled { .. })), "{stalled:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_end_is_no_failure_and_is_not_done_twice() {
    let settings = Settings {
        snapshot_stall_timeout: Duration::from_secs(5),
        raft_read_timeout: Duration::from_secs(5),
        ..quick()
    };
    let (one, _two, proxy, shelf) = pair(settings).await;
    *shelf.pause_finish.lock() = Duration::from_secs(7);
    let sending = one.transport.send_snapshot(2, header("a"), Box::new(numbers(10)));
    until("finishing", || shelf.finishing.load(Ordering::SeqCst) == 1).await;
    // The connection breaks while the receiver finishes.
    proxy.cut();
    let sent = sending.await;
    assert!(sent.is_ok(), "{sent:?}");
    assert_eq!(shelf.finished.lock().len(), 1);
    assert_eq!(shelf.written.load(Ordering::SeqCst), 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_sink_holds_the_source_back() {
    let (one, _two, _proxy, shelf) = pair(quick()).await;
    // So slow that what it takes does not count, however long a second is.
    *shelf.pause.lock() = Duration::from_secs(2);
    let sending = one.transport.send_snapshot(2, header("a"), Box::new(numbers(MANY)));
    until("begun", || shelf.written.load(Ordering::SeqCst) > 0).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let sent = one.transport.stats()[0].snapshot_sent_bytes;
    // Sockets of two connections hold some.
    assert!(sent < 40 << 20, "{sent} sent");
    assert_eq!(one.unreachable(), 0);
    drop(sending);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rate_is_kept() {
    let settings = Settings {
        snapshot_bytes_per_second: 4 << 20,
        ..quick()
    };
    let (one, _two, _proxy, _shelf) = pair(settings).await;
    let begun = Instant::now();
    one.transport
        .send_snapshot(2, header("a"), Box::new(numbers(16)))
        .await
        .expect("sent");
    let took = begun.elapsed();
    assert!(
        took > Duration::from_millis(850) && took < Duration::from_secs(30),
        "{took:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_goes_on_while_a_snapshot_is_sent() {
    let (one, two, _proxy, shelf) = pair(quick()).await;
    *shelf.pause.lock() = Duration::from_millis(5);
    one.connected(2).await;
    let sending = one.transport.send_snapshot(2, header("a"), Box::new(numbers(100)));
    for i in 0..50 {
        assert!(one.transport.send(2, vec![Bytes::from_static(b"beat")]));
        until("received", || two.received_count() == i + 1).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(sending.await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_ends_both_sides() {
    let (one, two, _proxy, shelf) = pair(quick()).await;
    *shelf.pause.lock() = Duration::from_millis(20);
    let source = numbers(MANY);
    let dropped = source.dropped.clone();
    let sending = one.transport.send_snapshot(2, header("a"), Box::new(source));
    until("begun", || shelf.written.load(Ordering::SeqCst) > 3).await;
    assert!(two.transport.shutdown(LONG).await);
    assert_eq!(shelf.dropped.load(Ordering::SeqCst), 1);
    assert!(one.transport.shutdown(LONG).await);
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    assert_eq!(sending.await, Err(SnapshotError::Stopped));
}
