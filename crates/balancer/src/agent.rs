//! A backend's side: what it needs to take a service's packets, set up and undone.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::process::Command;

use mptcp::pm::{Client, Endpoint, EndpointFlags, Limits};
use mptcp::{Netns, sysctl};
use nix::net::if_::if_nametoindex;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Tables;
use crate::neighbour;
use crate::plane::{Hook, Plane};
use crate::report::{self, Secret};
use crate::{Error, Result};

/// What a backend is to take.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The service's addresses, which go on lo.
    pub addresses: Vec<IpAddr>,
    /// The port to announce them with, for joins.
    pub join_port: Option<NonZeroU16>,
    /// Most subflows that join a connection, 0 to 8.
    pub subflows: u32,
    /// Balancers that send IP in IP; empty: none.
    pub tunnel_from: Vec<IpAddr>,
    /// Interfaces that packets of the service come in on.
    pub interfaces: Vec<String>,
    /// Where to tell balancers of connections, and the secret that they must know.
    pub tell: Option<(SocketAddr, Secret)>,
}

/// Sets this network namespace up, calls `ready`, and undoes it at SIGTERM or SIGINT. After an error nothing is left of it.
pub async fn run(setup: &Setup, ready: impl FnOnce()) -> Result<()> {
    let catch = |kind| signal(kind).map_err(|e| Error::io("catch signals", e));
    let (mut terminate, mut interrupt) = (catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?);
    let listener = match &setup.tell {
        None => None,
        Some((addr, secret)) => {
            let listener = TcpListener::bind(addr).await;
            Some((listener.map_err(|e| Error::io(format!("listen on {addr}"), e))?, secret.clone()))
        }
    };
    let _all = Done::new(setup).await?;
    let netns = Netns::current()?;
    let tell = async {
        match listener {
            Some((listener, secret)) => report::serve(listener, secret, netns).await,
            None => std::future::pending().await,
        }
    };
    ready();
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = tell => {}
    }
    Ok(())
}

/// All that was done; dropping it undoes it, the last first.
struct Done {
    // In this order: fields are dropped in it.
    _unwrap: Option<Plane>,
    undo: Vec<Vec<String>>,
    _sysctls: Vec<sysctl::Guard>,
}

impl Done {
    async fn new(setup: &Setup) -> Result<Self> {
        for name in &setup.interfaces {
            if_nametoindex(name.as_str()).map_err(|e| Error::io(format!("interface {name}"), e))?;
        }
        let netns = Netns::current()?;
        let mut done = Done { _unwrap: None, undo: Vec::new(), _sysctls: Vec::new() };
        let mut sysctls = vec![
            // No answer to ARP for the service's addresses, and none of them as the sender of a request.
            ("net.ipv4.conf.all.arp_ignore".to_string(), "1"),
            ("net.ipv4.conf.all.arp_announce".into(), "2"),
            // Clients' packets may come in where the way to them does not lead out.
            ("net.ipv4.conf.all.rp_filter".into(), "0"),
        ];
        sysctls.extend(setup.interfaces.iter().map(|name| (format!("net.ipv4.conf.{name}.rp_filter"), "0")));
        if setup.join_port.is_some() {
            sysctls.push(("net.mptcp.allow_join_initial_addr_port".into(), "0"));
        }
        for (key, value) in sysctls {
            done._sysctls.push(sysctl::Guard::set(&netns, &key, value)?);
        }
        let there = on_lo()?;
        for address in &setup.addresses {
            if there.contains(address) {
                tracing::info!(%address, "is on lo already, and stays there");
                continue;
            }
            let length = if address.is_ipv4() { 32 } else { 128 };
            let nodad: &[&str] = if address.is_ipv4() { &[] } else { &["nodad"] };
            let address = format!("{address}/{length}");
            ip(&[&["address", "add", &address, "dev", "lo"], nodad].concat())?;
            done.undo(&["address", "delete", &address, "dev", "lo"]);
        }
        let pm = Client::connect(&netns).await?;
        let before = pm.limits().await?;
        pm.set_limits(Limits { subflows: setup.subflows, ..before }).await?;
        let [accepted, subflows] = [before.add_addr_accepted, before.subflows].map(|limit| limit.to_string());
        done.undo(&["mptcp", "limits", "set", "add_addr_accepted", &accepted, "subflows", &subflows]);
        if let Some(port) = setup.join_port {
            let there = pm.endpoints().await?;
            for ip in &setup.addresses {
                let same = |e: &&Endpoint| e.ip == *ip && e.port == port.get();
                if there.iter().find(same).is_some_and(|e| e.flags.contains(EndpointFlags::SIGNAL)) {
                    tracing::info!(address = %ip, %port, "is announced already, and stays so");
                    continue;
                }
                let endpoint = Endpoint { port: port.get(), ..Endpoint::new(*ip, EndpointFlags::SIGNAL) };
                pm.add_endpoint(&endpoint).await?;
                if let Some(id) = pm.endpoints().await?.iter().find(same).and_then(|endpoint| endpoint.id) {
                    done.undo(&["mptcp", "endpoint", "delete", "id", &id.to_string()]);
                }
            }
        }
        if !setup.tunnel_from.is_empty() {
            let smallest = Tables { flows: 1024, fresh: 1024, tokens: 1024 };
            let mut plane = Plane::load(Hook::Tc, &smallest, None)?;
            plane.attach_unwrap(&setup.interfaces, &setup.tunnel_from)?;
            done._unwrap = Some(plane);
        }
        Ok(done)
    }

    fn undo(&mut self, command: &[&str]) {
        self.undo.push(command.iter().map(|word| word.to_string()).collect());
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        while let Some(command) = self.undo.pop() {
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            if let Err(error) = ip(&command) {
                tracing::warn!(%error, "not undone");
            }
        }
    }
}

/// The addresses of lo.
fn on_lo() -> Result<Vec<IpAddr>> {
    #[derive(Deserialize)]
    struct Interface {
        addr_info: Vec<Info>,
    }
    #[derive(Deserialize)]
    struct Info {
        local: IpAddr,
    }
    let interfaces: Vec<Interface> = neighbour::ip(&["address", "show", "dev", "lo"])?;
    Ok(interfaces.into_iter().flat_map(|lo| lo.addr_info).map(|info| info.local).collect())
}

/// Runs `ip` with these arguments.
fn ip(arguments: &[&str]) -> Result<()> {
    let what = format!("ip {}", arguments.join(" "));
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("ip")
        .args(arguments)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .map_err(|error| Error::io(format!("run {what} (package iproute2)"), error))?;
    if output.status.success() {
        return Ok(());
    }
    let says = String::from_utf8_lossy(&output.stderr).trim().to_string();
    if says.contains("Operation not permitted") {
        return Err(Error::System(mptcp::Error::Capability { what, capability: "CAP_NET_ADMIN" }));
    }
    Err(Error::io(what, io::Error::other(says)))
}
