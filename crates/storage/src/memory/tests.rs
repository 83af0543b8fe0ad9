use super::*;
use crate::conformance::FAMILIES;

fn open(dir: &Path) -> Result<MemoryEngine, EngineError> {
    MemoryEngine::open(dir, FAMILIES)
}

const A: Family = Family(0);

fn put(engine: &MemoryEngine, key: &[u8], value: &[u8]) {
    let mut batch = engine.batch();
    batch.put(A, key, value);
    engine.write(batch).unwrap();
}

#[test]
fn passes_the_conformance_suite() {
    let dir = tempfile::tempdir().unwrap();
    crate::conformance::engine(|name| open(&dir.path().join(name)).unwrap());
}

#[test]
fn garbage_goes_when_nobody_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    let number = |number: u32| number.to_be_bytes();
    let fill = |value: &[u8]| {
        for key in 0..3000 {
            put(&engine, &number(key), value);
        }
    };
    fill(b"first");
    let bytes = engine.live_bytes();
    let view = engine.view();
    for _ in 0..3 {
        fill(b"again");
    }
    let mut batch = engine.batch();
    batch.delete_range(A, &number(100), &number(2900));
    engine.write(batch).unwrap();
    assert_eq!(view.get(A, &number(1000)).unwrap().unwrap(), "first");
    assert_eq!(engine.keys.load(Ordering::Relaxed), 200);
    assert!(engine.writer.lock().garbage.leaves() > 20);
    drop(view);
    for _ in 0..10 {
        put(&engine, b"other", b"");
    }
    assert!(engine.writer.lock().garbage.leaves() <= 1);
    assert!(engine.trees[0].leaves() <= 10, "{}", engine.trees[0].leaves());
    fill(b"third");
    assert_eq!(engine.live_bytes(), bytes + 9);
}

#[test]
fn a_snapshot_damaged_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    for key in 0..20u8 {
        put(&engine, &[key], &[key; 20]);
    }
    engine.flush().unwrap();
    put(&engine, b"later", b"");
    engine.flush().unwrap();
    drop(engine);
    let snapshots: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.file_name().unwrap() != "LOCK")
        .collect();
    let [file] = snapshots.as_slice() else {
        panic!("older snapshots are removed: {snapshots:?}")
    };
    assert_eq!(
        open(dir.path()).unwrap().get(A, &[7]).unwrap().unwrap(),
        [7; 20].as_slice()
    );

    let whole = std::fs::read(file).unwrap();
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x40;
        for damaged in [flipped, whole[..at].to_vec()] {
            std::fs::write(file, damaged).unwrap();
            match open(dir.path()).map(|_| ()) {
                Err(EngineError::Corrupt { place, .. }) => {
                    assert!(place.starts_with(file.to_str().unwrap()), "{place}");
                }
                other => panic!("at {at}: {other:?}"),
            }
        }
    }
    std::fs::write(file, [whole.as_slice(), b"more"].concat()).unwrap();
    assert!(matches!(open(dir.path()), Err(EngineError::Corrupt { .. })));
}

#[test]
fn an_unfinished_snapshot_is_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    put(&engine, b"key", b"value");
    engine.flush().unwrap();
    drop(engine);
    let draft = dir.path().join("00000000000000000009.draft");
    std::fs::write(&draft, "half").unwrap();
    let engine = open(dir.path()).unwrap();
    assert_eq!(engine.get(A, b"key").unwrap().unwrap(), "value");
    assert!(!draft.exists());
}

#[test]
fn a_failed_flush_is_final() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("memory");
    let engine = open(&dir).unwrap();
    put(&engine, b"key", b"value");
    std::fs::rename(&dir, root.path().join("gone")).unwrap();
    engine.flush().unwrap_err();
    std::fs::rename(root.path().join("gone"), &dir).unwrap();
    engine.flush().unwrap_err();
    let mut batch = engine.batch();
    batch.put(A, b"key", b"value");
    engine.write(batch).unwrap_err();
    assert_eq!(engine.get(A, b"key").unwrap().unwrap(), "value", "reads go on");
}

#[test]
fn a_directory_is_opened_once() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    let error = open(dir.path()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    drop(engine);
    open(dir.path()).unwrap();
}
