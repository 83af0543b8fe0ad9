//! The reader of database files, and what is made of their entries: whatever the bytes, an answer or an error.

#![no_main]

use std::path::PathBuf;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use mvcc::keys::FAMILIES;
use mvcc::{Machine, Options};
use storage::bbolt::Reader;
use storage::MemoryEngine;

/// Pages have checksums only in the metas; without a valid one nothing else is looked at. So the first pages of every
/// input are made valid, and the input says what they point to.
fn with_metas(data: &[u8]) -> Option<Vec<u8>> {
    const PAGE: usize = 4096;
    let (numbers, pages) = data.split_at_checked(4)?;
    let count = 2 + pages.len().div_ceil(PAGE);
    let mut file = vec![0; PAGE * count];
    file[2 * PAGE..2 * PAGE + pages.len()].copy_from_slice(pages);
    for page in 0..2 {
        let meta = &mut file[page * PAGE + 16..][..64];
        meta[..4].copy_from_slice(&0xED0C_DAED_u32.to_le_bytes());
        meta[4] = 2;
        meta[8..12].copy_from_slice(&(PAGE as u32).to_le_bytes());
        meta[16] = numbers[page];
        meta[40..48].copy_from_slice(&(count as u64).to_le_bytes());
        meta[48] = numbers[2 + page];
        let hash = meta[..56].iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        meta[56..].copy_from_slice(&hash.to_le_bytes());
    }
    Some(file)
}

/// What is imported is a state that a machine opens. The engine lies in memory as far as there is such a file system.
fn import(reader: &Reader<&[u8]>, bump: u64) {
    let memory = PathBuf::from("/dev/shm");
    let place = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let dir = place.join(format!("metastore-fuzz-{}", std::process::id()));
    let engine = Arc::new(MemoryEngine::open(&dir, FAMILIES).expect("an empty directory will do"));
    if let Ok(imported) = mvcc::backup::import(reader, &*engine, bump, &mut |_| {}) {
        let options = Options {
            record_cache_bytes: 1 << 16,
            list_cache_bytes: 0,
            ..Options::default()
        };
        let machine = Machine::open(engine.clone(), &options).expect("what was imported is whole");
        let reader = machine.reader();
        assert_eq!((reader.revision(), reader.keys()), (imported.revision, imported.keys));
    }
    drop(engine);
    std::fs::remove_dir_all(&dir).expect("it is ours");
}

fn read(file: &[u8]) {
    let Ok(reader) = Reader::open(file) else { return };
    if mvcc::backup::status(&reader, &mut |_| {}).is_ok() {
        for bump in [0, 7] {
            import(&reader, bump);
        }
    }
    for bucket in reader.buckets().unwrap_or_default() {
        let _ = reader.last_key(&bucket);
        let Ok(mut entries) = reader.entries(&bucket) else { continue };
        let mut last: Option<Vec<u8>> = None;
        while let Ok(Some((key, _))) = entries.next() {
            assert!(last.is_none_or(|last| key > &last[..]), "keys come in order");
            last = Some(key.to_vec());
        }
    }
}

fuzz_target!(|data: &[u8]| {
    read(data);
    if let Some(file) = with_metas(data) {
        read(&file);
    }
});
