//! `braid proxy --transparent` on a router between a client and a server with two ways to it:
//!
//! ```text
//! client 10.1.1.2 ── lan 10.1.1.1  router  wan1 10.2.1.1 ── 10.2.1.2 eth1  server
//!        fd01:1::2      fd01:1::1               fd02:1::1   fd02:1::2
//!                                          wan2 10.2.2.1 ── 10.2.2.2 eth2
//! ```

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use mptcp::Netns;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);
/// The port of the server that speaks MPTCP, and of the one that speaks only TCP.
const MPTCP: u16 = 80;
const TCP: u16 = 81;
/// One address of the server in each family.
const SERVER: [&str; 2] = ["10.2.1.2", "[fd02:1::2]"];

#[test]
fn forwarded_connections_go_on_over_mptcp_or_fall_back() {
    let net = Network::new();
    connections_go_on_over_mptcp_or_fall_back(&net, &net.client, "--transparent=forwarded");
}

#[test]
fn local_connections_go_on_over_mptcp_or_fall_back() {
    let net = Network::new();
    connections_go_on_over_mptcp_or_fall_back(&net, &net.router, "--transparent=local");
}

fn connections_go_on_over_mptcp_or_fall_back(net: &Network, from: &Netns, option: &str) {
    let mut braid = net.braid(&[option]);
    for host in SERVER {
        net.download_is_whole(from, host, MPTCP);
        let line = braid.log(&format!("server={host}:{MPTCP} "));
        assert!(line.contains("client_leg=tcp server_leg=mptcp/"), "{line}");
        net.download_is_whole(from, host, TCP);
        let line = braid.log(&format!("server={host}:{TCP} "));
        assert!(line.contains("client_leg=tcp server_leg=fallback"), "{line}");
    }
    assert_eq!(mptcp_counter(&net.server, "MPCapableACKRX"), 2, "one for each family");
}

#[test]
fn neither_the_dialled_connection_nor_its_second_subflow_is_taken_again() {
    let net = Network::new();
    let mut braid = net.braid(&["--transparent"]);
    for netns in [&net.client, &net.router] {
        let before = mptcp_counter(&net.server, "MPJoinAckRx");
        let mut stream = connect(netns, "10.2.1.2:80").unwrap();
        until("the second subflow joins", || mptcp_counter(&net.server, "MPJoinAckRx") > before);
        stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
        drop(stream);
        let line = braid.log("closed by both sides");
        assert!(line.contains("server_leg=mptcp/2"), "{line}");
    }
    braid.signal(Signal::SIGTERM);
    let (status, rest) = braid.end();
    assert!(status.success());
    assert!(!rest.iter().any(|line| line.contains("closed by both sides")), "more than one: {rest:?}");
}

#[test]
fn the_server_sees_the_client_or_the_router_as_asked() {
    let net = Network::new();
    for (options, client, router) in [
        (&["--transparent"][..], ["10.2.1.1", "fd02:1::1"], ["10.2.1.1", "fd02:1::1"]),
        (&["--transparent", "--keep-source"], ["10.1.1.2", "fd01:1::2"], ["10.2.1.1", "fd02:1::1"]),
    ] {
        let mut braid = net.braid(options);
        for (netns, expected) in [(&net.client, client), (&net.router, router)] {
            for (host, source) in SERVER.into_iter().zip(expected) {
                for port in [MPTCP, TCP] {
                    net.download_is_whole(netns, host, port);
                    assert_eq!(net.last_client(port), source, "{options:?} {host}:{port}");
                    braid.log(&format!("server={host}:{port} "));
                }
            }
        }
    }
}

#[test]
fn a_kept_source_address_still_gets_a_second_subflow() {
    let net = Network::new();
    let _braid = net.braid(&["--transparent", "--keep-source"]);
    let _stream = connect(&net.client, "10.2.1.2:80").unwrap();
    until("the second subflow joins", || mptcp_counter(&net.server, "MPJoinAckRx") == 1);
    let connections = sh(&net.server, "ss -Htn sport = :80");
    // The first subflow from the client's address, the second from the router's on the other link.
    assert!(connections.contains("10.1.1.2]:"), "{connections}");
    assert!(connections.contains("10.2.2.1"), "{connections}");
}

