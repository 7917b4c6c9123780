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
//! | [`counters`] | how often joins, fallbacks, resets, … happened | `/proc/net/netstat` |
//! | [`sysctl`] | `net.mptcp.*` of one namespace | `/proc/sys/net/mptcp` |
//! | [`netns`] | doing any of that in another network namespace | `setns(2)` |
//! | [`features`] | what the running kernel can do | probes |
//!
//! # First steps
//!
//! A server needs nothing but a listener: clients that speak MPTCP get it, the others get TCP.
//!
//! ```no_run
//! # async fn example() -> mptcp::Result<()> {
//! use mptcp::socket::{self, Options};
//!
//! let listener = socket::listen("[::]:8080".parse().unwrap(), &Options::default())?;
//! let (stream, _) = listener.accept().await.unwrap();
//! for subflow in mptcp::info::subflows(&stream)? {
//!     println!("{} to {}: rtt {} us", subflow.local, subflow.remote, subflow.tcp.rtt_us);
//! }
//! # Ok(()) }
//! ```
//!
//! More subflows come when the path manager is told which addresses it may use, and how many subflows
//! a connection may have. At the client:
//!
//! ```no_run
//! # async fn example() -> mptcp::Result<()> {
//! use mptcp::pm::{Client, Endpoint, EndpointFlags, Limits};
//!
//! let pm = Client::connect(&mptcp::Netns::current()?).await?;
//! pm.set_limits(Limits { subflows: 2, add_addr_accepted: 2 }).await?;
//! pm.add_endpoint(&Endpoint::new("192.0.2.7".parse().unwrap(), EndpointFlags::SUBFLOW)).await?;
//! # Ok(()) }
//! ```
//!
//! The programs in `examples/` go on from there: `listener`, `dialer`, and `watch`, which follows the events.
//!
//! # Errors
//!
//! An [`Error`] names the operation and its object, and keeps the kernel's own words:
//! `add endpoint 10.0.0.2 id 2: File exists (kernel: …)`. A missing capability ([`Error::Capability`]) and a feature
//! that the running kernel lacks ([`Error::Unsupported`]) have variants of their own.
//!
//! # Kernels
//!
//! | Linux | brings |
//! |---|---|
//! | 5.6 | MPTCP sockets; before, [`socket`] makes TCP ones |
//! | 5.7 | endpoints and limits |
//! | 5.9 | [`diag`] |
//! | 5.12 | events, changing endpoints |
//! | 5.16 | [`info::of`] sees a fallback, [`info::subflows`] all subflows |
//! | 5.19 | commands of the userspace path manager |
//! | 6.2 | events of listeners |
//! | 6.5 | bytes in [`info::Info`], [`info::subflows`] in one consistent reading |
//! | 6.15 | [`diag`] shows subflows without CAP_NET_ADMIN |
//! | 6.18 | laminar endpoints |
//!
//! On older kernels an answer has less detail, or is [`Error::Unsupported`].

pub mod counters;
pub mod diag;
mod error;
pub mod features;
pub mod info;
mod netlink;
pub mod netns;
pub mod pm;
pub mod socket;
pub mod sys;
pub mod sysctl;

pub use error::{Error, Result};
pub use netns::Netns;
pub use wire::{AddrId, Token};
