//! From `vm create` accepted until the quorum knows that the machine runs, beside plain libvirt on the same host: the
//! same domain without its mark, an overlay over the same base image, made by `qemu-img`, `virsh define` and `start`.
//!
//! What both have to do costs most of it. The rest is what the cloud adds: placing the machine, telling its host,
//! looking before and after, and getting the report into the log.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use api::{
    client::{Client, new_request_id},
    proto::{CreateVmRequest, GetVmRequest, trefoil_client::TrefoilClient},
};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tonic::transport::Channel;

use super::TENANT;
use crate::demo::cloud::Cloud;

/// The machine that keeps the network on the host and whose definition plain libvirt is given.
const PATTERN: &str = "pattern";
const HOST: &str = "h1";
/// It boots into nothing: how far a guest comes is not measured here.
const IMAGE_BYTES: usize = 1 << 20;
/// An emulated machine on a busy host starts within seconds.
const PATIENCE: Duration = Duration::from_secs(120);
/// Printed by the shell in the host at the end of each answer.
const END: &str = "-- end of answer";

#[derive(Debug, Serialize)]
pub struct Creation {
    pub trefoil: Times,
    /// From accepted until libvirtd began to start the domain, as its own log has it, to the millisecond.
    pub issued: Times,
    pub libvirt: Times,
    pub ratio_of_medians: f64,
}

#[derive(Debug, Serialize)]
pub struct Times {
    /// In the order of the pairs.
    pub micros: Vec<u64>,
    pub p50_micros: u64,
    pub p90_micros: u64,
    pub p99_micros: u64,
}

/// What `trefoil up` wrote for the operator, as far as it is needed here.
#[derive(Deserialize)]
struct ClientFile {
    endpoints: Vec<String>,
    ca: String,
    token: String,
}

/// Why it cannot be measured here, if it cannot.
pub fn obstacle() -> Option<String> {
    if !nix::unistd::Uid::effective().is_root() {
        return Some("hosts in namespaces need root".into());
    }
    let missing = |tool: &&str| Command::new(tool).arg("--version").output().is_err();
    ["libvirtd", "virsh", "qemu-img"].iter().find(|tool| missing(tool)).map(|tool| format!("{tool} is not installed"))
}

/// Brings a cloud with one real host up, measures the pairs, and removes it.
///
/// # Errors
/// When the cloud does not come up, or a machine does not run.
pub async fn measure(pairs: usize) -> Result<Creation> {
    let dir = std::env::temp_dir().join(format!("tfbench{}", std::process::id()));
    let cloud = Cloud::new(&dir)?;
    let measured = in_cloud(&cloud, pairs).await;
    cloud.down()?;
    measured
}

