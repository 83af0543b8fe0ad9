//! Users, roles and tokens through `etcd-client`, against the real binary on both engines.

mod support;

use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, DeleteOptions, Error, GetOptions, Permission, PutOptions, Txn, TxnOp,
    WatchOptions,
};
use support::{Node, PATIENT, Setup, Storage, assert_refused, code, fresh, on_both_engines, status, temp_dir};
use tokio::task::JoinSet;

const DENIED: &str = "etcdserver: permission denied";
const EMPTY: &str = "etcdserver: user name is empty";
const FAILED: &str = "etcdserver: authentication failed, invalid user ID or password";
const BAD_TOKEN: &str = "etcdserver: invalid auth token";
const OLD: &str = "etcdserver: revision of auth store is old";

const PERMISSION_DENIED: i32 = 7;
const UNAUTHENTICATED: i32 = 16;

/// By when something must have been seen that a busy machine may hide for a while.
const SETTLE: Duration = Duration::from_secs(60);

on_both_engines! { 300;
    users_may_do_what_their_roles_say,
    tokens_end_with_what_they_stand_for,
    a_restart_keeps_users_and_forgets_tokens,
    watchers_are_checked_when_they_are_created,
    a_crowd_logs_in,
    signed_tokens_say_everything_themselves,
}

async fn log_in(node: &Node, name: &str, password: &str) -> Result<Client, Error> {
    log_in_at(node.url(), name, password).await
}

async fn log_in_at(url: &str, name: &str, password: &str) -> Result<Client, Error> {
    let options = ConnectOptions::new()
        .with_user(name, password)
        .with_timeout(Duration::from_secs(60));
    Client::connect([url], Some(options)).await
}

/// A node with auth on: root, and ann, who may read and write from a to c and read x.
async fn with_auth(storage: Storage) -> (tempfile::TempDir, Node) {
    let (dir, node) = fresh(storage);
    set_up(&node).await;
    (dir, node)
}

