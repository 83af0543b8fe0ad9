//! The typed configuration of a node: settings, checked and in the units that the code works with.

mod auth;
mod tls;

use std::collections::BTreeMap;
use std::net::{IpAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

pub use server::{AutoCompaction, DiscoveryOptions, SrvOptions};

use crate::flags::{FLAGS, Failure, GATES, Gate, Note, Settings, Source, Status, parse_duration};
use crate::logging::{LogConfig, LogFormat, LogLevel, LogOutput, Rotation};
use crate::url::Url;

pub use auth::{AuthConfig, TokenConfig};
pub use tls::TlsConfig;

/// The longest election timeout that etcd takes, in milliseconds.
const ELECTION_TIMEOUT_MAX_MS: u64 = 50_000;

/// After how long without traffic grpc-go pings a client unless it is told otherwise, how long that may stay unanswered,
/// and the shortest time that it takes for the former.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2 * 60 * 60);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
const KEEPALIVE_INTERVAL_MIN: Duration = Duration::from_secs(1);

/// Everything that a node needs to know before it starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// This member's name.
    pub name: String,
    /// The directory of everything that this member stores.
    pub data_dir: PathBuf,
    /// The directory of the Raft log, if it is to be elsewhere than in the data directory.
    pub wal_dir: Option<PathBuf>,
    /// Where clients connect.
    pub listen: ListenConfig,
    /// TLS for clients and between members.
    pub tls: TlsConfig,
    /// How users log in.
    pub auth: AuthConfig,
    /// The cluster at its first start.
    pub cluster: ClusterConfig,
    /// Heartbeat of a leader.
    pub heartbeat: Duration,
    /// Time without a leader after which an election starts.
    pub election_timeout: Duration,
    /// What clients may ask for.
    pub limits: LimitsConfig,
    /// What holds the data.
    pub storage: StorageConfig,
    /// Free disk space below which writes are refused, in bytes; 0 means never.
    pub disk_reserve_bytes: u64,
    /// Most operations in one Raft entry; 1 turns batching off.
    pub batch_ops_max: usize,
    /// Most bytes of operations in one Raft entry.
    pub batch_bytes_max: usize,
    /// Memory for the newest records of hot keys, in bytes.
    pub record_cache_bytes: usize,
    /// Memory for ranges that are listed often, in bytes.
    pub list_cache_bytes: usize,
    /// Time between two progress notices to a watcher that asked for them.
    pub watch_progress_interval: Duration,
    /// What to compact without being asked.
    pub auto_compaction: AutoCompaction,
    /// Most keys that one step of compaction looks at.
    pub compaction_batch_keys: usize,
    /// Pause between two steps of compaction.
    pub compaction_pause: Duration,
    /// Size of the data at which writes are refused, in bytes; 0 for whatever the disk has room for.
    pub quota_bytes: u64,
    /// Applying for longer than this is logged.
    pub warning_apply: Duration,
    /// How members keep together.
    pub raft: RaftConfig,
    /// Answering a unary request for longer than this is logged.
    pub warning_unary_request: Duration,
    /// Where logs go, and in what form.
    pub log: LogConfig,
    /// A histogram of the time that each gRPC method takes.
    pub extensive_metrics: bool,
    /// Where calls are traced, if they are.
    pub tracing: Option<TracingConfig>,
    /// Feature gates with their stages, and whether each is on.
    pub gates: Vec<(&'static Gate, bool)>,
}

/// Traces of calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracingConfig {
    /// The collector.
    pub address: String,
    /// The service that traces name.
    pub service_name: String,
    /// The instance that traces name, if any.
    pub instance_id: String,
    /// How many calls in a million are traced.
    pub sampled_per_million: u32,
}

/// How members keep together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftConfig {
    /// Ask whether an election could be won before disturbing the leader.
    pub pre_vote: bool,
    /// Most bytes of entries in one message.
    pub message_bytes_max: u64,
    /// Most messages with entries under way to one follower.
    pub messages_inflight_max: usize,
    /// Most bytes of entries that are proposed and not committed.
    pub uncommitted_bytes_max: u64,
    /// Bytes of entries that are committed and not applied beyond which no more are taken.
    pub unapplied_bytes_max: usize,
    /// Bytes of entries that are not on disk beyond which a follower takes no more.
    pub unpersisted_bytes_max: usize,
    /// Most writes of the log under way.
    pub appends_inflight_max: usize,
    /// Most batches under way to the leader.
    pub forwards_inflight_max: usize,
    /// Entries after which the engine is flushed; `None`, unless it is set, leaves it to bytes and time.
    pub flush_entries: Option<u64>,
    /// Entries to keep for followers that lag.
    pub catchup_entries: u64,
    /// How long a connection between members may be silent.
    pub read_timeout: Duration,
    /// How long a member may take to accept what it is sent.
    pub write_timeout: Duration,
    /// Most bytes a second of a snapshot to a member; 0 for no limit.
    pub snapshot_bytes_per_second: u64,
}

/// Where clients connect, and what they are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenConfig {
    /// Where gRPC and HTTP are served, on one port; gRPC alone if HTTP has URLs of its own.
    pub client_urls: Vec<Url>,
    /// Where the plain HTTP API alone is served.
    pub http_urls: Vec<Url>,
    /// Where HTTP alone is served.
    pub client_http_urls: Vec<Url>,
    /// Where metrics and health alone are served.
    pub metrics_urls: Vec<Url>,
    /// The origins of web pages that may call; empty for all.
    pub cors: Vec<String>,
    /// The host names that HTTP requests over plaintext may be for; empty for all.
    pub host_whitelist: Vec<String>,
    /// Whether the gRPC calls are offered as JSON over HTTP too.
    pub gateway: bool,
    /// The client URLs that members and clients are told.
    pub advertise_client_urls: Vec<Url>,
    /// Set SO_REUSEPORT on listeners.
    pub reuse_port: bool,
    /// Set SO_REUSEADDR on listeners.
    pub reuse_address: bool,
    /// Most calls at a time on one connection.
    pub concurrent_streams_max: u32,
    /// Time without traffic after which the server pings a client.
    pub keepalive_interval: Duration,
    /// How long that ping may stay unanswered.
    pub keepalive_timeout: Duration,
}

