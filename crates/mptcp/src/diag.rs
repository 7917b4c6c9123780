//! Every MPTCP connection of a network namespace, with its owner and its subflows (`NETLINK_SOCK_DIAG`).

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use netlink_bindings::inet_diag::{Msg, ReqV2, Request, TcpState};
use netlink_bindings::mptcp_pm::SubflowAttribute;
use netlink_bindings::traits::NetlinkRequest;
use netlink_bindings::utils::find_attr;
use nix::sys::socket::SockProtocol;
use serde::{Serialize, Serializer};

use crate::info::{Info, TcpInfo};
use crate::netlink::{NLM_F_DUMP, Socket};
use crate::{AddrId, Error, Netns, Result, Token};

/// A process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// Process id.
    pub pid: u32,
    /// The program's name (`/proc/PID/comm`).
    pub program: String,
}

/// One MPTCP connection.
///
/// Addresses are the kernel's: of an IPv6 socket with an IPv4 peer they are IPv4-mapped (`::ffff:10.0.0.1`).
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

impl Connection {
    /// Does somebody hold the socket whom the caller may not see? A socket that its program has closed, or not yet
    /// accepted, has no holder and no inode.
    pub fn owners_hidden(&self) -> bool {
        self.inode != 0 && self.owners.is_empty()
    }
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
    pub flags: SubflowFlags,
    /// Index of the interface that the subflow is bound to; 0: not bound, routing decides.
    pub ifindex: u32,
    #[serde(flatten)]
    pub tcp: TcpInfo,
    /// Congestion control (`INET_DIAG_CONG`); empty where the kernel did not say.
    pub congestion_control: String,
}

bitflags::bitflags! {
    /// What the kernel knows of a subflow (`MPTCP_SUBFLOW_FLAG_*`). It does not tell whether it holds the subflow
    /// for stale.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SubflowFlags: u32 {
        /// Opened with MP_CAPABLE: the connection's first subflow.
        const CAPABLE_REMOTE = 1 << 0;
        /// We opened it, and asked for MP_CAPABLE.
        const CAPABLE_LOCAL = 1 << 1;
        /// Joined with MP_JOIN: a further subflow.
        const JOIN_REMOTE = 1 << 2;
        /// We opened it, and asked for MP_JOIN.
        const JOIN_LOCAL = 1 << 3;
        /// The peer asked us to use the subflow as a backup.
        const BACKUP_REMOTE = 1 << 4;
        /// We asked the peer to use the subflow as a backup.
        const BACKUP_LOCAL = 1 << 5;
        /// MPTCP is agreed on for good (RFC 8684 section 3.1).
        const FULLY_ESTABLISHED = 1 << 6;
        /// The subflow's handshake is complete.
        const CONNECTED = 1 << 7;
        /// A mapping of the peer's data is in use (DSS).
        const MAP_VALID = 1 << 8;
    }
}

/// As ss(8) writes them: `MmJjBbecv`, each letter where its flag is set.
impl fmt::Display for SubflowFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set: String = LETTERS.iter().filter(|(flag, _)| self.contains(*flag)).map(|(_, l)| l).collect();
        f.pad(&set)
    }
}

