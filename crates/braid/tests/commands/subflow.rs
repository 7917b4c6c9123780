//! `braid subflow`, `braid address` and `braid listen`: the userspace path manager by commands alone.

use std::net::{SocketAddr, TcpStream};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::bad_input::refused;
use crate::net::{BRAID, Net, Running, pair};

/// A host with a program in it that has one connection, and the events of its path manager.
struct Side {
    net: Net,
    program: Running,
    events: Running,
    /// The address on the second network, as it is written in commands.
    second: &'static str,
}

/// Client and server with one connection from network 0 to `addr`, both with the path manager `pm_type`.
fn connected(addr: &str, second: [&'static str; 2], pm_type: &str) -> [Side; 2] {
    let (client, server) = pair(2);
    let events = [&client, &server].map(|net| {
        // Beside timestamps there is no room in a segment for an IPv6 address with a port.
        mptcp::sysctl::set(&net.0, "net.ipv4.tcp_timestamps", "0").unwrap();
        mptcp::sysctl::set(&net.0, "net.mptcp.pm_type", pm_type).unwrap();
        let events = net.start("braid monitor --json -v");
        events.wait_for_note("subscribed");
        events
    });
    let echo = server.echo_server(addr);
    let mut program = client.start(&format!("braid echo client --addr {addr}"));
    program.write("hello\n");
    program.wait_for("recv> hello");
    let [at_client, at_server] = events;
    [
        Side { net: client, program, events: at_client, second: second[0] },
        Side { net: server, program: echo, events: at_server, second: second[1] },
    ]
}

impl Side {
    fn connection(&self) -> Value {
        let shown = self.net.ok("braid show --json");
        serde_json::from_str::<Vec<Value>>(&shown).unwrap().pop().unwrap()
    }

    fn token(&self) -> String {
        self.connection()["token"].as_str().unwrap().into()
    }

    /// The subflow whose local or remote id (`end`) is `id`.
    fn subflow(&self, end: &str, id: u8) -> Option<Value> {
        self.connection()["subflows"].as_array().unwrap().iter().find(|s| s[end] == id).cloned()
    }

    /// The next event of this kind.
    fn event(&self, kind: &str) -> Value {
        let lines = self.events.wait_for(&format!("\"event\":\"{kind}\""));
        serde_json::from_str(lines.last().unwrap()).unwrap()
    }

    /// `braid COMMAND --token T WORDS` that succeeds in silence.
    fn does(&self, command: &str, words: &str) {
        let printed = self.net.ok(&format!("braid {command} --token {} {words}", self.token()));
        assert_eq!(printed, "", "{command} {words}");
    }

    fn refused(&self, command: &str, words: &str, wanted: &str) {
        let line = format!("braid {command} --token {} {words}", self.token());
        refused(&line, &self.net.output(&line), wanted);
    }
}

/// `opener` opens, reprioritises and closes a subflow to an address that `other` announces and withdraws.
fn cycle(opener: &Side, other: &Side) {
    let mut listening =
        other.net.start(&format!("braid listen {}", SocketAddr::new(other.second.parse().unwrap(), 8443)));
    listening.wait_for("listening on");
    other.does("address announce", &format!("{} id 8 port 8443", other.second));
    let announced = opener.event("ANNOUNCED");
    assert_eq!((&announced["remote_id"], &announced["remote_port"]), (&Value::from(8), &Value::from(8443)));

    // Never as a mapped address, which would travel as IPv6.
    assert_eq!(announced["remote_ip"], other.second.trim_start_matches("::ffff:"));

    let (from, to) = (opener.second, other.second);
    opener.does("subflow create", &format!("local {from} id 5 dev eth1 remote {to} port 8443"));
    let established = opener.event("SF_ESTABLISHED");
    assert_eq!((&established["local_id"], &established["remote_id"]), (&Value::from(5), &Value::from(8)));
    other.event("SF_ESTABLISHED");
    let ours = opener.subflow("local_id", 5).unwrap();
    assert!(ours["remote"].as_str().unwrap().ends_with(":8443"), "{ours}");

    for (command, backup) in [("subflow backup", true), ("subflow nobackup", false)] {
        opener.does(command, &format!("local {from}"));
        assert_eq!(other.event("SF_PRIO")["backup"], backup);
        assert_eq!(opener.subflow("local_id", 5).unwrap()["backup_by_us"], backup);
        assert_eq!(other.subflow("remote_id", 5).unwrap()["backup_by_peer"], backup);
    }

    // As the kernel takes them: both addresses and both ports.
    let port = established["local_port"].to_string();
    opener.does("subflow destroy", &format!("local {from} port {port} remote {to} port 8443"));
    assert_eq!(opener.event("SF_CLOSED")["local_id"], 5);
    assert_eq!(opener.subflow("local_id", 5), None);
    other.event("SF_CLOSED");

    other.does("address remove", "id 8");
    assert_eq!(opener.event("REMOVED")["remote_id"], 8);
    listening.signal(Signal::SIGTERM);
    assert_eq!(listening.wait().code(), Some(0));
}

/// The cycle from both sides, and what the connection is afterwards.
fn cycles(addr: &str, second: [&'static str; 2]) {
    let [mut client, server] = connected(addr, second, "1");
    cycle(&client, &server);
    cycle(&server, &client);
    client.program.write("still here\n");
    client.program.wait_for("recv> still here");
}

#[test]
fn a_subflow_lives_and_dies_by_command_over_ipv4() {
    cycles("10.0.0.2:80", ["10.0.1.1", "10.0.1.2"]);
}

#[test]
fn a_subflow_lives_and_dies_by_command_over_ipv6() {
    cycles("[fd00:0::2]:80", ["fd00:1::1", "fd00:1::2"]);
}

#[test]
fn a_subflow_lives_and_dies_by_command_on_ipv6_sockets_with_ipv4_addresses() {
    cycles("[::ffff:10.0.0.2]:80", ["10.0.1.1", "10.0.1.2"]);
}

#[test]
fn a_subflow_lives_and_dies_by_command_with_mapped_addresses() {
    cycles("[::ffff:10.0.0.2]:80", ["::ffff:10.0.1.1", "::ffff:10.0.1.2"]);
}

/// The kernel knows the first subflow of an IPv6 socket by mapped addresses only.
#[test]
fn the_first_subflow_of_a_mapped_connection_is_closed_by_its_ipv4_addresses() {
    let [mut client, server] = connected("[::ffff:10.0.0.2]:80", ["10.0.1.1", "10.0.1.2"], "1");
    let first = client.subflow("local_id", 0).unwrap();
    assert_eq!(first["remote"], "[::ffff:10.0.0.2]:80");
    client.does("subflow create", "local 10.0.1.1 id 5 remote 10.0.0.2 port 80 backup");
    client.event("SF_ESTABLISHED");
    assert_eq!(server.event("SF_ESTABLISHED")["backup"], true);
    let port = first["local"].as_str().unwrap().rsplit_once(':').unwrap().1;
    client.does("subflow destroy", &format!("local 10.0.0.1 port {port} remote 10.0.0.2 port 80"));
    assert_eq!(client.event("SF_CLOSED")["local_id"], 0);
    client.program.write("by the other\n");
    client.program.wait_for("recv> by the other");
}

#[test]
fn the_last_path_is_taken_by_force_only() {
    let [client, server] = connected("10.0.0.2:80", ["10.0.1.1", "10.0.1.2"], "1");
    for (command, words) in [("address remove", "id 0"), ("subflow destroy", "local 10.0.0.1")] {
        client.refused(command, words, "would be without a path (--force does it all the same)");
    }
    client.does("subflow create", "local 10.0.1.1 id 5 remote 10.0.0.2 port 80");
    client.event("SF_ESTABLISHED");
    server.event("SF_ESTABLISHED");
    client.does("address remove", "id 0");
    assert_eq!(server.event("REMOVED")["remote_id"], 0);
    assert_eq!(client.event("SF_CLOSED")["local_id"], 0);
    client.refused("subflow destroy", "local id 5", "without a path");
    client.does("subflow destroy", "local id 5 --force");
    assert_eq!(client.event("SF_CLOSED")["local_id"], 5);
}

#[test]
fn a_subflow_has_to_be_named_well_enough() {
    let [client, server] = connected("10.0.0.2:80", ["10.0.1.1", "10.0.1.2"], "1");
    client.does("subflow create", "local 10.0.1.1 id 5 remote 10.0.0.2 port 80");
    client.event("SF_ESTABLISHED");
    server.event("SF_ESTABLISHED");
    client.refused("subflow backup", "remote 10.0.0.2", "several subflows are so, ");
    client.refused("subflow destroy", "local 10.0.9.9", "the connection has no such subflow");
    client.refused(
        "subflow create",
        "local 10.0.1.1 remote 10.0.0.2 port 80",
        "the local address needs an id",
    );
    client.refused(
        "subflow create",
        "local 10.0.1.1 id 6 remote 10.0.0.2 port 80",
        "(kernel: did not match address and id)",
    );
    client.refused(
        "subflow create",
        "local fd00:1::1 id 6 remote 10.0.0.2 port 80",
        "(kernel: families mismatch)",
    );
    client.refused("address remove", "id 77", "remove address id 77 on ");
    assert_eq!(client.connection()["subflows"].as_array().unwrap().len(), 2);
}

const ALL: [(&str, &str); 5] = [
    ("subflow create", "local 10.0.1.1 id 5 remote 10.0.0.2 port 80"),
    ("subflow backup", "local 10.0.0.1"),
    ("subflow destroy", "--force local 10.0.0.1"),
    ("address announce", "10.0.1.1 id 5"),
    ("address remove", "--force id 0"),
];

#[test]
fn a_connection_of_the_in_kernel_path_manager_is_left_alone() {
    let [client, _server] = connected("10.0.0.2:80", ["10.0.1.1", "10.0.1.2"], "0");
    for (command, words) in ALL {
        client.refused(
            command,
            words,
            "the connection has the in-kernel path manager, and obeys `braid endpoint`",
        );
    }
}

#[test]
fn a_missing_capability_is_named() {
    let [client, _server] = connected("10.0.0.2:80", ["10.0.1.1", "10.0.1.2"], "1");
    for (command, words) in ALL {
        let line = format!("{command} --token {} {words}", client.token());
        let output = client.net.output(&format!("setpriv --bounding-set -net_admin {BRAID} {line}"));
        refused(&line, &output, "needs CAP_NET_ADMIN");
    }
}

#[test]
fn a_namespace_is_named_for_every_command() {
    let [client, server] = connected("10.0.0.2:80", ["10.0.1.1", "10.0.1.2"], "1");
    let elsewhere = Net::new();
    let (pid, token) = (client.program.pid(), client.token());
    elsewhere.ok(&format!("braid address announce --pid {pid} --token {token} 10.0.1.1 id 4"));
    assert_eq!(server.event("ANNOUNCED")["remote_id"], 4);
    elsewhere.ok(&format!("braid subflow backup -n /proc/{pid}/ns/net --token {token} local id 0"));
    assert_eq!(server.event("SF_PRIO")["backup"], true);
    let listening = elsewhere.start(&format!("braid listen 10.0.1.1:0 --pid {pid}"));
    let line = listening.wait_for("listening on 10.0.1.1:").pop().unwrap();
    assert!(!line.ends_with(":0"), "{line}");
}

#[test]
fn a_held_port_closes_what_is_no_subflow() {
    let net = Net::new();
    let listening = net.start("braid listen 10.0.0.1:80");
    listening.wait_for("listening on 10.0.0.1:80");
    let mut stream = net.0.run(|| TcpStream::connect("10.0.0.1:80")).unwrap().unwrap();
    assert_eq!(std::io::Read::read(&mut stream, &mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_signal_that_was_ignored_from_the_start_stays_ignored() {
    let net = Net::new();
    let listening =
        Running::start(net.command("sh -c").arg(format!("trap '' INT; exec {BRAID} listen 10.0.0.1:80")));
    listening.wait_for("listening on");
    let status = std::fs::read_to_string(format!("/proc/{}/status", listening.pid())).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    let caught = u64::from_str_radix(caught.trim(), 16).unwrap();
    let catches = |signal: nix::libc::c_int| caught >> (signal - 1) & 1 == 1;
    assert_eq!([catches(nix::libc::SIGINT), catches(nix::libc::SIGTERM)], [false, true]);
}

#[test]
fn a_port_is_not_held_where_there_is_no_mptcp() {
    let net = Net::new();
    mptcp::sysctl::set(&net.0, "net.mptcp.enabled", "0").unwrap();
    let output = net.output("braid listen 10.0.0.1:80");
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        error.lines().last(),
        Some("braid: listen on 10.0.0.1:80: there is no MPTCP here (net.mptcp.enabled)")
    );
}
