//! What the running kernel can do: asked of the kernel itself, once, and not derived from its version number.

use std::os::fd::AsFd;
use std::sync::OnceLock;

use socket2::{Domain, Protocol, Socket, Type};

use crate::{info, sys};

/// What the running kernel can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelFeatures {
    /// `getsockopt(MPTCP_INFO)` (Linux 5.16 and newer).
    pub mptcp_info: bool,
    /// Bytes sent, received, acknowledged and sent again in [`crate::info::Info`] (Linux 6.5 and newer).
    pub byte_counters: bool,
    /// `getsockopt(MPTCP_FULL_INFO)` (Linux 6.5 and newer).
    pub full_info: bool,
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
        // What the kernel knows of `struct mptcp_info`.
        let length = sys::getsockopt(&socket, info::SOL_MPTCP, info::MPTCP_INFO, &mut [0; 256]);
        Some(KernelFeatures {
            mptcp_info: length.is_ok(),
            byte_counters: length.is_ok_and(|length| length >= info::COUNTERS_END),
            full_info: info::full_info(socket.as_fd()).is_ok(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So no test takes a feature for absent where it is not.
    #[test]
    fn a_kernel_has_what_its_version_promises() {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split('.').map(|number| number.parse::<u32>());
        let version = (numbers.next().unwrap().unwrap(), numbers.next().unwrap().unwrap());
        let KernelFeatures { mptcp_info, byte_counters, full_info } = KernelFeatures::get();
        assert!(mptcp_info || version < (5, 16));
        assert!(byte_counters && full_info || version < (6, 5));
    }
}
