//! The public crate `etcd-client` against the real binary, on both engines.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, CompactionOptions, Compare, CompareOp, DeleteOptions, Event, EventType, GetOptions, GetResponse, KeyValue,
    LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions, ResponseHeader, SortOrder, SortTarget, Txn, TxnOp,
    TxnOpResponse, WatchFilterType, WatchOptions, WatchResponse, WatchStream,
};
use support::{Setup, Storage, assert_refused, code, fresh, on_both_engines, temp_dir};

const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";

on_both_engines! { 300;
    puts_gets_and_deletes,
    ranges,
    streamed_ranges,
    transactions,
    transactions_that_are_refused,
    watches_live,
    watches_history,
    watches_share_a_stream,
    watches_report_progress,
    watches_in_fragments,
    leases,
    leases_expire,
    locks,
    elections,
    compaction,
    status_and_members,
    large_values_and_limits,
    a_hundred_clients,
    a_restart_keeps_everything,
}

fn revision(header: Option<&ResponseHeader>) -> i64 {
    header.expect("every reply has a header").revision()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("the tests write text")
}

/// key, value, create revision, mod revision, version
fn whole(kv: &KeyValue) -> (&str, &str, i64, i64, i64) {
    let (key, value) = (text(kv.key()), text(kv.value()));
    (key, value, kv.create_revision(), kv.mod_revision(), kv.version())
}

fn keys(response: &GetResponse) -> Vec<&str> {
    response.kvs().iter().map(|kv| text(kv.key())).collect()
}

/// kind, key, value, mod revision
fn event(event: &Event) -> (EventType, &str, &str, i64) {
    let kv = event.kv().expect("every event has a key");
    (event.event_type(), text(kv.key()), text(kv.value()), kv.mod_revision())
}

async fn put(client: &mut Client, key: &str, value: &str) -> i64 {
    let response = client.put(key, value, None).await.expect("the put succeeds");
    revision(response.header())
}

async fn next(stream: &mut WatchStream) -> WatchResponse {
    let waited = tokio::time::timeout(Duration::from_secs(60), stream.message()).await;
    let message = waited.expect("a watch response comes").expect("the stream goes on");
    message.expect("the stream has not ended")
}

/// Opens a watch and takes its first response.
async fn watch(client: &mut Client, key: &str, options: WatchOptions) -> WatchStream {
    let mut stream = client.watch(key, Some(options)).await.expect("the stream opens");
    let created = next(&mut stream).await;
    assert!(
        created.created() && !created.canceled() && created.events().is_empty(),
        "{created:?}"
    );
    stream
}

async fn puts_gets_and_deletes(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;

    let empty = client.get("a", None).await.unwrap();
    assert_eq!((revision(empty.header()), empty.count(), empty.kvs().len()), (1, 0, 0));

    assert_eq!(put(&mut client, "a", "1").await, 2);
    assert_eq!(put(&mut client, "b", "2").await, 3);
    let again = client
        .put("a", "3", Some(PutOptions::new().with_prev_key()))
        .await
        .unwrap();
    assert_eq!(revision(again.header()), 4);
    assert_eq!(whole(again.prev_key().unwrap()), ("a", "1", 2, 2, 1));
    let first = client
        .put("c", "", Some(PutOptions::new().with_prev_key()))
        .await
        .unwrap();
    assert!(first.prev_key().is_none());

    let got = client.get("a", None).await.unwrap();
    assert_eq!((revision(got.header()), got.count(), got.more()), (5, 1, false));
    assert_eq!(whole(&got.kvs()[0]), ("a", "3", 2, 4, 2));
    let header = got.header().unwrap();
    assert!(header.cluster_id() != 0 && header.member_id() != 0 && header.raft_term() > 0);

    // ignore_value changes the lease alone, ignore_lease the value alone.
    let lease = client.lease_grant(600, None).await.unwrap().id();
    let attach = PutOptions::new().with_ignore_value().with_lease(lease);
    client.put("a", "", Some(attach)).await.unwrap();
    let got = client.get("a", None).await.unwrap();
    assert_eq!((got.kvs()[0].value(), got.kvs()[0].lease()), (&b"3"[..], lease));
    client
        .put("a", "4", Some(PutOptions::new().with_ignore_lease()))
        .await
        .unwrap();
    let got = client.get("a", None).await.unwrap();
    assert_eq!((got.kvs()[0].value(), got.kvs()[0].lease()), (&b"4"[..], lease));
    client.put("a", "5", None).await.unwrap();
    assert_eq!(client.get("a", None).await.unwrap().kvs()[0].lease(), 0);

    let refused = client.put("", "x", None).await;
    assert_refused(refused, code::INVALID_ARGUMENT, "etcdserver: key is not provided");
    let refused = client
        .put("none", "", Some(PutOptions::new().with_ignore_value()))
        .await;
    assert_refused(refused, code::INVALID_ARGUMENT, "etcdserver: key not found");
    let refused = client.put("a", "x", Some(PutOptions::new().with_ignore_value())).await;
    assert_refused(refused, code::INVALID_ARGUMENT, "etcdserver: value is provided");
    let both = PutOptions::new().with_ignore_lease().with_lease(lease);
    assert_refused(
        client.put("a", "x", Some(both)).await,
        code::INVALID_ARGUMENT,
        "etcdserver: lease is provided",
    );
    let refused = client.put("a", "x", Some(PutOptions::new().with_lease(12345))).await;
    assert_refused(refused, code::NOT_FOUND, "etcdserver: requested lease not found");

    let before = revision(client.get("a", None).await.unwrap().header());
    let deleted = client.delete("none", None).await.unwrap();
    assert_eq!((deleted.deleted(), revision(deleted.header())), (0, before));
    let deleted = client
        .delete("a", Some(DeleteOptions::new().with_prev_key()))
        .await
        .unwrap();
    assert_eq!((deleted.deleted(), revision(deleted.header())), (1, before + 1));
    assert_eq!(deleted.prev_kvs()[0].value(), b"5");
    assert_eq!(client.get("a", None).await.unwrap().count(), 0);

    // A key that comes back begins anew.
    let at = put(&mut client, "a", "6").await;
    assert_eq!(
        whole(&client.get("a", None).await.unwrap().kvs()[0]),
        ("a", "6", at, at, 1)
    );

    let options = DeleteOptions::new().with_range("c").with_prev_key();
    let deleted = client.delete("a", Some(options)).await.unwrap();
    assert_eq!((deleted.deleted(), revision(deleted.header())), (2, at + 1));
    let values: Vec<_> = deleted.prev_kvs().iter().map(|kv| text(kv.value())).collect();
    assert_eq!(values, ["6", "2"]);
    let left = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    assert_eq!(keys(&left), ["c"]);
    assert_eq!(
        client
            .delete("", Some(DeleteOptions::new().with_all_keys()))
            .await
            .unwrap()
            .deleted(),
        1
    );
    assert_refused(
        client.delete("", None).await,
        code::INVALID_ARGUMENT,
        "etcdserver: key is not provided",
    );
}

