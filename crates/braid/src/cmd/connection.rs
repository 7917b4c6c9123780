//! The connection that `braid subflow` and `braid address` act on, and how both are told of it.

use anyhow::{Context, Result, ensure};
use mptcp::diag::{self, Subflow};
use mptcp::pm::Client;
use mptcp::{Error, Netns, Token};

#[derive(Debug, clap::Args)]
pub struct Words {
    /// The connection's token, as `braid show` and `braid monitor` print it
    #[arg(long, value_name = "HEX")]
    pub token: Token,
    /// What the first line of this help names
    #[arg(value_name = "WORD", required = true)]
    pub words: Vec<String>,
}

/// A connection and the path manager that acts on it.
pub struct Connection {
    pub client: Client,
    pub now: diag::Connection,
}

impl Connection {
    pub async fn find(netns: &Netns, token: Token) -> Result<Self> {
        let connections = diag::connections(netns).await?;
        let now = connections.into_iter().find(|connection| connection.token == token);
        let now = now.with_context(|| format!("token {token}: there is no such connection"))?;
        Ok(Connection { client: Client::connect(netns).await?, now })
    }

    /// Refuses what takes the last path: the connection would hang, and then die.
    pub fn keep_a_path(&self, takes: impl Fn(&Subflow) -> bool) -> Result<()> {
        let (taken, kept): (Vec<_>, Vec<_>) = self
            .now
            .subflows
            .iter()
            .filter(|subflow| subflow.state == "ESTAB")
            .partition(|subflow| takes(subflow));
        ensure!(
            taken.is_empty() || !kept.is_empty(),
            "connection {} would be without a path (--force does it all the same)",
            self.now.token
        );
        Ok(())
    }
}

/// Says what to do about the kernel's refusal.
pub fn explain(error: Error) -> anyhow::Error {
    if error.is_in_kernel_path_manager() {
        return anyhow::Error::from(error).context(
            "the connection has the in-kernel path manager, and obeys `braid endpoint` \
             (with net.mptcp.pm_type=1 new ones have the userspace path manager)",
        );
    }
    error.into()
}
