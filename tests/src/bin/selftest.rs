//! `make jepsen-selftest`: can the Jepsen tests fail? Each bug of `tests/seeded-bugs.toml` must end in a violation that
//! the named checker found, and the same run without the bug must pass.
//!
//! All bugs are put into one copy of the tree, each behind a switch in the environment, and built once. The product's
//! own source has neither the bugs nor the switch, so no release can have them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Deserialize;
use tests::tree::{cargo, copy, last_error, places, replace};

/// What stands for the switch in the list.
const SWITCH: &str = "{{bug}}";
const VARIABLE: &str = "TREFOIL_SEEDED_BUG";
/// As `trefoil-jepsen` ends.
const PASS: i32 = 0;
const VIOLATION: i32 = 1;

#[derive(Parser)]
struct Arguments {
    /// Only those whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// How many seeds a bug has before it has survived; not each run meets the one moment that some need.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Build optimised: slower to build, faster to run.
    #[arg(long)]
    release: bool,
    /// Leave out the runs without bugs.
    #[arg(long)]
    bugs_only: bool,
}

#[derive(Deserialize)]
struct Bugs {
    bug: Vec<Bug>,
}

#[derive(Deserialize)]
struct Bug {
    name: String,
    what: String,
    /// What `trefoil-jepsen` is told, without the seed.
    run: String,
    /// How the finding begins that must be broken.
    caught_by: String,
    place: Vec<Place>,
}

/// One replacement. The same place may have several bugs: a later one finds what an earlier one has left.
#[derive(Deserialize)]
struct Place {
    file: String,
    from: String,
    to: String,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("selftest: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let (root, tree) = places()?;
    let list: Bugs = toml::from_str(&fs::read_to_string(root.join("tests/seeded-bugs.toml"))?)?;
    copy(root, &tree)?;
    let built = build(&tree, &list, arguments.release);
    // The copy is sound again, whatever came of it.
    copy(root, &tree)?;
    let binary = built?;

    let wanted = |bug: &&Bug| arguments.only.as_ref().is_none_or(|only| bug.name.contains(only.as_str()));
    let mut sound = BTreeSet::new();
    let mut well = true;
    for bug in list.bug.iter().filter(wanted) {
        let began = Instant::now();
        let caught = (1..=arguments.seeds).find_map(|seed| match notice(&binary, bug, seed) {
            Ok(Some(how)) => Some(Ok((seed, how))),
            Ok(None) => None,
            Err(error) => Some(Err(error)),
        });
        let (word, detail, seed) = match caught.transpose()? {
            Some((seed, how)) => ("caught", how, seed),
            None => ("SURVIVED", format!("{} seeds, nobody noticed it", arguments.seeds), arguments.seeds),
        };
        well &= word == "caught";
        let name = &bug.name;
        println!("{word:<8} {:>4} s  {name}: {}, seed {seed}\n{:>17}{detail}", began.elapsed().as_secs(), bug.what, "");
        sound.insert((bug.run.clone(), seed));
    }
    for (run, seed) in sound.iter().filter(|_| !arguments.bugs_only) {
        let began = Instant::now();
        let (status, said) = jepsen(&binary, run, *seed, None)?;
        let clean = status == PASS;
        well &= clean;
        let word = if clean { "clean" } else { "NOT CLEAN" };
        println!("{word:<8} {:>4} s  without a bug: {run}, seed {seed}", began.elapsed().as_secs());
        if !clean {
            println!("{said}");
        }
    }
    Ok(well && !sound.is_empty())
}

/// The command line with all bugs in it.
fn build(tree: &Path, list: &Bugs, release: bool) -> Result<PathBuf> {
    for bug in &list.bug {
        let switch = format!("std::env::var_os(\"{VARIABLE}\").is_some_and(|bug| bug == \"{}\")", bug.name);
        for place in &bug.place {
            ensure!(place.to.contains(SWITCH), "'{}' has a place without {SWITCH}: it would always be there", bug.name);
            replace(&tree.join(&place.file), &place.from, &place.to.replace(SWITCH, &switch))
                .with_context(|| bug.name.clone())?;
        }
    }
    let built = cargo(tree, &["build", "-p", "cli", "--bin", "trefoil", "--quiet"], release)?;
    ensure!(built.status.success(), "the bugs do not compile: {}", last_error(&built.stderr));
    let profile = if release { "release" } else { "debug" };
    Ok(tree.with_file_name("target").join(profile).join("trefoil"))
}

/// What was found, if it was the checker that the list names.
fn notice(binary: &Path, bug: &Bug, seed: u64) -> Result<Option<String>> {
    let (status, said) = jepsen(binary, &bug.run, seed, Some(&bug.name))?;
    let found = said.lines().find(|line| line.starts_with(&bug.caught_by) && line.contains("BROKEN"));
    match found {
        Some(line) if status == VIOLATION => Ok(Some(line.split_whitespace().collect::<Vec<_>>().join(" "))),
        _ => {
            eprintln!("{}: seed {seed}: ended with {status}, and not by '{}':", bug.name, bug.caught_by);
            said.lines()
                .filter(|line| line.contains("BROKEN") || line.contains("failure"))
                .for_each(|l| eprintln!("  {l}"));
            Ok(None)
        }
    }
}

/// Runs it to its end: its status, and all that it said.
fn jepsen(binary: &Path, run: &str, seed: u64, bug: Option<&str>) -> Result<(i32, String)> {
    let own = std::env::current_exe()?;
    let program = own.with_file_name("trefoil-jepsen");
    let folder = std::env::temp_dir().join(format!("tfs-{}", std::process::id()));
    let mut command = Command::new(&program);
    command.args(run.split_whitespace()).args(["--seed", &seed.to_string(), "--folder"]).arg(&folder);
    command.env("TREFOIL_BIN", binary).env_remove(VARIABLE).envs(bug.map(|name| (VARIABLE, name)));
    let output = command.output().with_context(|| program.display().to_string())?;
    let kept = fs::remove_dir_all(&folder);
    kept.with_context(|| format!("{} is left", folder.display()))?;
    let said = [output.stderr, output.stdout].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Ok((output.status.code().unwrap_or(-1), said))
}
