//! `trefoil-jepsen`: one run against a new cluster, and its verdict as exit status: 0 pass, 1 violation, 3 unknown.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, builder::PossibleValuesParser};
use jepsen::{interrupt::asked_to_end, nemesis::Family, run, workload};

/// Clients against real controllers under faults, and a verdict on what they saw.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// How long to go on, in seconds, without start and checks.
    #[arg(long, default_value_t = 140)]
    seconds: u64,
    /// Decides which controllers are hit and what clients choose; by default another each time.
    #[arg(long)]
    seed: Option<u64>,
    /// Families of faults.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["kill", "pause", "partition", "host"])]
    nemesis: Vec<Family>,
    /// Workloads; by default all.
    #[arg(long, value_delimiter = ',', value_parser = workload_names())]
    workload: Vec<String>,
    /// Where history, logs and report go; by default a new folder under the temporary one.
    #[arg(long)]
    folder: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed =
        arguments.seed.unwrap_or_else(|| u64::from(uuid::Uuid::now_v7().as_fields().0) ^ u64::from(std::process::id()));
    // Short, because unix sockets lie in it.
    let folder = arguments.folder.unwrap_or_else(|| std::env::temp_dir().join(format!("tfj-{}", std::process::id())));
    let wanted = |name: &str| arguments.workload.is_empty() || arguments.workload.iter().any(|asked| asked == name);
    let workloads = workload::ALL.iter().copied().filter(|workload| wanted(workload.name())).collect();
    let plan = run::Plan { seconds: arguments.seconds, seed, families: arguments.nemesis, workloads, folder };
    eprintln!("seed {seed}, {} s, {}", plan.seconds, plan.folder.display());
    let outcome = tokio::select! {
        outcome = run::run(&plan) => outcome,
        () = asked_to_end() => Err(anyhow::anyhow!("interrupted")),
    };
    match outcome {
        Ok(report) => {
            report.print(&plan.folder);
            ExitCode::from(report.verdict.exit_status())
        }
        Err(error) => {
            eprintln!("harness failure, no verdict: {error:#}");
            eprintln!("logs: {}", plan.folder.display());
            ExitCode::from(3)
        }
    }
}

fn workload_names() -> PossibleValuesParser {
    PossibleValuesParser::new(workload::ALL.iter().map(|workload| workload.name()))
}
