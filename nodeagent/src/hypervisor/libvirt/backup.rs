//! A guest's disk, copied as it is at one moment, into a file that stands alone.
//!
//! Running, it is QEMU that copies (libvirt's push mode): the moment is when the copy begins, and whatever the guest
//! overwrites later is copied first. Around that moment the guest's file systems are frozen, when its agent answers.
//! Off, `qemu-img` copies. Either way base and overlay become one file, so that a backup needs nothing but itself.
//!
//! What an agent leaves that is killed meanwhile, a job, a file, a frozen guest, is cleared by the next agent's first
//! look, and by the next backup. Deliberately not here: increments (docs/adr/0021 says why).

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use model::{Consistency, VmId};
use serde::Deserialize;

use super::{
    super::{
        Backup, GuestPower, HypervisorError, OffReason, Result,
        domain_xml::backup_xml,
        guest_dir::{failed, remove_file},
        job::Job,
    },
    Libvirt,
    disk::{allocated_bytes, base_of},
    domain_job::{self, GLANCE},
    handle::Handle,
    power::Record,
};

pub fn back_up(h: &Libvirt, vm: VmId, job: &Job) -> Result<Backup> {
    clear(h, vm)?;
    let domain = h.domain(vm)?.ok_or_else(|| HypervisorError::Transient(format!("{vm} is not on this host")))?;
    let seen = domain.seen()?;
    // By what is remembered: libvirt forgets that a guest moved, and knows nothing of one that was off.
    if h.arrives(vm)? || h.observe(vm, &domain)? == GuestPower::Off(OffReason::Moved) {
        return Err(HypervisorError::Transient(format!("{vm} is moving between hosts")));
    }
    let file = h.dirs.backup(vm);
    let part = file.with_extension("part");
    let copied =
        if seen.is_on() { push(h, vm, &domain, &part, job) } else { convert(&h.dirs.paths(vm).disk, &part, job) };
    let checked = copied.and_then(|consistency| {
        // Also one that was done before its end was noticed: who cancelled it counts on there being no backup.
        job.must_end()
            .map_or_else(|| Ok((consistency, check(&part)?)), |why| Err(HypervisorError::Transient(why.into())))
    });
    let (consistency, virtual_bytes) = match checked {
        Ok(checked) => checked,
        Err(e) => {
            remove_file(&part)?;
            return Err(e);
        }
    };
    fs::rename(&part, &file).map_err(|e| failed("move", &part, e))?;
    let size_bytes = fs::metadata(&file).map_err(|e| failed("look at", &file, e))?.len();
    Ok(Backup { file, size_bytes, virtual_bytes, consistency })
}

/// Ends what an earlier agent, or an earlier attempt, left under way, and removes its files.
pub fn clear(h: &Libvirt, vm: VmId) -> Result<()> {
    if let Some(domain) = h.domain(vm)?
        && domain.seen()?.is_on()
        && !h.arrives(vm)?
    {
        domain_job::end(&domain)?;
        if h.dirs.read::<Record>(vm)?.is_some_and(|record| record.frozen) {
            thaw(h, vm, &domain)?;
        }
    }
    let file = h.dirs.backup(vm);
    remove_file(&file.with_extension("part"))?;
    remove_file(&file)
}

/// QEMU copies while the guest goes on.
fn push(h: &Libvirt, vm: VmId, domain: &Handle, part: &Path, job: &Job) -> Result<Consistency> {
    // What ended before this is not this one's outcome.
    domain_job::ended(domain)?;
    // Remembered first: an agent that dies with the guest frozen must not leave it so.
    h.amend(vm, |record| record.frozen = true)?;
    let frozen = match domain_job::freeze(&domain.domain) {
        Ok(()) => Consistency::Frozen,
        Err(e) => {
            tracing::info!(%vm, reason = e.message(), "the guest was not frozen; its backup is as after a power failure");
            Consistency::Crash
        }
    };
    let begun = domain.call("backing up", |d| domain_job::begin_backup(d, &backup_xml(part)));
    let thawed = if frozen == Consistency::Frozen {
        thaw(h, vm, domain)
    } else {
        // Frozen after all, perhaps: an answer can come too late.
        let _ = domain_job::thaw(&domain.domain);
        h.amend(vm, |record| record.frozen = false)
    };
    begun?;
    let outcome = watch(domain, job);
    if outcome.is_err() {
        domain_job::end(domain)?;
    }
    outcome.and(thawed).map(|()| frozen)
}

