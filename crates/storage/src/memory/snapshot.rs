//! The memory engine's snapshots on disk: one file, written as a stream, in which nothing can be wrong unnoticed.
//!
//! The file is a sequence of blocks: kind (1 byte), length of the content (4 bytes, little endian), crc32 (4 bytes) of
//! the block's place in the file, its kind and its content; the content. The kinds:
//!
//! 1. *header*, the first block: magic, format version (4 bytes), number of the snapshot (8);
//! 2. *family*: its name; what follows belongs to it;
//! 3. *entries*, in order: length of the key (4), length of the value (4), key, value, and so on;
//! 4. *trailer*, the last block: number of entries (8), and for each family the offset (8) of its block, the length of
//!    its name (4) and its name.
//!
//! A file gets its name only when it is whole and on disk, so a damaged one was not left by a crash.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::disk::sync_dir;
use crate::engine::EngineError;

const MAGIC: &[u8; 8] = b"MSTSNAP\0";
const FORMAT_VERSION: u32 = 1;
const HEADER: u8 = 1;
const FAMILY: u8 = 2;
const ENTRIES: u8 = 3;
const TRAILER: u8 = 4;
const BLOCK_HEADER_BYTES: usize = 9;
/// A block of entries is written when it has grown beyond this; it is longer only by its last entry.
const BLOCK_BYTES: usize = 128 << 10;
/// Bytes after which what was written is synced: dirty pages in one heap at the end would hold up the Raft log's fsync.
const SYNC_BYTES: u64 = 16 << 20;
const SUFFIX: &str = "snapshot";
const DRAFT_SUFFIX: &str = "draft";

/// A snapshot that is whole and durable.
#[derive(Debug)]
pub(super) struct SnapshotFile {
    pub(super) number: u64,
    pub(super) bytes: u64,
    path: PathBuf,
    file: File,
    /// Name of each family and where its block is.
    families: Vec<(String, u64)>,
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> EngineError {
    let path = path.display().to_string();
    move |error| EngineError::Io {
        action,
        cause: format!("{path}: {error}"),
    }
}

/// Writes a snapshot block by block.
pub(super) struct Writer {
    file: File,
    draft: PathBuf,
    path: PathBuf,
    number: u64,
    offset: u64,
    unsynced: u64,
    block: Vec<u8>,
    entries: u64,
    families: Vec<(String, u64)>,
}

impl Writer {
    pub(super) fn create(dir: &Path, number: u64) -> Result<Writer, EngineError> {
        let path = dir.join(format!("{number:020}.{SUFFIX}"));
        let draft = path.with_extension(DRAFT_SUFFIX);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&draft);
        let file = file.map_err(failed("create a snapshot", &draft))?;
        let mut writer = Writer {
            file,
            draft,
            path,
            number,
            offset: 0,
            unsynced: 0,
            block: Vec::with_capacity(BLOCK_BYTES * 2),
            entries: 0,
            families: Vec::new(),
        };
        writer.block.extend_from_slice(MAGIC);
        writer.block.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        writer.block.extend_from_slice(&number.to_le_bytes());
        writer.write_block(HEADER)?;
        Ok(writer)
    }

    pub(super) fn begin_family(&mut self, name: &str) -> Result<(), EngineError> {
        self.write_entries()?;
        self.families.push((name.to_owned(), self.offset));
        self.block.extend_from_slice(name.as_bytes());
        self.write_block(FAMILY)
    }

