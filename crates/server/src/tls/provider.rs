//! The cryptography and the versions that an endpoint allows.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ProtocolVersion, SupportedProtocolVersion, version};

use super::cipher;
use super::error::TlsError;
use super::options::{TlsOptions, TlsVersion};

/// aws-lc-rs rather than ring: etcd's own generated certificates, and those of whoever followed its example, have
/// P-521 keys, which ring does not know.
///
/// # Errors
/// A cipher suite that is not to be had.
pub(super) fn provider(options: &TlsOptions) -> Result<Arc<CryptoProvider>, TlsError> {
    Ok(Arc::new(CryptoProvider {
        cipher_suites: cipher::suites(&options.cipher_suites)?,
        ..aws_lc_rs::default_provider()
    }))
}

/// The versions from `min_version` to `max_version` for which there is a cipher suite.
///
/// # Errors
/// None is left: only suites of TLS 1.3 were chosen, and TLS 1.3 was not.
pub(super) fn versions(
    options: &TlsOptions,
    provider: &CryptoProvider,
) -> Result<Vec<&'static SupportedProtocolVersion>, TlsError> {
    let max_version = options.max_version.unwrap_or(TlsVersion::Tls13);
    let has_suite = |version: ProtocolVersion| {
        let mut suites = provider.cipher_suites.iter();
        suites.any(|suite| suite.version().version == version)
    };
    let mut versions = Vec::new();
    if max_version >= TlsVersion::Tls13 {
        versions.push(&version::TLS13);
    }
    if options.min_version <= TlsVersion::Tls12 && has_suite(ProtocolVersion::TLSv1_2) {
        versions.push(&version::TLS12);
    }
    match versions.is_empty() {
        false => Ok(versions),
        true => Err(TlsError::Options(
            "--cipher-suites names no suite of TLS1.2, and --tls-max-version allows nothing newer".to_owned(),
        )),
    }
}
