//! Which connections a command is about.

use std::net::IpAddr;

use mptcp::Token;
use mptcp::diag::Connection;

use crate::cmd::Place;

#[derive(Debug, clap::Args)]
pub struct Selection {
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
}

impl Selection {
    /// Has anything been chosen? A process is chosen by the place.
    pub fn is_given(&self, place: &Place) -> bool {
        let Selection { program, token, peer, port } = self;
        place.pid.is_some() || program.is_some() || token.is_some() || peer.is_some() || port.is_some()
    }

    pub fn wants(&self, place: &Place, connection: &Connection) -> bool {
        let owners = &connection.owners;
        let remotes = || connection.subflows.iter().map(|s| s.remote).chain([connection.remote]);
        place.pid.is_none_or(|pid| owners.iter().any(|owner| owner.pid == pid))
            && self.program.as_ref().is_none_or(|name| owners.iter().any(|owner| owner.program == *name))
            && self.token.is_none_or(|token| connection.token == token)
            && self.peer.is_none_or(|ip| remotes().any(|r| r.ip().to_canonical() == ip.to_canonical()))
            && self
                .port
                .is_none_or(|port| [connection.local.port(), connection.remote.port()].contains(&port))
    }
}
