//! What one running guest uses. Whatever cannot be had is 0: use is soft, and a guest that is going down is no error.

use std::path::Path;

use virt::{
    domain::{Domain, MemoryStat},
    sys::{
        VIR_DOMAIN_MEMORY_STAT_AVAILABLE as AVAILABLE, VIR_DOMAIN_MEMORY_STAT_RSS as RSS,
        VIR_DOMAIN_MEMORY_STAT_UNUSED as UNUSED, VIR_DOMAIN_MEMORY_STAT_USABLE as USABLE,
    },
};

use super::{super::GuestUsage, disk::allocated_bytes};

pub fn of(domain: &Domain, disk: &Path, macs: &[String]) -> GuestUsage {
    let mut usage = GuestUsage {
        cpu_time_millis: domain.info().map_or(0, |info| info.cpu_time / 1_000_000),
        memory_used_bytes: domain.memory_stats(0).map_or(0, |stats| memory_used(&stats)),
        disk_used_bytes: allocated_bytes(disk),
        ..GuestUsage::default()
    };
    // libvirt finds an interface by its address as well as by its name, and counts as the guest does.
    for stats in macs.iter().filter(|mac| !mac.contains('\0')).filter_map(|mac| domain.interface_stats(mac).ok()) {
        usage.rx_bytes += stats.rx_bytes.max(0) as u64;
        usage.tx_bytes += stats.tx_bytes.max(0) as u64;
    }
    usage
}

/// As the guest's balloon driver tells it; else what its process takes on the host. Statistics are in KiB.
fn memory_used(stats: &[MemoryStat]) -> u64 {
    let stat = |tag: u32| stats.iter().find(|s| s.tag == tag).map(|s| s.val);
    let told = stat(AVAILABLE).zip(stat(USABLE).or(stat(UNUSED))).map(|(all, free)| all.saturating_sub(free));
    told.or(stat(RSS)).unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_guest_says_or_else_what_its_process_takes() {
        let stats = |list: &[(u32, u64)]| list.iter().map(|&(tag, val)| MemoryStat { tag, val }).collect::<Vec<_>>();
        let all = [(AVAILABLE, 90), (USABLE, 50), (UNUSED, 20), (RSS, 170)];
        assert_eq!(memory_used(&stats(&all)), 40 << 10);
        assert_eq!(memory_used(&stats(&[all[0], all[2], all[3]])), 70 << 10);
        assert_eq!(memory_used(&stats(&[all[1], all[3]])), 170 << 10);
        assert_eq!(memory_used(&[]), 0);
    }
}
