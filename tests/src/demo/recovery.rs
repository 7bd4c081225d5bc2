//! A host of the demonstration loses its power.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    cloud::{Cloud, until},
    guest::Guest,
    story::{CHANGE, domains, rows},
};

/// Backs a machine up, cuts the power of its host, and finds it running elsewhere with what the backup had; then switches
/// the host on again and sees that it does not keep what was given away.
///
/// # Errors
/// Of the first thing that is not as it should be.
pub fn power_cut(cloud: &Cloud, guest: &Guest) -> Result<String> {
    let before = guest.info(cloud).context("it did not answer before")?;
    cloud.run(&["backup", "create", &guest.name, "--tenant", guest.tenant.name, "--wait"])?;
    until("the backup is on another host", CHANGE, || {
        Ok((guest.show(cloud)?["backups"]["safe_at_millis"].as_u64() > Some(0)).then_some(()))
    })?;

    let cut = Instant::now();
    cloud.run(&["lab", "poweroff", &guest.node])?;
    until("the host is declared lost", CHANGE, || {
        let lost = cloud.ask(&["recovery", "status"])?["lost"].clone();
        Ok((lost.as_array().is_some_and(|lost| !lost.is_empty())).then_some(()))
    })?;
    let declared = cut.elapsed();
    let (vm, moved) = until("it runs on another host", CHANGE, || {
        let vm = guest.show(cloud)?;
        let runs = vm["status"] == "running" && vm["loss"].is_object();
        Ok(runs.then(|| Guest::find(cloud, &guest.tenant, &guest.name)).transpose()?.map(|moved| (vm, moved)))
    })?;
    let started = cut.elapsed();
    ensure!(moved.node != guest.node && moved.ip == guest.ip, "it is on {} at {}", moved.node, moved.ip);
    ensure!(vm["loss"]["data_from_millis"].as_u64() > Some(0), "it was not made from its backup: {vm}");
    let after = moved.booted(cloud)?;
    ensure!(after.boots == before.boots + 1, "its disk has booted {} times, not {}", after.boots, before.boots + 1);
    let answered = cut.elapsed();

    cloud.run(&["lab", "start", &guest.node])?;
    until("the host is back", CHANGE, || {
        let nodes = rows(cloud.ask(&["node", "list"])?, "nodes")?;
        Ok(nodes.iter().all(|node| node["state"] == "up").then_some(()))
    })?;
    until("it has set aside what was given away", CHANGE, || {
        let machines =
            |tenant: &str| -> Result<Vec<Value>> { rows(cloud.ask(&["vm", "list", "--tenant", tenant])?, "vms") };
        let wanted = machines("acme")?.len() + machines("rival")?.len();
        Ok((domains(cloud)?.values().sum::<usize>() == wanted).then_some(()))
    })?;
    Ok(format!(
        "{} lost power; declared lost after {:.1} s, {} started on {} after {:.1} s and answered after {:.1} s, boot {} of the same disk",
        guest.node,
        declared.as_secs_f64(),
        guest.name,
        moved.node,
        started.as_secs_f64(),
        answered.as_secs_f64(),
        after.boots
    ))
}
