//! A look at the connections: what the kernel has, in the policy's terms.

use std::collections::{BTreeMap, BTreeSet};

use mptcp::diag::{self, SubflowFlags};
use mptcp::pm::Client;
use mptcp::{Netns, Token};

use crate::Result;
use crate::policy::config::Identity;
use crate::policy::{Seen, State, Subflow};

/// What does not change in a connection's life, and is asked for once.
#[derive(Default)]
pub struct Looker {
    known: BTreeMap<Token, Known>,
}

struct Known {
    /// The socket, since a token may be given again.
    inode: u32,
    identity: Identity,
    /// Of the userspace path manager: the kernel lets nobody steer others.
    steerable: bool,
}

impl Looker {
    /// The connections of `netns` that can be steered. `with_owners` also finds out whose the new ones are.
    pub async fn look(&mut self, netns: &Netns, client: &Client, with_owners: bool) -> Result<Vec<Seen>> {
        let mut connections = diag::connections_without_owners(netns).await?;
        let fresh = |known: &BTreeMap<Token, Known>, c: &diag::Connection| {
            // A program that accepts gives the socket its inode.
            known.get(&c.token).is_none_or(|known| known.inode != c.inode)
        };
        if with_owners && connections.iter().any(|c| fresh(&self.known, c)) {
            connections = diag::connections(netns).await?;
        }
        // What falls back, ends, or never leaves this host is left alone.
        connections
            .retain(|c| !c.info.is_fallback() && STEERED.contains(&c.state.as_str()) && !is_within_host(c));
        let tokens: BTreeSet<Token> = connections.iter().map(|c| c.token).collect();
        self.known.retain(|token, _| tokens.contains(token));
        for connection in connections
            .iter()
            .filter(|c| !self.known.contains_key(&c.token) || fresh(&self.known, c))
            .collect::<Vec<_>>()
        {
            let known = Known {
                inode: connection.inode,
                identity: identity(connection),
                // One that has ended meanwhile is gone at the next look.
                steerable: client.is_userspace(connection.token).await.unwrap_or(false),
            };
            self.known.insert(connection.token, known);
        }
        let steerable = connections.into_iter().filter(|c| self.known[&c.token].steerable);
        Ok(steerable.map(|c| seen(&c, &self.known[&c.token].identity)).collect())
    }
}

/// States of a connection over which data may still go.
const STEERED: [&str; 3] = ["ESTAB", "CLOSE-WAIT", "FIN-WAIT-1"];

/// There the kernel chooses the same address for both ends.
fn is_within_host(connection: &diag::Connection) -> bool {
    let [local, remote] = [connection.local, connection.remote].map(|end| end.ip().to_canonical());
    local == remote || remote.is_loopback()
}

fn identity(connection: &diag::Connection) -> Identity {
    let cgroup = |pid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        // The unified hierarchy's line is `0::/system.slice/x.service`.
        text.lines().find_map(|line| line.strip_prefix("0::").map(str::to_string))
    };
    Identity {
        programs: connection.owners.iter().map(|owner| owner.program.clone()).collect(),
        cgroups: connection.owners.iter().filter_map(|owner| cgroup(owner.pid)).collect(),
        uid: connection.uid,
    }
}

fn seen(connection: &diag::Connection, identity: &Identity) -> Seen {
    let opened = SubflowFlags::CAPABLE_LOCAL | SubflowFlags::JOIN_LOCAL;
    Seen {
        token: connection.token,
        ours: connection.subflows.iter().any(|s| s.flags.intersects(opened)),
        local: connection.local,
        remote: connection.remote,
        identity: identity.clone(),
        subflows: connection.subflows.iter().map(subflow).collect(),
    }
}