/// The cluster at its first start, and how it may change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterConfig {
    /// The peer URLs that the other members are told.
    pub advertise_peer_urls: Vec<Url>,
    /// Where connections to the other members leave from, unless the system is to choose.
    pub local_address: Option<IpAddr>,
    /// A name that goes into the ids of the cluster and its members.
    pub token: String,
    /// The members, by name. It holds this member.
    pub initial: BTreeMap<String, Vec<Url>>,
    /// Where peers connect.
    pub listen_peer_urls: Vec<Url>,
    /// Whether the cluster exists already at this member's first start.
    pub join: bool,
    /// Where the members of a new cluster are to be found; `initial` then holds this one alone.
    pub discovery: Option<DiscoveryOptions>,
    /// Where DNS names the members at this member's first start; likewise.
    pub srv: Option<SrvOptions>,
    /// Whether this member is to go on alone with its data.
    pub force_new: bool,
    /// Refuse changes of members that would lose the quorum.
    pub strict_reconfig_check: bool,
    /// Most members that do not vote.
    pub learners_max: usize,
}

/// What clients may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Most operations, and most compares, in one transaction.
    pub txn_ops_max: usize,
    /// Largest request, in bytes.
    pub request_bytes_max: usize,
}

/// What holds the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StorageConfig {
    /// RocksDB.
    RocksDb(RocksDbConfig),
    /// A map in memory.
    Memory {
        /// Time between two snapshots to disk.
        snapshot_interval: Duration,
    },
}

/// RocksDB's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RocksDbConfig {
    /// Most flushes and compactions at a time.
    pub background_jobs: u32,
    /// Size of one write buffer, per column family, in bytes.
    pub write_buffer_bytes: usize,
    /// Most write buffers per column family, full ones included.
    pub max_write_buffers: u32,
    /// Size of a table file at the lowest level, in bytes.
    pub target_file_bytes: u64,
    /// Memory for blocks, index and filters, in bytes.
    pub block_cache_bytes: usize,
    /// Bits a key of the bloom filters; 0 means none.
    pub bloom_bits: u32,
    /// How table files are compressed.
    pub compression: Compression,
    /// Whether RocksDB writes its own write-ahead log too.
    pub wal: bool,
}

/// How table files are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// LZ4: fast.
    Lz4,
    /// Zstandard: small.
    Zstd,
    /// Not at all.
    None,
}

impl Config {
    /// Checks the settings and converts them. Returns what to log as well: what was set and has no effect, and why.
    pub fn from_settings(settings: &Settings) -> Result<(Config, Vec<Note>), Failure> {
        let mut notes = settings.notes.clone();
        refuse(settings)?;
        for flag in FLAGS {
            if let Status::NoEffect(reason) = flag.status
                && settings.differs(flag)
            {
                let message = format!("{} has no effect: {reason}", written(settings, flag.name));
                notes.push(Note { warning: true, message });
            }
        }
        let gates = gates(settings, &mut notes)?;

        let name = settings.text("name").to_owned();
        let data_dir = match settings.text("data-dir") {
            "" => {
                let data_dir = PathBuf::from(format!("{name}.metastore"));
                let message = format!("'data-dir' was empty; using default {}", data_dir.display());
                notes.push(Note { warning: true, message });
                data_dir
            }
            path => PathBuf::from(path),
        };
        let (heartbeat, election_timeout) = raft_times(settings)?;
        let config = Config {
            data_dir,
            wal_dir: Some(settings.text("wal-dir"))
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            listen: listen(settings)?,
            tls: TlsConfig::from_settings(settings, &mut notes)?,
            auth: AuthConfig::from_settings(settings, &mut notes)?,
            cluster: ClusterConfig {
                local_address: local_address(settings, &gates, &mut notes),
                ..cluster(settings, &name)?
            },
            name,
            heartbeat,
            election_timeout,
            limits: LimitsConfig {
                txn_ops_max: size(settings, "max-txn-ops", 0)?,
                request_bytes_max: size(settings, "max-request-bytes", 0)?,
            },
            storage: storage(settings)?,
            disk_reserve_bytes: size(settings, "disk-reserve-bytes", 0)?,
            batch_ops_max: size(settings, "batch-ops-max", 1)?,
            batch_bytes_max: size(settings, "batch-bytes-max", 1)?,
            record_cache_bytes: size(settings, "record-cache-bytes", 0)?,
            list_cache_bytes: size(settings, "list-cache-bytes", 0)?,
            watch_progress_interval: match duration(settings, "watch-progress-notify-interval")? {
                Duration::ZERO => Duration::from_secs(600),
                interval => interval,
            },
            auto_compaction: auto_compaction(settings)?,
            compaction_batch_keys: match size(settings, "compaction-batch-limit", 0)? {
                0 => 1000,
                keys => keys,
            },
            compaction_pause: duration(settings, "compaction-sleep-interval")?,
            // As in etcd, a negative one switches it off.
            quota_bytes: u64::try_from(settings.number("quota-backend-bytes").max(0)).unwrap_or(u64::MAX),
            warning_apply: duration(settings, "warning-apply-duration")?,
            warning_unary_request: match duration(settings, "warning-unary-request-duration")? {
                Duration::ZERO => Duration::from_millis(300),
                limit => limit,
            },
            raft: raft(settings)?,
            log: log(settings)?,
            extensive_metrics: settings.text("metrics") == "extensive",
            tracing: tracing(settings)?,
            gates,
        };
        Ok((config, notes))
    }
}

/// A flag as the user wrote it, to name it in messages.
fn written(settings: &Settings, name: &str) -> String {
    match settings.source(name) {
        Source::Environment(key) => format!("{key} (--{name})"),
        Source::File(key) => format!("{key} in the config file (--{name})"),
        Source::Default | Source::CommandLine => format!("--{name}"),
    }
}

fn refuse(settings: &Settings) -> Result<(), Failure> {
    for flag in FLAGS {
        let Status::Refused(reason) = flag.status else { continue };
        if settings.differs(flag) {
            return Err(Failure::config(format!(
                "{} is not supported: {reason}",
                written(settings, flag.name)
            )));
        }
    }
    Ok(())
}

