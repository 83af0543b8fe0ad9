//! The JSON gateway: every gRPC method that has a path in the .proto files, as a POST of JSON, with the conventions of
//! grpc-gateway v2, which etcd uses.
//!
//! A request becomes the gRPC call that it stands for and takes the same way as one, so that it is counted, limited and
//! answered alike; a method that a release adds is here as well. Replies are translated message by message as they come:
//! a stream of replies is never held whole.

mod decode;
mod encode;
mod replies;
mod requests;
mod scan;
mod schema;
mod websocket;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use api::Store;
use axum::body::Body;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method as HttpMethod, Request, Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::etcd::methods::{self, CallKind, Method};
use crate::{ClientCertificate, Frontend, ResponseBody, deadline};
use encode::Encoder;
use schema::{ROUTES, Route};

/// Where the gateway's paths begin.
pub(crate) const PREFIX: &str = "/v3/";

/// How many bytes of JSON there may be for each byte that the largest message has: base64 takes 4 for 3, and names,
/// quotes and white space as much again and more.
const JSON_BYTES_PER_BYTE: usize = 4;

/// How long a client may take to send a request's body. etcd waits for ever.
const BODY_TIMEOUT: Duration = Duration::from_secs(300);

/// What HTTP headers begin with that become gRPC metadata.
const METADATA_PREFIX: &str = "grpc-metadata-";

/// Says what the reply was made from, as grpc-gateway does.
const GRPC_CONTENT_TYPE: HeaderName = HeaderName::from_static("grpc-metadata-content-type");

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What the gateway holds beside the front ends that it calls.
pub(crate) struct Gateway {
    routes: HashMap<&'static str, (&'static Route, &'static Method)>,
    /// One permit for each call under way: etcd's gateway shares one connection to its own server, and so its
    /// `--max-concurrent-streams`. `None` if there is no limit.
    calls: Option<Arc<Semaphore>>,
}

impl Gateway {
    /// A gateway of at most so many calls at a time; further ones wait.
    pub(crate) fn new(streams_max: u32) -> Self {
        let routes = ROUTES.iter().map(|route| {
            let method = methods::methods()
                .find(|method| method.service == route.service && method.name == route.method)
                .expect("the build script takes both from the same files");
            (route.path, (route, method))
        });
        let permits = usize::try_from(streams_max).unwrap_or(usize::MAX);
        Gateway {
            routes: routes.collect(),
            calls: (permits < Semaphore::MAX_PERMITS && streams_max < u32::MAX)
                .then(|| Arc::new(Semaphore::new(permits))),
        }
    }

    async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        Arc::clone(self.calls.as_ref()?).acquire_owned().await.ok()
    }
}

/// Answers a request below [`PREFIX`].
pub(crate) async fn serve<S: Store>(frontend: Frontend<S>, request: Request<Body>) -> Response<Body> {
    let certificate = request.extensions().get::<ClientCertificate>();
    if certificate.is_some_and(|certificate| !certificate.common_name.is_empty()) && frontend.needs_user().await {
        // The name does not count here: etcd's gateway is a client of its own server, with a certificate of the server's.
        // Whoever relies on it is told so instead of being taken for nobody.
        return crate::http::error(
            StatusCode::BAD_REQUEST,
            "CommonName of client sending a request against gateway will be ignored and not used as expected",
        );
    }
    if websocket::is_upgrade(request.headers()) {
        return websocket::accept(frontend, request);
    }
    call(&frontend, request).await
}

