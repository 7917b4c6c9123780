//! What the supervisor answers to a stopped call: an MPTCP socket, made as the caller would have made it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mptcp::Netns;
use mptcp::sys::seccomp::{self, Call};
use rustix::fs::{Gid, Uid, fchown};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

/// How to answer.
#[derive(Debug)]
pub struct Rules {
    /// The program, for messages.
    pub name: String,
    /// Rather no socket than one without MPTCP.
    pub require: bool,
    /// Programs whose sockets stay TCP.
    pub exclude: Vec<String>,
}

/// Answers calls.
#[derive(Debug)]
pub struct Answers {
    rules: Rules,
    /// Device and inode of the network namespace of this process.
    netns: (u64, u64),
    uid: u32,
}

/// What a call gets.
enum Answer {
    Socket(OwnedFd),
    /// What it would get without a filter.
    Tcp,
    Error(i32),
}

impl Answers {
    /// In the network namespace of the calling process.
    pub fn new(rules: Rules) -> io::Result<Self> {
        Ok(Answers {
            rules,
            netns: identity(Path::new("/proc/self/ns/net"))?,
            uid: rustix::process::geteuid().as_raw(),
        })
    }

    /// Answers `call`. A caller that is gone by now needs no answer.
    pub fn answer(&self, listener: &OwnedFd, call: &Call) {
        let answer = match self.socket(call) {
            Err(error) if self.rules.require => {
                Answer::Error(error.raw_os_error().unwrap_or(libc::EPROTONOSUPPORT))
            }
            // The kernel says itself what is wrong, or makes a TCP socket.
            Err(_) => Answer::Tcp,
            Ok(answer) => answer,
        };
        let close_on_exec = call.args[1] as i32 & libc::SOCK_CLOEXEC != 0;
        let result = match answer {
            Answer::Socket(socket) => seccomp::answer_with(listener, call.id, socket, close_on_exec),
            Answer::Tcp => seccomp::let_pass(listener, call.id),
            Answer::Error(errno) => seccomp::refuse(listener, call.id, errno),
        };
        if let Err(error) = result
            && let Some(errno) = error.raw_os_error()
        {
            // ENOENT: it is gone. Others: it has no room for a descriptor (EMFILE).
            let _ = seccomp::refuse(listener, call.id, errno);
        }
    }

    fn socket(&self, call: &Call) -> io::Result<Answer> {
        if self.rules.exclude.iter().any(|name| is_called(call.tid, name)) {
            return Ok(Answer::Tcp);
        }
        let family = AddressFamily::from_raw(call.args[0] as u16);
        let flags = match call.args[1] as i32 & libc::SOCK_NONBLOCK {
            0 => SocketFlags::CLOEXEC,
            _ => SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        };
        // A socket belongs to the network namespace where it is made, and that must be the caller's.
        let socket = match identity(Path::new(&format!("/proc/{}/ns/net", call.tid)))? == self.netns {
            true => mptcp_socket(family, flags)?,
            false => Netns::of_pid(call.tid as u32)
                .and_then(|netns| netns.run(|| mptcp_socket(family, flags)))
                .map_err(|error| {
                    io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EPERM))
                })??,
        };
        if let Some(uid) = self.other_uid(call.tid) {
            fchown(&socket, Some(Uid::from_raw(uid)), None::<Gid>)?;
        }
        Ok(Answer::Socket(socket))
    }

    /// The user whom the caller's sockets belong to, for firewalls and ss(8), where it is not the supervisor's. That
    /// takes a privileged program that gave up its rights.
    fn other_uid(&self, tid: i32) -> Option<u32> {
        if self.uid != 0 {
            return None;
        }
        // The line is among the first; one read is a third of what reading all costs.
        let mut start = [0; 512];
        let length = File::open(format!("/proc/{tid}/status")).ok()?.read(&mut start).ok()?;
        let status = String::from_utf8_lossy(&start[..length]);
        // Real, effective, saved, and that of file accesses, which sockets get (sock_alloc()).
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        uids.split_whitespace().nth(3)?.parse().ok().filter(|&uid| uid != self.uid)
    }
}

/// An MPTCP socket of the calling thread.
pub fn mptcp_socket(family: AddressFamily, flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(socket_with(family, SocketType::STREAM, flags, Some(ipproto::MPTCP))?)
}

fn identity(namespace: &Path) -> io::Result<(u64, u64)> {
    namespace.metadata().map(|file| (file.dev(), file.ino()))
}

/// Is `name` the name of the process of thread `tid`, or that of its program's file? The kernel keeps 15 bytes of the
/// first.
fn is_called(tid: i32, name: &str) -> bool {
    let process = Path::new("/proc").join(tid.to_string());
    let comm = || fs::read(process.join("comm")).unwrap_or_default();
    let file = || fs::read_link(process.join("exe")).unwrap_or_default();
    comm().trim_ascii_end() == &name.as_bytes()[..name.len().min(15)]
        || file().file_name() == Some(name.as_ref())
}
