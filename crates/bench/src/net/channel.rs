//! One HTTP/2 connection to a server, made again whenever it is lost.
//!
//! All of a channel lives on one thread, so nothing here is locked (the h2 library's own lock never waits).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Uri};
use prost::Message;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::spawn_local;

use super::endpoint::Endpoint;
use super::failure::{Failure, Kind, UNAUTHENTICATED};
use super::grpc::{Deframer, Method, frame, outcome};
use super::security::Security;
use crate::proto::{AuthenticateRequest, AuthenticateResponse};

/// What a stream, and what a connection, may have on the way to us, in bytes: enough never to hold a server back.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 256 << 20;
/// Largest HTTP/2 frame we take, in bytes.
const FRAME_BYTES_MAX: u32 = 1 << 20;
/// Pauses between attempts to connect: the first, doubled up to the last.
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_LAST: Duration = Duration::from_secs(1);

/// A connection and how to make it again.
pub(crate) struct Channel {
    endpoint: Endpoint,
    security: Security,
    /// How long a call may take.
    timeout: Duration,
    uris: [Uri; Method::ALL.len()],
    headers: RefCell<HeaderMap>,
    sender: RefCell<Option<SendRequest<Bytes>>>,
    /// Why there is no connection, while there is none.
    why: RefCell<String>,
    /// Told when `sender` is set.
    connected: Notify,
    /// Told when a call found the connection unusable and took `sender` away.
    lost: Notify,
    /// Counts connections, so that a call which outlived its connection does not end the next.
    generation: Cell<u64>,
    reconnects: Cell<u64>,
}

impl Channel {
    /// Connects, and from then on connects again by itself. Must be called within a `LocalSet`.
    pub(crate) async fn open(endpoint: Endpoint, security: Security, timeout: Duration) -> Result<Rc<Self>, Failure> {
        let uris = Method::ALL.map(|method| {
            Uri::builder()
                .scheme(endpoint.scheme())
                .authority(endpoint.authority())
                .path_and_query(method.path())
                .build()
                .expect("the endpoint was parsed as a URI")
        });
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        headers.insert("te", HeaderValue::from_static("trailers"));
        let channel = Rc::new(Channel {
            endpoint,
            security,
            timeout,
            uris,
            headers: RefCell::new(headers),
            sender: RefCell::default(),
            why: RefCell::default(),
            connected: Notify::new(),
            lost: Notify::new(),
            generation: Cell::new(0),
            reconnects: Cell::new(0),
        });
        let driver = channel.connect().await?;
        spawn_local(Rc::clone(&channel).keep(driver));
        Ok(channel)
    }

    /// How often the connection was lost.
    pub(crate) fn reconnects(&self) -> u64 {
        self.reconnects.get()
    }

    /// One request, one answer: returns the answer's message.
    pub(crate) async fn unary(&self, method: Method, request: Bytes) -> Result<Bytes, Failure> {
        let mut answer = Whole::default();
        self.unary_into(method, request, &mut answer).await?;
        answer.message()
    }

    /// One request, one answer: hands the answer's bytes, gRPC's framing included, on as they come.
    pub(crate) async fn unary_into(
        &self,
        method: Method,
        request: Bytes,
        answer: &mut impl Answer,
    ) -> Result<(), Failure> {
        let generation = self.generation.get();
        let result = match tokio::time::timeout(self.timeout, self.exchange(method, request, answer)).await {
            Ok(result) => result,
            Err(_) => Err(self.timed_out()),
        };
        if let Err(failure) = &result {
            self.consider(failure, generation);
        }
        result
    }

    /// Opens a stream of messages both ways.
    pub(crate) async fn stream(self: &Rc<Self>, method: Method) -> Result<Stream, Failure> {
        let generation = self.generation.get();
        let opening = async {
            let (response, send) = self.request(method).await?;
            Ok(Stream {
                channel: Rc::clone(self),
                send,
                receive: Receive::Headers(response),
                deframer: Deframer::default(),
                generation: self.generation.get(),
            })
        };
        let result = match tokio::time::timeout(self.timeout, opening).await {
            Ok(result) => result,
            Err(_) => Err(self.timed_out()),
        };
        if let Err(failure) = &result {
            self.consider(failure, generation);
        }
        result
    }

