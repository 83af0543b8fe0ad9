//! What every adapter of this crate's traits must do, as functions that panic when it does not.
//!
//! Each takes a function that opens the adapter by name: the same name opens the same data again, after the earlier
//! instance was dropped. Run them in a test of each adapter:
//!
//! ```
//! let dir = tempfile::tempdir().unwrap();
//! let options = metastore_storage::RaftLogOptions::default();
//! metastore_storage::conformance::raft_log(|name| {
//!     metastore_storage::RaftEngineLog::open(&dir.path().join(name), &options).unwrap()
//! });
//! ```

mod engine;
mod raft_log;

pub use engine::{FAMILIES, engine};
pub use raft_log::{entry, raft_log};
