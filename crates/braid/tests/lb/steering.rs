//! Joins arrive at their connection's backend, and without steering they don't.

use crate::net::{Net, VIP, VIP6, may_load_bpf};

const NO_TOKEN: &str = "MPTcpExtMPJoinNoTokenFound";

#[tokio::test]
async fn every_join_finds_its_connection_by_token() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    net.joins().await;
    let file = net.config("pin = false", "", |_| String::new());
    let _balancer = net.balancer(&file).await;
    let _streams = net.connect(40, VIP).await;
    net.all_joined(40, 3).await;
    assert_eq!(net.on_backends(NO_TOKEN), 0);
    let on = [net.connections_of(1).await, net.connections_of(2).await];
    assert_eq!(on[0] + on[1], 40);
    assert!(on[0] > 5 && on[1] > 5, "{on:?}");
    let _v6 = net.connect(10, VIP6).await;
    net.all_joined(50, 3).await;
    assert_eq!(net.on_backends(NO_TOKEN), 0);
}
