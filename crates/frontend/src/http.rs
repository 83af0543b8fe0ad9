//! What is answered over HTTP beside gRPC: the JSON gateway, and endpoints for health, version and metrics, with etcd's
//! bodies, headers and codes.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use api::kv::RangeRequest;
use api::limits::{ETCD_CLUSTER_VERSION, ETCD_VERSION};
use api::store::Alarm;
use api::{Credentials, Store};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, VARY, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use serde_json::Value;
use tower::Service as _;

use crate::{ClientCertificate, Frontend, Observer, Options, Traffic, access, gateway, rest};

const TEXT: &str = "text/plain; charset=utf-8";

/// The key whose readability stands for the store's.
const PROBE_KEY: &[u8] = b"health";

struct Endpoints<S> {
    store: S,
    observer: Arc<dyn Observer>,
    metrics: Arc<dyn Fn() -> String + Send + Sync>,
    variables: Arc<dyn Fn() -> Vec<(&'static str, Value)> + Send + Sync>,
}

/// The endpoints of a store.
pub fn router<S: Store>(store: S, options: &Options) -> Router {
    let endpoints = Endpoints::new(store, options);
    watched::<S>()
        .route("/version", any(version))
        .route("/debug/vars", any(variables::<S>))
        .with_state(endpoints)
}

/// Those of them that a listener for metrics has.
pub(crate) fn metrics_router<S: Store>(store: S, options: &Options) -> Router {
    watched::<S>().with_state(Endpoints::new(store, options))
}

/// What says how a member is. Whatever the method, since a wrong one gets etcd's answer, not axum's.
fn watched<S: Store>() -> Router<Arc<Endpoints<S>>> {
    Router::new()
        .route("/health", any(health::<S>))
        .route("/livez", any(livez::<S>))
        .route("/livez/{check}", any(livez::<S>))
        .route("/readyz", any(readyz::<S>))
        .route("/readyz/{check}", any(readyz::<S>))
        .route("/metrics", any(metrics::<S>))
        .fallback(not_found)
}

/// Answers a request that is not gRPC's.
pub(crate) async fn serve<S: Store>(frontend: Frontend<S>, mut request: Request<Body>) -> Response {
    let listener = frontend.listener();
    if listener.traffic == Traffic::Metrics {
        return call(frontend.endpoints(), request).await;
    }
    // Paths below it are a client's keys: nothing is made of them but what they say, slashes and dots included.
    let is_rest = listener.traffic == Traffic::Rest || rest::owns(request.uri().path());
    if !is_rest {
        if let Err(refusal) = access::check_path(&request) {
            return *refusal;
        }
        access::modernise(&mut request);
    }
    if !listener.tls
        && let Err(refusal) = frontend.access().check_host(&request)
    {
        return match is_rest {
            true => rest::misdirected(request, refusal).await,
            false => error(StatusCode::MISDIRECTED_REQUEST, &refusal),
        };
    }
    // The gateway goes by tokens alone, and whoever takes itself to be known by its certificate must hear of it. Where
    // auth is on, somebody who shows nothing is nobody.
    let is_named = listener.tls && frontend.gateway().is_some() && shows_name(&request);
    if is_named {
        let anybody = frontend.store().on_behalf_of(Credentials::default());
        if anybody.check_user().await.is_err() {
            return error(
                StatusCode::BAD_REQUEST,
                "CommonName of client sending a request against gateway will be ignored and not used as expected",
            );
        }
    }
    let origin = frontend.access().allowed_origin(&request);
    let names_origins = frontend.access().names_origins();
    let mut response = match is_rest {
        true if rest::is_preflight(&request) => StatusCode::OK.into_response(),
        true if frontend.access().forger(&request).is_some() => rest::foreign(request).await,
        true => call(frontend.endpoints(), request).await,
        false => answer(frontend, request).await,
    };
    if let Some(origin) = origin
        && response.status() != StatusCode::SWITCHING_PROTOCOLS
    {
        access::add_cors(&mut response, origin);
        if is_rest {
            rest::extend_cors(response.headers_mut());
        }
    }
    if is_rest && names_origins {
        // The answer to one origin, or to none, is not for others.
        response.headers_mut().append(VARY, HeaderValue::from_static("origin"));
    }
    response
}

/// Whether a request to the gateway comes from a client whose certificate has a name.
fn shows_name(request: &Request<Body>) -> bool {
    let certificate = request.extensions().get::<ClientCertificate>();
    request.uri().path().starts_with(gateway::PREFIX)
        && certificate.is_some_and(|certificate| !certificate.common_name.is_empty())
}

async fn answer<S: Store>(frontend: Frontend<S>, mut request: Request<Body>) -> Response {
    if request.method() == Method::OPTIONS {
        return StatusCode::OK.into_response();
    }
    let has_gateway = frontend.gateway().is_some();
    let subtrees: &[&str] = if has_gateway { &[gateway::PREFIX] } else { &[] };
    if let Some(redirect) = access::redirect(&request, subtrees) {
        return redirect;
    }
    access::unescape_names(&mut request);
    if has_gateway && request.uri().path().starts_with(gateway::PREFIX) {
        return gateway::serve(frontend, request).await;
    }
    call(frontend.endpoints(), request).await
}

async fn call(mut router: Router, request: Request<Body>) -> Response {
    router
        .call(request)
        .await
        .unwrap_or_else(|impossible| match impossible {})
}

async fn health<S: Store>(State(endpoints): State<Arc<Endpoints<S>>>, method: Method, uri: Uri) -> Response {
    if method != Method::GET {
        return method_not_allowed();
    }
    let parameters = Parameters::of(&uri);
    let serializable = parameters.first("serializable") == Some("true");
    let problem = endpoints.problem(&parameters.excluded(), serializable).await;
    endpoints.observer.health(problem.is_none());
    match problem {
        None => respond(
            StatusCode::OK,
            r#"{"health":"true","reason":""}"#,
            [(CONTENT_TYPE, TEXT)],
        ),
        Some(reason) => {
            tracing::warn!(reason, "/health fails");
            let reason = serde_json::Value::String(reason);
            error(
                StatusCode::SERVICE_UNAVAILABLE,
                &format!(r#"{{"health":"false","reason":{reason}}}"#),
            )
        }
    }
}

async fn livez<S: Store>(
    State(endpoints): State<Arc<Endpoints<S>>>,
    check: Option<Path<String>>,
    method: Method,
    uri: Uri,
) -> Response {
    run_checks(&endpoints, &LIVEZ, check, &method, &uri).await
}

async fn readyz<S: Store>(
    State(endpoints): State<Arc<Endpoints<S>>>,
    check: Option<Path<String>>,
    method: Method,
    uri: Uri,
) -> Response {
    run_checks(&endpoints, &READYZ, check, &method, &uri).await
}

async fn version(method: Method) -> Response {
    if method != Method::GET {
        return method_not_allowed();
    }
    let body = format!(
        r#"{{"etcdserver":"{ETCD_VERSION}","etcdcluster":"{ETCD_CLUSTER_VERSION}","storage":"{ETCD_CLUSTER_VERSION}"}}"#
    );
    respond(StatusCode::OK, body, [(CONTENT_TYPE, "application/json")])
}

async fn metrics<S: Store>(State(endpoints): State<Arc<Endpoints<S>>>) -> Response {
    let text = (endpoints.metrics)();
    respond(
        StatusCode::OK,
        text,
        [(
            CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8; escaping=underscores",
        )],
    )
}

/// What Go's package expvar says of an etcd, as far as it is true of this process.
async fn variables<S: Store>(State(endpoints): State<Arc<Endpoints<S>>>, method: Method) -> Response {
    if method != Method::GET {
        return method_not_allowed();
    }
    let status = endpoints.store.status();
    let id = format!("{:x}", status.header.member_id);
    let raft_state = match status.leader {
        leader if leader == status.header.member_id => "StateLeader",
        _ => "StateFollower",
    };
    let mut variables = (endpoints.variables)();
    variables.push((
        "raft.status",
        serde_json::json!({
            "id": id,
            "term": status.header.raft_term,
            "commit": status.raft_index,
            "lead": format!("{:x}", status.leader),
            "raftState": raft_state,
            "applied": status.raft_applied_index,
        }),
    ));
    let lines: Vec<String> = variables
        .into_iter()
        .map(|(name, value)| format!("{name:?}: {value}"))
        .collect();
    respond(
        StatusCode::OK,
        format!("{{\n{}\n}}\n", lines.join(",\n")),
        [(CONTENT_TYPE, "application/json; charset=utf-8")],
    )
}

async fn not_found() -> Response {
    error(StatusCode::NOT_FOUND, "404 page not found")
}

/// A condition that `/livez` or `/readyz` depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
    LogWrite,
}

impl Check {
    fn name(self) -> &'static str {
        match self {
            Check::DataCorruption => "data_corruption",
            Check::SerializableRead => "serializable_read",
            Check::LinearizableRead => "linearizable_read",
            Check::NonLearner => "non_learner",
            Check::LogWrite => "log_write",
        }
    }

