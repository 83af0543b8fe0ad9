//! The JSON gateway, as a browser or curl sees it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use api::{Error, Limits};
use axum::body::Body;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use metastore_frontend::{
    Access, ClientCertificate, ConnectionSettings, Frontend, Listener, Observer, Options, ResponseBody, Traffic,
    methods, serve_connection,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tower::ServiceExt;

use crate::fake::Fake;

const LONG: Duration = Duration::from_secs(10);
const HEADER: &str = r#""header":{"cluster_id":"11","member_id":"12","revision":"REV","raft_term":"13"}"#;

fn header(revision: i64) -> String {
    HEADER.replace("REV", &revision.to_string())
}

async fn answer(frontend: &Frontend<Fake>, request: Request<Body>) -> Response<ResponseBody> {
    match frontend.clone().oneshot(request).await {
        Ok(response) => response,
        Err(impossible) => match impossible {},
    }
}

fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).body(body.into()).expect("whole")
}

async fn text(response: Response<ResponseBody>) -> String {
    let body = timeout(LONG, response.into_body().collect()).await.expect("in time");
    String::from_utf8(body.expect("whole").to_bytes().to_vec()).expect("text")
}

async fn call(frontend: &Frontend<Fake>, path: &str, body: &str) -> (u16, String) {
    let response = answer(frontend, post(path, body.to_owned())).await;
    (response.status().as_u16(), text(response).await)
}

/// The next line of a stream.
async fn line(response: &mut Response<ResponseBody>) -> String {
    let frame = timeout(LONG, response.body_mut().frame()).await.expect("in time");
    let data = frame.expect("goes on").expect("whole").into_data().expect("data");
    String::from_utf8(data.to_vec()).expect("text")
}

