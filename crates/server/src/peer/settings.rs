//! Who we are, and the bounds that the transport keeps.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::tls::{HandshakeError, VerifyHook};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{ClientConfig, ServerConfig};

use super::MemberId;

/// Who we are, as other members are told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Identity {
    /// Our cluster.
    pub(crate) cluster_id: u64,
    /// Ourselves.
    pub(crate) member_id: MemberId,
    /// Our software's version.
    pub(crate) version: String,
    /// Where we say that we can be reached.
    pub(crate) peer_urls: Vec<String>,
}

/// Bounds in time, bytes and number.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Where our connections leave from, if not from where the system chooses.
    pub(crate) local_address: Option<IpAddr>,
    /// Longest time to resolve, connect, speak TLS and introduce ourselves, for each URL.
    pub(crate) connect_timeout: Duration,
    /// Longest time that another may take to introduce itself.
    pub(crate) handshake_timeout: Duration,
    /// Most connections that are not accepted yet, over all listeners. More wait in the backlog.
    pub(crate) handshakes_max: usize,
    /// Most accepted connections. More are refused as `Busy`.
    pub(crate) connections_max: usize,
    /// A RAFT or CALL connection whose other side accepts not one byte for so long is closed (`--raft-write-timeout`).
    pub(crate) raft_write_timeout: Duration,
    /// A connection on which nothing arrives for so long is closed (`--raft-read-timeout`).
    pub(crate) raft_read_timeout: Duration,
    /// How often something is sent whatever happens. To be well below `raft_read_timeout`.
    pub(crate) keepalive_interval: Duration,
    /// Most bytes of a frame: of a RAFT message, a request, an answer or a chunk, with a few bytes around it.
    pub(crate) frame_bytes_max: usize,
    /// Most bytes of RAFT messages to one peer that wait or are being written.
    pub(crate) queue_bytes_max: usize,
    /// Most RAFT messages to one peer that wait or are being written.
    pub(crate) queue_messages_max: usize,
    /// Most calls to one peer that have no answer yet, and most that are carried out for one connection.
    pub(crate) calls_max: usize,
    /// Most bytes of requests to one peer that have no answer yet.
    pub(crate) call_bytes_max: usize,
    /// Pause after a first failed attempt to connect. It doubles with each further one.
    pub(crate) backoff_min: Duration,
    /// Longest such pause.
    pub(crate) backoff_max: Duration,
    /// A snapshot of which no chunk is acknowledged for so long is given up by its sender.
    pub(crate) snapshot_stall_timeout: Duration,
    /// Longest time that a receiver may take to finish a snapshot once all of it is there.
    pub(crate) snapshot_finish_timeout: Duration,
    /// How long an unfinished snapshot waits for its sender to come back.
    pub(crate) snapshot_keep: Duration,
    /// Most bytes a second that a snapshot is sent with; 0 for no limit.
    pub(crate) snapshot_bytes_per_second: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            local_address: None,
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            handshakes_max: 64,
            connections_max: 1024,
            raft_write_timeout: Duration::from_secs(5),
            raft_read_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(1),
            frame_bytes_max: 32 << 20,
            queue_bytes_max: 128 << 20,
            queue_messages_max: 8192,
            calls_max: 1024,
            call_bytes_max: 64 << 20,
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
            snapshot_stall_timeout: Duration::from_secs(30),
            snapshot_finish_timeout: Duration::from_secs(300),
            snapshot_keep: Duration::from_secs(60),
            snapshot_bytes_per_second: 0,
        }
    }
}

impl Settings {
    /// The defaults where a log entry may have so many bytes: it travels in one piece, alone if it is large. Members whose
    /// flags differ still understand each other, as long as nobody's entries are beyond the default.
    pub(crate) fn for_entries(entry_bytes_max: usize) -> Self {
        let mut settings = Settings::default();
        // What is around the operations of an entry takes a few bytes for each of them.
        let needed = entry_bytes_max.saturating_mul(2).saturating_add(1 << 20);
        settings.frame_bytes_max = settings.frame_bytes_max.max(needed);
        settings.queue_bytes_max = settings.queue_bytes_max.max(settings.frame_bytes_max.saturating_mul(4));
        settings
    }
}

/// Gives the TLS settings for one connection.
pub(crate) type TlsFactory<C> = Arc<dyn Fn() -> Result<Arc<C>, String> + Send + Sync>;
/// Judges the certificates that the other side showed; says why they will not do.
pub(crate) type VerifyPeer = Arc<dyn Fn(&[CertificateDer<'static>]) -> Result<(), String> + Send + Sync>;

/// Reports a connection that was refused by TLS.
pub(crate) type LogRejected = Arc<dyn Fn(&str, &HandshakeError) + Send + Sync>;

/// TLS. The factories are asked for each connection, so that changed certificates are noticed without a restart. They
/// are called on the runtime's threads and must not take long.
#[derive(Clone, Default)]
pub(crate) struct Tls {
    /// For connections to `https` and `unixs` listeners. Without it they are closed.
    pub(crate) server: Option<TlsFactory<ServerConfig>>,
    /// For connections to `https` and `unixs` URLs. Without it they fail.
    pub(crate) client: Option<TlsFactory<ClientConfig>>,
    /// Called in both directions after the TLS handshake, with no certificate if none was shown.
    pub(crate) verify_peer: Option<VerifyPeer>,
    /// Called after that for connections that were accepted, with where they come from.
    pub(crate) verify_accepted: Option<VerifyHook>,
    /// Told where a connection came from that was refused by TLS, and why.
    pub(crate) log_rejected: Option<LogRejected>,
}
