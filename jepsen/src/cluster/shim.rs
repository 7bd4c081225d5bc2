//! What stands between a controller and its disk and clocks: a small library, preloaded, that does what a page of
//! shared memory says. So one process of a machine can have a full disk, a failing sync, a power cut or a wrong clock.
//!
//! A power cut is SIGKILL, and then every file of the controller is cut to what its last successful sync covered. Not
//! imitated: a directory that was not synced, whose new names a real power cut could lose; and a torn sector, which the
//! tests of `storage` have.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};

const SOURCE: &str = include_str!("shim/shim.c");

/// Places in the page, in 64-bit numbers; `shim.c` has the same in its `struct page`.
const CURRENT: u64 = 0;
const CLOCKS: u64 = 1;
const NUMBERS_PER_SET: u64 = 6;
const SYNC_MODE: u64 = 13;
const SYNC_MICROS: u64 = 14;
const FAILED: u64 = 15;
const PRETENDED: u64 = 16;
const SLOWED: u64 = 17;
const FULL: u64 = 18;
const REFUSED: u64 = 19;
const READINGS: u64 = 20;
const PAGE_BYTES: u64 = 4096;

/// What the syncs of the Raft log do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syncs {
    Pass = 0,
    /// The next one fails, and all later ones are said to have succeeded and do nothing, as the kernel does with pages
    /// that it marked clean.
    FailOnce = 1,
    Slow = 3,
}

/// How one clock differs from the machine's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Skew {
    offset_nanos: i64,
    /// How much faster it goes, in millionths, since `base_nanos` on the machine's clock.
    rate_ppm: i64,
    base_nanos: i64,
}

/// What a power cut took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    pub bytes: u64,
    pub files: usize,
}

/// One controller's.
pub struct Shim {
    preloaded: PathBuf,
    page: PathBuf,
    synced: PathBuf,
    data: PathBuf,
    file: File,
}

impl Shim {
    /// Why this machine cannot have one, if it cannot.
    pub fn obstacle() -> Option<String> {
        let found = Command::new("cc").arg("--version").output();
        found.err().map(|error| format!("no C compiler 'cc': {error}"))
    }

    /// Compiles the library into `folder`.
    ///
    /// # Errors
    /// When the compiler refuses.
    pub fn compile(folder: &Path) -> anyhow::Result<PathBuf> {
        let (source, library) = (folder.join("shim.c"), folder.join("shim.so"));
        std::fs::write(&source, SOURCE)?;
        let arguments = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"].map(OsStr::new);
        let compiled = Command::new("cc").args(arguments).arg(&library).arg(&source).output()?;
        anyhow::ensure!(compiled.status.success(), "cc: {}", String::from_utf8_lossy(&compiled.stderr));
        Ok(library)
    }

