//! `braid listen`: holds a listening MPTCP socket.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use mptcp::info;
use mptcp::socket::{self, Options, Protocol};

use crate::cmd::{self, Place};
use crate::output;

/// Hold a listening socket for subflows to an announced port
///
/// A peer opens subflows to a port that was announced to it (`braid address announce … port NR`), and something has to
/// listen there. Runs until it is interrupted. Connections that come, instead of subflows, are closed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid listen 10.0.1.2:8443
  braid listen '[2001:db8::2]:8443' -n server")]
pub struct Args {
    #[command(flatten)]
    place: Place,
    /// Where to listen; port 0: a free one, which is printed
    #[arg(value_name = "ADDRESS:PORT", value_parser = cmd::address_and_port)]
    addr: SocketAddr,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    cmd::block_on(async {
        let options = Options { protocol: Protocol::Mptcp, netns: Some(netns), ..Options::default() };
        let listener = socket::listen(args.addr, &options)?;
        ensure!(
            info::of(&listener)?.is_mptcp(),
            "listen on {}: there is no MPTCP here (net.mptcp.enabled)",
            args.addr
        );
        let mut end = cmd::signalled(cmd::END)?;
        output::line(format_args!("listening on {}", listener.local_addr()?))?;
        loop {
            tokio::select! {
                (_, peer) = cmd::accept(&listener) => {
                    tracing::debug!(%peer, "a connection, not a subflow: closed");
                }
                () = &mut end => return Ok(ExitCode::SUCCESS),
            }
        }
    })
}
