//! The hashes of the last compactions, which etcd remembers until its restart.
//!
//! Who asks for the hash of just the revision that was compacted to gets what it was before that compaction, so that it
//! can be compared with a member that has not compacted yet. etcd's compaction goes through the whole store anyway, and
//! hashes it on the way; here it does not, so a thread of low priority does, once for each compaction, where the store is
//! not large. It reads a view that is older than the compaction's last step, which drops what it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::Instant;

use api::Revision;
use mvcc::hash::hash_of_compaction;
use parking_lot::Mutex;
use storage::Engine;
use tokio::sync::Notify;

use crate::node::Shared;
use crate::snapshot::let_others_go_first;

/// As many as etcd remembers.
const KEPT_MAX: usize = 10;
/// The largest store, in bytes of data with its history, that is hashed.
const STORE_BYTES_MAX: u64 = 256 << 20;
/// Threads that hash at a time; compactions that come while as many are busy go without.
const THREADS_MAX: usize = 2;

/// What is remembered of one compaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) hash: u32,
    /// The compacted revision before the compaction; -1 if it was the first.
    pub(crate) previous: Revision,
}

/// What is remembered, and what will be.
#[derive(Debug, Default)]
pub(crate) struct KeptHashes {
    state: Mutex<State>,
    /// Told whenever a hash is known, or will never be.
    settled: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By the revision that was compacted to.
    kept: BTreeMap<Revision, Kept>,
    /// The revisions whose hashes are being reckoned.
    coming: BTreeSet<Revision>,
    threads: usize,
}

impl KeptHashes {
    /// What is remembered of the compaction to this revision. Waits for a hash that is being reckoned, so that who sees
    /// that a compaction is done finds its hash.
    pub(crate) async fn get(&self, revision: Revision) -> Option<Kept> {
        loop {
            // Before the look, so that what comes between it and the wait is not missed.
            let settled = self.settled.notified();
            {
                let state = self.state.lock();
                if !state.coming.contains(&revision) {
                    return state.kept.get(&revision).copied();
                }
            }
            settled.await;
        }
    }

    /// Whether there is a thread for these revisions; if so they are on their way.
    fn expect(&self, compactions: &[(Revision, Revision)]) -> bool {
        let mut state = self.state.lock();
        if state.threads == THREADS_MAX {
            return false;
        }
        state.threads += 1;
        state.coming.extend(compactions.iter().map(|(_, revision)| revision));
        true
    }

    fn settle(&self, revision: Revision, kept: Option<Kept>) {
        let mut state = self.state.lock();
        state.coming.remove(&revision);
        if let Some(kept) = kept {
            state.kept.insert(revision, kept);
        }
        while state.kept.len() > KEPT_MAX {
            state.kept.pop_first();
        }
        drop(state);
        self.settled.notify_waiters();
    }
}

/// Until a thread has its view, no compaction may come to its end.
#[derive(Default)]
pub(crate) struct Views(Vec<Receiver<()>>);

impl Views {
    /// Whether all of them are taken, or never will be.
    pub(crate) fn are_taken(&mut self) -> bool {
        self.0.retain(|view| view.try_recv() == Err(TryRecvError::Empty));
        self.0.is_empty()
    }
}

/// Begins to hash what compactions, each given as the revision before it and its own, are about to drop.
pub(crate) fn begin<E: Engine>(shared: &Arc<Shared<E>>, compactions: Vec<(Revision, Revision)>, views: &mut Views) {
    if compactions.is_empty() || shared.reader.data_bytes() > STORE_BYTES_MAX {
        return;
    }
    if !shared.kept_hashes.expect(&compactions) {
        return;
    }
    let (taken, view_taken) = sync_channel(1);
    let thread = std::thread::Builder::new().name("hash".to_owned()).spawn({
        let shared = shared.clone();
        let engine = shared.reader.engine();
        let compactions = compactions.clone();
        move || {
            let view = engine.view();
            let _ = taken.send(());
            let_others_go_first();
            for (previous, revision) in compactions {
                let begun = Instant::now();
                let kept = match hash_of_compaction(&view, previous, revision) {
                    Ok(hash) => {
                        tracing::info!(
                            hash,
                            revision,
                            compact_revision = previous,
                            took_ms = begun.elapsed().as_millis() as u64,
                            "storing new hash"
                        );
                        Some(Kept { hash, previous })
                    }
                    // Whoever needs what cannot be read will find out.
                    Err(error) => {
                        tracing::warn!(%error, revision, "no hash of a compaction");
                        None
                    }
                };
                shared.kept_hashes.settle(revision, kept);
            }
            shared.kept_hashes.state.lock().threads -= 1;
        }
    });
    match thread {
        Ok(_) => views.0.push(view_taken),
        Err(error) => {
            tracing::warn!(%error, "no hash of a compaction: a thread was not started");
            for (_, revision) in compactions {
                shared.kept_hashes.settle(revision, None);
            }
            shared.kept_hashes.state.lock().threads -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(revision: Revision) -> Kept {
        Kept {
            hash: u32::try_from(revision).expect("small"),
            previous: revision - 1,
        }
    }

    #[tokio::test]
    async fn the_newest_are_kept() {
        let hashes = KeptHashes::default();
        for revision in 1..=12 {
            hashes.settle(revision, Some(kept(revision)));
        }
        assert_eq!(hashes.get(2).await, None);
        assert_eq!(hashes.get(3).await, Some(kept(3)));
        assert_eq!(hashes.get(12).await, Some(kept(12)));
    }

    #[tokio::test]
    async fn what_is_coming_is_waited_for() {
        let hashes = Arc::new(KeptHashes::default());
        assert!(hashes.expect(&[(-1, 5), (5, 7)]));
        let ask = |revision| {
            let hashes = hashes.clone();
            tokio::spawn(async move { hashes.get(revision).await })
        };
        let (five, seven) = (ask(5), ask(7));
        tokio::task::yield_now().await;
        assert_eq!(hashes.get(6).await, None, "of which nothing is expected");
        assert!(!five.is_finished() && !seven.is_finished());
        hashes.settle(5, Some(kept(5)));
        assert_eq!(five.await.expect("ends"), Some(kept(5)));
        assert!(!seven.is_finished());
        hashes.settle(7, None);
        assert_eq!(seven.await.expect("ends"), None);
    }

    #[test]
    fn threads_are_few() {
        let hashes = KeptHashes::default();
        assert!((0..THREADS_MAX).all(|_| hashes.expect(&[(-1, 5)])));
        assert!(!hashes.expect(&[(5, 6)]));
        assert!(!hashes.state.lock().coming.contains(&6));
    }
}
