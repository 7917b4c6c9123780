//! Prints what the path manager does: `watch`, or `watch NAME` for a namespace of `ip netns`. Needs CAP_NET_ADMIN.
#![allow(clippy::print_stdout)] // what it prints is what it is for

use mptcp::pm::{Events, Notice};
use mptcp::{Netns, Result, diag};

#[tokio::main]
async fn main() -> Result<()> {
    let netns = match std::env::args().nth(1) {
        Some(name) => Netns::named(&name)?,
        None => Netns::current()?,
    };
    // Subscribe first and list then: so no connection is missed.
    let mut events = Events::subscribe(&netns)?;
    list(&netns).await?;
    loop {
        match events.next().await? {
            Notice::Event(event) => {
                let token = event.token.map(|token| token.to_string()).unwrap_or_default();
                let ip = event.local_ip.or(event.remote_ip).map(|ip| ip.to_string()).unwrap_or_default();
                println!("{} {token} {ip}", event.kind);
            }
            Notice::Overrun => list(&netns).await?,
        }
    }
}

async fn list(netns: &Netns) -> Result<()> {
    let connections = diag::connections(netns).await?;
    println!("{} connections", connections.len());
    for connection in connections {
        println!("{} {} to {}", connection.token, connection.local, connection.remote);
    }
    Ok(())
}
