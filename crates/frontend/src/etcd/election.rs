//! The Election service.

use std::sync::Arc;

use api::kv::{EventType, KeyValue, ResponseHeader, TxnRequest};
use api::store::{Events, WatchStream};
use api::{LeaseId, Revision, Store};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use tonic::{Request, Response, Status};

use super::for_client;
use super::queue::{self, status};
use crate::proto::v3electionpb::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest, ProclaimResponse,
    ResignRequest, ResignResponse, election_server,
};

/// Answers Election calls from a store.
pub(super) struct Election<S>(pub(super) S);

fn missing_leader() -> Status {
    Status::unknown("\"leader\" field must be provided")
}

fn not_leader() -> Status {
    Status::unknown("election: not leader")
}

#[tonic::async_trait]
impl<S: Store> election_server::Election for Election<S> {
    /// A call that ends before it has won leaves the line; a lease that was granted for it ends by itself.
    async fn campaign(&self, request: Request<CampaignRequest>) -> Result<Response<CampaignResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let CampaignRequest { name, lease, value } = request.into_inner();
        let lease = queue::session(&store, lease).await?;
        campaign(&store, name, lease, value).await.map(Response::new)
    }

    async fn proclaim(&self, request: Request<ProclaimRequest>) -> Result<Response<ProclaimResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let ProclaimRequest { leader, value } = request.into_inner();
        let leader = leader.ok_or_else(missing_leader)?;
        let lease = queue::session(&store, leader.lease).await?;
        let header = proclaim(&store, &leader.key, leader.rev, lease, value).await?;
        Ok(Response::new(ProclaimResponse { header }))
    }

    async fn leader(&self, request: Request<LeaderRequest>) -> Result<Response<LeaderResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let prefix = queue::prefix(&request.into_inner().name);
        let found = store.range(queue::first_created(&prefix)).await.map_err(status)?;
        match found.kvs.into_iter().next() {
            Some(kv) => Ok(Response::new(LeaderResponse {
                header: found.header,
                kv: Some(kv),
            })),
            None => Err(Status::unknown("election: no leader")),
        }
    }

    async fn observe(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<BoxStream<'static, Result<LeaderResponse, Status>>>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let prefix = queue::prefix(&request.into_inner().name);
        let observer = Observer {
            store,
            prefix,
            leader: None,
        };
        Ok(Response::new(Box::pin(stream::try_unfold(observer, Observer::next))))
    }

    /// Whoever does not lead any more has nothing to resign, which is no error.
    async fn resign(&self, request: Request<ResignRequest>) -> Result<Response<ResignResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let leader = request.into_inner().leader.ok_or_else(missing_leader)?;
        let resigned = queue::txn(&store, queue::resignation(&leader.key, leader.rev)).await?;
        Ok(Response::new(ResignResponse {
            header: resigned.header,
        }))
    }
}

async fn campaign<S: Store>(store: &S, name: Bytes, lease: LeaseId, value: Bytes) -> Result<CampaignResponse, Status> {
    let prefix = queue::prefix(&name);
    let key = queue::key(&prefix, lease);
    let joined = queue::txn(
        store,
        TxnRequest {
            compare: vec![queue::created_at(&key, 0)],
            success: vec![queue::put_op(&key, value.clone(), lease)],
            // Whoever has the lease may be in line, or lead, already.
            failure: vec![queue::range_op(queue::get(&key))],
        },
    )
    .await?;
    let known = queue::found(joined.responses.first()).first();
    let revision = match known {
        Some(kv) => kv.create_revision,
        None => queue::revision(joined.header.as_ref()),
    };
    let leave = queue::Leave::new(store, &key, revision);
    if known.is_some_and(|kv| kv.value != value) {
        proclaim(store, &key, revision, lease, value).await?;
    }
    queue::wait(store, &prefix, revision - 1).await?;
    // The lease may have ended meanwhile. etcd does not look, and tells a client that it leads when it does not.
    let own = store.range(queue::get(&key)).await.map_err(status)?;
    leave.forget();
    if own.kvs.first().is_none_or(|kv| kv.create_revision != revision) {
        return Err(not_leader());
    }
    Ok(CampaignResponse {
        header: joined.header,
        leader: Some(LeaderKey {
            name,
            key,
            rev: revision,
            lease,
        }),
    })
}

