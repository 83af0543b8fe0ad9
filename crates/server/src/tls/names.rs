//! The names in a certificate, and how etcd compares them with those it expects.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustls::CommonState;
use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::error::wrong_name;

/// How long the look-ups for one connection may take, all together: a resolver that hangs must not keep a handshake.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Most names of a certificate that are looked up. Certificates come from members, but not all of them may be sane.
const LOOKUPS_MAX: usize = 32;

/// The names in a certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CertificateNames {
    /// The subject's common name; empty if there is none, the last one if there are several, as in Go.
    pub common_name: String,
    /// The host names, wildcards among them.
    pub dns_names: Vec<String>,
    /// The addresses.
    pub ip_addresses: Vec<IpAddr>,
}

impl CertificateNames {
    /// Reads the names; `None` if this is no certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<CertificateNames> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let mut names = CertificateNames::default();
        if let Some(common_name) = certificate.subject().iter_common_name().last() {
            names.common_name = common_name.as_str().unwrap_or_default().to_owned();
        }
        let alternative = certificate.subject_alternative_name().ok().flatten();
        for name in alternative.iter().flat_map(|extension| &extension.value.general_names) {
            match name {
                GeneralName::DNSName(name) => names.dns_names.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => names.ip_addresses.extend(address(bytes)),
                _ => {}
            }
        }
        Some(names)
    }

    /// Whether the certificate is good for a host: an address must be among the addresses, a name among the names.
    /// The common name does not count (Go's `VerifyHostname`).
    ///
    /// # Errors
    /// Go's message.
    pub fn verify_host(&self, host: &str) -> Result<(), String> {
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        if let Ok(wanted) = bare.parse::<IpAddr>() {
            let wanted = wanted.to_canonical();
            if self.ip_addresses.iter().any(|address| address.to_canonical() == wanted) {
                return Ok(());
            }
            if self.ip_addresses.is_empty() {
                return Err(format!(
                    "x509: cannot validate certificate for {bare} because it doesn't contain any IP SANs"
                ));
            }
            let presented: Vec<String> = self.ip_addresses.iter().map(IpAddr::to_string).collect();
            return Err(wrong_name(bare, &presented));
        }
        match self.dns_names.iter().any(|pattern| matches_name(pattern, host)) {
            true => Ok(()),
            false => Err(wrong_name(host, &self.dns_names)),
        }
    }

    /// Whether a client with this certificate may connect from an address, by etcd's rule for its peers: a certificate
    /// without addresses and names may; else the address must be among the addresses, or belong to one of the names,
    /// by a reverse or a forward look-up.
    ///
    /// # Errors
    /// etcd's message.
    pub(super) async fn verify_remote(&self, remote: SocketAddr) -> Result<(), String> {
        // Sockets for both IPv6 and IPv4 show IPv4 clients as ::ffff:a.b.c.d.
        let remote = remote.ip().to_canonical();
        if self.ip_addresses.is_empty() && self.dns_names.is_empty() {
            return Ok(());
        }
        if !self.ip_addresses.is_empty() {
            match self.verify_host(&remote.to_string()) {
                Ok(()) => return Ok(()),
                Err(error) if self.dns_names.is_empty() => return Err(error),
                Err(_) => {}
            }
        }
        let looked_up = tokio::time::timeout(LOOKUP_TIMEOUT, self.belongs_to_name(remote)).await;
        let cause = match looked_up {
            Ok(Ok(true)) => return Ok(()),
            Ok(Ok(false)) => String::new(),
            Ok(Err(cause)) => format!(" ({cause})"),
            Err(_) => format!(" (looking them up took more than {}s)", LOOKUP_TIMEOUT.as_secs()),
        };
        Err(format!(
            "tls: \"{remote}\" does not match any of DNSNames {:?}{cause}",
            self.dns_names
        ))
    }

    async fn belongs_to_name(&self, remote: IpAddr) -> Result<bool, String> {
        let found = tokio::task::spawn_blocking(move || dns_lookup::lookup_addr(&remote)).await;
        let mut cause = None;
        match found {
            // Without a name the system answers with the address; no pattern matches that.
            Ok(Ok(name)) => {
                let name = name.strip_suffix('.').unwrap_or(&name);
                let belongs = |pattern: &String| match pattern.strip_prefix('*') {
                    Some(suffix) if suffix.starts_with('.') => name.ends_with(suffix),
                    _ => pattern == name,
                };
                if name.parse::<IpAddr>().is_err() && self.dns_names.iter().any(belongs) {
                    return Ok(true);
                }
            }
            Ok(Err(error)) => cause = Some(error.to_string()),
            Err(_) => {}
        }
        let names = self.dns_names.iter().filter(|name| !name.starts_with("*."));
        for name in names.take(LOOKUPS_MAX) {
            match tokio::net::lookup_host((name.as_str(), 0)).await {
                Ok(mut addresses) => {
                    if addresses.any(|address| address.ip().to_canonical() == remote) {
                        return Ok(true);
                    }
                }
                Err(error) => cause = Some(format!("lookup {name}: {error}")),
            }
        }
        cause.map_or(Ok(false), Err)
    }
}

