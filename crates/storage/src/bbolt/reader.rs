//! Reads bbolt files that anybody may have made.
//!
//! Every page is checked before anything in it is used: that it is where it says, of a kind that belongs there, that all
//! its elements lie within it, and that keys come in strictly ascending order, over the whole tree. So whatever the file
//! holds, a walk ends, in no more steps than the file has pages, and in as much memory as one page of each level takes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{
    BRANCH, BUCKET_BYTES, ELEMENT_BYTES, HEADER_BYTES, IS_BUCKET, LEAF, META_BYTES, Meta, u16_at, u32_at, u64_at,
};

/// Levels of a tree: even with two children each they would hold more pages than there are.
const DEPTH_MAX: usize = 64;
/// The largest page that is read, with those that it goes on over: a hundred times what etcd takes in one request.
const PAGE_BYTES_MAX: u64 = 256 << 20;
/// Most buckets that are listed: etcd has 10, and buckets in buckets are not for us.
const BUCKETS_MAX: usize = 1024;

/// What a file is read from.
pub trait Source {
    /// Its size, in bytes.
    fn size(&self) -> io::Result<u64>;
    /// Fills `buffer` from `offset` on.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Source for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

impl Source for &[u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|offset| self.get(offset..));
        let from = from.and_then(|from| from.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file system fails.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("is not a bbolt database: neither of its first two pages is a valid meta page")]
    NotBbolt,
    /// It ends too early.
    #[error("is truncated: it has {found} bytes, and its pages take {expected}")]
    Truncated {
        /// The size of the file, in bytes.
        found: u64,
        /// What the file says of itself, in bytes.
        expected: u64,
    },
    /// It does not hold together.
    #[error("is damaged: page {page} {cause}")]
    Damaged {
        /// Where.
        page: u64,
        /// What is wrong there.
        cause: &'static str,
    },
    /// A bucket that must be there is not.
    #[error("has no bucket {0:?}, which every database of etcd has")]
    NoBucket(String),
}

fn damaged(page: u64, cause: &'static str) -> ReadError {
    ReadError::Damaged { page, cause }
}

/// A file that is open for reading.
#[derive(Debug)]
pub struct Reader<S> {
    source: S,
    meta: Meta,
}

/// Where a bucket's entries are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// The name.
    pub name: Vec<u8>,
    root: Root,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Root {
    Page(u64),
    /// In place of a page, within the page of this id.
    Inline(u64, Vec<u8>),
}

impl<S: Source> Reader<S> {
    /// Opens a file. The list of free pages is of no interest and is not looked at.
    ///
    /// # Errors
    /// [`ReadError::NotBbolt`], [`ReadError::Truncated`], [`ReadError::Io`].
    pub fn open(source: S) -> Result<Self, ReadError> {
        let size = source.size()?;
        let meta_at = |offset: u64| -> Result<Option<Meta>, ReadError> {
            let mut data = [0; META_BYTES];
            if offset + (HEADER_BYTES + META_BYTES) as u64 > size {
                return Ok(None);
            }
            source.read_at(&mut data, offset + HEADER_BYTES as u64)?;
            // bbolt's own range of page sizes.
            let sound =
                |meta: &Meta| meta.page_bytes.is_power_of_two() && (1 << 10..=1 << 24).contains(&meta.page_bytes);
            Ok(Meta::decode(&data).filter(sound))
        };
        let first = meta_at(0)?;
        // Where the second one is, is known from the first; if that is no good, it is looked for wherever it may be.
        let second = match first {
            Some(first) => meta_at(u64::from(first.page_bytes))?,
            None => {
                let mut found = None;
                for shift in 10..=24 {
                    let meta = meta_at(1 << shift)?;
                    found = found.or(meta.filter(|meta| meta.page_bytes == 1 << shift));
                }
                found
            }
        };
        let newest = [first, second]
            .into_iter()
            .flatten()
            .max_by_key(|meta| meta.transaction);
        let meta = newest.ok_or(ReadError::NotBbolt)?;
        let expected = meta.pages.saturating_mul(u64::from(meta.page_bytes));
        if expected > size {
            return Err(ReadError::Truncated { found: size, expected });
        }
        Ok(Reader { source, meta })
    }

    /// Bytes of the pages in use: a measure for how far a walk over everything is.
    pub fn bytes(&self) -> u64 {
        self.meta.pages * u64::from(self.meta.page_bytes)
    }

