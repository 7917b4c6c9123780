//! Endpoints: the local addresses that the in-kernel path manager may use or announce.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::AddrId;

bitflags::bitflags! {
    /// What an endpoint is for (`MPTCP_PM_ADDR_FLAG_*`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct EndpointFlags: u32 {
        /// Announce the address to the peer (ADD_ADDR).
        const SIGNAL = 1 << 0;
        /// Open subflows from the address.
        const SUBFLOW = 1 << 1;
        /// Subflows from and to the address are backups.
        const BACKUP = 1 << 2;
        /// Open subflows from the address to every address of the peer.
        const FULLMESH = 1 << 3;
        /// Made by the kernel for a subflow whose address had no endpoint; never set by hand.
        const IMPLICIT = 1 << 4;
        /// Use the address for subflows to addresses that the peer announced (Linux 6.18 and newer).
        const LAMINAR = 1 << 5;
    }
}

/// An address of one end of a subflow, with its id: what the commands of the userspace path manager take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The address. IPv4-mapped IPv6 addresses stay as they are: the kernel tells them apart.
    pub ip: IpAddr,
    /// Address id; `None` where the command does not need it.
    pub id: Option<AddrId>,
    /// Port; 0 means that of the connection.
    pub port: u16,
    /// Interface index to leave by; 0 means any.
    pub ifindex: u32,
}

impl Address {
    /// `addr` with the id `id`, by any interface.
    pub fn new(addr: SocketAddr, id: Option<AddrId>) -> Self {
        Address { ip: addr.ip(), id, port: addr.port(), ifindex: 0 }
    }
}

/// As errors name it: `10.0.0.2 id 2 port 80`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        name(f, self.ip, self.id, self.port)
    }
}

/// An endpoint, `MPTCP_PM_ENDPOINT_ADDR`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The local address.
    pub ip: IpAddr,
    /// Its id; `None` in a request lets the kernel choose, and is never `None` in an answer.
    pub id: Option<AddrId>,
    /// What it is for.
    pub flags: EndpointFlags,
    /// Port to announce; 0 means that of the connection.
    pub port: u16,
    /// Interface index to leave by; 0 means any.
    pub ifindex: u32,
}

impl Endpoint {
    /// An endpoint for `ip`, its id chosen by the kernel.
    pub fn new(ip: IpAddr, flags: EndpointFlags) -> Self {
        Endpoint { ip, id: None, flags, port: 0, ifindex: 0 }
    }
}

/// As errors name it: `10.0.0.2 id 2`.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        name(f, self.ip, self.id, self.port)
    }
}

fn name(f: &mut fmt::Formatter<'_>, ip: IpAddr, id: Option<AddrId>, port: u16) -> fmt::Result {
    write!(f, "{ip}")?;
    if let Some(id) = id {
        write!(f, " id {id}")?;
    }
    if port != 0 {
        write!(f, " port {port}")?;
    }
    Ok(())
}
