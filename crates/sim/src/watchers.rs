//! Watchers: each follows a range through disconnections and crashes, and must see every change once, whole, in order.

use std::task::{Context, Poll, Waker};

use api::Revision;
use api::kv::{Event as Change, EventType};
use api::store::{WatchCreate, WatchOutput, WatchStream as _};
use bytes::Bytes;
use mvcc::Stream;

use crate::bugs::Bug;
use crate::engine::SimEngine;
use crate::history::violation;
use crate::world::{Event, World};
use crate::{MS, Micros};

/// A watcher.
pub struct Watcher {
    create: WatchCreate,
    /// The first revision that it has not seen.
    next: Revision,
    /// Its stream, where, and its id on it.
    stream: Option<Following>,
    /// Whether it was ever disconnected.
    resumes: bool,
}

struct Following {
    stream: Stream<SimEngine>,
    watch_id: i64,
    node: usize,
    life: u64,
}

impl World {
    /// Adds a watcher.
    pub(crate) fn add_watcher(&mut self) {
        let rng = &mut self.rng_clients;
        let (key, range_end): (Bytes, Bytes) = match rng.u8(..4) {
            0 => ("hot0".into(), Bytes::new()),
            1 => ("cold".into(), "cole".into()),
            2 => ("hot".into(), "hou".into()),
            _ => (Bytes::from_static(&[0]), Bytes::from_static(&[0])),
        };
        let next = if rng.bool() { 1 } else { 0 };
        self.watchers.push(Watcher {
            create: WatchCreate {
                key,
                range_end,
                no_put: rng.u8(..8) == 0,
                no_delete: rng.u8(..8) == 0,
                prev_kv: rng.bool(),
                progress_notify: rng.bool(),
                ..Default::default()
            },
            next,
            stream: None,
            resumes: false,
        });
        let at = self.rng_clients.u64(..5000 * MS);
        self.at(at, Event::Watch(self.watchers.len() - 1));
    }

    /// A watcher takes what there is for it.
    pub(crate) fn watch(&mut self, w: usize) {
        let pause: Micros = [MS, 50 * MS, 1000 * MS][self.rng_clients.usize(..3)];
        let pause = self.rng_clients.u64(1..pause * 2);
        self.at(self.now + pause, Event::Watch(w));
        let leaves = self.calm_since.is_none() && self.rng_clients.u8(..40) == 0;
        if let Some(following) = &self.watchers[w].stream
            && (leaves || !self.belongs(following.node) || !self.nodes[following.node].is_in(following.life))
        {
            let watcher = &mut self.watchers[w];
            watcher.stream = None;
            watcher.resumes = true;
        }
        if let Some(following) = &mut self.watchers[w].stream {
            match self.rng_clients.u8(..30) {
                0 => following.stream.request_progress(),
                1 => following.stream.notify_progress(),
                _ => {}
            }
        }
        if self.watchers[w].stream.is_none() {
            let node = self.rng_clients.usize(..self.nodes.len());
            if self.belongs(node) && self.nodes[node].process.is_some() && self.nodes[node].paused_until <= self.now {
                self.follow(w, node);
            }
            return;
        }
        let most = self.rng_clients.usize(1..20);
        self.take_outputs(w, most);
    }

    fn follow(&mut self, w: usize, node: usize) {
        let process = self.nodes[node].process.as_ref().expect("it runs");
        let watcher = &mut self.watchers[w];
        let mut stream = process.machine.hub().stream();
        let start_revision = match self.bug {
            Some(Bug::ResumeSkips) if watcher.resumes => watcher.next + 1,
            Some(Bug::ResumeRepeats) if watcher.resumes => watcher.next - 1,
            _ => watcher.next,
        };
        let create = WatchCreate {
            start_revision,
            ..watcher.create.clone()
        };
        let created = stream.create(create).expect("there is nothing wrong with it");
        if watcher.next == 0 {
            watcher.next = created.revision + 1;
        }
        if watcher.resumes {
            self.trace.mark("watch resumed");
        }
        if watcher.next > created.revision + 1 {
            self.trace.mark("watch resumed at a member that lags");
        }
        self.trace.line(self.now, || {
            format!("watcher {w} at {} from {}", node + 1, watcher.next)
        });
        watcher.stream = Some(Following {
            stream,
            watch_id: created.watch_id,
            node,
            life: process.life,
        });
    }

