//! One HTTP/2 connection to a server, made again whenever it is lost.
//!
//! All of a channel lives on one thread, so nothing here is locked.

use std::cell::{Cell, RefCell};
use std::future::{Future as _, poll_fn};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use prost::Message;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::Instant;

use super::endpoint::Endpoint;
use super::failure::{Failure, Kind, UNAUTHENTICATED};
use super::grpc::{Deframer, Method, frame};
use super::http2::{Call, Connection};
use super::security::Security;
use crate::proto::{AuthenticateRequest, AuthenticateResponse};

/// Pauses between attempts to connect: the first, doubled up to the last.
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_LAST: Duration = Duration::from_secs(1);

/// A connection and how to make it again.
pub(crate) struct Channel {
    endpoint: Endpoint,
    security: Security,
    /// How long a call may take.
    timeout: Duration,
    connection: RefCell<Option<Rc<Connection>>>,
    /// Why there is no connection, while there is none.
    why: RefCell<String>,
    /// Told when `connection` is set.
    connected: Notify,
    /// Told when a call found the connection unusable and took it away.
    lost: Notify,
    /// Counts connections, so that a call which outlived its connection does not end the next.
    generation: Cell<u64>,
    reconnects: Cell<u64>,
}

impl Channel {
    /// Connects, and from then on connects again by itself. Must be called within a `LocalSet`.
    pub(crate) async fn open(endpoint: Endpoint, security: Security, timeout: Duration) -> Result<Rc<Self>, Failure> {
        let channel = Rc::new(Channel {
            endpoint,
            security,
            timeout,
            connection: RefCell::default(),
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
        let deadline = Instant::now() + self.timeout;
        let result = match self.call(method, deadline, true).await {
            Ok(call) => exchange(call, request, answer).await,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = &result {
            self.consider(failure, generation);
        }
        result
    }

    /// Opens a stream of messages both ways.
    pub(crate) async fn stream(self: &Rc<Self>, method: Method) -> Result<Stream, Failure> {
        let generation = self.generation.get();
        let deadline = Instant::now() + self.timeout;
        let result = self.call(method, deadline, false).await.map(|call| Stream {
            channel: Rc::clone(self),
            call,
            deframer: Deframer::default(),
            generation: self.generation.get(),
        });
        if let Err(failure) = &result {
            self.consider(failure, generation);
        }
        result
    }

    fn timed_out(&self) -> Failure {
        if self.connection.borrow().is_none() {
            Failure::new(Kind::Connection, self.why.borrow())
        } else {
            Failure::new(Kind::Timeout, format_args!("no answer within {:?}", self.timeout))
        }
    }

    /// Has the connection made anew if the failure says that this one will serve no more calls.
    fn consider(&self, failure: &Failure, generation: u64) {
        if matches!(failure.kind, Kind::Connection | Kind::Status(UNAUTHENTICATED))
            && generation == self.generation.get()
            && let Some(connection) = self.connection.borrow_mut().take()
        {
            connection.close(&Failure::new(Kind::Connection, &failure.message));
            failure.message.clone_into(&mut self.why.borrow_mut());
            self.lost.notify_one();
        }
    }

    /// Begins a call, as soon as there is a connection and the server lets us, which must be before the deadline. A
    /// call that is bounded must also have ended by then.
    async fn call(&self, method: Method, deadline: Instant, bounded: bool) -> Result<Call, Failure> {
        let end = bounded.then_some((deadline, self.timeout));
        let beginning = async {
            let connection = loop {
                let waiting = self.connected.notified();
                if let Some(connection) = &*self.connection.borrow() {
                    break Rc::clone(connection);
                }
                waiting.await;
            };
            connection.call(method, end).await
        };
        let mut beginning = std::pin::pin!(beginning);
        // Mostly there is nothing to wait for, and then no timer either.
        if let Poll::Ready(result) = poll_fn(|context| Poll::Ready(beginning.as_mut().poll(context))).await {
            return result;
        }
        match tokio::time::timeout_at(deadline, beginning).await {
            Ok(result) => result,
            Err(_) => Err(self.timed_out()),
        }
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
        let authority = self.endpoint.authority();
        let (connection, driver) = match &self.security.tls {
            Some(tls) if self.endpoint.tls => {
                let name = ServerName::try_from(self.endpoint.host.clone()).map_err(|error| failed(&error))?;
                let connector = tokio_rustls::TlsConnector::from(Arc::clone(tls));
                let socket = connector.connect(name, socket).await.map_err(|error| failed(&error))?;
                Connection::start(socket, true, authority)
            }
            _ => Connection::start(socket, false, authority),
        };
        // A server that wants TLS, or a client certificate, takes the connection and then ends it.
        if let Err(failure) = connection.greeted().await {
            let wants = if self.endpoint.tls {
                "another certificate of us"
            } else {
                "TLS"
            };
            return Err(failed(&format_args!(
                "{}, before it said anything: perhaps it wants {wants}",
                failure.message
            )));
        }
        if let Some((name, password)) = &self.security.user {
            let token = self.authenticate(&connection, name, password).await;
            match token {
                Ok(token) => connection.set_token(token),
                Err(failure) => {
                    connection.close(&failure);
                    return Err(failure);
                }
            }
        }
        *self.connection.borrow_mut() = Some(connection);
        self.generation.set(self.generation.get() + 1);
        self.connected.notify_waiters();
        Ok(driver)
    }

    async fn authenticate(&self, connection: &Rc<Connection>, name: &str, password: &str) -> Result<String, Failure> {
        let request = AuthenticateRequest {
            name: name.to_owned(),
            password: password.to_owned(),
        };
        let mut answer = Whole::default();
        let call = connection.call(Method::Authenticate, None).await?;
        exchange(call, frame(&request, &mut BytesMut::new()), &mut answer).await?;
        let reply = AuthenticateResponse::decode(answer.message()?);
        Ok(reply.map_err(|error| Failure::new(Kind::Protocol, error))?.token)
    }

    /// Connects again whenever the connection ends or will take no more calls; never returns.
    async fn keep(self: Rc<Self>, mut driver: tokio::task::JoinHandle<()>) {
        loop {
            tokio::select! {
                // What calls the old connection still has run on until the server closes it.
                () = self.lost.notified() => {
                    if self.connection.borrow().is_some() {
                        continue; // Said of a connection before this one.
                    }
                }
                _ = &mut driver => {
                    if self.connection.borrow_mut().take().is_some() {
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

/// Sends the request and takes the answer.
async fn exchange(mut call: Call, request: Bytes, answer: &mut impl Answer) -> Result<(), Failure> {
    call.send(request, true);
    while let Some(chunk) = call.next().await? {
        answer.take(chunk)?;
    }
    Ok(())
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

/// A call with messages both ways.
pub(crate) struct Stream {
    channel: Rc<Channel>,
    call: Call,
    deframer: Deframer,
    /// The connection it runs on.
    generation: u64,
}

impl Stream {
    /// Sends one message. It waits in memory until the server's window takes it, so send no more than is answered. That
    /// it can't be sent any more, [`Stream::next`] says.
    pub(crate) fn send(&mut self, message: Bytes) {
        self.call.send(message, false);
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
            match self.call.next().await? {
                Some(chunk) => self.deframer.push(chunk),
                None => return Err(Failure::new(Kind::Reset, "the server ended the stream")),
            }
        }
    }
}
