//! What can go wrong, with the operation and the object named.

use std::io;

/// A failed operation of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed. `what` names the operation and the object: `listen on [::]:80`.
    #[error("{what}: {}", describe(source))]
    Io {
        /// Operation and object.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("{what}: {}{}", describe(source), extack.as_ref().map(|m| format!(" (kernel: {m})")).unwrap_or_default())]
    Kernel {
        /// Operation and object: `add endpoint 10.0.0.2 id 2`.
        what: String,
        /// The error number.
        source: io::Error,
        /// The kernel's own words (`NLMSGERR_ATTR_MSG`).
        extack: Option<String>,
    },
    /// This kernel lacks the feature.
    #[error("{what}: this kernel lacks {feature} (Linux {since} and newer have it)")]
    Unsupported {
        /// Operation and object.
        what: String,
        /// The feature's name.
        feature: &'static str,
        /// First kernel version that has it.
        since: &'static str,
    },
    /// The caller lacks a capability in the user namespace that owns the network namespace.
    #[error("{what}: needs {capability} (run as root, or grant it: setcap {}+ep on the program)", capability.to_lowercase())]
    Capability {
        /// Operation and object.
        what: String,
        /// `CAP_NET_ADMIN`, for instance.
        capability: &'static str,
    },
    /// Bytes from the kernel that don't decode.
    #[error("{what}: malformed answer from the kernel: {detail}")]
    Malformed {
        /// Operation and object.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
}

/// The system's error text without Rust's `(os error N)`.
fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => text.trim_end_matches(&format!(" (os error {code})")).into(),
        None => text,
    }
}

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] for the operation `what`.
    pub fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Io { what: what.into(), source: source.into() }
    }

    /// Did the kernel refuse because the connection has the in-kernel path manager
    /// (`mptcp_userspace_pm_get_sock()`)?
    pub fn is_in_kernel_path_manager(&self) -> bool {
        matches!(self, Error::Kernel { extack: Some(words), .. } if words.contains("userspace PM not selected"))
    }

    /// The system's error number, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Error::Io { source, .. } | Error::Kernel { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
