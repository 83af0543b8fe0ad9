//! How members talk to each other.
//!
//! | Connection | Opened by | Carries |
//! |---|---|---|
//! | RAFT | each member to each other one, at once | Raft's messages, one way; many in a frame, one write for all that wait |
//! | CALL | who has something to ask, when it does | requests and answers, many at once |
//! | SNAPSHOT | who sends one | one snapshot, in chunks; goes on over another connection after a break |
//!
//! They are apart so that a snapshot never holds up a heartbeat, and an answer never waits behind entries. What they
//! carry is opaque here. The bytes are described in `wire`.
//!
//! What bounds it: messages wait in a queue per peer, bounded in bytes and number, and are dropped when it is full, for
//! Raft repeats what matters; calls are bounded in number and bytes for each peer; of a snapshot a few chunks are in
//! memory; frames are bounded in bytes, handshakes in bytes and time, connections in number.
//!
//! Nobody is believed to be a member for saying so: TLS and the node's [`Handler::admit`] decide.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Handle;

mod accept;
mod address;
mod call_in;
mod call_out;
mod counters;
mod dial;
mod frame;
mod handler;
mod incoming;
mod queue;
mod raft_frame;
mod raft_in;
mod raft_out;
mod settings;
mod shared;
mod snapshot;
mod snapshot_in;
mod snapshot_out;
mod stream;
mod tasks;
#[cfg(test)]
mod tests;
mod version;
mod wire;

pub(crate) use address::Listener;
pub(crate) use address::{PeerUrl, SocketOptions, UrlError};
pub(crate) use call_out::CallError;
pub(crate) use counters::PeerStats;
pub(crate) use handler::{BoxFuture, Caller, Handler, Introduction, Purpose, Refusal, RefuseReason};
pub(crate) use settings::Identity;
pub(crate) use settings::{Settings, Tls, TlsFactory, VerifyPeer};
pub(crate) use snapshot::{
    SnapshotError, SnapshotFault, SnapshotHeader, SnapshotSink, SnapshotSource, SnapshotSummary, SnapshotTransfer,
};
pub(crate) use version::check_join;

use shared::{PeerState, Shared, Target};

/// A member's id; 0 for none.
pub(crate) type MemberId = u64;

/// Another member, and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Its id.
    pub(crate) id: MemberId,
    /// Tried in turn, beginning with the one that worked last.
    pub(crate) urls: Vec<PeerUrl>,
}

/// A member's connections to all others. Dropping it stops everything without waiting.
pub(crate) struct Transport {
    shared: Arc<Shared>,
}

impl Transport {
    /// Begins to accept connections, on the threads of the runtime in which the listeners were bound. There are no peers
    /// yet.
    pub(crate) fn start(
        runtime: Handle,
        identity: Identity,
        settings: Settings,
        tls: Tls,
        listeners: Vec<Listener>,
        handler: Arc<dyn Handler>,
    ) -> Transport {
        let tasks = tasks::Tasks::new(runtime);
        let shared = Arc::new(Shared::new(identity, settings, tls, handler, tasks));
        for listener in listeners {
            tracing::info!(url = listener.local_url(), "serving peer traffic");
            for socket in listener.sockets {
                shared
                    .tasks
                    .spawn(accept::listen(shared.clone(), socket, listener.url.tls));
            }
        }
        Transport { shared }
    }

    /// Says who the other members are; ourselves in the list are ignored. Connections to those that are not in it any
    /// more are closed, and [`Handler::admit`] is asked again about every connection that others have opened.
    pub(crate) fn set_peers(&self, peers: Vec<Peer>) {
        let shared = &self.shared;
        let mut wanted: HashMap<MemberId, Vec<PeerUrl>> = peers.into_iter().map(|peer| (peer.id, peer.urls)).collect();
        wanted.remove(&shared.identity.member_id);
        wanted.remove(&MemberId::default());
        let mut added = Vec::new();
        {
            let mut peers = shared.peers.write();
            peers.retain(|id, peer| {
                let stays = wanted.contains_key(id);
                if !stays {
                    peer.target.send_modify(|target| target.gone = true);
                }
                stays
            });
            for (id, urls) in wanted {
                if let Some(peer) = peers.get(&id) {
                    peer.target.send_if_modified(|target| {
                        let changed = target.urls != urls;
                        *target = Target { urls, gone: false };
                        changed
                    });
                } else {
                    let peer = Arc::new(PeerState::new(id, urls, shared.counters(id), &shared.settings));
                    peers.insert(id, peer.clone());
                    added.push(peer);
                }
            }
        }
        for peer in added {
            shared.tasks.spawn(raft_out::run(shared.clone(), peer.clone()));
            shared.tasks.spawn(call_out::run(shared.clone(), peer));
        }
        shared.incoming.review(|who| shared.handler.admit(who));
        shared.forget_counters();
    }

