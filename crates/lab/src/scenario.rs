//! Scenario files: what a network looks like, what happens in it, and what must come of it.
//!
//! One TOML file is one scenario; `docs/guide/lab.md` describes every key for those who write them. A file is
//! checked as a whole when it is read, before anything is built: unknown keys, names that lead nowhere and
//! addresses that are none are refused with file, line and key.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use indexmap::IndexMap;
use ipnet::IpNet;
use mptcp::pm::EventKind;
use serde::{Deserialize, Deserializer};

use crate::link::Shape;
use crate::{Error, Result};

mod check;
mod quantity;
mod shelf;
mod source;

pub use quantity::Share;
pub use shelf::Shelf;

/// A checked scenario, one variant of it where it has some.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// `NAME` or `NAME:VARIANT`.
    #[serde(skip)]
    pub name: String,
    /// The names of all its variants.
    #[serde(skip)]
    pub variants: Vec<String>,
    /// What it shows, in one line.
    pub title: String,
    /// The links whose throughput a report draws; empty: all.
    #[serde(default)]
    pub picture: Vec<String>,
    /// The hosts and routers: a network namespace each.
    pub nodes: IndexMap<String, Node>,
    /// The links between them.
    #[serde(default)]
    pub links: IndexMap<String, LinkSpec>,
    /// Files that are made in the working directory of all programs before anything starts.
    #[serde(default)]
    pub files: IndexMap<String, FileSpec>,
    /// Programs that run all the time, started in this order.
    #[serde(default)]
    pub processes: IndexMap<String, Process>,
    /// What happens, in this order.
    #[serde(default)]
    pub steps: IndexMap<String, Step>,
    /// What must have come of it.
    #[serde(default)]
    pub expect: IndexMap<String, Expectation>,
}

/// A network namespace.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// `net.ipv4.ip_forward = "1"`; set before the links are made.
    pub sysctls: IndexMap<String, Sysctl>,
    /// Limits of the in-kernel path manager.
    pub limits: Option<LimitsSpec>,
    /// Endpoints of the in-kernel path manager, in the order in which they are added.
    pub endpoints: Vec<EndpointSpec>,
    /// Routes beside those that the addresses bring.
    pub routes: Vec<Route>,
    /// Interfaces that are no link's end, by name, made in this order after the links.
    pub devices: IndexMap<String, Device>,
    /// Directories that the node's programs have for themselves, empty at first.
    pub private: Vec<PathBuf>,
}

/// An interface that is no link's end.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// What it is.
    pub kind: DeviceKind,
    /// Of a bridge: interfaces of this node that it joins.
    #[serde(default)]
    pub ports: Vec<String>,
    /// Addresses with prefix lengths.
    #[serde(default)]
    pub addresses: Vec<IpNet>,
}

/// What an interface that is no link's end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Joins its ports, as a switch does.
    Bridge,
    /// Ethernet frames for a program of the node that attaches to it.
    Tap,
    /// IP packets for a program of the node that attaches to it.
    Tun,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceKind::Bridge => "bridge",
            DeviceKind::Tap => "tap",
            DeviceKind::Tun => "tun",
        })
    }
}

/// The value of a sysctl.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Sysctl {
    /// Written in decimal.
    Number(i64),
    /// Written as it is.
    Text(String),
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sysctl::Number(number) => number.fmt(f),
            Sysctl::Text(text) => text.fmt(f),
        }
    }
}

/// As in `ip mptcp limits set`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsSpec {
    /// Subflows beside the first one, 0 to 8.
    pub subflows: u32,
    /// ADD_ADDR of the peer that may be acted on, 0 to 8.
    pub add_addr_accepted: u32,
}

/// As in `ip mptcp endpoint add`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSpec {
    /// An address of this node.
    pub ip: IpAddr,
    /// An interface of this node.
    pub dev: Option<String>,
    /// Address id; without it the kernel chooses.
    pub id: Option<std::num::NonZeroU8>,
    /// Port to announce.
    pub port: Option<NonZeroU16>,
    /// What it is for.
    #[serde(default)]
    pub flags: Vec<EndpointFlag>,
}

/// What an endpoint is for, see [`mptcp::pm::EndpointFlags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum EndpointFlag {
    Signal,
    Subflow,
    Backup,
    Fullmesh,
    Laminar,
}

/// As in `ip route add`. With `nexthops`, ECMP over all of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Whereto; `0.0.0.0/0` and `::/0` are the default routes.
    pub to: IpNet,
    /// The next router.
    pub via: Option<IpAddr>,
    /// An interface of this node.
    pub dev: Option<String>,
    /// The smaller one wins.
    pub metric: Option<u32>,
    /// Source address for connections that have not chosen one.
    pub src: Option<IpAddr>,
    /// TCP's shortest retransmission timeout; the kernel's own is 200 ms, which a busy machine may be late by.
    #[serde(default, deserialize_with = "quantity::some_time")]
    pub rto_min: Option<Duration>,
    /// The ways to share, instead of `via` and `dev`.
    #[serde(default)]
    pub nexthops: Vec<Nexthop>,
}

