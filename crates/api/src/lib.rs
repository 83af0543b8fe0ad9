//! MetaStore's vocabulary: what clients may ask, what they get back, and how a request stands in the Raft log.
//!
//! Every front end translates into these types and every layer below speaks them; nothing here knows about Raft, the
//! engine or a protocol server. The request and reply structs carry the field numbers of etcd's v3 protobuf API, so
//! that the bytes of a client's request, of a log entry and of a reply are one encoding and no layer converts a value.

pub mod auth;
pub mod codec;
pub mod credentials;
pub mod error;
pub mod kv;
pub mod limits;
pub mod range;
pub mod store;
pub mod wake;

pub use credentials::Credentials;
pub use error::{Code, Error, ErrorKind};
pub use limits::Limits;
pub use range::Span;
pub use store::Store;

/// The result of anything a client asked for.
pub type Result<T> = std::result::Result<T, Error>;

/// A position in the history of the store: every write transaction that changes something takes the next one.
///
/// An empty store is at revision 1 (etcd counts so too); 0 means "none" or "the latest", as the context says.
pub type Revision = i64;

/// A lease's identity: positive, chosen by the client or the server.
pub type LeaseId = i64;

/// A member's identity in the cluster: etcd's formula over its peer URLs and the cluster token.
pub type MemberId = u64;

/// A position in the Raft log.
pub type RaftIndex = u64;

/// Names one proposal among all that are in flight anywhere in the cluster.
pub type RequestId = u64;
