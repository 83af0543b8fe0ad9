//! Bytes that are no frames, no introductions and no messages: nothing panics, and nothing is allocated for a promise.

use bytes::{BufMut as _, Bytes, BytesMut};
use proptest::prelude::*;
use prost::Message as _;
use tokio::io::AsyncReadExt as _;

use super::harness::LONG;
use crate::peer::address::PeerUrl;
use crate::peer::frame::{FrameBatch, FrameError, FrameReader, FrameWriter, HEADER_BYTES, ReadError, cut_frame};
use crate::peer::raft_frame;
use crate::peer::wire::{Answer, HANDSHAKE_BYTES_MAX, Hello, SnapshotOpen, decode_close, kind};

const MAX: usize = 1000;

/// What a writer puts on the wire.
fn written(batch: FrameBatch) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(async {
        let (near, mut far) = tokio::io::duplex(64 << 20);
        let mut writer = FrameWriter::new(near, LONG);
        writer.batch = batch;
        writer.flush().await.expect("room");
        drop(writer);
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).await.expect("all of it");
        bytes
    })
}

fn read_all(bytes: &[u8], max: usize) -> (Vec<Bytes>, ReadError) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(async {
        let mut reader = FrameReader::new(bytes, max);
        let mut frames = Vec::new();
        loop {
            match reader.next(LONG).await {
                Ok(frame) => frames.push(frame.payload),
                Err(error) => return (frames, error),
            }
        }
    })
}

fn header(length: u32, checksum: u32) -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u32_le(length);
    bytes.put_u32_le(checksum);
    bytes
}

#[test]
fn a_promised_length_allocates_nothing() {
    let mut buffer = header(u32::MAX, 0);
    let before = buffer.capacity();
    let error = cut_frame(&mut buffer, MAX).expect_err("too long");
    assert!(matches!(error, FrameError::TooLong { max: MAX, .. }));
    assert_eq!(buffer.capacity(), before);
    assert_eq!(cut_frame(&mut header(0, 0), MAX), Err(FrameError::Empty));
    let mut buffer = header(1, 7);
    buffer.put_u8(1);
    assert_eq!(cut_frame(&mut buffer, MAX), Err(FrameError::Checksum { length: 1 }));
}

