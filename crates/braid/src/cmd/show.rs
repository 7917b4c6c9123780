//! `braid show`: connections and their subflows, as a tree.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use mptcp::diag::{self, Connection, Subflow};
use mptcp::{AddrId, Token};
use serde::Serialize;

use crate::cmd::{self, Interfaces, Place};
use crate::output;

/// Show MPTCP connections and their subflows
///
/// Of each connection: its token, state, addresses, whether it is MPTCP or fell back to TCP, the programs that
/// hold it, bytes each way. Of each subflow: its addresses, their ids (ours/the peer's), the interface it is bound
/// to, who made it a backup, round-trip time, bytes each way, segments sent again, congestion window.
///
/// Needs no privilege; programs of other users are seen with CAP_SYS_PTRACE only.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid show
  braid show --program iperf3
  braid show --pid 4711
  braid show -n server --port 443 --json")]
pub struct Args {
    #[command(flatten)]
    place: Place,
    /// Only connections of the program NAME
    #[arg(long, value_name = "NAME")]
    program: Option<String>,
    /// Only the connection with this token
    #[arg(long, value_name = "HEX")]
    token: Option<Token>,
    /// Only connections with a subflow to this address
    #[arg(long, value_name = "ADDRESS")]
    peer: Option<IpAddr>,
    /// Only connections from or to this port
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Print JSON
    #[arg(short, long)]
    json: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    let mut connections = cmd::block_on(async { Ok(diag::connections(&netns).await?) })?;
    connections.retain(|connection| args.wants(connection));
    connections.sort_by_key(|c| (c.local, c.remote));
    for connection in &mut connections {
        // The subflow that opened the connection has the id 0 at both ends.
        connection.subflows.sort_by_key(|s| (s.local_id, s.remote_id, s.local, s.remote));
    }
    if args.json {
        let connections: Vec<_> = connections.iter().map(WithProtocol::from).collect();
        output::line(serde_json::to_string(&connections)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let interfaces = Interfaces::of(&netns)?;
    for line in tree(&connections, &interfaces) {
        output::line(line)?;
    }
    for note in notes(&connections) {
        output::note(note);
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn wants(&self, connection: &Connection) -> bool {
        let owners = &connection.owners;
        let remotes = || connection.subflows.iter().map(|s| s.remote).chain([connection.remote]);
        self.place.pid.is_none_or(|pid| owners.iter().any(|owner| owner.pid == pid))
            && self.program.as_ref().is_none_or(|name| owners.iter().any(|owner| owner.program == *name))
            && self.token.is_none_or(|token| connection.token == token)
            && self.peer.is_none_or(|ip| remotes().any(|r| r.ip().to_canonical() == ip.to_canonical()))
            && self
                .port
                .is_none_or(|port| [connection.local.port(), connection.remote.port()].contains(&port))
    }
}

/// A connection as JSON shows it.
#[derive(Serialize)]
struct WithProtocol<'a> {
    #[serde(flatten)]
    connection: &'a Connection,
    /// `mptcp`, or `tcp` after a fallback.
    protocol: &'static str,
}

impl<'a> From<&'a Connection> for WithProtocol<'a> {
    fn from(connection: &'a Connection) -> Self {
        WithProtocol { connection, protocol: if connection.info.is_fallback() { "tcp" } else { "mptcp" } }
    }
}

const BOLD: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const WARN: Style = AnsiColor::Yellow.on_default();
const DIM: Style = Style::new().dimmed();

/// One line for each connection, and below it one for each of its subflows, in columns.
fn tree(connections: &[Connection], interfaces: &Interfaces) -> Vec<String> {
    let rows: Vec<_> = connections.iter().flat_map(|c| &c.subflows).map(|s| columns(s, interfaces)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let mut rows = rows.iter();
    let mut lines = Vec::new();
    for connection in connections {
        lines.push(heading(connection));
        for (number, row) in rows.by_ref().take(connection.subflows.len()).enumerate() {
            let branch = if number + 1 == connection.subflows.len() { "└─" } else { "├─" };
            let cells = row.iter().zip(widths).filter(|(_, width)| *width > 0);
            let cells: Vec<_> = cells.map(|(cell, width)| format!("{cell:<width$}")).collect();
            lines.push(format!("{DIM}{branch}{DIM:#} {}", cells.join("  ").trim_end()));
        }
    }
    lines
}

fn heading(connection: &Connection) -> String {
    let Connection { token, state, info, .. } = connection;
    let protocol = if info.is_fallback() {
        format!("{WARN}fell back to TCP{WARN:#}")
    } else {
        format!("{GOOD}MPTCP{GOOD:#}")
    };
    let owners: Vec<_> =
        connection.owners.iter().map(|owner| format!("{} ({})", owner.program, owner.pid)).collect();
    let owners = if owners.is_empty() { "-".into() } else { owners.join(", ") };
    format!(
        "{BOLD}{token}{BOLD:#}  {state}  {}  {protocol}  {owners}  sent {}  received {}",
        path(connection.local, connection.remote),
        bytes(info.bytes_sent),
        bytes(info.bytes_received),
    )
}

const COLUMNS: usize = 10;

fn columns(subflow: &Subflow, interfaces: &Interfaces) -> [String; COLUMNS] {
    let Subflow { local_id: AddrId(local), remote_id: AddrId(remote), .. } = subflow;
    let backup = match (subflow.backup_by_us, subflow.backup_by_peer) {
        (false, false) => "",
        (true, false) => "backup (ours)",
        (false, true) => "backup (peer's)",
        (true, true) => "backup (both)",
    };
    [
        path(subflow.local, subflow.remote),
        format!("id {local}/{remote}"),
        if subflow.state == "ESTAB" { String::new() } else { subflow.state.clone() },
        interfaces.name(subflow.ifindex).unwrap_or_default().into(),
        backup.into(),
        milliseconds(subflow.rtt_us),
        format!("sent {}", bytes(subflow.bytes_sent)),
        format!("received {}", bytes(subflow.bytes_received)),
        if subflow.retransmits == 0 { String::new() } else { format!("again {}", subflow.retransmits) },
        format!("cwnd {}", subflow.cwnd),
    ]
}

/// IPv4-mapped addresses are written as IPv4.
fn path(local: SocketAddr, remote: SocketAddr) -> String {
    let plain = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port());
    format!("{} → {}", plain(local), plain(remote))
}

fn milliseconds(rtt_us: u32) -> String {
    let digits = if rtt_us < 1000 { 2 } else { 1 };
    format!("rtt {:.digits$} ms", f64::from(rtt_us) / 1000.0)
}

/// With a decimal prefix and three digits or so: `999 B`, `1.5 kB`, `20 MB`.
fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut units = ["B", "kB", "MB", "GB", "TB", "PB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for larger in units {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = larger;
    }
    if unit == "B" || value >= 9.95 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

/// What the caller may not see, and what would help.
fn notes(connections: &[Connection]) -> Vec<String> {
    let mut notes = Vec::new();
    if connections.is_empty() {
        notes.push("no MPTCP connections".into());
    }
    // A socket that its program has closed has no inode.
    let unseen = connections.iter().filter(|c| c.inode != 0 && c.owners.is_empty()).count();
    if unseen > 0 {
        notes.push(format!(
            "{unseen} of {} connections: programs not seen, which needs CAP_SYS_PTRACE",
            connections.len()
        ));
    }
    if connections.iter().any(|c| c.state == "ESTAB") && connections.iter().all(|c| c.subflows.is_empty()) {
        notes.push("subflows not seen, which before Linux 6.15 needs CAP_NET_ADMIN".into());
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use mptcp::diag::Owner;
    use mptcp::info::Info;

    fn subflow(local: &str, id: u8) -> Subflow {
        Subflow {
            local: local.parse().unwrap(),
            remote: "[::ffff:10.0.0.1]:80".parse().unwrap(),
            local_id: AddrId(id),
            remote_id: AddrId(0),
            state: "ESTAB".into(),
            backup_by_us: id == 3,
            backup_by_peer: false,
            ifindex: 0,
            rtt_us: 20_150,
            bytes_sent: 1_234_567,
            bytes_received: 999,
            bytes_acked: 0,
            retransmits: u32::from(id),
            cwnd: 10,
        }
    }

    #[test]
    fn a_tree_is_aligned_and_leaves_empty_columns_out() {
        let mut info = Info::default();
        info.bytes_sent = 20_000_000;
        let connection = Connection {
            token: Token(0xab),
            state: "ESTAB".into(),
            local: "10.0.0.2:40000".parse().unwrap(),
            remote: "10.0.0.1:80".parse().unwrap(),
            inode: 1,
            uid: 0,
            owners: vec![Owner { pid: 7, program: "client".into() }],
            info,
            subflows: vec![subflow("10.0.0.2:40000", 0), subflow("192.168.0.2:40000", 3)],
        };
        let text: Vec<_> = tree(&[connection], &Interfaces::default())
            .iter()
            .map(|line| anstream::adapter::strip_str(line).to_string())
            .collect();
        assert_eq!(
            text,
            [
                "000000ab  ESTAB  10.0.0.2:40000 → 10.0.0.1:80  MPTCP  client (7)  sent 20 MB  received 0 B",
                "├─ 10.0.0.2:40000 → 10.0.0.1:80     id 0/0                 rtt 20.1 ms  sent 1.2 MB  received 999 B           cwnd 10",
                "└─ 192.168.0.2:40000 → 10.0.0.1:80  id 3/0  backup (ours)  rtt 20.1 ms  sent 1.2 MB  received 999 B  again 3  cwnd 10",
            ]
        );
    }

    #[test]
    fn bytes_have_a_unit_and_few_digits() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (9_949, "9.9 kB"),
            (9_950, "10 kB"),
            (999_499, "999 kB"),
            (999_500, "1.0 MB"),
            (u64::MAX, "18447 PB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
