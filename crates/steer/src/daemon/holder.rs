//! The holder: a process that does nothing but stay subscribed to the path manager's events. While somebody is, the
//! kernel accepts joins to connections of the userspace path manager; so they are accepted while the daemon restarts.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use mptcp::Netns;
use mptcp::pm::Events;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Result;

/// Starts the holder, unless one runs. `command` gets the directory as its argument, and runs in `netns`.
pub fn ensure(directory: &Path, netns: &Netns, mut command: Command) -> Result<()> {
    if is_held(directory)? {
        return Ok(());
    }
    command.arg(directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Not stopped with the daemon's group.
    command.process_group(0);
    netns.enter_on_exec(&mut command);
    let mut child = command.spawn().map_err(|e| mptcp::Error::io("start the holder", e))?;
    // Whoever outlives the other: a holder that ends while we run is reaped.
    std::thread::spawn(move || child.wait());
    Ok(())
}

/// Runs as the holder, in the namespace where it was started, until it is ended.
pub async fn hold(directory: &Path) -> Result<()> {
    let what = || format!("lock {}", path(directory).display());
    let file = open(directory)?;
    // Another one that was quicker is as good.
    let Ok(mut lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(()) };
    let _events = Events::subscribe_with_buffer(&Netns::current()?, 4096)?;
    lock.set_len(0).map_err(|e| mptcp::Error::io(what(), e))?;
    write!(lock, "{}", std::process::id()).map_err(|e| mptcp::Error::io(what(), e))?;
    std::future::pending().await
}

/// Ends the holder, if there is one.
pub fn end(directory: &Path) {
    if !is_held(directory).unwrap_or(false) {
        return;
    }
    let mut pid = String::new();
    let read = open(directory).map(|mut file| file.read_to_string(&mut pid));
    match (read, pid.parse()) {
        // It holds the lock, so the number is its own.
        (Ok(_), Ok(pid)) => {
            if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGTERM) {
                tracing::warn!(%error, "holder not ended");
            }
        }
        _ => tracing::warn!("holder not ended: it has not said which process it is"),
    }
}

fn is_held(directory: &Path) -> Result<bool> {
    Ok(Flock::lock(open(directory)?, FlockArg::LockExclusiveNonblock).is_err())
}

fn open(directory: &Path) -> Result<File> {
    let path = path(directory);
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    Ok(open.map_err(|e| mptcp::Error::io(format!("open {}", path.display()), e))?)
}

fn path(directory: &Path) -> std::path::PathBuf {
    directory.join("holder")
}
