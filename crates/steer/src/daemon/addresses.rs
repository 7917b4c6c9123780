//! The local addresses that can be used, and when they change.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
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

/// The addresses of `netns` on interfaces that are up and have a carrier. Left out are those that only reach the own
/// link, and those of which it is not known, or not so, that they are ours alone (duplicate address detection, RFC 4862
/// section 5.4): nothing can be sent from these.
pub fn list(netns: &Netns) -> Result<Vec<Local>> {
    let read = || -> io::Result<Vec<Local>> {
        let tentative = tentative()?;
        let usable = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING;
        let mut locals = Vec::new();
        for entry in getifaddrs()? {
            let (Some(address), true) = (entry.address, entry.flags.contains(usable)) else { continue };
            let Some(ip) = ip_of(address).filter(is_global).filter(|ip| !tentative.contains(ip)) else {
                continue;
            };
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

/// `IFA_F_TENTATIVE` and `IFA_F_DADFAILED`.
const UNPROVEN: u32 = 0x40 | 0x08;

/// In `/proc/net/if_inet6`: address, index, length of the prefix, scope and flags in hexadecimal, then the name.
fn tentative() -> io::Result<Vec<IpAddr>> {
    let text = match std::fs::read_to_string("/proc/thread-self/net/if_inet6") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    let unproven = |line: &str| {
        let mut words = line.split_whitespace();
        let ip = u128::from_str_radix(words.next()?, 16).ok()?;
        let flags = u32::from_str_radix(words.nth(3)?, 16).ok()?;
        (flags & UNPROVEN != 0).then(|| Ipv6Addr::from_bits(ip).into())
    };
    Ok(text.lines().filter_map(unproven).collect())
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

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use lab::{Lab, Scenario};

    use super::*;

    const NETWORK: &str = r#"
        title = "two links"
        [nodes.here]
        [nodes.there]
        [links.wire]
        a = { node = "here", dev = "eth0", addresses = ["10.0.1.1/24", "169.254.7.7/16", "fd00:1::1/64"] }
        b = { node = "there", dev = "eth0", addresses = ["10.0.1.2/24"] }
        [links.other]
        a = { node = "here", dev = "eth1", addresses = ["10.0.2.1/30"] }
        b = { node = "there", dev = "eth1", addresses = ["10.0.2.2/30"] }
    "#;

    async fn network() -> Lab {
        Lab::build(&Scenario::parse("net", "net.toml", NETWORK, None).unwrap()).await.unwrap()
    }

    fn ip(lab: &Lab, words: &str) {
        let mut ip = Command::new("ip");
        lab.netns("here").enter_on_exec(ip.args(words.split(' ')));
        assert!(ip.status().unwrap().success(), "ip {words}");
    }

    fn listed(lab: &Lab) -> Vec<String> {
        let listed = list(lab.netns("here")).unwrap();
        listed.iter().map(|l| format!("{}/{} {}", l.ip, l.prefix, l.interface)).collect()
    }

    /// Looks only when a change is told.
    async fn until(lab: &Lab, changes: &Changes, wanted: impl Fn(&[String]) -> bool) {
        let comes = async {
            while !wanted(&listed(lab)) {
                changes.next().await.unwrap();
            }
        };
        let came = tokio::time::timeout(Duration::from_secs(30), comes).await;
        came.unwrap_or_else(|_| panic!("nothing is told: {:?}", listed(lab)));
    }

    #[tokio::test]
    async fn an_address_counts_that_others_can_reach_over_a_link_that_works() {
        let lab = network().await;
        let [eth0, eth1] = [["10.0.1.1/24 eth0", "fd00:1::1/64 eth0"].as_slice(), &["10.0.2.1/30 eth1"]];
        assert_eq!(listed(&lab), [eth0, eth1].concat());
        let index = lab.netns("here").run(|| if_nametoindex("eth1")).unwrap().unwrap();
        assert_eq!(list(lab.netns("here")).unwrap()[2].ifindex, index);
        // Addresses stay on an interface that loses its carrier, which is noticed a little later.
        let changes = Changes::subscribe(lab.netns("here")).unwrap();
        let mut down = Command::new("ip");
        lab.netns("there").enter_on_exec(down.args(["link", "set", "eth1", "down"]));
        assert!(down.status().unwrap().success());
        until(&lab, &changes, |listed| listed == eth0).await;
    }

    #[tokio::test]
    async fn an_address_counts_once_it_is_known_to_be_ours_alone() {
        let lab = network().await;
        let before = listed(&lab);
        let ours = "fd00:1::5/64 eth0".to_string();
        let sysctl = |key: &str, value| {
            mptcp::sysctl::set(lab.netns("here"), &format!("net.ipv6.conf.eth0.{key}"), value).unwrap();
        };
        sysctl("accept_dad", "1");
        // So many probes, a second apart: it is looked at long before their end.
        sysctl("dad_transmits", "100");
        ip(&lab, "address add fd00:1::5/64 dev eth0");
        assert_eq!(listed(&lab), before);
        ip(&lab, "address del fd00:1::5/64 dev eth0");
        sysctl("dad_transmits", "1");
        let changes = Changes::subscribe(lab.netns("here")).unwrap();
        ip(&lab, "address add fd00:1::5/64 dev eth0");
        until(&lab, &changes, |listed| listed.contains(&ours)).await;
    }

    #[tokio::test]
    async fn whatever_changes_is_told() {
        let lab = network().await;
        for words in [
            "address add 10.0.1.9/24 dev eth0",
            "address del 10.0.1.9/24 dev eth0",
            "address add fd00:1::9/64 dev eth0 nodad",
            "link set eth1 down",
            "link set eth1 name wlan0",
        ] {
            // A new one each time: the kernel may tell more of what was before.
            let changes = Changes::subscribe(lab.netns("here")).unwrap();
            ip(&lab, words);
            let told = tokio::time::timeout(Duration::from_secs(30), changes.next()).await;
            told.unwrap_or_else(|_| panic!("{words} is not told")).unwrap();
        }
    }
}
