//! Backups: what is exported is imported as it was, and goes on as if nothing had happened.

use std::sync::Arc;

use api::Error;
use api::auth::{AuthEnableRequest, AuthRoleAddRequest, AuthUserAddRequest, AuthUserGrantRoleRequest};
use api::codec::{Action, DowngradeInfo, MemberChange, MemberChangeKind, Operation, encode_entry, encode_operation};
use api::kv::*;
use metastore_mvcc::backup::{Export, ImportError, Imported, Scratch, import, status};
use metastore_mvcc::keys::FAMILIES;
use metastore_mvcc::machine::Command;
use metastore_mvcc::{Committed, CompactionProgress, Failure, Machine, Options};
use proptest::prelude::*;
use storage::bbolt::{Reader, Writer};
use storage::{Engine, MemoryEngine, RocksEngine, RocksOptions};

struct Store<E: Engine> {
    engine: Arc<E>,
    machine: Machine<E>,
}

impl<E: Engine> Store<E> {
    fn open(engine: Arc<E>) -> Self {
        Store {
            machine: Machine::open(engine.clone(), &Options::default()).expect("opens"),
            engine,
        }
    }

    /// Applies an operation; refusals are part of the game.
    fn apply(&mut self, action: Action) -> bool {
        let (index, term) = self.machine.applied();
        let operation = encode_operation(&Operation::new(1, action.clone()));
        let command = match action {
            Action::MemberChange(_) => Command::MemberChange(operation),
            _ => Command::Operations(encode_entry([&operation[..]].into_iter()).into()),
        };
        let entry = Committed {
            index: index + 1,
            term: term.max(1),
            command,
        };
        let applied = self.machine.apply(&[entry]).expect("applies");
        applied.replies[0].result.is_ok()
    }

    fn put(&mut self, key: &str, value: &str, lease: i64) {
        self.apply(Action::Put(PutRequest {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            lease,
            ..Default::default()
        }));
    }

    fn delete(&mut self, key: &str) {
        self.apply(Action::DeleteRange(DeleteRangeRequest {
            key: key.to_owned().into(),
            ..Default::default()
        }));
    }

    fn compact(&mut self, revision: i64) {
        self.apply(Action::Compact(CompactionRequest {
            revision,
            physical: false,
        }));
    }

    fn compact_steps(&mut self, steps: usize) {
        for _ in 0..steps {
            if !matches!(self.machine.compact_step(3), Ok(CompactionProgress::Going { .. })) {
                break;
            }
        }
    }

    fn export(&self, with_values: bool) -> Vec<u8> {
        let dir = tempfile::tempdir().expect("a directory");
        let scratch = Scratch {
            dir: dir.path().to_owned(),
            bytes_max: 1 << 30,
            with_values,
        };
        let view = self.engine.view();
        let export = Export::prepare(&view, &scratch).expect("prepares");
        let mut file = Vec::new();
        export.write(&mut file).expect("writes");
        assert_eq!(file.len() as u64, export.bytes());
        file
    }

    /// Everything that a client can see.
    fn seen(&self) -> Vec<String> {
        let reader = self.machine.reader();
        let (revision, compacted) = (reader.revision(), reader.compacted());
        let mut seen = vec![format!(
            "{revision} {compacted} {} {} {}",
            reader.keys(),
            reader.key_bytes(),
            reader.digest()
        )];
        for at in compacted.max(0)..=revision {
            let request = RangeRequest {
                key: vec![0].into(),
                range_end: vec![0].into(),
                revision: at,
                ..Default::default()
            };
            let mut answer = reader.range(&request).expect("is there");
            answer.header = None;
            seen.push(format!("{at} {answer:?}"));
            match reader.hash_kv(at) {
                Ok(hash) => seen.push(format!("{at} {} {}", hash.hash, hash.compact_revision)),
                Err(Failure::Refused(Error::Compacted)) => seen.push(format!("{at} compacted")),
                Err(error) => panic!("{error}"),
            }
        }
        let mut leases: Vec<_> = self.machine.leases().map(|lease| format!("{lease:?}")).collect();
        leases.sort();
        for id in 1..10 {
            leases.push(format!("{:?}", reader.attached_keys(id).ok()));
        }
        seen.extend(leases);
        seen.push(format!("{:?}", reader.alarms()));
        seen
    }
}

