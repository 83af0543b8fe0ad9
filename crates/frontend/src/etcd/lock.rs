//! The Lock service.

use api::kv::{DeleteRangeRequest, TxnRequest};
use api::{LeaseId, Store};
use bytes::Bytes;
use tonic::{Request, Response, Status};

use super::for_client;
use super::queue::{self, status};
use crate::proto::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse, lock_server};

/// Answers Lock calls from a store.
pub(super) struct Lock<S>(pub(super) S);

#[tonic::async_trait]
impl<S: Store> lock_server::Lock for Lock<S> {
    /// A call that ends before it has the lock leaves the line; a lease that was granted for it ends by itself.
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let LockRequest { name, lease } = request.into_inner();
        let lease = queue::session(&store, lease).await?;
        lock(&store, &queue::prefix(&name), lease).await.map(Response::new)
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

async fn lock<S: Store>(store: &S, prefix: &Bytes, lease: LeaseId) -> Result<LockResponse, Status> {
    let key = queue::key(prefix, lease);
    let owner = queue::range_op(queue::first_created(prefix));
    let joined = queue::txn(
        store,
        TxnRequest {
            compare: vec![queue::created_at(&key, 0)],
            success: vec![queue::put_op(&key, Bytes::new(), lease), owner.clone()],
            // Whoever has the lease may be in line, or have the lock, already.
            failure: vec![queue::range_op(queue::get(&key)), owner],
        },
    )
    .await?;
    let own_revision = match joined.succeeded {
        true => queue::revision(joined.header.as_ref()),
        false => queue::found(joined.responses.first())
            .first()
            .map_or(0, |kv| kv.create_revision),
    };
    let owner = queue::found(joined.responses.get(1)).first();
    if owner.is_none_or(|owner| owner.create_revision == own_revision) {
        return Ok(LockResponse {
            header: joined.header,
            key,
        });
    }
    let leave = queue::Leave::new(store, &key, own_revision);
    queue::wait(store, prefix, own_revision - 1).await?;
    // The lease may have ended meanwhile.
    let own = store.range(queue::get(&key)).await.map_err(status)?;
    leave.forget();
    if own.kvs.is_empty() {
        return Err(Status::unknown("mutex: session is expired"));
    }
    Ok(LockResponse {
        header: own.header,
        key,
    })
}
