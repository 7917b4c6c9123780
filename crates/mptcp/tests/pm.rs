//! The path manager of the running kernel, checked against `ip mptcp` and against what connections do.

mod net;

use std::sync::Arc;

use mptcp::pm::{Client, Endpoint, EndpointFlags, Limits};
use mptcp::{AddrId, Error};
use net::{host, ip, pair};

fn flags(names: &str) -> EndpointFlags {
    bitflags::parser::from_str(names).unwrap()
}

#[tokio::test]
async fn endpoints_are_those_that_ip_shows() {
    let (a, _b) = pair(2);
    let client = Client::connect(&a).await.unwrap();
    let ifindex = ip(&a, "-o link show eth1").split(':').next().unwrap().parse().unwrap();
    let endpoints = [
        Endpoint {
            id: Some(AddrId(7)),
            ..Endpoint::new("10.0.1.1".parse().unwrap(), flags("SUBFLOW | BACKUP"))
        },
        Endpoint {
            id: Some(AddrId(3)),
            ifindex,
            ..Endpoint::new("fd00:1::1".parse().unwrap(), flags("SIGNAL"))
        },
        Endpoint {
            id: Some(AddrId(255)),
            port: 4242,
            ..Endpoint::new("10.0.0.1".parse().unwrap(), flags("SIGNAL"))
        },
        Endpoint {
            id: Some(AddrId(9)),
            ..Endpoint::new("fd00:0::1".parse().unwrap(), flags("SUBFLOW | FULLMESH"))
        },
    ];
    for endpoint in &endpoints {
        client.add_endpoint(endpoint).await.unwrap();
    }
    let shown = ip(&a, "mptcp endpoint show");
    for line in [
        "10.0.1.1 id 7 subflow backup",
        "fd00:1::1 id 3 signal dev eth1",
        "10.0.0.1 port 4242 id 255 signal",
        "fd00::1 id 9 subflow fullmesh",
    ] {
        assert!(shown.lines().any(|l| l.trim() == line), "{line} in {shown}");
    }
    let mut listed = client.endpoints().await.unwrap();
    listed.sort_by_key(|e| endpoints.iter().position(|known| known.id == e.id));
    assert_eq!(listed, endpoints);
    assert_eq!(client.endpoint(AddrId(3)).await.unwrap(), endpoints[1]);

    client.delete_endpoint(AddrId(3), None).await.unwrap();
    let change = Endpoint { id: Some(AddrId(7)), ..Endpoint::new(endpoints[0].ip, flags("FULLMESH")) };
    client.change_endpoint(&change).await.unwrap();
    client
        .change_endpoint(&Endpoint { id: None, ..Endpoint::new(endpoints[3].ip, flags("BACKUP")) })
        .await
        .unwrap();
    let shown = ip(&a, "mptcp endpoint show");
    assert!(shown.contains("10.0.1.1 id 7 subflow fullmesh"), "{shown}");
    assert!(shown.contains("fd00::1 id 9 subflow backup"), "{shown}");
    assert!(!shown.contains("fd00:1::1"), "{shown}");

    client.flush_endpoints().await.unwrap();
    assert_eq!(client.endpoints().await.unwrap(), []);
    assert_eq!(ip(&a, "mptcp endpoint show"), "");
}

#[tokio::test]
async fn an_endpoint_that_ip_added_is_listed() {
    let a = host();
    ip(&a, "mptcp endpoint add 192.0.2.1 id 5 subflow backup");
    let listed = Client::connect(&a).await.unwrap().endpoints().await.unwrap();
    let expected = Endpoint {
        id: Some(AddrId(5)),
        ..Endpoint::new("192.0.2.1".parse().unwrap(), flags("SUBFLOW | BACKUP"))
    };
    assert_eq!(listed, [expected]);
}

#[tokio::test]
async fn limits_are_those_that_ip_shows() {
    let a = host();
    let client = Client::connect(&a).await.unwrap();
    let limits = Limits { add_addr_accepted: 3, subflows: 5 };
    client.set_limits(limits).await.unwrap();
    assert_eq!(ip(&a, "mptcp limits").trim(), "add_addr_accepted 3 subflows 5");
    ip(&a, "mptcp limits set add_addr_accepted 1 subflows 2");
    assert_eq!(client.limits().await.unwrap(), Limits { add_addr_accepted: 1, subflows: 2 });
}

