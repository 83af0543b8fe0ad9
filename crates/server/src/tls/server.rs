//! The side that accepts.

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rustls::server::{Acceptor, NoServerSessionStorage};
use rustls::sign::SingleCertAndKey;
use rustls::{CommonState, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::error::{HandshakeError, TlsError};
use super::files::{self, Reloading};
use super::names::peer_names;
use super::options::{Endpoint, TlsOptions};
use super::provider;
use super::sniff::{Accepted, Prefixed};
use super::verify::ClientVerifier;

/// How long a handshake may take, as in etcd.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take for the byte that tells TLS from plaintext; as long as for the headers of a request.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(300);
/// The first byte of a TLS connection: a record of type handshake. No HTTP request begins with it.
const TLS_RECORD_HANDSHAKE: u8 = 0x16;

/// Checks a connection after its handshake; see [`TlsServer::verify`].
pub type VerifyHook = Arc<
    dyn for<'a> Fn(
            &'a CommonState,
            Option<SocketAddr>,
        ) -> Pin<Box<dyn Future<Output = Result<(), HandshakeError>> + Send + 'static>>
        + Send
        + Sync,
>;

/// Accepts TLS connections by what the flags say and the files hold.
pub struct TlsServer {
    options: TlsOptions,
    config: Reloading<ServerConfig>,
}

