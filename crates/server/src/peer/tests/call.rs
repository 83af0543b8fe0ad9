//! Requests and answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::harness::{CLUSTER, identity, member, member_with, quick, until, url};
use super::proxy::{Proxy, Way};
use crate::peer::{CallError, Caller, RefuseReason, Settings, Tls, call_url};

const LONG: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_calls_at_once_get_their_own_answers() {
    let (one, two) = (Arc::new(member(1).await), member(2).await);
    one.knows(&[(2, &two.url)]);
    let mut calls = tokio::task::JoinSet::new();
    for i in 0..1000_usize {
        let one = one.clone();
        calls.spawn(async move {
            let mut request = vec![b'e'; 1 + i * 37 % 20_000];
            request.extend(i.to_le_bytes());
            let request = Bytes::from(request);
            let answer = one.transport.call(2, request.clone(), LONG).await.expect("an answer");
            assert!(answer == request);
        });
    }
    while let Some(call) = calls.join_next().await {
        call.expect("a call");
    }
    assert_eq!(two.transport.shared.incoming.count(crate::peer::Purpose::Call), 1);
    let caller = Caller {
        member: 1,
        cluster_checked: true,
    };
    assert!(two.watcher.callers.lock().iter().all(|by| *by == caller));
}

#[tokio::test]
async fn a_call_that_takes_too_long_may_have_been_carried_out_and_is_cancelled() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(2, &two.url)]);
    let slow = one
        .transport
        .call(2, Bytes::from_static(b"slow"), Duration::from_millis(200))
        .await;
    assert!(matches!(slow, Err(CallError::Unknown(_))), "{slow:?}");
    until("cancelled", || two.watcher.calls_dropped.load(Ordering::SeqCst) == 1).await;
    // One whose future is dropped, likewise.
    let slow = one.transport.call(2, Bytes::from_static(b"slow"), LONG);
    assert!(tokio::time::timeout(Duration::from_millis(100), slow).await.is_err());
    until("cancelled", || two.watcher.calls_dropped.load(Ordering::SeqCst) == 2).await;
    // The connection still works.
    let echo = one.transport.call(2, Bytes::from_static(b"echo"), LONG).await;
    assert_eq!(echo, Ok(Bytes::from_static(b"echo")));
}

#[tokio::test]
async fn slow_answers_outlive_the_read_timeout() {
    let settings = Settings {
        raft_read_timeout: Duration::from_millis(300),
        ..quick()
    };
    let one = member_with(identity(1), settings.clone(), Tls::default(), "http://127.0.0.1:0").await;
    let two = member_with(identity(2), settings.clone(), Tls::default(), "http://127.0.0.1:0").await;
    one.knows(&[(2, &two.url)]);
    let slow = Bytes::from_static(b"slow");
    assert_eq!(one.transport.call(2, slow.clone(), LONG).await, Ok(slow.clone()));
    let answer = call_url(&settings, &Tls::default(), &two.url, 0, "test", slow.clone(), LONG).await;
    assert_eq!(answer, Ok(slow));
}

#[tokio::test]
async fn what_was_not_sent_is_told_from_what_may_have_been() {
    let (one, two) = (member(1).await, member(2).await);
    let proxy = Proxy::to(&two.url).await;
    proxy.set(Way::Shut);
    one.knows(&[(2, &proxy.url)]);
    let echo = Bytes::from_static(b"echo");
    let failed = one.transport.call(2, echo.clone(), LONG).await;
    assert!(matches!(failed, Err(CallError::NotSent(_))), "{failed:?}");
    let stranger = one.transport.call(7, echo.clone(), LONG).await;
    assert!(matches!(stranger, Err(CallError::NotSent(_))), "{stranger:?}");

    proxy.set(Way::Open);
    until("open", || one.transport.active(2).is_some()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(one.transport.call(2, echo.clone(), LONG).await, Ok(echo.clone()));

    // Broken half way.
    let call = one.transport.call(2, Bytes::from_static(b"slow"), LONG);
    let cut = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        proxy.cut();
    };
    let (broken, ()) = tokio::join!(call, cut);
    assert!(matches!(broken, Err(CallError::Unknown(_))), "{broken:?}");

    // No connection in time.
    proxy.set(Way::Stuck);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (other, three) = (member(4).await, Proxy::to(&two.url).await);
    three.set(Way::Stuck);
    other.knows(&[(2, &three.url)]);
    let late = other.transport.call(2, echo, Duration::from_millis(100)).await;
    assert!(matches!(late, Err(CallError::NotSent(_))), "{late:?}");
}

