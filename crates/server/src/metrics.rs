//! What the node counts, under etcd's names where etcd has one, for `/metrics`.
//!
//! Hot paths count into atomics and histograms of their own; what is a state rather than a count is read when Prometheus
//! asks.

mod absent;
mod durations;

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use api::Store;
use api::limits::{ETCD_CLUSTER_VERSION, ETCD_VERSION, METASTORE_VERSION};
use frontend::observer::CODE_NAMES;
use frontend::{CallKind, Method, Observer, methods};
use hashbrown::HashMap;
use http::StatusCode;
use mvcc::Outcome;
use parking_lot::{Mutex, RwLock};
#[cfg(target_os = "linux")]
use prometheus::core::{Collector, Desc};
#[cfg(target_os = "linux")]
use prometheus::process_collector::ProcessCollector;
#[cfg(target_os = "linux")]
use prometheus::proto::{Counter, MetricFamily};
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder,
};
use storage::{AppendStats, Engine};

pub(crate) use self::durations::Durations;
use self::durations::{DurationVec, doubling};

use crate::NodeStore;
use crate::node::Shared;

/// How long a read index may take before it counts as slow (etcd asks again after as long).
const SLOW_READ_INDEX: Duration = Duration::from_millis(500);

/// How many client API versions get a label of their own; all others count as "other".
const CLIENT_VERSIONS_MAX: usize = 64;
/// Longest client version that is told apart.
const CLIENT_VERSION_BYTES_MAX: usize = 64;

macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident: $name:literal, $help:literal;)*) => {
        /// What the node counts.
        pub struct Metrics {
            $($(#[$doc])* pub(crate) $field: AtomicU64,)*
            /// Proposals that wait in the replica to be batched.
            pub(crate) proposals_waiting: AtomicU64,
            /// Reads under way that may take long.
            pub(crate) reads_open: AtomicI64,
            /// Snapshots that are being put in use: 0 or 1.
            pub(crate) snapshots_installing: AtomicU64,
            /// When the last compaction was done, in seconds since 1970; 0 if none was since the start.
            compacted_at_s: AtomicU64,
            histograms: Histograms,
            applies: DurationVec,
            requests: DurationVec,
            handling: Option<DurationVec>,
            slow_request: Duration,
            range_times: DurationVec,
            calls: Vec<Calls>,
            http_requests: IntCounterVec,
            http_times: HistogramVec,
            client_requests: IntCounterVec,
            health_checks: IntCounterVec,
            health_states: GaugeVec,
            /// By version, the counters of unary calls and of streams: finding them by their labels takes longer.
            client_versions: RwLock<HashMap<String, [IntCounter; 2]>>,
            registry: Registry,
            /// One scrape at a time: it sets gauges and then reads them.
            scrape: Mutex<Scrape>,
        }

        const COUNTERS: &[(&str, &str)] = &[$(($name, $help),)*];

        impl Metrics {
            fn counts(&self) -> Vec<u64> {
                vec![$(self.$field.load(Ordering::Relaxed),)*]
            }

            /// Counters at zero.
            pub fn new(options: &MetricsOptions) -> Self {
                let registry = Registry::new();
                let histograms = Histograms::new(&registry);
                absent::register_all(&registry);
                let http_requests = register(&registry, IntCounterVec::new(
                    Opts::new("metastore_http_requests_total", "Requests to the HTTP API, by operation and status."),
                    &["operation", "code"],
                ));
                let http_times = register(&registry, HistogramVec::new(
                    HistogramOpts::new(
                        "metastore_http_request_duration_seconds",
                        "Time until the HTTP API began to answer, by operation.",
                    ).buckets(doubling(0.0001, 18)),
                    &["operation"],
                ));
                let client_requests = register(&registry, IntCounterVec::new(
                    Opts::new("etcd_server_client_requests_total", "Requests by kind of call and client version."),
                    &["type", "client_api_version"],
                ));
                let health_checks = register(&registry, IntCounterVec::new(
                    Opts::new("etcd_server_healthchecks_total", "Health checks by kind, name and outcome."),
                    &["type", "name", "status"],
                ));
                let health_states = register(&registry, GaugeVec::new(
                    Opts::new("etcd_server_healthcheck", "How a health check came out last: 1 for well."),
                    &["type", "name"],
                ));
                let calls = methods().map(Calls::new).collect();
                let scrape = Mutex::new(Scrape::new(&registry, options));
                Metrics {
                    $($field: AtomicU64::new(0),)*
                    proposals_waiting: AtomicU64::new(0),
                    reads_open: AtomicI64::new(0),
                    snapshots_installing: AtomicU64::new(0),
                    compacted_at_s: AtomicU64::new(0),
                    histograms,
                    applies: apply_times(&registry),
                    requests: request_times(&registry),
                    slow_request: options.slow_request,
                    handling: options.extensive.then(|| handling_times(&registry)),
                    range_times: register(&registry, DurationVec::new(
                        "etcd_server_range_duration_seconds",
                        "Time of reading a range from the engine, by whether it succeeded.",
                        doubling(0.0001, 20),
                        &["success"],
                        [vec!["false"], vec!["true"]],
                        false,
                    )),
                    calls, http_requests, http_times, client_requests, health_checks, health_states,
                    client_versions: RwLock::default(),
                    registry, scrape,
                }
            }
        }
    };
}

counters! {
    /// Proposals that came to nothing.
    proposals_failed: "etcd_server_proposals_failed_total", "Proposals that were not committed in time or refused.";
    /// Leaders seen.
    leader_changes: "etcd_server_leader_changes_seen_total", "Leader changes seen.";
    /// Applies beyond the warning duration.
    slow_applies: "etcd_server_slow_apply_total", "Applies that took longer than --warning-apply-duration.";
    /// Puts.
    puts: "etcd_mvcc_put_total", "Keys put.";
    /// Deletes.
    deletes: "etcd_mvcc_delete_total", "Deletions of a key or a range.";
    /// Transactions.
    txns: "etcd_mvcc_txn_total", "Transactions of the store of more than one read, put or deletion.";
    /// Ranges.
    ranges: "etcd_mvcc_range_total", "Ranges read, those of transactions, compares and previous values included.";
    /// Events.
    events: "etcd_debugging_mvcc_events_total", "Events told, each as often as watchers were told of it.";
    /// Leases granted.
    leases_granted: "etcd_debugging_lease_granted_total", "Leases granted.";
    /// Leases revoked.
    leases_revoked: "etcd_debugging_lease_revoked_total", "Leases that ended.";
    /// Keep-alives.
    leases_renewed: "etcd_debugging_lease_renewed_total", "Leases kept alive.";
    /// Expired leases.
    leases_expired: "etcd_debugging_server_lease_expired_total", "Leases whose time was over.";
    /// Bytes put.
    put_bytes: "metastore_put_bytes_total", "Bytes of keys and values put.";
    /// Bytes from clients.
    client_bytes_received: "etcd_network_client_grpc_received_bytes_total", "Bytes of messages from gRPC clients.";
    /// Bytes to clients.
    client_bytes_sent: "etcd_network_client_grpc_sent_bytes_total", "Bytes of messages to gRPC clients.";
    /// Good health.
    health_success: "etcd_server_health_success", "Answers of /health that said healthy.";
    /// Bad health.
    health_failures: "etcd_server_health_failures", "Answers of /health that said unhealthy.";
    /// Engine fsyncs and log fsyncs together.
    fsyncs: "rocksdb_fsync_count", "fsyncs that a write waited for: the Raft log's, and the engine's if its own log is on.";
    /// Bytes into the engine.
    engine_bytes: "rocksdb_write_bytes", "Bytes of the batches written to the engine.";
    /// Batches into the engine.
    batches: "metastore_engine_batches_total", "Batches written to the engine.";
    /// Operations in them.
    batched_operations: "metastore_applied_operations_total", "Operations applied.";
    /// Log writes.
    log_writes: "metastore_log_writes_total", "Writes to the Raft log.";
    /// Log entries.
    log_entries: "metastore_log_entries_total", "Entries written to the Raft log.";
    /// Log bytes.
    log_bytes: "metastore_log_write_bytes_total", "Bytes written to the Raft log.";
    /// Log stalls.
    log_stalls: "metastore_log_stalls_total", "Times that the Raft log's disk did not finish a write for an election timeout.";
    /// Leadership given up.
    leaders_fenced: "metastore_leaders_fenced_total", "Times that this member gave leadership up because its Raft log's disk was stalled.";
    /// Failed read indexes.
    read_indexes_failed: "etcd_server_read_indexes_failed_total", "Linearizable reads that got no read index in time.";
    /// Slow read indexes.
    slow_read_indexes: "etcd_server_slow_read_indexes_total", "Linearizable reads that waited for a read index longer than 500 ms.";
    /// Late heartbeats.
    heartbeats_late: "etcd_server_heartbeat_send_failures_total", "Heartbeats of this leader that were an interval late or more.";
    /// Promotions.
    learners_promoted: "etcd_server_learner_promote_successes", "Learners that became voters while this member led.";
    /// Compaction.
    compacted_revisions: "etcd_debugging_mvcc_db_compaction_keys_total", "Changes and tombstones that compactions went through.";
    /// Scrapes.
    scrapes: "metastore_scrapes_total", "Times that the metrics were read.";
}

/// Registers a collector. All names are our own constants, so neither making nor registering one can fail.
fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let collector = made.expect("metric names and labels are valid");
    registry
        .register(Box::new(collector.clone()))
        .expect("metric names are unique");
    collector
}

/// What the metrics are to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsOptions {
    /// A histogram of the time that each method takes (`--metrics extensive`).
    pub extensive: bool,
    /// A unary call that takes longer is noted in the log. The front end notes KV requests itself: it can tell more.
    pub slow_request: Duration,
    /// Feature gates: name, stage, and whether it is on.
    pub features: Vec<(String, &'static str, bool)>,
}

impl Default for MetricsOptions {
    fn default() -> Self {
        MetricsOptions {
            extensive: false,
            slow_request: Duration::from_millis(300),
            features: Vec::new(),
        }
    }
}

/// Histograms without labels.
struct Histograms {
    log_fsync: Histogram,
    log_write: Histogram,
    batch_write: Histogram,
    batch_size: Histogram,
    apply: Histogram,
    lease_ttl: Histogram,
    hash: Histogram,
    hash_revision: Histogram,
    compaction_step: Histogram,
    compaction: Histogram,
    flush: Histogram,
    snapshot_sync: Histogram,
    snapshot_save: Histogram,
    defragmentation: Histogram,
    backup: Histogram,
}

