//! All front ends of one store as one service.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use api::Store;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method as HttpMethod, Request, Response, StatusCode, Version};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;

use crate::access::Access;
use crate::etcd::methods::{self, CallKind, Method};
use crate::etcd::{ByLearner, Call, Guard, Inbound, Kv, Outbound, Services, call, status};
use crate::gateway::Gateway;
use crate::observer::Deaf;
use crate::{BoxError, CallTracer, ClientCertificate, Observer, credentials, deadline, http as http_api, rest};

/// How many election timeouts in a row without a leader a stream survives that asked for one (etcd's `maxNoLeaderCnt`).
const LEADERLESS_TIMEOUTS_MAX: u32 = 3;

/// What the front ends need beside the store.
#[derive(Clone)]
pub struct Options {
    /// Renders the answer of `/metrics`, in Prometheus' text format.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// Hears of every call.
    pub observer: Arc<dyn Observer>,
    /// Write the headers of each request over HTTP/2 to standard error, in the form of Go's `http2debug`.
    pub shows_headers: bool,
    /// Makes spans of calls, if they are traced.
    pub tracer: Option<Arc<dyn CallTracer>>,
    /// Raft's election timeout: streams that ask for a leader end after three of them without one.
    pub election_timeout: Duration,
    /// Which web pages and host names are let in over HTTP.
    pub access: Access,
    /// Most calls of the JSON gateway at a time (`--max-concurrent-streams`); `None` if there is to be no gateway.
    pub gateway_calls_max: Option<u32>,
    /// What `/debug/vars` says of the process, by name.
    pub variables: Arc<dyn Fn() -> Vec<(&'static str, serde_json::Value)> + Send + Sync>,
    /// Turns true when the server stops: streams, which would never end by themselves, then end with
    /// [`api::Error::Stopped`].
    pub stopping: Option<watch::Receiver<bool>>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            metrics: Arc::new(String::new),
            observer: Arc::new(Deaf),
            tracer: None,
            shows_headers: false,
            election_timeout: Duration::from_secs(1),
            access: Access::default(),
            gateway_calls_max: Some(u32::MAX),
            variables: Arc::new(Vec::new),
            stopping: None,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("election_timeout", &self.election_timeout)
            .finish_non_exhaustive()
    }
}

/// What a listener serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Traffic {
    /// gRPC and HTTP.
    #[default]
    Both,
    /// gRPC alone, where HTTP has listeners of its own (`--listen-client-http-urls`).
    Grpc,
    /// HTTP alone.
    Http,
    /// Metrics and health alone (`--listen-metrics-urls`).
    Metrics,
    /// The HTTP API under `/api/v1` alone (`--listen-http-urls`).
    Rest,
}

/// Where a connection comes in.
#[derive(Debug, Clone, Copy, Default)]
pub struct Listener {
    /// What is served there.
    pub traffic: Traffic,
    /// Whether the connection is encrypted.
    pub tls: bool,
}

/// All front ends of one store: gRPC for requests over HTTP/2 that say so, HTTP for the rest.
///
/// A cheap handle. It is a service of both hyper and tower.
pub struct Frontend<S: Store> {
    shared: Arc<Shared<S>>,
    listener: Listener,
    /// That of the connection whose requests this handle answers.
    certificate: Option<ClientCertificate>,
}

struct Shared<S: Store> {
    store: S,
    services: Services<S>,
    http: axum::Router,
    metrics: axum::Router,
    rest: axum::Router,
    gateway: Option<Gateway>,
    options: Options,
    message_bytes_max: usize,
}

impl<S: Store> Clone for Frontend<S> {
    fn clone(&self) -> Self {
        Frontend {
            shared: Arc::clone(&self.shared),
            listener: self.listener,
            certificate: self.certificate.clone(),
        }
    }
}

impl<S: Store> fmt::Debug for Frontend<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frontend").finish_non_exhaustive()
    }
}

/// [`Frontend`] as an axum router, for whoever wants to add routes to it.
pub fn router<S: Store>(store: S, options: Options) -> axum::Router {
    axum::Router::new().fallback_service(Frontend::new(store, options))
}

impl<S: Store> Frontend<S> {
    /// The front ends of this store.
    pub fn new(store: S, options: Options) -> Self {
        let rest = rest::router(store.clone(), &options);
        Frontend {
            shared: Arc::new(Shared {
                services: Services::new(store.clone()),
                http: http_api::router(store.clone(), &options).merge(rest.clone()),
                rest: rest.fallback(rest::not_found),
                metrics: http_api::metrics_router(store.clone(), &options),
                gateway: options.gateway_calls_max.map(Gateway::new),
                message_bytes_max: store.limits().grpc_receive_bytes_max(),
                store,
                options,
            }),
            listener: Listener::default(),
            certificate: None,
        }
    }