/// One of the ways of an ECMP route.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nexthop {
    /// The next router.
    pub via: IpAddr,
    /// An interface of this node.
    pub dev: Option<String>,
    /// Its share, 1 to 256.
    pub weight: Option<NonZeroU16>,
}

/// A link between two nodes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkSpec {
    /// One end; it is this one that goes down with the link.
    pub a: EndSpec,
    /// The other end.
    pub b: EndSpec,
    /// Rate, delay, jitter, loss, queue.
    #[serde(default)]
    pub shape: Shape,
}

/// One end of a link.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndSpec {
    /// The node.
    pub node: String,
    /// The interface's name there.
    pub dev: String,
    /// Addresses with prefix lengths: `10.0.0.1/24`.
    #[serde(default)]
    pub addresses: Vec<IpNet>,
}

/// What is in a file: one of the two.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// So many random bytes. In files: `"8MiB"`.
    #[serde(default, deserialize_with = "quantity::some_bytes")]
    pub size: Option<u64>,
    /// This.
    pub text: Option<String>,
}

/// A program that runs until the scenario ends or a step stops it. It belongs to the lab: ending on its own is
/// a failure, unless `ready` says that it ends.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Where it runs.
    pub node: String,
    /// Program and arguments; no shell takes them apart.
    pub command: Vec<String>,
    /// What shows that it is ready. Without it, being started is enough.
    pub ready: Option<Ready>,
    /// How long readiness may take. Default 10 s.
    #[serde(default = "ten_seconds", deserialize_with = "quantity::time")]
    pub timeout: Duration,
    /// Written to its standard input, which stays open until it is stopped.
    pub input: Option<String>,
    /// Not started with the lab, but by a step.
    #[serde(default)]
    pub manual: bool,
}

/// What shows that a process is ready.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ready {
    /// Something in its node listens on this TCP port.
    Port(NonZeroU16),
    /// It has printed a line that contains this.
    Line(String),
    /// It has ended with this exit code.
    Exit(i32),
}

/// One thing that happens.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// Run a program.
    Run(Run),
    /// Change a link.
    Link(LinkChange),
    /// Wait for something.
    Wait(Wait),
    /// Start a process and wait until it is ready.
    Start(ProcessName),
    /// Stop a process: SIGTERM to it and its children, SIGKILL after five seconds.
    Stop(ProcessName),
}

/// Run a program and wait for its end.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Where it runs.
    pub node: String,
    /// Program and arguments; no shell takes them apart.
    pub command: Vec<String>,
    /// The exit code that it must end with.
    #[serde(default)]
    pub exit: i32,
    /// How long it may take. Default 2 min.
    #[serde(default = "two_minutes", deserialize_with = "quantity::time")]
    pub timeout: Duration,
    /// What it prints is the payload of a transfer: goes to this file, is counted, and its gaps are measured.
    pub save: Option<String>,
    /// Go on to the next step while it runs.
    #[serde(default)]
    pub background: bool,
}

/// Change a link.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkChange {
    /// Which.
    pub link: String,
    /// What becomes of it.
    pub state: Option<LinkState>,
    /// The fields that it gives replace those of the link's shape.
    pub shape: Option<Shape>,
}

/// What becomes of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// Up again, no black hole; addresses and routes that it lost are put back.
    Up,
    /// The interface at end a goes down, and so end b loses its carrier.
    Down,
    /// Every frame is lost, silently.
    Blackhole,
}

/// Wait for something. What is given first decides, in the order of the fields.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wait {
    /// Until this step in the background ends; with `bytes`, until so much of it has arrived.
    pub step: Option<String>,
    /// Payload of `step`'s program, in bytes. In files: `"8MiB"`.
    #[serde(default, deserialize_with = "quantity::some_bytes")]
    pub bytes: Option<u64>,
    /// Until something is so in this node, see `events` and `command`.
    pub node: Option<String>,
    /// Until at least so many of each have come, since the lab was built.
    #[serde(default)]
    pub events: Counts,
    /// Until this program, run in the node again and again, ends with 0; no shell takes it apart.
    #[serde(default)]
    pub command: Vec<String>,
    /// Go on after this time, whatever has come; given alone, just wait.
    #[serde(default, deserialize_with = "quantity::some_time")]
    pub time: Option<Duration>,
    /// Fail after this time. Default 1 min.
    #[serde(default = "one_minute", deserialize_with = "quantity::time")]
    pub timeout: Duration,
}

