//! Two hosts in network namespaces of their own, joined by veth pairs.
#![allow(dead_code)] // each test file uses a part

use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::process::{Child, Command};
use std::time::Duration;

use mptcp::features::KernelFeatures;
use mptcp::info::Status;
use mptcp::pm::{Event, EventKind, Events, Notice};
use mptcp::socket::{self, Options};
use mptcp::{Netns, Token, sysctl};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Longer than anything here takes on a busy machine: a deadline for failing, not a time to wait.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A namespace with `lo` up.
pub fn host() -> Netns {
    let netns = Netns::anonymous().unwrap();
    ip(&netns, "link set lo up");
    // Kernels without it have no memory of paths where MPTCP failed.
    if sysctl::get(&netns, "net.mptcp.blackhole_timeout").is_ok() {
        sysctl::set(&netns, "net.mptcp.blackhole_timeout", "0").unwrap();
    }
    netns
}

/// Hosts A and B on `paths` networks. Path N is 10.0.N.1 - 10.0.N.2 and fd00:N::1 - fd00:N::2, on devices `ethN`.
pub fn pair(paths: u8) -> (Netns, Netns) {
    let (a, b) = (host(), host());
    for n in 0..paths {
        let peer = format!("/proc/{}/fd/{}", std::process::id(), b.as_fd().as_raw_fd());
        ip(&a, &format!("link add eth{n} type veth peer name eth{n} netns {peer}"));
        for (netns, host) in [(&a, 1), (&b, 2)] {
            ip(netns, &format!("address add 10.0.{n}.{host}/24 dev eth{n}"));
            ip(netns, &format!("address add fd00:{n}::{host}/64 dev eth{n} nodad"));
            ip(netns, &format!("link set eth{n} up"));
        }
    }
    (a, b)
}

/// Runs `ip ARGS` in `netns` and returns what it printed.
pub fn ip(netns: &Netns, args: &str) -> String {
    output(netns, "ip", args)
}

/// Runs `program ARGS` in `netns` and returns what it printed; panics if it fails.
pub fn output(netns: &Netns, program: &str, args: &str) -> String {
    let mut command = Command::new(program);
    command.args(args.split_whitespace());
    netns.enter_on_exec(&mut command);
    let output = command.output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// A connection from A to B at `addr` (port 0: any), and the listener that accepted it.
pub struct Connection {
    pub listener: TcpListener,
    pub client: TcpStream,
    pub server: TcpStream,
}

pub async fn connect(a: &Netns, b: &Netns, addr: &str) -> Connection {
    connect_with(a, b, addr, &Options::default(), &Options::default()).await
}

/// The same with the options of either end.
pub async fn connect_with(a: &Netns, b: &Netns, addr: &str, on_a: &Options, on_b: &Options) -> Connection {
    let on_a = Options { netns: Some(a.clone()), ..on_a.clone() };
    let on_b = Options { netns: Some(b.clone()), ..on_b.clone() };
    let listener = socket::listen(addr.parse().unwrap(), &on_b).unwrap();
    let to = listener.local_addr().unwrap();
    let (client, accepted) = tokio::join!(socket::connect(to, &on_a), listener.accept());
    Connection { client: client.unwrap(), server: accepted.unwrap().0, listener }
}

/// The local token of a connection.
pub fn token(stream: &TcpStream) -> Token {
    match mptcp::info::of(stream).unwrap() {
        Status::Mptcp(info) => info.token.unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Sends `bytes` from `from` to `to`.
pub async fn transfer(from: &mut TcpStream, to: &mut TcpStream, bytes: usize) {
    let data = vec![7; bytes];
    let mut received = vec![0; bytes];
    let (sent, got) = tokio::join!(from.write_all(&data), to.read_exact(&mut received));
    sent.unwrap();
    got.unwrap();
    assert_eq!(data, received);
}

/// The next event that `wanted` accepts; panics at the deadline.
pub async fn event(events: &mut Events, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
    let mut others = Vec::new();
    let search = async {
        loop {
            match events.next().await.unwrap() {
                Notice::Event(event) if wanted(&event) => return event,
                notice => others.push(notice),
            }
        }
    };
    let found = tokio::time::timeout(DEADLINE, search).await;
    found.unwrap_or_else(|_| panic!("no {what}, but {others:#?}"))
}

/// The next event of `kind`.
pub async fn event_of(events: &mut Events, kind: EventKind) -> Event {
    event(events, &kind.to_string(), |event| event.kind == kind).await
}

/// Says that the running kernel lacks what a test is about, past the test harness, which keeps what a passing test
/// prints. `make kernels` collects these lines.
pub fn lacking(feature: &str, since: &str) {
    let line = format!("lacking {feature}: Linux {since} and newer\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// Does the kernel count the bytes of a connection?
pub fn counts_bytes() -> bool {
    let counts = KernelFeatures::get().byte_counters;
    if !counts {
        lacking("byte counters of a connection", "6.5");
    }
    counts
}

/// Does the kernel tell of listeners? Then of this one before its first connection.
pub async fn tells_of_listeners() -> bool {
    let a = host();
    let mut events = Events::subscribe(&a).unwrap();
    let _connection = connect(&a, &a, "127.0.0.1:0").await;
    let tells = event(&mut events, "event", |_| true).await.kind == EventKind::ListenerCreated;
    if !tells {
        lacking("LISTENER_CREATED, LISTENER_CLOSED", "6.2");
    }
    tells
}

/// A process, killed when dropped.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
