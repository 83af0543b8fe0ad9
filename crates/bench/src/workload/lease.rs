//! Leases: created, and kept alive.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use api::kv::{LeaseGrantRequest, LeaseKeepAliveResponse};
use prost::Message;

use crate::client::Client;
use crate::net::channel::Stream;
use crate::net::failure::{Failure, Kind};
use crate::net::grpc::{Method, frame};
use crate::proto::LeaseKeepAliveRequest;

/// The ids of a run's leases: consecutive, so that no list is needed to revoke them in the end.
#[derive(Debug)]
pub(crate) struct LeaseIds {
    first: i64,
    taken: AtomicU64,
}

impl LeaseIds {
    /// Ids that no earlier run has used, but for a chance of one in 2^30.
    pub(crate) fn new() -> Self {
        LeaseIds {
            first: (fastrand::i64(..1 << 30) + 1) << 32,
            taken: AtomicU64::new(0),
        }
    }

    pub(crate) fn next(&self) -> i64 {
        self.first + self.taken.fetch_add(1, Ordering::Relaxed) as i64
    }

    /// All that were handed out.
    pub(crate) fn taken(&self) -> std::ops::Range<i64> {
        self.first..self.first + self.taken.load(Ordering::Relaxed) as i64
    }
}

async fn grant(client: &mut Client, ids: &LeaseIds) -> Result<i64, Failure> {
    let id = ids.next();
    let grant = LeaseGrantRequest {
        ttl: client.load.lease_ttl_seconds,
        id,
    };
    client.call(Method::LeaseGrant, &grant).await?;
    Ok(id)
}

/// A client that creates leases.
pub(crate) struct GrantActor {
    pub(crate) client: Client,
    pub(crate) ids: Arc<LeaseIds>,
}

impl GrantActor {
    pub(crate) async fn operate(&mut self, at: u64) {
        let result = grant(&mut self.client, &self.ids).await;
        self.client.record(0, at, result.as_ref().map(|_| 1));
    }
}

/// A client that keeps one lease alive.
pub(crate) struct KeepAliveActor {
    pub(crate) client: Client,
    pub(crate) ids: Arc<LeaseIds>,
    pub(crate) lease: i64,
    /// None after a failure, until the next operation opens it again.
    pub(crate) stream: Option<Stream>,
}

impl KeepAliveActor {
    pub(crate) async fn prepare(&mut self) -> Result<(), Failure> {
        self.lease = grant(&mut self.client, &self.ids).await?;
        self.keep_alive().await
    }

    pub(crate) async fn operate(&mut self, at: u64) {
        let result = self.keep_alive().await;
        if result.is_err() {
            self.stream = None;
        }
        self.client.record(0, at, result.as_ref().map(|()| 1));
    }

    async fn keep_alive(&mut self) -> Result<(), Failure> {
        let timeout = self.client.load.timeout;
        tokio::time::timeout(timeout, self.exchange())
            .await
            .unwrap_or_else(|_| {
                Err(Failure::new(
                    Kind::Timeout,
                    format_args!("no answer within {timeout:?}"),
                ))
            })
    }

    async fn exchange(&mut self) -> Result<(), Failure> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => self
                .stream
                .insert(self.client.channel.stream(Method::LeaseKeepAlive).await?),
        };
        let request = LeaseKeepAliveRequest { id: self.lease };
        stream.send(frame(&request, &mut self.client.arena));
        let reply = LeaseKeepAliveResponse::decode(stream.next().await?)
            .map_err(|error| Failure::new(Kind::Protocol, error))?;
        if reply.ttl > 0 {
            Ok(())
        } else {
            // In a gRPC status the code would be NotFound.
            Err(Failure::new(Kind::Status(5), "the lease has ended"))
        }
    }
}
