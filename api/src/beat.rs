//! Heartbeats: the datagrams that agents send and controllers answer, and the guard against replayed ones.
//!
//! ```text
//!   datagram = magic (3) | kind (1) | node id (8, little endian) | body (postcard) | BLAKE3 keyed MAC (32)
//!
//!   agent ── Beat{seq, boottime, nonce: 0} ──► controller      the nonce is not its own: believed in nothing,
//!         ◄── Ack{seq, boottime, nonce: N} ──                  but answered, so that the agent learns N
//!         ── Beat{seq + 1, nonce: N, status} ─►                believed once
//! ```
//!
//! The MAC is under a key of each node (`CertificateAuthority::beat_key`) and covers the kind, so that an ack cannot
//! be sent back as a beat. Each controller process draws a nonce when it starts: a recorded datagram is worth
//! nothing to a process that was started later, and nothing twice to the same one.
//!
//! Not here: sockets and clocks. Decoders are total: any bytes give a message or an error.

use std::collections::HashMap;

use model::{
    NodeId,
    lease::Grant,
    telemetry::{NodeStatus, VmStatus},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// What fits into one Ethernet frame after IPv6, UDP and a tunnel or two: a beat is never fragmented.
pub const MAX_DATAGRAM_BYTES: usize = 1200;

/// The longest name of a step that a beat carries; longer ones are cut so that one machine always fits.
const MAX_STEP_BYTES: usize = 48;

const MAGIC: [u8; 3] = *b"TB1";
const HEADER_BYTES: usize = 12;
const MAC_BYTES: usize = 32;
/// Everything of a beat but its machines, at its longest encoding: six integers of 10 bytes, the option, part and
/// parts of 5 bytes, the node status of 46 and the length of the list of 3.
const FIXED_BODY_BYTES: usize = 60 + 1 + 10 + 46 + 3;
/// What is left of a datagram for machines.
const VM_BUDGET_BYTES: usize = MAX_DATAGRAM_BYTES - HEADER_BYTES - MAC_BYTES - FIXED_BODY_BYTES;

/// The secret that a node shares with the controllers.
#[derive(Clone, PartialEq, Eq)]
pub struct BeatKey(pub [u8; 32]);

impl BeatKey {
    /// From the bytes of `JoinAgentReply.beat_key`; `None` unless they are 32.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// In the header, so that the receiver finds the key before it trusts the body.
    #[serde(skip)]
    pub node: NodeId,
    /// Of the agent's session; 0 before its first.
    pub incarnation: u64,
    /// Rises with every datagram that this agent process sends to this controller; starts at 1.
    pub seq: u64,
    /// CLOCK_BOOTTIME of the host when it was sent.
    pub boottime_nanos: u64,
    /// As the controller's last ack told it; 0 when none came yet.
    pub nonce: u64,
    /// For how long this controller has not answered, on the host's clock: a beat that arrives does not say that
    /// answers do.
    pub unanswered_millis: u64,
    pub status: Option<StatusPart>,
}

/// The host's status and a part of its machines'.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusPart {
    pub node: NodeStatus,
    /// From 0; machines that are in none of `parts` consecutive parts are not on the host.
    pub part: u32,
    pub parts: u32,
    pub vms: Vec<VmStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    #[serde(skip)]
    pub node: NodeId,
    /// Of the beat that it answers.
    pub seq: u64,
    /// Of the controller process that answers.
    pub nonce: u64,
    /// As in the beat: round trip and lease are counted from the send, on the host's own clock.
    pub boottime_nanos: u64,
    /// Whether the controller that answers was leader.
    pub leader: bool,
    /// Set by a leader that knows it is one: the host may go on running what must not run twice.
    pub grant: Option<Grant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Beat,
    Ack,
}

/// Why a datagram was refused. None of these deserves an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BeatError {
    #[error("the datagram is not a heartbeat of this version")]
    Malformed,
    #[error("the datagram was not made with this node's key")]
    Forged,
    #[error("the message is longer than a datagram may be")]
    TooLong,
}

/// # Errors
/// `TooLong` when `beat.status` was not made by [`split_status`].
pub fn encode(beat: &Beat, key: &BeatKey) -> Result<Vec<u8>, BeatError> {
    seal(Kind::Beat, beat.node, beat, key)
}

/// # Errors
/// None in fact: an ack is always shorter than a datagram.
pub fn encode_ack(ack: &Ack, key: &BeatKey) -> Result<Vec<u8>, BeatError> {
    seal(Kind::Ack, ack.node, ack, key)
}

/// Whose datagram this claims to be, before anything in it is believed; `None` when it is not one of ours.
pub fn decode_header(datagram: &[u8]) -> Option<(Kind, NodeId)> {
    let sane = (HEADER_BYTES + MAC_BYTES..=MAX_DATAGRAM_BYTES).contains(&datagram.len());
    if !sane || datagram[..3] != MAGIC {
        return None;
    }
    let kind = match datagram[3] {
        1 => Kind::Beat,
        2 => Kind::Ack,
        _ => return None,
    };
    let node = u64::from_le_bytes(datagram[4..HEADER_BYTES].try_into().ok()?);
    Some((kind, NodeId(node)))
}

/// # Errors
/// `Malformed` or `Forged`.
pub fn decode(datagram: &[u8], key: &BeatKey) -> Result<Beat, BeatError> {
    let (node, beat): (_, Beat) = open(Kind::Beat, datagram, key)?;
    Ok(Beat { node, ..beat })
}

/// # Errors
/// `Malformed` or `Forged`.
pub fn decode_ack(datagram: &[u8], key: &BeatKey) -> Result<Ack, BeatError> {
    let (node, ack): (_, Ack) = open(Kind::Ack, datagram, key)?;
    Ok(Ack { node, ..ack })
}

