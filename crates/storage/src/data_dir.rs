//! The data directory of a member: what lies where, whose it is, and that one process has it.
//!
//! ```text
//! METASTORE   who this directory belongs to; written last, so a directory without it holds nothing yet
//! LOCK        locked while a process has the directory; holds its process id
//! raft/       the Raft log (elsewhere if a directory of its own was given for it)
//! rocksdb/    the engine's files, or
//! memory/
//! rocksdb.N/  an engine that began with a snapshot of another member (memory.N/ likewise)
//! ENGINE      which of them is in use; the first one if it is missing
//! RESTORING   there while a backup is being restored; beside METASTORE it means nothing any more
//! ```

mod engines;
mod identity;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use crate::disk::sync_dir;
pub use engines::EngineDir;
pub use identity::{FORMAT_VERSION, Identity, StorageKind};

const IDENTITY: &str = "METASTORE";
const IDENTITY_DRAFT: &str = "METASTORE.draft";
const LOCK: &str = "LOCK";
const RESTORING: &str = "RESTORING";
const RAFT: &str = "raft";
/// As etcd has it: nobody else may read keys and passwords.
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// Why a data directory was refused. Nothing was changed on disk then. Each says in one line what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataDirError {
    /// The path leads to a file.
    #[error("{} is not a directory; choose another data directory", .path.display())]
    NotADirectory {
        /// The path given.
        path: PathBuf,
    },
    /// The operating system does not let this user work in it.
    #[error("cannot {action} {}: {cause}; give the user that runs metastore all rights to it", .path.display())]
    NoAccess {
        /// The directory or file.
        path: PathBuf,
        /// What was tried, as a verb phrase.
        action: &'static str,
        /// The words of the operating system.
        cause: String,
    },
    /// It holds the files of something else.
    #[error("{} holds {found}, which metastore did not write; choose an empty directory", .path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// A name in it.
        found: String,
    },
    /// It holds the files of an etcd member.
    #[error("{} is the data directory of an etcd member; choose an empty directory and import a snapshot of etcd into it", .path.display())]
    Etcd {
        /// The directory.
        path: PathBuf,
    },
    /// A backup was being restored into it.
    #[error("{} holds a backup that was not restored to its end; remove the directory and restore it again", .path.display())]
    HalfRestored {
        /// The directory.
        path: PathBuf,
    },
    /// There is something in it already.
    #[error("{} is not empty; choose another directory, or remove it if its data is of no more use", .path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// Another process has it.
    #[error("{} is in use by the process {pid}; stop that process or choose another data directory", .path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// The process id that it wrote, or `?`.
        pid: String,
    },
    /// A later release wrote it.
    #[error("{} has the format version {found}, this release knows versions up to {known}; run the release that wrote it or a later one", .path.display())]
    NewerFormat {
        /// The directory.
        path: PathBuf,
        /// Its format version.
        found: u32,
        /// The newest one known here.
        known: u32,
    },
    /// It was made for the other engine.
    #[error("{} was made with storage {found}, but {asked} is asked for; start with storage {found}, or remove the member and let it join anew with an empty directory", .path.display())]
    OtherStorage {
        /// The directory.
        path: PathBuf,
        /// What it was made with.
        found: StorageKind,
        /// What was asked for.
        asked: StorageKind,
    },
    /// The identity file cannot be read.
    #[error("{} is damaged ({cause}); restore it from a backup, or remove the member and let it join anew with an empty directory", .file.display())]
    DamagedIdentity {
        /// The identity file.
        file: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The file that names the engine directory cannot be read.
    #[error("{} is damaged; remove the member and let it join anew with an empty directory", .file.display())]
    DamagedPointer {
        /// The file.
        file: PathBuf,
    },
    /// The Raft log lies elsewhere.
    #[error("the Raft log of {} is not in {}; start with the same directory for the Raft log as when the member was made", .path.display(), .raft.display())]
    RaftElsewhere {
        /// The data directory.
        path: PathBuf,
        /// Where the Raft log was looked for.
        raft: PathBuf,
    },
}

