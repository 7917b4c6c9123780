//! A send buffer of another program's connection, bounded for a while, so that little waits on the old path when the
//! primary subflow changes.

use std::fs;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use mptcp::diag::{Connection, Owner};
use mptcp::{Error, Result};
use nix::sys::socket::{setsockopt, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Bytes of payload that a bounded send buffer holds.
pub const BOUND: usize = 100_000;

/// A bounded send buffer; dropping it restores the size that the buffer had.
///
/// Small ones are left alone. The kernel stops growing a buffer whose size was set from outside, and has no way to
/// make an MPTCP socket's grow again (`mptcp_setsockopt_sol_socket()` lacks SO_BUF_LOCK): what is restored is the
/// size, not the growth.
#[derive(Debug)]
pub(super) struct Drain {
    socket: OwnedFd,
    /// As SO_SNDBUF tells it: twice what is set.
    before: Option<usize>,
    connection: String,
}

impl Drain {
    /// Bounds the send buffer of `connection`, whose socket it borrows from the program. Needs the permission to
    /// trace that (`pidfd_getfd(2)`). `None` where no program holds it any more.
    pub(super) fn begin(connection: &Connection) -> Result<Option<Self>> {
        let Some(owner) = connection.owners.first() else {
            return match connection.owners_hidden() {
                true => Err(denied(format!("find the program that holds connection {}", connection.token))),
                false => Ok(None),
            };
        };
        let what = format!("take the socket of connection {} from {}", connection.token, owner.program);
        let Some(socket) = borrow(owner, connection.inode).map_err(|error| match error {
            rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => denied(&what),
            error => Error::io(&what, error),
        })?
        else {
            return Ok(None);
        };
        let name = format!("connection {}", connection.token);
        let size = socket2::SockRef::from(&socket).send_buffer_size();
        let size = size.map_err(|error| Error::io(format!("read the send buffer of {name}"), error))?;
        let mut drain = Drain { socket, before: None, connection: name };
        if size > 2 * BOUND {
            drain.set(BOUND).map_err(|error| Error::io(format!("bound the send buffer of {what}"), error))?;
            drain.before = Some(size);
        }
        Ok(Some(drain))
    }

    /// Does the buffer hold no more than the bound?
    pub(super) fn is_low(&self) -> bool {
        mptcp::sys::unacknowledged(&self.socket).is_ok_and(|bytes| bytes <= BOUND)
    }

    fn set(&self, bytes: usize) -> nix::Result<()> {
        // The size that a buffer has grown to may be beyond net.core.wmem_max, which only the former passes.
        setsockopt(&self.socket, sockopt::SndBufForce, &bytes)
            .or_else(|_| setsockopt(&self.socket, sockopt::SndBuf, &bytes))
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = self.set(before / 2)
        {
            tracing::warn!(%error, connection = self.connection, "send buffer not restored");
        }
    }
}

fn denied(what: impl Into<String>) -> Error {
    Error::Capability { what: what.into(), capability: "CAP_SYS_PTRACE" }
}

/// A descriptor of our own for the socket `inode` of `owner`.
fn borrow(owner: &Owner, inode: u32) -> rustix::io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(owner.pid as i32) else { return Ok(None) };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        process => process?,
    };
    let link = format!("socket:[{inode}]");
    let holds = |fd: &RawFd| {
        let at = format!("/proc/{}/fd/{fd}", owner.pid);
        fs::read_link(at).is_ok_and(|target| target == Path::new(&link))
    };
    let open = fs::read_dir(format!("/proc/{}/fd", owner.pid)).into_iter().flatten().flatten();
    let mut open = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    match open.find(holds) {
        None => Ok(None),
        Some(fd) => pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).map(Some),
    }
}