/// Names a process.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessName {
    /// Which.
    pub process: String,
}

/// What must have come of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expectation {
    /// How many path-manager events of each kind.
    Events(EventsExpected),
    /// Which subflows there were.
    Subflows(SubflowsExpected),
    /// Where the connections' subflows went, as a whole.
    Flows(FlowsExpected),
    /// What a program says.
    Command(CommandExpected),
    /// How the bytes were spread over links.
    Share(ShareExpected),
    /// Files with equal contents.
    Same(SameExpected),
    /// How long nothing arrived.
    Stall(StallExpected),
    /// How long until a link carried data again.
    Resumed(ResumedExpected),
    /// Which subflows of a capture carried data.
    Carried(CarriedExpected),
    /// How data moved from one subflow to another.
    Handover(HandoverExpected),
}

/// Numbers of path-manager events by kind.
pub type Counts = IndexMap<Kind, u64>;

/// The kind of a path-manager event, under the name that `ip mptcp monitor` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kind(pub EventKind);

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let kind = EventKind::known().find(|kind| kind.to_string() == name);
        kind.map(Kind).ok_or_else(|| {
            let known: Vec<_> = EventKind::known().map(|kind| kind.to_string()).collect();
            serde::de::Error::custom(format!("no event named {name} (there is: {})", known.join(", ")))
        })
    }
}

/// How many path-manager events of each kind. Kinds that are not named don't matter.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsExpected {
    /// In which namespace.
    pub node: String,
    /// Of connections that began during this step only.
    pub during: Option<String>,
    /// Exactly so many.
    #[serde(default)]
    pub count: Counts,
    /// At least so many.
    #[serde(default)]
    pub at_least: Counts,
}

/// The subflows that each connection has had, each by its first and by more, and no others.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubflowsExpected {
    /// In which namespace, and so from which side.
    pub node: String,
    /// Of connections that began during this step only.
    pub during: Option<String>,
    /// `"10.0.0.2 -> 10.0.0.1:4321"`.
    pub pairs: Vec<Pair>,
}

/// Where the subflows of connections went and came from, where which of several is right depends on the connection. At
/// least one connection is needed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowsExpected {
    /// In which namespace, and so from which side.
    pub node: String,
    /// Of connections that began during this step only.
    pub during: Option<String>,
    /// Which subflows of each connection are meant.
    #[serde(default)]
    pub which: WhichFlows,
    /// Each went to one of these; empty: anywhere.
    #[serde(default)]
    pub to: Vec<SocketAddr>,
    /// Those of one connection went to one and the same of `to`.
    #[serde(default)]
    pub same: bool,
    /// To each of `to` some went.
    #[serde(default)]
    pub every: bool,
    /// Of each connection some came from each of these.
    #[serde(default)]
    pub from: Vec<IpAddr>,
}

/// Which subflows of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhichFlows {
    /// All of them.
    #[default]
    All,
    /// The one that it was opened with.
    First,
    /// The others; there is at least one.
    Added,
}

/// What a program says when all steps are done, while the processes still run.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandExpected {
    /// Where it runs.
    pub node: String,
    /// Program and arguments. It ends with exit code 0 if all is as it should be, and prints its evidence.
    pub command: Vec<String>,
    /// What is expected, in words, for the verdict.
    pub expected: String,
}

/// The two ends of a subflow; a port that is not given may be any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The node's own end.
    pub local: (IpAddr, Option<u16>),
    /// The peer's.
    pub remote: (IpAddr, Option<u16>),
}

impl Pair {
    /// Is the subflow between `a` and `b` one of this kind, whichever end is the node's own?
    pub(crate) fn joins(&self, a: SocketAddr, b: SocketAddr) -> bool {
        self.matches(a, b) || self.matches(b, a)
    }

    /// Is the subflow from `local` to `remote` one of this kind?
    pub fn matches(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        let end = |(ip, port): (IpAddr, Option<u16>), seen: SocketAddr| {
            ip == seen.ip() && port.is_none_or(|port| port == seen.port())
        };
        end(self.local, local) && end(self.remote, remote)
    }
}

impl FromStr for Pair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let end = |text: &str| {
            let text = text.trim();
            let with_port = text.parse::<SocketAddr>().map(|addr| (addr.ip(), Some(addr.port())));
            with_port.or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, None)))
        };
        let parsed = text.split_once("->").and_then(|(a, b)| Some((end(a).ok()?, end(b).ok()?)));
        let (local, remote) = parsed.ok_or_else(|| {
            format!("\"{text}\" names no subflow: write it like \"10.0.0.2 -> 10.0.0.1:4321\"")
        })?;
        Ok(Pair { local, remote })
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = |(ip, port)| match port {
            Some(port) => SocketAddr::new(ip, port).to_string(),
            None => ip.to_string(),
        };
        write!(f, "{} -> {}", end(self.local), end(self.remote))
    }
}

