//! Watches the time of leases.
//!
//! Which leases exist is replicated state and comes from applied entries; how much time they have left is known to the
//! leader alone and never enters the state machine. When a lease's time is over, the leader proposes its revocation like
//! any other operation. All times are told to the functions here, in milliseconds of a clock that never goes back.

use std::collections::{BTreeSet, HashMap};

use api::codec::LeaseCheckpoint;
use api::{LeaseId, RequestId};
use mvcc::LeaseChange;

/// How long after a revocation came to nothing the next one is due, in milliseconds.
const REVOKE_RETRY_MS: u64 = 3_000;

/// How long a lease must have been left alone before what it has left is worth replicating, in milliseconds: half of its
/// time to live, but no less than this. One that is kept alive more often costs nothing; clients do so three times in it.
const CHECKPOINT_MIN_MS: u64 = 5_000;

/// Knows when each lease ends.
#[derive(Debug, Default)]
pub struct Lessor {
    leases: HashMap<LeaseId, Lease>,
    /// When to look at which lease next: its end, or the retry of its revocation. Empty unless leading.
    due: BTreeSet<(u64, LeaseId)>,
    /// Revocations that were handed out and are not known to have ended. Empty unless leading.
    revocations: HashMap<RequestId, LeaseId>,
    /// When what a lease has left is to be replicated. Empty unless leading.
    checkpoints: BTreeSet<(u64, LeaseId)>,
    leading: bool,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    ttl_s: i64,
    /// What was left at the last checkpoint, in seconds; 0 when there was none.
    remaining_s: i64,
    /// When it ends; meaningful while leading.
    ends_ms: u64,
    /// When it is looked at: `ends_ms`, or later once a revocation came to nothing.
    due_ms: u64,
    /// Its revocation that is under way: meanwhile it is not looked at.
    revocation: Option<RequestId>,
    /// When what it has left is to be replicated.
    checkpoint_ms: u64,
    /// Whether a checkpoint was handed out that may not be applied yet.
    checkpointing: bool,
}

impl Lease {
    fn checkpoint_interval_ms(&self) -> u64 {
        (seconds(self.ttl_s) / 2).max(CHECKPOINT_MIN_MS)
    }
}

fn seconds(s: i64) -> u64 {
    u64::try_from(s).unwrap_or(0).saturating_mul(1000)
}

impl Lessor {
    /// Takes a change from an applied entry.
    pub fn apply(&mut self, change: LeaseChange, now_ms: u64) {
        match change {
            LeaseChange::Granted { id, ttl, remaining_ttl } => {
                let known = self.leases.get(&id).copied();
                if let Some(known) = known {
                    // A checkpoint of a lease that is known: only what the next leader starts from changes.
                    self.leases.insert(
                        id,
                        Lease {
                            remaining_s: remaining_ttl,
                            checkpointing: known.checkpointing && remaining_ttl > 0,
                            ..known
                        },
                    );
                    return;
                }
                let ends_ms = now_ms.saturating_add(seconds(ttl));
                self.leases.insert(
                    id,
                    Lease {
                        ttl_s: ttl,
                        remaining_s: remaining_ttl,
                        ends_ms,
                        due_ms: ends_ms,
                        revocation: None,
                        checkpoint_ms: 0,
                        checkpointing: false,
                    },
                );
                if self.leading {
                    self.due.insert((ends_ms, id));
                    self.plan_checkpoint(id, now_ms);
                }
            }
            LeaseChange::Revoked { id } => {
                if let Some(lease) = self.leases.remove(&id) {
                    self.due.remove(&(lease.due_ms, id));
                    self.checkpoints.remove(&(lease.checkpoint_ms, id));
                    if let Some(request) = lease.revocation {
                        self.revocations.remove(&request);
                    }
                }
            }
        }
    }

    fn plan_checkpoint(&mut self, id: LeaseId, now_ms: u64) {
        if let Some(lease) = self.leases.get_mut(&id) {
            self.checkpoints.remove(&(lease.checkpoint_ms, id));
            lease.checkpoint_ms = now_ms.saturating_add(lease.checkpoint_interval_ms());
            // One that ends before has nothing left to replicate.
            if lease.checkpoint_ms < lease.ends_ms {
                self.checkpoints.insert((lease.checkpoint_ms, id));
            }
        }
    }