    /// For the controller whose files are in `data`; its page and its list of syncs are made in `folder`.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn new(library: &Path, folder: &Path, name: &str, data: &Path) -> std::io::Result<Self> {
        let page = folder.join(format!("{name}.shim"));
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&page)?;
        file.set_len(PAGE_BYTES)?;
        let synced = folder.join(format!("{name}.synced"));
        // The kernel names an open file by its real path.
        Ok(Self { preloaded: library.into(), page, synced, data: data.canonicalize()?, file })
    }

    /// What the controller needs in its environment.
    pub(super) fn environment(&self) -> [(&str, &OsStr); 4] {
        [
            ("LD_PRELOAD", self.preloaded.as_os_str()),
            ("TREFOIL_SHIM", self.page.as_os_str()),
            ("TREFOIL_SHIM_DATA", self.data.as_os_str()),
            ("TREFOIL_SHIM_SYNCED", self.synced.as_os_str()),
        ]
    }

    /// # Errors
    /// When the page cannot be written.
    pub fn set_syncs(&self, syncs: Syncs, slower_by_micros: i64) -> std::io::Result<()> {
        self.set(SYNC_MICROS, slower_by_micros)?;
        self.set(SYNC_MODE, syncs as i64)
    }

    /// Whether every write to the disk fails, for want of space.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub fn set_full(&self, full: bool) -> std::io::Result<()> {
        self.set(FULL, i64::from(full))
    }

    /// The wall clock jumps, and the monotonic ones go at another rate from now on.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub fn begin_skew(&self, wall_nanos: i64, monotonic_ppm: i64) -> anyhow::Result<()> {
        let (now, so_far) = self.monotonic()?;
        let wall = Skew { offset_nanos: wall_nanos, ..Skew::default() };
        self.set_clocks(wall, Skew { offset_nanos: so_far, rate_ppm: monotonic_ppm, base_nanos: now })
    }

    /// The wall clock is right again. The monotonic ones go at the right rate from now on: they never go back.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub fn mend_clocks(&self) -> anyhow::Result<()> {
        let (now, so_far) = self.monotonic()?;
        // A millisecond more, so that nobody who reads it meanwhile sees it go back.
        let kept = Skew { offset_nanos: so_far + 1_000_000, rate_ppm: 0, base_nanos: now };
        self.set_clocks(Skew::default(), kept)
    }

    /// The machine's monotonic clock now, and how far this controller's is from it.
    fn monotonic(&self) -> anyhow::Result<(i64, i64)> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        let now = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
        let at = CLOCKS + (self.get(CURRENT)? & 1).cast_unsigned() * NUMBERS_PER_SET + 3;
        let (offset, ppm, base) = (self.get(at)?, self.get(at + 1)?, self.get(at + 2)?);
        let gained = i128::from(now - base) * i128::from(ppm) / 1_000_000;
        Ok((now, offset + i64::try_from(gained)?))
    }

    /// Both at once: the set that does not count is written, then counts.
    fn set_clocks(&self, wall: Skew, monotonic: Skew) -> anyhow::Result<()> {
        let next = 1 - (self.get(CURRENT)? & 1);
        let at = CLOCKS + next.cast_unsigned() * NUMBERS_PER_SET;
        let numbers = [wall, monotonic].map(|skew| [skew.offset_nanos, skew.rate_ppm, skew.base_nanos]).concat();
        for (place, number) in (at..).zip(numbers) {
            self.set(place, number)?;
        }
        Ok(self.set(CURRENT, next)?)
    }

    /// How many syncs have failed, and how many came after and were only said to have succeeded.
    ///
    /// # Errors
    /// When the page cannot be read.
    pub fn failed_syncs(&self) -> std::io::Result<(i64, i64)> {
        Ok((self.get(FAILED)?, self.get(PRETENDED)?))
    }

    /// # Errors
    /// When the page cannot be read.
    pub fn slowed_syncs(&self) -> std::io::Result<i64> {
        self.get(SLOWED)
    }

    /// Writes that found no space.
    ///
    /// # Errors
    /// When the page cannot be read.
    pub fn refused_writes(&self) -> std::io::Result<i64> {
        self.get(REFUSED)
    }

    /// How often a wrong clock was read.
    ///
    /// # Errors
    /// When the page cannot be read.
    pub fn wrong_readings(&self) -> std::io::Result<i64> {
        self.get(READINGS)
    }

    /// A disk as good as new, and counters at zero.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub fn mend_disk(&self) -> std::io::Result<()> {
        (SYNC_MODE..=REFUSED).try_for_each(|place| self.set(place, 0))
    }

    /// Cuts every file to what its last sync covered. The controller must have ended.
    ///
    /// # Errors
    /// When a file cannot be read or cut.
    pub fn lose_unsynced(&self) -> anyhow::Result<Lost> {
        let synced = self.synced_sizes()?;
        let mut lost = Lost::default();
        for path in files_below(&self.data)? {
            let about = path.metadata()?;
            let kept = synced.get(&identity(&about)).copied().unwrap_or(0).min(about.len());
            if kept < about.len() {
                File::options().write(true).open(&path)?.set_len(kept)?;
                lost.bytes += about.len() - kept;
                lost.files += 1;
            }
        }
        Ok(lost)
    }

    /// To be called before each start: what is on disk now cannot be lost any more.
    pub(super) fn take_all_as_synced(&self) -> anyhow::Result<()> {
        let mut lines = String::new();
        for path in files_below(&self.data)? {
            let about = path.metadata()?;
            let (inode, born) = identity(&about);
            lines += &format!("{inode} {born} {}\n", about.len());
        }
        Ok(std::fs::write(&self.synced, lines)?)
    }

    fn synced_sizes(&self) -> anyhow::Result<HashMap<(u64, String), u64>> {
        let mut sizes = HashMap::new();
        for line in std::fs::read_to_string(&self.synced)?.lines() {
            let [inode, born, size] = line.split(' ').collect::<Vec<_>>()[..] else {
                anyhow::bail!("'{line}' is no line of {}", self.synced.display());
            };
            sizes.insert((inode.parse()?, born.to_owned()), size.parse()?);
        }
        Ok(sizes)
    }

    fn get(&self, place: u64) -> std::io::Result<i64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, place * 8)?;
        Ok(i64::from_ne_bytes(bytes))
    }

    fn set(&self, place: u64, number: i64) -> std::io::Result<()> {
        self.file.write_all_at(&number.to_ne_bytes(), place * 8)
    }
}

/// An inode number may be used again, but not at the same instant.
fn identity(file: &std::fs::Metadata) -> (u64, String) {
    let born = file.created().unwrap_or(SystemTime::UNIX_EPOCH).duration_since(UNIX_EPOCH).unwrap_or_default();
    (file.ino(), format!("{}.{:09}", born.as_secs(), born.subsec_nanos()))
}

fn files_below(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}
