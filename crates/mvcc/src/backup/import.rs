//! From a database file to an empty engine.
//!
//! The file may come from anywhere, so nothing in it is believed: whatever does not fit is an error that names it, and
//! the engine is then of no use. Changes come in the order in which they were made and are taken over one by one, as if
//! they were being applied, with what compaction has passed left out right away.

use std::collections::HashSet;

use api::LeaseId;
use api::kv::{AlarmMember, KeyValue};
use api::limits::ETCD_CLUSTER_VERSION;
use bytes::Bytes;
use hashbrown::HashMap;
use prost::Message;
use storage::bbolt::{Bucket, ReadError, Reader, Source};
use storage::{Batch, Engine, EngineError};

use super::{FINISHED, Lease, SCHEDULED, STORAGE_VERSION};
use crate::etcd_form;
use crate::keys::{self, AlarmsRecord, LeaseRecord, Position, Record, Role, SizesRecord, StateRecord, User};

/// Bytes that go into the engine at once, about.
const BATCH_BYTES: usize = 4 << 20;

/// Why a file could not be imported. Each says in one line what is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file cannot be read, or is no bbolt database.
    #[error("it {0}")]
    Read(#[from] ReadError),
    /// The engine fails.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A later release of etcd wrote it.
    #[error(
        "its storage version is {found}, and this release reads up to {ETCD_CLUSTER_VERSION}; use a later release, or take the snapshot from an older etcd"
    )]
    Newer {
        /// Its storage version.
        found: String,
    },
    /// Something in it is not what etcd puts there.
    #[error("bucket {bucket} {cause}")]
    Content {
        /// Where.
        bucket: &'static str,
        /// What.
        cause: String,
    },
}

fn content(bucket: &'static str, cause: impl Into<String>) -> ImportError {
    ImportError::Content {
        bucket,
        cause: cause.into(),
    }
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Imported {
    /// The newest revision.
    pub revision: i64,
    /// The revision before which history is gone; -1 if there was no compaction.
    pub compacted: i64,
    /// Live keys.
    pub keys: u64,
    /// Changes, deletions included.
    pub changes: u64,
    /// Leases.
    pub leases: u64,
    /// Users and roles.
    pub auth: u64,
}

/// The buckets of a database of etcd.
struct Database<'r, S> {
    reader: &'r Reader<S>,
    buckets: Vec<Bucket>,
}

impl<'r, S: Source> Database<'r, S> {
    fn open(reader: &'r Reader<S>) -> Result<Self, ImportError> {
        let database = Database {
            buckets: reader.buckets()?,
            reader,
        };
        // Older releases do not have all of them, but have had these from the beginning.
        for name in ["key", "meta"] {
            if database.find(name).is_none() {
                return Err(ReadError::NoBucket(name.to_owned()).into());
            }
        }
        Ok(database)
    }

    fn find(&self, name: &str) -> Option<&Bucket> {
        self.buckets.iter().find(|bucket| bucket.name == name.as_bytes())
    }

    fn visit(
        &self,
        bucket: &str,
        mut visit: impl FnMut(&[u8], &[u8], u64) -> Result<(), ImportError>,
    ) -> Result<(), ImportError> {
        let Some(bucket) = self.find(bucket) else {
            return Ok(());
        };
        let mut entries = self.reader.entries(bucket)?;
        loop {
            let read = entries.bytes_read();
            match entries.next()? {
                Some((key, value)) => visit(key, value, read)?,
                None => return Ok(()),
            }
        }
    }

    /// What the bucket `meta` says.
    fn meta(&self) -> Result<Meta, ImportError> {
        let mut meta = Meta {
            scheduled: -1,
            finished: -1,
            version: None,
        };
        let revision = |value: &[u8]| {
            let found = etcd_form::revision(value).map(|(at, _)| at.main);
            found.ok_or_else(|| content("meta", "has a compacted revision that is none"))
        };
        self.visit("meta", |key, value, _| {
            match str::from_utf8(key) {
                Ok(SCHEDULED) => meta.scheduled = revision(value)?,
                Ok(FINISHED) => meta.finished = revision(value)?,
                Ok(STORAGE_VERSION) => meta.version = Some(String::from_utf8_lossy(value).into_owned()),
                _ => {}
            }
            Ok(())
        })?;
        let known = parse_version(ETCD_CLUSTER_VERSION).expect("it is a version");
        if let Some(found) = &meta.version {
            match parse_version(found) {
                None => {
                    return Err(content(
                        "meta",
                        format!("has the storage version {found:?}, which is none"),
                    ));
                }
                Some(version) if version > known => return Err(ImportError::Newer { found: found.clone() }),
                Some(_) => {}
            }
        }
        Ok(meta)
    }
}