async fn ranges(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    // Revisions 2 to 7: r/a 2, r/b 3, r/c 4, s/d 5, r/b again 6, r/a again 7.
    for (key, value) in [
        ("r/a", "5"),
        ("r/b", "3"),
        ("r/c", "4"),
        ("s/d", "1"),
        ("r/b", "2"),
        ("r/a", "6"),
    ] {
        put(&mut client, key, value).await;
    }
    let prefix = || GetOptions::new().with_prefix();
    let mut get = async |key: &str, options: GetOptions| client.get(key, Some(options)).await.unwrap();

    assert_eq!(keys(&get("r/", prefix()).await), ["r/a", "r/b", "r/c"]);
    assert_eq!(
        keys(&get("r/a", GetOptions::new().with_range("r/c")).await),
        ["r/a", "r/b"]
    );
    assert_eq!(
        keys(&get("r/c", GetOptions::new().with_from_key()).await),
        ["r/c", "s/d"]
    );
    assert_eq!(get("", GetOptions::new().with_all_keys()).await.count(), 4);
    let backwards = get("r/c", GetOptions::new().with_range("r/a")).await;
    assert_eq!((backwards.count(), backwards.kvs().len()), (0, 0));

    let page = get("r/", prefix().with_limit(2)).await;
    assert_eq!((keys(&page), page.more(), page.count()), (vec!["r/a", "r/b"], true, 3));
    let page = get("r/", prefix().with_limit(3)).await;
    assert_eq!((page.kvs().len(), page.more()), (3, false));

    let sorted = [
        (SortTarget::Key, SortOrder::Descend, ["r/c", "r/b", "r/a"]),
        (SortTarget::Value, SortOrder::Ascend, ["r/b", "r/c", "r/a"]),
        (SortTarget::Create, SortOrder::Descend, ["r/c", "r/b", "r/a"]),
        (SortTarget::Mod, SortOrder::Ascend, ["r/c", "r/b", "r/a"]),
        (SortTarget::Version, SortOrder::Ascend, ["r/c", "r/a", "r/b"]),
    ];
    for (target, order, expected) in sorted {
        assert_eq!(
            keys(&get("r/", prefix().with_sort(target, order)).await),
            expected,
            "{target:?} {order:?}"
        );
    }
    let newest = get(
        "r/",
        prefix().with_sort(SortTarget::Mod, SortOrder::Descend).with_limit(1),
    )
    .await;
    assert_eq!((keys(&newest), newest.more(), newest.count()), (vec!["r/a"], true, 3));

    let names = get("r/", prefix().with_keys_only()).await;
    assert_eq!(whole(&names.kvs()[1]), ("r/b", "", 3, 6, 2));
    let count = get("r/", prefix().with_count_only()).await;
    assert_eq!((count.count(), count.kvs().len(), count.more()), (3, 0, false));

    let filtered = [
        (prefix().with_min_mod_revision(6), vec!["r/a", "r/b"]),
        (prefix().with_max_mod_revision(6), vec!["r/b", "r/c"]),
        (prefix().with_min_create_revision(3), vec!["r/b", "r/c"]),
        (prefix().with_max_create_revision(3), vec!["r/a", "r/b"]),
    ];
    for (options, expected) in filtered {
        let response = get("r/", options).await;
        assert_eq!((keys(&response), response.count()), (expected, 3));
    }

    // The past: what each key was at a revision.
    let past = get("r/", prefix().with_revision(3)).await;
    assert_eq!(
        (keys(&past), past.count(), revision(past.header())),
        (vec!["r/a", "r/b"], 2, 7)
    );
    assert_eq!(whole(&past.kvs()[1]), ("r/b", "3", 3, 3, 1));
    assert_eq!(get("r/", prefix().with_revision(1)).await.count(), 0);
    assert_eq!(get("r/", prefix().with_serializable()).await.count(), 3);
    assert_refused(
        client.get("r/", Some(prefix().with_revision(8))).await,
        code::OUT_OF_RANGE,
        FUTURE,
    );
    assert_refused(
        client.get("", None).await,
        code::INVALID_ARGUMENT,
        "etcdserver: key is not provided",
    );
}

async fn streamed_ranges(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    for number in 0..250 {
        put(&mut client, &format!("k{number:03}"), &"v".repeat(number)).await;
    }
    let mut stream = client
        .kv_client()
        .get_stream("k", Some(GetOptions::new().with_prefix()))
        .await
        .unwrap();
    let mut found = Vec::new();
    let mut last = None;
    let mut messages = 0;
    while let Some(mut message) = stream.message().await.unwrap() {
        messages += 1;
        found.extend(message.take_kvs());
        last = Some(message);
    }
    let last = last.unwrap();
    assert!(messages > 1, "250 keys come in more than one message");
    assert_eq!((last.count(), last.more(), revision(last.header())), (250, false, 251));
    let whole = client.get("k", Some(GetOptions::new().with_prefix())).await.unwrap();
    assert!(found.iter().map(whole_of).eq(whole.kvs().iter().map(whole_of)));
}

fn whole_of(kv: &KeyValue) -> (&str, &str, i64, i64, i64) {
    whole(kv)
}

