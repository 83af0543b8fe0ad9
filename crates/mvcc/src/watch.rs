//! Brings events to watchers: every revision once, whole and in order.
//!
//! A watcher is either *live* or *behind*. The apply thread hands the events of each commit to the live watchers that they
//! concern, those of several revisions as one, through a bounded queue per stream. When a queue is full, its stream's watchers fall behind from that
//! revision on, and nothing more is kept in memory for them. A watcher that is behind, because of that or because it
//! asked for history, is caught up from the log in storage, piece by piece, by the thread that serves its stream, once
//! the queue holds nothing of it any more; when it has seen everything, it is live again.
//!
//! Locks: the hub's before a stream's; neither is held while storage is read.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};

use api::kv::{Event, EventType, KeyValue};
use api::store::{Events, WatchCreate, WatchCreated, WatchError, WatchOutput, WatchStream};
use api::{Revision, Span};
use bytes::Bytes;
use hashbrown::HashMap;
use parking_lot::Mutex;
use storage::{Cursor, Engine, EngineError, KeyRange, View};

use crate::keys::{self, Position};
use crate::machine::Options;
use crate::read::{Reader, Snapshot};

mod interest;

use interest::{Interest, Interests};

/// Most log entries that are read to catch a watcher up before its thread may do something else.
const CATCH_UP_SCAN_MAX: usize = 10_000;
/// Most revisions in one catch-up answer (etcd's `watchBatchMaxRevs`).
const CATCH_UP_REVISIONS_MAX: usize = 1000;
/// Most bytes of events in one catch-up answer, exceeded by one revision at most. Each watcher that is behind holds one
/// while its client takes it, or does not.
const CATCH_UP_BYTES_MAX: usize = 256 << 10;
/// Most revisions' events, and most bytes of them, that go to a live watcher as one: what one commit brings costs each
/// watcher one answer, not one for each revision. Further bounded by a share of the stream's buffer.
const TOGETHER_EVENTS_MAX: usize = 256;
const TOGETHER_BYTES_MAX: usize = 256 << 10;
/// The part of a stream's buffer that one answer may take, so that bounds are kept about as well as with small ones.
const TOGETHER_SHARE: usize = 2;
/// What an event takes in memory besides its keys and values, about. One revision is never split, so its events may
/// exceed every bound here once; a request's own limits bound them.
const EVENT_OVERHEAD_BYTES: usize = 64;

/// Who progress of all watchers of a stream is addressed to.
const EVERYBODY: i64 = -1;

/// Where all watchers meet the apply thread.
pub struct Hub<E> {
    reader: Reader<E>,
    buffer_events_max: usize,
    buffer_bytes_max: usize,
    watchers: AtomicUsize,
    streams: AtomicUsize,
    behind: AtomicUsize,
    pending_events: AtomicUsize,
    events: AtomicU64,
    state: Mutex<HubState>,
    failed: Mutex<Option<EngineError>>,
}

struct HubState {
    /// Up to here events were handed out.
    revision: Revision,
    /// What live watchers want to see.
    interests: Interests,
    next_stream: u64,
}

/// How much there is to watch over, for the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubStats {
    /// Watchers, on all streams.
    pub watchers: usize,
    /// Streams.
    pub streams: usize,
    /// Watchers that are being caught up from storage.
    pub behind: usize,
    /// Events that wait in memory for their clients.
    pub pending_events: usize,
    /// Events told, each as often as there were watchers that were told of it.
    pub events: u64,
}

impl<E: Engine> Hub<E> {
    pub(crate) fn new(reader: Reader<E>, options: &Options) -> Self {
        let revision = reader.revision();
        Hub {
            reader,
            buffer_events_max: options.watch_buffer_events_max,
            buffer_bytes_max: options.watch_buffer_bytes_max,
            watchers: AtomicUsize::new(0),
            streams: AtomicUsize::new(0),
            behind: AtomicUsize::new(0),
            pending_events: AtomicUsize::new(0),
            events: AtomicU64::new(0),
            state: Mutex::new(HubState {
                revision,
                interests: Interests::default(),
                next_stream: 0,
            }),
            failed: Mutex::new(None),
        }
    }

