//! Backups, quotas and automatic compaction, on the real binary.

mod support;

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use etcd_client::{
    AlarmAction, AlarmOptions, AlarmType, Client, CompactionOptions, GetOptions, LeaseGrantOptions, PutOptions,
};
use support::{Node, Setup, Storage, assert_refused, code, on_both_engines, temp_dir};

const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";

on_both_engines! { 300;
    a_backup_is_restored,
    a_restore_that_is_killed_leaves_nothing_that_starts,
    a_quota_is_enforced_until_its_alarm_is_ended,
    an_alarm_that_was_ended_comes_back_with_a_write,
    history_is_forgotten_without_being_asked,
    hashes_of_compactions_are_kept,
}

fn metastore(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metastore"));
    command
        .env_clear()
        .arg("snapshot")
        .args(args)
        .output()
        .expect("it runs")
}

fn path(path: &Path) -> &str {
    path.to_str().expect("the tests' paths are text")
}

/// Saves a backup as etcdctl does.
async fn save(client: &mut Client, file: &Path) {
    let mut snapshot = client.snapshot().await.expect("a snapshot begins");
    let mut bytes = Vec::new();
    let mut remaining = None;
    while let Some(chunk) = snapshot.message().await.expect("goes on") {
        assert_eq!(chunk.version(), "3.7.0");
        if let Some(remaining) = remaining.replace(chunk.remaining_bytes())
            && remaining > 0
        {
            assert_eq!(chunk.blob().len() as u64, remaining - chunk.remaining_bytes());
        }
        bytes.extend_from_slice(chunk.blob());
    }
    assert_eq!(remaining, Some(0));
    assert_eq!(bytes.len() % 4096, 32, "pages, and a hash");
    std::fs::write(file, bytes).expect("it can be written");
}

/// All keys at a revision, as text.
async fn contents(client: &mut Client, revision: i64) -> Vec<String> {
    let options = GetOptions::new().with_all_keys().with_revision(revision);
    let answer = client.get("", Some(options)).await.expect("is there");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    answer
        .kvs()
        .iter()
        .map(|kv| {
            let numbers = (kv.create_revision(), kv.mod_revision(), kv.version(), kv.lease());
            format!("{} {} {numbers:?}", text(kv.key()), text(kv.value()))
        })
        .collect()
}

async fn a_backup_is_restored(storage: Storage) {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), storage);
    let mut node = setup.start();
    let mut client = node.client().await;
    let lease = client
        .lease_grant(1000, Some(LeaseGrantOptions::new().with_id(0x77)))
        .await;
    lease.expect("is granted");
    for round in 0..3 {
        for number in 0..300 {
            let (key, value) = (format!("key{number:03}"), format!("{round} {number}"));
            let options = (number % 10 == 0).then(|| PutOptions::new().with_lease(0x77));
            client.put(key, value, options).await.expect("is put");
        }
    }
    client.delete("key007", None).await.expect("is deleted");
    client
        .compact(500, Some(CompactionOptions::new().with_physical()))
        .await
        .expect("is compacted");
    client.put("after", "compaction", None).await.expect("is put");
    let revisions = [500, 600, 901, 903];
    // That of the compacted revision covers what was before the compaction, until the restart.
    let hashed = &revisions[1..];
    let mut before = Vec::new();
    for revision in revisions {
        before.push(contents(&mut client, revision).await);
    }
    for &revision in hashed {
        let hash = client.hash_kv(revision).await.expect("hashes").hash();
        before.push(vec![hash.to_string()]);
    }
    let file = dir.path().join("backup.db");
    save(&mut client, &file).await;
    assert!(node.terminate().code().is_none(), "it ends by the signal");

    let status = metastore(&["status", path(&file), "--write-out=json"]);
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains(r#""revision":903,"totalKey":300,"#), "{status}");

    let other = Setup::new(&dir.path().join("other"), storage);
    std::fs::create_dir(dir.path().join("other")).expect("a directory");
    let engine = format!("--storage={}", storage.name());
    let args = ["restore", path(&file), "--data-dir", path(&other.data_dir), &engine];
    let restored = metastore(&args);
    assert!(restored.status.success(), "{restored:?}");
    let again = metastore(&args);
    assert_eq!(again.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&again.stderr).contains("is not empty"),
        "{again:?}"
    );

    let mut node = other.start();
    let mut client = node.client().await;
    let mut after = Vec::new();
    for revision in revisions {
        after.push(contents(&mut client, revision).await);
    }
    for &revision in hashed {
        let hash = client.hash_kv(revision).await.expect("hashes").hash();
        after.push(vec![hash.to_string()]);
    }
    assert_eq!(before, after);
    let too_old = client.get("a", Some(GetOptions::new().with_revision(499))).await;
    assert_refused(
        too_old,
        code::OUT_OF_RANGE,
        "etcdserver: mvcc: required revision has been compacted",
    );
    let leases = client.leases().await.expect("are listed");
    assert_eq!(
        leases.leases().iter().map(|lease| lease.id()).collect::<Vec<_>>(),
        [0x77]
    );
    client.lease_revoke(0x77).await.expect("is revoked");
    assert_eq!(contents(&mut client, 0).await.len(), 270, "its keys go with it");
    // What was restored is as durable as anything.
    node.kill();
    let node = other.start();
    assert_eq!(contents(&mut node.client().await, 0).await.len(), 270);

    // With higher revisions, and with files that are none.
    let bumped = Setup::new(&dir.path().join("bumped"), storage);
    std::fs::create_dir(dir.path().join("bumped")).expect("a directory");
    let args = [
        "restore",
        path(&file),
        "--data-dir",
        path(&bumped.data_dir),
        &engine,
        "--bump-revision=1000",
    ];
    assert_eq!(metastore(&args).status.code(), Some(2), "half of what it takes");
    assert!(metastore(&[&args[..], &["--mark-compacted"]].concat()).status.success());
    let node = bumped.start();
    let put = node.client().await.put("k", "v", None).await.expect("is put");
    assert_eq!(put.header().map(|header| header.revision()), Some(1904));
    let bad = dir.path().join("bad.db");
    std::fs::write(&bad, "no database").expect("it can be written");
    for (args, expected) in [
        (&[path(&bad)][..], "has no hash at its end"),
        (&[path(&bad), "--skip-hash-check"], "is not a bbolt database"),
        (&["/nonexistent"], "cannot read /nonexistent"),
    ] {
        let target = dir.path().join("never");
        let args = [&["restore"], args, &["--data-dir", path(&target), &engine]].concat();
        let refused = metastore(&args);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(
            text.contains(expected) && text.trim_end().lines().count() == 1,
            "{text}"
        );
        assert!(!target.exists(), "nothing is left of the attempt");
    }
}

