//! One key: `/api/v1/kv/{key}`.

use api::kv::{
    DeleteRangeRequest, KeyValue, PutRequest, RangeRequest, RequestOp, RequestOpKind, ResponseOpKind, TxnRequest,
    TxnResponse,
};
use api::{Error, Revision, Store};
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, VARY, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::headers::{Conditions, Read, etag, negotiate};
use super::json::{DeletedBody, KeyValueBody, WrittenBody, lease_hex};
use super::problem::{INVALID_REQUEST, KEY_NOT_FOUND, Problem};
use super::{Call, JSON, body, compact_revision, json_response};

pub(super) const CREATE_REVISION: HeaderName = HeaderName::from_static("metastore-create-revision");
pub(super) const MOD_REVISION: HeaderName = HeaderName::from_static("metastore-mod-revision");
pub(super) const VERSION: HeaderName = HeaderName::from_static("metastore-version");
pub(super) const LEASE: HeaderName = HeaderName::from_static("metastore-lease");
pub(super) const REVISION: HeaderName = HeaderName::from_static("metastore-revision");

const TEXT: &str = "text/plain; charset=utf-8";
const BYTES: &str = "application/octet-stream";

pub(super) async fn get<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let conditions = Conditions::of(&call.headers)?;
    let request = RangeRequest {
        key: call.argument.clone(),
        revision: call.parameters.revision(),
        serializable: call.parameters.flag("serializable"),
        ..Default::default()
    };
    request.validate()?;
    let revision = request.revision;
    let response = match call.store.range(request).await {
        Ok(response) => response,
        Err(Error::Compacted) => return Err(Problem::compacted(compact_revision(&call.store, revision).await)),
        Err(error) => return Err(error.into()),
    };
    let Some(kv) = response.kvs.into_iter().next() else {
        return Err(match conditions.need_key() {
            true => Problem::precondition_failed(0),
            false => Problem::new(KEY_NOT_FOUND, "the key does not exist at the revision that was read"),
        });
    };
    let mut fields = version_fields(&kv);
    if let Some(header) = response.header {
        fields.insert(REVISION, header.revision.into());
    }
    match conditions.of_read(kv.mod_revision) {
        Read::Failed => Err(Problem::precondition_failed(kv.mod_revision)),
        Read::NotModified => Ok(respond(StatusCode::NOT_MODIFIED, fields, Body::empty())),
        Read::Wanted => {
            let (media_type, value) = represent(&call, kv)?;
            fields.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
            Ok(respond(StatusCode::OK, fields, Body::from(value)))
        }
    }
}

/// The value as it is, or the whole key as JSON, as the client likes it. A value that is text says so.
fn represent<S: Store>(call: &Call<S>, kv: KeyValue) -> Result<(&'static str, Bytes), Problem> {
    let offers: &[&str] = match std::str::from_utf8(&kv.value) {
        Ok(_) => &[TEXT, BYTES, JSON],
        Err(_) => &[BYTES, JSON],
    };
    let media_type = negotiate(&call.headers, offers)?;
    let value = match media_type {
        JSON => {
            let body = KeyValueBody::new(&kv, call.encoding(), true);
            serde_json::to_vec(&body).unwrap_or_default().into()
        }
        _ => kv.value,
    };
    Ok((media_type, value))
}

/// What the header says of a version.
fn version_fields(kv: &KeyValue) -> HeaderMap {
    let mut fields = HeaderMap::with_capacity(10);
    fields.insert(ETAG, etag(kv.mod_revision));
    fields.insert(CREATE_REVISION, kv.create_revision.into());
    fields.insert(MOD_REVISION, kv.mod_revision.into());
    fields.insert(VERSION, kv.version.into());
    if let Some(lease) = lease_hex(kv.lease).and_then(|lease| HeaderValue::from_str(&lease).ok()) {
        fields.insert(LEASE, lease);
    }
    // To be asked for again each time, with the ETag.
    fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    fields.insert(VARY, HeaderValue::from_static("accept"));
    fields.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    fields
}

fn respond(status: StatusCode, fields: HeaderMap, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = fields;
    response
}