impl Histograms {
    fn new(registry: &Registry) -> Self {
        let histogram = |name: &str, help: &str, start: f64, count: i32| {
            let options = HistogramOpts::new(name, help).buckets(doubling(start, count));
            register(registry, Histogram::with_opts(options))
        };
        Histograms {
            log_fsync: histogram(
                "etcd_disk_wal_fsync_duration_seconds",
                "Time of one write of the Raft log with its fdatasync.",
                0.000_125,
                17,
            ),
            log_write: histogram(
                "etcd_disk_wal_write_duration_seconds",
                "Time of one write of the Raft log, with its fdatasync if it has one.",
                0.000_125,
                17,
            ),
            batch_write: histogram(
                "rocksdb_batch_write_duration",
                "Time of applying one batch, in seconds.",
                0.000_01,
                18,
            ),
            batch_size: histogram("rocksdb_batch_size", "Operations in one batch.", 1.0, 14),
            apply: histogram(
                "etcd_disk_backend_commit_duration_seconds",
                "Time of applying one batch.",
                0.001,
                14,
            ),
            lease_ttl: histogram(
                "etcd_debugging_lease_ttl_total",
                "Times to live of leases granted, in seconds.",
                1.0,
                24,
            ),
            hash: histogram(
                "etcd_mvcc_hash_duration_seconds",
                "Time of hashing everything.",
                0.01,
                15,
            ),
            hash_revision: histogram(
                "etcd_mvcc_hash_rev_duration_seconds",
                "Time of hashing the history up to a revision.",
                0.01,
                15,
            ),
            compaction_step: histogram(
                "etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds",
                "How long writes waited for one step of a compaction, in milliseconds.",
                1.0,
                13,
            ),
            compaction: histogram(
                "etcd_debugging_mvcc_db_compaction_total_duration_milliseconds",
                "Time from the first to the last step of a compaction, in milliseconds.",
                100.0,
                14,
            ),
            flush: histogram(
                "etcd_debugging_snap_save_total_duration_seconds",
                "Time of writing out what the engine had in memory, so that the log can be trimmed.",
                0.001,
                14,
            ),
            snapshot_sync: histogram(
                "etcd_snap_db_fsync_duration_seconds",
                "Time of putting a snapshot that another member sent on disk for good.",
                0.001,
                14,
            ),
            defragmentation: histogram(
                "etcd_disk_backend_defrag_duration_seconds",
                "Time that calls of Defragment took.",
                0.1,
                13,
            ),
            backup: histogram(
                "etcd_disk_backend_snapshot_duration_seconds",
                "Time of sending a snapshot to a client.",
                0.01,
                17,
            ),
            snapshot_save: histogram(
                "etcd_snap_db_save_total_duration_seconds",
                "Time of receiving a snapshot from another member.",
                0.1,
                10,
            ),
        }
    }
}

/// The operations that entries are made of, by etcd's names, as far as they have replies that tell them apart.
const APPLIED: &[&str] = &[
    "Put",
    "DeleteRange",
    "Txn",
    "Compaction",
    "LeaseGrant",
    "LeaseRevoke",
    "LeaseCheckpoint",
    "Alarm",
    "ClusterMemberAttrSet",
    "other",
];

fn applied_index(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Put(_) => 0,
        Outcome::DeleteRange(_) => 1,
        Outcome::Txn(_) => 2,
        Outcome::Compact(_) => 3,
        Outcome::LeaseGrant(_) => 4,
        Outcome::LeaseRevoke(_) => 5,
        Outcome::LeaseCheckpoint => 6,
        Outcome::Alarm(_) => 7,
        Outcome::Members(_) => 8,
        #[allow(unreachable_patterns, reason = "kinds to come have no name of etcd's yet")]
        _ => 9,
    }
}

fn apply_times(registry: &Registry) -> DurationVec {
    let series = APPLIED.iter().map(|op| vec!["v3", *op, "true"]);
    let times = DurationVec::new(
        "etcd_server_apply_duration_seconds",
        "Time of applying an operation that succeeded: its share of its batch's time.",
        doubling(0.0001, 20),
        &["version", "op", "success"],
        series,
        false,
    );
    register(registry, times)
}

/// etcd's name for what a method requests: that of the field of its log entry.
fn request_name(method: &Method) -> &'static str {
    match (method.service, method.name) {
        ("etcdserverpb.KV", "Compact") => "Compaction",
        ("etcdserverpb.Auth", "UserAdd") => "AuthUserAdd",
        ("etcdserverpb.Auth", "UserGet") => "AuthUserGet",
        ("etcdserverpb.Auth", "UserList") => "AuthUserList",
        ("etcdserverpb.Auth", "UserDelete") => "AuthUserDelete",
        ("etcdserverpb.Auth", "UserChangePassword") => "AuthUserChangePassword",
        ("etcdserverpb.Auth", "UserGrantRole") => "AuthUserGrantRole",
        ("etcdserverpb.Auth", "UserRevokeRole") => "AuthUserRevokeRole",
        ("etcdserverpb.Auth", "RoleAdd") => "AuthRoleAdd",
        ("etcdserverpb.Auth", "RoleGet") => "AuthRoleGet",
        ("etcdserverpb.Auth", "RoleList") => "AuthRoleList",
        ("etcdserverpb.Auth", "RoleDelete") => "AuthRoleDelete",
        ("etcdserverpb.Auth", "RoleGrantPermission") => "AuthRoleGrantPermission",
        ("etcdserverpb.Auth", "RoleRevokePermission") => "AuthRoleRevokePermission",
        _ => method.name,
    }
}

