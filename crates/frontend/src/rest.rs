//! Plain HTTP for people and scripts: `/api/v1`, over the same [`Store`] as everything else.
//!
//! | What | Where |
//! |---|---|
//! | what there is, with what it takes and answers: the table that requests are checked by | `operations.rs` |
//! | that table as an OpenAPI document, and as a page | `openapi.rs`, `page.rs` |
//! | query parameters and header fields | `parameters.rs`, `headers.rs` |
//! | bodies in, bodies out, refusals | `body.rs`, `json.rs`, `problem.rs` |
//! | one key, many keys, changes, transactions | `kv.rs`, `list.rs`, `watch.rs`, `txn.rs` |
//! | leases, locks, members, who asks | `leases.rs`, `locks.rs`, `cluster.rs`, `auth.rs` |

mod auth;
mod body;
mod cluster;
mod headers;
mod json;
mod kv;
mod leases;
mod list;
mod locks;
mod openapi;
mod operations;
mod page;
mod parameters;
mod problem;
mod txn;
mod watch;

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use api::store::{WatchCreate, WatchError, WatchOutput, WatchStream};
use api::{Error, Revision, Store};
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use bytes::Bytes;
use futures::FutureExt as _;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_METHOD, AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION,
    ORIGIN, X_CONTENT_TYPE_OPTIONS,
};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde::Serialize;
use tokio::sync::watch as watch_channel;

use auth::Authorization;
use json::Encoding;
use operations::{Action, Learner, Operation, RequestBody, Resource};
use parameters::{Parameters, decode_path};
use problem::{
    FOREIGN_ORIGIN, INTERNAL, INVALID_PARAMETER, INVALID_PATH, MISDIRECTED, NO_SUCH_PATH, Problem, UNAUTHENTICATED,
};

use crate::etcd::call::panic_text;
use crate::{ClientCertificate, Observer, Options};

/// Where all of it is.
pub(crate) const BASE: &str = "/api/v1";

const JSON: &str = "application/json";

/// How long to look for the revision up to which history is gone, once it is known that it is.
const COMPACT_REVISION_TIMEOUT: Duration = Duration::from_secs(1);

/// What all calls share.
struct Shared<S> {
    store: S,
    observer: Arc<dyn Observer>,
    stopping: Option<watch_channel::Receiver<bool>>,
    encoded: Arc<watch::Encoded>,
    document: OnceLock<Bytes>,
    page: OnceLock<Bytes>,
}

/// A call that was found, checked and let in.
struct Call<S> {
    shared: Arc<Shared<S>>,
    /// Acts for whoever calls.
    store: S,
    /// The path's variable: a key, a name, an id.
    argument: Bytes,
    parameters: Parameters,
    headers: HeaderMap,
    body: Body,
}

impl<S> Call<S> {
    /// How the client wants bytes in JSON.
    fn encoding(&self) -> Encoding {
        match self.parameters.choice("encoding") {
            Some("base64") => Encoding::Base64,
            _ => Encoding::Auto,
        }
    }
}

/// The API of a store, to be merged with other routes. It answers everything below `/api/v1`.
pub fn router<S: Store>(store: S, options: &Options) -> Router {
    let shared = Arc::new(Shared {
        store,
        observer: Arc::clone(&options.observer),
        stopping: options.stopping.clone(),
        encoded: Arc::default(),
        document: OnceLock::new(),
        page: OnceLock::new(),
    });
    // What lies below is routed by the bytes of the path, which need not be text.
    Router::new()
        .route(BASE, any(respond::<S>))
        .route(&format!("{BASE}/"), any(respond::<S>))
        .route(&format!("{BASE}/{{*path}}"), any(respond::<S>))
        .with_state(shared)
}

/// Whether a path is this API's.
pub(crate) fn owns(path: &str) -> bool {
    path.strip_prefix(BASE)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether a browser asks whether a page's script may make a request. The answer is in the header fields for CORS.
pub(crate) fn is_preflight<B>(request: &http::Request<B>) -> bool {
    request.method() == Method::OPTIONS && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

/// What a page's script may send to this API and read of its answers, beside what the gateway lets it.
pub(crate) fn extend_cors(fields: &mut HeaderMap) {
    let methods = HeaderValue::from_static("GET, HEAD, PUT, POST, DELETE");
    fields.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
    let sent = "accept, authorization, content-type, if-match, if-none-match, last-event-id";
    fields.insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(sent));
    let read = "allow, etag, link, location, metastore-create-revision, metastore-lease, metastore-mod-revision, \
                metastore-revision, metastore-version, retry-after";
    fields.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(read));
    fields.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
}

