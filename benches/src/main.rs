//! Measures Braid's chain of proxies beside direct connections and beside chains of peers, and its load balancer beside what
//! the kernel has.
//!
//! Each round measures every contestant once, in a network made for that one measurement, so that what else the
//! machine does meets all alike. Compared are the measurements of one round; the tables give the least, the
//! median and the greatest over the rounds.
#![allow(clippy::print_stdout, reason = "the tables are what it is for")]

mod balancers;
mod contestants;
mod load;
mod sockets;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use lab::{Lab, Scenario};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::Protocol;

use crate::balancers::Network;
use crate::contestants::{CONTESTANTS, Contestant, Proxy, Way};
use crate::load::Ends;

/// Measure Braid's chain of proxies beside direct connections and peers
#[derive(Debug, Parser)]
struct Args {
    /// Measurements of each contestant
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of a transfer
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Connections held at once; a tenth for programs that start a process for each
    #[arg(long, default_value_t = 5000)]
    idle: usize,
    /// Only these tables
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "bulk,conversations,idle,shaped,sockets,lb-packets,lb-bulk"
    )]
    only: Vec<Kind>,
    /// Only contestants whose names contain this; may be given several times
    #[arg(long, default_value = "")]
    name: Vec<String>,
    /// TCP congestion control in both hosts [default: this machine's]
    #[arg(long)]
    congestion: Option<String>,
    /// The braid program [default: the one beside this program]
    #[arg(long)]
    braid: Option<PathBuf>,
    /// What this program is started with by itself: make TCP sockets and print what one takes
    #[arg(long, hide = true, value_name = "PROTOCOL")]
    make_sockets: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Bulk,
    Conversations,
    Idle,
    Shaped,
    Sockets,
    LbPackets,
    LbBulk,
}

impl Kind {
    /// What each column holds; the first is also given as a share of the direct MPTCP connection's.
    fn columns(self) -> &'static [&'static str] {
        match self {
            Kind::Bulk => &["GB/s", "CPU-s per GB"],
            Kind::Conversations => &["connections per second", "p50 ms", "p99 ms", "CPU-ms per connection"],
            Kind::Idle => &["KiB per idle connection"],
            Kind::Sockets => &["us per socket"],
            Kind::LbPackets => &["million packets per second"],
            Kind::LbBulk => &["GB/s", "CPU-s per GB"],
            Kind::Shaped => &["share of 2 x 200 Mbit/s", "CPU-s per GB"],
        }
    }

    fn title(self) -> &'static str {
        match self {
            Kind::Bulk => "Bulk transfer over two paths as fast as the machine",
            Kind::Conversations => "Short connections: connect, 64 bytes each way, close; eight at once",
            Kind::Idle => {
                "Memory of both proxies (PSS) while connections are idle, each after 64 bytes each way"
            }
            Kind::Sockets => "A socket made and closed, 10,000 times",
            Kind::LbPackets => "Packets to a service with two backends, of 4,096 established flows in turn",
            Kind::LbBulk => "Bulk transfer to a service with two backends, one TCP connection",
            Kind::Shaped => "Bulk transfer over two paths of 200 Mbit/s each, Ethernet headers counted",
        }
    }
}

impl Args {
    fn braid(&self) -> Result<PathBuf> {
        let braid = match &self.braid {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("braid"),
        };
        ensure!(braid.exists(), "{} is not there: cargo build --release -p braid", braid.display());
        Ok(braid)
    }
}