    /// Whether it is named among several only when it fails: etcd does not have it, and its reports list what it has.
    fn is_silent(self) -> bool {
        self == Check::LogWrite
    }
}

/// An endpoint that stands for several checks.
struct Checks {
    kind: &'static str,
    checks: &'static [Check],
}

const LIVEZ: Checks = Checks {
    kind: "livez",
    checks: &[Check::SerializableRead],
};

const READYZ: Checks = Checks {
    kind: "readyz",
    checks: &[
        // First: a leader whose log is stalled takes its time to fail a linearizable read.
        Check::LogWrite,
        Check::DataCorruption,
        Check::SerializableRead,
        Check::LinearizableRead,
        Check::NonLearner,
    ],
};

async fn run_checks<S: Store>(
    endpoints: &Endpoints<S>,
    Checks { kind, checks }: &Checks,
    only: Option<Path<String>>,
    method: &Method,
    uri: &Uri,
) -> Response {
    let chosen: Vec<Check> = match &only {
        Some(Path(name)) => checks.iter().copied().filter(|check| check.name() == name).collect(),
        None => {
            let parameters = Parameters::of(uri);
            let excluded = parameters.excluded();
            checks
                .iter()
                .copied()
                .filter(|check| !excluded.contains(check.name()))
                .collect()
        }
    };
    if only.is_some() && chosen.is_empty() {
        return not_found().await;
    }
    if *method != Method::GET {
        return method_not_allowed();
    }
    let mut report = String::new();
    let mut healthy = true;
    for check in chosen {
        let name = check.name();
        let failure = endpoints.failure(check).await;
        endpoints.observer.health_check(kind, name, failure.is_none());
        match failure {
            None if check.is_silent() && only.is_none() => {}
            None => report += &format!("[+]{name} ok\n"),
            Some(reason) => {
                healthy = false;
                report += &format!("[-]{name} failed: {reason}\n");
            }
        }
    }
    if !healthy {
        tracing::error!(kind, report, "health checks fail");
        return error(StatusCode::SERVICE_UNAVAILABLE, &report);
    }
    if !Parameters::of(uri).has("verbose") {
        report.clear();
    }
    report += "ok\n";
    respond(
        StatusCode::OK,
        report,
        [(CONTENT_TYPE, TEXT), (X_CONTENT_TYPE_OPTIONS, "nosniff")],
    )
}

