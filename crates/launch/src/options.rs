//! Socket options: which ones MPTCP sockets refuse on this kernel, and how a socket's options come to another one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use mptcp::sys::{copy_sockopt, getsockopt};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, ipproto, socket_with};

/// An option of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SocketOption {
    /// `SOL_SOCKET`, `IPPROTO_TCP`, …
    pub level: i32,
    /// Its number.
    pub number: i32,
    /// As the manual pages write it.
    pub name: &'static str,
}

macro_rules! options {
    ($level:ident: $($name:ident)*) => {
        [$(SocketOption { level: libc::$level, number: libc::$name, name: stringify!($name) }),*]
    };
}

/// Options that decide how a socket behaves.
const BY_LEVEL: [&[SocketOption]; 4] = [
    &options!(SOL_SOCKET: SO_REUSEADDR SO_REUSEPORT SO_KEEPALIVE SO_OOBINLINE SO_LINGER SO_SNDTIMEO SO_RCVTIMEO SO_SNDBUF
        SO_RCVBUF SO_RCVLOWAT SO_PRIORITY SO_MARK SO_BINDTOIFINDEX SO_BUSY_POLL SO_MAX_PACING_RATE SO_ZEROCOPY),
    &options!(IPPROTO_TCP: TCP_NODELAY TCP_MAXSEG TCP_CORK TCP_KEEPIDLE TCP_KEEPINTVL TCP_KEEPCNT TCP_SYNCNT TCP_LINGER2
        TCP_DEFER_ACCEPT TCP_WINDOW_CLAMP TCP_QUICKACK TCP_CONGESTION TCP_MD5SIG TCP_THIN_LINEAR_TIMEOUTS TCP_THIN_DUPACK
        TCP_USER_TIMEOUT TCP_REPAIR TCP_FASTOPEN TCP_TIMESTAMP TCP_NOTSENT_LOWAT TCP_SAVE_SYN TCP_ULP TCP_MD5SIG_EXT
        TCP_FASTOPEN_KEY TCP_FASTOPEN_CONNECT TCP_FASTOPEN_NO_COOKIE TCP_ZEROCOPY_RECEIVE TCP_INQ),
    &options!(IPPROTO_IP: IP_TOS IP_TTL IP_MTU_DISCOVER IP_MINTTL IP_RECVERR IP_OPTIONS IP_FREEBIND IP_TRANSPARENT
        IP_BIND_ADDRESS_NO_PORT),
    &options!(IPPROTO_IPV6: IPV6_V6ONLY IPV6_TCLASS IPV6_UNICAST_HOPS IPV6_MTU_DISCOVER IPV6_RECVERR IPV6_FREEBIND
        IPV6_TRANSPARENT IPV6_AUTOFLOWLABEL),
];

/// The options that TCP sockets of this kernel know and its MPTCP sockets refuse, by level.
pub fn refused() -> io::Result<Vec<Vec<SocketOption>>> {
    let is_unknown = |option: &SocketOption, protocol| {
        // A socket for each: the options of one test must not matter to the next.
        let family =
            if option.level == libc::IPPROTO_IPV6 { AddressFamily::INET6 } else { AddressFamily::INET };
        let answer = copy_sockopt(open(family, protocol)?, option.level, option.number, &1u32.to_ne_bytes());
        let errno = answer.err().and_then(|error| error.raw_os_error());
        Ok::<_, io::Error>(matches!(errno, Some(libc::EOPNOTSUPP | libc::ENOPROTOOPT)))
    };
    BY_LEVEL
        .iter()
        .map(|level| {
            let mut refused = Vec::new();
            for option in *level {
                // Where IPv6 is off, its options are nobody's concern.
                if is_unknown(option, ipproto::MPTCP).unwrap_or(false) && !is_unknown(option, ipproto::TCP)? {
                    refused.push(*option);
                }
            }
            Ok(refused)
        })
        .collect()
}

/// Gives `to` the options of `from`, a socket of `family` and `protocol`, as far as they are not the defaults. The first
/// that `to` does not take is the error.
pub fn copy(
    from: &OwnedFd,
    family: AddressFamily,
    protocol: Protocol,
    to: &OwnedFd,
) -> Result<(), SocketOption> {
    let Ok(default) = open(family, protocol) else { return Ok(()) };
    for option in BY_LEVEL.into_iter().flatten() {
        let (mut value, mut usual) = ([0; 64], [0; 64]);
        let (Ok(length), Ok(usual_length)) = (
            getsockopt(from, option.level, option.number, &mut value),
            getsockopt(&default, option.level, option.number, &mut usual),
        ) else {
            continue;
        };
        if value[..length] == usual[..usual_length] {
            continue;
        }
        let mut value = value[..length].to_vec();
        // The kernel doubles what it is given for these (sock_setsockopt()).
        if option.level == libc::SOL_SOCKET
            && [libc::SO_SNDBUF, libc::SO_RCVBUF].contains(&option.number)
            && let Ok(bytes) = <[u8; 4]>::try_from(value.as_slice())
        {
            value = (u32::from_ne_bytes(bytes) / 2).to_ne_bytes().to_vec();
        }
        copy_sockopt(to, option.level, option.number, &value).map_err(|_| *option)?;
    }
    Ok(())
}

fn open(family: AddressFamily, protocol: Protocol) -> io::Result<impl AsFd> {
    Ok(socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(protocol))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_mptcp_refuses_is_asked_of_the_kernel() {
        let refused = refused().unwrap();
        let names: Vec<_> = refused.iter().flatten().map(|option| option.name).collect();
        for (name, expected) in [
            ("TCP_MD5SIG", true),
            ("TCP_REPAIR", true),
            ("IP_RECVERR", true),
            ("TCP_NODELAY", false),
            ("SO_REUSEADDR", false),
        ] {
            assert_eq!(names.contains(&name), expected, "{name}: {names:?}");
        }
    }

    #[test]
    fn options_come_over_but_those_that_are_refused_are_named() {
        let [tcp, mptcp] = [ipproto::TCP, ipproto::MPTCP].map(|protocol| {
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, Some(protocol))
                .unwrap()
        });
        let set = |level, name, value: u32| copy_sockopt(&tcp, level, name, &value.to_ne_bytes()).unwrap();
        let get = |socket: &OwnedFd, level, name| {
            let mut value = [0; 4];
            getsockopt(socket, level, name, &mut value).unwrap();
            u32::from_ne_bytes(value)
        };
        let options = [
            (libc::SOL_SOCKET, libc::SO_RCVBUF, 70_000),
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
            (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
            (libc::IPPROTO_IP, libc::IP_TOS, 8),
        ];
        for (level, name, value) in options {
            set(level, name, value);
        }
        assert_eq!(copy(&tcp, AddressFamily::INET, ipproto::TCP, &mptcp), Ok(()));
        for (level, name, _) in options {
            assert_eq!(get(&mptcp, level, name), get(&tcp, level, name), "{level} {name}");
        }
        set(libc::IPPROTO_TCP, libc::TCP_LINGER2, 7);
        let refusal = copy(&tcp, AddressFamily::INET, ipproto::TCP, &mptcp);
        assert_eq!(refusal.map_err(|option| option.name), Err("TCP_LINGER2"));
    }
}