#[tokio::test]
async fn a_refusal_names_the_object_and_keeps_the_kernels_words() {
    let a = host();
    let client = Client::connect(&a).await.unwrap();
    let endpoint =
        Endpoint { id: Some(AddrId(2)), ..Endpoint::new("10.0.0.2".parse().unwrap(), flags("SUBFLOW")) };
    client.add_endpoint(&endpoint).await.unwrap();
    let errors = [
        client.add_endpoint(&endpoint).await.unwrap_err(),
        client.endpoint(AddrId(9)).await.unwrap_err(),
        client.delete_endpoint(AddrId(9), None).await.unwrap_err(),
        client.change_endpoint(&Endpoint { id: Some(AddrId(9)), ..endpoint.clone() }).await.unwrap_err(),
        client.set_limits(Limits { add_addr_accepted: 0, subflows: 9 }).await.unwrap_err(),
        client
            .add_endpoint(&Endpoint::new("10.0.0.3".parse().unwrap(), flags("IMPLICIT")))
            .await
            .unwrap_err(),
        client.remove(mptcp::Token(0xdead_beef), AddrId(1)).await.unwrap_err(),
    ];
    let expected = [
        "add endpoint 10.0.0.2 id 2: ",
        "get endpoint id 9: Invalid argument (kernel: ",
        "delete endpoint id 9: Invalid argument (kernel: ",
        "change endpoint 10.0.0.2 id 9: Invalid argument",
        "set limits add_addr_accepted 0 subflows 9: Invalid argument (kernel: ",
        "add endpoint 10.0.0.3: Invalid argument (kernel: ",
        "remove address id 1 on deadbeef: Invalid argument (kernel: ",
    ];
    for (error, expected) in errors.iter().zip(expected) {
        assert!(error.to_string().starts_with(expected), "{error}");
        match error {
            Error::Kernel { extack: Some(words), .. } => assert!(!words.is_empty(), "{error:?}"),
            Error::Kernel { extack: None, what, .. } if what.starts_with("change") => {
                net::lacking("words for a refused change of an endpoint", "6.6");
            }
            _ => panic!("{error:?}"),
        }
    }
    let refused = client.delete_endpoint(AddrId(0), None).await.unwrap_err().to_string();
    assert_eq!(refused, "delete endpoint id 0: needs the address too");
    assert_eq!(client.endpoints().await.unwrap(), [endpoint]);
}

/// The kernel of this machine has laminar endpoints or says that it has not; never is the flag lost in silence.
#[tokio::test]
async fn a_laminar_endpoint_is_laminar_or_an_error() {
    let client = Client::connect(&host()).await.unwrap();
    let endpoint = Endpoint::new("10.0.0.2".parse().unwrap(), flags("SUBFLOW | LAMINAR"));
    let added = client.add_endpoint(&endpoint).await;
    let listed = client.endpoints().await.unwrap();
    match added {
        Ok(()) => assert_eq!(listed[0].flags, endpoint.flags),
        Err(error) => {
            assert!(matches!(error, Error::Unsupported { since: "6.18", .. }), "{error}");
            assert_eq!(listed, []);
        }
    }
}

#[tokio::test]
async fn one_client_serves_many_tasks_at_once() {
    let a = host();
    let client = Arc::new(Client::connect(&a).await.unwrap());
    let tasks: Vec<_> = (1..=8)
        .map(|n| {
            let client = Arc::clone(&client);
            tokio::spawn(async move {
                let ip = format!("10.0.0.{n}").parse().unwrap();
                client
                    .add_endpoint(&Endpoint { id: Some(AddrId(n)), ..Endpoint::new(ip, flags("SUBFLOW")) })
                    .await?;
                client.endpoint(AddrId(n)).await.map(|e| assert_eq!(e.ip, ip))
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(client.endpoints().await.unwrap().len(), 8);
}