    fn timed_out(&self) -> Failure {
        if self.sender.borrow().is_none() {
            Failure::new(Kind::Connection, self.why.borrow())
        } else {
            Failure::new(Kind::Timeout, format_args!("no answer within {:?}", self.timeout))
        }
    }

    /// Has the connection made anew if the failure says that this one will serve no more calls.
    fn consider(&self, failure: &Failure, generation: u64) {
        if matches!(failure.kind, Kind::Connection | Kind::Status(UNAUTHENTICATED))
            && generation == self.generation.get()
            && self.sender.borrow_mut().take().is_some()
        {
            failure.message.clone_into(&mut self.why.borrow_mut());
            self.lost.notify_one();
        }
    }

    async fn exchange(&self, method: Method, request: Bytes, answer: &mut impl Answer) -> Result<(), Failure> {
        let (response, mut send) = self.request(method).await?;
        // If the server ended the stream already, its answer says why.
        let _ = send.send_data(request, true);
        let (head, mut body) = response.await?.into_parts();
        check_http(head.status)?;
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            // Only a stream that is done with may refuse this, and then nobody waits for the capacity.
            let _ = body.flow_control().release_capacity(chunk.len());
            answer.take(chunk)?;
        }
        match body.trailers().await? {
            Some(trailers) => outcome(&trailers),
            None => outcome(&head.headers),
        }
    }

    /// Sends a request's headers, as soon as there is a connection and the server lets us open a stream.
    async fn request(&self, method: Method) -> Result<(ResponseFuture, SendStream<Bytes>), Failure> {
        let sender = loop {
            let waiting = self.connected.notified();
            if let Some(sender) = &*self.sender.borrow() {
                break sender.clone();
            }
            waiting.await;
        };
        let mut request = Request::new(());
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = self.uris[method as usize].clone();
        request.headers_mut().clone_from(&self.headers.borrow());
        Ok(sender.ready().await?.send_request(request, false)?)
    }

    /// Makes the connection and, for a user, fetches a token over it. Returns the task that moves its bytes.
    async fn connect(&self) -> Result<tokio::task::JoinHandle<()>, Failure> {
        match tokio::time::timeout(self.timeout, self.try_connect()).await {
            Ok(result) => result,
            Err(_) => Err(Failure::new(
                Kind::Connection,
                format_args!("{}: no connection within {:?}", self.endpoint, self.timeout),
            )),
        }
    }

    async fn try_connect(&self) -> Result<tokio::task::JoinHandle<()>, Failure> {
        let failed =
            |error: &dyn std::fmt::Display| Failure::new(Kind::Connection, format_args!("{}: {error}", self.endpoint));
        let socket = TcpStream::connect((&self.endpoint.host[..], self.endpoint.port))
            .await
            .map_err(|error| failed(&error))?;
        socket.set_nodelay(true).map_err(|error| failed(&error))?;
        let mut settings = h2::client::Builder::new();
        settings
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_BYTES_MAX)
            .enable_push(false);
        let (sender, driver) = match &self.security.tls {
            Some(tls) if self.endpoint.tls => {
                let name = ServerName::try_from(self.endpoint.host.clone()).map_err(|error| failed(&error))?;
                let connector = tokio_rustls::TlsConnector::from(Arc::clone(tls));
                let socket = connector.connect(name, socket).await.map_err(|error| failed(&error))?;
                let (sender, connection) = settings.handshake(socket).await.map_err(|error| failed(&error))?;
                (sender, spawn_local(drive(connection)))
            }
            _ => {
                let (sender, connection) = settings.handshake(socket).await.map_err(|error| failed(&error))?;
                (sender, spawn_local(drive(connection)))
            }
        };
        *self.sender.borrow_mut() = Some(sender);
        if let Some((name, password)) = &self.security.user {
            let request = AuthenticateRequest {
                name: name.clone(),
                password: password.clone(),
            };
            self.headers.borrow_mut().remove("token");
            let mut answer = Whole::default();
            let token = self
                .exchange(Method::Authenticate, frame(&request, &mut BytesMut::new()), &mut answer)
                .await
                .and_then(|()| answer.message())
                .and_then(|reply| {
                    AuthenticateResponse::decode(reply).map_err(|error| Failure::new(Kind::Protocol, error))
                })
                .and_then(|reply| {
                    HeaderValue::from_str(&reply.token).map_err(|error| Failure::new(Kind::Protocol, error))
                });
            match token {
                Ok(token) => self.headers.borrow_mut().insert("token", token),
                Err(failure) => {
                    *self.sender.borrow_mut() = None;
                    return Err(failure);
                }
            };
        }
        self.generation.set(self.generation.get() + 1);
        self.connected.notify_waiters();
        Ok(driver)
    }

    /// Connects again whenever the connection ends or will take no more calls; never returns.
    async fn keep(self: Rc<Self>, mut driver: tokio::task::JoinHandle<()>) {
        loop {
            tokio::select! {
                // What calls the old connection still has run on until the server closes it.
                () = self.lost.notified() => {
                    if self.sender.borrow().is_some() {
                        continue; // Said of a connection before this one.
                    }
                }
                _ = &mut driver => {
                    if self.sender.borrow_mut().take().is_some() {
                        "the connection was lost".clone_into(&mut self.why.borrow_mut());
                    }
                }
            }
            self.reconnects.set(self.reconnects.get() + 1);
            let mut pause = BACKOFF_FIRST;
            driver = loop {
                match self.connect().await {
                    Ok(driver) => break driver,
                    Err(failure) => *self.why.borrow_mut() = failure.message,
                }
                tokio::time::sleep(pause).await;
                pause = (2 * pause).min(BACKOFF_LAST);
            };
        }
    }
}

