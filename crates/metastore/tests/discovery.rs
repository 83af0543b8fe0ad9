//! The members of a new cluster find each other through another one.

mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, GetOptions};
use support::{Node, Setup, Storage, free_port, fresh, on_both_engines, retried, temp_dir};

on_both_engines! { 300;
    three_members_find_each_other,
    a_service_may_ask_for_a_password_and_show_a_certificate,
}

const TOKEN: &str = "8a59-token";

/// A member that looks for others of its token.
fn member(base: &Path, storage: Storage, name: &str, endpoints: &str) -> Setup {
    let base = base.join(name);
    fs::create_dir_all(&base).unwrap();
    let peer_url = format!("http://127.0.0.1:{}", free_port());
    [
        format!("--name={name}"),
        format!("--listen-peer-urls={peer_url}"),
        format!("--initial-advertise-peer-urls={peer_url}"),
        format!("--discovery-token={TOKEN}"),
        format!("--discovery-endpoints={endpoints}"),
        // It is the time for a login too, and the service may be on a busy machine.
        "--discovery-dial-timeout=30s".to_owned(),
    ]
    .into_iter()
    .fold(Setup::new(&base, storage), Setup::arg)
}

async fn put_size(client: &mut Client, size: &str) {
    let key = format!("/_etcd/registry/{TOKEN}/_config/size");
    client.put(key, size, None).await.unwrap();
}

/// The ids that are registered, in the order in which they were.
async fn registered(client: &mut Client) -> Vec<String> {
    let prefix = format!("/_etcd/registry/{TOKEN}/members/");
    let sorted = GetOptions::new()
        .with_prefix()
        .with_sort(etcd_client::SortTarget::Create, etcd_client::SortOrder::Ascend);
    let found = client.get(&*prefix, Some(sorted)).await.unwrap();
    let keys = found.kvs().iter().map(|kv| kv.key_str().unwrap().to_owned());
    keys.map(|key| key.strip_prefix(&prefix).unwrap().to_owned()).collect()
}

