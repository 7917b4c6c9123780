//! Path policies: which subflows a connection should have, and what to do to get there.
//!
//! Pure: the time is an argument, nothing is asked and nothing is done here. [`Policy::on_event`] takes what was
//! seen and returns what to do; the daemon does it. An [`Event::Connections`] is the whole state as the kernel has
//! it, so that nothing depends on what was seen before: at the start, after lost events and after a restart the
//! next look puts everything right.
//!
//! Whatever happens, a policy
//! - closes no subflow and changes no flag that would leave a connection without a subflow that works,
//! - has no more subflows open, or being opened, than [`config::Rule::max_subflows`],
//! - and comes to rest: once nothing changes any more, it asks for nothing any more, and each connection's
//!   subflows and flags are what the policy says.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mptcp::{AddrId, Token};

mod asks;
pub mod config;
mod connection;
mod health;
#[cfg(test)]
mod tests;
mod wanted;

use asks::Asks;
use config::{Config, Identity};
use connection::Connection;

/// Time since any fixed moment, from a clock that does not go back.
pub type Time = Duration;

/// A local address that can be used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Local {
    /// The address.
    pub ip: IpAddr,
    /// Length of its network's prefix.
    pub prefix: u8,
    /// Index of its interface.
    pub ifindex: u32,
    /// Name of its interface.
    pub interface: String,
}

/// A connection as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its name.
    pub token: Token,
    /// Did this host open it? Only then it can open subflows: the peer is often behind a NAT.
    pub ours: bool,
    /// Its first local address. Of the socket's family: IPv4 addresses may be mapped to IPv6.
    pub local: SocketAddr,
    /// The peer's first address.
    pub remote: SocketAddr,
    /// Whose it is.
    pub identity: Identity,
    /// Its subflows.
    pub subflows: Vec<Subflow>,
}

/// A subflow as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subflow {
    /// The local end.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
    /// Id of the local address.
    pub local_id: AddrId,
    /// Id of the peer's address.
    pub remote_id: AddrId,
    /// How far it has come.
    pub state: State,
    /// We opened it.
    pub ours: bool,
    /// We asked the peer to use it as a backup.
    pub backup: bool,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Bytes that the peer has acknowledged.
    pub acked: u64,
    /// Time since something acknowledged came in.
    pub last_ack: Duration,
    /// Bytes received.
    pub received: u64,
    /// Segments sent and not acknowledged.
    pub in_flight: u32,
    /// Timeouts since the last acknowledgement.
    pub timeouts: u8,
}

/// How far a subflow has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its handshake goes on.
    Opening,
    /// It can carry data.
    Open,
    /// It is on its way out.
    Closing,
}

/// Something was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The local addresses that can be used now, all of them.
    Addresses(Vec<Local>),
    /// The connections there are now, all of them.
    Connections(Vec<Seen>),
    /// The peer of a connection announced an address.
    Announced {
        /// The connection.
        token: Token,
        /// The address's id.
        id: AddrId,
        /// The address.
        ip: IpAddr,
        /// Its port, if other than the connection's.
        port: Option<u16>,
    },
    /// The peer of a connection withdrew an address.
    Removed {
        /// The connection.
        token: Token,
        /// The address's id.
        id: AddrId,
    },
    /// Something came back on the path that was asked for with [`Action::Ask`].
    Answered {
        /// From this address
        local: IpAddr,
        /// to this one.
        remote: SocketAddr,
    },
    /// The kernel refused this.
    Refused(Action),
    /// Other things are wanted from now on.
    Configured(Config),
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Open a subflow.
    Create {
        /// Of this connection.
        token: Token,
        /// From this address,
        local: IpAddr,
        /// which has this id,
        id: AddrId,
        /// by this interface.
        ifindex: u32,
        /// To this address.
        remote: SocketAddr,
        /// As a backup.
        backup: bool,
    },
    /// Close a subflow.
    Destroy {
        /// Of this connection.
        token: Token,
        /// Its local end.
        local: SocketAddr,
        /// The peer's end.
        remote: SocketAddr,
    },
    /// Tell the peer that an address is gone: it closes the subflows to it, as far as it can.
    Withdraw {
        /// On this connection.
        token: Token,
        /// The address's id.
        id: AddrId,
    },
    /// Make a subflow a backup, or active.
    SetBackup {
        /// Of this connection.
        token: Token,
        /// Its local end.
        local: SocketAddr,
        /// The peer's end.
        remote: SocketAddr,
        /// A backup?
        backup: bool,
    },
    /// Find out whether anything comes through between two addresses, in a way that no connection notices.
    Ask {
        /// From this address,
        local: IpAddr,
        /// by this interface.
        ifindex: u32,
        /// To this address.
        remote: SocketAddr,
    },
    /// Announce an address to the peer.
    Announce {
        /// On this connection.
        token: Token,
        /// The address.
        ip: IpAddr,
        /// The id that it gets.
        id: AddrId,
    },
}

