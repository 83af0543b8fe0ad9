//! Who gets in, and what those are told who do not.

use std::time::Duration;

use api::limits::ETCD_CLUSTER_VERSION;
use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::harness::{CLUSTER, LONG, Member, identity, member, member_with, quick, until, url};
use crate::peer::frame::{cut_frame, message_frame};
use crate::peer::wire::{Answer, Hello, MAGIC, VERSION, decode_close, kind};
use crate::peer::{CallError, Purpose, RefuseReason, Settings, Tls, call_url};

fn hello(purpose: Purpose) -> Hello {
    Hello {
        purpose: purpose.code(),
        cluster_id: CLUSTER,
        from: 1,
        to: 2,
        version: "test".to_owned(),
        peer_urls: vec!["http://a:1".to_owned()],
        incarnation: 77,
        sequence: 5,
        cluster_version: ETCD_CLUSTER_VERSION.to_owned(),
    }
}

async fn connect(to: &Member) -> TcpStream {
    let address = to.url.to_string().replace("http://", "");
    TcpStream::connect(address).await.expect("a connection")
}

async fn introduce(to: &Member, version: u8, hello: &Hello) -> (TcpStream, Answer) {
    let mut stream = connect(to).await;
    let mut bytes = BytesMut::from(&MAGIC[..]);
    bytes.put_u8(version);
    bytes.put(message_frame(hello));
    stream.write_all(&bytes).await.expect("written");
    let frame = read_frame(&mut stream).await.expect("an answer");
    let answer = Answer::decode(frame).expect("an answer");
    (stream, answer)
}

/// The next frame; `None` at the end.
async fn read_frame(stream: &mut TcpStream) -> Option<Bytes> {
    let mut buffer = BytesMut::new();
    loop {
        // Byte by byte, so that what follows stays in the stream.
        let byte = stream.read_u8().await.ok()?;
        buffer.put_u8(byte);
        if let Some(frame) = cut_frame(&mut buffer, 1 << 20).expect("a frame") {
            return Some(frame.payload);
        }
    }
}

async fn refusal(to: &Member, version: u8, hello: &Hello) -> Option<RefuseReason> {
    let (_, answer) = introduce(to, version, hello).await;
    assert_eq!(answer.member_id, 2);
    answer.refused.map(|refused| RefuseReason::from_code(refused.reason))
}

#[tokio::test]
async fn each_refusal_has_its_reason() {
    let two = member(2).await;
    two.watcher.removed.lock().push(3);
    let good = || hello(Purpose::Raft);
    assert_eq!(refusal(&two, VERSION, &good()).await, None);
    let cases = [
        (
            Hello {
                cluster_id: 9,
                ..good()
            },
            RefuseReason::WrongCluster,
        ),
        (
            Hello {
                cluster_id: 0,
                ..good()
            },
            RefuseReason::WrongCluster,
        ),
        (Hello { to: 9, ..good() }, RefuseReason::WrongMember),
        (Hello { to: 0, ..good() }, RefuseReason::WrongMember),
        (Hello { from: 2, ..good() }, RefuseReason::WrongMember),
        (Hello { from: 0, ..good() }, RefuseReason::Stranger),
        (Hello { from: 101, ..good() }, RefuseReason::Stranger),
        (Hello { from: 3, ..good() }, RefuseReason::Removed),
        (Hello { purpose: 9, ..good() }, RefuseReason::Incompatible),
        (
            Hello {
                purpose: Purpose::Snapshot.code(),
                from: 0,
                ..good()
            },
            RefuseReason::Stranger,
        ),
        (
            Hello {
                purpose: Purpose::Call.code(),
                cluster_id: 9,
                ..good()
            },
            RefuseReason::WrongCluster,
        ),
        (Hello { sequence: 4, ..good() }, RefuseReason::Superseded),
        (
            Hello {
                peer_urls: vec!["x".to_owned(); 65],
                ..good()
            },
            RefuseReason::Stranger,
        ),
    ];
    // Held, so that an older one meets it.
    let (_held, answer) = introduce(&two, VERSION, &good()).await;
    assert_eq!(answer.refused, None);
    for (hello, reason) in cases {
        assert_eq!(refusal(&two, VERSION, &hello).await, Some(reason), "{hello:?}");
    }
    assert_eq!(
        refusal(&two, VERSION + 1, &good()).await,
        Some(RefuseReason::Incompatible)
    );
    let joiner = Hello {
        purpose: Purpose::Call.code(),
        cluster_id: 0,
        from: 0,
        to: 0,
        ..good()
    };
    assert_eq!(refusal(&two, VERSION, &joiner).await, None);
}