/// The common name in the verified certificate of a connection's other side; `None` if there is no certificate or no
/// name in it. With `--client-cert-auth` it names the user.
pub fn peer_common_name(connection: &CommonState) -> Option<String> {
    peer_names(connection)
        .map(|names| names.common_name)
        .filter(|name| !name.is_empty())
}

/// The names in the verified certificate of a connection's other side; `None` if there is no certificate.
pub fn peer_names(connection: &CommonState) -> Option<CertificateNames> {
    CertificateNames::of(connection.peer_certificates()?.first()?)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let v6 = <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    v4.or(v6).ok()
}

/// Compares a host with a name that may begin with `*.`, which stands for exactly one label.
fn matches_name(pattern: &str, host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    if host.is_empty() || pattern.is_empty() {
        return false;
    }
    if pattern.eq_ignore_ascii_case(host) {
        return true;
    }
    match (pattern.strip_prefix("*."), host.split_once('.')) {
        (Some(rest), Some((label, parent))) => !label.is_empty() && rest.eq_ignore_ascii_case(parent),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dns: &[&str], ips: &[&str]) -> CertificateNames {
        CertificateNames {
            common_name: "cn.example".to_owned(),
            dns_names: dns.iter().map(|&name| name.to_owned()).collect(),
            ip_addresses: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn hosts_are_compared_as_go_does() {
        let both = names(&["a.example", "*.b.example"], &["127.0.0.1", "::1"]);
        for host in [
            "a.example",
            "A.Example",
            "a.example.",
            "x.b.example",
            "127.0.0.1",
            "::1",
            "[::1]",
        ] {
            assert_eq!(both.verify_host(host), Ok(()), "{host}");
        }
        for host in [
            "b.example",
            "x.y.b.example",
            "example",
            ".b.example",
            "cn.example",
            "",
            "*",
        ] {
            assert!(both.verify_host(host).is_err(), "{host}");
        }
        assert_eq!(
            both.verify_host("10.0.0.1").unwrap_err(),
            "x509: certificate is valid for 127.0.0.1, ::1, not 10.0.0.1"
        );
        assert_eq!(
            names(&["a"], &[]).verify_host("10.0.0.1").unwrap_err(),
            "x509: cannot validate certificate for 10.0.0.1 because it doesn't contain any IP SANs"
        );
        assert_eq!(
            names(&[], &["::1"]).verify_host("a").unwrap_err(),
            "x509: certificate is not valid for any names, but wanted to match a"
        );
    }

    #[tokio::test]
    async fn remote_addresses_are_compared_as_etcd_does() {
        let local: SocketAddr = "127.0.0.1:7".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:127.0.0.1]:7".parse().unwrap();
        let other: SocketAddr = "192.0.2.1:7".parse().unwrap();
        assert_eq!(names(&[], &[]).verify_remote(other).await, Ok(()));
        assert_eq!(names(&[], &["127.0.0.1"]).verify_remote(local).await, Ok(()));
        assert_eq!(names(&[], &["127.0.0.1"]).verify_remote(mapped).await, Ok(()));
        assert_eq!(names(&["localhost"], &[]).verify_remote(local).await, Ok(()));
        assert_eq!(names(&["localhost"], &["10.0.0.1"]).verify_remote(local).await, Ok(()));
        assert_eq!(
            names(&[], &["127.0.0.1"]).verify_remote(other).await.unwrap_err(),
            "x509: certificate is valid for 127.0.0.1, not 192.0.2.1"
        );
        let error = names(&["localhost"], &["127.0.0.1"])
            .verify_remote(other)
            .await
            .unwrap_err();
        assert!(
            error.starts_with("tls: \"192.0.2.1\" does not match any of DNSNames [\"localhost\"]"),
            "{error}"
        );
    }
}
