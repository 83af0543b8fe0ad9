//! What every call goes through.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::Limits;
use api::kv::{PutRequest, RangeRequest, RangeResponse};
use http::uri::PathAndQuery;
use metastore_frontend::etcd::codec::Codec;
use metastore_frontend::observer::CODE_NAMES;
use metastore_frontend::proto::etcdserverpb::kv_client::KvClient;
use metastore_frontend::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use metastore_frontend::proto::etcdserverpb::watch_client::WatchClient;
use metastore_frontend::proto::etcdserverpb::watch_request::RequestUnion;
use metastore_frontend::proto::etcdserverpb::{DefragmentRequest, StatusRequest, WatchCreateRequest, WatchRequest};
use metastore_frontend::{Method, Observer, Options};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::fake::Fake;
use crate::{assert_status, connect};

fn range() -> RangeRequest {
    RangeRequest {
        key: "k".into(),
        ..Default::default()
    }
}

fn with_metadata<T>(message: T, key: &'static str, value: &[u8]) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::<Ascii>::try_from(value).expect("a header value");
    request.metadata_mut().insert(key, value);
    request
}

async fn call_path(channel: &Channel, path: &'static str) -> Result<Response<RangeResponse>, Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.expect("connected");
    let codec = Codec::<RangeRequest, RangeResponse>::default();
    client
        .unary(Request::new(range()), PathAndQuery::from_static(path), codec)
        .await
}

#[tokio::test]
async fn unknown_methods_are_named() {
    let channel = connect(Fake::new(Limits::default()), Options::default()).await;
    for (path, text) in [
        ("/foo.Bar/Baz", "unknown service foo.Bar"),
        (
            "/etcdserverpb.KV/Nope",
            "unknown method Nope for service etcdserverpb.KV",
        ),
    ] {
        assert_status(call_path(&channel, path).await, Code::Unimplemented, text);
    }
}

#[tokio::test]
async fn too_large_messages_are_refused_in_grpc_go_words() {
    let limits = Limits::default();
    let max = limits.grpc_receive_bytes_max();
    let channel = connect(Fake::new(limits), Options::default()).await;
    let text = |size| format!("grpc: received message larger than max ({size} vs. {max})");

    let fits = PutRequest {
        key: "k".into(),
        value: vec![0; max - 7].into(),
        ..Default::default()
    };
    assert_eq!(fits.encoded_len(), max);
    let larger = PutRequest {
        key: "kk".into(),
        ..fits.clone()
    };
    let mut kv = KvClient::new(channel.clone());
    kv.put(fits).await.expect("fits");
    assert_status(kv.put(larger).await, Code::ResourceExhausted, &text(max + 1));

    let create = WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
            key: vec![1; max].into(),
            ..Default::default()
        })),
    };
    let size = create.encoded_len();
    let mut watch = WatchClient::new(channel);
    let mut replies = watch
        .watch(tokio_stream::once(create))
        .await
        .expect("opens")
        .into_inner();
    assert_status(replies.message().await, Code::ResourceExhausted, &text(size));
    kv.range(range()).await.expect("the connection lives on");
}

#[tokio::test]
async fn metadata_is_held_against_etcds_rules() {
    let store = Fake::new(Limits::default());
    let mut kv = KvClient::new(connect(store.clone(), Options::default()).await);
    let bad = kv.range(with_metadata(range(), "client-api-version", b"3\xff7")).await;
    assert_status(bad, Code::InvalidArgument, "etcdserver: invalid client api version");
    kv.range(with_metadata(range(), "hasleader", b"true"))
        .await
        .expect("there is one");
    store.state().status.leader = 0;
    let leaderless = kv.range(with_metadata(range(), "hasleader", b"true")).await;
    assert_status(leaderless, Code::Unavailable, "etcdserver: no leader");
    kv.range(with_metadata(range(), "hasleader", b"false"))
        .await
        .expect("does not ask for one");
}

#[tokio::test]
async fn a_panic_costs_one_call() {
    let mut kv = KvClient::new(connect(Fake::new(Limits::default()), Options::default()).await);
    let key = "panic".into();
    let panicked = kv.range(RangeRequest { key, ..range() }).await;
    assert_status(
        panicked,
        Code::Internal,
        "metastore: internal error, see the server's log",
    );
    kv.range(range()).await.expect("the connection lives on");
}

fn watch_all() -> WatchRequest {
    WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
            range_end: vec![0].into(),
            ..Default::default()
        })),
    }
}