fn memory(dir: &std::path::Path) -> Arc<MemoryEngine> {
    Arc::new(MemoryEngine::open(dir, FAMILIES).expect("opens"))
}

fn import_into<E: Engine>(file: &[u8], engine: Arc<E>, bump: u64) -> Result<(Store<E>, Imported), ImportError> {
    let reader = Reader::open(file)?;
    let imported = import(&reader, &*engine, bump, &mut |_| {})?;
    Ok((Store::open(engine), imported))
}

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u16, i64),
    Delete(u8),
    DeleteAll,
    Txn(Vec<(u8, bool)>),
    Grant(i64),
    Revoke(i64),
    /// So many revisions before the newest.
    Compact(u8),
    CompactSteps(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..12u8, 0..60u16, 0..6i64).prop_map(|(key, length, lease)| Step::Put(key, length, lease)),
        1 => (0..12u8).prop_map(|key| Step::Put(key, 20_000, 0)),
        3 => (0..12u8).prop_map(Step::Delete),
        1 => Just(Step::DeleteAll),
        2 => prop::collection::vec((0..12u8, any::<bool>()), 1..5).prop_map(Step::Txn),
        2 => (1..6i64).prop_map(Step::Grant),
        1 => (1..6i64).prop_map(Step::Revoke),
        1 => (0..9u8).prop_map(Step::Compact),
        2 => (0..20u8).prop_map(Step::CompactSteps),
    ]
}

