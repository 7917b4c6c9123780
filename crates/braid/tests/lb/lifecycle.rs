//! Start, reload, drain, a dead backend, a killed balancer, the end: each in the middle of traffic.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Output;
use std::time::Duration;

use lab::process::Process;
use mptcp::socket::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::net::{Net, Traffic, VIP, may_load_bpf, until};

const NO_TOKEN: &str = "MPTcpExtMPJoinNoTokenFound";

fn signal(process: &Process, signal: Signal) {
    kill(Pid::from_raw(process.pid() as i32), signal).unwrap();
}

fn down(net: &Net) -> Output {
    net.braid("lb", &["lb", "down", net.name()]).output().unwrap()
}

#[tokio::test]
async fn a_balancer_that_is_killed_or_stopped_loses_no_connection_and_no_late_join() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    let file = net.config("", "", |_| String::new());
    let balancer = net.balancer(&file).await;
    let mut traffic = Traffic::over(net.connect(20, VIP).await);
    assert_eq!(net.status()["program"], balancer.pid());

    signal(&balancer, Signal::SIGKILL);
    balancer.exit().await;
    assert_eq!(net.status()["program"], serde_json::Value::Null);
    // The tables are what they were, whatever the file says.
    net.config("tables = { flows = 2048 }", "", |_| String::new());
    traffic.all_go_on().await;
    // Without a program, new connections are balanced too.
    let mut more = Traffic::over(net.connect(20, VIP).await);
    let balancer = net.balancer(&file).await;
    let lines = balancer.last_lines();
    assert!(lines.iter().any(|l| l.contains("table flows keeps its 262144 entries")), "{lines:?}");
    traffic.all_go_on().await;
    more.all_go_on().await;
    let _idle = net.connect(10, VIP).await;

    signal(&balancer, Signal::SIGTERM);
    assert!(balancer.exit().await.success());
    traffic.all_go_on().await;
    let _balancer = net.balancer(&file).await;
    net.joins().await;
    net.all_joined(50, 3).await;
    assert_eq!(net.on_backends(NO_TOKEN), 0);
    traffic.all_go_on().await;
    more.all_go_on().await;
    assert!(down(&net).status.success());
}

#[tokio::test]
async fn a_draining_backend_gets_joins_of_its_connections_and_no_new_ones() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    let balancer = net.balancer(&net.config("", "", |_| String::new())).await;
    let mut traffic = Traffic::over(net.connect(20, VIP).await);
    let before = net.connections_of(1).await;
    assert!(before > 0);

    net.config("", "", |n| if n == 1 { "drain = true".into() } else { String::new() });
    signal(&balancer, Signal::SIGHUP);
    net.state(1, "draining").await;
    let mut more = Traffic::over(net.connect(20, VIP).await);
    assert_eq!(net.connections_of(1).await, before);
    net.joins().await;
    net.all_joined(40, 3).await;
    assert_eq!(net.on_backends(NO_TOKEN), 0);
    traffic.all_go_on().await;
    more.all_go_on().await;

    // A file with an error changes nothing.
    net.config("", "prt = 80", |_| String::new());
    signal(&balancer, Signal::SIGHUP);
    until("a word on the error", async || balancer.last_words().contains("nothing changed").then_some(()))
        .await;
    net.state(1, "draining").await;
    traffic.all_go_on().await;

    // And one without the backend takes it out: its connections end, the others don't.
    net.config("", "", |n| if n == 1 { "absent".into() } else { String::new() });
    signal(&balancer, Signal::SIGHUP);
    until("one backend less", async || {
        (net.status()["services"][0]["backends"].as_array().unwrap().len() == 1).then_some(())
    })
    .await;
    let _fresh = net.connect(5, VIP).await;
    traffic.go_on(20 - before).await;
    more.all_go_on().await;
    assert_eq!(net.connections_of(2).await, 40 - before + 5);

    // Back again, it takes new ones, and none of the other's.
    net.config("", "", |_| String::new());
    signal(&balancer, Signal::SIGHUP);
    net.state(1, "up").await;
    let taken = || net.status()["services"][0]["backends"][0]["connections"].as_u64().unwrap();
    let was = taken();
    // Its entry is there a moment before its places on the ring.
    until("a connection of the one that is back", async || {
        net.connect(5, VIP).await;
        (taken() > was).then_some(())
    })
    .await;
    traffic.go_on(20 - before).await;
    more.all_go_on().await;
    assert!(down(&net).status.success());
}