impl<S: Store> Endpoints<S> {
    fn new(store: S, options: &Options) -> Arc<Self> {
        Arc::new(Endpoints {
            store,
            observer: Arc::clone(&options.observer),
            metrics: Arc::clone(&options.metrics),
            variables: Arc::clone(&options.variables),
        })
    }

    /// Why `/health` should fail, if it should.
    async fn problem(&self, excluded: &HashSet<&str>, serializable: bool) -> Option<String> {
        let status = self.store.status();
        let alarm = |alarm: &Alarm| match alarm {
            Alarm::NoSpace(_) => "NOSPACE",
            Alarm::Corrupt(_) => "CORRUPT",
        };
        if let Some(name) = status.alarms.iter().map(alarm).find(|name| !excluded.contains(name)) {
            return Some(format!("ALARM {name}"));
        }
        if let Some(stalled) = status.log_stalled
            && !excluded.contains("LOG_STALLED")
        {
            return Some(format!("LOG_STALLED: {}", stalled_text(stalled)));
        }
        if !serializable && status.leader == 0 {
            return Some("RAFT NO LEADER".to_owned());
        }
        let error = self.read(serializable).await.err()?;
        Some(format!("RANGE ERROR:{error}"))
    }

    /// Why a check fails, if it does.
    async fn failure(&self, check: Check) -> Option<String> {
        match check {
            Check::DataCorruption => {
                let corrupt = |alarm: &Alarm| matches!(alarm, Alarm::Corrupt(_));
                let active = self.store.status().alarms.iter().any(corrupt);
                active.then(|| "alarm activated: CORRUPT".to_owned())
            }
            Check::SerializableRead => self.read(true).await.err(),
            Check::LinearizableRead => self.read(false).await.err(),
            Check::NonLearner => self
                .store
                .status()
                .is_learner
                .then(|| "not supported for learner".to_owned()),
            Check::LogWrite => self.store.status().log_stalled.map(stalled_text),
        }
    }

