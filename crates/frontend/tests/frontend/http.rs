//! The HTTP endpoints.

use std::sync::Arc;

use api::limits::{ETCD_CLUSTER_VERSION, ETCD_VERSION};
use api::store::Alarm;
use api::{Error, Limits};
use axum::body::Body;
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use metastore_frontend::{ConnectionSettings, Frontend, Options, ResponseBody, router, serve_connection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::ServiceExt;

use crate::fake::Fake;

async fn request(store: &Fake, method: Method, uri: &str) -> Response<ResponseBody> {
    let options = Options {
        metrics: Arc::new(|| "up 1\n".to_owned()),
        ..Options::default()
    };
    let request = Request::builder()
        .method(method)
        .uri(uri)
        .body(Body::empty())
        .expect("whole");
    let frontend = Frontend::new(store.clone(), options);
    match frontend.oneshot(request).await {
        Ok(response) => response,
        Err(impossible) => match impossible {},
    }
}

fn header<'a>(response: &'a Response<ResponseBody>, name: &str) -> &'a str {
    response
        .headers()
        .get(name)
        .map_or("", |value| value.to_str().expect("text"))
}

async fn text(response: Response<ResponseBody>) -> String {
    let body = response.into_body().collect().await.expect("whole").to_bytes();
    String::from_utf8(body.to_vec()).expect("text")
}

async fn get(store: &Fake, uri: &str) -> (u16, String) {
    let response = request(store, Method::GET, uri).await;
    (response.status().as_u16(), text(response).await)
}

fn answer(status: u16, text: &str) -> (u16, String) {
    (status, text.to_owned())
}