/// Our cluster version with so much more in its minor number.
fn cluster_version(later: i64) -> String {
    let mut parts = ETCD_CLUSTER_VERSION.split('.');
    let (major, minor) = (parts.next().expect("a major"), parts.next().expect("a minor"));
    let minor: i64 = minor.parse().expect("a number");
    format!("{major}.{}.0", minor + later)
}

#[tokio::test]
async fn releases_that_are_too_far_apart_are_refused() {
    let two = member(2).await;
    let of = |cluster_version: String, sequence| Hello {
        cluster_version,
        sequence,
        ..hello(Purpose::Raft)
    };
    for (sequence, near) in (10..).zip([cluster_version(-1), cluster_version(1), String::new()]) {
        assert_eq!(
            refusal(&two, VERSION, &of(near.clone(), sequence)).await,
            None,
            "{near}"
        );
    }
    for far in [cluster_version(-2), cluster_version(2), "x".to_owned()] {
        let reason = refusal(&two, VERSION, &of(far.clone(), 20)).await;
        assert_eq!(reason, Some(RefuseReason::Incompatible), "{far}");
        // A joiner, likewise.
        let joiner = Hello {
            purpose: Purpose::Call.code(),
            cluster_id: 0,
            from: 0,
            to: 0,
            ..of(far.clone(), 0)
        };
        let (_, answer) = introduce(&two, VERSION, &joiner).await;
        let text = answer.refused.expect("a refusal").text;
        assert!(text.contains("incompatible with current running cluster"), "{text}");
    }
}

#[tokio::test]
async fn a_release_that_takes_us_may_still_be_too_far_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let at = url(&format!("http://{}", listener.local_addr().expect("an address")));
    let other = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut preface = [0; MAGIC.len() + 1];
        stream.read_exact(&mut preface).await.expect("a preface");
        let hello = Hello::decode(read_frame(&mut stream).await.expect("a frame")).expect("a Hello");
        let answer = Answer {
            refused: None,
            cluster_id: CLUSTER,
            member_id: 2,
            version: "test".to_owned(),
            cluster_version: cluster_version(2),
        };
        stream.write_all(&message_frame(&answer)).await.expect("written");
        hello.cluster_version
    });
    let echo = Bytes::from_static(b"echo");
    let answer = call_url(&quick(), &Tls::default(), &at, 0, "test", echo, LONG).await;
    assert!(
        matches!(&answer, Err(CallError::Refused(refusal)) if refusal.reason == RefuseReason::Incompatible),
        "{answer:?}"
    );
    assert_eq!(other.await.expect("the other"), ETCD_CLUSTER_VERSION);
}

#[tokio::test]
async fn too_many_connections_are_refused() {
    let settings = Settings {
        connections_max: 2,
        ..quick()
    };
    let two = member_with(identity(2), settings, Tls::default(), "http://127.0.0.1:0").await;
    let (_one, _) = introduce(&two, VERSION, &hello(Purpose::Raft)).await;
    let (_two, _) = introduce(&two, VERSION, &hello(Purpose::Call)).await;
    let reason = refusal(&two, VERSION, &hello(Purpose::Snapshot)).await;
    assert_eq!(reason, Some(RefuseReason::Busy));
}

#[tokio::test]
async fn joiners_do_not_take_the_room_of_members() {
    let two = member(2).await;
    let joiner = Hello {
        from: 0,
        to: 0,
        ..hello(Purpose::Call)
    };
    let mut held = Vec::new();
    for _ in 0..64 {
        let (stream, answer) = introduce(&two, VERSION, &joiner).await;
        assert_eq!(answer.refused, None);
        held.push(stream);
    }
    assert_eq!(refusal(&two, VERSION, &joiner).await, Some(RefuseReason::Busy));
    assert_eq!(refusal(&two, VERSION, &hello(Purpose::Call)).await, None);
}

