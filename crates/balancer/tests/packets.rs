//! The data plane without a network: packets in, verdict and packet out (BPF_PROG_TEST_RUN), at TC ingress and as XDP.
//!
//! BPF needs root of the machine, not of a user namespace: without it each test says so and passes.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};

use aya::{TestRun as _, TestRunOptions};
use balancer::abi::{
    BACKEND_CONFIGURED, BACKEND_LIVE, BACKEND_TAKES, BACKEND_TUNNEL, Backend, COUNTERS, Flow, Name,
    RING_SIZE, SERVICE_FIXED, SERVICE_TOKEN, Service, ServiceKey, TokenKey, TokenSlots, Tuple,
};
use balancer::config::Tables;
use balancer::maglev;
use balancer::plane::{Hook, INSPECT, Plane};
use balancer::status::Status;
use proptest::prelude::*;
use wire::key::Key;
use wire::option::{CapableFlags, CapableKeys, Mptcp};
use wire::{AddrId, Token};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Not ours, the kernel goes on with it.
    Passed,
    Dropped,
    /// Out of an interface.
    Sent,
}
use Verdict::{Dropped, Passed, Sent};

const VIP: &str = "10.83.0.1:80";
const VIP6: &str = "[fd83::1]:80";
const CLIENT: &str = "10.81.0.10:40000";
const CLIENT6: &str = "[fd81::10]:40000";

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Says why a test ends, where it may not load BPF programs.
fn may_load_bpf() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    let may = map.split_whitespace().eq(["0", "0", "4294967295"]) && nix::unistd::geteuid().is_root();
    if !may {
        // Not println, which the test harness keeps to itself.
        let why = "skipped: only root of the machine loads BPF programs, not root of a user namespace\n";
        std::io::stderr().write_all(why.as_bytes()).unwrap();
    }
    may
}

/// A plane with service 5 at both VIPs, steered by token, backends 1 and 2 on its ring, and port 8082 of backend 2.
struct Bench(Plane, Hook);

/// A test for either hook.
fn both(mut test: impl FnMut(Bench)) {
    if may_load_bpf() {
        test(Bench::at(Hook::Tc));
        test(Bench::at(Hook::Xdp));
    }
}

impl Bench {
    fn at(hook: Hook) -> Self {
        let tables = Tables { flows: 4096, fresh: 1024, tokens: 4096 };
        let mut bench = Bench(Plane::load(hook, &tables, None).unwrap(), hook);
        for number in [1, 2] {
            bench.backend(number, BACKEND_LIVE | BACKEND_TAKES);
        }
        for vip in [VIP, VIP6] {
            bench.service(vip, Service { id: 5, flags: SERVICE_TOKEN, backend: 0 });
        }
        bench.service("10.83.0.1:8082", Service { id: 5, flags: SERVICE_FIXED, backend: 2 });
        bench.ring(&[1, 2]);
        bench
    }

    fn backend(&mut self, number: u32, flags: u32) {
        let [source, destination]: [IpAddr; 2] =
            ["10.90.0.2", "10.90.0.11"].map(|address| address.parse().unwrap());
        let backend = Backend {
            to_mac: mac(number),
            from_mac: [2, 0, 0, 0, 0, 0xff],
            ifindex: 1,
            flags,
            outer_source: source.into(),
            outer_destination: destination.into(),
        };
        self.0.tables.backends.set(number, backend, 0).unwrap();
    }

    fn service(&mut self, address: &str, service: Service) {
        let address: SocketAddr = address.parse().unwrap();
        let key = ServiceKey { address: address.ip().into(), port: address.port().to_be(), unused: 0 };
        self.0.tables.services.insert(key, service, 0).unwrap();
    }

    /// A ring on which these backends take turns.
    fn ring(&mut self, backends: &[u32]) {
        let ring: Vec<u32> = backends.iter().copied().cycle().take(RING_SIZE as usize).collect();
        self.0.tables.set_ring(5, &ring).unwrap();
    }

    fn run(&mut self, program: &str, packet: &[u8]) -> (Verdict, Vec<u8>) {
        let mut out = vec![0; packet.len() + 64];
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..Default::default() };
        let result = self.0.test_run(program, options).unwrap();
        out.truncate(result.data_size_out as usize);
        let verdict = match (self.1, result.return_value as i32) {
            // TC_ACT_UNSPEC, _SHOT, _REDIRECT; XDP_PASS, _DROP, _TX, _REDIRECT
            (Hook::Tc, -1) | (Hook::Xdp, 2) => Passed,
            (Hook::Tc, 2) | (Hook::Xdp, 1) => Dropped,
            (Hook::Tc, 7) | (Hook::Xdp, 3 | 4) => Sent,
            other => panic!("{other:?}"),
        };
        (verdict, out)
    }

    fn send(&mut self, packet: &[u8]) -> (Verdict, Vec<u8>) {
        self.run("balance", packet)
    }

    /// The backend that `packet` goes to; 0 where it is not redirected.
    fn goes_to(&mut self, packet: &[u8]) -> u32 {
        let (verdict, out) = self.send(packet);
        match verdict {
            Sent => u32::from(out[5]),
            _ => 0,
        }
    }

    fn counter(&self, name: &str) -> u64 {
        let at = COUNTERS.iter().position(|(known, _)| *known == name).unwrap();
        self.0.tables.counters().unwrap()[at]
    }

    /// Changes what is in the flow table.
    fn change(&mut self, from: &str, to: &str, change: impl Fn(&mut Flow)) {
        let [from, to]: [SocketAddr; 2] = [from, to].map(|address| address.parse().unwrap());
        let tuple = Tuple {
            source: from.ip().into(),
            destination: to.ip().into(),
            source_port: from.port().to_be(),
            destination_port: to.port().to_be(),
        };
        let mut flow = self.0.tables.flows.get(&tuple, 0).unwrap();
        change(&mut flow);
        self.0.tables.flows.insert(tuple, flow, 0).unwrap();
    }

    /// A client's flow is at backend 1, and an attacker, who has a connection of its own at backend 2, has this SYN to
    /// move it there.
    fn flow_and_forged_syn(&mut self) -> Vec<u8> {
        self.ring(&[1]);
        self.connection(CLIENT, VIP, Key(1));
        self.ring(&[2]);
        assert_eq!(self.connection("10.81.9.9:1", VIP, Key(2)), 2);
        tcp(CLIENT, VIP, SYN, &[join(Key(2).token())])
    }

    /// Opens an MPTCP connection whose server has `key`; returns its backend.
    fn connection(&mut self, from: &str, to: &str, key: Key) -> u32 {
        let backend = self.goes_to(&tcp(from, to, SYN, &[capable(CapableKeys::None)]));
        let keys = CapableKeys::Both { sender: Key(1), receiver: key };
        assert_eq!(self.goes_to(&tcp(from, to, ACK, &[capable(keys)])), backend);
        backend
    }
}

