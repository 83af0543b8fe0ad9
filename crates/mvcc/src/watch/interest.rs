//! Finds the watchers that an event concerns.
//!
//! Watchers that want the same (many clients watching one prefix) share one [`Interest`], so that an event is matched
//! and gathered once for all of them. Interests are found by exact key, by prefix (one look-up for each length of prefix
//! that is in use), or, for ranges of any other form, by their start.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use api::Span;
use api::kv::{Event, EventType};
use api::store::Events;
use bytes::Bytes;
use hashbrown::HashMap;

use super::{StreamShared, WeakStream};

/// What a watcher wants to see.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) key: Bytes,
    pub(super) range_end: Bytes,
    pub(super) no_put: bool,
    pub(super) no_delete: bool,
    pub(super) prev_kv: bool,
}

/// One watcher of an interest.
pub(super) struct Member {
    pub(super) stream: WeakStream,
    stream_id: u64,
    pub(super) watch_id: i64,
}

/// Watchers that want the same.
pub(super) struct Interest {
    key: Key,
    /// Those of one stream stand together.
    pub(super) members: Vec<Member>,
    /// The events of the revisions that are being handed out.
    gathered: Vec<Event>,
}

/// All interests of live watchers.
#[derive(Default)]
pub(super) struct Interests {
    slots: Vec<Option<Interest>>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
    exact: HashMap<Bytes, Vec<usize>>,
    prefix: HashMap<Bytes, Vec<usize>>,
    /// How many distinct prefixes there are of each length.
    prefix_lengths: BTreeMap<usize, usize>,
    /// Everything else, by the start of the range.
    ranges: BTreeMap<Bytes, Vec<usize>>,
    touched: Vec<usize>,
}

/// The end of the range of all keys with a prefix; `None` if the prefix is all 0xff and the range open.
fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

enum Shape {
    Exact,
    Prefix,
    Range,
}

impl Key {
    fn span(&self) -> Span<'_> {
        Span::new(&self.key, &self.range_end)
    }

    fn shape(&self) -> Shape {
        match self.span() {
            Span::Key(_) => Shape::Exact,
            Span::Range(start, end) if prefix_end(start).is_some_and(|prefix_end| prefix_end == end) => Shape::Prefix,
            Span::Range(..) | Span::From(_) => Shape::Range,
        }
    }
}

impl Interests {
    /// Adds a watcher.
    pub(super) fn join(&mut self, key: Key, stream: WeakStream, watch_id: i64) {
        let slot = match self.by_key.get(&key) {
            Some(slot) => *slot,
            None => self.add(key),
        };
        let stream_id = stream.upgrade().map_or(0, |stream| stream.id);
        let interest = self.slots[slot].as_mut().expect("the index holds used slots only");
        let member = Member {
            stream,
            stream_id,
            watch_id,
        };
        let at = interest.members.partition_point(|other| other.stream_id <= stream_id);
        interest.members.insert(at, member);
    }

    fn add(&mut self, key: Key) -> usize {
        let slot = self.free.pop().unwrap_or(self.slots.len());
        match key.shape() {
            Shape::Exact => self.exact.entry(key.key.clone()).or_default().push(slot),
            Shape::Prefix => {
                let slots = self.prefix.entry(key.key.clone()).or_default();
                if slots.is_empty() {
                    *self.prefix_lengths.entry(key.key.len()).or_default() += 1;
                }
                slots.push(slot);
            }
            Shape::Range => self.ranges.entry(key.key.clone()).or_default().push(slot),
        }
        self.by_key.insert(key.clone(), slot);
        let interest = Some(Interest {
            key,
            members: Vec::new(),
            gathered: Vec::new(),
        });
        if slot == self.slots.len() {
            self.slots.push(interest);
        } else {
            self.slots[slot] = interest;
        }
        slot
    }

    /// Removes a watcher.
    pub(super) fn leave(&mut self, key: &Key, stream_id: u64, watch_id: i64) {
        let Some(&slot) = self.by_key.get(key) else { return };
        let interest = self.slots[slot].as_mut().expect("the index holds used slots only");
        interest
            .members
            .retain(|member| member.stream_id != stream_id || member.watch_id != watch_id);
        if interest.members.is_empty() {
            self.forget(slot);
        }
    }

    /// Removes all watchers of a stream that want this.
    pub(super) fn leave_all(&mut self, key: &Key, stream_id: u64) {
        let Some(&slot) = self.by_key.get(key) else { return };
        let interest = self.slots[slot].as_mut().expect("the index holds used slots only");
        interest.members.retain(|member| member.stream_id != stream_id);
        if interest.members.is_empty() {
            self.forget(slot);
        }
    }

