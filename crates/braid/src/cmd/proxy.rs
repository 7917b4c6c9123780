//! `braid proxy`: the command line of the relay.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use relay::Config;
use relay::config::{Process, Settings};
use relay::transparent::Rules;

use crate::output;

/// Relay connections between TCP and MPTCP
///
/// One service from the command line (--listen and --to; --mode, --port and --remote; or --listen and
/// --transparent for connections that are meant for other hosts), or many from a file. With a file, options
/// given here or in the environment go before what it says, for every service.
///
/// SIGHUP reloads the file, SIGTERM stops listening and waits for the connections (a second one ends them).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid proxy --listen tcp://:5555 --to mptcp://server.example:4444
  braid proxy --mode server --port 4444 --remote localhost:5201
  braid proxy --listen tcp://:5555 --transparent=forwarded --interface lan
  braid proxy --config /etc/braid/proxy.toml --check")]
pub struct Args {
    /// File with [[service]] tables
    #[arg(long, short, value_name = "FILE", env = "BRAID_CONFIG", conflicts_with_all = ["listen", "to", "mode", "name", "transparent"])]
    config: Option<PathBuf>,
    /// Read the configuration, say what is wrong with it, and end
    #[arg(long)]
    check: bool,
    /// Print the nft table and policy routing of the transparent services, change nothing, and end
    #[arg(long)]
    print_rules: bool,
    #[command(flatten)]
    short: Short,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    process: Process,
}

/// The short form, which the published tests use.
#[derive(Debug, clap::Args)]
struct Short {
    /// client: accept TCP, dial MPTCP; server: accept MPTCP, dial TCP
    #[arg(long, requires_all = ["port", "remote"], conflicts_with_all = ["listen", "to"])]
    mode: Option<Mode>,
    /// Accept on this port of all addresses
    #[arg(long, requires = "mode")]
    port: Option<u16>,
    /// Dial this server
    #[arg(long, value_name = "HOST:PORT", requires = "mode")]
    remote: Option<String>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Mode {
    Client,
    Server,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let Args { config, check, print_rules, short, settings, process } = args;
    let settings = short.under(settings)?;
    if config.is_none() {
        ensure!(
            settings.listen.is_some(),
            "--listen URL is missing (or --mode, --port and --remote; or --config FILE)"
        );
        ensure!(
            settings.to.is_some() || settings.transparent.is_some(),
            "--to URL is missing (or --transparent)"
        );
    }
    let load = || match &config {
        Some(file) => Config::load(file, &settings, &process),
        None => Config::from_settings(settings.clone(), &process),
    };
    if check {
        load()?;
        return Ok(ExitCode::SUCCESS);
    }
    if print_rules {
        for rules in load()?.services.iter().filter_map(Rules::of) {
            output::raw(rules.to_string().as_bytes())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    raise_descriptor_limit();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(relay::run::run(load))?;
    Ok(ExitCode::SUCCESS)
}

impl Short {
    /// The same in the long form, as far as it was given.
    fn under(self, settings: Settings) -> Result<Settings> {
        let (Some(mode), Some(port), Some(remote)) = (self.mode, self.port, self.remote) else {
            return Ok(settings);
        };
        let (accept, dial) = match mode {
            Mode::Client => ("tcp", "mptcp"),
            Mode::Server => ("mptcp", "tcp"),
        };
        let listen = format!("{accept}://:{port}").parse().map_err(|e| anyhow!("--port {port}: {e}"))?;
        let to = format!("{dial}://{remote}").parse().map_err(|e| anyhow!("--remote {remote}: {e}"))?;
        Ok(Settings { listen: Some(listen), to: Some(to), ..settings })
    }
}

/// A relay needs two descriptors per connection, and the usual soft limit of 1024 is for programs that use
/// select(2).
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "descriptor limit stays at {soft}");
    }
}
