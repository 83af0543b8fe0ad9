//! Where peers listen and are reached: URLs as etcd writes them, and sockets bound to them.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use tokio::net::{TcpListener, TcpSocket, UnixListener};

/// Connections that may wait to be accepted. Peers are few; this is for strangers.
const BACKLOG: u32 = 1024;

/// `http://host:port`, `https://host:port`, `unix://path` or `unixs://path`. An `s` asks for TLS.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct PeerUrl {
    pub(super) tls: bool,
    pub(super) place: Place,
}

/// What is behind the scheme.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// A host, without the brackets of an IPv6 address, and a port.
    Tcp { host: String, port: u16 },
    /// A socket file.
    Unix(PathBuf),
}

/// Why a URL is not one of a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} is no peer URL: {reason}")]
pub(crate) struct UrlError {
    url: String,
    reason: &'static str,
}

impl PeerUrl {
    /// Whether TLS is spoken there.
    pub(crate) fn is_tls(&self) -> bool {
        self.tls
    }

    /// The name that the certificate there must have.
    pub(super) fn server_name(&self) -> &str {
        match &self.place {
            Place::Tcp { host, .. } => host,
            // etcd names socket files like hosts, as in unixs://localhost:2380.
            Place::Unix(path) => match path.to_str().and_then(|path| path.split([':', '/']).next()) {
                Some(host) if !host.is_empty() => host,
                _ => "localhost",
            },
        }
    }
}

impl FromStr for PeerUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        let refuse = |reason| UrlError {
            url: url.to_owned(),
            reason,
        };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| refuse("it has no scheme"))?;
        let (unix, tls) = match scheme {
            "http" => (false, false),
            "https" => (false, true),
            "unix" => (true, false),
            "unixs" => (true, true),
            _ => return Err(refuse("the scheme must be http, https, unix or unixs")),
        };
        if unix {
            if rest.is_empty() {
                return Err(refuse("it names no socket file"));
            }
            let place = Place::Unix(PathBuf::from(rest));
            return Ok(PeerUrl { tls, place });
        }
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains(['/', '?', '#', '@']) {
            return Err(refuse("only a host and a port may follow the scheme"));
        }
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| refuse("it has no port"))?;
        let port = port.parse().map_err(|_| refuse("the port is no number up to 65535"))?;
        let host = match host.strip_prefix('[') {
            Some(host) => host
                .strip_suffix(']')
                .ok_or_else(|| refuse("a bracket is not closed"))?,
            None if host.contains(':') => return Err(refuse("an IPv6 address must stand in brackets")),
            None => host,
        };
        if host.is_empty() {
            return Err(refuse("it has no host"));
        }
        let place = Place::Tcp {
            host: host.to_owned(),
            port,
        };
        Ok(PeerUrl { tls, place })
    }
}

impl fmt::Display for PeerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secure = if self.tls { "s" } else { "" };
        match &self.place {
            Place::Tcp { host, port } if host.contains(':') => write!(f, "http{secure}://[{host}]:{port}"),
            Place::Tcp { host, port } => write!(f, "http{secure}://{host}:{port}"),
            Place::Unix(path) => write!(f, "unix{secure}://{}", path.display()),
        }
    }
}

/// How to bind a socket. `SO_REUSEADDR` is set always, as Go does: a restarted member must get its port back while old
/// connections linger.
#[derive(Debug, Clone, Default)]
pub(crate) struct SocketOptions {
    /// `SO_REUSEPORT`.
    pub(crate) reuse_port: bool,
}

/// Bound sockets of one URL. Connections wait in their backlog until the transport starts.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(super) url: PeerUrl,
    /// More than one if the host has more than one address.
    pub(super) sockets: Vec<Socket>,
}

/// One bound socket.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Binds all addresses of a URL. Needs a runtime around it.
    ///
    /// # Errors
    /// An address is taken, or none can be had.
    pub(crate) async fn bind(url: &PeerUrl, options: &SocketOptions) -> io::Result<Listener> {
        let sockets = match &url.place {
            Place::Tcp { host, port } => bind_tcp(host, *port, options).await?,
            Place::Unix(path) => {
                remove_stale_socket(path).await?;
                vec![Socket::Unix(UnixListener::bind(path)?, path.clone())]
            }
        };
        Ok(Listener {
            url: url.clone(),
            sockets,
        })
    }

    /// The URL that it listens at, with the real port where 0 was asked for.
    pub(crate) fn local_url(&self) -> String {
        let mut url = self.url.clone();
        if let Place::Tcp { port, .. } = &mut url.place
            && let Some(Socket::Tcp(socket)) = self.sockets.first()
            && let Ok(address) = socket.local_addr()
        {
            *port = address.port();
        }
        url.to_string()
    }
}

async fn bind_tcp(host: &str, port: u16, options: &SocketOptions) -> io::Result<Vec<Socket>> {
    let mut addresses: Vec<_> = tokio::net::lookup_host((host, port)).await?.collect();
    addresses.sort();
    addresses.dedup();
    // "localhost" may be two addresses; where one of them cannot be had (no IPv6), the other one will do.
    let mut sockets = Vec::new();
    let mut last_error = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in addresses {
        let bind = || {
            let socket = if address.is_ipv4() {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            }?;
            socket.set_reuseaddr(true)?;
            // Accepted connections inherit it.
            socket.set_keepalive(true)?;
            if options.reuse_port {
                socket.set_reuseport(true)?;
            }
            socket.bind(address)?;
            socket.listen(BACKLOG)
        };
        match bind() {
            Ok(socket) => sockets.push(Socket::Tcp(socket)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
            Err(error) => last_error = error,
        }
    }
    if sockets.is_empty() {
        Err(last_error)
    } else {
        Ok(sockets)
    }
}

/// Removes a socket file that nobody listens on: it is left over from a process that was killed. Nothing else is
/// removed, as the path may be mistyped.
async fn remove_stale_socket(path: &std::path::Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt as _;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket
        && let Err(error) = tokio::net::UnixStream::connect(path).await
        && error.kind() == io::ErrorKind::ConnectionRefused
    {
        std::fs::remove_file(path)?;
    }
    Ok(())
}
