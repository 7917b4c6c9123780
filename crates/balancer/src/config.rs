//! What a balancer does: services and their backends, from a TOML file.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::abi::{MAX_BACKENDS, MAX_SERVICES, Name};
use crate::report::Secret;
use crate::{Error, Result};

/// Where pinned balancers keep their maps and links, each in a directory of its name.
pub const PINS: &str = "/sys/fs/bpf/braid-lb";
/// Where agents tell their backend's connections.
pub const AGENTS_PORT: NonZeroU16 = NonZeroU16::new(9183).unwrap();

/// Everything a balancer is told.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Names it, its pins and its lock: one of each name on a host.
    #[serde(default)]
    pub name: String,
    /// Interfaces on which clients' packets come in.
    pub interfaces: Vec<String>,
    /// Work in the drivers of the interfaces (XDP), not at TC ingress? Default: no.
    #[serde(default)]
    pub xdp: bool,
    /// Do the data plane and its tables outlive the process, until `braid lb down`? Default: yes.
    #[serde(default = "yes")]
    pub pin: bool,
    /// Where pins go; a BPF file system.
    #[serde(default = "pins")]
    pub pins: PathBuf,
    /// Serves Prometheus metrics here.
    pub metrics: Option<SocketAddr>,
    /// How many entries the tables have.
    #[serde(default)]
    pub tables: Tables,
    /// Whom to ask for connections that the tables have lost. Default: nobody.
    pub agents: Option<Agents>,
    /// At least one.
    #[serde(default, rename = "service")]
    pub services: Vec<Service>,
}

/// How many entries the tables have; when one is full, its least recently used entry goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tables {
    /// Flows that have sent more than a SYN.
    pub flows: u32,
    /// Flows that have not.
    pub fresh: u32,
    /// Tokens of connections.
    pub tokens: u32,
}

impl Default for Tables {
    fn default() -> Self {
        Tables { flows: 1 << 18, fresh: 1 << 16, tokens: 1 << 18 }
    }
}

/// The agents of the backends, `braid lb agent --tell`, at the backends' own addresses.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agents {
    /// File with the secret that balancers and agents share.
    pub secret: PathBuf,
    /// Their TCP port.
    #[serde(default = "agents_port")]
    pub port: NonZeroU16,
}

/// One service: addresses and a port, and who serves it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Names it in messages and metrics.
    pub name: String,
    /// IPv4 and IPv6 addresses (VIPs). A connection's joins may go to any of them.
    pub addresses: Vec<IpAddr>,
    /// TCP port.
    pub port: NonZeroU16,
    /// How joins find their connection's backend.
    #[serde(default)]
    pub join: Join,
    /// How backends are checked.
    #[serde(default)]
    pub check: Check,
    /// At least one.
    #[serde(default, rename = "backend")]
    pub backends: Vec<Backend>,
}

/// How joins find their connection's backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Join {
    /// By the token in the join; nothing needs to be set up on backends.
    #[default]
    Token,
    /// By the port that each backend announces for itself.
    Port,
    /// Those to a backend's port by that, all others by token.
    Both,
    /// They don't: as if they were new connections.
    Off,
}

/// How backends are checked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Check {
    /// What is asked.
    pub kind: CheckKind,
    /// Default: the service's port.
    pub port: Option<NonZeroU16>,
    /// Of HTTP.
    pub path: String,
    /// From the end of one check to the next.
    #[serde(deserialize_with = "configfile::field::time_above_zero")]
    pub interval: Duration,
    /// Most time for an answer.
    #[serde(deserialize_with = "configfile::field::time_above_zero")]
    pub timeout: Duration,
    /// So many good answers in a row make a backend take connections again.
    pub rise: u32,
    /// So many bad ones in a row make it take no new ones.
    pub fall: u32,
}

impl Default for Check {
    fn default() -> Self {
        Check {
            kind: CheckKind::Tcp,
            port: None,
            path: "/".into(),
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
        }
    }
}

/// What a check asks of a backend, at the backend's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckKind {
    /// Nothing: it serves while the network knows where it is.
    None,
    /// To accept a connection.
    Tcp,
    /// To accept an MPTCP connection.
    Mptcp,
    /// To answer GET with a status of 200 to 399.
    Http,
}

/// One backend of a service.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backend {
    /// Names it, also on the ring: balancers side by side must call it the same.
    pub name: String,
    /// Its own address, not the service's.
    pub address: IpAddr,
    /// Share of new connections, 0 to 100.
    #[serde(default = "one")]
    pub weight: u32,
    /// The port that it announces.
    pub join_port: Option<NonZeroU16>,
    /// It is behind a router: packets go to it in packets to its own address (IP in IP).
    #[serde(default)]
    pub tunnel: bool,
    /// No new connections; joins of live ones go on.
    #[serde(default)]
    pub drain: bool,
}