fn run<E: Engine>(store: &mut Store<E>, step: &Step) {
    let key = |key: u8| format!("key{key}");
    match step {
        Step::Put(number, length, lease) => {
            store.put(&key(*number), &"v".repeat(usize::from(*length)), *lease);
        }
        Step::Delete(number) => store.delete(&key(*number)),
        Step::DeleteAll => {
            store.apply(Action::DeleteRange(DeleteRangeRequest {
                key: vec![0].into(),
                range_end: vec![0].into(),
                ..Default::default()
            }));
        }
        Step::Txn(changes) => {
            let mut changes = changes.clone();
            changes.sort();
            changes.dedup_by_key(|change| change.0);
            let success = changes.iter().map(|&(number, put)| RequestOp {
                request: Some(if put {
                    RequestOpKind::Put(PutRequest {
                        key: key(number).into(),
                        value: "txn".into(),
                        ..Default::default()
                    })
                } else {
                    RequestOpKind::DeleteRange(DeleteRangeRequest {
                        key: key(number).into(),
                        ..Default::default()
                    })
                }),
            });
            store.apply(Action::Txn(TxnRequest {
                success: success.collect(),
                ..Default::default()
            }));
        }
        Step::Grant(id) => {
            store.apply(Action::LeaseGrant(LeaseGrantRequest { id: *id, ttl: 60 + id }));
        }
        Step::Revoke(id) => {
            store.apply(Action::LeaseRevoke(LeaseRevokeRequest { id: *id }));
        }
        Step::Compact(back) => {
            let revision = store.machine.reader().revision() - i64::from(*back);
            store.compact(revision);
        }
        Step::CompactSteps(steps) => store.compact_steps(usize::from(*steps)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_restored_store_is_the_same_and_goes_on_alike(
        before in prop::collection::vec(step(), 0..60),
        after in prop::collection::vec(step(), 0..40),
        with_values in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut original = Store::open(memory(&dir.path().join("a")));
        for step in &before {
            run(&mut original, step);
        }
        let file = original.export(with_values);
        let (mut restored, imported) = import_into(&file, memory(&dir.path().join("b")), 0).unwrap();
        prop_assert_eq!(original.seen(), restored.seen());
        prop_assert_eq!(imported.keys, original.machine.reader().keys());

        let told = status(&Reader::open(&file[..]).unwrap(), &mut |_| {}).unwrap();
        prop_assert_eq!(told.keys, imported.keys);
        let scratch = Scratch { dir: dir.path().to_owned(), bytes_max: 0, with_values };
        let (_, revision) = Export::hash(&original.engine.view(), &scratch).unwrap();
        prop_assert_eq!(revision, imported.revision);

        for step in &after {
            run(&mut original, step);
            run(&mut restored, step);
        }
        prop_assert_eq!(original.seen(), restored.seen());
        // And once more, whatever compaction has got round to here and not there.
        restored.compact_steps(1000);
        let file = restored.export(!with_values);
        let (again, _) = import_into(&file, memory(&dir.path().join("c")), 0).unwrap();
        prop_assert_eq!(original.seen(), again.seen());
    }

    #[test]
    fn bumping_the_revision_hides_all_history(steps in prop::collection::vec(step(), 0..60), bump in 1..1000u64) {
        let dir = tempfile::tempdir().unwrap();
        let mut original = Store::open(memory(&dir.path().join("a")));
        for step in &steps {
            run(&mut original, step);
        }
        let (mut restored, imported) = import_into(&original.export(true), memory(&dir.path().join("b")), bump).unwrap();
        let (old, new) = (original.machine.reader(), restored.machine.reader());
        let last = old.revision();
        prop_assert!(imported.revision > last || last == 1, "{} after {last}", imported.revision);
        prop_assert_eq!(new.compacted(), imported.revision);
        prop_assert_eq!(old.digest(), new.digest());
        prop_assert_eq!(old.keys(), new.keys());
        restored.put("new", "value", 0);
        prop_assert_eq!(restored.machine.reader().revision(), imported.revision + 1);
    }
}

/// Everything that is not a key, in the places where etcd looks for it.
#[test]
fn buckets_hold_what_etcd_puts_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(memory(dir.path()));
    for (id, is_learner) in [(0xa1, false), (0xb2, true), (0xc3, false)] {
        let change = MemberChange {
            kind: MemberChangeKind::Add.into(),
            member: Some(Member {
                id,
                name: format!("m{id:x}"),
                peer_urls: vec![format!("http://{id:x}:1")],
                client_urls: vec!["http://c".to_owned()],
                is_learner,
            }),
        };
        assert!(store.apply(Action::MemberChange(change)));
    }
    let removed = MemberChange {
        kind: MemberChangeKind::Remove.into(),
        member: Some(Member {
            id: 0xc3,
            ..Default::default()
        }),
    };
    assert!(store.apply(Action::MemberChange(removed)));
    store.apply(Action::LeaseGrant(LeaseGrantRequest { id: 7, ttl: 60 }));
    store.apply(Action::LeaseGrant(LeaseGrantRequest { id: -1, ttl: 61 }));
    store.put("a", "1", 0);
    store.delete("a");
    store.compact(3);
    store.apply(Action::Alarm(AlarmRequest {
        action: AlarmAction::Activate.into(),
        member_id: 0xa1,
        alarm: AlarmType::Nospace.into(),
    }));

    let file = store.export(true);
    let reader = Reader::open(&file[..]).unwrap();
    let mut found = Vec::new();
    for bucket in reader.buckets().unwrap() {
        let mut entries = reader.entries(&bucket).unwrap();
        let name = String::from_utf8_lossy(&bucket.name).into_owned();
        let before = found.len();
        while let Some((key, value)) = entries.next().unwrap() {
            found.push(format!("{name} {} = {}", key.escape_ascii(), value.escape_ascii()));
        }
        if found.len() == before {
            found.push(name);
        }
    }
    assert_eq!(
        found,
        [
            r"alarm \x08\xa1\x01\x10\x01 = ",
            "auth",
            "authRoles",
            "authUsers",
            "cluster clusterVersion = 3.7.0",
            r"key \x00\x00\x00\x00\x00\x00\x00\x03_\x00\x00\x00\x00\x00\x00\x00\x00t = \n\x01a",
            r"lease \x00\x00\x00\x00\x00\x00\x00\x07 = \x08\x07\x10<",
            r"lease \xff\xff\xff\xff\xff\xff\xff\xff = \x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x10=",
            r#"members a1 = {\"clientURLs\":[\"http://c\"],\"id\":161,\"name\":\"ma1\",\"peerURLs\":[\"http://a1:1\"]}"#,
            r#"members b2 = {\"clientURLs\":[\"http://c\"],\"id\":178,\"isLearner\":true,\"name\":\"mb2\",\"peerURLs\":[\"http://b2:1\"]}"#,
            "members_removed c3 = removed",
            r#"meta confState = {\"auto_leave\":false,\"learners\":[178],\"voters\":[161]}"#,
            r"meta consistent_index = \x00\x00\x00\x00\x00\x00\x00\n",
            r"meta finishedCompactRev = \x00\x00\x00\x00\x00\x00\x00\x03_\x00\x00\x00\x00\x00\x00\x00\x00",
            r"meta scheduledCompactRev = \x00\x00\x00\x00\x00\x00\x00\x03_\x00\x00\x00\x00\x00\x00\x00\x00",
            "meta storageVersion = 3.7.0",
            r"meta term = \x00\x00\x00\x00\x00\x00\x00\x01",
        ]
    );
}

type Entries<'a> = &'a [(&'a [u8], &'a [u8])];

/// A database with these entries in its buckets `key` and `meta`, and a lease or so.
fn database(buckets: &[(&str, Entries<'_>)]) -> Vec<u8> {
    let fill = |mut writer: Writer<&mut Vec<u8>>| {
        for (name, entries) in buckets {
            writer.bucket(name).unwrap();
            for (key, value) in *entries {
                writer.put(key, value).unwrap();
            }
        }
        writer.finish().unwrap()
    };
    let shape = fill(Writer::measuring());
    let mut file = Vec::new();
    fill(Writer::new(&mut file, shape).unwrap());
    file
}

#[test]
fn what_is_not_of_etcd_is_refused_in_one_line() {
    let at = |main: u8| [&[0; 7][..], &[main, b'_'], &[0; 8]].concat();
    let tombstone = |main: u8| [&at(main)[..], b"t"].concat();
    // Key a, created and changed at revision 2.
    let put = b"\x0a\x01a\x10\x02\x18\x02\x20\x01";
    for (file, expected) in [
        (database(&[("meta", &[])]), "has no bucket \"key\""),
        (database(&[("key", &[])]), "has no bucket \"meta\""),
        (
            database(&[("key", &[]), ("meta", &[(b"storageVersion", b"3.8.0")])]),
            "storage version is 3.8.0",
        ),
        (
            database(&[("key", &[]), ("meta", &[(b"storageVersion", b"new")])]),
            "which is none",
        ),
        (
            database(&[("key", &[]), ("meta", &[(b"scheduledCompactRev", b"x")])]),
            "compacted revision that is none",
        ),
        (database(&[("key", &[(b"k", b"v")]), ("meta", &[])]), "no revision"),
        (
            database(&[("key", &[(&at(2), b"\xff")]), ("meta", &[])]),
            "no key and value",
        ),
        (
            database(&[("key", &[(&at(2), b"\x12\x01b")]), ("meta", &[])]),
            "no key and value",
        ),
        (
            database(&[("key", &[(&at(2), b"\x10\x02\x18\x02\x20\x01")]), ("meta", &[])]),
            "without a name",
        ),
        (
            database(&[("key", &[(&at(3), put)]), ("meta", &[])]),
            "says otherwise of itself",
        ),
        (
            database(&[("key", &[(&tombstone(3), b"\x0a\x01a")]), ("meta", &[])]),
            "deletes what is not there",
        ),
        (
            database(&[("key", &[]), ("lease", &[(b"12345678", b"\x08\x07")]), ("meta", &[])]),
            "in the place of another one",
        ),
        (
            database(&[("alarm", &[(b"\xff", b"")]), ("key", &[]), ("meta", &[])]),
            "no alarm",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let Err(error) = import_into(&file, memory(dir.path()), 0).map(|(_, imported)| imported) else {
            panic!("{expected}: it was imported");
        };
        let text = error.to_string();
        assert!(
            text.contains(expected) && !text.contains('\n'),
            "{text:?}, not {expected:?}"
        );
    }
    // What etcdutl leaves behind when it bumps revisions is no error, and no key.
    let bumped = database(&[
        ("key", &[(&at(2), put), (&at(9), b"")]),
        ("meta", &[(b"scheduledCompactRev", &at(9))]),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let (store, imported) = import_into(&bumped, memory(dir.path()), 0).unwrap();
    assert_eq!((imported.revision, imported.compacted, imported.keys), (9, 9, 1));
    assert_eq!(store.machine.reader().revision(), 9);
}

/// What a quota is held against grows with every version and shrinks with compaction, also over a restart.
#[test]
fn the_size_of_the_data_follows_compaction() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(memory(dir.path()));
    let bytes = |store: &Store<MemoryEngine>| store.machine.reader().data_bytes();
    let empty = bytes(&store);
    assert_eq!(empty, 5 * 4096);
    for _ in 0..100 {
        store.put("k", &"v".repeat(4000), 0);
    }
    let full = bytes(&store);
    assert!((400_000..500_000).contains(&full), "{full}");
    let mut store = Store::open(store.engine);
    assert_eq!(bytes(&store), full);
    let revision = store.machine.reader().revision();
    store.compact(revision);
    store.put("k", &"v".repeat(4000), 0);
    store.compact_steps(1000);
    let compacted = bytes(&store);
    assert!((empty + 4096..empty + 5 * 4096).contains(&compacted), "{compacted}");
    let store = Store::open(store.engine);
    assert_eq!(bytes(&store), compacted);
    let (restored, _) = import_into(&store.export(true), memory(&dir.path().join("b")), 0).unwrap();
    let restored = bytes(&restored);
    assert!(restored.abs_diff(compacted) <= 4096, "{restored} and {compacted}");
}

/// Users and roles, and that they are in force.
#[test]
fn users_and_roles_are_restored() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(memory(&dir.path().join("a")));
    let user = |name: &str| {
        Action::AuthUserAdd(AuthUserAddRequest {
            name: name.to_owned(),
            hashed_password: "aGFzaA==".to_owned(),
            ..Default::default()
        })
    };
    let grant = |user: &str, role: &str| {
        Action::AuthUserGrantRole(AuthUserGrantRoleRequest {
            user: user.to_owned(),
            role: role.to_owned(),
        })
    };
    let role = |name: &str| Action::AuthRoleAdd(AuthRoleAddRequest { name: name.to_owned() });
    for action in [
        user("root"),
        user("other"),
        role("root"),
        role("reads"),
        grant("root", "root"),
        grant("other", "reads"),
        Action::AuthEnable(AuthEnableRequest {}),
    ] {
        assert!(store.apply(action.clone()), "{action:?}");
    }
    let file = store.export(true);
    let (restored, imported) = import_into(&file, memory(&dir.path().join("b")), 0).unwrap();
    assert_eq!(imported.auth, 4);
    assert_eq!(store.seen(), restored.seen());
    assert!(restored.machine.reader().auth().is_enabled());
    // Byte for byte, but for what says how far the member is.
    let other = restored.export(true);
    let entries = |file: &[u8]| {
        let reader = Reader::open(file).unwrap();
        let mut found = Vec::new();
        for bucket in reader
            .buckets()
            .unwrap()
            .iter()
            .filter(|bucket| bucket.name.starts_with(b"auth"))
        {
            let mut entries = reader.entries(bucket).unwrap();
            while let Some((key, value)) = entries.next().unwrap() {
                found.push((bucket.name.clone(), key.to_vec(), value.to_vec()));
            }
        }
        found
    };
    assert_eq!(entries(&file), entries(&other));
    assert_eq!(entries(&file).len(), 6);
}

#[test]
fn a_downgrade_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(memory(dir.path()));
    let info = DowngradeInfo {
        enabled: true,
        version: "3.6.0".to_owned(),
    };
    assert!(store.apply(Action::Downgrade(info.clone())));
    assert_eq!(*store.machine.reader().downgrade(), info);
    let store = Store::open(store.engine);
    assert_eq!(*store.machine.reader().downgrade(), info);
}

/// More than is sorted in memory, on the engine that has it on disk.
#[test]
fn large_stores_are_sorted_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let engine = |name: &str| {
        let options = RocksOptions::default();
        Arc::new(RocksEngine::open(&dir.path().join(name), FAMILIES, &options).expect("opens"))
    };
    let mut store = Store::open(engine("a"));
    let value = "v".repeat(15_000);
    for number in 0..6000u32 {
        // In another order than that of the keys.
        store.put(
            &format!("{:08x}", number.wrapping_mul(0x9e37_79b1)),
            &value[number as usize % 100..],
            0,
        );
    }
    let revision = store.machine.reader().revision();
    store.compact(revision - 10);
    store.compact_steps(10_000);
    let by_value = store.export(true);
    assert!(by_value == store.export(false), "wherever the values are meanwhile");
    let (restored, imported) = import_into(&by_value, engine("b"), 0).unwrap();
    assert_eq!((imported.keys, imported.revision), (6000, revision));
    let hash = |store: &Store<RocksEngine>| store.machine.reader().hash_kv(0).unwrap().hash;
    assert_eq!(hash(&store), hash(&restored));
    let scratch = Scratch {
        dir: dir.path().to_owned(),
        bytes_max: 1000,
        with_values: true,
    };
    assert!(
        Export::prepare(&store.engine.view(), &scratch).is_ok(),
        "keys alone fit into memory"
    );
}
