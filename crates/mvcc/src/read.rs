//! Answers reads from an engine view: ranges at any uncompacted revision, and what they are built from.

use std::cmp::Ordering as CmpOrdering;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use api::codec::DowngradeInfo;
use api::kv::{
    AlarmMember, KeyValue, RangeRequest, RangeResponse, ResponseHeader, SortOrder, SortTarget, TxnRequest, TxnResponse,
};
use api::store::{EncodedRange, ScanPage, ScanRequest};
use api::{Error, LeaseId, RaftIndex, Revision, Span};
use arc_swap::{ArcSwap, Guard};
use bytes::{Bytes, BytesMut};
use hashbrown::HashMap;
use parking_lot::Mutex;
use storage::{Cursor, Engine, EngineError, KeyRange, View};

use crate::auth::{Auth, Caller, Limits, Right, permit_attached};
use crate::keys::{self, Record, RecordRef};
use crate::membership::Membership;
use crate::overlay::Overlay;
use crate::pages::{self, Draft, Pages, ReadPage};
use crate::{Failure, txn};

/// What readers on any thread see of the machine. Written by the apply thread only, after the engine write and in the
/// order of the fields here.
#[derive(Debug)]
pub struct Published {
    /// The revision before which history is hidden.
    pub(crate) compacted: AtomicI64,
    /// The newest revision.
    pub(crate) revision: AtomicI64,
    /// The newest applied log index.
    pub(crate) applied_index: AtomicU64,
    /// Live keys.
    pub(crate) keys: AtomicU64,
    /// Bytes of live keys and their values.
    pub(crate) key_bytes: AtomicU64,
    /// See [`keys::StateRecord::digest`].
    pub(crate) digest: AtomicU64,
    /// See [`keys::SizesRecord::log_bytes`].
    pub(crate) log_bytes: AtomicU64,
    /// Leases.
    pub(crate) leases: AtomicU64,
    /// The revision up to which physical compaction is done.
    pub(crate) compacted_physically: AtomicI64,
    /// What of it is listed often.
    pub(crate) pages: Pages,
    rare: Mutex<Rare>,
}

/// What is published, but hardly ever changes.
#[derive(Debug, Clone)]
pub(crate) struct Rare {
    pub(crate) membership: Arc<Membership>,
    pub(crate) alarms: Arc<[AlarmMember]>,
    pub(crate) downgrade: Arc<DowngradeInfo>,
}

/// What an empty store takes, as it would in etcd's file: 5 pages, and nothing is smaller than a page.
const EMPTY_BYTES: u64 = 5 * PAGE_BYTES;
const PAGE_BYTES: u64 = 4096;
/// What a key or a lease takes beside its own bytes, about.
const OVERHEAD_BYTES: u64 = 64;

impl Published {
    pub(crate) fn new(
        state: &keys::StateRecord,
        compacted_physically: i64,
        log_bytes: u64,
        leases: usize,
        rare: Rare,
        pages: Pages,
    ) -> Self {
        Published {
            pages,
            rare: Mutex::new(rare),
            log_bytes: AtomicU64::new(log_bytes),
            leases: AtomicU64::new(leases as u64),
            compacted: AtomicI64::new(state.compacted),
            revision: AtomicI64::new(state.revision),
            applied_index: AtomicU64::new(state.applied_index),
            keys: AtomicU64::new(state.keys),
            key_bytes: AtomicU64::new(state.key_bytes),
            digest: AtomicU64::new(state.digest),
            compacted_physically: AtomicI64::new(compacted_physically),
        }
    }

    pub(crate) fn publish(&self, state: &keys::StateRecord, log_bytes: u64, leases: usize, now: &Rare) {
        {
            let mut rare = self.rare.lock();
            if !Arc::ptr_eq(&rare.membership, &now.membership) {
                rare.membership = now.membership.clone();
            }
            if !Arc::ptr_eq(&rare.alarms, &now.alarms) {
                rare.alarms = now.alarms.clone();
            }
            if !Arc::ptr_eq(&rare.downgrade, &now.downgrade) {
                rare.downgrade = now.downgrade.clone();
            }
        }
        self.log_bytes.store(log_bytes, Ordering::Relaxed);
        self.leases.store(leases as u64, Ordering::Relaxed);
        self.keys.store(state.keys, Ordering::Relaxed);
        self.key_bytes.store(state.key_bytes, Ordering::Relaxed);
        self.digest.store(state.digest, Ordering::Relaxed);
        self.compacted.store(state.compacted, Ordering::Release);
        self.revision.store(state.revision, Ordering::Release);
        self.applied_index.store(state.applied_index, Ordering::Release);
    }
}

/// The users and roles that are published. They belong to no engine in particular: before a snapshot is put in use, its
/// users and roles are.
#[derive(Debug)]
pub(crate) struct PublishedAuth {
    /// What nearly every request wants to know, and no more than that.
    enabled: AtomicBool,
    auth: ArcSwap<Auth>,
}

