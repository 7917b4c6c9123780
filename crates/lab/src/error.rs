//! What can go wrong with a lab, with the operation and the object named.

use std::io;

/// A scenario that is no good, or a lab that could not be built or driven.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A scenario file says something that cannot be.
    #[error("{file}:{line}: {}{message}", if key.is_empty() { String::new() } else { format!("{key}: ") })]
    Scenario {
        /// The file, as it was named.
        file: String,
        /// Line in it, from 1.
        line: usize,
        /// The dotted key, `links.wifi.a.node`; empty for a syntax error.
        key: String,
        /// What is wrong.
        message: String,
    },
    /// No scenario, variant, node or running lab of that name.
    #[error("no {kind} named {name}{}", if known.is_empty() { String::new() } else { format!(" (there is: {known})") })]
    Unknown {
        /// `scenario`, for instance.
        kind: &'static str,
        /// The name that was asked for.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// Operation and object.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A program that the lab uses, or one of the scenario, did not do what it had to.
    #[error("{what}: {says}")]
    Program {
        /// Operation and object.
        what: String,
        /// What the program said, or what happened to it.
        says: String,
    },
    /// Sockets, path manager and namespaces.
    #[error(transparent)]
    Mptcp(#[from] mptcp::Error),
    /// A link.
    #[error(transparent)]
    Link(#[from] crate::link::Error),
}

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Io { what: what.into(), source: source.into() }
    }

    pub(crate) fn program(what: impl Into<String>, says: impl Into<String>) -> Self {
        Error::Program { what: what.into(), says: says.into() }
    }

    pub(crate) fn unknown<'n>(
        kind: &'static str,
        name: &str,
        known: impl IntoIterator<Item = &'n str>,
    ) -> Self {
        let known = known.into_iter().collect::<Vec<_>>().join(", ");
        Error::Unknown { kind, name: name.into(), known }
    }
}
