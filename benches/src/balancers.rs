//! The load balancer beside kernel forwarding and nftables: packets per second, and bulk throughput.
//!
//! Packets per second are those of a processor with nothing to do but to forward (by processor time): they come in on the balancer's
//! interface by BPF_PROG_TEST_RUN (live frames), as if a network card had received them, and a program drops them where
//! they come in on the backends. Needs root of the machine.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, Xdp};
use aya::{Ebpf, EbpfLoader, TestRun as _, TestRunOptions};
use balancer::plane::FLOOD;
use lab::process::{Process, Watch};
use lab::{Lab, Scenario};
use mptcp::Netns;
use nix::sys::resource::{UsageWho, getrusage};
use socket2::Protocol;

use crate::load::Ends;

/// What sends the service's packets on, and how it is set up in `lb`.
pub struct Contestant {
    pub name: &'static str,
    /// Commands, one a line; `{config}` is a file with `config`.
    commands: &'static str,
    /// Goes on running; prints this when it does its work.
    daemon: Option<(&'static str, &'static str)>,
    config: &'static str,
}

/// The first is what the others are compared to.
pub const CONTESTANTS: [Contestant; 4] = [
    Contestant {
        name: "kernel forwarding",
        commands: "ip route add 10.83.0.1/32 via 10.90.1.11",
        daemon: None,
        config: "",
    },
    Contestant {
        name: "kernel forwarding, to both by ports",
        commands: "ip route add 10.83.0.1/32 nexthop via 10.90.1.11 nexthop via 10.90.2.11",
        daemon: None,
        config: "",
    },
    Contestant {
        name: "nftables, jhash in a netdev hook",
        commands: "nft -f {config}",
        daemon: None,
        config: "
table netdev balancer {
    chain one {
        ether daddr set 02:00:00:00:01:0b ether saddr set 02:00:00:00:01:01 fwd to eth1
    }
    chain two {
        ether daddr set 02:00:00:00:02:0b ether saddr set 02:00:00:00:02:01 fwd to eth2
    }
    chain ingress {
        type filter hook ingress device eth0 priority 0
        ip daddr 10.83.0.1 tcp dport 80 jhash ip saddr . tcp sport mod 2 vmap { 0 : goto one, 1 : goto two }
    }
}
",
    },
    Contestant {
        name: "braid lb",
        commands: "",
        daemon: Some(("lb --config {config}", "balancing on")),
        config: r#"
interfaces = ["eth0"]
pin = false
[[service]]
name = "web"
addresses = ["10.83.0.1"]
port = 80
check.kind = "none"
[[service.backend]]
name = "one"
address = "10.90.1.11"
[[service.backend]]
name = "two"
address = "10.90.2.11"
"#,
    },
];

/// Flows whose packets take turns.
const FLOWS: u32 = 4096;

/// Packets between two looks at the clock.
const AT_ONCE: u32 = 1 << 14;

/// Ethernet, IPv4 with its checksum, and the service's port in TCP.
const HEADERS: [u8; 54] = [
    2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0x0a, 8, 0, //
    0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0x26, 0x22, 10, 81, 0, 10, 10, 83, 0, 1, //
    4, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0, 0xff, 0xff, 0, 0, 0, 0,
];
const FLAGS: usize = 47;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// A network in which a contestant does its work.
pub struct Network {
    lab: Lab,
    _daemon: Option<Process>,
}

impl Network {
    pub async fn new(contestant: &Contestant, congestion: Option<&str>, braid: &Path) -> Result<Self> {
        let mut scenario = Scenario::parse("bench", "balancer.toml", include_str!("../balancer.toml"), None)?;
        if let Some(congestion) = congestion {
            crate::set_congestion(&mut scenario, congestion);
        }
        let lab = Lab::build(&scenario).await?;
        for (node, line) in [
            ("lb", "ip link set eth0 address 02:00:00:00:00:01"),
            ("lb", "ip link set eth1 address 02:00:00:00:01:01"),
            ("lb", "ip link set eth2 address 02:00:00:00:02:01"),
            ("backends", "ip link set eth1 address 02:00:00:00:01:0b"),
            ("backends", "ip link set eth2 address 02:00:00:00:02:0b"),
            ("backends", "ip address add 10.83.0.1/32 dev lo"),
            ("lb", "ip neighbour replace 10.90.1.11 lladdr 02:00:00:00:01:0b dev eth1 nud permanent"),
            ("lb", "ip neighbour replace 10.90.2.11 lladdr 02:00:00:00:02:0b dev eth2 nud permanent"),
        ] {
            run(&lab, node, line)?;
        }
        let file = lab.work().join("balancer.config");
        std::fs::write(&file, contestant.config)?;
        let fill = |line: &str| line.replace("{config}", &file.display().to_string());
        for line in contestant.commands.lines() {
            run(&lab, "lb", &fill(line))?;
        }
        let mut daemon = None;
        if let Some((arguments, ready)) = contestant.daemon {
            let mut command = lab.command("lb", &braid.display().to_string())?;
            command.args(fill(arguments).split(' ')).env_remove("BRAID_LB_CONFIG");
            let watch = Watch { line: Some(ready.into()), ..Watch::default() };
            let process = Process::spawn(contestant.name, command, watch).await?;
            tokio::select! {
                () = process.line() => {}
                status = process.exit() => bail!("{}", process.describe(status)),
            }
            daemon = Some(process);
        }
        Ok(Network { lab, _daemon: daemon })
    }

