//! Why a program could not be started over MPTCP.

use std::io;
use std::path::PathBuf;

/// A program that was not started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such program.
    #[error("{program}: {}", nix::errno::Errno::ENOENT.desc())]
    NotFound {
        /// As it was asked for.
        program: String,
    },
    /// The program is there and cannot be executed.
    #[error("{}: {}", path.display(), describe(reason))]
    NotExecutable {
        /// Where it is.
        path: PathBuf,
        /// The system's answer.
        reason: io::Error,
    },
    /// MPTCP is required, and there is none.
    #[error("--require: {0}")]
    Unavailable(String),
    /// An operation of the system failed.
    #[error("{what}: {}", describe(source))]
    System {
        /// Operation and object.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel or another supervisor leaves no room for ours.
    #[error("{0}")]
    Unsupported(&'static str),
}

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// For `map_err`: an [`Error::System`] for the operation `what`.
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Error::System { what, source: source.into() }
    }

    /// The exit code that shells and env(1) give for it: 127 not found, 126 not executable, 2 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::NotFound { .. } => 127,
            Error::NotExecutable { .. } => 126,
            _ => 2,
        }
    }
}

/// The system's error text without Rust's `(os error N)`.
pub(crate) fn describe(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => nix::errno::Errno::from_raw(code).desc().to_string(),
        None => error.to_string(),
    }
}
