//! `braid limits`.

use std::process::ExitCode;

use anyhow::Result;

/// Show and set the path manager's limits
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<ExitCode> {
    anyhow::bail!("not built yet")
}
