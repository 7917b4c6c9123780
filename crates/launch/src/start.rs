//! From a command line to a program under the filter, in the same process.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, IoSlice, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use mptcp::socket::Protocol;
use mptcp::sys::process;
use mptcp::sys::seccomp::{self, Instruction};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, ipproto,
    sendmsg, socket_with,
};
use rustix::process::{PTracer, Pid, set_ptracer};

use crate::answer::Rules;
use crate::report::ReportTo;
use crate::supervisor;
use crate::{Error, Result, filter, options, program};

/// What to run, and how.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Name or path of the program.
    pub program: OsString,
    /// What it is told to be its own name, `argv[0]`; else that is `program`.
    pub own_name: Option<OsString>,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Start nothing where MPTCP is not available.
    pub require: bool,
    /// Programs whose sockets stay TCP: names as in `/proc/PID/comm`, or of their files.
    pub exclude: Vec<String>,
    /// Only sockets that listen, or only those that connect.
    pub only: Option<Role>,
    /// Only sockets that listen on one of these ports, or connect to one. Empty: all.
    pub ports: Vec<u16>,
    /// Programs whose sockets become TCP ones when they ask for an option that MPTCP sockets refuse.
    pub compat: Vec<String>,
    /// Tell what became of the sockets, when the program ends and on SIGUSR1.
    pub report: Option<ReportTo>,
}

/// What a socket is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It listens.
    Server,
    /// It connects.
    Client,
}

impl Plan {
    /// Does the supervisor look at the program's files?
    fn looks_at_files(&self) -> bool {
        let Plan { only, ports, compat, report, .. } = self;
        only.is_some() || !ports.is_empty() || !compat.is_empty() || report.is_some()
    }

    /// The program, for messages.
    pub(crate) fn name(&self) -> String {
        self.program.display().to_string()
    }
}

/// Becomes the program; returns only if it could not. `note` tells the user what they should know, in one line each.
///
/// Where MPTCP is not available the program runs over TCP, after a note; unless it is required.
///
/// # Errors
/// As [`Error`] has them; [`Error::exit_code`] is the exit code that a user expects then. The calling process must
/// have no thread but the calling one.
pub fn run(plan: &Plan, note: fn(&dyn Display)) -> Error {
    match start(plan, note) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn start(plan: &Plan, note: fn(&dyn Display)) -> Result<std::convert::Infallible> {
    let path = program::find(&plan.program, std::env::var_os("PATH").as_deref())?;
    let name = plan.program.display();
    match tcp_socket_protocol() {
        Ok(Some(ipproto::MPTCP)) => {} // by an outer `braid run`, mptcpify, …
        _ if let Some(reason) = unavailable() => {
            if plan.require {
                return Err(Error::Unavailable(reason));
            }
            note(&format_args!("{reason}: {name} runs over TCP"));
        }
        _ => {
            if program::is_32_bit(&path) {
                if plan.require {
                    return Err(Error::Unavailable(format!("{name} is a 32-bit program")));
                }
                note(&format_args!("{name} is a 32-bit program: its sockets stay TCP"));
            }
            let refused = match plan.report.is_some() || !plan.compat.is_empty() {
                true => options::refused().map_err(Error::system("probe the options of sockets"))?,
                false => Vec::new(),
            };
            let rules = Rules { plan: plan.clone(), refused };
            let filter = filter::assemble(&rules.traps(), &rules.traps_32_bit());
            let supervisor = supervisor::start(rules, note)?;
            supervise(supervisor, &filter, plan.looks_at_files(), || {
                if program::is_setuid(&path) {
                    note(&format_args!(
                        "{name} runs without the rights of its file's owner (setuid needs CAP_SYS_ADMIN here)"
                    ));
                }
            })?;
        }
    }
    let mut words = vec![plan.own_name.clone().unwrap_or_else(|| plan.program.clone())];
    words.extend_from_slice(&plan.arguments);
    let mut error = process::exec(&path, &words);
    // A script without a first line that names its interpreter is the shell's, execvp(3) has it.
    if error.raw_os_error() == Some(libc::ENOEXEC) && !program::is_elf(&path) {
        words.splice(..1, ["sh".into(), path.clone().into()]);
        error = process::exec(Path::new("/bin/sh"), &words);
    }
    Err(program::refused(&plan.program, &path, error))
}

const TOO_OLD: Error = Error::Unsupported(
    "this kernel lacks seccomp user notification as it is needed (Linux 5.14 and newer have it)",
);

/// Puts this process under the filter, with `supervisor` to answer.
fn supervise(
    mut supervisor: UnixStream,
    filter: &[Instruction],
    looks_at_files: bool,
    on_no_new_privs: impl FnOnce(),
) -> Result<()> {
    let listener = match seccomp::install(filter) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            on_no_new_privs();
            nix::sys::prctl::set_no_new_privs().map_err(Error::system("set no_new_privs"))?;
            seccomp::install(filter)
        }
        result => result,
    };
    let listener = listener.map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => Error::Unsupported("a supervisor other than Braid watches this process already (seccomp: EBUSY), and the kernel takes one only"),
        Some(libc::EINVAL | libc::ENOSYS) => TOO_OLD,
        _ => Error::system("install the seccomp filter")(error),
    })?;
    let listener = [listener.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    message.push(SendAncillaryMessage::ScmRights(&listener));
    sendmsg(&supervisor, &[IoSlice::new(b"!")], &mut message, SendFlags::NOSIGNAL)
        .map_err(Error::system("send to the supervisor"))?;
    let mut pid = [0; 4];
    supervisor.read_exact(&mut pid).map_err(|_| Error::Unsupported("the supervisor did not start"))?;
    let pid = Pid::from_raw(i32::from_ne_bytes(pid)).ok_or(TOO_OLD)?;
    if looks_at_files {
        // For Yama (kernel.yama.ptrace_scope 1); kernels without it have no such call.
        let _ = set_ptracer(PTracer::ProcessID(pid));
    }
    Ok(())
}

/// What `socket(AF_INET, SOCK_STREAM, 0)` makes here and now.
fn tcp_socket_protocol() -> io::Result<Option<rustix::net::Protocol>> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    Ok(rustix::net::sockopt::socket_protocol(&socket)?)
}

/// Why no MPTCP socket can be made here.
fn unavailable() -> Option<String> {
    if Protocol::default() == Protocol::Tcp {
        return Some("MPTCP is off by BRAID_MPTCP=0".into());
    }
    match socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::MPTCP)) {
        Ok(_) => None,
        Err(error) => Some(match error.raw_os_error() {
            libc::ENOPROTOOPT => "MPTCP is switched off here (net.mptcp.enabled=0)".into(),
            libc::EPROTONOSUPPORT | libc::EINVAL => "this kernel has no MPTCP (CONFIG_MPTCP)".into(),
            _ => format!("no MPTCP socket can be made here: {}", io::Error::from(error)),
        }),
    }
}