/// Moves a connection's bytes until it ends. Why it ended, its calls are told.
async fn drive<T>(connection: h2::client::Connection<T, Bytes>)
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let _ = connection.await;
}

fn check_http(status: http::StatusCode) -> Result<(), Failure> {
    if status == http::StatusCode::OK {
        Ok(())
    } else {
        Err(Failure::new(Kind::Protocol, format_args!("HTTP status {status}")))
    }
}

/// Takes an answer's bytes as they come.
pub(crate) trait Answer {
    /// The next bytes.
    fn take(&mut self, chunk: Bytes) -> Result<(), Failure>;
}

/// An answer that is wanted in one piece.
#[derive(Default)]
struct Whole {
    deframer: Deframer,
    message: Option<Bytes>,
}

impl Whole {
    fn message(self) -> Result<Bytes, Failure> {
        self.message
            .ok_or_else(|| Failure::new(Kind::Protocol, "the answer holds no message"))
    }
}

impl Answer for Whole {
    fn take(&mut self, chunk: Bytes) -> Result<(), Failure> {
        self.deframer.push(chunk);
        if self.message.is_none() {
            self.message = self.deframer.next()?;
        }
        Ok(())
    }
}

enum Receive {
    Headers(ResponseFuture),
    Body(RecvStream),
}

/// A call with messages both ways.
pub(crate) struct Stream {
    channel: Rc<Channel>,
    send: SendStream<Bytes>,
    receive: Receive,
    deframer: Deframer,
    /// The connection it runs on.
    generation: u64,
}

impl Stream {
    /// Sends one message. It waits in memory until the server's window takes it, so send no more than is answered.
    pub(crate) fn send(&mut self, message: Bytes) -> Result<(), Failure> {
        self.send
            .send_data(message, false)
            .map_err(|error| Failure::new(Kind::Reset, error))
    }

    /// The next message from the server, however long it takes; the end of the stream is a failure.
    pub(crate) async fn next(&mut self) -> Result<Bytes, Failure> {
        let result = self.receive().await;
        if let Err(failure) = &result {
            self.channel.consider(failure, self.generation);
        }
        result
    }

    async fn receive(&mut self) -> Result<Bytes, Failure> {
        loop {
            if let Some(message) = self.deframer.next()? {
                return Ok(message);
            }
            match &mut self.receive {
                Receive::Headers(response) => {
                    let (head, body) = response.await?.into_parts();
                    check_http(head.status)?;
                    if body.is_end_stream() {
                        outcome(&head.headers)?;
                    }
                    self.receive = Receive::Body(body);
                }
                Receive::Body(body) => match body.data().await {
                    Some(chunk) => {
                        let chunk = chunk?;
                        let _ = body.flow_control().release_capacity(chunk.len());
                        self.deframer.push(chunk);
                    }
                    None => {
                        if let Some(trailers) = body.trailers().await? {
                            outcome(&trailers)?;
                        }
                        return Err(Failure::new(Kind::Reset, "the server ended the stream"));
                    }
                },
            }
        }
    }
}
