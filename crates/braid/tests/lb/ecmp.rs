//! Two balancers behind a router that shares flows out among them.

use mptcp::socket::Protocol;
use mptcp::sysctl;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::net::{Net, Ready as _, VIP, VIP6, echo, may_load_bpf};

/// Sends the service's packets to `balancers`, by their host numbers, shared out by addresses and ports.
fn route(net: &Net, balancers: &[u8]) {
    for (ip, vip, prefix) in [("ip", "10.83.0.1/32", "10.90.0."), ("ip -6", "fd83::1/128", "fd90::")] {
        let hops: String = balancers.iter().map(|host| format!(" nexthop via {prefix}{host}")).collect();
        net.ok("router", &format!("{ip} route replace {vip}{hops}"));
    }
}

fn of_backends(status: &Value, field: impl Fn(&Value) -> &Value) -> u64 {
    let backends = status["services"][0]["backends"].as_array().unwrap();
    backends.iter().map(|backend| field(backend).as_u64().unwrap()).sum()
}

#[tokio::test]
async fn two_balancers_behind_a_router_agree_without_talking() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    net.bare();
    let mut agents = Vec::new();
    for n in [1, 2] {
        let port = format!("808{n}");
        let addresses = ["--address", "10.83.0.1", "--address", "fd83::1", "--interface", "eth0"];
        agents.push(net.agent(n, &[&addresses[..], &["--join-port", &port]].concat()).await);
    }
    for key in ["net.ipv4.fib_multipath_hash_policy", "net.ipv6.fib_multipath_hash_policy"] {
        sysctl::set(net.lab.netns("router"), key, "1").unwrap();
    }
    route(&net, &[2, 3]);
    net.ok("client", "ip mptcp limits set subflows 2 add_addr_accepted 1");
    for n in [1, 2] {
        for ip in [format!("10.81.{n}.10"), format!("fd81:{n}::10")] {
            net.ok("client", &format!("ip mptcp endpoint add {ip} subflow fullmesh"));
        }
    }
    let file = net.config("", "join = \"port\"", |n| format!("join_port = 808{n}"));
    let second = format!("{}-2", net.name());
    let second_file = net.lab.work().join("lb-2.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&second_file, text.replace(net.name(), &second)).unwrap();
    let balancer = net.balancer(&file).await;
    let second_balancer = net.start_balancer("lb-2", &second_file).await;
    second_balancer.expect_ready().await;
    let both = || [net.status(), net.status_of(&second)];

    let mut streams = net.connect(40, VIP).await;
    streams.extend(net.connect(20, VIP6).await);
    net.all_joined(60, 3).await;
    assert_eq!(net.on_backends("MPTcpExtMPJoinNoTokenFound"), 0);
    streams.extend(net.connect_by(Protocol::Tcp, 20, VIP).await);
    streams.extend(net.connect_by(Protocol::Tcp, 20, VIP6).await);
    let sums = |field: &dyn Fn(&Value) -> &Value| both().map(|status| of_backends(&status, field));
    for (what, sums, expected) in [
        ("connections", sums(&|b| &b["connections"]), 60),
        ("joins by port", sums(&|b| &b["joins"]["port"]), 120),
        ("plain connections", sums(&|b| &b["plain"]), 40),
    ] {
        assert!(sums.iter().sum::<u64>() == expected && sums.iter().all(|s| *s > 5), "{what}: {sums:?}");
    }

    // Each alone serves the other's flows too: its ring says the same.
    for balancers in [&[3][..], &[2], &[2, 3]] {
        route(&net, balancers);
        all_echo(&mut streams).await;
    }
    let picked_up: u64 = both().iter().map(|status| net.counted(status, "picked_up")).sum();
    assert!(picked_up >= 40, "{picked_up}");
    net.all_joined(60, 3).await;
    let output = net.braid("lb-2", &["lb", "down", &second]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    net.down(balancer).await;
}

async fn all_echo(streams: &mut [TcpStream]) {
    for stream in streams {
        echo(stream).await;
    }
}
