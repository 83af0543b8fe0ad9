//! What a run does, checked and with every default filled in.

use std::time::Duration;

use bytes::{Bytes, BytesMut};

use crate::keys::{KeyOrder, KeySpace, prefix_end};
use crate::record::Label;
use crate::shares::Shares;
use crate::values::ValueKind;

/// What the clients of a run do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Workload {
    /// Write keys (see --key-order).
    Put,
    /// Read single keys, linearizably.
    Get,
    /// Read single keys from whichever member was asked.
    GetSerializable,
    /// Read --range-size neighbouring keys in one request.
    Range,
    /// Read all --keys, in pages of --page; one operation is one whole listing.
    List,
    /// Compare-and-swap by mod revision, every client on a key of its own.
    CasOwn,
    /// Compare-and-swap by mod revision, all clients on one key; one operation is one swap that succeeded.
    CasHot,
    /// Put, get, range and delete, by --shares.
    Mixed,
    /// Delete keys; ends when every one of --keys is deleted.
    Delete,
    /// Time from a put to its event at --watchers watchers of its prefix (default 1).
    WatchLatency,
    /// Events a second delivered to --watchers watchers of one prefix (default 1000).
    WatchFanout,
    /// Create leases.
    LeaseGrant,
    /// Keep leases alive: every client one lease, on one stream.
    LeaseKeepalive,
    /// What an orchestrator does: objects created, updated and deleted by mod revision, listed by pages, watched by
    /// prefix; node leases updated; by --shares.
    Kubernetes,
}

/// Operations of a mixed load, in the order of its rows.
pub(crate) const MIXED: &[&str] = &["put", "get", "range", "delete"];
/// Operations of a Kubernetes-like load, in the order of its rows.
pub(crate) const KUBERNETES: &[&str] = &["create", "update", "get", "list", "lease", "delete"];
/// Objects of a Kubernetes-like load are spread over this many namespaces.
const NAMESPACES: u64 = 10;
/// Digits of an object's name.
const OBJECT_DIGITS: usize = 10;

const fn primary(name: &'static str) -> Label {
    Label { name, primary: true }
}

const fn beside(name: &'static str) -> Label {
    Label { name, primary: false }
}

impl Workload {
    /// The rows of its result.
    pub(crate) fn labels(self) -> &'static [Label] {
        match self {
            Workload::Put => &const { [primary("put")] },
            Workload::Get => &const { [primary("get")] },
            Workload::GetSerializable => &const { [primary("get-serializable")] },
            Workload::Range => &const { [primary("range")] },
            Workload::List => &const { [primary("list"), beside("page")] },
            Workload::CasOwn | Workload::CasHot => &const { [primary("swap"), beside("attempt")] },
            Workload::Mixed => &const { [primary("put"), primary("get"), primary("range"), primary("delete")] },
            Workload::Delete => &const { [primary("delete")] },
            Workload::WatchLatency | Workload::WatchFanout => &const { [primary("event"), beside("put")] },
            Workload::LeaseGrant => &const { [primary("lease-grant")] },
            Workload::LeaseKeepalive => &const { [primary("keep-alive")] },
            Workload::Kubernetes => {
                &const {
                    [
                        primary("create"),
                        primary("update"),
                        primary("get"),
                        primary("list"),
                        primary("lease"),
                        primary("delete"),
                        beside("event"),
                    ]
                }
            }
        }
    }

    /// Its name on the command line.
    pub(crate) fn name(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self).expect("no workload is hidden");
        value.get_name().to_owned()
    }

    /// Whether its keys must be there before it starts.
    pub(crate) fn needs_keys(self) -> bool {
        matches!(
            self,
            Workload::Get
                | Workload::GetSerializable
                | Workload::Range
                | Workload::List
                | Workload::Mixed
                | Workload::Delete
                | Workload::Kubernetes
        )
    }

    /// Whether it ends when the keys have, which a warm-up would take away.
    pub(crate) fn ends_with_keys(self) -> bool {
        self == Workload::Delete
    }

    /// Whether it leaves fewer keys than it found, so that the next round needs them anew.
    pub(crate) fn uses_keys_up(self) -> bool {
        matches!(self, Workload::Mixed | Workload::Delete | Workload::Kubernetes)
    }
}

