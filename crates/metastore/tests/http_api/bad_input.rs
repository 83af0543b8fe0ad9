//! What must be refused, and how.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::client::{Http, TIMEOUT};
use crate::nodes::Nodes;
use crate::support::{Storage, on_both_engines};

on_both_engines! { 300;
    bodies_over_the_limit,
    what_cannot_be_read,
    methods_and_paths,
}

const LIMIT: usize = 1_572_864;

/// Sends bytes as they are and returns the whole answer.
async fn raw(nodes: &Nodes, request: &[u8]) -> String {
    let address = nodes.nodes[0].url().strip_prefix("http://").unwrap().to_owned();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    // The connection may be kept open after the answer, or end with an error, as where not all was read.
    let read =
        async { while !is_whole(&answer) && stream.read_buf(&mut answer).await.is_ok_and(|length| length > 0) {} };
    tokio::time::timeout(TIMEOUT, read)
        .await
        .expect("an answer comes in time");
    String::from_utf8_lossy(&answer).into_owned()
}

/// Whether these bytes are a head and as much of a body as it announces; one that announces none ends with its connection.
fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim())
    });
    length.is_some_and(|length| body.len() >= length.parse().expect("a number"))
}

async fn bodies_over_the_limit(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    for size in [LIMIT, LIMIT + 1, 4 << 20] {
        let problem = http
            .put("/api/v1/kv/k", vec![b'x'; size])
            .await
            .problem(413, "too-large");
        assert_eq!((&problem["code"], &problem["action"]), (&3.into(), &"fix".into()));
        http = nodes.http().await;
    }
    // Far too large: refused by what is announced, before any of it is read.
    let request = b"PUT /api/v1/kv/k HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000000\r\n\r\n";
    assert!(raw(&nodes, request).await.starts_with("HTTP/1.1 413"));
    // And without an announcement.
    let mut request = b"PUT /api/v1/kv/k HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..20 {
        request.extend_from_slice(format!("{:x}\r\n", 100_000).as_bytes());
        request.extend_from_slice(&vec![b'x'; 100_000]);
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"0\r\n\r\n");
    assert!(raw(&nodes, &request).await.starts_with("HTTP/1.1 413"));
    let json = [("content-type", "application/json")];
    let text = format!(
        r#"{{"then":[{{"put":{{"key":"k","value":"{}"}}}}]}}"#,
        "x".repeat(LIMIT)
    );
    http.send("POST", "/api/v1/txn", &json, text)
        .await
        .problem(413, "too-large");
    http.send("POST", "/api/v1/txn", &json, " ".repeat(4 << 20))
        .await
        .problem(413, "too-large");
    let mut http = nodes.http().await;
    http.get("/api/v1/kv/k").await.problem(404, "key-not-found");
}

