//! Certificates.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::harness::{LONG, Member, identity, member, member_with, quick, until};
use crate::peer::{CallError, Tls};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority")
}

fn certificate(by: &Authority, name: &str) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    let key = KeyPair::generate().expect("a key");
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let mut params = CertificateParams::new(names).expect("names");
    params.distinguished_name.push(DnType::CommonName, name);
    let certificate = params.signed_by(&key, by).expect("a certificate");
    let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    (certificate.der().clone(), key)
}

fn roots(of: &Authority) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(of.der().clone()).expect("a root");
    Arc::new(roots)
}

/// Both ways, with certificates from one authority, of which only the other one's are trusted.
fn mutual(issuer: &Authority, trusted: &Authority, name: &str) -> Tls {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let roots = roots(trusted);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
    let (certificate, key) = certificate(issuer, name);
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(verifier.expect("a verifier"))
        .with_single_cert(vec![certificate.clone()], key.clone_key());
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key);
    let (server, client) = (Arc::new(server.expect("TLS")), Arc::new(client.expect("TLS")));
    Tls {
        server: Some(Arc::new(move || Ok(server.clone()))),
        client: Some(Arc::new(move || Ok(client.clone()))),
        verify_peer: None,
        verify_accepted: None,
        log_rejected: None,
    }
}

async fn secure(id: u64, tls: Tls) -> Member {
    member_with(identity(id), quick(), tls, "https://127.0.0.1:0").await
}

#[tokio::test]
async fn members_with_the_same_authority_talk() {
    let authority = authority();
    let one = secure(1, mutual(&authority, &authority, "one")).await;
    let two = secure(2, mutual(&authority, &authority, "two")).await;
    one.knows(&[(2, &two.url)]);
    two.knows(&[(1, &one.url)]);
    one.connected(2).await;
    two.connected(1).await;
    let big = Bytes::from(vec![7; 3 << 20]);
    assert!(one.transport.send(2, vec![Bytes::from_static(b"small"), big.clone()]));
    until("received", || two.received_count() == 2).await;
    assert!(two.received()[1] == big);
    let echo = Bytes::from(vec![b'e'; 100_000]);
    assert_eq!(one.transport.call(2, echo.clone(), LONG).await, Ok(echo));
    assert!(one.transport.shutdown(LONG).await);
}

#[tokio::test]
async fn strangers_do_not() {
    let (ours, theirs) = (authority(), authority());
    let two = secure(2, mutual(&ours, &ours, "two")).await;
    let echo = Bytes::from_static(b"echo");
    let plain = format!("http://{}", two.url.to_string().replace("https://", ""))
        .parse()
        .expect("a URL");
    for (tls, url) in [
        // Their certificate is not trusted here.
        (mutual(&theirs, &ours, "one"), &two.url),
        // Ours is not trusted there.
        (mutual(&ours, &theirs, "one"), &two.url),
        (Tls::default(), &two.url),
        (Tls::default(), &plain),
    ] {
        let one = member_with(identity(1), quick(), tls, "http://127.0.0.1:0").await;
        one.knows(&[(2, url)]);
        until("failed", || one.unreachable() > 0).await;
        assert_eq!(one.transport.active(2), None);
        let call = one.transport.call_url(url, 0, echo.clone(), LONG).await;
        assert!(matches!(call, Err(CallError::NotSent(_))), "{call:?}");
    }
    assert!(two.watcher.callers.lock().is_empty());
    // Nor does TLS where none is spoken.
    let three = member(3).await;
    let secure_url = format!("https://{}", three.url.to_string().replace("http://", ""))
        .parse()
        .expect("a URL");
    two.knows(&[(3, &secure_url)]);
    until("failed", || two.unreachable() > 0).await;
}

#[tokio::test]
async fn certificates_are_read_for_each_connection_and_judged() {
    let authority = authority();
    let asked = Arc::new(AtomicUsize::new(0));
    let mut tls = mutual(&authority, &authority, "two");
    let (config, count) = (tls.server.clone().expect("TLS"), asked.clone());
    tls.server = Some(Arc::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
        config()
    }));
    let (expected, _) = certificate(&authority, "one");
    let length = expected.as_ref().len();
    tls.verify_peer = Some(Arc::new(move |certificates| {
        // A real one looks at the name.
        assert!(certificates.len() == 1 && certificates[0].as_ref().len().abs_diff(length) < 100);
        let name = b"bad name";
        let found = certificates[0].as_ref().windows(name.len()).any(|part| part == name);
        if found { Err("not that name".to_owned()) } else { Ok(()) }
    }));
    let two = secure(2, tls).await;
    let good = secure(1, mutual(&authority, &authority, "good name")).await;
    good.knows(&[(2, &two.url)]);
    good.connected(2).await;
    let bad = secure(3, mutual(&authority, &authority, "bad name")).await;
    bad.knows(&[(2, &two.url)]);
    until("failed", || bad.unreachable() > 1).await;
    assert_eq!(bad.transport.active(2), None);
    assert!(asked.load(Ordering::SeqCst) >= 3);
}
