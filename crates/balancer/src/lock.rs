//! Who balances what on this host: each balancer's program holds a file locked, which says what the balancer has.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};

use crate::config::{Config, PINS};
use crate::{Error, Result, plane};

const LOCKS: &str = "/run/braid-lb";

/// The lock of a balancer. Dropping it removes its file, unless the data plane goes on without the program.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    file: Flock<File>,
}

/// What a balancer has, as its file says it.
#[derive(Debug, Serialize, Deserialize)]
struct Claim {
    netns: PathBuf,
    pins: Option<PathBuf>,
    interfaces: Vec<String>,
    ends: Vec<SocketAddr>,
}

impl Lock {
    /// Fails where the balancer `name` runs already. There may be many of a name that are not `pinned`.
    pub fn take(name: &str, pinned: bool) -> Result<Self> {
        let file_name = if pinned { name.to_string() } else { format!("{name}.{}", std::process::id()) };
        let path = Path::new(LOCKS).join(&file_name);
        let failed = |error: io::Error| Error::io(format!("lock {}", path.display()), error);
        std::fs::create_dir_all(LOCKS).map_err(failed)?;
        let _all = all().map_err(failed)?;
        let file = OpenOptions::new().create(true).read(true).append(true).open(&path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Lock { path, file }),
            Err((_, Errno::EWOULDBLOCK)) => {
                let holder = Self::holder(&file_name).map(|pid| format!(" (pid {pid})")).unwrap_or_default();
                Err(Error::Balancer { name: name.into(), message: format!("runs already{holder}") })
            }
            Err((_, error)) => Err(failed(error.into())),
        }
    }

    /// From now on the addresses and ports of `config` are this balancer's on its interfaces, and nothing else is. Fails
    /// where another balancer has one of them; then nothing has changed.
    pub fn claim(&self, config: &Config) -> Result<()> {
        let failed = |error: io::Error| Error::io(format!("write {}", self.path.display()), error);
        let claim = Claim {
            netns: std::fs::read_link("/proc/thread-self/ns/net").map_err(failed)?,
            pins: config.pin_directory(),
            interfaces: config.interfaces.clone(),
            ends: config.services.iter().flat_map(|service| service.ends()).collect(),
        };
        let _all = all().map_err(failed)?;
        for entry in std::fs::read_dir(LOCKS).map_err(failed)?.flatten() {
            let path = entry.path();
            if path == self.path {
                continue;
            }
            let Some(other) = read(&path).filter(|other| other.netns == claim.netns) else { continue };
            let same = |a: &String| other.interfaces.contains(a);
            let (Some(interface), Some(end)) = (
                claim.interfaces.iter().find(|interface| same(interface)),
                claim.ends.iter().find(|end| other.ends.contains(end)),
            ) else {
                continue;
            };
            let file_name = entry.file_name().to_string_lossy().into_owned();
            let running = is_locked(&path).map_err(failed)?;
            if !running && !other.goes_on() {
                continue;
            }
            return Err(Error::Balancer {
                name: config.name.clone(),
                message: format!("{end} on {interface} is {}", other.describe(&file_name, running)),
            });
        }
        let text = serde_json::to_vec(&claim).map_err(|error| failed(error.into()))?;
        self.file.set_len(0).and_then(|()| (&*self.file).write_all(&text)).map_err(failed)
    }

    /// The process that holds the lock of the pinned balancer `name`, as far as this process may see it.
    pub fn holder(name: &str) -> Option<u32> {
        let file = std::fs::metadata(Path::new(LOCKS).join(name)).ok()?;
        let id = format!("{:02x}:{:02x}:{}", major(file.dev()), minor(file.dev()), file.ino());
        // `1: FLOCK  ADVISORY  WRITE 708 00:1b:1234 0 EOF`
        std::fs::read_to_string("/proc/locks").ok()?.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [_, "FLOCK", _, "WRITE", pid, file, ..] if file == id => pid.parse().ok(),
                _ => None,
            }
        })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // So that nobody opens the file before it is removed and locks it after.
        let all = all();
        if read(&self.path).is_some_and(|claim| claim.goes_on()) {
            return;
        }
        if let Err(error) = all.and_then(|_all| std::fs::remove_file(&self.path)) {
            tracing::debug!(%error, "lock not removed");
        }
    }
}

impl Claim {
    /// Does the kernel balance without the program?
    fn goes_on(&self) -> bool {
        self.pins.as_ref().is_some_and(|pins| plane::is_attached(pins))
    }

    /// Whose it is, of the one with this file.
    fn describe(&self, file_name: &str, running: bool) -> String {
        let (name, pid) = match file_name.split_once('.') {
            Some((name, pid)) => (name, Some(pid.to_string())),
            None => (file_name, Lock::holder(file_name).map(|pid| pid.to_string())),
        };
        let program = match (running, pid) {
            (false, _) => "its program does not run".to_string(),
            (true, Some(pid)) => format!("pid {pid}"),
            (true, None) => "its program runs".to_string(),
        };
        let Some(pins) = self.pins.as_ref().and_then(|pins| pins.parent()) else {
            return format!("balancer {name}'s already ({program})");
        };
        let pins =
            if pins == Path::new(PINS) { String::new() } else { format!(" --pins {}", pins.display()) };
        format!("balancer {name}'s already ({program}; `braid lb down {name}{pins}` ends it)")
    }
}

/// Held while files come, go or are compared.
fn all() -> io::Result<Flock<File>> {
    Flock::lock(File::open(LOCKS)?, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
}

/// What the balancer with this file has, if it has said so.
fn read(path: &Path) -> Option<Claim> {
    let mut text = Vec::new();
    File::open(path).ok()?.read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

fn is_locked(path: &Path) -> io::Result<bool> {
    match Flock::lock(File::open(path)?, FlockArg::LockSharedNonblock) {
        Ok(_) => Ok(false),
        Err((_, Errno::EWOULDBLOCK)) => Ok(true),
        Err((_, error)) => Err(error.into()),
    }
}
