//! Connections, whatever they are made of.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::address::{PeerUrl, Place};
use super::frame::{FrameReader, FrameWriter};
use super::settings::Tls;
use crate::tls::HandshakeError;

/// A connection's bytes.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// TCP or Unix, plain or in TLS.
pub(super) type Stream = Box<dyn Duplex>;
/// Frames from it.
pub(super) type Reader = FrameReader<ReadHalf<Stream>>;
/// Frames to it.
pub(super) type Writer = FrameWriter<WriteHalf<Stream>>;

/// Connects to a URL, in TLS if it says so, from a local address if one is given.
pub(super) async fn connect(url: &PeerUrl, tls: &Tls, local: Option<IpAddr>) -> io::Result<Stream> {
    let plain: Stream = match &url.place {
        Place::Tcp { host, port } => Box::new(connect_tcp(host, *port, local).await?),
        Place::Unix(path) => Box::new(UnixStream::connect(path).await?),
    };
    if !url.tls {
        return Ok(plain);
    }
    let factory = tls
        .client
        .as_ref()
        .ok_or_else(|| io::Error::other("the URL asks for TLS, which is not set up for peers"))?;
    let config = factory().map_err(io::Error::other)?;
    let name = ServerName::try_from(url.server_name().to_owned()).map_err(io::Error::other)?;
    let stream = TlsConnector::from(config).connect(name, plain).await?;
    verify(tls, stream.get_ref().1.peer_certificates())?;
    Ok(Box::new(stream))
}

async fn connect_tcp(host: &str, port: u16, local: Option<IpAddr>) -> io::Result<TcpStream> {
    let mut last_error = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in tokio::net::lookup_host((host, port)).await? {
        let attempt = async {
            let socket = if address.is_ipv4() {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            }?;
            socket.set_keepalive(true)?;
            // Heartbeats and votes must not wait for more to send.
            socket.set_nodelay(true)?;
            if let Some(local) = local {
                socket.bind(SocketAddr::new(local, 0))?;
            }
            socket.connect(address).await
        };
        match attempt.await {
            Ok(stream) => return Ok(stream),
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

/// Speaks TLS as the accepting side. `origin` says where the connection comes from.
pub(super) async fn accept_tls(plain: Stream, tls: &Tls, origin: &str) -> Result<Stream, HandshakeError> {
    let accepted = try_accept_tls(plain, tls, origin).await;
    accepted.map_err(|error| {
        let error = HandshakeError::from(error);
        if let Some(log_rejected) = &tls.log_rejected {
            log_rejected(origin, &error);
        }
        error
    })
}

async fn try_accept_tls(plain: Stream, tls: &Tls, origin: &str) -> io::Result<Stream> {
    let factory = tls
        .server
        .as_ref()
        .ok_or_else(|| io::Error::other("TLS is not set up for peers"))?;
    let config = factory().map_err(io::Error::other)?;
    let stream = TlsAcceptor::from(config).accept(plain).await?;
    verify(tls, stream.get_ref().1.peer_certificates())?;
    if let Some(verify) = &tls.verify_accepted {
        let verified = verify(stream.get_ref().1, origin.parse().ok());
        verified
            .await
            .map_err(|error| io::Error::other(format!("the certificate will not do: {error}")))?;
    }
    Ok(Box::new(stream))
}

fn verify(tls: &Tls, certificates: Option<&[CertificateDer<'static>]>) -> io::Result<()> {
    match &tls.verify_peer {
        Some(verify) => verify(certificates.unwrap_or_default())
            .map_err(|reason| io::Error::other(format!("the certificate will not do: {reason}"))),
        None => Ok(()),
    }
}
