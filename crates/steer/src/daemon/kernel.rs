//! The mode for the in-kernel path manager: endpoints and limits follow the local addresses.

use mptcp::pm::{Client, Endpoint, EndpointFlags, Limits};

use super::changed::Changed;
use crate::policy::Local;
use crate::policy::config::{Config, Kind};
use crate::{Error, Result};

/// Adds the endpoints that are missing, and takes away those of ours whose address is gone or is to be used in another
/// way. Endpoints that others made stay as they are.
pub async fn align(
    client: &Client,
    changed: &mut Changed,
    config: &Config,
    addresses: &[Local],
) -> Result<()> {
    let most = u32::from(config.default.max_subflows);
    let limits = Limits { add_addr_accepted: most, subflows: most };
    if client.limits().await? != limits {
        changed.limits(client, limits).await?;
    }
    let wanted = wanted(config, addresses);
    let mut there = Vec::new();
    for endpoint in client.endpoints().await? {
        if changed.made(endpoint.ip) && !wanted.iter().any(|wanted| is(&endpoint, wanted)) {
            changed.delete(client, &endpoint).await?;
        } else {
            there.push(endpoint);
        }
    }
    for endpoint in &wanted {
        // An address that is somebody else's endpoint is left to them; one made by the kernel itself gives way.
        let taken =
            |there: &&Endpoint| there.ip == endpoint.ip && !there.flags.contains(EndpointFlags::IMPLICIT);
        match there.iter().find(taken) {
            Some(_) => {}
            None => match changed.add(client, endpoint).await {
                // Kernels take 8 or so; there is room when an address has gone.
                Err(Error::Kernel(error @ mptcp::Error::Kernel { .. })) => {
                    tracing::warn!(%error, "an address is not used");
                }
                added => added?,
            },
        }
    }
    Ok(())
}

/// The endpoints that there should be. The kernel has no policies: `fullmesh` is a flag of its own, and the others
/// are one subflow from each address.
fn wanted(config: &Config, addresses: &[Local]) -> Vec<Endpoint> {
    let usable = addresses.iter().filter(|local| config.uses(&local.interface));
    let endpoint = |local: &Local| {
        let mut flags = EndpointFlags::SUBFLOW;
        flags.set(EndpointFlags::FULLMESH, config.default.policy == Kind::Fullmesh);
        flags.set(EndpointFlags::SIGNAL, config.default.announce && config.default.policy != Kind::Fullmesh);
        flags.set(EndpointFlags::BACKUP, config.is_metered(&local.interface));
        Endpoint { ifindex: local.ifindex, ..Endpoint::new(local.ip, flags) }
    };
    usable.map(endpoint).collect()
}

