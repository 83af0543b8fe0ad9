//! Looks into replies without decoding them: a load generator needs a count or a revision, not the thousand values of a
//! page or the keys of every event.

use bytes::{Bytes, BytesMut};

use crate::net::channel::Answer;
use crate::net::failure::{Failure, Kind};
use crate::values::ValueKind;

/// One field of a protobuf message.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// A fixed-width number, of which etcd's API has none.
    Other,
}

/// The fields of a message, in their order. Damage ends the walk: what is missing shows as a count too low.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for (index, byte) in self.0.iter().enumerate().take(10) {
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                self.0 = &self.0[index + 1..];
                return Some(value);
            }
        }
        None
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, Field<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let tag = self.varint()?;
        let take = |this: &mut Self, length: usize| {
            let (field, rest) = this.0.split_at_checked(length)?;
            this.0 = rest;
            Some(field)
        };
        let field = match tag & 7 {
            0 => Field::Number(self.varint()?),
            1 => take(self, 8).map(|_| Field::Other)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Field::Bytes(take(self, length)?)
            }
            5 => take(self, 4).map(|_| Field::Other)?,
            _ => return None,
        };
        Some((tag >> 3, field))
    }
}

/// The revision that a reply's header has.
fn revision_of_header(header: &[u8]) -> i64 {
    Fields(header)
        .find_map(|field| match field {
            (3, Field::Number(revision)) => Some(revision as i64),
            _ => None,
        })
        .unwrap_or(0)
}

/// What a load generator wants to know of a range's answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RangeSummary {
    pub(crate) revision: i64,
    /// Keys in this answer.
    pub(crate) keys: u64,
    pub(crate) last_key: Bytes,
    /// Mod revision of the last key.
    pub(crate) last_mod_revision: i64,
    pub(crate) more: bool,
    /// Keys in the range, as the server counts them.
    pub(crate) count: u64,
}

/// Bytes before a gRPC message.
const PREFIX_BYTES: usize = 5;

/// Sums up a `RangeResponse` while it comes in, without ever putting it together: a list may have megabytes.
#[derive(Debug, Default)]
pub(crate) struct RangeScan {
    summary: RangeSummary,
    /// The last of the `kvs`, somewhere in what came.
    last: Bytes,
    /// What came of gRPC's prefix, or of a field that is not whole yet.
    partial: BytesMut,
    /// What is left of the message; none before its prefix is here.
    left: Option<usize>,
}

impl RangeScan {
    /// The sum of a whole message.
    pub(crate) fn finish(mut self) -> Result<RangeSummary, Failure> {
        if self.left != Some(0) || !self.partial.is_empty() {
            return Err(Failure::new(Kind::Protocol, "the answer holds no whole message"));
        }
        for field in Fields(&self.last) {
            match field {
                (1, Field::Bytes(key)) => self.summary.last_key = self.last.slice_ref(key),
                (3, Field::Number(revision)) => self.summary.last_mod_revision = revision as i64,
                _ => {}
            }
        }
        Ok(self.summary)
    }

