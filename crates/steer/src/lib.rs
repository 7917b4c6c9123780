//! Which path a live Multipath TCP connection takes, decided from outside the program that has it.

pub mod daemon;
mod error;
pub mod policy;
pub mod primary;

pub use error::{Error, Result};
