//! Opens the data directory and the sockets, and serves until it is told to stop.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::kv::Member;
use api::limits::{ETCD_VERSION, METASTORE_VERSION};
use frontend::{ConnectionSettings, Frontend, serve_connection};
use mvcc::keys::FAMILIES;
use storage::{
    AnyEngine, DataDir, DataDirError, EngineError, Identity, LogError, RaftEngineLog, RaftLogOptions, RocksOptions,
    StorageKind,
};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::identity;
use crate::metrics::Metrics;
use crate::node::{FailureHandler, Node, NodeConfig, StartError};

/// How long a node may take to become able to answer.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long connections and proposals under way may take to end when the node stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to pause after a connection could not be accepted, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
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
    /// Where peers reach it.
    pub peer_urls: Vec<String>,
    /// Where clients are told to reach it.
    pub client_urls: Vec<String>,
    /// The cluster's token: part of its identity.
    pub cluster_token: String,
    /// Where to listen for clients.
    pub listen: Vec<Address>,
    /// `SO_REUSEPORT`.
    pub reuse_port: bool,
    /// Connections.
    pub connections: ConnectionSettings,
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
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
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
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("serve")
        .build()
        .map_err(ServeError::Runtime)?;
    // Sockets first: a taken port must leave the data alone.
    let listeners = runtime.block_on(bind_all(&config))?;

    let kind = match config.engine {
        EngineConfig::Rocks(_) => StorageKind::RocksDb,
        EngineConfig::Memory => StorageKind::Memory,
    };
    let mut data_dir = DataDir::open(&config.data_dir, config.wal_dir.as_deref(), kind)?;
    // As in etcd, what is on disk says who this member is; the flags only say so at its first start.
    let identity = match data_dir.identity() {
        Some(identity) => identity.clone(),
        None => {
            let member_id = identity::member_id(&config.peer_urls, &config.cluster_token);
            let identity = Identity {
                cluster_id: identity::cluster_id(&[member_id]),
                member_id,
                storage: kind,
                created_by: format!("metastore {METASTORE_VERSION}"),
            };
            data_dir.initialize(identity.clone())?;
            identity
        }
    };
    let Identity {
        cluster_id, member_id, ..
    } = identity;
    // The log first: where it is damaged the engine's files stay as they are.
    let log = Arc::new(RaftEngineLog::open(data_dir.raft_dir(), &RaftLogOptions::default())?);
    let engine = Arc::new(match &config.engine {
        EngineConfig::Rocks(options) => AnyEngine::open_rocks(&data_dir.engine_dir(), FAMILIES, options)?,
        EngineConfig::Memory => AnyEngine::open_memory(&data_dir.engine_dir(), FAMILIES)?,
    });

    config.node.cluster_id = cluster_id;
    config.node.replica.id = member_id;
    config.node.replica.seed = member_id;
    config.node.replica.first_voters = vec![member_id];
    config.node.data_dir = config.data_dir.clone();
    config.node.log_dir = data_dir.raft_dir().to_path_buf();
    config.node.flush_writes_all = matches!(config.engine, EngineConfig::Memory);
    config.node.member = Member {
        id: member_id,
        name: config.name.clone(),
        peer_urls: config.peer_urls.clone(),
        client_urls: config.client_urls.clone(),
        is_learner: false,
    };
    let metrics = Arc::new(Metrics::new());
    let election_timeout = config.node.election_timeout;
    let node = Node::start(config.node, engine, log, &config.machine, metrics.clone(), on_failure)?;
    if !node.wait_ready(READY_TIMEOUT) {
        return Err(ServeError::NotReady);
    }
    tracing::info!(
        local_member_id = format!("{member_id:x}"),
        cluster_id = format!("{cluster_id:x}"),
        etcd_version = ETCD_VERSION,
        metastore_version = METASTORE_VERSION,
        took_ms = begun.elapsed().as_millis() as u64,
        "ready to serve client requests"
    );

    let store = node.store();
    let (stopping, stopped) = watch::channel(false);
    let options = frontend::Options {
        metrics: {
            let (metrics, store) = (metrics.clone(), store.clone());
            Arc::new(move || metrics.render(&store))
        },
        observer: metrics,
        election_timeout,
        stopping: Some(stopped.clone()),
    };
    let frontend = Frontend::new(store, options);
    runtime.block_on(async {
        let mut accepting = JoinSet::new();
        for listener in listeners {
            match &listener {
                Listener::Tcp(tcp) => {
                    let address = tcp.local_addr().map(|address| address.to_string()).unwrap_or_default();
                    tracing::info!(
                        address,
                        traffic = "grpc+http",
                        "serving client traffic insecurely; this is strongly discouraged!"
                    );
                }
                Listener::Unix(_, path) => {
                    tracing::info!(address = %path.display(), traffic = "grpc+http", "serving client traffic");
                }
            }
            accepting.spawn(accept(
                listener,
                frontend.clone(),
                config.connections.clone(),
                stopped.clone(),
            ));
        }
        stop.await;
        tracing::info!("stopping: no new connections");
        stopping.send_replace(true);
        let finish = async { while accepting.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_TIMEOUT, finish).await.is_err() {
            tracing::warn!("connections that did not end in time are cut");
        }
    });
    drop(frontend);
    runtime.shutdown_timeout(Duration::from_millis(500));
    node.stop(STOP_TIMEOUT);
    tracing::info!("stopped");
    Ok(())
}

async fn bind_all(config: &ServerConfig) -> Result<Vec<Listener>, ServeError> {
    let mut listeners = Vec::new();
    for address in &config.listen {
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
                            listeners.push(Listener::Tcp(listener));
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
                listeners.push(Listener::Unix(listener, path.clone()));
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

async fn accept<S: api::Store>(
    listener: Listener,
    frontend: Frontend<S>,
    settings: ConnectionSettings,
    stopped: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let settings = Arc::new(settings);
    let mut stop = stopped.clone();
    loop {
        // Ended connections are collected as we go.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = accept_one(&listener) => accepted,
            _ = stop.wait_for(|stopped| *stopped) => break,
        };
        let (frontend, settings, mut stopped) = (frontend.clone(), settings.clone(), stopped.clone());
        let stop = async move {
            // The sender lives until all connections have ended; should it not, that is a reason to end as well.
            let _ = stopped.wait_for(|stopped| *stopped).await;
        };
        match accepted {
            Ok(Accepted::Tcp(stream)) => {
                // Answers are small and must not wait for more to send.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY was not set");
                }
                connections.spawn(async move {
                    if let Err(error) = serve_connection(stream, frontend, &settings, stop).await {
                        tracing::debug!(%error, "a connection ended");
                    }
                });
            }
            Ok(Accepted::Unix(stream)) => {
                connections.spawn(async move {
                    if let Err(error) = serve_connection(stream, frontend, &settings, stop).await {
                        tracing::debug!(%error, "a connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    if let Listener::Unix(_, path) = &listener {
        // Best effort: a file that stays behind is noticed at the next start.
        let _ = std::fs::remove_file(path);
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

enum Accepted {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn accept_one(listener: &Listener) -> io::Result<Accepted> {
    match listener {
        Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| Accepted::Tcp(stream)),
        Listener::Unix(listener, _) => listener.accept().await.map(|(stream, _)| Accepted::Unix(stream)),
    }
}
