//! The MPTCP options of a TCP header (RFC 8684 section 3 and figure 3), read and written.
//!
//! Reading never panics, whatever the bytes; what cannot be read is a [`Malformed`] with the bytes kept. Writing is
//! the inverse: an option that was read and is written again is the same bytes, reserved bits excepted, which
//! become 0.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::key::Key;
use crate::{AddrId, Token};

mod cursor;
mod subtype;
#[cfg(test)]
mod tests;
mod write;

use cursor::Cursor;
pub use subtype::Subtype;
pub use write::Unwritable;

/// The number of MPTCP among TCP's options.
pub const KIND: u8 = 30;

/// One MPTCP option.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mptcp {
    /// MP_CAPABLE (section 3.1): a new connection.
    Capable {
        /// 1, or 0 for RFC 6824; 4 bits.
        version: u8,
        /// What is asked for or agreed on.
        flags: CapableFlags,
        /// Which packet of the handshake this is.
        keys: CapableKeys,
    },
    /// MP_JOIN in a SYN (section 3.2).
    JoinSyn {
        /// Use this subflow only when no other works.
        backup: bool,
        /// The address that the sender sends from.
        id: AddrId,
        /// The receiver's name for the connection.
        token: Token,
        /// The sender's random number.
        nonce: u32,
    },
    /// MP_JOIN in a SYN/ACK.
    JoinSynAck {
        /// Use this subflow only when no other works.
        backup: bool,
        /// The address that the sender sends from.
        id: AddrId,
        /// [`crate::key::JoinHmac::truncated`] of the sender.
        hmac: u64,
        /// The sender's random number.
        nonce: u32,
    },
    /// MP_JOIN in the ACK that ends the handshake.
    JoinAck {
        /// [`crate::key::JoinHmac::full`] of the sender.
        hmac: [u8; 20],
    },
    /// DSS (section 3.3): which part of the connection's data this packet brings, and what has arrived.
    Dss {
        /// The connection-level acknowledgement.
        ack: Option<SequenceNumber>,
        /// Where the data belongs.
        mapping: Option<Mapping>,
        /// The sender has no more data after the mapping.
        fin: bool,
    },
    /// ADD_ADDR (section 3.4.1): another address of the sender.
    AddAddr {
        /// The address's id.
        id: AddrId,
        /// The address.
        ip: IpAddr,
        /// Its port, if other than the connection's.
        port: Option<u16>,
        /// [`crate::key::add_addr_hmac`] of the sender; `None` in an echo, which says that the address has arrived.
        hmac: Option<u64>,
    },
    /// REMOVE_ADDR (section 3.4.2): addresses that the sender has lost; one at least.
    RemoveAddr(Vec<AddrId>),
    /// MP_PRIO (section 3.3.8): how this subflow is to be used from now on.
    Prio {
        /// Only when no other works.
        backup: bool,
    },
    /// MP_FAIL (section 3.7): a checksum was wrong.
    Fail {
        /// The data sequence number where the mapping with the wrong checksum began.
        data_sequence: u64,
    },
    /// MP_FASTCLOSE (section 3.5): the connection ends at once.
    FastClose {
        /// The receiver's key.
        key: Key,
    },
    /// MP_TCPRST (section 3.6): why the subflow is reset.
    Reset {
        /// The same may work later.
        transient: bool,
        /// See [`reset_reason`].
        reason: u8,
    },
    /// A subtype that RFC 8684 leaves free, or keeps for experiments.
    Unknown {
        /// 4 bits.
        subtype: u8,
        /// The 4 bits behind it.
        low: u8,
        /// All that follows.
        data: Vec<u8>,
    },
}

bitflags::bitflags! {
    /// Flags of MP_CAPABLE, named by the letters of RFC 8684 section 3.1.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct CapableFlags: u8 {
        /// A: data carries checksums.
        const CHECKSUM = 0x80;
        /// B: another format; ignored by who does not know it.
        const EXTENSIBILITY = 0x40;
        /// C: no joins to the address and port of this subflow.
        const NO_JOIN = 0x20;
        /// H: HMAC-SHA256 (in version 0: HMAC-SHA1).
        const HMAC = 0x01;
        // D to G are free; they are kept.
        const _ = !0;
    }
}

/// What MP_CAPABLE carries, by its place in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CapableKeys {
    /// The SYN of version 1.
    None,
    /// The SYN/ACK, and in version 0 the SYN.
    Sender(Key),
    /// The ACK that ends the handshake.
    Both {
        /// Of the packet's sender.
        sender: Key,
        /// Of the packet's receiver.
        receiver: Key,
    },
    /// Version 1: the first data, whose data sequence number is the IDSN + 1.
    WithData {
        /// Of the packet's sender.
        sender: Key,
        /// Of the packet's receiver.
        receiver: Key,
        /// Bytes of data.
        length: u16,
        /// Of the data and its mapping, where agreed on.
        checksum: Option<u16>,
    },
}

