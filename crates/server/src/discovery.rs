//! Bootstrap through a discovery service (`--discovery-endpoints`, `--discovery-token`): the members of a new cluster
//! find each other in another cluster, which may be etcd's or ours.
//!
//! Whoever sets the service up writes the size of the new cluster to `/_etcd/registry/TOKEN/_config/size`. Each member
//! writes its name and peer URLs to `/_etcd/registry/TOKEN/members/ID` and waits until there are as many; whoever wrote
//! first belongs to the cluster, by the revisions at which the keys were created. A member that comes too late is refused.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use api::MemberId;
use api::auth::{AuthenticateRequest, AuthenticateResponse};
use api::kv::{PutRequest, PutResponse, RangeRequest, RangeResponse};
use frontend::proto::etcdserverpb::watch_request::RequestUnion;
use frontend::proto::etcdserverpb::{WatchCreateRequest, WatchRequest, WatchResponse};
use futures::{FutureExt as _, StreamExt as _};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;
use tonic::client::Grpc;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Uri};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::bootstrap::InitialMembers;
use crate::peer::PeerUrl;
use crate::tls::{TlsClient, TlsOptions};

const REGISTRY: &str = "/_etcd/registry";
/// Pause before a call is tried again after all endpoints failed, within the time that it has.
const CALL_PAUSE: Duration = Duration::from_millis(100);
/// After so many failures in a row the pauses between attempts grow no more: then they are 2^8 s.
const DOUBLINGS_MAX: u32 = 8;
/// Pings are no more frequent than this, as with grpc-go: servers shut out whoever pings more often.
const KEEPALIVE_TIME_MIN: Duration = Duration::from_secs(10);

/// Where the discovery service is, and how to talk to it.
#[derive(Clone, PartialEq, Eq)]
pub struct DiscoveryOptions {
    /// The new cluster's name at the service.
    pub token: String,
    /// The service's members: `http://host:port`, `https://host:port`, `host:port`, `unix:path`, `unixs:path`.
    pub endpoints: Vec<String>,
    /// How long making a connection, or logging in, may take; 0 for no limit.
    pub dial_timeout: Duration,
    /// How long a request may take.
    pub request_timeout: Duration,
    /// Time without traffic after which the service is pinged while something is awaited; 0 for never.
    pub keepalive_time: Duration,
    /// How long that ping may stay unanswered.
    pub keepalive_timeout: Duration,
    /// No TLS where an endpoint does not say which it is.
    pub insecure_transport: bool,
    /// Take any certificate.
    pub insecure_skip_verify: bool,
    /// The certificate that is shown to the service.
    pub cert_file: Option<PathBuf>,
    /// Its key.
    pub key_file: Option<PathBuf>,
    /// The authorities of the service's certificate, if not the system's.
    pub ca_file: Option<PathBuf>,
    /// Who logs in; empty for nobody.
    pub user: String,
    /// With this.
    pub password: String,
}

impl fmt::Debug for DiscoveryOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What is printed must show no password.
        f.debug_struct("DiscoveryOptions")
            .field("token", &self.token)
            .field("endpoints", &self.endpoints)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// Why there is no cluster, in etcd's words where it has some.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DiscoveryError {
    #[error("discovery: size key is bad")]
    BadSize,
    #[error("discovery: size key not found")]
    NoSize,
    #[error("discovery: cluster is full")]
    Full,
    #[error("discovery: invalid peer URL: {0:?}")]
    InvalidUrl(String),
    #[error("discovery cluster {0} has duplicate url")]
    DuplicateUrl(String),
    #[error("discovery cluster {0} gives this member's name to another one too; set --name")]
    DuplicateName(String),
    /// The settings are of no use, whatever the service says.
    #[error("{0}")]
    Settings(String),
    /// The service does not let us in.
    #[error("{0}")]
    Login(String),
}

