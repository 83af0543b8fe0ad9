//! Every family, key prefix and record format on disk: the one place to look.
//!
//! | Family | Key | Value |
//! |---|---|---|
//! | [`CUR`] | user key | [`Record`]: the newest value, or a tombstone until compaction passes it |
//! | [`REV`] | `l`, position | user key and [`Record`]: the log of all changes since the last compaction |
//! | [`REV`] | `k`, position of the successor | user key and [`Record`]: a change that compaction passed but a later change still points to |
//! | [`REV`] | `t`, position | user key: finds the tombstones that compaction may drop |
//! | [`LEASE`] | `l`, lease id | [`LeaseRecord`] |
//! | [`LEASE`] | `a`, lease id, user key | nothing: the key is attached to the lease |
//! | [`AUTH`] | `u`, user name | [`User`]: etcd's `authpb.User` |
//! | [`AUTH`] | `r`, role name | [`Role`]: etcd's `authpb.Role` |
//! | [`AUTH`] | `authEnabled` | 1 if auth is on, else 0, one byte; absent as long as it was never on |
//! | [`AUTH`] | `authRevision` | the auth revision, 8 bytes big endian; absent as long as it is 1 |
//! | [`META`] | `state` | [`StateRecord`] |
//! | [`META`] | `membership` | [`crate::Membership`] |
//! | [`META`] | `alarms` | [`AlarmsRecord`] |
//! | [`META`] | `downgrade` | [`api::codec::DowngradeInfo`] |
//! | [`META`] | `sizes` | [`SizesRecord`] |
//! | [`META`] | `compacted` | the revision up to which physical compaction is done, 8 bytes big endian |
//!
//! A position is (revision, sub): the sub-th change within a revision, big endian, so that keys sort in order of time.
//! Records point back to the position of the key's previous change; reading the past walks these pointers.

use api::auth::FIRST_AUTH_REVISION;
pub use api::auth::{Role, User};
use api::kv::{AlarmMember, KeyValue};
use bytes::Bytes;
use storage::{Access, EngineError, Family, FamilySpec};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Newest records by user key.
pub const CUR: Family = Family(0);
/// The log of changes.
pub const REV: Family = Family(1);
/// Leases and what is attached to them.
pub const LEASE: Family = Family(2);
/// Users and roles.
pub const AUTH: Family = Family(3);
/// The state machine's own numbers.
pub const META: Family = Family(4);

/// The families to open an engine with, in the order of the constants above.
pub const FAMILIES: &[FamilySpec] = &[
    FamilySpec {
        name: "cur",
        access: Access::Point,
    },
    FamilySpec {
        name: "rev",
        access: Access::Sequential,
    },
    FamilySpec {
        name: "lease",
        access: Access::Point,
    },
    FamilySpec {
        name: "auth",
        access: Access::Point,
    },
    FamilySpec {
        name: "meta",
        access: Access::Point,
    },
];

/// The key of [`StateRecord`] in [`META`].
pub const STATE: &[u8] = b"state";
/// The key of [`crate::Membership`] in [`META`].
pub const MEMBERSHIP: &[u8] = b"membership";
/// The key of [`AlarmsRecord`] in [`META`].
pub const ALARMS: &[u8] = b"alarms";
/// The key of [`api::codec::DowngradeInfo`] in [`META`].
pub const DOWNGRADE: &[u8] = b"downgrade";
/// The key of [`SizesRecord`] in [`META`].
pub const SIZES: &[u8] = b"sizes";
/// The key in [`META`] of the revision up to which physical compaction is done.
pub const COMPACTED: &[u8] = b"compacted";

/// The key in [`AUTH`] of whether auth is on; etcd's name for it, and etcd's value.
pub const AUTH_ENABLED: &[u8] = b"authEnabled";
/// The key in [`AUTH`] of the auth revision; etcd's name for it, and etcd's value.
pub const AUTH_REVISION: &[u8] = b"authRevision";

const USER: u8 = b'u';
const ROLE: u8 = b'r';
const LOG: u8 = b'l';
const KEPT: u8 = b'k';
const TOMBSTONE: u8 = b't';
const LEASE_RECORD: u8 = b'l';
const ATTACHED: u8 = b'a';

