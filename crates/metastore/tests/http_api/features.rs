//! What the API does, one thing at a time.

use std::time::{Duration, Instant};

use etcd_client::{Compare, CompareOp, LockOptions, Permission, PutOptions, Txn, TxnOp};
use serde_json::{Value, json};

use crate::client::Http;
use crate::nodes::{Nodes, enable_auth};
use crate::support::authority::Authority;
use crate::support::{Setup, Storage, free_port, on_both_engines, temp_dir};

on_both_engines! { 300;
    keys,
    conditions,
    representations,
    lists,
    large_lists,
    range_deletes,
    transactions,
    leases,
    locks,
    locks_of_both_protocols,
    users,
    signed_tokens,
    users_change_while_a_lock_is_waited_for,
    limits_of_the_operator,
    members_and_status,
    the_document_and_the_page,
    head_and_options,
    a_member_without_a_vote,
}

fn keys_of(list: &Value) -> Vec<&str> {
    let kvs = list["kvs"].as_array().expect("a list");
    kvs.iter().map(|kv| kv["key"].as_str().expect("text")).collect()
}

async fn keys(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);

    let missing = http.get("/api/v1/kv/none").await;
    let problem = missing.problem(404, "key-not-found");
    assert_eq!(
        (&problem["code"], &problem["code_name"]),
        (&5.into(), &"NotFound".into())
    );

    // A key is bytes; slashes are a part of it wherever they stand.
    for (path, key) in [
        ("a/b/c", &b"a/b/c"[..]),
        ("/registry/pods/x", b"/registry/pods/x"),
        ("a%2Fb", b"a/b"),
        ("dir/", b"dir/"),
        ("%2e%2e%2f+x%20y", b"../+x y"),
        ("%00", b"\0"),
        ("%C3%A4", "ä".as_bytes()),
    ] {
        let revision = http.put(&format!("/api/v1/kv/{path}"), path.to_owned()).await.ok()["revision"].clone();
        let got = etcd.get(key, None).await.unwrap();
        assert_eq!(got.kvs()[0].value(), path.as_bytes());
        let answer = http.get(&format!("/api/v1/kv/{path}")).await;
        assert_eq!(
            (answer.text(), answer.header("etag")),
            (path, &*format!("\"{revision}\""))
        );
    }

    let first = http.put_key("k", "1").await;
    let answer = http.put("/api/v1/kv/k?prev=true", "2").await;
    let second = answer.ok()["revision"].as_i64().unwrap();
    assert_eq!(answer.header("etag"), format!("\"{second}\""));
    let prev = &answer.json()["prev"];
    assert_eq!(
        (&prev["value"], &prev["mod_revision"], &prev["version"]),
        (&"1".into(), &first.into(), &1.into())
    );
    assert!(http.put("/api/v1/kv/new?prev=true", "").await.ok()["prev"].is_null());

    let answer = http.get("/api/v1/kv/k").await;
    for (name, value) in [
        ("etag", format!("\"{second}\"")),
        ("metastore-create-revision", first.to_string()),
        ("metastore-mod-revision", second.to_string()),
        ("metastore-version", "2".to_owned()),
        ("metastore-lease", String::new()),
        ("metastore-revision", (second + 1).to_string()),
        ("content-type", "text/plain; charset=utf-8".to_owned()),
        ("x-content-type-options", "nosniff".to_owned()),
        ("content-length", "1".to_owned()),
    ] {
        assert_eq!(answer.header(name), value, "{name}");
    }
    assert_eq!(http.get(&format!("/api/v1/kv/k?revision={first}")).await.text(), "1");
    assert_eq!(http.get("/api/v1/kv/k?serializable=true").await.text(), "2");
    http.get(&format!("/api/v1/kv/k?revision={}", second + 100))
        .await
        .problem(400, "future-revision");
    etcd.compact(second, None).await.unwrap();
    let gone = http.compacted(&format!("/api/v1/kv/k?revision={first}"), &[]).await;
    assert_eq!(gone["compact_revision"], second);

    assert_eq!(http.delete("/api/v1/kv/k").await.ok()["deleted"], 1);
    http.delete("/api/v1/kv/k").await.problem(404, "key-not-found");

    // Empty values, and the largest.
    http.put_key("empty", "").await;
    let answer = http.get("/api/v1/kv/empty").await;
    assert_eq!((answer.status, answer.body.len()), (200, 0));
    let large = vec![b'x'; 1_500_000];
    http.put("/api/v1/kv/large", large.clone()).await.ok();
    assert!(http.get("/api/v1/kv/large").await.body == large);
}

async fn conditions(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    let path = "/api/v1/kv/k";
    let put = async |http: &mut Http, name: &str, value: &str, body: &'static str| {
        http.send("PUT", path, &[(name, value)], body).await
    };
    assert_eq!(
        put(&mut http, "if-match", "*", "x")
            .await
            .problem(412, "precondition-failed")["mod_revision"],
        0
    );
    let created = put(&mut http, "if-none-match", "*", "1").await;
    assert_eq!(created.status, 201);
    let etag = created.header("etag").to_owned();
    let again = put(&mut http, "if-none-match", "*", "2").await;
    again.problem(412, "precondition-failed");
    assert_eq!(again.header("etag"), etag);
    assert_eq!(http.get(path).await.text(), "1");

    let swapped = put(&mut http, "if-match", &etag, "3").await;
    assert_eq!(swapped.status, 200);
    let new_etag = swapped.header("etag").to_owned();
    put(&mut http, "if-match", &etag, "4")
        .await
        .problem(412, "precondition-failed");
    put(&mut http, "if-match", &format!("W/{new_etag}"), "4")
        .await
        .problem(412, "precondition-failed");
    put(&mut http, "if-match", "\"something-else\"", "4")
        .await
        .problem(412, "precondition-failed");
    put(&mut http, "if-none-match", &new_etag, "4")
        .await
        .problem(412, "precondition-failed");
    put(&mut http, "if-none-match", &etag, "5").await.ok();
    put(&mut http, "if-match", "*", "6").await.ok();
    let unquoted = put(&mut http, "if-match", "42", "7")
        .await
        .problem(400, "invalid-header");
    assert_eq!(unquoted["header"], "if-match");
    assert_eq!(http.get(path).await.text(), "6");

    let etag = http.get(path).await.header("etag").to_owned();
    let fresh = http.send("GET", path, &[("if-none-match", &etag)], "").await;
    assert_eq!((fresh.status, fresh.body.len(), fresh.header("etag")), (304, 0, &*etag));
    assert_eq!(
        http.send("GET", path, &[("if-none-match", "\"1\"")], "").await.status,
        200
    );
    http.send("GET", path, &[("if-match", "\"1\"")], "")
        .await
        .problem(412, "precondition-failed");

    http.send("DELETE", path, &[("if-match", "\"1\"")], "")
        .await
        .problem(412, "precondition-failed");
    http.send("DELETE", path, &[("if-match", &etag)], "").await.ok();
    http.send("DELETE", path, &[("if-match", &etag)], "")
        .await
        .problem(412, "precondition-failed");
}

async fn representations(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    http.put("/api/v1/kv/text", "häßlich").await.ok();
    http.put("/api/v1/kv/bytes%ff", vec![0xff, 0]).await.ok();
    let get = async |http: &mut Http, path: &str, accept: &str| http.send("GET", path, &[("accept", accept)], "").await;

    let answer = get(&mut http, "/api/v1/kv/text", "application/json").await;
    assert_eq!(answer.header("content-type"), "application/json");
    let kv = answer.json();
    assert_eq!((&kv["key"], &kv["value"]), (&"text".into(), &"häßlich".into()));
    assert!(kv.get("key_base64").is_none() && kv.get("value_base64").is_none() && kv.get("lease").is_none());
    let kv = get(&mut http, "/api/v1/kv/text?encoding=base64", "application/json")
        .await
        .json();
    assert_eq!(
        (&kv["key_base64"], &kv["value_base64"]),
        (&"dGV4dA==".into(), &"aMOkw59saWNo".into())
    );
    assert!(kv.get("key").is_none() && kv.get("value").is_none());
    let kv = get(&mut http, "/api/v1/kv/bytes%ff", "application/json").await.json();
    assert_eq!(
        (&kv["key_base64"], &kv["value_base64"]),
        (&"Ynl0ZXP/".into(), &"/wA=".into())
    );

    assert_eq!(
        get(&mut http, "/api/v1/kv/text", "application/octet-stream")
            .await
            .header("content-type"),
        "application/octet-stream"
    );
    let html = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";
    assert_eq!(
        get(&mut http, "/api/v1/kv/text", html).await.header("content-type"),
        "text/plain; charset=utf-8"
    );
    get(&mut http, "/api/v1/kv/text", "image/png")
        .await
        .problem(406, "not-acceptable");
    get(&mut http, "/api/v1/kv/bytes%ff", "text/plain")
        .await
        .problem(406, "not-acceptable");

    let list = http.get("/api/v1/kv").await.ok();
    let (bytes, text) = (&list["kvs"][0], &list["kvs"][1]);
    assert_eq!(
        (&bytes["key_base64"], &bytes["value_base64"]),
        (&"Ynl0ZXP/".into(), &"/wA=".into())
    );
    assert_eq!((&text["key"], &text["value"]), (&"text".into(), &"häßlich".into()));
    let list = http.get("/api/v1/kv?encoding=base64").await.ok();
    assert_eq!(list["kvs"][1]["value_base64"], "aMOkw59saWNo");
}