fn is(there: &Endpoint, wanted: &Endpoint) -> bool {
    (there.ip, there.flags, there.ifindex) == (wanted.ip, wanted.flags, wanted.ifindex)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use mptcp::Netns;

    use super::*;

    struct Host {
        netns: Netns,
        client: Client,
        changed: Changed,
        notes: tempfile::TempDir,
    }

    impl Host {
        async fn new() -> Self {
            let netns = Netns::anonymous().unwrap();
            let notes = tempfile::tempdir().unwrap();
            let changed = Changed::open(&netns, &notes.path().join("changed.json")).unwrap();
            Host { client: Client::connect(&netns).await.unwrap(), netns, changed, notes }
        }

        /// By a daemon that has only the notes of this one.
        async fn restored(self) -> Self {
            let file = self.notes.path().join("changed.json");
            drop(self.changed);
            Changed::open(&self.netns, &file).unwrap().restore(&self.client).await;
            let changed = Changed::open(&self.netns, &file).unwrap();
            Host { changed, ..self }
        }

        async fn align(&mut self, toml: &str, addresses: &[Local]) -> Vec<String> {
            let config = Config::from_toml(toml, "pm.toml").unwrap();
            align(&self.client, &mut self.changed, &config, addresses).await.unwrap();
            self.endpoints().await
        }

        async fn endpoints(&self) -> Vec<String> {
            let flags =
                |e: &Endpoint| e.flags.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(" ");
            let endpoints = self.client.endpoints().await.unwrap();
            let mut endpoints: Vec<_> =
                endpoints.iter().map(|e| format!("{} dev {} {}", e.ip, e.ifindex, flags(e))).collect();
            endpoints.sort();
            endpoints
        }

        async fn somebody_adds(&self, ip: &str, flags: EndpointFlags) {
            self.client.add_endpoint(&Endpoint::new(ip.parse().unwrap(), flags)).await.unwrap();
        }
    }

    /// Its interface is `lo`, the only one there is, whatever the name.
    fn local(ip: &str, interface: &str) -> Local {
        Local { ip: ip.parse::<IpAddr>().unwrap(), prefix: 24, ifindex: 1, interface: interface.into() }
    }

    #[tokio::test]
    async fn endpoints_are_what_the_file_says_also_when_it_says_something_else() {
        let mut host = Host::new().await;
        let addresses = [local("10.0.0.1", "eth0"), local("fd00::1", "wwan0"), local("10.0.9.1", "docker0")];
        let interfaces = "[[interface]]\nname = \"docker*\"\nuse = false\n\
                          [[interface]]\nname = \"wwan0\"\nmetered = true\n";
        for (toml, wanted) in [
            ("", ["10.0.0.1 dev 1 SUBFLOW FULLMESH", "fd00::1 dev 1 SUBFLOW BACKUP FULLMESH"]),
            ("[default]\npolicy = \"single\"\n", ["10.0.0.1 dev 1 SUBFLOW", "fd00::1 dev 1 SUBFLOW BACKUP"]),
            (
                "[default]\npolicy = \"aggregate\"\nannounce = true\n",
                ["10.0.0.1 dev 1 SIGNAL SUBFLOW", "fd00::1 dev 1 SIGNAL SUBFLOW BACKUP"],
            ),
        ] {
            assert_eq!(host.align(&format!("{toml}{interfaces}"), &addresses).await, wanted);
        }
        assert_eq!(host.align(interfaces, &addresses[2..]).await, [""; 0]);
    }

    #[tokio::test]
    async fn what_somebody_else_made_stays_also_at_an_address_of_ours() {
        let mut host = Host::new().await;
        host.somebody_adds("10.0.0.1", EndpointFlags::SIGNAL).await;
        host.somebody_adds("192.0.2.1", EndpointFlags::SUBFLOW).await;
        let addresses = [local("10.0.0.1", "eth0"), local("10.0.1.1", "eth1")];
        let theirs = host.endpoints().await;
        assert_eq!(theirs, ["10.0.0.1 dev 0 SIGNAL", "192.0.2.1 dev 0 SUBFLOW"]);
        let all = [&theirs[0], "10.0.1.1 dev 1 SUBFLOW FULLMESH", &theirs[1]];
        for (addresses, wanted) in [(&addresses[..], &all[..]), (&[], &[all[0], all[2]]), (&addresses, &all)]
        {
            assert_eq!(host.align("", addresses).await, wanted);
        }
        host = host.restored().await;
        assert_eq!(host.endpoints().await, theirs);
    }

    #[tokio::test]
    async fn addresses_that_the_kernel_has_no_room_for_wait_until_it_has() {
        let mut host = Host::new().await;
        let addresses: Vec<Local> = (0..=255)
            .map(|n| local(&format!("10.0.{n}.1"), "eth0"))
            .chain([local("fd00::1", "eth0")])
            .collect();
        let some = host.align("", &addresses).await.len();
        assert!((8..addresses.len()).contains(&some), "{some}");
        let last = &addresses[addresses.len() - 2..];
        let used = host.align("", last).await;
        assert_eq!(used, ["10.0.255.1 dev 1 SUBFLOW FULLMESH", "fd00::1 dev 1 SUBFLOW FULLMESH"]);
        host = host.restored().await;
        assert_eq!(host.endpoints().await, [""; 0]);
    }

    #[tokio::test]
    async fn limits_are_those_of_the_file_and_in_the_end_what_they_were() {
        let mut host = Host::new().await;
        let before = Limits { add_addr_accepted: 1, subflows: 3 };
        host.client.set_limits(before).await.unwrap();
        for most in [4, 7] {
            host.align(&format!("[default]\nmax_subflows = {most}\n"), &[]).await;
            let limits = Limits { add_addr_accepted: most, subflows: most };
            assert_eq!(host.client.limits().await.unwrap(), limits);
        }
        host = host.restored().await;
        assert_eq!(host.client.limits().await.unwrap(), before);
    }
}
