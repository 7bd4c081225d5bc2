//! `trefoil quorum`: the controllers as one: who is in it, who leads, and whether they agree.

use std::{path::PathBuf, time::Duration};

use api::{
    error::ApiError,
    proto::{
        ControllerRef, ControllerStatus, IssueJoinTokenRequest, QuorumCheckReply, QuorumCheckRequest,
        QuorumStatusReply, QuorumStatusRequest, UpgradeQuorumRequest,
    },
};
use clap::{Subcommand, ValueEnum};
use serde_json::json;

use crate::{
    context::{Context, change, read},
    output::{Format, Rows, details},
    quantity::duration,
};

mod backup;
#[cfg(feature = "controller")]
mod recover;

#[derive(Debug, Subcommand)]
pub enum QuorumCommand {
    /// Shows the controllers, the leader, and whether their states are equal
    #[command(after_help = "Example:\n  trefoil quorum status")]
    Status,
    /// Looks at the whole state: is everything as it must always be? (operators)
    #[command(after_help = "Example:\n  trefoil quorum check")]
    Check,
    /// Writes the cloud's whole state, with the key of its authority, into a file that is verified (operators)
    #[command(
        after_help = "Example:\n  trefoil quorum backup cloud-2026-11-22.quorum\n  trefoil quorum backup --verify cloud-2026-11-22.quorum"
    )]
    Backup {
        /// Where to; must not exist
        file: PathBuf,
        /// Reads such a file and checks all of it, without any controller
        #[arg(long)]
        verify: bool,
    },
    /// Makes a stopped controller the whole quorum, when a majority is lost for ever; runs on its machine
    #[cfg(feature = "controller")]
    #[command(after_help = "Example:\n  trefoil quorum recover --from /var/lib/trefoil/controller --i-have-fenced 2,3")]
    Recover {
        /// Directory of the controller that is left; it must not run
        #[arg(long, value_name = "DIRECTORY")]
        from: PathBuf,
        /// All other controllers: none of them runs, and none can ever run again with its present directory
        #[arg(long, value_name = "IDS", value_parser = controller, value_delimiter = ',')]
        i_have_fenced: Option<Vec<u64>>,
    },
    /// Lets the quorum use what every controller's version knows (operators)
    #[command(after_help = "Example:\n  trefoil quorum upgrade")]
    Upgrade,
    /// Prints a one-time token that a controller or an agent joins with (operators)
    #[command(after_help = "Example:\n  trefoil quorum token --role agent --valid 1h")]
    Token {
        /// What may join with it
        #[arg(long, value_enum)]
        role: JoinRole,
        /// How long it can be used
        #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1h")]
        valid: Duration,
    },
    /// Lets a controller that has joined vote (operators)
    #[command(after_help = "Example:\n  trefoil quorum add controller-3")]
    Add {
        /// Id, controller-3 or 3
        #[arg(value_parser = controller)]
        controller: u64,
    },
    /// Removes a controller for good (operators)
    #[command(after_help = "Example:\n  trefoil quorum remove controller-3")]
    Remove {
        /// Id, controller-3 or 3
        #[arg(value_parser = controller)]
        controller: u64,
    },
    /// Hands leadership to a controller (operators)
    #[command(after_help = "Example:\n  trefoil quorum transfer controller-2")]
    Transfer {
        /// Id, controller-2 or 2
        #[arg(value_parser = controller)]
        controller: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum JoinRole {
    Controller,
    Agent,
}

/// `context` is made only when a controller is to be asked.
pub async fn run(
    command: QuorumCommand,
    context: impl FnOnce() -> Result<Context, ApiError>,
    format: Format,
) -> Result<(), ApiError> {
    match command {
        QuorumCommand::Backup { file, verify: true } => backup::verify(&file, format),
        #[cfg(feature = "controller")]
        QuorumCommand::Recover { from, i_have_fenced } => {
            recover::recover(from, i_have_fenced, format).await.map_err(super::local)
        }
        other => ask(other, &context()?).await,
    }
}

async fn ask(command: QuorumCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        QuorumCommand::Backup { file, .. } => backup::back_up(&file, context).await,
        #[cfg(feature = "controller")]
        QuorumCommand::Recover { .. } => Err(ApiError::internal("a recovery asks no controller")),
        QuorumCommand::Upgrade => {
            let reply = change!(context, upgrade_quorum, UpgradeQuorumRequest {})?;
            context.print(&reply, || match reply.from == reply.to {
                true => format!("the cloud is at level {}, the highest that every controller knows", reply.to),
                false => format!("the cloud rose from level {} to {}", reply.from, reply.to),
            })
        }
        QuorumCommand::Status => {
            let status = read!(context, quorum_status, QuorumStatusRequest {})?;
            context.print(&status, || describe(&status))
        }
        QuorumCommand::Check => {
            let checked = read!(context, quorum_check, QuorumCheckRequest {})?;
            context.print(&checked, || judge(&checked))?;
            match checked.broken.len() {
                0 => Ok(()),
                broken => Err(ApiError::new("failed", format!("{broken} of {} rules are broken", checked.rules))),
            }
        }
        QuorumCommand::Token { role, valid } => {
            let role = match role {
                JoinRole::Controller => "controller",
                JoinRole::Agent => "agent",
            };
            let valid_millis = u64::try_from(valid.as_millis()).unwrap_or(u64::MAX);
            let issued = change!(context, issue_join_token, IssueJoinTokenRequest { role: role.into(), valid_millis })?;
            // The token alone, so that it can be piped to the machine that joins.
            context.print(&issued, || issued.token.clone())
        }
        QuorumCommand::Add { controller } => {
            change!(context, add_voter, ControllerRef { id: controller })?;
            done("added", controller, context)
        }
        QuorumCommand::Remove { controller } => {
            change!(context, remove_controller, ControllerRef { id: controller })?;
            done("removed", controller, context)
        }
        QuorumCommand::Transfer { controller } => {
            change!(context, transfer_leader, ControllerRef { id: controller })?;
            done("leader", controller, context)
        }
    }
}