#[test]
fn a_server_side_relay_takes_mptcp_connections_with_all_their_subflows() {
    let net = Network::new();
    // The "client" is the router's peer with two ways: the server's side, towards a server behind the router.
    let _origin = net.http(&net.client, TCP, "python3");
    sh(&net.router, "ip mptcp endpoint add 10.2.2.1 dev wan2 signal");
    let mut braid = net.serve(&["--listen", "mptcp://:5555", "--transparent=forwarded"]);
    let body = fetch_with(&net.server, "mptcpize run curl", "http://10.1.1.2:81/file").unwrap();
    assert!(body == net.content);
    let line = braid.log("server=10.1.1.2:81 ");
    assert!(line.contains("client_leg=mptcp/"), "{line}");
    assert!(line.contains("server_leg=tcp"), "{line}");
}

#[test]
fn only_what_is_asked_for_is_taken() {
    let net = Network::new();
    // Options, and whether a connection of the client to port 80 over IPv4, to 81, and over IPv6 is taken.
    for (options, taken) in [
        (&[][..], [true, true, true]),
        (&["--ports", "80"], [true, false, true]),
        (&["--ports", "1-79,81-90"], [false, true, false]),
        (&["--to-cidr", "10.2.1.0/24"], [true, true, false]),
        (&["--to-cidr", "10.9.0.0/16,fd02:1::2"], [false, false, true]),
        (&["--from-cidr", "10.1.1.0/24,10.1.1.2"], [true, true, false]),
        (&["--from-cidr", "10.9.0.0/16"], [false, false, false]),
        (&["--interface", "lan,wan1"], [true, true, true]),
        (&["--interface", "wan1"], [false, false, false]),
        (&["--ports", "80", "--to-cidr", "fd02::/16", "--interface", "lan"], [false, false, true]),
    ] {
        let _braid = net.braid(&[&["--transparent=forwarded"], options].concat());
        let connections = [(SERVER[0], MPTCP), (SERVER[0], TCP), (SERVER[1], MPTCP)];
        for ((host, port), taken) in connections.into_iter().zip(taken) {
            net.download_is_whole(&net.client, host, port);
            let direct = ["10.1.1.2", "fd01:1::2"].contains(&net.last_client(port).as_str());
            assert_eq!(direct, !taken, "{options:?} {host}:{port}");
        }
        net.download_is_whole(&net.router, SERVER[0], TCP);
    }
    // Without IPv6 in the listener.
    let _braid = net.serve(&["--listen", "tcp://0.0.0.0:5555", "--transparent"]);
    for (host, source) in [(SERVER[0], "10.2.1.1"), (SERVER[1], "fd01:1::2")] {
        net.download_is_whole(&net.client, host, MPTCP);
        assert_eq!(net.last_client(MPTCP), source);
    }
}

#[test]
fn a_connection_straight_to_the_port_is_refused_and_said_so() {
    let net = Network::new();
    let mut braid = net.braid(&["--transparent"]);
    for (netns, target) in [
        (&net.client, "10.1.1.1:5555"),
        (&net.client, "[fd01:1::1]:5555"),
        (&net.router, "127.0.0.1:5555"),
        (&net.router, "10.2.1.1:5555"),
    ] {
        let served = connect(netns, target).and_then(|mut stream| stream.read(&mut [0]));
        assert!(served.is_err(), "{target} is reset");
        braid.log("client connected to the port of a transparent service itself");
    }
    net.download_is_whole(&net.client, SERVER[0], MPTCP);
}

#[test]
fn a_connection_that_began_before_is_left_alone() {
    let net = Network::new();
    let mut streams = [&net.client, &net.router].map(|netns| connect(netns, "10.2.1.2:80").unwrap());
    let _braid = net.braid(&["--transparent"]);
    for stream in &mut streams {
        stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.ends_with(&net.content));
    }
}

