use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

type Buckets = BTreeMap<String, BTreeMap<Vec<u8>, Vec<u8>>>;

fn write(buckets: &Buckets) -> Vec<u8> {
    let mut measuring = Writer::<Vec<u8>>::measuring();
    for (name, entries) in buckets {
        measuring.bucket(name).unwrap();
        for (key, value) in entries {
            measuring.put_length(key, value.len()).unwrap();
        }
    }
    let shape = measuring.finish().unwrap();
    let mut file = Vec::new();
    let mut writer = Writer::new(&mut file, shape).unwrap();
    for (name, entries) in buckets {
        writer.bucket(name).unwrap();
        for (key, value) in entries {
            writer.put(key, value).unwrap();
        }
    }
    assert_eq!(writer.finish().unwrap(), shape);
    assert_eq!(file.len() as u64, shape.bytes());
    file
}

fn read(file: &[u8]) -> Result<Buckets, ReadError> {
    let reader = Reader::open(file)?;
    let mut buckets = Buckets::new();
    for bucket in reader.buckets()? {
        let mut entries = BTreeMap::new();
        let mut walk = reader.entries(&bucket)?;
        while let Some((key, value)) = walk.next()? {
            entries.insert(key.to_vec(), value.to_vec());
        }
        assert_eq!(
            reader.last_key(&bucket)?.as_ref(),
            entries.last_key_value().map(|(key, _)| key)
        );
        buckets.insert(String::from_utf8_lossy(&bucket.name).into_owned(), entries);
    }
    Ok(buckets)
}

fn numbered(count: u32, value_bytes: usize) -> Buckets {
    let entries = (0..count).map(|number| (number.to_be_bytes().to_vec(), vec![number as u8; value_bytes]));
    [
        ("empty".to_owned(), BTreeMap::new()),
        ("key".to_owned(), entries.collect()),
    ]
    .into()
}

#[test]
fn what_was_written_is_read() {
    for (count, value_bytes) in [
        (0, 0),
        (1, 0),
        (1, 3),
        (1, 100_000),
        (5, 5000),
        (200_000, 0),
        (30_000, 200),
    ] {
        let buckets = numbered(count, value_bytes);
        assert!(read(&write(&buckets)).unwrap() == buckets, "{count} x {value_bytes}");
    }
}

/// The first bytes of an empty file, as bbolt 1.4 has them for these numbers.
#[test]
fn meta_pages_have_golden_bytes() {
    let file = write(&Buckets::new());
    assert_eq!(file.len(), 4 * PAGE_BYTES);
    assert_eq!(file[..16], [0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(file[16..28], [0xed, 0xda, 0x0c, 0xed, 2, 0, 0, 0, 0, 0x10, 0, 0]);
    assert_eq!(u64_at(&file, 16 + 16), Some(3), "the root");
    assert_eq!(u64_at(&file, 16 + 32), Some(2), "the free list");
    assert_eq!(u64_at(&file, 16 + 40), Some(4), "the pages");
    assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8, "a published test vector");
}

#[test]
fn entries_must_come_in_order_and_alike() {
    let mut writer = Writer::<Vec<u8>>::measuring();
    writer.bucket("key").unwrap();
    writer.put(b"b", b"").unwrap();
    assert!(matches!(writer.put(b"b", b""), Err(WriteError::Entries(_))));
    let shape = Writer::<Vec<u8>>::measuring().finish().unwrap();
    let mut file = Vec::new();
    let mut writer = Writer::new(&mut file, shape).unwrap();
    writer.bucket("key").unwrap();
    assert!(matches!(writer.finish(), Err(WriteError::Entries(_))));
}

#[test]
fn either_meta_page_will_do_and_the_newer_one_counts() {
    let buckets = numbered(1000, 10);
    let mut file = write(&buckets);
    file[20] ^= 1;
    assert!(read(&file).unwrap() == buckets, "the second");
    file[PAGE_BYTES + 20] ^= 1;
    assert!(matches!(read(&file), Err(ReadError::NotBbolt)));

    let mut file = write(&buckets);
    let newer = Meta {
        root: 4,
        transaction: 9,
        ..Meta::decode(file[16..16 + META_BYTES].try_into().unwrap()).unwrap()
    };
    file[PAGE_BYTES + 16..PAGE_BYTES + 16 + META_BYTES].copy_from_slice(&newer.encode());
    assert!(read(&file).is_err(), "page 4 holds keys, not buckets");
}

#[test]
fn bad_files_are_refused_in_one_line() {
    let file = write(&numbered(3000, 50));
    let text = |file: &[u8]| read(file).unwrap_err().to_string();
    assert!(text(b"").contains("not a bbolt database"));
    assert!(text(&[7; 20_000]).contains("not a bbolt database"));
    assert!(text(&file[..file.len() - 1]).contains("truncated"));
    assert!(text(&file[..5000]).contains("truncated"));
    let mut other_id = file.clone();
    other_id[3 * PAGE_BYTES] ^= 1;
    assert_eq!(text(&other_id), "is damaged: page 3 has the id of another one");
}

/// A branch that points to itself, to its parent, or to another branch in the place of a leaf: none of them is an endless
/// walk.
#[test]
fn loops_end() {
    let file = write(&numbered(100_000, 0));
    let pages = file.len() / PAGE_BYTES;
    let is_branch = |page: &usize| u16_at(&file, page * PAGE_BYTES + 8) == Some(BRANCH);
    let branches: Vec<usize> = (3..pages).filter(is_branch).collect();
    assert!(branches.len() > 2);
    for &branch in &branches {
        let elements = u16_at(&file, branch * PAGE_BYTES + 10).map_or(0, usize::from);
        for &target in &branches {
            for element in [0, 5].into_iter().filter(|&element| element < elements) {
                let mut looped = file.clone();
                let at = branch * PAGE_BYTES + HEADER_BYTES + element * ELEMENT_BYTES + 8;
                looped[at..at + 8].copy_from_slice(&(target as u64).to_le_bytes());
                if looped != file {
                    assert!(read(&looped).is_err());
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn any_entries_survive(
        buckets in prop::collection::btree_map(
            "[a-z]{1,9}",
            prop::collection::btree_map(
                prop::collection::vec(any::<u8>(), 0..60),
                (any::<u8>(), prop_oneof![9 => 0..300usize, 1 => 0..30_000usize]).prop_map(|(byte, len)| vec![byte; len]),
                0..200,
            ),
            0..6,
        )
    ) {
        prop_assert!(read(&write(&buckets)).unwrap() == buckets);
    }

    /// Whatever bytes are changed, the answer is entries or an error.
    #[test]
    fn damage_never_panics(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        at_heads in any::<bool>(),
    ) {
        let mut file = write(&numbered(20_000, 5));
        let pages = file.len() / PAGE_BYTES;
        for (index, byte) in flips {
            // Most of what can go wrong is at the heads of pages.
            let at = if at_heads {
                index.index(pages * 64) / 64 * PAGE_BYTES + index.index(64)
            } else {
                index.index(file.len())
            };
            file[at] = byte;
        }
        let _ = read(&file);
    }
}
