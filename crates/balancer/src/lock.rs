//! One balancer of each name on a host: its program holds a file locked.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{major, minor};

use crate::{Error, Result};

const LOCKS: &str = "/run/braid-lb";

/// The lock of a balancer that is pinned; dropping it removes its file.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: Flock<File>,
}

impl Lock {
    /// Fails where the balancer `name` runs already.
    pub fn take(name: &str) -> Result<Self> {
        let path = Path::new(LOCKS).join(name);
        let failed = |error: io::Error| Error::io(format!("lock {}", path.display()), error);
        std::fs::create_dir_all(LOCKS).map_err(failed)?;
        loop {
            let file = OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    // The holder before may have removed it between opening and locking.
                    let here = file.metadata().map_err(failed)?.ino();
                    if std::fs::metadata(&path).map(|there| there.ino()).ok() == Some(here) {
                        return Ok(Lock { path, _file: file });
                    }
                }
                Err((_, Errno::EWOULDBLOCK)) => {
                    let holder = Self::holder(name).map(|pid| format!(" (pid {pid})")).unwrap_or_default();
                    let message = format!("runs already{holder}");
                    return Err(Error::Balancer { name: name.into(), message });
                }
                Err((_, error)) => return Err(failed(error.into())),
            }
        }
    }

    /// The process that holds the lock of the balancer `name`, as far as this process may see it.
    pub fn holder(name: &str) -> Option<u32> {
        let file = std::fs::metadata(Path::new(LOCKS).join(name)).ok()?;
        let id = format!("{:02x}:{:02x}:{}", major(file.dev()), minor(file.dev()), file.ino());
        // `1: FLOCK  ADVISORY  WRITE 708 00:1b:1234 0 EOF`
        std::fs::read_to_string("/proc/locks").ok()?.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [_, "FLOCK", _, _, pid, file, ..] if file == id => pid.parse().ok(),
                _ => None,
            }
        })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, "lock not removed");
        }
    }
}
