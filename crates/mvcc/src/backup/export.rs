//! From an engine view to a database file.
//!
//! The file wants all changes in order of their revisions. What happened after the compacted revision is in the log in
//! that order. What compaction left of the time before, the *survivors*, lies in the order of keys and is sorted first:
//! in memory, and beyond that in a file that has no name and is gone with the process. The file is then walked through
//! twice: for its shape, which its first pages and the number of bytes to come need, and for its content. The view does
//! not change, so both are alike; no more than a few pages are ever in memory, and nothing else goes to disk.

use std::io::Write;
use std::path::PathBuf;

use api::kv::Member;
use api::limits::ETCD_CLUSTER_VERSION;
use prost::Message;
use serde_json::json;
use storage::bbolt::{Shape, WriteError, Writer};
use storage::{Cursor, EngineError, KeyRange, SortError, Sorted, Sorter, View};

use super::{BUCKETS, CONF_STATE, CONSISTENT_INDEX, FINISHED, Lease, SCHEDULED, STORAGE_VERSION, TERM};
use crate::Membership;
use crate::etcd_form;
use crate::hash::History;
use crate::keys::{self, AlarmsRecord, LeaseRecord, Position, RecordRef, StateRecord};

/// Values that are larger stay where they are while survivors are sorted: reading one of those once more costs less than
/// moving it.
const SORTED_VALUE_BYTES_MAX: usize = 16 << 10;

/// Where survivors are sorted that do not fit into memory.
#[derive(Debug, Clone)]
pub struct Scratch {
    /// A directory.
    pub dir: PathBuf,
    /// How much space may be used there, in bytes. If it is not enough for the values they stay where they are, which
    /// takes longer; and if it is not enough for the keys it is an error.
    pub bytes_max: u64,
    /// Whether values may be moved at all: reading them once more in any order is cheap where they are in memory.
    pub with_values: bool,
}

/// Why a state could not be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The state cannot be read.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The survivors cannot be sorted.
    #[error(transparent)]
    Sort(#[from] SortError),
    /// The file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// What takes the entries of a database, bucket by bucket, each in order.
trait Sink {
    fn bucket(&mut self, name: &'static str) -> Result<(), WriteError>;
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), WriteError>;
    /// An entry of which only the length of the value is known.
    fn put_length(&mut self, key: &[u8], value_bytes: usize) -> Result<(), WriteError>;
}

impl<W: Write> Sink for Writer<W> {
    fn bucket(&mut self, name: &'static str) -> Result<(), WriteError> {
        Writer::bucket(self, name)
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), WriteError> {
        Writer::put(self, key, value)
    }

    fn put_length(&mut self, key: &[u8], value_bytes: usize) -> Result<(), WriteError> {
        Writer::put_length(self, key, value_bytes)
    }
}

/// Makes the hash that etcd makes of its file: names of buckets, keys and values, without what says how far a member is.
#[derive(Default)]
struct Hasher {
    crc: u32,
    bucket: &'static str,
}

impl Sink for Hasher {
    fn bucket(&mut self, name: &'static str) -> Result<(), WriteError> {
        self.bucket = name;
        self.crc = crc32c::crc32c_append(self.crc, name.as_bytes());
        Ok(())
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), WriteError> {
        let ignored = [CONSISTENT_INDEX, TERM, STORAGE_VERSION]
            .iter()
            .any(|name| key == name.as_bytes());
        if !(self.bucket == "meta" && ignored) {
            self.crc = crc32c::crc32c_append(crc32c::crc32c_append(self.crc, key), value);
        }
        Ok(())
    }

    fn put_length(&mut self, _: &[u8], _: usize) -> Result<(), WriteError> {
        Err(WriteError::Entries("a value is missing"))
    }
}

/// A view that is ready to be written as a database file.
pub struct Export<'v, V> {
    view: &'v V,
    state: StateRecord,
    membership: Membership,
    survivors: Sorted,
    shape: Shape,
}

