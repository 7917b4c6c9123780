//! The path manager, over generic netlink `mptcp_pm` (`Documentation/netlink/specs/mptcp_pm.yaml`):
//! endpoints and limits of the in-kernel one, commands of the userspace one, events of both.

mod client;
mod endpoint;
mod event;
mod limits;

pub use client::Client;
pub use endpoint::{Address, Endpoint, EndpointFlags};
pub use event::{Event, EventKind, Events, NotAnEvent, Notice};
pub use limits::Limits;