/// When a change happened: the `sub`-th one (from 0) of revision `main`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    /// The revision.
    pub main: i64,
    /// Which change of it.
    pub sub: u32,
}

impl Position {
    /// The first position of a revision.
    pub fn start_of(main: i64) -> Self {
        Position { main, sub: 0 }
    }
}

/// The length of every [`REV`] key.
pub const REV_KEY_LEN: usize = 13;

fn rev_key(prefix: u8, at: Position) -> [u8; REV_KEY_LEN] {
    let mut key = [0; REV_KEY_LEN];
    key[0] = prefix;
    key[1..9].copy_from_slice(&at.main.to_be_bytes());
    key[9..].copy_from_slice(&at.sub.to_be_bytes());
    key
}

/// Where the log holds the change at `at`.
pub fn log_key(at: Position) -> [u8; REV_KEY_LEN] {
    rev_key(LOG, at)
}

/// The range of the log before a revision: start and end.
pub fn log_before(main: i64) -> ([u8; REV_KEY_LEN], [u8; REV_KEY_LEN]) {
    (log_key(Position::default()), log_key(Position::start_of(main.max(0))))
}

/// Where the change that precedes the one at `successor` is kept once compaction passed it.
pub fn kept_key(successor: Position) -> [u8; REV_KEY_LEN] {
    rev_key(KEPT, successor)
}

/// Where the tombstone made at `at` is listed.
pub fn tombstone_key(at: Position) -> [u8; REV_KEY_LEN] {
    rev_key(TOMBSTONE, at)
}

/// The position in a [`REV`] key.
pub fn position_of(key: &[u8]) -> Result<Position, EngineError> {
    let damaged = || corrupt("rev", "a key of the wrong length");
    let main = key
        .get(1..9)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(damaged)?;
    let sub = key
        .get(9..)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(damaged)?;
    Ok(Position {
        main: i64::from_be_bytes(main),
        sub: u32::from_be_bytes(sub),
    })
}

/// A lease id so that ids sort as numbers, negative ones (which etcd accepts from clients) first.
fn lease_bytes(id: i64) -> [u8; 8] {
    (id as u64 ^ 1 << 63).to_be_bytes()
}

fn lease_family_key(prefix: u8, id: i64) -> [u8; 9] {
    let mut key = [prefix; 9];
    key[1..].copy_from_slice(&lease_bytes(id));
    key
}

/// Where a lease is recorded.
pub fn lease_key(id: i64) -> [u8; 9] {
    lease_family_key(LEASE_RECORD, id)
}

/// The range of all lease records: start and end.
pub fn lease_range() -> ([u8; 1], [u8; 1]) {
    ([LEASE_RECORD], [LEASE_RECORD + 1])
}

/// The lease id in a key made by [`lease_key`].
pub fn lease_id_of(key: &[u8]) -> Result<i64, EngineError> {
    let id = key.get(1..9).and_then(|bytes| bytes.try_into().ok());
    let id = id
        .map(u64::from_be_bytes)
        .ok_or_else(|| corrupt("lease", "a key of the wrong length"))?;
    Ok((id ^ 1 << 63) as i64)
}

/// Where the attachment of `key` to a lease is recorded.
pub fn attached_key(id: i64, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(9 + key.len());
    out.extend_from_slice(&lease_family_key(ATTACHED, id));
    out.extend_from_slice(key);
    out
}

/// The range of all attachments to a lease: start and end. The user key follows the 9 bytes of the start.
pub fn attached_range(id: i64) -> ([u8; 9], [u8; 9]) {
    let start = lease_family_key(ATTACHED, id);
    let end = match id.checked_add(1) {
        Some(next) => lease_family_key(ATTACHED, next),
        None => [ATTACHED + 1; 9],
    };
    (start, end)
}

/// Where a user is recorded.
pub fn user_key(name: &[u8]) -> Vec<u8> {
    [&[USER], name].concat()
}

/// The range of all users: start and end. The name follows the one byte of the start.
pub fn user_range() -> ([u8; 1], [u8; 1]) {
    ([USER], [USER + 1])
}

