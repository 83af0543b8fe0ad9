//! What a node cannot start with: it says so in one line, exits with 1, and leaves everything as it was.

#![allow(clippy::print_stderr, reason = "a test that cannot run here says why")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use etcd_client::{GetOptions, PutOptions};
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use support::{Node, Setup, Storage, on_both_engines, temp_dir};

on_both_engines! { 300;
    a_taken_port,
    a_directory_in_use,
    a_newer_format,
    the_other_engine,
    a_damaged_identity,
    a_missing_raft_log,
    a_raft_log_elsewhere,
    a_raft_log_older_than_the_state,
    missing_engine_files,
    damaged_engine_files,
    a_torn_tail_is_cut_off,
    damage_before_the_tail,
    a_read_only_directory,
}

/// Every path below `root` with its kind, its rights and its content.
fn tree(root: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let content = if metadata.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else {
            fs::read(&path).unwrap()
        };
        found.insert(path, (metadata.permissions().mode(), content));
    }
    found
}

/// Checks that a start is refused: exit code 1, one line in all, which holds `parts`, and nothing changed on disk.
#[track_caller]
fn refuses(setup: &Setup, parts: &[&str]) {
    assert_eq!(refusal(setup, parts), [] as [PathBuf; 0], "these have changed");
}

/// The same for what shows only when the log or the state is read. By then the lock holds another process id, and
/// opening the engine may have rewritten its files to hold the same.
#[track_caller]
fn refuses_when_read(setup: &Setup, parts: &[&str]) {
    let (lock, engine) = (setup.data_dir.join("LOCK"), setup.data_dir.join(setup.storage.name()));
    let mut changed = refusal(setup, parts);
    changed.retain(|path| *path != lock && !path.starts_with(&engine));
    assert_eq!(changed, [] as [PathBuf; 0], "these have changed");
}

/// Checks the refusal itself, and returns the paths that changed.
#[track_caller]
fn refusal(setup: &Setup, parts: &[&str]) -> Vec<PathBuf> {
    let before = tree(&setup.data_dir);
    let (code, output) = setup.run_to_end();
    assert_eq!(code, Some(1), "{output}");
    let announced = |line: &&str| line.contains("\"msg\":\"starting a member\"");
    let lines: Vec<&str> = output.lines().filter(|line| !announced(line)).collect();
    assert_eq!(lines.len(), 1, "{output}");
    assert!(lines[0].starts_with("metastore: "), "{output}");
    for part in parts {
        assert!(lines[0].contains(part), "{part:?} is missing: {output}");
    }
    let after = tree(&setup.data_dir);
    let all: BTreeSet<&PathBuf> = before.keys().chain(after.keys()).collect();
    all.into_iter()
        .filter(|path| before.get(*path) != after.get(*path))
        .cloned()
        .collect()
}

fn path(path: &Path) -> &str {
    path.to_str().expect("temporary directories have plain names")
}

async fn put_some(node: &Node, count: usize) {
    let mut client = node.client().await;
    for number in 0..count {
        client
            .put(format!("k{number}"), format!("v{number}"), None)
            .await
            .unwrap();
    }
}

/// Checks that the keys that [`put_some`] wrote are there.
async fn check_some(node: &Node, count: usize) {
    let mut client = node.client().await;
    let all = client.get("k", Some(GetOptions::new().with_prefix())).await.unwrap();
    assert_eq!(all.kvs().len(), count);
    for number in 0..count {
        let got = client.get(format!("k{number}"), None).await.unwrap();
        assert_eq!(got.kvs()[0].value(), format!("v{number}").as_bytes());
        assert_eq!(got.kvs()[0].mod_revision(), number as i64 + 2);
    }
}

/// A directory in which a node with ten keys was stopped well.
async fn stopped(base: &Path, storage: Storage) -> Setup {
    let setup = Setup::new(base, storage);
    let mut node = setup.start();
    put_some(&node, 10).await;
    node.terminate();
    setup
}

/// A directory in which a node with ten keys was killed.
async fn killed(base: &Path, storage: Storage) -> Setup {
    let setup = Setup::new(base, storage);
    let mut node = setup.start();
    put_some(&node, 10).await;
    node.kill();
    setup
}

/// Checks that the node starts with everything that `before` left.
async fn starts(setup: &Setup, count: usize) -> Node {
    let node = setup.start();
    check_some(&node, count).await;
    node
}

