//! `trefoil completion`: lets a shell complete nouns, verbs and options.

use api::error::ApiError;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::{arguments::Cli, output};

pub const EXAMPLE: &str = "Example:\n  trefoil completion bash > /etc/bash_completion.d/trefoil";

#[derive(Debug, Args)]
pub struct CompletionArgs {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

pub fn run(args: &CompletionArgs) -> Result<(), ApiError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "trefoil", &mut script);
    output::write(&script)
}
