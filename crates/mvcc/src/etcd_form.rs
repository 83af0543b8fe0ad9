//! Changes in the form in which etcd stores them: the revision as the key, an encoded `mvccpb.KeyValue` as the value.
//!
//! The revision is its number in 8 bytes, `_`, the place within it in 8 bytes, all big endian; and `t` for a deletion,
//! whose KeyValue has only the key.

use prost::encoding::{self, WireType};

use crate::keys::{Position, RecordRef};

/// The length of a revision, `t` aside.
const REVISION_BYTES: usize = 17;

/// Appends the key of a change.
pub(crate) fn put_revision(at: Position, tombstone: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(&at.main.to_be_bytes());
    out.push(b'_');
    out.extend_from_slice(&i64::from(at.sub).to_be_bytes());
    if tombstone {
        out.push(b't');
    }
}

/// The highest revision, version, or count of changes of users that is taken from a file. No store has come near it; a file
/// that was made to say more must not bring the numbers that follow to their end.
pub(crate) const NUMBER_MAX: i64 = i64::MAX / 2;

/// Reads the key of a change: when it happened, and whether it is a deletion.
pub(crate) fn revision(data: &[u8]) -> Option<(Position, bool)> {
    let (revision, tombstone) = data.split_at_checked(REVISION_BYTES)?;
    let tombstone = match tombstone {
        b"" => false,
        b"t" => true,
        _ => return None,
    };
    let main = i64::from_be_bytes(revision[..8].try_into().ok()?);
    let sub = i64::from_be_bytes(revision[9..].try_into().ok()?);
    let sub = u32::try_from(sub).ok()?;
    (revision[8] == b'_' && (0..=NUMBER_MAX).contains(&main)).then_some((Position { main, sub }, tombstone))
}

/// Appends what comes before the value's bytes.
pub(crate) fn put_head(key: &[u8], record: &RecordRef<'_>, out: &mut Vec<u8>) {
    encoding::encode_key(1, WireType::LengthDelimited, out);
    encoding::encode_varint(key.len() as u64, out);
    out.extend_from_slice(key);
    if record.tombstone {
        return;
    }
    for (tag, number) in [(2, record.create), (3, record.at.main), (4, record.version)] {
        put_number(tag, number, out);
    }
    if !record.value.is_empty() {
        encoding::encode_key(5, WireType::LengthDelimited, out);
        encoding::encode_varint(record.value.len() as u64, out);
    }
}

/// Appends what comes after the value's bytes.
pub(crate) fn put_tail(record: &RecordRef<'_>, out: &mut Vec<u8>) {
    if !record.tombstone {
        put_number(6, record.lease, out);
    }
}

/// Appends the whole value.
pub(crate) fn put_key_value(key: &[u8], record: &RecordRef<'_>, out: &mut Vec<u8>) {
    put_head(key, record, out);
    out.extend_from_slice(record.value);
    put_tail(record, out);
}

fn put_number(tag: u32, number: i64, out: &mut Vec<u8>) {
    if number != 0 {
        encoding::int64::encode(tag, &number, out);
    }
}

#[cfg(test)]
mod tests {
    use api::kv::KeyValue;
    use prost::Message;

    use super::*;

    #[test]
    fn a_change_reads_as_it_was_written() {
        let record = RecordRef {
            lease: -7,
            value: b"value",
            create: 3,
            version: 2,
            at: Position { main: 9, sub: 4 },
            ..RecordRef::decode(&[1, 9, 4]).unwrap()
        };
        let record = RecordRef {
            tombstone: false,
            ..record
        };
        let (mut at, mut value) = (Vec::new(), Vec::new());
        put_revision(record.at, false, &mut at);
        assert_eq!(revision(&at), Some((record.at, false)));
        at.push(b't');
        assert_eq!(revision(&at), Some((record.at, true)));
        at.push(b't');
        assert_eq!(revision(&at), None);
        put_key_value(b"key", &record, &mut value);
        let expected = KeyValue {
            key: "key".into(),
            create_revision: 3,
            mod_revision: 9,
            version: 2,
            value: "value".into(),
            lease: -7,
        };
        assert_eq!(value, expected.encode_to_vec());
    }
}
