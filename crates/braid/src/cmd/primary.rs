//! `braid primary`: shows, sets and watches the primary subflow of live connections.

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use mptcp::diag::{self, Connection, Owner};
use mptcp::pm::{Client, Events};
use mptcp::{Netns, Token};
use serde::Serialize;
use steer::primary::{self, Outcome, Path, Reason, Report, Switch, Via, Wanted, list};
use tokio::time::{self, MissedTickBehavior};

use crate::cmd::selection::Selection;
use crate::cmd::show::{milliseconds, programs};
use crate::cmd::{self, END, FOUND_A_PROBLEM, Place};
use crate::output;

/// Choose the subflow that a live connection's data take
///
/// Of any program, unchanged and unasked, in both directions: the primary subflow carries the data, the others are
/// backups. For connections that have the userspace path manager (net.mptcp.pm_type=1) at this end.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid primary show
  braid primary set --token 1a2b3c4d --via 192.168.200.2
  braid primary set --program openvpn --peer 192.168.100.7 --via 192.168.200.0/24
  braid primary set --all --via fastest
  braid primary watch --json")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Show(Show),
    Set(Set),
    Watch(Watch),
}

/// Show which subflows are primary, and whether they can be chosen
#[derive(Debug, clap::Args)]
struct Show {
    #[command(flatten)]
    selection: Selection,
    /// Print a JSON array
    #[arg(short, long)]
    json: bool,
}

/// Make a subflow primary and the others backup
///
/// The flags are set at once. Then the kernel is asked whether the data follow, and the command is repeated while the
/// peer does not. Where data have to move and none gets through on the new primary subflow, the flags are put back
/// as they were. What cannot be steered is listed with its reason, and the exit code is 1.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid primary set --token 1a2b3c4d --via 192.168.200.2
  braid primary set --program openvpn --peer 192.168.100.7 --via 192.168.200.0/24
  braid primary set --all --via fastest --drain fast
  braid primary set --pid 4711 --both")]
struct Set {
    #[command(flatten)]
    selection: Selection,
    /// All connections
    #[arg(long)]
    all: bool,
    /// The way: an address or subnet of either end, an interface here, or fastest (shortest round trip)
    #[arg(long, value_name = "ADDRESS|INTERFACE|SUBNET|fastest", required_unless_present = "both")]
    via: Option<String>,
    /// No backup: let the kernel use all subflows
    #[arg(long, conflicts_with = "via")]
    both: bool,
    /// fast: bound the send buffer before, so that the old path falls silent soon, and restore its size after
    ///
    /// Borrows the socket from the program, which needs the permission to trace it: the same user, or
    /// CAP_SYS_PTRACE.
    #[arg(long, value_name = "HOW")]
    drain: Option<Drain>,
    /// How long to look whether the data follow; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = cmd::seconds_or_none)]
    wait: Duration,
    /// Print a JSON array
    #[arg(short, long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Drain {
    Fast,
}

/// Print a line whenever the primary subflows of a connection change, until interrupted
///
/// Begins with the connections that there are. As long as it runs the kernel accepts joins to connections of the
/// userspace path manager, as it does while anybody listens to its events.
#[derive(Debug, clap::Args)]
struct Watch {
    #[command(flatten)]
    selection: Selection,
    /// Print one JSON object a line
    #[arg(short, long)]
    json: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    cmd::block_on(async {
        match &args.command {
            Command::Show(show) => show.run(&args.place, &netns).await,
            Command::Set(set) => set.run(&args.place, &netns, cmd::signalled(END)?).await,
            Command::Watch(watch) => {
                let end = cmd::signalled(END)?;
                tokio::select! {
                    code = watch.run(&args.place, &netns) => code,
                    () = end => Ok(ExitCode::SUCCESS),
                }
            }
        }
    })
}

