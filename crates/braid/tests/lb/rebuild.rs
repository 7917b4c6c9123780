//! A balancer whose tables are gone, as after a reboot: its backends' agents tell it their connections.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use lab::process::Process;
use mptcp::socket::Protocol;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::net::{Net, VIP, VIP6, echo, may_load_bpf, until};

fn secret(net: &Net, name: &str, text: &str) -> PathBuf {
    let file = net.lab.work().join(name);
    std::fs::write(&file, text).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    file
}

/// Asks agents that know `secret`.
fn agents(secret: &Path) -> String {
    format!("[agents]\nsecret = {secret:?}")
}

async fn agent(net: &Net, n: usize, secret: &Path) -> Process {
    let tell = format!("10.90.0.{}:9183", n + 10);
    let secret = secret.to_str().unwrap();
    let arguments =
        ["--address", "10.83.0.1", "--address", "fd83::1", "--interface", "eth0", "--tell", &tell];
    net.agent(n, &[&arguments[..], &["--secret", secret]].concat()).await
}

/// Two backends, each with an agent that knows the secret in the file.
async fn with_agents() -> (Net, PathBuf, [Process; 2]) {
    let net = Net::new(2).await;
    net.bare();
    let secret = secret(&net, "secret", "what balancer and agents share");
    let agents = [agent(&net, 1, &secret).await, agent(&net, 2, &secret).await];
    (net, secret, agents)
}

fn counter(net: &Net, name: &str) -> u64 {
    net.counted(&net.status(), name)
}

#[tokio::test]
async fn late_joins_are_lost_with_the_tables_until_the_agents_have_told_their_connections() {
    if !may_load_bpf() {
        return;
    }
    let (net, secret, _agents) = with_agents().await;
    let without = net.config("", "", |_| String::new());
    let balancer = net.balancer(&without).await;
    let mut streams = net.connect(60, VIP).await;
    let on = [net.connections_of(1).await, net.connections_of(2).await];
    assert!(on[0] > 10 && on[1] > 10, "{on:?}");

    net.down(balancer).await;
    let balancer = net.balancer(&without).await;
    net.joins().await;
    until("120 joins with unknown tokens", async || {
        (counter(&net, "join_token_unknown") >= 120).then_some(())
    })
    .await;
    assert!(net.subflows().await.values().all(|subflows| *subflows == 1));

    // The clients repeat their SYNs.
    net.config(&agents(&secret), "", |_| String::new());
    kill(Pid::from_raw(balancer.pid() as i32), Signal::SIGHUP).unwrap();
    net.all_joined(60, 3).await;
    assert_eq!(net.on_backends("MPTcpExtMPJoinNoTokenFound"), 0);
    assert_eq!((counter(&net, "flows_told"), counter(&net, "tokens_told")), (60, 60));
    for stream in &mut streams {
        echo(stream).await;
    }
    net.down(balancer).await;
}

/// Its ring does not lead to the first backend any more: only what has been told can.
#[tokio::test]
async fn a_new_balancer_finds_flows_and_late_joins_of_a_backend_that_drains() {
    if !may_load_bpf() {
        return;
    }
    let (net, secret, _agents) = with_agents().await;
    let balancer = net.balancer(&net.config(&agents(&secret), "", |_| String::new())).await;
    let mut streams = net.connect(50, VIP).await;
    streams.extend(net.connect(20, VIP6).await);
    let mut plain = net.connect_by(Protocol::Tcp, 10, VIP).await;
    plain.extend(net.connect_by(Protocol::Tcp, 10, VIP6).await);
    let on_first = net.connections_of(1).await;
    assert!(on_first > 10, "{on_first}");

    net.down(balancer).await;
    let drains =
        net.config(&agents(&secret), "", |n| if n == 1 { "drain = true".into() } else { String::new() });
    let balancer = net.balancer(&drains).await;
    assert_eq!((counter(&net, "flows_told"), counter(&net, "tokens_told")), (90, 70));
    for stream in streams.iter_mut().chain(&mut plain) {
        echo(stream).await;
    }
    net.joins().await;
    net.all_joined(70, 3).await;
    assert_eq!(net.on_backends("MPTcpExtMPJoinNoTokenFound"), 0);
    assert_eq!(net.connections_of(1).await, on_first);
    net.down(balancer).await;
}

#[tokio::test]
async fn an_agent_with_another_secret_is_named_and_changes_nothing_until_it_has_the_right_one() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    net.bare();
    let right = secret(&net, "secret", "what balancer and agents share");
    let other = secret(&net, "other-secret", "what nobody else has ever had");
    let wrong = agent(&net, 1, &other).await;
    let _second = agent(&net, 2, &right).await;
    let balancer = net.balancer(&net.config("", "", |_| String::new())).await;
    let _streams = net.connect(40, VIP).await;
    let on = [net.connections_of(1).await as u64, net.connections_of(2).await as u64];

    net.down(balancer).await;
    let balancer = net.balancer(&net.config(&agents(&right), "", |_| String::new())).await;
    let lines = balancer.last_lines();
    let refusals: Vec<_> = lines.iter().filter(|line| line.contains("another secret")).collect();
    assert!(matches!(refusals[..], [line] if line.contains("web/app-1")), "{lines:?}");
    assert!(wrong.last_words().contains("told nothing"), "{}", wrong.last_words());
    assert_eq!(counter(&net, "flows_told"), on[1]);

    // It is asked again and again.
    wrong.stop().await;
    let first = agent(&net, 1, &right).await;
    until("the first backend's flows", async || (counter(&net, "flows_told") == on[0] + on[1]).then_some(()))
        .await;

    // And when the backend comes back.
    let told = || first.last_lines().iter().filter(|line| line.contains("told")).count();
    let before = told();
    net.ok("app-1", "ip link set eth0 down");
    net.state(1, "down").await;
    net.ok("app-1", "ip link set eth0 up");
    until("one more question", async || (told() > before).then_some(())).await;
    assert_eq!(counter(&net, "flows_told"), on[0] + on[1]);
    net.down(balancer).await;
}
