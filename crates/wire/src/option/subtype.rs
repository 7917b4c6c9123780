//! The names of the subtypes (RFC 8684 section 7.2).

use std::fmt;

/// An MPTCP option's subtype, 0 to 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subtype(pub u8);

#[allow(missing_docs, reason = "see the names below")]
impl Subtype {
    pub const CAPABLE: Subtype = Subtype(0);
    pub const JOIN: Subtype = Subtype(1);
    pub const DSS: Subtype = Subtype(2);
    pub const ADD_ADDR: Subtype = Subtype(3);
    pub const REMOVE_ADDR: Subtype = Subtype(4);
    pub const PRIO: Subtype = Subtype(5);
    pub const FAIL: Subtype = Subtype(6);
    pub const FASTCLOSE: Subtype = Subtype(7);
    pub const RESET: Subtype = Subtype(8);
}

const NAMES: [&str; 9] = [
    "MP_CAPABLE",
    "MP_JOIN",
    "DSS",
    "ADD_ADDR",
    "REMOVE_ADDR",
    "MP_PRIO",
    "MP_FAIL",
    "MP_FASTCLOSE",
    "MP_TCPRST",
];

impl fmt::Display for Subtype {
    /// The RFC's name, or `subtype 9` for one without.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.get(usize::from(self.0)) {
            Some(name) => f.write_str(name),
            None => write!(f, "subtype {}", self.0),
        }
    }
}
