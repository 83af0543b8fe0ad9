//! Raft's messages.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::harness::{LONG, Member, identity, member, member_with, quick, until};
use super::proxy::{Proxy, Way};
use crate::peer::{RefuseReason, Settings, Tls};

fn numbered(number: u32, length: usize) -> Bytes {
    let mut message = vec![number as u8; length.max(4)];
    message[..4].copy_from_slice(&number.to_le_bytes());
    Bytes::from(message)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_arrive_in_order_and_in_batches() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(2, &two.url)]);
    one.connected(2).await;
    let lengths = [4, 100, 5000, 9000, 300 << 10];
    let sent: Vec<_> = (0..20_000)
        .map(|i| {
            numbered(
                i,
                if i % 5000 == 7 {
                    3 << 20
                } else {
                    lengths.get(i as usize % 97).copied().unwrap_or(60)
                },
            )
        })
        .collect();
    // What waited goes to the node in few pieces. Nothing is taken at first, so that all of this waits.
    two.watcher.takes.send_replace(false);
    let waits = 4000;
    for messages in sent[..waits].chunks(4) {
        assert!(one.transport.send(2, messages.to_vec()));
    }
    two.watcher.takes.send_replace(true);
    until("received", || two.received_count() == waits).await;
    let deliveries = two.watcher.deliveries.load(Ordering::SeqCst);
    assert!(deliveries < waits / 4, "{deliveries} deliveries");
    // The rest comes from a thread that is no async one, as the replica's.
    let to_send = sent[waits..].to_vec();
    let one = std::thread::spawn(move || {
        for (i, messages) in to_send.chunks(3).enumerate() {
            // The queue may be full: here, each is wanted.
            while !one.transport.send(2, messages.to_vec()) {
                std::thread::sleep(Duration::from_millis(1));
            }
            if i == 10 {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        one
    });
    until("received", || two.received_count() == sent.len()).await;
    let one = one.join().expect("the sender");
    assert!(two.received() == sent, "order or contents");
    // The receiver may know it first.
    until("counted", || {
        let stats = one.transport.stats().remove(0);
        stats.sent_messages == sent.len() as u64 && (stats.queued_messages, stats.queued_bytes) == (0, 0)
    })
    .await;
    until("measured", || one.transport.stats()[0].round_trip.is_some()).await;
}

#[tokio::test]
async fn both_ways_at_once() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(1, &one.url), (2, &two.url)]);
    two.knows(&[(1, &one.url), (2, &two.url)]);
    one.connected(2).await;
    two.connected(1).await;
    for i in 0..100 {
        assert!(one.transport.send(2, vec![numbered(i, 10)]));
        assert!(two.transport.send(1, vec![numbered(i, 10)]));
    }
    until("received", || {
        one.received_count() == 100 && two.received_count() == 100
    })
    .await;
    assert!(
        !one.transport.send(1, vec![numbered(0, 10)]),
        "nobody sends to themselves"
    );
    assert!(!one.transport.send(9, vec![numbered(0, 10)]), "nor to a stranger");
}

#[tokio::test]
async fn a_cut_connection_is_made_again_and_told_once() {
    let (one, two) = (member(1).await, member(2).await);
    let proxy = Proxy::to(&two.url).await;
    one.knows(&[(2, &proxy.url)]);
    for round in 0..5 {
        one.connected(2).await;
        assert!(one.transport.send(2, vec![numbered(round, 10)]));
        until("received", || two.received_count() == round as usize + 1).await;
        let before = one.unreachable();
        let since = one.transport.active(2);
        proxy.cut();
        until("noticed", || one.unreachable() > before).await;
        one.connected(2).await;
        assert_ne!(one.transport.active(2), since);
        assert_eq!(one.unreachable(), before + 1);
    }
}

#[tokio::test]
async fn what_waited_when_the_connection_broke_is_dropped_and_the_rest_is_sent() {
    let (one, two) = (member(1).await, member(2).await);
    let proxy = Proxy::to(&two.url).await;
    one.knows(&[(2, &proxy.url)]);
    one.connected(2).await;
    proxy.set(Way::Shut);
    until("noticed", || one.transport.active(2).is_none()).await;
    let dropped = || one.transport.stats()[0].dropped_messages;
    until("dropped again and again", || {
        // There is room, connection or not.
        assert!(one.transport.send(2, vec![numbered(0, 10)]));
        dropped() > 10 && one.transport.stats()[0].send_failures > 3
    })
    .await;
    until("dropped", || one.transport.stats()[0].queued_messages == 0).await;
    assert!(one.transport.stats()[0].last_error.is_some());
    proxy.set(Way::Open);
    one.connected(2).await;
    assert!(one.transport.send(2, vec![numbered(1000, 10)]));
    until("received", || two.received().last() == Some(&numbered(1000, 10))).await;
}

