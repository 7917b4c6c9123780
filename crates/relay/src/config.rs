//! What a relay does: services, from a TOML file, the command line, or both.
//!
//! A [`Settings`] is one layer of wishes about a service, everything optional. The command line (with its
//! environment variables) gives one, each `[[service]]` of the file another; laid over each other and over
//! the defaults they make a [`Service`].

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use mptcp::socket::Protocol;
use serde::{Deserialize, Deserializer};

use crate::transparent::{Capture, Interface};
use crate::{Error, Result};

/// Everything a relay is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The services, each with a name and a listening address of its own.
    pub services: Vec<Service>,
    /// What is not about one service.
    pub process: Process,
}

/// One service: accept here, dial there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Names it in logs and metrics. Default: the listening address.
    pub name: String,
    /// Where it accepts.
    pub listen: Listen,
    /// Where it dials.
    pub upstream: Upstream,
    /// Which connections are diverted to it; `None`: it serves those that come to its address.
    pub transparent: Option<Capture>,
    /// Most that one step of setting up may take: the client's PROXY header, the name's resolution, the
    /// connection to one address.
    pub connect_timeout: Duration,
    /// A connection without a byte either way for this long is ended. `None`: never.
    pub idle_timeout: Option<Duration>,
    /// Silence before the kernel probes a peer. `None`: it does not.
    pub keepalive: Option<Duration>,
    /// A connection whose peer acknowledges nothing of what it was sent for this long is ended. `None`: the
    /// kernel's own patience.
    pub user_timeout: Option<Duration>,
    /// Small writes are sent at once.
    pub nodelay: bool,
    /// Every client begins with a PROXY header, version 1 or 2.
    pub accept_proxy: bool,
    /// Who may send PROXY headers; empty: everybody who can connect.
    pub proxy_from: Vec<IpNet>,
    /// The server gets a PROXY header of this version.
    pub send_proxy: Option<ProxyVersion>,
    /// Clients that are served; empty: all.
    pub allow: Vec<IpNet>,
    /// Clients that are not served, even where `allow` names them.
    pub deny: Vec<IpNet>,
    /// Most connections at a time; 0: no limit.
    pub max_connections: usize,
    /// Most connections at a time of one client address; 0: no limit.
    pub max_connections_per_source: usize,
    /// A leg that asked for MPTCP and fell back to TCP is refused.
    pub require_mptcp: bool,
    /// The name of the server need not resolve when the relay starts.
    pub lazy_dns: bool,
}

/// Settings of the whole process, one layer of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Serve Prometheus metrics on this address (`http://ADDR/metrics`)
    #[arg(long, value_name = "ADDR", env = "BRAID_METRICS")]
    pub metrics: Option<SocketAddr>,
    /// At SIGTERM, wait this long for connections to end [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = configfile::time, env = "BRAID_DRAIN")]
    #[serde(default, deserialize_with = "configfile::field::time")]
    pub drain: Option<Duration>,
}

impl Process {
    /// How long connections may go on after SIGTERM.
    pub fn drain_or_default(&self) -> Duration {
        self.drain.unwrap_or(Duration::from_secs(30))
    }
}

