//! Real processes as members of a cluster: who is let in by certificates, and who is refused, and that nobody who reads
//! the log may hold a node up.

mod support;

use std::fs;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions};
use server::tls::{TlsClient, TlsOptions, describe};
use support::authority::Authority;
use support::{END_TIMEOUT, Node, PATIENT, Setup, Storage, free_port, retried, temp_dir};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// By when a cluster must have come to what is waited for. Far more than it needs.
const SETTLE: Duration = Duration::from_secs(60);

/// How to start the members of a cluster, `m1` and so on.
struct Cluster {
    base: TempDir,
    scheme: &'static str,
    ports: Vec<u16>,
    setups: Vec<Setup>,
}

impl Cluster {
    /// `args` gives more flags for the member of a number from 1 on.
    fn new(count: usize, scheme: &'static str, token: &str, args: impl Fn(usize) -> Vec<String>) -> Cluster {
        let mut cluster = Cluster {
            base: temp_dir(),
            scheme,
            ports: (0..count).map(|_| free_port()).collect(),
            setups: Vec::new(),
        };
        let initial = cluster.initial();
        for number in 1..=count {
            let setup = cluster.setup(number, cluster.ports[number - 1], &initial, "new", args(number));
            let setup = setup.arg(format!("--initial-cluster-token={token}"));
            cluster.setups.push(setup);
        }
        cluster
    }

    fn url(&self, port: u16) -> String {
        format!("{}://127.0.0.1:{port}", self.scheme)
    }

    /// `--initial-cluster` of the members that found it.
    fn initial(&self) -> String {
        let members = self.ports.iter().zip(1..);
        let members = members.map(|(port, number)| format!("m{number}={}", self.url(*port)));
        members.collect::<Vec<_>>().join(",")
    }

    fn setup(&self, number: usize, port: u16, initial: &str, state: &str, args: Vec<String>) -> Setup {
        let base = self.base.path().join(format!("m{number}"));
        fs::create_dir_all(&base).unwrap();
        let url = self.url(port);
        let flags = [
            format!("--name=m{number}"),
            format!("--listen-peer-urls={url}"),
            format!("--initial-advertise-peer-urls={url}"),
            format!("--initial-cluster={initial}"),
            format!("--initial-cluster-state={state}"),
        ];
        let setup = PATIENT.into_iter().fold(Setup::new(&base, Storage::Memory), Setup::arg);
        flags.into_iter().chain(args).fold(setup, Setup::arg)
    }

    fn start(&self) -> Vec<Node> {
        let mut nodes: Vec<_> = self.setups.iter().map(Setup::spawn).collect();
        for node in &mut nodes {
            node.wait_ready();
        }
        nodes
    }
}

