//! `braid primary`: the primary subflow of other programs' connections.

use std::net::SocketAddr;
use std::ops::ControlFlow;

use mptcp::diag::{self, SubflowFlags};
use mptcp::socket::{self, Options};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::bad_input::refused;
use crate::net::{BRAID, Net, Running, pair, poll};

const SERVER: &str = "10.0.0.2:80";
const FIRST: &str = "10.0.0.1";
const SECOND: &str = "10.0.1.1";

/// A client that opens a second subflow by itself, and a server whose connections can be steered. The last is what
/// makes the kernel accept joins there.
fn hosts() -> (Net, Net, Running) {
    let (client, server) = pair(2);
    client.ok("ip route add 10.0.0.0/24 via 10.0.1.2 dev eth1 metric 10");
    client.ok("braid limits set subflows 1");
    client.ok(&format!("braid endpoint add {SECOND} dev eth1 subflow"));
    mptcp::sysctl::set(&server.0, "net.mptcp.pm_type", "1").unwrap();
    let watch = server.start("braid primary watch --json -v");
    watch.wait_for_note("subscribed");
    (client, server, watch)
}

/// The same with one connection of an echo client and an echo server, and a subflow on both paths.
struct Connected {
    client: Net,
    server: Net,
    watch: Running,
    echo: Running,
    program: Running,
    token: String,
}

fn connected() -> Connected {
    let (client, server, watch) = hosts();
    let echo = server.echo_server(SERVER);
    let mut program = client.start(&format!("braid echo client --addr {SERVER}"));
    program.write("hello\n");
    program.wait_for("recv> hello");
    let connection = poll("a second subflow", || {
        let shown = show(&server, "").pop().unwrap();
        let primary = shown["primary"].as_array().unwrap();
        let all_there = primary.len() == 2 && primary.iter().all(|subflow| subflow["state"] == "ESTAB");
        if all_there { ControlFlow::Break(shown) } else { ControlFlow::Continue(()) }
    });
    let token = connection["token"].as_str().unwrap().into();
    Connected { client, server, watch, echo, program, token }
}

fn show(net: &Net, selection: &str) -> Vec<Value> {
    serde_json::from_str(&net.ok(&format!("braid primary show --json {selection}"))).unwrap()
}

/// The remote addresses of a list of subflows, ports left out.
fn remotes(subflows: &Value) -> Vec<String> {
    let remote = |subflow: &Value| subflow["remote"].as_str().unwrap().parse::<SocketAddr>().unwrap();
    subflows.as_array().unwrap().iter().map(|s| remote(s).ip().to_canonical().to_string()).collect()
}

#[test]
fn a_connection_is_switched_by_every_name_it_has() {
    let Connected { client: _client, server, watch: _watch, echo, program: _program, token } = connected();
    let selections = [
        "--all".to_string(),
        format!("--token {token}"),
        format!("--program braid --port 80 --peer {SECOND}"),
        format!("--pid {}", echo.pid()),
    ];
    let ways = [(FIRST, FIRST), (SECOND, SECOND), ("10.0.0.1/32", FIRST), ("10.0.1.0/24", SECOND)];
    for (selection, (via, to)) in selections.iter().zip(ways) {
        let line = server.ok(&format!("braid primary set {selection} --via {via} --wait 10"));
        let begin = format!("{token}  braid ({})  primary 10.0.0.2:80 → {to}:", echo.pid());
        assert!(line.starts_with(&begin) && line.contains(": set in "), "{line}");
        let shown = &show(&server, "")[0];
        assert_eq!(remotes(&shown["primary"]), [to]);
        assert_eq!(remotes(&shown["backup"]).len(), 1);
        assert_eq!((&shown["steerable"], &shown["reason"]), (&Value::Bool(true), &Value::Null));
    }
    let fastest = server.ok("braid primary set --all --via fastest --json");
    let fastest: Value = serde_json::from_str(&fastest).unwrap();
    assert_eq!((&fastest[0]["outcome"], &fastest[0]["token"]), (&"switched".into(), &token.into()));
    let both = server.ok("braid primary set --all --both");
    assert_eq!(both.matches("10.0.0.2:80 → ").count(), 2, "{both}");
    assert_eq!(show(&server, "")[0]["backup"], serde_json::json!([]));
}