/// One layer of settings of a service; each is explained at [`Service`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Settings {
    /// Name of the service in logs and metrics [default: the listening address]
    #[arg(long)]
    pub name: Option<String>,
    /// Accept here: tcp://:5555 (on all addresses), mptcp://10.0.0.1:4444
    #[arg(long, value_name = "URL", env = "BRAID_LISTEN")]
    pub listen: Option<Listen>,
    /// Dial this server: mptcp://host:4444, tcp://localhost:5201
    #[arg(long, value_name = "URL", env = "BRAID_TO")]
    pub to: Option<Target>,
    /// Serve connections that were meant for other hosts, and dial where they were meant to go.
    #[command(flatten)]
    pub transparent: Option<Capture>,
    /// Most time for a PROXY header, for resolving a name, for connecting to one address [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = configfile::time, env = "BRAID_CONNECT_TIMEOUT")]
    #[serde(default, deserialize_with = "configfile::field::time")]
    pub connect_timeout: Option<Duration>,
    /// End a connection without a byte either way for this long [default: 0s, never]
    #[arg(long, value_name = "TIME", value_parser = configfile::time, env = "BRAID_IDLE_TIMEOUT")]
    #[serde(default, deserialize_with = "configfile::field::time")]
    pub idle_timeout: Option<Duration>,
    /// Probe a silent peer after this long; 0s does not [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = configfile::time, env = "BRAID_KEEPALIVE")]
    #[serde(default, deserialize_with = "configfile::field::time")]
    pub keepalive: Option<Duration>,
    /// End a connection whose peer acknowledges nothing for this long [default: 0s, the kernel decides]
    #[arg(long, value_name = "TIME", value_parser = configfile::time, env = "BRAID_USER_TIMEOUT")]
    #[serde(default, deserialize_with = "configfile::field::time")]
    pub user_timeout: Option<Duration>,
    /// Send small writes at once [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub nodelay: Option<bool>,
    /// Expect a PROXY protocol header (version 1 or 2) from every client
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub accept_proxy: Option<bool>,
    /// Networks that may send PROXY headers [default: all]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub proxy_from: Option<Vec<Net>>,
    /// Send the server a PROXY protocol header
    #[arg(long, value_name = "VERSION")]
    pub send_proxy: Option<ProxyVersion>,
    /// Serve only clients of these networks
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub allow: Option<Vec<Net>>,
    /// Serve no clients of these networks
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub deny: Option<Vec<Net>>,
    /// Most connections at a time [default: 0, no limit]
    #[arg(long, value_name = "N", env = "BRAID_MAX_CONNECTIONS")]
    pub max_connections: Option<usize>,
    /// Most connections at a time of one client address [default: 0, no limit]
    #[arg(long, value_name = "N", env = "BRAID_MAX_CONNECTIONS_PER_SOURCE")]
    pub max_connections_per_source: Option<usize>,
    /// Refuse connections that fell back from MPTCP to TCP
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub require_mptcp: Option<bool>,
    /// Start even if the server's name does not resolve yet
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub lazy_dns: Option<bool>,
}

/// Where a service accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Listen {
    /// What its socket speaks. An MPTCP listener serves TCP clients too.
    pub protocol: Protocol,
    /// `[::]` is all addresses, IPv4 and IPv6.
    pub addr: SocketAddr,
}

/// Where a service dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upstream {
    /// Always the same server.
    Fixed(Target),
    /// The server that the client meant before its connection was diverted to us.
    OriginalDestination(Protocol),
}

impl Upstream {
    /// What the dialled connection speaks.
    pub fn protocol(&self) -> Protocol {
        match self {
            Upstream::Fixed(target) => target.protocol,
            Upstream::OriginalDestination(protocol) => *protocol,
        }
    }
}

/// A server by name or address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// What the connection to it asks for.
    pub protocol: Protocol,
    /// Name or address, without brackets.
    pub host: String,
    /// Never 0.
    pub port: u16,
}

/// Version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ProxyVersion {
    /// The line of text.
    V1,
    /// The binary header.
    V2,
}

/// A network: `10.0.0.0/8`, `2001:db8::/32`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Net(pub IpNet);

