//! What the BPF programs and the control plane share: `bpf/maps.h` in Rust.
#![allow(unsafe_code)]

use std::net::{IpAddr, Ipv6Addr};

use aya::Pod;

/// Places of a service's Maglev ring; a prime.
pub const RING_SIZE: u32 = 65537;
/// Most services.
pub const MAX_SERVICES: u32 = 256;
/// Most backends of all services together, and one: number 0 is nobody.
pub const MAX_BACKENDS: u32 = 1024;

/// Joins go by token.
pub const SERVICE_TOKEN: u32 = 1;
/// Everything goes to one backend: the announced port of the port scheme.
pub const SERVICE_FIXED: u32 = 2;

/// Gets the packets of its flows.
pub const BACKEND_LIVE: u32 = 1;
/// Gets new connections.
pub const BACKEND_TAKES: u32 = 2;
/// Is behind a router: gets IP in IP.
pub const BACKEND_TUNNEL: u32 = 4;
/// Is in the configuration; for the control plane alone.
pub const BACKEND_CONFIGURED: u32 = 8;
/// Takes no new connections because the configuration says so; for the control plane alone.
pub const BACKEND_DRAINING: u32 = 16;
/// Its interface is a veth whose other end is in another network namespace.
pub const BACKEND_PEER: u32 = 32;

/// Flags of a flow that was told by a backend: all is known of it.
pub const FLOW_SYN_SEEN: u16 = 2;

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address(pub [u8; 16]);

// SAFETY: bytes, every pattern of them valid.
unsafe impl Pod for Address {}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        Address(match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        })
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.0).to_canonical()
    }
}