/// Where a role is recorded.
pub fn role_key(name: &[u8]) -> Vec<u8> {
    [&[ROLE], name].concat()
}

/// The range of all roles: start and end. The name follows the one byte of the start.
pub fn role_range() -> ([u8; 1], [u8; 1]) {
    ([ROLE], [ROLE + 1])
}

/// The value of [`AUTH_ENABLED`].
pub fn encode_auth_enabled(enabled: bool) -> [u8; 1] {
    [u8::from(enabled)]
}

/// Reads the value of [`AUTH_ENABLED`], if there is one.
pub fn decode_auth_enabled(value: Option<&[u8]>) -> bool {
    value == Some(&[1])
}

/// The value of [`AUTH_REVISION`].
pub fn encode_auth_revision(revision: u64) -> [u8; 8] {
    revision.to_be_bytes()
}

/// Reads the value of [`AUTH_REVISION`], if there is one.
pub fn decode_auth_revision(value: Option<&[u8]>) -> Result<u64, EngineError> {
    let Some(value) = value else {
        return Ok(FIRST_AUTH_REVISION);
    };
    let bytes = value
        .try_into()
        .map_err(|_| corrupt("auth", "a revision of the wrong length"))?;
    Ok(u64::from_be_bytes(bytes))
}

/// What a record in [`AUTH`] adds to the state's digest, see [`StateRecord::digest`].
pub fn auth_digest(key: &[u8], value: &[u8]) -> u64 {
    // Another seed than that of any record of a key, so that the two kinds cannot be taken for each other.
    const SEED: u64 = u64::from_be_bytes(*b"authauth");
    xxh3_64_with_seed(value, xxh3_64_with_seed(key, SEED))
}

/// The error for what the engine holds but we never wrote.
pub(crate) fn corrupt(place: &str, cause: impl ToString) -> EngineError {
    EngineError::Corrupt {
        place: format!("family {place}"),
        cause: cause.to_string(),
    }
}

/// One value of a key, or its tombstone.
///
/// On disk: a byte of flags; position; create revision and version unless a tombstone; the lease if any; if there is a
/// previous position: that, the depth, and the anchors (as many as the depth says), all as LEB128 varints; 8 bytes of
/// digest (little endian) unless a tombstone; the value.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// When it was written.
    pub at: Position,
    /// When the key's previous value or tombstone was written.
    pub prev: Option<Position>,
    /// How many records can be reached over `prev`. It says where the anchors are, and starts again at 0 where
    /// compaction has cut the chain.
    pub depth: u64,
    /// Short cuts into the past, so that reading it costs the logarithm of how far it lies back: for each power of
    /// [`ANCHOR_STRIDE`], the nearest earlier record whose depth is a multiple of it. The first is the nearest. What
    /// they point to may be compacted away; only what is newer than the revision looked for is followed.
    pub anchors: Vec<Position>,
    /// Whether this says that the key was deleted.
    pub tombstone: bool,
    /// The revision that created the key; 0 for a tombstone.
    pub create: i64,
    /// Writes since then, this one included; 0 for a tombstone.
    pub version: i64,
    /// The lease; 0 for none.
    pub lease: i64,
    /// A hash of the key and all that is visible of the record, so that a replacement can subtract it from the state's
    /// sum without reading the value; 0 for a tombstone.
    pub digest: u64,
    /// The value; empty for a tombstone.
    pub value: Bytes,
}

/// See [`Record::anchors`].
pub const ANCHOR_STRIDE: u64 = 16;
/// How many powers of the stride have an anchor: the farthest ones lie a million changes apart.
const ANCHORS_MAX: usize = 5;

/// How many anchors a record of this depth has: one for each power of the stride that an earlier depth is a multiple of,
/// other than 0.
fn anchors_at(depth: u64) -> usize {
    let (mut count, mut stride) = (0, ANCHOR_STRIDE);
    while count < ANCHORS_MAX && depth > stride {
        count += 1;
        stride *= ANCHOR_STRIDE;
    }
    count
}