async fn what_cannot_be_read(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    for (path, slug, parameter) in [
        ("/api/v1/kv/%", "invalid-path", None),
        ("/api/v1/kv/a%2", "invalid-path", None),
        ("/api/v1/kv/a%zz", "invalid-path", None),
        ("/api/v1/kv/", "invalid-path", None),
        ("/api/v1/locks/", "invalid-path", None),
        ("/api/v1/kv/a?revison=5", "unknown-parameter", Some("revison")),
        ("/api/v1/kv/a?prefix=b", "unknown-parameter", Some("prefix")),
        ("/api/v1/kv/a?revision=x", "invalid-parameter", Some("revision")),
        ("/api/v1/kv/a?revision=-1", "invalid-parameter", Some("revision")),
        (
            "/api/v1/kv/a?revision=1&revision=2",
            "invalid-parameter",
            Some("revision"),
        ),
        ("/api/v1/kv?prefix=%f", "invalid-parameter", Some("prefix")),
        ("/api/v1/kv?limit=0", "invalid-parameter", Some("limit")),
        ("/api/v1/kv?sort=size", "invalid-parameter", Some("sort")),
        ("/api/v1/kv?keys_only=1", "invalid-parameter", Some("keys_only")),
        ("/api/v1/kv?key=", "invalid-parameter", Some("key")),
        ("/api/v1/kv?key=a&prefix=a", "invalid-parameter", Some("key")),
        ("/api/v1/watch?start=b&end=a", "invalid-parameter", Some("end")),
        (
            "/api/v1/watch?from_revision=0",
            "invalid-parameter",
            Some("from_revision"),
        ),
        (
            "/api/v1/watch?from_revision=2&after_revision=2",
            "invalid-parameter",
            Some("after_revision"),
        ),
        ("/api/v1/watch?wait=1h", "invalid-parameter", Some("wait")),
        ("/api/v1/watch?heartbeat=1ms", "invalid-parameter", Some("heartbeat")),
        ("/api/v1/status?verbose=true", "unknown-parameter", Some("verbose")),
    ] {
        let problem = http.get(path).await.problem(400, slug);
        assert_eq!(problem["parameter"].as_str(), parameter, "{path}: {problem}");
    }
    for (name, value) in [
        ("if-match", "42"),
        ("if-none-match", "\"a"),
        ("accept", "text"),
        ("authorization", "Digest x"),
        ("authorization", "Basic !"),
    ] {
        http.put_key("k", "v").await;
        let problem = http
            .send("GET", "/api/v1/kv/k", &[(name, value)], "")
            .await
            .problem(400, "invalid-header");
        assert_eq!(problem["header"], name);
    }
    let put =
        async |http: &mut Http, name: &str, value: &str| http.send("PUT", "/api/v1/kv/k", &[(name, value)], "x").await;
    put(&mut http, "content-encoding", "gzip")
        .await
        .problem(415, "unsupported-media-type");
    put(&mut http, "content-range", "bytes 0-1/2")
        .await
        .problem(400, "invalid-header");
    for content_type in ["text/plain", "application/x-www-form-urlencoded"] {
        let headers = [("content-type", content_type)];
        http.send("POST", "/api/v1/txn", &headers, "{}")
            .await
            .problem(415, "unsupported-media-type");
    }
    let json = [("content-type", "application/json; charset=utf-8")];
    for text in ["", "{", "nul", "{}x", "\u{feff}{}", "[[[["] {
        http.send("POST", "/api/v1/txn", &json, text)
            .await
            .problem(400, "invalid-body");
    }
    http.send("POST", "/api/v1/txn", &json, vec![b'"', 0xff, b'"'])
        .await
        .problem(400, "invalid-body");
    http.send("POST", "/api/v1/txn", &json, "[".repeat(100_000))
        .await
        .problem(400, "invalid-body");
    http.send("DELETE", "/api/v1/kv/k", &[], "body")
        .await
        .problem(400, "invalid-body");
    // What is no HTTP, or too much of it.
    for request in [
        &b"GET /api/v1/kv/a b HTTP/1.1\r\nhost: x\r\n\r\n"[..],
        b"GET /api/v1/kv/a HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"PUT /api/v1/kv/a HTTP/1.1\r\nhost: x\r\ncontent-length: five\r\n\r\n",
    ] {
        let answer = raw(&nodes, request).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    let long = format!("GET /api/v1/kv/{} HTTP/1.1\r\nhost: x\r\n\r\n", "k".repeat(70_000));
    assert!(raw(&nodes, long.as_bytes()).await.starts_with("HTTP/1.1 414"));
    // A body that breaks off writes nothing.
    let half = b"PUT /api/v1/kv/half HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n12345";
    let address = nodes.nodes[0].url().strip_prefix("http://").unwrap().to_owned();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(half).await.unwrap();
    drop(stream);
    tokio::time::sleep(Duration::from_millis(200)).await;
    http.get("/api/v1/kv/half").await.problem(404, "key-not-found");
}

async fn methods_and_paths(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    for (method, path, allow) in [
        ("POST", "/api/v1/kv/a", "GET, PUT, DELETE, HEAD"),
        ("PATCH", "/api/v1/kv/a", "GET, PUT, DELETE, HEAD"),
        ("PUT", "/api/v1/kv", "GET, DELETE, HEAD"),
        ("POST", "/api/v1/watch", "GET"),
        ("HEAD", "/api/v1/watch", "GET"),
        ("GET", "/api/v1/txn", "POST"),
        ("DELETE", "/api/v1/leases", "POST, GET, HEAD"),
        ("GET", "/api/v1/leases/1/keep-alive", "POST"),
        ("PUT", "/api/v1/locks/a", "POST, GET, DELETE, HEAD"),
        ("DELETE", "/api/v1/status", "GET, HEAD"),
        ("OPTIONS", "/api/v1/txn", "POST"),
    ] {
        let answer = http.send(method, path, &[], "").await;
        assert_eq!((answer.status, answer.header("allow")), (405, allow), "{method} {path}");
    }
    for path in [
        "/api/v1/nothing",
        "/api/v1/kvs",
        "/api/v1/leases/",
        "/api/v1/auth",
        "/api/v1/txn/",
    ] {
        let answer = http.get(path).await;
        assert!(matches!(answer.status, 404 | 400), "{path}: {answer:?}");
        assert_eq!(answer.header("content-type"), "application/problem+json");
    }
    assert_eq!(http.get("/api/v2").await.status, 404);
}