/// Two series for each method: failures, then successes.
fn request_times(registry: &Registry) -> DurationVec {
    let series = methods().flat_map(|method| ["false", "true"].map(|success| vec![request_name(method), success]));
    let times = DurationVec::new(
        "etcd_server_request_duration_seconds",
        "Time of answering unary requests, by kind and by whether they succeeded.",
        doubling(0.001, 14),
        &["type", "success"],
        series,
        false,
    );
    register(registry, times)
}

fn handling_times(registry: &Registry) -> DurationVec {
    let series = methods().map(|method| vec![method.service, method.name, method.kind.label()]);
    let times = DurationVec::new(
        "grpc_server_handling_seconds",
        "Time from a call's start to its status.",
        prometheus::DEFAULT_BUCKETS.to_vec(),
        &["grpc_service", "grpc_method", "grpc_type"],
        series,
        true,
    );
    register(registry, times)
}

/// Counts of one gRPC method.
struct Calls {
    method: &'static Method,
    started: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    handled: [AtomicU64; CODE_NAMES.len()],
}

impl Calls {
    fn new(method: &'static Method) -> Self {
        Calls {
            method,
            started: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            handled: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

/// The metrics of the process. The library counts its CPU time in whole seconds, in which a rate over a short time drowns;
/// etcd's is finer.
#[cfg(target_os = "linux")]
struct Process(ProcessCollector);

#[cfg(target_os = "linux")]
impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = self.0.collect();
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let mut counter = Counter::default();
        counter.set_value((time.tv_sec * 1000 + time.tv_nsec / 1_000_000) as f64 / 1e3);
        for family in &mut families {
            if family.name() == "process_cpu_seconds_total" {
                for metric in family.mut_metric() {
                    metric.set_counter(counter.clone());
                }
            }
        }
        families
    }
}

/// Everything that is filled in when Prometheus asks.
struct Scrape {
    counters: Vec<IntCounter>,
    gauges: GaugeVecs,
    /// Counters of peers by name, made when first set.
    peers: std::collections::HashMap<&'static str, IntCounterVec>,
    scrapes: IntCounterVec,
    started: IntCounterVec,
    handled: IntCounterVec,
    received: IntCounterVec,
    sent: IntCounterVec,
    engine: std::collections::HashMap<&'static str, EngineMetric>,
    registry: Registry,
}

enum EngineMetric {
    Counter(IntCounter),
    Gauge(Gauge),
}

/// Gauges by name, made when first set.
struct GaugeVecs {
    made: std::collections::HashMap<&'static str, GaugeVec>,
}

impl Scrape {
    fn new(registry: &Registry, options: &MetricsOptions) -> Self {
        let counters = COUNTERS
            .iter()
            .map(|(name, help)| register(registry, IntCounter::new(*name, *help)))
            .collect();
        let by_method = |name: &str, help: &str, labels: &[&str]| {
            register(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        const METHOD: [&str; 3] = ["grpc_service", "grpc_method", "grpc_type"];
        const HANDLED: [&str; 4] = ["grpc_service", "grpc_method", "grpc_type", "grpc_code"];
        let mut scrape = Scrape {
            counters,
            gauges: GaugeVecs {
                made: Default::default(),
            },
            peers: Default::default(),
            scrapes: by_method(
                "promhttp_metric_handler_requests_total",
                "Times that the metrics were read, by HTTP status.",
                &["code"],
            ),
            started: by_method("grpc_server_started_total", "Calls started.", &METHOD),
            handled: by_method("grpc_server_handled_total", "Calls ended, by status code.", &HANDLED),
            received: by_method("grpc_server_msg_received_total", "Messages received.", &METHOD),
            sent: by_method("grpc_server_msg_sent_total", "Messages sent.", &METHOD),
            engine: Default::default(),
            registry: registry.clone(),
        };
        #[cfg(target_os = "linux")]
        registry
            .register(Box::new(Process(ProcessCollector::for_self())))
            .expect("metric names are unique");
        // etcd leaves the patch out here, and nowhere else.
        let minor = ETCD_CLUSTER_VERSION.strip_suffix(".0").unwrap_or(ETCD_CLUSTER_VERSION);
        scrape.set(
            "etcd_cluster_version",
            "The cluster version.",
            &[("cluster_version", minor)],
            1.0,
        );
        for (name, help, label) in [
            ("etcd_server_go_version", "This is no Go program.", "server_go_version"),
            ("go_info", "This is no Go program.", "version"),
        ] {
            scrape.set(name, help, &[(label, "none")], 1.0);
        }
        for (name, stage, on) in &options.features {
            scrape.set(
                "etcd_server_feature_enabled",
                "Whether a feature gate is on.",
                &[("name", name), ("stage", stage)],
                f64::from(*on),
            );
        }
        scrape.set(
            "etcd_server_version",
            "The etcd release whose API this is.",
            &[("server_version", ETCD_VERSION)],
            1.0,
        );
        scrape.set(
            "metastore_version",
            "Our own release.",
            &[("version", METASTORE_VERSION)],
            1.0,
        );
        scrape
    }

    fn set(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], value: f64) {
        let names: Vec<&str> = labels.iter().map(|(name, _)| *name).collect();
        let values: Vec<&str> = labels.iter().map(|(_, value)| *value).collect();
        let registry = &self.registry;
        let gauge = self
            .gauges
            .made
            .entry(name)
            .or_insert_with(|| register(registry, GaugeVec::new(Opts::new(name, help), &names)));
        gauge.with_label_values(&values).set(value);
    }

    /// A counter of one peer.
    fn count(&mut self, name: &'static str, help: &str, label: (&str, &str), value: u64) {
        let registry = &self.registry;
        let counter = self
            .peers
            .entry(name)
            .or_insert_with(|| register(registry, IntCounterVec::new(Opts::new(name, help), &[label.0])));
        set_counter(&counter.with_label_values(&[label.1]), value);
    }
}

/// What is known of each peer. Returns how long pings took to come back, which has no place in the registry.
fn set_peers<E: Engine>(scrape: &mut Scrape, shared: &Shared<E>) -> Option<prometheus::proto::MetricFamily> {
    let local = format!("{:x}", shared.member_id());
    let known = |scrape: &mut Scrape, remote: &str| {
        let both = [("Local", local.as_str()), ("Remote", remote)];
        scrape.set(
            "etcd_network_known_peers",
            "Members that this one knows, itself included.",
            &both,
            1.0,
        );
    };
    known(scrape, &local);
    let (_, transport) = shared.transport.get()?;
    let mut round_trips = Vec::new();
    for peer in transport.stats() {
        let remote = format!("{:x}", peer.id);
        known(scrape, &remote);
        let both = [("Local", local.as_str()), ("Remote", remote.as_str())];
        scrape.set(
            "etcd_network_active_peers",
            "Peers that this member is connected to.",
            &both,
            f64::from(peer.active_since.is_some()),
        );
        for (name, help, value) in [
            (
                "etcd_network_peer_sent_bytes_total",
                "Bytes sent to a peer.",
                peer.sent_bytes + peer.snapshot_sent_bytes,
            ),
            (
                "etcd_network_peer_sent_failures_total",
                "How often a peer could not be reached.",
                peer.send_failures,
            ),
            (
                "metastore_peer_dropped_messages_total",
                "Messages to a peer that were dropped.",
                peer.dropped_messages,
            ),
        ] {
            scrape.count(name, help, ("To", &remote), value);
        }
        scrape.count(
            "etcd_network_peer_received_bytes_total",
            "Bytes received from a peer.",
            ("From", &remote),
            peer.received_bytes + peer.snapshot_received_bytes,
        );
        let to = [("To", remote.as_str())];
        scrape.set(
            "metastore_peer_queued_bytes",
            "Bytes that wait to be sent to a peer.",
            &to,
            peer.queued_bytes as f64,
        );
        scrape.set(
            "metastore_peer_round_trip_seconds",
            "How long the last ping to a peer took.",
            &to,
            peer.round_trip.map_or(0.0, |time| time.as_secs_f64()),
        );
        round_trips.push(peer.round_trips.metric(&to));
    }
    (!round_trips.is_empty()).then(|| {
        durations::family(
            "etcd_network_peer_round_trip_time_seconds",
            "How long pings to a peer took to come back, behind the messages that were under way.",
            round_trips,
        )
    })
}

fn set_counter(counter: &IntCounter, value: u64) {
    counter.inc_by(value.saturating_sub(counter.get()));
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new(&MetricsOptions::default())
    }
}

impl Metrics {
    /// A write of the log is done.
    pub(crate) fn appended(&self, entries: usize, stats: AppendStats) {
        self.log_writes.fetch_add(1, Ordering::Relaxed);
        self.log_entries.fetch_add(entries as u64, Ordering::Relaxed);
        self.log_bytes.fetch_add(stats.bytes as u64, Ordering::Relaxed);
        self.histograms.log_write.observe(stats.duration_ns as f64 / 1e9);
        if stats.fsyncs > 0 {
            self.fsyncs.fetch_add(stats.fsyncs as u64, Ordering::Relaxed);
            self.histograms.log_fsync.observe(stats.duration_ns as f64 / 1e9);
        }
    }

