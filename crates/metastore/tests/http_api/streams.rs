//! Event streams and long polls.

use std::time::{Duration, Instant};

use etcd_client::{DeleteOptions, Txn, TxnOp};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::client::Http;
use crate::nodes::Nodes;
use crate::support::{Storage, on_both_engines, raise_limit};

on_both_engines! { 300;
    streams_show_what_changed,
    streams_resume_without_loss,
    streams_say_that_they_live,
    history_that_is_gone,
    long_polls,
    a_thousand_streams,
    clients_that_stop_reading,
}

async fn streams_show_what_changed(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    etcd.put("w/old", "1", None).await.unwrap();
    let mut events = http.events("/api/v1/watch?prefix=w/&prev=true", &[]).await;
    let hello = events.next_any().await.unwrap();
    assert_eq!(
        (&*hello.name, &*hello.id, &hello.data),
        ("progress", "2", &json!({"revision": 2}))
    );
    // One event for all that happens at one revision; what is not watched is not there.
    let ops = [
        TxnOp::put("w/a", "1", None),
        TxnOp::put("x/a", "1", None),
        TxnOp::put(&b"w/\xff"[..], &b"\xff"[..], None),
        TxnOp::delete("w/old", None),
    ];
    etcd.txn(Txn::new().and_then(ops)).await.unwrap();
    let event = events.next().await;
    assert_eq!((&*event.name, &*event.id), ("", "3"));
    assert_eq!(
        event.data,
        json!({"revision": 3, "events": [
            {"type": "put", "key": "w/a", "value": "1", "create_revision": 3, "mod_revision": 3, "version": 1},
            {"type": "put", "key_base64": "dy//", "value_base64": "/w==", "create_revision": 3, "mod_revision": 3, "version": 1},
            {"type": "delete", "key": "w/old", "mod_revision": 3,
             "prev": {"key": "w/old", "value": "1", "create_revision": 2, "mod_revision": 2, "version": 1}},
        ]})
    );
    // A deletion of very many keys at once comes in pieces, and is one event all the same.
    for batch in 0..40 {
        let puts: Vec<_> = (0..100)
            .map(|at| TxnOp::put(format!("w/many/{batch:02}{at:02}"), "v", None))
            .collect();
        etcd.txn(Txn::new().and_then(puts)).await.unwrap();
    }
    assert_eq!(events.changes(4000).await.len(), 4000);
    etcd.delete("w/many/", Some(DeleteOptions::new().with_prefix()))
        .await
        .unwrap();
    let event = events.next().await;
    assert_eq!(event.data["events"].as_array().map(Vec::len), Some(4000));

    let http = nodes.http().await;
    let mut deletes = http
        .events(
            "/api/v1/watch?prefix=w/&only=delete&from_revision=2&encoding=base64",
            &[],
        )
        .await;
    let event = deletes.next().await;
    assert_eq!(
        event.data,
        json!({"revision": 3, "events": [{"type": "delete", "key_base64": "dy9vbGQ=", "mod_revision": 3}]})
    );
    assert_eq!(deletes.next().await.id, "44");
}

async fn streams_resume_without_loss(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    let mut writer = nodes.http().await;
    let writing = tokio::spawn(async move {
        for at in 0..500 {
            writer.put_key("r/key", &at.to_string()).await;
        }
    });
    // Cut off again and again, it goes on where it was.
    let mut seen = Vec::new();
    let mut last = "1".to_owned();
    while seen.len() < 500 {
        // The revision in the URL is from long ago: what was seen last counts.
        let path = "/api/v1/watch?prefix=r/&from_revision=2";
        let mut events = http.events(path, &[("last-event-id", &last)]).await;
        for _ in 0..fastrand::usize(1..40).min(500 - seen.len()) {
            let event = events.next().await;
            for change in event.data["events"].as_array().unwrap() {
                seen.push(change["value"].as_str().unwrap().to_owned());
            }
            last = event.id;
        }
        drop(events);
        http = nodes.http().await;
    }
    writing.await.unwrap();
    assert_eq!(seen, (0..500).map(|at| at.to_string()).collect::<Vec<_>>());
    for wrong in ["x", "+5", "05", "-1", "9223372036854775807"] {
        let refused = http.send("GET", "/api/v1/watch", &[("last-event-id", wrong)], "").await;
        assert_eq!(
            refused.problem(400, "invalid-header")["header"],
            "last-event-id",
            "{wrong}"
        );
    }
    // An empty one is none, as some clients send it.
    let path = "/api/v1/watch?prefix=r/&from_revision=2&wait=60s";
    let polled = http.send("GET", path, &[("last-event-id", "")], "").await.ok();
    assert_eq!(polled["events"][0]["value"], "0");
}

