//! The only place of this crate with `unsafe`: system calls that no safe wrapper exists for.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub mod bpf;
pub mod device;
pub mod process;
pub mod seccomp;

/// Makes `command`'s process enter the network namespace `file` between fork and exec.
pub(crate) fn setns_on_exec(command: &mut Command, file: Arc<File>) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; setns(2) is one bare system
    // call, and turning its error number into io::Error allocates nothing.
    #[expect(clippy::disallowed_methods, reason = "the child has this one thread")]
    unsafe {
        command.pre_exec(move || Ok(setns(&*file, CloneFlags::CLONE_NEWNET)?));
    }
}

/// Makes `command`'s process enter the mount namespace `file` between fork and exec, and work in `directory` there.
pub fn enter_mounts_on_exec(command: &mut Command, file: File, directory: CString) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; setns(2) and chdir(2) are bare system
    // calls, what they need has been allocated before, and turning an error number into io::Error allocates nothing.
    #[expect(clippy::disallowed_methods, reason = "the child has this one thread")]
    unsafe {
        command.pre_exec(move || {
            // The kernel then has the process work in the root directory (mntns_install()).
            setns(&file, CloneFlags::CLONE_NEWNS)?;
            Ok(nix::unistd::chdir(directory.as_c_str())?)
        });
    }
}

/// `getsockopt(2)` into `buffer`; returns how many bytes the kernel wrote.
pub fn getsockopt(fd: impl AsFd, level: i32, name: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = buffer.len() as libc::socklen_t;
    // SAFETY: `buffer` is writable for `length` bytes and both outlive the call; the kernel writes at most
    // `length` bytes and stores how many it wrote in `length`.
    let result = unsafe {
        libc::getsockopt(fd.as_fd().as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(length as usize) }
}

/// The answer of [`full_info`]: how many subflows there are, and how many bytes the kernel wrote of each.
pub(crate) struct FullInfo {
    pub(crate) subflows: usize,
    pub(crate) subflow_size: usize,
    pub(crate) tcp_size: usize,
}

/// `getsockopt(MPTCP_FULL_INFO)`: a `struct mptcp_subflow_info` of `subflow_size` bytes per subflow into `subflows`,
/// a `struct tcp_info` of `tcp_size` bytes into `tcps`. What has no room in either is left out.
pub(crate) fn full_info(
    fd: impl AsFd,
    subflows: &mut [u8],
    subflow_size: usize,
    tcps: &mut [u8],
    tcp_size: usize,
) -> io::Result<FullInfo> {
    /// `struct mptcp_full_info` up to the part that [`getsockopt`] gets too.
    #[repr(C)]
    struct Header {
        size_tcpinfo_kernel: u32,
        size_tcpinfo_user: u32,
        size_sfinfo_kernel: u32,
        size_sfinfo_user: u32,
        num_subflows: u32,
        size_arrays_user: u32,
        subflow_info: u64,
        tcp_info: u64,
    }
    let room = (subflows.len() / subflow_size).min(tcps.len() / tcp_size);
    let mut header = Header {
        size_tcpinfo_kernel: 0,
        size_tcpinfo_user: tcp_size as u32,
        size_sfinfo_kernel: 0,
        size_sfinfo_user: subflow_size as u32,
        num_subflows: 0,
        size_arrays_user: room as u32,
        subflow_info: subflows.as_mut_ptr() as u64,
        tcp_info: tcps.as_mut_ptr() as u64,
    };
    let mut length = size_of::<Header>() as libc::socklen_t;
    // SAFETY: `header` is plain old data, writable for `length` bytes. The kernel writes at most
    // `size_arrays_user` elements of the sizes given behind each of the two pointers
    // (mptcp_getsockopt_full_info()), and both slices, borrowed mutably for the call, have room for `room` of them.
    let result = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            crate::info::SOL_MPTCP,
            crate::info::MPTCP_FULL_INFO,
            (&raw mut header).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(FullInfo {
        subflows: header.num_subflows as usize,
        subflow_size: header.size_sfinfo_user as usize,
        tcp_size: header.size_tcpinfo_user as usize,
    })
}

/// Bytes written to the socket `fd` that the peer has not acknowledged yet (`SIOCOUTQ`).
pub fn unacknowledged(fd: impl AsFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (the number of TIOCOUTQ) stores one int, and `bytes` is one and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes.max(0) as usize) }
}

/// `setsockopt(2)` with an `int`.
pub(crate) fn setsockopt(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the pointer is to an `int` on this stack frame and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `setsockopt(2)` with what [`getsockopt`] gave for another socket.
pub fn copy_sockopt(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: `value` is readable for its length and outlives the call. Options that carry a pointer would be read
    // through it by the kernel, which fails with EFAULT where it leads nowhere.
    let result = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
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

/// Makes the kernel kill `command`'s process when the thread that starts it ends (`PR_SET_PDEATHSIG`).
pub fn die_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; prctl(2) is one bare system call,
    // and turning its error number into io::Error allocates nothing.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