/// What each gate comes to. Later settings of a gate win; those of AllAlpha and AllBeta hold for gates not named.
fn gates(settings: &Settings, notes: &mut Vec<Note>) -> Result<Vec<(&'static Gate, bool)>, Failure> {
    let named = settings.gates("feature-gates");
    let set = |name: &str| named.iter().rev().find(|(gate, _)| gate == name).map(|gate| gate.1);
    let resolved: Vec<_> = GATES
        .iter()
        .map(|gate| {
            let all = if gate.stage == "ALPHA" { "AllAlpha" } else { "AllBeta" };
            (gate, set(gate.name).or_else(|| set(all)).unwrap_or(gate.default))
        })
        .collect();
    let on = |name: &str| resolved.iter().any(|(gate, on)| gate.name == name && *on);
    if on("LeaseCheckpointPersist") && !on("LeaseCheckpoint") {
        return Err(Failure::config(
            "--feature-gates: LeaseCheckpointPersist requires LeaseCheckpoint",
        ));
    }
    for (gate, on) in &resolved {
        if let Some(reason) = gate.no_effect
            && *on != gate.default
        {
            let message = format!("--feature-gates={}={on} has no effect: {reason}", gate.name);
            notes.push(Note { warning: true, message });
        }
    }
    Ok(resolved)
}

/// By the gate SetMemberLocalAddr: the first address among the advertised peer URLs that others could come from.
fn local_address(settings: &Settings, gates: &[(&Gate, bool)], notes: &mut Vec<Note>) -> Option<IpAddr> {
    if !gates.iter().any(|(gate, on)| gate.name == "SetMemberLocalAddr" && *on) {
        return None;
    }
    let urls = settings.urls("initial-advertise-peer-urls");
    let mut addresses = urls.iter().filter_map(|url| url.host().parse::<IpAddr>().ok());
    let found = addresses.find(|address| !address.is_loopback() && !address.is_unspecified());
    let (warning, message) = match found {
        Some(address) => (false, format!("setting member local address: {address}")),
        None => {
            let cause = "unable to set a member local address due to lack of suitable local addresses";
            (
                true,
                format!("{cause} in --initial-advertise-peer-urls ({})", list(urls)),
            )
        }
    };
    notes.push(Note { warning, message });
    found
}

fn raft_times(settings: &Settings) -> Result<(Duration, Duration), Failure> {
    let heartbeat_ms: u64 = size(settings, "heartbeat-interval", 1)?;
    let election_ms: u64 = size(settings, "election-timeout", 1)?;
    if heartbeat_ms.saturating_mul(5) > election_ms {
        return Err(Failure::config(format!(
            "--election-timeout[{election_ms}ms] must be at least 5 times --heartbeat-interval[{heartbeat_ms}ms]"
        )));
    }
    if election_ms > ELECTION_TIMEOUT_MAX_MS {
        return Err(Failure::config(format!(
            "--election-timeout[{election_ms}ms] must be at most {ELECTION_TIMEOUT_MAX_MS}ms"
        )));
    }
    Ok((Duration::from_millis(heartbeat_ms), Duration::from_millis(election_ms)))
}

fn listen(settings: &Settings) -> Result<ListenConfig, Failure> {
    let client_urls = settings.urls("listen-client-urls").to_vec();
    let advertise_client_urls = settings.urls("advertise-client-urls").to_vec();
    let client_http_urls = settings.urls("listen-client-http-urls").to_vec();
    for name in [
        "listen-client-urls",
        "listen-client-http-urls",
        "listen-metrics-urls",
        "listen-http-urls",
        "listen-peer-urls",
    ] {
        for url in settings.urls(name) {
            url.check_bind()
                .map_err(|error| Failure::config(format!("{}: {error}", written(settings, name))))?;
        }
    }
    for name in ["advertise-client-urls", "initial-advertise-peer-urls"] {
        for url in settings.urls(name) {
            url.check_advertise()
                .map_err(|error| Failure::config(format!("{}: {error}", written(settings, name))))?;
        }
    }
    // A file is different, as in etcd: there the default stays in force.
    let from_file = matches!(settings.source("listen-client-urls"), Source::File(_));
    if settings.is_set("listen-client-urls") && !from_file && !settings.is_set("advertise-client-urls") {
        return Err(Failure::config(
            "--advertise-client-urls is required when --listen-client-urls is set: clients must be told where to connect",
        ));
    }
    let address = |url: &Url| (url.authority(), url.path().to_owned());
    if let Some(url) = client_http_urls
        .iter()
        .find(|url| client_urls.iter().any(|other| address(other) == address(url)))
    {
        return Err(Failure::config(format!(
            "cannot bind both --listen-client-urls and --listen-client-http-urls on the same url {url}"
        )));
    }
    let http_urls = settings.urls("listen-http-urls").to_vec();
    if let Some(url) = http_urls
        .iter()
        .find(|url| client_urls.iter().any(|other| address(other) == address(url)))
    {
        return Err(Failure::config(format!(
            "--listen-http-urls and --listen-client-urls cannot both have {url}: the latter serves the HTTP API anyway"
        )));
    }
    let names = |name: &str| {
        settings
            .list(name)
            .iter()
            .filter(|item| !item.is_empty())
            .cloned()
            .collect()
    };
    let (keepalive_interval, keepalive_timeout) = keepalive(settings);
    Ok(ListenConfig {
        client_urls,
        http_urls,
        client_http_urls,
        metrics_urls: settings.urls("listen-metrics-urls").to_vec(),
        cors: names("cors"),
        host_whitelist: names("host-whitelist"),
        gateway: settings.boolean("enable-grpc-gateway"),
        advertise_client_urls,
        reuse_port: settings.boolean("socket-reuse-port"),
        reuse_address: settings.boolean("socket-reuse-address"),
        concurrent_streams_max: size(settings, "max-concurrent-streams", 1)?,
        keepalive_interval,
        keepalive_timeout,
    })
}

/// When a client is pinged, and how long it may take to answer. As in etcd, both count or neither: where one of them is
/// not positive, grpc-go's own hold.
fn keepalive(settings: &Settings) -> (Duration, Duration) {
    let positive = |name| {
        let time = u64::try_from(settings.duration_ns(name)).ok().map(Duration::from_nanos);
        time.filter(|time| !time.is_zero())
    };
    match (positive("grpc-keepalive-interval"), positive("grpc-keepalive-timeout")) {
        (Some(interval), Some(timeout)) => (interval.max(KEEPALIVE_INTERVAL_MIN), timeout),
        _ => (KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT),
    }
}

