//! Logs: where they go and how much of them.

use std::io::{self, IsTerminal};

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

/// Names what to log in the filter language of `tracing_subscriber`: `debug`, `warn,relay=trace`.
const VARIABLE: &str = "BRAID_LOG";

/// Sends logs to standard error: changes of state, with `-v` also details, with `-vv` everything. `BRAID_LOG`
/// overrides both.
pub fn start(verbose: u8) -> Result<()> {
    let filter = match std::env::var(VARIABLE) {
        Ok(filter) if !filter.is_empty() => EnvFilter::try_new(filter).context(VARIABLE)?,
        _ => EnvFilter::new(["info", "debug", "trace"][usize::from(verbose.min(2))]),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_target(false)
        .init();
    Ok(())
}