fn mac(number: u32) -> [u8; 6] {
    [2, 0, 0, 0, 0, number as u8]
}

fn capable(keys: CapableKeys) -> Mptcp {
    Mptcp::Capable { version: 1, flags: CapableFlags::HMAC, keys }
}

fn join(token: Token) -> Mptcp {
    Mptcp::JoinSyn { backup: false, id: AddrId(1), token, nonce: 7 }
}

/// A TCP header with these options, and five bytes of data where it has no SYN.
fn segment(from: &str, to: &str, flags: u8, options: &[u8]) -> Vec<u8> {
    let [from, to]: [SocketAddr; 2] = [from, to].map(|address| address.parse().unwrap());
    let mut options = options.to_vec();
    options.resize(options.len().next_multiple_of(4), 1);
    let mut bytes = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    bytes.extend([0; 8]);
    let words = (20 + options.len()) / 4;
    bytes.extend([(words << 4) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(options);
    if flags & SYN == 0 {
        bytes.extend(b"hello");
    }
    bytes
}

fn tcp(from: &str, to: &str, flags: u8, options: &[Mptcp]) -> Vec<u8> {
    let options: Vec<u8> = options.iter().flat_map(|option| option.to_bytes().unwrap()).collect();
    ip(from, to, 6, &segment(from, to, flags, &options))
}

/// The same with this sequence number; IPv4.
fn tcp_at(sequence: u32, from: &str, to: &str, flags: u8, options: &[Mptcp]) -> Vec<u8> {
    let mut frame = tcp(from, to, flags, options);
    frame[38..42].copy_from_slice(&sequence.to_be_bytes());
    frame
}

/// An Ethernet frame with an IP packet.
fn ip(from: &str, to: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    frame(from, &packet(from, to, protocol, payload))
}

fn frame(from: &str, packet: &[u8]) -> Vec<u8> {
    let v4 = from.parse::<SocketAddr>().unwrap().is_ipv4();
    let kind: [u8; 2] = if v4 { [8, 0] } else { [0x86, 0xdd] };
    [&[2, 0, 0, 0, 0, 0xee, 2, 0, 0, 0, 0, 0xdd], kind.as_slice(), packet].concat()
}

fn packet(from: &str, to: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let [from, to] = [from, to].map(|address| address.parse::<SocketAddr>().unwrap().ip());
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let length = (20 + payload.len() as u16).to_be_bytes();
            let head = [0x45, 0, length[0], length[1], 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
            [&head, from.octets().as_slice(), &to.octets(), payload].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = (payload.len() as u16).to_be_bytes();
            let head = [0x60, 0, 0, 0, length[0], length[1], protocol, 64];
            [&head, from.octets().as_slice(), &to.octets(), payload].concat()
        }
        _ => panic!("two families"),
    }
}

/// A client address whose packets the ring with backends 1 and 2 sends to `wanted`.
fn client_of(bench: &mut Bench, wanted: u32) -> String {
    let mut clients = (1..200).map(|n| format!("10.81.7.{n}:5000"));
    clients.find(|client| bench.goes_to(&tcp(client, VIP, SYN, &[])) == wanted).unwrap()
}

#[test]
fn a_packet_goes_out_with_the_backends_address_and_nothing_else_changed() {
    both(|mut bench| {
        for (from, to) in [(CLIENT, VIP), (CLIENT6, VIP6)] {
            let packet = tcp(from, to, SYN, &[capable(CapableKeys::None)]);
            let (verdict, out) = bench.send(&packet);
            assert_eq!(verdict, Sent);
            assert!(out[..6] == mac(1) || out[..6] == mac(2), "{out:x?}");
            assert_eq!(out[6..12], [2, 0, 0, 0, 0, 0xff]);
            assert_eq!(out[12..], packet[12..]);
        }
    });
}

#[test]
fn what_is_for_no_service_is_left_alone() {
    both(|mut bench| {
        let others = [
            tcp(CLIENT, "10.83.0.1:81", SYN, &[]),
            tcp(CLIENT, "10.83.0.2:80", ACK, &[]),
            ip(CLIENT, VIP, 17, &[0; 20]),
            ip(CLIENT, VIP, 1, &[8, 0, 0, 0, 0, 0, 0, 0]),
            [[0xff; 12].as_slice(), &[8, 6], &[0; 28]].concat(),
        ];
        for packet in others {
            assert_eq!(bench.send(&packet), (Passed, packet));
        }
    });
}

#[test]
fn a_flow_stays_when_the_ring_changes() {
    both(|mut bench| {
        let client = client_of(&mut bench, 1);
        let ack = tcp(&client, VIP, ACK, &[]);
        assert_eq!(bench.goes_to(&ack), 1);
        bench.ring(&[2]);
        assert_eq!(bench.goes_to(&ack), 1);
        // Also one that has sent its SYN only.
        bench.ring(&[1, 2]);
        assert_eq!(
            bench.goes_to(&tcp(CLIENT6, VIP6, SYN, &[])),
            bench.goes_to(&tcp(CLIENT6, VIP6, SYN, &[]))
        );
        let first = bench.goes_to(&tcp(CLIENT6, VIP6, SYN, &[]));
        bench.ring(&[3 - first]);
        assert_eq!(bench.goes_to(&tcp(CLIENT6, VIP6, ACK, &[])), first);
    });
}

#[test]
fn a_join_follows_the_token_to_any_address_of_the_service() {
    both(|mut bench| {
        for (n, wanted) in [(1, 1), (2, 2), (3, 1), (4, 2)] {
            let client = client_of(&mut bench, wanted).replace(":5000", &format!(":{}", 6000 + n));
            bench.ring(&[wanted]);
            let key = Key(0x1111_2222_3333_4444 * n);
            assert_eq!(bench.connection(&client, VIP, key), wanted);
            bench.ring(&[3 - wanted]);
            for (from, to) in [("10.81.1.10:7000", VIP), ("[fd81:1::10]:7000", VIP6)] {
                let from = from.replace(":7000", &format!(":{}", 7000 + n));
                assert_eq!(bench.goes_to(&tcp(&from, to, SYN, &[join(key.token())])), wanted);
                // And so does what follows.
                assert_eq!(bench.goes_to(&tcp(&from, to, ACK, &[Mptcp::JoinAck { hmac: [7; 20] }])), wanted);
                assert_eq!(bench.goes_to(&tcp(&from, to, ACK, &[])), wanted);
            }
        }
        assert_eq!(bench.counter("join_token_unknown"), 0);
    });
}

#[test]
fn the_key_is_also_learned_from_the_first_data_and_from_the_servers_answer() {
    both(|mut bench| {
        let with_data =
            |checksum| CapableKeys::WithData { sender: Key(9), receiver: Key(77), length: 5, checksum };
        for (port, keys) in [(1, with_data(None)), (2, with_data(Some(3)))] {
            let from = format!("10.81.0.10:{port}");
            let backend = bench.goes_to(&tcp(&from, VIP, SYN, &[capable(CapableKeys::None)]));
            bench.goes_to(&tcp(&from, VIP, ACK, &[capable(keys)]));
            let join = tcp(&format!("10.81.1.10:{port}"), VIP, SYN, &[join(Key(77).token())]);
            assert_eq!(bench.goes_to(&join), backend);
        }
        let backend = bench.goes_to(&tcp(CLIENT, VIP, SYN, &[capable(CapableKeys::None)]));
        let answer = tcp(VIP, CLIENT, SYN | ACK, &[capable(CapableKeys::Sender(Key(88)))]);
        assert_eq!(bench.send(&answer), (Passed, answer));
        assert_eq!(bench.goes_to(&tcp("10.81.1.10:9", VIP, SYN, &[join(Key(88).token())])), backend);
    });
}

#[test]
fn a_join_of_an_unknown_connection_is_dropped_and_counted() {
    both(|mut bench| {
        let join = tcp(CLIENT, VIP, SYN, &[join(Token(0x1234_5678))]);
        assert_eq!(bench.send(&join).0, Dropped);
        assert_eq!(bench.counter("join_token_unknown"), 1);
    });
}

#[test]
fn a_key_counts_only_where_the_syn_was_seen() {
    both(|mut bench| {
        let keys = CapableKeys::Both { sender: Key(1), receiver: Key(2) };
        bench.goes_to(&tcp(CLIENT, VIP, ACK, &[capable(keys)]));
        // Plain TCP at first, and keys later.
        bench.goes_to(&tcp(CLIENT6, VIP6, SYN, &[]));
        bench.goes_to(&tcp(CLIENT6, VIP6, ACK, &[capable(keys)]));
        assert_eq!(bench.counter("tokens_learned"), 0);
        assert_eq!(bench.send(&tcp("10.81.1.10:1", VIP, SYN, &[join(Key(2).token())])).0, Dropped);
    });
}

#[test]
fn of_two_connections_with_one_token_each_client_finds_its_own() {
    both(|mut bench| {
        bench.ring(&[1]);
        assert_eq!(bench.connection("10.81.0.1:1", VIP, Key(5)), 1);
        bench.ring(&[2]);
        assert_eq!(bench.connection("10.81.0.2:1", VIP, Key(5)), 2);
        assert_eq!(bench.counter("token_collisions"), 1);
        for (client, backend) in [("10.81.0.1:9", 1), ("10.81.0.2:9", 2)] {
            assert_eq!(bench.goes_to(&tcp(client, VIP, SYN, &[join(Key(5).token())])), backend);
        }
    });
}

#[test]
fn an_announced_port_is_one_backends_whatever_comes() {
    both(|mut bench| {
        for n in 0..50 {
            let from = format!("10.81.0.10:{}", 100 + n);
            assert_eq!(bench.goes_to(&tcp(&from, "10.83.0.1:8082", SYN, &[join(Token(n))])), 2);
            assert_eq!(bench.goes_to(&tcp(&from, "10.83.0.1:8082", ACK, &[])), 2);
        }
        assert_eq!(bench.0.tables.traffic(2).unwrap().joins_by_port, 50);
    });
}

#[test]
fn no_flow_goes_to_a_backend_that_is_gone() {
    both(|mut bench| {
        let client = client_of(&mut bench, 1);
        let ack = tcp(&client, VIP, ACK, &[]);
        assert_eq!(bench.goes_to(&ack), 1);
        bench.backend(1, 0);
        bench.ring(&[2]);
        assert_eq!(bench.goes_to(&ack), 2);
        bench.backend(2, 0);
        assert_eq!(bench.send(&ack).0, Dropped);
        assert!(bench.counter("no_backend") > 0);
    });
}

#[test]
fn a_flood_of_syns_beyond_the_tables_breaks_no_flow() {
    both(|mut bench| {
        let mut flows = Vec::new();
        bench.ring(&[1]);
        for n in 0..200u64 {
            let from = format!("10.81.0.10:{}", 1000 + n);
            bench.connection(&from, VIP, Key(n));
            flows.push(from);
        }
        let joins: Vec<String> = (0..200).map(|n| format!("10.81.1.10:{}", 1000 + n)).collect();
        for (n, from) in joins.iter().enumerate() {
            assert_eq!(bench.goes_to(&tcp(from, VIP, SYN, &[join(Key(n as u64).token())])), 1);
        }
        bench.ring(&[2]);
        for n in 0..20_000u32 {
            let from = format!("172.16.{}.{}:{}", n >> 8 & 0xff, n & 0xff, 1024 + n);
            bench.goes_to(&tcp(&from, VIP, SYN, &[capable(CapableKeys::None)]));
        }
        for from in flows.iter().chain(&joins) {
            assert_eq!(bench.goes_to(&tcp(from, VIP, ACK, &[])), 1, "{from}");
        }
        // How many did not fit is told; what the flood could not reach has lost none.
        let status = Status::read("test", None, &bench.0.tables).unwrap();
        let evicted = |name: &str| status.tables.iter().find(|table| table.name == name).unwrap().evicted;
        assert_eq!((evicted("flows"), evicted("tokens")), (0, 0));
        assert!((20_000 - 1024..=20_000).contains(&evicted("fresh")), "{}", evicted("fresh"));
    });
}

#[test]
fn a_status_counts_each_entry_of_tables_of_many_batches() {
    if !may_load_bpf() {
        return;
    }
    let tables = Tables { flows: 1 << 16, fresh: 1024, tokens: 1 << 16 };
    let mut plane = Plane::load(Hook::Tc, &tables, None).unwrap();
    for n in 0..20_000u32 {
        let client = IpAddr::from((0x0a00_0000 + n).to_be_bytes()).into();
        let tuple = Tuple { source: client, destination: client, source_port: 1, destination_port: 2 };
        let flow = Flow { backend: n % 4, seen: 1, flags: 2, tick: 0, sequence: 0 };
        plane.tables.flows.insert(tuple, flow, 0).unwrap();
        let token = TokenSlots { newer: 1, newer_client: client, older: 0, older_client: client };
        plane.tables.tokens.insert(TokenKey { token: n, service: 0 }, token, 0).unwrap();
    }
    for number in 1..4 {
        let name = format!("web/app-{number}");
        plane.tables.backend_names.set(number, Name::new(&name), 0).unwrap();
        let mut backend = plane.tables.backends.get(&number, 0).unwrap();
        backend.flags = BACKEND_CONFIGURED;
        plane.tables.backends.set(number, backend, 0).unwrap();
    }
    plane.tables.service_names.set(0, Name::new("web"), 0).unwrap();
    let key = ServiceKey { address: IpAddr::from([10, 83, 0, 1]).into(), port: 80, unused: 0 };
    plane.tables.services.insert(key, Service { id: 0, flags: 0, backend: 0 }, 0).unwrap();
    let status = Status::read("test", None, &plane.tables).unwrap();
    let entries: Vec<u64> = status.tables.iter().map(|table| table.entries).collect();
    assert_eq!(entries, [20_000, 20_000, 0]);
    let of_backends: Vec<u64> = status.services[0].backends.iter().map(|backend| backend.flows).collect();
    assert_eq!(of_backends, [5000; 3]);
}

#[test]
fn a_forged_key_moves_no_flow_and_is_counted() {
    both(|mut bench| {
        bench.ring(&[1]);
        bench.connection(CLIENT, VIP, Key(5));
        assert_eq!(bench.goes_to(&tcp("10.81.1.10:1", VIP, SYN, &[join(Key(5).token())])), 1);
        // The attacker has a connection of its own on the other backend, and says that its key is the victim's.
        bench.ring(&[2]);
        assert_eq!(bench.connection("10.81.9.9:1", VIP, Key(5)), 2);
        assert_eq!(bench.counter("token_collisions"), 1);
        for flow in [CLIENT, "10.81.1.10:1"] {
            assert_eq!(bench.goes_to(&tcp(flow, VIP, ACK, &[])), 1);
        }
        let more = tcp(&CLIENT.replace(":40000", ":40001"), VIP, SYN, &[join(Key(5).token())]);
        assert_eq!(bench.goes_to(&more), 1);
    });
}

#[test]
fn options_that_do_not_add_up_are_counted_and_the_packet_is_served_as_plain_tcp() {
    both(|mut bench| {
        let cut = [30, 20, 1, 1];
        let syn = ip(CLIENT, VIP, 6, &segment(CLIENT, VIP, SYN, &cut));
        assert_eq!(bench.goes_to(&syn), bench.goes_to(&tcp(CLIENT, VIP, ACK, &[])));
        assert_eq!(bench.counter("malformed_options"), 1);
        let plain: u64 = [1, 2].map(|number| bench.0.tables.traffic(number).unwrap().plain).iter().sum();
        assert_eq!(plain, 1);
    });
}

#[test]
fn the_verifier_goes_through_a_tenth_of_what_it_allows_at_most() {
    both(|mut bench| {
        let verified = bench.0.info("balance").unwrap().verified_instruction_count().unwrap();
        assert!((1..100_000).contains(&verified), "{verified}");
    });
}

#[test]
fn a_syn_with_a_forged_source_does_not_move_a_flow() {
    both(|mut bench| {
        let syn = bench.flow_and_forged_syn();
        for options in [vec![], vec![capable(CapableKeys::None)], vec![join(Key(2).token())]] {
            assert_eq!(bench.goes_to(&tcp(CLIENT, VIP, SYN, &options)), 1);
            assert_eq!(bench.goes_to(&tcp(CLIENT, VIP, ACK, &[])), 1);
        }
        // After a RST the port may be another connection's.
        bench.goes_to(&tcp(CLIENT, VIP, RST, &[]));
        assert_eq!(bench.goes_to(&syn), 2);
    });
}

#[test]
fn a_reset_or_fin_whose_sequence_number_is_far_off_frees_no_flow() {
    both(|mut bench| {
        let syn = bench.flow_and_forged_syn();
        for far in [(1 << 20) + 1, 1 << 31, u32::MAX - (1 << 20)] {
            for flags in [RST, RST | ACK, FIN | ACK] {
                // Also after other packets with such a number.
                for flags in [flags, ACK, flags] {
                    assert_eq!(bench.goes_to(&tcp_at(far, CLIENT, VIP, flags, &[])), 1);
                }
                bench.change(CLIENT, VIP, |flow| flow.seen -= 3);
                assert_eq!(bench.goes_to(&syn), 1, "{far} {flags}");
            }
        }
        // It goes along with the flow, and over its end.
        for sequence in (0..=u32::MAX / (1 << 20)).map(|megabyte| megabyte << 20).chain([0, 1 << 20]) {
            assert_eq!(bench.goes_to(&tcp_at(sequence, CLIENT, VIP, ACK, &[])), 1);
        }
        assert_eq!(bench.goes_to(&tcp_at(0, CLIENT, VIP, RST, &[])), 1);
        assert_eq!(bench.goes_to(&syn), 2);
    });
}

#[test]
fn a_flow_that_the_client_has_finished_is_free_when_nothing_comes_any_more() {
    both(|mut bench| {
        let syn = bench.flow_and_forged_syn();
        assert_eq!(bench.goes_to(&tcp(CLIENT, VIP, FIN | ACK, &[])), 1);
        // The server may still have much to send, and gets acknowledgements.
        assert_eq!(bench.goes_to(&syn), 1);
        bench.change(CLIENT, VIP, |flow| (flow.seen, flow.tick) = (flow.seen - 3, 1));
        assert_eq!(bench.goes_to(&tcp(CLIENT, VIP, ACK, &[])), 1);
        assert_eq!(bench.goes_to(&syn), 1);
        bench.change(CLIENT, VIP, |flow| flow.seen -= 3);
        assert_eq!(bench.goes_to(&syn), 2);
    });
}

#[test]
fn a_connection_from_the_port_of_one_that_has_just_vanished_gets_its_joins() {
    both(|mut bench| {
        bench.ring(&[1]);
        bench.connection(CLIENT, VIP, Key(1));
        bench.ring(&[2]);
        assert_eq!(bench.connection(CLIENT, VIP, Key(3)), 1);
        assert_eq!(bench.goes_to(&tcp("10.81.1.10:1", VIP, SYN, &[join(Key(3).token())])), 1);
    });
}

#[test]
fn a_flow_that_was_told_learns_its_sequence_number_from_its_next_packet() {
    both(|mut bench| {
        bench.ring(&[1]);
        bench.connection(CLIENT, VIP, Key(1));
        bench.change(CLIENT, VIP, |flow| (flow.tick, flow.sequence) = (0, 0));
        bench.ring(&[2]);
        assert_eq!(bench.goes_to(&tcp_at(1 << 30, CLIENT, VIP, ACK, &[])), 1);
        assert_eq!(bench.goes_to(&tcp(CLIENT, VIP, RST, &[])), 1);
        assert_eq!(bench.goes_to(&tcp(CLIENT, VIP, SYN, &[])), 1);
        assert_eq!(bench.goes_to(&tcp_at(1 << 30, CLIENT, VIP, RST, &[])), 1);
        assert_eq!(bench.goes_to(&tcp(CLIENT, VIP, SYN, &[])), 2);
    });
}

#[test]
fn two_balancers_that_share_nothing_agree_on_connections_and_on_announced_ports() {
    both(|mut one| {
        let mut other = Bench::at(one.1);
        // As the control plane makes it, each from a file with its own order.
        let places = maglev::ring(RING_SIZE, &[("app-1", 1), ("app-2", 1)]);
        let ring: Vec<u32> = places.iter().map(|index| [1, 2][*index]).collect();
        one.0.tables.set_ring(5, &ring).unwrap();
        let places = maglev::ring(RING_SIZE, &[("app-2", 1), ("app-1", 1)]);
        let ring: Vec<u32> = places.iter().map(|index| [2, 1][*index]).collect();
        other.0.tables.set_ring(5, &ring).unwrap();
        let mut used = [0; 3];
        for n in 0..300 {
            let from = format!("10.81.0.10:{}", 2000 + n);
            let backend = one.goes_to(&tcp(&from, VIP, SYN, &[capable(CapableKeys::None)]));
            used[backend as usize] += 1;
            // The router sends what follows to the other: it knows nothing of the flow.
            assert_eq!(other.goes_to(&tcp(&from, VIP, ACK, &[])), backend);
            assert_eq!(one.goes_to(&tcp(&from, VIP, ACK, &[])), backend);
            let join = tcp(&from, "10.83.0.1:8082", SYN, &[join(Token(n))]);
            assert_eq!((one.goes_to(&join), other.goes_to(&join)), (2, 2));
        }
        assert!(used[1] > 100 && used[2] > 100, "{used:?}");
    });
}

/// Packet too big, unreachable, time exceeded: about what a backend has sent to `client`.
fn icmp_about(from_vip: &str, client: &str, kind: u8) -> Vec<u8> {
    let about = packet(from_vip, client, 6, &segment(from_vip, client, ACK, &[]));
    let router = if client.starts_with('[') { "[fd99::1]:0" } else { "10.99.0.1:0" };
    let protocol = if client.starts_with('[') { 58 } else { 1 };
    ip(router, from_vip, protocol, &[&[kind, 4, 0, 0, 0, 0, 5, 0], about.as_slice()].concat())
}

#[test]
fn an_icmp_error_goes_to_the_backend_whose_flow_it_is_about() {
    both(|mut bench| {
        for (client, vip, kinds) in [(CLIENT, VIP, [3, 11, 12]), (CLIENT6, VIP6, [1, 2, 3])] {
            bench.ring(&[2]);
            bench.goes_to(&tcp(client, vip, SYN, &[]));
            bench.goes_to(&tcp(client, vip, ACK, &[]));
            bench.ring(&[1]);
            for kind in kinds {
                assert_eq!(bench.goes_to(&icmp_about(vip, client, kind)), 2);
            }
        }
        assert_eq!(bench.goes_to(&icmp_about("10.83.0.1:8082", CLIENT, 3)), 2);
        let not_ours = icmp_about("10.83.0.1:81", CLIENT, 3);
        assert_eq!(bench.send(&not_ours), (Passed, not_ours));
        assert_eq!(bench.counter("icmp_delivered"), 7);
    });
}

#[test]
fn fragments_follow_the_first_one_and_strangers_are_not_guessed_at() {
    both(|mut bench| {
        bench.ring(&[2]);
        bench.goes_to(&tcp(CLIENT, VIP, SYN, &[]));
        bench.ring(&[1]);
        let mut first = tcp(CLIENT, VIP, ACK, &[]);
        let mut later = ip(CLIENT, VIP, 6, &[0x55; 40]);
        later[14 + 7] = 5; // an offset
        let before = bench.send(&later);
        assert_eq!(before, (Passed, later.clone()));
        assert_eq!(bench.counter("fragment_unknown"), 1);
        first[14 + 6] = 0x20; // more fragments
        assert_eq!(bench.goes_to(&first), 2);
        assert_eq!(bench.goes_to(&later), 2);
        // IPv6: next header fragment (44), with an identification.
        let head = |offset: u8, more: u8| [6, 0, offset, more, 1, 2, 3, 4];
        let first = ip(CLIENT6, VIP6, 44, &[&head(0, 1)[..], &segment(CLIENT6, VIP6, SYN, &[])].concat());
        let later = ip(CLIENT6, VIP6, 44, &[&head(1, 0)[..], &[0x55; 40]].concat());
        let to = bench.goes_to(&first);
        assert_eq!(to, 1);
        assert_eq!(bench.goes_to(&later), to);
    });
}

#[test]
fn options_of_ip_and_extension_headers_are_passed_over() {
    both(|mut bench| {
        bench.ring(&[2]);
        let mut with_options = tcp(CLIENT, VIP, SYN, &[]);
        with_options.splice(34..34, [1; 8]);
        with_options[14] = 0x47;
        assert_eq!(bench.goes_to(&with_options), 2);
        let extensions = [&[60, 0, 1, 4, 0, 0, 0, 0][..], &[6, 0, 1, 4, 0, 0, 0, 0]].concat();
        let v6 = ip(CLIENT6, VIP6, 0, &[extensions, segment(CLIENT6, VIP6, SYN, &[])].concat());
        assert_eq!(bench.goes_to(&v6), 2);
    });
}

#[test]
fn what_cannot_be_read_is_counted_and_left_to_the_kernel() {
    both(|mut bench| {
        let whole = tcp(CLIENT, VIP, SYN, &[]);
        let cut = &whole[..14 + 20 + 10];
        assert_eq!(bench.send(cut), (Passed, cut.to_vec()));
        assert_eq!(bench.counter("truncated"), 1);
        let tagged = [&whole[..12], &[0x81, 0, 0, 7], &whole[12..]].concat();
        assert_eq!(bench.send(&tagged).0, Passed);
        assert_eq!(bench.counter("vlan"), 1);
        let many = [60, 0, 1, 4, 0, 0, 0, 0].repeat(6);
        let v6 = ip(CLIENT6, VIP6, 60, &[many, segment(CLIENT6, VIP6, SYN, &[])].concat());
        assert_eq!(bench.send(&v6), (Passed, v6));
        assert_eq!(bench.counter("ipv6_extension"), 1);
    });
}

#[test]
fn a_tunnelled_packet_comes_out_of_the_tunnel_as_it_went_in() {
    both(|mut bench| {
        bench.ring(&[2]);
        let mut backend = Bench::at(Hook::Tc);
        backend.0.attach_unwrap(&[], &["10.90.0.2".parse().unwrap(), "fd90::2".parse().unwrap()]).unwrap();
        for outer in ["10.90.0", "fd90:"] {
            bench.backend(2, BACKEND_LIVE | BACKEND_TAKES | BACKEND_TUNNEL);
            if outer == "fd90:" {
                let mut backend = bench.0.tables.backends.get(&2, 0).unwrap();
                backend.outer_source = "fd90::2".parse::<IpAddr>().unwrap().into();
                backend.outer_destination = "fd90::11".parse::<IpAddr>().unwrap().into();
                bench.0.tables.backends.set(2, backend, 0).unwrap();
            }
            for (from, to) in [(CLIENT, VIP), (CLIENT6, VIP6)] {
                let packet = tcp(from, to, SYN, &[capable(CapableKeys::None)]);
                let (verdict, wrapped) = bench.send(&packet);
                assert_eq!(verdict, Sent);
                assert_eq!(wrapped[..6], mac(2));
                let outer_size = if outer == "fd90:" { 40 } else { 20 };
                assert_eq!(wrapped.len(), packet.len() + outer_size);
                assert_eq!(wrapped[14 + outer_size..], packet[14..]);
                if outer_size == 20 {
                    assert_eq!(wrapped[12..14], [8, 0]);
                    assert_eq!(
                        usize::from(u16::from_be_bytes([wrapped[16], wrapped[17]])),
                        packet.len() - 14 + 20
                    );
                    assert_eq!(wrapped[14 + 9], if from == CLIENT { 4 } else { 41 });
                    assert_eq!(checksum(&wrapped[14..34]), 0);
                    assert_eq!(wrapped[26..34], [10, 90, 0, 2, 10, 90, 0, 11]);
                } else {
                    assert_eq!(wrapped[12..14], [0x86, 0xdd]);
                    assert_eq!(wrapped[14 + 6], if from == CLIENT { 4 } else { 41 });
                }
                let (verdict, plain) = backend.run("unwrap", &wrapped);
                assert_eq!(verdict, Passed);
                assert_eq!(plain[12..], packet[12..]);
            }
        }
    });
}

#[test]
fn a_backend_takes_no_tunnelled_packet_from_a_stranger() {
    if !may_load_bpf() {
        return;
    }
    let mut bench = Bench::at(Hook::Tc);
    bench.0.attach_unwrap(&[], &["10.90.0.2".parse().unwrap()]).unwrap();
    let inner = packet(CLIENT, VIP, 6, &segment(CLIENT, VIP, SYN, &[]));
    for (from, taken) in [("10.90.0.2:0", true), ("10.90.0.3:0", false)] {
        let wrapped = ip(from, "10.90.0.11:0", 4, &inner);
        let out = bench.run("unwrap", &wrapped).1;
        assert_eq!(out != wrapped, taken);
    }
}

/// RFC 1071; 0 over a header whose checksum is right.
fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// What the parser found, and the token of the receiver's key.
#[derive(Debug, PartialEq)]
struct Found {
    flags: u32,
    join_token: u32,
    sender: u64,
    receiver: u64,
    token: u32,
}

struct Inspector(aya::Ebpf);

impl Inspector {
    fn new() -> Self {
        let mut ebpf = aya::Ebpf::load(INSPECT).unwrap();
        let program: &mut aya::programs::SchedClassifier =
            ebpf.program_mut("inspect").unwrap().try_into().unwrap();
        program.load().unwrap();
        Inspector(ebpf)
    }

    fn inspect(&mut self, options: &[u8]) -> Found {
        let mut packet = vec![0; 14 + 1 + 40];
        packet[14] = options.len() as u8;
        packet[15..15 + options.len()].copy_from_slice(options);
        let mut out = vec![0; packet.len()];
        let program: &aya::programs::SchedClassifier = self.0.program("inspect").unwrap().try_into().unwrap();
        let options =
            TestRunOptions { data_in: Some(&packet), data_out: Some(&mut out), ..Default::default() };
        assert_eq!(program.test_run(options).unwrap().return_value, 0);
        let word = |at: usize| out[at..at + 4].try_into().unwrap();
        let long = |at: usize| u64::from_be_bytes(out[at..at + 8].try_into().unwrap());
        Found {
            flags: u32::from_ne_bytes(word(0)),
            join_token: u32::from_be_bytes(word(4)),
            sender: long(8),
            receiver: long(16),
            token: u32::from_be_bytes(word(24)),
        }
    }
}

/// What the program ought to find, by `wire`.
fn expected(options: &[u8]) -> Found {
    let mut found = Found { flags: 0, join_token: 0, sender: 0, receiver: 0, token: 0 };
    for option in wire::option::read(options) {
        match option {
            Ok(Mptcp::Capable {
                version: 0,
                keys: CapableKeys::Sender(_) | CapableKeys::Both { .. },
                ..
            }) => {
                found.flags |= 32;
            }
            Ok(Mptcp::Capable { version: 1, keys, .. }) => match keys {
                CapableKeys::None => found.flags |= 1,
                CapableKeys::Sender(key) => {
                    (found.flags, found.sender, found.receiver) = (found.flags | 2, key.0, 0);
                }
                CapableKeys::Both { sender, receiver } | CapableKeys::WithData { sender, receiver, .. } => {
                    (found.flags, found.sender, found.receiver) = (found.flags | 4, sender.0, receiver.0);
                }
            },
            Ok(Mptcp::JoinSyn { token, .. }) => (found.flags, found.join_token) = (found.flags | 8, token.0),
            Ok(Mptcp::Dss { .. }) => found.flags |= 16,
            Ok(_) => {}
            Err(wire::option::Malformed::Cut { .. }) => found.flags |= 64,
            Err(_) => {}
        }
    }
    found.token = Key(found.receiver).token().0;
    found
}

/// Options as they come, or almost: any mix of well-formed ones, NOPs and rubbish.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let keys = prop_oneof![
        Just(CapableKeys::None),
        any::<u64>().prop_map(|key| CapableKeys::Sender(Key(key))),
        any::<[u64; 2]>().prop_map(|[a, b]| CapableKeys::Both { sender: Key(a), receiver: Key(b) }),
        (any::<[u64; 2]>(), any::<Option<u16>>()).prop_map(|([a, b], checksum)| CapableKeys::WithData {
            sender: Key(a),
            receiver: Key(b),
            length: 5,
            checksum
        }),
    ];
    let mptcp = prop_oneof![
        (0..3u8, keys).prop_map(|(version, keys)| Mptcp::Capable {
            version,
            flags: CapableFlags::HMAC,
            keys
        }),
        any::<u32>().prop_map(|token| join(Token(token))),
        Just(Mptcp::JoinAck { hmac: [3; 20] }),
        Just(Mptcp::Dss { ack: None, mapping: None, fin: true }),
        Just(Mptcp::Prio { backup: true }),
    ];
    let piece = prop_oneof![
        4 => mptcp.prop_map(|option| option.to_bytes().unwrap_or_default()),
        2 => Just(vec![1]),
        1 => Just(vec![2, 4, 5, 0xb4]),
        1 => proptest::collection::vec(any::<u8>(), 0..20),
    ];
    proptest::collection::vec(piece, 0..4).prop_map(|pieces| {
        let mut bytes = pieces.concat();
        bytes.truncate(40);
        bytes
    })
}

