//! `braid echo`, the sample application: a server that sends back what it gets, and its client.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal};
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mptcp::{info, socket};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::SignalKind;
use tokio::time;

use crate::cmd;
use crate::output;

/// The sample application: a line echo server and its client
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid echo server --addr :8080
  braid echo client --addr 10.0.83.1:8080
  braid echo client --addr '[2001:db8::1]:8080' --msg hello --timeout 2s

Called as `client` or `server` (through a symbolic link) braid is that program, and flags may have one dash:
  client -addr 10.0.83.1:8080 -msg hello")]
pub struct Args {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, clap::Subcommand)]
enum Role {
    Server(Server),
    Client(Client),
}

/// Accept connections and send back what comes
///
/// Serves MPTCP and plain TCP clients alike, and prints for each connection which it is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid echo server
  braid echo server --addr 10.0.83.1:80")]
struct Server {
    /// Address to listen on; without a host, all addresses, IPv4 and IPv6
    #[arg(long, default_value = ":8080", value_name = "HOST:PORT")]
    addr: HostPort,
}

/// Send lines to an echo server and print what comes back
///
/// Exit code 1: the connection was lost, or no reply came in time.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid echo client --addr 10.0.83.1:80
  braid echo client --addr server.example:80 --msg hello --timeout 500ms")]
struct Client {
    /// Server to connect to; without a host, localhost
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "HOST:PORT")]
    addr: HostPort,
    /// Send this line, print the reply and end; without it, lines are read from standard input
    #[arg(long, value_name = "LINE")]
    msg: Option<String>,
    /// Wait this long for the connection, and for the reply to the last line
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = configfile::time_above_zero)]
    timeout: Duration,
}

/// The names of the published sample programs.
const PUBLISHED: [&str; 2] = ["client", "server"];

/// Turns the command line of a published sample program into braid's: `client -addr :80` becomes
/// `braid echo client --addr=:80`. Others stay as they are.
///
/// Go's flag package takes one dash or two, and the value after `=` or as the next argument.
pub fn translate(args: Vec<OsString>) -> Vec<OsString> {
    let called_as = args.first().and_then(|arg| Path::new(arg).file_name());
    let Some(role) = PUBLISHED.into_iter().find(|name| called_as == Some(OsStr::new(name))) else {
        return args;
    };
    let mut translated: Vec<OsString> = ["braid", "echo", role].map(OsString::from).into();
    let mut rest = args.into_iter().skip(1);
    while let Some(arg) = rest.next() {
        let name = arg.to_str().and_then(|arg| arg.strip_prefix('-')).map(|arg| arg.trim_start_matches('-'));
        match name {
            Some("h" | "help") => translated.push("--help".into()),
            Some(name) if name.contains('=') => translated.push(format!("--{name}").into()),
            Some(name) if !name.is_empty() => {
                let mut flag = OsString::from(format!("--{name}"));
                if let Some(value) = rest.next() {
                    flag.push("=");
                    flag.push(value);
                }
                translated.push(flag);
            }
            _ => translated.push(arg),
        }
    }
    translated
}

pub fn run(args: Args) -> Result<ExitCode> {
    cmd::block_on(async {
        match args.role {
            Role::Server(server) => server.run().await,
            Role::Client(client) => client.run().await,
        }
    })
}

impl Server {
    async fn run(self) -> Result<ExitCode> {
        let listener = self.listen().await?;
        let mut end = cmd::signalled(cmd::END)?;
        let mptcp = info::of(&listener)?.is_mptcp();
        output::line(format_args!("listening on {} with mptcp: {mptcp}", listener.local_addr()?))?;
        loop {
            tokio::select! {
                (stream, peer) = cmd::accept(&listener) => {
                    let mptcp = info::of(&stream)?.is_mptcp();
                    let peer = socket::canonical(peer);
                    output::line(format_args!("accepted connection from {peer} with mptcp: {mptcp}"))?;
                    tokio::spawn(echo(stream, peer));
                }
                () = &mut end => return Ok(ExitCode::SUCCESS),
            }
        }
    }

    async fn listen(&self) -> Result<TcpListener> {
        let options = options();
        if self.addr.host.is_empty() {
            return Ok(socket::listen_everywhere(self.addr.port, &options)?);
        }
        let mut addrs = tokio::net::lookup_host(self.addr.to_string())
            .await
            .with_context(|| format!("resolve {}", self.addr.host))?;
        let addr = addrs.next().with_context(|| format!("resolve {}: no address", self.addr.host))?;
        Ok(socket::listen(addr, &options)?)
    }
}

async fn echo(mut stream: TcpStream, peer: SocketAddr) {
    let (mut reader, mut writer) = stream.split();
    match tokio::io::copy(&mut reader, &mut writer).await {
        Ok(bytes) => tracing::debug!(%peer, bytes, "closed"),
        Err(error) => tracing::debug!(%peer, %error, "lost"),
    }
}

impl Client {
    async fn run(self) -> Result<ExitCode> {
        let addr = self.addr.to_string();
        let connected = time::timeout(self.timeout, socket::dial(&addr, &options())).await;
        let Ok(stream) = connected else { bail!("connect to {addr}: no answer in {:?}", self.timeout) };
        let stream = stream?;
        output::line(format_args!("connected to {addr} with mptcp: {}", info::of(&stream)?.is_mptcp()))?;
        let (reader, writer) = stream.into_split();
        let replies = BufReader::new(reader).lines();
        let lost = match self.msg {
            Some(msg) => one_shot(replies, writer, &msg, self.timeout).await?,
            None => interactive(replies, writer, self.timeout).await?,
        };
        Ok(match lost {
            None => ExitCode::SUCCESS,
            Some(reason) => {
                output::note(format_args!("braid: {addr}: {reason}"));
                ExitCode::from(cmd::FOUND_A_PROBLEM)
            }
        })
    }
}

