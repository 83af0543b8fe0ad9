//! The wire: gRPC framed by hand over HTTP/2, TLS, and one plain GET for metrics.

pub(crate) mod channel;
pub(crate) mod endpoint;
pub(crate) mod failure;
pub(crate) mod grpc;
mod headers;
mod http2;
pub(crate) mod metrics;
pub(crate) mod security;
