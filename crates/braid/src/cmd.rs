//! One module per command, and the one definition of the command line: parser, help, man pages and
//! completions all come from here.

use std::collections::HashMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::task::Poll;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{CommandFactory, Parser, Subcommand};
use mptcp::{Netns, sysctl};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

use crate::output;

mod address;
mod completion;
mod connection;
mod echo;
mod endpoint;
mod help;
mod lab;
mod lb;
mod limits;
mod listen;
mod man;
mod monitor;
mod mptcpify;
mod pm;
mod primary;
mod proxy;
mod run;
mod selection;
mod show;
mod stats;
mod subflow;

/// Exit code: it ran and found a problem (a failed scenario, a doctor's finding).
pub const FOUND_A_PROBLEM: u8 = 1;
/// Exit code: it could not run (usage, permission, missing file).
pub const COULD_NOT_RUN: u8 = 2;

/// Multipath TCP for the software you already run
#[derive(Debug, Parser)]
#[command(name = "braid", version, disable_help_subcommand = true, after_help = help::topics())]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Log more: once for details, twice for everything (BRAID_LOG=FILTER chooses)
    // Behind each command's own options, which clap would sort it in among.
    #[arg(short, long, global = true, display_order = 900, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // there is one, once
enum Command {
    Proxy(proxy::Args),
    Run(run::Args),
    Mptcpify(mptcpify::Args),
    Lb(lb::Args),
    Lab(lab::Args),
    Echo(echo::Args),
    Show(show::Args),
    Primary(primary::Args),
    Pm(pm::Args),
    Monitor(monitor::Args),
    Endpoint(endpoint::Args),
    Limits(limits::Args),
    Subflow(subflow::Args),
    Address(address::Args),
    Listen(listen::Args),
    Stats(stats::Args),
    Help(help::Args),
    Completion(completion::Args),
    Man(man::Args),
}

impl Cli {
    /// Parses `args`, the program's name included: under a name of the sample application ([`echo::PUBLISHED`])
    /// the program is that. An error, or what `--help` and `--version` ask for, has been printed when this
    /// returns an exit code.
    pub fn from_command_line(args: impl Iterator<Item = OsString>) -> Result<Self, ExitCode> {
        Self::try_parse_from(echo::translate(args.collect())).map_err(|error| {
            if error.use_stderr()
                && error.kind() != clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
            {
                output::note(format_args!("braid: {}", one_line(&error.to_string())));
            } else if let Err(error) = error.print() {
                tracing::debug!(%error, "help not printed");
            }
            ExitCode::from(if error.use_stderr() { COULD_NOT_RUN } else { 0 })
        })
    }
}

/// Runs a parsed command line.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Proxy(args) => proxy::run(args),
        Command::Run(args) => run::run(args),
        Command::Mptcpify(args) => mptcpify::run(args),
        Command::Lb(args) => lb::run(args),
        Command::Lab(args) => lab::run(args),
        Command::Echo(args) => echo::run(args),
        Command::Show(args) => show::run(args),
        Command::Primary(args) => primary::run(args),
        Command::Pm(args) => pm::run(args),
        Command::Monitor(args) => monitor::run(args),
        Command::Endpoint(args) => endpoint::run(args),
        Command::Limits(args) => limits::run(args),
        Command::Subflow(args) => subflow::run(args),
        Command::Address(args) => address::run(args),
        Command::Listen(args) => listen::run(args),
        Command::Stats(args) => stats::run(args),
        Command::Help(args) => help::run(args, Cli::command()),
        Command::Completion(args) => completion::run(args, Cli::command()),
        Command::Man(args) => man::run(args, Cli::command()),
    }
}

/// Where a command acts: in the caller's network namespace unless told otherwise.
#[derive(Debug, clap::Args)]
struct Place {
    /// Act in the network namespace that `ip netns` knows as NAME, or that is bound to a path
    #[arg(short = 'n', long, global = true, value_name = "NAME", help_heading = "Where")]
    netns: Option<String>,
    /// Act in the network namespace of the process PID
    #[arg(long, global = true, value_name = "PID", conflicts_with = "netns", help_heading = "Where")]
    pid: Option<u32>,
}

impl Place {
    fn open(&self) -> mptcp::Result<Netns> {
        match (&self.netns, self.pid) {
            (Some(path), _) if path.contains('/') => Netns::from_path(path),
            (Some(name), _) => Netns::named(name),
            (None, Some(pid)) => Netns::of_pid(pid),
            (None, None) => Netns::current(),
        }
    }
}

