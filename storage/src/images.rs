//! Content-addressed blobs of a host: `DIR/images/<blake3 hex>`, written once and never changed.
//!
//! A blob appears under its name only after all of it was written, hashed and synced, so that a crash at any moment
//! leaves either the whole blob or a `.partial` beside it, which the next writer takes up where it ended. Whoever
//! opens a blob gets bytes that were hashed by this process: a file that changed since is hashed again.
//!
//! Calls block. Deliberately not here: who wants which blob (`model::steps`) and how bytes travel (`nodeagent`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use model::Digest;

/// Bytes read at a time when a blob is hashed: large enough that the system call costs nothing beside the hash.
const READ_BYTES: usize = 256 << 10;
/// Blobs are read by the hypervisor's own user, and written by nobody.
const BLOB_MODE: u32 = 0o444;
const PARTIAL: &str = ".partial";

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("image {0} is not in this store")]
    Missing(Digest),
    #[error("image {wanted} was damaged: its bytes hash to {found}; the file was removed")]
    Damaged { wanted: Digest, found: Digest },
    #[error("image {digest} should have {wanted} bytes, but {found} came")]
    Length { digest: Digest, wanted: u64, found: u64 },
    #[error("image {0} is being written by another transfer")]
    Busy(Digest),
    #[error("no room for {needed} bytes: {available} are free and {reserve} are kept in reserve")]
    NoRoom { needed: u64, available: u64, reserve: u64 },
    #[error("{what} {}: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

pub type Result<T> = std::result::Result<T, ImageError>;

/// A store under one directory. Only one process may use it; any number of threads.
#[derive(Clone)]
pub struct ImageStore {
    dir: PathBuf,
    reserve_bytes: u64,
    books: Arc<Mutex<Books>>,
}

#[derive(Default)]
struct Books {
    /// Files that this process has hashed, as they were then.
    verified: BTreeMap<Digest, Stamp>,
    used: BTreeMap<Digest, Instant>,
    writing: BTreeSet<Digest>,
}

/// A file that was hashed is taken as unchanged while these are equal.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &fs::Metadata) -> Self {
        Self {
            inode: file.ino(),
            size: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}

/// A blob that is in the store; whether its bytes are good is known when it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub digest: Digest,
    pub size_bytes: u64,
    /// Since when nobody has written or used it.
    pub idle: Duration,
}

/// What `begin` found.
pub enum Begun {
    /// The verified blob is there already.
    Held(PathBuf),
    Writing(Incoming),
}

impl ImageStore {
    /// # Errors
    /// When `dir/images` cannot be made.
    pub fn open(dir: &Path, reserve_bytes: u64) -> Result<Self> {
        let dir = dir.join("images");
        fs::create_dir_all(&dir).map_err(io_error("make", &dir))?;
        Ok(Self { dir, reserve_bytes, books: Arc::default() })
    }

