//! `braid lb`: the load balancer.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use balancer::abi::COUNTERS;
use balancer::agent::{self, Setup};
use balancer::config::PINS;
use balancer::report::Secret;
use balancer::status::{Service, Status, Table};
use balancer::{Config, run};
use clap::Subcommand;

use crate::cmd;
use crate::output;

/// Balance MPTCP and TCP services over backends, a connection's subflows together
///
/// Works in the kernel, on what comes in on the interfaces that the file names; answers go from the backends to the
/// clients directly. SIGHUP reloads the file. After SIGTERM connections go on being balanced (unless the file says
/// pin = false): a new start takes over, `braid lb down` ends it.
///
/// Exit code 2: it could not start.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  braid lb --config /etc/braid/lb.toml
  braid lb --config lb.toml --check
  braid lb status
  braid lb status edge --json
  braid lb down edge"
)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// File with [[service]] and [[service.backend]] tables
    #[arg(long, short, value_name = "FILE", env = "BRAID_LB_CONFIG")]
    config: Option<PathBuf>,
    /// Work in the drivers of real network cards (XDP); an interface whose driver cannot is refused
    #[arg(long)]
    xdp: bool,
    /// Read the configuration and the secret that it names, say what is wrong with them, and end
    #[arg(long)]
    check: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Status(StatusArgs),
    Down(Down),
    Agent(Agent),
}

/// Show services, backends, connections, joins and drops
///
/// Reads the tables of a pinned balancer, whether its program runs or not.
#[derive(Debug, clap::Args)]
#[command(
    name = "status",
    after_help = "\
Examples:
  braid lb status
  braid lb status edge --json"
)]
struct StatusArgs {
    #[command(flatten)]
    which: Which,
    /// Print one JSON document
    #[arg(short, long)]
    json: bool,
}

/// End a balancer, its program included, and remove all that it made
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid lb down
  braid lb down edge")]
struct Down {
    #[command(flatten)]
    which: Which,
}

/// Set up a backend, and undo it at the end
///
/// Puts the service's addresses on lo, sees that it does not answer ARP for them, and raises the limit of subflows. With
/// --join-port it announces them with that port and takes no joins elsewhere; with --tunnel-from it takes packets that a
/// balancer has encapsulated (tunnel = true); with --tell it helps a balancer that has lost its tables.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid lb agent --address 10.0.83.1 --interface eth0
  braid lb agent --address 10.0.83.1 --interface eth0 --join-port 8081
  braid lb agent --address 10.0.83.1 --interface eth0 --tunnel-from 10.0.90.2
  braid lb agent --address 10.0.83.1 --interface eth0 --tell 10.0.90.11:9183 --secret lb.secret")]
struct Agent {
    /// An address of the service (repeat it for more)
    #[arg(long = "address", value_name = "IP", required = true)]
    addresses: Vec<IpAddr>,
    /// Interface that the service's packets come in on (repeat it for more)
    #[arg(long = "interface", value_name = "NAME", required = true)]
    interfaces: Vec<String>,
    /// Announce the addresses with this port, for joins
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    join_port: Option<u16>,
    /// Most subflows that join a connection
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(0..=8))]
    subflows: u32,
    /// Address of a balancer that encapsulates packets (repeat it for more); needs root of the machine
    #[arg(long, value_name = "IP")]
    tunnel_from: Vec<IpAddr>,
    /// Tell balancers that have lost their tables ([agents] in their file) of connections, here
    #[arg(long, value_name = "ADDR:PORT", value_parser = cmd::address_and_port, requires = "secret")]
    tell: Option<SocketAddr>,
    /// File with the secret that they must know: 16 to 1024 bytes, not for everybody to read
    #[arg(long, value_name = "FILE", requires = "tell")]
    secret: Option<PathBuf>,
}

/// Which pinned balancer.
#[derive(Debug, clap::Args)]
struct Which {
    /// The balancer's name; not needed where there is one only
    name: Option<String>,
    /// Where its maps are pinned
    #[arg(long, value_name = "DIR", default_value = PINS)]
    pins: PathBuf,
}

