//! Transparent services: connections that were meant for other hosts come to us, and go on to where they were
//! meant.
//!
//! ```text
//! forwarded   client ─ SYN ─> prerouting: tproxy ──┐
//! local       program ─ SYN ─> output: redirect ───┴─> Listener ─> original_destination() ─> dial
//! ```
//!
//! [`rules`] writes what the kernel is to do, [`diversion`] puts it there and takes it away.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::{Duration, Instant};

use mptcp::socket::canonical;
use serde::{Deserialize, Deserializer};
use socket2::SockRef;
use tokio::net::TcpStream;

use crate::config::Net;

pub mod diversion;
pub mod rules;

pub use diversion::Diversion;
pub use rules::{OWN_MARK, Rules};

/// Which connections a transparent service takes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Capture {
    /// Take connections that others make through this host (forwarded), those that its own programs make
    /// (local), or both, and dial where they were meant to go. Without a value both.
    #[arg(
        id = "transparent",
        long,
        value_name = "TRAFFIC",
        num_args = 0..=1,
        require_equals = true,
        value_delimiter = ',',
        default_missing_value = "forwarded,local"
    )]
    pub traffic: Vec<Traffic>,
    /// Take only connections to these ports: 80,443,8000-8100
    #[arg(long, value_name = "PORTS", value_delimiter = ',', requires = "transparent")]
    pub ports: Vec<PortRange>,
    /// Take only connections to these networks
    #[arg(long, value_name = "CIDR", value_delimiter = ',', requires = "transparent")]
    pub to_cidr: Vec<Net>,
    /// Take only forwarded connections that come from these networks
    #[arg(long, value_name = "CIDR", value_delimiter = ',', requires = "transparent")]
    pub from_cidr: Vec<Net>,
    /// Take only forwarded connections that come in on these interfaces
    #[arg(long = "interface", value_name = "NAME", value_delimiter = ',', requires = "transparent")]
    pub interfaces: Vec<Interface>,
    /// Dial from the client's address, so that the server sees it
    #[arg(long, requires = "transparent")]
    pub keep_source: bool,
}

/// Whose connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Traffic {
    /// Those that this host forwards.
    Forwarded,
    /// Those of this host's own programs.
    Local,
}

/// Ports `first` to `last`, both included; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

/// Name of a network interface, of characters that mean nothing to nft(8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface(String);

impl Default for Capture {
    /// Everything, from our own address.
    fn default() -> Self {
        Capture {
            traffic: vec![Traffic::Forwarded, Traffic::Local],
            ports: Vec::new(),
            to_cidr: Vec::new(),
            from_cidr: Vec::new(),
            interfaces: Vec::new(),
            keep_source: false,
        }
    }
}

impl Capture {
    /// Does it take this traffic?
    pub fn takes(&self, traffic: Traffic) -> bool {
        self.traffic.contains(&traffic)
    }
}

/// Where the client of `stream`, accepted on `port`, meant to connect. `None`: to `port` itself; going on to
/// there would be a loop.
///
/// A connection diverted by TPROXY has its destination as local address. One that was redirected has `port`
/// there, and connection tracking knows the destination (`SO_ORIGINAL_DST`).
pub fn original_destination(stream: &TcpStream, port: u16) -> io::Result<Option<SocketAddr>> {
    let local = canonical(stream.local_addr()?);
    if local.port() != port {
        return Ok(Some(local));
    }
    let socket = SockRef::from(stream);
    let tracked = match local.ip() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    // An error says that the connection is not tracked (ENOENT): no rule has redirected it.
    let original = tracked.ok().and_then(|addr| addr.as_socket()).map(canonical);
    Ok(original.filter(|original| *original != local))
}

/// Waits until the peers have acknowledged everything, or are gone, at most a minute.
///
/// Elsewhere the kernel delivers what is left when a socket is closed. Here it needs the rules for that: without
/// them acknowledgements pass us by. And the rules may go once the session has ended.
pub(crate) async fn delivered(streams: &[&TcpStream]) {
    let pending = |stream: &&&TcpStream| {
        let broken = !matches!(stream.take_error(), Ok(None));
        !broken && mptcp::sys::unacknowledged(stream).is_ok_and(|bytes| bytes > 0)
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while streams.iter().any(|stream| pending(&stream)) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (first, last) = s.split_once('-').unwrap_or((s, s));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if 0 < first && first <= last => Ok(PortRange { first, last }),
            _ => Err(format!("{s:?} is neither a port from 1 to 65535 nor a range of them (8000-8100)")),
        }
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a port (80) or a range of ports (\"8000-8100\")")]
        enum Written {
            Port(u16),
            Range(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Port(port) => port.to_string(),
            Written::Range(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Interface {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        // IFNAMSIZ is 16 with the terminating zero.
        let fits = (1..16).contains(&s.len());
        if fits && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-:@".contains(c)) {
            return Ok(Interface(s.into()));
        }
        Err(format!("{s:?} is not the name of an interface (1 to 15 letters, digits and . _ - : @)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_numbers_or_ranges_and_never_zero() {
        assert_eq!("80".parse(), Ok(PortRange { first: 80, last: 80 }));
        assert_eq!("1-65535".parse(), Ok(PortRange { first: 1, last: 65535 }));
        for bad in ["", "0", "0-5", "9-8", "65536", "80-", "-80", "http", "1-2-3"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_interface_name_cannot_carry_rules() {
        for good in ["eth0", "wg-home", "eth0.100", "br_lan", "a23456789012345"] {
            assert_eq!(good.parse::<Interface>().unwrap().to_string(), good);
        }
        for bad in ["", "a234567890123456", "eth*", "a\" accept", "a;b", "a b", "ä", "a/b", "a\nb"] {
            assert!(bad.parse::<Interface>().is_err(), "{bad}");
        }
    }
}