impl Service {
    /// Where clients come to: its addresses, with its port and those that its backends announce.
    pub fn ends(&self) -> impl Iterator<Item = SocketAddr> {
        let ports = self.backends.iter().filter_map(|backend| backend.join_port).chain([self.port]);
        ports.flat_map(|port| self.addresses.iter().map(move |address| SocketAddr::new(*address, port.get())))
    }

    /// Are joins to the service's own port steered by token?
    pub fn by_token(&self) -> bool {
        matches!(self.join, Join::Token | Join::Both)
    }
}

impl Config {
    /// Reads `path`; the balancer is named after the file where it names itself nothing.
    pub fn load(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|e| Error::io(format!("read {}", path.display()), e))?;
        Self::parse(&text, path)
    }

    /// Like [`Config::load`], from the text of a file; `path` is for messages and the name.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let mut config: Config = configfile::decode(text, path)?;
        if config.name.is_empty() {
            config.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        }
        match config.problem() {
            Some((place, message)) => {
                Err(configfile::Error::new(format!("{}{place}", path.display()), message).into())
            }
            None => Ok(config),
        }
    }

    /// What balancers and agents share, from its file.
    pub fn secret(&self) -> Result<Option<Secret>> {
        self.agents.as_ref().map(|agents| Secret::load(&agents.secret)).transpose()
    }

    /// Where a pinned balancer keeps its maps and links.
    pub fn pin_directory(&self) -> Option<PathBuf> {
        self.pin.then(|| self.pins.join(&self.name))
    }

    /// What makes no sense, and where.
    fn problem(&self) -> Option<(String, String)> {
        let top = |message: &str| Some((String::new(), message.to_string()));
        let word = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
        if self.name.is_empty() || !word(&self.name) {
            return top(&format!("name: \"{}\" is not letters, digits, - and _", self.name));
        }
        if self.interfaces.is_empty() {
            return top("interfaces: there is none");
        }
        if let Some(twice) = duplicate(&self.interfaces) {
            return top(&format!("interfaces: {twice} is there twice"));
        }
        if let Some(bad) = self.interfaces.iter().find(|name| {
            name.is_empty() || name.len() > 15 || name.contains(|c: char| c == '/' || c.is_whitespace())
        }) {
            return top(&format!("interfaces: \"{bad}\" is no interface's name"));
        }
        for (key, size) in
            [("flows", self.tables.flows), ("fresh", self.tables.fresh), ("tokens", self.tables.tokens)]
        {
            // An LRU map hands out its entries to processors by the hundred.
            if !(1024..=1 << 26).contains(&size) {
                return top(&format!("tables.{key}: {size} is not 1024 to 67108864"));
            }
        }
        if self.services.is_empty() {
            return top("no [[service]] in it");
        }
        if self.services.len() > MAX_SERVICES as usize {
            return top(&format!("more than {MAX_SERVICES} services"));
        }
        let backends: usize = self.services.iter().map(|service| service.backends.len()).sum();
        if backends >= MAX_BACKENDS as usize {
            return top(&format!("more than {} backends", MAX_BACKENDS - 1));
        }
        if let Some(twice) = duplicate(self.services.iter().map(|service| &service.name)) {
            return top(&format!("two services are named {twice}"));
        }
        let mut taken = HashSet::new();
        for service in &self.services {
            if let Some((place, message)) = service.problem(word) {
                return Some((format!(": service {}{place}", service.name), message));
            }
            if let Some(end) = service.ends().find(|end| !taken.insert(*end)) {
                return Some((format!(": service {}", service.name), format!("{end} is taken already")));
            }
        }
        None
    }
}

