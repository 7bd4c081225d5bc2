//! `trefoil`: the one program that a person types. Everything it does can be linked by a test: see the library.

use std::process::ExitCode;

/// Small pieces by the thousand, given back by other threads than took them, are what a controller asks for.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(std::env::args_os())
}
