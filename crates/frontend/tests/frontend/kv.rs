//! KV, Lease, Auth and health calls, and Status.

use api::auth::{AuthStatusRequest, AuthenticateRequest};
use api::kv::*;
use api::limits::{ETCD_CLUSTER_VERSION, ETCD_VERSION};
use api::{Error, Limits};
use bytes::Bytes;
use metastore_frontend::Options;
use metastore_frontend::proto::etcdserverpb::auth_client::AuthClient;
use metastore_frontend::proto::etcdserverpb::kv_client::KvClient;
use metastore_frontend::proto::etcdserverpb::lease_client::LeaseClient;
use metastore_frontend::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use metastore_frontend::proto::etcdserverpb::*;
use metastore_frontend::proto::health::HealthCheckRequest;
use metastore_frontend::proto::health::health_check_response::ServingStatus;
use metastore_frontend::proto::health::health_client::HealthClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::fake::Fake;
use crate::{assert_status, connect};

async fn kv(store: &Fake) -> KvClient<Channel> {
    KvClient::new(connect(store.clone(), Options::default()).await).max_decoding_message_size(usize::MAX)
}

fn range(key: &str, range_end: &str) -> RangeRequest {
    RangeRequest {
        key: key.to_owned().into(),
        range_end: range_end.to_owned().into(),
        ..Default::default()
    }
}

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..Default::default()
    }
}

fn put_op(key: &str) -> RequestOp {
    RequestOp {
        request: Some(RequestOpKind::Put(put(key, "v"))),
    }
}

#[tokio::test]
async fn bad_requests_get_etcds_code_and_text() {
    let mut kv = kv(&Fake::new(Limits::default())).await;
    let refused = |text: &'static str| (Code::InvalidArgument, text);

    let (code, text) = refused("etcdserver: key is not provided");
    assert_status(kv.range(range("", "")).await, code, text);
    assert_status(kv.range_stream(range("", "")).await, code, text);
    assert_status(kv.put(put("", "v")).await, code, text);
    assert_status(kv.delete_range(DeleteRangeRequest::default()).await, code, text);
    let compare = vec![Compare::default()];
    assert_status(
        kv.txn(TxnRequest {
            compare,
            ..Default::default()
        })
        .await,
        code,
        text,
    );

    let (code, text) = refused("etcdserver: invalid sort option");
    assert_status(
        kv.range(RangeRequest {
            sort_order: 3,
            ..range("k", "")
        })
        .await,
        code,
        text,
    );
    assert_status(
        kv.range(RangeRequest {
            sort_target: -1,
            ..range("k", "")
        })
        .await,
        code,
        text,
    );

    let (code, text) = refused("etcdserver: value is provided");
    assert_status(
        kv.put(PutRequest {
            ignore_value: true,
            ..put("k", "v")
        })
        .await,
        code,
        text,
    );
    let (code, text) = refused("etcdserver: lease is provided");
    let lease = PutRequest {
        ignore_lease: true,
        lease: 1,
        ..put("k", "")
    };
    assert_status(kv.put(lease).await, code, text);

    let txn = |success| TxnRequest {
        success,
        ..Default::default()
    };
    let (code, text) = refused("etcdserver: too many operations in txn request");
    let ops = (0..129).map(|i| put_op(&format!("k{i}"))).collect();
    assert_status(kv.txn(txn(ops)).await, code, text);
    let (code, text) = refused("etcdserver: duplicate key given in txn request");
    assert_status(kv.txn(txn(vec![put_op("k"), put_op("k")])).await, code, text);
    let (code, text) = refused("etcdserver: key not found");
    assert_status(kv.txn(txn(vec![RequestOp::default()])).await, code, text);
}

#[tokio::test]
async fn what_the_store_refuses_keeps_code_and_text() {
    let store = Fake::new(Limits::default());
    let mut kv = kv(&store).await;
    for &error in Error::ALL {
        store.state().failure = Some(error);
        let code = Code::from_i32(error.code() as i32);
        assert_status(kv.range(range("k", "")).await, code, error.message());
        assert_status(kv.put(put("k", "v")).await, code, error.message());
        assert_status(kv.compact(CompactionRequest::default()).await, code, error.message());
    }
}

#[tokio::test]
async fn a_put_is_read_back() {
    let mut kv = kv(&Fake::new(Limits::default())).await;
    let large = "x".repeat(1 << 20);
    let written = kv.put(put("k", &large)).await.expect("puts").into_inner();
    assert_eq!(written.header.expect("has one").revision, 2);
    let read = kv.range(range("k", "")).await.expect("reads").into_inner();
    assert_eq!(read.kvs[0].value, large);
    let header = read.header.expect("has one");
    assert_eq!(
        (header.cluster_id, header.member_id, header.revision, header.raft_term),
        (11, 12, 2, 13)
    );
}

