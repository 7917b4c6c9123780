//! The netlink transport: requests and their answers, and the splitting of datagrams into messages.
//!
//! The kernel works on a request inside `sendmsg(2)` and makes the parts of a dump inside `recvmsg(2)`, so that
//! an answer is always there to be read: requests are plain blocking calls. Only events need waiting for,
//! see [`crate::pm::Events`].

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use netlink_bindings::nlctrl;
use netlink_bindings::traits::NetlinkRequest;
use netlink_bindings::utils::find_attr;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

use crate::{Error, Netns, Result, sys};

pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;

const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Numbers below are control messages (`NLMSG_MIN_TYPE`).
const FIRST_DATA_KIND: u16 = 16;
const NLMSGERR_ATTR_MSG: u16 = 1;
const HEADER: usize = 16;
/// The kernel fills dumps up to the largest buffer that it saw, and not beyond this.
const DUMP_PART: usize = 32 * 1024;
/// A dump that the kernel's tables changed under is read again this often.
const DUMP_ATTEMPTS: usize = 8;

/// A netlink socket for requests, in one network namespace.
pub(crate) struct Socket {
    fd: OwnedFd,
    state: Mutex<State>,
}

struct State {
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    pub(crate) fn open(netns: &Netns, protocol: SockProtocol) -> Result<Self> {
        let fd = open(netns, protocol, SockFlag::empty())?;
        Ok(Socket { fd, state: Mutex::new(State { sequence: 0, buffer: Vec::new() }) })
    }

    /// Sends a request and collects the payloads of the messages that answer it. `what` names operation and
    /// object in errors.
    pub(crate) fn request(&self, what: &str, kind: u16, flags: u16, payload: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for _ in 0..DUMP_ATTEMPTS {
            let answer = exchange(self.fd.as_fd(), &mut state, kind, flags, payload)
                .map_err(|failure| failure.into_error(what))?;
            if !answer.interrupted {
                return Ok(answer.payloads);
            }
        }
        Err(Error::io(what, io::Error::from(io::ErrorKind::Interrupted)))
    }

    /// Looks up a generic netlink family by its name.
    pub(crate) fn family(&self, what: &str, name: &CStr) -> Result<Family> {
        let mut request = nlctrl::Request::new().op_getfamily_do();
        request.encode().push_family_name(name);
        let answer = self.request(what, libc::GENL_ID_CTRL as u16, 0, request.payload())?;
        Family::parse(&answer).map_err(|detail| Error::Malformed { what: what.into(), detail })
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "netlink::Socket({})", self.fd.as_raw_fd())
    }
}

/// The numbers that the running kernel gave to a generic netlink family.
#[derive(Debug)]
pub(crate) struct Family {
    pub(crate) id: u16,
    groups: Vec<(String, u32)>,
}

impl Family {
    fn parse(answer: &[Vec<u8>]) -> Result<Self, String> {
        let message = answer.first().ok_or("no answer to the family's name")?;
        let attributes = nlctrl::OpGetfamilyDo::decode_reply(message);
        let id = attributes.get_family_id().map_err(|e| e.to_string())?;
        let groups = attributes.get_mcast_groups().into_iter().flatten().filter_map(|group| {
            let name = group.get_name().ok()?.to_str().ok()?.to_string();
            Some((name, group.get_id().ok()?))
        });
        Ok(Family { id, groups: groups.collect() })
    }

    /// The multicast group `name`.
    pub(crate) fn group(&self, name: &str) -> Option<u32> {
        self.groups.iter().find(|(group, _)| group == name).map(|(_, id)| *id)
    }
}

/// A netlink socket made inside `netns`, with the kernel's own words in its errors.
pub(crate) fn open(netns: &Netns, protocol: SockProtocol, flags: SockFlag) -> Result<OwnedFd> {
    let open = || -> io::Result<OwnedFd> {
        let flags = flags | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            sys::setsockopt(&fd, libc::SOL_NETLINK, option, 1)?;
        }
        // Multicasts pass over a socket without a port id: it looks like their sender, the kernel.
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(fd)
    };
    netns
        .run(open)?
        .map_err(|e| Error::io(format!("open a netlink socket in network namespace {}", netns.name()), e))
}

