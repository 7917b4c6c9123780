//! Links of every kind with real traffic. No assertion here gets harder to meet on a busy machine.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use lab::link::{End, Error, Link, Shape};
use mptcp::Netns;

/// Two namespaces with a link between them and addresses on it.
struct Pair {
    link: Link,
    a: Netns,
    b: Netns,
}

impl Pair {
    fn new(shape: &Shape) -> Pair {
        let pair = Pair::with_ipv6(shape, true);
        ip(&pair.a, "addr add fd09::1/64 dev eth0 nodad");
        ip(&pair.b, "addr add fd09::2/64 dev eth0 nodad");
        pair
    }

    /// Nothing but what a test sends: no neighbour discovery, no multicast reports.
    fn quiet(shape: &Shape) -> Pair {
        let pair = Pair::with_ipv6(shape, false);
        let mac = |netns| ip(netns, "-br link show dev eth0").split_whitespace().nth(2).unwrap().to_string();
        for (netns, peer, address) in [(&pair.a, &pair.b, "10.9.0.2"), (&pair.b, &pair.a, "10.9.0.1")] {
            ip(netns, &format!("neigh replace {address} lladdr {} dev eth0 nud permanent", mac(peer)));
        }
        pair
    }

    fn with_ipv6(shape: &Shape, ipv6: bool) -> Pair {
        let (a, b) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        for netns in [&a, &b] {
            let disable = if ipv6 { "0" } else { "1" };
            mptcp::sysctl::set(netns, "net.ipv6.conf.default.disable_ipv6", disable).unwrap();
        }
        let ends = [&a, &b].map(|netns| End { netns, ifname: "eth0" });
        let link = Link::create(ends[0], ends[1], shape).unwrap();
        ip(&a, "addr add 10.9.0.1/24 dev eth0");
        ip(&b, "addr add 10.9.0.2/24 dev eth0");
        Pair { link, a, b }
    }

    /// A UDP socket at each end, the one at a connected to the one at b.
    fn udp(&self, a: &str, b: &str) -> (UdpSocket, UdpSocket) {
        let at_a = self.a.run(|| UdpSocket::bind(a)).unwrap().unwrap();
        let at_b = self.b.run(|| UdpSocket::bind(b)).unwrap().unwrap();
        at_a.connect(at_b.local_addr().unwrap()).unwrap();
        for socket in [&at_a, &at_b] {
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
        }
        (at_a, at_b)
    }

    fn udp4(&self) -> (UdpSocket, UdpSocket) {
        self.udp("10.9.0.1:0", "10.9.0.2:0")
    }

    fn has_carrier(&self) -> [bool; 2] {
        [&self.a, &self.b].map(|netns| ip(netns, "link show dev eth0").contains("LOWER_UP"))
    }
}

#[test]
fn a_new_link_of_any_kind_carries_ipv4_and_ipv6_at_once() {
    for shape in [plain(), rate(), emulated()] {
        let pair = Pair::new(&shape);
        for (a, b) in [("10.9.0.1:0", "10.9.0.2:0"), ("[fd09::1]:0", "[fd09::2]:0")] {
            let (at_a, at_b) = pair.udp(a, b);
            round_trip(&at_a, &at_b);
        }
        assert_eq!(pair.link.shape(), shape);
    }
}

#[test]
fn only_delay_jitter_and_loss_ever_need_the_emulator() {
    for shape in [plain(), rate()] {
        assert!(!Pair::new(&shape).link.is_emulated());
    }
}

#[test]
fn a_round_trip_is_never_shorter_than_the_delays() {
    let shape = Shape { delay: ms(20), jitter: ms(5), ..plain() };
    let pair = Pair::new(&shape);
    let (at_a, at_b) = pair.udp4();
    for _ in 0..20 {
        let time = round_trip(&at_a, &at_b);
        assert!(time >= Duration::from_millis(30), "{time:?}");
    }
    pair.link.set_shape(&Shape { delay: ms(50), ..plain() }).unwrap();
    let time = round_trip(&at_a, &at_b);
    assert!(time >= Duration::from_millis(100), "{time:?}");
}

