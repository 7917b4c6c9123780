//! What the kernel says about one connection of this process: MPTCP or fallen back, counters, subflows.
//!
//! Layouts are those of `include/uapi/linux/mptcp.h`; the kernel appends fields, so each is read by offset
//! and is zero where an older kernel does not have it.

use std::os::fd::AsFd;

use netlink_bindings::inet_diag;
use serde::Serialize;

use crate::{Error, Result, Token, sys};

const SOL_MPTCP: i32 = 284;
const MPTCP_INFO: i32 = 1;

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
        }
    }
}

const FLAG_FALLBACK: u32 = 1;

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

    /// Did the connection fall back to TCP?
    pub fn is_fallback(&self) -> bool {
        self.flags & FLAG_FALLBACK != 0
    }
}

/// Asks the kernel about the connection `socket` (`MPTCP_INFO`, Linux 5.16 and newer).
///
/// On older kernels an MPTCP socket is told from a TCP one (`SO_PROTOCOL`), with an empty [`Info`].
pub fn of(socket: &impl AsFd) -> Result<Status> {
    let mut buffer = [0; 256];
    match sys::getsockopt(socket.as_fd(), SOL_MPTCP, MPTCP_INFO, &mut buffer) {
        Ok(length) => {
            let info = Info::parse(&buffer[..length.min(buffer.len())]);
            Ok(if info.is_fallback() { Status::Fallback(info) } else { Status::Mptcp(info) })
        }
        Err(error) => match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOPROTOOPT) => Ok(without_info(socket)?),
            _ => Err(Error::io("read MPTCP_INFO", error)),
        },
    }
}

fn without_info(socket: &impl AsFd) -> Result<Status> {
    let protocol = socket2::SockRef::from(socket).protocol().map_err(|e| Error::io("read SO_PROTOCOL", e))?;
    // A socket that an MPTCP listener accepted from a TCP client keeps SO_PROTOCOL at TCP.
    Ok(match protocol {
        Some(socket2::Protocol::MPTCP) => Status::Mptcp(Info::default()),
        _ => Status::Tcp,
    })
}

fn read<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N).and_then(|slice| slice.try_into().ok())
}
