//! Path-manager events (`MPTCP_EVENT_*`, multicast group `mptcp_pm_events`).

use std::net::IpAddr;

use crate::{AddrId, Netns, Result, Token};

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
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of enum mptcp_event_attr
pub struct Event {
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

/// What the event stream delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// An event.
    Event(Event),
    /// The socket's buffer overran (ENOBUFS): events are lost; read the state anew from [`crate::diag`].
    Overrun,
}

/// The event stream of one network namespace.
#[derive(Debug)]
pub struct Events {}

impl Events {
    /// Subscribes in `netns`. Needs CAP_NET_ADMIN in its user namespace.
    pub fn subscribe(_netns: &Netns) -> Result<Self> {
        unimplemented!()
    }

    /// Waits for the next event. Cancel safe.
    pub async fn next(&mut self) -> Result<Notice> {
        unimplemented!()
    }
}