async fn call<S: Store>(frontend: &Frontend<S>, request: Request<Body>) -> Response<Body> {
    let path = percent_encoding::percent_decode_str(request.uri().path()).decode_utf8_lossy();
    let Some(gateway) = frontend.gateway() else {
        return refuse(&Status::not_found("Not Found"));
    };
    let Some(&(route, method)) = gateway.routes.get(&*path) else {
        return refuse(&Status::not_found("Not Found"));
    };
    if request.method() != HttpMethod::POST {
        return refuse(&Status::unimplemented("Method Not Allowed"));
    }
    let deadline = match deadline::of_gateway(request.headers()) {
        // It has run out before it began.
        Ok(Some(Duration::ZERO)) => return refuse(&deadline::exceeded()),
        Ok(timeout) => timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
        Err(status) => return refuse(&status),
    };
    let (parts, body) = request.into_parts();
    let headers = metadata(&parts.headers);
    let body_bytes_max = frontend.message_bytes_max().saturating_mul(JSON_BYTES_PER_BYTE);
    let body = match method.kind {
        CallKind::Unary | CallKind::ServerStream => {
            let message = async {
                let json = requests::whole(body, body_bytes_max).await?;
                requests::message(&json, route.input)
            };
            let message = match tokio::time::timeout(BODY_TIMEOUT, message).await {
                Ok(Ok(message)) => message,
                Ok(Err(status)) => return refuse(&status),
                Err(_) => {
                    return refuse(&Status::deadline_exceeded(
                        "metastore: the request did not arrive in time",
                    ));
                }
            };
            Body::from(message)
        }
        CallKind::ClientStream | CallKind::BidiStream => {
            Body::new(requests::Stream::new(body, route.input, body_bytes_max))
        }
    };
    let answer = async {
        let permit = gateway.permit().await;
        let response = invoke(frontend, method, headers, body).await;
        match method.kind {
            CallKind::Unary | CallKind::ClientStream => unary(response, route, permit).await,
            CallKind::ServerStream | CallKind::BidiStream => stream(response, route, permit, deadline).await,
        }
    };
    match deadline {
        None => answer.await,
        Some(deadline) => match tokio::time::timeout_at(deadline, answer).await {
            Ok(response) => response,
            Err(_) => match method.kind {
                CallKind::Unary | CallKind::ClientStream => refuse(&deadline::exceeded()),
                CallKind::ServerStream | CallKind::BidiStream => refuse_stream(&deadline::exceeded()),
            },
        },
    }
}

/// Makes the gRPC call.
async fn invoke<S: Store>(
    frontend: &Frontend<S>,
    method: &'static Method,
    headers: HeaderMap,
    body: Body,
) -> Result<Response<ResponseBody>, Status> {
    let mut request = Request::new(body);
    *request.method_mut() = HttpMethod::POST;
    *request.uri_mut() = format!("/{}/{}", method.service, method.name)
        .parse()
        .map_err(|_| Status::internal("metastore: a method's name is no path"))?;
    *request.headers_mut() = headers;
    // Whoever reads the reply keeps the deadline.
    match frontend.call(method, request, None)?.await {
        Ok(response) => Ok(response),
        Err(impossible) => match impossible {},
    }
}

/// The metadata of the call that a request stands for.
fn metadata(headers: &HeaderMap) -> HeaderMap {
    let mut metadata = HeaderMap::new();
    for (name, value) in headers {
        if name == AUTHORIZATION {
            metadata.append(AUTHORIZATION, value.clone());
        } else if let Some(name) = name.as_str().strip_prefix(METADATA_PREFIX)
            && let Ok(name) = HeaderName::try_from(name)
        {
            metadata.append(name, value.clone());
        }
    }
    metadata.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    metadata
}

/// Answers with the one reply of a call.
async fn unary(
    response: Result<Response<ResponseBody>, Status>,
    route: &'static Route,
    permit: Option<OwnedSemaphorePermit>,
) -> Response<Body> {
    let translated = async {
        let mut replies = replies::Messages::new(response?)?;
        let message = replies.next().await.unwrap_or_else(|| {
            Err(Status::internal(
                "metastore: a call ended without a reply and without an error",
            ))
        })?;
        // The status comes after the reply.
        if let Some(more) = replies.next().await {
            more?;
        }
        let mut json = Encoder::new(false);
        json.message(&message, route.output)
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok::<_, Status>(json.finish())
    };
    let translated = translated.await;
    drop(permit);
    match translated {
        Ok(json) => answer(Body::from(json)),
        Err(status) => refuse(&status),
    }
}

/// Answers with the replies of a call, one in a line, as they come. Like grpc-gateway, it answers nothing before the
/// first.
async fn stream(
    response: Result<Response<ResponseBody>, Status>,
    route: &'static Route,
    permit: Option<OwnedSemaphorePermit>,
    deadline: Option<Instant>,
) -> Response<Body> {
    let begun = async {
        let mut replies = replies::Messages::new(response?)?;
        let first = replies.next().await.transpose()?;
        Ok::<_, Status>((replies, first))
    };
    match begun.await {
        // A call that has nothing to say: what it would have been translated to is not told.
        Ok((_, None)) => Response::new(Body::empty()),
        Ok((replies, first)) => answer(Body::new(replies::Lines::new(
            replies,
            first,
            route.output,
            permit,
            deadline,
        ))),
        Err(status) => refuse_stream(&status),
    }
}