async fn parts(kv: &mut KvClient<Channel>, request: RangeRequest) -> Result<Vec<RangeResponse>, Status> {
    let mut stream = kv.range_stream(request).await?.into_inner();
    let mut parts = Vec::new();
    while let Some(part) = stream.message().await? {
        parts.push(part.range_response.expect("every part has one"));
    }
    Ok(parts)
}

fn sizes(parts: &[RangeResponse]) -> Vec<usize> {
    parts.iter().map(|part| part.kvs.len()).collect()
}

#[track_caller]
fn assert_only_the_last_has_a_header(parts: &[RangeResponse]) {
    let (last, others) = parts.split_last().expect("at least one");
    assert!(last.header.is_some());
    for part in others {
        assert_eq!((&part.header, part.more, part.count), (&None, false, 0));
    }
}

/// 100 keys of 5 bytes with values of 100 bytes each.
fn hundred() -> Fake {
    let store = Fake::new(Limits {
        request_bytes_max: 4096,
        ..Limits::default()
    });
    store.put_all((0..100).map(|i| (format!("key{i:02}"), vec![b'x'; 100])));
    store
}

#[tokio::test]
async fn a_streamed_range_comes_in_growing_parts_of_one_revision() {
    let store = hundred();
    store.state().write_after_scan = true;
    let mut kv = kv(&store).await;
    let parts = parts(&mut kv, range("key", "kez")).await.expect("reads");
    // Ten keys are 1,200 bytes: less than half of 4,096. Twenty are more, and stay.
    assert_eq!(sizes(&parts), [10, 20, 20, 20, 20, 10]);
    assert_only_the_last_has_a_header(&parts);
    let last = parts.last().expect("checked");
    assert_eq!(last.header.as_ref().expect("checked").revision, 2);
    assert_eq!((last.more, last.count), (false, 100));
    let keys: Vec<Bytes> = parts
        .iter()
        .flat_map(|part| &part.kvs)
        .map(|kv| kv.key.clone())
        .collect();
    let expected: Vec<String> = (0..100).map(|i| format!("key{i:02}")).collect();
    assert_eq!(keys, expected);
    let scans = std::mem::take(&mut store.state().scans);
    assert!(
        !scans[0].serializable && scans[0].revision == 0,
        "the first part is linearizable"
    );
    assert!(scans[1..].iter().all(|scan| scan.serializable && scan.revision == 2));
}

#[tokio::test]
async fn a_streamed_range_honours_its_limit_and_counts_the_rest() {
    let store = hundred();
    let mut kv = kv(&store).await;
    let limited = RangeRequest {
        limit: 25,
        ..range("key", "kez")
    };
    let read = parts(&mut kv, limited).await.expect("reads");
    assert_eq!(sizes(&read), [10, 15]);
    assert_only_the_last_has_a_header(&read);
    assert_eq!((read[1].more, read[1].count), (true, 100));

    let small = RangeRequest {
        limit: 3,
        ..range("key", "kez")
    };
    let read = parts(&mut kv, small).await.expect("reads");
    assert_eq!((sizes(&read), read[0].more, read[0].count), (vec![3], true, 100));

    let all = RangeRequest {
        limit: 100,
        ..range("\0", "\0")
    };
    let read = parts(&mut kv, all).await.expect("reads");
    assert_eq!(
        (sizes(&read).iter().sum::<usize>(), read.last().expect("some").more),
        (100, false)
    );

    let read = parts(&mut kv, range("nothing", "")).await.expect("reads");
    assert_eq!((sizes(&read), read[0].count), (vec![0], 0));
    assert!(read[0].header.is_some());
}

#[tokio::test]
async fn a_streamed_range_can_leave_values_or_keys_out() {
    let store = hundred();
    let mut kv = kv(&store).await;
    let keys_only = RangeRequest {
        keys_only: true,
        ..range("key", "kez")
    };
    let read = parts(&mut kv, keys_only).await.expect("reads");
    assert_eq!(sizes(&read), [10, 20, 40, 30]);
    assert!(read.iter().flat_map(|part| &part.kvs).all(|kv| kv.value.is_empty()));

    let count_only = RangeRequest {
        count_only: true,
        limit: 1,
        ..range("key", "kez")
    };
    let read = parts(&mut kv, count_only).await.expect("reads");
    assert_eq!((sizes(&read), read[0].more, read[0].count), (vec![0], false, 100));
}

#[tokio::test]
async fn parts_of_large_values_shrink() {
    let store = Fake::new(Limits {
        request_bytes_max: 1000,
        ..Limits::default()
    });
    store.put_all((0..12).map(|i| (format!("key{i:02}"), vec![b'x'; 1500])));
    let read = parts(&mut kv(&store).await, range("key", "kez")).await.expect("reads");
    // Two values reach the byte limit; more than twice the target halves what is asked for.
    assert_eq!(sizes(&read), [2, 2, 2, 1, 1, 1, 1, 1, 1]);
    assert_eq!(read.last().expect("some").count, 12);
}