async fn a_taken_port(storage: Storage) {
    let dir = temp_dir();
    let mut setup = stopped(dir.path(), storage).await;
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let free = setup.port;
    setup.port = taken.local_addr().unwrap().port();
    let address = format!("127.0.0.1:{}", setup.port);
    refuses(&setup, &[&address, "in use"]);

    let fresh = temp_dir();
    let mut nothing_yet = Setup::new(fresh.path(), storage);
    nothing_yet.port = setup.port;
    refuses(&nothing_yet, &[&address, "in use"]);
    assert!(!nothing_yet.data_dir.exists());
    setup.port = free;
    starts(&setup, 10).await;
}

#[test]
fn a_file_as_directory() {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), Storage::RocksDb);
    fs::write(&setup.data_dir, "a letter").unwrap();
    refuses(&setup, &[path(&setup.data_dir), "is not a directory"]);

    let mut below = setup.clone();
    below.data_dir = setup.data_dir.join("below");
    refuses(&below, &[path(&setup.data_dir), "ot a directory"]);
    refuses(&setup, &[path(&setup.data_dir), "is not a directory"]);
}

#[test]
fn a_directory_of_something_else() {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), Storage::RocksDb);
    fs::create_dir(&setup.data_dir).unwrap();
    fs::write(setup.data_dir.join("notes.txt"), "mine").unwrap();
    refuses(&setup, &[path(&setup.data_dir), "notes.txt", "empty directory"]);

    // Files with our names are not ours without the identity.
    fs::remove_file(setup.data_dir.join("notes.txt")).unwrap();
    fs::create_dir(setup.data_dir.join("raft")).unwrap();
    fs::write(setup.data_dir.join("raft/0000000000000001.raftlog"), "").unwrap();
    refuses(&setup, &[path(&setup.data_dir), "raft"]);
}

#[test]
fn a_directory_of_etcd() {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), Storage::RocksDb);
    fs::create_dir_all(setup.data_dir.join("member/snap")).unwrap();
    fs::write(setup.data_dir.join("member/snap/db"), "pages").unwrap();
    refuses(&setup, &[path(&setup.data_dir), "etcd member"]);
}

#[test]
fn a_directory_that_cannot_be_made() {
    let dir = temp_dir();
    let mut setup = Setup::new(dir.path(), Storage::RocksDb);
    setup.data_dir = "/proc/metastore".into();
    refuses(&setup, &["/proc/metastore"]);
}

async fn a_directory_in_use(storage: Storage) {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), storage);
    let node = setup.start();
    put_some(&node, 10).await;
    let mut second = Setup::new(dir.path(), storage);
    second.log = dir.path().join("log-2");
    let pid = fs::read_to_string(setup.data_dir.join("LOCK")).unwrap();
    refuses(&second, &[path(&setup.data_dir), "in use by the process", pid.trim()]);
    check_some(&node, 10).await;
}

/// Replaces a part of the identity file.
fn edit_identity(setup: &Setup, from: &str, to: &str) {
    let file = setup.data_dir.join("METASTORE");
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(&file, text.replacen(from, to, 1)).unwrap();
}

async fn a_newer_format(storage: Storage) {
    let dir = temp_dir();
    let setup = stopped(dir.path(), storage).await;
    edit_identity(&setup, "format: 1", "format: 2");
    refuses(&setup, &[path(&setup.data_dir), "format version 2"]);
    edit_identity(&setup, "format: 2", "format: 1");
    starts(&setup, 10).await;
}

async fn the_other_engine(storage: Storage) {
    let dir = temp_dir();
    let mut setup = stopped(dir.path(), storage).await;
    setup.storage = match storage {
        Storage::RocksDb => Storage::Memory,
        Storage::Memory => Storage::RocksDb,
    };
    refuses(
        &setup,
        &[path(&setup.data_dir), "was made with storage", storage.name()],
    );
    setup.storage = storage;
    starts(&setup, 10).await;
}

async fn a_damaged_identity(storage: Storage) {
    let dir = temp_dir();
    let setup = stopped(dir.path(), storage).await;
    edit_identity(&setup, "member-id: ", "member-id: f");
    refuses(&setup, &["METASTORE is damaged"]);
    edit_identity(&setup, "member-id: f", "member-id: ");
    starts(&setup, 10).await;
}