#[tokio::test]
async fn a_peer_that_comes_back_is_reached_at_once() {
    let settings = Settings {
        backoff_min: 10 * LONG,
        backoff_max: 10 * LONG,
        ..quick()
    };
    let one = member_with(identity(1), settings, Tls::default(), "http://127.0.0.1:0").await;
    let two = member(2).await;
    let proxy = Proxy::to(&two.url).await;
    proxy.set(Way::Shut);
    one.knows(&[(2, &proxy.url)]);
    until("noticed", || one.unreachable() == 1).await;
    proxy.set(Way::Open);
    // Its own connection shows that it is there.
    two.knows(&[(1, &one.url)]);
    one.connected(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_is_bounded_when_a_peer_does_not_take() {
    let settings = Settings {
        queue_bytes_max: 4 << 20,
        queue_messages_max: 1000,
        // It is slow, not gone.
        raft_write_timeout: 10 * LONG,
        ..quick()
    };
    let one = member_with(identity(1), settings, Tls::default(), "http://127.0.0.1:0").await;
    let two = member(2).await;
    two.watcher.takes.send_replace(false);
    one.knows(&[(2, &two.url)]);
    one.connected(2).await;
    let mut accepted = Vec::new();
    let mut refused = 0;
    for i in 0..2000 {
        let message = numbered(i, 64 << 10);
        let begun = Instant::now();
        if one.transport.send(2, vec![message.clone()]) {
            accepted.push(message);
        } else {
            refused += 1;
        }
        assert!(begun.elapsed() < LONG / 3, "it must not block");
        let stats = one.transport.stats().remove(0);
        assert!(stats.queued_bytes <= 4 << 20 && stats.queued_messages <= 1000);
        tokio::time::sleep(Duration::from_micros(50)).await;
    }
    assert!(refused > 1000, "{refused}");
    assert_eq!(one.transport.stats()[0].dropped_messages, refused);
    // It shows again and again that it lives, and is not taken for dead.
    let heard = || one.transport.stats()[0].received_bytes;
    let heard_before = heard();
    until("heard", || heard() > heard_before + 100).await;
    assert_eq!(one.unreachable(), 0);
    two.watcher.takes.send_replace(true);
    until("received", || two.received_count() == accepted.len()).await;
    assert!(two.received() == accepted);
}

#[tokio::test]
async fn a_call_to_send_is_taken_whole_or_not() {
    let settings = Settings {
        queue_messages_max: 10,
        ..quick()
    };
    let one = member_with(identity(1), settings, Tls::default(), "http://127.0.0.1:0").await;
    let two = member(2).await;
    two.watcher.takes.send_replace(false);
    one.knows(&[(2, &two.url)]);
    let eleven: Vec<_> = (0..11).map(|i| numbered(i, 10)).collect();
    assert!(!one.transport.send(2, eleven.clone()));
    assert_eq!(one.transport.stats()[0].dropped_messages, 11);
    assert!(one.transport.send(2, eleven[..10].to_vec()));
}

#[tokio::test]
async fn a_peer_that_accepts_nothing_is_disconnected() {
    let settings = Settings {
        raft_write_timeout: Duration::from_millis(300),
        // Not that it says nothing.
        raft_read_timeout: 10 * LONG,
        ..quick()
    };
    let one = member_with(identity(1), settings, Tls::default(), "http://127.0.0.1:0").await;
    let two = member(2).await;
    let proxy = Proxy::to(&two.url).await;
    one.knows(&[(2, &proxy.url)]);
    one.connected(2).await;
    proxy.set(Way::Stuck);
    until("noticed", || {
        one.transport.send(2, vec![numbered(0, 1 << 20)]);
        one.unreachable() > 0
    })
    .await;
}

#[tokio::test]
async fn idle_is_not_silent() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(2, &two.url)]);
    one.connected(2).await;
    // Nobody has anything to say, and yet there are pings and what comes back.
    let heard = || {
        let by = |member: &Member, from| member.transport.shared.counters(from).received_bytes.get();
        by(&one, 2).min(by(&two, 1))
    };
    let before = heard();
    until("heard", || heard() > before + 300).await;
    assert_eq!(one.unreachable(), 0);
}