pub(super) async fn put<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let encoding = call.encoding();
    // The body first, whatever else is wrong: a client that still sends finds a closed connection instead of its answer.
    let value = body::value(&call.headers, call.body, call.store.limits()).await?;
    let conditions = Conditions::of(&call.headers)?;
    let keep_lease = call.parameters.flag("keep_lease");
    if keep_lease && call.parameters.has("lease") {
        return Err(Problem::new(INVALID_REQUEST, "lease and keep_lease exclude each other"));
    }
    let put = PutRequest {
        key: call.argument.clone(),
        value,
        lease: call.parameters.lease(),
        prev_kv: call.parameters.flag("prev"),
        ignore_value: false,
        ignore_lease: keep_lease,
    };
    put.validate()?;
    let (revision, prev) = if conditions.is_empty() {
        let response = call.store.put(put).await?;
        (response.header.unwrap_or_default().revision, response.prev_kv)
    } else {
        let write = RequestOpKind::Put(put);
        let (revision, done) = conditionally(&call.store, &call.argument, &conditions, write).await?;
        let prev = match done {
            ResponseOpKind::Put(put) => put.prev_kv,
            _ => None,
        };
        (revision, prev)
    };
    let mut response = json_response(&WrittenBody {
        revision,
        prev: prev.as_ref().map(|prev| KeyValueBody::new(prev, encoding, true)),
    });
    if conditions.is_create_only() {
        *response.status_mut() = StatusCode::CREATED;
    }
    response.headers_mut().insert(ETAG, etag(revision));
    Ok(response)
}

pub(super) async fn delete<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let encoding = call.encoding();
    let conditions = Conditions::of(&call.headers)?;
    body::none(&call.headers, call.body).await?;
    let with_prev = call.parameters.flag("prev");
    let delete = DeleteRangeRequest {
        key: call.argument.clone(),
        range_end: Bytes::new(),
        prev_kv: with_prev,
    };
    delete.validate()?;
    let (revision, done) = if conditions.is_empty() {
        let done = call.store.delete_range(delete).await?;
        (done.header.clone().unwrap_or_default().revision, done)
    } else {
        let delete = RequestOpKind::DeleteRange(delete);
        match conditionally(&call.store, &call.argument, &conditions, delete).await? {
            (revision, ResponseOpKind::DeleteRange(done)) => (revision, done),
            (revision, _) => (revision, Default::default()),
        }
    };
    if done.deleted == 0 {
        return Err(Problem::new(
            KEY_NOT_FOUND,
            "the key does not exist, so nothing was deleted",
        ));
    }
    Ok(json_response(&DeletedBody {
        revision,
        deleted: done.deleted,
        prevs: with_prev.then(|| KeyValueBody::all(&done.prev_kvs, encoding, true)),
    }))
}

/// Carries a write of a key out if its conditions hold; otherwise says how the key is, as of the same revision.
async fn conditionally<S: Store>(
    store: &S,
    key: &Bytes,
    conditions: &Conditions,
    write: RequestOpKind,
) -> Result<(Revision, ResponseOpKind), Problem> {
    let op = |kind| vec![RequestOp { request: Some(kind) }];
    let look = RangeRequest {
        key: key.clone(),
        keys_only: true,
        ..Default::default()
    };
    let mut seen = None;
    loop {
        let request = TxnRequest {
            compare: conditions.compares(key, seen),
            success: op(write.clone()),
            failure: op(RequestOpKind::Range(look.clone())),
        };
        request.validate(store.limits().txn_ops_max)?;
        let TxnResponse {
            header,
            succeeded,
            responses,
        } = store.txn(request).await?;
        let done = responses.into_iter().next().and_then(|response| response.response);
        let found = match done {
            Some(done) if succeeded => return Ok((header.unwrap_or_default().revision, done)),
            Some(ResponseOpKind::Range(found)) => found.kvs.first().map_or(0, |kv| kv.mod_revision),
            _ => 0,
        };
        // Of several ETags that it may have it has another than the one that was tried. Each of them is tried at most once
        // after it was seen, for revisions only rise.
        if found == 0
            || seen.is_some_and(|seen| seen >= found)
            || conditions.compares(key, Some(found)) == conditions.compares(key, seen)
        {
            return Err(Problem::precondition_failed(found));
        }
        seen = Some(found);
    }
}
