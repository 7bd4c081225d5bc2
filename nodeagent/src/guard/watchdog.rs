//! The machine's watchdog, hardware or `softdog`: it resets the host when nobody feeds it, so it closes the case that
//! guard and agent are gone, or the kernel stands still, while guests run on.
//!
//! ```text
//!   fed ─ fed ─ fed ───┐ not fed: the lease may end within its patience
//!                      └─────── lease ends ── all stand still: fed ─ fed
//!                                         └── or not: reset, before the machines may be given away
//! ```
//!
//! It is fed only while its patience from now ends before the quorum may give anything away, or when the look-out has
//! just seen that nothing runs that may not. It is never disarmed: an end of the guard that nobody follows up is the
//! very case it is for.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::fd::AsRawFd,
    path::Path,
};

use model::lease::{LEASE_NANOS, MARGIN_NANOS};
use nix::libc;

use crate::lease::Permit;

/// What is asked of the device. A few times the period of feeding, and well below the lease.
const PATIENCE_SECONDS: i32 = 2;
/// It is fed so often.
const PERIOD_NANOS: u64 = 500_000_000;
/// What the look-out saw so long ago is no proof any more.
const FRESH_NANOS: u64 = 1_000_000_000;
/// `WDIOC_SETTIMEOUT`, `_IOWR('W', 6, int)`.
const SET_TIMEOUT: libc::c_ulong = 0xc004_5706;

pub struct Watchdog {
    device: File,
    patience_nanos: u64,
    fed_at: u64,
}

impl Watchdog {
    /// Opening it starts it.
    pub fn open(path: &Path) -> Result<Self, String> {
        let failed = |what: &str, why: String| format!("cannot {what} the watchdog {}: {why}", path.display());
        let device = OpenOptions::new().write(true).open(path).map_err(|e| failed("open", e.to_string()))?;
        let mut seconds = PATIENCE_SECONDS;
        // SAFETY: the device reads and writes one int, valid for the length of the call.
        if unsafe { libc::ioctl(device.as_raw_fd(), SET_TIMEOUT, &raw mut seconds) } != 0 {
            return Err(failed("set the patience of", std::io::Error::last_os_error().to_string()));
        }
        let patience_nanos = u64::try_from(seconds).unwrap_or(u64::MAX).saturating_mul(1_000_000_000);
        // It would starve between one answered beat and the next.
        if patience_nanos >= LEASE_NANOS - 2 * PERIOD_NANOS {
            return Err(failed("use", format!("it waits {seconds} s at least, as long as a lease")));
        }
        Ok(Self { device, patience_nanos, fed_at: 0 })
    }

    /// Called at each look of the deadline thread. A device's write does not block.
    pub fn feed_if(&mut self, now: u64, permit: &Permit, settled_at: u64) {
        let due = now.saturating_sub(self.fed_at) >= PERIOD_NANOS;
        if due && may_feed(now, permit, settled_at, self.patience_nanos) && self.device.write_all(b"\n").is_ok() {
            self.fed_at = now;
        }
    }
}

fn may_feed(now: u64, permit: &Permit, settled_at: u64, patience_nanos: u64) -> bool {
    let in_time = now.saturating_add(patience_nanos) <= permit.until.saturating_add(MARGIN_NANOS);
    let settled = now >= permit.until && settled_at >= permit.until && now.saturating_sub(settled_at) < FRESH_NANOS;
    !permit.guards_any() || in_time || settled
}

#[cfg(test)]
mod tests {
    use model::VmId;

    use super::*;
    use crate::lease::{Machine, Standing};

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn it_starves_before_anything_may_be_given_away_unless_all_stand_still() {
        let exclusive = Machine { vm: VmId(1), epoch: 1, standing: Standing::Leased };
        let permit = Permit { incarnation: 1, until: 10 * SECOND, machines: vec![exclusive] };
        let patience = 2 * SECOND;
        let feed = |now, settled_at| may_feed(now, &permit, settled_at, patience);
        assert!(feed(8 * SECOND, 0), "it would fire at the lease's end and half a second, at the latest");
        let last = (0..20 * SECOND).step_by(SECOND as usize / 10).filter(|now| feed(*now, 0)).max().unwrap();
        assert!(last + patience <= permit.until + MARGIN_NANOS, "fed for the last time at {last}");
        assert!(!feed(9 * SECOND, 9 * SECOND), "what was seen before the end says nothing about after it");
        assert!(feed(10 * SECOND + 3, 10 * SECOND + 2));
        assert!(!feed(12 * SECOND, 10 * SECOND + 2), "it was seen too long ago");
        let free = Permit { machines: vec![Machine { standing: Standing::Free, ..exclusive }], ..permit.clone() };
        assert!(may_feed(99 * SECOND, &free, 0, patience), "nothing here must not run twice");
    }
}