    /// What leases have left that were not kept alive for a while, at most `count_max` of them; for the log, so that the
    /// next leader starts from there. Rounded up: a lease never loses time to it.
    pub fn checkpoints(&mut self, now_ms: u64, count_max: usize) -> Vec<LeaseCheckpoint> {
        let mut checkpoints = Vec::new();
        while checkpoints.len() < count_max
            && let Some(&(at_ms, id)) = self.checkpoints.first()
            && at_ms <= now_ms
        {
            let lease = self.leases.get(&id).expect("what is planned exists");
            let left_ms = lease.ends_ms.saturating_sub(now_ms);
            let remaining_ttl = i64::try_from(left_ms.div_ceil(1000)).unwrap_or(i64::MAX);
            self.checkpoints.remove(&(at_ms, id));
            if remaining_ttl > 0 {
                self.leases.get_mut(&id).expect("what is planned exists").checkpointing = true;
                checkpoints.push(LeaseCheckpoint { id, remaining_ttl });
                self.plan_checkpoint(id, now_ms);
            }
        }
        checkpoints
    }

    /// Whether the log says, or is about to say, that the lease has less than its full time left. Before it is kept
    /// alive, that is to be taken back, or the next leader would end it too early. If so, no checkpoint is handed out for
    /// a while, so that there is time for that.
    pub fn postpone_checkpoint(&mut self, id: LeaseId, now_ms: u64) -> bool {
        let is_checkpointed = |lease: &Lease| lease.remaining_s > 0 || lease.checkpointing;
        let checkpointed = self.leases.get(&id).is_some_and(is_checkpointed);
        if checkpointed {
            self.plan_checkpoint(id, now_ms);
        }
        checkpointed
    }

    /// This member leads now: every lease gets its full time (or what the last checkpoint left of it) and
    /// `extension_ms` on top, for the time in which nobody could keep it alive.
    pub fn lead(&mut self, now_ms: u64, extension_ms: u64) {
        self.leading = true;
        self.due.clear();
        self.checkpoints.clear();
        self.revocations.clear();
        for (&id, lease) in &mut self.leases {
            let left_s = if lease.remaining_s > 0 {
                lease.remaining_s
            } else {
                lease.ttl_s
            };
            lease.ends_ms = now_ms.saturating_add(seconds(left_s)).saturating_add(extension_ms);
            lease.due_ms = lease.ends_ms;
            // Those of an earlier term of this member are refused, or have been.
            lease.revocation = None;
            lease.checkpointing = false;
            self.due.insert((lease.due_ms, id));
            lease.checkpoint_ms = now_ms.saturating_add(lease.checkpoint_interval_ms());
            if lease.checkpoint_ms < lease.ends_ms {
                self.checkpoints.insert((lease.checkpoint_ms, id));
            }
        }
    }

    /// This member no longer leads: nothing ends here any more.
    pub fn follow(&mut self) {
        self.leading = false;
        self.due.clear();
        self.checkpoints.clear();
        self.revocations.clear();
    }

    /// Whether this member watches over leases.
    pub fn leads(&self) -> bool {
        self.leading
    }

    /// Whether there is such a lease.
    pub fn contains(&self, id: LeaseId) -> bool {
        self.leases.contains_key(&id)
    }

    /// How many leases there are.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Gives a lease its full time again. The time to live in seconds; `None` if there is no such lease, or its time is
    /// over and its revocation is under way.
    pub fn keep_alive(&mut self, id: LeaseId, now_ms: u64) -> Option<i64> {
        let lease = self.leases.get_mut(&id)?;
        if self.leading && lease.ends_ms <= now_ms {
            return None;
        }
        self.due.remove(&(lease.due_ms, id));
        lease.ends_ms = now_ms.saturating_add(seconds(lease.ttl_s));
        lease.due_ms = lease.ends_ms;
        let ttl_s = lease.ttl_s;
        if self.leading {
            self.due.insert((lease.due_ms, id));
            self.plan_checkpoint(id, now_ms);
        }
        Some(ttl_s)
    }

    /// The time to live as granted, and whole seconds that are left; `None` if there is no such lease.
    pub fn time_to_live(&self, id: LeaseId, now_ms: u64) -> Option<(i64, i64)> {
        let lease = self.leases.get(&id)?;
        // Part of the current millisecond is over already: a lease never has all of its time left.
        let left_ms = lease.ends_ms.saturating_sub(now_ms).saturating_sub(1);
        Some((lease.ttl_s, i64::try_from(left_ms / 1000).unwrap_or(i64::MAX)))
    }

