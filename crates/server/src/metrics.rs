//! What the node counts, under etcd's names where etcd has one, for `/metrics`.
//!
//! Hot paths count into atomics and histograms of their own; what is a state rather than a count is read when Prometheus
//! asks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use api::Store;
use api::limits::{ETCD_CLUSTER_VERSION, ETCD_VERSION, METASTORE_VERSION};
use frontend::observer::CODE_NAMES;
use frontend::{Method, Observer, methods};
use parking_lot::Mutex;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};
use storage::{AppendStats, Engine};

use crate::NodeStore;
use crate::node::Shared;

/// How many client API versions get a label of their own; all others count as "other".
const CLIENT_VERSIONS_MAX: usize = 64;

macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident: $name:literal, $help:literal;)*) => {
        /// What the node counts.
        pub struct Metrics {
            $($(#[$doc])* pub(crate) $field: AtomicU64,)*
            /// Proposals that wait in the replica to be batched.
            pub(crate) proposals_waiting: AtomicU64,
            log_fsync: Histogram,
            batch_write: Histogram,
            batch_size: Histogram,
            apply: Histogram,
            lease_ttl: Histogram,
            calls: Vec<Calls>,
            client_requests: IntCounterVec,
            health_checks: IntCounterVec,
            client_versions: Mutex<std::collections::HashSet<String>>,
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
            pub fn new() -> Self {
                let registry = Registry::new();
                let (log_fsync, batch_write, batch_size, apply, lease_ttl) = histograms(&registry);
                let client_requests = register(&registry, IntCounterVec::new(
                    Opts::new("etcd_server_client_requests_total", "Requests by kind of call and client version."),
                    &["type", "client_api_version"],
                ));
                let health_checks = register(&registry, IntCounterVec::new(
                    Opts::new("etcd_server_healthchecks_total", "Health checks by kind, name and outcome."),
                    &["type", "name", "status"],
                ));
                let calls = methods().map(Calls::new).collect();
                let scrape = Mutex::new(Scrape::new(&registry));
                Metrics {
                    $($field: AtomicU64::new(0),)*
                    proposals_waiting: AtomicU64::new(0),
                    log_fsync, batch_write, batch_size, apply, lease_ttl,
                    calls, client_requests, health_checks,
                    client_versions: Mutex::default(),
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
    slow_applies: "etcd_server_slow_apply_total", "Applies that took longer than 100 ms.";
    /// Puts.
    puts: "etcd_mvcc_put_total", "Keys put.";
    /// Deletes.
    deletes: "etcd_mvcc_delete_total", "Keys deleted.";
    /// Transactions.
    txns: "etcd_mvcc_txn_total", "Transactions that write.";
    /// Ranges.
    ranges: "etcd_mvcc_range_total", "Ranges read.";
    /// Events.
    events: "etcd_debugging_mvcc_events_total", "Events handed to watchers.";
    /// Leases granted here.
    leases_granted: "etcd_debugging_lease_granted_total", "Leases granted through this member.";
    /// Leases revoked.
    leases_revoked: "etcd_debugging_lease_revoked_total", "Leases that ended.";
    /// Keep-alives.
    leases_renewed: "etcd_debugging_lease_renewed_total", "Leases kept alive.";
    /// Expired leases.
    leases_expired: "etcd_debugging_server_lease_expired_total", "Leases whose time was over.";
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
}

/// Registers a collector. All names are our own constants, so neither making nor registering one can fail.
fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let collector = made.expect("metric names and labels are valid");
    registry
        .register(Box::new(collector.clone()))
        .expect("metric names are unique");
    collector
}

fn histograms(registry: &Registry) -> (Histogram, Histogram, Histogram, Histogram, Histogram) {
    let histogram = |name: &str, help: &str, start: f64, factor: f64, count: usize| {
        let buckets = prometheus::exponential_buckets(start, factor, count).expect("the buckets are valid");
        register(
            registry,
            Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)),
        )
    };
    (
        histogram(
            "etcd_disk_wal_fsync_duration_seconds",
            "Time of one write of the Raft log with its fdatasync.",
            0.000_125,
            2.0,
            17,
        ),
        histogram(
            "rocksdb_batch_write_duration",
            "Time of applying one batch, in seconds.",
            0.000_01,
            2.0,
            18,
        ),
        histogram("rocksdb_batch_size", "Operations in one batch.", 1.0, 2.0, 14),
        histogram(
            "etcd_disk_backend_commit_duration_seconds",
            "Time of applying one batch.",
            0.001,
            2.0,
            14,
        ),
        histogram(
            "etcd_debugging_lease_ttl_total",
            "Times to live of leases granted, in seconds.",
            1.0,
            2.0,
            24,
        ),
    )
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

/// Everything that is filled in when Prometheus asks.
struct Scrape {
    counters: Vec<IntCounter>,
    gauges: GaugeVecs,
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
    fn new(registry: &Registry) -> Self {
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
            started: by_method("grpc_server_started_total", "Calls started.", &METHOD),
            handled: by_method("grpc_server_handled_total", "Calls ended, by status code.", &HANDLED),
            received: by_method("grpc_server_msg_received_total", "Messages received.", &METHOD),
            sent: by_method("grpc_server_msg_sent_total", "Messages sent.", &METHOD),
            engine: Default::default(),
            registry: registry.clone(),
        };
        #[cfg(target_os = "linux")]
        registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect("metric names are unique");
        scrape.set(
            "etcd_cluster_version",
            "The cluster version.",
            &[("cluster_version", ETCD_CLUSTER_VERSION)],
            1.0,
        );
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
}

/// What is known of each peer.
fn set_peers<E: Engine>(scrape: &mut Scrape, shared: &Shared<E>) {
    let Some((_, transport)) = shared.transport.get() else {
        return;
    };
    let local = format!("{:x}", shared.member_id());
    for peer in transport.stats() {
        let remote = format!("{:x}", peer.id);
        let both = [("Local", local.as_str()), ("Remote", remote.as_str())];
        let to = [("To", remote.as_str())];
        scrape.set("etcd_network_known_peers", "Peers that this member knows.", &both, 1.0);
        scrape.set(
            "etcd_network_active_peers",
            "Peers that this member is connected to.",
            &both,
            f64::from(peer.active_since.is_some()),
        );
        let mut set = |name, help, value: f64| scrape.set(name, help, &to, value);
        set(
            "etcd_network_peer_sent_bytes_total",
            "Bytes sent to a peer.",
            (peer.sent_bytes + peer.snapshot_sent_bytes) as f64,
        );
        set(
            "etcd_network_peer_received_bytes_total",
            "Bytes received from a peer.",
            (peer.received_bytes + peer.snapshot_received_bytes) as f64,
        );
        set(
            "etcd_network_peer_sent_failures_total",
            "How often a peer could not be reached.",
            peer.send_failures as f64,
        );
        set(
            "metastore_peer_dropped_messages_total",
            "Messages to a peer that were dropped.",
            peer.dropped_messages as f64,
        );
        set(
            "metastore_peer_queued_bytes",
            "Bytes that wait to be sent to a peer.",
            peer.queued_bytes as f64,
        );
        let round_trip = peer.round_trip.map_or(0.0, |time| time.as_secs_f64());
        set(
            "metastore_peer_round_trip_seconds",
            "How long the last ping to a peer took.",
            round_trip,
        );
    }
}

fn set_counter(counter: &IntCounter, value: u64) {
    counter.inc_by(value.saturating_sub(counter.get()));
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    /// A write of the log is done.
    pub(crate) fn appended(&self, entries: usize, stats: AppendStats) {
        self.log_writes.fetch_add(1, Ordering::Relaxed);
        self.log_entries.fetch_add(entries as u64, Ordering::Relaxed);
        self.log_bytes.fetch_add(stats.bytes as u64, Ordering::Relaxed);
        if stats.fsyncs > 0 {
            self.fsyncs.fetch_add(stats.fsyncs as u64, Ordering::Relaxed);
            self.log_fsync.observe(stats.duration_ns as f64 / 1e9);
        }
    }

    /// Bytes written to the log since the start.
    pub(crate) fn log_bytes_written(&self) -> u64 {
        self.log_bytes.load(Ordering::Relaxed)
    }

    /// A batch is applied.
    pub(crate) fn applied(&self, _entries: usize, applied: &mvcc::Applied, took: Duration) {
        let add = |counter: &AtomicU64, value: u64| {
            if value > 0 {
                counter.fetch_add(value, Ordering::Relaxed);
            }
        };
        let counts = &applied.counts;
        add(&self.puts, counts.puts);
        add(&self.deletes, counts.deletes);
        add(&self.txns, counts.txns);
        add(&self.events, counts.events);
        add(&self.batches, 1);
        add(&self.batched_operations, counts.operations);
        add(&self.engine_bytes, applied.write.bytes as u64);
        add(&self.fsyncs, applied.write.fsyncs as u64);
        add(&self.slow_applies, u64::from(took > Duration::from_millis(100)));
        self.batch_size.observe(counts.operations as f64);
        self.batch_write.observe(took.as_secs_f64());
        self.apply.observe(took.as_secs_f64());
    }

    /// A lease was granted through this member.
    pub(crate) fn lease_granted(&self, ttl_s: i64) {
        self.leases_granted.fetch_add(1, Ordering::Relaxed);
        self.lease_ttl.observe(ttl_s as f64);
    }

    /// Prometheus' text format.
    pub fn render<E: Engine>(&self, store: &NodeStore<E>) -> String {
        let mut scrape = self.scrape.lock();
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
        self.set_gauges(&mut scrape, store);
        self.set_engine(&mut scrape, store);
        let mut out = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut out) {
            tracing::error!(%error, "the metrics cannot be rendered");
        }
        String::from_utf8_lossy(&out).into_owned()
    }

    fn set_gauges<E: Engine>(&self, scrape: &mut Scrape, store: &NodeStore<E>) {
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
        set_peers(scrape, shared);
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
            shared.inputs.waiting().0 as f64,
        );
        set(
            "metastore_replica_input_bytes",
            "Bytes of peers' messages that wait for the replica.",
            shared.inputs.waiting().1 as f64,
        );
        set(
            "etcd_server_quota_backend_bytes",
            "The quota, in bytes; 0 for none.",
            status.db_quota_bytes as f64,
        );
        set(
            "etcd_mvcc_db_total_size_in_bytes",
            "Bytes on disk.",
            status.db_bytes as f64,
        );
        set(
            "etcd_mvcc_db_total_size_in_use_in_bytes",
            "Bytes of live data.",
            status.db_in_use_bytes as f64,
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
        scrape.set("etcd_server_id", "This member.", &[("server_id", &member)], 1.0);
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

impl Observer for Metrics {
    fn started(&self, method: &'static Method) {
        self.calls[method.index].started.fetch_add(1, Ordering::Relaxed);
    }

    fn handled(&self, method: &'static Method, code: usize) {
        self.calls[method.index].handled[code].fetch_add(1, Ordering::Relaxed);
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
        let mut version = version;
        if version != "unknown" {
            let mut versions = self.client_versions.lock();
            if !versions.contains(version) {
                if versions.len() < CLIENT_VERSIONS_MAX && version.len() <= 64 {
                    versions.insert(version.to_owned());
                } else {
                    version = "other";
                }
            }
        }
        let kind = if method.kind.label() == "unary" {
            "unary"
        } else {
            "stream"
        };
        self.client_requests.with_label_values(&[kind, version]).inc();
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
    }
}
