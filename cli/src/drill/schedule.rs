//! `trefoil drill schedule`: a service and a timer of systemd that run a drill by the calendar, on this machine, with a token
//! that can be taken away. Written, listed and removed here; everything else about them is systemd's.
//!
//! Nothing in the cloud runs drills by itself: ADR 0025 says why.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use api::error::ApiError;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{How, check, kept, kind::Kind};
use crate::{
    arguments::Global,
    config::{self, Config},
    output::{self, Format, Rows},
};

pub const EXAMPLES: &str = "\
Examples:
  trefoil drill schedule backup-restore --calendar weekly --live --tenant acme --config /etc/trefoil/drill.toml
  trefoil drill schedule leader-kill --calendar daily --dir /var/lib/trefoil-lab --print
  trefoil drill schedule --list
  trefoil drill schedule backup-restore --remove";

#[derive(Args, Clone, Debug)]
pub struct ScheduleArgs {
    /// Which one; a drill has one schedule, and a new one takes the place of the old
    #[arg(value_enum, required_unless_present = "list")]
    kind: Option<Kind>,
    /// When, as systemd writes it, such as 'Mon *-*-* 03:00': see systemd.time(7), 'Calendar Events'
    #[arg(long, value_name = "EXPRESSION", required_unless_present_any = ["list", "remove"])]
    calendar: Option<String>,
    #[command(flatten)]
    how: How,
    /// Where result (JSON) and page of each run are kept; the newest hundred of each drill stay
    #[arg(long, value_name = "DIRECTORY", default_value = "/var/lib/trefoil/drills")]
    keep: PathBuf,
    /// Where the units go; in any other than this they are written and not started
    #[arg(long, value_name = "DIRECTORY", default_value = SYSTEM_UNITS)]
    units: PathBuf,
    /// Only shows what would be written
    #[arg(long, conflicts_with_all = ["list", "remove"])]
    print: bool,
    /// What is scheduled, and how the newest run of each ended
    #[arg(long, conflicts_with_all = ["kind", "calendar", "remove"])]
    list: bool,
    /// Stops the timer and removes both units; results are kept
    #[arg(long, conflicts_with = "calendar")]
    remove: bool,
}

const SYSTEM_UNITS: &str = "/etc/systemd/system";
/// Is there where systemd runs this machine.
const SYSTEMD_RUNS: &str = "/run/systemd/system";

/// What is written, or found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Schedule {
    drill: Kind,
    calendar: String,
    command: String,
    service: PathBuf,
    timer: PathBuf,
    /// Time and verdict of the newest result that is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    newest: Option<(String, String)>,
}

/// # Errors
/// When the calendar is none, the drill may not run there, or the units cannot be written.
pub async fn schedule(args: ScheduleArgs, global: &Global, format: Format) -> Result<()> {
    if args.list {
        let all = list(&args)?;
        return Ok(output::print(format, &all, || table(&all))?);
    }
    let kind = args.kind.context("clap asks for it")?;
    if args.remove {
        let (service, timer) = paths(&args.units, kind);
        if !timer.exists() {
            return Err(ApiError::new(
                "not-found",
                format!("{} is not scheduled in {}", kind.name(), args.units.display()),
            )
            .into());
        }
        systemd(&args.units, &["disable", "--now", &name(kind, "timer")])?;
        for path in [&timer, &service] {
            gone(fs::remove_file(path)).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        systemd(&args.units, &["daemon-reload"])?;
        let told = serde_json::json!({ "drill": kind, "removed": [timer, service] });
        return Ok(output::print(format, &told, || format!("{} is not scheduled any more", kind.name()))?);
    }
    let calendar = args.calendar.clone().context("clap asks for it")?;
    valid(&calendar)?;
    if args.how.live {
        check::kind(kind, None)?;
    }
    let command = command(kind, &args, global)?;
    let (service, timer) = paths(&args.units, kind);
    let units = [(&service, service_unit(kind, &command)), (&timer, timer_unit(kind, &calendar))];
    let schedule =
        Schedule { drill: kind, calendar, command, service: service.clone(), timer: timer.clone(), newest: None };
    if args.print {
        let text =
            || units.iter().map(|(path, text)| format!("# {}\n{text}", path.display())).collect::<Vec<_>>().join("\n");
        return Ok(output::print(format, &schedule, text)?);
    }
    for (path, text) in &units {
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    systemd(&args.units, &["daemon-reload"])?;
    let started = systemd(&args.units, &["enable", "--now", &name(kind, "timer")])?;
    Ok(output::print(format, &schedule, || {
        let next = if started { "is started" } else { "is written; start it with systemctl enable --now" };
        format!(
            "{} {next}\n`systemctl list-timers` says when, `trefoil drill schedule --list` how it ended",
            timer.display()
        )
    })?)
}

fn list(args: &ScheduleArgs) -> Result<Vec<Schedule>> {
    let mut found = Vec::new();
    for kind in Kind::value_variants() {
        let (service, timer) = paths(&args.units, *kind);
        let (Some(calendar), Some(command)) = (value(&timer, "OnCalendar="), value(&service, "ExecStart=")) else {
            continue;
        };
        let newest = kept::newest(&args.keep, *kind);
        found.push(Schedule { drill: *kind, calendar, command, service, timer, newest });
    }
    Ok(found)
}

fn table(all: &[Schedule]) -> String {
    let row = |one: &Schedule| {
        let (when, verdict) = one.newest.clone().unwrap_or_else(|| ("-".into(), "never ran".into()));
        vec![one.drill.name(), one.calendar.clone(), when, verdict, one.command.clone()]
    };
    Rows::new(&["DRILL", "CALENDAR", "NEWEST", "VERDICT", "COMMAND"], all.iter().map(row)).render(None)
}

/// Of a unit that is there.
fn value(path: &Path, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned)
}

fn name(kind: Kind, ending: &str) -> String {
    format!("trefoil-drill-{}.{ending}", kind.name())
}

fn paths(units: &Path, kind: Kind) -> (PathBuf, PathBuf) {
    (units.join(name(kind, "service")), units.join(name(kind, "timer")))
}

/// By systemd's own word where it is installed; in any case nothing that would be another line of the unit.
fn valid(calendar: &str) -> Result<(), ApiError> {
    let refused =
        |why: &str| ApiError::invalid(format!("'{}' is no calendar expression: {why}", calendar.escape_default()));
    if calendar.trim().is_empty() || calendar.chars().any(char::is_control) {
        return Err(refused("it is empty or has more than one line"));
    }
    let asked = Command::new("systemd-analyze").args(["calendar", "--", calendar]).stdin(Stdio::null()).output();
    match asked {
        Ok(output) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(refused(said.lines().next().unwrap_or("systemd refuses it")))
        }
        // Without systemd here the units are for another machine, and that one will tell.
        _ => Ok(()),
    }
}

