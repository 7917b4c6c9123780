//! `braid subflow`: opens, closes and reprioritises single subflows (userspace path manager).

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use mptcp::diag::Subflow;
use mptcp::pm::{Address, EndpointFlags};
use mptcp::{AddrId, Netns};

use crate::cmd::connection::{Connection, Words, explain};
use crate::cmd::endpoint::Request;
use crate::cmd::{self, Place};

/// Open, close and reprioritise a subflow of one connection
///
/// For connections of the userspace path manager (net.mptcp.pm_type=1). Words come in any order, but an id or port
/// stands behind the local or remote that it belongs to; keywords may be abbreviated as in `braid endpoint`. All but
/// create find the subflow among those that `braid show` shows: it is enough to name what tells it from the others.
#[derive(Debug, clap::Args)]
#[command(
    infer_subcommands = true,
    after_help = "\
Examples:
  braid subflow create --token 1a2b3c4d local 10.0.1.2 id 2 dev eth1 remote 10.0.1.1 port 443
  braid subflow backup --token 1a2b3c4d local 10.0.1.2
  braid subflow nobackup --token 1a2b3c4d local id 2
  braid subflow destroy --token 1a2b3c4d local 10.0.1.2 port 40022 remote 10.0.1.1 port 443"
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Open a subflow: local ADDRESS id ID [port NR] [dev NAME] remote ADDRESS port NR [id ID] [backup]
    ///
    /// The local id is the connection's name for the address: a new one, unless the address has one already.
    Create(Words),
    /// Close a subflow: [local [ADDRESS] [id ID] [port NR]] [remote [ADDRESS] [id ID] [port NR]]
    Destroy {
        #[command(flatten)]
        ends: Words,
        /// Also the last one that the connection has
        #[arg(long)]
        force: bool,
    },
    /// Ask both sides to use a subflow only when no other works: its ends as in destroy
    Backup(Words),
    /// Ask both sides to use it like the others again: its ends as in destroy
    Nobackup(Words),
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    cmd::block_on(async {
        match args.command {
            Command::Create(ends) => create(&netns, &ends).await,
            Command::Destroy { ends, force } => destroy(&netns, &ends, force).await,
            Command::Backup(ends) => prioritise(&netns, &ends, true).await,
            Command::Nobackup(ends) => prioritise(&netns, &ends, false).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn create(netns: &Netns, ends: &Words) -> Result<()> {
    let (mut local, mut remote) = parse(&ends.words)?;
    let flags = local.flags | remote.flags;
    ensure!(EndpointFlags::BACKUP.contains(flags), "create: of the flags only backup has a meaning");
    ensure!(remote.port != 0, "remote: a port is needed");
    // It stands where it is written, and can only be ours.
    local.dev = local.dev.or(remote.dev.take());
    let address = |request: &Request, end: &str| -> Result<Address> {
        let ip = request.ip.with_context(|| format!("{end}: an address is needed"))?;
        Ok(Address { ip, id: request.id, port: request.port, ifindex: request.ifindex(netns)? })
    };
    let (local, remote) = (address(&local, "local")?, address(&remote, "remote")?);
    let connection = Connection::find(netns, ends.token).await?;
    connection.client.create_subflow(ends.token, local, remote, flags).await.map_err(explain)
}

async fn destroy(netns: &Netns, ends: &Words, force: bool) -> Result<()> {
    let (local, remote) = parse_existing(&ends.words)?;
    let connection = Connection::find(netns, ends.token).await?;
    let subflow = choose(&connection.now.subflows, &local, &remote)?;
    if !force {
        connection.keep_a_path(|other| other == subflow)?;
    }
    let (local, remote) = addresses(subflow);
    connection.client.destroy_subflow(ends.token, local, remote).await.map_err(explain)
}

async fn prioritise(netns: &Netns, ends: &Words, backup: bool) -> Result<()> {
    let (local, remote) = parse_existing(&ends.words)?;
    let connection = Connection::find(netns, ends.token).await?;
    let (local, remote) = addresses(choose(&connection.now.subflows, &local, &remote)?);
    connection.client.set_backup(ends.token, local, remote, backup).await.map_err(explain)
}

/// What stands behind local and behind remote.
fn parse(words: &[String]) -> Result<(Request, Request)> {
    let (mut local, mut remote) = (None, None);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let end = if cmd::abbreviates(word, "local") {
            &mut local
        } else if cmd::abbreviates(word, "remote") {
            &mut remote
        } else {
            bail!("'{word}' is neither local nor remote, and nothing that stands behind one")
        };
        let request = Request::take(&mut words)?;
        ensure!(request != Request::default(), "{word}: an address is needed");
        ensure!(end.replace(request).is_none(), "{word}: stands there twice");
    }
    Ok((local.unwrap_or_default(), remote.unwrap_or_default()))
}

/// The ends of a subflow that is there.
fn parse_existing(words: &[String]) -> Result<(Request, Request)> {
    let (local, remote) = parse(words)?;
    for end in [&local, &remote] {
        ensure!(
            end.flags.is_empty() && end.dev.is_none(),
            "a subflow is found by address, id and port of its ends only"
        );
    }
    Ok((local, remote))
}

/// The one subflow that is as wanted.
///
/// Its addresses are those that the kernel compares with: IPv4-mapped on an IPv6 socket, however they were written.
fn choose<'s>(subflows: &'s [Subflow], local: &Request, remote: &Request) -> Result<&'s Subflow> {
    let fits = |end: &Request, addr: SocketAddr, id: AddrId| {
        end.ip.is_none_or(|ip| ip.to_canonical() == addr.ip().to_canonical())
            && (end.port == 0 || end.port == addr.port())
            && end.id.is_none_or(|wanted| wanted == id)
    };
    let mut found =
        subflows.iter().filter(|s| fits(local, s.local, s.local_id) && fits(remote, s.remote, s.remote_id));
    match (found.next(), found.next()) {
        (Some(subflow), None) => Ok(subflow),
        (Some(a), Some(b)) => bail!(
            "several subflows are so, {} to {} and {} to {} among them: name more",
            a.local,
            a.remote,
            b.local,
            b.remote
        ),
        (None, _) => bail!("the connection has no such subflow"),
    }
}

fn addresses(subflow: &Subflow) -> (Address, Address) {
    (
        Address::new(subflow.local, Some(subflow.local_id)),
        Address::new(subflow.remote, Some(subflow.remote_id)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(String::from).collect()
    }

    #[test]
    fn words_belong_to_the_end_before_them_in_any_order() {
        let one = parse(&words("local 10.0.0.1 id 2 dev lo remote 10.0.0.2 port 80 id 3")).unwrap();
        let other = parse(&words("r i 3 p 80 10.0.0.2 lo id 2 d lo 10.0.0.1")).unwrap();
        assert_eq!(one, other);
        assert_eq!((one.0.id, one.0.port, one.0.dev), (Some(AddrId(2)), 0, Some("lo".into())));
        assert_eq!((one.1.id, one.1.port, one.1.dev), (Some(AddrId(3)), 80, None));
    }
}
