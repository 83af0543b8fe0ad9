//! The Auth service, while auth cannot be turned on.

use api::Store;
use tonic::{Request, Response, Status};

use super::status::status;
use crate::proto::etcdserverpb::{
    AuthStatusRequest, AuthStatusResponse, AuthenticateRequest, AuthenticateResponse, auth_server,
};

/// The auth revision of a store whose users and roles were never changed.
const FIRST_AUTH_REVISION: u64 = 1;

/// Answers Auth calls from a store.
pub(super) struct Auth<S>(pub(super) S);

#[tonic::async_trait]
impl<S: Store> auth_server::Auth for Auth<S> {
    async fn auth_status(&self, _: Request<AuthStatusRequest>) -> Result<Response<AuthStatusResponse>, Status> {
        Ok(Response::new(AuthStatusResponse {
            header: Some(self.0.header()),
            enabled: false,
            auth_revision: FIRST_AUTH_REVISION,
        }))
    }

    async fn authenticate(&self, _: Request<AuthenticateRequest>) -> Result<Response<AuthenticateResponse>, Status> {
        Err(status(api::Error::AuthNotEnabled))
    }
}