    fn field(summary: &mut RangeSummary, field: (u64, Field<'_>)) {
        match field {
            (1, Field::Bytes(header)) => summary.revision = revision_of_header(header),
            (2, Field::Bytes(_)) => summary.keys += 1,
            (3, Field::Number(more)) => summary.more = more != 0,
            (4, Field::Number(count)) => summary.count = count,
            _ => {}
        }
    }

    /// Takes whole fields; returns what is left. Notes the last key.
    fn fields(&mut self, piece: &Bytes) -> Bytes {
        let mut fields = Fields(piece);
        let mut last: &[u8] = &[];
        loop {
            let before = fields.0;
            let Some(field) = fields.next() else {
                if !last.is_empty() {
                    self.last = piece.slice_ref(last);
                }
                return if before.is_empty() {
                    Bytes::new()
                } else {
                    piece.slice_ref(before)
                };
            };
            if let (2, Field::Bytes(kv)) = field {
                last = kv;
            }
            Self::field(&mut self.summary, field);
        }
    }
}

/// How many more bytes a field needs that begins like this: one, as long as not even that can be told.
fn missing(partial: &[u8]) -> usize {
    let mut fields = Fields(partial);
    let (Some(tag), Some(length)) = (fields.varint(), fields.varint()) else {
        return 1;
    };
    match tag & 7 {
        2 => usize::try_from(length)
            .unwrap_or(usize::MAX)
            .saturating_sub(fields.0.len())
            .max(1),
        _ => 1,
    }
}

impl Answer for RangeScan {
    fn take(&mut self, mut chunk: Bytes) -> Result<(), Failure> {
        while self.left.is_none() && !chunk.is_empty() {
            let some = chunk.split_to(chunk.len().min(PREFIX_BYTES - self.partial.len()));
            self.partial.extend_from_slice(&some);
            if let [flag, length @ ..] = &self.partial[..]
                && let Ok(length) = <[u8; 4]>::try_from(length)
            {
                if *flag != 0 {
                    let what = "a compressed message, which was not asked for";
                    return Err(Failure::new(Kind::Protocol, what));
                }
                self.left = Some(u32::from_be_bytes(length) as usize);
                self.partial.clear();
            }
        }
        let Some(left) = &mut self.left else { return Ok(()) };
        let Some(rest) = left.checked_sub(chunk.len()) else {
            return Err(Failure::new(Kind::Protocol, "more than one message in an answer"));
        };
        *left = rest;
        while !self.partial.is_empty() && !chunk.is_empty() {
            let some = chunk.split_to(chunk.len().min(missing(&self.partial)));
            self.partial.extend_from_slice(&some);
            let field = self.partial.split().freeze();
            let rest = self.fields(&field);
            self.partial.extend_from_slice(&rest);
        }
        let rest = self.fields(&chunk);
        self.partial.extend_from_slice(&rest);
        Ok(())
    }
}

/// What a load generator wants to know of a message of a watch stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct WatchSummary {
    pub(crate) revision: i64,
    pub(crate) watch_id: i64,
    pub(crate) created: bool,
    pub(crate) canceled: bool,
    pub(crate) cancel_reason: String,
    pub(crate) events: u64,
    /// Mod revision of the last event; 0 without events. The header's may be ahead of it.
    pub(crate) last_mod_revision: i64,
}

/// Sums up a `WatchResponse`; `stamp` is called with the stamp of each event, none for one that holds no value.
pub(crate) fn watch(message: &[u8], kind: ValueKind, mut stamp: impl FnMut(Option<u64>)) -> WatchSummary {
    let mut summary = WatchSummary::default();
    for field in Fields(message) {
        match field {
            (1, Field::Bytes(header)) => summary.revision = revision_of_header(header),
            (2, Field::Number(id)) => summary.watch_id = id as i64,
            (3, Field::Number(created)) => summary.created = created != 0,
            (4, Field::Number(canceled)) => summary.canceled = canceled != 0,
            (6, Field::Bytes(reason)) => summary.cancel_reason = String::from_utf8_lossy(reason).into_owned(),
            (11, Field::Bytes(event)) => {
                summary.events += 1;
                let (revision, value) = event_of(event);
                summary.last_mod_revision = revision;
                stamp(value.and_then(|value| kind.stamp_of(value)));
            }
            _ => {}
        }
    }
    summary
}

/// The mod revision and the value of an event's key.
fn event_of(event: &[u8]) -> (i64, Option<&[u8]>) {
    let (mut revision, mut value) = (0, None);
    for field in Fields(event) {
        if let (2, Field::Bytes(kv)) = field {
            for field in Fields(kv) {
                match field {
                    (3, Field::Number(number)) => revision = number as i64,
                    (5, Field::Bytes(bytes)) => value = Some(bytes),
                    _ => {}
                }
            }
            break;
        }
    }
    (revision, value)
}

