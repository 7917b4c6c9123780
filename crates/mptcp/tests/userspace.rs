//! The commands of the userspace path manager.

mod net;

use std::net::SocketAddr;

use mptcp::diag::SubflowFlags;
use mptcp::pm::{Address, Client, EndpointFlags, EventKind, Events, Limits};
use mptcp::{AddrId, Token, diag, sysctl};
use net::{connect, event_of, pair, token, transfer};

/// What `addr` is in a connection over IPv6 sockets with mapped addresses.
fn mapped(addr: &str) -> String {
    format!("::ffff:{addr}")
}

async fn cycle(listen: &str, second: &str, announced: &str) {
    let (a, b) = pair(2);
    sysctl::set(&a, "net.mptcp.pm_type", "1").unwrap();
    let pm = Client::connect(&a).await.unwrap();
    let kernel = Client::connect(&b).await.unwrap();
    kernel.set_limits(Limits { subflows: 4, add_addr_accepted: 0 }).await.unwrap();
    let (mut at_a, mut at_b) = (Events::subscribe(&a).unwrap(), Events::subscribe(&b).unwrap());
    let mut connection = connect(&a, &b, listen).await;
    transfer(&mut connection.client, &mut connection.server, 1000).await;
    let token = token(&connection.client);
    let established = event_of(&mut at_a, EventKind::Established).await;
    assert_eq!(established.token, Some(token));

    let to = Address::new(connection.client.peer_addr().unwrap(), Some(AddrId(0)));
    let from = Address { ip: second.parse().unwrap(), id: Some(AddrId(5)), port: 0, ifindex: 0 };
    pm.create_subflow(token, from, to, EndpointFlags::empty()).await.unwrap();
    let created = event_of(&mut at_a, EventKind::SubflowEstablished).await;
    assert_eq!((created.local_id, created.backup), (Some(AddrId(5)), Some(false)));
    assert_eq!(created.local_ip, Some(from.ip));
    assert_eq!((created.remote_ip, created.remote_port), (Some(to.ip), Some(to.port)));
    event_of(&mut at_b, EventKind::SubflowEstablished).await;

    let local = Address::new(
        SocketAddr::new(created.local_ip.unwrap(), created.local_port.unwrap()),
        created.local_id,
    );
    for backup in [true, false] {
        pm.set_backup(token, local, to, backup).await.unwrap();
        assert_eq!(event_of(&mut at_b, EventKind::SubflowPriority).await.backup, Some(backup));
        let seen = diag::connections(&b).await.unwrap();
        let subflow = seen[0].subflows.iter().find(|s| s.remote_id == AddrId(5)).unwrap();
        assert_eq!(subflow.flags.contains(SubflowFlags::BACKUP_REMOTE), backup);
    }

    pm.destroy_subflow(token, local, to).await.unwrap();
    let closed = event_of(&mut at_a, EventKind::SubflowClosed).await;
    assert_eq!((closed.local_port, closed.local_id), (created.local_port, Some(AddrId(5))));

    let address = Address { ip: announced.parse().unwrap(), id: Some(AddrId(8)), port: 0, ifindex: 0 };
    pm.announce(token, address).await.unwrap();
    let seen = event_of(&mut at_b, EventKind::Announced).await;
    assert_eq!((seen.remote_ip, seen.remote_id), (Some(address.ip), address.id));
    pm.remove(token, AddrId(8)).await.unwrap();
    assert_eq!(event_of(&mut at_b, EventKind::Removed).await.remote_id, Some(AddrId(8)));

    transfer(&mut connection.client, &mut connection.server, 1000).await;
}

#[tokio::test]
async fn a_subflow_lives_and_dies_by_command_over_ipv4() {
    cycle("10.0.0.2:0", "10.0.1.1", "10.0.1.1").await;
}

#[tokio::test]
async fn a_subflow_lives_and_dies_by_command_over_ipv6() {
    cycle("[fd00:0::2]:0", "fd00:1::1", "fd00:1::1").await;
}

#[tokio::test]
async fn a_subflow_lives_and_dies_by_command_with_mapped_addresses() {
    cycle("[::ffff:10.0.0.2]:0", &mapped("10.0.1.1"), "10.0.1.1").await;
}

#[tokio::test]
async fn refusals_name_the_subflow_and_the_connection() {
    let (a, b) = pair(1);
    let connection = connect(&a, &b, "10.0.0.2:0").await;
    let pm = Client::connect(&a).await.unwrap();
    let address = |text: &str| Address::new(text.parse().unwrap(), Some(AddrId(1)));
    let (local, remote) = (address("10.0.0.1:1"), address("10.0.0.2:2"));
    let none = EndpointFlags::empty();
    let kernels = token(&connection.client);
    let refused = pm.create_subflow(kernels, local, remote, none).await.unwrap_err().to_string();
    let expected = format!(
        "create subflow 10.0.0.1 id 1 port 1 to 10.0.0.2 id 1 port 2 on {kernels}: Invalid argument (kernel: "
    );
    assert!(refused.starts_with(&expected), "{refused}");
    assert!(refused.contains("userspace PM not selected"), "{refused}");

    sysctl::set(&a, "net.mptcp.pm_type", "1").unwrap();
    let connection = connect(&a, &b, "10.0.0.2:0").await;
    let refused = pm.destroy_subflow(token(&connection.client), local, remote).await.unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ESRCH));
    let refused =
        pm.create_subflow(token(&connection.client), Address { id: None, ..local }, remote, none).await;
    assert!(refused.unwrap_err().to_string().ends_with(": the local address needs an id"));
    let refused = pm.announce(Token(1), local).await.unwrap_err().to_string();
    assert!(
        refused.starts_with("announce 10.0.0.1 id 1 port 1 on 00000001: Invalid argument (kernel: "),
        "{refused}"
    );
}