/// Everything about a run that does not depend on the system it runs against.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) workload: Workload,
    /// Over all connections; each has one operation in flight at most.
    pub(crate) clients: usize,
    /// At most `clients`.
    pub(crate) connections: usize,
    /// At most `connections`.
    pub(crate) threads: usize,
    /// Operations a second in an open loop; closed without.
    pub(crate) rate: Option<u64>,
    /// How long measuring lasts; none if only `total` ends it.
    pub(crate) duration: Option<Duration>,
    pub(crate) warmup: Duration,
    /// Operations after which the run ends.
    pub(crate) total: Option<u64>,
    pub(crate) timeout: Duration,
    /// Everything a run writes starts with it, and everything that starts with it is deleted in the end.
    pub(crate) prefix: String,
    pub(crate) keys: Keys,
    pub(crate) order: KeyOrder,
    pub(crate) values: ValueKind,
    pub(crate) value_bytes: usize,
    pub(crate) range_size: u64,
    /// Keys in a page of a listing; 0 for all in one.
    pub(crate) page: i64,
    pub(crate) serializable: bool,
    pub(crate) shares: Option<Shares>,
    pub(crate) watchers: usize,
    /// Streams that the watchers share.
    pub(crate) watch_streams: usize,
    /// Node leases of a Kubernetes-like load.
    pub(crate) nodes: KeySpace,
    pub(crate) lease_ttl_seconds: i64,
    pub(crate) seed: u64,
}

impl Load {
    /// The key and range end that cover everything a run writes.
    pub(crate) fn everything(&self) -> (Bytes, Bytes) {
        (
            Bytes::copy_from_slice(self.prefix.as_bytes()),
            prefix_end(self.prefix.as_bytes()),
        )
    }

    /// A source of random numbers for one user of them, the same in every run with the same seed.
    pub(crate) fn rng(&self, user: u64) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.seed ^ (user + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}

/// The keys of a run, by number.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    /// Number `n` is in the space `n % len`.
    spaces: Vec<KeySpace>,
    pub(crate) count: u64,
}

impl Keys {
    /// Keys under one prefix, `bytes` long.
    pub(crate) fn flat(prefix: &str, bytes: usize, count: u64) -> Result<Self, String> {
        let spaces = vec![KeySpace::new(&format!("{prefix}keys/"), bytes, count)?];
        Ok(Keys { spaces, count })
    }

    /// Keys like those of pods, spread over namespaces.
    pub(crate) fn pods(prefix: &str, count: u64) -> Result<Self, String> {
        let spaces = (0..NAMESPACES)
            .map(|namespace| {
                let prefix = format!("{prefix}registry/pods/namespace-{namespace}/pod-");
                let bytes = prefix.len() + OBJECT_DIGITS;
                KeySpace::new(&prefix, bytes, count.div_ceil(NAMESPACES))
            })
            .collect::<Result<_, _>>()?;
        Ok(Keys { spaces, count })
    }

    /// The keys of node leases.
    pub(crate) fn nodes(prefix: &str, count: u64) -> Result<KeySpace, String> {
        let prefix = format!("{prefix}registry/leases/kube-node-lease/node-");
        KeySpace::new(&prefix, prefix.len() + OBJECT_DIGITS, count)
    }

    /// Key number `number`.
    pub(crate) fn key(&self, number: u64, arena: &mut BytesMut) -> Bytes {
        let spaces = self.spaces.len() as u64;
        self.spaces[(number % spaces) as usize].key(number / spaces, arena)
    }

    /// The key and range end of all keys of space `space % number of spaces`.
    pub(crate) fn space(&self, space: u64, arena: &mut BytesMut) -> (Bytes, Bytes) {
        let space = &self.spaces[(space % self.spaces.len() as u64) as usize];
        space.range(0, space.count, arena)
    }

    /// The key and range end of keys `from..to` of the only space.
    pub(crate) fn range(&self, from: u64, to: u64, arena: &mut BytesMut) -> (Bytes, Bytes) {
        self.spaces[0].range(from, to, arena)
    }

    pub(crate) fn spaces(&self) -> u64 {
        self.spaces.len() as u64
    }
}
