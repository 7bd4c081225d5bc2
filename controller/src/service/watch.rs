//! Watching: a stream of what changes. One task a watcher, which reads the replica's window of changes at a place of its own.
//!
//! A watcher that reads slowly is not waited for and costs no memory: its place falls behind, and when the window has moved past it
//! the stream ends with `compacted`. Deliberately not here: what a thing is now; that is a read.

use std::{sync::Arc, time::Duration};

use api::{error::ApiError, proto};
use model::{
    Digest, Role, TenantId,
    state::{Change, Owner},
};
use raft::{Changes, Compacted};
use tokio::{
    sync::{Semaphore, SemaphorePermit, mpsc},
    time::{Instant, sleep, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use super::{Flow, Service};
use crate::{
    access::{self, Caller},
    core::Core,
    name,
};

/// Streams on one controller; each costs a task, and a look at the window whenever something changed.
static WATCHERS: Semaphore = Semaphore::const_new(1000);
/// Events in one message, give or take those of one log entry: some tens of kilobytes.
const EVENTS_AT_ONCE: usize = 256;
/// After a message what changes meanwhile is gathered for so long, so that a busy cloud wakes a watcher a hundred times a second at most.
const GATHER: Duration = Duration::from_millis(10);
/// A watcher hears at least so often how far it is, after a majority was asked: so it can tell silence from a broken connection
/// and from a controller that is cut off, and go on elsewhere.
const MARK_EVERY: Duration = Duration::from_secs(5);

/// What a watcher may see.
#[derive(Clone, Copy)]
enum Scope {
    All,
    Tenant(TenantId),
}

impl Scope {
    fn shows(self, change: &Change) -> bool {
        match (self, change.owner) {
            (Self::All, _) | (_, Owner::Everybody) => true,
            (Self::Tenant(own), Owner::Tenant(tenant)) => own == tenant,
            (Self::Tenant(_), Owner::Operators | Owner::Gone) => false,
        }
    }
}

struct Watcher {
    core: Arc<Core>,
    token: Digest,
    caller: Caller,
    scope: Scope,
    /// Everything up to here has been told.
    told: u64,
    out: mpsc::Sender<Result<proto::WatchReply, Status>>,
    _turn: SemaphorePermit<'static>,
}

impl Service {
    pub(super) async fn watch_begin(
        &self,
        request: Request<proto::WatchRequest>,
    ) -> Result<Flow<proto::WatchReply>, ApiError> {
        let token = access::token_of(request.metadata())?;
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let turn = WATCHERS.try_acquire();
        let turn = turn.map_err(|_| ApiError::overloaded("too many watch this controller: ask another"))?;
        // So that it is a controller that can know, and so that an index that another one told is not taken for a mistake.
        let now = self.core.replica.linearize().await.map_err(crate::core::read_error)?;
        let scope = match (caller.role, body.tenant.as_str()) {
            (Role::Operator, "") => Scope::All,
            _ => {
                Scope::Tenant(self.core.replica.read(|state| name::tenant(state, &caller, &body.tenant).map(|t| t.id))?)
            }
        };
        let told = body.after.unwrap_or(now);
        if told > now {
            return Err(ApiError::invalid(format!("after is {told}, but the log has come to {now}")));
        }
        let look = self.core.replica.changes(told, 0, |_| false);
        look.map_err(|compacted| too_old(told, compacted))?;
        let (out, replies) = mpsc::channel(1);
        let watcher = Watcher { core: self.core.clone(), token, caller, scope, told, out, _turn: turn };
        tokio::spawn(watcher.run());
        Ok(Box::pin(ReceiverStream::new(replies)))
    }
}

impl Watcher {
    async fn run(mut self) {
        let mut applied = self.core.replica.watch_applied();
        let mut stopping = self.core.replica.watch_stopping();
        let mut silent_until = Instant::now();
        loop {
            let due = Instant::now() >= silent_until;
            let reached = *applied.borrow_and_update();
            let reply = match self.next(due).await {
                Ok(read) => {
                    proto::WatchReply { revision: read.upto, events: read.changes.into_iter().map(event).collect() }
                }
                Err(error) => {
                    // Whoever watched may have gone.
                    let _ = self.out.send(Err(error.into())).await;
                    return;
                }
            };
            self.told = reply.revision;
            if due || !reply.events.is_empty() {
                if self.out.send(Ok(reply)).await.is_err() {
                    return;
                }
                silent_until = Instant::now() + MARK_EVERY;
                sleep(GATHER).await;
            }
            if self.told < reached {
                continue;
            }
            tokio::select! {
                changed = applied.changed() => if changed.is_err() { return },
                () = sleep_until(silent_until) => {}
                () = async { drop(stopping.wait_for(|stopping| *stopping).await) } => {
                    let stopping = ApiError::new("unavailable", "this controller is stopping: watch another");
                    let _ = self.out.send(Err(stopping.into())).await;
                    return;
                }
                () = self.out.closed() => return,
            }
        }
    }

    async fn next(&self, due: bool) -> Result<Changes, ApiError> {
        if due {
            self.core.linearize().await?;
        }
        if !access::still(&self.core, &self.token, &self.caller) {
            return Err(ApiError::unauthenticated("the token of this watch is not valid any more"));
        }
        let wanted = |change: &Change| self.scope.shows(change);
        let read = self.core.replica.changes(self.told, EVENTS_AT_ONCE, wanted);
        read.map_err(|compacted| too_old(self.told, compacted))
    }
}

fn event((revision, change): (u64, Change)) -> proto::WatchEvent {
    let tenant = match change.owner {
        Owner::Tenant(tenant) => tenant.to_string(),
        Owner::Everybody | Owner::Operators | Owner::Gone => String::new(),
    };
    proto::WatchEvent { revision, kind: change.noun.to_string(), id: change.id, tenant, present: change.present }
}

fn too_old(after: u64, Compacted { kept_after }: Compacted) -> ApiError {
    ApiError::new(
        "compacted",
        format!(
            "changes after {after} are not kept any more, only those after {kept_after}: read anew, then watch from there"
        ),
    )
}