    /// Bytes written to the log since the start.
    pub(crate) fn log_bytes_written(&self) -> u64 {
        self.log_bytes.load(Ordering::Relaxed)
    }

    /// A batch is applied.
    pub(crate) fn applied(&self, applied: &mvcc::Applied, took: Duration, is_slow: bool) {
        let add = |counter: &AtomicU64, value: u64| {
            if value > 0 {
                counter.fetch_add(value, Ordering::Relaxed);
            }
        };
        let counts = &applied.counts;
        add(&self.puts, counts.puts);
        add(&self.deletes, counts.deletes);
        add(&self.txns, counts.txns);
        add(&self.ranges, counts.ranges);
        add(&self.batches, 1);
        add(&self.batched_operations, counts.operations);
        add(&self.engine_bytes, applied.write.bytes as u64);
        add(&self.fsyncs, applied.write.fsyncs as u64);
        add(&self.put_bytes, counts.put_bytes);
        add(&self.slow_applies, u64::from(is_slow));
        self.histograms.batch_size.observe(counts.operations as f64);
        self.histograms.batch_write.observe(took.as_secs_f64());
        self.histograms.apply.observe(took.as_secs_f64());
        let mut by_operation = [0_u64; APPLIED.len()];
        for outcome in applied.replies.iter().filter_map(|reply| reply.result.as_ref().ok()) {
            by_operation[applied_index(outcome)] += 1;
            if let Outcome::LeaseGrant(granted) = outcome {
                add(&self.leases_granted, 1);
                self.histograms.lease_ttl.observe(granted.ttl as f64);
            }
        }
        let share = took / u32::try_from(applied.replies.len().max(1)).unwrap_or(u32::MAX);
        for (index, times) in by_operation.into_iter().enumerate().filter(|(_, times)| *times > 0) {
            self.applies.observe(index, share, times);
        }
    }