impl Selection {
    async fn connections(&self, place: &Place, netns: &Netns) -> Result<Vec<Connection>> {
        let mut connections = diag::connections(netns).await?;
        connections.retain(|connection| self.wants(place, connection));
        connections.sort_by_key(|c| (c.local, c.remote));
        Ok(connections)
    }
}

impl Set {
    /// When `end` comes nobody waits any more.
    async fn run(&self, place: &Place, netns: &Netns, end: impl Future<Output = ()>) -> Result<ExitCode> {
        ensure!(
            self.all || self.selection.is_given(place),
            "which connections? Give --token, --peer, --program, --port, --pid or --all"
        );
        let wanted = match &self.via {
            Some(word) => Wanted::Via(Via::resolve(netns, word)?),
            None => Wanted::Both,
        };
        let connections = self.selection.connections(place, netns).await?;
        if connections.is_empty() {
            cmd::ensure_mptcp(netns)?;
            bail!("there is no such connection");
        }
        let switch = Switch { wanted, wait: self.wait, drain: self.drain.is_some() };
        let reports = primary::switch_until(netns, connections, &switch, end).await?;
        if self.json {
            output::line(serde_json::to_string(&reports)?)?;
        } else {
            for report in &reports {
                output::line(line(report))?;
            }
        }
        let steered = |report: &Report| matches!(report.outcome, Outcome::Switched { .. });
        Ok(if reports.iter().all(steered) { ExitCode::SUCCESS } else { ExitCode::from(FOUND_A_PROBLEM) })
    }
}

const BOLD: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const WARN: Style = AnsiColor::Yellow.on_default();

fn line(report: &Report) -> String {
    let head = format!("{BOLD}{}{BOLD:#}  {}", report.token, programs(&report.owners));
    let (primary, times) = match &report.outcome {
        Outcome::NotSteered { reason } => return format!("{head}  {WARN}not steered{WARN:#}: {reason}"),
        Outcome::Switched { primary, set_us, first_data_ms, last_data_ms, repeated, draining } => {
            let time = |what: &str, ms: Option<f64>| ms.map(|ms| format!("{what} after {ms} ms"));
            let times = [
                Some(set_us.map_or("was so".into(), |us| format!("set in {} ms", us as f64 / 1e3))),
                time("first data", *first_data_ms),
                time("last data elsewhere", *last_data_ms),
                (*repeated > 0).then(|| format!("told {repeated} times again")),
                draining.then(|| "data still go elsewhere".into()),
            ];
            (primary, times)
        }
    };
    let times = times.into_iter().flatten().collect::<Vec<_>>().join(", ");
    format!("{head}  {GOOD}primary{GOOD:#} {}: {times}", list(primary))
}

/// A connection as `show` prints it.
#[derive(Serialize)]
struct Row {
    token: Token,
    owners: Vec<Owner>,
    steerable: bool,
    reason: Option<Reason>,
    primary: Vec<SubflowRow>,
    backup: Vec<SubflowRow>,
}

#[derive(Serialize)]
struct SubflowRow {
    #[serde(flatten)]
    path: Path,
    state: String,
    rtt_us: u32,
    backup_by_us: bool,
    backup_by_peer: bool,
}

