//! What can go wrong, with the operation and the object named.

/// A failed operation of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration says something that makes no sense.
    #[error(transparent)]
    Config(#[from] configfile::Error),
    /// The kernel refused something.
    #[error(transparent)]
    Kernel(#[from] mptcp::Error),
}

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
