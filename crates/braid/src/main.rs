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
        let cause = without_numbers(&cause.to_string());
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

/// `No such file or directory (os error 2)` without the number.
fn without_numbers(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let first = parts.next().unwrap_or_default();
    let rest = parts.map(|part| part.split_once(')').map_or("", |(_number, rest)| rest));
    [first].into_iter().chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_without_the_numbers_of_the_system() {
        let error = anyhow::Error::from(std::io::Error::from_raw_os_error(2)).context("read lb.toml");
        assert_eq!(one_line(&error), "read lb.toml: No such file or directory");
        assert_eq!(without_numbers("no (os error 2) (do that); no (os error 13)"), "no (do that); no");
    }
}