/// Refuses where no MPTCP socket can be made: there is nothing to see and nothing to wait for.
fn ensure_mptcp(netns: &Netns) -> Result<()> {
    match sysctl::get(netns, "net.mptcp.enabled") {
        Ok(enabled) if enabled == "0" => {
            bail!("MPTCP is switched off in network namespace {} (net.mptcp.enabled=0)", netns.name())
        }
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => {
            bail!("this kernel has no MPTCP (CONFIG_MPTCP; net.mptcp.enabled is missing)")
        }
        result => Ok(result.map(drop)?),
    }
}

/// Refuses where the kernel would take endpoints and limits, but heed none.
fn ensure_in_kernel_path_manager(netns: &Netns) -> Result<()> {
    ensure_mptcp(netns)?;
    // Kernels before 5.19 have no other one, and no such key.
    let userspace = sysctl::get(netns, "net.mptcp.pm_type").is_ok_and(|kind| kind == "1");
    ensure!(
        !userspace,
        "the path manager in network namespace {} is the userspace one, which has no endpoints and limits \
         (net.mptcp.pm_type=1)",
        netns.name()
    );
    Ok(())
}

/// The names of a namespace's interfaces.
#[derive(Debug, Default)]
struct Interfaces(HashMap<u32, String>);

impl Interfaces {
    fn of(netns: &Netns) -> Result<Self> {
        let read = || {
            let named = |i: &nix::net::if_::Interface| (i.index(), i.name().to_string_lossy().into_owned());
            nix::net::if_::if_nameindex().map(|list| Interfaces(list.iter().map(named).collect()))
        };
        netns.run(read)?.context("list the interfaces")
    }

    fn name(&self, index: u32) -> Option<&str> {
        self.0.get(&index).map(String::as_str)
    }
}

/// Is `word` a keyword of iproute2 or the beginning of one?
fn abbreviates(word: &str, keyword: &str) -> bool {
    !word.is_empty() && keyword.starts_with(word)
}

/// The number after `keyword`: decimal, `0x` hexadecimal or, as iproute2 takes it, `0` octal.
fn number<T: TryFrom<u64>>(keyword: &str, text: &str) -> Result<T> {
    let parsed = match (text.strip_prefix("0x"), text.strip_prefix('0')) {
        (Some(digits), _) => u64::from_str_radix(digits, 16),
        (None, Some(digits)) if !digits.is_empty() => u64::from_str_radix(digits, 8),
        _ => text.parse(),
    };
    let number = parsed.with_context(|| format!("{keyword}: '{text}' is not a number"))?;
    T::try_from(number).ok().with_context(|| format!("{keyword}: {text} is too large"))
}

/// Runs `future` to its end on a runtime of its own. A command starts the runtime itself, since some have
/// to do single-threaded things first (enter a user namespace).
fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(future);
    // A thread that waits for the keyboard must not keep the program from ending.
    runtime.shutdown_background();
    result
}

/// Catches the signals `kinds` from now on; the future is ready when one of them has come. One that was ignored when
/// the program started, as nohup(1) has it, goes on being ignored.
fn signalled<const N: usize>(kinds: [SignalKind; N]) -> Result<impl Future<Output = ()> + Unpin> {
    let ignored = ignored_signals()?;
    let mut signals = Vec::with_capacity(N);
    for kind in kinds.into_iter().filter(|kind| ignored >> (kind.as_raw_value() - 1) & 1 == 0) {
        signals.push(signal(kind).context("catch signals")?);
    }
    Ok(std::future::poll_fn(move |context| {
        match signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }))
}

/// Signal 1 in the lowest bit.
fn ignored_signals() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap_or("0");
    u64::from_str_radix(mask.trim(), 16).context("SigIgn of /proc/self/status")
}

/// What ends a command that runs until it is told to end.
const END: [SignalKind; 2] = [SignalKind::interrupt(), SignalKind::terminate()];

/// The next connection. An error is logged, and accepting goes on.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(%error, "accept");
                // Out of descriptors, the connection stays in the queue and accept fails again at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn address_and_port(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected an address and a port: 192.0.2.1:80, [2001:db8::1]:80".into())
}

/// A time above zero in seconds: `2`, `0.5`.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "expected seconds above zero, such as 2 or 0.5".into())
}

/// The same, or `0` for not at all.
fn seconds_or_none(text: &str) -> Result<Duration, String> {
    if text == "0" { Ok(Duration::ZERO) } else { seconds(text) }
}

/// What clap says over several lines, without the usage.
fn one_line(message: &str) -> String {
    let end =
        message.find("\nUsage:").or_else(|| message.find("\nFor more information")).unwrap_or(message.len());
    let words: Vec<&str> = message[..end].split_whitespace().collect();
    words.join(" ").trim_start_matches("error: ").replace(" tip: ", "; tip: ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
