//! `braid show`: connections and their subflows, as a tree.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use anyhow::{Context, Result};
use mptcp::diag::{self, Connection, Owner, Subflow, SubflowFlags};
use mptcp::info::Info;
use mptcp::socket::canonical;
use mptcp::{AddrId, Netns, Token};
use nix::sys::socket::SockaddrStorage;
use rustix::thread::{CapabilitySet, capabilities};
use serde::Serialize;
use tokio::time;

use crate::cmd::selection::Selection;
use crate::cmd::{self, Interfaces, Place};
use crate::output;

/// Show MPTCP connections and their subflows
///
/// Of each connection: its token, state, addresses, whether it is MPTCP or fell back to TCP, the programs that
/// hold it, bytes each way. Of each subflow: its addresses, their ids (ours/the peer's), the interface that has our
/// address, primary or backup and who made it so, round-trip time, bytes each way, retransmitted segments, congestion
/// window and congestion control. With --watch also the rate each way.
///
/// Needs no privilege; programs of other users are seen with CAP_SYS_PTRACE only.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid show
  braid show --program iperf3 --watch
  braid show --pid 4711
  braid show -n server --port 443 --json")]
pub struct Args {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    selection: Selection,
    /// Show them again every so many seconds, with the rates since the time before
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = cmd::seconds)]
    watch: Option<Duration>,
    /// Print JSON: an array; with --watch one a line
    #[arg(short, long)]
    json: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    cmd::block_on(async {
        let mut before = args.look(&netns).await?;
        if before.connections.is_empty() {
            cmd::ensure_mptcp(&netns)?;
        }
        args.print(&netns, &before, None)?;
        let Some(every) = args.watch else { return Ok(ExitCode::SUCCESS) };
        let mut end = cmd::signalled(cmd::END)?;
        loop {
            tokio::select! {
                () = time::sleep(every) => {}
                () = &mut end => return Ok(ExitCode::SUCCESS),
            }
            let now = args.look(&netns).await?;
            args.print(&netns, &now, Some(&before))?;
            before = now;
        }
    })
}

/// The connections that were asked for, at one time.
struct Sample {
    at: Instant,
    connections: Vec<Connection>,
}

impl Args {
    async fn look(&self, netns: &Netns) -> Result<Sample> {
        let mut connections = diag::connections(netns).await?;
        let at = Instant::now();
        connections.retain(|connection| self.selection.wants(&self.place, connection));
        connections.sort_by_key(|c| (c.local, c.remote));
        for connection in &mut connections {
            // The subflow that opened the connection has the id 0 at both ends.
            connection.subflows.sort_by_key(|s| (s.local_id, s.remote_id, s.local, s.remote));
        }
        Ok(Sample { at, connections })
    }

    /// Prints `now`, with the rates since `before`.
    fn print(&self, netns: &Netns, now: &Sample, before: Option<&Sample>) -> Result<()> {
        let rates = before.map_or_else(Rates::default, |before| Rates::between(before, now));
        let devices = Devices::of(netns)?;
        let rows: Vec<_> = now.connections.iter().map(|c| Row::new(c, &devices, &rates)).collect();
        if self.json {
            return Ok(output::line(serde_json::to_string(&rows)?)?);
        }
        let on_terminal = output::is_terminal();
        if self.watch.is_some() && on_terminal {
            output::raw(CLEAR)?;
        } else if before.is_some() {
            output::line("")?;
        }
        for line in tree(&rows) {
            output::line(line)?;
        }
        if on_terminal || before.is_none() {
            for note in notes(&now.connections) {
                output::note(note);
            }
        }
        Ok(())
    }
}

/// Cursor to the corner and all behind it away, so that the next lines take the screen.
const CLEAR: &[u8] = b"\x1b[H\x1b[2J";

/// Where subflows leave and enter.
#[derive(Default)]
struct Devices {
    by_index: Interfaces,
    /// `None` where several interfaces have the address.
    by_address: HashMap<IpAddr, Option<String>>,
}

impl Devices {
    fn of(netns: &Netns) -> Result<Self> {
        let list = || -> nix::Result<Vec<_>> {
            let all = nix::ifaddrs::getifaddrs()?;
            Ok(all.filter_map(|entry| Some((ip(&entry.address?)?, entry.interface_name))).collect())
        };
        let mut by_address = HashMap::new();
        for (ip, name) in netns.run(list)?.context("list the addresses of the interfaces")? {
            by_address.entry(ip).and_modify(|known| *known = None).or_insert(Some(name));
        }
        Ok(Devices { by_index: Interfaces::of(netns)?, by_address })
    }

