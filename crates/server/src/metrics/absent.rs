//! Metrics of etcd's parts that MetaStore does not have: Go's runtime, bbolt, the v2 store, the gRPC proxy. They are
//! here so that dashboards and alerts written for etcd find every name, and stay at zero, which is what they would count.

use prometheus::{Gauge, Histogram, HistogramOpts, IntCounter, Registry};

use super::{durations::doubling, register};

#[rustfmt::skip]
const GAUGES: &[(&str, &str)] = &[
    ("etcd_debugging_store_watchers", "Watchers of the v2 store, which there is none of."),
    ("etcd_grpc_proxy_cache_keys_total", "Keys in the cache of a gRPC proxy, which this is not."),
    ("go_gc_gogc_percent", "A setting of Go's garbage collector; this is no Go program."),
    ("go_gc_gomemlimit_bytes", "A setting of Go's garbage collector; this is no Go program."),
    ("go_goroutines", "Goroutines; this is no Go program."),
    ("go_memstats_alloc_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_buck_hash_sys_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_gc_sys_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_heap_alloc_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_heap_idle_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_heap_inuse_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_heap_objects", "Go's heap; this is no Go program."),
    ("go_memstats_heap_released_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_heap_sys_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_last_gc_time_seconds", "Go's heap; this is no Go program."),
    ("go_memstats_mcache_inuse_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_mcache_sys_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_mspan_inuse_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_mspan_sys_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_next_gc_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_other_sys_bytes", "Go's heap; this is no Go program."),
    ("go_memstats_stack_inuse_bytes", "Go's stacks; this is no Go program."),
    ("go_memstats_stack_sys_bytes", "Go's stacks; this is no Go program."),
    ("go_memstats_sys_bytes", "Go's heap; this is no Go program."),
    ("go_sched_gomaxprocs_threads", "A setting of Go's scheduler; this is no Go program."),
];

#[rustfmt::skip]
const COUNTERS: &[(&str, &str)] = &[
    ("etcd_debugging_store_expires_total", "Expired keys of the v2 store, which there is none of."),
    ("etcd_debugging_store_watch_requests_total", "Watches of the v2 store, which there is none of."),
    ("etcd_grpc_proxy_cache_hits_total", "Hits of the cache of a gRPC proxy, which this is not."),
    ("etcd_grpc_proxy_cache_misses_total", "Misses of the cache of a gRPC proxy, which this is not."),
    ("etcd_grpc_proxy_events_coalescing_total", "Events that a gRPC proxy shared, which this is not."),
    ("etcd_grpc_proxy_watchers_coalescing_total", "Watchers that a gRPC proxy shared, which this is not."),
    ("go_memstats_alloc_bytes_total", "Go's heap; this is no Go program."),
    ("go_memstats_frees_total", "Go's heap; this is no Go program."),
    ("go_memstats_mallocs_total", "Go's heap; this is no Go program."),
];

/// With the first bound of the buckets, which double 14 times.
#[rustfmt::skip]
const HISTOGRAMS: &[(&str, &str, f64)] = &[
    ("etcd_debugging_disk_backend_commit_rebalance_duration_seconds", "A step of bbolt, which there is none of.", 0.001),
    ("etcd_debugging_disk_backend_commit_spill_duration_seconds", "A step of bbolt, which there is none of.", 0.001),
    ("etcd_debugging_disk_backend_commit_write_duration_seconds", "A step of bbolt, which there is none of.", 0.001),
    ("etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds",
        "Pauses for compacting an index of all keys in memory, which there is none of.", 0.5),
    ("etcd_debugging_server_watch_send_loop_control_stream_duration_seconds",
        "A loop that sends to watchers, which there is none of: a watcher's stream takes its events itself.", 0.0001),
    ("etcd_debugging_server_watch_send_loop_progress_duration_seconds",
        "A loop that sends to watchers, which there is none of: a watcher's stream takes its events itself.", 0.0001),
    ("etcd_debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds",
        "A loop that sends to watchers, which there is none of: a watcher's stream takes its events itself.", 0.0001),
    ("etcd_debugging_server_watch_send_loop_watch_stream_duration_seconds",
        "A loop that sends to watchers, which there is none of: a watcher's stream takes its events itself.", 0.0001),
    ("etcd_debugging_snap_save_marshalling_duration_seconds", "Encoding of the v2 store, which there is none of.", 0.001),
    ("etcd_snap_fsync_duration_seconds", "Syncing of files with the v2 store, which there is none of.", 0.001),
];

/// Registers them all.
pub(super) fn register_all(registry: &Registry) {
    for (name, help) in GAUGES {
        register(registry, Gauge::new(*name, *help));
    }
    for (name, help) in COUNTERS {
        register(registry, IntCounter::new(*name, *help));
    }
    for (name, help, first) in HISTOGRAMS {
        let options = HistogramOpts::new(*name, *help).buckets(doubling(*first, 14));
        register(registry, Histogram::with_opts(options));
    }
    // A summary, which the library does not have: one without quantiles is a histogram without buckets.
    let pauses = HistogramOpts::new(
        "go_gc_duration_seconds",
        "Pauses of Go's garbage collector; this is no Go program.",
    );
    register(registry, Histogram::with_opts(pauses.buckets(vec![1.0])));
}