    pub(crate) fn reader(&self) -> &Reader<E> {
        &self.reader
    }

    /// Whether anybody watches anything.
    pub(crate) fn is_watched(&self) -> bool {
        self.watchers.load(Ordering::Acquire) > 0
    }

    /// How much there is to watch over.
    pub fn stats(&self) -> HubStats {
        HubStats {
            watchers: self.watchers.load(Ordering::Relaxed),
            streams: self.streams.load(Ordering::Relaxed),
            behind: self.behind.load(Ordering::Relaxed),
            pending_events: self.pending_events.load(Ordering::Relaxed),
            events: self.events.load(Ordering::Relaxed),
        }
    }

    /// The engine's failure, if a watcher met one: the node must stop.
    pub fn failure(&self) -> Option<EngineError> {
        self.failed.lock().clone()
    }

    /// A new stream without watchers.
    pub fn stream(self: &Arc<Self>) -> Stream<E> {
        let mut state = self.state.lock();
        state.next_stream += 1;
        self.streams.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(StreamShared {
            id: state.next_stream,
            state: Mutex::default(),
        });
        Stream {
            hub: self.clone(),
            shared,
        }
    }

    /// Hands out the events of everything up to `revision`, in order. `None` says that nobody watched when they were
    /// prepared, so none were gathered; whoever came since reads them from storage.
    pub(crate) fn publish(&self, revision: Revision, events: Option<Vec<Event>>) {
        let mut state = self.state.lock();
        let state = &mut *state;
        assert!(revision >= state.revision, "revisions never go back");
        if revision == state.revision {
            return;
        }
        match events {
            Some(events) => {
                let events_max = (self.buffer_events_max / TOGETHER_SHARE).min(TOGETHER_EVENTS_MAX);
                let bytes_max = (self.buffer_bytes_max / TOGETHER_SHARE).min(TOGETHER_BYTES_MAX);
                let (mut together, mut bytes) = (0, 0);
                let mut rest = events.into_iter().peekable();
                while let Some(at) = rest.peek().map(revision_of) {
                    assert!(at > state.revision, "every revision is handed out once");
                    while let Some(event) = rest.next_if(|event| revision_of(event) == at) {
                        together += 1;
                        bytes += event_bytes(&event);
                        state.interests.collect(event);
                    }
                    // Between revisions only, so that none is split.
                    if together >= events_max || bytes >= bytes_max || rest.peek().is_none() {
                        (together, bytes) = (0, 0);
                        state
                            .interests
                            .deliver(|interest, events| self.deliver(interest, events));
                    }
                }
            }
            None => {
                state.interests.for_each(|interest| {
                    let members = std::mem::take(&mut interest.members);
                    for member in members {
                        if let Some(stream) = member.stream.upgrade() {
                            let mut stream = stream.state.lock();
                            self.fall_behind(&mut stream, member.watch_id, state.revision + 1);
                            stream.wake();
                        }
                    }
                });
                state.interests.forget_unused();
            }
        }
        state.revision = revision;
    }

    /// Queues the events of some revisions for every member of an interest; drops members that are full or gone.
    fn deliver(&self, interest: &mut Interest, events: &Arc<Events>) {
        let (Some(first), Some(last)) = (events.first(), events.last()) else {
            return;
        };
        let (first, revision) = (revision_of(first), revision_of(last));
        let bytes: usize = events.iter().map(event_bytes).sum();
        interest.deliver_by_stream(|stream, members| {
            let mut stream = stream.state.lock();
            let stream = &mut *stream;
            let full = stream.queued_events >= self.buffer_events_max
                || (stream.queued_bytes > 0 && stream.queued_bytes + bytes > self.buffer_bytes_max);
            let mut receivers = VecDeque::with_capacity(members.len());
            members.retain(|member| {
                let Some(watcher) = stream.watchers.get_mut(&member.watch_id) else {
                    return false;
                };
                if revision < watcher.next {
                    return true;
                }
                if full {
                    self.fall_behind(stream, member.watch_id, first);
                    return false;
                }
                let begins_within = (first < watcher.next).then_some(watcher.next);
                watcher.next = revision + 1;
                watcher.quiet = false;
                match begins_within {
                    None => receivers.push_back(member.watch_id),
                    Some(next) => {
                        let wanted = events.iter().filter(|event| revision_of(event) >= next);
                        let events = Events::new(wanted.cloned().collect());
                        self.queue_events(stream, [member.watch_id].into(), revision, &events);
                    }
                }
                true
            });
            if !receivers.is_empty() {
                self.queue_events(stream, receivers, revision, events);
            }
            stream.wake();
        });
    }