async fn transactions(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    put(&mut client, "a", "1").await;

    // Several writes, one revision; a read in between sees what came before it.
    let txn = Txn::new()
        .when([
            Compare::value("a", CompareOp::Equal, "1"),
            Compare::version("a", CompareOp::Less, 2),
            Compare::create_revision("none", CompareOp::Equal, 0),
            Compare::mod_revision("a", CompareOp::NotEqual, 7),
            Compare::lease("a", CompareOp::Equal, 0),
        ])
        .and_then([
            TxnOp::put("a", "2", Some(PutOptions::new().with_prev_key())),
            TxnOp::get("a", None),
            TxnOp::put("b", "3", None),
            TxnOp::delete("none", None),
        ])
        .or_else([TxnOp::put("wrong", "", None)]);
    let response = client.txn(txn).await.unwrap();
    assert!(response.succeeded());
    assert_eq!(revision(response.header()), 3);
    let parts = response.op_responses();
    let [
        TxnOpResponse::Put(put_a),
        TxnOpResponse::Get(get_a),
        TxnOpResponse::Put(_),
        TxnOpResponse::Delete(deleted),
    ] = &parts[..]
    else {
        panic!("{parts:?}");
    };
    assert_eq!(put_a.prev_key().unwrap().value(), b"1");
    assert_eq!(whole(&get_a.kvs()[0]), ("a", "2", 2, 3, 2));
    assert_eq!(deleted.deleted(), 0);
    let all = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    let found: Vec<_> = all.kvs().iter().map(whole).collect();
    assert_eq!(found, [("a", "2", 2, 3, 2), ("b", "3", 3, 3, 1)]);

    // The other branch, and a transaction inside it whose compares see the state before all of it.
    let inner = Txn::new()
        .when([Compare::value("b", CompareOp::Equal, "3")])
        .and_then([TxnOp::put("inner", "yes", None), TxnOp::get("b", None)])
        .or_else([TxnOp::put("inner", "no", None)]);
    let txn = Txn::new()
        .when([Compare::value("a", CompareOp::Greater, "2")])
        .and_then([TxnOp::put("wrong", "", None)])
        .or_else([TxnOp::put("b", "4", None), TxnOp::txn(inner)]);
    let response = client.txn(txn).await.unwrap();
    assert!(!response.succeeded());
    assert_eq!(revision(response.header()), 4);
    let parts = response.op_responses();
    let [TxnOpResponse::Put(_), TxnOpResponse::Txn(inner)] = &parts[..] else {
        panic!("{parts:?}")
    };
    assert!(
        inner.succeeded(),
        "compares of an inner transaction are made before any write"
    );
    let TxnOpResponse::Get(get_b) = &inner.op_responses()[1] else {
        panic!("{inner:?}")
    };
    assert_eq!(get_b.kvs()[0].value(), b"4");
    let got = client.get("inner", None).await.unwrap();
    assert_eq!(whole(&got.kvs()[0]), ("inner", "yes", 4, 4, 1));

    // A compare of a range holds if it holds for all keys in it; a missing key has no value, and is 0 otherwise.
    let cases = [
        (Compare::version("\0", CompareOp::Greater, 0).with_range([0]), true),
        (Compare::version("\0", CompareOp::Less, 2).with_range([0]), false),
        (Compare::create_revision("in", CompareOp::Equal, 4).with_prefix(), true),
        (Compare::value("none", CompareOp::NotEqual, "x"), false),
        (Compare::value("none", CompareOp::Equal, ""), false),
        (Compare::mod_revision("none", CompareOp::Equal, 0), true),
    ];
    for (compare, expected) in cases {
        let response = client.txn(Txn::new().when([compare.clone()])).await.unwrap();
        assert_eq!(
            (response.succeeded(), revision(response.header())),
            (expected, 4),
            "{compare:?}"
        );
    }

    // Reads alone, and writes that change nothing, take no revision.
    let txn = Txn::new().and_then([
        TxnOp::get("a", None),
        TxnOp::get("b", Some(GetOptions::new().with_revision(3))),
    ]);
    let response = client.txn(txn).await.unwrap();
    let parts = response.op_responses();
    let TxnOpResponse::Get(old_b) = &parts[1] else {
        panic!("{parts:?}")
    };
    assert_eq!((old_b.kvs()[0].value(), revision(response.header())), (&b"3"[..], 4));
    let response = client
        .txn(Txn::new().and_then([TxnOp::delete("none", None)]))
        .await
        .unwrap();
    assert_eq!(revision(response.header()), 4);
    assert_eq!(put(&mut client, "z", "").await, 5);
}

async fn transactions_that_are_refused(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    put(&mut client, "a", "1").await;
    let one = |key: &str| TxnOp::put(key, "x", None);
    let prefix = DeleteOptions::new().with_prefix();
    let history = GetOptions::new().with_revision(99);
    let many = |count: usize| -> Vec<TxnOp> { (0..count).map(|number| one(&format!("m{number}"))).collect() };
    let duplicate = "etcdserver: duplicate key given in txn request";
    let cases = [
        (
            Txn::new().and_then([one("k"), one("k")]),
            code::INVALID_ARGUMENT,
            duplicate,
        ),
        (
            Txn::new().and_then([one("k1"), TxnOp::delete("k", Some(prefix.clone()))]),
            code::INVALID_ARGUMENT,
            duplicate,
        ),
        (
            Txn::new().and_then([one("k"), TxnOp::txn(Txn::new().or_else([one("k")]))]),
            code::INVALID_ARGUMENT,
            duplicate,
        ),
        (
            Txn::new().and_then([one("")]),
            code::INVALID_ARGUMENT,
            "etcdserver: key is not provided",
        ),
        (
            Txn::new().when([Compare::version("", CompareOp::Equal, 0)]),
            code::INVALID_ARGUMENT,
            "etcdserver: key is not provided",
        ),
        (
            Txn::new().and_then(many(129)),
            code::INVALID_ARGUMENT,
            "etcdserver: too many operations in txn request",
        ),
        (
            Txn::new().and_then([one("k"), TxnOp::get("a", Some(history))]),
            code::OUT_OF_RANGE,
            FUTURE,
        ),
        (
            Txn::new().and_then([one("k"), TxnOp::put("l", "", Some(PutOptions::new().with_lease(99)))]),
            code::NOT_FOUND,
            "etcdserver: requested lease not found",
        ),
        (
            Txn::new().and_then([
                one("k"),
                TxnOp::put("none", "", Some(PutOptions::new().with_ignore_value())),
            ]),
            code::INVALID_ARGUMENT,
            "etcdserver: key not found",
        ),
    ];
    for (txn, code, message) in cases {
        assert_refused(client.txn(txn).await, code, message);
    }
    let all = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    assert_eq!(
        (keys(&all), revision(all.header())),
        (vec!["a"], 2),
        "what is refused changes nothing"
    );

    // The two branches may write the same key, deletes may overlap, and 128 operations are allowed.
    client
        .txn(Txn::new().and_then([one("k")]).or_else([one("k")]))
        .await
        .unwrap();
    let overlapping = [TxnOp::delete("k", Some(prefix)), TxnOp::delete("k", None)];
    client.txn(Txn::new().and_then(overlapping)).await.unwrap();
    let response = client.txn(Txn::new().and_then(many(128))).await.unwrap();
    assert_eq!(revision(response.header()), 5);
}

