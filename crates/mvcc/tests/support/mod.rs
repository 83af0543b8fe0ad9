//! What the tests of this crate share: a small engine of their own, and an independent model of etcd's semantics.

#![allow(dead_code, reason = "every test file uses a part of it")]
#![allow(unreachable_pub, reason = "a module that test files include, each for itself")]

pub mod harness;
pub mod map_engine;
pub mod model;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use api::RequestId;
use api::codec::{Action, Operation, encode_entry, encode_operation};
use api::store::{WatchOutput, WatchStream};
use bytes::Bytes;
use metastore_mvcc::machine::Command;
use metastore_mvcc::{Committed, Stream};
use storage::Engine;

pub use map_engine::MapEngine;

/// An engine that a test can make out of nothing.
pub trait TestEngine: Engine + Sized {
    /// What must live as long as the engine, such as its directory.
    type Guard;

    /// An empty engine.
    fn fresh() -> (Arc<Self>, Self::Guard);
}

impl TestEngine for MapEngine {
    type Guard = ();

    fn fresh() -> (Arc<Self>, ()) {
        (Arc::new(MapEngine::new(metastore_mvcc::keys::FAMILIES)), ())
    }
}

impl TestEngine for storage::RocksEngine {
    type Guard = tempfile::TempDir;

    fn fresh() -> (Arc<Self>, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a directory for the engine");
        let options = storage::RocksOptions::default();
        let engine =
            storage::RocksEngine::open(dir.path(), metastore_mvcc::keys::FAMILIES, &options).expect("an empty engine");
        (Arc::new(engine), dir)
    }
}

impl TestEngine for storage::MemoryEngine {
    type Guard = tempfile::TempDir;

    fn fresh() -> (Arc<Self>, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a directory for the engine");
        let engine = storage::MemoryEngine::open(dir.path(), metastore_mvcc::keys::FAMILIES).expect("an empty engine");
        (Arc::new(engine), dir)
    }
}

/// A log entry of some operations.
pub fn entry(index: u64, term: u64, operations: &[(RequestId, Action)]) -> Committed {
    let operations: Vec<_> = operations
        .iter()
        .map(|(id, action)| Operation::new(*id, action.clone()))
        .collect();
    entry_of(index, term, &operations)
}

/// A log entry of some operations, whoever asked for them.
pub fn entry_of(index: u64, term: u64, operations: &[Operation]) -> Committed {
    let encoded: Vec<Bytes> = operations.iter().map(encode_operation).collect();
    Committed {
        index,
        term,
        command: Command::Operations(encode_entry(encoded.iter().map(|bytes| &bytes[..])).into()),
    }
}

/// A waker that remembers whether it was called.
#[derive(Default)]
pub struct Flag(AtomicBool);

impl Flag {
    /// Whether it was called since it was last asked.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }

    /// Whether it was called, without forgetting it.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// The next output of a stream, as far as there is one without waiting.
pub fn next_output<E: Engine>(stream: &mut Stream<E>, flag: &Arc<Flag>) -> Option<WatchOutput> {
    let waker = Waker::from(flag.clone());
    let mut context = Context::from_waker(&waker);
    // One piece of catching up may find nothing; a bound on how often that can happen in a row finds busy loops.
    for _ in 0..10_000 {
        flag.take();
        match stream.poll_next(&mut context) {
            Poll::Ready(output) => return Some(output),
            Poll::Pending if flag.is_set() => {}
            Poll::Pending => return None,
        }
    }
    panic!("the stream keeps asking to be polled and has nothing to say");
}
