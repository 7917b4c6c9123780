//! A link between two interfaces in two network namespaces, with rate, delay, jitter and loss.
//!
//! The kernel does what it can: a plain link is a veth pair, a rate is tbf on both its ends, delay and loss are netem.
//! Where a kernel lacks one of them (it is asked, not looked up by its version), a thread of this process
//! carries the frames: see `docs/guide/links.md` for how exact that is.
//!
//! Addresses and routes are the caller's. An IPv6 address can be used at once if it is added with `nodad`; the
//! link-local ones skip duplicate address detection too (`accept_dad=0`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mptcp::Netns;
use mptcp::sys::device;
use nix::errno::Errno;
use nix::libc::{IFF_RUNNING, IFF_UP};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

mod emulator;
mod qdisc;
mod shape;
mod wire;

pub(crate) use shape::quantity;
pub use shape::{Shape, duration, loss, rate};

use emulator::Emulator;

/// A link that could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `ip` or `tc` refused.
    #[error("{command} (in {netns}): {says}")]
    Tool {
        /// The command line.
        command: String,
        /// Where it ran.
        netns: String,
        /// What it said.
        says: String,
    },
    /// No link can be like that.
    #[error("link {link}: {reason}")]
    Refused {
        /// The interface at its end a.
        link: String,
        /// What is wrong.
        reason: String,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// Operation and object.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Entering a namespace failed.
    #[error(transparent)]
    Netns(#[from] mptcp::Error),
}

impl Error {
    fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Io { what: what.into(), source: source.into() }
    }
}

/// Result of this module's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where a link ends: the interface that it makes in a namespace.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The namespace.
    pub netns: &'a Netns,
    /// The name that the interface gets there, at most 15 bytes.
    pub ifname: &'a str,
}

/// What has come through a link since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// When they were read, since the link was made, on the clock that an emulated link runs by.
    pub at: Duration,
    /// Bytes of Ethernet frames that arrived at b.
    pub a_to_b_bytes: u64,
    /// Bytes of Ethernet frames that arrived at a.
    pub b_to_a_bytes: u64,
}

/// Frames that a link has lost or had no room for, and those that a black hole swallowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// On the way from a to b.
    pub a_to_b: u64,
    /// On the way from b to a.
    pub b_to_a: u64,
}

/// A link, and both its interfaces. They go when it is dropped.
///
/// Its methods start programs and wait for them: some milliseconds. Only [`Link::counters`] of them takes
/// microseconds.
pub struct Link {
    sides: [Side; 2],
    made: Instant,
    state: Mutex<State>,
    emulator: Option<Emulator>,
}

impl Link {
    /// Makes interface `a.ifname` in `a.netns` and `b.ifname` in `b.netns`, joined, up and with carrier, without
    /// addresses. Needs CAP_NET_ADMIN and CAP_SYS_ADMIN over both namespaces, CAP_NET_RAW too where it emulates.
    pub fn create(a: End<'_>, b: End<'_>, shape: &Shape) -> Result<Self> {
        let refused = |reason| Error::Refused { link: a.ifname.into(), reason };
        shape.check().map_err(refused)?;
        [a, b].into_iter().try_for_each(|end| check_name(end.ifname)).map_err(refused)?;
        let made = Instant::now();
        let sides = [Side::open(a)?, Side::open(b)?];
        let emulator = if qdisc::can_do(shape)? {
            add_veth(a, b)?;
            None
        } else {
            Some(Emulator::new([a, b], shape, made)?)
        };
        // From here on, dropping the link removes it.
        let state = State { shape: shape.clone(), blackhole: false, qdisc_drops: [0; 2] };
        let link = Link { sides, made, state: Mutex::new(state), emulator };
        if link.emulator.is_none() {
            link.set_qdiscs(&mut link.lock())?;
        }
        for side in &link.sides {
            side.turn_off_dad();
        }
        link.set_down(false)?;
        Ok(link)
    }

    /// The shape it has now.
    pub fn shape(&self) -> Shape {
        self.lock().shape.clone()
    }