#[test]
fn a_frame_on_the_wire_stays_as_it_is() {
    let mut batch = FrameBatch::default();
    batch.frame(kind::PING, &5_u64.to_le_bytes());
    let bytes = written(batch);
    assert_eq!(bytes[..4], [9, 0, 0, 0]);
    assert_eq!(bytes[8..], [2, 5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[4..8], crc32c::crc32c(&bytes[8..]).to_le_bytes());
    // Check value of CRC-32C.
    assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
}

/// Frames that come one by one and live on, as the entries of a log do, share their memory.
#[tokio::test]
async fn small_frames_that_live_on_share_memory() {
    let (near, far) = tokio::io::duplex(4 << 10);
    let mut writer = FrameWriter::new(near, LONG);
    let mut reader = FrameReader::new(far, 1 << 20);
    let mut payloads: Vec<Bytes> = Vec::new();
    for number in 0..2000_u64 {
        writer.send(kind::MESSAGES, &[7; 300]).await.expect("room");
        let frame = reader.next(LONG).await.expect("a frame");
        assert_eq!(frame.payload.len(), 301, "frame {number}");
        payloads.push(frame.payload);
    }
    let adjoins = |pair: &[Bytes]| pair[1].as_ptr() as usize == pair[0].as_ptr() as usize + 301 + HEADER_BYTES;
    let apart = payloads.windows(2).filter(|pair| !adjoins(pair)).count();
    // 2,000 frames of 309 bytes fill ten pieces of 64 KiB.
    assert!(
        apart < 20,
        "{apart} of 2000 frames begin a piece of memory of their own"
    );
}

proptest! {
    #[test]
    fn random_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
        let (_, _) = read_all(&bytes, MAX);
        let bytes = Bytes::from(bytes);
        let _ = Hello::decode(bytes.clone());
        let _ = Answer::decode(bytes.clone());
        let _ = SnapshotOpen::decode(bytes.clone());
        let _ = decode_close(bytes.clone());
        let mut messages = Vec::new();
        let _ = raft_frame::decode(bytes.clone(), &mut messages);
        prop_assert!(messages.iter().map(|message| message.len() + 4).sum::<usize>() <= bytes.len());
    }

    #[test]
    fn random_payloads_in_right_frames_are_survived(
        payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..300), 0..20),
        cut in any::<prop::sample::Index>(),
        flip in proptest::option::of((any::<prop::sample::Index>(), 1_u8..)),
    ) {
        let mut batch = FrameBatch::default();
        for payload in &payloads {
            batch.frame(payload[0], &payload[1..]);
        }
        let mut bytes = written(batch);
        let whole = read_all(&bytes, MAX);
        prop_assert_eq!(&whole.0, &payloads);
        prop_assert!(matches!(whole.1, ReadError::Closed));
        if bytes.is_empty() {
            return Ok(());
        }
        if let Some((at, by)) = flip {
            let at = at.index(bytes.len());
            bytes[at] ^= by;
            let (frames, _) = read_all(&bytes, MAX);
            // What comes before the damage is there, and nothing that is wrong.
            prop_assert!(frames.len() < payloads.len());
            prop_assert_eq!(&frames[..], &payloads[..frames.len()]);
        } else {
            bytes.truncate(cut.index(bytes.len()));
            let (frames, _) = read_all(&bytes, MAX);
            prop_assert_eq!(&frames[..], &payloads[..frames.len()]);
        }
    }

    #[test]
    fn pieces_as_they_come_are_put_together(
        lengths in proptest::collection::vec(prop_oneof![1..50_usize, 5000..20_000_usize], 1..30),
        piece in 1..5000_usize,
    ) {
        let messages: Vec<_> = lengths.iter().enumerate().map(|(i, length)| Bytes::from(vec![i as u8; *length])).collect();
        let mut batch = FrameBatch::default();
        raft_frame::encode(&messages, &mut batch);
        let promised = batch.bytes();
        let bytes = written(batch);
        prop_assert_eq!(bytes.len(), promised);
        let (mut buffer, mut decoded) = (BytesMut::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            buffer.extend_from_slice(piece);
            while let Some(frame) = cut_frame(&mut buffer, 2 << 20).expect("a frame") {
                let (kind, body) = frame.split();
                prop_assert_eq!(kind, kind::MESSAGES);
                raft_frame::decode(body, &mut decoded).expect("messages");
            }
        }
        prop_assert_eq!(decoded, messages);
        prop_assert!(buffer.is_empty());
    }

    #[test]
    fn introductions_survive_the_way(
        from in any::<u64>(), to in any::<u64>(), cluster_id in any::<u64>(), sequence in any::<u64>(),
        (version, cluster_version) in (".{0,20}", ".{0,20}"), peer_urls in proptest::collection::vec(".{0,50}", 0..5),
    ) {
        let hello = Hello { purpose: 1, cluster_id, from, to, version, peer_urls, incarnation: 3, sequence, cluster_version };
        let bytes = crate::peer::frame::message_frame(&hello);
        let (frames, _) = read_all(&bytes, HANDSHAKE_BYTES_MAX);
        prop_assert_eq!(Hello::decode(frames[0].clone()).expect("a Hello"), hello);
    }

    #[test]
    fn urls_are_parsed_or_refused(text in "(http|https|unix|unixs|ftp)?(://)?[a-z0-9\\[\\]:/.@]{0,20}") {
        if let Ok(url) = text.parse::<PeerUrl>() {
            prop_assert_eq!(url.to_string().parse::<PeerUrl>(), Ok(url));
        }
    }
}

#[test]
fn a_big_message_goes_alone_and_small_ones_together() {
    let messages = [vec![1; 10], vec![2; 3 << 20], vec![3; 10], vec![4; 10]].map(Bytes::from);
    let mut batch = FrameBatch::default();
    raft_frame::encode(&messages, &mut batch);
    let (frames, _) = read_all(&written(batch), 16 << 20);
    let lengths: Vec<_> = frames.iter().map(Bytes::len).collect();
    assert_eq!(lengths, [15, 5 + (3 << 20), 29]);
    // So many tiny ones are several frames.
    let messages = vec![Bytes::from_static(b"x"); 20_000];
    let mut batch = FrameBatch::default();
    raft_frame::encode(&messages, &mut batch);
    assert_eq!(read_all(&written(batch), 16 << 20).0.len(), 3);
    // And more of them in one is not taken.
    let mut body = BytesMut::new();
    for _ in 0..9000 {
        body.put_u32_le(1);
        body.put_u8(0);
    }
    assert!(raft_frame::decode(body.freeze(), &mut Vec::new()).is_err());
    assert_eq!(HEADER_BYTES, 8);
}

#[test]
fn urls_as_etcd_writes_them() {
    for good in [
        "http://a:1",
        "https://[::1]:2380",
        "unix:///run/x.sock",
        "unixs://localhost:m1",
        "http://10.0.0.1:2380/",
    ] {
        assert!(good.parse::<PeerUrl>().is_ok(), "{good}");
    }
    for bad in [
        "",
        "a:1",
        "http://a",
        "http://:1",
        "http://a:70000",
        "http://::1:1",
        "http://a:1/x",
        "ftp://a:1",
        "unix://",
    ] {
        assert!(bad.parse::<PeerUrl>().is_err(), "{bad}");
    }
}