    /// A range was read from the engine.
    pub(crate) fn range_read(&self, succeeded: bool, took: Duration) {
        self.range_times.observe(usize::from(succeeded), took, 1);
    }

    /// A transaction that only reads has read so many ranges, its compares included.
    pub(crate) fn txn_read(&self, ranges: u64) {
        self.ranges.fetch_add(ranges, Ordering::Relaxed);
        self.txns.fetch_add(u64::from(ranges > 1), Ordering::Relaxed);
    }

    /// A read index came, or did not.
    pub(crate) fn read_indexed(&self, succeeded: bool, took: Duration) {
        if !succeeded {
            self.read_indexes_failed.fetch_add(1, Ordering::Relaxed);
        }
        if took > SLOW_READ_INDEX {
            self.slow_read_indexes.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The history up to a revision was hashed.
    pub(crate) fn hashed_revision(&self, took: Duration) {
        self.histograms.hash_revision.observe(took.as_secs_f64());
    }

    /// Everything was hashed.
    pub fn hashed(&self, took: Duration) {
        self.histograms.hash.observe(took.as_secs_f64());
    }

    /// A step of a compaction is done, having gone through so many changes.
    pub(crate) fn compaction_step(&self, scanned: usize, took: Duration) {
        self.compacted_revisions.fetch_add(scanned as u64, Ordering::Relaxed);
        self.histograms.compaction_step.observe(took.as_secs_f64() * 1000.0);
    }

    /// A compaction is done, this long after its first step.
    pub(crate) fn compacted(&self, took: Duration) {
        self.histograms.compaction.observe(took.as_secs_f64() * 1000.0);
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
        self.compacted_at_s
            .store(now.map_or(0, |now| now.as_secs()), Ordering::Relaxed);
    }

    /// A call of Defragment is done.
    pub fn defragmented(&self, took: Duration) {
        self.histograms.defragmentation.observe(took.as_secs_f64());
    }

    /// A snapshot was sent to a client.
    pub fn backed_up(&self, took: Duration) {
        self.histograms.backup.observe(took.as_secs_f64());
    }

    /// What the engine had in memory is on disk.
    pub(crate) fn flushed(&self, took: Duration) {
        self.histograms.flush.observe(took.as_secs_f64());
    }

    /// A snapshot from another member is whole: it took this long to receive, and of that so long to sync.
    pub(crate) fn snapshot_received(&self, took: Duration, sync: Duration) {
        self.histograms.snapshot_save.observe(took.as_secs_f64());
        self.histograms.snapshot_sync.observe(sync.as_secs_f64());
    }

    /// Prometheus' text format.
    pub fn render<E: Engine>(&self, store: &NodeStore<E>) -> String {
        let mut scrape = self.scrape.lock();
        self.events.store(store.shared().hub.stats().events, Ordering::Relaxed);
        for (counter, value) in scrape.counters.iter().zip(self.counts()) {
            set_counter(counter, value);
        }
        for calls in &self.calls {
            let Method {
                service, name, kind, ..
            } = calls.method;
            let labels = [*service, *name, kind.label()];
            let set = |counter: &IntCounterVec, value: &AtomicU64| {
                set_counter(&counter.with_label_values(&labels), value.load(Ordering::Relaxed));
            };
            set(&scrape.started, &calls.started);
            set(&scrape.received, &calls.received);
            set(&scrape.sent, &calls.sent);
            for (code, handled) in CODE_NAMES.iter().zip(&calls.handled) {
                let handled = handled.load(Ordering::Relaxed);
                // A series for each code that never came would be seventeen times the text.
                if handled > 0 || *code == "OK" {
                    set_counter(
                        &scrape
                            .handled
                            .with_label_values(&[labels[0], labels[1], labels[2], code]),
                        handled,
                    );
                }
            }
        }
        let round_trips = self.set_gauges(&mut scrape, store);
        self.set_engine(&mut scrape, store);
        // This one counts once it is answered, as those in Go do; the other codes never come.
        for code in ["200", "500", "503"] {
            let count = if code == "200" {
                self.scrapes.load(Ordering::Relaxed)
            } else {
                0
            };
            set_counter(&scrape.scrapes.with_label_values(&[code]), count);
        }
        self.scrapes.fetch_add(1, Ordering::Relaxed);
        let mut families = self.registry.gather();
        families.extend(round_trips);
        let mut out = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut out) {
            tracing::error!(%error, "the metrics cannot be rendered");
        }
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Returns the one family that is not in the registry.
    fn set_gauges<E: Engine>(
        &self,
        scrape: &mut Scrape,
        store: &NodeStore<E>,
    ) -> Option<prometheus::proto::MetricFamily> {
        let shared = store.shared();
        let status = store.status();
        let hub = shared.hub.stats();
        let (pending, pending_bytes) = shared.pending.len();
        let batches = self.batches.load(Ordering::Relaxed);
        let operations = self.batched_operations.load(Ordering::Relaxed);
        let average = if batches == 0 {
            0.0
        } else {
            operations as f64 / batches as f64
        };
        let is_leader = status.leader == status.header.member_id;
        let member = format!("{:x}", status.header.member_id);
        let round_trips = set_peers(scrape, shared);
        let mut set = |name, help, value: f64| scrape.set(name, help, &[], value);
        set(
            "metastore_log_stalled",
            "Whether the Raft log's disk has not finished a write for an election timeout.",
            f64::from(shared.standing().is_stalled),
        );
        set(
            "metastore_log_stalled_seconds",
            "For how long the Raft log's disk has not finished a write, if that is an election timeout or more.",
            shared.log_stalled().unwrap_or_default().as_secs_f64(),
        );
        set(
            "metastore_quarantined",
            "Whether this member's state was found to differ from that of the others.",
            f64::from(shared.quarantined.load(Ordering::Relaxed)),
        );
        set(
            "etcd_server_has_leader",
            "Whether a leader is known.",
            f64::from(status.leader != 0),
        );
        set(
            "etcd_server_is_leader",
            "Whether this member leads.",
            f64::from(is_leader),
        );
        set(
            "etcd_server_is_learner",
            "Whether this member has no vote.",
            f64::from(status.is_learner),
        );
        set(
            "etcd_server_proposals_committed_total",
            "The newest committed index.",
            status.raft_index as f64,
        );
        set(
            "etcd_server_proposals_applied_total",
            "The newest applied index.",
            status.raft_applied_index as f64,
        );
        set(
            "etcd_server_proposals_pending",
            "Proposals that wait to be applied.",
            pending as f64,
        );
        set(
            "metastore_proposals_pending_bytes",
            "Bytes of proposals that wait to be applied.",
            pending_bytes as f64,
        );
        let waiting = self.proposals_waiting.load(Ordering::Relaxed);
        set(
            "metastore_proposals_unbatched",
            "Proposals that wait to go into an entry.",
            waiting as f64,
        );
        set(
            "metastore_replica_inputs",
            "Inputs that wait for the replica.",
            shared.work.inputs_waiting().0 as f64,
        );
        set(
            "metastore_replica_input_bytes",
            "Bytes of peers' messages that wait for the replica.",
            shared.work.inputs_waiting().1 as f64,
        );
        set(
            "etcd_server_quota_backend_bytes",
            "The quota, in bytes; 0 for none.",
            status.db_quota_bytes as f64,
        );
        set(
            "etcd_mvcc_db_total_size_in_bytes",
            "Bytes that the data takes, with all history that is left.",
            status.db_bytes as f64,
        );
        set(
            "etcd_mvcc_db_total_size_in_use_in_bytes",
            "Bytes of the data that are in use.",
            status.db_in_use_bytes as f64,
        );
        set(
            "metastore_engine_disk_bytes",
            "Bytes of the engine on disk, compressed or not yet compacted as it may be.",
            shared.db_bytes.load(Ordering::Relaxed) as f64,
        );
        set(
            "metastore_quota_used_ratio",
            "How much of what the data may take it takes, from 0 to 1.",
            status.db_bytes as f64 / status.db_quota_bytes.max(1) as f64,
        );
        set(
            "metastore_quota_nearly_used",
            "Whether the quota is used to 80 % or more.",
            f64::from(shared.nearly_full.load(Ordering::Relaxed)),
        );
        set(
            "metastore_log_disk_bytes",
            "Bytes of the Raft log on disk.",
            shared.log_bytes.load(Ordering::Relaxed) as f64,
        );
        set(
            "metastore_disk_full",
            "Whether writes are refused for want of space.",
            f64::from(shared.disk_full.load(Ordering::Relaxed)),
        );
        set(
            "etcd_debugging_mvcc_keys_total",
            "Live keys.",
            shared.reader.keys() as f64,
        );
        set(
            "metastore_live_key_bytes",
            "Bytes of live keys and values.",
            shared.reader.key_bytes() as f64,
        );
        set(
            "etcd_debugging_mvcc_current_revision",
            "The newest revision.",
            shared.reader.revision() as f64,
        );
        set(
            "etcd_debugging_mvcc_compact_revision",
            "The compacted revision.",
            shared.reader.compacted() as f64,
        );
        set(
            "etcd_debugging_auth_revision",
            "Counts the changes of users and roles.",
            shared.reader.auth().revision() as f64,
        );
        set("etcd_debugging_mvcc_watcher_total", "Watchers.", hub.watchers as f64);
        set(
            "etcd_debugging_mvcc_watch_stream_total",
            "Watch streams.",
            hub.streams as f64,
        );
        set(
            "etcd_debugging_mvcc_slow_watcher_total",
            "Watchers that are being caught up.",
            hub.behind as f64,
        );
        set(
            "etcd_debugging_mvcc_pending_events_total",
            "Events that wait in memory for slow clients.",
            hub.pending_events as f64,
        );
        set(
            "rocksdb_batch_size_avg",
            "Operations in a batch, on average since the start.",
            average,
        );
        set(
            "etcd_debugging_mvcc_total_put_size_in_bytes",
            "Bytes of keys and values put since the start.",
            self.put_bytes.load(Ordering::Relaxed) as f64,
        );
        set(
            "etcd_debugging_mvcc_db_compaction_last",
            "When the last compaction was done, in seconds since 1970; 0 if none was since the start.",
            self.compacted_at_s.load(Ordering::Relaxed) as f64,
        );
        set(
            "etcd_disk_wal_write_bytes_total",
            "Bytes written to the Raft log since the start.",
            self.log_bytes.load(Ordering::Relaxed) as f64,
        );
        set(
            "etcd_mvcc_db_open_read_transactions",
            "Reads under way that may take long.",
            self.reads_open.load(Ordering::Relaxed) as f64,
        );
        set(
            "etcd_disk_defrag_inflight",
            "Whether a defragmentation is under way; it takes no time here.",
            0.0,
        );
        set(
            "etcd_server_snapshot_apply_in_progress_total",
            "Whether a snapshot from another member is being put in use.",
            self.snapshots_installing.load(Ordering::Relaxed) as f64,
        );
        set(
            "promhttp_metric_handler_requests_in_flight",
            "Reads of the metrics under way: this one, since they take turns.",
            1.0,
        );
        let (used, limit) = file_descriptors();
        set("os_fd_used", "Open file descriptors.", used);
        set("os_fd_limit", "File descriptors that this process may open.", limit);
        set(
            "go_threads",
            "Threads of this process, though it is no Go program.",
            threads(),
        );
        scrape.set("etcd_server_id", "This member.", &[("server_id", &member)], 1.0);
        round_trips
    }

    fn set_engine<E: Engine>(&self, scrape: &mut Scrape, store: &NodeStore<E>) {
        for stat in store.shared().reader.engine().stats() {
            let registry = &scrape.registry;
            let metric = scrape.engine.entry(stat.name).or_insert_with(|| match stat.counter {
                true => EngineMetric::Counter(register(registry, IntCounter::new(stat.name, stat.help))),
                false => EngineMetric::Gauge(register(registry, Gauge::new(stat.name, stat.help))),
            });
            match metric {
                EngineMetric::Counter(counter) => set_counter(counter, stat.value as u64),
                EngineMetric::Gauge(gauge) => gauge.set(stat.value),
            }
        }
    }
}

/// Open file descriptors, and how many there may be; 0 for what the system does not tell.
fn file_descriptors() -> (f64, f64) {
    let used = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let limit = limit.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    (used as f64, limit.unwrap_or(0.0))
}

/// Threads of this process; 0 where the system does not tell.
fn threads() -> f64 {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count) as f64
}

impl Observer for Metrics {
    fn started(&self, method: &'static Method) {
        self.calls[method.index].started.fetch_add(1, Ordering::Relaxed);
    }

