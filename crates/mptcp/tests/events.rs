//! Events of real connections, as both ends see them.

mod net;

use std::net::SocketAddr;
use std::pin::pin;

use mptcp::pm::{Client, Endpoint, EndpointFlags, Event, EventKind, Events, Limits, Notice};
use mptcp::{AddrId, Netns};
use net::{DEADLINE, connect, event_of, host, pair, token, transfer};

async fn allow_subflows(netns: &Netns) -> Client {
    let client = Client::connect(netns).await.unwrap();
    client.set_limits(Limits { subflows: 2, add_addr_accepted: 2 }).await.unwrap();
    client
}

fn local(event: &Event) -> SocketAddr {
    SocketAddr::new(event.local_ip.unwrap(), event.local_port.unwrap())
}

fn remote(event: &Event) -> SocketAddr {
    SocketAddr::new(event.remote_ip.unwrap(), event.remote_port.unwrap())
}

#[tokio::test]
async fn the_life_of_a_connection_with_a_second_subflow() {
    let listeners = net::tells_of_listeners().await;
    for (addr, second) in [("10.0.0.2:0", "10.0.1.1"), ("[fd00:0::2]:0", "fd00:1::1")] {
        let (a, b) = pair(2);
        let pm = allow_subflows(&a).await;
        allow_subflows(&b).await;
        let (mut at_a, mut at_b) = (Events::subscribe(&a).unwrap(), Events::subscribe(&b).unwrap());
        let mut connection = connect(&a, &b, addr).await;

        if listeners {
            let listening = event_of(&mut at_b, EventKind::ListenerCreated).await;
            assert_eq!(local(&listening), connection.listener.local_addr().unwrap());
        }
        for (events, stream, server) in
            [(&mut at_a, &connection.client, false), (&mut at_b, &connection.server, true)]
        {
            let created = event_of(events, EventKind::Created).await;
            assert_eq!(created.token, Some(token(stream)));
            assert_eq!(local(&created), stream.local_addr().unwrap());
            assert_eq!(remote(&created), stream.peer_addr().unwrap());
            assert_eq!(created.server_side.unwrap_or(false), server);
        }
        transfer(&mut connection.client, &mut connection.server, 1000).await;
        let established = event_of(&mut at_a, EventKind::Established).await;
        assert_eq!(established.token, Some(token(&connection.client)));
        event_of(&mut at_b, EventKind::Established).await;

        let id = Some(AddrId(7));
        let endpoint = Endpoint { id, ..Endpoint::new(second.parse().unwrap(), EndpointFlags::SUBFLOW) };
        pm.add_endpoint(&endpoint).await.unwrap();
        let subflow = event_of(&mut at_a, EventKind::SubflowEstablished).await;
        assert_eq!(
            (subflow.local_ip, subflow.local_id, subflow.remote_id),
            (Some(endpoint.ip), id, Some(AddrId(0)))
        );
        assert_eq!(remote(&subflow), connection.client.peer_addr().unwrap());
        assert_eq!((subflow.backup, subflow.error), (Some(false), None));
        let mirrored = event_of(&mut at_b, EventKind::SubflowEstablished).await;
        assert_eq!((local(&mirrored), remote(&mirrored)), (remote(&subflow), local(&subflow)));
        assert_eq!(mirrored.remote_id, id);

        pm.change_endpoint(&Endpoint { flags: EndpointFlags::BACKUP, ..endpoint }).await.unwrap();
        let priority = event_of(&mut at_b, EventKind::SubflowPriority).await;
        assert_eq!((remote(&priority), priority.backup), (local(&subflow), Some(true)));

        pm.delete_endpoint(AddrId(7), None).await.unwrap();
        let closed = event_of(&mut at_a, EventKind::SubflowClosed).await;
        assert_eq!(local(&closed), local(&subflow));
        let removed = event_of(&mut at_b, EventKind::Removed).await;
        assert_eq!((removed.token, removed.remote_id), (Some(token(&connection.server)), id));

        let token = token(&connection.client);
        drop((connection.client, connection.server));
        assert_eq!(event_of(&mut at_a, EventKind::Closed).await.token, Some(token));
        let addr = connection.listener.local_addr().unwrap();
        drop(connection.listener);
        if listeners {
            assert_eq!(local(&event_of(&mut at_b, EventKind::ListenerClosed).await), addr);
        }
    }
}

