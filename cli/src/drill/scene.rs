//! What a drill needs around it: a tenant for the background client, and when there is an image machines to lose, each
//! backed up. Everything of it is removed when all runs are over.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use api::{
    client::{Client, new_request_id},
    proto::{
        BackUpVmRequest, CreateNetworkRequest, CreateTenantRequest, CreateVmRequest, ImportImageHeader, ListRequest,
    },
};
use tokio::time::{Instant, sleep};

use super::{
    ask::{self, ask, tell, unless},
    heal::Heal,
};
use crate::image_file::{self, ImageFormat};

pub const TENANT: &str = "drill";
const NETWORK: &str = "drill";
const IMAGE: &str = "drill";
const RANGE: &str = "10.213.0.0/24";
/// An image has to be copied, emulated machines to boot.
const READY: Duration = Duration::from_secs(600);
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Machines of the drill's own.
pub struct Own<'a> {
    pub image: &'a Path,
    pub machines: usize,
    pub recovery: &'a str,
}

/// Makes a tenant of its own; what was made is in `undo`, also when it fails half-way.
///
/// # Errors
/// With one sentence.
pub async fn tenant(client: &Client, undo: &mut Vec<Heal>) -> Result<()> {
    let body = CreateTenantRequest { name: TENANT.into(), quota: None };
    unless("already-exists", tell!(client, create_tenant, body).map(|_| ()))?;
    undo.push(Heal::DeleteTenant(TENANT.into()));
    undo.extend(super::load::keys().map(|key| Heal::DeleteTag { tenant: TENANT.into(), key }));
    Ok(())
}

/// Makes the machines and waits until each runs and its backup is safe.
///
/// # Errors
/// With one sentence.
pub async fn machines(client: &Client, own: &Own<'_>, undo: &mut Vec<Heal>) -> Result<()> {
    let body = CreateNetworkRequest { tenant: TENANT.into(), name: NETWORK.into(), range: RANGE.into() };
    unless("already-exists", tell!(client, create_network, body).map(|_| ()))?;
    undo.push(Heal::DeleteNetwork { tenant: TENANT.into(), network: NETWORK.into() });
    undo.push(Heal::DeleteImage { tenant: TENANT.into(), image: IMAGE.into() });
    import(client, own.image).await?;
    let templates = ask!(client, list_templates, ListRequest { limit: 1000, ..ListRequest::default() })?.templates;
    let smallest = templates.iter().min_by_key(|template| (template.memory_bytes, template.disk_bytes));
    let template = smallest.context("the cloud offers no template")?.name.clone();
    let names: Vec<String> = (1..=own.machines).map(|number| format!("drill-{number}")).collect();
    for name in &names {
        let body = CreateVmRequest {
            tenant: TENANT.into(),
            name: name.clone(),
            image: IMAGE.into(),
            template: template.clone(),
            network: NETWORK.into(),
            recovery: own.recovery.into(),
            ..CreateVmRequest::default()
        };
        undo.push(Heal::DeleteVm { tenant: TENANT.into(), vm: name.clone() });
        tell!(client, create_vm, body)?;
    }
    for name in &names {
        until(client, name, "runs", |vm| vm.status == "running").await?;
        tell!(client, back_up_vm, BackUpVmRequest { tenant: TENANT.into(), vm: name.clone(), full: false })?;
    }
    for name in &names {
        let safe = |vm: &api::proto::Vm| vm.backups.as_ref().is_some_and(|backups| backups.safe_at_millis > 0);
        until(client, name, "has a backup on another host", safe).await?;
    }
    for image in backups(client).await? {
        undo.insert(undo.len() - own.machines, Heal::DeleteImage { tenant: TENANT.into(), image });
    }
    spread(client).await
}

/// Waits until each image has all the copies that it should have: then what follows is not about copying.
async fn spread(client: &Client) -> Result<()> {
    let asked = Instant::now();
    loop {
        let images = ask::images(client, TENANT).await?;
        let missing = images.iter().find(|image| image.replicas.len() < image.wanted_replicas as usize);
        let Some(missing) = missing else { return Ok(()) };
        ensure!(asked.elapsed() < READY, "{} has too few copies", missing.name);
        sleep(LOOK_AGAIN).await;
    }
}

async fn backups(client: &Client) -> Result<Vec<String>> {
    let images = ask::images(client, TENANT).await?;
    Ok(images.into_iter().filter(|image| !image.backup_of.is_empty()).map(|image| image.name).collect())
}

async fn import(client: &Client, path: &Path) -> Result<()> {
    let found = image_file::inspect(path, None).or_else(|_| image_file::inspect(path, Some(ImageFormat::Raw)))?;
    let header = ImportImageHeader {
        tenant: TENANT.into(),
        name: IMAGE.into(),
        format: found.format.name().into(),
        size_bytes: found.size_bytes,
        virtual_bytes: found.virtual_bytes,
        digest: image_file::digest(path, |_| {})?.to_string(),
    };
    let imported = client.import_image(new_request_id(), header, path, |_| {}).await;
    Ok(unless("already-exists", imported.map(|_| ()))?)
}

async fn until(client: &Client, name: &str, what: &str, so: impl Fn(&api::proto::Vm) -> bool) -> Result<()> {
    let asked = Instant::now();
    loop {
        let vm = ask::vm(client, TENANT, name).await?;
        if so(&vm) {
            return Ok(());
        }
        let given_up = vm.status == "failed" && vm.retry_at_millis == 0;
        ensure!(!given_up && asked.elapsed() < READY, "{name} is {}, and never {what}: {}", vm.status, vm.reason);
        sleep(LOOK_AGAIN).await;
    }
}

/// Removes it all, the newest first; what does not go is said and left.
pub async fn remove(client: &Client, mut undo: Vec<Heal>) -> Vec<String> {
    let mut left = Vec::new();
    while let Some(heal) = undo.pop() {
        if let Err(error) = heal.apply(None, client).await {
            left.push(format!("{heal}: {error:#}"));
        }
    }
    left
}
