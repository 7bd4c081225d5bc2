//! What the disk itself can do: how often one writer can append a record and have it synced.

use std::{
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use serde::Serialize;

/// About a log record with a value of 256 bytes.
const RECORD: [u8; 320] = [7; 320];
/// Space that is there before the measurement, so that only data is synced, not the file's length.
const FILE_BYTES: usize = 16 << 20;

#[derive(Debug, Serialize)]
pub struct SyncRate {
    pub per_second: f64,
    pub p50_micros: u64,
    pub p99_micros: u64,
    #[serde(skip)]
    histogram: Histogram<u64>,
    #[serde(skip)]
    time: Duration,
}

impl Default for SyncRate {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are constant");
        Self { per_second: 0.0, p50_micros: 0, p99_micros: 0, histogram, time: Duration::ZERO }
    }
}

impl SyncRate {
    /// Adds what `time` of writing and syncing shows.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn measure(&mut self, folder: &Path, time: Duration) -> std::io::Result<()> {
        let path = folder.join("sync-rate");
        let mut file = File::create(&path)?;
        file.write_all(&vec![0; FILE_BYTES])?;
        file.sync_all()?;
        let began = Instant::now();
        let mut offset = 0;
        while began.elapsed() < time {
            let start = Instant::now();
            file.write_all_at(&RECORD, offset % (FILE_BYTES - RECORD.len()) as u64)?;
            file.sync_data()?;
            self.histogram.saturating_record(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
            offset += RECORD.len() as u64;
        }
        self.time += began.elapsed();
        self.per_second = self.histogram.len() as f64 / self.time.as_secs_f64();
        self.p50_micros = self.histogram.value_at_quantile(0.5);
        self.p99_micros = self.histogram.value_at_quantile(0.99);
        std::fs::remove_file(path)
    }
}
