//! Opens the data directory and the sockets, and serves until it is told to stop.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::limits::{ETCD_VERSION, METASTORE_VERSION};
use frontend::{Access, ClientCertificate, ConnectionSettings, Frontend, Traffic, serve_connection};
use storage::{
    DataDir, DataDirError, EngineError, LogError, RaftEngineLog, RaftLog, RaftLogOptions, RocksOptions, StorageKind,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::NodeStore;
use crate::auto_compaction::Compactor;
use crate::bootstrap::{self, InitialMembers, Place};
use crate::descriptors::{self, Permitted};
use crate::discovery::DiscoveryOptions;
use crate::metrics::{Metrics, MetricsOptions};
use crate::node::{FailureHandler, Node, NodeConfig, StartError};
use crate::otlp::{Tracing, TracingOptions};
use crate::peer::{self, PeerUrl, Transport};
use crate::srv::{self, SrvOptions};
use crate::tls::{self, Prefixed, TlsClient, TlsError, TlsOptions, TlsServer};
use crate::variables;

/// How long a node may take to become able to answer.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long connections, and then proposals under way, may take to end in all when the node stops. Together with the rest
/// it is well below the 10 s after which containers are killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait before a member is published again.
const PUBLISH_PAUSE: Duration = Duration::from_millis(200);
/// How long a member that was removed goes on, so that messages under way arrive (etcd: 1 s).
const REMOVED_PAUSE: Duration = Duration::from_secs(1);
/// How long to pause after a connection could not be accepted, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Least time between two warnings that clients have all the connections that there are.
const FULL_WARNING_PAUSE: Duration = Duration::from_secs(10);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A host and port.
    Tcp(String),
    /// A socket file.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(host_and_port) => f.write_str(host_and_port),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Where to listen, and what for. Both may be set: the first byte of a connection tells which it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// Where.
    pub address: Address,
    /// Take plaintext.
    pub plaintext: bool,
    /// Take TLS.
    pub tls: bool,
    /// What is served there.
    pub traffic: Traffic,
}

/// What holds the data.
#[derive(Debug, Clone)]
pub enum EngineConfig {
    /// RocksDB.
    Rocks(RocksOptions),
    /// A map in memory, with snapshots to disk.
    Memory,
}

/// Everything a server needs to know.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where the data lies.
    pub data_dir: PathBuf,
    /// Where the Raft log lies, if elsewhere.
    pub wal_dir: Option<PathBuf>,
    /// What holds the data.
    pub engine: EngineConfig,
    /// This member's name.
    pub name: String,
    /// The members of the cluster at this member's first start, by name, with their peer URLs. It holds this member.
    pub initial_members: InitialMembers,
    /// Whether the cluster exists already at this member's first start.
    pub join: bool,
    /// Where the members of a new cluster are to be found, if `initial_members` names this one alone. The token is then
    /// the cluster's.
    pub discovery: Option<DiscoveryOptions>,
    /// Where DNS names the members at this member's first start, if `initial_members` names this one alone.
    pub srv: Option<SrvOptions>,
    /// Whether this member is to go on alone, without the others of its cluster.
    pub force_new_cluster: bool,
    /// The cluster's token: part of its identity.
    pub cluster_token: String,
    /// Where to listen for peers: URLs.
    pub listen_peers: Vec<String>,
    /// Where connections to peers leave from, unless the system is to choose (the gate SetMemberLocalAddr).
    pub local_address: Option<IpAddr>,
    /// How long a peer's connection may be silent (`--raft-read-timeout`).
    pub raft_read_timeout: Duration,
    /// How long a peer may take to accept what it is sent (`--raft-write-timeout`).
    pub raft_write_timeout: Duration,
    /// Most bytes a second that a snapshot is sent to a member with; 0 for no limit (`--snapshot-send-bytes-per-second`).
    pub snapshot_bytes_per_second: u64,
    /// Where to listen for clients.
    pub listen: Vec<Listen>,
    /// TLS for clients; needs a certificate, or to be allowed to make one, if any of `listen` is for TLS.
    pub client_tls: TlsOptions,
    /// TLS between members.
    pub peer_tls: TlsOptions,
    /// `SO_REUSEPORT`.
    pub reuse_port: bool,
    /// Connections.
    pub connections: ConnectionSettings,
    /// Which web pages and host names are let in over HTTP.
    pub access: Access,
    /// Whether the calls are offered as JSON over HTTP too (`--enable-grpc-gateway`).
    pub gateway: bool,
    /// What the metrics are to show.
    pub metrics: MetricsOptions,
    /// Write the headers of each request over HTTP/2 to standard error, in the form of Go's `http2debug`.
    pub shows_headers: bool,
    /// Where calls are traced, if they are.
    pub tracing: Option<TracingOptions>,
    /// The state machine.
    pub machine: mvcc::Options,
    /// The node; its ids, member and data directory are filled in from the rest.
    pub node: NodeConfig,
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket cannot be had.
    #[error("cannot listen on {address}: {cause}")]
    Listen {
        /// Where.
        address: Address,
        /// Why.
        cause: io::Error,
    },
    /// A socket for peers cannot be had.
    #[error("cannot listen for peers on {url}: {cause}")]
    ListenPeers {
        /// Where.
        url: String,
        /// Why.
        cause: io::Error,
    },
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The data directory cannot be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The engine cannot be opened.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The log cannot be opened.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The node cannot start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The node did not become ready.
    #[error("the node could not answer within {}s; see the log", READY_TIMEOUT.as_secs())]
    NotReady,
    /// The runtime cannot be started.
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    /// The member cannot begin.
    #[error("{0}")]
    Bootstrap(String),
    /// Calls cannot be traced.
    #[error("distributed tracing: {0}")]
    Tracing(String),
}

