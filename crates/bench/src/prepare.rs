//! Before a run: the keys it reads. After it: nothing of it is left.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use api::kv::{DeleteRangeRequest, LeaseRevokeRequest, PutRequest, RequestOp, RequestOpKind, TxnRequest};
use tokio::task::JoinSet;

use crate::client::Client;
use crate::load::Load;
use crate::net::channel::Channel;
use crate::net::endpoint::Endpoint;
use crate::net::failure::{Failure, Kind};
use crate::net::grpc::Method;
use crate::net::security::Security;
use crate::record::Recorder;
use crate::window::Window;

/// Calls that run side by side.
const PARALLEL: usize = 8;
/// Most keys, and about most bytes of values, of one transaction; etcd refuses more than 128 operations or 1.5 MiB.
const TXN_KEYS_MAX: u64 = 100;
const TXN_BYTES_MAX: u64 = 512 << 10;
/// How long one of these calls may take: a deletion of everything is one.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Clients beside those of a load.
pub(crate) struct Helpers {
    clients: Vec<Client>,
}

impl Helpers {
    /// Connects. Must be called within a `LocalSet`.
    pub(crate) async fn connect(
        load: &Arc<Load>,
        endpoints: &[Endpoint],
        security: &Security,
    ) -> Result<Self, Failure> {
        let window = Arc::new(Window::new(None));
        let recorder = Recorder::new(window, load.workload.labels());
        let recorder = Rc::new(RefCell::new(recorder));
        let channel = Channel::open(endpoints[0].clone(), security.clone(), TIMEOUT).await?;
        let clients = (0..PARALLEL)
            .map(|helper| {
                // Numbers that no client of the load has, for randomness of their own.
                let number = usize::MAX / 2 + helper;
                Client::new(Rc::clone(&channel), Rc::clone(&recorder), Arc::clone(load), number)
            })
            .collect();
        Ok(Helpers { clients })
    }

    /// Writes all keys of the load; `progress` is told how many are there.
    pub(crate) async fn fill(self, progress: impl Fn(u64) + 'static) -> Result<Self, Failure> {
        let count = self.clients[0].load.keys.count;
        let size = self.clients[0].load.value_bytes as u64;
        let step = (TXN_BYTES_MAX / size.max(1)).clamp(1, TXN_KEYS_MAX);
        self.side_by_side(
            count.div_ceil(step),
            move |index| progress(index * step),
            async move |client, index| {
                let success = (index * step..((index + 1) * step).min(count))
                    .map(|number| RequestOp {
                        request: Some(RequestOpKind::Put(PutRequest {
                            key: client.key(number),
                            value: client.values.value(&mut client.rng),
                            ..Default::default()
                        })),
                    })
                    .collect();
                let txn = TxnRequest {
                    success,
                    ..Default::default()
                };
                client.call(Method::Txn, &txn).await.map(drop)
            },
        )
        .await
    }

    /// Deletes everything under the load's prefix.
    pub(crate) async fn clear(mut self) -> Result<Self, Failure> {
        let client = &mut self.clients[0];
        let (key, range_end) = client.load.everything();
        let delete = DeleteRangeRequest {
            key,
            range_end,
            ..Default::default()
        };
        client.call(Method::DeleteRange, &delete).await?;
        Ok(self)
    }

    /// Revokes leases; those that have ended already are no failure.
    pub(crate) async fn revoke(self, leases: std::ops::Range<i64>) -> Result<Self, Failure> {
        let count = (leases.end - leases.start) as u64;
        self.side_by_side(
            count,
            |_| (),
            async move |client, index| {
                let revoke = LeaseRevokeRequest {
                    id: leases.start + index as i64,
                };
                match client.call(Method::LeaseRevoke, &revoke).await {
                    Err(failure) if failure.kind != Kind::Status(5) => Err(failure),
                    _ => Ok(()),
                }
            },
        )
        .await
    }

    /// Makes calls number 0 to `count`, on all clients at once.
    async fn side_by_side<F>(self, count: u64, progress: impl Fn(u64) + 'static, call: F) -> Result<Self, Failure>
    where
        F: AsyncFn(&mut Client, u64) -> Result<(), Failure> + 'static,
    {
        let (next, call, progress) = (Rc::new(Cell::new(0)), Rc::new(call), Rc::new(progress));
        let mut tasks = JoinSet::new();
        for mut client in self.clients {
            let (next, call, progress) = (Rc::clone(&next), Rc::clone(&call), Rc::clone(&progress));
            tasks.spawn_local(async move {
                while next.get() < count {
                    let index = next.replace(next.get() + 1);
                    call(&mut client, index).await?;
                    progress(index);
                }
                Ok::<_, Failure>(client)
            });
        }
        let clients = tasks.join_all().await.into_iter().collect::<Result<_, _>>()?;
        Ok(Helpers { clients })
    }
}