impl Config {
    /// Reads `path`; `over` and `process` are laid over what it says.
    pub fn load(path: &Path, over: &Settings, process: &Process) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::system(format!("read {}", path.display()), e))?;
        Self::from_toml(&text, path, over, process)
    }

    /// Like [`Config::load`], from the text of a file; `path` is for messages.
    pub fn from_toml(text: &str, path: &Path, over: &Settings, process: &Process) -> Result<Self> {
        let file: File = configfile::decode(text, path)?;
        if file.service.is_empty() {
            return Err(configfile::Error::new(path.display().to_string(), "no [[service]] in it").into());
        }
        let mut services = Vec::new();
        for (index, settings) in file.service.into_iter().enumerate() {
            let place = match &settings.name {
                Some(name) => format!("{}: service {name}", path.display()),
                None => format!("{}: service[{index}]", path.display()),
            };
            services.push(settings.under(over).resolve(&place)?);
        }
        let process =
            Process { metrics: process.metrics.or(file.metrics), drain: process.drain.or(file.drain) };
        Self { services, process }.checked(&path.display().to_string())
    }

    /// The one service of a command line.
    pub fn from_settings(settings: Settings, process: &Process) -> Result<Self> {
        Self { services: vec![settings.resolve("command line")?], process: process.clone() }
            .checked("command line")
    }

    /// Refuses services that would get in each other's way.
    fn checked(self, place: &str) -> Result<Self> {
        for (index, service) in self.services.iter().enumerate() {
            for earlier in &self.services[..index] {
                let same = if earlier.name == service.name {
                    format!("name {}", service.name)
                } else if earlier.listen.addr == service.listen.addr {
                    format!("listening address {}", service.listen.addr)
                } else {
                    continue;
                };
                let message = format!("services {} and {} have the same {same}", earlier.name, service.name);
                return Err(configfile::Error::new(place, message).into());
            }
        }
        Ok(self)
    }
}

impl Settings {
    /// `self` where `over` says nothing.
    pub fn under(self, over: &Settings) -> Settings {
        let over = over.clone();
        Settings {
            name: over.name.or(self.name),
            listen: over.listen.or(self.listen),
            to: over.to.or(self.to),
            transparent: over.transparent.or(self.transparent),
            connect_timeout: over.connect_timeout.or(self.connect_timeout),
            idle_timeout: over.idle_timeout.or(self.idle_timeout),
            keepalive: over.keepalive.or(self.keepalive),
            user_timeout: over.user_timeout.or(self.user_timeout),
            nodelay: over.nodelay.or(self.nodelay),
            accept_proxy: over.accept_proxy.or(self.accept_proxy),
            proxy_from: over.proxy_from.or(self.proxy_from),
            send_proxy: over.send_proxy.or(self.send_proxy),
            allow: over.allow.or(self.allow),
            deny: over.deny.or(self.deny),
            max_connections: over.max_connections.or(self.max_connections),
            max_connections_per_source: over.max_connections_per_source.or(self.max_connections_per_source),
            require_mptcp: over.require_mptcp.or(self.require_mptcp),
            lazy_dns: over.lazy_dns.or(self.lazy_dns),
        }
    }