/// Major and minor number.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

struct Meta {
    scheduled: i64,
    finished: i64,
    version: Option<String>,
}

impl Meta {
    /// A compaction that was begun is finished by whoever starts with the data, so it counts.
    fn compacted(&self) -> i64 {
        self.scheduled.max(self.finished)
    }
}

/// Fills an empty engine with what a database file holds, and brings it to disk. `bump` is added to the newest revision,
/// and everything before is then compacted (etcdutl's `--bump-revision` and `--mark-compacted`); 0 leaves both alone.
/// `progress` is told how many bytes of the file were read, now and then.
///
/// # Errors
/// [`ImportError`]. What is in the engine then is of no use.
pub fn import<E: Engine, S: Source>(
    reader: &Reader<S>,
    engine: &E,
    bump: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<Imported, ImportError> {
    let database = Database::open(reader)?;
    let meta = database.meta()?;
    let mut compacted = meta.compacted();
    let mut bumped = None;
    if bump > 0 {
        let key = database.find("key").expect("it was looked for");
        let last = reader.last_key(key)?;
        let last = match &last {
            Some(key) => {
                etcd_form::revision(key)
                    .ok_or_else(|| content("key", "has a key that is no revision"))?
                    .0
            }
            None => Position::start_of(0),
        };
        let to = i64::try_from(bump)
            .ok()
            .and_then(|bump| last.main.max(compacted).checked_add(bump))
            .filter(|to| *to <= etcd_form::NUMBER_MAX);
        compacted = to.ok_or_else(|| content("key", format!("has revisions too high to be bumped by {bump}")))?;
        bumped = Some(compacted);
    }
    let mut importer = Importer {
        engine,
        batch: engine.batch(),
        newest: HashMap::new(),
        leases: HashSet::new(),
        state: StateRecord {
            compacted,
            ..StateRecord::initial()
        },
        last: None,
        changes: 0,
        log_bytes: 0,
        auth_records: 0,
        scratch: Vec::new(),
    };
    database.visit("lease", |key, value, _| importer.lease(key, value))?;
    database.visit("key", |key, value, read| {
        importer.change(key, value)?;
        if importer.batch.size_bytes() >= BATCH_BYTES {
            importer.write()?;
            progress(read);
        }
        Ok(())
    })?;
    let mut alarms = AlarmsRecord::default();
    database.visit("alarm", |key, _, _| {
        let alarm = AlarmMember::decode(key).map_err(|_| content("alarm", "has a key that is no alarm"))?;
        alarms.alarms.push(alarm);
        Ok(())
    })?;
    alarms.alarms.sort();
    alarms.alarms.dedup();
    if !alarms.alarms.is_empty() {
        importer.batch.put(keys::META, keys::ALARMS, &alarms.encode_to_vec());
    }
    database.visit("auth", |key, value, _| {
        match key {
            keys::AUTH_ENABLED if value.len() == 1 => {}
            keys::AUTH_REVISION if value.len() == 8 => {
                let revision = i64::from_be_bytes(value.try_into().expect("it has 8 bytes"));
                if !(0..=etcd_form::NUMBER_MAX).contains(&revision) {
                    return Err(content("auth", "has a revision that is none"));
                }
            }
            keys::AUTH_ENABLED | keys::AUTH_REVISION => return Err(content("auth", "has a value of the wrong length")),
            // What only a later release knows.
            _ => return Ok(()),
        }
        importer.put_auth(key, value);
        Ok(())
    })?;
    let other = |bucket, key: &[u8]| {
        let cause = format!(
            "has something else in the place of {:?}",
            key.escape_ascii().to_string()
        );
        content(bucket, cause)
    };
    database.visit("authUsers", |key, value, _| {
        match User::decode(value) {
            Ok(user) if user.name == key => {}
            _ => return Err(other("authUsers", key)),
        }
        importer.auth_records += 1;
        importer.put_auth(&keys::user_key(key), value);
        Ok(())
    })?;
    database.visit("authRoles", |key, value, _| {
        match Role::decode(value) {
            Ok(role) if role.name == key => {}
            _ => return Err(other("authRoles", key)),
        }
        importer.auth_records += 1;
        importer.put_auth(&keys::role_key(key), value);
        Ok(())
    })?;
    importer.finish(bumped)
}

struct Importer<'e, E: Engine> {
    engine: &'e E,
    batch: E::Batch,
    /// The newest records of the keys that the batch changes; `None` for those that it removes.
    newest: HashMap<Bytes, Option<Record>>,
    leases: HashSet<LeaseId>,
    state: StateRecord,
    last: Option<Position>,
    changes: u64,
    log_bytes: u64,
    auth_records: u64,
    scratch: Vec<u8>,
}

