//! The cluster and this member: `/api/v1/members`, `/api/v1/status`.

use api::Store;
use api::limits::{ETCD_VERSION, METASTORE_VERSION};
use axum::response::Response;

use super::json::{MembersBody, StatusBody, hex};
use super::problem::Problem;
use super::{Call, json_response};

pub(super) async fn members<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let list = call.store.members(!call.parameters.flag("serializable")).await?;
    Ok(json_response(&MembersBody {
        cluster_id: hex(list.header.cluster_id),
        members: list.members.into_iter().map(Into::into).collect(),
    }))
}

pub(super) async fn status<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    call.store.check_user().await?;
    let status = call.store.status();
    Ok(json_response(&StatusBody {
        cluster_id: hex(status.header.cluster_id),
        member_id: hex(status.header.member_id),
        leader_id: (status.leader != 0).then(|| hex(status.leader)),
        is_learner: status.is_learner,
        revision: status.header.revision,
        raft_term: status.header.raft_term,
        raft_index: status.raft_index,
        raft_applied_index: status.raft_applied_index,
        db_bytes: status.db_bytes,
        db_in_use_bytes: status.db_in_use_bytes,
        db_quota_bytes: status.db_quota_bytes,
        errors: status.errors,
        version: METASTORE_VERSION,
        etcd_version: ETCD_VERSION,
    }))
}
