//! What became of the program's sockets: how many are MPTCP, which connections use it over which subflows, and why
//! others don't.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use mptcp::counters::{self, Counter, Group};
use mptcp::{Netns, info, socket};
use rustix::net::{AddressFamily, SocketType, getpeername, sockopt};
use serde::Serialize;

use crate::answer::Rules;
use crate::caller::Caller;

/// Where a report goes, and how it is written down.
#[derive(Clone, Debug)]
pub struct ReportTo {
    /// The file.
    pub file: Arc<File>,
    /// It is for the report alone: written anew each time. Others are written on.
    pub anew: bool,
    /// Makes the text of it, line ends included.
    pub render: fn(&Report) -> String,
}

/// What became of a program's sockets and those of its children.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The program.
    pub program: String,
    /// Sockets made MPTCP.
    pub mptcp_sockets: u64,
    /// Sockets that stayed TCP, by reason.
    pub tcp_sockets: BTreeMap<&'static str, u64>,
    /// What the connections that were seen used.
    pub connections: Connections,
    /// Between which addresses the MPTCP connections had subflows.
    pub paths: Vec<Path>,
    /// Counters of fallbacks that rose in the network namespace meanwhile, by other programs' connections too.
    pub fallbacks: Vec<Counter>,
    /// Options that MPTCP sockets refuse, and the program asked for.
    pub refused_options: Vec<RefusedOption>,
}

/// Numbers of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Connections {
    /// Used MPTCP.
    pub mptcp: u64,
    /// Of these, had more than one subflow when they were last seen.
    pub multipath: u64,
    /// Asked for MPTCP and fell back to TCP.
    pub fallback: u64,
    /// TCP, as those of clients without MPTCP.
    pub tcp: u64,
}

/// A pair of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Path {
    /// Ours.
    pub local: IpAddr,
    /// The peer's.
    pub remote: IpAddr,
    /// Connections with a subflow between them.
    pub connections: u64,
}

/// An option that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RefusedOption {
    /// As the manual pages write it.
    pub option: &'static str,
    /// The program's name.
    pub program: String,
    /// How often.
    pub count: u64,
    /// Of these, how often the socket became a TCP one.
    pub made_tcp: u64,
}

/// What is known so far. Does nothing where no report is wanted.
#[derive(Debug, Default)]
pub struct Tally {
    wanted: bool,
    report: Report,
    before: Vec<Counter>,
    /// By the kernel's cookie of a socket, which it gives to no other.
    seen: HashMap<u64, Seen>,
    callers: HashSet<Caller>,
    options: BTreeMap<(&'static str, String), (u64, u64)>,
    /// Is there something that no report has told?
    pub news: bool,
}

#[derive(Debug)]
enum Seen {
    Mptcp(BTreeSet<(IpAddr, IpAddr)>),
    Fallback,
    Tcp,
}

impl Tally {
    /// Begins to count, if `rules` want a report.
    pub fn new(rules: &Rules) -> Self {
        let wanted = rules.plan.report.is_some();
        let report = Report { program: rules.plan.name(), ..Default::default() };
        Tally {
            wanted,
            report,
            before: if wanted { read_counters() } else { Vec::new() },
            news: true,
            ..Default::default()
        }
    }

    /// A socket was made MPTCP.
    pub fn made(&mut self, caller: Caller) {
        self.report.mptcp_sockets += 1;
        self.saw(caller);
    }

    /// A socket stayed TCP.
    pub fn left_tcp(&mut self, reason: &'static str) {
        self.news = true;
        *self.report.tcp_sockets.entry(reason).or_default() += 1;
    }

    /// A thread of the program, or of a child.
    pub fn saw(&mut self, caller: Caller) {
        if self.wanted {
            self.news = true;
            self.callers.insert(caller);
        }
    }

    /// The program asked for an option that MPTCP sockets refuse.
    pub fn refused(&mut self, caller: Caller, option: &'static str, made_tcp: bool) {
        let counts = self.options.entry((option, caller.name())).or_default();
        counts.0 += 1;
        counts.1 += u64::from(made_tcp);
    }

