//! Replies on their way out: gRPC messages in a body, JSON out.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http::Response;
use hyper::body::{Body, Frame};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};
use tonic::{Code, Status};

use super::encode::Encoder;
use super::requests::PREFIX_BYTES;
use super::schema::Message;
use super::write_status;
use crate::{BoxError, ResponseBody, deadline};

/// The messages of a gRPC response, and its status.
pub(super) struct Messages {
    /// `None` once it has ended.
    body: Option<ResponseBody>,
    /// What came and is no whole message yet, and what came after one.
    buffer: BytesMut,
}

impl Messages {
    /// # Errors
    /// The status of a response that has nothing else.
    pub(super) fn new(response: Response<ResponseBody>) -> Result<Self, Status> {
        let (parts, body) = response.into_parts();
        // A status among the headers is all there is.
        let body = match Status::from_header_map(&parts.headers) {
            Some(status) if status.code() != Code::Ok => return Err(status),
            Some(_) => None,
            None => Some(body),
        };
        Ok(Messages {
            body,
            buffer: BytesMut::new(),
        })
    }

    /// The next message; `None` after the last one of a call that went well.
    pub(super) async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Status>>> {
        loop {
            if let Some(message) = self.buffered() {
                return Poll::Ready(Some(Ok(message)));
            }
            let Some(body) = &mut self.body else {
                return Poll::Ready(None);
            };
            let frame = match ready!(Pin::new(body).poll_frame(context)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    self.body = None;
                    return Poll::Ready(Some(Err(Status::from_error(error))));
                }
                None => {
                    self.body = None;
                    return Poll::Ready(None);
                }
            };
            match frame.into_data() {
                Ok(piece) => self.buffer.extend_from_slice(&piece),
                Err(frame) => {
                    self.body = None;
                    let status = frame.trailers_ref().and_then(Status::from_header_map);
                    if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
                        return Poll::Ready(Some(Err(status)));
                    }
                }
            }
        }
    }

    fn buffered(&mut self) -> Option<Bytes> {
        // Our own server compresses nothing, so the flag is 0.
        let mut prefix = self.buffer.get(1..PREFIX_BYTES)?;
        let length = prefix.get_u32() as usize;
        if self.buffer.len() < PREFIX_BYTES + length {
            return None;
        }
        self.buffer.advance(PREFIX_BYTES);
        Some(self.buffer.split_to(length).freeze())
    }
}

/// A response's body: each message as a line of JSON, and an error as the last one.
pub(super) struct Lines {
    /// `None` once the last line is out.
    messages: Option<Messages>,
    first: Option<Bytes>,
    message: &'static Message,
    deadline: Option<Pin<Box<Sleep>>>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Lines {
    pub(super) fn new(
        messages: Messages,
        first: Option<Bytes>,
        message: &'static Message,
        permit: Option<OwnedSemaphorePermit>,
        deadline: Option<Instant>,
    ) -> Self {
        Lines {
            messages: Some(messages),
            first,
            message,
            deadline: deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline))),
            _permit: permit,
        }
    }

    fn line(&self, wire: &[u8]) -> Result<Vec<u8>, Status> {
        let mut json = Encoder::new(true);
        json.raw("{\"result\":");
        json.message(wire, self.message)
            .map_err(|error| Status::internal(error.to_string()))?;
        json.raw("}\n");
        Ok(json.finish())
    }
}

pub(super) fn last_line(status: &Status) -> Vec<u8> {
    let mut json = Encoder::new(true);
    json.raw("{\"error\":");
    write_status(&mut json, status);
    json.raw("}\n");
    json.finish()
}

impl Body for Lines {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let Some(messages) = &mut this.messages else {
            return Poll::Ready(None);
        };
        let next = match this.first.take() {
            Some(first) => Some(Ok(first)),
            None => match messages.poll_next(context) {
                Poll::Ready(next) => next,
                Poll::Pending => match &mut this.deadline {
                    Some(deadline) => {
                        ready!(deadline.as_mut().poll(context));
                        Some(Err(deadline::exceeded()))
                    }
                    None => return Poll::Pending,
                },
            },
        };
        let line = match next {
            Some(Ok(message)) => this.line(&message),
            Some(Err(status)) => Err(status),
            None => {
                this.messages = None;
                return Poll::Ready(None);
            }
        };
        let line = line.unwrap_or_else(|status| {
            // Dropped with what it still had to say, which cancels the call.
            this.messages = None;
            last_line(&status)
        });
        Poll::Ready(Some(Ok(Frame::data(line.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.messages.is_none()
    }
}
