//! Diag of the running kernel, checked against `ss` and against what connections do.

mod net;

use std::time::Instant;

use mptcp::diag::{self, Owner, SubflowFlags};
use mptcp::pm::{Client, Endpoint, EndpointFlags, EventKind, Events, Limits};
use mptcp::socket::{Options, Protocol};
use mptcp::{AddrId, Netns};
use net::{DEADLINE, connect, connect_with, event_of, output, pair, token, transfer};

/// A connection to `addr` on B, with a second subflow from `second`, and traffic on it.
async fn two_subflows(
    a: &Netns,
    b: &Netns,
    addr: &str,
    second: &str,
    flags: EndpointFlags,
) -> net::Connection {
    let limits = Limits { subflows: 2, add_addr_accepted: 0 };
    for netns in [a, b] {
        Client::connect(netns).await.unwrap().set_limits(limits).await.unwrap();
    }
    let endpoint = Endpoint::new(second.parse().unwrap(), EndpointFlags::SUBFLOW | flags);
    Client::connect(a).await.unwrap().add_endpoint(&endpoint).await.unwrap();
    let (mut at_a, mut at_b) = (Events::subscribe(a).unwrap(), Events::subscribe(b).unwrap());
    let mut connection = connect(a, b, addr).await;
    transfer(&mut connection.client, &mut connection.server, 100_000).await;
    event_of(&mut at_a, EventKind::SubflowEstablished).await;
    event_of(&mut at_b, EventKind::SubflowEstablished).await;
    connection
}

/// Diag, and what ss shows of MPTCP and of TCP, read while nothing changed (late ACKs had come).
async fn while_quiet(netns: &Netns) -> (Vec<diag::Connection>, String, String) {
    let give_up = Instant::now() + DEADLINE;
    loop {
        let before = without_clocks(diag::connections(netns).await.unwrap());
        let (mptcp, tcp) = (output(netns, "ss", "-HMnieO"), output(netns, "ss", "-HtnieO"));
        if before == without_clocks(diag::connections(netns).await.unwrap()) {
            return (before, mptcp, tcp);
        }
        assert!(Instant::now() < give_up, "never quiet");
    }
}

fn without_clocks(mut connections: Vec<diag::Connection>) -> Vec<diag::Connection> {
    for connection in &mut connections {
        connection.info.last_data_sent = 0;
        connection.info.last_data_recv = 0;
        connection.info.last_ack_recv = 0;
        connection.subflows.iter_mut().for_each(|subflow| subflow.tcp.last_ack_recv_ms = 0);
    }
    connections
}

/// The value of `key:value` in a line of ss.
fn field<'a>(line: &'a str, key: &str) -> &'a str {
    let mut words = line.split_whitespace();
    words.find_map(|word| word.strip_prefix(key)).unwrap_or_else(|| panic!("no {key} in {line}"))
}

#[tokio::test]
async fn connections_and_subflows_are_those_that_ss_shows() {
    let counts = net::counts_bytes();
    for (addr, second) in [("10.0.0.2:0", "10.0.1.1"), ("[fd00:0::2]:0", "fd00:1::1")] {
        let (a, b) = pair(2);
        let connection = two_subflows(&a, &b, addr, second, EndpointFlags::empty()).await;
        let (seen, ss, ss_tcp) = while_quiet(&a).await;
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].token, token(&connection.client));
        assert_eq!(seen[0].info.bytes_sent, if counts { 100_000 } else { 0 });

        let line = ss.lines().find(|line| line.contains("remote_key")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[..1], [seen[0].state.as_str()]);
        assert_eq!(words[3..5], [seen[0].local.to_string(), seen[0].remote.to_string()]);
        assert_eq!(field(line, "ino:"), seen[0].inode.to_string());
        assert_eq!(field(line, "token:").parse(), Ok(seen[0].token)); // ss drops leading zeros

        assert_eq!(ss_tcp.lines().count(), 2, "{ss_tcp}");
        assert_eq!(seen[0].subflows.len(), 2, "{seen:#?}");
        for subflow in &seen[0].subflows {
            let local = subflow.local.to_string();
            let line = ss_tcp.lines().find(|line| line.split_whitespace().nth(3) == Some(&local)).unwrap();
            let words: Vec<&str> = line.split_whitespace().collect();
            assert_eq!((words[0], words[4]), (subflow.state.as_str(), subflow.remote.to_string().as_str()));
            let (_, ours) = field(line, "token:").split_once('/').unwrap();
            let (ours, id) = ours.split_once("(id:").unwrap();
            assert_eq!((ours.parse(), id), (Ok(seen[0].token), format!("{})", subflow.local_id).as_str()));
            assert_eq!(field(line, "flags:"), subflow.flags.to_string());
            assert!(line.contains(&format!(" {} ", subflow.congestion_control)), "{line}");
            assert_eq!(field(line, "cwnd:"), subflow.tcp.cwnd.to_string());
            let rtt: f64 = field(line, "rtt:").split('/').next().unwrap().parse().unwrap();
            assert_eq!((rtt * 1000.0).round() as u32, subflow.tcp.rtt_us);
            if subflow.tcp.bytes_sent > 0 {
                assert_eq!(field(line, "bytes_sent:"), subflow.tcp.bytes_sent.to_string());
            }
            assert_eq!(field(line, "bytes_acked:"), subflow.tcp.bytes_acked.to_string());
        }
        assert!(seen[0].subflows.iter().map(|s| s.tcp.bytes_sent).sum::<u64>() >= 100_000);
    }
}

