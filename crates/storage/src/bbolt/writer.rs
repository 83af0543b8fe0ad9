//! Writes a bbolt file from front to back, in as much memory as a few pages take.
//!
//! The first pages name the root, which is complete only at the end. So a file is written twice: once into nothing, to
//! learn its [`Shape`], and once for real. Both times the same entries must come; the keys of a bucket in order, and of
//! their values the first time only the lengths count.
//!
//! Pages are written as they fill up: a leaf, the leaves after it, a branch once all its children are there. None is
//! ever gone back to.

use std::io::{self, Write};

use super::{BRANCH, ELEMENT_BYTES, FREE_LIST, HEADER_BYTES, IS_BUCKET, LEAF, META, Meta, PAGE_BYTES};

/// Where a file's root is, and how many pages it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    root: u64,
    pages: u64,
}

impl Shape {
    /// The size of the file, in bytes: a multiple of [`PAGE_BYTES`].
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES as u64
    }
}

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Whoever takes the file does not any more.
    #[error("the database file cannot be written: {0}")]
    Io(#[from] io::Error),
    /// The entries do not come as they must.
    #[error("the database file cannot be written: {0}")]
    Entries(&'static str),
}

/// Writes a file, one bucket after the other.
pub struct Writer<W> {
    /// `None` while the shape is learnt.
    out: Option<(W, Shape)>,
    /// The next page to be written.
    next: u64,
    /// Name and root page of those that are complete.
    buckets: Vec<(Vec<u8>, u64)>,
    name: Option<Vec<u8>>,
    tree: Tree,
    page: Vec<u8>,
}

/// The tree that is being written.
#[derive(Default)]
struct Tree {
    leaf: Leaf,
    /// Those that wait to be full, the one right above the leaves first.
    branches: Vec<Branch>,
    last_key: Option<Vec<u8>>,
}

#[derive(Default)]
struct Leaf {
    elements: Vec<LeafElement>,
    first_key: Vec<u8>,
    /// Keys and values, one after the other; empty while the shape is learnt.
    data: Vec<u8>,
    data_bytes: usize,
}

#[derive(Clone, Copy)]
struct LeafElement {
    flags: u32,
    key_bytes: u32,
    value_bytes: u32,
}

#[derive(Default)]
struct Branch {
    first_key: Vec<u8>,
    /// Lengths of keys, and pages.
    children: Vec<(u32, u64)>,
    keys: Vec<u8>,
}

/// What is known of a value.
enum Value<'a> {
    Bytes(&'a [u8]),
    Length(usize),
}

impl<W: Write> Writer<W> {
    /// Begins to learn the shape of a file.
    pub fn measuring() -> Self {
        Writer {
            out: None,
            // Two metas and the list of free pages, of which there are none.
            next: 3,
            buckets: Vec::new(),
            name: None,
            tree: Tree::default(),
            page: Vec::new(),
        }
    }

    /// Begins to write a file of this shape.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn new(out: W, shape: Shape) -> Result<Self, WriteError> {
        let mut writer = Writer {
            out: Some((out, shape)),
            ..Writer::measuring()
        };
        for id in 0..2 {
            let meta = Meta {
                page_bytes: PAGE_BYTES as u32,
                root: shape.root,
                free_list: 2,
                pages: shape.pages,
                transaction: 2 - id,
            };
            writer.begin_page(id, META, 0, 0);
            writer.page.extend_from_slice(&meta.encode());
            writer.end_page(1)?;
        }
        writer.begin_page(2, FREE_LIST, 0, 0);
        writer.end_page(1)?;
        Ok(writer)
    }

    /// Begins a bucket, and ends the one before.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn bucket(&mut self, name: &str) -> Result<(), WriteError> {
        self.end_bucket()?;
        self.name = Some(name.as_bytes().to_vec());
        Ok(())
    }

    /// Adds an entry to the bucket that was begun last.
    ///
    /// # Errors
    /// [`WriteError::Io`]; and [`WriteError::Entries`] for a key that is not after the one before, or too large an entry.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), WriteError> {
        self.add(0, key, &Value::Bytes(value))
    }

    /// Adds an entry of which only the length of the value is known, while the shape is learnt.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn put_length(&mut self, key: &[u8], value_bytes: usize) -> Result<(), WriteError> {
        self.add(0, key, &Value::Length(value_bytes))
    }

    /// Completes the file.
    ///
    /// # Errors
    /// As [`Writer::put`]; [`WriteError::Entries`] as well if other entries came than when the shape was learnt.
    pub fn finish(mut self) -> Result<Shape, WriteError> {
        self.end_bucket()?;
        let mut buckets = std::mem::take(&mut self.buckets);
        buckets.sort();
        for (name, root) in buckets {
            let mut header = [0; super::BUCKET_BYTES];
            header[..8].copy_from_slice(&root.to_le_bytes());
            self.add(IS_BUCKET, &name, &Value::Bytes(&header))?;
        }
        let root = self.end_tree()?;
        let shape = Shape { root, pages: self.next };
        if let Some((out, expected)) = &mut self.out {
            if shape != *expected {
                return Err(WriteError::Entries("its entries changed between the two passes"));
            }
            out.flush()?;
        }
        Ok(shape)
    }

    fn end_bucket(&mut self) -> Result<(), WriteError> {
        if let Some(name) = self.name.take() {
            let root = self.end_tree()?;
            self.buckets.push((name, root));
        }
        Ok(())
    }

    fn add(&mut self, flags: u32, key: &[u8], value: &Value<'_>) -> Result<(), WriteError> {
        match &mut self.tree.last_key {
            Some(last) if key <= &last[..] => return Err(WriteError::Entries("its keys are not in order")),
            Some(last) => {
                last.clear();
                last.extend_from_slice(key);
            }
            None => self.tree.last_key = Some(key.to_vec()),
        }
        let value_bytes = match value {
            Value::Bytes(bytes) => bytes.len(),
            Value::Length(length) => *length,
        };
        let too_large = |_| WriteError::Entries("an entry is too large");
        let element = LeafElement {
            flags,
            key_bytes: u32::try_from(key.len()).map_err(too_large)?,
            value_bytes: u32::try_from(value_bytes).map_err(too_large)?,
        };
        let entry_bytes = key.len() + value_bytes;
        let leaf = &self.tree.leaf;
        if !leaf.elements.is_empty() && leaf.page_bytes() + ELEMENT_BYTES + entry_bytes > PAGE_BYTES {
            self.end_leaf()?;
        }
        let measuring = self.out.is_none();
        let leaf = &mut self.tree.leaf;
        if leaf.elements.is_empty() {
            leaf.first_key.extend_from_slice(key);
        }
        leaf.elements.push(element);
        leaf.data_bytes += entry_bytes;
        if !measuring {
            leaf.data.extend_from_slice(key);
            match value {
                Value::Bytes(bytes) => leaf.data.extend_from_slice(bytes),
                Value::Length(_) => return Err(WriteError::Entries("a value is missing")),
            }
        }
        Ok(())
    }

    /// Writes the leaf that is being filled.
    fn end_leaf(&mut self) -> Result<(), WriteError> {
        let mut leaf = std::mem::take(&mut self.tree.leaf);
        let pages = leaf.page_bytes().div_ceil(PAGE_BYTES);
        let id = self.next;
        if self.out.is_some() {
            self.begin_page(id, LEAF, leaf.elements.len(), pages - 1);
            let mut at = leaf.elements.len() * ELEMENT_BYTES;
            for (index, element) in leaf.elements.iter().enumerate() {
                let offset = (at - index * ELEMENT_BYTES) as u32;
                for number in [element.flags, offset, element.key_bytes, element.value_bytes] {
                    self.page.extend_from_slice(&number.to_le_bytes());
                }
                at += element.key_bytes as usize + element.value_bytes as usize;
            }
            self.page.extend_from_slice(&leaf.data);
            self.end_page(pages)?;
        }
        self.next += pages as u64;
        let first_key = std::mem::take(&mut leaf.first_key);
        // What was allocated serves the next leaf, unless it was for something large.
        if leaf.data.capacity() <= 16 * PAGE_BYTES {
            leaf.data.clear();
            leaf.elements.clear();
            leaf.data_bytes = 0;
            self.tree.leaf = leaf;
        }
        self.add_child(0, &first_key, id)
    }

    fn add_child(&mut self, level: usize, first_key: &[u8], id: u64) -> Result<(), WriteError> {
        if level == self.tree.branches.len() {
            self.tree.branches.push(Branch::default());
        }
        let branch = &self.tree.branches[level];
        if !branch.children.is_empty() && branch.page_bytes() + ELEMENT_BYTES + first_key.len() > PAGE_BYTES {
            let (first_key, id) = self.end_branch(level)?;
            self.add_child(level + 1, &first_key, id)?;
        }
        let branch = &mut self.tree.branches[level];
        if branch.children.is_empty() {
            branch.first_key.extend_from_slice(first_key);
        }
        branch.children.push((first_key.len() as u32, id));
        branch.keys.extend_from_slice(first_key);
        Ok(())
    }

    /// Writes the branch of a level; returns its first key and its page.
    fn end_branch(&mut self, level: usize) -> Result<(Vec<u8>, u64), WriteError> {
        let branch = std::mem::take(&mut self.tree.branches[level]);
        let pages = branch.page_bytes().div_ceil(PAGE_BYTES);
        let id = self.next;
        if self.out.is_some() {
            self.begin_page(id, BRANCH, branch.children.len(), pages - 1);
            let mut at = branch.children.len() * ELEMENT_BYTES;
            for (index, (key_bytes, child)) in branch.children.iter().enumerate() {
                let offset = (at - index * ELEMENT_BYTES) as u32;
                self.page.extend_from_slice(&offset.to_le_bytes());
                self.page.extend_from_slice(&key_bytes.to_le_bytes());
                self.page.extend_from_slice(&child.to_le_bytes());
                at += *key_bytes as usize;
            }
            self.page.extend_from_slice(&branch.keys);
            self.end_page(pages)?;
        }
        self.next += pages as u64;
        Ok((branch.first_key, id))
    }

    /// Writes what is left of the tree, and returns its root.
    fn end_tree(&mut self) -> Result<u64, WriteError> {
        if !self.tree.leaf.elements.is_empty() || self.tree.branches.is_empty() {
            self.end_leaf()?;
        }
        let mut level = 0;
        let root = loop {
            let is_top = level + 1 == self.tree.branches.len();
            if let (true, [(_, only)]) = (is_top, &self.tree.branches[level].children[..]) {
                break *only;
            }
            let (first_key, id) = self.end_branch(level)?;
            if is_top {
                break id;
            }
            level += 1;
            self.add_child(level, &first_key, id)?;
        };
        self.tree = Tree::default();
        Ok(root)
    }

    fn begin_page(&mut self, id: u64, flags: u16, count: usize, overflow: usize) {
        let count = u16::try_from(count).expect("the elements of a page fit in it, and take 16 bytes each");
        let overflow = u32::try_from(overflow).expect("lengths of entries have 32 bits");
        self.page.clear();
        self.page.extend_from_slice(&id.to_le_bytes());
        self.page.extend_from_slice(&flags.to_le_bytes());
        self.page.extend_from_slice(&count.to_le_bytes());
        self.page.extend_from_slice(&overflow.to_le_bytes());
    }

    fn end_page(&mut self, pages: usize) -> Result<(), WriteError> {
        self.page.resize(pages * PAGE_BYTES, 0);
        if let Some((out, _)) = &mut self.out {
            out.write_all(&self.page)?;
        }
        if self.page.capacity() > 16 * PAGE_BYTES {
            self.page = Vec::new();
        }
        Ok(())
    }
}

impl Leaf {
    fn page_bytes(&self) -> usize {
        HEADER_BYTES + self.elements.len() * ELEMENT_BYTES + self.data_bytes
    }
}

impl Branch {
    fn page_bytes(&self) -> usize {
        HEADER_BYTES + self.children.len() * ELEMENT_BYTES + self.keys.len()
    }
}
