//! Per-namespace sysctls, `net.mptcp.*` and their neighbours, with a guard that puts the old value back.

use std::fs;
use std::path::PathBuf;

use crate::{Error, Netns, Result};

/// Reads `key` (dotted, as `sysctl` takes it: `net.mptcp.enabled`) in `netns`.
pub fn get(netns: &Netns, key: &str) -> Result<String> {
    netns
        .run(|| fs::read_to_string(path(key)))?
        .map(|value| value.trim_end().to_string())
        .map_err(|e| Error::io(format!("read sysctl {key} in {}", netns.name()), e))
}

/// Writes `key` in `netns`.
pub fn set(netns: &Netns, key: &str, value: &str) -> Result<()> {
    netns
        .run(|| fs::write(path(key), value))?
        .map_err(|e| Error::io(format!("set sysctl {key}={value} in {}", netns.name()), e))
}

/// A changed sysctl; dropping the guard restores the value it had.
#[derive(Debug)]
#[must_use = "the old value comes back when the guard is dropped"]
pub struct Guard {
    netns: Netns,
    key: String,
    old: String,
}

impl Guard {
    /// Sets `key` in `netns` and remembers the value it had.
    pub fn set(netns: &Netns, key: &str, value: &str) -> Result<Self> {
        let old = get(netns, key)?;
        set(netns, key, value)?;
        Ok(Guard { netns: netns.clone(), key: key.into(), old })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = set(&self.netns, &self.key, &self.old) {
            tracing::warn!(%error, "sysctl not restored");
        }
    }
}

/// `net.ipv4.conf.eth0/1.rp_filter`: as in sysctl(8), `.` and `/` trade places.
fn path(key: &str) -> PathBuf {
    let relative: String = key
        .chars()
        .map(|c| match c {
            '.' => '/',
            '/' => '.',
            c => c,
        })
        .collect();
    PathBuf::from("/proc/sys").join(relative)
}