impl Which {
    fn name(&self) -> Result<String> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let entries = match std::fs::read_dir(&self.pins) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("read {}", self.pins.display()));
            }
            entries => entries.into_iter().flatten().flatten(),
        };
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        match names.as_slice() {
            [name] => Ok(name.clone()),
            [] => bail!("no balancer under {} (or pin = false)", self.pins.display()),
            names => bail!("which balancer? There is: {}", names.join(", ")),
        }
    }
}

pub fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Some(Command::Status(args)) => return status(&args),
        Some(Command::Down(Down { which })) => {
            run::down(&which.pins, &which.name()?)?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(Command::Agent(agent)) => return agent.run(),
        None => {}
    }
    let file = args.config.context("--config FILE is missing (or a command: status, down, agent)")?;
    let load = || {
        let config = Config::load(&file)?;
        Ok(Config { xdp: config.xdp || args.xdp, ..config })
    };
    if args.check {
        load()?.secret()?;
        return Ok(ExitCode::SUCCESS);
    }
    cmd::block_on(async {
        let ready = |config: &Config| say(format_args!("balancing on {}", config.interfaces.join(", ")));
        Ok(run::run(load, ready).await?)
    })?;
    Ok(ExitCode::SUCCESS)
}

impl Agent {
    fn run(self) -> Result<ExitCode> {
        let secret = self.secret.as_deref().map(Secret::load).transpose()?;
        let setup = Setup {
            tell: self.tell.zip(secret),
            addresses: self.addresses,
            join_port: self.join_port.and_then(NonZeroU16::new),
            subflows: self.subflows,
            tunnel_from: self.tunnel_from,
            interfaces: self.interfaces,
        };
        let addresses: Vec<String> = setup.addresses.iter().map(ToString::to_string).collect();
        cmd::block_on(async {
            let ready = || say(format_args!("taking packets to {}", addresses.join(", ")));
            Ok(agent::run(&setup, ready).await?)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A line for whoever waits for it; nobody has to read it.
fn say(line: std::fmt::Arguments<'_>) {
    if let Err(error) = output::line(line) {
        tracing::debug!(?error, "nobody reads");
    }
}

fn status(args: &StatusArgs) -> Result<ExitCode> {
    let status = Status::pinned(&args.which.pins, &args.which.name()?)?;
    if args.json {
        output::line(serde_json::to_string(&status)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(match status.program {
        Some(pid) => format!("balancer {}: its program is pid {pid}", status.name),
        None => format!(
            "balancer {}: its program does not run; the kernel goes on with what it was told",
            status.name
        ),
    })?;
    for service in &status.services {
        print_service(service)?;
    }
    for table in &status.tables {
        let Table { name, entries, size, evicted } = table;
        output::line(format_args!("table {name}: {entries} of {size}, {evicted} pushed out"))?;
    }
    for ((name, value), (_, help)) in
        status.counters.iter().zip(COUNTERS).filter(|((_, value), _)| *value > 0)
    {
        output::line(format_args!("{name:18} {value:>10}  {help}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_service(service: &Service) -> Result<()> {
    let joins = if service.by_token { "joins by token" } else { "joins not by token" };
    output::line(format_args!("service {} ({joins}): {}", service.name, service.addresses.join(", ")))?;
    let width = service.backends.iter().map(|backend| backend.name.len()).max().unwrap_or(0).max(7);
    output::line(format_args!(
        "  {:width$}  {:8}  {:>8}  {:>11}  {:>8}  {:>22}",
        "backend", "state", "flows", "connections", "plain", "joins token/port/hash"
    ))?;
    for backend in &service.backends {
        let joins = format!("{}/{}/{}", backend.joins.token, backend.joins.port, backend.joins.hash);
        output::line(format_args!(
            "  {:width$}  {:8}  {:>8}  {:>11}  {:>8}  {joins:>22}",
            backend.name, backend.state, backend.flows, backend.connections, backend.plain
        ))?;
    }
    Ok(())
}
