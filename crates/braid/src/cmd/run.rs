//! `braid run`: any program over MPTCP.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;

use crate::output;

/// Run any program with its TCP sockets made MPTCP
///
/// Static programs and those in Go too, with all their children, and without privileges: the program's TCP sockets
/// are replaced when they are made. Peers that don't speak MPTCP get TCP. The program takes the place of braid, so
/// that its exit code, signals and terminal are as without.
///
/// Exit code: the program's; 127: not found; 126: not executable; 2: not started for another reason.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid run curl -O https://example.org/file
  braid run iperf3 -s
  braid run --exclude ssh -- make -j 4 download
  braid run --require openvpn --config client.ovpn")]
pub struct Args {
    /// Run nothing where MPTCP is not available, and let no TCP socket take the place of an MPTCP one
    #[arg(long)]
    require: bool,
    /// Leave the sockets of these programs alone: names of children, or of their files
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    exclude: Vec<String>,
    /// Program and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let mut words = args.command.into_iter();
    let plan = launch::Plan {
        program: words.next().unwrap_or_default(),
        arguments: words.collect(),
        require: args.require,
        exclude: args.exclude,
    };
    let error = launch::run(&plan, |text| output::note(format_args!("braid: {text}")));
    output::note(format_args!("braid: {error}"));
    Ok(ExitCode::from(error.exit_code()))
}