impl Show {
    async fn run(&self, place: &Place, netns: &Netns) -> Result<ExitCode> {
        let connections = self.selection.connections(place, netns).await?;
        if connections.is_empty() {
            cmd::ensure_mptcp(netns)?;
        }
        let client = Client::connect(netns).await?;
        let mut rows = Vec::new();
        for connection in connections {
            rows.push(Row::of(connection, &client).await);
        }
        if self.json {
            output::line(serde_json::to_string(&rows)?)?;
            return Ok(ExitCode::SUCCESS);
        }
        for row in &rows {
            output::line(format_args!("{BOLD}{}{BOLD:#}  {}", row.token, programs(&row.owners)))?;
            for subflow in row.primary.iter().chain(&row.backup) {
                output::line(subflow.line())?;
            }
            if let Some(reason) = &row.reason {
                output::line(format_args!("  {WARN}not steerable{WARN:#}: {reason}"))?;
            }
        }
        if rows.is_empty() {
            output::note("no MPTCP connections");
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Row {
    async fn of(connection: Connection, client: &Client) -> Self {
        let reason = match primary::obstacle(&connection) {
            None if matches!(client.is_userspace(connection.token).await, Ok(false)) => {
                Some(Reason::InKernel)
            }
            reason => reason,
        };
        let (backup, primary): (Vec<_>, Vec<_>) =
            connection.subflows.iter().partition(|subflow| primary::is_backup(subflow));
        let rows = |subflows: Vec<&diag::Subflow>| subflows.into_iter().map(SubflowRow::of).collect();
        Row {
            token: connection.token,
            owners: connection.owners.clone(),
            steerable: reason.is_none(),
            reason,
            primary: rows(primary),
            backup: rows(backup),
        }
    }
}

impl SubflowRow {
    fn of(subflow: &diag::Subflow) -> Self {
        use mptcp::diag::SubflowFlags;
        SubflowRow {
            path: Path::of(subflow),
            state: subflow.state.clone(),
            rtt_us: subflow.tcp.rtt_us,
            backup_by_us: subflow.flags.contains(SubflowFlags::BACKUP_LOCAL),
            backup_by_peer: subflow.flags.contains(SubflowFlags::BACKUP_REMOTE),
        }
    }

    fn line(&self) -> String {
        let role = if self.backup_by_us || self.backup_by_peer { "backup " } else { "primary" };
        let rtt = milliseconds(self.rtt_us);
        let peer = if self.backup_by_peer { "  the peer asked for backup" } else { "" };
        format!("  {role}  {}  {rtt}{peer}", self.path)
    }
}

/// Nothing tells when this end itself has changed a flag: so often it is looked for.
const LOOK: Duration = Duration::from_millis(200);

impl Watch {
    async fn run(&self, place: &Place, netns: &Netns) -> Result<ExitCode> {
        cmd::ensure_mptcp(netns)?;
        let mut events = Events::subscribe(netns)?;
        tracing::debug!("subscribed");
        let mut tick = time::interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut known: HashMap<Token, Vec<Path>> = HashMap::new();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                event = events.next() => { event.context("follow the events")?; }
            }
            let mut before = std::mem::take(&mut known);
            for connection in self.selection.connections(place, netns).await? {
                let primary = connection.subflows.iter().filter(|s| !primary::is_backup(s));
                let mut primary: Vec<_> = primary.map(Path::of).collect();
                primary.sort_by_key(|path| (path.local, path.remote));
                let was = before.remove(&connection.token);
                if was.as_ref() != Some(&primary) {
                    self.print(connection.token, &connection.owners, Some(&primary), was.as_deref())?;
                }
                known.insert(connection.token, primary);
            }
            for (token, was) in before {
                self.print(token, &[], None, Some(&was))?;
            }
        }
    }

    /// `now` is nothing of a connection that is closed.
    fn print(
        &self,
        token: Token,
        owners: &[Owner],
        now: Option<&[Path]>,
        was: Option<&[Path]>,
    ) -> Result<()> {
        let at = format!("{:.3}", Timestamp::now());
        if self.json {
            let fields = [
                ("timestamp", serde_json::json!(at)),
                ("token", serde_json::json!(token)),
                ("owners", serde_json::json!(owners)),
                ("primary", serde_json::json!(now)),
                ("before", serde_json::json!(was)),
            ];
            return Ok(output::line(output::json_object(&fields))?);
        }
        let now = now.map_or("closed".into(), list);
        let was = was.map(|was| format!("  (was {})", list(was))).unwrap_or_default();
        let programs = programs(owners);
        Ok(output::line(format_args!("{at}  {BOLD}{token}{BOLD:#}  {programs}  {now}{was}"))?)
    }
}