async fn a_missing_raft_log(storage: Storage) {
    let dir = temp_dir();
    let setup = stopped(dir.path(), storage).await;
    let (raft, aside) = (setup.data_dir.join("raft"), dir.path().join("aside"));
    fs::rename(&raft, &aside).unwrap();
    refuses(&setup, &[path(&raft), "Raft log"]);
    fs::rename(&aside, &raft).unwrap();
    starts(&setup, 10).await;
}

async fn a_raft_log_elsewhere(storage: Storage) {
    let dir = temp_dir();
    let with_wal_dir = |name: &str| format!("--wal-dir={}", path(&dir.path().join(name)));
    let setup = Setup::new(dir.path(), storage);
    let elsewhere = setup.clone().arg(with_wal_dir("wal"));
    let mut node = elsewhere.start();
    put_some(&node, 10).await;
    node.kill();
    refuses(&setup, &["the Raft log of"]);
    refuses(&setup.clone().arg(with_wal_dir("wrong")), &["the Raft log of"]);
    assert!(!dir.path().join("wrong").exists());
    let foreign = dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("notes.txt"), "mine").unwrap();
    refuses(&setup.clone().arg(with_wal_dir("foreign")), &[path(&foreign)]);
    starts(&elsewhere, 10).await;
}

/// An older copy of the Raft log: what was acknowledged after it was made is in the state and not in the log, so this
/// member would vote and append as if that had never been.
async fn a_raft_log_older_than_the_state(storage: Storage) {
    let dir = temp_dir();
    let setup = stopped(dir.path(), storage).await;
    let raft = setup.data_dir.join("raft");
    let older = tree(&raft);
    let mut node = setup.start();
    let mut client = node.client().await;
    for _ in 0..20 {
        client.put("later", "", None).await.unwrap();
    }
    node.terminate();
    let newer = tree(&raft);
    put_tree(&raft, &older);
    refuses_when_read(&setup, &["log"]);
    put_tree(&raft, &newer);
    starts(&setup, 10).await;
}

/// Replaces what is in a directory.
fn put_tree(root: &Path, tree: &BTreeMap<PathBuf, (u32, Vec<u8>)>) {
    fs::remove_dir_all(root).unwrap();
    fs::create_dir(root).unwrap();
    for (path, (mode, content)) in tree.iter().filter(|(path, _)| *path != root) {
        fs::write(path, content).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(*mode)).unwrap();
    }
}

/// Without the engine's files a trimmed log does not make the state again; an empty store would be a lie.
async fn missing_engine_files(storage: Storage) {
    let dir = temp_dir();
    let setup = stopped(dir.path(), storage).await;
    let engine = setup.data_dir.join(storage.name());
    let whole = tree(&engine);
    fs::remove_dir_all(&engine).unwrap();
    refuses_when_read(&setup, &["the state was damaged or removed"]);
    // The refused start must not have made it acceptable.
    refuses_when_read(&setup, &["the state was damaged or removed"]);
    // RocksDB finds its files by this one.
    if storage == Storage::RocksDb {
        put_tree(&engine, &whole);
        fs::remove_file(engine.join("CURRENT")).unwrap();
        refuses_when_read(&setup, &[]);
    }
    put_tree(&engine, &whole);
    starts(&setup, 10).await;
}

async fn damaged_engine_files(storage: Storage) {
    let dir = temp_dir();
    let setup = stopped(dir.path(), storage).await;
    let engine = setup.data_dir.join(storage.name());
    let whole = tree(&engine);
    // What says which files there are, or, in memory, the only file.
    let (damaged, (_, content)) = whole
        .iter()
        .filter(|(path, (_, content))| {
            let name = path.file_name().unwrap().to_string_lossy();
            !content.is_empty() && (storage == Storage::Memory || name.starts_with("MANIFEST"))
        })
        .max_by_key(|(_, (_, content))| content.len())
        .expect("the engine has files");
    let mut content = content.clone();
    let middle = content.len() / 2;
    content[middle] ^= 0xff;
    fs::write(damaged, content).unwrap();
    refuses_when_read(&setup, &["storage engine"]);
    put_tree(&engine, &whole);
    starts(&setup, 10).await;
}

