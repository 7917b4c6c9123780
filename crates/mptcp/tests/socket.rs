//! Listeners and dialers between namespaces, and what the kernel says about their connections.

mod net;

use mptcp::Netns;
use mptcp::features::KernelFeatures;
use mptcp::info::{self, Status};
use mptcp::pm::{Client, Endpoint, EndpointFlags, EventKind, Events, Limits};
use mptcp::socket::{self, Options, Protocol};
use net::{connect, connect_with, event_of, pair, transfer};

const ADDRS: [&str; 3] = ["10.0.0.2:0", "[fd00:0::2]:0", "[::ffff:10.0.0.2]:0"];

fn tcp() -> Options {
    Options { protocol: Protocol::Tcp, ..Options::default() }
}

#[tokio::test]
async fn a_listener_serves_mptcp_and_tcp_clients_and_tells_them_apart() {
    let (a, b) = pair(1);
    let counted = if net::counts_bytes() { 1000 } else { 0 };
    for addr in ADDRS {
        let mut both = connect(&a, &b, addr).await;
        transfer(&mut both.client, &mut both.server, 1000).await;
        let (Status::Mptcp(client), Status::Mptcp(server)) =
            (info::of(&both.client).unwrap(), info::of(&both.server).unwrap())
        else {
            panic!("{addr}: no MPTCP");
        };
        assert_ne!(client.token, server.token);
        assert_eq!((client.bytes_sent, server.bytes_received), (counted, counted));

        let mut plain = connect_with(&a, &b, addr, &tcp(), &Options::default()).await;
        transfer(&mut plain.client, &mut plain.server, 1000).await;
        assert_eq!(info::of(&plain.client).unwrap(), Status::Tcp);
        assert_eq!(info::of(&plain.server).unwrap(), Status::Tcp);
    }
}

#[tokio::test]
async fn a_client_of_a_tcp_server_has_fallen_back() {
    let (a, b) = pair(1);
    for addr in ADDRS {
        let mut connection = connect_with(&a, &b, addr, &Options::default(), &tcp()).await;
        transfer(&mut connection.server, &mut connection.client, 1000).await;
        assert!(matches!(info::of(&connection.client).unwrap(), Status::Fallback(_)), "{addr}");
        assert_eq!(info::of(&connection.server).unwrap(), Status::Tcp);
        for stream in [&connection.client, &connection.server] {
            let subflows = info::subflows(stream).unwrap();
            assert_eq!(subflows.len(), 1);
            assert_eq!(subflows[0].local, stream.local_addr().unwrap());
            assert_eq!(subflows[0].remote, stream.peer_addr().unwrap());
        }
        assert_eq!(info::subflows(&connection.client).unwrap()[0].tcp.bytes_received, 1000);
    }
}

#[tokio::test]
async fn one_listener_takes_ipv6_and_ipv4_clients_unless_told_otherwise() {
    let (a, b) = pair(1);
    for v6_only in [false, true] {
        let on_b = Options { netns: Some(b.clone()), v6_only, ..Options::default() };
        let listener = socket::listen("[::]:0".parse().unwrap(), &on_b).unwrap();
        let port = listener.local_addr().unwrap().port();
        let on_a = Options { netns: Some(a.clone()), ..Options::default() };
        socket::connect(format!("[fd00:0::2]:{port}").parse().unwrap(), &on_a).await.unwrap();
        let over_ipv4 = socket::connect(format!("10.0.0.2:{port}").parse().unwrap(), &on_a).await;
        assert_eq!(over_ipv4.is_err(), v6_only);
    }
}

#[tokio::test]
async fn every_subflow_is_told_with_addresses_and_bytes() {
    let (a, b) = pair(2);
    for netns in [&a, &b] {
        let limits = Limits { subflows: 2, add_addr_accepted: 0 };
        Client::connect(netns).await.unwrap().set_limits(limits).await.unwrap();
    }
    let endpoint = Endpoint::new("10.0.1.1".parse().unwrap(), EndpointFlags::SUBFLOW);
    Client::connect(&a).await.unwrap().add_endpoint(&endpoint).await.unwrap();
    let mut events = Events::subscribe(&a).unwrap();
    let mut connection = connect(&a, &b, "10.0.0.2:0").await;
    transfer(&mut connection.client, &mut connection.server, 100_000).await;
    event_of(&mut events, EventKind::SubflowEstablished).await;

    let subflows = info::subflows(&connection.client).unwrap();
    let locals: Vec<_> = subflows.iter().map(|s| s.local.ip().to_string()).collect();
    assert_eq!(locals, ["10.0.0.1", "10.0.1.1"]);
    assert!(subflows.iter().all(|s| s.remote == connection.client.peer_addr().unwrap()));
    let numbers = if KernelFeatures::get().full_info {
        [Some(1), Some(2)]
    } else {
        net::lacking("MPTCP_FULL_INFO", "6.5");
        [None, None]
    };
    assert_eq!(subflows.iter().map(|s| s.number).collect::<Vec<_>>(), numbers);
    assert!(subflows.iter().map(|s| s.tcp.bytes_sent).sum::<u64>() >= 100_000);
    assert!(subflows.iter().all(|s| s.tcp.rtt_us > 0 && s.tcp.cwnd > 0));
}

