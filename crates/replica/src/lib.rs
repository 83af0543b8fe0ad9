//! A Raft member without I/O: inputs in, effects out.
//!
//! [`Replica::step`] takes what happened (a tick of the clock, proposals, messages, finished writes) and says what to do
//! (write, send, apply, answer). It never blocks on disk or network, starts no thread and reads no clock; whoever drives
//! it carries the effects out and reports back. The one thing it reads itself is old entries of the Raft log.
//!
//! - [`member`] drives raft-rs: batching, pipelining, persistence, read index.
//! - [`log_view`] shows raft-rs the log, with its tail in memory.
//! - [`lessor`] watches the time of leases, which is told to it.

pub mod lessor;
pub mod log_view;
pub mod member;

pub use lessor::Lessor;
pub use member::{Config, Effect, Input, Proposal, Replica, ReplicaError, Role, Standing};