/// A data sequence number or data acknowledgement as sent: whole, or its lower half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SequenceNumber {
    /// 4 bytes.
    Short(u32),
    /// 8 bytes.
    Long(u64),
}

/// A data sequence mapping (RFC 8684 section 3.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// Where in the connection.
    pub data_sequence: SequenceNumber,
    /// Where in the subflow, from its initial sequence number on.
    pub subflow_sequence: u32,
    /// Bytes; DATA_FIN counts as one.
    pub length: u16,
    /// Where agreed on.
    pub checksum: Option<u16>,
}

/// What a reason of MP_TCPRST means (RFC 8684 section 3.6).
pub fn reset_reason(reason: u8) -> &'static str {
    const REASONS: [&str; 7] = [
        "unspecified error",
        "MPTCP-specific error",
        "lack of resources",
        "administratively prohibited",
        "too much outstanding data",
        "unacceptable performance",
        "middlebox interference",
    ];
    REASONS.get(usize::from(reason)).unwrap_or(&"unassigned")
}

/// An option that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// An MPTCP option of a length that its subtype does not have.
    #[error("{subtype} of {} bytes", bytes.len())]
    Mptcp {
        /// Its subtype.
        subtype: Subtype,
        /// The whole option.
        bytes: Vec<u8>,
    },
    /// An option that is longer than what is left, or shorter than its own head. Nothing can be read after it.
    #[error("the option of kind {} does not fit into the {} bytes left", bytes[0], bytes.len())]
    Cut {
        /// From the option's first byte on; one at least.
        bytes: Vec<u8>,
    },
    /// A TCP header that is longer than the packet, or shorter than 20 bytes.
    #[error("the TCP header is cut short")]
    Header,
}

/// The MPTCP options among `options`, the bytes of a TCP header behind its first 20. Other kinds are passed over;
/// the end-of-options byte and [`Malformed::Cut`] are the end.
pub fn read(options: &[u8]) -> Options<'_> {
    Options { rest: options, header_cut: false }
}

/// The MPTCP options of `packet`, which begins with a TCP header.
pub fn read_header(packet: &[u8]) -> Options<'_> {
    // The header's length in words of 4 bytes is the upper half of byte 12 (RFC 9293 section 3.1).
    let options = packet.get(12).and_then(|offset| packet.get(20..usize::from(offset >> 4) * 4));
    Options { rest: options.unwrap_or_default(), header_cut: options.is_none() }
}

/// See [`read`].
#[derive(Clone, Debug)]
pub struct Options<'a> {
    rest: &'a [u8],
    header_cut: bool,
}

impl Iterator for Options<'_> {
    type Item = Result<Mptcp, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if std::mem::take(&mut self.header_cut) {
            return Some(Err(Malformed::Header));
        }
        loop {
            let (&kind, behind) = self.rest.split_first()?;
            match kind {
                END => self.rest = &[],
                NOP => self.rest = behind,
                _ => {
                    let length = behind.first().map_or(0, |&length| usize::from(length));
                    let Some((option, rest)) = self.rest.split_at_checked(length).filter(|_| length >= 2)
                    else {
                        return Some(Err(Malformed::Cut { bytes: std::mem::take(&mut self.rest).to_vec() }));
                    };
                    self.rest = rest;
                    if kind == KIND {
                        return Some(Mptcp::parse(option));
                    }
                }
            }
        }
    }
}

const END: u8 = 0;
const NOP: u8 = 1;

impl Mptcp {
    /// Reads one whole option, its kind and length included.
    pub fn parse(option: &[u8]) -> Result<Self, Malformed> {
        let subtype = Subtype(option.get(2).map_or(0, |byte| byte >> 4));
        let parsed = match option.split_first_chunk() {
            Some(([KIND, length, head], body)) if usize::from(*length) == option.len() => {
                parse(subtype, head & 0xf, body)
            }
            _ => None,
        };
        parsed.ok_or_else(|| Malformed::Mptcp { subtype, bytes: option.to_vec() })
    }

    /// The option's subtype.
    pub fn subtype(&self) -> Subtype {
        match self {
            Mptcp::Capable { .. } => Subtype::CAPABLE,
            Mptcp::JoinSyn { .. } | Mptcp::JoinSynAck { .. } | Mptcp::JoinAck { .. } => Subtype::JOIN,
            Mptcp::Dss { .. } => Subtype::DSS,
            Mptcp::AddAddr { .. } => Subtype::ADD_ADDR,
            Mptcp::RemoveAddr(_) => Subtype::REMOVE_ADDR,
            Mptcp::Prio { .. } => Subtype::PRIO,
            Mptcp::Fail { .. } => Subtype::FAIL,
            Mptcp::FastClose { .. } => Subtype::FASTCLOSE,
            Mptcp::Reset { .. } => Subtype::RESET,
            Mptcp::Unknown { subtype, .. } => Subtype(*subtype),
        }
    }
}

