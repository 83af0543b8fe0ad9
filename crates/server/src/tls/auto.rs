//! The certificate of `--auto-tls`: made here, signed by itself, kept in the data directory.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::SystemTime;

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use time::{Duration, OffsetDateTime};

use super::error::TlsError;
use super::files::{self, Validity};
use super::options::TlsOptions;
use super::provider;

/// A year as etcd counts it for its certificates, in days.
const YEAR_DAYS: i64 = 365;
/// Longer than this no date fits any more.
const YEARS_MAX: u32 = 1000;

impl TlsOptions {
    /// Fills in the certificate of `--auto-tls`, from `<data_dir>/fixtures/client` or `peer`. What is there is used as
    /// long as it is valid; otherwise one is made for `auto_tls_hosts`. Changes nothing without `auto_tls`, or if a
    /// certificate is given, which is logged as etcd does.
    ///
    /// Call it once the data directory is ours: one that holds a directory `fixtures` and no identity looks foreign.
    ///
    /// # Errors
    /// The options do not go together, or the files cannot be written.
    pub fn with_auto_tls(mut self, data_dir: &Path) -> Result<TlsOptions, TlsError> {
        if !self.auto_tls {
            return Ok(self);
        }
        if !self.is_empty() {
            tracing::warn!("ignoring {} auto TLS since certs given", self.endpoint.as_str());
            return Ok(self);
        }
        self.validate()?;
        let dir = data_dir.join("fixtures").join(self.endpoint.as_str());
        let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        if !can_be_used(&self, &certificate, &key)? {
            make(&self, &dir, &certificate, &key)?;
        }
        self.cert_file = Some(certificate.clone());
        self.key_file = Some(key.clone());
        self.client_cert_file = Some(certificate);
        self.client_key_file = Some(key);
        self.self_signed = true;
        Ok(self)
    }
}

fn can_be_used(options: &TlsOptions, certificate: &Path, key: &Path) -> Result<bool, TlsError> {
    if !certificate.exists() || !key.exists() {
        return Ok(false);
    }
    let valid = files::certificates(certificate)
        .ok()
        .and_then(|chain| Validity::of(&chain[0]))
        .is_some_and(|validity| validity.holds(files::now_s()));
    if !valid {
        tracing::warn!(path = %certificate.display(), "the generated certificate is no longer valid; making a new one");
        return Ok(false);
    }
    match files::identity(certificate, key, &*provider::provider(options)?) {
        Ok(_) => Ok(true),
        Err(error) => {
            tracing::warn!(%error, "the generated certificate cannot be used; making a new one");
            Ok(false)
        }
    }
}

fn make(options: &TlsOptions, dir: &Path, certificate: &Path, key: &Path) -> Result<(), TlsError> {
    let not_before = OffsetDateTime::from(SystemTime::now());
    let years = options.self_signed_validity_years.min(YEARS_MAX);
    let not_after = not_before + Duration::days(i64::from(years) * YEAR_DAYS);
    tracing::warn!(
        not_after = %not_after,
        "automatically generate certificates; they encrypt, but nobody can verify them"
    );
    let failed = |error: rcgen::Error| TlsError::Setup(format!("a certificate cannot be generated: {error}"));
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "metastore");
    (params.not_before, params.not_after) = (not_before, not_after);
    params.subject_alt_names = alternative_names(&options.auto_tls_hosts)?;
    // No authority, unlike etcd's: so that every TLS library takes it when it is put into a client's CA bundle.
    params.is_ca = IsCa::ExplicitNoCa;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let made = params.self_signed(&pair).map_err(failed)?;

    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| TlsError::file("create", dir, &error))?;
    // The key first: a certificate without its key is made again at the next start, as is a pair that does not match.
    write(key, pair.serialize_pem().as_bytes(), 0o600)?;
    tracing::info!(path = %key.display(), "created key file");
    write(certificate, made.pem().as_bytes(), 0o644)?;
    tracing::info!(path = %certificate.display(), "created cert file");
    Ok(())
}

fn alternative_names(hosts: &[String]) -> Result<Vec<SanType>, TlsError> {
    let mut names = Vec::new();
    for host in hosts {
        let name = match host.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) if host.is_empty() => continue,
            Err(_) => SanType::DnsName(host.as_str().try_into().map_err(|error| {
                TlsError::Options(format!(
                    "no certificate can be generated for the host {host:?}: {error}"
                ))
            })?),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Writes a file so that it is there whole or not at all, and never readable for more than `mode` says.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), TlsError> {
    let new = path.with_extension("pem.new");
    let write = || -> io::Result<()> {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        match path.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(|error| TlsError::file("write", path, &error))
}