impl Action {
    /// The connection that it is about, if it is about one.
    pub fn token(&self) -> Option<Token> {
        match *self {
            Action::Create { token, .. }
            | Action::Destroy { token, .. }
            | Action::Withdraw { token, .. }
            | Action::SetBackup { token, .. }
            | Action::Announce { token, .. } => Some(token),
            Action::Ask { .. } => None,
        }
    }
}

/// What is wanted, and what is known.
#[derive(Debug, Default)]
pub struct Policy {
    config: Config,
    addresses: Vec<Local>,
    connections: BTreeMap<Token, Connection>,
    /// Announcements may be told before their connection is seen.
    early: Vec<(Time, Token, AddrId, SocketAddr)>,
    asks: Asks,
}

impl Policy {
    /// Nothing is known yet.
    pub fn new(config: Config) -> Self {
        Policy { config, ..Policy::default() }
    }

    /// Takes in what was seen, and says what to do now. That is something after a fresh look at the connections only,
    /// since what is known from before may have changed: after any other event, look.
    pub fn on_event(&mut self, now: Time, event: Event) -> Vec<Action> {
        let fresh = matches!(event, Event::Connections(_));
        match event {
            Event::Addresses(addresses) => {
                let known: BTreeSet<Local> = std::mem::take(&mut self.addresses).into_iter().collect();
                self.addresses = addresses;
                for local in self.addresses.iter().filter(|local| !known.contains(local)) {
                    self.connections.values_mut().for_each(|connection| connection.appeared(now, local.ip));
                }
            }
            Event::Configured(config) => self.config = config,
            Event::Connections(seen) => self.see(now, seen),
            // Port 0 stands for the connection's own.
            Event::Announced { token, id, ip, port } => {
                let remote = SocketAddr::new(ip, port.unwrap_or(0));
                match self.connections.get_mut(&token) {
                    Some(connection) => connection.announced(id, remote),
                    None => self.early.push((now, token, id, remote)),
                }
            }
            Event::Removed { token, id } => {
                if let Some(connection) = self.connections.get_mut(&token) {
                    connection.remotes.remove(&id);
                }
                self.early.retain(|(_, of, early, _)| (*of, *early) != (token, id));
            }
            Event::Answered { local, remote } => self.asks.answered(now, local, remote),
            // It cannot be asked: attempts show.
            Event::Refused(Action::Ask { local, remote, .. }) => self.asks.answered(now, local, remote),
            Event::Refused(action) => {
                if let Some(connection) = action.token().and_then(|token| self.connections.get_mut(&token)) {
                    connection.refused(now, &action);
                }
            }
        }
        if !fresh {
            return Vec::new();
        }
        let usable: Vec<Local> =
            self.addresses.iter().filter(|local| self.config.uses(&local.interface)).cloned().collect();
        let mut actions = Vec::new();
        for connection in self.connections.values_mut() {
            connection.steer(now, &self.config, &usable, &mut self.asks, &mut actions);
        }
        self.asks.tidy(now);
        actions
    }

    /// How long the next look at the connections can wait, if no event comes before. The last one took `took`; where
    /// there are many connections, most of the time is left to others.
    pub fn pause(&self, now: Time, took: Duration) -> Duration {
        let any = |is: &dyn Fn(&Connection) -> bool| self.connections.values().any(is);
        if any(&|connection| connection.is_in_doubt(now, &self.config)) {
            DOUBTFUL.max(took)
        } else if any(&Connection::is_busy) {
            BUSY.max(took * 4)
        } else if any(&Connection::lacks) {
            LACKING
        } else {
            IDLE
        }
    }

    /// The connections that are known.
    pub fn connections(&self) -> impl Iterator<Item = &Seen> {
        self.connections.values().map(|connection| &connection.seen)
    }

    /// What is wanted.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn see(&mut self, now: Time, seen: Vec<Seen>) {
        let remotes: BTreeMap<Token, SocketAddr> =
            seen.iter().map(|seen| (seen.token, seen.remote)).collect();
        // A token may be given to another connection later.
        self.connections.retain(|token, connection| {
            remotes.get(token).is_some_and(|remote| *remote == connection.seen.remote)
        });
        for seen in seen {
            match self.connections.get_mut(&seen.token) {
                Some(connection) => connection.look(now, seen),
                None => {
                    let token = seen.token;
                    self.connections.insert(token, Connection::new(now, seen));
                }
            }
        }
        for (at, token, id, remote) in std::mem::take(&mut self.early) {
            match self.connections.get_mut(&token) {
                Some(connection) => connection.announced(id, remote),
                None if now.saturating_sub(at) < EARLY => self.early.push((at, token, id, remote)),
                None => {}
            }
        }
    }
}

/// Between two looks while nothing moves.
const IDLE: Duration = Duration::from_secs(1);
/// The same while something may go wrong, or right, that no event tells of.
const BUSY: Duration = Duration::from_millis(20);
/// The same while something is wanted that is not there; attempts are half a second apart and more.
const LACKING: Duration = Duration::from_millis(200);
/// The same while it is about to show that a path is dead. What is sent meanwhile, the kernel will send twice.
const DOUBTFUL: Duration = Duration::from_millis(5);
/// How long an announcement waits for its connection.
const EARLY: Duration = Duration::from_secs(10);
