//! `trefoil controller`: makes a cloud, joins one, runs a controller, and shows what a stopped one has on its disk.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use controller::{DumpArgs, InitArgs, JoinArgs, RunArgs, Timing};
use serde_json::{Value, json};

use super::asked_to_end;
use crate::{
    config::ConfigFile,
    output::{self, Format},
};

#[derive(Debug, Subcommand)]
pub enum ControllerCommand {
    /// Makes a new cloud with this controller as its first; writes DATA/client.toml with the operator's token
    #[command(
        after_help = "Example:\n  trefoil controller init --data /var/lib/trefoil/controller --advertise 192.0.2.1:7470\n  trefoil controller init --data /var/lib/trefoil/controller --advertise 192.0.2.1:7470 --from-backup cloud.quorum"
    )]
    Init {
        #[command(flatten)]
        place: Place,
        /// Name of the first operator
        #[arg(long, default_value = "admin")]
        operator: String,
        /// Makes the cloud of this backup again, with this machine as its only controller; the operator gets a new token
        #[arg(long, value_name = "FILE")]
        from_backup: Option<PathBuf>,
    },
    /// Makes this machine a controller of a cloud that exists
    #[command(
        after_help = "Example:\n  trefoil controller join --data /var/lib/trefoil/controller --advertise 192.0.2.2:7470 \\\n    --token trefoil-join-..."
    )]
    Join {
        #[command(flatten)]
        place: Place,
        /// One-time token that 'trefoil quorum token --role controller' printed, or @FILE
        #[arg(long, value_name = "TOKEN")]
        token: String,
    },
    /// Runs the controller until it is asked to end
    #[command(after_help = "Example:\n  trefoil controller run --data /var/lib/trefoil/controller")]
    Run {
        /// Its directory, made by init or join
        #[arg(long, value_name = "DIRECTORY")]
        data: PathBuf,
        /// Log JSON objects, one a line
        #[arg(long)]
        log_json: bool,
    },
    /// Shows what a stopped controller has on its disk, a line a thing, and changes nothing
    #[command(
        after_help = "Example:\n  trefoil controller dump --data /var/lib/trefoil/controller --log --output json\n  trefoil controller dump --data /var/lib/trefoil/controller --state --at 4711"
    )]
    Dump {
        /// Its directory
        #[arg(long, value_name = "DIRECTORY")]
        data: PathBuf,
        /// Every entry that its log still has
        #[arg(long)]
        log: bool,
        /// Every row of its state
        #[arg(long)]
        state: bool,
        /// The log index that the state is to be of [default: that of the tables on disk]
        #[arg(long, value_name = "INDEX")]
        at: Option<u64>,
    },
}

#[derive(Debug, Args)]
pub struct Place {
    /// Directory for its log, state and keys; empty or missing
    #[arg(long, value_name = "DIRECTORY")]
    data: PathBuf,
    /// host:port at which controllers, agents and clients reach it
    #[arg(long, value_name = "ENDPOINT")]
    advertise: String,
    /// Address to listen on, TCP and UDP
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:7470")]
    listen: SocketAddr,
    /// Name for people [default: the host's]
    #[arg(long)]
    name: Option<String>,
    /// How patient elections are
    #[arg(long, value_enum, default_value = "lan")]
    timing: TimingChoice,
    /// Log entries between snapshots
    #[arg(long, value_name = "COUNT")]
    snapshot_every: Option<u64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum TimingChoice {
    /// Own disks and cores
    Lan,
    /// Shared or busy machines
    Noisy,
}

impl From<TimingChoice> for Timing {
    fn from(choice: TimingChoice) -> Self {
        match choice {
            TimingChoice::Lan => Self::Lan,
            TimingChoice::Noisy => Self::Noisy,
        }
    }
}

impl ControllerCommand {
    pub fn is_server(&self) -> bool {
        matches!(self, Self::Run { .. })
    }

