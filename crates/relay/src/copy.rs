//! The byte path: moves what each side sends to the other until both have closed their half.

use std::io;
use std::net::Shutdown;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::{End, Leg};

/// Bytes of one connection, each direction counted as it is delivered; also added to the service's totals.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Client to server.
    pub to_server: Meter,
    /// Server to client.
    pub to_client: Meter,
}

/// Bytes in one direction.
#[derive(Debug, Default)]
pub struct Meter {
    bytes: AtomicU64,
    total: Counter,
}

impl Meter {
    /// A meter that also adds to `total`.
    pub fn adding_to(total: Counter) -> Self {
        Meter { bytes: AtomicU64::new(0), total }
    }

    /// Bytes so far.
    pub fn get(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// `n` bytes more were delivered.
    pub fn add(&self, n: usize) {
        self.bytes.fetch_add(n as u64, Ordering::Relaxed);
        self.total.inc_by(n as u64);
    }
}

/// Moves bytes both ways; returns how it ended. Neither stream is closed or reset here beyond passing on a
/// closed half.
///
/// `idle` ends a connection without a byte either way. `at_first_eof` is called when the first half closes,
/// before the other side learns of it: the last moment at which both connections are whole.
pub async fn copy_bidirectional(
    client: &TcpStream,
    server: &TcpStream,
    traffic: &Traffic,
    idle: Option<Duration>,
    at_first_eof: impl FnOnce() + Send,
) -> End {
    let at_first_eof = Mutex::new(Some(at_first_eof));
    let eof = || {
        let first = at_first_eof.lock().expect("no code panics while it holds this lock").take();
        if let Some(f) = first {
            f();
        }
    };
    let up = one_way((Leg::Client, client), (Leg::Server, server), &traffic.to_server, &eof);
    let down = one_way((Leg::Server, server), (Leg::Client, client), &traffic.to_client, &eof);
    tokio::select! {
        result = async { tokio::try_join!(up, down) } => match result {
            Ok(_) => End::Closed,
            Err((leg, error)) => End::Broken(leg, error),
        },
        after = silence(traffic, idle) => End::Idle(after),
    }
}

/// Size of one buffer.
const BUFFER: usize = 1 << 20;

/// Buffers that no connection uses now; a connection holds one only while it has data to move.
static POOL: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// Most buffers that wait for use.
const POOLED: usize = 16;

struct Buffer(Box<[u8]>);

impl Buffer {
    fn take() -> Self {
        let pooled = POOL.lock().expect("no code panics while it holds this lock").pop();
        Buffer(pooled.unwrap_or_else(|| vec![0; BUFFER].into()))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut pool = POOL.lock().expect("no code panics while it holds this lock");
        if pool.len() < POOLED {
            pool.push(std::mem::take(&mut self.0));
        }
    }
}

/// Moves bytes from `from` to `to` until `from` closes its half, and then closes that half of `to`.
async fn one_way(
    (from_leg, from): (Leg, &TcpStream),
    (to_leg, to): (Leg, &TcpStream),
    meter: &Meter,
    eof: &(impl Fn() + Sync),
) -> Result<(), (Leg, io::Error)> {
    loop {
        from.readable().await.map_err(|error| (from_leg, error))?;
        let mut buffer = Buffer::take();
        loop {
            let n = match from.try_read(&mut buffer.0) {
                Ok(0) => {
                    eof();
                    return SockRef::from(to).shutdown(Shutdown::Write).map_err(|error| (to_leg, error));
                }
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err((from_leg, error)),
            };
            write_all(to, &buffer.0[..n], meter).await.map_err(|error| (to_leg, error))?;
        }
    }
}

async fn write_all(to: &TcpStream, mut bytes: &[u8], meter: &Meter) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(n) => {
                meter.add(n);
                bytes = &bytes[n..];
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns once no byte has moved for `idle`; never without `idle`.
async fn silence(traffic: &Traffic, idle: Option<Duration>) -> Duration {
    let Some(idle) = idle else { return std::future::pending().await };
    let moved = || traffic.to_server.get() + traffic.to_client.get();
    let (mut seen, mut since) = (moved(), Instant::now());
    // Looking four times per period ends a connection at most a quarter late, at no cost to the byte path.
    let mut tick = tokio::time::interval((idle / 4).max(Duration::from_millis(1)));
    loop {
        tick.tick().await;
        if moved() != seen {
            (seen, since) = (moved(), Instant::now());
        } else if since.elapsed() >= idle {
            return idle;
        }
    }
}
