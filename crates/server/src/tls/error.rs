//! Why TLS cannot be set up, and why a handshake failed, in words that operators of etcd know.

use std::borrow::Cow;
use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, InvalidMessage, PeerIncompatible};

/// Why TLS cannot be set up as it is configured.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsError {
    /// Flags that do not go together; the message says what to change.
    #[error("{0}")]
    Options(String),
    /// A file that cannot be read or written.
    #[error("cannot {action} {}: {cause}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        cause: String,
    },
    /// A file that does not hold what it should.
    #[error("{}: {cause}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        cause: String,
    },
    /// The TLS library refuses the whole.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

impl TlsError {
    pub(super) fn content(path: impl Into<PathBuf>, cause: impl Into<String>) -> TlsError {
        TlsError::Content {
            path: path.into(),
            cause: cause.into(),
        }
    }

    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>, cause: &io::Error) -> TlsError {
        TlsError::File {
            action,
            path: path.into(),
            cause: cause.to_string(),
        }
    }

    pub(super) fn setup(cause: rustls::Error) -> TlsError {
        TlsError::Setup(cause.to_string())
    }
}

/// Why a connection did not come about.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct HandshakeError {
    /// What happened, in Go's words where Go has some.
    pub message: String,
    /// The other side went away before the handshake had ended, as port checks do; not worth a warning.
    pub is_eof: bool,
    /// The host name that the client asked for; empty if it named none.
    pub server_name: String,
    /// The addresses in the client's certificate, if there is one and it was verified.
    pub ip_addresses: Vec<String>,
    /// The host names in it.
    pub dns_names: Vec<String>,
}

impl HandshakeError {
    pub(super) fn new(message: impl Into<String>) -> HandshakeError {
        HandshakeError {
            message: message.into(),
            is_eof: false,
            server_name: String::new(),
            ip_addresses: Vec::new(),
            dns_names: Vec::new(),
        }
    }

    pub(super) fn timed_out(limit: Duration) -> HandshakeError {
        HandshakeError::new(format!(
            "tls: handshake took more than {}s: i/o timeout",
            limit.as_secs()
        ))
    }
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> HandshakeError {
        HandshakeError {
            is_eof: matches!(error.kind(), io::ErrorKind::UnexpectedEof),
            ..HandshakeError::new(describe(&error))
        }
    }
}

impl From<HandshakeError> for io::Error {
    fn from(error: HandshakeError) -> io::Error {
        let kind = match error.is_eof {
            true => io::ErrorKind::UnexpectedEof,
            false => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, error)
    }
}

/// An error on a TLS connection in Go's words, which etcd's users search for and its tests expect: a rustls error
/// anywhere in the chain of causes, or else the error as it is.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let mut cause = Some(error);
    while let Some(current) = cause {
        if let Some(error) = current.downcast_ref::<rustls::Error>() {
            return in_go_words(error).into_owned();
        }
        let io_error = current.downcast_ref::<io::Error>();
        // An I/O error passes over what it wraps when asked for its source.
        let wrapped = io_error.and_then(io::Error::get_ref);
        cause = wrapped.map(|inner| inner as _).or_else(|| current.source());
    }
    match error.downcast_ref::<io::Error>() {
        Some(error) if error.kind() == io::ErrorKind::UnexpectedEof => "EOF".to_owned(),
        _ => error.to_string(),
    }
}

fn in_go_words(error: &rustls::Error) -> Cow<'static, str> {
    use rustls::Error as E;
    match error {
        E::AlertReceived(alert) => alert_in_go_words(*alert),
        E::NoCertificatesPresented => "tls: client didn't provide a certificate".into(),
        E::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion) => {
            "tls: first record does not look like a TLS handshake".into()
        }
        E::PeerIncompatible(
            PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
        ) => "tls: client and server have no version of TLS in common (see --tls-min-version)".into(),
        E::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon) => {
            "tls: no cipher suite supported by both client and server".into()
        }
        E::NoApplicationProtocol => "tls: client requested unsupported application protocols".into(),
        E::InvalidCertificate(error) => certificate_in_go_words(error),
        _ => format!("tls: {error}").into(),
    }
}

fn alert_in_go_words(alert: AlertDescription) -> Cow<'static, str> {
    let text = match alert {
        AlertDescription::HandshakeFailure => "handshake failure",
        AlertDescription::BadCertificate => "bad certificate",
        AlertDescription::UnsupportedCertificate => "unsupported certificate",
        AlertDescription::CertificateRevoked => "revoked certificate",
        AlertDescription::CertificateExpired => "expired certificate",
        AlertDescription::CertificateUnknown => "unknown certificate",
        AlertDescription::UnknownCA => "unknown certificate authority",
        AlertDescription::AccessDenied => "access denied",
        AlertDescription::DecryptError => "error decrypting message",
        AlertDescription::ProtocolVersion => "protocol version not supported",
        AlertDescription::InternalError => "internal error",
        AlertDescription::UserCanceled => "user canceled",
        AlertDescription::CertificateRequired => "certificate required",
        AlertDescription::NoApplicationProtocol => "no application protocol",
        other => return format!("remote error: tls: {other:?}").into(),
    };
    format!("remote error: tls: {text}").into()
}

fn certificate_in_go_words(error: &CertificateError) -> Cow<'static, str> {
    match error {
        // Our own verifiers say this, and nothing else does: webpki tells the names too.
        CertificateError::NotValidForName => "client certificate authentication failed".into(),
        CertificateError::NotValidForNameContext { expected, presented } => format!(
            "tls: failed to verify certificate: {}",
            wrong_name(&expected.to_str(), presented)
        )
        .into(),
        CertificateError::Revoked => "transport: certificate serial revoked".into(),
        CertificateError::UnknownIssuer => {
            "tls: failed to verify certificate: x509: certificate signed by unknown authority".into()
        }
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => {
            format!("tls: failed to verify certificate: x509: certificate has expired or is not yet valid: {error}")
                .into()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            format!("tls: failed to verify certificate: x509: certificate specifies an incompatible key usage: {error}")
                .into()
        }
        other => format!("tls: failed to verify certificate: x509: {other}").into(),
    }
}

/// Go's message about a certificate for other names. `presented` is as webpki prints names (`DnsName("a")`,
/// `IpAddress(127.0.0.1)`), or plain.
pub(super) fn wrong_name(expected: &str, presented: &[String]) -> String {
    let plain: Vec<&str> = presented.iter().map(|name| plain_name(name)).collect();
    if plain.is_empty() {
        return format!("x509: certificate is not valid for any names, but wanted to match {expected}");
    }
    format!("x509: certificate is valid for {}, not {expected}", plain.join(", "))
}

fn plain_name(name: &str) -> &str {
    let inner = name
        .split_once('(')
        .and_then(|(_, rest)| rest.strip_suffix(')'))
        .unwrap_or(name);
    inner.trim_matches('"')
}
