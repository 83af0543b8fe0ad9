//! Locks: `/api/v1/locks/{name}`, with the keys and the rules of etcd's lock service, so that whoever locks by etcd's
//! clients and whoever locks by HTTP wait for each other.
//!
//! How the line works is in `line.rs`.

use std::pin::pin;
use std::time::Duration;

use api::kv::{DeleteRangeRequest, LeaseGrantRequest, RangeRequest};
use api::{Error, LeaseId, Store};
use axum::response::Response;

use super::json::{AcquiredBody, DoneBody, HolderBody, KeyBody, LockBody, hex};
use super::problem::{INVALID_PARAMETER, INVALID_REQUEST, LEASE_NOT_FOUND, LOCK_NOT_HELD, Problem};
use super::{Call, body, json_response};
use crate::line::{self, Attempt, Line, WaitError};

/// How many of those who wait are named.
const WAITERS_MAX: i64 = 100;

impl From<WaitError> for Problem {
    fn from(error: WaitError) -> Self {
        match error {
            WaitError::Store(error) => error.into(),
            WaitError::Watch(error) => error.into(),
        }
    }
}

pub(super) async fn acquire<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let encoding = call.encoding();
    let wait = call.parameters.time("wait").unwrap_or_default();
    let ttl = call.parameters.integer("ttl");
    if ttl.is_some() && call.parameters.has("lease") {
        let detail = "ttl is for a new lease, and lease names one: give one of them";
        return Err(Problem::new(INVALID_REQUEST, detail));
    }
    body::none(&call.headers, call.body).await?;
    let store = &call.store;
    let line = Line::new(&call.argument);
    let joining = (store.clone(), line.clone(), call.parameters.lease());
    let entered = line::see_through(async move {
        let (store, line, lease) = joining;
        let mut attempt = Attempt::new(&store);
        let (lease, ttl) = match lease {
            0 => {
                let request = LeaseGrantRequest {
                    ttl: ttl.unwrap_or(line::SESSION_TTL_S),
                    id: 0,
                };
                let granted = store.lease_grant(request).await?;
                attempt.has_granted(granted.id);
                (granted.id, Some(granted.ttl))
            }
            lease => (lease, None),
        };
        let key = line.key(lease);
        let joined = line.join(&store, &key, lease).await?;
        if joined.is_new {
            attempt.has_joined(&key, joined.revision);
        }
        Ok::<_, Error>((attempt, lease, ttl, key, joined))
    });
    let (attempt, lease, ttl, key, joined) = entered.await?;
    let revision = joined.revision;
    if !joined.is_first {
        // The lease that was granted for it is looked after whatever the client may do by now.
        let member = store.on_behalf_of_member();
        let mut stop = pin!(crate::service::stopped(call.shared.stopping.clone()));
        let waited = tokio::select! {
            waited = tokio::time::timeout(wait, line.wait(store, revision)) => waited,
            error = keep_alive(&member, lease, ttl) => Ok(Err(error.into())),
            () = &mut stop => Ok(Err(Error::Stopped.into())),
        };
        let timed_out = waited.is_err();
        if let Ok(waited) = waited {
            if matches!(waited, Err(WaitError::Store(Error::Stopped))) {
                // Before the answer: after it there may be no time left.
                let _ = attempt.undo().await;
                return Err(Error::Stopped.into());
            }
            waited?;
        }
        // The lease may have ended meanwhile, and the place with it.
        let own = line::read(store, &line::get(&key)).await?;
        if own.kvs.first().is_none_or(|kv| kv.create_revision != revision) {
            return Err(Problem::new(
                LEASE_NOT_FOUND,
                "the lease ended while it waited for the lock",
            ));
        }
        if timed_out {
            let first = line::read(store, &line.first()).await?;
            let first = first.kvs.first();
            // Its turn may have come at the last moment.
            if first.is_none_or(|first| first.create_revision != revision) {
                let holder = first.map(HolderBody::new);
                attempt.undo().await?;
                return Err(Problem::lock_held(holder));
            }
        }
        if ttl.is_some() {
            // Whoever waited has its whole time from now on.
            member.lease_keep_alive(lease).await?;
        }
    }
    attempt.keep();
    Ok(json_response(&AcquiredBody {
        key: KeyBody::new(&key, encoding),
        lease: hex(lease.cast_unsigned()),
        ttl,
        revision,
    }))
}

/// Keeps the lease that was granted to somebody in line alive. Ends only with an error.
async fn keep_alive<S: Store>(store: &S, lease: LeaseId, ttl: Option<i64>) -> Error {
    let Some(ttl) = ttl else {
        return std::future::pending().await;
    };
    let pause = Duration::from_secs(ttl.max(1).cast_unsigned()) / 3;
    loop {
        tokio::time::sleep(pause).await;
        match store.lease_keep_alive(lease).await {
            Ok(kept) if kept.ttl <= 0 => return Error::LeaseNotFound,
            // Without a leader leases do not end: there is time to try again.
            Ok(_) | Err(_) => {}
        }
    }
}

pub(super) async fn get_lock<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let in_line = RangeRequest {
        limit: WAITERS_MAX + 1,
        serializable: call.parameters.flag("serializable"),
        ..Line::new(&call.argument).first()
    };
    let in_line = call.store.range(in_line).await?;
    let mut names = in_line.kvs.iter().map(HolderBody::new);
    let holder = names.next();
    Ok(json_response(&LockBody {
        revision: in_line.header.unwrap_or_default().revision,
        held: holder.is_some(),
        holder,
        waiters: names.collect(),
        waiting: (in_line.count - 1).max(0),
    }))
}

pub(super) async fn release<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    if !call.parameters.has("lease") {
        let detail = "lease says whose hold ends; POST returned it";
        return Err(Problem::parameter(INVALID_PARAMETER, "lease", detail));
    }
    body::none(&call.headers, call.body).await?;
    let request = DeleteRangeRequest {
        key: Line::new(&call.argument).key(call.parameters.lease()),
        ..Default::default()
    };
    request.validate()?;
    let deleted = call.store.delete_range(request).await?;
    if deleted.deleted == 0 {
        return Err(Problem::new(
            LOCK_NOT_HELD,
            "there is no key of this lease under the lock's name",
        ));
    }
    let revision = deleted.header.unwrap_or_default().revision;
    Ok(json_response(&DoneBody { revision }))
}