fn cluster(settings: &Settings, name: &str) -> Result<ClusterConfig, Failure> {
    let advertise_peer_urls = settings.urls("initial-advertise-peer-urls").to_vec();
    let text = settings.text("initial-cluster");
    let is_default = FLAGS
        .iter()
        .any(|flag| flag.name == "initial-cluster" && flag.default == text);
    // In a file, as in etcd, the default that is written out is as good as none.
    let from_file = matches!(settings.source("initial-cluster"), Source::File(_));
    let is_given = settings.is_set("initial-cluster") && !text.is_empty() && !(from_file && is_default);
    let (discovery, srv) = (discovery(settings)?, srv(settings, is_given)?);
    if u8::from(is_given) + u8::from(discovery.is_some()) + u8::from(srv.is_some()) > 1 {
        return Err(Failure::config(
            "multiple discovery or bootstrap flags are set. Choose one of \"initial-cluster\", \"discovery-endpoints\" or \"discovery-srv\"",
        ));
    }
    // As in etcd, the default follows the name and the advertised URLs, even if it is written out.
    let initial = if text.is_empty() || is_default {
        BTreeMap::from([(name.to_owned(), advertise_peer_urls.clone())])
    } else {
        initial_cluster(text).map_err(|error| Failure::config(format!("--initial-cluster: {error}")))?
    };
    let Some(urls) = initial.get(name) else {
        return Err(Failure::config(format!(
            "--initial-cluster does not include this member, {name:?} (--name)"
        )));
    };
    if urls != &advertise_peer_urls && addresses(urls) != addresses(&advertise_peer_urls) {
        return Err(Failure::config(format!(
            "--initial-cluster gives {name:?} other URLs ({}) than --initial-advertise-peer-urls does ({})",
            list(urls),
            list(&advertise_peer_urls)
        )));
    }
    let mut seen = std::collections::BTreeSet::new();
    if let Some(url) = initial
        .values()
        .flatten()
        .find(|url| !seen.insert(url.as_str().to_owned()))
    {
        return Err(Failure::config(format!(
            "--initial-cluster gives the URL {url} to more than one member"
        )));
    }
    Ok(ClusterConfig {
        listen_peer_urls: settings.urls("listen-peer-urls").to_vec(),
        join: settings.text("initial-cluster-state") == "existing",
        force_new: settings.boolean("force-new-cluster"),
        strict_reconfig_check: settings.boolean("strict-reconfig-check"),
        learners_max: size(settings, "max-learners", 0)?,
        advertise_peer_urls,
        local_address: None,
        token: match &discovery {
            Some(discovery) => discovery.token.clone(),
            None => settings.text("initial-cluster-token").to_owned(),
        },
        discovery,
        srv,
        initial,
    })
}

/// Where DNS names the members, if it does. `is_given` says whether `--initial-cluster` does.
fn srv(settings: &Settings, is_given: bool) -> Result<Option<SrvOptions>, Failure> {
    let (domain, service_name) = (settings.text("discovery-srv"), settings.text("discovery-srv-name"));
    if domain.is_empty() {
        // etcd takes it for discovery, and then has no member.
        if !service_name.is_empty() && !is_given {
            return Err(Failure::config("--discovery-srv-name needs --discovery-srv"));
        }
        return Ok(None);
    }
    Ok(Some(SrvOptions {
        domain: domain.to_owned(),
        service_name: service_name.to_owned(),
    }))
}

/// Where the members of a new cluster are to be found, if anywhere.
fn discovery(settings: &Settings) -> Result<Option<DiscoveryOptions>, Failure> {
    let token = settings.text("discovery-token");
    let endpoints = settings.list("discovery-endpoints");
    if token.is_empty() != endpoints.is_empty() {
        return Err(Failure::config(
            "both --discovery-token and --discovery-endpoints must be set",
        ));
    }
    if endpoints.iter().any(|endpoint| endpoint.trim().is_empty()) {
        return Err(Failure::config(
            "--discovery-endpoints must not contain empty endpoints",
        ));
    }
    if endpoints.is_empty() {
        return Ok(None);
    }
    let file = |name| {
        Some(settings.text(name))
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
    };
    let (cert_file, key_file) = (file("discovery-cert"), file("discovery-key"));
    if cert_file.is_some() != key_file.is_some() {
        return Err(Failure::config(format!(
            "KeyFile and CertFile must both be present[key: {}, cert: {}]: set both --discovery-cert and --discovery-key",
            settings.text("discovery-key"),
            settings.text("discovery-cert"),
        )));
    }
    // The help of etcd's flag has it so; etcd itself then makes its calls as nobody.
    let (mut user, mut password) = (settings.text("discovery-user"), settings.text("discovery-password"));
    if let Some((name, secret)) = user.split_once(':')
        && password.is_empty()
    {
        (user, password) = (name, secret);
    }
    Ok(Some(DiscoveryOptions {
        token: token.to_owned(),
        endpoints: endpoints.to_vec(),
        dial_timeout: duration(settings, "discovery-dial-timeout")?,
        request_timeout: duration(settings, "discovery-request-timeout")?,
        keepalive_time: duration(settings, "discovery-keepalive-time")?,
        keepalive_timeout: duration(settings, "discovery-keepalive-timeout")?,
        insecure_transport: settings.boolean("discovery-insecure-transport"),
        insecure_skip_verify: settings.boolean("discovery-insecure-skip-tls-verify"),
        cert_file,
        key_file,
        ca_file: file("discovery-cacert"),
        user: user.to_owned(),
        password: password.to_owned(),
    }))
}

fn raft(settings: &Settings) -> Result<RaftConfig, Failure> {
    Ok(RaftConfig {
        pre_vote: settings.boolean("pre-vote"),
        message_bytes_max: size(settings, "raft-message-bytes-max", 1)?,
        messages_inflight_max: size(settings, "raft-messages-inflight-max", 1)?,
        uncommitted_bytes_max: size(settings, "raft-uncommitted-bytes-max", 1)?,
        unapplied_bytes_max: size(settings, "raft-unapplied-bytes-max", 1)?,
        unpersisted_bytes_max: size(settings, "raft-unpersisted-bytes-max", 1)?,
        appends_inflight_max: size(settings, "raft-appends-inflight-max", 1)?,
        forwards_inflight_max: size(settings, "raft-forwards-inflight-max", 1)?,
        // The default is made for etcd, which writes all of its state by then; here bytes and time do better. Whoever
        // writes it out means it.
        flush_entries: Some(size(settings, "snapshot-count", 1)?).filter(|_| settings.is_set("snapshot-count")),
        catchup_entries: size(settings, "snapshot-catchup-entries", 0)?,
        read_timeout: duration(settings, "raft-read-timeout")?,
        write_timeout: duration(settings, "raft-write-timeout")?,
        snapshot_bytes_per_second: size(settings, "snapshot-send-bytes-per-second", 0)?,
    })
}

