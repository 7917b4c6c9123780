//! TCP segments in a capture file, as tcpdump writes it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::BufReader;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use mptcp::socket::canonical;
use pcap_file::pcap::PcapReader;
use pcap_file::{DataLink, TsResolution};
use wire::option::{Mptcp, SequenceNumber};

use crate::{Error, Result};

/// A TCP segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Since 1970.
    pub(crate) at: Duration,
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    /// Bytes of data that no other subflow has brought before: what waits for long the kernel sends again, by
    /// another subflow and be it a backup (`__mptcp_retrans()`).
    pub(crate) payload: u64,
    /// It carries MP_PRIO.
    pub(crate) priority: bool,
}

/// The TCP segments of the capture at `path`, in its order. A packet that is not all there (snapshot length) is
/// enough as far as its headers are there.
pub(crate) fn read(path: &Path) -> Result<Vec<Segment>> {
    let what = || format!("read capture {}", path.display());
    let file = File::open(path).map_err(|error| Error::io(what(), error))?;
    let mut packets =
        PcapReader::new(BufReader::new(file)).map_err(|error| Error::program(what(), error.to_string()))?;
    let datalink = packets.header().datalink;
    let Some(link_header) = LINK_HEADERS.iter().find(|(link, _)| *link == datalink).map(|(_, bytes)| *bytes)
    else {
        return Err(Error::program(what(), format!("packets of link type {datalink:?}")));
    };
    let nanoseconds = match packets.header().ts_resolution {
        TsResolution::MicroSecond => 1000,
        TsResolution::NanoSecond => 1,
    };
    let mut segments = Vec::new();
    let mut brought = Brought::default();
    // The other way to read packets refuses those that are longer than the snapshot length.
    while let Some(packet) = packets.next_raw_packet() {
        let packet = packet.map_err(|error| Error::program(what(), error.to_string()))?;
        let at = Duration::from_secs(packet.ts_sec.into())
            + Duration::from_nanos(u64::from(packet.ts_frac) * nanoseconds);
        if let Some((mut segment, data)) = packet.data.get(link_header..).and_then(|ip| segment(at, ip)) {
            if data.is_some_and(|data| brought.before(&segment, data)) {
                segment.payload = 0;
            }
            segments.push(segment);
        }
    }
    Ok(segments)
}

/// Which data each subflow has brought: by direction, beginnings and ends of what belongs together.
#[derive(Default)]
struct Brought(HashMap<(SocketAddr, SocketAddr), BTreeMap<u64, u64>>);

impl Brought {
    /// Has another subflow brought all of `data` before? If not, notes that this one has.
    fn before(&mut self, segment: &Segment, data: Range<u64>) -> bool {
        let ends = (segment.from, segment.to);
        let covers = |ranges: &BTreeMap<u64, u64>| {
            ranges.range(..=data.start).next_back().is_some_and(|(_, end)| *end >= data.end)
        };
        if self.0.iter().any(|(others, ranges)| *others != ends && covers(ranges)) {
            return true;
        }
        let ranges = self.0.entry(ends).or_default();
        match ranges.range_mut(..=data.start).next_back() {
            Some((_, end)) if *end >= data.start => *end = data.end.max(*end),
            _ => drop(ranges.insert(data.start, data.end)),
        }
        false
    }
}

/// Bytes in front of the IP header, by link type.
const LINK_HEADERS: [(DataLink, usize); 4] = [
    (DataLink::ETHERNET, 14),
    (DataLink::RAW, 0),
    (DataLink::LINUX_SLL, 16),
    // Of a capture on all interfaces.
    (DataLink::LINUX_SLL2, 20),
];

/// A segment, and which of the connection's data it brings.
fn segment(at: Duration, ip: &[u8]) -> Option<(Segment, Option<Range<u64>>)> {
    let packet = LaxSlicedPacket::from_ip(ip).ok()?;
    let (from, to, length) = match packet.net? {
        LaxNetSlice::Ipv4(v4) => {
            let header = v4.header();
            let length = usize::from(header.total_len()).checked_sub(usize::from(header.ihl()) * 4)?;
            (IpAddr::from(header.source_addr()), IpAddr::from(header.destination_addr()), length)
        }
        LaxNetSlice::Ipv6(v6) => {
            let header = v6.header();
            let length = usize::from(header.payload_length());
            (IpAddr::from(header.source_addr()), IpAddr::from(header.destination_addr()), length)
        }
        _ => return None,
    };
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { return None };
    let options: Vec<_> = wire::option::read(tcp.options()).flatten().collect();
    let data = options.iter().find_map(|option| match option {
        Mptcp::Dss { mapping: Some(mapping), .. } => {
            let start = match mapping.data_sequence {
                SequenceNumber::Short(start) => start.into(),
                SequenceNumber::Long(start) => start,
            };
            Some(start..start.saturating_add(mapping.length.into()))
        }
        _ => None,
    });
    let segment = Segment {
        at,
        from: canonical(SocketAddr::new(from, tcp.source_port())),
        to: canonical(SocketAddr::new(to, tcp.destination_port())),
        payload: length.checked_sub(usize::from(tcp.data_offset()) * 4)? as u64,
        priority: options.iter().any(|option| matches!(option, Mptcp::Prio { .. })),
    };
    Some((segment, data))
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    fn packet(options: &[u8], payload: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).tcp(1194, 4000, 1, 100).ack(1);
        builder.options_raw(options).unwrap().write(&mut bytes, &vec![7; payload]).unwrap();
        bytes
    }

    #[test]
    fn a_cut_packet_tells_its_length_and_its_options() {
        // Two NOPs, a data acknowledgement, MP_PRIO with backup.
        let options = [1, 1, 30, 8, 0x20, 1, 0, 0, 0, 9, 30, 3, 0x51, 1, 1, 1];
        let bytes = packet(&options, 1000);
        let (segment, data) = segment(Duration::from_secs(1), &bytes[..80]).unwrap();
        assert_eq!(data, None);
        assert_eq!((segment.from.to_string(), segment.to.port()), ("10.0.0.1:1194".into(), 4000));
        assert_eq!((segment.payload, segment.priority), (1000, true));
        assert!(!super::segment(Duration::ZERO, &packet(&options[..12], 0)).unwrap().0.priority);
    }

    #[test]
    fn what_another_subflow_has_brought_does_not_count_again() {
        let mut brought = Brought::default();
        let mut comes = |port: u16, data| {
            let [from, to] = [port, 1194].map(|port| SocketAddr::from(([10, 0, 0, 1], port)));
            brought.before(&Segment { at: Duration::ZERO, from, to, payload: 1, priority: false }, data)
        };
        // A mapping may stand in several segments.
        assert!(!comes(1, 0..100) && !comes(1, 0..100) && !comes(1, 100..200));
        assert!(comes(2, 50..150) && comes(2, 0..200));
        assert!(!comes(2, 150..250) && comes(1, 200..250) && !comes(1, 200..300));
    }

    proptest! {
        #[test]
        fn no_packet_makes_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = segment(Duration::ZERO, &bytes);
        }
    }
}
