//! The Maintenance service.

use api::kv::{AlarmAction, AlarmRequest, AlarmResponse, AlarmType};
use api::limits::{ETCD_CLUSTER_VERSION, ETCD_VERSION};
use api::{Error, Store};
use tonic::{Request, Response, Status};

use super::status::status;
use crate::proto::etcdserverpb::{
    DowngradeInfo, HashKvRequest, HashKvResponse, MoveLeaderRequest, MoveLeaderResponse, StatusRequest, StatusResponse,
    maintenance_server,
};

/// Answers Maintenance calls from a store.
pub(super) struct Maintenance<S>(pub(super) S);

#[tonic::async_trait]
impl<S: Store> maintenance_server::Maintenance for Maintenance<S> {
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        let request = request.into_inner();
        // What is not known must not get into the log. etcd lets it, and panics where an action means nothing to it.
        let Ok(action) = AlarmAction::try_from(request.action) else {
            return Err(Status::invalid_argument("metastore: unknown alarm action"));
        };
        if action == AlarmAction::Activate && AlarmType::try_from(request.alarm).is_err() {
            return Err(Status::invalid_argument("metastore: unknown alarm type"));
        }
        self.0.alarm(request).await.map(Response::new).map_err(status)
    }

    async fn hash_kv(&self, request: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, Status> {
        let hashed = self.0.hash_kv(request.into_inner().revision).await.map_err(status)?;
        Ok(Response::new(HashKvResponse {
            header: Some(hashed.header),
            hash: hashed.hash,
            compact_revision: hashed.compact_revision,
            hash_revision: hashed.hash_revision,
        }))
    }

    async fn move_leader(&self, request: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
        // A follower does not pass it on: asking the wrong member is an error, before whom to move it to is looked at.
        let now = self.0.status();
        if now.leader != now.header.member_id {
            return Err(status(Error::NotLeader));
        }
        self.0
            .move_leader(request.into_inner().target_id)
            .await
            .map_err(status)?;
        Ok(Response::new(MoveLeaderResponse { header: None }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let status = self.0.status();
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        Ok(Response::new(StatusResponse {
            version: ETCD_VERSION.to_owned(),
            db_size: signed(status.db_bytes),
            leader: status.leader,
            raft_index: status.raft_index,
            raft_term: status.header.raft_term,
            raft_applied_index: status.raft_applied_index,
            errors: status.errors,
            db_size_in_use: signed(status.db_in_use_bytes),
            is_learner: status.is_learner,
            storage_version: ETCD_CLUSTER_VERSION.to_owned(),
            db_size_quota: signed(status.db_quota_bytes),
            downgrade_info: Some(DowngradeInfo::default()),
            header: Some(status.header),
        }))
    }
}