    /// All buckets, in order of their names.
    ///
    /// # Errors
    /// [`ReadError::Damaged`], [`ReadError::Io`].
    pub fn buckets(&self) -> Result<Vec<Bucket>, ReadError> {
        let mut entries = Entries::new(self, &Root::Page(self.meta.root))?;
        let mut buckets = Vec::new();
        while let Some(entry) = entries.next_of_any_kind()? {
            let page = entry.page;
            if entry.flags & IS_BUCKET == 0 {
                return Err(damaged(page, "has a key beside the buckets"));
            }
            if buckets.len() == BUCKETS_MAX {
                return Err(damaged(page, "has more buckets than there can be"));
            }
            let root = u64_at(entry.value, 0).filter(|_| entry.value.len() >= BUCKET_BYTES);
            let root = match root {
                None => return Err(damaged(page, "has a bucket without a header")),
                Some(0) => Root::Inline(page, entry.value[BUCKET_BYTES..].to_vec()),
                Some(root) => Root::Page(root),
            };
            buckets.push(Bucket {
                name: entry.key.to_vec(),
                root,
            });
        }
        Ok(buckets)
    }

    /// A walk over a bucket, in order.
    ///
    /// # Errors
    /// [`ReadError::Damaged`], [`ReadError::Io`].
    pub fn entries(&self, bucket: &Bucket) -> Result<Entries<'_, S>, ReadError> {
        Entries::new(self, &bucket.root)
    }

    /// The last key of a bucket.
    ///
    /// # Errors
    /// [`ReadError::Damaged`], [`ReadError::Io`].
    pub fn last_key(&self, bucket: &Bucket) -> Result<Option<Vec<u8>>, ReadError> {
        let mut page = self.root(&bucket.root)?;
        for _ in 0..DEPTH_MAX {
            let Some(last) = page.count.checked_sub(1) else {
                return Ok(None);
            };
            if page.flags == LEAF {
                return Ok(Some(page.leaf(last).1.to_vec()));
            }
            page = self.page(page.branch(last).1)?;
        }
        Err(damaged(page.id, "lies deeper than any tree is"))
    }

    fn root(&self, root: &Root) -> Result<Page, ReadError> {
        match root {
            Root::Page(id) => self.page(*id),
            Root::Inline(id, data) => {
                let page = Page::check(*id, data.clone())?;
                if page.flags != LEAF {
                    return Err(damaged(*id, "has a bucket that is neither a page nor a leaf"));
                }
                Ok(page)
            }
        }
    }

    fn page(&self, id: u64) -> Result<Page, ReadError> {
        if id < 2 || id >= self.meta.pages {
            return Err(damaged(id, "is pointed to, and lies outside of the tree"));
        }
        let page_bytes = self.meta.page_bytes as usize;
        let offset = id * page_bytes as u64;
        let mut data = vec![0; page_bytes];
        self.source.read_at(&mut data, offset)?;
        if u64_at(&data, 0) != Some(id) {
            return Err(damaged(id, "has the id of another one"));
        }
        let overflow = u64::from(u32_at(&data, 12).unwrap_or(0));
        if overflow > 0 {
            let bytes = (1 + overflow) * page_bytes as u64;
            if id + overflow >= self.meta.pages || bytes > PAGE_BYTES_MAX {
                return Err(damaged(id, "goes on over more pages than there are"));
            }
            data.resize(bytes as usize, 0);
            self.source
                .read_at(&mut data[page_bytes..], offset + page_bytes as u64)?;
        }
        Page::check(id, data)
    }
}

/// A page whose elements all lie within it.
struct Page {
    id: u64,
    flags: u16,
    count: usize,
    data: Vec<u8>,
}

impl Page {
    fn check(id: u64, data: Vec<u8>) -> Result<Page, ReadError> {
        let header = u16_at(&data, 8).zip(u16_at(&data, 10));
        let Some((flags, count)) = header.filter(|_| data.len() >= HEADER_BYTES) else {
            return Err(damaged(id, "is too short"));
        };
        let page = Page {
            id,
            flags,
            count: usize::from(count),
            data,
        };
        if flags != LEAF && flags != BRANCH {
            return Err(damaged(id, "is neither a leaf nor a branch"));
        }
        let table_end = HEADER_BYTES + page.count * ELEMENT_BYTES;
        if table_end > page.data.len() {
            return Err(damaged(id, "has more elements than fit"));
        }
        // In order and apart, as bbolt writes them: what the elements come to is then no more than what the page has.
        let mut end = table_end as u64;
        for index in 0..page.count {
            let at = HEADER_BYTES + index * ELEMENT_BYTES;
            let number = |word: usize| u32_at(&page.data, at + 4 * word).map_or(u64::MAX, u64::from);
            let (offset, bytes) = match flags {
                LEAF => (number(1), number(2) + number(3)),
                _ => (number(0), number(1)),
            };
            let start = at as u64 + offset;
            if start < end || start + bytes > page.data.len() as u64 {
                return Err(damaged(
                    id,
                    "has an element that does not lie within it, or overlaps the one before it",
                ));
            }
            end = start + bytes;
        }
        Ok(page)
    }