#[tokio::test]
async fn who_does_not_introduce_himself_is_cut_in_time() {
    let settings = Settings {
        handshakes_max: 1,
        handshake_timeout: Duration::from_millis(500),
        ..quick()
    };
    let two = member_with(identity(2), settings, Tls::default(), "http://127.0.0.1:0").await;
    let mut silent = connect(&two).await;
    let mut slow = connect(&two).await;
    let drip = tokio::spawn(async move {
        // Always something, never all of it: a pause can only make it slower.
        let mut bytes = BytesMut::from(&MAGIC[..]);
        bytes.put_u8(VERSION);
        bytes.put(message_frame(&hello(Purpose::Raft)));
        for byte in bytes {
            if slow.write_u8(byte).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        slow.read_u8().await.is_err()
    });
    let cut = tokio::time::timeout(LONG, silent.read_u8()).await;
    assert!(cut.expect("cut in time").is_err());
    // A peer waits in the backlog, and then gets in. Should it be too slow itself, it tries again.
    let one = member(1).await;
    one.knows(&[(2, &two.url)]);
    one.connected(2).await;
    assert!(drip.await.expect("the drip"));
}

#[tokio::test]
async fn a_browser_is_told_where_it_is() {
    let two = member(2).await;
    for (request, begins, ends) in [
        (
            "GET /version HTTP/1.1\r\nHost: x\r\n\r\n",
            "HTTP/1.1 404 Not Found\r\n",
            "cluster.\n",
        ),
        ("HEAD / HTTP/1.0\r\n\r\n", "HTTP/1.1 404 Not Found\r\n", "\r\n\r\n"),
        (
            "POST /raft HTTP/1.1\r\n\r\n",
            "HTTP/1.1 400 Bad Request\r\n",
            "\r\n\r\n",
        ),
    ] {
        let mut stream = connect(&two).await;
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.expect("a reply");
        assert!(reply.starts_with(begins) && reply.ends_with(ends), "{reply:?}");
    }
}

#[tokio::test]
async fn garbage_is_cut() {
    let two = member(2).await;
    let greeting = [&MAGIC[..], &[VERSION]].concat();
    let huge = [&greeting[..], &[0xff; 8]].concat();
    let empty = [&greeting[..], &[0; 8]].concat();
    let wrong = [&greeting[..], &[4, 0, 0, 0, 1, 2, 3, 4, 1, 1, 1, 1]].concat();
    let tls = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3].to_vec();
    for bytes in [b"SSH-2.0-x\r\n".to_vec(), vec![0; 100], huge, empty, wrong, tls] {
        let mut stream = connect(&two).await;
        // It may be cut before it has sent all.
        let _ = stream.write_all(&bytes).await;
        let mut rest = Vec::new();
        let cut = tokio::time::timeout(quick().handshake_timeout / 2, stream.read_to_end(&mut rest)).await;
        assert!(cut.is_ok(), "at once, and not only when the time is over");
        assert!(rest.is_empty());
    }
}

#[tokio::test]
async fn wrong_frames_after_the_handshake_end_the_connection() {
    let two = member(2).await;
    let good = {
        let mut frame = BytesMut::new();
        let payload = [kind::MESSAGES, 1, 0, 0, 0, b'x'];
        frame.put_u32_le(payload.len() as u32);
        frame.put_u32_le(crc32c::crc32c(&payload));
        frame.put_slice(&payload);
        frame.to_vec()
    };
    let mut bad_checksum = good.clone();
    bad_checksum[13] ^= 1;
    let mut too_long = good.clone();
    let length_max = quick().frame_bytes_max as u32;
    too_long[..4].copy_from_slice(&(length_max + 1).to_le_bytes());
    let framed = |payload: &[u8]| {
        let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
        bytes.extend(crc32c::crc32c(payload).to_le_bytes());
        bytes.extend(payload);
        bytes
    };
    let bad_length = framed(&[kind::MESSAGES, 9, 0, 0, 0, b'x']);
    let unknown = framed(&[200]);
    for (sequence, bad) in [bad_checksum, too_long, bad_length, unknown].into_iter().enumerate() {
        let before = two.received_count();
        let hello = Hello {
            sequence: 10 + sequence as u64,
            ..hello(Purpose::Raft)
        };
        let (mut stream, answer) = introduce(&two, VERSION, &hello).await;
        assert_eq!(answer.refused, None);
        stream.write_all(&good).await.expect("written");
        until("received", || two.received_count() == before + 1).await;
        // In one piece: between two, it may be cut.
        let bad_then_good = [&bad[..], &good].concat();
        stream.write_all(&bad_then_good).await.expect("written");
        let mut rest = Vec::new();
        let cut = tokio::time::timeout(quick().raft_read_timeout / 2, stream.read_to_end(&mut rest)).await;
        assert!(cut.is_ok(), "at once, and not only when the time is over");
        assert_eq!(
            two.received_count(),
            before + 1,
            "nothing behind a wrong frame is believed"
        );
    }
    until("closed", || two.transport.shared.incoming.count(Purpose::Raft) == 0).await;
}

#[tokio::test]
async fn whoever_is_replaced_is_told() {
    let two = member(2).await;
    let (mut first, _) = introduce(&two, VERSION, &hello(Purpose::Raft)).await;
    let (_second, answer) = introduce(
        &two,
        VERSION,
        &Hello {
            sequence: 6,
            ..hello(Purpose::Raft)
        },
    )
    .await;
    assert_eq!(answer.refused, None);
    let close = read_frame(&mut first).await.expect("a reason");
    assert_eq!(close[0], kind::CLOSE);
    assert_eq!(decode_close(close.slice(1..)).reason, RefuseReason::Superseded);
    assert_eq!(read_frame(&mut first).await, None);
}
