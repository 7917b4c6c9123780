//! One connection of a client, from accept to the line in the log.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use mptcp::info::Status;
use mptcp::socket::{Protocol, canonical};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::config::{Service, Upstream};
use crate::copy::{Meter, Traffic, copy_bidirectional, standstill};
use crate::limits::Permit;
use crate::metrics::ServiceMetrics;
use crate::proxy_protocol::{self, Addresses, HeaderError};
use crate::transparent::{self, Diversion};
use crate::{End, Leg};

/// One accepted connection and what it needs to be served.
///
/// [`Session::run`] owns both connections and the place in the limits. It ends when both sides have closed,
/// when something breaks, or when `abort` is cancelled; then both sockets are closed and the place is free.
pub struct Session {
    /// The service as it was when the connection came.
    pub service: Arc<Service>,
    /// The accepted connection.
    pub client: TcpStream,
    /// Its peer.
    pub peer: SocketAddr,
    /// Its place in the limits.
    pub permit: Permit,
    /// Ends the session at once.
    pub abort: CancellationToken,
    /// Counters of the service.
    pub metrics: Arc<ServiceMetrics>,
    /// What keeps the connection coming to us, if it was diverted.
    pub diversion: Option<Arc<Diversion>>,
}

/// What the log line tells beside how it ended.
#[derive(Default)]
struct Record {
    /// The client that a PROXY header names; the connection's peer is in the span.
    source: Option<SocketAddr>,
    server: Option<SocketAddr>,
    client_leg: Used,
    server_leg: Used,
}

/// What a leg used: protocol, and the most subflows seen (while it was whole: a closed connection has none).
#[derive(Default)]
struct Used {
    protocol: Option<&'static str>,
    subflows: u8,
}

impl Session {
    /// Serves the connection to its end. Never fails: the end is in the log and in the metrics.
    pub async fn run(self) {
        let Session { service, client, peer, mut permit, abort, metrics, diversion: _diversion } = self;
        let started = Instant::now();
        metrics.active.inc();
        let traffic = Traffic {
            to_server: Meter::adding_to(metrics.to_server.clone()),
            to_client: Meter::adding_to(metrics.to_client.clone()),
        };
        let mut record = Record::default();
        let end = {
            let relay =
                relay(&service, Socket::new(client), peer, &mut permit, &metrics, &traffic, &mut record);
            tokio::select! {
                biased;
                () = abort.cancelled() => End::Shutdown,
                end = relay => end,
            }
        };
        metrics.active.dec();
        metrics.ended(&end);
        tracing::info!(
            source = record.source.map(tracing::field::display),
            server = record.server.map(tracing::field::display),
            to_server = traffic.to_server.get(),
            to_client = traffic.to_client.get(),
            ms = started.elapsed().as_millis() as u64,
            client_leg = %record.client_leg,
            server_leg = %record.server_leg,
            fault = %end.fault(),
            "{end}"
        );
    }
}

