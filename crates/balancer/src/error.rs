//! What can go wrong, with the operation and the object named.

use std::io;
use std::net::SocketAddr;

/// Why a balancer could not start, reload or tell.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration says something that makes no sense.
    #[error(transparent)]
    Config(#[from] configfile::Error),
    /// The kernel refused a BPF operation.
    #[error("{what}: {says}")]
    Bpf {
        /// Operation and object.
        what: String,
        /// The kernel's answer, with the verifier's last words where it has some.
        says: String,
    },
    /// There is no balancer of that name, or it cannot be reached.
    #[error("balancer {name}: {message}")]
    Balancer {
        /// Its name.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// A backend's agent did not tell its connections.
    #[error("agent {agent}: {message}")]
    Agent {
        /// Where it should be.
        agent: SocketAddr,
        /// What is wrong with it.
        message: String,
    },
    /// Another operation of the system failed.
    #[error(transparent)]
    System(#[from] mptcp::Error),
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::System(mptcp::Error::io(what, source))
    }

    pub(crate) fn capability(what: impl Into<String>) -> Self {
        let capability = "CAP_BPF,CAP_PERFMON,CAP_NET_ADMIN";
        Error::System(mptcp::Error::Capability { what: what.into(), capability })
    }

    /// Of `what`; missing capabilities are named.
    pub(crate) fn bpf(what: impl Into<String>, error: impl std::error::Error + 'static) -> Self {
        let what = what.into();
        let mut says = String::new();
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
        while let Some(error) = cause {
            let denied = error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.raw_os_error() == Some(nix::libc::EPERM));
            if denied {
                return Error::capability(what);
            }
            let text = error.to_string();
            if !says.contains(&text) {
                says = if says.is_empty() { text } else { format!("{says}: {text}") };
            }
            cause = error.source();
        }
        // The verifier's log is long; what it stumbled over stands at its end.
        let lines: Vec<&str> = says.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let says = match lines.as_slice() {
            [first, .., before, last] if lines.len() > 4 => format!("{first} … {before}; {last}"),
            lines => lines.join("; "),
        };
        Error::Bpf { what, says }
    }

    /// Does the caller lack a capability?
    pub fn is_capability(&self) -> bool {
        matches!(self, Error::System(mptcp::Error::Capability { .. }))
    }
}

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
