//! Reads the log's files before raft-engine does, to tell a torn tail from damage.
//!
//! Every record is written and synced before the next one is begun, so a crash can harm the last record only: what a
//! crash left is damage with no whole record after it. That tail was never acknowledged and is cut off. Damage with a
//! whole record after it is something else (a failing disk, a stray write), and acknowledged entries may be gone: such a
//! log is refused. raft-engine itself would cut a file at the first damage, wherever that is, and checks the entries of
//! a record only when they are read.
//!
//! The format, as written by raft-engine 0.4 (log file version 2):
//!
//! - file header: 53 bytes of magic, version (u64), alignment (u64, always 0 here);
//! - record: `u56` length, `u8` compression, `u64` offset of the footer (all big endian); the entries and their crc32;
//!   the footer (what the entries are, and key-values) and its crc32 XOR the low 32 bits of the file's sequence number.
//!
//! That XOR is what tells the records of a recycled file from those of its earlier life, which lie behind them.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::raft_log::LogError;

const MAGIC: &[u8] = b"RAFT-LOG-FILE-HEADER-9986AB3E47F320B394C8E84916EB0ED5";
const VERSION_2: u64 = 2;
const FILE_HEADER_BYTES: usize = MAGIC.len() + 16;
const RECORD_HEADER_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 4;
const SEQUENCE_DIGITS: usize = 16;
/// A sequence number this far behind the file's own is taken for that of an earlier life of a recycled file.
const EARLIER_LIVES_MAX: u32 = 1 << 20;
const READ_BUFFER_BYTES: usize = 1 << 20;

/// A tail that was cut off because its last record was never written whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TornTail {
    /// The file that was cut.
    pub file: PathBuf,
    /// The offset of the torn record; the file ends there now.
    pub offset: u64,
}

/// Verifies every file that raft-engine will read in `dir`, and cuts off what a crash left at the end, so that
/// raft-engine can be opened without any tolerance of its own. Returns the torn record, if there was one.
pub(super) fn verify(dir: &Path) -> Result<Option<TornTail>, LogError> {
    let (appends, rewrites) = segments(dir)?;
    verify_full(&appends)?;
    verify_full(&rewrites)?;
    // What is rewritten stays in the append queue until it is synced, and whether entries are missing is checked on the
    // whole log later: so the rewrite queue may be cut at its first damage.
    if let Some(last) = rewrites.last() {
        cut_tail(dir, last, false)?;
    }
    appends.last().map_or(Ok(None), |last| cut_tail(dir, last, true))
}

struct Segment {
    path: PathBuf,
    sequence: u64,
}

impl Segment {
    fn signature(&self) -> u32 {
        self.sequence as u32
    }

    fn corrupt(&self, offset: u64, cause: String) -> LogError {
        LogError::Corrupt {
            place: format!("{}, offset {offset}", self.path.display()),
            cause,
        }
    }

    fn io(&self, action: &'static str) -> impl Fn(io::Error) -> LogError {
        let path = self.path.display().to_string();
        move |error| LogError::Io {
            action,
            cause: format!("{path}: {error}"),
        }
    }
}

/// The files of the append and of the rewrite queue that raft-engine reads: those without a gap up to the last one.
fn segments(dir: &Path) -> Result<(Vec<Segment>, Vec<Segment>), LogError> {
    let failed = |error: io::Error| LogError::Io {
        action: "list its files",
        cause: format!("{}: {error}", dir.display()),
    };
    let (mut appends, mut rewrites) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let Some((digits, suffix)) = path.file_name().and_then(|name| name.to_str()?.split_once('.')) else {
            continue;
        };
        if digits.len() != SEQUENCE_DIGITS {
            continue;
        }
        let Ok(sequence) = digits.parse() else { continue };
        match suffix {
            "raftlog" => appends.push(Segment { path, sequence }),
            "rewrite" => rewrites.push(Segment { path, sequence }),
            _ => {}
        }
    }
    for queue in [&mut appends, &mut rewrites] {
        queue.sort_by_key(|segment| segment.sequence);
        let gap = queue
            .windows(2)
            .rposition(|pair| pair[1].sequence != pair[0].sequence + 1);
        queue.drain(..gap.map_or(0, |gap| gap + 1));
    }
    Ok((appends, rewrites))
}

