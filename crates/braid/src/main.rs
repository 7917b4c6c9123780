//! The `braid` program: arguments, output, exit codes; nothing else.

// Doc comments here are help texts, in which clap's [ADDRESS] and <FILE> are no links and no tags.
#![allow(rustdoc::broken_intra_doc_links, rustdoc::private_intra_doc_links, rustdoc::invalid_html_tags)]

mod cmd;
mod log;
mod output;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match cmd::Cli::from_command_line(std::env::args_os()) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    match log::start(cli.verbose).and_then(|()| cmd::run(cli)) {
        Ok(code) => code,
        Err(error) if error.downcast_ref().is_some_and(output::WriteError::reader_left) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(format_args!("braid: {}", one_line(&error)));
            ExitCode::from(cmd::COULD_NOT_RUN)
        }
    }
}

/// An error and its causes: `listen on [::]:80: Permission denied`. A library's error may name its cause
/// itself; it is not said twice.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        let cause = cause.split(" (os error ").next().unwrap_or_default();
        if line.is_empty() {
            line = cause.into();
        } else if !line.contains(cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}