/// A data directory that this process holds the lock of, until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    raft: PathBuf,
    storage: StorageKind,
    identity: Option<Identity>,
    /// Locked as long as it is open.
    _lock: File,
}

impl DataDir {
    /// Takes hold of the data directory `path` for a member with `storage`. It is created, with rights for its owner
    /// only, if it is missing. `raft` is a directory for the Raft log alone, as on a disk of its own; `None` keeps the
    /// log in the data directory.
    ///
    /// # Errors
    /// See [`DataDirError`]. Nothing is changed on disk then.
    pub fn open(path: &Path, raft: Option<&Path>, storage: StorageKind) -> Result<DataDir, DataDirError> {
        // Everything that can refuse only looks; the lock, which must be written, comes after.
        look(path, raft, storage)?;
        create_dir(path)?;
        let lock = lock(path)?;
        // Once more: a process may have made the directory between the look and the lock.
        let identity = look(path, raft, storage)?;
        write_pid(&lock).map_err(no_access("write", &path.join(LOCK)))?;
        warn_if_open_to_others(path);
        let raft = raft.map_or_else(|| path.join(RAFT), Path::to_path_buf);
        Ok(DataDir {
            path: path.to_owned(),
            raft,
            storage,
            identity,
            _lock: lock,
        })
    }

    /// Takes hold of an empty or missing directory in order to restore a backup into it: the engine goes to the first
    /// [`DataDir::engine_dir`] and the log to [`DataDir::raft_dir`], which exist on return. Nobody takes the directory
    /// for a member's until [`DataDir::initialize`] makes it one; a restore that breaks off leaves one that is refused.
    ///
    /// # Errors
    /// [`DataDirError::NotEmpty`], and those of [`DataDir::open`].
    pub fn begin_restore(path: &Path, raft: Option<&Path>, storage: StorageKind) -> Result<DataDir, DataDirError> {
        for dir in [Some(path), raft].into_iter().flatten() {
            let names = names(dir)?.unwrap_or_default();
            if names.iter().any(|name| !matches!(name.as_str(), LOCK | "lost+found")) {
                return Err(DataDirError::NotEmpty { path: dir.to_owned() });
            }
        }
        let data_dir = DataDir::open(path, raft, storage)?;
        for dir in [Some(path), raft].into_iter().flatten() {
            create_dir(dir)?;
            let marker = dir.join(RESTORING);
            write_file(dir, &dir.join("RESTORING.draft"), &marker, b"").map_err(no_access("write", &marker))?;
        }
        create_dir(&data_dir.raft)?;
        create_dir(&path.join(storage.to_string()))?;
        Ok(data_dir)
    }

    /// Removes what a restore that failed has put into the directory, so that it can be tried again.
    pub fn abandon_restore(self) {
        let outside = (self.raft != self.path.join(RAFT)).then_some(&self.raft);
        for dir in [Some(&self.path), outside].into_iter().flatten() {
            for name in names(dir).ok().flatten().unwrap_or_default() {
                let path = dir.join(&name);
                // The marker last: as long as anything else may be left, it says so. Best effort, on the way to an error.
                if name != RESTORING && name != "lost+found" {
                    let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
                }
            }
            let _ = fs::remove_file(dir.join(RESTORING));
            let _ = fs::remove_dir(dir);
        }
    }

    /// The data directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the Raft log goes. Exists once there is an identity.
    pub fn raft_dir(&self) -> &Path {
        &self.raft
    }

    /// Which engine the directory is for.
    pub fn storage(&self) -> StorageKind {
        self.storage
    }

