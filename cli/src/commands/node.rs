//! `trefoil node`: hosts, what they have and what they do.

use api::{
    error::ApiError,
    proto::{CordonNodeRequest, ListNodesReply, MaintainNodeRequest, Node, Probe, RemoveNodeRequest},
};
use clap::Subcommand;
use serde_json::json;

use crate::{
    context::{Context, all_pages, change, read},
    moment::moment_text,
    output::{self, Rows, details},
    quantity::{duration_text, size_text},
    wait::WaitArgs,
};

mod moves;

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Lists nodes
    #[command(after_help = "Example:\n  trefoil node list")]
    List,
    /// Shows one node
    #[command(after_help = "Example:\n  trefoil node show node-2")]
    Show {
        /// Name or id
        node: String,
    },
    /// Gives a node no new machines; what it has stays
    #[command(after_help = "Example:\n  trefoil node cordon node-2")]
    Cordon {
        /// Name or id
        node: String,
    },
    /// Lets a node have new machines again
    #[command(after_help = "Example:\n  trefoil node uncordon node-2")]
    Uncordon {
        /// Name or id
        node: String,
    },
    /// Moves all machines of a node to others, running or stopped; it gets no new ones until it is uncordoned
    #[command(after_help = "Example:\n  trefoil node drain node-2 --wait")]
    Drain {
        /// Name or id
        node: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Moves a few machines so that the nodes are promised more evenly
    #[command(after_help = "Example:\n  trefoil node rebalance --dry-run")]
    Rebalance {
        /// Only say which moves these would be
        #[arg(long)]
        dry_run: bool,
    },
    /// Says that a node may be away: its machines wait for it, and it gets no new ones
    #[command(after_help = "Example:\n  trefoil node maintenance node-2\n  trefoil node maintenance node-2 --over")]
    Maintenance {
        /// Name or id
        node: String,
        /// It is over
        #[arg(long)]
        over: bool,
    },
    /// Forgets a node; refused while it has machines
    #[command(after_help = "Example:\n  trefoil node remove node-2")]
    Remove {
        /// Name or id
        node: String,
        /// It is gone for ever, and its machines with it
        #[arg(long)]
        force: bool,
    },
}

pub async fn run(command: NodeCommand, context: &Context) -> Result<(), ApiError> {
    match command {
        NodeCommand::List => list(context).await,
        NodeCommand::Show { node } => {
            let node = read!(context, get_node, context.named(node))?;
            context.print(&node, || describe(&node))
        }
        NodeCommand::Cordon { node } => cordon(node, true, context).await,
        NodeCommand::Uncordon { node } => cordon(node, false, context).await,
        NodeCommand::Drain { node, wait } => moves::drain(node, &wait, context).await,
        NodeCommand::Rebalance { dry_run } => moves::rebalance(dry_run, context).await,
        NodeCommand::Maintenance { node, over } => {
            let node = change!(context, maintain_node, MaintainNodeRequest { name: node, maintenance: !over })?;
            context.print(&node, || format!("{} '{}' {}", node.id, node.name, state(&node)))
        }
        NodeCommand::Remove { node, force } => {
            change!(context, remove_node, RemoveNodeRequest { name: node.clone(), force })?;
            context.print(&json!({ "removed": node }), || format!("removed {node}"))
        }
    }
}

async fn cordon(name: String, cordoned: bool, context: &Context) -> Result<(), ApiError> {
    let node = change!(context, cordon_node, CordonNodeRequest { name, cordoned })?;
    context.print(&node, || format!("{} '{}' {}", node.id, node.name, state(&node)))
}

async fn list(context: &Context) -> Result<(), ApiError> {
    let mut read_at = None;
    let nodes = all_pages(async |after| {
        let page = read!(context, list_nodes, context.page(after))?;
        read_at = page.read_at;
        Ok((page.nodes, page.next))
    })
    .await?;
    output::label(context.format, read_at.as_ref());
    let reply = ListNodesReply { nodes, next: String::new(), read_at };
    context.print(&reply, || table(&reply.nodes).render(None))
}

fn table(nodes: &[Node]) -> Rows {
    let row = |node: &Node| {
        vec![
            node.id.clone(),
            node.name.clone(),
            state(node),
            node.hypervisor.clone(),
            node.vms.to_string(),
            format!("{}/{}", node.reserved_vcpus, node.vcpus),
            format!("{}/{}", size_text(node.reserved_memory_bytes), size_text(node.memory_bytes)),
            format!("{}/{}", size_text(node.reserved_disk_bytes), size_text(node.disk_bytes)),
            percent(node.cpu_permille),
            heard(node),
        ]
    };
    let header = &["ID", "NAME", "STATE", "HYPERVISOR", ">VMS", ">VCPUS", ">MEMORY", ">DISK", ">CPU USED", ">HEARD"];
    Rows::new(header, nodes.iter().map(row))
}