/// Everything between accept and end. Dropping the future resets both connections.
async fn relay(
    service: &Service,
    mut client: Socket,
    peer: SocketAddr,
    permit: &mut Permit,
    metrics: &ServiceMetrics,
    traffic: &Traffic,
    record: &mut Record,
) -> End {
    tune(&client.stream, service);
    let local = match service.transparent {
        None => client.stream.local_addr().map(canonical).unwrap_or(service.listen.addr),
        Some(_) => match transparent::original_destination(&client.stream, service.listen.addr.port()) {
            Ok(Some(destination)) => destination,
            Ok(None) => return End::NotDiverted,
            Err(error) => return End::Broken(Leg::Client, error),
        },
    };
    let mut addresses = Addresses { source: peer, destination: local };
    let mut early = Vec::new();
    if service.accept_proxy {
        match accept_header(service, &mut client.stream, peer).await {
            Ok((named, rest)) => {
                record.source = named.map(|named| named.source);
                addresses = named.unwrap_or(addresses);
                early = rest;
            }
            Err(error) => return End::BadHeader(error),
        }
    }
    let source = addresses.source.ip();
    let listed = |nets: &[ipnet::IpNet]| nets.iter().any(|net| net.contains(&source));
    if listed(&service.deny) || !(service.allow.is_empty() || listed(&service.allow)) {
        return End::Denied;
    }
    if !permit.attribute(source, service.max_connections_per_source) {
        return End::SourceFull;
    }
    if let Some(end) =
        judge(&client.stream, Leg::Client, service.listen.protocol, service, metrics, &mut record.client_leg)
    {
        return end;
    }

    let mut server = match dial(service, &addresses).await {
        Ok(stream) => Socket::new(stream),
        Err(end) => return end,
    };
    record.server = server.stream.peer_addr().ok().map(canonical);
    tune(&server.stream, service);
    if let Some(end) = judge(
        &server.stream,
        Leg::Server,
        service.upstream.protocol(),
        service,
        metrics,
        &mut record.server_leg,
    ) {
        return end;
    }

    let header = service.send_proxy.map(|version| proxy_protocol::header(version, addresses));
    for bytes in [&header.unwrap_or_default(), &early] {
        if let Err(error) = server.stream.write_all(bytes).await {
            return End::Broken(Leg::Server, error);
        }
    }
    traffic.to_server.add(early.len());
    drop(early);

    let end = {
        let at_first_eof = || {
            record.client_leg.look(&client.stream);
            record.server_leg.look(&server.stream);
        };
        tokio::select! {
            end = copy_bidirectional(&client.stream, &server.stream, traffic, service.idle_timeout, at_first_eof) => end,
            end = stall(&client.stream, Leg::Client, service) => end,
            end = stall(&server.stream, Leg::Server, service) => end,
        }
    };
    if matches!(end, End::Closed) {
        if service.transparent.is_some() {
            transparent::delivered(&[&client.stream, &server.stream]).await;
        }
        client.close();
        server.close();
    } else {
        record.client_leg.look(&client.stream);
        record.server_leg.look(&server.stream);
    }
    end
}

/// A connection that is reset when dropped, unless it was closed in order. So a session that ends early, by
/// error, abort or panic, never looks to its peers like one that ended well.
struct Socket {
    stream: TcpStream,
    in_order: bool,
}

impl Socket {
    fn new(stream: TcpStream) -> Self {
        Socket { stream, in_order: false }
    }

    /// Closes it; the kernel still delivers what was written.
    fn close(mut self) {
        self.in_order = true;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.in_order {
            // Disconnecting sends RST (tcp_disconnect) or MP_FASTCLOSE (mptcp_disconnect, RFC 8684 section 3.5).
            // It fails only where the connection is gone already.
            let _ = rustix::net::connect_unspec(&self.stream);
        }
    }
}

/// Sets what the service wants of a connection. Best effort: a connection that died meanwhile refuses, and
/// the byte path will say so.
fn tune(stream: &TcpStream, service: &Service) {
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_nodelay(service.nodelay);
    if let Some(time) = service.keepalive {
        let _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(time));
    }
    if let Some(time) = service.user_timeout {
        // MPTCP sockets refuse it with ENOPROTOOPT (mptcp_setsockopt_sol_tcp), for those see `stall`; after a
        // fallback it goes to the TCP subflow (mptcp_setsockopt).
        let _ = socket.set_tcp_user_timeout(Some(time));
    }
}

/// Reads the PROXY header of a client that may send one.
async fn accept_header(
    service: &Service,
    client: &mut TcpStream,
    peer: SocketAddr,
) -> Result<(Option<Addresses>, Vec<u8>), HeaderError> {
    let trusted = |net: &ipnet::IpNet| net.contains(&peer.ip());
    if !service.proxy_from.is_empty() && !service.proxy_from.iter().any(trusted) {
        return Err(HeaderError::Untrusted);
    }
    let time = service.connect_timeout;
    let (named, rest) = tokio::time::timeout(time, proxy_protocol::read(client))
        .await
        .unwrap_or(Err(HeaderError::Slow(time)))?;
    let named = named.map(|named| Addresses {
        source: canonical(named.source),
        destination: canonical(named.destination),
    });
    Ok((named, rest))
}