struct Listener {
    socket: Socket,
    plaintext: bool,
    tls: bool,
    traffic: Traffic,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// What a connection to a listener may be.
#[derive(Clone)]
enum Security {
    Plaintext,
    Tls(Arc<TlsServer>),
    Either(Arc<TlsServer>),
}

/// Runs a server until `stop` completes. What it returns by then was acknowledged is on disk.
///
/// # Errors
/// Nothing was changed on disk if the sockets or the data directory cannot be had.
pub fn run(
    mut config: ServerConfig,
    on_failure: FailureHandler,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let begun = Instant::now();
    let permits = share_descriptors(&mut config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("serve")
        .build()
        .map_err(ServeError::Runtime)?;
    // Peers' messages must not wait behind clients' requests.
    let peer_runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .thread_name("peers")
        .build()
        .map_err(ServeError::Runtime)?;
    // Certificates and sockets first: a wrong file or a taken port must leave the data alone.
    let with_tls = config.listen.iter().any(|listen| listen.tls);
    let given_tls = match with_tls && !config.client_tls.is_empty() {
        true => Some(TlsServer::new(config.client_tls.clone())?),
        false => None,
    };
    let calls_traced = match &config.tracing {
        Some(options) => {
            let _entered = peer_runtime.enter();
            Some(Arc::new(Tracing::start(options).map_err(ServeError::Tracing)?))
        }
        None => None,
    };
    let listeners = runtime.block_on(bind_all(&config))?;
    let peer_listeners = peer_runtime.block_on(bind_peers(&config))?;

    let kind = match config.engine {
        EngineConfig::Rocks(_) => StorageKind::RocksDb,
        EngineConfig::Memory => StorageKind::Memory,
    };
    let mut data_dir = DataDir::open(&config.data_dir, config.wal_dir.as_deref(), kind)?;
    let peers = peer::Settings {
        local_address: config.local_address,
        raft_read_timeout: config.raft_read_timeout,
        raft_write_timeout: config.raft_write_timeout,
        snapshot_bytes_per_second: config.snapshot_bytes_per_second,
        ..peer::Settings::for_entries(largest_entry_bytes(&config.node))
    };
    let member_tls = |options: TlsOptions| -> Result<peer::Tls, TlsError> {
        let (server, client) = (TlsServer::new(options.clone())?, TlsClient::new(options)?);
        let (server_config, client_config) = (server.config_source(), client.config_source());
        Ok(peer::Tls {
            server: Some(Arc::new(move || Ok(server_config()))),
            client: Some(Arc::new(move || Ok(client_config()))),
            verify_peer: None,
            verify_accepted: Some(server.verify_hook()),
            log_rejected: Some(Arc::new(move |origin, error| server.log_rejected(origin, error))),
        })
    };
    // Whoever joins asks its peers before it has a place for a certificate of its own; they are asked with what was given.
    let mut peer_tls = if config.peer_tls.is_empty() {
        peer::Tls::default()
    } else {
        member_tls(config.peer_tls.clone())?
    };
    let auto_peer_tls = config.peer_tls.is_empty() && config.peer_tls.auto_tls;
    if auto_peer_tls && data_dir.identity().is_none() {
        let client = TlsClient::new(TlsOptions {
            auto_tls: false,
            // As with a certificate of its own: theirs are generated too, and nobody can verify them.
            self_signed: true,
            ..config.peer_tls.clone()
        })?;
        let client_config = client.config_source();
        peer_tls.client = Some(Arc::new(move || Ok(client_config())));
    }
    if data_dir.identity().is_none()
        && let Some(options) = &config.srv
    {
        config.initial_members = peer_runtime.block_on(find_by_dns(&config, options))?;
    }
    let begin = bootstrap::begin(&config, kind, data_dir.identity(), &peers, &peer_tls);
    let mut beginning = peer_runtime.block_on(begin)?;
    if beginning.is_first {
        data_dir.initialize(beginning.identity.clone())?;
    }
    let (cluster_id, member_id) = (beginning.identity.cluster_id, beginning.identity.member_id);
    // A generated certificate lies in the data directory, so only now.
    let client_tls = match given_tls {
        None if with_tls => Some(TlsServer::new(
            config.client_tls.clone().with_auto_tls(&config.data_dir)?,
        )?),
        given_tls => given_tls,
    };
    if auto_peer_tls {
        peer_tls = member_tls(config.peer_tls.clone().with_auto_tls(&config.data_dir)?)?;
    }
    if let Some(server) = &client_tls {
        tracing::info!(
            "tls-info" = %server.options(),
            "cipher-suites" = ?server.options().cipher_suites,
            "starting with client TLS"
        );
    }
    // The log first: where it is damaged the engine's files stay as they are.
    let log = Arc::new(RaftEngineLog::open(data_dir.raft_dir(), &RaftLogOptions::default())?);
    let raft_dir = data_dir.raft_dir().to_path_buf();
    if !beginning.is_first && (config.discovery.is_some() || config.srv.is_some()) {
        if log.last_index() > 0 {
            if config.discovery.is_some() {
                tracing::warn!(
                    "wal-dir" = %raft_dir.display(),
                    "discovery token is ignored since cluster already initialized; valid logs are found"
                );
            }
        } else if beginning.founders.is_empty() && !config.join {
            // A crash came between the identity and the log's first entries, which the flags alone do not tell.
            if let Some(options) = &config.srv {
                config.initial_members = peer_runtime.block_on(find_by_dns(&config, options))?;
            }
            let found = bootstrap::found_members(&config);
            let (founders, cluster_id) = peer_runtime.block_on(found)?;
            if cluster_id != beginning.identity.cluster_id {
                return Err(ServeError::Bootstrap(format!(
                    "what was discovered are the members of cluster {cluster_id:x}, and the data directory belongs to {:x}; it holds no data yet, so remove it",
                    beginning.identity.cluster_id
                )));
            }
            beginning.founders = founders;
        }
    }
    data_dir.remove_unused_engines()?;
    let place = Place {
        data_dir: Arc::new(data_dir),
        engine: config.engine.clone(),
    };
    let used = place.data_dir.engine_dir()?;
    let engine = Arc::new(place.open(&used.path)?);
    if let Some(snapshot) = used.snapshot {
        bootstrap::finish_install(&*log, &engine, snapshot)?;
    }
    bootstrap::found(&*log, &beginning.founders)?;
    if config.force_new_cluster && log.last_index() > 0 {
        bootstrap::force_new_cluster(&*log, &engine, member_id)?;
    }

    config.node.cluster_id = cluster_id;
    config.node.replica.id = member_id;
    config.node.replica.seed = member_id;
    config.node.replica.incarnation = incarnation();
    config.node.data_dir = config.data_dir.clone();
    config.node.log_dir = raft_dir;
    config.node.flush_writes_all = matches!(config.engine, EngineConfig::Memory);
    config.node.name = config.name.clone();
    let metrics = Arc::new(Metrics::new(&config.metrics));
    let election_timeout = config.node.election_timeout;
    let node = Node::start(
        config.node,
        engine,
        Arc::new(place),
        log,
        &config.machine,
        metrics.clone(),
        on_failure,
    )?;
    let identity = peer::Identity {
        cluster_id,
        member_id,
        version: METASTORE_VERSION.to_owned(),
        peer_urls: config.initial_members.get(&config.name).cloned().unwrap_or_default(),
    };
    node.connect(peer_runtime.handle(), &beginning.known, |handler| {
        let handle = peer_runtime.handle().clone();
        Transport::start(handle, identity, peers, peer_tls, peer_listeners, handler)
    });
    // Whoever has nobody to wait for is ready as soon as its log is replayed.
    // With nothing in the engine yet, and flags that do not tell who founded the cluster, others may be in the log.
    let is_alone = !config.join
        && match node.membership_at_start() {
            0 => beginning.founders.len() == 1,
            members => members == 1 && beginning.founders.len() <= 1,
        };
    if is_alone && !node.wait_ready(READY_TIMEOUT) {
        return Err(ServeError::NotReady);
    }
    let mut removed = node.removed();
    let mut stop = Box::pin(async move {
        tokio::select! {
            () = stop => {}
            _ = removed.wait_for(|removed| *removed) => {
                // Long enough for the others to learn that this member knows.
                tokio::time::sleep(REMOVED_PAUSE).await;
            }
        }
    });

    let store = node.store();
    let frontend_store = node.store();
    let (stopping, stopped) = watch::channel(false);
    let options = frontend::Options {
        metrics: {
            let (metrics, store) = (metrics.clone(), store.clone());
            Arc::new(move || metrics.render(&store))
        },
        observer: metrics,
        shows_headers: config.shows_headers,
        tracer: calls_traced
            .clone()
            .map(|tracing| tracing as Arc<dyn frontend::CallTracer>),
        election_timeout,
        access: config.access.clone(),
        gateway_calls_max: config.gateway.then_some(config.connections.streams_max),
        variables: Arc::new(variables::all),
        stopping: Some(stopped.clone()),
    };
    let frontend = Frontend::new(store, options);
    let publish = {
        let store = frontend_store;
        async move {
            while let Err(error) = store.publish().await {
                tracing::warn!(%error, "this member is not published to the cluster yet");
                tokio::time::sleep(PUBLISH_PAUSE).await;
            }
            tracing::info!(
                local_member_id = format!("{member_id:x}"),
                cluster_id = format!("{cluster_id:x}"),
                etcd_version = ETCD_VERSION,
                metastore_version = METASTORE_VERSION,
                took_ms = begun.elapsed().as_millis() as u64,
                "ready to serve client requests"
            );
        }
    };
    let due = runtime.block_on(async {
        // A member that starts for the first time knows nothing to tell until it belongs to the cluster.
        if beginning.is_first || is_alone {
            tokio::select! {
                () = publish => {}
                () = &mut stop => return Instant::now(),
            }
        } else {
            tokio::spawn(publish);
        }
        tokio::spawn(compact_by_itself(node.store(), stopped.clone()));
        let mut accepting = JoinSet::new();
        for listener in listeners {
            let server = || client_tls.clone().expect("it was made because a listener is for TLS");
            let security = match (listener.plaintext, listener.tls) {
                (_, false) => Security::Plaintext,
                (false, true) => Security::Tls(server()),
                (true, true) => Security::Either(server()),
            };
            let (address, unix) = match &listener.socket {
                Socket::Tcp(tcp) => (
                    tcp.local_addr().map(|address| address.to_string()).unwrap_or_default(),
                    false,
                ),
                Socket::Unix(_, path) => (path.display().to_string(), true),
            };
            log_listener(&address, unix, &security, listener.traffic);
            accepting.spawn(accept(
                listener.socket,
                security,
                listener.traffic,
                frontend.clone(),
                config.connections.clone(),
                permits.clone(),
                stopped.clone(),
            ));
        }
        (&mut stop).await;
        tracing::info!("stopping: no new connections");
        let due = Instant::now() + STOP_TIMEOUT;
        stopping.send_replace(true);
        let finish = async { while accepting.join_next().await.is_some() {} };
        if tokio::time::timeout_at(due.into(), finish).await.is_err() {
            tracing::warn!("connections that did not end in time are cut");
        }
        due
    });
    drop(frontend);
    drop(stop);
    runtime.shutdown_timeout(Duration::from_millis(500));
    // One that was removed has nobody left to finish anything with.
    let was_removed = *node.removed().borrow();
    node.stop(match was_removed {
        true => Duration::ZERO,
        false => due.saturating_duration_since(Instant::now()),
    });
    if let Some(tracing) = calls_traced {
        tracing.stop();
    }
    peer_runtime.shutdown_timeout(Duration::from_millis(500));
    tracing::info!("stopped");
    Ok(())
}

async fn find_by_dns(config: &ServerConfig, options: &SrvOptions) -> Result<InitialMembers, ServeError> {
    let found = srv::find(options, &config.name, &config.initial_members[&config.name]).await;
    found.map_err(ServeError::Bootstrap)
}

/// Shares out the file descriptors that the process may have. Returns a permit for each connection of a client.
fn share_descriptors(config: &mut ServerConfig) -> Arc<Semaphore> {
    let limit = descriptors::raise_limit();
    let wanted = match &config.engine {
        EngineConfig::Rocks(options) => Some(options.open_files_max),
        EngineConfig::Memory => None,
    };
    let shares = descriptors::share(limit, wanted);
    if shares.are_short {
        tracing::warn!(
            limit,
            connections = shares.connections,
            "engine-files" = shares.engine_files,
            "engine-files-wanted" = wanted,
            "the limit of open files (ulimit -n, LimitNOFILE) is low: RocksDB keeps fewer open, which costs reads, and a \
             long log may use up the rest"
        );
    }
    if let EngineConfig::Rocks(options) = &mut config.engine {
        options.open_files_max = shares.engine_files;
    }
    descriptors::permits(shares)
}

/// Most bytes of one log entry, about: a batch, or one operation that is larger than that.
fn largest_entry_bytes(config: &NodeConfig) -> usize {
    config.replica.batch_bytes_max.max(config.limits.request_bytes_max)
}

/// Says that clients are served from now on, in etcd's words.
fn log_listener(address: &str, unix: bool, security: &Security, traffic: Traffic) {
    let traffic = match traffic {
        Traffic::Both => "grpc+http",
        Traffic::Grpc => "grpc",
        Traffic::Http => "http",
        Traffic::Rest => "http api",
        Traffic::Metrics => {
            tracing::info!(address, "serving metrics");
            return;
        }
    };
    match security {
        Security::Plaintext | Security::Either(_) if !unix => tracing::info!(
            address,
            traffic,
            "serving client traffic insecurely; this is strongly discouraged!"
        ),
        Security::Plaintext => tracing::info!(address, traffic, "serving client traffic"),
        Security::Tls(_) | Security::Either(_) => {}
    }
    if !matches!(security, Security::Plaintext) {
        tracing::info!(address, traffic, "serving client traffic securely");
    }
}

/// A number that no earlier start of this member had: the time in nanoseconds, mixed with the process's own random keys.
fn incarnation() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::time::SystemTime::now())
}

