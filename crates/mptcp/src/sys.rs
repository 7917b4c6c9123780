//! The only place of this crate with `unsafe`: system calls that no safe wrapper exists for.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};

/// Makes `command`'s process enter the network namespace `file` between fork and exec.
pub(crate) fn setns_on_exec(command: &mut Command, file: Arc<File>) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; setns(2) is one bare system
    // call, and turning its error number into io::Error allocates nothing.
    unsafe {
        command.pre_exec(move || Ok(setns(&*file, CloneFlags::CLONE_NEWNET)?));
    }
}

/// `getsockopt(2)` into `buffer`; returns how many bytes the kernel wrote.
pub(crate) fn getsockopt(fd: BorrowedFd<'_>, level: i32, name: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = buffer.len() as libc::socklen_t;
    // SAFETY: `buffer` is writable for `length` bytes and both outlive the call; the kernel writes at most
    // `length` bytes and stores how many it wrote in `length`.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(length as usize) }
}
