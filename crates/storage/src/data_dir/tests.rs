use std::collections::BTreeMap;

use super::*;

fn identity(storage: StorageKind) -> Identity {
    Identity {
        storage,
        cluster_id: 0xcdf8_1819_4e3a_8c32,
        member_id: 7,
        created_by: "0.1.0".to_owned(),
    }
}

/// Every path below `dir` with its content.
fn picture(dir: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut picture = BTreeMap::new();
    let Ok(entries) = fs::read_dir(dir) else { return picture };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            picture.extend(self::picture(&path));
            picture.insert(path, None);
        } else {
            let bytes = fs::read(&path).unwrap();
            picture.insert(path, Some(bytes));
        }
    }
    picture
}

/// The refusal, after checking that it left everything as it was and that it says so in one line.
fn refused(root: &Path, path: &Path, raft: Option<&Path>, storage: StorageKind) -> DataDirError {
    let before = picture(root);
    let error = DataDir::open(path, raft, storage).unwrap_err();
    assert_eq!(picture(root), before, "{error}");
    let text = error.to_string();
    assert!(!text.contains('\n') && text.contains("; "), "{text}");
    error
}

#[test]
fn an_identity_is_kept() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("deep/er");
    for (round, storage) in [StorageKind::RocksDb, StorageKind::Memory].into_iter().enumerate() {
        let path = path.join(round.to_string());
        let mut dir = DataDir::open(&path, None, storage).unwrap();
        assert_eq!(dir.identity(), None);
        dir.initialize(identity(storage)).unwrap();
        assert_eq!(dir.identity(), Some(&identity(storage)));
        let engine = dir.engine_dir().unwrap();
        assert!(dir.raft_dir().is_dir() && engine.path.is_dir());
        assert_eq!(engine.path, path.join(storage.to_string()));
        assert_eq!(engine.snapshot, None);
        drop(dir);
        let mut dir = DataDir::open(&path, None, storage).unwrap();
        assert_eq!(dir.identity(), Some(&identity(storage)));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let mut other = identity(storage);
        other.cluster_id = 3;
        dir.replace_identity(other.clone()).unwrap();
        drop(dir);
        assert_eq!(DataDir::open(&path, None, storage).unwrap().identity(), Some(&other));
    }
}

#[test]
fn each_new_directory_is_made_durable_in_its_parent() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let deep = root.join("a/b/c");
    let expected = [root.join("a/b"), root.join("a"), root.to_owned()];
    assert_eq!(parents_of_new(&deep), expected);
    create_dir(&deep).unwrap();
    assert_eq!(parents_of_new(&deep), [root.join("a/b")]);
    assert_eq!(parents_of_new(&deep.join("d")), [deep]);
    assert_eq!(parents_of_new(Path::new("new")), [Path::new(".")]);
    assert_eq!(parents_of_new(Path::new("/new")), [Path::new("/")]);
}

#[test]
fn an_unfinished_initialization_can_be_done_again() {
    let root = tempfile::tempdir().unwrap();
    for name in ["raft", "rocksdb", "lost+found"] {
        fs::create_dir(root.path().join(name)).unwrap();
    }
    fs::write(root.path().join("METASTORE.draft"), "Meta").unwrap();
    let mut dir = DataDir::open(root.path(), None, StorageKind::RocksDb).unwrap();
    dir.initialize(identity(StorageKind::RocksDb)).unwrap();
}

#[test]
fn a_file_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("file");
    fs::write(&path, "").unwrap();
    let error = refused(root.path(), &path, None, StorageKind::RocksDb);
    assert_eq!(error, DataDirError::NotADirectory { path });
}

#[test]
fn foreign_directories_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let (etcd, other, log) = (
        root.path().join("etcd"),
        root.path().join("other"),
        root.path().join("log"),
    );
    fs::create_dir_all(etcd.join("member/wal")).unwrap();
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("precious.txt"), "").unwrap();
    fs::create_dir_all(log.join("raft")).unwrap();
    fs::write(log.join("raft/0000000000000001.raftlog"), "").unwrap();
    assert_eq!(
        refused(root.path(), &etcd, None, StorageKind::RocksDb),
        DataDirError::Etcd { path: etcd }
    );
    for (path, found) in [(other, "precious.txt"), (log, "raft")] {
        let expected = DataDirError::NotOurs {
            path: path.clone(),
            found: found.to_owned(),
        };
        assert_eq!(refused(root.path(), &path, None, StorageKind::RocksDb), expected);
    }
}

#[test]
fn a_directory_in_use_names_the_process() {
    let root = tempfile::tempdir().unwrap();
    let mut dir = DataDir::open(root.path(), None, StorageKind::RocksDb).unwrap();
    let pid = std::process::id().to_string();
    let expected = DataDirError::Locked {
        path: root.path().to_owned(),
        pid,
    };
    assert_eq!(refused(root.path(), root.path(), None, StorageKind::RocksDb), expected);
    dir.initialize(identity(StorageKind::RocksDb)).unwrap();
    assert_eq!(refused(root.path(), root.path(), None, StorageKind::RocksDb), expected);
    drop(dir);
    DataDir::open(root.path(), None, StorageKind::RocksDb).unwrap();
}

