//! HTTP and etcd's API on the same data, on both engines, on one node and on three, where each protocol uses another
//! member.

use std::collections::BTreeSet;

use etcd_client::{Client, Compare, CompareOp, DeleteOptions, GetOptions, Txn, TxnOp};

use crate::client::Http;
use crate::nodes::Nodes;
use crate::support::Storage;

const WRITERS: usize = 10;
const KEYS_EACH: usize = 100;

async fn etcd_value(etcd: &mut Client, key: &str) -> Option<String> {
    let got = etcd.get(key, None).await.expect("the get succeeds");
    got.kvs().first().map(|kv| kv.value_str().expect("text").to_owned())
}

async fn http_value(http: &mut Http, key: &str) -> Option<String> {
    let answer = http.get(&format!("/api/v1/kv/{key}")).await;
    match answer.status {
        404 => None,
        _ => {
            assert_eq!(answer.status, 200, "{answer:?}");
            Some(answer.text().to_owned())
        }
    }
}

async fn all_of_them(storage: Storage, count: usize) {
    let nodes = Nodes::start(storage, count);
    http_write_is_read_by_etcd(&nodes).await;
    etcd_write_is_read_by_http(&nodes).await;
    writes_of_both_are_one_history(&nodes).await;
    etcd_prefix_query_sees_http_data(&nodes).await;
    http_delete_is_seen_by_etcd(&nodes).await;
    etcd_delete_is_seen_by_http(&nodes).await;
    etcd_range_query_over_http_data(&nodes).await;
    twenty_writers_at_once(&nodes).await;
    a_stream_sees_both_in_one_order(&nodes).await;
    a_stale_compare_and_swap_loses(&nodes).await;
}

async fn http_write_is_read_by_etcd(nodes: &Nodes) {
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let revision = http.put_key("s1/key", "by http").await;
    let got = etcd.get("s1/key", None).await.unwrap();
    let kv = &got.kvs()[0];
    assert_eq!(
        (kv.value(), kv.mod_revision(), kv.version()),
        (&b"by http"[..], revision, 1)
    );
    // Bytes that are no text, in key and value.
    let answer = http.put("/api/v1/kv/s1/%00%ff%2F", vec![0, 255, 13, 10]).await;
    answer.ok();
    let got = etcd.get(&b"s1/\x00\xff/"[..], None).await.unwrap();
    assert_eq!(got.kvs()[0].value(), [0, 255, 13, 10]);
}

async fn etcd_write_is_read_by_http(nodes: &Nodes) {
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let put = etcd.put("s2/key", "by etcd", None).await.unwrap();
    let revision = put.header().unwrap().revision();
    let answer = http.get("/api/v1/kv/s2/key").await;
    assert_eq!((answer.status, answer.text()), (200, "by etcd"));
    assert_eq!(answer.header("etag"), format!("\"{revision}\""));
    assert_eq!(answer.header("metastore-version"), "1");
    assert_eq!(answer.header("metastore-create-revision"), revision.to_string());
    etcd.put(&b"s2/\xfe"[..], &b"\xff\x00"[..], None).await.unwrap();
    let answer = http.get("/api/v1/kv/s2/%FE").await;
    assert_eq!(
        (&answer.body[..], answer.header("content-type")),
        (&b"\xff\x00"[..], "application/octet-stream")
    );
}

async fn writes_of_both_are_one_history(nodes: &Nodes) {
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let mut last = 0;
    for round in 0..5 {
        let by_http = http.put_key("s3/mixed", &format!("http {round}")).await;
        let put = etcd.put("s3/mixed", format!("etcd {round}"), None).await.unwrap();
        let by_etcd = put.header().unwrap().revision();
        assert!(last < by_http && by_http < by_etcd, "{last} {by_http} {by_etcd}");
        last = by_etcd;
    }
    let answer = http.get("/api/v1/kv/s3/mixed").await;
    assert_eq!((answer.text(), answer.header("metastore-version")), ("etcd 4", "10"));
    assert_eq!(etcd_value(&mut etcd, "s3/mixed").await.as_deref(), Some("etcd 4"));
    // The past is the same too.
    let answer = http.get(&format!("/api/v1/kv/s3/mixed?revision={}", last - 1)).await;
    assert_eq!(answer.text(), "http 4");
}