fn list(urls: &[Url]) -> String {
    urls.iter().map(Url::as_str).collect::<Vec<_>>().join(",")
}

/// The members in `name=url,...`, each with its URLs, sorted.
pub(crate) fn initial_cluster(text: &str) -> Result<BTreeMap<String, Vec<Url>>, String> {
    let mut members: BTreeMap<String, Vec<Url>> = BTreeMap::new();
    for part in text.split(',').map(str::trim) {
        let (name, url) = part
            .split_once('=')
            .ok_or_else(|| format!("{part:?} is not name=url"))?;
        members.entry(name.to_owned()).or_default().push(Url::parse(url)?);
    }
    for urls in members.values_mut() {
        urls.sort();
        urls.dedup();
    }
    Ok(members)
}

/// Reads a configuration file and makes of it what a start would, without opening anything.
///
/// # Panics
/// If an error is not one line that says what is wrong, or the same file is read in two ways.
#[doc(hidden)]
pub fn fuzz_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let settings = match crate::flags::file::parse(text) {
        Ok(settings) => settings,
        Err(error) => {
            assert!(!error.is_empty() && !error.contains('\n'), "{error:?}");
            return;
        }
    };
    // Names would be looked up on the network.
    let members = initial_cluster(settings.text("initial-cluster")).unwrap_or_default();
    let urls = members
        .values()
        .flatten()
        .chain(settings.urls("initial-advertise-peer-urls"));
    let names = urls.filter(|url| url.host().parse::<std::net::IpAddr>().is_err());
    if !members.is_empty() && names.count() > 0 {
        return;
    }
    match Config::from_settings(&settings) {
        Ok((config, _)) => {
            let again = crate::flags::file::parse(text).map(|settings| Config::from_settings(&settings));
            let again = again.ok().and_then(Result::ok).map(|(config, _)| config);
            assert_eq!(again, Some(config));
        }
        Err(failure) => assert!(!failure.message.is_empty()),
    }
}

/// The addresses behind URLs, so that localhost and 127.0.0.1 compare equal; none if a name has no address.
fn addresses(urls: &[Url]) -> Option<Vec<std::net::SocketAddr>> {
    let mut addresses = Vec::new();
    for url in urls {
        let first_v4 = (url.host(), url.port()).to_socket_addrs().ok()?.min()?;
        addresses.push(first_v4);
    }
    addresses.sort();
    Some(addresses)
}

fn storage(settings: &Settings) -> Result<StorageConfig, Failure> {
    if settings.text("storage") == "memory" {
        let snapshot_interval = duration(settings, "memory-snapshot-interval")?;
        if snapshot_interval.is_zero() {
            return Err(Failure::config(
                "--memory-snapshot-interval must be more than 0: the Raft log would grow for ever",
            ));
        }
        return Ok(StorageConfig::Memory { snapshot_interval });
    }
    Ok(StorageConfig::RocksDb(RocksDbConfig {
        background_jobs: size(settings, "rocksdb-background-jobs", 1)?,
        write_buffer_bytes: size(settings, "rocksdb-write-buffer-bytes", 64 << 10)?,
        // With fewer than two, every flush stops all writes.
        max_write_buffers: size(settings, "rocksdb-max-write-buffers", 2)?,
        target_file_bytes: size(settings, "rocksdb-target-file-bytes", 64 << 10)?,
        block_cache_bytes: size(settings, "rocksdb-block-cache-bytes", 1 << 20)?,
        bloom_bits: size(settings, "rocksdb-bloom-bits", 0)?,
        compression: match settings.text("rocksdb-compression") {
            "zstd" => Compression::Zstd,
            "none" => Compression::None,
            _ => Compression::Lz4,
        },
        wal: settings.boolean("rocksdb-wal"),
    }))
}

fn auto_compaction(settings: &Settings) -> Result<AutoCompaction, Failure> {
    let text = settings.text("auto-compaction-retention");
    let revisions = settings.text("auto-compaction-mode") == "revision";
    let wrong = || Failure::config(format!("--auto-compaction-retention cannot be {text:?} in this mode"));
    match text.parse::<u64>() {
        Ok(0) => Ok(AutoCompaction::Off),
        Ok(number) if revisions => Ok(AutoCompaction::Revisions(number)),
        Ok(hours) => {
            let seconds = hours
                .checked_mul(3600)
                .filter(|&seconds| i64::try_from(seconds).is_ok());
            Ok(AutoCompaction::Periodic(Duration::from_secs(
                seconds.ok_or_else(wrong)?,
            )))
        }
        Err(_) if revisions => Err(wrong()),
        Err(_) => match u64::try_from(parse_duration(text).map_err(|_| wrong())?) {
            Ok(0) => Ok(AutoCompaction::Off),
            Ok(ns) => Ok(AutoCompaction::Periodic(Duration::from_nanos(ns))),
            Err(_) => Err(wrong()),
        },
    }
}

fn log(settings: &Settings) -> Result<LogConfig, Failure> {
    let names = settings.list("log-outputs");
    if names.len() > 1 && names.iter().any(|name| name == "default") {
        return Err(Failure::config("--log-outputs: default goes with no other output"));
    }
    let mut outputs = Vec::new();
    for name in names {
        let output = match name.as_str() {
            "default" | "stderr" | "systemd/journal" => LogOutput::Stderr,
            "stdout" => LogOutput::Stdout,
            "" => continue,
            path => LogOutput::File(path.strip_prefix("file://").unwrap_or(path).into()),
        };
        if !outputs.contains(&output) {
            outputs.push(output);
        }
    }
    if names.iter().all(String::is_empty) {
        outputs.push(LogOutput::Stderr);
    }
    if names.iter().any(|name| name == "/dev/null") {
        outputs.clear();
    }
    let level = match settings.text("log-level") {
        "debug" => LogLevel::Debug,
        "warn" => LogLevel::Warn,
        "error" => LogLevel::Error,
        "dpanic" | "panic" | "fatal" => LogLevel::Fatal,
        _ => LogLevel::Info,
    };
    let format = match settings.text("log-format") {
        "console" => LogFormat::Console,
        _ if settings.is_set("log-format") => LogFormat::Json,
        _ => LogFormat::ConsoleOnTerminals,
    };
    let rotation = rotation(settings, names)?;
    Ok(LogConfig {
        level,
        format,
        outputs,
        rotation,
    })
}

