//! The primary subflow of a live connection: which one it is, and how to make it another one.
//!
//! A subflow is primary or backup (RFC 8684 section 3.3.8, MP_PRIO): data goes over backups only when no primary
//! subflow works. [`plan`] says which flags a connection needs for its data to take a given way; [`switch`] sets
//! them, with the userspace path manager's command, and looks whether the data follow.

use std::fmt;
use std::net::SocketAddr;

use mptcp::diag::{Connection, Subflow, SubflowFlags};
use mptcp::socket::canonical;
use serde::Serialize;

mod drain;
mod switch;
mod via;

pub use drain::BOUND;
pub use switch::{Outcome, Report, Switch, switch, switch_until};
pub use via::Via;

/// What the subflows of a connection should become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Those that go this way are primary, all others backup.
    Via(Via),
    /// All are primary, as far as we decide it.
    Both,
}

/// The two ends of a subflow, ours first, as the kernel has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs)]
pub struct Path {
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

impl Path {
    /// The ends of `subflow`.
    pub fn of(subflow: &Subflow) -> Self {
        Path { local: subflow.local, remote: subflow.remote }
    }
}

/// IPv4-mapped addresses are written as IPv4.
impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}", canonical(self.local), canonical(self.remote))
    }
}

/// What has to be set for a connection to be as [`Wanted`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The subflows that will be primary.
    pub primary: Vec<Path>,
    /// Our backup flag of every subflow. Those that become primary come first, so that there always is one.
    pub flags: Vec<Flag>,
}

/// Our backup flag of one subflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flag {
    /// Of which subflow.
    pub path: Path,
    /// What it is.
    pub is: bool,
    /// What it should be.
    pub wanted: bool,
}

/// Why a connection is not steered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// There is nothing to choose from.
    #[error("it fell back to TCP, which has one path")]
    Fallback,
    /// The connection is in a state in which it carries no data.
    #[error("it is closing ({0})")]
    Closing(String),
    /// It ended before the switch was complete.
    #[error("it was closed meanwhile")]
    Closed,
    /// Only the userspace path manager sets the flags of a single connection.
    #[error("it has the in-kernel path manager (`braid endpoint change` moves all of its connections)")]
    InKernel,
    /// The peer's word counts as ours does (`mptcp_subflow_get_send()`), and is not ours to take back.
    #[error("the peer asked for backup on {}", list(.0))]
    PeerBackup(Vec<Path>),
    /// No subflow goes the way that was asked for.
    #[error("no subflow goes via {via}; it has {}", list(.has))]
    NoSuchPath {
        /// The way.
        via: String,
        /// The subflows that it has.
        has: Vec<Path>,
    },
    /// Data had to move, and none got through on the new primary subflow; flags are as they were before.
    #[error("no data got through on {} in {waited_ms} ms; put back", list(.paths))]
    NothingThrough {
        /// The subflows that were to be primary.
        paths: Vec<Path>,
        /// For how long.
        waited_ms: u128,
    },
    /// There was no time.
    #[error("interrupted before anything was set")]
    Interrupted,
    /// The kernel refused for a reason of its own.
    #[error("{0}")]
    Refused(String),
}

/// As its words.
impl Serialize for Reason {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// `paths` in one line; none is `none`.
pub fn list(paths: &[Path]) -> String {
    match paths {
        [] => "none".into(),
        paths => paths.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

/// Is data that we send or ask for taken to this subflow only when no other works?
pub fn is_backup(subflow: &Subflow) -> bool {
    subflow.flags.intersects(SubflowFlags::BACKUP_LOCAL | SubflowFlags::BACKUP_REMOTE)
}

/// Why no command can steer `connection`, as far as it can be seen. The path manager's kind cannot
/// ([`mptcp::pm::Client::is_userspace`]).
pub fn obstacle(connection: &Connection) -> Option<Reason> {
    // In all of these at least one direction may carry data for long.
    const CARRYING: [&str; 4] = ["ESTAB", "CLOSE-WAIT", "FIN-WAIT-1", "FIN-WAIT-2"];
    if connection.info.is_fallback() {
        return Some(Reason::Fallback);
    }
    (!CARRYING.contains(&connection.state.as_str())).then(|| Reason::Closing(connection.state.clone()))
}

/// What to set so that `connection` is as `wanted`.
pub fn plan(connection: &Connection, wanted: &Wanted) -> Result<Plan, Reason> {
    if let Some(reason) = obstacle(connection) {
        return Err(reason);
    }
    let usable: Vec<&Subflow> = connection.subflows.iter().filter(|s| s.state == "ESTAB").collect();
    let paths = |subflows: &[&Subflow]| subflows.iter().map(|s| Path::of(s)).collect::<Vec<_>>();
    let mut chosen = match wanted {
        Wanted::Both => usable.clone(),
        Wanted::Via(via) => via.choose(&usable),
    };
    if chosen.is_empty() {
        let via = match wanted {
            Wanted::Via(via) => via.to_string(),
            Wanted::Both => "anything".into(),
        };
        return Err(Reason::NoSuchPath { via, has: paths(&usable) });
    }
    let asked_for = paths(&chosen);
    chosen.retain(|subflow| !subflow.flags.contains(SubflowFlags::BACKUP_REMOTE));
    if chosen.is_empty() {
        return Err(Reason::PeerBackup(asked_for));
    }
    let primary = paths(&chosen);
    let flag = |subflow: &&Subflow| Flag {
        path: Path::of(subflow),
        is: subflow.flags.contains(SubflowFlags::BACKUP_LOCAL),
        wanted: *wanted != Wanted::Both && !primary.contains(&Path::of(subflow)),
    };
    let mut flags: Vec<_> = usable.iter().map(flag).collect();
    flags.sort_by_key(|flag| flag.wanted);
    Ok(Plan { primary, flags })
}

#[cfg(test)]
mod tests;
