//! What the kernel says about one connection of this process: MPTCP or fallen back, counters, subflows.
//!
//! Layouts are those of `include/uapi/linux/mptcp.h`; the kernel appends fields, so each is read by offset
//! and is zero where an older kernel does not have it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_bindings::inet_diag;
use netlink_bindings::utils::parse_sockaddr;
use serde::Serialize;
use socket2::SockRef;

use crate::features::KernelFeatures;
use crate::{Error, Result, Token, sys};

pub(crate) const SOL_MPTCP: i32 = 284;
pub(crate) const MPTCP_INFO: i32 = 1;
const MPTCP_TCPINFO: i32 = 2;
const MPTCP_SUBFLOW_ADDRS: i32 = 3;
pub(crate) const MPTCP_FULL_INFO: i32 = 4;
/// Where the byte counters of `struct mptcp_info` end.
pub(crate) const COUNTERS_END: usize = 80;

/// What a connection turned out to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "protocol", rename_all = "lowercase")]
pub enum Status {
    /// MPTCP is in use.
    Mptcp(Info),
    /// An MPTCP socket whose connection fell back to TCP: the peer or a middlebox does not speak MPTCP.
    Fallback(Info),
    /// A plain TCP socket; so is one that an MPTCP listener accepted from a TCP client.
    Tcp,
}

impl Status {
    /// Is MPTCP in use?
    pub fn is_mptcp(&self) -> bool {
        matches!(self, Status::Mptcp(_))
    }
}

/// `struct mptcp_info`, also found in diag answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
#[allow(missing_docs)] // the names are the kernel's, explained where they are not plain
pub struct Info {
    /// Subflows beside the first one.
    pub subflows: u8,
    pub add_addr_signal: u8,
    pub add_addr_accepted: u8,
    pub subflows_max: u8,
    pub add_addr_signal_max: u8,
    pub add_addr_accepted_max: u8,
    /// `MPTCP_INFO_FLAG_*`: bit 0 fallen back, bit 1 the peer's key is known.
    pub flags: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
    pub write_seq: u64,
    pub snd_una: u64,
    pub rcv_nxt: u64,
    pub local_addr_used: u8,
    pub local_addr_max: u8,
    pub csum_enabled: bool,
    /// MPTCP-level retransmissions.
    pub retransmits: u32,
    pub bytes_retrans: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub bytes_acked: u64,
    /// All subflows, the first one included (Linux 6.8 and newer, else 0).
    pub subflows_total: u8,
    /// Endpoints with the laminar flag (Linux 6.18 and newer).
    pub endp_laminar_max: u8,
    /// Endpoints with the fullmesh flag (kernels after 6.18).
    pub endp_fullmesh_max: u8,
    /// Milliseconds since data was last sent (Linux 6.10 and newer).
    pub last_data_sent: u32,
    /// Milliseconds since data last came.
    pub last_data_recv: u32,
    /// Milliseconds since an ACK last came.
    pub last_ack_recv: u32,
}

/// What TCP says about one subflow: the part of `struct tcp_info` that tells paths apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
#[allow(missing_docs)]
pub struct TcpInfo {
    /// Smoothed round-trip time in microseconds.
    pub rtt_us: u32,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub bytes_acked: u64,
    /// Segments sent again, in the subflow's life.
    pub retransmits: u32,
    /// Congestion window in segments.
    pub cwnd: u32,
    /// Segments sent and not acknowledged.
    #[serde(skip)]
    pub unacked: u32,
    /// Timeouts since the last acknowledgement.
    #[serde(skip)]
    pub timeouts: u8,
    /// Milliseconds since the last segment that acknowledged something came in.
    #[serde(skip)]
    pub last_ack_recv_ms: u32,
}

impl TcpInfo {
    /// Reads as much of `struct tcp_info` as `bytes` holds.
    pub fn parse(bytes: &[u8]) -> Self {
        let tcp = inet_diag::TcpInfo::new_from_zeroed(bytes);
        TcpInfo {
            rtt_us: tcp.rtt,
            bytes_sent: tcp.bytes_sent,
            bytes_received: tcp.bytes_received,
            bytes_acked: tcp.bytes_acked,
            retransmits: tcp.total_retrans,
            cwnd: tcp.snd_cwnd,
            unacked: tcp.unacked,
            timeouts: tcp.retransmits,
            last_ack_recv_ms: tcp.last_ack_recv,
        }
    }
}

