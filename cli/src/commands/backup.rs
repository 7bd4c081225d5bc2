//! `trefoil backup`: copies of machines' disks, and machines that are made from them. A backup is an image like any
//! other, so `trefoil image` shows, exports (a full one) and deletes it as well.

use std::time::Duration;

use api::{
    error::ApiError,
    proto::{
        BackUpVmRequest, CreateVmRequest, GetVmRequest, Image, RehearseBackupRequest, Rehearsed, SetVmBackupRequest,
    },
};
use clap::Subcommand;
use tokio::time::{Instant, sleep};

use super::vm::follow;
use crate::{
    context::{Context, all_pages, change, read},
    moment::moment_text,
    output::{self, Rows, printable},
    quantity::{duration, duration_text, size_text},
    wait::{Goal, LOOK_EVERY, WaitArgs, progress_bar, until},
};

#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Copies a machine's disk into an image while it runs: what was written since its last backup, where that is known
    #[command(after_help = "Examples:\n  trefoil backup create web\n  trefoil backup create web --full")]
    Create {
        /// Name or id of the machine
        vm: String,
        /// All of the disk, into a file that stands alone
        #[arg(long)]
        full: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Lists backups
    #[command(after_help = "Example:\n  trefoil backup list --vm web")]
    List {
        /// Only those of this machine, name or id
        #[arg(long)]
        vm: Option<String>,
    },
    /// Makes a new machine from a backup; the old one stays as it is
    #[command(after_help = "Example:\n  trefoil backup restore backup-vm-3-12 web2 --template normal --network blue")]
    Restore {
        /// The backup
        backup: String,
        /// Name of the new machine
        name: String,
        /// Template that says how large it is
        #[arg(long)]
        template: String,
        /// Network that it is in
        #[arg(long)]
        network: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Test-boots a backup in isolation, reports whether it came up, and removes the copy
    ///
    /// The guest is in no network and costs nothing. It has come up when its guest agent answers, or its console asks for
    /// a login, or says what --expect names. A guest of which nothing of the kind is seen in time is 'unknown'.
    #[command(
        after_help = "Examples:\n  trefoil backup rehearse web\n  trefoil backup rehearse backup-vm-3-12 --expect 'database is up' --within 10m\n  trefoil backup rehearse web --abort"
    )]
    Rehearse {
        /// The backup, or the machine whose newest one is meant
        backup: String,
        /// How long it may take to come up, 10s to 1h
        #[arg(long, value_name = "TIME", value_parser = duration, default_value = "5m")]
        within: Duration,
        /// What its console says when it has come up
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        expect: String,
        /// End the one that is under way
        #[arg(long, conflicts_with_all = ["within", "expect"])]
        abort: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Says how often a machine is backed up, how many backups are kept and how many of them are full ones
    #[command(
        after_help = "Example:\n  trefoil backup schedule web --every 24h --keep 7 --full-every 7\n  trefoil backup schedule web --off"
    )]
    Schedule {
        /// Name or id of the machine
        vm: String,
        /// How often, such as 6h
        #[arg(long, value_name = "TIME", value_parser = duration, required_unless_present = "off", conflicts_with = "off")]
        every: Option<Duration>,
        /// The newest so many are kept once they are on another node, and what they stand on; 0 keeps all
        #[arg(long, default_value_t = 0)]
        keep: u32,
        /// One of so many in a row is a full one, 1 to 32; 0: as the setting backup-full-every says
        #[arg(long, value_name = "N", default_value_t = 0)]
        full_every: u32,
        /// On demand only
        #[arg(long)]
        off: bool,
    },
}

