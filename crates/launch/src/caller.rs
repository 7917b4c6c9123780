//! The thread whose call waits for an answer: what of it can be looked at.
//!
//! Looking at its files and memory takes what ptrace(2) takes: the same user and a process that has not made itself
//! undumpable, or CAP_SYS_PTRACE. Where Yama restricts that to ancestors (`kernel.yama.ptrace_scope` 1), which the
//! supervisor is none of, the main program has made an exception for it before it began; its children need
//! CAP_SYS_PTRACE.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// A thread, by its number. Whether it still is the one that called, `seccomp::is_waiting` tells afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Caller(pub i32);

impl Caller {
    /// A file of its directory below `/proc`.
    pub fn proc(self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.0.to_string()).join(name)
    }

    /// The name of its process; the kernel keeps 15 bytes.
    pub fn name(self) -> String {
        let name = fs::read(self.proc("comm")).unwrap_or_default();
        String::from_utf8_lossy(name.trim_ascii_end()).into_owned()
    }

    /// Is `name` the name of its process, or of its program's file?
    pub fn is_called(self, name: &str) -> bool {
        self.name().as_bytes() == &name.as_bytes()[..name.len().min(15)]
            || fs::read_link(self.proc("exe")).is_ok_and(|file| file.file_name() == Some(name.as_ref()))
    }

    /// The open file behind its descriptor `fd`, shared with it.
    pub fn file(self, fd: i32) -> io::Result<OwnedFd> {
        Ok(pidfd_getfd(self.pidfd()?, fd, PidfdGetfdFlags::empty())?)
    }

    /// Its descriptors.
    pub fn descriptors(self) -> Vec<i32> {
        let listed = fs::read_dir(self.proc("fd")).into_iter().flatten().flatten();
        listed.filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect()
    }

    /// Is `fd` closed when it executes another program?
    pub fn closes_on_exec(self, fd: i32) -> io::Result<bool> {
        let info = fs::read_to_string(self.proc(&format!("fdinfo/{fd}")))?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
        Ok(flags.ok_or(io::ErrorKind::InvalidData)? & libc::O_CLOEXEC != 0)
    }

    /// Does one of its epoll instances watch `fd`?
    pub fn polls(self, fd: i32) -> bool {
        let watched = |epoll: i32| {
            let info = fs::read_to_string(self.proc(&format!("fdinfo/{epoll}"))).unwrap_or_default();
            let mut targets = info.lines().filter_map(|line| line.strip_prefix("tfd:"));
            targets.any(|target| target.split_whitespace().next() == Some(&fd.to_string()))
        };
        let is_epoll = |fd: &i32| {
            fs::read_link(self.proc(&format!("fd/{fd}")))
                .is_ok_and(|to| to.as_os_str() == "anon_inode:[eventpoll]")
        };
        self.descriptors().into_iter().filter(is_epoll).any(watched)
    }

    /// Three words at `address` of its memory.
    pub fn words(self, address: u64) -> io::Result<[u32; 3]> {
        let mut bytes = [0; 12];
        File::open(self.proc("mem"))?.read_exact_at(&mut bytes, address)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        Ok([[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes))
    }

    /// The socket address of `length` bytes at `address` of its memory; `None` if it is none of IPv4 or IPv6.
    pub fn socket_address(self, address: u64, length: u64) -> io::Result<Option<SocketAddr>> {
        let mut bytes = [0; 28];
        let length = (length as usize).min(bytes.len());
        File::open(self.proc("mem"))?.read_exact_at(&mut bytes[..length], address)?;
        let [family_low, family_high, high, low, ..] = bytes;
        let port = u16::from_be_bytes([high, low]);
        let part = |range: std::ops::Range<usize>| &bytes[range];
        Ok(match i32::from(u16::from_ne_bytes([family_low, family_high])) {
            libc::AF_INET if length >= 16 => {
                <[u8; 4]>::try_from(part(4..8)).ok().map(|ip| SocketAddr::new(ip.into(), port))
            }
            libc::AF_INET6 if length >= 24 => {
                <[u8; 16]>::try_from(part(8..24)).ok().map(|ip| SocketAddr::new(ip.into(), port))
            }
            _ => None,
        })
    }

    fn pidfd(self) -> io::Result<OwnedFd> {
        // PIDFD_THREAD, Linux 6.9; before, a pidfd is that of a process.
        const THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL as u32);
        let pid = Pid::from_raw(self.0).ok_or(Errno::ESRCH)?;
        match pidfd_open(pid, THREAD) {
            Err(rustix::io::Errno::INVAL) => {
                let status = fs::read_to_string(self.proc("status"))?;
                let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
                Ok(pidfd_open(process.and_then(Pid::from_raw).ok_or(Errno::ESRCH)?, PidfdFlags::empty())?)
            }
            result => Ok(result?),
        }
    }
}
