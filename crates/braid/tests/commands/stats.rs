//! `braid stats`.

use std::ops::ControlFlow;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::net::{Net, Running, pair, poll};

fn json(line: &str) -> Vec<Value> {
    serde_json::from_str(line).unwrap()
}

fn value(counters: &[Value], name: &str) -> u64 {
    let counter = counters.iter().find(|counter| counter["name"] == name);
    counter.unwrap_or_else(|| panic!("{name} in {counters:?}"))["value"].as_u64().unwrap()
}

/// The counters of `net` once `name` is `wanted`.
fn stats_with(net: &Net, name: &str, wanted: u64) -> Vec<Value> {
    poll(name, || {
        let counters = json(&net.ok("braid stats --json"));
        if value(&counters, name) == wanted {
            ControlFlow::Break(counters)
        } else {
            ControlFlow::Continue(())
        }
    })
}

#[test]
fn a_refused_join_is_counted_at_both_ends() {
    let (client, server) = pair(2);
    client.ok("braid endpoint add 10.0.1.1 dev eth1 subflow");
    server.ok("braid limits set subflows 0");
    let _server = server.echo_server("10.0.0.2:80");
    let mut program = client.start("braid echo client --addr 10.0.0.2:80");
    program.write("hello\n");
    program.wait_for("recv> hello");
    let counters = stats_with(&server, "MPTcpExtMPJoinRejected", 1);
    assert_eq!(value(&counters, "MPTcpExtMPJoinSynRx"), 1);
    assert_eq!(value(&counters, "MPTcpExtMPCapableACKRX"), 1);
    assert_eq!(value(&counters, "MPTcpExtMPJoinAckRx"), 0);
    let rejected = counters.iter().find(|c| c["name"] == "MPTcpExtMPJoinRejected").unwrap();
    assert_eq!(rejected["group"], "refused");
    let counters = stats_with(&client, "TcpEstabResets", 1);
    assert_eq!(value(&counters, "MPTcpExtMPJoinSynAckRx"), 1);
    let text = server.ok("braid stats");
    assert!(text.contains("\nJoins refused or failed\n"), "{text}");
    assert!(
        text.lines()
            .any(|l| l.trim_start().starts_with("1  MPTcpExtMPJoinRejected ") && l.ends_with(" events")),
        "{text}"
    );
}

#[test]
fn a_fallback_is_counted_by_its_cause() {
    let net = Net::new();
    let server = Running::start(net.command("braid echo server --addr :80").env("BRAID_MPTCP", "0"));
    server.wait_for("listening on");
    net.ok("braid echo client --addr 10.0.0.1:80 --msg x");
    let counters = json(&net.ok("braid stats --json"));
    assert_eq!(value(&counters, "MPTcpExtMPCapableFallbackSYNACK"), 1);
    assert_eq!(value(&counters, "MPTcpExtMPCapableSYNACKRX"), 0);
}

#[test]
fn the_values_are_those_of_nstat() {
    let net = Net::new();
    let _server = net.echo_server(":80");
    net.ok("braid echo client --addr 10.0.0.1:80 --msg x");
    // The connection's last segments may still be on their way: ask both when nothing changes any more.
    let (ours, theirs) = poll("a quiet moment", || {
        let (before, theirs) = (net.ok("braid stats --json"), net.ok("nstat -asz --json"));
        if before == net.ok("braid stats --json") {
            ControlFlow::Break((json(&before), theirs))
        } else {
            ControlFlow::Continue(())
        }
    });
    let theirs: Value = serde_json::from_str(&theirs).unwrap();
    assert!(value(&ours, "MPTcpExtMPCapableSYNTX") > 0);
    for counter in &ours {
        let name = counter["name"].as_str().unwrap();
        assert_eq!(counter["value"], theirs["kernel"][name], "{name}");
    }
}

#[test]
fn zeros_are_shown_when_asked_for() {
    let net = Net::new();
    let idle = net.output("braid stats");
    assert_eq!((idle.status.code(), idle.stdout.len()), (Some(0), 0));
    assert_eq!(idle.stderr, b"all counters are zero\n");
    let all = net.ok("braid stats --all");
    assert!(all.starts_with("Connections\n0  MPTcpExtMPCurrEstab "), "{all}");
}

#[test]
fn watch_shows_all_and_then_what_changed_in_another_namespace() {
    let (here, there) = (Net::new(), Net::new());
    let server = there.echo_server("10.0.0.1:80");
    let mut watch = here.start(&format!("braid stats --json --watch 0.01 --pid {}", server.pid()));
    let first = json(&watch.wait_for("[")[0]);
    assert_eq!(value(&first, "MPTcpExtMPCapableSYNRX"), 0);
    assert!(first.iter().all(|counter| counter.get("change").is_none()), "{first:?}");
    there.ok("braid echo client --addr 10.0.0.1:80 --msg x");
    let changed = json(watch.wait_for("\"MPTcpExtMPCapableSYNRX\"").last().unwrap());
    let counter = changed.iter().find(|counter| counter["name"] == "MPTcpExtMPCapableSYNRX").unwrap();
    assert_eq!((&counter["change"], &counter["value"]), (&Value::from(1), &Value::from(1)));
    assert!(changed.iter().all(|counter| counter["change"] != 0), "{changed:?}");
    watch.signal(Signal::SIGTERM);
    assert_eq!(watch.wait().code(), Some(0));
}
