//! `braid lb --xdp`. Made for real network cards; here between veths that were made to behave like them.

use balancer::config::Tables;
use balancer::plane::{Hook, Plane};

use crate::net::{Net, VIP, VIP6, echo, may_load_bpf};

#[tokio::test]
async fn connections_and_joins_arrive_through_xdp_and_a_restart_may_change_the_hook() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(2).await;
    // A veth passes frames on without their checksums, and those that XDP sends back only to an end that has XDP, too.
    net.ok("router", "ethtool -K lan tx off");
    let tables = Tables { flows: 1024, fresh: 1024, tokens: 1024 };
    let mut passes_all = Plane::load(Hook::Xdp, &tables, None).unwrap();
    net.lab.netns("switch").run(|| passes_all.attach(&["lb".into()])).unwrap().unwrap();
    net.joins().await;
    let with = |xdp: bool| net.config(&format!("xdp = {xdp}"), "", |_| String::new());
    let mut balancer = net.balancer(&with(true)).await;
    assert!(net.ok("lb", "ip link show eth0").contains(" xdp "));
    let mut streams = net.connect(20, VIP).await;
    streams.extend(net.connect(20, VIP6).await);
    net.all_joined(40, 3).await;
    assert_eq!(net.on_backends("MPTcpExtMPJoinNoTokenFound"), 0);

    for xdp in [false, true] {
        balancer.stop().await;
        balancer = net.balancer(&with(xdp)).await;
        assert_eq!(net.ok("lb", "ip link show eth0").contains(" xdp "), xdp);
        for stream in &mut streams {
            echo(stream).await;
        }
    }
    net.down(balancer).await;
}

#[tokio::test]
async fn an_interface_whose_driver_knows_no_xdp_is_refused_by_name() {
    if !may_load_bpf() {
        return;
    }
    let net = Net::new(1).await;
    net.ok("lb", "ip link add plain type bridge");
    let file = net.config("xdp = true", "", |_| String::new());
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"eth0\"", "\"eth0\", \"plain\"")).unwrap();
    let failed = net.start_balancer("lb", &file).await;
    let status = failed.exit().await;
    assert_eq!(status.code(), Some(2), "{}", failed.describe(status));
    let words = failed.last_words();
    assert!(words.contains("attach to interface plain as XDP (not every driver does that"), "{words}");
    assert!(!net.ok("lb", "ip link show eth0").contains(" xdp "));
}
