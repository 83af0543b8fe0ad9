//! Which of the engine directories is the member's state.
//!
//! A snapshot of another member is built in a directory of its own, beside the engine that is in use. Once it is whole
//! and on disk a small file, replaced in one step, names it as the engine from now on. Until then a crash leaves the old
//! state, from then on the new one; never a mixture.

use std::fs;
use std::path::{Path, PathBuf};

use super::{DataDir, DataDirError, create_dir, names, no_access, write_file};

/// Names the engine directory in use. Missing as long as it is the first one.
const POINTER: &str = "ENGINE";
const POINTER_DRAFT: &str = "ENGINE.draft";

/// The engine directory in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineDir {
    /// The directory.
    pub path: PathBuf,
    /// Index and term of the snapshot that it began with; `None` for the first one, which began empty. The Raft log
    /// begins right after it: if a crash kept it from being reset, that is to be done now.
    pub snapshot: Option<(u64, u64)>,
}

impl DataDir {
    /// The engine directory in use. Exists once there is an identity.
    ///
    /// # Errors
    /// When the file that names it cannot be read.
    pub fn engine_dir(&self) -> Result<EngineDir, DataDirError> {
        let file = self.path.join(POINTER);
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(EngineDir {
                    path: self.path.join(self.storage.to_string()),
                    snapshot: None,
                });
            }
            Err(error) => return Err(no_access("read", &file)(error)),
        };
        parse(&text)
            .map(|(name, index, term)| EngineDir {
                path: self.path.join(name),
                snapshot: Some((index, term)),
            })
            .ok_or(DataDirError::DamagedPointer { file })
    }

    /// An empty directory for an engine that is to be built beside the one in use.
    ///
    /// # Errors
    /// [`DataDirError::NoAccess`] when the file system fails.
    pub fn stage_engine(&self) -> Result<PathBuf, DataDirError> {
        let taken = self.engine_numbers()?.into_iter().map(|(number, _)| number).max();
        let path = self.path.join(format!("{}.{}", self.storage, taken.unwrap_or(0) + 1));
        create_dir(&path)?;
        Ok(path)
    }

    /// Makes a staged directory, whose engine is whole and on disk, the one in use: durable on return.
    ///
    /// # Errors
    /// [`DataDirError::NoAccess`] when the file system fails; which one is in use is then unknown until the next start.
    pub fn switch_engine(&self, staged: &Path, index: u64, term: u64) -> Result<(), DataDirError> {
        let name = staged.file_name().unwrap_or_default().to_string_lossy();
        let text = format!("engine: {name}\nsnapshot-index: {index}\nsnapshot-term: {term}\n");
        let text = format!("{text}checksum: {:08x}\n", crc32fast::hash(text.as_bytes()));
        let draft = self.path.join(POINTER_DRAFT);
        write_file(&self.path, &draft, &self.path.join(POINTER), text.as_bytes()).map_err(no_access("write", &draft))
    }

    /// Removes every engine directory but the one in use: what interrupted snapshots left, and what they replaced.
    ///
    /// # Errors
    /// [`DataDirError::NoAccess`] when the file system fails.
    pub fn remove_unused_engines(&self) -> Result<(), DataDirError> {
        let used = self.engine_dir()?.path;
        let first = self.path.join(self.storage.to_string());
        let mut unused: Vec<_> = self.engine_numbers()?.into_iter().map(|(_, path)| path).collect();
        if first.is_dir() {
            unused.push(first);
        }
        for path in unused.into_iter().filter(|path| *path != used) {
            fs::remove_dir_all(&path).map_err(no_access("remove", &path))?;
        }
        Ok(())
    }

    /// The directories that [`DataDir::stage_engine`] ever made and nobody removed, with their numbers.
    fn engine_numbers(&self) -> Result<Vec<(u64, PathBuf)>, DataDirError> {
        let prefix = format!("{}.", self.storage);
        let names = names(&self.path)?.unwrap_or_default();
        let numbered = names.into_iter().filter_map(|name| {
            let number = name.strip_prefix(&prefix)?.parse().ok()?;
            Some((number, self.path.join(name)))
        });
        Ok(numbered.collect())
    }
}

fn parse(text: &str) -> Option<(&str, u64, u64)> {
    let (summed, checksum) = text.split_at(text.rfind("checksum: ")?);
    if checksum != format!("checksum: {:08x}\n", crc32fast::hash(summed.as_bytes())) {
        return None;
    }
    let mut values = summed.lines().map(|line| Some(line.split_once(": ")?.1));
    let name = values.next()??;
    let index = values.next()??.parse().ok()?;
    let term = values.next()??.parse().ok()?;
    (!name.is_empty() && !name.contains('/')).then_some((name, index, term))
}
