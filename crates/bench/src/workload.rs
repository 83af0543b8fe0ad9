//! What clients do, one module for each kind of load.

pub(crate) mod kubernetes;
pub(crate) mod kv;
pub(crate) mod lease;
pub(crate) mod list;
pub(crate) mod swap;
pub(crate) mod watch;

use crate::net::failure::Failure;

/// A client with what it does.
pub(crate) enum Actor {
    Kv(kv::KvActor),
    List(list::ListActor),
    Swap(swap::SwapActor),
    Writer(watch::WriterActor),
    Grant(lease::GrantActor),
    KeepAlive(lease::KeepAliveActor),
    Kubernetes(Box<kubernetes::KubernetesActor>),
}

impl Actor {
    /// Does what must be done before the run begins.
    pub(crate) async fn prepare(&mut self) -> Result<(), Failure> {
        match self {
            Actor::KeepAlive(actor) => actor.prepare().await,
            _ => Ok(()),
        }
    }

    /// Does one operation, meant for `at`, and records it. Returns false when there is nothing left to do.
    pub(crate) async fn operate(&mut self, at: u64) -> bool {
        match self {
            Actor::Kv(actor) => return actor.operate(at).await,
            Actor::List(actor) => actor.operate(at).await,
            Actor::Swap(actor) => actor.operate(at).await,
            Actor::Writer(actor) => actor.operate(at).await,
            Actor::Grant(actor) => actor.operate(at).await,
            Actor::KeepAlive(actor) => actor.operate(at).await,
            Actor::Kubernetes(actor) => actor.operate(at).await,
        }
        true
    }
}
