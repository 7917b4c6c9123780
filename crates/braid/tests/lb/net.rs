//! The network of these tests, with a balancer on a segment that it shares with the router and the backends:
//!
//! ```text
//! client eth0 10.81.0.10 ── router ──┐            10.83.0.1 and fd83::1 are the service's,
//!        eth1 10.81.1.10 ──   │      ├─ lb        on lo of each backend
//!        eth2 10.81.2.10 ──   │      ├─ lb-2      idle in most tests
//!                                    ├─ app-1 ... app-N
//! ```

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use lab::process::{Process, Watch};
use lab::{Lab, Scenario};
use mptcp::pm::{Client, Endpoint, EndpointFlags, Limits};
use mptcp::socket::{self, Options, Protocol};
use mptcp::{Netns, counters, diag, sysctl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const BRAID: &str = env!("CARGO_BIN_EXE_braid");
/// Only a failing test waits this long.
pub const PATIENCE: Duration = Duration::from_secs(120);
pub const VIP: &str = "10.83.0.1:80";
pub const VIP6: &str = "[fd83::1]:80";

/// Is this root of the machine? Says why not, for a test that then ends.
pub fn may_load_bpf() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    let whole = map.split_whitespace().eq(["0", "0", "4294967295"]);
    let root = nix::unistd::geteuid().is_root();
    if !(whole && root) {
        // Not println, which the test harness keeps to itself.
        let why = "skipped: only root of the machine loads BPF programs, not root of a user namespace\n";
        std::io::stderr().write_all(why.as_bytes()).unwrap();
    }
    whole && root
}

pub struct Net {
    pub lab: Lab,
    pub backends: usize,
    /// Holds a mount namespace with a BPF file system beside the node's directory for locks, which go with it.
    mounts: Process,
}

impl Net {
    /// With `backends` backends, each with an MPTCP echo server.
    pub async fn new(backends: usize) -> Self {
        Self::with(backends, "").await
    }

    /// `shape`: of the client's links, as in a scenario file.
    pub async fn with(backends: usize, shape: &str) -> Self {
        let shape = if shape.is_empty() { String::new() } else { format!("shape = {{ {shape} }}\n") };
        let mut text = String::from(
            r#"
            title = "a balancer on a segment"
            [nodes.client]
            sysctls = { "net.mptcp.blackhole_timeout" = 0 }
            [nodes.router]
            sysctls = { "net.ipv4.ip_forward" = 1, "net.ipv6.conf.all.forwarding" = 1, "net.ipv4.conf.all.send_redirects" = 0 }
            routes = [{ to = "10.83.0.1/32", via = "10.90.0.2" }, { to = "fd83::1/128", via = "fd90::2" }]
            [nodes.lb]
            private = ["/run/braid-lb"]
            routes = [{ to = "0.0.0.0/0", via = "10.90.0.1" }, { to = "::/0", via = "fd90::1" }]
            [nodes.lb-2]
            routes = [{ to = "0.0.0.0/0", via = "10.90.0.1" }, { to = "::/0", via = "fd90::1" }]
            [nodes.switch]
            [links.lan-router]
            a = { node = "router", dev = "lan", addresses = ["10.90.0.1/24", "fd90::1/64"] }
            b = { node = "switch", dev = "router" }
            [links.lan-lb]
            a = { node = "lb", dev = "eth0", addresses = ["10.90.0.2/24", "fd90::2/64"] }
            b = { node = "switch", dev = "lb" }
            [links.lan-lb-2]
            a = { node = "lb-2", dev = "eth0", addresses = ["10.90.0.3/24", "fd90::3/64"] }
            b = { node = "switch", dev = "lb2" }
            "#,
        );
        for n in 0..3 {
            write!(
                text,
                "[links.path{n}]\n\
                 a = {{ node = \"client\", dev = \"eth{n}\", addresses = [\"10.81.{n}.10/24\", \"fd81:{n}::10/64\"] }}\n\
                 b = {{ node = \"router\", dev = \"eth{n}\", addresses = [\"10.81.{n}.1/24\", \"fd81:{n}::1/64\"] }}\n\
                 {shape}\
                 [[nodes.client.routes]]\nto = \"0.0.0.0/0\"\nvia = \"10.81.{n}.1\"\nmetric = {metric}\n\
                 [[nodes.client.routes]]\nto = \"::/0\"\nvia = \"fd81:{n}::1\"\nmetric = {metric}\n",
                metric = n + 10
            )
            .unwrap();
        }
        for n in 1..=backends {
            write!(
                text,
                "[nodes.app-{n}]\n\
                 sysctls = {{ \"net.mptcp.blackhole_timeout\" = 0, \"net.ipv4.conf.all.arp_ignore\" = 1, \
                 \"net.ipv4.conf.all.arp_announce\" = 2 }}\n\
                 limits = {{ subflows = 8 }}\n\
                 routes = [{{ to = \"0.0.0.0/0\", via = \"10.90.0.1\" }}, {{ to = \"::/0\", via = \"fd90::1\" }}]\n\
                 [links.lan-{n}]\n\
                 a = {{ node = \"app-{n}\", dev = \"eth0\", addresses = [\"10.90.0.{host}/24\", \"fd90::{host}/64\"] }}\n\
                 b = {{ node = \"switch\", dev = \"app{n}\" }}\n",
                host = n + 10
            )
            .unwrap();
        }
        // Two ends of each connection are in this process.
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
        let scenario = Scenario::parse("lb-test", "lb-test.toml", &text, None).unwrap();
        let lab = Lab::build(&scenario).await.unwrap();
        let mut holder = lab.command("lb", "unshare").unwrap();
        holder.args(["--mount", "--propagation", "private", "sh", "-euc"]);
        holder.arg("mount -t bpf bpf /sys/fs/bpf; echo mounted; exec sleep 100000");
        let watch = Watch { line: Some("mounted".into()), ..Watch::default() };
        let mounts = Process::spawn("unshare", holder, watch).await.unwrap();
        mounts.expect_ready().await;
        let net = Net { lab, backends, mounts };
        net.ok("switch", "ip link add br0 type bridge");
        net.ok("switch", "ip link set br0 up");
        let apps = (1..=backends).map(|n| format!("app{n}"));
        for port in ["router", "lb", "lb2"].into_iter().map(String::from).chain(apps) {
            net.ok("switch", &format!("ip link set {port} master br0"));
        }
        for n in 1..=backends {
            let app = format!("app-{n}");
            net.ok(&app, "ip addr add 10.83.0.1/32 dev lo");
            net.ok(&app, "ip addr add fd83::1/128 dev lo nodad");
            net.serve(&app, 80);
        }
        net
    }

