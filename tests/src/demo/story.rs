//! The steps, in order.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    cloud::{Cloud, finish, until},
    guest::{BOOT, Guest, Tenant},
    moving, quorum, recovery,
    teller::Teller,
};

/// Both tenants use it.
const RANGE: &str = "10.0.0.0/24";
pub(super) const CHANGE: Duration = Duration::from_secs(120);

/// # Errors
/// Of the first step that could not be verified.
pub fn all(cloud: &Cloud, teller: &mut Teller) -> Result<()> {
    let mut image = String::new();
    teller.step("build a small bootable image from Debian packages", || {
        image = build_image()?;
        Ok(image.clone())
    })?;
    teller.step("three controllers and three hosts with libvirt", || {
        cloud.up()?;
        // The hosts share this machine's CPUs, so how busy those are says nothing about which host is idlest.
        cloud.ask(&["setting", "set", "weight-cpu", "0"])?;
        whole_cloud(cloud)
    })?;
    let mut tenants = Vec::new();
    teller.step("two tenants, each with a network 10.0.0.0/24", || {
        tenants = vec![Tenant::create(cloud, "acme", RANGE)?, Tenant::create(cloud, "rival", RANGE)?];
        ensure!(tenants[0].vni != tenants[1].vni, "they got the same VNI");
        Ok(format!("acme: VNI {}, rival: VNI {}", tenants[0].vni, tenants[1].vni))
    })?;
    teller.step("import the image", || import(cloud, &image, &tenants))?;
    let (acme, rival) = (tenants[0].clone(), tenants[1].clone());
    let mut guests = Vec::new();
    teller.step("create three machines", || {
        guests = create(cloud, &acme, &["web-1", "web-2", "web-3"])?;
        on_three_nodes(&guests)
    })?;
    teller.step("they boot and answer HTTP", || all_boot(cloud, &guests))?;
    teller.step("they answer each other across hosts", || meet(cloud, &guests))?;
    teller.step("a machine of the other tenant, same addresses, reaches none of them", || {
        isolated(cloud, &rival, &guests)
    })?;
    teller.step("kill -9 the leader while a machine is being created", || killed_leader(cloud, &acme))?;
    teller.step("a controller loses its disk and joins anew while writes go on", || quorum::wipe(cloud, acme.name))?;
    teller.step("suspend: it stands still", || suspend(cloud, &guests[0]))?;
    teller.step("resume: it goes on where it was", || resume(cloud, &guests[0]))?;
    teller.step("reboot: the same disk boots again", || reboot(cloud, &guests[1]))?;
    teller.step("live migration: it goes on on another host", || {
        let (moved, said) = moving::live(cloud, &guests[0], &guests[2].node)?;
        guests[0] = moved;
        Ok(said)
    })?;
    teller.step("delete: nothing of it is left", || delete(cloud, &guests[2]))?;
    teller.step("a host loses power: its machine goes on elsewhere, from its backup", || {
        recovery::power_cut(cloud, &guests[1])
    })?;
    teller.step("the leader and a host are cut off together: nothing runs twice, nothing is written there", || {
        recovery::wrong_side(cloud, &acme)
    })?;
    teller.step("the bill", || bill(cloud, acme.name))
}

/// Path of the image.
fn build_image() -> Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../image/build.sh").canonicalize()?;
    let output = Command::new(&script).output().with_context(|| script.display().to_string())?;
    let printed = finish("image/build.sh", &output)?;
    let path = printed.lines().last().map(str::to_owned).context("the script printed no path")?;
    ensure!(Path::new(&path).is_file(), "{path} is not there");
    Ok(path)
}

fn whole_cloud(cloud: &Cloud) -> Result<String> {
    let status = quorum::whole(cloud)?;
    let nodes = until("every host is up and has told its use", CHANGE, || {
        let nodes = rows(cloud.ask(&["node", "list"])?, "nodes")?;
        let told = |node: &Value| node["state"] == "up" && node["memory_used_bytes"].as_u64().unwrap_or(0) > 0;
        Ok((nodes.len() == 3 && nodes.iter().all(told)).then_some(nodes))
    })?;
    let kinds: BTreeSet<&str> = nodes.iter().filter_map(|node| node["hypervisor"].as_str()).collect();
    ensure!(!kinds.contains("simulated"), "the hosts are simulated");
    Ok(format!("leader {}, hosts with {}", status.leader_name()?, kinds.into_iter().collect::<Vec<_>>().join(", ")))
}

/// The rows of a list, whether it comes bare or with its page.
pub(super) fn rows(reply: Value, name: &str) -> Result<Vec<Value>> {
    let rows = if reply.is_array() { reply } else { reply[name].clone() };
    rows.as_array().cloned().with_context(|| format!("no list of {name}"))
}