#[test]
fn bulk_tcp_arrives_whole_and_never_faster_than_the_rate() {
    for shape in
        [rate(), Shape { delay: ms(5), ..rate() }, Shape { loss: Some(0.01), delay: ms(1), ..rate() }]
    {
        let pair = Pair::new(&shape);
        // Some bytes arrive before the rate changes, most after.
        transfer(&pair, 200_000);
        let before = pair.link.counters().unwrap();
        pair.link.set_shape(&shape.changed_by(&Shape { rate: Some(40_000_000), ..plain() })).unwrap();
        transfer(&pair, 3_000_000);
        let after = pair.link.counters().unwrap();

        assert!(after.a_to_b_bytes >= 3_200_000, "{after:?}");
        // tbf lets a bucket through at once (two frames, or what 2 ms bring) and is exact to a tick; and what the first
        // rate had queued may come after the change.
        let queue = 20e6 / 8.0 * 0.06;
        let most = 40e6 / 8.0 * (after.at - before.at).as_secs_f64() + queue + 10_000.0;
        assert!(((after.a_to_b_bytes - before.a_to_b_bytes) as f64) < most, "{before:?} {after:?}");
        let most = 20e6 / 8.0 * before.at.as_secs_f64() + 10_000.0;
        assert!((before.a_to_b_bytes as f64) < most, "{before:?}");
    }
}

#[test]
fn frames_arrive_in_order_and_those_that_do_not_are_counted() {
    const FRAMES: u64 = 3000;
    let shape = Shape { delay: ms(3), jitter: ms(3), loss: Some(0.1), ..plain() };
    let pair = Pair::quiet(&shape);
    let (at_a, at_b) = pair.udp4();
    let mut numbers = Vec::new();
    at_b.set_nonblocking(true).unwrap();
    let mut lost = 0;
    let mut at_most_outstanding = |most: u64, sent: u64| {
        let mut number = [0; 8];
        while at_b.recv(&mut number).is_ok() {
            numbers.push(u64::from_ne_bytes(number));
        }
        // Asked only when it matters: with the kernel's own netem it takes two processes.
        if sent - numbers.len() as u64 - lost > most {
            lost = pair.link.drops().unwrap().a_to_b;
        }
        sent - numbers.len() as u64 - lost <= most
    };
    for number in 0..FRAMES {
        // No more than the receiver's buffer holds.
        wait_until("there is room for a frame", || at_most_outstanding(99, number));
        at_a.send(&number.to_ne_bytes()).unwrap();
    }
    wait_until("every frame has arrived or is counted as lost", || at_most_outstanding(0, FRAMES));
    assert!(numbers.is_sorted());
    // 300 expected, sigma 16.4.
    assert!((200..400).contains(&lost), "{lost}");
    // Ethernet, IPv4 and UDP headers and eight bytes.
    let arrived = pair.link.counters().unwrap().a_to_b_bytes;
    assert_eq!(arrived, numbers.len() as u64 * (14 + 20 + 8 + 8));
}

#[test]
fn a_full_queue_drops_and_counts() {
    const FRAMES: u64 = 200;
    for shape in [rate(), Shape { delay: ms(0), ..rate() }] {
        // 25 bytes a millisecond: a frame of 1042 bytes takes 42 ms, twelve of them fit in half a second.
        let shape = Shape { rate: Some(200_000), queue: ms(500), ..shape };
        let pair = Pair::quiet(&shape);
        let (at_a, at_b) = pair.udp4();
        round_trip(&at_a, &at_b);
        for _ in 0..FRAMES {
            at_a.send(&[0; 1000]).unwrap();
        }
        let drops = || pair.link.drops().unwrap().a_to_b;
        wait_until("frames that do not fit are dropped", || drops() > 0);
        let mut arrived = 0;
        while arrived + drops() < FRAMES {
            at_b.recv(&mut [0; 2000]).unwrap();
            arrived += 1;
        }
        assert_eq!(arrived + drops(), FRAMES);
        assert!(arrived >= 12, "{arrived}");
    }
}

#[test]
fn a_black_hole_is_silent_and_passes() {
    for shape in [plain(), rate(), emulated()] {
        let pair = Pair::new(&shape);
        let (at_a, at_b) = pair.udp4();
        round_trip(&at_a, &at_b);
        let drops = pair.link.drops().unwrap();

        pair.link.set_blackhole(true).unwrap();
        let before = pair.link.counters().unwrap();
        // A change of shape does not open it.
        pair.link.set_shape(&shape).unwrap();
        for _ in 0..10 {
            at_a.send(b"lost").unwrap();
        }
        wait_until("frames vanish", || pair.link.drops().unwrap().a_to_b >= drops.a_to_b + 10);
        assert_eq!(pair.has_carrier(), [true, true]);
        let during = pair.link.counters().unwrap();
        assert_eq!(during.a_to_b_bytes, before.a_to_b_bytes);
        assert_eq!(during.b_to_a_bytes, before.b_to_a_bytes);

        pair.link.set_blackhole(false).unwrap();
        round_trip(&at_a, &at_b);
        // The count outlives the change.
        assert!(pair.link.drops().unwrap().a_to_b >= drops.a_to_b + 10);
    }
}