#[tokio::test]
async fn calls_are_translated_both_ways() {
    let store = Fake::new(Limits::default());
    let frontend = Frontend::new(store.clone(), Options::default());
    let put = call(&frontend, "/v3/kv/put", r#"{"key":"Zm9v","value":"YmFy"}"#).await;
    assert_eq!(put, (200, format!("{{{}}}", header(2))));
    let kv = r#""kvs":[{"key":"Zm9v","create_revision":"2","mod_revision":"2","version":"1","value":"YmFy"}]"#;
    let found = (200, format!(r#"{{{},{kv},"count":"1"}}"#, header(2)));
    for body in [
        r#"{"key":"Zm9v"}"#,
        r#" {"key" : "Zm9v" , "limit": 1e1, "sortOrder":"ASCEND", "sort_target":3} trailing"#,
        r#"{"key":"Zm9v","unknown":{"a":[1,"x",null,{}]},"limit":"5","keysOnly":null}"#,
        r#"{"key":"Zm9v","sort_order":"NO_SUCH_ORDER"}"#,
        r#"{"key":"Zm9"}"#,
        r#"{"key":"\u005am9v"}"#,
    ] {
        let expected = match body.contains(r#""Zm9""#) {
            true => (200, format!("{{{}}}", header(2))),
            false => found.clone(),
        };
        assert_eq!(call(&frontend, "/v3/kv/range", body).await, expected, "{body}");
        assert_eq!(call(&frontend, "/v3beta/kv/range", body).await, expected, "{body}");
    }
    let txn = r#"{"compare":[{"target":"CREATE","key":"Zm9v","create_revision":"2"}],
        "success":[{"request_range":{"key":"Zm9v"}},{"requestDeleteRange":{"key":"Zm9v"}}]}"#;
    let range = format!(r#"{{"response_range":{{{},{kv},"count":"1"}}}}"#, header(2));
    let delete = format!(r#"{{"response_delete_range":{{{},"deleted":"1"}}}}"#, header(3));
    let expected = format!(r#"{{{},"succeeded":true,"responses":[{range},{delete}]}}"#, header(3));
    assert_eq!(call(&frontend, "/v3/kv/txn", txn).await, (200, expected));
    let members = call(&frontend, "/v3/cluster/member/list", "").await;
    let member = r#"{"ID":"12","name":"fake","peerURLs":["http://fake:2380"],"clientURLs":["http://fake:2379"]}"#;
    let expected = format!(
        r#"{{{},"members":[{member}]}}"#,
        header(0).replace(r#""revision":"0","#, "")
    );
    assert_eq!(members, (200, expected));
    let hash = call(&frontend, "/v3/maintenance/hashkv", "{}").await.1;
    assert!(hash.contains(r#""hash":4276993775,"compact_revision":"-1""#), "{hash}");
    let alarm = r#"{"action":"ACTIVATE","memberID":12,"alarm":"NOSPACE"}"#;
    let alarms = call(&frontend, "/v3/maintenance/alarm", alarm).await.1;
    assert!(
        alarms.contains(r#""alarms":[{"memberID":"12","alarm":"NOSPACE"}]"#),
        "{alarms}"
    );

    let response = answer(&frontend, post("/v3/kv/range", r#"{"key":"Zm9v"}"#)).await;
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(response.headers()["grpc-metadata-content-type"], "application/grpc");
    assert_eq!(response.headers()["access-control-allow-origin"], "*");
}

#[tokio::test]
async fn errors_are_those_of_grpc_gateway() {
    let store = Fake::new(Limits::default());
    let frontend = Frontend::new(store.clone(), Options::default());
    for (path, body, status, code, message) in [
        ("/v3/kv/range", "", 400, 3, "etcdserver: key is not provided"),
        ("/v3/kv/range", "{", 400, 3, "unexpected EOF"),
        (
            "/v3/kv/range",
            "x",
            400,
            3,
            "invalid character 'x' looking for beginning of value",
        ),
        (
            "/v3/kv/range",
            "\n null",
            400,
            3,
            "proto: syntax error (line 1:1): unexpected token null",
        ),
        (
            "/v3/kv/range",
            r#"{"key":5}"#,
            400,
            3,
            "proto: (line 1:8): invalid value for bytes field key: 5",
        ),
        (
            "/v3/kv/range",
            "{\"key\":\n  \"%\"}",
            400,
            3,
            r#"proto: (line 2:3): invalid value for bytes field key: "%""#,
        ),
        (
            "/v3/kv/range",
            r#"{"key":"","range_end":{}}"#,
            400,
            3,
            "proto: (line 1:23): invalid value for bytes field rangeEnd: {",
        ),
        (
            "/v3/kv/range",
            r#"{"key":"","key":""}"#,
            400,
            3,
            "proto: (line 1:11): duplicate field \"key\"",
        ),
        (
            "/v3/kv/range",
            r#"{"limit":1.5}"#,
            400,
            3,
            "proto: (line 1:10): invalid value for int64 field limit: 1.5",
        ),
        (
            "/v3/kv/range",
            r#"{"limit":"9223372036854775808"}"#,
            400,
            3,
            r#"proto: (line 1:10): invalid value for int64 field limit: "9223372036854775808""#,
        ),
        (
            "/v3/kv/range",
            r#"{"serializable":"true"}"#,
            400,
            3,
            r#"proto: (line 1:17): invalid value for bool field serializable: "true""#,
        ),
        (
            "/v3/cluster/member/add",
            r#"{"peerURLs":"http://a:1"}"#,
            400,
            3,
            r#"proto: syntax error (line 1:13): unexpected token "http://a:1""#,
        ),
        (
            "/v3/cluster/member/add",
            r#"{"peerURLs":["\ud800\u0041"]}"#,
            400,
            3,
            r#"proto: syntax error (line 1:14): invalid escape code "\\u0041" in string"#,
        ),
        (
            "/v3/kv/txn",
            r#"{"success":[{"request_put":{},"request_range":{}}]}"#,
            400,
            3,
            "proto: (line 1:31): error parsing \"request_range\", oneof etcdserverpb.RequestOp.request is already set",
        ),
        (
            "/v3/kv/range",
            r#"{"key":"AA==","revision":"9"}"#,
            400,
            11,
            "etcdserver: mvcc: required revision is a future revision",
        ),
        (
            "/v3/lease/revoke",
            r#"{"ID":1}"#,
            404,
            5,
            "etcdserver: requested lease not found",
        ),
        ("/v3/kv/nope", "{}", 404, 5, "Not Found"),
        ("/v3/kv/range/", "{}", 404, 5, "Not Found"),
        ("/v3/election/leader", "{}", 500, 2, "election: no leader"),
        ("/v3/auth/user/list", "", 400, 9, "etcdserver: user name not found"),
    ] {
        let (actual, text) = call(&frontend, path, body).await;
        let text: Value = serde_json::from_str(&text).expect(&text);
        assert_eq!(
            (actual, text),
            (status, json!({ "code": code, "message": message })),
            "{path} {body}"
        );
    }
    let invalid = answer(
        &frontend,
        post("/v3/cluster/member/add", &b"{\"peerURLs\":[\"\xff\"]}"[..]),
    )
    .await;
    assert!(text(invalid).await.contains("invalid UTF-8 in string"));
    let get = Request::get("/v3/kv/range").body(Body::empty()).expect("whole");
    let response = answer(&frontend, get).await;
    assert_eq!(response.status(), StatusCode::NOT_IMPLEMENTED);
    assert_eq!(text(response).await, r#"{"code":12,"message":"Method Not Allowed"}"#);
    store.state().failure = Some(Error::InvalidAuthToken);
    let response = answer(&frontend, post("/v3/kv/range", r#"{"key":"AA=="}"#)).await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.headers()["www-authenticate"], "etcdserver: invalid auth token");
    for (error, status) in [
        (Error::NoSpace, 429),
        (Error::PermissionDenied, 403),
        (Error::NoLeader, 503),
        (Error::Corrupt, 500),
        (Error::NotCapable, 400),
    ] {
        store.state().failure = Some(error);
        let (actual, body) = call(&frontend, "/v3/kv/put", r#"{"key":"AA=="}"#).await;
        let body: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!((actual, &body["message"]), (status, &json!(error.message())));
    }
}

#[tokio::test]
async fn nesting_and_size_are_bounded() {
    let limits = Limits::default();
    let max = limits.grpc_receive_bytes_max();
    let frontend = Frontend::new(Fake::new(limits), Options::default());
    let nested = |depth: usize| {
        let open = r#"{"success":[{"request_txn":"#.repeat(depth);
        format!("{open}{{}}{}", "}]}".repeat(depth))
    };
    let deep = call(&frontend, "/v3/kv/txn", &nested(60)).await;
    assert_eq!(deep.1, r#"{"code":3,"message":"proto: exceeded max recursion depth"}"#);
    let unknown = format!(r#"{{"x":{}{}}}"#, "[".repeat(5000), "]".repeat(5000));
    assert_eq!(call(&frontend, "/v3/kv/txn", &unknown).await.0, 200);
    let deeper = "[".repeat(20_000);
    let deep = call(&frontend, "/v3/kv/txn", &deeper).await;
    assert_eq!(
        deep.1,
        r#"{"code":3,"message":"invalid character '[' exceeded max depth"}"#
    );

    let large = format!(r#"{{"key":"AA==","value":"{}"}}"#, "A".repeat(4 * max / 3 + 4));
    let (status, body) = call(&frontend, "/v3/kv/put", &large).await;
    assert_eq!(status, 429);
    assert!(body.contains("grpc: received message larger than max ("), "{body}");
    let padded = format!("{{{}}}", " ".repeat(4 * max));
    let (status, body) = call(&frontend, "/v3/kv/put", &padded).await;
    assert_eq!(status, 429);
    assert!(body.contains("metastore: JSON larger than max"), "{body}");
}

/// A request body that a test feeds, piece by piece.
fn fed() -> (mpsc::Sender<&'static str>, Body) {
    let (sender, mut receiver) = mpsc::channel::<&'static str>(8);
    let stream = futures::stream::poll_fn(move |context| {
        receiver
            .poll_recv(context)
            .map(|piece| piece.map(|piece| Ok::<_, std::io::Error>(Bytes::from(piece))))
    });
    (sender, Body::from_stream(stream))
}

#[tokio::test]
async fn watches_are_streams_of_lines() {
    let store = Fake::new(Limits::default());
    let frontend = Frontend::new(store.clone(), Options::default());
    // The request has ended, the replies go on.
    let create = r#"{"create_request":{"key":"Zm9v","start_revision":"1"}}"#;
    let mut response = answer(&frontend, post("/v3/watch", create)).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/json");
    let created = format!("{{\"result\":{{{},\"created\":true}}}}\n", header(1));
    assert_eq!(line(&mut response).await, created);
    store.put_one("foo", "1");
    let event = r#"{"kv":{"key":"Zm9v","create_revision":"2","mod_revision":"2","version":"1","value":"MQ=="}}"#;
    let events = format!("{{\"result\":{{{},\"events\":[{event}]}}}}\n", header(2));
    assert_eq!(line(&mut response).await, events);
    store.delete("foo");
    let event = r#"{"type":"DELETE","kv":{"key":"Zm9v","mod_revision":"3"}}"#;
    let events = format!("{{\"result\":{{{},\"events\":[{event}]}}}}\n", header(3));
    assert_eq!(line(&mut response).await, events);

    // Several requests, in whatever pieces; what is no request ends them, and nothing else.
    let (feed, body) = fed();
    feed.send(r#" {"create_request":{"key":"YQ==","#).await.expect("open");
    feed.send(r#""watch_id":7}}{"create_request":{"key":"YQ==","watch_id":7}} {"create"#)
        .await
        .expect("open");
    let mut response = answer(&frontend, post("/v3/watch", body)).await;
    assert!(line(&mut response).await.contains(r#""watch_id":"7","created":true"#));
    assert!(line(&mut response).await.contains("mvcc: duplicate watch ID"));
    feed.send(r#"Request":{"key":"Yg==","watchId":8}}{"progress_request":{}}"#)
        .await
        .expect("open");
    assert!(line(&mut response).await.contains(r#""watch_id":"8","created":true"#));
    assert!(line(&mut response).await.contains(r#""watch_id":"-1""#));
    feed.send("} garbage").await.expect("open");
    store.put_one("a", "1");
    assert!(line(&mut response).await.contains(r#""events""#));
}

#[tokio::test]
async fn streams_end_with_an_error_when_the_server_stops() {
    let (stop, stopping) = watch::channel(false);
    let options = Options {
        stopping: Some(stopping),
        ..Options::default()
    };
    let store = Fake::new(Limits::default());
    let frontend = Frontend::new(store.clone(), options);
    let create = r#"{"create_request":{"key":"bC8x"}}"#;
    let mut watch = answer(&frontend, post("/v3/watch", create)).await;
    line(&mut watch).await;
    store.put_one("l/1", "leads");
    let mut observed = answer(&frontend, post("/v3/election/observe", r#"{"name":"bA=="}"#)).await;
    assert!(line(&mut observed).await.contains(r#""kv":{"key":"bC8x""#));
    line(&mut watch).await;
    let keep_alive = answer(&frontend, post("/v3/lease/keepalive", r#"{"ID":"2"}{"ID":3}"#)).await;
    let lines = text(keep_alive).await;
    let expected = [
        format!("{{\"result\":{{{},\"ID\":\"2\",\"TTL\":\"3600\"}}}}\n", header(2)),
        format!("{{\"result\":{{{},\"ID\":\"3\"}}}}\n", header(2)),
    ];
    assert_eq!(lines, expected.concat());
    let nothing = answer(&frontend, post("/v3/lease/keepalive", "")).await;
    assert_eq!(
        (nothing.status(), nothing.headers().get("content-type")),
        (StatusCode::OK, None)
    );
    stop.send_replace(true);
    let last = "{\"error\":{\"code\":14,\"message\":\"etcdserver: server stopped\"}}\n";
    assert_eq!(line(&mut watch).await, last);
    assert_eq!(line(&mut observed).await, last);
    assert!(watch.body_mut().frame().await.is_none());
    // Before the first reply, an error is the whole of the answer, and its status that of the response.
    let late = call(&frontend, "/v3/watch", r#"{"create_request":{}}"#).await;
    assert_eq!(late, (503, last.to_owned()));
}

#[tokio::test(start_paused = true)]
async fn deadlines_are_kept() {
    let store = Fake::new(Limits::default());
    store.state().leases.push(1);
    store.put_one("l/0", "");
    let frontend = Frontend::new(store.clone(), Options::default());
    let within = |path: &str, timeout: &str, body: &'static str| {
        let request = Request::post(path).header("grpc-timeout", timeout);
        request.body(Body::from(body)).expect("whole")
    };
    let lock = r#"{"name":"bA==","lease":1}"#;
    let response = answer(&frontend, within("/v3/lock/lock", "1500m", lock)).await;
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(
        text(response).await,
        r#"{"code":4,"message":"context deadline exceeded"}"#
    );
    let mut watch = answer(&frontend, within("/v3/watch", "1S", r#"{"create_request":{}}"#)).await;
    line(&mut watch).await;
    assert_eq!(
        line(&mut watch).await,
        "{\"error\":{\"code\":4,\"message\":\"context deadline exceeded\"}}\n"
    );
    for (timeout, status) in [("-1S", 504), ("0S", 200), ("99999999H", 200)] {
        let request = within("/v3/kv/range", timeout, r#"{"key":"AA=="}"#);
        assert_eq!(answer(&frontend, request).await.status(), status, "{timeout}");
    }
    let observe = within("/v3/election/observe", "1S", r#"{"name":"bm8="}"#);
    let response = answer(&frontend, observe).await;
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert!(text(response).await.starts_with(r#"{"error":{"code":4"#));
    for bad in ["1", "S", "1x", "1.5S"] {
        let response = answer(&frontend, within("/v3/kv/range", bad, "{}")).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{bad}");
        assert!(text(response).await.contains("invalid grpc-timeout: "));
    }
    // A body that does not come.
    let (_feed, body) = fed();
    let response = answer(&frontend, post("/v3/kv/range", body)).await;
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
}

#[tokio::test]
async fn headers_become_metadata() {
    let store = Fake::new(Limits::default());
    let frontend = Frontend::new(store.clone(), Options::default());
    store.state().status.leader = 0;
    let request = |name: &str| {
        let request = Request::post("/v3/kv/range").header(name, "true");
        request.body(Body::from(r#"{"key":"AA=="}"#)).expect("whole")
    };
    assert_eq!(answer(&frontend, request("hasleader")).await.status(), StatusCode::OK);
    let refused = answer(&frontend, request("Grpc-Metadata-hasleader")).await;
    assert_eq!(text(refused).await, r#"{"code":14,"message":"etcdserver: no leader"}"#);
    store.state().status.leader = 12;
    let request = Request::post("/v3/election/leader").header("authorization", "Bearer secret");
    answer(&frontend, request.body(Body::empty()).expect("whole")).await;
    let tokens: Vec<_> = store.state().acted_for.iter().map(|who| who.token.clone()).collect();
    assert_eq!(tokens.last().and_then(Option::as_deref), Some("secret"));
}

#[derive(Default)]
struct Started(AtomicUsize);

impl Observer for Started {
    fn started(&self, _: &'static metastore_frontend::Method) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn every_method_but_one_has_a_path_and_is_counted() {
    let started = Arc::new(Started::default());
    let options = Options {
        observer: started.clone(),
        ..Options::default()
    };
    let frontend = Frontend::new(Fake::new(Limits::default()), options);
    let paths = "kv/range kv/put kv/deleterange kv/txn kv/compaction watch lease/grant lease/revoke kv/lease/revoke \
        lease/keepalive lease/timetolive kv/lease/timetolive lease/leases kv/lease/leases cluster/member/add \
        cluster/member/remove cluster/member/update cluster/member/list cluster/member/promote maintenance/alarm \
        maintenance/status maintenance/defragment maintenance/hash maintenance/hashkv maintenance/snapshot \
        maintenance/transfer-leadership maintenance/downgrade auth/enable auth/disable auth/status auth/authenticate \
        auth/user/add auth/user/get auth/user/list auth/user/delete auth/user/changepw auth/user/grant \
        auth/user/revoke auth/role/add auth/role/get auth/role/list auth/role/delete auth/role/grant \
        auth/role/revoke lock/lock lock/unlock election/campaign election/proclaim election/leader \
        election/observe election/resign";
    let paths: Vec<&str> = paths.split_whitespace().collect();
    for path in &paths {
        let request = post(&format!("/v3/{path}"), r#"{"key":"AA==","name":"bA=="}"#);
        // Some wait for others; by then they are counted.
        drop(timeout(Duration::from_millis(50), answer(&frontend, request)).await);
    }
    assert_eq!(started.0.load(Ordering::Relaxed), paths.len());
    let elsewhere = |service: &str| service.starts_with("grpc.");
    let known = methods().filter(|method| !elsewhere(method.service)).count();
    // RangeStream has none in etcd either; three methods have two.
    assert_eq!(paths.len(), known - 1 + 3);
}

#[tokio::test]
async fn calls_at_a_time_are_limited() {
    let options = Options {
        gateway_calls_max: Some(1),
        ..Options::default()
    };
    let frontend = Frontend::new(Fake::new(Limits::default()), options);
    let mut watch = answer(&frontend, post("/v3/watch", r#"{"create_request":{}}"#)).await;
    line(&mut watch).await;
    let range = post("/v3/kv/range", r#"{"key":"AA=="}"#);
    let mut waiting = Box::pin(answer(&frontend, range));
    assert!(timeout(Duration::from_millis(30), &mut waiting).await.is_err());
    drop(watch);
    assert_eq!(timeout(LONG, waiting).await.expect("in time").status(), StatusCode::OK);
}

#[tokio::test]
async fn browsers_are_told_who_may_ask() {
    let options = |origins: &[&str], hosts: &[&str]| Options {
        access: Access {
            origins: origins.iter().map(|&text| text.to_owned()).collect::<HashSet<_>>(),
            hosts: hosts.iter().map(|&text| text.to_owned()).collect(),
        },
        ..Options::default()
    };
    let store = Fake::new(Limits::default());
    let request = |method: Method, origin: &str, host: &str| {
        let request = Request::builder().method(method).uri("/version");
        let request = request.header("origin", origin).header("host", host);
        request.body(Body::empty()).expect("whole")
    };
    let allowed = |response: &Response<ResponseBody>| {
        let allowed = response.headers().get("access-control-allow-origin");
        allowed.map(|value| value.to_str().expect("text").to_owned())
    };
    for (origins, origin, expected) in [
        (&[][..], "http://a", Some("*")),
        (&["*"], "http://a", Some("*")),
        (&["http://a", "http://b"], "http://a", Some("http://a")),
        (&["http://a", "http://b"], "http://c", None),
    ] {
        let frontend = Frontend::new(store.clone(), options(origins, &[]));
        let response = answer(&frontend, request(Method::GET, origin, "x")).await;
        assert_eq!(allowed(&response).as_deref(), expected, "{origins:?}");
        let response = answer(&frontend, request(Method::OPTIONS, origin, "x")).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(allowed(&response).as_deref(), expected, "{origins:?}");
        let methods = response.headers().get("access-control-allow-methods");
        assert_eq!(methods.is_some(), expected.is_some());
        if let Some(methods) = methods {
            assert_eq!(methods, "POST, GET, OPTIONS, PUT, DELETE");
            let headers = &response.headers()["access-control-allow-headers"];
            assert_eq!(headers, "accept, content-type, authorization");
        }
        assert_eq!(text(response).await, "");
    }
    let frontend = Frontend::new(store.clone(), options(&[], &["good", "::1"]));
    for (host, status) in [
        ("good:2379", 200),
        ("good", 200),
        ("[::1]:2379", 200),
        ("evil.example:2379", 421),
    ] {
        let response = answer(&frontend, request(Method::GET, "http://a", host)).await;
        assert_eq!(response.status(), status, "{host}");
        if status == 421 {
            assert!(text(response).await.contains("--host-whitelist"));
        }
    }
    let tls = frontend.at(Listener {
        tls: true,
        ..Listener::default()
    });
    let response = answer(&tls, request(Method::GET, "http://a", "evil.example")).await;
    assert_eq!(response.status(), StatusCode::OK);
}

/// Certificates do not count for the gateway, and whoever shows one where auth is on must hear of it.
#[tokio::test]
async fn clients_that_are_known_by_a_certificate_are_refused() {
    let store = Fake::new(Limits::default());
    let named = |name: &str| {
        let listener = Listener {
            tls: true,
            ..Listener::default()
        };
        let certificate = ClientCertificate {
            common_name: name.into(),
        };
        let frontend = Frontend::new(store.clone(), Options::default()).at(listener);
        frontend.with_certificate(Some(certificate))
    };
    let leader = |frontend: Frontend<Fake>| async move { call(&frontend, "/v3/election/leader", "{}").await };
    assert_eq!(leader(named("alice")).await.0, 500, "auth is off: there is no leader");
    let credentials = store.state().acted_for.last().cloned().expect("somebody asked");
    assert!(credentials.is_empty());
    store.state().auth_is_on = true;
    let text = "CommonName of client sending a request against gateway will be ignored and not used as expected\n";
    assert_eq!(leader(named("alice")).await, (400, text.to_owned()));
    assert_eq!(leader(named("")).await.0, 500);
    let version = Request::get("/version").body(Body::empty()).expect("whole");
    assert_eq!(answer(&named("alice"), version).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn unclean_paths_are_redirected() {
    let frontend = Frontend::new(Fake::new(Limits::default()), Options::default());
    for (path, location) in [
        ("//version", Some("/version")),
        ("/a/../version?x=1", Some("/version?x=1")),
        ("/v3", Some("/v3/")),
        ("/v3//kv/range", Some("/v3/kv/range")),
        ("/version/", None),
    ] {
        let request = Request::get(path).body(Body::empty()).expect("whole");
        let response = answer(&frontend, request).await;
        let found = response
            .headers()
            .get("location")
            .map(|value| value.to_str().expect("text"));
        assert_eq!(found, location, "{path}");
        if let Some(location) = location {
            assert_eq!(response.status(), StatusCode::TEMPORARY_REDIRECT);
            let body = text(response).await;
            assert_eq!(body, format!("<a href=\"{location}\">Temporary Redirect</a>.\n\n"));
        }
    }
    let response = answer(&frontend, post("/v3//kv/range", "{}")).await;
    assert_eq!(response.headers().get("content-type"), None);
    assert_eq!(text(response).await, "");
}

#[tokio::test]
async fn without_a_gateway_its_paths_are_unknown() {
    let options = Options {
        gateway_calls_max: None,
        ..Options::default()
    };
    let frontend = Frontend::new(Fake::new(Limits::default()), options);
    for path in ["/v3", "/v3/kv/range"] {
        let response = answer(&frontend, post(path, "{}")).await;
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(text(response).await, "404 page not found\n");
    }
}

#[tokio::test]
async fn listeners_serve_what_they_are_for() {
    let frontend = Frontend::new(Fake::new(Limits::default()), Options::default());
    let at = |traffic| frontend.at(Listener { traffic, tls: false });
    let get = |path: &str| Request::get(path).body(Body::empty()).expect("whole");
    let grpc = || {
        let request = Request::post("/etcdserverpb.KV/Range").version(http::Version::HTTP_2);
        let request = request.header("content-type", "application/grpc");
        request.body(Body::from(&[0; 5][..])).expect("whole")
    };
    let metrics = at(Traffic::Metrics);
    for (path, status) in [
        ("/metrics", 200),
        ("/health", 200),
        ("/readyz", 200),
        ("/version", 404),
        ("/v3/", 404),
    ] {
        assert_eq!(answer(&metrics, get(path)).await.status(), status, "{path}");
    }
    assert!(
        answer(&metrics, get("/health"))
            .await
            .headers()
            .get("access-control-allow-origin")
            .is_none()
    );
    assert_eq!(
        answer(&at(Traffic::Http), get("/version")).await.status(),
        StatusCode::OK
    );
    assert_eq!(answer(&at(Traffic::Http), grpc()).await.status(), StatusCode::NOT_FOUND);
    let response = answer(&at(Traffic::Grpc), get("/version")).await;
    assert_eq!(response.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let response = answer(&at(Traffic::Grpc), grpc()).await;
    assert_eq!(
        response.headers()["grpc-message"],
        "etcdserver:%20key%20is%20not%20provided"
    );
}

#[tokio::test]
async fn variables_are_told() {
    let options = Options {
        variables: Arc::new(|| vec![("cmdline", json!(["metastore", "--x"]))]),
        ..Options::default()
    };
    let frontend = Frontend::new(Fake::new(Limits::default()), options);
    let response = answer(
        &frontend,
        Request::get("/debug/vars").body(Body::empty()).expect("whole"),
    )
    .await;
    let variables: Value = serde_json::from_str(&text(response).await).expect("JSON");
    assert_eq!(variables["cmdline"], json!(["metastore", "--x"]));
    assert_eq!(variables["raft.status"]["raftState"], "StateLeader");
    assert_eq!(variables["raft.status"]["id"], "c");
}

/// A connection to a server of its own.
fn connection(store: Fake, options: Options) -> DuplexStream {
    let (client, server) = tokio::io::duplex(64 * 1024);
    tokio::spawn(async move {
        let settings = ConnectionSettings::default();
        let frontend = Frontend::new(store, options);
        drop(serve_connection(server, frontend, &settings, std::future::pending()).await);
    });
    client
}

/// Upgrades a connection with these headers beside the necessary ones; returns it and the response's head.
async fn upgrade(path: &str, headers: &str, store: &Fake) -> (DuplexStream, String) {
    let mut client = connection(store.clone(), Options::default());
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    );
    client.write_all(request.as_bytes()).await.expect("writes");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        timeout(LONG, client.read_exact(&mut byte))
            .await
            .expect("in time")
            .expect("reads");
        head.push(byte[0]);
    }
    (client, String::from_utf8(head).expect("text"))
}

#[tokio::test]
async fn watches_run_over_websockets() {
    use futures::{SinkExt, StreamExt};
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::Role;

    let store = Fake::new(Limits::default());
    let (client, head) = upgrade("/v3/watch", "Sec-WebSocket-Protocol: Bearer, secret\r\n", &store).await;
    let head = head.to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    assert!(!head.contains("access-control"), "{head}");
    // The example of RFC 6455, section 1.3.
    assert!(
        head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n"),
        "{head}"
    );
    assert!(head.contains("sec-websocket-protocol: bearer\r\n"), "{head}");
    let mut socket = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
    let next = async |socket: &mut WebSocketStream<DuplexStream>| {
        let message = timeout(LONG, socket.next()).await.expect("in time").expect("goes on");
        message.expect("whole").into_text().expect("text").to_string()
    };
    let create = Message::text(r#"{"create_request":{"key":"Zm9v"}}"#);
    socket.send(create).await.expect("sends");
    let created = format!("{{\"result\":{{{},\"created\":true}}}}", header(1));
    assert_eq!(next(&mut socket).await, created);
    store.put_one("foo", "1");
    assert!(next(&mut socket).await.contains(r#""value":"MQ==""#));
    let cancel = Message::binary(&br#"{"cancel_request":{}}"#[..]);
    socket.send(cancel).await.expect("sends");
    assert!(next(&mut socket).await.contains(r#""canceled":true"#));
    socket
        .send(Message::Ping(Bytes::from_static(b"?")))
        .await
        .expect("sends");
    let pong = timeout(LONG, socket.next()).await.expect("in time");
    assert!(matches!(pong, Some(Ok(Message::Pong(_)))), "{pong:?}");
    socket.close(None).await.expect("closes");

    let (client, _) = upgrade("/v3/nope", "", &store).await;
    let mut socket = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
    assert_eq!(next(&mut socket).await, r#"{"code":5,"message":"Not Found"}"#);
    let end = timeout(LONG, socket.next()).await.expect("in time");
    assert!(matches!(end, Some(Ok(Message::Close(_))) | None), "{end:?}");
}

#[tokio::test]
async fn what_is_no_websocket_is_refused() {
    let store = Fake::new(Limits::default());
    for request in [
        "GET /v3/watch HTTP/1.1\r\nSec-WebSocket-Version: 12\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        "GET /v3/watch HTTP/1.1\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n",
        "GET /v3/watch HTTP/1.1\r\nSec-WebSocket-Version: 13\r\n",
    ] {
        let mut client = connection(store.clone(), Options::default());
        let request = format!("{request}Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
        client.write_all(request.as_bytes()).await.expect("writes");
        let mut reply = vec![0; 1024];
        let length = timeout(LONG, client.read(&mut reply))
            .await
            .expect("in time")
            .expect("reads");
        let reply = String::from_utf8_lossy(&reply[..length]);
        assert!(reply.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{reply}");
    }
}

/// Pieces of HTTP over a real connection: what curl does.
#[tokio::test]
async fn a_stream_goes_over_http_1_as_it_comes() {
    let store = Fake::new(Limits::default());
    let client = connection(store.clone(), Options::default());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(client))
        .await
        .expect("connects");
    let connection = tokio::spawn(connection);
    let request = Request::post("/v3/watch").header("host", "x");
    let request = request
        .body(Body::from(r#"{"create_request":{"key":"Zm9v"}}"#))
        .expect("whole");
    let mut response = timeout(LONG, sender.send_request(request))
        .await
        .expect("in time")
        .expect("answers");
    for _ in 0..3 {
        let frame = timeout(LONG, response.body_mut().frame()).await.expect("in time");
        let data = frame.expect("goes on").expect("whole").into_data().expect("data");
        assert!(data.ends_with(b"\n"));
        store.put_one("foo", "1");
    }
    drop((response, sender));
    connection.abort();
}