fn import(cloud: &Cloud, path: &str, tenants: &[Tenant]) -> Result<String> {
    let mut digests = BTreeSet::new();
    for tenant in tenants {
        let image = cloud.ask(&["image", "import", path, "--name", "guest", "--tenant", tenant.name])?;
        let replicas = image["replicas"].as_array().map_or(0, Vec::len);
        ensure!(replicas == 2, "it has {replicas} replicas instead of 2: {image}");
        digests.insert(image["digest"].as_str().map(str::to_owned).context("the image has no digest")?);
    }
    ensure!(digests.len() == 1, "equal bytes have {} digests", digests.len());
    let bytes = std::fs::metadata(path)?.len();
    Ok(format!(
        "{bytes} bytes for each tenant, stored once on 2 hosts under {}",
        digests.into_iter().collect::<String>()
    ))
}

/// Creates them at the same time and waits for all.
fn create(cloud: &Cloud, tenant: &Tenant, names: &[&str]) -> Result<Vec<Guest>> {
    let start = |name: &&str| cloud.start(&tenant.create_arguments(name, "--wait"));
    let children = names.iter().map(start).collect::<Result<Vec<_>>>()?;
    let mut guests = Vec::new();
    for (name, child) in names.iter().zip(children) {
        finish(&format!("trefoil vm create {name}"), &child.wait_with_output()?)?;
        guests.push(Guest::find(cloud, tenant, name)?);
    }
    Ok(guests)
}

fn on_three_nodes(guests: &[Guest]) -> Result<String> {
    let nodes: BTreeSet<&str> = guests.iter().map(|guest| guest.node.as_str()).collect();
    ensure!(nodes.len() == 3, "they are on {nodes:?}");
    Ok(guests.iter().map(|g| format!("{} {} on {} at {}", g.id, g.name, g.node, g.ip)).collect::<Vec<_>>().join("\n"))
}

fn all_boot(cloud: &Cloud, guests: &[Guest]) -> Result<String> {
    let began = Instant::now();
    let mut seen = Vec::new();
    for guest in guests {
        let info = guest.booted(cloud)?;
        seen.push(format!("{} after {:.0} s, boot {}", info.hostname, began.elapsed().as_secs_f64(), info.boots));
    }
    Ok(seen.join("\n"))
}

/// Each asks each other.
fn meet(cloud: &Cloud, guests: &[Guest]) -> Result<String> {
    let mut asked = 0;
    for from in guests {
        for to in guests.iter().filter(|to| to.name != from.name) {
            let what = format!("{} on {} answers {} on {}", to.name, to.node, from.name, from.node);
            let who = until(&what, CHANGE, || from.asks(cloud, &to.ip))?;
            ensure!(who == to.name, "'{who}' answered {} at the address of {}", from.name, to.name);
            asked += 1;
        }
    }
    Ok(format!("{asked} requests, each answered by the right one"))
}

fn isolated(cloud: &Cloud, rival: &Tenant, guests: &[Guest]) -> Result<String> {
    let spy = create(cloud, rival, &["spy"])?.remove(0);
    spy.booted(cloud)?;
    let mut refused = 0;
    for guest in guests {
        match spy.asks(cloud, &guest.ip)? {
            None => refused += 1,
            Some(who) => {
                ensure!(who == "spy" && guest.ip == spy.ip, "'{who}' answered the other tenant at {}", guest.ip)
            }
        }
    }
    ensure!(refused >= 2, "only {refused} of the addresses were unreachable");
    // The same question inside the tenant is answered, so it was not the network that was down.
    let inside = guests[0].asks(cloud, &guests[1].ip)?;
    ensure!(inside.as_deref() == Some("web-2"), "inside the tenant {inside:?} answered");
    Ok(format!("spy on {} at {}; {refused} addresses of acme are silent to it, one is its own", spy.node, spy.ip))
}

fn killed_leader(cloud: &Cloud, tenant: &Tenant) -> Result<String> {
    let name = "web-4";
    let leader = quorum::whole(cloud)?.leader_name()?;
    let mut child = cloud.start(&tenant.create_arguments(name, "--wait"))?;
    let seen = until("the machine is being created", CHANGE, || {
        let vms = rows(cloud.ask(&["vm", "list", "--tenant", tenant.name])?, "vms")?;
        let found = vms.into_iter().find(|vm| vm["name"] == name);
        Ok(found.and_then(|vm| vm["status"].as_str().map(str::to_owned)))
    })?;
    let killed = Instant::now();
    cloud.run(&["lab", "kill", &leader])?;
    ensure!(["pending", "creating"].contains(&seen.as_str()), "it was {seen} already: the kill came too late");
    cloud.run(&["tag", "set", "after-the-kill", "yes", "--tenant", tenant.name])?;
    let gap = killed.elapsed();
    let ended = child.wait()?;
    ensure!(ended.success(), "the command that created it ended with {ended}");
    let guest = Guest::find(cloud, tenant, name)?;
    guest.booted(cloud)?;
    let vms = rows(cloud.ask(&["vm", "list", "--tenant", tenant.name])?, "vms")?;
    let created = vms.iter().filter(|vm| vm["name"] == name).count();
    ensure!(created == 1, "it is there {created} times");
    let domains = domains(cloud)?;
    let total: usize = domains.values().sum();
    ensure!(total == 5, "there are {total} domains on the hosts instead of 5: {domains:?}");
    cloud.run(&["lab", "start", &leader])?;
    quorum::whole(cloud)?;
    Ok(format!(
        "{leader} killed while {name} was {seen}; next write acknowledged after {:.2} s; {name} runs once, on {}; {leader} is back",
        gap.as_secs_f64(),
        guest.node
    ))
}

