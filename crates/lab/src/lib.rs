//! Multipath TCP networks in network namespaces, from scenario files.
