//! A client that survives failovers: it knows every controller, and asks the next one when one does not answer.
//!
//! A retry carries the same request id, so it is the same request: the quorum gives the first answer again. An error
//! of kind `Unknown` means that the client gave up without knowing whether a change was made; every other error of a
//! mutating call means that this request changed nothing.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use model::{JoinRole, RequestId};
use tokio::time::{Instant, sleep, timeout};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, ClientTlsConfig},
};

use crate::{
    error::ApiError,
    proto::{self, join_client::JoinClient, trefoil_client::TrefoilClient},
    tls,
    token::JoinToken,
};

pub mod images;
mod quorum;
mod vms;
mod watch;

pub use quorum::read_quorum_backup;
pub use watch::Watch;

/// The metadata key of the request id on a mutating call.
pub const REQUEST_KEY: &str = "trefoil-request";
/// The metadata key under which a controller that does not lead names the address of the one that does.
pub const LEADER_KEY: &str = "trefoil-leader";
/// The metadata key of the user's token, after `Bearer `.
pub const TOKEN_KEY: &str = "authorization";

/// How long a call goes on trying when nothing else was asked for: several elections.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);
/// A controller that accepted a call but does not answer is given up after this; elections take less.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Waits between rounds over all controllers. A failover takes about a second: waiting longer would be felt.
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const LAST_BACKOFF: Duration = Duration::from_millis(250);
/// A page of 1000 machines is about 1 MB.
const MAX_REPLY_BYTES: usize = 16 << 20;

/// A new request id: a UUIDv7, so that ids sort by time in logs.
pub fn new_request_id() -> RequestId {
    RequestId(uuid::Uuid::now_v7().as_u128())
}

/// Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    deadline: Duration,
}

struct Shared {
    endpoints: Vec<Endpoint>,
    /// The one that answered last; the next read starts there, so that readers spread over the controllers.
    preferred: AtomicUsize,
    /// The one that led when last heard of; the next change starts there, and is not passed on.
    leader: AtomicUsize,
    authorization: MetadataValue<Ascii>,
}

struct Endpoint {
    name: String,
    channel: Channel,
}

impl Client {
    /// Connects to nothing yet. Endpoints are `host:port` or `unix:/path`; `token` is a user's.
    ///
    /// # Errors
    /// When there is no endpoint, one is malformed, or the certificate or the token is.
    pub fn new(endpoints: &[String], ca_pem: &str, token: &str) -> Result<Self, ApiError> {
        let mut authorization = MetadataValue::try_from(format!("Bearer {}", token.trim()))
            .map_err(|_| ApiError::invalid("the token has characters that no token has"))?;
        authorization.set_sensitive(true);
        let endpoints = open(endpoints, &tls::client_tls_ca(ca_pem))?;
        let shared =
            Arc::new(Shared { endpoints, preferred: AtomicUsize::new(0), leader: AtomicUsize::new(0), authorization });
        Ok(Self { shared, deadline: DEFAULT_DEADLINE })
    }

    /// The same client whose calls give up after `deadline`.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// A call that changes nothing, retried until the deadline:
    /// `client.read(body, |mut stub, request| async move { stub.get_vm(request).await })`.
    ///
    /// # Errors
    /// What a controller answered, or that none did.
    pub async fn read<Q, A, F, Fut>(&self, body: Q, call: F) -> Result<A, ApiError>
    where
        Q: Clone,
        F: Fn(TrefoilClient<Channel>, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        self.call(None, body, call).await
    }

    /// A call that changes something, retried under the same `id` until the deadline.
    ///
    /// # Errors
    /// What a controller answered, or that none did; of kind `Unknown` when it may have been carried out.
    pub async fn mutate<Q, A, F, Fut>(&self, id: RequestId, body: Q, call: F) -> Result<A, ApiError>
    where
        Q: Clone,
        F: Fn(TrefoilClient<Channel>, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        self.call(Some(id), body, call).await
    }

    /// The endpoint to which the next change goes first: the leader's, as far as is known.
    pub fn leader(&self) -> &str {
        &self.shared.endpoints[self.shared.leader.load(Ordering::Relaxed)].name
    }

    /// How many controllers it knows.
    pub fn endpoints(&self) -> usize {
        self.shared.endpoints.len()
    }