#[tokio::test]
async fn a_streamed_range_refuses_what_etcds_does() {
    let store = hundred();
    let mut kv = kv(&store).await;
    let text = "RangeStream does not support custom sort orders";
    for (sort_order, sort_target) in [(2, 0), (1, 1), (2, 4)] {
        let sorted = RangeRequest {
            sort_order,
            sort_target,
            ..range("key", "kez")
        };
        assert_status(kv.range_stream(sorted).await, Code::Unimplemented, text);
    }
    for (sort_order, sort_target) in [(1, 0), (0, 3)] {
        let sorted = RangeRequest {
            sort_order,
            sort_target,
            ..range("key", "kez")
        };
        parts(&mut kv, sorted)
            .await
            .expect("key order is the order of a stream");
    }
    let text = "RangeStream does not support revision filters";
    let filtered = RangeRequest {
        max_create_revision: 1,
        ..range("key", "kez")
    };
    assert_status(kv.range_stream(filtered).await, Code::Unimplemented, text);

    let text = "etcdserver: mvcc: required revision is a future revision";
    let future = RangeRequest {
        revision: 9,
        ..range("key", "kez")
    };
    assert_status(parts(&mut kv, future).await, Code::OutOfRange, text);
}

#[tokio::test]
async fn leases_are_kept_alive_in_order() {
    let mut leases = LeaseClient::new(connect(Fake::new(Limits::default()), Options::default()).await);
    let requests = (0..100).map(|id| LeaseKeepAliveRequest { id });
    let mut replies = leases
        .lease_keep_alive(tokio_stream::iter(requests))
        .await
        .expect("opens")
        .into_inner();
    for id in 0..100 {
        let reply = replies.message().await.expect("replies").expect("one for each");
        assert_eq!((reply.id, reply.ttl), (id, if id % 2 == 0 { 3600 } else { 0 }));
    }
    assert_eq!(replies.message().await.expect("ends well"), None);

    let granted = leases
        .lease_grant(LeaseGrantRequest { ttl: 5, id: 7 })
        .await
        .expect("grants")
        .into_inner();
    assert_eq!((granted.id, granted.ttl), (7, 5));
    let missing = leases.lease_revoke(LeaseRevokeRequest { id: 1 }).await;
    assert_status(missing, Code::NotFound, "etcdserver: requested lease not found");
    let left = leases
        .lease_time_to_live(LeaseTimeToLiveRequest { id: 1, keys: false })
        .await;
    assert_eq!(left.expect("answers").into_inner().ttl, -1);
    let all = leases
        .lease_leases(LeaseLeasesRequest {})
        .await
        .expect("lists")
        .into_inner();
    assert_eq!(all.leases, [LeaseStatus { id: 5 }]);
}

#[tokio::test]
async fn status_auth_and_health_are_told() {
    let store = Fake::new(Limits::default());
    let channel = connect(store, Options::default()).await;
    let mut maintenance = MaintenanceClient::new(channel.clone());
    let status = maintenance
        .status(StatusRequest {})
        .await
        .expect("answers")
        .into_inner();
    assert_eq!(
        (status.version.as_str(), status.storage_version.as_str()),
        (ETCD_VERSION, ETCD_CLUSTER_VERSION)
    );
    assert_eq!(
        (status.db_size, status.db_size_in_use, status.db_size_quota),
        (100, 50, 1000)
    );
    assert_eq!(
        (
            status.leader,
            status.raft_index,
            status.raft_applied_index,
            status.raft_term
        ),
        (12, 20, 19, 13)
    );
    assert_eq!(status.downgrade_info, Some(DowngradeInfo::default()));

    let mut auth = AuthClient::new(channel.clone());
    let status = auth
        .auth_status(AuthStatusRequest {})
        .await
        .expect("answers")
        .into_inner();
    assert_eq!((status.enabled, status.auth_revision), (false, 1));
    let login = auth.authenticate(AuthenticateRequest::default()).await;
    assert_status(
        login,
        Code::FailedPrecondition,
        "etcdserver: authentication is not enabled",
    );

    let mut health = HealthClient::new(channel);
    let check = |service: &str| HealthCheckRequest {
        service: service.to_owned(),
    };
    let checked = health.check(check("")).await.expect("answers").into_inner();
    assert_eq!(checked.status(), ServingStatus::Serving);
    assert_status(health.check(check("other")).await, Code::NotFound, "unknown service");
    let mut watched = health.watch(check("")).await.expect("opens").into_inner();
    let first = watched.message().await.expect("answers").expect("at once");
    assert_eq!(first.status(), ServingStatus::Serving);
}
