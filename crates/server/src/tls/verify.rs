//! Who may connect: verifiers for the certificates of the other side.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::error::TlsError;
use super::files::{self, Serials, Validity};
use super::names::CertificateNames;
use super::options::TlsOptions;

/// What a certificate must meet besides its chain.
///
/// It is checked within the handshake, so that the other side gets an alert that tells why.
struct Rules {
    allowed_cn: Vec<String>,
    allowed_hostname: Vec<String>,
    revoked: Serials,
    /// The trusted certificates themselves. Go takes one of them as a client's or server's own, as set-ups with a
    /// single self-signed certificate need it; webpki would not, for being an authority or for having no issuer.
    trusted: Vec<CertificateDer<'static>>,
}

impl Rules {
    fn new(options: &TlsOptions, trusted: Vec<CertificateDer<'static>>) -> Result<Rules, TlsError> {
        Ok(Rules {
            allowed_cn: options.allowed_cn.clone(),
            allowed_hostname: options.allowed_hostname.clone(),
            revoked: match &options.crl_file {
                Some(path) => files::revoked(path)?,
                None => Serials::new(),
            },
            trusted,
        })
    }

    fn is_trusted(&self, certificate: &CertificateDer<'_>) -> bool {
        self.trusted
            .iter()
            .any(|trusted| trusted.as_ref() == certificate.as_ref())
    }

    fn check_names(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        if self.allowed_cn.is_empty() && self.allowed_hostname.is_empty() {
            return Ok(());
        }
        let names = CertificateNames::of(certificate).ok_or(CertificateError::BadEncoding)?;
        let allowed = match self.allowed_cn.is_empty() {
            false => self.allowed_cn.contains(&names.common_name),
            true => self.allowed_hostname.iter().any(|host| names.verify_host(host).is_ok()),
        };
        if allowed {
            return Ok(());
        }
        tracing::info!(
            common_name = names.common_name,
            dns_names = ?names.dns_names,
            ip_addresses = ?names.ip_addresses,
            allowed_common_names = ?self.allowed_cn,
            allowed_hostnames = ?self.allowed_hostname,
            "a certificate carries no allowed name"
        );
        // Of what gives the alert "bad certificate", as Go sends it, the one that webpki itself does not use.
        Err(CertificateError::NotValidForName.into())
    }

    /// All certificates that the other side sent are looked for, as in etcd.
    fn check_revoked(&self, leaf: &CertificateDer<'_>, chain: &[CertificateDer<'_>]) -> Result<(), Error> {
        if self.revoked.is_empty() {
            return Ok(());
        }
        for certificate in std::iter::once(leaf).chain(chain) {
            let serial = files::serial(certificate).ok_or(CertificateError::BadEncoding)?;
            if self.revoked.contains(&serial) {
                let serial: String = serial.iter().map(|byte| format!("{byte:02x}")).collect();
                tracing::info!(serial, "a certificate is in the revocation list");
                return Err(CertificateError::Revoked.into());
            }
        }
        Ok(())
    }
}

/// Whether a certificate that is trusted by itself may be used now and for this purpose.
fn check_trusted(certificate: &CertificateDer<'_>, now: UnixTime, purpose: Purpose) -> Result<(), Error> {
    let validity = Validity::of(certificate).ok_or(CertificateError::BadEncoding)?;
    if !validity.holds(i64::try_from(now.as_secs()).unwrap_or(i64::MAX)) {
        return Err(CertificateError::Expired.into());
    }
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let usage = parsed.extended_key_usage().map_err(|_| CertificateError::BadEncoding)?;
    let fits = usage.is_none_or(|usage| {
        usage.value.any
            || match purpose {
                Purpose::Client => usage.value.client_auth,
                Purpose::Server => usage.value.server_auth,
            }
    });
    match fits {
        true => Ok(()),
        false => Err(CertificateError::InvalidPurpose.into()),
    }
}

#[derive(Clone, Copy)]
enum Purpose {
    Client,
    Server,
}

/// Verifies the certificates of clients, which must have one.
pub(super) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    rules: Rules,
}

impl ClientVerifier {
    /// # Errors
    /// The CA bundle or the revocation list cannot be read, or there is nothing at all to verify against.
    pub(super) fn new(options: &TlsOptions, provider: &Arc<CryptoProvider>) -> Result<ClientVerifier, TlsError> {
        let (roots, trusted) = roots(options)?;
        let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|error| {
                TlsError::Setup(format!(
                    "clients' certificates cannot be verified: {error}: set {}",
                    options.endpoint.flag("trusted-ca-file")
                ))
            })?;
        Ok(ClientVerifier {
            chain,
            rules: Rules::new(options, trusted)?,
        })
    }
}

fn roots(options: &TlsOptions) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), TlsError> {
    match &options.trusted_ca_file {
        Some(path) => files::roots(path),
        None => Ok((files::system_roots(), Vec::new())),
    }
}

impl fmt::Debug for ClientVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientVerifier").finish_non_exhaustive()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if self.rules.is_trusted(leaf) {
            check_trusted(leaf, now, Purpose::Client)?;
        } else {
            self.chain.verify_client_cert(leaf, chain, now)?;
        }
        self.rules.check_names(leaf)?;
        self.rules.check_revoked(leaf, chain)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Verifies the certificates of servers that this member connects to.
pub(super) struct ServerVerifier {
    /// `None` takes any certificate, as etcd does with certificates that the members made themselves.
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
    rules: Rules,
}

impl ServerVerifier {
    /// # Errors
    /// The CA bundle or the revocation list cannot be read, or there is nothing at all to verify against.
    pub(super) fn new(
        options: &TlsOptions,
        insecure: bool,
        provider: &Arc<CryptoProvider>,
    ) -> Result<ServerVerifier, TlsError> {
        let (chain, trusted) = if insecure {
            (None, Vec::new())
        } else {
            let (roots, trusted) = roots(options)?;
            let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .map_err(|error| {
                    TlsError::Setup(format!(
                        "servers' certificates cannot be verified: {error}: set {}",
                        options.endpoint.flag("trusted-ca-file")
                    ))
                })?;
            (Some(chain), trusted)
        };
        Ok(ServerVerifier {
            chain,
            provider: provider.clone(),
            rules: Rules::new(options, trusted)?,
        })
    }
}

impl fmt::Debug for ServerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerVerifier").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(verifier) = &self.chain {
            if self.rules.is_trusted(leaf) {
                check_trusted(leaf, now, Purpose::Server)?;
                let names = CertificateNames::of(leaf).ok_or(CertificateError::BadEncoding)?;
                if names.verify_host(&server_name.to_str()).is_err() {
                    let addresses = names.ip_addresses.iter().map(|address| address.to_string());
                    return Err(CertificateError::NotValidForNameContext {
                        expected: server_name.to_owned(),
                        presented: names.dns_names.iter().cloned().chain(addresses).collect(),
                    }
                    .into());
                }
            } else {
                verifier.verify_server_cert(leaf, chain, server_name, ocsp_response, now)?;
            }
        }
        self.rules.check_names(leaf)?;
        self.rules.check_revoked(leaf, chain)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
