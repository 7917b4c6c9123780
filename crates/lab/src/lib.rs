//! Multipath TCP networks in network namespaces, from scenario files.
//!
//! A [`Scenario`] is read from TOML and checked; [`Lab::build`] makes its network, which dropping the [`Lab`] removes.
//! Tests of other crates use it so:
//!
//! ```no_run
//! # async fn example() -> lab::Result<()> {
//! let text = r#"
//!     title = "two hosts"
//!     [nodes]
//!     client = {}
//!     server = {}
//!     [links.wire]
//!     a = { node = "client", dev = "eth0", addresses = ["10.0.0.2/24"] }
//!     b = { node = "server", dev = "eth0", addresses = ["10.0.0.1/24"] }
//!     shape = { rate = "100mbit" }
//! "#;
//! let lab = lab::Lab::build(&lab::Scenario::parse("two", "two.toml", text, None)?).await?;
//! let ping = lab.spawn("client", &["ping", "-c1", "10.0.0.1"]).await?;
//! assert!(ping.exit().await.success());
//! lab.link("wire").set_blackhole(true)?;
//! # Ok(()) }
//! ```

mod capture;
pub mod control;
mod error;
pub mod graph;
pub mod home;
mod janitor;
pub mod judge;
pub mod link;
mod mounts;
pub mod privilege;
pub mod process;
pub mod record;
pub mod report;
pub mod run;
pub mod scenario;
mod step;
mod topology;

pub use error::{Error, Result};
pub use scenario::Scenario;
pub use topology::{Lab, Options};
