//! Writing options.

use std::net::IpAddr;

use super::{
    BACKUP, CapableKeys, DSS_ACK, DSS_ACK_LONG, DSS_FIN, DSS_MAPPING, DSS_SEQUENCE_LONG, ECHO, KIND, Mptcp,
    SequenceNumber, TRANSIENT,
};

/// TCP's options have 40 bytes in all.
const MOST: usize = 40;

/// An option that no packet can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unwritable {
    /// Longer than the 40 bytes that TCP has for options.
    #[error("{0} bytes are more than the 40 that TCP has for options")]
    TooLong(usize),
    /// A REMOVE_ADDR that removes nothing.
    #[error("a REMOVE_ADDR without an address id")]
    NothingToRemove,
    /// A version, or the halves of an unknown subtype's byte, above 15.
    #[error("{0} does not fit into 4 bits")]
    TooLarge(u8),
}

impl Mptcp {
    /// The option's bytes, kind and length included, without padding.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Unwritable> {
        let mut bytes = vec![KIND, 0, self.subtype().0];
        let low = self.body(&mut bytes)?;
        for half in [bytes[2], low] {
            if half > 0xf {
                return Err(Unwritable::TooLarge(half));
            }
        }
        bytes[2] = bytes[2] << 4 | low;
        if bytes.len() > MOST {
            return Err(Unwritable::TooLong(bytes.len()));
        }
        bytes[1] = bytes.len() as u8;
        Ok(bytes)
    }

    /// Writes what follows the subtype's byte, and returns that byte's low half.
    fn body(&self, out: &mut Vec<u8>) -> Result<u8, Unwritable> {
        Ok(match self {
            Mptcp::Capable { version, flags, keys } => {
                out.push(flags.bits());
                capable_keys(out, *keys);
                *version
            }
            Mptcp::JoinSyn { backup, id, token, nonce } => {
                out.push(id.0);
                out.extend(token.0.to_be_bytes());
                out.extend(nonce.to_be_bytes());
                flag(*backup, BACKUP)
            }
            Mptcp::JoinSynAck { backup, id, hmac, nonce } => {
                out.push(id.0);
                out.extend(hmac.to_be_bytes());
                out.extend(nonce.to_be_bytes());
                flag(*backup, BACKUP)
            }
            Mptcp::JoinAck { hmac } => {
                out.push(0);
                out.extend(hmac);
                0
            }
            Mptcp::Dss { ack, mapping, fin } => {
                let flags = out.len();
                out.push(flag(*fin, DSS_FIN));
                if let Some(ack) = ack {
                    out[flags] |= DSS_ACK | number(out, *ack, DSS_ACK_LONG);
                }
                if let Some(mapping) = mapping {
                    out[flags] |= DSS_MAPPING | number(out, mapping.data_sequence, DSS_SEQUENCE_LONG);
                    out.extend(mapping.subflow_sequence.to_be_bytes());
                    out.extend(mapping.length.to_be_bytes());
                    out.extend(mapping.checksum.iter().flat_map(|sum| sum.to_be_bytes()));
                }
                0
            }
            Mptcp::AddAddr { id, ip, port, hmac } => {
                out.push(id.0);
                match ip {
                    IpAddr::V4(ip) => out.extend(ip.octets()),
                    IpAddr::V6(ip) => out.extend(ip.octets()),
                }
                out.extend(port.iter().flat_map(|port| port.to_be_bytes()));
                out.extend(hmac.iter().flat_map(|hmac| hmac.to_be_bytes()));
                flag(hmac.is_none(), ECHO)
            }
            Mptcp::RemoveAddr(ids) if ids.is_empty() => return Err(Unwritable::NothingToRemove),
            Mptcp::RemoveAddr(ids) => {
                out.extend(ids.iter().map(|id| id.0));
                0
            }
            Mptcp::Prio { backup } => flag(*backup, BACKUP),
            Mptcp::Fail { data_sequence: number } | Mptcp::FastClose { key: crate::key::Key(number) } => {
                out.push(0);
                out.extend(number.to_be_bytes());
                0
            }
            Mptcp::Reset { transient, reason } => {
                out.push(*reason);
                flag(*transient, TRANSIENT)
            }
            Mptcp::Unknown { low, data, .. } => {
                out.extend(data);
                *low
            }
        })
    }
}

fn capable_keys(out: &mut Vec<u8>, keys: CapableKeys) {
    let (sender, receiver) = match keys {
        CapableKeys::None => (None, None),
        CapableKeys::Sender(sender) => (Some(sender), None),
        CapableKeys::Both { sender, receiver } | CapableKeys::WithData { sender, receiver, .. } => {
            (Some(sender), Some(receiver))
        }
    };
    out.extend([sender, receiver].into_iter().flatten().flat_map(|key| key.0.to_be_bytes()));
    if let CapableKeys::WithData { length, checksum, .. } = keys {
        out.extend(length.to_be_bytes());
        out.extend(checksum.iter().flat_map(|sum| sum.to_be_bytes()));
    }
}

/// Writes `number`; the result is `long` where it took 8 bytes.
fn number(out: &mut Vec<u8>, number: SequenceNumber, long: u8) -> u8 {
    match number {
        SequenceNumber::Short(number) => {
            out.extend(number.to_be_bytes());
            0
        }
        SequenceNumber::Long(number) => {
            out.extend(number.to_be_bytes());
            long
        }
    }
}

fn flag(set: bool, flag: u8) -> u8 {
    if set { flag } else { 0 }
}
