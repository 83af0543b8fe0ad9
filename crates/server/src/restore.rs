//! A data directory from a backup: `metastore snapshot restore`.
//!
//! The new member begins a new cluster with the data of the backup: its log begins with the first members, as that of
//! every new cluster does, and its engine with everything else. The directory becomes a member's with its last file, so
//! whatever breaks off before leaves one that no member starts with.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use api::limits::METASTORE_VERSION;
use mvcc::backup::{self, FileStatus, ImportError, Imported};
use sha2::{Digest, Sha256};
use storage::bbolt::{Reader, Source};
use storage::{
    DataDir, DataDirError, Engine, EngineError, Identity, LogError, RaftEngineLog, RaftLogOptions, StorageKind,
};

use crate::bootstrap::{self, InitialMembers};
use crate::identity;
use crate::serve::{EngineConfig, ServeError};

/// The bytes of the hash at the end of a backup.
const HASH_BYTES: u64 = 32;
/// Sizes of databases are multiples of this, which tells those with a hash at their end from those without one.
const SECTOR_BYTES: u64 = 512;
/// Bytes that are read at once.
const READ_BYTES: usize = 1 << 20;

/// What to restore, and for whom. The members, the name and the token are those that etcd's flags give.
#[derive(Debug, Clone)]
pub struct RestoreConfig {
    /// The backup: a database of etcd, as Snapshot sends it, or a copy of its `member/snap/db`.
    pub file: PathBuf,
    /// Where the data is to lie: missing or empty.
    pub data_dir: PathBuf,
    /// Where the Raft log is to lie, if elsewhere: missing or empty.
    pub wal_dir: Option<PathBuf>,
    /// What is to hold the data.
    pub engine: EngineConfig,
    /// This member's name.
    pub name: String,
    /// All members, by name, with their peer URLs. It holds this member.
    pub initial_members: InitialMembers,
    /// The cluster's token.
    pub cluster_token: String,
    /// Believe a file that has no hash, or another one.
    pub skip_hash_check: bool,
    /// What to add to the newest revision, marking everything before as compacted; 0 for nothing.
    pub bump_revision: u64,
}

/// Why a backup was not restored. Nothing is left of the attempt, unless the file system fails.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The backup cannot be read.
    #[error("cannot read {}: {cause}", .file.display())]
    File {
        /// The backup.
        file: PathBuf,
        /// The words of the operating system.
        cause: io::Error,
    },
    /// The backup has no hash.
    #[error("{} has no hash at its end, so nobody knows whether it is whole; for a copy of a database file use --skip-hash-check", .file.display())]
    NoHash {
        /// The backup.
        file: PathBuf,
    },
    /// The backup is not what was saved.
    #[error("{} is damaged: its SHA-256 is {found}, and it was saved with {expected}", .file.display())]
    WrongHash {
        /// The backup.
        file: PathBuf,
        /// In hexadecimal.
        expected: String,
        /// In hexadecimal.
        found: String,
    },
    /// What is in the backup is of no use.
    #[error("{} cannot be restored: {cause}", .file.display())]
    Content {
        /// The backup.
        file: PathBuf,
        /// What is wrong with it.
        cause: ImportError,
    },
    /// The data directory is of no use.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The engine fails.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The log fails.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What was in the backup.
    pub imported: Imported,
    /// The new member.
    pub member_id: u64,
    /// The new cluster.
    pub cluster_id: u64,
}

/// How far a restore is: what is being done, bytes done, bytes in all.
pub type Progress<'a> = &'a mut dyn FnMut(&'static str, u64, u64);

/// A backup that is open: a file, without the hash at its end.
struct Backup {
    file: File,
    bytes: u64,
    has_hash: bool,
}

impl Source for Backup {
    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset)
    }
}

fn open(path: &Path) -> Result<Backup, RestoreError> {
    let failed = |cause| RestoreError::File {
        file: path.to_owned(),
        cause,
    };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is not a file")));
    }
    let size = metadata.len();
    let has_hash = size % SECTOR_BYTES == HASH_BYTES;
    Ok(Backup {
        bytes: if has_hash { size - HASH_BYTES } else { size },
        has_hash,
        file,
    })
}

