//! What members ask each other beside Raft: questions that only the leader, or only another member, can answer.

use api::codec::MemberChange;
use api::kv::Member;
use api::{Error, LeaseId};
use bytes::Bytes;
use prost::Message;

/// A question.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Request {
    #[prost(oneof = "Ask", tags = "1, 2, 3, 4, 5")]
    pub(crate) ask: Option<Ask>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Ask {
    /// Who belongs to the cluster? Also from whoever wants to join.
    #[prost(message, tag = "1")]
    Members(Empty),
    /// Let a lease live on.
    #[prost(message, tag = "2")]
    KeepAlive(Lease),
    /// How long does a lease live on?
    #[prost(message, tag = "3")]
    TimeToLive(Lease),
    /// Change the members.
    #[prost(message, tag = "4")]
    ChangeMembers(MemberChange),
    /// What does your state come to?
    #[prost(message, tag = "5")]
    Digests(Empty),
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Empty {}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Lease {
    #[prost(int64, tag = "1")]
    pub(crate) id: LeaseId,
}

/// An answer.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Response {
    /// etcd's text of what went wrong; empty if nothing did.
    #[prost(string, tag = "1")]
    pub(crate) error: String,
    #[prost(oneof = "Answer", tags = "2, 3, 4")]
    pub(crate) answer: Option<Answer>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Answer {
    #[prost(message, tag = "2")]
    Members(Members),
    #[prost(message, tag = "3")]
    Lease(LeaseTime),
    #[prost(message, tag = "4")]
    Digests(Digests),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Members {
    #[prost(fixed64, tag = "1")]
    pub(crate) cluster_id: u64,
    #[prost(message, repeated, tag = "2")]
    pub(crate) members: Vec<Member>,
    /// The cluster version of the release that answers; empty from one that does not say it.
    #[prost(string, tag = "3")]
    pub(crate) cluster_version: String,
}

/// Seconds; -1 for a lease that does not exist.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct LeaseTime {
    #[prost(sint64, tag = "1")]
    pub(crate) granted: i64,
    #[prost(sint64, tag = "2")]
    pub(crate) left: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Digests {
    #[prost(message, repeated, tag = "1")]
    pub(crate) digests: Vec<DigestAt>,
}

/// See [`mvcc::machine::Digest`].
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct DigestAt {
    #[prost(uint64, tag = "1")]
    pub(crate) index: u64,
    #[prost(int64, tag = "2")]
    pub(crate) revision: i64,
    #[prost(fixed64, tag = "3")]
    pub(crate) digest: u64,
}

impl Ask {
    pub(crate) fn into_bytes(self) -> Bytes {
        Request { ask: Some(self) }.encode_to_vec().into()
    }
}

/// Encodes the answer to a question.
pub(crate) fn encode_answer(result: Result<Answer, Error>) -> Bytes {
    let response = match result {
        Ok(answer) => Response {
            answer: Some(answer),
            ..Default::default()
        },
        Err(error) => Response {
            error: error.message().to_owned(),
            ..Default::default()
        },
    };
    response.encode_to_vec().into()
}

/// Decodes an answer. An error that only a later release knows, and an answer that does not decode, say nothing that a
/// client could use: whatever was asked may have been done.
pub(crate) fn decode_answer(data: Bytes) -> Result<Answer, Error> {
    let response = Response::decode(data).map_err(|_| Error::Timeout)?;
    let known = |text: &str| Error::ALL.iter().copied().find(|error| error.message() == text);
    match response.answer {
        Some(answer) => Ok(answer),
        None => Err(known(&response.error).unwrap_or(Error::Timeout)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_and_errors_come_back() {
        let answer = Answer::Lease(LeaseTime { granted: 60, left: -1 });
        assert_eq!(decode_answer(encode_answer(Ok(answer.clone()))), Ok(answer));
        for &error in Error::ALL {
            assert_eq!(decode_answer(encode_answer(Err(error))), Err(error));
        }
        assert_eq!(decode_answer(Bytes::from_static(b"\xff")), Err(Error::Timeout));
    }
}