#[test]
fn an_mptcp_connection_that_began_before_can_still_get_subflows() {
    let net = Network::new();
    sh(&net.client, "ip addr add 10.1.1.3/24 dev eth0");
    let stream = net.client.run(|| {
        let options = mptcp::socket::Options::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            mptcp::socket::connect("10.2.1.2:80".parse().unwrap(), &options)
                .await
                .unwrap()
                .into_std()
                .unwrap()
        })
    });
    until("the first subflow joins, unhindered", || mptcp_counter(&net.server, "MPJoinAckRx") == 1);
    let _braid = net.braid(&["--transparent"]);
    sh(&net.client, "ip mptcp endpoint add 10.1.1.3 dev eth0 subflow");
    until("another one joins", || mptcp_counter(&net.server, "MPJoinAckRx") > 1);
    drop(stream);
}

#[test]
fn sighup_changes_what_is_taken_and_live_connections_stay() {
    let net = Network::new();
    let file = net.dir.path().join("proxy.toml");
    let config = |ports: &str| {
        let text = format!("[[service]]\nlisten = \"tcp://:5555\"\n[service.transparent]\nports = {ports}\n");
        fs::write(&file, text).unwrap();
    };
    config("[80, \"100-200\"]");
    let mut braid = net.serve(&["--config", file.to_str().unwrap()]);
    let mut streams = [&net.client, &net.router].map(|netns| connect(netns, "10.2.1.2:80").unwrap());
    // Both are taken, and have got through, before the rules change.
    until("both connections are at the server", || mptcp_counter(&net.server, "MPCapableACKRX") == 2);
    config("[81]");
    braid.signal(Signal::SIGHUP);
    braid.log("configuration reloaded");
    for (port, source) in [(MPTCP, "10.1.1.2"), (TCP, "10.2.1.1")] {
        net.download_is_whole(&net.client, SERVER[0], port);
        assert_eq!(net.last_client(port), source, "port {port}");
    }
    for stream in &mut streams {
        stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.ends_with(&net.content));
    }
}

#[test]
fn while_it_drains_old_connections_go_on_and_new_ones_go_directly() {
    let net = Network::new();
    let mut braid = net.braid(&["--transparent"]);
    let mut streams = [&net.client, &net.router].map(|netns| connect(netns, "10.2.1.2:80").unwrap());
    until("both connections are at the server", || mptcp_counter(&net.server, "MPCapableACKRX") == 2);
    braid.signal(Signal::SIGTERM);
    braid.log("stopped listening");
    for netns in [&net.client, &net.router] {
        net.download_is_whole(netns, SERVER[0], MPTCP);
    }
    assert_eq!(mptcp_counter(&net.server, "MPCapableACKRX"), 2, "curl speaks TCP");
    for stream in &mut streams {
        stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.ends_with(&net.content));
    }
    drop(streams);
    assert!(braid.end().0.success());
    assert_eq!(net.state(), net.clean);
}

#[test]
fn what_a_finished_connection_has_left_to_deliver_still_arrives_after_sigterm() {
    let net = Network::new();
    // A listener's connections have the buffer that it was made with.
    sh(&net.router, "sysctl -qw net.ipv4.tcp_wmem='4096 1000000 1000000'");
    let mut braid = net.braid(&["--transparent"]);
    // So small a window that most of the answer waits at the router.
    sh(&net.client, "sysctl -qw net.ipv4.tcp_rmem='4096 4096 4096'");
    let mut stream = connect(&net.client, "10.2.1.2:81").unwrap();
    stream.write_all(b"GET /small HTTP/1.0\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    until("the server has heard all and said all", || {
        sh(&net.server, "ss -Htn state connected exclude time-wait sport = :81").is_empty()
    });
    braid.signal(Signal::SIGTERM);
    braid.log("stopped listening");
    // As long as the client does not read, it stays.
    let stays = Instant::now() + Duration::from_millis(500);
    while Instant::now() < stays {
        assert!(braid.process.0.try_wait().unwrap().is_none(), "it has left with data to deliver");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.ends_with(&net.content[..SMALL]));
    drop(stream);
    assert!(braid.end().0.success());
}

