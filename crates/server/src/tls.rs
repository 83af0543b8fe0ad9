//! TLS on client and peer sockets, with etcd's rules.
//!
//! - [`TlsOptions`] is what the flags say; [`TlsOptions::validate`] refuses bad combinations in etcd's words, and
//!   [`TlsOptions::with_auto_tls`] makes the certificate of `--auto-tls`.
//! - [`TlsServer`] accepts, [`TlsClient`] connects. Both read their files again when they changed, so a certificate is
//!   renewed, or a revocation list replaced, without a restart.
//! - [`TlsServer::accept_any`] serves plaintext and TLS on one port.
//! - [`peer_common_name`] tells who a client is; [`describe`] says in Go's words why a handshake failed.
//!
//! The public surface, for who wires it in:
//!
//! ```text
//! TlsOptions::for_clients() -> TlsOptions              // defaults of the client flags
//! TlsOptions::for_peers() -> TlsOptions                // defaults of the peer flags
//! TlsOptions::is_empty(&self) -> bool                  // neither certificate nor key
//! TlsOptions::validate(&self) -> Result<(), TlsError>
//! TlsOptions::with_auto_tls(self, data_dir: &Path) -> Result<TlsOptions, TlsError>
//!
//! TlsServer::new(TlsOptions) -> Result<Arc<TlsServer>, TlsError>
//! TlsServer::config(&self) -> Arc<rustls::ServerConfig>                  // current; call it for every handshake
//! TlsServer::config_source(self: &Arc<Self>) -> Arc<dyn Fn() -> Arc<rustls::ServerConfig> + Send + Sync>
//! TlsServer::accept(&self, stream, remote: Option<SocketAddr>) -> Result<server::TlsStream<S>, HandshakeError>
//! TlsServer::accept_any(&self, stream, remote: Option<SocketAddr>) -> Result<Accepted<S>, HandshakeError>
//! TlsServer::verify(&self, &rustls::CommonState, Option<SocketAddr>) -> Result<(), HandshakeError>   // async
//! TlsServer::verify_hook(self: &Arc<Self>) -> VerifyHook  // the same as a closure, for whoever does handshakes itself
//! TlsServer::log_rejected(&self, remote: &str, &HandshakeError)
//!
//! TlsClient::new(TlsOptions) -> Result<Arc<TlsClient>, TlsError>
//! TlsClient::config(&self) -> Arc<rustls::ClientConfig>
//! TlsClient::config_source(self: &Arc<Self>) -> Arc<dyn Fn() -> Arc<rustls::ClientConfig> + Send + Sync>
//! TlsClient::connect(&self, stream, host: &str) -> Result<client::TlsStream<S>, HandshakeError>
//! ```

mod auto;
mod cipher;
mod client;
mod error;
mod files;
mod names;
mod options;
mod provider;
mod server;
mod sniff;
#[cfg(test)]
mod tests;
mod verify;

pub use client::TlsClient;
pub use error::{HandshakeError, TlsError, describe};
pub use names::{CertificateNames, peer_common_name, peer_names};
pub use options::{Endpoint, TlsOptions, TlsVersion};
pub use server::{TlsServer, VerifyHook};
pub use sniff::{Accepted, Prefixed};
