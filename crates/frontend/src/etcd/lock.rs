//! The Lock service.

use api::kv::{DeleteRangeRequest, LeaseGrantRequest};
use api::{LeaseId, Store};
use tonic::{Request, Response, Status};

use super::for_client;
use crate::line::{self, Attempt, Line, WaitError};
use crate::proto::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse, lock_server};

/// The status of an error of the store. etcd's services for locks and elections are clients of their own server, and
/// the codes that it answers them with get lost on the way.
pub(super) fn status(error: api::Error) -> Status {
    Status::unknown(error.message())
}

/// The same for waiting in line.
pub(super) fn wait_status(error: WaitError) -> Status {
    match error {
        WaitError::Store(error) => status(error),
        WaitError::Watch(error) => Status::unknown(error.to_string()),
    }
}

/// The lease of a contender, or a new one if it brings none.
pub(super) async fn session<S: Store>(store: &S, lease: LeaseId) -> Result<LeaseId, Status> {
    if lease != 0 {
        return Ok(lease);
    }
    let request = LeaseGrantRequest {
        ttl: line::SESSION_TTL_S,
        id: 0,
    };
    let granted = store.lease_grant(request).await.map_err(status)?;
    Ok(granted.id)
}

/// Answers Lock calls from a store.
pub(super) struct Lock<S>(pub(super) S);

#[tonic::async_trait]
impl<S: Store> lock_server::Lock for Lock<S> {
    /// A call that ends before it has the lock leaves the line; a lease that was granted for it ends by itself.
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let LockRequest { name, lease } = request.into_inner();
        let lease = session(&store, lease).await?;
        lock(&store, &Line::new(&name), lease).await.map(Response::new)
    }

    async fn unlock(&self, request: Request<UnlockRequest>) -> Result<Response<UnlockResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let request = DeleteRangeRequest {
            key: request.into_inner().key,
            ..Default::default()
        };
        request.validate().map_err(status)?;
        let deleted = store.delete_range(request).await.map_err(status)?;
        Ok(Response::new(UnlockResponse { header: deleted.header }))
    }
}

async fn lock<S: Store>(store: &S, line: &Line, lease: LeaseId) -> Result<LockResponse, Status> {
    let key = line.key(lease);
    // Whoever has the lease may be in line, or have the lock, already.
    let joined = line.join(store, Attempt::new(store), &key, lease, None).await;
    let (mut attempt, joined) = joined.map_err(status)?;
    if joined.is_first {
        attempt.keep();
        return Ok(LockResponse {
            header: joined.header,
            key,
        });
    }
    line.wait(store, joined.revision).await.map_err(wait_status)?;
    // The lease may have ended meanwhile, or the place is another call's, further back.
    let confirmed = line.confirm(store, &mut attempt, &key, lease, &joined).await;
    match confirmed.map_err(status)? {
        Some(header) => Ok(LockResponse {
            header: Some(header),
            key,
        }),
        None => Err(Status::unknown("mutex: session is expired")),
    }
}
