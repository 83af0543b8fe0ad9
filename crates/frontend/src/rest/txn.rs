//! Transactions: `POST /api/v1/txn`.

use api::kv::{
    Compare, CompareResult, CompareTarget, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, RequestOpKind,
    SortOrder, SortTarget, TargetUnion, TxnRequest,
};
use api::{Error, Store};
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::json::{TxnResultBody, read_bytes};
use super::parameters::{Selection, lease};
use super::problem::{INVALID_BODY, Problem};
use super::{Call, body, compact_revision, json_response};

/// If all compares hold then `then`, else `else`: one atomic step, at one revision.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Txn)]
pub(super) struct TxnBody {
    /// The conditions, all looked at before anything is done; none means that `then` is done.
    #[serde(default)]
    compare: Vec<CompareBody>,
    /// What to do if all hold.
    #[serde(default)]
    #[schema(no_recursion)]
    then: Vec<OpBody>,
    /// What to do otherwise.
    #[serde(default, rename = "else")]
    #[schema(no_recursion)]
    otherwise: Vec<OpBody>,
}

/// An operation of a transaction.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = Op)]
pub(super) enum OpBody {
    Get(GetOp),
    Put(PutOp),
    Delete(DeleteOp),
    #[schema(no_recursion)]
    Txn(TxnBody),
}

/// How a compare relates what the key has to what is given.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
pub(super) enum Relation {
    #[default]
    #[serde(rename = "=")]
    Equal,
    #[serde(rename = "!=")]
    NotEqual,
    #[serde(rename = ">")]
    Greater,
    #[serde(rename = "<")]
    Less,
}