/// Domains that libvirt has, by host.
pub(super) fn domains(cloud: &Cloud) -> Result<BTreeMap<&'static str, usize>> {
    ["h1", "h2", "h3"]
        .into_iter()
        .map(|host| {
            let listed = cloud.run(&["lab", "exec", host, "virsh", "-q", "list", "--all", "--name"])?;
            Ok((host, listed.lines().filter(|line| !line.trim().is_empty()).count()))
        })
        .collect()
}

fn status_is(cloud: &Cloud, guest: &Guest, wanted: &str) -> Result<()> {
    until(&format!("{} is {wanted}", guest.name), CHANGE, || Ok((guest.show(cloud)?["status"] == wanted).then_some(())))
}

fn suspend(cloud: &Cloud, guest: &Guest) -> Result<String> {
    let before = guest.info(cloud).context("it did not answer before")?;
    guest.tell(cloud, "suspend")?;
    status_is(cloud, guest, "suspended")?;
    let url = format!("http://{}/cgi-bin/info", guest.ip);
    let heard = cloud.http(&guest.node, guest.tenant.vni, &url, None, Duration::from_secs(3));
    ensure!(heard.is_none(), "a suspended machine answered");
    Ok(format!("{} counted to {}, then was silent", guest.name, before.counter))
}

fn resume(cloud: &Cloud, guest: &Guest) -> Result<String> {
    guest.tell(cloud, "resume")?;
    status_is(cloud, guest, "running")?;
    let info = guest.booted(cloud)?;
    ensure!(info.boots == 1, "it booted {} times", info.boots);
    Ok(format!("{} counts on at {}, still its first boot", guest.name, info.counter))
}

fn reboot(cloud: &Cloud, guest: &Guest) -> Result<String> {
    let before = guest.info(cloud).context("it did not answer before")?;
    guest.tell(cloud, "reboot")?;
    let after = until(&format!("{} has booted again", guest.name), BOOT, || {
        Ok(guest.info(cloud).filter(|info| info.boots > before.boots))
    })?;
    ensure!(after.boots == before.boots + 1, "it booted {} times", after.boots - before.boots);
    Ok(format!("{}: boot {}", guest.name, after.boots))
}

fn delete(cloud: &Cloud, guest: &Guest) -> Result<String> {
    let before: usize = domains(cloud)?.values().sum();
    guest.tell(cloud, "delete")?;
    let vms = rows(cloud.ask(&["vm", "list", "--tenant", guest.tenant.name])?, "vms")?;
    ensure!(!vms.iter().any(|vm| vm["name"] == guest.name.as_str()), "it is still listed");
    until("its domain is gone", CHANGE, || Ok((domains(cloud)?.values().sum::<usize>() == before - 1).then_some(())))?;
    Ok(format!("{} is neither listed nor on {}", guest.name, guest.node))
}

/// The total is the exact sum of the lines, rounded once.
fn check_total(bill: &Value, lines: &[Value]) -> Result<()> {
    // Nano-units x thousandths x milliseconds per hour, as the lines have it.
    const EXACT_PER_NANO: u128 = 1000 * 3_600_000;
    let exact =
        |line: &Value| line["exact"].as_str().and_then(|text| text.parse::<u128>().ok()).context("no exact amount");
    let sum = lines.iter().map(exact).sum::<Result<u128>>()?;
    let total = u128::from(bill["total_nano"].as_u64().context("no total")?);
    let rounded = (sum + EXACT_PER_NANO / 2) / EXACT_PER_NANO;
    ensure!(total == rounded && total > 0, "the lines add up to {rounded}, the total is {total}");
    Ok(())
}

/// The lines must explain the total, and no machine may be paid for twice at a time.
fn bill(cloud: &Cloud, tenant: &str) -> Result<String> {
    let bill = cloud.ask(&["bill", "show", "--tenant", tenant])?;
    let lines = rows(bill["lines"].clone(), "lines")?;
    check_total(&bill, &lines)?;
    let mut by_resource: BTreeMap<&str, Vec<(u64, u64)>> = BTreeMap::new();
    for line in &lines {
        let time = |field: &str| line[field].as_u64().with_context(|| format!("no {field} in {line}"));
        by_resource
            .entry(line["resource"].as_str().unwrap_or(""))
            .or_default()
            .push((time("from_millis")?, time("to_millis")?));
    }
    for (resource, times) in &mut by_resource {
        times.sort_unstable();
        ensure!(times.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{resource} is paid for twice at a time");
    }
    let suspended = lines.iter().filter(|line| line["status"] == "suspended").count();
    // Once by hand, and once while it was handed over, if that took a millisecond.
    ensure!((1..=2).contains(&suspended), "{suspended} lines for a suspended machine instead of 1 or 2");
    cloud.run(&["bill", "show", "--tenant", tenant])
}