    /// The generated client of one controller, without retries: for measurements and tests. `endpoint` counts modulo
    /// the number of endpoints.
    pub fn stub(&self, endpoint: usize) -> TrefoilClient<Channel> {
        let endpoints = &self.shared.endpoints;
        stub(endpoints[endpoint % endpoints.len()].channel.clone())
    }

    /// A request with the token, the request id when there is one, and the time that the server has for it.
    pub fn request<Q>(&self, id: Option<RequestId>, body: Q, limit: Duration) -> Request<Q> {
        let mut request = Request::new(body);
        request.set_timeout(limit);
        self.authorize(&mut request, id);
        request
    }

    async fn call<Q, A, F, Fut>(&self, id: Option<RequestId>, body: Q, call: F) -> Result<A, ApiError>
    where
        Q: Clone,
        F: Fn(TrefoilClient<Channel>, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        let start = if id.is_some() { &self.shared.leader } else { &self.shared.preferred };
        let first = start.load(Ordering::Relaxed);
        let attempt = |index: usize, limit: Duration| {
            let request = self.request(id, body.clone(), limit);
            let answer = call(self.stub(first + index), request);
            let call = &self.shared.endpoints[(first + index) % self.endpoints()].name;
            async move {
                match timeout(limit, answer).await {
                    Ok(Ok(reply)) => Ok(reply),
                    Ok(Err(status)) => Err(naming(call, status.into())),
                    Err(_) => Err(ApiError::timeout(format!("{call} did not answer within {limit:.1?}"))),
                }
            }
        };
        let asked = id.map_or(Asked::Read, Asked::Change);
        let (index, reply) = rounds(self.endpoints(), self.deadline, asked, attempt).await?;
        let answered = (first + index) % self.endpoints();
        let next = if id.is_some() { self.leader_named(&reply).unwrap_or(answered) } else { answered };
        start.store(next, Ordering::Relaxed);
        Ok(reply.into_inner())
    }

    /// The endpoint that a reply names as the leader; `None` when it names none, or one that this client knows by another name.
    fn leader_named<A>(&self, reply: &Response<A>) -> Option<usize> {
        let leader = reply.metadata().get(LEADER_KEY)?.to_str().ok()?;
        self.shared.endpoints.iter().position(|endpoint| endpoint.name == leader)
    }

    fn authorize<Q>(&self, request: &mut Request<Q>, id: Option<RequestId>) {
        let metadata = request.metadata_mut();
        metadata.insert(TOKEN_KEY, self.shared.authorization.clone());
        if let Some(id) = id {
            let text = id.to_string().parse().expect("hexadecimal digits and dashes are ASCII");
            metadata.insert(REQUEST_KEY, text);
        }
    }
}

/// What a join gives, for either role.
pub enum Joined {
    Controller(proto::JoinControllerReply),
    Agent(proto::JoinAgentReply),
}

/// Shows the one-time token to the controllers that it names, until one answers. `address` is what others will reach
/// the joiner at; `csr_der` comes from [`tls::make_key_and_csr`].
///
/// # Errors
/// When the text is not a token, when it is refused, or when no controller answered within `deadline`.
pub async fn join(
    text: &str,
    name: &str,
    address: &str,
    csr_der: Vec<u8>,
    deadline: Duration,
) -> Result<Joined, ApiError> {
    let token = JoinToken::decode(text).map_err(|e| ApiError::new("bad-join-token", e.to_string()))?;
    let endpoints = open(&token.controllers, &tls::client_tls_ca(&token.ca_pem))?;
    let body = proto::JoinRequest {
        token: text.trim().into(),
        name: name.into(),
        address: address.into(),
        csr: csr_der.into(),
    };
    let role = token.role;
    let attempt = |index: usize, limit: Duration| {
        let Endpoint { name, channel } = &endpoints[index % endpoints.len()];
        let mut stub = JoinClient::new(channel.clone()).max_decoding_message_size(MAX_REPLY_BYTES);
        let mut request = Request::new(body.clone());
        request.set_timeout(limit);
        async move {
            let answer = async {
                Ok(match role {
                    JoinRole::Controller => Joined::Controller(stub.join_controller(request).await?.into_inner()),
                    JoinRole::Agent => Joined::Agent(stub.join_agent(request).await?.into_inner()),
                })
            };
            match timeout(limit, answer).await {
                Ok(Ok(joined)) => Ok(joined),
                Ok(Err(status)) => Err(naming(name, Status::into(status))),
                Err(_) => Err(ApiError::timeout(format!("{name} did not answer within {limit:.1?}"))),
            }
        }
    };
    rounds(endpoints.len(), deadline, Asked::Join, attempt).await.map(|(_, joined)| joined)
}

