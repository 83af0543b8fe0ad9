//! Watch streams.

use std::time::Duration;

use api::Limits;
use api::kv::EventType;
use metastore_frontend::Options;
use metastore_frontend::proto::etcdserverpb::watch_client::WatchClient;
use metastore_frontend::proto::etcdserverpb::watch_request::RequestUnion;
use metastore_frontend::proto::etcdserverpb::{
    WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
};
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::connect;
use crate::fake::Fake;

/// A watch stream as its client holds it.
struct Client {
    requests: mpsc::Sender<WatchRequest>,
    replies: Streaming<WatchResponse>,
}

impl Client {
    async fn open(store: &Fake) -> Self {
        let mut client =
            WatchClient::new(connect(store.clone(), Options::default()).await).max_decoding_message_size(usize::MAX);
        let (requests, receiver) = mpsc::channel(16);
        let replies = client
            .watch(ReceiverStream::new(receiver))
            .await
            .expect("opens")
            .into_inner();
        Client { requests, replies }
    }

    async fn send(&self, request: RequestUnion) {
        let request = WatchRequest {
            request_union: Some(request),
        };
        self.requests.send(request).await.expect("the stream is open");
    }

    async fn create(&self, create: WatchCreateRequest) {
        self.send(RequestUnion::CreateRequest(create)).await;
    }

    async fn cancel(&self, watch_id: i64) {
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }))
            .await;
    }

    async fn ask_for_progress(&self) {
        self.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    }

    async fn reply(&mut self) -> WatchResponse {
        self.replies
            .message()
            .await
            .expect("replies")
            .expect("the stream is open")
    }
}

fn on(key: &str) -> WatchCreateRequest {
    WatchCreateRequest {
        key: key.to_owned().into(),
        ..Default::default()
    }
}

fn prefix(key: &str, end: &str) -> WatchCreateRequest {
    WatchCreateRequest {
        range_end: end.to_owned().into(),
        ..on(key)
    }
}

fn revision(reply: &WatchResponse) -> i64 {
    reply.header.as_ref().expect("every reply has one").revision
}

fn keys(reply: &WatchResponse) -> Vec<&[u8]> {
    reply
        .events
        .iter()
        .map(|event| &*event.kv.as_ref().expect("has one").key)
        .collect()
}