    fn queue_events(
        &self,
        stream: &mut StreamState,
        receivers: VecDeque<i64>,
        revision: Revision,
        events: &Arc<Events>,
    ) {
        self.pending_events
            .fetch_add(receivers.len() * events.len(), Ordering::Relaxed);
        stream.push(Item::Events {
            receivers,
            revision,
            events: events.clone(),
        });
    }

    /// A live watcher has been given everything that concerns it before revision `from`, and nothing from there on.
    fn fall_behind(&self, stream: &mut StreamState, watch_id: i64, from: Revision) {
        let after = stream.pushed;
        let watcher = stream
            .watchers
            .get_mut(&watch_id)
            .expect("members are watchers of their stream");
        assert!(watcher.live, "only live watchers are members");
        watcher.live = false;
        // It may have been given nothing for long, and all of that time be compacted away by now.
        watcher.next = watcher.next.max(from);
        stream.behind.push_back(Behind { watch_id, after });
        self.behind.fetch_add(1, Ordering::Relaxed);
    }
}

fn revision_of(event: &Event) -> Revision {
    event.kv.as_ref().expect("every event has its key").mod_revision
}

fn event_bytes(event: &Event) -> usize {
    let size = |kv: &KeyValue| kv.key.len() + kv.value.len();
    EVENT_OVERHEAD_BYTES + event.kv.as_ref().map_or(0, size) + event.prev_kv.as_ref().map_or(0, size)
}

/// What the hub and the thread that serves a stream share.
pub(crate) struct StreamShared {
    id: u64,
    state: Mutex<StreamState>,
}

#[derive(Default)]
struct StreamState {
    watchers: HashMap<i64, Watcher>,
    next_id: i64,
    queue: VecDeque<Queued>,
    queued_events: usize,
    queued_bytes: usize,
    /// Items ever queued.
    pushed: u64,
    /// Watchers to catch up, in turn.
    behind: VecDeque<Behind>,
    /// Whether the last output was one of catching up, so that what is queued comes next.
    caught_up: bool,
    /// Whoever waits for the next output.
    waker: Option<Waker>,
}

struct Queued {
    /// How many items were queued before it, ever. Those in the queue have gaps where some were dropped.
    number: u64,
    item: Item,
}

enum Item {
    /// Changes that several watchers of the stream are to be told, in the same words. In memory they are there once, and
    /// so they count once.
    Events {
        /// Who was not told yet; never empty.
        receivers: VecDeque<i64>,
        revision: Revision,
        events: Arc<Events>,
    },
    Progress {
        watch_id: i64,
        revision: Revision,
    },
}

impl Item {
    /// How many events it keeps in memory, and about how many bytes.
    fn size(&self) -> (usize, usize) {
        match self {
            Item::Events { events, .. } => (events.len(), events.iter().map(event_bytes).sum()),
            Item::Progress { .. } => (0, 0),
        }
    }
}

/// A watcher to be caught up once nothing is queued any more of the items before it fell behind, the first `after`.
struct Behind {
    watch_id: i64,
    after: u64,
}

struct Watcher {
    key: Bytes,
    range_end: Bytes,
    no_put: bool,
    no_delete: bool,
    prev_kv: bool,
    progress_notify: bool,
    /// The revision it asked to begin at; 0 for whatever came next.
    start: Revision,
    /// The next revision it has not been given.
    next: Revision,
    live: bool,
    /// Whether it had no events since the last progress interval.
    quiet: bool,
}

impl StreamState {
    /// Queues an item. Whoever waits for it is to be woken then.
    fn push(&mut self, item: Item) {
        let (events, bytes) = item.size();
        self.queue.push_back(Queued {
            number: self.pushed,
            item,
        });
        self.pushed += 1;
        self.queued_events += events;
        self.queued_bytes += bytes;
    }

