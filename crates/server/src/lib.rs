//! Carries out what the replica decides: threads, clock, sockets, metrics.
//!
//! - [`node`] runs one member: its threads and what they share.
//! - [`NodeStore`] is the handle that the front ends call.
//! - [`serve`] opens the data directory and the sockets, and runs until it is told to stop.
//! - `peer` carries messages, questions and snapshots between members.
//! - [`restore`] makes a data directory from a backup.
//! - [`discovery`] finds the first members of a cluster through another one, [`srv`] by DNS.
//! - [`identity`] computes who a member is.
//! - [`metrics`] counts.
//! - [`auth`] knows who clients are.
//! - [`otlp`] traces.
//! - [`tls`] secures the sockets.

pub mod auth;
mod auto_compaction;
mod backup;
mod bootstrap;
mod calls;
mod cluster;
mod descriptors;
pub mod discovery;
mod divergence;
mod faults;
pub mod identity;
mod kept_hashes;
pub mod metrics;
pub mod node;
pub mod otlp;
#[allow(
    dead_code,
    unused_imports,
    reason = "the transport is a whole of its own, of which the server uses most"
)]
mod peer;
mod pending;
mod quota;
mod raft_log_bridge;
pub mod restore;
pub mod serve;
mod snapshot;
pub mod srv;
mod store;
pub mod tls;
mod variables;
mod work;

pub use auth::{AuthConfig, Jwt, JwtError, JwtOptions, TokenKind};
pub use auto_compaction::AutoCompaction;
pub use backup::Backup;
pub use bootstrap::InitialMembers;
pub use discovery::DiscoveryOptions;
pub use node::{FailureHandler, Node, NodeConfig, StartError};
pub use serve::{Address, EngineConfig, Listen, ServeError, ServerConfig, run};
pub use srv::SrvOptions;
pub use store::NodeStore;

// What a configuration is made of, wherever it is defined.
pub use frontend::{Access, ConnectionSettings, Traffic};
pub use mvcc::Options as MachineOptions;
pub use mvcc::backup::FileStatus;
pub use replica::Config as ReplicaConfig;
pub use storage::{Compression, RocksOptions};
