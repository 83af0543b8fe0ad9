//! What the flags say about TLS, and which combinations make sense.

use std::fmt;
use std::path::{Path, PathBuf};

use super::cipher;
use super::error::TlsError;

/// Which of the two sockets this is about: it decides the flags that messages name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// Where clients connect: `--cert-file` and so on.
    Client,
    /// Where the other members connect: `--peer-cert-file` and so on.
    Peer,
}

impl Endpoint {
    /// The word that etcd's log lines and directories use.
    pub fn as_str(self) -> &'static str {
        match self {
            Endpoint::Client => "client",
            Endpoint::Peer => "peer",
        }
    }

    /// A flag of this endpoint: `cert-file` is `--cert-file` or `--peer-cert-file`.
    pub(super) fn flag(self, name: &str) -> String {
        match (self, name) {
            // The one flag whose name for clients begins with "client".
            (Endpoint::Client, "crl-file") => "--client-crl-file".to_owned(),
            (Endpoint::Client, "cert-allowed-hostname") => "--client-cert-allowed-hostname".to_owned(),
            (Endpoint::Client, name) => format!("--{name}"),
            (Endpoint::Peer, name) => format!("--peer-{name}"),
        }
    }
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// TLS 1.2.
    Tls12,
    /// TLS 1.3.
    Tls13,
}

impl TlsVersion {
    /// Reads `--tls-min-version` or `--tls-max-version`; empty is `None`.
    ///
    /// # Errors
    /// [`TlsError::Options`] for everything but the empty text, `TLS1.2` and `TLS1.3`.
    pub fn parse(text: &str) -> Result<Option<TlsVersion>, TlsError> {
        match text {
            "" => Ok(None),
            "TLS1.2" => Ok(Some(TlsVersion::Tls12)),
            "TLS1.3" => Ok(Some(TlsVersion::Tls13)),
            _ => Err(TlsError::Options(format!(
                "unexpected TLS version {text:?} (must be one of: TLS1.2, TLS1.3)"
            ))),
        }
    }
}

impl fmt::Display for TlsVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TlsVersion::Tls12 => "TLS1.2",
            TlsVersion::Tls13 => "TLS1.3",
        })
    }
}

/// What the flags say about one endpoint. Paths are as the user gave them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsOptions {
    /// Which endpoint.
    pub endpoint: Endpoint,
    /// The certificate that the server shows, with its chain; shown as a client too unless `client_cert_file` is set.
    pub cert_file: Option<PathBuf>,
    /// The key of `cert_file`.
    pub key_file: Option<PathBuf>,
    /// The certificate that this member shows when it is the client.
    pub client_cert_file: Option<PathBuf>,
    /// The key of `client_cert_file`.
    pub client_key_file: Option<PathBuf>,
    /// The authorities that certificates of the other side are verified against. Set, it makes client certificates
    /// mandatory, whatever `client_cert_auth` says. Unset, the system's authorities take its place.
    pub trusted_ca_file: Option<PathBuf>,
    /// Whether a client must show a certificate.
    pub client_cert_auth: bool,
    /// Revoked certificates, DER or PEM.
    pub crl_file: Option<PathBuf>,
    /// Common names that a certificate of the other side may carry; empty for all. As in etcd this goes for the
    /// servers that this member connects to as well.
    pub allowed_cn: Vec<String>,
    /// Host names or addresses of which a certificate of the other side must carry one; empty for all.
    pub allowed_hostname: Vec<String>,
    /// Use a certificate made here, if none is given.
    pub auto_tls: bool,
    /// The names and addresses that it is made for: the hosts of the listen URLs, without ports.
    pub auto_tls_hosts: Vec<String>,
    /// How long it is valid.
    pub self_signed_validity_years: u32,
    /// The certificate is the one of `auto_tls`, which nobody can verify: as a client, take any certificate of the
    /// other members, as etcd does. Set by [`TlsOptions::with_auto_tls`].
    pub self_signed: bool,
    /// Cipher suites of TLS 1.2 by Go's names, the preferred one first; empty for all. TLS 1.3 has its own, always.
    pub cipher_suites: Vec<String>,
    /// The lowest version.
    pub min_version: TlsVersion,
    /// The highest version, if not the highest there is.
    pub max_version: Option<TlsVersion>,
    /// Do not compare the names in a client's certificate with the address it connects from.
    pub skip_client_san_verification: bool,
    /// As a client, take any certificate of a server.
    pub insecure_skip_verify: bool,
    /// What is negotiated by ALPN, the preferred one first; empty for no negotiation.
    pub alpn_protocols: Vec<Vec<u8>>,
}

impl TlsOptions {
    /// The client endpoint with the defaults of its flags.
    pub fn for_clients() -> TlsOptions {
        TlsOptions {
            // etcd compares names with addresses on its peer listeners only.
            skip_client_san_verification: true,
            alpn_protocols: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            ..TlsOptions::new(Endpoint::Client)
        }
    }

