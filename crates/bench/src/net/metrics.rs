//! Fetches a server's `/metrics`: enough HTTP/1.1 for one GET.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::endpoint::Endpoint;
use super::security::Security;

/// Most bytes of metrics that are read.
const METRICS_BYTES_MAX: u64 = 16 << 20;
/// How long a fetch may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(3);

/// What a process says about itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ProcessMetrics {
    pub(crate) cpu_seconds: f64,
    pub(crate) resident_bytes: f64,
}

/// Fetches and reads the metrics; none if the endpoint has no such page, or it lacks them.
pub(crate) async fn fetch(endpoint: &Endpoint, security: &Security) -> Option<ProcessMetrics> {
    let page = tokio::time::timeout(FETCH_TIMEOUT, get(endpoint, security)).await;
    parse(&page.ok()?.ok()?)
}

async fn get(endpoint: &Endpoint, security: &Security) -> std::io::Result<String> {
    let socket = TcpStream::connect((&endpoint.host[..], endpoint.port)).await?;
    match &security.tls {
        Some(tls) if endpoint.tls => {
            let mut tls = rustls::ClientConfig::clone(tls);
            tls.alpn_protocols = vec![b"http/1.1".to_vec()];
            let name = ServerName::try_from(endpoint.host.clone()).map_err(std::io::Error::other)?;
            let connector = tokio_rustls::TlsConnector::from(Arc::new(tls));
            ask(connector.connect(name, socket).await?, endpoint).await
        }
        _ => ask(socket, endpoint).await,
    }
}

async fn ask(mut socket: impl AsyncRead + AsyncWrite + Unpin, endpoint: &Endpoint) -> std::io::Result<String> {
    // HTTP/1.0 has no chunks: the page is what comes until the connection closes.
    let request = format!("GET /metrics HTTP/1.0\r\nHost: {}\r\n\r\n", endpoint.authority());
    socket.write_all(request.as_bytes()).await?;
    let mut page = String::new();
    socket.take(METRICS_BYTES_MAX).read_to_string(&mut page).await?;
    Ok(page)
}

fn parse(page: &str) -> Option<ProcessMetrics> {
    let value = |name: &str| -> Option<f64> {
        page.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
            .and_then(|value| value.trim().parse().ok())
    };
    Some(ProcessMetrics {
        cpu_seconds: value("process_cpu_seconds_total")?,
        resident_bytes: value("process_resident_memory_bytes")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_page() {
        let page = "HTTP/1.0 200 OK\r\n\r\n# HELP process_cpu_seconds_total x\nprocess_cpu_seconds_total 1.5\n\
                    process_resident_memory_bytes 2.5e+07\n";
        let metrics = parse(page).unwrap();
        assert_eq!((metrics.cpu_seconds, metrics.resident_bytes), (1.5, 2.5e7));
        assert_eq!(parse("process_cpu_seconds_total 1\n"), None);
    }
}
