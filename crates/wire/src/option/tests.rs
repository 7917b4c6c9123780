//! Options of the kernel's own packets, of every form that RFC 8684 knows, and of random bytes.

use proptest::prelude::*;

use super::*;
use crate::key::{add_addr_hmac, join_hmac};

/// The TCP headers of captured connections, see `tests/packets/capture`.
const CAPTURES: [&str; 4] = [
    include_str!("../../tests/packets/ipv4.hex"),
    include_str!("../../tests/packets/ipv6.hex"),
    include_str!("../../tests/packets/abort.hex"),
    include_str!("../../tests/packets/corrupted.hex"),
];

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().map(|digit| (digit as char).to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// Whether the client sent it, and the TCP header.
fn packets(capture: &str) -> impl Iterator<Item = (bool, Vec<u8>)> {
    let lines = capture.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| (line.starts_with('>'), bytes(&line[2..])))
}

/// Who sent it, from which port, and what.
fn options(capture: &str) -> Vec<(bool, u16, Mptcp)> {
    let all = packets(capture).flat_map(|(client, packet)| {
        let port = u16::from_be_bytes([packet[0], packet[1]]);
        read_header(&packet).map(|option| (client, port, option.unwrap())).collect::<Vec<_>>()
    });
    all.collect()
}

#[test]
fn every_option_of_the_kernel_is_written_as_it_was_read() {
    for (_, packet) in CAPTURES.into_iter().flat_map(packets) {
        let mut rest = &packet[20..];
        for option in read_header(&packet) {
            let written = option.as_ref().unwrap().to_bytes().unwrap();
            let at = rest.windows(written.len()).position(|window| window == written);
            rest = &rest[at.unwrap_or_else(|| panic!("{option:?}")) + written.len()..];
        }
        assert!(!rest.windows(2).any(|window| window[0] == KIND && window[1] > 2), "{rest:x?} left");
    }
}

#[test]
fn the_captures_hold_every_subtype_that_the_kernel_sends() {
    let all: Vec<_> = CAPTURES.into_iter().flat_map(options).map(|(_, _, option)| option).collect();
    for subtype in 0..=8 {
        assert!(all.iter().any(|option| option.subtype() == Subtype(subtype)), "{}", Subtype(subtype));
    }
    let forms: [fn(&Mptcp) -> bool; 12] = [
        |o| matches!(o, Mptcp::Capable { keys: CapableKeys::None, .. }),
        |o| matches!(o, Mptcp::Capable { keys: CapableKeys::Both { .. }, .. }),
        |o| matches!(o, Mptcp::JoinSyn { backup: true, .. }),
        |o| matches!(o, Mptcp::JoinSynAck { .. }),
        |o| matches!(o, Mptcp::JoinAck { .. }),
        |o| matches!(o, Mptcp::Dss { ack: Some(SequenceNumber::Short(_)), mapping: None, fin: false }),
        |o| matches!(o, Mptcp::Dss { ack: Some(SequenceNumber::Long(_)), .. }),
        |o| matches!(o, Mptcp::Dss { fin: true, .. }),
        |o| matches!(o, Mptcp::Dss { mapping: Some(Mapping { checksum: Some(_), .. }), .. }),
        |o| matches!(o, Mptcp::AddAddr { ip: IpAddr::V4(_), port: Some(_), hmac: None, .. }),
        |o| matches!(o, Mptcp::AddAddr { ip: IpAddr::V6(_), port: Some(_), hmac: Some(_), .. }),
        |o| matches!(o, Mptcp::Prio { backup: false }),
    ];
    for (number, form) in forms.iter().enumerate() {
        assert!(all.iter().any(form), "form {number}");
    }
}

/// A connection's secrets, read off its handshake.
struct Connection {
    client: Key,
    server: Key,
}

impl Connection {
    fn of(capture: &str) -> Self {
        let keys = options(capture).into_iter().find_map(|(_, _, option)| match option {
            Mptcp::Capable { keys: CapableKeys::Both { sender, receiver }, .. } => Some((sender, receiver)),
            _ => None,
        });
        let (client, server) = keys.unwrap();
        Connection { client, server }
    }

    /// The keys of who sent it, and of who received it.
    fn keys(&self, client: bool) -> (Key, Key) {
        if client { (self.client, self.server) } else { (self.server, self.client) }
    }
}

