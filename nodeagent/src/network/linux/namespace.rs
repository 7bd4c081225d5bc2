//! Named network namespaces, kept where `ip netns` keeps them, so that an operator can look inside with it.
//!
//! A thread that enters a namespace never comes back: each piece of work inside gets a thread of its own, and sockets
//! and child processes made there stay there.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    thread,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};
use tokio::{runtime::Handle, sync::oneshot};

const DIR: &str = "/run/netns";

pub struct Namespace {
    file: File,
}

impl Namespace {
    /// Every name in the directory, of whoever.
    pub fn names() -> Vec<String> {
        let entries = fs::read_dir(DIR).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// `None` when there is none of that name, or only the empty file that a lost one leaves.
    pub fn find(name: &str) -> io::Result<Option<Self>> {
        match File::open(path(name)) {
            Ok(file) if fstatfs(&file)?.filesystem_type() == NSFS_MAGIC => Ok(Some(Self { file })),
            Ok(_) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub async fn create(name: &str) -> io::Result<Self> {
        share_directory()?;
        File::create(path(name))?;
        let target = path(name);
        on_own_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(mount(Some("/proc/thread-self/ns/net"), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
        })
        .await?;
        Self::find(name)?.ok_or_else(|| io::Error::other("the new namespace is not there"))
    }

    /// Removes the name; the namespace goes with its last process. Nothing to do when there is none.
    pub fn remove(name: &str) -> io::Result<()> {
        loop {
            match umount2(&path(name), MntFlags::MNT_DETACH) {
                // One name may have been mounted over another.
                Ok(()) => {}
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(e) => return Err(e.into()),
            }
        }
        match fs::remove_file(path(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Runs `work` inside, on a thread of its own that knows the caller's runtime.
    pub async fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let file = self.file.try_clone()?;
        let runtime = Handle::current();
        on_own_thread(move || {
            setns(file, CloneFlags::CLONE_NEWNET)?;
            let _runtime = runtime.enter();
            Ok(work())
        })
        .await
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// What tells this namespace from every other that lives.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.ino())
    }
}

/// Makes the directory a shared mount, as `ip netns` does: then the names are seen in every mount namespace, and an
/// `ip netns add` of somebody else does not cover ours with a mount of its own.
fn share_directory() -> io::Result<()> {
    fs::create_dir_all(DIR)?;
    let none = None::<&str>;
    let share = || mount(none, DIR, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    if share() == Err(Errno::EINVAL) {
        mount(Some(DIR), DIR, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
        share()?;
    }
    Ok(())
}

async fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let (tell, told) = oneshot::channel();
    thread::Builder::new().name("netns".into()).spawn(move || {
        // Nobody listens when the caller has given up: then the result is nobody's.
        let _ = tell.send(work());
    })?;
    told.await.map_err(|_| io::Error::other("the thread in the namespace died"))?
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(DIR).join(name)
}