    /// An item is gone from the queue.
    fn forget(&mut self, item: &Item) {
        let (events, bytes) = item.size();
        self.queued_events -= events;
        self.queued_bytes -= bytes;
    }

    /// The next output that is queued.
    fn pop(&mut self) -> Option<WatchOutput> {
        let Queued { item, .. } = self.queue.front_mut()?;
        let output = match item {
            Item::Events {
                receivers,
                revision,
                events,
            } => {
                let watch_id = receivers.pop_front().expect("an item without receivers is dropped");
                let output = WatchOutput::Events {
                    watch_id,
                    revision: *revision,
                    events: events.clone(),
                };
                if !receivers.is_empty() {
                    return Some(output);
                }
                output
            }
            Item::Progress { watch_id, revision } => WatchOutput::Progress {
                watch_id: *watch_id,
                revision: *revision,
            },
        };
        let Queued { item, .. } = self.queue.pop_front().expect("it was just looked at");
        self.forget(&item);
        Some(output)
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Drops what is queued for a watcher; returns how many events it was not told.
    fn drop_queued(&mut self, unwanted: i64) -> usize {
        let mut untold = 0;
        let mut queue = std::mem::take(&mut self.queue);
        queue.retain_mut(|Queued { item, .. }| {
            let gone = match item {
                Item::Events { receivers, events, .. } => {
                    let before = receivers.len();
                    receivers.retain(|watch_id| *watch_id != unwanted);
                    untold += (before - receivers.len()) * events.len();
                    receivers.is_empty()
                }
                Item::Progress { watch_id, .. } => *watch_id == unwanted,
            };
            if gone {
                self.forget(item);
            }
            !gone
        });
        self.queue = queue;
        untold
    }

    fn push_progress(&mut self, watch_id: i64, revision: Revision) {
        self.push(Item::Progress { watch_id, revision });
        self.wake();
    }

    /// How many progress answers wait: they are not events, so they have a bound of their own.
    fn is_flooded(&self) -> bool {
        self.queue.len() > self.queued_events + self.watchers.len() + 64
    }
}

/// Watchers that share one channel to their client.
pub struct Stream<E: Engine> {
    hub: Arc<Hub<E>>,
    shared: Arc<StreamShared>,
}

/// What a piece of catching up came to.
enum CaughtUp {
    Events {
        revision: Revision,
        events: Vec<Event>,
        next: Revision,
    },
    Nothing {
        next: Revision,
    },
    Compacted {
        compacted: Revision,
    },
}

impl<E: Engine> Stream<E> {
    /// Catches one watcher up by a bounded amount. `None`: try again, there may be more to do.
    fn catch_up(&mut self, watch_id: i64) -> Option<WatchOutput> {
        let (next, filter) = {
            let state = self.shared.state.lock();
            let watcher = state.watchers.get(&watch_id)?;
            let filter = Filter {
                key: watcher.key.clone(),
                range_end: watcher.range_end.clone(),
                no_put: watcher.no_put,
                no_delete: watcher.no_delete,
                prev_kv: watcher.prev_kv,
            };
            (watcher.next, filter)
        };
        let caught_up = match self.hub.reader.changes(next, &filter) {
            Ok(caught_up) => caught_up,
            Err(error) => {
                // The node is about to stop; this watcher hears nothing wrong meanwhile.
                self.hub.failed.lock().get_or_insert(error);
                return None;
            }
        };
        match caught_up {
            CaughtUp::Compacted { compacted } => {
                self.remove(watch_id);
                Some(WatchOutput::Compacted {
                    watch_id,
                    compact_revision: compacted,
                })
            }
            CaughtUp::Events { revision, events, next } => {
                self.advance(watch_id, next, true);
                self.hub.events.fetch_add(events.len() as u64, Ordering::Relaxed);
                Some(WatchOutput::Events {
                    watch_id,
                    revision,
                    events: Events::new(events),
                })
            }
            CaughtUp::Nothing { next } => {
                self.advance(watch_id, next, false);
                None
            }
        }
    }

