//! gRPC's own health service. A server that answers at all is serving, as in etcd.

use std::collections::HashMap;

use futures::stream::{self, BoxStream, StreamExt};
use tonic::{Request, Response, Status};

use crate::proto::health::health_check_response::ServingStatus;
use crate::proto::health::{
    HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse, health_server,
};

/// The name that stands for the server as a whole.
const WHOLE_SERVER: &str = "";

/// Says that the server serves.
pub(super) struct Health;

fn reply(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if request.into_inner().service == WHOLE_SERVER {
            Ok(Response::new(reply(ServingStatus::Serving)))
        } else {
            Err(Status::not_found("unknown service"))
        }
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        Ok(Response::new(HealthListResponse {
            statuses: HashMap::from([(WHOLE_SERVER.to_owned(), reply(ServingStatus::Serving))]),
        }))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<BoxStream<'static, Result<HealthCheckResponse, Status>>>, Status> {
        let status = if request.into_inner().service == WHOLE_SERVER {
            ServingStatus::Serving
        } else {
            ServingStatus::ServiceUnknown
        };
        // The status does not change, and the stream stays open so that the client need not ask again.
        let replies = stream::once(async move { Ok(reply(status)) }).chain(stream::pending());
        Ok(Response::new(Box::pin(replies)))
    }
}
