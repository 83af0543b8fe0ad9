//! The settings of RocksDB, with the reason of each default.

use rocksdb::statistics::StatsLevel;
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, DBCompressionType, LogLevel, Options, WriteBufferManager,
};

use crate::engine::Access;

/// How RocksDB's files are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all.
    None,
    /// LZ4 everywhere: the least CPU.
    Lz4,
    /// LZ4 where data is rewritten often, Zstandard on the last level, where most of it comes to rest.
    #[default]
    Zstd,
}

/// Settings of [`RocksEngine`](super::RocksEngine).
///
/// # Memory
/// The defaults hold 600 MB of resident memory for a whole node whatever the number of keys. What RocksDB uses is
/// bounded by [`block_cache_bytes`](RocksOptions::block_cache_bytes): the write buffers are charged to the same cache,
/// and so are index and filter blocks, which are partitioned so that only the parts in use are held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RocksOptions {
    /// Threads for flushes and compactions together, at least 2. Default 4.
    pub background_jobs: u32,
    /// Bytes of one family's write buffer, after which all families are flushed together. Default 64 MiB. Half
    /// as much writes as fast and takes some 40 MiB less at the peak, but more newest records are then read from files,
    /// of which several are asked: gets of 10,000 keys that are overwritten all the time took 3 to 34 % more CPU.
    pub write_buffer_bytes: usize,
    /// Write buffers of one family, the one being filled and those being flushed, before writes wait. Default 3.
    pub max_write_buffers: u32,
    /// Bytes of all write buffers of all families together, after which they are flushed. Default 128 MiB: the two
    /// families that a put writes to fill evenly, so this is where both reach `write_buffer_bytes`.
    pub write_buffers_total_bytes: usize,
    /// Bytes that a file on the first sorted level aims at. Default 64 MiB.
    pub target_file_bytes: u64,
    /// Bytes of the cache for blocks, indexes, filters and (charged to it) write buffers. Default 256 MiB.
    ///
    /// The report that MetaStore started from uses 512 MiB for blocks alone. With that and three write buffers a family
    /// a node would pass 600 MB, so the default is half, with the write buffers inside it. Where memory is plenty,
    /// raise it first of all.
    pub block_cache_bytes: usize,
    /// Bits a key of the bloom filters in families read by point lookups; 0 turns them off. Default 10 (1 % false
    /// positives).
    pub bloom_bits: u32,
    /// Default [`Compression::Zstd`].
    pub compression: Compression,
    /// Whether RocksDB writes its own log as well, and every write waits for its fsync. Default off: the Raft log
    /// holds every write already, and a restart replays it from what was flushed.
    ///
    /// On, a restart replays nothing from the Raft log, at the price of a second fsync for each write. It is synced
    /// with each write, and not from time to time, since only that buys anything over the Raft log.
    pub wal: bool,
    /// File descriptors that RocksDB may hold open. Default 1024, which covers 64 GiB of files; beyond, the least used
    /// ones are reopened on demand.
    pub open_files_max: u32,
}

impl Default for RocksOptions {
    fn default() -> RocksOptions {
        RocksOptions {
            background_jobs: 4,
            write_buffer_bytes: 64 << 20,
            max_write_buffers: 3,
            write_buffers_total_bytes: 128 << 20,
            target_file_bytes: 64 << 20,
            block_cache_bytes: 256 << 20,
            bloom_bits: 10,
            compression: Compression::Zstd,
            wal: false,
            open_files_max: 1024,
        }
    }
}

impl RocksOptions {
    /// The settings of the database as a whole.
    pub(super) fn database(&self, write_buffers: &WriteBufferManager) -> Options {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_max_background_jobs(clamp(self.background_jobs.max(2)));
        options.set_max_open_files(clamp(self.open_files_max));
        options.set_write_buffer_manager(write_buffers);

        options.set_paranoid_checks(true);
        options.set_max_bgerror_resume_count(0);
        // Without its own log, families would otherwise be flushed one by one and a crash would tear batches apart.
        options.set_atomic_flush(!self.wal);
        options.set_avoid_flush_during_shutdown(true);

        // Hand dirty pages to the disk in small steps: a whole write buffer at once would hold up the fdatasync of the Raft
        // log, which every write waits for.
        options.set_bytes_per_sync(1 << 20);
        options.set_skip_stats_update_on_db_open(true);

        // RocksDB's own text log: warnings only, a few small files.
        options.set_log_level(LogLevel::Warn);
        options.set_keep_log_file_num(4);
        options.set_max_log_file_size(4 << 20);
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        options.enable_statistics();
        options.set_statistics_level(StatsLevel::ExceptHistogramOrTimers);
        options
    }

    /// The settings of one family.
    pub(super) fn family(&self, access: Access, cache: &Cache) -> Options {
        let mut options = Options::default();
        options.set_write_buffer_size(self.write_buffer_bytes);
        options.set_max_write_buffer_number(clamp(self.max_write_buffers.max(2)));
        options.set_target_file_size_base(self.target_file_bytes);
        options.set_level_compaction_dynamic_level_bytes(true);
        let (upper, last) = match self.compression {
            Compression::None => (DBCompressionType::None, DBCompressionType::None),
            Compression::Lz4 => (DBCompressionType::Lz4, DBCompressionType::Lz4),
            Compression::Zstd => (DBCompressionType::Lz4, DBCompressionType::Zstd),
        };
        options.set_compression_type(upper);
        options.set_bottommost_compression_type(last);

        // Reads slow down with the number of range deletions in a memtable, and with runs of deleted keys in a file.
        options.set_memtable_max_range_deletions(512);
        options.add_compact_on_deletion_collector_factory(16 << 10, 8 << 10, 0.5);

        let mut table = BlockBasedOptions::default();
        table.set_block_cache(cache);
        table.set_cache_index_and_filter_blocks(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(true);
        table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
        table.set_partition_filters(true);
        table.set_metadata_block_size(4 << 10);
        table.set_pin_top_level_index_and_filter(true);
        match access {
            Access::Point => {
                table.set_block_size(4 << 10);
                if self.bloom_bits > 0 {
                    table.set_bloom_filter(f64::from(self.bloom_bits), false);
                    // Lets a lookup pass over a memtable that does not hold the key.
                    options.set_memtable_whole_key_filtering(true);
                    options.set_memtable_prefix_bloom_ratio(0.02);
                }
            }
            // Read in runs: larger blocks compress better and need a smaller index.
            Access::Sequential => table.set_block_size(16 << 10),
        }
        options.set_block_based_table_factory(&table);
        options
    }
}

fn clamp(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}
