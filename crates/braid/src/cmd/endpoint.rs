//! `braid endpoint`.

use std::process::ExitCode;

use anyhow::Result;

/// Show and set the path manager's endpoints
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<ExitCode> {
    anyhow::bail!("not built yet")
}