async fn set_up(node: &Node) {
    let mut client = node.client().await;
    client.user_add("root", "rootpw", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.user_add("ann", "annpw", None).await.unwrap();
    client.role_add("r").await.unwrap();
    let range = Permission::read_write("a").with_range_end("c");
    client.role_grant_permission("r", range).await.unwrap();
    client.role_grant_permission("r", Permission::read("x")).await.unwrap();
    client.user_grant_role("ann", "r").await.unwrap();
    client.auth_enable().await.unwrap();
}

async fn users_may_do_what_their_roles_say(storage: Storage) {
    let (_dir, node) = with_auth(storage).await;
    let mut nobody = node.client().await;
    let mut ann = log_in(&node, "ann", "annpw").await.unwrap();
    let mut root = log_in(&node, "root", "rootpw").await.unwrap();
    assert_refused(log_in(&node, "ann", "wrong").await, code::INVALID_ARGUMENT, FAILED);
    assert_refused(log_in(&node, "eve", "annpw").await, code::INVALID_ARGUMENT, FAILED);

    assert_refused(nobody.put("a", "1", None).await, code::INVALID_ARGUMENT, EMPTY);
    assert_refused(nobody.get("a", None).await, code::INVALID_ARGUMENT, EMPTY);
    assert_refused(nobody.status().await, code::INVALID_ARGUMENT, EMPTY);
    assert_refused(nobody.lease_grant(60, None).await, code::INVALID_ARGUMENT, EMPTY);

    ann.put("a", "1", None).await.unwrap();
    ann.put("b", "1", Some(PutOptions::new().with_prev_key()))
        .await
        .unwrap();
    assert_refused(ann.put("c", "1", None).await, PERMISSION_DENIED, DENIED);
    assert_refused(ann.put("x", "1", None).await, PERMISSION_DENIED, DENIED);
    ann.get("x", None).await.unwrap();
    let to_c = GetOptions::new().with_range("c");
    assert_eq!(ann.get("a", Some(to_c)).await.unwrap().count(), 2);
    let to_d = GetOptions::new().with_range("d");
    assert_refused(ann.get("a", Some(to_d)).await, PERMISSION_DENIED, DENIED);
    assert_refused(
        ann.get("", Some(GetOptions::new().with_all_keys())).await,
        PERMISSION_DENIED,
        DENIED,
    );
    let all = DeleteOptions::new().with_all_keys();
    assert_refused(ann.delete("", Some(all)).await, PERMISSION_DENIED, DENIED);

    // Whatever a transaction hides, both branches and however deep.
    let nested = |op| Txn::new().or_else([TxnOp::txn(Txn::new().and_then([TxnOp::txn(Txn::new().or_else([op]))]))]);
    assert!(ann.txn(nested(TxnOp::put("a", "2", None))).await.is_ok());
    for op in [
        TxnOp::put("q", "2", None),
        TxnOp::get("q", None),
        TxnOp::delete("q", None),
        TxnOp::put("x", "2", None),
    ] {
        assert_refused(ann.txn(nested(op)).await, PERMISSION_DENIED, DENIED);
    }
    let compares = Txn::new().when([Compare::version("q", CompareOp::Equal, 0)]);
    assert_refused(ann.txn(compares).await, PERMISSION_DENIED, DENIED);
    assert!(ann.txn(Txn::new().and_then([TxnOp::get("x", None)])).await.is_ok());

    assert_refused(ann.compact(2, None).await, PERMISSION_DENIED, DENIED);
    assert_refused(ann.user_list().await, PERMISSION_DENIED, DENIED);
    assert_refused(ann.user_add("eve", "pw", None).await, PERMISSION_DENIED, DENIED);
    assert_eq!(ann.user_get("ann").await.unwrap().roles(), ["r"]);
    assert_eq!(ann.role_get("r").await.unwrap().permissions().len(), 2);
    assert_eq!(root.user_list().await.unwrap().users(), ["ann", "root"]);
    root.put("q", "1", None).await.unwrap();
    root.compact(2, None).await.unwrap();
    assert!(ann.status().await.is_ok());
    assert!(ann.member_list().await.is_ok());
    assert_refused(ann.member_remove(1).await, PERMISSION_DENIED, DENIED);
    assert_refused(ann.hash_kv(0).await, PERMISSION_DENIED, DENIED);

    // A password of 73 bytes would count as one of 72.
    let long = "p".repeat(73);
    assert_refused(
        root.user_add("eve", long, None).await,
        2,
        "bcrypt: password length exceeds 72 bytes",
    );

    root.auth_disable().await.unwrap();
    nobody.put("c", "1", None).await.unwrap();
    assert_refused(
        log_in(&node, "ann", "annpw").await,
        code::FAILED_PRECONDITION,
        "etcdserver: authentication is not enabled",
    );
}

async fn tokens_end_with_what_they_stand_for(storage: Storage) {
    let dir = temp_dir();
    let node = Setup::new(dir.path(), storage).arg("--auth-token-ttl=4").start();
    set_up(&node).await;
    let begun = Instant::now();
    let mut ann = loop {
        if let Some(ann) = used_for_long(&node, Duration::from_secs(4)).await {
            break ann;
        }
        assert!(begun.elapsed() < SETTLE, "a token can never be used in time");
    };
    tokio::time::sleep(Duration::from_millis(4100)).await;
    assert_refused(ann.put("a", "1", None).await, UNAUTHENTICATED, BAD_TOKEN);
    drop(node);

    let (_dir, node) = with_auth(storage).await;

    let mut root = log_in(&node, "root", "rootpw").await.unwrap();
    let mut ann = log_in(&node, "ann", "annpw").await.unwrap();
    ann.put("a", "1", None).await.unwrap();
    root.user_change_password("ann", "newpw").await.unwrap();
    assert_refused(ann.put("a", "1", None).await, UNAUTHENTICATED, BAD_TOKEN);
    assert_refused(log_in(&node, "ann", "annpw").await, code::INVALID_ARGUMENT, FAILED);
    let mut ann = log_in(&node, "ann", "newpw").await.unwrap();
    root.user_delete("ann").await.unwrap();
    assert_refused(ann.get("a", None).await, UNAUTHENTICATED, BAD_TOKEN);
    assert_refused(log_in(&node, "ann", "newpw").await, code::INVALID_ARGUMENT, FAILED);

    root.auth_disable().await.unwrap();
    root.auth_enable().await.unwrap();
    assert_refused(root.user_list().await, UNAUTHENTICATED, BAD_TOKEN);
}

/// A client whose token has been used for longer than its time to live, as it counts as long as it is used. `None` if the
/// machine was too busy to use it in time.
async fn used_for_long(node: &Node, ttl: Duration) -> Option<Client> {
    let begun = Instant::now();
    // No answer tells when the server counted it as used, but it was after this.
    let mut last = begun;
    let mut ann = log_in(node, "ann", "annpw").await.unwrap();
    while begun.elapsed() < ttl * 3 / 2 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let before = Instant::now();
        if let Err(error) = ann.put("a", "1", None).await {
            assert!(last.elapsed() >= ttl, "{error}");
            assert_refused::<()>(Err(error), UNAUTHENTICATED, BAD_TOKEN);
            return None;
        }
        last = before;
    }
    Some(ann)
}

