//! Handshakes between our two sides, with certificates made on the spot.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams, SanType,
    SerialNumber, SignatureAlgorithm,
};
use tempfile::TempDir;
use time::{Duration, OffsetDateTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// A certificate authority, and the directory in which its files lie.
struct Authority {
    dir: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a certificate is to hold.
struct Leaf<'a> {
    common_name: &'a str,
    names: &'a [&'a str],
    serial: u64,
    from_days: i64,
    to_days: i64,
    usages: Vec<ExtendedKeyUsagePurpose>,
    algorithm: &'static SignatureAlgorithm,
}

impl Default for Leaf<'_> {
    fn default() -> Self {
        Leaf {
            common_name: "one.example",
            names: &["localhost", "127.0.0.1"],
            serial: 7,
            from_days: -1,
            to_days: 1,
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            algorithm: &rcgen::PKCS_ECDSA_P256_SHA256,
        }
    }
}

/// The files of a certificate and its key.
#[derive(Clone)]
struct Pair {
    certificate: PathBuf,
    key: PathBuf,
}

fn in_days(days: i64) -> OffsetDateTime {
    OffsetDateTime::from(SystemTime::now()) + Duration::days(days)
}

fn params(leaf: &Leaf<'_>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "tests");
    if !leaf.common_name.is_empty() {
        params.distinguished_name.push(DnType::CommonName, leaf.common_name);
    }
    let names = leaf.names.iter().map(|name| match name.parse::<IpAddr>() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName((*name).try_into().unwrap()),
    });
    params.subject_alt_names = names.collect();
    params.serial_number = Some(SerialNumber::from(leaf.serial));
    (params.not_before, params.not_after) = (in_days(leaf.from_days), in_days(leaf.to_days));
    params.extended_key_usages = leaf.usages.clone();
    params
}

impl Authority {
    fn new(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Authority { dir, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bundle(&self) -> PathBuf {
        self.path("ca.pem")
    }

    fn issue(&self, file: &str, leaf: &Leaf<'_>) -> Pair {
        let key = KeyPair::generate_for(leaf.algorithm).unwrap();
        let certificate = params(leaf).signed_by(&key, &self.issuer).unwrap();
        self.store(file, &certificate.pem(), &key.serialize_pem())
    }

    fn store(&self, file: &str, certificate: &str, key: &str) -> Pair {
        let pair = Pair {
            certificate: self.path(&format!("{file}.pem")),
            key: self.path(&format!("{file}.key")),
        };
        fs::write(&pair.certificate, certificate).unwrap();
        fs::write(&pair.key, key).unwrap();
        pair
    }

    fn revoke(&self, serials: &[u64], pem: bool) -> PathBuf {
        let revoked = serials.iter().map(|&serial| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: in_days(-1),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: in_days(-1),
            next_update: in_days(1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).unwrap();
        let path = self.path("revoked.crl");
        match pem {
            true => fs::write(&path, list.pem().unwrap()).unwrap(),
            false => fs::write(&path, list.der().as_ref()).unwrap(),
        }
        path
    }
}

fn with(options: TlsOptions, pair: &Pair, authority: Option<&Authority>) -> TlsOptions {
    TlsOptions {
        cert_file: Some(pair.certificate.clone()),
        key_file: Some(pair.key.clone()),
        trusted_ca_file: authority.map(Authority::bundle),
        ..options
    }
}

/// A client that has no certificate.
fn stranger(authority: &Authority) -> Arc<TlsClient> {
    TlsClient::new(TlsOptions {
        trusted_ca_file: Some(authority.bundle()),
        ..TlsOptions::for_clients()
    })
    .unwrap()
}

/// How a connection came out for the server and for the client, after one byte from the server.
async fn meet_at(
    server: &TlsServer,
    client: &TlsClient,
    host: &str,
    remote: &str,
) -> (
    Result<Option<String>, HandshakeError>,
    Result<rustls::SupportedCipherSuite, String>,
) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let remote: SocketAddr = format!("{remote}:7").parse().unwrap();
    let serve = async {
        let mut stream = server.accept(near, Some(remote)).await?;
        stream.write_all(b"!").await?;
        stream.flush().await?;
        Ok(peer_common_name(stream.get_ref().1))
    };
    let connect = async {
        let mut stream = client.connect(far, host).await.map_err(|error| error.to_string())?;
        stream.read_u8().await.map_err(|error| describe(&error))?;
        Ok(stream.get_ref().1.negotiated_cipher_suite().unwrap())
    };
    tokio::join!(serve, connect)
}

async fn meet(
    server: &TlsServer,
    client: &TlsClient,
) -> (
    Result<Option<String>, String>,
    Result<rustls::SupportedCipherSuite, String>,
) {
    let (served, connected) = meet_at(server, client, "localhost", "127.0.0.1").await;
    (served.map_err(|error| error.to_string()), connected)
}

#[track_caller]
fn assert_text(result: Result<impl std::fmt::Debug, String>, part: &str) {
    let text = result.unwrap_err();
    assert!(text.contains(part), "{text:?} should contain {part:?}");
}

#[tokio::test]
async fn members_with_certificates_of_one_authority_meet() {
    let authority = Authority::new("ca");
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ECDSA_P521_SHA512,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ] {
        let leaf = Leaf {
            algorithm,
            ..Leaf::default()
        };
        let options = with(TlsOptions::for_peers(), &authority.issue("a", &leaf), Some(&authority));
        let server = TlsServer::new(options.clone()).unwrap();
        let client = TlsClient::new(options).unwrap();
        for host in ["localhost", "127.0.0.1"] {
            let (served, connected) = meet_at(&server, &client, host, "127.0.0.1").await;
            assert_eq!(served.unwrap().as_deref(), Some("one.example"));
            assert_eq!(connected.unwrap().version().version, rustls::ProtocolVersion::TLSv1_3);
        }
    }
}

#[tokio::test]
async fn without_an_authority_no_client_certificate_is_asked_for() {
    let authority = Authority::new("ca");
    let pair = authority.issue("a", &Leaf::default());
    let server = TlsServer::new(with(TlsOptions::for_clients(), &pair, None)).unwrap();
    let (served, connected) = meet(&server, &stranger(&authority)).await;
    assert_eq!((served, connected.is_ok()), (Ok(None), true));
}

/// Trap 8 of etcd: the CA file alone makes client certificates mandatory.
#[tokio::test]
async fn an_authority_makes_client_certificates_mandatory() {
    let authority = Authority::new("ca");
    let pair = authority.issue("a", &Leaf::default());
    let server = TlsServer::new(with(TlsOptions::for_clients(), &pair, Some(&authority))).unwrap();
    let (served, connected) = meet(&server, &stranger(&authority)).await;
    assert_text(served, "tls: client didn't provide a certificate");
    assert_text(connected, "remote error: tls: certificate required");

    let nameless = Leaf {
        common_name: "",
        names: &[],
        ..Leaf::default()
    };
    let pair = authority.issue("b", &nameless);
    let client = TlsClient::new(with(TlsOptions::for_clients(), &pair, Some(&authority))).unwrap();
    let (served, connected) = meet(&server, &client).await;
    assert_eq!((served, connected.is_ok()), (Ok(None), true));
}

#[tokio::test]
async fn another_authority_is_not_trusted_by_either_side() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let leaf = Leaf::default();
    let server = TlsServer::new(with(TlsOptions::for_peers(), &ours.issue("a", &leaf), Some(&ours))).unwrap();
    let foreign = theirs.issue("a", &leaf);