/// Why an exchange ended before its time.
type Lost = Option<String>;

const CLOSED: &str = "the server closed the connection";

async fn one_shot(
    mut replies: Lines<BufReader<OwnedReadHalf>>,
    mut writer: OwnedWriteHalf,
    msg: &str,
    timeout: Duration,
) -> Result<Lost> {
    if let Err(error) = writer.write_all(format!("{msg}\n").as_bytes()).await {
        return Ok(Some(format!("send: {error}")));
    }
    // An echo has as many lines as its message.
    let mut missing = msg.lines().count().max(1);
    let deadline = time::Instant::now() + timeout;
    while missing > 0 {
        match time::timeout_at(deadline, replies.next_line()).await {
            Ok(Ok(Some(reply))) => output::line(reply)?,
            Ok(Ok(None)) => return Ok(Some(CLOSED.into())),
            Ok(Err(error)) => return Ok(Some(format!("receive: {error}"))),
            Err(_elapsed) => return Ok(Some(format!("no reply in {timeout:?}"))),
        }
        missing -= 1;
    }
    Ok(None)
}

async fn interactive(
    mut replies: Lines<BufReader<OwnedReadHalf>>,
    mut writer: OwnedWriteHalf,
    timeout: Duration,
) -> Result<Lost> {
    if io::stdin().is_terminal() {
        output::note("Each line is sent to the server. Ctrl-D ends.");
    }
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    let mut interrupt = cmd::signalled([SignalKind::interrupt()])?;
    // Set at the end of the input: how long the rest of the replies may take.
    let mut deadline = None;
    loop {
        tokio::select! {
            line = input.next_line(), if deadline.is_none() => match line.context("read standard input")? {
                Some(line) => {
                    if let Err(error) = writer.write_all(format!("{line}\n").as_bytes()).await {
                        return Ok(Some(format!("send: {error}")));
                    }
                }
                None => {
                    deadline = Some(time::Instant::now() + timeout);
                    if let Err(error) = writer.shutdown().await {
                        return Ok(Some(format!("send: {error}")));
                    }
                }
            },
            reply = replies.next_line() => match reply {
                Ok(Some(reply)) => output::line(format_args!("recv> {reply}"))?,
                Ok(None) if deadline.is_some() => return Ok(None),
                Ok(None) => return Ok(Some(CLOSED.into())),
                Err(error) => return Ok(Some(format!("receive: {error}"))),
            },
            () = time::sleep_until(deadline.unwrap_or_else(time::Instant::now)), if deadline.is_some() => {
                return Ok(Some(format!("no reply in {timeout:?}")));
            }
            () = &mut interrupt => return Ok(None),
        }
    }
}

/// Options of both sides: a peer that is gone without a word is noticed while nothing is sent.
fn options() -> socket::Options {
    socket::Options { nodelay: true, keepalive: Some(Duration::from_secs(30)), ..Default::default() }
}

/// `HOST:PORT` as Go's net package takes it; the host may be empty, IPv6 stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HostPort {
    host: String,
    port: u16,
}

impl std::str::FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or("expected HOST:PORT")?;
        let port = match port.parse() {
            Ok(0) | Err(_) => return Err(format!("port '{port}' is not a number from 1 to 65535")),
            Ok(port) => port,
        };
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        match bracketed {
            Some(inner) if inner.split('%').next().is_none_or(|ip| ip.parse::<Ipv6Addr>().is_err()) => {
                Err(format!("'{inner}' is not an IPv6 address"))
            }
            None if host.contains([':', '[', ']']) => Err("an IPv6 address needs brackets: [::1]:80".into()),
            _ => Ok(HostPort { host: host.into(), port }),
        }
    }
}

impl std::fmt::Display for HostPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let host = if self.host.is_empty() { "localhost" } else { &self.host };
        write!(f, "{host}:{}", self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(args: &[&str]) -> Vec<String> {
        let args = translate(args.iter().map(OsString::from).collect());
        args.into_iter().map(|arg| arg.into_string().unwrap()).collect()
    }

    #[test]
    fn the_published_programs_flags_are_understood() {
        let wanted = ["braid", "echo", "client", "--addr=10.0.83.1:80", "--msg=-x", "--timeout=5s"];
        assert_eq!(translated(&["/x/client", "-addr", "10.0.83.1:80", "-msg", "-x", "-timeout=5s"]), wanted);
        assert_eq!(translated(&["client", "--addr=10.0.83.1:80", "--msg", "-x", "--timeout", "5s"]), wanted);
        assert_eq!(translated(&["server", "-addr"]), ["braid", "echo", "server", "--addr"]);
        assert_eq!(translated(&["server", "-help"]), ["braid", "echo", "server", "--help"]);
    }

    #[test]
    fn other_names_keep_their_arguments() {
        assert_eq!(translated(&["braid", "-addr"]), ["braid", "-addr"]);
        assert_eq!(translated(&[]), [""; 0]);
    }

    #[test]
    fn a_host_and_port_is_read_as_go_reads_it() {
        let text = |text: &str| text.parse::<HostPort>().map(|addr| addr.to_string());
        assert_eq!(text(":80").unwrap(), "localhost:80");
        for good in ["10.0.83.1:80", "[::1]:65535", "[fe80::1%eth0]:1", "server.example:80"] {
            assert_eq!(text(good).unwrap(), good);
        }
        for bad in [
            "",
            "80",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "host:http",
            "::1:80",
            "[::1]",
            "[host]:80",
            "[]:80",
        ] {
            assert!(text(bad).is_err(), "{bad}");
        }
    }
}
