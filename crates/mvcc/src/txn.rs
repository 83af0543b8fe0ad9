//! Transactions: which way they go, whether they may, and those that only read.
//!
//! All compares, those of nested transactions included, look at the state before the transaction. Then everything on
//! the path is checked, and only then anything is done, so a transaction that is refused has changed nothing.

use api::kv::{
    Compare, CompareResult, CompareTarget, KeyValue, PutRequest, RangeRequest, RequestOp, RequestOpKind,
    ResponseHeader, ResponseOp, ResponseOpKind, TargetUnion, TxnRequest, TxnResponse,
};
use api::{Error, Revision, Span};
use bytes::Bytes;
use storage::View;

use crate::Failure;
use crate::read::Snapshot;

/// What compares and checks need to see: the newest state.
pub(crate) trait Newest {
    /// The key as clients see it; `None` if it does not exist.
    fn key_value(&mut self, key: &Bytes) -> Result<Option<KeyValue>, Failure>;

    /// Whether all keys of the compare's range satisfy it.
    fn range_satisfies(&mut self, compare: &Compare) -> Result<bool, Failure>;

    /// Whether there is such a lease.
    fn has_lease(&self, id: i64) -> bool;

    /// The newest revision and the compacted one.
    fn revisions(&self) -> (Revision, Revision);
}

/// Which branch each transaction takes: the outer one first, then the nested ones of the branch taken, in order. `reads`
/// counts the compares that were looked at: etcd reads a range for each.
pub(crate) fn paths(
    state: &mut impl Newest,
    request: &TxnRequest,
    out: &mut Vec<bool>,
    reads: &mut u64,
) -> Result<(), Failure> {
    let mut holds = true;
    for compare in &request.compare {
        *reads += 1;
        if !compare_holds(state, compare)? {
            holds = false;
            break;
        }
    }
    out.push(holds);
    for op in branch(request, holds) {
        if let Some(RequestOpKind::Txn(nested)) = &op.request {
            paths(state, nested, out, reads)?;
        }
    }
    Ok(())
}

/// The operations of the branch that is taken.
pub(crate) fn branch(request: &TxnRequest, holds: bool) -> &[RequestOp] {
    if holds { &request.success } else { &request.failure }
}

/// Checks every operation on the path against the state before the transaction. `reads` counts as in [`paths`].
pub(crate) fn check(
    state: &mut impl Newest,
    request: &TxnRequest,
    path: &mut impl Iterator<Item = bool>,
    reads: &mut u64,
) -> Result<(), Failure> {
    let holds = path.next().expect("a branch was chosen for every transaction");
    for op in branch(request, holds) {
        match &op.request {
            Some(RequestOpKind::Range(range)) => check_range(state.revisions(), range)?,
            Some(RequestOpKind::Put(put)) => check_put(state, put, reads)?,
            Some(RequestOpKind::Txn(nested)) => check(state, nested, path, reads)?,
            Some(RequestOpKind::DeleteRange(_)) | None => {}
        }
    }
    Ok(())
}

/// Unlike a plain range, one in a transaction refuses negative revisions once something was compacted, as in etcd.
fn check_range((revision, compacted): (Revision, Revision), range: &RangeRequest) -> Result<(), Error> {
    match range.revision {
        0 => Ok(()),
        at if at > revision => Err(Error::FutureRevision),
        at if at < compacted => Err(Error::Compacted),
        _ => Ok(()),
    }
}

/// Checks a put against the newest state.
fn check_put(state: &mut impl Newest, put: &PutRequest, reads: &mut u64) -> Result<(), Failure> {
    if put.lease != 0 && !state.has_lease(put.lease) {
        return Err(Error::LeaseNotFound.into());
    }
    *reads += u64::from(reads_before(put));
    if (put.ignore_value || put.ignore_lease) && state.key_value(&put.key)?.is_none() {
        return Err(Error::KeyNotFound.into());
    }
    Ok(())
}

/// Whether a put wants to know what was there before.
pub(crate) fn reads_before(put: &PutRequest) -> bool {
    put.ignore_value || put.ignore_lease || put.prev_kv
}

fn compare_holds(state: &mut impl Newest, compare: &Compare) -> Result<bool, Failure> {
    if compare.range_end.is_empty() {
        return Ok(match state.key_value(&compare.key)? {
            Some(kv) => key_satisfies(compare, &kv),
            None => missing_satisfies(compare),
        });
    }
    state.range_satisfies(compare)
}

