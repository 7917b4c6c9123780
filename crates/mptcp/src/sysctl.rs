//! Per-namespace sysctls, `net.mptcp.*` and their neighbours, with a guard that puts the old value back.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::{Error, Netns, Result};

/// Reads `key` (dotted, as `sysctl` takes it: `net.mptcp.enabled`) in `netns`.
pub fn get(netns: &Netns, key: &str) -> Result<String> {
    let what = || format!("read sysctl {key} in network namespace {}", netns.name());
    let path = path(key).map_err(|e| Error::io(what(), e))?;
    let value = netns.run(|| fs::read_to_string(path))?.map_err(|e| Error::io(what(), e))?;
    Ok(value.trim_end().to_string())
}

/// Writes `key` in `netns`. Needs CAP_NET_ADMIN in the user namespace that owns it.
pub fn set(netns: &Netns, key: &str, value: &str) -> Result<()> {
    let what = || format!("set sysctl {key}={value} in network namespace {}", netns.name());
    let path = path(key).map_err(|e| Error::io(what(), e))?;
    // The line feed makes an empty value something to write.
    netns.run(|| fs::write(path, format!("{value}\n")))?.map_err(|e| match e.kind() {
        io::ErrorKind::PermissionDenied => Error::Capability { what: what(), capability: "CAP_NET_ADMIN" },
        _ => Error::io(what(), e),
    })
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

/// `net.ipv4.conf.eth0/1.rp_filter`: as in sysctl(8), `.` and `/` trade places. A key never leads out of
/// `/proc/sys`.
fn path(key: &str) -> io::Result<PathBuf> {
    let mut path = PathBuf::from("/proc/sys");
    for part in key.split('.') {
        let name = part.replace('/', ".");
        if matches!(name.as_str(), "" | "." | "..") {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a sysctl"));
        }
        path.push(name);
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_a_file_below_proc_sys() {
        assert_eq!(path("net.mptcp.enabled").unwrap(), PathBuf::from("/proc/sys/net/mptcp/enabled"));
        assert_eq!(
            path("net.ipv4.conf.eth0/1.rp_filter").unwrap(),
            PathBuf::from("/proc/sys/net/ipv4/conf/eth0.1/rp_filter")
        );
        for key in ["", ".etc.passwd", "net..mptcp", "net.//.//.x", "net./", "net."] {
            assert!(path(key).is_err(), "{key}");
        }
    }

    #[test]
    fn the_guard_puts_the_old_value_back_also_on_panic() {
        let netns = Netns::anonymous().unwrap();
        let default = get(&netns, "net.mptcp.add_addr_timeout").unwrap();
        {
            let _guard = Guard::set(&netns, "net.mptcp.add_addr_timeout", "3").unwrap();
            assert_eq!(get(&netns, "net.mptcp.add_addr_timeout").unwrap(), "3");
        }
        assert_eq!(get(&netns, "net.mptcp.add_addr_timeout").unwrap(), default);
        let inside = netns.clone();
        let panicked = std::thread::spawn(move || {
            let _guard = Guard::set(&inside, "net.mptcp.add_addr_timeout", "5").unwrap();
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert_eq!(get(&netns, "net.mptcp.add_addr_timeout").unwrap(), default);
    }

    #[test]
    fn the_guard_restores_an_empty_value() {
        let netns = Netns::anonymous().unwrap();
        assert_eq!(get(&netns, "net.ipv4.ip_local_reserved_ports").unwrap(), "");
        drop(Guard::set(&netns, "net.ipv4.ip_local_reserved_ports", "8080").unwrap());
        assert_eq!(get(&netns, "net.ipv4.ip_local_reserved_ports").unwrap(), "");
    }

    #[test]
    fn a_sysctl_belongs_to_its_namespace() {
        let (one, other) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        set(&one, "net.mptcp.stale_loss_cnt", "7").unwrap();
        assert_ne!(get(&other, "net.mptcp.stale_loss_cnt").unwrap(), "7");
        assert_eq!(get(&one, "net.mptcp.stale_loss_cnt").unwrap(), "7");
    }

    #[test]
    fn errors_name_the_key_and_the_value() {
        let netns = Netns::anonymous().unwrap();
        let absent = get(&netns, "net.mptcp.nonsense").unwrap_err().to_string();
        assert_eq!(
            absent,
            "read sysctl net.mptcp.nonsense in network namespace anonymous: No such file or directory"
        );
        let refused = Guard::set(&netns, "net.mptcp.enabled", "maybe").unwrap_err().to_string();
        assert_eq!(
            refused,
            "set sysctl net.mptcp.enabled=maybe in network namespace anonymous: Invalid argument"
        );
    }
}