    pub(super) fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), EngineError> {
        self.block.extend_from_slice(&(key.len() as u32).to_le_bytes());
        self.block.extend_from_slice(&(value.len() as u32).to_le_bytes());
        self.block.extend_from_slice(key);
        self.block.extend_from_slice(value);
        self.entries += 1;
        if self.block.len() < BLOCK_BYTES {
            Ok(())
        } else {
            self.write_entries()
        }
    }

    /// Makes the snapshot durable under its name and removes those before it.
    pub(super) fn finish(mut self, dir: &Path) -> Result<SnapshotFile, EngineError> {
        self.write_entries()?;
        self.block.extend_from_slice(&self.entries.to_le_bytes());
        for (name, offset) in &self.families {
            self.block.extend_from_slice(&offset.to_le_bytes());
            self.block.extend_from_slice(&(name.len() as u32).to_le_bytes());
            self.block.extend_from_slice(name.as_bytes());
        }
        self.write_block(TRAILER)?;
        let Writer {
            file,
            draft,
            path,
            number,
            offset,
            families,
            ..
        } = self;
        file.sync_all().map_err(failed("sync a snapshot", &draft))?;
        fs::rename(&draft, &path).map_err(failed("rename a snapshot", &draft))?;
        sync_dir(dir).map_err(failed("sync the directory of snapshots", dir))?;
        for (older, path) in list(dir)? {
            if older < number {
                fs::remove_file(&path).map_err(failed("remove an old snapshot", &path))?;
            }
        }
        Ok(SnapshotFile {
            number,
            bytes: offset,
            path,
            file,
            families,
        })
    }

    fn write_entries(&mut self) -> Result<(), EngineError> {
        if self.block.is_empty() {
            Ok(())
        } else {
            self.write_block(ENTRIES)
        }
    }

    fn write_block(&mut self, kind: u8) -> Result<(), EngineError> {
        let failed = failed("write a snapshot", &self.draft);
        let mut header = [0; BLOCK_HEADER_BYTES];
        header[0] = kind;
        header[1..5].copy_from_slice(&(self.block.len() as u32).to_le_bytes());
        header[5..].copy_from_slice(&checksum(self.offset, kind, &self.block).to_le_bytes());
        self.file
            .write_all(&header)
            .and_then(|()| self.file.write_all(&self.block))
            .map_err(&failed)?;
        let written = (header.len() + self.block.len()) as u64;
        self.offset += written;
        self.unsynced += written;
        self.block.clear();
        if self.unsynced >= SYNC_BYTES {
            self.unsynced = 0;
            self.file.sync_data().map_err(&failed)?;
        }
        Ok(())
    }
}

fn checksum(offset: u64, kind: u8, content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&offset.to_le_bytes());
    hasher.update(&[kind]);
    hasher.update(content);
    hasher.finalize()
}

/// The snapshots in `dir`, the oldest first.
fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, EngineError> {
    let failed = failed("list the snapshots in", dir);
    let mut snapshots = Vec::new();
    for entry in fs::read_dir(dir).map_err(&failed)? {
        let path = entry.map_err(&failed)?.path();
        if path.extension().is_some_and(|suffix| suffix == SUFFIX)
            && let Some(number) = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok())
        {
            snapshots.push((number, path));
        }
    }
    snapshots.sort();
    Ok(snapshots)
}

/// Removes what a crash left of unfinished snapshots.
pub(super) fn remove_drafts(dir: &Path) -> Result<(), EngineError> {
    let failed = failed("list the snapshots in", dir);
    for entry in fs::read_dir(dir).map_err(&failed)? {
        let path = entry.map_err(&failed)?.path();
        if path.extension().is_some_and(|suffix| suffix == DRAFT_SUFFIX) {
            fs::remove_file(&path).map_err(self::failed("remove an unfinished snapshot", &path))?;
        }
    }
    Ok(())
}

/// Reads the newest snapshot in `dir`, if there is one, and calls `load` for each entry with the name of its family.
pub(super) fn load(
    dir: &Path,
    mut load: impl FnMut(&str, &[u8], &[u8]) -> Result<(), String>,
) -> Result<Option<SnapshotFile>, EngineError> {
    let Some((number, path)) = list(dir)?.pop() else {
        return Ok(None);
    };
    let mut file = File::open(&path).map_err(failed("open a snapshot", &path))?;
    let bytes = file.metadata().map_err(failed("read a snapshot", &path))?.len();
    let mut blocks = Blocks::new(&path, &mut file, 0);

    let header = blocks.next()?;
    let mut expected = MAGIC.to_vec();
    expected.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    expected.extend_from_slice(&number.to_le_bytes());
    if header != HEADER || blocks.content != expected {
        return Err(blocks.corrupt("it is no snapshot of a format known here".to_owned()));
    }
    let mut families: Vec<(String, u64)> = Vec::new();
    let mut entries = 0;
    loop {
        match blocks.next()? {
            FAMILY => {
                let name = String::from_utf8_lossy(&blocks.content).into_owned();
                families.push((name, blocks.begun));
            }
            ENTRIES => {
                let Some((family, _)) = families.last() else {
                    return Err(blocks.corrupt("entries come before any family".to_owned()));
                };
                let mut rest = blocks.content.as_slice();
                while !rest.is_empty() {
                    let (key, value) =
                        next_entry(&mut rest).ok_or_else(|| blocks.corrupt("an entry is cut short".to_owned()))?;
                    load(family, key, value).map_err(|cause| blocks.corrupt(cause))?;
                    entries += 1;
                }
            }
            TRAILER => break,
            kind => return Err(blocks.corrupt(format!("the kind {kind} of a block is unknown"))),
        }
    }
    let counted = blocks
        .content
        .split_first_chunk::<8>()
        .map(|(count, _)| u64::from_le_bytes(*count));
    if counted != Some(entries) || blocks.offset != bytes {
        return Err(blocks.corrupt("the trailer does not fit the entries".to_owned()));
    }
    Ok(Some(SnapshotFile {
        number,
        bytes,
        path,
        file,
        families,
    }))
}

