//! Directories that the programs of a node have for themselves: a mount namespace.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::{Error, Result};

/// A mount namespace, held open: it lives as long as this and the processes in it.
#[derive(Debug)]
pub(crate) struct Mounts(File);

impl Mounts {
    /// Makes a namespace like that of the caller, but with `directories` empty. Of a path that does not exist, the
    /// deepest part that does is emptied, and the rest made in it; `keep` stays visible all the same.
    pub(crate) fn private(directories: &[PathBuf], keep: &Path) -> Result<Self> {
        // A mount namespace is a thread's; this one ends, and the file keeps the namespace.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNS).map_err(|e| Error::io("make a mount namespace", e))?;
                // What is unmounted outside is to go away here, too, but nothing the other way round.
                change("/", None, MsFlags::MS_REC | MsFlags::MS_SLAVE)?;
                let mut emptied = Vec::new();
                // In order, so that a directory comes before those in it.
                for directory in directories.iter().collect::<BTreeSet<_>>() {
                    empty(directory, keep, &mut emptied)?;
                }
                Self::open(Path::new("/proc/thread-self/ns/mnt"))
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The namespace at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let open = File::open(path);
        open.map(Mounts).map_err(|e| Error::io(format!("open mount namespace {}", path.display()), e))
    }

    /// Where others find it while this process holds it.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Makes `command`'s process enter it between fork and exec, and work in `directory`.
    pub(crate) fn enter_on_exec(&self, command: &mut Command, directory: &Path) -> Result<()> {
        let what = || format!("work in {}", directory.display());
        let file = self.0.try_clone().map_err(|error| Error::io(what(), error))?;
        let directory = CString::new(directory.as_os_str().as_bytes()).map_err(|e| Error::io(what(), e))?;
        mptcp::sys::enter_mounts_on_exec(command, file, directory);
        Ok(())
    }
}

fn empty(directory: &Path, keep: &Path, emptied: &mut Vec<PathBuf>) -> Result<()> {
    let make = |made: &Path| {
        fs::create_dir_all(made).map_err(|e| Error::io(format!("make directory {}", made.display()), e))
    };
    if emptied.iter().any(|outer| directory.starts_with(outer)) {
        return make(directory);
    }
    let there = directory.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    if there == Path::new("/") {
        let reason = "nothing of it exists but /, which cannot be emptied";
        return Err(Error::program(format!("make {} private", directory.display()), reason));
    }
    let kept = keep.starts_with(there).then(|| File::open(keep)).transpose();
    let kept = kept.map_err(|error| Error::io(format!("open {}", keep.display()), error))?;
    mount(Some("private"), there, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
        .map_err(|error| Error::io(format!("mount a tmpfs on {}", there.display()), error))?;
    emptied.push(there.into());
    make(directory)?;
    match kept {
        Some(kept) => {
            make(keep)?;
            let from = format!("/proc/self/fd/{}", kept.as_raw_fd());
            change(keep, Some(&from), MsFlags::MS_BIND | MsFlags::MS_REC)
        }
        None => Ok(()),
    }
}

fn change(path: impl AsRef<Path>, from: Option<&str>, flags: MsFlags) -> Result<()> {
    let path = path.as_ref();
    mount(from, path, None::<&str>, flags, None::<&str>)
        .map_err(|error| Error::io(format!("mount {} anew", path.display()), error))
}
