//! Multipath TCP networks in network namespaces, from scenario files.

pub mod link;
