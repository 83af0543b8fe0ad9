//! An HTTP/2 connection, served by one task.
//!
//! What etcd's clients call most, the unary calls of KV, is answered by that task itself: see [`inline`]. Every other
//! request goes to the service of all front ends: see [`bridge`]. That is in a task of its own, but for the streams by
//! which leases are kept alive, which the connection's task hosts. All send over the same connection.
//!
//! The task reads all that has come, begins or goes on with every call that can get on, and only then writes, all
//! replies at once: see [`gather`].

mod bridge;
mod gather;
mod inline;
mod keepalive;

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use api::Store;
use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::connection::{CONNECTION_WINDOW_BYTES, HEADERS_BYTES_MAX, STREAM_WINDOW_BYTES};
use crate::service::is_grpc;
use crate::{BoxError, ConnectionSettings, Frontend};
use gather::{Gate, Gather};
use inline::Inline;
use keepalive::KeepAlive;

/// How many bytes of one stream's reply wait in the connection at a time; the rest waits in the stream (hyper's default).
const SEND_BUFFER_BYTES_MAX: usize = 400 << 10;

/// How many streams we may have to reset for what their client sent before the connection ends (hyper's default, against
/// clients that make us do it).
const RESETS_MAX: usize = 1024;

/// What frames that are smaller than 256 bytes may fall short of that, in all, while they wait to be read; beyond it the
/// connection ends. It is room for a stream's whole window of requests that keep leases alive, each in a frame of its own
/// as etcd's Go client sends them, and bounds what a client can have us hold to some 140,000 frames.
const SMALL_FRAMES_BUDGET: usize = 32 << 20;

/// A stream of many small messages, each answered before the next is read: with a task of its own each would cost wake-ups
/// there and back.
const LEASE_KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";

/// Serves a connection whose client has chosen HTTP/2, until its client is gone or, once `stop` completes, the last
/// reply is sent. Dropping it ends it at once.
///
/// # Errors
/// The connection broke, its client broke the protocol, or it left a ping unanswered.
pub(crate) async fn serve<S, I>(
    io: I,
    frontend: Frontend<S>,
    settings: &ConnectionSettings,
    stop: impl Future<Output = ()>,
) -> Result<(), BoxError>
where
    S: Store,
    I: AsyncRead + AsyncWrite + Unpin,
{
    let (io, gate) = Gather::new(io);
    let mut h2 = Builder::new()
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEADERS_BYTES_MAX)
        .max_concurrent_streams(settings.streams_max)
        .max_send_buffer_size(SEND_BUFFER_BYTES_MAX)
        .max_local_error_reset_streams(Some(RESETS_MAX))
        .data_frame_budget(SMALL_FRAMES_BUDGET)
        .handshake::<_, Bytes>(io)
        .await?;
    let keepalive = settings.keepalive_interval.and_then(|interval| {
        let pings = h2.ping_pong()?;
        Some(KeepAlive::new(pings, interval, settings.keepalive_timeout))
    });
    let mut driver = Driver {
        h2,
        gate,
        inline: Inline::new(frontend.clone()),
        frontend,
        stall_timeout: settings.http_stall_timeout,
        keepalive,
        timed_out: false,
    };
    let mut stop = pin!(stop);
    let mut stopping = false;
    std::future::poll_fn(|context| {
        if !stopping && stop.as_mut().poll(context).is_ready() {
            stopping = true;
            driver.h2.graceful_shutdown();
        }
        driver.poll(context)
    })
    .await
}

struct Driver<S: Store, I> {
    h2: Connection<Gather<I>, Bytes>,
    gate: Gate,
    inline: Inline<S>,
    frontend: Frontend<S>,
    stall_timeout: Duration,
    keepalive: Option<KeepAlive>,
    timed_out: bool,
}

impl<S, I> Driver<S, I>
where
    S: Store,
    I: AsyncRead + AsyncWrite + Unpin,
{
    /// Moves the connection on, until it ends.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inline.woken_by(context.waker());
        if let Some(keepalive) = &mut self.keepalive
            && keepalive.poll(context).is_ready()
        {
            self.keepalive = None;
            self.timed_out = true;
            self.h2.abrupt_shutdown(Reason::NO_ERROR);
        }
        loop {
            // What is queued by the calls that are begun here waits for those that can be finished now.
            self.gate.close();
            // The store learns of all requests that have come before it begins to work on the first.
            let open = api::wake::together(|| self.take_all(context));
            self.gate.open();
            if !open? {
                return Poll::Ready(self.ended());
            }
            match self.h2.poll_accept(context) {
                Poll::Ready(Some(accepted)) => self.begin(accepted?),
                Poll::Ready(None) => return Poll::Ready(self.ended()),
                // Whatever moves a call on from now on wakes this task.
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Begins all calls that have come and goes on with all that can get on; `false` once the connection has ended.
    fn take_all(&mut self, context: &mut Context<'_>) -> Result<bool, h2::Error> {
        while let Poll::Ready(next) = self.h2.poll_accept(context) {
            match next {
                Some(accepted) => self.begin(accepted?),
                None => return Ok(false),
            }
        }
        self.inline.go_on();
        Ok(true)
    }

    fn ended(&self) -> Result<(), BoxError> {
        if self.timed_out {
            return Err("the client left a ping unanswered".into());
        }
        Ok(())
    }

    fn begin(&mut self, (request, reply): (Request<RecvStream>, SendResponse<Bytes>)) {
        if let Some(keepalive) = &mut self.keepalive {
            keepalive.note_activity();
        }
        match inline::method_of(&request) {
            Some(method) if self.frontend.takes_grpc() => self.inline.begin(method, request, reply),
            None if request.uri().path() == LEASE_KEEP_ALIVE && self.frontend.takes_grpc() && is_grpc(&request) => {
                self.inline.host(bridge::guest(&self.frontend, request, reply));
            }
            _ => bridge::begin(&self.frontend, request, reply, self.stall_timeout),
        }
    }
}
