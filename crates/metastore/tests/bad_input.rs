//! Clients that misbehave, against the real binary: each is refused or waits at its own cost, and the node goes on for
//! others.

#![allow(clippy::print_stderr, reason = "the numbers are what one runs it for")]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use support::{Node, Setup, Storage, fresh, raise_limit, temp_dir};

/// Connections that say nothing.
const IDLE_CONNECTIONS: usize = 10_000;
/// What each of them may cost the node, in bytes; 23 KiB when it was measured.
const IDLE_CONNECTION_BYTES_MAX: u64 = 40 << 10;
/// File descriptors that this process needs for the other tests and for itself.
const DESCRIPTORS_SPARED: u64 = 1000;
/// How long others may wait meanwhile. Far more than they do; the machine may be busy.
const PUT_TIMEOUT: Duration = Duration::from_secs(30);
const END_TIMEOUT: Duration = Duration::from_secs(60);

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

fn connect(node: &Node) -> TcpStream {
    let address = node.url().strip_prefix("http://").expect("it is plaintext");
    TcpStream::connect(address).expect("the node takes connections")
}

/// What the node answers to these bytes, until it hangs up or nothing comes for a while.
fn answer(node: &Node, bytes: &[u8]) -> Vec<u8> {
    let mut connection = connect(node);
    let mut answer = Vec::new();
    connection
        .set_read_timeout(Some(END_TIMEOUT))
        .expect("a timeout can be set");
    // The node may hang up before it has read all of it.
    if let Err(error) = connection.write_all(bytes) {
        assert!(
            matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
            "{error}"
        );
    }
    let mut piece = [0; 4096];
    loop {
        match connection.read(&mut piece) {
            Ok(0) => return answer,
            Ok(length) => answer.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return answer,
            Err(error) => panic!("the node did not hang up: {error}; it said {answer:?}"),
        }
    }
}

/// Puts a few keys; each must go through in time.
fn others_are_served(node: &Node) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime starts");
    runtime.block_on(async {
        let mut client = node.client().await;
        for number in 0..20 {
            let put = client.put("key", number.to_string(), None);
            let put = tokio::time::timeout(PUT_TIMEOUT, put).await;
            put.expect("in time").expect("the put succeeds");
        }
    });
}

fn resident_bytes(node: &Node) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).expect("the node runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line
        .and_then(|line| line.trim().strip_suffix("kB"))
        .expect("Linux says it");
    kib.trim().parse::<u64>().expect("a number") << 10
}

#[test]
fn http_1_that_is_none_is_refused() {
    let (_dir, node) = fresh(Storage::Memory);
    for (bytes, status) in [
        (&b"\r\n\r\nnonsense\r\n\r\n"[..], "HTTP/1.1 400"),
        (b"GET / HTTP/9.9\r\n\r\n", "HTTP/1.1 400"),
        (b"G\xffT / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA b: c\r\n\r\n", "HTTP/1.1 400"),
        (
            b"POST /v3/kv/range HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{}",
            "HTTP/1.1 400",
        ),
        (
            b"POST /v3/kv/range HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 11\r\n\r\n{\"key\":\"\xff\"}",
            "HTTP/1.1 400",
        ),
    ] {
        let answer = answer(&node, bytes);
        assert!(
            String::from_utf8_lossy(&answer).starts_with(status),
            "{:?}: {:?}",
            String::from_utf8_lossy(bytes),
            String::from_utf8_lossy(&answer)
        );
    }
    let large = [&b"GET /version HTTP/1.1\r\nHost: x\r\nA: "[..], &vec![b'x'; 2 << 20]].concat();
    let answer = answer(&node, &large);
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    others_are_served(&node);
}

#[test]
fn http_2_that_is_none_ends_its_connection() {
    let (_dir, node) = fresh(Storage::Memory);
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let head = [length[1], length[2], length[3], kind, flags, 0, 0, 0, stream];
        [PREFACE, SETTINGS, &head, payload].concat()
    };
    for (what, bytes) in [
        ("a frame larger than agreed on", frame(0, 0, 1, &[0; 20_000])),
        ("data without headers", frame(0, 0, 1, b"data")),
        ("headers on stream 0", frame(1, 4, 0, b"")),
        ("headers that do not decompress", frame(1, 4, 1, &[0xff; 20])),
        ("a ping of the wrong size", frame(6, 0, 0, b"1234567")),
        ("settings of the wrong size", frame(4, 0, 0, b"12345")),
        ("a window of nothing", frame(8, 0, 0, &[0; 4])),
        ("a continuation of nothing", frame(9, 0, 1, b"")),
    ] {
        let answer = answer(&node, &bytes);
        // Its last frame is a GOAWAY, type 7.
        let (mut rest, mut last) = (&answer[..], 0);
        while let [a, b, c, kind, _, _, _, _, _, payload @ ..] = rest {
            last = *kind;
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            rest = payload.get(length..).unwrap_or_default();
        }
        assert_eq!(last, 7, "{what}: {answer:?}");
    }
    others_are_served(&node);
}

