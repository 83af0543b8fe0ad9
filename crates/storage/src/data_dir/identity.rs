//! The identity file: lines that a person can read, ended by a checksum.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::{DataDirError, no_access};

/// The newest format of a data directory that this release reads, and the one that it writes.
pub const FORMAT_VERSION: u32 = 1;

const TITLE: &str = "MetaStore data directory. Do not edit; without this file the data cannot be used.";

/// Which engine holds the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StorageKind {
    /// On disk, in RocksDB.
    #[default]
    RocksDb,
    /// In memory, with a snapshot on disk from time to time.
    Memory,
}

impl fmt::Display for StorageKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            StorageKind::RocksDb => "rocksdb",
            StorageKind::Memory => "memory",
        })
    }
}

impl FromStr for StorageKind {
    type Err = String;

    fn from_str(text: &str) -> Result<StorageKind, String> {
        match text {
            "rocksdb" => Ok(StorageKind::RocksDb),
            "memory" => Ok(StorageKind::Memory),
            _ => Err(format!("unknown storage {text:?}; known are rocksdb and memory")),
        }
    }
}

/// Whose data directory it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Which engine it is for.
    pub storage: StorageKind,
    /// The cluster.
    pub cluster_id: u64,
    /// The member.
    pub member_id: u64,
    /// The version of MetaStore that made it; one line.
    pub created_by: String,
}

pub(super) fn encode(identity: &Identity) -> String {
    let Identity {
        storage,
        cluster_id,
        member_id,
        created_by,
    } = identity;
    let text = format!(
        "{TITLE}\nformat: {FORMAT_VERSION}\nstorage: {storage}\ncluster-id: {cluster_id:016x}\nmember-id: {member_id:016x}\ncreated-by: {created_by}\n"
    );
    let checksum = checksum_line(&text);
    text + &checksum
}

fn checksum_line(text: &str) -> String {
    format!("checksum: {:08x}\n", crc32fast::hash(text.as_bytes()))
}

pub(super) fn read(dir: &Path, file: &Path) -> Result<Identity, DataDirError> {
    let bytes = std::fs::read(file).map_err(no_access("read", file))?;
    let damaged = |cause: &str| DataDirError::DamagedIdentity {
        file: file.to_owned(),
        cause: cause.to_owned(),
    };
    let text = str::from_utf8(&bytes).map_err(|_| damaged("it is not text"))?;
    let fields: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once(": ")).collect();
    let field = |name: &str| {
        fields
            .get(name)
            .copied()
            .ok_or_else(|| damaged(&format!("the line {name} is missing")))
    };

    // Before the checksum: a later format may compute that differently.
    let format = field("format")?
        .parse::<u32>()
        .map_err(|_| damaged("its format version is not a number"))?;
    if format > FORMAT_VERSION {
        return Err(DataDirError::NewerFormat {
            path: dir.to_owned(),
            found: format,
            known: FORMAT_VERSION,
        });
    }
    let (summed, stored) = text.split_at(text.rfind("checksum: ").unwrap_or(text.len()));
    if stored != checksum_line(summed) {
        return Err(damaged("its checksum does not match"));
    }

    let id = |name| u64::from_str_radix(field(name)?, 16).map_err(|_| damaged(&format!("{name} is not a number")));
    Ok(Identity {
        storage: field("storage")?.parse().map_err(|cause: String| damaged(&cause))?,
        cluster_id: id("cluster-id")?,
        member_id: id("member-id")?,
        created_by: field("created-by")?.to_owned(),
    })
}
