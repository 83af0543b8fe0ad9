//! The hash of the history, by etcd's formula (`HashKV`), so that any two members can be compared, etcd's included.
//!
//! etcd hashes the bucket `key` of its file: the bucket's name, then all revisions in order, each as the bytes that etcd
//! would have stored. Left out is what compaction drops, whether or not it has got round to it:
//!
//! - after the compacted revision, every change up to the hashed revision counts;
//! - at or before it, only those that are still their keys' values at the hashed revision; but if no key is alive then,
//!   those that were alive at the compacted revision. (etcd takes the empty set of what to keep for none at all, and
//!   then counts what its file has left.)
//!
//! The first part is one walk over the log. The second, the *survivors*, must come first and in order of revision, and
//! is stored by key. A CRC can be put together from those of its parts in whatever order these were computed, so each
//! survivor is boiled down to 24 bytes as it comes by, and those are sorted: a walk over the newest records for every
//! `PIECES_MAX` survivors at least, in as much memory as twice as many take. Besides, one lookup for each key that
//! has changed since the hashed revision.

use api::kv::ResponseHeader;
use api::store::HashKv;
use api::{Error, Revision};
use storage::{Cursor, Engine, EngineError, KeyRange, View};

use crate::keys::{self, Position, RecordRef};
use crate::read::{Reader, Snapshot, as_ref};
use crate::{Failure, etcd_form};

/// What etcd calls the bucket that holds the history.
const BUCKET: &[u8] = b"key";

/// How many survivors one walk settles at least: 12 MiB of them, and twice that at its peak.
const PIECES_MAX: usize = 512 * 1024;

impl<E: Engine> Reader<E> {
    /// The hash of the history up to `revision` (0: the newest). It reads the whole store, on its caller's thread, and
    /// holds a view of the engine meanwhile.
    pub fn hash_kv(&self, revision: Revision) -> Result<HashKv, Failure> {
        loop {
            let current = self.current();
            // In this order, for the reason that all reads have.
            let newest = current.revision();
            let view = current.engine.view();
            let compacted = current.compacted();
            let at = if revision == 0 { newest } else { revision };
            if at > newest {
                return Err(Error::FutureRevision.into());
            }
            if at < compacted && revision == 0 {
                // The apply thread is about to publish a revision after the compacted one.
                std::hint::spin_loop();
                std::thread::yield_now();
                continue;
            }
            // etcd takes a negative one, and hashes nothing.
            if at < compacted && revision > 0 {
                return Err(Error::Compacted.into());
            }
            return Ok(HashKv {
                header: ResponseHeader {
                    revision: newest,
                    ..Default::default()
                },
                hash: History::new(&view, compacted, at).hash(PIECES_MAX)?,
                compact_revision: compacted,
                hash_revision: at,
            });
        }
    }
}

/// The hash that etcd keeps of a compaction to `compacted` when the one before it was to `previous` (-1: none), and
/// answers when asked for just that revision later, with `previous` as the compacted revision: it covers what the
/// compaction is about to drop. The view must be older than the compaction's last step, which drops it.
pub fn hash_of_compaction(view: &impl View, previous: Revision, compacted: Revision) -> Result<u32, EngineError> {
    let history = History {
        keeps_tombstones: true,
        ..History::new(view, previous, compacted)
    };
    history.hash(PIECES_MAX)
}

/// What is hashed.
pub(crate) struct History<'a, V> {
    view: &'a V,
    compacted: Revision,
    revision: Revision,
    /// Whether a deletion at exactly the hashed revision is something to keep, as it is to etcd's compaction: it makes a
    /// difference to whether there is anything.
    keeps_tombstones: bool,
}

impl<'a, V: View> History<'a, V> {
    pub(crate) fn new(view: &'a V, compacted: Revision, revision: Revision) -> Self {
        History {
            view,
            compacted,
            revision,
            keeps_tombstones: false,
        }
    }

    fn hash(&self, pieces_max: usize) -> Result<u32, EngineError> {
        let mut hash = Hash::default();
        hash.write(BUCKET);
        // Without compaction there is nothing but the log.
        if self.compacted >= 0 {
            self.hash_survivors(&mut hash, pieces_max)?;
        }
        self.walk_log(self.compacted + 1, self.revision + 1, |_, key, record| {
            hash.write_change(key, &record);
            Ok(true)
        })?;
        Ok(hash.crc())
    }