    fn forget(&mut self, slot: usize) {
        let Some(Interest { key, .. }) = self.slots[slot].take() else {
            return;
        };
        self.free.push(slot);
        self.by_key.remove(&key);
        match key.shape() {
            Shape::Exact => remove_slot(self.exact.get_mut(&key.key), slot).then(|| self.exact.remove(&key.key)),
            Shape::Prefix => remove_slot(self.prefix.get_mut(&key.key), slot).then(|| {
                let length = key.key.len();
                let count = self
                    .prefix_lengths
                    .get_mut(&length)
                    .expect("every prefix's length is counted");
                *count -= 1;
                if *count == 0 {
                    self.prefix_lengths.remove(&length);
                }
                self.prefix.remove(&key.key)
            }),
            Shape::Range => remove_slot(self.ranges.get_mut(&key.key), slot).then(|| self.ranges.remove(&key.key)),
        };
    }

    /// Forgets interests that lost all their members.
    pub(super) fn forget_unused(&mut self) {
        for slot in 0..self.slots.len() {
            if self.slots[slot]
                .as_ref()
                .is_some_and(|interest| interest.members.is_empty())
            {
                self.forget(slot);
            }
        }
    }

    /// Visits every interest.
    pub(super) fn for_each(&mut self, visit: impl FnMut(&mut Interest)) {
        self.slots.iter_mut().flatten().for_each(visit);
    }

    /// Gathers an event for every interest that it concerns.
    pub(super) fn collect(&mut self, event: Event) {
        let Some(kv) = &event.kv else { return };
        let key = &kv.key[..];
        let Interests {
            slots,
            exact,
            prefix,
            prefix_lengths,
            ranges,
            touched,
            ..
        } = self;
        let mut gather = |found: &[usize]| {
            for &slot in found {
                let interest = slots[slot].as_mut().expect("the index holds used slots only");
                interest.gather(&event, slot, touched);
            }
        };
        if let Some(found) = exact.get(key) {
            gather(found);
        }
        for (&length, _) in prefix_lengths.range(..=key.len()) {
            if let Some(found) = prefix.get(&key[..length]) {
                gather(found);
            }
        }
        for (_, found) in ranges.range::<[u8], _>((Bound::Unbounded, Bound::Included(key))) {
            gather(found);
        }
    }

    /// Hands what was gathered to `deliver`, one call for each interest that has something.
    pub(super) fn deliver(&mut self, mut deliver: impl FnMut(&mut Interest, &Arc<Events>)) {
        for slot in std::mem::take(&mut self.touched) {
            let interest = self.slots[slot].as_mut().expect("only used slots are touched");
            let events = Events::new(std::mem::take(&mut interest.gathered));
            deliver(interest, &events);
            if interest.members.is_empty() {
                self.forget(slot);
            }
        }
    }
}

/// Removes a slot from an index entry; whether the entry is empty now.
fn remove_slot(slots: Option<&mut Vec<usize>>, slot: usize) -> bool {
    let slots = slots.expect("every interest is indexed");
    slots.retain(|other| *other != slot);
    slots.is_empty()
}

impl Interest {
    /// Hands the members to `deliver`, those of one stream at a time; members that it takes away are members no more.
    pub(super) fn deliver_by_stream(&mut self, mut deliver: impl FnMut(&StreamShared, &mut Vec<Member>)) {
        let mut rest = std::mem::take(&mut self.members).into_iter().peekable();
        let mut of_stream = Vec::new();
        while let Some(first) = rest.next() {
            let (stream, stream_id) = (first.stream.upgrade(), first.stream_id);
            of_stream.push(first);
            while let Some(member) = rest.next_if(|member| member.stream_id == stream_id) {
                of_stream.push(member);
            }
            if let Some(stream) = stream {
                deliver(&stream, &mut of_stream);
                self.members.append(&mut of_stream);
            }
            of_stream.clear();
        }
    }

    fn gather(&mut self, event: &Event, slot: usize, touched: &mut Vec<usize>) {
        let kv = event.kv.as_ref().expect("every event has its key");
        let unwanted = if event.r#type == EventType::Delete as i32 {
            self.key.no_delete
        } else {
            self.key.no_put
        };
        if unwanted || !self.key.span().contains(&kv.key) {
            return;
        }
        if self.gathered.is_empty() {
            touched.push(slot);
        }
        let prev_kv = if self.key.prev_kv { event.prev_kv.clone() } else { None };
        self.gathered.push(Event {
            prev_kv,
            ..event.clone()
        });
    }
}
