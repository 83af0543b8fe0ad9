//! Lists that are read page by page: whatever is remembered from one page to the next, the counts are exact.

use std::sync::Arc;

use api::codec::{Action, Operation, encode_entry, encode_operation};
use api::kv::{DeleteRangeRequest, PutRequest, RangeRequest};
use metastore_mvcc::keys::FAMILIES;
use metastore_mvcc::machine::Command;
use metastore_mvcc::{Committed, Machine, Options};
use storage::{Engine, MemoryEngine};

fn apply<E: Engine>(machine: &mut Machine<E>, action: Action) {
    let (index, term) = machine.applied();
    let operation = encode_operation(&Operation::new(1, action));
    let data = encode_entry([&operation[..]].into_iter()).into();
    let entry = Committed {
        index: index + 1,
        term: term.max(1),
        command: Command::Operations(data),
    };
    machine.apply(&[entry]).unwrap();
}

fn put<E: Engine>(machine: &mut Machine<E>, key: String) {
    apply(
        machine,
        Action::Put(PutRequest {
            key: key.into(),
            value: "v".into(),
            ..Default::default()
        }),
    );
}

#[test]
fn each_page_counts_what_is_left_at_its_revision() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::open(
        Arc::new(MemoryEngine::open(dir.path(), FAMILIES).unwrap()),
        &Options::default(),
    )
    .unwrap();
    for i in 0..100 {
        put(&mut machine, format!("k{i:03}"));
    }
    let reader = machine.reader();
    let revision = reader.revision();
    let (mut key, mut left, mut seen) = ("k".to_owned(), 100, 0);
    loop {
        let request = RangeRequest {
            key: key.clone().into(),
            range_end: "l".into(),
            limit: 7,
            revision,
            ..Default::default()
        };
        let page = reader.range(&request).unwrap();
        // A reader that remembers nothing says the same, and so does the same one asked again.
        assert_eq!(machine.reader().range(&request).unwrap(), page);
        assert_eq!(reader.range(&request).unwrap(), page);
        assert_eq!(page.count, left);
        assert_eq!(page.more, left > 7);
        seen += page.kvs.len();
        left -= page.kvs.len() as i64;
        let Some(last) = page.kvs.last().filter(|_| page.more) else {
            break;
        };
        key = format!("{}\0", String::from_utf8(last.key.to_vec()).unwrap());
        // Meanwhile the newest state changes: keys come and go before, within and after what is left.
        put(&mut machine, format!("k{:03}", 200 + seen));
        put(&mut machine, format!("k{:03}", 400 + seen));
        apply(
            &mut machine,
            Action::DeleteRange(DeleteRangeRequest {
                key: "k090".into(),
                ..Default::default()
            }),
        );
        // The same rest at the newest revision is another list.
        let newest = RangeRequest {
            revision: 0,
            key: key.clone().into(),
            ..request
        };
        assert_eq!(
            reader.range(&newest).unwrap().count,
            machine.reader().range(&newest).unwrap().count
        );
        assert_ne!(reader.range(&newest).unwrap().count, left);
        put(&mut machine, "k090".to_owned());
        put(&mut machine, format!("k{:03}", 300 + seen));
    }
    assert_eq!(seen, 100);
}

/// With a sort target but no order, etcd cuts before it sorts: what is left then is not what follows the last key.
#[test]
fn a_sorted_page_says_nothing_about_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::open(dir.path(), FAMILIES).unwrap());
    let mut machine = Machine::open(engine, &Options::default()).unwrap();
    for key in ["a", "a", "a", "b", "c", "d"] {
        put(&mut machine, key.to_owned());
    }
    let reader = machine.reader();
    let sorted = RangeRequest {
        key: "a".into(),
        range_end: "z".into(),
        limit: 1,
        sort_target: api::kv::SortTarget::Version as i32,
        ..Default::default()
    };
    assert_eq!(reader.range(&sorted).unwrap().kvs[0].key, "b");
    let next = RangeRequest {
        key: "b\0".into(),
        sort_target: 0,
        ..sorted
    };
    assert_eq!(reader.range(&next).unwrap().count, 2);
}
