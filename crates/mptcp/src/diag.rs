//! Every MPTCP connection of a network namespace, with its owner and its subflows (`NETLINK_SOCK_DIAG`).

use std::net::SocketAddr;

use serde::Serialize;

use crate::info::Info;
use crate::{AddrId, Netns, Result, Token};

/// A process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// Process id.
    pub pid: u32,
    /// The program's name (`/proc/PID/comm`).
    pub program: String,
}

/// One MPTCP connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct Connection {
    pub token: Token,
    /// `ESTAB`, `FIN-WAIT-1`, …, as ss(8) writes them.
    pub state: String,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub inode: u32,
    pub uid: u32,
    /// Holders of the socket that the caller may see.
    pub owners: Vec<Owner>,
    pub info: Info,
    pub subflows: Vec<Subflow>,
}

/// One subflow of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct Subflow {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub local_id: AddrId,
    pub remote_id: AddrId,
    pub state: String,
    /// Our side asked the peer to use this subflow as a backup.
    pub backup_by_us: bool,
    /// The peer asked us to use this subflow as a backup.
    pub backup_by_peer: bool,
    pub ifindex: u32,
    /// Smoothed round-trip time in microseconds.
    pub rtt_us: u32,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub bytes_acked: u64,
    pub retransmits: u32,
    /// Congestion window in segments.
    pub cwnd: u32,
}

/// The connections of `netns`. Needs no privilege; owners of other users' sockets stay unseen without CAP_SYS_PTRACE.
pub async fn connections(_netns: &Netns) -> Result<Vec<Connection>> {
    unimplemented!()
}
