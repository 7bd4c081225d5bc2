//! `trefoil node drain` and `trefoil node rebalance`: machines go from one node to others.

use std::{io::IsTerminal, time::Duration};

use api::{
    error::ApiError,
    proto::{DrainStatus, Left, MigrateVmRequest, Suggestion},
};
use tokio::time::{Instant, sleep};

use crate::{
    context::{Context, change, read},
    output::{self, Rows, printable},
    quantity::duration_text,
    wait::WaitArgs,
};

/// A machine takes seconds at least; nobody sees a difference to more often.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// What `rebalance` asks for at once: each is a copy of a disk over the network that machines use too.
const MOST_AT_ONCE: usize = 4;

pub async fn drain(node: String, wait: &WaitArgs, context: &Context) -> Result<(), ApiError> {
    let mut status = change!(context, drain_node, context.named(node.clone()))?;
    if wait.wanted(context) {
        status = until_empty(node, wait, context).await?;
    }
    context.print(&status, || picture(&status))
}

/// Shows how far it is. It goes on without anybody waiting: this may be broken off, and begun again.
async fn until_empty(node: String, wait: &WaitArgs, context: &Context) -> Result<DrainStatus, ApiError> {
    let give_up = Instant::now() + wait.limit();
    let mut shown = String::new();
    loop {
        let status = read!(context, get_drain, context.named(node.clone()))?;
        let line = summary(&status);
        if line != shown && std::io::stderr().is_terminal() {
            eprintln!("{}", printable(&line));
        }
        shown = line;
        if status.left.iter().all(|left| left.goes == "never") {
            let stuck = || ApiError::new("failed", picture(&status));
            return if status.left.is_empty() { Ok(status) } else { Err(stuck()) };
        }
        if Instant::now() >= give_up {
            let limit = u64::try_from(wait.limit().as_millis()).unwrap_or(u64::MAX);
            let text = format!("after {} it goes on without you: {}", duration_text(limit), picture(&status));
            return Err(ApiError::timeout(text));
        }
        sleep(LOOK_EVERY).await;
    }
}

fn summary(status: &DrainStatus) -> String {
    let node = status.node.clone().unwrap_or_default();
    let count = |goes: &str| status.left.iter().filter(|left| left.goes == goes).count();
    let on_the_way = status.left.iter().filter_map(|left| {
        let progress = left.progress.as_ref()?;
        (left.goes == "now").then(|| format!(", {} {}%", left.name, progress.percent))
    });
    let (now, later, never) = (count("now"), count("later"), count("never"));
    let parts: String = on_the_way.collect();
    format!("{}: {now} on their way, {later} to go, {never} cannot{parts}", node.name)
}

fn picture(status: &DrainStatus) -> String {
    let node = status.node.clone().unwrap_or_default();
    if status.left.is_empty() {
        return format!("{} is empty, and gets nothing new before 'trefoil node uncordon {}'", node.name, node.name);
    }
    let row = |left: &Left| {
        let percent = left.progress.as_ref().map(|progress| format!(" {}%", progress.percent)).unwrap_or_default();
        let goes = format!("{}{percent}", left.goes);
        vec![left.id.clone(), left.name.clone(), left.status.clone(), goes, left.why.clone()]
    };
    let rows = Rows::new(&["ID", "NAME", "STATUS", "GOES", "WHY"], status.left.iter().map(row));
    format!("{}\n{}", summary(status), rows.render(None))
}

pub async fn rebalance(dry_run: bool, context: &Context) -> Result<(), ApiError> {
    let reply = read!(context, suggest_moves, context.page(String::new()))?;
    output::label(context.format, reply.read_at.as_ref());
    if !dry_run {
        for suggestion in reply.moves.iter().take(MOST_AT_ONCE) {
            let (tenant, vm, to) = (suggestion.tenant.clone(), suggestion.id.clone(), suggestion.to.clone());
            change!(context, migrate_vm, MigrateVmRequest { tenant, vm, to, ..MigrateVmRequest::default() })?;
        }
    }
    context.print(&reply, || suggestions(&reply.moves, dry_run))
}

fn suggestions(moves: &[Suggestion], dry_run: bool) -> String {
    if moves.is_empty() {
        return "no move would even out anything worth its copying".into();
    }
    let row = |(number, suggestion): (usize, &Suggestion)| {
        let gain = format!("{}.{}%", suggestion.gain_permille / 10, suggestion.gain_permille % 10);
        let asked = if !dry_run && number < MOST_AT_ONCE { "asked for" } else { "" };
        let Suggestion { id, name, from, to, .. } = suggestion.clone();
        vec![id, name, from, to, gain, asked.into()]
    };
    let header = &["ID", "NAME", "FROM", "TO", ">RELIEF", "NOW"];
    Rows::new(header, moves.iter().enumerate().map(row)).render(None)
}

#[cfg(test)]
mod tests {
    use api::proto::{Node, Progress};

    use super::*;

    #[test]
    fn what_is_left_is_told_with_its_reason() {
        let node = Some(Node { name: "rack1".into(), ..Node::default() });
        let left = |name: &str, goes: &str, why: &str| Left {
            id: "vm-1".into(),
            name: name.into(),
            status: "running".into(),
            goes: goes.into(),
            why: why.into(),
            ..Left::default()
        };
        let moving = Left { progress: Some(Progress { step: "move".into(), percent: 40 }), ..left("web", "now", "") };
        let status = DrainStatus {
            node: node.clone(),
            left: vec![moving, left("db", "never", "it has failed: no image")],
            read_at: None,
        };
        assert_eq!(summary(&status), "rack1: 1 on their way, 0 to go, 1 cannot, web 40%");
        assert!(picture(&status).contains("it has failed: no image"));
        let empty = DrainStatus { node, left: vec![], read_at: None };
        assert_eq!(picture(&empty), "rack1 is empty, and gets nothing new before 'trefoil node uncordon rack1'");
    }

    #[test]
    fn a_suggestion_says_what_it_is_worth() {
        let suggestion = Suggestion {
            id: "vm-1".into(),
            name: "web".into(),
            from: "rack1".into(),
            to: "rack2".into(),
            gain_permille: 125,
            ..Suggestion::default()
        };
        assert!(suggestions(std::slice::from_ref(&suggestion), true).contains("12.5%"));
        assert!(suggestions(&[suggestion], false).contains("asked for"));
        assert!(suggestions(&[], true).starts_with("no move"));
    }
}
