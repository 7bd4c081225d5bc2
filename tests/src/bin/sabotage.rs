//! `make sabotage`: tests of the tests. Each line of `tests/sabotages.toml` breaks the product in one place; the test
//! that is named there must notice it. One that nobody notices is a missing test.
//!
//! The work tree is never touched: everything happens in a copy beside the build folder.

use std::{fs, path::Path, process::ExitCode, time::Instant};

use anyhow::{Context, Result};
use clap::Parser;
use serde::Deserialize;
use tests::tree::{cargo, copy, last_error, places, replace};

#[derive(Parser)]
struct Arguments {
    /// Only those whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Build optimised: slower to build, faster to run.
    #[arg(long)]
    release: bool,
}

#[derive(Deserialize)]
struct Sabotages {
    sabotage: Vec<Sabotage>,
}

/// One place, one replacement, one test.
#[derive(Deserialize)]
struct Sabotage {
    name: String,
    file: String,
    from: String,
    to: String,
    /// `simulation`, or package, target (`lib` or a test's file) and the test's name.
    caught_by: String,
}

enum Verdict {
    Caught(String),
    Survived,
    /// The list is wrong: nothing can be said.
    Void(String),
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("sabotage: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let (root, tree) = places()?;
    let list: Sabotages = toml::from_str(&fs::read_to_string(root.join("tests/sabotages.toml"))?)?;
    copy(root, &tree)?;
    let (mut caught, mut others) = (0, 0);
    for sabotage in &list.sabotage {
        if arguments.only.as_ref().is_some_and(|only| !sabotage.name.contains(only.as_str())) {
            continue;
        }
        let began = Instant::now();
        let verdict = judge(&tree, sabotage, arguments.release)?;
        let (word, detail) = match &verdict {
            Verdict::Caught(how) => ("caught", how.as_str()),
            Verdict::Survived => ("SURVIVED", "no test noticed it"),
            Verdict::Void(why) => ("VOID", why.as_str()),
        };
        println!(
            "{word:<8} {:>4} s  {}\n                 {}: {detail}",
            began.elapsed().as_secs(),
            sabotage.name,
            sabotage.caught_by
        );
        if matches!(verdict, Verdict::Caught(_)) { caught += 1 } else { others += 1 }
    }
    println!("{caught} caught, {others} not");
    Ok(others == 0 && caught > 0)
}

fn judge(tree: &Path, sabotage: &Sabotage, release: bool) -> Result<Verdict> {
    let path = tree.join(&sabotage.file);
    let sound = fs::read_to_string(&path).with_context(|| sabotage.file.clone())?;
    if let Err(why) = replace(&path, &sabotage.from, &sabotage.to) {
        return Ok(Verdict::Void(format!("{why:#}")));
    }
    let verdict = notice(tree, &sabotage.caught_by, release);
    fs::write(&path, sound)?;
    verdict
}

fn notice(tree: &Path, test: &str, release: bool) -> Result<Verdict> {
    let words: Vec<&str> = test.split_whitespace().collect();
    let (build, check): (Vec<&str>, Vec<&str>) = match words[..] {
        ["simulation"] => {
            let binary = ["-p", "simulation", "--bin", "simulate"];
            ([&["build"], &binary[..]].concat(), [&["run"], &binary[..]].concat())
        }
        [package, "lib", name] => {
            let target = ["test", "-p", package, "--lib"];
            ([&target[..], &["--no-run"]].concat(), [&target[..], &[name]].concat())
        }
        [package, file, name] => {
            let target = ["test", "-p", package, "--test", file];
            ([&target[..], &["--no-run"]].concat(), [&target[..], &[name]].concat())
        }
        _ => return Ok(Verdict::Void(format!("'{test}' names no test"))),
    };
    let built = cargo(tree, &[&build[..], &["--quiet"]].concat(), release)?;
    if !built.status.success() {
        return Ok(Verdict::Void(format!("it does not compile: {}", last_error(&built.stderr))));
    }
    let checked = cargo(tree, &check, release)?;
    let said = String::from_utf8_lossy(&checked.stdout);
    let noticed = match words[..] {
        ["simulation"] => said.lines().rev().find(|line| line.starts_with("seed ")),
        _ => said.lines().find(|line| line.starts_with("test ") && line.ends_with("FAILED")),
    };
    match (checked.status.success(), noticed) {
        (true, _) if said.contains("running 0 tests") => Ok(Verdict::Void(format!("there is no test '{test}'"))),
        (true, _) => Ok(Verdict::Survived),
        (false, Some(line)) => Ok(Verdict::Caught(line.to_owned())),
        (false, None) => Ok(Verdict::Void(format!("it ended otherwise: {}", last_error(&checked.stderr)))),
    }
}
