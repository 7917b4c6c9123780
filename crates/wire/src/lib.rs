//! The bytes of Multipath TCP (RFC 8684), without any I/O: what is in a packet, and how it is computed.
//!
//! | module | what for |
//! |---|---|
//! | [`option`] | the MPTCP options of a TCP header, read and written |
//! | [`key`] | keys, and what is derived from them: token, IDSN, HMACs |
//!
//! ```
//! use wire::option::{self, Mptcp};
//!
//! // A SYN's options: two NOPs, then MP_JOIN with backup, address id 7, token and nonce.
//! let bytes = [1, 1, 30, 12, 0x11, 7, 0xde, 0xad, 0xbe, 0xef, 0, 0, 0, 42];
//! let options: Vec<Mptcp> = option::read(&bytes).filter_map(Result::ok).collect();
//! let [Mptcp::JoinSyn { backup: true, id, token, nonce: 42 }] = options[..] else { panic!() };
//! assert_eq!((id.0, token.to_string().as_str()), (7, "deadbeef"));
//! assert_eq!(options[0].to_bytes().unwrap(), bytes[2..]);
//! ```

mod id;
pub mod key;
pub mod option;

pub use id::{AddrId, Token};
