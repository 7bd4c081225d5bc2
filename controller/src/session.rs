//! A session with one agent: assignments go down, reports come up, and every report is in the log before it is
//! acknowledged.
//!
//! ```text
//!   agent ── Hello ──► leader: Attach enters the log ──► Welcome{incarnation}, Assignment
//!         ── VmReports{n} ──► the log ──► Reported{n}
//!         ── Stock, when the welcome asks for it, and only then:
//!         ◄── News whenever the node's generation rises or its tunnels change; the whole Assignment to an agent that knows no news
//! ```
//! It ends when this controller no longer leads, when a newer session of the same node begins, or when either side
//! breaks it; the agent then finds the leader again.

use std::{pin::Pin, sync::Arc, time::Duration};

use api::{
    client::LEADER_KEY,
    error::ApiError,
    proto::{Frame, node_session_server::NodeSession},
    session::{FromAgent, NEWS_KEY, ToAgent, decode, encode},
};
use model::{Actor, Command, Known, NodeCommand, NodeId, NodeState, Rejection, Reply};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{access, bells::Bell, core::Core};

pub(crate) struct Sessions {
    pub core: Arc<Core>,
}

/// A peer that opened a stream says hello within this.
const HELLO: Duration = Duration::from_secs(10);
/// Frames between the session and the wire: an assignment, some acknowledgements.
const FRAMES_AHEAD: usize = 16;

/// A session whose report cannot be proposed ends after this.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(1);

type Down = mpsc::Sender<Result<Frame, Status>>;

#[tonic::async_trait]
impl NodeSession for Sessions {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>>;

    async fn attach(&self, request: Request<Streaming<Frame>>) -> Result<Response<Self::AttachStream>, Status> {
        self.must_lead()?;
        let node = match access::node_of(&self.core, &request) {
            Ok(node) => node,
            // A node that has just joined may be newer than what this replica has applied.
            Err(_) => {
                self.core.linearize().await?;
                access::node_of(&self.core, &request)?
            }
        };
        let known = request.metadata().contains_key(NEWS_KEY).then(Known::default);
        let mut up = request.into_inner();
        let hello = timeout(HELLO, next(&mut up)).await.map_err(|_| ApiError::invalid("no hello came in time"))??;
        let Some(FromAgent::Hello { version, address, underlay, hypervisor, capacity }) = hello else {
            return Err(ApiError::invalid("the first frame is not a hello, but must be").into());
        };
        self.core.hear(|ears| ears.greet(node));
        let attach = NodeCommand::Attach { node, address, underlay, hypervisor, capacity };
        let committed = self.core.propose(Actor::Node(node), None, Command::Node(attach)).await?;
        let Reply::Incarnation(incarnation) = committed.applied.map_err(ApiError::from)? else {
            return Err(ApiError::internal("an attach replied with another noun").into());
        };
        self.core.hear(|ears| ears.greet(node));
        self.core.applied(committed.index).await?;
        tracing::info!(%node, incarnation, version, "session opened");
        let (down, frames) = mpsc::channel(FRAMES_AHEAD);
        let session = Session { core: self.core.clone(), node, incarnation };
        tokio::spawn(async move {
            let why = session.run(up, down, known).await;
            tracing::warn!(%node, incarnation, why, "alert: the session with a node ended");
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(frames))))
    }
}

impl Sessions {
    fn must_lead(&self) -> Result<(), Status> {
        if self.core.replica.is_leader() {
            return Ok(());
        }
        let mut status: Status = ApiError::new("unavailable", "this controller does not lead").into();
        if let Some(leader) = self.core.leader_elsewhere() {
            status.metadata_mut().insert(LEADER_KEY, leader);
        }
        Err(status)
    }
}

struct Session {
    core: Arc<Core>,
    node: NodeId,
    incarnation: u64,
}

