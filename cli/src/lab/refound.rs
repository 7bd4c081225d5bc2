//! The way out of a lost majority, for a cloud on this machine: one controller goes on alone, by the same command that a
//! person types (`trefoil quorum recover`), and what an old voter had is kept aside, put back, or thrown away.
//!
//! Each can be done again after it was interrupted anywhere.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

use super::{act, cloud::Cloud, member};

/// A controller that is asked to stop hands over what it does first; one without a majority has nobody to hand it to.
const POLITE: Duration = Duration::from_secs(10);

/// Makes a controller the whole quorum, unless it is already, and runs it.
///
/// # Errors
/// When what it has cannot be used, or it does not start.
pub async fn refound(cloud: &mut Cloud, name: &str) -> Result<()> {
    let controller = cloud.controller(name).with_context(|| format!("there is no controller {name}"))?.clone();
    if controller.process.is_some_and(|process| process.is_alive()) {
        act::end(cloud, name, POLITE).await?;
    }
    let data = cloud.data(name);
    let others: Vec<u64> = cloud.controllers.iter().map(|other| other.id).filter(|id| *id != controller.id).collect();
    let survivor = match controller::survivor(&data) {
        Ok(survivor) => survivor,
        // One that was interrupted in its last step can only be completed, which the command tells as an error.
        Err(_) => {
            let _ = member::recover(cloud, &controller, &others).await;
            controller::survivor(&data)?
        }
    };
    if !survivor.others.is_empty() {
        member::recover(cloud, &controller, &others).await?;
    }
    act::start_controller(cloud, name, &[]).await
}

/// Where the data of a controller that was killed is kept.
pub fn kept(cloud: &Cloud, name: &str) -> PathBuf {
    cloud.data(name).with_file_name("kept")
}

/// Takes the data of a controller that does not run away from it, and keeps it.
///
/// # Errors
/// When the disk refuses.
pub fn keep(cloud: &Cloud, name: &str) -> Result<()> {
    fs::rename(cloud.data(name), kept(cloud, name)).with_context(|| format!("cannot take the data of {name} away"))
}

/// Gives it back what was kept.
///
/// # Errors
/// When the disk refuses.
pub fn give_back(cloud: &Cloud, name: &str) -> Result<()> {
    fs::rename(kept(cloud, name), cloud.data(name)).with_context(|| format!("cannot give {name} its data back"))
}

/// Destroys the data of a controller that does not run.
///
/// # Errors
/// When the disk refuses.
pub fn destroy(cloud: &Cloud, name: &str) -> Result<()> {
    remove(&cloud.data(name))
}

/// Ends what still runs of an old voter, and throws away what was kept of it.
///
/// # Errors
/// When it survives, or the disk refuses.
pub async fn expel(cloud: &mut Cloud, name: &str) -> Result<()> {
    let controller = cloud.controller(name).with_context(|| format!("there is no controller {name}"))?;
    if let Some(process) = controller.process.take() {
        process.end(Duration::ZERO).await?;
    }
    cloud.save()?;
    remove(&kept(cloud, name))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
