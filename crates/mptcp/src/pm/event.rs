//! Path-manager events (`MPTCP_EVENT_*`, multicast group `mptcp_pm_events`).

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;

use netlink_bindings::mptcp_pm::{EventAttr, IterableEventAttr};
use nix::sys::socket::{SockFlag, SockProtocol, setsockopt, sockopt};
use serde::{Serialize, Serializer};
use tokio::io::unix::AsyncFd;

use super::client;
use crate::{AddrId, Error, Netns, Result, Token, netlink, sys};

/// The kind of an event. Names are those of `ip mptcp monitor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EventKind {
    /// A connection was opened or accepted; it may still fall back to TCP.
    Created,
    /// The connection is established as MPTCP: more subflows may follow.
    Established,
    /// The connection is gone.
    Closed,
    /// The peer announced an address (ADD_ADDR).
    Announced,
    /// The peer withdrew an address (REMOVE_ADDR).
    Removed,
    /// A subflow beside the first one is established.
    SubflowEstablished,
    /// A subflow is gone.
    SubflowClosed,
    /// The peer changed a subflow's priority (MP_PRIO).
    SubflowPriority,
    /// A listening MPTCP socket appeared.
    ListenerCreated,
    /// A listening MPTCP socket is gone.
    ListenerClosed,
    /// A kind that this version does not know, by its number.
    Unknown(u8),
}

/// One event. A field is `None` where the kernel did not send it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // the names are those of enum mptcp_event_attr
pub struct Event {
    #[serde(rename = "event", serialize_with = "as_text")]
    pub kind: EventKind,
    pub token: Option<Token>,
    pub local_id: Option<AddrId>,
    pub remote_id: Option<AddrId>,
    pub local_ip: Option<IpAddr>,
    pub remote_ip: Option<IpAddr>,
    pub local_port: Option<u16>,
    pub remote_port: Option<u16>,
    pub backup: Option<bool>,
    pub error: Option<u8>,
    pub flags: Option<u16>,
    pub timeout: Option<u32>,
    pub ifindex: Option<i32>,
    pub reset_reason: Option<u32>,
    pub reset_flags: Option<u32>,
    pub server_side: Option<bool>,
}

fn as_text<S: Serializer>(kind: &EventKind, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(kind)
}

/// What the event stream delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// An event.
    Event(Event),
    /// The socket's buffer overran (ENOBUFS): events between the last one and the next one are lost. Read the
    /// state anew from [`crate::diag`].
    Overrun,
}

/// The event stream of one network namespace (multicast group `mptcp_pm_events`, Linux 5.12 and newer).
///
/// ```no_run
/// # async fn example() -> mptcp::Result<()> {
/// use mptcp::pm::{Events, Notice};
///
/// let mut events = Events::subscribe(&mptcp::Netns::current()?)?;
/// loop {
///     match events.next().await? {
///         Notice::Event(event) => println!("{} {:?}", event.kind, event.token),
///         Notice::Overrun => println!("events were lost: read the connections anew"),
///     }
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Events {
    socket: AsyncFd<OwnedFd>,
    family: u16,
    buffer: Vec<u8>,
    /// What was received and nobody has taken yet.
    queue: VecDeque<Notice>,
}

impl Events {
    /// Subscribes in `netns`. Needs CAP_NET_ADMIN in the user namespace that owns it.
    ///
    /// While anybody is subscribed, the kernel accepts joins to connections of the userspace path manager.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn subscribe(netns: &Netns) -> Result<Self> {
        Self::open(netns, None)
    }

    /// Subscribes with a receive buffer of `bytes` instead of the system's default. The kernel doubles it, and caps
    /// it by `net.core.rmem_max` where the caller lacks CAP_NET_ADMIN in the initial user namespace
    /// (`SO_RCVBUFFORCE`, else `SO_RCVBUF`).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn subscribe_with_buffer(netns: &Netns, bytes: usize) -> Result<Self> {
        Self::open(netns, Some(bytes))
    }

    fn open(netns: &Netns, buffer: Option<usize>) -> Result<Self> {
        let what = || format!("subscribe to the events of network namespace {}", netns.name());
        let (_, family) = client::open(netns, &what())?;
        let group = family.group("mptcp_pm_events").ok_or_else(|| Error::Unsupported {
            what: what(),
            feature: "events of the MPTCP path manager",
            since: "5.12",
        })?;
        let fd = netlink::open(netns, SockProtocol::NetlinkGeneric, SockFlag::SOCK_NONBLOCK)?;
        if let Some(bytes) = buffer {
            setsockopt(&fd, sockopt::RcvBufForce, &bytes)
                .or_else(|_| setsockopt(&fd, sockopt::RcvBuf, &bytes))
                .map_err(|e| Error::io(what(), e))?;
        }
        sys::setsockopt(&fd, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group as i32).map_err(|e| {
            match e.raw_os_error() {
                Some(libc::EPERM) => Error::Capability { what: what(), capability: "CAP_NET_ADMIN" },
                _ => Error::io(what(), e),
            }
        })?;
        let socket = sys::readable(fd).map_err(|e| Error::io(what(), e))?;
        Ok(Events { socket, family: family.id, buffer: Vec::new(), queue: VecDeque::new() })
    }

    /// Waits for the next event. Cancel safe: no event is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Notice> {
        loop {
            if let Some(notice) = self.queue.pop_front() {
                return Ok(notice);
            }
            let mut ready = self.socket.readable().await.map_err(|e| Error::io(NEXT, e))?;
            match ready.try_io(|socket| netlink::receive(socket.as_fd(), &mut self.buffer).map(<[u8]>::len)) {
                Ok(Ok(length)) => self.enqueue(length)?,
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => self.overrun()?,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(Error::io(NEXT, error)),
                Err(_would_block) => {}
            }
        }
    }

    fn enqueue(&mut self, length: usize) -> Result<()> {
        let events = parse(self.family, &self.buffer[..length])
            .map_err(|detail| Error::Malformed { what: NEXT.into(), detail })?;
        self.queue.extend(events.into_iter().map(Notice::Event));
        Ok(())
    }

    /// The kernel reports one ENOBUFS, and then drops events in silence until the buffer was empty once
    /// (netlink_overrun(), netlink_rcv_wake()). So what it holds is read first: it is older than the loss.
    fn overrun(&mut self) -> Result<()> {
        loop {
            match netlink::receive(self.socket.as_fd(), &mut self.buffer).map(<[u8]>::len) {
                Ok(length) => self.enqueue(length)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(NEXT, error)),
            }
        }
        self.queue.push_back(Notice::Overrun);
        Ok(())
    }
}

