//! Which kind of hypervisor works here, found by trying.
//!
//! A device node says little: KVM can be there and refuse, or run each instruction a thousand times too slowly (both
//! seen under nested virtualisation: QEMU ended with a failed assertion; with a plainer CPU the BIOS took 5 s and a
//! guest after it made no visible progress). So a small machine runs a boot sector of ours that writes `A` to its
//! serial port, counts, and writes `B`; KVM is used when `B` comes in time. Hardware too old to run real mode by itself
//! (before 2010) fails this, and is used without KVM.

use std::{
    fs::{self, File},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use model::HypervisorKind;
use serde::{Deserialize, Serialize};
use virt::{connect::Connect, sys::VIR_DOMAIN_START_AUTODESTROY};

use super::super::{
    HypervisorError, Result,
    domain_xml::{name_prefix, probe_xml, uuid_of},
    guest_dir::write_whole,
};
use super::connection::Connection;
use crate::clock::boot_id;

/// Software emulation is done in about a second on a busy host, and KVM that is slower than that is not worth having;
/// broken KVM had not finished in 14.
const PATIENCE: Duration = Duration::from_secs(4);

/// How often the serial port's output is looked at.
const GLANCE: Duration = Duration::from_millis(20);

/// Beside the guests' folders.
const FOUND: &str = "hypervisor.json";

/// 2^26 turns of a loop of two instructions: a twentieth of a second on hardware, minutes when each is trapped.
const TURNS: u32 = 1 << 26;

/// Does a guest of this kind make progress here? `Ok(Err(why))` when it does not.
///
/// # Errors
/// When libvirtd could not be asked, which says nothing about the kind.
pub fn try_kind(
    connection: &Connection,
    cluster: &str,
    dir: &Path,
    kind: HypervisorKind,
) -> Result<std::result::Result<(), String>> {
    let connect = connection.get()?;
    let dir = dir.join("probe");
    fs::create_dir_all(&dir).map_err(|e| HypervisorError::Transient(format!("cannot make {}: {e}", dir.display())))?;
    let (disk, output) = (dir.join("disk.raw"), dir.join("output"));
    write_whole(&disk, &boot_sector())?;
    lengthen(&disk)?;
    write_whole(&output, b"")?;
    let name = format!("{}probe", name_prefix(cluster));
    remove_leftover(&connect, &name);
    let xml = probe_xml(&name, &uuid_of("probe", cluster, "probe"), kind, &disk, &output);
    let verdict = match connect.create_domain_xml(&xml, VIR_DOMAIN_START_AUTODESTROY) {
        Err(e) => match connection.explain(&connect, "trying the hypervisor", e) {
            HypervisorError::Unreachable(why) => return Err(HypervisorError::Unreachable(why)),
            other => Err(other.to_string()),
        },
        Ok(domain) => {
            let verdict = watch(&output, || domain.is_active());
            if let Err(e) = domain.destroy() {
                tracing::debug!(error = e.message(), "the trial guest was gone before it was destroyed");
            }
            verdict
        }
    };
    if verdict.is_err() && !connect.is_alive().unwrap_or(false) {
        return Err(HypervisorError::Unreachable("libvirtd was lost while the hypervisor was tried".into()));
    }
    let _ = fs::remove_dir_all(&dir);
    Ok(verdict)
}

/// What was found since the machine was booted.
#[derive(Serialize, Deserialize)]
struct Found {
    boot: String,
    kind: HypervisorKind,
}

pub fn remembered(dir: &Path) -> Option<HypervisorKind> {
    let found: Found = serde_json::from_slice(&fs::read(dir.join(FOUND)).ok()?).ok()?;
    (found.boot == boot_id()).then_some(found.kind)
}

/// # Errors
/// When it cannot be written.
pub fn remember(dir: &Path, kind: HypervisorKind) -> Result<()> {
    let found = serde_json::to_vec(&Found { boot: boot_id(), kind });
    write_whole(&dir.join(FOUND), &found.map_err(|e| HypervisorError::Permanent(e.to_string()))?)
}

fn watch(
    output: &Path,
    active: impl Fn() -> std::result::Result<bool, virt::error::Error>,
) -> std::result::Result<(), String> {
    let start = Instant::now();
    let mut written;
    loop {
        written = fs::read(output).unwrap_or_default();
        if written.contains(&b'B') {
            return Ok(());
        }
        if !active().unwrap_or(false) {
            return Err("the guest ended by itself".into());
        }
        if start.elapsed() > PATIENCE {
            break;
        }
        thread::sleep(GLANCE);
    }
    let reached = if written.contains(&b'A') { "started but did not finish" } else { "was not reached" };
    Err(format!("the boot sector {reached} within {} s", PATIENCE.as_secs()))
}

/// A trial that an earlier agent left behind when it was killed.
fn remove_leftover(connect: &Connect, name: &str) {
    if let Ok(domain) = connect.lookup_domain_by_name(name)
        && let Err(e) = domain.destroy()
    {
        tracing::debug!(error = e.message(), "the leftover of an earlier trial is not running");
    }
}

/// The BIOS does not boot from a virtio disk of less than a cylinder. The rest is a hole.
fn lengthen(disk: &Path) -> Result<()> {
    const DISK_BYTES: u64 = 16 << 20;
    let lengthened = File::options().write(true).open(disk).and_then(|file| file.set_len(DISK_BYTES));
    lengthened.map_err(|e| HypervisorError::Transient(format!("cannot lengthen {}: {e}", disk.display())))
}

/// 16-bit code for a PC's BIOS, which loads it to 0x7c00 and jumps there.
fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    let mut code: Vec<u8> = vec![
        0xfa, //             cli
        0xba, 0xf8, 0x03, // mov dx, 0x3f8     the first serial port
        0xb0, b'A', //       mov al, 'A'
        0xee, //             out dx, al
        0x66, 0xb9, //       mov ecx, TURNS
    ];
    code.extend(TURNS.to_le_bytes());
    code.extend([
        0x66, 0x49, // turn: dec ecx
        0x75, 0xfc, //       jnz turn
        0xb0, b'B', //       mov al, 'B'
        0xee, //             out dx, al
        0xf4, //       rest: hlt
        0xeb, 0xfd, //       jmp rest
    ]);
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}
