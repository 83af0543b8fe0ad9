//! The hot paths, each once and small, for counting instructions: `make bench-check`.
//!
//! Time depends on the machine and on whatever else it does, instructions hardly do. `guard CASE` sets a case up and
//! runs it inside [`measured`], the one function in which callgrind is told to count. Without a case it lists them.

#![allow(clippy::print_stdout, reason = "it lists its cases")]

use std::hint::black_box;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use api::codec::{Action, Operation, decode_entry, encode_entry, encode_operation};
use api::kv::{PutRequest, RangeRequest};
use api::store::{WatchCreate, WatchOutput, WatchStream};
use bytes::{Bytes, BytesMut};
use metastore_sim::log::SimLog;
use mvcc::machine::Command;
use mvcc::{Committed, Machine, Membership, keys};
use prost::Message;
use replica::{Config, Effect, Input, Proposal, Replica};
use storage::{RaftLog, RocksEngine, RocksOptions};

const CASES: [(&str, fn()); 6] = [
    ("encode", encode),
    ("batch", batch),
    ("apply", apply),
    ("get", get),
    ("range", range),
    ("fanout", fanout),
];

/// Callgrind counts in here, and nowhere else.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    work();
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    for (name, case) in CASES {
        if wanted.is_empty() {
            println!("{name}");
        } else if wanted.iter().any(|wanted| wanted == name) {
            case();
        }
    }
}

fn put(number: u64) -> Operation {
    let put = PutRequest {
        key: format!("/registry/things/default/thing-{number:08}").into(),
        value: vec![number as u8; 256].into(),
        ..Default::default()
    };
    Operation::new(number + 1, Action::Put(put))
}

fn entry(operations: &[Operation]) -> Bytes {
    let encoded: Vec<Bytes> = operations.iter().map(encode_operation).collect();
    encode_entry(encoded.iter().map(|bytes| &bytes[..])).into()
}

/// A thousand puts encoded each, put into ten entries, and decoded again.
fn encode() {
    let operations: Vec<Operation> = (0..1000).map(put).collect();
    measured(&mut || {
        for some in operations.chunks(100) {
            let entry = entry(black_box(some));
            black_box(decode_entry(&entry).expect("ours"));
        }
    });
}

/// A lone member takes a thousand proposals, sixteen at a time, through its log to apply.
fn batch() {
    let log = Arc::new(SimLog::bootstrapped(Vec::new(), Default::default()));
    let member = api::kv::Member {
        id: 7,
        ..Default::default()
    };
    let alone = Membership {
        members: vec![member],
        removed: Vec::new(),
    };
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    let mut replica = Replica::open(Config::new(7), log.clone(), 0, &alone, &logger).expect("it opens");
    let mut run = |inputs: Vec<Input>| {
        let (mut inputs, mut effects) = (inputs, Vec::new());
        while !inputs.is_empty() {
            replica.step(inputs.drain(..), &mut effects).expect("nothing is broken");
            for effect in effects.drain(..) {
                match effect {
                    Effect::Append {
                        number,
                        entries,
                        hard_state,
                        ..
                    } => {
                        log.append(&entries, hard_state.as_ref(), true).expect("room");
                        log.sync();
                        inputs.push(Input::Persisted(number));
                    }
                    Effect::Apply(committed) => inputs.push(Input::Applied {
                        index: committed.last().expect("there is one").index,
                        member_changes: Vec::new(),
                    }),
                    _ => {}
                }
            }
        }
    };
    run(vec![Input::Campaign]);
    let proposals: Vec<(u64, Bytes)> = (0..1000)
        .map(|number| (number + 1, encode_operation(&put(number))))
        .collect();
    measured(&mut || {
        for some in proposals.chunks(16) {
            let propose = |(id, operation): &(u64, Bytes)| {
                Input::Propose(Proposal {
                    id: *id,
                    operation: operation.clone(),
                    leader_term: 0,
                })
            };
            run(some.iter().map(propose).collect());
        }
    });
}

/// A state machine over RocksDB with two thousand keys.
struct Store {
    machine: Machine<RocksEngine>,
    index: u64,
    _dir: tempfile::TempDir,
}

impl Store {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let engine = RocksEngine::open(dir.path(), keys::FAMILIES, &RocksOptions::default()).expect("it opens");
        let mut store = Store {
            machine: Machine::open(Arc::new(engine), &mvcc::Options::default()).expect("it opens"),
            index: 0,
            _dir: dir,
        };
        let all: Vec<Operation> = (0..2000).map(put).collect();
        for some in all.chunks(100) {
            store.apply(entry(some));
        }
        store
    }

    fn apply(&mut self, data: Bytes) {
        self.index += 1;
        let committed = Committed {
            index: self.index,
            term: 1,
            command: Command::Operations(data),
        };
        black_box(self.machine.apply(&[committed]).expect("it works"));
    }
}

/// A thousand puts over keys that are there, in ten entries, each one engine write.
fn apply() {
    let mut store = Store::new();
    let entries: Vec<Bytes> = (0..10)
        .map(|part| entry(&(0..100).map(|number| put(part * 150 + number)).collect::<Vec<_>>()))
        .collect();
    measured(&mut || entries.iter().for_each(|entry| store.apply(entry.clone())));
}

/// A thousand reads of one key each.
fn get() {
    let store = Store::new();
    let reader = store.machine.reader();
    let requests: Vec<RangeRequest> = (0..1000)
        .map(|number| RangeRequest {
            key: format!("/registry/things/default/thing-{:08}", number * 7 % 2000).into(),
            ..Default::default()
        })
        .collect();
    measured(&mut || {
        for request in &requests {
            black_box(reader.range(request).expect("it reads"));
        }
    });
}

/// All two thousand keys in one answer, encoded.
fn range() {
    let store = Store::new();
    let reader = store.machine.reader();
    let request = RangeRequest {
        key: "/registry/".into(),
        range_end: "/registry0".into(),
        ..Default::default()
    };
    measured(&mut || {
        let response = reader.range(&request).expect("it reads");
        black_box(response.encode_to_vec());
    });
}

/// Ten puts, seen by a thousand watchers of their prefix on eight streams, each event encoded for each of them.
fn fanout() {
    let mut store = Store::new();
    let hub = store.machine.hub().clone();
    let mut streams: Vec<_> = (0..8).map(|_| hub.stream()).collect();
    for watcher in 0..1000 {
        let create = WatchCreate {
            key: "/registry/".into(),
            range_end: "/registry0".into(),
            ..Default::default()
        };
        streams[watcher % 8].create(create).expect("a range");
    }
    let entries: Vec<Bytes> = (0..10).map(|number| entry(&[put(number)])).collect();
    let mut seen = 0;
    measured(&mut || {
        let context = &mut Context::from_waker(Waker::noop());
        let mut buffer = BytesMut::new();
        for entry in &entries {
            store.apply(entry.clone());
            for stream in &mut streams {
                while let Poll::Ready(output) = stream.poll_next(context) {
                    let WatchOutput::Events { events, .. } = output else {
                        panic!("nothing but events was asked for")
                    };
                    buffer.clear();
                    buffer.extend_from_slice(events.encoded());
                    black_box(&buffer);
                    seen += 1;
                }
            }
        }
    });
    assert_eq!(seen, 10_000, "every watcher sees every event");
}
