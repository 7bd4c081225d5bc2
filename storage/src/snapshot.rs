//! Snapshots: a directory of files that RocksDB never changes again, with a manifest that says what they are.
//!
//! ```text
//! build:   building-N  ◄─ checkpoint (hard links) ─ manifest last ─► rename snapshot-INDEX-N
//! receive: incoming-N  ◄─ bytes of all files in order ─ each verified and synced ─► rename snapshot-INDEX-N
//! ```
//! A snapshot is streamed as its files, never as one value. The newest one is kept; an older one disappears when
//! nobody reads it any more. What an interrupted build or transfer leaves is removed at the next start.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use crate::{
    directory,
    failure::StorageError,
    record::{self, Membership, Position},
    state::{StateStore, Tables},
};

const MANIFEST: &str = "MANIFEST.trefoil";
const COMPLETE: &str = "snapshot-";
/// Read and sent at a time: large enough for the disk, small enough for a message.
pub const CHUNK_BYTES: usize = 1 << 20;
/// A state of 10 GiB in files of 64 MiB needs 160; more than this is not a snapshot of ours.
const MAX_FILES: usize = 10_000;
/// Left to the log while a snapshot is taken in: more than comes meanwhile.
const KEPT_FREE: u64 = 64 << 20;

/// What a snapshot holds. The files' bytes follow in this order when it is streamed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub applied: Option<Position>,
    pub membership: Membership,
    /// Of the state that loads from it.
    pub hash: [u8; 16],
    pub files: Vec<FileEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: String,
    pub size: u64,
    /// BLAKE3 of its bytes.
    pub digest: [u8; 32],
}

/// `DATA/snapshots`. Cheap to clone.
#[derive(Clone)]
pub struct SnapshotStore {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    next: AtomicU64,
    current: Mutex<Option<Snapshot>>,
}

/// A complete snapshot on this disk. Cheap to clone; a superseded one is deleted with its last clone.
#[derive(Clone, Debug)]
pub struct Snapshot {
    inner: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    path: PathBuf,
    manifest: Manifest,
    keep: AtomicBool,
}