/// Whoever sends a request byte by byte, or the half of one, holds up nobody else.
#[test]
fn slow_clients_hold_up_nobody() {
    let (_dir, node) = fresh(Storage::Memory);
    let frame = |kind: u8, flags: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).expect("short");
        [&[0, 0, length, kind, flags, 0, 0, 0, 1], payload].concat()
    };
    // A put's headers: two from HPACK's table, the rest written out.
    let headers = [
        &[0x83, 0x86, 0x04, 20][..],
        b"/etcdserverpb.KV/Put",
        &[0x01, 1],
        b"x",
        &[0x0f, 0x10, 16],
        b"application/grpc",
        &[0x40, 2],
        b"te",
        &[8],
        b"trailers",
    ]
    .concat();
    let call = [PREFACE, SETTINGS, &frame(1, 4, &headers)].concat();
    // Its message is to have 100 bytes.
    let half_a_call = [&call[..], &frame(0, 0, &[0, 0, 0, 0, 100, 0x0a])].concat();
    let starts: [&[u8]; 8] = [
        &call[..PREFACE.len() + SETTINGS.len() + 12],
        &call,
        &half_a_call,
        b"G",
        b"POST /v3/kv/put HTTP/1.1\r\nHost: x\r\nContent-Le",
        b"POST /v3/kv/put HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{\"key\":\"",
        b"PRI * HTTP/2.0\r\n\r\nSM",
        PREFACE,
    ];
    let mut connections = Vec::new();
    for number in 0..500 {
        let mut connection = connect(&node);
        connection.write_all(starts[number % starts.len()]).expect("it is sent");
        connections.push(connection);
    }
    others_are_served(&node);
    for connection in &mut connections {
        // Some are refused by now, which is as well.
        let _ = connection.write_all(b"x");
    }
    others_are_served(&node);
}

/// More connections than there are file descriptors take none from the data, and others get theirs when those end.
#[test]
fn connections_leave_descriptors_for_the_data() {
    const DESCRIPTORS: u32 = 256;
    const CONNECTIONS: usize = 300;
    raise_limit();
    let dir = temp_dir();
    let mut node = Setup::new(dir.path(), Storage::RocksDb)
        .descriptors_max(DESCRIPTORS)
        // Puts make it write files.
        .arg("--snapshot-count=5")
        .start();
    assert!(node.log().contains("the limit of open files"), "{}", node.log());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime starts");
    let put = |client: &mut etcd_client::Client, number: usize| {
        let put = client.put("key", number.to_string(), None);
        let put = runtime.block_on(async { tokio::time::timeout(PUT_TIMEOUT, put).await });
        put.expect("in time").expect("the put succeeds");
    };
    let mut early = runtime.block_on(node.client());
    put(&mut early, 0);

    let mut connections = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        connections.push(connect(&node));
    }
    let mut late = connect(&node);
    late.write_all(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .expect("it is sent");
    // The node looks for what to flush every now and then.
    for number in 0..20 {
        put(&mut early, number);
        std::thread::sleep(Duration::from_millis(100));
    }
    node.wait_log("clients have as many connections");
    assert!(!node.log().contains("a connection was not accepted"), "{}", node.log());
    late.set_read_timeout(Some(Duration::from_millis(100)))
        .expect("a timeout can be set");
    let waiting = late.read(&mut [0; 1]).expect_err("there is no room for it");
    assert!(
        matches!(waiting.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        "{waiting}"
    );

    drop(connections);
    late.set_read_timeout(Some(END_TIMEOUT)).expect("a timeout can be set");
    let mut answer = String::new();
    late.read_to_string(&mut answer).expect("it is served now");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    others_are_served(&node);
    put(&mut early, 0);
    assert!(node.terminate().code().is_none(), "it ends by the signal");
}

#[test]
fn ten_thousand_idle_connections_cost_little() {
    let limit = raise_limit();
    // The node, which may have as many, keeps some for itself as well.
    let room = limit.saturating_sub(DESCRIPTORS_SPARED).min(limit / 2);
    let count = IDLE_CONNECTIONS.min(usize::try_from(room).unwrap_or(usize::MAX));
    let (_dir, node) = fresh(Storage::Memory);
    others_are_served(&node);
    let before = resident_bytes(&node);
    let mut connections = Vec::with_capacity(count);
    for number in 0..count {
        let mut connection = connect(&node);
        // Every other one has got as far as a gRPC client that asks nothing.
        if number % 2 == 0 {
            connection.write_all(PREFACE).expect("it is sent");
            connection.write_all(SETTINGS).expect("it is sent");
        }
        connections.push(connection);
    }
    others_are_served(&node);
    let each = resident_bytes(&node).saturating_sub(before) / count as u64;
    eprintln!("{count} idle connections cost {each} bytes each");
    assert!(each < IDLE_CONNECTION_BYTES_MAX, "{each} bytes a connection");
    let begun = Instant::now();
    drop(connections);
    others_are_served(&node);
    assert!(begun.elapsed() < END_TIMEOUT);
}
