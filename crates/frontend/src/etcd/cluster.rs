//! The Cluster service: so far it only lists members.

use api::Store;
use tonic::{Request, Response, Status};

use super::status::status;
use crate::proto::etcdserverpb::{MemberListRequest, MemberListResponse, cluster_server};

/// Answers Cluster calls from a store.
pub(super) struct Cluster<S>(pub(super) S);

#[tonic::async_trait]
impl<S: Store> cluster_server::Cluster for Cluster<S> {
    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        let linearizable = request.into_inner().linearizable;
        let (mut header, members) = self.0.members(linearizable).await.map_err(status)?;
        // Membership has no place in the store's history, and etcd's headers of it none either.
        header.revision = 0;
        Ok(Response::new(MemberListResponse {
            header: Some(header),
            members,
        }))
    }
}