    /// Whose directory it is; `None` as long as it is empty.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Makes an empty directory that of `identity`: creates the directories in it and then, durably, its identity file.
    ///
    /// # Errors
    /// [`DataDirError::NoAccess`] when the file system fails. A crash or failure on the way leaves a directory that can
    /// be initialized again.
    ///
    /// # Panics
    /// When the directory has an identity already, or `identity` is for another storage.
    pub fn initialize(&mut self, identity: Identity) -> Result<(), DataDirError> {
        assert!(self.identity.is_none(), "a data directory is initialized once");
        create_dir(&self.raft)?;
        create_dir(&self.path.join(self.storage.to_string()))?;
        self.write_identity(identity)
    }

    /// Gives the directory another identity of the same storage, as when a new cluster begins with the data of an old one.
    ///
    /// # Errors
    /// [`DataDirError::NoAccess`] when the file system fails.
    ///
    /// # Panics
    /// When the directory has no identity yet, or `identity` is for another storage.
    pub fn replace_identity(&mut self, identity: Identity) -> Result<(), DataDirError> {
        assert!(
            self.identity.is_some(),
            "a data directory without an identity is initialized"
        );
        self.write_identity(identity)
    }

    fn write_identity(&mut self, identity: Identity) -> Result<(), DataDirError> {
        assert_eq!(
            identity.storage, self.storage,
            "the identity is for the storage that the directory was opened with"
        );
        // The Raft log's own directory first: alone in an otherwise empty directory, its copy binds nobody.
        if self.raft != self.path.join(RAFT) {
            write_identity(&self.raft, &identity)?;
        }
        write_identity(&self.path, &identity)?;
        self.identity = Some(identity);
        for dir in [&self.path, &self.raft] {
            // It means nothing any more, and its being gone need not be durable.
            let _ = fs::remove_file(dir.join(RESTORING));
        }
        Ok(())
    }
}

/// Checks everything that can be checked without writing, and reads the identity.
fn look(path: &Path, raft: Option<&Path>, storage: StorageKind) -> Result<Option<Identity>, DataDirError> {
    let identity = match names(path)? {
        Some(names) => {
            check_rights(path)?;
            look_at(path, &names)?
        }
        None => None,
    };
    if let Some(identity) = &identity
        && identity.storage != storage
    {
        let found = identity.storage;
        return Err(DataDirError::OtherStorage {
            path: path.to_owned(),
            found,
            asked: storage,
        });
    }

    let inside = path.join(RAFT);
    let raft = raft.unwrap_or(&inside);
    let elsewhere = || DataDirError::RaftElsewhere {
        path: path.to_owned(),
        raft: raft.to_owned(),
    };
    let raft_names = names(raft)?;
    if raft_names.is_some() {
        check_rights(raft)?;
    }
    match (&identity, raft_names) {
        (Some(_), None) => Err(elsewhere()),
        (Some(identity), Some(names)) if raft != inside => {
            if look_at(raft, &names)?.as_ref() != Some(identity) || inside.exists() {
                return Err(elsewhere());
            }
            Ok(Some(identity.clone()))
        }
        (None, Some(names)) if raft != inside => {
            // A copy of an identity that is alone is left from an initialization that did not finish.
            look_at(raft, &names)?;
            match names
                .iter()
                .find(|name| !matches!(name.as_str(), IDENTITY | IDENTITY_DRAFT | "lost+found"))
            {
                None => Ok(None),
                Some(found) => Err(DataDirError::NotOurs {
                    path: raft.to_owned(),
                    found: found.clone(),
                }),
            }
        }
        _ => Ok(identity),
    }
}

