//! `braid pm`: the command line of the path manager.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use steer::daemon::{self, Options};
use steer::policy::config::{Config, Kind};

use crate::cmd::{self, Place};
use crate::output;

/// Manage the subflows of all MPTCP connections in a namespace
///
/// Opens subflows by the policies of a file, announces addresses, follows addresses and links as they come and go,
/// gives up paths that have died in silence, and brings lost subflows back. Connections that begin while it runs are
/// its own; those that began under the in-kernel path manager stay there.
///
/// SIGHUP reloads the file. At its end it puts back what it has set; killed and started again, it goes on. Needs
/// CAP_NET_ADMIN.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid pm                              a full mesh for every connection
  braid pm --config /etc/braid/pm.toml
  braid pm --config pm.toml --check     only read the file
  braid pm -n phone status --json
  braid pm reload")]
pub struct Args {
    #[command(subcommand)]
    request: Option<Request>,
    #[command(flatten)]
    place: Place,
    /// File with policies; without it, a full mesh
    #[arg(long, short, value_name = "FILE", env = "BRAID_PM_CONFIG")]
    config: Option<PathBuf>,
    /// Policy for connections that no rule matches, whatever the file says: fullmesh, aggregate, primary-backup, single,
    /// ndiffports
    #[arg(long, value_name = "POLICY", value_parser = policy)]
    policy: Option<Kind>,
    /// Read the configuration, say what is wrong with it, and end
    #[arg(long)]
    check: bool,
    /// Leave everything as it is at the end: the sysctl, endpoints, limits
    #[arg(long)]
    stay: bool,
    /// Nothing stays subscribed while the path manager restarts: joins of peers are refused meanwhile
    #[arg(long)]
    no_holder: bool,
    /// Room for events that wait to be read
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20, hide = true)]
    event_buffer: usize,
    /// Where control socket and notes are kept
    #[arg(long, global = true, value_name = "DIR", default_value = "/run/braid", env = "BRAID_RUN")]
    run: PathBuf,
}

#[derive(Debug, clap::Subcommand)]
enum Request {
    /// Say what the running path manager does
    Status {
        /// Print JSON
        #[arg(short, long)]
        json: bool,
    },
    /// Make the running path manager read its file again
    Reload,
    /// Stay subscribed to events; started by the path manager itself
    #[command(hide = true)]
    Hold,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    let load = || {
        let mut config = args.config.as_deref().map_or_else(|| Ok(Config::default()), Config::load)?;
        config.default.policy = args.policy.unwrap_or(config.default.policy);
        Ok(config)
    };
    if args.check {
        load()?;
        return Ok(ExitCode::SUCCESS);
    }
    let directory = daemon::directory(&args.run, &netns)?;
    match &args.request {
        Some(Request::Hold) => cmd::block_on(async { Ok(daemon::hold().await?) })?,
        Some(Request::Status { json }) => status(&directory, *json)?,
        Some(Request::Reload) => drop(ask(&directory, "reload")?),
        None => {
            cmd::ensure_mptcp(&netns)?;
            let holder = if args.no_holder { None } else { Some(holder()?) };
            let options =
                Options { netns, directory, event_buffer: args.event_buffer, stay: args.stay, holder };
            cmd::block_on(async { Ok(daemon::run(options, load).await?) })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn policy(name: &str) -> Result<Kind, String> {
    let name: serde::de::value::StrDeserializer<'_, serde::de::value::Error> =
        serde::de::IntoDeserializer::into_deserializer(name);
    serde::Deserialize::deserialize(name).map_err(|error| error.to_string())
}

fn holder() -> Result<std::process::Command> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["pm", "hold"]);
    Ok(command)
}

fn ask(directory: &Path, request: &str) -> Result<String> {
    match cmd::block_on(async { Ok(daemon::ask(directory, request).await?) })? {
        Ok(answer) => Ok(answer),
        Err(refusal) => bail!("{refusal}"),
    }
}

fn status(directory: &Path, json: bool) -> Result<()> {
    let answer = ask(directory, "status")?;
    if json {
        return Ok(output::line(answer)?);
    }
    let status: serde_json::Value = serde_json::from_str(&answer)?;
    let connections = status["connections"].as_array().map_or(&[][..], Vec::as_slice);
    let mode = status["mode"].as_str().unwrap_or_default();
    output::line(format_args!("pid {}, mode {mode}, {} connections", status["pid"], connections.len()))?;
    for connection in connections {
        let text = |key: &str| connection[key].as_str().unwrap_or_default().to_string();
        output::line(format_args!(
            "{} to {}: {}, {} subflows, {} active",
            text("token"),
            text("peer"),
            text("policy"),
            connection["subflows"],
            connection["active"],
        ))?;
    }
    Ok(())
}
