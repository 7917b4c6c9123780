//! Limits of the in-kernel path manager, per network namespace.

use serde::Serialize;

/// How far the in-kernel path manager may go on each connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Limits {
    /// ADD_ADDR of the peer that may be acted on, 0 to 8 (`MPTCP_PM_ATTR_RCV_ADD_ADDRS`).
    pub add_addr_accepted: u32,
    /// Subflows beside the first one, 0 to 8 (`MPTCP_PM_ATTR_SUBFLOWS`).
    pub subflows: u32,
}
