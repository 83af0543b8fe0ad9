//! Key ranges as etcd writes them, and the checks that every front end makes before it asks the store.

use crate::error::Error;
use crate::kv::{
    CompactionRequest, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, RequestOpKind, SortOrder, SortTarget,
    TxnRequest,
};
use crate::limits::TXN_DEPTH_MAX;

/// A set of keys: one key, or a half-open range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span<'a> {
    /// One key.
    Key(&'a [u8]),
    /// From the first (inclusive) to the second (exclusive); nothing when the second is not greater.
    Range(&'a [u8], &'a [u8]),
    /// All keys at or after.
    From(&'a [u8]),
}

impl<'a> Span<'a> {
    /// Reads etcd's notation: an empty `range_end` means the one key, `\0` all keys from `key` on. The key `\0` together
    /// with the end `\0` means all keys, since no key is empty.
    pub fn new(key: &'a [u8], range_end: &'a [u8]) -> Self {
        match range_end {
            [] => Span::Key(key),
            [0] => Span::From(if key == [0] { &[] } else { key }),
            end => Span::Range(key, end),
        }
    }

    /// Whether `key` is in the set.
    pub fn contains(&self, key: &[u8]) -> bool {
        match *self {
            Span::Key(k) => key == k,
            Span::Range(start, end) => start <= key && key < end,
            Span::From(start) => start <= key,
        }
    }

    /// The first key that can be in the set.
    pub fn start(&self) -> &'a [u8] {
        match *self {
            Span::Key(k) => k,
            Span::Range(start, _) | Span::From(start) => start,
        }
    }
}

impl RangeRequest {
    /// Checks what can be checked without the store.
    pub fn validate(&self) -> Result<(), Error> {
        if self.key.is_empty() {
            return Err(Error::EmptyKey);
        }
        if SortOrder::try_from(self.sort_order).is_err() || SortTarget::try_from(self.sort_target).is_err() {
            return Err(Error::InvalidSortOption);
        }
        Ok(())
    }

    /// The keys it asks for.
    pub fn span(&self) -> Span<'_> {
        Span::new(&self.key, &self.range_end)
    }
}

impl PutRequest {
    /// Checks what can be checked without the store.
    pub fn validate(&self) -> Result<(), Error> {
        if self.key.is_empty() {
            return Err(Error::EmptyKey);
        }
        if self.ignore_value && !self.value.is_empty() {
            return Err(Error::ValueProvided);
        }
        if self.ignore_lease && self.lease != 0 {
            return Err(Error::LeaseProvided);
        }
        Ok(())
    }
}

impl DeleteRangeRequest {
    /// Checks what can be checked without the store.
    pub fn validate(&self) -> Result<(), Error> {
        if self.key.is_empty() {
            Err(Error::EmptyKey)
        } else {
            Ok(())
        }
    }

    /// The keys it deletes.
    pub fn span(&self) -> Span<'_> {
        Span::new(&self.key, &self.range_end)
    }
}

impl CompactionRequest {
    /// Nothing can be checked without the store.
    pub fn validate(&self) -> Result<(), Error> {
        Ok(())
    }
}

impl TxnRequest {
    /// Checks what can be checked without the store: sizes, keys, and that no path through the transaction writes a
    /// key twice.
    ///
    /// `ops_max` bounds compares and each branch; a nested transaction gets what its parent left, as in etcd.
    pub fn validate(&self, ops_max: usize) -> Result<(), Error> {
        self.check_ops(ops_max, 0)?;
        check_duplicates(&self.success)?;
        check_duplicates(&self.failure)?;
        Ok(())
    }

    fn check_ops(&self, ops_max: usize, depth: usize) -> Result<(), Error> {
        let size = self.compare.len().max(self.success.len()).max(self.failure.len());
        if size > ops_max || depth >= TXN_DEPTH_MAX {
            return Err(Error::TooManyOps);
        }
        if self.compare.iter().any(|compare| compare.key.is_empty()) {
            return Err(Error::EmptyKey);
        }
        for op in self.success.iter().chain(&self.failure) {
            match &op.request {
                Some(RequestOpKind::Range(range)) => range.validate()?,
                Some(RequestOpKind::Put(put)) => put.validate()?,
                Some(RequestOpKind::DeleteRange(delete)) => delete.validate()?,
                Some(RequestOpKind::Txn(txn)) => txn.check_ops(ops_max - size, depth + 1)?,
                None => return Err(Error::KeyNotFound),
            }
        }
        Ok(())
    }

