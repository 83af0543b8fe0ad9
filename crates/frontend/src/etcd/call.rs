//! What every call goes through on its way in and out: the size limit, counting, and what may cut a stream short.

use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};
use tonic::{Code, Status};

use super::methods::Method;
use crate::{BoxError, CallSpan, CallTracer, Observer};

/// Ends a call from the server's side when it completes.
pub(crate) type Guard = Pin<Box<dyn Future<Output = Status> + Send>>;

/// Among a request's extensions: the member that it came to has no vote.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByLearner;

/// One call, from its start to its status. Dropped before, it counts as cancelled.
pub(crate) struct Call {
    method: &'static Method,
    observer: Arc<dyn Observer>,
    begun: Instant,
    /// Where the call is traced.
    span: Option<Box<dyn CallSpan>>,
    ended: bool,
}

impl Call {
    pub(crate) fn start(method: &'static Method, observer: Arc<dyn Observer>) -> Self {
        observer.started(method);
        Call {
            method,
            observer,
            begun: Instant::now(),
            span: None,
            ended: false,
        }
    }

    /// Traces the call, if it is sampled.
    pub(crate) fn trace(&mut self, tracer: &dyn CallTracer, headers: &HeaderMap) {
        self.span = tracer.start(self.method, headers);
    }

    pub(crate) fn end(&mut self, code: Code) {
        if !self.ended {
            self.ended = true;
            self.observer
                .handled(self.method, code as i32 as usize, self.begun.elapsed());
            if let Some(span) = self.span.take() {
                span.end(code as i32 as usize);
            }
        }
    }

    /// One reply goes out, of this many bytes.
    pub(crate) fn sent(&self, bytes: u64) {
        self.observer.sent(self.method, 1, bytes);
    }

    /// The status of a handler that panicked: a bug, which must cost no more than this call.
    pub(crate) fn panicked(&self, panic: &(dyn Any + Send)) -> Status {
        let reason = panic_text(panic);
        tracing::error!(
            service = self.method.service,
            method = self.method.name,
            reason,
            "a call panicked"
        );
        Status::internal("metastore: internal error, see the server's log")
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "unknown",
    }
}

/// The bytes before each gRPC message: a flag for compression, then the message's length.
const PREFIX_BYTES: usize = 5;

/// Finds the messages in a gRPC body, whatever pieces it comes in.
#[derive(Debug, Default)]
struct Messages {
    prefix: [u8; PREFIX_BYTES],
    prefix_len: usize,
    /// What is left of the current message.
    left: usize,
}

/// Messages that began, and their length.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    count: u64,
    bytes: u64,
    largest: usize,
}

impl Messages {
    fn advance(&mut self, mut piece: &[u8]) -> Tally {
        let mut tally = Tally::default();
        loop {
            let skipped = self.left.min(piece.len());
            self.left -= skipped;
            piece = &piece[skipped..];
            if piece.is_empty() {
                return tally;
            }
            let taken = (PREFIX_BYTES - self.prefix_len).min(piece.len());
            self.prefix[self.prefix_len..self.prefix_len + taken].copy_from_slice(&piece[..taken]);
            self.prefix_len += taken;
            piece = &piece[taken..];
            if self.prefix_len == PREFIX_BYTES {
                self.prefix_len = 0;
                let [_, length @ ..] = self.prefix;
                self.left = u32::from_be_bytes(length) as usize;
                tally.count += 1;
                tally.bytes += self.left as u64;
                tally.largest = tally.largest.max(self.left);
            }
        }
    }
}

/// A request's body, held against the size limit.
pub(crate) struct Inbound<B> {
    body: B,
    messages: Messages,
    message_bytes_max: usize,
    method: &'static Method,
    observer: Arc<dyn Observer>,
}

impl<B> Inbound<B> {
    pub(crate) fn new(body: B, message_bytes_max: usize, method: &'static Method, observer: Arc<dyn Observer>) -> Self {
        Inbound {
            body,
            messages: Messages::default(),
            message_bytes_max,
            method,
            observer,
        }
    }
}

impl<B> Body for Inbound<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let Some(frame) = ready!(Pin::new(&mut this.body).poll_frame(context)) else {
            return Poll::Ready(None);
        };
        let frame = frame.map_err(Into::into)?;
        if let Some(data) = frame.data_ref() {
            let tally = this.messages.advance(data);
            if tally.largest > this.message_bytes_max {
                // tonic has a limit of its own, with another code and other words.
                return Poll::Ready(Some(Err(Box::new(Status::resource_exhausted(format!(
                    "grpc: received message larger than max ({} vs. {})",
                    tally.largest, this.message_bytes_max
                ))))));
            }
            if tally.count > 0 {
                this.observer.received(this.method, tally.count, tally.bytes);
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A reply's body, until its status.
pub(crate) struct Outbound {
    /// `None` once it has ended.
    body: Option<tonic::body::Body>,
    messages: Messages,
    call: Call,
    guard: Option<Guard>,
}

impl Outbound {
    pub(crate) fn new(body: tonic::body::Body, call: Call, guard: Option<Guard>) -> Self {
        Outbound {
            body: Some(body),
            messages: Messages::default(),
            call,
            guard,
        }
    }

    /// Ends the body with a status of ours.
    fn cut(&mut self, status: &Status) -> Frame<Bytes> {
        self.body = None;
        self.call.end(status.code());
        let mut trailers = HeaderMap::with_capacity(2);
        if let Err(error) = status.add_header(&mut trailers) {
            // Only text that no header can carry fails, and ours can; without a status, clients report Unknown.
            tracing::error!(%error, "a status does not fit into headers");
        }
        Frame::trailers(trailers)
    }
}

impl Body for Outbound {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else {
            return Poll::Ready(None);
        };
        if let Some(guard) = &mut this.guard
            && let Poll::Ready(status) = guard.as_mut().poll(context)
        {
            return Poll::Ready(Some(Ok(this.cut(&status))));
        }
        let polled = match catch_unwind(AssertUnwindSafe(|| Pin::new(body).poll_frame(context))) {
            Ok(polled) => polled,
            Err(panic) => {
                let status = this.call.panicked(&*panic);
                return Poll::Ready(Some(Ok(this.cut(&status))));
            }
        };
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    let tally = this.messages.advance(data);
                    if tally.count > 0 {
                        this.call.observer.sent(this.call.method, tally.count, tally.bytes);
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    this.call.end(code_in(trailers).unwrap_or(Code::Unknown));
                }
            }
            Poll::Ready(Some(Err(status))) => this.call.end(status.code()),
            Poll::Ready(None) => this.body = None,
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// The status code in headers or trailers, if there is one.
pub(crate) fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers
        .get("grpc-status")
        .map(|value| Code::from_bytes(value.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_in_any_pieces() {
        let mut body = Vec::new();
        for length in [0_usize, 1, 300, 0, 70_000] {
            body.push(0);
            body.extend_from_slice(&u32::try_from(length).expect("small").to_be_bytes());
            body.resize(body.len() + length, 0xaa);
        }
        for size in [1, 2, 3, 5, 7, 100, body.len()] {
            let mut messages = Messages::default();
            let mut sum = Tally::default();
            for piece in body.chunks(size) {
                let tally = messages.advance(piece);
                sum.count += tally.count;
                sum.bytes += tally.bytes;
                sum.largest = sum.largest.max(tally.largest);
            }
            let expected = Tally {
                count: 5,
                bytes: 70_301,
                largest: 70_000,
            };
            assert_eq!(sum, expected, "in pieces of {size}");
        }
    }
}