const FLAG_TOMBSTONE: u8 = 1;
const FLAG_LEASE: u8 = 2;
const FLAG_PREV: u8 = 4;

impl Record {
    /// Appends the encoding to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut flags = 0;
        if self.tombstone {
            flags |= FLAG_TOMBSTONE;
        }
        if self.lease != 0 {
            flags |= FLAG_LEASE;
        }
        if self.prev.is_some() {
            flags |= FLAG_PREV;
        }
        out.push(flags);
        put_position(out, self.at);
        if !self.tombstone {
            put_varint(out, self.create as u64);
            put_varint(out, self.version as u64);
        }
        if self.lease != 0 {
            put_varint(out, self.lease as u64);
        }
        if let Some(prev) = self.prev {
            put_position(out, prev);
            put_varint(out, self.depth);
            assert_eq!(
                self.anchors.len(),
                anchors_at(self.depth),
                "the depth says how many anchors there are"
            );
            for anchor in &self.anchors {
                put_position(out, *anchor);
            }
        }
        if !self.tombstone {
            out.extend_from_slice(&self.digest.to_le_bytes());
            out.extend_from_slice(&self.value);
        }
    }

    /// Reads an encoding; the value is a slice of `data`.
    pub fn decode(data: &Bytes) -> Result<Self, EngineError> {
        let record = RecordRef::decode(data)?;
        let value = if record.tombstone {
            Bytes::new()
        } else {
            data.slice(data.len() - record.value.len()..)
        };
        Ok(record.to_record(value))
    }

    /// The depth and the anchors of the record that follows this one.
    pub fn successor_links(&self) -> (u64, Vec<Position>) {
        let depth = self.depth + 1;
        let mut anchors = Vec::with_capacity(anchors_at(depth));
        let mut stride = ANCHOR_STRIDE;
        for level in 0..anchors_at(depth) {
            let here = self.depth.is_multiple_of(stride);
            anchors.push(if here { self.at } else { self.anchors[level] });
            stride *= ANCHOR_STRIDE;
        }
        (depth, anchors)
    }

    /// The digest of a live record, from everything that clients can see of it.
    pub fn digest_of(key: &[u8], at: Position, create: i64, version: i64, lease: i64, value: &[u8]) -> u64 {
        let mut numbers = [0; 36];
        numbers[..8].copy_from_slice(&at.main.to_le_bytes());
        numbers[8..12].copy_from_slice(&at.sub.to_le_bytes());
        numbers[12..20].copy_from_slice(&create.to_le_bytes());
        numbers[20..28].copy_from_slice(&version.to_le_bytes());
        numbers[28..].copy_from_slice(&lease.to_le_bytes());
        xxh3_64_with_seed(value, xxh3_64_with_seed(key, xxh3_64_with_seed(&numbers, 0)))
    }

    /// As clients see it.
    pub fn to_key_value(&self, key: Bytes) -> KeyValue {
        KeyValue {
            key,
            create_revision: self.create,
            mod_revision: self.at.main,
            version: self.version,
            value: self.value.clone(),
            lease: self.lease,
        }
    }
}

/// The anchors of a record read in place; they are decoded only where the past is looked for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Anchors<'a> {
    Encoded(&'a [u8]),
    Decoded(&'a [Position]),
}

impl Anchors<'_> {
    fn to_vec(self) -> Vec<Position> {
        match self {
            Anchors::Encoded(mut data) => std::iter::from_fn(|| take_position(&mut data)).collect(),
            Anchors::Decoded(anchors) => anchors.to_vec(),
        }
    }
}

/// A [`Record`] read in place.
#[derive(Debug, Clone, Copy)]
pub struct RecordRef<'a> {
    /// See [`Record::at`].
    pub at: Position,
    /// See [`Record::prev`].
    pub prev: Option<Position>,
    /// See [`Record::depth`].
    pub depth: u64,
    /// See [`Record::anchors`].
    pub(crate) anchors: Anchors<'a>,
    /// See [`Record::tombstone`].
    pub tombstone: bool,
    /// See [`Record::create`].
    pub create: i64,
    /// See [`Record::version`].
    pub version: i64,
    /// See [`Record::lease`].
    pub lease: i64,
    /// See [`Record::digest`].
    pub digest: u64,
    /// See [`Record::value`].
    pub value: &'a [u8],
}

