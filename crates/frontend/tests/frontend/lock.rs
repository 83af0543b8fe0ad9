//! Locks and elections.

use std::time::Duration;

use api::{LeaseId, Limits};
use metastore_frontend::Options;
use metastore_frontend::proto::v3electionpb::election_client::ElectionClient;
use metastore_frontend::proto::v3electionpb::{
    CampaignRequest, LeaderKey, LeaderRequest, ProclaimRequest, ResignRequest,
};
use metastore_frontend::proto::v3lockpb::lock_client::LockClient;
use metastore_frontend::proto::v3lockpb::{LockRequest, LockResponse, UnlockRequest};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::fake::{Fake, deletes};
use crate::{assert_status, connect};

const LONG: Duration = Duration::from_secs(10);

fn store_with(leases: &[LeaseId]) -> Fake {
    let store = Fake::new(Limits::default());
    store.state().leases.extend(leases);
    store
}

fn lock(lease: LeaseId) -> LockRequest {
    LockRequest {
        name: "l".into(),
        lease,
    }
}

/// A lock call on its way; to abort it is to give it up.
fn ask(client: &LockClient<Channel>, lease: LeaseId) -> JoinHandle<Result<Response<LockResponse>, Status>> {
    let mut client = client.clone();
    tokio::spawn(async move { client.lock(lock(lease)).await })
}

fn key(response: Result<Response<LockResponse>, Status>) -> (String, i64) {
    let response = response.expect("locked").into_inner();
    let key = String::from_utf8(response.key.to_vec()).expect("text");
    (key, response.header.expect("has one").revision)
}

async fn keys(store: &Fake) -> Vec<String> {
    let request = api::kv::RangeRequest {
        key: "l".into(),
        range_end: "m".into(),
        ..Default::default()
    };
    let found = api::Store::range(store, request).await.expect("reads");
    let text = |kv: api::kv::KeyValue| String::from_utf8(kv.key.to_vec()).expect("text");
    found.kvs.into_iter().map(text).collect()
}