/// All but the last file were closed in good order: they hold whole records and nothing else.
fn verify_full(queue: &[Segment]) -> Result<(), LogError> {
    let Some((_, full)) = queue.split_last() else {
        return Ok(());
    };
    let verify_one = |segment: &Segment| {
        let scan = scan(segment)?;
        match scan.damage {
            None => Ok(()),
            Some(damage) => Err(segment.corrupt(scan.valid, damage.to_owned())),
        }
    };
    // Two threads: one keeps the disk busy while the other computes checksums.
    let (left, right) = full.split_at(full.len() / 2);
    std::thread::scope(|scope| {
        let left = scope.spawn(|| left.iter().try_for_each(verify_one));
        let right = right.iter().try_for_each(verify_one);
        left.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .and(right)
    })
}

struct Scan {
    /// Where the last whole record ends; 0 if not even the file header is whole.
    valid: u64,
    /// What is wrong with the bytes that follow, if any do.
    damage: Option<&'static str>,
    file: File,
    bytes: u64,
}

/// Reads records from the start until the end of the file or the first bytes that are none.
fn scan(segment: &Segment) -> Result<Scan, LogError> {
    let io = segment.io("read");
    let file = File::open(&segment.path).map_err(&io)?;
    let bytes = file.metadata().map_err(&io)?.len();
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, &file);

    let mut header = [0; FILE_HEADER_BYTES];
    if bytes < FILE_HEADER_BYTES as u64 {
        return Ok(Scan {
            valid: 0,
            damage: Some("the file header is cut short"),
            file,
            bytes,
        });
    }
    reader.read_exact(&mut header).map_err(&io)?;
    if !header.starts_with(MAGIC) || header[MAGIC.len()..MAGIC.len() + 8] != VERSION_2.to_be_bytes() {
        return Ok(Scan {
            valid: 0,
            damage: Some("the file header is damaged"),
            file,
            bytes,
        });
    }

    let mut valid = FILE_HEADER_BYTES as u64;
    let mut record = Vec::new();
    let mut damage = None;
    while valid < bytes {
        let left = bytes - valid;
        if left < RECORD_HEADER_BYTES as u64 {
            damage = Some("a record header is cut short");
            break;
        }
        record.resize(RECORD_HEADER_BYTES, 0);
        reader.read_exact(&mut record).map_err(&io)?;
        let length = match RecordHeader::decode(&record) {
            Some(header) if header.length as u64 <= left => header.length,
            Some(_) => {
                damage = Some("a record is cut short");
                break;
            }
            None => {
                damage = Some("a record header is damaged");
                break;
            }
        };
        record.resize(length, 0);
        reader.read_exact(&mut record[RECORD_HEADER_BYTES..]).map_err(&io)?;
        if record_signature(&record) != Some(segment.signature()) {
            damage = Some("the checksum of a record does not match");
            break;
        }
        valid += length as u64;
    }
    drop(reader);
    Ok(Scan {
        valid,
        damage,
        file,
        bytes,
    })
}

/// Cuts the last file of a queue off after its last whole record.
///
/// # Errors
/// [`LogError::Corrupt`] if `strict` and whole records follow the damage.
fn cut_tail(dir: &Path, segment: &Segment, strict: bool) -> Result<Option<TornTail>, LogError> {
    let io = segment.io("cut off the torn tail of");
    let Scan {
        valid,
        damage,
        mut file,
        bytes,
    } = scan(segment)?;
    let Some(damage) = damage else { return Ok(None) };

    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(valid)).map_err(&io)?;
    file.read_to_end(&mut tail).map_err(&io)?;
    let after = records_after_damage(&tail, segment.signature());
    if strict && let Some(offset) = after.live {
        let next = valid + offset as u64;
        return Err(segment.corrupt(valid, format!("{damage}, and a whole record follows at offset {next}")));
    }

    if valid == 0 {
        // Made when the log moved on to a new file, but nothing was written to it yet. raft-engine makes it anew.
        fs::remove_file(&segment.path).map_err(&io)?;
        crate::disk::sync_dir(dir).map_err(&io)?;
        return Ok(None);
    }
    let file = File::options().write(true).open(&segment.path).map_err(&io)?;
    file.set_len(valid).map_err(&io)?;
    file.sync_all().map_err(&io)?;
    if after.earlier_life || !was_begun(&tail) {
        tracing::debug!(file = %segment.path.display(), offset = valid, bytes, "cut off the unused end of the Raft log");
        return Ok(None);
    }
    tracing::warn!(
        file = %segment.path.display(),
        offset = valid,
        discarded_bytes = bytes - valid,
        "the last record of the Raft log was not written whole ({damage}); it was never acknowledged and is dropped"
    );
    Ok(Some(TornTail {
        file: segment.path.clone(),
        offset: valid,
    }))
}

