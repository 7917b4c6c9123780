//! Network interfaces at the level of frames and flags: packet sockets, `SIOCGIFFLAGS`, `SIOCSIFFLAGS`.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// A non-blocking packet socket on interface `ifname` of the calling thread's network namespace. It
/// sees the frames that arrive there, not those that leave, and sends what is written to it.
/// Frames carry a `struct virtio_net_hdr` in front (`PACKET_VNET_HDR`), so that a checksum that the sender left
/// to its interface stays left to the interface. `receive_buffer` is in bytes, and less where
/// it may not be as much. Needs CAP_NET_RAW.
pub fn packet_socket(ifname: &str, receive_buffer: i32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: takes no pointer; the protocol 0 makes a socket that receives nothing until bind.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us `fd`, nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    super::setsockopt(socket.as_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
    super::setsockopt(socket.as_fd(), libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
    // Only root of the first user namespace may exceed net.core.rmem_max.
    super::setsockopt(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, receive_buffer)
        .or_else(|_| super::setsockopt(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, receive_buffer))?;

    let index = nix::net::if_::if_nametoindex(ifname)?;
    // SAFETY: sockaddr_ll is plain integers, for which all zeros is a value.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `address` is a sockaddr_ll of `length` bytes and outlives the call, which only reads it.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Frames that found no room in a packet socket's receive buffer since the last call (`PACKET_STATISTICS`).
pub fn packet_overflow(socket: impl AsFd) -> io::Result<u32> {
    // struct tpacket_stats: packets, drops.
    let mut stats = [0; 8];
    super::getsockopt(socket.as_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS, &mut stats)?;
    Ok(u32::from_ne_bytes([stats[4], stats[5], stats[6], stats[7]]))
}

/// The flags (`IFF_UP`, `IFF_RUNNING`, …) of `ifname` in the network namespace of `socket`, a socket of any kind.
pub fn interface_flags(socket: impl AsFd, ifname: &str) -> io::Result<i32> {
    let request = flags_request(socket, ifname, libc::SIOCGIFFLAGS, 0)?;
    // SAFETY: SIOCGIFFLAGS has filled the flags member of the union.
    Ok(i32::from(unsafe { request.ifr_ifru.ifru_flags }))
}

/// Sets the flags of `ifname` in the network namespace of `socket`. Needs CAP_NET_ADMIN.
pub fn set_interface_flags(socket: impl AsFd, ifname: &str, flags: i32) -> io::Result<()> {
    flags_request(socket, ifname, libc::SIOCSIFFLAGS, flags as i16).map(drop)
}

/// `linux/if_packet.h`; libc has no name for it yet.
const PACKET_IGNORE_OUTGOING: i32 = 23;

fn flags_request(
    socket: impl AsFd,
    ifname: &str,
    request: libc::Ioctl,
    flags: i16,
) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain integers and pointers, for which all zeros is a value.
    let mut argument: libc::ifreq = unsafe { zeroed() };
    if ifname.len() >= argument.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in argument.ifr_name.iter_mut().zip(ifname.bytes()) {
        *to = from as libc::c_char;
    }
    argument.ifr_ifru.ifru_flags = flags;
    // SAFETY: both requests take an ifreq, which outlives the call; its name ends with a zero byte.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request, &raw mut argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(argument) }
}
