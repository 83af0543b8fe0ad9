//! Whole clusters of the shipping replica and state machine in one thread, from one seed.
//!
//! The code under test is the production [`replica::Replica`], [`mvcc::Machine`] and [`replica::Lessor`]; around them
//! everything is virtual: [`network`], the disks ([`log`], [`engine`]), time and clients. `docs/testing.md` says what is
//! simulated and what is not.
//!
//! - [`scenario`] draws from the seed what kind of world it is.
//! - [`world`] holds the queue of events.
//! - [`node`] is one member: its disk, and its [`process`] while it runs.
//! - [`effects`], [`log_thread`], [`apply_thread`] and [`messages`] carry out what members want done, as the server does.
//! - [`faults`] breaks things, [`members`] changes who belongs to the cluster, [`bugs`] are deliberate.
//! - [`clients`] use the store, [`leases`] keep theirs, [`watchers`] follow what happens.
//! - [`auth`] are users and roles, which operators change meanwhile.
//! - [`history`] checks what members commit, apply and answer.
//! - [`model`] replays what was committed, as simply as it can be written down.
//! - [`promises`] holds what members say against their disks, [`visible`] what clients saw against itself.
//! - [`run`] runs a seed and says how it ended; [`shorten`] finds a shorter way to a failure.

pub mod apply_thread;
pub mod auth;
pub mod bugs;
pub mod clients;
pub mod effects;
pub mod engine;
pub mod faults;
pub mod history;
pub mod leases;
pub mod log;
pub mod log_thread;
pub mod members;
pub mod messages;
pub mod model;
pub mod network;
pub mod node;
pub mod process;
pub mod promises;
pub mod run;
pub mod scenario;
pub mod shorten;
pub mod trace;
pub mod visible;
pub mod watchers;
pub mod world;

/// Virtual time in microseconds since the world began.
pub type Micros = u64;

/// A virtual millisecond.
pub const MS: Micros = 1_000;

/// A virtual second.
pub const SECOND: Micros = 1_000_000;
