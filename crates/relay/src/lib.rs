//! Relay between TCP and Multipath TCP connections.