    async fn read(&self, serializable: bool) -> Result<(), String> {
        let request = RangeRequest {
            key: Bytes::from_static(PROBE_KEY),
            limit: 1,
            keys_only: true,
            serializable,
            ..Default::default()
        };
        match tokio::time::timeout(self.store.limits().request_timeout, self.store.range(request)).await {
            // Whoever asks for the health of a store where auth is on need not be anybody.
            Ok(Ok(_) | Err(api::Error::UserEmpty | api::Error::PermissionDenied)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("context deadline exceeded".to_owned()),
        }
    }
}

fn stalled_text(stalled: Duration) -> String {
    format!(
        "the disk of the Raft log has not finished a write for {:.1}s",
        stalled.as_secs_f64()
    )
}

/// A URL's parameters; one may come many times.
struct Parameters(Vec<(String, String)>);

impl Parameters {
    fn of(uri: &Uri) -> Self {
        Parameters(Query::try_from_uri(uri).map_or_else(|_| Vec::new(), |Query(pairs)| pairs))
    }

    fn first(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    fn has(&self, name: &str) -> bool {
        self.first(name).is_some()
    }

    fn excluded(&self) -> HashSet<&str> {
        let values = self
            .0
            .iter()
            .filter(|(key, value)| key == "exclude" && !value.is_empty());
        values.map(|(_, value)| value.as_str()).collect()
    }
}

fn method_not_allowed() -> Response {
    let mut response = error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
    response
}

/// An error as Go's `http.Error` writes it.
pub(crate) fn error(status: StatusCode, text: &str) -> Response {
    let body = format!("{text}\n");
    respond(
        status,
        body,
        [(CONTENT_TYPE, TEXT), (X_CONTENT_TYPE_OPTIONS, "nosniff")],
    )
}

fn respond<const N: usize>(
    status: StatusCode,
    body: impl Into<Body>,
    headers: [(HeaderName, &'static str); N],
) -> Response {
    (status, headers, body.into()).into_response()
}
