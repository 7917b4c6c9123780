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
        // What falls back, or ends, is left alone.
        connections.retain(|c| !c.info.is_fallback() && STEERED.contains(&c.state.as_str()));
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
        received: subflow.tcp.bytes_received,
        in_flight: subflow.tcp.unacked,
        timeouts: subflow.tcp.timeouts,
    }
}
