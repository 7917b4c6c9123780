//! Where on the network a backend is: interface, MAC addresses, and for a tunnel the address to send from.
//!
//! The kernel knows: routes and neighbours are asked for with `ip -json`, and a neighbour that the kernel does not
//! know (yet, or any more) is made known by a packet to it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;

use serde::Deserialize;

use crate::{Error, Result};

/// The way to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// The interface that leads there.
    pub ifindex: u32,
    /// Is it a veth whose other end is in another network namespace, with no queue on this one's way out? Packets then come
    /// in on the other end at once.
    pub peer: bool,
    /// Its MAC address.
    pub from: [u8; 6],
    /// The MAC address of the next hop.
    pub to: [u8; 6],
    /// Our address on the way.
    pub source: IpAddr,
}

/// The ways to `addresses` from this network namespace. One that has no route, or whose next hop has not answered
/// yet, has none.
pub fn ways(addresses: &[IpAddr]) -> Result<HashMap<IpAddr, Way>> {
    let links: Vec<Link> = ip(&["-details", "link", "show"])?;
    let neighbours: Vec<Neighbour> = ip(&["neigh", "show"])?;
    let mut ways = HashMap::new();
    for address in addresses {
        let Ok(routes) = ip::<Route>(&["route", "get", &address.to_string()]) else { continue };
        let Some(Route { dev, gateway, prefsrc: Some(source) }) = routes.into_iter().next() else { continue };
        let hop = gateway.unwrap_or(*address);
        let known = neighbours.iter().find(|n| n.dst == hop && n.dev == dev && n.usable());
        if known.is_none_or(|neighbour| !neighbour.fresh()) {
            ask(*address);
        }
        let link = links.iter().find(|link| link.ifname == dev);
        let macs =
            link.and_then(|link| mac(&link.address)).zip(known.and_then(|n| mac(n.lladdr.as_deref()?)));
        if let (Some((from, to)), Some(link)) = (macs, link) {
            ways.insert(*address, Way { ifindex: link.ifindex, peer: link.peer(), from, to, source });
        }
    }
    Ok(ways)
}

#[derive(Deserialize)]
struct Link {
    ifindex: u32,
    ifname: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    qdisc: String,
    /// There where the other end is in another network namespace.
    link_netnsid: Option<i32>,
    #[serde(default)]
    linkinfo: Info,
}

#[derive(Default, Deserialize)]
struct Info {
    info_kind: Option<String>,
}

impl Link {
    fn peer(&self) -> bool {
        // The kernel drops what is sent to the other end in the same namespace; and a queue is there to be used.
        self.link_netnsid.is_some()
            && self.qdisc == "noqueue"
            && self.linkinfo.info_kind.as_deref() == Some("veth")
    }
}

#[derive(Deserialize)]
struct Neighbour {
    dst: IpAddr,
    dev: String,
    lladdr: Option<String>,
    #[serde(default)]
    state: Vec<String>,
}

impl Neighbour {
    fn usable(&self) -> bool {
        !self.state.iter().any(|state| state == "FAILED" || state == "INCOMPLETE")
    }

    fn fresh(&self) -> bool {
        self.state.iter().any(|state| ["REACHABLE", "PERMANENT", "NOARP"].contains(&state.as_str()))
    }
}

#[derive(Deserialize)]
struct Route {
    dev: String,
    gateway: Option<IpAddr>,
    prefsrc: Option<IpAddr>,
}

/// What `ip -json` prints, as far as it is of type `T`.
pub(crate) fn ip<T: for<'de> Deserialize<'de>>(arguments: &[&str]) -> Result<Vec<T>> {
    let what = format!("ip {}", arguments.join(" "));
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("ip")
        .arg("-json")
        .args(arguments)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .map_err(|error| Error::io(format!("run {what} (package iproute2)"), error))?;
    if !output.status.success() {
        let says = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(Error::io(what, io::Error::other(says)));
    }
    // Entries of other kinds (a neighbour without an address) are none of ours.
    let values: Vec<serde_json::Value> = match output.stdout.trim_ascii() {
        b"" => Vec::new(),
        text => serde_json::from_slice(text)
            .map_err(|error| Error::io(what, io::Error::other(format!("no JSON: {error}"))))?,
    };
    Ok(values.into_iter().filter_map(|value| serde_json::from_value(value).ok()).collect())
}

/// Makes the kernel ask who has `address`: a datagram to the discard port. An answer is not needed.
fn ask(address: IpAddr) {
    let any: SocketAddr = match address {
        IpAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        IpAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let sent = UdpSocket::bind(any).and_then(|socket| socket.send_to(&[], (address, 9)));
    if let Err(error) = sent {
        tracing::debug!(%address, %error, "neighbour not asked for");
    }
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok());
    let mut mac = [0; 6];
    for byte in &mut mac {
        *byte = bytes.next()??;
    }
    bytes.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd as _, AsRawFd as _};

    use super::*;

    #[test]
    fn a_veth_leads_to_its_peer_unless_that_is_here_or_has_a_queue_before_it() {
        let (here, there) = (mptcp::Netns::anonymous().unwrap(), mptcp::Netns::anonymous().unwrap());
        let run = |words: &str| {
            let mut words = words.split(' ');
            let mut command = Command::new(words.next().unwrap());
            here.enter_on_exec(&mut command);
            assert!(command.args(words).status().unwrap().success());
        };
        let address: IpAddr = "10.1.1.2".parse().unwrap();
        let is_peer = || here.run(|| ways(&[address])).unwrap().unwrap()[&address].peer;
        run("ip link add v0 type veth peer name v1");
        run("ip link set v1 up");
        run("ip link set v0 up");
        run("ip address add 10.1.1.1/24 dev v0");
        run("ip neighbour add 10.1.1.2 lladdr 02:00:00:00:00:02 dev v0 nud permanent");
        assert!(!is_peer());
        let (pid, file) = (std::process::id(), there.as_fd().as_raw_fd());
        run(&format!("ip link set v1 netns /proc/{pid}/fd/{file}"));
        assert!(is_peer());
        run("tc qdisc add dev v0 root pfifo");
        assert!(!is_peer());
    }

    #[test]
    fn a_mac_address_is_six_bytes() {
        assert_eq!(mac("02:00:00:00:0a:ff"), Some([2, 0, 0, 0, 10, 255]));
        for bad in ["", "02:00", "02:00:00:00:00:00:00", "x:0:0:0:0:0"] {
            assert_eq!(mac(bad), None, "{bad}");
        }
    }
}