    let client = TlsClient::new(with(TlsOptions::for_peers(), &foreign, Some(&ours))).unwrap();
    let (served, connected) = meet(&server, &client).await;
    assert_text(served, "x509: certificate signed by unknown authority");
    assert_text(connected, "remote error: tls: unknown certificate authority");

    let client = TlsClient::new(with(TlsOptions::for_peers(), &foreign, Some(&theirs))).unwrap();
    let (served, connected) = meet(&server, &client).await;
    assert_text(served, "remote error: tls: unknown certificate authority");
    assert_text(connected, "x509: certificate signed by unknown authority");

    let insecure = TlsOptions {
        insecure_skip_verify: true,
        ..with(TlsOptions::for_peers(), &ours.issue("b", &leaf), Some(&theirs))
    };
    let (served, connected) = meet(&server, &TlsClient::new(insecure).unwrap()).await;
    assert!(served.is_ok() && connected.is_ok());
}

#[tokio::test]
async fn certificates_out_of_date_or_for_another_purpose_are_refused() {
    let authority = Authority::new("ca");
    let good = with(
        TlsOptions::for_peers(),
        &authority.issue("a", &Leaf::default()),
        Some(&authority),
    );
    let server = TlsServer::new(good.clone()).unwrap();
    for (from_days, to_days) in [(-2, -1), (1, 2)] {
        let stale = Leaf {
            from_days,
            to_days,
            ..Leaf::default()
        };
        let stale = with(TlsOptions::for_peers(), &authority.issue("b", &stale), Some(&authority));
        let (served, connected) = meet(&server, &TlsClient::new(stale.clone()).unwrap()).await;
        assert_text(served, "x509: certificate has expired or is not yet valid");
        assert_text(connected, "remote error: tls: expired certificate");
        // As a server it starts, as etcd does, and clients refuse it.
        let (served, connected) = meet(&TlsServer::new(stale).unwrap(), &TlsClient::new(good.clone()).unwrap()).await;
        assert_text(served, "remote error: tls: expired certificate");
        assert_text(connected, "x509: certificate has expired");
    }
    let server_only = Leaf {
        usages: vec![ExtendedKeyUsagePurpose::ServerAuth],
        ..Leaf::default()
    };
    let server_only = with(
        TlsOptions::for_peers(),
        &authority.issue("c", &server_only),
        Some(&authority),
    );
    let (served, connected) = meet(&server, &TlsClient::new(server_only).unwrap()).await;
    assert_text(served, "x509: certificate specifies an incompatible key usage");
    assert_text(connected, "remote error: tls: unsupported certificate");
}