#[test]
fn tokens_and_hmacs_of_the_kernels_joins_are_the_ones_computed_here() {
    for capture in CAPTURES {
        let connection = Connection::of(capture);
        let mut joins = 0;
        // The handshake goes on: SYN, SYN/ACK, ACK of one join before the next one begins, as captured.
        let (mut of_client, mut of_server) = (0, 0);
        for (client, _, option) in options(capture) {
            let (own, peer) = connection.keys(client);
            match option {
                Mptcp::JoinSyn { token, nonce, .. } => {
                    assert_eq!(token, peer.token());
                    of_client = nonce;
                }
                Mptcp::JoinSynAck { hmac, nonce, .. } => {
                    assert_eq!(hmac, join_hmac((own, nonce), (peer, of_client)).truncated());
                    of_server = nonce;
                }
                Mptcp::JoinAck { hmac } => {
                    assert_eq!(hmac, join_hmac((own, of_client), (peer, of_server)).full());
                    joins += 1;
                }
                _ => {}
            }
        }
        assert!(joins > 0);
    }
}

#[test]
fn hmacs_of_the_kernels_announcements_are_the_ones_computed_here() {
    let mut seen = 0;
    for capture in CAPTURES {
        let connection = Connection::of(capture);
        for (client, _, option) in options(capture) {
            if let Mptcp::AddAddr { id, ip, port, hmac: Some(hmac) } = option {
                let (own, peer) = connection.keys(client);
                assert_eq!(hmac, add_addr_hmac(own, peer, id, ip, port));
                seen += 1;
            }
        }
    }
    assert!(seen >= 5, "{seen}");
}

/// Data may begin in an MP_CAPABLE, which tells its length alone.
#[test]
fn the_kernels_data_begins_one_behind_the_idsn() {
    let mut seen = [0, 0];
    for capture in CAPTURES {
        let connection = Connection::of(capture);
        for sender in [true, false] {
            let mut begin = connection.keys(sender).0.idsn().wrapping_add(1);
            for (_, _, option) in options(capture).into_iter().filter(|(client, ..)| *client == sender) {
                match option {
                    Mptcp::Capable { keys: CapableKeys::WithData { length, .. }, .. } => {
                        begin = begin.wrapping_add(length.into());
                        seen[0] += 1;
                    }
                    Mptcp::Dss { mapping: Some(mapping), .. } => {
                        assert_eq!(mapping.data_sequence, SequenceNumber::Long(begin));
                        seen[1] += 1;
                        break;
                    }
                    _ => {}
                }
            }
        }
    }
    assert!(seen[1] >= 6, "{seen:?}");
}

#[test]
fn a_fast_close_carries_the_receivers_key() {
    let connection = Connection::of(CAPTURES[2]);
    let abort = options(CAPTURES[2]);
    let (client, _, _) = abort.iter().find(|(_, _, o)| matches!(o, Mptcp::FastClose { .. })).unwrap();
    let closes = abort.iter().filter(|(_, _, o)| *o == Mptcp::FastClose { key: connection.keys(*client).1 });
    assert!(closes.count() > 0);
}

