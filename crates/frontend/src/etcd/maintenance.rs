//! The Maintenance service.

use std::task::Poll;

use api::kv::{AlarmAction, AlarmRequest, AlarmResponse, AlarmType};
use api::limits::{ETCD_CLUSTER_VERSION, ETCD_VERSION};
use api::store::{BackupStream, DowngradeStep};
use api::{Error, Store};
use futures::stream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::for_client;
use super::status::status;
use crate::proto::etcdserverpb::{
    DefragmentRequest, DefragmentResponse, DowngradeInfo, DowngradeRequest, DowngradeResponse, HashKvRequest,
    HashKvResponse, HashRequest, HashResponse, MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest,
    SnapshotResponse, StatusRequest, StatusResponse, downgrade_request, maintenance_server,
};

/// Answers Maintenance calls from a store.
pub(super) struct Maintenance<S>(pub(super) S);

#[tonic::async_trait]
impl<S: Store> maintenance_server::Maintenance for Maintenance<S> {
    async fn snapshot(
        &self,
        request: Request<SnapshotRequest>,
    ) -> Result<Response<BoxStream<SnapshotResponse>>, Status> {
        let mut backup = for_client(&self.0, &request).backup().await.map_err(status)?;
        let messages = stream::poll_fn(move |context| {
            let next = std::task::ready!(backup.poll_next(context));
            Poll::Ready(next.map(|chunk| {
                let chunk = chunk.map_err(status)?;
                Ok(SnapshotResponse {
                    header: None,
                    remaining_bytes: chunk.remaining_bytes,
                    blob: chunk.bytes,
                    version: ETCD_CLUSTER_VERSION.to_owned(),
                })
            }))
        });
        Ok(Response::new(Box::pin(messages)))
    }

    async fn hash(&self, request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        let hashed = for_client(&self.0, &request).hash().await.map_err(status)?;
        Ok(Response::new(HashResponse {
            header: Some(hashed.header),
            hash: hashed.hash,
        }))
    }

    async fn defragment(&self, request: Request<DefragmentRequest>) -> Result<Response<DefragmentResponse>, Status> {
        for_client(&self.0, &request).defragment().await.map_err(status)?;
        Ok(Response::new(DefragmentResponse { header: None }))
    }

    async fn downgrade(&self, request: Request<DowngradeRequest>) -> Result<Response<DowngradeResponse>, Status> {
        use downgrade_request::DowngradeAction;
        let store = for_client(&self.0, &request);
        let DowngradeRequest { action, version } = request.into_inner();
        let step = match DowngradeAction::try_from(action) {
            Ok(DowngradeAction::Validate) => DowngradeStep::Validate(version),
            Ok(DowngradeAction::Enable) => DowngradeStep::Enable(version),
            Ok(DowngradeAction::Cancel) => DowngradeStep::Cancel,
            // What reaches the wire from etcd.
            Err(_) => return Err(Status::unknown("etcdserver: unknown method")),
        };
        let done = store.downgrade(step).await.map_err(status)?;
        Ok(Response::new(DowngradeResponse {
            header: Some(done.header),
            version: done.version,
        }))
    }

    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        let store = for_client(&self.0, &request);
        let request = request.into_inner();
        // What is not known must not get into the log. etcd lets it, and panics where an action means nothing to it.
        let Ok(action) = AlarmAction::try_from(request.action) else {
            return Err(Status::invalid_argument("metastore: unknown alarm action"));
        };
        if action == AlarmAction::Activate && AlarmType::try_from(request.alarm).is_err() {
            return Err(Status::invalid_argument("metastore: unknown alarm type"));
        }
        store.alarm(request).await.map(Response::new).map_err(status)
    }

    async fn hash_kv(&self, request: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, Status> {
        let store = for_client(&self.0, &request);
        let hashed = store.hash_kv(request.into_inner().revision).await.map_err(status)?;
        Ok(Response::new(HashKvResponse {
            header: Some(hashed.header),
            hash: hashed.hash,
            compact_revision: hashed.compact_revision,
            hash_revision: hashed.hash_revision,
        }))
    }

    async fn move_leader(&self, request: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
        let store = for_client(&self.0, &request);
        store.check_admin().await.map_err(status)?;
        // A follower does not pass it on: asking the wrong member is an error, before whom to move it to is looked at.
        let now = store.status();
        if now.leader != now.header.member_id {
            return Err(status(Error::NotLeader));
        }
        store
            .move_leader(request.into_inner().target_id)
            .await
            .map_err(status)?;
        Ok(Response::new(MoveLeaderResponse { header: None }))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let store = for_client(&self.0, &request);
        store.check_user().await.map_err(status)?;
        let status = store.status();
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
            downgrade_info: Some(DowngradeInfo {
                enabled: status.downgrade_target.is_some(),
                target_version: status.downgrade_target.unwrap_or_default(),
            }),
            header: Some(status.header),
        }))
    }
}