    /// Queues Raft messages for a peer, from any thread, without waiting. Either all are queued, in order, or none: as
    /// the queue is full, or it is no peer. What is queued may still be lost, when the connection breaks.
    pub(crate) fn send(&self, to: MemberId, mut messages: Vec<Bytes>) -> bool {
        let Some(peer) = self.shared.peer(to) else {
            return false;
        };
        let message_max = self.shared.settings.frame_bytes_max - raft_frame::OVERHEAD;
        messages.retain(|message| {
            if message.len() > message_max {
                tracing::error!(
                    bytes = message.len(),
                    message_max,
                    "a Raft message is too long to be sent"
                );
                peer.counters.dropped_messages.add(1);
                peer.counters.dropped_bytes.add(message.len() as u64);
            }
            !message.is_empty() && message.len() <= message_max
        });
        let count = messages.len() as u64;
        let bytes: usize = messages.iter().map(Bytes::len).sum();
        let queued = peer.queue.push(messages);
        if !queued {
            peer.counters.dropped_messages.add(count);
            peer.counters.dropped_bytes.add(bytes as u64);
        }
        queued
    }

    /// Asks a peer. Dropping the future cancels the request, as far as it can be.
    ///
    /// # Errors
    /// They say whether the request can have been carried out.
    pub(crate) async fn call(&self, to: MemberId, request: Bytes, timeout: Duration) -> Result<Bytes, CallError> {
        let peer = self.shared.peer(to);
        let peer = peer.ok_or_else(|| CallError::NotSent(format!("{to:x} is not a peer")))?;
        call_out::check_length(&self.shared.settings, &request)?;
        peer.calls.call(request, timeout).await
    }

    /// Asks whoever is at a URL, over a connection of its own, without saying who we are; `cluster_id` may be 0.
    ///
    /// # Errors
    /// They say whether the request can have been carried out.
    pub(crate) async fn call_url(
        &self,
        url: &PeerUrl,
        cluster_id: u64,
        request: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let Shared {
            settings,
            tls,
            identity,
            ..
        } = &*self.shared;
        call_out::call_url(settings, tls, url, cluster_id, &identity.version, request, timeout).await
    }

    /// Begins to send a snapshot, from any thread. One at a time for each peer.
    pub(crate) fn send_snapshot(
        &self,
        to: MemberId,
        header: SnapshotHeader,
        source: Box<dyn SnapshotSource>,
    ) -> SnapshotTransfer {
        match self.shared.peer(to) {
            Some(peer) => snapshot_out::start(&self.shared, peer, header, source),
            None => SnapshotTransfer::failed(SnapshotError::NotPeer),
        }
    }

    /// Since when our RAFT connection to a peer works.
    pub(crate) fn active(&self, to: MemberId) -> Option<Instant> {
        self.shared.peer(to)?.standing.lock().active_since
    }

    /// How it stands with each peer, in the order of their ids.
    pub(crate) fn stats(&self) -> Vec<PeerStats> {
        let mut peers: Vec<_> = self.shared.peers.read().values().cloned().collect();
        peers.sort_by_key(|peer| peer.id);
        peers.iter().map(|peer| peer.stats()).collect()
    }

    /// Stops: what is queued is still sent, what is being answered is cut. `false` if something did not end in time; it
    /// is cut then, but for the threads of snapshots.
    pub(crate) async fn shutdown(&self, timeout: Duration) -> bool {
        let begun = Instant::now();
        let tasks_ended = self.shared.tasks.shutdown(timeout).await;
        self.shared.snapshots.clear();
        let rest = timeout.saturating_sub(begun.elapsed());
        let threads_ended = self.shared.tasks.join_threads(rest).await;
        tasks_ended && threads_ended
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.shared.tasks.stop();
    }
}

/// Asks whoever is at a URL, for a joiner that has no id, and so no [`Transport`], yet. `cluster_id` is 0 if it is not
/// known; `version` is our software's.
///
/// # Errors
/// They say whether the request can have been carried out.
pub(crate) async fn call_url(
    settings: &Settings,
    tls: &Tls,
    url: &PeerUrl,
    cluster_id: u64,
    version: &str,
    request: Bytes,
    timeout: Duration,
) -> Result<Bytes, CallError> {
    call_out::call_url(settings, tls, url, cluster_id, version, request, timeout).await
}
