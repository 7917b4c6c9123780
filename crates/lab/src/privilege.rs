//! The capabilities that a lab needs: root's, or those of a user namespace of its own.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::thread::{CapabilitySet, capabilities};

use crate::{Error, Result};

/// Does this process have what a lab needs: CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW?
pub fn has() -> bool {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW;
    capabilities(None).is_ok_and(|sets| sets.effective.contains(needed))
}

/// Without these capabilities, moves this process into a user, mount and network namespace of its own, in which it
/// is root and has an empty `/run`. Does nothing for root.
///
/// The process must have one thread only: call it early in `main`, before a runtime is started.
pub fn enter() -> Result<()> {
    if has() {
        return Ok(());
    }
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    // $XDG_RUNTIME_DIR is usually below /run; it stays where it is.
    let kept = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.starts_with("/run"));
    let kept = kept.and_then(|path| Some((open_directory(&path).ok()?, path)));

    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).map_err(|error| {
        Error::io(
            "make a user namespace (run as root, or allow user namespaces: sysctl user.max_user_namespaces and, where \
             there is one, kernel.apparmor_restrict_unprivileged_userns)",
            error,
        )
    })?;
    let write = |path: &str, text: String| {
        fs::write(path, text).map_err(|error| Error::io(format!("write {path}"), error))
    };
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))?;

    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).map_err(|error| Error::io("make mounts private", error))?;
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
        .map_err(|error| Error::io("mount a tmpfs on /run", error))?;
    if let Some((directory, path)) = kept {
        let what = || format!("keep {}", path.display());
        fs::create_dir_all(&path).map_err(|error| Error::io(what(), error))?;
        let from = format!("/proc/self/fd/{}", directory.as_raw_fd());
        mount(Some(from.as_str()), &path, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .map_err(|error| Error::io(what(), error))?;
    }
    Ok(())
}

/// Moves this process into the user and mount namespace of the process `pid`, where they are others than its own.
///
/// As for [`enter`], the process must have one thread only.
#[allow(clippy::disallowed_methods)] // no other thread is there to use what this one becomes
pub fn join(pid: u32) -> Result<()> {
    for (name, flag) in [("user", CloneFlags::CLONE_NEWUSER), ("mnt", CloneFlags::CLONE_NEWNS)] {
        let what = || format!("enter the {name} namespace of process {pid}");
        let theirs = format!("/proc/{pid}/ns/{name}");
        let same = fs::read_link(&theirs).map_err(|error| Error::io(what(), error))?
            == fs::read_link(format!("/proc/self/ns/{name}")).map_err(|error| Error::io(what(), error))?;
        if !same {
            let file = File::open(theirs).map_err(|error| Error::io(what(), error))?;
            setns(file, flag).map_err(|error| Error::io(what(), error))?;
        }
    }
    Ok(())
}

fn open_directory(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags((OFlag::O_PATH | OFlag::O_DIRECTORY).bits()).open(path)
}