    fn number(&self, at: usize) -> usize {
        u32_at(&self.data, at).map_or(0, |number| number as usize)
    }

    /// Flags, key and value.
    fn leaf(&self, index: usize) -> (u32, &[u8], &[u8]) {
        let at = HEADER_BYTES + index * ELEMENT_BYTES;
        let start = at + self.number(at + 4);
        let (key, value) = (self.number(at + 8), self.number(at + 12));
        let flags = u32_at(&self.data, at).unwrap_or(0);
        let data = &self.data[start..start + key + value];
        (flags, &data[..key], &data[key..])
    }

    /// Key and page.
    fn branch(&self, index: usize) -> (&[u8], u64) {
        let at = HEADER_BYTES + index * ELEMENT_BYTES;
        let start = at + self.number(at);
        let child = u64_at(&self.data, at + 8).unwrap_or(0);
        (&self.data[start..start + self.number(at + 4)], child)
    }
}

/// A walk over a tree.
pub struct Entries<'a, S> {
    reader: &'a Reader<S>,
    /// The way down, and the next element to visit of each page.
    path: Vec<(Page, usize)>,
    last_key: Option<Vec<u8>>,
    /// Pages that may still be read: a tree has no page twice.
    pages_left: u64,
}

struct Entry<'a> {
    page: u64,
    flags: u32,
    key: &'a [u8],
    value: &'a [u8],
}

impl<'a, S: Source> Entries<'a, S> {
    fn new(reader: &'a Reader<S>, root: &Root) -> Result<Self, ReadError> {
        let root = reader.root(root)?;
        Ok(Entries {
            reader,
            path: vec![(root, 0)],
            last_key: None,
            pages_left: reader.meta.pages,
        })
    }

    /// The next key and its value.
    ///
    /// # Errors
    /// [`ReadError::Damaged`], [`ReadError::Io`]. Final: the walk does not go on after it.
    #[allow(
        clippy::should_implement_trait,
        clippy::type_complexity,
        reason = "what it returns is borrowed from it"
    )]
    pub fn next(&mut self) -> Result<Option<(&[u8], &[u8])>, ReadError> {
        match self.next_of_any_kind()? {
            Some(entry) if entry.flags & IS_BUCKET != 0 => Err(damaged(entry.page, "has a bucket within a bucket")),
            entry => Ok(entry.map(|entry| (entry.key, entry.value))),
        }
    }

    /// Bytes of pages that were read: see [`Reader::bytes`].
    pub fn bytes_read(&self) -> u64 {
        (self.reader.meta.pages - self.pages_left) * u64::from(self.reader.meta.page_bytes)
    }

    fn next_of_any_kind(&mut self) -> Result<Option<Entry<'_>>, ReadError> {
        loop {
            let depth = self.path.len();
            let Some((page, next)) = self.path.last_mut() else {
                return Ok(None);
            };
            if *next == page.count {
                if page.count == 0 && depth > 1 {
                    return Err(damaged(page.id, "is empty"));
                }
                self.path.pop();
                continue;
            }
            let index = *next;
            *next += 1;
            if page.flags == BRANCH {
                let (key, child) = page.branch(index);
                // What is below a key of a branch is at or after it.
                if self.last_key.as_deref().is_some_and(|last| index > 0 && key <= last) {
                    return Err(damaged(page.id, "has keys out of order"));
                }
                if depth == DEPTH_MAX {
                    return Err(damaged(child, "lies deeper than any tree is"));
                }
                let child = self.reader.page(child)?;
                let pages = child.data.len() as u64 / u64::from(self.reader.meta.page_bytes);
                let Some(left) = self.pages_left.checked_sub(pages) else {
                    return Err(damaged(child.id, "is pointed to more than once"));
                };
                self.pages_left = left;
                self.path.push((child, 0));
                continue;
            }
            break;
        }
        let (page, next) = self.path.last().expect("the loop ends on a leaf");
        let (flags, key, value) = page.leaf(next - 1);
        match &mut self.last_key {
            Some(last) if key <= &last[..] => return Err(damaged(page.id, "has keys out of order")),
            Some(last) => {
                last.clear();
                last.extend_from_slice(key);
            }
            None => self.last_key = Some(key.to_vec()),
        }
        Ok(Some(Entry {
            page: page.id,
            flags,
            key,
            value,
        }))
    }
}
