//! Sorts more than fits into memory.
//!
//! What is pushed gathers in memory. Whenever that is full it is sorted and goes to a file as a run; in the end the runs
//! are merged as they are read, any number of times. The file has no name: it is gone with the process, whatever ends it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Memory for what is not in a run yet, in bytes. Twice that at most, since one entry may be large.
const MEMORY_BYTES_MAX: usize = 32 << 20;
/// Memory for reading all runs, in bytes, as long as they leave each this much.
const READ_BYTES: usize = 16 << 20;
const RUN_READ_BYTES_MIN: usize = 8 << 10;

/// Why something was not sorted.
#[derive(Debug, thiserror::Error)]
pub enum SortError {
    /// The file system fails.
    #[error("cannot sort in {}: {cause}", .dir.display())]
    Io {
        /// Where the file was to be.
        dir: PathBuf,
        /// The words of the operating system.
        cause: io::Error,
    },
    /// It would take more than it may.
    #[error("sorting takes more than {bytes} bytes in {}, which is all that may be used there", .dir.display())]
    Space {
        /// Where the file is.
        dir: PathBuf,
        /// How large it may become.
        bytes: u64,
    },
}

/// Takes what is to be sorted.
pub struct Sorter {
    dir: PathBuf,
    file_bytes_max: u64,
    memory_bytes_max: usize,
    /// Keys and values, one after the other.
    arena: Vec<u8>,
    /// Where each is in it: start, length of the key, length of the value.
    entries: Vec<(usize, u32, u32)>,
    runs: Runs,
}

/// What was sorted, to be read in order.
#[derive(Default)]
struct Runs {
    file: Option<File>,
    /// Where each ends; it begins where the one before ends.
    ends: Vec<u64>,
}

impl Runs {
    fn bytes(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }
}

impl Sorter {
    /// Sorts in memory and, beyond 32 MiB, in a file in `dir` of at most `file_bytes_max` bytes.
    pub fn new(dir: &Path, file_bytes_max: u64) -> Sorter {
        Sorter {
            dir: dir.to_owned(),
            file_bytes_max,
            memory_bytes_max: MEMORY_BYTES_MAX,
            arena: Vec::new(),
            entries: Vec::new(),
            runs: Runs::default(),
        }
    }

    /// Adds an entry. No two may have the same key.
    ///
    /// # Errors
    /// [`SortError`].
    ///
    /// # Panics
    /// If key or value have 4 GiB or more.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Result<(), SortError> {
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("entries are far smaller");
        self.entries.push((self.arena.len(), length(key), length(value)));
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        if self.arena.len() + self.entries.len() * size_of::<(usize, u32, u32)>() >= self.memory_bytes_max {
            self.spill()?;
        }
        Ok(())
    }

    /// Everything that was pushed, to be read in order.
    ///
    /// # Errors
    /// [`SortError`].
    pub fn finish(mut self) -> Result<Sorted, SortError> {
        self.sort();
        if !self.runs.ends.is_empty() {
            self.spill()?;
        }
        Ok(Sorted {
            dir: self.dir,
            arena: self.arena,
            entries: self.entries,
            runs: self.runs,
        })
    }

    fn sort(&mut self) {
        let arena = &self.arena;
        self.entries
            .sort_unstable_by_key(|&(start, key, _)| &arena[start..start + key as usize]);
    }

    fn spill(&mut self) -> Result<(), SortError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        self.sort();
        let bytes = self.runs.bytes() + (self.arena.len() + 8 * self.entries.len()) as u64;
        if bytes > self.file_bytes_max {
            return Err(SortError::Space {
                dir: self.dir.clone(),
                bytes: self.file_bytes_max,
            });
        }
        self.write_run().map_err(|cause| SortError::Io {
            dir: self.dir.clone(),
            cause,
        })?;
        self.runs.ends.push(bytes);
        self.arena.clear();
        self.arena.shrink_to(self.memory_bytes_max);
        self.entries.clear();
        Ok(())
    }

    fn write_run(&mut self) -> io::Result<()> {
        let file = match &mut self.runs.file {
            Some(file) => file,
            none => none.insert(nameless_file(&self.dir)?),
        };
        let mut out = io::BufWriter::with_capacity(1 << 20, file);
        for &(start, key, value) in &self.entries {
            out.write_all(&key.to_le_bytes())?;
            out.write_all(&value.to_le_bytes())?;
            out.write_all(&self.arena[start..start + key as usize + value as usize])?;
        }
        out.flush()
    }
}