async fn watches_live(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    let start = put(&mut client, "w/a", "0").await;
    let mut stream = watch(&mut client, "w/", WatchOptions::new().with_prefix().with_prev_key()).await;
    let mut deletes = {
        let options = WatchOptions::new().with_prefix().with_filters([WatchFilterType::NoPut]);
        watch(&mut client, "w/", options).await
    };

    put(&mut client, "w/a", "1").await;
    put(&mut client, "other", "").await;
    let txn = Txn::new().and_then([
        TxnOp::put("w/c", "2", None),
        TxnOp::delete("w/a", None),
        TxnOp::put("x", "", None),
    ]);
    client.txn(txn).await.unwrap();

    let first = next(&mut stream).await;
    assert_eq!(revision(first.header()), start + 1);
    assert_eq!(first.events().len(), 1);
    assert_eq!(event(&first.events()[0]), (EventType::Put, "w/a", "1", start + 1));
    assert_eq!(
        whole(first.events()[0].prev_kv().unwrap()),
        ("w/a", "0", start, start, 1)
    );

    // One revision, one response, in the order of the operations.
    let second = next(&mut stream).await;
    assert_eq!(revision(second.header()), start + 3);
    let events: Vec<_> = second.events().iter().map(event).collect();
    let expected = [
        (EventType::Put, "w/c", "2", start + 3),
        (EventType::Delete, "w/a", "", start + 3),
    ];
    assert_eq!(events, expected);
    assert!(second.events()[0].prev_kv().is_none());
    assert_eq!(second.events()[1].prev_kv().unwrap().value(), b"1");
    let deleted = second.events()[1].kv().unwrap();
    assert_eq!(
        (deleted.create_revision(), deleted.version(), deleted.lease()),
        (0, 0, 0)
    );

    let only = next(&mut deletes).await;
    let events: Vec<_> = only.events().iter().map(event).collect();
    assert_eq!(events, [(EventType::Delete, "w/a", "", start + 3)]);
    assert!(only.events()[0].prev_kv().is_none(), "nobody asked for it");

    // After it was cancelled nothing comes.
    let id = first.watch_id();
    stream.cancel(id).await.unwrap();
    let cancelled = next(&mut stream).await;
    assert!(cancelled.canceled() && cancelled.watch_id() == id);
    assert_eq!(cancelled.cancel_reason(), "");
    put(&mut client, "w/a", "3").await;
    let silence = tokio::time::timeout(Duration::from_millis(200), stream.message()).await;
    assert!(silence.is_err(), "{silence:?}");
}

async fn watches_history(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    // Revisions 2 to 1501, over 50 keys; then a deletion of all.
    for number in 0..1500 {
        put(&mut client, &format!("h/{:02}", number % 50), &number.to_string()).await;
    }
    client
        .delete("h/", Some(DeleteOptions::new().with_prefix()))
        .await
        .unwrap();

    let options = WatchOptions::new().with_prefix().with_prev_key().with_start_revision(2);
    let mut stream = watch(&mut client, "h/", options).await;
    let mut seen = 0;
    while seen < 1550 {
        let response = next(&mut stream).await;
        assert!(!response.events().is_empty());
        for event in response.events() {
            let kv = event.kv().unwrap();
            if seen < 1500 {
                assert_eq!(kv.mod_revision(), seen + 2);
                assert_eq!((text(kv.value()), kv.version()), (&*seen.to_string(), seen / 50 + 1));
                let before = event.prev_kv().map(|kv| text(kv.value()).to_owned());
                assert_eq!(before, (seen >= 50).then(|| (seen - 50).to_string()));
            } else {
                assert_eq!(event.event_type(), EventType::Delete);
                assert_eq!(
                    (text(kv.key()), kv.mod_revision()),
                    (&*format!("h/{:02}", seen - 1500), 1502)
                );
            }
            seen += 1;
        }
    }
    // History ends in the present, with nothing lost or repeated between.
    put(&mut client, "h/new", "").await;
    let live = next(&mut stream).await;
    assert_eq!(
        live.events().iter().map(event).collect::<Vec<_>>(),
        [(EventType::Put, "h/new", "", 1503)]
    );

    // From the future: only what comes then.
    let mut future = watch(
        &mut client,
        "h/",
        WatchOptions::new().with_prefix().with_start_revision(1505),
    )
    .await;
    put(&mut client, "h/1504", "").await;
    put(&mut client, "h/1505", "").await;
    let response = next(&mut future).await;
    assert_eq!(
        response.events().iter().map(event).collect::<Vec<_>>(),
        [(EventType::Put, "h/1505", "", 1505)]
    );
}