#[test]
fn every_way_out_removes_the_rules() {
    let net = Network::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGABRT, Signal::SIGKILL] {
        let braid = net.braid(&["--transparent"]);
        assert_ne!(net.state(), net.clean);
        braid.signal(signal);
        braid.end();
        // After SIGKILL and its like nobody waits for the helper.
        until(&format!("nothing is left after {signal}"), || net.state() == net.clean);
        for netns in [&net.client, &net.router] {
            net.download_is_whole(netns, SERVER[0], TCP);
        }
    }
    // An error after the rules of the first service are there.
    let file = net.dir.path().join("proxy.toml");
    fs::write(&file, "[[service]]\nlisten = \"tcp://:5555\"\ntransparent = {}\n[[service]]\nlisten = \"tcp://:5556\"\nto = \"tcp://1.1.1.1:1\"\n").unwrap();
    let busy = net.router.run(|| std::net::TcpListener::bind("[::]:5556").unwrap()).unwrap();
    let output = net.refuses(&["--config", file.to_str().unwrap()]);
    assert!(output.contains("5556") && output.contains("Address already in use"), "{output}");
    assert_eq!(net.state(), net.clean);
    drop(busy);
}

#[test]
fn signals_to_the_whole_process_group_remove_the_rules_too() {
    let net = Network::new();
    let mut braid = net.braid(&["--transparent"]);
    let mut stream = connect(&net.client, "10.2.1.2:80").unwrap();
    until("the connection is at the server", || mptcp_counter(&net.server, "MPCapableACKRX") == 1);
    // Ctrl-C in a terminal, or a service manager's stop: the helper gets it as well and must outlive the drain.
    killpg(braid.pid(), Signal::SIGINT).unwrap();
    braid.log("stopped listening");
    stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.ends_with(&net.content));
    drop(stream);
    assert!(braid.end().0.success());
    assert_eq!(net.state(), net.clean);
}

#[test]
fn what_a_killed_helper_leaves_harms_nobody_and_goes_at_the_next_start() {
    let net = Network::new();
    for port in ["5555", "5557"] {
        let braid = net.braid(&["--transparent"]);
        killpg(braid.pid(), Signal::SIGKILL).unwrap();
        braid.end();
        until("the kernel removes the table", || sh(&net.router, "nft list ruleset").is_empty());
        assert_ne!(net.state(), net.clean, "policy routing is left");
        for netns in [&net.client, &net.router] {
            net.download_is_whole(netns, SERVER[0], TCP);
        }
        let listen = format!("tcp://:{port}");
        let mut braid = net.serve(&["--listen", &listen, "--transparent"]);
        net.download_is_whole(&net.client, SERVER[0], MPTCP);
        braid.log("server=10.2.1.2:80 ");
        braid.signal(Signal::SIGTERM);
        braid.end();
        assert_eq!(net.state(), net.clean);
    }
}

#[test]
fn a_restart_right_after_a_kill_works() {
    let net = Network::new();
    for _ in 0..5 {
        let braid = net.braid(&["--transparent"]);
        braid.signal(Signal::SIGKILL);
        braid.end();
        let mut braid = net.braid(&["--transparent"]);
        net.download_is_whole(&net.client, SERVER[0], MPTCP);
        braid.log("server=10.2.1.2:80 ");
    }
}

#[test]
fn two_transparent_services_do_not_take_each_others_connections() {
    let net = Network::new();
    let services =
        ["tcp://:5555", "tcp://:5556"].map(|listen| net.serve(&["--listen", listen, "--transparent"]));
    for netns in [&net.client, &net.router] {
        net.download_is_whole(netns, SERVER[0], MPTCP);
    }
    let logs = services.map(|braid| {
        braid.signal(Signal::SIGTERM);
        braid.end().1
    });
    let relayed = logs.iter().flatten().filter(|line| line.contains("server=10.2.1.2:80 ")).count();
    assert_eq!(relayed, 2, "each by one of them: {logs:#?}");
}