    /// Gives both directions another shape. Frames under way arrive; where the kernel shapes and the shape
    /// gets or loses one of rate and delay, those in the queue are lost.
    ///
    /// Where the kernel has no netem, a link that was made without delay, jitter and loss cannot get them: it would
    /// have to be another link. Made with `delay = "0ms"`, it can.
    pub fn set_shape(&self, shape: &Shape) -> Result<()> {
        let refused = |reason| Error::Refused { link: self.sides[0].ifname.clone(), reason };
        shape.check().map_err(refused)?;
        let mut state = self.lock();
        let old = std::mem::replace(&mut state.shape, shape.clone());
        let set = match &self.emulator {
            Some(emulator) => {
                emulator.set_shape(shape);
                Ok(())
            }
            None if !qdisc::can_do(shape)? => Err(refused(
                "this kernel cannot add delay, jitter or loss to a link that was made without; \
                 make it with delay \"0ms\""
                    .into(),
            )),
            None => self.set_qdiscs(&mut state),
        };
        if set.is_err() {
            state.shape = old;
        }
        set
    }

    /// Loses every frame in both directions, silently: both interfaces stay up and with carrier. Frames under way are
    /// lost too.
    pub fn set_blackhole(&self, on: bool) -> Result<()> {
        let mut state = self.lock();
        state.blackhole = on;
        match &self.emulator {
            Some(emulator) => emulator.set_blackhole(on),
            None => self.set_qdiscs(&mut state)?,
        }
        Ok(())
    }

    /// Takes the interface at a down, so that b loses its carrier, or brings both up. Returns when both see it.
    ///
    /// The kernel removes the routes and IPv6 addresses of an interface that goes down; the caller adds them again.
    pub fn set_down(&self, down: bool) -> Result<()> {
        let [a, b] = &self.sides;
        if down {
            a.ip("down")?;
        } else {
            a.ip("up")?;
            b.ip("up")?;
        }
        [a, b].into_iter().try_for_each(|side| side.wait_for_running(!down))
    }

    /// What has come through since the link was made.
    pub fn counters(&self) -> Result<Counters> {
        match &self.emulator {
            Some(emulator) => Ok(emulator.counters()),
            None => {
                let [a_to_b_bytes, b_to_a_bytes] = [self.sides[0].sent()?, self.sides[1].sent()?];
                Ok(Counters { at: self.made.elapsed(), a_to_b_bytes, b_to_a_bytes })
            }
        }
    }

    /// How many frames were dropped since the link was made.
    pub fn drops(&self) -> Result<Drops> {
        if let Some(emulator) = &self.emulator {
            return Ok(emulator.drops());
        }
        let state = self.lock();
        let [a, b] = &self.sides;
        Ok(Drops {
            a_to_b: state.qdisc_drops[0] + qdisc::drops(&a.netns, &a.ifname)?,
            b_to_a: state.qdisc_drops[1] + qdisc::drops(&b.netns, &b.ifname)?,
        })
    }

    /// Does a thread of this process carry the frames, not the kernel?
    pub fn is_emulated(&self) -> bool {
        self.emulator.is_some()
    }

    fn set_qdiscs(&self, state: &mut State) -> Result<()> {
        for (side, drops) in self.sides.iter().zip(&mut state.qdisc_drops) {
            // The count goes with the queueing discipline that is replaced, or stays with one that is changed.
            let before = qdisc::drops(&side.netns, &side.ifname)?;
            qdisc::set(&side.netns, &side.ifname, state.blackhole, &state.shape)?;
            *drops += before.saturating_sub(qdisc::drops(&side.netns, &side.ifname)?);
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // One end takes the other with it; an emulator removes its own pairs.
        if self.emulator.is_none() {
            let a = &self.sides[0];
            if let Err(error) = ip(&a.netns, &format!("link del dev {}", a.ifname)) {
                tracing::debug!(%error, "link was gone already");
            }
        }
    }
}

struct State {
    shape: Shape,
    blackhole: bool,
    /// Of queueing disciplines that were replaced since: a's, b's.
    qdisc_drops: [u64; 2],
}

/// One end of a link, from the outside.
struct Side {
    netns: Netns,
    ifname: String,
    /// A socket in the namespace, to ask for flags.
    control: OwnedFd,
    /// The namespace's `/proc/net/dev`.
    statistics: File,
}

impl Side {
    fn open(end: End<'_>) -> Result<Self> {
        let what = |of| format!("open {of} in {}", end.netns.name());
        let control = end
            .netns
            .run(|| socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None))?
            .map_err(|e| Error::io(what("a socket"), e))?;
        let statistics = end
            .netns
            .run(|| File::open("/proc/thread-self/net/dev"))?
            .map_err(|e| Error::io(what("/proc/net/dev"), e))?;
        Ok(Side { netns: end.netns.clone(), ifname: end.ifname.into(), control, statistics })
    }

