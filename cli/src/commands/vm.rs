//! `trefoil vm`: machines, from creation to deletion.

use std::{
    fs,
    io::IsTerminal,
    path::{Path, PathBuf},
    time::Duration,
};

use api::{
    error::ApiError,
    proto::{
        ConsoleLogRequest, CreateVmRequest, DeleteVmRequest, GetVmRequest, ListVmsRequest, MigrateVmRequest,
        SetVmPowerRequest, SetVmRecoveryRequest, Vm, VmRef,
    },
};
use clap::{Args, Subcommand};
use serde_json::json;

use super::backup::outcome;
use crate::{
    context::{Context, change, read},
    moment::moment_text,
    output::{self, Format, Rows, details, printable},
    quantity::{duration, duration_text, size_text},
    wait::{Goal, WaitArgs, until},
};

const POLICIES: &str = "\
What becomes of it when its node is lost:
- exclusive: never two copies; its host pauses it when the lease ends, then it is re-created elsewhere
- available: keeps running on a cut-off host, and is re-created elsewhere once that host is lost, so two may run for a time
- restart-in-place: waits for its host, and is started again
- none: waits for its host, and stays off when it went down with it";

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Creates and starts a machine
    #[command(
        after_help = "Example:\n  trefoil vm create web --image debian --template normal --network blue \\\n    --ssh-key ~/.ssh/id_ed25519.pub"
    )]
    Create(CreateArgs),
    /// Lists machines
    #[command(after_help = "Example:\n  trefoil vm list --status failed")]
    List {
        /// Only those on this node
        #[arg(long)]
        node: Option<String>,
        /// Only those with this status: pending, creating, running, suspended, stopped, failed, ...
        #[arg(long)]
        status: Option<String>,
    },
    /// Shows one machine
    #[command(after_help = "Example:\n  trefoil vm show web --output json")]
    Show(Target),
    /// Deletes a machine and its disk
    #[command(after_help = "Example:\n  trefoil vm delete web")]
    Delete {
        #[command(flatten)]
        target: Target,
        /// Gone for you at once, even when its node cannot be reached
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Freezes a machine; its memory is kept
    #[command(after_help = "Example:\n  trefoil vm suspend web")]
    Suspend(Change),
    /// Lets a suspended machine go on
    #[command(after_help = "Example:\n  trefoil vm resume web")]
    Resume(Change),
    /// Shuts a machine down, and switches it off when it does not
    #[command(after_help = "Example:\n  trefoil vm stop web --grace 2m")]
    Stop {
        #[command(flatten)]
        change: Change,
        /// How long it may take to shut down; 0 switches it off at once
        #[arg(long, value_name = "TIME", value_parser = duration, default_value = "30s")]
        grace: Duration,
    },
    /// Starts a stopped machine on its disk, or retries a failed one
    #[command(after_help = "Example:\n  trefoil vm start web")]
    Start(Change),
    /// Boots a machine again
    #[command(after_help = "Example:\n  trefoil vm reboot web")]
    Reboot(Change),
    /// Moves a machine to another node: while it runs, or its disk while it is stopped (for operators)
    #[command(after_help = "A machine stays as it is: one that runs goes on there, one that is stopped stays so.\n\n\
                            Example:\n  trefoil vm migrate web\n  trefoil vm migrate web --to node-2 --wait")]
    Migrate(MigrateArgs),
    /// Says what becomes of a machine when its node is lost
    #[command(after_help = "Example:\n  trefoil vm recovery web exclusive --priority 10")]
    Recovery {
        #[command(flatten)]
        target: Target,
        #[arg(help = POLICIES)]
        recovery: String,
        /// 0 to 255; when room is short, a higher one is placed first [default: what it was]
        #[arg(long)]
        priority: Option<u8>,
    },
    /// Prints the last of what a machine wrote to its serial console
    #[command(after_help = "Example:\n  trefoil vm console web --bytes 4096")]
    Console {
        #[command(flatten)]
        target: Target,
        /// How much at most
        #[arg(long, value_name = "SIZE", value_parser = crate::quantity::size, default_value = "64KiB")]
        bytes: u64,
    },
}

