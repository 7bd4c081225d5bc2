//! The demonstration: what it does, in order, and what it verifies at each step.
//!
//! It uses only what a person has: the command line, `trefoil lab` to break things, and HTTP to the guests.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use self::{cloud::Cloud, teller::Teller};

pub mod cloud;
mod guest;
mod moving;
mod quorum;
mod recovery;
mod story;
mod teller;

/// Tells everything; true when every step was verified.
pub fn tell(cloud: &Cloud, keep: bool) -> bool {
    let mut teller = Teller::begin("Trefoil: three controllers, three hosts, real guests, from nothing");
    let outcome = story::all(cloud, &mut teller);
    if keep && outcome.is_ok() {
        teller.note(&format!("left running: export TREFOIL_CONFIG={}", cloud.config().display()));
        teller.note(&format!("remove it with: {} down --dir {}", cloud.binary().display(), cloud.dir().display()));
    }
    teller.end(outcome)
}

/// Says that somebody stopped it; that verifies nothing.
pub fn interrupted() -> bool {
    println!("\ninterrupted; cleaning up");
    false
}

/// Removes the cloud and looks whether anything is left. True when nothing is.
pub fn clean_up(cloud: &Cloud) -> bool {
    match removed(cloud) {
        Ok(()) => {
            println!("cleaned up: no process, no namespace, no file is left");
            true
        }
        Err(error) => {
            println!("cleaning up failed: {error:#}");
            false
        }
    }
}

fn removed(cloud: &Cloud) -> Result<()> {
    let before = cloud.namespaces_before();
    cloud.down()?;
    let left: BTreeSet<String> = cloud::namespaces()?.difference(before).cloned().collect();
    ensure!(left.is_empty(), "network namespaces are left: {left:?}");
    ensure!(!cloud.dir().exists(), "{} is left", cloud.dir().display());
    let processes = cloud::processes_of(cloud.dir()).context("looking for processes")?;
    ensure!(processes.is_empty(), "processes are left: {processes:?}");
    Ok(())
}
