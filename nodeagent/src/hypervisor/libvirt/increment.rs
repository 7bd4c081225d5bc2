//! What a guest wrote since its last backup, as QEMU counts it: one bitmap in its disk, which libvirt calls a checkpoint.
//!
//! ```text
//!            backup begins           its bytes have a name (`backed_up`)
//!  since ──► since, begun ─────────► since := begun, under the digest; the older one is deleted
//!                 │ it failed
//!                 └──► begun is deleted; what was written meanwhile counts for `since` again (libvirt joins the two)
//! ```
//! Nothing is promised about bitmaps. A QEMU that was killed leaves broken ones, a guest that moves leaves them behind, and
//! then libvirt refuses the increment: a full copy is made. Whatever is not remembered under a digest is deleted.

use std::{
    ffi::{CStr, c_int},
    ptr, slice,
    time::{SystemTime, UNIX_EPOCH},
};

use model::{Digest, VmId};
use serde::{Deserialize, Serialize};
use virt::{domain::Domain, error::Error, sys};

use super::{
    super::{Result, domain_xml::checkpoint_name},
    Libvirt, Record,
    handle::Handle,
};

/// Since when the guest's writes are counted, and which backup holds its disk as it was then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    pub checkpoint: String,
    pub digest: Digest,
}

/// A name that no earlier one has: what is left of one must be in nobody's way.
pub fn begin(h: &Libvirt, vm: VmId) -> Result<String> {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let name = checkpoint_name(nanos);
    h.amend(vm, |record| record.begun = Some(name.clone()))?;
    Ok(name)
}

/// The checkpoint from which an increment of this backup can be asked for.
pub fn of(h: &Libvirt, vm: VmId, parent: Digest) -> Result<Option<String>> {
    let since = h.dirs.read::<Record>(vm)?.and_then(|record| record.since);
    Ok(since.filter(|since| since.digest == parent).map(|since| since.checkpoint))
}

/// The bytes of the last backup are known from now on.
pub fn keep(h: &Libvirt, vm: VmId, digest: Digest) -> Result<()> {
    h.amend(vm, |record| {
        if let Some(checkpoint) = record.begun.take() {
            record.since = Some(Since { checkpoint, digest });
        }
    })?;
    let domain = h.domain(vm)?;
    domain.map_or(Ok(()), |domain| if domain.seen()?.is_on() { tidy(h, vm, &domain) } else { Ok(()) })
}

/// Deletes every checkpoint but the one that is remembered under a digest. The guest is on. One that cannot be deleted now
/// costs QEMU a little, and is tried again with the next backup.
pub fn tidy(h: &Libvirt, vm: VmId, domain: &Handle) -> Result<()> {
    h.amend(vm, |record| record.begun = None)?;
    let since = h.dirs.read::<Record>(vm)?.and_then(|record| record.since);
    let kept = since.map(|since| since.checkpoint);
    if let Err(e) = domain.call("tidying the checkpoints of", |d| delete(d, |name| Some(name) != kept.as_deref())) {
        tracing::warn!(%vm, error = %e, "a checkpoint that is of no use any more cannot be deleted");
    }
    Ok(())
}

/// Deletes all of them: a guest that goes to another host takes none along, and libvirt would refuse it.
pub fn forget(h: &Libvirt, vm: VmId, domain: &Handle) -> Result<()> {
    h.amend(vm, |record| record.since = None)?;
    tidy(h, vm, domain)
}

fn delete(domain: &Domain, which: impl Fn(&str) -> bool) -> std::result::Result<(), Error> {
    let mut list = ptr::null_mut();
    // SAFETY: the domain is alive for the length of the call; libvirt allocates the list.
    let count = unsafe { sys::virDomainListAllCheckpoints(domain.as_ptr(), &mut list, 0) };
    let count = usize::try_from(count).map_err(|_| Error::last_error())?;
    let mut outcome = Ok(());
    for at in 0..count {
        // SAFETY: libvirt has just filled `count` pointers in at `list`; each is ours until it is freed below.
        let checkpoint = unsafe { slice::from_raw_parts(list, count) }[at];
        // SAFETY: the name lives as long as the checkpoint.
        let name = unsafe { CStr::from_ptr(sys::virDomainCheckpointGetName(checkpoint)) };
        if which(&name.to_string_lossy()) {
            outcome = outcome.and(delete_one(checkpoint));
        }
        // SAFETY: not used after this.
        unsafe { sys::virDomainCheckpointFree(checkpoint) };
    }
    // SAFETY: allocated by libvirt with malloc, as its documentation says, and not used after this.
    unsafe { nix::libc::free(list.cast()) };
    outcome
}

/// With its bitmap; without, when QEMU does not have that any more.
fn delete_one(checkpoint: sys::virDomainCheckpointPtr) -> std::result::Result<(), Error> {
    let metadata_only: u32 = sys::VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY;
    // SAFETY: the checkpoint is alive for the length of the calls.
    let gone = |flags: u32| -> c_int { unsafe { sys::virDomainCheckpointDelete(checkpoint, flags) } };
    if gone(0) == 0 || gone(metadata_only) == 0 { Ok(()) } else { Err(Error::last_error()) }
}
