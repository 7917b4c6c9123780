//! `braid lab`: networks from scenario files.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use lab::scenario::Shelf;
use tokio::signal::unix::SignalKind;

mod enter;
mod graph;
mod list;
mod progress;
mod run;
mod up;
mod verdict;

/// Run MPTCP networks in network namespaces, from scenario files
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid lab list
  braid lab run simple handover:blackhole
  braid lab up simple
  braid lab exec client iperf3 -c localhost -p 5555
  braid lab check
  braid lab down")]
pub struct Args {
    #[command(subcommand)]
    command: Command,

    /// Directory of the scenario files [default: ./scenarios, else those built in]
    #[arg(long = "scenarios", global = true, value_name = "DIR", env = "BRAID_SCENARIOS")]
    directory: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(list::Args),
    Run(run::Args),
    Up(up::Args),
    Exec(enter::Exec),
    Shell(enter::Shell),
    Check(up::Check),
    Down(up::Down),
    Graph(graph::Args),
    #[command(hide = true)]
    Hold(up::Args),
}

pub fn run(args: Args) -> Result<ExitCode> {
    let shelf = Shelf::find(args.directory.clone());
    match args.command {
        Command::List(args) => list::run(args, &shelf),
        Command::Run(args) => run::run(args, &shelf),
        Command::Up(up) => up::up(up, &shelf, args.directory),
        Command::Exec(args) => enter::exec(args),
        Command::Shell(args) => enter::shell(args),
        Command::Check(args) => up::check(args),
        Command::Down(args) => up::down(args),
        Command::Graph(args) => graph::run(args, &shelf),
        Command::Hold(args) => up::hold(args, &shelf),
    }
}

/// What ends a lab: these, and its terminal going away.
const END: [SignalKind; 3] = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