#[tokio::test]
async fn a_refused_caller_is_told_why() {
    let (one, two) = (member(1).await, member(2).await);
    two.watcher.removed.lock().push(1);
    one.knows(&[(2, &two.url)]);
    let refused = one.transport.call(2, Bytes::from_static(b"echo"), LONG).await;
    assert!(
        matches!(&refused, Err(CallError::Refused(refusal)) if refusal.reason == RefuseReason::Removed),
        "{refused:?}"
    );
    assert!(!one.watcher.refusals.lock().is_empty());
}

#[tokio::test]
async fn calls_are_bounded() {
    let settings = Settings {
        calls_max: 3,
        call_bytes_max: 1000,
        ..quick()
    };
    let one = member_with(identity(1), settings, Tls::default(), "http://127.0.0.1:0").await;
    let two = member(2).await;
    one.knows(&[(2, &two.url)]);
    let hang = || {
        one.transport
            .call(2, Bytes::from_static(b"hang"), Duration::from_millis(400))
    };
    let fourth = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        one.transport.call(2, Bytes::from_static(b"echo"), LONG).await
    };
    let (_, _, _, fourth) = tokio::join!(hang(), hang(), hang(), fourth);
    assert_eq!(fourth, Err(CallError::Busy));
    let big = one.transport.call(2, Bytes::from(vec![b'e'; 1001]), LONG).await;
    assert_eq!(big, Err(CallError::Busy));
    // Those that timed out hold no place, here or there.
    for _ in 0..10 {
        let echo = one.transport.call(2, Bytes::from_static(b"echo"), LONG).await;
        assert_eq!(echo, Ok(Bytes::from_static(b"echo")));
    }
}

#[tokio::test]
async fn too_long_and_failed_answers_are_told() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(2, &two.url)]);
    let long = one.transport.call(2, Bytes::from_static(b"long"), LONG).await;
    assert!(matches!(long, Err(CallError::Unknown(_))), "{long:?}");
    let panic = one.transport.call(2, Bytes::from_static(b"panic"), LONG).await;
    assert!(matches!(panic, Err(CallError::Unknown(_))), "{panic:?}");
    let request = one.transport.call(2, Bytes::from(vec![b'e'; 33 << 20]), LONG).await;
    assert!(matches!(request, Err(CallError::NotSent(_))), "{request:?}");
    let echo = one.transport.call(2, Bytes::from_static(b"echo"), LONG).await;
    assert_eq!(echo, Ok(Bytes::from_static(b"echo")));
}

#[tokio::test]
async fn a_joiner_calls_a_url() {
    let two = member(2).await;
    let (settings, tls) = (quick(), Tls::default());
    let echo = Bytes::from_static(b"echo");
    for (cluster, checked) in [(0, false), (CLUSTER, true)] {
        let answer = call_url(&settings, &tls, &two.url, cluster, "test", echo.clone(), LONG).await;
        assert_eq!(answer, Ok(echo.clone()));
        let caller = Caller {
            member: 0,
            cluster_checked: checked,
        };
        assert_eq!(two.watcher.callers.lock().last(), Some(&caller));
    }
    let other = call_url(&settings, &tls, &two.url, 99, "test", echo.clone(), LONG).await;
    assert!(
        matches!(&other, Err(CallError::Refused(refusal)) if refusal.reason == RefuseReason::WrongCluster),
        "{other:?}"
    );
    let nobody = url("http://127.0.0.1:1");
    let nobody = call_url(&settings, &tls, &nobody, 0, "test", echo.clone(), LONG).await;
    assert!(matches!(nobody, Err(CallError::NotSent(_))), "{nobody:?}");
    let hang = Bytes::from_static(b"hang");
    let late = call_url(&settings, &tls, &two.url, 0, "test", hang, Duration::from_millis(100)).await;
    assert!(matches!(late, Err(CallError::Unknown(_))), "{late:?}");
    // Nothing is left of them.
    until("gone", || {
        two.transport.shared.incoming.count(crate::peer::Purpose::Call) == 0
    })
    .await;
}

#[tokio::test]
async fn calls_end_when_the_transport_does() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(2, &two.url)]);
    let call = one.transport.call(2, Bytes::from_static(b"hang"), LONG);
    let stop = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(one.transport.shutdown(Duration::from_secs(5)).await);
    };
    let begun = Instant::now();
    let (cut, ()) = tokio::join!(call, stop);
    assert!(matches!(cut, Err(CallError::Unknown(_))), "{cut:?}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    let late = one.transport.call(2, Bytes::from_static(b"echo"), LONG).await;
    assert!(matches!(late, Err(CallError::NotSent(_))), "{late:?}");
}