/// The identity in a directory that holds `names`; `None` if it is as good as empty.
fn look_at(path: &Path, names: &[String]) -> Result<Option<Identity>, DataDirError> {
    if names.iter().any(|name| name == IDENTITY) {
        return identity::read(path, &path.join(IDENTITY)).map(Some);
    }
    if names.iter().any(|name| name == RESTORING) {
        return Err(DataDirError::HalfRestored { path: path.to_owned() });
    }
    if names.iter().any(|name| name == "member") && path.join("member").is_dir() {
        return Err(DataDirError::Etcd { path: path.to_owned() });
    }
    for name in names {
        let unfinished = match name.as_str() {
            LOCK | IDENTITY_DRAFT | "lost+found" => true,
            RAFT | "rocksdb" | "memory" => self::names(&path.join(name))?.is_some_and(|inside| inside.is_empty()),
            _ => false,
        };
        if !unfinished {
            return Err(DataDirError::NotOurs {
                path: path.to_owned(),
                found: name.clone(),
            });
        }
    }
    Ok(None)
}

/// The sorted names in a directory; `None` if there is no such directory.
fn names(path: &Path) -> Result<Option<Vec<String>>, DataDirError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            return Err(DataDirError::NotADirectory { path: path.to_owned() });
        }
        Err(error) => return Err(no_access("read", path)(error)),
    };
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(no_access("read", path))?;
    names.sort();
    Ok(Some(names))
}

fn check_rights(path: &Path) -> Result<(), DataDirError> {
    rustix::fs::access(path, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| no_access("write to", path)(error.into()))
}

fn no_access(action: &'static str, path: &Path) -> impl Fn(io::Error) -> DataDirError {
    let path = path.to_owned();
    move |error| DataDirError::NoAccess {
        path: path.clone(),
        action,
        cause: error.to_string(),
    }
}

fn create_dir(path: &Path) -> Result<(), DataDirError> {
    let to_sync = parents_of_new(path);
    let builder = &mut DirBuilder::new();
    builder
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(path)
        .map_err(no_access("create", path))?;
    // From above: nothing below a directory is there after a crash if that directory is not.
    for parent in to_sync.into_iter().rev() {
        sync_dir(parent).map_err(no_access("sync", parent))?;
    }
    Ok(())
}

/// The directories that get a new entry when `path` is created with all that it is in, from below. That of `path` itself
/// is always among them: an earlier attempt may have created it and not got further.
fn parents_of_new(path: &Path) -> Vec<&Path> {
    let parents = path.ancestors().skip(1);
    let mut to_sync = Vec::new();
    for parent in parents {
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        to_sync.push(parent);
        if parent.exists() {
            break;
        }
    }
    to_sync
}

fn lock(path: &Path) -> Result<File, DataDirError> {
    let file = path.join(LOCK);
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE);
    let mut lock = options.open(&file).map_err(no_access("open", &file))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let pid = match lock.read_to_string(&mut pid) {
                Ok(_) if !pid.trim().is_empty() => pid.trim().to_owned(),
                _ => "?".to_owned(),
            };
            Err(DataDirError::Locked {
                path: path.to_owned(),
                pid,
            })
        }
        Err(fs::TryLockError::Error(error)) => Err(no_access("lock", &file)(error)),
    }
}

fn write_pid(mut lock: &File) -> io::Result<()> {
    lock.set_len(0)?;
    lock.write_all(format!("{}\n", std::process::id()).as_bytes())
}

fn warn_if_open_to_others(path: &Path) {
    if let Ok(metadata) = fs::metadata(path) {
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            tracing::warn!(path = %path.display(), mode = %format_args!("{mode:o}"), "other users can reach into the data directory; mode 700 is advised");
        }
    }
}

fn write_identity(dir: &Path, identity: &Identity) -> Result<(), DataDirError> {
    let draft = dir.join(IDENTITY_DRAFT);
    let text = identity::encode(identity);
    write_file(dir, &draft, &dir.join(IDENTITY), text.as_bytes()).map_err(no_access("write", &draft))
}

/// Puts a file into `dir` in one step, durably: the one that was there, if any, is replaced or left alone.
fn write_file(dir: &Path, draft: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE_MODE)
        .open(draft)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(draft, path)?;
    sync_dir(dir)
}

#[cfg(test)]
mod tests;
