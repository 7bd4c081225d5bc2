//! `make demo`: the whole cloud on this machine, told step by step. Whatever happens, it cleans up.

use std::process::ExitCode;

use clap::Parser;
use jepsen::interrupt::asked_to_end;
use tests::demo::{self, cloud::Cloud};

/// A cloud from nothing: three controllers, three hosts with real guests, every step verified.
#[derive(Parser)]
struct Arguments {
    /// Where the cloud lives while it runs; it must not exist. By default a new folder under the temporary one.
    #[arg(long)]
    dir: Option<std::path::PathBuf>,
    /// Leave everything running at the end, to look around.
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let dir = arguments.dir.unwrap_or_else(|| std::env::temp_dir().join(format!("tfdemo{}", std::process::id())));
    let cloud = match Cloud::new(&dir) {
        Ok(cloud) => cloud,
        Err(error) => {
            eprintln!("demo: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let told = cloud.clone();
    let story = tokio::task::spawn_blocking(move || demo::tell(&told, arguments.keep));
    let verified = tokio::select! {
        outcome = story => outcome.unwrap_or(false),
        () = asked_to_end() => demo::interrupted(),
    };
    let clean = (arguments.keep && verified) || demo::clean_up(&cloud);
    // A story that was interrupted may still wait for something; nobody waits for it.
    std::process::exit(i32::from(!(verified && clean)));
}
