//! The cloud of the demonstration, through the command line that a person would type.

use std::{
    collections::BTreeSet,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

#[derive(Clone)]
pub struct Cloud {
    binary: PathBuf,
    dir: PathBuf,
    namespaces_before: BTreeSet<String>,
}

/// Between two looks at something that is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

impl Cloud {
    /// Nothing is started.
    ///
    /// # Errors
    /// When the binary is not there or the folder exists.
    pub fn new(dir: &Path) -> Result<Self> {
        ensure!(!dir.exists(), "{} exists already", dir.display());
        Ok(Self { binary: jepsen::cluster::binary()?, dir: dir.to_owned(), namespaces_before: namespaces()? })
    }

    pub fn binary(&self) -> &Path {
        &self.binary
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The operator's access.
    pub fn config(&self) -> PathBuf {
        self.dir.join("client.toml")
    }

    pub fn namespaces_before(&self) -> &BTreeSet<String> {
        &self.namespaces_before
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env("TREFOIL_DIR", &self.dir).env("TREFOIL_CONFIG", self.config());
        for name in ["TREFOIL_ENDPOINTS", "TREFOIL_TOKEN", "TREFOIL_CA", "TREFOIL_TENANT", "TREFOIL_OUTPUT"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command of `trefoil` to its end; what it printed.
    ///
    /// # Errors
    /// With its own sentence when it did not end well.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments).output()?;
        finish(&format!("trefoil {}", arguments.join(" ")), &output)
    }

    /// As [`Self::run`], with the answer as JSON.
    ///
    /// # Errors
    /// As `run`, and when the answer is not JSON.
    pub fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let text = self.run(&all)?;
        serde_json::from_str(&text).with_context(|| format!("trefoil {}: not JSON: {text}", arguments.join(" ")))
    }

    /// Starts a command and leaves it running.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(&self, arguments: &[&str]) -> Result<Child> {
        Ok(self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    }

    /// A shell among the processes and files of a host, to be written to and read from.
    ///
    /// # Errors
    /// When it does not start.
    pub fn shell(&self, host: &str) -> Result<Child> {
        let mut command = self.command(&["lab", "exec", host, "bash"]);
        Ok(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
    }

    /// Three controllers and three hosts with libvirt.
    ///
    /// # Errors
    /// When `trefoil up` does not end well.
    pub fn up(&self) -> Result<()> {
        self.run(&["up", "--hosts", "3", "--hypervisor", "libvirt"]).map(|_| ())
    }

    /// # Errors
    /// When `trefoil down` does not end well.
    pub fn down(&self) -> Result<()> {
        self.run(&["down"]).map(|_| ())
    }

    /// One HTTP request to a guest from a tenant's network on a host; the body of the answer, `None` without one.
    pub fn http(&self, host: &str, vni: u64, url: &str, post: Option<&str>, patience: Duration) -> Option<String> {
        let (vni, seconds) = (vni.to_string(), patience.as_secs().to_string());
        let mut arguments = vec!["lab", "tenant-exec", host, &vni, "curl", "-sSf", "-m", &seconds, url];
        if let Some(body) = post {
            arguments.extend(["--data-binary", body]);
        }
        self.run(&arguments).ok()
    }
}

/// The output of a command that ended well.
///
/// # Errors
/// With what it said when it did not.
pub fn finish(what: &str, output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!("{what}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks until there is an answer.
///
/// # Errors
/// With the name of what was waited for, and with the last trouble, when the patience is over.
pub fn until<T>(what: &str, patience: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        let trouble = match ask() {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() > deadline {
            let waited = format!("waited {} s in vain for: {what}", patience.as_secs());
            return Err(trouble.map_or_else(|| anyhow::anyhow!(waited.clone()), |error| error.context(waited.clone())));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Names of the network namespaces of this machine.
///
/// # Errors
/// When they cannot be listed.
pub fn namespaces() -> Result<BTreeSet<String>> {
    match std::fs::read_dir("/run/netns") {
        Ok(entries) => Ok(entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(error.into()),
    }
}

/// Ids of the processes, other than this one, that carry the folder in their command line.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn processes_of(dir: &Path) -> Result<Vec<u32>> {
    let needle = dir.as_os_str().as_bytes();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // One that ends while it is looked at is not left.
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != std::process::id() && line.windows(needle.len()).any(|part| part == needle) {
            found.push(pid);
        }
    }
    Ok(found)
}
