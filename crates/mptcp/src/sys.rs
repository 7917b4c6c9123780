//! The only place of this crate with `unsafe`: system calls that no safe wrapper exists for.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub mod device;

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
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(length as usize) }
}

/// `setsockopt(2)` with an `int`.
pub(crate) fn setsockopt(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the pointer is to an `int` on this stack frame and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers `fd` with the runtime, to wait until it can be read.
///
/// # Panics
/// Outside a tokio runtime.
pub fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open file until it is dropped, which AsyncFd does after deregistering it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(|e| e.into_parts().1)
}