#[tokio::test]
async fn the_name_of_the_server_must_be_that_of_its_url() {
    let authority = Authority::new("ca");
    let options = with(
        TlsOptions::for_peers(),
        &authority.issue("a", &Leaf::default()),
        Some(&authority),
    );
    let (server, client) = (
        TlsServer::new(options.clone()).unwrap(),
        TlsClient::new(options).unwrap(),
    );
    for (host, part) in [
        ("10.0.0.1", "not 10.0.0.1"),
        ("other.example", "not other.example"),
        ("no host", "is no host name"),
    ] {
        let (_, connected) = meet_at(&server, &client, host, "127.0.0.1").await;
        assert_text(connected, part);
    }
    let (_, connected) = meet_at(&server, &client, "other.example", "127.0.0.1").await;
    assert_text(connected, "x509: certificate is valid for localhost");
}

#[tokio::test]
async fn only_allowed_common_names_and_host_names_connect() {
    let authority = Authority::new("ca");
    let one = with(
        TlsOptions::for_peers(),
        &authority.issue("one", &Leaf::default()),
        Some(&authority),
    );
    let two = Leaf {
        common_name: "two.example",
        names: &["two.example", "127.0.0.1"],
        ..Leaf::default()
    };
    let two = with(
        TlsOptions {
            skip_client_san_verification: true,
            ..TlsOptions::for_peers()
        },
        &authority.issue("two", &two),
        Some(&authority),
    );
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    let by_name = |names| TlsOptions {
        allowed_cn: names,
        ..one.clone()
    };
    let by_host = |names| TlsOptions {
        allowed_hostname: names,
        ..one.clone()
    };
    for (options, allowed) in [
        (by_name(names(&["one.example"])), true),
        (by_name(names(&["two.example", "one.example"])), true),
        (by_name(names(&["two.example"])), false),
        (by_host(names(&["localhost"])), true),
        (by_host(names(&["x", "127.0.0.1"])), true),
        (by_host(names(&["one.example"])), false),
    ] {
        let server = TlsServer::new(TlsOptions {
            skip_client_san_verification: true,
            ..options.clone()
        });
        let (served, connected) = meet(&server.unwrap(), &TlsClient::new(one.clone()).unwrap()).await;
        match allowed {
            true => assert!(served.is_ok() && connected.is_ok()),
            false => {
                assert_text(served, "client certificate authentication failed");
                assert_text(connected, "remote error: tls: bad certificate");
            }
        }
    }
    // As in etcd it works the other way as well: a client refuses a server without an allowed name.
    let client = TlsClient::new(by_name(names(&["one.example"]))).unwrap();
    let (served, connected) = meet_at(&TlsServer::new(two).unwrap(), &client, "127.0.0.1", "127.0.0.1").await;
    assert_text(
        served.map_err(|error| error.to_string()),
        "remote error: tls: bad certificate",
    );
    assert_text(connected, "client certificate authentication failed");
}

#[tokio::test]
async fn revoked_certificates_are_refused_as_soon_as_the_list_says_so() {
    let authority = Authority::new("ca");
    let revoked = Leaf {
        // The highest bit is set, so that its encoding begins with a zero.
        serial: 0xf0_0000_0000_0001,
        ..Leaf::default()
    };
    let one = with(
        TlsOptions::for_clients(),
        &authority.issue("one", &Leaf::default()),
        Some(&authority),
    );
    let two = with(
        TlsOptions::for_clients(),
        &authority.issue("two", &revoked),
        Some(&authority),
    );
    let (one, two) = (
        TlsOptions {
            crl_file: Some(authority.revoke(&[], false)),
            ..one
        },
        TlsClient::new(two).unwrap(),
    );
    let server = TlsServer::new(one.clone()).unwrap();
    let one = TlsClient::new(one).unwrap();
    assert!(meet(&server, &two).await.0.is_ok());
    for pem in [false, true] {
        authority.revoke(&[99, revoked.serial], pem);
        let (served, connected) = meet(&server, &two).await;
        assert_text(served, "revoked");
        assert_text(connected, "remote error: tls: revoked certificate");
        assert!(meet(&server, &one).await.0.is_ok());
    }
    // A list that cannot be read leaves the one before in force.
    fs::write(authority.path("revoked.crl"), "nonsense").unwrap();
    assert_text(meet(&server, &two).await.0, "revoked");
    fs::remove_file(authority.path("revoked.crl")).unwrap();
    assert_text(meet(&server, &two).await.0, "revoked");
    authority.revoke(&[], true);
    assert!(meet(&server, &two).await.0.is_ok());
}

