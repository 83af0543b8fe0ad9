//! Keeps ranges that are listed again and again, encoded as they go out, and up to date.
//!
//! A list from the engine costs a step of a cursor for each key and for each of its versions that the engine still has in
//! memory. Whoever lists a prefix mostly does so again soon, while little of it has changed. So the keys that a list met
//! are kept as *pages*: all live keys of an interval, encoded as a `RangeResponse` has them. Between the pages there may
//! be gaps, which are read from the engine. Bounded by bytes, whatever the number of keys.
//!
//! How a page stays true:
//!
//! - The apply thread tells of every change ([`Pages::tell`]) after the engine has it and before readers may see its
//!   revision. So whoever reads at a published revision finds all changes up to it told.
//! - A page takes changes in when it is next read, those up to the reader's revision. What is told costs the apply thread
//!   a copy of the record, and nothing at all as long as nobody lists.
//! - A page that was read at a revision may be put in later: the changes since then are in a list of recent ones, or the
//!   page is dropped.
//! - A page knows from which revision on it is right. Who reads an older one is sent to the engine.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use api::Revision;
use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use prost::encoding::{encode_varint, encoded_len_varint};

use crate::keys::{Record, RecordRef};
use crate::read::as_ref;

/// What a page of freshly read keys aims at, so that it fits into one frame of HTTP/2 with its default of 16 KiB.
const PAGE_BYTES: usize = 15 << 10;
/// A page that has grown beyond is dropped, and read anew in smaller ones.
const PAGE_BYTES_MAX: usize = 4 * PAGE_BYTES;
/// What a page takes in memory beside its keys, about.
const PAGE_OVERHEAD_BYTES: usize = 300;
/// Most changes that a page has waiting, and most bytes of them, before it is dropped: nobody reads it.
const PAGE_CHANGES_MAX: usize = 256;
const PAGE_CHANGES_BYTES_MAX: usize = PAGE_BYTES_MAX;
/// What a change takes beside its record, about.
const CHANGE_OVERHEAD_BYTES: usize = 120;
/// Most recent changes, and most bytes of them.
const RECENT_MAX: usize = 4096;
const RECENT_BYTES_MAX: usize = 2 << 20;
/// After so many changes without a list, everything is dropped, and changes are told for nothing again.
const CHANGES_UNLISTED_MAX: usize = 1 << 17;

/// The field `kvs` of `RangeResponse` and those of `KeyValue`, with their wire types.
const KVS: u8 = 2 << 3 | 2;
const KEY: u8 = 1 << 3 | 2;
const CREATE_REVISION: u8 = 2 << 3;
const MOD_REVISION: u8 = 3 << 3;
const VERSION: u8 = 4 << 3;
const VALUE: u8 = 5 << 3 | 2;
const LEASE: u8 = 6 << 3;

/// Appends a live record as one of the `kvs` of a `RangeResponse`.
pub(crate) fn encode_kv(key: &[u8], record: &RecordRef<'_>, out: &mut BytesMut) {
    let number_len = |number: i64| match number {
        0 => 0,
        number => 1 + encoded_len_varint(number as u64),
    };
    let bytes_len = |bytes: &[u8]| match bytes.len() {
        0 => 0,
        len => 1 + encoded_len_varint(len as u64) + len,
    };
    let len = bytes_len(key)
        + number_len(record.create)
        + number_len(record.at.main)
        + number_len(record.version)
        + bytes_len(record.value)
        + number_len(record.lease);
    out.reserve(1 + encoded_len_varint(len as u64) + len);
    let put_number = |out: &mut BytesMut, field, number: i64| {
        if number != 0 {
            out.put_u8(field);
            encode_varint(number as u64, out);
        }
    };
    let put_bytes = |out: &mut BytesMut, field, bytes: &[u8]| {
        if !bytes.is_empty() {
            out.put_u8(field);
            encode_varint(bytes.len() as u64, out);
            out.put_slice(bytes);
        }
    };
    out.put_u8(KVS);
    encode_varint(len as u64, out);
    put_bytes(out, KEY, key);
    put_number(out, CREATE_REVISION, record.create);
    put_number(out, MOD_REVISION, record.at.main);
    put_number(out, VERSION, record.version);
    put_bytes(out, VALUE, record.value);
    put_number(out, LEASE, record.lease);
}