impl PublishedAuth {
    pub(crate) fn new(auth: Arc<Auth>) -> Self {
        PublishedAuth {
            enabled: AtomicBool::new(auth.is_enabled()),
            auth: ArcSwap::new(auth),
        }
    }

    /// To be called before data is published that may be more than what was allowed to be seen: whoever sees the data and
    /// then looks again sees this.
    pub(crate) fn publish(&self, auth: Arc<Auth>) {
        let enabled = auth.is_enabled();
        self.auth.store(auth);
        self.enabled.store(enabled, Ordering::Release);
    }
}

/// Reads the newest published state, on any thread.
///
/// The engine may be replaced under it, by a snapshot of another member. Each read takes one `Current` and stays with
/// it, so that engine and numbers belong together.
pub struct Reader<E> {
    current: Arc<ArcSwap<Current<E>>>,
    rests: Arc<Mutex<Rests>>,
    auth: Arc<PublishedAuth>,
}

/// An engine and what is published about it.
pub(crate) struct Current<E> {
    pub(crate) engine: Arc<E>,
    published: Arc<Published>,
}

impl<E> Current<E> {
    /// The newest revision.
    pub(crate) fn revision(&self) -> Revision {
        self.published.revision.load(Ordering::Acquire)
    }

    /// The revision before which history is hidden; -1 when nothing was compacted.
    pub(crate) fn compacted(&self) -> Revision {
        self.published.compacted.load(Ordering::Acquire)
    }
}

/// How many keys lie beyond the pages that were read lately.
///
/// A page's answer counts all keys that are left in its range. Whoever reads a list page by page reads at one revision,
/// where nothing changes any more, so the count of the next page follows from that of this one; without remembering it
/// each page would walk over the whole rest of the list.
#[derive(Default)]
struct Rests {
    counts: HashMap<Rest, i64>,
    /// In the order in which they are forgotten.
    order: VecDeque<Rest>,
}

/// The rest of a list: at which revision, from which key to which end.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Rest {
    at: Revision,
    key: Bytes,
    range_end: Bytes,
}

/// Most pages whose rest is remembered.
const RESTS_MAX: usize = 4096;
/// Most bytes of keys of a rest that is remembered; lists of larger keys count each time.
const REST_BYTES_MAX: usize = 4096;

impl Rests {
    fn remember(&mut self, rest: Rest, count: i64) {
        if rest.key.len() + rest.range_end.len() > REST_BYTES_MAX {
            return;
        }
        if self.counts.insert(rest.clone(), count).is_none() {
            self.order.push_back(rest);
            if self.order.len() > RESTS_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.counts.remove(&oldest);
            }
        }
    }
}

impl<E> Clone for Reader<E> {
    fn clone(&self) -> Self {
        Reader {
            current: self.current.clone(),
            rests: self.rests.clone(),
            auth: self.auth.clone(),
        }
    }
}

/// How many bytes the keys and values of responses are gathered in at once.
const ARENA_BYTES: usize = 64 * 1024;

impl<E: Engine> Reader<E> {
    pub(crate) fn new(engine: Arc<E>, published: Arc<Published>, auth: Arc<PublishedAuth>) -> Self {
        Reader {
            current: Arc::new(ArcSwap::from_pointee(Current { engine, published })),
            rests: Arc::default(),
            auth,
        }
    }

    pub(crate) fn published_auth(&self) -> &PublishedAuth {
        &self.auth
    }

    /// Whether auth is on: one load.
    pub fn is_auth_enabled(&self) -> bool {
        self.auth.enabled.load(Ordering::Acquire)
    }

    /// Users, roles and permissions. Whoever reads by a permission looks at [`Auth::revision`] again after reading: what
    /// was read may be newer than the permission.
    pub fn auth(&self) -> Guard<Arc<Auth>> {
        self.auth.auth.load()
    }

    /// Whether a caller may read (or write) all keys that are attached to a lease.
    ///
    /// # Errors
    /// Refusals as of [`Auth::permit_read`].
    pub fn permit_attached(
        &self,
        auth: &Auth,
        caller: Caller<'_>,
        right: Right,
        lease: LeaseId,
    ) -> Result<(), Failure> {
        let limits = auth.limits_of(caller, right);
        if let Limits::None = limits {
            return Ok(());
        }
        let generation = self.current();
        let view = generation.engine.view();
        permit_attached(&limits, &view, None, lease)?.map_err(Failure::Refused)
    }

    /// From now on this reader and all its clones read from `engine`.
    pub(crate) fn switch(&self, engine: Arc<E>, published: Arc<Published>) {
        self.current.store(Arc::new(Current { engine, published }));
    }