/// Registers this member and waits for the others; returns all of them by name, with their peer URLs.
///
/// It tries for ever where the service does not answer, as etcd does: its members may be started later than ours.
///
/// # Errors
/// No cluster of this token can be had, or not with this member.
pub(crate) async fn join(
    options: &DiscoveryOptions,
    id: MemberId,
    own: (&str, &[String]),
) -> Result<InitialMembers, DiscoveryError> {
    let (name, urls) = own;
    let mut pairs: Vec<String> = urls.iter().map(|url| format!("{name}={url}")).collect();
    pairs.sort();
    let client = Client::new(options).await;
    let joined = match client {
        Ok(client) => {
            let mut discovery = Discovery {
                service: client,
                keys: Keys::new(&options.token),
                own_key: Keys::new(&options.token).member(id),
                failures: 0,
            };
            discovery.join(pairs.join(",")).await
        }
        Err(error) => Err(error),
    };
    let endpoints = options.endpoints.join(",");
    let members = joined.and_then(|cluster| {
        let members = parse_cluster(&cluster)?;
        // Two of one name count as one with the URLs of both, which is none that we know.
        let mut own = urls.to_vec();
        own.sort();
        match members.get(name) == Some(&own) {
            true => Ok((cluster, members)),
            false => Err(DiscoveryError::DuplicateName(cluster)),
        }
    });
    match members {
        Ok((cluster, members)) => {
            tracing::info!(
                "discovery-token" = options.token,
                "discovery-endpoints" = endpoints,
                cluster,
                "discovery joined cluster successfully"
            );
            Ok(members)
        }
        Err(error) => {
            tracing::error!(
                "discovery-token" = options.token,
                "discovery-endpoints" = endpoints,
                %error,
                "discovery failed to join cluster"
            );
            if error == DiscoveryError::Full {
                tracing::warn!("do not reuse discovery token; generate a new one to bootstrap a cluster");
            }
            Err(error)
        }
    }
}

/// The members in `name=url,name=url`.
fn parse_cluster(text: &str) -> Result<InitialMembers, DiscoveryError> {
    let mut members: InitialMembers = BTreeMap::new();
    let mut all = std::collections::BTreeSet::new();
    for pair in text.split(',').filter(|pair| !pair.is_empty()) {
        let invalid = || DiscoveryError::InvalidUrl(pair.to_owned());
        let (name, url) = pair.split_once('=').ok_or_else(invalid)?;
        let url = url.trim();
        url.parse::<PeerUrl>().map_err(|_| invalid())?;
        if !all.insert(url) {
            return Err(DiscoveryError::DuplicateUrl(text.to_owned()));
        }
        members.entry(name.to_owned()).or_default().push(url.to_owned());
    }
    members.values_mut().for_each(|urls| urls.sort());
    Ok(members)
}

/// The keys of one cluster at the service.
struct Keys(String);

impl Keys {
    fn new(token: &str) -> Self {
        Keys(clean(&format!("{REGISTRY}/{token}")))
    }

    fn size(&self) -> String {
        clean(&format!("{}/_config/size", self.0))
    }

    fn members(&self) -> String {
        clean(&format!("{}/members", self.0))
    }

    fn member(&self, id: MemberId) -> String {
        format!("{}/{id:x}", self.members())
    }
}

/// A path as Go's path.Join makes it, which is what etcd's members look under.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Whoever registered, in the order in which they did.
#[derive(Debug, Default)]
struct Cluster {
    /// Each with the revision at which its key was created, its key, and its names and URLs.
    members: Vec<(i64, String, String)>,
}

impl Cluster {
    fn add(&mut self, key: &[u8], value: &[u8], create_revision: i64) {
        let (key, value) = (String::from_utf8_lossy(key), String::from_utf8_lossy(value));
        let (key, value) = (key.trim(), value.trim());
        let refused = if !value.contains('=') {
            Some("invalid peer info returned from discovery service")
        } else if self.members.iter().any(|(_, known, _)| known == key) {
            Some("found duplicate peer from discovery service")
        } else {
            None
        };
        match refused {
            Some(cause) => tracing::warn!(memberKey = key, memberInfo = value, "{cause}"),
            None => {
                tracing::info!(memberKey = key, memberInfo = value, "found peer from discovery service");
                self.members.push((create_revision, key.to_owned(), value.to_owned()));
                self.members.sort();
            }
        }
    }

    /// Whether the cluster has `size` members without the one that registers by this key.
    fn is_full_for(&self, key: &str, size: usize) -> bool {
        self.members.iter().take(size).all(|(_, known, _)| known != key) && self.members.len() >= size
    }

    /// The first `size` members.
    fn initial(&self, size: usize) -> String {
        let members: Vec<&str> = self.members.iter().take(size).map(|member| &member.2[..]).collect();
        members.join(",")
    }
}

/// What is asked of the service. A trait, so that tests can say what it answers.
trait Service {
    /// A stream of what is registered.
    type Watch;

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Status>;
    async fn put(&self, key: &str, value: &str) -> Result<(), Status>;
    /// Watches the keys with this prefix, from this revision on.
    async fn watch(&self, prefix: &str, revision: i64) -> Result<Self::Watch, Status>;
    /// What was registered next; nothing if the stream is over.
    async fn next(&self, watch: &mut Self::Watch) -> Result<Option<WatchResponse>, Status>;
}

