//! The state as a database file of etcd, both ways, so that users can come from etcd and leave again.
//!
//! | Bucket | Key | Value |
//! |---|---|---|
//! | `key` | the revision of a change, see below | an encoded `mvccpb.KeyValue` |
//! | `lease` | lease id, 8 bytes big endian | an encoded `leasepb.Lease` |
//! | `alarm` | an encoded `etcdserverpb.AlarmMember` | nothing |
//! | `auth` | `authEnabled`; `authRevision` | one byte; 8 bytes big endian |
//! | `authUsers`, `authRoles` | the name | an encoded `authpb.User` or `authpb.Role` |
//! | `members` | member id in hexadecimal | JSON |
//! | `members_removed` | member id in hexadecimal | `removed` |
//! | `cluster` | `clusterVersion` | such as `3.7.0` |
//! | `meta` | `consistent_index`, `term` | applied index and its term, 8 bytes big endian |
//! | `meta` | `confState` | JSON |
//! | `meta` | `storageVersion` | such as `3.7.0` |
//! | `meta` | `scheduledCompactRev`, `finishedCompactRev` | a revision, as a key of `key`; missing if there was no compaction |
//!
//! [`Export`] writes exactly what compaction has left, whether or not it has got round to dropping the rest; so the
//! hashes of the histories are equal. [`import()`] leaves aside who belonged to the cluster, as etcd's own restoring does.

mod export;
mod import;

pub use export::{Export, ExportError, Scratch};
pub use import::{FileStatus, ImportError, Imported, import, status};

/// The buckets of an etcd database, in order of their names.
const BUCKETS: [&str; 10] = [
    "alarm",
    "auth",
    "authRoles",
    "authUsers",
    "cluster",
    "key",
    "lease",
    "members",
    "members_removed",
    "meta",
];

const CONSISTENT_INDEX: &str = "consistent_index";
const TERM: &str = "term";
const CONF_STATE: &str = "confState";
const STORAGE_VERSION: &str = "storageVersion";
const SCHEDULED: &str = "scheduledCompactRev";
const FINISHED: &str = "finishedCompactRev";

/// A lease as etcd stores it (`leasepb.Lease`).
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Lease {
    #[prost(int64, tag = "1")]
    id: i64,
    #[prost(int64, tag = "2")]
    ttl: i64,
    #[prost(int64, tag = "3")]
    remaining_ttl: i64,
}
