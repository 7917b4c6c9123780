//! The byte path: moves what each side sends to the other until both have closed their half.
//!
//! Measured (`docs/benchmarks.md`): few large steps cost least. A plain TCP socket that delivers much is
//! spliced through a pipe, which saves one copy; an MPTCP socket has no `splice_read` and is read. Both
//! buffers and pipes come from a pool and go back as soon as the source runs dry, so that an idle connection
//! holds neither.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use socket2::{Protocol, SockRef};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::yield_now;
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
    let up = Way { from: (Leg::Client, client), to: (Leg::Server, server), meter: &traffic.to_server };
    let down = Way { from: (Leg::Server, server), to: (Leg::Client, client), meter: &traffic.to_client };
    tokio::select! {
        result = async { tokio::try_join!(up.run(&eof), down.run(&eof)) } => match result {
            Ok(_) => End::Closed,
            Err((leg, error)) => End::Broken(leg, error),
        },
        after = silence(traffic, idle) => End::Idle(after),
    }
}

/// Largest step, in bytes.
const STEP: usize = 1 << 20;

/// A step of at least this many bytes tells a bulk transfer from a conversation.
const BULK: usize = 64 << 10;

/// Steps without a wait after which other connections get their turn: some milliseconds.
const TURN: usize = 8;

/// Buffers and pipes that no connection uses now.
static BUFFERS: Pool<Box<[u8]>> = Pool::new();
static PIPES: Pool<Pipe> = Pool::new();

/// One direction of a connection.
struct Way<'a> {
    from: (Leg, &'a TcpStream),
    to: (Leg, &'a TcpStream),
    meter: &'a Meter,
}

/// The leg that failed, and how.
type Broken = (Leg, io::Error);

impl Way<'_> {
    /// Moves bytes until the source closes its half, and then closes that half of the destination.
    async fn run(self, eof: &(impl Fn() + Sync)) -> Result<(), Broken> {
        let is_tcp = || matches!(SockRef::from(self.from.1).protocol(), Ok(Some(Protocol::TCP)));
        let mut can_splice = None;
        let mut bulk = false;
        loop {
            self.from.1.readable().await.map_err(|error| (self.from.0, error))?;
            let mut splice = bulk;
            let mut steps = 0;
            while steps < TURN {
                steps += 1;
                match if splice { self.splice().await? } else { self.read().await? } {
                    // Only a read tells whether nothing is left: a splice also stops at urgent data
                    // (tcp_read_sock).
                    None | Some(0) if splice => splice = false,
                    None => break,
                    Some(0) => {
                        eof();
                        let half = SockRef::from(self.to.1).shutdown(Shutdown::Write);
                        return half.map_err(|error| (self.to.0, error));
                    }
                    Some(n) => {
                        bulk = n >= BULK && *can_splice.get_or_insert_with(is_tcp);
                        splice = bulk;
                    }
                }
            }
            if steps == TURN {
                yield_now().await;
            }
        }
    }

    /// A step through a buffer. Returns how many bytes it moved: 0 at the end of data, `None` if there is
    /// nothing now.
    async fn read(&self) -> Result<Option<usize>, Broken> {
        let mut buffer = BUFFERS.take().unwrap_or_else(|| vec![0; STEP].into());
        let n = self.accept(|from| from.try_read(&mut buffer))?;
        let mut rest = &buffer[..n.unwrap_or(0)];
        while !rest.is_empty() {
            rest = &rest[self.deliver(|to| to.try_write(rest)).await?..];
        }
        BUFFERS.put(buffer);
        Ok(n)
    }

    /// The same through a pipe, though it returns 0 also if there is nothing now. Through a buffer where there
    /// is no pipe to be had.
    async fn splice(&self) -> Result<Option<usize>, Broken> {
        let Some(pipe) = PIPES.take().or_else(|| Pipe::new().ok()) else { return self.read().await };
        let n = self.accept(|from| {
            from.try_io(Interest::READABLE, || match splice(from, None, &pipe.inlet, None, STEP, NONBLOCK) {
                // Kept from tokio, which would take the socket for empty and refuse the read that is to tell.
                Err(Errno::AGAIN) => Ok(0),
                result => Ok(result?),
            })
        })?;
        let mut rest = n.unwrap_or(0);
        while rest > 0 {
            let step = |to: &TcpStream| {
                to.try_io(Interest::WRITABLE, || Ok(splice(&pipe.outlet, None, to, None, rest, NONBLOCK)?))
            };
            rest -= self.deliver(step).await?;
        }
        // Only an empty pipe goes back. One with bytes in it, after an error or an abort, is dropped.
        PIPES.put(pipe);
        Ok(n)
    }

    /// Takes from the source what is there.
    fn accept(&self, f: impl FnOnce(&TcpStream) -> io::Result<usize>) -> Result<Option<usize>, Broken> {
        match f(self.from.1) {
            Ok(n) => Ok(Some(n)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err((self.from.0, error)),
        }
    }

    /// Gives the destination what it takes, as soon as it takes anything.
    async fn deliver(&self, mut f: impl FnMut(&TcpStream) -> io::Result<usize>) -> Result<usize, Broken> {
        let (leg, to) = self.to;
        loop {
            match f(to) {
                Ok(n) => {
                    self.meter.add(n);
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    to.writable().await.map_err(|error| (leg, error))?;
                }
                Err(error) => return Err((leg, error)),
            }
        }
    }
}

/// Returns once no byte has moved for `idle`; never without `idle`.
async fn silence(traffic: &Traffic, idle: Option<Duration>) -> Duration {
    let Some(idle) = idle else { return std::future::pending().await };
    let mut seen = None;
    let moved = || {
        let now = Some(traffic.to_server.get() + traffic.to_client.get());
        Some(std::mem::replace(&mut seen, now) != now)
    };
    standstill(idle, moved).await;
    idle
}

/// Returns once `progress` has said no for `time`, never if it says nothing any more. It is asked four times in
/// that time, which ends a connection at most a quarter late, at no cost to the byte path.
pub(crate) async fn standstill(time: Duration, mut progress: impl FnMut() -> Option<bool>) {
    let mut tick = tokio::time::interval((time / 4).max(Duration::from_millis(1)));
    let mut since = Instant::now();
    loop {
        tick.tick().await;
        match progress() {
            Some(true) => since = Instant::now(),
            Some(false) if since.elapsed() >= time => return,
            Some(false) => {}
            None => std::future::pending().await,
        }
    }
}

/// Things that wait for their next use.
struct Pool<T>(Mutex<Vec<T>>);

impl<T> Pool<T> {
    /// Most things that wait.
    const MOST: usize = 16;

    const fn new() -> Self {
        Pool(Mutex::new(Vec::new()))
    }

    fn take(&self) -> Option<T> {
        self.0.lock().expect("no code panics while it holds this lock").pop()
    }

    fn put(&self, thing: T) {
        let mut free = self.0.lock().expect("no code panics while it holds this lock");
        if free.len() < Self::MOST {
            free.push(thing);
        }
    }
}

struct Pipe {
    outlet: OwnedFd,
    inlet: OwnedFd,
}

impl Pipe {
    /// Fails without descriptors, and for an unprivileged user beyond `fs.pipe-user-pages-soft`.
    fn new() -> rustix::io::Result<Self> {
        let (outlet, inlet) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&inlet, STEP)?;
        Ok(Pipe { outlet, inlet })
    }
}

const NONBLOCK: SpliceFlags = SpliceFlags::NONBLOCK;

#[cfg(test)]
mod tests;