/// The forms of RFC 8684 and RFC 6824 that no capture here has, byte by byte.
#[test]
fn forms_that_this_kernel_does_not_send_are_read_and_written() {
    let v0 = |keys| Mptcp::Capable { version: 0, flags: CapableFlags::CHECKSUM | CapableFlags::HMAC, keys };
    let flags = CapableFlags::HMAC;
    let (sender, receiver) = (Key(0x0102_0304_0506_0708), Key(0x1112_1314_1516_1718));
    let forms = [
        ("1e0c00810102030405060708", v0(CapableKeys::Sender(sender))),
        ("1e14008101020304050607081112131415161718", v0(CapableKeys::Both { sender, receiver })),
        (
            "1e1601010102030405060708111213141516171805b4",
            Mptcp::Capable {
                version: 1,
                flags,
                keys: CapableKeys::WithData { sender, receiver, length: 1460, checksum: None },
            },
        ),
        (
            "1e1801810102030405060708111213141516171805b4beef",
            Mptcp::Capable {
                version: 1,
                flags: flags | CapableFlags::CHECKSUM,
                keys: CapableKeys::WithData { sender, receiver, length: 1460, checksum: Some(0xbeef) },
            },
        ),
        (
            "1e14200500000007000000080000000900100000",
            Mptcp::Dss {
                ack: Some(SequenceNumber::Short(7)),
                mapping: Some(Mapping {
                    data_sequence: SequenceNumber::Short(8),
                    subflow_sequence: 9,
                    length: 16,
                    checksum: Some(0),
                }),
                fin: false,
            },
        ),
        ("1e05410203", Mptcp::RemoveAddr(vec![AddrId(2), AddrId(3)])),
        ("1e0351", Mptcp::Prio { backup: true }),
        ("1e048105", Mptcp::Reset { transient: true, reason: 5 }),
        ("1e05f30708", Mptcp::Unknown { subtype: 15, low: 3, data: vec![7, 8] }),
    ];
    for (hex, option) in forms {
        assert_eq!(Mptcp::parse(&bytes(hex)).as_ref(), Ok(&option), "{hex}");
        let mut expected = bytes(hex);
        // REMOVE_ADDR's low bits are reserved.
        if let Mptcp::RemoveAddr(_) = option {
            expected[2] = 0x40;
        }
        assert_eq!(option.to_bytes().unwrap(), expected);
    }
}

#[test]
fn an_option_of_a_wrong_length_is_named_and_kept_and_the_next_one_is_read() {
    let both = bytes("1e0b1007010203040506071e0350");
    let [wrong, right] = &read(&both).collect::<Vec<_>>()[..] else { panic!() };
    assert_eq!(wrong.as_ref().unwrap_err().to_string(), "MP_JOIN of 11 bytes");
    assert_eq!(*wrong, Err(Malformed::Mptcp { subtype: Subtype::JOIN, bytes: both[..11].to_vec() }));
    assert_eq!(*right, Ok(Mptcp::Prio { backup: false }));
}

#[test]
fn what_is_cut_short_is_the_end() {
    for (hex, message) in [
        ("1e", "the option of kind 30 does not fit into the 1 bytes left"),
        ("1e01", "the option of kind 30 does not fit into the 2 bytes left"),
        ("021e0300", "the option of kind 2 does not fit into the 4 bytes left"),
    ] {
        let mut options = read(&bytes(hex)).collect::<Vec<_>>().into_iter();
        assert_eq!(options.next().unwrap().unwrap_err().to_string(), message, "{hex}");
        assert_eq!(options.next(), None);
    }
    assert_eq!(read(&bytes("001e0350")).count(), 0, "after the end of options");
    assert_eq!(read_header(&[0; 12]).collect::<Vec<_>>(), [Err(Malformed::Header)]);
    let mut header = [0; 20];
    header[12] = 0x60;
    assert_eq!(read_header(&header).collect::<Vec<_>>(), [Err(Malformed::Header)]);
    header[12] = 0x40;
    assert_eq!(read_header(&header).collect::<Vec<_>>(), [Err(Malformed::Header)]);
    header[12] = 0x50;
    assert_eq!(read_header(&header).count(), 0);
}

#[test]
fn what_no_packet_can_carry_is_not_written() {
    let long = Mptcp::RemoveAddr((0..38).map(AddrId).collect());
    assert_eq!(long.to_bytes(), Err(Unwritable::TooLong(41)));
    assert_eq!(Mptcp::RemoveAddr(vec![]).to_bytes(), Err(Unwritable::NothingToRemove));
    let unknown = Mptcp::Unknown { subtype: 16, low: 0, data: vec![] };
    assert_eq!(unknown.to_bytes(), Err(Unwritable::TooLarge(16)));
    let unknown = Mptcp::Unknown { subtype: 15, low: 16, data: vec![] };
    assert_eq!(unknown.to_bytes(), Err(Unwritable::TooLarge(16)));
}

/// What the fuzzer has found worth keeping.
#[test]
fn the_fuzzers_corpus_holds() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/options");
    let mut inputs = 0;
    for file in std::fs::read_dir(corpus).unwrap() {
        holds(&std::fs::read(file.unwrap().path()).unwrap());
        inputs += 1;
    }
    assert!(inputs >= 10, "{inputs} inputs in {corpus}");
}

