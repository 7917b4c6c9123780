//! Verdicts on records that were made up: what each expectation accepts, what it refuses, and what is said of it.

use std::fs::{File, write};

use etherparse::PacketBuilder;
use mptcp::Token;
use mptcp::pm::Event;
use pcap_file::DataLink;
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};

use super::*;
use crate::record::{Seen, StepTimes, SubflowKey, SubflowLook};
use crate::step::Arrival;

const SCENARIO: &str = r#"title = "judged"
[nodes]
left = {}
right = {}
[links.wifi]
a = { node = "left", dev = "wifi", addresses = ["10.0.0.2/24"] }
b = { node = "right", dev = "wifi", addresses = ["10.0.0.1/24"] }
[links.lte]
a = { node = "left", dev = "lte", addresses = ["10.0.1.2/24"] }
b = { node = "right", dev = "lte", addresses = ["10.0.1.1/24"] }
[steps]
get.run = { node = "left", command = ["true"], save = "got" }
short.run = { node = "left", command = ["true"] }
cut.link = { link = "wifi", state = "down" }
side.run = { node = "left", command = ["true"], save = "side" }
tail.wait = { time = "1s" }
pause.wait = { time = "1s" }
put.run = { node = "left", command = ["true"], save = "put" }
hung.run = { node = "left", command = ["true"] }
"#;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn event(kind: EventKind, token: u32, ends: Option<(&str, &str)>) -> Event {
    let [local, remote] = [ends.map(|ends| ends.0), ends.map(|ends| ends.1)]
        .map(|end| end.map(|end| end.parse::<SocketAddr>().unwrap()));
    Event {
        kind,
        token: Some(Token(token)),
        local_id: None,
        remote_id: None,
        local_ip: local.map(|addr| addr.ip()),
        remote_ip: remote.map(|addr| addr.ip()),
        local_port: local.map(|addr| addr.port()),
        remote_port: remote.map(|addr| addr.port()),
        backup: None,
        error: None,
        flags: None,
        timeout: None,
        ifindex: None,
        reset_reason: None,
        reset_flags: None,
        server_side: None,
    }
}

