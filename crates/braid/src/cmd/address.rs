//! `braid address`: announces and withdraws addresses of one connection (userspace path manager).

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use mptcp::pm::{Address, EndpointFlags};
use mptcp::{AddrId, Netns, Token};

use crate::cmd::connection::{Connection, Words, explain};
use crate::cmd::endpoint::Request;
use crate::cmd::{self, Place};

/// Announce and withdraw an address to the peer of one connection
///
/// For connections of the userspace path manager (net.mptcp.pm_type=1). Words come in any order, keywords may be
/// abbreviated, as in `braid endpoint`.
#[derive(Debug, clap::Args)]
#[command(
    infer_subcommands = true,
    after_help = "\
Examples:
  braid address announce --token 1a2b3c4d 10.0.1.2 id 3
  braid address announce --token 1a2b3c4d 10.0.1.2 id 3 port 8443
  braid address remove --token 1a2b3c4d id 3"
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Announce an address (ADD_ADDR): ADDRESS id ID [port NR] [dev NAME]
    ///
    /// With a port, something has to listen there: `braid listen`. Without, the peer takes the connection's port.
    Announce(Words),
    /// Withdraw an address (REMOVE_ADDR): id ID
    ///
    /// The peer closes the subflows that it has to the address. Id 0 is the address on which the connection was opened.
    Remove {
        #[command(flatten)]
        words: Words,
        /// Also where the connection has no other path
        #[arg(long)]
        force: bool,
    },
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    cmd::block_on(async {
        match args.command {
            Command::Announce(Words { token, words }) => {
                announce(&netns, token, &Request::parse(&words)?).await
            }
            Command::Remove { words: Words { token, words }, force } => {
                remove(&netns, token, &Request::parse(&words)?, force).await
            }
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn announce(netns: &Netns, token: Token, wanted: &Request) -> Result<()> {
    let ip = wanted.ip.context("announce: an address is needed")?;
    ensure!(wanted.id.is_some_and(|id| id != AddrId(0)), "announce: an id from 1 to 255 is needed");
    ensure!(EndpointFlags::SIGNAL.contains(wanted.flags), "announce: takes no flags");
    // A mapped address would be announced as IPv6, which no peer can reach.
    let address =
        Address { ip: ip.to_canonical(), id: wanted.id, port: wanted.port, ifindex: wanted.ifindex(netns)? };
    let connection = Connection::find(netns, token).await?;
    connection.client.announce(token, address).await.map_err(explain)
}

async fn remove(netns: &Netns, token: Token, wanted: &Request, force: bool) -> Result<()> {
    let id = wanted.id.context("remove: an id is needed")?;
    ensure!(*wanted == Request { id: wanted.id, ..Request::default() }, "remove: takes only id ID");
    let connection = Connection::find(netns, token).await?;
    if !force {
        connection.keep_a_path(|subflow| subflow.local_id == id)?;
    }
    connection.client.remove(token, id).await.map_err(explain)
}
