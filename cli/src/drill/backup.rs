//! The drill of a backup: a machine is backed up, another one is made from it, runs, and both are removed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::proto::{BackUpVmRequest, CreateVmRequest, Image, Vm};
use tokio::time::sleep;

use super::{
    ask::{self, tell},
    heal::Heal,
    stage::Stage,
};

/// Large disks take long; a drill that waits for ever says nothing.
const COPIED: Duration = Duration::from_secs(30 * 60);
const STARTED: Duration = Duration::from_secs(300);
const RESTORED: &str = "drill-restored";

/// `only`: the machine that it is, by name or id; else the first that runs.
pub async fn run(stage: &mut Stage, only: Option<&Vm>) -> Result<()> {
    let running = ask::vms(&stage.client).await?.into_iter().find(|vm| vm.status == "running");
    let vm = only.cloned().or(running).context("no machine runs")?;
    ensure!(vm.status == "running", "{} is {}", vm.name, vm.status);
    let (id, tenant) = (vm.id.clone(), vm.tenant.clone());
    let (at, real) =
        stage.begin_fault(&id, &format!("{id} '{}' is backed up, and another machine made from it", vm.name));
    if !real {
        sleep(stage.hold).await;
        return Ok(());
    }
    let asked =
        tell!(stage.client, back_up_vm, BackUpVmRequest { tenant: tenant.clone(), vm: id.clone(), full: false })?;
    let number = asked.backups.as_ref().map_or(0, |backups| backups.asked);
    let answered = async |client: &api::client::Client| {
        Ok(ask::vm(client, &tenant, &id).await?.backups.is_some_and(|backups| backups.answered >= number))
    };
    stage.reach(&format!("{id} is backed up"), COPIED, answered).await;
    let copied = stage.record.now();
    let Some(image) = newest(stage, &tenant, &id).await? else {
        let why = ask::vm(&stage.client, &tenant, &id).await?.backups.map(|backups| backups.reason).unwrap_or_default();
        stage.findings.unrecovered.push(format!("there is no backup of {id}: {why}"));
        return Ok(());
    };
    stage.measure("backed up", copied - at, &id, None);
    stage.findings.evidence.push(format!("{} has the digest {}, {} bytes", image.name, image.digest, image.size_bytes));
    stage.heals.push(Heal::DeleteImage { tenant: tenant.clone(), image: image.name.clone() });
    restore(stage, &vm, &image).await?;
    stage.heal().await;
    let gone = async |client: &api::client::Client| {
        let found = ask::vms(client).await?;
        Ok(!found.iter().any(|found| found.tenant == tenant && found.name == RESTORED))
    };
    stage.reach("nothing of the restored machine is left", STARTED, gone).await;
    Ok(())
}

async fn restore(stage: &mut Stage, vm: &Vm, image: &Image) -> Result<()> {
    let from = stage.record.now();
    let network = vm.nics.first().map(|nic| nic.network.clone()).unwrap_or_default();
    let body = CreateVmRequest {
        tenant: vm.tenant.clone(),
        name: RESTORED.into(),
        image: image.name.clone(),
        template: vm.template.clone(),
        network,
        ..CreateVmRequest::default()
    };
    stage.heals.push(Heal::DeleteVm { tenant: vm.tenant.clone(), vm: RESTORED.into() });
    let made = tell!(stage.client, create_vm, body)?;
    let (tenant, id) = (made.tenant.clone(), made.id.clone());
    let runs = async |client: &api::client::Client| Ok(ask::vm(client, &tenant, &id).await?.status == "running");
    stage.reach(&format!("{id}, made from {}, runs", image.name), STARTED, runs).await;
    stage.measure("restored and running", stage.record.now() - from, &id, None);
    let now = ask::vm(&stage.client, &tenant, &id).await?;
    let what = format!("{id} was made from {} and is {}", now.image, now.status);
    let list = if now.image == image.name { &mut stage.findings.evidence } else { &mut stage.findings.broken };
    list.push(what);
    sleep(stage.hold).await;
    Ok(())
}

async fn newest(stage: &Stage, tenant: &str, id: &str) -> Result<Option<Image>> {
    let images = ask::images(&stage.client, tenant).await?;
    Ok(images.into_iter().filter(|image| image.backup_of == id).max_by_key(|image| image.taken_at_millis))
}