impl Service {
    fn problem(&self, word: impl Fn(&str) -> bool) -> Option<(String, String)> {
        let here = |message: String| Some((String::new(), message));
        if self.name.is_empty() || !word(&self.name) {
            return here("a name is letters, digits, - and _".into());
        }
        if self.addresses.is_empty() {
            return here("addresses: there is none".into());
        }
        if let Some(bad) = self.addresses.iter().find(|a| a.is_unspecified() || a.is_multicast()) {
            return here(format!("addresses: {bad} is no host's address"));
        }
        if self.backends.is_empty() {
            return here("no [[service.backend]] in it".into());
        }
        if let Some(twice) = duplicate(self.backends.iter().map(|backend| &backend.name)) {
            return here(format!("two backends are named {twice}"));
        }
        if let Some(twice) = duplicate(self.backends.iter().map(|backend| &backend.address)) {
            return here(format!("two backends have the address {twice}"));
        }
        let check = &self.check;
        if check.rise == 0 || check.fall == 0 {
            return here("check: rise and fall are at least 1".into());
        }
        if check.kind == CheckKind::Http && !check.path.starts_with('/') {
            return here("check.path: does not begin with /".into());
        }
        for backend in &self.backends {
            let there = |message: String| Some((format!(": backend {}", backend.name), message));
            if backend.name.is_empty()
                || !word(&backend.name)
                || self.name.len() + 1 + backend.name.len() > Name::MAX
            {
                return there("a name is letters, digits, - and _, and not too long".into());
            }
            if backend.address.is_unspecified() || backend.address.is_multicast() {
                return there(format!("address: {} is no host's address", backend.address));
            }
            if self.addresses.contains(&backend.address) {
                return there(format!("address: {} is the service's, not its own", backend.address));
            }
            if backend.weight > 100 {
                return there(format!("weight: {} is more than 100", backend.weight));
            }
            match (self.join, backend.join_port) {
                (Join::Port, None) => return there("join_port is missing (join = \"port\")".into()),
                (Join::Token | Join::Off, Some(_)) => {
                    return there("join_port: joins don't go by port (join = \"port\" or \"both\")".into());
                }
                _ => {}
            }
        }
        None
    }
}

fn duplicate<T: Eq + std::hash::Hash + Copy>(names: impl IntoIterator<Item = T>) -> Option<T> {
    let mut seen = HashSet::new();
    names.into_iter().find(|name| !seen.insert(*name))
}

fn yes() -> bool {
    true
}

fn one() -> u32 {
    1
}

fn agents_port() -> NonZeroU16 {
    AGENTS_PORT
}

