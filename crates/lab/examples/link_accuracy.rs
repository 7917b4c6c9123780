//! Measures what links do against what they were told: `cargo run --release -p lab --example link_accuracy`.
//! Needs the rights to make network namespaces: root, or `unshare -Urnm` in front.
#![allow(clippy::print_stdout)] // It prints a table.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use lab::link::{End, Link, Shape};
use mptcp::Netns;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    if let Some(mbit) = std::env::args().nth(1) {
        return bulk(mbit.parse()?, Some(20));
    }
    println!("| link | measured | configured | seen |\n|---|---|---|---|");
    for (delay, jitter) in [(1, 0), (20, 0), (60, 0), (20, 5)] {
        round_trips(delay, jitter)?;
    }
    for delay in [None, Some(20)] {
        for mbit in [1, 15, 30, 200, 500] {
            bulk(mbit, delay)?;
        }
    }
    for percent in [0.1, 1.0, 10.0] {
        losses(percent)?;
    }
    Ok(())
}

struct Pair {
    link: Link,
    a: Netns,
    b: Netns,
}

impl Pair {
    fn new(shape: &Shape) -> Result<Pair> {
        let (a, b) = (Netns::anonymous()?, Netns::anonymous()?);
        let ends = [&a, &b].map(|netns| End { netns, ifname: "eth0" });
        let link = Link::create(ends[0], ends[1], shape)?;
        for (netns, host) in [(&a, 1), (&b, 2)] {
            let mut ip = std::process::Command::new("ip");
            ip.args(["addr", "add", &format!("10.9.0.{host}/24"), "dev", "eth0"]);
            netns.enter_on_exec(&mut ip);
            ip.status()?;
        }
        Ok(Pair { link, a, b })
    }

    fn udp(&self) -> Result<(UdpSocket, UdpSocket)> {
        let a = self.a.run(|| UdpSocket::bind("10.9.0.1:7000"))??;
        let b = self.b.run(|| UdpSocket::bind("10.9.0.2:7000"))??;
        a.connect("10.9.0.2:7000")?;
        b.connect("10.9.0.1:7000")?;
        Ok((a, b))
    }

    fn kind(&self) -> &'static str {
        if self.link.is_emulated() { "emulated" } else { "kernel" }
    }
}

fn round_trips(delay_ms: u64, jitter_ms: u64) -> Result<()> {
    let shape = Shape {
        delay: Some(Duration::from_millis(delay_ms)),
        jitter: Some(Duration::from_millis(jitter_ms)),
        ..Shape::default()
    };
    let pair = Pair::new(&shape)?;
    let (a, b) = pair.udp()?;
    let mut times = Vec::new();
    for n in 0..201 {
        let start = Instant::now();
        a.send(&[0; 56])?;
        b.recv(&mut [0; 56])?;
        b.send(&[0; 56])?;
        a.recv(&mut [0; 56])?;
        // The first one waits for address resolution.
        if n > 0 {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    println!(
        "| {} | round trip of 200 datagrams | {delay_ms} ms ± {jitter_ms} ms each way | min {:.2}, mean {mean:.2}, median {:.2}, 99 % {:.2} ms |",
        pair.kind(),
        times[0],
        times[100],
        times[198]
    );
    Ok(())
}

fn bulk(mbit: u64, delay_ms: Option<u64>) -> Result<()> {
    const SECONDS: u64 = 6;
    let delay = delay_ms.map(Duration::from_millis);
    let shape = Shape { rate: Some(mbit * 1_000_000), delay, ..Shape::default() };
    let pair = Pair::new(&shape)?;
    let listener = pair.b.run(|| TcpListener::bind("10.9.0.2:7000"))??;
    let mut sender = pair.a.run(|| TcpStream::connect("10.9.0.2:7000"))??;
    let (mut receiver, _) = listener.accept()?;
    // The link goes before the connection has ended.
    receiver.set_read_timeout(Some(Duration::from_secs(1)))?;
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while receiver.read(&mut buffer).is_ok_and(|n| n > 0) {}
    });
    let chunk = vec![0; 1 << 16];
    let (mut first, mut cpu_before) = (None, 0.0);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(SECONDS) {
        sender.write_all(&chunk)?;
        // Past slow start.
        if first.is_none() && start.elapsed() > Duration::from_secs(2) {
            cpu_before = emulator_cpu()?;
            first = Some(pair.link.counters()?);
        }
    }
    let (first, last) = (first.unwrap_or_default(), pair.link.counters()?);
    let cpu = emulator_cpu()? - cpu_before;
    let time = (last.at - first.at).as_secs_f64();
    let seen = (last.a_to_b_bytes - first.a_to_b_bytes) as f64 * 8.0 / time / 1e6;
    let cpu = if pair.link.is_emulated() {
        format!(", {:.0} % of a core", cpu / time * 100.0)
    } else {
        String::new()
    };
    println!(
        "| {} | bulk TCP, {time:.0} s | {shape} | {seen:.2} Mbit/s ({:+.1} %), {} frames dropped{cpu} |",
        pair.kind(),
        (seen / mbit as f64 - 1.0) * 100.0,
        pair.link.drops()?.a_to_b
    );
    drop((sender, pair));
    let _ended = reader.join();
    Ok(())
}

fn losses(percent: f64) -> Result<()> {
    const FRAMES: u64 = 50_000;
    let pair = Pair::new(&Shape { loss: Some(percent / 100.0), ..Shape::default() })?;
    let (a, _b) = pair.udp()?;
    for n in 0..FRAMES {
        a.send(&[0; 56])?;
        if n % 20 == 0 {
            std::thread::sleep(Duration::from_micros(300));
        }
    }
    let seen = pair.link.drops()?.a_to_b as f64 / FRAMES as f64 * 100.0;
    println!("| {} | {FRAMES} datagrams | {percent} % loss | {seen:.2} % |", pair.kind());
    Ok(())
}

/// Seconds of processor time that the emulator's thread has taken.
fn emulator_cpu() -> Result<f64> {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let stat = std::fs::read_to_string(task?.path().join("stat"))?;
        let Some((name, rest)) = stat.rsplit_once(')') else { continue };
        if name.contains("(link ") {
            ticks +=
                rest.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum::<u64>();
        }
    }
    // USER_HZ is 100.
    Ok(ticks as f64 / 100.0)
}
