//! A machine of the demonstration goes to another host while it runs, and answers all the time but for a moment.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use super::{
    cloud::{Cloud, until},
    guest::Guest,
    story::{CHANGE, domains},
};

/// Moves it to the host `to`; gives the machine where it is now, and what was seen.
///
/// # Errors
/// Of the first thing that is not as it should be.
pub fn live(cloud: &Cloud, guest: &Guest, to: &str) -> Result<(Guest, String)> {
    let before = guest.info(cloud).context("it did not answer before")?;
    let all = domains(cloud)?.values().sum::<usize>();
    let over = AtomicBool::new(false);
    let asked = Instant::now();
    let (last, first, moved) = thread::scope(|scope| {
        let here = scope.spawn(|| heard(cloud, guest, &guest.node, &over));
        let there = scope.spawn(|| heard(cloud, guest, to, &over));
        let moved = cloud.run(&["vm", "migrate", &guest.name, "--to", to, "--tenant", guest.tenant.name, "--wait"]);
        let took = asked.elapsed();
        let answered = until("it answers on its new host", CHANGE, || {
            let at = Guest { node: to.into(), ..guest.clone() };
            Ok(at.info(cloud).map(|_| ()))
        });
        over.store(true, Ordering::Relaxed);
        let (here, there) = (here.join(), there.join());
        (here, there, moved.and(answered.map(|()| took)))
    });
    let took = moved?;
    let last = last.ok().and_then(|heard| heard.last().copied()).context("nobody answered on the old host")?;
    let first = first.ok().and_then(|heard| heard.first().copied()).context("nobody answered on the new host")?;
    ensure!(first > last, "it answered on both hosts at once");
    let moved = Guest::find(cloud, &guest.tenant, &guest.name)?;
    ensure!(moved.node == to && moved.ip == guest.ip, "it is on {} at {}", moved.node, moved.ip);
    let after = moved.info(cloud).context("it does not answer on its new host")?;
    ensure!(after.boots == before.boots, "it has booted {} times, {} before", after.boots, before.boots);
    ensure!(after.counter > before.counter, "it has counted to {}, {} before", after.counter, before.counter);
    until("nothing of it is left on its old host", CHANGE, || {
        Ok((domains(cloud)?.values().sum::<usize>() == all && guest.info(cloud).is_none()).then_some(()))
    })?;
    let said = format!(
        "{} went from {} to {to} in {:.1} s and counted on from {} to {}; no answer for {:.1} s; one QEMU runs it",
        guest.name,
        guest.node,
        took.as_secs_f64(),
        before.counter,
        after.counter,
        first.duration_since(last).as_secs_f64()
    );
    Ok((moved, said))
}

/// When the machine answered a ping in its network on this host. HTTP is too slow a clock: an emulated guest takes
/// longer to answer than it stands still.
fn heard(cloud: &Cloud, guest: &Guest, host: &str, over: &AtomicBool) -> Vec<Instant> {
    let vni = guest.tenant.vni.to_string();
    let ping = ["lab", "tenant-exec", host, &vni, "ping", "-n", "-q", "-c", "1", "-W", "1", &guest.ip];
    let mut heard = Vec::new();
    while !over.load(Ordering::Relaxed) {
        if cloud.run(&ping).is_ok() {
            heard.push(Instant::now());
        }
    }
    heard
}
