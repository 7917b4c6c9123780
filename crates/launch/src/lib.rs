//! `braid run`: any program, with its TCP sockets made Multipath TCP. No library is preloaded, so that static
//! programs and those in Go take part; no privilege is needed; children and threads follow.
//!
//! A seccomp filter stops the program's `socket(2)` calls that ask for TCP, and a supervisor answers each
//! with an MPTCP socket. Everything else stays as it is:
//!
//! ```text
//! shell ── braid run curl … ──(exec)──> curl …        same process: pid, parent, terminal, exit code, signals
//!               │                         │ socket(AF_INET, SOCK_STREAM, 0)
//!               └─ watcher                ▼
//!                     └─ supervisor <── kernel: stopped call    socket(…, IPPROTO_MPTCP) ──> descriptor in curl
//! ```
//!
//! | file | does |
//! |---|---|
//! | `start` | checks, starts watcher and supervisor, installs the filter, becomes the program |
//! | `program` | finds the program, and what of it matters here |
//! | `filter` | which system calls are stopped, as BPF |
//! | `supervisor` | the processes beside the program |
//! | `answer` | what a stopped call gets |
//! | `caller` | what can be looked at of the one who called |
//! | `options` | socket options: which MPTCP refuses, and copying them |
//! | [`report`] | what became of the sockets |
//! | [`service`] | the same for a unit of systemd, as a drop-in |
//! | [`mptcpify`] | another way, for every program of a host or a control group: BPF |
//!
//! The supervisor ends when the last process under the filter has ended. If it is killed, the kernel fails the calls
//! it would have answered with ENOSYS, and the watcher says so; connections that exist go on.

mod answer;
mod caller;
mod error;
mod filter;
pub mod mptcpify;
mod options;
mod program;
pub mod report;
pub mod service;
mod start;
mod supervisor;

pub use error::{Error, Result};
pub use start::{Plan, Role, run};
