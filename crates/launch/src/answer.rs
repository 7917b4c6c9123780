//! What the supervisor answers to a stopped call: an MPTCP socket, made as the caller would have made it; or, where the
//! rules tell by role or port, which a socket has not got yet when it is made, another socket in its place later.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mptcp::Netns;
use mptcp::sys::seccomp::{self, Call};
use rustix::fs::{Gid, Uid, fchown};
use rustix::net::{
    AddressFamily, Protocol, SocketFlags, SocketType, bind, getpeername, getsockname, ipproto, socket_with,
    sockopt,
};

use crate::caller::Caller;
use crate::filter;
use crate::filter::Trap;
use crate::options::{self, SocketOption};
use crate::report::Tally;
use crate::start::{Plan, Role};

/// How to answer.
#[derive(Debug)]
pub struct Rules {
    pub plan: Plan,
    /// What MPTCP sockets refuse, by level.
    pub refused: Vec<Vec<SocketOption>>,
}

impl Rules {
    /// The calls to stop.
    pub fn traps(&self) -> Vec<Trap> {
        let Plan { only, ports, compat, report, .. } = &self.plan;
        let mut traps = Vec::new();
        if self.first_protocol() == ipproto::MPTCP {
            traps.push(filter::socket());
        }
        if !ports.is_empty() || only.is_some() {
            traps.push(filter::every(libc::SYS_listen));
        }
        if !ports.is_empty() && *only != Some(Role::Server) {
            traps.push(filter::every(libc::SYS_connect));
        }
        if report.is_some() || !compat.is_empty() {
            traps.extend(
                self.refused.iter().filter(|level| !level.is_empty()).map(|level| filter::setsockopt(level)),
            );
        }
        if report.is_some() {
            traps.extend([libc::SYS_close, libc::SYS_exit_group].map(filter::every));
        }
        traps
    }

    /// Calls of 32-bit programs to stop: their sockets stay TCP, which a report tells.
    pub fn traps_32_bit(&self) -> Vec<Trap> {
        match self.plan.report {
            Some(_) => filter::sockets_of_32_bit().into(),
            None => Vec::new(),
        }
    }

    /// A client may have its socket polled before it connects, and a socket that is polled cannot be replaced. So
    /// clients get the right one at once, except where their port decides.
    fn first_protocol(&self) -> Protocol {
        match self.plan.only {
            Some(Role::Server) => ipproto::TCP,
            _ if !self.plan.ports.is_empty() => ipproto::TCP,
            _ => ipproto::MPTCP,
        }
    }

    /// The protocol of a socket that turns out to have `role` and `port`.
    fn protocol(&self, role: Role, port: u16) -> Protocol {
        let Plan { only, ports, .. } = &self.plan;
        let wanted = only.is_none_or(|only| only == role) && (ports.is_empty() || ports.contains(&port));
        if wanted { ipproto::MPTCP } else { ipproto::TCP }
    }
}

/// Answers calls.
#[derive(Debug)]
pub struct Answers {
    rules: Rules,
    main: i32,
    /// Device and inode of the network namespace of this process.
    netns: (u64, u64),
    uid: u32,
    tally: Tally,
}

/// What a call gets.
enum Answer {
    Socket(OwnedFd),
    /// What it would get without a filter.
    Pass,
    Error(i32),
}

impl Answers {
    /// In the network namespace of the calling process; `main` is the program's process.
    pub fn new(rules: Rules, main: i32) -> io::Result<Self> {
        let tally = Tally::new(&rules);
        let netns = identity(Path::new("/proc/self/ns/net"))?;
        Ok(Answers { rules, main, netns, uid: rustix::process::geteuid().as_raw(), tally })
    }