#[tokio::test]
async fn renewed_files_are_used_without_a_restart() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let leaf = Leaf::default();
    let pair = old.issue("a", &leaf);
    let server = TlsServer::new(with(TlsOptions::for_peers(), &pair, Some(&old))).unwrap();
    let client = TlsClient::new(with(TlsOptions::for_peers(), &pair, Some(&old))).unwrap();
    assert!(meet(&server, &client).await.0.is_ok());
    let before = server.config();
    assert!(
        Arc::ptr_eq(&before, &server.config()),
        "unchanged files are not read again"
    );

    // The certificate alone: its key is not there yet, so the old pair stays.
    let renewed = new.issue("a", &leaf);
    fs::copy(&renewed.certificate, &pair.certificate).unwrap();
    assert!(Arc::ptr_eq(&before, &server.config()));
    assert!(meet(&server, &client).await.0.is_ok());
    fs::copy(&renewed.key, &pair.key).unwrap();
    fs::copy(new.bundle(), old.bundle()).unwrap();
    assert!(!Arc::ptr_eq(&before, &server.config()));
    assert!(meet(&server, &client).await.0.is_ok());

    // Whoever kept the old certificate and authority is out.
    let aside = Authority::new("aside");
    let kept = TlsClient::new(with(TlsOptions::for_peers(), &aside.issue("a", &leaf), Some(&aside))).unwrap();
    assert!(meet(&server, &kept).await.0.is_err());

    // A new file in its place, as secrets are renewed in containers.
    let next = new.issue("next", &leaf);
    fs::rename(&next.certificate, &pair.certificate).unwrap();
    fs::rename(&next.key, &pair.key).unwrap();
    let config = server.config();
    assert!(meet(&server, &client).await.0.is_ok());
    fs::remove_file(&pair.key).unwrap();
    assert!(
        Arc::ptr_eq(&config, &server.config()),
        "a file that is gone leaves what was read"
    );
    assert!(meet(&server, &client).await.0.is_ok());
}

#[tokio::test]
async fn versions_are_limited_on_both_sides() {
    use TlsVersion::{Tls12, Tls13};
    let authority = Authority::new("ca");
    let options = with(
        TlsOptions::for_peers(),
        &authority.issue("a", &Leaf::default()),
        Some(&authority),
    );
    let limited = |min_version, max_version| TlsOptions {
        min_version,
        max_version,
        ..options.clone()
    };
    for (server, client, version) in [
        (
            limited(Tls12, None),
            limited(Tls12, None),
            Some(rustls::ProtocolVersion::TLSv1_3),
        ),
        (
            limited(Tls12, Some(Tls12)),
            limited(Tls12, None),
            Some(rustls::ProtocolVersion::TLSv1_2),
        ),
        (
            limited(Tls13, None),
            limited(Tls12, None),
            Some(rustls::ProtocolVersion::TLSv1_3),
        ),
        (limited(Tls13, Some(Tls13)), limited(Tls12, Some(Tls12)), None),
        (limited(Tls12, Some(Tls12)), limited(Tls13, None), None),
    ] {
        let (served, connected) = meet(&TlsServer::new(server).unwrap(), &TlsClient::new(client).unwrap()).await;
        match version {
            Some(version) => assert_eq!(connected.unwrap().version().version, version),
            None => {
                assert_text(served, "no version of TLS in common");
                assert_text(connected, "remote error: tls: protocol version not supported");
            }
        }
    }
}

#[tokio::test]
async fn chosen_cipher_suites_are_used() {
    let authority = Authority::new("ca");
    let options = with(
        TlsOptions::for_peers(),
        &authority.issue("a", &Leaf::default()),
        Some(&authority),
    );
    let chosen = |names: &[&str]| TlsOptions {
        cipher_suites: names.iter().map(|&name| name.to_owned()).collect(),
        max_version: Some(TlsVersion::Tls12),
        ..options.clone()
    };
    let (aes, chacha) = (
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305",
    );
    for (server, client, suite) in [
        (
            chosen(&[aes]),
            chosen(&[]),
            Some("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"),
        ),
        (
            chosen(&[chacha, aes]),
            chosen(&[aes, chacha]),
            Some("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"),
        ),
        (chosen(&[aes]), chosen(&[chacha]), None),
    ] {
        let (served, connected) = meet(&TlsServer::new(server).unwrap(), &TlsClient::new(client).unwrap()).await;
        match suite {
            Some(suite) => assert_eq!(format!("{:?}", connected.unwrap().suite()), suite),
            None => {
                assert_text(served, "tls: no cipher suite supported by both client and server");
                assert_text(connected, "remote error: tls: handshake failure");
            }
        }
    }
    assert!(
        TlsServer::new(chosen(&["TLS_AES_128_GCM_SHA256"])).is_err(),
        "no suite is left for TLS 1.2"
    );
}

