//! Time as nanoseconds since the process first asked, so that a moment fits in a word and in a written value.

use std::sync::OnceLock;
use std::time::Instant;

static EPOCH: OnceLock<Instant> = OnceLock::new();

/// Nanoseconds in a second.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Nanoseconds since the first call of this process; monotonic, the same on all threads.
pub(crate) fn now() -> u64 {
    EPOCH.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// A moment of [`now`] as tokio's clock has it.
pub(crate) fn instant(at: u64) -> tokio::time::Instant {
    let epoch = *EPOCH.get_or_init(Instant::now);
    tokio::time::Instant::from_std(epoch + std::time::Duration::from_nanos(at))
}
