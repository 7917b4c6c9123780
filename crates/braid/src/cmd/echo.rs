//! `braid echo`.

use std::process::ExitCode;

use anyhow::Result;

/// The sample application: a line echo server and its client
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<ExitCode> {
    anyhow::bail!("not built yet")
}