/// The letters of [`SubflowFlags`], as `Display` writes them.
impl Serialize for SubflowFlags {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

const LETTERS: [(SubflowFlags, char); 9] = [
    (SubflowFlags::CAPABLE_REMOTE, 'M'),
    (SubflowFlags::CAPABLE_LOCAL, 'm'),
    (SubflowFlags::JOIN_REMOTE, 'J'),
    (SubflowFlags::JOIN_LOCAL, 'j'),
    (SubflowFlags::BACKUP_REMOTE, 'B'),
    (SubflowFlags::BACKUP_LOCAL, 'b'),
    (SubflowFlags::FULLY_ESTABLISHED, 'e'),
    (SubflowFlags::CONNECTED, 'c'),
    (SubflowFlags::MAP_VALID, 'v'),
];

/// The connections of `netns`, listeners left out. Needs no privilege, but without it some things stay unseen:
/// owners of other users' sockets (CAP_SYS_PTRACE), and before Linux 6.15 subflows (CAP_NET_ADMIN).
///
/// The kernel lists connections and subflows one after the other, so that what changes meanwhile may be missing.
/// [`Error::Unsupported`] where the kernel has no `mptcp_diag`.
pub async fn connections(netns: &Netns) -> Result<Vec<Connection>> {
    let netns = netns.clone();
    blocking(move || {
        let mut connections = read(&netns)?;
        let mut owners = owners(&connections.iter().map(|c| c.inode).collect());
        for connection in &mut connections {
            connection.owners = owners.remove(&connection.inode).unwrap_or_default();
        }
        Ok(connections)
    })
    .await
}

/// The same without owners, for whoever looks often: to find those, all of `/proc` is read.
pub async fn connections_without_owners(netns: &Netns) -> Result<Vec<Connection>> {
    let netns = netns.clone();
    blocking(move || read(&netns)).await
}

/// Both ends, local and remote, of each TCP connection of `netns` that is no subflow. Needs no privilege.
pub async fn plain_connections(netns: &Netns) -> Result<Vec<(SocketAddr, SocketAddr)>> {
    let netns = netns.clone();
    blocking(move || {
        let what = format!("list the TCP connections of network namespace {}", netns.name());
        let socket = Socket::open(&netns, SockProtocol::NetlinkSockDiag)?;
        let mut plain = Vec::new();
        for message in dump(&socket, &what, libc::IPPROTO_TCP as u32)? {
            if parse_subflow(&message).ok_or_else(|| malformed(&what))?.is_none() {
                let (socket, _) = split(&message).ok_or_else(|| malformed(&what))?;
                plain.push(addresses(&socket));
            }
        }
        Ok(plain)
    })
    .await
}

async fn blocking<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> T {
    let read = tokio::task::spawn_blocking(read);
    read.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

const IPPROTO_MPTCP: u32 = 262;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_CONG: u16 = 4;
const INET_DIAG_ULP_INFO: u16 = 19;
const INET_ULP_INFO_MPTCP: u16 = 3;

fn read(netns: &Netns) -> Result<Vec<Connection>> {
    let what = format!("list the MPTCP connections of network namespace {}", netns.name());
    let socket = Socket::open(netns, SockProtocol::NetlinkSockDiag)?;
    let mut connections = Vec::new();
    for message in dump(&socket, &what, IPPROTO_MPTCP)? {
        connections.push(parse_connection(&message).ok_or_else(|| malformed(&what))?);
    }
    if connections.is_empty() {
        return Ok(connections);
    }
    let mut subflows: HashMap<Token, Vec<Subflow>> = HashMap::new();
    for message in dump(&socket, &what, libc::IPPROTO_TCP as u32)? {
        if let Some((token, subflow)) = parse_subflow(&message).ok_or_else(|| malformed(&what))? {
            subflows.entry(token).or_default().push(subflow);
        }
    }
    for connection in &mut connections {
        connection.subflows = subflows.remove(&connection.token).unwrap_or_default();
    }
    Ok(connections)
}

fn malformed(what: &str) -> Error {
    Error::Malformed { what: what.into(), detail: "a socket's description is cut short".into() }
}

/// The sockets of `protocol` that have a peer, IPv4 and IPv6.
fn dump(socket: &Socket, what: &str, protocol: u32) -> Result<Vec<Vec<u8>>> {
    let states =
        !(1 << TcpState::Listen as u32 | 1 << TcpState::TimeWait as u32 | 1 << TcpState::NewSynRecv as u32);
    let mut sockets = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // IPPROTO_MPTCP does not fit in the header. Kernels that don't know the attribute refuse protocol 0.
        let protocol_byte = u8::try_from(protocol).unwrap_or(0);
        let ext = 1 << (INET_DIAG_INFO - 1) | 1 << (INET_DIAG_CONG - 1);
        let header = ReqV2 { family: family as u8, protocol: protocol_byte, ext, states, ..ReqV2::new() };
        let mut request = Request::new().op_tcp_diag_dump(&header);
        if protocol_byte == 0 {
            request.encode().push_protocol(protocol);
        }
        match socket.request(what, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, request.payload()) {
            Ok(found) => sockets.extend(found),
            // No handler for the protocol (inet_diag_lock_handler()) or for the family.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                if family == libc::AF_INET {
                    return Err(Error::Unsupported {
                        what: what.into(),
                        feature: "socket diagnostics for MPTCP (CONFIG_INET_MPTCP_DIAG)",
                        since: "5.9",
                    });
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

fn parse_connection(message: &[u8]) -> Option<Connection> {
    let (socket, attributes) = split(message)?;
    let (local, remote) = addresses(&socket);
    let info = Info::parse(find_attr(attributes, INET_DIAG_INFO).unwrap_or_default());
    Some(Connection {
        token: info.token.unwrap_or_default(),
        state: state_name(socket.state).into(),
        local,
        remote,
        inode: socket.inode,
        uid: socket.uid,
        owners: Vec::new(),
        info,
        subflows: Vec::new(),
    })
}

/// A subflow and the token of its connection; `Some(None)` is a TCP socket that is not a subflow.
fn parse_subflow(message: &[u8]) -> Option<Option<(Token, Subflow)>> {
    let (socket, attributes) = split(message)?;
    let ulp = find_attr(attributes, INET_DIAG_ULP_INFO).and_then(|ulp| find_attr(ulp, INET_ULP_INFO_MPTCP));
    let Some(ulp) = ulp.map(SubflowAttribute::new) else { return Some(None) };
    let Ok(token) = ulp.get_token_loc() else { return Some(None) };
    let congestion_control = find_attr(attributes, INET_DIAG_CONG).unwrap_or_default();
    let congestion_control = congestion_control.strip_suffix(b"\0").unwrap_or(congestion_control);
    let (local, remote) = addresses(&socket);
    let subflow = Subflow {
        local,
        remote,
        local_id: AddrId(ulp.get_id_loc().unwrap_or(0)),
        remote_id: AddrId(ulp.get_id_rem().unwrap_or(0)),
        state: state_name(socket.state).into(),
        flags: SubflowFlags::from_bits_retain(ulp.get_flags().unwrap_or(0)),
        ifindex: socket.sockid.r#if,
        tcp: TcpInfo::parse(find_attr(attributes, INET_DIAG_INFO).unwrap_or_default()),
        congestion_control: String::from_utf8_lossy(congestion_control).into_owned(),
    };
    Some(Some((Token(token), subflow)))
}

fn split(message: &[u8]) -> Option<(Msg, &[u8])> {
    let (header, attributes) = message.split_at_checked(Msg::len())?;
    Some((Msg::new_from_slice(header)?, attributes))
}

fn addresses(socket: &Msg) -> (SocketAddr, SocketAddr) {
    let ip = |bytes: [u8; 16]| match (i32::from(socket.family), bytes) {
        (libc::AF_INET, [a, b, c, d, ..]) => IpAddr::from([a, b, c, d]),
        _ => IpAddr::from(bytes),
    };
    let id = &socket.sockid;
    (SocketAddr::new(ip(id.src), id.sport()), SocketAddr::new(ip(id.dst), id.dport()))
}

fn state_name(state: u8) -> &'static str {
    const NAMES: [&str; 14] = [
        "UNKNOWN",
        "ESTAB",
        "SYN-SENT",
        "SYN-RECV",
        "FIN-WAIT-1",
        "FIN-WAIT-2",
        "TIME-WAIT",
        "UNCONN",
        "CLOSE-WAIT",
        "LAST-ACK",
        "LISTEN",
        "CLOSING",
        "NEW-SYN-RECV",
        "BOUND-INACTIVE",
    ];
    NAMES.get(usize::from(state)).unwrap_or(&NAMES[0])
}

/// Who holds the sockets `inodes`, as far as this process may look (`/proc/PID/fd`).
fn owners(inodes: &HashSet<u32>) -> HashMap<u32, Vec<Owner>> {
    let mut owners: HashMap<u32, Vec<Owner>> = HashMap::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end, or forbid looking, at any point here.
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        let held: HashSet<u32> = descriptors
            .flatten()
            .filter_map(|fd| socket_inode(&fs::read_link(fd.path()).ok()?))
            .filter(|inode| inodes.contains(inode))
            .collect();
        if held.is_empty() {
            continue;
        }
        let program =
            fs::read_to_string(process.path().join("comm")).unwrap_or_default().trim_end().to_string();
        for inode in held {
            owners.entry(inode).or_default().push(Owner { pid, program: program.clone() });
        }
    }
    owners
}

fn socket_inode(link: &Path) -> Option<u32> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_bindings::mptcp_pm::PushSubflowAttribute;
    use netlink_bindings::utils::{finalize_nested_header, push_nested_header};
    use proptest::prelude::*;

    #[test]
    fn a_subflow_is_read_with_its_connections_token() {
        let mut header = Msg { family: libc::AF_INET6 as u8, state: 1, ..Msg::new() };
        header.sockid.src = std::net::Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets();
        header.sockid.set_dport(80);
        let mut message = header.as_slice().to_vec();
        let ulp = push_nested_header(&mut message, INET_DIAG_ULP_INFO);
        let mptcp = push_nested_header(&mut message, INET_ULP_INFO_MPTCP);
        drop(
            PushSubflowAttribute::new(&mut message)
                .push_token_loc(77)
                .push_token_rem(78)
                .push_flags(1 << 4 | 1 << 3)
                .push_id_loc(3),
        );
        finalize_nested_header(&mut message, mptcp);
        finalize_nested_header(&mut message, ulp);
        let (token, subflow) = parse_subflow(&message).unwrap().unwrap();
        assert_eq!(token, Token(77));
        assert_eq!(subflow.local.to_string(), "[::ffff:10.0.0.1]:0");
        assert_eq!(
            (subflow.remote.port(), subflow.local_id, subflow.state.as_str()),
            (80, AddrId(3), "ESTAB")
        );
        assert_eq!(subflow.flags, SubflowFlags::BACKUP_REMOTE | SubflowFlags::JOIN_LOCAL);
        assert_eq!(subflow.flags.to_string(), "jB");
    }

    #[test]
    fn a_tcp_socket_is_no_subflow() {
        assert_eq!(parse_subflow(Msg::new().as_slice()), Some(None));
        assert_eq!(parse_subflow(&[0; 71]), None);
    }

    proptest! {
        #[test]
        fn no_message_makes_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse_connection(&bytes);
            let _ = parse_subflow(&bytes);
        }
    }
}