/// etcd's form of how to rotate, which is that of its library: all fields may be left out, unknown ones are ignored.
#[derive(serde::Deserialize)]
#[serde(default)]
struct RotationJson {
    maxsize: u32,
    maxage: u32,
    maxbackups: usize,
    localtime: bool,
    compress: bool,
}

impl Default for RotationJson {
    fn default() -> Self {
        RotationJson {
            maxsize: 100,
            maxage: 0,
            maxbackups: 0,
            localtime: false,
            compress: false,
        }
    }
}

fn tracing(settings: &Settings) -> Result<Option<TracingConfig>, Failure> {
    if !settings.boolean("enable-distributed-tracing") {
        return Ok(None);
    }
    let sampled_per_million: u32 = size(settings, "distributed-tracing-sampling-rate", 0)?;
    if sampled_per_million > 1_000_000 {
        return Err(Failure::config(
            "distributed tracing configurition is not valid: (tracing sampling rate must be less than 1000000)",
        ));
    }
    Ok(Some(TracingConfig {
        address: settings.text("distributed-tracing-address").to_owned(),
        service_name: settings.text("distributed-tracing-service-name").to_owned(),
        instance_id: settings.text("distributed-tracing-instance-id").to_owned(),
        sampled_per_million,
    }))
}

fn rotation(settings: &Settings, outputs: &[String]) -> Result<Option<Rotation>, Failure> {
    if !settings.boolean("enable-log-rotation") {
        return Ok(None);
    }
    let is_stream = |name: &&String| matches!(name.as_str(), "" | "default" | "stderr" | "stdout" | "systemd/journal");
    if outputs.iter().filter(|name| !is_stream(name)).count() != 1 {
        return Err(Failure::config(
            "--log-outputs requires a single file path when --log-rotate-config-json is defined",
        ));
    }
    let json: RotationJson = serde_json::from_str(settings.text("log-rotation-config-json")).map_err(|error| {
        let kind = if error.is_data() {
            "invalid log rotation config"
        } else {
            "improperly formatted log rotation config"
        };
        Failure::config(format!("--log-rotation-config-json: {kind}: {error}"))
    })?;
    let megabytes = if json.maxsize == 0 { 100 } else { json.maxsize };
    Ok(Some(Rotation {
        bytes_max: u64::from(megabytes) << 20,
        age_days_max: json.maxage,
        backups_max: json.maxbackups,
        local_time: json.localtime,
        compress: json.compress,
    }))
}

/// A number or a size that is at least `least` and fits where it is used.
fn size<T: TryFrom<i128>>(settings: &Settings, name: &str, least: i128) -> Result<T, Failure> {
    let number = settings.number(name);
    if number < least {
        return Err(Failure::config(format!(
            "{} must be at least {least}, not {number}",
            written(settings, name)
        )));
    }
    T::try_from(number).map_err(|_| Failure::config(format!("{} is too large: {number}", written(settings, name))))
}

