//! `braid proxy`.

use std::process::ExitCode;

use anyhow::Result;

/// Relay connections between TCP and MPTCP
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<ExitCode> {
    anyhow::bail!("not built yet")
}