impl<E: Engine> Importer<'_, E> {
    fn put_auth(&mut self, key: &[u8], value: &[u8]) {
        self.state.digest = self.state.digest.wrapping_add(keys::auth_digest(key, value));
        self.batch.put(keys::AUTH, key, value);
    }

    fn lease(&mut self, key: &[u8], value: &[u8]) -> Result<(), ImportError> {
        let Lease { id, ttl, remaining_ttl } =
            Lease::decode(value).map_err(|_| content("lease", "has a value that is no lease"))?;
        if key != id.to_be_bytes() {
            return Err(content(
                "lease",
                format!("has the lease {id:x} in the place of another one"),
            ));
        }
        let record = LeaseRecord { ttl, remaining_ttl };
        self.batch
            .put(keys::LEASE, &keys::lease_key(id), &record.encode_to_vec());
        self.leases.insert(id);
        Ok(())
    }

    fn change(&mut self, key: &[u8], value: &[u8]) -> Result<(), ImportError> {
        let (at, tombstone) =
            etcd_form::revision(key).ok_or_else(|| content("key", "has a key that is no revision"))?;
        let wrong = |what: &str| content("key", format!("has a change at revision {}.{} {what}", at.main, at.sub));
        if self.last.is_some_and(|last| at <= last) {
            return Err(wrong("out of order"));
        }
        self.last = Some(at);
        self.state.revision = self.state.revision.max(at.main);
        // What etcdutl leaves behind when it bumps the revision: a change of nothing.
        if value.is_empty() {
            return Ok(());
        }
        self.changes += 1;
        let kv = KeyValue::decode(Bytes::copy_from_slice(value)).map_err(|_| wrong("that is no key and value"))?;
        if kv.key.is_empty() {
            return Err(wrong("of a key without a name"));
        }
        let sound = kv.mod_revision == at.main
            && (1..=etcd_form::NUMBER_MAX).contains(&kv.version)
            && (1..=at.main).contains(&kv.create_revision);
        if !tombstone && !sound {
            return Err(wrong("that says otherwise of itself"));
        }
        let compacted = self.state.compacted;
        let prev = self.newest(&kv.key)?;
        let prev = prev.filter(|prev| !(prev.tombstone && prev.at.main <= compacted));
        let live = prev.as_ref().filter(|prev| !prev.tombstone);
        if tombstone && live.is_none() && at.main > compacted {
            return Err(wrong("that deletes what is not there"));
        }
        if let Some(live) = live {
            self.state.digest = self.state.digest.wrapping_sub(live.digest);
            self.state.keys -= 1;
            self.state.key_bytes -= (kv.key.len() + live.value.len()) as u64;
            if live.lease != 0 && (tombstone || live.lease != kv.lease) {
                self.batch.delete(keys::LEASE, &keys::attached_key(live.lease, &kv.key));
            }
        }
        let mut record = Record {
            at,
            tombstone,
            ..Default::default()
        };
        if !tombstone {
            record.create = kv.create_revision;
            record.version = kv.version;
            record.lease = kv.lease;
            record.digest = Record::digest_of(&kv.key, at, record.create, record.version, record.lease, &kv.value);
            record.value = kv.value;
            self.state.digest = self.state.digest.wrapping_add(record.digest);
            self.state.keys += 1;
            self.state.key_bytes += (kv.key.len() + record.value.len()) as u64;
            // A lease that is gone cannot be attached to; etcd lets the key stay as it is, too.
            if record.lease != 0 && self.leases.contains(&record.lease) {
                self.batch
                    .put(keys::LEASE, &keys::attached_key(record.lease, &kv.key), &[]);
            }
        }
        // What compaction has passed is not pointed to, and is in the log only if a watcher may begin with it.
        if at.main > compacted
            && let Some(prev) = prev
        {
            record.prev = Some(prev.at);
            (record.depth, record.anchors) = prev.successor_links();
            if prev.at.main < compacted {
                self.put_change(&keys::kept_key(at), &kv.key, &prev);
            }
        }
        if at.main >= compacted {
            self.put_change(&keys::log_key(at), &kv.key, &record);
            self.log_bytes += (keys::REV_KEY_LEN + self.scratch.len()) as u64;
        }
        if tombstone && at.main > compacted {
            self.batch.put(keys::REV, &keys::tombstone_key(at), &kv.key);
        }
        let stays = !tombstone || at.main > compacted;
        if stays {
            self.scratch.clear();
            record.encode(&mut self.scratch);
            self.batch.put(keys::CUR, &kv.key, &self.scratch);
        } else {
            self.batch.delete(keys::CUR, &kv.key);
        }
        self.newest.insert(kv.key, stays.then_some(record));
        Ok(())
    }

    fn put_change(&mut self, place: &[u8], key: &[u8], record: &Record) {
        self.scratch.clear();
        keys::encode_change(key, record, &mut self.scratch);
        self.batch.put(keys::REV, place, &self.scratch);
    }

    fn newest(&self, key: &[u8]) -> Result<Option<Record>, EngineError> {
        if let Some(record) = self.newest.get(key) {
            return Ok(record.clone());
        }
        let data = self.engine.get(keys::CUR, key)?;
        data.map(|data| Record::decode(&data)).transpose()
    }

    fn write(&mut self) -> Result<(), EngineError> {
        let batch = std::mem::replace(&mut self.batch, self.engine.batch());
        self.engine.write(batch)?;
        self.newest.clear();
        Ok(())
    }

    fn finish(mut self, bumped: Option<i64>) -> Result<Imported, ImportError> {
        // After a compaction of everything, its revision is all that is left of the newest one.
        self.state.revision = self.state.revision.max(self.state.compacted);
        if let Some(bumped) = bumped {
            self.state.revision = bumped;
        }
        if self.state.compacted >= 0 {
            self.batch
                .put(keys::META, keys::COMPACTED, &self.state.compacted.to_be_bytes());
        }
        let sizes = SizesRecord {
            log_bytes: self.log_bytes,
        };
        self.batch.put(keys::META, keys::SIZES, &sizes.encode_to_vec());
        self.batch.put(keys::META, keys::STATE, &self.state.encode_to_vec());
        self.write()?;
        self.engine.flush()?;
        Ok(Imported {
            revision: self.state.revision,
            compacted: self.state.compacted,
            keys: self.state.keys,
            changes: self.changes,
            leases: self.leases.len() as u64,
            auth: self.auth_records,
        })
    }
}

