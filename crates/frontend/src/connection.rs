//! One client connection.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use api::Store;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{BoxError, Frontend, Traffic};

/// What one stream may have sent to us without our having read it, in bytes.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;

/// The same for all streams of a connection together.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// The largest set of headers, in bytes: room for a token and whatever proxies add.
const HEADERS_BYTES_MAX: u32 = 64 << 10;

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
}

impl Default for ConnectionSettings {
    fn default() -> Self {
        ConnectionSettings {
            streams_max: u32::MAX,
            keepalive_interval: Some(Duration::from_secs(2 * 60 * 60)),
            keepalive_timeout: Duration::from_secs(20),
        }
    }
}

/// Serves a connection, HTTP/1.1 or HTTP/2 by prior knowledge, until its client is gone.
///
/// Once `stop` completes, no new requests are taken and it ends with the last response. Dropping it ends it at once.
pub async fn serve_connection<S, I>(
    io: I,
    frontend: Frontend<S>,
    settings: &ConnectionSettings,
    stop: impl Future<Output = ()>,
) -> Result<(), BoxError>
where
    S: Store,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = Builder::new(TokioExecutor::new());
    if frontend.listener().traffic == Traffic::Grpc {
        builder = builder.http2_only();
    }
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HTTP1_HEADERS_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEADERS_BYTES_MAX)
        .max_concurrent_streams(settings.streams_max)
        .keep_alive_interval(settings.keepalive_interval)
        .keep_alive_timeout(settings.keepalive_timeout);
    let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(io), frontend));
    tokio::select! {
        served = connection.as_mut() => return served,
        () = stop => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}