/// Connection 1 begins in `get`, connections 2 and 3 in `put`.
fn record() -> Record {
    use EventKind::{Closed, Created, Established, SubflowEstablished};
    let events = [
        (Created, 1, None),
        (Established, 1, Some(("10.0.0.2:1001", "10.0.0.1:80"))),
        (SubflowEstablished, 1, Some(("10.0.1.2:1002", "10.0.0.1:80"))),
        (Created, 2, None),
        (Closed, 1, None),
        (Established, 2, Some(("10.0.0.2:1003", "10.0.0.1:80"))),
        (SubflowEstablished, 2, Some(("10.0.1.2:1004", "10.0.1.1:80"))),
        (SubflowEstablished, 2, Some(("10.0.1.2:1005", "10.0.1.1:81"))),
        (Created, 3, None),
        (Established, 3, Some(("10.0.0.2:1006", "10.0.1.1:80"))),
    ];
    let seen = |(kind, token, ends)| Seen { at: ms(0), node: "left".into(), event: event(kind, token, ends) };
    let mut events: Vec<Seen> = events.into_iter().map(seen).collect();
    // A node's token means nothing in another one.
    events.push(Seen { at: ms(0), node: "right".into(), event: event(Created, 1, None) });
    // Each step: its name, first and last event, and what it found on both links at its two ends.
    let steps = [
        ("get", (1000, 3000), (0, 3), [[0, 0], [0, 0]], [[200, 400], [50, 150]]),
        ("short", (1200, 1400), (0, 0), [[0, 0], [0, 0]], [[0, 0], [0, 0]]),
        ("cut", (1500, 2500), (0, 3), [[0, 0], [0, 0]], [[150, 250], [0, 50]]),
        ("side", (2000, 4000), (3, 3), [[100, 200], [0, 0]], [[300, 400], [0, 300]]),
        ("tail", (3500, 4000), (3, 3), [[0, 0], [0, 0]], [[0, 0], [0, 0]]),
        ("pause", (4000, 5000), (3, 3), [[300, 400], [0, 300]], [[1000, 1000], [1000, 1000]]),
        ("put", (5000, 6000), (3, 11), [[1000, 1000], [1000, 1000]], [[1000, 1000], [1000, 1000]]),
    ];
    let mut steps: Vec<StepTimes> = steps
        .into_iter()
        .map(|(name, (began, ended), events, before, after)| StepTimes {
            name: name.into(),
            began: ms(began),
            ended: Some(ms(ended)),
            events: (events.0, Some(events.1)),
            bytes: (before.to_vec(), Some(after.to_vec())),
        })
        .collect();
    let never = StepTimes { name: "hung".into(), ended: None, events: (11, None), ..steps[6].clone() };
    steps.push(StepTimes { bytes: (never.bytes.0.clone(), None), ..never });
    // What was found at each look; that of 4.5 s is in the pause.
    type Looks<'a> = &'a [(u64, [u64; 2])];
    let subflows: [(_, _, _, _, Looks<'_>); 5] = [
        ("left", 1, "10.0.0.2:1001", "10.0.0.1:80", &[(500, [10, 20]), (3000, [110, 220])]),
        ("left", 2, "10.0.0.2:1003", "10.0.0.1:80", &[(2500, [1, 2]), (4500, [51, 52]), (5500, [52, 54])]),
        ("left", 1, "10.0.0.2:1001", "10.0.0.1:443", &[(3000, [5, 5])]),
        ("left", 3, "127.0.0.1:1009", "127.0.0.1:80", &[(3000, [9, 9])]),
        ("right", 1, "10.0.0.2:1001", "10.0.0.1:80", &[(2000, [7, 0])]),
    ];
    let subflow = |(node, token, local, remote, looks): (&str, _, &str, &str, Looks<'_>)| {
        let [local, remote] = [local, remote].map(|end| end.parse().unwrap());
        let key = SubflowKey { node: node.into(), token: Token(token), local, remote };
        (key, looks.iter().map(|(at, bytes)| SubflowLook { at: ms(*at), bytes: *bytes }).collect())
    };
    // Of the wifi link; after `cut` it had carried 400 bytes.
    let samples = [(2400, 100_000), (2600, 400 + DATA - 1), (2700, 400 + DATA), (2800, 400 + 2 * DATA)];
    let sample =
        |(at, bytes): (u64, u64)| Sample { at: ms(at), bytes: vec![[150, bytes - 150], [0, 50 + DATA / 2]] };
    Record {
        began: Duration::from_secs(1000),
        events,
        overrun: false,
        links: vec!["wifi".into(), "lte".into()],
        samples: samples.into_iter().map(sample).collect(),
        steps,
        subflows: subflows.into_iter().map(subflow).collect(),
    }
}

fn outcome() -> Outcome {
    let gaps = vec![(ms(1400), ms(1800)), (ms(2000), ms(2400)), (ms(2600), ms(3000))];
    let arrivals = [
        ("get", Arrival { bytes: 10, stall: ms(500), gaps }),
        ("side", Arrival { bytes: 10, stall: ms(2000), gaps: vec![(ms(2000), ms(2350))] }),
        ("put", Arrival { bytes: 0, stall: ms(0), gaps: Vec::new() }),
    ];
    Outcome {
        arrivals: arrivals.map(|(name, arrival)| (name.into(), arrival)).into(),
        answers: [("it".into(), ("all well".into(), true))].into(),
        ..Outcome::default()
    }
}

/// A capture of both links.
fn capture(path: &Path) {
    type End = ([u8; 4], u16);
    let (wifi, lte): (End, End) = (([10, 0, 0, 2], 1001), ([10, 0, 1, 2], 1002));
    let (none, prio): (&[u8], &[u8]) = (&[], &[30, 3, 0x51, 1]);
    let packets = [
        (900, lte, true, 100, none),
        (1000, wifi, true, 1500, none),
        (1900, wifi, false, 500, none),
        (1950, lte, true, 0, none),
        (2000, lte, true, 0, prio),
        (3000, wifi, false, 501, none),
        (3500, lte, true, 1000, none),
        (3600, lte, true, 0, prio),
        (3800, lte, false, 1001, none),
        (4100, wifi, false, 1, none),
    ];
    let header = PcapHeader { datalink: DataLink::RAW, ..PcapHeader::default() };
    let mut file = PcapWriter::with_header(File::create(path).unwrap(), header).unwrap();
    for (at, (ip, port), there, payload, options) in packets {
        let builder = match there {
            true => PacketBuilder::ipv4(ip, [10, 0, 0, 1], 64).tcp(port, 80, 1, 100),
            false => PacketBuilder::ipv4([10, 0, 0, 1], ip, 64).tcp(80, port, 1, 100),
        };
        let mut bytes = Vec::new();
        builder.options_raw(options).unwrap().write(&mut bytes, &vec![0; payload]).unwrap();
        let packet = PcapPacket::new_owned(Duration::from_secs(1000) + ms(at), bytes.len() as u32, bytes);
        file.write_packet(&packet).unwrap();
    }
}

fn scenario(expectation: &str) -> Scenario {
    let text = format!("{SCENARIO}[expect]\n{expectation}");
    Scenario::parse("judged", "judged.toml", &text, None).unwrap()
}

/// An expectation, what is expected in words, what was seen, and whether that is right.
const VERDICTS: &[(&str, &str, &str, bool)] = &[
    (
        r#"events = { node = "left", count = { CREATED = 3, SF_ESTABLISHED = 3 }, at_least = { CLOSED = 1 } }"#,
        "CREATED 3, SF_ESTABLISHED 3, CLOSED ≥ 1",
        "CREATED 3, SF_ESTABLISHED 3, CLOSED 1",
        true,
    ),
    (
        r#"events = { node = "left", count = { CREATED = 2, CLOSED = 1 } }"#,
        "CREATED 2, CLOSED 1",
        "CREATED 3, CLOSED 1",
        false,
    ),
    (r#"events = { node = "left", at_least = { CREATED = 4 } }"#, "CREATED ≥ 4", "CREATED 3", false),
    (r#"events = { node = "left", at_least = { CREATED = 2 } }"#, "CREATED ≥ 2", "CREATED 3", true),
    (
        r#"events = { node = "left", during = "put", count = { CREATED = 2, SF_ESTABLISHED = 2, CLOSED = 0 } }"#,
        "CREATED 2, SF_ESTABLISHED 2, CLOSED 0",
        "CREATED 2, SF_ESTABLISHED 2, CLOSED 0",
        true,
    ),
    (
        r#"subflows = { node = "left", during = "get", pairs = ["10.0.0.2 -> 10.0.0.1:80", "10.0.1.2 -> 10.0.0.1"] }"#,
        "10.0.0.2 -> 10.0.0.1:80, 10.0.1.2 -> 10.0.0.1",
        "these, in 1 connection",
        true,
    ),
    (
        r#"subflows = { node = "left", during = "get", pairs = ["10.0.0.2 -> 10.0.0.1:80"] }"#,
        "10.0.0.2 -> 10.0.0.1:80",
        "10.0.0.2 -> 10.0.0.1:80, 10.0.1.2 -> 10.0.0.1:80",
        false,
    ),
    (
        r#"subflows = { node = "left", during = "get", pairs = ["10.0.0.2 -> 10.0.0.1", "10.0.1.2 -> 10.0.0.1", "10.0.1.2 -> 10.0.1.1"] }"#,
        "10.0.0.2 -> 10.0.0.1, 10.0.1.2 -> 10.0.0.1, 10.0.1.2 -> 10.0.1.1",
        "10.0.0.2 -> 10.0.0.1:80, 10.0.1.2 -> 10.0.0.1:80",
        false,
    ),
    (
        r#"subflows = { node = "left", during = "side", pairs = ["10.0.0.2 -> 10.0.0.1"] }"#,
        "10.0.0.2 -> 10.0.0.1",
        "no connection",
        false,
    ),
    (
        r#"subflows = { node = "right", pairs = ["10.0.0.2 -> 10.0.0.1"] }"#,
        "10.0.0.2 -> 10.0.0.1",
        "a connection that is not MPTCP",
        false,
    ),
    (
        r#"flows = { node = "left", during = "get", to = ["10.0.0.1:80"], same = true, every = true, from = ["10.0.0.2", "10.0.1.2"] }"#,
        "all from 10.0.0.2 and 10.0.1.2 to 10.0.0.1:80 (the same for all of a connection)",
        "10.0.0.2 -> 10.0.0.1:80 (1), 10.0.1.2 -> 10.0.0.1:80 (1)",
        true,
    ),
    (
        r#"flows = { node = "left", which = "first", to = ["10.0.0.1:80", "10.0.1.1:80"] }"#,
        "the first to 10.0.0.1:80 or 10.0.1.1:80",
        "10.0.0.2 -> 10.0.0.1:80 (2), 10.0.0.2 -> 10.0.1.1:80 (1)",
        true,
    ),
    (
        r#"flows = { node = "left", which = "first", to = ["10.0.0.1:80"] }"#,
        "the first to 10.0.0.1:80",
        "a connection with 10.0.0.2 -> 10.0.1.1:80",
        false,
    ),
    (
        r#"flows = { node = "left", which = "first", from = ["10.0.1.2"] }"#,
        "the first from 10.0.1.2",
        "a connection with 10.0.0.2 -> 10.0.0.1:80",
        false,
    ),
    (
        r#"flows = { node = "left", which = "first", to = ["10.0.0.1:80", "10.0.1.1:80", "10.0.1.1:99"], every = true }"#,
        "the first to 10.0.0.1:80 and 10.0.1.1:80 and 10.0.1.1:99",
        "none to 10.0.1.1:99, in 3 connections",
        false,
    ),
    (
        r#"flows = { node = "left", during = "put", which = "added", to = ["10.0.1.1:80", "10.0.1.1:81"], same = true }"#,
        "added ones to 10.0.1.1:80 or 10.0.1.1:81 (the same for all of a connection)",
        "a connection with 10.0.1.2 -> 10.0.1.1:80, 10.0.1.2 -> 10.0.1.1:81",
        false,
    ),
    (
        r#"flows = { node = "left", during = "put", which = "added", to = ["10.0.1.1:80", "10.0.1.1:81"] }"#,
        "added ones to 10.0.1.1:80 or 10.0.1.1:81",
        "a connection with none",
        false,
    ),
    (
        r#"flows = { node = "left", during = "side", to = ["10.0.0.1:80"] }"#,
        "all to 10.0.0.1:80",
        "no connection",
        false,
    ),
    (r#"command = { node = "left", command = ["true"], expected = "well" }"#, "well", "all well", true),
    (
        r#"share = { during = "get", at_least = { wifi = "75%", lte = "25%" } }"#,
        "wifi ≥ 75%, lte ≥ 25%",
        "wifi 75%, lte 25%",
        true,
    ),
    (
        r#"share = { during = "get", at_least = { wifi = "76%", lte = "1%" } }"#,
        "wifi ≥ 76%, lte ≥ 1%",
        "wifi 75%, lte 25%",
        false,
    ),
    (
        r#"share = { during = "side", at_least = { lte = "1%", wifi = "1%" } }"#,
        "lte ≥ 1%, wifi ≥ 1%",
        "lte 43%, wifi 57%",
        true,
    ),
    (
        r#"share = { during = "put", at_least = { wifi = "0%", lte = "0%" } }"#,
        "wifi ≥ 0%, lte ≥ 0%",
        "nothing was carried",
        false,
    ),
    (
        r#"share = { during = "hung", at_least = { wifi = "0%", lte = "0%" } }"#,
        "wifi ≥ 0%, lte ≥ 0%",
        "the step did not come to its end",
        false,
    ),
    (r#"same = { files = ["a", "b"] }"#, "equal SHA-256 of a, b", "7692c3ad3540…, 3 bytes", true),
    (
        r#"same = { files = ["a", "b", "c"] }"#,
        "equal SHA-256 of a, b, c",
        "a 7692c3ad3540… (3 bytes), b 7692c3ad3540… (3 bytes), c 8b5b9db0c13d… (5 bytes)",
        false,
    ),
    (
        r#"same = { files = ["a", "d"] }"#,
        "equal SHA-256 of a, d",
        "sha256sum: d: No such file or directory",
        false,
    ),
    (r#"stall = { step = "get" }"#, "any", "500 ms without a byte", true),
    (r#"stall = { step = "get", at_most = "500ms" }"#, "≤ 500 ms", "500 ms without a byte", true),
    (r#"stall = { step = "get", at_most = "499ms" }"#, "≤ 499 ms", "500 ms without a byte", false),
    (
        r#"stall = { step = "get", at_most_of = { step = "side", share = "25%" } }"#,
        "≤ 25% of side's",
        "500 ms without a byte: 25% of 2000 ms",
        true,
    ),
    (
        r#"stall = { step = "get", at_most_of = { step = "side", share = "24%" } }"#,
        "≤ 24% of side's",
        "500 ms without a byte: 25% of 2000 ms",
        false,
    ),
    (
        r#"stall = { step = "get", at_most = "499ms", at_most_of = { step = "side", share = "25%" } }"#,
        "≤ 499 ms, ≤ 25% of side's",
        "500 ms without a byte: 25% of 2000 ms",
        false,
    ),
    (
        r#"stall = { step = "get", at_most_of = { step = "put", share = "25%" } }"#,
        "≤ 25% of put's",
        "nothing of put arrived",
        false,
    ),
    (r#"stall = { step = "put" }"#, "any", "nothing of put arrived", false),
    (
        r#"stall = { step = "get", during = "cut", at_most = "700ms" }"#,
        "≤ 700 ms during cut",
        "700 ms without a byte (300 + 400)",
        true,
    ),
    (r#"stall = { step = "get", during = "short" }"#, "any during short", "0 ms without a byte", true),
    (r#"stall = { step = "side", during = "cut" }"#, "any during cut", "350 ms without a byte", true),
    (
        r#"stall = { step = "get", during = "hung" }"#,
        "any during hung",
        "the step did not come to its end",
        false,
    ),
    (r#"resumed = { link = "wifi", after = "cut" }"#, "wifi carries data after cut", "after 200 ms", true),
    (
        r#"resumed = { link = "wifi", after = "cut", at_most = "200ms" }"#,
        "wifi carries data after cut in ≤ 200 ms",
        "after 200 ms",
        true,
    ),
    (
        r#"resumed = { link = "wifi", after = "cut", at_most = "199ms" }"#,
        "wifi carries data after cut in ≤ 199 ms",
        "after 200 ms",
        false,
    ),
    (r#"resumed = { link = "lte", after = "cut" }"#, "lte carries data after cut", "not again", true),
    (
        r#"resumed = { link = "lte", after = "cut", at_most = "1min" }"#,
        "lte carries data after cut in ≤ 60000 ms",
        "not again",
        false,
    ),
    (
        r#"resumed = { link = "lte", after = "hung" }"#,
        "lte carries data after hung",
        "the step did not come to its end",
        false,
    ),
    (
        r#"carried = { capture = "pcap", during = "get", only = ["10.0.0.2 -> 10.0.0.1:80"] }"#,
        "data only on 10.0.0.2 -> 10.0.0.1:80",
        "2 kB there, 2 kB back",
        true,
    ),
    (
        r#"carried = { capture = "pcap", during = "get", only = ["10.0.0.2 -> 10.0.0.1", "10.0.1.2 -> 10.0.0.1"] }"#,
        "data only on 10.0.0.2 -> 10.0.0.1, 10.0.1.2 -> 10.0.0.1",
        "2 kB there, 2 kB back, 0 kB there, 0 kB back",
        false,
    ),
    (
        r#"carried = { capture = "pcap", during = "side", only = ["10.0.0.2 -> 10.0.0.1", "10.0.1.2 -> 10.0.0.1"] }"#,
        "data only on 10.0.0.2 -> 10.0.0.1, 10.0.1.2 -> 10.0.0.1",
        "0 kB there, 1 kB back, 1 kB there, 2 kB back",
        true,
    ),
    (
        r#"carried = { capture = "pcap", during = "side", only = ["10.0.0.2 -> 10.0.0.1"] }"#,
        "data only on 10.0.0.2 -> 10.0.0.1",
        "0 kB there, 1 kB back, 1 kB on 10.0.1.2:1002 -> 10.0.0.1:80, 2 kB on 10.0.0.1:80 -> 10.0.1.2:1002",
        false,
    ),
    (
        r#"carried = { capture = "pcap", during = "hung", only = ["10.0.0.2 -> 10.0.0.1"] }"#,
        "data only on 10.0.0.2 -> 10.0.0.1",
        "the step did not come to its end",
        false,
    ),
    (
        r#"handover = { capture = "pcap", during = "get", from = "10.0.0.2 -> 10.0.0.1", to = "10.0.1.2 -> 10.0.0.1" }"#,
        "data move to 10.0.1.2 -> 10.0.0.1",
        "from MP_PRIO on: first data there after 1500.0 ms, last on the old one after 1000.0 ms",
        true,
    ),
    (
        r#"handover = { capture = "pcap", during = "cut", from = "10.0.0.2 -> 10.0.0.1", to = "10.0.1.2 -> 10.0.0.1" }"#,
        "data move to 10.0.1.2 -> 10.0.0.1",
        "from MP_PRIO on: first data there after 1500.0 ms, none on the old one",
        true,
    ),
    (
        r#"handover = { capture = "pcap", during = "tail", from = "10.0.1.2 -> 10.0.0.1", to = "10.0.0.2 -> 10.0.0.1" }"#,
        "data move to 10.0.0.2 -> 10.0.0.1",
        "from MP_PRIO on: first data there after 500.0 ms, last on the old one after 200.0 ms",
        true,
    ),
    (
        r#"handover = { capture = "pcap", during = "get", from = "10.0.1.2 -> 10.0.0.1", to = "10.0.0.2 -> 10.0.0.1" }"#,
        "data move to 10.0.0.2 -> 10.0.0.1",
        "data were not on the old path before",
        false,
    ),
    (
        r#"handover = { capture = "pcap", during = "get", from = "10.0.0.2 -> 10.0.0.1", to = "10.0.0.2 -> 10.0.1.1" }"#,
        "data move to 10.0.0.2 -> 10.0.1.1",
        "no data on the new path",
        false,
    ),
    (
        r#"handover = { capture = "pcap", during = "pause", from = "10.0.0.2 -> 10.0.0.1", to = "10.0.1.2 -> 10.0.0.1" }"#,
        "data move to 10.0.1.2 -> 10.0.0.1",
        "no MP_PRIO",
        false,
    ),
];

#[test]
fn every_expectation_is_judged_by_what_was_recorded() {
    let work = tempfile::tempdir().unwrap();
    for (file, text) in [("a", "one"), ("b", "one"), ("c", "three")] {
        write(work.path().join(file), text).unwrap();
    }
    capture(&work.path().join("pcap"));
    for (expectation, expected, seen, pass) in VERDICTS {
        let verdict = judge(&scenario(&format!("it.{expectation}")), &record(), &outcome(), work.path());
        let [row] = &verdict.rows[..] else { panic!("{:?}", verdict.rows) };
        assert_eq!(
            (row.expected.as_str(), row.seen.as_str(), row.pass),
            (*expected, *seen, *pass),
            "{expectation}"
        );
        assert_eq!(verdict.pass, *pass);
    }
}

#[test]
fn programs_and_steps_that_fail_and_lost_events_fail_the_scenario() {
    let (work, scenario) = (Path::new("/nowhere"), scenario("it.stall = { step = \"get\" }"));
    let exits = vec![
        ("get".into(), 0, Ok(0)),
        ("side".into(), 7, Ok(7)),
        ("put".into(), 0, Err("killed by signal 9".into())),
    ];
    let failure = Some(("cut".into(), "no link".into()));
    let record = Record { overrun: true, ..record() };
    let verdict = judge(&scenario, &record, &Outcome { exits, failure, ..outcome() }, work);
    let rows: Vec<_> = verdict
        .rows
        .iter()
        .map(|row| (row.name.as_str(), row.expected.as_str(), row.seen.as_str(), row.pass))
        .collect();
    let expected = [
        ("get", "exit code 0", "exit code 0", true),
        ("side", "exit code 7", "exit code 7", true),
        ("put", "exit code 0", "killed by signal 9", false),
        ("cut", "done", "no link", false),
        ("recording", "all events", "some were lost: the socket's buffer overran", false),
        ("it", "any", "500 ms without a byte", true),
    ];
    assert_eq!(rows, expected);
    assert_eq!((verdict.pass, verdict.scenario.as_str()), (false, "judged"));
}

#[test]
fn a_question_that_nobody_asked_is_not_answered_well() {
    let scenario = scenario("it.command = { node = \"left\", command = [\"true\"], expected = \"well\" }");
    let verdict = judge(&scenario, &record(), &Outcome::default(), Path::new("/nowhere"));
    assert_eq!((verdict.rows[0].seen.as_str(), verdict.pass), ("not asked", false));
}

#[test]
fn events_are_waited_for_as_long_as_a_connection_is_open() {
    let none_open = |mut record: Record| {
        for token in 1..=3 {
            for node in ["left", "right"] {
                let event = event(EventKind::Closed, token, None);
                record.events.push(Seen { at: ms(0), node: node.into(), event });
            }
        }
        record
    };
    for (expectation, while_open) in [
        ("it.events = { node = \"left\", count = { CREATED = 3 } }", true),
        ("it.events = { node = \"left\", count = { CREATED = 4 } }", false),
        ("it.stall = { step = \"get\" }", true),
    ] {
        assert_eq!(has_settled(&scenario(expectation), &record()), while_open, "{expectation}");
        assert!(has_settled(&scenario(expectation), &none_open(record())), "{expectation}");
    }
}

/// Programs ran from 1 s to 4 s, some side by side, and from 5 s to 6 s.
#[test]
fn links_and_subflows_have_what_they_carried_while_programs_ran_and_each_node_its_own() {
    let verdict =
        judge(&scenario("it.stall = { step = \"get\" }"), &record(), &outcome(), Path::new("/nowhere"));
    assert_eq!(verdict.program_seconds, 4.0);
    assert!(verdict.paths.iter().all(|link| [link.a.as_str(), &link.b] == ["left", "right"]));
    let paths: Vec<_> = verdict
        .paths
        .iter()
        .map(|path| (path.link.as_str(), path.a_to_b_bytes, path.b_to_a_bytes, path.bits_per_second))
        .collect();
    assert_eq!(paths, [("wifi", 300, 400, 1400.0), ("lte", 0, 300, 600.0)]);
    let subflows: Vec<_> = verdict
        .subflows
        .iter()
        .map(|row| (row.node.as_str(), row.subflow.as_str(), row.sent, row.received, row.bits_per_second))
        .collect();
    let expected = [
        ("left", "10.0.0.2 -> 10.0.0.1:443", 5, 5, 20.0),
        ("left", "10.0.0.2 -> 10.0.0.1:80", 102, 204, 612.0),
        ("right", "10.0.0.2 -> 10.0.0.1:80", 7, 0, 14.0),
    ];
    assert_eq!(subflows, expected);
}