fn describe(node: &Node) -> String {
    let of = |used: u64, all: u64| format!("{} promised of {}", size_text(used), size_text(all));
    let summary = (node.summary_to_millis > 0).then(|| {
        format!("cpu {} until {}", percent(node.summary_cpu_permille_mean), moment_text(node.summary_to_millis))
    });
    details(
        &[
            ("id", node.id.clone()),
            ("name", node.name.clone()),
            ("state", state(node)),
            ("hypervisor", node.hypervisor.clone()),
            ("address", node.address.clone()),
            ("underlay", node.underlay.clone()),
            ("machines", node.vms.to_string()),
            ("vcpus", format!("{} promised of {}", node.reserved_vcpus, node.vcpus)),
            ("memory", of(node.reserved_memory_bytes, node.memory_bytes)),
            ("disk", of(node.reserved_disk_bytes, node.disk_bytes)),
            ("cpu used", percent(node.cpu_permille)),
            ("memory used", size_text(node.memory_used_bytes)),
            ("disk used", size_text(node.disk_used_bytes)),
            ("heard", heard(node)),
            ("probed", probes(node)),
            ("clock", clock(node)),
            ("watchdog", watchdog(node)),
            ("last summary", summary.unwrap_or_default()),
            ("generation", node.generation.to_string()),
            ("incarnation", node.incarnation.to_string()),
        ],
        None,
    )
}

fn state(node: &Node) -> String {
    let cordoned = match (node.draining, node.cordoned) {
        (true, _) => ", draining",
        (false, true) => ", cordoned",
        (false, false) => "",
    };
    let maintenance = if node.maintenance { ", in maintenance" } else { "" };
    format!("{}{cordoned}{maintenance}", node.state)
}

fn heard(node: &Node) -> String {
    match node.last_beat_age_millis {
        u64::MAX => "never".into(),
        age => format!("{} ago", duration_text(age)),
    }
}

fn probes(node: &Node) -> String {
    let line = |probe: &Probe| {
        let found = if probe.reason.is_empty() { "reached it" } else { &probe.reason };
        format!("{}: {found}, {} ago", probe.from, duration_text(probe.age_millis))
    };
    node.probes.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn clock(node: &Node) -> String {
    let measured = match node.clock_span_millis {
        0 => "not measured yet".into(),
        span => {
            let (ppm, give_or_take) = (node.clock_ppm, node.clock_uncertainty_ppm);
            format!("{ppm:+} ppm beside the controller's, ± {give_or_take}, over {}", duration_text(span))
        }
    };
    match node.clock_drifts {
        true => format!("drifts beyond what a lease allows for: no exclusive machines go there ({measured})"),
        false => measured,
    }
}

fn watchdog(node: &Node) -> String {
    match (node.last_beat_age_millis, node.watchdog) {
        (u64::MAX, _) => String::new(),
        (_, true) => "fed by the guard".into(),
        (_, false) => "none: when agent, guard and kernel hang together, exclusive machines on it may go on".into(),
    }
}

fn percent(permille: u32) -> String {
    format!("{}.{}%", permille / 10, permille % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_lacks_is_told_with_what_it_costs() {
        let probe = |from: &str, reason: &str| Probe { from: from.into(), reason: reason.into(), age_millis: 1000 };
        let probes = vec![probe("controller-1", "no answer"), probe("rack2", "")];
        let node = Node { clock_drifts: true, clock_ppm: -9_000, clock_span_millis: 60_000, probes, ..Node::default() };
        let text = describe(&node);
        for part in
            ["controller-1: no answer, 1s ago", "rack2: reached it", "no exclusive machines", "-9000 ppm", "none: when"]
        {
            assert!(text.contains(part), "'{part}' is not in {text}");
        }
        let well = describe(&Node { watchdog: true, ..Node::default() });
        assert!(well.contains("fed by the guard") && well.contains("not measured yet"), "{well}");
    }

    #[test]
    fn a_node_reads_well_as_a_row() {
        let node = Node {
            id: "node-1".into(),
            name: "rack1".into(),
            state: "up".into(),
            cordoned: true,
            hypervisor: "simulated".into(),
            vms: 2,
            vcpus: 8,
            reserved_vcpus: 3,
            memory_bytes: 16 << 30,
            cpu_permille: 125,
            last_beat_age_millis: u64::MAX,
            ..Node::default()
        };
        let text = table(&[node]).render(None);
        let cells: Vec<_> = text.lines().nth(1).unwrap().split("  ").map(str::trim).filter(|c| !c.is_empty()).collect();
        assert_eq!(
            cells,
            ["node-1", "rack1", "up, cordoned", "simulated", "2", "3/8", "0 B/16 GiB", "0 B/0 B", "12.5%", "never"]
        );
    }
}