/// Whether `tail`, in which no record is whole, begins with a record that was being written. Zeros are space that was
/// set aside. Other bytes right up to the end, without the header of a record before them, are the last bytes of an
/// earlier life of a recycled file.
fn was_begun(tail: &[u8]) -> bool {
    let header = tail.len() < RECORD_HEADER_BYTES || RecordHeader::decode(tail).is_some();
    let zeros_follow = tail.last() == Some(&0);
    tail.iter().any(|&byte| byte != 0) && (header || zeros_follow)
}

#[derive(Default)]
struct AfterDamage {
    /// Where the first whole record of this file begins.
    live: Option<usize>,
    /// Whether there are whole records of another file that this one was before.
    earlier_life: bool,
}

/// Looks for whole records anywhere in `tail`, whose first byte is where a damaged record begins.
fn records_after_damage(tail: &[u8], signature: u32) -> AfterDamage {
    let mut found = AfterDamage::default();
    let mut at = 0;
    while at + RECORD_HEADER_BYTES < tail.len() {
        let candidate = &tail[at..];
        // Lengths far below 2^32 begin with three zero bytes; this passes over nearly everything else at once.
        let signature_here = if candidate[0] | candidate[1] | candidate[2] == 0 {
            RecordHeader::decode(candidate)
                .filter(|header| header.length <= candidate.len())
                .and_then(|header| Some((header.length, record_signature(&candidate[..header.length])?)))
        } else {
            None
        };
        match signature_here {
            Some((_, actual)) if actual == signature => {
                found.live = Some(at);
                return found;
            }
            Some((length, actual)) if (1..EARLIER_LIVES_MAX).contains(&signature.wrapping_sub(actual)) => {
                found.earlier_life = true;
                at += length;
            }
            _ => at += 1,
        }
    }
    found
}

struct RecordHeader {
    /// Of the whole record.
    length: usize,
    footer_offset: usize,
}

impl RecordHeader {
    fn decode(bytes: &[u8]) -> Option<RecordHeader> {
        let (first, rest) = bytes.split_first_chunk::<8>()?;
        let (second, _) = rest.split_first_chunk::<8>()?;
        let length_and_compression = u64::from_be_bytes(*first);
        let length = usize::try_from(length_and_compression >> 8).ok()?;
        let footer_offset = usize::try_from(u64::from_be_bytes(*second)).ok()?;
        let compression_known = length_and_compression as u8 <= 1;
        let plausible = footer_offset >= RECORD_HEADER_BYTES && footer_offset + CHECKSUM_BYTES < length;
        (compression_known && plausible).then_some(RecordHeader { length, footer_offset })
    }
}

/// The signature of the file that a whole record was written for; `None` if its entries do not match their checksum.
/// A damaged footer shows as a signature that no file nearby has.
fn record_signature(record: &[u8]) -> Option<u32> {
    let header = RecordHeader::decode(record)?;
    let (entries, footer) = record.split_at(header.footer_offset);
    let (footer, stored) = footer.split_last_chunk::<CHECKSUM_BYTES>()?;
    let signature = crc32fast::hash(footer) ^ u32::from_le_bytes(*stored);
    let entries = &entries[RECORD_HEADER_BYTES..];
    if !entries.is_empty() {
        let (entries, stored) = entries.split_last_chunk::<CHECKSUM_BYTES>()?;
        if crc32fast::hash(entries) != u32::from_le_bytes(*stored) {
            return None;
        }
    }
    Some(signature)
}
