//! What an append to the Raft log costs, its fdatasync included.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use metastore_storage::conformance::entry;
use metastore_storage::{RaftEngineLog, RaftLog, RaftLogOptions};

fn append(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let log = RaftEngineLog::open(dir.path(), &RaftLogOptions::default()).unwrap();
    let mut group = criterion.benchmark_group("append and sync entries of 300 bytes");
    group.sample_size(20);
    for count in [1, 16, 256] {
        group.throughput(Throughput::Elements(count));
        group.bench_function(count.to_string(), |bencher| {
            bencher.iter_batched(
                || {
                    let next = log.last_index() + 1;
                    log.trim(next.saturating_sub(10_000)).unwrap();
                    (next..next + count)
                        .map(|index| entry(index, 1, 300))
                        .collect::<Vec<_>>()
                },
                |entries| log.append(&entries, None, true).unwrap(),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("read entries of 300 bytes from memory");
    group.sample_size(20);
    let last = log.last_index();
    group.throughput(Throughput::Elements(256));
    group.bench_function("256", |bencher| {
        bencher.iter(|| log.entries(last - 255, last + 1, u64::MAX).unwrap())
    });
    group.finish();
}

criterion_group!(benches, append);
criterion_main!(benches);
