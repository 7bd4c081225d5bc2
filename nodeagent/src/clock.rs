//! The host's clocks. Durations that matter are counted on CLOCK_BOOTTIME: it goes on while the machine sleeps and no
//! administrator can set it. The wall clock only dates what people read.

use std::{
    fs,
    time::{SystemTime, UNIX_EPOCH},
};

use model::Timestamp;
use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since the host booted, sleep included.
pub fn boottime_nanos() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every supported kernel has CLOCK_BOOTTIME");
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
}

pub fn boottime_millis() -> u64 {
    boottime_nanos() / 1_000_000
}

/// What the host believes the date is; a clock before 1970 counts as 1970.
pub fn wall() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// The boot of the machine that `boottime_nanos` counts from: a time of another boot says nothing.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().into()
}