/// Waits for something that comes to be.
#[track_caller]
fn wait_until(what: &str, node: &Node, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(
            begun.elapsed() < SETTLE,
            "{what}: not within {SETTLE:?}; {}",
            node.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a linearizable read through the node succeeds within this time.
async fn serves(client: &mut Client, time: Duration) -> bool {
    let read = tokio::time::timeout(time, client.get("k", None)).await;
    matches!(read, Ok(Ok(_)))
}

async fn wait_serves(node: &Node) {
    let (begun, mut client) = (Instant::now(), node.client().await);
    while !serves(&mut client, Duration::from_secs(10)).await {
        assert!(
            begun.elapsed() < SETTLE,
            "it does not serve within {SETTLE:?}; {}",
            node.log()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What a port for members says to a browser, which is that it is none for browsers; an error if it says nothing.
async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Result<String, String> {
    let request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(request).await.map_err(|error| describe(&error))?;
    let mut answer = Vec::new();
    // A connection that is closed without TLS's farewell has said all the same what it said.
    let ended = stream.read_to_end(&mut answer).await;
    match (String::from_utf8_lossy(&answer).into_owned(), ended) {
        (answer, _) if !answer.is_empty() => Ok(answer),
        (_, Err(error)) => Err(describe(&error)),
        (_, Ok(_)) => Err("nothing".to_owned()),
    }
}

async fn ask_by_tls(port: u16, authority: &Authority, shown: Option<(PathBuf, PathBuf)>) -> Result<String, String> {
    let (cert_file, key_file) = shown.unzip();
    let client = TlsClient::new(TlsOptions {
        trusted_ca_file: Some(authority.path("ca.pem")),
        cert_file,
        key_file,
        alpn_protocols: Vec::new(),
        ..TlsOptions::for_clients()
    });
    let client = client.map_err(|error| error.to_string())?;
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let connected = client.connect(stream, "127.0.0.1").await;
    ask(connected.map_err(|error| error.to_string())?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_decide_who_belongs_to_a_cluster() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let tls = |(certificate, key): &(PathBuf, PathBuf), trusted: &Authority| {
        vec![
            format!("--peer-cert-file={}", certificate.display()),
            format!("--peer-key-file={}", key.display()),
            format!("--peer-trusted-ca-file={}", trusted.path("ca.pem").display()),
            "--peer-client-cert-auth".to_owned(),
            format!("--peer-crl-file={}", trusted.path("revoked.crl").display()),
            "--peer-cert-allowed-cn=member".to_owned(),
        ]
    };
    let certificates: Vec<_> = (1..=3_u64)
        .map(|number| ours.issue(&format!("m{number}"), "member", number))
        .collect();
    let cluster = Cluster::new(3, "https", "tls", |number| tls(&certificates[number - 1], &ours));
    let mut nodes = cluster.start();
    nodes[0].client().await.put("k", "v", None).await.unwrap();
    for node in &nodes {
        let answer = node.client().await.get("k", None).await.unwrap();
        assert_eq!(answer.kvs()[0].value(), b"v");
    }

    // Whoever has a certificate of the authority with an allowed name gets to speak, and nobody else.
    let port = cluster.ports[0];
    let answer = ask_by_tls(port, &ours, Some(certificates[1].clone())).await.unwrap();
    assert!(answer.contains("for the members of a MetaStore cluster"), "{answer}");
    let strangers = [
        ask(TcpStream::connect(("127.0.0.1", port)).await.unwrap()).await,
        ask_by_tls(port, &ours, None).await,
        ask_by_tls(port, &ours, Some(theirs.issue("stranger", "member", 1))).await,
        ask_by_tls(port, &ours, Some(ours.issue("other", "client", 4))).await,
    ];
    for answer in strangers {
        assert!(
            !answer.as_ref().is_ok_and(|answer| answer.contains("MetaStore")),
            "{answer:?}"
        );
    }
    for reason in [
        "rejected connection on peer endpoint",
        "tls: first record does not look like a TLS handshake",
        "tls: client didn't provide a certificate",
        "a certificate carries no allowed name",
    ] {
        wait_until(reason, &nodes[0], || nodes[0].log().contains(reason));
    }

    // A member that was added and comes with a certificate of another authority: it cannot even ask who belongs here.
    let mut client = nodes[0].client().await;
    let joiner = free_port();
    let url = cluster.url(joiner);
    let begun = Instant::now();
    let learner = etcd_client::MemberAddOptions::new().with_is_learner();
    let added = loop {
        // Only once everybody has been connected for a while.
        match client.member_add([url.clone()], Some(learner.clone())).await {
            Ok(added) => break added,
            Err(error) => assert!(begun.elapsed() < SETTLE, "{error}: {}", nodes[0].log()),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let added = added.member().unwrap().id();
    let initial = format!("{},m4={url}", cluster.initial());
    let wrong = tls(&theirs.issue("m4", "member", 5), &theirs);
    let (code, output) = cluster.setup(4, joiner, &initial, "existing", wrong).run_to_end();
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("cannot fetch cluster info from peer urls"), "{output}");
    // With one of ours it joins.
    let right = tls(&ours.issue("m4", "member", 6), &ours);
    let mut fourth = cluster.setup(4, joiner, &initial, "existing", right).start();
    let answer = fourth
        .client()
        .await
        .get("k", Some(GetOptions::new().with_serializable()))
        .await
        .unwrap();
    assert_eq!(answer.kvs()[0].value(), b"v");
    client.member_remove(added).await.unwrap();
    assert_eq!(fourth.wait_end(END_TIMEOUT).code(), Some(0), "{}", fourth.log());

    // A certificate that is revoked is refused in both directions, from its member's next connection on; without a restart
    // of the others, which go on.
    ours.revoke(&[3]);
    nodes[2].terminate();
    let revoked_log_from = nodes[0].log().len();
    nodes[2] = cluster.setups[2].spawn();
    nodes[2].wait_ready();
    let revoked = "a certificate is in the revocation list";
    wait_until(revoked, &nodes[0], || {
        nodes[0].log()[revoked_log_from..].contains(revoked)
    });
    client.put("k", "w", None).await.unwrap();
    let mut third = nodes[2].client().await;
    let briefly = Duration::from_secs(1);
    assert!(!serves(&mut third, briefly).await, "{}", nodes[2].log());
    // And taken once it is not revoked any more.
    ours.revoke(&[]);
    wait_serves(&nodes[2]).await;
    assert_eq!(third.get("k", None).await.unwrap().kvs()[0].value(), b"w");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_belong_to_a_cluster_is_refused() {
    let lax = |_| vec!["--strict-reconfig-check=false".to_owned()];
    let cluster = Cluster::new(3, "http", "here", lax);
    let mut nodes = cluster.start();
    let mut client = nodes[0].client().await;
    client.put("k", "v", None).await.unwrap();
    let term = |status: etcd_client::StatusResponse| status.raft_term();

    // A member of another cluster that was given one of ours as its peer.
    let begun_term = term(client.status().await.unwrap());
    let mut other = Cluster::new(2, "http", "there", lax);
    other.ports[1] = cluster.ports[0];
    let initial = other.initial();
    let stray = other.setup(
        1,
        other.ports[0],
        &initial,
        "new",
        vec!["--initial-cluster-token=there".to_owned()],
    );
    let mut stray = stray.spawn();
    wait_until("it is told", &stray, || stray.log().contains("a peer refuses us"));
    assert!(
        stray.log().contains("wrong cluster") || stray.log().contains("cluster "),
        "{}",
        stray.log()
    );
    wait_until("and this is noted", &nodes[0], || {
        nodes[0].log().contains("refused a peer connection")
    });
    assert!(!stray.log().contains("the cluster has a leader"), "{}", stray.log());
    stray.kill();
    assert_eq!(term(client.status().await.unwrap()), begun_term, "nobody was disturbed");

    // A joiner whose list of members is not the cluster's.
    let joiner = cluster.setup(
        5,
        free_port(),
        &format!("{},m5=http://127.0.0.1:1", cluster.initial()),
        "existing",
        Vec::new(),
    );
    let (code, output) = joiner
        .arg("--initial-advertise-peer-urls=http://127.0.0.1:1")
        .run_to_end();
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("member count is unequal"), "{output}");

    // A member that lost its data must not begin anew under its old id: it forgot what it voted for.
    nodes[1].kill();
    cluster.setups[1].refuses_to_begin_anew();

    // A removed member ends by itself, and again whenever it is started with what it has left.
    let members = client.member_list().await.unwrap();
    let id_of = |name: &str| {
        members
            .members()
            .iter()
            .find(|member| member.name() == name)
            .unwrap()
            .id()
    };
    client.member_remove(id_of("m2")).await.unwrap();
    client.member_remove(id_of("m3")).await.unwrap();
    assert_eq!(nodes[2].wait_end(END_TIMEOUT).code(), Some(0), "{}", nodes[2].log());
    for _ in 0..2 {
        let (code, output) = cluster.setups[2].run_to_end();
        assert_eq!(code, Some(0), "{output}");
        assert!(
            output.contains("the member has been permanently removed from the cluster"),
            "{output}"
        );
    }
    client.put("k", "alone", None).await.unwrap();
}

/// Entries and records that are larger than anything by default, through a follower, and to a member that needs a snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_values_reach_every_member() {
    let args = |_| {
        [
            "--max-request-bytes=10MiB",
            "--snapshot-count=5",
            "--snapshot-catchup-entries=0",
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let cluster = Cluster::new(3, "http", "large", args);
    let mut nodes = cluster.start();
    let mut clients = Vec::new();
    for node in &nodes {
        clients.push(node.client().await);
    }
    let (leads, _) = leader(&mut clients).await;
    let follower = (leads + 1) % 3;
    nodes[(follower + 1) % 3].terminate();
    let value = vec![7_u8; 6 << 20];
    // Both keys and values, and several of them under way at once.
    let mut puts = tokio::task::JoinSet::new();
    for number in 0..3_u8 {
        let (mut client, value) = (clients[follower].clone(), value.clone());
        puts.spawn(async move { client.put(vec![b'k', number], value, None).await });
    }
    clients[follower].put(vec![b'l'; 1 << 20], "long", None).await.unwrap();
    while let Some(put) = puts.join_next().await {
        put.unwrap().unwrap();
    }
    for number in 0..20 {
        clients[follower].put("more", format!("{number}"), None).await.unwrap();
    }
    // Until the others do not count on it any more, and have trimmed their logs. Nothing tells when: if it is back too
    // early, it goes again, for longer.
    let (begun, mut pause) = (Instant::now(), Duration::from_secs(6));
    loop {
        tokio::time::sleep(pause).await;
        let late = &mut nodes[(follower + 1) % 3];
        *late = cluster.setups[(follower + 1) % 3].start();
        wait_serves(late).await;
        // The line may come after what it is about.
        let served = Instant::now();
        let has_applied = || late.log().contains("applied snapshot");
        while !has_applied() && served.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if has_applied() {
            break;
        }
        late.terminate();
        assert!(
            begun.elapsed() < 2 * SETTLE,
            "it never needs a snapshot: {}",
            late.log()
        );
        for number in 0..20 {
            clients[follower].put("more", format!("{number}"), None).await.unwrap();
        }
        pause *= 2;
    }
    let mut hashes = Vec::new();
    for node in &nodes {
        wait_serves(node).await;
        hashes.push(node.client().await.hash_kv(0).await.unwrap().hash());
        let all = GetOptions::new().with_all_keys().with_keys_only();
        assert_eq!(node.client().await.get("", Some(all)).await.unwrap().kvs().len(), 5);
    }
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
}

/// Nobody can verify a generated certificate, so nobody asks for that, not even whoever has none of its own yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_join_with_generated_certificates() {
    let args = || vec!["--peer-auto-tls".to_owned()];
    let cluster = Cluster::new(1, "https", "generated", |_| args());
    let first = &cluster.start()[0];
    let mut client = first.client().await;
    client.put("k", "v", None).await.expect("is put");
    let port = free_port();
    client.member_add([cluster.url(port)], None).await.expect("is added");
    let initial = format!("{},m2={}", cluster.initial(), cluster.url(port));
    let second = cluster.setup(2, port, &initial, "existing", args()).start();
    wait_serves(&second).await;
    let found = second.client().await.get("k", None).await.expect("is read");
    assert_eq!(found.kvs()[0].value(), b"v");
}

/// A leader whose log disk takes no writes says why it is of no use, and is not the leader for long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_disk_takes_leadership_away_and_says_so() {
    let faults = temp_dir();
    let file = |number: usize| faults.path().join(format!("m{number}"));
    let cluster = Cluster::new(3, "http", "stall", |_| {
        vec![
            "--election-timeout=3000".to_owned(),
            "--heartbeat-interval=300".to_owned(),
        ]
    });
    let setups = cluster.setups.iter().zip(1..);
    let setups = setups.map(|(setup, number)| setup.clone().env("METASTORE_FAULT_FILE", file(number)));
    let mut nodes: Vec<_> = setups.map(|setup| setup.spawn()).collect();
    for node in &mut nodes {
        node.wait_ready();
    }
    let mut clients = Vec::new();
    for node in &nodes {
        clients.push(node.client().await);
    }
    retried(async || clients[0].put("k", "v", None).await).await;
    let fenced = "this member has given leadership up";
    let begun = Instant::now();
    let at = loop {
        let (at, id) = leader(&mut clients).await;
        fs::write(file(at + 1), "log-sync-delay-ms 600000\n").unwrap();
        // Something must be written for the disk to be noticed, once the fault is. The others are a quorum: the writes do
        // not wait for it, and may fail while nobody leads.
        let other = (at + 1) % 3;
        let stalled = Instant::now();
        while [0, id].contains(&clients[other].status().await.unwrap().leader()) {
            assert!(stalled.elapsed() < SETTLE, "it leads on; {}", nodes[at].log());
            drop(tokio::time::timeout(Duration::from_secs(1), clients[other].put("k", "w", None)).await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        retried(async || clients[other].put("k", "w", None).await).await;
        // On a busy machine somebody else may have led when the disk stalled, or the others may have given it up first.
        let led = Instant::now();
        while !nodes[at].log().contains(fenced) && led.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if nodes[at].log().contains(fenced) {
            break at;
        }
        assert!(begun.elapsed() < 2 * SETTLE, "{fenced}: not once; {}", nodes[at].log());
        fs::write(file(at + 1), "").unwrap();
        wait_serves(&nodes[at]).await;
    };
    let port = cluster.setups[at].port;
    let health = http(port, "/health").await;
    assert!(
        health.contains("503") && health.contains("LOG_STALLED: the disk of the Raft log has not finished a write for"),
        "{health}"
    );
    let ready = http(port, "/readyz").await;
    assert!(
        ready.contains("503") && ready.contains("[-]log_write failed: the disk of the Raft log"),
        "{ready}"
    );
    assert!(http(port, "/livez").await.contains("200 OK"));
    let metrics = http(port, "/metrics").await;
    assert!(metrics.contains("\nmetastore_log_stalled 1\n"), "{metrics}");
    // A real disk may stall as well.
    for counter in ["metastore_log_stalls_total", "metastore_leaders_fenced_total"] {
        let count = metrics
            .lines()
            .find_map(|line| line.strip_prefix(counter)?.strip_prefix(' '));
        assert!(count.is_some_and(|count| count != "0"), "{counter}: {count:?}");
    }
    fs::write(file(at + 1), "").unwrap();
    wait_serves(&nodes[at]).await;
    for (path, part) in [
        ("/health", r#"{"health":"true","reason":""}"#),
        ("/metrics", "\nmetastore_log_stalled 0\n"),
    ] {
        let begun = Instant::now();
        loop {
            let page = http(port, path).await;
            if page.contains(part) {
                break;
            }
            assert!(begun.elapsed() < SETTLE, "no {part:?} in {page}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let found = retried(async || clients[at].get("k", None).await).await;
    assert_eq!(found.kvs()[0].value(), b"w");
}

/// Which of these members leads the cluster, once one does, and its id.
async fn leader(clients: &mut [Client]) -> (usize, u64) {
    let begun = Instant::now();
    loop {
        for (number, client) in clients.iter_mut().enumerate() {
            let status = client.status().await.unwrap();
            let id = status.header().unwrap().member_id();
            if status.leader() == id {
                return (number, id);
            }
        }
        assert!(begun.elapsed() < SETTLE, "nobody leads");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn http(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Whoever reads the log, or does not, must not hold the node up: neither while it serves nor when it ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nobody_reads_does_not_hold_the_node_up() {
    const PUTS: i64 = 300;
    let base = temp_dir();
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    let mut child = Command::new(env!("CARGO_BIN_EXE_metastore"))
        .env_clear()
        .arg(format!("--data-dir={}", base.path().join("data").display()))
        .arg(format!("--listen-client-urls={url}"))
        .arg(format!("--advertise-client-urls={url}"))
        .arg("--listen-peer-urls=http://127.0.0.1:0")
        // A line for every put, as every one takes longer than that.
        .arg("--warning-unary-request-duration=1ns")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = child.stderr.take().unwrap();
    let begun = Instant::now();
    let mut client = loop {
        assert!(begun.elapsed() < SETTLE, "it does not start");
        if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            break support::client(&url).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    // A pipe holds 64 KiB, and the queue before it some 16,000 lines: far fewer than these.
    let mut puts = tokio::task::JoinSet::new();
    for number in 0..64 {
        let mut client = client.clone();
        puts.spawn(async move {
            for put in 0..PUTS {
                client.put(format!("{number}/{put}"), "v", None).await.unwrap();
            }
        });
    }
    while let Some(done) = tokio::time::timeout(Duration::from_secs(180), puts.join_next())
        .await
        .expect("it goes on")
    {
        done.unwrap();
    }
    let count = client
        .get("", Some(GetOptions::new().with_prefix().with_count_only()))
        .await
        .unwrap()
        .count();
    assert_eq!(count, 64 * PUTS);
    // It ends when told to, without a reader too.
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > END_TIMEOUT {
            let _ = child.kill();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // The pipe was full indeed, or nothing was shown here.
    let mut read = Vec::new();
    pipe.read_to_end(&mut read).unwrap();
    assert!(read.len() >= 60_000, "{} bytes", read.len());
    assert!(!is_whole(&read), "everything was written, so nothing was held up");
}

/// Whether the log says that the node has stopped.
fn is_whole(log: &[u8]) -> bool {
    let end = br#""msg":"stopped""#;
    log.windows(end.len()).any(|window| window == end)
}