const NEXT: &str = "read path-manager events";

/// `MPTCP_PM_EV_FLAG_SERVER_SIDE`, which replaces the attribute (Linux 6.18 and newer).
const FLAG_SERVER_SIDE: u16 = 1 << 1;

/// The events in a datagram from `family`.
fn parse(family: u16, datagram: &[u8]) -> Result<Vec<Event>, String> {
    let mut events = Vec::new();
    for message in netlink::messages(datagram) {
        let message = message?;
        if message.kind != family {
            continue;
        }
        let (header, attributes) =
            message.payload.split_first_chunk::<GENL_HEADER>().ok_or("an event without its header")?;
        events.push(Event::parse(header[0], EventAttr::new(attributes)));
    }
    Ok(events)
}

/// `struct genlmsghdr`: the command, a version, two bytes of padding.
const GENL_HEADER: usize = 4;

impl Event {
    fn parse(kind: u8, attributes: IterableEventAttr<'_>) -> Self {
        let v4 = |bits: u32| IpAddr::from(bits.to_be_bytes());
        let v6 = |octets: &[u8]| <[u8; 16]>::try_from(octets).ok().map(IpAddr::from);
        let flags = attributes.get_flags().ok();
        let server_flag = flags.filter(|flags| flags & FLAG_SERVER_SIDE != 0).map(|_| true);
        Event {
            kind: EventKind::from(kind),
            token: attributes.get_token().ok().map(Token),
            local_id: attributes.get_loc_id().ok().map(AddrId),
            remote_id: attributes.get_rem_id().ok().map(AddrId),
            local_ip: attributes
                .get_saddr4()
                .map(v4)
                .ok()
                .or_else(|| attributes.get_saddr6().ok().and_then(v6)),
            remote_ip: attributes
                .get_daddr4()
                .map(v4)
                .ok()
                .or_else(|| attributes.get_daddr6().ok().and_then(v6)),
            local_port: attributes.get_sport().ok(),
            remote_port: attributes.get_dport().ok(),
            backup: attributes.get_backup().ok().map(|backup| backup != 0),
            error: attributes.get_error().ok(),
            flags,
            timeout: attributes.get_timeout().ok(),
            ifindex: attributes.get_if_idx().ok(),
            reset_reason: attributes.get_reset_reason().ok(),
            reset_flags: attributes.get_reset_flags().ok(),
            server_side: attributes.get_server_side().ok().map(|server| server != 0).or(server_flag),
        }
    }
}

/// Number (`enum mptcp_event_type`), kind, and the name that `ip mptcp monitor` prints.
const KINDS: [(u8, EventKind, &str); 10] = [
    (1, EventKind::Created, "CREATED"),
    (2, EventKind::Established, "ESTABLISHED"),
    (3, EventKind::Closed, "CLOSED"),
    (6, EventKind::Announced, "ANNOUNCED"),
    (7, EventKind::Removed, "REMOVED"),
    (10, EventKind::SubflowEstablished, "SF_ESTABLISHED"),
    (11, EventKind::SubflowClosed, "SF_CLOSED"),
    (13, EventKind::SubflowPriority, "SF_PRIO"),
    (15, EventKind::ListenerCreated, "LISTENER_CREATED"),
    (16, EventKind::ListenerClosed, "LISTENER_CLOSED"),
];

