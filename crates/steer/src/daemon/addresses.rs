//! The local addresses that can be used, and when they change.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use mptcp::{Netns, sys};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recv,
    socket,
};
use tokio::io::unix::AsyncFd;

use crate::Result;
use crate::policy::Local;

/// Tells when links and addresses change (rtnetlink).
pub struct Changes {
    socket: AsyncFd<OwnedFd>,
}

/// `RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR`.
const GROUPS: u32 = 0x1 | 0x10 | 0x100;

impl Changes {
    /// Subscribes in `netns`. Needs no privilege.
    pub fn subscribe(netns: &Netns) -> Result<Self> {
        let open = || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
            Ok::<_, Errno>(fd)
        };
        let what = || format!("subscribe to the addresses of {}", netns.name());
        let fd = netns.run(open)?.map_err(|e| mptcp::Error::io(what(), e))?;
        let socket = sys::readable(fd).map_err(|e| mptcp::Error::io(what(), e))?;
        Ok(Changes { socket })
    }

    /// Waits for a change. What it was is not told: read the addresses, which is also right after lost messages.
    pub async fn next(&self) -> Result<()> {
        let what = "read address changes";
        let mut changed = false;
        loop {
            let mut ready = self.socket.readable().await.map_err(|e| mptcp::Error::io(what, e))?;
            loop {
                match recv(self.socket.as_fd().as_raw_fd(), &mut [0; 8192], MsgFlags::empty()) {
                    Ok(_) | Err(Errno::ENOBUFS) => changed = true,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break,
                    Err(error) => return Err(mptcp::Error::io(what, error).into()),
                }
            }
            ready.clear_ready();
            if changed {
                return Ok(());
            }
        }
    }
}

/// The addresses of `netns` on interfaces that are up and have a carrier; those that only reach the own link are
/// left out.
pub fn list(netns: &Netns) -> Result<Vec<Local>> {
    let read = || -> nix::Result<Vec<Local>> {
        let usable = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING;
        let mut locals = Vec::new();
        for entry in getifaddrs()? {
            let (Some(address), true) = (entry.address, entry.flags.contains(usable)) else { continue };
            let Some(ip) = ip_of(address).filter(is_global) else { continue };
            // It may be gone by now.
            let Ok(ifindex) = if_nametoindex(entry.interface_name.as_str()) else { continue };
            let prefix = entry.netmask.and_then(ip_of).map_or(0, ones);
            locals.push(Local { ip, prefix, ifindex, interface: entry.interface_name });
        }
        locals.sort_by_key(|local| (local.ifindex, local.ip));
        locals.dedup();
        Ok(locals)
    };
    let what = || format!("list the addresses of {}", netns.name());
    Ok(netns.run(read)?.map_err(|e| mptcp::Error::io(what(), e))?)
}

fn ip_of(address: SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
}

fn is_global(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    }
}

fn ones(mask: IpAddr) -> u8 {
    match mask {
        IpAddr::V4(mask) => mask.to_bits().leading_ones() as u8,
        IpAddr::V6(mask) => mask.to_bits().leading_ones() as u8,
    }
}
