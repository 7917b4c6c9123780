//! `braid help`: the help of a command, or a page on a topic.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::error::ErrorKind;

use crate::output;

/// Print the help of a command, or a page on a topic
#[derive(Debug, clap::Args)]
#[command(after_help = topics(), override_usage = "braid help [COMMAND...]\n       braid help TOPIC")]
pub struct Args {
    /// A command, as `endpoint add`, or one of the topics
    #[arg(value_name = "COMMAND|TOPIC")]
    words: Vec<String>,
}

/// A page each; its first line is its heading.
const TOPICS: [(&str, &str); 4] = [
    ("paths", include_str!("../help/paths.md")),
    ("fallback", include_str!("../help/fallback.md")),
    ("namespaces", include_str!("../help/namespaces.md")),
    ("privileges", include_str!("../help/privileges.md")),
];

/// The table of contents.
pub fn topics() -> String {
    let lines = TOPICS.map(|(name, page)| {
        let heading = page.lines().next().unwrap_or_default();
        format!("  {name:<10}  {}\n", heading.split_once(": ").map_or(heading, |(_, about)| about))
    });
    format!("Topics of `braid help TOPIC`:\n{}", lines.concat())
}

pub fn run(args: Args, mut command: clap::Command) -> Result<ExitCode> {
    if let [topic] = args.words.as_slice()
        && let Some((_, page)) = TOPICS.iter().find(|(name, _)| name == topic)
    {
        output::raw(page.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    // What the command itself prints when it is asked.
    let line = ["braid"].into_iter().chain(args.words.iter().map(String::as_str)).chain(["--help"]);
    match command.try_get_matches_from_mut(line) {
        Err(help) if help.kind() == ErrorKind::DisplayHelp => {
            output::line(help.render().ansi().to_string().trim_end())?;
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            let topics = TOPICS.map(|(name, _)| name).join(", ");
            bail!("no help on '{}': it is no command and none of {topics}", args.words.join(" "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn a_topic_hides_no_command_and_has_a_heading() {
        let command = crate::cmd::Cli::command();
        for (name, page) in TOPICS {
            assert!(command.find_subcommand(name).is_none(), "{name}");
            assert!(page.to_lowercase().starts_with(&format!("# {name}: ")), "{name}");
            assert!(page.lines().all(|line| line.chars().count() <= 120), "{name}");
        }
    }
}