async fn watches_share_a_stream(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    let mut stream = watch(&mut client, "a", WatchOptions::new()).await;

    stream
        .watch("b", Some(WatchOptions::new().with_watch_id(7)))
        .await
        .unwrap();
    let created = next(&mut stream).await;
    assert!(created.created() && created.watch_id() == 7);
    stream.watch("c", None).await.unwrap();
    let created = next(&mut stream).await;
    let third = created.watch_id();
    assert!(created.created() && third != 0 && third != 7);

    stream
        .watch("d", Some(WatchOptions::new().with_watch_id(7)))
        .await
        .unwrap();
    let refused = next(&mut stream).await;
    assert!(
        refused.created() && refused.canceled() && refused.watch_id() == -1,
        "{refused:?}"
    );
    assert_eq!(
        refused.cancel_reason(),
        "mvcc: duplicate watch ID provided on the WatchStream"
    );
    stream
        .watch("b", Some(WatchOptions::new().with_range("a")))
        .await
        .unwrap();
    let refused = next(&mut stream).await;
    assert!(
        refused.created() && refused.canceled() && refused.watch_id() == -1,
        "{refused:?}"
    );
    assert_eq!(refused.cancel_reason(), "mvcc: watcher range is empty");

    for key in ["c", "b", "a"] {
        put(&mut client, key, "").await;
    }
    let mut seen = BTreeMap::new();
    for _ in 0..3 {
        let response = next(&mut stream).await;
        assert_eq!(response.events().len(), 1);
        seen.insert(
            response.watch_id(),
            text(response.events()[0].kv().unwrap().key()).to_owned(),
        );
    }
    let expected = BTreeMap::from([(0, "a".to_owned()), (7, "b".to_owned()), (third, "c".to_owned())]);
    assert_eq!(seen, expected);

    stream.cancel(7).await.unwrap();
    assert!(next(&mut stream).await.canceled());
    for key in ["b", "a"] {
        put(&mut client, key, "").await;
    }
    let response = next(&mut stream).await;
    assert_eq!(
        (response.watch_id(), text(response.events()[0].kv().unwrap().key())),
        (0, "a")
    );
}

async fn watches_report_progress(storage: Storage) {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), storage).arg("--watch-progress-notify-interval=200ms");
    let node = setup.start();
    let mut client = node.client().await;
    let mut stream = watch(&mut client, "p", WatchOptions::new()).await;
    for number in 2..=5 {
        assert_eq!(put(&mut client, "unrelated", "").await, number);
    }
    stream.request_progress().await.unwrap();
    let progress = next(&mut stream).await;
    assert!(progress.events().is_empty() && !progress.created() && !progress.canceled());
    assert_eq!((progress.watch_id(), revision(progress.header())), (-1, 5));

    let mut notified = watch(&mut client, "p", WatchOptions::new().with_progress_notify()).await;
    put(&mut client, "unrelated", "").await;
    let notice = next(&mut notified).await;
    assert!(notice.events().is_empty() && notice.watch_id() == 0);
    assert!((5..=6).contains(&revision(notice.header())), "{notice:?}");
}

async fn watches_in_fragments(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    let value = "v".repeat(1 << 20);
    for number in 0..5 {
        put(&mut client, &format!("f/{number}"), &value).await;
    }
    let options = WatchOptions::new().with_prefix().with_prev_key().with_fragment();
    let mut stream = watch(&mut client, "f/", options).await;
    client
        .delete("f/", Some(DeleteOptions::new().with_prefix()))
        .await
        .unwrap();
    let (mut events, mut responses) = (Vec::new(), 0);
    while events.len() < 5 {
        let response = next(&mut stream).await;
        responses += 1;
        assert_eq!(revision(response.header()), 7);
        events.extend(response.events().to_vec());
    }
    assert!(responses > 1, "5 MiB in one revision come in pieces");
    for (number, event) in events.iter().enumerate() {
        assert_eq!(text(event.kv().unwrap().key()), format!("f/{number}"));
        assert_eq!(event.prev_kv().unwrap().value().len(), 1 << 20);
    }
}

async fn leases(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    let granted = client
        .lease_grant(100, Some(LeaseGrantOptions::new().with_id(77)))
        .await
        .unwrap();
    assert_eq!((granted.id(), granted.ttl(), revision(granted.header())), (77, 100, 1));
    let chosen = client.lease_grant(1, None).await.unwrap();
    assert!(chosen.id() > 0);
    assert_eq!(chosen.ttl(), 2, "the least that election timeouts allow");
    let listed: BTreeSet<_> = client
        .leases()
        .await
        .unwrap()
        .leases()
        .iter()
        .map(|lease| lease.id())
        .collect();
    assert!(listed.contains(&77));

    for key in ["l/b", "l/a"] {
        client
            .put(key, "", Some(PutOptions::new().with_lease(77)))
            .await
            .unwrap();
    }
    let options = LeaseTimeToLiveOptions::new().with_keys();
    let left = client.lease_time_to_live(77, Some(options)).await.unwrap();
    assert_eq!((left.id(), left.granted_ttl()), (77, 100));
    assert!((60..=100).contains(&left.ttl()), "{left:?}");
    let attached: BTreeSet<_> = left.keys().iter().map(|key| text(key)).collect();
    assert_eq!(attached, BTreeSet::from(["l/a", "l/b"]));
    let left = client.lease_time_to_live(77, None).await.unwrap();
    assert!(left.keys().is_empty());

    let (mut keeper, mut kept) = client.lease_keep_alive(77).await.unwrap();
    for _ in 0..3 {
        keeper.keep_alive().await.unwrap();
        let answer = kept.message().await.unwrap().unwrap();
        assert_eq!((answer.id(), answer.ttl()), (77, 100));
    }

    // Revoking deletes the keys, sorted, in one revision.
    let mut stream = watch(&mut client, "l/", WatchOptions::new().with_prefix()).await;
    let revoked = client.lease_revoke(77).await.unwrap();
    assert_eq!(revision(revoked.header()), 4);
    let response = next(&mut stream).await;
    let events: Vec<_> = response.events().iter().map(event).collect();
    assert_eq!(
        events,
        [(EventType::Delete, "l/a", "", 4), (EventType::Delete, "l/b", "", 4)]
    );
    let gone = client.lease_time_to_live(77, None).await.unwrap();
    assert_eq!((gone.ttl(), gone.granted_ttl()), (-1, 0));
    keeper.keep_alive().await.unwrap();
    assert_eq!(kept.message().await.unwrap().unwrap().ttl(), 0);

    assert_refused(
        client.lease_revoke(77).await,
        code::NOT_FOUND,
        "etcdserver: requested lease not found",
    );
    client
        .lease_grant(100, Some(LeaseGrantOptions::new().with_id(78)))
        .await
        .unwrap();
    let taken = client
        .lease_grant(100, Some(LeaseGrantOptions::new().with_id(78)))
        .await;
    assert_refused(taken, code::FAILED_PRECONDITION, "etcdserver: lease already exists");
    let huge = client.lease_grant(9_000_000_001, None).await;
    assert_refused(huge, code::OUT_OF_RANGE, "etcdserver: too large lease TTL");
}

