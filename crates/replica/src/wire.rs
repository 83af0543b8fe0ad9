//! What members tell each other.
//!
//! Most of it is Raft's own messages. Beside them a follower hands what its clients want written to the leader, as
//! numbered batches: see [`crate::forward`].

use api::MemberId;
use bytes::Bytes;
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::Message;

/// A message between two members of a cluster.
#[derive(Debug, Clone, PartialEq)]
pub enum PeerMessage {
    /// One of Raft's.
    Raft(Box<Message>),
    /// Batches for the leader.
    Forward(Forward),
    /// Which batches the leader has.
    Accepted(Accepted),
}

/// Batches of operations on their way from a follower to the leader of a term.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Forward {
    /// The leader's term: in any other one nobody accepts them.
    #[prost(uint64, tag = "1")]
    pub term: u64,
    /// Which start of the sender numbered them.
    #[prost(fixed64, tag = "2")]
    pub incarnation: u64,
    /// The number of the first batch in this term that the sender has not given up.
    #[prost(uint64, tag = "3")]
    pub window: u64,
    /// The number of the first batch here; the others follow without gaps.
    #[prost(uint64, tag = "4")]
    pub first: u64,
    /// The batches.
    #[prost(message, repeated, tag = "5")]
    pub batches: Vec<ForwardBatch>,
}

/// Operations that go into the same log entry, encoded.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ForwardBatch {
    /// The operations.
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub operations: Vec<Bytes>,
}

/// Up to where the leader of a term has a follower's batches.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Accepted {
    /// The leader's term.
    #[prost(uint64, tag = "1")]
    pub term: u64,
    /// Which start of the follower numbered them.
    #[prost(fixed64, tag = "2")]
    pub incarnation: u64,
    /// The number of the last batch that the leader has, and all before it.
    #[prost(uint64, tag = "3")]
    pub last: u64,
}

/// Whose batches went into a log entry: the entry's Raft context.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Origins {
    #[prost(message, repeated, tag = "1")]
    pub(crate) origins: Vec<Origin>,
}

#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct Origin {
    #[prost(fixed64, tag = "1")]
    pub(crate) member: MemberId,
    #[prost(fixed64, tag = "2")]
    pub(crate) incarnation: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) batch: u64,
}

const RAFT: u8 = 0;
const FORWARD: u8 = 1;
const ACCEPTED: u8 = 2;

/// Why a message of a peer cannot be read. Its connection is to be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a message of a peer does not decode: {0}")]
pub struct WireError(String);

impl PeerMessage {
    /// Encodes the message: a byte that says which kind it is, then protobuf.
    pub fn encode(&self) -> Bytes {
        let mut out;
        match self {
            PeerMessage::Raft(message) => {
                out = Vec::with_capacity(1 + message.compute_size() as usize);
                out.push(RAFT);
                message.write_to_vec(&mut out).expect("a Vec grows");
            }
            PeerMessage::Forward(forward) => {
                out = Vec::with_capacity(1 + forward.encoded_len());
                out.push(FORWARD);
                forward.encode(&mut out).expect("a Vec grows");
            }
            PeerMessage::Accepted(accepted) => {
                out = vec![ACCEPTED];
                accepted.encode(&mut out).expect("a Vec grows");
            }
        }
        out.into()
    }

    /// Decodes what [`PeerMessage::encode`] made. The frame it came in must be of bounded size and from a member that
    /// proved who it is: protobuf 2 reads nested messages without a limit (RUSTSEC-2024-0437).
    ///
    /// # Errors
    /// Unknown kinds, and what does not decode.
    pub fn decode(mut data: Bytes) -> Result<Self, WireError> {
        let wrong = |error: &dyn std::fmt::Display| WireError(error.to_string());
        if data.is_empty() {
            return Err(wrong(&"it is empty"));
        }
        let kind = data.split_to(1)[0];
        Ok(match kind {
            RAFT => {
                // Entries are slices of the frame, not copies.
                let message = Message::parse_from_carllerche_bytes(&data).map_err(|error| wrong(&error))?;
                PeerMessage::Raft(Box::new(message))
            }
            FORWARD => PeerMessage::Forward(Forward::decode(data).map_err(|error| wrong(&error))?),
            ACCEPTED => PeerMessage::Accepted(Accepted::decode(data).map_err(|error| wrong(&error))?),
            other => return Err(wrong(&format!("unknown kind {other}"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use raft::eraftpb::{Entry, MessageType};

    #[test]
    fn messages_come_back_as_they_were() {
        let mut message = Message {
            from: 1,
            to: 2,
            term: 3,
            ..Default::default()
        };
        message.set_msg_type(MessageType::MsgAppend);
        message.mut_entries().push(Entry {
            index: 7,
            data: "some data".into(),
            ..Default::default()
        });
        let messages = [
            PeerMessage::Raft(Box::new(message)),
            PeerMessage::Forward(Forward {
                term: 3,
                incarnation: 9,
                window: 4,
                first: 5,
                batches: vec![ForwardBatch {
                    operations: vec!["a".into(), "b".into()],
                }],
            }),
            PeerMessage::Accepted(Accepted {
                term: 3,
                incarnation: 9,
                last: 5,
            }),
        ];
        for message in messages {
            assert_eq!(PeerMessage::decode(message.encode()), Ok(message));
        }
    }

    proptest! {
        #[test]
        fn garbage_is_an_error(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = PeerMessage::decode(data.into());
        }
    }
}