async fn proclaim<S: Store>(
    store: &S,
    key: &Bytes,
    revision: Revision,
    lease: LeaseId,
    value: Bytes,
) -> Result<Option<ResponseHeader>, Status> {
    let request = TxnRequest {
        compare: vec![queue::created_at(key, revision)],
        success: vec![queue::put_op(key, value, lease)],
        failure: Vec::new(),
    };
    let proclaimed = queue::txn(store, request).await?;
    match proclaimed.succeeded {
        true => Ok(proclaimed.header),
        false => Err(not_leader()),
    }
}

/// Someone who is told of every leader, and of what it proclaims; who reads slowly may miss some, and never the newest.
struct Observer<S: Store> {
    store: S,
    prefix: Bytes,
    /// The leader who was told of last.
    leader: Option<Leader<S::Watch>>,
}

struct Leader<W> {
    watch: queue::Watch<W>,
    /// What it did since, as far as it is read.
    events: Arc<Events>,
    /// How many of those were told of.
    told: usize,
}

impl<S: Store> Observer<S> {
    async fn next(mut self) -> Result<Option<(LeaderResponse, Self)>, Status> {
        let reply = loop {
            let Some(leader) = &mut self.leader else {
                break self.elect().await?;
            };
            match leader.next(&self.store).await {
                Some(reply) => break reply,
                None => self.leader = None,
            }
        };
        Ok(Some((reply, self)))
    }

    /// Waits for a leader, and begins to watch it.
    async fn elect(&mut self) -> Result<LeaderResponse, Status> {
        let (header, kv) = loop {
            let found = self
                .store
                .range(queue::first_created(&self.prefix))
                .await
                .map_err(status)?;
            let header = found.header.unwrap_or_else(|| self.store.header());
            if let Some(kv) = found.kvs.into_iter().next() {
                break (header, kv);
            }
            if let Some(kv) = first_put(&self.store, &self.prefix, header.revision).await? {
                let revision = kv.mod_revision;
                break (ResponseHeader { revision, ..header }, kv);
            }
        };
        self.leader = Some(Leader {
            watch: queue::Watch::new(&self.store, &kv.key, None, header.revision + 1).await?,
            events: Events::new(Vec::new()),
            told: 0,
        });
        Ok(LeaderResponse {
            header: Some(header),
            kv: Some(kv),
        })
    }
}

/// The first key that is put under a prefix; `None` if that history was compacted away.
async fn first_put<S: Store>(store: &S, prefix: &Bytes, start_revision: Revision) -> Result<Option<KeyValue>, Status> {
    let mut watch = queue::Watch::new(store, prefix, Some(prefix), start_revision).await?;
    while let Some(events) = watch.next().await {
        let put = events.iter().find(|event| event.r#type() == EventType::Put);
        if let Some(kv) = put.and_then(|event| event.kv.clone()) {
            return Ok(Some(kv));
        }
    }
    Ok(None)
}

impl<W: WatchStream> Leader<W> {
    /// What it proclaims next; `None` once it does not lead any more.
    async fn next<S: Store>(&mut self, store: &S) -> Option<LeaderResponse> {
        loop {
            if let Some(event) = self.events.get(self.told) {
                self.told += 1;
                if event.r#type() == EventType::Delete {
                    return None;
                }
                return Some(LeaderResponse {
                    header: Some(ResponseHeader {
                        revision: self.watch.revision,
                        ..store.header()
                    }),
                    kv: event.kv.clone(),
                });
            }
            self.events = self.watch.next().await?;
            self.told = 0;
        }
    }
}