#[derive(Debug, Args)]
pub struct Target {
    /// Name or id
    vm: String,
}

#[derive(Debug, Args)]
pub struct Change {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Args)]
pub struct MigrateArgs {
    #[command(flatten)]
    target: Target,
    /// Name or id of the node; the idlest with room when it is left out
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
    /// Only while it runs: refused when it is stopped
    #[arg(long, conflicts_with_all = ["offline", "cancel"])]
    live: bool,
    /// Only while it is stopped: refused when it runs, for it is not stopped for that
    #[arg(long, conflicts_with = "cancel")]
    offline: bool,
    /// Let it stay where it is after all
    #[arg(long, conflicts_with = "to")]
    cancel: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name, and host name of the guest: letters, digits and dashes
    name: String,
    /// Image that its disk starts from
    #[arg(long)]
    image: String,
    /// Template that says how large it is
    #[arg(long)]
    template: String,
    /// Network that it is in
    #[arg(long)]
    network: String,
    /// Public SSH key for the guest, a file or the key itself; may be given several times
    #[arg(long = "ssh-key", value_name = "KEY")]
    ssh_keys: Vec<String>,
    /// File with cloud-init user data
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    #[arg(long, default_value = "available", help = POLICIES)]
    recovery: String,
    /// 0 to 255; when room is short, a higher one is placed first
    #[arg(long, default_value_t = 0)]
    priority: u8,
    #[command(flatten)]
    wait: WaitArgs,
}

pub async fn run(command: VmCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        VmCommand::Create(args) => create(args, context).await,
        VmCommand::List { node, status } => list(node, status, context).await,
        VmCommand::Show(target) => show(target.vm, context).await,
        VmCommand::Delete { target, force, wait } => delete(target.vm, force, &wait, context).await,
        VmCommand::Suspend(change) => power(change, "suspended", Duration::ZERO, context).await,
        VmCommand::Resume(change) | VmCommand::Start(change) => power(change, "running", Duration::ZERO, context).await,
        VmCommand::Stop { change, grace } => power(change, "stopped", grace, context).await,
        VmCommand::Reboot(change) => reboot(change, context).await,
        VmCommand::Migrate(args) => migrate(args, context).await,
        VmCommand::Recovery { target, recovery, priority } => {
            let (tenant, vm) = (context.tenant.clone(), target.vm);
            let priority = match priority {
                Some(priority) => priority.into(),
                None => get(vm.clone(), false, context).await?.priority,
            };
            let body = SetVmRecoveryRequest { tenant, vm, recovery, priority };
            let vm = change!(context, set_vm_recovery, body)?;
            context.print(&vm, || describe(&vm))
        }
        VmCommand::Console { target, bytes } => console(target.vm, bytes, context).await,
    }
}

async fn create(args: CreateArgs, context: &Context) -> Result<(), ApiError> {
    let user_data = match &args.user_data {
        Some(path) => read_text(path)?,
        None => String::new(),
    };
    let body = CreateVmRequest {
        tenant: context.tenant.clone(),
        name: args.name,
        image: args.image,
        template: args.template,
        network: args.network,
        ssh_keys: args.ssh_keys.iter().map(|key| ssh_key(key)).collect::<Result<_, _>>()?,
        user_data,
        recovery: args.recovery,
        priority: args.priority.into(),
    };
    let vm = change!(context, create_vm, body)?;
    follow(vm, Goal::Status("running"), &args.wait, context).await
}

async fn list(node: Option<String>, status: Option<String>, context: &Context) -> Result<(), ApiError> {
    let asked = ListVmsRequest {
        tenant: context.tenant.clone(),
        node: node.unwrap_or_default(),
        status: status.unwrap_or_default(),
        stale: context.stale,
        ..ListVmsRequest::default()
    };
    let reply = context.client.all_vms(asked).await?;
    output::label(context.format, reply.read_at.as_ref());
    context.print(&reply, || table(&reply.vms).render(None))
}

