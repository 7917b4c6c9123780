//! `braid monitor`.

use std::process::ExitCode;

use anyhow::Result;

/// Print path-manager events
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<ExitCode> {
    anyhow::bail!("not built yet")
}
