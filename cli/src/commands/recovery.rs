//! `trefoil recovery`: what is lost, what waits for a node or another try, and the brake.

use api::{
    error::ApiError,
    proto::{ArmRecoveryRequest, EndRefoundingRequest, RecoveryRequest, RecoveryStatus, Refounding, Waiting},
};
use clap::Subcommand;

use crate::{
    context::{Context, change, read},
    moment::moment_text,
    output::{self, Rows},
    quantity::duration_text,
};

#[derive(Debug, Subcommand)]
pub enum RecoveryCommand {
    /// Shows lost nodes and whether their machines are re-created elsewhere
    #[command(after_help = "Example:\n  trefoil recovery status")]
    Status,
    /// Lists the machines that wait for a node or for another try
    #[command(after_help = "Example:\n  trefoil recovery list --output json")]
    List,
    /// Leaves the machines of lost nodes where they are
    #[command(after_help = "Example:\n  trefoil recovery disarm")]
    Disarm,
    /// Ends a refounding: stops waiting for nodes that have not reported, and quarantines guests that the quorum does not
    /// know
    #[command(after_help = "Example:\n  trefoil recovery settle")]
    Settle,
    /// Allows machines of lost nodes to be re-created elsewhere; also releases a frozen brake
    #[command(after_help = "Example:\n  trefoil recovery arm")]
    Arm,
}

pub async fn run(command: RecoveryCommand, context: &Context) -> Result<(), ApiError> {
    let status = match command {
        RecoveryCommand::Status | RecoveryCommand::List => {
            read!(context, get_recovery, RecoveryRequest { stale: context.stale })?
        }
        RecoveryCommand::Disarm => change!(context, arm_recovery, ArmRecoveryRequest { armed: false })?,
        RecoveryCommand::Settle => change!(context, end_refounding, EndRefoundingRequest {})?,
        RecoveryCommand::Arm => change!(context, arm_recovery, ArmRecoveryRequest { armed: true })?,
    };
    output::label(context.format, status.read_at.as_ref());
    match command {
        RecoveryCommand::List => context.print(&status.waiting, || table(&status.waiting).render(None)),
        _ => context.print(&status, || describe(&status)),
    }
}

fn describe(status: &RecoveryStatus) -> String {
    let brake = match status.brake.as_str() {
        "frozen" => format!(
            "frozen since {}: {} nodes were lost at once ('trefoil recovery arm' releases it)",
            moment_text(status.frozen_at_millis),
            status.frozen_lost
        ),
        other => other.to_owned(),
    };
    let lost = status.lost.iter().map(|node| {
        let maintenance = if node.maintenance { ", in maintenance" } else { "" };
        format!(
            "\nlost       {} since {}, {} machines on it{maintenance}",
            node.name,
            moment_text(node.since_millis),
            node.vms
        )
    });
    let lost: String = lost.collect();
    let suspects = status.suspects.iter().map(|node| {
        let heard = match node.last_beat_age_millis {
            u64::MAX => "never heard".into(),
            age => format!("heard {} ago", duration_text(age)),
        };
        let verdict = if node.verdict.is_empty() { String::new() } else { format!("; {}", node.verdict) };
        format!("\nunheard    {} ({}), {heard}{verdict}", node.name, node.state)
    });
    let suspects: String = suspects.collect();
    let drifting =
        status.drifting.iter().map(|name| format!("\nclock      of {name} drifts: no exclusive machines go there"));
    let drifting: String = drifting.collect();
    let refounding: String = status.refounding.iter().map(open).collect();
    format!("recovery   {brake}{refounding}{lost}{suspects}{drifting}\nwaiting    {} machines", status.waiting.len())
}

/// What is still to be found out after a refounding.
fn open(refounding: &Refounding) -> String {
    let awaited = match refounding.awaited.len() {
        0 => String::new(),
        _ => format!(
            "\nawaited    {}: nothing of before is placed until they say what they hold",
            refounding.awaited.join(", ")
        ),
    };
    let orphan = |orphan: &api::proto::Orphan| {
        format!("\nunknown    {} on {}, {}, by placement {}", orphan.vm, orphan.node, orphan.phase, orphan.epoch)
    };
    let orphans: String = refounding.orphans.iter().map(orphan).collect();
    format!(
        "\nrefounded  {}, and open until 'trefoil recovery settle'{awaited}{orphans}",
        moment_text(refounding.at_millis)
    )
}

fn table(waiting: &[Waiting]) -> Rows {
    let row = |vm: &Waiting| {
        let next = if vm.next_try_millis == 0 { "when there is room".into() } else { moment_text(vm.next_try_millis) };
        vec![
            vm.id.clone(),
            vm.tenant.clone(),
            vm.name.clone(),
            vm.status.clone(),
            vm.priority.to_string(),
            vm.attempts.to_string(),
            next,
            vm.reason.clone(),
        ]
    };
    let header = &["ID", "TENANT", "NAME", "STATUS", ">PRIORITY", ">ATTEMPTS", "NEXT TRY", "REASON"];
    Rows::new(header, waiting.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_after_a_refounding_is_told() {
        let orphan = api::proto::Orphan { vm: "vm-9".into(), node: "beta".into(), phase: "running".into(), epoch: 7 };
        let refounding = Refounding { at_millis: 0, awaited: vec!["alpha".into()], orphans: vec![orphan] };
        let status = RecoveryStatus { refounding: Some(refounding), ..RecoveryStatus::default() };
        let text = describe(&status);
        assert!(text.contains("awaited    alpha:") && text.contains("recovery settle"), "{text}");
        assert!(text.contains("unknown    vm-9 on beta, running, by placement 7"), "{text}");
    }

    #[test]
    fn a_frozen_brake_says_why_and_what_to_do() {
        let lost = api::proto::LostNode { name: "rack1".into(), vms: 3, ..Default::default() };
        let status = RecoveryStatus {
            brake: "frozen".into(),
            frozen_lost: 3,
            lost: vec![lost],
            waiting: vec![Waiting::default()],
            suspects: vec![api::proto::SuspectNode {
                name: "rack2".into(),
                state: "silent".into(),
                last_beat_age_millis: 3000,
                verdict: "answers nobody: not controller-1".into(),
            }],
            drifting: vec!["rack3".into()],
            ..RecoveryStatus::default()
        };
        let text = describe(&status);
        assert!(text.contains("rack2 (silent), heard 3s ago; answers nobody"), "{text}");
        assert!(text.contains("clock      of rack3 drifts"), "{text}");
        assert!(text.contains("3 nodes were lost at once") && text.contains("recovery arm"), "{text}");
        assert!(text.contains("rack1") && text.contains("3 machines on it") && text.contains("1 machines"), "{text}");
    }
}
