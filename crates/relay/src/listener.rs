//! Accepts the connections of one service.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use mptcp::socket::{self, Protocol};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::config::{Listen, Service};
use crate::limits::Limits;
use crate::metrics::ServiceMetrics;
use crate::session::is_exhaustion;
use crate::transparent::{Diversion, Rules};
use crate::{End, Error, Result, Session};

/// A listening socket and what its connections need.
///
/// [`Listener::run`] owns the socket; it ends when `stop` is cancelled, and then the socket is closed. The
/// sessions it started go on: they belong to `sessions`.
pub struct Listener {
    /// The socket.
    pub socket: TcpListener,
    /// What brings it connections that were meant for other hosts.
    pub diversion: Option<Arc<Diversion>>,
    /// The service; each new connection gets the value of its moment.
    pub service: watch::Receiver<(Arc<Service>, Arc<ServiceMetrics>)>,
    /// Ends accepting.
    pub stop: CancellationToken,
    /// Ends every session at once.
    pub abort: CancellationToken,
    /// The sessions of all listeners, to wait for.
    pub sessions: TaskTracker,
}

/// Sockets that a service manager opened for us (`sd_listen_fds(3)`); services find theirs by address.
#[derive(Debug, Default)]
pub struct Inherited(Vec<StdListener>);

impl Inherited {
    /// Takes over what `LISTEN_FDS` offers this process.
    pub fn from_env() -> Result<Self> {
        let mut fds = listenfd::ListenFd::from_env();
        let mut sockets = Vec::new();
        for index in 0..fds.len() {
            match fds.take_tcp_listener(index) {
                Ok(socket) => sockets.extend(socket),
                Err(error) => return Err(Error::system(format!("take over passed socket {index}"), error)),
            }
        }
        Ok(Inherited(sockets))
    }

    /// The addresses of the sockets that no service took.
    pub fn unclaimed(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.iter().filter_map(|socket| socket.local_addr().ok())
    }

    fn take(&mut self, addr: SocketAddr) -> Option<StdListener> {
        let index = self.0.iter().position(|socket| socket.local_addr().is_ok_and(|local| local == addr))?;
        Some(self.0.swap_remove(index))
    }
}

/// Opens the listening socket of `service`, or takes the inherited one.
pub fn bind(service: &Service, inherited: &mut Inherited) -> Result<TcpListener> {
    let Listen { protocol, addr } = service.listen;
    let failed = |problem| Error::Listen { service: service.name.clone(), problem };
    if let Some(socket) = inherited.take(addr) {
        let speaks = socket2::SockRef::from(&socket).protocol().ok().flatten();
        if protocol == Protocol::Mptcp && speaks != Some(socket2::Protocol::MPTCP) {
            tracing::warn!(service = service.name, %addr, "the passed socket is a TCP one, not MPTCP");
        }
        let adopt = || -> io::Result<TcpListener> {
            socket.set_nonblocking(true)?;
            TcpListener::from_std(socket)
        };
        return adopt().map_err(|e| failed(mptcp::Error::io(format!("take over the socket on {addr}"), e)));
    }
    let transparent = service.transparent.is_some();
    let options = socket::Options { protocol, transparent, ..Default::default() };
    let listening = match addr.ip() {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => socket::listen_everywhere(addr.port(), &options),
        _ => socket::listen(addr, &options),
    };
    listening.map_err(failed)
}

/// Has the kernel bring what a transparent service takes to its `socket`.
pub async fn divert(service: &Service, socket: &TcpListener) -> Result<Option<Arc<Diversion>>> {
    let Some(mut rules) = Rules::of(service) else { return Ok(None) };
    let failed = |problem| Error::Listen { service: service.name.clone(), problem };
    let addr = socket.local_addr().map_err(|e| failed(mptcp::Error::io("read the listening address", e)))?;
    if addr.is_ipv4() {
        rules = rules.without_ipv6();
    }
    let installed = tokio::task::spawn_blocking(move || Diversion::install(rules)).await;
    let installed = installed.unwrap_or_else(|e| Err(mptcp::Error::io("divert connections", e)));
    installed.map(Arc::new).map(Some).map_err(failed)
}

impl Listener {
    /// Accepts until told to stop. No error of `accept` ends it.
    pub async fn run(self) {
        let limits = Arc::new(Limits::default());
        let mut backoff = Backoff::default();
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                accepted = self.socket.accept() => accepted,
            };
            let (service, metrics) = self.service.borrow().clone();
            let (client, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    metrics.accept_errors.inc();
                    let pause = backoff.after(&error);
                    if backoff.is_new() {
                        tracing::warn!(service = service.name, %error, "cannot accept, trying again");
                    }
                    tokio::select! {
                        () = self.stop.cancelled() => break,
                        () = tokio::time::sleep(pause) => continue,
                    }
                }
            };
            backoff = Backoff::default();
            metrics.accepted.inc();
            let peer = socket::canonical(peer);
            let span = tracing::info_span!("connection", service = service.name, client = %peer);
            let Some(permit) = limits.admit(service.max_connections) else {
                let end = End::ServiceFull;
                metrics.ended(&end);
                span.in_scope(|| tracing::info!(fault = %end.fault(), "{end}"));
                // Unread and reset at once: the client need not wait to learn it.
                let _ = rustix::net::connect_unspec(&client);
                continue;
            };
            let abort = self.abort.clone();
            let diversion = self.diversion.clone();
            let session = Session { service, client, peer, permit, abort, metrics, diversion };
            self.sessions.spawn(session.run().instrument(span));
        }
        // Before the socket is closed: where nobody listens, redirected connections are refused.
        if let Some(Err(error)) = self.diversion.map(|diversion| diversion.release()) {
            tracing::warn!(%error, "new connections are still diverted");
        }
    }
}

/// How long to wait after a failed accept: not at all when the failure was the connection's, longer and
/// longer while the process or the system has run out of something.
#[derive(Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    fn after(&mut self, error: &io::Error) -> Duration {
        self.failures += 1;
        match error.raw_os_error() {
            Some(errno) if is_exhaustion(errno) => Duration::from_millis(5 << self.failures.min(8)),
            _ => Duration::ZERO,
        }
    }

    /// Is this the first failure since an accept that worked? One line in the log is enough.
    fn is_new(&self) -> bool {
        self.failures == 1
    }
}
