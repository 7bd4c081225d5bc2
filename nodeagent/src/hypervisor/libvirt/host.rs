//! What the host has and uses, from `/proc` and the file system: libvirt need not be up for it.

use std::{fs, path::Path};

use model::{Capacity, telemetry::NodeStatus};
use nix::sys::statvfs::statvfs;

use super::super::{HypervisorError, Result};

/// The host keeps this much memory for itself, or a sixteenth if that is more: kernel, libvirtd, the agent, QEMU's own.
const RESERVED_MEMORY_BYTES: u64 = 512 << 20;
const RESERVED_MEMORY_SHARE: u64 = 16;

/// One part in ten of the disk is for image replicas, consoles and what was set aside; machines may have the rest.
const RESERVED_DISK_SHARE: u64 = 10;

/// CPU time of the whole host, in ticks since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTicks {
    pub busy: u64,
    pub total: u64,
}

/// What machines may have on this host.
pub fn capacity(dir: &Path) -> Result<Capacity> {
    let vcpus = std::thread::available_parallelism().map_err(|e| unreadable("the number of CPUs", &e.to_string()))?;
    let (memory_total, _) = memory()?;
    let (disk_total, _) = disk(dir)?;
    Ok(Capacity {
        vcpus: vcpus.get() as u64,
        memory_bytes: memory_for_guests(memory_total),
        disk_bytes: disk_total - disk_total / RESERVED_DISK_SHARE,
    })
}

pub fn cpu_ticks() -> Result<CpuTicks> {
    parse_cpu(&read("/proc/stat")?).ok_or_else(|| unreadable("/proc/stat", "no line of all CPUs"))
}

/// `cpu_permille` covers the time since `earlier`.
pub fn status(dir: &Path, earlier: CpuTicks, now: CpuTicks) -> Result<NodeStatus> {
    let (memory_total_bytes, memory_used_bytes) = memory()?;
    let (disk_total_bytes, disk_used_bytes) = disk(dir)?;
    let cpu_permille = permille(earlier, now);
    Ok(NodeStatus {
        cpu_permille,
        memory_used_bytes,
        memory_total_bytes,
        disk_used_bytes,
        disk_total_bytes,
        watchdog: false,
    })
}

fn memory_for_guests(total: u64) -> u64 {
    total.saturating_sub(RESERVED_MEMORY_BYTES.max(total / RESERVED_MEMORY_SHARE))
}

fn permille(earlier: CpuTicks, now: CpuTicks) -> u32 {
    let total = now.total.saturating_sub(earlier.total);
    let busy = now.busy.saturating_sub(earlier.busy).min(total);
    (busy * 1000).checked_div(total).unwrap_or(0) as u32
}

fn memory() -> Result<(u64, u64)> {
    parse_memory(&read("/proc/meminfo")?).ok_or_else(|| unreadable("/proc/meminfo", "no MemTotal or MemAvailable"))
}

/// Total and used bytes of the file system that holds `dir`.
fn disk(dir: &Path) -> Result<(u64, u64)> {
    let found = statvfs(dir).map_err(|e| unreadable(&dir.display().to_string(), e.desc()))?;
    let block = found.fragment_size();
    let total = found.blocks() * block;
    Ok((total, total.saturating_sub(found.blocks_free() * block)))
}

/// proc(5): user nice system idle iowait irq softirq steal guest guest_nice; the last two are within the first two.
/// Time stolen by a hypervisor below is not ours to give, so it counts as busy.
fn parse_cpu(stat: &str) -> Option<CpuTicks> {
    let line = stat.lines().find_map(|l| l.strip_prefix("cpu "))?;
    let ticks: Vec<u64> =
        line.split_whitespace().take(8).map(str::parse).collect::<std::result::Result<_, _>>().ok()?;
    let idle = ticks.get(3)? + ticks.get(4).unwrap_or(&0);
    let total: u64 = ticks.iter().sum();
    Some(CpuTicks { busy: total - idle, total })
}

fn parse_memory(meminfo: &str) -> Option<(u64, u64)> {
    let bytes = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    let total = bytes("MemTotal")?;
    Some((total, total.saturating_sub(bytes("MemAvailable")?)))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).map_err(|e| unreadable(path, &e.to_string()))
}

fn unreadable(what: &str, why: &str) -> HypervisorError {
    HypervisorError::Transient(format!("cannot read {what}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_is_all_but_idle_and_waiting() {
        let ticks = parse_cpu("cpu  10 20 30 400 50 6 7 8 9 10\ncpu0 1 1 1 1\n").unwrap();
        assert_eq!(ticks, CpuTicks { busy: 81, total: 531 });
        assert_eq!(permille(ticks, CpuTicks { busy: 131, total: 631 }), 500);
        assert_eq!((permille(ticks, ticks), permille(ticks, CpuTicks::default())), (0, 0));
        for bad in ["", "cpu", "cpu  1 2 3", "cpu  1 x 3 4", "intr 1"] {
            assert_eq!(parse_cpu(bad), None, "{bad}");
        }
    }

    #[test]
    fn memory_is_total_less_available() {
        let text = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    400 kB\n";
        assert_eq!(parse_memory(text), Some((1000 * 1024, 600 * 1024)));
        for bad in ["", "MemTotal: 1000 kB", "MemTotal: x kB\nMemAvailable: 1 kB", "MemTotal 1\n"] {
            assert_eq!(parse_memory(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_host_keeps_memory_for_itself() {
        assert_eq!(memory_for_guests(24 << 30), (24 << 30) - (24 << 30) / 16);
        assert_eq!(memory_for_guests(2 << 30), (2 << 30) - (512 << 20));
        assert_eq!(memory_for_guests(1 << 20), 0);
    }
}