    /// All leases, the soonest to end first.
    pub fn list(&self) -> Vec<LeaseId> {
        let mut leases: Vec<_> = self.leases.iter().map(|(&id, lease)| (lease.ends_ms, id)).collect();
        leases.sort_unstable();
        leases.into_iter().map(|(_, id)| id).collect()
    }

    /// Revocations to propose, of leases whose time is over. None is handed out for a lease while one is under way, and no
    /// more than `count_max` are under way in all: where commits are slow, more would only lengthen what waits, each of
    /// them holding up the others. `next_id` names them.
    pub fn expired(
        &mut self,
        now_ms: u64,
        count_max: usize,
        mut next_id: impl FnMut() -> RequestId,
    ) -> Vec<(RequestId, LeaseId)> {
        let mut expired = Vec::new();
        while self.revocations.len() < count_max
            && let Some(&(due_ms, id)) = self.due.first()
            && due_ms <= now_ms
        {
            self.due.pop_first();
            let request = next_id();
            self.leases.get_mut(&id).expect("what is due exists").revocation = Some(request);
            self.revocations.insert(request, id);
            expired.push((request, id));
        }
        expired
    }

    /// Something that was proposed was refused, or had no effect when it was applied. If it was a revocation, its lease
    /// gets another one after a while. Every proposal of a leader ends so, or is applied, or outlives its leadership.
    pub fn came_to_nothing(&mut self, request: RequestId, now_ms: u64) {
        let Some(id) = self.revocations.remove(&request) else {
            return;
        };
        let lease = self
            .leases
            .get_mut(&id)
            .expect("a lease that is gone has no revocation");
        lease.revocation = None;
        lease.due_ms = now_ms.saturating_add(REVOKE_RETRY_MS);
        self.due.insert((lease.due_ms, id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Leases that are to be revoked. The revocation of each bears its number.
    fn expired(lessor: &mut Lessor, now_ms: u64, count_max: usize) -> Vec<LeaseId> {
        let due: Vec<_> = lessor.due.iter().map(|&(_, id)| id).collect();
        let mut names = due.into_iter().map(|id| id as RequestId);
        let expired = lessor.expired(now_ms, count_max, || names.next().expect("it is due"));
        assert!(expired.iter().all(|&(request, id)| request == id as RequestId));
        expired.into_iter().map(|(_, id)| id).collect()
    }

    fn granted(id: LeaseId, ttl: i64) -> LeaseChange {
        LeaseChange::Granted {
            id,
            ttl,
            remaining_ttl: 0,
        }
    }

    #[test]
    fn a_lease_ends_unless_it_is_kept_alive() {
        let mut lessor = Lessor::default();
        lessor.lead(0, 0);
        lessor.apply(granted(1, 5), 1_000);
        lessor.apply(granted(2, 5), 1_000);
        assert_eq!(lessor.time_to_live(1, 2_500), Some((5, 3)));
        assert_eq!(lessor.keep_alive(1, 4_000), Some(5));
        assert_eq!(expired(&mut lessor, 5_999, 10), [0_i64; 0]);
        assert_eq!(expired(&mut lessor, 6_000, 10), [2]);
        assert_eq!(lessor.keep_alive(2, 6_000), None, "its revocation is under way");
        assert_eq!(lessor.list(), [2, 1]);
        assert_eq!(expired(&mut lessor, 9_000, 10), [1]);
        lessor.apply(LeaseChange::Revoked { id: 1 }, 9_000);
        lessor.apply(LeaseChange::Revoked { id: 2 }, 9_000);
        assert_eq!(expired(&mut lessor, u64::MAX, 10), [0_i64; 0]);
        assert_eq!(lessor.time_to_live(1, 9_000), None);
    }

    #[test]
    fn a_revocation_is_proposed_again_only_after_one_came_to_nothing() {
        let mut lessor = Lessor::default();
        lessor.lead(0, 0);
        lessor.apply(granted(1, 5), 0);
        assert_eq!(expired(&mut lessor, 5_000, 10), [1]);
        assert_eq!(expired(&mut lessor, 1_000_000, 10), [0_i64; 0], "it is under way");
        lessor.came_to_nothing(2, 1_000_000);
        assert_eq!(expired(&mut lessor, 2_000_000, 10), [0_i64; 0], "that was another");
        lessor.came_to_nothing(1, 2_000_000);
        assert_eq!(lessor.keep_alive(1, 2_000_000), None, "its time is over all the same");
        assert_eq!(expired(&mut lessor, 2_002_999, 10), [0_i64; 0]);
        assert_eq!(expired(&mut lessor, 2_003_000, 10), [1]);
        // What another term handed out is void.
        lessor.follow();
        lessor.came_to_nothing(1, 2_003_000);
        assert_eq!(expired(&mut lessor, u64::MAX, 10), [0_i64; 0]);
        lessor.lead(3_000_000, 1_000);
        assert_eq!(expired(&mut lessor, 3_006_000, 10), [1]);
        lessor.apply(LeaseChange::Revoked { id: 1 }, 3_006_000);
        lessor.came_to_nothing(1, 3_006_000);
        assert_eq!(expired(&mut lessor, u64::MAX, 10), [0_i64; 0]);
    }

    #[test]
    fn a_new_leader_starts_from_the_full_time_or_the_checkpoint() {
        let mut lessor = Lessor::default();
        lessor.apply(granted(1, 100), 0);
        lessor.apply(granted(2, 100), 0);
        lessor.apply(
            LeaseChange::Granted {
                id: 2,
                ttl: 100,
                remaining_ttl: 10,
            },
            0,
        );
        assert_eq!(expired(&mut lessor, u64::MAX, 10), [0_i64; 0], "followers end nothing");
        lessor.lead(50_000, 1_000);
        assert_eq!(expired(&mut lessor, 60_999, 10), [0_i64; 0]);
        assert_eq!(expired(&mut lessor, 61_000, 10), [2]);
        assert_eq!(expired(&mut lessor, 151_000, 10), [1]);
        lessor.follow();
        assert_eq!(expired(&mut lessor, u64::MAX, 10), [0_i64; 0]);
    }

    #[test]
    fn what_is_left_is_replicated_unless_the_lease_is_kept_alive() {
        let mut lessor = Lessor::default();
        lessor.lead(0, 0);
        lessor.apply(granted(1, 100), 0);
        lessor.apply(granted(2, 100), 0);
        lessor.apply(granted(3, 4), 0);
        assert_eq!(lessor.keep_alive(2, 40_000), Some(100));
        assert_eq!(lessor.checkpoints(49_999, 10), []);
        let left = |id, remaining_ttl| LeaseCheckpoint { id, remaining_ttl };
        assert_eq!(lessor.checkpoints(50_500, 10), [left(1, 50)]);
        assert!(lessor.postpone_checkpoint(1, 50_500), "it may be applied at any moment");
        assert!(!lessor.postpone_checkpoint(2, 50_500));
        lessor.apply(
            LeaseChange::Granted {
                id: 1,
                ttl: 100,
                remaining_ttl: 50,
            },
            50_600,
        );
        assert!(lessor.postpone_checkpoint(1, 50_600));
        lessor.apply(granted(1, 100), 50_700);
        assert!(!lessor.postpone_checkpoint(1, 50_700), "it was taken back");
        assert_eq!(lessor.keep_alive(1, 50_800), Some(100));
        assert_eq!(lessor.checkpoints(90_500, 10), [left(2, 50)]);
        assert_eq!(lessor.checkpoints(100_900, 10), [left(1, 50)]);
        lessor.follow();
        assert_eq!(lessor.checkpoints(u64::MAX, 10), []);
    }

    #[test]
    fn expiry_is_bounded_at_a_time() {
        let mut lessor = Lessor::default();
        lessor.lead(0, 0);
        for id in 1..=10 {
            lessor.apply(granted(id, 1), 0);
        }
        assert_eq!(expired(&mut lessor, 1_000, 4), [1, 2, 3, 4]);
        assert_eq!(expired(&mut lessor, 1_000, 4), [0_i64; 0], "so many are under way");
        lessor.apply(LeaseChange::Revoked { id: 2 }, 1_000);
        lessor.came_to_nothing(3, 1_000);
        assert_eq!(expired(&mut lessor, 1_000, 4), [5, 6]);
        assert_eq!(expired(&mut lessor, 4_000, 100), [7, 8, 9, 10, 3]);
    }

    #[test]
    fn the_longest_lease_does_not_overflow() {
        let mut lessor = Lessor::default();
        lessor.lead(u64::MAX - 5, 10);
        lessor.apply(granted(1, i64::MAX), u64::MAX - 1);
        assert_eq!(lessor.keep_alive(1, u64::MAX - 1), Some(i64::MAX));
    }
}
