//! From the configuration to a running server.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use api::Limits;
use server::{
    Access, Address, ConnectionSettings, EngineConfig, Listen, NodeConfig, RocksOptions, ServerConfig, Traffic,
};
use signal_hook::consts::{SIGINT, SIGTERM};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{Compression, Config, ListenConfig, StorageConfig, TokenConfig};
use crate::flags::Failure;
use crate::url::{Scheme, Url};

/// Serves until SIGTERM or SIGINT comes; returns its number.
pub fn start(config: &Config) -> Result<i32, Failure> {
    let on_failure: server::FailureHandler = Arc::new(|_cause| {
        // Destructors could block on what failed. Whatever was acknowledged is on disk, and nothing else matters now.
        // A moment for the log's own thread to write down why.
        std::thread::sleep(std::time::Duration::from_millis(100));
        std::process::exit(1);
    });
    let received = Arc::new(AtomicI32::new(0));
    let stop = {
        let received = received.clone();
        async move { received.store(stop_signal().await, Ordering::Release) }
    };
    announce(config);
    server::run(server_config(config)?, on_failure, stop).map_err(|error| Failure::config(error.to_string()))?;
    Ok(received.load(Ordering::Acquire))
}

/// Says what the node starts with, under etcd's keys.
fn announce(config: &Config) {
    tracing::info!(
        "etcd-version" = api::limits::ETCD_VERSION,
        "metastore-version" = api::limits::METASTORE_VERSION,
        "max-cpu-available" = std::thread::available_parallelism().map_or(0, usize::from) as u64,
        name = config.name,
        "data-dir" = %config.data_dir.display(),
        storage = match config.storage {
            StorageConfig::RocksDb(_) => "rocksdb",
            StorageConfig::Memory { .. } => "memory",
        },
        "heartbeat-interval" = ?config.heartbeat,
        "election-timeout" = ?config.election_timeout,
        "snapshot-count" = config.raft.flush_entries,
        "snapshot-catchup-entries" = config.raft.catchup_entries,
        "listen-client-urls" = ?texts(&config.listen.client_urls),
        "advertise-client-urls" = ?texts(&config.listen.advertise_client_urls),
        "listen-peer-urls" = ?texts(&config.cluster.listen_peer_urls),
        "initial-advertise-peer-urls" = ?texts(&config.cluster.advertise_peer_urls),
        "initial-cluster-token" = config.cluster.token,
        "pre-vote" = config.raft.pre_vote,
        "v2-deprecation" = "write-only",
        "starting a member"
    );
}

/// Completes with the number of the signal that asks us to stop.
async fn stop_signal() -> i32 {
    let handlers = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = handlers else {
        tracing::warn!("signal handlers cannot be installed; signals end the process at once");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => SIGTERM,
        _ = interrupt.recv() => SIGINT,
    }
}

fn address(url: &Url) -> Address {
    match url.scheme() {
        Scheme::Http | Scheme::Https => Address::Tcp(url.authority()),
        Scheme::Unix | Scheme::Unixs => Address::Unix(url.path().into()),
    }
}

/// One entry for each address. Like etcd, one that has both an http and an https URL takes both on its port.
fn listen(config: &ListenConfig) -> Vec<Listen> {
    let grpc = match config.client_http_urls.is_empty() {
        true => Traffic::Both,
        false => Traffic::Grpc,
    };
    let urls = |urls: &'_ [Url], traffic| urls.iter().map(move |url| (url.clone(), traffic)).collect::<Vec<_>>();
    let mut listen: Vec<Listen> = Vec::new();
    let all = [
        urls(&config.client_urls, grpc),
        urls(&config.client_http_urls, Traffic::Http),
        urls(&config.metrics_urls, Traffic::Metrics),
        urls(&config.http_urls, Traffic::Rest),
    ];
    for (url, traffic) in all.into_iter().flatten() {
        let (address, tls) = (address(&url), url.scheme().is_tls());
        // What cannot be bound twice is refused when it is bound.
        let same = |known: &&mut Listen| known.address == address && known.traffic == traffic;
        match listen.iter_mut().find(same) {
            Some(known) => {
                known.plaintext |= !tls;
                known.tls |= tls;
            }
            None => listen.push(Listen {
                address,
                plaintext: !tls,
                tls,
                traffic,
            }),
        }
    }
    listen
}

fn texts(urls: &[Url]) -> Vec<String> {
    urls.iter().map(Url::to_string).collect()
}