#[cfg(test)]
mod tests {
    use api::kv::{Event, KeyValue, RangeResponse, ResponseHeader};
    use prost::Message;

    use super::*;

    /// What a watch stream brings, for once as a whole.
    #[derive(Clone, PartialEq, Eq, prost::Message)]
    struct WatchResponse {
        #[prost(message, optional, tag = "1")]
        header: Option<ResponseHeader>,
        #[prost(int64, tag = "2")]
        watch_id: i64,
        #[prost(bool, tag = "3")]
        created: bool,
        #[prost(bool, tag = "4")]
        canceled: bool,
        #[prost(string, tag = "6")]
        cancel_reason: String,
        #[prost(message, repeated, tag = "11")]
        events: Vec<Event>,
    }

    fn kv(key: &'static str, mod_revision: i64, value: &'static str) -> KeyValue {
        KeyValue {
            key: key.into(),
            mod_revision,
            value: value.into(),
            ..Default::default()
        }
    }

    /// Sums up an answer that comes in pieces of some size.
    fn range(framed: &[u8], piece: usize) -> Result<RangeSummary, Failure> {
        let mut scan = RangeScan::default();
        for chunk in framed.chunks(piece) {
            scan.take(Bytes::copy_from_slice(chunk))?;
        }
        scan.finish()
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        let mut framed = vec![0];
        framed.extend_from_slice(&(message.len() as u32).to_be_bytes());
        framed.extend_from_slice(message);
        framed
    }

    #[test]
    fn sums_up_a_range_whatever_pieces_it_comes_in() {
        let long: &'static str = Box::leak("long".repeat(80).into_boxed_str());
        let reply = RangeResponse {
            header: ResponseHeader::at(77),
            kvs: vec![kv("a", 5, "x"), kv(long, 6, long), kv("b", 300, "y")],
            more: true,
            count: 900,
        };
        let answer = framed(&reply.encode_to_vec());
        for piece in 1..=answer.len() {
            assert_eq!(
                range(&answer, piece),
                Ok(RangeSummary {
                    revision: 77,
                    keys: 3,
                    last_key: "b".into(),
                    last_mod_revision: 300,
                    more: true,
                    count: 900,
                }),
                "in pieces of {piece}"
            );
            assert!(range(&answer[..answer.len() - 1], piece).is_err());
            assert!(range(&[&answer[..], b"x"].concat(), piece).is_err());
        }
        let empty = range(&framed(&[]), 5);
        assert_eq!(empty, Ok(RangeSummary::default()));
    }

    #[test]
    fn sums_up_events() {
        let event = |kv| Event {
            kv: Some(kv),
            ..Default::default()
        };
        let reply = WatchResponse {
            header: ResponseHeader::at(8),
            watch_id: 4,
            canceled: true,
            cancel_reason: "why".to_owned(),
            events: vec![event(kv("a", 7, "00000000000000ffrest")), event(kv("a", 8, ""))],
            ..Default::default()
        };
        let mut stamps = Vec::new();
        let summary = watch(&reply.encode_to_vec(), ValueKind::Random, |stamp| stamps.push(stamp));
        assert_eq!(stamps, [Some(255), None]);
        assert_eq!((summary.revision, summary.watch_id, summary.events), (8, 4, 2));
        assert_eq!(summary.last_mod_revision, 8);
        assert!(summary.canceled && !summary.created && summary.cancel_reason == "why");
    }

    #[test]
    fn damage_does_not_panic() {
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..10_000 {
            let noise: Vec<u8> = (0..rng.usize(..40)).map(|_| rng.u8(..)).collect();
            watch(&noise, ValueKind::Random, |_| ());
            let piece = rng.usize(1..9);
            let _ = range(&framed(&noise), piece);
            let _ = range(&noise, piece);
        }
    }
}
