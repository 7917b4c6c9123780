//! A lab: the network of a scenario, built, with its programs, until it is dropped.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use indexmap::IndexMap;
use mptcp::Netns;
use mptcp::netns::NETNS_DIR;
use mptcp::pm::{Client, Endpoint, EndpointFlags, Limits};
use nix::net::if_::if_nametoindex;
use std::os::unix::process::CommandExt;

use crate::home::{Card, Home};
use crate::janitor::Janitor;
use crate::link::{End, Link, Shape};
use crate::mounts::Mounts;
use crate::process::{self, Process, Watch};
use crate::scenario::{DeviceKind, EndpointFlag, LinkState, Node, Ready, Route, Scenario};
use crate::{Error, Result};

/// How to build a lab.
#[derive(Clone, Debug)]
pub struct Options {
    /// The lab's name. Without one it gets one that no other has.
    pub name: Option<String>,
    /// The network namespaces are named as the nodes are, without the lab's name in front.
    pub plain_names: bool,
    /// Where labs keep their files.
    pub home: Home,
    /// The `braid` program, which its nodes find under the names `braid`, `client` and `server`.
    pub braid: Option<PathBuf>,
}

/// The network of a scenario, with its programs. Dropping it removes everything.
// The fields are dropped in this order: first what uses the namespaces, at last what removes them.
pub struct Lab {
    processes: IndexMap<String, Process>,
    links: IndexMap<String, Arc<Link>>,
    nodes: IndexMap<String, Netns>,
    /// Of the nodes that have private directories.
    mounts: IndexMap<String, Mounts>,
    card: Card,
    scenario: Scenario,
    _janitor: Janitor,
}

impl Lab {
    /// Builds the network of `scenario` under a name that no other lab has; for tests. Starts no programs: see
    /// [`Lab::start_processes`].
    ///
    /// Needs the privileges that [`crate::privilege::enter`] gives.
    pub async fn build(scenario: &Scenario) -> Result<Self> {
        let home = Home::find()?;
        Self::build_with(scenario, Options { name: None, plain_names: false, home, braid: None }).await
    }

    /// Builds the network of `scenario`.
    pub async fn build_with(scenario: &Scenario, options: Options) -> Result<Self> {
        let name = options.name.unwrap_or_else(|| unique_name(&scenario.name));
        let namespace = |node: &str| if options.plain_names { node.into() } else { format!("{name}-{node}") };
        let (directory, lock) = options.home.claim(&name)?;
        let mut janitor = Janitor::start(&directory, lock)?;
        let mut card = Card {
            name: name.clone(),
            scenario: scenario.name.clone(),
            pid: std::process::id(),
            nodes: scenario.nodes.keys().map(|node| (node.clone(), namespace(node))).collect(),
            mounts: BTreeMap::new(),
            directory,
        };
        let mut mounts = IndexMap::new();
        for (node, spec) in scenario.nodes.iter().filter(|(_, spec)| !spec.private.is_empty()) {
            let private = Mounts::private(&spec.private, &card.directory)?;
            card.mounts.insert(node.clone(), private.path());
            mounts.insert(node.clone(), private);
        }
        card.write()?;
        if let Some(braid) = &options.braid {
            for name in ["braid", "client", "server"] {
                let link = card.directory.join("bin").join(name);
                std::os::unix::fs::symlink(braid, &link)
                    .map_err(|error| Error::io(format!("link {}", link.display()), error))?;
            }
        }
        for (name, file) in &scenario.files {
            process::make_file(&card.work().join(name), file)?;
        }

        let mut nodes = IndexMap::new();
        for (node, spec) in &scenario.nodes {
            let namespace = card.namespace(node)?;
            if options.plain_names && Path::new(NETNS_DIR).join(namespace).exists() {
                let says = format!("there is one already; with --name NAME this one becomes NAME-{node}");
                return Err(Error::program(format!("make network namespace {namespace}"), says));
            }
            janitor.add(namespace)?;
            let netns = Netns::named(namespace)?;
            set_sysctls(&netns, spec)?;
            nodes.insert(node.clone(), netns);
        }
        let mut links = IndexMap::new();
        for (name, spec) in &scenario.links {
            let [a, b] = [&spec.a, &spec.b].map(|end| End { netns: &nodes[&end.node], ifname: &end.dev });
            links.insert(name.clone(), Arc::new(Link::create(a, b, &spec.shape)?));
        }
        let lab = Lab {
            processes: IndexMap::new(),
            links,
            nodes,
            mounts,
            card,
            scenario: scenario.clone(),
            _janitor: janitor,
        };
        for (node, spec) in &scenario.nodes {
            lab.make_devices(node, spec)?;
            lab.put_addresses_and_routes(node, spec)?;
            lab.set_path_manager(node, spec).await?;
        }
        Ok(lab)
    }