#[tokio::test]
async fn the_owner_is_this_process() {
    let (a, b) = pair(1);
    let _connection = connect(&a, &b, "10.0.0.2:0").await;
    let program = std::fs::read_to_string("/proc/self/comm").unwrap().trim().to_string();
    let expected = [Owner { pid: std::process::id(), program }];
    assert_eq!(diag::connections(&a).await.unwrap()[0].owners, expected);
    assert_eq!(diag::connections(&b).await.unwrap()[0].owners, expected);
}

#[tokio::test]
async fn each_end_tells_who_asked_for_backup() {
    let (a, b) = pair(2);
    let _connection = two_subflows(&a, &b, "10.0.0.2:0", "10.0.1.1", EndpointFlags::BACKUP).await;
    let none = SubflowFlags::empty();
    let backup = |seen: &[diag::Connection]| {
        let mut subflows = seen[0].subflows.clone();
        subflows.sort_by_key(|s| s.local_id.max(s.remote_id));
        subflows
            .iter()
            .map(|s| s.flags & (SubflowFlags::BACKUP_LOCAL | SubflowFlags::BACKUP_REMOTE))
            .collect::<Vec<_>>()
    };
    assert_eq!(backup(&diag::connections(&a).await.unwrap()), [none, SubflowFlags::BACKUP_LOCAL]);
    assert_eq!(backup(&diag::connections(&b).await.unwrap()), [none, SubflowFlags::BACKUP_REMOTE]);
}

#[tokio::test]
async fn a_client_over_ipv4_of_an_ipv6_listener_has_mapped_addresses() {
    let (a, b) = pair(2);
    let connection = two_subflows(&a, &b, "[::ffff:10.0.0.2]:0", "10.0.1.1", EndpointFlags::empty()).await;
    let seen = diag::connections(&b).await.unwrap();
    assert_eq!(seen[0].local, connection.server.local_addr().unwrap());
    assert_eq!(seen[0].local.ip().to_string(), "::ffff:10.0.0.2");
    let mut remotes: Vec<_> =
        seen[0].subflows.iter().map(|s| (s.remote.ip().to_string(), s.remote_id)).collect();
    remotes.sort();
    assert_eq!(remotes, [("::ffff:10.0.0.1".into(), AddrId(0)), ("::ffff:10.0.1.1".into(), AddrId(1))]);
}

#[tokio::test]
async fn subflows_go_to_their_own_connection() {
    let (a, b) = pair(1);
    let mut connections = Vec::new();
    for _ in 0..20 {
        connections.push(connect(&a, &b, "10.0.0.2:0").await);
    }
    let seen = diag::connections(&a).await.unwrap();
    assert_eq!(seen.len(), 20);
    for connection in &connections {
        let found = seen.iter().find(|c| c.token == token(&connection.client)).unwrap();
        assert_eq!(found.subflows.len(), 1);
        assert_eq!(found.subflows[0].local, connection.client.local_addr().unwrap());
        assert_eq!(found.subflows[0].remote, connection.client.peer_addr().unwrap());
    }
}

#[tokio::test]
async fn listeners_and_plain_tcp_are_left_out() {
    let (a, b) = pair(1);
    let tcp = Options { protocol: Protocol::Tcp, ..Options::default() };
    let _connection = connect_with(&a, &b, "10.0.0.2:0", &tcp, &Options::default()).await;
    assert_eq!(diag::connections(&a).await.unwrap(), []);
    assert_eq!(diag::connections(&b).await.unwrap(), []);
}