#[test]
fn print_rules_changes_nothing_and_nft_accepts_what_it_prints() {
    let net = Network::new();
    for options in [
        &["--transparent"][..],
        &["--transparent=local", "--keep-source"],
        &["--transparent", "--ports", "80,443,8000-8100,8050", "--to-cidr", "10.0.0.0/8,10.1.1.1,fd00::/8"],
        &["--transparent=forwarded", "--from-cidr", "fd01::/16", "--interface", "lan,wan1"],
    ] {
        let printed = net.print_rules(options);
        assert_eq!(net.state(), net.clean);
        nft(&net.router, &["-c"], &printed);
        assert_eq!(net.state(), net.clean);
        // Loaded by hand, with policy routing, they are what Braid installs, but for the owner.
        nft(&net.router, &[], &printed);
        let by_hand = sh(&net.router, "nft list ruleset");
        for command in printed.lines().filter_map(|line| line.strip_prefix("# ")) {
            sh(&net.router, command);
        }
        let routing = sh(&net.router, ROUTING);
        // It takes over what is there.
        let braid = net.braid(options);
        let installed = sh(&net.router, "nft list ruleset");
        assert_eq!(installed.replace(" # progname nft", "").replace("\tflags owner\n\n", ""), by_hand);
        assert_eq!(sh(&net.router, ROUTING), routing);
        braid.signal(Signal::SIGTERM);
        braid.end();
        assert_eq!(net.state(), net.clean);
    }
}

#[test]
fn what_is_missing_is_named_in_one_line() {
    let net = Network::new();
    let line = |output: Output| {
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    };
    let mut bare = Command::new("setpriv");
    bare.args([
        "--bounding-set",
        "-net_admin",
        env!("CARGO_BIN_EXE_braid"),
        "proxy",
        "--listen",
        "tcp://:5555",
        "--transparent",
    ]);
    let text = line(inside(&net.router, &mut bare).output().unwrap());
    assert!(text.contains("CAP_NET_ADMIN") && text.contains("[::]:5555"), "{text}");

    for (options, expected) in [
        (&["--listen", "tcp://10.1.1.1:5555", "--transparent"][..], "listens on all addresses"),
        (
            &["--listen", "tcp://:5555", "--transparent", "--to", "tcp://10.2.1.2:1"],
            "dials where its clients meant to go",
        ),
        (&["--listen", "tcp://:5555", "--transparent", "--accept-proxy"], "accept_proxy"),
    ] {
        let text = net.refuses(options);
        assert!(text.contains(expected), "{text}");
    }
    for (toml, expected) in [
        ("ports = [0]", "port"),
        ("ports = [\"9-8\"]", "9-8"),
        ("interfaces = [\"a; drop\"]", "not the name of an interface"),
        ("to_cidr = [\"10.0.0.0/33\"]", "10.0.0.0/33"),
        ("traffic = [\"all\"]", "all"),
        ("colour = 1", "colour"),
    ] {
        let file = net.dir.path().join("bad.toml");
        fs::write(&file, format!("[[service]]\nlisten = \"tcp://:5555\"\n[service.transparent]\n{toml}\n"))
            .unwrap();
        let text = net.refuses(&["--config", file.to_str().unwrap()]);
        assert!(text.contains(expected) && text.contains("bad.toml:4"), "{toml}: {text}");
    }
    assert_eq!(net.state(), net.clean);
}