    /// Client addresses that join by themselves: those of its second and third interface.
    pub async fn joins(&self) {
        let pm = Client::connect(self.lab.netns("client")).await.unwrap();
        pm.set_limits(Limits { subflows: 8, add_addr_accepted: 8 }).await.unwrap();
        for n in 1..3 {
            for ip in [format!("10.81.{n}.10"), format!("fd81:{n}::10")] {
                let endpoint = Endpoint::new(ip.parse().unwrap(), EndpointFlags::SUBFLOW);
                pm.add_endpoint(&endpoint).await.unwrap();
            }
        }
    }

    /// An echo server in `node`, in this process, until the runtime ends.
    pub fn serve(&self, node: &str, port: u16) {
        let options = Options { netns: Some(self.lab.netns(node).clone()), ..Options::default() };
        let listener = socket::listen_everywhere(port, &options).unwrap();
        tokio::spawn(async move {
            loop {
                let Ok((mut stream, _)) = listener.accept().await else { continue };
                tokio::spawn(async move {
                    let (mut reader, mut writer) = stream.split();
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
    }

    pub fn output(&self, node: &str, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        command.args(words).stdin(Stdio::null());
        self.lab.netns(node).enter_on_exec(&mut command);
        command.output().unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    pub fn ok(&self, node: &str, line: &str) -> String {
        let output = self.output(node, line);
        assert!(output.status.success(), "{node}: {line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A file for `braid lb`: all backends, checked quickly; `more` goes into the service.
    pub fn config(&self, top: &str, more: &str, of_backend: impl Fn(usize) -> String) -> PathBuf {
        let mut text = format!(
            "name = \"{}\"\ninterfaces = [\"eth0\"]\n{top}\n[[service]]\nname = \"web\"\naddresses = [\"10.83.0.1\", \
             \"fd83::1\"]\nport = 80\n{more}\n[service.check]\ninterval = \"200ms\"\ntimeout = \"5s\"\nfall = 2\n",
            self.name()
        );
        for n in 1..=self.backends {
            let of = of_backend(n);
            if of == "absent" {
                continue;
            }
            write!(text, "[[service.backend]]\nname = \"app-{n}\"\naddress = \"10.90.0.{}\"\n{of}\n", n + 10)
                .unwrap();
        }
        let file = self.lab.work().join("lb.toml");
        std::fs::write(&file, text).unwrap();
        file
    }

    pub fn name(&self) -> &str {
        &self.lab.card().name
    }

    /// A balancer that balances already.
    pub async fn balancer(&self, file: &std::path::Path) -> Process {
        let process = self.start_balancer("lb", file).await;
        process.expect_ready().await;
        process
    }

    pub async fn start_balancer(&self, node: &str, file: &std::path::Path) -> Process {
        let mut command = self.braid(node, &["lb", "--config", file.to_str().unwrap()]);
        command.env("BRAID_LOG", "info").process_group(0);
        mptcp::sys::die_with_parent(&mut command);
        let watch = Watch { line: Some("balancing on".into()), ..Watch::default() };
        Process::spawn("braid lb", command, watch).await.unwrap()
    }

    /// `braid lb agent` on backend `n`, which has set it up already.
    pub async fn agent(&self, n: usize, arguments: &[&str]) -> Process {
        let mut command = self.braid(&format!("app-{n}"), &[&["lb", "agent"], arguments].concat());
        command.env("BRAID_LOG", "info").process_group(0);
        mptcp::sys::die_with_parent(&mut command);
        let watch = Watch { line: Some("taking packets".into()), ..Watch::default() };
        let process = Process::spawn("braid lb agent", command, watch).await.unwrap();
        process.expect_ready().await;
        process
    }

    /// Takes away what is set up on the backends, for an agent to do it.
    pub fn bare(&self) {
        for n in 1..=self.backends {
            let app = format!("app-{n}");
            self.ok(&app, "ip address delete 10.83.0.1/32 dev lo");
            self.ok(&app, "ip address delete fd83::1/128 dev lo");
            for key in ["arp_ignore", "arp_announce"] {
                sysctl::set(self.lab.netns(&app), &format!("net.ipv4.conf.all.{key}"), "0").unwrap();
            }
        }
    }

    /// `braid` in `node`, where it sees the test's BPF file system.
    pub fn braid(&self, node: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.mounts.pid().to_string(), "--mount", BRAID]).args(arguments);
        command.env_remove("BRAID_LB_CONFIG").stdin(Stdio::null());
        self.lab.netns(node).enter_on_exec(&mut command);
        command
    }

    /// Ends a pinned balancer, tables and all.
    pub async fn down(&self, balancer: Process) {
        let output = self.braid("lb", &["lb", "down", self.name()]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        balancer.exit().await;
    }

    /// A process that sees the test's BPF file system.
    pub fn holder(&self) -> u32 {
        self.mounts.pid()
    }

    /// What `braid lb status --json` prints.
    pub fn status(&self) -> Value {
        self.status_of(self.name())
    }

    /// The same of another balancer.
    pub fn status_of(&self, name: &str) -> Value {
        let output = self.braid("lb", &["lb", "status", name, "--json"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// A counter in a status, of those that belong to no backend.
    pub fn counted(&self, status: &Value, name: &str) -> u64 {
        status["counters"][name].as_u64().unwrap()
    }

    /// Waits until backend `n` has this state.
    pub async fn state(&self, n: usize, state: &str) {
        let name = format!("app-{n}");
        until(&format!("{name} {state}"), async || {
            let status = self.status();
            let backends = status["services"][0]["backends"].as_array().unwrap().clone();
            backends.iter().any(|b| b["name"] == *name && b["state"] == *state).then_some(())
        })
        .await;
    }

    /// `count` connections of the client to `to`, each having echoed something. A client opens its joins when the
    /// server has acknowledged data.
    pub async fn connect(&self, count: usize, to: &str) -> Vec<TcpStream> {
        self.connect_by(Protocol::Mptcp, count, to).await
    }

    pub async fn connect_by(&self, protocol: Protocol, count: usize, to: &str) -> Vec<TcpStream> {
        let mut streams = Vec::new();
        let mut begun = JoinSet::new();
        for _ in 0..count {
            if begun.len() == 50 {
                streams.push(begun.join_next().await.unwrap().unwrap());
            }
            let netns = Some(self.lab.netns("client").clone());
            let options = Options { netns, protocol, ..Options::default() };
            let to = to.to_string();
            begun.spawn(async move {
                let give_up = Instant::now() + PATIENCE;
                let mut stream = loop {
                    match socket::dial(&to, &options).await {
                        Ok(stream) => break stream,
                        Err(error) => assert!(Instant::now() < give_up, "{error}"),
                    }
                };
                echo(&mut stream).await;
                stream
            });
        }
        streams.extend(begun.join_all().await);
        streams
    }

    /// Subflows of each of the client's connections.
    pub async fn subflows(&self) -> HashMap<mptcp::Token, usize> {
        let connections = diag::connections(self.lab.netns("client")).await.unwrap();
        let established = |c: &diag::Connection| c.subflows.iter().filter(|s| s.state == "ESTAB").count();
        connections.iter().filter(|c| c.state == "ESTAB").map(|c| (c.token, established(c))).collect()
    }

    /// Waits until each of the client's `count` connections has `wanted` subflows.
    pub async fn all_joined(&self, count: usize, wanted: usize) {
        let mut last = HashMap::new();
        let give_up = Instant::now() + PATIENCE;
        while Instant::now() < give_up {
            last = self.subflows().await;
            if last.len() == count && last.values().all(|subflows| *subflows == wanted) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let whole = last.values().filter(|subflows| **subflows == wanted).count();
        panic!("{whole} of {} connections have {wanted} subflows", last.len());
    }

    /// The sum of a counter over all backends.
    pub fn on_backends(&self, counter: &str) -> u64 {
        (1..=self.backends).map(|n| self.counter(&format!("app-{n}"), counter)).sum()
    }

    pub fn counter(&self, node: &str, counter: &str) -> u64 {
        let all = counters::read(self.lab.netns(node)).unwrap();
        all.iter().find(|c| c.name == counter).map_or(0, |c| c.value)
    }

    /// MPTCP connections on each backend.
    pub async fn connections_of(&self, n: usize) -> usize {
        let netns: &Netns = self.lab.netns(&format!("app-{n}"));
        diag::connections(netns).await.unwrap().iter().filter(|c| c.state == "ESTAB").count()
    }
}

/// Data that go back and forth over streams all the time, each byte checked.
pub struct Traffic {
    rounds: Vec<Arc<AtomicU64>>,
    tasks: JoinSet<()>,
}

impl Traffic {
    pub fn over(streams: Vec<TcpStream>) -> Self {
        let mut traffic = Traffic { rounds: Vec::new(), tasks: JoinSet::new() };
        for (number, mut stream) in streams.into_iter().enumerate() {
            let rounds = Arc::new(AtomicU64::new(0));
            traffic.rounds.push(Arc::clone(&rounds));
            traffic.tasks.spawn(async move {
                loop {
                    let round = rounds.load(Relaxed);
                    let sent: Vec<u8> =
                        (0..8192).map(|n| (n * 7 + round + number as u64 * 31) as u8).collect();
                    let mut back = vec![0; sent.len()];
                    if stream.write_all(&sent).await.is_err() || stream.read_exact(&mut back).await.is_err() {
                        return; // which `go_on` notices
                    }
                    assert!(sent == back, "stream {number}, round {round}: other bytes came back");
                    rounds.store(round + 1, Relaxed);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
        }
        traffic
    }

    pub fn len(&self) -> usize {
        self.rounds.len()
    }

    /// Waits until all streams have moved data to the server and back, from now on.
    pub async fn all_go_on(&mut self) {
        self.go_on(self.len()).await;
    }

    /// The same of at least `streams` of them.
    pub async fn go_on(&mut self, streams: usize) {
        let before: Vec<u64> = self.rounds.iter().map(|rounds| rounds.load(Relaxed)).collect();
        until(&format!("traffic on {streams} streams"), async || {
            while let Some(ended) = self.tasks.try_join_next() {
                ended.unwrap();
            }
            assert!(self.tasks.len() >= streams, "{} of {} streams live", self.tasks.len(), self.len());
            // The round under way may have been answered before.
            let moved =
                self.rounds.iter().zip(&before).filter(|(now, before)| now.load(Relaxed) > *before + 1);
            (moved.count() >= streams).then_some(())
        })
        .await;
    }
}

/// Sends something over `stream` and awaits it back.
pub async fn echo(stream: &mut TcpStream) {
    let exchange = async {
        stream.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"ping");
    };
    tokio::time::timeout(PATIENCE, exchange).await.expect("an echo comes back");
}

/// Asks again and again until there is an answer.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < give_up, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub trait Ready {
    async fn expect_ready(&self);
}

impl Ready for Process {
    async fn expect_ready(&self) {
        let ready = tokio::time::timeout(PATIENCE, async {
            tokio::select! {
                () = self.line() => {}
                status = self.exit() => panic!("{}", self.describe(status)),
            }
        });
        ready.await.unwrap_or_else(|_| panic!("not ready: {}", self.last_words()));
    }
}
