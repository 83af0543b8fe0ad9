//! The Cluster service.

use api::kv::{Member, ResponseHeader};
use api::{Error, Store};
use tonic::{Request, Response, Status};

use super::status::status;
use super::{for_client, peer_urls};
use crate::proto::etcdserverpb::{
    MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest,
    MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
    cluster_server,
};

/// Answers Cluster calls from a store.
pub(super) struct Cluster<S>(pub(super) S);

#[tonic::async_trait]
impl<S: Store> cluster_server::Cluster for Cluster<S> {
    async fn member_add(&self, request: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
        let store = for_client(&self.0, &request);
        let MemberAddRequest { peer_ur_ls, is_learner } = request.into_inner();
        let peer_urls = peer_urls::sorted(&peer_ur_ls).ok_or_else(|| status(Error::BadMemberUrls))?;
        let (added, list) = store.member_add(peer_urls, is_learner).await.map_err(status)?;
        Ok(Response::new(MemberAddResponse {
            header: header(list.header),
            // What the request says of it and no more: its name and client URLs come when it starts.
            member: Some(Member {
                id: added.id,
                peer_urls: added.peer_urls,
                is_learner: added.is_learner,
                ..Default::default()
            }),
            members: list.members,
        }))
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        let store = for_client(&self.0, &request);
        let list = store.member_remove(request.into_inner().id).await.map_err(status)?;
        Ok(Response::new(MemberRemoveResponse {
            header: header(list.header),
            members: list.members,
        }))
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        let store = for_client(&self.0, &request);
        store.check_admin().await.map_err(status)?;
        let MemberUpdateRequest { id, peer_ur_ls } = request.into_inner();
        if peer_urls::sorted(&peer_ur_ls).is_none() {
            // etcd does not look at them here, and a member that then dials them panics. It has a text for bad URLs,
            // and for a member that does not exist this one, whatever the URLs.
            let list = store.members(true).await.map_err(status)?;
            let known = list.members.iter().any(|member| member.id == id);
            return Err(status(if known {
                Error::BadMemberUrls
            } else {
                Error::MemberNotFound
            }));
        }
        // Unlike those of a new member, they stay as they were given.
        let peer_urls = peer_ur_ls.iter().map(|url| url.trim().to_owned()).collect();
        let list = store.member_update(id, peer_urls).await.map_err(status)?;
        Ok(Response::new(MemberUpdateResponse {
            header: header(list.header),
            members: list.members,
        }))
    }

    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        let store = for_client(&self.0, &request);
        let linearizable = request.into_inner().linearizable;
        let list = store.members(linearizable).await.map_err(status)?;
        Ok(Response::new(MemberListResponse {
            header: header(list.header),
            members: list.members,
        }))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        let store = for_client(&self.0, &request);
        let list = store.member_promote(request.into_inner().id).await.map_err(status)?;
        Ok(Response::new(MemberPromoteResponse {
            header: header(list.header),
            members: list.members,
        }))
    }
}

/// Membership has no place in the store's history, and etcd's headers of it none either.
fn header(header: ResponseHeader) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision: 0, ..header })
}
