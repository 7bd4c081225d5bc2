//! A backup booted apart from everything: a transient domain without a network, on an overlay of its own, watched and
//! destroyed.
//!
//! It carries no mark, so it is nobody's guest: it is in no list, and the guard does not know it. libvirtd destroys it
//! when the connection that made it closes, so it does not outlive its agent; what is left when both die at once goes at
//! the next agent's first look.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::Path,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use virt::{domain::Domain, sys::VIR_DOMAIN_START_AUTODESTROY};

use super::{
    super::{
        HypervisorError, Result,
        domain_xml::{DomainPaths, rehearsal_name, rehearsal_prefix, rehearsal_xml},
        guest_dir::{failed, write_whole},
        job::Job,
        rehearsal::{Rehearsal, Rehearsed, Signs, judge},
        seed::seed_image,
    },
    Libvirt,
    connection::{is_missing, is_wrong_state},
    disk, domain_job,
    handle::Handle,
};

/// Soon enough for a boot that takes seconds, and cheap for libvirtd.
const GLANCE: Duration = Duration::from_millis(500);

pub fn rehearse(h: &Libvirt, rehearsal: &Rehearsal, job: &Job) -> Result<Rehearsed> {
    let dir = h.dirs.rehearsals().join(rehearsal.image.to_string());
    clear_once(h);
    // An earlier one of the same backup, cut short.
    end(h, &rehearsal_name(&h.cluster, rehearsal.image))?;
    remove(&dir)?;
    let outcome = boot(h, rehearsal, &dir).and_then(|(domain, paths)| watch(&domain, &paths, rehearsal, job));
    let ended = end(h, &rehearsal_name(&h.cluster, rehearsal.image)).and_then(|()| remove(&dir));
    match (outcome, ended) {
        (Ok(rehearsed), Ok(())) => Ok(rehearsed),
        (Err(e), _) | (_, Err(e)) => Err(e),
    }
}

/// What agents left that died together with libvirtd, once: from then on whatever is rehearsed here is this agent's.
pub fn clear_once(h: &Libvirt) {
    if !h.rehearsals_cleared.swap(true, Ordering::AcqRel)
        && let Err(e) = clear(h)
    {
        tracing::warn!(error = %e, "cannot clear away what was rehearsed when the last agent ended");
    }
}

fn clear(h: &Libvirt) -> Result<()> {
    let connect = h.connection.get()?;
    let listed = connect.list_all_domains(0).map_err(|e| h.connection.explain(&connect, "listing guests", e))?;
    let prefix = rehearsal_prefix(&h.cluster);
    let names = listed.iter().filter_map(|domain| domain.name().ok()).filter(|name| name.starts_with(&prefix));
    names.collect::<Vec<_>>().iter().try_for_each(|name| end(h, name))?;
    remove(&h.dirs.rehearsals())
}

fn boot<'a>(h: &'a Libvirt, rehearsal: &Rehearsal, dir: &Path) -> Result<(Handle<'a>, DomainPaths)> {
    // The user that guests run as must be able to pass.
    DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(|e| failed("make", dir, e))?;
    let paths =
        DomainPaths { disk: dir.join("disk.qcow2"), seed: dir.join("seed.img"), console: dir.join("console.log") };
    write_whole(&paths.seed, &seed_image(&rehearsal.spec)?)?;
    disk::make_overlay(&rehearsal.spec, &paths.disk)?;
    let xml = rehearsal_xml(&rehearsal.spec, rehearsal.image, &paths, h.proven_kind()?);
    let connect = h.connection.get()?;
    match connect.create_domain_xml(&xml, VIR_DOMAIN_START_AUTODESTROY) {
        Ok(domain) => Ok((Handle { connection: &h.connection, connect, domain }, paths)),
        Err(e) => Err(h.connection.explain(&connect, &format!("booting {}", rehearsal.image), e)),
    }
}

fn watch(domain: &Handle, paths: &DomainPaths, rehearsal: &Rehearsal, job: &Job) -> Result<Rehearsed> {
    let start = Instant::now();
    loop {
        let signs = signs(domain, paths)?;
        let took = start.elapsed();
        if let Some((verdict, reason)) = judge(&signs, &rehearsal.expect, took >= rehearsal.limit) {
            return Ok(Rehearsed { verdict, took, reason });
        }
        if let Some(why) = job.must_end() {
            return Err(HypervisorError::Transient(why.into()));
        }
        job.note(signs.read_bytes, 0);
        thread::sleep(GLANCE);
    }
}

fn signs(domain: &Handle, paths: &DomainPaths) -> Result<Signs> {
    let on = match domain.domain.is_active() {
        Ok(on) => on,
        // A transient domain that goes off is forgotten.
        Err(e) if is_missing(&e) => false,
        Err(e) => domain.call("looking at", |_| Err(e))?,
    };
    let disk = domain.domain.block_stats(super::super::domain_xml::DISK).ok();
    Ok(Signs {
        on,
        agent_answers: on && agent_answers(&domain.domain),
        console: String::from_utf8_lossy(&fs::read(&paths.console).unwrap_or_default()).into_owned(),
        read_bytes: disk.as_ref().map_or(0, |disk| u64::try_from(disk.rd_bytes).unwrap_or(0)),
        written_bytes: disk.as_ref().map_or(0, |disk| u64::try_from(disk.wr_bytes).unwrap_or(0)),
    })
}

/// It is asked the time; fails at once when it is not connected.
fn agent_answers(domain: &Domain) -> bool {
    domain_job::set_agent_patience(domain).is_ok() && domain.time(0).is_ok()
}

/// Gone already is as good.
fn end(h: &Libvirt, name: &str) -> Result<()> {
    let connect = h.connection.get()?;
    let ended = match connect.lookup_domain_by_name(name) {
        Ok(domain) => domain.destroy(),
        Err(e) => Err(e),
    };
    match ended {
        Err(e) if !is_missing(&e) && !is_wrong_state(&e) => {
            Err(h.connection.explain(&connect, &format!("ending {name}"), e))
        }
        _ => Ok(()),
    }
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", dir, e)),
        _ => Ok(()),
    }
}
