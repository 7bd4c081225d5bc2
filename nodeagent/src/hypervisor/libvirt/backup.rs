//! A guest's disk, copied as it is at one moment, into a file that stands alone; or what was written since an earlier
//! backup, into one that stands on that.
//!
//! Running, it is QEMU that copies (libvirt's push mode): the moment is when the copy begins, and whatever the guest
//! overwrites later is copied first. Around that moment the guest's file systems are frozen, when its agent answers.
//! Off, `qemu-img` copies, always all of it. A full copy is base and overlay in one file, so that it needs nothing else.
//! An increment names its parent by digest alone: in every host's store that is the file beside it.
//!
//! What an agent leaves that is killed meanwhile, a job, a file, a frozen guest, is cleared by the next agent's first
//! look that finds the guest's process not stopped, and by the next backup. Deliberately not here: how it is known what was written (`increment`).

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use model::{Consistency, VmId};
use serde::Deserialize;
use serde_json::json;

use super::{
    super::{
        Backup, GuestPower, HypervisorError, OffReason, Parent, Result,
        domain_xml::{backup_xml, checkpoint_xml},
        guest_dir::{failed, remove_file},
        job::Job,
        qcow2,
    },
    Libvirt,
    disk::{allocated_bytes, qemu_img, rename_backing},
    domain_job::{self, GLANCE},
    handle::Handle,
    increment,
    power::Record,
};

pub fn back_up(h: &Libvirt, vm: VmId, parent: Option<&Parent>, job: &Job) -> Result<Backup> {
    clear(h, vm)?;
    let domain = h.domain(vm)?.ok_or_else(|| HypervisorError::Transient(format!("{vm} is not on this host")))?;
    let seen = domain.seen()?;
    // By what is remembered: libvirt forgets that a guest moved, and knows nothing of one that was off.
    if h.arrives(vm)? || h.observe(vm, &domain)? == GuestPower::Off(OffReason::Moved) {
        return Err(HypervisorError::Transient(format!("{vm} is moving between hosts")));
    }
    let file = h.dirs.backup(vm);
    let part = file.with_extension("part");
    let copied = if seen.is_on() {
        push(h, vm, &domain, parent, &part, job)
    } else {
        convert(&h.dirs.paths(vm).disk, &part, job).map(|consistency| (consistency, None))
    };
    let checked = copied.and_then(|(consistency, parent)| {
        // Also one that was done before its end was noticed: who cancelled it counts on there being no backup.
        job.must_end().map_or(Ok(()), |why| Err(HypervisorError::Transient(why.into())))?;
        parent.map_or(Ok(()), |parent| stand_on(&part, parent))?;
        Ok((consistency, parent.map(|parent| parent.digest), check(&part, parent)?))
    });
    let (consistency, parent, virtual_bytes) = match checked {
        Ok(checked) => checked,
        Err(e) => {
            remove_file(&part)?;
            return Err(e);
        }
    };
    fs::rename(&part, &file).map_err(|e| failed("move", &part, e))?;
    let size_bytes = fs::metadata(&file).map_err(|e| failed("look at", &file, e))?.len();
    Ok(Backup { file, size_bytes, virtual_bytes, consistency, parent })
}

/// Ends what an earlier agent, or an earlier attempt, left under way, and removes its files.
pub fn clear(h: &Libvirt, vm: VmId) -> Result<()> {
    if let Some(domain) = h.domain(vm)?
        && domain.seen()?.is_on()
        && !h.arrives(vm)?
    {
        domain_job::end(&domain)?;
        increment::tidy(h, vm, &domain)?;
        if h.dirs.read::<Record>(vm)?.is_some_and(|record| record.frozen) {
            thaw(h, vm, &domain)?;
        }
    }
    let file = h.dirs.backup(vm);
    remove_file(&file.with_extension("part"))?;
    remove_file(&file)
}

/// QEMU copies while the guest goes on.
fn push<'a>(
    h: &Libvirt,
    vm: VmId,
    domain: &Handle,
    parent: Option<&'a Parent>,
    part: &Path,
    job: &Job,
) -> Result<(Consistency, Option<&'a Parent>)> {
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
    let begun = begin(h, vm, domain, parent, part);
    let thawed = if frozen == Consistency::Frozen {
        thaw(h, vm, domain)
    } else {
        // Frozen after all, perhaps: an answer can come too late.
        let _ = domain_job::thaw(&domain.domain);
        h.amend(vm, |record| record.frozen = false)
    };
    let parent = begun?;
    let outcome = watch(domain, job);
    if outcome.is_err() {
        domain_job::end(domain)?;
    }
    outcome.and(thawed).map(|()| (frozen, parent))
}

/// An increment if that can be had, else a full copy; and the next may be an increment of it, if that can be had. What it
/// stands on.
fn begin<'a>(
    h: &Libvirt,
    vm: VmId,
    domain: &Handle,
    parent: Option<&'a Parent>,
    part: &Path,
) -> Result<Option<&'a Parent>> {
    let since = parent.map(|parent| increment::of(h, vm, parent.digest)).transpose()?.flatten();
    let begin = |since: Option<&str>, checkpoint: Option<&str>| {
        let checkpoint = checkpoint.map(checkpoint_xml);
        domain.call("backing up", |d| domain_job::begin_backup(d, &backup_xml(part, since), checkpoint.as_deref()))
    };
    let next = increment::begin(h, vm)?;
    if let Some(since) = since {
        match begin(Some(&since), Some(&next)) {
            Ok(()) => return Ok(parent),
            Err(e) => tracing::info!(%vm, error = %e, "what was written since the last backup is not known"),
        }
    }
    if let Err(e) = begin(None, Some(&next)) {
        tracing::warn!(%vm, error = %e, "what is written from now on cannot be counted; the next backup is a full one");
        h.amend(vm, |record| record.begun = None)?;
        begin(None, None)?;
    }
    Ok(None)
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
    let total = allocated_bytes(disk) + qcow2::files_under(disk).iter().map(|file| allocated_bytes(file)).sum::<u64>();
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
}

/// QEMU has written an increment as one of the guest's own disk. What it was copied from is no matter of what it holds.
fn stand_on(file: &Path, parent: &Parent) -> Result<()> {
    rename_backing(file, OsStr::new(&parent.digest.to_string()), "qcow2")
}

/// Opens the file as a disk, with all that it stands on, and looks through its tables; the size that a guest sees.
fn check(file: &Path, parent: Option<&Parent>) -> Result<u64> {
    let stands = qcow2::stands_on(file, parent.map(|parent| parent.digest));
    stands.map_err(|why| transient(&format!("the backup {why}")))?;
    let disk = |file: &Path| json!({ "driver": "qcow2", "file": { "driver": "file", "filename": file } });
    let mut whole = disk(file);
    whole["backing"] = parent.map_or(json!(null), |parent| disk(&parent.file));
    qemu_img(&["check", "-q"], &[OsStr::new(&format!("json:{whole}"))])?;
    let told = qemu_img(&["info", "--output=json", "-f", "qcow2"], &[file.as_os_str()])?;
    let info: Info = serde_json::from_slice(&told).map_err(|e| transient(&format!("qemu-img info: {e}")))?;
    Ok(info.virtual_size)
}

fn transient(why: &str) -> HypervisorError {
    HypervisorError::Transient(why.into())
}