/// Declares a struct that chooses keys by `key`, or by `prefix`, `start` and `end`, each as text or in base64. (serde's
/// flatten would let unknown fields pass.)
macro_rules! with_selection {
    (
        $(#[$doc:meta])*
        struct $name:ident {
            $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
        }
    ) => {
        #[derive(Debug, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        $(#[$doc])*
        pub(super) struct $name {
            /// One key.
            key: Option<String>,
            /// One key, in base64.
            key_base64: Option<String>,
            /// All keys that begin with this.
            prefix: Option<String>,
            /// The same in base64.
            prefix_base64: Option<String>,
            /// Only keys from this one on.
            start: Option<String>,
            /// The same in base64.
            start_base64: Option<String>,
            /// Only keys before this one.
            end: Option<String>,
            /// The same in base64.
            end_base64: Option<String>,
            $($(#[$field_doc])* $field: $type,)*
        }

        impl $name {
            fn selection(&mut self) -> Result<Selection, Problem> {
                let given = |name, text: &mut Option<String>, base64: &mut Option<String>| {
                    read_bytes(name, text.take(), base64.take())
                };
                let key = given("key", &mut self.key, &mut self.key_base64)?;
                if key.as_ref().is_some_and(|key| key.is_empty()) {
                    return Err(api::Error::EmptyKey.into());
                }
                Selection::of(
                    key,
                    given("prefix", &mut self.prefix, &mut self.prefix_base64)?,
                    given("start", &mut self.start, &mut self.start_base64)?,
                    given("end", &mut self.end, &mut self.end_base64)?,
                )
            }
        }
    };
}

with_selection! {
    /// One condition. Exactly one of `exists`, `version`, `create_revision`, `mod_revision`, `lease`, `value` and
    /// `value_base64` says what to compare with; of several keys all must satisfy it.
    #[schema(as = Compare)]
    struct CompareBody {
        /// How it relates; equal if left out.
        #[serde(default)]
        #[schema(inline)]
        op: Relation,
        /// Whether the key exists.
        exists: Option<bool>,
        /// How often the key was written since it was created; 0 if it does not exist.
        version: Option<i64>,
        /// The revision that created the key; 0 if it does not exist.
        create_revision: Option<i64>,
        /// The revision that last wrote the key; 0 if it does not exist.
        mod_revision: Option<i64>,
        /// The lease that the key is attached to, in hexadecimal; `0` for none.
        lease: Option<String>,
        /// The key's value. A key that does not exist satisfies no such condition.
        value: Option<String>,
        /// The key's value, in base64.
        value_base64: Option<String>,
    }
}

with_selection! {
    /// Reads keys; all of them if nothing chooses fewer.
    #[schema(as = GetOp)]
    struct GetOp {
        /// The revision to read at; the newest if left out, with what this transaction did before.
        revision: Option<i64>,
        /// Most keys to return.
        limit: Option<i64>,
        /// Leave the values out.
        #[serde(default)]
        keys_only: bool,
        /// Return the count alone.
        #[serde(default)]
        count_only: bool,
        /// What to sort by, `-` in front for the highest first.
        #[schema(inline)]
        sort: Option<Sort>,
    }
}

with_selection! {
    /// Deletes keys.
    #[schema(as = DeleteOp)]
    struct DeleteOp {
        /// Delete all keys, if nothing chooses fewer.
        #[serde(default)]
        all: bool,
        /// Return what was deleted.
        #[serde(default)]
        prev: bool,
    }
}

/// Writes a key.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PutOp)]
pub(super) struct PutOp {
    /// The key.
    key: Option<String>,
    /// The key in base64.
    key_base64: Option<String>,
    /// The value; empty if left out.
    value: Option<String>,
    /// The value in base64.
    value_base64: Option<String>,
    /// The lease to attach the key to, in hexadecimal.
    lease: Option<String>,
    /// Keep the present value; the key must exist.
    #[serde(default)]
    keep_value: bool,
    /// Keep the present lease; the key must exist.
    #[serde(default)]
    keep_lease: bool,
    /// Return what was there before.
    #[serde(default)]
    prev: bool,
}

/// What a list may be sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
pub(super) enum Sort {
    #[serde(rename = "key")]
    Key,
    #[serde(rename = "-key")]
    KeyDown,
    #[serde(rename = "version")]
    Version,
    #[serde(rename = "-version")]
    VersionDown,
    #[serde(rename = "create_revision")]
    Create,
    #[serde(rename = "-create_revision")]
    CreateDown,
    #[serde(rename = "mod_revision")]
    Mod,
    #[serde(rename = "-mod_revision")]
    ModDown,
    #[serde(rename = "value")]
    Value,
    #[serde(rename = "-value")]
    ValueDown,
}

impl Sort {
    /// What the parameter `sort` may say.
    pub(super) const NAMES: &[&str] = &[
        "key",
        "-key",
        "version",
        "-version",
        "create_revision",
        "-create_revision",
        "mod_revision",
        "-mod_revision",
        "value",
        "-value",
    ];

    pub(super) fn of(name: &str) -> Option<Self> {
        serde_json::from_value(serde_json::Value::from(name)).ok()
    }

    pub(super) fn apply(self, range: &mut RangeRequest) {
        let (target, order) = match self {
            Sort::Key => (SortTarget::Key, SortOrder::Ascend),
            Sort::KeyDown => (SortTarget::Key, SortOrder::Descend),
            Sort::Version => (SortTarget::Version, SortOrder::Ascend),
            Sort::VersionDown => (SortTarget::Version, SortOrder::Descend),
            Sort::Create => (SortTarget::Create, SortOrder::Ascend),
            Sort::CreateDown => (SortTarget::Create, SortOrder::Descend),
            Sort::Mod => (SortTarget::Mod, SortOrder::Ascend),
            Sort::ModDown => (SortTarget::Mod, SortOrder::Descend),
            Sort::Value => (SortTarget::Value, SortOrder::Ascend),
            Sort::ValueDown => (SortTarget::Value, SortOrder::Descend),
        };
        range.sort_target = target as i32;
        range.sort_order = order as i32;
    }
}

/// What is known of the answers of a branch's operations before they come.
#[derive(Debug, Default)]
pub(super) struct Shapes {
    pub(super) then: Vec<Shape>,
    pub(super) otherwise: Vec<Shape>,
}

/// What is known of an operation's answer before it comes.
#[derive(Debug)]
pub(super) enum Shape {
    Plain,
    /// Keys come without values.
    KeysOnly,
    Txn(Shapes),
}

/// A lease's id in a body; 0 where `0` is allowed and meant.
fn lease_of(name: &str, id: &str, zero: bool) -> Result<i64, Problem> {
    if zero && id == "0" {
        return Ok(0);
    }
    lease(id).ok_or_else(|| {
        let detail = format!("{name} is a lease's id: 1 to 16 hexadecimal digits, as etcdctl writes it");
        Problem::new(INVALID_BODY, detail)
    })
}

impl CompareBody {
    fn into_compare(mut self) -> Result<Compare, Problem> {
        let texts = [&self.key, &self.prefix, &self.start, &self.end];
        let base64 = [
            &self.key_base64,
            &self.prefix_base64,
            &self.start_base64,
            &self.end_base64,
        ];
        if texts.into_iter().chain(base64).all(Option::is_none) {
            let detail = "a compare says of which key: key, or prefix, start and end; \"prefix\": \"\" is all keys";
            return Err(Problem::new(INVALID_BODY, detail));
        }
        let selection = self.selection()?;
        let relation = match self.op {
            Relation::Equal => CompareResult::Equal,
            Relation::NotEqual => CompareResult::NotEqual,
            Relation::Greater => CompareResult::Greater,
            Relation::Less => CompareResult::Less,
        };
        let mut given = Vec::new();
        if let Some(exists) = self.exists {
            // A key exists when its version is greater than 0, and does not when it equals 0.
            let flip = match relation {
                CompareResult::Equal => false,
                CompareResult::NotEqual => true,
                CompareResult::Greater | CompareResult::Less => {
                    return Err(Problem::new(INVALID_BODY, "exists is compared with = or !="));
                }
            };
            let relation = if exists == flip {
                CompareResult::Equal
            } else {
                CompareResult::Greater
            };
            given.push((relation, CompareTarget::Version, TargetUnion::Version(0)));
        }
        given.extend(
            self.version
                .map(|version| (relation, CompareTarget::Version, TargetUnion::Version(version))),
        );
        given.extend(
            self.create_revision
                .map(|revision| (relation, CompareTarget::Create, TargetUnion::CreateRevision(revision))),
        );
        given.extend(
            self.mod_revision
                .map(|revision| (relation, CompareTarget::Mod, TargetUnion::ModRevision(revision))),
        );
        if let Some(id) = &self.lease {
            let id = lease_of("lease", id, true)?;
            given.push((relation, CompareTarget::Lease, TargetUnion::Lease(id)));
        }
        if let Some(value) = read_bytes("value", self.value, self.value_base64)? {
            given.push((relation, CompareTarget::Value, TargetUnion::Value(value)));
        }
        let [(relation, target, union)] = <[_; 1]>::try_from(given).map_err(|given: Vec<_>| {
            let detail = format!(
                "a compare says exactly one of exists, version, create_revision, mod_revision, lease, value and \
                 value_base64, and not {}",
                given.len()
            );
            Problem::new(INVALID_BODY, detail)
        })?;
        Ok(Compare {
            result: relation as i32,
            target: target as i32,
            key: selection.key,
            target_union: Some(union),
            range_end: selection.range_end,
        })
    }
}

impl OpBody {
    fn into_op(self) -> Result<(RequestOp, Shape), Problem> {
        let (kind, shape) = match self {
            OpBody::Get(mut get) => {
                let selection = get.selection()?;
                let mut range = RangeRequest {
                    key: selection.key,
                    range_end: selection.range_end,
                    revision: get.revision.unwrap_or(0),
                    limit: get.limit.unwrap_or(0),
                    keys_only: get.keys_only,
                    count_only: get.count_only,
                    ..Default::default()
                };
                if range.limit < 0 || range.revision < 0 {
                    return Err(Problem::new(INVALID_BODY, "limit and revision are not negative"));
                }
                if let Some(sort) = get.sort {
                    sort.apply(&mut range);
                }
                let shape = if get.keys_only { Shape::KeysOnly } else { Shape::Plain };
                (RequestOpKind::Range(range), shape)
            }
            OpBody::Put(put) => {
                let key = read_bytes("key", put.key, put.key_base64)?.unwrap_or_default();
                let value = read_bytes("value", put.value, put.value_base64)?.unwrap_or_default();
                let lease = match &put.lease {
                    Some(id) => lease_of("lease", id, false)?,
                    None => 0,
                };
                let put = PutRequest {
                    key,
                    value,
                    lease,
                    prev_kv: put.prev,
                    ignore_value: put.keep_value,
                    ignore_lease: put.keep_lease,
                };
                (RequestOpKind::Put(put), Shape::Plain)
            }
            OpBody::Delete(mut delete) => {
                let selection = delete.selection()?;
                if selection.is_all && !delete.all {
                    let detail = "a delete that nothing narrows down would delete every key: if that is meant, say \
                                  \"all\": true";
                    return Err(Problem::new(INVALID_BODY, detail));
                }
                let delete = DeleteRangeRequest {
                    key: selection.key,
                    range_end: selection.range_end,
                    prev_kv: delete.prev,
                };
                (RequestOpKind::DeleteRange(delete), Shape::Plain)
            }
            OpBody::Txn(txn) => {
                let (txn, shapes) = txn.into_request()?;
                (RequestOpKind::Txn(txn), Shape::Txn(shapes))
            }
        };
        Ok((RequestOp { request: Some(kind) }, shape))
    }
}

impl TxnBody {
    /// The recursion ends: serde_json reads 128 levels at most, of which a transaction takes three.
    fn into_request(self) -> Result<(TxnRequest, Shapes), Problem> {
        let compare = self.compare.into_iter().map(CompareBody::into_compare);
        let compare = compare.collect::<Result<_, _>>()?;
        let branch = |ops: Vec<OpBody>| -> Result<(Vec<RequestOp>, Vec<Shape>), Problem> {
            ops.into_iter().map(OpBody::into_op).collect()
        };
        let (success, then) = branch(self.then)?;
        let (failure, otherwise) = branch(self.otherwise)?;
        let request = TxnRequest {
            compare,
            success,
            failure,
        };
        Ok((request, Shapes { then, otherwise }))
    }
}

pub(super) async fn txn<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let encoding = call.encoding();
    let request: TxnBody = body::json(&call.headers, call.body, call.store.limits()).await?;
    let (request, shapes) = request.into_request()?;
    request.validate(call.store.limits().txn_ops_max)?;
    let response = match call.store.txn(request).await {
        // One of its reads is of a revision before it.
        Err(Error::Compacted) => return Err(Problem::compacted(compact_revision(&call.store, 1).await)),
        response => response?,
    };
    Ok(json_response(&TxnResultBody::new(&response, encoding, &shapes)))
}

/// Reads a body as far as that goes without a store.
pub(super) fn fuzz_body(body: &[u8]) -> Result<(), Problem> {
    let body: TxnBody = serde_json::from_slice(body).map_err(|error| Problem::new(INVALID_BODY, error.to_string()))?;
    let (request, shapes) = body.into_request()?;
    assert_eq!(
        (request.success.len(), request.failure.len()),
        (shapes.then.len(), shapes.otherwise.len())
    );
    request.validate(api::Limits::default().txn_ops_max)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sort_has_its_name() {
        for name in Sort::NAMES {
            assert!(Sort::of(name).is_some(), "{name}");
        }
        assert!(Sort::of("Key").is_none());
    }

    #[test]
    fn exists_is_about_versions() {
        let compare = |text: &str| {
            let body: CompareBody = serde_json::from_str(text).expect(text);
            let compare = body.into_compare().expect(text);
            (compare.result, compare.target_union)
        };
        let version = Some(TargetUnion::Version(0));
        for (text, result) in [
            (r#"{"key":"a","exists":true}"#, CompareResult::Greater),
            (r#"{"key":"a","exists":false}"#, CompareResult::Equal),
            (r#"{"key":"a","exists":true,"op":"!="}"#, CompareResult::Equal),
            (r#"{"key":"a","exists":false,"op":"!="}"#, CompareResult::Greater),
        ] {
            assert_eq!(compare(text), (result as i32, version.clone()), "{text}");
        }
    }
}