    /// The interface that the subflow is bound to, else the one that has its local address.
    fn of_subflow(&self, subflow: &Subflow) -> Option<&str> {
        let by_address = || self.by_address.get(&subflow.local.ip().to_canonical())?.as_deref();
        self.by_index.name(subflow.ifindex).or_else(by_address)
    }
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = || address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
    v4().or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
}

/// A connection, or one of its subflows.
type Key = (Token, Option<(SocketAddr, SocketAddr)>);

/// Bits each second since the sample before; nothing where that had no such connection or subflow.
#[derive(Default)]
struct Rates(HashMap<Key, Rate>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Rate {
    sent_bit_per_s: u64,
    received_bit_per_s: u64,
}

impl Rates {
    fn between(before: &Sample, now: &Sample) -> Self {
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let rate = |before: u64, now: u64| Some((now.checked_sub(before)? as f64 * 8.0 / seconds) as u64);
        let before: HashMap<Key, [u64; 2]> = before.connections.iter().flat_map(counters).collect();
        let rates = now.connections.iter().flat_map(counters).filter_map(|(key, now)| {
            let before = before.get(&key)?;
            let sent_bit_per_s = rate(before[0], now[0])?;
            Some((key, Rate { sent_bit_per_s, received_bit_per_s: rate(before[1], now[1])? }))
        });
        Rates(rates.collect())
    }
}

/// Bytes sent and received, of the connection and of each subflow.
fn counters(connection: &Connection) -> Vec<(Key, [u64; 2])> {
    let Connection { token, info, .. } = connection;
    let subflows = connection.subflows.iter();
    let subflows =
        subflows.map(|s| ((*token, Some((s.local, s.remote))), [s.tcp.bytes_sent, s.tcp.bytes_received]));
    subflows.chain([((*token, None), [info.bytes_sent, info.bytes_received])]).collect()
}

/// A connection as it is shown, in JSON too.
#[derive(Serialize)]
struct Row<'a> {
    token: Token,
    state: &'a str,
    /// `mptcp`, or `tcp` after a fallback.
    protocol: &'static str,
    local: SocketAddr,
    remote: SocketAddr,
    inode: u32,
    uid: u32,
    owners: &'a [Owner],
    owners_hidden: bool,
    info: &'a Info,
    #[serde(flatten)]
    rate: Option<Rate>,
    subflows: Vec<SubflowRow<'a>>,
}

#[derive(Serialize)]
struct SubflowRow<'a> {
    #[serde(flatten)]
    subflow: &'a Subflow,
    /// `backup` where one side or both asked for it (mptcp_subflow_get_send() treats both alike), else `primary`.
    priority: &'static str,
    backup_by_us: bool,
    backup_by_peer: bool,
    interface: Option<&'a str>,
    #[serde(flatten)]
    rate: Option<Rate>,
}

impl<'a> Row<'a> {
    fn new(connection: &'a Connection, devices: &'a Devices, rates: &Rates) -> Self {
        let Connection { token, .. } = *connection;
        let subflows = connection.subflows.iter().map(|subflow| {
            let backup_by_us = subflow.flags.contains(SubflowFlags::BACKUP_LOCAL);
            let backup_by_peer = subflow.flags.contains(SubflowFlags::BACKUP_REMOTE);
            SubflowRow {
                subflow,
                priority: if backup_by_us || backup_by_peer { "backup" } else { "primary" },
                backup_by_us,
                backup_by_peer,
                interface: devices.of_subflow(subflow),
                rate: rates.0.get(&(token, Some((subflow.local, subflow.remote)))).copied(),
            }
        });
        Row {
            token,
            state: &connection.state,
            protocol: if connection.info.is_fallback() { "tcp" } else { "mptcp" },
            local: connection.local,
            remote: connection.remote,
            inode: connection.inode,
            uid: connection.uid,
            owners: &connection.owners,
            owners_hidden: connection.owners_hidden(),
            info: &connection.info,
            rate: rates.0.get(&(token, None)).copied(),
            subflows: subflows.collect(),
        }
    }
}

const BOLD: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const WARN: Style = AnsiColor::Yellow.on_default();
const DIM: Style = Style::new().dimmed();

