//! The `braid` program: arguments, output, exit codes; nothing else.

mod cmd;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cmd::Cli::parse();
    match cmd::run(cli) {
        Ok(code) => code,
        Err(error) => {
            // One line, whatever the error chain's length: `braid: listen on [::]:80: Permission denied`.
            eprintln(format_args!("braid: {error:#}"));
            ExitCode::from(cmd::COULD_NOT_RUN)
        }
    }
}

#[allow(clippy::print_stderr)]
fn eprintln(line: std::fmt::Arguments<'_>) {
    eprintln!("{line}");
}
