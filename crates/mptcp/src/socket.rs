//! Listeners and dialers. The sockets are ordinary [`tokio::net`] types: MPTCP changes what travels on the
//! wire, not how a program reads and writes.
//!
//! MPTCP is the default. Where the kernel lacks it or it is switched off (`net.mptcp.enabled=0`), the
//! socket is a TCP one and a warning says so, once. `BRAID_MPTCP=0` in the environment turns it off.
//!
//! ```no_run
//! # async fn example() -> mptcp::Result<()> {
//! use mptcp::socket::{self, Options};
//!
//! // Serves MPTCP clients and plain TCP clients alike.
//! let listener = socket::listen("[::]:8080".parse().unwrap(), &Options::default())?;
//! let (stream, peer) = listener.accept().await.unwrap();
//! println!("{peer} with mptcp: {}", mptcp::info::of(&stream)?.is_mptcp());
//!
//! let stream = socket::dial("server.example:8080", &Options::default()).await?;
//! println!("connected with mptcp: {}", mptcp::info::of(&stream)?.is_mptcp());
//! # Ok(()) }
//! ```

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Once;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::{Error, Netns, Result};

/// What a socket asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// MPTCP, or TCP where the kernel has no MPTCP.
    Mptcp,
    /// Plain TCP.
    Tcp,
}

impl Default for Protocol {
    /// [`Protocol::Mptcp`], unless `BRAID_MPTCP=0` is in the environment.
    fn default() -> Self {
        match std::env::var_os("BRAID_MPTCP") {
            Some(value) if value == "0" => Protocol::Tcp,
            _ => Protocol::Mptcp,
        }
    }
}

/// Options of a new socket. The default asks for MPTCP and leaves everything else to the kernel.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// MPTCP or TCP.
    pub protocol: Protocol,
    /// The network namespace that the socket lives in; unset, that of the calling thread. Names are resolved in
    /// that of the calling thread in any case.
    pub netns: Option<Netns>,
    /// Source address of an outgoing connection.
    pub bind: Option<SocketAddr>,
    /// `IP_TRANSPARENT`: accept for, or dial from, addresses of other hosts. Needs CAP_NET_ADMIN.
    pub transparent: bool,
    /// `SO_MARK`, for policy routing. Needs CAP_NET_ADMIN or CAP_NET_RAW.
    pub mark: Option<u32>,
    /// `TCP_NODELAY`: send small writes at once.
    pub nodelay: bool,
    /// Idle time before the first keepalive probe (`TCP_KEEPIDLE`; kernels without it on MPTCP sockets use
    /// their default of two hours).
    pub keepalive: Option<Duration>,
    /// `SO_SNDBUF` in bytes; unset, the kernel tunes it.
    pub send_buffer: Option<usize>,
    /// `SO_RCVBUF` in bytes; unset, the kernel tunes it.
    pub recv_buffer: Option<usize>,
    /// An IPv6 listener takes no IPv4 connections.
    pub v6_only: bool,
    /// Length of the queue of connections to accept; 0 means 4096. The kernel caps it by `net.core.somaxconn`.
    pub backlog: u32,
}

/// Listens on `addr`. Clients that don't speak MPTCP are served over TCP.
///
/// # Panics
/// Outside a tokio runtime.
pub fn listen(addr: SocketAddr, options: &Options) -> Result<TcpListener> {
    let what = || format!("listen on {addr}");
    let socket = open(what, addr, options)?;
    let listen = || -> io::Result<TcpListener> {
        socket.set_reuse_address(true)?;
        if addr.is_ipv6() {
            socket.set_only_v6(options.v6_only)?;
        }
        socket.bind(&SockAddr::from(addr))?;
        socket.listen(if options.backlog == 0 {
            4096
        } else {
            options.backlog.min(i32::MAX as u32) as i32
        })?;
        TcpListener::from_std(socket.into())
    };
    listen().map_err(|e| match e.raw_os_error() {
        // Of bind(2): a port below net.ipv4.ip_unprivileged_port_start.
        Some(libc::EACCES) => Error::Capability { what: what(), capability: "CAP_NET_BIND_SERVICE" },
        _ => Error::io(what(), e),
    })
}