    fn hash_survivors(&self, hash: &mut Hash, pieces_max: usize) -> Result<(), EngineError> {
        let mut chunk = Chunk::new(pieces_max);
        let mut keeps_some = self.walk_survivors(|key, record| chunk.add(key, record))?;
        if !keeps_some && self.keeps_tombstones {
            self.walk_log(self.revision, self.revision + 1, |_, _, record| {
                keeps_some |= record.tombstone;
                Ok(!keeps_some)
            })?;
        }
        if !keeps_some {
            self.walk_replaced(self.compacted, Some(self.revision), |key, record| {
                chunk.add(key, record)
            })?;
        }
        while chunk.settle(hash) {
            if keeps_some {
                self.walk_survivors(|key, record| chunk.add(key, record))?;
            } else {
                self.walk_replaced(self.compacted, Some(self.revision), |key, record| {
                    chunk.add(key, record)
                })?;
            }
        }
        Ok(())
    }

    /// Visits, in any order, what was written at or before the compacted revision and was alive at the hashed one. Says
    /// whether anything was alive then.
    fn walk_survivors(&self, mut visit: impl FnMut(&[u8], RecordRef<'_>)) -> Result<bool, EngineError> {
        let mut any = false;
        let all = KeyRange { start: &[], end: None };
        let mut cursor = self.view.cursor(keys::CUR, all)?;
        cursor.seek_first()?;
        while let Some((key, data)) = cursor.entry() {
            let record = RecordRef::decode(data)?;
            if !record.tombstone && record.at.main <= self.revision {
                any = true;
                if record.at.main <= self.compacted {
                    visit(key, record);
                }
            }
            cursor.next()?;
        }
        any |= self.walk_replaced(self.revision, None, visit)?;
        Ok(any)
    }

    /// Visits, in any order, what was written at or before the compacted revision, was alive at revision `at`, and was
    /// replaced or deleted since, by `end` at the latest. Says whether that happened to anything that was alive at `at`,
    /// whenever it was written.
    pub(crate) fn walk_replaced(
        &self,
        at: Revision,
        end: Option<Revision>,
        mut visit: impl FnMut(&[u8], RecordRef<'_>),
    ) -> Result<bool, EngineError> {
        let snapshot = Snapshot {
            view: self.view,
            overlay: None,
            revision: self.revision,
            compacted: self.compacted,
        };
        let mut any = false;
        let end = end.map_or(i64::MAX, |end| end + 1);
        self.walk_log(at + 1, end, |position, key, change| {
            let replaced_living = change.tombstone || change.version > 1;
            if let Some(prev) = change.prev.filter(|prev| replaced_living && prev.main <= at) {
                any = true;
                if prev.main <= self.compacted {
                    visit(key, as_ref(&snapshot.previous(prev, position)?));
                }
            }
            Ok(true)
        })?;
        Ok(any)
    }

    /// Visits the changes of the revisions from `start` to before `end`, in order, until told to stop.
    pub(crate) fn walk_log(
        &self,
        start: Revision,
        end: Revision,
        mut visit: impl FnMut(Position, &[u8], RecordRef<'_>) -> Result<bool, EngineError>,
    ) -> Result<(), EngineError> {
        let start = start.max(0);
        if start >= end {
            return Ok(());
        }
        let range = (
            keys::log_key(Position::start_of(start)),
            keys::log_key(Position::start_of(end)),
        );
        let mut cursor = self.view.cursor(
            keys::REV,
            KeyRange {
                start: &range.0,
                end: Some(&range.1),
            },
        )?;
        cursor.seek_first()?;
        while let Some((log_key, data)) = cursor.entry() {
            let (key, record) = keys::decode_change(data)?;
            if !visit(keys::position_of(log_key)?, key, record)? {
                return Ok(());
            }
            cursor.next()?;
        }
        Ok(())
    }
}

/// A survivor, boiled down.
#[derive(Clone, Copy)]
struct Piece {
    at: Position,
    crc: u32,
    len: u32,
}

/// The earliest survivors that are not settled yet, out of all that come by.
struct Chunk {
    pieces_max: usize,
    /// The last one that is settled.
    after: Option<Position>,
    /// Where those begin that there was no room for.
    before: Option<Position>,
    pieces: Vec<Piece>,
    /// That of one piece after the other.
    hash: Hash,
}

impl Chunk {
    fn new(pieces_max: usize) -> Self {
        Chunk {
            pieces_max,
            after: None,
            before: None,
            pieces: Vec::new(),
            hash: Hash::default(),
        }
    }

    fn add(&mut self, key: &[u8], record: RecordRef<'_>) {
        let at = record.at;
        if self.after.is_some_and(|after| at <= after) || self.before.is_some_and(|before| at >= before) {
            return;
        }
        self.hash.restart();
        self.hash.write_change(key, &record);
        self.pieces.push(Piece {
            at,
            crc: self.hash.crc(),
            len: self.hash.len,
        });
        if self.pieces.len() == 2 * self.pieces_max {
            let (_, first_out, _) = self
                .pieces
                .select_nth_unstable_by_key(self.pieces_max, |piece| piece.at);
            self.before = Some(first_out.at);
            self.pieces.truncate(self.pieces_max);
        }
    }

    /// Adds what was gathered to the hash. Says whether everything must come by again, since not all of it had room.
    fn settle(&mut self, hash: &mut Hash) -> bool {
        self.pieces.sort_unstable_by_key(|piece| piece.at);
        for piece in &self.pieces {
            hash.append(piece.crc, piece.len);
        }
        self.after = self.pieces.last().map(|piece| piece.at);
        self.pieces.clear();
        self.before.take().is_some()
    }
}

/// A CRC-32C in the making.
struct Hash {
    /// Inverted, as it is while bytes are added.
    state: u32,
    /// Bytes so far; meant for single changes.
    len: u32,
    /// The length of what was appended last, and what as many bytes do to a CRC: most are alike.
    appended: (u32, u32),
    scratch: Vec<u8>,
}

impl Default for Hash {
    fn default() -> Self {
        Hash {
            state: !0,
            len: 0,
            appended: (0, crc32c::shift(0)),
            scratch: Vec::new(),
        }
    }
}

impl Hash {
    fn restart(&mut self) {
        self.state = !0;
        self.len = 0;
    }

    fn crc(&self) -> u32 {
        !self.state
    }

    fn write(&mut self, bytes: &[u8]) {
        self.state = crc32c::update(self.state, bytes);
        self.len = self.len.wrapping_add(bytes.len() as u32);
    }

    /// Adds bytes of which only the CRC and the number are known.
    fn append(&mut self, crc: u32, len: u32) {
        if self.appended.0 != len {
            self.appended = (len, crc32c::shift(len));
        }
        self.state = !(crc32c::multiply(self.appended.1, !self.state) ^ crc);
    }

    /// Adds a change as etcd would have stored it: the revision as its key, an encoded KeyValue as its value.
    fn write_change(&mut self, key: &[u8], record: &RecordRef<'_>) {
        let mut out = std::mem::take(&mut self.scratch);
        out.clear();
        etcd_form::put_revision(record.at, record.tombstone, &mut out);
        etcd_form::put_head(key, record, &mut out);
        // The value goes in from where it is: it may be large.
        self.write(&out);
        self.write(record.value);
        out.clear();
        etcd_form::put_tail(record, &mut out);
        self.write(&out);
        self.scratch = out;
    }
}

/// CRC-32C (Castagnoli), bits reflected as always.
mod crc32c {
    const POLYNOMIAL: u32 = 0x82f6_3b78;

    const fn times_x(value: u32) -> u32 {
        (value >> 1) ^ (POLYNOMIAL & (value & 1).wrapping_neg())
    }

    /// `[n][byte]`: the byte followed by n zeros.
    static TABLES: [[u32; 256]; 8] = {
        let mut tables = [[0; 256]; 8];
        let mut byte = 0;
        while byte < 256 {
            let (mut value, mut bit) = (byte as u32, 0);
            while bit < 8 {
                value = times_x(value);
                bit += 1;
            }
            tables[0][byte] = value;
            byte += 1;
        }
        let mut zeros = 1;
        while zeros < 8 {
            let mut byte = 0;
            while byte < 256 {
                let before = tables[zeros - 1][byte];
                tables[zeros][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
                byte += 1;
            }
            zeros += 1;
        }
        tables
    };

    pub(super) fn update(mut state: u32, bytes: &[u8]) -> u32 {
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            let word: [u8; 8] = word.try_into().expect("it has 8 bytes");
            let [a, b, c, d, e, f, g, h] = (u64::from_le_bytes(word) ^ u64::from(state)).to_le_bytes();
            state = TABLES[7][usize::from(a)]
                ^ TABLES[6][usize::from(b)]
                ^ TABLES[5][usize::from(c)]
                ^ TABLES[4][usize::from(d)]
                ^ TABLES[3][usize::from(e)]
                ^ TABLES[2][usize::from(f)]
                ^ TABLES[1][usize::from(g)]
                ^ TABLES[0][usize::from(h)];
        }
        for &byte in words.remainder() {
            state = (state >> 8) ^ TABLES[0][usize::from(state as u8 ^ byte)];
        }
        state
    }

    /// A product of polynomials; the highest bit stands for 1.
    pub(super) const fn multiply(a: u32, mut b: u32) -> u32 {
        let (mut product, mut bit) = (0, 1 << 31);
        while bit != 0 {
            if a & bit != 0 {
                product ^= b;
            }
            b = times_x(b);
            bit >>= 1;
        }
        product
    }

    /// `[n]`: x to the power of 8 times 2 to the power of n, which is what 2 to the power of n bytes do.
    static POWERS: [u32; 32] = {
        let mut powers = [0; 32];
        powers[0] = 1 << (31 - 8);
        let mut n = 1;
        while n < 32 {
            powers[n] = multiply(powers[n - 1], powers[n - 1]);
            n += 1;
        }
        powers
    };

    /// What a CRC is multiplied by for `len` more bytes; adding their own then makes it that of both.
    pub(super) fn shift(len: u32) -> u32 {
        let mut product = 1 << 31;
        for (n, &power) in POWERS.iter().enumerate() {
            if len >> n & 1 != 0 {
                product = multiply(power, product);
            }
        }
        product
    }
}

#[cfg(test)]
mod tests {
    use api::kv::KeyValue;
    use prost::Message;

    use super::*;

    #[test]
    fn the_crc_is_castagnolis_however_it_is_put_together() {
        let crc = |bytes: &[u8]| {
            let mut hash = Hash::default();
            hash.write(bytes);
            hash.crc()
        };
        // RFC 3720, B.4.
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc(b"123456789"), 0xe306_9283);
        assert_eq!(crc(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc(&ascending), 0x46dd_794e);

        let bytes: Vec<u8> = (0..100_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
        for cut in [0, 1, 7, 8, 9, 255, 65_536, 99_999, 100_000] {
            let (first, second) = bytes.split_at(cut);
            let mut hash = Hash::default();
            hash.write(first);
            hash.append(crc(second), second.len() as u32);
            assert_eq!(hash.crc(), crc(&bytes), "cut at {cut}");
        }
    }

    #[test]
    fn changes_are_hashed_as_etcd_stores_them() {
        let at = Position { main: 0x0102, sub: 3 };
        for (value, lease) in [(&b""[..], 0), (b"v", 0), (&[7; 300], 9), (b"v", -1)] {
            let record = keys::Record {
                at,
                create: 5,
                version: 300,
                lease,
                value: value.to_vec().into(),
                ..Default::default()
            };
            let mut expected = b"\0\0\0\0\0\0\x01\x02_\0\0\0\0\0\0\0\x03".to_vec();
            expected.extend(record.to_key_value("key".into()).encode_to_vec());
            check(&record, &expected);
        }
        let tombstone = keys::Record {
            at,
            tombstone: true,
            ..Default::default()
        };
        let mut expected = b"\0\0\0\0\0\0\x01\x02_\0\0\0\0\0\0\0\x03t".to_vec();
        let key = "key".into();
        expected.extend(
            KeyValue {
                key,
                ..Default::default()
            }
            .encode_to_vec(),
        );
        check(&tombstone, &expected);

        fn check(record: &keys::Record, expected: &[u8]) {
            let (mut whole, mut change) = (Hash::default(), Hash::default());
            whole.write(expected);
            change.write_change(b"key", &as_ref(record));
            assert_eq!((change.crc(), change.len), (whole.crc(), whole.len), "{record:?}");
        }
    }

    #[test]
    fn chunks_settle_everything_once_and_in_order() {
        let records: Vec<keys::Record> = (0..100)
            .map(|n| keys::Record {
                at: Position {
                    main: n * 37 % 101 / 2,
                    sub: (n * 37 % 101 % 2) as u32,
                },
                ..Default::default()
            })
            .collect();
        let mut in_order = records.clone();
        in_order.sort_by_key(|record| record.at);
        let mut expected = Hash::default();
        for record in &in_order {
            expected.write_change(b"k", &as_ref(record));
        }
        for (pieces_max, walks_most) in [(1, 100), (2, 50), (7, 15), (49, 3), (50, 2), (51, 1), (1000, 1)] {
            let (mut hash, mut chunk, mut walks) = (Hash::default(), Chunk::new(pieces_max), 0);
            loop {
                walks += 1;
                for record in &records {
                    chunk.add(b"k", as_ref(record));
                    assert!(chunk.pieces.len() < 2 * pieces_max);
                }
                if !chunk.settle(&mut hash) {
                    break;
                }
            }
            assert_eq!(hash.crc(), expected.crc(), "{pieces_max}");
            assert!(walks <= walks_most, "{pieces_max}: {walks}");
        }
    }
}