async fn get(vm: String, stale: bool, context: &Context) -> Result<Vm, ApiError> {
    read!(context, get_vm, GetVmRequest { tenant: context.tenant.clone(), vm, stale })
}

async fn show(vm: String, context: &Context) -> Result<(), ApiError> {
    let vm = get(vm, context.stale, context).await?;
    output::label(context.format, vm.read_at.as_ref());
    context.print(&vm, || describe(&vm))
}

async fn delete(name: String, force: bool, wait: &WaitArgs, context: &Context) -> Result<(), ApiError> {
    let tenant = context.tenant.clone();
    let waits = wait.wanted(context);
    // The id must be known before: afterwards the name may be gone, or another machine's.
    let vm = match waits {
        true => Some(get(name.clone(), false, context).await?),
        false => None,
    };
    let target = vm.as_ref().map_or_else(|| name.clone(), |vm| vm.id.clone());
    change!(context, delete_vm, DeleteVmRequest { tenant, vm: target, force })?;
    if let Some(vm) = &vm {
        until(context, vm, Goal::Gone, wait).await?;
    }
    let state = if waits { "deleted" } else { "deleting" };
    context.print(&json!({ state: name }), || format!("{state} {name}"))
}

async fn power(args: Change, wanted: &'static str, grace: Duration, context: &Context) -> Result<(), ApiError> {
    let body = SetVmPowerRequest {
        tenant: context.tenant.clone(),
        vm: args.target.vm,
        wanted: wanted.into(),
        grace_millis: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
    };
    let vm = change!(context, set_vm_power, body)?;
    follow(vm, Goal::Status(wanted), &args.wait, context).await
}

async fn reboot(args: Change, context: &Context) -> Result<(), ApiError> {
    let vm = change!(context, reboot_vm, VmRef { tenant: context.tenant.clone(), vm: args.target.vm })?;
    follow(vm, Goal::Status("running"), &args.wait, context).await
}

async fn migrate(args: MigrateArgs, context: &Context) -> Result<(), ApiError> {
    let (tenant, vm) = (context.tenant.clone(), args.target.vm);
    if args.cancel {
        let vm = change!(context, cancel_migration, VmRef { tenant, vm })?;
        return context.print(&vm, || sentence(&vm));
    }
    let manner = [(args.live, "live"), (args.offline, "offline")].into_iter().find(|(wanted, _)| *wanted);
    let (to, manner) = (args.to.unwrap_or_default(), manner.map_or("", |(_, manner)| manner).into());
    let vm = change!(context, migrate_vm, MigrateVmRequest { tenant, vm, to, manner })?;
    let epoch = vm.migration.as_ref().map_or(vm.epoch, |migration| migration.epoch);
    follow(vm, Goal::Moved(epoch), &args.wait, context).await
}

async fn console(vm: String, bytes: u64, context: &Context) -> Result<(), ApiError> {
    let max_bytes = u32::try_from(bytes).map_err(|_| ApiError::invalid("--bytes must be less than 4 GiB"))?;
    let body = ConsoleLogRequest { tenant: context.tenant.clone(), vm, max_bytes };
    let log = read!(context, console_log, body)?.log;
    let text = String::from_utf8_lossy(&log).replace("\r\n", "\n");
    match context.format {
        Format::Json => context.print(&json!({ "log": text }), String::new),
        // A guest must not drive the terminal of whoever looks at it.
        Format::Table if std::io::stdout().is_terminal() => output::write(printable(&text).as_bytes()),
        Format::Table => output::write(&log),
    }
}

/// Waits when that is wanted, and tells what the machine is then.
pub(super) async fn follow(vm: Vm, goal: Goal, wait: &WaitArgs, context: &Context) -> Result<(), ApiError> {
    let vm = if wait.wanted(context) { until(context, &vm, goal, wait).await?.unwrap_or(vm) } else { vm };
    context.print(&vm, || sentence(&vm))
}

