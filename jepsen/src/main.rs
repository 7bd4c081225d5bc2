//! `trefoil-jepsen`: one run against a new cluster, and its verdict as exit status: 0 pass, 1 violation, 3 unknown.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::bail;
use clap::{Parser, Subcommand, ValueEnum, builder::PossibleValuesParser};
use jepsen::{
    cluster::switch::Switch, interrupt::asked_to_end, liveness, nemesis::Family, run, verdict::Verdict, workload,
};

/// Clients against real controllers under faults, and a verdict on what they saw.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
}

#[derive(Subcommand)]
enum Command {
    /// Every state of the links between three controllers, and some of five: do writes go on where they must?
    Liveness(Liveness),
}

#[derive(clap::Args)]
struct Run {
    /// How long to go on, in seconds, without start and checks.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Families of faults; by default all, in turn.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Family::value_variants().to_vec())]
    nemesis: Vec<Family>,
    /// Workloads; by default all.
    #[arg(long, value_delimiter = ',', value_parser = workload_names())]
    workload: Vec<String>,
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
struct Liveness {
    /// Only some states of three, with one leader: a minute.
    #[arg(long)]
    short: bool,
    /// With how many of the controllers as the leader, in turn; by default with all three.
    #[arg(long)]
    leaders: Option<usize>,
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
struct Place {
    /// Decides which controllers are hit and what clients choose; by default another each time.
    #[arg(long)]
    seed: Option<u64>,
    /// How many controllers: 3 or 5.
    #[arg(long, default_value = "3", value_parser = PossibleValuesParser::new(["3", "5"]))]
    controllers: String,
    /// Where history, logs and report go; by default a new folder under the temporary one.
    #[arg(long)]
    folder: Option<PathBuf>,
}

impl Place {
    fn seed(&self) -> u64 {
        self.seed.unwrap_or_else(|| u64::from(uuid::Uuid::now_v7().as_fields().0) ^ u64::from(std::process::id()))
    }

    /// Short, because unix sockets lie in it.
    fn folder(&self) -> PathBuf {
        let new = || std::env::temp_dir().join(format!("tfj-{}", std::process::id()));
        self.folder.clone().unwrap_or_else(new)
    }

    fn controllers(&self) -> usize {
        if self.controllers == "5" { 5 } else { 3 }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let place = match &arguments.command {
        Some(Command::Liveness(liveness)) => &liveness.place,
        None => &arguments.run.place,
    };
    let (seed, folder) = (place.seed(), place.folder());
    eprintln!("seed {seed}, {}", folder.display());
    let begun = async {
        match &arguments.command {
            Some(Command::Liveness(liveness)) => hold_links(liveness, seed, &folder).await,
            None => strike(&arguments.run, seed, &folder).await,
        }
    };
    let outcome = tokio::select! {
        outcome = begun => outcome,
        () = asked_to_end() => Err(anyhow::anyhow!("interrupted")),
    };
    match outcome {
        Ok(verdict) => ExitCode::from(verdict.exit_status()),
        Err(error) => {
            eprintln!("harness failure, no verdict: {error:#}");
            eprintln!("logs: {}", folder.display());
            ExitCode::from(3)
        }
    }
}

async fn strike(arguments: &Run, seed: u64, folder: &Path) -> anyhow::Result<Verdict> {
    let wanted = |name: &str| arguments.workload.is_empty() || arguments.workload.iter().any(|asked| asked == name);
    let plan = run::Plan {
        seconds: arguments.seconds,
        seed,
        families: arguments.nemesis.clone(),
        controllers: arguments.place.controllers(),
        workloads: workload::ALL.iter().copied().filter(|workload| wanted(workload.name())).collect(),
        folder: folder.to_owned(),
    };
    let report = run::run(&plan).await?;
    report.print(folder);
    Ok(report.verdict)
}

async fn hold_links(arguments: &Liveness, seed: u64, folder: &Path) -> anyhow::Result<Verdict> {
    if let Some(obstacle) = Switch::obstacle() {
        bail!("links cannot be cut here: {obstacle}");
    }
    let controllers = arguments.place.controllers();
    let mut plan = liveness::Plan::new(controllers, arguments.short, seed, folder);
    plan.leaders.truncate(arguments.leaders.unwrap_or(controllers).max(1));
    let report = liveness::run(&plan).await?;
    report.print(folder);
    Ok(report.verdict)
}

fn workload_names() -> PossibleValuesParser {
    PossibleValuesParser::new(workload::ALL.iter().map(|workload| workload.name()))
}
