//! Reads certificates, keys and revocation lists, and notices when the files change.

use std::collections::HashSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject as _, SectionKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{CertificateRevocationList, FromDer as _, X509Certificate};

use super::error::TlsError;

/// The largest file that is read. A revocation list of a million certificates is some 40 MiB.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Serial numbers as they are in certificates, in big endian without leading zeros.
pub(super) type Serials = HashSet<Vec<u8>>;

/// A certificate with its chain and its key.
///
/// # Errors
/// A file cannot be read, holds something else or nothing, the key is encrypted, or it belongs to another certificate.
pub(super) fn identity(certificate: &Path, key: &Path, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let chain = certificates(certificate)?;
    let leaf = &chain[0];
    X509Certificate::from_der(leaf)
        .map_err(|error| TlsError::content(certificate, format!("the first certificate cannot be parsed: {error}")))?;
    let leaf = leaf.clone();
    let key_der = private_key(key)?;
    let pair = CertifiedKey::from_der(chain, key_der, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => TlsError::content(
            key,
            format!(
                "tls: private key does not match public key: this key is not the one of {}",
                certificate.display()
            ),
        ),
        other => TlsError::content(
            key,
            format!(
                "the key cannot be used: {other}; RSA (2048 to 8192 bits), ECDSA (P-256, P-384, P-521) and Ed25519 can"
            ),
        ),
    })?;
    warn_if_not_valid_now(certificate, &leaf);
    Ok(pair)
}

/// etcd serves a certificate that is out of date as well; it is the other side that refuses it. So say why.
fn warn_if_not_valid_now(path: &Path, certificate: &CertificateDer<'_>) {
    if let Some(validity) = Validity::of(certificate)
        && !validity.holds(now_s())
    {
        tracing::warn!(
            path = %path.display(),
            not_before = %validity.not_before,
            not_after = %validity.not_after,
            "the certificate has expired or is not valid yet; clients will refuse it: renew it"
        );
    }
}

/// From when to when a certificate is valid.
pub(super) struct Validity {
    not_before: x509_parser::time::ASN1Time,
    not_after: x509_parser::time::ASN1Time,
}

impl Validity {
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Validity> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let validity = parsed.validity();
        Some(Validity {
            not_before: validity.not_before,
            not_after: validity.not_after,
        })
    }

    /// Whether it is valid at a time in seconds since 1970.
    pub(super) fn holds(&self, at_s: i64) -> bool {
        (self.not_before.timestamp()..=self.not_after.timestamp()).contains(&at_s)
    }
}

/// The time in seconds since 1970.
pub(super) fn now_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// All certificates of a file, at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let mut found = Vec::new();
    let mut other = None;
    for (kind, der) in sections(path, &read(path)?)? {
        match kind {
            SectionKind::Certificate => found.push(CertificateDer::from(der)),
            kind => other = Some(kind),
        }
    }
    match (found.is_empty(), other) {
        (false, _) => Ok(found),
        (true, Some(kind)) => Err(TlsError::content(
            path,
            format!("holds {kind:?} and no certificate; were certificate and key exchanged?"),
        )),
        (true, None) => Err(TlsError::content(
            path,
            "holds no certificate: expected PEM, which begins with -----BEGIN CERTIFICATE-----",
        )),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = read(path)?;
    let text = String::from_utf8_lossy(&bytes);
    // The second is OpenSSL's older form, whose headers are no PEM to the parser.
    if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") || text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(TlsError::content(
            path,
            "the key is encrypted, and nobody could type its password here: store it without one (openssl pkey)",
        ));
    }
    let mut certificates = false;
    for (kind, der) in sections(path, &bytes)? {
        match kind {
            SectionKind::PrivateKey => return Ok(PrivatePkcs8KeyDer::from(der).into()),
            SectionKind::RsaPrivateKey => return Ok(PrivatePkcs1KeyDer::from(der).into()),
            SectionKind::EcPrivateKey => return Ok(PrivateSec1KeyDer::from(der).into()),
            SectionKind::Certificate => certificates = true,
            _ => {}
        }
    }
    let cause = match certificates {
        true => "holds certificates and no private key; were certificate and key exchanged?",
        false => "holds no private key: expected PEM, which begins with -----BEGIN PRIVATE KEY----- or alike",
    };
    Err(TlsError::content(path, cause))
}

/// The certificates of a CA bundle, which are trusted from now on.
pub(super) fn roots(path: &Path) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), TlsError> {
    let trusted = certificates(path)?;
    let mut store = RootCertStore::empty();
    for (index, certificate) in trusted.iter().enumerate() {
        store.add(certificate.clone()).map_err(|error| {
            TlsError::content(path, format!("certificate {} cannot be trusted: {error}", index + 1))
        })?;
    }
    Ok((store, trusted))
}

