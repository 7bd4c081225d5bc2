//! The file that `trefoil quorum backup` writes: the whole state of a cloud at one log index, and what else a new quorum
//! needs so that hosts and people know it again.
//!
//! ```text
//! file   = "trefoil quorum backup 1\n" | frame* | end | digest
//! frame  = length u32 big-endian, not 0 | postcard: first the Header, then lists of rows (table, key, row)
//! end    = 0 u32                          digest = BLAKE3 of everything before it
//! ```
//! The bytes are the same in the call and in the file. They hold the key of the cloud's authority, so whoever has the
//! file can sign identities: it is as secret as a controller's directory.
//!
//! Deliberately not here: the log, whose entries the rows are the outcome of; images, which are on the hosts.

use std::io::{self, Read};

use model::{State, Timestamp, invariant, level};
use serde::{Deserialize, Serialize};

const MAGIC: &[u8] = b"trefoil quorum backup 1\n";
/// Rows are gathered until a frame has about this much: a message of the call, a few of which are under way.
const FRAME_BYTES: usize = 256 << 10;
/// A frame longer than this is none of ours: no row comes near it.
const MOST_FRAME_BYTES: usize = 16 << 20;

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub cluster: String,
    pub epoch: u64,
    pub level: u32,
    /// Of the last entry that is in it.
    pub index: u64,
    pub term: u64,
    /// Of the state that loads from it.
    pub hash: [u8; 16],
    pub made_at: Timestamp,
    pub rows: u64,
    pub ca_pem: String,
    pub ca_key_pem: String,
}

/// A backup that was read whole and holds what it says.
pub struct Backup {
    pub header: Header,
    pub state: State,
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it is not a backup of a quorum, or one of another format")]
    Foreign,
    #[error("it is incomplete")]
    Incomplete,
    #[error("it is damaged: {0}")]
    Damaged(String),
    #[error("it is at feature level {level}, and this version of trefoil knows up to {known}: use a newer version")]
    TooNew { level: u32, known: u32 },
    #[error("the state in it breaks a rule: {0}")]
    Rule(String),
}

type Rows = Vec<(u8, Vec<u8>, Vec<u8>)>;

/// The bytes of a backup of `state`, in pieces as they are to be sent.
pub fn pieces(header: &Header, state: &State) -> impl Iterator<Item = Vec<u8>> {
    let mut hasher = blake3::Hasher::new();
    let mut rows = state.rows();
    let first = [MAGIC, &frame(header)].concat();
    let mut next = Some(first);
    std::iter::from_fn(move || {
        let piece = next.take()?;
        hasher.update(&piece);
        let mut gathered = Rows::new();
        let mut bytes = 0;
        for change in rows.by_ref() {
            let row = change.row.unwrap_or_default();
            bytes += change.key.len() + row.len();
            gathered.push((change.table, change.key, row));
            if bytes >= FRAME_BYTES {
                break;
            }
        }
        if !gathered.is_empty() {
            next = Some(frame(&gathered));
            return Some(piece);
        }
        let end = 0_u32.to_be_bytes();
        hasher.update(&end);
        Some([&piece[..], &end, hasher.finalize().as_bytes()].concat())
    })
}

/// Reads a backup and believes nothing in it: its digest, its rows, the hash of the state that they come to, and that
/// state's own rules are checked. `progress` hears how many bytes were read.
///
/// # Errors
/// See [`BackupError`].
pub fn read(source: impl Read, progress: impl Fn(u64)) -> Result<Backup, BackupError> {
    let mut source = Source { inner: source, hasher: blake3::Hasher::new(), bytes: 0 };
    if source.take(MAGIC.len())? != MAGIC {
        return Err(BackupError::Foreign);
    }
    let header = source.frame()?.ok_or(BackupError::Incomplete)?;
    let header: Header = decode(&header)?;
    if header.level > level::LATEST {
        return Err(BackupError::TooNew { level: header.level, known: level::LATEST });
    }
    let mut rows = Rows::new();
    while let Some(bytes) = source.frame()? {
        rows.extend(decode::<Rows>(&bytes)?);
        progress(source.bytes);
    }
    let expected = *source.hasher.finalize().as_bytes();
    if source.take(blake3::OUT_LEN)? != expected {
        return Err(BackupError::Damaged("its digest is another".into()));
    }
    if source.inner.read(&mut [0])? != 0 {
        return Err(BackupError::Damaged("something follows its end".into()));
    }
    if rows.len() as u64 != header.rows {
        return Err(BackupError::Damaged(format!("it has {} rows and says {}", rows.len(), header.rows)));
    }
    let state = State::load(rows.into_iter()).map_err(|error| BackupError::Damaged(error.to_string()))?;
    let quorum = state.quorum();
    let told = (header.hash, header.cluster.as_str(), header.epoch, header.level);
    if told != (state.hash(), state.cluster().id.as_str(), quorum.epoch, quorum.level) {
        return Err(BackupError::Damaged("its state is not the one that its header speaks of".into()));
    }
    invariant::check(&state).map_err(BackupError::Rule)?;
    progress(source.bytes);
    Ok(Backup { header, state, bytes: source.bytes })
}