    /// What others need to know about it.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// The scenario that it was built from.
    pub fn scenario(&self) -> &Scenario {
        &self.scenario
    }

    /// The network namespace of a node.
    ///
    /// # Panics
    /// If the scenario has no such node.
    pub fn netns(&self, node: &str) -> &Netns {
        &self.nodes[node]
    }

    /// All nodes' network namespaces.
    pub fn nodes(&self) -> &IndexMap<String, Netns> {
        &self.nodes
    }

    /// A link.
    ///
    /// # Panics
    /// If the scenario has no such link.
    pub fn link(&self, link: &str) -> &Link {
        &self.links[link]
    }

    /// All links.
    pub fn links(&self) -> &IndexMap<String, Arc<Link>> {
        &self.links
    }

    /// The working directory of its programs.
    pub fn work(&self) -> PathBuf {
        self.card.work()
    }

    /// A command that will run in `node`, in the working directory, and will not outlive the thread that starts it.
    ///
    /// # Panics
    /// If the scenario has no such node.
    pub fn command(&self, node: &str, program: &str) -> Result<Command> {
        let mut command = Command::new(self.card.program(program)?);
        command.current_dir(self.work()).env("PATH", self.card.path()).process_group(0);
        self.nodes[node].enter_on_exec(&mut command);
        if let Some(mounts) = self.mounts.get(node) {
            mounts.enter_on_exec(&mut command, &self.work())?;
        }
        mptcp::sys::die_with_parent(&mut command);
        Ok(command)
    }

    /// Starts a program in `node`; messages call it by its program's name.
    ///
    /// # Panics
    /// If the scenario has no such node, and outside a tokio runtime.
    pub async fn spawn(&self, node: &str, words: &[&str]) -> Result<Process> {
        let (program, arguments) = words.split_first().unwrap_or((&"", &[]));
        let mut command = self.command(node, program)?;
        command.args(arguments);
        Process::spawn(program, command, Watch::default()).await
    }

    /// Starts all processes of the scenario that no step starts, each after the one before it is ready.
    pub async fn start_processes(&mut self) -> Result<()> {
        let names: Vec<String> =
            self.scenario.processes.iter().filter(|(_, p)| !p.manual).map(|(n, _)| n.clone()).collect();
        for name in names {
            self.start(&name).await?;
        }
        Ok(())
    }

    /// Starts the process `name` of the scenario, and waits until it is ready.
    pub async fn start(&mut self, name: &str) -> Result<()> {
        let Some(spec) = self.scenario.processes.get(name) else {
            return Err(Error::unknown("process", name, self.scenario.processes.keys().map(String::as_str)));
        };
        if self.processes.get(name).is_some_and(|process| process.exited().is_none()) {
            return Err(Error::program(format!("start {name}"), "it is running already"));
        }
        let line = match &spec.ready {
            Some(Ready::Line(line)) => Some(line.clone()),
            _ => None,
        };
        let watch = Watch { input: spec.input.clone(), line, save: None };
        let process = self.run(&spec.node, name, &spec.command, watch).await?;
        let what = format!("wait for {name}");
        let ready = async {
            match &spec.ready {
                None => Ok(()),
                Some(Ready::Port(port)) => until_listening(process.pid(), port.get()).await,
                Some(Ready::Line(_)) => {
                    process.line().await;
                    Ok(())
                }
                Some(Ready::Exit(code)) => {
                    let status = process.exit().await;
                    if status.code() == Some(*code) {
                        return Ok(());
                    }
                    Err(Error::program(&what, process.describe(status)))
                }
            }
        };
        let ends = matches!(spec.ready, Some(Ready::Exit(_)));
        tokio::select! {
            // A process that is ready and has ended in the same moment was ready.
            biased;
            ready = ready => ready?,
            status = process.exit(), if !ends => {
                return Err(Error::program(what, format!("ended before it was ready, {}", process.describe(status))));
            }
            () = tokio::time::sleep(spec.timeout) => {
                let last_words = match process.last_words() {
                    words if words.is_empty() => String::new(),
                    words => format!("; last words: {words}"),
                };
                let says = format!("not ready after {:?}{last_words}", spec.timeout);
                return Err(Error::program(what, says));
            }
        }
        self.processes.insert(name.into(), process);
        Ok(())
    }

    /// Stops the process `name` of the scenario, if it runs.
    pub async fn stop(&mut self, name: &str) {
        if let Some(process) = self.processes.shift_remove(name) {
            process.stop().await;
        }
    }

