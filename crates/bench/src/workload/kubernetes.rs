//! What the API server of Kubernetes asks of etcd.

use std::sync::Arc;

use api::kv::RangeRequest;
use bytes::Bytes;

use super::list::list;
use super::swap::{Write, if_unchanged};
use crate::client::{Client, Swap};
use crate::clock::now;
use crate::net::failure::Failure;
use crate::window::Window;

/// The rows of the result; those before [`EVENT`] are also the operations of `--shares`.
const CREATE: usize = 0;
const UPDATE: usize = 1;
const GET: usize = 2;
const LIST: usize = 3;
const LEASE: usize = 4;
const DELETE: usize = 5;
pub(crate) const EVENT: usize = 6;

/// An object or node lease of this client.
#[derive(Debug, Clone, Copy)]
struct Owned {
    number: u64,
    /// Mod revision as last seen; 0 if never, or if it does not exist.
    revision: i64,
}

/// A client that has objects and node leases of its own, as controllers have, and reads those of all.
pub(crate) struct KubernetesActor {
    client: Client,
    window: Arc<Window>,
    alive: Vec<Owned>,
    /// Objects that do not exist now.
    gone: Vec<u64>,
    leases: Vec<Owned>,
    next_lease: usize,
}

impl KubernetesActor {
    /// Client number `number` of all: every object and every node lease is some client's.
    pub(crate) fn new(client: Client, window: Arc<Window>, number: usize) -> Self {
        let clients = client.load.clients;
        let owned = |count: u64| -> Vec<Owned> {
            (number as u64..count)
                .step_by(clients)
                .map(|number| Owned { number, revision: 0 })
                .collect()
        };
        let nodes = client.load.nodes.count;
        let mut leases = owned(nodes);
        if leases.is_empty() {
            // Fewer nodes than clients: some leases have several owners, whose updates conflict at times.
            leases.push(Owned {
                number: number as u64 % nodes,
                revision: 0,
            });
        }
        let alive = owned(client.load.keys.count);
        KubernetesActor {
            client,
            window,
            alive,
            gone: Vec::new(),
            leases,
            next_lease: 0,
        }
    }

    pub(crate) async fn operate(&mut self, at: u64) {
        let random = self.client.rng.u32(..);
        let mut label = self
            .client
            .load
            .shares
            .as_ref()
            .map_or(UPDATE, |shares| shares.pick(random));
        // Where there is nothing to create or to change, the opposite is done.
        if label == CREATE && self.gone.is_empty() {
            label = DELETE;
        }
        if matches!(label, UPDATE | DELETE) && self.alive.is_empty() {
            label = if self.gone.is_empty() { LEASE } else { CREATE };
        }
        let result = match label {
            CREATE => self.create(at).await,
            UPDATE => self.update(at).await,
            GET => self.get().await,
            LIST => self.list().await,
            LEASE => self.update_lease(at).await,
            _ => self.delete().await,
        };
        self.client.record(label, at, result.as_ref().copied());
    }

    async fn create(&mut self, at: u64) -> Result<u64, Failure> {
        let Some(number) = self.gone.pop() else { return Ok(0) };
        let key = self.client.key(number);
        let value = self.client.values.stamped(&mut self.client.rng, at);
        match self.client.swap(&if_unchanged(key, 0, Write::Put(value))).await {
            Ok(Swap::Done(revision) | Swap::Conflict(revision)) => {
                self.alive.push(Owned { number, revision });
                Ok(1)
            }
            Err(failure) => {
                self.gone.push(number);
                Err(failure)
            }
        }
    }

    async fn update(&mut self, at: u64) -> Result<u64, Failure> {
        let index = self.client.rng.usize(..self.alive.len());
        let Owned { number, revision } = self.alive[index];
        let key = self.client.key(number);
        let (revision, attempts) = self.put_until_done(key, revision, at).await?;
        self.alive[index].revision = revision;
        Ok(attempts)
    }

    async fn update_lease(&mut self, at: u64) -> Result<u64, Failure> {
        let index = self.next_lease % self.leases.len();
        self.next_lease = index + 1;
        let Owned { number, revision } = self.leases[index];
        let key = self.client.load.nodes.key(number, &mut self.client.arena);
        let (revision, attempts) = self.put_until_done(key, revision, at).await?;
        self.leases[index].revision = revision;
        Ok(attempts)
    }

    /// Puts once nobody else has changed the key in between; returns the new revision and the number of attempts. Gives
    /// up after a conflict when the run is over.
    async fn put_until_done(&mut self, key: Bytes, mut revision: i64, at: u64) -> Result<(i64, u64), Failure> {
        let mut attempts = 1;
        loop {
            let value = self.client.values.stamped(&mut self.client.rng, at);
            match self
                .client
                .swap(&if_unchanged(key.clone(), revision, Write::Put(value)))
                .await?
            {
                Swap::Done(revision) => return Ok((revision, attempts)),
                Swap::Conflict(found) if now() >= self.window.until() => return Ok((found, attempts)),
                Swap::Conflict(found) => {
                    revision = found;
                    attempts += 1;
                }
            }
        }
    }

    async fn delete(&mut self) -> Result<u64, Failure> {
        let index = self.client.rng.usize(..self.alive.len());
        loop {
            let Owned { number, revision } = self.alive[index];
            let key = self.client.key(number);
            match self.client.swap(&if_unchanged(key, revision, Write::Delete)).await? {
                Swap::Conflict(found) if found > 0 => self.alive[index].revision = found,
                Swap::Done(_) | Swap::Conflict(_) => {
                    self.alive.swap_remove(index);
                    self.gone.push(number);
                    return Ok(1);
                }
            }
        }
    }

    async fn get(&mut self) -> Result<u64, Failure> {
        let number = self.client.rng.u64(..self.client.load.keys.count);
        let get = RangeRequest {
            key: self.client.key(number),
            serializable: self.client.load.serializable,
            ..Default::default()
        };
        self.client.range(&get).await.map(|found| found.keys)
    }

    /// Lists one namespace.
    async fn list(&mut self) -> Result<u64, Failure> {
        let space = self.client.rng.u64(..self.client.load.keys.spaces());
        let (key, range_end) = self.client.load.keys.space(space, &mut self.client.arena);
        list(&mut self.client, key, range_end, None).await
    }
}
