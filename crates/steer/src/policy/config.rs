//! What the path manager is to do: one TOML file.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeBounds;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{Error, Result};

/// All that the file says. Everything has a default: an empty file is a full mesh for every connection.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Who does it.
    pub mode: Mode,
    /// What is done with connections that no rule matches.
    pub default: Rule,
    /// Looked through from the top; the first that matches a connection decides.
    pub rule: Vec<Rule>,
    /// What is said of interfaces; the first that matches a name decides.
    pub interface: Vec<Interface>,
    /// A subflow with data under way of which nothing is acknowledged for so long, though it was sent again after a
    /// timeout, is held for dead; its round-trip time, where that is longer.
    #[serde(deserialize_with = "configfile::field::time_above_zero")]
    pub dead_after: Duration,
    /// Most bytes that the send buffer of a TCP socket in the namespace, a subflow's too, grows to, from 16384 on
    /// (`net.ipv4.tcp_wmem`). What is sent again for a dead subflow waits behind what others have in theirs.
    #[serde(deserialize_with = "at_least_16384")]
    pub send_buffer: Option<u32>,
    /// Serve Prometheus metrics on this address.
    pub metrics: Option<SocketAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            mode: Mode::default(),
            default: Rule::default(),
            rule: Vec::new(),
            interface: Vec::new(),
            dead_after: Duration::from_millis(200),
            send_buffer: None,
            metrics: None,
        }
    }
}

/// Who opens and closes subflows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The daemon, for each connection by its policy.
    #[default]
    Daemon,
    /// The kernel, by endpoints and limits, which the daemon keeps right as addresses come and go.
    Kernel,
}

/// What is done with some connections.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// With which ones; all that is given must fit.
    pub r#match: Match,
    /// Which subflows it has.
    pub policy: Kind,
    /// With `ndiffports`: how many subflows, 1 to 8.
    #[serde(deserialize_with = "one_to_eight")]
    pub ports: u8,
    /// Most subflows at a time, those that are being opened included, 1 to 8.
    #[serde(deserialize_with = "one_to_eight")]
    pub max_subflows: u8,
    /// With `primary-backup`: interfaces in the order in which they are to be primary (`*` at the end stands for
    /// anything). What is not named comes last.
    pub order: Vec<String>,
    /// With `primary-backup`: among interfaces that `order` does not tell apart, the one with the shortest
    /// round-trip time is primary.
    pub measured: bool,
    /// Announce further addresses to the peer, where the peer opened the connection.
    pub announce: bool,
}

impl Default for Rule {
    fn default() -> Self {
        Rule {
            r#match: Match::default(),
            policy: Kind::default(),
            ports: 2,
            max_subflows: 8,
            order: Vec::new(),
            measured: false,
            announce: false,
        }
    }
}

/// Which subflows a connection has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// One between each local address and each address of the peer.
    #[default]
    Fullmesh,
    /// Several between the connection's first two addresses, which differ in the port: for networks that spread
    /// flows over links by hash.
    Ndiffports,
    /// One from each local address; one is active, the others are backups.
    PrimaryBackup,
    /// One alone, moved to another address when it dies.
    Single,
    /// One from each local address, all active.
    Aggregate,
}

/// Describes connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Match {
    /// The program's name (`/proc/PID/comm`).
    pub program: Option<String>,
    /// The socket's owner.
    pub uid: Option<u32>,
    /// The program's cgroup, or one above it: `/system.slice/openvpn.service`.
    pub cgroup: Option<String>,
    /// Either end's port.
    pub port: Option<u16>,
    /// The peer's address is in this network, or is this one.
    #[serde(deserialize_with = "network")]
    pub peer: Option<IpNet>,
}

/// What is known of a connection before anything is done with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Names of the programs that hold it.
    pub programs: BTreeSet<String>,
    /// Their cgroups.
    pub cgroups: BTreeSet<String>,
    /// The socket's owner.
    pub uid: u32,
}

/// What is said of interfaces.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// The interface's name; `*` at its end stands for anything.
    pub name: String,
    /// Are its addresses used at all?
    #[serde(default = "yes")]
    pub r#use: bool,
    /// Traffic over it costs: its subflows are backups as long as there are others.
    #[serde(default)]
    pub metered: bool,
}

impl Config {
    /// Reads the file at `path`.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| mptcp::Error::io(format!("read {}", path.display()), e))?;
        Self::from_toml(&text, &path.display().to_string())
    }

    /// Like [`Config::load`], from the text of a file; errors call it `file`.
    pub fn from_toml(text: &str, file: &str) -> Result<Self> {
        let refuse = |message: String| Error::from(configfile::Error::new(file, message));
        let config: Config = configfile::decode(text, Path::new(file))?;
        if config.default.r#match != Match::default() {
            return Err(refuse("default.match: the default is for what no rule matches".into()));
        }
        Ok(config)
    }

    /// What is done with a connection between `local` and `remote`.
    pub fn rule(&self, identity: &Identity, local: SocketAddr, remote: SocketAddr) -> &Rule {
        self.rule.iter().find(|rule| rule.r#match.fits(identity, local, remote)).unwrap_or(&self.default)
    }

    /// Are addresses on `interface` used?
    pub fn uses(&self, interface: &str) -> bool {
        interface != "lo" && self.said_of(interface).is_none_or(|said| said.r#use)
    }

    /// Does traffic over `interface` cost?
    pub fn is_metered(&self, interface: &str) -> bool {
        self.said_of(interface).is_some_and(|said| said.metered)
    }

    fn said_of(&self, interface: &str) -> Option<&Interface> {
        self.interface.iter().find(|said| matches(&said.name, interface))
    }
}

impl Rule {
    /// The place of `interface` in the order, 0 first.
    pub fn rank(&self, interface: &str) -> usize {
        self.order.iter().position(|name| matches(name, interface)).unwrap_or(self.order.len())
    }
}

impl Match {
    fn fits(&self, identity: &Identity, local: SocketAddr, remote: SocketAddr) -> bool {
        let in_cgroup = |wanted: &String| {
            let below = |cgroup: &String| {
                cgroup
                    .strip_prefix(wanted.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            };
            wanted == "/" || identity.cgroups.iter().any(below)
        };
        self.program.as_ref().is_none_or(|program| identity.programs.contains(program))
            && self.uid.is_none_or(|uid| uid == identity.uid)
            && self.cgroup.as_ref().is_none_or(in_cgroup)
            && self.port.is_none_or(|port| port == local.port() || port == remote.port())
            && self.peer.is_none_or(|net| net.contains(&remote.ip().to_canonical()))
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    }
}

fn yes() -> bool {
    true
}

fn network<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<IpNet>, D::Error> {
    let text = String::deserialize(from)?;
    let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network.map(Some).map_err(|_| serde::de::Error::custom(format!("{text:?} is no address and no subnet")))
}

/// The kernel begins with so much.
fn at_least_16384<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<u32>, D::Error> {
    number(from, 16384.., "16384 or more").map(Some)
}

fn one_to_eight<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<u8, D::Error> {
    number(from, 1..=8, "1 to 8")
}

/// A number in `range`, which is `words` to people.
fn number<'de, D: Deserializer<'de>, T: TryFrom<i64> + PartialOrd>(
    from: D,
    range: impl RangeBounds<T>,
    words: &str,
) -> std::result::Result<T, D::Error> {
    let number = i64::deserialize(from)?;
    let fits = T::try_from(number).ok().filter(|number| range.contains(number));
    fits.ok_or_else(|| serde::de::Error::custom(format!("{number} is not {words}")))
}
