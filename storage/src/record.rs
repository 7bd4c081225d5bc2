//! The bytes of one log slot, of the vote and of the membership: our own format, so that the library that runs
//! consensus may change its types without changing what is on disk.
//!
//! ```text
//! record = version u8 | kind u8 | term u64 | leader u64 | index u64 | body | checksum [u8; 8]     integers big-endian
//! kind: 0 blank, body empty · 1 entry, body = postcard(model::Entry) · 2 membership, body = postcard(Voters)
//! checksum: the first 8 bytes of BLAKE3 over everything before it
//! ```

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// The first byte of every record. Another value is refused, never guessed at.
const VERSION: u8 = 1;
const HEAD_BYTES: usize = 2 + 3 * 8;
const CHECKSUM_BYTES: usize = 8;

/// Where an entry stands in the log: the leader that wrote it, and its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    pub term: u64,
    pub leader: u64,
    pub index: u64,
}

/// The vote of this controller. It is synced before anybody hears of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    pub term: u64,
    pub candidate: u64,
    /// A quorum granted it: the candidate leads.
    pub committed: bool,
}

/// Who votes and who is a member. Two sets of voters stand for the joint phase of a change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voters {
    pub sets: Vec<BTreeSet<u64>>,
    /// Every member, learners too: id and address.
    pub addresses: BTreeMap<u64, String>,
}

/// A membership with the log slot that it came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub at: Option<Position>,
    pub voters: Voters,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub position: Position,
    pub payload: Payload,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A new leader's first entry; it changes nothing.
    Blank,
    /// `postcard(model::Entry)`, kept as bytes: encoded once by the leader, decoded once by `apply`.
    Entry(Vec<u8>),
    Membership(Voters),
}

/// What is to be encoded, borrowed.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    Blank,
    Entry(&'a [u8]),
    Membership(&'a Voters),
}

/// Why stored bytes are not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    #[error("{0} bytes are too few for a record")]
    Short(usize),
    #[error("the checksum does not match")]
    Checksum,
    #[error("format version {0} is unknown")]
    Version(u8),
    #[error("record kind {0} is unknown")]
    Kind(u8),
    #[error("the body cannot be decoded")]
    Body,
    #[error("the record of index {found} stands at index {expected}")]
    Misplaced { expected: u64, found: u64 },
}

pub fn encode(position: Position, body: Body<'_>) -> Vec<u8> {
    let membership;
    let (kind, body): (u8, &[u8]) = match body {
        Body::Blank => (0, &[]),
        Body::Entry(bytes) => (1, bytes),
        Body::Membership(voters) => {
            membership = to_bytes(voters);
            (2, &membership)
        }
    };
    let mut out = Vec::with_capacity(HEAD_BYTES + body.len() + CHECKSUM_BYTES);
    out.extend_from_slice(&[VERSION, kind]);
    for number in [position.term, position.leader, position.index] {
        out.extend_from_slice(&number.to_be_bytes());
    }
    out.extend_from_slice(body);
    let checksum = checksum(&out);
    out.extend_from_slice(&checksum);
    out
}

/// Decodes the record that stands at `index`.
///
/// # Errors
/// When the bytes are not exactly what [`encode`] wrote for that index.
pub fn decode(index: u64, bytes: &[u8]) -> Result<Record, BadRecord> {
    if bytes.len() < HEAD_BYTES + CHECKSUM_BYTES {
        return Err(BadRecord::Short(bytes.len()));
    }
    let (content, stored) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    if checksum(content) != stored {
        return Err(BadRecord::Checksum);
    }
    if content[0] != VERSION {
        return Err(BadRecord::Version(content[0]));
    }
    let position = Position { term: number(content, 2), leader: number(content, 10), index: number(content, 18) };
    if position.index != index {
        return Err(BadRecord::Misplaced { expected: index, found: position.index });
    }
    let body = &content[HEAD_BYTES..];
    let payload = match content[1] {
        0 if body.is_empty() => Payload::Blank,
        0 => return Err(BadRecord::Body),
        1 => Payload::Entry(body.to_vec()),
        2 => Payload::Membership(from_bytes(body).ok_or(BadRecord::Body)?),
        other => return Err(BadRecord::Kind(other)),
    };
    Ok(Record { position, payload })
}

/// Postcard of one of this crate's own types, none of which postcard can refuse.
pub(crate) fn to_bytes<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("plain structures always encode")
}

/// `None` unless the bytes are exactly one value.
pub(crate) fn from_bytes<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Some(value),
        _ => None,
    }
}

fn checksum(content: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut out = [0; CHECKSUM_BYTES];
    out.copy_from_slice(&blake3::hash(content).as_bytes()[..CHECKSUM_BYTES]);
    out
}

fn number(content: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&content[at..at + 8]);
    u64::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POSITION: Position = Position { term: 3, leader: 2, index: 77 };

    #[test]
    fn a_record_reads_back_as_written() {
        let voters = Voters { sets: vec![[1, 2].into()], addresses: [(1, "a:1".into()), (2, "b:2".into())].into() };
        for (body, payload) in [
            (Body::Blank, Payload::Blank),
            (Body::Entry(b"xyz"), Payload::Entry(b"xyz".to_vec())),
            (Body::Membership(&voters), Payload::Membership(voters.clone())),
        ] {
            assert_eq!(decode(77, &encode(POSITION, body)), Ok(Record { position: POSITION, payload }));
        }
    }

    #[test]
    fn the_bytes_of_a_record_are_fixed() {
        let hex: String = encode(POSITION, Body::Entry(b"xyz")).iter().map(|b| format!("{b:02x}")).collect();
        let head = ["0101", "0000000000000003", "0000000000000002", "000000000000004d", "78797a"].concat();
        assert_eq!(hex[..58], head);
        assert_eq!(hex.len(), 2 * (HEAD_BYTES + 3 + CHECKSUM_BYTES));
    }

    #[test]
    fn every_changed_or_missing_byte_is_noticed() {
        let good = encode(POSITION, Body::Entry(b"xyz"));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(decode(77, &bad).is_err(), "flipped at {at}");
            assert!(decode(77, &good[..at]).is_err(), "cut at {at}");
        }
        assert_eq!(decode(78, &good), Err(BadRecord::Misplaced { expected: 78, found: 77 }));
    }
}