struct Source<R> {
    inner: R,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<R: Read> Source<R> {
    fn take(&mut self, length: usize) -> Result<Vec<u8>, BackupError> {
        let mut bytes = Vec::new();
        // Grows with what is there, not with what a damaged length says.
        self.inner.by_ref().take(length as u64).read_to_end(&mut bytes)?;
        if bytes.len() < length {
            return Err(if self.bytes == 0 { BackupError::Foreign } else { BackupError::Incomplete });
        }
        self.hasher.update(&bytes);
        self.bytes += length as u64;
        Ok(bytes)
    }

    /// `None` at the end.
    fn frame(&mut self) -> Result<Option<Vec<u8>>, BackupError> {
        let length = self.take(4)?;
        let length = length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        match length {
            0 => Ok(None),
            1..=MOST_FRAME_BYTES => self.take(length).map(Some),
            _ => Err(BackupError::Damaged(format!("a part of {length} bytes"))),
        }
    }
}

fn frame<T: Serialize>(value: &T) -> Vec<u8> {
    let bytes = postcard::to_stdvec(value).expect("a backup has no type that postcard refuses");
    let length = u32::try_from(bytes.len()).expect("a frame is far below 4 GiB");
    [&length.to_be_bytes()[..], &bytes].concat()
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, BackupError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok(_) | Err(_) => Err(BackupError::Damaged("a part of it cannot be decoded".into())),
    }
}

#[cfg(test)]
mod tests {
    use model::{Actor, Command, Digest, Entry, OperatorCommand, PlannerCommand};

    use super::*;

    fn sample() -> (Header, State) {
        let mut state = State::default();
        let found = PlannerCommand::Found {
            cluster: "cloud".into(),
            controller: "one".into(),
            address: "192.0.2.1:7470".into(),
            operator: "root".into(),
            token: Digest([9; 32]),
        };
        let raise = Command::Operator(OperatorCommand::RaiseLevel { level: 2 });
        for (index, command) in [(1, Command::Planner(found)), (2, raise)] {
            let entry = Entry { at: Timestamp(7), request: None, actor: Actor::System, command };
            state.apply(index, &entry).unwrap();
        }
        state.drain_changes();
        let header = Header {
            cluster: "cloud".into(),
            epoch: 0,
            level: 2,
            index: 2,
            term: 1,
            hash: state.hash(),
            made_at: Timestamp(8),
            rows: state.rows().count() as u64,
            ca_pem: "certificate".into(),
            ca_key_pem: "key".into(),
        };
        (header, state)
    }

    fn bytes(header: &Header, state: &State) -> Vec<u8> {
        pieces(header, state).flatten().collect()
    }

    #[test]
    fn what_was_written_is_read_back() {
        let (header, state) = sample();
        let bytes = bytes(&header, &state);
        let read = read(&bytes[..], |_| {}).unwrap();
        assert!(read.header == header);
        assert_eq!((read.state.hash(), read.bytes), (state.hash(), bytes.len() as u64));
        assert_eq!(read.state.kept_index(), state.kept_index());
    }

    #[test]
    fn every_changed_missing_or_added_byte_is_noticed() {
        let (header, state) = sample();
        let good = bytes(&header, &state);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(read(&bad[..], |_| {}).is_err(), "flipped at {at}");
            assert!(read(&good[..at], |_| {}).is_err(), "cut at {at}");
        }
        assert!(matches!(read(&[&good[..], &[0]].concat()[..], |_| {}), Err(BackupError::Damaged(_))));
        assert!(matches!(read(&b"something else altogether"[..], |_| {}), Err(BackupError::Foreign)));
    }

    #[test]
    fn a_header_that_tells_another_story_is_not_believed() {
        let (header, state) = sample();
        let other = Header { hash: [1; 16], ..header.clone() };
        assert!(matches!(read(&bytes(&other, &state)[..], |_| {}), Err(BackupError::Damaged(_))));
        let newer = Header { level: 99, ..header.clone() };
        assert!(matches!(read(&bytes(&newer, &state)[..], |_| {}), Err(BackupError::TooNew { level: 99, .. })));
        let fewer = Header { rows: 1, ..header };
        assert!(matches!(read(&bytes(&fewer, &state)[..], |_| {}), Err(BackupError::Damaged(_))));
    }
}