    /// An engine and its numbers, for a read that needs them to belong together.
    pub(crate) fn current(&self) -> Guard<Arc<Current<E>>> {
        self.current.load()
    }

    /// The engine as it is now: for its statistics, flushes and snapshots.
    pub fn engine(&self) -> Arc<E> {
        self.current.load().engine.clone()
    }

    /// Who belongs to the cluster.
    pub fn membership(&self) -> Arc<Membership> {
        self.current.load().published.rare.lock().membership.clone()
    }

    /// The active alarms, in order.
    pub fn alarms(&self) -> Arc<[AlarmMember]> {
        self.current.load().published.rare.lock().alarms.clone()
    }

    /// Whether the cluster is to go back to an older release, and to which.
    pub fn downgrade(&self) -> Arc<DowngradeInfo> {
        self.current.load().published.rare.lock().downgrade.clone()
    }

    /// Bytes that the data takes, all versions that compaction has left, about as a file of pages would have it: what a
    /// quota is held against. It grows with every write and shrinks with compaction. What the engine really has on disk
    /// follows later and is a matter of its own.
    pub fn data_bytes(&self) -> u64 {
        let current = self.current.load();
        let published = &current.published;
        let number = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let overhead = OVERHEAD_BYTES * (number(&published.keys) + number(&published.leases));
        let bytes = number(&published.key_bytes) + number(&published.log_bytes) + overhead;
        EMPTY_BYTES + bytes.next_multiple_of(PAGE_BYTES)
    }

    /// The newest revision.
    pub fn revision(&self) -> Revision {
        self.current.load().revision()
    }

    /// The revision before which history is hidden; -1 when nothing was compacted.
    pub fn compacted(&self) -> Revision {
        self.current.load().compacted()
    }

    /// The revision up to which physical compaction is done; -1 when it never ran.
    pub fn compacted_physically(&self) -> Revision {
        self.current
            .load()
            .published
            .compacted_physically
            .load(Ordering::Acquire)
    }

    /// The newest applied log index.
    pub fn applied_index(&self) -> RaftIndex {
        self.current.load().published.applied_index.load(Ordering::Acquire)
    }

    /// Live keys.
    pub fn keys(&self) -> u64 {
        self.current.load().published.keys.load(Ordering::Relaxed)
    }

    /// Bytes of live keys and their values.
    pub fn key_bytes(&self) -> u64 {
        self.current.load().published.key_bytes.load(Ordering::Relaxed)
    }

    /// The sum of the digests of all live records.
    pub fn digest(&self) -> u64 {
        self.current.load().published.digest.load(Ordering::Relaxed)
    }

    /// Runs `read` on an unchanging picture of the store in which `revision` (0 or less: the newest) is whole.
    fn with_snapshot<T>(
        &self,
        revision: Revision,
        read: impl FnOnce(&Snapshot<'_, E::View<'_>>, Revision, &Pages) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let generation = self.current();
        loop {
            let current = generation.revision();
            // The order matters. The view may hold more than `current`, which reads look past. It holds no effect of a
            // compaction beyond `compacted` (a chain cut at a tombstone, a log that was dropped), since that is
            // published before the write that has the effect.
            let view = generation.engine.view();
            let compacted = generation.compacted();
            let at = if revision <= 0 { current } else { revision };
            if at > current {
                return Err(Error::FutureRevision.into());
            }
            if at < compacted {
                if revision <= 0 {
                    // The apply thread is about to publish a revision after the compacted one.
                    std::hint::spin_loop();
                    std::thread::yield_now();
                    continue;
                }
                return Err(Error::Compacted.into());
            }
            return read(
                &Snapshot {
                    view: &view,
                    overlay: None,
                    revision: current,
                    compacted,
                },
                at,
                &generation.published.pages,
            );
        }
    }

    /// Answers a range.
    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Failure> {
        if let Some(response) = self.newest_of_key(request)? {
            return Ok(response);
        }
        self.with_snapshot(request.revision, |snapshot, at, _| {
            let is_page = request.limit > 0 && !request.count_only && !matches!(request.span(), Span::Key(_));
            if !is_page || is_sorted_or_filtered(request) {
                return snapshot.range(request, at, None);
            }
            let known = self.known_count(request, at);
            let response = snapshot.range(request, at, known)?;
            if response.more
                && let Some(last) = response.kvs.last()
            {
                self.remember_rest(request, at, &last.key, response.count - response.kvs.len() as i64);
            }
            Ok(response)
        })
    }

    /// How many keys a range has at a revision, if a page before it said so.
    fn known_count(&self, request: &RangeRequest, at: Revision) -> Option<i64> {
        let rest = Rest {
            at,
            key: request.key.clone(),
            range_end: request.range_end.clone(),
        };
        self.rests.lock().counts.get(&rest).copied()
    }