/// Both paths together, in bits per second; see network.toml.
const SHAPED_SUM: f64 = 400e6;

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(protocol) = args.make_sockets {
        println!("{}", sockets::make(protocol)?);
        return Ok(());
    }
    let root = lab::privilege::has();
    lab::privilege::enter()?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    println!("{}", machine(&args)?);
    for &kind in &args.only {
        if kind == Kind::Sockets {
            table_of_sockets(&args)?;
            continue;
        }
        if matches!(kind, Kind::LbPackets | Kind::LbBulk) {
            if !root {
                println!("\n{}: left out, since BPF needs root of the machine", kind.title());
                continue;
            }
            runtime.block_on(table_of_balancers(kind, &args))?;
            continue;
        }
        let entrants: Vec<&Contestant> = CONTESTANTS
            .iter()
            .filter(|c| {
                let in_table = match c.way {
                    Way::Direct { from, .. } => {
                        kind != Kind::Idle && (kind != Kind::Shaped || from == "client")
                    }
                    _ => true,
                };
                in_table && args.name.iter().any(|part| c.name.contains(part))
            })
            .collect();
        let mut results: Vec<Vec<Vec<f64>>> = vec![Vec::new(); entrants.len()];
        for round in 0..args.rounds {
            for (entrant, results) in entrants.iter().zip(&mut results) {
                let result = runtime.block_on(measure(entrant, kind, &args));
                results.push(result.with_context(|| format!("{}, {kind:?}, round {round}", entrant.name))?);
            }
        }
        let names: Vec<&str> = entrants.iter().map(|entrant| entrant.name).collect();
        table(kind, &names, "direct MPTCP", &results);
    }
    Ok(())
}

/// One contestant, once.
async fn measure(contestant: &Contestant, kind: Kind, args: &Args) -> Result<Vec<f64>> {
    let variant = (kind == Kind::Shaped).then_some("shaped");
    let mut scenario = Scenario::parse("bench", "network.toml", include_str!("../network.toml"), variant)?;
    if let Some(congestion) = &args.congestion {
        set_congestion(&mut scenario, congestion);
    }
    let lab = Lab::build(&scenario).await?;
    let braid = args.braid()?;

    let (mut proxies, source, ends) = match contestant.way {
        Way::Direct { from, protocol, to } => {
            (Vec::new(), from, [to, "0.0.0.0:5201"].map(|addr| (protocol, addr)))
        }
        Way::Chain { command, .. } | Way::Forks { command } => {
            let config = if let Way::Chain { config, .. } = contestant.way { config } else { "" };
            let start = |node, protocols, port, to| {
                Proxy::start(&lab, node, protocols, (port, to), (command, config), &braid)
            };
            let server = start("server", ["mptcp", "tcp"], 4444, "127.0.0.1:5201")?;
            let client = start("client", ["tcp", "mptcp"], 5555, "10.123.200.2:4444")?;
            let ends = ["127.0.0.1:5555", "127.0.0.1:5201"].map(|addr| (Protocol::TCP, addr));
            (vec![client, server], "client", ends)
        }
    };
    let [connect, listen] =
        ends.map(|(protocol, addr)| (protocol, addr.parse().expect("a constant address")));
    let ends = Ends { client: lab.netns(source), connect, server: lab.netns("server"), listen };
    let time = Duration::from_secs_f64(args.seconds);
    let cpu = |proxies: &[Proxy]| proxies.iter().map(Proxy::cpu).sum::<f64>();
    let memory = |proxies: &[Proxy]| proxies.iter().map(Proxy::memory).sum::<u64>() as f64;
    let result = match kind {
        Kind::Bulk | Kind::Shaped => {
            let before = cpu(&proxies);
            let (bytes, seconds) = ends.bulk(time)?;
            let gigabytes = bytes as f64 / 1e9;
            let rate = gigabytes / seconds;
            let rate = if kind == Kind::Shaped { rate * 8e9 / SHAPED_SUM } else { rate };
            vec![rate, (cpu(&proxies) - before) / gigabytes]
        }
        Kind::Conversations => {
            let before = cpu(&proxies);
            let took = ends.conversations(time)?;
            let each = (cpu(&proxies) - before) * 1e3 / took.len() as f64;
            let quantile =
                |q: f64| took.get((took.len() as f64 * q) as usize).copied().unwrap_or(f64::NAN) * 1e3;
            vec![took.len() as f64 / args.seconds, quantile(0.5), quantile(0.99), each]
        }
        Kind::Sockets | Kind::LbPackets | Kind::LbBulk => unreachable!("have tables of their own"),
        Kind::Idle => {
            let before = memory(&proxies);
            // Ten thousand processes would measure the machine's patience.
            let count = if let Way::Forks { .. } = contestant.way { args.idle / 10 } else { args.idle };
            let during = ends.idle(count, || memory(&proxies))?;
            vec![(during - before) / count as f64 / 1024.0]
        }
    };
    proxies.clear();
    Ok(result)
}