const FLAG_FALLBACK: u32 = 1;
const FLAG_REMOTE_KEY_RECEIVED: u32 = 1 << 1;

impl Info {
    /// Reads as much of `struct mptcp_info` as `bytes` holds.
    pub fn parse(bytes: &[u8]) -> Self {
        let u8_at = |at: usize| bytes.get(at).copied().unwrap_or(0);
        let u32_at = |at: usize| read(bytes, at).map_or(0, u32::from_ne_bytes);
        let u64_at = |at: usize| read(bytes, at).map_or(0, u64::from_ne_bytes);
        Info {
            subflows: u8_at(0),
            add_addr_signal: u8_at(1),
            add_addr_accepted: u8_at(2),
            subflows_max: u8_at(3),
            add_addr_signal_max: u8_at(4),
            add_addr_accepted_max: u8_at(5),
            flags: u32_at(8),
            token: read(bytes, 12).map(u32::from_ne_bytes).map(Token),
            write_seq: u64_at(16),
            snd_una: u64_at(24),
            rcv_nxt: u64_at(32),
            local_addr_used: u8_at(40),
            local_addr_max: u8_at(41),
            csum_enabled: u8_at(42) != 0,
            retransmits: u32_at(44),
            bytes_retrans: u64_at(48),
            bytes_sent: u64_at(56),
            bytes_received: u64_at(64),
            bytes_acked: u64_at(72),
            subflows_total: u8_at(80),
            endp_laminar_max: u8_at(81),
            endp_fullmesh_max: u8_at(82),
            last_data_sent: u32_at(84),
            last_data_recv: u32_at(88),
            last_ack_recv: u32_at(92),
        }
    }

    /// Was there a connection? A socket that is new or listens has no peer's key.
    pub fn has_peer(&self) -> bool {
        self.flags & FLAG_REMOTE_KEY_RECEIVED != 0
    }

    /// Did the connection fall back to TCP?
    pub fn is_fallback(&self) -> bool {
        self.flags & FLAG_FALLBACK != 0
    }
}

/// Asks the kernel about the connection `socket` (`MPTCP_INFO`, Linux 5.16 and newer).
///
/// A kernel that answers for a fallen-back socket as for a TCP one leaves [`Status::Fallback`] with an empty
/// [`Info`]. Kernels before 5.16 tell MPTCP sockets from TCP ones, but not those that fell back, and [`Info`] is
/// empty.
pub fn of(socket: &impl AsFd) -> Result<Status> {
    let mut buffer = [0; 256];
    match sys::getsockopt(socket, SOL_MPTCP, MPTCP_INFO, &mut buffer) {
        Ok(length) => {
            let info = Info::parse(&buffer[..length.min(buffer.len())]);
            Ok(if info.is_fallback() { Status::Fallback(info) } else { Status::Mptcp(info) })
        }
        Err(error) if is_absent(&error) => without_info(socket),
        Err(error) => Err(Error::io("read MPTCP_INFO", error)),
    }
}

fn without_info(socket: &impl AsFd) -> Result<Status> {
    let protocol = SockRef::from(socket).protocol().map_err(|e| Error::io("read SO_PROTOCOL", e))?;
    Ok(match protocol {
        // Options of a fallen-back socket go to its TCP subflow (mptcp_getsockopt()), which has no MPTCP_INFO.
        Some(socket2::Protocol::MPTCP) if KernelFeatures::get().mptcp_info => {
            Status::Fallback(Info::default())
        }
        Some(socket2::Protocol::MPTCP) => Status::Mptcp(Info::default()),
        // So it is with a socket that an MPTCP listener accepted from a TCP client.
        _ => Status::Tcp,
    })
}

/// One subflow of a connection of this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
#[allow(missing_docs)]
pub struct Subflow {
    /// Counts the subflows of the connection in the order they came, from 1; not an address id, which only
    /// [`crate::diag`] tells (`MPTCP_FULL_INFO`, Linux 6.5 and newer).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u32>,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    #[serde(flatten)]
    pub tcp: TcpInfo,
}