    /// Answers `call`. A caller that is gone by now needs no answer.
    pub fn answer(&mut self, listener: &OwnedFd, call: &Call) {
        let caller = Caller(call.tid);
        let answer = match libc::c_long::from(call.number) {
            _ if call.arch == filter::I386 => {
                let _ = self.socket_of_32_bit(caller, call); // its memory could not be looked at
                Answer::Pass
            }
            libc::SYS_socket => self.socket(caller, call),
            number => {
                self.tally.saw(caller);
                // Of these, none fails because the supervisor could not look.
                let _ = match number {
                    libc::SYS_listen | libc::SYS_connect => self.role(listener, caller, call),
                    libc::SYS_setsockopt => self.refused_option(listener, caller, call),
                    libc::SYS_close => self.tally.look(caller, call.args[0] as i32),
                    libc::SYS_exit_group => self.exit(caller),
                    _ => Ok(()),
                };
                Answer::Pass
            }
        };
        let close_on_exec = call.args[1] as i32 & libc::SOCK_CLOEXEC != 0;
        let result = match answer {
            Answer::Socket(socket) => seccomp::answer_with(listener, call.id, socket, close_on_exec),
            Answer::Pass => seccomp::let_pass(listener, call.id),
            Answer::Error(errno) => seccomp::refuse(listener, call.id, errno),
        };
        if let Err(error) = result
            && let Some(errno) = error.raw_os_error()
        {
            // ENOENT: it is gone. Others: it has no room for a descriptor (EMFILE).
            let _ = seccomp::refuse(listener, call.id, errno);
        }
    }

    /// Writes the report, if one is wanted and there is news.
    pub fn report(&mut self) {
        self.tally.report(&self.rules);
    }

    /// Writes the report, if one is wanted.
    pub fn report_now(&mut self) {
        self.tally.news = true;
        self.report();
    }

    fn socket(&mut self, caller: Caller, call: &Call) -> Answer {
        if self.is_one_of(&self.rules.plan.exclude, caller) {
            self.tally.left_tcp("excluded");
            return Answer::Pass;
        }
        let family = AddressFamily::from_raw(call.args[0] as u16);
        match self.open(caller, family, call.args[1] as i32 & libc::SOCK_NONBLOCK != 0, ipproto::MPTCP) {
            Ok(socket) => {
                self.tally.made(caller);
                Answer::Socket(socket)
            }
            Err(error) if self.rules.plan.require => {
                Answer::Error(error.raw_os_error().unwrap_or(libc::EPROTONOSUPPORT))
            }
            // The kernel says itself what is wrong, or makes a TCP socket.
            Err(_) => {
                self.tally.left_tcp("could not be made");
                Answer::Pass
            }
        }
    }

    fn socket_of_32_bit(&mut self, caller: Caller, call: &Call) -> io::Result<()> {
        let makes_tcp = match libc::c_long::from(call.number) {
            filter::I386_SOCKETCALL => filter::is_tcp(caller.words(call.args[1])?),
            _ => true,
        };
        if makes_tcp {
            self.tally.left_tcp("made by a 32-bit program");
        }
        Ok(())
    }

    /// At listen(2) or connect(2): now it is known what the socket is for.
    fn role(&mut self, listener: &OwnedFd, caller: Caller, call: &Call) -> io::Result<()> {
        if self.is_one_of(&self.rules.plan.exclude, caller) {
            return Ok(());
        }
        let fd = call.args[0] as i32;
        let to = if libc::c_long::from(call.number) == libc::SYS_connect {
            let Some(server) = caller.socket_address(call.args[1], call.args[2])? else { return Ok(()) };
            self.rules.protocol(Role::Client, server.port())
        } else {
            let address = std::net::SocketAddr::try_from(getsockname(caller.file(fd)?)?)?;
            self.rules.protocol(Role::Server, address.port())
        };
        match self.replace(listener, caller, call.id, fd, to) {
            Ok(true) if to == ipproto::MPTCP => self.tally.made(caller),
            Ok(_) => {}
            Err(reason) => self.tally.left_tcp(reason),
        }
        Ok(())
    }

    /// At setsockopt(2) with an option that MPTCP sockets refuse.
    fn refused_option(&mut self, listener: &OwnedFd, caller: Caller, call: &Call) -> io::Result<()> {
        let fd = call.args[0] as i32;
        if sockopt::socket_protocol(caller.file(fd)?)? != Some(ipproto::MPTCP) {
            return Ok(());
        }
        let asked = self.rules.refused.iter().flatten();
        let asked = asked.clone().find(|o| (o.level, o.number) == (call.args[1] as i32, call.args[2] as i32));
        let replaced = self.is_one_of(&self.rules.plan.compat, caller)
            && self.replace(listener, caller, call.id, fd, ipproto::TCP) == Ok(true);
        if let Some(option) = asked {
            self.tally.refused(caller, option.name, replaced);
        }
        Ok(())
    }