async fn lists(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    for at in 0..10 {
        http.put_key(&format!("app/{at}"), &format!("{}", 9 - at)).await;
    }
    http.put_key("app%2F%ff", "bytes").await;
    http.put_key("b", "other").await;
    let revision = http.get("/api/v1/status").await.ok()["revision"].as_i64().unwrap();

    let all = http.get("/api/v1/kv?end=app0&encoding=auto").await.ok();
    assert_eq!(
        (&all["revision"], all["kvs"].as_array().map(Vec::len)),
        (&revision.into(), Some(11))
    );
    assert_eq!(
        keys_of(&http.get("/api/v1/kv?start=app/8&end=app/%ff").await.ok()),
        ["app/8", "app/9"]
    );
    assert_eq!(
        keys_of(&http.get("/api/v1/kv?prefix=app/&start=app/8&end=app/9").await.ok()),
        ["app/8"]
    );
    assert_eq!(keys_of(&http.get("/api/v1/kv?key=b").await.ok()), ["b"]);
    assert!(keys_of(&http.get("/api/v1/kv?start=b&end=a").await.ok()).is_empty());
    assert_eq!(
        http.get("/api/v1/kv?prefix=app/&count_only=true").await.ok(),
        json!({"revision": revision, "count": 11})
    );
    let kv = &http.get("/api/v1/kv?prefix=app/&keys_only=true&limit=1").await.ok()["kvs"][0];
    assert!(kv.get("value").is_none() && kv["mod_revision"].is_number(), "{kv}");
    let sorted = http
        .get("/api/v1/kv?prefix=app/&end=app/%3a&sort=value&limit=3")
        .await
        .ok();
    assert_eq!(
        (keys_of(&sorted), sorted.get("next")),
        (vec!["app/9", "app/8", "app/7"], None)
    );
    assert_eq!(sorted["more"], true);
    assert_eq!(
        keys_of(
            &http
                .get("/api/v1/kv?prefix=app/&sort=-create_revision&start=app/8&end=app/:")
                .await
                .ok()
        ),
        ["app/9", "app/8"]
    );

    // Pages are of one revision, whatever is written meanwhile, in both directions.
    for (sort, expected) in [
        ("key", (0..10).map(|at| format!("app/{at}")).collect::<Vec<_>>()),
        ("-key", (0..10).rev().map(|at| format!("app/{at}")).collect()),
    ] {
        let mut path = format!("/api/v1/kv?prefix=app/&end=app/:&limit=3&sort={sort}");
        let mut found = Vec::new();
        let mut pinned = None;
        loop {
            let answer = http.get(&path).await;
            let page = answer.ok();
            assert_eq!(
                &page["revision"],
                pinned.get_or_insert(page["revision"].clone()),
                "{sort}"
            );
            found.extend(keys_of(&page).into_iter().map(str::to_owned));
            etcd.put(format!("app/4{}", found.len()), "late", None).await.unwrap();
            match page["next"].as_str() {
                Some(next) => {
                    assert_eq!(page["more"], true);
                    assert_eq!(answer.header("link"), format!("<{next}>; rel=\"next\""));
                    path = next.to_owned();
                }
                None => {
                    assert_eq!(page["more"], false);
                    break;
                }
            }
        }
        assert_eq!(found, expected, "{sort}");
        http.delete("/api/v1/kv?start=app/40&end=app/5").await.ok();
    }
    // Nor does a key lead on whose `next` would be no URL, nor does one make a header that clients refuse.
    let put = |at: u8, length| json!({"put": {"key": format!("long/{at}{}", "k".repeat(length))}});
    let puts = json!({"then": [put(1, 10_000), put(2, 300_000), put(3, 0)]});
    http.post_json("/api/v1/txn", &puts).await.ok();
    let first = http.get("/api/v1/kv?prefix=long/&limit=1&keys_only=true").await;
    assert_eq!((&first.ok()["more"], first.header("link")), (&true.into(), ""));
    let second = http.get(first.ok()["next"].as_str().expect("it leads on")).await;
    let page = second.ok();
    assert_eq!((&page["more"], page.get("next")), (&true.into(), None));
    assert_eq!(second.header("link"), "");
    http.delete("/api/v1/kv?prefix=long/").await.ok();
    // A key that is no text leads on as well.
    let page = http.get("/api/v1/kv?prefix=app/&start=app/9&limit=2").await.ok();
    assert_eq!(page["more"], false);
    let page = http.get("/api/v1/kv?start=app/%ff&limit=1").await.ok();
    let next = page["next"].as_str().expect("b is left");
    assert_eq!(keys_of(&http.get(next).await.ok()), ["b"]);

    etcd.compact(revision, None).await.unwrap();
    let gone = http
        .compacted(&format!("/api/v1/kv?revision={}", revision - 1), &[])
        .await;
    assert_eq!(gone["compact_revision"], revision);
    http.get(&format!("/api/v1/kv?count_only=true&revision={}", revision - 1))
        .await
        .problem(410, "revision-compacted");
    http.get(&format!("/api/v1/kv?sort=value&revision={}", revision - 1))
        .await
        .problem(410, "revision-compacted");
}

async fn large_lists(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    for batch in 0..50 {
        let put = |at| TxnOp::put(format!("l/{batch:02}{at:02}"), "v".repeat(1000), None);
        let puts: Vec<_> = (0..100).map(put).collect();
        assert!(etcd.txn(Txn::new().and_then(puts)).await.unwrap().succeeded());
    }
    let answer = http.get("/api/v1/kv?prefix=l/").await;
    // Its length is not known before it is read.
    assert_eq!(answer.header("transfer-encoding"), "chunked");
    let list = answer.ok();
    let keys = keys_of(&list);
    assert_eq!((keys.len(), keys[0], keys[4999]), (5000, "l/0000", "l/4999"));
    assert!(keys.is_sorted() && list["more"] == false && list["revision"] == 51);
    let answer = http.get("/api/v1/kv?prefix=l/&limit=2001").await;
    let page = answer.ok();
    assert_eq!((keys_of(&page).len(), &page["more"]), (2001, &true.into()));
    assert_eq!(
        keys_of(&http.get(page["next"].as_str().unwrap()).await.ok())[0],
        "l/2001"
    );
    assert_eq!(
        keys_of(&http.get("/api/v1/kv?prefix=l/&sort=-key").await.ok())[0],
        "l/4999"
    );
}

async fn range_deletes(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    for key in ["a/1", "a/2", "a/3", "b"] {
        http.put_key(key, "x").await;
    }
    // A variable that is empty must not empty the store.
    for path in ["/api/v1/kv", "/api/v1/kv?prefix="] {
        assert_eq!(
            http.delete(path).await.problem(400, "invalid-parameter")["parameter"],
            "all"
        );
    }
    let deleted = http.delete("/api/v1/kv?prefix=a/&end=a/3&prev=true").await.ok();
    assert_eq!(
        (&deleted["deleted"], &deleted["prevs"][1]["key"]),
        (&2.into(), &"a/2".into())
    );
    let nothing = http.delete("/api/v1/kv?prefix=none").await.ok();
    assert_eq!(
        (&nothing["deleted"], &nothing["revision"]),
        (&0.into(), &deleted["revision"])
    );
    assert_eq!(http.delete("/api/v1/kv?start=b&end=a").await.ok()["deleted"], 0);
    assert_eq!(http.delete("/api/v1/kv?all=true").await.ok()["deleted"], 2);
}

