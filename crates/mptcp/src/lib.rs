//! The Linux kernel's Multipath TCP (RFC 8684) from Rust.
//!
//! The kernel speaks the protocol; this crate asks it to, and tells what it does:
//!
//! | module | what for | kernel interface |
//! |---|---|---|
//! | [`socket`] | listeners and dialers whose connections are MPTCP, ordinary [`tokio::net`] types | `socket(…, IPPROTO_MPTCP)` |
//! | [`info`] | is this connection MPTCP, and over which subflows? | `getsockopt(SOL_MPTCP, …)` |
//! | [`pm`] | endpoints, limits, events, the userspace path manager | generic netlink `mptcp_pm` |
//! | [`diag`] | every MPTCP connection of a namespace, with its owner | `NETLINK_SOCK_DIAG` |
//! | [`sysctl`] | `net.mptcp.*` of one namespace | `/proc/sys/net/mptcp` |
//! | [`netns`] | doing any of that in another network namespace | `setns(2)` |

pub mod diag;
mod error;
pub mod features;
mod id;
pub mod info;
mod netlink;
pub mod netns;
pub mod pm;
pub mod socket;
pub mod sys;
pub mod sysctl;

pub use error::{Error, Result};
pub use id::{AddrId, Token};
pub use netns::Netns;
