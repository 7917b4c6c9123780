//! What the daemon has changed in its namespace, written down before it is changed, so that it can be put back: at the
//! end of this daemon, or of one that takes over after this one was killed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use mptcp::pm::{Client, Endpoint, Limits};
use mptcp::{Netns, sysctl};
use serde::{Deserialize, Serialize};

use crate::Result;

/// See above. [`Changed::restore`] puts everything back.
pub struct Changed {
    netns: Netns,
    file: PathBuf,
    old: Old,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Old {
    sysctls: BTreeMap<String, String>,
    limits: Option<(u32, u32)>,
    endpoints: BTreeSet<IpAddr>,
}

impl Changed {
    /// What a daemon before this one has left at `file` to be put back, if anything.
    pub fn open(netns: &Netns, file: &Path) -> Result<Self> {
        let what = || format!("read {}", file.display());
        let old = match std::fs::read(file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| mptcp::Error::io(what(), e))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Old::default(),
            Err(error) => return Err(mptcp::Error::io(what(), error).into()),
        };
        Ok(Changed { netns: netns.clone(), file: file.into(), old })
    }

    /// Sets a sysctl of the namespace.
    pub fn sysctl(&mut self, key: &str, value: &str) -> Result<()> {
        let now = sysctl::get(&self.netns, key)?;
        self.old.sysctls.entry(key.into()).or_insert(now);
        self.write()?;
        Ok(sysctl::set(&self.netns, key, value)?)
    }

    /// Gives a sysctl the value back that it had before [`Changed::sysctl`], if that has set it.
    pub fn sysctl_back(&mut self, key: &str) -> Result<()> {
        let Some(old) = self.old.sysctls.get(key) else { return Ok(()) };
        sysctl::set(&self.netns, key, old)?;
        self.old.sysctls.remove(key);
        self.write()
    }

    /// Sets the limits of the in-kernel path manager.
    pub async fn limits(&mut self, client: &Client, limits: Limits) -> Result<()> {
        let now = client.limits().await?;
        self.old.limits.get_or_insert((now.add_addr_accepted, now.subflows));
        self.write()?;
        Ok(client.set_limits(limits).await?)
    }

    /// Adds an endpoint.
    pub async fn add(&mut self, client: &Client, endpoint: &Endpoint) -> Result<()> {
        self.old.endpoints.insert(endpoint.ip);
        self.write()?;
        let added = client.add_endpoint(endpoint).await;
        if added.is_err() {
            self.old.endpoints.remove(&endpoint.ip);
            self.write()?;
        }
        Ok(added?)
    }

    /// Takes away an endpoint that [`Changed::add`] made.
    pub async fn delete(&mut self, client: &Client, endpoint: &Endpoint) -> Result<()> {
        if let Some(id) = endpoint.id {
            client.delete_endpoint(id, None).await?;
        }
        self.old.endpoints.remove(&endpoint.ip);
        self.write()
    }

    /// Is the endpoint with the address `ip` one that [`Changed::add`] made?
    pub fn made(&self, ip: IpAddr) -> bool {
        self.old.endpoints.contains(&ip)
    }

    /// Puts everything back. What cannot be is logged.
    pub async fn restore(mut self, client: &Client) {
        for (key, value) in std::mem::take(&mut self.old.sysctls) {
            if let Err(error) = sysctl::set(&self.netns, &key, &value) {
                tracing::warn!(%error, "sysctl not restored");
            }
        }
        if let Some((add_addr_accepted, subflows)) = self.old.limits.take()
            && let Err(error) = client.set_limits(Limits { add_addr_accepted, subflows }).await
        {
            tracing::warn!(%error, "limits not restored");
        }
        match client.endpoints().await {
            Ok(endpoints) => {
                for endpoint in endpoints.iter().filter(|endpoint| self.old.endpoints.contains(&endpoint.ip))
                {
                    let Some(id) = endpoint.id else { continue };
                    if let Err(error) = client.delete_endpoint(id, None).await {
                        tracing::warn!(%error, "endpoint not removed");
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "endpoints not removed"),
        }
        if let Err(error) = std::fs::remove_file(&self.file) {
            tracing::debug!(%error, "nothing was changed");
        }
    }

    fn write(&self) -> Result<()> {
        let what = || format!("write {}", self.file.display());
        let bytes = serde_json::to_vec(&self.old).map_err(|e| mptcp::Error::io(what(), e))?;
        // Whoever reads it sees the old or the new one.
        let part = self.file.with_extension("part");
        let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, &self.file));
        Ok(written.map_err(|e| {
            let _ = std::fs::remove_file(&part);
            mptcp::Error::io(what(), e)
        })?)
    }
}