    /// `up` or `down`.
    fn ip(&self, state: &str) -> Result<()> {
        ip(&self.netns, &format!("link set dev {} {state}", self.ifname))
    }

    /// Best effort: a kernel without IPv6 has no such sysctl.
    fn turn_off_dad(&self) {
        // In sysctl names, a dot within a part is written as a slash.
        let key = format!("net.ipv6.conf.{}.accept_dad", self.ifname.replace('.', "/"));
        if let Err(error) = mptcp::sysctl::set(&self.netns, &key, "0") {
            tracing::debug!(%error, "duplicate address detection stays on");
        }
    }

    fn wait_for_running(&self, running: bool) -> Result<()> {
        let what = || format!("wait for the carrier of {} in {}", self.ifname, self.netns.name());
        let expected = if running { IFF_UP | IFF_RUNNING } else { 0 };
        let deadline = Instant::now() + CARRIER_TIMEOUT;
        loop {
            let flags =
                device::interface_flags(&self.control, &self.ifname).map_err(|e| Error::io(what(), e))?;
            if flags & IFF_RUNNING == expected & IFF_RUNNING {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::io(what(), Errno::ETIMEDOUT));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Bytes that the interface has sent.
    fn sent(&self) -> Result<u64> {
        let what = || format!("read the counters of {} in {}", self.ifname, self.netns.name());
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match self.statistics.read_at(&mut chunk, text.len() as u64) {
                Ok(0) => break,
                Ok(length) => text.extend_from_slice(&chunk[..length]),
                Err(error) => return Err(Error::io(what(), error)),
            }
        }
        // `  eth0: 8 numbers of receiving, bytes sent, …`
        String::from_utf8_lossy(&text)
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.trim() == self.ifname)
            .and_then(|(_, numbers)| numbers.split_whitespace().nth(8)?.parse().ok())
            .ok_or_else(|| Error::io(what(), Errno::ENODEV))
    }
}

/// Carrier changes go through a kernel worker and an emulator's thread: milliseconds, on a busy machine more.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(10);

/// Refuses what the kernel takes for no name of an interface (`dev_valid_name()`), or tools for something else.
pub(crate) fn check_name(ifname: &str) -> Result<(), String> {
    let fits = (1..=15).contains(&ifname.len()) && ifname.bytes().all(|c| c.is_ascii_graphic());
    if fits && !ifname.starts_with('-') && !ifname.contains(['/', ':', '%']) {
        return Ok(());
    }
    Err(format!("\"{ifname}\" is no name for an interface: 1 to 15 visible ASCII characters without / : %"))
}

/// A veth pair, both ends down.
fn add_veth(a: End<'_>, b: End<'_>) -> Result<()> {
    // ip takes a name or a path; the handle's own path works for namespaces without a name too.
    let b_netns = format!("/proc/{}/fd/{}", std::process::id(), b.netns.as_fd().as_raw_fd());
    ip(a.netns, &format!("link add name {} type veth peer name {} netns {b_netns}", a.ifname, b.ifname))
}

fn ip(netns: &Netns, arguments: &str) -> Result<()> {
    tool(netns, "ip", arguments).map(drop)
}

/// Runs a program of iproute2 in `netns` with `arguments` split at spaces, and returns what it prints.
fn tool(netns: &Netns, program: &str, arguments: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments.split_whitespace());
    netns.enter_on_exec(&mut command);
    let output =
        command.output().map_err(|e| Error::io(format!("start {program} (Debian package iproute2)"), e))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Tool {
        command: format!("{program} {arguments}"),
        netns: netns.name().into(),
        says: String::from_utf8_lossy(&output.stderr).trim().into(),
    })
}
