//! What the byte path holds in memory and descriptors: in a process of its own, since both belong to the process.

use std::fs;
use std::time::Duration;

use mptcp::socket::{self, Options, Protocol};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use relay::End;
use relay::copy::{Traffic, copy_bidirectional};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Long enough for a slow machine; what is waited for comes at once.
const PATIENCE: Duration = Duration::from_secs(60);

const MIB: usize = 1 << 20;

#[test]
fn bulk_needs_no_pipe_and_idle_connections_hold_neither_pipes_nor_buffers() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let inherited = pipes();
        let (mut client, mut server, copy) = relayed().await;
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
        transfer(&mut client, &mut server, 4 * MIB).await;
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        assert_eq!(pipes(), inherited);

        let before = resident();
        let mut idle = vec![(client, server, copy)];
        for _ in 0..60 {
            let (mut client, mut server, copy) = relayed().await;
            transfer(&mut client, &mut server, 4 * MIB).await;
            transfer(&mut server, &mut client, 4 * MIB).await;
            idle.push((client, server, copy));
        }
        let ours = pipes() - inherited;
        assert!((2..=32).contains(&ours), "{ours} ends of pipes");
        let grown = resident().saturating_sub(before) / MIB;
        assert!(grown < 40, "{grown} MiB more");
        for (mut client, mut server, copy) in idle {
            transfer(&mut client, &mut server, 1).await;
            client.shutdown().await.unwrap();
            server.shutdown().await.unwrap();
            assert!(matches!(timeout(PATIENCE, copy).await.unwrap().unwrap(), End::Closed));
        }
    });
}

/// A client, over TCP, and a server, over MPTCP, whose bytes are relayed.
async fn relayed() -> (TcpStream, TcpStream, JoinHandle<End>) {
    let (client, near) = connected(Protocol::Tcp).await;
    let (far, server) = connected(Protocol::Mptcp).await;
    let copy =
        tokio::spawn(async move { copy_bidirectional(&near, &far, &Traffic::default(), None, || {}).await });
    (client, server, copy)
}

async fn connected(protocol: Protocol) -> (TcpStream, TcpStream) {
    let options = Options { protocol, ..Options::default() };
    let listener = socket::listen("127.0.0.1:0".parse().unwrap(), &options).unwrap();
    let addr = listener.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(socket::connect(addr, &options), listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

async fn transfer(from: &mut TcpStream, to: &mut TcpStream, bytes: usize) {
    let data = vec![7; bytes];
    let mut got = vec![0; bytes];
    let (sent, received) =
        tokio::join!(timeout(PATIENCE, from.write_all(&data)), timeout(PATIENCE, to.read_exact(&mut got)));
    sent.unwrap().unwrap();
    received.unwrap().unwrap();
    assert!(got == data);
}

/// Open ends of pipes.
fn pipes() -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("pipe:")))
        .count()
}

/// Resident memory in bytes.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
}
