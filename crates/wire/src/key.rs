//! Keys of MPTCP version 1, and what both hosts derive from them (RFC 8684 sections 3.1, 3.2 and 3.4.1).
//!
//! Version 0 (RFC 6824) does the same with SHA-1 and is not here: Linux does not speak it.

use std::fmt;
use std::net::IpAddr;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::{AddrId, Token};

/// One host's key of a connection, as MP_CAPABLE carries it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub u64);

impl Key {
    /// The connection's name at the host whose key this is: the most significant 32 bits of the key's SHA-256
    /// (section 3.2).
    pub fn token(self) -> Token {
        let [a, b, c, d, ..] = self.sha256();
        Token(u32::from_be_bytes([a, b, c, d]))
    }

    /// The initial data sequence number of what the host sends: the least significant 64 bits of the key's SHA-256
    /// (section 3.1). The first byte of data is one further, since MP_CAPABLE takes one number.
    pub fn idsn(self) -> u64 {
        let [.., a, b, c, d, e, f, g, h] = self.sha256();
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    fn sha256(self) -> [u8; 32] {
        Sha256::digest(self.0.to_be_bytes()).into()
    }
}

impl fmt::Debug for Key {
    /// Sixteen hexadecimal digits. Who reads a key can join the connection: don't log it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({:016x})", self.0)
    }
}

/// What one host proves its key with when a subflow joins (section 3.2). `own` are its key and the nonce that it
/// sent in this handshake, `peer` the other host's.
///
/// The host that answers the SYN sends [`JoinHmac::truncated`] in its SYN/ACK, the one that sent it
/// [`JoinHmac::full`] in its ACK.
pub fn join_hmac(own: (Key, u32), peer: (Key, u32)) -> JoinHmac {
    let nonces = [own.1.to_be_bytes(), peer.1.to_be_bytes()].concat();
    JoinHmac(hmac(own.0, peer.0, &nonces))
}

/// See [`join_hmac`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JoinHmac([u8; 32]);

impl JoinHmac {
    /// The leftmost 64 bits.
    pub fn truncated(self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    /// The leftmost 160 bits.
    pub fn full(self) -> [u8; 20] {
        std::array::from_fn(|i| self.0[i])
    }
}

/// What the host with the key `own` proves with that an ADD_ADDR is its own: the rightmost 64 bits of the HMAC
/// over id, address and port (section 3.4.1). Without a port the HMAC is over port 0.
pub fn add_addr_hmac(own: Key, peer: Key, id: AddrId, ip: IpAddr, port: Option<u16>) -> u64 {
    let mut message = vec![id.0];
    match ip {
        IpAddr::V4(ip) => message.extend(ip.octets()),
        IpAddr::V6(ip) => message.extend(ip.octets()),
    }
    message.extend(port.unwrap_or(0).to_be_bytes());
    let [.., a, b, c, d, e, f, g, h] = hmac(own, peer, &message);
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// HMAC-SHA256 with the two keys one behind the other as its key.
fn hmac(first: Key, second: Key, message: &[u8]) -> [u8; 32] {
    let mut key = [0; 64];
    // A key shorter than the hash's block is filled up with zeros by definition (RFC 2104), so this is the same.
    key[..8].copy_from_slice(&first.0.to_be_bytes());
    key[8..16].copy_from_slice(&second.0.to_be_bytes());
    let mut mac = Hmac::<Sha256>::new(&key.into());
    mac.update(message);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Key {
        Key(u64::from_be_bytes(text.as_bytes().try_into().unwrap()))
    }

    fn nonce(text: &str) -> u32 {
        u32::from_be_bytes(text.as_bytes().try_into().unwrap())
    }

    /// The vectors of the kernel's own test (net/mptcp/crypto_test.c): keys and nonces are the digits themselves.
    #[test]
    fn the_hmac_is_that_of_the_kernels_test() {
        let vectors = [
            (
                "0b0b0b0b0b0b0b0b",
                "48692054",
                "8385e24fb4235ac37556b6b886db106284a1da671699f46db1f235ec622dcafa",
            ),
            (
                "aaaaaaaaaaaaaaaa",
                "dddddddd",
                "2c5e219164ff1dca1c4a92318d847bb6b9d44492984e1eb71aff9022f71046e9",
            ),
            (
                "0102030405060708",
                "cdcdcdcd",
                "e73b9ba9969969cefb04aa0d6df18ec2fcc075b6f23b4d8c4da736a5dbbc6e7d",
            ),
        ];
        for (keys, nonces, expected) in vectors {
            let hmac =
                join_hmac((key(&keys[..8]), nonce(&nonces[..4])), (key(&keys[8..]), nonce(&nonces[4..])));
            let hex: String = hmac.0.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, expected);
            assert_eq!(format!("{:016x}", hmac.truncated()), expected[..16]);
            assert_eq!(hmac.full()[..], hmac.0[..20]);
        }
    }

    /// SHA-256 of "abcdefgh", as `printf abcdefgh | sha256sum` prints it.
    #[test]
    fn token_and_idsn_are_the_two_ends_of_the_hash() {
        assert_eq!(key("abcdefgh").token(), Token(0x9c56_cc51));
        assert_eq!(key("abcdefgh").idsn(), 0x190e_cf1e_4306_35ab);
    }
}
