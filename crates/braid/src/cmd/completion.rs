//! `braid completion`.

use std::process::ExitCode;

use anyhow::Result;

use crate::output;

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid completion bash > /etc/bash_completion.d/braid
  braid completion zsh > /usr/local/share/zsh/site-functions/_braid
  braid completion fish > ~/.config/fish/completions/braid.fish")]
pub struct Args {
    /// The shell
    shell: Shell,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub fn run(args: Args, mut command: clap::Command) -> Result<ExitCode> {
    let shell = match args.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "braid", &mut script);
    output::raw(&script)?;
    Ok(ExitCode::SUCCESS)
}