#[tokio::test(start_paused = true)]
async fn streams_that_need_a_leader_end_without_one() {
    let store = Fake::new(Limits::default());
    let mut client = WatchClient::new(connect(store.clone(), Options::default()).await);
    let requests = || tokio_stream::StreamExt::chain(tokio_stream::once(watch_all()), tokio_stream::pending());
    let mut needing = client
        .watch(with_metadata(requests(), "hasleader", b"true"))
        .await
        .expect("there is one")
        .into_inner();
    let mut other = client.watch(requests()).await.expect("opens").into_inner();
    assert!(needing.message().await.expect("replies").expect("replies").created);
    assert!(other.message().await.expect("replies").expect("replies").created);
    let begin = tokio::time::Instant::now();
    store.state().status.leader = 0;
    assert_status(needing.message().await, Code::Unavailable, "etcdserver: no leader");
    assert!(
        begin.elapsed() >= Duration::from_secs(2),
        "after three election timeouts: {:?}",
        begin.elapsed()
    );
    store.put_one("k", "v");
    assert_eq!(
        other.message().await.expect("replies").expect("replies").events.len(),
        1
    );
    let again = client.watch(with_metadata(requests(), "hasleader", b"true")).await;
    assert_status(again, Code::Unavailable, "etcdserver: no leader");
}

#[tokio::test]
async fn streams_end_when_the_server_stops() {
    let (stop, stopping) = watch::channel(false);
    let options = Options {
        stopping: Some(stopping),
        ..Options::default()
    };
    let mut client = WatchClient::new(connect(Fake::new(Limits::default()), options).await);
    let requests = tokio_stream::StreamExt::chain(tokio_stream::once(watch_all()), tokio_stream::pending());
    let mut replies = client.watch(requests).await.expect("opens").into_inner();
    assert!(replies.message().await.expect("replies").expect("replies").created);
    stop.send_replace(true);
    assert_status(replies.message().await, Code::Unavailable, "etcdserver: server stopped");
}

#[derive(Default)]
struct Counts {
    started: AtomicU64,
    received: AtomicU64,
    received_bytes: AtomicU64,
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    handled: Mutex<Vec<String>>,
    versions: Mutex<Vec<String>>,
}

impl Observer for Counts {
    fn started(&self, _: &'static Method) {
        self.started.fetch_add(1, Relaxed);
    }

    fn handled(&self, method: &'static Method, code: usize, _: Duration) {
        self.handled
            .lock()
            .expect("whole")
            .push(format!("{} {}", method.name, CODE_NAMES[code]));
    }

    fn received(&self, _: &'static Method, messages: u64, bytes: u64) {
        self.received.fetch_add(messages, Relaxed);
        self.received_bytes.fetch_add(bytes, Relaxed);
    }

    fn sent(&self, _: &'static Method, messages: u64, bytes: u64) {
        self.sent.fetch_add(messages, Relaxed);
        self.sent_bytes.fetch_add(bytes, Relaxed);
    }

    fn client_version(&self, method: &'static Method, version: &str) {
        let version = format!("{} {version}", method.kind.label());
        self.versions.lock().expect("whole").push(version);
    }
}

#[tokio::test]
async fn every_call_is_counted() {
    let counts = Arc::new(Counts::default());
    let observer: Arc<dyn Observer> = counts.clone();
    let options = Options {
        observer,
        ..Options::default()
    };
    let channel = connect(Fake::new(Limits::default()), options).await;
    let mut kv = KvClient::new(channel.clone());
    let reply = kv
        .range(with_metadata(range(), "client-api-version", b"3.7"))
        .await
        .expect("reads");
    let sent = reply.into_inner().encoded_len() as u64;
    assert_eq!(counts.received.load(Relaxed), 1);
    assert_eq!(counts.received_bytes.load(Relaxed), range().encoded_len() as u64);
    assert_eq!((counts.sent.load(Relaxed), counts.sent_bytes.load(Relaxed)), (1, sent));

    kv.range(RangeRequest::default()).await.expect_err("no key");
    let mut maintenance = MaintenanceClient::new(channel.clone());
    maintenance.status(StatusRequest {}).await.expect("answers");
    maintenance.defragment(DefragmentRequest {}).await.expect("answers");
    let mut watch = WatchClient::new(channel.clone());
    let (requests, receiver) = mpsc::channel(1);
    requests.send(watch_all()).await.expect("open");
    let replies = watch.watch(ReceiverStream::new(receiver)).await;
    let mut replies = replies.expect("opens").into_inner();
    replies.message().await.expect("replies");
    drop((requests, replies));
    call_path(&channel, "/foo.Bar/Baz")
        .await
        .expect_err("unknown, and not counted");
    let all_ended = async {
        while counts.handled.lock().expect("whole").len() < 5 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    // Should it run out, the comparison says which one is missing.
    drop(timeout(Duration::from_secs(10), all_ended).await);
    let handled = [
        "Range OK",
        "Range InvalidArgument",
        "Status OK",
        "Defragment OK",
        "Watch Canceled",
    ];
    assert_eq!(*counts.handled.lock().expect("whole"), handled);
    assert_eq!(counts.started.load(Relaxed), 5);
    let versions = [
        "unary 3.7",
        "unary unknown",
        "unary unknown",
        "unary unknown",
        "bidi_stream unknown",
    ];
    assert_eq!(*counts.versions.lock().expect("whole"), versions);
}
