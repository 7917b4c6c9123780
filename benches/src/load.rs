//! The load: a bulk transfer, many short connections, many idle ones. Source and sink are threads of this process
//! with sockets in the namespaces of the hosts.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mptcp::Netns;
use socket2::{Domain, Protocol, Socket, Type};

/// Where a source connects to and a sink listens.
pub struct Ends<'a> {
    pub client: &'a Netns,
    pub connect: (Protocol, SocketAddr),
    pub server: &'a Netns,
    pub listen: (Protocol, SocketAddr),
}

/// Bytes of a request and of its answer.
const MESSAGE: usize = 64;

/// Requests under way at once.
const CLIENTS: usize = 8;

/// Nothing that is waited for takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

impl Ends<'_> {
    /// Sends for `time`, waits until the sink has it all; returns bytes and seconds.
    pub fn bulk(&self, time: Duration) -> Result<(u64, f64)> {
        let listener = self.listen()?;
        std::thread::scope(|scope| {
            let sink = scope.spawn(move || -> io::Result<u64> {
                let (mut stream, _) = listener.accept()?;
                let (mut buffer, mut total) = (vec![0; 1 << 20], 0);
                loop {
                    match stream.read(&mut buffer)? {
                        0 => return Ok(total),
                        n => total += n as u64,
                    }
                }
            });
            let mut stream = self.client.run(|| self.connect())??;
            let (began, data, mut sent) = (Instant::now(), vec![7; 256 << 10], 0);
            while began.elapsed() < time {
                stream.write_all(&data)?;
                sent += data.len() as u64;
            }
            stream.shutdown(Shutdown::Write)?;
            let received = sink.join().expect("the sink does not panic")?;
            ensure!(received == sent, "{received} of {sent} bytes arrived");
            Ok((received, began.elapsed().as_secs_f64()))
        })
    }

    /// Connects, asks, is answered and hangs up, over and over for `time`; returns how long each took, in
    /// seconds, sorted.
    pub fn conversations(&self, time: Duration) -> Result<Vec<f64>> {
        let listener = self.listen()?;
        let end = Instant::now() + time;
        let mut all = std::thread::scope(|scope| {
            for _ in 0..CLIENTS {
                let listener = listener.try_clone()?;
                scope.spawn(move || {
                    // The shutdown below ends the waiting for connections.
                    while let Ok((mut stream, _)) = listener.accept() {
                        let _ = answer(&mut stream).and_then(|()| stream.read(&mut [0]));
                    }
                });
            }
            let client = move || -> Result<Vec<f64>> {
                let mut took = Vec::new();
                while Instant::now() < end {
                    let began = Instant::now();
                    ask(&mut self.connect()?)?;
                    took.push(began.elapsed().as_secs_f64());
                }
                Ok(took)
            };
            let clients: Vec<_> =
                (0..CLIENTS).map(|_| scope.spawn(move || self.client.run(client)?)).collect();
            let results: Vec<_> =
                clients.into_iter().map(|client| client.join().expect("clients do not panic")).collect();
            socket2::SockRef::from(&listener).shutdown(Shutdown::Both)?;
            results.into_iter().collect::<Result<Vec<_>>>()
        })?
        .concat();
        all.sort_by(f64::total_cmp);
        Ok(all)
    }

    /// Holds `count` connections that have each had a conversation, and calls `then` meanwhile.
    pub fn idle<T>(&self, count: usize, then: impl FnOnce() -> T) -> Result<T> {
        let listener = self.listen()?;
        let held = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let server = scope.spawn(|| -> io::Result<()> {
                for _ in 0..count {
                    let (mut stream, _) = listener.accept()?;
                    answer(&mut stream)?;
                    held.lock().expect("nobody panics").push(stream);
                }
                Ok(())
            });
            let client = || -> Result<TcpStream> {
                let mut stream = self.connect()?;
                ask(&mut stream)?;
                Ok(stream)
            };
            let _clients = self.client.run(|| (0..count).map(|_| client()).collect::<Result<Vec<_>>>())??;
            server.join().expect("the server does not panic")?;
            Ok(then())
        })
    }

    /// To be called in the client's namespace.
    fn connect(&self) -> Result<TcpStream> {
        let (protocol, addr) = self.connect;
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(protocol))?;
        socket.connect_timeout(&addr.into(), PATIENCE).with_context(|| format!("connect to {addr}"))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket.into())
    }

    fn listen(&self) -> Result<TcpListener> {
        let (protocol, addr) = self.listen;
        let socket = self.server.run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(protocol)))??;
        socket.set_reuse_address(true)?;
        // Also for accept(2), and for the sockets that it returns.
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.bind(&addr.into())?;
        socket.listen(4096)?;
        Ok(socket.into())
    }
}

fn ask(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(&[1; MESSAGE])?;
    stream.read_exact(&mut [0; MESSAGE]).context("wait for an answer")
}

fn answer(stream: &mut TcpStream) -> io::Result<()> {
    stream.read_exact(&mut [0; MESSAGE])?;
    stream.write_all(&[2; MESSAGE])
}
