//! Compares what members' states come to at equal applied indexes, all the time (design invariant 7).
//!
//! Every member remembers a digest of its state for its newest entries; the leader asks for them and compares. Where one
//! differs, an alarm is raised for the odd one out: it answers nobody from then on. Right is what a majority of the voters
//! has. Where all that are not shut off were heard and no state has one, the alarm is for nobody in particular, and the
//! cluster refuses writes.

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
        let electorate = Electorate::of(&shared);
        for odd in odd_ones(&states, &electorate) {
            raise(&shared, &store, odd).await;
        }
    }
}

/// Whose state decides what is right.
#[derive(Debug, Default)]
struct Electorate {
    voters: Vec<MemberId>,
    /// Members, voters among them, that were found out before.
    shut_off: Vec<MemberId>,
}

impl Electorate {
    fn of<E: Engine>(shared: &Shared<E>) -> Self {
        let alarms = shared.reader.alarms();
        let corrupt = alarms.iter().filter(|alarm| alarm.alarm() == AlarmType::Corrupt);
        Electorate {
            voters: shared.reader.membership().voters().collect(),
            shut_off: corrupt.map(|alarm| alarm.member_id).collect(),
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

/// Whose state differs from that of a majority of the voters, at the newest index that most of them have in common; 0 if
/// there can be no such majority. Who was found out before has no say any more, and learners have none.
fn odd_ones(states: &BTreeMap<MemberId, Vec<DigestAt>>, electorate: &Electorate) -> Vec<MemberId> {
    // Who came to which revision and digest.
    type At = Vec<(MemberId, (i64, u64))>;
    let Electorate { voters, shut_off } = electorate;
    let mut by_index: BTreeMap<u64, At> = BTreeMap::new();
    for (&id, digests) in states.iter().filter(|(id, _)| !shut_off.contains(id)) {
        for digest in digests {
            let at = by_index.entry(digest.index).or_default();
            at.push((id, (digest.revision, digest.digest)));
        }
    }
    let votes = |at: &At| at.iter().filter(|(id, _)| voters.contains(id)).count();
    let most = by_index.values().map(votes).max().unwrap_or(0);
    // Among those that most voters have, where a learner can be compared as well, if there is such an index.
    let candidates = by_index.values().filter(|at| votes(at) == most);
    let Some(at) = candidates.max_by_key(|at| at.len()).filter(|at| at.len() >= 2) else {
        return Vec::new();
    };
    let mut counts: BTreeMap<(i64, u64), usize> = at.iter().map(|(_, digest)| (*digest, 0)).collect();
    for (_, digest) in at.iter().filter(|(id, _)| voters.contains(id)) {
        *counts.entry(*digest).or_default() += 1;
    }
    if counts.len() == 1 {
        return Vec::new();
    }
    let right = counts.iter().find(|(_, count)| **count * 2 > voters.len());
    if let Some((right, _)) = right {
        let odd = at.iter().filter(|(_, digest)| digest != right);
        return odd.map(|(id, _)| *id).collect();
    }
    // Whoever is away may settle it when it is back.
    let missing = voters
        .iter()
        .any(|id| !shut_off.contains(id) && !at.iter().any(|(heard, _)| heard == id));
    // Learners alone cannot make voters doubt.
    let voters_differ = counts.values().filter(|count| **count > 0).count() > 1;
    if missing || !voters_differ { Vec::new() } else { vec![0] }
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
        let among = |voters: &[MemberId], shut_off: &[MemberId], of: &[(MemberId, &[(u64, u64)])]| {
            let electorate = Electorate {
                voters: voters.to_vec(),
                shut_off: shut_off.to_vec(),
            };
            odd_ones(&states(of), &electorate)
        };
        let odd = |of: &[(MemberId, &[(u64, u64)])]| among(&[1, 2, 3], &[], of);
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
        assert_eq!(
            odd(&[(1, &[(4, 1), (5, 9)]), (2, &[(4, 1), (5, 9)]), (3, &[(4, 2)])]),
            [3]
        );
    }

    #[test]
    fn nobody_is_accused_by_less_than_a_majority_of_the_voters() {
        let among = |voters: &[MemberId], shut_off: &[MemberId], of: &[(MemberId, &[(u64, u64)])]| {
            let electorate = Electorate {
                voters: voters.to_vec(),
                shut_off: shut_off.to_vec(),
            };
            odd_ones(&states(of), &electorate)
        };
        let none: [MemberId; 0] = [];
        let two_of = [(1, &[(5, 9)][..]), (2, &[(5, 8)][..])];
        assert_eq!(among(&[1, 2, 3], &[], &two_of), none, "the third will tell");
        assert_eq!(among(&[1, 2], &[], &two_of), [0], "nobody will know who is right");
        // What was found out before is no news, and no doubt of the rest.
        assert_eq!(among(&[1, 2, 3], &[1], &two_of), none);
        assert_eq!(
            among(&[1, 2, 3], &[1], &[(1, &[(5, 9)]), (2, &[(5, 8)]), (3, &[(5, 7)])]),
            [0]
        );
        // Three of five: two that agree are no majority.
        let three_of = [(1, &[(5, 9)][..]), (2, &[(5, 8)][..]), (3, &[(5, 8)][..])];
        assert_eq!(among(&[1, 2, 3, 4, 5], &[], &three_of), none);
        // Learners have no say, but are found out.
        let learners = [
            (1, &[(5, 9)][..]),
            (2, &[(5, 9)][..]),
            (7, &[(5, 8)][..]),
            (8, &[(5, 8)][..]),
        ];
        assert_eq!(among(&[1, 2, 3], &[], &learners), [7, 8]);
        assert_eq!(among(&[1, 2, 3], &[], &[(1, &[(5, 9)]), (7, &[(5, 8)])]), none);
    }
}
