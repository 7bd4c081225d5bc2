//! Stories in `testdata/*.txt`: what is asked after `> `, what it came to on the lines below, up to the next blank line.
//!
//! Below each command stand its reply, and every machine, host and image of which a person would now read something
//! else. `UPDATE=1 cargo test -p model --test scenarios` writes what happens today into the files; the diff is reviewed.
//! The commands are those of `story/commands.rs`. Time stands still but for `> wait`.

use std::{fs, path::Path};

#[path = "story/commands.rs"]
mod commands;
#[path = "story/told.rs"]
mod told;

use commands::Story;

/// Tells the story again: the same comments and commands, each with what it comes to today.
fn retell(text: &str) -> String {
    let mut story = Story::default();
    let mut out = String::new();
    for line in text.lines() {
        let said = line.is_empty() || line.starts_with('#') || line.starts_with("> ");
        if said {
            out.push_str(line);
            out.push('\n');
        }
        if let Some(command) = line.strip_prefix("> ") {
            let came = story.tell(command).unwrap_or_else(|why| panic!("'{command}' is not understood: {why}"));
            came.lines().for_each(|line| out.push_str(&format!("{line}\n")));
        }
    }
    out
}

#[test]
#[allow(clippy::disallowed_methods, reason = "how a person asks for new files")]
fn the_stories_end_as_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ending| ending == "txt"));
    files.sort();
    assert!(files.len() >= 12, "the stories are missing");
    let mut wrong = Vec::new();
    for path in files {
        let kept = fs::read_to_string(&path).unwrap();
        let today = retell(&kept);
        let difference = kept.lines().zip(today.lines()).enumerate().find(|(_, (kept, today))| kept != today);
        let lengths = (kept.lines().count(), today.lines().count());
        if kept != today && std::env::var_os("UPDATE").is_some() {
            fs::write(&path, &today).unwrap();
        } else if kept != today {
            wrong.push(format!("{}: first difference {difference:?}, lines {lengths:?}\n{today}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
