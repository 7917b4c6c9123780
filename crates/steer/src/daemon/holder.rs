//! The holder: a process that does nothing but stay subscribed to the path manager's events. While somebody is, the
//! kernel accepts joins to connections of the userspace path manager; so they are accepted while the daemon restarts.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mptcp::Netns;
use mptcp::pm::Events;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Result;

/// The file that says which process is the holder. That has it locked as long as it lives.
pub struct Holder {
    path: PathBuf,
    file: File,
}

impl Holder {
    /// The one of the daemon whose directory is `directory`, whether or not it runs.
    pub fn of(directory: &Path) -> Result<Self> {
        let path = directory.join("holder");
        let file = open(&path)?;
        Ok(Holder { path, file })
    }

    /// Starts the holder, unless one runs. `command` runs in `netns`.
    pub fn ensure(&mut self, netns: &Netns, mut command: Command) -> Result<()> {
        let failed = |e| mptcp::Error::io("start the holder", e);
        // The lock is the open file's, which the holder inherits: there is no moment at which it does not have it.
        let locked = open(&self.path)?;
        match locked.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(failed(error).into()),
        }
        command.stdin(locked).stdout(Stdio::null()).stderr(Stdio::null());
        // Not stopped with the daemon's group.
        command.process_group(0);
        netns.enter_on_exec(&mut command);
        let mut child = command.spawn().map_err(failed)?;
        if let Err(error) = self.write(child.id()) {
            // Nobody could end it later.
            let _ = child.kill().and_then(|()| child.wait());
            return Err(mptcp::Error::io(format!("write {}", self.path.display()), error).into());
        }
        // Whoever outlives the other: a holder that ends while we run is reaped.
        std::thread::spawn(move || child.wait());
        Ok(())
    }

    /// Ends the holder, if one runs, and forgets it.
    pub fn end(mut self) {
        if self.file.try_lock().is_err() {
            match self.read() {
                // It holds the lock, so the number is its own.
                Some(pid) => {
                    if let Err(error) = kill(pid, Signal::SIGTERM) {
                        tracing::warn!(%error, "holder not ended");
                    }
                }
                None => tracing::warn!("holder not ended: it is not known which process it is"),
            }
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, "nothing to forget");
        }
    }

    fn write(&mut self, pid: u32) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        write!(self.file, "{pid}")
    }

    fn read(&mut self) -> Option<Pid> {
        let mut pid = String::new();
        self.file.rewind().and_then(|()| self.file.read_to_string(&mut pid)).ok()?;
        pid.parse().ok().map(Pid::from_raw)
    }
}

/// Runs as the holder, in the namespace where it was started, until it is ended.
pub async fn hold() -> Result<()> {
    let _events = Events::subscribe_with_buffer(&Netns::current()?, 4096)?;
    std::future::pending().await
}

fn open(path: &Path) -> Result<File> {
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    Ok(open.map_err(|e| mptcp::Error::io(format!("open {}", path.display()), e))?)
}
