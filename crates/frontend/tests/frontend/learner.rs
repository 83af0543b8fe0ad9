//! What a member without a vote answers.

use api::Limits;
use api::kv::{AlarmRequest, CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest};
use metastore_frontend::Options;
use metastore_frontend::etcd::codec::Codec;
use metastore_frontend::proto::etcdserverpb::kv_client::KvClient;
use metastore_frontend::proto::etcdserverpb::lease_client::LeaseClient;
use metastore_frontend::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use metastore_frontend::proto::etcdserverpb::watch_client::WatchClient;
use metastore_frontend::proto::etcdserverpb::{SnapshotRequest, StatusRequest, WatchRequest};
use metastore_frontend::{CallKind, Method, methods};
use tonic::transport::Channel;
use tonic::{Code, Request};

use crate::fake::Fake;
use crate::{assert_status, connect};

const TEXT: &str = "etcdserver: rpc not supported for learner";

async fn learner() -> (Fake, Channel) {
    let store = Fake::new(Limits::default());
    store.state().status.is_learner = true;
    let channel = connect(store.clone(), Options::default()).await;
    (store, channel)
}

fn range(serializable: bool) -> RangeRequest {
    RangeRequest {
        key: "k".into(),
        serializable,
        ..Default::default()
    }
}

#[tokio::test]
async fn learners_serve_status_and_serializable_ranges() {
    let (store, channel) = learner().await;
    let mut kv = KvClient::new(channel.clone());
    kv.range(range(true)).await.expect("reads what it has");
    assert_status(kv.range(range(false)).await, Code::FailedPrecondition, TEXT);
    // Before the request itself is looked at.
    assert_status(kv.range(RangeRequest::default()).await, Code::FailedPrecondition, TEXT);
    let mut maintenance = MaintenanceClient::new(channel);
    let status = maintenance.status(StatusRequest {}).await.expect("answers");
    assert!(status.into_inner().is_learner);

    store.state().status.is_learner = false;
    kv.range(range(false)).await.expect("promoted");
}

#[tokio::test]
async fn learners_refuse_all_other_calls() {
    let (store, channel) = learner().await;
    let served = |method: &Method| {
        matches!(
            (method.service, method.name),
            ("etcdserverpb.KV", "Range") | ("etcdserverpb.Maintenance", "Status" | "Snapshot")
        )
    };
    let mut refused = 0;
    for method in methods().filter(|method| !served(method)) {
        // None of them gets as far as reading its request.
        let path = format!("/{}/{}", method.service, method.name).parse().expect("a path");
        let codec = Codec::<RangeRequest, RangeRequest>::default();
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.expect("connected");
        let code_and_text = match method.kind {
            CallKind::Unary => client.unary(Request::new(range(true)), path, codec).await.map(drop),
            _ => {
                let requests = tokio_stream::once(range(true));
                client.streaming(Request::new(requests), path, codec).await.map(drop)
            }
        };
        let status = code_and_text.expect_err(method.name);
        let answer = (status.code(), status.message());
        assert_eq!(
            answer,
            (Code::FailedPrecondition, TEXT),
            "{}.{}",
            method.service,
            method.name
        );
        refused += 1;
    }
    assert!(refused > 40, "{refused}");

    // The same through clients, for some of them.
    let mut kv = KvClient::new(channel.clone());
    assert_status(kv.put(PutRequest::default()).await, Code::FailedPrecondition, TEXT);
    assert_status(
        kv.delete_range(DeleteRangeRequest::default()).await,
        Code::FailedPrecondition,
        TEXT,
    );
    assert_status(
        kv.compact(CompactionRequest::default()).await,
        Code::FailedPrecondition,
        TEXT,
    );
    assert_status(kv.range_stream(range(true)).await, Code::FailedPrecondition, TEXT);
    let mut lease = LeaseClient::new(channel.clone());
    assert_status(
        lease.lease_grant(LeaseGrantRequest::default()).await,
        Code::FailedPrecondition,
        TEXT,
    );
    let mut watch = WatchClient::new(channel.clone());
    let watched = watch.watch(tokio_stream::pending::<WatchRequest>()).await;
    assert_status(watched, Code::FailedPrecondition, TEXT);
    let mut maintenance = MaintenanceClient::new(channel.clone());
    let alarms = maintenance.alarm(AlarmRequest::default()).await;
    assert_status(alarms, Code::FailedPrecondition, TEXT);
    let mut snapshot = maintenance
        .snapshot(SnapshotRequest {})
        .await
        .expect("begins")
        .into_inner();
    assert!(
        snapshot.message().await.expect("a chunk").is_some(),
        "a snapshot is let through"
    );

    // A leader that is missing does not matter to a call that is refused anyway.
    store.state().status.leader = 0;
    let mut request = Request::new(PutRequest::default());
    request
        .metadata_mut()
        .insert("hasleader", "true".parse().expect("a value"));
    assert_status(kv.put(request).await, Code::FailedPrecondition, TEXT);
}
