//! Requests on their way in: JSON in a body, gRPC messages out.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Frame;
use tonic::Status;

use super::decode;
use super::scan::{Scan, Scanner};
use super::schema::Message;
use crate::BoxError;

/// The bytes before each gRPC message: a flag for compression, then the message's length.
pub(super) const PREFIX_BYTES: usize = 5;

/// Reads a body to its end.
pub(super) async fn whole(mut body: Body, bytes_max: usize) -> Result<Bytes, Status> {
    // Most bodies are one piece, which need not be copied.
    let (mut first, mut rest) = (Bytes::new(), BytesMut::new());
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.map_err(broken)?.into_data() else {
            continue;
        };
        if first.len() + rest.len() + piece.len() > bytes_max {
            return Err(too_large(bytes_max));
        }
        match first.is_empty() {
            true => first = piece,
            false => rest.extend_from_slice(&piece),
        }
    }
    if rest.is_empty() {
        return Ok(first);
    }
    Ok([first, rest.freeze()].concat().into())
}

fn too_large(bytes_max: usize) -> Status {
    Status::resource_exhausted(format!("metastore: JSON larger than max ({bytes_max} bytes)"))
}

fn broken(error: axum::Error) -> Status {
    Status::invalid_argument(error.to_string())
}

/// The gRPC message that the first JSON value of a body describes; what follows it does not count. No value at all
/// stands for an empty message, as in grpc-gateway.
pub(super) fn message(body: &[u8], message: &'static Message) -> Result<Bytes, Status> {
    let mut scanner = Scanner::new();
    let found = match scanner.read(body) {
        Ok(Scan::Whole(start, end)) => Ok(Some((start, end))),
        Ok(Scan::More) => scanner.finish(),
        Err(error) => Err(error),
    };
    let wire = match found.map_err(Status::invalid_argument)? {
        Some((start, end)) => decode::decode(&body[start..end], message).map_err(Status::invalid_argument)?,
        None => Vec::new(),
    };
    Ok(framed(&wire))
}

fn framed(wire: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + wire.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(wire.len()).expect("bounded by the body's limit"));
    frame.put_slice(wire);
    frame.freeze()
}

/// A body with one JSON value after another as one with gRPC messages.
///
/// What is no request ends the client's side of the call, without an error, as in grpc-gateway; the replies go on.
pub(super) struct Stream {
    /// `None` once it has ended.
    body: Option<Body>,
    message: &'static Message,
    /// The value that is being read, and what came after its end.
    buffer: BytesMut,
    /// How much of the buffer the scanner has seen.
    scanned: usize,
    scanner: Scanner,
    bytes_max: usize,
}

impl Stream {
    pub(super) fn new(body: Body, message: &'static Message, bytes_max: usize) -> Self {
        Stream {
            body: Some(body),
            message,
            buffer: BytesMut::new(),
            scanned: 0,
            scanner: Scanner::new(),
            bytes_max,
        }
    }

    /// The next message; `None` if more must be read first, or if none is left.
    fn next(&mut self) -> Result<Option<Bytes>, String> {
        if self.scanned < self.buffer.len() {
            if let Scan::Whole(start, end) = self.scanner.read(&self.buffer[self.scanned..])? {
                return self.take(start, end).map(Some);
            }
            self.scanned = self.buffer.len();
            if self.scanner.is_blank() {
                self.restart();
                self.buffer.clear();
            }
        }
        if self.body.is_some() {
            return Ok(None);
        }
        match std::mem::replace(&mut self.scanner, Scanner::new()).finish()? {
            Some((start, end)) => self.take(start, end).map(Some),
            None => Ok(None),
        }
    }

    fn take(&mut self, start: usize, end: usize) -> Result<Bytes, String> {
        let value = self.buffer.split_to(end);
        self.restart();
        decode::decode(&value[start..], self.message).map(|wire| framed(&wire))
    }

    fn restart(&mut self) {
        self.scanner = Scanner::new();
        self.scanned = 0;
    }

    fn end(&mut self) {
        self.body = None;
        self.restart();
        self.buffer.clear();
    }
}

impl hyper::body::Body for Stream {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        loop {
            match this.next() {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(Frame::data(message)))),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(error, "a gateway stream got what is no request");
                    this.end();
                }
            }
            let Some(body) = &mut this.body else {
                return Poll::Ready(None);
            };
            match ready!(Pin::new(body).poll_frame(context)) {
                Some(Ok(frame)) => {
                    let Ok(piece) = frame.into_data() else { continue };
                    if this.buffer.len() + piece.len() > this.bytes_max {
                        this.end();
                        return Poll::Ready(Some(Err(Box::new(too_large(this.bytes_max)))));
                    }
                    this.buffer.extend_from_slice(&piece);
                }
                Some(Err(error)) => {
                    this.end();
                    return Poll::Ready(Some(Err(Box::new(broken(error)))));
                }
                None => this.body = None,
            }
        }
    }
}