/// One line for each connection, and below it one for each of its subflows, in columns.
fn tree(connections: &[Row<'_>]) -> Vec<String> {
    let rows: Vec<_> = connections.iter().flat_map(|c| &c.subflows).map(columns).collect();
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

fn heading(connection: &Row<'_>) -> String {
    let Row { token, state, info, rate, .. } = connection;
    let protocol = if info.is_fallback() {
        format!("{WARN}fell back to TCP{WARN:#}")
    } else {
        format!("{GOOD}MPTCP{GOOD:#}")
    };
    let owners = programs(connection.owners);
    format!(
        "{BOLD}{token}{BOLD:#}  {state}  {}  {protocol}  {owners}  {}  {}",
        path(connection.local, connection.remote),
        amount("sent", info.bytes_sent, rate.map(|rate| rate.sent_bit_per_s)),
        amount("received", info.bytes_received, rate.map(|rate| rate.received_bit_per_s)),
    )
}

/// Who holds a connection: `curl (12), sh (11)`.
pub fn programs(owners: &[Owner]) -> String {
    let owners: Vec<_> = owners.iter().map(|owner| format!("{} ({})", owner.program, owner.pid)).collect();
    if owners.is_empty() { "-".into() } else { owners.join(", ") }
}

const COLUMNS: usize = 11;

fn columns(row: &SubflowRow<'_>) -> [String; COLUMNS] {
    let SubflowRow { subflow, rate, .. } = row;
    let Subflow { local_id: AddrId(local), remote_id: AddrId(remote), .. } = subflow;
    let priority = match (row.backup_by_us, row.backup_by_peer) {
        (false, false) => "primary",
        (true, false) => "backup (ours)",
        (false, true) => "backup (peer's)",
        (true, true) => "backup (both)",
    };
    [
        path(subflow.local, subflow.remote),
        format!("id {local}/{remote}"),
        if subflow.state == "ESTAB" { String::new() } else { subflow.state.clone() },
        row.interface.unwrap_or_default().into(),
        priority.into(),
        milliseconds(subflow.tcp.rtt_us),
        amount("sent", subflow.tcp.bytes_sent, rate.map(|rate| rate.sent_bit_per_s)),
        amount("received", subflow.tcp.bytes_received, rate.map(|rate| rate.received_bit_per_s)),
        if subflow.tcp.retransmits == 0 {
            String::new()
        } else {
            format!("retrans {}", subflow.tcp.retransmits)
        },
        format!("cwnd {}", subflow.tcp.cwnd),
        subflow.congestion_control.clone(),
    ]
}

/// IPv4-mapped addresses are written as IPv4.
fn path(local: SocketAddr, remote: SocketAddr) -> String {
    format!("{} → {}", canonical(local), canonical(remote))
}

pub fn milliseconds(rtt_us: u32) -> String {
    let digits = if rtt_us < 1000 { 2 } else { 1 };
    format!("rtt {:.digits$} ms", f64::from(rtt_us) / 1000.0)
}

/// `sent 20 MB`, or `sent 20 MB (3.1 Mbit/s)`.
fn amount(direction: &str, bytes: u64, bit_per_s: Option<u64>) -> String {
    let rate = bit_per_s.map(|rate| format!(" ({})", decimal(rate, "bit/s"))).unwrap_or_default();
    format!("{direction} {}{rate}", decimal(bytes, "B"))
}

/// With a decimal prefix and three digits or so: `999 B`, `1.5 kB`, `20 MB`.
fn decimal(count: u64, unit: &str) -> String {
    let mut value = count as f64;
    let mut prefixes = ["", "k", "M", "G", "T", "P"].into_iter();
    let mut prefix = prefixes.next().unwrap_or_default();
    for larger in prefixes {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        prefix = larger;
    }
    let digits = if prefix.is_empty() || value >= 9.95 { 0 } else { 1 };
    format!("{value:.digits$} {prefix}{unit}")
}

/// What the caller may not see, and what would help.
fn notes(connections: &[Connection]) -> Vec<String> {
    let mut notes = Vec::new();
    if connections.is_empty() {
        notes.push("no MPTCP connections".into());
    }
    let unseen = connections.iter().filter(|c| c.owners_hidden()).count();
    if unseen > 0 {
        notes.push(format!(
            "{unseen} of {} connections: programs not seen, which needs CAP_SYS_PTRACE",
            connections.len()
        ));
    }
    let blind = !capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
    let established = connections.iter().any(|c| c.state == "ESTAB");
    if blind && established && connections.iter().all(|c| c.subflows.is_empty()) {
        notes.push("subflows not seen, which before Linux 6.15 needs CAP_NET_ADMIN".into());
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use mptcp::diag::Owner;
    use mptcp::info::{Info, TcpInfo};

    fn subflow(local: &str, id: u8) -> Subflow {
        let mut tcp = TcpInfo::default();
        tcp.rtt_us = 20_150;
        tcp.bytes_sent = 1_234_567;
        tcp.bytes_received = 999;
        tcp.retransmits = u32::from(id);
        tcp.cwnd = 10;
        Subflow {
            local: local.parse().unwrap(),
            remote: "[::ffff:10.0.0.1]:80".parse().unwrap(),
            local_id: AddrId(id),
            remote_id: AddrId(0),
            state: "ESTAB".into(),
            flags: if id == 3 { SubflowFlags::BACKUP_LOCAL } else { SubflowFlags::empty() },
            ifindex: 0,
            tcp,
            congestion_control: "cubic".into(),
        }
    }

    fn connection() -> Connection {
        let mut info = Info::default();
        info.bytes_sent = 20_000_000;
        Connection {
            token: Token(0xab),
            state: "ESTAB".into(),
            local: "10.0.0.2:40000".parse().unwrap(),
            remote: "10.0.0.1:80".parse().unwrap(),
            inode: 1,
            uid: 0,
            owners: vec![Owner { pid: 7, program: "client".into() }],
            info,
            subflows: vec![subflow("10.0.0.2:40000", 0), subflow("192.168.0.2:40000", 3)],
        }
    }

    fn plain(rows: &[Row<'_>]) -> Vec<String> {
        tree(rows).iter().map(|line| anstream::adapter::strip_str(line).to_string()).collect()
    }

    #[test]
    fn a_tree_is_aligned_and_leaves_empty_columns_out() {
        let (connection, mut devices) = (connection(), Devices::default());
        devices.by_address.insert("192.168.0.2".parse().unwrap(), Some("wlan0".into()));
        devices.by_address.insert("10.0.0.2".parse().unwrap(), None);
        let text = plain(&[Row::new(&connection, &devices, &Rates::default())]);
        assert_eq!(
            text,
            [
                "000000ab  ESTAB  10.0.0.2:40000 → 10.0.0.1:80  MPTCP  client (7)  sent 20 MB  received 0 B",
                "├─ 10.0.0.2:40000 → 10.0.0.1:80     id 0/0         primary        rtt 20.1 ms  sent 1.2 MB  received 999 B             cwnd 10  cubic",
                "└─ 192.168.0.2:40000 → 10.0.0.1:80  id 3/0  wlan0  backup (ours)  rtt 20.1 ms  sent 1.2 MB  received 999 B  retrans 3  cwnd 10  cubic",
            ]
        );
    }

    #[test]
    fn rates_are_of_what_both_samples_have() {
        let (mut now, at) = (connection(), Instant::now());
        let mut before = connection();
        before.subflows.pop();
        now.info.bytes_sent += 1_000_000;
        now.subflows[0].tcp.bytes_received += 500;
        let sample = |connection, at| Sample { at, connections: vec![connection] };
        let (before, now) = (sample(before, at), sample(now, at + Duration::from_secs(2)));
        let rates = Rates::between(&before, &now);
        let devices = Devices::default();
        let row = Row::new(&now.connections[0], &devices, &rates);
        assert_eq!(row.rate, Some(Rate { sent_bit_per_s: 4_000_000, received_bit_per_s: 0 }));
        assert_eq!(row.subflows[0].rate, Some(Rate { sent_bit_per_s: 0, received_bit_per_s: 2000 }));
        assert_eq!(row.subflows[1].rate, None);
        let text = plain(&[row]);
        assert!(text[0].ends_with("sent 21 MB (4.0 Mbit/s)  received 0 B (0 bit/s)"), "{text:#?}");
        assert!(text[1].contains("received 1.5 kB (2.0 kbit/s)"), "{text:#?}");
        // Counters that went backwards belong to something else.
        assert!(!Rates::between(&now, &before).0.contains_key(&(Token(0xab), None)));
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
            assert_eq!(decimal(count, "B"), text);
        }
    }
}
