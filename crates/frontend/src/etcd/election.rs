//! The Election service.

use std::sync::Arc;

use api::kv::{EventType, KeyValue, PutRequest, ResponseHeader, TxnRequest};
use api::store::{Events, WatchStream};
use api::{LeaseId, Revision, Store};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use tonic::{Request, Response, Status};

use super::for_client;
use super::lock::{session, status, wait_status};
use crate::line::{self, Attempt, Line};
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
        let lease = session(&store, lease).await?;
        campaign(&store, name, lease, value).await.map(Response::new)
    }

    async fn proclaim(&self, request: Request<ProclaimRequest>) -> Result<Response<ProclaimResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let ProclaimRequest { leader, value } = request.into_inner();
        let leader = leader.ok_or_else(missing_leader)?;
        let lease = session(&store, leader.lease).await?;
        let header = proclaim(&store, &leader.key, leader.rev, lease, value).await?;
        Ok(Response::new(ProclaimResponse { header }))
    }

    async fn leader(&self, request: Request<LeaderRequest>) -> Result<Response<LeaderResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let line = Line::new(&request.into_inner().name);
        let found = store.range(line.first()).await.map_err(status)?;
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
        let observer = Observer {
            store,
            line: Line::new(&request.into_inner().name),
            leader: None,
        };
        Ok(Response::new(Box::pin(stream::try_unfold(observer, Observer::next))))
    }

    /// Whoever does not lead any more has nothing to resign, which is no error.
    async fn resign(&self, request: Request<ResignRequest>) -> Result<Response<ResignResponse>, Status> {
        let store = for_client(&self.0, &request).into_owned();
        let leader = request.into_inner().leader.ok_or_else(missing_leader)?;
        let resignation = line::resignation(&leader.key, line::created_at(&leader.key, leader.rev));
        let resigned = line::txn(&store, resignation).await.map_err(status)?;
        Ok(Response::new(ResignResponse {
            header: resigned.header,
        }))
    }
}

async fn campaign<S: Store>(store: &S, name: Bytes, lease: LeaseId, value: Bytes) -> Result<CampaignResponse, Status> {
    let line = Line::new(&name);
    let key = line.key(lease);
    // Whoever has the lease may be in line, or lead, already, and says something else by now.
    let joined = line.join(store, Attempt::new(store), &key, lease, Some(value)).await;
    let (mut attempt, joined) = joined.map_err(status)?;
    let revision = joined.revision;
    line.wait(store, revision).await.map_err(wait_status)?;
    // The lease may have ended meanwhile. etcd does not look, and tells a client that it leads when it does not.
    let confirmed = line.confirm(store, &mut attempt, &key, lease, &joined).await;
    if confirmed.map_err(status)?.is_none() {
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
        compare: vec![line::created_at(key, revision)],
        success: vec![line::put_op(PutRequest {
            key: key.clone(),
            value,
            lease,
            ..Default::default()
        })],
        failure: Vec::new(),
    };
    let proclaimed = line::txn(store, request).await.map_err(status)?;
    match proclaimed.succeeded {
        true => Ok(proclaimed.header),
        false => Err(not_leader()),
    }
}

/// Someone who is told of every leader, and of what it proclaims; who reads slowly may miss some, and never the newest.
struct Observer<S: Store> {
    store: S,
    line: Line,
    /// The leader who was told of last.
    leader: Option<Leader<S::Watch>>,
}

struct Leader<W> {
    watch: line::Watch<W>,
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
            let found = self.store.range(self.line.first()).await.map_err(status)?;
            let header = found.header.unwrap_or_else(|| self.store.header());
            if let Some(kv) = found.kvs.into_iter().next() {
                break (header, kv);
            }
            if let Some(kv) = first_put(&self.store, &self.line, header.revision).await? {
                let revision = kv.mod_revision;
                break (ResponseHeader { revision, ..header }, kv);
            }
        };
        let watch = line::Watch::of_key(&self.store, &kv.key, header.revision + 1).await;
        self.leader = Some(Leader {
            watch: watch.map_err(wait_status)?,
            events: Events::new(Vec::new()),
            told: 0,
        });
        Ok(LeaderResponse {
            header: Some(header),
            kv: Some(kv),
        })
    }
}

/// The first key that is put in a line; `None` if that history was compacted away.
async fn first_put<S: Store>(store: &S, line: &Line, start_revision: Revision) -> Result<Option<KeyValue>, Status> {
    let mut watch = line.watch(store, start_revision).await.map_err(wait_status)?;
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
