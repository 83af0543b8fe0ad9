//! Compares what members' states come to at equal applied indexes, all the time (design invariant 7).
//!
//! Every member remembers a digest of its state for its newest entries; the leader asks for them and compares. Where one
//! differs, an alarm is raised for the odd one out: it answers nobody from then on. Where there is no majority for either
//! side the alarm is for nobody in particular, and the cluster refuses writes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use api::MemberId;
use api::kv::{AlarmAction, AlarmMember, AlarmRequest, AlarmType};
use storage::Engine;

use crate::calls::{Answer, Ask, DigestAt, Empty, decode_answer};
use crate::node::Shared;
use crate::store::NodeStore;

/// How often the leader asks.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long a peer may take to answer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Watches for divergence for as long as the node runs, while it leads.
pub(crate) async fn watch<E: Engine>(shared: Arc<Shared<E>>) {
    let store = NodeStore::new(shared.clone());
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !shared.stopping() {
        interval.tick().await;
        let standing = shared.standing();
        if !standing.has_begun || standing.reads_locally {
            continue;
        }
        let states = ask_all(&shared).await;
        for odd in odd_ones(&states) {
            raise(&shared, &store, odd).await;
        }
    }
}

async fn ask_all<E: Engine>(shared: &Shared<E>) -> BTreeMap<MemberId, Vec<DigestAt>> {
    let mut states = BTreeMap::new();
    let Some((_, transport)) = shared.transport.get() else {
        return states;
    };
    let members = shared.reader.membership();
    let peers = members.members.iter().map(|member| member.id);
    let mut asked = Vec::new();
    for id in peers.filter(|&id| id != shared.member_id()) {
        asked.push(async move {
            (
                id,
                transport.call(id, Ask::Digests(Empty {}).into_bytes(), TIMEOUT).await,
            )
        });
    }
    for (id, answer) in futures::future::join_all(asked).await {
        if let Ok(Ok(Answer::Digests(digests))) = answer.map(decode_answer) {
            states.insert(id, digests.digests);
        }
    }
    // This member last: it has what the others had.
    let own = shared.digests.lock();
    let own = own.iter().map(|digest| DigestAt {
        index: digest.index,
        revision: digest.revision,
        digest: digest.digest,
    });
    states.insert(shared.member_id(), own.collect());
    states
}

/// Whose state differs from that of the majority at the newest index that at least two have in common; 0 if there is no
/// majority.
fn odd_ones(states: &BTreeMap<MemberId, Vec<DigestAt>>) -> Vec<MemberId> {
    // Who came to which revision and digest.
    type At = Vec<(MemberId, (i64, u64))>;
    let mut by_index: BTreeMap<u64, At> = BTreeMap::new();
    for (&id, digests) in states {
        for digest in digests {
            let at = by_index.entry(digest.index).or_default();
            at.push((id, (digest.revision, digest.digest)));
        }
    }
    // The newest index that most of them have.
    let most = by_index.values().map(Vec::len).max().unwrap_or(0);
    let newest = by_index.values().rev().find(|at| at.len() == most);
    let Some(at) = newest.filter(|_| most >= 2) else {
        return Vec::new();
    };
    let mut counts: BTreeMap<(i64, u64), usize> = BTreeMap::new();
    for (_, digest) in at {
        *counts.entry(*digest).or_default() += 1;
    }
    if counts.len() == 1 {
        return Vec::new();
    }
    let right = counts.iter().find(|(_, count)| **count * 2 > at.len());
    match right {
        Some((right, _)) => at
            .iter()
            .filter(|(_, digest)| digest != right)
            .map(|(id, _)| *id)
            .collect(),
        None => vec![0],
    }
}

async fn raise<E: Engine>(shared: &Shared<E>, store: &NodeStore<E>, odd: MemberId) {
    let alarm = AlarmMember {
        member_id: odd,
        alarm: AlarmType::Corrupt.into(),
    };
    if shared.reader.alarms().contains(&alarm) {
        return;
    }
    if odd == 0 {
        tracing::error!("members' states differ, and none of them has a majority: the cluster refuses writes");
    } else {
        tracing::error!(
            member = format!("{odd:x}"),
            "a member's state differs from that of the majority: it is shut off; replace it"
        );
    }
    let request = AlarmRequest {
        action: AlarmAction::Activate.into(),
        member_id: odd,
        alarm: AlarmType::Corrupt.into(),
    };
    if let Err(error) = store.propose_alarm(request).await {
        tracing::warn!(%error, "the alarm was not raised; it is tried again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(states: &[(MemberId, &[(u64, u64)])]) -> BTreeMap<MemberId, Vec<DigestAt>> {
        let digests = |digests: &[(u64, u64)]| {
            let at = |&(index, digest)| DigestAt {
                index,
                revision: 1,
                digest,
            };
            digests.iter().map(at).collect()
        };
        states.iter().map(|(id, of_it)| (*id, digests(of_it))).collect()
    }

    #[test]
    fn the_odd_one_out_is_found() {
        let odd = |of: &[(MemberId, &[(u64, u64)])]| odd_ones(&states(of));
        let none: [MemberId; 0] = [];
        assert_eq!(odd(&[]), none);
        assert_eq!(odd(&[(1, &[(5, 9)])]), none, "nobody to compare with");
        assert_eq!(odd(&[(1, &[(5, 9)]), (2, &[(6, 8)])]), none, "no index in common");
        assert_eq!(odd(&[(1, &[(5, 9), (6, 3)]), (2, &[(5, 9)]), (3, &[(5, 9)])]), none);
        assert_eq!(odd(&[(1, &[(5, 9)]), (2, &[(5, 8)]), (3, &[(5, 9)])]), [2]);
        assert_eq!(
            odd(&[(1, &[(5, 8)]), (2, &[(5, 9)]), (3, &[(5, 9)])]),
            [1],
            "the leader may be odd"
        );
        assert_eq!(odd(&[(1, &[(5, 9)]), (2, &[(5, 8)])]), [0], "nobody knows who is right");
        assert_eq!(
            odd(&[(1, &[(4, 1), (5, 9)]), (2, &[(4, 1), (5, 9)]), (3, &[(4, 2)])]),
            [3]
        );
    }
}