/// The command line that the service runs, as systemd quotes it. It names files and no secrets: others can read units.
fn command(kind: Kind, args: &ScheduleArgs, global: &Global) -> Result<String> {
    let absolute = |path: &Path| Ok::<_, anyhow::Error>(std::path::absolute(path)?.display().to_string());
    let program = std::env::current_exe()?.display().to_string();
    let how = &args.how;
    let mut words = vec![program, "drill".into(), "run".into(), kind.name()];
    if how.live {
        let (file, path) = config::file(global)?;
        if file.token.is_none() || file.ca.is_none() || file.endpoints.is_empty() {
            let why = format!(
                "a schedule takes its access from a file, and {} has not all of endpoints, ca and token",
                path.display()
            );
            return Err(ApiError::invalid(why).into());
        }
        words.extend(["--live".into(), "--config".into(), absolute(&path)?]);
        let tenant = Config::load(global)?.tenant;
        if !tenant.is_empty() {
            words.extend(["--tenant".into(), tenant]);
        }
    } else {
        words.extend(["--dir".into(), absolute(&how.placement.dir)?]);
    }
    words.extend(["--times".into(), how.times.to_string(), "--hold".into(), format!("{}ms", how.hold.as_millis())]);
    if let Some(image) = &how.image {
        words.extend(["--image".into(), absolute(image)?, "--recovery".into(), how.recovery.name().into()]);
    }
    if let Some(machines) = how.machines {
        words.extend(["--machines".into(), machines.to_string()]);
    }
    words.extend(["--keep".into(), absolute(&args.keep)?]);
    Ok(words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "))
}

/// systemd.service(5), 'Command Lines': `%` and `$` are doubled, and what has more than plain characters is put in quotes.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+".contains(c);
    let text = word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    if !word.is_empty() && word.chars().all(plain) { text } else { format!("\"{text}\"") }
}

fn service_unit(kind: Kind, command: &str) -> String {
    let name = kind.name();
    format!(
        "# `trefoil drill schedule {name} --remove` takes it away.\n\
         [Unit]\nDescription=Trefoil drill {name}\nWants=network-online.target\nAfter=network-online.target\n\n\
         [Service]\nType=oneshot\nExecStart={command}\n"
    )
}

/// A run that was missed is not made up for: when a machine comes up again, nobody wants a drill.
fn timer_unit(kind: Kind, calendar: &str) -> String {
    let name = kind.name();
    format!(
        "# `trefoil drill schedule {name} --remove` takes it away.\n\
         [Unit]\nDescription=Trefoil drill {name} by the calendar\n\n\
         [Timer]\nOnCalendar={calendar}\n\n\
         [Install]\nWantedBy=timers.target\n"
    )
}

/// False when the units are not this machine's own, or systemd does not run it: then there is nobody to tell.
fn systemd(units: &Path, words: &[&str]) -> Result<bool> {
    if units != Path::new(SYSTEM_UNITS) || !Path::new(SYSTEMD_RUNS).exists() {
        return Ok(false);
    }
    let output = Command::new("systemctl").args(words).stdin(Stdio::null()).output().context("cannot run systemctl")?;
    if output.status.success() {
        return Ok(true);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(ApiError::new("failed", format!("systemctl {}: {}", words.join(" "), said.trim())).into())
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    removed.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_quoted_so_that_systemd_reads_it_back() {
        assert_eq!(quoted("/usr/bin/trefoil"), "/usr/bin/trefoil");
        assert_eq!(quoted("100%"), "\"100%%\"");
        assert_eq!(quoted("a $HOME \"b\" \\"), "\"a $$HOME \\\"b\\\" \\\\\"");
        assert_eq!(quoted(""), "\"\"");
    }

    #[test]
    fn a_calendar_cannot_become_another_line_of_the_unit() {
        for bad in ["", " ", "daily\nExecStart=/bin/sh"] {
            assert_eq!(valid(bad).unwrap_err().code, "invalid-argument", "{bad:?}");
        }
        valid("Mon *-*-* 03:00").unwrap();
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let (service, timer) = paths(folder.path(), Kind::LeaderKill);
        fs::write(&service, service_unit(Kind::LeaderKill, "/usr/bin/trefoil drill run leader-kill")).unwrap();
        fs::write(&timer, timer_unit(Kind::LeaderKill, "Mon *-*-* 03:00")).unwrap();
        assert_eq!(value(&service, "ExecStart=").unwrap(), "/usr/bin/trefoil drill run leader-kill");
        assert_eq!(value(&timer, "OnCalendar=").unwrap(), "Mon *-*-* 03:00");
        assert_eq!(value(&folder.path().join("other"), "OnCalendar="), None);
    }
}