/// Receives one datagram, however long, into `buffer`.
pub(crate) fn receive<'b>(fd: BorrowedFd<'_>, buffer: &'b mut Vec<u8>) -> io::Result<&'b [u8]> {
    buffer.resize(buffer.len().max(DUMP_PART), 0);
    let length = recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC)?;
    buffer.resize(buffer.len().max(length), 0);
    let length = recv(fd.as_raw_fd(), buffer, MsgFlags::empty())?;
    Ok(&buffer[..length])
}

/// One netlink message without its header.
#[derive(Debug, PartialEq)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    flags: u16,
    sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram; the last item is an error where the datagram ends in the middle of one.
pub(crate) fn messages(mut rest: &[u8]) -> impl Iterator<Item = Result<Message<'_>, &'static str>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let first = split(&mut rest);
        if first.is_none() {
            rest = &[];
        }
        Some(first.ok_or("a netlink message is cut short"))
    })
}

fn split<'a>(rest: &mut &'a [u8]) -> Option<Message<'a>> {
    let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
    let (header, payload) = rest.get(..length)?.split_at_checked(HEADER)?;
    let message = Message {
        kind: u16::from_ne_bytes([header[4], header[5]]),
        flags: u16::from_ne_bytes([header[6], header[7]]),
        sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
        payload,
    };
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(message)
}

#[derive(Debug, Default)]
struct Answer {
    payloads: Vec<Vec<u8>>,
    /// The kernel's tables changed between two parts of the dump.
    interrupted: bool,
}