    /// Notes how many keys there are after the last one of a page.
    fn remember_rest(&self, request: &RangeRequest, at: Revision, last: &[u8], count: i64) {
        let rest = Rest {
            at,
            key: [last, &[0]].concat().into(),
            // A copy: the request's own is a slice of all that its client sent.
            range_end: Bytes::copy_from_slice(&request.range_end),
        };
        self.rests.lock().remember(rest, count);
    }

    /// Answers a range as its encoding, without making a message of it; what is listed often is in memory as it goes
    /// out. `None` if the range [is no list](is_list), or with `cached_only` if the engine had to be read.
    pub fn list(&self, request: &RangeRequest, cached_only: bool) -> Result<Option<EncodedRange>, Failure> {
        let (start, end) = match request.span() {
            _ if !is_list(request) => return Ok(None),
            Span::Key(_) => return Ok(None),
            Span::Range(start, end) => (start, Some(end)),
            Span::From(start) => (start, None),
        };
        self.with_snapshot(request.revision, |snapshot, at, pages| {
            let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0);
            let known = limit.and_then(|_| self.known_count(request, at));
            let mut listing = Listing {
                at,
                limit: limit.unwrap_or(usize::MAX),
                counts_rest: known.is_none(),
                kvs: Vec::new(),
                keys: 0,
                count: 0,
                last: None,
            };
            if !listing.read(snapshot, pages, start, end, cached_only)? {
                return Ok(None);
            }
            let count = known.unwrap_or(listing.count);
            let more = count > listing.keys as i64;
            if more && let Some((content, to)) = listing.last {
                self.remember_rest(request, at, &content.last_key(to), count - listing.keys as i64);
            }
            Ok(Some(EncodedRange {
                header: ResponseHeader::at(snapshot.revision),
                kvs: listing.kvs,
                more,
                count,
            }))
        })
    }

    /// Answers what is asked most, the newest value of one key, without a view: a lookup needs none, as long as it finds
    /// nothing newer than the revision that it is to answer for. `None` if it does, or if something else is asked.
    fn newest_of_key(&self, request: &RangeRequest) -> Result<Option<RangeResponse>, Failure> {
        let Span::Key(key) = request.span() else {
            return Ok(None);
        };
        let is_plain = request.revision <= 0
            && !request.keys_only
            && !request.count_only
            && request.sort_order == SortOrder::None as i32
            && request.sort_target == SortTarget::Key as i32
            && !is_filtered(request);
        if !is_plain {
            return Ok(None);
        }
        let generation = self.current();
        // Before the lookup: what it finds, or finds missing, is what this revision says, unless it changed since.
        let revision = generation.revision();
        let record = generation.engine.get(keys::CUR, key)?;
        let record = record.map(|data| Record::decode(&data)).transpose()?;
        // After the lookup: a compaction beyond the revision may have taken a tombstone away that the lookup had to see.
        let is_newer = record.as_ref().is_some_and(|record| record.at.main > revision);
        if is_newer || generation.compacted() > revision {
            return Ok(None);
        }
        let live = record.filter(|record| !record.tombstone);
        let kvs: Vec<_> = live
            .map(|record| record.to_key_value(request.key.clone()))
            .into_iter()
            .collect();
        Ok(Some(RangeResponse {
            header: ResponseHeader::at(revision),
            count: kvs.len() as i64,
            kvs,
            more: false,
        }))
    }

    /// Answers one page of a range.
    pub fn scan(&self, request: &ScanRequest) -> Result<ScanPage, Failure> {
        self.with_snapshot(request.revision, |snapshot, at, _| snapshot.scan_page(request, at))
    }

    /// Answers a transaction that only reads. `reads` becomes how many ranges were read for it, even if it is refused.
    pub fn txn(&self, request: &TxnRequest, reads: &mut u64) -> Result<TxnResponse, Failure> {
        assert!(request.is_read_only(), "only the machine executes writes");
        self.with_snapshot(0, |snapshot, _, _| {
            *reads = 0;
            txn::execute_read_only(snapshot, request, reads)
        })
    }

    /// The keys attached to a lease, in order.
    pub fn attached_keys(&self, lease: LeaseId) -> Result<Vec<Bytes>, Failure> {
        let generation = self.current();
        let view = generation.engine.view();
        Ok(attached_keys(&view, None, lease)?)
    }
}

/// The keys attached to a lease, in order, as the view and the overlay have them.
pub(crate) fn attached_keys(
    view: &impl View,
    overlay: Option<&Overlay>,
    lease: LeaseId,
) -> Result<Vec<Bytes>, EngineError> {
    let (start, end) = keys::attached_range(lease);
    let mut found = std::collections::BTreeSet::new();
    let mut cursor = view.cursor(
        keys::LEASE,
        KeyRange {
            start: &start,
            end: Some(&end),
        },
    )?;
    cursor.seek_first()?;
    while let Some((key, _)) = cursor.entry() {
        found.insert(Bytes::copy_from_slice(&key[start.len()..]));
        cursor.next()?;
    }
    if let Some(overlay) = overlay {
        let of_lease = overlay
            .attached
            .range((lease, Bytes::new())..)
            .take_while(|((id, _), _)| *id == lease);
        for ((_, key), attached) in of_lease {
            if *attached {
                found.insert(key.clone());
            } else {
                found.remove(key);
            }
        }
    }
    Ok(found.into_iter().collect())
}