#[track_caller]
fn wait_for_line(node: &Node, line: &str) {
    let begun = Instant::now();
    while !node.log().contains(line) {
        assert!(begun.elapsed() < Duration::from_secs(60), "no {line:?}: {}", node.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

async fn members_of(node: &Node) -> Vec<(String, String)> {
    let mut client = node.client().await;
    let list = retried(async || client.member_list().await).await;
    let ids = list
        .members()
        .iter()
        .map(|member| (member.name().to_owned(), format!("{:x}", member.id())));
    let mut ids: Vec<_> = ids.collect();
    ids.sort();
    ids
}

async fn three_members_find_each_other(storage: Storage) {
    let (_dir, service) = fresh(storage);
    let mut client = service.client().await;
    put_size(&mut client, "3").await;
    let base = temp_dir();
    // Nobody is at the first endpoint.
    let endpoints = format!("127.0.0.1:{},{}", free_port(), service.url());
    let setups = ["m1", "m2", "m3"].map(|name| member(base.path(), storage, name, &endpoints));
    let mut first = setups[0].spawn();
    wait_for_line(&first, "waiting for peers from discovery service");
    let mut second = setups[1].spawn();
    wait_for_line(&second, "waiting for peers from discovery service");
    let mut third = setups[2].start();
    first.wait_ready();
    second.wait_ready();
    let members = members_of(&third).await;
    assert_eq!(
        members.iter().map(|(name, _)| &name[..]).collect::<Vec<_>>(),
        ["m1", "m2", "m3"]
    );
    let ids: Vec<_> = members.into_iter().map(|(_, id)| id).collect();
    assert_eq!(registered(&mut client).await, ids);
    let mut writer = first.client().await;
    retried(async || writer.put("k", "v", None).await).await;

    // There is no room for a fourth, and it leaves no trace.
    let (code, log) = member(base.path(), storage, "m4", &endpoints).run_to_end();
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains("failed to join discovery cluster (discovery: cluster is full)"),
        "{log}"
    );
    assert!(
        log.contains("do not reuse discovery token; generate a new one"),
        "{log}"
    );
    assert_eq!(registered(&mut client).await.len(), 3);

    // Whoever has been a member needs no service.
    third.kill();
    let mut third = setups[2].start();
    let ignored = "discovery token is ignored since cluster already initialized; valid logs are found";
    assert!(third.log().contains(ignored), "{}", third.log());
    let mut reader = third.client().await;
    let got = retried(async || reader.get("k", None).await).await;
    assert_eq!(got.kvs()[0].value_str().unwrap(), "v");

    // A crash between the identity and the log's first entries: the log begins as it would have.
    third.kill();
    let data = &setups[2].data_dir;
    let identity = data.join("METASTORE");
    let text = fs::read(&identity).unwrap();
    fs::remove_dir_all(data).unwrap();
    fs::create_dir_all(data.join("raft")).unwrap();
    fs::write(&identity, text).unwrap();
    // A leader of before would know that it had more.
    first.kill();
    second.kill();
    let (mut first, mut second, mut third) = (setups[0].spawn(), setups[1].spawn(), setups[2].start());
    first.wait_ready();
    second.wait_ready();
    assert!(
        third.log().contains("discovery joined cluster successfully"),
        "{}",
        third.log()
    );
    let mut reader = third.client().await;
    let got = retried(async || reader.get("k", None).await).await;
    assert_eq!(got.kvs()[0].value_str().unwrap(), "v");

    // Without any data it must not begin anew: what it voted for is forgotten.
    third.kill();
    setups[2].refuses_to_begin_anew();
}

async fn a_service_may_ask_for_a_password_and_show_a_certificate(storage: Storage) {
    let base = temp_dir();
    let setup = Setup::new(base.path(), storage);
    let url = format!("https://127.0.0.1:{}", setup.port);
    let plain = format!("http://127.0.0.1:{}", setup.port);
    let setup = setup
        .arg(format!("--listen-client-urls={url},{plain}"))
        .arg(format!("--advertise-client-urls={url}"))
        .arg("--auto-tls");
    let service = setup.start();
    let mut client = service.client().await;
    client.user_add("root", "secret", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    put_size(&mut client, "1").await;
    client.auth_enable().await.unwrap();
    let options = ConnectOptions::new().with_user("root", "secret");
    let mut client = Client::connect([service.url()], Some(options)).await.unwrap();

    let (code, log) = member(base.path(), storage, "wrong", &plain)
        .arg("--discovery-user=root")
        .arg("--discovery-password=wrong")
        .run_to_end();
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains("authentication failed, invalid user ID or password"),
        "{log}"
    );

    // Nobody that it trusts signed that certificate, and it tries on: who runs the service may be putting it right.
    let mut distrusts = member(base.path(), storage, "distrusts", &url)
        .arg("--discovery-request-timeout=1s")
        .spawn();
    // The third wait, as it is long enough to tell a busy machine from one that is waited out.
    wait_for_line(&distrusts, r#""backoff":"8s""#);
    assert!(
        distrusts
            .log()
            .contains("failed to get cluster size from discovery service"),
        "{}",
        distrusts.log()
    );
    assert!(distrusts.log().contains("certificate"), "{}", distrusts.log());
    let begun = Instant::now();
    distrusts.terminate();
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(7), "it waits after SIGTERM: {took:?}");
    let retries = distrusts.log().matches("retry connecting to discovery service").count();
    assert_eq!(retries, 3, "it goes on after SIGTERM: {}", distrusts.log());
    assert!(registered(&mut client).await.is_empty());

    let certificate = setup.data_dir.join("fixtures/client/cert.pem");
    let trusting = member(base.path(), storage, "trusting", &format!("127.0.0.1:{}", setup.port))
        .arg(format!("--discovery-cacert={}", certificate.display()))
        .arg("--discovery-user=root:secret");
    let mut node = trusting.start();
    assert!(!node.log().contains("secret"), "{}", node.log());
    assert_eq!(registered(&mut client).await, [members_of(&node).await[0].1.clone()]);
    node.kill();

    // Its own place is kept for it.
    fs::remove_dir_all(&trusting.data_dir).unwrap();
    trusting.start();
    assert_eq!(registered(&mut client).await.len(), 1);
    let (code, log) = member(base.path(), storage, "late", &url)
        .arg("--discovery-insecure-skip-tls-verify")
        .arg("--discovery-user=root:secret")
        .run_to_end();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("discovery: cluster is full"), "{log}");
}

#[tokio::test]
async fn what_cannot_become_a_cluster_is_refused() {
    let (_dir, service) = fresh(Storage::Memory);
    let mut client = service.client().await;
    let base = temp_dir();
    let refuses = |setup: Setup, expected: &str| {
        let (code, log) = setup.run_to_end();
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(expected), "{expected}: {log}");
    };
    let member = |name| member(base.path(), Storage::Memory, name, service.url());
    refuses(member("a"), "discovery: size key not found");
    put_size(&mut client, "three").await;
    refuses(member("b"), "discovery: size key is bad");
    put_size(&mut client, "2").await;
    refuses(
        member("c").arg("--initial-cluster-state=existing"),
        "discovery URL should not be set when joining existing initial cluster",
    );
    let other = |value: &str| (format!("/_etcd/registry/{TOKEN}/members/1"), value.to_owned());
    for (value, expected) in [
        ("x=ftp://127.0.0.1:1", "discovery: invalid peer URL"),
        ("d=http://127.0.0.1:1", "gives this member's name to another one too"),
    ] {
        let (key, value) = other(value);
        client.put(key, value, None).await.unwrap();
        refuses(member("d"), expected);
        client
            .delete(
                format!("/_etcd/registry/{TOKEN}/members/"),
                Some(etcd_client::DeleteOptions::new().with_prefix()),
            )
            .await
            .unwrap();
    }
}