impl<'de> Deserialize<'de> for Pair {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// How the bytes of a step were spread: each link's share of what all the links named here carried, both
/// directions together.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareExpected {
    /// While this step ran.
    pub during: String,
    /// `{ wifi = "10%" }`.
    pub at_least: IndexMap<String, Share>,
}

/// Files with equal contents.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SameExpected {
    /// At least two, in the working directory.
    pub files: Vec<String>,
}

/// The longest time in which nothing of a saved transfer arrived at its receiver; with `during`, all such times together.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StallExpected {
    /// A step with `save`.
    pub step: String,
    /// While this step ran, all times of 300 ms and more in which nothing arrived, together.
    pub during: Option<String>,
    /// At most so long.
    #[serde(default, deserialize_with = "quantity::some_time")]
    pub at_most: Option<Duration>,
    /// At most this share of the stall of another step, measured alike: `{ step = "other", share = "33%" }`. Without either the stall is
    /// only reported.
    pub at_most_of: Option<StallShare>,
}

/// A share of another step's stall.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StallShare {
    /// A step with `save`.
    pub step: String,
    /// How much of it.
    pub share: Share,
}

/// How long after a step a link carried data: 64 KiB, both directions together, of which handshakes make little.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumedExpected {
    /// Which link.
    pub link: String,
    /// Since the end of this step.
    pub after: String,
    /// At most so long. Without it the time is only reported.
    #[serde(default, deserialize_with = "quantity::some_time")]
    pub at_most: Option<Duration>,
}

/// The subflows that carried data, according to a capture. Each of them did, and no other.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CarriedExpected {
    /// A capture file in the working directory, as tcpdump writes it.
    pub capture: String,
    /// While this step ran.
    pub during: String,
    /// `"10.0.0.2 -> 10.0.0.1:4321"`, in either direction.
    pub only: Vec<Pair>,
}

/// Data moved from one subflow to another, after an MP_PRIO.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverExpected {
    /// A capture file in the working directory, as tcpdump writes it.
    pub capture: String,
    /// While this step ran.
    pub during: String,
    /// The subflow that carried data before.
    pub from: Pair,
    /// The subflow that carried data after.
    pub to: Pair,
}

impl Scenario {
    /// Reads the file at `path`; the scenario is named after it.
    pub fn load(path: &Path, variant: Option<&str>) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::io(format!("read {}", path.display()), error))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Self::parse(&name, &path.display().to_string(), &text, variant)
    }

    /// Reads a scenario from `text`; errors call it `file`.
    pub fn parse(name: &str, file: &str, text: &str, variant: Option<&str>) -> Result<Self> {
        // A broken variant is found when the file is read, not when somebody asks for it.
        let plain = Self::variant(name, file, text, None)?;
        let mut wanted = None;
        for other in &plain.variants {
            let read = Self::variant(name, file, text, Some(other))?;
            wanted = wanted.or((variant == Some(other)).then_some(read));
        }
        match variant {
            None => Ok(plain),
            Some(variant) => wanted.ok_or_else(|| {
                let known = plain.variants.iter().map(String::as_str);
                Error::unknown("variant", &format!("{name}:{variant}"), known)
            }),
        }
    }

    fn variant(name: &str, file: &str, text: &str, variant: Option<&str>) -> Result<Self> {
        let source = source::Source::parse(file, text, variant)?;
        let mut scenario: Scenario = source.decode()?;
        scenario.name = variant.map_or_else(|| name.into(), |variant| format!("{name}:{variant}"));
        scenario.variants = source.variants().to_vec();
        check::check(&scenario, |path, message| Err(source.error_at(path, message)))?;
        Ok(scenario)
    }

    /// The interfaces of `node`: name and addresses of each.
    pub fn interfaces<'s>(&'s self, node: &'s str) -> impl Iterator<Item = (&'s String, &'s [IpNet])> {
        let ends =
            self.links.values().flat_map(|link| [&link.a, &link.b]).filter(move |end| end.node == node);
        let devices = self.nodes.get(node).into_iter().flat_map(|node| &node.devices);
        ends.map(|end| (&end.dev, end.addresses.as_slice()))
            .chain(devices.map(|(name, device)| (name, device.addresses.as_slice())))
    }
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

fn one_minute() -> Duration {
    Duration::from_secs(60)
}

fn two_minutes() -> Duration {
    Duration::from_secs(120)
}

#[cfg(test)]
mod tests;
