//! The mode for the in-kernel path manager: endpoints and limits follow the local addresses.

use mptcp::pm::{Client, Endpoint, EndpointFlags, Limits};

use super::changed::Changed;
use crate::Result;
use crate::policy::Local;
use crate::policy::config::{Config, Kind};

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
    let there = client.endpoints().await?;
    for endpoint in &there {
        if changed.made(endpoint.ip) && !wanted.iter().any(|wanted| is(endpoint, wanted)) {
            changed.delete(client, endpoint).await?;
        }
    }
    for endpoint in &wanted {
        // An address that is somebody else's endpoint is left to them; one made by the kernel itself gives way.
        let taken =
            |there: &&Endpoint| there.ip == endpoint.ip && !there.flags.contains(EndpointFlags::IMPLICIT);
        match there.iter().find(taken) {
            Some(there) if !changed.made(there.ip) || is(there, endpoint) => {}
            _ => changed.add(client, endpoint).await?,
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
