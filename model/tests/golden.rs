//! Today's encoding of what outlives a process: log entries and rows. A byte that changes here is a log that yesterday's
//! binary cannot read; `UPDATE=1 cargo test -p model --test golden` rewrites the files, and the diff is reviewed.

use std::{fmt::Write, fs, path::Path};

use proptest::prelude::*;

#[path = "golden/examples.rs"]
mod examples;

use model::{table::RowChange, *};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").expect("a string takes everything");
        out
    })
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// Compares with the file, or writes it when asked to.
#[allow(clippy::disallowed_methods, reason = "how a person asks for new files")]
fn check(name: &str, today: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/golden").join(name);
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, today).unwrap();
    }
    let file = fs::read_to_string(&path).unwrap_or_default();
    for (line, (kept, new)) in file.lines().zip(today.lines()).enumerate() {
        assert_eq!(kept, new, "{name} line {}: the encoding has changed", line + 1);
    }
    assert_eq!(file.lines().count(), today.lines().count(), "{name} has other lines than today's examples");
}

#[test]
fn entries_are_encoded_as_ever() {
    let mut today = String::new();
    for entry in examples::entries() {
        writeln!(today, "{} {}", examples::name(&entry.command), hex(&postcard::to_stdvec(&entry).unwrap())).unwrap();
    }
    check("entries.txt", &today);
    for (line, entry) in today.lines().zip(examples::entries()) {
        let (_, encoded) = line.split_once(' ').unwrap();
        assert_eq!(postcard::from_bytes::<Entry>(&bytes(encoded)).unwrap(), entry);
    }
}

#[test]
fn every_command_has_an_example() {
    let seen: std::collections::BTreeSet<_> =
        examples::entries().iter().map(|entry| examples::name(&entry.command)).collect();
    // Fifteen of tenants, nineteen of operators, eight of nodes, nineteen of planners; `name` fails to compile when one is
    // added.
    assert_eq!(seen.len(), 15 + 19 + 8 + 19, "{seen:?}");
}

#[test]
fn rows_are_encoded_as_ever() {
    let mut state = examples::state();
    let mut changes = state.drain_changes();
    // What came and went before anything was stored.
    changes.retain(|change| change.row.is_some());
    let tables: std::collections::BTreeSet<u8> = changes.iter().map(|change| change.table).collect();
    assert_eq!(tables, (0..=16).collect(), "every table has a row");
    let line = |RowChange { table, key, row }: &RowChange| {
        format!("{table} {} {}\n", hex(key), hex(row.as_deref().unwrap_or_default()))
    };
    let today: String = changes.iter().map(line).collect();
    check("rows.txt", &format!("{today}hash {}\n", hex(&state.hash())));
    let rows = changes.into_iter().map(|change| (change.table, change.key, change.row.unwrap()));
    let loaded = State::load(rows).unwrap();
    assert_eq!((loaded.hash(), loaded.kept_index()), (state.hash(), state.kept_index()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
        let _ = postcard::from_bytes::<Entry>(&bytes);
        let _ = State::load(std::iter::once((bytes.first().copied().unwrap_or(0) % 18, bytes.clone(), bytes)));
    }

    #[test]
    fn a_damaged_entry_is_read_as_another_or_refused(which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let entries = examples::entries();
        let mut bytes = postcard::to_stdvec(&entries[which.index(entries.len())]).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(entry) = postcard::from_bytes::<Entry>(&bytes) {
            let again = postcard::to_stdvec(&entry).unwrap();
            prop_assert_eq!(postcard::from_bytes::<Entry>(&again).unwrap(), entry);
        }
        let end = cut.index(bytes.len());
        let _ = postcard::from_bytes::<Entry>(&bytes[..end]);
    }
}