/// What is sorted of a survivor, after its position: first a byte that says what follows.
mod survivor {
    /// A value as etcd stores it.
    pub(super) const VALUE: u8 = 0;
    /// The same of a deletion.
    pub(super) const TOMBSTONE: u8 = 1;
    /// The length of such a value (8 bytes big endian), and the key whose newest record it is.
    pub(super) const NEWEST: u8 = 2;
}

impl<'v, V: View> Export<'v, V> {
    /// Sorts what must be sorted and learns the shape of the file: reads the whole view once.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn prepare(view: &'v V, scratch: &Scratch) -> Result<Self, ExportError> {
        let mut export = Export::sort(view, scratch)?;
        let mut measuring = Writer::<Vec<u8>>::measuring();
        export.fill(&mut measuring, true)?;
        export.shape = measuring.finish()?;
        Ok(export)
    }

    /// The hash that etcd would make of the file, and the newest revision in it.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn hash(view: &'v V, scratch: &Scratch) -> Result<(u32, i64), ExportError> {
        let export = Export::sort(view, scratch)?;
        let mut hasher = Hasher::default();
        export.fill(&mut hasher, false)?;
        Ok((hasher.crc, export.state.revision))
    }

    fn sort(view: &'v V, scratch: &Scratch) -> Result<Self, ExportError> {
        let meta = |key| view.get(keys::META, key);
        let state = match meta(keys::STATE)? {
            Some(data) => StateRecord::decode(data).map_err(|error| keys::corrupt("meta", error))?,
            None => StateRecord::initial(),
        };
        let membership = meta(keys::MEMBERSHIP)?.unwrap_or_default();
        let membership = Membership::decode(membership).map_err(|error| keys::corrupt("meta", error))?;
        Ok(Export {
            view,
            survivors: sort_survivors(view, &state, scratch)?,
            state,
            membership,
            shape: Writer::<Vec<u8>>::measuring().finish()?,
        })
    }

    /// The size of the file, in bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.bytes()
    }

    /// The newest revision in it.
    pub fn revision(&self) -> i64 {
        self.state.revision
    }

    /// Writes the file, front to back, in pieces of whole pages.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn write(&self, out: impl Write) -> Result<(), ExportError> {
        let mut writer = Writer::new(out, self.shape)?;
        self.fill(&mut writer, false)?;
        writer.finish()?;
        Ok(())
    }

    fn fill(&self, sink: &mut impl Sink, measuring: bool) -> Result<(), ExportError> {
        for bucket in BUCKETS {
            sink.bucket(bucket)?;
            match bucket {
                "alarm" => self.put_alarms(sink)?,
                "auth" => {
                    for name in [keys::AUTH_ENABLED, keys::AUTH_REVISION] {
                        if let Some(value) = self.view.get(keys::AUTH, name)? {
                            sink.put(name, &value)?;
                        }
                    }
                }
                "authRoles" => self.put_auth(sink, keys::role_range())?,
                "authUsers" => self.put_auth(sink, keys::user_range())?,
                "cluster" => sink.put(b"clusterVersion", ETCD_CLUSTER_VERSION.as_bytes())?,
                "key" => {
                    self.put_survivors(sink, measuring)?;
                    self.put_log(sink)?;
                }
                "lease" => self.put_leases(sink)?,
                "members" => self.put_members(sink)?,
                "members_removed" => {
                    for id in by_name(self.membership.removed.iter().copied()) {
                        sink.put(id.as_bytes(), b"removed")?;
                    }
                }
                "meta" => self.put_meta(sink)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn put_auth(&self, sink: &mut impl Sink, (start, end): ([u8; 1], [u8; 1])) -> Result<(), ExportError> {
        let range = KeyRange {
            start: &start,
            end: Some(&end),
        };
        let mut cursor = self.view.cursor(keys::AUTH, range)?;
        cursor.seek_first()?;
        while let Some((key, value)) = cursor.entry() {
            sink.put(&key[start.len()..], value)?;
            cursor.next()?;
        }
        Ok(())
    }

    fn put_alarms(&self, sink: &mut impl Sink) -> Result<(), ExportError> {
        let alarms = self.view.get(keys::META, keys::ALARMS)?.unwrap_or_default();
        let alarms = AlarmsRecord::decode(alarms).map_err(|error| keys::corrupt("meta", error))?;
        let mut alarms: Vec<_> = alarms.alarms.iter().map(Message::encode_to_vec).collect();
        alarms.sort();
        for alarm in alarms {
            sink.put(&alarm, &[])?;
        }
        Ok(())
    }

    fn put_leases(&self, sink: &mut impl Sink) -> Result<(), ExportError> {
        // etcd's ids are in order as unsigned numbers, ours as signed ones.
        let (start, end) = keys::lease_range();
        let zero = keys::lease_key(0);
        for (start, end) in [(&zero[..], &end[..]), (&start[..], &zero[..])] {
            let mut cursor = self.view.cursor(keys::LEASE, KeyRange { start, end: Some(end) })?;
            cursor.seek_first()?;
            while let Some((key, value)) = cursor.entry() {
                let id = keys::lease_id_of(key)?;
                let LeaseRecord { ttl, remaining_ttl } =
                    LeaseRecord::decode(value).map_err(|error| keys::corrupt("lease", error))?;
                let lease = Lease { id, ttl, remaining_ttl };
                sink.put(&id.to_be_bytes(), &lease.encode_to_vec())?;
                cursor.next()?;
            }
        }
        Ok(())
    }

    fn put_members(&self, sink: &mut impl Sink) -> Result<(), ExportError> {
        let mut members: Vec<(String, &Member)> = self
            .membership
            .members
            .iter()
            .map(|member| (format!("{:x}", member.id), member))
            .collect();
        members.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, member) in members {
            let mut json = json!({ "id": member.id, "peerURLs": member.peer_urls });
            if member.is_learner {
                json["isLearner"] = true.into();
            }
            if !member.name.is_empty() {
                json["name"] = member.name.as_str().into();
            }
            if !member.client_urls.is_empty() {
                json["clientURLs"] = member.client_urls.as_slice().into();
            }
            sink.put(name.as_bytes(), json.to_string().as_bytes())?;
        }
        Ok(())
    }

    fn put_meta(&self, sink: &mut impl Sink) -> Result<(), ExportError> {
        let mut conf_state = json!({ "voters": self.membership.voters().collect::<Vec<_>>(), "auto_leave": false });
        let learners: Vec<_> = self.membership.learners().collect();
        if !learners.is_empty() {
            conf_state["learners"] = learners.into();
        }
        let mut entries = vec![
            (CONF_STATE, conf_state.to_string().into_bytes()),
            (CONSISTENT_INDEX, self.state.applied_index.to_be_bytes().to_vec()),
            (STORAGE_VERSION, ETCD_CLUSTER_VERSION.as_bytes().to_vec()),
            (TERM, self.state.applied_term.to_be_bytes().to_vec()),
        ];
        if self.state.compacted >= 0 {
            let mut revision = Vec::new();
            etcd_form::put_revision(Position::start_of(self.state.compacted), false, &mut revision);
            entries.push((FINISHED, revision.clone()));
            entries.push((SCHEDULED, revision));
        }
        entries.sort();
        for (key, value) in entries {
            sink.put(key.as_bytes(), &value)?;
        }
        Ok(())
    }

    fn put_survivors(&self, sink: &mut impl Sink, measuring: bool) -> Result<(), ExportError> {
        let (mut at, mut value) = (Vec::new(), Vec::new());
        self.survivors.visit(|position, survivor| {
            let position = keys::position_of(position)?;
            let (&kind, rest) = survivor.split_first().expect("it was made with its kind");
            at.clear();
            etcd_form::put_revision(position, kind == survivor::TOMBSTONE, &mut at);
            if kind != survivor::NEWEST {
                return Ok(sink.put(&at, rest)?);
            }
            let (length, key) = rest.split_at(8);
            if measuring {
                let length = u64::from_be_bytes(length.try_into().expect("8 bytes"));
                return Ok(sink.put_length(&at, length as usize)?);
            }
            let data = self.view.get(keys::CUR, key)?;
            let data = data.ok_or_else(|| keys::corrupt("cur", "a key is gone from a view"))?;
            value.clear();
            etcd_form::put_key_value(key, &RecordRef::decode(&data)?, &mut value);
            Ok(sink.put(&at, &value)?)
        })
    }

    fn put_log(&self, sink: &mut impl Sink) -> Result<(), ExportError> {
        let (mut at, mut value) = (Vec::new(), Vec::new());
        let mut result = Ok(());
        let history = History::new(self.view, self.state.compacted, self.state.revision);
        history.walk_log(self.state.compacted + 1, self.state.revision + 1, |_, key, record| {
            at.clear();
            value.clear();
            etcd_form::put_revision(record.at, record.tombstone, &mut at);
            etcd_form::put_key_value(key, &record, &mut value);
            result = sink.put(&at, &value);
            Ok(result.is_ok())
        })?;
        Ok(result?)
    }
}

/// Ids as etcd names them, in the order of the names.
fn by_name(ids: impl Iterator<Item = u64>) -> Vec<String> {
    let mut names: Vec<_> = ids.map(|id| format!("{id:x}")).collect();
    names.sort();
    names
}

/// Everything at or before the compacted revision that a compaction of etcd would have left, in order.
fn sort_survivors<V: View>(view: &V, state: &StateRecord, scratch: &Scratch) -> Result<Sorted, ExportError> {
    let mut sorter = Sorter::new(&scratch.dir, scratch.bytes_max);
    if state.compacted < 0 {
        return Ok(sorter.finish()?);
    }
    // Each with its position and what goes before it, about.
    let all_values = state.key_bytes + 64 * state.keys;
    let with_values = scratch.with_values && all_values <= scratch.bytes_max;
    let (mut out, mut pushed) = (Vec::new(), Ok(()));
    let mut push = |key: &[u8], record: RecordRef<'_>, is_newest: bool| {
        if pushed.is_err() {
            return;
        }
        out.clear();
        if is_newest && (!with_values || record.value.len() > SORTED_VALUE_BYTES_MAX) {
            out.push(survivor::NEWEST);
            out.extend_from_slice(&[0; 8]);
            etcd_form::put_head(key, &record, &mut out);
            etcd_form::put_tail(&record, &mut out);
            let length = (out.len() - 9 + record.value.len()) as u64;
            out[1..9].copy_from_slice(&length.to_be_bytes());
            out.truncate(9);
            out.extend_from_slice(key);
        } else {
            out.push(if record.tombstone {
                survivor::TOMBSTONE
            } else {
                survivor::VALUE
            });
            etcd_form::put_key_value(key, &record, &mut out);
        }
        pushed = sorter.push(&keys::log_key(record.at), &out);
    };
    let history = History::new(view, state.compacted, state.revision);
    let mut cursor = view.cursor(keys::CUR, KeyRange { start: &[], end: None })?;
    cursor.seek_first()?;
    while let Some((key, data)) = cursor.entry() {
        let record = RecordRef::decode(data)?;
        if !record.tombstone && record.at.main <= state.compacted {
            push(key, record, true);
        }
        cursor.next()?;
    }
    history.walk_replaced(state.compacted, None, |key, record| push(key, record, false))?;
    // A deletion at just that revision stays as well, since etcd 3.6.
    history.walk_log(state.compacted, state.compacted + 1, |_, key, record| {
        if record.tombstone {
            push(key, record, false);
        }
        Ok(true)
    })?;
    pushed?;
    Ok(sorter.finish()?)
}
