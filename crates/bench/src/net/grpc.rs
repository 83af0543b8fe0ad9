//! gRPC's framing: one byte of flags and four of length before every message; the outcome in the trailers.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use super::failure::{Failure, Kind};

/// Bytes before every message.
const PREFIX_BYTES: usize = 5;

/// The calls that the load generator makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is etcd's method of that name")]
pub(crate) enum Method {
    Put,
    Range,
    DeleteRange,
    Txn,
    Watch,
    LeaseGrant,
    LeaseRevoke,
    LeaseKeepAlive,
    Authenticate,
}

impl Method {
    /// Every method, in the order of the enumeration.
    pub(crate) const ALL: [Method; 9] = [
        Method::Put,
        Method::Range,
        Method::DeleteRange,
        Method::Txn,
        Method::Watch,
        Method::LeaseGrant,
        Method::LeaseRevoke,
        Method::LeaseKeepAlive,
        Method::Authenticate,
    ];

    /// The path that an HTTP/2 request names it by.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Method::Put => "/etcdserverpb.KV/Put",
            Method::Range => "/etcdserverpb.KV/Range",
            Method::DeleteRange => "/etcdserverpb.KV/DeleteRange",
            Method::Txn => "/etcdserverpb.KV/Txn",
            Method::Watch => "/etcdserverpb.Watch/Watch",
            Method::LeaseGrant => "/etcdserverpb.Lease/LeaseGrant",
            Method::LeaseRevoke => "/etcdserverpb.Lease/LeaseRevoke",
            Method::LeaseKeepAlive => "/etcdserverpb.Lease/LeaseKeepAlive",
            Method::Authenticate => "/etcdserverpb.Auth/Authenticate",
        }
    }
}

/// Encodes a message with its prefix. `arena` is scratch memory, used again once earlier frames are sent and dropped.
pub(crate) fn frame(message: &impl Message, arena: &mut BytesMut) -> Bytes {
    let length = message.encoded_len();
    arena.reserve(PREFIX_BYTES + length);
    arena.put_u8(0);
    arena.put_u32(u32::try_from(length).expect("requests are far below 4 GiB"));
    message.encode_raw(arena);
    arena.split().freeze()
}

/// Cuts a stream of bytes into messages. Holds no more than one unfinished message and what came with its end.
#[derive(Debug, Default)]
pub(crate) struct Deframer {
    /// The start of an unfinished message, if it came in pieces.
    partial: BytesMut,
    /// Bytes that came in one piece, not looked at yet.
    whole: Bytes,
}

impl Deframer {
    /// Takes the next bytes. All messages of the previous ones must have been taken out.
    pub(crate) fn push(&mut self, chunk: Bytes) {
        if self.partial.is_empty() && self.whole.is_empty() {
            self.whole = chunk;
        } else {
            if self.partial.is_empty() {
                self.partial.extend_from_slice(&self.whole);
                self.whole.clear();
            }
            self.partial.extend_from_slice(&chunk);
        }
    }

    /// The next whole message; none until more bytes come.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        let ready = if self.partial.is_empty() {
            &self.whole[..]
        } else {
            &self.partial[..]
        };
        let Some((prefix, rest)) = ready.split_at_checked(PREFIX_BYTES) else {
            return Ok(None);
        };
        if prefix[0] != 0 {
            return Err(Failure::new(
                Kind::Protocol,
                "a compressed message, which was not asked for",
            ));
        }
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if rest.len() < length {
            return Ok(None);
        }
        Ok(Some(if self.partial.is_empty() {
            self.whole.advance(PREFIX_BYTES);
            self.whole.split_to(length)
        } else {
            self.partial.advance(PREFIX_BYTES);
            self.partial.split_to(length).freeze()
        }))
    }
}

/// What the trailers `grpc-status` and `grpc-message` say: success, or the server's code and message, which is
/// percent-encoded (gRPC over HTTP/2, Responses).
pub(crate) fn outcome(status: Option<&[u8]>, message: &[u8]) -> Result<(), Failure> {
    match status {
        None => Err(Failure::new(Kind::Protocol, "the answer ended without grpc-status")),
        Some(b"0") => Ok(()),
        Some(digits) => {
            let code = std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok());
            Err(match code {
                Some(code) => Failure::new(
                    Kind::Status(code),
                    percent_encoding::percent_decode(message).decode_utf8_lossy(),
                ),
                None => Failure::new(Kind::Protocol, "grpc-status is not a number"),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use api::kv::PutRequest;

    use super::*;

    fn framed(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn frames_are_read_back() {
        let put = PutRequest {
            key: "k".into(),
            ..Default::default()
        };
        let mut deframer = Deframer::default();
        deframer.push(frame(&put, &mut BytesMut::new()));
        let message = deframer.next().unwrap().unwrap();
        assert_eq!(PutRequest::decode(message).unwrap(), put);
        assert_eq!(deframer.next().unwrap(), None);
    }

    #[test]
    fn messages_survive_any_cut() {
        let messages: [&[u8]; 4] = [b"one", b"", b"three", &[7; 300]];
        let stream: Vec<u8> = messages.iter().flat_map(|message| framed(message)).collect();
        for piece in 1..stream.len() {
            let mut deframer = Deframer::default();
            let mut found = Vec::new();
            for chunk in stream.chunks(piece) {
                deframer.push(Bytes::copy_from_slice(chunk));
                while let Some(message) = deframer.next().unwrap() {
                    found.push(message);
                }
            }
            assert_eq!(found, messages, "in pieces of {piece}");
        }
    }

    #[test]
    fn outcomes() {
        assert_eq!(outcome(Some(b"0"), b""), Ok(()));
        let failure = outcome(Some(b"14"), b"no leader").unwrap_err();
        assert_eq!(failure.to_string(), "Unavailable: no leader");
        assert_eq!(outcome(None, b"").unwrap_err().kind, Kind::Protocol);
        assert_eq!(outcome(Some(b"x"), b"").unwrap_err().kind, Kind::Protocol);
    }
}
