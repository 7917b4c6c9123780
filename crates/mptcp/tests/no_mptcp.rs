//! Where MPTCP is switched off, sockets are TCP ones, and one warning says so.

mod net;

use std::io::Write;
use std::sync::{Arc, Mutex};

use mptcp::info::{self, Status};
use mptcp::sysctl;
use net::{connect, pair, transfer};

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn without_mptcp_there_is_tcp_and_one_warning() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
    let (a, b) = pair(1);
    for netns in [&a, &b] {
        sysctl::set(netns, "net.mptcp.enabled", "0").unwrap();
    }
    for _ in 0..3 {
        let mut connection = connect(&a, &b, "10.0.0.2:0").await;
        transfer(&mut connection.client, &mut connection.server, 1000).await;
        assert_eq!(info::of(&connection.client).unwrap(), Status::Tcp);
        assert_eq!(info::of(&connection.server).unwrap(), Status::Tcp);
    }
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(log.lines().filter(|line| line.contains("WARN")).count(), 1, "{log}");
    assert!(log.contains("no MPTCP here, using TCP"), "{log}");
}