/// Spreads the machines of a host over as many parts as it takes for each to fit a datagram; at least one.
pub fn split_status(node: &NodeStatus, vms: &[VmStatus]) -> Vec<StatusPart> {
    let mut chunks: Vec<Vec<VmStatus>> = vec![Vec::new()];
    let mut used = 0;
    for vm in vms {
        let vm = with_short_step(vm.clone());
        let size = postcard::to_stdvec(&vm).map_or(VM_BUDGET_BYTES, |bytes| bytes.len());
        if used + size > VM_BUDGET_BYTES {
            chunks.push(Vec::new());
            used = 0;
        }
        used += size;
        chunks.last_mut().expect("it starts with one").push(vm);
    }
    let parts = u32::try_from(chunks.len()).unwrap_or(u32::MAX);
    let part = |(part, vms)| StatusPart { node: node.clone(), part, parts, vms };
    (0..).zip(chunks).map(part).collect()
}

/// What the receiver may do with an authentic beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Believe it and answer.
    Fresh,
    /// It does not echo this process's nonce: answer, so that the agent learns the nonce, and believe nothing,
    /// not even that the host is alive.
    Unproven,
    /// Seen before, or older than what is remembered: drop it.
    Replayed,
}

/// Remembers which beats were believed. One per controller process, and one window per node that proved itself.
pub struct ReplayGuard {
    nonce: u64,
    windows: HashMap<NodeId, Window>,
}

/// The highest sequence number, and which of the 64 below it were seen: UDP may reorder the parts of a status.
#[derive(Default)]
struct Window {
    incarnation: u64,
    highest: u64,
    seen: u64,
}

impl ReplayGuard {
    /// `nonce`: random, drawn when the process starts, never 0.
    pub fn new(nonce: u64) -> Self {
        Self { nonce, windows: HashMap::new() }
    }

    pub fn nonce(&self) -> u64 {
        self.nonce
    }

    /// Call it once for each beat whose MAC was right. An agent that restarts under the same incarnation counts on
    /// from its last number or learns a new incarnation first; an older incarnation is refused.
    pub fn check(&mut self, beat: &Beat) -> Verdict {
        if beat.nonce != self.nonce || beat.seq == 0 {
            return Verdict::Unproven;
        }
        let window = self.windows.entry(beat.node).or_default();
        if beat.incarnation > window.incarnation {
            *window = Window { incarnation: beat.incarnation, ..Window::default() };
        }
        let fresh = beat.incarnation == window.incarnation && window.admit(beat.seq);
        if fresh { Verdict::Fresh } else { Verdict::Replayed }
    }

    /// For a node that left the cloud.
    pub fn forget(&mut self, node: NodeId) {
        self.windows.remove(&node);
    }
}

impl Window {
    fn admit(&mut self, seq: u64) -> bool {
        if seq > self.highest {
            let by = seq - self.highest;
            // Bit n stands for `highest - 1 - n`.
            let old_highest = if self.highest > 0 && by <= 64 { 1 << (by - 1) } else { 0 };
            self.seen = if by < 64 { self.seen << by } else { 0 } | old_highest;
            self.highest = seq;
            return true;
        }
        let behind = self.highest - seq;
        if behind == 0 || behind > 64 {
            return false;
        }
        let bit = 1 << (behind - 1);
        let new = self.seen & bit == 0;
        self.seen |= bit;
        new
    }
}

fn seal<T: Serialize>(kind: Kind, node: NodeId, body: &T, key: &BeatKey) -> Result<Vec<u8>, BeatError> {
    let mut datagram = Vec::with_capacity(MAX_DATAGRAM_BYTES);
    datagram.extend_from_slice(&MAGIC);
    datagram.push(match kind {
        Kind::Beat => 1,
        Kind::Ack => 2,
    });
    datagram.extend_from_slice(&node.0.to_le_bytes());
    let mut datagram = postcard::to_extend(body, datagram).map_err(|_| BeatError::Malformed)?;
    datagram.extend_from_slice(blake3::keyed_hash(&key.0, &datagram).as_bytes());
    if datagram.len() <= MAX_DATAGRAM_BYTES { Ok(datagram) } else { Err(BeatError::TooLong) }
}

fn open<T: DeserializeOwned>(kind: Kind, datagram: &[u8], key: &BeatKey) -> Result<(NodeId, T), BeatError> {
    let (claimed, node) = decode_header(datagram).ok_or(BeatError::Malformed)?;
    if claimed != kind {
        return Err(BeatError::Malformed);
    }
    let (signed, mac) = datagram.split_at(datagram.len() - MAC_BYTES);
    let mac: [u8; MAC_BYTES] = mac.try_into().map_err(|_| BeatError::Malformed)?;
    // Compared in constant time by blake3.
    if blake3::keyed_hash(&key.0, signed) != blake3::Hash::from_bytes(mac) {
        return Err(BeatError::Forged);
    }
    let (body, rest) = postcard::take_from_bytes(&signed[HEADER_BYTES..]).map_err(|_| BeatError::Malformed)?;
    if rest.is_empty() { Ok((node, body)) } else { Err(BeatError::Malformed) }
}

fn with_short_step(mut vm: VmStatus) -> VmStatus {
    if let Some(progress) = &mut vm.progress {
        let mut end = progress.step.len().min(MAX_STEP_BYTES);
        while !progress.step.is_char_boundary(end) {
            end -= 1;
        }
        progress.step.truncate(end);
    }
    vm
}

#[cfg(test)]
mod tests;