/// An engine view, and on top of it what an apply step has prepared.
pub(crate) struct Snapshot<'a, V> {
    pub(crate) view: &'a V,
    pub(crate) overlay: Option<&'a Overlay>,
    /// The newest revision to be seen.
    pub(crate) revision: Revision,
    pub(crate) compacted: Revision,
}

/// A key's record at some revision: read in place if it is the newest one, else found in the past.
enum Found<'a> {
    Newest(RecordRef<'a>),
    Past(Record),
}

impl Found<'_> {
    fn record(&self) -> RecordRef<'_> {
        match self {
            Found::Newest(record) => *record,
            Found::Past(record) => as_ref(record),
        }
    }
}

/// A range on its way to becoming an [`EncodedRange`].
struct Listing {
    at: Revision,
    /// Most keys to take.
    limit: usize,
    /// Whether those beyond the limit are counted.
    counts_rest: bool,
    kvs: Vec<Bytes>,
    /// Keys taken.
    keys: usize,
    /// Keys seen.
    count: i64,
    /// Where the last key taken is: the last of so many in there.
    last: Option<(Arc<pages::Content>, usize)>,
}

impl Listing {
    /// Takes the keys of a range; `false` if they are not all in pages and only those may be read.
    fn read<V: View>(
        &mut self,
        snapshot: &Snapshot<'_, V>,
        pages: &Pages,
        start: &[u8],
        end: Option<&[u8]>,
        cached_only: bool,
    ) -> Result<bool, Failure> {
        let mut key = Bytes::copy_from_slice(start);
        while end.is_none_or(|end| key < end) && (self.keys < self.limit || self.counts_rest) {
            let next = match pages.find(self.at, &key) {
                pages::Found::Page { content, end: page_end } => {
                    let first = content.before(&key);
                    let to = match (end, &page_end) {
                        (Some(end), Some(page_end)) if page_end <= end => content.len(),
                        (Some(end), _) => content.before(end),
                        (None, _) => content.len(),
                    };
                    self.count += (to - first) as i64;
                    let to = to.min(first.saturating_add(self.limit - self.keys));
                    self.take(&content, first, to);
                    page_end
                }
                pages::Found::Gap { .. } if cached_only => return Ok(false),
                pages::Found::Gap { end: gap_end, new } => {
                    let until = match (&gap_end, end) {
                        (Some(gap_end), Some(end)) => Some(end.min(gap_end)),
                        (Some(gap_end), None) => Some(&gap_end[..]),
                        (None, end) => end,
                    };
                    self.read_gap(snapshot, new.then_some(pages), &key, until)?;
                    gap_end
                }
            };
            match next {
                Some(next) => key = next,
                None => break,
            }
        }
        Ok(true)
    }

    fn take(&mut self, content: &Arc<pages::Content>, first: usize, to: usize) {
        if to > first {
            self.kvs.push(content.slice(first, to));
            self.keys += to - first;
            self.last = Some((content.clone(), to));
        }
    }

    /// Takes keys from the engine, and puts them into `pages`.
    fn read_gap<V: View>(
        &mut self,
        snapshot: &Snapshot<'_, V>,
        pages: Option<&Pages>,
        start: &Bytes,
        end: Option<&[u8]>,
    ) -> Result<(), Failure> {
        let span = end.map_or(Span::From(start), |end| Span::Range(start, end));
        let bytes_max = pages.map_or(0, Pages::list_bytes_max);
        let (mut read, mut bytes) = (Vec::new(), 0);
        let mut page_start = start.clone();
        let mut draft = Draft::default();
        let mut close = |this: &mut Self, draft: &mut Draft, end: Option<Bytes>| {
            let content = Arc::new(draft.finish());
            // What is in it was counted when it was taken.
            this.keys -= content.len();
            this.take(&content, 0, content.len());
            bytes += content.slice(0, content.len()).len();
            let start = std::mem::replace(&mut page_start, end.clone().unwrap_or_default());
            if bytes <= bytes_max {
                read.push(ReadPage { start, end, content });
            } else {
                // So long a list would take the place of all others.
                read.clear();
            }
        };
        let mut cut = false;
        snapshot.visit_newest(span, |key, newest| {
            if self.keys >= self.limit {
                cut = true;
                self.count += i64::from(self.counts_rest && snapshot.existed_at(newest, self.at)?);
                return Ok(self.counts_rest);
            }
            let Some(found) = snapshot.record_at(newest, self.at)? else {
                return Ok(true);
            };
            let record = found.record();
            if draft.is_full(key, &record) {
                close(self, &mut draft, Some(Bytes::copy_from_slice(key)));
            }
            draft.push(key, &record);
            self.keys += 1;
            self.count += 1;
            Ok(true)
        })?;
        let end = match draft.last_key() {
            // What comes after it was not read.
            Some(last) if cut => Some([last, &[0]].concat().into()),
            _ => end.map(Bytes::copy_from_slice),
        };
        if !cut || draft.len() > 0 {
            close(self, &mut draft, end);
        }
        if let Some(pages) = pages {
            pages.keep(self.at, read);
        }
        Ok(())
    }
}

