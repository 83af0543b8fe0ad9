//! etcd's gRPC API over any [`Store`].
//!
//! | Service | Offered |
//! |---|---|
//! | KV, Watch, Lease | all of it |
//! | Cluster | all of it |
//! | Maintenance | all of it |
//! | Auth | all of it |
//! | Lock, Election | all of it |
//! | `grpc.health.v1` | all of it |
//! | `grpc.reflection.v1`, `v1alpha` | all of it; etcd has none |
//!
//! Every other method of etcd's API answers Unimplemented and says so.

pub mod codec;
pub mod methods;

mod auth;
pub(crate) mod call;
mod cluster;
mod election;
mod health;
mod kv;
mod lease;
mod lock;
mod maintenance;
mod peer_urls;
mod reflection;
mod slow;
mod status;
mod watch;

use std::borrow::Cow;
use std::convert::Infallible;
use std::sync::Arc;
use std::task::Poll;

use api::{Credentials, Store};
use bytes::Bytes;
use http::{Request, Response};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service as _};

use crate::BoxError;
use crate::proto::etcdserverpb::auth_server::AuthServer;
use crate::proto::etcdserverpb::cluster_server::ClusterServer;
use crate::proto::etcdserverpb::kv_server::KvServer;
use crate::proto::etcdserverpb::lease_server::LeaseServer;
use crate::proto::etcdserverpb::maintenance_server::MaintenanceServer;
use crate::proto::health::health_server::HealthServer;
use crate::proto::v3electionpb::election_server::ElectionServer;
use crate::proto::v3lockpb::lock_server::LockServer;

pub(crate) use call::{ByLearner, Call, Guard, Inbound, Outbound};
pub(crate) use kv::Kv;
use methods::Method;
use reflection::Reflection;
pub use status::status;

/// The services, each ready to take calls.
pub(crate) struct Services<S: Store> {
    inline_kv: Arc<Kv<S>>,
    kv: KvServer<Kv<S>>,
    watch: watch::Watch<S>,
    receive_max: usize,
    lease: LeaseServer<lease::Lease<S>>,
    cluster: ClusterServer<cluster::Cluster<S>>,
    maintenance: MaintenanceServer<maintenance::Maintenance<S>>,
    auth: AuthServer<auth::Auth<S>>,
    lock: LockServer<lock::Lock<S>>,
    election: ElectionServer<election::Election<S>>,
    health: HealthServer<health::Health>,
    reflection: Reflection,
}

impl<S: Store> Services<S> {
    pub(crate) fn new(store: S) -> Self {
        // `Inbound` refuses larger messages before tonic sees them, in etcd's words.
        let receive_max = store.limits().grpc_receive_bytes_max();
        macro_rules! server {
            ($server:ident, $service:expr) => {
                $server::new($service)
                    .max_decoding_message_size(receive_max)
                    .max_encoding_message_size(usize::MAX)
            };
        }
        Services {
            inline_kv: Arc::new(Kv(store.clone())),
            kv: server!(KvServer, Kv(store.clone())),
            watch: watch::Watch(store.clone()),
            receive_max,
            lease: server!(LeaseServer, lease::Lease(store.clone())),
            cluster: server!(ClusterServer, cluster::Cluster(store.clone())),
            maintenance: server!(MaintenanceServer, maintenance::Maintenance(store.clone())),
            auth: server!(AuthServer, auth::Auth(store.clone())),
            lock: server!(LockServer, lock::Lock(store.clone())),
            election: server!(ElectionServer, election::Election(store)),
            health: server!(HealthServer, health::Health),
            reflection: Reflection::new(),
        }
    }

    /// The KV service, for whoever calls its methods without the way through a request and a response.
    pub(crate) fn kv(&self) -> &Arc<Kv<S>> {
        &self.inline_kv
    }

    /// Begins a call; `None` if this release does not offer the method.
    pub(crate) fn call<B>(&self, method: &Method, request: Request<B>) -> Option<BoxFuture<Response<Body>, Infallible>>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError> + Send + 'static,
    {
        Some(match (method.service, method.name) {
            ("etcdserverpb.KV", _) => self.kv.clone().call(request),
            ("etcdserverpb.Watch", _) => {
                let reply = self.watch.clone().serve(request, self.receive_max);
                Box::pin(async move { Ok(reply.await) })
            }
            ("etcdserverpb.Lease", _) => self.lease.clone().call(request),
            ("etcdserverpb.Cluster", _) => self.cluster.clone().call(request),
            ("etcdserverpb.Maintenance", _) => self.maintenance.clone().call(request),
            ("etcdserverpb.Auth", _) => self.auth.clone().call(request),
            ("v3lockpb.Lock", _) => self.lock.clone().call(request),
            ("v3electionpb.Election", _) => self.election.clone().call(request),
            ("grpc.health.v1.Health", _) => self.health.clone().call(request),
            ("grpc.reflection.v1.ServerReflection", _) => self.reflection.v1(request.map(Body::new)),
            ("grpc.reflection.v1alpha.ServerReflection", _) => self.reflection.v1alpha(request.map(Body::new)),
            _ => return None,
        })
    }
}

/// Lets whatever else the task does have its turn. Unlike `tokio::task::yield_now` it does not wait until the thread has
/// nothing else to do.
pub(crate) async fn others_turn() {
    let mut had = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut had, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The store, for the client that a call comes from.
pub(crate) fn for_client<'a, S: Store, T>(store: &'a S, request: &tonic::Request<T>) -> Cow<'a, S> {
    match request.extensions().get::<Credentials>() {
        Some(credentials) => Cow::Owned(store.on_behalf_of(credentials.clone())),
        None => Cow::Borrowed(store),
    }
}