#[tokio::test]
async fn health_says_what_is_wrong() {
    let store = Fake::new(Limits::default());
    let healthy = answer(200, r#"{"health":"true","reason":""}"#);
    let sick = |reason: &str| answer(503, &format!("{{\"health\":\"false\",\"reason\":\"{reason}\"}}\n"));
    assert_eq!(get(&store, "/health").await, healthy);

    store.state().status.alarms = vec![Alarm::NoSpace(1), Alarm::Corrupt(1)];
    assert_eq!(get(&store, "/health").await, sick("ALARM NOSPACE"));
    assert_eq!(get(&store, "/health?exclude=NOSPACE").await, sick("ALARM CORRUPT"));
    assert_eq!(
        get(&store, "/health?exclude=NOSPACE&exclude=CORRUPT&exclude=").await,
        healthy
    );

    store.state().status.alarms.clear();
    store.state().status.leader = 0;
    assert_eq!(get(&store, "/health").await, sick("RAFT NO LEADER"));
    assert_eq!(get(&store, "/health?serializable=true").await, healthy);

    store.state().status.leader = 12;
    store.state().failure = Some(Error::Timeout);
    assert_eq!(
        get(&store, "/health").await,
        sick("RANGE ERROR:etcdserver: request timed out")
    );

    let response = request(&store, Method::GET, "/health").await;
    assert_eq!(header(&response, "content-type"), "text/plain; charset=utf-8");
    assert_eq!(header(&response, "x-content-type-options"), "nosniff");
    for uri in ["/health", "/livez", "/readyz", "/readyz/non_learner", "/version"] {
        for method in [Method::POST, Method::HEAD] {
            let response = request(&store, method, uri).await;
            assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{uri}");
            assert_eq!(header(&response, "allow"), "GET");
        }
    }
}

#[tokio::test]
async fn livez_and_readyz_run_their_checks() {
    let store = Fake::new(Limits::default());
    let all = "[+]data_corruption ok\n[+]serializable_read ok\n[+]linearizable_read ok\n[+]non_learner ok\nok\n";
    assert_eq!(get(&store, "/livez").await, answer(200, "ok\n"));
    assert_eq!(
        get(&store, "/livez?verbose").await,
        answer(200, "[+]serializable_read ok\nok\n")
    );
    assert_eq!(
        get(&store, "/livez?verbose&exclude=serializable_read").await,
        answer(200, "ok\n")
    );
    assert_eq!(get(&store, "/readyz?exclude=other").await, answer(200, "ok\n"));
    assert_eq!(get(&store, "/readyz?verbose=1").await, answer(200, all));
    assert_eq!(get(&store, "/readyz/linearizable_read").await, answer(200, "ok\n"));
    let verbose = answer(200, "[+]linearizable_read ok\nok\n");
    assert_eq!(get(&store, "/readyz/linearizable_read?verbose").await, verbose);
    assert_eq!(
        get(&store, "/livez/linearizable_read").await,
        answer(404, "404 page not found\n")
    );

    store.state().status.alarms = vec![Alarm::Corrupt(1)];
    store.state().status.is_learner = true;
    store.state().failure = Some(Error::NoLeader);
    let failed = "[-]data_corruption failed: alarm activated: CORRUPT\n\
                  [-]serializable_read failed: etcdserver: no leader\n\
                  [-]linearizable_read failed: etcdserver: no leader\n\
                  [-]non_learner failed: not supported for learner\n\n";
    assert_eq!(get(&store, "/readyz").await, answer(503, failed));
    let excluded = "/readyz?exclude=serializable_read&exclude=linearizable_read&exclude=non_learner";
    let failed = answer(503, "[-]data_corruption failed: alarm activated: CORRUPT\n\n");
    assert_eq!(get(&store, excluded).await, failed);
    let failed = answer(503, "[-]serializable_read failed: etcdserver: no leader\n\n");
    assert_eq!(get(&store, "/livez").await, failed);
}

/// What a cluster without a quorum, one with damaged data, and a learner answer to those who ask whether to send work.
#[tokio::test]
async fn members_of_a_cluster_say_what_they_lack() {
    let store = Fake::new(Limits::default());
    let sick = |reason: &str| answer(503, &format!("{{\"health\":\"false\",\"reason\":\"{reason}\"}}\n"));
    let healthy = answer(200, r#"{"health":"true","reason":""}"#);
    let report = |failed: &[(&str, &str)]| {
        let mut report = String::new();
        for name in [
            "data_corruption",
            "serializable_read",
            "linearizable_read",
            "non_learner",
        ] {
            match failed.iter().find(|(failed, _)| *failed == name) {
                Some((_, reason)) => report += &format!("[-]{name} failed: {reason}\n"),
                None => report += &format!("[+]{name} ok\n"),
            }
        }
        answer(503, &format!("{report}\n"))
    };

    // No leader: alive, of use for reads that may be old, and for nothing else.
    store.state().status.leader = 0;
    store.state().linearizable_failure = Some(Error::Timeout);
    assert_eq!(get(&store, "/health").await, sick("RAFT NO LEADER"));
    assert_eq!(get(&store, "/health?serializable=true").await, healthy);
    assert_eq!(get(&store, "/livez").await, answer(200, "ok\n"));
    let timed_out = ("linearizable_read", "etcdserver: request timed out");
    assert_eq!(get(&store, "/readyz").await, report(&[timed_out]));
    assert_eq!(
        get(&store, "/readyz?exclude=linearizable_read").await,
        answer(200, "ok\n")
    );
    assert_eq!(get(&store, "/readyz/serializable_read").await, answer(200, "ok\n"));
    let alone = answer(503, "[-]linearizable_read failed: etcdserver: request timed out\n\n");
    assert_eq!(get(&store, "/readyz/linearizable_read").await, alone);

    // A leader, out of reach of a quorum.
    store.state().status.leader = 12;
    assert_eq!(
        get(&store, "/health").await,
        sick("RANGE ERROR:etcdserver: request timed out")
    );

    // Some member's data is damaged: all say so, and answer reads.
    store.state().linearizable_failure = None;
    store.state().status.alarms = vec![Alarm::Corrupt(99)];
    assert_eq!(get(&store, "/health").await, sick("ALARM CORRUPT"));
    assert_eq!(get(&store, "/health?serializable=true").await, sick("ALARM CORRUPT"));
    assert_eq!(get(&store, "/health?exclude=CORRUPT").await, healthy);
    assert_eq!(get(&store, "/livez").await, answer(200, "ok\n"));
    let corrupt = ("data_corruption", "alarm activated: CORRUPT");
    assert_eq!(get(&store, "/readyz").await, report(&[corrupt]));
    let not_of_checks = get(&store, "/readyz/data_corruption").await;
    assert_eq!(
        not_of_checks,
        answer(503, "[-]data_corruption failed: alarm activated: CORRUPT\n\n")
    );
    // A full disk does not count there.
    store.state().status.alarms = vec![Alarm::NoSpace(99)];
    assert_eq!(get(&store, "/readyz").await, answer(200, "ok\n"));

    // A disk that does not take the Raft log's writes: of no use for writes, whatever the part that the member plays.
    store.state().status.alarms.clear();
    store.state().status.log_stalled = Some(std::time::Duration::from_millis(1300));
    let stalled = "the disk of the Raft log has not finished a write for 1.3s";
    assert_eq!(get(&store, "/health").await, sick(&format!("LOG_STALLED: {stalled}")));
    assert_eq!(get(&store, "/health?exclude=LOG_STALLED").await, healthy);
    assert_eq!(get(&store, "/livez").await, answer(200, "ok\n"));
    let failed = answer(503, &format!("[-]log_write failed: {stalled}\n\n"));
    assert_eq!(get(&store, "/readyz/log_write").await, failed);
    let (status, body) = get(&store, "/readyz").await;
    assert_eq!(status, 503);
    assert!(
        body.starts_with(&format!("[-]log_write failed: {stalled}\n[+]data_corruption ok\n")),
        "{body}"
    );
    assert_eq!(get(&store, "/readyz?exclude=log_write").await, answer(200, "ok\n"));
    store.state().status.log_stalled = None;
    assert_eq!(
        get(&store, "/readyz/log_write?verbose").await,
        answer(200, "[+]log_write ok\nok\n")
    );

    // A learner is healthy, and not to be sent work. Its own probes are reads of the store, not calls of a client.
    store.state().status.alarms.clear();
    store.state().status.is_learner = true;
    assert_eq!(get(&store, "/health").await, healthy);
    assert_eq!(get(&store, "/livez").await, answer(200, "ok\n"));
    let learner = ("non_learner", "not supported for learner");
    assert_eq!(get(&store, "/readyz").await, report(&[learner]));
}

#[tokio::test]
async fn version_metrics_and_nothing_else() {
    let store = Fake::new(Limits::default());
    let version = format!(
        r#"{{"etcdserver":"{ETCD_VERSION}","etcdcluster":"{ETCD_CLUSTER_VERSION}","storage":"{ETCD_CLUSTER_VERSION}"}}"#
    );
    assert_eq!(get(&store, "/version").await, answer(200, &version));
    assert_eq!(get(&store, "/metrics").await, answer(200, "up 1\n"));
    assert_eq!(get(&store, "/").await, answer(404, "404 page not found\n"));
    assert_eq!(get(&store, "/%76ersion").await, answer(200, &version));
    let response = request(&store, Method::GET, "/version").await;
    assert_eq!(header(&response, "content-type"), "application/json");
    let response = request(&store, Method::GET, "/metrics").await;
    assert_eq!(
        header(&response, "content-type"),
        "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"
    );
}

#[tokio::test]
async fn grpc_must_be_posted() {
    let request = Request::builder()
        .uri("/etcdserverpb.KV/Range")
        .version(Version::HTTP_2)
        .header("content-type", "application/grpc+proto")
        .body(Body::empty())
        .expect("whole");
    let router = router(Fake::new(Limits::default()), Options::default());
    let response = router
        .oneshot(request)
        .await
        .unwrap_or_else(|impossible| match impossible {});
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(response.headers()["grpc-status"], "13");
}

#[tokio::test]
async fn http_1_is_served_until_stopped() {
    let (mut client, server) = tokio::io::duplex(4096);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let frontend = Frontend::new(Fake::new(Limits::default()), Options::default());
    let served = tokio::spawn(async move {
        let settings = ConnectionSettings::default();
        serve_connection(server, frontend, &settings, async { drop(stopped.await) }).await
    });
    client
        .write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("writes");
    let mut reply = vec![0; 4096];
    let mut length = 0;
    while !reply[..length].ends_with(br#""reason":""}"#) {
        length += client.read(&mut reply[length..]).await.expect("reads");
    }
    assert!(reply.starts_with(b"HTTP/1.1 200 OK\r\n"));
    drop(stop);
    served.await.expect("ends").expect("well");
    assert_eq!(
        client.read(&mut reply).await.expect("reads"),
        0,
        "the connection is closed"
    );
}