/// The answer to whatever is not below [`BASE`], where there is nothing else.
pub(crate) async fn not_found() -> Response {
    Problem::new(NO_SUCH_PATH, format!("everything here is below {BASE}")).into_response()
}

/// The answer to a write that a page of another site has its visitor's browser make.
pub(crate) async fn foreign(request: Request) -> Response {
    let origin = request.headers().get(ORIGIN).map(HeaderValue::as_bytes);
    let origin = String::from_utf8_lossy(origin.unwrap_or_default()).into_owned();
    let detail = format!("a page of {origin} may not make its visitor's browser write so");
    let (parts, body) = request.into_parts();
    body::forgo(&parts.headers, body).await;
    Problem::new(FOREIGN_ORIGIN, detail).into_response()
}

/// The answer to a request for a host that this server does not go by.
pub(crate) async fn misdirected(request: Request, detail: String) -> Response {
    let (parts, body) = request.into_parts();
    body::forgo(&parts.headers, body).await;
    Problem::new(MISDIRECTED, detail).into_response()
}

async fn respond<S: Store>(State(shared): State<Arc<Shared<S>>>, request: Request) -> Response {
    let begun = Instant::now();
    let observer = Arc::clone(&shared.observer);
    let mut operation = None;
    let handled = AssertUnwindSafe(handle(shared, request, &mut operation))
        .catch_unwind()
        .await;
    let response = match handled {
        Ok(answer) => answer.unwrap_or_else(IntoResponse::into_response),
        Err(panic) => {
            tracing::error!(reason = panic_text(&*panic), "an HTTP handler panicked");
            Problem::new(INTERNAL, "the handler of this request failed").into_response()
        }
    };
    let (id, waits) = operation.map_or(("none", false), |operation: &Operation| {
        let waits = matches!(operation.action, Action::Watch | Action::AcquireLock);
        (operation.id, waits)
    });
    observer.http(id, response.status(), begun.elapsed(), waits);
    response
}

async fn handle<S: Store>(
    shared: Arc<Shared<S>>,
    request: Request,
    operation: &mut Option<&'static Operation>,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let admitted = admit(&shared, &parts, operation).await;
    let (operation, argument, parameters, store) = match admitted {
        Ok(Some(admitted)) => admitted,
        Ok(None) => return Ok(see_page()),
        Err(problem) => {
            body::forgo(&parts.headers, body).await;
            return Err(problem);
        }
    };
    let authorization = parts.headers.get(AUTHORIZATION).cloned();
    let call = Call {
        store,
        shared,
        argument,
        parameters,
        headers: parts.headers,
        body,
    };
    carry_out(operation, call)
        .await
        .map_err(|problem| match problem.error() {
            // A signed token is for the users and roles of when it was given. It will not do later either.
            Some(Error::AuthOldRevision) if is_signed(authorization.as_ref()) => Problem::new(
                UNAUTHENTICATED,
                "users or roles have changed since the token was given: get a new one",
            ),
            _ => problem,
        })
}

/// Whether a token was shown that has the three parts of a JSON Web Token (RFC 7519), which no password in base64 has.
fn is_signed(authorization: Option<&HeaderValue>) -> bool {
    let dots = |value: &HeaderValue| value.as_bytes().iter().filter(|byte| **byte == b'.').count();
    authorization.map(dots) == Some(2)
}

/// Finds what a request asks for, and holds it against everything but its body. `None` for whoever looks at the API as such.
async fn admit<S: Store>(
    shared: &Shared<S>,
    parts: &Parts,
    found: &mut Option<&'static Operation>,
) -> Result<Option<(&'static Operation, Bytes, Parameters, S)>, Problem> {
    let path = parts.uri.path().strip_prefix(BASE).unwrap_or_default();
    if matches!(path, "" | "/") {
        return match parts.method {
            Method::GET | Method::HEAD => Ok(None),
            _ => Err(Problem::method_not_allowed("GET, HEAD")),
        };
    }
    let Some((resource, argument)) = Resource::of(path) else {
        return Err(Problem::new(NO_SUCH_PATH, format!("{BASE} has no such path")));
    };
    let operation = operations::find(resource, &parts.method)?;
    *found = Some(operation);
    let argument = decode_path(argument)?;
    if resource.variable().is_some() && argument.is_empty() {
        let mut problem = Problem::new(INVALID_PATH, "");
        problem.explain("there is nothing in the path where a key, a name or an id belongs".to_owned());
        return Err(problem);
    }
    let parameters = Parameters::parse(parts.uri.query().unwrap_or_default(), operation.parameters)?;
    let missing = |parameter: &&parameters::Parameter| parameter.required && !parameters.has(parameter.name);
    if let Some(missing) = operation.parameters.iter().find(missing) {
        let detail = format!("{} is required: {}", missing.name, missing.about);
        return Err(Problem::parameter(INVALID_PARAMETER, missing.name, detail));
    }
    headers::check_conditions(operation, &parts.headers)?;
    check_vote(&shared.store, operation, &parameters)?;
    let certificate = parts.extensions.get::<ClientCertificate>();
    let certificate = certificate.map(|certificate| certificate.common_name.clone());
    let store = match Authorization::of(&parts.headers)? {
        _ if operation.open => shared.store.clone(),
        authorization => authorization.act(&shared.store, certificate).await?,
    };
    if !operation.open && !matches!(operation.body, RequestBody::None) {
        // Nobody in particular does not get to fill our memory.
        store.check_user().await?;
    }
    Ok(Some((operation, argument, parameters, store)))
}