async fn a_restore_that_is_killed_leaves_nothing_that_starts(storage: Storage) {
    let dir = temp_dir();
    let file = dir.path().join("backup.db");
    {
        let node = Setup::new(dir.path(), storage).start();
        let mut client = node.client().await;
        for number in 0..40 {
            client
                .put(format!("key{number}"), vec![number; 1 << 20], None)
                .await
                .expect("is put");
        }
        save(&mut client, &file).await;
    }
    let begun = Instant::now();
    for number in 0.. {
        let setup = Setup::new(&dir.path().join(format!("other{number}")), storage);
        if is_killed_midway(&setup, &file) {
            let (exit, log) = setup.run_to_end();
            assert_eq!(exit, Some(1));
            assert!(log.contains("was not restored to its end"), "{log}");
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "it is always done before");
    }
}

/// Restores a backup and kills that once it has begun; `false` if it was done before.
fn is_killed_midway(setup: &Setup, file: &Path) -> bool {
    let engine = format!("--storage={}", setup.storage.name());
    std::fs::create_dir_all(setup.data_dir.parent().expect("it has one")).expect("a directory");
    let mut restoring = Command::new(env!("CARGO_BIN_EXE_metastore"))
        .args([
            "snapshot",
            "restore",
            path(file),
            "--data-dir",
            path(&setup.data_dir),
            &engine,
        ])
        .spawn()
        .expect("it runs");
    let begun = Instant::now();
    while !setup.data_dir.join("RESTORING").exists() && restoring.try_wait().expect("it can be waited for").is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never began");
        std::thread::sleep(Duration::from_millis(1));
    }
    restoring.kill().expect("it can be killed");
    restoring.wait().expect("it can be waited for");
    !setup.data_dir.join("METASTORE").exists()
}

async fn put(client: &mut Client, key: &str, bytes: usize) -> Result<(), etcd_client::Error> {
    client.put(key, vec![b'v'; bytes], None).await.map(drop)
}

async fn alarms(client: &mut Client) -> Vec<u64> {
    let answer = client
        .alarm(AlarmAction::Get, AlarmType::None, None)
        .await
        .expect("are listed");
    answer.alarms().iter().map(|alarm| alarm.member_id()).collect()
}