#[test]
fn taking_an_end_down_takes_the_carrier_of_the_other() {
    for shape in [plain(), rate(), emulated()] {
        let pair = Pair::new(&shape);
        let (at_a, at_b) = pair.udp4();
        round_trip(&at_a, &at_b);

        pair.link.set_down(true).unwrap();
        assert_eq!(pair.has_carrier(), [false, false]);
        assert!(at_a.send(b"no route").is_err());
        pair.link.set_down(false).unwrap();
        assert_eq!(pair.has_carrier(), [true, true]);
        round_trip(&at_a, &at_b);

        // Somebody inside does it, at the other end.
        ip(&pair.b, "link set dev eth0 down");
        wait_until("a has lost its carrier", || !pair.has_carrier()[0]);
        ip(&pair.b, "link set dev eth0 up");
        wait_until("a has its carrier again", || pair.has_carrier() == [true, true]);
        round_trip(&at_a, &at_b);
    }
}

#[test]
fn a_dropped_link_leaves_no_interface_and_its_names_are_free_again() {
    for shape in [plain(), emulated()] {
        let Pair { link, a, b } = Pair::new(&shape);
        drop(link);
        for netns in [&a, &b] {
            assert!(!ip(netns, "link show").contains("eth0"));
        }
        let ends = [&a, &b].map(|netns| End { netns, ifname: "eth0" });
        Link::create(ends[0], ends[1], &shape).unwrap();
    }
}

#[test]
fn a_link_that_cannot_be_is_refused_and_leaves_nothing() {
    let (a, b) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let create = |ifname, shape: &Shape| {
        Link::create(End { netns: &a, ifname }, End { netns: &b, ifname: "eth0" }, shape).map(drop)
    };
    let error = create("eth0", &Shape { rate: Some(0), ..plain() }).unwrap_err();
    assert!(matches!(&error, Error::Refused { link, .. } if link == "eth0"), "{error}");
    for name in ["", "eth 0", "sixteen-bytes-xx", "a/b", "-h"] {
        assert!(
            create(name, &plain()).unwrap_err().to_string().contains("no name for an interface"),
            "{name}"
        );
    }
    ip(&b, "link add name eth0 type veth peer name other");
    for shape in [plain(), rate(), emulated()] {
        let error = create("eth0", &shape).unwrap_err().to_string();
        assert!(error.contains("eth0") && error.contains("File exists"), "{error}");
        assert!(!ip(&a, "link show").contains("eth0"));
    }
}

#[test]
fn a_plain_link_gets_a_delay_only_from_a_kernel_that_has_netem() {
    let pair = Pair::new(&rate());
    let (at_a, at_b) = pair.udp4();
    let delayed = Shape { delay: ms(10), ..rate() };
    match pair.link.set_shape(&delayed) {
        Ok(()) => {
            round_trip(&at_a, &at_b);
            assert!(round_trip(&at_a, &at_b) >= Duration::from_millis(20));
        }
        Err(error) => {
            assert!(error.to_string().contains("\"0ms\""), "{error}");
            assert_eq!(pair.link.shape(), rate());
            round_trip(&at_a, &at_b);
        }
    }
}

/// How long to wait for what must come, on the busiest machine.
const DEADLINE: Duration = Duration::from_secs(30);

fn ms(n: u64) -> Option<Duration> {
    Some(Duration::from_millis(n))
}

fn plain() -> Shape {
    Shape::default()
}

fn rate() -> Shape {
    Shape { rate: Some(20_000_000), ..plain() }
}

fn emulated() -> Shape {
    Shape { delay: ms(2), ..rate() }
}

fn ip(netns: &Netns, arguments: &str) -> String {
    let mut command = Command::new("ip");
    command.args(arguments.split(' '));
    netns.enter_on_exec(&mut command);
    let output = command.output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Sends a datagram to b and back; the time that takes.
fn round_trip(at_a: &UdpSocket, at_b: &UdpSocket) -> Duration {
    let mut buffer = [0; 100];
    let start = Instant::now();
    at_a.send(b"there").unwrap();
    let (length, from) = at_b.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"there");
    at_b.send_to(b"back", from).unwrap();
    let length = at_a.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"back");
    start.elapsed()
}

/// Sends `bytes` from a to b over TCP and compares what arrives.
fn transfer(pair: &Pair, bytes: usize) {
    let sent: Vec<u8> = (0..bytes).map(|n| (n / 251) as u8 ^ n as u8).collect();
    let listener = pair.b.run(|| TcpListener::bind("10.9.0.2:0")).unwrap().unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = pair.a.run(|| TcpStream::connect(address)).unwrap().unwrap();
            stream.write_all(&sent).unwrap();
        });
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        assert!(received == sent, "{} of {} bytes, or other ones", received.len(), sent.len());
    });
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not before the deadline: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