fn pins() -> PathBuf {
    PINS.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Config> {
        Config::parse(text, Path::new("/etc/braid/lb.toml"))
    }

    const GOOD: &str = r#"
interfaces = ["eth0"]

[[service]]
name = "web"
addresses = ["10.0.83.1", "2001:db8::1"]
port = 80

[[service.backend]]
name = "app-1"
address = "10.0.90.11"
"#;

    #[test]
    fn a_short_file_has_sensible_defaults() {
        let config = read(GOOD).unwrap();
        assert_eq!(config.name, "lb");
        assert_eq!(config.pin_directory(), Some(PathBuf::from("/sys/fs/bpf/braid-lb/lb")));
        let service = &config.services[0];
        assert!(service.by_token());
        assert_eq!((service.check.kind, service.backends[0].weight), (CheckKind::Tcp, 1));
    }

    #[test]
    fn the_example_file_is_well_formed() {
        let example = include_str!("../../../packaging/lb.toml");
        read(example).unwrap();
        // Every commented-out key is one that exists.
        let all: String =
            example.lines().map(|line| format!("{}\n", line.trim_start_matches("#: "))).collect();
        read(&all).unwrap();
    }

    #[test]
    fn bad_input_is_refused_with_file_line_and_key() {
        let cases = [
            (
                GOOD.replace("port = 80", "prt = 80"),
                "/etc/braid/lb.toml:7: service[0].prt: unknown field `prt`",
            ),
            (GOOD.replace("port = 80", "port = 0"), "/etc/braid/lb.toml:7: service[0].port: "),
            (
                GOOD.replace("port = 80", "port = 80\njoin = \"key\""),
                "/etc/braid/lb.toml:8: service[0].join: unknown variant `key`",
            ),
            (GOOD.replace("\"10.0.83.1\"", "\"10.0.83\""), "/etc/braid/lb.toml:6: service[0].addresses[0]: "),
            (
                GOOD.replace("\"10.0.83.1\"", "\"0.0.0.0\""),
                "/etc/braid/lb.toml: service web: addresses: 0.0.0.0 is no",
            ),
            (
                GOOD.replace("10.0.90.11", "10.0.83.1"),
                "/etc/braid/lb.toml: service web: backend app-1: address: 10.0.83.1 is the service's",
            ),
            (GOOD.replace("[\"eth0\"]", "[]"), "/etc/braid/lb.toml: interfaces: there is none"),
            (
                GOOD.replace("\"eth0\"", "\"eth0\", \"eth0\""),
                "/etc/braid/lb.toml: interfaces: eth0 is there twice",
            ),
            (
                format!("{GOOD}join_port = 8081"),
                "/etc/braid/lb.toml: service web: backend app-1: join_port: joins don't",
            ),
            (
                GOOD.replace("port = 80", "port = 80\njoin = \"port\""),
                "/etc/braid/lb.toml: service web: backend app-1: join_port is missing",
            ),
            (format!("{GOOD}weight = 101"), "/etc/braid/lb.toml: service web: backend app-1: weight: 101"),
            (format!("{GOOD}[service.check]\nrise = 0"), "/etc/braid/lb.toml: service web: check: rise"),
            (
                format!("{GOOD}[service.check]\ninterval = \"0s\""),
                "/etc/braid/lb.toml:13: service[0].check.interval: \"0s\" is not",
            ),
            (format!("{GOOD}[agents]"), "/etc/braid/lb.toml:12: agents: missing field `secret`"),
            (format!("{GOOD}[tables]\nflows = 3"), "/etc/braid/lb.toml: tables.flows: 3 is not"),
            ("interfaces = [\"a\"]".into(), "/etc/braid/lb.toml: no [[service]] in it"),
            (
                format!("{GOOD}{}", GOOD.split_once("\n\n").unwrap().1),
                "/etc/braid/lb.toml: two services are named web",
            ),
            (
                format!("{GOOD}[[service.backend]]\nname = \"app-1\"\naddress = \"10.0.0.1\""),
                "/etc/braid/lb.toml: service web: two backends are named app-1",
            ),
            (
                format!("{GOOD}[[service.backend]]\nname = \"app-2\"\naddress = \"10.0.90.11\""),
                "/etc/braid/lb.toml: service web: two backends have the address 10.0.90.11",
            ),
            (GOOD.replace("\"eth0\"", "\"\""), "/etc/braid/lb.toml: interfaces: \"\" is no interface's name"),
            (
                GOOD.replace("eth0", "abcdefghijklmnop"),
                "/etc/braid/lb.toml: interfaces: \"abcdefghijklmnop\" is no",
            ),
            (GOOD.replace("eth0", "a/b"), "/etc/braid/lb.toml: interfaces: \"a/b\" is no interface's name"),
            (GOOD.replace("eth0", "a b"), "/etc/braid/lb.toml: interfaces: \"a b\" is no interface's name"),
            (GOOD.replace("\"web\"", "\"w b\""), "/etc/braid/lb.toml: service w b: a name is letters"),
            (GOOD.replace("app-1", "app 1"), "/etc/braid/lb.toml: service web: backend app 1: a name is"),
            (GOOD.replace("app-1", &"a".repeat(124)), "/etc/braid/lb.toml: service web: backend aaa"),
            (
                GOOD.replace("10.0.90.11", "239.0.0.1"),
                "/etc/braid/lb.toml: service web: backend app-1: address: 239.0.0.1 is no host's",
            ),
            (
                format!("{GOOD}[service.check]\nkind = \"http\"\npath = \"alive\""),
                "/etc/braid/lb.toml: service web: check.path: does not begin with /",
            ),
            (format!("name = \"a/b\"\n{GOOD}"), "/etc/braid/lb.toml: name: \"a/b\" is not"),
        ];
        for (text, expected) in cases {
            let error = read(&text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}\nexpected {expected}");
        }
    }

    #[test]
    fn the_longest_names_and_the_greatest_weight_are_taken() {
        let longest = GOOD.replace("eth0", "abcdefghijklmno").replace("app-1", &"a".repeat(123));
        let config = read(&format!("{longest}weight = 100")).unwrap();
        assert!(config.pin && !read(&format!("pin = false\n{GOOD}")).unwrap().pin);
        let by_token = |join| {
            let text = GOOD.replace("port = 80", &format!("port = 80\njoin = \"{join}\""));
            read(&format!("{text}join_port = 81")).or(read(&text)).unwrap().services[0].by_token()
        };
        assert_eq!(["token", "both", "port", "off"].map(by_token), [true, true, false, false]);
    }

    #[test]
    fn an_address_and_port_serves_one_thing_only() {
        let port = GOOD.replace("port = 80", "port = 80\njoin = \"both\"");
        assert!(read(&port).is_ok() && read(&format!("{port}join_port = 8081")).is_ok());
        let error = read(&format!("{port}join_port = 80")).unwrap_err().to_string();
        assert_eq!(error, "/etc/braid/lb.toml: service web: 10.0.83.1:80 is taken already");
    }

    proptest! {
        #[test]
        fn no_file_makes_the_reader_panic(text in "\\PC{0,300}", at in 0..GOOD.len()) {
            let _ = read(&text);
            if GOOD.is_char_boundary(at) {
                let _ = read(&format!("{}{text}{}", &GOOD[..at], &GOOD[at..]));
            }
        }
    }
}
