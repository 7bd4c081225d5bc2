//! How RocksDB is opened: two sets of options, because a log and a cache of the log need opposite things.

use std::path::Path;

use rocksdb::{BlockBasedOptions, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode, Options};

use crate::failure::StorageError;

/// Entries are small and short-lived; a flushed memtable holds a few hundred thousand of them.
const LOG_MEMTABLE_BYTES: usize = 64 << 20;
/// What a start reads again at most: a second's work. Beyond it RocksDB flushes whatever holds the oldest file back.
const LOG_WAL_BYTES: u64 = 128 << 20;
/// A flush of the state tables costs one sync; at this size it happens seldom and replays little after a crash.
const STATE_MEMTABLE_BYTES: usize = 32 << 20;
/// RocksDB writes its own journal of events; ten files of this size are enough to see what it did.
const INFO_LOG_BYTES: usize = 4 << 20;
const INFO_LOG_FILES: usize = 10;

pub const LOG_ENTRIES: &str = "entries";
pub const LOG_META: &str = "meta";
pub const STATE_ROWS: &str = "rows";
pub const STATE_META: &str = "meta";

/// The Raft log. `TolerateCorruptedTailRecords` accepts the torn tail of a power cut and refuses damage before it;
/// RocksDB's default would silently drop everything behind one flipped byte.
pub fn open_log(path: &Path) -> Result<DB, StorageError> {
    let mut options =
        common().get_options_from_string("track_and_verify_wals=true").map_err(StorageError::database(path))?;
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_max_total_wal_size(LOG_WAL_BYTES);
    // A recycled file ends in old records, which cannot be told from damage.
    options.set_recycle_log_file_num(0);
    open(path, &options, [LOG_ENTRIES, LOG_META], LOG_MEMTABLE_BYTES, DBCompressionType::None)
}

/// The state tables. They have no write-ahead log of their own: the Raft log is it. `atomic_flush` keeps rows and
/// applied position of one batch together on disk.
pub fn open_state(path: &Path) -> Result<DB, StorageError> {
    let mut options = common();
    options.set_atomic_flush(true);
    open(path, &options, [STATE_ROWS, STATE_META], STATE_MEMTABLE_BYTES, DBCompressionType::Lz4)
}

pub fn open_log_read_only(path: &Path) -> Result<DB, StorageError> {
    let mut options = Options::default();
    options.set_paranoid_checks(true);
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    DB::open_cf_for_read_only(&options, path, [LOG_ENTRIES, LOG_META], false).map_err(StorageError::database(path))
}

pub fn open_state_read_only(path: &Path) -> Result<DB, StorageError> {
    DB::open_cf_for_read_only(&Options::default(), path, [STATE_ROWS, STATE_META], false)
        .map_err(StorageError::database(path))
}

fn open(
    path: &Path,
    options: &Options,
    families: [&str; 2],
    memtable_bytes: usize,
    compression: DBCompressionType,
) -> Result<DB, StorageError> {
    let families = families.map(|name| {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_format_version(5);
        let mut family = Options::default();
        family.set_write_buffer_size(memtable_bytes);
        family.set_compression_type(compression);
        family.set_block_based_table_factory(&blocks);
        ColumnFamilyDescriptor::new(name, family)
    });
    DB::open_cf_descriptors(options, path, families).map_err(StorageError::database(path))
}

fn common() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_paranoid_checks(true);
    // One flush and one compaction at a time: a controller shares its machine.
    options.set_max_background_jobs(2);
    options.set_max_log_file_size(INFO_LOG_BYTES);
    options.set_keep_log_file_num(INFO_LOG_FILES);
    options
}
