//! `braid pm`: real connections, whose subflows come, go and come back; and the daemon's own life.

use std::io::Write as _;
use std::ops::ControlFlow;

use mptcp::sysctl;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::bad_input::refused;
use crate::net::{BRAID, Net, Running, pair, poll};

/// A daemon's namespace, with the directory where it keeps its things.
struct Host {
    net: Net,
    run: tempfile::TempDir,
}

impl Host {
    fn new(net: Net) -> Self {
        Host { net, run: tempfile::tempdir().unwrap() }
    }

    fn pm(&self, words: &str) -> Running {
        let daemon = self.net.start(&format!("braid pm --run {} {words}", self.run.path().display()));
        daemon.wait_for_note("path manager runs");
        daemon
    }

    fn file(&self, text: &str) -> String {
        let path = self.run.path().join("pm.toml");
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    fn ask(&self, request: &str) -> String {
        self.net.ok(&format!("braid pm --run {} {request}", self.run.path().display()))
    }

    /// The local and remote address of each established subflow of the only connection, in order.
    fn subflows(&self) -> Vec<(String, String)> {
        let shown: Vec<Value> = serde_json::from_str(&self.net.ok("braid show --json")).unwrap();
        let subflows = shown.iter().flat_map(|c| c["subflows"].as_array().unwrap());
        let open = subflows.filter(|s| s["state"] == "ESTAB");
        let ends = |s: &Value| ["local", "remote"].map(|end| s[end].as_str().unwrap().to_string());
        let mut ends: Vec<_> = open.map(ends).map(|[a, b]| (a, b)).collect();
        ends.sort();
        ends
    }

    fn wait_for_subflows(&self, count: usize) -> Vec<(String, String)> {
        poll(&format!("{count} subflows"), || match self.subflows() {
            subflows if subflows.len() == count => ControlFlow::Break(subflows),
            _ => ControlFlow::Continue(()),
        })
    }

    /// The kind of path manager that new connections get.
    fn path_manager(&self) -> String {
        sysctl::get(&self.net.0, "net.mptcp.pm_type").unwrap()
    }
}

/// A daemon that a test kills leaves its holder, on purpose.
impl Drop for Host {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.run.path()).into_iter().flatten().flatten() {
            let pid = std::fs::read_to_string(entry.path().join("holder")).unwrap_or_default();
            if let Ok(pid) = pid.parse() {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM);
            }
        }
    }
}

/// A client with a daemon and a server, on two networks, with one connection.
fn connected(words: &str) -> (Host, Net, [Running; 3]) {
    let (client, server) = pair(2);
    let client = Host::new(client);
    server.ok("ip mptcp limits set subflows 8");
    let daemon = client.pm(words);
    let echo = server.echo_server("0.0.0.0:80");
    let program = talk(&client.net, "10.0.0.2:80");
    (client, server, [daemon, echo, program])
}

fn talk(client: &Net, to: &str) -> Running {
    let mut program = client.start(&format!("braid echo client --addr {to}"));
    program.write("hello\n");
    program.wait_for("recv> hello");
    program
}