/// What the system trusts, which takes the place of a CA bundle that is not given, as in Go.
pub(super) fn system_roots() -> RootCertStore {
    let mut store = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "some of the system's trusted certificates cannot be read");
    }
    let (_, ignored) = store.add_parsable_certificates(found.certs);
    if ignored > 0 {
        tracing::debug!(ignored, "some of the system's trusted certificates cannot be parsed");
    }
    store
}

/// The serial numbers in a revocation list, DER as in etcd, or PEM. As in etcd its signature is not verified, nor who
/// issued it or when the next one was due: the operator put the file here.
pub(super) fn revoked(path: &Path) -> Result<Serials, TlsError> {
    let bytes = read(path)?;
    let mut lists = Vec::new();
    if bytes.trim_ascii_start().starts_with(b"-----") {
        let sections = sections(path, &bytes)?.into_iter();
        lists.extend(
            sections
                .filter(|(kind, _)| *kind == SectionKind::Crl)
                .map(|(_, der)| der),
        );
    } else {
        lists.push(bytes);
    }
    if lists.is_empty() {
        return Err(TlsError::content(path, "holds no revocation list"));
    }
    let mut serials = Serials::new();
    for list in &lists {
        let (_, list) = CertificateRevocationList::from_der(list)
            .map_err(|error| TlsError::content(path, format!("is not a revocation list in DER or PEM: {error}")))?;
        let entries = list.iter_revoked_certificates();
        serials.extend(entries.map(|entry| without_leading_zeros(entry.raw_serial()).to_vec()));
    }
    Ok(serials)
}

/// The serial number of a certificate, to be looked for among the revoked ones.
pub(super) fn serial(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(without_leading_zeros(certificate.raw_serial()).to_vec())
}

fn without_leading_zeros(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
    &bytes[zeros..]
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |error| TlsError::file("read", path, &error);
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > FILE_BYTES_MAX {
        return Err(TlsError::content(
            path,
            format!("is larger than {FILE_BYTES_MAX} bytes; is it the right file?"),
        ));
    }
    std::fs::read(path).map_err(failed)
}

fn sections(path: &Path, bytes: &[u8]) -> Result<Vec<(SectionKind, Vec<u8>)>, TlsError> {
    let found: Result<Vec<_>, pem::Error> = <(SectionKind, Vec<u8>)>::pem_slice_iter(bytes).collect();
    found.map_err(|error| TlsError::content(path, format!("is not valid PEM: {error}")))
}

/// How a file looked when it was read; `None` if there was none. A new file in the place of the old one has another
/// inode, one written over another time of change even if its time of modification was set back.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp(Option<[i64; 7]>);

impl Stamp {
    fn of(path: &Path) -> Stamp {
        let fields = |found: Metadata| {
            [
                found.dev() as i64,
                found.ino() as i64,
                found.size() as i64,
                found.mtime(),
                found.mtime_nsec(),
                found.ctime(),
                found.ctime_nsec(),
            ]
        };
        Stamp(std::fs::metadata(path).ok().map(fields))
    }
}

/// Something made from files, which is made anew when one of them changed.
pub(super) struct Reloading<T> {
    files: Vec<PathBuf>,
    make: Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>,
    state: Mutex<State<T>>,
}

struct State<T> {
    current: Arc<T>,
    /// How the files looked that `current` was made from.
    stamps: Vec<Stamp>,
    /// How they looked when nothing could be made from them, so that this is tried and logged once.
    failed: Option<Vec<Stamp>>,
}

impl<T> Reloading<T> {
    /// # Errors
    /// Those of `make`.
    pub(super) fn new(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Reloading<T>, TlsError> {
        // Stamps come before contents: a file that changes in between is read again.
        let stamps = files.iter().map(|path| Stamp::of(path)).collect();
        let current = Arc::new(make()?);
        Ok(Reloading {
            files,
            make: Box::new(make),
            state: Mutex::new(State {
                current,
                stamps,
                failed: None,
            }),
        })
    }

    /// The newest that could be made. Costs one `stat` a file; the lock is held while changed files are read, so that
    /// this is done once however many handshakes come.
    pub(super) fn current(&self) -> Arc<T> {
        let stamps: Vec<Stamp> = self.files.iter().map(|path| Stamp::of(path)).collect();
        let mut state = self.state.lock();
        if stamps == state.stamps || state.failed.as_ref() == Some(&stamps) {
            return state.current.clone();
        }
        match (self.make)() {
            Ok(made) => {
                tracing::info!(files = ?self.files, "TLS files changed and were read again");
                state.current = Arc::new(made);
                state.stamps = stamps;
                state.failed = None;
            }
            // Half of a renewal looks like this too: the certificate is new and the key is not yet.
            Err(error) => {
                tracing::warn!(%error, "TLS files changed and cannot be used; the ones read before stay in use");
                state.failed = Some(stamps);
            }
        }
        state.current.clone()
    }
}