fn server_config(config: &Config) -> Result<ServerConfig, Failure> {
    let election_timeout = config.election_timeout;
    let limits = Limits {
        request_bytes_max: config.limits.request_bytes_max,
        txn_ops_max: config.limits.txn_ops_max,
        request_timeout: std::time::Duration::from_secs(5) + 2 * election_timeout,
        watch_progress_interval: config.watch_progress_interval,
        slow_request: config.warning_unary_request,
        // One and a half election timeouts, in whole seconds, as etcd counts it.
        lease_ttl_min_s: i64::try_from((election_timeout * 3 / 2).as_millis().div_ceil(1000)).unwrap_or(i64::MAX),
        ..Limits::default()
    };
    let heartbeats = election_timeout.as_millis() / config.heartbeat.as_millis().max(1);
    let replica = replica_config(config, usize::try_from(heartbeats).unwrap_or(usize::MAX));
    let (engine, flush_interval) = match &config.storage {
        StorageConfig::RocksDb(rocks) => {
            let options = RocksOptions {
                background_jobs: rocks.background_jobs,
                write_buffer_bytes: rocks.write_buffer_bytes,
                write_buffers_total_bytes: rocks.write_buffer_bytes.saturating_mul(2),
                max_write_buffers: rocks.max_write_buffers,
                target_file_bytes: rocks.target_file_bytes,
                block_cache_bytes: rocks.block_cache_bytes,
                bloom_bits: rocks.bloom_bits,
                compression: match rocks.compression {
                    Compression::Lz4 => server::Compression::Lz4,
                    Compression::Zstd => server::Compression::Zstd,
                    Compression::None => server::Compression::None,
                },
                wal: rocks.wal,
                ..RocksOptions::default()
            };
            (EngineConfig::Rocks(options), std::time::Duration::from_secs(600))
        }
        StorageConfig::Memory { snapshot_interval } => (EngineConfig::Memory, *snapshot_interval),
    };
    let auth = server::AuthConfig {
        tokens: match &config.auth.tokens {
            TokenConfig::Simple { ttl } => server::TokenKind::Simple { ttl: *ttl },
            TokenConfig::Jwt(options) => {
                let jwt = server::Jwt::new(options).map_err(|error| Failure::config(error.to_string()))?;
                server::TokenKind::Jwt(Arc::new(jwt))
            }
            TokenConfig::None => server::TokenKind::None,
        },
        bcrypt_cost: config.auth.bcrypt_cost,
    };
    Ok(ServerConfig {
        data_dir: config.data_dir.clone(),
        wal_dir: config.wal_dir.clone(),
        engine,
        name: config.name.clone(),
        initial_members: {
            let members = config.cluster.initial.iter();
            members.map(|(name, urls)| (name.clone(), texts(urls))).collect()
        },
        join: config.cluster.join,
        discovery: config.cluster.discovery.clone(),
        srv: config.cluster.srv.clone(),
        force_new_cluster: config.cluster.force_new,
        listen_peers: texts(&config.cluster.listen_peer_urls),
        local_address: config.cluster.local_address,
        raft_read_timeout: config.raft.read_timeout,
        raft_write_timeout: config.raft.write_timeout,
        snapshot_bytes_per_second: config.raft.snapshot_bytes_per_second,
        cluster_token: config.cluster.token.clone(),
        listen: listen(&config.listen),
        access: Access {
            origins: config.listen.cors.iter().cloned().collect(),
            hosts: config.listen.host_whitelist.iter().cloned().collect(),
        },
        gateway: config.listen.gateway,
        client_tls: config.tls.client.clone(),
        peer_tls: config.tls.peer.clone(),
        reuse_port: config.listen.reuse_port,
        connections: ConnectionSettings {
            streams_max: config.listen.concurrent_streams_max,
            keepalive_interval: Some(config.listen.keepalive_interval),
            keepalive_timeout: config.listen.keepalive_timeout,
            ..ConnectionSettings::default()
        },
        tracing: config.tracing.as_ref().map(|tracing| server::otlp::TracingOptions {
            address: tracing.address.clone(),
            service_name: tracing.service_name.clone(),
            instance_id: tracing.instance_id.clone(),
            sampled_per_million: tracing.sampled_per_million,
        }),
        metrics: server::metrics::MetricsOptions {
            extensive: config.extensive_metrics,
            slow_request: config.warning_unary_request,
            features: config
                .gates
                .iter()
                .map(|(gate, on)| (gate.name.to_owned(), gate.stage, *on))
                .collect(),
        },
        machine: server::MachineOptions {
            record_cache_bytes: config.record_cache_bytes as u64,
            list_cache_bytes: config.list_cache_bytes,
            list_cache_keys_min: server::MachineOptions::default().list_cache_keys_min,
            watch_buffer_events_max: limits.watch_buffer_events_max,
            watch_buffer_bytes_max: limits.watch_buffer_bytes_max,
        },
        node: NodeConfig {
            limits,
            tick: config.heartbeat,
            election_timeout,
            flush_interval,
            disk_reserve_bytes: config.disk_reserve_bytes,
            quota_bytes: config.quota_bytes,
            auto_compaction: config.auto_compaction,
            compaction_batch_keys: config.compaction_batch_keys,
            compaction_pause: config.compaction_pause,
            warn_apply: config.warning_apply,
            client_urls: texts(&config.listen.advertise_client_urls),
            learners_max: config.cluster.learners_max,
            strict_reconfig_check: config.cluster.strict_reconfig_check,
            flush_entries: config.raft.flush_entries,
            catchup_entries: config.raft.catchup_entries,
            fault_file: std::env::var_os("METASTORE_FAULT_FILE").map(Into::into),
            auth,
            ..NodeConfig::new(replica)
        },
        // Go's way to have a server show the headers that it gets, which etcd's tests use.
        shows_headers: std::env::var("GODEBUG").is_ok_and(|text| {
            let on = |setting: &str| matches!(setting.trim(), "http2debug=1" | "http2debug=2");
            text.split(',').any(on)
        }),
    })
}

fn replica_config(config: &Config, election_ticks: usize) -> server::ReplicaConfig {
    server::ReplicaConfig {
        election_ticks,
        batch_ops_max: config.batch_ops_max,
        batch_bytes_max: config.batch_bytes_max,
        pre_vote: config.raft.pre_vote,
        message_bytes_max: config.raft.message_bytes_max,
        messages_inflight_max: config.raft.messages_inflight_max,
        uncommitted_bytes_max: config.raft.uncommitted_bytes_max,
        unapplied_bytes_max: config.raft.unapplied_bytes_max,
        unpersisted_bytes_max: config.raft.unpersisted_bytes_max,
        appends_inflight_max: config.raft.appends_inflight_max,
        forwards_inflight_max: config.raft.forwards_inflight_max,
        wait_ticks_max: u64::try_from(
            (std::time::Duration::from_secs(5) + 2 * config.election_timeout).as_millis()
                / config.heartbeat.as_millis().max(1),
        )
        .unwrap_or(u64::MAX),
        ..server::ReplicaConfig::new(0)
    }
}