/// The subflows of the connection `socket`, in the kernel's order. A TCP connection and one that fell back has
/// one.
///
/// Takes `MPTCP_FULL_INFO` (Linux 6.5 and newer), else `MPTCP_SUBFLOW_ADDRS` and `MPTCP_TCPINFO` (5.16 and newer);
/// on older kernels it is the first subflow alone, as `getsockname(2)`, `getpeername(2)` and `TCP_INFO` tell it.
pub fn subflows(socket: &impl AsFd) -> Result<Vec<Subflow>> {
    for source in [full_info, subflow_addrs] {
        match source(socket.as_fd()) {
            Err(error) if is_absent(&error) => {}
            result => return result.map_err(|e| Error::io("read the subflows of a connection", e)),
        }
    }
    first_subflow(socket.as_fd()).map_err(|e| Error::io("read the addresses of a connection", e))
}

/// Length of `struct mptcp_subflow_addrs`: two `sockaddr_storage`.
const ADDRS: usize = 2 * size_of::<libc::sockaddr_storage>();
/// Where the addresses begin in `struct mptcp_subflow_info`, behind the number.
const INFO_ADDRS: usize = align_of::<libc::sockaddr_storage>();
/// As much of `struct tcp_info` as [`TcpInfo`] reads.
const TCP_INFO: usize = inet_diag::TcpInfo::len();
/// The kernel allows eight subflows beside the first; more room is made where there are more after all.
const ROOM: usize = 9;

pub(crate) fn full_info(socket: BorrowedFd<'_>) -> io::Result<Vec<Subflow>> {
    let mut room = ROOM;
    loop {
        let (mut subflows, mut tcps) = (vec![0; room * (INFO_ADDRS + ADDRS)], vec![0; room * TCP_INFO]);
        let sizes = sys::full_info(socket, &mut subflows, INFO_ADDRS + ADDRS, &mut tcps, TCP_INFO)?;
        if sizes.subflows > room {
            room = sizes.subflows;
            continue;
        }
        let both = subflows.chunks(sizes.subflow_size.max(1)).zip(tcps.chunks(sizes.tcp_size.max(1)));
        let subflows = both.take(sizes.subflows).filter_map(|(info, tcp)| {
            let (local, remote) = addresses(info.get(INFO_ADDRS..)?)?;
            let number = read(info, 0).map(u32::from_ne_bytes);
            Some(Subflow { number, local, remote, tcp: TcpInfo::parse(tcp) })
        });
        return Ok(subflows.collect());
    }
}

fn subflow_addrs(socket: BorrowedFd<'_>) -> io::Result<Vec<Subflow>> {
    let addrs = per_subflow(socket, MPTCP_SUBFLOW_ADDRS, ADDRS)?;
    let mut tcps = per_subflow(socket, MPTCP_TCPINFO, TCP_INFO)?;
    if tcps.len() != addrs.len() {
        // A subflow came or went between the calls: which detail belongs to which is not known.
        tcps = vec![Vec::new(); addrs.len()];
    }
    let subflows = addrs.iter().zip(tcps).filter_map(|(addrs, tcp)| {
        let (local, remote) = addresses(addrs)?;
        Some(Subflow { number: None, local, remote, tcp: TcpInfo::parse(&tcp) })
    });
    Ok(subflows.collect())
}

/// The elements of an option that begins with `struct mptcp_subflow_data`.
fn per_subflow(socket: BorrowedFd<'_>, option: i32, size: usize) -> io::Result<Vec<Vec<u8>>> {
    const HEADER: usize = 16;
    let mut room = ROOM;
    loop {
        let mut buffer = vec![0; HEADER + room * size];
        buffer[..4].copy_from_slice(&(HEADER as u32).to_ne_bytes()); // size_subflow_data
        buffer[12..16].copy_from_slice(&(size as u32).to_ne_bytes()); // size_user
        sys::getsockopt(socket, SOL_MPTCP, option, &mut buffer)?;
        let count = read(&buffer, 4).map_or(0, u32::from_ne_bytes) as usize;
        let stride = read(&buffer, 12).map_or(0, u32::from_ne_bytes) as usize;
        if count <= room {
            return Ok(buffer[HEADER..].chunks(stride.max(1)).take(count).map(<[u8]>::to_vec).collect());
        }
        room = count;
    }
}

