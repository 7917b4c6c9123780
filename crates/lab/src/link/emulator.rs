//! A link in user space, for kernels without netem: a namespace between the two ends, and a thread that carries
//! frames through it at the times that [`Wire`] says.
//!
//! ```text
//!  netns a │           namespace of the link            │ netns b
//!   ifname ┼ veth ── a ── packet socket ─┐              │
//!          │                          Wire, Wire        │
//!          │              packet socket ─┴── b ── veth ─┼ ifname
//! ```
//!
//! Packet sockets need no device node, unlike TAP, so that this works in every user namespace.
//! 802.1Q tags do not cross it.

use std::collections::VecDeque;
use std::io::{PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mptcp::Netns;
use mptcp::sys::device;
use nix::errno::Errno;
use nix::libc::{IFF_UP, RTMGRP_LINK};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use nix::sys::time::TimeSpec;

use super::shape::Shape;
use super::wire::{Verdict, Wire};
use super::{Counters, Drops, End, Error, Result, add_veth, ip};

/// The names of the inner ends in the link's namespace, facing a and b.
const INNER: [&str; 2] = ["a", "b"];

/// Frames that arrive while the thread does not run wait here: a quarter of a second at 200 Mbit/s and more.
const RECEIVE_BUFFER: i32 = 16 << 20;

/// Bytes on the way in one direction. Only a link with a delay and no rate can get here.
const MOST_IN_FLIGHT: usize = 256 << 20;

/// Where frames are this dense, the thread lets them gather between two looks at the sockets: processor time
/// for at most so much delay.
const NAP: Duration = Duration::from_micros(150);

/// Frames read from one end before the other end has its turn.
const BATCH: usize = 64;

/// An emulated link; ends when dropped.
pub struct Emulator {
    state: Arc<Mutex<State>>,
    sides: Arc<[Side; 2]>,
    /// The thread ends when this is closed.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
    _middle: Middle,
}

impl Emulator {
    /// Makes interfaces, down, at both ends and starts the thread. `made` is where the clock begins.
    pub fn new(ends: [End<'_>; 2], shape: &Shape, made: Instant) -> Result<Self> {
        let middle = Middle(Netns::anonymous()?);
        let netns = &middle.0;
        // Nothing but our own frames may come out of the inner ends.
        for key in ["net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.default.disable_ipv6"] {
            let _no_ipv6_at_all = mptcp::sysctl::set(netns, key, "1");
        }
        let open = |n: usize| {
            let (end, inner) = (ends[n], INNER[n]);
            add_veth(End { netns, ifname: inner }, end)?;
            // Whole frames, one at a time, up to any MTU that the ends may be given.
            ip(netns, &format!("link set dev {inner} mtu 65535 arp off up"))?;
            ip(end.netns, &format!("link set dev {} gso_max_segs 1", end.ifname))?;
            Side::open(end, netns, inner)
        };
        let sides = Arc::new([open(0)?, open(1)?]);

        let state = Arc::new(Mutex::new(State {
            made,
            wires: [Wire::new(shape, 0), Wire::new(shape, 1)],
            in_flight: [VecDeque::new(), VecDeque::new()],
            bytes_in_flight: [0; 2],
            up: [true; 2],
            blackhole: false,
            bytes: [0; 2],
            drops: [0; 2],
        }));
        let (stopped, stop) = std::io::pipe().map_err(|e| Error::io("make a pipe", e))?;
        let mut carrier =
            Carrier { state: Arc::clone(&state), sides: Arc::clone(&sides), buffer: vec![0; 70_000] };
        let thread = std::thread::Builder::new()
            .name(format!("link {}", ends[0].ifname))
            .spawn(move || carrier.run(&stopped))
            .map_err(|e| Error::io("start a link's thread", e))?;
        Ok(Emulator { state, sides, stop: Some(stop), thread: Some(thread), _middle: middle })
    }

    /// For the frames to come.
    pub fn set_shape(&self, shape: &Shape) {
        self.lock().wires.iter_mut().for_each(|wire| wire.set_shape(shape));
    }

    /// When this returns, nothing comes through any more.
    pub fn set_blackhole(&self, on: bool) {
        let mut state = self.lock();
        state.blackhole = on;
        if on {
            state.lose_what_is_in_flight();
        }
    }

    pub fn counters(&self) -> Counters {
        let state = self.lock();
        Counters { at: state.made.elapsed(), a_to_b_bytes: state.bytes[0], b_to_a_bytes: state.bytes[1] }
    }

    pub fn drops(&self) -> Drops {
        let mut state = self.lock();
        for (side, drops) in self.sides.iter().zip(&mut state.drops) {
            *drops += u64::from(device::packet_overflow(&side.frames).unwrap_or(0));
        }
        Drops { a_to_b: state.drops[0], b_to_a: state.drops[1] }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The link's namespace, with the inner ends. A namespace goes in the background after its last handle; the pairs
/// of interfaces go when this is dropped.
struct Middle(Netns);

impl Drop for Middle {
    fn drop(&mut self) {
        for inner in INNER {
            if let Err(error) = ip(&self.0, &format!("link del dev {inner}")) {
                tracing::debug!(%error, "link was gone already");
            }
        }
    }
}

/// What the thread shares with the handle. Index 0 is the direction from a to b, or the end a.
struct State {
    made: Instant,
    wires: [Wire; 2],
    in_flight: [VecDeque<(Duration, Vec<u8>)>; 2],
    bytes_in_flight: [usize; 2],
    up: [bool; 2],
    blackhole: bool,
    bytes: [u64; 2],
    drops: [u64; 2],
}

impl State {
    /// `frame` begins with its virtio_net_hdr.
    fn accept(&mut self, direction: usize, frame: &[u8]) {
        let now = self.made.elapsed();
        let len = frame.len() - VNET_HEADER;
        let dead = self.blackhole || self.up != [true; 2] || self.bytes_in_flight[direction] > MOST_IN_FLIGHT;
        match if dead { Verdict::Drop } else { self.wires[direction].on_frame(now, len) } {
            Verdict::Drop => self.drops[direction] += 1,
            Verdict::DeliverAt(at) => {
                self.bytes_in_flight[direction] += len;
                self.in_flight[direction].push_back((at, frame.to_vec()));
            }
        }
    }

    fn deliver(&mut self, direction: usize, to: &Side) {
        while let Some((_, frame)) =
            self.in_flight[direction].pop_front_if(|(at, _)| *at <= self.made.elapsed())
        {
            let len = frame.len() - VNET_HEADER;
            self.bytes_in_flight[direction] -= len;
            match send(to.frames.as_raw_fd(), &frame, MsgFlags::empty()) {
                Ok(_) => self.bytes[direction] += len as u64,
                Err(_) => self.drops[direction] += 1,
            }
        }
    }

    fn lose_what_is_in_flight(&mut self) {
        for direction in [0, 1] {
            self.drops[direction] += self.in_flight[direction].len() as u64;
            self.in_flight[direction].clear();
            self.bytes_in_flight[direction] = 0;
        }
    }

    fn next_delivery(&self) -> Option<Duration> {
        self.in_flight.iter().filter_map(|queue| queue.front()).map(|(at, _)| *at).min()
    }
}

/// `sizeof(struct virtio_net_hdr)`.
const VNET_HEADER: usize = 10;

/// One end, as the thread sees it.
struct Side {
    ifname: String,
    inner: &'static str,
    /// Packet socket on the inner end.
    frames: OwnedFd,
    /// In the namespace of the end: rings when an interface changes.
    doorbell: OwnedFd,
}

impl Side {
    fn open(end: End<'_>, netns: &Netns, inner: &'static str) -> Result<Self> {
        let what = || format!("watch interface {} in {}", end.ifname, end.netns.name());
        let frames = netns
            .run(|| device::packet_socket(inner, RECEIVE_BUFFER))?
            .map_err(|e| Error::io(format!("open a packet socket for {}", end.ifname), e))?;
        let doorbell = end.netns.run(doorbell)?.map_err(|e| Error::io(what(), e))?;
        Ok(Side { ifname: end.ifname.into(), inner, frames, doorbell })
    }

    fn is_up(&self) -> bool {
        device::interface_flags(&self.doorbell, &self.ifname).is_ok_and(|flags| flags & IFF_UP != 0)
    }

    /// The end has a carrier while the inner end is up.
    fn set_carrier(&self, on: bool) {
        let set = device::interface_flags(&self.frames, self.inner).and_then(|flags| {
            let flags = if on { flags | IFF_UP } else { flags & !IFF_UP };
            device::set_interface_flags(&self.frames, self.inner, flags)
        });
        if let Err(error) = set {
            tracing::warn!(ifname = self.ifname, on, %error, "carrier not set");
        }
    }
}

/// A socket that has something to read after an interface of the calling thread's namespace changed. What
/// changed is asked afterwards, so that a lost message does no harm.
fn doorbell() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, RTMGRP_LINK as u32))?;
    Ok(socket)
}

/// The thread's own things.
struct Carrier {
    state: Arc<Mutex<State>>,
    sides: Arc<[Side; 2]>,
    buffer: Vec<u8>,
}

impl Carrier {
    fn run(&mut self, stopped: &PipeReader) {
        let mut woke = Instant::now();
        // What the last poll said of the sockets.
        let mut readable = [true; 2];
        loop {
            let (moved, more, next) = self.carry(readable);
            let dense = moved && woke.elapsed() < 4 * NAP;
            woke = Instant::now();

            let [a, b] = &*self.sides;
            let fds =
                [stopped.as_fd(), a.doorbell.as_fd(), b.doorbell.as_fd(), a.frames.as_fd(), b.frames.as_fd()];
            let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let (watched, timeout) = match next {
                _ if more => (&mut fds[..], Some(Duration::ZERO)),
                _ if dense => (&mut fds[..3], Some(NAP)),
                next => (&mut fds[..], next),
            };
            match ppoll(watched, timeout.map(TimeSpec::from_duration), None) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return tracing::error!(%error, ifname = a.ifname, "link ends: poll"),
            }
            let [stop, changed_a, changed_b, frames @ ..] = fds.map(|fd| fd.any().unwrap_or(true));
            if stop {
                return;
            }
            readable = if dense { [true; 2] } else { frames };
            if changed_a || changed_b {
                self.propagate_carrier();
            }
        }
    }

    /// Takes what has arrived at the `readable` ends, and delivers what is due. Did any frame move, are there more to
    /// read, and how long until the next one is due?
    fn carry(&mut self, readable: [bool; 2]) -> (bool, bool, Option<Duration>) {
        let state = Arc::clone(&self.state);
        let mut state = lock(&state);
        let before = (state.bytes, state.drops, state.bytes_in_flight);
        let mut more = false;
        for direction in [0, 1].into_iter().filter(|n| readable[*n]) {
            more |= self.receive(direction, &mut state);
        }
        for direction in [0, 1] {
            state.deliver(direction, &self.sides[1 - direction]);
        }
        let moved = before != (state.bytes, state.drops, state.bytes_in_flight);
        let next = state.next_delivery().map(|at| at.saturating_sub(state.made.elapsed()));
        (moved, more, next)
    }

    /// Are there more frames to read?
    fn receive(&mut self, direction: usize, state: &mut State) -> bool {
        for _ in 0..BATCH {
            match recv(self.sides[direction].frames.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => state.accept(direction, &self.buffer[..length]),
                // ENETDOWN is reported once each time when the inner end goes down.
                Err(Errno::EAGAIN | Errno::ENETDOWN) => return false,
                Err(error) => {
                    tracing::warn!(%error, ifname = self.sides[direction].ifname, "frame not read");
                    return false;
                }
            }
        }
        true
    }

    /// As on a wire, each end has a carrier while the other is up; a frame on the way when an end goes down is lost.
    fn propagate_carrier(&self) {
        for side in &*self.sides {
            while !matches!(
                recv(side.doorbell.as_raw_fd(), &mut [0; 64], MsgFlags::empty()),
                Err(Errno::EAGAIN)
            ) {}
        }
        let up = [0, 1].map(|n| self.sides[n].is_up());
        let before = std::mem::replace(&mut lock(&self.state).up, up);
        for end in [0, 1] {
            if up[end] != before[end] {
                self.sides[1 - end].set_carrier(up[end]);
            }
        }
        if up != [true; 2] {
            lock(&self.state).lose_what_is_in_flight();
        }
    }
}