#[tokio::test]
async fn names_of_members_must_belong_to_their_addresses() {
    let authority = Authority::new("ca");
    let member = |names: &'static [&'static str]| {
        let leaf = Leaf {
            names,
            ..Leaf::default()
        };
        let pair = authority.issue(&format!("member {names:?}"), &leaf);
        TlsClient::new(with(TlsOptions::for_peers(), &pair, Some(&authority))).unwrap()
    };
    let options = with(
        TlsOptions::for_peers(),
        &authority.issue("a", &Leaf::default()),
        Some(&authority),
    );
    let strict = TlsServer::new(options.clone()).unwrap();
    let lax = TlsServer::new(TlsOptions {
        skip_client_san_verification: true,
        ..options
    })
    .unwrap();
    for (client, remote, part) in [
        (member(&["127.0.0.1"]), "127.0.0.1", None),
        (member(&["localhost"]), "127.0.0.1", None),
        (member(&[]), "192.0.2.1", None),
        (
            member(&["127.0.0.1"]),
            "192.0.2.1",
            Some("x509: certificate is valid for 127.0.0.1, not 192.0.2.1"),
        ),
        (
            member(&["localhost"]),
            "192.0.2.1",
            Some("tls: \"192.0.2.1\" does not match any of DNSNames [\"localhost\"]"),
        ),
    ] {
        let (served, _) = meet_at(&strict, &client, "localhost", remote).await;
        match part {
            None => assert!(served.is_ok()),
            Some(part) => {
                let error = served.unwrap_err();
                assert!(error.ip_addresses.len() + error.dns_names.len() == 1 && error.server_name == "localhost");
                assert_text(Err::<(), _>(error.to_string()), part);
                let (served, connected) = meet_at(&lax, &client, "localhost", remote).await;
                assert!(served.is_ok() && connected.is_ok());
            }
        }
    }
}

#[tokio::test]
async fn a_trusted_certificate_may_be_a_members_own() {
    for is_ca in [IsCa::Ca(BasicConstraints::Unconstrained), IsCa::NoCa] {
        let authority = Authority::new("unused");
        let key = KeyPair::generate().unwrap();
        let mut params = params(&Leaf::default());
        params.is_ca = is_ca;
        let pem = params.self_signed(&key).unwrap().pem();
        fs::write(authority.bundle(), &pem).unwrap();
        let pair = authority.store("own", &pem, &key.serialize_pem());
        let options = with(TlsOptions::for_peers(), &pair, Some(&authority));
        let (server, client) = (
            TlsServer::new(options.clone()).unwrap(),
            TlsClient::new(options).unwrap(),
        );
        let (served, connected) = meet(&server, &client).await;
        assert!(served.is_ok() && connected.is_ok(), "{served:?} {connected:?}");
        let (_, connected) = meet_at(&server, &client, "other.example", "127.0.0.1").await;
        assert_text(
            connected,
            "x509: certificate is valid for localhost, 127.0.0.1, not other.example",
        );
    }
}

#[tokio::test]
async fn generated_certificates_are_kept_while_they_are_valid() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let hosts = ["localhost", "127.0.0.1", "localhost", ""].map(str::to_owned);
    let asked = TlsOptions {
        auto_tls: true,
        auto_tls_hosts: hosts.to_vec(),
        ..TlsOptions::for_peers()
    };
    let hosts_of = |host: &str| TlsOptions {
        auto_tls_hosts: vec![host.to_owned()],
        ..asked.clone()
    };
    let options = asked.clone().with_auto_tls(dir.path()).unwrap();
    let (certificate, key) = (options.cert_file.clone().unwrap(), options.key_file.clone().unwrap());
    assert_eq!(certificate, dir.path().join("fixtures/peer/cert.pem"));
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(dir.path().join("fixtures/peer")).unwrap().count(), 2);
    let made = fs::read(&certificate).unwrap();
    let (server, client) = (
        TlsServer::new(options.clone()).unwrap(),
        TlsClient::new(options.clone()).unwrap(),
    );
    assert!(meet(&server, &client).await.1.is_ok());

    // Another member's certificate is as good, as nobody can verify any.
    let elsewhere = tempfile::tempdir().unwrap();
    let other = hosts_of("other.example").with_auto_tls(elsewhere.path()).unwrap();
    assert!(meet(&server, &TlsClient::new(other).unwrap()).await.1.is_ok());

    // It can be verified by whoever is given it.
    let given = TlsOptions {
        trusted_ca_file: Some(certificate.clone()),
        ..TlsOptions::for_clients()
    };
    assert!(meet(&server, &TlsClient::new(given).unwrap()).await.1.is_ok());

    let again = hosts_of("more.example").with_auto_tls(dir.path()).unwrap();
    assert_eq!(again.cert_file, options.cert_file);
    assert_eq!(fs::read(&certificate).unwrap(), made);
    for damage in ["", "nonsense", "no key"] {
        match damage {
            "no key" => fs::remove_file(&key).unwrap(),
            text => fs::write(&certificate, text).unwrap(),
        }
        let before = fs::read(&certificate).unwrap();
        let options = asked.clone().with_auto_tls(dir.path()).unwrap();
        assert_ne!(fs::read(&certificate).unwrap(), before, "{damage}");
        TlsServer::new(options).unwrap();
    }
    // A certificate that is given wins.
    let authority = Authority::new("ca");
    let given = with(asked.clone(), &authority.issue("a", &Leaf::default()), None);
    assert_eq!(given.clone().with_auto_tls(dir.path()).unwrap(), given);
}