impl<'a> RecordRef<'a> {
    /// Reads an encoding.
    pub fn decode(data: &'a [u8]) -> Result<Self, EngineError> {
        Self::read(data).ok_or_else(|| corrupt("cur or rev", "a record that does not decode"))
    }

    fn read(data: &'a [u8]) -> Option<Self> {
        let (&flags, mut rest) = data.split_first()?;
        let rest = &mut rest;
        let tombstone = flags & FLAG_TOMBSTONE != 0;
        let at = take_position(rest)?;
        let (mut create, mut version, mut lease, mut prev, mut digest) = (0, 0, 0, None, 0);
        let (mut depth, mut anchors) = (0, Anchors::Encoded(&[]));
        if !tombstone {
            create = take_varint(rest)? as i64;
            version = take_varint(rest)? as i64;
        }
        if flags & FLAG_LEASE != 0 {
            lease = take_varint(rest)? as i64;
        }
        if flags & FLAG_PREV != 0 {
            prev = Some(take_position(rest)?);
            depth = take_varint(rest)?;
            let before = *rest;
            for _ in 0..anchors_at(depth) {
                take_position(rest)?;
            }
            anchors = Anchors::Encoded(&before[..before.len() - rest.len()]);
        }
        if !tombstone {
            let (bytes, value) = rest.split_at_checked(8)?;
            digest = u64::from_le_bytes(bytes.try_into().ok()?);
            *rest = value;
        } else if !rest.is_empty() {
            return None;
        }
        Some(RecordRef {
            at,
            prev,
            depth,
            anchors,
            tombstone,
            create,
            version,
            lease,
            digest,
            value: rest,
        })
    }

    fn to_record(self, value: Bytes) -> Record {
        let RecordRef {
            at,
            prev,
            depth,
            anchors,
            tombstone,
            create,
            version,
            lease,
            digest,
            value: _,
        } = self;
        let anchors = anchors.to_vec();
        Record {
            at,
            prev,
            depth,
            anchors,
            tombstone,
            create,
            version,
            lease,
            digest,
            value,
        }
    }

    /// The farthest anchor that is still newer than revision `at`.
    pub fn anchor_after(&self, at: i64) -> Option<Position> {
        let newer = |anchor: &Position| anchor.main > at;
        match self.anchors {
            Anchors::Encoded(mut data) => std::iter::from_fn(|| take_position(&mut data)).take_while(newer).last(),
            Anchors::Decoded(anchors) => anchors.iter().copied().take_while(newer).last(),
        }
    }

    /// A copy that stands on its own.
    pub fn to_owned(self) -> Record {
        self.to_record(Bytes::copy_from_slice(self.value))
    }

    /// As clients see it, without its value.
    pub fn to_bare_key_value(self, key: Bytes) -> KeyValue {
        KeyValue {
            key,
            create_revision: self.create,
            mod_revision: self.at.main,
            version: self.version,
            value: Bytes::new(),
            lease: self.lease,
        }
    }
}

/// Appends the encoding of a log entry: the user key with its length before it, then the record.
pub fn encode_change(key: &[u8], record: &Record, out: &mut Vec<u8>) {
    put_varint(out, key.len() as u64);
    out.extend_from_slice(key);
    record.encode(out);
}

/// Splits a log entry into the user key and the record.
pub fn decode_change(data: &[u8]) -> Result<(&[u8], RecordRef<'_>), EngineError> {
    let (key_len, rest) = change_key(data).ok_or_else(|| corrupt("rev", "a change that does not decode"))?;
    let (key, record) = rest.split_at(key_len);
    Ok((key, RecordRef::decode(record)?))
}

fn change_key(data: &[u8]) -> Option<(usize, &[u8])> {
    let mut rest = data;
    let len = usize::try_from(take_varint(&mut rest)?).ok()?;
    (len <= rest.len()).then_some((len, rest))
}

