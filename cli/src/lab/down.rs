//! `trefoil down`: ends every process of a cloud on this machine and removes every trace, whatever state it is in.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::{
    cloud::{Cloud, Placement, namespace_prefix},
    place::Place,
    process::{ProcessId, marked, run},
    telling::Telling,
};

#[derive(Args, Clone, Debug)]
pub struct DownArgs {
    #[command(flatten)]
    pub placement: Placement,
}

/// A process may start another between the look and the end; a third round finds nothing new.
const ROUNDS: usize = 10;

/// Removes it; succeeds when there is none.
///
/// # Errors
/// When the directory is not a cloud's, or something does not go away.
pub async fn down(args: DownArgs) -> Result<()> {
    let telling = Telling::begin();
    let dir = std::path::absolute(&args.placement.dir)?;
    if dir.exists() && !Cloud::is_in(&dir) && fs::read_dir(&dir)?.next().is_some() {
        bail!("{} is not the directory of a cloud", dir.display());
    }
    let ended = end_processes(&dir).await?;
    let namespaces = remove_namespaces(&dir).await?;
    let existed = remove_directory(&dir)?;
    match (ended, namespaces, existed) {
        (0, 0, false) => telling.step(&format!("no cloud in {}", dir.display())),
        _ => telling.step(&format!(
            "{ended} processes ended, {namespaces} network namespaces removed, {} removed",
            dir.display()
        )),
    }
    Ok(())
}

/// Those of the record, while they are the same processes, and those that carry the cloud's mark.
async fn end_processes(dir: &Path) -> Result<usize> {
    let mut ended = BTreeSet::new();
    for _ in 0..ROUNDS {
        let mut processes = marked(dir);
        processes.extend(recorded(dir).into_iter().filter(ProcessId::is_alive));
        if processes.is_empty() {
            return Ok(ended.len());
        }
        for process in &processes {
            process.signal(nix::sys::signal::Signal::SIGKILL)?;
        }
        for process in &processes {
            process.end(Duration::ZERO).await?;
        }
        ended.extend(processes);
    }
    bail!("processes of the cloud in {} start again and again", dir.display())
}

fn recorded(dir: &Path) -> Vec<ProcessId> {
    // A record that cannot be read names nobody; the mark still does.
    let Ok(cloud) = Cloud::load(dir) else { return Vec::new() };
    let controllers = cloud.controllers.iter().filter_map(|controller| controller.process);
    let agents = cloud.hosts.iter().filter_map(|host| host.agent);
    let boots = cloud.hosts.iter().filter_map(|host| host.boot);
    let hosts = boots.flat_map(|boot| [boot.libvirtd, boot.init, boot.unshare]);
    controllers.chain(agents).chain(hosts).collect()
}

async fn remove_namespaces(dir: &Path) -> Result<usize> {
    let prefix = namespace_prefix(dir);
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let ours: Vec<&String> = names.iter().filter(|name| name.starts_with(&prefix)).collect();
    for name in &ours {
        run(dir, &Place::Here, &["ip", "netns", "delete", name]).await?;
    }
    Ok(ours.len())
}

/// The record goes last: when something cannot be removed, the directory is still known as a cloud's.
fn remove_directory(dir: &Path) -> Result<bool> {
    let remove = || -> io::Result<()> {
        let entries: Vec<PathBuf> = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        let (record, others): (Vec<_>, Vec<_>) = entries.into_iter().partition(|path| path.ends_with("cloud.json"));
        for path in others.iter().chain(&record) {
            if fs::symlink_metadata(path)?.is_dir() {
                fs::remove_dir_all(path)?;
            } else {
                fs::remove_file(path)?;
            }
        }
        fs::remove_dir(dir)
    };
    match remove() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other.map(|()| true).with_context(|| format!("cannot remove {}", dir.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{LabHypervisor, process::Daemon};

    fn args(dir: &Path) -> DownArgs {
        DownArgs { placement: Placement { dir: dir.to_owned() } }
    }

    #[tokio::test]
    async fn it_ends_what_was_never_written_down_and_works_twice() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("cloud");
        let cloud = Cloud::new(&dir, LabHypervisor::Simulated, false, (1, 1), 9000).unwrap();
        let log = cloud.log("x");
        let process = Daemon { dir: &dir, log: &log, place: &Place::Here }.start(&["sleep", "1000"]).await.unwrap();
        // Between its fork and its exec a process has no mark yet.
        let carries_the_mark = async {
            while !marked(&dir).contains(&process) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), carries_the_mark).await.expect("it carries the mark");
        down(args(&dir)).await.unwrap();
        assert!(!process.is_alive() && !dir.exists());
        down(args(&dir)).await.unwrap();
    }

    #[tokio::test]
    async fn a_directory_of_somebody_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "").unwrap();
        let refused = down(args(dir.path())).await.unwrap_err();
        assert!(refused.to_string().contains("not the directory of a cloud"), "{refused}");
        assert!(dir.path().join("mine").exists());
    }
}