struct Discovery<S> {
    service: S,
    keys: Keys,
    own_key: String,
    /// Attempts that failed in a row.
    failures: u32,
}

impl<S: Service> Discovery<S> {
    async fn join(&mut self, own: String) -> Result<String, DiscoveryError> {
        self.check().await?;
        self.register(&own).await;
        loop {
            let (mut cluster, size, revision) = self.check().await?;
            if cluster.members.len() >= size || self.wait(&mut cluster, size, revision).await {
                return Ok(cluster.initial(size));
            }
            // The watch broke off. What it may have missed is read again.
            self.back_off("waiting for peers").await;
        }
    }

    /// Who registered, how many there are to be, and the revision of that.
    async fn check(&mut self) -> Result<(Cluster, usize, i64), DiscoveryError> {
        loop {
            match self.try_check().await {
                Ok((cluster, size, _)) if cluster.is_full_for(&self.own_key, size) => {
                    return Err(DiscoveryError::Full);
                }
                Ok(checked) => {
                    self.failures = 0;
                    return Ok(checked);
                }
                Err(CheckError::Fatal(error)) => return Err(error),
                Err(CheckError::Again) => self.back_off("cluster status check").await,
            }
        }
    }

    async fn try_check(&mut self) -> Result<(Cluster, usize, i64), CheckError> {
        let key = self.keys.size();
        let size = RangeRequest {
            key: key.clone().into(),
            ..Default::default()
        };
        let size = self.service.range(size).await.map_err(|error| {
            tracing::warn!(
                clusterSizeKey = key,
                error = error.message(),
                "failed to get cluster size from discovery service"
            );
            CheckError::Again
        })?;
        let size = size.kvs.first().ok_or(CheckError::Fatal(DiscoveryError::NoSize))?;
        let size = parse_size(&size.value).ok_or(CheckError::Fatal(DiscoveryError::BadSize))?;

        let prefix = self.keys.members();
        let members = RangeRequest {
            key: prefix.clone().into(),
            range_end: prefix_end(&prefix).into(),
            ..Default::default()
        };
        let members = self.service.range(members).await.map_err(|error| {
            tracing::warn!(
                membersKeyPrefix = prefix,
                error = error.message(),
                "failed to get cluster members from discovery service"
            );
            CheckError::Again
        })?;
        let mut cluster = Cluster::default();
        for kv in &members.kvs {
            cluster.add(&kv.key, &kv.value, kv.create_revision);
        }
        let revision = members.header.map_or(0, |header| header.revision);
        Ok((cluster, size, revision))
    }

    async fn register(&mut self, own: &str) {
        while let Err(error) = self.service.put(&self.own_key, own).await {
            tracing::warn!(
                memberKey = self.own_key,
                error = error.message(),
                "failed to register members itself to the discovery service"
            );
            self.back_off("register member itself").await;
        }
        self.failures = 0;
        tracing::info!(
            memberKey = self.own_key,
            memberInfo = own,
            "register member itself successfully"
        );
    }

    /// Waits until all have registered; false if that cannot be told any more.
    async fn wait(&mut self, cluster: &mut Cluster, size: usize, revision: i64) -> bool {
        tracing::info!(
            clusterSize = size,
            "found-peers" = cluster.members.len(),
            "waiting for peers from discovery service"
        );
        let watched = async {
            let mut watch = self.service.watch(&self.keys.members(), revision + 1).await?;
            while let Some(response) = self.service.next(&mut watch).await? {
                for event in &response.events {
                    if let Some(kv) = &event.kv {
                        cluster.add(&kv.key, &kv.value, kv.create_revision);
                    }
                }
                if cluster.members.len() >= size {
                    return Ok(true);
                }
                if response.canceled {
                    return Err(Status::cancelled(response.cancel_reason));
                }
            }
            Ok(false)
        };
        match watched.await {
            Ok(true) => {
                tracing::info!(
                    clusterSize = size,
                    "found-peers" = cluster.members.len(),
                    "found all needed peers from discovery service"
                );
                true
            }
            Ok(false) => false,
            Err(error) => {
                let error: Status = error;
                tracing::warn!(error = error.message(), "failed to watch the discovery service");
                false
            }
        }
    }

    /// Waits before the next attempt, longer and longer.
    async fn back_off(&mut self, reason: &str) {
        self.failures = (self.failures + 1).min(DOUBLINGS_MAX);
        let backoff = Duration::from_secs(1 << self.failures);
        tracing::warn!(reason, ?backoff, "retry connecting to discovery service");
        tokio::time::sleep(backoff).await;
    }
}

