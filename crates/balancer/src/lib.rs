//! A load balancer for MPTCP services, in the kernel's TC layer.
//!
//! The data plane (`bpf/`) sends each packet to the backend that has its connection, joins included; this
//! crate's Rust is the control plane: it loads the programs, writes maps, checks backends and reads counters.
//!
//! | module | what for |
//! |---|---|
//! | [`config`] | the file: services, backends, checks |
//! | [`maglev`] | which backend a hash belongs to, with weights |
//! | [`plane`] | programs, maps, interfaces; what of them outlives the process |
//! | [`neighbour`] | where on the network a backend is |
//! | [`health`] | does a backend serve? |
//! | [`report`] | a backend's connections, told by its agent |
//! | [`rebuild`] | that into the tables |
//! | [`run`] | the daemon: all of that until a signal |
//! | [`status`] | what a balancer does, read from its pinned maps |
//! | [`metrics`] | the same for Prometheus |
//! | [`agent`] | what a backend needs |

pub mod abi;
pub mod agent;
pub mod config;
mod error;
pub mod health;
mod lock;
pub mod maglev;
pub mod metrics;
pub mod neighbour;
pub mod plane;
pub mod rebuild;
pub mod report;
pub mod run;
pub mod status;

pub use config::Config;
pub use error::{Error, Result};
