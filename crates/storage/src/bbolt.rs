//! Files of bbolt, the store that etcd keeps its data in: written as a stream, and read with suspicion.
//!
//! A file is a sequence of pages. Pages 0 and 1 are metas, of which the valid one with the higher transaction id counts;
//! it names the root page and how many pages are in use. A page of tree is a leaf (keys and values) or a branch (first
//! keys and pages of children); one that is too large for a page goes on over those after it. The root tree holds the
//! buckets by name, each with the root page of a tree of its own, or with a small tree in place of a page ("inline").
//! Numbers are little endian. Source: the code of bbolt 1.4, `internal/common` and `tx_check.go`.
//!
//! | Page | Bytes |
//! |---|---|
//! | header | id (8), flags (2), count (2), overflow (4) |
//! | meta | magic (4), version (4), page size (4), flags (4), root (8), sequence (8), free list (8), pages (8), transaction (8), FNV-1a of those (8) |
//! | element of a leaf | flags (4), offset (4), key length (4), value length (4) |
//! | element of a branch | offset (4), key length (4), page (8) |

mod reader;
mod writer;

pub use reader::{Bucket, Entries, ReadError, Reader, Source};
pub use writer::{Shape, WriteError, Writer};

/// The size of the pages that we write, in bytes: that of memory pages where etcd usually runs.
pub const PAGE_BYTES: usize = 4096;

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 16;
const META_BYTES: usize = 64;
const ELEMENT_BYTES: usize = 16;
/// The header of a bucket, in the leaf that names it: root page and sequence.
const BUCKET_BYTES: usize = 16;

const BRANCH: u16 = 0x01;
const LEAF: u16 = 0x02;
const META: u16 = 0x04;
const FREE_LIST: u16 = 0x10;
/// The flag of a leaf's element that is a bucket.
const IS_BUCKET: u32 = 0x01;

/// What a meta page says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Meta {
    page_bytes: u32,
    root: u64,
    free_list: u64,
    /// Pages in use; the first one beyond.
    pages: u64,
    transaction: u64,
}

impl Meta {
    fn encode(&self) -> [u8; META_BYTES] {
        let mut out = [0; META_BYTES];
        out[..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&VERSION.to_le_bytes());
        out[8..12].copy_from_slice(&self.page_bytes.to_le_bytes());
        out[16..24].copy_from_slice(&self.root.to_le_bytes());
        out[32..40].copy_from_slice(&self.free_list.to_le_bytes());
        out[40..48].copy_from_slice(&self.pages.to_le_bytes());
        out[48..56].copy_from_slice(&self.transaction.to_le_bytes());
        let checksum = fnv1a(&out[..56]);
        out[56..].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads what [`Meta::encode`] writes; `None` unless all of it is right.
    fn decode(data: &[u8; META_BYTES]) -> Option<Meta> {
        let sound = u32_at(data, 0)? == MAGIC && u32_at(data, 4)? == VERSION && u64_at(data, 56)? == fnv1a(&data[..56]);
        sound.then_some(Meta {
            page_bytes: u32_at(data, 8)?,
            root: u64_at(data, 16)?,
            free_list: u64_at(data, 32)?,
            pages: u64_at(data, 40)?,
            transaction: u64_at(data, 48)?,
        })
    }
}

/// FNV-1a, 64 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(data.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(data.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests;