impl EventKind {
    /// Every kind that has a name, in the kernel's order.
    pub fn known() -> impl Iterator<Item = EventKind> {
        KINDS.into_iter().map(|(_, kind, _)| kind)
    }
}

impl From<u8> for EventKind {
    fn from(number: u8) -> Self {
        KINDS.iter().find(|(n, ..)| *n == number).map_or(EventKind::Unknown(number), |(_, kind, _)| *kind)
    }
}

/// As `ip mptcp monitor` names it: `SF_ESTABLISHED`; an unknown kind is `UNKNOWN_42`.
impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, KINDS.iter().find(|(_, kind, _)| kind == self)) {
            (_, Some((.., name))) => f.pad(name),
            (EventKind::Unknown(number), None) => write!(f, "UNKNOWN_{number}"),
            (kind, None) => write!(f, "{kind:?}"),
        }
    }
}

/// Not the name of an event.
#[derive(Debug, thiserror::Error)]
#[error("no such event; there are {}, and UNKNOWN_n", KINDS.map(|(.., name)| name).join(", "))]
pub struct NotAnEvent;

/// What `Display` writes, in capitals or not.
impl FromStr for EventKind {
    type Err = NotAnEvent;

    fn from_str(text: &str) -> Result<Self, NotAnEvent> {
        let name = text.to_ascii_uppercase();
        if let Some((_, kind, _)) = KINDS.iter().find(|(.., known)| *known == name) {
            return Ok(*kind);
        }
        let number = name.strip_prefix("UNKNOWN_").and_then(|number| number.parse().ok());
        number.map(|number: u8| EventKind::from(number)).ok_or(NotAnEvent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_bindings::mptcp_pm::PushEventAttr;
    use proptest::prelude::*;

    fn datagram(kind: u8, attributes: &[u8]) -> Vec<u8> {
        let mut bytes = ((20 + attributes.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(30u16.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([kind, 1, 0, 0]);
        bytes.extend(attributes);
        bytes
    }

    #[test]
    fn a_closed_subflow_tells_error_and_reset_reason() {
        let mut attributes = Vec::new();
        let _ = PushEventAttr::new(&mut attributes)
            .push_token(0x1234)
            .push_saddr6(&[0; 16])
            .push_dport(80)
            .push_error(110)
            .push_reset_reason(3)
            .push_reset_flags(1);
        let events = parse(30, &datagram(11, &attributes)).unwrap();
        assert_eq!(events.len(), 1);
        let event = &events[0];
        assert_eq!(event.kind, EventKind::SubflowClosed);
        assert_eq!(event.token, Some(Token(0x1234)));
        assert_eq!(event.local_ip, Some("::".parse().unwrap()));
        assert_eq!((event.local_port, event.remote_port), (None, Some(80)));
        assert_eq!((event.error, event.reset_reason, event.reset_flags), (Some(110), Some(3), Some(1)));
    }

    #[test]
    fn the_server_side_is_known_by_attribute_or_flag() {
        let event = |push: fn(PushEventAttr<&mut Vec<u8>>) -> PushEventAttr<&mut Vec<u8>>| {
            let mut attributes = Vec::new();
            drop(push(PushEventAttr::new(&mut attributes)));
            Event::parse(1, EventAttr::new(&attributes)).server_side
        };
        assert_eq!(event(|e| e.push_server_side(1)), Some(true));
        assert_eq!(event(|e| e.push_server_side(0)), Some(false));
        assert_eq!(event(|e| e.push_flags(FLAG_SERVER_SIDE)), Some(true));
        assert_eq!(event(|e| e.push_flags(1)), None);
    }

    #[test]
    fn every_kind_has_a_number_and_a_name() {
        for (number, kind, name) in KINDS {
            assert_eq!(EventKind::from(number), kind);
            assert_eq!(kind.to_string(), name);
            assert_eq!(name.to_lowercase().parse::<EventKind>().unwrap(), kind);
        }
        assert_eq!("unknown_200".parse::<EventKind>().unwrap(), EventKind::Unknown(200));
        assert!("UNKNOWN_256".parse::<EventKind>().is_err() && "SF".parse::<EventKind>().is_err());
        assert_eq!(EventKind::from(200), EventKind::Unknown(200));
        assert_eq!(EventKind::Unknown(200).to_string(), "UNKNOWN_200");
    }

    #[test]
    fn attributes_of_later_kernels_are_passed_over() {
        let attributes = [8, 0, 99, 0, 1, 2, 3, 4, 8, 0, 1, 0, 0x34, 0x12, 0, 0];
        let events = parse(30, &datagram(77, &attributes)).unwrap();
        assert_eq!(events[0].kind, EventKind::Unknown(77));
        assert_eq!(events[0].token, Some(Token(u32::from_ne_bytes([0x34, 0x12, 0, 0]))));
    }

    proptest! {
        #[test]
        fn no_datagram_makes_the_decoder_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), kind: u8,
        ) {
            let _ = parse(30, &bytes);
            let _ = parse(30, &datagram(kind, &bytes));
        }
    }
}