/// As etcd's own test of it: 13 pages hold a small key, and not many large ones.
async fn a_quota_is_enforced_until_its_alarm_is_ended(storage: Storage) {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), storage).arg("--quota-backend-bytes=53248");
    let mut node = setup.start();
    let mut client = node.client().await;
    put(&mut client, "small", 64).await.expect("fits");
    let mut puts = 0;
    let refused = loop {
        match put(&mut client, "large", 4096).await {
            Ok(()) => puts += 1,
            Err(error) => break error,
        }
        assert!(puts < 20, "nothing is refused");
    };
    assert!(puts > 2, "{puts}");
    assert_refused::<()>(Err(refused), code::RESOURCE_EXHAUSTED, NO_SPACE);
    let member = client
        .status()
        .await
        .expect("answers")
        .header()
        .map(|header| header.member_id());
    assert_eq!(alarms(&mut client).await, [member.expect("a member")]);
    // From now on even what would fit is refused, also after a restart; what makes room is not.
    node.kill();
    let node = setup.start();
    let mut client = node.client().await;
    assert_refused(put(&mut client, "k", 1).await, code::RESOURCE_EXHAUSTED, NO_SPACE);
    assert_refused(client.lease_grant(100, None).await, code::RESOURCE_EXHAUSTED, NO_SPACE);
    let deleted = client.delete("nothing", None).await.expect("deletions make room");
    let revision = deleted.header().map(|header| header.revision()).expect("a header");
    let physical = CompactionOptions::new().with_physical();
    client.compact(revision, Some(physical)).await.expect("is compacted");
    client.defragment().await.expect("holds nobody up");
    assert_refused(put(&mut client, "k", 1).await, code::RESOURCE_EXHAUSTED, NO_SPACE);
    let mut options = AlarmOptions::new();
    options.with_member(member.expect("a member"));
    let ended = client
        .alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(options))
        .await;
    assert_eq!(ended.expect("is ended").alarms().len(), 1);
    assert_eq!(alarms(&mut client).await, []);
    put(&mut client, "small", 64).await.expect("fits again");
    let status = client.status().await.expect("answers");
    assert_eq!(status.db_size_quota(), 53248);
    assert!(status.db_size() < 53248, "{}", status.db_size());
}

/// However full the store is: whoever ended the alarm wants to try.
async fn an_alarm_that_was_ended_comes_back_with_a_write(storage: Storage) {
    let dir = temp_dir();
    // Less than an empty store has.
    let node = Setup::new(dir.path(), storage)
        .arg("--quota-backend-bytes=5120")
        .start();
    let mut client = node.client().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(alarms(&mut client).await, [], "nobody wrote");
    for _ in 0..2 {
        assert_refused(put(&mut client, "k", 1).await, code::RESOURCE_EXHAUSTED, NO_SPACE);
        let members = alarms(&mut client).await;
        assert_eq!(members.len(), 1);
        let mut options = AlarmOptions::new();
        options.with_member(members[0]);
        let ended = client
            .alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(options))
            .await;
        assert_eq!(ended.expect("is ended").alarms().len(), 1);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(alarms(&mut client).await, []);
    }
}

async fn compacted(node: &Node) -> i64 {
    node.client().await.hash_kv(0).await.expect("hashes").compact_version()
}

async fn history_is_forgotten_without_being_asked(storage: Storage) {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), storage).arg("--auto-compaction-retention=1s");
    let node = setup.start();
    let mut client = node.client().await;
    let mut begun = Instant::now();
    for _ in 0..20 {
        // Before the last put, since its answer may come late.
        begun = Instant::now();
        put(&mut client, "k", 10).await.expect("is put");
    }
    while compacted(&node).await < 21 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", node.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(begun.elapsed() >= Duration::from_millis(900), "a second is seen whole");
    assert_eq!(contents(&mut client, 0).await.len(), 1);
}

/// Who asks for a revision that was compacted to gets its hash from before that, which tells which compaction was last
/// then; a restart forgets it.
async fn hashes_of_compactions_are_kept(storage: Storage) {
    let dir = temp_dir();
    let setup = Setup::new(dir.path(), storage);
    let mut node = setup.start();
    let mut client = node.client().await;
    let mut compacted = -1;
    let mut kept = Vec::new();
    for revision in [4, 6, 9] {
        let mut newest = 0;
        while newest <= revision {
            let put = client.put(format!("k{}", newest % 3), "v", None).await.expect("is put");
            newest = put.header().expect("always there").revision();
        }
        let before = client.hash_kv(revision).await.expect("hashes");
        assert_eq!(before.compact_version(), compacted);
        let physical = CompactionOptions::new().with_physical();
        client.compact(revision, Some(physical)).await.expect("is compacted");
        kept.push((revision, before.hash(), compacted));
        compacted = revision;
    }
    // Long after, and though the history itself is gone.
    for &(revision, hash, previous) in &kept {
        let found = client.hash_kv(revision).await.expect("hashes");
        assert_eq!((found.hash(), found.compact_version()), (hash, previous));
    }
    assert_refused(
        client.hash_kv(5).await,
        code::OUT_OF_RANGE,
        "etcdserver: mvcc: required revision has been compacted",
    );
    drop(client);
    node.terminate();
    let node = setup.start();
    let found = node.client().await.hash_kv(9).await.expect("hashes");
    assert_eq!(found.compact_version(), 9);
}
