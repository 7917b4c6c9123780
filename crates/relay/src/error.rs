//! What can go wrong with a relay as a whole ([`Error`]) and with one connection ([`End`]), and whose fault it is.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::proxy_protocol::HeaderError;

/// Why a relay could not start or reload.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration says something that makes no sense.
    #[error(transparent)]
    Config(#[from] configfile::Error),
    /// The name of a server does not resolve.
    #[error("service {service}: resolve {host}: {answer}")]
    Resolve {
        /// The service's name.
        service: String,
        /// The name that does not resolve.
        host: String,
        /// The resolver's answer.
        answer: io::Error,
    },
    /// A listening socket cannot be made.
    #[error("service {service}: {problem}")]
    Listen {
        /// The service's name.
        service: String,
        /// Operation, object and the system's answer.
        problem: mptcp::Error,
    },
    /// Another operation of the system failed.
    #[error("{0}")]
    System(mptcp::Error),
}

impl Error {
    /// An [`Error::System`] for the operation `what`.
    pub(crate) fn system(what: impl Into<String>, answer: io::Error) -> Self {
        Error::System(mptcp::Error::io(what, answer))
    }
}

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One of the two connections that a session joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leg {
    /// The connection that the relay accepted.
    Client,
    /// The connection that the relay dialled.
    Server,
}

impl fmt::Display for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Leg::Client => "client",
            Leg::Server => "server",
        })
    }
}

/// Who caused the end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Nobody: both sides closed.
    None,
    /// The client, or the path to it.
    Client,
    /// The server, or the path to it.
    Server,
    /// This process: its limits, its shutdown, its lack of resources.
    Relay,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::None => "none",
            Fault::Client => "client",
            Fault::Server => "server",
            Fault::Relay => "relay",
        })
    }
}

impl From<Leg> for Fault {
    fn from(leg: Leg) -> Self {
        match leg {
            Leg::Client => Fault::Client,
            Leg::Server => Fault::Server,
        }
    }
}

/// How a connection ended. All but [`End::Closed`] reset both legs, so that nobody takes a cut stream for a
/// complete one.
#[derive(Debug)]
#[non_exhaustive]
pub enum End {
    /// Both sides closed their half and everything was delivered.
    Closed,
    /// Reading from or writing to this leg failed.
    Broken(Leg, io::Error),
    /// No byte either way for the service's idle timeout.
    Idle(Duration),
    /// The peer on this leg acknowledged nothing for the service's user timeout.
    Stalled(Leg, Duration),
    /// The client's address is not allowed.
    Denied,
    /// The service has as many connections as it may.
    ServiceFull,
    /// The client's address has as many connections as it may.
    SourceFull,
    /// The client connected straight to the port of a transparent service.
    NotDiverted,
    /// The client's PROXY header is missing or malformed.
    BadHeader(HeaderError),
    /// This leg fell back to TCP and the service requires MPTCP.
    NotMptcp(Leg),
    /// No address of the server answered.
    Unreachable(String),
    /// The relay is out of file descriptors or memory.
    Exhausted(String),
    /// The relay shut down before the connection ended.
    Shutdown,
}

impl End {
    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            End::Closed => Fault::None,
            End::Broken(leg, _) | End::Stalled(leg, _) | End::NotMptcp(leg) => (*leg).into(),
            // Two silent peers: the client is the one that holds the connection open for nothing.
            End::Idle(_) | End::Denied | End::SourceFull | End::NotDiverted | End::BadHeader(_) => {
                Fault::Client
            }
            End::Unreachable(_) => Fault::Server,
            End::ServiceFull | End::Exhausted(_) | End::Shutdown => Fault::Relay,
        }
    }

    /// A word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            End::Closed => "closed",
            End::Broken(..) => "broken",
            End::Idle(_) => "idle",
            End::Stalled(..) => "stalled",
            End::Denied => "denied",
            End::ServiceFull => "service_full",
            End::SourceFull => "source_full",
            End::NotDiverted => "not_diverted",
            End::BadHeader(_) => "bad_header",
            End::NotMptcp(_) => "not_mptcp",
            End::Unreachable(_) => "unreachable",
            End::Exhausted(_) => "exhausted",
            End::Shutdown => "shutdown",
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Closed => write!(f, "closed by both sides"),
            End::Broken(leg, error) => write!(f, "{leg}: {error}"),
            End::Idle(after) => write!(f, "idle for {after:?}"),
            End::Stalled(leg, after) => write!(f, "{leg} acknowledged nothing for {after:?}"),
            End::Denied => write!(f, "client's address is not allowed"),
            End::ServiceFull => write!(f, "the service has max_connections"),
            End::SourceFull => write!(f, "the client has max_connections_per_source"),
            End::NotDiverted => write!(f, "client connected to the port of a transparent service itself"),
            End::BadHeader(error) => write!(f, "{error}"),
            End::NotMptcp(leg) => write!(f, "{leg} speaks only TCP and MPTCP is required"),
            End::Unreachable(why) | End::Exhausted(why) => f.write_str(why),
            End::Shutdown => write!(f, "relay shut down"),
        }
    }
}
