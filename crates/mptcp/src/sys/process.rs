//! Copies of this process, and other programs in its place.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use nix::unistd::{ForkResult, Pid, execv, fork};

/// Runs `child` in a copy of this process, which ends with the exit code that it returns (101 after a panic).
///
/// Fails with EBUSY where this process has more than one thread: a lock that another one holds would stay locked in
/// the copy for ever.
pub fn fork_with(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: this process has one thread, so that the child is a complete copy and may do whatever this one may.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let code = catch_unwind(AssertUnwindSafe(child)).unwrap_or(101);
            // SAFETY: takes no pointer. Nothing that the parent registered for its own end is to run here too.
            unsafe { libc::_exit(code.into()) }
        }
    }
}

/// Replaces this process by the program `path`, with `words` as its arguments (the first is its name); returns the reason
/// if that failed. Rust's start-up code ignores SIGPIPE; the program gets the default back.
pub fn exec(path: &Path, words: &[OsString]) -> io::Error {
    // SAFETY: sets no handler of ours, and the default one runs no code.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let c_string = |text: &OsStr| CString::new(text.as_bytes());
    let words: Result<Vec<_>, _> = words.iter().map(|word| c_string(word)).collect();
    match (c_string(path.as_os_str()), words) {
        (Ok(path), Ok(words)) => match execv(&path, &words) {
            Ok(never) => match never {},
            Err(errno) => errno.into(),
        },
        (Err(error), _) | (_, Err(error)) => error.into(),
    }
}

/// Closes every descriptor of this process above standard error but those of `keep`: for a copy of a process, which
/// must not keep files, pipes and locks open that belong to the original.
///
/// # Panics
/// Whatever owned one of the others must not be used any more. For standard library types, debug builds panic when
/// such an owner is dropped.
pub fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let mut keep: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).collect();
    keep.sort_unstable();
    let mut first = 3;
    for kept in keep {
        if first < kept {
            close_range(first, kept - 1);
        }
        first = first.max(kept + 1);
    }
    close_range(first, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    // SAFETY: takes no pointer. Closing what somebody else in this process owns makes later uses of it fail with
    // EBADF, or meet another file; that is what `close_all_but` warns of. Linux 5.9 and newer have it; with those
    // before, nothing is closed, and they cannot get here (`SECCOMP_ADDFD_FLAG_SEND` needs 5.14).
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}
