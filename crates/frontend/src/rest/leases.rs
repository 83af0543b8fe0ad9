//! Leases: `/api/v1/leases`.

use api::kv::{LeaseGrantRequest, LeaseRevokeRequest};
use api::{LeaseId, Store};
use axum::response::Response;
use http::header::LOCATION;
use http::{HeaderValue, StatusCode};

use super::json::{DoneBody, KeyBody, LeaseBody, LeaseGrantBody, LeasesBody, hex, lease_hex};
use super::parameters::lease;
use super::problem::{INVALID_BODY, INVALID_PATH, LEASE_NOT_FOUND, Problem};
use super::{BASE, Call, body, json_response};

/// The lease that the path names.
fn id<S: Store>(call: &Call<S>) -> Result<LeaseId, Problem> {
    let text = std::str::from_utf8(&call.argument).ok();
    text.and_then(lease).ok_or_else(|| {
        Problem::new(
            INVALID_PATH,
            "a lease's id is 1 to 16 hexadecimal digits, as etcdctl writes it, not 0",
        )
    })
}

pub(super) async fn grant<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let LeaseGrantBody { ttl, id } = body::json(&call.headers, call.body, call.store.limits()).await?;
    if ttl < 1 {
        return Err(Problem::new(INVALID_BODY, "ttl is at least 1 (seconds)"));
    }
    let id = match id {
        None => 0,
        Some(text) => lease(&text).ok_or_else(|| {
            Problem::new(
                INVALID_BODY,
                "id is 1 to 16 hexadecimal digits, as etcdctl writes it, not 0",
            )
        })?,
    };
    let granted = call.store.lease_grant(LeaseGrantRequest { ttl, id }).await?;
    let id = hex(granted.id.cast_unsigned());
    let location = HeaderValue::from_str(&format!("{BASE}/leases/{id}"));
    let mut response = json_response(&LeaseBody {
        id,
        ttl: granted.ttl,
        granted_ttl: Some(granted.ttl),
        keys: None,
    });
    *response.status_mut() = StatusCode::CREATED;
    if let Ok(location) = location {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}

pub(super) async fn list<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let listed = call.store.lease_leases().await?;
    let leases = listed.leases.iter().filter_map(|lease| lease_hex(lease.id)).collect();
    Ok(json_response(&LeasesBody { leases }))
}

pub(super) async fn get<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let id = id(&call)?;
    let with_keys = call.parameters.flag("keys");
    let lease = call.store.lease_time_to_live(id, with_keys).await?;
    if lease.ttl < 0 {
        return Err(Problem::new(LEASE_NOT_FOUND, "there is no lease of this id"));
    }
    let encoding = call.encoding();
    let keys = lease.keys.iter().map(|key| KeyBody::new(key, encoding));
    Ok(json_response(&LeaseBody {
        id: hex(id.cast_unsigned()),
        ttl: lease.ttl,
        granted_ttl: Some(lease.granted_ttl),
        keys: with_keys.then(|| keys.collect()),
    }))
}

pub(super) async fn keep_alive<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let id = id(&call)?;
    body::none(&call.headers, call.body).await?;
    let kept = call.store.lease_keep_alive(id).await?;
    if kept.ttl <= 0 {
        return Err(Problem::new(LEASE_NOT_FOUND, "there is no lease of this id"));
    }
    Ok(json_response(&LeaseBody {
        id: hex(id.cast_unsigned()),
        ttl: kept.ttl,
        granted_ttl: None,
        keys: None,
    }))
}

pub(super) async fn revoke<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let id = id(&call)?;
    body::none(&call.headers, call.body).await?;
    let revoked = call.store.lease_revoke(LeaseRevokeRequest { id }).await?;
    let revision = revoked.header.unwrap_or_default().revision;
    Ok(json_response(&DoneBody { revision }))
}