#[tokio::test]
async fn an_interface_that_goes_and_comes_back_is_balanced_again() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(1).await;
    let balancer = net.balancer(&net.config("", "", |_| String::new())).await;
    let mut traffic = Traffic::over(net.connect(5, VIP).await);
    net.ok("lb", "ip link delete eth0");
    until("a word on it", async || {
        balancer.last_words().contains("attach to interface eth0: ").then_some(())
    })
    .await;

    let switch = format!("/proc/{}/fd/{}", std::process::id(), net.lab.netns("switch").as_fd().as_raw_fd());
    net.ok("lb", &format!("ip link add eth0 type veth peer name lb netns {switch}"));
    net.ok("switch", "ip link set lb master br0 up");
    net.ok("lb", "ip link set eth0 up");
    net.ok("lb", "ip address add 10.90.0.2/24 dev eth0");
    net.ok("lb", "ip route add default via 10.90.0.1");
    traffic.all_go_on().await;
    let _more = net.connect(5, VIP).await;
    net.down(balancer).await;
}

#[tokio::test]
async fn a_dead_backend_takes_no_connection_of_another_with_it() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    net.joins().await;
    let _balancer = net.balancer(&net.config("", "", |_| String::new())).await;
    let mut traffic = Traffic::over(net.connect(20, VIP).await);
    net.all_joined(20, 3).await;
    let on_second = net.connections_of(2).await;
    assert!(on_second > 0);

    net.ok("switch", "ip link set app1 down");
    net.state(1, "down").await;
    let mut fresh = Traffic::over(net.connect(10, VIP).await);
    assert_eq!(net.connections_of(2).await, on_second + 10);
    traffic.go_on(on_second).await;
    fresh.all_go_on().await;
    net.ok("switch", "ip link set app1 up");
    net.state(1, "up").await;
    traffic.all_go_on().await;
    assert!(down(&net).status.success());
}

#[tokio::test]
async fn down_removes_all_of_it_and_a_failed_start_leaves_nothing() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(1).await;
    let pins = |net: &Net| {
        let root = format!("/proc/{}/root/sys/fs/bpf/braid-lb", net.holder());
        std::fs::read_dir(root).map(|entries| entries.flatten().count()).unwrap_or(0)
    };
    let file = net.config("", "", |_| String::new());
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"eth0\"", "\"eth0\", \"eth9\"")).unwrap();
    let failed = net.start_balancer("lb", &file).await;
    let status = failed.exit().await;
    assert_eq!(status.code(), Some(2), "{}", failed.describe(status));
    assert!(failed.last_words().contains("attach to interface eth9"), "{}", failed.last_words());
    assert_eq!(pins(&net), 0);

    // Nobody has this address, so that it would wait for long.
    let waiting = text.replace("10.90.0.11", "10.90.0.99").replace("\"5s\"", "\"1000s\"");
    std::fs::write(&file, waiting).unwrap();
    let interrupted = net.start_balancer("lb", &file).await;
    until("its pins", async || (pins(&net) == 1).then_some(())).await;
    signal(&interrupted, Signal::SIGINT);
    assert!(interrupted.exit().await.success());
    assert_eq!(pins(&net), 0);

    std::fs::write(&file, text).unwrap();
    let balancer = net.balancer(&file).await;
    let _streams = net.connect(3, VIP).await;
    assert_eq!(pins(&net), 1);
    let second = net.start_balancer("lb", &file).await;
    let status = second.exit().await;
    assert_eq!(status.code(), Some(2));
    assert!(second.last_words().contains("runs already (pid "), "{}", second.last_words());

    let status = net.status();
    assert_eq!(status["services"][0]["backends"][0]["connections"], 3);
    let text = net.braid("lb", &["lb", "status"]).output().unwrap().stdout;
    let text = String::from_utf8(text).unwrap();
    for line in [
        format!("balancer {}: its program is pid {}", net.name(), balancer.pid()),
        "service web (joins by token): 10.83.0.1:80, [fd83::1]:80".into(),
        "table tokens: 3 of 262144, 0 pushed out".into(),
        "tokens_learned              3  Packets with a key that told a connection's token".into(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
    }
    let output = down(&net);
    assert!(output.status.success(), "{output:?}");
    assert!(balancer.exit().await.success());
    assert_eq!(pins(&net), 0);
    assert!(!is_balanced(&net).await);
    let output = down(&net);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is none of this name"), "{output:?}");
}

