//! Follows a machine until it is what was asked for, and shows how far it is.

use std::{io::IsTerminal, time::Duration};

use api::{
    error::{ApiError, ErrorKind},
    proto::{GetVmRequest, Vm},
};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, sleep};

use crate::{
    context::{Context, read},
    output::printable,
    quantity::{duration, duration_text},
};

/// Four looks a second: a person sees it as live, and the controllers do not notice it.
pub const LOOK_EVERY: Duration = Duration::from_millis(250);

#[derive(Clone, Debug, Args)]
pub struct WaitArgs {
    /// Wait until it is done, with live progress (the default on a terminal)
    #[arg(long, conflicts_with = "no_wait")]
    wait: bool,
    /// Return when it is accepted (the default in a pipe)
    #[arg(long)]
    no_wait: bool,
    /// How long to wait at most
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10m")]
    wait_timeout: Duration,
}

impl WaitArgs {
    /// From now on.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.wait_timeout
    }

    pub fn limit(&self) -> Duration {
        self.wait_timeout
    }

    pub fn wanted(&self, context: &Context) -> bool {
        self.wait || (!self.no_wait && context.is_watched())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// It has this status.
    Status(&'static str),
    /// It does not exist any more.
    Gone,
    /// Its backup of this number is made, or was given up.
    BackedUp(u32),
    /// It is where it will have this placement, and is as it was before.
    Moved(u64),
}

/// Returns the machine as it was last seen; `None` when it is gone.
///
/// # Errors
/// `failed` with its reason when it will not come true by itself, `timeout` when it did not in time, or what the
/// controllers say.
pub async fn until(context: &Context, vm: &Vm, goal: Goal, args: &WaitArgs) -> Result<Option<Vm>, ApiError> {
    let give_up = args.deadline();
    let bar = progress_bar();
    // By id: a new machine may take the name of a deleted one.
    let body = GetVmRequest { tenant: context.tenant.clone(), vm: vm.id.clone(), stale: false };
    loop {
        let found = match read!(context, get_vm, body.clone()) {
            Ok(found) => Some(found),
            Err(error) if error.kind == ErrorKind::NotFound && goal == Goal::Gone => None,
            Err(error) => return Err(error),
        };
        if let Some(outcome) = judge(found.as_ref(), goal) {
            bar.finish_and_clear();
            return outcome.map(|()| found);
        }
        if let Some(vm) = &found {
            show(&bar, vm);
            if Instant::now() >= give_up {
                bar.finish_and_clear();
                return Err(ApiError::timeout(format!(
                    "after {} {} is still {}{}",
                    duration_text(u64::try_from(args.wait_timeout.as_millis()).unwrap_or(u64::MAX)),
                    vm.id,
                    vm.status,
                    because(vm)
                )));
            }
        }
        sleep(LOOK_EVERY).await;
    }
}

/// `None` while there is something to wait for.
fn judge(vm: Option<&Vm>, goal: Goal) -> Option<Result<(), ApiError>> {
    let Some(vm) = vm else { return Some(Ok(())) };
    if matches!(goal, Goal::Status(wanted) if wanted == vm.status) {
        return Some(Ok(()));
    }
    if let (Goal::BackedUp(number), Some(backups)) = (goal, &vm.backups) {
        let failed = || ApiError::new("failed", format!("the backup of {} failed: {}", vm.name, backups.reason));
        let outcome = if backups.reason.is_empty() { Ok(()) } else { Err(failed()) };
        return (backups.answered >= number).then_some(outcome);
    }
    if let Goal::Moved(epoch) = goal {
        let moves =
            vm.migration.as_ref().is_some_and(|migration| migration.epoch == epoch && migration.stage == "moving");
        let here = vm.epoch == epoch && matches!(vm.status.as_str(), "running" | "suspended" | "stopped");
        let failed = || ApiError::new("failed", format!("{} '{}' was not moved: {}", vm.id, vm.name, vm.move_failure));
        if here || (!moves && vm.epoch < epoch) {
            return Some(if here { Ok(()) } else { Err(failed()) });
        }
    }
    // With a time to try again the cloud has not given up, so neither do we.
    let given_up = vm.status == "failed" && vm.retry_at_millis == 0;
    given_up.then(|| Err(ApiError::new("failed", format!("{} '{}' failed{}", vm.id, vm.name, because(vm)))))
}

fn because(vm: &Vm) -> String {
    if vm.reason.is_empty() { String::new() } else { format!(": {}", vm.reason) }
}

fn show(bar: &ProgressBar, vm: &Vm) {
    let progress = vm.progress.clone().unwrap_or_default();
    let step = if progress.step.is_empty() { &vm.reason } else { &progress.step };
    bar.set_position(u64::from(progress.percent.min(100)));
    bar.set_prefix(printable(&format!("{} {}", vm.name, vm.status)).into_owned());
    bar.set_message(printable(step).into_owned());
}

pub fn progress_bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(100);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} [{bar:20}] {percent:>3}% {elapsed} {wide_msg}")
    {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

#[cfg(test)]
mod tests {
    use api::proto::{Migration, VmBackups};

    use super::*;

    fn vm(status: &str, retry_at_millis: u64) -> Vm {
        let reason = "no room".to_owned();
        Vm { id: "vm-1".into(), name: "web".into(), status: status.into(), reason, retry_at_millis, ..Vm::default() }
    }

    #[test]
    fn waiting_ends_with_the_goal_or_when_the_cloud_has_given_up() {
        let running = Goal::Status("running");
        assert_eq!(judge(Some(&vm("running", 0)), running), Some(Ok(())));
        assert_eq!(judge(None, Goal::Gone), Some(Ok(())));
        for going_on in [vm("creating", 0), vm("pending", 5), vm("failed", 5)] {
            assert_eq!(judge(Some(&going_on), running), None, "{}", going_on.status);
        }
        let backups = |answered, reason: &str| {
            let backups = VmBackups { asked: 2, answered, reason: reason.into(), ..VmBackups::default() };
            Vm { backups: Some(backups), ..vm("running", 0) }
        };
        assert_eq!(judge(Some(&backups(1, "")), Goal::BackedUp(2)), None);
        assert_eq!(judge(Some(&backups(2, "")), Goal::BackedUp(2)), Some(Ok(())));
        assert!(judge(Some(&backups(2, "no space")), Goal::BackedUp(2)).unwrap().is_err());
        let moving = |stage: &str, epoch| {
            let migration = Migration { stage: stage.into(), epoch: 9, ..Migration::default() };
            Vm { epoch, migration: Some(migration), move_failure: "no route".into(), ..vm("running", 0) }
        };
        assert_eq!(judge(Some(&Vm { status: "migrating".into(), ..moving("moving", 7) }), Goal::Moved(9)), None);
        assert_eq!(judge(Some(&Vm { status: "resuming".into(), ..moving("handed-over", 9) }), Goal::Moved(9)), None);
        assert_eq!(judge(Some(&moving("handed-over", 9)), Goal::Moved(9)), Some(Ok(())));
        let off = Vm { status: "stopped".into(), ..moving("handed-over", 9) };
        assert_eq!(judge(Some(&off), Goal::Moved(9)), Some(Ok(())), "it stays stopped");
        let error = judge(Some(&moving("given-up", 7)), Goal::Moved(9)).unwrap().unwrap_err();
        assert_eq!(error.message, "vm-1 'web' was not moved: no route");
        let error = judge(Some(&vm("failed", 0)), running).unwrap().unwrap_err();
        assert_eq!((error.code.as_str(), error.message.as_str()), ("failed", "vm-1 'web' failed: no room"));
    }
}