enum CheckError {
    Fatal(DiscoveryError),
    /// It was logged.
    Again,
}

fn parse_size(value: &[u8]) -> Option<usize> {
    let size: i64 = std::str::from_utf8(value).ok()?.parse().ok()?;
    usize::try_from(size).ok().filter(|size| *size > 0)
}

/// Where the keys with a prefix end. Prefixes here end with a letter, so the last byte can be counted up.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().expect("no prefix is empty") += 1;
    end
}

/// The service as it is reached.
struct Client {
    /// With its endpoint.
    channels: Vec<(String, Channel)>,
    /// The channel that worked last.
    turn: AtomicUsize,
    request_timeout: Duration,
    login: Option<AuthenticateRequest>,
    login_timeout: Duration,
    token: parking_lot::Mutex<Option<AsciiMetadataValue>>,
}

impl Client {
    async fn new(options: &DiscoveryOptions) -> Result<Self, DiscoveryError> {
        let wanted = !options.insecure_transport
            || options.insecure_skip_verify
            || options.cert_file.is_some()
            || options.key_file.is_some()
            || options.ca_file.is_some();
        let mut tls = None;
        let mut channels = Vec::new();
        for endpoint in &options.endpoints {
            let (place, security) = place(endpoint);
            let tls = match security {
                Security::Plain => None,
                Security::Either if !wanted => None,
                Security::Either | Security::Tls => {
                    if tls.is_none() {
                        tls = Some(tls_client(options)?);
                    }
                    tls.clone()
                }
            };
            channels.push((endpoint.clone(), channel(place, tls, options)?));
        }
        let has_login = !options.user.is_empty() && !options.password.is_empty();
        let client = Client {
            channels,
            turn: AtomicUsize::new(0),
            request_timeout: options.request_timeout,
            login: has_login.then(|| AuthenticateRequest {
                name: options.user.clone(),
                password: options.password.clone(),
            }),
            login_timeout: match options.dial_timeout {
                Duration::ZERO => options.request_timeout,
                timeout => timeout,
            },
            token: parking_lot::Mutex::new(None),
        };
        let login = client.log_in().await;
        login.map_err(|error| DiscoveryError::Login(error.message().to_owned()))?;
        Ok(client)
    }

    /// Fetches a token, if there is a user.
    async fn log_in(&self) -> Result<(), Status> {
        let Some(login) = &self.login else { return Ok(()) };
        *self.token.lock() = None;
        let path = "/etcdserverpb.Auth/Authenticate";
        let answer: Result<AuthenticateResponse, Status> = self.call(path, login, self.login_timeout).await;
        let token = match answer {
            Ok(answer) => answer.token,
            // As etcd's clients do.
            Err(error) if error.message().contains("authentication is not enabled") => return Ok(()),
            Err(error) => return Err(error),
        };
        let token = token
            .parse()
            .map_err(|_| Status::internal("the token is no text for a header"))?;
        *self.token.lock() = Some(token);
        Ok(())
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = self.token.lock().clone() {
            request.metadata_mut().insert("token", token);
        }
        request
    }

