//! `braid monitor` beside `ip mptcp monitor`.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use mptcp::socket::{self, Options};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::net::{Net, Running, poll};

/// A connection with all that the in-kernel path manager does in its life: its events name the kinds below.
fn live(net: &Net) {
    net.ok("braid limits set subflows 4 add_addr_accepted 4");
    let _server = net.echo_server("10.0.0.1:80");
    let mut client = net.start("braid echo client --addr 10.0.0.1:80");
    client.wait_for("connected");
    // Data both ways makes the connection fully established.
    client.write("x\n");
    client.wait_for("recv> x");
    let subflows = |wanted: usize| {
        poll("a change of subflows", || {
            let shown: Value = serde_json::from_str(&net.ok("braid show --json")).unwrap();
            let mut each = shown.as_array().unwrap().iter().map(|c| c["subflows"].as_array().unwrap().len());
            if each.all(|count| count == wanted) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
    };
    net.ok("braid endpoint add 10.0.0.2 id 2 subflow");
    subflows(2);
    net.ok("braid endpoint change id 2 backup");
    net.ok("braid endpoint add fd00::1 id 3 signal");
    net.ok("braid endpoint delete id 2");
    subflows(1);
    client.close_stdin();
    assert!(client.wait().success());
}

const KINDS: [&str; 8] =
    ["CREATED", "ESTABLISHED", "SF_ESTABLISHED", "SF_PRIO", "ANNOUNCED", "REMOVED", "SF_CLOSED", "CLOSED"];

#[test]
fn the_lines_are_those_of_ip_mptcp_monitor() {
    let net = Net::new();
    let theirs = net.start("ip mptcp monitor");
    let ours = net.start("braid -v monitor");
    ours.wait_for_note("subscribed");
    wait_until_it_prints(&net, &theirs);
    live(&net);
    // One more listener marks the end of the stream.
    drop(net.echo_server("10.0.0.2:4444"));
    let ours = ours.wait_for("LISTENER_CLOSED] saddr4=10.0.0.2 sport=4444");
    for kind in KINDS {
        assert!(ours.iter().any(|line| line.contains(&format!(" {kind}]"))), "no {kind} in {ours:#?}");
    }
    let listeners = ours.iter().filter(|line| line.contains("[LISTENER_CREATED]")).count();
    assert!(listeners >= 2, "{ours:#?}");

    let of_connections: Vec<_> =
        ours.iter().filter(|line| line.contains("token=")).map(|l| frame(l)).collect();
    let mut seen = Vec::new();
    while seen.len() < of_connections.len() {
        seen.extend(theirs.wait_for("token=").pop().map(|line| frame(&line)));
    }
    assert_eq!(of_connections, seen);
}

/// Events by which a monitor is seen to listen: iproute2 says nothing at its start.
fn wait_until_it_prints(net: &Net, monitor: &Running) {
    poll("the first event", || {
        drop(net.echo_server("10.0.0.1:81"));
        if monitor.has_printed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
}

/// The kind's column was two narrower before iproute2 knew of listeners.
fn frame(line: &str) -> String {
    line.replacen("[ ", "[", 8).split_whitespace().collect::<Vec<_>>().join(" ").replacen("[ ", "[", 1)
}

#[test]
fn json_has_the_fields_of_the_text() {
    let net = Net::new();
    let text = net.start("braid -v monitor");
    let json = net.start("braid -v monitor --json");
    text.wait_for_note("subscribed");
    json.wait_for_note("subscribed");
    live(&net);
    drop(net.echo_server("10.0.0.2:4444"));
    let text = text.wait_for("LISTENER_CLOSED] saddr4=10.0.0.2 sport=4444");
    let json = json.wait_for(r#"{"event":"LISTENER_CLOSED","local_ip":"10.0.0.2","local_port":4444}"#);
    assert_eq!(text.len(), json.len());
    for (text, json) in text.iter().zip(&json) {
        let json: Value = serde_json::from_str(json).unwrap();
        let kind = json["event"].as_str().unwrap();
        assert!(text.contains(&format!("{kind}]")), "{text} {json}");
        let same = |key: &str, name: &str| {
            let in_text = text.split(' ').find_map(|word| word.strip_prefix(&format!("{key}=")));
            let in_json = json.get(name).map(|value| match value {
                Value::String(text) => text.clone(),
                Value::Bool(set) => u8::from(*set).to_string(),
                value => value.to_string(),
            });
            assert_eq!(in_text, in_json.as_deref(), "{key} in {text}");
        };
        for (key, name) in [("token", "token"), ("locid", "local_id"), ("remid", "remote_id")] {
            same(key, name);
        }
        for (key, name) in [("sport", "local_port"), ("dport", "remote_port"), ("backup", "backup")] {
            same(key, name);
        }
    }
}

#[test]
fn an_interrupted_monitor_ends_with_0() {
    let net = Net::new();
    let mut monitor = net.start("braid -v monitor");
    monitor.wait_for_note("subscribed");
    monitor.signal(Signal::SIGINT);
    assert_eq!(monitor.wait().code(), Some(0));
}

#[test]
fn an_overrun_stands_in_the_stream_and_the_stream_goes_on() {
    let net = Net::new();
    let monitor = net.start("braid -v monitor --json");
    monitor.wait_for_note("subscribed");
    monitor.signal(Signal::SIGSTOP);
    // Two events each, of several hundred bytes; the socket's buffer holds 8 MiB or less.
    net.0
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
            let _guard = runtime.enter();
            for port in 10_000..40_000 {
                socket::listen(([10, 0, 0, 1], port).into(), &Default::default()).unwrap();
            }
        })
        .unwrap();
    monitor.signal(Signal::SIGCONT);
    monitor.wait_for(r#"{"event":"OVERRUN"}"#);
    drop(net.echo_server("10.0.0.2:4444"));
    monitor.wait_for(r#"{"event":"LISTENER_CLOSED","local_ip":"10.0.0.2","local_port":4444}"#);
}

/// A time zone that needs no table, half an hour off the others.
const TZ: &str = "XXX-5:30";

#[test]
fn timestamps_are_those_of_iproute2_in_local_time() {
    let net = Net::new();
    for (theirs, ours, format) in [
        ("ip -t mptcp monitor", "braid monitor -t", "Timestamp: %a %b %e %H:%M:%S %Y"),
        ("ip -ts mptcp monitor", "braid monitor --tshort", "[%Y-%m-%dT%H:%M:%S.%f"),
    ] {
        let begin = Timestamp::now();
        let monitors = [theirs, ours].map(|line| Running::start(net.command(line).env("TZ", TZ)));
        for monitor in &monitors {
            wait_until_it_prints(&net, monitor);
        }
        let _server = net.echo_server("10.0.0.1:80");
        net.ok("braid echo client --addr 10.0.0.1:80 --msg x");
        let rests = monitors.map(|monitor| {
            let printed = monitor.wait_for(" CREATED] token=");
            // The time is before the event: on a line of its own, or on the same.
            let [.., before, event] = printed.as_slice() else { panic!("{printed:?}") };
            let (time, rest) = match event.split_once("] [") {
                Some((time, _)) => (time, ""),
                None => {
                    let (time, microseconds) =
                        before.strip_suffix(" usec").unwrap().rsplit_once(' ').unwrap();
                    assert!(microseconds.parse::<u32>().unwrap() < 1_000_000, "{before}");
                    (time, " usec")
                }
            };
            let time = DateTime::strptime(format, time).unwrap_or_else(|e| panic!("{time}: {e}"));
            let time = time.to_zoned_datetime(TimeZone::posix(TZ).unwrap()).unwrap().timestamp();
            assert!(begin.as_second() <= time.as_second() && time <= Timestamp::now(), "{begin} {time}");
            (rest, frame(event.rsplit_once("] [").map_or(event.as_str(), |(_, event)| event)))
        });
        assert_eq!(rests[0], rests[1]);
    }
}

#[test]
fn filters_leave_only_the_connection_and_the_kinds_that_they_name() {
    let net = Net::new();
    let all = net.start("braid -v monitor --json");
    let some = net.start("braid -v monitor --json --type closed,SF_ESTABLISHED,listener_created");
    all.wait_for_note("subscribed");
    some.wait_for_note("subscribed");
    live(&net);
    let connection = net.start("braid echo client --addr 10.0.0.1:80");
    drop(connection);
    drop(net.echo_server("10.0.0.2:4444"));
    let all = all.wait_for(r#"{"event":"LISTENER_CLOSED","local_ip":"10.0.0.2","local_port":4444}"#);
    let some = some.wait_for(r#"{"event":"LISTENER_CREATED","local_ip":"10.0.0.2","local_port":4444}"#);
    let wanted = ["CLOSED", "SF_ESTABLISHED", "LISTENER_CREATED"].map(|kind| format!("\"event\":\"{kind}\""));
    let expected: Vec<_> = all.iter().filter(|l| wanted.iter().any(|kind| l.contains(kind))).collect();
    assert!(expected.len() >= 5 && expected.len() < all.len(), "{all:#?}");
    assert_eq!(some.iter().collect::<Vec<_>>(), expected);
}

#[test]
fn a_token_leaves_only_its_connection() {
    let net = Net::new();
    let _server = net.echo_server("10.0.0.1:80");
    let mut clients = [0, 1].map(|_| net.start("braid echo client --addr 10.0.0.1:80"));
    for client in &mut clients {
        client.write("x\n");
        client.wait_for("recv> x");
    }
    let shown = net.ok(&format!("braid show --json --pid {}", clients[1].pid()));
    let token = serde_json::from_str::<Value>(&shown).unwrap()[0]["token"].as_str().unwrap().to_string();
    let monitor = net.start(&format!("braid -v monitor --token {token}"));
    monitor.wait_for_note("subscribed");
    for client in &mut clients {
        client.close_stdin();
        assert!(client.wait().success());
    }
    assert_eq!(monitor.wait_for("CLOSED"), [format!("[          CLOSED] token={token}")]);
}

const WORKERS: usize = 50;
const CONNECTIONS: usize = 2000;

#[test]
fn each_of_two_thousand_connections_is_seen_to_begin_and_to_end_or_an_overrun_stands_in_the_stream() {
    let net = Net::new();
    let monitor = net.start("braid -v monitor --json");
    monitor.wait_for_note("subscribed");
    net.0.run(burst).unwrap();
    let of = |lines: &[Value], kind: &str| -> BTreeSet<String> {
        lines.iter().filter(|e| e["event"] == kind).map(|e| e["token"].to_string()).collect()
    };
    let mut events: Vec<Value> = Vec::new();
    poll("the end of each connection", || {
        // Until the kernel has room again it drops events, so that one mark may not come through.
        drop(net.echo_server("10.0.0.2:4444"));
        events.extend(monitor.unread().iter().map(|line| serde_json::from_str::<Value>(line).unwrap()));
        let overrun = events.iter().rposition(|event| event["event"] == "OVERRUN");
        // An overrun excuses what began before it, and nothing after it.
        let judged = &events[overrun.map_or(0, |at| at + 1)..];
        let marked = judged.iter().any(|event| event["local_port"] == 4444);
        let (created, closed) = (of(judged, "CREATED"), of(judged, "CLOSED"));
        // Both ends are in this namespace.
        let whole = overrun.is_some() || created.len() == 2 * CONNECTIONS;
        if marked && whole && created.is_subset(&closed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
}

/// Opens connections and closes them in order: the kernel reports no end of one that its peer resets.
fn burst() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    runtime.block_on(async {
        let listener = socket::listen("10.0.0.1:80".parse().unwrap(), &Options::default()).unwrap();
        let address = listener.local_addr().unwrap();
        let workers = (0..WORKERS).map(|_| {
            tokio::spawn(async move {
                for _ in 0..CONNECTIONS / WORKERS {
                    let mut stream = socket::connect(address, &Options::default()).await.unwrap();
                    stream.shutdown().await.unwrap();
                    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
                }
            })
        });
        let workers: Vec<_> = workers.collect();
        for _ in 0..CONNECTIONS {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move { assert_eq!(stream.read(&mut [0]).await.unwrap(), 0) });
        }
        for worker in workers {
            worker.await.unwrap();
        }
    });
}
