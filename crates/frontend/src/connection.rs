//! One client connection.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use api::Store;
use bytes::{Bytes, BytesMut};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::{BoxError, Frontend, Traffic, h2_server};

/// What one stream may have sent to us without our having read it, in bytes.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 1 << 20;

/// The same for all streams of a connection together.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// The largest set of headers, in bytes: room for a token and whatever proxies add.
pub(crate) const HEADERS_BYTES_MAX: u32 = 64 << 10;

/// How long an HTTP/1.1 client may take for its headers (etcd's `ReadHeaderTimeout`).
const HTTP1_HEADERS_TIMEOUT: Duration = Duration::from_secs(300);

/// What the operator sets about connections.
#[derive(Debug, Clone)]
pub struct ConnectionSettings {
    /// Most calls in flight on one connection (`--max-concurrent-streams`).
    pub streams_max: u32,
    /// After how long without traffic a client is asked whether it is still there (`--grpc-keepalive-interval`); `None`
    /// for never.
    pub keepalive_interval: Option<Duration>,
    /// How long it may take to answer (`--grpc-keepalive-timeout`).
    pub keepalive_timeout: Duration,
    /// How long an HTTP client may take nothing of an answer that waits for it. Then its connection is closed, or over
    /// HTTP/2, where it may well take other answers, its stream. Streams of gRPC may wait as long as they like, as in
    /// etcd: what waits for them is bounded.
    pub http_stall_timeout: Duration,
}

impl Default for ConnectionSettings {
    fn default() -> Self {
        ConnectionSettings {
            streams_max: u32::MAX,
            keepalive_interval: Some(Duration::from_secs(2 * 60 * 60)),
            keepalive_timeout: Duration::from_secs(20),
            http_stall_timeout: Duration::from_secs(30),
        }
    }
}

/// What an HTTP/2 client sends first of all.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Serves a connection, HTTP/1.1 or HTTP/2 by prior knowledge, until its client is gone.
///
/// Once `stop` completes, no new requests are taken and it ends with the last response. Dropping it ends it at once.
pub async fn serve_connection<S, I>(
    mut io: I,
    frontend: Frontend<S>,
    settings: &ConnectionSettings,
    stop: impl Future<Output = ()>,
) -> Result<(), BoxError>
where
    S: Store,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut stop = pin!(stop);
    let (first, is_http2) = tokio::select! {
        first = read_first(&mut io) => first?,
        () = stop.as_mut() => return Ok(()),
    };
    let io = Rewound { first, io };
    if is_http2 {
        return h2_server::serve(io, frontend, settings, stop).await;
    }
    if frontend.listener().traffic == Traffic::Grpc {
        return Err("this listener speaks HTTP/2 alone".into());
    }
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HTTP1_HEADERS_TIMEOUT);
    let io = StallGuard::new(io, settings.http_stall_timeout);
    let connection = builder.serve_connection(TokioIo::new(io), frontend);
    let mut connection = pin!(connection.with_upgrades());
    tokio::select! {
        served = connection.as_mut() => return Ok(served?),
        () = stop => connection.as_mut().graceful_shutdown(),
    }
    Ok(connection.await?)
}

/// Reads until it is clear whether HTTP/2 is spoken. Returns what was read, and that.
async fn read_first(io: &mut (impl AsyncRead + Unpin)) -> io::Result<(Bytes, bool)> {
    let mut first = BytesMut::with_capacity(PREFACE.len());
    while first.len() < PREFACE.len() {
        let mut rest = [0; PREFACE.len()];
        let read = io.read(&mut rest[first.len()..]).await?;
        let came = first.len()..first.len() + read;
        first.extend_from_slice(&rest[came.clone()]);
        if read == 0 || first[came.clone()] != PREFACE[came] {
            return Ok((first.freeze(), false));
        }
    }
    Ok((first.freeze(), true))
}

/// A stream whose first bytes were read already, and are read again.
struct Rewound<I> {
    first: Bytes,
    io: I,
}

impl<I: AsyncRead + Unpin> AsyncRead for Rewound<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.io).poll_read(context, buffer);
        }
        let taken = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first.split_to(taken));
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Rewound<I> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

/// A connection that fails once its other end has taken nothing for too long. While a write
/// waits nobody asks for the rest of the answer, so that nothing above would ever notice.
struct StallGuard<I> {
    io: I,
    timeout: Duration,
    /// Runs from the first write that waits until one does not; none before the first that ever waits.
    timer: Option<Pin<Box<Sleep>>>,
    waiting: bool,
}

impl<I> StallGuard<I> {
    fn new(io: I, timeout: Duration) -> Self {
        StallGuard {
            io,
            timeout,
            timer: None,
            waiting: false,
        }
    }

    fn watch<T>(&mut self, polled: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.waiting = false;
            return polled;
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(self.timeout)));
        if !std::mem::replace(&mut self.waiting, true) {
            timer.as_mut().reset(Instant::now() + self.timeout);
        }
        ready!(timer.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client takes nothing of its answer",
        )))
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for StallGuard<I> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(context, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for StallGuard<I> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_write(context, bytes);
        this.watch(polled, context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_write_vectored(context, slices);
        this.watch(polled, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_flush(context);
        this.watch(polled, context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_shutdown(context);
        this.watch(polled, context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    /// The clock stands still but for what is waited for.
    #[tokio::test(start_paused = true)]
    async fn clients_that_take_nothing_are_cut_off() {
        let timeout = Duration::from_secs(30);
        let (mut client, server) = tokio::io::duplex(10);
        let mut guard = StallGuard::new(server, timeout);
        guard.write_all(&[0; 10]).await.expect("there is room");
        // One that takes something now and then stays, however slow it is.
        let reading = tokio::spawn(async move {
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_secs(20)).await;
                client.read_exact(&mut [0; 1]).await.expect("there is something");
            }
            client
        });
        guard.write_all(&[0; 10]).await.expect("it is taken");
        let _client = reading.await.expect("it ends");
        let begun = Instant::now();
        let written = tokio::time::timeout(timeout * 10, guard.write_all(&[0; 20])).await;
        let error = written.expect("it ends in time").expect_err("it fails");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed(), timeout);
    }
}