    /// The peer endpoint with the defaults of its flags.
    pub fn for_peers() -> TlsOptions {
        TlsOptions::new(Endpoint::Peer)
    }

    fn new(endpoint: Endpoint) -> TlsOptions {
        TlsOptions {
            endpoint,
            cert_file: None,
            key_file: None,
            client_cert_file: None,
            client_key_file: None,
            trusted_ca_file: None,
            client_cert_auth: false,
            crl_file: None,
            allowed_cn: Vec::new(),
            allowed_hostname: Vec::new(),
            auto_tls: false,
            auto_tls_hosts: Vec::new(),
            self_signed_validity_years: 1,
            self_signed: false,
            cipher_suites: Vec::new(),
            min_version: TlsVersion::Tls12,
            max_version: None,
            skip_client_san_verification: false,
            insecure_skip_verify: false,
            alpn_protocols: Vec::new(),
        }
    }

    /// Whether there is neither a certificate nor a key, so that nothing can be served (yet, with `auto_tls`).
    pub fn is_empty(&self) -> bool {
        self.cert_file.is_none() && self.key_file.is_none()
    }

    /// Whether a client must show a certificate.
    pub fn demands_client_certificate(&self) -> bool {
        self.client_cert_auth || self.trusted_ca_file.is_some()
    }

    /// Checks the combination; reads no file.
    ///
    /// # Errors
    /// [`TlsError::Options`] with etcd's message (from its `TLSInfo` and its configuration's `Validate`) and what to
    /// do. What etcd would ignore without a word although it leaves the endpoint open is an error here as well.
    pub fn validate(&self) -> Result<(), TlsError> {
        let flag = |name: &str| self.endpoint.flag(name);
        let refuse = |message: String| Err(TlsError::Options(message));
        if self.cert_file.is_some() != self.key_file.is_some() {
            return refuse(format!(
                "KeyFile and CertFile must both be present[key: {}, cert: {}]: set both {} and {}",
                shown(&self.key_file),
                shown(&self.cert_file),
                flag("cert-file"),
                flag("key-file"),
            ));
        }
        if self.client_cert_file.is_some() != self.client_key_file.is_some() {
            return refuse(format!(
                "ClientKeyFile and ClientCertFile must both be present or both absent: key: {}, cert: {}]: set both {} \
                 and {}, or neither",
                shown(&self.client_key_file),
                shown(&self.client_cert_file),
                flag("client-cert-file"),
                flag("client-key-file"),
            ));
        }
        if !self.allowed_cn.is_empty() && !self.allowed_hostname.is_empty() {
            return refuse(format!(
                "AllowedCNs and AllowedHostnames are mutually exclusive (cns={:?}, hostnames={:?})",
                self.allowed_cn, self.allowed_hostname
            ));
        }
        if let Some(max_version) = self.max_version
            && self.min_version > max_version
        {
            return refuse(format!(
                "min version ({}) is greater than max version ({max_version})",
                self.min_version
            ));
        }
        if self.min_version == TlsVersion::Tls13 && !self.cipher_suites.is_empty() {
            return refuse("cipher suites cannot be configured when only TLS1.3 is enabled".to_owned());
        }
        cipher::suites(&self.cipher_suites)?;
        if !self.auto_tls || !self.is_empty() {
            return Ok(());
        }
        if self.self_signed_validity_years == 0 {
            return refuse(
                "selfSignedCertValidity is invalid,it should be greater than 0: set --self-signed-cert-validity"
                    .to_owned(),
            );
        }
        if self.endpoint == Endpoint::Peer && self.restricts_clients() {
            return refuse(format!(
                "{} makes certificates that no authority signed, so no member could meet {}, {}, {} or {}: give every \
                 member a certificate ({}), or leave those flags out",
                flag("auto-tls"),
                flag("client-cert-auth"),
                flag("trusted-ca-file"),
                flag("cert-allowed-cn"),
                flag("cert-allowed-hostname"),
                flag("cert-file"),
            ));
        }
        Ok(())
    }

    fn restricts_clients(&self) -> bool {
        self.demands_client_certificate() || !self.allowed_cn.is_empty() || !self.allowed_hostname.is_empty()
    }
}

/// As etcd logs it.
impl fmt::Display for TlsOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cert = {}, key = {}, client-cert={}, client-key={}, trusted-ca = {}, client-cert-auth = {}, crl-file = {}",
            shown(&self.cert_file),
            shown(&self.key_file),
            shown(&self.client_cert_file),
            shown(&self.client_key_file),
            shown(&self.trusted_ca_file),
            self.client_cert_auth,
            shown(&self.crl_file)
        )
    }
}

fn shown(path: &Option<PathBuf>) -> String {
    path.as_deref()
        .map(Path::display)
        .map(|path| path.to_string())
        .unwrap_or_default()
}
