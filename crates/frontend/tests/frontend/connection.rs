//! A connection, as a client sees it that speaks HTTP/2 by itself.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use api::Limits;
use api::kv::{LeaseKeepAliveResponse, PutRequest, PutResponse, RangeRequest, RangeResponse};
use bytes::{BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use metastore_frontend::proto::etcdserverpb::watch_request::RequestUnion;
use metastore_frontend::proto::etcdserverpb::{LeaseKeepAliveRequest, WatchCreateRequest, WatchRequest};
use metastore_frontend::proto::v3lockpb::LockRequest;
use metastore_frontend::{ConnectionSettings, Frontend, Method, Observer, Options, serve_connection};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::fake::Fake;

const PUT: &str = "/etcdserverpb.KV/Put";
const RANGE: &str = "/etcdserverpb.KV/Range";
const LOCK: &str = "/v3lockpb.Lock/Lock";
const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";

type Served = JoinHandle<Result<(), String>>;

fn serve(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    store: Fake,
    settings: ConnectionSettings,
    options: Options,
) -> (Served, oneshot::Sender<()>) {
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(async move {
        let frontend = Frontend::new(store, options);
        let stop = async move {
            if stopped.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let served = serve_connection(io, frontend, &settings, stop).await;
        served.map_err(|error| error.to_string())
    });
    (served, stop)
}

pub(crate) struct Client {
    pub(crate) requests: SendRequest<Bytes>,
    served: Served,
    stop: oneshot::Sender<()>,
}

impl Client {
    pub(crate) async fn new(store: Fake, options: Options) -> Self {
        let (client, server) = tokio::io::duplex(64 << 10);
        let (served, stop) = serve(server, store, ConnectionSettings::default(), options);
        Client {
            requests: handshake(client).await,
            served,
            stop,
        }
    }

    /// Begins a call; the body is the caller's to send.
    async fn begin(&mut self, path: &str, headers: &[(&'static str, &str)]) -> (ResponseFuture, SendStream<Bytes>) {
        let mut request = Request::post(format!("http://fake{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        poll_fn(|context| self.requests.poll_ready(context))
            .await
            .expect("it is open");
        self.requests
            .send_request(request.body(()).expect("whole"), false)
            .expect("it is open")
    }

    /// Makes a call whose body comes in these pieces.
    async fn call(&mut self, path: &str, pieces: &[&[u8]]) -> Answer {
        let (response, mut body) = self.begin(path, &[]).await;
        for piece in pieces {
            // A server that has seen enough may have ended the stream; its answer says why.
            let _ = body.send_data(Bytes::copy_from_slice(piece), false);
            // So that it is a read of its own.
            tokio::task::yield_now().await;
        }
        let _ = body.send_data(Bytes::new(), true);
        answer(response).await.expect("an answer")
    }
}

async fn handshake(io: DuplexStream) -> SendRequest<Bytes> {
    let (requests, connection) = h2::client::handshake(io).await.expect("HTTP/2");
    tokio::spawn(connection);
    requests
}

struct Answer {
    /// HTTP's.
    status: u16,
    code: i32,
    text: String,
    message: Bytes,
    headers: HeaderMap,
}

async fn answer(response: ResponseFuture) -> Result<Answer, h2::Error> {
    read(response.await?.into_parts()).await
}

async fn read((head, mut body): (http::response::Parts, RecvStream)) -> Result<Answer, h2::Error> {
    let mut data = BytesMut::new();
    while let Some(piece) = body.data().await {
        let piece = piece?;
        body.flow_control()
            .release_capacity(piece.len())
            .expect("it was received");
        data.extend_from_slice(&piece);
    }
    let trailers = body.trailers().await?;
    let status = trailers.as_ref().unwrap_or(&head.headers);
    let field = |name| status.get(name).map_or("", |value| value.to_str().expect("text"));
    let message = if data.is_empty() {
        Bytes::new()
    } else {
        data.freeze().slice(5..)
    };
    Ok(Answer {
        status: head.status.as_u16(),
        code: field("grpc-status").parse().expect("a number"),
        text: field("grpc-message").to_owned(),
        message,
        headers: head.headers,
    })
}

fn framed(message: &impl Message) -> Vec<u8> {
    let mut framed = vec![0];
    framed.put_u32(message.encoded_len() as u32);
    message.encode(&mut framed).expect("it grows");
    framed
}

fn put(key: &str, value_len: usize) -> PutRequest {
    PutRequest {
        key: key.to_owned().into(),
        value: vec![7; value_len].into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_request_may_come_in_any_pieces() {
    let store = Fake::new(Limits::default());
    let mut client = Client::new(store.clone(), Options::default()).await;
    let whole = framed(&put("a", 20));
    for cut in 0..=whole.len() {
        let (first, rest) = whole.split_at(cut);
        let answer = client.call(PUT, &[first, rest]).await;
        assert_eq!((answer.code, &*answer.text), (0, ""), "cut at {cut}");
        PutResponse::decode(answer.message).expect("a reply");
    }
    let bytes: Vec<&[u8]> = whole.chunks(1).collect();
    assert_eq!(client.call(PUT, &bytes).await.code, 0, "byte by byte");
    let large = framed(&put("large", 1 << 20));
    assert_eq!(client.call(PUT, &[&large]).await.code, 0, "more than a window");
    let range = RangeRequest {
        key: "large".into(),
        ..Default::default()
    };
    let answer = client.call(RANGE, &[&framed(&range)]).await;
    assert_eq!(answer.headers["content-type"], "application/grpc");
    let response = RangeResponse::decode(answer.message).expect("a reply");
    assert_eq!(response.kvs[0].value.len(), 1 << 20);
    let all = RangeRequest {
        key: "a".into(),
        range_end: "z".into(),
        ..Default::default()
    };
    let answer = client.call(RANGE, &[&framed(&all)]).await;
    let response = RangeResponse::decode(answer.message).expect("a reply");
    assert_eq!(response.kvs.len(), 2, "read by a task of its own");
}

#[tokio::test]
async fn malformed_requests_are_refused_and_cost_one_call() {
    let mut client = Client::new(Fake::new(Limits::default()), Options::default()).await;
    let whole = framed(&put("a", 20));
    let mut compressed = whole.clone();
    compressed[0] = 1;
    let mut odd = whole.clone();
    odd[0] = 9;
    let twice = [&whole[..], &whole[..]].concat();
    let mut garbage = whole.clone();
    garbage[5..].fill(0xff);
    for (what, body, text) in [
        ("nothing", &[][..], "Missing request message."),
        ("a part of the prefix", &whole[..3], "Missing request message."),
        ("a part of the message", &whole[..9], "Unexpected EOF decoding stream."),
        (
            "compressed",
            &compressed,
            "protocol error: received message with compressed-flag",
        ),
        (
            "an odd flag",
            &odd,
            "protocol error: received message with invalid compression flag: 9",
        ),
        ("two messages", &twice, "more than one message in a unary call"),
        ("no protobuf", &garbage, "grpc: error unmarshalling request: "),
    ] {
        let answer = client.call(PUT, &[body]).await;
        let found = answer.text.replace("%20", " ").replace("%3A", ":");
        assert_eq!(answer.code, 13, "{what}: {found}");
        assert!(found.starts_with(text), "{what}: {found}");
    }
    let too_large = client.call(PUT, &[&[0, 0xff, 0xff, 0xff, 0xff]]).await;
    assert_eq!(too_large.code, 8, "{}", too_large.text);
    let (response, mut body) = client.begin(PUT, &[("grpc-encoding", "gzip")]).await;
    body.send_data(compressed.into(), true).expect("room");
    assert_eq!(answer(response).await.expect("an answer").code, 12, "not offered");
    assert_eq!(client.call(PUT, &[&whole]).await.code, 0, "the connection lives on");
}

/// The connection's own task answers what keeps leases alive, many on one stream, and nobody waits for all of them.
#[tokio::test]
async fn leases_that_are_kept_alive_hold_nobody_up() {
    // A task's turn comes after those before it, which is not so for the test's own future.
    tokio::spawn(keep_many_leases_alive()).await.expect("no panic");
}

fn kept_alive(store: &Fake, id: i64) -> LeaseKeepAliveResponse {
    LeaseKeepAliveResponse {
        header: Some(store.state().header()),
        id,
        ttl: if id % 2 == 0 { 3600 } else { 0 },
    }
}

async fn keep_many_leases_alive() {
    const LEASES: i64 = 2000;
    const STREAMS: i64 = 100;
    let (store, ends, mut client) = observed().await;
    let (keeping, mut body) = client.begin(KEEP_ALIVE, &[]).await;
    let all = (0..LEASES).flat_map(|at| framed(&LeaseKeepAliveRequest { id: 1000 + at }));
    body.send_data(all.collect(), false).expect("room");
    let (response, mut body_of_put) = client.begin(PUT, &[]).await;
    body_of_put.send_data(framed(&put("a", 1)).into(), true).expect("room");
    assert_eq!(answer(response).await.expect("an answer").code, 0);

    let mut replies = keeping.await.expect("opens").into_body();
    let mut received = BytesMut::new();
    let mut early = None;
    for id in 1000..1000 + LEASES {
        let reply = loop {
            let length = received
                .get(1..5)
                .map(|length| u32::from_be_bytes(length.try_into().expect("four")) as usize);
            match length {
                Some(length) if received.len() >= 5 + length => break received.split_to(5 + length).split_off(5),
                _ => {}
            }
            let piece = match futures::future::FutureExt::now_or_never(replies.data()) {
                Some(piece) => piece,
                None => {
                    early.get_or_insert(id - 1000);
                    replies.data().await
                }
            };
            let piece = piece.expect("goes on").expect("whole");
            replies.flow_control().release_capacity(piece.len()).expect("received");
            received.extend_from_slice(&piece);
        };
        let reply = LeaseKeepAliveResponse::decode(reply).expect("a reply");
        assert_eq!((reply.id, reply.ttl), (id, if id % 2 == 0 { 3600 } else { 0 }));
    }
    let early = early.expect("the put did not wait for all of them");
    assert!(early < LEASES / 2, "{early} before the put");
    {
        let state = store.state();
        assert!(
            state.kept_alive_by.is_some() && state.kept_alive_by == state.put_by,
            "by one task"
        );
    }

    // Many streams that have something to do at once, of which only some are gone on with at a time. Those send nothing at
    // first, so that nothing else moves the others on.
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let (keeping, body) = client.begin(KEEP_ALIVE, &[]).await;
        streams.push((keeping.await.expect("opens"), body));
    }
    for (id, (_, body)) in (0..).zip(&mut streams) {
        let requests = [id, id + STREAMS].map(|id| framed(&LeaseKeepAliveRequest { id }));
        body.send_data(requests.concat().into(), true).expect("room");
    }
    // All are read at once: a client does not let too many small replies lie about either.
    let streams: Vec<_> = streams
        .into_iter()
        .map(|(response, _)| tokio::spawn(read(response.into_parts())))
        .collect();
    for (id, stream) in (0..).zip(streams) {
        let stream = tokio::time::timeout(Duration::from_secs(60), stream).await;
        let answer = stream.expect("its turn comes").expect("no panic").expect("an answer");
        assert_eq!(answer.code, 0);
        // The first prefix is gone.
        let reply = |id| framed(&kept_alive(&store, id));
        assert_eq!(answer.message, [reply(id), reply(id + STREAMS)].concat()[5..]);
    }

    // What ends such a stream ends it alone.
    let keep = |id| framed(&LeaseKeepAliveRequest { id });
    let panicked = client.call(KEEP_ALIVE, &[&keep(2), &keep(666), &keep(4)]).await;
    assert_eq!(panicked.code, 13, "{}", panicked.text);
    let cut = client.call(KEEP_ALIVE, &[&keep(2)[..6]]).await;
    assert_eq!(cut.code, 13, "{}", cut.text);
    let (late, _body) = client.begin(KEEP_ALIVE, &[("grpc-timeout", "10m")]).await;
    assert_eq!(answer(late).await.expect("an answer").code, 4);
    let (given_up, mut body_of_it) = client.begin(KEEP_ALIVE, &[]).await;
    body_of_it.send_data(keep(2).into(), false).expect("room");
    let mut replies_of_it = given_up.await.expect("opens").into_body();
    replies_of_it.data().await.expect("goes on").expect("whole");
    body_of_it.send_reset(Reason::CANCEL);
    let cancelled = async {
        while ends.0.lock().expect("whole").last() != Some(&1) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), cancelled)
        .await
        .expect("it ends as cancelled");
    body.send_data(keep(8).into(), true).expect("room");
    let last = replies.data().await.expect("goes on").expect("whole");
    assert_eq!(LeaseKeepAliveResponse::decode(&last[5..]).expect("a reply").id, 8);
    assert!(replies.data().await.is_none());
    let trailers = replies.trailers().await.expect("ends well").expect("they say so");
    assert_eq!(trailers["grpc-status"], "0");
}

/// Many leases are kept alive at once, each by a frame of its own, as etcd's Go client does it.
#[tokio::test]
async fn a_burst_of_small_frames_is_taken() {
    const LEASES: i64 = 50_000;
    let (client, server) = tokio::io::duplex(4 << 20);
    let store = Fake::new(Limits::default());
    let (_served, _stop) = serve(server, store, ConnectionSettings::default(), Options::default());
    let mut requests = handshake(client).await;
    let request = Request::post(format!("http://fake{KEEP_ALIVE}")).header("content-type", "application/grpc");
    let (keeping, mut body) = requests
        .send_request(request.body(()).expect("whole"), false)
        .expect("it is open");
    let mut replies = keeping.await.expect("opens").into_body();
    for id in 0..LEASES {
        let keep = framed(&LeaseKeepAliveRequest { id: 1000 + id });
        body.send_data(keep.into(), id + 1 == LEASES).expect("room");
    }
    let mut bytes = 0;
    while let Some(piece) = replies.data().await {
        let piece = piece.expect("goes on");
        replies.flow_control().release_capacity(piece.len()).expect("received");
        bytes += piece.len();
    }
    let trailers = replies.trailers().await.expect("ends well").expect("they say so");
    assert_eq!(trailers["grpc-status"], "0");
    assert!(bytes as i64 > LEASES * 10, "{bytes} bytes");
}

/// What must be text and is none, in messages and in headers.
#[tokio::test]
async fn text_that_is_none_is_refused() {
    let mut client = Client::new(Fake::new(Limits::default()), Options::default()).await;
    // A user of this name.
    let name = [0, 0, 0, 0, 4, 0x0a, 2, 0xff, 0xfe];
    let refused = client.call("/etcdserverpb.Auth/UserAdd", &[&name]).await;
    assert_eq!(refused.code, 13, "{}", refused.text);
    for (field, code) in [("client-api-version", 3), ("token", 0), ("hasleader", 0), ("x", 0)] {
        let request = Request::post(format!("http://fake{PUT}"))
            .header("content-type", "application/grpc")
            .header(field, HeaderValue::from_bytes(b"\xff\xfe").expect("it may be sent"));
        let request = request.body(()).expect("whole");
        let (response, mut body) = client.requests.send_request(request, false).expect("it is open");
        body.send_data(framed(&put("a", 1)).into(), true).expect("room");
        let answer = answer(response).await.expect("an answer");
        assert_eq!(answer.code, code, "{field}: {}", answer.text);
    }
}

/// Headers beyond what a client may send cost it its call, and far more of them its connection.
#[tokio::test]
async fn headers_have_a_bound() {
    let mut client = Client::new(Fake::new(Limits::default()), Options::default()).await;
    let (response, _body) = client.begin(PUT, &[("x", &"x".repeat(70 << 10))]).await;
    assert_eq!(response.await.expect("an answer").status(), 431);
    assert_eq!(client.call(PUT, &[&framed(&put("a", 1))]).await.code, 0);
    let (response, _body) = client.begin(PUT, &[("x", &"x".repeat(1 << 20))]).await;
    let error = response.await.expect_err("it is refused");
    assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM), "{error}");
    let error = client.served.await.expect("no panic").expect_err("it ends");
    assert!(error.contains("excessive load"), "{error}");
}

/// Notes how calls ended.
#[derive(Default)]
struct Ends(std::sync::Mutex<Vec<usize>>);

impl Observer for Ends {
    fn handled(&self, _: &'static Method, code: usize, _: Duration) {
        self.0.lock().expect("whole").push(code);
    }
}

async fn observed() -> (Fake, Arc<Ends>, Client) {
    let store = Fake::new(Limits::default());
    let ends = Arc::new(Ends::default());
    let options = Options {
        observer: ends.clone(),
        ..Options::default()
    };
    let client = Client::new(store.clone(), options).await;
    (store, ends, client)
}

#[tokio::test]
async fn a_call_that_is_given_up_ends_as_cancelled() {
    let (store, ends, mut client) = observed().await;
    let (response, mut body) = client.begin(PUT, &[]).await;
    body.send_data(framed(&put("wait", 1)).into(), true).expect("room");
    let (other, mut body_of_other) = client.begin(PUT, &[]).await;
    body_of_other
        .send_data(framed(&put("wait", 1)).into(), true)
        .expect("room");
    // It was begun, since one after it was answered.
    assert_eq!(client.call(PUT, &[&framed(&put("a", 1))]).await.code, 0);
    body.send_reset(Reason::CANCEL);
    drop(response);
    let given_up = async {
        while ends.0.lock().expect("whole").len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), given_up)
        .await
        .expect("it ends though nothing released it");
    assert_eq!(*ends.0.lock().expect("whole"), [0, 1]);
    store.release.notify_waiters();
    assert_eq!(answer(other).await.expect("an answer").code, 0, "others go on");
}

/// The client sends its deadline and does not keep it itself.
#[tokio::test(start_paused = true)]
async fn a_call_ends_at_its_deadline() {
    const LONG: Duration = Duration::from_secs(10);
    let store = Fake::new(Limits::default());
    store.state().leases.extend([1, 2]);
    let ends = Arc::new(Ends::default());
    let options = Options {
        observer: ends.clone(),
        ..Options::default()
    };
    let mut client = Client::new(store.clone(), options).await;
    let lock = |lease| {
        framed(&LockRequest {
            name: "l".into(),
            lease,
        })
    };
    let keys = async || {
        let range = RangeRequest {
            key: "l".into(),
            range_end: "m".into(),
            ..Default::default()
        };
        let found = api::Store::range(&store, range).await.expect("reads");
        found.kvs.into_iter().map(|kv| kv.key).collect::<Vec<_>>()
    };
    assert_eq!(client.call(LOCK, &[&lock(1)]).await.code, 0, "the lock was free");

    let begun = tokio::time::Instant::now();
    let (waiting, mut body) = client.begin(LOCK, &[("grpc-timeout", "300m")]).await;
    body.send_data(lock(2).into(), true).expect("room");
    let ended = tokio::time::timeout(LONG, answer(waiting)).await.expect("in time");
    let ended = ended.expect("an answer");
    let text = ended.text.replace("%20", " ");
    assert_eq!((ended.code, &*text), (4, "context deadline exceeded"));
    assert!(begun.elapsed() >= Duration::from_millis(300));
    let left = async {
        while keys().await != ["l/1"] {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LONG, left).await.expect("its key leaves the line");

    // A stream ends as well, whatever it has said before.
    let (stream, mut body) = client
        .begin("/etcdserverpb.Watch/Watch", &[("grpc-timeout", "100m")])
        .await;
    let all = WatchCreateRequest {
        range_end: vec![0].into(),
        ..Default::default()
    };
    let create = WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(all)),
    };
    body.send_data(framed(&create).into(), false).expect("room");
    let ended = tokio::time::timeout(LONG, answer(stream)).await.expect("in time");
    let ended = ended.expect("an answer");
    assert_eq!((ended.code, &*ended.text.replace("%20", " ")), (4, &*text));
    assert!(!ended.message.is_empty(), "the watch was created");
    assert_eq!(*ends.0.lock().expect("whole"), [0, 4, 4]);

    for (timeout, code, status) in [("0n", 4, 200), ("1x", 13, 400)] {
        let (refused, mut body) = client.begin(LOCK, &[("grpc-timeout", timeout)]).await;
        body.send_data(lock(2).into(), true).expect("room");
        let refused = answer(refused).await.expect("an answer");
        assert_eq!(refused.code, code, "{timeout}");
        assert_eq!(refused.status, status, "{timeout}");
    }
    let (held, mut body) = client.begin(LOCK, &[("grpc-timeout", "99999999H")]).await;
    body.send_data(lock(1).into(), true).expect("room");
    assert_eq!(answer(held).await.expect("an answer").code, 0, "a long deadline is one");
}

#[tokio::test]
async fn calls_under_way_are_answered_before_the_connection_ends() {
    let store = Fake::new(Limits::default());
    let mut client = Client::new(store.clone(), Options::default()).await;
    let (response, mut body) = client.begin(PUT, &[]).await;
    body.send_data(framed(&put("wait", 1)).into(), true).expect("room");
    assert_eq!(client.call(PUT, &[&framed(&put("a", 1))]).await.code, 0);
    client.stop.send(()).expect("it runs");
    tokio::task::yield_now().await;
    assert!(!client.served.is_finished(), "a call is under way");
    store.release.notify_waiters();
    assert_eq!(answer(response).await.expect("an answer").code, 0);
    drop(client.requests);
    assert_eq!(client.served.await.expect("no panic"), Ok(()));
}

#[tokio::test]
async fn what_is_not_grpc_gets_an_answer_of_http() {
    let mut client = Client::new(Fake::new(Limits::default()), Options::default()).await;
    let request = Request::get("http://fake/health").body(()).expect("whole");
    let (response, _) = client.requests.send_request(request, true).expect("it is open");
    let response: Response<_> = response.await.expect("an answer");
    assert_eq!(response.status(), 200);
    assert!(response.headers().contains_key("date"), "{:?}", response.headers());
    let mut body = response.into_body();
    let data = body.data().await.expect("a body").expect("whole");
    assert_eq!(&data[..], br#"{"health":"true","reason":""}"#);
}

/// Over HTTP, an answer of which nothing is taken for too long ends; its connection and its other answers do not.
#[tokio::test(start_paused = true)]
async fn an_answer_that_nobody_takes_ends() {
    const VALUE_BYTES: usize = 1 << 20;
    let store = Fake::new(Limits::default());
    store.put_one("large", &"v".repeat(VALUE_BYTES));
    let mut client = Client::new(store, Options::default()).await;
    let get = async |client: &mut Client| {
        let request = Request::get("http://fake/api/v1/kv/large").body(()).expect("whole");
        let (response, _) = client.requests.send_request(request, true).expect("it is open");
        let response = response.await.expect("an answer");
        assert_eq!(response.status(), 200);
        response.into_body()
    };
    let timeout = ConnectionSettings::default().http_stall_timeout;

    let mut body = get(&mut client).await;
    let begun = tokio::time::Instant::now();
    let mut taken = 0;
    let error = loop {
        match body.data().await.expect("it does not end well") {
            Ok(piece) => taken += piece.len(),
            Err(error) => break error,
        }
    };
    assert_eq!(error.reason(), Some(Reason::CANCEL));
    // As much as HTTP/2 lets a client have unasked.
    assert!(taken < 100_000, "{taken}");
    let took = begun.elapsed();
    assert!(took >= timeout && took < timeout * 2, "{took:?}");

    // What it has not taken would count against the window of the whole connection.
    drop(body);

    // One that takes a little now and then gets all of it, however long that takes.
    let mut body = get(&mut client).await;
    let (begun, mut taken) = (tokio::time::Instant::now(), 0);
    while let Some(piece) = body.data().await {
        let piece = piece.expect("it goes on");
        taken += piece.len();
        tokio::time::sleep(timeout / 20).await;
        body.flow_control()
            .release_capacity(piece.len())
            .expect("it was received");
    }
    assert_eq!(taken, VALUE_BYTES);
    assert!(begun.elapsed() > timeout, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_answers_no_ping_is_dropped() {
    let settings = ConnectionSettings {
        keepalive_interval: Some(Duration::from_secs(30)),
        keepalive_timeout: Duration::from_secs(5),
        ..ConnectionSettings::default()
    };
    let (client, server) = tokio::io::duplex(64 << 10);
    let (served, _stop) = serve(
        server,
        Fake::new(Limits::default()),
        settings.clone(),
        Options::default(),
    );
    let (_requests, connection) = h2::client::handshake::<_>(client).await.expect("HTTP/2");
    // Nobody moves the connection: no ping is seen, let alone answered.
    let begun = tokio::time::Instant::now();
    let error = served.await.expect("no panic").expect_err("it is dropped");
    assert_eq!(error, "the client left a ping unanswered");
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_secs(35) && took < Duration::from_secs(40),
        "{took:?}"
    );
    drop(connection);

    let (client, server) = tokio::io::duplex(64 << 10);
    let (served, _stop) = serve(server, Fake::new(Limits::default()), settings, Options::default());
    let _requests = handshake(client).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert!(!served.is_finished(), "one that answers stays");
}

/// Counts writes.
struct Counting {
    io: DuplexStream,
    writes: Arc<AtomicUsize>,
}

impl AsyncRead for Counting {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counting {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

/// What a commit answers at once goes out at once, and so does what is read for requests that came together.
#[tokio::test]
async fn replies_that_are_ready_together_are_written_together() {
    let store = Fake::new(Limits::default());
    store.put_one("key", &"v".repeat(300));
    let (client, server) = tokio::io::duplex(1 << 20);
    let writes = Arc::new(AtomicUsize::new(0));
    let counting = Counting {
        io: server,
        writes: writes.clone(),
    };
    let (served, stop) = serve(
        counting,
        store.clone(),
        ConnectionSettings::default(),
        Options::default(),
    );
    let mut client = Client {
        requests: handshake(client).await,
        served,
        stop,
    };
    assert_eq!(client.call(PUT, &[&framed(&put("a", 1))]).await.code, 0);
    for (path, message) in [
        (PUT, framed(&put("wait", 1))),
        (
            RANGE,
            framed(&RangeRequest {
                key: "key".into(),
                ..Default::default()
            }),
        ),
    ] {
        let before = writes.load(Ordering::Relaxed);
        let mut answers = Vec::new();
        for _ in 0..50 {
            let (response, mut body) = client.begin(path, &[]).await;
            body.send_data(message.clone().into(), true).expect("room");
            answers.push(response);
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        api::wake::together(|| store.release.notify_waiters());
        for response in answers {
            assert_eq!(answer(response).await.expect("an answer").code, 0);
        }
        let writes = writes.load(Ordering::Relaxed) - before;
        assert!(writes < 10, "{path}: {writes} writes for 50 replies");
    }
}