pub async fn run(command: BackupCommand, context: &Context) -> Result<(), ApiError> {
    let tenant = context.tenant.clone();
    match command {
        BackupCommand::Create { vm, full, wait } => {
            let vm = change!(context, back_up_vm, BackUpVmRequest { tenant, vm, full })?;
            let number = vm.backups.as_ref().map_or(0, |backups| backups.asked);
            follow(vm, Goal::BackedUp(number), &wait, context).await
        }
        BackupCommand::List { vm } => list(vm, context).await,
        BackupCommand::Restore { backup, name, template, network, wait } => {
            let body = CreateVmRequest { tenant, name, image: backup, template, network, ..CreateVmRequest::default() };
            let vm = change!(context, create_vm, body)?;
            let vm = if wait.wanted(context) {
                until(context, &vm, Goal::Status("running"), &wait).await?.unwrap_or(vm)
            } else {
                vm
            };
            context.print(&vm, || format!("{} '{}' {}", vm.id, vm.name, vm.status))
        }
        BackupCommand::Rehearse { backup, abort: true, .. } => {
            let image = change!(context, end_rehearsal, context.named(backup))?;
            context.print(&image, || format!("the rehearsal of {} is ended", image.name))
        }
        BackupCommand::Rehearse { backup, within, expect, abort: false, wait } => {
            let limit_millis = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
            let body = RehearseBackupRequest { tenant, name: backup, limit_millis, expect };
            let image = change!(context, rehearse_backup, body)?;
            let image = if wait.wanted(context) { rehearsed(image, &wait, context).await? } else { image };
            context.print(&image, || format!("{}: {}", image.name, rehearsal(&image)))
        }
        BackupCommand::Schedule { vm, every, keep, full_every, off: _ } => {
            let every_millis = every.map_or(0, |every| u64::try_from(every.as_millis()).unwrap_or(u64::MAX));
            let body = SetVmBackupRequest { tenant, vm, every_millis, keep, full_every };
            let vm = change!(context, set_vm_backup, body)?;
            context.print(&vm, || match every_millis {
                0 => format!("{} is backed up on demand only", vm.name),
                _ => {
                    let due = vm.backups.as_ref().map_or(0, |backups| backups.due_at_millis);
                    format!("{} is backed up next at {}", vm.name, moment_text(due))
                }
            })
        }
    }
}

/// Waits for the verdict.
///
/// # Errors
/// `failed` when it does not boot, `inconclusive` when that is not known, `timeout` when it is still under way.
async fn rehearsed(begun: Image, wait: &WaitArgs, context: &Context) -> Result<Image, ApiError> {
    let give_up = wait.deadline();
    let bar = progress_bar();
    loop {
        let image = read!(context, get_image, context.named(begun.id.clone()))?;
        bar.set_prefix(printable(&image.name).into_owned());
        bar.set_message(printable(&rehearsal(&image)).into_owned());
        if image.rehearsal.is_none() {
            bar.finish_and_clear();
            return verdict(&begun, image);
        }
        if Instant::now() >= give_up {
            bar.finish_and_clear();
            return Err(ApiError::timeout(format!("{}: {}", image.name, rehearsal(&image))));
        }
        sleep(LOOK_EVERY).await;
    }
}

fn verdict(begun: &Image, image: Image) -> Result<Image, ApiError> {
    let told = image.rehearsed.as_ref().filter(|_| image.rehearsed != begun.rehearsed);
    let Some(told) = told else {
        return Err(ApiError::new("inconclusive", format!("the rehearsal of {} was ended", image.name)));
    };
    let code = match told.verdict.as_str() {
        "ok" => return Ok(image),
        "failed" => "failed",
        _ => "inconclusive",
    };
    Err(ApiError::new(code, format!("{}: {}", image.name, rehearsal(&image))))
}

/// What is known of whether it boots.
fn rehearsal(image: &Image) -> String {
    match (&image.rehearsal, &image.rehearsed) {
        (Some(rehearsal), _) if rehearsal.node.is_empty() => "waits for a node".into(),
        (Some(rehearsal), _) => format!("under way on {}", rehearsal.node),
        (None, Some(last)) => outcome(last),
        (None, None) => "never".into(),
    }
}

/// The same for a row: by what it was seen stands in `vm show`, and in JSON.
fn in_short(image: &Image) -> String {
    match &image.rehearsed {
        Some(last) if image.rehearsal.is_none() => format!("{} at {}", last.verdict, moment_text(last.at_millis)),
        _ => rehearsal(image),
    }
}

/// `ok at 2026-11-22 21:00:00 after 12s: its guest agent answered`.
pub(super) fn outcome(last: &Rehearsed) -> String {
    let took =
        if last.took_millis == 0 { String::new() } else { format!(" after {}", duration_text(last.took_millis)) };
    format!("{} at {}{took}: {}", last.verdict, moment_text(last.at_millis), last.reason)
}