    fn handled(&self, method: &'static Method, code: usize, took: Duration) {
        self.calls[method.index].handled[code].fetch_add(1, Ordering::Relaxed);
        if method.kind == CallKind::Unary {
            if took > self.slow_request && method.service != "etcdserverpb.KV" {
                tracing::warn!(
                    "time spent" = ?took,
                    "response type" = format!("/{}/{}", method.service, method.name),
                    "request stats"
                );
            }
            self.requests
                .observe(method.index * 2 + usize::from(code == 0), took, 1);
        }
        if let Some(handling) = &self.handling {
            handling.observe(method.index, took, 1);
        }
    }

    fn received(&self, method: &'static Method, messages: u64, bytes: u64) {
        self.calls[method.index].received.fetch_add(messages, Ordering::Relaxed);
        self.client_bytes_received.fetch_add(bytes, Ordering::Relaxed);
    }

    fn sent(&self, method: &'static Method, messages: u64, bytes: u64) {
        self.calls[method.index].sent.fetch_add(messages, Ordering::Relaxed);
        self.client_bytes_sent.fetch_add(bytes, Ordering::Relaxed);
    }

    fn client_version(&self, method: &'static Method, version: &str) {
        let of_kind = usize::from(method.kind != CallKind::Unary);
        if let Some(counters) = self.client_versions.read().get(version) {
            return counters[of_kind].inc();
        }
        let mut versions = self.client_versions.write();
        let known = versions.len() < CLIENT_VERSIONS_MAX && version.len() <= CLIENT_VERSION_BYTES_MAX;
        let version = if known { version } else { "other" };
        let counters = versions.entry(version.to_owned()).or_insert_with(|| {
            ["unary", "stream"].map(|kind| self.client_requests.with_label_values(&[kind, version]))
        });
        counters[of_kind].inc();
    }