async fn in_cloud(cloud: &Cloud, pairs: usize) -> Result<Creation> {
    cloud.run(&["up", "--hosts", "1", "--hypervisor", "libvirt"])?;
    furnish(cloud)?;
    let file: ClientFile = toml::from_str(&std::fs::read_to_string(cloud.config())?)?;
    let client = Client::new(&file.endpoints, &file.ca, &file.token)?;
    let mut host = Shell::open(cloud)?;
    let pattern = Pattern::find(&mut host)?;
    let (mut ours, mut issued, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..pairs {
        let name = format!("pair-{pair}");
        // Who goes first changes from pair to pair.
        if pair % 2 == 1 {
            plain.push(pattern.start(&mut host, &name)?);
        }
        let Created { id, accepted, until_running } = create(&client, &name).await?;
        ours.push(until_running);
        issued.push(host.started(&id)?.duration_since(accepted).unwrap_or_default());
        if pair % 2 == 0 {
            plain.push(pattern.start(&mut host, &name)?);
        }
        pattern.remove(&mut host, &name)?;
        cloud.run(&["vm", "delete", &name, "--tenant", TENANT, "--wait"])?;
    }
    let (trefoil, issued, libvirt) = (Times::of(ours)?, Times::of(issued)?, Times::of(plain)?);
    let ratio_of_medians = trefoil.p50_micros as f64 / libvirt.p50_micros as f64;
    Ok(Creation { trefoil, issued, libvirt, ratio_of_medians })
}

/// A tenant with an image and a network, both on the host already because a machine uses them.
fn furnish(cloud: &Cloud) -> Result<()> {
    let image = cloud.dir().join("image.raw");
    std::fs::write(&image, vec![7; IMAGE_BYTES])?;
    let image = image.display().to_string();
    cloud.run(&["tenant", "create", TENANT])?;
    cloud.run(&["network", "create", "blue", "--range", "10.0.0.0/24", "--tenant", TENANT])?;
    cloud.run(&["image", "import", &image, "--name", "disk", "--format", "raw", "--tenant", TENANT])?;
    let machine = ["vm", "create", PATTERN, "--image", "disk", "--template", "tiny", "--network", "blue"];
    cloud.run(&[&machine[..], &["--tenant", TENANT, "--wait"]].concat()).map(|_| ())
}

struct Created {
    id: String,
    /// When the answer to `vm create` came, by the wall clock, as the host's logs have it.
    accepted: SystemTime,
    /// From that until the machine is known to run.
    until_running: Duration,
}

async fn create(client: &Client, name: &str) -> Result<Created> {
    let order = CreateVmRequest {
        tenant: TENANT.into(),
        name: name.into(),
        image: "disk".into(),
        template: "tiny".into(),
        network: "blue".into(),
        ..Default::default()
    };
    let call = |mut stub: TrefoilClient<Channel>, request| async move { stub.create_vm(request).await };
    let mut watch = client.watch(TENANT, None).await?;
    let id = client.mutate(new_request_id(), order, call).await?.id;
    let (accepted, began) = (SystemTime::now(), Instant::now());
    let what = GetVmRequest { tenant: TENANT.into(), vm: name.into(), stale: false };
    // To ask again and again would take CPU time from the start that is measured.
    let runs = async {
        loop {
            let told = watch.next().await?;
            let look = |mut stub: TrefoilClient<Channel>, request| async move { stub.get_vm(request).await };
            if told.events.iter().any(|event| event.id == id)
                && client.read(what.clone(), look).await?.status == "running"
            {
                return anyhow::Ok(());
            }
        }
    };
    tokio::time::timeout(PATIENCE, runs).await.with_context(|| format!("{name} does not run"))??;
    Ok(Created { id, accepted, until_running: began.elapsed() })
}

impl Times {
    fn of(times: Vec<Duration>) -> Result<Self> {
        let mut histogram = Histogram::<u64>::new(3)?;
        let micros: Vec<u64> = times.iter().map(|t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX)).collect();
        for micros in &micros {
            histogram.record(*micros)?;
        }
        let [p50_micros, p90_micros, p99_micros] = [0.5, 0.9, 0.99].map(|part| histogram.value_at_quantile(part));
        Ok(Self { micros, p50_micros, p90_micros, p99_micros })
    }
}

/// A shell among the host's processes and files.
struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Shell {
    fn open(cloud: &Cloud) -> Result<Self> {
        let mut child = cloud.shell(HOST)?;
        let input = child.stdin.take().context("the shell has no input")?;
        let output = BufReader::new(child.stdout.take().context("the shell has no output")?);
        Ok(Self { child, input, output })
    }

    /// What the command printed; it must end well.
    fn run(&mut self, command: &str) -> Result<String> {
        writeln!(self.input, "{{ {command}\n}} 2>&1; echo \"{END} $?\"")?;
        self.input.flush()?;
        let mut answer = String::new();
        loop {
            let mut line = String::new();
            ensure!(self.output.read_line(&mut line)? > 0, "the shell in {HOST} ended: {answer}");
            if let Some(status) = line.strip_prefix(END) {
                ensure!(status.trim() == "0", "in {HOST}: {command}: {}", answer.trim());
                return Ok(answer);
            }
            answer.push_str(&line);
        }
    }
}

