//! What libvirt calls a job: the one long thing that a domain does at a time, a backup or a migration.
//!
//! The `virt` crate has no call to begin a backup, to end a job or to freeze a guest, and its `job_stats` aborts the
//! process when no job runs (it makes a `Vec` of a null pointer) and frees C memory with Rust's allocator. So the calls
//! are made here, on `virt::sys`.

use std::{
    ffi::{CStr, CString, c_int},
    ptr, slice, thread,
    time::{Duration, Instant},
};

use virt::{domain::Domain, error::Error, sys};

use super::{
    super::{HypervisorError, Result},
    handle::Handle,
};

/// How often a job is looked at: soon enough for small disks, and cheap for libvirtd.
pub const GLANCE: Duration = Duration::from_millis(100);

/// A job that was told to end does so in under a second, unless a host or a disk hangs.
const END_LIMIT: Duration = Duration::from_secs(30);

/// The guest agent answers in a tenth of a second or is not there; a freeze must first write back what is dirty.
const AGENT_SECONDS: c_int = 10;

/// A job that runs, or the last one that ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    kind: c_int,
    operation: c_int,
    pub done_bytes: u64,
    pub total_bytes: u64,
    message: Option<String>,
}

impl Stats {
    pub fn is_backup(&self) -> bool {
        self.operation == sys::VIR_DOMAIN_JOB_OPERATION_BACKUP as c_int
    }

    pub fn is_migration_out(&self) -> bool {
        self.operation == sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT as c_int
    }

    /// Of a job that has ended: why it failed, if it did.
    pub fn failure(&self) -> Option<String> {
        let well = self.kind == sys::VIR_DOMAIN_JOB_COMPLETED as c_int;
        (!well).then(|| self.message.clone().unwrap_or_else(|| "it was ended".into()))
    }
}

/// The job that runs now.
pub fn running(domain: &Handle) -> Result<Option<Stats>> {
    domain.call("looking at the job of", |d| stats(d, 0))
}

/// The last job that ended, told once.
pub fn ended(domain: &Handle) -> Result<Option<Stats>> {
    domain.call("looking at the last job of", |d| stats(d, sys::VIR_DOMAIN_JOB_STATS_COMPLETED))
}

/// Ends a job of this agent that runs, and waits until it has ended. A guest that is off has none.
///
/// # Errors
/// When it does not end, or something else is under way that is not ours to end.
pub fn end(domain: &Handle) -> Result<()> {
    let start = Instant::now();
    while domain.seen()?.is_on()
        && let Some(job) = running(domain)?
    {
        if !job.is_backup() && !job.is_migration_out() {
            return Err(HypervisorError::Transient("the hypervisor is busy with something else".into()));
        }
        if start.elapsed() > END_LIMIT {
            return Err(HypervisorError::Transient("a job was told to end and does not".into()));
        }
        // It may end by itself in between, or be at a point where it cannot be ended; the next look tells.
        if let Err(e) = abort(&domain.domain) {
            tracing::debug!(error = e.message(), "a job could not be ended just now");
        }
        thread::sleep(GLANCE);
    }
    Ok(())
}

pub fn abort(domain: &Domain) -> std::result::Result<(), Error> {
    // SAFETY: the domain is alive for the length of the call.
    done(unsafe { sys::virDomainAbortJob(domain.as_ptr()) })
}

/// With a checkpoint, what is written from the same moment on is counted under its name.
pub fn begin_backup(domain: &Domain, xml: &str, checkpoint: Option<&str>) -> std::result::Result<(), Error> {
    // What `domain_xml` writes has no NUL byte: it is not legal in XML.
    let text = |xml: &str| CString::new(xml.replace('\0', "")).unwrap_or_default();
    let (xml, checkpoint) = (text(xml), checkpoint.map(text));
    let checkpoint = checkpoint.as_ref().map_or(ptr::null(), |xml| xml.as_ptr());
    // SAFETY: the domain and the texts are alive for the length of the call; a null checkpoint means none.
    done(unsafe { sys::virDomainBackupBegin(domain.as_ptr(), xml.as_ptr(), checkpoint, 0) })
}

