//! Switches of the primary subflow under load and at bad moments, on the kernel's MPTCP.

use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Lab, Scenario};
use mptcp::diag::{self, Connection, SubflowFlags};
use mptcp::pm::{Address, Client, Endpoint, EndpointFlags, Events};
use mptcp::socket::{self, Options};
use mptcp::{AddrId, Netns};
use steer::primary::{BOUND, Outcome, Reason, Report, Switch, Via, Wanted, switch, switch_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Longer than anything here takes on a busy machine: a deadline for failing, not a time to wait.
const DEADLINE: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(30);

/// A client with two addresses and a server with one; both of the client's links lead to it. The server has the
/// userspace path manager, and somebody who listens to its events.
struct Net {
    lab: Lab,
    listener: TcpListener,
    _joins_are_accepted: Events,
}

const SERVER: &str = "10.0.1.1:80";
const FIRST: &str = "10.0.1.2";
const SECOND: &str = "10.0.2.2";

const NETWORK: &str = r#"
    title = "two paths to one address"
    [nodes.client]
    limits = { subflows = 2 }
    endpoints = [{ ip = "10.0.2.2", dev = "eth1", flags = ["subflow"] }]
    routes = [{ to = "10.0.1.0/24", via = "10.0.2.1", dev = "eth1", metric = 10 }]
    [nodes.server]
    sysctls = { "net.mptcp.pm_type" = 1 }
    [links.first]
    a = { node = "client", dev = "eth0", addresses = ["10.0.1.2/24"] }
    b = { node = "server", dev = "eth0", addresses = ["10.0.1.1/24"] }
    shape = { rate = "20mbit" }
    [links.second]
    a = { node = "client", dev = "eth1", addresses = ["10.0.2.2/24", "10.0.2.3/24"] }
    b = { node = "server", dev = "eth1", addresses = ["10.0.2.1/24"] }
    shape = { rate = "20mbit" }
"#;

impl Net {
    async fn new() -> Self {
        Self::build(NETWORK).await
    }

    async fn build(text: &str) -> Self {
        let lab = Lab::build(&Scenario::parse("net", "net.toml", text, None).unwrap()).await.unwrap();
        let events = Events::subscribe(lab.netns("server")).unwrap();
        let listener = socket::listen(SERVER.parse().unwrap(), &at(lab.netns("server"))).unwrap();
        Net { lab, listener, _joins_are_accepted: events }
    }

    fn client(&self) -> &Netns {
        self.lab.netns("client")
    }

    fn server(&self) -> &Netns {
        self.lab.netns("server")
    }

    /// A connection, both ends.
    async fn connect(&self) -> (TcpStream, TcpStream) {
        let client = at(self.client());
        let dial = socket::connect(SERVER.parse().unwrap(), &client);
        let (client, server) = tokio::join!(dial, self.listener.accept());
        let (mut client, (mut server, _)) = (client.unwrap(), server.unwrap());
        // With data in both directions MPTCP is agreed on for good.
        client.write_all(b"hello").await.unwrap();
        server.read_exact(&mut [0; 5]).await.unwrap();
        server.write_all(b"hello").await.unwrap();
        client.read_exact(&mut [0; 5]).await.unwrap();
        (client, server)
    }

    /// A connection with a subflow on both paths.
    async fn joined(&self) -> (TcpStream, TcpStream) {
        let ends = self.connect().await;
        self.until("a second subflow", |connections| {
            connections.iter().all(|c| c.subflows.iter().filter(|s| s.state == "ESTAB").count() == 2)
        })
        .await;
        ends
    }

    /// The server's connections, once they are as `wanted`.
    async fn until(&self, what: &str, wanted: impl Fn(&[Connection]) -> bool) -> Vec<Connection> {
        until(self.server(), what, wanted).await
    }

    async fn connections(&self) -> Vec<Connection> {
        diag::connections(self.server()).await.unwrap()
    }

    /// The client opens a third subflow, until it is backup at the server.
    async fn join_third(&self) {
        let pm = Client::connect(self.client()).await.unwrap();
        let third = Endpoint::new("10.0.1.3".parse().unwrap(), EndpointFlags::SUBFLOW);
        let mut ip = Command::new("ip");
        self.client().enter_on_exec(ip.args(["address", "add", "10.0.1.3/24", "dev", "eth0"]));
        assert!(ip.status().unwrap().success());
        pm.add_endpoint(&third).await.unwrap();
        self.until("a third subflow that is backup", |c| {
            let third = c[0].subflows.iter().find(|s| s.remote.ip().to_string() == "10.0.1.3");
            third.is_some_and(|s| s.flags.contains(SubflowFlags::BACKUP_LOCAL))
        })
        .await;
    }

    async fn switch(&self, via: &str, wait: Duration) -> Vec<Report> {
        self.switch_these(self.connections().await, via, wait).await
    }

    async fn switch_these(&self, connections: Vec<Connection>, via: &str, wait: Duration) -> Vec<Report> {
        let wanted = Wanted::Via(Via::resolve(self.server(), via).unwrap());
        switch(self.server(), connections, &Switch { wanted, wait, drain: false }).await.unwrap()
    }
}

fn at(netns: &Netns) -> Options {
    Options { netns: Some(netns.clone()), ..Options::default() }
}

async fn until(netns: &Netns, what: &str, wanted: impl Fn(&[Connection]) -> bool) -> Vec<Connection> {
    let began = Instant::now();
    loop {
        let connections = diag::connections(netns).await.unwrap();
        if wanted(&connections) {
            return connections;
        }
        assert!(began.elapsed() < DEADLINE, "no {what}: {connections:#?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Sends bytes that tell their place until `go_on` is false, and returns how many.
async fn send(mut to: TcpStream, mut go_on: watch::Receiver<bool>) -> u64 {
    let mut sent = 0;
    while *go_on.borrow_and_update() {
        let block: Vec<u8> = (sent..sent + 16_384).map(byte_at).collect();
        to.write_all(&block).await.unwrap();
        sent += block.len() as u64;
    }
    to.shutdown().await.unwrap();
    // Closed only when the peer has closed, so that its last acknowledgements find somebody.
    assert_eq!(to.read(&mut [0]).await.unwrap(), 0);
    sent
}

/// Reads to the end, checks every byte, and returns how many there were.
async fn receive(mut from: TcpStream) -> u64 {
    let mut buffer = vec![0; 65_536];
    let mut received = 0;
    loop {
        let length = from.read(&mut buffer).await.unwrap();
        if length == 0 {
            return received;
        }
        for byte in &buffer[..length] {
            assert_eq!(*byte, byte_at(received), "at {received}");
            received += 1;
        }
    }
}

/// No block of 251 bytes is like another one nearby.
fn byte_at(place: u64) -> u8 {
    (place % 251) as u8 ^ (place >> 12) as u8
}

/// A transfer that goes on until it is ended.
struct Transfer {
    go_on: watch::Sender<bool>,
    sender: tokio::task::JoinHandle<u64>,
    receiver: tokio::task::JoinHandle<u64>,
}

impl Transfer {
    fn begin(from: TcpStream, to: TcpStream) -> Self {
        let (go_on, told) = watch::channel(true);
        Transfer { go_on, sender: tokio::spawn(send(from, told)), receiver: tokio::spawn(receive(to)) }
    }

    /// Ends it, and checks that every byte has arrived in its place.
    async fn end(self) -> u64 {
        self.go_on.send_replace(false);
        let all = async { (self.sender.await.unwrap(), self.receiver.await.unwrap()) };
        let (sent, received) = tokio::time::timeout(DEADLINE, all).await.expect("the transfer ends");
        assert_eq!(sent, received);
        sent
    }
}

fn sent_to(connection: &Connection, ip: &str) -> u64 {
    let to = |s: &&diag::Subflow| s.remote.ip().to_string() == ip;
    connection.subflows.iter().find(to).unwrap().tcp.bytes_sent
}

/// What a switch with an effect says: the primary subflow's remote address, first and last data.
fn switched(report: &Report) -> (String, Option<f64>, Option<f64>) {
    match &report.outcome {
        Outcome::Switched { primary, first_data_ms, last_data_ms, draining: false, .. } => {
            assert_eq!(primary.len(), 1);
            (primary[0].remote.ip().to_string(), *first_data_ms, *last_data_ms)
        }
        outcome => panic!("{outcome:?}"),
    }
}

fn reason(report: &Report) -> &Reason {
    match &report.outcome {
        Outcome::NotSteered { reason } => reason,
        outcome => panic!("{outcome:?}"),
    }
}

#[tokio::test]
async fn a_switch_moves_the_data_of_both_directions_and_back() {
    let net = Net::new().await;
    for upload in [false, true] {
        let (client, server) = net.joined().await;
        let (from, to) = if upload { (client, server) } else { (server, client) };
        net.switch(FIRST, LONG).await;
        let transfer = Transfer::begin(from, to);
        for via in [SECOND, FIRST] {
            let reports = net.switch(via, LONG).await;
            let (primary, first, _) = switched(&reports[0]);
            assert_eq!(primary, via);
            assert!(first.is_some(), "{reports:?}");
            let other = |c: &Connection| {
                let of = c.subflows.iter().find(|s| s.remote.ip().to_string() != via).unwrap();
                (of.tcp.bytes_sent, of.tcp.bytes_received)
            };
            let moved = |c: &Connection| c.info.bytes_sent + c.info.bytes_received;
            // The other path delivers what was queued in it; then not one byte takes it.
            let mut quiet = false;
            for _ in 0..20 {
                let before = net.connections().await.remove(0);
                let now = net.until("more data", |c| moved(&c[0]) > moved(&before) + 500_000).await;
                quiet = other(&now[0]) == other(&before);
                if quiet {
                    break;
                }
            }
            assert!(quiet, "data on both paths");
        }
        transfer.end().await;
        net.until("end", |c| c.is_empty()).await;
    }
}

#[tokio::test]
async fn three_hundred_switches_20_ms_apart_lose_no_byte() {
    let net = Net::new().await;
    let (client, server) = net.joined().await;
    let transfer = Transfer::begin(server, client);
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    for via in [SECOND, FIRST].into_iter().cycle().take(300) {
        tick.tick().await;
        let reports = net.switch(via, Duration::ZERO).await;
        assert_eq!(switched(&reports[0]).0, via);
    }
    let connection = net.connections().await.remove(0);
    transfer.end().await;
    for path in [FIRST, SECOND] {
        assert!(sent_to(&connection, path) > 1_000_000, "{path}: {connection:#?}");
    }
}

#[tokio::test]
async fn a_switch_to_a_subflow_that_is_joining_waits_for_it() {
    let slow =
        NETWORK.replace(r#"shape = { rate = "20mbit" }"#, r#"shape = { rate = "20mbit", delay = "60ms" }"#);
    let slow = slow.replace(r#"endpoints = [{ ip = "10.0.2.2", dev = "eth1", flags = ["subflow"] }]"#, "");
    let net =
        Net::build(&slow.replace("limits = { subflows = 2 }", r#"sysctls = { "net.mptcp.pm_type" = 1 }"#))
            .await;
    let (_client, _server) = net.connect().await;
    let connection = diag::connections(net.client()).await.unwrap().remove(0);
    let pm = Client::connect(net.client()).await.unwrap();
    let local = Address { ip: SECOND.parse().unwrap(), id: Some(AddrId(3)), port: 0, ifindex: 0 };
    let remote = Address::new(connection.remote, Some(AddrId(0)));
    pm.create_subflow(connection.token, local, remote, EndpointFlags::empty()).await.unwrap();
    let joining = diag::connections(net.client()).await.unwrap();
    let state = |c: &Connection| c.subflows.iter().map(|s| s.state.clone()).collect::<Vec<_>>();
    assert!(state(&joining[0]).contains(&"SYN-SENT".into()), "{joining:#?}");
    let wanted = Wanted::Via(Via::resolve(net.client(), SECOND).unwrap());
    let reports = switch(net.client(), joining, &Switch { wanted, wait: LONG, drain: false }).await.unwrap();
    let Outcome::Switched { primary, .. } = &reports[0].outcome else { panic!("{reports:?}") };
    assert_eq!(primary[0].local.ip().to_string(), SECOND);
    net.until("flags at the server", |c| {
        c[0].subflows
            .iter()
            .all(|s| s.flags.contains(SubflowFlags::BACKUP_REMOTE) == (s.remote.ip().to_string() == FIRST))
    })
    .await;
}

#[tokio::test]
async fn a_subflow_that_joins_during_a_switch_becomes_backup() {
    let net = Net::new().await;
    let (client, server) = net.joined().await;
    net.switch(FIRST, LONG).await;
    let transfer = Transfer::begin(server, client);
    // Nothing gets through on the second path, so that the switch stays under way.
    net.lab.link("second").set_blackhole(true).unwrap();
    tokio::select! {
        reports = net.switch(SECOND, DEADLINE) => panic!("{reports:?}"),
        () = net.join_third() => {}
    }
    net.lab.link("second").set_blackhole(false).unwrap();
    transfer.end().await;
}

/// No data move, so that no command is repeated: the one that joins gets its flag by itself.
#[tokio::test]
async fn a_subflow_that_joins_while_no_data_move_becomes_backup_too() {
    let net = Net::new().await;
    let (client, mut server) = net.joined().await;
    // Nobody reads, until the peer may send no more and the rest waits.
    let full = async {
        loop {
            server.write_all(&[0; 16_384]).await.unwrap();
        }
    };
    let stuck = async {
        let bytes = |c: &[Connection]| (c[0].info.bytes_sent, c[0].info.write_seq);
        let mut before = bytes(&net.connections().await);
        let mut since = Instant::now();
        while since.elapsed() < Duration::from_secs(1) {
            let now = bytes(&net.connections().await);
            if now != before {
                (before, since) = (now, Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = full => {}
        () = stuck => {}
    }
    let joins = async {
        net.until("a switch", |c| c[0].subflows.iter().any(|s| s.flags.contains(SubflowFlags::BACKUP_LOCAL)))
            .await;
        net.join_third().await;
    };
    tokio::select! {
        reports = net.switch(SECOND, DEADLINE) => panic!("{reports:?}"),
        () = joins => {}
    }
    drop(client);
}

#[tokio::test]
async fn an_interrupt_puts_back_what_has_carried_nothing_and_leaves_what_has() {
    let net = Net::new().await;
    let (client, server) = net.joined().await;
    net.switch(FIRST, LONG).await;
    let transfer = Transfer::begin(server, client);
    net.until("data", |c| c[0].info.bytes_sent > 500_000).await;
    let backups = |c: &Connection| {
        let backups = c.subflows.iter().filter(|s| s.flags.contains(SubflowFlags::BACKUP_LOCAL));
        backups.map(|s| s.remote.ip().to_string()).collect::<Vec<_>>()
    };
    for (dead, left) in [(true, SECOND), (false, FIRST)] {
        net.lab.link("second").set_blackhole(dead).unwrap();
        let order = Switch {
            wanted: Wanted::Via(Via::resolve(net.server(), SECOND).unwrap()),
            wait: DEADLINE,
            drain: false,
        };
        let before = net.connections().await;
        let so_far = sent_to(&before[0], SECOND);
        let end = net.until("the switch", |c| {
            backups(&c[0]) == [FIRST] && (dead || sent_to(&c[0], SECOND) > so_far + 500_000)
        });
        let end = async { drop(end.await) };
        let reports = switch_until(net.server(), before, &order, end).await.unwrap();
        assert_eq!(matches!(reports[0].outcome, Outcome::NotSteered { .. }), dead, "{reports:?}");
        assert_eq!(backups(&net.connections().await[0]), [left]);
    }
    transfer.end().await;
}

#[tokio::test]
async fn a_switch_to_a_path_that_just_died_is_put_back_and_loses_no_byte() {
    let net = Net::new().await;
    let (client, server) = net.joined().await;
    net.switch(FIRST, LONG).await;
    let transfer = Transfer::begin(server, client);
    net.until("data", |c| c[0].info.bytes_sent > 500_000).await;
    net.lab.link("second").set_blackhole(true).unwrap();
    let reports = net.switch(SECOND, Duration::from_secs(1)).await;
    assert!(matches!(reason(&reports[0]), Reason::NothingThrough { waited_ms: 1000, .. }), "{reports:?}");
    let connection = net.connections().await.remove(0);
    for subflow in &connection.subflows {
        let backup = subflow.flags.contains(SubflowFlags::BACKUP_LOCAL);
        assert_eq!(backup, subflow.remote.ip().to_string() == SECOND, "{connection:#?}");
    }
    // The first path carries data again.
    let so_far = sent_to(&connection, FIRST);
    net.until("data on the first path", |c| sent_to(&c[0], FIRST) > so_far + 500_000).await;
    transfer.end().await;
}

#[tokio::test]
async fn a_command_that_the_peer_did_not_hear_is_repeated() {
    let net = Net::new().await;
    let (client, server) = net.joined().await;
    net.switch(FIRST, LONG).await;
    let transfer = Transfer::begin(client, server);
    let nft = |command: &str| {
        let mut nft = Command::new("nft");
        net.client().enter_on_exec(nft.arg(command));
        let output = nft.output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    // MP_PRIO (kind 30, length 3), behind timestamps and a data acknowledgement of 4 or 8 bytes: nft's own word for
    // it would look at the first MPTCP option only.
    nft("table inet deaf {
            chain lost { counter drop; };
            chain in {
                type filter hook input priority 0;
                @th,320,16 0x1e03 jump lost; @th,352,16 0x1e03 jump lost;
            };
        }");
    let again = async {
        let began = Instant::now();
        // One for each of the two subflows, and one that is a repetition.
        let lost = |listed: &str| {
            let (_, rest) = listed.split_once("counter packets ").unwrap();
            rest.split_whitespace().next().unwrap().parse::<u32>().unwrap()
        };
        while lost(&nft("list table inet deaf")) < 3 {
            assert!(began.elapsed() < DEADLINE, "nothing was repeated: {}", nft("list table inet deaf"));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        nft("delete table inet deaf");
    };
    let (reports, ()) = tokio::join!(net.switch(SECOND, LONG), again);
    assert_eq!(switched(&reports[0]).0, SECOND);
    assert!(matches!(reports[0].outcome, Outcome::Switched { repeated: 1.., .. }), "{reports:?}");
    transfer.end().await;
}

#[tokio::test]
async fn a_half_closed_connection_that_carries_data_is_steered() {
    let net = Net::new().await;
    let (mut client, server) = net.joined().await;
    client.shutdown().await.unwrap();
    net.until("half-closed connection", |c| c[0].state == "CLOSE-WAIT").await;
    net.switch(FIRST, LONG).await;
    let (go_on, told) = watch::channel(true);
    let sender = tokio::spawn(async move {
        let mut server = server;
        let mut sent = 0;
        while *told.borrow() {
            let block: Vec<u8> = (sent..sent + 16_384).map(byte_at).collect();
            server.write_all(&block).await.unwrap();
            sent += block.len() as u64;
        }
        sent
    });
    let receiver = tokio::spawn(receive(client));
    let reports = net.switch(SECOND, LONG).await;
    let (primary, first, _) = switched(&reports[0]);
    assert!(primary == SECOND && first.is_some(), "{reports:?}");
    go_on.send_replace(false);
    assert_eq!(sender.await.unwrap(), receiver.await.unwrap());
}

#[tokio::test]
async fn a_connection_that_is_closing_or_gone_has_that_reason() {
    let net = Net::new().await;
    let (mut client, mut server) = net.joined().await;
    // The server's last data never arrive, so that it waits for their acknowledgement.
    client.shutdown().await.unwrap();
    net.until("half-closed connection", |c| c[0].state == "CLOSE-WAIT").await;
    for link in ["first", "second"] {
        net.lab.link(link).set_blackhole(true).unwrap();
    }
    server.write_all(b"last words").await.unwrap();
    let before = net.connections().await;
    drop(server);
    net.until("closing connection", |c| c[0].state == "LAST-ACK").await;
    let reports = net.switch(SECOND, LONG).await;
    assert_eq!(*reason(&reports[0]), Reason::Closing("LAST-ACK".into()));
    for link in ["first", "second"] {
        net.lab.link(link).set_blackhole(false).unwrap();
    }
    drop(client);
    net.until("end", |c| c.is_empty()).await;
    let reports = net.switch_these(before, SECOND, LONG).await;
    assert_eq!(*reason(&reports[0]), Reason::Closed);
}

#[tokio::test]
async fn what_cannot_be_steered_has_its_reason() {
    let net = Net::new().await;
    let (_client, _server) = net.joined().await;
    // The client's end has the in-kernel path manager.
    let wanted = Wanted::Via(Via::resolve(net.client(), SECOND).unwrap());
    let order = Switch { wanted, wait: LONG, drain: false };
    let at_client = diag::connections(net.client()).await.unwrap();
    let reports = switch(net.client(), at_client, &order).await.unwrap();
    assert_eq!(*reason(&reports[0]), Reason::InKernel);

    let reports = net.switch("10.0.7.0/24", LONG).await;
    assert!(matches!(reason(&reports[0]), Reason::NoSuchPath { has, .. } if has.len() == 2));

    // To a server that has only TCP.
    let tcp = net.server().run(|| std::net::TcpListener::bind("10.0.1.1:81")).unwrap().unwrap();
    let _fallback = socket::connect("10.0.1.1:81".parse().unwrap(), &at(net.client())).await.unwrap();
    let _accepted = tcp.accept().unwrap();
    let mut at_client = diag::connections(net.client()).await.unwrap();
    at_client.retain(|c| c.remote.port() == 81);
    let reports = switch(net.client(), at_client, &order).await.unwrap();
    assert_eq!(*reason(&reports[0]), Reason::Fallback);
}

#[tokio::test]
async fn what_the_peer_asked_for_stays() {
    let net = Net::build(&NETWORK.replace(r#"["subflow"]"#, r#"["subflow", "backup"]"#)).await;
    let (_client, _server) = net.joined().await;
    let reports = net.switch(SECOND, LONG).await;
    assert!(matches!(reason(&reports[0]), Reason::PeerBackup(paths) if paths.len() == 1), "{reports:?}");
}

#[tokio::test]
async fn both_makes_all_subflows_primary_again() {
    let net = Net::new().await;
    let (_client, _server) = net.joined().await;
    net.switch(SECOND, LONG).await;
    let order = Switch { wanted: Wanted::Both, wait: LONG, drain: false };
    let reports = switch(net.server(), net.connections().await, &order).await.unwrap();
    assert!(matches!(&reports[0].outcome, Outcome::Switched { primary, .. } if primary.len() == 2));
    until(net.client(), "no flag at the client", |c| {
        c[0].subflows.iter().all(|s| !s.flags.contains(SubflowFlags::BACKUP_REMOTE))
    })
    .await;
    // A second time there is nothing to set.
    let reports = switch(net.server(), net.connections().await, &order).await.unwrap();
    assert!(matches!(reports[0].outcome, Outcome::Switched { set_us: None, .. }), "{reports:?}");
}

#[tokio::test]
async fn the_fast_drain_bounds_the_send_buffer_and_restores_it() {
    let net = Net::new().await;
    let (client, server) = net.joined().await;
    net.switch(FIRST, LONG).await;
    // Another descriptor of the same socket, to see its buffer.
    let seen = std::net::TcpStream::from(server.as_fd().try_clone_to_owned().unwrap());
    let size = || socket2::SockRef::from(&seen).send_buffer_size().unwrap();
    socket2::SockRef::from(&seen).set_send_buffer_size(1_000_000).unwrap();
    let before = size();
    let transfer = Transfer::begin(server, client);
    net.until("a full buffer", |c| c[0].info.write_seq - c[0].info.snd_una > 2 * BOUND as u64).await;
    let order =
        Switch { wanted: Wanted::Via(Via::resolve(net.server(), SECOND).unwrap()), wait: LONG, drain: true };
    let connections = net.connections().await;
    let bounded = async {
        let began = Instant::now();
        while size() == before {
            assert!(began.elapsed() < DEADLINE, "the buffer is not bounded");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(size(), 2 * BOUND);
    };
    let (reports, ()) = tokio::join!(switch(net.server(), connections, &order), bounded);
    assert_eq!(switched(&reports.unwrap()[0]).0, SECOND);
    assert_eq!(size(), before);

    // Also when nobody waits for the end of it.
    let connections = net.connections().await;
    let order = Switch { wanted: Wanted::Via(Via::resolve(net.server(), FIRST).unwrap()), ..order };
    tokio::select! {
        reports = switch(net.server(), connections, &order) => panic!("{reports:?}"),
        () = async { while size() == before { tokio::task::yield_now().await } } => {}
    }
    assert_eq!(size(), before);
    drop(seen);
    transfer.end().await;
}