#[test]
fn the_parser_in_the_kernel_agrees_with_wire() {
    if !may_load_bpf() {
        return;
    }
    let inspector = std::cell::RefCell::new(Inspector::new());
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) }, |(bytes in options())| {
        let found = inspector.borrow_mut().inspect(&bytes);
        // A DSS of a wrong length is none for wire, and says for the balancer what a right one says.
        let mask = if wire::option::read(&bytes).any(|option| matches!(option, Err(wire::option::Malformed::Mptcp { .. }))) { !16 } else { !0 };
        let expected = expected(&bytes);
        prop_assert_eq!((found.flags & mask, found.join_token, found.sender, found.receiver, found.token),
            (expected.flags & mask, expected.join_token, expected.sender, expected.receiver, expected.token));
    });
}

#[test]
fn hostile_packets_move_no_established_flow() {
    both(|bench| {
        let bench = std::cell::RefCell::new(bench);
        bench.borrow_mut().ring(&[1]);
        bench.borrow_mut().connection(CLIENT, VIP, Key(1));
        bench.borrow_mut().ring(&[2]);
        // The flow's own numbers are about 0, which only who sees it knows.
        let far = (1 << 20) + 1..u32::MAX - (1 << 20);
        let packet = prop_oneof![
            // Options of any kind in the flow's own packets and in others', SYNs among them.
            (options(), any::<bool>(), any::<u8>(), 0..15u8, far).prop_map(
                |(options, own, flags, words, far)| {
                    let from = if own { CLIENT } else { "10.81.5.5:5" };
                    let mut segment = segment(from, VIP, flags, &options);
                    segment[4..8].copy_from_slice(&far.to_be_bytes());
                    segment[12] = words << 4;
                    ip(from, VIP, 6, &segment)
                }
            ),
            // Cut anywhere behind the IP header: less than that is refused by the test run itself.
            (options(), 34..90usize).prop_map(|(options, length)| {
                let mut packet = ip(CLIENT, VIP, 6, &segment(CLIENT, VIP, SYN, &options));
                packet.truncate(length);
                packet
            }),
            // Rubbish behind any of the headers.
            (any::<u8>(), proptest::collection::vec(any::<u8>(), 0..80))
                .prop_map(|(protocol, rubbish)| ip(CLIENT, VIP, protocol, &rubbish)),
            (any::<u8>(), proptest::collection::vec(any::<u8>(), 0..80))
                .prop_map(|(next, rubbish)| ip(CLIENT6, VIP6, next, &rubbish)),
            proptest::collection::vec(any::<u8>(), 20..120).prop_map(|rubbish| frame(CLIENT, &rubbish)),
        ];
        let own = tcp(CLIENT, VIP, ACK, &[]);
        // The kernel waits for all processors at each test run of XDP.
        let cases = if bench.borrow().1 == Hook::Tc { 2000 } else { 300 };
        proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }, |(packet in packet)| {
            let mut bench = bench.borrow_mut();
            let (verdict, out) = bench.send(&packet);
            prop_assert!(verdict != Passed || out == packet);
            prop_assert_eq!(bench.goes_to(&own), 1);
        });
    });
}