    /// Whether it only reads: every operation of both branches is a plain range. A nested transaction counts as a
    /// write, as in etcd.
    pub fn is_read_only(&self) -> bool {
        self.success
            .iter()
            .chain(&self.failure)
            .all(|op| matches!(op.request, Some(RequestOpKind::Range(_))))
    }

    /// Whether, being read-only, it may be answered from local state: all its ranges are serializable.
    pub fn is_serializable(&self) -> bool {
        self.success
            .iter()
            .chain(&self.failure)
            .all(|op| matches!(&op.request, Some(RequestOpKind::Range(range)) if range.serializable))
    }

    /// Whether some path through it puts a key.
    pub fn has_put(&self) -> bool {
        self.success.iter().chain(&self.failure).any(|op| match &op.request {
            Some(RequestOpKind::Put(_)) => true,
            Some(RequestOpKind::Txn(txn)) => txn.has_put(),
            _ => false,
        })
    }
}

/// The keys that one branch puts and the ranges that it deletes, nested transactions included (the union of both of
/// their branches, which may overlap each other but nothing outside).
#[derive(Default)]
struct Writes<'a> {
    puts: std::collections::BTreeSet<&'a [u8]>,
    /// Start (inclusive) to end (exclusive) of disjoint ranges, so that a look-up costs the logarithm of their number: a
    /// request that fits the size limit may hold tens of thousands of them.
    deletes: std::collections::BTreeMap<Vec<u8>, Vec<u8>>,
}

impl<'a> Writes<'a> {
    fn delete(&mut self, span: Span<'_>) {
        let (start, end) = match span {
            Span::Key(key) => (key.to_vec(), [key, &[0]].concat()),
            Span::Range(start, end) => (start.to_vec(), end.to_vec()),
            // An end of `\0` is taken as it stands here, so that deleting "everything from a key on" clashes with no
            // put: so does etcd, and transactions that it takes must not be refused.
            Span::From(_) => return,
        };
        self.delete_range(start, end);
    }

    /// Adds a range; ranges that touch it become one with it.
    fn delete_range(&mut self, mut start: Vec<u8>, mut end: Vec<u8>) {
        if start >= end {
            return;
        }
        if let Some((before, before_end)) = self.deletes.range(..=start.clone()).next_back()
            && *before_end >= start
        {
            start.clone_from(before);
            end = end.max(before_end.clone());
        }
        while let Some((next, next_end)) = self.deletes.range(start.clone()..=end.clone()).next() {
            end = end.max(next_end.clone());
            let next = next.clone();
            self.deletes.remove(&next);
        }
        self.deletes.insert(start, end);
    }

    fn deletes_key(&self, key: &[u8]) -> bool {
        use std::ops::Bound::{Included, Unbounded};
        let before = self.deletes.range::<[u8], _>((Unbounded, Included(key))).next_back();
        before.is_some_and(|(_, end)| key < &end[..])
    }

    /// Whether a nested branch puts what was put or deleted before it. The other way round (a nested delete of what an
    /// earlier nested transaction put) etcd lets pass, and so do we: the key then changes twice at one revision.
    fn clashes_with(&self, nested: &Writes<'a>) -> bool {
        nested
            .puts
            .iter()
            .any(|key| self.puts.contains(key) || self.deletes_key(key))
    }

    fn absorb(&mut self, other: Writes<'a>) {
        self.puts.extend(other.puts);
        for (start, end) in other.deletes {
            self.delete_range(start, end);
        }
    }
}

/// Collects what a branch writes and refuses it if one path writes a key twice: two puts of it, or a put inside a
/// deleted range. Deletes may overlap each other.
fn check_duplicates(ops: &[RequestOp]) -> Result<Writes<'_>, Error> {
    let mut writes = Writes::default();
    for op in ops {
        if let Some(RequestOpKind::DeleteRange(delete)) = &op.request {
            writes.delete(delete.span());
        }
    }
    for op in ops {
        if let Some(RequestOpKind::Txn(txn)) = &op.request {
            let success = check_duplicates(&txn.success)?;
            let failure = check_duplicates(&txn.failure)?;
            if writes.clashes_with(&success) || writes.clashes_with(&failure) {
                return Err(Error::DuplicateKey);
            }
            writes.absorb(success);
            writes.absorb(failure);
        }
    }
    for op in ops {
        if let Some(RequestOpKind::Put(put)) = &op.request
            && (writes.deletes_key(&put.key) || !writes.puts.insert(&put.key))
        {
            return Err(Error::DuplicateKey);
        }
    }
    Ok(writes)
}
