//! `braid lab`.

use std::process::ExitCode;

use anyhow::Result;

/// Run MPTCP networks in network namespaces, from scenario files
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<ExitCode> {
    anyhow::bail!("not built yet")
}
