use mptcp::info::{Info, TcpInfo};
use mptcp::{AddrId, Token};
use proptest::prelude::*;

use super::*;

fn subflow(local: &str, remote: &str, flags: SubflowFlags) -> Subflow {
    Subflow {
        local: local.parse().unwrap(),
        remote: remote.parse().unwrap(),
        local_id: AddrId(0),
        remote_id: AddrId(0),
        state: "ESTAB".into(),
        flags,
        ifindex: 0,
        tcp: TcpInfo::default(),
        congestion_control: String::new(),
    }
}

fn connection(subflows: Vec<Subflow>) -> Connection {
    Connection {
        token: Token(1),
        state: "ESTAB".into(),
        local: subflows[0].local,
        remote: subflows[0].remote,
        inode: 1,
        uid: 0,
        owners: Vec::new(),
        info: Info::default(),
        subflows,
    }
}

/// A server's connection, its peer at two access points; over an IPv6 socket.
fn server() -> Connection {
    connection(vec![
        subflow("[::ffff:10.0.9.1]:1194", "[::ffff:10.0.1.2]:4000", SubflowFlags::empty()),
        subflow("[::ffff:10.0.9.1]:1194", "[::ffff:10.0.2.2]:4001", SubflowFlags::BACKUP_LOCAL),
    ])
}

fn via(word: &str) -> Wanted {
    let here = mptcp::Netns::current().unwrap();
    Wanted::Via(Via::resolve(&here, word).unwrap())
}

fn flags(plan: &Plan) -> Vec<(String, bool, bool)> {
    plan.flags.iter().map(|flag| (canonical(flag.path.remote).to_string(), flag.is, flag.wanted)).collect()
}

#[test]
fn the_new_primary_subflow_is_first_to_get_its_flag() {
    for word in ["10.0.2.2", "10.0.2.0/24", "::ffff:10.0.2.2"] {
        let plan = plan(&server(), &via(word)).unwrap();
        assert_eq!(
            flags(&plan),
            [("10.0.2.2:4001".into(), true, false), ("10.0.1.2:4000".into(), false, true)]
        );
        assert_eq!(plan.primary, [Path::of(&server().subflows[1])]);
    }
}

#[test]
fn both_clears_every_flag_of_ours() {
    let plan = plan(&server(), &Wanted::Both).unwrap();
    assert!(plan.flags.iter().all(|flag| !flag.wanted));
    assert_eq!(plan.primary.len(), 2);
}

#[test]
fn an_interface_is_where_a_subflow_is_bound_or_has_its_address() {
    let lo = via("lo");
    let mut connection = server();
    let none = plan(&connection, &lo).unwrap_err().to_string();
    assert_eq!(
        none,
        "no subflow goes via lo; it has 10.0.9.1:1194 → 10.0.1.2:4000, 10.0.9.1:1194 → 10.0.2.2:4001"
    );
    let Wanted::Via(Via::Interface { index, .. }) = lo else { panic!("{lo:?}") };
    connection.subflows[1].ifindex = index;
    assert_eq!(plan(&connection, &lo).unwrap().primary, [Path::of(&connection.subflows[1])]);
    let by_address = Wanted::Via(Via::Interface {
        name: "x".into(),
        index: 999,
        addresses: vec!["10.0.9.1".parse().unwrap()],
    });
    assert_eq!(plan(&server(), &by_address).unwrap().primary.len(), 2);
}

#[test]
fn fastest_is_the_shortest_round_trip_that_the_peer_allows() {
    let mut connection = server();
    connection.subflows[0].tcp.rtt_us = 20_000;
    connection.subflows[1].tcp.rtt_us = 10_000;
    let fastest = |connection: &Connection| plan(connection, &via("fastest")).unwrap().primary;
    assert_eq!(fastest(&connection), [Path::of(&connection.subflows[1])]);
    connection.subflows[1].flags |= SubflowFlags::BACKUP_REMOTE;
    assert_eq!(fastest(&connection), [Path::of(&connection.subflows[0])]);
}

#[test]
fn what_cannot_be_steered_has_its_reason() {
    let reason = |change: fn(&mut Connection)| {
        let mut connection = server();
        change(&mut connection);
        plan(&connection, &via("10.0.2.2")).unwrap_err().to_string()
    };
    assert_eq!(reason(|c| c.info.flags = 1), "it fell back to TCP, which has one path");
    assert_eq!(reason(|c| c.state = "LAST-ACK".into()), "it is closing (LAST-ACK)");
    assert_eq!(
        reason(|c| c.subflows[1].flags |= SubflowFlags::BACKUP_REMOTE),
        "the peer asked for backup on 10.0.9.1:1194 → 10.0.2.2:4001"
    );
    assert_eq!(
        reason(|c| c.subflows[1].state = "SYN-SENT".into()),
        "no subflow goes via 10.0.2.2; it has 10.0.9.1:1194 → 10.0.1.2:4000"
    );
    assert_eq!(reason(|c| c.subflows.clear()), "no subflow goes via 10.0.2.2; it has none");
}

#[test]
fn a_word_that_names_nothing_is_refused() {
    let here = mptcp::Netns::current().unwrap();
    let error = Via::resolve(&here, "nonsense0").unwrap_err().to_string();
    assert!(
        error.starts_with("nonsense0 is no address, no subnet and no interface of current: No such device"),
        "{error}"
    );
}

proptest! {
    /// Whatever a connection looks like, no plan leaves it without a primary subflow at any time.
    #[test]
    fn no_plan_takes_the_last_primary_subflow(
        subflows in proptest::collection::vec((0u8..4, any::<bool>(), any::<bool>(), any::<bool>()), 1..6),
        net in 0u8..5,
    ) {
        let subflows = subflows.into_iter().enumerate().map(|(n, (net, ours, peers, joining))| {
            let mut flags = SubflowFlags::empty();
            flags.set(SubflowFlags::BACKUP_LOCAL, ours);
            flags.set(SubflowFlags::BACKUP_REMOTE, peers);
            let mut subflow = subflow("10.9.0.1:80", &format!("10.0.{net}.{n}:1000"), flags);
            if joining {
                subflow.state = "SYN-SENT".into();
            }
            subflow
        });
        let mut connection = connection(subflows.collect());
        let wanted = if net == 4 { Wanted::Both } else { via(&format!("10.0.{net}.0/24")) };
        if let Ok(plan) = plan(&connection, &wanted) {
            let primaries = |c: &Connection| c.subflows.iter().filter(|s| s.state == "ESTAB" && !is_backup(s)).count();
            let had = primaries(&connection);
            for flag in &plan.flags {
                let subflow = connection.subflows.iter_mut().find(|s| Path::of(s) == flag.path).unwrap();
                subflow.flags.set(SubflowFlags::BACKUP_LOCAL, flag.wanted);
                prop_assert!(had == 0 || primaries(&connection) > 0);
            }
            prop_assert_eq!(primaries(&connection), plan.primary.len());
        }
    }
}