    /// Notes how far a watcher was caught up, and makes it live if that is all there is.
    fn advance(&self, watch_id: i64, next: Revision, had_events: bool) {
        let mut hub = self.hub.state.lock();
        let mut stream = self.shared.state.lock();
        let Some(watcher) = stream.watchers.get_mut(&watch_id) else {
            return;
        };
        watcher.next = next;
        watcher.quiet &= !had_events;
        if next > hub.revision {
            watcher.live = true;
            self.hub.behind.fetch_sub(1, Ordering::Relaxed);
            hub.interests
                .join(watcher.interest(), Arc::downgrade(&self.shared), watch_id);
        } else {
            stream.behind.push_back(Behind { watch_id, after: 0 });
        }
    }

    /// Removes a watcher and what is queued for it; `false` if there is none of that id.
    fn remove(&mut self, watch_id: i64) -> bool {
        let mut hub = self.hub.state.lock();
        let mut stream = self.shared.state.lock();
        let stream = &mut *stream;
        let Some(watcher) = stream.watchers.remove(&watch_id) else {
            return false;
        };
        self.hub.watchers.fetch_sub(1, Ordering::AcqRel);
        if watcher.live {
            hub.interests.leave(&watcher.interest(), self.shared.id, watch_id);
        } else {
            self.hub.behind.fetch_sub(1, Ordering::Relaxed);
            stream.behind.retain(|behind| behind.watch_id != watch_id);
        }
        let untold = stream.drop_queued(watch_id);
        self.hub.pending_events.fetch_sub(untold, Ordering::Relaxed);
        true
    }
}

impl Watcher {
    /// Whether it has been given everything up to `revision`. Before it begins there is nothing to say, as in etcd.
    fn has_progress(&self, revision: Revision) -> bool {
        self.live && self.start <= revision
    }

    fn interest(&self) -> interest::Key {
        interest::Key {
            key: self.key.clone(),
            range_end: self.range_end.clone(),
            no_put: self.no_put,
            no_delete: self.no_delete,
            prev_kv: self.prev_kv,
        }
    }
}

impl<E: Engine> WatchStream for Stream<E> {
    fn create(&mut self, create: WatchCreate) -> Result<WatchCreated, WatchError> {
        let WatchCreate {
            id,
            mut key,
            range_end,
            start_revision,
            no_put,
            no_delete,
            prev_kv,
            progress_notify,
        } = create;
        // First of all, as in etcd: it consumes no id, whatever else is wrong.
        if start_revision < 0 {
            return Err(WatchError::NegativeRevision);
        }
        if key.is_empty() {
            key = Bytes::from_static(&[0]);
        }
        if let Span::Range(start, end) = Span::new(&key, &range_end)
            && start >= end
        {
            return Err(WatchError::EmptyRange);
        }
        // Copies: what came is a slice of all that its client sent, which a watcher must not keep alive.
        let (key, range_end) = (Bytes::copy_from_slice(&key), Bytes::copy_from_slice(&range_end));
        let mut hub = self.hub.state.lock();
        let mut stream = self.shared.state.lock();
        let watch_id = match id {
            Some(id) if stream.watchers.contains_key(&id) => return Err(WatchError::DuplicateId),
            Some(id) => id,
            None => {
                while stream.watchers.contains_key(&stream.next_id) {
                    stream.next_id += 1;
                }
                stream.next_id += 1;
                stream.next_id - 1
            }
        };
        // From here on the apply thread gathers events. What it is preparing at this moment it may not gather, and then
        // says so when it publishes, which the lock holds up until this watcher is in place.
        self.hub.watchers.fetch_add(1, Ordering::AcqRel);
        let revision = self.hub.reader.revision();
        let next = if start_revision == 0 {
            revision + 1
        } else {
            start_revision
        };
        let live = next > hub.revision;
        let watcher = Watcher {
            key,
            range_end,
            no_put,
            no_delete,
            prev_kv,
            progress_notify,
            start: start_revision,
            next,
            live,
            // The first interval after its creation counts as eventful unless it is live and nothing came.
            quiet: true,
        };
        if live {
            hub.interests
                .join(watcher.interest(), Arc::downgrade(&self.shared), watch_id);
        } else {
            // Progress of all that waits to be taken was true when it was asked for. To a client that has seen this one
            // created it would say that its history was sent.
            let of_all = |item: &Item| matches!(item, Item::Progress { watch_id, .. } if *watch_id == EVERYBODY);
            stream.queue.retain(|queued| !of_all(&queued.item));
            let after = stream.pushed;
            stream.behind.push_back(Behind { watch_id, after });
            self.hub.behind.fetch_add(1, Ordering::Relaxed);
        }
        stream.watchers.insert(watch_id, watcher);
        stream.wake();
        Ok(WatchCreated { watch_id, revision })
    }

