//! RocksDB's numbers, under names for `/metrics`.

use rocksdb::properties;
use rocksdb::statistics::Ticker;

use super::RocksEngine;
use crate::engine::EngineStat;

/// Counters that RocksDB keeps by itself.
const TICKERS: &[(Ticker, &str, &str)] = &[
    (
        Ticker::BlockCacheHit,
        "rocksdb_block_cache_hits_total",
        "Blocks found in the block cache.",
    ),
    (
        Ticker::BlockCacheMiss,
        "rocksdb_block_cache_misses_total",
        "Blocks not found in the block cache.",
    ),
    (
        Ticker::MemtableHit,
        "rocksdb_memtable_hits_total",
        "Lookups answered by a memtable.",
    ),
    (
        Ticker::MemtableMiss,
        "rocksdb_memtable_misses_total",
        "Lookups that no memtable answered.",
    ),
    (
        Ticker::BloomFilterUseful,
        "rocksdb_bloom_filter_useful_total",
        "File reads that a bloom filter saved.",
    ),
    (Ticker::NumberKeysRead, "rocksdb_keys_read_total", "Keys looked up."),
    (Ticker::NumberKeysWritten, "rocksdb_keys_written_total", "Keys written."),
    (Ticker::NumberDbSeek, "rocksdb_seeks_total", "Cursor seeks."),
    (Ticker::NumberDbNext, "rocksdb_nexts_total", "Cursor steps forward."),
    (
        Ticker::BytesRead,
        "rocksdb_read_bytes_total",
        "Bytes returned by lookups.",
    ),
    (
        Ticker::BytesWritten,
        "rocksdb_write_bytes_total",
        "Bytes of batches written.",
    ),
    (
        Ticker::FlushWriteBytes,
        "rocksdb_flush_write_bytes_total",
        "Bytes written by flushes.",
    ),
    (
        Ticker::CompactReadBytes,
        "rocksdb_compaction_read_bytes_total",
        "Bytes read by compactions.",
    ),
    (
        Ticker::CompactWriteBytes,
        "rocksdb_compaction_write_bytes_total",
        "Bytes written by compactions.",
    ),
    (
        Ticker::StallMicros,
        "rocksdb_stall_microseconds_total",
        "Time that writes were held back for compactions or flushes.",
    ),
    (
        Ticker::WalFileSynced,
        "rocksdb_wal_syncs_total",
        "fsyncs of RocksDB's own log.",
    ),
    (
        Ticker::WalFileBytes,
        "rocksdb_wal_bytes_total",
        "Bytes written to RocksDB's own log.",
    ),
    (
        Ticker::ErrorHandlerBgErrorCount,
        "rocksdb_background_errors_total",
        "Errors in flushes and compactions.",
    ),
];

pub(super) fn collect(engine: &RocksEngine) -> Vec<EngineStat> {
    let shared = &engine.shared;
    let sum = |name| shared.property_sum(name) as f64;
    // Properties of the whole database, the same whichever family is asked.
    let whole = |name| shared.db.property_int_value(name).ok().flatten().unwrap_or(0) as f64;
    let l0 = properties::num_files_at_level(0);
    let l0_files = |family| -> u64 {
        let text = shared.db.property_value_cf(family, &l0).ok().flatten();
        text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };

    let gauges: &[(&'static str, &'static str, f64)] = &[
        (
            "rocksdb_block_cache_usage_bytes",
            "Block cache in use, write buffers charged to it included.",
            engine.cache.get_usage() as f64,
        ),
        (
            "rocksdb_block_cache_pinned_bytes",
            "Block cache that cannot be given up now.",
            engine.cache.get_pinned_usage() as f64,
        ),
        (
            "rocksdb_block_cache_capacity_bytes",
            "The limit of the block cache.",
            engine.cache.get_capacity() as f64,
        ),
        (
            "rocksdb_memtable_bytes",
            "Memory of all write buffers.",
            engine.write_buffers.get_usage() as f64,
        ),
        (
            "rocksdb_memtable_unflushed_bytes",
            "Write buffers that are not on disk yet.",
            sum(properties::CUR_SIZE_ALL_MEM_TABLES),
        ),
        (
            "rocksdb_table_readers_bytes",
            "Memory of open files outside the block cache.",
            sum(properties::ESTIMATE_TABLE_READERS_MEM),
        ),
        (
            "rocksdb_immutable_memtables",
            "Write buffers that wait for their flush.",
            sum(properties::NUM_IMMUTABLE_MEM_TABLE),
        ),
        (
            "rocksdb_pending_compaction_bytes",
            "Bytes that compactions still have to rewrite, about.",
            sum(properties::ESTIMATE_PENDING_COMPACTION_BYTES),
        ),
        (
            "rocksdb_l0_files",
            "Files on the level that flushes write to.",
            shared.families.iter().map(l0_files).sum::<u64>() as f64,
        ),
        (
            "rocksdb_running_compactions",
            "Compactions running now.",
            whole(properties::NUM_RUNNING_COMPACTIONS),
        ),
        (
            "rocksdb_running_flushes",
            "Flushes running now.",
            whole(properties::NUM_RUNNING_FLUSHES),
        ),
        (
            "rocksdb_sst_bytes",
            "Bytes of all files.",
            sum(properties::TOTAL_SST_FILES_SIZE),
        ),
        (
            "rocksdb_live_data_bytes",
            "Bytes of live data in files, about.",
            sum(properties::ESTIMATE_LIVE_DATA_SIZE),
        ),
        (
            "rocksdb_estimated_keys",
            "Keys in all families, about.",
            sum(properties::ESTIMATE_NUM_KEYS),
        ),
        ("rocksdb_snapshots", "Views in use.", whole(properties::NUM_SNAPSHOTS)),
        (
            "rocksdb_write_stopped",
            "1 while writes wait for flushes or compactions.",
            whole(properties::IS_WRITE_STOPPED),
        ),
        (
            "rocksdb_delayed_write_rate",
            "Bytes a second that writes are slowed down to; 0 when they are not.",
            whole(properties::ACTUAL_DELAYED_WRITE_RATE),
        ),
    ];
    let gauges = gauges.iter().map(|&(name, help, value)| EngineStat {
        name,
        help,
        counter: false,
        value,
    });
    let counters = TICKERS.iter().map(|&(ticker, name, help)| EngineStat {
        name,
        help,
        counter: true,
        value: engine.options.get_ticker_count(ticker) as f64,
    });
    gauges.chain(counters).collect()
}
