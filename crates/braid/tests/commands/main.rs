//! The commands against the real kernel, each test in network namespaces of its own.

mod bad_input;
mod echo;
mod endpoint;
mod monitor;
mod mptcpify;
mod net;
mod pm;
mod primary;
mod run;
mod show;
mod snapshots;
mod stats;
mod subflow;
