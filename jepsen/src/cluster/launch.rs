//! How the processes are started: the one place of this crate that knows the command line.

use std::{
    fs::File,
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

use super::{Access, Cluster, Member, process::Process};

/// In thousandths of a real host's: a guest starts in a tenth of a second.
const SIMULATED_DELAY: &str = "100";
/// Ports of controllers and agents on hosts of their own.
pub(super) const CONTROLLER_PORT: u16 = 7470;
const AGENT_PORT: u16 = 7480;

/// The released binary: `TREFOIL_BIN`, or beside the program that runs.
///
/// # Errors
/// When there is none.
pub fn binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("TREFOIL_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let folders = own.ancestors().skip(1).take(2);
    let found = folders.map(|folder| folder.join("trefoil")).find(|path| path.is_file());
    found.with_context(|| format!("no binary 'trefoil' near {}: run `make build`", own.display()))
}

/// A port of loopback that is free for TCP and UDP. Another program could take it before it is used; then the
/// process that wanted it says so and the test fails with that sentence.
///
/// # Errors
/// When there is none.
pub fn free_port() -> anyhow::Result<u16> {
    for _ in 0..100 {
        let tcp = TcpListener::bind("127.0.0.1:0")?;
        let port = tcp.local_addr()?.port();
        if UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port of loopback is free for TCP and UDP")
}

/// What `trefoil controller init` writes for its operator, as far as a test needs it.
#[derive(serde::Deserialize)]
struct ClientFile {
    ca: String,
    token: String,
}

/// What a controller remembers of itself.
#[derive(serde::Deserialize)]
struct ControllerFile {
    id: u64,
}

/// Waits until no other cluster of these tests runs on the machine.
pub(super) fn take_turn() -> anyhow::Result<Flock<File>> {
    let path = std::env::temp_dir().join("trefoil-cluster.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).with_context(|| path.display().to_string())
}

impl Cluster {
    /// The first controller, and the operator's access.
    pub(super) fn found(&mut self) -> anyhow::Result<()> {
        let member = self.new_controller(1)?;
        let mut arguments = self.place(&member, "init");
        arguments.extend(["--operator".to_owned(), "operator".to_owned()]);
        self.once(member.host, &arguments)?;
        self.take_access(&member.data)?;
        self.controllers.push(member);
        self.run_controller(0)
    }

    /// The operator's, as `init` has written it.
    fn take_access(&mut self, data: &Path) -> anyhow::Result<()> {
        let path = data.join("client.toml");
        let written: ClientFile =
            toml::from_str(&std::fs::read_to_string(&path)?).with_context(|| path.display().to_string())?;
        self.access = Access { ca_pem: written.ca, token: written.token };
        Ok(std::fs::write(self.root.join("ca.pem"), &self.access.ca_pem)?)
    }

    /// The same place with an empty disk: the only controller of the cloud in a backup of the quorum.
    ///
    /// # Errors
    /// When it runs, or the backup is refused.
    pub fn restore(&mut self, controller: usize, backup: &Path) -> anyhow::Result<()> {
        anyhow::ensure!(self.controllers[controller].process.is_none(), "it runs");
        std::fs::remove_dir_all(&self.controllers[controller].data)?;
        let mut arguments = self.place(&self.controllers[controller], "init");
        let from = ["--operator", "operator", "--from-backup", &backup.display().to_string()].map(str::to_owned);
        arguments.extend(from);
        self.once(self.controllers[controller].host, &arguments)?;
        let data = self.controllers[controller].data.clone();
        self.take_access(&data)?;
        let written: ControllerFile = toml::from_str(&std::fs::read_to_string(data.join("controller.toml"))?)?;
        self.controllers[controller].id = written.id;
        self.run_controller(controller)
    }

    /// Another controller, joined with a one-time token; it becomes a voter once it has caught up.
    ///
    /// # Errors
    /// When it is refused or does not start.
    pub async fn add_controller(&mut self) -> anyhow::Result<usize> {
        let token = self.join_token("controller").await?;
        let number = self.controllers.len();
        let mut member = self.new_controller(number as u64 + 1)?;
        let mut arguments = self.place(&member, "join");
        arguments.extend(["--token".to_owned(), token, "--output".to_owned(), "json".to_owned()]);
        let output = self.once(member.host, &arguments)?;
        member.id =
            serde_json::from_str::<Value>(&output)?["id"].as_u64().with_context(|| format!("no id in {output}"))?;
        self.controllers.push(member);
        self.run_controller(number)?;
        Ok(number)
    }

    /// The same place with an empty disk: the lost one is removed from the quorum, then it joins and gets another id.
    ///
    /// # Errors
    /// When it runs, or is refused.
    pub async fn wipe_and_rejoin(&mut self, controller: usize) -> anyhow::Result<u64> {
        self.remove_controller(controller).await?;
        self.rejoin(controller).await
    }

    /// The same place with an empty disk, of which the quorum knows nothing any more: it joins and gets another id.
    ///
    /// # Errors
    /// When it runs, or is refused.
    pub async fn rejoin(&mut self, controller: usize) -> anyhow::Result<u64> {
        anyhow::ensure!(
            self.controllers[controller].process.is_none(),
            "a disk is not wiped under a running controller"
        );
        std::fs::remove_dir_all(&self.controllers[controller].data)?;
        let token = self.join_token("controller").await?;
        let mut arguments = self.place(&self.controllers[controller], "join");
        arguments.extend(["--token".to_owned(), token, "--output".to_owned(), "json".to_owned()]);
        let output = self.once(self.controllers[controller].host, &arguments)?;
        let id =
            serde_json::from_str::<Value>(&output)?["id"].as_u64().with_context(|| format!("no id in {output}"))?;
        self.controllers[controller].id = id;
        self.run_controller(controller)?;
        Ok(id)
    }

    fn new_controller(&mut self, id: u64) -> anyhow::Result<Member> {
        let number = self.controllers.len() + 1;
        let host = self.next_host()?;
        let address = match &self.switch {
            Some(switch) => format!("{}:{CONTROLLER_PORT}", switch.ip(host)),
            None => format!("127.0.0.1:{}", free_port()?),
        };
        let name = format!("controller-{number}");
        Ok(Member { host, id, data: self.root.join(format!("c{number}")), name, address, process: None, shim: None })
    }

    fn next_host(&mut self) -> anyhow::Result<usize> {
        let host = self.controllers.len() + self.agents.len();
        if let Some(switch) = &mut self.switch {
            switch.ensure(host)?;
        }
        Ok(host)
    }

    fn place(&self, member: &Member, verb: &str) -> Vec<String> {
        let data = member.data.display().to_string();
        let pairs = [
            ("--data", data.as_str()),
            ("--name", &member.name),
            ("--listen", &member.address),
            ("--advertise", &member.address),
        ];
        let mut arguments = vec!["controller".to_owned(), verb.to_owned()];
        arguments.extend(pairs.iter().flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]));
        if let Some(entries) = self.snapshot_every {
            arguments.extend(["--snapshot-every".to_owned(), entries.to_string()]);
        }
        arguments
    }

    /// A new agent with the simulated hypervisor.
    pub(super) async fn add_agent(&mut self) -> anyhow::Result<()> {
        let token = self.join_token("agent").await?;
        let number = self.agents.len();
        let host = self.next_host()?;
        let (ip, port) = match &self.switch {
            Some(switch) => (switch.ip(host).to_owned(), AGENT_PORT),
            None => ("127.0.0.1".to_owned(), free_port()?),
        };
        let name = format!("host-{}", number + 1);
        let member = Member {
            host,
            id: 0,
            data: self.root.join(format!("a{}", number + 1)),
            address: format!("{ip}:{port}"),
            name: name.clone(),
            process: None,
            shim: None,
        };
        let data = member.data.display().to_string();
        let effects = self.effects().display().to_string();
        let arguments = [
            "agent",
            "join",
            "--data",
            &data,
            "--name",
            &name,
            "--listen",
            &member.address,
            "--advertise",
            &member.address,
            "--underlay",
            &ip,
            "--hypervisor",
            "simulated",
            "--simulated-delay",
            SIMULATED_DELAY,
            "--simulated-effects",
            &effects,
            "--token",
            &token,
            "--output",
            "json",
        ];
        let mut arguments = arguments.map(str::to_owned).to_vec();
        if let Some((vcpus, memory)) = self.offer {
            arguments.extend(["--vcpus".to_owned(), vcpus.to_string(), "--memory".to_owned(), memory.to_string()]);
        }
        self.once(host, &arguments)?;
        self.agents.push(member);
        self.run_agent(number)
    }

    pub(super) fn run_controller(&mut self, number: usize) -> anyhow::Result<()> {
        let member = &self.controllers[number];
        let mut command = self.command(member.host);
        command.args(["controller", "run", "--data"]).arg(&member.data);
        if let Some(shim) = &member.shim {
            shim.take_all_as_synced()?;
            command.envs(shim.environment());
        }
        let log = self.root.join(format!("{}.log", member.name));
        self.controllers[number].process = Some(Process::start(command, &log)?);
        Ok(())
    }

    pub(super) fn run_agent(&mut self, number: usize) -> anyhow::Result<()> {
        let member = &self.agents[number];
        let mut command = self.command(member.host);
        command.args(["agent", "run", "--data"]).arg(&member.data);
        let log = self.root.join(format!("{}.log", member.name));
        self.agents[number].process = Some(Process::start(command, &log)?);
        Ok(())
    }

    /// The binary on one of the hosts.
    fn command(&self, host: usize) -> Command {
        match &self.switch {
            Some(switch) => switch.command(host, &self.binary),
            None => Command::new(&self.binary),
        }
    }

    /// Runs it to its end; its output.
    fn once(&self, host: usize, arguments: &[String]) -> anyhow::Result<String> {
        let output = self.command(host).args(arguments).output()?;
        if !output.status.success() {
            let what = arguments.iter().take(2).cloned().collect::<Vec<_>>().join(" ");
            bail!("trefoil {what}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}