impl SnapshotStore {
    /// Finds the newest complete snapshot of an earlier run and removes everything else.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        directory::create_directory(path)?;
        let mut best: Option<Snapshot> = None;
        let mut last_number = 0;
        for (name, path) in directory::entries(path)? {
            last_number = last_number.max(name.rsplit('-').next().and_then(|n| n.parse().ok()).unwrap_or(0));
            let manifest = if name.starts_with(COMPLETE) { read_manifest(&path) } else { None };
            let Some(manifest) = manifest else {
                directory::remove_directory(&path)?;
                continue;
            };
            let found = Snapshot::held(path, manifest);
            // From here on, so that an error of another entry does not cost the one that is good.
            found.inner.keep.store(true, Ordering::SeqCst);
            let (older, newer) = match best.take() {
                Some(other) if other.manifest().applied > found.manifest().applied => (Some(found), other),
                other => (other, found),
            };
            if let Some(older) = older {
                older.inner.keep.store(false, Ordering::SeqCst);
            }
            best = Some(newer);
        }
        let inner = Inner { path: path.into(), next: AtomicU64::new(last_number + 1), current: Mutex::new(best) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The newest complete snapshot.
    pub fn current(&self) -> Option<Snapshot> {
        self.lock().clone()
    }

    /// Makes a snapshot of the tables as they are now. Takes as long as reading them once, and does not stop them
    /// from changing.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn build(&self, tables: &StateStore) -> Result<Snapshot, StorageError> {
        let path = self.fresh("building")?;
        let marks = tables.checkpoint(&path)?;
        let mut files = Vec::new();
        for (name, path) in directory::entries(&path)? {
            if Part::of(&name) == Part::Content {
                files.push(measure(name, &path)?);
            }
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let manifest = Manifest { applied: marks.applied, membership: marks.membership, hash: marks.hash, files };
        let snapshot = self.complete(&path, manifest)?;
        self.adopt(&snapshot);
        Ok(snapshot)
    }

    /// Starts to receive a snapshot.
    ///
    /// # Errors
    /// When the manifest is not one of ours or the disk fails.
    pub fn receive(&self, manifest: Manifest) -> Result<Incoming, StorageError> {
        check_manifest(&manifest)?;
        self.check_room(&manifest)?;
        let path = self.fresh("incoming")?;
        fs::create_dir(&path).map_err(StorageError::file(&path))?;
        Ok(Incoming { store: self.clone(), path, manifest, at: 0, file: None, finished: false })
    }

    /// A snapshot that does not fit would fill the disk to the brim, again and again, and the log has its place there too.
    fn check_room(&self, manifest: &Manifest) -> Result<(), StorageError> {
        let found = nix::sys::statvfs::statvfs(&self.inner.path)
            .map_err(|error| StorageError::file(&self.inner.path)(io::Error::from_raw_os_error(error as i32)))?;
        let available = found.blocks_available() * found.fragment_size();
        let wanted = manifest.files.iter().map(|file| file.size).fold(KEPT_FREE, u64::saturating_add);
        if wanted > available {
            let what =
                format!("a snapshot needs {wanted} bytes with what is kept for the log, and {available} are free");
            return Err(StorageError::file(&self.inner.path)(io::Error::new(io::ErrorKind::StorageFull, what)));
        }
        Ok(())
    }

    /// Makes `snapshot` the current one, unless a newer one was adopted meanwhile; the older of the two goes.
    pub fn adopt(&self, snapshot: &Snapshot) {
        let mut current = self.lock();
        if current.as_ref().is_some_and(|newer| newer.manifest().applied > snapshot.manifest().applied) {
            return;
        }
        snapshot.inner.keep.store(true, Ordering::SeqCst);
        let old = current.replace(snapshot.clone());
        drop(current);
        if let Some(old) = old.filter(|old| old.inner.path != snapshot.inner.path) {
            old.inner.keep.store(false, Ordering::SeqCst);
        }
    }

    fn complete(&self, path: &Path, manifest: Manifest) -> Result<Snapshot, StorageError> {
        directory::replace_file(&path.join(MANIFEST), &sealed(&manifest))?;
        let number = self.inner.next.fetch_add(1, Ordering::SeqCst);
        let index = manifest.applied.map_or(0, |p| p.index);
        let place = self.inner.path.join(format!("{COMPLETE}{index}-{number}"));
        fs::rename(path, &place).map_err(StorageError::file(&place))?;
        directory::sync_directory(&self.inner.path)?;
        Ok(Snapshot::held(place, manifest))
    }

    fn fresh(&self, kind: &str) -> Result<PathBuf, StorageError> {
        let number = self.inner.next.fetch_add(1, Ordering::SeqCst);
        let path = self.inner.path.join(format!("{kind}-{number}"));
        directory::remove_directory(&path)?;
        Ok(path)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Snapshot>> {
        self.inner.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Snapshot {
    fn held(path: PathBuf, manifest: Manifest) -> Self {
        Self { inner: Arc::new(Held { path, manifest, keep: AtomicBool::new(false) }) }
    }

    pub fn manifest(&self) -> &Manifest {
        &self.inner.manifest
    }

    /// Its files' bytes, in the order of the manifest, in chunks of at most [`CHUNK_BYTES`].
    pub fn chunks(&self) -> Chunks {
        Chunks { snapshot: self.clone(), at: 0, file: None }
    }

    /// Makes `path` a directory that RocksDB may open and change: tables are linked, because they never change; the
    /// few small files that may are copied.
    pub(crate) fn link_into(&self, path: &Path) -> Result<(), StorageError> {
        directory::create_directory(path)?;
        for file in &self.inner.manifest.files {
            let (from, to) = (self.inner.path.join(&file.name), path.join(&file.name));
            if file.name.ends_with(".sst") {
                fs::hard_link(&from, &to).map_err(StorageError::file(&to))?;
            } else {
                let copy = || -> std::io::Result<()> {
                    fs::copy(&from, &to)?;
                    File::open(&to)?.sync_all()
                };
                copy().map_err(StorageError::file(&to))?;
            }
        }
        directory::sync_directory(path)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.keep.load(Ordering::SeqCst)
            && let Err(error) = directory::remove_directory(&self.path)
        {
            tracing::warn!(%error, "an old snapshot could not be removed");
        }
    }
}

/// Reads a snapshot for sending.
pub struct Chunks {
    snapshot: Snapshot,
    at: usize,
    file: Option<File>,
}

impl Iterator for Chunks {
    type Item = Result<Vec<u8>, StorageError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let entry = self.snapshot.inner.manifest.files.get(self.at)?;
            let path = self.snapshot.inner.path.join(&entry.name);
            let mut read = || -> std::io::Result<Vec<u8>> {
                let file = match &mut self.file {
                    Some(file) => file,
                    none => none.insert(File::open(&path)?),
                };
                let mut chunk = Vec::with_capacity(CHUNK_BYTES);
                file.take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
                Ok(chunk)
            };
            match read() {
                Ok(chunk) if chunk.is_empty() => {
                    self.file = None;
                    self.at += 1;
                }
                Ok(chunk) => return Some(Ok(chunk)),
                Err(error) => return Some(Err(StorageError::file(path)(error))),
            }
        }
    }
}

/// A snapshot on its way in. Dropped before it is complete, it leaves nothing.
pub struct Incoming {
    store: SnapshotStore,
    path: PathBuf,
    manifest: Manifest,
    at: usize,
    file: Option<Writing>,
    finished: bool,
}

struct Writing {
    file: File,
    left: u64,
    hasher: blake3::Hasher,
}

impl Incoming {
    /// Takes the next bytes; they may span files.
    ///
    /// # Errors
    /// When a file is complete and not what the manifest says, when there are too many bytes, or the disk fails.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), StorageError> {
        while !bytes.is_empty() {
            let Some(entry) = self.manifest.files.get(self.at) else {
                return Err(StorageError::BadSnapshot("more bytes came than the manifest says".into()));
            };
            let path = self.path.join(&entry.name);
            let writing = match &mut self.file {
                Some(writing) => writing,
                none => none.insert(Writing::create(&path, entry.size)?),
            };
            let take = usize::try_from(writing.left).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(take);
            writing.hasher.update(now);
            writing.left -= take as u64;
            writing.file.write_all(now).map_err(StorageError::file(&path))?;
            bytes = later;
            if writing.left == 0 {
                self.close()?;
            }
        }
        Ok(())
    }

    /// Checks that everything came and makes it a snapshot; it becomes the current one when it is adopted.
    ///
    /// # Errors
    /// When something is missing or damaged, or the disk fails.
    pub fn finish(mut self) -> Result<Snapshot, StorageError> {
        // Empty files have no bytes that would complete them.
        while self.file.is_none() && self.manifest.files.get(self.at).is_some_and(|f| f.size == 0) {
            let path = self.path.join(&self.manifest.files[self.at].name);
            self.file = Some(Writing::create(&path, 0)?);
            self.close()?;
        }
        if self.at < self.manifest.files.len() {
            return Err(StorageError::BadSnapshot("it is incomplete".into()));
        }
        directory::sync_directory(&self.path)?;
        let marks = Tables::open_read_only(&self.path)?.marks()?;
        let same = marks.applied == self.manifest.applied
            && marks.membership == self.manifest.membership
            && marks.hash == self.manifest.hash;
        if !same {
            return Err(StorageError::BadSnapshot("its tables are not what its manifest says".into()));
        }
        let snapshot = self.store.complete(&self.path, self.manifest.clone())?;
        self.finished = true;
        Ok(snapshot)
    }

    fn close(&mut self) -> Result<(), StorageError> {
        let (Some(writing), Some(entry)) = (self.file.take(), self.manifest.files.get(self.at)) else { return Ok(()) };
        if writing.hasher.finalize().as_bytes() != &entry.digest {
            return Err(StorageError::BadSnapshot(format!("'{}' was damaged on its way", entry.name)));
        }
        writing.file.sync_all().map_err(StorageError::file(self.path.join(&entry.name)))?;
        self.at += 1;
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = directory::remove_directory(&self.path)
        {
            tracing::warn!(%error, "an incomplete snapshot could not be removed");
        }
    }
}

impl Writing {
    fn create(path: &Path, size: u64) -> Result<Self, StorageError> {
        let file = File::create(path).map_err(StorageError::file(path))?;
        Ok(Self { file, left: size, hasher: blake3::Hasher::new() })
    }
}

/// Which files of a checkpoint belong to the snapshot. RocksDB writes its own journal and a lock beside them.
#[derive(PartialEq, Eq)]
enum Part {
    Content,
    Other,
}

impl Part {
    fn of(name: &str) -> Self {
        let content = name.ends_with(".sst")
            || name == "CURRENT"
            || ["MANIFEST-", "OPTIONS-"].iter().any(|prefix| name.starts_with(prefix));
        let plain = name.len() < 100 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if content && plain { Self::Content } else { Self::Other }
    }
}

fn measure(name: String, path: &Path) -> Result<FileEntry, StorageError> {
    let mut hasher = blake3::Hasher::new();
    let size = File::open(path)
        .and_then(|file| std::io::copy(&mut std::io::BufReader::with_capacity(CHUNK_BYTES, file), &mut hasher))
        .map_err(StorageError::file(path))?;
    Ok(FileEntry { name, size, digest: *hasher.finalize().as_bytes() })
}

fn check_manifest(manifest: &Manifest) -> Result<(), StorageError> {
    let names: std::collections::BTreeSet<&str> = manifest.files.iter().map(|f| f.name.as_str()).collect();
    let sound = manifest.files.len() <= MAX_FILES
        && names.len() == manifest.files.len()
        && names.iter().all(|name| Part::of(name) == Part::Content);
    if sound { Ok(()) } else { Err(StorageError::BadSnapshot("its manifest names files that are not its own".into())) }
}

/// The manifest with its own digest in front.
fn sealed(manifest: &Manifest) -> Vec<u8> {
    let bytes = record::to_bytes(manifest);
    [blake3::hash(&bytes).as_bytes().as_slice(), &bytes].concat()
}

/// `None` for a directory without an intact manifest: it was never complete.
fn read_manifest(path: &Path) -> Option<Manifest> {
    let bytes = fs::read(path.join(MANIFEST)).ok()?;
    let (digest, content) = bytes.split_at_checked(blake3::OUT_LEN)?;
    if blake3::hash(content).as_bytes() != digest {
        return None;
    }
    record::from_bytes(content)
}

#[cfg(test)]
mod tests;