    /// The same, for what comes in at a listener.
    pub fn at(&self, listener: Listener) -> Self {
        Frontend {
            shared: Arc::clone(&self.shared),
            listener,
            certificate: self.certificate.clone(),
        }
    }

    pub(crate) fn listener(&self) -> Listener {
        self.listener
    }

    /// The store, on nobody's behalf.
    pub(crate) fn store(&self) -> &S {
        &self.shared.store
    }

    pub(crate) fn gateway(&self) -> Option<&Gateway> {
        self.shared.gateway.as_ref()
    }

    pub(crate) fn access(&self) -> &Access {
        &self.shared.options.access
    }

    /// The largest gRPC message that a client may send, in bytes.
    pub(crate) fn message_bytes_max(&self) -> usize {
        self.shared.message_bytes_max
    }

    /// The endpoints that are neither gRPC nor the gateway's.
    pub(crate) fn endpoints(&self) -> axum::Router {
        match self.listener.traffic {
            Traffic::Metrics => self.shared.metrics.clone(),
            Traffic::Rest => self.shared.rest.clone(),
            _ => self.shared.http.clone(),
        }
    }

    /// The same, for one connection whose client showed this certificate.
    pub fn with_certificate(self, certificate: Option<ClientCertificate>) -> Self {
        Frontend { certificate, ..self }
    }

    /// Adds to a request what its connection's client showed of itself.
    pub(crate) fn introduce<B>(&self, request: &mut Request<B>) {
        if let Some(certificate) = &self.certificate {
            request.extensions_mut().insert(certificate.clone());
        }
    }

    /// Shows a request's headers, if somebody wants to see them.
    pub(crate) fn show<B>(&self, request: &Request<B>) {
        if self.shared.options.shows_headers {
            show_headers(request);
        }
    }

    /// Has a call traced, if calls are.
    pub(crate) fn trace<B>(&self, call: &mut Call, request: &Request<B>) {
        if let Some(tracer) = &self.shared.options.tracer {
            call.trace(&**tracer, request.headers());
        }
    }

    /// Whether gRPC calls are answered where this request came in.
    pub(crate) fn takes_grpc(&self) -> bool {
        matches!(self.listener.traffic, Traffic::Both | Traffic::Grpc)
    }

    /// Whether a request is a gRPC call where it came in.
    pub(crate) fn is_grpc<B>(&self, request: &Request<B>) -> bool {
        // A value that is put over HTTP may be of any type, gRPC's too.
        let is_http = self.listener.traffic == Traffic::Both && rest::owns(request.uri().path());
        self.takes_grpc() && !is_http && is_grpc(request)
    }

