//! A Raft member without I/O: inputs in, effects out.
//!
//! [`Replica::step`] takes what happened (a tick of the clock, proposals, messages, finished writes) and says what to do
//! (write, send, apply, answer). It never blocks on disk or network, starts no thread and reads no clock; whoever drives
//! it carries the effects out and reports back. The one thing it reads itself is old entries of the Raft log.
//!
//! - [`member`] drives raft-rs: batching, pipelining, persistence, read index.
//! - [`forward`] brings followers' operations to the leader, each into the log at most once.
//! - [`wire`] is what members tell each other.
//! - [`log_view`] shows raft-rs the log, with its tail in memory.
//! - [`lessor`] watches the time of leases, which is told to it.

pub mod forward;
pub mod lessor;
pub mod log_view;
pub mod member;
pub mod wire;

pub use forward::Proposal;
pub use lessor::Lessor;
pub use member::{Config, Effect, Input, PeerProgress, Replica, ReplicaError, Role, Standing};
pub use wire::PeerMessage;