async fn a_restart_keeps_users_and_forgets_tokens(storage: Storage) {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), storage);
    let mut node = setup.start();
    set_up(&node).await;
    let mut ann = log_in(&node, "ann", "annpw").await.unwrap();
    ann.put("a", "1", None).await.unwrap();
    // Whether it is killed or stopped: the log is replayed, and its tokens are not taken up again.
    for kill in [true, false] {
        if kill {
            node.kill();
        } else {
            node.terminate();
        }
        node = setup.start();
        let mut nobody = node.client().await;
        assert_refused(nobody.get("a", None).await, code::INVALID_ARGUMENT, EMPTY);
        assert_refused(ann.get("a", None).await, UNAUTHENTICATED, BAD_TOKEN);
        ann = log_in(&node, "ann", "annpw").await.unwrap();
        assert_eq!(ann.get("a", None).await.unwrap().count(), 1);
        assert_refused(ann.get("c", None).await, PERMISSION_DENIED, DENIED);
    }
}

async fn watchers_are_checked_when_they_are_created(storage: Storage) {
    let (_dir, node) = with_auth(storage).await;
    let mut ann = log_in(&node, "ann", "annpw").await.unwrap();
    let mut nobody = node.client().await;
    let whole = |code: &str, text: &str| format!("rpc error: code = {code} desc = {text}");
    for (is_ann, key, options, reason) in [
        (true, "q", WatchOptions::new(), whole("PermissionDenied", DENIED)),
        (
            true,
            "a",
            WatchOptions::new().with_range("d"),
            whole("PermissionDenied", DENIED),
        ),
        (
            true,
            "a",
            WatchOptions::new().with_from_key(),
            whole("PermissionDenied", DENIED),
        ),
        (
            true,
            "",
            WatchOptions::new().with_all_keys(),
            whole("PermissionDenied", DENIED),
        ),
        (false, "a", WatchOptions::new(), whole("InvalidArgument", EMPTY)),
    ] {
        let client = if is_ann { &mut ann } else { &mut nobody };
        let mut stream = client.watch(key, Some(options)).await.unwrap();
        let refused = stream.message().await.unwrap().unwrap();
        assert!(
            refused.created() && refused.canceled() && refused.watch_id() == -1,
            "{refused:?}"
        );
        assert_eq!(refused.cancel_reason(), reason);
    }
    let mut stream = ann.watch("a", Some(WatchOptions::new().with_range("c"))).await.unwrap();
    assert!(!stream.message().await.unwrap().unwrap().canceled());
    ann.put("b", "1", None).await.unwrap();
    assert_eq!(stream.message().await.unwrap().unwrap().events().len(), 1);
}

/// What is slow about a login is done once for all who show the same password, and in nobody's way.
async fn a_crowd_logs_in(storage: Storage) {
    const CHECKED: u64 = 10;
    let (_dir, node) = with_auth(storage).await;
    let mut root = log_in(&node, "root", "rootpw").await.unwrap();
    let begun = Instant::now();
    let mut round = 0;
    while !goes_on_meanwhile(&node, &mut root, round).await {
        assert!(begun.elapsed() < SETTLE, "puts wait until all passwords are checked");
        round += 1;
    }

    // What it takes to check a password, by the processor's time: that of the clock depends on what else the machine does.
    let before = processor_ticks(&node);
    for number in 0..CHECKED {
        let wrong = log_in(&node, "ann", &format!("other{number}")).await;
        assert_refused(wrong, code::INVALID_ARGUMENT, FAILED);
    }
    let checks_took = processor_ticks(&node) - before;
    log_in(&node, "ann", "annpw").await.unwrap();
    let before = processor_ticks(&node);
    let mut right = JoinSet::new();
    for _ in 0..20 * CHECKED {
        let url = node.url().to_owned();
        right.spawn(async move { log_in_at(&url, "ann", "annpw").await.map(drop) });
    }
    for right in right.join_all().await {
        right.unwrap();
    }
    let took = processor_ticks(&node) - before;
    assert!(
        took < 10 * checks_took,
        "{took} ticks of the processor, as if every password were checked: {CHECKED} take {checks_took}"
    );
}

/// Lets many log in with wrong passwords, and puts while those are checked. `false` if all were checked before the puts were
/// done, as where the puts have to wait, or where this test gets no processor.
async fn goes_on_meanwhile(node: &Node, root: &mut Client, round: usize) -> bool {
    let mut wrong = JoinSet::new();
    for number in 0..20 {
        let url = node.url().to_owned();
        wrong.spawn(async move {
            let password = format!("wrong{round}-{number}");
            log_in_at(&url, "ann", &password).await.map(drop)
        });
    }
    let check = |answer: Result<(), Error>| {
        // Those that would have to wait for long are turned away.
        let error = answer.expect_err("the password is wrong");
        let (_, message) = status(&error).expect("the node answers");
        let known = [FAILED, "etcdserver: too many requests"];
        assert!(known.contains(&&*message), "{message}");
    };
    // One is answered, so the others are being checked.
    check(wrong.join_next().await.unwrap().unwrap());
    for number in 0..20 {
        root.put("a", number.to_string(), None).await.unwrap();
    }
    while let Some(answer) = wrong.try_join_next() {
        check(answer.unwrap());
    }
    let goes_on = !wrong.is_empty();
    wrong.join_all().await.into_iter().for_each(check);
    goes_on
}

