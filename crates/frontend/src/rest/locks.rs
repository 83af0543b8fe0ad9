//! Locks: `/api/v1/locks/{name}`, with the keys and the rules of etcd's lock service, so that whoever locks by etcd's
//! clients and whoever locks by HTTP wait for each other.
//!
//! How the line works is in `line.rs`.

use std::pin::pin;
use std::time::Duration;

use api::kv::{LeaseGrantRequest, RangeRequest};
use api::{Error, LeaseId, Store};
use axum::response::Response;
use tokio::time::Instant;

use super::json::{AcquiredBody, DoneBody, HolderBody, KeyBody, LockBody, hex};
use super::problem::{INVALID_PARAMETER, INVALID_REQUEST, LEASE_NOT_FOUND, LOCK_NOT_HELD, PLACE_GIVEN_UP, Problem};
use super::{Call, body, json_response};
use crate::line::{self, Attempt, Line, WaitError};

const LEASE_ENDED: &str = "the lease ended while it waited for the lock";

const STILL_IN_LINE: &str = "the lock was not free within the time to wait; the lease is still in line, by another call \
                             or because its place could not be given back yet, and DELETE takes it out";

/// How long a server that stops gives those in line to leave it: well within the time that its connections have.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

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
    let (attempt, lease, ttl) = match call.parameters.lease() {
        0 => {
            let granting = store.clone();
            let request = LeaseGrantRequest {
                ttl: ttl.unwrap_or(line::SESSION_TTL_S),
                id: 0,
            };
            let granted = line::see_through(async move {
                let mut attempt = Attempt::new(&granting);
                let granted = granting.lease_grant(request).await?;
                attempt.has_granted(granted.id, granted.ttl);
                Ok::<_, Error>((attempt, granted))
            });
            let (attempt, granted) = granted.await?;
            (attempt, granted.id, Some(granted.ttl))
        }
        lease => (Attempt::new(store), lease, None),
    };
    let key = line.key(lease);
    // The lease that was granted for it is looked after whatever the client may do by now.
    let member = store.on_behalf_of_member();
    let due = Instant::now() + wait;
    let mut stop = pin!(crate::service::stopped(call.shared.stopping.clone()));
    let (mut attempt, joined) = line.join(store, attempt, &key, lease, None).await?;
    let revision = joined.revision;
    if !joined.is_first {
        let waited = tokio::select! {
            waited = tokio::time::timeout_at(due, line.wait(store, revision)) => waited,
            gone = line.wait_for_end(store, &key, revision, joined.taken_at) => Ok(gone),
            error = keep_alive(&member, lease, ttl) => Ok(Err(error.into())),
            () = &mut stop => {
                // Before the answer: after it there may be no time left.
                attempt.undo(STOP_PATIENCE).await;
                return Err(Error::Stopped.into());
            }
        };
        let timed_out = waited.is_err();
        if let Ok(waited) = waited {
            waited?;
        }
        if timed_out {
            let first = line::read(store, &line.first()).await?;
            let first = first.kvs.first();
            // Its turn may have come at the last moment.
            if first.is_some_and(|first| first.create_revision != revision) {
                let mut problem = Problem::lock_held(first.map(HolderBody::new));
                // A lease that was granted for this call its client never hears of.
                if !attempt.undo(line::UNDO_PATIENCE).await && ttl.is_none() {
                    problem.explain(STILL_IN_LINE.to_owned());
                }
                return Err(problem);
            }
        }
        if line.confirm(store, &mut attempt, &key, lease, &joined).await?.is_none() {
            return Err(gone(store, lease).await?);
        }
        // Whoever waited has its whole time from now on.
        if ttl.is_some() && !is_kept(&member, lease).await? {
            return Err(Problem::new(LEASE_NOT_FOUND, LEASE_ENDED));
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

/// Why a call has lost its place: its lease has ended, or somebody who has the lease gave the place up.
async fn gone<S: Store>(store: &S, lease: LeaseId) -> Result<Problem, Error> {
    let mut tries = 0;
    let left = loop {
        match store.lease_time_to_live(lease, false).await {
            Err(Error::AuthOldRevision) if tries < line::TRIES_MAX => tries += 1,
            left => break left?,
        }
    };
    Ok(match left.ttl < 0 {
        true => Problem::new(LEASE_NOT_FOUND, LEASE_ENDED),
        false => Problem::new(PLACE_GIVEN_UP, "the key of the lease under the lock's name is gone"),
    })
}

/// Gives a lease its whole time; `false` if it has ended.
async fn is_kept<S: Store>(member: &S, lease: LeaseId) -> Result<bool, Error> {
    let mut tries = 0;
    loop {
        match member.lease_keep_alive(lease).await {
            // Users or roles changed meanwhile.
            Err(Error::AuthOldRevision) if tries < line::TRIES_MAX => tries += 1,
            kept => return Ok(kept?.ttl > 0),
        }
    }
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
    let key = Line::new(&call.argument).key(call.parameters.lease());
    match Line::leave(&call.store, &key).await? {
        Some(header) => Ok(json_response(&DoneBody {
            revision: header.revision,
        })),
        None => Err(Problem::new(
            LOCK_NOT_HELD,
            "there is no key of this lease under the lock's name",
        )),
    }
}
