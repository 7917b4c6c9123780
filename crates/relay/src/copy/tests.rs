//! The byte path between real sockets on the loopback interface, for each pair of protocols.

use std::net::SocketAddr;
use std::sync::Arc;

use mptcp::socket::{self, Options, Protocol};
use proptest::prelude::*;
use rustix::net::SendFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;

/// Long enough for a slow machine; what is waited for comes at once.
const PATIENCE: Duration = Duration::from_secs(60);

const PAIRS: [(Protocol, Protocol); 4] = [
    (Protocol::Tcp, Protocol::Mptcp),
    (Protocol::Mptcp, Protocol::Tcp),
    (Protocol::Tcp, Protocol::Tcp),
    (Protocol::Mptcp, Protocol::Mptcp),
];

/// More than sockets and pipes hold on the way, so that every kind of step happens.
const BULKY: usize = 48 << 20;

/// Both peers of a relayed connection, and the relaying.
struct Relayed {
    client: TcpStream,
    server: TcpStream,
    traffic: Arc<Traffic>,
    copy: JoinHandle<End>,
}

impl Relayed {
    async fn new((client, server): (Protocol, Protocol), idle: Option<Duration>) -> Self {
        let (client, near) = connected(client).await;
        let (far, server) = connected(server).await;
        let traffic = Arc::new(Traffic::default());
        let copy = tokio::spawn({
            let traffic = Arc::clone(&traffic);
            async move { copy_bidirectional(&near, &far, &traffic, idle, || {}).await }
        });
        Relayed { client, server, traffic, copy }
    }

    async fn end(self) -> End {
        timeout(PATIENCE, self.copy).await.unwrap().unwrap()
    }
}

async fn connected(protocol: Protocol) -> (TcpStream, TcpStream) {
    let options = Options { protocol, ..Options::default() };
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let listener = socket::listen(any, &options).unwrap();
    let addr = listener.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(socket::connect(addr, &options), listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// Bytes whose period is no power of two, so that a swapped page is seen.
fn stream(length: usize) -> Vec<u8> {
    let period: Vec<u8> = (0..251 * 241).map(|place| (place % 251) as u8 ^ (place / 251) as u8).collect();
    let mut bytes = period.repeat(length / period.len() + 1);
    bytes.truncate(length);
    bytes
}

/// Sends `data` in pieces of the sizes in `chunks`, over and over, and closes the half.
async fn send(to: &mut (impl AsyncWriteExt + Unpin), data: &[u8], chunks: &[usize]) {
    let mut rest = data;
    for chunk in chunks.iter().cycle() {
        let (now, later) = rest.split_at((*chunk).min(rest.len()));
        to.write_all(now).await.unwrap();
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    to.shutdown().await.unwrap();
}

/// Receives until the end, in pieces of at most the sizes in `chunks`.
async fn receive(from: &mut (impl AsyncReadExt + Unpin), chunks: &[usize]) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; *chunks.iter().max().unwrap()]);
    for chunk in chunks.iter().cycle() {
        match timeout(PATIENCE, from.read(&mut buffer[..*chunk])).await.unwrap().unwrap() {
            0 => break,
            n => all.extend_from_slice(&buffer[..n]),
        }
    }
    all
}

/// Sends until nothing more goes in, since nobody receives.
async fn fill(to: &mut TcpStream) {
    let piece = stream(STEP);
    while timeout(Duration::from_millis(200), to.write(&piece)).await.is_ok() {}
}