async fn transactions(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let first = http
        .post_json(
            "/api/v1/txn",
            &json!({
                "compare": [{"key": "a", "exists": false}],
                "then": [
                    {"put": {"key": "a", "value": "1"}},
                    {"put": {"key_base64": "/w==", "value_base64": "AP8="}},
                    {"get": {"prefix": ""}},
                ],
                "else": [{"get": {"key": "a"}}],
            }),
        )
        .await
        .ok();
    assert_eq!((&first["succeeded"], &first["revision"]), (&true.into(), &2.into()));
    let got = &first["responses"][2]["get"];
    assert_eq!(
        (&got["count"], &got["kvs"][1]["value_base64"]),
        (&2.into(), &"AP8=".into())
    );
    assert_eq!(etcd.get(&b"\xff"[..], None).await.unwrap().kvs()[0].value(), [0, 255]);

    let body = json!({
        "compare": [
            {"key": "a", "version": 1},
            {"key": "a", "mod_revision": 1, "op": ">"},
            {"key": "a", "create_revision": 3, "op": "<"},
            {"key": "a", "value": "2", "op": "!="},
            {"key": "a", "value_base64": "MQ=="},
            {"key": "a", "lease": "0"},
            {"prefix": "a", "version": 0, "op": ">"},
        ],
        "then": [{"txn": {
            "compare": [{"key": "a", "value": "2"}],
            "then": [],
            "else": [{"put": {"key": "a", "value": "3", "prev": true}}, {"delete": {"key_base64": "/w==", "prev": true}},
                     {"get": {"prefix": "a", "keys_only": true}}],
        }}],
    });
    let done = http.post_json("/api/v1/txn", &body).await.ok();
    let inner = &done["responses"][0]["txn"];
    assert_eq!((&done["succeeded"], &inner["succeeded"]), (&true.into(), &false.into()));
    assert_eq!(inner["responses"][0]["put"]["prev"]["value"], "1");
    assert_eq!(
        inner["responses"][1]["delete"],
        json!({"deleted": 1, "prevs": [{
        "key_base64": "/w==", "value_base64": "AP8=", "create_revision": 2, "mod_revision": 2, "version": 1}]})
    );
    let kv = &inner["responses"][2]["get"]["kvs"][0];
    assert!(kv["key"] == "a" && kv.get("value").is_none(), "{kv}");
    assert_eq!(http.get("/api/v1/kv/a").await.text(), "3");

    // What is wrong is said, and nothing is done.
    let revision = http.get("/api/v1/status").await.ok()["revision"].clone();
    for (body, status, slug, part) in [
        (json!({"than": []}), 400, "invalid-body", "than"),
        (
            json!({"then": [{"put": {"key": "a", "valeu": "1"}}]}),
            400,
            "invalid-body",
            "valeu",
        ),
        (json!({"then": [{"set": {}}]}), 400, "invalid-body", "set"),
        (
            json!({"then": [{"put": {"key": "a", "value": "1", "value_base64": "MQ=="}}]}),
            400,
            "invalid-body",
            "exclude",
        ),
        (
            json!({"then": [{"put": {"key": "a", "value_base64": "?"}}]}),
            400,
            "invalid-body",
            "base64",
        ),
        (
            json!({"then": [{"put": {"value": "1"}}]}),
            400,
            "invalid-request",
            "key is not provided",
        ),
        (
            json!({"then": [{"put": {"key": "a", "lease": "zz"}}]}),
            400,
            "invalid-body",
            "lease",
        ),
        (
            json!({"then": [{"put": {"key": "a", "lease": "1234"}}]}),
            404,
            "lease-not-found",
            "lease not found",
        ),
        (
            json!({"then": [{"put": {"key": "x", "keep_value": true}}]}),
            404,
            "key-not-found",
            "key not found",
        ),
        (
            json!({"then": [{"put": {"key": "a"}}, {"put": {"key": "a"}}]}),
            400,
            "invalid-request",
            "duplicate key",
        ),
        (json!({"then": [{"delete": {}}]}), 400, "invalid-body", "all"),
        (json!({"compare": [{"key": "a"}]}), 400, "invalid-body", "exactly one"),
        (
            json!({"compare": [{"key": "a", "version": 1, "lease": "1"}]}),
            400,
            "invalid-body",
            "exactly one",
        ),
        (
            json!({"compare": [{"key": "a", "exists": true, "op": "<"}]}),
            400,
            "invalid-body",
            "exists",
        ),
        (
            json!({"compare": [{"key": "", "version": 1}]}),
            400,
            "invalid-request",
            "key is not provided",
        ),
        (
            json!({"then": [{"get": {"key": "a", "prefix": "b"}}]}),
            400,
            "invalid-parameter",
            "one key",
        ),
        (
            json!({"then": [{"get": {"key": "a", "revision": 999_999}}]}),
            400,
            "future-revision",
            "future",
        ),
        (
            json!({"then": vec![json!({"get": {"key": "a"}}); 129]}),
            400,
            "invalid-request",
            "too many operations",
        ),
        (json!([]), 400, "invalid-body", "object"),
    ] {
        let problem = http.post_json("/api/v1/txn", &body).await.problem(status, slug);
        assert!(problem["detail"].as_str().unwrap().contains(part), "{body}: {problem}");
    }
    let mut nested = json!({"then": [{"put": {"key": "deep"}}]});
    for depth in 1..=60 {
        nested = json!({"then": [{"txn": nested}]});
        // First it is deeper than any transaction may be, then than any JSON.
        let slug = if depth <= 40 { "invalid-request" } else { "invalid-body" };
        if matches!(depth, 40 | 60) {
            http.post_json("/api/v1/txn", &nested).await.problem(400, slug);
        }
    }
    assert_eq!(http.get("/api/v1/status").await.ok()["revision"], revision);
}

async fn leases(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let granted = http.post_json("/api/v1/leases", &json!({"ttl": 600})).await;
    assert_eq!(granted.status, 201);
    let lease = granted.json();
    let id = lease["id"].as_str().unwrap().to_owned();
    assert_eq!(
        (granted.header("location"), &lease["ttl"]),
        (&*format!("/api/v1/leases/{id}"), &600.into())
    );

    // What etcd's client says of it, and of a key that is attached to it.
    let number = i64::from_str_radix(&id, 16).unwrap();
    assert_eq!(etcd.lease_time_to_live(number, None).await.unwrap().granted_ttl(), 600);
    http.put(&format!("/api/v1/kv/leased?lease={id}"), "x").await.ok();
    assert_eq!(http.get("/api/v1/kv/leased").await.header("metastore-lease"), id);
    http.put("/api/v1/kv/leased?keep_lease=true", "y").await.ok();
    let kv = etcd.get("leased", None).await.unwrap().kvs()[0].clone();
    assert_eq!((kv.value(), kv.lease()), (&b"y"[..], number));
    http.put("/api/v1/kv/none?keep_lease=true", "y")
        .await
        .problem(404, "key-not-found");
    http.put(&format!("/api/v1/kv/x?keep_lease=true&lease={id}"), "y")
        .await
        .problem(400, "invalid-request");
    http.put("/api/v1/kv/x?lease=1234", "y")
        .await
        .problem(404, "lease-not-found");

    let shown = http.get(&format!("/api/v1/leases/{id}?keys=true")).await.ok();
    assert_eq!((&shown["id"], &shown["granted_ttl"]), (&id.clone().into(), &600.into()));
    assert_eq!(shown["keys"], json!([{"key": "leased"}]));
    assert_eq!(http.get("/api/v1/leases").await.ok(), json!({"leases": [id]}));
    let kept = http
        .send("POST", &format!("/api/v1/leases/{id}/keep-alive"), &[], "")
        .await
        .ok();
    assert_eq!(kept["ttl"], 600);
    assert!(http.delete(&format!("/api/v1/leases/{id}")).await.ok()["revision"].is_number());
    http.get("/api/v1/kv/leased").await.problem(404, "key-not-found");
    http.get(&format!("/api/v1/leases/{id}"))
        .await
        .problem(404, "lease-not-found");
    http.delete(&format!("/api/v1/leases/{id}"))
        .await
        .problem(404, "lease-not-found");
    http.send("POST", &format!("/api/v1/leases/{id}/keep-alive"), &[], "")
        .await
        .problem(404, "lease-not-found");

    let chosen = http
        .post_json("/api/v1/leases", &json!({"ttl": 600, "id": "ABC"}))
        .await
        .ok();
    assert_eq!((&chosen["id"], &chosen["ttl"]), (&"abc".into(), &600.into()));
    http.post_json("/api/v1/leases", &json!({"ttl": 1, "id": "abc"}))
        .await
        .problem(409, "conflict");
    let (begun, mut tries) = (Instant::now(), 0);
    loop {
        tries += 1;
        let (asked, id) = (Instant::now(), format!("d{tries}"));
        let short = http
            .post_json("/api/v1/leases", &json!({"ttl": 1, "id": id}))
            .await
            .ok();
        // Raised to the server's minimum.
        assert_eq!((&short["id"], &short["ttl"]), (&id.clone().into(), &2.into()));
        let put = http.put(&format!("/api/v1/kv/short?lease={id}"), "x").await;
        if put.status == 200 {
            break;
        }
        // Only on a machine that was too busy to put it in time.
        put.problem(404, "lease-not-found");
        assert!(asked.elapsed() >= Duration::from_secs(2), "it ended too early");
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "it never lives for long enough"
        );
    }
    let begun = Instant::now();
    while http.get("/api/v1/kv/short").await.status == 200 {
        assert!(begun.elapsed() < Duration::from_secs(60), "the lease does not end");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for (body, slug) in [
        (json!({}), "invalid-body"),
        (json!({"ttl": 0}), "invalid-body"),
        (json!({"ttl": "5"}), "invalid-body"),
        (json!({"ttl": 5, "id": "0"}), "invalid-body"),
        (json!({"ttl": 5, "idd": "1"}), "invalid-body"),
        (json!({"ttl": 9_000_000_001_i64}), "invalid-request"),
    ] {
        http.post_json("/api/v1/leases", &body).await.problem(400, slug);
    }
    http.get("/api/v1/leases/xyz").await.problem(400, "invalid-path");
    http.get("/api/v1/leases/1/other").await.problem(404, "no-such-path");
}

