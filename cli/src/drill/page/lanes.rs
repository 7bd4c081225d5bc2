//! The lanes of the picture: a row each for the leader, each host, and each machine on each host. Pure.

use super::super::timeline::{Micros, Run, Timeline};

pub struct Lane {
    pub group: &'static str,
    pub label: String,
    pub spans: Vec<Span>,
}

pub struct Span {
    pub from: Micros,
    pub to: Micros,
    /// Of the style sheet.
    pub class: String,
    /// What is written in it, when there is room.
    pub text: String,
}

/// Beyond this the picture is a carpet; what did not move is left out first.
const MOST_MACHINES: usize = 40;
/// Colours of the style sheet for leaders, by turns.
const COLOURS: u64 = 5;

/// In the order in which they are drawn, and how many machines were left out.
pub fn all(seen: &Timeline) -> (Vec<Lane>, usize) {
    let mut lanes = vec![leaders(seen)];
    lanes.extend(nodes(seen));
    let mut machines = machines(seen);
    let left_out = machines.len().saturating_sub(MOST_MACHINES);
    if left_out > 0 {
        // The most eventful ones stay, in their order.
        let mut eventful: Vec<usize> = machines.iter().map(|lane| lane.spans.len()).collect();
        eventful.sort_unstable_by(|a, b| b.cmp(a));
        let least = eventful[MOST_MACHINES - 1];
        machines.retain(|lane| lane.spans.len() >= least);
        machines.truncate(MOST_MACHINES);
    }
    lanes.extend(machines);
    (lanes, left_out)
}

fn leaders(seen: &Timeline) -> Lane {
    let end = |index: usize| seen.leaders.get(index + 1).map_or(seen.ended, |next| next.at_micros);
    let span = |(index, change): (usize, &super::super::timeline::LeaderChange)| {
        let (from, to) = (change.at_micros, end(index));
        match change.leader {
            0 => Span { from, to, class: "none".into(), text: "no leader".into() },
            id => Span {
                from,
                to,
                class: format!("leader{}", id % COLOURS),
                text: format!("controller-{id}, term {}", change.term),
            },
        }
    };
    Lane { group: "Quorum", label: "leader".into(), spans: seen.leaders.iter().enumerate().map(span).collect() }
}

fn nodes(seen: &Timeline) -> Vec<Lane> {
    let mut names: Vec<&str> = seen.nodes.iter().map(|change| change.node.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let lane = |name: &str| {
        let own: Vec<_> = seen.nodes.iter().filter(|change| change.node == name).collect();
        let end = |index: usize| own.get(index + 1).map_or(seen.ended, |next| next.at_micros);
        let span = |(index, change): (usize, &&super::super::timeline::NodeChange)| {
            let known = ["up", "silent", "lost"].into_iter().find(|state| *state == change.state).unwrap_or("other");
            Span { from: change.at_micros, to: end(index), class: known.into(), text: change.state.clone() }
        };
        Lane {
            group: "Hosts, as the quorum sees them",
            label: name.to_owned(),
            spans: own.iter().enumerate().map(span).collect(),
        }
    };
    names.into_iter().map(lane).collect()
}

fn machines(seen: &Timeline) -> Vec<Lane> {
    let stays = seen.stays();
    let number = |vm: &str| vm.rsplit('-').next().and_then(|digits| digits.parse::<u64>().ok());
    let mut homes: Vec<(&str, &str)> = stays.iter().map(|stay| (stay.vm.as_str(), stay.host.as_str())).collect();
    homes.sort_unstable_by_key(|(vm, host)| (number(vm), *vm, *host));
    homes.dedup();
    let lane = |(vm, host): (&str, &str)| {
        let own = stays.iter().filter(|stay| stay.vm == vm && stay.host == host);
        let span = |stay: &super::super::timeline::Stay| {
            let name = if stay.run == Run::Running { "running" } else { "paused" };
            Span { from: stay.from, to: stay.to, class: name.into(), text: name.into() }
        };
        let label = format!("{vm} on {host}");
        Lane { group: "Machines, as the hosts' processes show them", label, spans: own.map(span).collect() }
    };
    homes.into_iter().map(lane).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::super::report::tests::observed, *};

    #[test]
    fn a_machine_that_moved_has_a_lane_on_each_host() {
        let mut seen = observed().timeline;
        seen.leaders.push(super::super::super::timeline::LeaderChange { at_micros: 5, leader: 0, term: 3 });
        let (lanes, left_out) = all(&seen);
        let labels: Vec<&str> = lanes.iter().map(|lane| lane.label.as_str()).collect();
        assert_eq!((labels, left_out), (vec!["leader", "vm-1 on h1", "vm-1 on h2"], 0));
        let class = |lane: &Lane| lane.spans[0].class.clone();
        assert_eq!((class(&lanes[0]), class(&lanes[2])), ("none".into(), "running".into()));
        assert_eq!((lanes[1].spans[0].to, lanes[2].spans[0].from), (1_000_000, 2_000_000));
    }

    #[test]
    fn of_too_many_machines_those_that_moved_are_shown() {
        let mut seen = observed().timeline;
        let template = seen.homes[0].clone();
        seen.homes.extend(
            (2..100).map(|n| super::super::super::timeline::HomeChange { vm: format!("vm-{n}"), ..template.clone() }),
        );
        let mut back = template.clone();
        back.at_micros = 3_000_000;
        seen.homes.push(back);
        let (lanes, left_out) = all(&seen);
        assert!(lanes.iter().any(|lane| lane.label == "vm-1 on h1" && lane.spans.len() == 2));
        assert_eq!((lanes.len(), left_out), (41, 60));
    }
}