#[tokio::test]
async fn a_second_balancer_of_an_address_on_an_interface_says_whose_it_is_and_changes_nothing() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(1).await;
    let name = net.name().to_string();
    let file = net.config("", "", |_| String::new());
    let text = std::fs::read_to_string(&file).unwrap().replace(&name, "other");
    let other_file = net.lab.work().join("other.toml");
    let port = |port: u16| text.replace("port = 80\n", &format!("port = {port}\n"));
    let first = net.balancer(&file).await;
    let mut traffic = Traffic::over(net.connect(5, VIP).await);
    let programs = || net.ok("lb", "ip link show eth0");
    let before = programs();
    let refused = async |text: &str, whose: &str| {
        std::fs::write(&other_file, text).unwrap();
        let other = net.start_balancer("lb", &other_file).await;
        let status = tokio::select! {
            status = other.exit() => status,
            () = other.line() => panic!("it balances, too"),
        };
        assert_eq!(status.code(), Some(2), "{}", other.describe(status));
        assert_eq!(other.last_words(), format!("braid: balancer other: 10.83.0.1:80 on eth0 is {whose}"));
    };
    let pid = first.pid();
    let whose = format!("balancer {name}'s already (pid {pid}; `braid lb down {name}` ends it)");
    refused(&text, &whose).await;
    refused(&format!("pin = false\n{text}"), &whose).await;
    assert_eq!(programs(), before);
    traffic.all_go_on().await;

    // It may have another port, but not get this one by a reload.
    std::fs::write(&other_file, port(81)).unwrap();
    let other = net.balancer(&other_file).await;
    std::fs::write(&other_file, &text).unwrap();
    signal(&other, Signal::SIGHUP);
    until("a word on the error", async || other.last_words().contains("nothing changed").then_some(())).await;
    assert!(other.last_words().contains(&whose), "{}", other.last_words());
    assert_eq!(net.status_of("other")["services"][0]["addresses"][0], "10.83.0.1:81");
    traffic.all_go_on().await;
    // What it has given up is free.
    std::fs::write(&other_file, port(82)).unwrap();
    signal(&other, Signal::SIGHUP);
    until("port 82", async || {
        (net.status_of("other")["services"][0]["addresses"][0] == "10.83.0.1:82").then_some(())
    })
    .await;
    std::fs::write(&file, std::fs::read_to_string(&file).unwrap().replace("port = 80\n", "port = 81\n"))
        .unwrap();
    signal(&first, Signal::SIGHUP);
    until("port 81", async || (net.status()["services"][0]["addresses"][0] == "10.83.0.1:81").then_some(()))
        .await;
    net.config("", "", |_| String::new());
    signal(&first, Signal::SIGHUP);
    until("port 80", async || (net.status()["services"][0]["addresses"][0] == "10.83.0.1:80").then_some(()))
        .await;
    traffic.all_go_on().await;
    assert!(net.braid("lb", &["lb", "down", "other"]).output().unwrap().status.success());

    // Without its program it is still the first one's, until `down`.
    signal(&first, Signal::SIGKILL);
    first.exit().await;
    refused(
        &text,
        &format!("balancer {name}'s already (its program does not run; `braid lb down {name}` ends it)"),
    )
    .await;
    traffic.all_go_on().await;
    assert!(down(&net).status.success());
    std::fs::write(&other_file, format!("pin = false\n{text}")).unwrap();
    let other = net.balancer(&other_file).await;
    let first = net.start_balancer("lb", &file).await;
    assert_eq!(first.exit().await.code(), Some(2));
    let whose = format!("10.83.0.1:80 on eth0 is balancer other's already (pid {})", other.pid());
    assert!(first.last_words().ends_with(&whose), "{}", first.last_words());
    signal(&other, Signal::SIGKILL);
    other.exit().await;
    let first = net.balancer(&file).await;
    traffic.all_go_on().await;
    net.down(first).await;
}

#[tokio::test]
async fn without_pins_the_data_plane_ends_with_its_program() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(1).await;
    let balancer =
        net.balancer(&net.config("pin = false\nmetrics = \"127.0.0.1:9101\"", "", |_| String::new())).await;
    let _streams = net.connect(3, VIP).await;
    let metrics = net.ok("lb", "curl -s http://127.0.0.1:9101/metrics");
    for line in [
        "braid_lb_connections_total{service=\"web\",backend=\"app-1\"} 3",
        "braid_lb_backend_up{service=\"web\",backend=\"app-1\"} 1",
        "braid_lb_backend_draining{service=\"web\",backend=\"app-1\"} 0",
        "braid_lb_flows{service=\"web\",backend=\"app-1\"} 3",
        "braid_lb_table_pushed_out{table=\"tokens\"} 0",
        "braid_lb_tokens_learned_total 3",
        "# EOF",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in {metrics}");
    }
    signal(&balancer, Signal::SIGKILL);
    balancer.exit().await;
    // The kernel closes the last file descriptor, and with it the link, a moment later.
    until("the end of the data plane", async || (!is_balanced(&net).await).then_some(())).await;
}

/// Does a SYN to the VIP reach the backend? The balancer's own kernel would send it back to the router.
async fn is_balanced(net: &Net) -> bool {
    let before = net.counter("app-1", "MPTcpExtMPCapableSYNRX");
    let options = Options { netns: Some(net.lab.netns("client").clone()), ..Options::default() };
    let dialled = tokio::time::timeout(Duration::from_millis(500), socket::dial(VIP, &options)).await;
    matches!(dialled, Ok(Ok(_))) || net.counter("app-1", "MPTcpExtMPCapableSYNRX") > before
}