impl SnapshotFile {
    /// Looks `key` up by reading its family up to it: meant for small families.
    pub(super) fn get(&self, family: &str, key: &[u8]) -> Result<Option<bytes::Bytes>, EngineError> {
        let Some(&(_, offset)) = self.families.iter().find(|(name, _)| name == family) else {
            return Ok(None);
        };
        let mut at = At {
            file: &self.file,
            offset,
        };
        let mut blocks = Blocks::new(&self.path, &mut at, offset);
        blocks.next()?;
        while blocks.next()? == ENTRIES {
            let mut rest = blocks.content.as_slice();
            while let Some((found, value)) = next_entry(&mut rest) {
                if found >= key {
                    return Ok((found == key).then(|| bytes::Bytes::copy_from_slice(value)));
                }
            }
        }
        Ok(None)
    }
}

/// Takes the next key and value off a block of entries.
fn next_entry<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let (key_bytes, after) = rest.split_first_chunk::<4>()?;
    let (value_bytes, after) = after.split_first_chunk::<4>()?;
    let (key, after) = after.split_at_checked(u32::from_le_bytes(*key_bytes) as usize)?;
    let (value, after) = after.split_at_checked(u32::from_le_bytes(*value_bytes) as usize)?;
    *rest = after;
    Some((key, value))
}

/// Reads a shared file from a place of its own.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

/// Reads blocks one after the other and verifies them.
struct Blocks<'a, R> {
    path: &'a Path,
    reader: R,
    /// Where the current block begins, and where the next one does.
    begun: u64,
    offset: u64,
    content: Vec<u8>,
}

impl<'a, R: Read> Blocks<'a, R> {
    fn new(path: &'a Path, reader: R, offset: u64) -> Blocks<'a, R> {
        Blocks {
            path,
            reader,
            begun: offset,
            offset,
            content: Vec::new(),
        }
    }

    fn corrupt(&self, cause: String) -> EngineError {
        EngineError::Corrupt {
            place: format!("{}, offset {}", self.path.display(), self.begun),
            cause,
        }
    }

    /// Reads the next block into `content` and returns its kind.
    fn next(&mut self) -> Result<u8, EngineError> {
        self.begun = self.offset;
        let read = |reader: &mut R, buffer: &mut Vec<u8>, bytes: usize| {
            buffer.clear();
            // A damaged length must not allocate gigabytes, so take what is there.
            reader.take(bytes as u64).read_to_end(buffer).map(|read| read == bytes)
        };
        let failed = failed("read a snapshot", self.path);
        let mut header = Vec::new();
        let mut whole = read(&mut self.reader, &mut header, BLOCK_HEADER_BYTES).map_err(&failed)?;
        let mut kind = 0;
        if whole && let Some((&first, numbers)) = header.split_first() {
            let (numbers, _) = numbers.as_chunks::<4>();
            let [length, stored] = [0, 1].map(|at| u32::from_le_bytes(numbers[at]));
            kind = first;
            whole = read(&mut self.reader, &mut self.content, length as usize).map_err(&failed)?;
            if whole && checksum(self.begun, kind, &self.content) != stored {
                return Err(self.corrupt("the checksum of a block does not match".to_owned()));
            }
        }
        if !whole {
            return Err(self.corrupt("the file is cut short".to_owned()));
        }
        self.offset += (BLOCK_HEADER_BYTES + self.content.len()) as u64;
        Ok(kind)
    }
}