/// Holds the file against the hash at its end.
fn check_hash(path: &Path, backup: &Backup, progress: Progress<'_>) -> Result<(), RestoreError> {
    let failed = |cause| RestoreError::File {
        file: path.to_owned(),
        cause,
    };
    if !backup.has_hash {
        return Err(RestoreError::NoHash { file: path.to_owned() });
    }
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut file = &backup.file;
    let mut done = 0;
    while done < backup.bytes {
        let left = usize::try_from(backup.bytes - done).unwrap_or(usize::MAX);
        let part = &mut buffer[..left.min(READ_BYTES)];
        file.read_exact(part).map_err(failed)?;
        sha256.update(&*part);
        done += part.len() as u64;
        progress("checking", done, backup.bytes);
    }
    let mut expected = [0; HASH_BYTES as usize];
    file.read_exact(&mut expected).map_err(failed)?;
    let found = sha256.finalize();
    if found[..] != expected {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        return Err(RestoreError::WrongHash {
            file: path.to_owned(),
            expected: hex(&expected),
            found: hex(&found),
        });
    }
    Ok(())
}

/// What is in a backup.
///
/// # Errors
/// [`RestoreError`].
pub fn status(path: &Path, progress: Progress<'_>) -> Result<FileStatus, RestoreError> {
    let content = |cause| RestoreError::Content {
        file: path.to_owned(),
        cause,
    };
    let reader = Reader::open(open(path)?).map_err(|error| content(error.into()))?;
    let bytes = reader.bytes();
    backup::status(&reader, &mut |done| progress("reading", done, bytes)).map_err(content)
}

/// Restores a backup.
///
/// # Errors
/// [`RestoreError`]. Nothing is left of the attempt then.
///
/// # Panics
/// If the members lack this one.
pub fn restore(config: &RestoreConfig, progress: Progress<'_>) -> Result<Restored, RestoreError> {
    let content = |cause| RestoreError::Content {
        file: config.file.clone(),
        cause,
    };
    // Everything about the file that can be known without reading all of it twice comes before the directory is touched.
    let backup = open(&config.file)?;
    if !config.skip_hash_check {
        check_hash(&config.file, &backup, progress)?;
    }
    let reader = Reader::open(backup).map_err(|error| content(error.into()))?;
    let storage = match config.engine {
        EngineConfig::Rocks(_) => StorageKind::RocksDb,
        EngineConfig::Memory => StorageKind::Memory,
    };
    let mut data_dir = DataDir::begin_restore(&config.data_dir, config.wal_dir.as_deref(), storage)?;
    match fill(config, &reader, &mut data_dir, progress) {
        Ok(restored) => Ok(restored),
        Err(error) => {
            data_dir.abandon_restore();
            Err(match error {
                Failure::Import(cause) => content(cause),
                Failure::Other(error) => error,
            })
        }
    }
}

enum Failure {
    Import(ImportError),
    Other(RestoreError),
}

impl<T: Into<RestoreError>> From<T> for Failure {
    fn from(error: T) -> Self {
        Failure::Other(error.into())
    }
}

fn fill(
    config: &RestoreConfig,
    reader: &Reader<impl Source>,
    data_dir: &mut DataDir,
    progress: Progress<'_>,
) -> Result<Restored, Failure> {
    let bytes = reader.bytes();
    let engine = bootstrap::open_engine(&config.engine, &data_dir.engine_dir()?.path)?;
    let imported = backup::import(reader, &engine, config.bump_revision, &mut |done| {
        progress("restoring", done, bytes);
    });
    let imported = imported.map_err(Failure::Import)?;
    let (founders, cluster_id) = bootstrap::first_members(&config.initial_members, &config.cluster_token);
    let member_id = identity::member_id(&config.initial_members[&config.name], &config.cluster_token);
    {
        let log = RaftEngineLog::open(data_dir.raft_dir(), &RaftLogOptions::default())?;
        bootstrap::found(&log, &founders).map_err(|error| match error {
            ServeError::Log(error) => Failure::Other(error.into()),
            other => unreachable!("founding writes the log and nothing else: {other}"),
        })?;
    }
    engine.flush()?;
    drop(engine);
    data_dir.initialize(Identity {
        storage: data_dir.storage(),
        cluster_id,
        member_id,
        created_by: format!("metastore {METASTORE_VERSION}"),
    })?;
    Ok(Restored {
        imported,
        member_id,
        cluster_id,
    })
}
