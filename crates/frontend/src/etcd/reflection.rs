//! gRPC's reflection: clients such as grpcurl learn from it which services there are.

use std::convert::Infallible;

use http::{Request, Response};
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic_reflection::server::Builder;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use crate::proto::DESCRIPTORS;

type Server = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// Both versions of the service, which differ in name alone.
pub(super) struct Reflection {
    v1: Server,
    v1alpha: Server,
}

fn builder() -> Builder<'static> {
    Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .include_reflection_service(false)
}

impl Reflection {
    pub(super) fn new() -> Self {
        let whole = "the descriptors are those that the services were generated from";
        Reflection {
            v1: BoxCloneSyncService::new(builder().build_v1().expect(whole)),
            v1alpha: BoxCloneSyncService::new(builder().build_v1alpha().expect(whole)),
        }
    }

    pub(super) fn v1(&self, request: Request<Body>) -> BoxFuture<Response<Body>, Infallible> {
        Box::pin(self.v1.clone().oneshot(request))
    }

    pub(super) fn v1alpha(&self, request: Request<Body>) -> BoxFuture<Response<Body>, Infallible> {
        Box::pin(self.v1alpha.clone().oneshot(request))
    }
}