/// What is in a database file, as etcdutl's `snapshot status` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileStatus {
    /// CRC-32C of all buckets: their names, keys and values.
    pub hash: u32,
    /// The newest revision.
    pub revision: i64,
    /// Live keys.
    pub keys: u64,
    /// Bytes of the database.
    pub bytes: u64,
    /// Its storage version; empty before etcd 3.6.
    pub version: String,
}

/// Reads a database file through and says what is in it. `progress` is told how many bytes were read, now and then.
///
/// # Errors
/// [`ImportError`].
pub fn status<S: Source>(reader: &Reader<S>, progress: &mut dyn FnMut(u64)) -> Result<FileStatus, ImportError> {
    let database = Database::open(reader)?;
    let meta = database.meta()?;
    let mut status = FileStatus {
        bytes: reader.bytes(),
        version: meta.version.clone().unwrap_or_default(),
        ..FileStatus::default()
    };
    let (mut done, mut told) = (0, 0);
    for bucket in &database.buckets {
        status.hash = crc32c::crc32c_append(status.hash, &bucket.name);
        let mut entries = reader.entries(bucket)?;
        loop {
            let read = done + entries.bytes_read();
            let Some((key, value)) = entries.next()? else {
                done = read;
                break;
            };
            if read >= told + BATCH_BYTES as u64 {
                told = read;
                progress(read);
            }
            status.hash = crc32c::crc32c_append(status.hash, key);
            status.hash = crc32c::crc32c_append(status.hash, value);
            if bucket.name != b"key" {
                continue;
            }
            let (at, tombstone) =
                etcd_form::revision(key).ok_or_else(|| content("key", "has a key that is no revision"))?;
            status.revision = at.main;
            let kv = KeyValue::decode(value).map_err(|_| content("key", "has a value that is no key and value"))?;
            // Before a finished compaction each key has one change at most, and after it everything is there, the first
            // of each key with version 1. So nothing has to be remembered to count them.
            if at.main <= meta.finished {
                status.keys += u64::from(!tombstone);
            } else if tombstone {
                status.keys = status.keys.saturating_sub(1);
            } else {
                status.keys += u64::from(kv.version <= 1);
            }
        }
    }
    Ok(status)
}