/// Declares a struct of the data plane: plain integers and bytes, laid out as C does, without padding.
macro_rules! shared {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$of:meta])* pub $field:ident: $type:ty,)* } size $size:literal) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name { $($(#[$of])* pub $field: $type,)* }
        // Without padding the size is the sum of the fields' sizes.
        const _: () = assert!(size_of::<$name>() == $size && $size == 0 $(+ size_of::<$type>())*);
        // SAFETY: integers and arrays of them, no padding (asserted above), every bit pattern valid.
        unsafe impl Pod for $name {}
    };
}

shared! {
    /// Key of `services`.
    pub struct ServiceKey {
        /// One of the service's addresses.
        pub address: Address,
        /// In network byte order.
        pub port: u16,
        /// 0.
        pub unused: u16,
    } size 20
}

shared! {
    /// Value of `services`.
    pub struct Service {
        /// The service's number.
        pub id: u32,
        /// `SERVICE_*`.
        pub flags: u32,
        /// Where `SERVICE_FIXED`.
        pub backend: u32,
    } size 12
}

shared! {
    /// Value of `backends`.
    pub struct Backend {
        /// MAC address of the backend, or of the router on the way to it.
        pub to_mac: [u8; 6],
        /// MAC address of the interface.
        pub from_mac: [u8; 6],
        /// The interface that leads to it.
        pub ifindex: u32,
        /// `BACKEND_*`.
        pub flags: u32,
        /// Where `BACKEND_TUNNEL`: from here.
        pub outer_source: Address,
        /// To here.
        pub outer_destination: Address,
    } size 52
}

shared! {
    /// Key of `flows` and `fresh`; ports in network byte order.
    pub struct Tuple {
        /// The client.
        pub source: Address,
        /// The service.
        pub destination: Address,
        /// The client's port.
        pub source_port: u16,
        /// The service's port.
        pub destination_port: u16,
    } size 36
}

shared! {
    /// Value of `flows` and `fresh`.
    pub struct Flow {
        /// The backend's number.
        pub backend: u32,
        /// Seconds since boot.
        pub seen: u32,
        /// `FLOW_*`.
        pub flags: u16,
        /// The data plane's own: when it wrote `seen`; 0 where `sequence` is not known.
        pub tick: u16,
        /// The data plane's own: of the last packet that was near the one before.
        pub sequence: u32,
    } size 16
}

shared! {
    /// Key of `tokens`.
    pub struct TokenKey {
        /// In network byte order.
        pub token: u32,
        /// The service's number.
        pub service: u32,
    } size 8
}

shared! {
    /// Value of `tokens`: two connections with this token, the newer first.
    pub struct TokenSlots {
        /// Backend, 0 for none; client.
        pub newer: u32,
        /// The newer one's client.
        pub newer_client: Address,
        /// Like `newer`.
        pub older: u32,
        /// Like `newer_client`.
        pub older_client: Address,
    } size 40
}

shared! {
    /// Value of `traffic`: what a backend was sent.
    pub struct Traffic {
        /// Packets.
        pub packets: u64,
        /// Bytes of Ethernet frames.
        pub bytes: u64,
        /// Connections opened with MP_CAPABLE.
        pub connections: u64,
        /// Connections opened without.
        pub plain: u64,
        /// Joins by token.
        pub joins_by_token: u64,
        /// Joins by the announced port.
        pub joins_by_port: u64,
        /// Joins by the ring, as if they were new connections.
        pub joins_by_hash: u64,
    } size 56
}

shared! {
    /// Value of `backend_names` and `service_names`: UTF-8, zeros behind it.
    pub struct Name {
        /// The text.
        pub text: [u8; 128],
    } size 128
}

impl Name {
    /// The longest text, in bytes.
    pub const MAX: usize = 127;

    /// `text`, cut where it is too long.
    pub fn new(text: &str) -> Self {
        let mut name = Name { text: [0; 128] };
        let length = text.len().min(Self::MAX);
        name.text[..length].copy_from_slice(&text.as_bytes()[..length]);
        name
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.text.split(|byte| *byte == 0).next().unwrap_or_default();
        f.pad(&String::from_utf8_lossy(text))
    }
}

/// The counters that belong to no backend, in the order of `enum counter`, and what they count.
pub const COUNTERS: [(&str, &str); 21] = [
    ("tokens_learned", "Packets with a key that told a connection's token"),
    ("token_collisions", "Tokens that two connections on two backends have had"),
    ("flows_added", "Entries made in the flow table"),
    ("flows_removed", "Entries of the flow table that a new connection with the same addresses ended"),
    ("tokens_added", "Entries made in the token table"),
    ("icmp_delivered", "ICMP errors delivered to the flow's backend"),
    ("fragments_delivered", "Later fragments delivered to the first one's backend"),
    ("picked_up", "Packets of unknown flows, sent where the ring says"),
    ("join_token_unknown", "Joins dropped: no connection with their token is known"),
    ("no_backend", "Packets dropped: the service has no backend for them"),
    ("malformed_options", "SYNs and handshakes whose TCP options do not add up"),
    ("truncated", "Packets passed on: their headers are cut short"),
    ("vlan", "Packets passed on: they have a VLAN tag"),
    ("ipv6_extension", "Packets passed on: more IPv6 extension headers than are looked at"),
    ("fragment_unknown", "Later fragments passed on: the first was not seen"),
    ("icmp_unknown", "ICMP errors dropped: the service has no backend for them"),
    ("mptcp_version_0", "Connections opened with MPTCP version 0, whose joins cannot be steered by token"),
    ("flows_told", "Entries made in the flow table from what backends' agents told"),
    ("tokens_told", "Entries made in the token table from what backends' agents told"),
    ("fresh_added", "Entries made in the table of flows that have sent no more than a SYN"),
    ("fresh_removed", "Entries of that table that went because the flow went on"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// `TOKEN_LEARNED` and so on, as `bpf/maps.h` lists them, against the order here.
    #[test]
    fn the_counters_are_those_of_the_programs() {
        let header = include_str!("../bpf/maps.h");
        let (_, rest) = header.split_once("enum counter {").unwrap();
        let (list, _) = rest.split_once("COUNTERS,").unwrap();
        let in_c: Vec<String> = list
            .lines()
            .filter_map(|line| line.trim().split(',').next().filter(|name| !name.is_empty()))
            .map(|name| name.to_lowercase())
            .collect();
        let in_rust: Vec<&str> = COUNTERS.iter().map(|(name, _)| *name).collect();
        assert_eq!(in_c, in_rust);
    }

    #[test]
    fn a_name_reads_what_it_writes() {
        assert_eq!(Name::new("web/app-1").to_string(), "web/app-1");
        assert_eq!(Name::new(&"x".repeat(200)).to_string().len(), Name::MAX);
    }
}