#[test]
fn the_peer_sees_an_interface_here_as_backup() {
    let Connected { client, server, watch: _watch, echo: _echo, program: _program, .. } = connected();
    // The server's two subflows come in on two interfaces, but leave from one address.
    let both = server.ok("braid primary set --all --via eth0");
    assert_eq!(both.matches("10.0.0.2:80 → ").count(), 2, "{both}");
    let output = server.output("braid primary set --all --via eth1");
    assert_eq!(output.status.code(), Some(1));
    let line = String::from_utf8(output.stdout).unwrap();
    assert!(line.contains("not steered: no subflow goes via eth1; it has 10.0.0.2:80 → "), "{line}");

    server.ok(&format!("braid primary set --all --via {SECOND}"));
    poll("the peer's view", || {
        let shown = show(&client, "").pop().unwrap();
        if remotes(&shown["backup"]).len() == 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let text = client.ok("braid primary show");
    assert!(text.contains("the peer asked for backup"), "{text}");
    assert!(text.contains("not steerable: it has the in-kernel path manager"), "{text}");
    let output = client.output("braid primary set --all --via 10.0.0.1");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn watch_tells_every_change_and_the_end() {
    let Connected { client: _client, server, watch, echo: _echo, mut program, token } = connected();
    let next = |wanted: &dyn Fn(&Value) -> bool| {
        loop {
            let line: Value = serde_json::from_str(watch.wait_for("{").last().unwrap()).unwrap();
            assert_eq!(line["token"], token.as_str());
            if wanted(&line) {
                return line;
            }
        }
    };
    next(&|line| line["primary"].as_array().is_some_and(|primary| primary.len() == 2));
    server.ok(&format!("braid primary set --all --via {SECOND}"));
    let switched = next(&|line| line["primary"].as_array().is_some_and(|primary| primary.len() == 1));
    assert_eq!(remotes(&switched["primary"]), [SECOND]);
    assert_eq!(remotes(&switched["before"]).len(), 2);
    assert_eq!(switched["owners"][0]["program"], "braid");
    program.close_stdin();
    assert!(program.wait().success());
    next(&|line| line["primary"].is_null());
    let mut watch = watch;
    watch.signal(Signal::SIGTERM);
    assert!(watch.wait().success());
}

#[test]
fn two_hundred_connections_are_switched_by_one_command() {
    let (client, server, _watch) = hosts();
    let at = |net: &Net| Options { netns: Some(net.0.clone()), ..Options::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(async { socket::listen(SERVER.parse().unwrap(), &at(&server)).unwrap() });
    let _ends = runtime.block_on(async {
        let mut ends = Vec::new();
        for _ in 0..200 {
            let client = at(&client);
            let dial = socket::connect(SERVER.parse().unwrap(), &client);
            let (client, accepted) = tokio::join!(dial, listener.accept());
            let (client, (server, _)) = (client.unwrap(), accepted.unwrap());
            // The first data bring the second subflow.
            for (from, to) in [(&client, &server), (&server, &client)] {
                from.writable().await.unwrap();
                assert_eq!(from.try_write(b"x").unwrap(), 1);
                to.readable().await.unwrap();
            }
            ends.push((client, server));
        }
        ends
    });
    let see = |net: &Net| runtime.block_on(diag::connections(&net.0)).unwrap();
    let until = |what: &str, wanted: &dyn Fn(&[diag::Connection]) -> bool, net: &Net| {
        poll(what, || if wanted(&see(net)) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) });
    };
    let joined = |c: &diag::Connection| {
        c.subflows.len() == 2 && c.subflows.iter().all(|subflow| subflow.state == "ESTAB")
    };
    until("a second subflow everywhere", &|all| all.len() == 200 && all.iter().all(joined), &server);
    let lines = server.ok(&format!("braid primary set --all --via {SECOND} --wait 30"));
    let switched =
        |line: &str| line.contains(&format!("  primary 10.0.0.2:80 → {SECOND}:")) && line.contains("set in");
    assert_eq!(lines.lines().filter(|line| switched(line)).count(), 200, "{lines}");
    // Every peer has been told, of the one subflow and not of the other.
    let told = |c: &diag::Connection| {
        c.subflows.iter().all(|subflow| {
            let is_first = subflow.local.ip().to_canonical().to_string() == FIRST;
            subflow.flags.contains(SubflowFlags::BACKUP_REMOTE) == is_first
        })
    };
    until("the flags at the client", &|all| all.len() == 200 && all.iter().all(told), &client);
}

#[test]
fn what_is_missing_is_named() {
    let Connected { client: _client, server, watch: _watch, echo: _echo, program: _program, token } =
        connected();
    for (line, words) in [
        ("braid primary set --via 10.0.0.1", "which connections? Give --token"),
        ("braid primary set --all", "--via <ADDRESS|INTERFACE|SUBNET|fastest>"),
        ("braid primary set --all --via eth0 --both", "cannot be used with"),
        ("braid primary set --all --via nonsense0", "nonsense0 is no address, no subnet and no interface of"),
        ("braid primary set --all --via 10.0.0.1 --drain slow", "invalid value 'slow' for '--drain <HOW>'"),
        ("braid primary set --all --via 10.0.0.1 --wait=-1", "expected seconds above zero"),
        ("braid primary set --token 1 --via 10.0.0.1", "there is no such connection"),
    ] {
        refused(line, &server.output(line), words);
    }
    let set = format!("primary set --token {token} --via {SECOND}");
    let without = |capability: &str, line: &str| {
        let line = format!("setpriv --bounding-set -{capability} {BRAID} {line}");
        refused(&line, &server.output(&line), &format!("needs CAP_{}", capability.to_uppercase()));
    };
    without("net_admin", &set);
    without("sys_ptrace", &format!("{set} --drain fast"));
    // Nothing has been changed.
    assert_eq!(show(&server, "")[0]["backup"], serde_json::json!([]));
}