#[test]
fn another_storage_or_format_is_refused() {
    let root = tempfile::tempdir().unwrap();
    DataDir::open(root.path(), None, StorageKind::RocksDb)
        .unwrap()
        .initialize(identity(StorageKind::RocksDb))
        .unwrap();
    assert_eq!(
        refused(root.path(), root.path(), None, StorageKind::Memory),
        DataDirError::OtherStorage {
            path: root.path().to_owned(),
            found: StorageKind::RocksDb,
            asked: StorageKind::Memory
        }
    );
    let file = root.path().join("METASTORE");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("format: 1", "format: 2")).unwrap();
    assert_eq!(
        refused(root.path(), root.path(), None, StorageKind::RocksDb),
        DataDirError::NewerFormat {
            path: root.path().to_owned(),
            found: 2,
            known: 1
        }
    );
}

#[test]
fn a_damaged_identity_is_refused() {
    let root = tempfile::tempdir().unwrap();
    DataDir::open(root.path(), None, StorageKind::RocksDb)
        .unwrap()
        .initialize(identity(StorageKind::RocksDb))
        .unwrap();
    let file = root.path().join("METASTORE");
    let whole = fs::read(&file).unwrap();
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 4;
        for bytes in [flipped, whole[..at].to_vec()] {
            fs::write(&file, &bytes).unwrap();
            match refused(root.path(), root.path(), None, StorageKind::RocksDb) {
                DataDirError::DamagedIdentity { .. } | DataDirError::NewerFormat { .. } => {}
                error => panic!("at {at}: {error}"),
            }
        }
    }
}

#[test]
fn the_raft_log_may_lie_elsewhere_but_only_there() {
    let root = tempfile::tempdir().unwrap();
    let (path, raft, other) = (
        root.path().join("data"),
        root.path().join("wal"),
        root.path().join("other"),
    );
    let mut dir = DataDir::open(&path, Some(&raft), StorageKind::RocksDb).unwrap();
    dir.initialize(identity(StorageKind::RocksDb)).unwrap();
    assert_eq!(dir.raft_dir(), raft);
    assert!(!path.join("raft").exists());
    drop(dir);
    let dir = DataDir::open(&path, Some(&raft), StorageKind::RocksDb).unwrap();
    assert_eq!(dir.identity(), Some(&identity(StorageKind::RocksDb)));
    drop(dir);

    let elsewhere = |raft: &Path| DataDirError::RaftElsewhere {
        path: path.clone(),
        raft: raft.to_owned(),
    };
    assert_eq!(
        refused(root.path(), &path, Some(&other), StorageKind::RocksDb),
        elsewhere(&other)
    );
    assert_eq!(
        refused(root.path(), &path, None, StorageKind::RocksDb),
        elsewhere(&path.join("raft"))
    );
    fs::create_dir(&other).unwrap();
    assert_eq!(
        refused(root.path(), &path, Some(&other), StorageKind::RocksDb),
        elsewhere(&other)
    );
    fs::write(raft.join("0000000000000001.raftlog"), "").unwrap();
    // A new member must not take over another one's log.
    let new = root.path().join("new");
    assert!(matches!(
        refused(root.path(), &new, Some(&raft), StorageKind::RocksDb),
        DataDirError::NotOurs { .. }
    ));
}

#[test]
fn a_directory_without_rights_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("locked");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o500)).unwrap();
    // The superuser may write anywhere.
    if fs::metadata("/proc/self").is_ok_and(|process| std::os::unix::fs::MetadataExt::uid(&process) == 0) {
        return;
    }
    let error = refused(root.path(), &path, None, StorageKind::RocksDb);
    assert!(
        matches!(error, DataDirError::NoAccess { action: "write to", .. }),
        "{error}"
    );
}

#[test]
fn engines_replace_each_other_whole() {
    let root = tempfile::tempdir().unwrap();
    let mut dir = DataDir::open(root.path(), None, StorageKind::Memory).unwrap();
    dir.initialize(identity(StorageKind::Memory)).unwrap();
    let first = dir.engine_dir().unwrap().path;

    let interrupted = dir.stage_engine().unwrap();
    let staged = dir.stage_engine().unwrap();
    assert_ne!(interrupted, staged);
    assert_eq!(dir.engine_dir().unwrap().path, first, "staging changes nothing");

    dir.switch_engine(&staged, 17, 3).unwrap();
    let used = dir.engine_dir().unwrap();
    assert_eq!((&used.path, used.snapshot), (&staged, Some((17, 3))));
    dir.remove_unused_engines().unwrap();
    assert!(staged.is_dir() && !first.exists() && !interrupted.exists());

    let next = dir.stage_engine().unwrap();
    assert_ne!(next, staged);
    drop(dir);
    let dir = DataDir::open(root.path(), None, StorageKind::Memory).unwrap();
    assert_eq!(dir.engine_dir().unwrap(), used);

    let pointer = root.path().join("ENGINE");
    let text = fs::read_to_string(&pointer).unwrap();
    fs::write(&pointer, text.replace("17", "18")).unwrap();
    assert!(matches!(dir.engine_dir(), Err(DataDirError::DamagedPointer { .. })));
}
