//! What happened, as a hash that is the same on every run of a seed, as a timeline for people, and as marks that say
//! which rare states were reached.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Display;

use crate::Micros;

/// Lines of the timeline that are kept.
const LINES_MAX: usize = 20_000;

/// Every mark there is. One that many seeds never reach is a gap in the simulator.
pub const MARKS: &[&str] = &[
    "all crash at once",
    "asked with auth on",
    "change of members refused",
    "checkpoint taken back",
    "client gave up",
    "clock jumped",
    "crash in the middle of an install",
    "crash right after a promise",
    "damage met while running",
    "damaged log refused",
    "disk damaged",
    "disk error",
    "disk lost",
    "entries dropped by an install",
    "leader change during a change of members",
    "leader change during compaction",
    "leader change with leases",
    "leader change with requests under way",
    "leader cut off right after a promise to a lease",
    "leader paused",
    "leader removes itself",
    "leader steps down in its own term",
    "leadership handed over",
    "learner promoted",
    "lease ended",
    "lease ended at a hand-over",
    "lease ended soon after a leader change",
    "lease kept alive",
    "lease's end proposed again by the same leader",
    "left as the only voter with a slow disk",
    "member in quarantine",
    "old blocks",
    "old blocks refused",
    "operation's entry dropped by an install",
    "permission denied",
    "read answered with a disk error",
    "read error",
    "read index across leaders",
    "reads without asking anybody",
    "refused to start",
    "refused while the state is in doubt",
    "removed member stopped",
    "serializable read of the past",
    "snapshot installed",
    "snapshot installed with requests under way",
    "snapshot of no use",
    "snapshot replaced before it was sent",
    "snapshot sent",
    "snapshot sent during a change of members",
    "snapshot sent during compaction",
    "snapshot transfer broke off",
    "stalled log",
    "stopped by a disk error",
    "stopped in good order",
    "the last one applies nothing for a while",
    "the last one crashes when the others have gone",
    "torn log tail",
    "users changed while a request was under way",
    "watch compacted away",
    "watch events",
    "watch progress",
    "watch resumed",
    "watch resumed at a member that lags",
];

/// How much of what happens goes into the timeline.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Detail {
    /// Nothing: the fastest.
    #[default]
    Nothing,
    /// What explains something.
    Story,
    /// Heartbeats as well.
    Everything,
}

/// The trace of one run.
#[derive(Default)]
pub struct Trace {
    hash: u64,
    events: u64,
    detail: Detail,
    lines: VecDeque<String>,
    marks: BTreeMap<&'static str, u64>,
}

impl Trace {
    /// A trace that keeps a timeline of so much detail.
    pub fn new(detail: Detail) -> Self {
        Trace {
            detail,
            hash: 0xcbf2_9ce4_8422_2325,
            ..Default::default()
        }
    }

    /// Adds something that happened to the hash.
    pub fn mix(&mut self, numbers: &[u64]) {
        self.events += 1;
        for number in numbers {
            self.hash = (self.hash ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// How much was mixed in.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Adds bytes to the hash.
    pub fn mix_bytes(&mut self, bytes: &[u8]) {
        let chunks = bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_le_bytes(word)
        });
        for word in chunks {
            self.hash = (self.hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
    }

    /// Adds a line that hardly ever explains anything.
    pub fn noise<T: Display>(&mut self, now: Micros, text: impl FnOnce() -> T) {
        if self.detail == Detail::Everything {
            self.line(now, text);
        }
    }

    /// Adds a line to the timeline.
    pub fn line<T: Display>(&mut self, now: Micros, text: impl FnOnce() -> T) {
        if self.detail != Detail::Nothing {
            if self.lines.len() == LINES_MAX {
                self.lines.pop_front();
            }
            self.lines
                .push_back(format!("{:>4}.{:06} {}", now / 1_000_000, now % 1_000_000, text()));
        }
    }

    /// The timeline.
    pub fn take_lines(&mut self) -> Vec<String> {
        std::mem::take(&mut self.lines).into()
    }

    /// Notes that a rare state was reached.
    pub fn mark(&mut self, name: &'static str) {
        debug_assert!(MARKS.contains(&name), "the mark {name} is not in the list");
        *self.marks.entry(name).or_default() += 1;
    }

    /// The marks reached, and how often.
    pub fn marks(&self) -> &BTreeMap<&'static str, u64> {
        &self.marks
    }
}