fn subflow(subflow: &diag::Subflow) -> Subflow {
    Subflow {
        local: subflow.local,
        remote: subflow.remote,
        local_id: subflow.local_id,
        remote_id: subflow.remote_id,
        state: match subflow.state.as_str() {
            "ESTAB" => State::Open,
            "SYN-SENT" | "SYN-RECV" => State::Opening,
            _ => State::Closing,
        },
        ours: subflow.flags.intersects(SubflowFlags::CAPABLE_LOCAL | SubflowFlags::JOIN_LOCAL),
        backup: subflow.flags.contains(SubflowFlags::BACKUP_LOCAL),
        rtt: std::time::Duration::from_micros(subflow.tcp.rtt_us.into()),
        acked: subflow.tcp.bytes_acked,
        last_ack: std::time::Duration::from_millis(subflow.tcp.last_ack_recv_ms.into()),
        received: subflow.tcp.bytes_received,
        in_flight: subflow.tcp.unacked,
        timeouts: subflow.tcp.timeouts,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};

    use mptcp::socket::{self, Options};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::daemon::one_link;

    fn at(netns: &Netns) -> Options {
        Options { netns: Some(netns.clone()), ..Options::default() }
    }

    async fn look(looker: &mut Looker, netns: &Netns, with_owners: bool) -> Vec<Seen> {
        let client = Client::connect(netns).await.unwrap();
        looker.look(netns, &client, with_owners).await.unwrap()
    }

    /// Looks until all is as `wanted`.
    async fn until(
        looker: &mut Looker,
        netns: &Netns,
        with_owners: bool,
        wanted: impl Fn(&[Seen]) -> bool,
    ) -> Vec<Seen> {
        let give_up = Instant::now() + Duration::from_secs(30);
        loop {
            let seen = look(looker, netns, with_owners).await;
            if wanted(&seen) {
                return seen;
            }
            assert!(Instant::now() < give_up, "{seen:#?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A connection from one node to another, with data in both directions.
    async fn connect(from: &Netns, to: &Netns, addr: &str) -> (TcpStream, TcpStream) {
        let listener = socket::listen(addr.parse().unwrap(), &at(to)).unwrap();
        let options = at(from);
        let dial = socket::connect(listener.local_addr().unwrap(), &options);
        let (ours, theirs) = tokio::join!(dial, listener.accept());
        let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap().0);
        ours.write_all(b"hello").await.unwrap();
        theirs.read_exact(&mut [0; 5]).await.unwrap();
        theirs.write_all(b"hello").await.unwrap();
        ours.read_exact(&mut [0; 5]).await.unwrap();
        (ours, theirs)
    }

    #[tokio::test]
    async fn connections_of_the_userspace_path_manager_are_seen_from_both_ends_as_they_are() {
        let lab = one_link().await;
        let (here, there) = (lab.netns("here"), lab.netns("there"));
        let (out, _out) = connect(here, there, "10.0.1.2:0").await;
        let (_in, inward) = connect(there, here, "10.0.1.1:0").await;
        let _within = (connect(here, here, "10.0.1.1:0").await, connect(here, here, "127.0.0.1:0").await);
        // A plain TCP server: the client's socket is an MPTCP one that fell back.
        let tcp = there.run(|| std::net::TcpListener::bind("10.0.1.2:0")).unwrap().unwrap();
        let _fallback = socket::connect(tcp.local_addr().unwrap(), &at(here)).await.unwrap();

        let mut looker = Looker::default();
        let acknowledged = |seen: &[Seen]| seen.iter().flat_map(|s| &s.subflows).all(|s| s.in_flight == 0);
        let seen = until(&mut looker, here, false, acknowledged).await;
        let ends = |s: &Seen| (s.ours, s.local, s.remote);
        let mut wanted = [(true, &out), (false, &inward)]
            .map(|(ours, end)| (ours, end.local_addr().unwrap(), end.peer_addr().unwrap()));
        let mut found: Vec<(bool, SocketAddr, SocketAddr)> = seen.iter().map(ends).collect();
        wanted.sort();
        found.sort();
        assert_eq!(found, wanted);
        for seen in &seen {
            let [subflow] = &seen.subflows[..] else { panic!("{seen:?}") };
            assert_eq!((subflow.local, subflow.remote), (seen.local, seen.remote));
            assert_eq!((subflow.state, subflow.ours, subflow.backup), (State::Open, seen.ours, false));
            assert_eq!((subflow.received, subflow.in_flight, subflow.timeouts), (5, 0, 0));
            assert!(!subflow.rtt.is_zero());
        }
        // The other ends have the in-kernel path manager.
        assert_eq!(look(&mut Looker::default(), there, false).await, []);

        drop((_out, out));
        let left = until(&mut looker, here, false, |seen| seen.len() == 1).await;
        assert!(!left[0].ours);
    }

    #[tokio::test]
    async fn whose_a_connection_is_is_known_once_a_program_has_it() {
        let lab = one_link().await;
        let (here, there) = (lab.netns("here"), lab.netns("there"));
        let listener = socket::listen("10.0.1.1:80".parse().unwrap(), &at(here)).unwrap();
        let mut client = socket::connect("10.0.1.1:80".parse().unwrap(), &at(there)).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        let mut looker = Looker::default();
        let seen = until(&mut looker, here, true, |seen| seen.len() == 1).await;
        assert_eq!(seen[0].identity.programs, BTreeSet::new());
        let _accepted = listener.accept().await.unwrap();
        let us = std::fs::read_to_string("/proc/self/comm").unwrap();
        let seen = look(&mut looker, here, true).await;
        assert_eq!(seen[0].identity.programs, [us.trim_end().to_string()].into());
        assert_eq!(seen[0].identity.uid, nix::unistd::geteuid().as_raw());
        let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let unified = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
        assert_eq!(seen[0].identity.cgroups, unified.into_iter().map(str::to_string).collect());
        // Nobody asks again.
        assert_eq!(look(&mut looker, here, false).await[0].identity, seen[0].identity);
        assert_eq!(look(&mut Looker::default(), here, false).await[0].identity.programs, BTreeSet::new());
    }
}
