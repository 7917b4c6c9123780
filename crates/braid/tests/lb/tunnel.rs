//! Backends behind a router, and the agent that sets backends up.

use crate::net::{Net, VIP, VIP6, may_load_bpf};

fn state_of(net: &Net, app: &str) -> String {
    let keys = "net.ipv4.conf.all.arp_ignore net.ipv4.conf.all.arp_announce net.ipv4.conf.all.rp_filter \
                net.mptcp.allow_join_initial_addr_port";
    [
        net.ok(app, &format!("sysctl {keys}")),
        net.ok(app, "ip -brief address show lo"),
        net.ok(app, "ip mptcp limits"),
        net.ok(app, "ip mptcp endpoint"),
    ]
    .concat()
}

#[tokio::test]
async fn an_agent_sets_a_backend_up_for_the_port_scheme_and_undoes_it() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    net.bare();
    let before = state_of(&net, "app-1");
    let mut agents = Vec::new();
    for n in [1, 2] {
        let port = format!("808{n}");
        let arguments =
            ["--address", "10.83.0.1", "--address", "fd83::1", "--join-port", &port, "--interface", "eth0"];
        agents.push(net.agent(n, &arguments).await);
    }
    let file = net.config("pin = false", "join = \"port\"", |n| format!("join_port = 808{n}"));
    let _balancer = net.balancer(&file).await;
    net.ok("client", "ip mptcp limits set subflows 2 add_addr_accepted 1");
    for n in [1, 2] {
        net.ok("client", &format!("ip mptcp endpoint add 10.81.{n}.10 subflow fullmesh"));
    }
    let _streams = net.connect(20, VIP).await;
    net.all_joined(20, 3).await;
    assert_eq!(net.on_backends("MPTcpExtMPJoinNoTokenFound"), 0);

    let set_up = state_of(&net, "app-1");
    assert!(set_up.contains("arp_ignore = 1") && set_up.contains("10.83.0.1 port 8081"), "{set_up}");
    for agent in agents {
        agent.stop().await;
    }
    assert_eq!(state_of(&net, "app-1"), before);
}

/// As after the end of one that was killed.
#[tokio::test]
async fn an_agent_takes_what_it_finds_and_leaves_it() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(1).await;
    net.ok("app-1", "ip mptcp endpoint add 10.83.0.1 port 8081 signal");
    let before = state_of(&net, "app-1");
    let arguments =
        ["--address", "10.83.0.1", "--address", "fd83::1", "--join-port", "8081", "--interface", "eth0"];
    let agent = net.agent(1, &arguments).await;
    let set_up = state_of(&net, "app-1");
    assert!(set_up.contains("fd83::1 port 8081") && set_up.contains("addr_port = 0"), "{set_up}");
    agent.stop().await;
    assert_eq!(state_of(&net, "app-1"), before);
}

#[tokio::test]
async fn backends_behind_a_router_get_their_packets_in_packets() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    net.bare();
    net.joins().await;
    let mut agents = Vec::new();
    for n in [1, 2] {
        let arguments = ["--address", "10.83.0.1", "--address", "fd83::1", "--interface", "eth0"];
        let peer = ["--tunnel-from", "10.90.0.2"];
        agents.push(net.agent(n, &[&arguments[..], &peer].concat()).await);
        // The balancer reaches it by way of the router alone.
        net.ok("lb", &format!("ip route add 10.90.0.{}/32 via 10.90.0.1", n + 10));
    }
    let _balancer = net.balancer(&net.config("pin = false", "", |_| "tunnel = true".into())).await;
    let _streams = net.connect(30, VIP).await;
    net.all_joined(30, 3).await;
    let _v6 = net.connect(10, VIP6).await;
    net.all_joined(40, 3).await;
    assert_eq!(net.on_backends("MPTcpExtMPJoinNoTokenFound"), 0);
}
