//! What the front ends tell the metrics.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use crate::etcd::methods::Method;

/// The names that gRPC's status codes have in metrics, by number (grpc-go's `codes.Code.String`).
pub const CODE_NAMES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// Hears of every call. All methods are on the hot path: look counters up by [`Method::index`], do not allocate.
#[allow(unused_variables, reason = "the defaults ignore everything")]
pub trait Observer: Send + Sync + 'static {
    /// A call of a known method came in (`grpc_server_started_total`).
    fn started(&self, method: &'static Method) {}

    /// It ended with this status code, below 17 (`grpc_server_handled_total`). A call that its client gave up ends as
    /// Canceled. It took this long from its request's headers to its status.
    fn handled(&self, method: &'static Method, code: usize, took: Duration) {}

    /// Messages of it came in, with this many bytes of payload (`grpc_server_msg_received_total`,
    /// `etcd_network_client_grpc_received_bytes_total`).
    fn received(&self, method: &'static Method, messages: u64, bytes: u64) {}

    /// Messages of it went out (`grpc_server_msg_sent_total`, `etcd_network_client_grpc_sent_bytes_total`).
    fn sent(&self, method: &'static Method, messages: u64, bytes: u64) {}

    /// The client said which API version it was built against; "unknown" if it said nothing
    /// (`etcd_server_client_requests_total`). The text is the client's: bound how many there can be.
    fn client_version(&self, method: &'static Method, version: &str) {}

    /// The HTTP API answered an operation, "none" for what is none, with this status, and began to do so after this long. An
    /// operation that `waits` may take long although nothing is slow.
    fn http(&self, operation: &'static str, status: StatusCode, took: Duration, waits: bool) {}

    /// `/health` was asked, and answered so (`etcd_server_health_success`, `etcd_server_health_failures`).
    fn health(&self, healthy: bool) {}

    /// One check of `/livez` or `/readyz` ended so (`etcd_server_healthcheck`, `etcd_server_healthchecks_total`).
    fn health_check(&self, kind: &'static str, name: &'static str, healthy: bool) {}
}

/// Makes spans of calls, for a trace.
pub trait CallTracer: Send + Sync + 'static {
    /// A call came in with these headers. `None` if it is not sampled.
    fn start(&self, method: &'static Method, headers: &HeaderMap) -> Option<Box<dyn CallSpan>>;
}

/// A call in a trace.
pub trait CallSpan: Send {
    /// It ended with this status code, below 17.
    fn end(self: Box<Self>, code: usize);
}

/// Hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Deaf;

impl Observer for Deaf {}