async fn streams_say_that_they_live(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let mut events = http.events("/api/v1/watch?prefix=quiet/&heartbeat=100ms", &[]).await;
    assert_eq!(events.next_any().await.unwrap().id, "1");
    let put = etcd.put("other", "1", None).await.unwrap();
    let revision = put.header().unwrap().revision();
    // Although nothing that is watched changes, the stream moves on, so that it can resume after a compaction.
    let begun = Instant::now();
    loop {
        let event = events.next_any().await.unwrap();
        assert_eq!(
            (&*event.name, &event.data["events"]),
            ("progress", &serde_json::Value::Null)
        );
        if event.id == revision.to_string() {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    // Comments, which readers of events do not see, keep what lies between from taking it for dead.
    while events.comments < 3 {
        events.next_any().await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}

async fn history_that_is_gone(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    for at in 0..10 {
        http.put_key("k", &at.to_string()).await;
    }
    etcd.compact(8, None).await.unwrap();
    for path in [
        "/api/v1/watch?from_revision=3",
        "/api/v1/watch?after_revision=2&wait=60s",
    ] {
        let problem = http.compacted(path, &[]).await;
        assert_eq!(
            (&problem["compact_revision"], &problem["code_name"]),
            (&8.into(), &"OutOfRange".into())
        );
    }
    http.compacted("/api/v1/watch?prefix=k", &[("last-event-id", "3")])
        .await;
    // What is left is there.
    let mut events = http.events("/api/v1/watch?from_revision=8", &[]).await;
    assert_eq!(events.changes(4).await[0].3, 8);
}

async fn long_polls(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    http.put_key("p/a", "1").await;
    http.put_key("p/b", "2").await;
    // What is there already comes at once.
    let begun = Instant::now();
    let polled = http.get("/api/v1/watch?prefix=p/&after_revision=1&wait=60s").await.ok();
    assert!(begun.elapsed() < Duration::from_secs(50));
    assert_eq!(
        (&polled["revision"], polled["events"].as_array().map(Vec::len)),
        (&3.into(), Some(2))
    );
    // Then it waits.
    let next = polled["next"].as_str().unwrap().to_owned();
    assert_eq!(next, "/api/v1/watch?after_revision=3&prefix=p/&wait=60000ms");
    let mut other = nodes.http().await;
    let waiting = tokio::spawn(async move { other.get(&next).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished());
    let revision = http.put_key("p/c", "3").await;
    let polled = waiting.await.unwrap().ok();
    assert_eq!(
        (&polled["revision"], &polled["events"][0]["value"]),
        (&revision.into(), &"3".into())
    );
    // In vain, it says up to where nothing happened.
    let last = http.put_key("elsewhere", "4").await;
    let begun = Instant::now();
    let polled = http
        .get(&format!("/api/v1/watch?prefix=p/&after_revision={revision}&wait=300ms"))
        .await
        .ok();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(polled["events"], json!([]));
    // Sooner or later: it waits for that only briefly.
    let (begun, mut told) = (Instant::now(), polled);
    while told["revision"] != last {
        assert!(begun.elapsed() < Duration::from_secs(60), "{told} never gets to {last}");
        told = http.get(told["next"].as_str().unwrap()).await.ok();
        assert_eq!(told["events"], json!([]));
    }
    // Without a beginning, what comes next counts.
    let polled = http.get("/api/v1/watch?prefix=p/&wait=100ms").await.ok();
    assert_eq!(polled["events"], json!([]));
    // Many changes come in parts, none of which is lost.
    let mut etcd = nodes.etcd().await;
    for first in (0..2500).step_by(100) {
        let put = |at: usize| TxnOp::put(format!("p/many/{at:04}"), format!("{at:0200}"), None);
        let puts: Vec<TxnOp> = (first..first + 100).map(put).collect();
        etcd.txn(Txn::new().and_then(puts)).await.unwrap();
    }
    let mut path = format!("/api/v1/watch?prefix=p/&after_revision={last}&wait=60s");
    let mut seen = 0;
    let mut polls = 0;
    while seen < 2500 {
        let polled = http.get(&path).await.ok();
        for event in polled["events"].as_array().unwrap() {
            assert_eq!(event["value"], format!("{seen:0200}"));
            seen += 1;
        }
        polls += 1;
        assert!(polls < 100);
        path = polled["next"].as_str().unwrap().to_owned();
    }
    assert!(polls > 1, "2500 changes came at once");
}

/// The memory that a process has in use, in bytes.
fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("Linux says it");
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse().ok())
        .expect("a number");
    kib * 1024
}

async fn a_thousand_streams(storage: Storage) {
    const STREAMS: usize = 1000;
    raise_limit();
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    let before = resident_bytes(nodes.nodes[0].pid());
    let url = nodes.nodes[0].url().to_owned();
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let mut events = Http::connect(&url).await.events("/api/v1/watch?prefix=t/", &[]).await;
        assert_eq!(events.next_any().await.unwrap().name, "progress");
        streams.push(events);
    }
    let used = resident_bytes(nodes.nodes[0].pid()).saturating_sub(before);
    assert!(used < 200 << 20, "{STREAMS} streams take {used} bytes");
    for at in 0..10 {
        http.put_key(&format!("t/{at}"), "v").await;
    }
    for events in &mut streams {
        let changes = events.changes(10).await;
        assert!(
            changes
                .iter()
                .enumerate()
                .all(|(at, change)| change.1 == format!("t/{at}")),
            "{changes:?}"
        );
    }
}

/// Clients that stop reading are cut off within a bound. Until then they cost what is under way to them, whether it is
/// new or they ask for history, and hold nobody up.
async fn clients_that_stop_reading(storage: Storage) {
    const CLIENTS: usize = 50;
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    let address = nodes.nodes[0].url().strip_prefix("http://").unwrap().to_owned();
    // Far more than what sockets and buffers hold.
    let value = "v".repeat(1 << 20);
    let mut write = async || {
        for _ in 0..50 {
            http.put_key("slow/key", &value).await;
            http.put_key("slow/key", "").await;
        }
    };
    write().await;
    // What that costs the node by itself.
    let pid = nodes.nodes[0].pid();
    let before = resident_bytes(pid);
    write().await;
    let control = resident_bytes(pid).saturating_sub(before);
    let mut slow = Vec::new();
    for at in 0..CLIENTS {
        // No two see the same, so that nothing is shared.
        let (end, from) = (
            format!("slow/key{at}"),
            if at % 2 == 0 { "&from_revision=2" } else { "" },
        );
        let request = format!("GET /api/v1/watch?start=slow/&end={end}{from} HTTP/1.1\r\nhost: x\r\n\r\n");
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = vec![0; 64];
        let read = stream.read(&mut head).await.unwrap();
        assert!(head[..read].starts_with(b"HTTP/1.1 200"));
        slow.push(stream);
    }
    let before = resident_bytes(pid);
    write().await;
    let begun = Instant::now();
    let used = resident_bytes(pid).saturating_sub(before + control);
    let each = used / CLIENTS as u64;
    assert!(
        each < 6 << 20,
        "{CLIENTS} clients that do not read take {each} bytes each"
    );
    // Their connections end although nothing is read from them: writing to them fails in the end.
    for stream in &mut slow {
        while stream.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert!(
                begun.elapsed() < Duration::from_secs(180),
                "a client that does not read is never cut off"
            );
        }
    }
    // What others get is not held up.
    let mut http = nodes.http().await;
    assert_eq!(http.get("/api/v1/kv/slow/key").await.status, 200);
}
