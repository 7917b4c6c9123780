//! One module per command, and the one definition of the command line: parser, help, man pages and
//! completions all come from here.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod echo;
mod endpoint;
mod lab;
mod limits;
mod monitor;
mod proxy;
mod show;

/// Exit code: it ran and found a problem (a failed scenario, a doctor's finding).
pub const FOUND_A_PROBLEM: u8 = 1;
/// Exit code: it could not run (usage, permission, missing file).
pub const COULD_NOT_RUN: u8 = 2;

/// Multipath TCP for the software you already run
#[derive(Debug, Parser)]
#[command(name = "braid", version, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Proxy(proxy::Args),
    Lab(lab::Args),
    Echo(echo::Args),
    Show(show::Args),
    Monitor(monitor::Args),
    Endpoint(endpoint::Args),
    Limits(limits::Args),
}

/// Runs a parsed command line.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Proxy(args) => proxy::run(args),
        Command::Lab(args) => lab::run(args),
        Command::Echo(args) => echo::run(args),
        Command::Show(args) => show::run(args),
        Command::Monitor(args) => monitor::run(args),
        Command::Endpoint(args) => endpoint::run(args),
        Command::Limits(args) => limits::run(args),
    }
}

/// Runs `future` to its end on a runtime of its own. A command starts the runtime itself, since some have
/// to do single-threaded things first (enter a user namespace).
fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}