    /// Begins to answer a request.
    pub(crate) fn respond<B>(&self, mut request: Request<B>) -> ResponseFuture
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        self.introduce(&mut request);
        self.show(&request);
        let is_http = match self.listener.traffic {
            Traffic::Http | Traffic::Metrics | Traffic::Rest => true,
            Traffic::Both => !self.is_grpc(&request),
            Traffic::Grpc => false,
        };
        if is_http {
            let request = request.map(axum::body::Body::new);
            return ResponseFuture(State::Http(Box::pin(http_api::serve(self.clone(), request))));
        }
        if !is_grpc(&request) {
            let content_type = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
            let content_type = String::from_utf8_lossy(content_type.unwrap_or_default()).into_owned();
            return ResponseFuture::refuse(
                Status::invalid_argument(format!("invalid gRPC request content-type {content_type:?}")),
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
            );
        }
        let timeout = match deadline::of_grpc(request.headers()) {
            Ok(timeout) => timeout,
            Err(status) => return ResponseFuture::refuse(status, StatusCode::BAD_REQUEST),
        };
        if request.method() != HttpMethod::POST {
            return ResponseFuture::refuse(
                Status::internal(format!(
                    "Received a HEADERS frame with :method {:?} which should be POST",
                    request.method().as_str()
                )),
                StatusCode::METHOD_NOT_ALLOWED,
            );
        }
        if timeout == Some(Duration::ZERO) {
            return ResponseFuture::refuse(deadline::exceeded(), StatusCode::OK);
        }
        let method = match methods::find(request.uri().path()) {
            Ok(method) => method,
            Err(status) => return ResponseFuture::refuse(status, StatusCode::OK),
        };
        // One that lies beyond what the clock can say is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.call(method, request, deadline)
            .unwrap_or_else(|status| ResponseFuture::refuse(status, StatusCode::OK))
    }

    /// Begins a call, on whatever way it came in. When its deadline passes, its handler is dropped, as if the client had
    /// given the call up, and it ends with that status.
    pub(crate) fn call<B>(
        &self,
        method: &'static Method,
        request: Request<B>,
        deadline: Option<Instant>,
    ) -> Result<ResponseFuture, Status>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let shared = &*self.shared;
        let observer = &shared.options.observer;
        let mut call = Call::start(method, Arc::clone(observer));
        self.trace(&mut call, &request);
        let mut request = request;
        let needs_leader = self
            .admit(method, &mut request)
            .inspect_err(|status| call.end(status.code()))?;
        let request = request.map(|body| Inbound::new(body, shared.message_bytes_max, method, Arc::clone(observer)));
        let Some(reply) = shared.services.call(method, request) else {
            let status = Status::unimplemented(format!(
                "metastore: {}.{} is not available in this release",
                method.service.rsplit('.').next().unwrap_or(method.service),
                method.name
            ));
            call.end(status.code());
            return Err(status);
        };
        let is_unary = method.kind == CallKind::Unary;
        let guard = self.guard(!is_unary || method.waits(), !is_unary && needs_leader, deadline);
        Ok(ResponseFuture(State::Grpc {
            reply,
            call: Some(call),
            guard,
        }))
    }

    /// Holds a call against etcd's rules for learners, and its metadata against those for metadata. Its handler finds
    /// what it must know of that among the extensions. Says whether the call wants a leader to be there as long as it
    /// runs.
    pub(crate) fn admit<B>(&self, method: &'static Method, request: &mut Request<B>) -> Result<bool, Status> {
        let now = self.shared.store.standing();
        if now.is_learner && !is_served_by_learners(method) {
            return Err(status(api::Error::NotSupportedForLearner));
        }
        let version = match request.headers().get("client-api-version").map(HeaderValue::as_bytes) {
            None => "unknown",
            Some(bytes) => std::str::from_utf8(bytes).map_err(|_| status(api::Error::InvalidClientApiVersion))?,
        };
        self.shared.options.observer.client_version(method, version);
        let needs_leader = request.headers().get("hasleader").is_some_and(|value| value == "true");
        if needs_leader && now.leader == 0 {
            return Err(status(api::Error::NoLeader));
        }
        if now.is_learner {
            request.extensions_mut().insert(ByLearner);
        }
        let credentials = credentials::of(request);
        if !credentials.is_empty() {
            request.extensions_mut().insert(credentials);
        }
        Ok(needs_leader)
    }

    /// Whether nobody in particular may do anything: auth is on.
    pub(crate) async fn needs_user(&self) -> bool {
        self.shared.store.check_user().await == Err(api::Error::UserEmpty)
    }

    /// The KV service.
    pub(crate) fn kv(&self) -> &Arc<Kv<S>> {
        self.shared.services.kv()
    }

    /// Who hears of every call.
    pub(crate) fn observer(&self) -> &Arc<dyn Observer> {
        &self.shared.options.observer
    }

    /// What may end a call from our side, if anything may.
    fn guard(&self, ends_with_server: bool, needs_leader: bool, deadline: Option<Instant>) -> Option<Guard> {
        let stopping = match ends_with_server {
            true => self.shared.options.stopping.clone(),
            false => None,
        };
        if !needs_leader && stopping.is_none() && deadline.is_none() {
            return None;
        }
        let store = self.shared.store.clone();
        let election_timeout = self.shared.options.election_timeout;
        Some(Box::pin(async move {
            tokio::select! {
                () = stopped(stopping) => status(api::Error::Stopped),
                () = leader_lost(store, election_timeout), if needs_leader => status(api::Error::NoLeader),
                () = deadline::passed(deadline) => deadline::exceeded(),
            }
        }))
    }
}

/// Which methods learners serve. Of ranges only the serializable ones, which shows once the request is read: see
/// [`ByLearner`].
fn is_served_by_learners(method: &Method) -> bool {
    matches!(
        (method.service, method.name),
        ("etcdserverpb.KV", "Range") | ("etcdserverpb.Maintenance", "Status" | "Snapshot")
    )
}