#[derive(Debug)]
enum Failure {
    Io(io::Error),
    Refused { errno: i32, extack: Option<String> },
    Malformed(&'static str),
}

impl Failure {
    fn into_error(self, what: &str) -> Error {
        let what = what.to_string();
        match self {
            Failure::Io(source) => Error::Io { what, source },
            Failure::Refused { errno: libc::EPERM, .. } => {
                Error::Capability { what, capability: "CAP_NET_ADMIN" }
            }
            Failure::Refused { errno, extack } => {
                Error::Kernel { what, source: io::Error::from_raw_os_error(errno), extack }
            }
            Failure::Malformed(detail) => Error::Malformed { what, detail: detail.into() },
        }
    }
}

fn exchange(
    fd: BorrowedFd<'_>,
    state: &mut State,
    kind: u16,
    flags: u16,
    payload: &[u8],
) -> Result<Answer, Failure> {
    state.sequence = state.sequence.wrapping_add(1);
    // A dump ends with NLMSG_DONE by itself.
    let ack = if flags & NLM_F_DUMP == NLM_F_DUMP { 0 } else { NLM_F_ACK };
    let mut message = Vec::with_capacity(HEADER + payload.len());
    message.extend(((HEADER + payload.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((flags | NLM_F_REQUEST | ack).to_ne_bytes());
    message.extend(state.sequence.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    message.extend(payload);
    send(fd.as_raw_fd(), &message, MsgFlags::empty()).map_err(|e| Failure::Io(e.into()))?;

    let mut answer = Answer::default();
    loop {
        let datagram = match receive(fd, &mut state.buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.map_err(Failure::Io)?,
        };
        if answer.take(datagram, state.sequence)? {
            return Ok(answer);
        }
    }
}

impl Answer {
    /// Takes in one datagram; true when the answer is complete.
    fn take(&mut self, datagram: &[u8], sequence: u32) -> Result<bool, Failure> {
        for message in messages(datagram) {
            let message = message.map_err(Failure::Malformed)?;
            if message.sequence != sequence {
                continue;
            }
            self.interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
            match message.kind {
                NLMSG_ERROR | NLMSG_DONE => return finish(&message).map(|()| true),
                FIRST_DATA_KIND.. => self.payloads.push(message.payload.to_vec()),
                _ => {}
            }
        }
        Ok(false)
    }
}

/// What NLMSG_ERROR and NLMSG_DONE say: zero or a negative error number, with words where there are some.
fn finish(message: &Message<'_>) -> Result<(), Failure> {
    let number = match message.payload.first_chunk() {
        Some(bytes) => i32::from_ne_bytes(*bytes),
        None if message.kind == NLMSG_DONE => 0,
        None => return Err(Failure::Malformed("an error without its number")),
    };
    if number == 0 {
        Ok(())
    } else {
        Err(Failure::Refused { errno: number.wrapping_neg(), extack: extack(message) })
    }
}

fn extack(message: &Message<'_>) -> Option<String> {
    if message.flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let mut at = 4;
    if message.kind == NLMSG_ERROR {
        // The request's header comes back, and the rest of the request too where it is not capped.
        let request = u32::from_ne_bytes(*message.payload.get(4..)?.first_chunk()?) as usize;
        at += if message.flags & NLM_F_CAPPED != 0 { HEADER } else { request.checked_next_multiple_of(4)? };
    }
    let text = find_attr(message.payload.get(at..)?, NLMSGERR_ATTR_MSG)?;
    Some(String::from_utf8_lossy(text.strip_suffix(b"\0").unwrap_or(text)).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn an_answer_of_several_parts_ends_with_done() {
        let mut answer = Answer::default();
        let first =
            [message(20, 2, 7, b"one"), message(20, 2, 6, b"stale"), message(20, 2, 7, b"two")].concat();
        assert!(!answer.take(&first, 7).unwrap());
        assert!(answer.take(&message(NLMSG_DONE, 2, 7, &0i32.to_ne_bytes()), 7).unwrap());
        assert_eq!(answer.payloads, [b"one", b"two"]);
        assert!(!answer.interrupted);
    }

    #[test]
    fn an_interrupted_dump_is_noticed() {
        let mut answer = Answer::default();
        let part = [message(20, 2 | NLM_F_DUMP_INTR, 7, b"one"), message(NLMSG_DONE, 2, 7, &[0; 4])].concat();
        assert!(answer.take(&part, 7).unwrap());
        assert!(answer.interrupted);
    }

    #[test]
    fn an_error_keeps_the_kernels_words() {
        let mut payload = (-17i32).to_ne_bytes().to_vec();
        payload.extend(message(20, 5, 7, b"")); // the request's header
        payload.extend([11, 0, 1, 0]);
        payload.extend(b"in use\0\0");
        let error = message(NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS, 7, &payload);
        let failure = Answer::default().take(&error, 7).unwrap_err().into_error("add endpoint 10.0.0.2 id 2");
        assert_eq!(failure.to_string(), "add endpoint 10.0.0.2 id 2: File exists (kernel: in use)");
    }

    #[test]
    fn the_words_are_found_behind_a_request_that_came_back_whole() {
        let request = message(20, 5, 7, b"0123456");
        let mut payload = (-22i32).to_ne_bytes().to_vec();
        payload.extend(&request[..]);
        payload.extend([8, 0, 1, 0]);
        payload.extend(b"bad\0");
        let failure =
            Answer::default().take(&message(NLMSG_ERROR, NLM_F_ACK_TLVS, 7, &payload), 7).unwrap_err();
        assert_eq!(failure.into_error("x").to_string(), "x: Invalid argument (kernel: bad)");
    }

    #[test]
    fn a_datagram_cut_short_is_an_error() {
        let mut bytes = message(20, 0, 7, b"whole");
        bytes.truncate(bytes.len() - 4);
        assert!(matches!(Answer::default().take(&bytes, 7), Err(Failure::Malformed(_))));
    }

    proptest! {
        #[test]
        fn no_datagram_makes_the_decoder_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u16..4, flags: u16,
        ) {
            let _ = Answer::default().take(&bytes, 7);
            let _ = Answer::default().take(&message(kind, flags, 7, &bytes), 7);
            let _ = Family::parse(&[bytes]);
        }
    }
}