/// Asks what a leg that wanted `wanted` became, counts a fallback and refuses it where the service does.
fn judge(
    stream: &TcpStream,
    leg: Leg,
    wanted: Protocol,
    service: &Service,
    metrics: &ServiceMetrics,
    used: &mut Used,
) -> Option<End> {
    used.look(stream);
    if wanted != Protocol::Mptcp || used.protocol == Some("mptcp") {
        return None;
    }
    metrics.fell_back(leg);
    service.require_mptcp.then_some(End::NotMptcp(leg))
}

/// Connects to the first address of the server that answers.
async fn dial(service: &Service, client: &Addresses) -> Result<TcpStream, End> {
    let time = service.connect_timeout;
    let candidates: Vec<SocketAddr> = match &service.upstream {
        Upstream::OriginalDestination(_) => vec![client.destination],
        Upstream::Fixed(target) => {
            let lookup = tokio::net::lookup_host((target.host.as_str(), target.port));
            match tokio::time::timeout(time, lookup).await {
                Ok(Ok(addrs)) => addrs.collect(),
                Ok(Err(error)) => return Err(End::Unreachable(format!("resolve {}: {error}", target.host))),
                Err(_) => {
                    return Err(End::Unreachable(format!(
                        "resolve {}: no answer within {time:?}",
                        target.host
                    )));
                }
            }
        }
    };
    let keep_source = service.transparent.as_ref().is_some_and(|capture| capture.keep_source);
    let options = mptcp::socket::Options {
        protocol: service.upstream.protocol(),
        // Not from the client's port too: connection tracking would take both connections for one.
        bind: keep_source.then_some(SocketAddr::new(client.source.ip(), 0)),
        transparent: keep_source,
        mark: service.transparent.as_ref().map(|_| transparent::OWN_MARK),
        ..Default::default()
    };
    let mut failures = Vec::new();
    for addr in candidates {
        match tokio::time::timeout(time, mptcp::socket::connect(addr, &options)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) if error.raw_os_error().is_some_and(is_exhaustion) => {
                return Err(End::Exhausted(error.to_string()));
            }
            Ok(Err(error)) => failures.push(error.to_string()),
            Err(_) => failures.push(format!("connect to {addr}: no answer within {time:?}")),
        }
    }
    Err(End::Unreachable(failures.join("; ")))
}

/// Error numbers that say that we have run out of something: descriptors, memory.
pub(crate) fn is_exhaustion(errno: i32) -> bool {
    matches!(errno, libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
}

/// Returns once the peer of an MPTCP connection has acknowledged nothing of what it was sent for the
/// service's user timeout: what `TCP_USER_TIMEOUT` does for the others, at most a quarter late. Never returns
/// for TCP connections and for those that fell back to TCP.
async fn stall(stream: &TcpStream, leg: Leg, service: &Service) -> End {
    let Some(timeout) = service.user_timeout else { return std::future::pending().await };
    let mut acked = 0;
    let acknowledged = || {
        let Ok(Status::Mptcp(info)) = mptcp::info::of(stream) else { return None };
        Some(std::mem::replace(&mut acked, info.snd_una) != info.snd_una || info.snd_una == info.write_seq)
    };
    standstill(timeout, acknowledged).await;
    End::Stalled(leg, timeout)
}

impl Used {
    fn look(&mut self, stream: &TcpStream) {
        if self.protocol == Some("tcp") {
            return; // it was a plain TCP socket from the beginning
        }
        let (protocol, subflows) = match mptcp::info::of(stream) {
            // Before Linux 6.6 the kernel does not count the first subflow.
            Ok(Status::Mptcp(info)) => ("mptcp", info.subflows_total.max(info.subflows + 1)),
            Ok(Status::Fallback(_)) => ("fallback", 0),
            Ok(Status::Tcp) => ("tcp", 0),
            Err(_) => return,
        };
        self.protocol = Some(protocol);
        self.subflows = self.subflows.max(subflows);
    }
}

impl fmt::Display for Used {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.protocol, self.subflows) {
            (None, _) => f.write_str("none"),
            (Some(protocol), 0) => f.write_str(protocol),
            (Some(protocol), n) => write!(f, "{protocol}/{n}"),
        }
    }
}
