//! `braid show`.

use std::ops::ControlFlow;
use std::process::Stdio;

use serde_json::Value;

use crate::net::{Net, Running, pair, poll};

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
fn show_and_ss_agree_on_two_connections_of_two_programs_at_both_ends() {
    for to in ["10.0.0.2", "[fd00:0::2]", "[::ffff:10.0.0.2]"] {
        let (client, server) = pair(2);
        let _servers = [server.echo_server(":80"), server.echo_server(":81")];
        client.ok("braid endpoint add 10.0.1.1 subflow backup");
        client.ok("braid endpoint add fd00:1::1 subflow");
        let programs = [
            client.start(&format!("braid echo client --addr {to}:80")),
            client.start(&format!("mptcpize run socat - TCP:{to}:81")),
        ]
        .map(|mut program| {
            program.write("hello\n");
            program.wait_for("hello");
            program
        });
        for net in [&client, &server] {
            let (shown, ss) = poll("two connections of two subflows, in a quiet moment", || {
                let before = of_show(&net.ok("braid show --json"));
                let ss = of_ss(&net.ok("ss -HMtinpeO"));
                if before.len() == 6 && before == of_show(&net.ok("braid show --json")) {
                    ControlFlow::Break((before, ss))
                } else {
                    ControlFlow::Continue(())
                }
            });
            assert_eq!(shown, ss, "{to}");
        }
        let owners = of_show(&client.ok("braid show --json")).join("\n");
        for (program, name) in programs.iter().zip(["braid", "socat"]) {
            assert!(owners.contains(&format!(" {name} {}", program.pid())), "{owners}");
        }
        assert_eq!(owners.contains("[::ffff:10.0.0.1]"), to.contains("ffff"), "{owners}");
    }
}

/// A line for each connection and subflow, of what `braid show` and ss both tell.
fn of_show(json: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for connection in serde_json::from_str::<Vec<Value>>(json).unwrap() {
        let text = |value: &Value, key: &str| value[key].to_string().replace('"', "");
        let token = text(&connection, "token");
        let [owner] = connection["owners"].as_array().unwrap().as_slice() else { panic!("{connection}") };
        let owner = format!("{} {}", text(owner, "program"), text(owner, "pid"));
        let fields = ["state", "local", "remote", "inode"].map(|key| text(&connection, key)).join(" ");
        let sequence =
            ["write_seq", "snd_una", "rcv_nxt"].map(|key| text(&connection["info"], key)).join(" ");
        lines.push(format!("mptcp {token} {fields} {owner} {sequence}"));
        for subflow in connection["subflows"].as_array().unwrap() {
            const KEYS: [&str; 10] = [
                "state",
                "local",
                "remote",
                "local_id",
                "remote_id",
                "flags",
                "bytes_sent",
                "bytes_received",
                "cwnd",
                "retransmits",
            ];
            lines.push(format!("tcp {token} {}", KEYS.map(|key| text(subflow, key)).join(" ")));
            let backup = ["b", "B"].map(|letter| text(subflow, "flags").contains(letter));
            assert_eq!(
                backup.map(Value::from),
                [&subflow["backup_by_us"], &subflow["backup_by_peer"]].map(Value::clone)
            );
            let priority = if backup.contains(&true) { "backup" } else { "primary" };
            assert_eq!(subflow["priority"], priority);
            // Network N is on ethN at both ends, and has N in its addresses.
            let interface =
                if text(subflow, "local").contains(":1::") || text(subflow, "local").contains(".0.1.") {
                    "eth1"
                } else {
                    "eth0"
                };
            assert_eq!(subflow["interface"], interface);
        }
    }
    lines.sort();
    lines
}

fn of_ss(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let field = |key: &str| words.iter().find_map(|word| word.strip_prefix(key));
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let [protocol, state, _, _, local, remote, ..] = words[..] else { panic!("{line}") };
        let Some(token) = field("token:") else { continue };
        if protocol == "mptcp" {
            let owner = field("users:((").unwrap().replace(['"', ')'], "").replace("pid=", "");
            let owner: Vec<_> = owner.split(',').take(2).collect();
            let sequence =
                ["write_seq:", "snd_una:", "rcv_nxt:"].map(|key| hex(field(key).unwrap()).to_string());
            lines.push(format!(
                "mptcp {:08x} {state} {local} {remote} {} {} {}",
                hex(token),
                field("ino:").unwrap(),
                owner.join(" "),
                sequence.join(" ")
            ));
        } else {
            let (theirs, ours) = token.split_once('/').unwrap();
            let ((_, remote_id), (token, local_id)) =
                (theirs.split_once("(id:").unwrap(), ours.split_once("(id:").unwrap());
            let ids = [local_id, remote_id].map(|id| id.trim_end_matches(')'));
            // ss leaves zeros out.
            let number = |key: &str| field(key).unwrap_or("0").to_string();
            lines.push(format!(
                "tcp {:08x} {state} {local} {remote} {} {} {} {} {} {}",
                hex(token),
                ids.join(" "),
                field("flags:").unwrap_or_default(),
                number("bytes_sent:"),
                number("bytes_received:"),
                number("cwnd:"),
                field("retrans:").and_then(|both| both.split_once('/')).map_or("0", |(_, total)| total),
            ));
        }
    }
    lines.sort();
    lines
}