    /// The processes of the scenario that have been started and not stopped.
    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        self.processes.values()
    }

    /// Stops all processes of the scenario, the last first.
    pub async fn stop_processes(&mut self) {
        while let Some((_, process)) = self.processes.pop() {
            process.stop().await;
        }
    }

    /// Waits for the first process of the scenario that ends though it should not, and says what happened.
    pub async fn first_to_end(&self) -> Error {
        let watched = self
            .processes
            .values()
            .filter(|process| !matches!(self.scenario.processes[process.name()].ready, Some(Ready::Exit(_))));
        let mut ends: Vec<_> = watched
            .map(|process| {
                Box::pin(async move {
                    let status = process.exit().await;
                    Error::program(format!("keep {} running", process.name()), process.describe(status))
                })
            })
            .collect();
        std::future::poll_fn(|context| {
            for end in &mut ends {
                if let std::task::Poll::Ready(error) = Future::poll(end.as_mut(), context) {
                    return std::task::Poll::Ready(error);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }

    /// Starts the program of a process or step, in `node`; messages call it `name`.
    pub(crate) async fn run(
        &self,
        node: &str,
        name: &str,
        words: &[String],
        watch: Watch,
    ) -> Result<Process> {
        let (program, arguments) = words.split_first().ok_or_else(|| Error::program(name, "no program"))?;
        let mut command = self.command(node, program)?;
        command.args(arguments);
        Process::spawn(name, command, watch).await
    }

    /// Gives a link another state, and puts back what it lost when it comes up again.
    pub fn set_link(&self, name: &str, state: LinkState) -> Result<()> {
        let link = self.link(name);
        match state {
            LinkState::Down => link.set_down(true)?,
            LinkState::Blackhole => link.set_blackhole(true)?,
            LinkState::Up => {
                link.set_blackhole(false)?;
                link.set_down(false)?;
                let spec = &self.scenario.links[name];
                for node in [&spec.a.node, &spec.b.node] {
                    self.put_addresses_and_routes(node, &self.scenario.nodes[node])?;
                }
            }
        }
        Ok(())
    }

    /// Gives all links the state and the shape that the scenario begins with.
    pub fn reset_links(&self) -> Result<()> {
        for (name, link) in &self.links {
            self.set_link(name, LinkState::Up)?;
            link.set_shape(&self.scenario.links[name].shape)?;
        }
        Ok(())
    }

    /// Changes the shape of a link.
    pub fn shape_link(&self, name: &str, change: &Shape) -> Result<()> {
        let link = self.link(name);
        Ok(link.set_shape(&link.shape().changed_by(change))?)
    }

    fn make_devices(&self, node: &str, spec: &Node) -> Result<()> {
        let mut batch = Vec::new();
        for (name, device) in &spec.devices {
            batch.push(match device.kind {
                DeviceKind::Bridge => format!("link add {name} type bridge"),
                DeviceKind::Tap | DeviceKind::Tun => format!("tuntap add dev {name} mode {}", device.kind),
            });
            batch.extend(device.ports.iter().map(|port| format!("link set {port} master {name}")));
            batch.push(format!("link set {name} up"));
        }
        if batch.is_empty() { Ok(()) } else { ip_batch(self.netns(node), &batch) }
    }

    /// Also puts back what a link that was down has lost: `replace` leaves what is there.
    fn put_addresses_and_routes(&self, node: &str, spec: &Node) -> Result<()> {
        let mut batch = vec!["link set dev lo up".to_string()];
        for (dev, addresses) in self.scenario.interfaces(node) {
            for address in addresses {
                let nodad = if address.addr().is_ipv6() { " nodad" } else { "" };
                batch.push(format!("address replace {address} dev {dev}{nodad}"));
            }
        }
        batch.extend(spec.routes.iter().map(route_command));
        ip_batch(self.netns(node), &batch)
    }

    async fn set_path_manager(&self, node: &str, spec: &Node) -> Result<()> {
        let netns = self.netns(node);
        if spec.limits.is_none() && spec.endpoints.is_empty() {
            return Ok(());
        }
        let client = Client::connect(netns).await?;
        if let Some(limits) = spec.limits {
            let limits = Limits { add_addr_accepted: limits.add_addr_accepted, subflows: limits.subflows };
            client.set_limits(limits).await?;
        }
        for endpoint in &spec.endpoints {
            let ifindex = match &endpoint.dev {
                Some(dev) => netns
                    .run(|| if_nametoindex(dev.as_str()))?
                    .map_err(|error| Error::io(format!("look up interface {dev} of {node}"), error))?,
                None => 0,
            };
            let request = Endpoint {
                id: endpoint.id.map(|id| mptcp::AddrId(id.get())),
                port: endpoint.port.map_or(0, std::num::NonZero::get),
                ifindex,
                ..Endpoint::new(
                    endpoint.ip,
                    endpoint.flags.iter().copied().map(EndpointFlags::from).collect(),
                )
            };
            client.add_endpoint(&request).await?;
        }
        Ok(())
    }
}

impl From<EndpointFlag> for EndpointFlags {
    fn from(flag: EndpointFlag) -> Self {
        match flag {
            EndpointFlag::Signal => EndpointFlags::SIGNAL,
            EndpointFlag::Subflow => EndpointFlags::SUBFLOW,
            EndpointFlag::Backup => EndpointFlags::BACKUP,
            EndpointFlag::Fullmesh => EndpointFlags::FULLMESH,
            EndpointFlag::Laminar => EndpointFlags::LAMINAR,
        }
    }
}

/// Two labs of one process, of two processes, and of two users are three different things.
fn unique_name(scenario: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static BUILT: AtomicU32 = AtomicU32::new(0);
    let number = BUILT.fetch_add(1, Ordering::Relaxed);
    format!("{}-{}-{number}", scenario.replace(':', "-"), std::process::id())
}

fn set_sysctls(netns: &Netns, node: &Node) -> Result<()> {
    // What differs between distributions, and what one scenario would leave for the next.
    for (key, value) in [
        ("net.mptcp.blackhole_timeout", "0"),
        ("net.ipv4.conf.all.rp_filter", "0"),
        ("net.ipv4.conf.default.rp_filter", "0"),
        ("net.ipv6.conf.default.accept_ra", "0"),
    ] {
        if let Err(error) = mptcp::sysctl::set(netns, key, value) {
            tracing::debug!(%error, "left as it is");
        }
    }
    for (key, value) in &node.sysctls {
        mptcp::sysctl::set(netns, key, &value.to_string())?;
    }
    Ok(())
}

fn route_command(route: &Route) -> String {
    let mut words = vec!["route", "replace"].into_iter().map(String::from).collect::<Vec<_>>();
    let mut option = |name: &str, value: Option<String>| {
        words.extend(value.into_iter().flat_map(|value| [name.to_string(), value]));
    };
    option("to", Some(route.to.to_string()));
    option("via", route.via.map(|via| via.to_string()));
    option("dev", route.dev.clone());
    option("metric", route.metric.map(|metric| metric.to_string()));
    option("src", route.src.map(|src| src.to_string()));
    option("rto_min", route.rto_min.map(|time| format!("{}ms", time.as_millis())));
    for hop in &route.nexthops {
        option("nexthop", Some(format!("via {}", hop.via)));
        option("dev", hop.dev.clone());
        option("weight", hop.weight.map(|weight| weight.to_string()));
    }
    words.join(" ")
}

/// Runs `lines` as commands of ip(8) in `netns`.
fn ip_batch(netns: &Netns, lines: &[String]) -> Result<()> {
    let mut ip = Command::new("ip");
    ip.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Not by ip's own -netns, which also makes mounts private, and fails where / is no mount (a chroot).
    netns.enter_on_exec(&mut ip);
    let mut ip = ip.spawn().map_err(|error| Error::io("start ip (Debian package iproute2)", error))?;
    let sent = ip.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(lines.join("\n").as_bytes()));
    let output = ip.wait_with_output().map_err(|error| Error::io("wait for ip", error))?;
    if output.status.success() {
        return sent.map_err(|error| Error::io("give ip its commands", error));
    }
    // "RTNETLINK answers: Network is unreachable", then "Command failed -:3"
    let says = String::from_utf8_lossy(&output.stderr);
    let line =
        says.lines().find_map(|line| line.strip_prefix("Command failed -:")?.trim().parse::<usize>().ok());
    let line = line.and_then(|number| lines.get(number.checked_sub(1)?)).map_or("", String::as_str);
    let reason = says.lines().find(|line| !line.starts_with("Command failed")).unwrap_or("failed");
    Err(Error::program(format!("ip {line} (in {})", netns.name()), reason))
}

/// Waits until somebody listens on TCP port `port` in the network namespace of the process `pid`.
async fn until_listening(pid: u32, port: u16) -> Result<()> {
    while !is_listening(pid, port)? {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

fn is_listening(pid: u32, port: u16) -> Result<bool> {
    // `  0: 0100007F:1F90 00000000:0000 0A …`, 0A being TCP_LISTEN
    let listens = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next().and_then(|address| address.rsplit_once(':'));
        let state = fields.nth(1);
        local.is_some_and(|(_, hex)| u16::from_str_radix(hex, 16) == Ok(port)) && state == Some("0A")
    };
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/{pid}/net/{table}");
        match std::fs::read_to_string(&path) {
            Ok(text) if text.lines().any(listens) => return Ok(true),
            Ok(_) => {}
            // No IPv6 in this kernel, or the process has just ended, which is noticed elsewhere.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {}
            Err(error) => return Err(Error::io(format!("read {path}"), error)),
        }
    }
    Ok(false)
}
