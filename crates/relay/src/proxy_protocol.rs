//! The PROXY protocol: who the client is, said by the proxy in front of us or by us to the server
//! (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>). This file frames; `ppp` parses and writes.

use std::io;
use std::net::SocketAddr;

use ppp::{v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::config::ProxyVersion;

/// Both ends of a connection, as the first proxy on its way saw them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The client.
    pub source: SocketAddr,
    /// The address that the client connected to.
    pub destination: SocketAddr,
}

/// Why there is no usable header.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It did not come whole in time.
    #[error("no PROXY header within {0:?}")]
    Slow(std::time::Duration),
    /// The client closed or broke the connection before its header was whole.
    #[error("PROXY header cut short: {0}")]
    Cut(io::Error),
    /// The first bytes are not those of a header.
    #[error("not a PROXY header")]
    Absent,
    /// Longer than any header we take (107 bytes of version 1, 4096 of version 2).
    #[error("PROXY header of {0} bytes is too long")]
    TooLong(usize),
    /// A line that is not version 1.
    #[error("PROXY v1 header: {0}")]
    V1(#[from] v1::BinaryParseError),
    /// Bytes that are not version 2.
    #[error("PROXY v2 header: {0}")]
    V2(#[from] v2::ParseError),
    /// Sent by somebody who is not in `proxy_from`.
    #[error("PROXY headers are not taken from this address")]
    Untrusted,
}

/// Longest line of version 1, CRLF included (section 2.1).
const V1_MAX: usize = 107;
/// Longest header of version 2 we take. The protocol allows 64 KiB, addresses and the usual TLVs need under 1 KiB.
const V2_MAX: usize = 4096;
/// Version 2 before the addresses: signature, version and command, family, length (section 2.2).
const V2_FIXED: usize = 16;

/// Reads a header of either version from the beginning of a connection.
///
/// Returns the addresses it names (`None` for `LOCAL` and `UNKNOWN`, where the connection speaks for itself)
/// and the bytes that came after it.
pub async fn read(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<(Option<Addresses>, Vec<u8>), HeaderError> {
    let mut bytes = Vec::new();
    loop {
        if let Some(length) = header_length(&bytes)? {
            let rest = bytes.split_off(length);
            return Ok((parse(&bytes)?, rest));
        }
        match stream.read_buf(&mut bytes).await {
            Ok(0) => return Err(HeaderError::Cut(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(error) => return Err(HeaderError::Cut(error)),
        }
    }
}

/// The header that tells a server about `addresses`.
pub fn header(version: ProxyVersion, addresses: Addresses) -> Vec<u8> {
    let pair = (addresses.source, addresses.destination);
    match version {
        ProxyVersion::V1 => v1::Addresses::from(pair).to_string().into_bytes(),
        ProxyVersion::V2 => {
            let command = v2::Version::Two | v2::Command::Proxy;
            v2::Builder::with_addresses(command, v2::Protocol::Stream, v2::Addresses::from(pair))
                .build()
                .expect("addresses are far shorter than 64 KiB")
        }
    }
}

/// Length of the header at the beginning of `bytes`; `None` when more bytes are needed to tell.
fn header_length(bytes: &[u8]) -> Result<Option<usize>, HeaderError> {
    let begins_like = |prefix: &[u8]| bytes.iter().zip(prefix).all(|(a, b)| a == b);
    if begins_like(v2::PROTOCOL_PREFIX) {
        let Some(fixed) = bytes.get(..V2_FIXED) else { return Ok(None) };
        let length = V2_FIXED + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
        match length {
            V2_FIXED..=V2_MAX => Ok((bytes.len() >= length).then_some(length)),
            _ => Err(HeaderError::TooLong(length)),
        }
    } else if begins_like(v1::PROTOCOL_PREFIX.as_bytes()) {
        match bytes.iter().take(V1_MAX).position(|byte| *byte == b'\n') {
            Some(end) => Ok(Some(end + 1)),
            None if bytes.len() >= V1_MAX => Err(HeaderError::TooLong(bytes.len())),
            None => Ok(None),
        }
    } else {
        Err(HeaderError::Absent)
    }
}

/// The addresses in a whole header.
fn parse(header: &[u8]) -> Result<Option<Addresses>, HeaderError> {
    let (source, destination): (SocketAddr, SocketAddr) = if header.starts_with(v2::PROTOCOL_PREFIX) {
        let header = v2::Header::try_from(header)?;
        match (header.command, header.addresses) {
            (v2::Command::Proxy, v2::Addresses::IPv4(ip)) => (
                (ip.source_address, ip.source_port).into(),
                (ip.destination_address, ip.destination_port).into(),
            ),
            (v2::Command::Proxy, v2::Addresses::IPv6(ip)) => (
                (ip.source_address, ip.source_port).into(),
                (ip.destination_address, ip.destination_port).into(),
            ),
            _ => return Ok(None),
        }
    } else {
        match v1::Header::try_from(header)?.addresses {
            v1::Addresses::Tcp4(ip) => (
                (ip.source_address, ip.source_port).into(),
                (ip.destination_address, ip.destination_port).into(),
            ),
            v1::Addresses::Tcp6(ip) => (
                (ip.source_address, ip.source_port).into(),
                (ip.destination_address, ip.destination_port).into(),
            ),
            v1::Addresses::Unknown => return Ok(None),
        }
    };
    Ok(Some(Addresses { source, destination }))
}
