use super::*;
use crate::conformance::FAMILIES;

fn open(dir: &Path, wal: bool) -> Result<RocksEngine, EngineError> {
    RocksEngine::open(
        dir,
        FAMILIES,
        &RocksOptions {
            wal,
            ..RocksOptions::default()
        },
    )
}

#[test]
fn passes_the_conformance_suite() {
    for wal in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        crate::conformance::engine(|name| open(&dir.path().join(name), wal).unwrap());
    }
}

#[test]
fn its_own_log_makes_every_write_durable() {
    let dir = tempfile::tempdir().unwrap();
    let write = |engine: &RocksEngine| {
        let mut batch = engine.batch();
        batch.put(Family(0), b"key", b"value");
        engine.write(batch).unwrap()
    };
    let engine = open(dir.path(), true).unwrap();
    assert_eq!(write(&engine).fsyncs, 1);
    assert_eq!(engine.get_durable(Family(0), b"key").unwrap().unwrap(), "value");
    drop(engine);
    // It may be switched off and on.
    let engine = open(dir.path(), false).unwrap();
    assert_eq!(engine.get(Family(0), b"key").unwrap().unwrap(), "value");
    assert_eq!(write(&engine).fsyncs, 0);
}

#[test]
fn a_directory_is_opened_once() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), false).unwrap();
    let error = open(dir.path(), false).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("is in use by another process"), "{error}");
    drop(engine);
    open(dir.path(), false).unwrap();
}

#[test]
fn unknown_families_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), false).unwrap());
    let fewer = RocksEngine::open(dir.path(), &FAMILIES[..2], &RocksOptions::default());
    let error = fewer.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("written by a newer release"), "{error}");
    let more = [
        FAMILIES,
        &[FamilySpec {
            name: "new",
            access: crate::Access::Point,
        }],
    ]
    .concat();
    let engine = RocksEngine::open(dir.path(), &more, &RocksOptions::default()).unwrap();
    assert_eq!(engine.get(Family(3), b"key").unwrap(), None);
}

#[test]
fn a_failed_flush_is_final() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir.path().join("rocksdb"), false).unwrap();
    let write = || {
        let mut batch = engine.batch();
        batch.put(Family(0), b"key", b"value");
        engine.write(batch)
    };
    write().unwrap();
    engine.flush().unwrap();
    write().unwrap();
    // No file can be made any more.
    std::fs::rename(dir.path().join("rocksdb"), dir.path().join("gone")).unwrap();
    let failed = engine.flush().unwrap_err();
    std::fs::rename(dir.path().join("gone"), dir.path().join("rocksdb")).unwrap();
    assert!(matches!(failed, EngineError::Io { .. }), "{failed}");
    for _ in 0..2 {
        assert!(write().is_err() && engine.flush().is_err());
    }
    assert_eq!(engine.get(Family(0), b"key").unwrap().unwrap(), "value", "reads go on");
}

#[test]
fn damage_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), false).unwrap();
    let mut batch = engine.batch();
    for number in 0..1000u32 {
        batch.put(
            Family(1),
            &number.to_be_bytes(),
            &number.wrapping_mul(0x9E37_79B9).to_be_bytes().repeat(40),
        );
    }
    engine.write(batch).unwrap();
    engine.flush().unwrap();
    drop(engine);
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "sst") {
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[1000] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let damaged = |error| matches!(error, EngineError::Corrupt { .. });
    let engine = match open(dir.path(), false) {
        Ok(engine) => engine,
        Err(error) => return assert!(damaged(error)),
    };
    let view = engine.view();
    let mut cursor = view.cursor(Family(1), KeyRange { start: b"", end: None }).unwrap();
    let mut outcome = cursor.seek_first();
    while outcome.is_ok() && cursor.entry().is_some() {
        outcome = cursor.next();
    }
    assert!(damaged(outcome.unwrap_err()));
}