fn done(what: &str, controller: u64, context: &Context) -> Result<(), ApiError> {
    context.print(&json!({ what: controller }), || format!("{what} controller-{controller}"))
}

/// `OK`, or a line for each rule that is broken.
fn judge(checked: &QuorumCheckReply) -> String {
    if checked.broken.is_empty() {
        let index = checked.read_at.as_ref().map_or(0, |read_at| read_at.index);
        return format!("OK: all {} rules hold at index {index}", checked.rules);
    }
    let lines: Vec<String> =
        checked.broken.iter().map(|broken| format!("BROKEN: {}: {}", broken.rule, broken.sentence)).collect();
    lines.join("\n")
}

fn describe(status: &QuorumStatusReply) -> String {
    let leader = if status.leader == 0 { "none".into() } else { format!("controller-{}", status.leader) };
    let head = details(
        &[
            ("cloud", status.cluster.clone()),
            ("level", format!("{}, cluster epoch {}", status.level, status.epoch)),
            ("leader", format!("{leader}, term {}", status.term)),
            ("answered by", format!("controller-{}", status.answered_by)),
            (
                "log",
                format!(
                    "last {}, committed {}, applied {}",
                    status.last_index, status.committed_index, status.applied_index
                ),
            ),
            ("snapshot", status.snapshot_index.to_string()),
            ("states", if status.hashes_agree { "agree".into() } else { "DIFFER".into() }),
        ],
        None,
    );
    let row = |controller: &ControllerStatus| {
        let hash: String = controller.hash.chars().take(12).collect();
        vec![
            format!("controller-{}", controller.id),
            controller.name.clone(),
            controller.address.clone(),
            controller.role.clone(),
            controller.matched_index.to_string(),
            controller.applied_index.to_string(),
            format!("{hash}@{}", controller.hash_index),
            controller.version.clone(),
            controller.level.to_string(),
        ]
    };
    let header = &["ID", "NAME", "ADDRESS", "ROLE", ">MATCHED", ">APPLIED", "STATE HASH", "VERSION", ">LEVEL"];
    format!("{head}\n\n{}", Rows::new(header, status.controllers.iter().map(row)).render(None))
}

fn controller(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("controller-").unwrap_or(text);
    let number = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten();
    number.ok_or_else(|| format!("'{text}' is not a controller's id: write controller-3 or 3"))
}

#[cfg(test)]
mod tests {
    use api::proto::BrokenRule;

    use super::*;

    #[test]
    fn a_controller_is_named_by_its_id() {
        assert_eq!((controller("controller-3"), controller("3")), (Ok(3), Ok(3)));
        for bad in ["", "controller-", "node-3", "+3", "99999999999999999999"] {
            assert!(controller(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_broken_rule_is_named() {
        let sound = QuorumCheckReply { rules: 9, ..QuorumCheckReply::default() };
        assert_eq!(judge(&sound), "OK: all 9 rules hold at index 0");
        let broken = |rule: &str| BrokenRule { rule: rule.into(), sentence: "vm-1 is odd".into() };
        let broken = QuorumCheckReply { broken: vec![broken("one"), broken("two")], ..sound };
        assert_eq!(judge(&broken), "BROKEN: one: vm-1 is odd\nBROKEN: two: vm-1 is odd");
    }

    #[test]
    fn a_difference_between_states_cannot_be_overlooked() {
        let one =
            ControllerStatus { id: 1, role: "leader".into(), hash: "ab".repeat(32), ..ControllerStatus::default() };
        let status = QuorumStatusReply { leader: 1, term: 4, controllers: vec![one], ..QuorumStatusReply::default() };
        let text = describe(&status);
        assert!(text.contains("states       DIFFER") && text.contains("leader       controller-1, term 4"), "{text}");
        assert!(text.contains("abababababab@0") && text.contains("level        0, cluster epoch 0"), "{text}");
    }
}
