//! Hands a request to the service of all front ends, and its response to the connection, as hyper's HTTP/2 server does.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use api::Store;
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONNECTION, CONTENT_LENGTH, DATE, EXPECT, HeaderName, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Request};
use hyper::body::{Body, Frame, SizeHint};

use super::inline::Guest;
use crate::etcd;
use crate::service::ResponseBody;
use crate::{BoxError, Frontend};

/// Headers that are about one connection of HTTP/1.1 and have no place in HTTP/2.
const CONNECTION_HEADERS: [HeaderName; 6] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Answers a request in a task of its own. It ends with its connection, or when its client gives the request up or, over
/// plain HTTP, takes nothing of the answer for too long.
pub(super) fn begin<S: Store>(
    frontend: &Frontend<S>,
    request: Request<RecvStream>,
    reply: SendResponse<Bytes>,
    stall_timeout: Duration,
) {
    let frontend = frontend.clone();
    tokio::spawn(async move {
        let manners = Manners {
            stall_timeout,
            burst_bytes_max: usize::MAX,
        };
        if let Err(error) = answer(&frontend, request, reply, manners).await {
            tracing::debug!(%error, "a stream ended early");
        }
    });
}

/// What answers a gRPC request on a task that others wait for: it lets them have their turn after a burst of replies.
pub(super) fn guest<S: Store>(
    frontend: &Frontend<S>,
    request: Request<RecvStream>,
    reply: SendResponse<Bytes>,
) -> Guest {
    let frontend = frontend.clone();
    Box::pin(async move {
        let manners = Manners {
            stall_timeout: Duration::MAX,
            burst_bytes_max: BURST_BYTES_MAX,
        };
        if let Err(error) = answer(&frontend, request, reply, manners).await {
            tracing::debug!(%error, "a stream ended early");
        }
    })
}

/// What an answer does to whom.
#[derive(Clone, Copy)]
struct Manners {
    /// How long a client of plain HTTP may take nothing of it.
    stall_timeout: Duration,
    /// After a piece of more than this others have their turn.
    burst_bytes_max: usize,
}

/// Some five replies to a lease that is kept alive.
const BURST_BYTES_MAX: usize = 256;

async fn answer<S: Store>(
    frontend: &Frontend<S>,
    mut request: Request<RecvStream>,
    mut reply: SendResponse<Bytes>,
    manners: Manners,
) -> Result<(), BoxError> {
    // Nothing is said in between here, so whoever waits for that sends its body after a while all the same.
    request.headers_mut().remove(EXPECT);
    let grpc = frontend.is_grpc(&request);
    let length = content_length(request.headers());
    let mut response = pin!(frontend.respond(request.map(|stream| Incoming { stream, length, grpc })));
    let response = poll_fn(|context| {
        if let Poll::Ready(response) = response.as_mut().poll(context) {
            return Poll::Ready(Ok(response));
        }
        // Registers for the client's giving up as well.
        match ready!(reply.poll_reset(context)) {
            Ok(reason) => Poll::Ready(Err(h2::Error::from(reason))),
            Err(error) => Poll::Ready(Err(error)),
        }
    });
    let Ok(response) = response.await?;
    let (mut head, body) = response.into_parts();
    for name in &CONNECTION_HEADERS {
        head.headers.remove(name);
    }
    if !grpc && !head.headers.contains_key(DATE) {
        let now = httpdate::fmt_http_date(SystemTime::now());
        head.headers.insert(DATE, HeaderValue::try_from(now)?);
    }
    let ended = body.is_end_stream();
    if !ended
        && !grpc
        && let Some(length) = body.size_hint().exact()
    {
        head.headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
    }
    let stream = reply.send_response(http::Response::from_parts(head, ()), ended)?;
    if ended {
        return Ok(());
    }
    let stall_timeout = (!grpc).then_some(manners.stall_timeout);
    send(body, stream, stall_timeout, manners.burst_bytes_max).await
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Sends a body, a piece whenever there is room for some of it. With a `stall_timeout` no more than there is room for, so
/// that it shows when a client takes nothing.
async fn send(
    body: ResponseBody,
    mut stream: SendStream<Bytes>,
    stall_timeout: Option<Duration>,
    burst_bytes_max: usize,
) -> Result<(), BoxError> {
    let mut body = pin!(body);
    loop {
        let frame = poll_fn(|context| {
            if let Poll::Ready(reason) = stream.poll_reset(context)? {
                return Poll::Ready(Err(reset(reason)));
            }
            body.as_mut().poll_frame(context).map(Ok)
        });
        let frame = match frame.await? {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                stream.send_reset(Reason::INTERNAL_ERROR);
                return Err(error);
            }
            None => {
                stream.send_data(Bytes::new(), true)?;
                return Ok(());
            }
        };
        let mut data = match frame.into_data() {
            Ok(data) => data,
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    stream.send_trailers(trailers)?;
                    return Ok(());
                }
                continue;
            }
        };
        if let Some(timeout) = stall_timeout {
            while !data.is_empty() {
                stream.reserve_capacity(data.len());
                let waited = tokio::time::timeout(timeout, poll_fn(|context| room(&mut stream, context))).await;
                let Ok(waited) = waited else {
                    stream.send_reset(Reason::CANCEL);
                    return Err("the client takes nothing of its answer".into());
                };
                waited?;
                let some = data.split_to(data.len().min(stream.capacity()));
                if data.is_empty() {
                    data = some;
                    break;
                }
                stream.send_data(some, false)?;
            }
        } else if !data.is_empty() {
            // One byte's worth of the client's window says that it reads; more would keep it from other streams.
            stream.reserve_capacity(1);
            poll_fn(|context| room(&mut stream, context)).await?;
        }
        let ended = body.is_end_stream();
        let is_burst = data.len() > burst_bytes_max;
        stream.send_data(data, ended)?;
        if ended {
            return Ok(());
        }
        if is_burst {
            etcd::others_turn().await;
        }
    }
}

/// Waits until some of a piece may be sent.
fn room(stream: &mut SendStream<Bytes>, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
    if let Poll::Ready(reason) = stream.poll_reset(context)? {
        return Poll::Ready(Err(reset(reason)));
    }
    while stream.capacity() == 0 {
        match ready!(stream.poll_capacity(context)) {
            Some(capacity) => drop(capacity?),
            None => return Poll::Ready(Err("the stream is closed".into())),
        }
    }
    Poll::Ready(Ok(()))
}

fn reset(reason: Reason) -> BoxError {
    h2::Error::from(reason).into()
}

/// A request's body. The client may send more of it once we have taken what it sent.
struct Incoming {
    stream: RecvStream,
    /// What the client said.
    length: Option<u64>,
    grpc: bool,
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        match ready!(self.stream.poll_data(context)) {
            Some(Ok(data)) => {
                // Only a stream that is done with may refuse this, and then nobody waits for the capacity.
                let _ = self.stream.flow_control().release_capacity(data.len());
                self.length = self.length.map(|length| length.saturating_sub(data.len() as u64));
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            // The client has nothing more to say, and nothing against our saying more. Over plain HTTP it has given up: what
            // came of its body is not the value that it meant to write.
            Some(Err(error)) if self.grpc && matches!(error.reason(), Some(Reason::NO_ERROR | Reason::CANCEL)) => {
                return Poll::Ready(None);
            }
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => {}
        }
        let trailers = ready!(self.stream.poll_trailers(context))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