#[test]
fn a_file_capability_reaches_the_tools() {
    let net = Network::new();
    let copy = net.dir.path().join("braid");
    fs::copy(env!("CARGO_BIN_EXE_braid"), &copy).unwrap();
    let works = |command: &mut Command| command.status().is_ok_and(|status| status.success());
    let ordinary = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    if !works(Command::new("setcap").arg("cap_net_admin+ep").arg(&copy))
        || !works(Command::new("setpriv").args(ordinary).arg("true"))
    {
        // Past the test harness, which keeps what a passing test prints.
        let reason = "skipped a_file_capability_reaches_the_tools: needs setcap(8) and a second user (not in a user namespace)";
        writeln!(std::io::stderr(), "{reason}").unwrap();
        return;
    }
    let mut command = Command::new("setpriv");
    command.args(ordinary).arg(&copy);
    command.args(["proxy", "--listen", "tcp://:5555", "--transparent"]);
    fs::set_permissions(net.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut braid = Braid::start(&net.router, &mut command);
    net.download_is_whole(&net.client, SERVER[0], MPTCP);
    braid.log("server=10.2.1.2:80 ");
    braid.signal(Signal::SIGTERM);
    assert!(braid.end().0.success());
    assert_eq!(net.state(), net.clean);
}

/// What `/small` serves of the content: more than a small window, less than a large send buffer.
const SMALL: usize = 60_000;
const ROUTING: &str = "ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all | grep -v fe80 | grep -v ff00";

/// Client, router, server, and two web servers on it.
struct Network {
    client: Netns,
    router: Netns,
    server: Netns,
    dir: TempDir,
    content: Vec<u8>,
    /// The router's rules and routes before anything was started.
    clean: String,
    _servers: [Process; 2],
}

impl Network {
    fn new() -> Self {
        let [client, router, server] = std::array::from_fn(|_| Netns::anonymous().unwrap());
        for netns in [&client, &router, &server] {
            sh(
                netns,
                "ip link set lo up; sysctl -qw net.mptcp.blackhole_timeout=0 net.ipv6.conf.default.accept_dad=0",
            );
        }
        let path = |netns: &Netns| format!("/proc/{}/fd/{}", std::process::id(), netns.as_fd().as_raw_fd());
        sh(
            &router,
            &format!(
                "ip link add lan type veth peer name eth0 netns {}
                 ip link add wan1 type veth peer name eth1 netns {server}
                 ip link add wan2 type veth peer name eth2 netns {server}
                 ip addr add 10.1.1.1/24 dev lan; ip addr add fd01:1::1/64 dev lan
                 ip addr add 10.2.1.1/24 dev wan1; ip addr add fd02:1::1/64 dev wan1
                 ip addr add 10.2.2.1/24 dev wan2
                 ip link set lan up; ip link set wan1 up; ip link set wan2 up
                 sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
                 ip mptcp limits set subflows 2 add_addr_accepted 2",
                path(&client),
                server = path(&server),
            ),
        );
        sh(
            &client,
            "ip addr add 10.1.1.2/24 dev eth0; ip addr add fd01:1::2/64 dev eth0; ip link set eth0 up
             ip route add default via 10.1.1.1; ip -6 route add default via fd01:1::1
             ip mptcp limits set subflows 2 add_addr_accepted 2",
        );
        sh(
            &server,
            "ip addr add 10.2.1.2/24 dev eth1; ip addr add fd02:1::2/64 dev eth1; ip link set eth1 up
             ip addr add 10.2.2.2/24 dev eth2; ip link set eth2 up
             ip route add default via 10.2.1.1; ip -6 route add default via fd02:1::1
             ip mptcp limits set subflows 2 add_addr_accepted 2
             ip mptcp endpoint add 10.2.2.2 dev eth2 signal",
        );
        let dir = TempDir::new().unwrap();
        let content: Vec<u8> =
            (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        fs::write(dir.path().join("file"), &content).unwrap();
        fs::write(dir.path().join("small"), &content[..SMALL]).unwrap();
        let servers = [(MPTCP, "mptcpize run python3"), (TCP, "python3")]
            .map(|(port, program)| http(&server, dir.path(), port, program));
        let mut net =
            Network { client, router, server, dir, content, clean: String::new(), _servers: servers };
        // Link-local addresses and neighbours are there once traffic has flowed.
        for host in SERVER {
            net.download_is_whole(&net.client, host, TCP);
        }
        net.clean = net.state();
        net
    }

    fn http(&self, netns: &Netns, port: u16, program: &str) -> Process {
        http(netns, self.dir.path(), port, program)
    }

    fn braid(&self, options: &[&str]) -> Braid {
        self.serve(&[&["--listen", "tcp://:5555"], options].concat())
    }

    fn serve(&self, arguments: &[&str]) -> Braid {
        Braid::start(&self.router, Command::new(env!("CARGO_BIN_EXE_braid")).arg("proxy").args(arguments))
    }

    /// Runs a proxy that must not start; returns the one line it says.
    fn refuses(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_braid"));
        let output = inside(&self.router, command.arg("proxy").args(arguments)).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        text.lines().last().unwrap_or_default().to_string()
    }

    fn print_rules(&self, options: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_braid"));
        command.args(["proxy", "--listen", "tcp://:5555", "--print-rules"]).args(options);
        let output = inside(&self.router, &mut command).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Everything on the router that transparent services change.
    fn state(&self) -> String {
        sh(&self.router, &format!("nft list ruleset; {ROUTING}"))
    }

    fn download_is_whole(&self, netns: &Netns, host: &str, port: u16) {
        let body = fetch_with(netns, "curl", &format!("http://{host}:{port}/file"));
        assert!(body.as_ref().is_ok_and(|body| *body == self.content), "{host}:{port}: {:?}", body.err());
    }

    /// The address that the web server saw last.
    fn last_client(&self, port: u16) -> String {
        let log = fs::read_to_string(self.dir.path().join(format!("log{port}"))).unwrap();
        let line = log.lines().rfind(|line| line.contains("GET")).unwrap();
        line.split(' ').next().unwrap().trim_start_matches("::ffff:").to_string()
    }
}

/// A running proxy and its log.
struct Braid {
    process: Process,
    lines: mpsc::Receiver<String>,
}

impl Braid {
    fn start(netns: &Netns, command: &mut Command) -> Self {
        let mut child = inside(netns, command).process_group(0).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let mut braid = Braid { process: Process(child), lines };
        braid.log(" listening ");
        braid
    }

    /// Waits for a line with `text` in it.
    fn log(&mut self, text: &str) -> String {
        let mut before = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => before.push(line),
                Err(error) => panic!("no {text:?} in the log ({error}), but {before:#?}"),
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.process.0.id() as i32)
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits for its end; returns the rest of the log.
    fn end(mut self) -> (ExitStatus, Vec<String>) {
        let mut status = None;
        until("it ends", || {
            status = self.process.0.try_wait().unwrap();
            status.is_some()
        });
        (status.unwrap(), self.lines.iter().collect())
    }
}

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // In order, so that a proxy takes its rules with it.
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn http(netns: &Netns, dir: &Path, port: u16, program: &str) -> Process {
    let log = fs::File::create(dir.join(format!("log{port}"))).unwrap();
    let script = format!("exec {program} -u -m http.server {port} --bind ::");
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).current_dir(dir).stdout(Stdio::null()).stderr(log);
    let process = Process(inside(netns, &mut command).spawn().unwrap());
    until("the web server answers", || connect(netns, &format!("[::1]:{port}")).is_ok());
    process
}

fn fetch_with(netns: &Netns, curl: &str, url: &str) -> Result<Vec<u8>, String> {
    let script = format!("exec {curl} -sS -g --noproxy '*' --max-time 20 '{url}'");
    let output = inside(netns, Command::new("sh").arg("-c").arg(script)).output().unwrap();
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn connect(netns: &Netns, target: &str) -> std::io::Result<TcpStream> {
    let target: SocketAddr = target.parse().unwrap();
    let stream = netns.run(|| TcpStream::connect_timeout(&target, PATIENCE)).unwrap()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A counter of `MPTcpExt:` in /proc/net/netstat.
fn mptcp_counter(netns: &Netns, name: &str) -> u64 {
    let text = netns.run(|| fs::read_to_string("/proc/thread-self/net/netstat").unwrap()).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("MPTcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|word| word == name).unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

fn nft(netns: &Netns, options: &[&str], rules: &str) {
    let mut command = Command::new("nft");
    command.args(options).args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = inside(netns, &mut command).spawn().unwrap();
    child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn sh(netns: &Netns, script: &str) -> String {
    let output = inside(netns, Command::new("sh").args(["-ec", script])).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn inside<'a>(netns: &Netns, command: &'a mut Command) -> &'a mut Command {
    netns.enter_on_exec(command);
    command
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
