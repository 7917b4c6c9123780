//! `braid show`.

use std::process::ExitCode;

use anyhow::Result;

/// Show MPTCP connections and their subflows
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<ExitCode> {
    anyhow::bail!("not built yet")
}