    fn http(&self, operation: &'static str, status: StatusCode, took: Duration, waits: bool) {
        self.http_requests
            .with_label_values(&[operation, status.as_str()])
            .inc();
        self.http_times
            .with_label_values(&[operation])
            .observe(took.as_secs_f64());
        // Of what was refused, most of the time may be that of its body.
        if took > self.slow_request && !waits && status.is_success() {
            tracing::warn!(
                "time spent" = ?took,
                "response type" = format!("/api/v1 {operation}"),
                "response code" = status.as_u16(),
                "request stats"
            );
        }
    }

    fn health(&self, healthy: bool) {
        let counter = if healthy {
            &self.health_success
        } else {
            &self.health_failures
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn health_check(&self, kind: &'static str, name: &'static str, healthy: bool) {
        let status = if healthy { "success" } else { "error" };
        self.health_checks.with_label_values(&[kind, name, status]).inc();
        self.health_states
            .with_label_values(&[kind, name])
            .set(f64::from(healthy));
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_finer_than_seconds() {
        let now = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
            (time.tv_sec * 1000 + time.tv_nsec / 1_000_000) as f64 / 1e3
        };
        let (process, before) = (Process(ProcessCollector::for_self()), now());
        let families = process.collect();
        let after = now();
        let cpu = families
            .iter()
            .find(|family| family.name() == "process_cpu_seconds_total");
        let said = cpu.unwrap().get_metric()[0].get_counter().get_value();
        assert!(before <= said && said <= after, "{before}, {said}, {after}");
        assert!(families.len() > 3, "and all else that the library has");
    }
}
