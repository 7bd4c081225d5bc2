//! What each noun does, a file each. A command makes at most one change, under one request id.

#[cfg(feature = "agent")]
pub mod agent;
pub mod backup;
pub mod bill;
pub mod completion;
#[cfg(feature = "controller")]
pub mod controller;
pub mod image;
pub mod network;
pub mod node;
pub mod price;
pub mod quorum;
pub mod recovery;
pub mod setting;
pub mod tag;
pub mod template;
pub mod tenant;
pub mod user;
pub mod vm;
pub mod watch;

use api::error::ApiError;

use crate::{
    arguments::{Cli, Command},
    context::Context,
    output::Format,
};

/// # Errors
/// What went wrong, as the person is told it.
pub async fn run(cli: Cli, format: Format) -> Result<(), ApiError> {
    let Cli { global, command } = cli;
    let context = || Context::new(&global, format);
    match command {
        Command::Vm(command) => vm::run(command, &context()?).await,
        Command::Image(command) => image::run(command, &context()?).await,
        Command::Network(command) => network::run(command, &context()?).await,
        Command::Node(command) => node::run(command, &context()?).await,
        Command::Template(command) => template::run(command, &context()?).await,
        Command::Tenant(command) => tenant::run(command, &context()?).await,
        Command::User(command) => user::run(command, &context()?).await,
        Command::Tag(command) => tag::run(command, &context()?).await,
        Command::Bill(command) => bill::run(command, &context()?).await,
        Command::Price(command) => price::run(command, &context()?).await,
        Command::Setting(command) => setting::run(command, &context()?).await,
        Command::Backup(command) => backup::run(command, &context()?).await,
        Command::Recovery(command) => recovery::run(command, &context()?).await,
        Command::Watch(args) => watch::run(args, &context()?).await,
        Command::Quorum(command) => quorum::run(command, context, format).await,
        #[cfg(feature = "controller")]
        Command::Controller(command) => controller::run(command, format).await.map_err(local),
        #[cfg(feature = "agent")]
        Command::Agent(command) => agent::run(command, format).await.map_err(local),
        #[cfg(all(feature = "controller", feature = "agent"))]
        Command::Up(args) => {
            let cloud = crate::lab::up(args).await.map_err(local)?;
            crate::output::print(format, &cloud, || crate::lab::how_to_use(&cloud))
        }
        #[cfg(all(feature = "controller", feature = "agent"))]
        Command::Down(args) => crate::lab::down(args).await.map_err(local),
        #[cfg(all(feature = "controller", feature = "agent"))]
        Command::Lab(command) => crate::lab::lab(command, format).await.map_err(local),
        #[cfg(all(feature = "controller", feature = "agent"))]
        Command::Drill(command) => crate::drill::drill(command, &global, format).await.map_err(local),
        Command::Completion(args) => completion::run(&args),
    }
}

/// What failed on this machine; what a controller said keeps its code.
#[cfg(any(feature = "controller", feature = "agent"))]
fn local(error: anyhow::Error) -> ApiError {
    match error.downcast_ref::<ApiError>() {
        Some(said) if error.chain().len() == 1 => said.clone(),
        Some(said) => ApiError { message: format!("{error:#}"), ..said.clone() },
        None => ApiError::new("failed", format!("{error:#}")),
    }
}

/// Waits until the process is asked to end, by a terminal or by whoever supervises it.
#[cfg(any(feature = "controller", feature = "agent"))]
pub fn asked_to_end() -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        };
        tracing::info!(signal = name, "asked to end");
    })
}

/// The name that was given, or that of the machine.
#[cfg(any(feature = "controller", feature = "agent"))]
fn name_or_host(name: Option<String>) -> anyhow::Result<String> {
    use anyhow::Context;
    let host = || nix::unistd::gethostname()?.into_string().ok().context("the host's name is not text; give --name");
    name.map_or_else(host, Ok)
}

/// The text itself, or with an `@` before it the file that it is in: a secret in a file is not in the process list.
#[cfg(any(feature = "controller", feature = "agent"))]
fn text_or_file(given: &str) -> anyhow::Result<String> {
    use anyhow::Context;
    match given.strip_prefix('@') {
        None => Ok(given.to_owned()),
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
            Ok(text.trim().to_owned())
        }
    }
}
