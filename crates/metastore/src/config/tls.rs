//! TLS of the client and the peer endpoint: from flags to options, and which URLs they go with.

use std::path::PathBuf;

use server::tls::{TlsError, TlsOptions, TlsVersion};

use crate::flags::{Failure, Note, Settings, Source};
use crate::url::{Scheme, Url};

/// TLS of both endpoints. Without a certificate, plaintext is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Where clients connect.
    pub client: TlsOptions,
    /// Where the other members connect, and how this member connects to them.
    pub peer: TlsOptions,
}

impl TlsConfig {
    /// Checks the settings and the URLs that they go with, in etcd's words; reads no certificate.
    pub(super) fn from_settings(settings: &Settings, notes: &mut Vec<Note>) -> Result<TlsConfig, Failure> {
        let refused = |error: TlsError| Failure::config(error.to_string());
        let config = TlsConfig {
            client: TlsOptions {
                allowed_cn: settings.client_allowed_cn.clone(),
                crl_file: path(settings, "client-crl-file"),
                allowed_hostname: list(settings, "client-cert-allowed-hostname"),
                ..options(settings, TlsOptions::for_clients(), "", "listen-client-urls").map_err(refused)?
            },
            peer: TlsOptions {
                allowed_cn: list(settings, "peer-cert-allowed-cn"),
                crl_file: path(settings, "peer-crl-file"),
                allowed_hostname: list(settings, "peer-cert-allowed-hostname"),
                skip_client_san_verification: settings.boolean("peer-skip-client-san-verification"),
                ..options(settings, TlsOptions::for_peers(), "peer-", "listen-peer-urls").map_err(refused)?
            },
        };
        config.client.validate().map_err(refused)?;
        config.peer.validate().map_err(refused)?;
        for name in ["listen-client-urls", "listen-client-http-urls", "listen-http-urls"] {
            check_client_urls(settings.urls(name), &config.client, notes)?;
        }
        check_peer_urls(settings.urls("listen-peer-urls"), &config.peer, notes)?;
        let secure_metrics = settings
            .urls("listen-metrics-urls")
            .iter()
            .any(|url| url.scheme().is_tls());
        if secure_metrics && !can_serve(&config.client) {
            return Err(Failure::config(
                "client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url",
            ));
        }
        Ok(config)
    }
}

fn options(settings: &Settings, base: TlsOptions, prefix: &str, listen: &str) -> Result<TlsOptions, TlsError> {
    let path = |name: &str| path(settings, &format!("{prefix}{name}"));
    // A zero in the file means the default there, as in etcd; as a flag it is an error.
    let years = match (
        settings.number("self-signed-cert-validity"),
        settings.source("self-signed-cert-validity"),
    ) {
        (0, Source::File(_)) => 1,
        (years, _) => years,
    };
    let mut hosts: Vec<String> = settings.urls(listen).iter().map(|url| url.host().to_owned()).collect();
    hosts.dedup();
    Ok(TlsOptions {
        cert_file: path("cert-file"),
        key_file: path("key-file"),
        client_cert_file: path("client-cert-file"),
        client_key_file: path("client-key-file"),
        trusted_ca_file: path("trusted-ca-file"),
        client_cert_auth: settings.boolean(&format!("{prefix}client-cert-auth")),
        auto_tls: settings.boolean(&format!("{prefix}auto-tls")),
        auto_tls_hosts: hosts,
        self_signed_validity_years: u32::try_from(years).unwrap_or(u32::MAX),
        cipher_suites: list(settings, "cipher-suites"),
        min_version: TlsVersion::parse(settings.text("tls-min-version"))?.unwrap_or(TlsVersion::Tls12),
        max_version: TlsVersion::parse(settings.text("tls-max-version"))?,
        ..base
    })
}

fn path(settings: &Settings, name: &str) -> Option<PathBuf> {
    Some(settings.text(name))
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
}

fn list(settings: &Settings, name: &str) -> Vec<String> {
    settings
        .list(name)
        .iter()
        .filter(|item| !item.is_empty())
        .cloned()
        .collect()
}

fn can_serve(options: &TlsOptions) -> bool {
    options.auto_tls || !options.is_empty()
}

fn check_client_urls(urls: &[Url], options: &TlsOptions, notes: &mut Vec<Note>) -> Result<(), Failure> {
    for url in urls {
        if url.scheme().is_tls() {
            if !can_serve(options) {
                return Err(Failure::config(format!(
                    "TLS key/cert (--cert-file, --key-file) must be provided for client url {url} with HTTPS scheme"
                )));
            }
            continue;
        }
        let scheme = "scheme is http or unix while";
        if can_serve(options) {
            warn(
                notes,
                format!("{scheme} key and cert files are present; ignoring key and cert files: {url}"),
            );
        }
        if options.client_cert_auth {
            warn(
                notes,
                format!("{scheme} --client-cert-auth is enabled; ignoring client cert auth for this URL: {url}"),
            );
        }
    }
    Ok(())
}