fn open(endpoints: &[String], tls: &ClientTlsConfig) -> Result<Vec<Endpoint>, ApiError> {
    if endpoints.is_empty() {
        return Err(ApiError::invalid("no controller endpoint is known"));
    }
    let open = |name: &String| {
        let channel = tls::connect(name, tls.clone()).map_err(|e| ApiError::invalid(e.to_string()))?;
        Ok(Endpoint { name: name.clone(), channel })
    };
    endpoints.iter().map(open).collect()
}

fn stub(channel: Channel) -> TrefoilClient<Channel> {
    TrefoilClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES)
}

/// Tries one controller after the other, and waits after each whole round, until one gives an answer that is not
/// worth a retry. Gives the answer with the number of the attempt.
async fn rounds<A, Fut>(
    endpoints: usize,
    deadline: Duration,
    asked: Asked,
    attempt: impl Fn(usize, Duration) -> Fut,
) -> Result<(usize, A), ApiError>
where
    Fut: Future<Output = Result<A, ApiError>>,
{
    let give_up = Instant::now() + deadline;
    let mut backoff = FIRST_BACKOFF;
    // Once the outcome of one attempt is unknown, a later "not done" says nothing about that one.
    let mut perhaps_done = false;
    // What a controller said of the cloud says more than that another one was silent.
    let mut said = None;
    for index in 0.. {
        let left = give_up.saturating_duration_since(Instant::now());
        let error = match attempt(index, left.min(ATTEMPT_TIMEOUT)).await {
            Ok(answer) => return Ok((index, answer)),
            Err(error) if !error.is_retryable() => return Err(refused(error, perhaps_done, asked)),
            Err(error) => error,
        };
        perhaps_done |= error.code == "timeout";
        if matches!(error.code.as_str(), "no-quorum" | "overloaded") {
            said = Some(error.clone());
        }
        let round_over = (index + 1) % endpoints == 0;
        let pause = if round_over { backoff } else { Duration::ZERO };
        if Instant::now() + pause >= give_up {
            return Err(given_up(said.unwrap_or(error), perhaps_done, asked));
        }
        tracing::debug!(code = error.code, %error, attempt = index, "asking the next controller");
        if round_over {
            sleep(pause).await;
            backoff = (backoff * 2).min(LAST_BACKOFF);
        }
    }
    unreachable!("the loop ends by the deadline")
}

/// What is tried until it is answered, and so what can be said of it when it is not.
#[derive(Clone, Copy)]
enum Asked {
    Read,
    Change(RequestId),
    /// Again with the same key it is the same request, but the key is gone with this one.
    Join,
}

fn given_up(error: ApiError, perhaps_done: bool, asked: Asked) -> ApiError {
    match asked {
        Asked::Change(id) if perhaps_done => ApiError::timeout(format!(
            "it is not known whether the request was carried out ({error}); asking again with --request-id {id} is safe"
        )),
        Asked::Join if perhaps_done => ApiError::timeout(format!(
            "it is not known whether the join was carried out ({error}); if it was, the token is used, and another one is needed"
        )),
        // A read that was not answered is not done; there is nothing to be in doubt about.
        Asked::Read if error.code == "timeout" => ApiError::new("unavailable", error.message),
        _ => error,
    }
}

/// What the quorum refuses it has refused for good, earlier attempts and all. Who is turned away before the quorum looked for
/// the request, or was given another one's place, hears nothing of them: they may have been carried out.
fn refused(error: ApiError, perhaps_done: bool, asked: Asked) -> ApiError {
    match error.code.as_str() {
        "unauthenticated" | "forbidden" | "request-reused" => given_up(error, perhaps_done, asked),
        _ => error,
    }
}

/// Says which controller it was, where that helps to find the trouble.
fn naming(endpoint: &str, mut error: ApiError) -> ApiError {
    if error.is_retryable() {
        error.message = format!("{endpoint}: {}", error.message);
    }
    error
}

#[cfg(test)]
mod tests;
