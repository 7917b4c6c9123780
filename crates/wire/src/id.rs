//! The two numbers by which MPTCP names things: a connection's token, an address's id.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The local token of a connection: the most significant 32 bits of the SHA-256 of the local key
/// (RFC 8684 section 3.2). It names the connection in its network namespace.
///
/// Written as iproute2 writes it: eight hexadecimal digits.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u32);

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({self})")
    }
}

impl FromStr for Token {
    type Err = ParseIntError;

    /// Takes hexadecimal digits, with or without `0x` in front.
    fn from_str(s: &str) -> Result<Self, ParseIntError> {
        u32::from_str_radix(s.strip_prefix("0x").unwrap_or(s), 16).map(Token)
    }
}

impl Serialize for Token {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// An address identifier (RFC 8684 section 3.4.1): names one address of one host within a connection.
/// Id 0 is the address that the connection was opened on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AddrId(pub u8);

impl fmt::Display for AddrId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for AddrId {
    type Err = ParseIntError;

    fn from_str(s: &str) -> Result<Self, ParseIntError> {
        s.parse().map(AddrId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_what_it_writes() {
        for token in [Token(0), Token(0x0012_ab00), Token(u32::MAX)] {
            assert_eq!(token.to_string().parse::<Token>().unwrap(), token);
            assert_eq!(format!("0x{token}").parse::<Token>().unwrap(), token);
        }
        assert!("".parse::<Token>().is_err());
        assert!("100000000".parse::<Token>().is_err());
    }
}
