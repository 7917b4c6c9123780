//! What the running kernel can do: asked of the kernel itself, once, and not derived from its version number.

use std::sync::OnceLock;

use socket2::{Domain, Protocol, Socket, Type};

use crate::{info, sys};

/// What the running kernel can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelFeatures {
    /// `getsockopt(MPTCP_INFO)` (Linux 5.16 and newer).
    pub mptcp_info: bool,
}

impl KernelFeatures {
    /// The features. Where the calling thread cannot make an MPTCP socket (`net.mptcp.enabled=0`), all are false,
    /// and the next call asks again.
    pub fn get() -> Self {
        static FEATURES: OnceLock<KernelFeatures> = OnceLock::new();
        match FEATURES.get() {
            Some(features) => *features,
            None => Self::probe().map_or_else(Self::default, |probed| *FEATURES.get_or_init(|| probed)),
        }
    }

    fn probe() -> Option<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).ok()?;
        let mptcp_info = sys::getsockopt(&socket, info::SOL_MPTCP, info::MPTCP_INFO, &mut [0; 256]).is_ok();
        Some(KernelFeatures { mptcp_info })
    }
}