async fn bind_peers(config: &ServerConfig) -> Result<Vec<peer::Listener>, ServeError> {
    let options = peer::SocketOptions {
        reuse_port: config.reuse_port,
    };
    let mut listeners = Vec::new();
    for url in &config.listen_peers {
        let failed = |cause| ServeError::ListenPeers {
            url: url.clone(),
            cause,
        };
        let parsed: PeerUrl = url
            .parse()
            .map_err(|error: peer::UrlError| failed(io::Error::new(io::ErrorKind::InvalidInput, error.to_string())))?;
        listeners.push(peer::Listener::bind(&parsed, &options).await.map_err(failed)?);
    }
    Ok(listeners)
}

async fn bind_all(config: &ServerConfig) -> Result<Vec<Listener>, ServeError> {
    let mut listeners = Vec::new();
    for listen in &config.listen {
        let (address, mut add) = (&listen.address, |socket| {
            listeners.push(Listener {
                socket,
                plaintext: listen.plaintext,
                tls: listen.tls,
                traffic: listen.traffic,
            });
        });
        let failed = |cause| ServeError::Listen {
            address: address.clone(),
            cause,
        };
        match address {
            Address::Tcp(host_and_port) => {
                let mut resolved: Vec<_> = tokio::net::lookup_host(host_and_port).await.map_err(failed)?.collect();
                resolved.sort();
                resolved.dedup();
                // "localhost" may be two addresses; where one of them cannot be had (no IPv6), the other one will do.
                let mut bound = 0;
                let mut last_error = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
                for socket_address in resolved {
                    match bind(socket_address, config.reuse_port) {
                        Ok(listener) => {
                            bound += 1;
                            add(Socket::Tcp(listener));
                        }
                        Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(failed(error)),
                        Err(error) => last_error = error,
                    }
                }
                if bound == 0 {
                    return Err(failed(last_error));
                }
            }
            Address::Unix(path) => {
                // A socket file that nobody listens on is left over from a process that was killed. Nothing else is
                // removed: the path may be mistyped, and a busy listener answers otherwise.
                use std::os::unix::fs::FileTypeExt as _;
                let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
                if is_socket
                    && let Err(error) = tokio::net::UnixStream::connect(path).await
                    && error.kind() == io::ErrorKind::ConnectionRefused
                {
                    std::fs::remove_file(path).map_err(failed)?;
                }
                let listener = UnixListener::bind(path).map_err(failed)?;
                add(Socket::Unix(listener, path.clone()));
            }
        }
    }
    Ok(listeners)
}

