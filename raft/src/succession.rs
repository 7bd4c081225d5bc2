//! A leader whose process is gone need not be waited for.
//!
//! Silence alone may be a slow network, so it becomes an election only after the lease. But when the stream of entries
//! breaks and the leader's port then *refuses* a connection, its host is there and says that nobody listens: the process
//! has ended, and with it its leadership, because a restarted leader is elected again. The follower then gives up the
//! lease and asks for a pre-vote. Voters that did not see the same still hold their lease and say no; so one follower's
//! error does not disturb a leader that a majority hears.
//!
//! Safety does not lean on leases anywhere here: reads are confirmed by a quorum. What is decided here is only when an
//! election may begin.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::Stream;
use model::ControllerId;
use openraft::{ServerState, async_runtime::WatchReceiver, raft::TransferLeaderRequest};
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{sleep, timeout},
};
use tonic::{Status, Streaming};

use crate::{
    core::{Core, SharedCore},
    proto::Frame,
};

/// Streams that broke and were not looked at yet; one is enough to look, so more are forgotten.
pub const BROKEN_STREAMS: usize = 8;
/// A process that is killed closes its connections and its port within milliseconds, in any order, and the other voters
/// see it at about the same time; so it is looked at, and a pre-vote is asked for, a few times.
const ATTEMPTS: u32 = 4;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(20);
/// The voters try one after the other, so that they do not take each other's votes: a vote takes a sync and a round trip.
const TURN: Duration = Duration::from_millis(60);
/// A host that answers refuses within a round trip; longer silence is left to the election timers.
const PROBE: Duration = Duration::from_millis(100);

/// The frames that `peer` sends, and the news when they break off instead of ending.
pub struct Watched {
    frames: Streaming<Frame>,
    peer: ControllerId,
    broken: mpsc::Sender<ControllerId>,
    ended: bool,
}

impl Watched {
    pub fn new(frames: Streaming<Frame>, peer: ControllerId, core: &Core) -> Self {
        Self { frames, peer, broken: core.broken.clone(), ended: false }
    }
}

impl Stream for Watched {
    type Item = Result<Frame, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = ready!(Pin::new(&mut self.frames).poll_next(cx));
        self.ended |= item.is_none();
        Poll::Ready(item)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.ended {
            // A full queue means that the same is about to be looked at already.
            let _ = self.broken.try_send(self.peer);
        }
    }
}

/// Looks at each leader whose stream broke. Runs as long as the replica.
pub async fn succession_loop(core: SharedCore, mut broken: mpsc::Receiver<ControllerId>) {
    while let Some(peer) = broken.recv().await {
        if core.leadership().leader == Some(peer) && !core.stopping() && process_ended(&core, peer).await {
            core.succeed(peer).await;
        }
    }
}

impl Core {
    /// Gives up the lease of `leader`, and stands for election when it is this voter's turn.
    async fn succeed(&self, leader: ControllerId) {
        tracing::warn!(%leader, "the leader's process has ended: an election begins before its lease is over");
        let vote = self.raft.server_metrics().borrow_watched().vote;
        // Named as the successor is nobody here, so that openraft drops the lease and does nothing else. An error of
        // these calls means that consensus is stopping, which its own watcher reports.
        let give_up = TransferLeaderRequest::new(vote, leader.0, None);
        let _ = self.raft.handle_transfer_leader(give_up).await;
        let mut survivors = self.voters().into_iter().filter(|id| *id != leader.0);
        let Some(turn) = survivors.position(|id| id == self.id) else { return };
        sleep(TURN * u32::try_from(turn).unwrap_or(u32::MAX)).await;
        for _ in 0..ATTEMPTS {
            let now = self.raft.server_metrics().borrow_watched().clone();
            // It stands already, or has voted for another, or has a new leader.
            if now.vote != vote || now.state != ServerState::Follower {
                return;
            }
            let _ = self.raft.trigger().elect(true).await;
            sleep(BETWEEN_ATTEMPTS).await;
        }
    }
}

/// True when the host of `peer` says that nobody listens where it did.
async fn process_ended(core: &Core, peer: ControllerId) -> bool {
    let Some(address) = core.members().remove(&peer.0) else { return false };
    for _ in 0..ATTEMPTS {
        match timeout(PROBE, TcpStream::connect(&address)).await {
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return true,
            // Not yet, or not at all.
            Ok(Ok(_)) => sleep(BETWEEN_ATTEMPTS).await,
            Ok(Err(_)) | Err(_) => return false,
        }
    }
    false
}