/// A damaged block is an error for whoever reads it, and never a wrong value.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_data_is_not_served() {
    const DATA_LOSS: i32 = 15;
    let dir = temp_dir();
    let setup = stopped(dir.path(), Storage::RocksDb).await;
    let mut damaged = 0;
    for (file, (_, mut content)) in tree(&setup.data_dir.join("rocksdb")) {
        if file.extension().is_some_and(|extension| extension == "sst") {
            // Tables begin with their data.
            content[20] ^= 0xff;
            fs::write(file, content).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 0, "a node that stops writes its state to files");
    let mut node = setup.spawn();
    if !node.ready_or_ended() {
        assert!(node.log().contains("damaged"), "{}", node.log());
        return;
    }
    let mut client = node.client().await;
    let refused = client
        .get("k3", None)
        .await
        .map_err(|error| support::status(&error).unwrap().0);
    assert_eq!(refused.map(|_| ()), Err(DATA_LOSS));
}

/// The newest file of the log, and where the bytes in it end.
fn log_tail(setup: &Setup) -> (PathBuf, u64) {
    let mut files: Vec<_> = fs::read_dir(setup.data_dir.join("raft"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "raftlog"))
        .collect();
    files.sort();
    let newest = files.pop().expect("there is a log");
    let content = fs::read(&newest).unwrap();
    // Space was set aside behind them, as zeros.
    let end = content
        .iter()
        .rposition(|byte| *byte != 0)
        .expect("the log is not empty")
        + 1;
    (newest, end as u64)
}

async fn a_torn_tail_is_cut_off(storage: Storage) {
    // Cut off, or overwritten with zeros as where a crash kept the file's length and not its content.
    for cut in [true, false] {
        let dir = temp_dir();
        let setup = killed(dir.path(), storage).await;
        let (file, end) = log_tail(&setup);
        let open = fs::OpenOptions::new().write(true).open(&file).unwrap();
        if cut {
            open.set_len(end - 5).unwrap();
        } else {
            open.write_all_at(&[0; 5], end - 5).unwrap();
        }
        drop(open);

        let mut node = starts(&setup, 9).await;
        let log = node.log();
        let said = log
            .lines()
            .filter(|line| line.contains("was not written whole"))
            .count();
        assert_eq!(said, 1, "{log}");
        assert!(log.contains(path(&file)), "{log}");
        let mut client = node.client().await;
        let options = PutOptions::new().with_prev_key();
        let put = client.put("k9", "v9", Some(options)).await.unwrap();
        assert!(put.prev_key().is_none());
        check_some(&node, 10).await;
        node.kill();
        let mut node = starts(&setup, 10).await;
        assert!(!node.log().contains("was not written whole"), "{}", node.log());
        node.terminate();
    }
}

async fn damage_before_the_tail(storage: Storage) {
    let dir = temp_dir();
    let setup = killed(dir.path(), storage).await;
    let (file, end) = log_tail(&setup);
    let open = fs::OpenOptions::new().read(true).write(true).open(&file).unwrap();
    for at in [end / 2, end / 4, 100] {
        let mut byte = [0];
        open.read_exact_at(&mut byte, at).unwrap();
        open.write_all_at(&[byte[0] ^ 0x55], at).unwrap();
        refuses_when_read(&setup, &[path(&file), "offset", "damaged"]);
        open.write_all_at(&byte, at).unwrap();
    }
    starts(&setup, 10).await;
}

/// A directory that is mounted over itself, read-only. Root is denied nothing else.
struct ReadOnly<'a>(&'a Path);

impl ReadOnly<'_> {
    fn new(path: &Path) -> Option<ReadOnly<'_>> {
        if let Err(error) = mount_bind(path, path) {
            eprintln!("skipped: nothing can be mounted here: {error}");
            return None;
        }
        let mounted = ReadOnly(path);
        mount_remount(path, MountFlags::BIND | MountFlags::RDONLY, "").expect("a mount can be made read-only");
        Some(mounted)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let unmounted = unmount(self.0, UnmountFlags::DETACH);
        assert!(unmounted.is_ok() || std::thread::panicking(), "{unmounted:?}");
    }
}

async fn a_read_only_directory(storage: Storage) {
    let dir = temp_dir();
    let setup = stopped(dir.path(), storage).await;
    {
        let Some(_mounted) = ReadOnly::new(&setup.data_dir) else {
            return;
        };
        refuses(&setup, &[path(&setup.data_dir), "ead-only"]);
    }
    starts(&setup, 10).await;

    let empty = temp_dir();
    let fresh = Setup::new(empty.path(), storage);
    fs::create_dir(&fresh.data_dir).unwrap();
    let Some(_mounted) = ReadOnly::new(&fresh.data_dir) else {
        return;
    };
    refuses(&fresh, &[path(&fresh.data_dir), "ead-only"]);
}