#[tokio::test]
async fn a_silent_peer_is_disconnected_on_both_sides() {
    let settings = Settings {
        raft_read_timeout: Duration::from_millis(400),
        ..quick()
    };
    let one = member_with(identity(1), settings.clone(), Tls::default(), "http://127.0.0.1:0").await;
    let two = member_with(identity(2), settings, Tls::default(), "http://127.0.0.1:0").await;
    let proxy = Proxy::to(&two.url).await;
    one.knows(&[(2, &proxy.url)]);
    one.connected(2).await;
    // A pause of the machine may look the same, and be noticed before.
    proxy.set(Way::Stuck);
    until("noticed", || one.unreachable() > 0 && one.transport.active(2).is_none()).await;
    let count = || two.transport.shared.incoming.count(crate::peer::Purpose::Raft);
    until("closed", || count() == 0).await;
}

#[tokio::test]
async fn a_newer_connection_replaces_the_older() {
    let two = member(2).await;
    let old = member(1).await;
    old.knows(&[(2, &two.url)]);
    old.connected(2).await;
    let new = member(1).await;
    new.knows(&[(2, &two.url)]);
    new.connected(2).await;
    until("replaced", || old.unreachable() > 0).await;
    drop(old);
    until("alone", || {
        new.transport.send(2, vec![numbered(1, 10)]);
        two.received_count() > 0
    })
    .await;
    let count = || two.transport.shared.incoming.count(crate::peer::Purpose::Raft);
    until("alone", || count() == 1).await;
}

#[tokio::test]
async fn a_removed_member_is_told() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(2, &two.url)]);
    two.knows(&[(1, &one.url)]);
    one.connected(2).await;
    two.connected(1).await;
    // Two removes one.
    two.watcher.removed.lock().push(1);
    two.knows(&[]);
    assert_eq!(two.transport.active(1), None);
    until("told", || {
        let refusals = one.watcher.refusals.lock();
        refusals
            .iter()
            .any(|(by, refusal)| *by == 2 && refusal.reason == RefuseReason::Removed)
    })
    .await;
    until("closed", || one.transport.active(2).is_none()).await;
    // And again when it tries to come back.
    one.watcher.refusals.lock().clear();
    until("told again", || !one.watcher.refusals.lock().is_empty()).await;
}

#[tokio::test]
async fn a_changed_address_is_used() {
    let (one, two) = (member(1).await, member(2).await);
    let proxy = Proxy::to(&two.url).await;
    one.knows(&[(2, &proxy.url)]);
    one.connected(2).await;
    one.knows(&[(2, &two.url)]);
    let at = two.url.to_string();
    until("moved", || {
        let stats = one.transport.stats().remove(0);
        stats.url.as_ref() == Some(&at) && stats.active_since.is_some()
    })
    .await;
}

#[tokio::test]
async fn the_second_url_will_do() {
    let (one, two) = (member(1).await, member(2).await);
    let dead = Proxy::to(&two.url).await;
    dead.set(Way::Shut);
    let urls = vec![dead.url.clone(), two.url.clone()];
    one.transport.set_peers(vec![crate::peer::Peer { id: 2, urls }]);
    one.connected(2).await;
    assert_eq!(one.unreachable(), 0);
}

#[tokio::test]
async fn what_is_queued_is_sent_before_the_end() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(2, &two.url)]);
    two.knows(&[(1, &one.url)]);
    one.connected(2).await;
    two.connected(1).await;
    // Few enough bytes for the sockets: what they do not hold when the time to say goodbye is over may be lost.
    for i in 0..1000 {
        assert!(one.transport.send(2, vec![numbered(i, 50)]));
    }
    assert!(one.transport.shutdown(LONG).await);
    until("received", || two.received_count() == 1000).await;
    until("noticed", || two.transport.active(1).is_none()).await;
    assert_eq!(one.transport.active(2), None);
}

#[tokio::test]
async fn unix_sockets_will_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = format!("unix://{}/peer.sock", dir.path().display());
    let two = member_with(identity(2), quick(), Tls::default(), &at).await;
    let one = member(1).await;
    one.knows(&[(2, &two.url)]);
    one.connected(2).await;
    assert!(one.transport.send(2, vec![numbered(1, 10)]));
    until("received", || two.received_count() == 1).await;
    assert!(two.transport.shutdown(LONG).await);
    assert!(!dir.path().join("peer.sock").exists(), "the file goes with the socket");
}