#[test]
fn a_fallen_back_connection_is_seen_at_the_end_that_opened_it() {
    let net = Net::new();
    let server = Running::start(net.command("braid echo server --addr 10.0.0.1:80").env("BRAID_MPTCP", "0"));
    server.wait_for("listening");
    let mut client = net.start("braid echo client --addr 10.0.0.1:80");
    client.write("x\n");
    client.wait_for("recv> x");
    let shown: Vec<Value> = serde_json::from_str(&net.ok("braid show --json")).unwrap();
    assert_eq!(shown.len(), 1, "{shown:#?}");
    assert_eq!((&shown[0]["protocol"], &shown[0]["owners"][0]["pid"]), (&"tcp".into(), &client.pid().into()));
    assert!(net.ok("braid show").contains("  fell back to TCP  "));
}

#[test]
fn a_watch_tells_the_rate_since_the_block_before() {
    let mut scene = Scene::new();
    let pid = scene.clients[0].pid();
    let mut text = scene.net.start(&format!("braid show --pid {pid} --watch 0.05"));
    let mut json = scene.net.start(&format!("braid show --json --watch 0.05 --pid {pid}"));
    let first: Value = serde_json::from_str(&json.wait_for("[").pop().unwrap()).unwrap();
    assert_eq!(first[0].get("sent_bit_per_s"), None);
    assert_eq!(text.wait_for("└─").len(), 3);
    // Data goes on until a block shows it at each end of each output.
    let rate = |block: &Value, key: &str| block[0][key].as_u64().unwrap();
    poll("a rate above zero", || {
        scene.clients[0].write("hello\n");
        scene.clients[0].wait_for("recv> hello");
        let block: Value = serde_json::from_str(&json.wait_for("[").pop().unwrap()).unwrap();
        let first = &block[0]["subflows"][0];
        let both = rate(&block, "sent_bit_per_s") > 0 && rate(&block, "received_bit_per_s") > 0;
        if both && first["sent_bit_per_s"].as_u64().unwrap() > 0 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    let block = text.wait_for("└─");
    assert_eq!(block.len(), 4, "{block:#?}");
    assert_eq!(block[0], "");
    assert!(block[1].contains("bit/s)  received "), "{block:#?}");
    assert!(block.iter().all(|line| !line.contains('\x1b')), "{block:#?}");
    for watch in [&mut text, &mut json] {
        watch.signal(nix::sys::signal::Signal::SIGINT);
        assert_eq!(watch.wait().code(), Some(0));
    }
}

#[test]
fn a_watch_on_a_terminal_takes_the_screen_anew() {
    let scene = Scene::new();
    // script(1) gives a terminal, and writes what appears on it.
    let line = format!("{} show --port 80 --watch 0.05", crate::net::BRAID);
    let watch = Running::start(scene.net.command("script -qfec").arg(line).arg("/dev/null"));
    let screen = watch.wait_for("bit/s").join("\n");
    let screens: Vec<_> = screen.split("\x1b[H\x1b[2J").collect();
    assert_eq!((screens.len(), screens[0]), (3, ""), "{screen:?}");
    // The first line of the screen is that of the first connection: bold.
    assert!(screens[1..].iter().all(|screen| screen.starts_with("\x1b[1m")), "{screen:?}");
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
    assert!(lines[1].starts_with("├─ 10.0.0.1:") && lines[1].contains("  id 0/0  lo  primary "), "{tree}");
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
    let hidden = |shown: &str| -> Vec<Value> {
        let shown: Vec<Value> = serde_json::from_str(shown).unwrap();
        shown.iter().map(|connection| connection["owners_hidden"].clone()).collect()
    };
    let blind = format!("setpriv --bounding-set -sys_ptrace {} show --json", crate::net::BRAID);
    assert_eq!(hidden(&scene.net.ok(&blind)), [true; 4]);
    assert_eq!(hidden(&scene.net.ok("braid show --json")), [false; 4]);
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
