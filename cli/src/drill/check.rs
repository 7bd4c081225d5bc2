//! What must be so before a drill begins. A refusal is one sentence, and nothing was done.

use api::{
    client::Client,
    error::ApiError,
    proto::{GetTagRequest, QuorumCheckRequest, RecoveryRequest, Vm},
};

use super::{
    ask::{self, ask},
    clock,
    kind::Kind,
};
use crate::lab::{Cloud, LabHypervisor};

/// The tag of a tenant of a live cloud: what may be drilled, names by blanks.
pub const TAG: &str = "drill";
/// The word in it that allows drills of the controllers.
pub const QUORUM: &str = "quorum";

pub fn refused(why: impl Into<String>) -> ApiError {
    ApiError::new("precondition", why)
}

/// What can be known without asking the cloud.
///
/// # Errors
/// Why it cannot run here.
pub fn kind(kind: Kind, cloud: Option<&Cloud>) -> Result<(), ApiError> {
    let about = kind.about();
    let Some(cloud) = cloud else {
        let why = format!("{} runs on {} only; on a live cloud it would hurt others", kind.name(), about.runs_on);
        return if about.live { Ok(()) } else { Err(refused(why)) };
    };
    if kind == Kind::ClockStep && clock::library().is_none() {
        return Err(refused(
            "clock-step gives one controller a wall clock of its own by libfaketime: install the package libfaketime",
        ));
    }
    if kind.takes_libvirt() && cloud.hypervisor == LabHypervisor::Simulated {
        return Err(refused(format!(
            "{} needs hosts of their own: simulated ones share one network and have no guard",
            kind.name()
        )));
    }
    if kind.hits_a_host() && cloud.hosts.len() < 2 {
        return Err(refused("a machine of a lost host needs another host"));
    }
    Ok(())
}

/// Whether the cloud is well: else its trouble would be taken for the drill's.
///
/// # Errors
/// What is wrong with it.
pub async fn health(kind: Kind, client: &Client) -> Result<(), ApiError> {
    let status = ask::status(client).await?;
    let voters = status.controllers.iter().filter(|c| matches!(&*c.role, "leader" | "voter")).count();
    if let Some(missing) = status.controllers.iter().find(|c| !matches!(&*c.role, "leader" | "voter")) {
        return Err(refused(format!("{} is {}", missing.name, missing.role)));
    }
    // Without a third one the loss of any stops the cloud, which is no news.
    if kind != Kind::BackupRestore && voters < 3 {
        return Err(refused(format!("{voters} controllers vote, and a drill takes 3")));
    }
    if !status.hashes_agree {
        return Err(refused("the states of the controllers differ"));
    }
    if let Some(node) = ask::nodes(client).await?.into_iter().find(|node| node.state != "up") {
        return Err(refused(format!("the host {} is {}", node.name, node.state)));
    }
    let checked = ask!(client, quorum_check, QuorumCheckRequest {})?;
    if let Some(broken) = checked.broken.first() {
        return Err(refused(format!("a rule is broken already: {}: {}", broken.rule, broken.sentence)));
    }
    let recovery = ask!(client, get_recovery, RecoveryRequest { stale: false })?;
    if recovery.refounding.is_some() {
        return Err(refused("the cloud is still put together after a refounding: see 'trefoil recovery status'"));
    }
    let brake = recovery.brake;
    if kind.hits_a_host() && brake != "armed" {
        return Err(refused(format!("recovery is {brake}: 'trefoil recovery arm' first")));
    }
    Ok(())
}

/// Whether there is a machine to lose or to back up.
///
/// # Errors
/// When there is none.
pub async fn machines(kind: Kind, client: &Client) -> Result<(), ApiError> {
    let vms = ask::vms(client).await?;
    let moves = |vm: &&Vm| matches!(&*vm.recovery, "exclusive" | "available");
    let running = || vms.iter().filter(|vm| vm.status == "running");
    if kind.hits_a_host() && running().find(moves).is_none() {
        return Err(refused(
            "no machine runs that would move: create one, or let the drill make its own with --image FILE",
        ));
    }
    if kind == Kind::BackupRestore && running().next().is_none() {
        return Err(refused("no machine runs: create one, or let the drill make its own with --image FILE"));
    }
    let moving =
        vms.iter().find(|vm| kind.hits_a_host() && !matches!(&*vm.status, "running" | "stopped" | "suspended"));
    match moving {
        Some(vm) => Err(refused(format!("{} '{}' is {}: wait until it is not", vm.id, vm.name, vm.status))),
        None => Ok(()),
    }
}

/// What the tag of the tenant allows on a live cloud: the machine, for a drill of one.
///
/// # Errors
/// When the tag does not name it.
pub async fn allowed(kind: Kind, client: &Client, tenant: &str) -> Result<Option<Vm>, ApiError> {
    if tenant.is_empty() {
        return Err(ApiError::invalid("say with --tenant whose tag 'drill' allows it"));
    }
    let body = GetTagRequest { tenant: tenant.into(), key: TAG.into(), stale: false };
    let tag = match ask!(client, get_tag, body) {
        Err(error) if error.code == "not-found" => {
            return Err(refused(format!("the tenant {tenant} has no tag '{TAG}' that says what may be drilled")));
        }
        other => other?.value,
    };
    let mut names = tag.split_whitespace();
    if kind != Kind::BackupRestore {
        let allows = names.any(|name| name == QUORUM);
        let why = || refused(format!("the tag '{TAG}' of {tenant} does not name '{QUORUM}'"));
        return if allows { Ok(None) } else { Err(why()) };
    }
    let name = names.find(|name| *name != QUORUM);
    let name = name.ok_or_else(|| refused(format!("the tag '{TAG}' of {tenant} names no machine")))?;
    let vm = ask::vm(client, tenant, name).await?;
    if vm.status == "running" { Ok(Some(vm)) } else { Err(refused(format!("{name} is {}", vm.status))) }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    fn cloud(hypervisor: LabHypervisor, hosts: u16) -> Cloud {
        let dir = tempfile::tempdir().unwrap();
        Cloud::new(&dir.path().join("c"), hypervisor, false, (3, hosts), 9000).unwrap()
    }

    #[test]
    fn on_a_live_cloud_nothing_is_hurt() {
        let allowed: Vec<String> =
            Kind::value_variants().iter().filter(|k| kind(**k, None).is_ok()).map(|k| k.name()).collect();
        assert_eq!(allowed, ["leader-transfer", "backup-restore"]);
        let refusal = kind(Kind::NodePower, None).unwrap_err();
        assert_eq!((refusal.code.as_str(), refusal.kind.exit_status()), ("precondition", 4));
    }

    #[test]
    fn what_cannot_be_injected_here_says_why() {
        let simulated = cloud(LabHypervisor::Simulated, 3);
        if clock::library().is_none() {
            let refusal = kind(Kind::ClockStep, Some(&simulated)).unwrap_err();
            assert!(refusal.code == "precondition" && refusal.message.contains("package libfaketime"), "{refusal}");
        }
        assert_eq!(kind(Kind::AgentHang, Some(&simulated)).unwrap_err().code, "precondition");
        assert!(kind(Kind::NodePower, Some(&simulated)).is_ok());
        let small = cloud(LabHypervisor::Simulated, 1);
        assert!(kind(Kind::NodePower, Some(&small)).unwrap_err().message.contains("another host"));
    }
}