/// Freezes every file system of the guest, by its agent; fails at once when that is not connected.
pub fn freeze(domain: &Domain) -> std::result::Result<(), Error> {
    set_agent_patience(domain)?;
    // SAFETY: the domain is alive for the length of the call; null and 0 mean all file systems.
    done(unsafe { sys::virDomainFSFreeze(domain.as_ptr(), ptr::null_mut(), 0, 0) })
}

/// How long calls that ask the guest's agent wait for it.
pub fn set_agent_patience(domain: &Domain) -> std::result::Result<(), Error> {
    // SAFETY: the domain is alive for the length of the call.
    done(unsafe { sys::virDomainAgentSetResponseTimeout(domain.as_ptr(), AGENT_SECONDS, 0) })
}

/// Thaws them; what is not frozen is as good.
pub fn thaw(domain: &Domain) -> std::result::Result<(), Error> {
    // SAFETY: as above.
    done(unsafe { sys::virDomainFSThaw(domain.as_ptr(), ptr::null_mut(), 0, 0) })
}

fn done(status: c_int) -> std::result::Result<(), Error> {
    if status < 0 { Err(Error::last_error()) } else { Ok(()) }
}

fn stats(domain: &Domain, flags: u32) -> std::result::Result<Option<Stats>, Error> {
    let (mut kind, mut count, mut list) = (0, 0, ptr::null_mut());
    // SAFETY: all pointers are to locals that outlive the call; libvirt allocates the list.
    done(unsafe { sys::virDomainGetJobStats(domain.as_ptr(), &mut kind, &mut list, &mut count, flags) })?;
    let parameters = match usize::try_from(count) {
        // SAFETY: libvirt has just filled `count` parameters in at `list`.
        Ok(count) if !list.is_null() => unsafe { slice::from_raw_parts(list, count) },
        _ => &[],
    };
    let mut stats = Stats { kind, ..Stats::default() };
    let (mut disk, mut all) = ((0, 0), (0, 0));
    for parameter in parameters {
        let name = parameter.field;
        // SAFETY: libvirt ends each name with a NUL within its array.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        let number = match parameter.type_ as u32 {
            // SAFETY: the type says which member is set.
            sys::VIR_TYPED_PARAM_ULLONG => unsafe { parameter.value.ul },
            sys::VIR_TYPED_PARAM_INT => u64::try_from(unsafe { parameter.value.i }).unwrap_or(0),
            sys::VIR_TYPED_PARAM_STRING if name == sys::VIR_DOMAIN_JOB_ERRMSG => {
                // SAFETY: as above; the text is libvirt's until the list is freed.
                stats.message = Some(unsafe { CStr::from_ptr(parameter.value.s) }.to_string_lossy().into_owned());
                0
            }
            _ => 0,
        };
        match name {
            n if n == sys::VIR_DOMAIN_JOB_OPERATION => stats.operation = number as c_int,
            n if n == sys::VIR_DOMAIN_JOB_DISK_PROCESSED => disk.0 = number,
            n if n == sys::VIR_DOMAIN_JOB_DISK_TOTAL => disk.1 = number,
            n if n == sys::VIR_DOMAIN_JOB_DATA_PROCESSED => all.0 = number,
            n if n == sys::VIR_DOMAIN_JOB_DATA_TOTAL => all.1 = number,
            _ => {}
        }
    }
    // SAFETY: allocated by the call above, and not used after this.
    unsafe { sys::virTypedParamsFree(list, count) };
    // A migration counts memory and disk together, a backup knows only the disk.
    (stats.done_bytes, stats.total_bytes) = if all.1 >= disk.1 { all } else { disk };
    Ok((kind != sys::VIR_DOMAIN_JOB_NONE as c_int).then_some(stats))
}
