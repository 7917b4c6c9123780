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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The header of `bytes` and everything after it.
    async fn read_all(mut bytes: &[u8]) -> Result<(Option<Addresses>, Vec<u8>), HeaderError> {
        let (addresses, early) = read(&mut bytes).await?;
        Ok((addresses, [&early, bytes].concat()))
    }

    fn v2(version_command: u8, family: u8, length: u16, rest: usize) -> Vec<u8> {
        let fixed = [&[version_command, family], length.to_be_bytes().as_slice()].concat();
        [v2::PROTOCOL_PREFIX, &fixed, &vec![0; rest]].concat()
    }

    #[tokio::test]
    async fn a_bad_header_is_refused_with_its_reason() {
        let longest = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; V1_MAX - 16], b"\r\n"].concat();
        assert_eq!(read_all(&longest).await.unwrap(), (None, Vec::new()));
        for (bytes, reason) in [
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "not a PROXY header"),
            (b"PROXX".to_vec(), "not a PROXY header"),
            (b"PROXY TCP4 10.1.2.3".to_vec(), "PROXY header cut short: "),
            (v2(0x21, 0x11, 12, 11), "PROXY header cut short: "),
            (b"PROXY TCP4 10.1.2.3\r\n".to_vec(), "PROXY v1 header: "),
            (b"PROXY TCP4 10.1.2.300 10.9.8.7 1 80\r\n".to_vec(), "PROXY v1 header: "),
            (b"PROXY TCP4 10.1.2.3 10.9.8.7 1 65536\r\n".to_vec(), "PROXY v1 header: "),
            (b"PROXY TCP6 10.1.2.3 10.9.8.7 1 80\r\n".to_vec(), "PROXY v1 header: "),
            (b"PROXY UNKNOWN\n".to_vec(), "PROXY v1 header: "),
            ([&longest[..V1_MAX - 2], b"x\r\n"].concat(), "PROXY header of 108 bytes is too long"),
            (v2(0x31, 0x11, 12, 12), "PROXY v2 header: "),
            (v2(0x22, 0x11, 12, 12), "PROXY v2 header: "),
            (v2(0x21, 0x11, 4, 4), "PROXY v2 header: "),
            (v2(0x21, 0x11, 4081, 4081), "PROXY header of 4097 bytes is too long"),
        ] {
            let error = read_all(&bytes).await.unwrap_err().to_string();
            assert!(error.starts_with(reason), "{}: {error}", String::from_utf8_lossy(&bytes));
        }
    }

    fn address() -> impl Strategy<Value = SocketAddr> {
        any::<(std::net::IpAddr, u16)>().prop_map(SocketAddr::from)
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(source in address(), destination in address(), rest: Vec<u8>) {
            // Addresses of two families cannot be told; then the header says that it does not know.
            let addresses = Addresses { source, destination };
            let expected = (source.is_ipv4() == destination.is_ipv4()).then_some(addresses);
            for version in [ProxyVersion::V1, ProxyVersion::V2] {
                let bytes = [header(version, addresses), rest.clone()].concat();
                let (read, after) = block_on(read_all(&bytes)).unwrap();
                prop_assert_eq!(read, expected);
                prop_assert_eq!(&after, &rest);
            }
        }

        #[test]
        fn no_bytes_panic(v2: bool, bytes: Vec<u8>) {
            let prefix = if v2 { v2::PROTOCOL_PREFIX } else { b"PROXY " };
            let _ = block_on(read_all(&[prefix, &bytes].concat()));
            let _ = block_on(read_all(&bytes));
        }
    }
}
