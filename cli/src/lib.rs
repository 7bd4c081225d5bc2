//! The one program: nouns and verbs for people and scripts, and the entry points of controller and agent.
//!
//! `arguments` is what may be typed, `commands` what each noun does, `config` where endpoints and secrets come from,
//! `context` what every command shares. `output`, `moment` and `quantity` turn values into text and back, `wait`
//! follows a machine until it is what was asked for, `image_file` looks into a file before it is uploaded. `lab` is a
//! whole cloud on one machine, `drill` hurts one and reports.
//!
//! Not here: any rule about names, sizes or rights. The quorum decides; the client asks and prints.

#![forbid(unsafe_code)]

pub mod arguments;
pub mod commands;
pub mod config;
mod context;
#[cfg(all(feature = "controller", feature = "agent"))]
pub mod drill;
mod image_file;
#[cfg(all(feature = "controller", feature = "agent"))]
pub mod lab;
mod logging;
pub mod moment;
pub mod output;
pub mod quantity;
mod wait;

use std::{ffi::OsString, process::ExitCode, time::Duration};

use api::error::ApiError;
use clap::{CommandFactory, FromArgMatches};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use arguments::Cli;
use output::Format;

/// A server's threads end in milliseconds once it has stopped; one that does not hangs on a disk, and is left behind.
const LAST_THREADS: Duration = Duration::from_secs(5);

/// Parses, runs, reports. The exit status is 0 when all was done, else that of the error's kind
/// (`api::error::ErrorKind::exit_status`).
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let parsed = Cli::command().try_get_matches_from(&arguments).and_then(|found| Cli::from_arg_matches(&found));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(refused) if refused.use_stderr() && asks_for_json(&arguments) => {
            let text = refused.render().to_string();
            let sentence = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            return report(&ApiError::invalid(sentence), Format::Json);
        }
        Err(refused) => {
            // Help and version arrive here too. Nobody is left to tell when the terminal is gone.
            let _ = refused.print();
            return ExitCode::from(u8::try_from(refused.exit_code()).unwrap_or(2));
        }
    };
    let format = config::format(&cli.global);
    match format.and_then(|format| run(cli, format).map_err(|error| (error, format))) {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, format)) => report(&error, format),
    }
}

fn run(cli: Cli, format: Format) -> Result<(), ApiError> {
    logging::init(&cli.command);
    // A client waits for one answer at a time; a server has as many threads as the machine.
    let is_server = cli.command.is_server();
    if is_server {
        open_as_many_files_as_allowed();
    }
    let mut runtime = match is_server {
        true => tokio::runtime::Builder::new_multi_thread(),
        false => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime.enable_all().build().map_err(|e| ApiError::internal(e.to_string()))?;
    let outcome = runtime.block_on(commands::run(cli, format));
    if is_server {
        // RocksDB is closed by the last thread that uses it. When the process ends before, that thread meets what the end has
        // taken away and aborts.
        runtime.shutdown_timeout(LAST_THREADS);
    } else {
        // A thread that still reads a slow disk must not keep a person waiting.
        runtime.shutdown_background();
    }
    outcome
}

/// The soft limit is low for the sake of programs that call `select`; a session of each of two thousand hosts needs more.
fn open_as_many_files_as_allowed() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

/// One sentence on the error stream, as text or as a JSON object.
fn report(error: &ApiError, format: Format) -> ExitCode {
    let status = error.kind.exit_status();
    match format {
        Format::Table => eprintln!("error: {} [{}]", output::printable(&error.message), error.code),
        Format::Json => {
            eprintln!("{}", serde_json::json!({ "error": error.message, "code": error.code, "exit_status": status }))
        }
    }
    ExitCode::from(status)
}

/// What the arguments say about the output when they cannot be parsed.
fn asks_for_json(arguments: &[OsString]) -> bool {
    let is = |argument: &OsString, text: &str| argument.to_str() == Some(text);
    arguments.iter().any(|a| is(a, "--output=json") || is(a, "-ojson"))
        || arguments.windows(2).any(|w| (is(&w[0], "--output") || is(&w[0], "-o")) && is(&w[1], "json"))
}

#[cfg(test)]
mod tests;
