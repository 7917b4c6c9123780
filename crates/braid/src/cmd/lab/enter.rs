//! `braid lab exec` and `shell`: programs in a node of a lab that is up.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use lab::home::Home;
use lab::privilege;
use mptcp::Netns;

/// Run a program in a node of a lab that is up
///
/// It finds `braid`, `client` and `server` first in its PATH.
#[derive(Debug, clap::Args)]
pub struct Exec {
    /// The lab; needed where several are up
    #[arg(long = "name", value_name = "LAB")]
    lab: Option<String>,
    /// The node
    node: String,
    /// Program and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Start a shell in a node of a lab that is up
#[derive(Debug, clap::Args)]
pub struct Shell {
    /// The lab; needed where several are up
    #[arg(long = "name", value_name = "LAB")]
    lab: Option<String>,
    /// The node
    node: String,
}

pub fn exec(args: Exec) -> Result<ExitCode> {
    become_program(args.lab.as_deref(), &args.node, &args.command)
}

pub fn shell(args: Shell) -> Result<ExitCode> {
    let shell = std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".into());
    become_program(args.lab.as_deref(), &args.node, &[shell])
}

/// Replaces this process; returns only with an error.
fn become_program(lab: Option<&str>, node: &str, words: &[String]) -> Result<ExitCode> {
    let card = Home::find()?.lab(lab)?;
    let namespace = card.namespace(node)?;
    let (program, arguments) = words.split_first().context("no program to run")?;
    privilege::join(card.pid)?;
    let mut command = Command::new(card.program(program)?);
    command.args(arguments).env("PATH", card.path()).env("BRAID_LAB_NODE", node);
    Netns::named(namespace)?.enter_on_exec(&mut command);
    let here = std::env::current_dir().context("find the working directory")?;
    card.enter_mounts_on_exec(node, &mut command, &here)?;
    Err(command.exec()).with_context(|| format!("run {program} in {node}"))
}
