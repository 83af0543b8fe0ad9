//! Messages and snapshots on their way from member to member.

use std::sync::Arc;

use api::MemberId;
use bytes::Bytes;
use raft::eraftpb::{Message, MessageType};
use replica::{Input, PeerMessage};

use crate::bugs::Bug;
use crate::engine::Image;
use crate::node::Staged;
use crate::world::{Event, World};
use crate::{MS, SECOND};

impl World {
    pub(crate) fn deliver(&mut self, from: usize, to: usize, data: Bytes) {
        if self.nodes[to].process.is_none() {
            if self.rng.u8(..4) == 0 {
                let id = self.nodes[to].id;
                self.input(from, Input::Unreachable(id));
            }
            return;
        }
        self.trace.mix_bytes(&data);
        let message = PeerMessage::decode(data).expect("what a member encodes decodes");
        let from = self.nodes[from].id;
        if let PeerMessage::Raft(message) = &message
            && message.get_msg_type() == MessageType::MsgTimeoutNow
        {
            self.invited = Some(self.nodes[to].id);
        }
        if is_heartbeat(&message) {
            self.trace
                .noise(self.now, || format!("{from} -> {}: {}", to + 1, describe(&message)));
        } else {
            self.trace
                .line(self.now, || format!("{from} -> {}: {}", to + 1, describe(&message)));
        }
        self.input(to, Input::Receive(from, message));
    }

    /// Sends a message to a member.
    pub(crate) fn send(&mut self, n: usize, to: MemberId, message: &PeerMessage) {
        let to = to as usize - 1;
        if to >= self.nodes.len() {
            return;
        }
        let mut data = message.encode();
        if let PeerMessage::Raft(message) = message
            && message.entries.len() > 1
            && self.has(Bug::MessageLosesEntry, 20)
        {
            let mut message = message.clone();
            message.mut_entries().remove(0);
            data = PeerMessage::Raft(message).encode();
        }
        self.aim(n, message);
        let arrivals = self.network.arrivals(n, to, self.now, &self.scenario, &mut self.rng);
        for at in arrivals {
            let data = data.clone();
            self.at(at, Event::Deliver { from: n, to, data });
        }
    }

    /// Crashes often come when a member has just promised something.
    pub(crate) fn aim(&mut self, n: usize, message: &PeerMessage) {
        let PeerMessage::Raft(message) = message else { return };
        let promises = match message.get_msg_type() {
            MessageType::MsgRequestVoteResponse => !message.reject,
            MessageType::MsgAppendResponse => !message.reject && self.rng_aims.u8(..50) == 0,
            MessageType::MsgTimeoutNow => true,
            _ => false,
        };
        if promises && self.scenario.aims && self.rng_aims.u8(..6) == 0 {
            self.trace.mark("crash right after a promise");
            let life = self.nodes[n].starts;
            let at = self.now + self.rng_aims.u64(..20 * MS);
            self.at(at, Event::Crash(n, life));
        }
    }

    pub(crate) fn send_snapshot(&mut self, n: usize, to: MemberId, message: &Message) {
        let id = self.nodes[n].id;
        let process = self.nodes[n].process.as_mut().expect("it just stepped");
        let from = (n, process.life);
        let wanted = message.get_snapshot().get_metadata().index;
        let made = process.made.remove(&to);
        let Some((_, mut image)) = made.filter(|(index, _)| *index == wanted) else {
            // One that was asked for in a later reign has taken its place.
            self.trace.mark("snapshot replaced before it was sent");
            return self.input(n, Input::SnapshotSent { to, done: false });
        };
        self.trace.mark("snapshot sent");
        if self.change_is_under_way() {
            self.trace.mark("snapshot sent during a change of members");
        }
        if self.nodes[n]
            .process
            .as_ref()
            .is_some_and(|process| process.compaction_due)
        {
            self.trace.mark("snapshot sent during compaction");
        }
        self.trace
            .line(self.now, || format!("{id} sends {to} a snapshot of {wanted}"));
        let to = to as usize - 1;
        let took = self.rng.u64(MS..2 * SECOND);
        let breaks = self.calm_since.is_none() && self.rng.u8(..5) == 0;
        let message = PeerMessage::Raft(Box::new(message.clone())).encode();
        let lost = match self.bug {
            Some(Bug::SnapshotLosesKey) => Some(mvcc::keys::CUR),
            Some(Bug::SnapshotLosesHistory) => Some(mvcc::keys::REV),
            Some(Bug::SnapshotLosesLeases) => Some(mvcc::keys::LEASE),
            _ => None,
        };
        if let Some(family) = lost {
            let map = Arc::make_mut(&mut image[family.0]);
            map.pop_last();
            if family != mvcc::keys::CUR {
                map.clear();
            }
        }
        let image = (!breaks).then_some(image);
        self.at(
            self.now + took,
            Event::Transferred {
                from,
                to,
                message,
                image,
            },
        );
    }

    pub(crate) fn transferred(&mut self, from: (usize, u64), to: usize, message: Bytes, image: Option<Image>) {
        let open = self.network.is_open(from.0, to);
        let (Some(image), true, Some(process)) = (image, open, self.nodes[to].process.as_mut()) else {
            self.trace.mark("snapshot transfer broke off");
            return self.report_snapshot(to, from, false);
        };
        let Ok(PeerMessage::Raft(message)) = PeerMessage::decode(message) else {
            unreachable!("it was encoded by us")
        };
        process.staged.push_back(Staged { image, sender: from });
        self.input(to, Input::ReceiveSnapshot(message));
    }

    pub(crate) fn report_snapshot(&mut self, to: usize, from: (usize, u64), done: bool) {
        if self.bug == Some(Bug::SnapshotNotReported) {
            return;
        }
        let (id, delay) = (self.nodes[to].id, self.rng.u64(self.scenario.delay.clone()));
        // An answer that gets lost looks like a transfer that broke off.
        let done = done && self.network.is_open(to, from.0);
        self.at(self.now + delay, Event::SnapshotReport { from, to: id, done });
    }
}

fn is_heartbeat(message: &PeerMessage) -> bool {
    use MessageType::{MsgHeartbeat, MsgHeartbeatResponse};
    let PeerMessage::Raft(message) = message else {
        return false;
    };
    matches!(message.get_msg_type(), MsgHeartbeat | MsgHeartbeatResponse)
}

/// A message in few words.
fn describe(message: &PeerMessage) -> String {
    match message {
        PeerMessage::Raft(message) => {
            let entries = match (message.entries.first(), message.entries.last()) {
                (Some(first), Some(last)) => format!(", entries {}..={}", first.index, last.index),
                _ => String::new(),
            };
            let reject = if message.reject { ", reject" } else { "" };
            format!(
                "{:?} term {}, log {} of term {}, commit {}{entries}{reject}",
                message.get_msg_type(),
                message.term,
                message.index,
                message.log_term,
                message.commit
            )
        }
        PeerMessage::Forward(forward) => {
            format!(
                "forward term {}, batches {} + {}",
                forward.term,
                forward.first,
                forward.batches.len()
            )
        }
        PeerMessage::Accepted(accepted) => format!("accepted term {}, up to {}", accepted.term, accepted.last),
    }
}