#[tokio::test]
async fn an_announced_address_is_seen_with_its_id_and_port() {
    let (a, b) = pair(2);
    Client::connect(&a).await.unwrap().set_limits(Limits::default()).await.unwrap();
    let pm = allow_subflows(&b).await;
    let (id, port) = (Some(AddrId(9)), 4242);
    let endpoint = Endpoint { id, port, ..Endpoint::new("10.0.1.2".parse().unwrap(), EndpointFlags::SIGNAL) };
    pm.add_endpoint(&endpoint).await.unwrap();
    let mut at_a = Events::subscribe(&a).unwrap();
    let mut connection = connect(&a, &b, "10.0.0.2:0").await;
    transfer(&mut connection.client, &mut connection.server, 1000).await;
    let announced = event_of(&mut at_a, EventKind::Announced).await;
    assert_eq!(announced.token, Some(token(&connection.client)));
    assert_eq!(
        (announced.remote_id, announced.remote_ip, announced.remote_port),
        (id, Some(endpoint.ip), Some(port))
    );
}

#[tokio::test]
async fn a_subflow_that_lost_its_address_is_closed_with_the_error() {
    let (a, b) = pair(2);
    let pm = allow_subflows(&a).await;
    allow_subflows(&b).await;
    pm.add_endpoint(&Endpoint::new("10.0.1.1".parse().unwrap(), EndpointFlags::SUBFLOW)).await.unwrap();
    let mut at_a = Events::subscribe(&a).unwrap();
    let mut connection = connect(&a, &b, "10.0.0.2:0").await;
    transfer(&mut connection.client, &mut connection.server, 1000).await;
    let subflow = event_of(&mut at_a, EventKind::SubflowEstablished).await;
    let (local, remote) = (local(&subflow), remote(&subflow));
    // Kills the one subflow from outside, as an administrator may.
    net::output(&a, "ss", &format!("-K -t src {local} dst {remote}"));
    let closed = event_of(&mut at_a, EventKind::SubflowClosed).await;
    assert_eq!(closed.local_ip, subflow.local_ip);
    assert_eq!(closed.error, Some(libc::ECONNABORTED as u8), "{closed:?}");
}

#[tokio::test]
async fn an_overrun_is_noticed_and_the_stream_goes_on() {
    let a = host();
    let mut events = Events::subscribe_with_buffer(&a, 4096).unwrap();
    // Nobody reads meanwhile, and the smallest buffer holds a few events only.
    for _ in 0..50 {
        drop(connect(&a, &a, "127.0.0.1:0").await);
    }
    let mut seen = 0;
    let overrun = async {
        while events.next().await.unwrap() != Notice::Overrun {
            seen += 1;
        }
    };
    tokio::time::timeout(DEADLINE, overrun).await.expect("no overrun");
    assert!(seen > 0 && seen < 50 * 4, "{seen}");

    let connection = connect(&a, &a, "127.0.0.1:0").await;
    let wanted = token(&connection.client);
    let created =
        net::event(&mut events, "CREATED", |e| e.kind == EventKind::Created && e.token == Some(wanted));
    created.await;
}

#[tokio::test]
async fn a_dropped_wait_loses_no_event() {
    let a = host();
    let mut events = Events::subscribe(&a).unwrap();
    let (mut connections, mut created) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        let mut connecting = pin!(connect(&a, &a, "127.0.0.1:0"));
        loop {
            // The wait that loses is dropped.
            tokio::select! {
                connection = &mut connecting => break connections.push(connection),
                Notice::Event(event) = async { events.next().await.unwrap() } => created.push(event),
            }
        }
    }
    let wanted: Vec<_> = connections.iter().map(|connection| Some(token(&connection.client))).collect();
    let seen =
        |created: &[Event], token| created.iter().any(|e| e.kind == EventKind::Created && e.token == token);
    while !wanted.iter().all(|token| seen(&created, *token)) {
        created.push(net::event(&mut events, "event", |_| true).await);
    }
}

#[tokio::test]
async fn events_are_those_of_the_namespace() {
    if !net::tells_of_listeners().await {
        return;
    }
    let (a, b) = (host(), host());
    let mut at_a = Events::subscribe(&a).unwrap();
    let _other = connect(&b, &b, "127.0.0.1:0").await;
    let connection = connect(&a, &a, "127.0.0.1:0").await;
    let listening = event_of(&mut at_a, EventKind::ListenerCreated).await;
    assert_eq!(local(&listening), connection.listener.local_addr().unwrap());
}
