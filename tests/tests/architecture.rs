//! The picture in ARCHITECTURE.md, held by a test: who may import whom, what `model` may not touch, what no file of
//! this repository may carry; and that the manual knows every setting.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Crates of this workspace that each one may import. Tests may import what they like.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("api", &["model"]),
    ("storage", &["model"]),
    ("raft", &["model", "storage", "api"]),
    ("nodeagent", &["model", "api", "storage"]),
    ("controller", &["model", "api", "raft", "storage"]),
    ("cli", &["api", "controller", "nodeagent"]),
    ("jepsen", &["api"]),
    ("simulation", &["model"]),
    ("tests", &["model", "api", "storage", "raft", "nodeagent", "controller", "cli", "jepsen", "simulation"]),
];

/// What `model` may use from outside: nothing that can wait, look or choose.
const MODEL_MAY_USE: &[&str] = &["serde", "thiserror", "postcard", "blake3"];

/// Crates that stay behind one door: no other crate may name them.
const SEALED: &[(&str, &str)] =
    &[("openraft", "raft"), ("rocksdb", "storage"), ("virt", "nodeagent"), ("rtnetlink", "nodeagent")];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the workspace").to_owned()
}

/// Crate to the names it imports, tests of the crate left out.
fn imports() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let names = |package: &Value| {
        let dependencies = package["dependencies"].as_array().into_iter().flatten();
        let used = dependencies.filter(|d| d["kind"].as_str() != Some("dev"));
        used.map(|d| d["name"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let packages = metadata["packages"].as_array().expect("packages");
    packages.iter().map(|p| (p["name"].as_str().unwrap_or_default().to_owned(), names(p))).collect()
}

#[test]
fn crates_import_only_what_the_picture_allows() {
    let imports = imports();
    let ours: Vec<&str> = MAY_IMPORT.iter().map(|(name, _)| *name).collect();
    for (name, used) in &imports {
        let (_, allowed) = MAY_IMPORT
            .iter()
            .find(|(crate_name, _)| crate_name == name)
            .unwrap_or_else(|| panic!("crate '{name}' is not in the picture"));
        for dependency in used.iter().filter(|d| ours.contains(&d.as_str())) {
            assert!(allowed.contains(&dependency.as_str()), "'{name}' may not import '{dependency}'");
        }
    }
    assert_eq!(imports.len(), MAY_IMPORT.len(), "every crate of the picture exists");
}

#[test]
fn sealed_libraries_have_one_door() {
    for (name, used) in imports() {
        for (library, door) in SEALED {
            assert!(
                name == *door || !used.iter().any(|d| d == library),
                "'{name}' may not name {library}; {door} does"
            );
        }
    }
}

#[test]
fn model_can_neither_wait_nor_look_nor_choose() {
    for dependency in &imports()["model"] {
        assert!(MODEL_MAY_USE.contains(&dependency.as_str()), "model may not use '{dependency}'");
    }
    let rules =
        std::fs::read_to_string(root().join("model/clippy.toml")).expect("model/clippy.toml bans what is impure");
    for banned in ["std::collections::HashMap", "std::time::SystemTime", "std::time::Instant"] {
        assert!(rules.contains(banned), "model/clippy.toml must ban {banned}");
    }
    for (path, text) in sources(&root().join("model/src")) {
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let words: Vec<&str> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            for float in ["f32", "f64"] {
                assert!(!words.contains(&float), "{}:{}: no floats in model", path.display(), number + 1);
            }
        }
    }
}

#[test]
fn every_file_opens_by_saying_what_it_is_for() {
    none_of("do not open with //!", |path, text| !text.starts_with("//!") && !path.ends_with("build.rs"));
}

#[test]
fn files_carry_nothing_of_the_machine_they_were_written_on() {
    // Put together here, so that this file does not carry them either.
    let banned = [["TO", "DO"].concat(), ["FIX", "ME"].concat(), ["/ro", "ot/"].concat(), ["/wo", "rk/"].concat()];
    none_of("carry what belongs elsewhere", |_, text| banned.iter().any(|word| text.contains(word.as_str())));
}

#[test]
fn files_and_modules_have_one_layout() {
    none_of("should be foo.rs beside foo/", |path, _| path.ends_with("mod.rs"));
    let vague = ["util", "utils", "common", "helper", "helpers", "types", "misc"];
    let says_nothing =
        |path: &Path| path.file_stem().and_then(|s| s.to_str()).is_some_and(|stem| vague.contains(&stem));
    none_of("have a name that says nothing", |path, _| says_nothing(path));
}

#[test]
fn no_file_grows_without_end() {
    // Longer than any part of this project that reads well; generated and golden data are not Rust files.
    none_of("are longer than 500 lines", |_, text| text.lines().count() > 500);
}

/// What breaks the product on purpose must find its place in it and a test that is to notice, or it shows nothing.
#[test]
fn every_break_finds_its_place_and_its_test() {
    let list = |name: &str| {
        let text = std::fs::read_to_string(root().join("tests").join(name)).expect("a list of breaks");
        toml::from_str::<toml::Table>(&text).expect("it is TOML")
    };
    let word = |table: &toml::Value, key: &str| table[key].as_str().expect("a text").to_owned();
    let tables = |list: &toml::Table, key: &str| list[key].as_array().expect("tables").clone();
    let mut texts: BTreeMap<String, String> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut broken = |place: &toml::Value, stays: bool| {
        let (file, from) = (word(place, "file"), word(place, "from"));
        let text = texts
            .entry(file.clone())
            .or_insert_with_key(|file| std::fs::read_to_string(root().join(file)).unwrap_or_default());
        let places = text.matches(&from).count();
        if stays {
            *text = text.replace(&from, &word(place, "to"));
        }
        if places == 1 { None } else { Some(format!("{places} places in {file}: {from}")) }
    };
    let sources = all_sources();
    for sabotage in tables(&list("sabotages.toml"), "sabotage") {
        wrong.extend(broken(&sabotage, false));
        let test = word(&sabotage, "caught_by");
        let name = test.split_whitespace().last().expect("a test").rsplit("::").next().expect("a name").to_owned();
        let is_there = |(_, text): &(PathBuf, String)| text.contains(&format!("fn {name}("));
        if test != "simulation" && !sources.iter().any(is_there) {
            wrong.push(format!("no test '{test}'"));
        }
    }
    // These are put in together, one after the other.
    for bug in tables(&list("seeded-bugs.toml"), "bug") {
        wrong.extend(bug["place"].as_array().expect("places").iter().filter_map(|place| broken(place, true)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What operators are told of the settings must be what the quorum has.
#[test]
fn the_manual_has_every_setting_with_its_default_and_range() {
    let manual = std::fs::read_to_string(root().join("docs/operating.md")).expect("a manual");
    let chapter =
        manual.split("\n## ").find(|chapter| chapter.starts_with("Settings\n")).expect("a chapter on settings");
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).skip(1).take(3).collect::<Vec<_>>();
    let documented: Vec<_> = chapter.lines().filter(|line| line.starts_with("| `")).map(cells).collect();
    let real: Vec<_> = model::setting::SETTINGS
        .iter()
        .map(|s| vec![format!("`{}`", s.name), s.default.to_string(), format!("{}–{}", s.min, s.max)])
        .collect();
    assert_eq!(documented, real);
}

/// A monitor waits for these texts; nobody would notice one that is written no more.
#[test]
fn the_manual_names_log_lines_that_are_written() {
    let manual = std::fs::read_to_string(root().join("docs/operating.md")).expect("a manual");
    let chapter = manual.split("\n## ").find(|chapter| chapter.starts_with("Logs\n")).expect("a chapter on logs");
    let servers = ["| controller | `", "| agent | `", "| guard | `"];
    let said =
        |line: &str| servers.iter().find_map(|server| line.strip_prefix(server)?.split('`').next().map(str::to_owned));
    let lines: Vec<String> = chapter.lines().filter_map(said).collect();
    let sources = all_sources();
    let unknown: Vec<_> = lines.iter().filter(|line| !sources.iter().any(|(_, text)| text.contains(*line))).collect();
    assert!(!lines.is_empty() && unknown.is_empty(), "no source says {unknown:?}");
}

/// Fails with every source file of which it is true.
fn none_of(what: &str, wrong: impl Fn(&Path, &str) -> bool) {
    let all = all_sources();
    let found: Vec<String> =
        all.iter().filter(|(path, text)| wrong(path, text)).map(|(path, _)| path.display().to_string()).collect();
    assert!(found.is_empty(), "{} files {what}:\n{}", found.len(), found.join("\n"));
}

fn all_sources() -> Vec<(PathBuf, String)> {
    MAY_IMPORT.iter().flat_map(|(name, _)| sources(&root().join(name))).collect()
}

/// Every Rust file below, with its text.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the repository").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file is text");
                found.push((path, text));
            }
        }
    }
    found
}