    /// Millions of packets per second, of established flows.
    pub fn packets(&self, time: Duration) -> Result<Vec<f64>> {
        let backends = self.lab.netns("backends");
        let _sink = backends.run(sink)??;
        let (sent, seconds) = self.lab.netns("lb").run(|| -> Result<_> {
            flood(SYN, Duration::ZERO)?;
            flood(ACK, Duration::ZERO)?;
            let before = received(backends)?;
            let (sent, seconds) = flood(ACK, time)?;
            let received = received(backends)? - before;
            ensure!(received * 1000 >= sent * 999, "{received} of {sent} packets came out");
            Ok((sent, seconds))
        })??;
        Ok(vec![sent as f64 / seconds / 1e6])
    }

    /// Gigabytes per second of one TCP connection, and seconds of processor time for each: of source and sink, and of what
    /// the kernel does on the way between them.
    pub fn bulk(&self, time: Duration) -> Result<Vec<f64>> {
        let ends = Ends {
            client: self.lab.netns("client"),
            connect: (Protocol::TCP, "10.83.0.1:80".parse()?),
            server: self.lab.netns("backends"),
            listen: (Protocol::TCP, "0.0.0.0:80".parse()?),
        };
        let before = processor_time(UsageWho::RUSAGE_SELF)?;
        let (bytes, seconds) = ends.bulk(time)?;
        let gigabytes = bytes as f64 / 1e9;
        Ok(vec![gigabytes / seconds, (processor_time(UsageWho::RUSAGE_SELF)? - before) / gigabytes])
    }
}

fn run(lab: &Lab, node: &str, line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let mut command = lab.command(node, words.next().unwrap_or_default())?;
    let output = command.args(words).stdin(Stdio::null()).output().with_context(|| line.to_string())?;
    ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Packets of all flows in turn come in on eth0 of the calling thread's namespace, for `time`, but of each flow one at
/// least. How many, and in how many seconds of processor time.
fn flood(flags: u8, time: Duration) -> Result<(u64, f64)> {
    let mut headers = HEADERS;
    headers[FLAGS] = flags;
    let mut ebpf = EbpfLoader::new()
        .override_global("headers", &headers, true)
        .override_global("flows", &FLOWS, true)
        .load(FLOOD)?;
    let program: &mut Xdp = ebpf.program_mut("flood").context("no program flood")?.try_into()?;
    program.load()?;
    let frame = [headers.as_slice(), &[0; 10]].concat();
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
    let ifindex = nix::net::if_::if_nametoindex("eth0")?;
    let context: Vec<u8> =
        [0, frame.len() as u32, 0, ifindex, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let (began, before, mut sent) = (Instant::now(), processor_time(UsageWho::RUSAGE_THREAD)?, 0);
    while sent == 0 || began.elapsed() < time {
        let mut options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            repeat: AT_ONCE,
            ..Default::default()
        };
        options.attrs = options.attrs.xdp_live_frames(64);
        program.test_run(options)?;
        sent += u64::from(AT_ONCE);
    }
    Ok((sent, processor_time(UsageWho::RUSAGE_THREAD)? - before))
}

/// In seconds. What the kernel does about a packet it does, for the most part, before the thread that sent it goes on.
fn processor_time(of: UsageWho) -> Result<f64> {
    let usage = getrusage(of)?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Drops what comes in on the backends' interfaces, until it is dropped itself.
fn sink() -> Result<Ebpf> {
    let mut ebpf = Ebpf::load(FLOOD)?;
    let program: &mut SchedClassifier = ebpf.program_mut("sink").context("no program sink")?.try_into()?;
    program.load()?;
    for interface in ["eth1", "eth2"] {
        let order = TcAttachOptions::TcxOrder(LinkOrder::default());
        program.attach_with_options(interface, TcAttachType::Ingress, order)?;
    }
    Ok(ebpf)
}

/// Packets that have come in on the backends' interfaces.
fn received(backends: &Netns) -> Result<u64> {
    let text = backends.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
    let packets = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let of_backend = ["eth1", "eth2"].contains(&name.trim());
        of_backend.then(|| counters.split_whitespace().nth(1)?.parse::<u64>().ok())?
    };
    Ok(text.lines().filter_map(packets).sum())
}
