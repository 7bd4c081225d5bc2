//! A simulated host seen from outside, by whoever runs a cloud of them: what its guests do in truth, without asking its
//! agent, and how its power is cut while no agent runs.
//!
//! Deliberately not here: the agent's own view. That one can be wrong, which is what this is compared with.

use std::{fs, io, path::Path};

use model::VmId;

use super::record::{Power, SimGuest, read_kept};
use crate::clock;

/// In place of a boot's id: no machine has this one, so what ran under it does not run any more.
const NO_BOOT: &str = "its power was cut";

/// A guest that is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub vm: VmId,
    /// Suspended by its owner, or held because it may not run.
    pub paused: bool,
}

/// The guests that are on, by the records in an agent's data directory.
///
/// # Errors
/// When there is such a directory and it cannot be read.
pub fn guests(data: &Path) -> io::Result<Vec<Seen>> {
    let boot = clock::boot_id();
    let on = records(data)?.into_iter().filter(|guest| guest.is_on() && guest.boot == boot);
    Ok(on.map(|guest| Seen { vm: guest.vm, paused: guest.held || guest.power == Power::Suspended }).collect())
}

/// Ends every guest as a power failure does. The host's agent must not run.
///
/// # Errors
/// When a record cannot be read or written.
pub fn cut_power(data: &Path) -> io::Result<()> {
    for guest in records(data)? {
        let dir = data.join("vms").join(guest.vm.to_string());
        let new = dir.join("guest.new");
        fs::write(&new, serde_json::to_vec(&SimGuest { boot: NO_BOOT.into(), ..guest })?)?;
        fs::rename(&new, dir.join("guest.json"))?;
    }
    Ok(())
}

fn records(data: &Path) -> io::Result<Vec<SimGuest>> {
    match fs::read_dir(data.join("vms")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
        // A folder that goes while it is looked at has no guest that runs.
        Ok(folders) => Ok(folders.flatten().filter_map(|folder| read_kept(&folder.path())).collect()),
    }
}
