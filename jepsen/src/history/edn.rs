//! The history for the checkers that the field uses: EDN, one map a line.
//!
//! ```text
//! knossos/KEY.edn   one register: :read, :write, :cas [old new]; for Knossos with the model cas-register
//! elle.edn          all registers as transactions on rw-register: a compare-and-set reads the old and writes the new value
//! set.edn           the set: :add, :read; for the set-full checker
//! ```
//! Written values lose their letter (`v17` becomes 17), as these checkers like numbers. Deliberately not here: what other
//! workloads do; Knossos and Elle have no model of it.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use serde_json::Value;

use super::{Event, Function, Kind};

/// Writes all files into a folder, which is made.
///
/// # Errors
/// When the disk takes them not.
pub fn export(folder: &Path, events: &[Event]) -> std::io::Result<()> {
    fs::create_dir_all(folder.join("knossos"))?;
    let mut by_key: BTreeMap<&str, String> = BTreeMap::new();
    let (mut elle, mut set) = (String::new(), String::new());
    for event in events {
        match event.f {
            Function::Read | Function::Write | Function::Cas => {
                line(by_key.entry(&event.key).or_default(), event, name(event.f), &register_value(event));
                line(&mut elle, event, ":txn", &transaction(event));
            }
            Function::Add => line(&mut set, event, ":add", &value(&event.value)),
            Function::List => line(&mut set, event, ":read", &elements(event)),
            _ => {}
        }
    }
    for (key, text) in by_key {
        fs::write(folder.join("knossos").join(format!("{key}.edn")), text)?;
    }
    fs::write(folder.join("elle.edn"), elle)?;
    fs::write(folder.join("set.edn"), set)
}

fn line(out: &mut String, event: &Event, f: &str, value: &str) {
    let kind = match event.kind {
        Kind::Invoke => ":invoke",
        Kind::Ok => ":ok",
        Kind::Fail => ":fail",
        Kind::Info => ":info",
    };
    let (process, time) = (event.process, event.time);
    let _ = writeln!(out, "{{:process {process}, :type {kind}, :f {f}, :value {value}, :time {time}}}");
}

fn name(f: Function) -> &'static str {
    match f {
        Function::Write => ":write",
        Function::Cas => ":cas",
        _ => ":read",
    }
}

fn register_value(event: &Event) -> String {
    match event.f {
        Function::Cas => format!("[{} {}]", value(&event.value[0]), value(&event.value[1])),
        _ => value(&event.value),
    }
}

/// What was read is known only when the answer came.
fn transaction(event: &Event) -> String {
    let key = format!("\"{}\"", event.key);
    let known = event.kind == Kind::Ok;
    match event.f {
        Function::Write => format!("[[:w {key} {}]]", value(&event.value)),
        Function::Cas => {
            let old = if known { value(&event.value[0]) } else { "nil".into() };
            format!("[[:r {key} {old}] [:w {key} {}]]", value(&event.value[1]))
        }
        _ => format!("[[:r {key} {}]]", if known { value(&event.value) } else { "nil".into() }),
    }
}

fn elements(event: &Event) -> String {
    match &event.value {
        Value::Array(elements) => format!("#{{{}}}", elements.iter().map(value).collect::<Vec<_>>().join(" ")),
        _ => "nil".into(),
    }
}

/// A number for `v17`, else what JSON and EDN write alike; elements of the set are plain words.
fn value(value: &Value) -> String {
    match value {
        Value::Null => "nil".into(),
        Value::String(text) => {
            let number = text.strip_prefix('v').filter(|digits| digits.parse::<u64>().is_ok());
            number.map_or_else(|| format!("\"{text}\""), str::to_owned)
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(kind: Kind, f: Function, key: &str, value: Value) -> Event {
        Event {
            process: 3,
            kind,
            f,
            key: key.into(),
            value,
            time: 7,
            node: String::new(),
            req: String::new(),
            rev: None,
            error: String::new(),
        }
    }

    #[test]
    fn each_checker_gets_its_own_form() {
        let folder = std::env::temp_dir().join(format!("tfj-edn-{}", std::process::id()));
        let history = [
            event(Kind::Invoke, Function::Cas, "k", json!([null, "v2"])),
            event(Kind::Ok, Function::Cas, "k", json!([null, "v2"])),
            event(Kind::Ok, Function::Read, "k", json!("v2")),
            event(Kind::Info, Function::Add, "set", json!("element-1")),
            event(Kind::Ok, Function::List, "set", json!(["element-1"])),
        ];
        export(&folder, &history).unwrap();
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        assert_eq!(
            read("knossos/k.edn"),
            "{:process 3, :type :invoke, :f :cas, :value [nil 2], :time 7}\n\
             {:process 3, :type :ok, :f :cas, :value [nil 2], :time 7}\n\
             {:process 3, :type :ok, :f :read, :value 2, :time 7}\n"
        );
        assert_eq!(
            read("elle.edn"),
            "{:process 3, :type :invoke, :f :txn, :value [[:r \"k\" nil] [:w \"k\" 2]], :time 7}\n\
             {:process 3, :type :ok, :f :txn, :value [[:r \"k\" nil] [:w \"k\" 2]], :time 7}\n\
             {:process 3, :type :ok, :f :txn, :value [[:r \"k\" 2]], :time 7}\n"
        );
        assert_eq!(
            read("set.edn"),
            "{:process 3, :type :info, :f :add, :value \"element-1\", :time 7}\n\
             {:process 3, :type :ok, :f :read, :value #{\"element-1\"}, :time 7}\n"
        );
        fs::remove_dir_all(folder).unwrap();
    }
}