impl<V: View> Snapshot<'_, V> {
    /// The newest record of a key, tombstones included.
    pub(crate) fn newest(&self, key: &[u8]) -> Result<Option<Record>, EngineError> {
        if let Some(record) = self.overlay.and_then(|overlay| overlay.cur.get(key)) {
            return Ok(Some(record.clone()));
        }
        self.view
            .get(keys::CUR, key)?
            .map(|data| Record::decode(&data))
            .transpose()
    }

    /// The record that a change points to as the key's previous one.
    pub(crate) fn previous(&self, prev: keys::Position, successor: keys::Position) -> Result<Record, EngineError> {
        if let Some(overlay) = self.overlay {
            let change = overlay.change_at(prev).or_else(|| overlay.kept_for(successor));
            if let Some(change) = change {
                return Ok(change.record.clone());
            }
        }
        // What compaction has passed is (or soon will be) with its successor, the rest in the log.
        let kept = || self.view.get(keys::REV, &keys::kept_key(successor));
        let logged = || self.view.get(keys::REV, &keys::log_key(prev));
        let data = if prev.main < self.compacted {
            match kept()? {
                Some(data) => Some(data),
                None => logged()?,
            }
        } else {
            logged()?
        };
        let data = data.ok_or_else(|| {
            let cause = format!("the change at {successor:?} points to {prev:?}, which is neither logged nor kept");
            keys::corrupt("rev", cause)
        })?;
        Ok(keys::decode_change_owned(&data)?.1)
    }

    /// What a key was at `at`, given its newest record: `None` if it did not exist.
    fn record_at<'r>(&self, newest: RecordRef<'r>, at: Revision) -> Result<Option<Found<'r>>, EngineError> {
        if newest.at.main <= at {
            return Ok((!newest.tombstone).then_some(Found::Newest(newest)));
        }
        let Some(mut record) = self.step_back(newest, at)? else {
            return Ok(None);
        };
        while record.at.main > at {
            match self.step_back(as_ref(&record), at)? {
                Some(earlier) => record = earlier,
                None => return Ok(None),
            }
        }
        Ok((!record.tombstone).then_some(Found::Past(record)))
    }

    /// From a record newer than `at`, the farthest one that can be reached at once on the way to what was at `at`.
    fn step_back(&self, record: RecordRef<'_>, at: Revision) -> Result<Option<Record>, EngineError> {
        // An anchor newer than `at` is not compacted away, since `at` is not: it is in the log.
        if let Some(anchor) = record.anchor_after(at) {
            return self.logged(anchor).map(Some);
        }
        record.prev.map(|prev| self.previous(prev, record.at)).transpose()
    }

    /// The record at a position that compaction has not passed.
    fn logged(&self, at: keys::Position) -> Result<Record, EngineError> {
        if let Some(change) = self.overlay.and_then(|overlay| overlay.change_at(at)) {
            return Ok(change.record.clone());
        }
        let data = self.view.get(keys::REV, &keys::log_key(at))?;
        let data = data.ok_or_else(|| keys::corrupt("rev", format!("the log lacks the change at {at:?}")))?;
        Ok(keys::decode_change_owned(&data)?.1)
    }

    /// Whether a key existed at `at`, without looking into the past where that is not needed.
    fn existed_at(&self, newest: RecordRef<'_>, at: Revision) -> Result<bool, EngineError> {
        if !newest.tombstone && newest.create <= at {
            return Ok(true);
        }
        Ok(self.record_at(newest, at)?.is_some())
    }

    /// What a key was at `at`.
    pub(crate) fn get_at(&self, key: &[u8], at: Revision) -> Result<Option<Record>, EngineError> {
        let Some(mut record) = self.newest(key)? else {
            return Ok(None);
        };
        while record.at.main > at {
            match self.step_back(as_ref(&record), at)? {
                Some(earlier) => record = earlier,
                None => return Ok(None),
            }
        }
        Ok((!record.tombstone).then_some(record))
    }

    /// Visits the newest record of every key in a range, in order and tombstones included, until told to stop.
    pub(crate) fn visit_newest(
        &self,
        span: Span<'_>,
        mut visit: impl FnMut(&[u8], RecordRef<'_>) -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        let (start, end) = match span {
            Span::Key(key) => {
                if let Some(record) = self.newest(key)? {
                    visit(key, as_ref(&record))?;
                }
                return Ok(());
            }
            Span::Range(start, end) if start >= end => return Ok(()),
            Span::Range(start, end) => (start, Some(end)),
            Span::From(start) => (start, None),
        };
        let mut cursor = self.view.cursor(keys::CUR, KeyRange { start, end })?;
        cursor.seek_first()?;
        let mut pending = self
            .overlay
            .map(|overlay| overlay.in_span(span))
            .into_iter()
            .flatten()
            .peekable();
        loop {
            let order = match (cursor.entry(), pending.peek()) {
                (None, None) => return Ok(()),
                (Some(_), None) => CmpOrdering::Less,
                (None, Some(_)) => CmpOrdering::Greater,
                (Some((key, _)), Some((changed, _))) => key.cmp(changed),
            };
            let go_on = if order == CmpOrdering::Less {
                let (key, data) = cursor.entry().expect("it stands on a key");
                visit(key, RecordRef::decode(data)?)?
            } else {
                let (key, record) = pending.next().expect("it was peeked at");
                visit(key, as_ref(record))?
            };
            if !go_on {
                return Ok(());
            }
            if order != CmpOrdering::Greater {
                cursor.next()?;
            }
        }
    }

    /// Visits what every key of a range was at `at`, in order, until told to stop.
    pub(crate) fn visit_at(
        &self,
        span: Span<'_>,
        at: Revision,
        mut visit: impl FnMut(&[u8], RecordRef<'_>) -> bool,
    ) -> Result<(), Failure> {
        self.visit_newest(span, |key, newest| {
            Ok(match self.record_at(newest, at)? {
                Some(Found::Newest(record)) => visit(key, record),
                Some(Found::Past(record)) => visit(key, as_ref(&record)),
                None => true,
            })
        })
    }

    /// Answers a range at revision `at`, which must be whole in this snapshot. The header carries the snapshot's own
    /// revision. With a count that is `known`, what lies beyond the limit is not looked at.
    pub(crate) fn range(
        &self,
        request: &RangeRequest,
        at: Revision,
        known: Option<i64>,
    ) -> Result<RangeResponse, Failure> {
        let order = SortOrder::try_from(request.sort_order).map_err(|_| Error::InvalidSortOption)?;
        let target = SortTarget::try_from(request.sort_target).map_err(|_| Error::InvalidSortOption)?;
        let filtered = is_filtered(request);
        // As in etcd, the order asked for decides whether the limit cuts before or after sorting. It then reads one key
        // more than the limit, and a target other than the key without an order sorts that one too, so that the cut may
        // take another.
        let in_key_order = is_in_key_order(order, target);
        let limit = usize::try_from(request.limit).unwrap_or(0);
        let fetch_max = if limit > 0 && in_key_order && !filtered {
            limit.saturating_add(1)
        } else {
            usize::MAX
        };
        let with_value = !request.keys_only || target == SortTarget::Value;

        let mut response = RangeResponse {
            header: ResponseHeader::at(self.revision),
            ..Default::default()
        };
        let mut count: i64 = 0;
        let mut gather = Gather::default();
        if request.count_only {
            self.visit_newest(request.span(), |_, newest| {
                count += i64::from(self.existed_at(newest, at)?);
                Ok(true)
            })?;
            response.count = count;
            return Ok(response);
        }
        if let Span::Key(key) = request.span() {
            if let Some(record) = self.get_at(key, at)? {
                count = 1;
                let mut kv = record.to_key_value(request.key.clone());
                if !with_value {
                    kv.value = Bytes::new();
                }
                gather.kvs.push(kv);
            }
        } else {
            self.visit_newest(request.span(), |key, newest| {
                if gather.kvs.len() >= fetch_max {
                    if known.is_some() {
                        return Ok(false);
                    }
                    count += i64::from(self.existed_at(newest, at)?);
                } else if let Some(found) = self.record_at(newest, at)? {
                    count += 1;
                    gather.push(key, &found, with_value);
                }
                Ok(true)
            })?;
        }
        let mut kvs = gather.kvs;
        if filtered {
            kvs.retain(|kv| {
                (request.max_mod_revision == 0 || kv.mod_revision <= request.max_mod_revision)
                    && (request.min_mod_revision == 0 || kv.mod_revision >= request.min_mod_revision)
                    && (request.max_create_revision == 0 || kv.create_revision <= request.max_create_revision)
                    && (request.min_create_revision == 0 || kv.create_revision >= request.min_create_revision)
            });
        }
        sort(&mut kvs, target, order);
        if limit > 0 && kvs.len() > limit {
            kvs.truncate(limit);
            response.more = true;
        }
        if request.keys_only {
            for kv in &mut kvs {
                kv.value = Bytes::new();
                // etcd answers keys alone from its index, which does not know leases.
                if target != SortTarget::Value {
                    kv.lease = 0;
                }
            }
        }
        response.kvs = kvs;
        response.count = known.unwrap_or(count);
        Ok(response)
    }

    /// Answers one page of a range in key order at revision `at`.
    pub(crate) fn scan_page(&self, request: &ScanRequest, at: Revision) -> Result<ScanPage, Failure> {
        let mut gather = Gather::default();
        let mut bytes = 0;
        let mut more = false;
        self.visit_newest(Span::new(&request.key, &request.range_end), |key, newest| {
            let Some(found) = self.record_at(newest, at)? else {
                return Ok(true);
            };
            // Never an empty page with more to come: the caller could not tell where to go on.
            let full = gather.kvs.len() >= request.keys_max || bytes >= request.bytes_max;
            if full && !gather.kvs.is_empty() {
                more = true;
                return Ok(false);
            }
            gather.push(key, &found, !request.keys_only);
            if request.keys_only
                && let Some(kv) = gather.kvs.last_mut()
            {
                kv.lease = 0;
            }
            bytes += gather.kvs.last().map_or(0, |kv| kv.key.len() + kv.value.len());
            Ok(true)
        })?;
        let header = ResponseHeader {
            revision: self.revision,
            ..Default::default()
        };
        Ok(ScanPage {
            revision: at,
            header,
            kvs: gather.kvs,
            more,
        })
    }
}