#[tokio::test]
async fn an_expired_generated_certificate_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let asked = TlsOptions {
        auto_tls: true,
        ..TlsOptions::for_clients()
    };
    let options = asked.clone().with_auto_tls(dir.path()).unwrap();
    let authority = Authority::new("ca");
    let stale = Leaf {
        from_days: -9,
        to_days: -1,
        ..Leaf::default()
    };
    let stale = authority.issue("a", &stale);
    let (certificate, key) = (options.cert_file.unwrap(), options.key_file.unwrap());
    fs::copy(&stale.certificate, &certificate).unwrap();
    fs::copy(&stale.key, &key).unwrap();
    asked.with_auto_tls(dir.path()).unwrap();
    assert_ne!(fs::read(&certificate).unwrap(), fs::read(&stale.certificate).unwrap());
    assert_ne!(fs::read(&key).unwrap(), fs::read(&stale.key).unwrap());
}

#[tokio::test]
async fn plaintext_and_tls_share_a_port() {
    let authority = Authority::new("ca");
    let pair = authority.issue("a", &Leaf::default());
    let server = TlsServer::new(with(TlsOptions::for_clients(), &pair, None)).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let mut seen = Vec::new();
        for _ in 0..3 {
            let (stream, remote) = listener.accept().await.unwrap();
            let mut text = [0; 8];
            match server.accept_any(stream, Some(remote)).await {
                Ok(Accepted::Plain(mut stream)) => {
                    stream.read_exact(&mut text).await.unwrap();
                    stream.write_all(b"plain").await.unwrap();
                    seen.push(text);
                }
                Ok(Accepted::Tls(mut stream)) => {
                    stream.read_exact(&mut text).await.unwrap();
                    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
                    stream.write_all(b"hidden").await.unwrap();
                    seen.push(text);
                }
                Err(error) => assert!(error.is_eof, "{error}"),
            }
        }
        seen
    };
    let connect = async {
        let mut plain = tokio::net::TcpStream::connect(address).await.unwrap();
        plain.write_all(b"GET / HT").await.unwrap();
        let mut answer = String::new();
        plain.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "plain");

        let hidden = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut hidden = stranger(&authority).connect(hidden, "localhost").await.unwrap();
        hidden.write_all(b"PRI * HT").await.unwrap();
        let mut answer = [0; 6];
        hidden.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"hidden");

        drop(tokio::net::TcpStream::connect(address).await.unwrap());
    };
    let (seen, ()) = tokio::join!(serve, connect);
    assert_eq!(seen, [*b"GET / HT", *b"PRI * HT"]);
}

