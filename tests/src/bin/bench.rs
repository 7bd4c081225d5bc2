//! `make bench`: a table on the terminal and the same as JSON.

use std::process::ExitCode;

use clap::Parser;
use jepsen::interrupt::asked_to_end;
use tests::bench::{self, Settings, table};

/// As the client program has it: its clients shall cost what they cost their users.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures a three-controller cloud beside a three-member etcd.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: Settings,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { settings } = Arguments::parse();
    let outcome = tokio::select! {
        outcome = bench::run(&settings) => outcome,
        () = asked_to_end() => Err(anyhow::anyhow!("interrupted")),
    };
    let written = outcome.and_then(|results| {
        table::print(&results);
        std::fs::write(&settings.json, serde_json::to_vec_pretty(&results)?)?;
        println!("written: {}", settings.json.display());
        anyhow::ensure!(results.failed.is_empty(), "{} of its parts failed", results.failed.len());
        Ok(())
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
