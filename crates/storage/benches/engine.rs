//! What a batch costs: for each operation a random key in one family and an ascending one in another, as a put does.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use metastore_storage::conformance::FAMILIES;
use metastore_storage::{Batch, Engine, Family, MemoryEngine, RocksEngine, RocksOptions, View};

/// Keys that are there before: the working set of a cluster of some size.
const KEYS: u64 = 200_000;
const VALUE: [u8; 256] = [7; 256];

/// The key of an object, scattered over the key space.
fn key(number: u64) -> Vec<u8> {
    let scattered = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    format!("/registry/pods/namespace-{:03}/{scattered:016x}", scattered % 100).into_bytes()
}

fn fill<B: Batch>(batch: &mut B, random: u64, ascending: u64) {
    batch.put(Family(0), &key(random % KEYS), &VALUE);
    batch.put(Family(1), &ascending.to_be_bytes(), &VALUE);
}

fn engine<E: Engine>(criterion: &mut Criterion, name: &str, engine: &E) {
    let mut ascending = 0;
    while ascending < KEYS {
        let mut batch = engine.batch();
        for _ in 0..1000 {
            fill(&mut batch, ascending, ascending);
            ascending += 1;
        }
        engine.write(batch).unwrap();
    }

    let mut group = criterion.benchmark_group(format!("{name}: write a batch of puts"));
    group.sample_size(20);
    let mut random = 1u64;
    for count in [1, 16, 256] {
        group.throughput(Throughput::Elements(count));
        group.bench_function(count.to_string(), |bencher| {
            bencher.iter(|| {
                // As a reader would hold one.
                let _view = engine.view();
                let mut batch = engine.batch();
                for _ in 0..count {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    fill(&mut batch, random >> 20, ascending);
                    ascending += 1;
                }
                engine.write(batch).unwrap()
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group(format!("{name}: read"));
    group.sample_size(20);
    let mut next = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        key((random >> 20) % KEYS)
    };
    group.bench_function("get", |bencher| {
        bencher.iter_batched(
            &mut next,
            |key| engine.get(Family(0), &key).unwrap(),
            BatchSize::SmallInput,
        );
    });
    group.bench_function("view and get", |bencher| {
        bencher.iter_batched(
            &mut next,
            |key| engine.view().get(Family(0), &key).unwrap(),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn engines(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let rocks = RocksEngine::open(&dir.path().join("rocksdb"), FAMILIES, &RocksOptions::default()).unwrap();
    engine(criterion, "rocksdb", &rocks);
    drop(rocks);
    let memory = MemoryEngine::open(&dir.path().join("memory"), FAMILIES).unwrap();
    engine(criterion, "memory", &memory);
}

criterion_group!(benches, engines);
criterion_main!(benches);
