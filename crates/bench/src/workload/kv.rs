//! Puts, gets, ranges and deletes, alone or mixed.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use api::kv::{DeleteRangeRequest, RangeRequest};

use crate::client::Client;
use crate::keys::KeyDealer;
use crate::load::Workload;
use crate::net::failure::Failure;
use crate::net::grpc::Method;
use crate::window::Window;

/// What a client can do here; the numbers are the rows of a mixed load.
#[derive(Debug, Clone, Copy)]
enum Operation {
    Put = 0,
    Get = 1,
    Range = 2,
    Delete = 3,
}

const MIXED: [Operation; 4] = [Operation::Put, Operation::Get, Operation::Range, Operation::Delete];

/// A client of a load on single keys and ranges.
pub(crate) struct KvActor {
    pub(crate) client: Client,
    /// Shared by the clients of a thread.
    pub(crate) dealer: Rc<RefCell<KeyDealer>>,
    pub(crate) window: Arc<Window>,
}

impl KvActor {
    /// Does one operation; false when every key is deleted.
    pub(crate) async fn operate(&mut self, at: u64) -> bool {
        let workload = self.client.load.workload;
        let (label, operation) = match workload {
            Workload::Put => (0, Operation::Put),
            Workload::Range => (0, Operation::Range),
            Workload::Delete => (0, Operation::Delete),
            Workload::Mixed => {
                let random = self.client.rng.u32(..);
                let shares = self.client.load.shares.as_ref().expect("a mixed load has shares");
                let index = shares.pick(random);
                (index, MIXED[index])
            }
            _ => (0, Operation::Get),
        };
        let number = if workload == Workload::Delete {
            let Some(number) = self.dealer.borrow_mut().deal_once() else {
                self.window.exhaust();
                return false;
            };
            number
        } else {
            self.dealer.borrow_mut().deal(&mut self.client.rng)
        };
        let result = self.perform(operation, number).await;
        self.client.record(label, at, result.as_ref().copied());
        true
    }

    async fn perform(&mut self, operation: Operation, number: u64) -> Result<u64, Failure> {
        let client = &mut self.client;
        let serializable = client.load.serializable || client.load.workload == Workload::GetSerializable;
        match operation {
            Operation::Put => {
                let key = client.key(number);
                let value = client.values.value(&mut client.rng);
                client.put(key, value).await.map(|()| 1)
            }
            Operation::Get => {
                let get = RangeRequest {
                    key: client.key(number),
                    serializable,
                    ..Default::default()
                };
                client.range(&get).await.map(|found| found.keys)
            }
            Operation::Range => {
                let size = client.load.range_size;
                let from = number.min(client.load.keys.count.saturating_sub(size));
                let (key, range_end) = client.load.keys.range(from, from + size, &mut client.arena);
                let range = RangeRequest {
                    key,
                    range_end,
                    serializable,
                    ..Default::default()
                };
                client.range(&range).await.map(|found| found.keys)
            }
            Operation::Delete => {
                let delete = DeleteRangeRequest {
                    key: client.key(number),
                    ..Default::default()
                };
                client.call(Method::DeleteRange, &delete).await.map(|_| 1)
            }
        }
    }
}