impl std::fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsServer")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl TlsServer {
    /// Reads the files. With `auto_tls`, [`TlsOptions::with_auto_tls`] must have been called before.
    ///
    /// # Errors
    /// The options do not go together, there is no certificate, or a file cannot be used, the one of the client
    /// side's certificate included: better now than when the first member is to be reached.
    pub fn new(options: TlsOptions) -> Result<Arc<TlsServer>, TlsError> {
        options.validate()?;
        let (Some(certificate), Some(key)) = (options.cert_file.clone(), options.key_file.clone()) else {
            return Err(TlsError::Options(format!(
                "KeyFile and CertFile are not presented: set {} and {}, or {}",
                options.endpoint.flag("cert-file"),
                options.endpoint.flag("key-file"),
                options.endpoint.flag("auto-tls"),
            )));
        };
        let provider = provider::provider(&options)?;
        if let (Some(certificate), Some(key)) = (&options.client_cert_file, &options.client_key_file) {
            files::identity(certificate, key, &provider)?;
        }
        let mut watched = vec![certificate.clone(), key.clone()];
        watched.extend(options.trusted_ca_file.iter().chain(&options.crl_file).cloned());
        let made_from = options.clone();
        let config = Reloading::new(watched, move || server_config(&made_from, &certificate, &key))?;
        Ok(Arc::new(TlsServer { options, config }))
    }

    /// The configuration for the next handshake. Costs a `stat` for each file, and reading them if they changed.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.config.current()
    }

    /// [`TlsServer::config`] as a closure.
    pub fn config_source(self: &Arc<Self>) -> Arc<dyn Fn() -> Arc<ServerConfig> + Send + Sync> {
        let server = self.clone();
        Arc::new(move || server.config())
    }

    /// Does the handshake and all checks. Ends within the time that etcd gives too, plus that of look-ups for the
    /// names in a peer's certificate.
    ///
    /// # Errors
    /// The connection was refused, and is closed; [`TlsServer::log_rejected`] logs why.
    pub async fn accept<S>(&self, stream: S, remote: Option<SocketAddr>) -> Result<TlsStream<S>, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut server_name = String::new();
        let handshake = async {
            let begun = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
            server_name = begun.client_hello().server_name().unwrap_or_default().to_owned();
            // Only now, so that whoever connects and says nothing costs no look at the files.
            begun.into_stream(self.config()).await
        };
        let done = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(done) => done.map_err(HandshakeError::from),
            Err(_) => Err(HandshakeError::timed_out(HANDSHAKE_TIMEOUT)),
        };
        let checked = match done {
            Ok(stream) => self.verify(stream.get_ref().1, remote).await.map(|()| stream),
            Err(error) => Err(error),
        };
        checked.map_err(|error| HandshakeError { server_name, ..error })
    }

    /// Tells TLS from plaintext by the first byte, then [`TlsServer::accept`]s TLS; for an address that has both an
    /// http and an https URL.
    ///
    /// # Errors
    /// Those of [`TlsServer::accept`], or the client sent nothing.
    pub async fn accept_any<S>(
        &self,
        mut stream: S,
        remote: Option<SocketAddr>,
    ) -> Result<Accepted<Prefixed<S>>, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let first = match tokio::time::timeout(FIRST_BYTE_TIMEOUT, stream.read_u8()).await {
            Ok(read) => read?,
            Err(_) => return Err(HandshakeError::new("the client sent nothing: i/o timeout")),
        };
        let stream = Prefixed::with_first(first, stream);
        match first {
            TLS_RECORD_HANDSHAKE => self.accept(stream, remote).await.map(Accepted::Tls),
            _ => Ok(Accepted::Plain(stream)),
        }
    }

    /// What is checked after the handshake: whether the names in a client's certificate belong to the address that it
    /// connects from. All else the handshake itself checks. Nothing is checked on a Unix socket, which has no address.
    ///
    /// # Errors
    /// They do not; the caller closes the connection.
    pub fn verify(
        &self,
        connection: &CommonState,
        remote: Option<SocketAddr>,
    ) -> impl Future<Output = Result<(), HandshakeError>> + Send + 'static {
        let names = match self.options.skip_client_san_verification {
            true => None,
            false => peer_names(connection),
        };
        async move {
            let (Some(names), Some(remote)) = (names, remote) else {
                return Ok(());
            };
            names.verify_remote(remote).await.map_err(|message| HandshakeError {
                ip_addresses: names.ip_addresses.iter().map(|address| address.to_string()).collect(),
                dns_names: names.dns_names.clone(),
                ..HandshakeError::new(message)
            })
        }
    }

    /// [`TlsServer::verify`] as a closure.
    pub fn verify_hook(self: &Arc<Self>) -> VerifyHook {
        let server = self.clone();
        Arc::new(move |connection, remote| Box::pin(server.verify(connection, remote)))
    }

    /// Logs a refused connection as etcd does, whose tests wait for these lines.
    pub fn log_rejected(&self, remote: &str, error: &HandshakeError) {
        let HandshakeError {
            message,
            server_name,
            ip_addresses,
            dns_names,
            ..
        } = error;
        // The level and the message of a line are fixed where it is written, hence the four of them.
        macro_rules! log {
            ($level:ident, $text:literal) => {
                tracing::$level!(
                    "remote-addr" = remote,
                    "server-name" = server_name,
                    "ip-addresses" = ?ip_addresses,
                    "dns-names" = ?dns_names,
                    error = message,
                    $text
                )
            };
        }
        match (self.options.endpoint, error.is_eof) {
            (Endpoint::Client, false) => log!(warn, "rejected connection on client endpoint"),
            (Endpoint::Client, true) => log!(debug, "rejected connection on client endpoint"),
            (Endpoint::Peer, false) => log!(warn, "rejected connection on peer endpoint"),
            (Endpoint::Peer, true) => log!(debug, "rejected connection on peer endpoint"),
        }
    }

    /// What it was made from.
    pub fn options(&self) -> &TlsOptions {
        &self.options
    }
}

fn server_config(options: &TlsOptions, certificate: &Path, key: &Path) -> Result<ServerConfig, TlsError> {
    let provider = provider::provider(options)?;
    let versions = provider::versions(options, &provider)?;
    let identity = files::identity(certificate, key, &provider)?;
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&versions)
        .map_err(TlsError::setup)?;
    let builder = match options.demands_client_certificate() {
        true => builder.with_client_cert_verifier(Arc::new(ClientVerifier::new(options, &provider)?)),
        false => {
            // Nothing to compare it with, but a damaged file should not wait until there is.
            if let Some(path) = &options.crl_file {
                files::revoked(path)?;
            }
            builder.with_no_client_auth()
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    config.alpn_protocols = options.alpn_protocols.clone();
    config.ignore_client_order = !options.cipher_suites.is_empty();
    // A resumed session would skip the verification of certificates, and so outlive a revocation. The clients of etcd
    // keep their connections and resume none.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}