async fn etcd_prefix_query_sees_http_data(nodes: &Nodes) {
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    for at in 0..20 {
        http.put_key(&format!("s4/app/{at:02}"), &at.to_string()).await;
    }
    http.put_key("s4/apple", "no").await;
    let got = etcd
        .get("s4/app/", Some(GetOptions::new().with_prefix()))
        .await
        .unwrap();
    let values: Vec<_> = got.kvs().iter().map(|kv| kv.value_str().unwrap().to_owned()).collect();
    assert_eq!(values, (0..20).map(|at| at.to_string()).collect::<Vec<_>>());
    assert_eq!(got.count(), 20);
}

async fn http_delete_is_seen_by_etcd(nodes: &Nodes) {
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    etcd.put("s5/a", "1", None).await.unwrap();
    http.put_key("s5/b", "2").await;
    let deleted = http.delete("/api/v1/kv/s5/a?prev=true").await.ok();
    assert_eq!(
        (&deleted["deleted"], &deleted["prevs"][0]["value"]),
        (&1.into(), &"1".into())
    );
    assert_eq!(etcd_value(&mut etcd, "s5/a").await, None);
    assert_eq!(http.delete("/api/v1/kv?prefix=s5/").await.ok()["deleted"], 1);
    let got = etcd.get("s5/", Some(GetOptions::new().with_prefix())).await.unwrap();
    assert_eq!(got.count(), 0);
}

async fn etcd_delete_is_seen_by_http(nodes: &Nodes) {
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    for key in ["s6/a", "s6/b", "s6/c"] {
        http.put_key(key, "x").await;
    }
    etcd.delete("s6/a", None).await.unwrap();
    assert_eq!(http_value(&mut http, "s6/a").await, None);
    assert_eq!(http_value(&mut http, "s6/b").await.as_deref(), Some("x"));
    etcd.delete("s6/", Some(DeleteOptions::new().with_prefix()))
        .await
        .unwrap();
    let listed = http.get("/api/v1/kv?prefix=s6/").await.ok();
    assert_eq!(
        (listed["kvs"].as_array().map(Vec::len), &listed["more"]),
        (Some(0), &false.into())
    );
}

