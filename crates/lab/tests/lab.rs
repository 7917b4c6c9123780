//! Labs are built, work, and leave nothing behind.

use lab::{Lab, Scenario};

const TWO: &str = r#"
title = "two hosts"
[nodes]
client = {}
server = {}
[links.wire]
a = { node = "client", dev = "eth0", addresses = ["10.0.0.2/24", "2001:db8::2/64"] }
b = { node = "server", dev = "eth0", addresses = ["10.0.0.1/24", "2001:db8::1/64"] }
"#;

fn two() -> Scenario {
    Scenario::parse("two", "two.toml", TWO, None).unwrap()
}

#[tokio::test]
async fn a_link_carries_both_families_and_comes_back_with_its_addresses() {
    let lab = Lab::build(&two()).await.unwrap();
    for address in ["10.0.0.1", "2001:db8::1"] {
        let ping = lab.spawn("client", &["ping", "-c1", "-W2", address]).await.unwrap();
        let status = ping.exit().await;
        assert!(status.success(), "{address}: {}", ping.describe(status));
    }
    lab.set_link("wire", lab::scenario::LinkState::Down).unwrap();
    let ping = lab.spawn("client", &["ping", "-c1", "-W1", "10.0.0.1"]).await.unwrap();
    assert!(!ping.exit().await.success());
    lab.set_link("wire", lab::scenario::LinkState::Up).unwrap();
    for address in ["10.0.0.1", "2001:db8::1"] {
        let ping = lab.spawn("client", &["ping", "-c1", "-W2", address]).await.unwrap();
        let status = ping.exit().await;
        assert!(status.success(), "{address}: {}", ping.describe(status));
    }
}

#[tokio::test]
async fn a_dropped_lab_leaves_neither_namespace_nor_process_nor_directory() {
    let lab = Lab::build(&two()).await.unwrap();
    let namespace = lab.card().namespace("client").unwrap().to_string();
    let directory = lab.card().directory.clone();
    // A grandchild in a session of its own, so that neither the parent's death nor the group's reaches it.
    let sleeper = lab
        .spawn("client", &["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!; sleep 1000"])
        .await
        .unwrap();
    while sleeper.last_words().is_empty() {
        tokio::task::yield_now().await;
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let grandchild: u32 = sleeper.last_words().parse().unwrap();
    assert!(is_running(grandchild));
    assert!(std::path::Path::new("/run/netns").join(&namespace).exists());
    drop(sleeper);
    drop(lab);
    assert!(!std::path::Path::new("/run/netns").join(&namespace).exists());
    assert!(!directory.exists());
    assert!(!is_running(grandchild));
}

/// A killed process whose parent has not looked at it yet does not run.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