#[test]
fn one_capability_is_all_that_the_daemon_and_its_holder_need() {
    let client = Host::new(Net::new());
    let with_one =
        format!("setpriv --bounding-set -all,+net_admin {BRAID} pm --run {}", client.run.path().display());
    let daemon = client.net.start(&with_one);
    daemon.wait_for_note("path manager runs");
    daemon.signal(Signal::SIGKILL);
    poll("the holder alone", || {
        // It holds a lock as long as it runs.
        let entries = std::fs::read_dir(client.run.path()).unwrap().flatten();
        let held = entries
            .filter_map(|entry| std::fs::File::open(entry.path().join("holder")).ok())
            .any(|file| nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockSharedNonblock).is_err());
        if held { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
}

#[test]
fn a_subflow_comes_up_from_each_address_and_a_lost_one_comes_back() {
    let (client, _server, [daemon, _echo, mut program]) = connected("");
    let subflows = client.wait_for_subflows(2);
    assert!(subflows[1].0.starts_with("10.0.1.1:"), "{subflows:?}");
    let port = subflows[1].0.rsplit_once(':').unwrap().1;
    let token = serde_json::from_str::<Value>(&client.ask("status --json")).unwrap();
    let token = token["connections"][0]["token"].as_str().unwrap().to_string();
    client.net.ok(&format!(
        "braid subflow destroy --token {token} local 10.0.1.1 port {port} remote 10.0.0.2 port 80"
    ));
    poll("another subflow", || match client.subflows() {
        now if now.len() == 2 && now[1].0 != subflows[1].0 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    program.write("still here\n");
    program.wait_for("recv> still here");
    drop(daemon);
}

#[test]
fn subflows_follow_addresses_and_interfaces() {
    let (client, _server, [_daemon, _echo, mut program]) = connected("");
    client.wait_for_subflows(2);
    client.net.ok("ip address del 10.0.1.1/24 dev eth1");
    client.wait_for_subflows(1);
    client.net.ok("ip address add 10.0.1.7/24 dev eth1");
    assert!(client.wait_for_subflows(2)[1].0.starts_with("10.0.1.7:"));
    client.net.ok("ip link set eth1 down");
    client.wait_for_subflows(1);
    client.net.ok("ip link set eth1 up");
    client.wait_for_subflows(2);
    // The connection's first address goes too.
    client.net.ok("ip address del 10.0.0.1/24 dev eth0");
    assert!(client.wait_for_subflows(1)[0].0.starts_with("10.0.1.7:"));
    program.write("moved\n");
    program.wait_for("recv> moved");
}

#[test]
fn killed_it_leaves_all_as_it_is_and_the_next_one_goes_on_and_puts_back_what_was_set() {
    let (client, _server, [mut daemon, _echo, mut program]) = connected("");
    let subflows = client.wait_for_subflows(2);
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    assert_eq!((client.path_manager().as_str(), client.subflows()), ("1", subflows.clone()));
    let mut daemon = client.pm("");
    assert_eq!(client.ask("status").lines().count(), 2);
    assert_eq!(client.subflows(), subflows);
    client.net.ok("ip address add 10.0.1.8/24 dev eth1");
    client.wait_for_subflows(3);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert_eq!(client.path_manager(), "0");
    program.write("still here\n");
    program.wait_for("recv> still here");
}

/// The kernel refuses joins to connections of the userspace path manager while nobody is subscribed to its events. It
/// counts subscribers of all namespaces (netlink_has_listeners()), so that other programs may hide a missing one.
#[test]
fn killed_in_mid_transfer_it_costs_no_byte() {
    let (client, server) = pair(2);
    let client = Host::new(client);
    server.ok("ip mptcp limits set subflows 8");
    for path in 0..2 {
        client.net.ok(&format!("tc qdisc add dev eth{path} root tbf rate 20mbit burst 32kb latency 50ms"));
    }
    let [sent, received] = ["sent", "received"].map(|name| client.run.path().join(name));
    let data: Vec<u8> = (0..4u32 << 20).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    std::fs::write(&sent, &data).unwrap();
    let mut daemon = client.pm("");
    let into = format!("OPEN:{},creat", received.display());
    // It goes on listening, which joins need.
    let _receiver = server.start(&format!("braid run -- socat -u TCP-LISTEN:5201,fork {into}"));
    let from = format!("OPEN:{},rdonly", sent.display());
    let mut sender =
        client.net.start(&format!("braid run -- socat -u {from} TCP:10.0.0.2:5201,retry=100,interval=0.1"));

    client.wait_for_subflows(2);
    let wait_for = |bytes: usize| {
        poll(&format!("{bytes} bytes"), || match std::fs::metadata(&received) {
            Ok(file) if file.len() as usize >= bytes => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
    };
    for quarter in 1..4 {
        wait_for(data.len() / 4 * quarter);
        daemon.signal(Signal::SIGKILL);
        daemon.wait();
        assert_eq!(client.subflows().len(), 2);
        daemon = client.pm("");
    }
    assert!(sender.wait().success());
    wait_for(data.len());
    assert!(std::fs::read(&received).unwrap() == data, "other bytes arrived");
}

#[test]
fn the_subscription_is_held_while_no_daemon_runs() {
    let (client, server) = pair(2);
    let server = Host::new(server);
    client.ok("ip mptcp limits set subflows 2");
    assert_eq!(subscribers(&server.net), 0);
    let mut daemon = server.pm("");
    let _echo = server.net.echo_server("0.0.0.0:80");
    let _program = talk(&client, "10.0.0.2:80");
    wait_for_subscribers(&server.net, 2);
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    assert_eq!(subscribers(&server.net), 1);
    client.ok("ip mptcp endpoint add 10.0.1.1 dev eth1 subflow");
    server.wait_for_subflows(2);
    // The next one's end ends the holder too.
    let mut daemon = server.pm("");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    wait_for_subscribers(&server.net, 0);
    let mut daemon = server.pm("--no-holder");
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    assert_eq!(subscribers(&server.net), 0);
}

/// How many sockets are subscribed to events of generic netlink.
fn subscribers(net: &Net) -> usize {
    let sockets = net.ok("cat /proc/net/netlink");
    // Columns: sk, Eth (16 is generic netlink), Pid, Groups, …
    let of = |line: &str| line.split_whitespace().skip(1).take(3).map(str::to_string).collect::<Vec<_>>();
    let is_subscribed = |f: &Vec<String>| f[0] == "16" && !f[2].trim_start_matches('0').is_empty();
    sockets.lines().map(of).filter(is_subscribed).count()
}

fn wait_for_subscribers(net: &Net, count: usize) {
    poll(&format!("{count} subscribers"), || match subscribers(net) == count {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    });
}

#[test]
fn one_that_ends_or_cannot_begin_leaves_nothing_behind() {
    let host = Host::new(Net::new());
    let file = host.file("metrics = \"127.0.0.1:9464\"\n");
    let line = format!("braid pm --run {} --config {file}", host.run.path().display());
    let busy = host.net.0.run(|| std::net::TcpListener::bind("127.0.0.1:9464")).unwrap().unwrap();
    refused(&line, &host.net.output(&line), "serve metrics on 127.0.0.1:9464: Address already in use");
    let nothing_left = || {
        wait_for_subscribers(&host.net, 0);
        let left = std::fs::read_dir(host.run.path()).unwrap().flatten().map(|entry| entry.file_name());
        assert_eq!((left.collect::<Vec<_>>(), host.path_manager().as_str()), (vec!["pm.toml".into()], "0"));
    };
    nothing_left();
    drop(busy);
    let mut daemon = host.pm(&format!("--config {file}"));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    nothing_left();
}

#[test]
fn without_the_capability_nothing_is_made() {
    let host = Host::new(Net::new());
    let line = format!("setpriv --bounding-set -net_admin {BRAID} pm --run {}", host.run.path().display());
    refused(&line, &host.net.output(&line), "needs CAP_NET_ADMIN");
    assert_eq!(std::fs::read_dir(host.run.path()).unwrap().count(), 0);
    assert_eq!(host.path_manager(), "0");
}

#[test]
fn after_lost_events_every_connection_gets_its_subflows() {
    let (client, server) = pair(2);
    let client = Host::new(client);
    server.ok("ip mptcp limits set subflows 8");
    let daemon = client.pm("--event-buffer 1");
    let _echo = server.echo_server("0.0.0.0:80");
    daemon.signal(Signal::SIGSTOP);
    let programs: Vec<_> = (0..20).map(|_| talk(&client.net, "10.0.0.2:80")).collect();
    daemon.signal(Signal::SIGCONT);
    daemon.wait_for_note("events were lost");
    client.wait_for_subflows(2 * programs.len());
}

#[test]
fn a_reload_changes_what_there_is_and_a_wrong_file_changes_nothing() {
    let (client, server) = pair(2);
    let client = Host::new(client);
    server.ok("ip mptcp limits set subflows 8");
    let file = client.file("[default]\npolicy = \"single\"\n");
    let daemon = client.pm(&format!("--config {file}"));
    let _echo = server.echo_server("0.0.0.0:80");
    let _program = talk(&client.net, "10.0.0.2:80");
    client.file("[default]\npolicy = \"single\"\n[[rule]]\nmatch = { program = \"braid\" }\npolicy = \"ndiffports\"\nports = 3\n");
    daemon.signal(Signal::SIGHUP);
    client.wait_for_subflows(3);
    client.file("[default]\npolicy = \"sinlge\"\n");
    let line = format!("braid pm --run {} reload", client.run.path().display());
    refused(&line, &client.net.output(&line), "default.policy: unknown variant");
    assert_eq!(client.subflows().len(), 3);
    client.file("[default]\npolicy = \"single\"\n");
    client.ask("reload");
    client.wait_for_subflows(1);
    // Those of the userspace path manager are nobody's then.
    client.file("mode = \"kernel\"\n");
    client.ask("reload");
    let status = format!("pid {}, mode kernel, 0 connections\n", daemon.pid());
    poll("status of the other mode", || match client.ask("status") == status {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    });
    assert_eq!(client.path_manager(), "0");
}

#[test]
fn send_buffers_are_bounded_as_long_as_the_file_says_so() {
    let client = Host::new(Net::new());
    let sizes = || -> Vec<u32> {
        let sizes = sysctl::get(&client.net.0, "net.ipv4.tcp_wmem").unwrap();
        sizes.split_whitespace().map(|size| size.parse().unwrap()).collect()
    };
    let before = sizes();
    let file = client.file("send_buffer = 262144");
    let mut daemon = client.pm(&format!("--config {file}"));
    assert_eq!(sizes(), [before[0], before[1], 262144]);
    client.file("send_buffer = 524288");
    client.ask("reload");
    assert_eq!(sizes(), [before[0], before[1], 524288]);
    client.file("");
    client.ask("reload");
    assert_eq!(sizes(), before);
    client.file("send_buffer = 65536");
    client.ask("reload");
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    assert_eq!(sizes(), before);
}

#[test]
fn a_second_daemon_is_refused_and_without_one_nobody_answers() {
    let client = Host::new(Net::new());
    let line = format!("braid pm --run {}", client.run.path().display());
    let status = format!("{line} status");
    refused(&status, &client.net.output(&status), "none runs in this namespace");
    let _daemon = client.pm("");
    refused(&line, &client.net.output(&line), "a path manager runs in this namespace already");
    assert_eq!(client.path_manager(), "1");
}

#[test]
fn other_users_may_not_control_it() {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::new(Net::new());
    let _daemon = host.pm("");
    // Not the files' permissions keep them out.
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(host.run.path(), 0o755);
    let directory = std::fs::read_dir(host.run.path()).unwrap().flatten().find(|entry| entry.path().is_dir());
    let directory = directory.unwrap().path();
    open(&directory, 0o755);
    open(&directory.join("control"), 0o666);
    let as_nobody = |command: &str| {
        host.net.output(&format!("setpriv --reuid 65534 --regid 65534 --clear-groups {command}"))
    };
    if !as_nobody("true").status.success() {
        let why = "skipped other_users_may_not_control_it: there is no other user here\n";
        std::io::stderr().write_all(why.as_bytes()).unwrap();
        return;
    }
    let ask = format!("socat - UNIX-CONNECT:{}", directory.join("control").display());
    let answer = as_nobody(&ask);
    assert_eq!(
        String::from_utf8_lossy(&answer.stdout),
        "error user 65534 may not control this path manager\n",
        "{answer:?}"
    );
    assert!(host.ask("status").starts_with("pid "));
}

#[test]
fn for_the_kernels_path_manager_it_keeps_endpoints_and_limits_right() {
    let (client, _server) = pair(2);
    let client = Host::new(client);
    let file = client.file("mode = \"kernel\"\n[default]\npolicy = \"aggregate\"\nmax_subflows = 4\n[[interface]]\nname = \"eth1\"\nmetered = true\n");
    let before = client.net.ok("ip mptcp limits");
    client.net.ok("ip mptcp endpoint add 192.0.2.1 signal");
    let mut daemon = client.pm(&format!("--config {file}"));
    let endpoints = || {
        let shown = client.net.ok("ip mptcp endpoint");
        shown
            .lines()
            .map(|line| {
                line.split_whitespace()
                    .filter(|w| w.parse::<u8>().is_err() && *w != "id")
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect::<Vec<_>>()
    };
    let with = |line: &str| endpoints().iter().any(|e| e == line);
    assert!(
        with("10.0.0.1 subflow dev eth0") && with("10.0.1.1 subflow backup dev eth1"),
        "{:?}",
        endpoints()
    );
    assert_eq!(client.net.ok("ip mptcp limits").trim(), "add_addr_accepted 4 subflows 4");
    client.net.ok("ip address del 10.0.1.1/24 dev eth1");
    poll("the endpoint's end", || {
        if with("10.0.1.1 subflow backup dev eth1") {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    client.net.ok("ip address add 10.0.1.9/24 dev eth1");
    poll("the new endpoint", || {
        if with("10.0.1.9 subflow backup dev eth1") {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert_eq!(
        (endpoints(), client.net.ok("ip mptcp limits")),
        (vec!["192.0.2.1 signal".to_string()], before)
    );
}

#[test]
fn metrics_tell_what_it_did() {
    let (client, server) = pair(2);
    let client = Host::new(client);
    server.ok("ip mptcp limits set subflows 8");
    let text = "metrics = \"127.0.0.1:9464\"\n";
    let file = client.file(text);
    let _daemon = client.pm(&format!("--config {file}"));
    let monitor = client.net.start("braid monitor -v");
    monitor.wait_for_note("subscribed");
    let _echo = server.echo_server("0.0.0.0:80");
    let program = talk(&client.net, "10.0.0.2:80");
    let number = |name: &str| {
        let metrics = client.net.ok("curl -s http://127.0.0.1:9464/metrics");
        let of = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u32>().ok();
        metrics.lines().find_map(of)
    };
    let action = |kind: &str| number(&format!("braid_pm_actions_total{{action=\"{kind}\"}}"));
    let gauges = || {
        ["connections", "subflows{use=\"active\"}", "subflows{use=\"backup\"}"]
            .map(|name| number(&format!("braid_pm_{name}")))
    };
    let until = |wanted: [u32; 3]| {
        poll(&format!("{wanted:?}"), || match gauges() == wanted.map(Some) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
    };
    // Each address with each: the IPv6 ones are of another family.
    until([1, 2, 0]);
    // The kernel refuses a first one that comes too early.
    assert_eq!(action("create"), number("braid_pm_refused_total").map(|refused| refused + 1));
    assert_eq!([action("withdraw"), action("set_backup")], [None, None]);

    client.file(&format!("{text}[[interface]]\nname = \"eth1\"\nmetered = true\n"));
    client.ask("reload");
    until([1, 1, 1]);
    assert_eq!(action("set_backup"), Some(1));
    client.file("nonsense");
    client.net.output(&format!("braid pm --run {} reload", client.run.path().display()));
    let reloads =
        ["ok", "failed"].map(|result| number(&format!("braid_pm_reloads_total{{result=\"{result}\"}}")));
    assert_eq!(reloads, [Some(1), Some(1)]);

    client.net.ok("ip address del 10.0.1.1/24 dev eth1");
    until([1, 1, 0]);
    assert_eq!(action("withdraw"), Some(1));
    drop(program);
    until([0, 0, 0]);
    assert_eq!(number("braid_pm_overruns_total"), Some(0));
    assert!(number("braid_pm_looks_total") > Some(5));
    // As many events as somebody else has read.
    let mut events = 0;
    poll("as many events", || {
        events += monitor.unread().len() as u32;
        match number("braid_pm_events_total") == Some(events) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    assert!(events >= 5, "{events}");
}
