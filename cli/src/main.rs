//! `trefoil`: the one program that a person types. Everything it does can be linked by a test: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main(std::env::args_os())
}
