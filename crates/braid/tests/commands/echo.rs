//! `braid echo`.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;

use nix::sys::signal::Signal;

use crate::net::{Net, Running};

#[test]
fn a_line_comes_back_over_mptcp_on_ipv4_ipv6_and_by_name() {
    let net = Net::new();
    let server = net.echo_server(":80");
    for addr in ["10.0.0.1:80", "[fd00::1]:80", "localhost:80"] {
        let reply = net.ok(&format!("braid echo client --addr {addr} --msg hello"));
        assert_eq!(reply, format!("connected to {addr} with mptcp: true\nhello\n"));
        server.wait_for("with mptcp: true");
    }
}

#[test]
fn a_tcp_client_is_served_and_told_apart() {
    let net = Net::new();
    let server = net.echo_server("10.0.0.1:80");
    let client = net.command("braid echo client --addr 10.0.0.1:80 --msg x").env("BRAID_MPTCP", "0").output();
    assert_eq!(client.unwrap().stdout, b"connected to 10.0.0.1:80 with mptcp: false\nx\n");
    let accepted = server.wait_for("accepted").pop().unwrap();
    assert!(accepted.starts_with("accepted connection from 10.0.0.1:"), "{accepted}");
    assert!(accepted.ends_with(" with mptcp: false"), "{accepted}");
}

#[test]
fn an_mptcp_client_of_a_tcp_server_sees_the_fallback() {
    let net = Net::new();
    let server = Running::start(net.command("braid echo server --addr :80").env("BRAID_MPTCP", "0"));
    server.wait_for("with mptcp: false");
    let reply = net.ok("braid echo client --addr 10.0.0.1:80 --msg x");
    assert_eq!(reply, "connected to 10.0.0.1:80 with mptcp: false\nx\n");
}

#[test]
fn the_interactive_client_prints_each_echoed_line_and_ends_at_the_end_of_its_input() {
    let net = Net::new();
    let _server = net.echo_server(":80");
    let mut client = net.start("braid echo client --addr 10.0.0.1:80");
    client.wait_for("connected to 10.0.0.1:80 with mptcp: true");
    for line in ["one", "", "three words here"] {
        client.write(&format!("{line}\n"));
        assert_eq!(client.wait_for("recv>"), [format!("recv> {line}")]);
    }
    client.write("last");
    client.close_stdin();
    assert_eq!(client.wait_for("recv>"), ["recv> last"]);
    assert!(client.wait().success());
}

#[test]
fn the_published_names_take_single_dash_flags() {
    let net = Net::new();
    let server = Running::start(net.command("braid -addr :80").arg0("/usr/local/bin/server"));
    server.wait_for("listening on [::]:80 with mptcp: true");
    let line = "braid -addr 10.0.0.1:80 -msg -dash -timeout 10s";
    let client = net.command(line).arg0("client").output().unwrap();
    assert_eq!(client.stdout, b"connected to 10.0.0.1:80 with mptcp: true\n-dash\n");
}

#[test]
fn a_server_that_goes_away_ends_the_client_with_1() {
    let net = Net::new();
    let server = net.echo_server(":80");
    let mut client = net.start("braid echo client --addr 10.0.0.1:80");
    client.wait_for("connected");
    drop(server);
    client.wait_for_note("braid: 10.0.0.1:80: ");
    assert_eq!(client.wait().code(), Some(1));
}

#[test]
fn a_reply_that_does_not_come_in_time_ends_the_client_with_1() {
    let net = Net::new();
    let _silent = net.0.run(|| TcpListener::bind("10.0.0.1:80")).unwrap().unwrap();
    let client = net.output("braid echo client --addr 10.0.0.1:80 --msg x --timeout 200ms");
    assert_eq!(client.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&client.stderr), "braid: 10.0.0.1:80: no reply in 200ms\n");

    let mut client = net.start("braid echo client --addr 10.0.0.1:80 --timeout 200ms");
    client.write("x\n");
    client.close_stdin();
    client.wait_for_note("braid: 10.0.0.1:80: no reply in 200ms");
    assert_eq!(client.wait().code(), Some(1));
}

#[test]
fn a_host_that_does_not_answer_ends_the_client_with_2() {
    let net = Net::new();
    net.ok("ip link add v0 type veth peer name v1");
    net.ok("ip address add 10.1.0.1/24 dev v0");
    net.ok("ip link set v0 up");
    net.ok("ip link set v1 up");
    // Frames to it leave and nobody takes them.
    net.ok("ip neighbour add 10.1.0.2 lladdr 02:00:00:00:00:02 dev v0");
    let client = net.output("braid echo client --addr 10.1.0.2:80 --msg x --timeout 200ms");
    assert_eq!(client.status.code(), Some(2));
    assert_eq!(
        String::from_utf8_lossy(&client.stderr),
        "braid: connect to 10.1.0.2:80: no answer in 200ms\n"
    );
}

#[test]
fn an_interrupt_ends_both_sides_with_0() {
    let net = Net::new();
    let mut server = net.echo_server(":80");
    let mut client = net.start("braid echo client --addr 10.0.0.1:80");
    client.wait_for("connected");
    client.write("x\n");
    client.wait_for("recv> x");
    client.signal(Signal::SIGINT);
    assert_eq!(client.wait().code(), Some(0));
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn the_server_listens_where_there_is_no_ipv6() {
    let net = Net::new();
    mptcp::sysctl::set(&net.0, "net.ipv6.conf.all.disable_ipv6", "1").unwrap();
    let _server = net.echo_server(":80");
    net.ok("braid echo client --addr 10.0.0.1:80 --msg x");
}