    /// Calls one endpoint after the other until one answers, as long as there is time.
    async fn call<Q, A>(&self, path: &'static str, message: &Q, timeout: Duration) -> Result<A, Status>
    where
        Q: prost::Message + Clone + 'static,
        A: prost::Message + Default + 'static,
    {
        let deadline = Instant::now() + timeout;
        let mut last = Status::unavailable("no endpoint answered in time");
        let tries = async {
            loop {
                for _ in 0..self.channels.len() {
                    let (endpoint, channel) = self.current();
                    let mut request = self.request(message.clone());
                    request.set_timeout(deadline.saturating_duration_since(Instant::now()));
                    let mut grpc = Grpc::new(channel.clone());
                    let answer = match ready(&mut grpc).await {
                        Ok(()) => {
                            grpc.unary(request, path.parse().expect("a path"), ProstCodec::default())
                                .await
                        }
                        Err(error) => Err(error),
                    };
                    match answer {
                        Ok(answer) => return Ok(answer.into_inner()),
                        Err(error) if is_elsewhere(&error) => last = self.failed(endpoint, &error),
                        Err(error) => return Err(error),
                    }
                }
                tokio::time::sleep(CALL_PAUSE).await;
            }
        };
        match tokio::time::timeout_at(deadline, tries).await {
            Ok(answer) => answer,
            Err(_) => Err(last),
        }
    }

    /// The same as a user, whose token may have ended.
    async fn call_as_user<Q, A>(&self, path: &'static str, message: &Q) -> Result<A, Status>
    where
        Q: prost::Message + Clone + 'static,
        A: prost::Message + Default + 'static,
    {
        match self.call(path, message, self.request_timeout).await {
            Err(error) if self.login.is_some() && wants_login(&error) => {
                self.log_in().await?;
                self.call(path, message, self.request_timeout).await
            }
            answer => answer,
        }
    }

    fn current(&self) -> &(String, Channel) {
        &self.channels[self.turn.load(Ordering::Relaxed) % self.channels.len()]
    }

    /// Goes over to the next endpoint.
    fn failed(&self, endpoint: &str, error: &Status) -> Status {
        self.turn.fetch_add(1, Ordering::Relaxed);
        let mut text = format!("{endpoint}: {}", error.message());
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        Status::unavailable(text)
    }
}

/// Whether the service asks for another login: the token has ended, there is none, or users have changed since.
fn wants_login(error: &Status) -> bool {
    error.code() == Code::Unauthenticated
        || ["user name is empty", "revision of auth store is old"]
            .iter()
            .any(|text| error.message().contains(text))
}

async fn ready(grpc: &mut Grpc<Channel>) -> Result<(), Status> {
    let ready = grpc.ready().await;
    ready.map_err(|error| Status::from_error(Box::new(error)))
}

/// Whether another endpoint may do better: there was no answer.
fn is_elsewhere(error: &Status) -> bool {
    error.code() == Code::Unavailable || std::error::Error::source(error).is_some()
}

impl Service for Client {
    type Watch = Streaming<WatchResponse>;

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Status> {
        self.call_as_user("/etcdserverpb.KV/Range", &request).await
    }

    async fn put(&self, key: &str, value: &str) -> Result<(), Status> {
        let put = PutRequest {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            ..Default::default()
        };
        let done: Result<PutResponse, Status> = self.call_as_user("/etcdserverpb.KV/Put", &put).await;
        done.map(|_| ())
    }

    async fn watch(&self, prefix: &str, revision: i64) -> Result<Self::Watch, Status> {
        let create = WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
                key: prefix.to_owned().into(),
                range_end: prefix_end(prefix).into(),
                start_revision: revision,
                ..Default::default()
            })),
        };
        // The stream of requests stays open, or the service would end the watch.
        let requests = futures::stream::once(std::future::ready(create)).chain(std::future::pending().into_stream());
        let (endpoint, channel) = self.current();
        let mut grpc = Grpc::new(channel.clone());
        let opening = async {
            ready(&mut grpc).await?;
            let path = "/etcdserverpb.Watch/Watch".parse().expect("a path");
            grpc.streaming(self.request(requests), path, ProstCodec::default())
                .await
        };
        match tokio::time::timeout(self.request_timeout, opening).await {
            Ok(Ok(stream)) => Ok(stream.into_inner()),
            Ok(Err(error)) if is_elsewhere(&error) => Err(self.failed(endpoint, &error)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self.failed(endpoint, &Status::unavailable("no answer in time"))),
        }
    }

    async fn next(&self, watch: &mut Self::Watch) -> Result<Option<WatchResponse>, Status> {
        let next = watch.message().await;
        if next.as_ref().is_err_and(is_elsewhere) {
            self.turn.fetch_add(1, Ordering::Relaxed);
        }
        next
    }
}

/// What an endpoint says about TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Security {
    Plain,
    Tls,
    /// It is for the flags to say.
    Either,
}

/// Where an endpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// A host and a port.
    Tcp(String),
    Unix(PathBuf),
}

/// Reads an endpoint as etcd's clients do.
fn place(endpoint: &str) -> (Place, Security) {
    let endpoint = endpoint.trim();
    let unix = |path: &str| Place::Unix(path.strip_prefix("//").unwrap_or(path).into());
    let host = |rest: &str| Place::Tcp(rest.split('/').next().unwrap_or_default().to_owned());
    if let Some(path) = endpoint.strip_prefix("unix:") {
        (unix(path), Security::Either)
    } else if let Some(path) = endpoint.strip_prefix("unixs:") {
        (unix(path), Security::Tls)
    } else if let Some(rest) = endpoint.strip_prefix("http://") {
        (host(rest), Security::Plain)
    } else if let Some(rest) = endpoint.strip_prefix("https://") {
        (host(rest), Security::Tls)
    } else {
        (Place::Tcp(endpoint.to_owned()), Security::Either)
    }
}