/// The flag B of MP_JOIN and MP_PRIO, in the low half of the byte that holds the subtype.
const BACKUP: u8 = 1;
/// The flag E of ADD_ADDR.
const ECHO: u8 = 1;
/// The flag T of MP_TCPRST.
const TRANSIENT: u8 = 1;
/// The flags of DSS.
const DSS_ACK: u8 = 0x01;
const DSS_ACK_LONG: u8 = 0x02;
const DSS_MAPPING: u8 = 0x04;
const DSS_SEQUENCE_LONG: u8 = 0x08;
const DSS_FIN: u8 = 0x10;

/// `low` is the low half of the byte that holds the subtype, `body` what follows.
fn parse(subtype: Subtype, low: u8, body: &[u8]) -> Option<Mptcp> {
    let mut cursor = Cursor(body);
    let option = match subtype {
        Subtype::CAPABLE => capable(low, &mut cursor),
        Subtype::JOIN => join(low, &mut cursor),
        Subtype::DSS => dss(&mut cursor),
        Subtype::ADD_ADDR => add_addr(low, &mut cursor),
        Subtype::REMOVE_ADDR => remove_addr(&mut cursor),
        Subtype::PRIO => Some(Mptcp::Prio { backup: low & BACKUP != 0 }),
        Subtype::FAIL => {
            cursor.u8()?;
            cursor.u64().map(|data_sequence| Mptcp::Fail { data_sequence })
        }
        Subtype::FASTCLOSE => {
            cursor.u8()?;
            cursor.u64().map(|key| Mptcp::FastClose { key: Key(key) })
        }
        Subtype::RESET => cursor.u8().map(|reason| Mptcp::Reset { transient: low & TRANSIENT != 0, reason }),
        Subtype(subtype) => Some(Mptcp::Unknown { subtype, low, data: cursor.rest().to_vec() }),
    };
    option.filter(|_| cursor.0.is_empty())
}

fn capable(version: u8, cursor: &mut Cursor<'_>) -> Option<Mptcp> {
    let flags = CapableFlags::from_bits_retain(cursor.u8()?);
    let mut key = || cursor.u64().map(Key);
    let keys = match (key(), key()) {
        (None, _) => CapableKeys::None,
        (Some(sender), None) => CapableKeys::Sender(sender),
        (Some(sender), Some(receiver)) => match cursor.u16() {
            None => CapableKeys::Both { sender, receiver },
            Some(length) => CapableKeys::WithData { sender, receiver, length, checksum: cursor.u16() },
        },
    };
    Some(Mptcp::Capable { version, flags, keys })
}

/// The three forms differ by their length.
fn join(low: u8, cursor: &mut Cursor<'_>) -> Option<Mptcp> {
    let backup = low & BACKUP != 0;
    let id = AddrId(cursor.u8()?);
    match cursor.0.len() {
        8 => Some(Mptcp::JoinSyn { backup, id, token: Token(cursor.u32()?), nonce: cursor.u32()? }),
        12 => Some(Mptcp::JoinSynAck { backup, id, hmac: cursor.u64()?, nonce: cursor.u32()? }),
        _ => cursor.array().map(|hmac| Mptcp::JoinAck { hmac }),
    }
}

fn dss(cursor: &mut Cursor<'_>) -> Option<Mptcp> {
    let flags = cursor.u8()?;
    let has = |flag| flags & flag != 0;
    let mut number = |long| match long {
        true => cursor.u64().map(SequenceNumber::Long),
        false => cursor.u32().map(SequenceNumber::Short),
    };
    let ack = if has(DSS_ACK) { Some(number(has(DSS_ACK_LONG))?) } else { None };
    let mapping = if has(DSS_MAPPING) {
        Some(Mapping {
            data_sequence: number(has(DSS_SEQUENCE_LONG))?,
            subflow_sequence: cursor.u32()?,
            length: cursor.u16()?,
            checksum: cursor.u16(),
        })
    } else {
        None
    };
    Some(Mptcp::Dss { ack, mapping, fin: has(DSS_FIN) })
}

/// The address's family and the presence of a port follow from the length.
fn add_addr(low: u8, cursor: &mut Cursor<'_>) -> Option<Mptcp> {
    let id = AddrId(cursor.u8()?);
    let echo = low & ECHO != 0;
    let address = cursor.0.len().checked_sub(if echo { 0 } else { 8 })?;
    let ip = match address {
        4 | 6 => Ipv4Addr::from_bits(cursor.u32()?).into(),
        16 | 18 => Ipv6Addr::from(cursor.array::<16>()?).into(),
        _ => return None,
    };
    let port = if address % 4 == 2 { Some(cursor.u16()?) } else { None };
    let hmac = if echo { None } else { Some(cursor.u64()?) };
    Some(Mptcp::AddAddr { id, ip, port, hmac })
}

fn remove_addr(cursor: &mut Cursor<'_>) -> Option<Mptcp> {
    let ids: Vec<_> = cursor.rest().iter().map(|&id| AddrId(id)).collect();
    (!ids.is_empty()).then_some(Mptcp::RemoveAddr(ids))
}