/// The time to live of a lease that is to expire.
const SHORT: Duration = Duration::from_secs(2);
/// That of one that is kept alive: longer than a busy machine makes a client or a server pause.
const KEPT: Duration = Duration::from_secs(4);

async fn leases_expire(storage: Storage) {
    let (_dir, node) = fresh(storage);
    tokio::join!(
        a_lease_takes_its_keys_along(node.client().await),
        a_lease_lives_while_it_is_kept_alive(node.client().await),
    );
}

/// Attaches keys to a lease that is granted for [`SHORT`]. Returns it, when it was asked for, and the revision of the last
/// write; `None` if it may have expired before that.
async fn attach(client: &mut Client, prefix: &str) -> Option<(i64, Instant, i64)> {
    let asked = Instant::now();
    let lease = client.lease_grant(2, None).await.unwrap().id();
    let mut last = 0;
    for (key, lease) in [("b", lease), ("a", lease), ("detached", lease), ("detached", 0)] {
        let options = (lease != 0).then(|| PutOptions::new().with_lease(lease));
        match client.put(format!("{prefix}{key}"), "", options).await {
            Ok(put) => last = revision(put.header()),
            Err(error) => {
                assert!(asked.elapsed() >= SHORT, "{error}");
                return None;
            }
        }
    }
    (asked.elapsed() < SHORT).then_some((lease, asked, last))
}

async fn a_lease_takes_its_keys_along(mut client: Client) {
    let mut tries = 0;
    let (prefix, (lease, asked, last)) = loop {
        let prefix = format!("e{tries}/");
        if let Some(attached) = attach(&mut client, &prefix).await {
            break (prefix, attached);
        }
        tries += 1;
        assert!(tries < 30, "a lease never lives for long enough");
    };
    // From the last write on, however late the watch begins.
    let options = WatchOptions::new()
        .with_prefix()
        .with_prev_key()
        .with_start_revision(last + 1);
    let mut stream = watch(&mut client, &prefix, options).await;
    let response = next(&mut stream).await;
    let took = asked.elapsed();
    assert!(took >= SHORT, "{took:?}");
    let at = revision(response.header());
    assert!(at > last);
    let [a, b] = ["a", "b"].map(|key| format!("{prefix}{key}"));
    let events: Vec<_> = response.events().iter().map(event).collect();
    assert_eq!(
        events,
        [(EventType::Delete, &*a, "", at), (EventType::Delete, &*b, "", at)]
    );
    assert!(
        response
            .events()
            .iter()
            .all(|event| event.prev_kv().unwrap().lease() == lease)
    );
    let left = client
        .get(&*prefix, Some(GetOptions::new().with_prefix()))
        .await
        .unwrap();
    assert_eq!(keys(&left), [format!("{prefix}detached")]);
    assert_eq!(client.lease_time_to_live(lease, None).await.unwrap().ttl(), -1);
}

async fn a_lease_lives_while_it_is_kept_alive(mut client: Client) {
    let mut tries = 0;
    while !keeps_alive(&mut client, &format!("kept/{tries}")).await {
        tries += 1;
        assert!(tries < 10, "a lease can never be kept alive in time");
    }
}

/// Keeps a lease alive for longer than it would live by itself, and then lets it expire. `false` if it was not kept
/// alive in time, so that nothing can be said.
async fn keeps_alive(client: &mut Client, key: &str) -> bool {
    let begun = Instant::now();
    let lease = client.lease_grant(4, None).await.unwrap().id();
    // No answer tells when the server counted it as alive, but it was after this.
    let mut last = begun;
    let put = client.put(key, "", Some(PutOptions::new().with_lease(lease))).await;
    let keeping = client.lease_keep_alive(lease).await;
    let (put, (mut keeper, mut kept)) = match (put, keeping) {
        (Ok(put), Ok(keeping)) => (put, keeping),
        failed => {
            assert!(last.elapsed() >= KEPT, "{failed:?}");
            return false;
        }
    };
    // Twice a second leases are looked for that have expired.
    while begun.elapsed() < KEPT + Duration::from_secs(1) {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let before = Instant::now();
        keeper.keep_alive().await.unwrap();
        let ttl = kept.message().await.unwrap().unwrap().ttl();
        if ttl == 0 && last.elapsed() >= KEPT {
            return false;
        }
        assert_eq!(ttl, 4, "it ended although it was kept alive");
        last = before;
    }
    let created = revision(put.header());
    let options = WatchOptions::new().with_start_revision(created + 1);
    let mut stream = watch(client, key, options).await;
    let response = next(&mut stream).await;
    assert!(last.elapsed() >= KEPT, "{:?}", last.elapsed());
    let (kind, deleted, ..) = event(&response.events()[0]);
    assert_eq!((kind, deleted), (EventType::Delete, key));
    true
}

