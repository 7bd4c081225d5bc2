//! A copy of the work tree beside the build folder, to break the product in. The work tree itself is never touched.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, bail};

/// The work tree that this was built from, and where its copy is.
///
/// # Errors
/// When there is none.
pub fn places() -> Result<(&'static Path, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the crate is in the workspace")?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok((root, target.join("sabotage/tree")))
}

/// All that git knows of or would take up, as it is now. What is there already and the same stays untouched, so that
/// little is built anew.
///
/// # Errors
/// When git or the disk fails.
pub fn copy(root: &Path, tree: &Path) -> Result<()> {
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

/// Puts `to` where `from` is in the file, which must be one place.
///
/// # Errors
/// When it is in no place or in several, or the disk fails.
pub fn replace(file: &Path, from: &str, to: &str) -> Result<()> {
    let sound = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let places = sound.matches(from).count();
    if places != 1 {
        bail!("what it replaces is in {} {places} times", file.display());
    }
    Ok(fs::write(file, sound.replace(from, to))?)
}

/// Runs it in the copy, with a build folder of its own.
///
/// # Errors
/// When it does not run.
pub fn cargo(tree: &Path, arguments: &[&str], release: bool) -> Result<Output> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).arg("--locked").current_dir(tree);
    // Cargo would take the tree and its copy for the same packages, and the product of one for the other's.
    command.env("CARGO_TARGET_DIR", tree.with_file_name("target"));
    if release {
        command.arg("--release");
    }
    command.output().context("cargo does not run")
}

/// What a compiler complained of first.
pub fn last_error(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().find(|line| line.starts_with("error")).or_else(|| text.lines().last());
    line.unwrap_or_default().to_owned()
}