/// A key that does not exist never satisfies a compare of its value; its numbers are all 0.
fn missing_satisfies(compare: &Compare) -> bool {
    compare.target != CompareTarget::Value as i32 && key_satisfies(compare, &KeyValue::default())
}

fn key_satisfies(compare: &Compare, kv: &KeyValue) -> bool {
    let union = compare.target_union.as_ref();
    let order = match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Value) => kv.value[..].cmp(match union {
            Some(TargetUnion::Value(value)) => &value[..],
            _ => &[],
        }),
        Ok(CompareTarget::Version) => kv.version.cmp(&match union {
            Some(TargetUnion::Version(version)) => *version,
            _ => 0,
        }),
        Ok(CompareTarget::Create) => kv.create_revision.cmp(&match union {
            Some(TargetUnion::CreateRevision(revision)) => *revision,
            _ => 0,
        }),
        Ok(CompareTarget::Mod) => kv.mod_revision.cmp(&match union {
            Some(TargetUnion::ModRevision(revision)) => *revision,
            _ => 0,
        }),
        Ok(CompareTarget::Lease) => kv.lease.cmp(&match union {
            Some(TargetUnion::Lease(lease)) => *lease,
            _ => 0,
        }),
        // A target that we do not know compares equal, a result that we do not know holds: etcd does both.
        Err(_) => std::cmp::Ordering::Equal,
    };
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => order.is_eq(),
        Ok(CompareResult::NotEqual) => order.is_ne(),
        Ok(CompareResult::Greater) => order.is_gt(),
        Ok(CompareResult::Less) => order.is_lt(),
        Err(_) => true,
    }
}

/// A snapshot at its newest revision.
struct Pinned<'a, 'v, V>(&'a Snapshot<'v, V>);

impl<V: View> Newest for Pinned<'_, '_, V> {
    fn key_value(&mut self, key: &Bytes) -> Result<Option<KeyValue>, Failure> {
        Ok(self
            .0
            .get_at(key, self.0.revision)?
            .map(|record| record.to_key_value(key.clone())))
    }

    fn range_satisfies(&mut self, compare: &Compare) -> Result<bool, Failure> {
        range_satisfies(self.0, compare)
    }

    fn has_lease(&self, _id: i64) -> bool {
        unreachable!("a transaction that only reads puts nothing")
    }

    fn revisions(&self) -> (Revision, Revision) {
        (self.0.revision, self.0.compacted)
    }
}

/// Looks at the keys of a compare's range one by one, keeps none of them and stops at the first that does not satisfy it.
pub(crate) fn range_satisfies<V: View>(snapshot: &Snapshot<'_, V>, compare: &Compare) -> Result<bool, Failure> {
    let of_value = compare.target == CompareTarget::Value as i32;
    let (mut any, mut all) = (false, true);
    snapshot.visit_at(
        Span::new(&compare.key, &compare.range_end),
        snapshot.revision,
        |_, record| {
            any = true;
            let mut kv = record.to_bare_key_value(Bytes::new());
            if of_value {
                kv.value = Bytes::copy_from_slice(record.value);
            }
            all = key_satisfies(compare, &kv);
            all
        },
    )?;
    Ok(if any { all } else { missing_satisfies(compare) })
}

/// Carries out a transaction of plain ranges. `reads` counts them and the compares.
pub(crate) fn execute_read_only<V: View>(
    snapshot: &Snapshot<'_, V>,
    request: &TxnRequest,
    reads: &mut u64,
) -> Result<TxnResponse, Failure> {
    let mut state = Pinned(snapshot);
    let mut path = Vec::new();
    paths(&mut state, request, &mut path, reads)?;
    check(&mut state, request, &mut path.iter().copied(), reads)?;
    let mut responses = Vec::new();
    for op in branch(request, path[0]) {
        let Some(RequestOpKind::Range(range)) = &op.request else {
            unreachable!("the caller made sure that there are only ranges")
        };
        let at = if range.revision <= 0 {
            snapshot.revision
        } else {
            range.revision
        };
        *reads += 1;
        let response = snapshot.range(range, at, None)?;
        responses.push(ResponseOp {
            response: Some(ResponseOpKind::Range(response)),
        });
    }
    Ok(TxnResponse {
        header: ResponseHeader::at(snapshot.revision),
        succeeded: path[0],
        responses,
    })
}