async fn compaction(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    // Revisions: k 2, k 3, gone 4, gone deleted 5, k 6.
    put(&mut client, "k", "2").await;
    put(&mut client, "k", "3").await;
    put(&mut client, "gone", "4").await;
    client.delete("gone", None).await.unwrap();
    put(&mut client, "k", "6").await;

    let compacted = client
        .compact(4, Some(CompactionOptions::new().with_physical()))
        .await
        .unwrap();
    assert_eq!(revision(compacted.header()), 6);
    let at = |revision| Some(GetOptions::new().with_revision(revision));
    assert_refused(client.get("k", at(3)).await, code::OUT_OF_RANGE, COMPACTED);
    assert_eq!(client.get("k", at(4)).await.unwrap().kvs()[0].value(), b"3");
    assert_eq!(client.get("gone", at(4)).await.unwrap().count(), 1);
    assert_eq!(client.get("gone", at(5)).await.unwrap().count(), 0);
    assert_eq!(client.get("k", None).await.unwrap().kvs()[0].version(), 3);
    assert_refused(client.compact(4, None).await, code::OUT_OF_RANGE, COMPACTED);
    assert_refused(client.compact(3, None).await, code::OUT_OF_RANGE, COMPACTED);
    assert_refused(client.compact(7, None).await, code::OUT_OF_RANGE, FUTURE);

    // A watch from before is refused after it was created, and told from where it could begin.
    let mut stream = watch(&mut client, "k", WatchOptions::new().with_start_revision(3)).await;
    let refused = next(&mut stream).await;
    assert!(refused.canceled() && !refused.created(), "{refused:?}");
    assert_eq!((refused.compact_revision(), revision(refused.header())), (4, 0));
    let options = WatchOptions::new()
        .with_all_keys()
        .with_start_revision(4)
        .with_prev_key();
    let mut stream = watch(&mut client, "", options).await;
    let mut events = Vec::new();
    while events.len() < 3 {
        events.extend(next(&mut stream).await.events().to_vec());
    }
    let expected = [
        (EventType::Put, "gone", "4", 4),
        (EventType::Delete, "gone", "", 5),
        (EventType::Put, "k", "6", 6),
    ];
    assert_eq!(events.iter().map(event).collect::<Vec<_>>(), expected);
    assert_eq!(events[1].prev_kv().unwrap().value(), b"4");
    assert_eq!(events[2].prev_kv().unwrap().value(), b"3");

    client.compact(6, None).await.unwrap();
    let all = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    assert_eq!(all.kvs().iter().map(whole).collect::<Vec<_>>(), [("k", "6", 2, 6, 3)]);
}

async fn status_and_members(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    put(&mut client, "a", "1").await;
    let status = client.status().await.unwrap();
    let header = status.header().unwrap();
    assert!(status.version().starts_with("3.7."), "{}", status.version());
    assert!(
        status.storage_version().starts_with("3.7."),
        "{}",
        status.storage_version()
    );
    assert_eq!((status.leader(), header.revision()), (header.member_id(), 2));
    assert!(status.raft_term() > 0 && status.raft_index() >= status.raft_applied_index());
    assert!(status.raft_applied_index() > 0 && !status.is_learner() && status.errors().is_empty());
    assert!(status.db_size() >= 0 && status.raft_used_db_size() >= 0);

    let list = client.member_list().await.unwrap();
    assert_eq!(list.members().len(), 1);
    let member = &list.members()[0];
    assert_eq!((member.id(), member.name()), (header.member_id(), "default"));
    assert_eq!(member.client_urls(), [node.url()]);
    assert_eq!(member.peer_urls(), ["http://localhost:2380"]);
    assert!(!member.is_learner());
    assert_eq!(list.header().unwrap().cluster_id(), header.cluster_id());
}

async fn large_values_and_limits(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    let value: Vec<u8> = (0..1 << 20)
        .map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for key in ["big/a", "big/b"] {
        client.put(key, value.clone(), None).await.unwrap();
    }
    let got = client.get("big/", Some(GetOptions::new().with_prefix())).await.unwrap();
    assert!(got.kvs().iter().all(|kv| kv.value() == value) && got.count() == 2);

    // Above --max-request-bytes the server refuses; 512 KiB above that, the transport.
    let large = vec![0; 1_572_865];
    assert_refused(
        client.put("k", large, None).await,
        code::INVALID_ARGUMENT,
        "etcdserver: request is too large",
    );
    let huge = vec![0; 3 << 20];
    let refused = support::status(&client.put("k", huge, None).await.unwrap_err()).unwrap();
    assert_eq!(refused.0, code::RESOURCE_EXHAUSTED);
    assert!(
        refused.1.starts_with("grpc: received message larger than max ("),
        "{}",
        refused.1
    );
    assert_eq!(client.get("k", None).await.unwrap().count(), 0);
    assert_eq!(put(&mut client, "k", "").await, 4, "what was refused took no revision");
}

/// What one client of [`a_hundred_clients`] did: its writes by revision (`None` for a deletion).
type Written = BTreeMap<i64, (String, Option<String>)>;

async fn a_hundred_clients(storage: Storage) {
    const CLIENTS: usize = 100;
    const OPERATIONS: usize = 60;
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    let mut stream = watch(&mut client, "", WatchOptions::new().with_all_keys()).await;

    let mut tasks = Vec::new();
    for number in 0..CLIENTS {
        let mut client = node.client().await;
        tasks.push(tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(number as u64);
            let mut written = Written::new();
            let mut floor = 1;
            for operation in 0..OPERATIONS {
                // A few keys that all clients fight for, and some of this client alone.
                let key = match random.u8(..3) {
                    0 => format!("shared/{}", random.u8(..5)),
                    _ => format!("own/{number}/{}", random.u8(..5)),
                };
                let at = match random.u8(..10) {
                    0..5 => {
                        let value = format!("{number}-{operation}");
                        let at = put(&mut client, &key, &value).await;
                        assert!(written.insert(at, (key, Some(value))).is_none());
                        assert!(at > floor, "revisions rise");
                        at
                    }
                    5..7 => {
                        let deleted = client.delete(&*key, None).await.unwrap();
                        let at = revision(deleted.header());
                        if deleted.deleted() == 1 {
                            assert!(at > floor, "revisions rise");
                            assert!(written.insert(at, (key, None)).is_none());
                        }
                        at
                    }
                    _ => {
                        let got = client.get(&*key, None).await.unwrap();
                        if key.starts_with("own/") {
                            let newest = written.values().rev().find(|(written, _)| *written == key);
                            let expected = newest.and_then(|(_, value)| value.as_deref());
                            assert_eq!(got.kvs().first().map(|kv| text(kv.value())), expected, "{key}");
                        }
                        revision(got.header())
                    }
                };
                assert!(at >= floor, "nobody sees time go back");
                floor = at;
            }
            written
        }));
    }

    let mut history = Written::new();
    for task in tasks {
        for (at, write) in task.await.unwrap() {
            assert!(history.insert(at, write).is_none(), "revision {at} was given twice");
        }
    }
    let last = 1 + history.len() as i64;
    assert!(history.keys().copied().eq(2..=last), "revisions have no gaps");

    // The watcher saw exactly that, in order.
    let mut seen = Vec::new();
    while seen.len() < history.len() {
        seen.extend(next(&mut stream).await.events().to_vec());
    }
    for (event, (at, (key, value))) in seen.iter().zip(&history) {
        let kv = event.kv().unwrap();
        assert_eq!((kv.mod_revision(), text(kv.key())), (*at, &**key));
        assert_eq!(
            (event.event_type() == EventType::Put).then(|| text(kv.value())),
            value.as_deref()
        );
    }
    let mut state = BTreeMap::new();
    for (key, value) in history.into_values() {
        match value {
            Some(value) => state.insert(key, value),
            None => state.remove(&key),
        };
    }
    let all = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    assert_eq!(revision(all.header()), last);
    let found = all
        .kvs()
        .iter()
        .map(|kv| (text(kv.key()).to_owned(), text(kv.value()).to_owned()));
    assert!(found.eq(state));
}