impl Session {
    /// Runs until either direction ends; says why.
    async fn run(self, up: Streaming<Frame>, down: Down, known: Option<Known>) -> String {
        tokio::select! {
            why = self.listen(up, down.clone()) => why,
            why = self.speak(down.clone(), known) => why,
            () = down.closed() => "the agent hung up".into(),
        }
    }

    async fn listen(&self, mut up: Streaming<Frame>, down: Down) -> String {
        loop {
            let message = match next(&mut up).await {
                Ok(Some(message)) => message,
                Ok(None) => return "the agent closed it".into(),
                Err(status) => return status.message().to_owned(),
            };
            match self.hear(message).await {
                Ok(None) => {}
                Ok(Some(number)) => {
                    if !tell(&down, &ToAgent::Reported { number }).await {
                        return "the agent hung up".into();
                    }
                }
                Err(error) => {
                    let why = error.to_string();
                    // The agent is told, so that it does not wait; whether it hears it does not matter.
                    let _ = down.send(Err(error.into())).await;
                    return why;
                }
            }
        }
    }

    /// One frame from the agent; the number to acknowledge.
    async fn hear(&self, message: FromAgent) -> Result<Option<u64>, ApiError> {
        let (node, incarnation) = (self.node, self.incarnation);
        let (command, number) = match message {
            FromAgent::Hello { .. } => return Err(ApiError::invalid("a hello came twice")),
            FromAgent::VmReports { number, reports } => {
                (NodeCommand::ReportVms { node, incarnation, reports }, Some(number))
            }
            FromAgent::ImageReports { number, reports } => {
                (NodeCommand::ReportImages { node, incarnation, reports }, Some(number))
            }
            FromAgent::BackupReports { number, reports } => {
                (NodeCommand::ReportBackups { node, incarnation, reports }, Some(number))
            }
            FromAgent::RehearsalReports { number, reports } => {
                (NodeCommand::ReportRehearsals { node, incarnation, reports }, Some(number))
            }
            FromAgent::Stock(guests) => {
                tracing::info!(%node, guests = guests.len(), "a node said what it holds");
                (NodeCommand::TakeStock { node, incarnation, guests }, None)
            }
            FromAgent::MoveReports { number, reports } => {
                (NodeCommand::ReportMoves { node, incarnation, reports }, Some(number))
            }
            FromAgent::Summary(summary) => (NodeCommand::Summarise { node, incarnation, summary }, None),
        };
        let command = Command::Node(command);
        let propose = || self.core.propose(Actor::Node(node), None, command.clone());
        match patiently(propose).await?.applied {
            Ok(_) => Ok(number),
            Err(Rejection::Stale(why)) => Err(ApiError::new("stale", why)),
            Err(rejection) => Err(rejection.into()),
        }
    }

