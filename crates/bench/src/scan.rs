//! Looks into replies without decoding them: a load generator needs a count or a revision, not the thousand values of a
//! page or the keys of every event.

use bytes::Bytes;

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
}

/// Sums up a `RangeResponse`.
pub(crate) fn range(message: &Bytes) -> RangeSummary {
    let mut summary = RangeSummary::default();
    let mut last: &[u8] = &[];
    for field in Fields(message) {
        match field {
            (1, Field::Bytes(header)) => summary.revision = revision_of_header(header),
            (2, Field::Bytes(kv)) => {
                summary.keys += 1;
                last = kv;
            }
            (3, Field::Number(more)) => summary.more = more != 0,
            _ => {}
        }
    }
    for field in Fields(last) {
        match field {
            (1, Field::Bytes(key)) => summary.last_key = message.slice_ref(key),
            (3, Field::Number(revision)) => summary.last_mod_revision = revision as i64,
            _ => {}
        }
    }
    summary
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

    #[test]
    fn sums_up_a_range() {
        let reply = RangeResponse {
            header: ResponseHeader::at(77),
            kvs: vec![kv("a", 5, "x"), kv("b", 300, "y")],
            more: true,
            count: 9,
        };
        let summary = range(&reply.encode_to_vec().into());
        assert_eq!(
            summary,
            RangeSummary {
                revision: 77,
                keys: 2,
                last_key: "b".into(),
                last_mod_revision: 300,
                more: true
            }
        );
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
            range(&noise.into());
        }
    }
}