#[tokio::test]
async fn created_comes_first_then_history_then_what_happens() {
    let store = Fake::new(Limits::default());
    store.put_one("a1", "x");
    store.put_one("b1", "x");
    let mut client = Client::open(&store).await;
    client
        .create(WatchCreateRequest {
            start_revision: 1,
            ..prefix("a", "b")
        })
        .await;
    let created = client.reply().await;
    assert!(created.created && !created.canceled && created.events.is_empty());
    assert_eq!((created.watch_id, revision(&created)), (0, 3));
    let header = created.header.expect("checked");
    assert_eq!((header.cluster_id, header.member_id, header.raft_term), (11, 12, 13));

    let history = client.reply().await;
    assert_eq!((keys(&history), revision(&history)), (vec![&b"a1"[..]], 2));
    store.put_all([("a2".to_owned(), vec![1]), ("a3".to_owned(), vec![2])]);
    store.delete("a1");
    let live = client.reply().await;
    assert_eq!((keys(&live), revision(&live)), (vec![&b"a2"[..], &b"a3"[..]], 4));
    let deleted = client.reply().await;
    assert_eq!(deleted.events[0].r#type(), EventType::Delete);
    assert_eq!(revision(&deleted), 5);
}

#[tokio::test]
async fn ids_are_chosen_kept_and_refused() {
    let store = Fake::new(Limits::default());
    let mut client = Client::open(&store).await;
    client.create(on("k")).await;
    client.create(WatchCreateRequest { watch_id: 7, ..on("k") }).await;
    client.create(on("k")).await;
    client.create(WatchCreateRequest { watch_id: 7, ..on("k") }).await;
    client.create(prefix("k", "k")).await;
    client
        .create(WatchCreateRequest {
            start_revision: -1,
            ..on("k")
        })
        .await;
    for id in [0, 7, 1] {
        let created = client.reply().await;
        assert_eq!((created.watch_id, created.created, created.canceled), (id, true, false));
        assert_eq!(created.cancel_reason, "");
    }
    for reason in [
        "mvcc: duplicate watch ID provided on the WatchStream",
        "mvcc: watcher range is empty",
        "etcdserver: mvcc: required revision has been compacted",
    ] {
        let refused = client.reply().await;
        assert_eq!((refused.watch_id, refused.created, refused.canceled), (-1, true, true));
        assert_eq!((refused.cancel_reason.as_str(), refused.compact_revision), (reason, 0));
        assert_eq!(revision(&refused), 1);
    }
}

#[tokio::test]
async fn a_cancelled_watcher_says_so_and_falls_silent() {
    let store = Fake::new(Limits::default());
    let mut client = Client::open(&store).await;
    client.create(on("k")).await;
    client.create(on("k")).await;
    client.reply().await;
    client.reply().await;
    client.cancel(99).await;
    client.cancel(0).await;
    let cancelled = client.reply().await;
    assert_eq!(
        (cancelled.watch_id, cancelled.canceled, cancelled.created),
        (0, true, false)
    );
    assert_eq!((cancelled.cancel_reason.as_str(), revision(&cancelled)), ("", 1));
    store.put_one("k", "v");
    assert_eq!(client.reply().await.watch_id, 1);
    client.ask_for_progress().await;
    let progress = client.reply().await;
    assert_eq!(
        (progress.watch_id, revision(&progress), progress.events.len()),
        (-1, 2, 0)
    );
}

#[tokio::test]
async fn an_empty_key_and_end_zero_watch_everything() {
    let store = Fake::new(Limits::default());
    let mut client = Client::open(&store).await;
    client.create(prefix("", "\0")).await;
    client.reply().await;
    store.put_one("anything", "v");
    assert_eq!(keys(&client.reply().await), [b"anything"]);
}

#[tokio::test]
async fn filters_leave_events_out() {
    let store = Fake::new(Limits::default());
    let mut client = Client::open(&store).await;
    client
        .create(WatchCreateRequest {
            filters: vec![0, 9],
            ..on("k")
        })
        .await;
    client
        .create(WatchCreateRequest {
            filters: vec![1],
            ..on("k")
        })
        .await;
    client.reply().await;
    client.reply().await;
    store.put_one("k", "v");
    assert_eq!(client.reply().await.watch_id, 1);
    store.delete("k");
    assert_eq!(client.reply().await.watch_id, 0);
}

#[tokio::test]
async fn a_compacted_start_is_created_then_cancelled() {
    let store = Fake::new(Limits::default());
    for _ in 0..5 {
        store.put_one("k", "v");
    }
    store.state().compacted = 4;
    let mut client = Client::open(&store).await;
    client
        .create(WatchCreateRequest {
            start_revision: 2,
            ..on("k")
        })
        .await;
    let created = client.reply().await;
    assert!(created.created && !created.canceled);
    let cancelled = client.reply().await;
    assert!(cancelled.canceled && !cancelled.created);
    assert_eq!(
        (cancelled.watch_id, cancelled.compact_revision, revision(&cancelled)),
        (0, 4, 0)
    );
    assert_eq!(cancelled.cancel_reason, "");
    // etcd's client cancels it all the same, and gets its answer.
    client.cancel(0).await;
    let again = client.reply().await;
    assert_eq!((again.watch_id, again.canceled, again.compact_revision), (0, true, 0));
}

#[tokio::test(start_paused = true)]
async fn idle_watchers_that_asked_get_progress() {
    let store = Fake::new(Limits::default());
    let mut client = Client::open(&store).await;
    client
        .create(WatchCreateRequest {
            progress_notify: true,
            ..on("k")
        })
        .await;
    client.create(on("k")).await;
    client.reply().await;
    client.reply().await;
    let begin = tokio::time::Instant::now();
    for _ in 0..3 {
        let progress = client.reply().await;
        assert_eq!(
            (progress.watch_id, revision(&progress), progress.events.len()),
            (0, 1, 0)
        );
    }
    let elapsed = begin.elapsed();
    assert!(
        elapsed >= Duration::from_secs(1800) && elapsed <= Duration::from_secs(1981),
        "{elapsed:?}"
    );
}

#[tokio::test]
async fn large_replies_are_split_for_those_who_asked() {
    let store = Fake::new(Limits::default());
    let max = Limits::default().grpc_receive_bytes_max();
    let mut client = Client::open(&store).await;
    client.create(prefix("k", "l")).await;
    client.reply().await;
    client
        .create(WatchCreateRequest {
            fragment: true,
            ..prefix("k", "l")
        })
        .await;
    client.reply().await;
    store.put_all((0..5).map(|i| (format!("k{i}"), vec![0; 1_000_000])));
    store.put_one("k", "small");

    // The stream reports one watcher after the other.
    let whole = client.reply().await;
    assert_eq!((whole.watch_id, whole.events.len(), whole.fragment), (0, 5, false));
    assert_eq!(client.reply().await.watch_id, 0);
    for (expected, more) in [
        (vec![b"k0", b"k1"], true),
        (vec![b"k2", b"k3"], true),
        (vec![b"k4"], false),
    ] {
        let part = client.reply().await;
        assert_eq!((part.watch_id, part.fragment, revision(&part)), (1, more, 2));
        assert_eq!(keys(&part), expected);
        assert!(part.encoded_len() < max);
    }
    let small = client.reply().await;
    assert_eq!((small.watch_id, small.fragment, small.events.len()), (1, false, 1));
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_the_store_back_and_loses_nothing() {
    const EVENTS: i64 = 2000;
    let store = Fake::new(Limits::default());
    let mut client = Client::open(&store).await;
    client.create(on("k")).await;
    client.reply().await;
    for _ in 0..EVENTS {
        store.put_all([("k".to_owned(), vec![0; 10_000])]);
    }
    let mut before = usize::MAX;
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let outputs = store.state().outputs;
        if outputs == before {
            break;
        }
        before = outputs;
    }
    // What has left the store lies in windows and buffers, whose sizes do not depend on the number of events.
    assert!(before < 400, "{before} of {EVENTS} events were taken by nobody");
    for expected in 2..EVENTS + 2 {
        assert_eq!(revision(&client.reply().await), expected);
    }
}

#[tokio::test]
async fn watchers_outlive_the_last_request() {
    let store = Fake::new(Limits::default());
    let mut client = Client::open(&store).await;
    client.create(on("k")).await;
    client.reply().await;
    let Client { requests, mut replies } = client;
    drop(requests);
    let quiet = timeout(Duration::from_millis(50), replies.message()).await;
    assert!(quiet.is_err(), "the stream stays open");
    store.put_one("k", "v");
    assert_eq!(keys(&replies.message().await.expect("replies").expect("open")), [b"k"]);
}

#[tokio::test]
async fn unknown_requests_are_ignored() {
    let store = Fake::new(Limits::default());
    let mut client = Client::open(&store).await;
    client.requests.send(WatchRequest::default()).await.expect("open");
    client.ask_for_progress().await;
    client.create(on("k")).await;
    assert!(client.reply().await.created, "nothing but this is answered");
}