fn sentence(vm: &Vm) -> String {
    let on = if vm.node.is_empty() { String::new() } else { format!(" on {}", vm.node) };
    let addresses: String = vm.nics.iter().map(|nic| format!(", {}", nic.ip)).collect();
    let why = if vm.reason.is_empty() { String::new() } else { format!(": {}", vm.reason) };
    printable(&format!("{} '{}' {}{on}{addresses}{why}", vm.id, vm.name, vm.status)).into_owned()
}

fn table(vms: &[Vm]) -> Rows {
    let row = |vm: &Vm| {
        let addresses: Vec<_> = vm.nics.iter().map(|nic| nic.ip.as_str()).collect();
        let progress = vm.progress.as_ref().map(|p| format!(" {}%", p.percent)).unwrap_or_default();
        vec![
            vm.id.clone(),
            vm.name.clone(),
            format!("{}{progress}", vm.status),
            vm.node.clone(),
            addresses.join(" "),
            vm.vcpus.to_string(),
            size_text(vm.memory_bytes),
            size_text(vm.disk_bytes),
            vm.reason.clone(),
        ]
    };
    Rows::new(&["ID", "NAME", "STATUS", "NODE", "ADDRESS", ">VCPUS", ">MEMORY", ">DISK", "REASON"], vms.iter().map(row))
}

fn describe(vm: &Vm) -> String {
    let nics: Vec<_> = vm.nics.iter().map(|nic| format!("{} {} {}", nic.network, nic.ip, nic.mac)).collect();
    let progress = vm.progress.as_ref().map(|p| format!("{} {}%", p.step, p.percent));
    let usage = vm.usage.as_ref().map(|usage| {
        format!(
            "cpu {}, memory {}, disk {}, received {}, sent {}",
            duration_text(usage.cpu_time_millis),
            size_text(usage.memory_used_bytes),
            size_text(usage.disk_used_bytes),
            size_text(usage.rx_bytes),
            size_text(usage.tx_bytes)
        )
    });
    let recovery = (!vm.recovery.is_empty()).then(|| format!("{}, priority {}", vm.recovery, vm.priority));
    let loss = vm.loss.as_ref().map(|loss| {
        let data = match loss.data_from_millis {
            0 => "re-created from its image, what it wrote is lost".into(),
            from => format!("re-created from the backup of {}, what it wrote since is lost", moment_text(from)),
        };
        format!("{}: {} was lost; {data}", moment_text(loss.at_millis), loss.node)
    });
    let retry = (vm.retry_at_millis > 0).then(|| moment_text(vm.retry_at_millis));
    details(
        &[
            ("id", vm.id.clone()),
            ("name", vm.name.clone()),
            ("tenant", vm.tenant.clone()),
            ("status", vm.status.clone()),
            ("reason", vm.reason.clone()),
            ("progress", progress.unwrap_or_default()),
            ("tried again at", retry.unwrap_or_default()),
            ("node", vm.node.clone()),
            ("move", way(vm)),
            ("last move", last_move(vm)),
            ("hypervisor", vm.hypervisor.clone()),
            ("image", vm.image.clone()),
            ("template", vm.template.clone()),
            ("data loss window", data_loss_window(vm)),
            ("backups", schedule(vm)),
            ("last rehearsed", rehearsed(vm)),
            ("recovery", recovery.unwrap_or_default()),
            ("last recovery", loss.unwrap_or_default()),
            ("vcpus", vm.vcpus.to_string()),
            ("memory", size_text(vm.memory_bytes)),
            ("disk", size_text(vm.disk_bytes)),
            ("networks", nics.join("\n")),
            ("usage", usage.unwrap_or_default()),
            ("created at", moment_text(vm.created_at_millis)),
            ("changed at", moment_text(vm.changed_at_millis)),
        ],
        None,
    )
}

/// Between which nodes it moves, and how far that is.
fn way(vm: &Vm) -> String {
    let Some(migration) = &vm.migration else { return String::new() };
    let said = match (migration.left, migration.arrived) {
        (true, false) => ", has left",
        (false, true) => ", has arrived",
        _ => "",
    };
    match migration.stage.as_str() {
        "moving" => format!("to {}{said}", migration.node),
        "given-up" => format!("{} clears away what came to it", migration.node),
        _ => format!("from {}, which clears away what was left", migration.node),
    }
}

