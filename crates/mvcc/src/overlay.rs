//! What the current apply step has prepared but not written yet, so that each operation sees those before it.

use std::collections::BTreeMap;
use std::ops::Bound;

use api::Span;
use bytes::Bytes;

use crate::keys::{Position, Record};

/// One change that is prepared.
#[derive(Debug, Clone)]
pub struct Change {
    /// When.
    pub at: Position,
    /// Which key.
    pub key: Bytes,
    /// What it is now, or a tombstone.
    pub record: Record,
}

/// The prepared state of one apply step.
#[derive(Debug, Default)]
pub struct Overlay {
    /// The newest record of every key that changed.
    pub(crate) cur: BTreeMap<Bytes, Record>,
    /// Every change, in order of position.
    pub(crate) log: Vec<Change>,
    /// Records that compaction passed and that a change of this step points to, in order of that change's position,
    /// which stands in `at`.
    pub(crate) kept: Vec<Change>,
    /// Attachments made (`true`) and undone (`false`), by lease and key.
    pub(crate) attached: BTreeMap<(i64, Bytes), bool>,
}

impl Overlay {
    /// Forgets everything, keeping the memory.
    pub(crate) fn clear(&mut self) {
        self.cur.clear();
        self.log.clear();
        self.kept.clear();
        self.attached.clear();
    }

    /// The change at a position.
    pub(crate) fn change_at(&self, at: Position) -> Option<&Change> {
        self.log
            .binary_search_by_key(&at, |change| change.at)
            .ok()
            .map(|found| &self.log[found])
    }

    /// What is kept for the change at a position.
    pub(crate) fn kept_for(&self, successor: Position) -> Option<&Change> {
        self.kept
            .binary_search_by_key(&successor, |change| change.at)
            .ok()
            .map(|found| &self.kept[found])
    }

    /// The changed keys in a range, in order.
    pub(crate) fn in_span(&self, span: Span<'_>) -> impl Iterator<Item = (&Bytes, &Record)> {
        let (start, end) = bounds(span);
        self.cur.range::<[u8], _>((start, end))
    }
}

/// The range as bounds that a `BTreeMap` takes without panicking: an empty one is a single excluded point.
fn bounds(span: Span<'_>) -> (Bound<&[u8]>, Bound<&[u8]>) {
    match span {
        Span::Key(key) => (Bound::Included(key), Bound::Included(key)),
        Span::Range(start, end) if start < end => (Bound::Included(start), Bound::Excluded(end)),
        Span::Range(start, _) => (Bound::Included(start), Bound::Excluded(start)),
        Span::From(start) => (Bound::Included(start), Bound::Unbounded),
    }
}
