//! The deterministic state machine: a snapshot and commands in, one batch of writes, replies and events out.
//!
//! Nothing here reads a clock, draws a random number, or starts a thread; the same entries on the same state give the
//! same bytes on every member. Time reaches it only inside log entries.
//!
//! - [`keys`] names every family, key prefix and record format on disk.
//! - [`machine`] applies committed entries: prepare, batch, notify.
//! - [`auth`] knows the users and roles, and who may do what.
//! - [`membership`] knows who belongs to the cluster.
//! - [`read`] answers ranges and read-only transactions from an engine view.
//! - [`compaction`] forgets history in small steps.
//! - [`backup`] makes a database file of etcd from a view, and a state from such a file.
//! - [`watch`] brings events to watchers, in order and without loss.

pub mod auth;
pub mod backup;
pub mod compaction;
mod etcd_form;
pub mod hash;
pub mod keys;
pub mod machine;
pub mod membership;
pub mod overlay;
mod pages;
pub mod read;
pub mod txn;
pub mod watch;

use storage::EngineError;

pub use auth::{Auth, AuthChange, Caller};
pub use compaction::CompactionProgress;
pub use machine::{Applied, Committed, LeaseChange, Machine, Options, Outcome, Reply};
pub use membership::Membership;
pub use read::Reader;
pub use watch::{Hub, Stream};

/// Why an operation did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// The request cannot be carried out; its client is told so, and nothing changed.
    #[error(transparent)]
    Refused(#[from] api::Error),
    /// The engine failed; the node stops (design invariant 8).
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Splits a refusal, which is an answer, from an engine failure, which is not.
pub(crate) fn answer<T>(result: Result<T, Failure>) -> Result<Result<T, api::Error>, EngineError> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(Failure::Refused(error)) => Ok(Err(error)),
        Err(Failure::Engine(error)) => Err(error),
    }
}
