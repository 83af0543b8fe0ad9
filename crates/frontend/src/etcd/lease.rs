//! The Lease service.

use api::Store;
use api::kv::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseLeasesResponse, LeaseRevokeRequest,
    LeaseRevokeResponse, LeaseTimeToLiveResponse,
};
use futures::TryStreamExt;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use super::status::status;
use super::{for_client, others_turn};
use crate::proto::etcdserverpb::{LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseTimeToLiveRequest, lease_server};

/// How many leases of one stream may be kept alive before the replies are sent and others have their turn.
const BURST_MAX: u32 = 64;

/// Answers Lease calls from a store.
pub(super) struct Lease<S>(pub(super) S);

#[tonic::async_trait]
impl<S: Store> lease_server::Lease for Lease<S> {
    async fn lease_grant(&self, request: Request<LeaseGrantRequest>) -> Result<Response<LeaseGrantResponse>, Status> {
        let store = for_client(&self.0, &request);
        let granted = store.lease_grant(request.into_inner()).await;
        granted.map(Response::new).map_err(status)
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        let store = for_client(&self.0, &request);
        let revoked = store.lease_revoke(request.into_inner()).await;
        revoked.map(Response::new).map_err(status)
    }

    /// One at a time and in order, as in etcd: the next request is read when the last one is answered.
    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<BoxStream<'static, Result<LeaseKeepAliveResponse, Status>>>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let mut count = 0_u32;
        let replies = request.into_inner().and_then(move |request| {
            let store = store.clone();
            count = count.wrapping_add(1);
            async move {
                // The connection's own task does this, and others wait for it: see `h2_server/bridge.rs`.
                if count.is_multiple_of(BURST_MAX) {
                    others_turn().await;
                }
                store.lease_keep_alive(request.id).await.map_err(status)
            }
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let store = for_client(&self.0, &request);
        let request = request.into_inner();
        let left = store.lease_time_to_live(request.id, request.keys).await;
        left.map(Response::new).map_err(status)
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        let store = for_client(&self.0, &request);
        store.lease_leases().await.map(Response::new).map_err(status)
    }
}
