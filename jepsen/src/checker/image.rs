//! An acknowledged image has all its bytes: at every export, and on as many hosts as it should be, after calm.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Finding;
use crate::history::{Function, Kind, Operation};

/// `fetched`: of each controller, after calm, the images that it gave. `disks`: of each host, after calm, the name of each blob with the digest of its bytes.
pub fn check(
    operations: &[Operation],
    fetched: &[(&str, &Value)],
    disks: &[(&str, &Value)],
    replicas: usize,
) -> Finding {
    let mut imported: BTreeMap<&str, (&str, u64)> = BTreeMap::new();
    let mut asked: BTreeMap<&str, &str> = BTreeMap::new();
    for import in operations.iter().filter(|o| o.f == Function::Import) {
        let digest = import.asked.as_str().unwrap_or_default();
        asked.insert(&import.key, digest);
        if import.outcome != Kind::Ok {
            continue;
        }
        if import.answered != import.asked {
            return Finding::Broken(format!("image: '{}' was acknowledged as {}", import.key, import.answered));
        }
        imported.insert(&import.key, (digest, import.end));
    }
    if imported.is_empty() || fetched.is_empty() || disks.is_empty() {
        return Finding::Undecided("image: none was acknowledged, or nobody was asked for it at the end".into());
    }
    for export in operations.iter().filter(|o| o.f == Function::Export) {
        let (name, outcome) = (export.key.as_str(), export.outcome);
        if outcome == Kind::Ok && asked.get(name).is_none_or(|digest| export.answered != *digest) {
            return Finding::Broken(format!("image: {} gave other bytes for '{name}'", export.node));
        }
        let there = imported.get(name).is_some_and(|(_, acknowledged)| *acknowledged < export.start);
        if there && export.code() == "not-found" {
            return Finding::Broken(format!("image: {} does not know '{name}', which was acknowledged", export.node));
        }
    }
    for (controller, names) in fetched {
        let given = |name: &str| names.as_array().is_some_and(|names| names.iter().any(|given| given == name));
        if let Some(name) = imported.keys().find(|name| !given(name)) {
            return Finding::Broken(format!("image: after calm {controller} does not give '{name}'"));
        }
    }
    on_disks(&imported, disks, replicas)
}

fn on_disks(imported: &BTreeMap<&str, (&str, u64)>, disks: &[(&str, &Value)], replicas: usize) -> Finding {
    for (host, blobs) in disks {
        let damaged = blobs.as_object().into_iter().flatten().find(|(name, digest)| *digest != name.as_str());
        if let Some((name, digest)) = damaged {
            return Finding::Broken(format!("image: the bytes of {name} on {host} hash to {digest}"));
        }
    }
    for (name, (digest, _)) in imported {
        let copies = disks.iter().filter(|(_, blobs)| blobs.get(digest).is_some()).count();
        if copies < replicas {
            return Finding::Broken(format!("image: after calm '{name}' is on {copies} hosts, not {replicas}"));
        }
    }
    Finding::Holds
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checker::trial::operation;

    fn import(outcome: Kind) -> Operation {
        operation(Function::Import, "a", json!("d1"), outcome, 0, 5)
    }

    fn export(digest: &str, at: u64) -> Operation {
        operation(Function::Export, "a", json!(digest), Kind::Ok, at, at + 1)
    }

    fn verdict(history: &[Operation], one: Value, two: Value) -> Finding {
        check(history, &[("controller-1", &json!(["a"]))], &[("host-1", &one), ("host-2", &two)], 2)
    }

    #[test]
    fn two_good_copies_and_equal_exports_hold() {
        let disk = || json!({"d1": "d1", "d2": "d2"});
        assert_eq!(verdict(&[import(Kind::Ok), export("d1", 7)], disk(), disk()), Finding::Holds);
        // What nobody knows may be exported, and need not be anywhere.
        let perhaps = operation(Function::Import, "b", json!("d9"), Kind::Info, 0, u64::MAX);
        let seen = operation(Function::Export, "b", json!("d9"), Kind::Ok, 8, 9);
        assert_eq!(verdict(&[import(Kind::Ok), perhaps, seen], disk(), disk()), Finding::Holds);
    }

    #[test]
    fn other_bytes_too_few_copies_and_forgotten_images_are_broken() {
        let disk = || json!({"d1": "d1"});
        let broken = |history: &[Operation], one, two| matches!(verdict(history, one, two), Finding::Broken(_));
        assert!(broken(&[import(Kind::Ok), export("d2", 7)], disk(), disk()));
        assert!(broken(&[import(Kind::Ok)], disk(), json!({})));
        assert!(broken(&[import(Kind::Ok)], disk(), json!({"d1": "d3"})));
        let (disk, nothing) = (disk(), json!([]));
        let disks = [("host-1", &disk), ("host-2", &disk)];
        assert!(matches!(check(&[import(Kind::Ok)], &[("c", &nothing)], &disks, 2), Finding::Broken(_)));
        let disk = || disk.clone();
        let mut forgotten = operation(Function::Export, "a", Value::Null, Kind::Fail, 7, 8);
        forgotten.error = "not-found: no image 'a'".into();
        assert!(broken(&[import(Kind::Ok), forgotten], disk(), disk()));
    }

    #[test]
    fn without_an_image_or_a_disk_nothing_is_decided() {
        assert!(matches!(verdict(&[import(Kind::Info)], json!({}), json!({})), Finding::Undecided(_)));
        let fetched = json!(["a"]);
        assert!(matches!(check(&[import(Kind::Ok)], &[("c", &fetched)], &[], 2), Finding::Undecided(_)));
    }
}