    /// Looks what became of the caller's descriptor `fd`, if it is a connection.
    pub fn look(&mut self, caller: Caller, fd: i32) -> io::Result<()> {
        let file = caller.file(fd)?;
        let Some(now) = seen(&file) else { return Ok(()) };
        let cookie = sockopt::socket_cookie(&file)?;
        match (self.seen.get_mut(&cookie), now) {
            // A subflow may be gone by now, and was used all the same.
            (Some(Seen::Mptcp(paths)), Seen::Mptcp(now)) => paths.extend(now),
            (_, now) => drop(self.seen.insert(cookie, now)),
        }
        Ok(())
    }

    /// Looks at all its descriptors.
    pub fn look_at_all(&mut self, caller: Caller) {
        for fd in caller.descriptors() {
            let _ = self.look(caller, fd); // closed meanwhile
        }
    }

    /// Writes the report, if there is news.
    pub fn report(&mut self, rules: &Rules) {
        let Some(to) = &rules.plan.report else { return };
        if !std::mem::take(&mut self.news) {
            return;
        }
        for caller in self.callers.clone() {
            if caller.proc("fd").exists() {
                self.look_at_all(caller);
            } else {
                self.callers.remove(&caller);
            }
        }
        let text = (to.render)(&self.sum_up());
        // Nobody is left to tell when it cannot be written.
        let _ = write(to, text.as_bytes());
    }

    fn sum_up(&self) -> Report {
        let mut report = self.report.clone();
        let mut paths: BTreeMap<(IpAddr, IpAddr), u64> = BTreeMap::new();
        for seen in self.seen.values() {
            match seen {
                Seen::Mptcp(used) => {
                    report.connections.mptcp += 1;
                    report.connections.multipath += u64::from(used.len() > 1);
                    used.iter().for_each(|&path| *paths.entry(path).or_default() += 1);
                }
                Seen::Fallback => report.connections.fallback += 1,
                Seen::Tcp => report.connections.tcp += 1,
            }
        }
        report.paths = paths
            .into_iter()
            .map(|((local, remote), connections)| Path { local, remote, connections })
            .collect();
        report.paths.sort_by_key(|path| std::cmp::Reverse(path.connections));
        report.fallbacks = risen(&self.before, read_counters());
        let options = self.options.iter().map(|((option, program), &(count, made_tcp))| RefusedOption {
            option,
            program: program.clone(),
            count,
            made_tcp,
        });
        report.refused_options = options.collect();
        report
    }
}

/// What a connection uses; `None`: not a TCP or MPTCP connection.
fn seen(file: &OwnedFd) -> Option<Seen> {
    let family = sockopt::socket_domain(file).ok()?;
    if ![AddressFamily::INET, AddressFamily::INET6].contains(&family)
        || sockopt::socket_type(file).ok()? != SocketType::STREAM
        || sockopt::socket_acceptconn(file).ok()?
    {
        return None;
    }
    let subflows = || info::subflows(file).unwrap_or_default().into_iter();
    match info::of(file).ok()? {
        info::Status::Mptcp(info) if info.has_peer() => {
            let path = |s: info::Subflow| (socket::canonical(s.local).ip(), socket::canonical(s.remote).ip());
            Some(Seen::Mptcp(subflows().map(path).collect()))
        }
        info::Status::Fallback(_) if getpeername(file).is_ok() => Some(Seen::Fallback),
        info::Status::Tcp if getpeername(file).is_ok() => Some(Seen::Tcp),
        _ => None,
    }
}

fn read_counters() -> Vec<Counter> {
    Netns::current().and_then(|netns| counters::read(&netns)).unwrap_or_default()
}

fn risen(before: &[Counter], now: Vec<Counter>) -> Vec<Counter> {
    let was =
        |name: &str| before.iter().find(|counter| counter.name == name).map_or(0, |counter| counter.value);
    now.into_iter()
        .filter(|counter| counter.group == Group::Fallback)
        .map(|counter| Counter { value: counter.value.saturating_sub(was(&counter.name)), ..counter })
        .filter(|counter| counter.value > 0)
        .collect()
}

fn write(to: &ReportTo, text: &[u8]) -> io::Result<()> {
    let mut file = &*to.file;
    if to.anew && file.metadata()?.is_file() {
        file.set_len(0)?;
        file.rewind()?;
    }
    file.write_all(text)
}