    /// Fills in the defaults.
    fn resolve(self, place: &str) -> Result<Service> {
        let wrong = |message: &str| Error::from(configfile::Error::new(place, message));
        let listen = self.listen.ok_or_else(|| wrong("listen is missing"))?;
        let upstream = match (self.to, &self.transparent) {
            (Some(to), None) => Upstream::Fixed(to),
            (None, None) => return Err(wrong("to is missing")),
            (Some(_), Some(_)) => {
                return Err(wrong("to: a transparent service dials where its clients meant to go"));
            }
            (None, Some(_)) if !listen.addr.ip().is_unspecified() => {
                return Err(wrong("listen: a transparent service listens on all addresses (tcp://:PORT)"));
            }
            (None, Some(_)) => Upstream::OriginalDestination(match listen.protocol {
                Protocol::Tcp => Protocol::default(),
                Protocol::Mptcp => Protocol::Tcp,
            }),
        };
        let connect_timeout = self.connect_timeout.unwrap_or(Duration::from_secs(10));
        if connect_timeout.is_zero() {
            return Err(wrong("connect_timeout: must be more than 0s"));
        }
        let proxy_from = nets(self.proxy_from);
        let accept_proxy = self.accept_proxy.unwrap_or(false);
        if !proxy_from.is_empty() && !accept_proxy {
            return Err(wrong("proxy_from: means nothing without accept_proxy"));
        }
        if self.transparent.is_some() && accept_proxy {
            return Err(wrong("accept_proxy: clients of a transparent service don't know of it"));
        }
        let require_mptcp = self.require_mptcp.unwrap_or(false);
        if require_mptcp && [listen.protocol, upstream.protocol()] == [Protocol::Tcp; 2] {
            return Err(wrong("require_mptcp: neither side asks for MPTCP (or BRAID_MPTCP=0 turns it off)"));
        }
        Ok(Service {
            name: self.name.unwrap_or_else(|| listen.to_string()),
            listen,
            upstream,
            transparent: self.transparent,
            connect_timeout,
            idle_timeout: self.idle_timeout.filter(|time| !time.is_zero()),
            keepalive: Some(self.keepalive.unwrap_or(Duration::from_secs(60))).filter(|time| !time.is_zero()),
            user_timeout: self.user_timeout.filter(|time| !time.is_zero()),
            nodelay: self.nodelay.unwrap_or(true),
            accept_proxy,
            proxy_from,
            send_proxy: self.send_proxy,
            allow: nets(self.allow),
            deny: nets(self.deny),
            max_connections: self.max_connections.unwrap_or(0),
            max_connections_per_source: self.max_connections_per_source.unwrap_or(0),
            require_mptcp,
            lazy_dns: self.lazy_dns.unwrap_or(false),
        })
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (protocol, host, port) = split(s)?;
        let ip = match host {
            "" => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            host => {
                host.parse().map_err(|_| format!("{host} is not an IP address (a listener needs one)"))?
            }
        };
        Ok(Listen { protocol, addr: SocketAddr::new(ip, port) })
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (protocol, host, port) = split(s)?;
        if host.is_empty() {
            return Err(format!("{s} names no host"));
        }
        Ok(Target { protocol, host: host.into(), port })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", scheme(self.protocol), self.addr)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "{}://[{}]:{}", scheme(self.protocol), self.host, self.port),
            false => write!(f, "{}://{}:{}", scheme(self.protocol), self.host, self.port),
        }
    }
}

impl FromStr for Net {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let net = s.parse::<IpNet>().or_else(|_| s.parse::<IpAddr>().map(IpNet::from));
        net.map(Net).map_err(|_| format!("{s} is neither a network (10.0.0.0/8) nor an address"))
    }
}

/// `listen = "…"` in a file reads as `--listen …` does.
macro_rules! deserialize_from_str {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
deserialize_from_str!(Listen, Target, Net, Interface);

/// The file as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    metrics: Option<SocketAddr>,
    #[serde(default, deserialize_with = "configfile::field::time")]
    drain: Option<Duration>,
    #[serde(default)]
    service: Vec<Settings>,
}

/// Takes `PROTOCOL://HOST:PORT` apart; the host is without brackets and may be empty.
fn split(s: &str) -> Result<(Protocol, &str, u16), String> {
    let (scheme, rest) =
        s.split_once("://").ok_or_else(|| format!("{s} does not begin with tcp:// or mptcp://"))?;
    let protocol = match scheme {
        "tcp" => Protocol::Tcp,
        // The default is MPTCP unless BRAID_MPTCP=0.
        "mptcp" => Protocol::default(),
        _ => return Err(format!("{scheme}:// is neither tcp:// nor mptcp://")),
    };
    let (host, port) = rest.rsplit_once(':').ok_or_else(|| format!("{s} has no port"))?;
    let port = match port.parse::<u16>() {
        Ok(0) => return Err(format!("{s}: port 0 cannot be used")),
        Ok(port) => port,
        Err(_) => return Err(format!("{s}: port {port:?} is not a number from 1 to 65535")),
    };
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').ok_or_else(|| format!("{s}: [ without ]"))?,
        None if host.contains(':') => return Err(format!("{s}: an IPv6 address is written in brackets")),
        None => host,
    };
    Ok((protocol, host, port))
}

fn scheme(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Mptcp => "mptcp",
        Protocol::Tcp => "tcp",
    }
}