    /// The blob's file, verified.
    ///
    /// # Errors
    /// `Missing`; `Damaged`, and then the file is gone; `Io`.
    pub fn verified(&self, digest: Digest) -> Result<PathBuf> {
        let path = self.blob(digest);
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ImageError::Missing(digest)),
            other => other.map_err(io_error("open", &path))?,
        };
        let stamp = Stamp::of(&file.metadata().map_err(io_error("look at", &path))?);
        if self.books().verified.get(&digest) == Some(&stamp) {
            return Ok(path);
        }
        let mut hasher = blake3::Hasher::new();
        hash_into(&mut hasher, &mut file).map_err(io_error("read", &path))?;
        let found = Digest(*hasher.finalize().as_bytes());
        if found != digest {
            let mut books = self.books();
            // While this one was read, somebody else may have found the same and put a good one in its place.
            if fs::metadata(&path).is_ok_and(|file| Stamp::of(&file).inode == stamp.inode) {
                books.verified.remove(&digest);
                fs::remove_file(&path).map_err(io_error("remove", &path))?;
            }
            return Err(ImageError::Damaged { wanted: digest, found });
        }
        self.books().verified.insert(digest, stamp);
        Ok(path)
    }

    /// The verified bytes to read, and how many there are.
    ///
    /// # Errors
    /// As `verified`.
    pub fn read(&self, digest: Digest) -> Result<(File, u64)> {
        let path = self.verified(digest)?;
        self.touch(digest);
        let file = File::open(&path).map_err(io_error("open", &path))?;
        let size = file.metadata().map_err(io_error("look at", &path))?.size();
        Ok((file, size))
    }

    /// It was used just now: it is idle from here on.
    pub fn touch(&self, digest: Digest) {
        self.books().used.insert(digest, Instant::now());
    }

    /// Every blob that is here, by digest.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Held>> {
        let mut held = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io_error("list", &self.dir))? {
            let entry = entry.map_err(io_error("list", &self.dir))?;
            let Some(digest) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // Gone between the two calls: then it is not held.
            let Ok(file) = entry.metadata() else { continue };
            held.push(Held { digest, size_bytes: file.size(), idle: self.idle(digest, &file) });
        }
        held.sort_by_key(|blob| blob.digest);
        Ok(held)
    }

    /// Start to write a blob of `size_bytes`, or go on where an earlier writer ended.
    ///
    /// # Errors
    /// `Busy` while another transfer writes it; `NoRoom`; `Io`.
    pub fn begin(&self, digest: Digest, size_bytes: u64) -> Result<Begun> {
        match self.verified(digest) {
            Ok(path) => {
                self.touch(digest);
                return Ok(Begun::Held(path));
            }
            Err(ImageError::Missing(_)) => {}
            Err(ImageError::Damaged { found, .. }) => {
                tracing::error!(%digest, %found, "a stored image was damaged and is written anew")
            }
            Err(other) => return Err(other),
        }
        let claim = Claim::take(self, digest)?;
        let path = self.partial(digest);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        if file.metadata().map_err(io_error("look at", &path))?.size() > size_bytes {
            file.set_len(0).map_err(io_error("cut", &path))?;
        }
        let mut hasher = Box::new(blake3::Hasher::new());
        let offset = hash_into(&mut hasher, &mut file).map_err(io_error("read", &path))?;
        file.seek(SeekFrom::Start(offset)).map_err(io_error("seek in", &path))?;
        self.check_room(size_bytes - offset)?;
        Ok(Begun::Writing(Incoming { file, path, hasher, offset, size_bytes, claim }))
    }

    /// Take in a file of this host as a blob: hashed, synced, and moved here. The file is gone afterwards; on another
    /// file system than the store's it stays until it was copied.
    ///
    /// # Errors
    /// `NoRoom`, when it must be copied; `Busy`; `Io`.
    pub fn adopt(&self, file: &Path) -> Result<Held> {
        let mut source = File::open(file).map_err(io_error("open", file))?;
        let mut hasher = blake3::Hasher::new();
        let size_bytes = hash_into(&mut hasher, &mut source).map_err(io_error("read", file))?;
        let digest = Digest(*hasher.finalize().as_bytes());
        match self.verified(digest) {
            Ok(_) => fs::remove_file(file).map_err(io_error("remove", file))?,
            Err(ImageError::Missing(_) | ImageError::Damaged { .. }) => {
                self.take_in(file, source, digest, size_bytes)?
            }
            Err(other) => return Err(other),
        }
        self.touch(digest);
        Ok(Held { digest, size_bytes, idle: Duration::ZERO })
    }

    /// The blob's own name is given last, to bytes that are synced: whatever moment a crash picks, it is whole or not
    /// there.
    fn take_in(&self, file: &Path, mut source: File, digest: Digest, size_bytes: u64) -> Result<()> {
        let claim = Claim::take(self, digest)?;
        let partial = self.partial(digest);
        match fs::rename(file, &partial) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                drop(claim);
                return self.copy_in(file, source, digest, size_bytes);
            }
            Err(error) => return Err(io_error("rename", file)(error)),
        }
        // Owned by whoever wrote it, perhaps a guest's process: from now on nobody may.
        source.set_permissions(fs::Permissions::from_mode(BLOB_MODE)).map_err(io_error("protect", &partial))?;
        let mut hasher = Box::new(blake3::Hasher::new());
        // Once more, for it could be written until now.
        source.rewind().map_err(io_error("seek in", &partial))?;
        let offset = hash_into(&mut hasher, &mut source).map_err(io_error("read", &partial))?;
        Incoming { file: source, path: partial, hasher, offset, size_bytes, claim }.finish().map(drop)
    }

    fn copy_in(&self, file: &Path, mut source: File, digest: Digest, size_bytes: u64) -> Result<()> {
        if let Begun::Writing(mut incoming) = self.begin(digest, size_bytes)? {
            incoming.restart()?;
            source.rewind().map_err(io_error("seek in", file))?;
            let mut buffer = vec![0; READ_BYTES];
            loop {
                match source.read(&mut buffer).map_err(io_error("read", file))? {
                    0 => break,
                    n => incoming.write(&buffer[..n])?,
                }
            }
            incoming.finish()?;
        }
        fs::remove_file(file).map_err(io_error("remove", file))
    }

    /// Delete a blob if it has been idle for at least `idle`; says whether it is gone.
    ///
    /// # Errors
    /// When the file cannot be deleted.
    pub fn remove(&self, digest: Digest, idle: Duration) -> Result<bool> {
        let path = self.blob(digest);
        // Held until the file is gone, so that nobody begins to rely on it in between.
        let mut books = self.books();
        let Ok(file) = fs::metadata(&path) else { return Ok(true) };
        if books.writing.contains(&digest) || idle_since(books.used.get(&digest), &file) < idle {
            return Ok(false);
        }
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
        books.verified.remove(&digest);
        books.used.remove(&digest);
        Ok(true)
    }

    /// Delete what transfers left behind that nobody has taken up for `idle`.
    ///
    /// # Errors
    /// When the directory cannot be read or a file not be deleted.
    pub fn sweep(&self, idle: Duration) -> Result<()> {
        for entry in fs::read_dir(&self.dir).map_err(io_error("list", &self.dir))? {
            let entry = entry.map_err(io_error("list", &self.dir))?;
            let name = entry.file_name();
            let Some(digest) = name.to_str().and_then(|name| name.strip_suffix(PARTIAL)?.parse().ok()) else {
                continue;
            };
            let Ok(file) = entry.metadata() else { continue };
            let books = self.books();
            if !books.writing.contains(&digest) && idle_since(None, &file) >= idle {
                fs::remove_file(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    fn check_room(&self, needed: u64) -> Result<()> {
        let found = nix::sys::statvfs::statvfs(&self.dir)
            .map_err(|error| io_error("measure", &self.dir)(io::Error::from_raw_os_error(error as i32)))?;
        let available = found.blocks_available() * found.fragment_size();
        if available.saturating_sub(needed) < self.reserve_bytes {
            return Err(ImageError::NoRoom { needed, available, reserve: self.reserve_bytes });
        }
        Ok(())
    }

    fn idle(&self, digest: Digest, file: &fs::Metadata) -> Duration {
        idle_since(self.books().used.get(&digest), file)
    }

    fn blob(&self, digest: Digest) -> PathBuf {
        self.dir.join(digest.to_string())
    }

    fn partial(&self, digest: Digest) -> PathBuf {
        self.dir.join(format!("{digest}{PARTIAL}"))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // The books are sound after a panic: every change to them is one call.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to write one blob.
struct Claim {
    store: ImageStore,
    digest: Digest,
}

impl Claim {
    fn take(store: &ImageStore, digest: Digest) -> Result<Self> {
        if !store.books().writing.insert(digest) {
            return Err(ImageError::Busy(digest));
        }
        Ok(Self { store: store.clone(), digest })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.store.books().writing.remove(&self.digest);
    }
}

/// A blob on its way in. Dropped unfinished, what came so far stays for the next writer.
pub struct Incoming {
    file: File,
    path: PathBuf,
    /// Boxed for its 2 KB.
    hasher: Box<blake3::Hasher>,
    offset: u64,
    size_bytes: u64,
    claim: Claim,
}

impl Incoming {
    /// How many bytes are there: the next one that is wanted.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub fn is_complete(&self) -> bool {
        self.offset == self.size_bytes
    }

    /// Begin again: what an earlier writer left is not trusted, or does not continue.
    ///
    /// # Errors
    /// `Io`.
    pub fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(io_error("cut", &self.path))?;
        self.file.rewind().map_err(io_error("seek in", &self.path))?;
        self.hasher.reset();
        self.offset = 0;
        Ok(())
    }

    /// # Errors
    /// `Length` when more bytes come than were announced; `Io`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.offset + bytes.len() as u64;
        if end > self.size_bytes {
            return Err(ImageError::Length { digest: self.claim.digest, wanted: self.size_bytes, found: end });
        }
        self.file.write_all(bytes).map_err(io_error("write", &self.path))?;
        self.hasher.update(bytes);
        self.offset = end;
        Ok(())
    }

    /// Verify, sync, and give it its name. After an error other than `Length` the bytes are discarded: a file whose
    /// sync failed must not be synced again, and one that hashes to something else is of no use.
    ///
    /// # Errors
    /// `Length` when bytes are missing; `Damaged`; `Io`.
    pub fn finish(self) -> Result<PathBuf> {
        let digest = self.claim.digest;
        if !self.is_complete() {
            return Err(ImageError::Length { digest, wanted: self.size_bytes, found: self.offset });
        }
        let found = Digest(*self.hasher.finalize().as_bytes());
        let stored = if found == digest { self.publish() } else { Err(ImageError::Damaged { wanted: digest, found }) };
        if stored.is_err() {
            // It may be half renamed or gone already; a leftover is swept later.
            let _ = fs::remove_file(&self.path);
        }
        stored
    }

    fn publish(&self) -> Result<PathBuf> {
        let store = &self.claim.store;
        let blob = store.blob(self.claim.digest);
        self.file.set_permissions(fs::Permissions::from_mode(BLOB_MODE)).map_err(io_error("protect", &self.path))?;
        self.file.sync_all().map_err(io_error("sync", &self.path))?;
        fs::rename(&self.path, &blob).map_err(io_error("rename", &self.path))?;
        File::open(&store.dir).and_then(|dir| dir.sync_all()).map_err(io_error("sync", &store.dir))?;
        let stamp = Stamp::of(&self.file.metadata().map_err(io_error("look at", &blob))?);
        let mut books = store.books();
        books.verified.insert(self.claim.digest, stamp);
        books.used.insert(self.claim.digest, Instant::now());
        Ok(blob)
    }
}

/// Reads to the end; says how many bytes there were.
fn hash_into(hasher: &mut blake3::Hasher, file: &mut File) -> io::Result<u64> {
    let mut buffer = vec![0; READ_BYTES];
    let mut total = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                total += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The shorter of the time since it was written and the time since this process used it. A clock that was set back
/// makes a blob look young, never old.
fn idle_since(used: Option<&Instant>, file: &fs::Metadata) -> Duration {
    let written = file.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok()).unwrap_or_default();
    used.map_or(written, |at| at.elapsed().min(written))
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ImageError + 'a {
    move |source| ImageError::Io { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;
