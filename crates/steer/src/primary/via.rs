//! The way that a subflow goes: through a network, by an interface, or the fastest there is.

use std::fmt;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use mptcp::diag::{Subflow, SubflowFlags};
use mptcp::{Error, Netns, Result};

use super::Path;

/// Which subflows are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Via {
    /// Those with an address in this network at either end; a single address is a network too.
    Network(IpNet),
    /// Those that are bound to this interface, or whose local address it has.
    Interface {
        /// Its name.
        name: String,
        /// Its index.
        index: u32,
        /// Its addresses.
        addresses: Vec<IpAddr>,
    },
    /// The one with the shortest round-trip time among those that the peer lets be primary.
    Fastest,
    /// This one.
    Subflow(Path),
}

impl Via {
    /// What `word` means in `netns`: `fastest`, an address, a subnet (`10.0.0.0/24`) or an interface there.
    pub fn resolve(netns: &Netns, word: &str) -> Result<Self> {
        if word == "fastest" {
            return Ok(Via::Fastest);
        }
        let address = word.parse::<IpAddr>().map(|ip| IpNet::from(ip.to_canonical()));
        if let Ok(network) = address.or_else(|_| word.parse()) {
            return Ok(Via::Network(network));
        }
        let what = || format!("{word} is no address, no subnet and no interface of {}", netns.name());
        let index = netns.run(|| nix::net::if_::if_nametoindex(word))?.map_err(|e| Error::io(what(), e))?;
        let addresses = netns.run(|| addresses(word))?;
        let addresses = addresses.map_err(|e| Error::io(format!("list the addresses of {word}"), e))?;
        Ok(Via::Interface { name: word.into(), index, addresses })
    }

    /// Those of `subflows` that go this way.
    pub(super) fn choose<'s>(&self, subflows: &[&'s Subflow]) -> Vec<&'s Subflow> {
        let goes = |subflow: &&Subflow| match self {
            Via::Network(network) => {
                [subflow.local, subflow.remote].iter().any(|end| network.contains(&end.ip().to_canonical()))
            }
            Via::Interface { index, addresses, .. } => {
                subflow.ifindex == *index || addresses.contains(&subflow.local.ip().to_canonical())
            }
            Via::Subflow(path) => Path::of(subflow) == *path,
            Via::Fastest => true,
        };
        let mut chosen: Vec<&Subflow> = subflows.iter().copied().filter(goes).collect();
        if *self == Via::Fastest {
            let allowed = |s: &&&Subflow| !s.flags.contains(SubflowFlags::BACKUP_REMOTE) && s.tcp.rtt_us > 0;
            if let Some(fastest) = chosen.iter().filter(allowed).min_by_key(|s| s.tcp.rtt_us) {
                chosen = vec![fastest];
            }
        }
        chosen
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Via::Network(network) if network.prefix_len() == network.max_prefix_len() => {
                network.addr().fmt(f)
            }
            Via::Network(network) => network.fmt(f),
            Via::Interface { name, .. } => name.fmt(f),
            Via::Fastest => f.write_str("fastest"),
            Via::Subflow(path) => path.fmt(f),
        }
    }
}

fn addresses(interface: &str) -> io::Result<Vec<IpAddr>> {
    let entries = nix::ifaddrs::getifaddrs()?.filter(|entry| entry.interface_name == interface);
    let ip = |entry: nix::ifaddrs::InterfaceAddress| {
        let address = entry.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
    };
    Ok(entries.filter_map(ip).collect())
}
