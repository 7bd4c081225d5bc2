//! The controller's end of a session with an agent, as `controller/src/session.rs` keeps it.

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv4Addr},
};

use model::{
    Actor, Assignment, Command, Entry, HypervisorKind, Known, NodeCommand, NodeId, NodeState, Rejection, Reply,
};

use crate::{
    controller::{Controller, Flight, Landing},
    dice::SECOND,
    surroundings::Surroundings,
    wires::{Down, Packet, Place, Up},
};

pub struct Session {
    node: NodeId,
    /// Known once the attach is in the log.
    incarnation: Option<u64>,
    known: Known,
    /// What was applied when its host was told last.
    told_at: u64,
    /// What the agent puts together of all news that were sent.
    whole: Option<Assignment>,
    /// A proposal for the agent, and the number of the frame that it came in.
    flight: Option<(Flight, Option<u64>)>,
    inbox: VecDeque<Up>,
}

impl Session {
    /// The proposal that it waited for.
    pub(crate) fn left_behind(self) -> Option<Flight> {
        self.flight.map(|(flight, _)| flight)
    }
}

impl Controller {
    /// Takes up new streams, and goes on with those that are open.
    pub(crate) fn serve(&mut self, around: &mut Surroundings) {
        for (stream, node) in around.wires.streams_to(self.number) {
            self.sessions.entry(stream).or_insert_with(|| Session {
                node,
                incarnation: None,
                known: Known::default(),
                told_at: 0,
                whole: None,
                flight: None,
                inbox: VecDeque::new(),
            });
        }
        let streams: Vec<u64> = self.sessions.keys().copied().collect();
        for stream in streams {
            let Some(mut session) = self.sessions.remove(&stream) else { continue };
            while let Some(message) = around.wires.next_up(around.now, stream) {
                session.inbox.push_back(message);
            }
            let me = Place::Controller(self.number);
            let goes_on = self.speak(around, stream, &mut session)
                && self.listen(around, stream, &mut session)
                && !around.wires.is_over(around.now, stream, me);
            if goes_on {
                self.sessions.insert(stream, session);
            } else {
                self.orphans.extend(session.left_behind());
                around.wires.close(around.now, stream, me);
            }
        }
    }

    /// False when the session ends.
    fn listen(&mut self, around: &mut Surroundings, stream: u64, session: &mut Session) -> bool {
        if let Some((flight, number)) = &mut session.flight {
            let (landing, number) = (flight.fly(around, self.number, self.applied), *number);
            match landing {
                None => return true,
                Some(Landing::NotLeader | Landing::Unknown) => return false,
                Some(Landing::Applied(outcome)) => {
                    session.flight = None;
                    return self.answer(around, stream, session, outcome, number);
                }
            }
        }
        let Some(message) = session.inbox.pop_front() else { return true };
        let node = session.node;
        let (command, number) = match (message, session.incarnation) {
            (Up::Hello(_), _) if self.leads.is_none() || !self.knows(node) => {
                around.wires.say_down(around.now, &mut around.dice, stream, Down::Refused);
                return false;
            }
            (Up::Hello(capacity), _) => {
                self.hear(around.now, |ears| ears.greet(node));
                (attach(node, capacity), None)
            }
            (Up::Vms(number, reports), Some(incarnation)) => {
                (NodeCommand::ReportVms { node, incarnation, reports }, Some(number))
            }
            (Up::Images(number, reports), Some(incarnation)) => {
                (NodeCommand::ReportImages { node, incarnation, reports }, Some(number))
            }
            (Up::Moves(number, reports), Some(incarnation)) => {
                (NodeCommand::ReportMoves { node, incarnation, reports }, Some(number))
            }
            (Up::Vms(..) | Up::Images(..) | Up::Moves(..), None) => return false,
        };
        let at = self.wall(around.now);
        let entry = Entry { at, request: None, actor: Actor::Node(node), command: Command::Node(command) };
        session.flight = Some((Flight::start(around, entry, None), number));
        true
    }

    fn answer(
        &mut self,
        around: &mut Surroundings,
        stream: u64,
        session: &mut Session,
        outcome: Result<Reply, Rejection>,
        number: Option<u64>,
    ) -> bool {
        let node = session.node;
        match (outcome, number) {
            (Ok(Reply::Incarnation(incarnation)), _) => {
                self.hear(around.now, |ears| ears.greet(node));
                session.incarnation = Some(incarnation);
                around.wires.say_down(around.now, &mut around.dice, stream, Down::Welcome(incarnation));
                true
            }
            (Ok(_), Some(number)) => {
                around.wires.say_down(around.now, &mut around.dice, stream, Down::Reported(number));
                true
            }
            _ => false,
        }
    }

    /// False when the session ends.
    fn speak(&mut self, around: &mut Surroundings, stream: u64, session: &mut Session) -> bool {
        let Some(incarnation) = session.incarnation else { return true };
        let Some(node) = self.state.nodes().get(&session.node) else { return false };
        if node.state == NodeState::Lost || node.incarnation != incarnation {
            return false;
        }
        let risen = session.whole.as_ref().is_none_or(|whole| whole.generation < node.generation);
        let woken = self.woken.get(&session.node).is_some_and(|index| *index > session.told_at);
        if !risen && !woken {
            return true;
        }
        session.told_at = self.applied;
        let Some(news) = self.state.news(session.node, &mut session.known) else { return false };
        let whole = news.clone().onto(session.whole.as_ref());
        if self.state.assignment(session.node).as_ref() != Some(&whole) {
            around.broken(format!("news of {} do not make its assignment, but {whole}", session.node));
        }
        self.echo(around, &whole);
        session.whole = Some(whole);
        around.wires.say_down(around.now, &mut around.dice, stream, Down::News(Box::new(news)));
        true
    }

    /// Now and then an assignment comes once more, much later.
    fn echo(&self, around: &mut Surroundings, assignment: &Assignment) {
        if around.dice.permille(60) {
            let due = around.now + around.dice.between(SECOND, 40 * SECOND);
            let again = Packet::Echo(Box::new(assignment.clone()));
            around.wires.deliver_at(due, Place::Host(assignment.node), again);
        }
    }
}

fn attach(node: NodeId, capacity: model::Capacity) -> NodeCommand {
    let number = u8::try_from(node.0).unwrap_or(255);
    NodeCommand::Attach {
        node,
        address: format!("{node}.test:7480"),
        underlay: IpAddr::V4(Ipv4Addr::new(192, 0, 2, number)),
        hypervisor: HypervisorKind::Simulated,
        capacity,
    }
}