async fn carry_out<S: Store>(operation: &Operation, call: Call<S>) -> Result<Response, Problem> {
    match operation.action {
        Action::GetKey => kv::get(call).await,
        Action::PutKey => kv::put(call).await,
        Action::DeleteKey => kv::delete(call).await,
        Action::ListKeys => list::list(call).await,
        Action::DeleteKeys => list::delete(call).await,
        Action::Watch => watch::watch(call).await,
        Action::Txn => txn::txn(call).await,
        Action::GrantLease => leases::grant(call).await,
        Action::ListLeases => leases::list(call).await,
        Action::GetLease => leases::get(call).await,
        Action::KeepLeaseAlive => leases::keep_alive(call).await,
        Action::RevokeLease => leases::revoke(call).await,
        Action::AcquireLock => locks::acquire(call).await,
        Action::GetLock => locks::get_lock(call).await,
        Action::ReleaseLock => locks::release(call).await,
        Action::Members => cluster::members(call).await,
        Action::Status => cluster::status(call).await,
        Action::Token => auth::token(call).await,
        Action::Document => {
            let document = call
                .shared
                .document
                .get_or_init(|| json_bytes(&openapi::document()).into());
            Ok(document_response(JSON, document.clone()))
        }
        Action::Page => {
            let page = call.shared.page.get_or_init(|| page::render().into());
            let mut response = document_response("text/html; charset=utf-8", page.clone());
            // It needs nothing but its own style, and nothing of what it shows is a client's.
            let policy = HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'");
            response.headers_mut().insert(CONTENT_SECURITY_POLICY, policy);
            Ok(response)
        }
    }
}

/// Holds a request against etcd's rules for members without a vote.
fn check_vote<S: Store>(store: &S, operation: &Operation, parameters: &Parameters) -> Result<(), Problem> {
    let served = match operation.learner {
        Learner::Answers => true,
        Learner::Serializable => parameters.flag("serializable"),
        Learner::Refuses => false,
    };
    if served {
        return Ok(());
    }
    match store.standing().is_learner {
        true => Err(Problem::from(Error::NotSupportedForLearner).of_member(store.header().member_id)),
        false => Ok(()),
    }
}

/// The revision up to which history is gone, which is why `wanted` cannot be read; `None` if it does not show. The
/// store's error does not say it, but a watcher that would begin there is told; whatever the client may watch.
async fn compact_revision<S: Store>(store: &S, wanted: Revision) -> Option<Revision> {
    let mut watcher = store.on_behalf_of_member().watch().await;
    let create = WatchCreate {
        key: Bytes::from_static(&[0]),
        range_end: Bytes::from_static(&[0, 0]),
        start_revision: wanted,
        ..Default::default()
    };
    watcher.create(create).ok()?;
    let next = std::future::poll_fn(|context| watcher.poll_next(context));
    match tokio::time::timeout(COMPACT_REVISION_TIMEOUT, next).await {
        Ok(WatchOutput::Compacted { compact_revision, .. }) => Some(compact_revision),
        _ => None,
    }
}

impl From<WatchError> for Problem {
    fn from(error: WatchError) -> Self {
        let name = match error {
            WatchError::Refused(error) => return error.into(),
            WatchError::NegativeRevision => "from_revision",
            WatchError::EmptyRange | WatchError::DuplicateId => "end",
        };
        Problem::parameter(INVALID_PARAMETER, name, error.to_string())
    }
}

fn json_bytes<T: Serialize>(body: &T) -> Vec<u8> {
    serde_json::to_vec(body).expect("what we write has no maps with keys other than text")
}

