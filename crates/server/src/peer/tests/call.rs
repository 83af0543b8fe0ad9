//! Requests and answers.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;

use super::harness::{CLUSTER, LONG, identity, member, member_with, quick, until, url};
use super::proxy::{Proxy, Way};
use crate::peer::{CallError, Caller, RefuseReason, Settings, Tls, call_url};

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
    let echo = Bytes::from_static(b"echo");
    let hang = Bytes::from_static(b"hang");
    // With a connection, calls are sent before any time is over.
    assert_eq!(one.transport.call(2, echo.clone(), LONG).await, Ok(echo.clone()));
    let late = one.transport.call(2, hang.clone(), Duration::from_millis(300)).await;
    assert!(matches!(late, Err(CallError::Unknown(_))), "{late:?}");
    // The connection still works. What was asked before is being carried out by then, if it ever is.
    assert_eq!(one.transport.call(2, echo.clone(), LONG).await, Ok(echo.clone()));
    until("cancelled", || two.hanging() == 0).await;
    // One whose future is dropped, likewise.
    tokio::select! {
        hung = one.transport.call(2, hang, LONG) => panic!("{hung:?}"),
        () = until("under way", || two.hanging() == 1) => {}
    }
    until("cancelled", || two.hanging() == 0).await;
    assert_eq!(one.transport.call(2, echo.clone(), LONG).await, Ok(echo));
}

#[tokio::test]
async fn slow_answers_outlive_the_read_timeout() {
    let settings = Settings {
        raft_read_timeout: Duration::from_secs(5),
        ..quick()
    };
    let one = member_with(identity(1), settings.clone(), Tls::default(), "http://127.0.0.1:0").await;
    let two = member_with(identity(2), settings.clone(), Tls::default(), "http://127.0.0.1:0").await;
    one.knows(&[(2, &two.url)]);
    let slow = Bytes::from_static(b"s\x07");
    let tls = Tls::default();
    let (of_member, of_joiner) = tokio::join!(
        one.transport.call(2, slow.clone(), LONG),
        call_url(&settings, &tls, &two.url, 0, "test", slow.clone(), LONG)
    );
    assert_eq!(of_member, Ok(slow.clone()));
    assert_eq!(of_joiner, Ok(slow));
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

    // Broken half way: that is noticed, and not only that the time is over.
    let call = one.transport.call(2, Bytes::from_static(b"hang"), 2 * LONG);
    let cut = async {
        until("under way", || two.hanging() == 1).await;
        proxy.cut();
    };
    let (broken, ()) = tokio::time::timeout(LONG, async { tokio::join!(call, cut) })
        .await
        .expect("noticed");
    assert!(matches!(broken, Err(CallError::Unknown(_))), "{broken:?}");

    // No connection in time.
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
    let one = member_with(identity(1), settings.clone(), Tls::default(), "http://127.0.0.1:0").await;
    let two = member_with(identity(2), settings, Tls::default(), "http://127.0.0.1:0").await;
    one.knows(&[(2, &two.url)]);
    let mut hanging: Vec<_> = (0..3)
        .map(|_| Box::pin(one.transport.call(2, Bytes::from_static(b"hang"), LONG)))
        .collect();
    let begun = std::future::poll_fn(|context| {
        let mut polled = hanging.iter_mut().map(|call| call.as_mut().poll(context));
        Poll::Ready(polled.all(|call| call.is_pending()))
    });
    assert!(begun.await);
    let fourth = one.transport.call(2, Bytes::from_static(b"echo"), LONG).await;
    assert_eq!(fourth, Err(CallError::Busy));
    until("under way", || two.hanging() == 3).await;
    drop(hanging);
    let big = one.transport.call(2, Bytes::from(vec![b'e'; 1001]), LONG).await;
    assert_eq!(big, Err(CallError::Busy));
    // Those that were given up hold no place, here or there.
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
    // The time is for the connection, too: how much is enough for that is not known.
    let asked = || two.watcher.callers.lock().len();
    let asked_before = asked();
    let mut limit = Duration::from_millis(100);
    loop {
        let hang = Bytes::from_static(b"hang");
        match call_url(&settings, &tls, &two.url, 0, "test", hang, limit).await {
            Err(CallError::Unknown(_)) => break,
            Err(CallError::NotSent(_)) if asked() == asked_before && limit < LONG => limit *= 2,
            other => panic!("{other:?} within {limit:?}"),
        }
    }
    // Nothing is left of them.
    until("gone", || {
        two.transport.shared.incoming.count(crate::peer::Purpose::Call) == 0 && two.hanging() == 0
    })
    .await;
}

#[tokio::test]
async fn calls_end_when_the_transport_does() {
    let (one, two) = (member(1).await, member(2).await);
    one.knows(&[(2, &two.url)]);
    let call = one.transport.call(2, Bytes::from_static(b"hang"), LONG);
    let stop = async {
        until("under way", || two.hanging() == 1).await;
        assert!(one.transport.shutdown(LONG).await);
    };
    let (cut, ()) = tokio::join!(call, stop);
    // And not as the time is over.
    assert_eq!(cut, Err(CallError::Unknown("the transport stopped".to_owned())));
    let late = one.transport.call(2, Bytes::from_static(b"echo"), LONG).await;
    assert!(matches!(late, Err(CallError::NotSent(_))), "{late:?}");
}