impl Shell {
    /// When libvirtd began to start the domain of this machine.
    fn started(&mut self, vm: &str) -> Result<SystemTime> {
        let log = format!("/var/log/libvirt/qemu/trefoil-*-{vm}.log");
        let answer = self.run(&format!("date -d \"$(sed -n 's/: starting up .*//p' {log} | tail -1)\" +%s%3N"))?;
        let millis = answer.trim().parse().with_context(|| format!("no time in {answer}"))?;
        Ok(UNIX_EPOCH + Duration::from_millis(millis))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // It may have ended by itself; either way nothing is left.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a machine of the cloud is made of, for making the same without the cloud.
struct Pattern {
    xml: String,
    disk: String,
    base: String,
    base_format: String,
    bytes: u64,
    folder: String,
}

impl Pattern {
    fn find(host: &mut Shell) -> Result<Self> {
        let domain = host.run("virsh -q list --name")?.trim().to_owned();
        let xml = host.run(&format!("virsh -q dumpxml --inactive {domain}"))?;
        let disk = xml.split('\'').find(|part| part.ends_with("/disk.qcow2")).context("no disk in the XML")?.to_owned();
        let info: Value = serde_json::from_str(&host.run(&format!("qemu-img info -U --output json {disk}"))?)?;
        let text = |field: &str| info[field].as_str().map(str::to_owned).with_context(|| format!("no {field}: {info}"));
        let vms = Path::new(&disk).ancestors().nth(2).context("the disk is in no folder")?;
        let folder = vms.with_file_name("plain").display().to_string();
        host.run(&format!("mkdir -p {folder}"))?;
        Ok(Self {
            base: text("full-backing-filename")?,
            base_format: text("backing-filename-format")?,
            bytes: info["virtual-size"].as_u64().context("no size")?,
            xml,
            disk,
            folder,
        })
    }

    /// The same domain under another name: without the mark, so that the agent leaves it alone, and without what must
    /// be unique.
    fn renamed(&self, name: &str) -> String {
        let mut kept = String::new();
        let mut in_mark = false;
        for line in self.xml.lines() {
            in_mark |= line.contains("<metadata>");
            let unique = ["<uuid>", "<mac address", "<title>", "<target dev='tfn"].iter().any(|tag| line.contains(tag));
            if line.contains("<name>") {
                kept.push_str(&format!("<name>{name}</name>\n"));
            } else if !in_mark && !unique {
                kept.push_str(line);
                kept.push('\n');
            }
            in_mark &= !line.contains("</metadata>");
        }
        let console = self.disk.replace("disk.qcow2", "console.log");
        kept.replace(&self.disk, &self.file(name, "qcow2")).replace(&console, &self.file(name, "log"))
    }

    fn file(&self, name: &str, kind: &str) -> String {
        format!("{}/{name}.{kind}", self.folder)
    }

    fn start(&self, host: &mut Shell, name: &str) -> Result<Duration> {
        let (disk, definition) = (self.file(name, "qcow2"), self.file(name, "xml"));
        host.run(&format!("cat > {definition} <<'XML'\n{}\nXML", self.renamed(name)))?;
        let Self { base, base_format, bytes, .. } = self;
        let began = Instant::now();
        host.run(&format!(
            "qemu-img create -q -f qcow2 -F {base_format} -b {base} {disk} {bytes} && \
             virsh -q 'define {definition}; start {name}'"
        ))?;
        Ok(began.elapsed())
    }

    fn remove(&self, host: &mut Shell, name: &str) -> Result<()> {
        host.run(&format!("virsh -q 'destroy {name}; undefine {name}' && rm {}/{name}.*", self.folder)).map(|_| ())
    }
}
