//! The binary's own parts: flags, configuration and logs.
//!
//! [`flags::load`] reads the command line, the environment and the configuration file; [`config::Config`] is the checked
//! result; [`logging::init`] sets up the log, and [`memory::settle`] the allocator. `main.rs` puts them together and starts the
//! server.

pub mod config;
pub mod flags;
pub mod logging;
pub mod memory;
pub mod snapshot;
pub mod start;
pub mod url;
