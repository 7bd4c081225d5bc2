//! `make sabotage`: tests of the tests. Each line of `tests/sabotages.toml` breaks the product in one place; the test
//! that is named there must notice it. One that nobody notices is a missing test.
//!
//! The work tree is never touched: everything happens in a copy beside the build folder.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Output},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Deserialize;

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
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the crate is in the workspace")?;
    let list: Sabotages = toml::from_str(&fs::read_to_string(root.join("tests/sabotages.toml"))?)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let tree = target.join("sabotage/tree");
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

/// All that git knows of or would take up, as it is now. What is there already and the same stays untouched, so that
/// little is built anew.
fn copy(root: &Path, tree: &Path) -> Result<()> {
    let listed = Command::new("git").args(["ls-files", "-co", "--exclude-standard"]).current_dir(root).output()?;
    if !listed.status.success() {
        bail!("git cannot list the tree: {}", String::from_utf8_lossy(&listed.stderr));
    }
    let list = String::from_utf8(listed.stdout)?;
    let list_path = tree.join("copied-files");
    let earlier = fs::read_to_string(&list_path).unwrap_or_default();
    if tree.exists() && !earlier.lines().all(|name| root.join(name).exists()) {
        fs::remove_dir_all(tree)?;
    }
    for name in list.lines().filter(|name| root.join(name).is_file()) {
        let (from, to) = (fs::read(root.join(name))?, tree.join(name));
        if fs::read(&to).is_ok_and(|there| there == from) {
            continue;
        }
        fs::create_dir_all(to.parent().context("a file has a folder")?)?;
        fs::write(&to, from).with_context(|| format!("cannot copy {name}"))?;
    }
    Ok(fs::write(list_path, list)?)
}

fn judge(tree: &Path, sabotage: &Sabotage, release: bool) -> Result<Verdict> {
    let path = tree.join(&sabotage.file);
    let sound = fs::read_to_string(&path).with_context(|| sabotage.file.clone())?;
    let places = sound.matches(&sabotage.from).count();
    if places != 1 {
        return Ok(Verdict::Void(format!("what it replaces is in {} {places} times", sabotage.file)));
    }
    fs::write(&path, sound.replace(&sabotage.from, &sabotage.to))?;
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

fn cargo(tree: &Path, arguments: &[&str], release: bool) -> Result<Output> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).arg("--locked").current_dir(tree);
    // Cargo would take the tree and its copy for the same packages, and the product of one for the other's.
    command.env("CARGO_TARGET_DIR", tree.with_file_name("target"));
    if release {
        command.arg("--release");
    }
    command.output().context("cargo does not run")
}

fn last_error(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().find(|line| line.starts_with("error")).or_else(|| text.lines().last());
    line.unwrap_or_default().to_owned()
}