fn set_congestion(scenario: &mut Scenario, congestion: &str) {
    for node in scenario.nodes.values_mut() {
        let value = lab::scenario::Sysctl::Text(congestion.into());
        node.sysctls.insert("net.ipv4.tcp_congestion_control".into(), value);
    }
}

/// By contestant, then by round, then by column. The first column is also given as a share of that of `whole`.
fn table(kind: Kind, names: &[&str], whole: &str, results: &[Vec<Vec<f64>>]) {
    let limit = names.iter().position(|name| *name == whole);
    println!("\n## {}\n", kind.title());
    print!("| |");
    for column in kind.columns() {
        print!(" {column} |");
    }
    println!("{}", if limit.is_some() { format!(" of {whole} |") } else { String::new() });
    println!("|---|{}{}", "---|".repeat(kind.columns().len()), if limit.is_some() { "---|" } else { "" });
    for (name, rounds) in names.iter().zip(results) {
        print!("| {name} |");
        for column in 0..kind.columns().len() {
            print!(" {} |", spread(rounds.iter().map(|round| round[column])));
        }
        if let Some(limit) = limit {
            let shares = rounds.iter().zip(&results[limit]).map(|(round, limit)| round[0] / limit[0]);
            print!(" {} |", spread(shares));
        }
        println!();
    }
}

/// The median, and in brackets the least and the greatest.
fn spread(values: impl Iterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(greatest)) = (values.first(), values.last()) else { return "-".into() };
    let median = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
    if *greatest == 0.0 {
        return "-".into();
    }
    let places = if median >= 100.0 { 0 } else { 2 };
    format!("{median:.places$} ({least:.places$} to {greatest:.places$})")
}

fn table_of_sockets(args: &Args) -> Result<()> {
    let braid = args.braid()?;
    let mut results = sockets::WAYS.map(|_| Vec::new());
    for _ in 0..args.rounds {
        for ((_, prefix, protocol), results) in sockets::WAYS.into_iter().zip(&mut results) {
            results.push(sockets::measure(prefix, protocol, &braid)?);
        }
    }
    println!("\n## {}\n\n| | us per socket | of alone |\n|---|---|---|", Kind::Sockets.title());
    for ((name, ..), rounds) in sockets::WAYS.iter().zip(&results) {
        let shares = rounds.iter().zip(&results[0]).map(|(time, alone)| time / alone);
        println!("| {name} | {} | {} |", spread(rounds.iter().copied()), spread(shares));
    }
    Ok(())
}

async fn table_of_balancers(kind: Kind, args: &Args) -> Result<()> {
    let braid = args.braid()?;
    let time = Duration::from_secs_f64(args.seconds);
    let entrants: Vec<_> = balancers::CONTESTANTS
        .iter()
        .filter(|contestant| args.name.iter().any(|part| contestant.name.contains(part)))
        .collect();
    let mut results = vec![Vec::new(); entrants.len()];
    for round in 0..args.rounds {
        for (contestant, results) in entrants.iter().zip(&mut results) {
            let network = Network::new(contestant, args.congestion.as_deref(), &braid).await?;
            let result = if kind == Kind::LbPackets { network.packets(time) } else { network.bulk(time) };
            results.push(result.with_context(|| format!("{}, {kind:?}, round {round}", contestant.name))?);
        }
    }
    let names: Vec<&str> = entrants.iter().map(|entrant| entrant.name).collect();
    table(kind, &names, balancers::CONTESTANTS[0].name, &results);
    Ok(())
}

/// What was measured where, and how to do it again.
fn machine(args: &Args) -> Result<String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("\t: unknown");
    let congestion = match &args.congestion {
        Some(name) => name.clone(),
        None => read("/proc/sys/net/ipv4/tcp_congestion_control"),
    };
    Ok(format!(
        "{} x {}, Linux {}, congestion control {}, load average {}\n{}",
        std::thread::available_parallelism()?,
        model.trim_start_matches(['\t', ':', ' ']),
        read("/proc/sys/kernel/osrelease").trim(),
        congestion.trim(),
        read("/proc/loadavg").split(' ').next().unwrap_or_default(),
        std::env::args().collect::<Vec<_>>().join(" "),
    ))
}
