//! Joins arrive at their connection's backend, and without steering they don't.

use mptcp::sysctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::net::{Net, VIP, VIP6, may_load_bpf, until};

const NO_TOKEN: &str = "MPTcpExtMPJoinNoTokenFound";

#[tokio::test]
async fn a_join_finds_its_connection_also_from_and_to_the_other_family() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    net.joins().await;
    let file = net.config("pin = false", "", |_| String::new());
    let _balancer = net.balancer(&file).await;
    let _streams = net.connect(40, VIP).await;
    net.all_joined(40, 3).await;
    let on = [net.connections_of(1).await, net.connections_of(2).await];
    assert_eq!(on[0] + on[1], 40);
    assert!(on[0] > 5 && on[1] > 5, "{on:?}");
    let _v6 = net.connect(10, VIP6).await;
    net.all_joined(50, 3).await;
    assert_eq!(net.on_backends(NO_TOKEN), 0);
}

/// One backend announces a port, the other has nothing set up: each gets its joins its own way.
#[tokio::test]
async fn joins_go_by_port_where_a_backend_announces_one_and_else_by_token() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    net.ok("app-1", "ip mptcp endpoint add 10.83.0.1 id 1 port 8081 signal");
    sysctl::set(net.lab.netns("app-1"), "net.mptcp.allow_join_initial_addr_port", "0").unwrap();
    net.ok("client", "ip mptcp limits set subflows 2 add_addr_accepted 1");
    for n in [1, 2] {
        net.ok("client", &format!("ip mptcp endpoint add 10.81.{n}.10 subflow fullmesh"));
    }
    let port = |n| if n == 1 { "join_port = 8081".into() } else { String::new() };
    let balancer = net.balancer(&net.config("", "join = \"both\"", port)).await;
    let _streams = net.connect(40, VIP).await;
    net.all_joined(40, 3).await;
    assert_eq!(net.on_backends(NO_TOKEN), 0);
    let on = [net.connections_of(1).await, net.connections_of(2).await];
    assert!(on[0] > 5 && on[1] > 5, "{on:?}");
    let status = net.status();
    let joins = |n: usize| status["services"][0]["backends"][n]["joins"].clone();
    assert_eq!(joins(0), serde_json::json!({ "token": 0, "port": 2 * on[0], "hash": 0 }));
    assert_eq!(joins(1), serde_json::json!({ "token": 2 * on[1], "port": 0, "hash": 0 }));
    net.down(balancer).await;
}

/// A thousand connections with two joins each find their backends; then, without steering, joins of a hundred more land
/// anywhere: one in `backends` is right by chance.
async fn a_thousand_connections(backends: usize) {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(backends).await;
    net.joins().await;
    let balancer = net.balancer(&net.config("", "", |_| String::new())).await;
    let _streams = net.connect(1000, VIP).await;
    net.all_joined(1000, 3).await;
    assert_eq!(net.on_backends(NO_TOKEN), 0);
    for n in 1..=backends {
        let (count, fair) = (net.connections_of(n).await, 1000 / backends);
        assert!(count > fair / 2 && count < fair * 3 / 2, "app-{n} has {count}");
    }

    net.config("", "join = \"off\"", |_| String::new());
    kill(Pid::from_raw(balancer.pid() as i32), Signal::SIGHUP).unwrap();
    until("steering off", async || (net.status()["services"][0]["by_token"] == false).then_some(())).await;
    let before = net.on_backends("MPTcpExtMPJoinSynRx");
    let _unsteered = net.connect(100, VIP).await;
    let refused = until("200 joins", async || {
        let (right, wrong) = (net.on_backends("MPTcpExtMPJoinSynRx") - before, net.on_backends(NO_TOKEN));
        (right + wrong >= 200).then_some(wrong)
    })
    .await;
    // 100 of 200 with two backends, 171 with seven; four standard deviations are 28 and 20.
    let expected = 200 * (backends as u64 - 1) / backends as u64;
    assert!(refused.abs_diff(expected) <= 30, "{refused} of 200 joins were refused");
}

#[tokio::test]
async fn a_thousand_connections_over_two_backends_keep_their_joins() {
    a_thousand_connections(2).await;
}

#[tokio::test]
async fn a_thousand_connections_over_seven_backends_keep_their_joins() {
    a_thousand_connections(7).await;
}

/// A hundred connections in a network that `disturb` has changed.
async fn all_join(shape: &str, to: &str, disturb: impl Fn(&Net)) -> Option<Net> {
    if !may_load_bpf() {
        return None;
    }
    let net = Net::with(2, shape).await;
    net.joins().await;
    disturb(&net);
    let _balancer = net.balancer(&net.config("pin = false", "", |_| String::new())).await;
    let _streams = net.connect(100, to).await;
    net.all_joined(100, 3).await;
    assert_eq!(net.on_backends(NO_TOKEN), 0);
    Some(net)
}

fn everywhere(net: &Net, key: &str, value: &str) {
    for node in ["client", "app-1", "app-2"] {
        sysctl::set(net.lab.netns(node), key, value).unwrap();
    }
}

#[tokio::test]
async fn joins_arrive_when_third_acks_are_lost() {
    let net = all_join("", VIP, |net| {
        net.ok("client", "nft add table inet lossy");
        let chain = "nft add chain inet lossy out { type filter hook output priority 0; }";
        net.ok("client", chain);
        // The third ACK of a connection: MP_CAPABLE without SYN and without data.
        net.ok("client", "nft add rule inet lossy out tcp flags & syn == 0 tcp option mptcp subtype 0 meta length < 76 counter drop");
    })
    .await;
    if let Some(net) = net {
        let rules = net.ok("client", "nft list table inet lossy");
        assert!(rules.contains("counter packets 100 "), "{rules}");
    }
}

#[tokio::test]
async fn joins_arrive_with_syn_cookies() {
    all_join("", VIP, |net| everywhere(net, "net.ipv4.tcp_syncookies", "2")).await;
}

#[tokio::test]
async fn joins_arrive_with_checksums() {
    all_join("", VIP, |net| everywhere(net, "net.mptcp.checksum_enabled", "1")).await;
}

#[tokio::test]
async fn joins_arrive_over_ipv6() {
    all_join("", VIP6, |_| {}).await;
}

#[tokio::test]
async fn joins_arrive_over_a_long_lossy_path() {
    all_join("delay = \"25ms\", loss = \"1%\"", VIP, |_| {}).await;
}