/// Splits a log entry into the user key and the record, both slices of `data`.
pub fn decode_change_owned(data: &Bytes) -> Result<(Bytes, Record), EngineError> {
    let (key_len, rest) = change_key(data).ok_or_else(|| corrupt("rev", "a change that does not decode"))?;
    let key_at = data.len() - rest.len();
    Ok((
        data.slice(key_at..key_at + key_len),
        Record::decode(&data.slice(key_at + key_len..))?,
    ))
}

fn put_position(out: &mut Vec<u8>, at: Position) {
    put_varint(out, at.main as u64);
    put_varint(out, u64::from(at.sub));
}

fn take_position(data: &mut &[u8]) -> Option<Position> {
    let main = take_varint(data)? as i64;
    let sub = u32::try_from(take_varint(data)?).ok()?;
    Some(Position { main, sub })
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take_varint(data: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = data.split_first()?;
        *data = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// A lease as it stands in [`LEASE`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseRecord {
    /// Its time to live as granted, in seconds.
    #[prost(int64, tag = "1")]
    pub ttl: i64,
    /// What of it was left at the last checkpoint, in seconds; 0 when there was none.
    #[prost(int64, tag = "2")]
    pub remaining_ttl: i64,
}

/// The state machine's own numbers; written with every batch, so that they are exactly as old as the data.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StateRecord {
    /// The newest log entry that the data includes.
    #[prost(uint64, tag = "1")]
    pub applied_index: u64,
    /// Its term.
    #[prost(uint64, tag = "2")]
    pub applied_term: u64,
    /// The newest revision.
    #[prost(int64, tag = "3")]
    pub revision: i64,
    /// The revision before which history is hidden; -1 when nothing was ever compacted.
    #[prost(sint64, tag = "4")]
    pub compacted: i64,
    /// Live keys.
    #[prost(uint64, tag = "5")]
    pub keys: u64,
    /// Bytes of live keys and their values.
    #[prost(uint64, tag = "6")]
    pub key_bytes: u64,
    /// The wrapping sum of the digests of all live records, and of those of [`AUTH`] ([`auth_digest`]): equal on members
    /// that applied the same index.
    #[prost(fixed64, tag = "7")]
    pub digest: u64,
}

/// What this member knows of how much there is. Unlike [`StateRecord`] it depends on how far physical compaction has got,
/// so members differ in it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SizesRecord {
    /// Bytes of the log of changes, keys included.
    #[prost(uint64, tag = "1")]
    pub log_bytes: u64,
}

/// The active alarms.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AlarmsRecord {
    /// In order, each once.
    #[prost(message, repeated, tag = "1")]
    pub alarms: Vec<AlarmMember>,
}