/// The key in what [`encode_kv`] made. Keys are never empty, so it comes first.
fn key_in(encoded: &[u8]) -> &[u8] {
    let after_length = |bytes: &[u8]| 1 + bytes[1..].iter().take_while(|byte| **byte >= 0x80).count() + 1;
    let kv = &encoded[after_length(encoded)..];
    let mut len = 0;
    let mut at = 1;
    for shift in (0..).step_by(7) {
        let byte = kv[at];
        at += 1;
        len |= usize::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    &kv[at..at + len]
}

/// The live keys of an interval, in order.
#[derive(Debug, Default)]
pub(crate) struct Content {
    encoded: Bytes,
    /// Where each key's encoding ends.
    ends: Box<[u32]>,
}

impl Content {
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    fn start_of(&self, index: usize) -> usize {
        match index {
            0 => 0,
            index => self.ends[index - 1] as usize,
        }
    }

    fn encoded_at(&self, index: usize) -> &[u8] {
        &self.encoded[self.start_of(index)..self.ends[index] as usize]
    }

    fn key_at(&self, index: usize) -> &[u8] {
        key_in(self.encoded_at(index))
    }

    /// How many keys are less than `key`.
    pub(crate) fn before(&self, key: &[u8]) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = (low + high) / 2;
            if self.key_at(middle) < key {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    /// The encodings of keys `from..to`.
    pub(crate) fn slice(&self, from: usize, to: usize) -> Bytes {
        self.encoded.slice(self.start_of(from)..self.start_of(to))
    }

    /// The last key of `..to`, which is not empty.
    pub(crate) fn last_key(&self, to: usize) -> Bytes {
        Bytes::copy_from_slice(self.key_at(to - 1))
    }

    fn bytes(&self) -> usize {
        self.encoded.len() + 4 * self.ends.len()
    }

    /// With some changes, in order of time.
    fn with(&self, changes: &[Arc<Change>]) -> Content {
        let mut newest: Vec<&Change> = Vec::with_capacity(changes.len());
        newest.extend(changes.iter().map(|change| &**change));
        // Stable, so that of one key the last is the newest.
        newest.sort_by(|a, b| a.key.cmp(&b.key));
        let more: usize = newest.iter().map(|change| change.encoded.len()).sum();
        let mut draft = Draft {
            encoded: BytesMut::with_capacity(self.encoded.len() + more),
            ends: Vec::with_capacity(self.len() + newest.len()),
        };
        let mut next = 0;
        let mut newest = newest.into_iter().peekable();
        while let Some(change) = newest.next() {
            if newest.peek().is_some_and(|later| later.key == change.key) {
                continue;
            }
            let at = next + self.before_from(next, &change.key);
            draft.copy(self, next, at);
            next = at;
            if next < self.len() && self.key_at(next) == &change.key[..] {
                next += 1;
            }
            if !change.encoded.is_empty() {
                draft.push_encoded(&change.encoded);
            }
        }
        draft.copy(self, next, self.len());
        draft.finish()
    }

    /// How many keys from index `from` on are less than `key`.
    fn before_from(&self, from: usize, key: &[u8]) -> usize {
        self.before(key).saturating_sub(from)
    }
}

/// A [`Content`] that is being gathered.
#[derive(Default)]
pub(crate) struct Draft {
    encoded: BytesMut,
    ends: Vec<u32>,
}

impl Draft {
    /// Adds the next key.
    pub(crate) fn push(&mut self, key: &[u8], record: &RecordRef<'_>) {
        if self.encoded.capacity() == 0 {
            self.encoded.reserve(PAGE_BYTES + 1024);
        }
        encode_kv(key, record, &mut self.encoded);
        self.ends.push(self.encoded.len() as u32);
    }

    fn push_encoded(&mut self, encoded: &[u8]) {
        self.encoded.extend_from_slice(encoded);
        self.ends.push(self.encoded.len() as u32);
    }

    fn copy(&mut self, from: &Content, first: usize, end: usize) {
        let start = from.start_of(first);
        let offset = self.encoded.len();
        self.encoded.extend_from_slice(&from.encoded[start..from.start_of(end)]);
        let moved = |end: &u32| (*end as usize - start + offset) as u32;
        self.ends.extend(from.ends[first..end].iter().map(moved));
    }

    /// Whether it would be too large with one more key.
    pub(crate) fn is_full(&self, key: &[u8], record: &RecordRef<'_>) -> bool {
        !self.ends.is_empty() && self.encoded.len() + key.len() + record.value.len() + 64 > PAGE_BYTES
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The last key, if there is any.
    pub(crate) fn last_key(&self) -> Option<&[u8]> {
        let start = match self.ends[..] {
            [.., start, _] => start as usize,
            [_] => 0,
            [] => return None,
        };
        Some(key_in(&self.encoded[start..]))
    }

    pub(crate) fn finish(&mut self) -> Content {
        let draft = std::mem::take(self);
        // Frozen, it would keep what it reserved, of which the accounts of memory know nothing.
        let is_roomy = draft.encoded.capacity() > draft.encoded.len() + draft.encoded.len() / 4;
        Content {
            encoded: match is_roomy {
                true => Bytes::copy_from_slice(&draft.encoded),
                false => draft.encoded.freeze(),
            },
            ends: draft.ends.into(),
        }
    }
}

/// What became of a key.
#[derive(Debug)]
struct Change {
    key: Bytes,
    /// The first revision of the commit that it belongs to. In it the key may have changed more than once.
    since: Revision,
    /// When it became what is here.
    at: Revision,
    /// Empty if the key is gone.
    encoded: Bytes,
}

impl Change {
    fn bytes(&self) -> usize {
        self.key.len() + self.encoded.len() + CHANGE_OVERHEAD_BYTES
    }
}

/// All live keys from its start, which is where it is in the map, to its end.
#[derive(Debug)]
struct Page {
    /// `None`: of all keys.
    end: Option<Bytes>,
    content: Arc<Content>,
    /// The content is right from this revision on, up to the first of the changes.
    valid_from: Revision,
    /// In order of time; not in the content yet.
    changes: Vec<Arc<Change>>,
    changes_bytes: usize,
    /// Whether it was read since it last could have been dropped.
    used: bool,
}

impl Page {
    fn bytes(&self) -> usize {
        PAGE_OVERHEAD_BYTES + self.content.bytes() + self.changes_bytes
    }

    fn holds(&self, key: &[u8]) -> bool {
        self.end.as_ref().is_none_or(|end| key < &end[..])
    }

    /// Makes the content what it is at a revision; `false` if that is not known here.
    fn take_changes(&mut self, at: Revision) -> bool {
        if at < self.valid_from {
            return false;
        }
        let due = self.changes.partition_point(|change| change.at <= at);
        if self.changes.get(due).is_some_and(|change| change.since <= at) {
            // In the middle of a commit, of which only the end is known.
            return false;
        }
        if due > 0 {
            self.valid_from = self.changes[due - 1].at;
            self.content = Arc::new(self.content.with(&self.changes[..due]));
            let taken: usize = self.changes.drain(..due).map(|change| change.bytes()).sum();
            self.changes_bytes -= taken;
        }
        true
    }
}

/// What is known of the keys from some key on.
pub(crate) enum Found {
    /// All of them up to the end (`None`: all there are), and maybe some before.
    Page { content: Arc<Content>, end: Option<Bytes> },
    /// Nothing up to the end. Only what is `new` may be put in.
    Gap { end: Option<Bytes>, new: bool },
}

/// A page that was read from the engine.
pub(crate) struct ReadPage {
    pub(crate) start: Bytes,
    pub(crate) end: Option<Bytes>,
    pub(crate) content: Arc<Content>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether anybody lists, so that changes are kept.
    active: bool,
    /// Every change up to this revision was told.
    told: Revision,
    /// The changes after `recent_from`, in order of time.
    recent: VecDeque<Arc<Change>>,
    recent_from: Revision,
    recent_bytes: usize,
    /// By their starts. They do not overlap.
    pages: BTreeMap<Bytes, Page>,
    bytes: usize,
    /// Where the search for what can be dropped goes on.
    hand: Bytes,
    /// Changes since a list was read.
    unlisted: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Pages {
    bytes_max: usize,
    /// Gaps of fewer keys are read from the engine each time.
    gap_keys_min: usize,
    state: Mutex<State>,
}

impl Pages {
    /// For an engine that holds everything up to `told`. With no bytes to keep pages in it keeps none.
    pub(crate) fn new(bytes_max: usize, gap_keys_min: usize, told: Revision) -> Self {
        let state = State {
            told,
            ..State::default()
        };
        Pages {
            bytes_max,
            gap_keys_min,
            state: Mutex::new(state),
        }
    }

    /// The bytes that answers from one list may take here.
    pub(crate) fn list_bytes_max(&self) -> usize {
        self.bytes_max / 2
    }

    /// What a commit of the revisions `since..=through` made of keys. To be called after the engine has it and before
    /// `through` is published.
    pub(crate) fn tell<'r>(
        &self,
        since: Revision,
        through: Revision,
        records: impl ExactSizeIterator<Item = (&'r Bytes, &'r Record)>,
    ) {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.told = through;
        if !state.active {
            return;
        }
        state.unlisted += records.len();
        if state.unlisted > CHANGES_UNLISTED_MAX {
            *state = State {
                told: through,
                ..State::default()
            };
            return;
        }
        let mut changes: Vec<_> = records.map(|(key, record)| Change::new(key, record, since)).collect();
        // Of one commit, but of many revisions, and they come in order of keys.
        changes.sort_by_key(|change| change.at);
        for change in changes {
            state.note(Arc::new(change));
        }
        state.trim_recent();
    }

    /// What is known at a revision, which must be published, of the keys from `key` on.
    pub(crate) fn find(&self, at: Revision, key: &[u8]) -> Found {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.unlisted = 0;
        let up_to = (Bound::Unbounded, Bound::Included(key));
        if let Some((start, page)) = state.pages.range_mut::<[u8], _>(up_to).next_back()
            && page.holds(key)
        {
            let before = page.bytes();
            let known = page.take_changes(at);
            page.used = true;
            state.bytes = state.bytes - before + page.bytes();
            let end = page.end.clone();
            if !known {
                return Found::Gap { end, new: false };
            }
            let content = page.content.clone();
            if content.encoded.len() > PAGE_BYTES_MAX && content.len() > 1 {
                let start = start.clone();
                state.drop_page(&start);
            }
            return Found::Page { content, end };
        }
        let after = (Bound::Excluded(key), Bound::Unbounded);
        let end = state
            .pages
            .range::<[u8], _>(after)
            .next()
            .map(|(start, _)| start.clone());
        Found::Gap { end, new: true }
    }

    /// Puts pages in that were read at a revision, in order of keys.
    pub(crate) fn keep(&self, at: Revision, pages: Vec<ReadPage>) {
        let keys: usize = pages.iter().map(|page| page.content.len()).sum();
        if keys < self.gap_keys_min || self.bytes_max == 0 {
            return;
        }
        let mut state = self.state.lock();
        let state = &mut *state;
        if !state.active {
            state.active = true;
            state.recent_from = state.told;
        }
        if at < state.recent_from {
            // What happened since is not known. The next list has better luck.
            return;
        }
        let missed = state.recent.partition_point(|change| change.at <= at);
        let mut missed: Vec<_> = state.recent.range(missed..).cloned().collect();
        // Stable: of each key they stay in order of time.
        missed.sort_by(|a, b| a.key.cmp(&b.key));
        for ReadPage { start, end, content } in pages {
            if state.overlaps(&start, end.as_deref()) {
                continue;
            }
            let mut page = Page {
                end,
                content,
                valid_from: at,
                changes: Vec::new(),
                changes_bytes: 0,
                used: false,
            };
            let first = missed.partition_point(|change| change.key < start);
            let of_page = missed[first..].iter().take_while(|change| page.holds(&change.key));
            page.changes = of_page.cloned().collect();
            page.changes.sort_by_key(|change| change.at);
            page.changes_bytes = page.changes.iter().map(|change| change.bytes()).sum();
            if page.changes.len() <= PAGE_CHANGES_MAX {
                state.bytes += page.bytes();
                state.pages.insert(start, page);
            }
        }
        state.evict(self.bytes_max);
    }
}

impl Change {
    fn new(key: &Bytes, record: &Record, since: Revision) -> Self {
        let mut encoded = BytesMut::new();
        if !record.tombstone {
            encode_kv(key, &as_ref(record), &mut encoded);
        }
        let encoded = encoded.freeze();
        let key = match encoded.is_empty() {
            // A copy: the original is a slice of a log entry, which must not be kept alive.
            true => Bytes::copy_from_slice(key),
            false => encoded.slice_ref(key_in(&encoded)),
        };
        Change {
            key,
            since,
            at: record.at.main,
            encoded,
        }
    }
}

impl State {
    fn note(&mut self, change: Arc<Change>) {
        let bytes = change.bytes();
        let up_to = (Bound::Unbounded, Bound::Included(&change.key[..]));
        if let Some((start, page)) = self.pages.range_mut::<[u8], _>(up_to).next_back()
            && page.holds(&change.key)
        {
            if page.changes.len() < PAGE_CHANGES_MAX && page.changes_bytes + bytes <= PAGE_CHANGES_BYTES_MAX {
                page.changes.push(change.clone());
                page.changes_bytes += bytes;
                self.bytes += bytes;
            } else {
                let start = start.clone();
                self.drop_page(&start);
            }
        }
        self.recent_bytes += bytes;
        self.recent.push_back(change);
    }

    fn trim_recent(&mut self) {
        while self.recent.len() > RECENT_MAX || self.recent_bytes > RECENT_BYTES_MAX {
            let Some(oldest) = self.recent.pop_front() else { return };
            self.recent_bytes -= oldest.bytes();
            self.recent_from = oldest.at;
        }
    }

    fn drop_page(&mut self, start: &[u8]) {
        if let Some(page) = self.pages.remove(start) {
            self.bytes -= page.bytes();
        }
    }

    fn overlaps(&self, start: &[u8], end: Option<&[u8]>) -> bool {
        let from_start = (Bound::Included(start), Bound::Unbounded);
        let up_to_start = (Bound::Unbounded, Bound::Included(start));
        let next = self.pages.range::<[u8], _>(from_start).next();
        let before = self.pages.range::<[u8], _>(up_to_start).next_back();
        next.is_some_and(|(next, _)| end.is_none_or(|end| &next[..] < end))
            || before.is_some_and(|(_, page)| page.holds(start))
    }

    /// Drops pages, first those that were not read since this last came by.
    fn evict(&mut self, bytes_max: usize) {
        while self.bytes > bytes_max {
            let from_hand = (Bound::Included(&self.hand[..]), Bound::Unbounded);
            let Some((start, page)) = self.pages.range_mut::<[u8], _>(from_hand).next() else {
                if self.pages.is_empty() {
                    return;
                }
                self.hand = Bytes::new();
                continue;
            };
            let start = start.clone();
            // The first key after it.
            self.hand = [&start[..], &[0]].concat().into();
            if !std::mem::take(&mut page.used) {
                self.drop_page(&start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use api::kv::{KeyValue, RangeResponse};
    use prost::Message;

    use super::*;
    use crate::keys::Position;

    fn record(main: i64, value: &'static [u8], lease: i64) -> Record {
        Record {
            at: Position::start_of(main),
            create: 1,
            version: 200,
            lease,
            value: Bytes::from_static(value),
            ..Default::default()
        }
    }

    fn tombstone(main: i64) -> Record {
        Record {
            at: Position::start_of(main),
            tombstone: true,
            ..Default::default()
        }
    }

    fn decode(encoded: Bytes) -> Vec<KeyValue> {
        RangeResponse::decode(encoded).expect("it decodes").kvs
    }

    fn content(at: i64, keys: &[&'static str]) -> Content {
        let mut draft = Draft::default();
        for key in keys {
            draft.push(key.as_bytes(), &as_ref(&record(at, b"v", 0)));
        }
        draft.finish()
    }

    fn page(start: &'static str, end: &'static str, at: i64, keys: &[&'static str]) -> ReadPage {
        ReadPage {
            start: start.into(),
            end: (!end.is_empty()).then(|| end.into()),
            content: Arc::new(content(at, keys)),
        }
    }

    const KEYS: [&str; 16] = [
        "b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "b9", "c0", "c1", "c2", "c3", "c4", "c5",
    ];

    fn tell(pages: &Pages, since: i64, through: i64, records: &[(&'static str, Record)]) {
        let records: Vec<_> = records
            .iter()
            .map(|(key, record)| (Bytes::from_static(key.as_bytes()), record))
            .collect();
        pages.tell(since, through, records.iter().map(|(key, record)| (key, *record)));
    }

    fn found(pages: &Pages, at: i64, key: &str) -> Option<Vec<(String, i64)>> {
        match pages.find(at, key.as_bytes()) {
            Found::Gap { .. } => None,
            Found::Page { content, .. } => {
                let kvs = decode(content.slice(0, content.len()));
                let pair = |kv: KeyValue| (String::from_utf8(kv.key.to_vec()).unwrap(), kv.mod_revision);
                Some(kvs.into_iter().map(pair).collect())
            }
        }
    }

    #[test]
    fn keys_are_encoded_as_prost_does() {
        let long = [b'x'; 300];
        let mut all = BytesMut::new();
        let mut expected = RangeResponse::default();
        for (key, record) in [
            (&b"k"[..], record(7, b"", 0)),
            (&long[..], record(i64::MAX, b"value", -1)),
            (&b"\0"[..], record(300, &[b'y'; 200], 5)),
        ] {
            let before = all.len();
            encode_kv(key, &as_ref(&record), &mut all);
            assert_eq!(key_in(&all[before..]), key);
            expected.kvs.push(record.to_key_value(Bytes::copy_from_slice(key)));
        }
        assert_eq!(all, expected.encode_to_vec());
    }

    #[test]
    fn a_page_takes_changes_in() {
        let content = content(1, &["b", "d", "f"]);
        let change = |key: &'static str, record: Record| Arc::new(Change::new(&key.into(), &record, 0));
        let changed = content.with(&[
            change("a", record(2, b"new", 0)),
            change("d", record(3, b"new", 0)),
            change("f", record(4, b"new", 0)),
            change("c", tombstone(5)),
            change("f", tombstone(6)),
            change("g", record(7, b"new", 0)),
        ]);
        let kvs = decode(changed.slice(0, changed.len()));
        let seen: Vec<_> = kvs.iter().map(|kv| (&kv.key[..], kv.mod_revision)).collect();
        assert_eq!(seen, [(&b"a"[..], 2), (&b"b"[..], 1), (&b"d"[..], 3), (&b"g"[..], 7)]);
        assert_eq!(changed.len(), 4);
        assert_eq!(
            (changed.before(b"b"), changed.before(b"c"), changed.before(b"z")),
            (1, 2, 4)
        );
        assert_eq!(decode(changed.slice(1, 3)).len(), 2);
        assert_eq!(changed.last_key(2), "b");
        assert_eq!(changed.with(&[]).encoded, changed.encoded);
    }

    #[test]
    fn every_revision_sees_its_own() {
        let pages = Pages::new(1 << 20, 16, 10);
        assert!(found(&pages, 10, "b").is_none());
        pages.keep(10, vec![page("b", "d", 5, &KEYS)]);
        assert_eq!(found(&pages, 10, "b5").unwrap().len(), 16);
        assert!(found(&pages, 10, "a").is_none() && found(&pages, 10, "d").is_none());
        assert!(found(&pages, 9, "b").is_none(), "not known of the time before");

        // One commit of three revisions; only its end is known.
        let of_commit = [
            ("b0", record(13, b"", 0)),
            ("b1", tombstone(11)),
            ("x", record(12, b"", 0)),
        ];
        tell(&pages, 11, 13, &of_commit);
        let before = found(&pages, 10, "b").unwrap();
        assert_eq!((before.len(), before[0].1), (16, 5));
        assert!(found(&pages, 11, "b").is_none() && found(&pages, 12, "b").is_none());
        let after = found(&pages, 13, "b").unwrap();
        assert_eq!((after.len(), &after[0]), (15, &("b0".to_owned(), 13)));
        assert!(found(&pages, 12, "b").is_none());
    }

    #[test]
    fn what_happened_meanwhile_is_not_missed() {
        let pages = Pages::new(1 << 20, 16, 10);
        // The first one makes it listen.
        pages.keep(10, vec![page("k", "l", 5, &KEYS)]);
        tell(&pages, 11, 11, &[("b2", record(11, b"", 0))]);
        tell(&pages, 12, 12, &[("b2", tombstone(12))]);
        pages.keep(10, vec![page("b", "d", 5, &KEYS)]);
        assert_eq!(found(&pages, 10, "b").unwrap()[2].1, 5);
        assert_eq!(found(&pages, 11, "b").unwrap()[2].1, 11);
        assert_eq!(found(&pages, 12, "b").unwrap().len(), 15);
        // Nothing is put over what is there.
        pages.keep(12, vec![page("c0", "e", 5, &KEYS[10..]), page("a", "b1", 5, &KEYS)]);
        assert!(found(&pages, 12, "d").is_none() && found(&pages, 12, "a").is_none());
        // Whoever read before it listened does not know what he missed.
        let late = Pages::new(1 << 20, 16, 10);
        tell(&late, 11, 11, &[("b2", record(11, b"", 0))]);
        late.keep(10, vec![page("b", "d", 5, &KEYS)]);
        assert!(found(&late, 11, "b").is_none());
        late.keep(11, vec![page("b", "d", 5, &KEYS)]);
        assert!(found(&late, 11, "b").is_some());
    }

    #[test]
    fn recent_changes_are_bounded() {
        let pages = Pages::new(1 << 20, 16, 1);
        pages.keep(1, vec![page("b", "d", 1, &KEYS)]);
        for at in 2..2 + RECENT_MAX as i64 + 10 {
            tell(&pages, at, at, &[("x", record(at, b"", 0))]);
        }
        pages.keep(10, vec![page("k", "l", 1, &KEYS)]);
        assert!(
            found(&pages, 10, "k").is_none(),
            "the change at 11 is forgotten, for all that is known"
        );
        pages.keep(11, vec![page("k", "l", 1, &KEYS)]);
        assert!(found(&pages, 11, "k").is_some());
        let state = pages.state.lock();
        assert_eq!(state.recent.len(), RECENT_MAX);
        assert_eq!(
            state.recent_bytes,
            state.recent.iter().map(|change| change.bytes()).sum::<usize>()
        );
    }

    #[test]
    fn a_page_that_nobody_reads_is_dropped_and_in_the_end_all_are() {
        let pages = Pages::new(1 << 20, 16, 1);
        pages.keep(1, vec![page("b", "d", 1, &KEYS), page("k", "l", 1, &KEYS)]);
        for at in 2..=PAGE_CHANGES_MAX as i64 + 2 {
            tell(&pages, at, at, &[("b", record(at, b"", 0))]);
        }
        let now = PAGE_CHANGES_MAX as i64 + 2;
        assert!(found(&pages, now, "b").is_none() && found(&pages, now, "k").is_some());
        for at in 0..=CHANGES_UNLISTED_MAX as i64 {
            tell(&pages, now + at, now + at, &[("x", record(now + at, b"", 0))]);
        }
        let state = pages.state.lock();
        assert!(!state.active && state.pages.is_empty() && state.recent.is_empty() && state.bytes == 0);
    }

    #[test]
    fn memory_is_bounded_and_what_is_read_stays() {
        let one = PAGE_OVERHEAD_BYTES + content(1, &KEYS).bytes();
        let pages = Pages::new(3 * one, 16, 1);
        for (start, end) in [("b", "c"), ("c", "d"), ("d", "e")] {
            pages.keep(1, vec![page(start, end, 1, &KEYS)]);
        }
        assert!(found(&pages, 1, "c").is_some());
        for (start, end) in [("e", "f"), ("f", "g"), ("g", "h"), ("h", "i")] {
            pages.keep(1, vec![page(start, end, 1, &KEYS)]);
            let state = pages.state.lock();
            assert!(state.bytes <= 3 * one);
            assert_eq!(state.bytes, state.pages.values().map(Page::bytes).sum::<usize>());
            drop(state);
            assert!(found(&pages, 1, "c").is_some(), "{start}");
        }
        let none = Pages::new(0, 16, 1);
        none.keep(1, vec![page("b", "c", 1, &KEYS)]);
        assert!(found(&none, 1, "b").is_none());
    }
}