fn same(got: &[u8], sent: &[u8]) {
    if got != sent {
        let place = got.iter().zip(sent).position(|(got, sent)| got != sent);
        panic!("{} bytes of {}, the first wrong one at {place:?}", got.len(), sent.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_arrives_in_its_place_whatever_the_pieces(
        up in 0usize..6 << 20,
        down in 0usize..6 << 20,
        sizes in prop::array::uniform4(prop::collection::vec(prop_oneof![1usize..2000, 1usize..1 << 20], 1..6)),
    ) {
        let (up, down) = (stream(up), stream(down));
        for pair in PAIRS {
            block_on(async {
                let mut relayed = Relayed::new(pair, None).await;
                let (mut from_client, mut to_client) = relayed.client.split();
                let (mut from_server, mut to_server) = relayed.server.split();
                let ((), (), at_server, at_client) = tokio::join!(
                    send(&mut to_client, &up, &sizes[0]),
                    send(&mut to_server, &down, &sizes[1]),
                    receive(&mut from_server, &sizes[2]),
                    receive(&mut from_client, &sizes[3]),
                );
                same(&at_server, &up);
                same(&at_client, &down);
                let traffic = Arc::clone(&relayed.traffic);
                assert!(matches!(relayed.end().await, End::Closed));
                assert_eq!(traffic.to_server.get(), up.len() as u64);
                assert_eq!(traffic.to_client.get(), down.len() as u64);
            });
        }
    }
}

#[test]
fn after_a_bulk_transfer_one_half_is_closed_and_the_other_carries_the_next() {
    let data = stream(BULKY);
    for pair in PAIRS {
        block_on(async {
            let Relayed { mut client, mut server, copy, .. } = Relayed::new(pair, None).await;
            let (mut first, mut second) = (&mut client, &mut server);
            for _ in 0..2 {
                let ((), got) = tokio::join!(send(first, &data, &[STEP]), receive(second, &[STEP]));
                same(&got, &data);
                (first, second) = (second, first);
            }
            assert!(matches!(copy.await.unwrap(), End::Closed));
        });
    }
}

#[test]
fn a_reset_in_a_bulk_transfer_names_the_leg_it_came_from() {
    for pair in PAIRS {
        for culprit in [Leg::Client, Leg::Server] {
            block_on(async {
                let Relayed { mut client, mut server, mut copy, .. } = Relayed::new(pair, None).await;
                fill(&mut client).await;
                let (gone, mut left) = match culprit {
                    Leg::Client => (client, Some(&mut server)),
                    Leg::Server => (server, None),
                };
                SockRef::from(&gone).set_linger(Some(Duration::ZERO)).unwrap();
                drop(gone);
                // A client's reset comes behind what it has sent, so the server has to read on.
                let mut buffer = vec![0; STEP];
                let end = loop {
                    tokio::select! {
                        end = timeout(PATIENCE, &mut copy) => break end.unwrap().unwrap(),
                        Ok(1..) = async { left.as_mut().expect("not polled").read(&mut buffer).await }, if left.is_some() => {}
                    }
                };
                assert!(matches!(end, End::Broken(leg, _) if leg == culprit), "{pair:?} {culprit}: {end:?}");
            });
        }
    }
}

#[test]
fn silence_ends_a_connection_and_a_byte_now_and_then_keeps_it() {
    const IDLE: Duration = Duration::from_secs(2);
    block_on(async {
        let Relayed { mut client, mut server, copy, .. } = Relayed::new(PAIRS[0], Some(IDLE)).await;
        let began = Instant::now();
        let mut byte = [0];
        while began.elapsed() < 2 * IDLE {
            client.write_all(b"x").await.unwrap();
            server.read_exact(&mut byte).await.unwrap();
            assert!(!copy.is_finished());
            tokio::time::sleep(IDLE / 20).await;
        }
        let silent = Instant::now();
        assert!(matches!(timeout(PATIENCE, copy).await.unwrap().unwrap(), End::Idle(IDLE)));
        assert!(silent.elapsed() >= IDLE / 2, "ended after {:?}", silent.elapsed());
    });
}

#[test]
fn urgent_data_in_a_bulk_transfer_stops_nothing() {
    let half = stream(BULKY);
    for pair in PAIRS {
        if pair.0 == Protocol::Mptcp {
            continue; // MPTCP has no urgent data.
        }
        block_on(async {
            let Relayed { mut client, mut server, .. } = Relayed::new(pair, None).await;
            let sending = async {
                client.write_all(&half).await.unwrap();
                client.writable().await.unwrap();
                assert_eq!(rustix::net::send(&client, b"!", SendFlags::OOB).unwrap(), 1);
                client.write_all(&half).await.unwrap();
                client.shutdown().await.unwrap();
            };
            let ((), got) = tokio::join!(sending, receive(&mut server, &[STEP]));
            // The urgent byte itself is out of band: a relay drops it, as one that reads does.
            same(&got, &[half.as_slice(), half.as_slice()].concat());
        });
    }
}

#[test]
fn a_connection_aborted_in_mid_transfer_leaves_none_of_its_bytes_to_the_next() {
    block_on(async {
        let Relayed { mut client, copy, server: _server, .. } = Relayed::new(PAIRS[0], None).await;
        fill(&mut client).await;
        copy.abort();
        assert!(copy.await.unwrap_err().is_cancelled());
        while let Some(pipe) = PIPES.take() {
            assert_eq!(rustix::io::ioctl_fionread(&pipe.outlet).unwrap(), 0);
        }
    });
}