/// A file that takes space in `dir` for as long as it is open, and no longer.
fn nameless_file(dir: &Path) -> io::Result<File> {
    for attempt in 0..1000 {
        let path = dir.join(format!("SORTING.{}.{attempt}", std::process::id()));
        let mut options = OpenOptions::new();
        match options.read(true).write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// See [`Sorter::finish`].
pub struct Sorted {
    dir: PathBuf,
    arena: Vec<u8>,
    entries: Vec<(usize, u32, u32)>,
    runs: Runs,
}

impl Sorted {
    /// Visits everything in order of the keys, until the visitor fails.
    ///
    /// # Errors
    /// The visitor's, or [`SortError::Io`].
    pub fn visit<E: From<SortError>>(&self, mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), E>) -> Result<(), E> {
        let Some(file) = &self.runs.file else {
            for &(start, key, value) in &self.entries {
                let (key, value) = self.arena[start..start + key as usize + value as usize].split_at(key as usize);
                visit(key, value)?;
            }
            return Ok(());
        };
        let failed = |cause| SortError::Io {
            dir: self.dir.clone(),
            cause,
        };
        let chunk = (READ_BYTES / self.runs.ends.len()).max(RUN_READ_BYTES_MIN);
        let mut start = 0;
        let mut runs = Vec::with_capacity(self.runs.ends.len());
        let mut heads = BinaryHeap::with_capacity(self.runs.ends.len());
        for (index, &end) in self.runs.ends.iter().enumerate() {
            let mut run = Run {
                file,
                chunk,
                next: start,
                end,
                buffer: Vec::new(),
                at: 0,
                key_bytes: 0,
                value_bytes: 0,
            };
            if run.advance().map_err(failed)? {
                heads.push(Reverse((run.entry().0.to_vec(), index)));
            }
            runs.push(run);
            start = end;
        }
        while let Some(mut head) = heads.peek_mut() {
            let Reverse((key, index)) = &mut *head;
            let run = &mut runs[*index];
            let (run_key, value) = run.entry();
            visit(run_key, value)?;
            if run.advance().map_err(failed)? {
                key.clear();
                key.extend_from_slice(run.entry().0);
            } else {
                std::collections::binary_heap::PeekMut::pop(head);
            }
        }
        Ok(())
    }
}

/// A run that is being read.
struct Run<'a> {
    file: &'a File,
    chunk: usize,
    /// What of the file comes after the buffer.
    next: u64,
    end: u64,
    buffer: Vec<u8>,
    /// Where the entry begins in the buffer.
    at: usize,
    key_bytes: usize,
    value_bytes: usize,
}

impl Run<'_> {
    fn entry(&self) -> (&[u8], &[u8]) {
        self.buffer[self.at..self.at + self.key_bytes + self.value_bytes].split_at(self.key_bytes)
    }

    /// Goes to the next entry, if there is one.
    fn advance(&mut self) -> io::Result<bool> {
        self.at += self.key_bytes + self.value_bytes;
        if self.at == self.buffer.len() && self.next == self.end {
            return Ok(false);
        }
        self.fill(8)?;
        let number = |at: usize| u32::from_le_bytes(self.buffer[at..at + 4].try_into().expect("4 bytes")) as usize;
        (self.key_bytes, self.value_bytes) = (number(self.at), number(self.at + 4));
        self.at += 8;
        self.fill(self.key_bytes + self.value_bytes)?;
        Ok(true)
    }

    /// Sees to it that the buffer holds this many bytes from `at` on.
    fn fill(&mut self, bytes: usize) -> io::Result<()> {
        if self.buffer.len() - self.at >= bytes {
            return Ok(());
        }
        self.buffer.drain(..self.at);
        self.at = 0;
        let have = self.buffer.len();
        let left = usize::try_from(self.end - self.next).unwrap_or(usize::MAX);
        let more = self.chunk.max(bytes - have).min(left);
        self.buffer.resize(have + more, 0);
        self.buffer.shrink_to(have + more.max(self.chunk));
        self.file.read_exact_at(&mut self.buffer[have..], self.next)?;
        self.next += more as u64;
        if self.buffer.len() < bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(entries: &[(Vec<u8>, Vec<u8>)], memory_bytes_max: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let dir = tempfile::tempdir().unwrap();
        let mut sorter = Sorter::new(dir.path(), 1 << 30);
        sorter.memory_bytes_max = memory_bytes_max;
        for (key, value) in entries {
            sorter.push(key, value).unwrap();
        }
        let sorted = sorter.finish().unwrap();
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "the file has no name"
        );
        let read = || {
            let mut read = Vec::new();
            let visited = sorted.visit(|key, value| {
                read.push((key.to_vec(), value.to_vec()));
                Ok::<_, SortError>(())
            });
            visited.unwrap();
            read
        };
        let first = read();
        assert_eq!(first, read(), "it can be read more than once");
        first
    }

    #[test]
    fn sorts_in_memory_and_in_runs() {
        let mut entries: Vec<_> = (0..5000u32)
            .map(|number| {
                let key = number.wrapping_mul(0x9e37_79b1).to_be_bytes().to_vec();
                // Some are larger than the chunks that are read.
                let length = if number % 1000 == 7 {
                    40_000
                } else {
                    number as usize % 50
                };
                (key, vec![number as u8; length])
            })
            .collect();
        let in_memory = sorted(&entries, 1 << 30);
        let in_runs = sorted(&entries, 10_000);
        entries.sort();
        assert!(in_memory == entries);
        assert!(in_runs == entries);
        assert!(sorted(&[], 100).is_empty());
    }

    #[test]
    fn takes_no_more_space_than_it_may() {
        let dir = tempfile::tempdir().unwrap();
        let mut sorter = Sorter::new(dir.path(), 1000);
        sorter.memory_bytes_max = 100;
        let pushed = (0..100u8).try_for_each(|number| sorter.push(&[number], &[0; 50]));
        assert!(matches!(pushed, Err(SortError::Space { bytes: 1000, .. })));
    }
}