fn json_response<T: Serialize>(body: &T) -> Response {
    let mut response = Response::new(Body::from(json_bytes(body)));
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, HeaderValue::from_static(JSON));
    fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    fields.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn document_response(media_type: &'static str, text: Bytes) -> Response {
    let mut response = Response::new(Body::from(text));
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    fields.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Whoever opens the API in a browser wants to read about it.
fn see_page() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SEE_OTHER;
    let location = HeaderValue::from_static(concat!("/api/v1", "/docs"));
    response.headers_mut().insert(LOCATION, location);
    response
}

/// Reads the first byte as a choice of operation, and lines as a path's variable, a query, header fields and, after an
/// empty line, a body.
///
/// # Panics
/// If something that was read does not come out the same when it is written and read again.
pub fn fuzz_request(data: &[u8]) {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    let operation = &operations::OPERATIONS[usize::from(*choice) % operations::OPERATIONS.len()];
    let mut lines = rest.split(|byte| *byte == b'\n');
    let mut line = || lines.next().unwrap_or_default();
    let (path, query) = (line(), line());
    if let Ok(argument) = std::str::from_utf8(path).map(decode_path) {
        check(argument.map(|argument| {
            let again = decode_path(&parameters::encode(&argument)).expect("what is encoded is well formed");
            assert_eq!(again, argument);
        }));
    }
    if let Ok(query) = std::str::from_utf8(query) {
        check(Parameters::parse(query, operation.parameters).map(|parameters| {
            check(parameters::Selection::of_parameters(&parameters).map(drop));
        }));
    }
    let mut fields = HeaderMap::new();
    for field in std::iter::from_fn(|| Some(line()).filter(|line| !line.is_empty())) {
        let Some(colon) = field.iter().position(|byte| *byte == b':') else {
            continue;
        };
        let name = http::HeaderName::from_bytes(&field[..colon]);
        let value = HeaderValue::from_bytes(&field[colon + 1..]);
        if let (Ok(name), Ok(value)) = (name, value) {
            fields.append(name, value);
        }
    }
    check(Authorization::of(&fields).map(drop));
    check(headers::negotiate(&fields, &[JSON, "text/plain; charset=utf-8"]).map(drop));
    check(headers::Conditions::of(&fields).map(|conditions| {
        let _ = conditions.of_read(7);
        conditions.compares(&Bytes::from_static(b"k"), Some(7));
    }));
    let body = lines.collect::<Vec<_>>().join(&b'\n');
    check(txn::fuzz_body(&body));
}

/// A refusal must be one that can be sent.
fn check(result: Result<(), Problem>) {
    if let Err(problem) = result {
        let body: serde_json::Value = serde_json::from_slice(&problem.body()).expect("a problem is JSON");
        assert!(body["type"].is_string() && body["detail"].is_string(), "{body}");
        assert!(problem.into_response().status().is_client_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUESTS: [&[u8]; 5] = [
        b"a%2Fb%ff\nprefix=a&start=%00&end=b&limit=3&sort=-key\naccept: application/json;q=0.5, */*\n\n{}",
        b"%zz\nlease=0&wait=1h\nif-match: \"7\"\nif-none-match: *\nauthorization: Basic YTpi\n\n[]",
        b"\xff\nkey=&prefix=\naccept: a\nif-match: W/\"x\", \"y\"\nauthorization: Bearer \n\nnull",
        b"%\nrevision=-0&wait=0&wait=0\naccept: \xff\n\n{\"compare\":[{\"key\":\"a\",\"exists\":true,\"op\":\"!=\"}],\
          \"then\":[{\"put\":{\"key\":\"a\",\"value_base64\":\"/w==\"}},{\"txn\":{\"else\":[{\"delete\":{\"prefix\":\"b\"}}]}}]}",
        b"k\n=&&%3d\n\n{\"then\":[{\"get\":{\"limit\":-1}},{\"delete\":{}},{\"put\":{\"lease\":\"0\"}}]}",
    ];

    /// What the fuzz target checks, for each operation, on requests that have all kinds of values.
    #[test]
    fn requests_are_read_or_refused() {
        fuzz_request(&[]);
        for choice in 0..u8::try_from(operations::OPERATIONS.len()).expect("they are few") {
            for request in REQUESTS {
                fuzz_request(&[&[choice], request].concat());
            }
        }
    }

    /// The same on what becomes of them by chance.
    #[test]
    fn damaged_requests_are_read_or_refused() {
        const PIECES: [&str; 12] = [
            "%",
            "%00",
            "&",
            "=",
            "\n",
            "\n\n",
            "\"",
            "{",
            "[",
            ",",
            "if-match: W/",
            "9999999999999999999",
        ];
        crate::fuzzing::damage(&REQUESTS, &PIECES, 1, fuzz_request);
    }
}
