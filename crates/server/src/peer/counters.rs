//! What is counted of each peer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::MemberId;
use crate::metrics::Durations;

/// Counts since the start. They are read one by one, for metrics: nothing depends on how they fit together.
#[derive(Debug)]
pub(super) struct Counters {
    pub(super) sent_bytes: Count,
    pub(super) sent_messages: Count,
    pub(super) received_bytes: Count,
    pub(super) received_messages: Count,
    pub(super) dropped_messages: Count,
    pub(super) dropped_bytes: Count,
    pub(super) send_failures: Count,
    pub(super) snapshot_sent_bytes: Count,
    pub(super) snapshot_received_bytes: Count,
    /// Nanoseconds; 0 for not known.
    pub(super) round_trip: Count,
    /// All of them.
    pub(super) round_trips: Arc<Durations>,
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            sent_bytes: Count::default(),
            sent_messages: Count::default(),
            received_bytes: Count::default(),
            received_messages: Count::default(),
            dropped_messages: Count::default(),
            dropped_bytes: Count::default(),
            send_failures: Count::default(),
            snapshot_sent_bytes: Count::default(),
            snapshot_received_bytes: Count::default(),
            round_trip: Count::default(),
            // etcd's bounds: from 0.1 ms to 3.3 s.
            round_trips: Arc::new(Durations::doubling(0.0001, 16)),
        }
    }
}

/// One number.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How it stands with one peer. Bytes and messages are counted since this member started.
#[derive(Debug, Clone)]
pub(crate) struct PeerStats {
    /// The peer.
    pub(crate) id: MemberId,
    /// Since when our RAFT connection to it works.
    pub(crate) active_since: Option<Instant>,
    /// Where it was reached.
    pub(crate) url: Option<String>,
    /// Bytes written to RAFT and CALL connections that we opened, and to those it opened as far as they are answers.
    pub(crate) sent_bytes: u64,
    /// RAFT messages written.
    pub(crate) sent_messages: u64,
    /// Bytes read, likewise.
    pub(crate) received_bytes: u64,
    /// RAFT messages read.
    pub(crate) received_messages: u64,
    /// RAFT messages that were not sent: the queue was full, or the connection broke.
    pub(crate) dropped_messages: u64,
    /// Their bytes.
    pub(crate) dropped_bytes: u64,
    /// How often a RAFT connection could not be made or broke.
    pub(crate) send_failures: u64,
    /// RAFT messages that wait.
    pub(crate) queued_messages: usize,
    /// Their bytes.
    pub(crate) queued_bytes: usize,
    /// How long the last ping took to come back on the RAFT connection. It waits behind messages, as they do.
    pub(crate) round_trip: Option<Duration>,
    /// How long all pings took.
    pub(crate) round_trips: Arc<Durations>,
    /// Why the last connection could not be made or broke. Stays after the next one works.
    pub(crate) last_error: Option<String>,
    /// Bytes of chunks of snapshots sent.
    pub(crate) snapshot_sent_bytes: u64,
    /// Bytes of chunks of snapshots received.
    pub(crate) snapshot_received_bytes: u64,
}