    /// An agent of which nothing is `known` is sent the whole each time.
    async fn speak(&self, down: Down, mut known: Option<Known>) -> String {
        let bell = Bell::hang(&self.core, self.node, self.incarnation);
        let mut leadership = self.core.replica.watch_leadership();
        let mut targets = self.beat_targets();
        let (epoch, take_stock) = self.core.replica.read(|state| (state.quorum().epoch, state.awaits(self.node)));
        let incarnation = self.incarnation;
        let welcome = ToAgent::Welcome { incarnation, beat_targets: targets.clone(), epoch, take_stock };
        if !tell(&down, &welcome).await {
            return "the agent hung up".into();
        }
        // From here on every change is heard; one that came before would be missed.
        if !leadership.borrow_and_update().leading {
            return "this controller no longer leads".into();
        }
        let mut sent = None;
        loop {
            // First room, then a turn: who is slow to read must not hold up others.
            let Ok(room) = down.reserve().await else { return "the agent hung up".into() };
            let turn = self.core.turns.acquire().await;
            let current = self.core.replica.read(|state| {
                let node = state.nodes().get(&self.node)?;
                let current = if node.state == NodeState::Lost { 0 } else { node.incarnation };
                // After a refounding the host speaks first: what it holds may be newer than what is known here.
                if state.awaits(self.node) {
                    return Some((current, None));
                }
                let risen = sent.replace(node.generation).is_none_or(|sent| sent < node.generation);
                let told = match &mut known {
                    Some(known) => {
                        let news = state.news(self.node, known).filter(|news| risen || !news.is_empty());
                        news.map(|news| ToAgent::News(Box::new(news)))
                    }
                    None => state.assignment(self.node).map(|whole| ToAgent::Assignment(Box::new(whole))),
                };
                Some((current, told))
            });
            match current {
                None => return "the node was removed from the cloud".into(),
                Some((0, _)) => return "the node was declared lost".into(),
                Some((incarnation, _)) if incarnation != self.incarnation => return "a newer session took over".into(),
                Some((_, Some(told))) => room.send(frame(&told)),
                Some((_, None)) => drop(room),
            }
            drop(turn);
            let now = self.beat_targets();
            if now != targets {
                targets = now;
                if !tell(&down, &ToAgent::BeatTargets(targets.clone())).await {
                    return "the agent hung up".into();
                }
            }
            tokio::select! {
                () = bell.rung() => {}
                changed = leadership.changed() => if changed.is_err() || !leadership.borrow().leading {
                    return "this controller no longer leads".into();
                },
            }
        }
    }

    fn beat_targets(&self) -> Vec<String> {
        self.core.replica.members().into_values().collect()
    }
}

/// What was surely not proposed, for want of room or of a quorum, is proposed again for a while: were each session ended
/// by it, all hosts would come back at the same moment and ask for more.
async fn patiently<T, Fut>(attempt: impl Fn() -> Fut) -> Result<T, ApiError>
where
    Fut: Future<Output = Result<T, ApiError>>,
{
    let give_up = Instant::now() + PATIENCE;
    let mut pause = FIRST_PAUSE;
    loop {
        match attempt().await {
            Err(error) if matches!(error.code.as_str(), "overloaded" | "no-quorum") && Instant::now() < give_up => {
                sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
            answer => return answer,
        }
    }
}

async fn tell(down: &Down, message: &ToAgent) -> bool {
    down.send(frame(message)).await.is_ok()
}

fn frame(message: &ToAgent) -> Result<Frame, Status> {
    Ok(Frame { body: encode(message).into() })
}

async fn next(up: &mut Streaming<Frame>) -> Result<Option<FromAgent>, Status> {
    let Some(frame) = up.message().await? else { return Ok(None) };
    match decode(&frame.body) {
        Ok(message) => Ok(Some(message)),
        Err(_) => Err(ApiError::invalid("a frame is not a session message of this version").into()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What comes of attempts that answer one after the other, the last one for ever; and how many of them were made.
    async fn tried(answers: &[Result<u8, &str>]) -> (Result<u8, String>, usize) {
        let made = RefCell::new(0);
        let attempt = || {
            let answer = answers[(*made.borrow()).min(answers.len() - 1)];
            *made.borrow_mut() += 1;
            async move { answer.map_err(|code| ApiError::new(code, "text")) }
        };
        let outcome = patiently(attempt).await.map_err(|error| error.code);
        (outcome, made.into_inner())
    }

    #[tokio::test]
    async fn what_was_surely_not_proposed_is_proposed_again() {
        assert_eq!(tried(&[Err("overloaded"), Err("no-quorum"), Ok(7)]).await, (Ok(7), 3));
        for ends in ["timeout", "stale", "unavailable"] {
            assert_eq!(tried(&[Err("overloaded"), Err(ends), Ok(7)]).await, (Err(ends.into()), 2));
        }
        let began = Instant::now();
        let (outcome, _) = tried(&[Err("overloaded")]).await;
        assert_eq!(outcome, Err("overloaded".into()));
        assert!((PATIENCE..2 * PATIENCE).contains(&began.elapsed()), "but not for ever");
    }
}
