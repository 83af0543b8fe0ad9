//! The Maintenance service: so far status, and a look at the alarms.

use api::limits::{ETCD_CLUSTER_VERSION, ETCD_VERSION};
use api::{Store, store::Alarm};
use tonic::{Request, Response, Status};

use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, DowngradeInfo, StatusRequest, StatusResponse,
    maintenance_server,
};

/// Answers Maintenance calls from a store.
pub(super) struct Maintenance<S>(pub(super) S);

#[tonic::async_trait]
impl<S: Store> maintenance_server::Maintenance for Maintenance<S> {
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        let request = request.into_inner();
        if request.action != AlarmAction::Get as i32 {
            return Err(Status::unimplemented(
                "metastore: changing alarms with Maintenance.Alarm is not available in this release",
            ));
        }
        let wanted = |alarm: &AlarmMember| request.alarm == AlarmType::None as i32 || request.alarm == alarm.alarm;
        let active = self.0.status().alarms;
        Ok(Response::new(AlarmResponse {
            header: Some(self.0.header()),
            alarms: active.into_iter().map(alarm_member).filter(wanted).collect(),
        }))
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

fn alarm_member(alarm: Alarm) -> AlarmMember {
    let (member_id, alarm) = match alarm {
        Alarm::NoSpace(member) => (member, AlarmType::Nospace),
        Alarm::Corrupt(member) => (member, AlarmType::Corrupt),
    };
    AlarmMember {
        member_id,
        alarm: alarm.into(),
    }
}
