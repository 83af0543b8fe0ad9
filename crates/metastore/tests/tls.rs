//! TLS of the binary: one port for both, generated certificates, refusals.

mod support;

use std::path::Path;

use server::tls::{TlsClient, TlsOptions, describe};
use support::{Setup, Storage, temp_dir};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

const REQUEST: &[u8] = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

async fn get(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Result<String, String> {
    stream.write_all(REQUEST).await.map_err(|error| describe(&error))?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .await
        .map_err(|error| describe(&error))?;
    Ok(answer)
}

async fn get_by_tls(port: u16, trusted: Option<&Path>) -> Result<String, String> {
    let client = TlsClient::new(TlsOptions {
        trusted_ca_file: trusted.map(Path::to_owned),
        alpn_protocols: vec![b"http/1.1".to_vec()],
        ..TlsOptions::for_clients()
    })
    .map_err(|error| error.to_string())?;
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    get(client
        .connect(stream, "127.0.0.1")
        .await
        .map_err(|error| error.to_string())?)
    .await
}

fn setup(base: &Path, scheme: &str) -> Setup {
    let setup = Setup::new(base, Storage::Memory);
    let address = format!("127.0.0.1:{}", setup.port);
    let urls = scheme.split(',').map(|scheme| format!("{scheme}://{address}"));
    let urls = urls.collect::<Vec<_>>().join(",");
    setup
        .arg(format!("--listen-client-urls={urls}"))
        .arg(format!("--advertise-client-urls={urls}"))
        .arg("--auto-tls")
}

#[tokio::test]
async fn one_port_serves_plaintext_and_tls() {
    let base = temp_dir();
    let setup = setup(base.path(), "http,https");
    let mut node = setup.start();
    let certificate = setup.data_dir.join("fixtures/client/cert.pem");
    let answer = get_by_tls(setup.port, Some(&certificate)).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200 OK") && answer.contains("etcdserver"),
        "{answer}"
    );
    let answer = get(TcpStream::connect(("127.0.0.1", setup.port)).await.unwrap())
        .await
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    for line in [
        "serving client traffic securely",
        "serving client traffic insecurely",
        "starting with client TLS",
    ] {
        node.wait_log(line);
    }
    assert!(node.terminate().code() != Some(1));

    let made = std::fs::read(&certificate).unwrap();
    let _node = setup.start();
    assert_eq!(std::fs::read(&certificate).unwrap(), made);
}

#[tokio::test]
async fn a_tls_port_refuses_the_rest_and_says_so() {
    let base = temp_dir();
    let setup = setup(base.path(), "https");
    let node = setup.start();
    let other = base.path().join("other.pem");
    std::fs::write(&other, "").unwrap();
    assert!(get_by_tls(setup.port, Some(&other)).await.is_err());
    let _ = get(TcpStream::connect(("127.0.0.1", setup.port)).await.unwrap()).await;
    assert!(
        get_by_tls(setup.port, Some(&setup.data_dir.join("fixtures/client/cert.pem")))
            .await
            .is_ok()
    );
    node.wait_log("rejected connection on client endpoint");
    node.wait_log("tls: first record does not look like a TLS handshake");
}

#[test]
fn wrong_certificates_leave_the_data_directory_alone() {
    let base = temp_dir();
    let missing = base.path().join("none.pem");
    let mut setup = Setup::new(base.path(), Storage::Memory);
    setup.set_args(vec![
        format!("--listen-client-urls=https://127.0.0.1:{}", setup.port),
        format!("--cert-file={}", missing.display()),
        format!("--key-file={}", missing.display()),
    ]);
    let (code, output) = setup.run_to_end();
    assert_eq!(code, Some(1));
    assert!(
        output.contains("none.pem") && output.contains("No such file"),
        "{output}"
    );
    assert!(!setup.data_dir.exists());
}