fn watch(domain: &Handle, job: &Job) -> Result<()> {
    while domain.seen()?.is_on() {
        let Some(stats) = domain_job::running(domain)? else {
            let ended = domain_job::ended(domain)?.filter(|stats| stats.is_backup());
            let ended = ended.ok_or_else(|| transient("the backup ended unseen"))?;
            return ended.failure().map_or(Ok(()), |why| Err(transient(&why)));
        };
        job.note(stats.done_bytes, stats.total_bytes);
        if let Some(why) = job.must_end() {
            return Err(transient(why));
        }
        thread::sleep(GLANCE);
    }
    Err(transient("the guest went off"))
}

fn thaw(h: &Libvirt, vm: VmId, domain: &Handle) -> Result<()> {
    match domain.call("thawing", domain_job::thaw) {
        // It may hang, or be booting: the next look at it tries again.
        Err(e) if domain.seen()?.is_on() => Err(e),
        _ => h.amend(vm, |record| record.frozen = false),
    }
}

/// `qemu-img` copies what lies there. It takes QEMU's own lock on the disk, so a guest cannot run meanwhile.
fn convert(disk: &Path, part: &Path, job: &Job) -> Result<Consistency> {
    let total = allocated_bytes(disk) + base_of(disk).map_or(0, |base| allocated_bytes(&base));
    let said = part.with_extension("said");
    let output = File::create(&said).map_err(|e| failed("make", &said, e))?;
    let mut child = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "qcow2"])
        .args([disk, part])
        .stdin(Stdio::null())
        .stderr(output)
        .spawn()
        .map_err(|e| transient(&format!("cannot run qemu-img: {e}")))?;
    let ended = wait(&mut child, || {
        job.note(allocated_bytes(part).min(total), total);
        job.must_end()
    });
    let words = fs::read_to_string(&said).unwrap_or_default();
    remove_file(&said)?;
    match ended? {
        true => Ok(Consistency::Off),
        false => Err(transient(&format!("qemu-img cannot copy the disk: {}", words.trim()))),
    }
}

/// Whether it ended well. Killed when it must end.
fn wait(child: &mut Child, must_end: impl Fn() -> Option<&'static str>) -> Result<bool> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status.success()),
            Ok(None) => {}
            Err(e) => return Err(transient(&format!("cannot wait for qemu-img: {e}"))),
        }
        if let Some(why) = must_end() {
            // Gone already is as good.
            let _ = child.kill();
            let _ = child.wait();
            return Err(transient(why));
        }
        thread::sleep(GLANCE);
    }
}

/// What `qemu-img info` says.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    backing_filename: Option<String>,
}

/// Opens the file as a disk and looks through its tables; the size that a guest sees.
fn check(file: &Path) -> Result<u64> {
    qemu_img(&["check", "-q", "-f", "qcow2"], file)?;
    let told = qemu_img(&["info", "--output=json", "-f", "qcow2"], file)?;
    let info: Info = serde_json::from_slice(&told).map_err(|e| transient(&format!("qemu-img info: {e}")))?;
    match info.backing_filename {
        Some(backing) => Err(transient(&format!("the backup stands on {backing}"))),
        None => Ok(info.virtual_size),
    }
}

fn qemu_img(arguments: &[&str], file: &Path) -> Result<Vec<u8>> {
    let done = Command::new("qemu-img").args(arguments).arg(file).stdin(Stdio::null()).output();
    let done = done.map_err(|e| transient(&format!("cannot run qemu-img: {e}")))?;
    if done.status.success() {
        return Ok(done.stdout);
    }
    Err(transient(&format!("qemu-img {}: {}", arguments[0], String::from_utf8_lossy(&done.stderr).trim())))
}

fn transient(why: &str) -> HypervisorError {
    HypervisorError::Transient(why.into())
}