/// Listens on `port` of all addresses, IPv4 and IPv6; of the IPv4 ones where there is no IPv6.
///
/// # Panics
/// Outside a tokio runtime.
pub fn listen_everywhere(port: u16, options: &Options) -> Result<TcpListener> {
    match listen((Ipv6Addr::UNSPECIFIED, port).into(), options) {
        // Not in this kernel, or not in this network namespace.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            listen((Ipv4Addr::UNSPECIFIED, port).into(), options)
        }
        result => result,
    }
}

/// An IPv4 address that came through an IPv6 socket, as IPv4.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// Connects to `addr`.
pub async fn connect(addr: SocketAddr, options: &Options) -> Result<TcpStream> {
    let what = || format!("connect to {addr}");
    let socket = open(what, addr, options)?;
    if let Some(bind) = options.bind {
        socket.bind(&SockAddr::from(bind)).map_err(|e| Error::io(format!("bind to {bind}"), e))?;
    }
    TcpSocket::from_std_stream(socket.into()).connect(addr).await.map_err(|e| Error::io(what(), e))
}

/// Resolves `host:port` and connects to the first of its addresses that answers.
///
/// The error is that of the last address tried.
pub async fn dial(host_port: &str, options: &Options) -> Result<TcpStream> {
    let addrs =
        tokio::net::lookup_host(host_port).await.map_err(|e| Error::io(format!("resolve {host_port}"), e))?;
    let mut last = None;
    for addr in addrs {
        match connect(addr, options).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| {
        Error::io(format!("resolve {host_port}"), io::Error::new(io::ErrorKind::NotFound, "no address"))
    }))
}

/// A socket for `addr` in the namespace that `options` names.
fn open(what: impl Fn() -> String, addr: SocketAddr, options: &Options) -> Result<Socket> {
    let made = match &options.netns {
        Some(netns) => netns.run(|| open_here(addr, options))?,
        None => open_here(addr, options),
    };
    made.map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM) => Error::Capability { what: what(), capability: "CAP_NET_ADMIN" },
        _ => Error::io(what(), e),
    })
}

/// A non-blocking socket of the family of `addr`, with `options` set, neither bound nor connected.
fn open_here(addr: SocketAddr, options: &Options) -> io::Result<Socket> {
    let domain = Domain::for_address(addr);
    let new = |protocol| Socket::new(domain, Type::STREAM.nonblocking(), Some(protocol));
    let socket = match options.protocol {
        Protocol::Tcp => new(socket2::Protocol::TCP)?,
        Protocol::Mptcp => match new(socket2::Protocol::MPTCP) {
            Err(error) if is_absent(&error) => {
                static WARNED: Once = Once::new();
                WARNED.call_once(|| tracing::warn!(%error, "no MPTCP here, using TCP"));
                new(socket2::Protocol::TCP)?
            }
            result => result?,
        },
    };
    if options.transparent {
        match domain {
            Domain::IPV4 => socket.set_ip_transparent_v4(true)?,
            _ => socket.set_ip_transparent_v6(true)?,
        }
    }
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    if options.nodelay {
        socket.set_tcp_nodelay(true)?;
    }
    if let Some(idle) = options.keepalive {
        socket.set_keepalive(true)?;
        // Older kernels refuse TCP_KEEPIDLE on MPTCP sockets; SO_KEEPALIVE alone still probes.
        let _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle));
    }
    if let Some(bytes) = options.send_buffer {
        socket.set_send_buffer_size(bytes)?;
    }
    if let Some(bytes) = options.recv_buffer {
        socket.set_recv_buffer_size(bytes)?;
    }
    Ok(socket)
}

/// Errors of `socket(…, IPPROTO_MPTCP)` that mean "not here": not built in (EPROTONOSUPPORT, before 5.6
/// EINVAL), switched off by `net.mptcp.enabled` (ENOPROTOOPT).
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EINVAL | libc::ENOPROTOOPT))
}
