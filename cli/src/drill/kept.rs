//! The results of drills that ran while nobody watched: a file of JSON and a page each, under a name with the drill and the time,
//! so that the order of the names is the order of the runs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::Value;

use super::kind::Kind;
use crate::moment::moment_text;

/// Two years of one a week, or three months of one a day; a page has up to some megabytes.
const MOST: usize = 100;

/// Writes both and removes the oldest of this drill beyond the bound.
///
/// # Errors
/// When the disk refuses.
pub fn keep(folder: &Path, kind: Kind, at_millis: u64, result: &str, page: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let stem = format!("{}-{}", kind.name(), moment_text(at_millis).replace(' ', "T").replace(':', ""));
    for (text, ending) in [(page, "html"), (result, "json")] {
        let path = folder.join(format!("{stem}.{ending}"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let all = results(folder, kind)?;
    for old in &all[..all.len().saturating_sub(MOST)] {
        for ending in ["json", "html"] {
            let path = old.with_extension(ending);
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// When the newest run was, and its verdict. `None` when there is none that can be read.
pub fn newest(folder: &Path, kind: Kind) -> Option<(String, String)> {
    let path = results(folder, kind).ok()?.pop()?;
    let result: Value = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
    let when = path.file_stem()?.to_str()?.strip_prefix(&format!("{}-", kind.name()))?.to_owned();
    Some((when, result["verdict"].as_str()?.to_owned()))
}

/// The oldest first.
fn results(folder: &Path, kind: Kind) -> Result<Vec<PathBuf>> {
    let prefix = format!("{}-", kind.name());
    let ours = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.ends_with(".json")
            && name.strip_prefix(&prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(ours).collect();
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_hundred_of_each_drill_stay() {
        let folder = tempfile::tempdir().unwrap();
        keep(folder.path(), Kind::LeaderKill, 1_000, r#"{"verdict":"failed"}"#, "page").unwrap();
        for day in 1..=MOST as u64 + 3 {
            keep(folder.path(), Kind::BackupRestore, day * 86_400_000, r#"{"verdict":"passed"}"#, "page").unwrap();
        }
        let all = results(folder.path(), Kind::BackupRestore).unwrap();
        assert_eq!(all.len(), MOST);
        assert!(all[0].ends_with("backup-restore-1970-01-05T000000.json"), "{:?}", all[0]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2 * MOST + 2, "each with its page");
        assert_eq!(newest(folder.path(), Kind::LeaderKill).unwrap(), ("1970-01-01T000001".into(), "failed".into()));
        assert_eq!(newest(folder.path(), Kind::DiskFull), None);
    }
}
