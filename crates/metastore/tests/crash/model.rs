//! What a store must hold after any writes: etcd's rules, as far as the workload uses them, in their plainest form.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hasher};

use etcd_client::KeyValue;

/// A value, known by its length and hash, so that what is remembered stays small.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Value {
    bytes: usize,
    hash: u64,
}

impl Value {
    pub(crate) fn of(bytes: &[u8]) -> Value {
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        Value {
            bytes: bytes.len(),
            hash: hasher.finish(),
        }
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}B#{:x}", self.bytes, self.hash)
    }
}

/// What a key holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) created: i64,
    pub(crate) modified: i64,
    pub(crate) version: i64,
    pub(crate) lease: i64,
    pub(crate) value: Value,
}

impl Record {
    pub(crate) fn of(kv: &KeyValue) -> Record {
        Record {
            created: kv.create_revision(),
            modified: kv.mod_revision(),
            version: kv.version(),
            lease: kv.lease(),
            value: Value::of(kv.value()),
        }
    }
}

/// The key of a pair. The workload writes nothing but text.
pub(crate) fn key_of(kv: &KeyValue) -> String {
    String::from_utf8_lossy(kv.key()).into_owned()
}

/// All keys at one revision.
pub(crate) type State = BTreeMap<String, Record>;

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) key: String,
    /// `None` for a deletion.
    pub(crate) record: Option<Record>,
    /// What the key held before.
    pub(crate) previous: Option<Record>,
}

impl Event {
    /// The same without what was before.
    pub(crate) fn alone(&self) -> (&str, Option<&Record>) {
        (&self.key, self.record.as_ref())
    }

    pub(crate) fn apply(&self, state: &mut State) {
        match &self.record {
            Some(record) => state.insert(self.key.clone(), record.clone()),
            None => state.remove(&self.key),
        };
    }
}

/// A part of a transaction.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Put {
        key: String,
        value: Value,
        lease: i64,
    },
    /// The keys from `start` up to, and without, `end`.
    Delete {
        start: String,
        end: String,
    },
    Txn(Branches),
}

/// A transaction: one of two lists of steps, by whether a key exists.
#[derive(Debug, Clone)]
pub(crate) struct Branches {
    /// `None`: always the first.
    pub(crate) if_exists: Option<String>,
    pub(crate) then: Vec<Step>,
    pub(crate) or_else: Vec<Step>,
}

impl Branches {
    /// What is done in any case.
    pub(crate) fn always(steps: Vec<Step>) -> Branches {
        Branches {
            if_exists: None,
            then: steps,
            or_else: Vec::new(),
        }
    }

    pub(crate) fn succeeds(&self, state: &State) -> bool {
        self.if_exists.as_ref().is_none_or(|key| state.contains_key(key))
    }

    fn collect(&self, state: &State, revision: i64, events: &mut Vec<Event>) {
        let steps = if self.succeeds(state) {
            &self.then
        } else {
            &self.or_else
        };
        for step in steps {
            match step {
                Step::Put { key, value, lease } => {
                    let previous = state.get(key).cloned();
                    let (created, version) = previous.as_ref().map_or((revision, 0), |it| (it.created, it.version));
                    let record = Record {
                        created,
                        modified: revision,
                        version: version + 1,
                        lease: *lease,
                        value: *value,
                    };
                    events.push(Event {
                        key: key.clone(),
                        record: Some(record),
                        previous,
                    });
                }
                Step::Delete { start, end } => {
                    let within = state.range(start.clone()..end.clone());
                    events.extend(within.map(|(key, record)| deletion(key, record)));
                }
                Step::Txn(inner) => inner.collect(state, revision, events),
            }
        }
    }
}

fn deletion(key: &str, record: &Record) -> Event {
    Event {
        key: key.to_owned(),
        record: None,
        previous: Some(record.clone()),
    }
}

/// The end of a lease: its keys go, sorted, in one revision.
pub(crate) fn lease_end(state: &State, lease: i64) -> Vec<Event> {
    let attached = state.iter().filter(|(_, record)| record.lease == lease);
    attached.map(|(key, record)| deletion(key, record)).collect()
}

/// Something that a client asked for and that changes keys.
#[derive(Debug, Clone)]
pub(crate) enum Action {
    Write(Branches),
    Revoke(i64),
}

impl Action {
    /// The events of this action, done on `state` as `revision`. The workload never writes one key twice in one action,
    /// so that no step depends on those before it.
    pub(crate) fn events(&self, state: &State, revision: i64) -> Vec<Event> {
        match self {
            Action::Write(branches) => {
                let mut events = Vec::new();
                branches.collect(state, revision, &mut events);
                events
            }
            Action::Revoke(lease) => lease_end(state, *lease),
        }
    }

    /// Which branch is taken.
    pub(crate) fn succeeds(&self, state: &State) -> bool {
        match self {
            Action::Write(branches) => branches.succeeds(state),
            Action::Revoke(_) => true,
        }
    }
}