impl StateRecord {
    /// An empty store: revision 1, nothing compacted.
    pub fn initial() -> Self {
        StateRecord {
            revision: 1,
            compacted: -1,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_have_golden_bytes() {
        let record = Record {
            at: Position { main: 300, sub: 2 },
            prev: Some(Position { main: 7, sub: 0 }),
            depth: 17,
            anchors: vec![Position { main: 4, sub: 1 }],
            tombstone: false,
            create: 5,
            version: 3,
            lease: 9,
            digest: 0x0102_0304_0506_0708,
            value: "v".into(),
        };
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        assert_eq!(
            bytes,
            [6, 0xac, 0x02, 2, 5, 3, 9, 7, 0, 17, 4, 1, 8, 7, 6, 5, 4, 3, 2, 1, b'v']
        );
        assert_eq!(Record::decode(&bytes.into()).unwrap(), record);

        let tombstone = Record {
            at: Position { main: 2, sub: 0 },
            tombstone: true,
            ..Default::default()
        };
        let mut bytes = Vec::new();
        tombstone.encode(&mut bytes);
        assert_eq!(bytes, [1, 2, 0]);
        assert_eq!(Record::decode(&bytes.into()).unwrap(), tombstone);
    }

    /// From any record, any earlier one is reached in few steps: going to the farthest anchor that is not too far, and
    /// to the previous record where there is none.
    #[test]
    fn anchors_shorten_the_way_into_the_past() {
        let mut chain = vec![Record {
            at: Position::start_of(1),
            ..Default::default()
        }];
        for main in 2..=5000 {
            let last = &chain[chain.len() - 1];
            let (depth, anchors) = last.successor_links();
            let prev = Some(last.at);
            chain.push(Record {
                at: Position::start_of(main),
                prev,
                depth,
                anchors,
                ..Default::default()
            });
        }
        let mut steps_max = 0;
        for (from, to) in [
            (4999, 0),
            (4999, 1),
            (4999, 4998),
            (4999, 2500),
            (4096, 17),
            (300, 0),
            (16, 0),
        ] {
            let mut encoded = Vec::new();
            let (mut at, mut steps) = (from, 0);
            let target = chain[to].at.main;
            while chain[at].at.main > target {
                encoded.clear();
                chain[at].encode(&mut encoded);
                let record = RecordRef::decode(&encoded).unwrap();
                assert_eq!(record.to_owned(), chain[at]);
                let next = record.anchor_after(target).or(record.prev).unwrap();
                assert!(next.main >= target, "never past it");
                at = next.main as usize - 1;
                steps += 1;
            }
            assert_eq!(at, to);
            steps_max = steps_max.max(steps);
        }
        assert!(steps_max <= 64, "{steps_max}");
    }

    /// The values are etcd's own, marshalled by etcd 3.7, so that they go into its backups and come from there as they
    /// are.
    #[test]
    fn auth_records_have_etcds_bytes() {
        use api::auth::{Permission, UserAddOptions};
        use prost::Message;
        let user = User {
            name: "n".into(),
            password: "h".into(),
            roles: vec!["a".to_owned(), "b".to_owned()],
            options: Some(UserAddOptions::default()),
        };
        assert_eq!(user.encode_to_vec(), b"\x0a\x01n\x12\x01h\x1a\x01a\x1a\x01b\x22\x00");
        let role = Role {
            name: "n".into(),
            key_permission: vec![Permission {
                perm_type: 2,
                key: "k".into(),
                range_end: "l".into(),
            }],
        };
        assert_eq!(role.encode_to_vec(), b"\x0a\x01n\x12\x08\x08\x02\x12\x01k\x1a\x01l");
        assert_eq!(encode_auth_revision(258), [0, 0, 0, 0, 0, 0, 1, 2]);
        for revision in [1, 258, u64::MAX] {
            assert_eq!(
                decode_auth_revision(Some(&encode_auth_revision(revision))).unwrap(),
                revision
            );
        }
        assert_eq!(decode_auth_revision(None).unwrap(), 1);
        assert!(decode_auth_revision(Some(&[1])).is_err());
        assert!(decode_auth_enabled(Some(&encode_auth_enabled(true))));
        assert!(!decode_auth_enabled(Some(&encode_auth_enabled(false))) && !decode_auth_enabled(None));
        for (key, (start, end)) in [(user_key(b"x"), user_range()), (role_key(b"x"), role_range())] {
            assert_eq!(&key[start.len()..], b"x");
            assert!(key[..] >= start[..] && key[..] < end[..]);
            assert!(AUTH_ENABLED < &start[..] && AUTH_REVISION < &start[..]);
        }
        assert_ne!(auth_digest(b"a", b"b"), auth_digest(b"ab", b""));
    }

    #[test]
    fn damaged_records_are_errors() {
        for bytes in [&[][..], &[0], &[0, 1, 0, 1, 1, 0, 0], &[1, 2, 0, 9], &[4, 0xff, 0xff]] {
            assert!(RecordRef::decode(bytes).is_err(), "{bytes:?}");
        }
        assert!(decode_change(&[9, b'k']).is_err());
        assert!(position_of(b"l1234").is_err());
    }

    #[test]
    fn keys_sort_in_order_of_time() {
        let positions = [(1, 0), (1, 1), (1, 256), (2, 0), (256, 0), (65536, 3)];
        let keys: Vec<_> = positions
            .iter()
            .map(|&(main, sub)| log_key(Position { main, sub }))
            .collect();
        assert!(keys.is_sorted());
        for (key, (main, sub)) in keys.iter().zip(positions) {
            assert_eq!(position_of(key).unwrap(), Position { main, sub });
        }
    }
}