fn is_filtered(request: &RangeRequest) -> bool {
    request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0
}

fn is_in_key_order(order: SortOrder, target: SortTarget) -> bool {
    order == SortOrder::None || (target == SortTarget::Key && order == SortOrder::Ascend)
}

/// Whether [`Reader::list`] answers it: a range of more than one key, with values, in the order of keys.
pub fn is_list(request: &RangeRequest) -> bool {
    !matches!(request.span(), Span::Key(_))
        && !request.keys_only
        && !request.count_only
        && !is_sorted_or_filtered(request)
}

/// Whether its answer is anything but the first keys of the range in their order.
fn is_sorted_or_filtered(request: &RangeRequest) -> bool {
    let order = SortOrder::try_from(request.sort_order);
    let target = SortTarget::try_from(request.sort_target);
    // Without an order but with another target the first keys are taken and then sorted: what is left is not what
    // comes after the last of them.
    let in_key_order =
        matches!((order, target), (Ok(order), Ok(SortTarget::Key)) if is_in_key_order(order, SortTarget::Key));
    is_filtered(request) || !in_key_order
}

/// Reads an owned record as if in place.
pub(crate) fn as_ref(record: &Record) -> RecordRef<'_> {
    let Record {
        at,
        prev,
        depth,
        ref anchors,
        tombstone,
        create,
        version,
        lease,
        digest,
        ref value,
    } = *record;
    let anchors = keys::Anchors::Decoded(anchors);
    RecordRef {
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

/// Gathers keys and values into few allocations.
#[derive(Default)]
struct Gather {
    kvs: Vec<KeyValue>,
    arena: BytesMut,
}

impl Gather {
    fn push(&mut self, key: &[u8], found: &Found<'_>, with_value: bool) {
        let record = found.record();
        let bare = record.to_bare_key_value(Bytes::new());
        let value = if with_value { record.value } else { &[] };
        let len = key.len() + value.len();
        if self.arena.capacity() < len {
            self.arena = BytesMut::with_capacity(len.max(ARENA_BYTES));
        }
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        let mut key_and_value = self.arena.split().freeze();
        let value = key_and_value.split_off(key.len());
        self.kvs.push(KeyValue {
            key: key_and_value,
            value,
            ..bare
        });
    }
}

fn sort(kvs: &mut [KeyValue], target: SortTarget, order: SortOrder) {
    let compare: fn(&KeyValue, &KeyValue) -> CmpOrdering = match target {
        SortTarget::Key => |a, b| a.key.cmp(&b.key),
        SortTarget::Version => |a, b| a.version.cmp(&b.version),
        SortTarget::Create => |a, b| a.create_revision.cmp(&b.create_revision),
        SortTarget::Mod => |a, b| a.mod_revision.cmp(&b.mod_revision),
        SortTarget::Value => |a, b| a.value.cmp(&b.value),
    };
    match (target, order) {
        (SortTarget::Key, SortOrder::None | SortOrder::Ascend) => {}
        (_, SortOrder::None | SortOrder::Ascend) => kvs.sort_by(compare),
        (_, SortOrder::Descend) => kvs.sort_by(|a, b| compare(b, a)),
    }
}