async fn etcd_range_query_over_http_data(nodes: &Nodes) {
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    for key in ["a", "b", "c", "d", "e"] {
        http.put_key(&format!("s7/{key}"), key).await;
    }
    let got = etcd
        .get("s7/b", Some(GetOptions::new().with_range("s7/e").with_limit(2)))
        .await
        .unwrap();
    let keys: Vec<_> = got.kvs().iter().map(|kv| kv.key_str().unwrap()).collect();
    assert_eq!((keys, got.count(), got.more()), (vec!["s7/b", "s7/c"], 3, true));
    // The same question by HTTP.
    let listed = http.get("/api/v1/kv?start=s7/b&end=s7/e&limit=2").await.ok();
    let keys: Vec<_> = listed["kvs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|kv| kv["key"].as_str().unwrap())
        .collect();
    assert_eq!((keys, &listed["more"]), (vec!["s7/b", "s7/c"], &true.into()));
}

async fn twenty_writers_at_once(nodes: &Nodes) {
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
        writers.spawn(async move {
            for at in 0..KEYS_EACH {
                http.put_key(&format!("s8/http/{writer}/{at:03}"), &format!("{writer}-{at}"))
                    .await;
            }
        });
        writers.spawn(async move {
            for at in 0..KEYS_EACH {
                let key = format!("s8/etcd/{writer}/{at:03}");
                etcd.put(key, format!("{writer}-{at}"), None)
                    .await
                    .expect("the put succeeds");
            }
        });
    }
    writers.join_all().await;
    let expected: BTreeSet<(String, String)> = ["http", "etcd"]
        .iter()
        .flat_map(|kind| {
            (0..WRITERS * KEYS_EACH).map(move |at| {
                let (writer, at) = (at / KEYS_EACH, at % KEYS_EACH);
                (format!("s8/{kind}/{writer}/{at:03}"), format!("{writer}-{at}"))
            })
        })
        .collect();
    let (mut http, mut etcd) = (nodes.other_http().await, nodes.etcd().await);
    let got = etcd.get("s8/", Some(GetOptions::new().with_prefix())).await.unwrap();
    let by_etcd: BTreeSet<_> = got
        .kvs()
        .iter()
        .map(|kv| (kv.key_str().unwrap().to_owned(), kv.value_str().unwrap().to_owned()))
        .collect();
    assert_eq!(by_etcd, expected);
    let listed = http.get("/api/v1/kv?prefix=s8/").await.ok();
    let text = |kv: &serde_json::Value, name: &str| kv[name].as_str().expect("text").to_owned();
    let by_http: BTreeSet<_> = listed["kvs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|kv| (text(kv, "key"), text(kv, "value")))
        .collect();
    assert_eq!(by_http, expected);
}

async fn a_stream_sees_both_in_one_order(nodes: &Nodes) {
    const EACH: usize = 50;
    let mut events = nodes.http().await.events("/api/v1/watch?prefix=s9/", &[]).await;
    // So that nothing is written before the watch begins.
    assert_eq!(events.next_any().await.expect("a beginning").name, "progress");
    let (mut http, mut etcd) = (nodes.other_http().await, nodes.etcd().await);
    let by_http = async {
        for at in 0..EACH {
            http.put_key("s9/http", &at.to_string()).await;
        }
    };
    let by_etcd = async {
        for at in 0..EACH {
            etcd.put("s9/etcd", at.to_string(), None)
                .await
                .expect("the put succeeds");
        }
    };
    tokio::join!(by_http, by_etcd);
    let changes = events.changes(2 * EACH).await;
    assert!(changes.is_sorted_by(|left, right| left.3 < right.3), "{changes:?}");
    for key in ["s9/http", "s9/etcd"] {
        let values: Vec<_> = changes
            .iter()
            .filter(|change| change.1 == key)
            .map(|change| &*change.2)
            .collect();
        let expected: Vec<_> = (0..EACH).map(|at| at.to_string()).collect();
        assert_eq!(values, expected, "{key}");
    }
}

async fn a_stale_compare_and_swap_loses(nodes: &Nodes) {
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let first = http.put_key("s10/key", "first").await;
    let etag = format!("\"{first}\"");
    let txn = Txn::new()
        .when([Compare::mod_revision("s10/key", CompareOp::Equal, first)])
        .and_then([TxnOp::put("s10/key", "by txn", None)]);
    let done = etcd.txn(txn.clone()).await.unwrap();
    assert!(done.succeeded());
    let won = done.header().unwrap().revision();
    let lost = http
        .send("PUT", "/api/v1/kv/s10/key", &[("if-match", &etag)], "by http")
        .await;
    let problem = lost.problem(412, "precondition-failed");
    assert_eq!(
        (&problem["mod_revision"], lost.header("etag")),
        (&won.into(), &*format!("\"{won}\""))
    );
    assert_eq!(http_value(&mut http, "s10/key").await.as_deref(), Some("by txn"));
    // And the other way round.
    let etag = format!("\"{won}\"");
    http.send("PUT", "/api/v1/kv/s10/key", &[("if-match", &etag)], "by http")
        .await
        .ok();
    assert!(!etcd.txn(txn).await.unwrap().succeeded());
    assert_eq!(etcd_value(&mut etcd, "s10/key").await.as_deref(), Some("by http"));
}

macro_rules! on {
    ($($name:ident: $storage:ident $count:literal;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                all_of_them(Storage::$storage, $count).await;
            }
        )*
    };
}

on! {
    one_node_rocksdb: RocksDb 1;
    one_node_memory: Memory 1;
    three_nodes_rocksdb: RocksDb 3;
    three_nodes_memory: Memory 3;
}