fn last_move(vm: &Vm) -> String {
    match vm.move_failures {
        0 => String::new(),
        1 => format!("failed: {}", vm.move_failure),
        count => format!("failed, for the {count}. time in a row: {}", vm.move_failure),
    }
}

/// What would be lost if its node were lost now.
fn data_loss_window(vm: &Vm) -> String {
    match vm.backups.as_ref() {
        None => String::new(),
        Some(backups) if backups.safe_at_millis > 0 => {
            format!("since {}, by {}", moment_text(backups.safe_at_millis), backups.safe_image)
        }
        Some(_) => "everything: no backup of it is on another node".into(),
    }
}

/// A backup is verified when it is whole; whether a machine comes up from it is another question.
fn rehearsed(vm: &Vm) -> String {
    match vm.backups.as_ref().and_then(|backups| Some((backups, backups.rehearsed.as_ref()?))) {
        Some((backups, last)) => format!("{}, {}", backups.rehearsed_image, outcome(last)),
        None => String::new(),
    }
}

fn schedule(vm: &Vm) -> String {
    let Some(backups) = &vm.backups else { return String::new() };
    let every = match backups.every_millis {
        0 => "on demand".into(),
        every => format!("every {}, next {}", duration_text(every), moment_text(backups.due_at_millis)),
    };
    let keep = if backups.keep == 0 { String::new() } else { format!(", {} kept", backups.keep) };
    let full = if backups.full_every == 0 { String::new() } else { format!(", one of {} full", backups.full_every) };
    let now = if backups.asked == backups.answered { String::new() } else { ", one is under way".into() };
    let failed =
        if backups.reason.is_empty() { String::new() } else { format!(", the last failed: {}", backups.reason) };
    format!("{every}{keep}{full}{now}{failed}")
}

/// The key itself, or the file that it is in.
fn ssh_key(given: &str) -> Result<String, ApiError> {
    let is_key = ["ssh-", "ecdsa-", "sk-"].iter().any(|kind| given.starts_with(kind)) && given.contains(' ');
    if is_key { Ok(given.into()) } else { Ok(read_text(Path::new(given))?.trim().into()) }
}

fn read_text(path: &Path) -> Result<String, ApiError> {
    fs::read_to_string(path).map_err(|e| ApiError::invalid(format!("cannot read {}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::proto::{Nic, Progress};

    fn vm() -> Vm {
        Vm {
            id: "vm-17".into(),
            name: "web".into(),
            status: "creating".into(),
            node: "node-2".into(),
            vcpus: 1,
            memory_bytes: 512 << 20,
            disk_bytes: 3 << 29,
            nics: vec![Nic { network: "blue".into(), mac: "02:54:00:00:00:01".into(), ip: "10.0.0.2".into() }],
            progress: Some(Progress { step: "fetch image".into(), percent: 40 }),
            ..Vm::default()
        }
    }

    #[test]
    fn a_machine_reads_well_as_a_line_and_as_a_row() {
        assert_eq!(sentence(&vm()), "vm-17 'web' creating on node-2, 10.0.0.2");
        assert_eq!(
            table(&[vm()]).render(None),
            "ID     NAME  STATUS        NODE    ADDRESS   VCPUS   MEMORY     DISK  REASON\n\
             vm-17  web   creating 40%  node-2  10.0.0.2      1  512 MiB  1.5 GiB"
        );
        assert!(describe(&vm()).contains("progress    fetch image 40%"));
    }

    #[test]
    fn a_key_is_text_or_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("id.pub");
        fs::write(&file, "ssh-ed25519 AAAA me\n").unwrap();
        assert_eq!(ssh_key(file.to_str().unwrap()).unwrap(), "ssh-ed25519 AAAA me");
        assert_eq!(ssh_key("ssh-rsa AAAA").unwrap(), "ssh-rsa AAAA");
        assert!(ssh_key("/missing").unwrap_err().message.contains("/missing"));
    }
}
