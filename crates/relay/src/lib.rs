//! Relay between TCP and Multipath TCP connections.
//!
//! The way of a connection: a [`Listener`] accepts it and applies the limits, a [`Session`] checks the client
//! and dials the server, [`copy`](copy::copy_bidirectional) moves the bytes both ways until both halves have
//! closed, and [`metrics`] and one log line say how it ended and [whose fault](Fault) that was. A [`Relay`] is
//! all of that for many services, with reload and orderly shutdown; [`run`](run::run) drives one by signals.

pub mod config;
pub mod copy;
mod error;
pub mod limits;
pub mod listener;
pub mod metrics;
pub mod proxy_protocol;
pub mod run;
mod session;
pub mod transparent;

pub use config::{Config, Service};
pub use error::{End, Error, Fault, Leg, Result};
pub use listener::Listener;
pub use run::Relay;
pub use session::Session;