async fn locks(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let post = async |http: &mut Http, path: &str| http.send("POST", path, &[], "").await;
    let wait_in = async |name: &str, count: i64| {
        let (mut http, begun) = (nodes.http().await, Instant::now());
        while http.get(&format!("/api/v1/locks/{name}")).await.ok()["waiting"] != count {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "there are never {count} in line"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let grant = async |id: &str| {
        let lease = json!({"ttl": 600, "id": id});
        nodes.http().await.post_json("/api/v1/leases", &lease).await.ok()
    };
    let free = http.get("/api/v1/locks/build").await.ok();
    assert_eq!((&free["held"], free.get("holder")), (&false.into(), None));

    let held = post(&mut http, "/api/v1/locks/build?ttl=600").await.ok();
    let lease = held["lease"].as_str().unwrap().to_owned();
    assert_eq!(
        (&held["key"], &held["ttl"]),
        (&format!("build/{lease}").into(), &600.into())
    );
    // The key is etcd's: a lock by its clients has the same form.
    let kv = etcd.get(format!("build/{lease}"), None).await.unwrap().kvs()[0].clone();
    assert_eq!(
        (kv.create_revision(), kv.lease()),
        (
            held["revision"].as_i64().unwrap(),
            i64::from_str_radix(&lease, 16).unwrap()
        )
    );

    // Tried once, it leaves nothing behind.
    let leases_before = http.get("/api/v1/leases").await.ok();
    let refused = post(&mut http, "/api/v1/locks/build?ttl=3600")
        .await
        .problem(409, "lock-held");
    assert_eq!(refused["holder"]["lease"], lease);
    let waited = Instant::now();
    post(&mut http, "/api/v1/locks/build?wait=300ms&ttl=3600")
        .await
        .problem(409, "lock-held");
    assert!(waited.elapsed() >= Duration::from_millis(300));
    // On a machine that is busy the answer does not wait for that.
    let begun = Instant::now();
    while http.get("/api/v1/leases").await.ok() != leases_before {
        assert!(begun.elapsed() < Duration::from_secs(60), "a lease is left behind");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let state = http.get("/api/v1/locks/build").await.ok();
    assert_eq!(
        (&state["held"], &state["waiting"], &state["holder"]["lease"]),
        (&true.into(), &0.into(), &lease.clone().into())
    );
    // Whoever has it may ask again.
    assert_eq!(
        post(&mut http, &format!("/api/v1/locks/build?lease={lease}"))
            .await
            .ok()["revision"],
        held["revision"]
    );

    // Two wait; the first in line gets it once it is released, and one that hangs up leaves the line.
    let mut waiter = nodes.http().await;
    let waiting = tokio::spawn(async move { waiter.send("POST", "/api/v1/locks/build?wait=60s", &[], "").await });
    wait_in("build", 1).await;
    let mut quitter = nodes.http().await;
    let quitting = tokio::spawn(async move { quitter.send("POST", "/api/v1/locks/build?wait=60s", &[], "").await });
    wait_in("build", 2).await;
    quitting.abort();
    wait_in("build", 1).await;
    http.delete(&format!("/api/v1/locks/build?lease={lease}")).await.ok();
    let next = waiting.await.unwrap().ok();
    assert!(next["revision"].as_i64() > held["revision"].as_i64());
    assert_eq!(
        http.get("/api/v1/locks/build").await.ok()["holder"]["lease"],
        next["lease"]
    );

    // By a lease of one's own; whoever locks the way etcd's clients do is waited for.
    let theirs = etcd.lease_grant(600, None).await.unwrap().id();
    let key = format!("theirs/{theirs:x}");
    let join = Txn::new()
        .when([Compare::create_revision(&*key, CompareOp::Equal, 0)])
        .and_then([TxnOp::put(&*key, "", Some(PutOptions::new().with_lease(theirs)))]);
    etcd.txn(join).await.unwrap();
    let mine = http.post_json("/api/v1/leases", &json!({"ttl": 600})).await.ok()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    post(&mut http, &format!("/api/v1/locks/theirs?lease={mine}"))
        .await
        .problem(409, "lock-held");
    let mut waiter = nodes.http().await;
    let path = format!("/api/v1/locks/theirs?wait=60s&lease={mine}");
    let waiting = tokio::spawn(async move { waiter.send("POST", &path, &[], "").await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished());
    // The end of a lease releases its lock.
    etcd.lease_revoke(theirs).await.unwrap();
    assert_eq!(waiting.await.unwrap().ok()["lease"], mine);

    // Of two calls with one lease the later one has the place. When it gives up, or anybody releases it, the other hears
    // of it at once, and does not hold the lock later.
    let held = post(&mut http, "/api/v1/locks/shared?ttl=3600").await.ok();
    grant("ab").await;
    for is_released in [false, true] {
        let mut waiter = nodes.http().await;
        let waiting = tokio::spawn(async move {
            waiter
                .send("POST", "/api/v1/locks/shared?lease=ab&wait=300s", &[], "")
                .await
        });
        wait_in("shared", 1).await;
        if is_released {
            http.delete("/api/v1/locks/shared?lease=ab").await.ok();
        } else {
            post(&mut http, "/api/v1/locks/shared?lease=ab")
                .await
                .problem(409, "lock-held");
        }
        let told = tokio::time::timeout(Duration::from_secs(60), waiting).await;
        told.expect("at once").unwrap().problem(409, "place-given-up");
    }
    // The earlier one gives up without harm to the later one.
    let mut waiter = nodes.http().await;
    let short = tokio::spawn(async move {
        waiter
            .send("POST", "/api/v1/locks/shared?lease=ab&wait=10s", &[], "")
            .await
    });
    wait_in("shared", 1).await;
    let mut waiter = nodes.http().await;
    let long = tokio::spawn(async move {
        waiter
            .send("POST", "/api/v1/locks/shared?lease=ab&wait=300s", &[], "")
            .await
    });
    let told = short.await.unwrap().problem(409, "lock-held");
    assert!(told["detail"].as_str().unwrap().contains("still in line"), "{told}");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!long.is_finished());
    let path = format!("/api/v1/locks/shared?lease={}", held["lease"].as_str().unwrap());
    http.delete(&path).await.ok();
    assert_eq!(long.await.unwrap().ok()["lease"], "ab");
    assert_eq!(http.get("/api/v1/locks/shared").await.ok()["holder"]["lease"], "ab");
    // A lease that ends ends the wait for a lock with it.
    grant("ac").await;
    let mut waiter = nodes.http().await;
    let waiting = tokio::spawn(async move {
        waiter
            .send("POST", "/api/v1/locks/shared?lease=ac&wait=300s", &[], "")
            .await
    });
    wait_in("shared", 1).await;
    http.delete("/api/v1/leases/ac").await.ok();
    let told = tokio::time::timeout(Duration::from_secs(60), waiting).await;
    told.expect("at once").unwrap().problem(404, "lease-not-found");

    http.delete("/api/v1/locks/theirs")
        .await
        .problem(400, "invalid-parameter");
    http.delete("/api/v1/locks/theirs?lease=1234")
        .await
        .problem(404, "lock-not-held");
    http.delete(&format!("/api/v1/leases/{mine}")).await.ok();
    assert_eq!(http.get("/api/v1/locks/theirs").await.ok()["held"], false);
    post(&mut http, "/api/v1/locks/x?lease=1234")
        .await
        .problem(404, "lease-not-found");
    post(&mut http, "/api/v1/locks/x?lease=1&ttl=3")
        .await
        .problem(400, "invalid-request");
}

/// The line is the same whichever protocol one stands in it by.
async fn locks_of_both_protocols(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let held = http.send("POST", "/api/v1/locks/both", &[], "").await.ok();
    let theirs = etcd.lease_grant(600, None).await.unwrap().id();
    let mut waiter = etcd.clone();
    let waiting = tokio::spawn(async move {
        waiter
            .lock("both", Some(LockOptions::new().with_lease(theirs)))
            .await
            .map(|locked| locked.key().to_vec())
    });
    let begun = Instant::now();
    while http.get("/api/v1/locks/both").await.ok()["waiting"] != 1 {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "the other never stands in line"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!waiting.is_finished());
    let path = format!("/api/v1/locks/both?lease={}", held["lease"].as_str().unwrap());
    http.delete(&path).await.ok();
    let key = waiting.await.unwrap().unwrap();
    assert_eq!(key, format!("both/{theirs:x}").into_bytes());
    // And the other way round.
    let refused = http
        .send("POST", "/api/v1/locks/both", &[], "")
        .await
        .problem(409, "lock-held");
    assert_eq!(refused["holder"]["lease"], format!("{theirs:x}"));
    let mut waiter = nodes.http().await;
    let waiting = tokio::spawn(async move { waiter.send("POST", "/api/v1/locks/both?wait=60s", &[], "").await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished());
    etcd.unlock(key).await.unwrap();
    waiting.await.unwrap().ok();
}

fn basic(user: &str, password: &str) -> String {
    use std::fmt::Write as _;
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut encoded = "Basic ".to_owned();
    for three in format!("{user}:{password}").as_bytes().chunks(3) {
        let bits = three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for at in 0..4 {
            let digit = char::from(DIGITS[(bits >> (18 - 6 * at) & 63) as usize]);
            write!(encoded, "{}", if at <= three.len() { digit } else { '=' }).unwrap();
        }
    }
    encoded
}

/// The same users, roles and tokens as over etcd's API.
async fn users(storage: Storage) {
    let nodes = Nodes::start_with(storage, 1, &["--bcrypt-cost=4"]);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    assert_eq!(basic("Aladdin", "open sesame"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
    http.send(
        "POST",
        "/api/v1/auth/token",
        &[("authorization", &basic("ann", "x"))],
        "",
    )
    .await
    .problem(409, "conflict");
    // Whoever shows a password where nobody asks for one is let in all the same.
    let shown = [("authorization", &*basic("ann", "x"))];
    http.send("PUT", "/api/v1/kv/other", &shown, "x").await.ok();

    for user in ["root", "ann"] {
        etcd.user_add(user, format!("{user}'s password"), None).await.unwrap();
    }
    etcd.user_grant_role("root", "root").await.unwrap();
    etcd.role_add("app").await.unwrap();
    etcd.role_grant_permission("app", Permission::read_write("app/").with_prefix())
        .await
        .unwrap();
    etcd.user_grant_role("ann", "app").await.unwrap();
    etcd.auth_enable().await.unwrap();

    let nobody = http.get("/api/v1/kv/app/a").await;
    nobody.problem(401, "unauthenticated");
    let challenges: Vec<_> = nobody.headers.get_all("www-authenticate").iter().collect();
    assert_eq!(challenges.len(), 2, "{nobody:?}");
    for path in [
        "/api/v1/status",
        "/api/v1/kv",
        "/api/v1/watch?wait=100ms",
        "/api/v1/watch",
        "/api/v1/members",
    ] {
        http.get(path).await.problem(401, "unauthenticated");
    }
    // Whatever the document says needs somebody does.
    let mut open = Vec::new();
    for (method, path, operation) in http.document().await.operations() {
        let path = path
            .replace("{key}", "app/a")
            .replace("{id}", "1")
            .replace("{name}", "l");
        // Such as its document requires, so that nothing else is wrong with it.
        let path = match (method.as_str(), &*path) {
            ("DELETE", "/api/v1/locks/l") => "/api/v1/locks/l?lease=1".to_owned(),
            ("DELETE", "/api/v1/kv") => "/api/v1/kv?all=true".to_owned(),
            _ => path,
        };
        let headers = [("content-type", "application/json")];
        let body = if operation["requestBody"].is_object() {
            r#"{"ttl":60}"#
        } else {
            ""
        };
        if operation["security"] == json!([]) {
            open.push(format!("{method} {path}"));
            continue;
        }
        let answer = http.send(method.as_str(), &path, &headers, body).await;
        assert_eq!(answer.status, 401, "{method} {path}: {answer:?}");
    }
    assert_eq!(
        open,
        [
            "POST /api/v1/auth/token",
            "GET /api/v1/docs",
            "HEAD /api/v1/docs",
            "GET /api/v1/openapi.json",
            "HEAD /api/v1/openapi.json",
        ]
    );
    for path in ["/api/v1/docs", "/api/v1/openapi.json"] {
        assert_eq!(http.get(path).await.status, 200);
    }
    for wrong in [basic("ann", "guess"), basic("bob", "x"), "Bearer xyz.1".to_owned()] {
        http.send("GET", "/api/v1/kv/app/a", &[("authorization", &wrong)], "")
            .await
            .problem(401, "unauthenticated");
    }

    let by_password = basic("ann", "ann's password");
    let given = http
        .send("POST", "/api/v1/auth/token", &[("authorization", &by_password)], "")
        .await
        .ok();
    let by_token = format!("Bearer {}", given["token"].as_str().unwrap());
    for ann in [by_password, by_token] {
        let ann = [("authorization", &*ann)];
        http.send("PUT", "/api/v1/kv/app/a", &ann, "1").await.ok();
        assert_eq!(http.send("GET", "/api/v1/kv/app/a", &ann, "").await.text(), "1");
        assert_eq!(
            keys_of(&http.send("GET", "/api/v1/kv?prefix=app/", &ann, "").await.ok()),
            ["app/a"]
        );
        http.send("POST", "/api/v1/locks/app/lock", &ann, "").await.ok();
        http.send("DELETE", "/api/v1/kv?prefix=app/lock/", &ann, "").await.ok();
        http.send("GET", "/api/v1/status", &ann, "").await.ok();
        let polled = http
            .send("GET", "/api/v1/watch?prefix=app/&from_revision=2&wait=60s", &ann, "")
            .await;
        assert_eq!(polled.ok()["events"][0]["key"], "app/a");
        // What no key can be in may be asked for all the same.
        let none = http.send("GET", "/api/v1/kv?prefix=app/&start=z", &ann, "").await.ok();
        assert_eq!(none["kvs"], json!([]));
        for (method, path) in [
            ("GET", "/api/v1/kv/other"),
            ("PUT", "/api/v1/kv/other"),
            ("DELETE", "/api/v1/kv/other"),
            ("GET", "/api/v1/kv"),
            ("GET", "/api/v1/kv?prefix=app"),
            ("DELETE", "/api/v1/kv?all=true"),
            ("GET", "/api/v1/watch"),
            ("GET", "/api/v1/watch?wait=100ms"),
            ("GET", "/api/v1/locks/other"),
            ("POST", "/api/v1/locks/other"),
        ] {
            http.send(method, path, &ann, "")
                .await
                .problem(403, "permission-denied");
        }
        let json = [ann[0], ("content-type", "application/json")];
        let txn = json!({"then": [{"put": {"key": "app/b"}}, {"get": {"key": "other"}}]});
        http.send("POST", "/api/v1/txn", &json, txn.to_string())
            .await
            .problem(403, "permission-denied");
    }
    // Up to where history is gone everybody hears who may ask.
    let ann = [("authorization", &*basic("ann", "ann's password"))];
    let root = [("authorization", &*basic("root", "root's password"))];
    let now = http.send("PUT", "/api/v1/kv/app/a", &ann, "2").await.ok()["revision"].clone();
    let mut as_root = etcd_client::Client::connect(
        [nodes.nodes[0].url()],
        Some(etcd_client::ConnectOptions::new().with_user("root", "root's password")),
    )
    .await
    .unwrap();
    as_root.compact(now.as_i64().unwrap(), None).await.unwrap();
    let json = [ann[0], ("content-type", "application/json")];
    let txn = json!({"then": [{"get": {"key": "app/a", "revision": 2}}]}).to_string();
    for (method, path, body) in [
        ("GET", "/api/v1/kv/app/a?revision=2", ""),
        ("GET", "/api/v1/kv?prefix=app/&revision=2", ""),
        ("GET", "/api/v1/kv?prefix=app/&revision=2&count_only=true", ""),
        ("POST", "/api/v1/txn", &txn),
    ] {
        let begun = Instant::now();
        loop {
            let answer = http.send(method, path, &json, body.to_owned()).await;
            let problem = answer.problem(410, "revision-compacted");
            if problem["compact_revision"] == now {
                break;
            }
            // It looks for that only for a while.
            assert!(begun.elapsed() < Duration::from_secs(60), "{path}: {problem}");
        }
    }
    // Whoever is gone is nobody, whether or not its password or token was good before.
    let token = http.send("POST", "/api/v1/auth/token", &ann, "").await.ok()["token"].clone();
    let by_token = format!("Bearer {}", token.as_str().unwrap());
    http.send("GET", "/api/v1/kv/app/a", &[("authorization", &by_token)], "")
        .await
        .text();
    as_root.user_change_password("ann", "another").await.unwrap();
    for old in [ann[0].1, &*by_token] {
        http.send("GET", "/api/v1/kv/app/a", &[("authorization", old)], "")
            .await
            .problem(401, "unauthenticated");
    }
    assert_eq!(
        keys_of(&http.send("GET", "/api/v1/kv", &root, "").await.ok()),
        ["app/a", "other"]
    );
}

/// Of a signed token there is nothing to remember: it is for the users and roles of when it was given.
async fn signed_tokens(storage: Storage) {
    let dir = temp_dir();
    let key = dir.path().join("key");
    std::fs::write(&key, "a secret that is long enough for what signs with it").unwrap();
    let flag = format!("--auth-token=jwt,sign-method=HS256,priv-key={},ttl=1h", key.display());
    let nodes = Nodes::start_with(storage, 1, &["--bcrypt-cost=4", &flag]);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    etcd.user_add("root", "secret", None).await.unwrap();
    etcd.user_grant_role("root", "root").await.unwrap();
    etcd.auth_enable().await.unwrap();
    let by_password = [("authorization", &*basic("root", "secret"))];
    let token = async |http: &mut Http| {
        let given = http.send("POST", "/api/v1/auth/token", &by_password, "").await.ok();
        format!("Bearer {}", given["token"].as_str().unwrap())
    };
    let old = token(&mut http).await;
    http.send("PUT", "/api/v1/kv/k", &[("authorization", &old)], "v")
        .await
        .ok();
    let mut as_root = etcd_client::Client::connect(
        [nodes.nodes[0].url()],
        Some(etcd_client::ConnectOptions::new().with_user("root", "secret")),
    )
    .await
    .unwrap();
    as_root.role_add("any").await.unwrap();
    for (method, path) in [
        ("GET", "/api/v1/kv/k"),
        ("PUT", "/api/v1/kv/k"),
        ("GET", "/api/v1/watch"),
    ] {
        let refused = http.send(method, path, &[("authorization", &old)], "w").await;
        let problem = refused.problem(401, "unauthenticated");
        assert_eq!(problem["action"], "fix", "{method} {path}");
    }
    let new = token(&mut http).await;
    assert_eq!(
        http.send("GET", "/api/v1/kv/k", &[("authorization", &new)], "")
            .await
            .text(),
        "v"
    );
}

/// Who waits for a lock does so whatever becomes of other users meanwhile; and if it may not any more, nothing of it is
/// left.
async fn users_change_while_a_lock_is_waited_for(storage: Storage) {
    let nodes = Nodes::start_with(storage, 1, &["--bcrypt-cost=4"]);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    enable_auth(&mut etcd).await;
    let root = [("authorization", &*basic("root", "secret"))];
    let mut as_root = etcd_client::Client::connect(
        [nodes.nodes[0].url()],
        Some(etcd_client::ConnectOptions::new().with_user("root", "secret")),
    )
    .await
    .unwrap();
    // Once while another user is granted something, once while this one loses everything.
    for loses in [false, true] {
        let held = http
            .send("POST", "/api/v1/locks/app/lock?ttl=3600", &root, "")
            .await
            .ok();
        let mut waiter = nodes.http().await;
        let waiting = tokio::spawn(async move {
            let ann = [("authorization", &*basic("ann", "secret"))];
            waiter
                .send("POST", "/api/v1/locks/app/lock?wait=300s&ttl=3600", &ann, "")
                .await
        });
        let begun = Instant::now();
        while http.send("GET", "/api/v1/locks/app/lock", &root, "").await.ok()["waiting"] != 1 {
            assert!(begun.elapsed() < Duration::from_secs(60) && !waiting.is_finished());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if loses {
            as_root.user_revoke_role("ann", "app").await.unwrap();
        } else {
            as_root.role_add("other").await.unwrap();
        }
        let held = held["lease"].as_str().unwrap();
        http.send("DELETE", &format!("/api/v1/locks/app/lock?lease={held}"), &root, "")
            .await
            .ok();
        let answer = waiting.await.unwrap();
        if loses {
            answer.problem(403, "permission-denied");
            let begun = Instant::now();
            while http.send("GET", "/api/v1/locks/app/lock", &root, "").await.ok()["held"] == true {
                assert!(
                    begun.elapsed() < Duration::from_secs(60),
                    "nobody holds it, for an hour"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        } else {
            let lease = answer.ok()["lease"].as_str().unwrap().to_owned();
            http.send("DELETE", &format!("/api/v1/leases/{lease}"), &root, "")
                .await
                .ok();
        }
    }
}

/// What an operator allows holds here too.
async fn limits_of_the_operator(storage: Storage) {
    let args = [
        "--max-txn-ops=2",
        "--max-request-bytes=4000",
        "--quota-backend-bytes=40000",
    ];
    let nodes = Nodes::start_with(storage, 1, &args);
    let mut http = nodes.http().await;
    let puts = |count: usize| {
        let puts: Vec<_> = (0..count).map(|at| json!({"put": {"key": format!("k{at}")}})).collect();
        json!({"then": puts})
    };
    http.post_json("/api/v1/txn", &puts(2)).await.ok();
    http.post_json("/api/v1/txn", &puts(3))
        .await
        .problem(400, "invalid-request");
    http.put("/api/v1/kv/large", vec![b'x'; 3000]).await.ok();
    http.put("/api/v1/kv/large", vec![b'x'; 4001])
        .await
        .problem(413, "too-large");
    let mut http = nodes.http().await;
    let mut written = 0;
    let full = loop {
        let answer = http.put(&format!("/api/v1/kv/fill/{written}"), vec![b'x'; 3000]).await;
        if answer.status != 200 {
            break answer;
        }
        written += 1;
        assert!(written < 100, "the quota is 40000 bytes");
    };
    assert_eq!(full.problem(507, "no-space")["action"], "retry");
    let json = [("content-type", "application/json")];
    let lease = http.send("POST", "/api/v1/leases", &json, r#"{"ttl":60}"#).await;
    lease.problem(507, "no-space");
    // What makes room goes on.
    let deleted = http.delete("/api/v1/kv?prefix=fill/").await.ok();
    assert_eq!(deleted["deleted"], written);
    assert_eq!(http.get("/api/v1/kv/large").await.body.len(), 3000);
    let status = http.get("/api/v1/status").await.ok();
    assert!(
        status["errors"][0]
            .as_str()
            .is_some_and(|error| error.contains("NOSPACE")),
        "{status}"
    );
    // And it is counted.
    let metrics = http.get("/metrics").await;
    for line in [
        r#"metastore_http_requests_total{code="507",operation="putKey"} 1"#,
        r#"metastore_http_requests_total{code="413",operation="putKey"} 1"#,
        r#"metastore_http_request_duration_seconds_count{operation="deleteKeys"} 1"#,
    ] {
        assert!(metrics.text().lines().any(|shown| shown == line), "{line}");
    }
}

async fn members_and_status(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let (mut http, mut etcd) = (nodes.http().await, nodes.etcd().await);
    let members = http.get("/api/v1/members").await.ok();
    let theirs = etcd.member_list().await.unwrap();
    let member = &theirs.members()[0];
    assert_eq!(
        members["members"],
        json!([{
            "id": format!("{:x}", member.id()), "name": "m0", "peer_urls": member.peer_urls(),
            "client_urls": member.client_urls(), "is_learner": false,
        }])
    );
    let status = http.get("/api/v1/status").await.ok();
    assert_eq!(
        (&status["leader_id"], &status["member_id"]),
        (&members["members"][0]["id"], &members["members"][0]["id"])
    );
    assert_eq!(
        (&status["cluster_id"], &status["errors"]),
        (&members["cluster_id"], &json!([]))
    );
}

async fn the_document_and_the_page(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    let document = http.get("/api/v1/openapi.json").await.ok();
    assert_eq!(document["openapi"], "3.1.0");
    assert!(document["paths"]["/api/v1/kv/{key}"]["put"]["responses"]["412"].is_object());
    let page = http.get("/api/v1/docs").await;
    assert_eq!(
        (page.status, page.header("content-type")),
        (200, "text/html; charset=utf-8")
    );
    assert!(page.text().contains("/api/v1/kv/{key}"));
    let moved = http.get("/api/v1").await;
    assert_eq!((moved.status, moved.header("location")), (303, "/api/v1/docs"));
    let refused = http.delete("/api/v1").await;
    refused.problem(405, "method-not-allowed");
    assert_eq!(refused.header("allow"), "GET, HEAD");
}

async fn head_and_options(storage: Storage) {
    let nodes = Nodes::start(storage, 1);
    let mut http = nodes.http().await;
    http.put_key("k", "value").await;
    let head = http.send("HEAD", "/api/v1/kv/k", &[], "").await;
    assert_eq!(
        (head.status, head.header("content-length"), head.body.len()),
        (200, "5", 0)
    );
    assert_eq!(head.header("etag"), "\"2\"");
    let head = http.send("HEAD", "/api/v1/kv/none", &[], "").await;
    assert_eq!((head.status, head.body.len()), (404, 0));
    assert_eq!(http.send("HEAD", "/api/v1/status", &[], "").await.status, 200);
    assert_eq!(http.send("HEAD", "/api/v1/watch", &[], "").await.status, 405);
}

/// Of a learner one gets what etcd's gives: its own state, if one is content with that, and what says how it is.
async fn a_member_without_a_vote(storage: Storage) {
    let dir = temp_dir();
    let peers: Vec<String> = (0..2).map(|_| format!("http://127.0.0.1:{}", free_port())).collect();
    let setup = |at: usize, initial: &str, state: &str| {
        let base = dir.path().join(format!("m{at}"));
        std::fs::create_dir(&base).unwrap();
        Setup::new(&base, storage)
            .arg(format!("--name=m{at}"))
            .arg(format!("--listen-peer-urls={}", peers[at]))
            .arg(format!("--initial-advertise-peer-urls={}", peers[at]))
            .arg(format!("--initial-cluster={initial}"))
            .arg(format!("--initial-cluster-state={state}"))
    };
    let initial = format!("m0={}", peers[0]);
    let voter = setup(0, &initial, "new").start();
    let mut http = Http::connect(voter.url()).await;
    http.put_key("k", "v").await;
    let as_learner = etcd_client::MemberAddOptions::new().with_is_learner();
    let mut etcd = voter.client().await;
    etcd.member_add([peers[1].clone()], Some(as_learner)).await.unwrap();
    let learner = setup(1, &format!("{initial},m1={}", peers[1]), "existing").start();
    let mut http = Http::connect(learner.url()).await;

    let status = http.get("/api/v1/status").await.ok();
    assert_eq!(status["is_learner"], true);
    let begun = Instant::now();
    while http.get("/api/v1/kv/k?serializable=true").await.status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never gets the data");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(http.get("/api/v1/kv/k?serializable=true").await.text(), "v");
    let list = http.get("/api/v1/kv?prefix=k&serializable=true").await.ok();
    assert_eq!(keys_of(&list), ["k"]);
    let lock = http.get("/api/v1/locks/l?serializable=true").await.ok();
    assert_eq!(lock["held"], false);
    for path in ["/api/v1/docs", "/api/v1/openapi.json"] {
        assert_eq!(http.get(path).await.status, 200, "{path}");
    }
    for (method, path) in [
        ("GET", "/api/v1/kv/k"),
        ("GET", "/api/v1/kv/k?serializable=false"),
        ("PUT", "/api/v1/kv/k"),
        ("DELETE", "/api/v1/kv/k"),
        ("GET", "/api/v1/kv"),
        ("DELETE", "/api/v1/kv?all=true"),
        ("GET", "/api/v1/watch"),
        ("GET", "/api/v1/watch?wait=1s"),
        ("POST", "/api/v1/txn"),
        ("POST", "/api/v1/leases"),
        ("GET", "/api/v1/leases"),
        ("POST", "/api/v1/locks/l"),
        ("GET", "/api/v1/locks/l"),
        ("GET", "/api/v1/members"),
        ("GET", "/api/v1/members?serializable=true"),
        ("POST", "/api/v1/auth/token"),
    ] {
        let answer = http.send(method, path, &[], "").await;
        let problem = answer.problem(503, "not-a-voter");
        assert_eq!(problem["member_id"], status["member_id"], "{method} {path}");
        assert_eq!(answer.header("retry-after"), "1", "{method} {path}");
    }
    assert_eq!(etcd.get("k", None).await.unwrap().kvs()[0].value(), b"v");
}

/// What curl says to these arguments, and its exit code.
fn curl(args: &[&str]) -> (String, i32) {
    let done = std::process::Command::new("curl")
        .args(["-s", "--max-time", "60"])
        .args(args)
        .output()
        .expect("curl runs");
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    (said, done.status.code().unwrap_or(-1))
}

/// On `https` addresses of its own there is the API with the client port's certificate, over both versions of HTTP, and
/// nothing in plaintext.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_of_its_own_over_tls() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("server", "server", 1);
    let port = free_port();
    let url = format!("https://127.0.0.1:{port}");
    let args = [
        format!("--listen-http-urls={url}"),
        format!("--cert-file={}", certificate.display()),
        format!("--key-file={}", key.display()),
    ];
    let nodes = Nodes::start_with(Storage::Memory, 1, &args.each_ref().map(String::as_str));
    let ca = authority.path("ca.pem").display().to_string();
    let path = format!("{url}/api/v1/kv/k");
    let written = curl(&["--cacert", &ca, "-X", "PUT", "--data-binary", "v", &path]);
    assert_eq!(written, ("{\"revision\":2}".to_owned(), 0));
    let mut etcd = nodes.etcd().await;
    assert_eq!(etcd.get("k", None).await.unwrap().kvs()[0].value(), b"v");
    for (version, shown) in [("--http1.1", "v 1.1"), ("--http2", "v 2")] {
        let read = curl(&["--cacert", &ca, version, "-w", " %{http_version}", &path]);
        assert_eq!(read, (shown.to_owned(), 0));
    }
    let health = curl(&["--cacert", &ca, "-w", " %{http_code}", &format!("{url}/health")]);
    assert!(
        health.0.contains("no-such-path") && health.0.ends_with(" 404"),
        "{health:?}"
    );
    // Who does not know the authority does not go on, and who speaks plaintext gets no answer.
    assert_eq!(curl(&[&path]), (String::new(), 60));
    let plain = curl(&[&format!("http://127.0.0.1:{port}/api/v1/kv/k")]);
    assert!(plain.0.is_empty() && plain.1 != 0, "{plain:?}");
}

/// Where clients must show certificates they must here too, and the common name is the user, as for gRPC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_by_certificate() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("server", "server", 1);
    let url = format!("https://127.0.0.1:{}", free_port());
    let client_port = free_port();
    // In plaintext there are no certificates, and whoever sets this up needs none.
    let client_urls = format!("http://127.0.0.1:{client_port},https://127.0.0.1:{client_port}");
    let ca = authority.path("ca.pem").display().to_string();
    let dir = temp_dir();
    let node = [
        format!("--listen-http-urls={url}"),
        format!("--listen-client-urls={client_urls}"),
        format!("--advertise-client-urls={client_urls}"),
        format!("--cert-file={}", certificate.display()),
        format!("--key-file={}", key.display()),
        format!("--trusted-ca-file={ca}"),
        "--client-cert-auth".to_owned(),
        "--bcrypt-cost=4".to_owned(),
    ];
    let setup = Setup::new(dir.path(), Storage::Memory);
    let _node = node.into_iter().fold(setup, Setup::arg).start();
    let mut etcd = crate::support::client(&format!("http://127.0.0.1:{client_port}")).await;
    enable_auth(&mut etcd).await;

    let shown = |name: &str, common_name: &str, serial, year| {
        let (certificate, key) = authority.issue_until(name, common_name, serial, year);
        let path = |path: std::path::PathBuf| path.display().to_string();
        (path(certificate), path(key))
    };
    let ann = shown("ann", "ann", 2, 2100);
    let bob = shown("bob", "bob", 3, 2100);
    let ann_of_old = shown("old", "ann", 4, 2020);
    let ask = |who: Option<&(String, String)>, more: &[&str], path: &str| {
        let path = format!("{url}/api/v1/kv/{path}");
        let mut args = vec!["--cacert", &*ca, "-w", " %{http_code}", &path];
        if let Some((certificate, key)) = who {
            args.extend(["--cert", certificate, "--key", key]);
        }
        args.extend(more);
        curl(&args)
    };
    let put = ["-X", "PUT", "--data-binary", "v"];
    let written = ask(Some(&ann), &put, "app/a");
    assert!(written.1 == 0 && written.0.ends_with(" 200"), "{written:?}");
    assert_eq!(ask(Some(&ann), &[], "app/a"), ("v 200".to_owned(), 0));
    assert_eq!(ask(Some(&ann), &["--http2"], "app/a"), ("v 200".to_owned(), 0));
    for (answer, status) in [
        (ask(Some(&ann), &put, "other"), " 403"),
        // Nobody of that name.
        (ask(Some(&bob), &[], "app/a"), " 403"),
        // A password says more of who asks than a certificate.
        (ask(Some(&ann), &["--user", "root:secret"], "other"), " 404"),
        (ask(Some(&ann), &["--user", "root:wrong"], "other"), " 401"),
    ] {
        assert!(answer.1 == 0 && answer.0.ends_with(status), "{status}: {answer:?}");
    }
    for nobody in [None, Some(&ann_of_old)] {
        let answer = ask(nobody, &[], "app/a");
        assert!(answer.0.ends_with(" 000") && answer.1 != 0, "{answer:?}");
    }

    // A put of one letter's value over gRPC: its frame, and its status.
    let grpc = |(certificate, shown_key): &(String, String), key: &str| {
        let message = [&[0x0a, key.len() as u8][..], key.as_bytes(), &[0x12, 1, b'w']].concat();
        let frame = [&[0, 0, 0, 0, message.len() as u8][..], &message].concat();
        let file = dir.path().join("frame");
        std::fs::write(&file, frame).unwrap();
        let said = curl(&[
            "--http2",
            "--cacert",
            &ca,
            "--cert",
            certificate,
            "--key",
            shown_key,
            "-H",
            "content-type: application/grpc",
            "-H",
            "te: trailers",
            "--data-binary",
            &format!("@{}", file.display()),
            "--dump-header",
            "-",
            "--output",
            "/dev/null",
            &format!("https://127.0.0.1:{client_port}/etcdserverpb.KV/Put"),
        ]);
        let status = said.0.lines().find_map(|line| line.strip_prefix("grpc-status: "));
        status.map(str::to_owned).ok_or(said)
    };
    assert_eq!(grpc(&ann, "app/a").as_deref(), Ok("0"));
    assert_eq!(grpc(&ann, "other").as_deref(), Ok("7"));
    assert_eq!(grpc(&bob, "app/a").as_deref(), Ok("7"));
    assert!(grpc(&ann_of_old, "app/a").is_err_and(|(_, code)| code != 0));
    assert_eq!(ask(Some(&ann), &[], "app/a"), ("w 200".to_owned(), 0));
}

/// On addresses of its own there is the HTTP API, over HTTP/1.1 and HTTP/2, and nothing else; on the client port it is
/// as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_of_its_own() {
    let port = crate::support::free_port();
    let url = format!("http://127.0.0.1:{port}");
    let nodes = Nodes::start_with(Storage::Memory, 1, &[&format!("--listen-http-urls={url}")]);
    let mut http = Http::connect(&url).await;
    http.put_key("k", "v").await;
    assert_eq!(nodes.http().await.get("/api/v1/kv/k").await.text(), "v");
    for path in ["/health", "/version", "/metrics", "/"] {
        http.get(path).await.problem(404, "no-such-path");
    }
    http.send("POST", "/v3/kv/range", &[("content-type", "application/json")], "{}")
        .await
        .problem(404, "no-such-path");
    // Over HTTP/2, as gRPC is spoken.
    for path in [
        "/etcdserverpb.KV/Range",
        "/etcdserverpb.KV/Put",
        "/etcdserverpb.Lease/LeaseKeepAlive",
    ] {
        let grpc = "content-type: application/grpc";
        let no_message = ["--data-binary", "", "-w", " %{http_code} %{content_type}"];
        let args = [
            &["--http2-prior-knowledge", "-H", grpc, "-H", "te: trailers"][..],
            &no_message,
        ]
        .concat();
        let (said, code) = curl(&[&args[..], &[&format!("{url}{path}")]].concat());
        assert!(
            code == 0 && said.contains("no-such-path") && said.ends_with(" 404 application/problem+json"),
            "{path}: {said}"
        );
    }
    let curl = std::process::Command::new("curl")
        .args(["-s", "--http2-prior-knowledge", "-w", " %{http_version}"])
        .arg(format!("{url}/api/v1/kv/k"))
        .output()
        .expect("curl runs");
    assert_eq!(String::from_utf8_lossy(&curl.stdout), "v 2");
}

/// Over HTTP/2 values may be as large as over HTTP/1.1 and no larger, of whatever type they say they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_values_over_http2() {
    let nodes = Nodes::start(Storage::Memory, 1);
    let dir = temp_dir();
    let path = format!("{}/api/v1/kv/k", nodes.nodes[0].url());
    for (size, status) in [(1_500_000, " 200"), (1_572_865, " 413"), (5 << 20, " 413")] {
        let file = dir.path().join("value");
        std::fs::write(&file, vec![b'x'; size]).unwrap();
        for more in [
            &["-H", "content-type: application/grpc"][..],
            &["-H", "expect: 100-continue"],
            &[],
        ] {
            let value = format!("@{}", file.display());
            let put = [
                "--http2-prior-knowledge",
                "-w",
                " %{http_code}",
                "-X",
                "PUT",
                "--data-binary",
                &value,
                &path,
            ];
            let (said, code) = curl(&[more, &put].concat());
            assert!(said.ends_with(status), "{size} {more:?}: {said} {code}");
        }
        let read = curl(&[
            "--http2-prior-knowledge",
            "-o",
            "/dev/null",
            "-w",
            "%{size_download}",
            &path,
        ]);
        assert_eq!(read.0, "1500000");
    }
}

/// A page's script may call from the origins that `--cors` names, and from no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_other_origins() {
    let nodes = Nodes::start_with(Storage::Memory, 1, &["--cors=https://a.example"]);
    let mut http = nodes.http().await;
    let preflight = |origin: &'static str| {
        [
            ("origin", origin),
            ("access-control-request-method", "PUT"),
            ("access-control-request-headers", "if-match"),
        ]
    };
    let allowed = http
        .send("OPTIONS", "/api/v1/kv//a/../b", &preflight("https://a.example"), "")
        .await;
    assert_eq!(allowed.status, 200);
    assert_eq!(allowed.header("access-control-allow-origin"), "https://a.example");
    assert!(allowed.header("access-control-allow-methods").contains("PUT"));
    assert!(allowed.header("access-control-allow-headers").contains("if-match"));
    let refused = http
        .send("OPTIONS", "/api/v1/kv/a", &preflight("https://b.example"), "")
        .await;
    assert_eq!(refused.header("access-control-allow-origin"), "");
    let origin = [("origin", "https://a.example")];
    let answer = http.send("PUT", "/api/v1/kv/a", &origin, "x").await;
    assert!(answer.header("access-control-expose-headers").contains("etag"));
    assert_eq!(answer.header("vary"), "origin");
}
