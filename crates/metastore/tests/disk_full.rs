//! A disk that fills: below the reserve writes are refused and all else goes on; if it fills all the same, the node
//! stops, and once there is space again, nothing acknowledged is missing.
//!
//! The disk is a tmpfs, which only root may mount; elsewhere these tests say so and pass.

#![allow(clippy::print_stderr, reason = "a test that cannot run here says why")]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_client::{Client, DeleteOptions, Error, GetOptions, PutOptions, Txn, TxnOp, WatchOptions};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use support::{END_TIMEOUT, Node, Setup, Storage, assert_refused, code, on_both_engines, temp_dir};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";

on_both_engines! { 300;
    below_the_reserve_only_writes_are_refused,
    a_full_disk_stops_the_node_and_loses_nothing,
}

/// A small disk of its own.
struct Disk {
    dir: TempDir,
}

impl Disk {
    fn new(bytes: u64) -> Option<Disk> {
        let dir = temp_dir();
        let options = std::ffi::CString::new(format!("size={bytes}")).expect("it has no zero");
        match mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), options.as_c_str()) {
            Ok(()) => Some(Disk { dir }),
            Err(error) => {
                eprintln!("skipped: a small disk cannot be mounted here: {error}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.path()).expect("the disk is there");
        stat.f_bavail * stat.f_frsize
    }

    /// Fills the disk with a file until this much is free.
    fn leave_free(&self, bytes: u64) -> Ballast {
        let path = self.path().join("ballast");
        let mut file = File::create(&path).expect("the disk has space");
        let block = vec![1; 64 << 10];
        // The node writes too, and may be the one that takes the last of it.
        while self.free() > bytes + block.len() as u64 && file.write_all(&block).is_ok() {}
        Ballast(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let unmounted = unmount(self.path(), UnmountFlags::DETACH);
        assert!(unmounted.is_ok() || std::thread::panicking(), "{unmounted:?}");
    }
}

/// What fills a disk; dropped, it is gone.
struct Ballast(PathBuf);

impl Drop for Ballast {
    fn drop(&mut self) {
        // The disk may be gone before it.
        let _ = fs::remove_file(&self.0);
    }
}

/// Puts until one is refused or taken, as `refused` says; the node looks at its disk a few times a second.
async fn wait_for(client: &mut Client, refused: bool) {
    let begun = Instant::now();
    while client.put("probe", "x", None).await.is_err() != refused {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "the node does not notice its disk"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn below_the_reserve_only_writes_are_refused(storage: Storage) {
    let Some(disk) = Disk::new(256 * MIB) else { return };
    let setup = Setup::new(disk.path(), storage).arg("--disk-reserve-bytes=64MiB");
    let mut node = setup.start();
    let mut client = node.client().await;
    for number in 0..20 {
        client.put(format!("k{number:02}"), "v", None).await.unwrap();
    }
    let lease = client.lease_grant(600, None).await.unwrap().id();
    client
        .put("leased", "", Some(PutOptions::new().with_lease(lease)))
        .await
        .unwrap();

    let ballast = disk.leave_free(50 * MIB);
    wait_for(&mut client, true).await;
    let full = client.put("k00", "w", None).await;
    assert_refused(full, code::RESOURCE_EXHAUSTED, NO_SPACE);
    assert_refused(client.lease_grant(600, None).await, code::RESOURCE_EXHAUSTED, NO_SPACE);
    let txn = Txn::new().and_then([TxnOp::delete("k00", None), TxnOp::put("k01", "w", None)]);
    assert_refused(client.txn(txn).await, code::RESOURCE_EXHAUSTED, NO_SPACE);
    let status = client.status().await.unwrap();
    assert!(
        status.errors().iter().any(|error| error.contains("NOSPACE")),
        "{:?}",
        status.errors()
    );

    // Reads, watches, and everything that makes room go on.
    let all = client.get("k", Some(GetOptions::new().with_prefix())).await.unwrap();
    assert!(all.kvs().len() == 20 && all.kvs().iter().all(|kv| kv.value() == b"v"));
    let mut stream = client.watch("k00", Some(WatchOptions::new())).await.unwrap();
    assert!(stream.message().await.unwrap().unwrap().created());
    assert_eq!(client.delete("k00", None).await.unwrap().deleted(), 1);
    assert_eq!(stream.message().await.unwrap().unwrap().events().len(), 1);
    let response = client
        .txn(Txn::new().and_then([TxnOp::delete("k01", None)]))
        .await
        .unwrap();
    assert!(response.succeeded());
    let options = DeleteOptions::new().with_range("k05");
    assert_eq!(client.delete("k02", Some(options)).await.unwrap().deleted(), 3);
    client.lease_revoke(lease).await.unwrap();
    assert_eq!(client.get("leased", None).await.unwrap().count(), 0);
    let now = client.get("none", None).await.unwrap().header().unwrap().revision();
    client.compact(now, None).await.unwrap();

    // It starts in this state too, and takes writes again once there is room.
    node.terminate();
    let node = setup.start();
    let mut client = node.client().await;
    assert_refused(client.put("k00", "w", None).await, code::RESOURCE_EXHAUSTED, NO_SPACE);
    assert_eq!(
        client
            .get("k", Some(GetOptions::new().with_prefix()))
            .await
            .unwrap()
            .count(),
        15
    );
    drop(ballast);
    wait_for(&mut client, false).await;
    client.put("k00", "w", None).await.unwrap();
    assert!(client.status().await.unwrap().errors().is_empty());
}

/// What was acknowledged: key to value and revision.
type Acknowledged = Arc<Mutex<BTreeMap<String, (Vec<u8>, i64)>>>;

/// Writes until the node refuses or goes; notes every answer.
async fn write_until_it_ends(node: &Node, acknowledged: &Acknowledged) {
    let mut tasks = Vec::new();
    for number in 0..4 {
        let (mut client, acknowledged) = (node.client().await, acknowledged.clone());
        tasks.push(tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(number);
            for count in 0.. {
                let (key, value) = (
                    format!("{number}/{count}"),
                    vec![random.u8(..); random.usize(1000..200_000)],
                );
                match client.put(&*key, value.clone(), None).await {
                    Ok(answer) => {
                        let revision = answer.header().unwrap().revision();
                        acknowledged.lock().unwrap().insert(key, (value, revision));
                    }
                    Err(Error::GRpcStatus(_) | Error::TransportError(_)) => return,
                    Err(error) => panic!("{error:?}"),
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

async fn check_all(node: &Node, acknowledged: &Acknowledged) {
    let mut client = node.client().await;
    let acknowledged = acknowledged.lock().unwrap().clone();
    for (key, (value, revision)) in &acknowledged {
        let got = client.get(&**key, None).await.unwrap();
        let kv = got
            .kvs()
            .first()
            .unwrap_or_else(|| panic!("{key} was acknowledged and is missing"));
        assert!(
            kv.value() == value && kv.mod_revision() == *revision,
            "{key} has changed"
        );
    }
}

async fn a_full_disk_stops_the_node_and_loses_nothing(storage: Storage) {
    let Some(disk) = Disk::new(400 * MIB) else { return };
    let mut setup = Setup::new(disk.path(), storage).arg("--disk-reserve-bytes=0");
    // Its output needs no space there.
    let elsewhere = temp_dir();
    setup.log = elsewhere.path().join("log");
    setup = match storage {
        Storage::RocksDb => setup.arg("--rocksdb-write-buffer-bytes=1MiB"),
        Storage::Memory => setup.arg("--memory-snapshot-interval=500ms"),
    };
    for free in [40 * MIB, 10 * MIB, MIB] {
        let mut node = setup.start();
        let before = node
            .client()
            .await
            .get("none", None)
            .await
            .unwrap()
            .header()
            .unwrap()
            .revision();
        let ballast = disk.leave_free(free);
        let acknowledged = Acknowledged::default();
        write_until_it_ends(&node, &acknowledged).await;
        let status = node.wait_end(END_TIMEOUT);
        let log = node.log();
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("the node cannot go on and stops"), "{log}");
        // The operating system's words, or those of the Raft log.
        assert!(
            log.contains("No space left on device") || log.contains("nospace"),
            "{log}"
        );
        eprintln!(
            "{}: {} writes with {} MiB left",
            storage.name(),
            acknowledged.lock().unwrap().len(),
            free / MIB
        );

        // On a disk that is still full it may start or refuse; it must not lose anything over that.
        let mut again = setup.spawn();
        if again.ready_or_ended() {
            again.kill();
        }
        drop(ballast);
        let node = setup.start();
        let mut client = node.client().await;
        let now = client.get("none", None).await.unwrap().header().unwrap().revision();
        assert!(now >= before, "time went back from {before} to {now}");
        check_all(&node, &acknowledged).await;
        // Room for the next round.
        client
            .delete("", Some(DeleteOptions::new().with_all_keys()))
            .await
            .unwrap();
        client.compact(now, None).await.unwrap();
    }
}