fn nets(nets: Option<Vec<Net>>) -> Vec<IpNet> {
    nets.unwrap_or_default().into_iter().map(|Net(net)| net).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
drain = "5s"

[[service]]
name = "web"
listen = "tcp://:5555"
to = "mptcp://server.example:4444"
"#;

    fn read(text: &str, over: &Settings) -> Result<Config> {
        Config::from_toml(text, Path::new("proxy.toml"), over, &Process::default())
    }

    #[test]
    fn the_command_line_goes_before_the_file_and_the_file_before_the_defaults() {
        let file = format!("{GOOD}idle_timeout = \"1m 30s\"\nmax_connections = 7\nrequire_mptcp = true\n");
        let over = Settings { max_connections: Some(8), require_mptcp: Some(false), ..Settings::default() };
        let config = read(&file, &over).unwrap();
        let service = &config.services[0];
        assert_eq!(service.max_connections, 8);
        assert!(!service.require_mptcp);
        assert_eq!(service.idle_timeout, Some(Duration::from_secs(90)));
        assert_eq!(service.connect_timeout, Duration::from_secs(10));
        assert_eq!(service.keepalive, Some(Duration::from_secs(60)));
        assert!(service.nodelay);
        assert_eq!(config.process.drain_or_default(), Duration::from_secs(5));
        let shorter = Process { drain: Some(Duration::from_secs(1)), ..Process::default() };
        let config =
            Config::from_toml(GOOD, Path::new("proxy.toml"), &Settings::default(), &shorter).unwrap();
        assert_eq!(config.process.drain_or_default(), Duration::from_secs(1));
    }

    #[test]
    fn every_setting_can_be_overridden() {
        let layer = |n: u16, yes: bool, version: &str| -> Settings {
            let text = format!(
                r#"
                name = "{n}"
                listen = "tcp://:{n}"
                to = "tcp://a:{n}"
                connect_timeout = "{n}s"
                idle_timeout = "{n}s"
                keepalive = "{n}s"
                user_timeout = "{n}s"
                nodelay = {yes}
                accept_proxy = {yes}
                proxy_from = ["10.0.0.{n}"]
                send_proxy = "{version}"
                allow = ["10.0.0.{n}"]
                deny = ["10.0.0.{n}"]
                max_connections = {n}
                max_connections_per_source = {n}
                require_mptcp = {yes}
                lazy_dns = {yes}
                transparent = {{ ports = ["{n}"] }}
                "#
            );
            toml::from_str(&text).unwrap()
        };
        let (file, over) = (layer(1, true, "v1"), layer(2, false, "v2"));
        assert!(!format!("{file:?}").contains("None"), "a setting is missing above: {file:?}");
        assert_eq!(file.clone().under(&over), over);
        assert_eq!(file.clone().under(&Settings::default()), file);
    }

    #[test]
    fn the_example_file_tells_the_defaults() {
        let example = include_str!("../../../packaging/proxy.toml");
        let as_is = read(example, &Settings::default()).unwrap();
        // Prose has a space after the #, settings have none.
        let setting = |line: &str| line.strip_prefix('#').filter(|l| !l.starts_with(' ')).map(String::from);
        let all: Vec<_> = example.lines().map(|line| setting(line).unwrap_or(line.into())).collect();
        let spelled_out = read(&all.join("\n"), &Settings::default()).unwrap();
        assert_eq!(as_is.services[..], spelled_out.services[..as_is.services.len()]);
        assert!(spelled_out.services.len() > as_is.services.len(), "the transparent one is a comment");
    }

    #[test]
    fn addresses_read_what_they_write() {
        for text in ["tcp://[::]:5555", "mptcp://10.0.0.1:4444", "tcp://[2001:db8::1]:1"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        assert_eq!("tcp://:5555".parse::<Listen>().unwrap().to_string(), "tcp://[::]:5555");
        assert_eq!("tcp://localhost:5201".parse::<Target>().unwrap().to_string(), "tcp://localhost:5201");
    }

    #[test]
    fn bad_input_is_refused_with_file_line_and_key() {
        let service =
            |lines: &str| format!("[[service]]\nlisten = \"tcp://:1\"\nto = \"tcp://a:1\"\n{lines}\n");
        for (text, message) in [
            ("", "proxy.toml: no [[service]] in it"),
            ("x = 1", "proxy.toml:1: x: unknown field `x`, expected one of `metrics`, `drain`, `service`"),
            ("metrics = \"9100\"", "proxy.toml:1: metrics: invalid socket address syntax"),
            ("a = = 1", "proxy.toml:1: "),
            ("[[service]]", "proxy.toml: service[0]: listen is missing"),
            ("[[service]]\nlisten = \"tcp://:1\"", "proxy.toml: service[0]: to is missing"),
            (&service("\nlisten_on = 5"), "proxy.toml:5: service[0].listen_on: unknown field `listen_on`"),
            (&service("nodelay = 1"), "proxy.toml:4: service[0].nodelay: invalid type: integer `1`"),
            (&service("idle_timeout = \"5\""), "proxy.toml:4: service[0].idle_timeout: \"5\" is not a time"),
            (
                &service("idle_timeout = \"-5s\""),
                "proxy.toml:4: service[0].idle_timeout: \"-5s\" is negative",
            ),
            (
                &service("connect_timeout = \"0s\""),
                "proxy.toml: service[0]: connect_timeout: must be more than 0s",
            ),
            (
                &service("allow = [\"10.0.0.0/33\"]"),
                "proxy.toml:4: service[0].allow[0]: 10.0.0.0/33 is neither",
            ),
            (&service("require_mptcp = true"), "proxy.toml: service[0]: require_mptcp: neither side asks"),
            (&service("send_proxy = \"v3\""), "proxy.toml:4: service[0].send_proxy: unknown variant `v3`"),
            (&service("max_connections = -1"), "proxy.toml:4: service[0].max_connections: invalid value"),
            (&service("proxy_from = [\"::1\"]"), "proxy.toml: service[0]: proxy_from: means nothing without"),
            (
                &[service("name = \"x\""), service("name = \"y\"")].concat(),
                "proxy.toml: services x and y have the same listening address [::]:1",
            ),
            (
                &[service("name = \"x\""), service("name = \"x\"").replace(":1", ":2")].concat(),
                "proxy.toml: services x and x have the same name x",
            ),
            (
                "[[service]]\n\nlisten = \"tcp://:0\"",
                "proxy.toml:3: service[0].listen: tcp://:0: port 0 cannot be used",
            ),
            (
                "[[service]]\nlisten = \"tcp://:65536\"",
                "proxy.toml:2: service[0].listen: tcp://:65536: port \"65536\" is",
            ),
            ("[[service]]\nlisten = \"udp://:1\"", "proxy.toml:2: service[0].listen: udp:// is neither"),
            (
                "[[service]]\nlisten = \":1\"",
                "proxy.toml:2: service[0].listen: :1 does not begin with tcp://",
            ),
            (
                "[[service]]\nlisten = \"tcp://::1:1\"",
                "proxy.toml:2: service[0].listen: tcp://::1:1: an IPv6 address is",
            ),
            (
                "[[service]]\nlisten = \"tcp://[::1\"",
                "proxy.toml:2: service[0].listen: tcp://[::1: [ without ]",
            ),
            (
                "[[service]]\nlisten = \"tcp://name:1\"",
                "proxy.toml:2: service[0].listen: name is not an IP address",
            ),
            ("[[service]]\nto = \"tcp://:1\"", "proxy.toml:2: service[0].to: tcp://:1 names no host"),
            ("[[service]]\nto = \"tcp://a\"", "proxy.toml:2: service[0].to: tcp://a has no port"),
        ] {
            let error = read(text, &Settings::default()).unwrap_err().to_string();
            assert!(error.starts_with(message), "{text}\nsays     {error}\nexpected {message}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