/// How much of a processor the node has had so far, in the system's ticks.
fn processor_ticks(node: &Node) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", node.pid())).expect("the node runs");
    // What comes before, its name, may have spaces in it.
    let (_, fields) = stat.rsplit_once(") ").expect("Linux says it");
    let ticks = fields.split(' ').skip(11).take(2);
    ticks.map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
}

async fn signed_tokens_say_everything_themselves(storage: Storage) {
    let dir = temp_dir();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "a secret").unwrap();
    let token = |ttl: &str| {
        format!(
            "--auth-token=jwt,sign-method=HS256,priv-key={},ttl={ttl}",
            secret.display()
        )
    };
    let mut setup = Setup::new(dir.path(), storage).arg(token("10m"));
    let mut node = setup.start();
    set_up(&node).await;
    let mut ann = log_in(&node, "ann", "annpw").await.unwrap();
    ann.put("a", "1", None).await.unwrap();
    // They outlive a restart, but no change of users and roles.
    node.terminate();
    let node = setup.start();
    ann.put("a", "2", None).await.unwrap();
    let mut root = log_in(&node, "root", "rootpw").await.unwrap();
    root.role_add("other").await.unwrap();
    assert_refused(ann.put("a", "3", None).await, code::INVALID_ARGUMENT, OLD);
    assert_refused(ann.get("a", None).await, code::INVALID_ARGUMENT, OLD);
    assert!(root.user_list().await.is_ok(), "an administrator is one still");
    drop(node);

    setup.set_args(vec![token("1s")]);
    let node = setup.start();
    // They end with a whole second, so some live only for a moment.
    let begun = Instant::now();
    let mut ann = loop {
        let mut ann = log_in(&node, "ann", "annpw").await.unwrap();
        match ann.put("a", "3", None).await {
            Ok(_) => break ann,
            refused => assert_refused(refused, UNAUTHENTICATED, BAD_TOKEN),
        }
        assert!(begun.elapsed() < SETTLE, "no token ever counts");
    };
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_refused(ann.put("a", "4", None).await, UNAUTHENTICATED, BAD_TOKEN);
    drop(node);

    // Who has another secret knows none of them, and who has none does not start.
    std::fs::write(&secret, "another secret").unwrap();
    setup.set_args(vec![token("10m")]);
    let node = setup.start();
    assert_refused(ann.get("a", None).await, UNAUTHENTICATED, BAD_TOKEN);
    drop(node);
    std::fs::write(&secret, "").unwrap();
    let (code, output) = setup.run_to_end();
    assert_eq!(code, Some(1));
    assert!(output.contains("auth: missing key data"), "{output}");
}

/// A token that one member gave out counts on all, at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_count_on_every_member() {
    let dir = temp_dir();
    let peers: Vec<_> = (0..3)
        .map(|_| format!("http://127.0.0.1:{}", support::free_port()))
        .collect();
    let initial: Vec<_> = peers.iter().enumerate().map(|(n, url)| format!("m{n}={url}")).collect();
    let setups: Vec<_> = peers
        .iter()
        .enumerate()
        .map(|(n, url)| {
            let base = dir.path().join(format!("m{n}"));
            std::fs::create_dir(&base).unwrap();
            let setup = Setup::new(&base, Storage::Memory)
                .arg(format!("--name=m{n}"))
                .arg(format!("--listen-peer-urls={url}"))
                .arg(format!("--initial-advertise-peer-urls={url}"))
                .arg(format!("--initial-cluster={}", initial.join(",")));
            PATIENT.into_iter().fold(setup, Setup::arg)
        })
        .collect();
    let mut nodes: Vec<_> = setups.iter().map(Setup::spawn).collect();
    for node in &mut nodes {
        node.wait_ready();
    }
    set_up(&nodes[0]).await;
    let urls: Vec<_> = nodes.iter().map(Node::url).collect();
    for round in 0..10 {
        // The client gets its token from any member, and shows it to all of them in turn.
        let options = ConnectOptions::new()
            .with_user("ann", "annpw")
            .with_timeout(Duration::from_secs(60));
        let mut client = Client::connect(&urls, Some(options)).await.unwrap();
        for call in 0..12 {
            let put = client.put("a", "1", None).await;
            assert!(put.is_ok(), "round {round}, call {call}: {put:?}");
            let mut stream = client.watch("a", None).await.unwrap();
            let created = stream.message().await.unwrap().unwrap();
            assert!(!created.canceled(), "round {round}, call {call}: {created:?}");
        }
    }
}
