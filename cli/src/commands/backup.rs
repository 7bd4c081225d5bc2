//! `trefoil backup`: copies of machines' disks, and machines that are made from them. A backup is an image like any
//! other, so `trefoil image` shows, exports and deletes it as well.

use std::time::Duration;

use api::{
    error::ApiError,
    proto::{CreateVmRequest, GetVmRequest, Image, SetVmBackupRequest, VmRef},
};
use clap::Subcommand;

use super::vm::follow;
use crate::{
    context::{Context, all_pages, change, read},
    moment::moment_text,
    output::{self, Rows},
    quantity::{duration, size_text},
    wait::{Goal, WaitArgs, until},
};

#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Copies a machine's disk into an image while it runs
    #[command(after_help = "Example:\n  trefoil backup create web")]
    Create {
        /// Name or id of the machine
        vm: String,
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
    /// Says how often a machine is backed up and how many backups are kept
    #[command(
        after_help = "Example:\n  trefoil backup schedule web --every 24h --keep 7\n  trefoil backup schedule web --off"
    )]
    Schedule {
        /// Name or id of the machine
        vm: String,
        /// How often, such as 6h
        #[arg(long, value_name = "TIME", value_parser = duration, required_unless_present = "off", conflicts_with = "off")]
        every: Option<Duration>,
        /// The newest so many are kept once they are on another node; 0 keeps all
        #[arg(long, default_value_t = 0)]
        keep: u32,
        /// On demand only
        #[arg(long)]
        off: bool,
    },
}

pub async fn run(command: BackupCommand, context: &Context) -> Result<(), ApiError> {
    let tenant = context.tenant.clone();
    match command {
        BackupCommand::Create { vm, wait } => {
            let vm = change!(context, back_up_vm, VmRef { tenant, vm })?;
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
        BackupCommand::Schedule { vm, every, keep, off: _ } => {
            let every_millis = every.map_or(0, |every| u64::try_from(every.as_millis()).unwrap_or(u64::MAX));
            let vm = change!(context, set_vm_backup, SetVmBackupRequest { tenant, vm, every_millis, keep })?;
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

fn table(images: &[Image]) -> Rows {
    let row = |image: &Image| {
        vec![
            image.name.clone(),
            image.backup_of.clone(),
            moment_text(image.taken_at_millis),
            image.consistency.clone(),
            size_text(image.size_bytes),
            format!("{}/{}", image.replicas.len(), image.wanted_replicas),
            image.replicas.join(" "),
        ]
    };
    Rows::new(&["BACKUP", "OF", "TAKEN AT", "CONSISTENCY", ">SIZE", ">COPIES", "NODES"], images.iter().map(row))
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
    }
}