async fn list(vm: Option<String>, context: &Context) -> Result<(), ApiError> {
    let of = match vm {
        Some(vm) => {
            let body = GetVmRequest { tenant: context.tenant.clone(), vm, stale: context.stale };
            Some(read!(context, get_vm, body)?.id)
        }
        None => None,
    };
    let mut read_at = None;
    let mut images = all_pages(async |after| {
        let page = read!(context, list_images, context.page(after))?;
        read_at = page.read_at;
        Ok((page.images, page.next))
    })
    .await?;
    images.retain(|image| !image.backup_of.is_empty() && of.as_ref().is_none_or(|of| *of == image.backup_of));
    output::label(context.format, read_at.as_ref());
    context.print(&images, || table(&images).render(None))
}

/// `full`, or `3 on backup-vm-3-11, 120 MiB`: how many images it takes, what it stands on, and the bytes of all.
fn chain(image: &Image) -> String {
    match image.parent.as_str() {
        "" => "full".into(),
        parent => format!("{} on {parent}, {}", image.chain_length, size_text(image.chain_bytes)),
    }
}

fn table(images: &[Image]) -> Rows {
    let row = |image: &Image| {
        vec![
            image.name.clone(),
            image.backup_of.clone(),
            moment_text(image.taken_at_millis),
            image.consistency.clone(),
            size_text(image.size_bytes),
            chain(image),
            format!("{}/{}", image.replicas.len(), image.wanted_replicas),
            image.replicas.join(" "),
            in_short(image),
        ]
    };
    let header = &["BACKUP", "OF", "TAKEN AT", "CONSISTENCY", ">SIZE", "CHAIN", ">COPIES", "NODES", "REHEARSED"];
    Rows::new(header, images.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_reads_well_as_a_row() {
        let image = Image {
            name: "backup-vm-3-12".into(),
            backup_of: "vm-3".into(),
            consistency: "frozen".into(),
            size_bytes: 1 << 30,
            wanted_replicas: 2,
            replicas: vec!["h1".into()],
            ..Image::default()
        };
        let text = table(&[image]).render(None);
        assert!(text.contains("backup-vm-3-12") && text.contains("vm-3") && text.contains("1/2"), "{text}");
        assert!(text.contains("never") && text.contains("full"), "{text}");
    }

    #[test]
    fn an_increment_tells_what_it_stands_on_and_what_all_of_it_takes() {
        let parent = "backup-vm-3-12".into();
        let image = Image { parent, chain_length: 3, chain_bytes: 1 << 30, size_bytes: 1 << 20, ..Image::default() };
        assert_eq!(chain(&image), format!("3 on backup-vm-3-12, {}", size_text(1 << 30)));
        assert_eq!(chain(&Image { chain_length: 1, chain_bytes: 1 << 30, ..Image::default() }), "full");
    }

    #[test]
    fn a_verdict_is_told_and_an_older_one_is_not_taken_for_it() {
        let told = |verdict: &str, at_millis| {
            let reason = "its guest agent answered".into();
            Some(Rehearsed { verdict: verdict.into(), at_millis, took_millis: 12_000, reason })
        };
        let image = |rehearsed| Image { name: "backup-vm-3-12".into(), rehearsed, ..Image::default() };
        let begun = image(told("ok", 1000));
        assert_eq!(verdict(&begun, image(told("ok", 2000))), Ok(image(told("ok", 2000))));
        let code = |rehearsed| verdict(&begun, image(rehearsed)).unwrap_err().code;
        assert_eq!(code(told("failed", 2000)), "failed");
        assert_eq!(code(told("unknown", 2000)), "inconclusive");
        assert_eq!(code(told("ok", 1000)), "inconclusive", "somebody ended it");
        let text = rehearsal(&begun);
        assert!(
            text.starts_with("ok at 1970-01-01") && text.ends_with(" after 12s: its guest agent answered"),
            "{text}"
        );
        let under_way = |node: &str| Some(api::proto::Rehearsal { node: node.into(), ..Default::default() });
        assert_eq!(rehearsal(&Image { rehearsal: under_way("h2"), ..begun.clone() }), "under way on h2");
        assert_eq!(rehearsal(&Image { rehearsal: under_way(""), ..begun.clone() }), "waits for a node");
    }
}