fn duration(settings: &Settings, name: &str) -> Result<Duration, Failure> {
    u64::try_from(settings.duration_ns(name))
        .map(Duration::from_nanos)
        .map_err(|_| Failure::config(format!("{} must not be negative", written(settings, name))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::{Command, load};

    fn config(args: &[&str]) -> Result<(Config, Vec<Note>), Failure> {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        match load(&args, &[])? {
            Command::Start(settings) => Config::from_settings(&settings),
            Command::Print(text) => panic!("{text}"),
        }
    }

    #[test]
    fn defaults_are_those_of_etcd_and_of_the_design() {
        let (config, notes) = config(&[]).unwrap();
        assert_eq!(config.data_dir, PathBuf::from("default.metastore"));
        assert_eq!(list(&config.listen.client_urls), "http://localhost:2379");
        assert_eq!(list(&config.cluster.initial["default"]), "http://localhost:2380");
        assert_eq!(
            (config.heartbeat, config.election_timeout),
            (Duration::from_millis(100), Duration::from_secs(1))
        );
        assert_eq!((config.batch_ops_max, config.batch_bytes_max), (1024, 4 << 20));
        assert_eq!(
            config.limits,
            LimitsConfig {
                txn_ops_max: 128,
                request_bytes_max: 1_572_864
            }
        );
        let StorageConfig::RocksDb(rocks) = config.storage else {
            panic!("not RocksDB")
        };
        assert_eq!(
            (rocks.block_cache_bytes, rocks.write_buffer_bytes),
            (128 << 20, 64 << 20)
        );
        assert_eq!((rocks.compression, rocks.wal), (Compression::Lz4, false));
        assert_eq!(config.watch_progress_interval, Duration::from_secs(600));
        assert_eq!(notes.len(), 1, "{notes:?}");
    }

    #[test]
    fn the_name_carries_over() {
        let (config, _) = config(&["--name=infra0", "--initial-advertise-peer-urls=http://10.0.0.1:2380"]).unwrap();
        assert_eq!(config.data_dir, PathBuf::from("infra0.metastore"));
        assert_eq!(list(&config.cluster.initial["infra0"]), "http://10.0.0.1:2380");
    }

    #[test]
    fn members_may_have_an_address_to_leave_from() {
        let urls = "--initial-advertise-peer-urls=http://127.0.0.1:1,http://b:1,http://10.0.0.7:1";
        let local = |args: &[&str]| config(args).unwrap().0.cluster.local_address;
        assert_eq!(local(&[urls]), None);
        let on = "--feature-gates=SetMemberLocalAddr=true";
        assert_eq!(local(&[urls, on]), Some("10.0.0.7".parse().unwrap()));
        let (config, notes) = config(&[on]).unwrap();
        assert_eq!(config.cluster.local_address, None);
        assert!(
            notes.iter().any(|note| note.message.contains("lack of suitable")),
            "{notes:?}"
        );
    }

    #[test]
    fn refuses_what_would_weaken_security_or_correctness() {
        for (args, part) in [
            (
                &["--cert-file=x"][..],
                "KeyFile and CertFile must both be present[key: , cert: x]",
            ),
            (&["--tls-min-version=TLS1.1"], "unexpected TLS version \"TLS1.1\""),
            (&["--auth-token=jwt,pub-key=x"], "auth: invalid auth options"),
            (
                &[
                    "--listen-client-urls=http://127.0.0.1:1",
                    "--advertise-client-urls=http://a:1",
                    "--listen-client-http-urls=https://127.0.0.1:1",
                    "--auto-tls",
                ],
                "cannot bind both --listen-client-urls and --listen-client-http-urls on the same url https://127.0.0.1:1",
            ),
            (
                &["--listen-metrics-urls=https://127.0.0.1:1"],
                "client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url",
            ),
            (&["--listen-client-http-urls=https://127.0.0.1:1"], "TLS key/cert"),
            (
                &["--initial-cluster=default=http://localhost:2380,b=http://localhost:2380"],
                "more than one member",
            ),
            (&["--raft-appends-inflight-max=0"], "at least 1"),
            (&["--initial-cluster=b=http://b:1"], "does not include"),
            (&["--initial-cluster=default=http://127.0.0.9:1"], "other URLs"),
            (&["--initial-cluster=default"], "name=url"),
            (
                &[
                    "--listen-client-urls=https://127.0.0.1:1",
                    "--advertise-client-urls=https://a:1",
                ],
                "TLS",
            ),
            (
                &[
                    "--listen-client-urls=http://127.0.0.1:1",
                    "--advertise-client-urls=http://a:1",
                    "--listen-http-urls=http://127.0.0.1:1",
                ],
                "cannot both have http://127.0.0.1:1",
            ),
            (&["--listen-http-urls=https://127.0.0.1:1"], "TLS key/cert"),
            (&["--listen-http-urls=http://a:1"], "--listen-http-urls"),
            (
                &["--listen-client-urls=http://127.0.0.1:1"],
                "--advertise-client-urls is required",
            ),
            (
                &["--listen-client-urls=http://a:1", "--advertise-client-urls=http://a:1"],
                "IP address",
            ),
            (&["--advertise-client-urls=http://:1"], "host is empty"),
            (&["--heartbeat-interval=300"], "at least 5 times"),
            (&["--heartbeat-interval=0"], "at least 1"),
            (&["--election-timeout=60000"], "50000ms"),
            (&["--batch-ops-max=0"], "--batch-ops-max must be at least 1"),
            (&["--disk-reserve-bytes=-1"], "at least 0"),
            (&["--compaction-sleep-interval=-1s"], "negative"),
            (&["--auto-compaction-retention=x"], "retention"),
            (
                &["--auto-compaction-mode=revision", "--auto-compaction-retention=5m"],
                "retention",
            ),
            (&["--log-outputs=default,/tmp/x"], "--log-outputs"),
            (&["--feature-gates=LeaseCheckpointPersist=true"], "LeaseCheckpoint"),
            (
                &["--storage=memory", "--memory-snapshot-interval=0"],
                "--memory-snapshot-interval",
            ),
        ] {
            let failure = config(args).expect_err(part);
            assert_eq!(failure.exit_code, 1, "{args:?}: {failure}");
            assert!(failure.message.contains(part), "{args:?}: {failure}");
        }
        // Written out, a default asks for nothing that is missing.
        assert!(
            config(&[
                "--client-cert-auth=false",
                "--auth-token=simple",
                "--cert-file=",
                "--host-whitelist="
            ])
            .is_ok()
        );
    }

    #[test]
    fn says_what_has_no_effect_and_why() {
        let (_, notes) = config(&["--memory-mlock", "--enable-pprof", "--pre-vote=true", "--data-dir=x"]).unwrap();
        let messages: Vec<_> = notes.iter().map(|note| note.message.as_str()).collect();
        assert_eq!(messages.len(), 2, "{messages:?}");
        assert!(
            messages
                .iter()
                .any(|m| m.starts_with("--memory-mlock has no effect: the data"))
        );
        assert!(messages.iter().any(|m| m.starts_with("--enable-pprof has no effect")));
    }

    #[test]
    fn an_invalid_bcrypt_cost_is_replaced_as_in_etcd() {
        for (cost, used, notes_about_it) in [("4", 4, 0), ("31", 31, 0), ("3", 10, 1), ("32", 10, 1)] {
            let (config, notes) = config(&["--data-dir=x", &format!("--bcrypt-cost={cost}")]).unwrap();
            assert_eq!((config.auth.bcrypt_cost, notes.len()), (used, notes_about_it), "{cost}");
        }
        let ttl = |args: &[&str]| config(args).unwrap().0.auth.tokens;
        let seconds = |seconds| TokenConfig::Simple {
            ttl: Duration::from_secs(seconds),
        };
        assert_eq!(ttl(&["--auth-token-ttl=7"]), seconds(7));
        assert_eq!(ttl(&["--auth-token-ttl=0"]), seconds(300));
    }

    #[test]
    fn keepalive_counts_as_a_whole_as_in_etcd() {
        let of = |args: &[&str]| {
            let listen = config(args).unwrap().0.listen;
            (listen.keepalive_interval, listen.keepalive_timeout)
        };
        let seconds = |interval, timeout| (Duration::from_secs(interval), Duration::from_secs(timeout));
        assert_eq!(of(&[]), seconds(7200, 20));
        for (interval, timeout, expected) in [
            ("10s", "5s", seconds(10, 5)),
            ("0", "5s", seconds(7200, 20)),
            ("-1s", "5s", seconds(7200, 20)),
            ("10s", "0", seconds(7200, 20)),
            ("1ms", "5s", seconds(1, 5)),
        ] {
            let interval = format!("--grpc-keepalive-interval={interval}");
            let timeout = format!("--grpc-keepalive-timeout={timeout}");
            assert_eq!(of(&[&*interval, &*timeout]), expected, "{interval} {timeout}");
        }
    }

    #[test]
    fn a_snapshot_count_that_is_written_out_counts() {
        let entries = |args: &[&str]| config(args).unwrap().0.raft.flush_entries;
        assert_eq!(entries(&[]), None);
        assert_eq!(entries(&["--snapshot-count=10000"]), Some(10_000));
        assert_eq!(entries(&["--snapshot-count=7"]), Some(7));
    }

    #[test]
    fn equal_addresses_are_equal_however_written() {
        let args = [
            "--initial-cluster=m=http://127.0.0.1:1",
            "--initial-advertise-peer-urls=http://127.0.0.1:1",
            "--name=m",
        ];
        assert!(config(&args).is_ok());
        assert!(config(&["--initial-cluster=default=http://127.0.0.1:2380"]).is_ok());
    }

    #[test]
    fn discovery_takes_the_place_of_the_initial_cluster() {
        let token = "--discovery-token=t";
        let endpoints = "--discovery-endpoints=http://a:1,b:2";
        let cluster = |args: &[&str]| config(args).map(|(config, _)| config.cluster);
        assert_eq!(cluster(&[]).unwrap().discovery, None);
        let found = cluster(&[
            token,
            endpoints,
            "--name=x",
            "--discovery-user=u:p:q",
            "--discovery-keepalive-time=0",
            "--initial-cluster-token=other",
        ])
        .unwrap();
        assert_eq!(
            (&found.token[..], list(&found.initial["x"])),
            ("t", "http://localhost:2380".to_owned())
        );
        let discovery = found.discovery.unwrap();
        assert_eq!(discovery.endpoints, ["http://a:1", "b:2"]);
        assert_eq!((&discovery.user[..], &discovery.password[..]), ("u", "p:q"));
        assert_eq!(
            [
                discovery.dial_timeout,
                discovery.request_timeout,
                discovery.keepalive_timeout
            ],
            [2, 5, 6].map(Duration::from_secs)
        );
        assert!(discovery.keepalive_time.is_zero() && discovery.insecure_transport && !discovery.insecure_skip_verify);
        let given = cluster(&[token, endpoints, "--discovery-user=u:v", "--discovery-password=p"])
            .unwrap()
            .discovery;
        assert_eq!(given.unwrap().user, "u:v");
        for (args, part) in [
            (
                &[token][..],
                "both --discovery-token and --discovery-endpoints must be set",
            ),
            (
                &[endpoints],
                "both --discovery-token and --discovery-endpoints must be set",
            ),
            (
                &[token, "--discovery-endpoints=a:1,,b:1"],
                "--discovery-endpoints must not contain empty endpoints",
            ),
            (
                &[token, endpoints, "--initial-cluster=default=http://localhost:2380"],
                "multiple discovery or bootstrap flags are set",
            ),
            (
                &[token, endpoints, "--discovery-cert=c"],
                "set both --discovery-cert and --discovery-key",
            ),
            (&[token, endpoints, "--discovery-request-timeout=-1s"], "negative"),
        ] {
            let failure = cluster(args).expect_err(part);
            assert!(failure.message.contains(part), "{args:?}: {failure}");
        }
        assert!(cluster(&[token, endpoints, "--initial-cluster="]).is_ok());

        let srv = "--discovery-srv=example.com";
        let found = cluster(&[srv, "--discovery-srv-name=x"]).unwrap();
        assert_eq!(list(&found.initial["default"]), "http://localhost:2380");
        let options = found.srv.unwrap();
        assert_eq!((&options.domain[..], &options.service_name[..]), ("example.com", "x"));
        for args in [
            &[srv, token, endpoints][..],
            &[srv, "--initial-cluster=default=http://localhost:2380"],
        ] {
            let failure = cluster(args).unwrap_err();
            assert!(
                failure.message.contains("multiple discovery or bootstrap flags"),
                "{failure}"
            );
        }
        assert!(cluster(&["--discovery-srv-name=x"]).is_err());
    }

    #[test]
    fn auto_compaction_reads_both_modes() {
        for (args, expected) in [
            (&["--auto-compaction-retention=0"][..], AutoCompaction::Off),
            (
                &["--auto-compaction-retention=2"],
                AutoCompaction::Periodic(Duration::from_secs(7200)),
            ),
            (
                &["--auto-compaction-retention=5m"],
                AutoCompaction::Periodic(Duration::from_secs(300)),
            ),
            (
                &["--auto-compaction-mode=revision", "--auto-compaction-retention=9"],
                AutoCompaction::Revisions(9),
            ),
        ] {
            assert_eq!(config(args).unwrap().0.auto_compaction, expected);
        }
    }

    #[test]
    fn log_outputs_are_unique() {
        let log = config(&["--log-outputs=stderr,stdout,stderr,/tmp/l", "--log-level=fatal"])
            .unwrap()
            .0
            .log;
        assert_eq!(
            log.outputs,
            [LogOutput::Stderr, LogOutput::Stdout, LogOutput::File("/tmp/l".into())]
        );
        assert_eq!(log.level, LogLevel::Fatal);
        assert!(config(&["--log-outputs=/dev/null"]).unwrap().0.log.outputs.is_empty());
    }

    /// What the fuzz target checks.
    #[test]
    fn files_are_read_or_refused() {
        for text in [
            "",
            "name: a\ninitial-cluster: a=http://127.0.0.1:1\ninitial-advertise-peer-urls: http://127.0.0.1:1\n",
            "initial-cluster: ','\n",
            "listen-client-urls: [http://127.0.0.1:0, 'unix://x']\nelection-timeout: 99999999999999999999\n",
            "heartbeat-interval: -1\n",
            "quota-backend-bytes: -1\nauto-compaction-retention: 1h30m\nauto-compaction-mode: revision\n",
            "feature-gates: AllAlpha=true,X=false\nlog-rotation-config-json: '{\"maxsize\": -1}'\n",
            "a: &a [*a]\n",
            "a: &a {b: &b {c: *b}}\n<<: *a\n",
            "? [x]\n: y\n",
            "auth-token: jwt,pub-key=,sign-method=HS256\n",
            "client-transport-security: {allowed-cn: [{}]}\n",
            "1e400: .nan\n",
            "\u{0}",
            "name: !!binary xx\n",
            // Found by the fuzzer: a message of several lines.
            "data-dir: /d\nwal-dir:\nlisten-client-urls: \":a :a>\\n :a\"\n",
        ] {
            fuzz_file(text.as_bytes());
        }
        fuzz_file(b"\xff");
    }

    /// The same on what becomes of one by chance.
    #[test]
    fn damaged_files_are_read_or_refused() {
        const SAMPLE: &[u8] = include_bytes!("../../../fuzz/seeds/config/sample");
        const PIECES: [&str; 10] = [
            "{",
            "[",
            ": ",
            "\n",
            "&a ",
            "*a",
            "'",
            "99999999999999999999",
            "-1",
            "~",
        ];
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..2000 {
            let mut data = SAMPLE.to_vec();
            for _ in 0..=random.usize(..4) {
                let at = random.usize(..data.len());
                match random.u8(..4) {
                    0 => data[at] = random.u8(..),
                    1 => drop(data.drain(at..(at + random.usize(..20)).min(data.len()))),
                    2 => drop(data.splice(at..at, PIECES[random.usize(..PIECES.len())].bytes())),
                    _ => data.truncate(at.max(1)),
                }
            }
            fuzz_file(&data);
        }
    }
}
