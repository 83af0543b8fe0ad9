//! A gateway call over a WebSocket: each message from the client is a part of the request's body, each line of the reply
//! a message to it, as etcd's grpc-websocket-proxy has it.

use axum::body::Body;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_TYPE, COOKIE, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method as HttpMethod, Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::Frame;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use sha1::{Digest, Sha1};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use super::JSON_BYTES_PER_BYTE;
use crate::{BoxError, Frontend};
use api::Store;

/// What is hashed together with a client's key (RFC 6455, section 1.3).
const ACCEPT_SUFFIX: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// The version that there is.
const VERSION: &str = "13";

/// A token may come as a sub-protocol, since browsers let scripts set no other header.
const BEARER: &str = "Bearer";

/// Messages that wait for the call to take them.
const MESSAGES_WAITING_MAX: usize = 1;

/// Whether a request wants to go on as a WebSocket.
pub(super) fn is_upgrade(headers: &HeaderMap) -> bool {
    has_token(headers, CONNECTION, "upgrade") && has_token(headers, UPGRADE, "websocket")
}

fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    let values = headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .any(|value| value.trim().eq_ignore_ascii_case(token))
}

/// Turns the connection into a WebSocket, if all is well, and makes the call over it.
pub(super) fn accept<S: Store>(frontend: Frontend<S>, mut request: Request<Body>) -> Response<Body> {
    let headers = request.headers();
    if request.method() != HttpMethod::GET {
        return refuse(StatusCode::METHOD_NOT_ALLOWED);
    }
    let version = headers.get(SEC_WEBSOCKET_VERSION);
    let key = headers.get(SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes);
    let key = key.filter(|key| STANDARD.decode(key).is_ok_and(|key| key.len() == 16));
    let (Some(key), true) = (key, version.is_some_and(|version| version == VERSION)) else {
        return refuse(StatusCode::BAD_REQUEST);
    };
    // HTTP/2 upgrades otherwise, and no client of etcd's asks for it.
    if request.version() != Version::HTTP_11 {
        return refuse(StatusCode::BAD_REQUEST);
    }
    let accept = STANDARD.encode(Sha1::new().chain_update(key).chain_update(ACCEPT_SUFFIX).finalize());
    let Ok(accept) = HeaderValue::try_from(accept) else {
        return refuse(StatusCode::BAD_REQUEST);
    };
    let bearer = headers
        .get(SEC_WEBSOCKET_PROTOCOL)
        .is_some_and(|protocol| protocol.as_bytes().starts_with(BEARER.as_bytes()));
    let call = call_of(&request);
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(connection) => serve(frontend, connection, call).await,
            Err(error) => tracing::debug!(%error, "a connection did not become a WebSocket"),
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    if bearer {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(BEARER));
    }
    response
}

fn refuse(status: StatusCode) -> Response<Body> {
    let reason = status.canonical_reason().unwrap_or_default();
    let mut response = Response::new(Body::from(format!("{reason}\n")));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static(VERSION));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// The request that is made over the WebSocket: a POST, whatever the upgrade was. Of the headers it has a token alone,
/// from the sub-protocol or, before that, from a cookie.
fn call_of(request: &Request<Body>) -> Request<()> {
    let mut call = Request::new(());
    *call.method_mut() = HttpMethod::POST;
    *call.uri_mut() = request.uri().clone();
    let headers = request.headers();
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let protocol = text(SEC_WEBSOCKET_PROTOCOL).and_then(|protocol| protocol.split_once("Bearer,"));
    let cookie = text(COOKIE).and_then(|cookies| {
        let mut pairs = cookies.split(';').filter_map(|cookie| cookie.trim().split_once('='));
        pairs.find(|(name, _)| *name == "token").map(|(_, token)| token)
    });
    let token = cookie.or(protocol.map(|(_, token)| token.trim()));
    if let Some(token) = token
        && let Ok(value) = HeaderValue::try_from(format!("{BEARER} {token}"))
    {
        call.headers_mut().insert(AUTHORIZATION, value);
    }
    call
}

async fn serve<S: Store>(frontend: Frontend<S>, connection: Upgraded, call: Request<()>) {
    let message_bytes_max = frontend.message_bytes_max().saturating_mul(JSON_BYTES_PER_BYTE);
    let config = WebSocketConfig::default()
        .max_message_size(Some(message_bytes_max))
        .max_frame_size(Some(message_bytes_max));
    let io = TokioIo::new(connection);
    let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    let (sender, receiver) = mpsc::channel(MESSAGES_WAITING_MAX);
    let request = call.map(|()| Body::new(Messages(receiver)));
    let mut state = State::Begins(Box::pin(super::call(&frontend, request)));
    loop {
        let sent = tokio::select! {
            line = state.next() => match line {
                Some(line) => socket.send(Message::text(line)).await,
                None => break,
            },
            // Not read before there is room for it.
            message = next_message(&mut socket, &sender) => match message {
                true => Ok(()),
                false => break,
            },
        };
        if sent.is_err() {
            return;
        }
    }
    // The client may be gone; there is nothing to do about that.
    drop(socket.close(None).await);
}

/// Hands the client's next message to the call; `false` once there will be none.
async fn next_message(socket: &mut WebSocketStream<TokioIo<Upgraded>>, sender: &mpsc::Sender<Bytes>) -> bool {
    // A call that takes no more may go on replying; what else comes is dropped, and the client's end is seen.
    let room = sender.reserve().await.ok();
    let data = match socket.next().await {
        Some(Ok(Message::Text(text))) => Bytes::from(text),
        Some(Ok(Message::Binary(data))) => data,
        // Pings are answered by the library.
        Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => return true,
        Some(Ok(Message::Close(_)) | Err(_)) | None => return false,
    };
    if let Some(room) = room {
        let mut line = BytesMut::with_capacity(data.len() + 1);
        line.extend_from_slice(&data);
        line.put_u8(b'\n');
        room.send(line.freeze());
    }
    true
}

/// The messages from a client as a body.
struct Messages(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Messages {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.0
            .poll_recv(context)
            .map(|message| message.map(|data| Ok(Frame::data(data))))
    }
}

/// How far the reply is.
enum State<F> {
    Begins(Pin<Box<F>>),
    Goes(Body),
}

impl<F: Future<Output = Response<Body>>> State<F> {
    /// The next line of the reply; `None` after the last. Nothing is lost if it is dropped before.
    async fn next(&mut self) -> Option<String> {
        loop {
            match self {
                State::Begins(call) => *self = State::Goes(call.await.into_body()),
                State::Goes(body) => {
                    let Some(Ok(frame)) = body.frame().await else {
                        return None;
                    };
                    // The gateway writes a line in one piece.
                    if let Ok(line) = frame.into_data() {
                        return Some(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned());
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_by_protocol_or_cookie() {
        for (name, value, expected) in [
            ("sec-websocket-protocol", "Bearer, abc.1", Some("Bearer abc.1")),
            ("sec-websocket-protocol", "Bearer,abc.1", Some("Bearer abc.1")),
            ("sec-websocket-protocol", "chat", None),
            ("cookie", "a=b; token=abc.1", Some("Bearer abc.1")),
            ("cookie", "atoken=abc.1", None),
            ("authorization", "abc.1", None),
        ] {
            let request = Request::get("/v3/watch?method=GET").header(name, value);
            let call = call_of(&request.body(Body::empty()).expect("whole"));
            assert_eq!(call.method(), HttpMethod::POST);
            let token = call
                .headers()
                .get(AUTHORIZATION)
                .map(|value| value.to_str().expect("text"));
            assert_eq!(token, expected, "{name}: {value}");
        }
    }
}