    fn cancel(&mut self, watch_id: i64) -> bool {
        self.remove(watch_id)
    }

    fn request_progress(&mut self) {
        let hub = self.hub.state.lock();
        let mut stream = self.shared.state.lock();
        if !stream.watchers.is_empty()
            && stream
                .watchers
                .values()
                .all(|watcher| watcher.has_progress(hub.revision))
            && !stream.is_flooded()
        {
            // Everything up to this revision is in the queue already, since both locks are held.
            stream.push_progress(EVERYBODY, hub.revision);
        }
    }

    fn notify_progress(&mut self) {
        let hub = self.hub.state.lock();
        let mut stream = self.shared.state.lock();
        let mut due = Vec::new();
        for (&id, watcher) in &mut stream.watchers {
            if std::mem::replace(&mut watcher.quiet, true)
                && watcher.progress_notify
                && watcher.has_progress(hub.revision)
            {
                due.push(id);
            }
        }
        due.sort_unstable();
        for id in due {
            if !stream.is_flooded() {
                stream.push_progress(id, hub.revision);
            }
        }
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<WatchOutput> {
        let behind = {
            let mut stream = self.shared.state.lock();
            let stream = &mut *stream;
            // A watcher that is behind takes its turn as soon as nothing of it is queued any more, so that others on the
            // stream, however busy, cannot hold it up for ever. Nor can it, however long its history, hold up others:
            // it and the queue take turns.
            let taken = stream.queue.front().map_or(stream.pushed, |queued| queued.number);
            let queue_first = std::mem::take(&mut stream.caught_up) && !stream.queue.is_empty();
            let mut due = stream.behind.iter();
            match due.position(|behind| behind.after <= taken).filter(|_| !queue_first) {
                Some(at) => {
                    stream.caught_up = true;
                    stream.behind.remove(at).map(|behind| behind.watch_id)
                }
                None => {
                    if let Some(output) = stream.pop() {
                        if let WatchOutput::Events { events, .. } = &output {
                            self.hub.pending_events.fetch_sub(events.len(), Ordering::Relaxed);
                            self.hub.events.fetch_add(events.len() as u64, Ordering::Relaxed);
                        }
                        return Poll::Ready(output);
                    }
                    assert!(stream.behind.is_empty(), "with an empty queue everybody has a turn");
                    stream.waker = Some(context.waker().clone());
                    None
                }
            }
        };
        let Some(watch_id) = behind else { return Poll::Pending };
        if let Some(output) = self.catch_up(watch_id) {
            return Poll::Ready(output);
        }
        // A bounded piece of work is done: let others have the thread, then go on.
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<E: Engine> Drop for Stream<E> {
    fn drop(&mut self) {
        // All at once: removing its watchers one by one would look at everything queued, and at everybody who watches
        // the same, once for each of them.
        let mut hub = self.hub.state.lock();
        let mut stream = self.shared.state.lock();
        let stream = &mut *stream;
        let untold = |Queued { item, .. }: Queued| match item {
            Item::Events { receivers, events, .. } => receivers.len() * events.len(),
            Item::Progress { .. } => 0,
        };
        let untold = stream.queue.drain(..).map(untold).sum();
        self.hub.pending_events.fetch_sub(untold, Ordering::Relaxed);
        (stream.queued_events, stream.queued_bytes) = (0, 0);
        stream.behind.clear();
        let behind = stream.watchers.values().filter(|watcher| !watcher.live).count();
        self.hub.behind.fetch_sub(behind, Ordering::Relaxed);
        self.hub.watchers.fetch_sub(stream.watchers.len(), Ordering::AcqRel);
        let live = stream.watchers.drain().filter(|(_, watcher)| watcher.live);
        let interests: hashbrown::HashSet<interest::Key> = live.map(|(_, watcher)| watcher.interest()).collect();
        for interest in interests {
            hub.interests.leave_all(&interest, self.shared.id);
        }
        self.hub.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Which changes a watcher wants to see.
struct Filter {
    key: Bytes,
    range_end: Bytes,
    no_put: bool,
    no_delete: bool,
    prev_kv: bool,
}

impl<E: Engine> Reader<E> {
    /// The changes from revision `from` on that pass the filter, up to a bound.
    fn changes(&self, from: Revision, filter: &Filter) -> Result<CaughtUp, EngineError> {
        let generation = self.current();
        let current = generation.revision();
        let view = generation.engine.view();
        let compacted = generation.compacted();
        if from < compacted {
            return Ok(CaughtUp::Compacted { compacted });
        }
        let snapshot = Snapshot {
            view: &view,
            overlay: None,
            revision: current,
            compacted,
        };
        let span = Span::new(&filter.key, &filter.range_end);
        let (start, end) = (
            keys::log_key(Position::start_of(from)),
            keys::log_key(Position::start_of(current.max(from - 1) + 1)),
        );
        let mut cursor = view.cursor(
            keys::REV,
            KeyRange {
                start: &start,
                end: Some(&end),
            },
        )?;
        cursor.seek_first()?;
        let mut events: Vec<Event> = Vec::new();
        let (mut scanned, mut bytes, mut revisions, mut last) = (0, 0, 0, from - 1);
        while let Some((log_key, data)) = cursor.entry() {
            let at = keys::position_of(log_key)?;
            if at.main != last {
                // Stop between revisions only, never within one.
                let full =
                    scanned >= CATCH_UP_SCAN_MAX || revisions >= CATCH_UP_REVISIONS_MAX || bytes >= CATCH_UP_BYTES_MAX;
                if full {
                    let next = at.main;
                    return Ok(match events.is_empty() {
                        true => CaughtUp::Nothing { next },
                        false => CaughtUp::Events {
                            revision: current,
                            events,
                            next,
                        },
                    });
                }
                last = at.main;
            }
            scanned += 1;
            let (key, record) = keys::decode_change(data)?;
            let wanted = if record.tombstone {
                !filter.no_delete
            } else {
                !filter.no_put
            };
            if wanted && span.contains(key) {
                let key = Bytes::copy_from_slice(key);
                let (kind, kv) = if record.tombstone {
                    let kv = KeyValue {
                        key: key.clone(),
                        mod_revision: at.main,
                        ..Default::default()
                    };
                    (EventType::Delete, kv)
                } else {
                    (EventType::Put, record.to_owned().to_key_value(key.clone()))
                };
                // What creates a key has no value before it, even if the same revision deleted the key first.
                let creates = !record.tombstone && record.create == at.main;
                let prev_kv = if filter.prev_kv && !creates && at.main > compacted {
                    snapshot.value_before(&key, record.prev, at)?
                } else {
                    None
                };
                let event = Event {
                    r#type: kind as i32,
                    kv: Some(kv),
                    prev_kv,
                };
                bytes += event_bytes(&event);
                if events.last().is_none_or(|event| revision_of(event) != at.main) {
                    revisions += 1;
                }
                events.push(event);
            }
            cursor.next()?;
        }
        let next = current.max(from - 1) + 1;
        Ok(match events.is_empty() {
            true => CaughtUp::Nothing { next },
            false => CaughtUp::Events {
                revision: current,
                events,
                next,
            },
        })
    }
}

impl<V: View> Snapshot<'_, V> {
    /// The key's value before the revision of a change.
    fn value_before(
        &self,
        key: &Bytes,
        mut prev: Option<Position>,
        change: Position,
    ) -> Result<Option<KeyValue>, EngineError> {
        let mut successor = change;
        while let Some(position) = prev {
            let record = self.previous(position, successor)?;
            if record.at.main < change.main {
                return Ok((!record.tombstone).then(|| record.to_key_value(key.clone())));
            }
            (prev, successor) = (record.prev, record.at);
        }
        Ok(None)
    }
}

pub(crate) type WeakStream = Weak<StreamShared>;