/// Waits until a key was written so often.
async fn version_becomes(store: &Fake, key: &str, version: i64) {
    let request = api::kv::RangeRequest {
        key: key.to_owned().into(),
        ..Default::default()
    };
    let reached = timeout(LONG, async {
        loop {
            let found = api::Store::range(store, request.clone()).await.expect("reads");
            if found.kvs.first().is_some_and(|kv| kv.version == version) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    reached.await.expect("it is written");
}

/// Waits until the keys are these.
async fn keys_become(store: &Fake, expected: &[&str]) {
    let reached = timeout(LONG, async {
        while keys(store).await != expected {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    if reached.await.is_err() {
        assert_eq!(keys(store).await, expected);
    }
}

#[tokio::test]
async fn a_lock_goes_to_one_after_another() {
    let store = store_with(&[16, 255, 7]);
    let client = LockClient::new(connect(store.clone(), Options::default()).await);
    let (first, revision) = key(client.clone().lock(lock(16)).await);
    assert_eq!((first.as_str(), revision), ("l/10", 2));
    // Whoever has it gets it again, for this call.
    assert_eq!(key(client.clone().lock(lock(16)).await), ("l/10".to_owned(), 3));

    let mut waiting = Vec::new();
    for (lease, expected) in [(255, &["l/10", "l/ff"][..]), (7, &["l/10", "l/7", "l/ff"])] {
        let mut client = client.clone();
        waiting.push(tokio::spawn(async move { client.lock(lock(lease)).await }));
        keys_become(&store, expected).await;
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(waiting.iter().all(|waiter| !waiter.is_finished()));

    client
        .clone()
        .unlock(UnlockRequest { key: "l/10".into() })
        .await
        .expect("unlocked");
    let (key_2, revision) = key(timeout(LONG, waiting.remove(0)).await.expect("in time").expect("whole"));
    // At the revision of the unlock, after those of three keys and of the second time.
    assert_eq!((key_2.as_str(), revision), ("l/ff", 6));
    assert!(!waiting[0].is_finished(), "it came after");
    store.delete("l/ff");
    let (key_3, _) = key(timeout(LONG, waiting.remove(0)).await.expect("in time").expect("whole"));
    assert_eq!(key_3, "l/7");
}

#[tokio::test]
async fn who_brings_no_lease_gets_one() {
    let store = store_with(&[]);
    let mut client = LockClient::new(connect(store.clone(), Options::default()).await);
    assert_eq!(key(client.lock(lock(0)).await).0, "l/beef");
    assert_eq!(store.state().leases, [0xbeef]);
}

#[tokio::test]
async fn a_lock_call_that_is_given_up_leaves_the_line() {
    let store = store_with(&[1, 2]);
    let mut client = LockClient::new(connect(store.clone(), Options::default()).await);
    client.lock(lock(1)).await.expect("locked");
    let waiting = ask(&client, 2);
    keys_become(&store, &["l/1", "l/2"]).await;
    waiting.abort();
    keys_become(&store, &["l/1"]).await;
}

/// What is left of a call that has gone is carried out late, when its client has asked again and has the lock: it keeps it.
#[tokio::test]
async fn what_a_call_undoes_late_takes_no_lock_from_the_next() {
    let store = store_with(&[1, 2]);
    let client = LockClient::new(connect(store.clone(), Options::default()).await);
    client.clone().lock(lock(1)).await.expect("locked");
    let ask = || ask(&client, 2);
    store.state().is_late = deletes;
    let going = ask();
    keys_become(&store, &["l/1", "l/2"]).await;
    going.abort();
    let _ = going.await;
    let again = ask();
    version_becomes(&store, "l/2", 2).await;
    store.delete("l/1");
    key(timeout(LONG, again).await.expect("in time").expect("whole"));
    store.state().is_late = |_| false;
    store.release_late.notify_waiters();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(keys(&store).await, ["l/2"], "it is still held");
}

/// The same where it is the later one of two calls that has gone, and the earlier one's turn comes.
#[tokio::test]
async fn what_a_call_undoes_late_takes_no_lock_from_the_one_before() {
    let store = store_with(&[1, 2]);
    let client = LockClient::new(connect(store.clone(), Options::default()).await);
    client.clone().lock(lock(1)).await.expect("locked");
    let ask = || ask(&client, 2);
    let stays = ask();
    keys_become(&store, &["l/1", "l/2"]).await;
    store.state().is_late = deletes;
    let going = ask();
    version_becomes(&store, "l/2", 2).await;
    going.abort();
    let _ = going.await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    store.delete("l/1");
    key(timeout(LONG, stays).await.expect("in time").expect("whole"));
    store.state().is_late = |_| false;
    store.release_late.notify_waiters();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(keys(&store).await, ["l/2"], "it is still held");
}

/// The same for a campaign.
#[tokio::test]
async fn what_a_campaign_undoes_late_ends_no_leadership() {
    let store = store_with(&[1, 2]);
    let client = ElectionClient::new(connect(store.clone(), Options::default()).await);
    client.clone().campaign(campaign(1, "a")).await.expect("won");
    let ask = || {
        let mut client = client.clone();
        tokio::spawn(async move { client.campaign(campaign(2, "b")).await })
    };
    store.state().is_late = deletes;
    let going = ask();
    keys_become(&store, &["l/1", "l/2"]).await;
    going.abort();
    let _ = going.await;
    let again = ask();
    version_becomes(&store, "l/2", 2).await;
    store.delete("l/1");
    timeout(LONG, again)
        .await
        .expect("in time")
        .expect("whole")
        .expect("won");
    store.state().is_late = |_| false;
    store.release_late.notify_waiters();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(keys(&store).await, ["l/2"], "it still leads");
}

/// What is carried out late may find that the client of a call which has gone has asked again, and waits. It goes on waiting.
#[tokio::test]
async fn a_call_that_has_gone_takes_no_place_from_the_next() {
    let store = store_with(&[1, 2]);
    let client = LockClient::new(connect(store.clone(), Options::default()).await);
    client.clone().lock(lock(1)).await.expect("locked");
    let ask = || ask(&client, 2);
    store.state().is_late = |_| true;
    let going = ask();
    tokio::time::sleep(Duration::from_millis(50)).await;
    going.abort();
    let _ = going.await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    store.state().is_late = |_| false;
    let again = ask();
    keys_become(&store, &["l/1", "l/2"]).await;
    store.release_late.notify_waiters();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(keys(&store).await, ["l/1", "l/2"]);
    store.delete("l/1");
    key(timeout(LONG, again).await.expect("in time").expect("whole"));
}

/// Of two calls with one lease the later one has the place; the turn comes while the one or the other is given up. Whoever
/// is told that it holds the lock holds it.
#[tokio::test]
async fn of_two_calls_with_one_lease_whoever_is_told_so_holds_the_lock() {
    let mut told = 0;
    for round in 0..200 {
        let store = store_with(&[1, 2]);
        let client = LockClient::new(connect(store.clone(), Options::default()).await);
        client.clone().lock(lock(1)).await.expect("locked");
        let ask = || ask(&client, 2);
        let mut calls = vec![ask()];
        keys_become(&store, &["l/1", "l/2"]).await;
        calls.push(ask());
        version_becomes(&store, "l/2", 2).await;
        if round % 4 < 2 {
            store.delete("l/1");
        }
        let goes = calls.remove(round % 2);
        for _ in 0..round / 8 {
            tokio::task::yield_now().await;
        }
        goes.abort();
        store.delete("l/1");
        let gone = goes.await;
        let stays = timeout(LONG, calls.remove(0)).await.expect("in time").expect("whole");
        tokio::time::sleep(Duration::from_millis(2)).await;
        let holds = keys(&store).await == ["l/2"];
        for answer in [gone.ok(), Some(stays)].into_iter().flatten() {
            match answer {
                Ok(_) => {
                    told += 1;
                    assert!(holds, "round {round}");
                }
                Err(status) => assert_eq!(status.message(), "mutex: session is expired"),
            }
        }
    }
    assert!(told > 50, "{told}");
}

/// Whoever has the lock keeps it when it asks once more and gives that up, at whatever moment.
#[tokio::test]
async fn asking_again_and_giving_that_up_loses_nothing() {
    let mut given_up = 0;
    for round in 0..100 {
        let store = store_with(&[2]);
        let client = LockClient::new(connect(store.clone(), Options::default()).await);
        client.clone().lock(lock(2)).await.expect("locked");
        let again = tokio::spawn({
            let mut client = client.clone();
            async move { client.lock(lock(2)).await }
        });
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        again.abort();
        given_up += usize::from(again.await.is_err());
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert_eq!(keys(&store).await, ["l/2"], "round {round}");
    }
    assert!(given_up > 0);
}

/// Where many calls come at once with one lease, all of them have the lock, or wait for it.
#[tokio::test]
async fn many_calls_with_one_lease_at_once_all_have_the_lock() {
    let store = store_with(&[1, 2]);
    let client = LockClient::new(connect(store.clone(), Options::default()).await);
    let ask = || ask(&client, 2);
    let calls: Vec<_> = (0..30).map(|_| ask()).collect();
    for call in calls {
        let (held, _) = key(timeout(LONG, call).await.expect("in time").expect("whole"));
        assert_eq!(held, "l/2");
    }
    store.delete("l/2");
    client.clone().lock(lock(1)).await.expect("locked");
    let calls: Vec<_> = (0..30).map(|_| ask()).collect();
    version_becomes(&store, "l/2", 30).await;
    store.delete("l/1");
    for call in calls {
        key(timeout(LONG, call).await.expect("in time").expect("whole"));
    }
}

/// A call has the lock by its own place, not by that of a later call with its lease, which is further back.
#[tokio::test]
async fn a_place_that_was_given_up_and_taken_again_is_another() {
    let store = store_with(&[1, 2, 3]);
    let client = LockClient::new(connect(store.clone(), Options::default()).await);
    client.clone().lock(lock(1)).await.expect("locked");
    let ask = |lease| ask(&client, lease);
    let first = ask(2);
    keys_become(&store, &["l/1", "l/2"]).await;
    let other = ask(3);
    keys_become(&store, &["l/1", "l/2", "l/3"]).await;
    store.delete("l/2");
    let second = ask(2);
    keys_become(&store, &["l/1", "l/2", "l/3"]).await;
    store.delete("l/1");
    key(timeout(LONG, other).await.expect("in time").expect("whole"));
    let ended = timeout(LONG, first).await.expect("in time").expect("whole");
    assert_status(ended, Code::Unknown, "mutex: session is expired");
    assert!(!second.is_finished());
    store.delete("l/3");
    key(timeout(LONG, second).await.expect("in time").expect("whole"));
}

/// When the cluster is busy a place is given back later.
#[tokio::test(start_paused = true)]
async fn a_place_is_given_back_in_the_end() {
    let store = store_with(&[1, 2]);
    let client = LockClient::new(connect(store.clone(), Options::default()).await);
    client.clone().lock(lock(1)).await.expect("locked");
    let going = ask(&client, 2);
    keys_become(&store, &["l/1", "l/2"]).await;
    store.state().failure = Some(api::Error::TooManyRequests);
    going.abort();
    tokio::time::sleep(Duration::from_secs(20)).await;
    store.state().failure = None;
    keys_become(&store, &["l/1"]).await;
}

/// Its client may have asked again, and hold the lock.
#[tokio::test]
async fn a_call_that_goes_while_it_joins_takes_no_lock_from_the_next() {
    let store = store_with(&[1]);
    let client = LockClient::new(connect(store.clone(), Options::default()).await);
    let request = || LockRequest {
        name: "wait".into(),
        lease: 1,
    };
    let going = tokio::spawn({
        let mut client = client.clone();
        async move { client.lock(request()).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    going.abort();
    let again = tokio::spawn({
        let mut client = client.clone();
        async move { client.lock(request()).await }
    });
    // Both are carried out, the first one although nobody waits for it.
    for _ in 0..2 {
        store.release.notify_one();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (held, _) = key(timeout(LONG, again).await.expect("in time").expect("whole"));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let found = api::kv::RangeRequest {
        key: held.into(),
        ..Default::default()
    };
    let found = api::Store::range(&store, found).await.expect("reads");
    assert_eq!(found.count, 1, "it is still held");
}

#[tokio::test]
async fn a_lock_call_ends_when_the_server_stops() {
    let store = store_with(&[1, 2]);
    let (stop, stopping) = watch::channel(false);
    let options = Options {
        stopping: Some(stopping),
        ..Options::default()
    };
    let mut client = LockClient::new(connect(store.clone(), options).await);
    client.lock(lock(1)).await.expect("locked");
    let waiting = ask(&client, 2);
    keys_become(&store, &["l/1", "l/2"]).await;
    stop.send_replace(true);
    let ended = timeout(LONG, waiting).await.expect("in time").expect("whole");
    assert_status(ended, Code::Unavailable, "etcdserver: server stopped");
    keys_become(&store, &["l/1"]).await;
}

#[tokio::test]
async fn a_waiter_whose_lease_ended_is_told() {
    let store = store_with(&[1, 2]);
    let mut client = LockClient::new(connect(store.clone(), Options::default()).await);
    client.lock(lock(1)).await.expect("locked");
    let waiting = ask(&client, 2);
    keys_become(&store, &["l/1", "l/2"]).await;
    store.delete("l/2");
    store.delete("l/1");
    let ended = timeout(LONG, waiting).await.expect("in time").expect("whole");
    assert_status(ended, Code::Unknown, "mutex: session is expired");
}

/// History may be compacted away under whoever waits; waiting goes on.
#[tokio::test]
async fn compaction_wakes_no_waiter_and_loses_none() {
    let store = store_with(&[1, 2]);
    let mut client = LockClient::new(connect(store.clone(), Options::default()).await);
    client.lock(lock(1)).await.expect("locked");
    let waiting = ask(&client, 2);
    keys_become(&store, &["l/1", "l/2"]).await;
    store.put_one("other", "1");
    store.state().compacted = 4;
    store.put_one("other", "2");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished());
    store.delete("l/1");
    key(timeout(LONG, waiting).await.expect("in time").expect("whole"));
}

#[tokio::test]
async fn errors_lose_their_codes() {
    let store = store_with(&[1]);
    let channel = connect(store.clone(), Options::default()).await;
    let mut locks = LockClient::new(channel.clone());
    let mut elections = ElectionClient::new(channel);
    assert_status(
        locks.lock(lock(5)).await,
        Code::Unknown,
        "etcdserver: requested lease not found",
    );
    assert_status(
        locks.unlock(UnlockRequest::default()).await,
        Code::Unknown,
        "etcdserver: key is not provided",
    );
    let missing = "\"leader\" field must be provided";
    assert_status(
        elections.proclaim(ProclaimRequest::default()).await,
        Code::Unknown,
        missing,
    );
    assert_status(elections.resign(ResignRequest::default()).await, Code::Unknown, missing);
    let name = LeaderRequest { name: "l".into() };
    assert_status(elections.leader(name).await, Code::Unknown, "election: no leader");
    let stale = ProclaimRequest {
        leader: Some(LeaderKey {
            name: "l".into(),
            key: "l/1".into(),
            rev: 77,
            lease: 1,
        }),
        value: "v".into(),
    };
    assert_status(elections.proclaim(stale).await, Code::Unknown, "election: not leader");
    store.state().failure = Some(api::Error::NoLeader);
    assert_status(locks.lock(lock(1)).await, Code::Unknown, "etcdserver: no leader");
}

fn campaign(lease: LeaseId, value: &'static str) -> CampaignRequest {
    CampaignRequest {
        name: "l".into(),
        lease,
        value: value.into(),
    }
}

#[tokio::test]
async fn elections_have_one_leader_after_another() {
    let store = store_with(&[1, 2]);
    let mut client = ElectionClient::new(connect(store.clone(), Options::default()).await);
    let name = || LeaderRequest { name: "l".into() };
    let mut observed = client.observe(name()).await.expect("opens").into_inner();

    let won = client.campaign(campaign(1, "a")).await.expect("won").into_inner();
    let leader = won.leader.expect("there is one");
    assert_eq!((&*leader.name, &*leader.key), (&b"l"[..], &b"l/1"[..]));
    assert_eq!((leader.rev, leader.lease), (2, 1));
    let seen = timeout(LONG, observed.message())
        .await
        .expect("in time")
        .expect("whole")
        .expect("goes on");
    assert_eq!(seen.header.expect("has one").revision, 2);
    assert_eq!(&*seen.kv.expect("has one").value, b"a");

    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.campaign(campaign(2, "b")).await }
    });
    keys_become(&store, &["l/1", "l/2"]).await;
    let proclaim = ProclaimRequest {
        leader: Some(leader.clone()),
        value: "a2".into(),
    };
    let proclaimed = client.proclaim(proclaim).await.expect("leads").into_inner();
    assert_eq!(proclaimed.header.expect("has one").revision, 4);
    let seen = timeout(LONG, observed.message())
        .await
        .expect("in time")
        .expect("whole")
        .expect("goes on");
    assert_eq!(
        (
            seen.header.expect("has one").revision,
            &*seen.kv.expect("has one").value
        ),
        (4, &b"a2"[..])
    );
    let now = client.leader(name()).await.expect("there is one").into_inner();
    assert_eq!(&*now.kv.expect("has one").value, b"a2");

    let resign = ResignRequest { leader: Some(leader) };
    client.resign(resign.clone()).await.expect("resigned");
    let won = timeout(LONG, waiting)
        .await
        .expect("in time")
        .expect("whole")
        .expect("won")
        .into_inner();
    // The header is that of joining the line, as in etcd.
    assert_eq!(won.header.expect("has one").revision, 3);
    let seen = timeout(LONG, observed.message())
        .await
        .expect("in time")
        .expect("whole")
        .expect("goes on");
    assert_eq!(&*seen.kv.expect("has one").key, b"l/2");
    client.resign(resign).await.expect("there is nothing to resign");
    keys_become(&store, &["l/2"]).await;
}

#[tokio::test]
async fn a_campaign_with_another_value_proclaims_it() {
    let store = store_with(&[1]);
    let mut client = ElectionClient::new(connect(store.clone(), Options::default()).await);
    client.campaign(campaign(1, "a")).await.expect("won");
    let again = client.campaign(campaign(1, "b")).await.expect("leads").into_inner();
    assert_eq!(again.leader.expect("there is one").rev, 2);
    let now = client
        .leader(LeaderRequest { name: "l".into() })
        .await
        .expect("there is one");
    assert_eq!(&*now.into_inner().kv.expect("has one").value, b"b");
}

#[tokio::test]
async fn a_campaign_that_is_given_up_leaves_the_line() {
    let store = store_with(&[1, 2]);
    let mut client = ElectionClient::new(connect(store.clone(), Options::default()).await);
    client.campaign(campaign(1, "a")).await.expect("won");
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.campaign(campaign(2, "b")).await }
    });
    keys_become(&store, &["l/1", "l/2"]).await;
    waiting.abort();
    keys_become(&store, &["l/1"]).await;
}

#[tokio::test]
async fn a_campaign_does_not_win_with_a_key_that_is_gone() {
    let store = store_with(&[1, 2]);
    let mut client = ElectionClient::new(connect(store.clone(), Options::default()).await);
    client.campaign(campaign(1, "a")).await.expect("won");
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.campaign(campaign(2, "b")).await }
    });
    keys_become(&store, &["l/1", "l/2"]).await;
    store.delete("l/2");
    store.delete("l/1");
    let ended = timeout(LONG, waiting).await.expect("in time").expect("whole");
    assert_status(ended, Code::Unknown, "election: not leader");
}