    fn exit(&mut self, caller: Caller) -> io::Result<()> {
        self.tally.look_at_all(caller);
        if caller.0 == self.main {
            self.report();
        }
        Ok(())
    }

    fn is_one_of(&self, names: &[String], caller: Caller) -> bool {
        names.iter().any(|name| caller.is_called(name))
    }

    /// Puts a socket of protocol `to` in the place of the caller's `fd`, as far as it is a TCP or MPTCP socket of another
    /// protocol. The error says why that was not possible.
    fn replace(
        &self,
        listener: &OwnedFd,
        caller: Caller,
        id: u64,
        fd: i32,
        to: Protocol,
    ) -> Result<bool, &'static str> {
        const NOT_SEEN: &str = "its files could not be looked at";
        let old = caller.file(fd).map_err(|_| NOT_SEEN)?;
        let Ok(Some(from)) = sockopt::socket_protocol(&old) else { return Ok(false) };
        if from == to || ![ipproto::TCP, ipproto::MPTCP].contains(&from) || getpeername(&old).is_ok() {
            return Ok(false);
        }
        if sockopt::socket_acceptconn(&old).unwrap_or(false) {
            return Ok(false); // listens already
        }
        if caller.polls(fd) {
            return Err("it was polled by then");
        }
        let close_on_exec = caller.closes_on_exec(fd).map_err(|_| NOT_SEEN)?;
        let flags = rustix::fs::fcntl_getfl(&old).map_err(|_| NOT_SEEN)?;
        let family = sockopt::socket_domain(&old).map_err(|_| NOT_SEEN)?;
        let new = self
            .open(caller, family, flags.contains(rustix::fs::OFlags::NONBLOCK), to)
            .map_err(|_| "no other could be made")?;
        options::copy(&old, family, from, &new).map_err(|option| option.name)?;
        take_address(&old, &new).map_err(|_| "its address could not be taken over")?;
        seccomp::put_in_place(listener, id, &new, fd, close_on_exec).map_err(|_| "it was gone")?;
        Ok(true)
    }

    /// A socket as `caller` would make it: in its network namespace, and its user's.
    fn open(
        &self,
        caller: Caller,
        family: AddressFamily,
        nonblocking: bool,
        protocol: Protocol,
    ) -> io::Result<OwnedFd> {
        let flags =
            if nonblocking { SocketFlags::CLOEXEC | SocketFlags::NONBLOCK } else { SocketFlags::CLOEXEC };
        let open = || socket_with(family, SocketType::STREAM, flags, Some(protocol));
        let socket = match identity(&caller.proc("ns/net"))? == self.netns {
            true => open()?,
            false => {
                Netns::of_pid(caller.0 as u32).and_then(|netns| netns.run(open)).map_err(|error| {
                    io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EPERM))
                })??
            }
        };
        if let Some(uid) = self.other_uid(caller) {
            fchown(&socket, Some(Uid::from_raw(uid)), None::<Gid>)?;
        }
        Ok(socket)
    }

    /// The user whom the caller's sockets belong to, for firewalls and ss(8), where it is not the supervisor's. That
    /// takes a privileged program that gave up its rights.
    fn other_uid(&self, caller: Caller) -> Option<u32> {
        if self.uid != 0 {
            return None;
        }
        // The line is among the first; one read is a third of what reading all costs.
        let mut start = [0; 512];
        let length = File::open(caller.proc("status")).ok()?.read(&mut start).ok()?;
        let status = String::from_utf8_lossy(&start[..length]);
        // Real, effective, saved, and that of file accesses, which sockets get (sock_alloc()).
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        uids.split_whitespace().nth(3)?.parse().ok().filter(|&uid| uid != self.uid)
    }
}

/// Binds `new` to the address of `old`, if that has one. Both live until the caller's call is over, so both have to say
/// that they share (inet_csk_bind_conflict()).
fn take_address(old: &OwnedFd, new: &OwnedFd) -> io::Result<()> {
    let address = std::net::SocketAddr::try_from(getsockname(old)?)?;
    if address.port() == 0 && address.ip().is_unspecified() {
        return Ok(());
    }
    for socket in [old.as_fd(), new.as_fd()] {
        sockopt::set_socket_reuseaddr(socket, true)?;
    }
    Ok(bind(new, &address)?)
}

fn identity(namespace: &Path) -> io::Result<(u64, u64)> {
    namespace.metadata().map(|file| (file.dev(), file.ino()))
}