pub(crate) async fn stopped(stopping: Option<watch::Receiver<bool>>) {
    if let Some(mut stopping) = stopping
        && stopping.wait_for(|stopping| *stopping).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

async fn leader_lost<S: Store>(store: S, election_timeout: Duration) {
    let mut leaderless = 0;
    while leaderless < LEADERLESS_TIMEOUTS_MAX {
        tokio::time::sleep(election_timeout).await;
        leaderless = if store.standing().leader == 0 {
            leaderless + 1
        } else {
            0
        };
    }
}

/// Writes a request's headers as Go does: for a person who debugs, at a person's pace.
fn show_headers<B>(request: &Request<B>) {
    if request.version() != Version::HTTP_2 {
        return;
    }
    let mut text = String::new();
    let mut show = |name: &str, value: &[u8]| {
        let value = value.escape_ascii();
        text += &format!("http2: decoded hpack field header field \"{name}\" = \"{value}\"\n");
    };
    let uri = request.uri();
    show(":method", request.method().as_str().as_bytes());
    show(":path", uri.path().as_bytes());
    show(
        ":authority",
        uri.authority().map_or("", |authority| authority.as_str()).as_bytes(),
    );
    for (name, value) in request.headers() {
        let value = if value.is_sensitive() || name == "token" || name == "authorization" {
            &b"(not shown)"[..]
        } else {
            value.as_bytes()
        };
        show(name.as_str(), value);
    }
    // There may be no reader.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
}

/// Whether a request is gRPC's, by grpc-go's reading of the content type.
pub(crate) fn is_grpc<B>(request: &Request<B>) -> bool {
    let content_type = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    request.version() == Version::HTTP_2
        && content_type
            .and_then(|value| value.strip_prefix(b"application/grpc"))
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

impl<S: Store, B> tower::Service<Request<B>> for Frontend<S>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture {
        self.respond(request)
    }
}

impl<S: Store> hyper::service::Service<Request<Incoming>> for Frontend<S> {
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn call(&self, request: Request<Incoming>) -> ResponseFuture {
        self.respond(request)
    }
}

/// Becomes the response.
pub struct ResponseFuture(State);

enum State {
    Grpc {
        reply: tonic::codegen::BoxFuture<Response<tonic::body::Body>, Infallible>,
        call: Option<Call>,
        guard: Option<Guard>,
    },
    Http(Pin<Box<dyn Future<Output = Response<axum::body::Body>> + Send>>),
    Refused(Option<Response<ResponseBody>>),
}

impl ResponseFuture {
    fn refuse(status: Status, http_status: StatusCode) -> Self {
        let mut response = refusal(status);
        *response.status_mut() = http_status;
        ResponseFuture(State::Refused(Some(response)))
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<ResponseBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Grpc { reply, call, guard } => {
                let polled = catch_unwind(AssertUnwindSafe(|| reply.as_mut().poll(context)));
                if matches!(polled, Ok(Poll::Pending))
                    && let Some(waiting) = guard
                    && let Poll::Ready(status) = waiting.as_mut().poll(context)
                {
                    if let Some(mut call) = call.take() {
                        call.end(status.code());
                    }
                    // The handler's own clean-up begins here, not when the client has taken the response.
                    self.0 = State::Refused(None);
                    return Poll::Ready(Ok(refusal(status)));
                }
                let mut call = match &polled {
                    Ok(Poll::Pending) => return Poll::Pending,
                    _ => call.take().expect("polled again after its response"),
                };
                let response = match polled {
                    Ok(Poll::Ready(Ok(response))) => response,
                    Ok(Poll::Pending) => return Poll::Pending,
                    Err(panic) => {
                        let status = call.panicked(&*panic);
                        call.end(status.code());
                        return Poll::Ready(Ok(refusal(status)));
                    }
                };
                // An error before the first message travels in the headers, without a body.
                if let Some(code) = call::code_in(response.headers()) {
                    call.end(code);
                }
                let guard = guard.take();
                let body = |body| ResponseBody(Kind::Grpc(Outbound::new(body, call, guard)));
                Poll::Ready(Ok(response.map(body)))
            }
            State::Http(reply) => {
                let polled = catch_unwind(AssertUnwindSafe(|| reply.as_mut().poll(context)));
                let response = match polled {
                    Ok(polled) => ready!(polled),
                    Err(panic) => {
                        tracing::error!(reason = call::panic_text(&*panic), "an HTTP handler panicked");
                        let mut response = Response::new(axum::body::Body::empty());
                        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                        response
                    }
                };
                Poll::Ready(Ok(response.map(|body| ResponseBody(Kind::Http(body)))))
            }
            State::Refused(response) => Poll::Ready(Ok(response.take().expect("polled again after its response"))),
        }
    }
}

/// A gRPC response that consists of a status.
fn refusal(status: Status) -> Response<ResponseBody> {
    let response = status.into_http::<axum::body::Body>();
    response.map(|body| ResponseBody(Kind::Http(body)))
}

/// A response's body.
pub struct ResponseBody(Kind);

enum Kind {
    Grpc(Outbound),
    Http(axum::body::Body),
}

impl fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody").finish_non_exhaustive()
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Kind::Grpc(body) => Pin::new(body).poll_frame(context).map_err(Into::into),
            Kind::Http(body) => Pin::new(body).poll_frame(context).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Grpc(body) => body.is_end_stream(),
            Kind::Http(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Grpc(body) => body.size_hint(),
            Kind::Http(body) => body.size_hint(),
        }
    }
}