/// Answers with the error of a stream that has said nothing else.
fn refuse_stream(status: &Status) -> Response<Body> {
    let mut response = Response::new(Body::from(replies::last_line(status)));
    *response.status_mut() = http_status(status.code());
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

fn answer(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
        .headers_mut()
        .insert(GRPC_CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// Answers with an error.
fn refuse(status: &Status) -> Response<Body> {
    let mut json = Encoder::new(false);
    write_status(&mut json, status);
    let mut response = Response::new(Body::from(json.finish()));
    *response.status_mut() = http_status(status.code());
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    if status.code() == Code::Unauthenticated
        && let Ok(text) = HeaderValue::from_str(status.message())
    {
        response.headers_mut().insert(WWW_AUTHENTICATE, text);
    }
    response
}

/// Writes a status as `google.rpc.Status` in JSON.
fn write_status(json: &mut Encoder, status: &Status) {
    json.raw("{\"code\":");
    json.integer(status.code() as i32);
    if !status.message().is_empty() {
        json.raw(",\"message\":");
        json.text(status.message());
    }
    json.raw("}");
}

/// The HTTP status that grpc-gateway has for a code.
fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        // nginx's "client closed request", which has no name of its own.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Reads the first bytes as a choice of route and of piece sizes, and the rest as a request's body.
///
/// # Panics
/// If the scanner depends on the pieces in which a body comes, or a message changes when it is written as JSON and read
/// again.
pub fn fuzz_request(data: &[u8]) {
    let [route, piece, body @ ..] = data else { return };
    let route = &ROUTES[usize::from(*route) % ROUTES.len()];
    let scan = |size: usize| {
        let mut scanner = scan::Scanner::new();
        for piece in body.chunks(size) {
            if let scan::Scan::Whole(start, end) = scanner.read(piece)? {
                return Ok(Some((start, end)));
            }
        }
        scanner.finish()
    };
    let found: Result<_, String> = scan(body.len().max(1));
    assert_eq!(scan(usize::from(*piece).max(1)), found);
    let Ok(Some((start, end))) = found else { return };
    let Ok(wire) = decode::decode(&body[start..end], route.input) else {
        return;
    };
    for html_safe in [false, true] {
        let mut json = Encoder::new(html_safe);
        json.message(&wire, route.input)
            .expect("what was decoded is well formed");
        let again = decode::decode(&json.finish(), route.input);
        assert_eq!(again.as_ref(), Ok(&wire));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODIES: [&str; 5] = [
        r#"{"key":"YQ==","rangeEnd":"_-8","limit":"-5","sort_order":"DESCEND","keys_only":true,"lease":3}"#,
        r#"{"success":[{"request_txn":{"success":[{"request_put":{"value":"YQ"}}]}}],"compare":[{"version":0}]}"#,
        r#"{"create_request":{"filters":["NOPUT",1,7],"start_revision":-1}}{"cancel_request":{}}"#,
        r#"{"peerURLs":["<&>\u2028\u0001\"\\","\ud83d\ude00"],"isLearner":false,"ID":"18446744073709551615"}"#,
        r#"{"perm":{"permType":"READWRITE","key":"AA=="},"name":"\u00e9","options":{"no_password":true}}"#,
    ];

    /// What the fuzz target checks, for each route, on bodies that have all kinds of values.
    #[test]
    fn requests_mean_the_same_when_written_out() {
        for route in 0..=u8::MAX {
            for body in BODIES {
                fuzz_request(&[&[route, route], body.as_bytes()].concat());
            }
        }
    }

    /// The same on what becomes of them by chance.
    #[test]
    fn damaged_requests_are_refused_or_mean_the_same() {
        const PIECES: [&str; 16] = [
            "{", "}", "[", "]", ",", ":", "\"", "\\u", "null", "1e9", "-", "\"YQ==\"", "\"key\":", "\u{e9}", "\n",
            "0.0",
        ];
        let bodies = BODIES.map(str::as_bytes);
        crate::fuzzing::damage(&bodies, &PIECES, 2, fuzz_request);
    }
}
