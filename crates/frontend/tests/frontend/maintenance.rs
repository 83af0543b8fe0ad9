//! The Maintenance service.

use api::kv::{AlarmAction, AlarmMember, AlarmRequest, AlarmType};
use api::{Error, Limits, Store};
use metastore_frontend::Options;
use metastore_frontend::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use metastore_frontend::proto::etcdserverpb::{
    DefragmentRequest, DowngradeRequest, HashKvRequest, HashKvResponse, HashRequest, MoveLeaderRequest,
    MoveLeaderResponse, SnapshotRequest, StatusRequest,
};
use tonic::Code;
use tonic::transport::Channel;

use crate::fake::Fake;
use crate::{assert_status, connect};

async fn client() -> (Fake, MaintenanceClient<Channel>) {
    let store = Fake::new(Limits::default());
    let channel = connect(store.clone(), Options::default()).await;
    (store, MaintenanceClient::new(channel))
}

#[tokio::test]
async fn alarms_go_to_the_store() {
    let (store, mut maintenance) = client().await;
    let mut requests = Vec::new();
    for action in [AlarmAction::Get, AlarmAction::Activate, AlarmAction::Deactivate] {
        for alarm in [AlarmType::None, AlarmType::Nospace, AlarmType::Corrupt] {
            let request = AlarmRequest {
                action: action.into(),
                member_id: 7,
                alarm: alarm.into(),
            };
            requests.push(request);
            let reply = maintenance.alarm(request).await.expect("answers").into_inner();
            assert_eq!(reply.header, Some(store.header()));
            let alarm = alarm.into();
            assert_eq!(reply.alarms, [AlarmMember { member_id: 7, alarm }]);
        }
    }
    assert_eq!(store.state().alarm_requests, requests);
}

#[tokio::test]
async fn unknown_alarms_do_not_get_into_the_log() {
    let (store, mut maintenance) = client().await;
    let request = |action, alarm| AlarmRequest {
        action,
        member_id: 0,
        alarm,
    };
    let refused = maintenance.alarm(request(3, 1)).await;
    assert_status(refused, Code::InvalidArgument, "metastore: unknown alarm action");
    let refused = maintenance.alarm(request(AlarmAction::Activate as i32, 3)).await;
    assert_status(refused, Code::InvalidArgument, "metastore: unknown alarm type");
    assert!(store.state().alarm_requests.is_empty());
    maintenance
        .alarm(request(AlarmAction::Get as i32, 3))
        .await
        .expect("there is none of that type");
}

#[tokio::test]
async fn hashes_say_what_they_cover() {
    let (store, mut maintenance) = client().await;
    for _ in 0..4 {
        store.put_one("k", "v");
    }
    for (revision, hash_revision) in [(0, 5), (3, 3)] {
        let reply = maintenance.hash_kv(HashKvRequest { revision }).await;
        let expected = HashKvResponse {
            header: Some(store.header()),
            hash: 0xfeed_beef,
            compact_revision: -1,
            hash_revision,
        };
        assert_eq!(reply.expect("hashes").into_inner(), expected);
    }
    assert_status(
        maintenance.hash_kv(HashKvRequest { revision: 6 }).await,
        Code::OutOfRange,
        "etcdserver: mvcc: required revision is a future revision",
    );
    store.state().compacted = 4;
    assert_status(
        maintenance.hash_kv(HashKvRequest { revision: 3 }).await,
        Code::OutOfRange,
        "etcdserver: mvcc: required revision has been compacted",
    );
}

#[tokio::test]
async fn only_the_leader_hands_leadership_over() {
    let (store, mut maintenance) = client().await;
    let moved = maintenance.move_leader(MoveLeaderRequest { target_id: 77 }).await;
    assert_eq!(moved.expect("moves").into_inner(), MoveLeaderResponse { header: None });
    assert_eq!(store.state().moved_to.take(), Some(77));

    for leader in [13, 0] {
        store.state().status.leader = leader;
        let refused = maintenance.move_leader(MoveLeaderRequest { target_id: 77 }).await;
        assert_status(refused, Code::FailedPrecondition, "etcdserver: not leader");
    }
    assert_eq!(store.state().moved_to, None);

    store.state().status.leader = 12;
    for (error, code) in [
        (Error::BadLeaderTransferee, Code::FailedPrecondition),
        (Error::TimeoutLeaderTransfer, Code::Unknown),
    ] {
        store.state().failure = Some(error);
        let refused = maintenance.move_leader(MoveLeaderRequest { target_id: 77 }).await;
        assert_status(refused, code, error.message());
    }
}

#[tokio::test]
async fn a_snapshot_comes_in_chunks_with_its_hash_last() {
    let (store, mut maintenance) = client().await;
    let mut snapshot = maintenance
        .snapshot(SnapshotRequest {})
        .await
        .expect("begins")
        .into_inner();
    let mut chunks = Vec::new();
    while let Some(chunk) = snapshot.message().await.expect("no error") {
        assert_eq!(chunk.version, "3.7.0");
        chunks.push((chunk.remaining_bytes, chunk.blob));
    }
    let expected: [(u64, bytes::Bytes); 3] = [2, 1, 0].map(|left| (left, vec![left as u8; 2].into()));
    assert_eq!(chunks, expected);

    store.state().failure = Some(Error::TooManyRequests);
    let refused = maintenance.snapshot(SnapshotRequest {}).await.map(drop);
    assert_eq!(
        refused.expect_err("too many").message(),
        Error::TooManyRequests.message()
    );
}

#[tokio::test]
async fn downgrades_and_hashes_go_to_the_store() {
    let (store, mut maintenance) = client().await;
    let request = |action: i32, version: &str| DowngradeRequest {
        action,
        version: version.to_owned(),
    };
    let reply = maintenance
        .downgrade(request(0, "3.6.0"))
        .await
        .expect("valid")
        .into_inner();
    assert_eq!((reply.version.as_str(), reply.header), ("3.7", Some(store.header())));
    assert_status(
        maintenance.downgrade(request(0, "3.5.0")).await,
        Code::InvalidArgument,
        "etcdserver: invalid downgrade target version",
    );
    maintenance.downgrade(request(1, "3.6.0")).await.expect("noted");
    let info = maintenance
        .status(StatusRequest {})
        .await
        .expect("answers")
        .into_inner()
        .downgrade_info;
    assert_eq!(
        info.map(|info| (info.enabled, info.target_version)),
        Some((true, "3.6.0".to_owned()))
    );
    maintenance.downgrade(request(2, "")).await.expect("forgotten");
    assert_status(
        maintenance.downgrade(request(3, "")).await,
        Code::Unknown,
        "etcdserver: unknown method",
    );
    let hashed = maintenance.hash(HashRequest {}).await.expect("hashes").into_inner();
    assert_eq!((hashed.hash, hashed.header), (77, Some(store.header())));
    let done = maintenance
        .defragment(DefragmentRequest {})
        .await
        .expect("done")
        .into_inner();
    assert_eq!(done.header, None);
}