    pub fn logs_json(&self) -> bool {
        matches!(self, Self::Run { log_json: true, .. })
    }
}

/// # Errors
/// As the controller tells them.
pub async fn run(command: ControllerCommand, format: Format) -> Result<()> {
    match command {
        ControllerCommand::Init { place, operator, from_backup } => init(place, operator, from_backup, format).await,
        ControllerCommand::Join { place, token } => join(place, &token, format).await,
        ControllerCommand::Run { data, .. } => controller::run(RunArgs { data }, asked_to_end()?).await,
        ControllerCommand::Dump { data, log, state, at } => dump(&DumpArgs { data, log, state, at }, format),
    }
}

/// One line a thing in either format, so that a log of any length can be read as it comes.
fn dump(args: &DumpArgs, format: Format) -> Result<()> {
    controller::dump(args, &mut |line| {
        let text = match format {
            Format::Json => line.to_string(),
            Format::Table => output::printable(&line_text(&line)).into_owned(),
        };
        Ok(output::write(format!("{text}\n").as_bytes())?)
    })
}

/// The same for people: what it is, then its parts as they are named in JSON.
fn line_text(line: &Value) -> String {
    let part = |name: &str| match &line[name] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match line["kind"].as_str() {
        Some("entry") => {
            let head = format!("{:>8}  term {} of controller-{}", part("index"), part("term"), part("leader"));
            match line["what"].as_str() {
                Some("command") => {
                    format!("{head}  {}  {}  {}  {}", part("at"), part("request"), part("actor"), part("command"))
                }
                Some("membership") => format!("{head}  membership {} of {}", part("voters"), part("members")),
                _ => format!("{head}  blank"),
            }
        }
        Some("row") => format!("{}  {}  {}", part("table"), part("key"), part("row")),
        _ => {
            let names = line.as_object().into_iter().flatten().map(|(name, _)| name.as_str());
            let pairs: Vec<_> = names.filter(|name| *name != "kind").map(|name| (name, part(name))).collect();
            output::details(&pairs, None)
        }
    }
}

async fn init(place: Place, operator: String, from_backup: Option<PathBuf>, format: Format) -> Result<()> {
    let name = super::name_or_host(place.name)?;
    let (data, listen, advertise) = (place.data.clone(), place.listen, place.advertise.clone());
    let (timing, snapshot_every) = (place.timing.into(), place.snapshot_every);
    let to = operator.clone();
    let args = InitArgs { data, name, listen, advertise, operator: to, timing, snapshot_every };
    let made = match from_backup {
        None => controller::init(args).await?,
        Some(file) => controller::restore(args, file).await?,
    };
    let data = std::path::absolute(&place.data)?;
    let file = data.join("client.toml");
    let socket = format!("unix:{}", data.join("api.sock").display());
    let config = ConfigFile {
        endpoints: vec![socket, place.advertise],
        ca: Some(made.ca_pem.clone()),
        token: Some(made.operator_token.clone()),
        ..ConfigFile::default()
    };
    config.save(&file).with_context(|| format!("cannot write {}", file.display()))?;
    let file = file.display().to_string();
    let told = json!({
        "cluster": made.cluster,
        "operator": operator,
        "operator_token": made.operator_token,
        "ca_pem": made.ca_pem,
        "config": file,
    });
    output::print(format, &told, || {
        format!("cloud {} made; its operator '{operator}' uses --config {file}", made.cluster)
    })?;
    Ok(())
}

async fn join(place: Place, token: &str, format: Format) -> Result<()> {
    let id = controller::join(JoinArgs {
        data: place.data,
        name: super::name_or_host(place.name)?,
        listen: place.listen,
        advertise: place.advertise,
        token: super::text_or_file(token)?,
        timing: place.timing.into(),
        snapshot_every: place.snapshot_every,
    })
    .await?;
    output::print(format, &json!({ "id": id }), || format!("joined as controller-{id}; it votes once it runs"))?;
    Ok(())
}