fn check_peer_urls(urls: &[Url], options: &TlsOptions, notes: &mut Vec<Note>) -> Result<(), Failure> {
    for url in urls {
        match url.scheme() {
            Scheme::Https | Scheme::Unixs if !can_serve(options) => {
                return Err(Failure::config(format!(
                    "cannot listen on TLS for {}: KeyFile and CertFile are not presented: set --peer-cert-file and \
                     --peer-key-file, or --peer-auto-tls",
                    if url.path().is_empty() {
                        url.authority()
                    } else {
                        url.path().to_owned()
                    }
                )));
            }
            Scheme::Https | Scheme::Unixs => {}
            Scheme::Http | Scheme::Unix => {
                if can_serve(options) {
                    warn(
                        notes,
                        format!(
                            "scheme is HTTP while key and cert files are present; ignoring key and cert files: {url}"
                        ),
                    );
                }
                if options.client_cert_auth {
                    warn(
                        notes,
                        format!(
                            "scheme is HTTP while --peer-client-cert-auth is enabled; ignoring client cert auth for \
                             this URL: {url}"
                        ),
                    );
                }
            }
        }
    }
    Ok(())
}

fn warn(notes: &mut Vec<Note>, message: String) {
    notes.push(Note { warning: true, message });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::{Command, load};

    fn tls(args: &[&str]) -> Result<(TlsConfig, Vec<Note>), Failure> {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        let Ok(Command::Start(settings)) = load(&args, &[]) else {
            panic!("{args:?} do not parse");
        };
        let mut notes = Vec::new();
        TlsConfig::from_settings(&settings, &mut notes).map(|config| (config, notes))
    }

    #[test]
    fn flags_become_options() {
        let (config, notes) = tls(&[
            "--listen-client-urls=https://127.0.0.1:1,https://127.0.0.1:2",
            "--cert-file=c",
            "--key-file=k",
            "--trusted-ca-file=ca",
            "--client-crl-file=crl",
            "--client-cert-allowed-hostname=a,b",
            "--listen-peer-urls=https://127.0.0.1:3",
            "--peer-cert-file=pc",
            "--peer-key-file=pk",
            "--peer-client-cert-file=pcc",
            "--peer-client-key-file=pck",
            "--peer-client-cert-auth",
            "--peer-cert-allowed-cn=x",
            "--peer-skip-client-san-verification",
            "--tls-max-version=TLS1.3",
        ])
        .unwrap();
        assert_eq!(notes, []);
        let path = |path: &str| Some(PathBuf::from(path));
        let client = TlsOptions {
            cert_file: path("c"),
            key_file: path("k"),
            trusted_ca_file: path("ca"),
            crl_file: path("crl"),
            allowed_hostname: vec!["a".to_owned(), "b".to_owned()],
            auto_tls_hosts: vec!["127.0.0.1".to_owned()],
            max_version: Some(TlsVersion::Tls13),
            ..TlsOptions::for_clients()
        };
        let peer = TlsOptions {
            cert_file: path("pc"),
            key_file: path("pk"),
            client_cert_file: path("pcc"),
            client_key_file: path("pck"),
            client_cert_auth: true,
            allowed_cn: vec!["x".to_owned()],
            auto_tls_hosts: vec!["127.0.0.1".to_owned()],
            skip_client_san_verification: true,
            max_version: Some(TlsVersion::Tls13),
            ..TlsOptions::for_peers()
        };
        assert_eq!(config, TlsConfig { client, peer });
    }

    #[test]
    fn what_does_not_go_together_is_refused_in_etcds_words() {
        for (args, part) in [
            (
                &["--listen-client-urls=https://127.0.0.1:1"][..],
                "TLS key/cert (--cert-file, --key-file) must be provided for client url https://127.0.0.1:1 with HTTPS \
                 scheme",
            ),
            (
                &["--listen-peer-urls=https://127.0.0.1:1"],
                "cannot listen on TLS for 127.0.0.1:1: KeyFile and CertFile are not presented",
            ),
            (
                &["--cert-file=c"],
                "KeyFile and CertFile must both be present[key: , cert: c]",
            ),
            (&["--peer-key-file=k"], "--peer-cert-file"),
            (&["--cipher-suites=x"], "unexpected TLS cipher suite \"x\""),
            (
                &["--tls-min-version=TLS1.3", "--tls-max-version=TLS1.2"],
                "min version (TLS1.3) is greater than max version (TLS1.2)",
            ),
            (
                &["--auto-tls", "--self-signed-cert-validity=0"],
                "selfSignedCertValidity is invalid",
            ),
            (
                &["--peer-auto-tls", "--peer-client-cert-auth"],
                "--peer-client-cert-auth",
            ),
        ] {
            let failure = tls(args).expect_err(part);
            assert!(failure.message.contains(part), "{args:?}: {failure}");
        }
    }

    #[test]
    fn plaintext_urls_beside_certificates_are_pointed_out() {
        let (_, notes) = tls(&[
            "--listen-client-urls=http://127.0.0.1:1,https://127.0.0.1:1",
            "--auto-tls",
            "--client-cert-auth",
            "--peer-auto-tls",
        ])
        .unwrap();
        let messages: Vec<_> = notes.iter().map(|note| note.message.as_str()).collect();
        assert_eq!(messages.len(), 3, "{messages:?}");
        assert!(messages[0].starts_with("scheme is http or unix while key and cert files are present"));
        assert!(messages[1].ends_with("ignoring client cert auth for this URL: http://127.0.0.1:1"));
        assert!(messages[2].starts_with("scheme is HTTP while key and cert files are present"));
    }
}
