//! The HTTP API where it needs a store that does as it is told, or a clock that does.

use std::future::poll_fn;
use std::time::Duration;

use api::{Error, Limits};
use axum::body::Body;
use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::{Request, Response};
use http_body_util::BodyExt;
use metastore_frontend::{Access, Frontend, Options, ResponseBody};
use serde_json::Value;
use tokio::time::{Instant, timeout};
use tower::ServiceExt;

use crate::connection::Client;
use crate::fake::{Fake, deletes};

const LONG: Duration = Duration::from_secs(3600);

fn store() -> Fake {
    Fake::new(Limits::default())
}

/// Has a request answered without a connection.
async fn ask(store: &Fake, options: &Options, request: Request<Body>) -> Response<ResponseBody> {
    match Frontend::new(store.clone(), options.clone()).oneshot(request).await {
        Ok(response) => response,
        Err(impossible) => match impossible {},
    }
}

fn request(method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Request<Body> {
    let request = Request::builder().method(method).uri(path).header("host", "here:2379");
    let request = headers
        .iter()
        .fold(request, |request, (name, value)| request.header(*name, *value));
    request.body(body.into()).expect("whole")
}

/// The status, and the last part of the problem's type if it is one.
async fn outcome(response: Response<ResponseBody>) -> (u16, String) {
    let status = response.status().as_u16();
    let is_problem = response
        .headers()
        .get("content-type")
        .is_some_and(|value| value == "application/problem+json");
    let body = response.into_body().collect().await.expect("whole").to_bytes();
    let slug = match is_problem {
        true => {
            let problem: Value = serde_json::from_slice(&body).expect("JSON");
            problem["type"]
                .as_str()
                .expect("text")
                .rsplit(':')
                .next()
                .unwrap_or_default()
                .to_owned()
        }
        false => String::new(),
    };
    (status, slug)
}

/// What the store refuses becomes a status that says whose fault it is, and how long to wait.
#[tokio::test]
async fn refusals_of_the_store_have_their_status() {
    for (error, status, slug) in [
        (Error::NoSpace, 507, "no-space"),
        (Error::TooManyRequests, 429, "too-many-requests"),
        (Error::NoLeader, 503, "unavailable"),
        (Error::NotLeader, 503, "unavailable"),
        (Error::Stopped, 503, "unavailable"),
        (Error::AuthOldRevision, 503, "unavailable"),
        (Error::Timeout, 504, "timeout"),
        (Error::TimeoutLeaderFail, 504, "timeout"),
        (Error::Corrupt, 500, "corrupt"),
        (Error::PermissionDenied, 403, "permission-denied"),
        (Error::UserEmpty, 401, "unauthenticated"),
        (Error::InvalidAuthToken, 401, "unauthenticated"),
        (Error::LeaseNotFound, 404, "lease-not-found"),
        (Error::LeaseExists, 409, "conflict"),
        (Error::RequestTooLarge, 413, "too-large"),
        (Error::TooManyOps, 400, "invalid-request"),
        (Error::Compacted, 410, "revision-compacted"),
    ] {
        let store = store();
        store.state().failure = Some(error);
        let response = ask(&store, &Options::default(), request("PUT", "/api/v1/kv/k", &[], "v")).await;
        let waits = response.headers().contains_key("retry-after");
        assert_eq!(waits, matches!(status, 429 | 503), "{error:?}");
        assert_eq!(outcome(response).await, (status, slug.to_owned()), "{error:?}");
    }
}

/// A signed token is for the users and roles of when it was given: sent again it will not do better.
#[tokio::test]
async fn a_token_of_before_is_no_token() {
    let store = store();
    store.state().failure = Some(Error::AuthOldRevision);
    let ask = async |authorization: &str| {
        let headers = [("authorization", authorization)];
        outcome(
            ask(
                &store,
                &Options::default(),
                request("GET", "/api/v1/kv/k", &headers, ""),
            )
            .await,
        )
        .await
    };
    assert_eq!(ask("Bearer a.b.c").await, (401, "unauthenticated".to_owned()));
    assert_eq!(ask("Basic YTpi").await, (503, "unavailable".to_owned()));
}

#[tokio::test]
async fn a_panic_is_a_problem() {
    let response = ask(
        &store(),
        &Options::default(),
        request("GET", "/api/v1/kv/panic", &[], ""),
    )
    .await;
    assert_eq!(outcome(response).await, (500, "internal".to_owned()));
}

/// Whoever asks for one of several versions may have any of them.
#[tokio::test]
async fn any_of_several_tags_may_match() {
    let store = store();
    let put = async |tags: &str| {
        let headers = [("if-match", tags)];
        outcome(
            ask(
                &store,
                &Options::default(),
                request("PUT", "/api/v1/kv/k", &headers, "v"),
            )
            .await,
        )
        .await
    };
    let written = (200, String::new());
    let refused = (412, "precondition-failed".to_owned());
    assert_eq!(store.put_one("k", "v"), 2);
    assert_eq!(put("\"7\", \"8\"").await, refused);
    assert_eq!(put("\"7\", \"2\", \"8\"").await, written);
    assert_eq!(put("\"7\", \"2\", \"8\"").await, refused);
    assert_eq!(put("\"3\"").await, written);
    assert_eq!(put("W/\"4\", \"x\"").await, refused);
}

/// A condition that would not be looked at is refused, and nothing is done.
#[tokio::test]
async fn conditions_are_never_overlooked() {
    let store = store();
    store.put_one("k", "v");
    let json = ("content-type", "application/json");
    for (method, path, body) in [
        ("DELETE", "/api/v1/kv?key=k", ""),
        ("POST", "/api/v1/txn", r#"{"then":[{"delete":{"key":"k"}}]}"#),
        ("POST", "/api/v1/leases", r#"{"ttl":60}"#),
        ("POST", "/api/v1/locks/l", ""),
    ] {
        for name in ["if-match", "if-none-match"] {
            let request = request(method, path, &[json, (name, "\"7\"")], body);
            let refused = outcome(ask(&store, &Options::default(), request).await).await;
            assert_eq!(refused, (400, "invalid-header".to_owned()), "{method} {path}");
        }
    }
    let response = ask(&store, &Options::default(), request("GET", "/api/v1/kv/k", &[], "")).await;
    assert_eq!(response.status(), 200);
    assert!(store.state().leases.is_empty());
    // Of a list there is no version to compare with, which leaves a reader no worse off.
    let request = request("GET", "/api/v1/kv", &[("if-none-match", "\"7\"")], "");
    assert_eq!(ask(&store, &Options::default(), request).await.status(), 200);
}

/// A compare without a key would be one of all keys.
#[tokio::test]
async fn compares_say_of_what() {
    let store = store();
    let txn = async |compare: &str| {
        let body = format!(r#"{{"compare":[{compare}]}}"#);
        let request = request("POST", "/api/v1/txn", &[("content-type", "application/json")], body);
        outcome(ask(&store, &Options::default(), request).await).await
    };
    let refused = (400, "invalid-body".to_owned());
    assert_eq!(txn(r#"{"exists":false}"#).await, refused);
    assert_eq!(txn(r#"{"key":null,"exists":false}"#).await, refused);
    assert_eq!(txn(r#"{"prefix":"","exists":false}"#).await.0, 200);
}

/// A page of another site has its visitor's browser write only if `--cors` lets it, and only by a script that asks first.
#[tokio::test]
async fn pages_do_not_write_behind_their_visitors_back() {
    let of = |origins: &[&str]| Options {
        access: Access {
            origins: origins.iter().map(|origin| (*origin).to_owned()).collect(),
            ..Access::default()
        },
        ..Options::default()
    };
    let lock = async |options: &Options, headers: &[(&str, &str)]| {
        outcome(ask(&store(), options, request("POST", "/api/v1/locks/l", headers, "")).await).await
    };
    let (held, refused) = ((200, String::new()), (403, "foreign-origin".to_owned()));
    let (friend, stranger, own) = ("https://friend.example", "https://stranger.example", "http://here:2379");
    let named = of(&[friend]);
    assert_eq!(lock(&named, &[]).await, held);
    for (origin, expected) in [(friend, &held), (own, &held), (stranger, &refused), ("null", &refused)] {
        let headers = [("origin", origin), ("content-type", "application/json")];
        assert_eq!(&lock(&named, &headers).await, expected, "{origin}");
    }
    // What a form could send nobody is asked about, whatever its origin.
    let all = of(&["*"]);
    for (content_type, expected) in [
        ("application/json", &held),
        ("text/plain;charset=UTF-8", &refused),
        ("application/x-www-form-urlencoded", &refused),
    ] {
        let headers = [("origin", stranger), ("content-type", content_type)];
        assert_eq!(&lock(&all, &headers).await, expected, "{content_type}");
    }
    assert_eq!(lock(&all, &[("origin", stranger)]).await, refused);
    // Its own pages are known by their host, or by what the browser says.
    for own in [
        [("origin", "HTTP://Here:2379"), ("sec-fetch-mode", "navigate")],
        [("origin", "https://proxy.example"), ("sec-fetch-site", "same-origin")],
    ] {
        assert_eq!(lock(&named, &own).await, held, "{own:?}");
    }
    let at = async |host: &str, origin: &str| {
        let request = Request::post("/api/v1/locks/l")
            .header("host", host)
            .header("origin", origin);
        outcome(ask(&store(), &named, request.body(Body::empty()).expect("whole")).await).await
    };
    assert_eq!(at("here:443", "https://here").await, held);
    assert_eq!(at("[::1]", "http://[::1]:80").await, held);
    assert_eq!(at("here:443", "http://here").await, refused);
    // Reading is another matter: what the page may see of the answer is the browser's.
    let read = request("GET", "/api/v1/locks/l", &[("origin", stranger)], "");
    let answer = ask(&store(), &named, read).await;
    assert_eq!(answer.status(), 200);
    assert!(!answer.headers().contains_key("access-control-allow-origin"));
    assert_eq!(answer.headers()["vary"], "origin");
}

/// Where a host must be named, another is told so in the way of this API.
#[tokio::test]
async fn hosts_that_are_not_ours_are_refused() {
    let options = Options {
        access: Access {
            hosts: ["metastore.example".to_owned()].into(),
            ..Access::default()
        },
        ..Options::default()
    };
    let response = ask(&store(), &options, request("GET", "/api/v1/status", &[], "")).await;
    assert_eq!(outcome(response).await, (421, "misdirected".to_owned()));
    let response = ask(&store(), &options, request("GET", "/version", &[], "")).await;
    assert_eq!(outcome(response).await, (421, String::new()));
}

/// Sends a head over HTTP/2 and returns what becomes of it, and the body to send.
async fn begin(client: &mut Client, request: Request<()>) -> (h2::client::ResponseFuture, h2::SendStream<Bytes>) {
    poll_fn(|context| client.requests.poll_ready(context))
        .await
        .expect("it is open");
    client.requests.send_request(request, false).expect("it is open")
}

/// What came of a body before its client gave the request up is not the value that it meant to write.
#[tokio::test]
async fn an_upload_that_is_given_up_writes_nothing() {
    for (reason, length) in [
        (Reason::CANCEL, None),
        (Reason::CANCEL, Some("1000")),
        (Reason::NO_ERROR, None),
        (Reason::NO_ERROR, Some("1000")),
    ] {
        let store = store();
        let mut client = Client::new(store.clone(), Options::default()).await;
        for (method, path, tag) in [
            ("PUT", "/api/v1/kv/k", None),
            ("PUT", "/api/v1/kv/k", Some("\"2\"")),
            ("DELETE", "/api/v1/kv/k", None),
        ] {
            store.put_one("k", "before");
            let before = store.state().header().revision;
            let mut request = Request::builder().method(method).uri(format!("http://fake{path}"));
            for (name, value) in [("content-length", length), ("if-match", tag)] {
                if let Some(value) = value {
                    request = request.header(name, value);
                }
            }
            let (response, mut body) = begin(&mut client, request.body(()).expect("whole")).await;
            let part = if method == "PUT" { "half" } else { "" };
            body.send_data(Bytes::from(part), false).expect("it is open");
            // The handler has begun to read it.
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
            body.send_reset(reason);
            drop((response, body));
            // Another request, answered after it.
            let get = Request::get("http://fake/api/v1/kv/k").body(()).expect("whole");
            let (response, mut body) = begin(&mut client, get).await;
            body.send_data(Bytes::new(), true).expect("it is open");
            assert_eq!(response.await.expect("an answer").status(), 200);
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
            assert_eq!(
                store.state().header().revision,
                before,
                "{method} {reason:?} {length:?}"
            );
        }
    }
}

/// A body that comes too slowly ends, and so does one that does not come at all.
#[tokio::test(start_paused = true)]
async fn bodies_do_not_take_for_ever() {
    let store = store();
    let mut client = Client::new(store.clone(), Options::default()).await;
    for pause in [Duration::from_secs(20), LONG] {
        let put = Request::put("http://fake/api/v1/kv/k").body(()).expect("whole");
        let (response, mut body) = begin(&mut client, put).await;
        let begun = Instant::now();
        let dripping = tokio::spawn(async move {
            while body.send_data(Bytes::from_static(b"x"), false).is_ok() {
                tokio::time::sleep(pause).await;
            }
        });
        let response = timeout(LONG, response).await.expect("in time").expect("an answer");
        assert_eq!(response.status(), 408);
        let took = begun.elapsed();
        assert!(
            took >= Duration::from_secs(29) && took < Duration::from_secs(60),
            "{took:?}"
        );
        dripping.abort();
    }
    assert_eq!(store.state().header().revision, 1);
}

/// Opens an event stream over HTTP/2.
async fn events(client: &mut Client, query: &str) -> RecvStream {
    let get = Request::get(format!("http://fake/api/v1/watch?{query}"))
        .body(())
        .expect("whole");
    let (response, mut body) = begin(client, get).await;
    body.send_data(Bytes::new(), true).expect("it is open");
    let response = response.await.expect("an answer");
    assert_eq!(response.status(), 200);
    response.into_body()
}

/// The next piece of a stream; `None` at its end.
async fn next(body: &mut RecvStream) -> Option<Result<String, h2::Error>> {
    loop {
        let piece = timeout(LONG, body.data()).await.expect("in time")?;
        // The end has a frame of its own, without anything in it.
        if piece.as_ref().is_ok_and(Bytes::is_empty) {
            continue;
        }
        return Some(piece.map(|piece| {
            let _ = body.flow_control().release_capacity(piece.len());
            String::from_utf8(piece.to_vec()).expect("text")
        }));
    }
}

#[tokio::test(start_paused = true)]
async fn a_quiet_stream_has_a_heartbeat() {
    let store = store();
    let mut client = Client::new(store.clone(), Options::default()).await;
    for (query, beat) in [("prefix=k", 15_000), ("prefix=k&heartbeat=100ms", 100)] {
        let mut body = events(&mut client, query).await;
        let hello = next(&mut body).await.expect("it goes on").expect("whole");
        assert!(hello.starts_with("retry: 1000\nid: 1\nevent: progress\n"), "{hello}");
        let mut beats = Vec::new();
        let begun = Instant::now();
        while beats.len() < 3 {
            assert!(begun.elapsed().as_millis() < 10 * beat, "{query}: {beats:?}");
            let piece = next(&mut body).await.expect("it goes on").expect("whole");
            match piece.as_str() {
                ": heartbeat\n\n" => beats.push(begun.elapsed().as_millis()),
                progress => assert!(progress.contains("event: progress\n"), "{progress}"),
            }
        }
        for (at, took) in (1..).zip(&beats) {
            let due = at * beat;
            assert!((due - 2..=due + beat / 2 + 10).contains(took), "{query}: {beats:?}");
        }
    }
}

/// Where history goes while a stream has not told it yet, it says so and ends.
#[tokio::test(start_paused = true)]
async fn a_stream_whose_history_goes_says_so() {
    let store = store();
    let mut client = Client::new(store.clone(), Options::default()).await;
    let mut body = events(&mut client, "prefix=k").await;
    assert!(
        next(&mut body)
            .await
            .expect("it goes on")
            .expect("whole")
            .contains("progress")
    );
    // What comes next it has not told when it is gone.
    store.state().compacted = 3;
    store.put_one("k", "v");
    let last = next(&mut body).await.expect("it goes on").expect("whole");
    let data = last.strip_prefix("event: error\ndata: ").expect("an error");
    let problem: Value = serde_json::from_str(data.trim()).expect("JSON");
    assert_eq!(
        (&problem["status"], &problem["compact_revision"]),
        (&410.into(), &3.into())
    );
    assert!(next(&mut body).await.is_none(), "it ends");
}

/// Nothing is said of revisions that do not exist yet.
#[tokio::test(start_paused = true)]
async fn a_stream_may_begin_later() {
    let store = store();
    let mut client = Client::new(store.clone(), Options::default()).await;
    let mut body = events(&mut client, "prefix=k&from_revision=4").await;
    assert_eq!(
        next(&mut body).await.expect("it goes on").expect("whole"),
        "retry: 1000\n\n"
    );
    for value in ["2", "3", "4"] {
        store.put_one("k", value);
    }
    let first = next(&mut body).await.expect("it goes on").expect("whole");
    assert!(first.starts_with("id: 4\ndata: "), "{first}");
}

/// Looking through history that has nothing for it takes a poll longer than it is to wait. It gets on all the same, but is
/// not held up for ever.
#[tokio::test(start_paused = true)]
async fn a_short_poll_gets_through_long_history() {
    let store = store();
    let last = ["1", "2", "3"].map(|value| store.put_one("other", value))[2];
    for (dropped, revision, took) in [
        (0, last, 10..200),
        (50, last, 1_000..10_000),
        (usize::MAX, 1, 20_000..21_000),
    ] {
        store.state().progress_dropped = dropped;
        let path = "/api/v1/watch?prefix=k&after_revision=1&wait=10ms";
        let begun = Instant::now();
        let response = ask(&store, &Options::default(), request("GET", path, &[], "")).await;
        let body = response.into_body().collect().await.expect("whole").to_bytes();
        let polled: Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(
            (&polled["revision"], &polled["events"]),
            (&revision.into(), &serde_json::json!([]))
        );
        let took_ms = begun.elapsed().as_millis();
        assert!(took.contains(&took_ms), "{dropped}: {took_ms}");
    }
}

/// A client that takes nothing is let go, alone; one that takes a little all the time gets everything.
#[tokio::test(start_paused = true)]
async fn a_stream_that_nobody_reads_ends() {
    // The last ones wait behind the first.
    const CHANGES: usize = 3;
    let store = store();
    let mut client = Client::new(store.clone(), Options::default()).await;
    let mut stalled = events(&mut client, "prefix=k").await;
    // On a connection of its own: what the other does not take counts against the whole of its connection.
    let mut other = Client::new(store.clone(), Options::default()).await;
    let mut slow = events(&mut other, "prefix=k").await;
    for body in [&mut stalled, &mut slow] {
        assert!(
            next(body)
                .await
                .expect("it goes on")
                .expect("whole")
                .contains("progress")
        );
    }
    let begun = Instant::now();
    let value = "v".repeat(1 << 20);
    for _ in 0..CHANGES {
        store.put_one("k", &value);
    }
    // It takes sixty times as long as a stream may stand still.
    let reading = tokio::spawn(async move {
        let mut taken = String::new();
        // Heartbeats, which may come between the changes, do not count.
        while taken.matches("]}\n\n").count() < CHANGES {
            let piece = timeout(LONG, slow.data())
                .await
                .expect("in time")
                .expect("it goes on")
                .expect("whole");
            taken.push_str(std::str::from_utf8(&piece).expect("text"));
            // 16 KiB in ten seconds.
            tokio::time::sleep(Duration::from_micros(600) * u32::try_from(piece.len()).expect("small")).await;
            let _ = slow.flow_control().release_capacity(piece.len());
        }
        taken
    });
    let mut taken = 0;
    let error = loop {
        match timeout(LONG, stalled.data()).await.expect("in time") {
            Some(Ok(piece)) => taken += piece.len(),
            Some(Err(error)) => break Some(error),
            None => break None,
        }
    };
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_secs(30) && took <= Duration::from_secs(130),
        "{took:?}: {error:?}"
    );
    assert!(taken < 200_000, "{taken}");
    drop(stalled);
    let taken = reading.await.expect("it is whole");
    assert_eq!(taken.matches(&value).count(), CHANGES, "{} bytes", taken.len());
}

/// Of a lock call that goes while a lease is granted for it, or while it waits with one, nothing is left.
#[tokio::test]
async fn a_lock_call_that_goes_leaves_no_lease() {
    let store = store();
    let mut client = Client::new(store.clone(), Options::default()).await;
    // Its key is on its way to the log.
    let (response, mut body) = begin(&mut client, lock("wait", "")).await;
    body.send_data(Bytes::new(), true).expect("it is open");
    leases_become(&store, 1).await;
    body.send_reset(Reason::CANCEL);
    drop((response, body));
    leases_become(&store, 0).await;
    // It is not first.
    store.put_one("busy/1", "");
    let (response, mut body) = begin(&mut client, lock("busy", "?wait=300s")).await;
    body.send_data(Bytes::new(), true).expect("it is open");
    leases_become(&store, 1).await;
    body.send_reset(Reason::CANCEL);
    drop((response, body));
    leases_become(&store, 0).await;
}

/// What is to be taken back is taken back in the end, whatever the cluster says meanwhile.
#[tokio::test(start_paused = true)]
async fn what_is_given_up_is_taken_back_in_the_end() {
    let store = store();
    store.put_one("busy/1", "");
    let mut client = Client::new(store.clone(), Options::default()).await;
    let (response, mut body) = begin(&mut client, lock("busy", "?wait=300s")).await;
    body.send_data(Bytes::new(), true).expect("it is open");
    leases_become(&store, 1).await;
    store.state().failure = Some(Error::TooManyRequests);
    body.send_reset(Reason::CANCEL);
    drop((response, body));
    tokio::time::sleep(Duration::from_secs(20)).await;
    store.state().failure = None;
    leases_become(&store, 0).await;
}

/// A release that is carried out late takes no lock from a call that has asked again since.
#[tokio::test]
async fn a_late_release_takes_no_lock_from_the_next_call() {
    let store = store();
    store.state().leases.push(7);
    let options = Options::default();
    let call = async |method: &str| {
        let path = "/api/v1/locks/l?lease=7";
        outcome(ask(&store, &options, request(method, path, &[], "")).await).await
    };
    let done = (200, String::new());
    let holds = || {
        let request = api::kv::RangeRequest {
            key: "l/7".into(),
            ..Default::default()
        };
        let store = store.clone();
        async move { api::Store::range(&store, request).await.expect("reads").count == 1 }
    };
    assert_eq!(call("POST").await, done);
    store.state().is_late = deletes;
    let late = tokio::spawn({
        let (store, options) = (store.clone(), options.clone());
        async move {
            let path = "/api/v1/locks/l?lease=7";
            ask(&store, &options, request("DELETE", path, &[], "")).await;
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    // Its client has given it up; what is on its way is carried out all the same.
    late.abort();
    let _ = late.await;
    assert_eq!(call("POST").await, done);
    store.state().is_late = |_| false;
    store.release_late.notify_waiters();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(holds().await);
    assert_eq!(call("DELETE").await, done);
    assert!(!holds().await);
    assert_eq!(call("DELETE").await, (404, "lock-not-held".to_owned()));
}

fn lock(name: &str, query: &str) -> Request<()> {
    let request = Request::post(format!("http://fake/api/v1/locks/{name}{query}"));
    request.body(()).expect("whole")
}

async fn leases_become(store: &Fake, count: usize) {
    let become_so = async {
        while store.state().leases.len() != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(60), become_so).await.expect("in time");
}