/// Whatever the bytes: no panic, an end, and what was read is the same after it was written.
fn holds(bytes: &[u8]) {
    let _ = read_header(bytes).count();
    for option in read(bytes).flatten() {
        match option.to_bytes() {
            Ok(written) => assert_eq!(Mptcp::parse(&written), Ok(option)),
            Err(error) => assert!(matches!(error, Unwritable::TooLong(_)), "{option:?}: {error}"),
        }
    }
}

fn number() -> impl Strategy<Value = SequenceNumber> {
    prop_oneof![any::<u32>().prop_map(SequenceNumber::Short), any::<u64>().prop_map(SequenceNumber::Long)]
}

fn keys() -> impl Strategy<Value = CapableKeys> {
    let key = || any::<u64>().prop_map(Key);
    prop_oneof![
        Just(CapableKeys::None),
        key().prop_map(CapableKeys::Sender),
        (key(), key()).prop_map(|(sender, receiver)| CapableKeys::Both { sender, receiver }),
        (key(), key(), any::<u16>(), any::<Option<u16>>()).prop_map(
            |(sender, receiver, length, checksum)| {
                CapableKeys::WithData { sender, receiver, length, checksum }
            }
        ),
    ]
}

fn any_option() -> impl Strategy<Value = Mptcp> {
    let id = || any::<u8>().prop_map(AddrId);
    let mapping = (number(), any::<u32>(), any::<u16>(), any::<Option<u16>>()).prop_map(
        |(data_sequence, subflow_sequence, length, checksum)| Mapping {
            data_sequence,
            subflow_sequence,
            length,
            checksum,
        },
    );
    prop_oneof![
        (0u8..16, any::<u8>(), keys()).prop_map(|(version, flags, keys)| Mptcp::Capable {
            version,
            flags: CapableFlags::from_bits_retain(flags),
            keys,
        }),
        (any::<bool>(), id(), any::<u32>(), any::<u32>()).prop_map(|(backup, id, token, nonce)| {
            Mptcp::JoinSyn { backup, id, token: Token(token), nonce }
        }),
        (any::<bool>(), id(), any::<u64>(), any::<u32>())
            .prop_map(|(backup, id, hmac, nonce)| Mptcp::JoinSynAck { backup, id, hmac, nonce }),
        any::<[u8; 20]>().prop_map(|hmac| Mptcp::JoinAck { hmac }),
        (proptest::option::of(number()), proptest::option::of(mapping), any::<bool>())
            .prop_map(|(ack, mapping, fin)| Mptcp::Dss { ack, mapping, fin }),
        (id(), any::<IpAddr>(), any::<Option<u16>>(), any::<Option<u64>>())
            .prop_map(|(id, ip, port, hmac)| Mptcp::AddAddr { id, ip, port, hmac }),
        proptest::collection::vec(id(), 1..38).prop_map(Mptcp::RemoveAddr),
        any::<bool>().prop_map(|backup| Mptcp::Prio { backup }),
        any::<u64>().prop_map(|data_sequence| Mptcp::Fail { data_sequence }),
        any::<u64>().prop_map(|key| Mptcp::FastClose { key: Key(key) }),
        (any::<bool>(), any::<u8>()).prop_map(|(transient, reason)| Mptcp::Reset { transient, reason }),
        (9u8..16, 0u8..16, proptest::collection::vec(any::<u8>(), 0..38))
            .prop_map(|(subtype, low, data)| Mptcp::Unknown { subtype, low, data }),
    ]
}

proptest! {
    #[test]
    fn an_option_reads_what_it_writes(option in any_option()) {
        let bytes = option.to_bytes().unwrap();
        prop_assert_eq!(usize::from(bytes[1]), bytes.len());
        prop_assert_eq!(Mptcp::parse(&bytes), Ok(option.clone()));
        let padded = [vec![NOP, 8, 4, KIND, KIND], bytes, vec![END]].concat();
        prop_assert_eq!(read(&padded).collect::<Vec<_>>(), [Ok(option)]);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        holds(&bytes);
    }

    #[test]
    fn no_bytes_behind_the_right_kind_and_length_make_the_parser_panic(
        body in proptest::collection::vec(any::<u8>(), 0..39), behind in proptest::collection::vec(any::<u8>(), 0..8),
    ) {
        let head = vec![KIND, body.len() as u8 + 2];
        holds(&[head, body, behind].concat());
    }
}