#[tokio::test]
async fn what_is_no_tls_is_refused() {
    let authority = Authority::new("ca");
    let pair = authority.issue("a", &Leaf::default());
    let server = TlsServer::new(with(TlsOptions::for_clients(), &pair, None)).unwrap();
    for (sent, part) in [
        (
            &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
            "first record does not look like a TLS handshake",
        ),
        (b"\x16\x03\x01\x00\x05hello", "tls:"),
        (b"\x16\x03\x01", "EOF"),
        (b"", "EOF"),
    ] {
        let (near, mut far) = tokio::io::duplex(64 << 10);
        far.write_all(sent).await.unwrap();
        far.shutdown().await.unwrap();
        let error = server.accept(near, None).await.unwrap_err();
        assert_eq!(error.is_eof, part == "EOF");
        assert_text(Err::<(), _>(error.to_string()), part);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_falls_silent_is_cut() {
    let authority = Authority::new("ca");
    let pair = authority.issue("a", &Leaf::default());
    let server = TlsServer::new(with(TlsOptions::for_clients(), &pair, None)).unwrap();
    let (near, _far) = tokio::io::duplex(64);
    assert_text(
        server.accept(near, None).await.map_err(|error| error.to_string()),
        "i/o timeout",
    );
    let (near, _far) = tokio::io::duplex(64);
    let accepted = server.accept_any(near, None).await.map(|_| ());
    assert_text(accepted.map_err(|error| error.to_string()), "i/o timeout");
    let (near, _far) = tokio::io::duplex(64);
    let connected = stranger(&authority).connect(near, "localhost").await.map(|_| ());
    assert_text(connected.map_err(|error| error.to_string()), "i/o timeout");
}

#[test]
fn combinations_that_make_no_sense_are_refused() {
    let path = || Some(PathBuf::from("x.pem"));
    let list = || vec!["a".to_owned()];
    let (client, peer) = (TlsOptions::for_clients, TlsOptions::for_peers);
    for (options, part) in [
        (
            TlsOptions {
                cert_file: path(),
                ..client()
            },
            "KeyFile and CertFile must both be present[key: , cert: x.pem]",
        ),
        (
            TlsOptions {
                key_file: path(),
                ..peer()
            },
            "--peer-cert-file",
        ),
        (
            TlsOptions {
                client_key_file: path(),
                ..peer()
            },
            "ClientKeyFile and ClientCertFile must both be present or both absent: key: x.pem, cert: ]",
        ),
        (
            TlsOptions {
                allowed_cn: list(),
                allowed_hostname: list(),
                ..peer()
            },
            "AllowedCNs and AllowedHostnames are mutually exclusive (cns=[\"a\"], hostnames=[\"a\"])",
        ),
        (
            TlsOptions {
                min_version: TlsVersion::Tls13,
                max_version: Some(TlsVersion::Tls12),
                ..peer()
            },
            "min version (TLS1.3) is greater than max version (TLS1.2)",
        ),
        (
            TlsOptions {
                min_version: TlsVersion::Tls13,
                cipher_suites: list(),
                ..peer()
            },
            "cipher suites cannot be configured when only TLS1.3 is enabled",
        ),
        (
            TlsOptions {
                cipher_suites: list(),
                ..peer()
            },
            "unexpected TLS cipher suite \"a\"",
        ),
        (
            TlsOptions {
                auto_tls: true,
                self_signed_validity_years: 0,
                ..client()
            },
            "selfSignedCertValidity is invalid,it should be greater than 0",
        ),
        (
            TlsOptions {
                auto_tls: true,
                client_cert_auth: true,
                ..peer()
            },
            "--peer-client-cert-auth",
        ),
    ] {
        let error = options.validate().unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert_eq!(TlsServer::new(options.clone()).unwrap_err().to_string(), error);
        assert_eq!(TlsClient::new(options).unwrap_err().to_string(), error);
    }
    let error = TlsVersion::parse("TLS1.1").unwrap_err().to_string();
    assert_eq!(
        error,
        "unexpected TLS version \"TLS1.1\" (must be one of: TLS1.2, TLS1.3)"
    );
    assert_eq!(TlsVersion::parse("").unwrap(), None);
    let error = TlsServer::new(TlsOptions::for_peers()).unwrap_err().to_string();
    assert!(
        error.contains("--peer-cert-file") && error.contains("--peer-auto-tls"),
        "{error}"
    );
}

#[test]
fn bad_files_are_named_with_what_is_wrong() {
    let authority = Authority::new("ca");
    let (a, b) = (
        authority.issue("a", &Leaf::default()),
        authority.issue("b", &Leaf::default()),
    );
    let put = |name: &str, contents: &str| {
        let path = authority.path(name);
        fs::write(&path, contents).unwrap();
        path
    };
    let pem = |path: &Path| fs::read_to_string(path).unwrap();
    let pkcs8 = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let legacy = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n\
                  -----END RSA PRIVATE KEY-----\n";
    let base = || with(TlsOptions::for_peers(), &a, Some(&authority));
    let certificate = |path| TlsOptions {
        cert_file: Some(path),
        ..base()
    };
    let key = |path| TlsOptions {
        key_file: Some(path),
        ..base()
    };
    let bundle = |path| TlsOptions {
        trusted_ca_file: Some(path),
        ..base()
    };
    let list = |path| TlsOptions {
        crl_file: Some(path),
        ..base()
    };
    let own = |path| TlsOptions {
        client_cert_file: Some(a.certificate.clone()),
        client_key_file: Some(path),
        ..base()
    };
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (options, name, part) in [
        (certificate(authority.path("none")), "none", "No such file"),
        (certificate(authority.dir.path().to_owned()), "", "cannot read"),
        (certificate(put("empty", "")), "empty", "holds no certificate"),
        (certificate(put("text", "hello")), "text", "holds no certificate"),
        (certificate(put("garbage", garbage)), "garbage", "cannot be parsed"),
        (certificate(put("torn", &pem(&a.certificate)[..200])), "torn", "PEM"),
        (certificate(a.key.clone()), "a.key", "exchanged"),
        (key(a.certificate.clone()), "a.pem", "exchanged"),
        (key(put("empty", "")), "empty", "holds no private key"),
        (key(put("pkcs8", pkcs8)), "pkcs8", "is encrypted"),
        (key(put("legacy", legacy)), "legacy", "is encrypted"),
        (
            key(put(
                "bad",
                "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            )),
            "bad",
            "cannot be used",
        ),
        (
            key(b.key.clone()),
            "b.key",
            "tls: private key does not match public key",
        ),
        (
            own(b.key.clone()),
            "b.key",
            "tls: private key does not match public key",
        ),
        (bundle(put("empty", "")), "empty", "holds no certificate"),
        (
            bundle(put("garbage", garbage)),
            "garbage",
            "certificate 1 cannot be trusted",
        ),
        (list(put("empty", "")), "empty", "is not a revocation list"),
        (list(put("text", "hello")), "text", "is not a revocation list"),
        (list(a.certificate.clone()), "a.pem", "holds no revocation list"),
    ] {
        let error = TlsServer::new(options.clone()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(part), "{error}");
        let error = TlsClient::new(options).map(|_| ()).err().map(|error| error.to_string());
        // A client with a certificate of its own does not read the server's.
        assert!(error.is_some_and(|error| error.contains(part)));
    }
}

/// What OpenSSL writes around the parts that matter.
#[tokio::test]
async fn files_may_hold_more_than_is_needed() {
    let authority = Authority::new("ca");
    let leaf = Leaf::default();
    let pair = authority.issue("a", &leaf);
    let (certificate, key) = (
        fs::read_to_string(&pair.certificate).unwrap(),
        fs::read_to_string(&pair.key).unwrap(),
    );
    let parameters = "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n";
    let both = format!(
        "Certificate:\n    Data:\n{parameters}{key}{certificate}{}",
        authority.issuer.pem()
    );
    for text in [both.clone(), both.replace('\n', "\r\n")] {
        let pair = authority.store("both", &text, &text);
        let options = with(TlsOptions::for_peers(), &pair, Some(&authority));
        let (served, connected) = meet(
            &TlsServer::new(options.clone()).unwrap(),
            &TlsClient::new(options).unwrap(),
        )
        .await;
        assert!(served.is_ok() && connected.is_ok());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever becomes of a file, it is an error or it works; nothing panics.
    #[test]
    fn damaged_files_never_panic(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte: u8) {
        let authority = Authority::new("ca");
        let pair = authority.issue("a", &Leaf::default());
        let options = TlsOptions {
            crl_file: Some(authority.revoke(&[1, 2], false)),
            ..with(TlsOptions::for_peers(), &pair, Some(&authority))
        };
        for path in [&pair.certificate, &pair.key, &authority.bundle(), &authority.path("revoked.crl")] {
            let whole = fs::read(path).unwrap();
            let mut damaged = whole.clone();
            *at.get_mut(&mut damaged) = byte;
            let torn = &whole[..cut.index(whole.len())];
            for bytes in [&damaged[..], torn] {
                fs::write(path, bytes).unwrap();
                if let Err(error) = TlsServer::new(options.clone()) {
                    prop_assert!(!error.to_string().is_empty());
                }
                let _ = TlsClient::new(options.clone());
            }
            fs::write(path, whole).unwrap();
        }
    }

    #[test]
    fn what_is_no_certificate_has_no_names(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert_eq!(CertificateNames::of(&bytes.into()), None);
    }
}

/// A subscriber that keeps what is logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!(" {}={value:?}", field.name());
            }
        }
        let mut text = Text(event.metadata().level().to_string());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test]
async fn refusals_are_logged_as_etcd_does() {
    let authority = Authority::new("ca");
    let pair = authority.issue("a", &Leaf::default());
    for (options, endpoint) in [(TlsOptions::for_clients(), "client"), (TlsOptions::for_peers(), "peer")] {
        let server = TlsServer::new(with(options, &pair, Some(&authority))).unwrap();
        let (served, _) = meet_at(&server, &stranger(&authority), "localhost", "127.0.0.1").await;
        let (near, far) = tokio::io::duplex(64);
        drop(far);
        let gone = server.accept(near, None).await.unwrap_err();
        let lines = Lines::default();
        tracing::subscriber::with_default(lines.clone(), || {
            server.log_rejected("127.0.0.1:7", &served.unwrap_err());
            server.log_rejected("127.0.0.1:8", &gone);
        });
        let lines = lines.0.lock().unwrap();
        for part in [
            &format!("message=rejected connection on {endpoint} endpoint"),
            "WARN ",
            "remote-addr=\"127.0.0.1:7\"",
            "server-name=\"localhost\"",
            "error=\"tls: client didn't provide a certificate\"",
        ] {
            assert!(lines[0].contains(part), "{lines:?}");
        }
        assert!(
            lines[1].starts_with("DEBUG ") && lines[1].contains("error=\"EOF\""),
            "{lines:?}"
        );
    }
}