    fn take_outputs(&mut self, w: usize, most: usize) {
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..most {
            let Some(following) = &mut self.watchers[w].stream else {
                return;
            };
            if self.nodes[following.node].paused_until > self.now {
                return;
            }
            // "Pending" may mean that a piece of catching up found nothing, so the next call may find something.
            if let Poll::Ready(output) = following.stream.poll_next(&mut context) {
                if self.bug == Some(Bug::WatchLosesEvents) && self.rng_clients.u8(..20) == 0 {
                    continue;
                }
                self.take_output(w, output);
            }
        }
    }

    fn take_output(&mut self, w: usize, output: WatchOutput) {
        let (node, watch_id) = self.watchers[w]
            .stream
            .as_ref()
            .map(|following| (following.node, following.watch_id))
            .expect("it follows");
        let machine = &self.nodes[node].process.as_ref().expect("it runs").machine;
        let (compacted, readable) = (machine.reader().compacted(), machine.reader().revision());
        match output {
            WatchOutput::Events {
                watch_id: to, events, ..
            } => {
                let last = events
                    .last()
                    .and_then(|event| event.kv.as_ref())
                    .map(|kv| kv.mod_revision);
                let Some(last) = last.filter(|_| to == watch_id) else {
                    violation!("watcher {w} gets events without a key or for another watcher");
                };
                if last > readable {
                    violation!("watcher {w} at {} is told of {last} before it can be read", node + 1);
                }
                let expected = self.missing(w, last);
                if expected.len() != events.len() {
                    violation!("watcher {w} at {} gets {events:?} instead of {expected:?}", node + 1);
                }
                for (got, expected) in events.iter().zip(&expected) {
                    let revision = expected.kv.as_ref().map_or(0, |kv| kv.mod_revision);
                    let same = got.r#type == expected.r#type && got.kv == expected.kv;
                    let forgotten = revision <= compacted && got.prev_kv.is_none();
                    if !same || (got.prev_kv != expected.prev_kv && !forgotten) {
                        violation!("watcher {w} at {} gets {got:?} instead of {expected:?}", node + 1);
                    }
                }
                self.trace.mix(&[40, w as u64, last as u64]);
                self.trace.mark("watch events");
                self.watchers[w].next = last + 1;
            }
            WatchOutput::Progress { revision, .. } => {
                let missing = self.missing(w, revision);
                if !missing.is_empty() {
                    violation!("watcher {w} is told of progress up to {revision} before {missing:?}");
                }
                self.trace.mark("watch progress");
            }
            WatchOutput::Compacted { compact_revision, .. } => {
                let next = self.watchers[w].next;
                if compact_revision > self.history.model.seen.compacted || next >= compact_revision {
                    violation!("watcher {w}, which is at {next}, is told that {compact_revision} is compacted");
                }
                self.trace.mark("watch compacted away");
                self.watchers[w].next = compact_revision;
                self.watchers[w].stream = None;
            }
        }
    }

    /// What a watcher has not seen up to a revision.
    fn missing(&self, w: usize, to: Revision) -> Vec<Change> {
        let Watcher { create, next, .. } = &self.watchers[w];
        let mut events = self.history.model.events(&create.key, &create.range_end, *next, to);
        events.retain(|event| {
            let put = event.r#type == EventType::Put as i32;
            !(put && create.no_put || !put && create.no_delete)
        });
        if !create.prev_kv {
            events.iter_mut().for_each(|event| event.prev_kv = None);
        }
        events
    }

    /// A watcher that has not seen everything, if there is one.
    pub(crate) fn watcher_behind(&self) -> Option<String> {
        let newest = self.history.model.seen.revision;
        (0..self.watchers.len()).find_map(|w| {
            let missing = self.missing(w, newest).len();
            (missing > 0).then(|| format!("watcher {w} waits for {missing} events from {}", self.watchers[w].next))
        })
    }
}