fn bind(address: std::net::SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    // Go sets it always: a restarted server must get its port back while old connections linger.
    socket.set_reuseaddr(true)?;
    if reuse_port {
        socket.set_reuseport(true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Takes connections for as long as there are permits, and then when one comes back. A client may then say nothing for as
/// long as it likes over plaintext, as in etcd; what it keeps from others is its permit.
async fn accept<S: api::Store>(
    listener: Socket,
    security: Security,
    traffic: Traffic,
    frontend: Frontend<S>,
    settings: ConnectionSettings,
    permits: Arc<Semaphore>,
    stopped: watch::Receiver<bool>,
) {
    let mut warned: Option<Instant> = None;
    let mut connections = JoinSet::new();
    let settings = Arc::new(settings);
    let mut stop = stopped.clone();
    loop {
        // Ended connections are collected as we go.
        while connections.try_join_next().is_some() {}
        if permits.available_permits() == 0 && warned.is_none_or(|warned| warned.elapsed() >= FULL_WARNING_PAUSE) {
            warned = Some(Instant::now());
            tracing::warn!("clients have as many connections as the limit of open files lets them: others wait");
        }
        let permit = tokio::select! {
            permit = permits.clone().acquire_owned() => permit.expect("nobody closes it"),
            _ = stop.wait_for(|stopped| *stopped) => break,
        };
        let accepted = tokio::select! {
            accepted = accept_one(&listener) => accepted,
            _ = stop.wait_for(|stopped| *stopped) => break,
        };
        let connection = Connection {
            security: security.clone(),
            traffic,
            frontend: frontend.clone(),
            settings: settings.clone(),
            stopped: stopped.clone(),
        };
        match accepted {
            Ok(Accepted::Tcp(stream, remote)) => {
                // Answers are small and must not wait for more to send.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY was not set");
                }
                connections.spawn(connection.serve(Permitted::new(stream, permit), Some(remote)));
            }
            Ok(Accepted::Unix(stream)) => {
                connections.spawn(connection.serve(Permitted::new(stream, permit), None));
            }
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    if let Socket::Unix(_, path) = &listener {
        // Best effort: a file that stays behind is noticed at the next start.
        let _ = std::fs::remove_file(path);
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Forgets history as `--auto-compaction-retention` says, for as long as the server runs.
async fn compact_by_itself<E: storage::Engine>(store: NodeStore<E>, mut stopped: watch::Receiver<bool>) {
    let shared = store.shared().clone();
    let policy = shared.config.auto_compaction;
    let Some(mut compactor) = Compactor::new(policy, shared.now_ms(), shared.reader.revision()) else {
        return;
    };
    loop {
        let pause = Duration::from_millis(compactor.next_ms().saturating_sub(shared.now_ms()));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stopped.wait_for(|stopped| *stopped) => return,
        }
        let leads = shared.standing().has_begun;
        let Some(revision) = compactor.look(shared.now_ms(), shared.reader.revision(), leads) else {
            continue;
        };
        tracing::info!(revision, ?policy, "starting auto compaction");
        match store.compact_by_itself(revision).await {
            Ok(()) => {
                compactor.compacted(shared.now_ms(), revision);
                tracing::info!(revision, "completed auto compaction");
            }
            Err(error) => tracing::warn!(revision, %error, "failed auto compaction; it is tried again"),
        }
    }
}

enum Accepted {
    Tcp(tokio::net::TcpStream, SocketAddr),
    Unix(tokio::net::UnixStream),
}

async fn accept_one(listener: &Socket) -> io::Result<Accepted> {
    match listener {
        Socket::Tcp(listener) => listener
            .accept()
            .await
            .map(|(stream, remote)| Accepted::Tcp(stream, remote)),
        Socket::Unix(listener, _) => listener.accept().await.map(|(stream, _)| Accepted::Unix(stream)),
    }
}

/// What one connection is served with.
struct Connection<S: api::Store> {
    security: Security,
    traffic: Traffic,
    frontend: Frontend<S>,
    settings: Arc<ConnectionSettings>,
    stopped: watch::Receiver<bool>,
}

impl<S: api::Store> Connection<S> {
    /// Serves a connection to its end, which comes at once if we stop before its handshake is done.
    async fn serve<I>(self, stream: I, remote: Option<SocketAddr>)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut stopped = self.stopped.clone();
        let (Security::Tls(server) | Security::Either(server)) = self.security.clone() else {
            return self.serve_accepted(stream, false, None).await;
        };
        let either = matches!(self.security, Security::Either(_));
        let accept = async {
            match either {
                true => server.accept_any(stream, remote).await,
                false => server
                    .accept(Prefixed::new(stream), remote)
                    .await
                    .map(tls::Accepted::Tls),
            }
        };
        let accepted = tokio::select! {
            accepted = accept => accepted,
            _ = stopped.wait_for(|stopped| *stopped) => return,
        };
        match accepted {
            Ok(tls::Accepted::Plain(stream)) => self.serve_accepted(stream, false, None).await,
            Ok(tls::Accepted::Tls(stream)) => {
                // A name counts only where certificates are asked for on purpose, as in etcd.
                let name = match server.options().client_cert_auth {
                    true => tls::peer_common_name(stream.get_ref().1),
                    false => None,
                };
                let certificate = name.map(|name| ClientCertificate {
                    common_name: name.into(),
                });
                self.serve_accepted(stream, true, certificate).await;
            }
            Err(error) => {
                let remote = remote.map(|remote| remote.to_string()).unwrap_or_default();
                server.log_rejected(&remote, &error);
            }
        }
    }

    async fn serve_accepted<I>(mut self, stream: I, tls: bool, certificate: Option<ClientCertificate>)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let stop = async move {
            // The sender lives until all connections have ended; should it not, that is a reason to end as well.
            let _ = self.stopped.wait_for(|stopped| *stopped).await;
        };
        let traffic = self.traffic;
        let frontend = self
            .frontend
            .at(frontend::Listener { traffic, tls })
            .with_certificate(certificate);
        if let Err(error) = serve_connection(stream, frontend, &self.settings, stop).await {
            tracing::debug!(%error, "a connection ended");
        }
    }
}