async fn a_restart_keeps_everything(storage: Storage) {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), storage);
    let mut node = setup.start();
    let mut client = node.client().await;
    for number in 0..100 {
        put(&mut client, &format!("k{}", number % 10), &number.to_string()).await;
    }
    client.compact(50, None).await.unwrap();
    client
        .lease_grant(500, Some(LeaseGrantOptions::new().with_id(5)))
        .await
        .unwrap();
    client
        .put("leased", "", Some(PutOptions::new().with_lease(5)))
        .await
        .unwrap();
    let all = || Some(GetOptions::new().with_all_keys());
    let before = client.get("", all()).await.unwrap();
    let header = before.header().unwrap().clone();
    drop(client);
    node.terminate();

    let node = setup.start();
    let mut client = node.client().await;
    let after = client.get("", all()).await.unwrap();
    assert_eq!(
        after.kvs().iter().map(whole).collect::<Vec<_>>(),
        before.kvs().iter().map(whole).collect::<Vec<_>>()
    );
    let now = after.header().unwrap();
    assert_eq!(
        (now.revision(), now.cluster_id(), now.member_id()),
        (102, header.cluster_id(), header.member_id())
    );
    assert!(now.raft_term() > header.raft_term());
    let past = client
        .get("k9", Some(GetOptions::new().with_revision(60)))
        .await
        .unwrap();
    assert_eq!(past.kvs()[0].value(), b"49");
    assert_refused(
        client.get("k9", Some(GetOptions::new().with_revision(49))).await,
        code::OUT_OF_RANGE,
        COMPACTED,
    );
    let left = client
        .lease_time_to_live(5, Some(LeaseTimeToLiveOptions::new().with_keys()))
        .await
        .unwrap();
    assert_eq!((left.granted_ttl(), left.keys()), (500, &[b"leased".to_vec()][..]));
    assert_eq!(put(&mut client, "next", "").await, 103);
}

async fn locks(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    let first = client.lock("l", None).await.unwrap();
    assert!(text(first.key()).starts_with("l/"));
    let mut other = client.clone();
    let waiting = tokio::spawn(async move { other.lock("l", None).await.unwrap().key().to_vec() });
    let holders = || {
        Some(
            GetOptions::new()
                .with_prefix()
                .with_sort(SortTarget::Create, SortOrder::Ascend),
        )
    };
    while client.get("l/", holders()).await.unwrap().count() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!waiting.is_finished());
    client.unlock(first.key()).await.unwrap();
    let second = waiting.await.unwrap();
    assert_eq!(keys(&client.get("l/", holders()).await.unwrap()), [text(&second)]);

    // Whoever gives up leaves the line, and so does whoever's lease ends.
    let mut other = client.clone();
    let waiting = tokio::spawn(async move { other.lock("l", None).await });
    while client.get("l/", holders()).await.unwrap().count() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    waiting.abort();
    while client.get("l/", holders()).await.unwrap().count() > 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    client
        .lease_grant(600, Some(LeaseGrantOptions::new().with_id(0x1f)))
        .await
        .unwrap();
    let options = || Some(etcd_client::LockOptions::new().with_lease(0x1f));
    let mut other = client.clone();
    let waiting = tokio::spawn(async move { other.lock("l", options()).await });
    while keys(&client.get("l/", holders()).await.unwrap()) != [text(&second), "l/1f"] {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    client.lease_revoke(0x1f).await.unwrap();
    client.unlock(second).await.unwrap();
    assert_refused(waiting.await.unwrap(), code::UNKNOWN, "mutex: session is expired");
    assert_refused(
        client.lock("l", options()).await,
        code::UNKNOWN,
        "etcdserver: requested lease not found",
    );
}

async fn elections(storage: Storage) {
    let (_dir, node) = fresh(storage);
    let mut client = node.client().await;
    for id in [1, 2] {
        client
            .lease_grant(600, Some(LeaseGrantOptions::new().with_id(id)))
            .await
            .unwrap();
    }
    assert_refused(client.leader("e").await, code::UNKNOWN, "election: no leader");
    let mut observed = client.observe("e").await.unwrap();
    let won = client.campaign("e", "a", 1).await.unwrap();
    let leader = won.leader().unwrap().clone();
    assert_eq!((text(leader.key()), leader.rev(), leader.lease()), ("e/1", 2, 1));
    let seen = observed.message().await.unwrap().unwrap();
    assert_eq!(text(seen.kv().unwrap().value()), "a");

    let mut other = client.clone();
    let waiting = tokio::spawn(async move { other.campaign("e", "b", 2).await.unwrap() });
    while client.get("e/2", None).await.unwrap().count() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let options = || etcd_client::ProclaimOptions::new().with_leader(leader.clone());
    client.proclaim("a2", Some(options())).await.unwrap();
    assert_eq!(
        text(observed.message().await.unwrap().unwrap().kv().unwrap().value()),
        "a2"
    );
    assert!(!waiting.is_finished());
    // Its lease ends, and the next one leads.
    client.lease_revoke(1).await.unwrap();
    let won = waiting.await.unwrap();
    assert_eq!(text(won.leader().unwrap().key()), "e/2");
    assert_eq!(
        text(observed.message().await.unwrap().unwrap().kv().unwrap().key()),
        "e/2"
    );
    assert_refused(
        client.proclaim("a3", Some(options())).await,
        code::UNKNOWN,
        "election: not leader",
    );
    let resign = etcd_client::ResignOptions::new().with_leader(won.leader().unwrap().clone());
    client.resign(Some(resign)).await.unwrap();
    assert_refused(client.leader("e").await, code::UNKNOWN, "election: no leader");
}