#[tokio::test]
async fn a_listener_is_made_inside_a_namespace_from_a_task() {
    let (a, b) = pair(1);
    let listener =
        b.run(|| socket::listen("10.0.0.2:0".parse().unwrap(), &Options::default())).unwrap().unwrap();
    let addr = listener.local_addr().unwrap();
    let on_a = Options { netns: Some(a), bind: Some("10.0.0.1:0".parse().unwrap()), ..Options::default() };
    let task = tokio::spawn(async move { socket::connect(addr, &on_a).await.unwrap().local_addr().unwrap() });
    let (_, peer) = listener.accept().await.unwrap();
    assert_eq!(task.await.unwrap(), peer);
}

#[tokio::test]
async fn options_reach_the_socket() {
    let (a, b) = pair(1);
    let options = Options {
        nodelay: true,
        keepalive: Some(std::time::Duration::from_secs(77)),
        send_buffer: Some(50_000),
        recv_buffer: Some(60_000),
        mark: Some(9),
        ..Options::default()
    };
    let connection =
        connect_with(&a, &b, "10.0.0.2:0", &options, &Options { backlog: 3, ..Options::default() }).await;
    let socket = socket2::SockRef::from(&connection.client);
    assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap().as_secs(), 77);
    assert_eq!((socket.send_buffer_size().unwrap(), socket.recv_buffer_size().unwrap()), (100_000, 120_000));
    assert_eq!(socket.mark().unwrap(), 9);
    let listening = net::output(&b, "ss", "-HMnl");
    assert_eq!(listening.split_whitespace().nth(2), Some("3"), "{listening}");
}

#[tokio::test]
async fn errors_name_operation_and_address() {
    let a = net::host();
    let on_a = Options { netns: Some(a.clone()), ..Options::default() };
    let listener = socket::listen("127.0.0.1:0".parse().unwrap(), &on_a).unwrap();
    let busy = listener.local_addr().unwrap();
    let error = socket::listen(busy, &on_a).unwrap_err().to_string();
    assert_eq!(error, format!("listen on {busy}: Address already in use"));
    let (_held, closed) = refusing(&a);
    let error = socket::connect(closed, &on_a).await.unwrap_err().to_string();
    assert_eq!(error, format!("connect to {closed}: Connection refused"));
    let elsewhere = Options { bind: Some("192.0.2.1:0".parse().unwrap()), ..on_a.clone() };
    let error = socket::connect(busy, &elsewhere).await.unwrap_err().to_string();
    assert_eq!(error, "bind to 192.0.2.1:0: Cannot assign requested address");
}

/// An address that refuses connections: its port is taken, and nobody listens. That a listener was there and was closed
/// would not do: a child that another test has just forked may hold it a little longer.
fn refusing(netns: &Netns) -> (socket2::Socket, std::net::SocketAddr) {
    let held = netns.run(|| socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None));
    let held = held.unwrap().unwrap();
    held.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    let addr = held.local_addr().unwrap().as_socket().unwrap();
    (held, addr)
}

#[tokio::test]
async fn dial_tries_the_next_address_and_reports_the_last_error() {
    let options = Options { netns: Some(net::host()), ..Options::default() };
    // `localhost` is ::1 too, where nobody listens.
    let listener = socket::listen("127.0.0.1:0".parse().unwrap(), &options).unwrap();
    let port = listener.local_addr().unwrap().port();
    let stream = socket::dial(&format!("localhost:{port}"), &options).await.unwrap();
    assert_eq!(stream.peer_addr().unwrap(), listener.local_addr().unwrap());
    let (_held, closed) = refusing(options.netns.as_ref().unwrap());
    let error = socket::dial(&closed.to_string(), &options).await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
    let error = socket::dial("no.such.host.invalid:80", &options).await.unwrap_err().to_string();
    assert!(error.starts_with("resolve no.such.host.invalid:80: "), "{error}");
}