fn tls_client(options: &DiscoveryOptions) -> Result<Arc<TlsClient>, DiscoveryError> {
    let tls = TlsOptions {
        cert_file: options.cert_file.clone(),
        key_file: options.key_file.clone(),
        trusted_ca_file: options.ca_file.clone(),
        insecure_skip_verify: options.insecure_skip_verify,
        alpn_protocols: vec![b"h2".to_vec()],
        ..TlsOptions::for_clients()
    };
    TlsClient::new(tls).map_err(|error| DiscoveryError::Settings(format!("TLS of the discovery service: {error}")))
}

/// A connection's bytes.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Connects when something is to be sent, and again after it broke off.
fn channel(place: Place, tls: Option<Arc<TlsClient>>, options: &DiscoveryOptions) -> Result<Channel, DiscoveryError> {
    let authority = match &place {
        Place::Tcp(address) => address.clone(),
        Place::Unix(_) => "localhost".to_owned(),
    };
    let invalid = |error: &dyn fmt::Display| {
        DiscoveryError::Settings(format!("--discovery-endpoints: {authority:?} is no address: {error}"))
    };
    let uri: Uri = format!("http://{authority}").parse().map_err(|error| invalid(&error))?;
    if matches!(place, Place::Tcp(_)) && uri.port_u16().is_none() {
        return Err(invalid(&"it has no port"));
    }
    let host = uri.host().unwrap_or_default().to_owned();
    let mut endpoint = Channel::builder(uri);
    if !options.dial_timeout.is_zero() {
        endpoint = endpoint.connect_timeout(options.dial_timeout);
    }
    if !options.keepalive_time.is_zero() {
        endpoint = endpoint
            .http2_keep_alive_interval(options.keepalive_time.max(KEEPALIVE_TIME_MIN))
            .keep_alive_timeout(options.keepalive_timeout);
    }
    let connector = tower::service_fn(move |_: Uri| {
        let (place, tls, host) = (place.clone(), tls.clone(), host.clone());
        async move {
            let plain: Box<dyn Duplex> = match place {
                Place::Tcp(address) => {
                    let socket = TcpStream::connect(address).await?;
                    socket.set_nodelay(true)?;
                    Box::new(socket)
                }
                Place::Unix(path) => Box::new(UnixStream::connect(path).await?),
            };
            let Some(tls) = tls else { return Ok(TokioIo::new(plain)) };
            let secured = tls.connect(plain, &host).await.map_err(std::io::Error::other)?;
            Ok::<_, std::io::Error>(TokioIo::new(Box::new(secured) as Box<dyn Duplex>))
        }
    });
    Ok(endpoint.connect_with_connector_lazy(connector))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    use api::kv::{Event, KeyValue, ResponseHeader};

    use super::*;

    /// A service that says what it is told to, and fails as often as it is told to.
    #[derive(Default)]
    struct Told {
        size: Option<&'static str>,
        kvs: RefCell<Vec<KeyValue>>,
        /// Calls that fail before one does not.
        failures: RefCell<u32>,
        /// What the watches send, one after the other: each a stream of keys with their revisions.
        watches: RefCell<VecDeque<Vec<KeyValue>>>,
        calls: RefCell<Vec<String>>,
    }

    fn kv(key: &str, value: &str, revision: i64) -> KeyValue {
        KeyValue {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            create_revision: revision,
            mod_revision: revision,
            version: 1,
            ..Default::default()
        }
    }

    fn member(id: &str, url: &str, revision: i64) -> KeyValue {
        kv(
            &format!("/_etcd/registry/t/members/{id}"),
            &format!("m{id}=http://{url}"),
            revision,
        )
    }

    impl Told {
        fn fails(&self) -> Result<(), Status> {
            let mut failures = self.failures.borrow_mut();
            if *failures == 0 {
                return Ok(());
            }
            *failures -= 1;
            Err(Status::unavailable("away"))
        }

        fn revision(&self) -> i64 {
            10 + self.kvs.borrow().len() as i64
        }
    }

    impl Service for Told {
        type Watch = VecDeque<KeyValue>;

        async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Status> {
            let key = String::from_utf8(request.key.to_vec()).expect("text");
            self.calls.borrow_mut().push(format!("get {key}"));
            self.fails()?;
            let kvs = match key.as_str() {
                "/_etcd/registry/t/_config/size" => self.size.iter().map(|size| kv(&key, size, 1)).collect(),
                "/_etcd/registry/t/members" => {
                    assert_eq!(&request.range_end[..], b"/_etcd/registry/t/membert");
                    self.kvs.borrow().clone()
                }
                other => panic!("{other}"),
            };
            Ok(RangeResponse {
                header: Some(ResponseHeader {
                    revision: self.revision(),
                    ..Default::default()
                }),
                kvs,
                ..Default::default()
            })
        }

        async fn put(&self, key: &str, value: &str) -> Result<(), Status> {
            self.calls.borrow_mut().push(format!("put {key} {value}"));
            self.fails()?;
            let mut kvs = self.kvs.borrow_mut();
            if kvs.iter().all(|known| known.key != key) {
                let revision = 11 + kvs.len() as i64;
                kvs.push(kv(key, value, revision));
            }
            Ok(())
        }

        async fn watch(&self, prefix: &str, revision: i64) -> Result<Self::Watch, Status> {
            self.calls.borrow_mut().push(format!("watch {prefix} {revision}"));
            self.fails()?;
            Ok(self.watches.borrow_mut().pop_front().unwrap_or_default().into())
        }

        async fn next(&self, watch: &mut Self::Watch) -> Result<Option<WatchResponse>, Status> {
            let Some(kv) = watch.pop_front() else { return Ok(None) };
            // The service keeps what it tells.
            self.kvs.borrow_mut().push(kv.clone());
            Ok(Some(WatchResponse {
                events: vec![Event {
                    kv: Some(kv),
                    ..Default::default()
                }],
                ..Default::default()
            }))
        }
    }

    async fn join(service: Told, own: &str) -> (Result<String, DiscoveryError>, Vec<String>) {
        let keys = Keys::new("t");
        let mut discovery = Discovery {
            service,
            own_key: keys.member(0xab),
            keys,
            failures: 0,
        };
        let joined = discovery.join(own.to_owned()).await;
        (joined, discovery.service.calls.take())
    }

    #[tokio::test(start_paused = true)]
    async fn registers_and_waits_for_the_others() {
        let told = Told {
            size: Some("3"),
            kvs: vec![member("1", "a:1", 5)].into(),
            watches: VecDeque::from([vec![member("2", "b:1", 20)]]).into(),
            ..Default::default()
        };
        let (joined, calls) = join(told, "me=http://c:1").await;
        assert_eq!(joined.unwrap(), "m1=http://a:1,me=http://c:1,m2=http://b:1");
        assert_eq!(
            calls,
            [
                "get /_etcd/registry/t/_config/size",
                "get /_etcd/registry/t/members",
                "put /_etcd/registry/t/members/ab me=http://c:1",
                "get /_etcd/registry/t/_config/size",
                "get /_etcd/registry/t/members",
                "watch /_etcd/registry/t/members 13",
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_breaks_off_loses_nobody() {
        let told = Told {
            size: Some("3"),
            // One that says nothing of use, one that is known already, one that is new; then the stream ends.
            watches: VecDeque::from([
                vec![
                    kv("/_etcd/registry/t/members/9", "nonsense", 19),
                    member("2", "b:1", 20),
                ],
                vec![member("2", "b:1", 20), member("3", "d:1", 21)],
            ])
            .into(),
            ..Default::default()
        };
        let (joined, calls) = join(told, "me=http://c:1").await;
        assert_eq!(joined.unwrap(), "me=http://c:1,m2=http://b:1,m3=http://d:1");
        assert_eq!(calls.iter().filter(|call| call.starts_with("watch")).count(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_came_first_belongs_to_it() {
        let told = |size, kvs| Told {
            size: Some(size),
            kvs: RefCell::new(kvs),
            ..Default::default()
        };
        // Full without us: nothing is written.
        let full = vec![member("1", "a:1", 5), member("2", "b:1", 6)];
        let (joined, calls) = join(told("2", full), "me=http://c:1").await;
        assert_eq!(joined.unwrap_err(), DiscoveryError::Full);
        assert!(!calls.iter().any(|call| call.starts_with("put")), "{calls:?}");
        // With us in it, as after a start that broke off; the one that came third does not count, whatever its id.
        let own = kv("/_etcd/registry/t/members/ab", "me=http://c:1", 6);
        let known = vec![member("2", "b:1", 7), member("1", "a:1", 5), own];
        let (joined, _) = join(told("2", known), "me=http://c:1").await;
        assert_eq!(joined.unwrap(), "m1=http://a:1,me=http://c:1");
        // We came third ourselves.
        let own = kv("/_etcd/registry/t/members/ab", "me=http://c:1", 9);
        let late = vec![member("2", "b:1", 7), member("1", "a:1", 5), own];
        let (joined, _) = join(told("2", late), "me=http://c:1").await;
        assert_eq!(joined.unwrap_err(), DiscoveryError::Full);
        let (joined, _) = join(told("1", Vec::new()), "me=http://c:1").await;
        assert_eq!(joined.unwrap(), "me=http://c:1");
    }

    #[tokio::test(start_paused = true)]
    async fn a_bad_size_is_final_and_a_silent_service_is_not() {
        for (size, error) in [
            (None, DiscoveryError::NoSize),
            (Some(""), DiscoveryError::BadSize),
            (Some("x"), DiscoveryError::BadSize),
            (Some("3\n"), DiscoveryError::BadSize),
            (Some("0"), DiscoveryError::BadSize),
            (Some("-1"), DiscoveryError::BadSize),
        ] {
            let told = Told {
                size,
                ..Default::default()
            };
            assert_eq!(join(told, "me=http://c:1").await.0.unwrap_err(), error, "{size:?}");
        }
        let begun = Instant::now();
        let told = Told {
            size: Some("1"),
            failures: 10.into(),
            ..Default::default()
        };
        assert_eq!(join(told, "me=http://c:1").await.0.unwrap(), "me=http://c:1");
        // 2 + 4 + ... + 256 seconds, and then 256 twice more.
        assert_eq!(begun.elapsed().as_secs(), 510 + 2 * 256);
    }

    #[test]
    fn keys_are_where_etcd_has_them() {
        let keys = Keys::new("8A591FAB-1D72");
        assert_eq!(keys.size(), "/_etcd/registry/8A591FAB-1D72/_config/size");
        assert_eq!(keys.members(), "/_etcd/registry/8A591FAB-1D72/members");
        assert_eq!(keys.member(0x0ab), "/_etcd/registry/8A591FAB-1D72/members/ab");
        assert_eq!(Keys::new("/a//b/./../c/").members(), "/_etcd/registry/a/c/members");
        assert_eq!(Keys::new("../../..").members(), "/members");
    }

    #[test]
    fn clusters_are_read_or_refused() {
        let members = parse_cluster("a=http://h:1,b=http://h:2,a=http://h:3").unwrap();
        assert_eq!(members["a"], ["http://h:1", "http://h:3"]);
        assert_eq!(members["b"], ["http://h:2"]);
        for text in ["a", "a=", "a=h:1", "a=http://h", "a=ftp://h:1", "=http://h:1,b"] {
            let error = parse_cluster(text).unwrap_err();
            assert!(matches!(error, DiscoveryError::InvalidUrl(_)), "{text}: {error}");
        }
        let doubled = parse_cluster("a=http://h:1,b=http://h:1").unwrap_err();
        assert!(matches!(doubled, DiscoveryError::DuplicateUrl(_)), "{doubled}");
    }

    #[test]
    fn endpoints_are_read_as_etcds_clients_do() {
        let tcp = |address: &str| Place::Tcp(address.to_owned());
        for (text, expected) in [
            ("127.0.0.1:2379", (tcp("127.0.0.1:2379"), Security::Either)),
            ("http://h:1", (tcp("h:1"), Security::Plain)),
            ("https://[::1]:1/path", (tcp("[::1]:1"), Security::Tls)),
            ("unix:///a/b", (Place::Unix("/a/b".into()), Security::Either)),
            ("unix://b:1", (Place::Unix("b:1".into()), Security::Either)),
            ("unixs:b", (Place::Unix("b".into()), Security::Tls)),
        ] {
            assert_eq!(place(text), expected, "{text}");
        }
    }

    #[test]
    fn no_password_is_printed() {
        let options = DiscoveryOptions {
            token: "t".to_owned(),
            endpoints: Vec::new(),
            dial_timeout: Duration::ZERO,
            request_timeout: Duration::ZERO,
            keepalive_time: Duration::ZERO,
            keepalive_timeout: Duration::ZERO,
            insecure_transport: true,
            insecure_skip_verify: false,
            cert_file: None,
            key_file: None,
            ca_file: None,
            user: "root".to_owned(),
            password: "secret".to_owned(),
        };
        let printed = format!("{options:?}");
        assert!(printed.contains("root") && !printed.contains("secret"), "{printed}");
    }

    #[test]
    fn another_login_is_asked_for_in_several_ways() {
        for (code, message, wanted) in [
            (Code::Unauthenticated, "etcdserver: invalid auth token", true),
            (Code::InvalidArgument, "etcdserver: user name is empty", true),
            (Code::InvalidArgument, "etcdserver: revision of auth store is old", true),
            (Code::PermissionDenied, "etcdserver: permission denied", false),
            (Code::Unavailable, "etcdserver: no leader", false),
        ] {
            assert_eq!(wants_login(&Status::new(code, message)), wanted, "{message}");
        }
    }
}
