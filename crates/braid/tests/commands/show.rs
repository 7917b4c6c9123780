//! `braid show`.

use std::ops::ControlFlow;
use std::process::Stdio;

use serde_json::Value;

use crate::net::{Net, Running, poll};

/// Two clients on two servers, the first with a second subflow that is a backup.
struct Scene {
    net: Net,
    servers: [Running; 2],
    clients: [Running; 2],
}

impl Scene {
    fn new() -> Self {
        let net = Net::new();
        let servers = [net.echo_server("10.0.0.1:80"), net.echo_server("[fd00::1]:81")];
        net.ok("braid endpoint add 10.0.0.2 dev lo subflow backup");
        let clients = ["10.0.0.1:80", "[fd00::1]:81"].map(|addr| {
            let mut client = net.start(&format!("braid echo client --addr {addr}"));
            client.write("hello\n");
            client.wait_for("recv> hello");
            client
        });
        let scene = Scene { net, servers, clients };
        poll("the second subflow", || {
            let shown = scene.json("--port 80");
            let both = shown.len() == 2 && shown.iter().all(|c| c["subflows"].as_array().unwrap().len() == 2);
            if both { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        scene
    }

    fn json(&self, arguments: &str) -> Vec<Value> {
        let shown = self.net.ok(&format!("braid show --json {arguments}"));
        serde_json::from_str(&shown).unwrap()
    }
}

#[test]
fn backup_by_us_and_by_the_peer_are_told_apart() {
    let scene = Scene::new();
    let [client, server] = [&scene.clients[0], &scene.servers[0]]
        .map(|process| scene.json(&format!("--pid {}", process.pid())).pop().unwrap());
    for (side, by_us, by_peer) in [(&client, true, false), (&server, false, true)] {
        let subflows = side["subflows"].as_array().unwrap();
        assert_eq!(side["protocol"], "mptcp");
        assert_eq!(side["info"]["bytes_sent"], 6);
        let flags: Vec<_> = subflows.iter().map(|s| (&s["backup_by_us"], &s["backup_by_peer"])).collect();
        assert_eq!(flags, [(&Value::from(false), &Value::from(false)), (&by_us.into(), &by_peer.into())]);
    }
    assert_eq!(client["subflows"][1]["local_id"], 1);
    assert_eq!(server["subflows"][1]["remote_id"], 1);
}

#[test]
fn filters_leave_only_what_they_name() {
    let scene = Scene::new();
    assert_eq!(scene.json("").len(), 4);
    assert_eq!(scene.json("--program braid").len(), 4);
    assert_eq!(scene.json("--program iperf3").len(), 0);
    assert_eq!(scene.json("--port 81").len(), 2);
    assert_eq!(scene.json("--peer fd00::1").len(), 2);
    // The server's connection has it as the peer of its second subflow.
    assert_eq!(scene.json("--peer 10.0.0.2").len(), 1);
    let mine = scene.json(&format!("--pid {}", scene.clients[1].pid())).pop().unwrap();
    assert_eq!(mine["remote"], "[fd00::1]:81");
    let token = mine["token"].as_str().unwrap();
    let same = scene.json(&format!("--token {token}"));
    assert_eq!(same.iter().map(|c| &c["inode"]).collect::<Vec<_>>(), [&mine["inode"]]);
}

#[test]
fn token_addresses_and_counters_are_those_of_ss() {
    let scene = Scene::new();
    let subflows = || -> Vec<Value> {
        scene.json("").iter().flat_map(|c| c["subflows"].as_array().unwrap().clone()).collect()
    };
    // The last acknowledgements may still be on their way: ask both when nothing changes any more.
    let (subflows, ss) = poll("a quiet moment", || {
        let (before, ss) = (subflows(), scene.net.ok("ss -HMtin state established"));
        if before == subflows() { ControlFlow::Break((before, ss)) } else { ControlFlow::Continue(()) }
    });
    for connection in scene.json("") {
        let token = connection["token"].as_str().unwrap();
        // ss writes no leading zeros.
        let token = format!(" token:{} ", token.trim_start_matches('0'));
        assert!(ss.contains(&token), "{token} in {ss}");
    }
    for subflow in subflows {
        let port = |end: &str| subflow[end].as_str().unwrap().rsplit_once(':').unwrap().1.to_string();
        let lines: Vec<_> = ss.lines().collect();
        let of_subflow = lines.windows(2).find(|pair| {
            let ports: Vec<_> =
                pair[0].split_whitespace().filter_map(|w| w.rsplit_once(':')).map(|w| w.1).collect();
            pair[0].starts_with("tcp") && ports == [port("local"), port("remote")]
        });
        let details = of_subflow.unwrap_or_else(|| panic!("{subflow} in {ss}"))[1];
        let number = |key: &str| {
            details.split_whitespace().find_map(|w| w.strip_prefix(key)).unwrap_or("0").to_string()
        };
        assert_eq!(subflow["bytes_sent"].to_string(), number("bytes_sent:"), "{details}");
        assert_eq!(subflow["bytes_received"].to_string(), number("bytes_received:"), "{details}");
        assert_eq!(subflow["cwnd"].to_string(), number("cwnd:"), "{details}");
        let ids = [&subflow["local_id"], &subflow["remote_id"]].map(|id| format!("(id:{id})"));
        assert!(ids.iter().all(|id| details.contains(id)), "{ids:?} in {details}");
    }
}

#[test]
fn the_tree_has_a_line_for_each_connection_and_subflow() {
    let scene = Scene::new();
    let pid = scene.clients[0].pid();
    let tree = scene.net.ok(&format!("braid show --pid {pid}"));
    let lines: Vec<_> = tree.lines().collect();
    assert_eq!(lines.len(), 3, "{tree}");
    assert!(
        lines[0].contains(&format!("→ 10.0.0.1:80  MPTCP  braid ({pid})  sent 6 B  received 6 B")),
        "{tree}"
    );
    assert!(lines[1].starts_with("├─ 10.0.0.1:") && lines[1].contains("  id 0/0  "), "{tree}");
    assert!(
        lines[2].starts_with("└─ 10.0.0.2:") && lines[2].contains("  id 1/0  lo  backup (ours)  "),
        "{tree}"
    );
}

#[test]
fn what_cannot_be_seen_is_said() {
    let scene = Scene::new();
    let blind = scene.net.output(&format!("setpriv --bounding-set -sys_ptrace {} show", crate::net::BRAID));
    assert!(blind.status.success(), "{blind:?}");
    let note = String::from_utf8_lossy(&blind.stderr);
    assert_eq!(note, "4 of 4 connections: programs not seen, which needs CAP_SYS_PTRACE\n");
}

#[test]
fn an_empty_namespace_shows_nothing_and_says_so() {
    let net = Net::new();
    let shown = net.output("braid show");
    assert_eq!((shown.status.code(), shown.stdout.len()), (Some(0), 0));
    assert_eq!(shown.stderr, b"no MPTCP connections\n");
    assert_eq!(net.ok("braid show --json"), "[]\n");
}

#[test]
fn a_reader_that_leaves_ends_the_program_quietly() {
    let net = Net::new();
    for line in ["braid limits", "braid completion bash", "braid man"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = net.command(line).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]), "{line}");
    }
}
