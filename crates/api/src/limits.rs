//! Every limit that a client can run into, and the versions that we report.

use std::time::Duration;

/// The etcd release whose API we implement; what clients read in Status, `/version` and the metrics. kube-apiserver
/// decides features by it.
pub const ETCD_VERSION: &str = "3.7.3";

/// The cluster version that goes with [`ETCD_VERSION`].
pub const ETCD_CLUSTER_VERSION: &str = "3.7.0";

/// Our own version.
pub const METASTORE_VERSION: &str = env!("CARGO_PKG_VERSION");

/// The largest lease TTL, in seconds (etcd's `MaxLeaseTTL`).
pub const LEASE_TTL_MAX_S: i64 = 9_000_000_000;

/// What gRPC adds to `max-request-bytes` before it refuses a message unread, in bytes (etcd's `grpcOverheadBytes`).
pub const GRPC_OVERHEAD_BYTES: usize = 512 * 1024;

/// How deep transactions may nest. etcd has no such limit but its decoder's; ours keeps every recursion bounded.
pub const TXN_DEPTH_MAX: usize = 32;

/// Limits that the operator sets.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest request that may be proposed, in bytes of its encoding (`--max-request-bytes`).
    pub request_bytes_max: usize,
    /// Most compares, and most operations in each branch, of a transaction (`--max-txn-ops`).
    pub txn_ops_max: usize,
    /// How long a request may wait for consensus: 5 s plus two election timeouts, as in etcd.
    pub request_timeout: Duration,
    /// Most proposals that wait for their reply, before new ones get "too many requests".
    pub pending_proposals_max: usize,
    /// Most bytes of proposals that wait for their reply.
    pub pending_bytes_max: usize,
    /// Most events that one watch stream may have waiting in memory; the rest is read from storage when it catches up.
    pub watch_buffer_events_max: usize,
    /// Most bytes of events that one watch stream may have waiting in memory.
    pub watch_buffer_bytes_max: usize,
    /// How often a watcher that asked for progress notifications gets one when nothing happens.
    pub watch_progress_interval: Duration,
    /// A unary request that takes longer is noted in the log.
    pub slow_request: Duration,
    /// The shortest lease, in seconds: one and a half election timeouts, rounded up.
    pub lease_ttl_min_s: i64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            request_bytes_max: 1_572_864,
            txn_ops_max: 128,
            request_timeout: Duration::from_secs(7),
            pending_proposals_max: 100_000,
            pending_bytes_max: 256 << 20,
            watch_buffer_events_max: 4096,
            watch_buffer_bytes_max: 4 << 20,
            watch_progress_interval: Duration::from_secs(600),
            slow_request: Duration::from_millis(300),
            lease_ttl_min_s: 2,
        }
    }
}

impl Limits {
    /// The largest gRPC message that is read at all, in bytes.
    pub fn grpc_receive_bytes_max(&self) -> usize {
        self.request_bytes_max + GRPC_OVERHEAD_BYTES
    }
}

const _: () = assert!(GRPC_OVERHEAD_BYTES > 0);
// Each level of transaction is two levels of protobuf, and a batch in the log wraps it in three more and its innermost
// operations in two. prost reads 100 levels; a committed entry that it could not read would stop every member.
const _: () = assert!(2 * (TXN_DEPTH_MAX - 1) + 5 <= 100);
