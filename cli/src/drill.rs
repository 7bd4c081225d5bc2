//! `trefoil drill`: hurts a cloud on purpose, watches it heal, and says with evidence whether it did.
//!
//! ```text
//!   check ─► announce ─► before │ fault │ healing │ after ─► report: text, JSON, a page
//!             the background client, the cloud's own word and the hosts' processes are written into one timeline
//! ```
//!
//! `kind` is what drills there are, `check` what must be so before; `run` plays one, on a `stage`; `quorum`,
//! `majority`, `clock`, `host` and `backup` are the acts, `heal` undoes them. `load`, `watch` and `truth` look and write into the `record`. `timeline`,
//! `report` and `page` are pure: what follows from what was seen, and how it is shown; `kept` keeps them, `schedule` lets
//! systemd run drills. `scene` makes and removes what a
//! drill needs of its own.
//!
//! Only the public API and the description of a cloud of `trefoil up` are used. Deliberately not here: faults by chance
//! and proofs of consistency; that is `jepsen`.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use api::error::ApiError;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use crate::{
    arguments::Global,
    lab::Placement,
    moment::now_millis,
    output::{self, Format, Rows},
    quantity::duration,
};

use kind::{About, Kind};
use report::{Distribution, Report, Verdict, distributions, overall};

mod ask;
mod backup;
mod check;
mod clock;
mod heal;
mod host;
mod kept;
mod kind;
mod load;
mod majority;
mod page;
mod quorum;
mod record;
mod report;
mod run;
mod scene;
mod schedule;
mod stage;
mod text;
mod timeline;
mod truth;
mod watch;

#[derive(Debug, Subcommand)]
pub enum DrillCommand {
    /// Lists the drills: what each does, what it needs and where it may run
    #[command(after_help = "Example:\n  trefoil drill list")]
    List,
    /// Runs a drill; ends with 0 only when all recovered and no rule was broken
    #[command(after_help = EXAMPLES)]
    Run(RunArgs),
    /// Lets systemd on this machine run a drill by the calendar, and keep its results; lists and removes what is scheduled
    #[command(after_help = schedule::EXAMPLES)]
    Schedule(schedule::ScheduleArgs),
}

const EXAMPLES: &str = "\
Examples:
  trefoil drill run leader-kill --report report.html
  trefoil drill run node-power --image disk.qcow2 --times 20
  trefoil drill run leader-transfer --live --tenant acme

Exit status: 0 passed, 1 failed, 4 refused before anything was done, 6 unknown: the fault is not proved";

#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Which one
    #[arg(value_enum)]
    kind: Kind,
    #[command(flatten)]
    how: How,
    /// Writes the report to this file too, as a page for a browser
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Keeps result (JSON) and page in this directory, under a name with the time; the newest hundred of each drill stay
    #[arg(long, value_name = "DIRECTORY")]
    keep: Option<PathBuf>,
    /// Everything but the fault; its verdict is always unknown
    #[arg(long)]
    rehearsal: bool,
}

/// What a drill that is run and one that is scheduled have in common.
#[derive(Args, Clone, Debug)]
pub struct How {
    #[command(flatten)]
    placement: Placement,
    /// Not the cloud of `trefoil up` but the one of the client's configuration; the tenant's tag 'drill' must allow it
    #[arg(long)]
    live: bool,
    /// So many runs, one after the other
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MOST_RUNS))]
    times: u16,
    /// Makes machines of the drill's own from this disk image, and removes them afterwards
    #[arg(long, value_name = "FILE", conflicts_with = "live")]
    image: Option<PathBuf>,
    /// How many of them [default: one a host]
    #[arg(long, requires = "image", value_parser = clap::value_parser!(u16).range(1..=MOST_MACHINES))]
    machines: Option<u16>,
    /// What becomes of them when their host is lost
    #[arg(long, requires = "image", value_enum, default_value_t = Recovery::Exclusive)]
    recovery: Recovery,
    /// How long the fault lasts after what it should cause was seen
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "3s")]
    hold: Duration,
}

/// A run takes half a minute; a day of them is enough.
const MOST_RUNS: i64 = 2880;
/// The range of the drill's own network.
const MOST_MACHINES: i64 = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Recovery {
    /// Stopped at the end of the lease, re-created elsewhere: never two
    Exclusive,
    /// Goes on while its host is cut off, re-created elsewhere: two for a time
    Available,
}

impl Recovery {
    fn name(self) -> &'static str {
        match self {
            Self::Exclusive => "exclusive",
            Self::Available => "available",
        }
    }
}

/// What `drill run` answers.
#[derive(Serialize)]
struct Outcome {
    verdict: Verdict,
    distributions: Vec<Distribution>,
    runs: Vec<Report>,
    /// What could not be removed of what the drill had made.
    left: Vec<String>,
}

/// # Errors
/// `precondition` when it may not run, `failed` or `unproven` by its verdict.
pub async fn drill(command: DrillCommand, global: &Global, format: Format) -> Result<()> {
    let args = match command {
        DrillCommand::List => {
            let all: Vec<About> = Kind::value_variants().iter().map(|kind| kind.about()).collect();
            return Ok(output::print(format, &all, || list(&all))?);
        }
        DrillCommand::Schedule(args) => return schedule::schedule(args, global, format).await,
        DrillCommand::Run(args) => args,
    };
    let (runs, left) = run::all(&args, global).await?;
    let outcome = Outcome { verdict: overall(&runs), distributions: distributions(&runs), runs, left };
    let page = || page::render(&outcome.runs, &outcome.distributions);
    if let Some(path) = &args.report {
        std::fs::write(path, page()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(folder) = &args.keep {
        kept::keep(folder, args.kind, now_millis(), &serde_json::to_string_pretty(&outcome)?, &page())?;
    }
    output::print(format, &outcome, || text::render(&outcome.runs, &outcome.distributions, &outcome.left))?;
    let name = args.kind.name();
    match outcome.verdict {
        Verdict::Passed if outcome.left.is_empty() => Ok(()),
        Verdict::Passed => Err(ApiError::new("failed", format!("{name} passed, and left something behind")).into()),
        Verdict::Failed => Err(ApiError::new("failed", format!("the drill {name} failed")).into()),
        Verdict::Unknown => Err(ApiError::new("unproven", format!("nothing is proved by this run of {name}")).into()),
    }
}

fn list(all: &[About]) -> String {
    let row = |about: &About| vec![about.drill.name(), about.does.into(), about.needs.into(), about.runs_on.into()];
    Rows::new(&["DRILL", "DOES", "NEEDS", "RUNS ON"], all.iter().map(row)).render(None)
}
