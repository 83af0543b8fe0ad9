//! The side that connects: to the other members.

use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::error::{HandshakeError, TlsError};
use super::files::{self, Reloading};
use super::options::TlsOptions;
use super::provider;
use super::verify::ServerVerifier;

/// How long a handshake may take, as on the other side.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects by TLS, by what the flags say and the files hold.
pub struct TlsClient {
    config: Reloading<ClientConfig>,
}

impl std::fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsClient").finish_non_exhaustive()
    }
}

impl TlsClient {
    /// Reads the files. It shows the client certificate, or else the server's, or none if there is none.
    ///
    /// # Errors
    /// The options do not go together, or a file cannot be used.
    pub fn new(options: TlsOptions) -> Result<Arc<TlsClient>, TlsError> {
        options.validate()?;
        let watched = [
            &options.client_cert_file,
            &options.client_key_file,
            &options.cert_file,
            &options.key_file,
            &options.trusted_ca_file,
            &options.crl_file,
        ];
        let watched = watched.into_iter().flatten().cloned().collect();
        let config = Reloading::new(watched, move || client_config(&options))?;
        Ok(Arc::new(TlsClient { config }))
    }

    /// The configuration for the next handshake. Costs a `stat` for each file, and reading them if they changed.
    pub fn config(&self) -> Arc<ClientConfig> {
        self.config.current()
    }

    /// [`TlsClient::config`] as a closure.
    pub fn config_source(self: &Arc<Self>) -> Arc<dyn Fn() -> Arc<ClientConfig> + Send + Sync> {
        let client = self.clone();
        Arc::new(move || client.config())
    }

    /// Does the handshake with the server at `host`: the host of its URL, a name or an address, without a port.
    ///
    /// With TLS 1.3 a server that refuses our certificate is heard of only when something is read; [`super::describe`]
    /// puts that error into words as well.
    ///
    /// # Errors
    /// The server's certificate is not as it should be, or the server refuses.
    pub async fn connect<S>(&self, stream: S, host: &str) -> Result<TlsStream<S>, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let name = ServerName::try_from(bare.to_owned())
            .map_err(|error| HandshakeError::new(format!("tls: {host:?} is no host name: {error}")))?;
        let handshake = TlsConnector::from(self.config()).connect(name, stream);
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(done) => Ok(done?),
            Err(_) => Err(HandshakeError::timed_out(HANDSHAKE_TIMEOUT)),
        }
    }
}

fn client_config(options: &TlsOptions) -> Result<ClientConfig, TlsError> {
    let provider = provider::provider(options)?;
    let versions = provider::versions(options, &provider)?;
    let server = options.cert_file.as_ref().zip(options.key_file.as_ref());
    let client = options.client_cert_file.as_ref().zip(options.client_key_file.as_ref());
    let insecure = options.insecure_skip_verify || options.self_signed;
    let verifier = ServerVerifier::new(options, insecure, &provider)?;
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&versions)
        .map_err(TlsError::setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match client.or(server) {
        Some((certificate, key)) => {
            let identity = files::identity(certificate, key, &provider)?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity)))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = options.alpn_protocols.clone();
    config.resumption = Resumption::disabled();
    Ok(config)
}