fn first_subflow(socket: BorrowedFd<'_>) -> io::Result<Vec<Subflow>> {
    let reference = SockRef::from(&socket);
    let ip = |address: socket2::SockAddr| address.as_socket().ok_or(io::ErrorKind::Unsupported);
    let (local, remote) = (ip(reference.local_addr()?)?, ip(reference.peer_addr()?)?);
    let mut tcp = [0; TCP_INFO];
    // Without an answer (MPTCP sockets before Linux 5.16) the details stay zero.
    let _ = sys::getsockopt(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut tcp);
    Ok(vec![Subflow { number: None, local, remote, tcp: TcpInfo::parse(&tcp) }])
}

/// The two addresses of a `struct mptcp_subflow_addrs`.
fn addresses(bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let (local, remote) = bytes.split_at_checked(size_of::<libc::sockaddr_storage>())?;
    Some((address(local)?, address(remote)?))
}

/// A `struct sockaddr_in` or `sockaddr_in6`.
fn address(bytes: &[u8]) -> Option<SocketAddr> {
    let length = match i32::from(u16::from_ne_bytes(read(bytes, 0)?)) {
        libc::AF_INET => size_of::<libc::sockaddr_in>(),
        libc::AF_INET6 => size_of::<libc::sockaddr_in6>(),
        _ => return None,
    };
    parse_sockaddr(bytes.get(..length)?)
}

/// Is this the answer of a kernel that lacks the option, or of a TCP socket?
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOPROTOOPT))
}

fn read<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N).and_then(|slice| slice.try_into().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The kernel's option and the ones that stand in for it tell the same about a connection at rest.
    #[tokio::test]
    async fn every_source_tells_the_same_subflow() {
        use crate::socket::{self, Options};
        let netns = crate::Netns::anonymous().unwrap();
        if !KernelFeatures::get().full_info {
            let line = b"lacking MPTCP_FULL_INFO: Linux 6.5 and newer\n";
            io::Write::write_all(&mut io::stderr(), line).unwrap();
            return;
        }
        let mut lo_up = std::process::Command::new("ip");
        netns.enter_on_exec(lo_up.args(["link", "set", "lo", "up"]));
        assert!(lo_up.status().unwrap().success());
        let options = Options { netns: Some(netns), ..Options::default() };
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let listener = socket::listen(host.parse().unwrap(), &options).unwrap();
            let client = socket::connect(listener.local_addr().unwrap(), &options).await.unwrap();
            let full = full_info(client.as_fd()).unwrap();
            assert_eq!(full.len(), 1);
            assert_eq!(full[0].local, client.local_addr().unwrap());
            assert_eq!(full[0].remote, client.peer_addr().unwrap());
            assert!(full[0].tcp.cwnd > 0 && full[0].tcp.rtt_us > 0, "{full:?}");
            let full: Vec<_> = full.into_iter().map(|s| Subflow { number: None, ..s }).collect();
            assert_eq!(subflow_addrs(client.as_fd()).unwrap(), full);
            assert_eq!(first_subflow(client.as_fd()).unwrap(), full);
        }
    }

    #[test]
    fn fields_are_read_where_the_kernels_header_has_them() {
        let bytes: Vec<u8> = (0..96).collect();
        let info = Info::parse(&bytes);
        assert_eq!((info.subflows, info.add_addr_accepted_max), (0, 5));
        assert_eq!(info.token, Some(Token(u32::from_ne_bytes([12, 13, 14, 15]))));
        assert_eq!(info.write_seq, u64::from_ne_bytes([16, 17, 18, 19, 20, 21, 22, 23]));
        assert_eq!(info.retransmits, u32::from_ne_bytes([44, 45, 46, 47]));
        assert_eq!(info.bytes_acked, u64::from_ne_bytes([72, 73, 74, 75, 76, 77, 78, 79]));
        assert_eq!((info.subflows_total, info.endp_laminar_max, info.endp_fullmesh_max), (80, 81, 82));
        assert_eq!(info.last_ack_recv, u32::from_ne_bytes([92, 93, 94, 95]));
        assert_eq!(Info::parse(&bytes[..43]).retransmits, 0);
        assert_eq!(Info::parse(&bytes[..14]).token, None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoders_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Info::parse(&bytes);
            let _ = TcpInfo::parse(&bytes);
            let _ = addresses(&bytes);
        }
    }
}
